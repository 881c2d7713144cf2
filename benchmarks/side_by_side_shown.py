"""What side_by_side.py shows of its rows: table, plots and ratios."""

from records import write_figure

KEYS = ("task", "model", "threads", "seconds")
OURS = tuple(f"flashformer-{size}" for size in ("tiny", "base", "large"))
# Base without its window, and with attention over every frame.
CHANGED = (
    "flashformer-base:window=None",
    "flashformer-base:token_stride=1:window=(2000,2000)",
)
PEERS = (
    "conv-tasnet",
    "dprnn",
    "skim",
    "sepformer",
    "re-sepformer",
    "mossformer2",
    "fla-sepreformer",
)
MODELS = (*OURS, *CHANGED, *PEERS)
# As published, dB on WSJ0-2mix: without and with dynamic mixing. MACs of those
# that are not run here were counted by the same counter.
PUBLISHED = {
    "conv-tasnet": (15.3, None),
    "sepformer": (20.4, 22.4),
    "re-sepformer": (None, 18.6),
    "skim": (None, 18.1),
    "mossformer2": (None, 24.1),
}
COUNTED = {
    "SepReformer-T": (5.4, 22.4, None),
    "SepReformer-B": (20.2, 23.8, None),
    "SepReformer-L": (78, None, 25.1),
    "TF-Locoformer-M": (125, 23.6, 24.6),
}
TABLE = "python benchmarks/side_by_side.py"


def table(rows):
    """Return the table of the README as Markdown, for two threads."""
    found = {tuple(row[key] for key in KEYS): row for row in rows}

    def cell(task, model, seconds, column, digits):
        row = found.get((task, model, 2, seconds))
        if row is None:
            return ""
        if row["outcome"] == "ok":
            return f"{row[column]:.{digits}f}"
        return row["outcome"].split(":")[0]

    lines = [
        "| model | parameters (M) | GMAC/s | RTF, 4 s | RTF, 60 s "
        "| RTF, 10 min | MB, 60 s | MB, 10 min | training step (s) "
        "| training MB |",
        "|---|---|---|---|---|---|---|---|---|---|",
    ]
    for model in MODELS:
        known = [
            row for row in rows if row["model"] == model and row["gmac_per_s"]
        ]
        if not any(row["model"] == model for row in rows):
            continue
        about = ["", ""]
        if known:
            about = [
                f"{known[0]['parameters_m']:.1f}",
                f"{known[0]['gmac_per_s']:.2f}",
            ]
        cells = [
            model,
            *about,
            *(cell("separate", model, s, "rtf", 3) for s in (4, 60, 600)),
            *(
                cell("separate", model, s, "extra_peak_mb", 0)
                for s in (60, 600)
            ),
            cell("train", model, 4, "median_s", 2),
            cell("train", model, 4, "extra_peak_mb", 0),
        ]
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines) + "\n"


def draw(rows, results):
    """Plot time and memory over the length, and quality over MACs."""
    from matplotlib.figure import Figure

    # On a log axis there must be something.
    if not any(row["threads"] == 2 and row["outcome"] == "ok" for row in rows):
        return
    figure = Figure(figsize=(11, 4.5), layout="constrained")
    for axes, column, label in zip(
        figure.subplots(1, 2),
        ("rtf", "extra_peak_mb"),
        ("time per second of audio (s)", "memory (MB)"),
    ):
        for model in (*OURS, *PEERS):
            points = [
                (row["seconds"], row[column])
                for row in rows
                if (row["task"], row["model"]) == ("separate", model)
                and row["threads"] == 2
                and row["outcome"] == "ok"
                and row[column] > 0
            ]
            style = "-o" if model in OURS else "--."
            if points:
                axes.plot(*zip(*points), style, label=model)
        axes.set(xscale="log", yscale="log", xlabel="audio (s)", ylabel=label)
        axes.grid(alpha=0.3, which="both")
    figure.axes[0].axhline(1, color="0.6", linewidth=0.8)
    handles, labels = figure.axes[0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside right upper", fontsize=8)
    figure.suptitle("separation, CPU, two threads, float32", fontsize=10)
    _save(figure, results, "length")

    macs = {
        row["model"]: row["gmac_per_s"] for row in rows if row["gmac_per_s"]
    }
    points = {
        model: (macs[model], *PUBLISHED[model])
        for model in PEERS
        if model in macs and model in PUBLISHED
    } | COUNTED
    figure = Figure(figsize=(8, 4.5), layout="constrained")
    axes = figure.subplots()
    for name, (gmacs, *gains) in points.items():
        for gain, marker in zip(gains, ("o", "^")):
            if gain:
                axes.plot(gmacs, gain, marker, color="C0")
                axes.annotate(
                    name,
                    (gmacs, gain),
                    (4, 4),
                    textcoords="offset points",
                    fontsize=8,
                )
    for name in OURS:
        if name in macs:
            axes.axvline(macs[name], color="C1", linestyle=":")
            axes.annotate(
                f"{name}: not trained on it",
                (macs[name], 15.2),
                (3, 0),
                textcoords="offset points",
                rotation=90,
                fontsize=8,
            )
    axes.plot([], [], "o", color="C0", label="as published")
    axes.plot([], [], "^", color="C0", label="with dynamic mixing")
    axes.set(
        xscale="log",
        xlim=(0.15, 500),
        xlabel="GMAC per second of audio",
        ylabel="SI-SNRi on WSJ0-2mix (dB)",
    )
    axes.grid(alpha=0.3)
    axes.legend(loc="lower right", fontsize=8)
    _save(figure, results, "quality")


def _save(figure, results, what):
    write_figure(results.with_name(f"{results.stem}_{what}.png"), figure)


def report(rows):
    """Yield lines that compare the ratios with their goals, two threads."""
    found = {
        tuple(row[key] for key in KEYS): row
        for row in rows
        if row["outcome"] == "ok"
    }
    base = "flashformer-base"

    def ratio(task, seconds, column, peer):
        pair = [found.get((task, m, 2, seconds)) for m in (peer, base)]
        if None in pair:
            return "not measured"
        return f"{pair[0][column] / pair[1][column]:.1f}"

    for peer, bar in (("sepformer", 10), ("conv-tasnet", 1)):
        for seconds in (4, 16, 60):
            times = ratio("separate", seconds, "median_s", peer)
            yield f"{seconds} s: time of {peer} to base: {times} (bar {bar})"
    memory = ratio("separate", 60, "extra_peak_mb", "sepformer")
    yield f"60 s: memory of sepformer to base: {memory} (bar 6)"
    step = ratio("train", 4, "median_s", "sepformer")
    memory = ratio("train", 4, "extra_peak_mb", "sepformer")
    yield f"training: time of sepformer to base: {step} (bar 5)"
    yield f"training: memory of sepformer to base: {memory} (bar 3)"
    ends = [found.get(("separate", base, 2, s)) for s in (16, 240)]
    if None not in ends:
        growth = ends[1]["rtf"] / ends[0]["rtf"]
        yield f"base: RTF at 240 s to that at 16 s: {growth:.2f} (bar 1.3)"

"""The command ``flashformer``, run as users run it."""

import io
import os
import signal
import subprocess
import sys
import threading
import time

import numpy as np
import pytest
import soundfile
from hyperpyyaml import load_hyperpyyaml
from speechbrain.utils.checkpoints import Checkpointer

from speechbrain_flashformer import cli
from speechbrain_flashformer.inference import built_in_model


def flashformer(*arguments, stdin=None, **environment):
    return subprocess.run(
        [sys.executable, "-m", "speechbrain_flashformer.cli", *arguments],
        input=stdin,
        capture_output=True,
        env={**os.environ, "OMP_NUM_THREADS": "1", **environment},
        timeout=120,
    )


def run(*arguments):
    """The same in this process, for what needs no process of its own."""
    return cli.main([str(argument) for argument in arguments])


def speak(path, seconds=1.0, rate=8000, seed=0):
    path.parent.mkdir(parents=True, exist_ok=True)
    noise = np.random.default_rng(seed).normal(size=round(seconds * rate))
    soundfile.write(path, 0.1 * noise, rate)
    return path


def names(folder):
    return sorted(
        path.relative_to(folder).as_posix()
        for path in folder.rglob("*")
        if path.is_file()
    )


# --- separate ----------------------------------------------------------------


def test_separate_in_a_process(packed, tmp_path):
    speak(tmp_path / "mix.wav", seconds=1.5, rate=16000)
    done = flashformer(
        "separate",
        str(tmp_path / "mix.wav"),
        "-o",
        str(tmp_path / "out"),
        "--model",
        str(packed),
    )
    assert done.returncode == 0, done.stderr
    assert names(tmp_path / "out") == ["mix_s1.wav", "mix_s2.wav"]
    written = done.stdout.decode().split()
    assert written == [str(tmp_path / "out" / f"mix_s{i}.wav") for i in (1, 2)]
    info = soundfile.info(written[0])
    assert (info.frames, info.samplerate) == (24000, 16000)


def test_standard_input(packed, tmp_path):
    recording = speak(tmp_path / "mix.flac").read_bytes()
    done = flashformer(
        "separate",
        "-",
        "-o",
        str(tmp_path / "out"),
        "--model",
        str(packed),
        stdin=recording,
    )
    assert done.returncode == 0, done.stderr
    assert names(tmp_path / "out") == ["stdin_s1.wav", "stdin_s2.wav"]


@pytest.mark.parametrize(
    "inputs, world, message",
    [(("-", "-"), "1", "only once"), (("-",), "2", "cannot be shared")],
)
def test_standard_input_is_for_one(
    tmp_path, capsys, monkeypatch, inputs, world, message
):
    monkeypatch.setenv("WORLD_SIZE", world)
    assert run("separate", *inputs, "-o", tmp_path / "out") == 2
    assert message in capsys.readouterr().err


def test_help_of_each_command():
    for command in ("separate", "stream", "pack", "info", "export"):
        with pytest.raises(SystemExit) as ended:
            run(command, "--help")
        assert ended.value.code == 0


# What each command does without: most of its start is what it imports.
SPEECHBRAIN = ("speechbrain", "scipy", "requests", "huggingface_hub")
COMPILER = ("torch._dynamo", "sympy")
NOT_IMPORTED = {
    "help": ("torch", "numpy", "soundfile", *SPEECHBRAIN),
    "separate": (
        "torchaudio",
        "triton",
        "matplotlib",
        *SPEECHBRAIN,
        *COMPILER,
    ),
    "info": ("torchaudio", "matplotlib", *SPEECHBRAIN, *COMPILER),
}


@pytest.mark.parametrize("command", NOT_IMPORTED)
def test_a_command_imports_only_what_it_uses(tmp_path, packed, command):
    path = speak(tmp_path / "a.wav", 5)
    words = {
        "help": ["--help"],
        "separate": ["separate", path, "-o", tmp_path, "--model", packed],
        "info": ["info", packed],
    }[command]
    code = (
        "import sys\n"
        "from speechbrain_flashformer import cli\n"
        "try:\n"
        "    status = cli.main(sys.argv[1:])\n"
        "except SystemExit as end:\n"
        "    status = end.code\n"
        "print(*sys.modules, sep='\\n', file=sys.stderr)\n"
        "sys.exit(status)\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", code, *map(str, words)],
        capture_output=True,
        text=True,
        check=True,
    )
    imported = set(done.stderr.split())
    assert "speechbrain_flashformer.cli" in imported
    assert not imported & set(NOT_IMPORTED[command])


def test_no_command_is_an_error_of_use():
    with pytest.raises(SystemExit) as ended:
        run()
    assert ended.value.code == 2


def test_folders_are_repeated_and_globs_are_spread(packed, tmp_path):
    speak(tmp_path / "in/a.wav")
    speak(tmp_path / "in/deep/er/b.FLAC".replace("FLAC", "flac"))
    (tmp_path / "in/notes.txt").write_text("no audio")
    speak(tmp_path / "more/c1.wav")
    speak(tmp_path / "more/c2.wav")
    inputs = [tmp_path / "in", tmp_path / "more/c*.wav"]
    out = tmp_path / "out"
    assert run("separate", *inputs, "-o", out, "--model", packed) == 0
    assert names(out) == [
        f"{name}_s{i}.wav"
        for name in ("a", "c1", "c2", "deep/er/b")
        for i in (1, 2)
    ]


def test_a_name_with_brackets_is_a_file(packed, tmp_path):
    speak(tmp_path / "take [1].wav")
    out = tmp_path / "out"
    path = tmp_path / "take [1].wav"
    assert run("separate", path, "-o", out, "--model", packed) == 0
    assert names(out) == ["take [1]_s1.wav", "take [1]_s2.wav"]


def test_the_batch_goes_on_past_bad_files(packed, tmp_path, capsys):
    speak(tmp_path / "in/a.wav")
    (tmp_path / "in/b.wav").write_text("not audio")
    speak(tmp_path / "in/c.wav")
    out = tmp_path / "out"
    missing = tmp_path / "missing.wav"
    status = run(
        "separate", tmp_path / "in", missing, "-o", out, "--model", packed
    )
    assert status == 1
    assert names(out) == ["a_s1.wav", "a_s2.wav", "c_s1.wav", "c_s2.wav"]
    errors = capsys.readouterr().err
    assert "2 failed:" in errors
    assert "cannot read" in errors and "b.wav" in errors
    assert f"no file {missing}" in errors


def test_existing_outputs_stay_unless_told(packed, tmp_path, capsys):
    path = speak(tmp_path / "a.wav")
    arguments = ("separate", path, "-o", tmp_path / "out", "--model", packed)
    assert run(*arguments) == 0
    before = (tmp_path / "out/a_s1.wav").read_bytes()
    speak(path, seed=1)
    assert run(*arguments) == 1
    assert "a_s1.wav exists" in capsys.readouterr().err
    assert (tmp_path / "out/a_s1.wav").read_bytes() == before
    assert run(*arguments, "--overwrite") == 0
    assert (tmp_path / "out/a_s1.wav").read_bytes() != before


def test_two_inputs_of_one_name_are_refused_before_work(
    packed, tmp_path, capsys
):
    a, b = speak(tmp_path / "x/a.wav"), speak(tmp_path / "y/a.wav")
    out = tmp_path / "out"
    assert run("separate", a, b, "-o", out, "--model", packed) == 1
    assert "would both be written as" in capsys.readouterr().err
    assert not out.exists()


def test_jobs_give_the_same_files(packed, tmp_path):
    for i in range(3):
        speak(tmp_path / f"in/{i}.wav", seed=i)
    for jobs in (1, 2):
        out = tmp_path / f"out{jobs}"
        arguments = ("-o", out, "--model", packed, "--jobs", jobs)
        assert run("separate", tmp_path / "in", *arguments) == 0
    for name in names(tmp_path / "out1"):
        one, two = (
            soundfile.read(tmp_path / f"out{jobs}" / name)[0] for jobs in (1, 2)
        )
        np.testing.assert_allclose(one, two, atol=1e-6)
    assert len(names(tmp_path / "out2")) == 6


def test_torchrun_ranks_share_the_files(packed, tmp_path):
    for i in range(3):
        speak(tmp_path / f"in/{i}.wav")
    found = []
    for rank in range(2):
        out = tmp_path / f"out{rank}"
        done = flashformer(
            "separate",
            str(tmp_path / "in"),
            "-o",
            str(out),
            "--model",
            str(packed),
            RANK=str(rank),
            WORLD_SIZE="2",
        )
        assert done.returncode == 0, done.stderr
        found += names(out)
    assert sorted(found) == [f"{i}_s{s}.wav" for i in range(3) for s in (1, 2)]


def test_options_reach_the_separation(packed, tmp_path):
    path = speak(tmp_path / "a.wav")
    out = tmp_path / "out"
    options = ("--subtype", "pcm16", "--normalize", "--channels", "each")
    assert run("separate", path, "-o", out, "--model", packed, *options) == 0
    assert names(out) == ["a_c1_s1.wav", "a_c1_s2.wav"]
    assert soundfile.info(out / "a_c1_s1.wav").subtype == "PCM_16"
    peaks = [np.abs(soundfile.read(out / n)[0]).max() for n in names(out)]
    assert abs(max(peaks) - 0.9) < 1e-3


def test_separate_streaming(packed, packed_causal, tmp_path, capsys):
    path, out = speak(tmp_path / "a.wav"), tmp_path / "out"
    arguments = ("separate", path, "-o", out, "--streaming", "--model")
    assert run(*arguments, packed) == 1
    assert "cannot stream: give a causal one" in capsys.readouterr().err
    assert run(*arguments, packed_causal) == 0
    assert names(out) == ["a_s1.wav", "a_s2.wav"]


@pytest.mark.parametrize(
    "options, status, message",
    [
        (["--device", "warp"], 1, "--device warp"),
        (["--model", "./nowhere"], 1, "no model folder nowhere"),
        (["--jobs", "2", "--model", "./nowhere"], 1, "no model folder"),
        (["--model", "nowhere"], 1, "no model folder nowhere: give one made"),
        (["--chunk", "4", "--overlap", "2"], 2, "less than half of chunk"),
        (["--overlap", "0"], 2, "overlap must be more than 0"),
        (["--jobs", "0"], 2, "--jobs must be 1 or more"),
        (["--streaming", "--chunk", "20"], 2, "chunk cannot be set"),
    ],
)
def test_bad_options_are_named(
    packed, tmp_path, capsys, options, status, message
):
    path = speak(tmp_path / "a.wav")
    arguments = [path, "-o", tmp_path / "out", "--model", packed]
    assert run("separate", *arguments, *options) == status
    assert message in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


def test_without_a_model_the_message_says_what_to_give(
    tmp_path, capsys, monkeypatch
):
    from speechbrain_flashformer.inference import folders

    monkeypatch.setattr(
        folders, "__file__", str(tmp_path / "inference" / "folders.py")
    )
    path = speak(tmp_path / "a.wav")
    assert run("separate", path, "-o", tmp_path / "out") == 1
    assert "give one as --model" in capsys.readouterr().err


def test_a_folder_without_audio_is_told(packed, tmp_path, capsys):
    path = speak(tmp_path / "a.wav")
    (tmp_path / "in").mkdir()
    out = tmp_path / "out"
    inputs = (tmp_path / "in", path)
    assert run("separate", *inputs, "-o", out, "--model", packed) == 1
    assert "no audio file in" in capsys.readouterr().err
    assert names(out) == ["a_s1.wav", "a_s2.wav"]


LONG = 400  # seconds, which take some


def start_long(packed, tmp_path, *options):
    """A separation of three long recordings, when it has begun to write."""
    folder, out = tmp_path / "in", tmp_path / "out"
    for i in range(3):
        speak(folder / f"{i}.wav", seconds=LONG)
    process = subprocess.Popen(
        [sys.executable, "-m", "speechbrain_flashformer.cli", "separate"]
        + [str(folder), "-o", str(out), "--model", str(packed), *options],
        stderr=subprocess.PIPE,
        start_new_session=True,
        # Where tests run in the background, Ctrl-C is ignored from the start.
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
        env={**os.environ, "OMP_NUM_THREADS": "1"},
    )
    deadline = time.time() + 400
    while not out.exists() or not names(out):
        assert process.poll() is None and time.time() < deadline
        time.sleep(0.02)
    return process, out


@pytest.mark.parametrize(
    "jobs, sent, to_group, status",
    [
        (1, signal.SIGTERM, False, 143),
        (1, signal.SIGINT, False, 130),
        (2, signal.SIGTERM, False, 143),
        (2, signal.SIGTERM, True, 143),
        (2, signal.SIGINT, True, 130),
    ],
)
def test_a_stopped_run_leaves_no_partial_file(
    packed, tmp_path, jobs, sent, to_group, status
):
    process, out = start_long(packed, tmp_path, "--jobs", str(jobs))
    send = os.killpg if to_group else os.kill
    send(process.pid, sent)
    assert process.wait(120) == status
    # Recordings that were done by then are whole; of the others nothing is.
    assert len(names(out)) in (0, 2, 4)
    assert all(name.endswith(("_s1.wav", "_s2.wav")) for name in names(out))
    for name in names(out):
        assert soundfile.info(out / name).frames == LONG * 8000


def test_a_worker_that_dies_takes_one_recording_with_it(packed, tmp_path):
    process, out = start_long(packed, tmp_path, "--jobs", "2")
    (partial, *_) = names(out)
    worker = int(partial.split("-")[1])
    assert worker != process.pid
    os.kill(worker, signal.SIGKILL)
    _, errors = process.communicate(timeout=200)
    assert process.returncode == 1
    assert b"1 failed:" in errors
    assert b"its process died (exit status -9)" in errors
    assert len(names(out)) == 4
    assert all(name.endswith(("_s1.wav", "_s2.wav")) for name in names(out))


def test_outputs_inside_the_input_are_no_recordings(packed, tmp_path):
    folder = tmp_path / "in"
    speak(folder / "a.wav")
    speak(folder / ".hidden.wav")
    (folder / "folder.wav").mkdir()
    out = folder / "separated"
    arguments = ("separate", folder, "-o", out, "--model", packed)
    assert run(*arguments) == 0
    assert run(*arguments, "--overwrite") == 0
    assert names(out) == ["a_s1.wav", "a_s2.wav"]


def test_a_recording_named_twice_is_separated_once(packed, tmp_path, capsys):
    path = speak(tmp_path / "a.wav")
    out, pattern = tmp_path / "out", tmp_path / "*.wav"
    assert run("separate", path, pattern, "-o", out, "--model", packed) == 0
    assert len(capsys.readouterr().out.split()) == 2


@pytest.mark.parametrize(
    "inside, out",
    [("rec", "rec"), ("rec/monday", "rec"), ("rec", "."), (".", ".")],
)
def test_outputs_go_into_the_input_or_above_it(
    packed, tmp_path, capsys, monkeypatch, inside, out
):
    a, b = speak(tmp_path / "rec/a.wav"), speak(tmp_path / "rec/monday/b.wav")
    before = a.read_bytes(), b.read_bytes()
    monkeypatch.chdir(tmp_path)
    arguments = ("separate", inside, "-o", out, "--model", packed)
    assert run(*arguments) == 0
    written = capsys.readouterr().out.split()
    assert len(written) == (2 if "monday" in inside else 4)
    # What was written is no recording the next time, wherever that writes.
    assert run(*arguments, "--overwrite") == 0
    assert capsys.readouterr().out.split() == written
    assert run("separate", "rec", "-o", "new", "--model", packed) == 0
    printed = capsys.readouterr()
    assert len(printed.out.split()) == 4
    if out != ".":
        assert "passed over, as they were separated" in printed.err
    assert (a.read_bytes(), b.read_bytes()) == before


@pytest.mark.parametrize("words", [["a.wav", "a_s1.wav"], ["."]])
def test_a_recording_is_never_written_over(
    packed, tmp_path, capsys, monkeypatch, words
):
    speak(tmp_path / "a.wav")
    named_alike = speak(tmp_path / "a_s1.wav", seed=1)
    before = named_alike.read_bytes()
    monkeypatch.chdir(tmp_path)
    options = ("-o", ".", "--model", packed, "--overwrite")
    assert run("separate", *words, *options) == 1
    assert "over the recording a_s1.wav" in capsys.readouterr().err
    assert names(tmp_path)[:2] == ["a.wav", "a_s1.wav"]
    assert named_alike.read_bytes() == before


def test_sources_that_are_given_are_separated(packed, tmp_path):
    out = tmp_path / "out"
    path = speak(tmp_path / "a.wav")
    assert run("separate", path, "-o", out, "--model", packed) == 0
    again = tmp_path / "again"
    assert run("separate", out, "-o", again, "--model", packed) == 0
    assert len(names(again)) == 4


def test_folders_give_all_that_can_be_read_and_name_the_rest(
    packed, tmp_path, capsys
):
    folder = tmp_path / "in"
    for name in ("a.wav", "c.au", "d.caf", "e.w64", "f.mp3", "g.aiff"):
        speak(folder / name)
    (folder / "g.aiff").rename(folder / "g.AIFC")
    for name in ("b.oga", "h.opus"):
        soundfile.write(
            folder / name,
            0.1 * np.random.default_rng(0).normal(size=8000),
            8000,
            "OPUS" if name == "h.opus" else "VORBIS",
            format="OGG",
        )
    for i in range(7):
        (folder / f"{i}.m4a").write_bytes(b"no matter what")
    (folder / "._a.wav").write_bytes(b"of another system")
    out = tmp_path / "out"
    assert run("separate", folder, "-o", out, "--model", packed) == 0
    assert names(out) == [f"{n}_s{i}.wav" for n in "abcdefgh" for i in (1, 2)]
    errors = capsys.readouterr().err
    assert "0.m4a, 1.m4a, 2.m4a, 3.m4a, 4.m4a and 2 more" in errors


def test_names_that_cannot_be_printed_lose_nothing(
    packed, tmp_path, monkeypatch
):
    folder, out = tmp_path / "in", tmp_path / "out"
    for name in ("a\u7d46", "caf\xe9", "z"):
        speak(folder / f"{name}.wav")
    bare = os.fsdecode(b"bare \xff.wav")
    try:
        speak(tmp_path / "x.wav").rename(folder / bare)
    except OSError:
        pytest.skip("this file system takes UTF-8 alone")
    printed = io.BytesIO()
    stream = io.TextIOWrapper(printed, "cp1252")
    monkeypatch.setattr(sys, "stdout", stream)
    assert run("separate", folder, "-o", out, "--model", packed) == 0
    assert len(names(out)) == 8
    lines = printed.getvalue().splitlines()
    start = os.fsencode(out)
    assert start + b"/bare \xff_s1.wav" in lines
    assert start + b"/caf\xe9_s1.wav" in lines
    assert start + b"/a\\u7d46_s1.wav" in lines


def test_without_standard_error_nothing_is_lost(packed, tmp_path):
    path, out = speak(tmp_path / "a.wav"), tmp_path / "out"
    done = subprocess.run(
        ["sh", "-c", 'exec "$@" 2>&-', "sh", sys.executable, "-m"]
        + ["speechbrain_flashformer.cli", "separate", path]
        + [tmp_path / "none.wav", "-o", out, "--model", packed],
        stdout=subprocess.PIPE,
    )
    assert done.returncode == 1
    written = [str(out / f"a_s{i}.wav") for i in (1, 2)]
    assert done.stdout.decode().split() == written
    for name in written:
        assert soundfile.info(name).frames == 8000


def test_pipes_are_read_once(packed, tmp_path):
    content = speak(tmp_path / "a.wav").read_bytes()
    fifo, out = tmp_path / "fifo.wav", tmp_path / "out"
    os.mkfifo(fifo)
    end, begin = os.pipe()  # as the shell makes it for <( )
    feeds = [
        threading.Thread(target=fifo.write_bytes, args=[content]),
        threading.Thread(target=_write_all, args=[begin, content]),
    ]
    for feed in feeds:
        feed.start()
    inputs = (fifo, f"/dev/fd/{end}")
    options = ("--model", packed, "--channels", "each")
    assert run("separate", *inputs, "-o", out, *options) == 0
    for feed in feeds:
        feed.join()
    os.close(end)
    stems = sorted([str(end), "fifo"])
    assert names(out) == [f"{n}_c1_s{i}.wav" for n in stems for i in (1, 2)]


def _write_all(number, content):
    with open(number, "wb") as pipe:
        pipe.write(content)


def test_channels_that_cancel_are_told(packed, tmp_path, capsys):
    samples = 0.1 * np.random.default_rng(0).normal(size=8000)
    path = tmp_path / "a.wav"
    soundfile.write(path, np.stack([samples, -samples], 1), 8000)
    out = tmp_path / "out"
    assert run("separate", path, "-o", out, "--model", packed) == 0
    errors = capsys.readouterr().err
    assert errors.startswith("flashformer: the channels of ")
    assert soundfile.read(out / "a_s1.wav")[0].any()


# --- the other commands ------------------------------------------------------


def test_info(packed, capsys):
    assert run("info", packed) == 0
    printed = capsys.readouterr().out
    for what in (packed, "speakers", "8000 Hz", "GMAC per second", "sdpa"):
        assert str(what) in printed


def test_info_without_a_model_shows_both_of_the_package(capsys):
    assert run("info") == 0
    printed = capsys.readouterr().out.split()
    for streaming in (False, True):
        assert str(built_in_model(streaming)) in printed


def test_a_reader_that_leaves_is_no_failure(packed):
    end, begin = os.pipe()
    os.close(end)
    done = subprocess.run(
        [sys.executable, "-m", "speechbrain_flashformer.cli", "info", packed],
        stdout=begin,
        stderr=subprocess.PIPE,
    )
    os.close(begin)
    assert done.returncode == 141
    assert b"ipe" not in done.stderr


def test_pack(make_run, tmp_path, capsys):
    folder = make_run(tmp_path / "run", seed=0)
    out = tmp_path / "model"
    assert run("pack", folder, out, "--half") == 0
    assert capsys.readouterr().out.strip() == str(out)
    assert run("pack", folder, out) == 1
    assert "exists: remove it" in capsys.readouterr().err
    assert run("pack", folder, out, "--overwrite") == 0


def test_pack_the_last_checkpoint(make_run, tmp_path):
    folder, out = make_run(tmp_path / "run", seed=0), tmp_path / "model"
    (folder / "test_results.csv").write_text(
        "snt_id,si-snr_i,sdr_i\na,16.5,17.5\navg,16.5,17.5\n"
    )
    modules = load_hyperpyyaml((folder / "hyperparams.yaml").read_text())
    checkpointer = Checkpointer(folder / "save", modules["modules"])
    checkpointer.save_checkpoint(meta={"si-snr": 99.0, "epoch": 99})
    for words, last in (((), False), (("--last", "--overwrite"), True)):
        assert run("pack", folder, out, *words) == 0
        card = (out / "README.md").read_text("utf-8")
        assert ("at epoch 99" in card) == last
        # The training tested the best checkpoint.
        assert ("16.50" in card) != last


def test_export(packed, tmp_path, monkeypatch, capsys):
    from speechbrain_flashformer.inference import export

    def asked(model, path, *options, int8):
        assert model.hparams.sample_rate == 8000
        return f"{path} {options} {int8}"

    monkeypatch.setattr(export, "export_onnx", asked)
    monkeypatch.setattr(export, "export_streaming_onnx", asked)
    path = tmp_path / "a.onnx"
    assert run("export", packed, path, "--overwrite") == 0
    words = ["export", packed, path, "--streaming", "--block", 32]
    assert run(*words) == run(*words, "--int8") == 0
    assert run("export", packed, path, "--int8") == 0
    assert capsys.readouterr().out.splitlines() == [
        f"{path} (True,) False",
        f"{path} (False, 32.0) False",
        f"{path} (False, 32.0) True",
        f"{path} (False,) True",
    ]
    assert run("export", packed, path, "--block", 32) == 2
    assert "--block needs --streaming" in capsys.readouterr().err

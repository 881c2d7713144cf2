"""Voices that are made up, and who came out where."""

import torch

RATE = 8000


def voice(seconds, pitch, tilt, seed):
    """Something with the pitch and the envelope of one speaker, in words."""
    generator = torch.Generator().manual_seed(seed)
    n = round(seconds * RATE)
    # Melody and loudness move from word to word.
    steps = -(-n // 2000)
    melody = 1 + 0.1 * torch.randn(steps, generator=generator)
    loudness = torch.rand(steps, generator=generator).round() + 0.02
    melody, loudness = (
        x.repeat_interleave(2000)[:n] for x in (melody, loudness)
    )
    phase = (pitch * melody / RATE).cumsum(0) * 2 * torch.pi
    harmonics = torch.arange(1, int(3800 / pitch / 1.4))
    waves = torch.sin(harmonics[:, None] * phase)
    weights = (harmonics * pitch / 100) ** -tilt
    return 0.3 * loudness * (weights[:, None] * waves).sum(0)


def swapped_share(out, sources):
    """Share of the speech that came out as another speaker's.

    A speaker belongs to the output in which most of its seconds are.
    """
    loud = 0.05 * sources.square().mean() * RATE
    places = []
    for start in range(0, sources.shape[1], RATE):
        piece = slice(start, start + RATE)
        for source in sources:
            energy = source[piece].square().sum()
            likeness = (out[:, piece] * source[piece]).sum(1)
            places.append(likeness.argmax().item() if energy > loud else None)
    # One row per second: where each speaker came out.
    rows = [places[i :: len(sources)] for i in range(len(sources))]
    rows = [[place for place in row if place is not None] for row in rows]
    homes = [max(set(row), key=row.count) for row in rows]
    assert len(set(homes)) == len(homes), "two speakers came out as one"
    wrong = sum(p != home for row, home in zip(rows, homes) for p in row)
    return wrong / sum(map(len, rows))

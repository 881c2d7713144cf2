"""MPEG audio (MP3) frame by frame: where its sound is, and how much.

Only a Xing frame, with which not every file begins, tells how many frames
follow. libsndfile takes its word, and guesses where there is none. Here the
frames are counted by their headers, without decoding.
"""

import re
import struct
from collections import namedtuple
from functools import lru_cache

# kbit/s for each index from 1, by (is it MPEG-1, layer).
BITRATES = {
    (True, 1): range(32, 449, 32),
    (True, 2): (32, 48, 56, 64, 80, 96, 112, 128, 160, 192, 224, 256, 320, 384),
    (True, 3): (32, 40, 48, 56, 64, 80, 96, 112, 128, 160, 192, 224, 256, 320),
    (False, 1): (32, 48, 56, *range(64, 193, 16), 224, 256),
    (False, 2): (8, 16, 24, 32, 40, 48, 56, 64, 80, 96, 112, 128, 144, 160),
}
BITRATES[False, 3] = BITRATES[False, 2]
RATES = (44100, 48000, 32000)  # Hz, of MPEG-1
SAMPLES = {1: 384, 2: 1152}  # per frame, by layer
HIGHEST_BITRATE = 14  # index
# So many frames of one kind in a row are no chance.
CONSECUTIVE = 3
TAGS = (b"TAG", b"ID3", b"APE")
# ID3v2 of the versions 2 to 4: what any text may hold are the first letters.
TAG = re.compile(rb"ID3[\2-\4][^\xff].([\0-\x7f]{4})", re.DOTALL)
TAG_HEAD = 10  # bytes
BLOCK = 2**16  # bytes

# Kind is what no frame of a file may change: (is it MPEG-1, layer, Hz,
# channels). Size in bytes; xing is where a Xing frame has its mark.
Frame = namedtuple("Frame", "kind size xing")


def mpeg_pieces(name, file, size, remedy):
    """Find the frames of a file.

    Arguments
    ---------
    name : str or Path
        Of the file, for messages.
    file : binary file
        May have other things before, between and after its frames.
    size : int
        Its bytes.
    remedy : str
        What to do about a file that cannot be read.

    Returns
    -------
    tuple
        Pieces of a ``View`` for libsndfile; the samples in them, None where
        libsndfile then knows.

    Raises
    ------
    ValueError
        When the file holds less than its Xing frame promises, changes its rate
        or channels, or holds no frames.
    """
    frames, promised, runs = 0, [], []
    for place, frame in _walk(name, file, size, remedy):
        file.seek(place + frame.xing)
        mark, flags, count = struct.unpack(">4sII", file.read(12).ljust(12))
        stop = place + frame.size
        if mark in (b"Xing", b"Info") and frame.kind[1] == 3:
            promised.append((count if flags & 1 else None, frames))
            ends = place, stop
            continue
        frames += 1
        if runs and runs[-1][1] == place:
            place, _ = runs.pop()
        runs.append((place, stop))
    if not runs:
        raise ValueError(f"no MPEG frames are found in {name}: {remedy}")
    if promised == [(frames, 0)]:
        return [ends, *runs], None
    # The first may tell of all that were joined.
    if not promised or not (
        promised[0][0] is not None
        and frames <= promised[0][0] <= frames + len(promised)
    ):
        stops = [*(before for _, before in promised[1:]), frames]
        for (count, before), stop in zip(promised, stops):
            # Some count the Xing frame itself, too.
            if count is not None and count > stop - before + 1:
                raise ValueError(
                    f"{name} is cut short, it holds {stop - before} of "
                    f"{count} MPEG frames: {remedy}"
                )
    file.seek(runs[0][0])
    head = file.read(4)
    layer = _parse(head).kind[1]
    if layer < 3:  # there is no Xing frame
        return runs, frames * SAMPLES[layer]
    return [_make_xing(head, frames), *runs], None


def _walk(name, file, size, remedy):
    """Yield (place, frame) of each whole frame."""
    place, kind, last = 0, None, None
    while True:
        file.seek(place)
        head = file.read(4)
        frame = _parse(head)
        if frame is None or frame.kind != kind:
            # The last one, if it was cut, hides how the next file begins.
            is_clear = not last or place >= size or head[:3] in TAGS
            start = place if is_clear else last[0] + 1
            found = _find_frame(file, start, size, kind)
            if last and (found is None or found >= place):
                yield last
            if found is None:
                return
            place = found
            file.seek(place)
            frame = _parse(file.read(4))
            if kind and frame.kind != kind:
                raise ValueError(
                    f"{name} changes its rate or its channels on the way: "
                    f"{remedy}"
                )
            kind = frame.kind
        elif last:
            yield last
        if place + frame.size > size:
            return
        last = place, frame
        place += frame.size


def _find_frame(file, place, size, kind):
    """Where the next frame begins, None at the end."""
    while True:
        file.seek(place)
        block = file.read(BLOCK)
        tag, after = _find_tag(block, size - place)
        found = block.find(b"\xff", 0, tag)
        while found >= 0:
            if _begins(file, place + found, size, kind):
                return place + found
            found = block.find(b"\xff", found + 1, tag)
        if after is not None:
            place += after
        elif len(block) < BLOCK:
            return None
        else:
            place += len(block) - TAG_HEAD + 1


def _find_tag(block, left):
    """Where a whole ID3v2 tag begins and ends; else (None, None)."""
    for tag in TAG.finditer(block):
        a, b, c, d = tag[1]  # seven bits of each byte
        after = tag.end() + (a << 21 | b << 14 | c << 7 | d)
        if after <= left:
            return tag.start(), after
    return None, None


def _begins(file, place, size, kind):
    """Whether frames of one kind follow each other from here."""
    frame = None
    for _ in range(CONSECUTIVE):
        file.seek(place)
        head = file.read(4)
        if frame and (place >= size or head[:3] in TAGS):
            return kind in (None, frame.kind)
        following = _parse(head)
        if following is None or frame and following.kind != frame.kind:
            return False
        frame = following
        place += frame.size
    return True


@lru_cache(maxsize=4096)
def _parse(head):
    """The frame that four bytes begin; None when they begin none."""
    if len(head) < 4 or head[0] != 0xFF or head[1] < 0xE0:
        return None
    version, layer = head[1] >> 3 & 3, 4 - (head[1] >> 1 & 3)
    bitrate, rate = head[2] >> 4, head[2] >> 2 & 3
    if version == 1 or layer == 4 or rate == 3 or bitrate in (0, 15):
        return None
    first = version == 3
    rate = RATES[rate] >> {3: 0, 2: 1, 0: 2}[version]
    bits = 1000 * BITRATES[first, layer][bitrate - 1]
    padding = head[2] >> 1 & 1
    if layer == 1:
        size = (12 * bits // rate + padding) * 4
    else:
        half = layer == 3 and not first
        size = (72 if half else 144) * bits // rate + padding
    channels = 1 if head[3] >> 6 == 3 else 2
    side = {1: (9, 17), 2: (17, 32)}[channels][first]
    return Frame((first, layer, rate, channels), size, 4 + side)


def _make_xing(head, frames):
    """A Xing frame that tells the count."""
    bits = HIGHEST_BITRATE << 4 | head[2] & 0x0C
    head = bytes([head[0], head[1] | 1, bits, head[3]])
    frame = _parse(head)
    xing = struct.pack(">4sII", b"Xing", 1, frames)
    return (head.ljust(frame.xing, b"\0") + xing).ljust(frame.size, b"\0")

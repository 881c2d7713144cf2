"""Find and count the frames of MPEG audio (MP3).

The number of frames is only in a Xing frame, which not every file has.
libsndfile trusts that number, and guesses if there is none. This module counts
the frames by their headers, without decoding.
"""

import re
import struct
from collections import namedtuple
from functools import lru_cache

# (is MPEG-1, layer) -> bit rates in kbit/s for the indices from 1.
BITRATES = {
    (True, 1): range(32, 449, 32),
    (True, 2): (32, 48, 56, 64, 80, 96, 112, 128, 160, 192, 224, 256, 320, 384),
    (True, 3): (32, 40, 48, 56, 64, 80, 96, 112, 128, 160, 192, 224, 256, 320),
    (False, 1): (32, 48, 56, *range(64, 193, 16), 224, 256),
    (False, 2): (8, 16, 24, 32, 40, 48, 56, 64, 80, 96, 112, 128, 144, 160),
}
BITRATES[False, 3] = BITRATES[False, 2]
RATES = (44100, 48000, 32000)  # sampling rates of MPEG-1, Hz
SAMPLES = {1: 384, 2: 1152}  # per frame, by layer
HIGHEST_BITRATE = 14  # index
# This number of matching frames in a row is not a coincidence.
CONSECUTIVE = 3
TAGS = (b"TAG", b"ID3", b"APE")
# Header of an ID3v2 tag of version 2 to 4. The first three letters alone can
# be part of any text.
TAG = re.compile(rb"ID3[\2-\4][^\xff].([\0-\x7f]{4})", re.DOTALL)
TAG_HEAD = 10  # bytes
BLOCK = 2**16  # bytes

# kind: (is MPEG-1, layer, Hz, channels), the same for all frames of a file.
# size: bytes. xing: offset of the mark in a Xing frame.
Frame = namedtuple("Frame", "kind size xing")


def mpeg_pieces(name, file, size, remedy):
    """Find the frames of a file.

    Arguments
    ---------
    name : str or Path
        Name of the file for messages.
    file : binary file
        The file. It can have other data before, between and after its frames.
    size : int
        Size of the file in bytes.
    remedy : str
        Remedy for messages about a file that cannot be read.

    Returns
    -------
    tuple
        (pieces, samples): the frames as pieces of a ``View`` for libsndfile,
        and their samples per channel, or None if libsndfile can tell from the
        Xing frame.

    Raises
    ------
    ValueError
        When the file has fewer frames than its Xing frame says, its rate or
        channels change, or it has no frames.
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
    # In a concatenation of files, the first Xing frame may count all frames.
    if not promised or not (
        promised[0][0] is not None
        and frames <= promised[0][0] <= frames + len(promised)
    ):
        stops = [*(before for _, before in promised[1:]), frames]
        for (count, before), stop in zip(promised, stops):
            # Some encoders count the Xing frame, too.
            if count is not None and count > stop - before + 1:
                raise ValueError(
                    f"{name} is cut short, it holds {stop - before} of "
                    f"{count} MPEG frames: {remedy}"
                )
    file.seek(runs[0][0])
    head = file.read(4)
    layer = _parse(head).kind[1]
    if layer < 3:  # Xing frames exist in layer 3 only
        return runs, frames * SAMPLES[layer]
    return [_make_xing(head, frames), *runs], None


def _walk(name, file, size, remedy):
    """Yield (position, frame) of each complete frame."""
    place, kind, last = 0, None, None
    while True:
        file.seek(place)
        head = file.read(4)
        frame = _parse(head)
        if frame is None or frame.kind != kind:
            # If the last frame is truncated, the next file starts inside it.
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
                    f"{name} changes its rate or its channels midway: {remedy}"
                )
            kind = frame.kind
        elif last:
            yield last
        if place + frame.size > size:
            return
        last = place, frame
        place += frame.size


def _find_frame(file, place, size, kind):
    """Position of the next frame; None if there is none."""
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
    """Start and end of a complete ID3v2 tag; (None, None) if there is none."""
    for tag in TAG.finditer(block):
        a, b, c, d = tag[1]  # each byte holds seven bits of the size
        after = tag.end() + (a << 21 | b << 14 | c << 7 | d)
        if after <= left:
            return tag.start(), after
    return None, None


def _begins(file, place, size, kind):
    """Whether consecutive frames of one kind start at a position."""
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
    """Parse the four bytes of a frame header; None if they are not one."""
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
    """Make a Xing frame that holds a number of frames."""
    bits = HIGHEST_BITRATE << 4 | head[2] & 0x0C
    head = bytes([head[0], head[1] | 1, bits, head[3]])
    frame = _parse(head)
    xing = struct.pack(">4sII", b"Xing", 1, frames)
    return (head.ljust(frame.xing, b"\0") + xing).ljust(frame.size, b"\0")

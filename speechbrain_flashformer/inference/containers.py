"""Find out how much audio a file holds, even if its header is wrong.

libsndfile trusts headers. If the size in a header is wrong or missing, as in a
file that was written to a pipe, libsndfile gets a view of the file with a
corrected header. Files with less audio than their header says are rejected.
"""

import os
import re
import struct
import warnings
from itertools import takewhile

import soundfile

from speechbrain_flashformer.inference.mpeg import mpeg_pieces
from speechbrain_flashformer.inference.view import open_sound

REMEDY = (
    "copy or record it again, or keep what is there with 'ffmpeg -i OLD_FILE "
    "NEW_FILE.wav'"
)
W64_DATA = b"data" + bytes.fromhex("f3acd3118cd100c04f8edb8a")
# Magic -> size of the file header in bytes, layout of (name, size) of a chunk,
# name of the chunk with the audio, bytes in it before the audio, alignment.
CHUNKS = {
    b"RIFF": (12, "<4sI", b"data", 0, 2),
    b"RF64": (12, "<4sI", b"data", 0, 2),
    b"RIFX": (12, ">4sI", b"data", 0, 2),
    b"riff": (40, "<16sQ", W64_DATA, 0, 8),
    b"FORM": (12, ">4sI", b"SSND", 8, 2),
    b"caff": (8, ">4sQ", b"data", 4, 1),
}
DS64_DATA_SIZE = 28  # position of the 64-bit size of the audio in RF64
# First bytes of a stream, for formats where a file can hold several in a row.
BEGINNINGS = {
    "OGG": re.compile(rb"OggS\0\x02"),
    "FLAC": re.compile(rb"fLaC[\0\x80]\0\0\x22"),
}
LONGEST_BEGINNING = 8  # bytes
END_OF_STREAM = 4  # flag of an Ogg page
LARGEST_PAGE = 65307  # bytes of an Ogg page
# Formats that rarely hold speech, whose size fields are not implemented here.
UNCHECKED = ("MAT4", "MAT5", "MPC2K", "SDS", "WVE", "XI")
NIST_NUMBER = rb"^%s -i (\d+)"
MPEG_SUFFIXES = (".mp3", ".mp2", ".mp1", ".mpga")


def find_streams(path, name):
    """Find the audio streams in a file.

    Arguments
    ---------
    path : str or Path
        The file.
    name : str or Path
        Name of the file for messages.

    Returns
    -------
    list of tuple
        (pieces, samples) of each stream: the pieces of a ``View`` in which
        libsndfile reads the whole stream, or None if it can read the file
        directly; the samples per channel, or None if libsndfile knows them.

    Raises
    ------
    ValueError
        When the file is truncated, of a format in ``UNCHECKED``, or a
        concatenation of files that cannot be read as one.
    """
    size = os.path.getsize(path)
    with open(path, "rb") as file:
        magic = file.read(4)
        pieces = None
        if magic in CHUNKS or magic == b".snd":
            try:
                pieces = _mend_header(name, file, magic, size)
            except struct.error as error:
                raise ValueError(
                    f"{name} is cut short, in its header: {REMEDY}"
                ) from error
        if stop := _find_end(name, file, magic, size):
            if size < stop:
                raise ValueError(
                    f"{name} is cut short, it holds {size} of {stop} bytes: "
                    f"{REMEDY}"
                )
            _refuse_joined(name, file, magic, stop, size)
        try:
            with open_sound(path, pieces) as sound:
                kind, subtype = sound.format, sound.subtype
        except soundfile.SoundFileError:
            kind, subtype = "", ""
        if kind in UNCHECKED:
            raise ValueError(
                f"{name} is a file of kind {kind}, which cannot be checked for "
                "completeness: convert it to a WAV file"
            )
        named = str(name).lower().endswith(MPEG_SUFFIXES) and not kind
        if named or subtype.startswith("MPEG"):
            return [mpeg_pieces(name, file, size, REMEDY)]
        if kind not in BEGINNINGS:
            return [(pieces, None)]
        if kind == "OGG":
            _check_last_page(name, file, size)
        starts = _find_beginnings(file, BEGINNINGS[kind])
    stops = [*starts[1:], size]
    if len(starts) < 2:
        return [(None, None)]
    return [([ends], None) for ends in zip(starts, stops)]


def is_placeholder(size):
    """Whether a 32-bit size in a header is a placeholder.

    A program that writes to a pipe does not know the size. It writes 0, a value
    near the largest number of 31 or 32 bits, or a large round number.

    Arguments
    ---------
    size : int
        Bytes, as in the header.

    Returns
    -------
    bool

    Example
    -------
    >>> [is_placeholder(size) for size in (0, 2**32 - 1, 0x7FFFF000, 2 * 10**9)]
    [True, True, True, True]
    >>> is_placeholder(16044), is_placeholder(3 * 10**9 + 44)
    (False, False)
    """
    largest = min(abs(size - 2**31), abs(size - 2**32)) <= 2**16
    is_round = size >= 10**9 and (not size % 10**6 or not size % 2**20)
    return size == 0 or largest or is_round


def _mend_header(name, file, magic, size):
    """Pieces with the true size of the audio; None if the header is right."""
    header = _find_sound(file, magic, size)
    if header is None:
        return None
    field, layout, start, promised, extra = header
    left = size - start
    if promised <= 0:
        if _is_chunks(file, magic, start, size):
            return None  # the file really is empty
    elif promised > left:
        if not is_placeholder(promised) and promised < 2**62:
            raise ValueError(
                f"{name} is cut short, it holds {left} of {promised} bytes of "
                f"sound: {REMEDY}"
            )
    # The size is right, unless it needs more than 32 bits.
    elif (
        left < 2**32
        or layout[1] == "Q"
        or promised != left % 2**32
        and not is_placeholder(promised)
    ):
        _refuse_joined(name, file, magic, start + promised, size)
        return None
    # RF64 has no size limit, but does not take every subtype: use it only here.
    if magic == b"RIFF" and left >= 2**32:
        sizes = struct.pack("<IQQQI", 28, size + 28, left, 0, 0)
        head = b"RF64\xff\xff\xff\xffWAVEds64" + sizes
        return [head, (12, field), b"\xff" * 4, (field + 4, size)]
    largest = 2 ** (8 * struct.calcsize(layout)) - 1
    mended = struct.pack(layout, min(left + extra, largest))
    return [(0, field), mended, (field + len(mended), size)]


def _find_sound(file, magic, size):
    """Find the audio and its size in the header.

    Returns (position of the size, its layout, start of the audio, its bytes by
    the header, bytes that the size counts in addition) or None.
    """
    if magic == b".snd":
        file.seek(4)
        start, promised = struct.unpack(">II", file.read(8))
        return 8, ">I", start, promised, 0
    _, layout, wanted, before, _ = CHUNKS[magic]
    file.seek(8)
    if magic == b"FORM" and file.read(4) in (b"8SVX", b"16SV"):
        wanted, before = b"BODY", 0
    for place, kind, length in _chunks(file, magic, size):
        if kind != wanted:
            continue
        start = place + struct.calcsize(layout) + before
        extra = before + (24 if magic == b"riff" else 0)
        field, layout = place + len(wanted), layout[0] + layout[-1]
        if magic == b"RF64" and length == 2**32 - 1:
            file.seek(DS64_DATA_SIZE)
            field, layout = DS64_DATA_SIZE, "<Q"
            (length,) = struct.unpack(layout, file.read(8))
        return field, layout, start, length - before, extra
    return None


def _find_end(name, file, magic, size):
    """Size of a NIST, AVR or VOC file by its header; 0 if unknown."""
    file.seek(0)
    head = file.read(1024)
    if magic == b"NIST":
        return _find_nist_end(name, head)
    if magic == b"2BIT" and len(head) >= 30:  # AVR
        stereo, bits = struct.unpack_from(">HH", head, 12)
        (count,) = struct.unpack_from(">I", head, 26)
        return 128 + count * (2 if stereo else 1) * bits // 8
    stop = 0
    # VOC: a list of blocks of kind 1 to 9, or 0 for the end, with a size of 24
    # bits, which is too small for longer audio.
    if head.startswith(b"Creative Voice File") and 26 <= size < 2**24:
        (stop,) = struct.unpack_from("<H", head, 20)
        while stop + 4 <= size:
            file.seek(stop)
            (block,) = struct.unpack("<I", file.read(4))
            if not 0 < block & 0xFF <= 9:
                return stop + (block & 0xFF == 0)
            stop += 4 + (block >> 8)
    return stop


def _find_nist_end(name, head):
    """``_find_end`` of NIST SPHERE, whose header is text."""
    words = (b"sample_count", b"channel_count", b"sample_n_bytes")
    found = [re.search(NIST_NUMBER % word, head, re.M) for word in words]
    coding = re.search(rb"^sample_coding -s\d+ (\S+)", head, re.M)
    coding = coding[1] if coding else b"pcm"
    if b"shorten" in coding:
        raise ValueError(
            f"{name} is compressed with shorten: unpack it with 'sph2pipe -f "
            "wav OLD_FILE NEW_FILE.wav'"
        )
    above = head[8:16].strip()
    if not all(found) or not above.isdigit():
        return 0
    count, channels, width = (int(number[1]) for number in found)
    if coding in (b"ulaw", b"alaw", b"mu-law"):
        width = 1
    elif coding != b"pcm":
        return 0
    return int(above) + count * channels * width


def _chunks(file, magic, size, place=None):
    """Yield (position, kind, bytes of content) of each chunk."""
    head, layout, _, _, align = CHUNKS[magic]
    place = head if place is None else place
    above = struct.calcsize(layout)
    while place + above <= size:
        file.seek(place)
        kind, length = struct.unpack(layout, file.read(above))
        if magic == b"riff":
            length -= above
        yield place, kind, length
        place += above + max(0, length)
        place += -place % align


def _refuse_joined(name, file, magic, end, size):
    """Reject a file that another file follows, directly or after chunks."""
    file.seek(end)
    is_joined = file.read(4) == magic
    if magic in CHUNKS:
        chunks = _chunks(file, magic, size, end + -end % CHUNKS[magic][-1])
        kinds = (kind[:4] for _, kind, _ in chunks)
        is_joined |= any(x in CHUNKS for x in takewhile(_is_name, kinds))
    if is_joined:
        raise ValueError(
            f"{name} is of several files that were concatenated: give them one "
            "by one, or join them with 'sox FIRST SECOND NEW_FILE.wav'"
        )


def _is_name(kind):
    """Whether four bytes can be the name of a chunk."""
    return kind.isascii() and kind.decode().isprintable()


def _is_chunks(file, magic, start, size):
    """Whether there are only complete chunks between start and size."""
    place, align = start, 1
    if magic in CHUNKS:
        _, layout, _, _, align = CHUNKS[magic]
        above = struct.calcsize(layout)
        for place, kind, length in _chunks(file, magic, size, start):
            if not _is_name(kind[:4]):
                return False
            place += above + max(0, length)
    return 0 <= size - place < align


def _check_last_page(name, file, size):
    """Reject an Ogg file whose last page is incomplete; warn without an end."""
    file.seek(max(0, size - LARGEST_PAGE))
    tail = file.read()
    page = tail[tail.rfind(b"OggS") :]
    if len(page) < _page_size(page):
        raise ValueError(
            f"{name} is cut short, in the middle of an Ogg page: {REMEDY}"
        )
    # Not every encoder marks the end, and a live capture has no end.
    if page and not page[5] & END_OF_STREAM:
        warnings.warn(
            f"{name} has no end: it may be cut short, or its recording was "
            "stopped",
            stacklevel=2,
        )


def _page_size(page):
    """Size in bytes of the Ogg page that starts here; 0 if it is no page."""
    if page[:4] != b"OggS":
        return 0
    if len(page) < 27 or len(page) < 27 + page[26]:
        return LARGEST_PAGE + 1
    return 27 + page[26] + sum(page[27 : 27 + page[26]])


def _find_beginnings(file, mark):
    """Positions where consecutive streams begin."""
    starts, beside = [], None
    for place in _find(file, mark):
        # The first pages of the streams of a multiplexed Ogg file are adjacent.
        if place != beside:
            starts.append(place)
        file.seek(place)
        beside = place + _page_size(file.read(LARGEST_PAGE))
    return starts


def _find(file, mark, block=2**20):
    """Yield the positions of a pattern in a file."""
    place, data = 0, b""
    while True:
        file.seek(place)
        data = file.read(block)
        for found in mark.finditer(data):
            # A match in the overlap of two blocks is found in the second.
            if len(data) < block or found.start() <= block - LONGEST_BEGINNING:
                yield place + found.start()
        if len(data) < block:
            return
        place += block - LONGEST_BEGINNING + 1

"""How much sound a file holds, where its header does not say so.

libsndfile believes headers. Where one is wrong or says nothing, as in a file
that came through a pipe, libsndfile is given a view of the file whose header
is right. Files that hold less than they promise are refused.
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
# Magic -> bytes of the file's header, layout of a chunk's (name, size), name
# of the chunk with the sound, bytes in it before the sound, alignment.
CHUNKS = {
    b"RIFF": (12, "<4sI", b"data", 0, 2),
    b"RF64": (12, "<4sI", b"data", 0, 2),
    b"RIFX": (12, ">4sI", b"data", 0, 2),
    b"riff": (40, "<16sQ", W64_DATA, 0, 8),
    b"FORM": (12, ">4sI", b"SSND", 8, 2),
    b"caff": (8, ">4sQ", b"data", 4, 1),
}
DS64_DATA_SIZE = 28  # where RF64 has the size for which 32 bits are too few
# How a stream begins, of which several can follow each other in one file.
BEGINNINGS = {
    "OGG": re.compile(rb"OggS\0\x02"),
    "FLAC": re.compile(rb"fLaC[\0\x80]\0\0\x22"),
}
LONGEST_BEGINNING = 8  # bytes
END_OF_STREAM = 4  # flag of an Ogg page
LARGEST_PAGE = 65307  # bytes, of Ogg
# Kinds that seldom hold speech, of which it is not known here where they tell
# how much they hold.
UNCHECKED = ("MAT4", "MAT5", "MPC2K", "SDS", "WVE", "XI")
NIST_NUMBER = rb"^%s -i (\d+)"
MPEG_SUFFIXES = (".mp3", ".mp2", ".mp1", ".mpga")


def find_streams(path, name):
    """Find the streams of sound in an audio file.

    Arguments
    ---------
    path : str or Path
        A file.
    name : str or Path
        Its name for messages.

    Returns
    -------
    list
        For each stream the pieces of a ``View`` in which libsndfile reads it
        to its end, or None where it does so in the file itself; and its
        samples per channel, or None where libsndfile knows.

    Raises
    ------
    ValueError
        When the file is cut short, or is of a kind for which that is not known.
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
                f"{name} is a file of kind {kind}, of which is not known here "
                "whether it is whole: make a WAV file of it"
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
    """Whether a size of 32 bits in a header is one that nobody counted.

    What writes into a pipe cannot know the size, and says 0, the largest
    number of 32 or 31 bits or a little less, or a large round one.

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
    """Pieces with the true size of the sound, or None when it is right."""
    header = _find_sound(file, magic, size)
    if header is None:
        return None
    field, layout, start, promised, extra = header
    left = size - start
    if promised <= 0:
        if _is_chunks(file, magic, start, size):
            return None  # empty indeed
    elif promised > left:
        if not is_placeholder(promised) and promised < 2**62:
            raise ValueError(
                f"{name} is cut short, it holds {left} of {promised} bytes of "
                f"sound: {REMEDY}"
            )
    # Else right, unless 32 bits were too few.
    elif (
        left < 2**32
        or layout[1] == "Q"
        or promised != left % 2**32
        and not is_placeholder(promised)
    ):
        _refuse_joined(name, file, magic, start + promised, size)
        return None
    # As RF64, which has no limit; but not every subtype can be in it.
    if magic == b"RIFF" and left >= 2**32:
        sizes = struct.pack("<IQQQI", 28, size + 28, left, 0, 0)
        head = b"RF64\xff\xff\xff\xffWAVEds64" + sizes
        return [head, (12, field), b"\xff" * 4, (field + 4, size)]
    largest = 2 ** (8 * struct.calcsize(layout)) - 1
    mended = struct.pack(layout, min(left + extra, largest))
    return [(0, field), mended, (field + len(mended), size)]


def _find_sound(file, magic, size):
    """Where the sound is and what the header says about it.

    (Place of the size, its layout, start of the sound, its bytes as promised,
    bytes that the size counts besides).
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
    """Bytes that a file of another kind has by its header; 0 if unknown."""
    file.seek(0)
    head = file.read(1024)
    if magic == b"NIST":
        return _find_nist_end(name, head)
    if magic == b"2BIT" and len(head) >= 30:  # AVR
        stereo, bits = struct.unpack_from(">HH", head, 12)
        (count,) = struct.unpack_from(">I", head, 26)
        return 128 + count * (2 if stereo else 1) * bits // 8
    stop = 0
    # VOC: blocks of a kind, of which 0 is the end and 9 the last one, and of a
    # size in 24 bits, for which longer sound is too long.
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
    """Yield (place, kind, bytes of content) of each chunk."""
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
    """Refuse a file in which another follows, at once or after chunks."""
    file.seek(end)
    is_joined = file.read(4) == magic
    if magic in CHUNKS:
        chunks = _chunks(file, magic, size, end + -end % CHUNKS[magic][-1])
        kinds = (kind[:4] for _, kind, _ in chunks)
        is_joined |= any(x in CHUNKS for x in takewhile(_is_name, kinds))
    if is_joined:
        raise ValueError(
            f"{name} is of several files that were joined: give them one by "
            "one, or join them with 'sox FIRST SECOND NEW_FILE.wav'"
        )


def _is_name(kind):
    """Whether four bytes can be the name of a chunk."""
    return kind.isascii() and kind.decode().isprintable()


def _is_chunks(file, magic, start, size):
    """Whether nothing but whole chunks lies between start and size."""
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
    """Refuse an Ogg file whose last page is not whole; warn if it is no end."""
    file.seek(max(0, size - LARGEST_PAGE))
    tail = file.read()
    page = tail[tail.rfind(b"OggS") :]
    if len(page) < _page_size(page):
        raise ValueError(
            f"{name} is cut short, in the middle of an Ogg page: {REMEDY}"
        )
    # Not every recorder marks the end, and what is captured live has none.
    if page and not page[5] & END_OF_STREAM:
        warnings.warn(
            f"{name} has no end: it may be cut short, or its recording was "
            "stopped",
            stacklevel=2,
        )


def _page_size(page):
    """Bytes of the Ogg page that begins so; of no page, none."""
    if page[:4] != b"OggS":
        return 0
    if len(page) < 27 or len(page) < 27 + page[26]:
        return LARGEST_PAGE + 1
    return 27 + page[26] + sum(page[27 : 27 + page[26]])


def _find_beginnings(file, mark):
    """Where streams begin that follow each other."""
    starts, beside = [], None
    for place in _find(file, mark):
        # The first pages of a multiplexed Ogg file lie side by side.
        if place != beside:
            starts.append(place)
        file.seek(place)
        beside = place + _page_size(file.read(LARGEST_PAGE))
    return starts


def _find(file, mark, block=2**20):
    """Yield the places of a pattern in a file."""
    place, data = 0, b""
    while True:
        file.seek(place)
        data = file.read(block)
        for found in mark.finditer(data):
            # What lies in both blocks is found in the second.
            if len(data) < block or found.start() <= block - LONGEST_BEGINNING:
                yield place + found.start()
        if len(data) < block:
            return
        place += block - LONGEST_BEGINNING + 1

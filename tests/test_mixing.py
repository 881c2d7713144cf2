"""Dynamic mixing: the same for any workers, WSJ0-mix levels, clean targets."""

import itertools

import numpy as np
import pytest
import soundfile
import torch
from speechbrain.dataio.batch import PaddedBatch
from torch.utils.data import DataLoader
from torchaudio.functional import resample

from speechbrain_flashformer.training import mixing, recordings, turns
from speechbrain_flashformer.training.data import EpochSampler
from speechbrain_flashformer.training.effects import (
    BandLimit,
    Clipping,
    Noise,
    PolarityFlip,
    RandomEQ,
    Reverberation,
    random_noise,
    reverberate,
)
from speechbrain_flashformer.training.losses import (
    pit_si_snr_loss,
    pit_snr_loss,
)
from speechbrain_flashformer.training.mixing import (
    DynamicMixtures,
    dynamic_mix_data_prep,
)
from speechbrain_flashformer.training.recordings import find_recordings
from speechbrain_flashformer.training.turns import (
    PAUSE_SECONDS,
    TURN_SECONDS,
    Absence,
    Silence,
    TurnTaking,
)

# Samples of a tone that are near 0 one after another, fewer than this.
CROSSING = 40

EVERY = [
    effect(0.5)
    for effect in (TurnTaking, Silence, RandomEQ, Reverberation, BandLimit)
] + [Noise(0.5), Clipping(0.5), PolarityFlip(0.5)]


@pytest.fixture(scope="module")
def speech(tmp_path_factory):
    """Four speakers, each with a tone of its own; two rates, wav and flac."""
    folder = tmp_path_factory.mktemp("speech")
    for s, (rate, suffix) in enumerate(
        [(8000, "wav"), (8000, "flac"), (16000, "wav"), (8000, "wav")]
    ):
        for take in range(3):
            path = folder / f"spk{s}" / f"{take}_id{s}.{suffix}"
            path.parent.mkdir(exist_ok=True)
            time = np.arange((take + 1) * rate) / rate
            tone = np.sin(2 * np.pi * 400 * (s + 1) * time)
            soundfile.write(path, 0.3 * tone, rate)
    return folder


def mixtures(speech, *effects, speaker="folder", **options):
    arguments = {"num_spks": 2, "sample_rate": 8000, "samples": 8000, "seed": 1}
    return DynamicMixtures(
        find_recordings(speech, speaker),
        **{**arguments, **options},
        effects=effects,
    )


def write_noise(folder, samples=16000, rate=8000):
    """Three recordings of noise, of a speaker each."""
    rng = np.random.default_rng(0)
    for name in "abc":
        noise = 0.1 * rng.normal(size=samples)
        soundfile.write(folder / f"{name}.wav", noise, rate)


def loudest_to_noise_db(mixture, sources):
    """Of full sources and what else is in their mixture."""
    loudest = max(source.square().mean() for source in sources)
    noise = (mixture - sum(sources)).square().mean()
    return 10 * (loudest / noise).log10().item()


def pitch(signal, rate=8000):
    """Which speaker a tone is."""
    spectrum = np.abs(np.fft.rfft(signal, 8 * len(signal)))
    return spectrum.argmax() * rate / (8 * len(signal)) / 400


# --- who speaks --------------------------------------------------------------


@pytest.mark.parametrize(
    "speaker, names",
    [
        ("folder", {"spk0", "spk1", "spk2", "spk3"}),
        (r"_(id\d)", {"id0", "id1", "id2", "id3"}),
        (r"(\d)_id0|(\d)_id[123]", {"0", "1", "2"}),
    ],
)
def test_speaker_from_the_path(speech, speaker, names):
    found = find_recordings(speech, speaker)
    assert {recording.speaker for recording in found} == names
    assert found == sorted(found) and len(found) == 12


def test_a_pattern_that_is_none_is_named(speech):
    with pytest.raises(
        ValueError, match=r"dm_speaker '\(' is not folder, file"
    ):
        find_recordings(speech, "(")


def test_each_file_its_own_speaker(speech):
    found = find_recordings(speech, "file")
    assert len({recording.speaker for recording in found}) == 12
    assert {recording.corpus for recording in found} == {""}


def test_recordings_behind_links_are_found(speech, tmp_path):
    (tmp_path / "ann").symlink_to(speech / "spk0")
    (tmp_path / "more").mkdir()
    (tmp_path / "more/bo").symlink_to(speech / "spk1")
    (tmp_path / "more/loop").symlink_to(tmp_path)
    found = find_recordings(tmp_path)
    linked = [*find_recordings(speech / "spk0")]
    linked += find_recordings(speech / "spk1")
    assert len(found) == len(linked)
    assert {recording.speaker for recording in found} == {"ann", "bo"}


def test_speaker_from_a_csv(speech, tmp_path):
    listing = speech / "list.csv"
    listing.write_text("wav,speaker\nspk0/0_id0.wav,ann\nspk1/0_id1.flac,bo\n")
    assert find_recordings(listing) == [
        (speech / "spk0/0_id0.wav", "ann", ""),
        (speech / "spk1/0_id1.flac", "bo", ""),
    ]
    listing.write_text("wav,speaker,corpus\nspk0/0_id0.wav,ann,books\n")
    assert find_recordings(listing)[0].corpus == "books"
    listing.write_text("wav,who\na.wav,ann\n")
    with pytest.raises(ValueError, match="no column speaker"):
        find_recordings(listing)


def test_folders_without_speech_or_speakers_are_refused(speech, tmp_path):
    with pytest.raises(FileNotFoundError, match="no wav or flac file in"):
        find_recordings(tmp_path)
    with pytest.raises(ValueError, match="dm_speaker 'x' does not match"):
        find_recordings(speech, "x")
    one = find_recordings(speech / "spk0")
    with pytest.raises(ValueError, match="2 speakers needs as many.*hold 1"):
        DynamicMixtures(one, 2, 8000, 8000, seed=1)


@pytest.mark.parametrize(
    "content, message",
    [
        (np.zeros((100, 2)), "2 channels"),
        (np.zeros(0), "is empty"),
        (None, "cannot read"),
    ],
)
def test_recordings_that_cannot_be_used_are_named(tmp_path, content, message):
    for name in "ab":
        path = tmp_path / f"{name}.wav"
        if content is None:
            path.write_text("text")
        else:
            soundfile.write(path, content, 8000)
    with pytest.raises(ValueError, match=message) as error:
        DynamicMixtures(find_recordings(tmp_path, "file"), 2, 8000, 100, 1)
    assert "a.wav" in str(error.value)


def test_a_recording_cut_short_is_named(speech, tmp_path):
    rng = np.random.default_rng(0)
    for s in range(2):
        (tmp_path / f"{s}").mkdir()
        path = tmp_path / f"{s}/a.flac"
        soundfile.write(path, 0.3 * rng.normal(size=80000), 8000)
        path.write_bytes(path.read_bytes()[:20000])
    made = mixtures(tmp_path)
    with pytest.raises(ValueError, match=r"cannot read .*a.flac"):
        [made[n] for n in range(50)]


def test_a_flac_without_its_length_is_named_at_the_start(tmp_path):
    for speaker in "ab":
        (tmp_path / speaker).mkdir()
        write_noise(tmp_path / speaker)
    path = tmp_path / "a/d.flac"
    soundfile.write(path, 0.1 * np.ones(4000), 8000)
    content = bytearray(path.read_bytes())
    # The last 36 bits before the MD5 sum in STREAMINFO.
    content[21] &= 0xF0
    content[22:26] = bytes(4)
    path.write_bytes(content)
    with pytest.raises(ValueError, match=r"d.flac does not store its length"):
        mixtures(tmp_path)


def test_noise_that_cannot_be_used_is_named_at_the_start(tmp_path):
    with pytest.raises(FileNotFoundError, match="no wav or flac file in"):
        Noise(0.5, folder=str(tmp_path))
    soundfile.write(tmp_path / "hall.wav", np.ones((80, 2)), 8000)
    with pytest.raises(ValueError, match=r"hall.wav has 2 channels"):
        Noise(0.5, folder=str(tmp_path))
    # What nobody hears is not read.
    assert Noise(0.0, folder=str(tmp_path)).recordings is None


@pytest.mark.parametrize("row", ["a.wav,", ",me", "a.wav"])
def test_an_empty_cell_is_named_by_its_line(tmp_path, row):
    (tmp_path / "list.csv").write_text(f"wav,speaker\nb.wav,you\n{row}\n")
    with pytest.raises(ValueError, match=r"list.csv, line 3: .* is empty"):
        find_recordings(tmp_path / "list.csv")


@pytest.mark.parametrize("encoding", ["utf-8-sig", "utf-16"])
def test_a_list_from_excel_is_read(tmp_path, encoding):
    text = "wav,speaker\na.wav,me\n"
    (tmp_path / "list.csv").write_text(text, encoding=encoding)
    found = find_recordings(tmp_path / "list.csv")
    assert found == [(tmp_path / "a.wav", "me", "")]


def test_a_list_in_another_encoding_is_named(tmp_path):
    text = "wav,speaker\na.wav,José\n"
    (tmp_path / "list.csv").write_text(text, encoding="latin-1")
    with pytest.raises(ValueError, match="list.csv is not UTF-8 text"):
        find_recordings(tmp_path / "list.csv")


def test_silent_recordings_are_named(tmp_path):
    for name in "ab":
        soundfile.write(tmp_path / f"{name}.wav", np.zeros(100), 8000)
    silent = DynamicMixtures(find_recordings(tmp_path, "file"), 2, 8000, 100, 1)
    with pytest.raises(
        ValueError, match=r"but silence in 100 .* of .*/[ab].wav"
    ):
        silent[0]


@pytest.mark.parametrize("value", [np.inf, np.nan])
def test_samples_that_are_not_finite_are_named(speech, tmp_path, value):
    for name in "ab":
        signal = np.full(4000, 0.1, np.float32)
        signal[2000:] = value
        soundfile.write(tmp_path / f"{name}.wav", signal, 8000, subtype="FLOAT")
    with pytest.raises(ValueError, match=r"/[ab].wav has samples that are not"):
        mixtures(tmp_path, speaker="file", samples=4000)[0]
    noisy = mixtures(speech, Noise(1.0, folder=tmp_path))
    with pytest.raises(ValueError, match=r"/[ab].wav has samples that are not"):
        noisy[0]


def test_what_macos_keeps_beside_a_file_is_passed_over(speech, tmp_path):
    path = tmp_path / "a.wav"
    soundfile.write(path, np.ones(80), 8000)
    (tmp_path / "._a.wav").write_bytes(b"\0\5\x16\7 Mac OS X")
    assert [recording.path for recording in find_recordings(tmp_path)] == [path]


# --- who is drawn ------------------------------------------------------------


def test_speakers_are_equally_likely(tmp_path):
    for s, seconds in enumerate((600, 1, 1, 1)):
        (tmp_path / f"{s}").mkdir()
        time = np.arange(8000 * seconds) / 8000
        tone = np.sin(2 * np.pi * 400 * (s + 1) * time)
        soundfile.write(tmp_path / f"{s}/a.wav", 0.3 * tone, 8000)
    dataset, count = mixtures(tmp_path, samples=800), np.zeros(5)
    for n in range(400):
        item = dataset[n]
        for name in ("s1_sig", "s2_sig"):
            count[round(pitch(item[name].numpy()))] += 1
    # Of 400 pairs out of 4 speakers each is in 200, give or take 10.
    assert count[1:].min() > 150 and count[1:].max() < 250


def test_longer_recordings_of_a_speaker_are_heard_more(tmp_path):
    for s in range(2):
        (tmp_path / f"{s}").mkdir()
        for seconds, pitch_hz in ((9, 400), (1, 800)):
            time = np.arange(8000 * seconds) / 8000
            tone = np.sin(2 * np.pi * (pitch_hz + 800 * s) * time)
            soundfile.write(tmp_path / f"{s}/{seconds}.wav", 0.3 * tone, 8000)
    dataset = mixtures(tmp_path, samples=800)
    pitches = [
        round(pitch(dataset[n][name].numpy()))
        for n in range(200)
        for name in ("s1_sig", "s2_sig")
    ]
    assert 0.05 < np.mean([p in (2, 4) for p in pitches]) < 0.15


@pytest.mark.parametrize("share", [0.0, 0.5, 1.0])
def test_a_share_is_of_one_corpus(speech, share):
    recordings = [
        recording._replace(corpus="ab"[recording.speaker in ("spk0", "spk1")])
        for recording in find_recordings(speech)
    ]
    dataset = DynamicMixtures(
        recordings, 2, 8000, 8000, 1, same_corpus_share=share
    )
    same = 0
    for n in range(300):
        item = dataset[n]
        a, b = (round(pitch(item[x].numpy())) for x in ("s1_sig", "s2_sig"))
        assert a != b
        same += (a < 3) == (b < 3)
    # Of those drawn from all, a third is of one corpus by chance.
    expected = 300 * (share + (1 - share) / 3)
    assert abs(same - expected) <= (0 if share == 1 else 30)


def test_a_corpus_with_too_few_speakers_takes_others(speech):
    recordings = [
        recording._replace(corpus=recording.speaker)
        for recording in find_recordings(speech)
    ]
    dataset = DynamicMixtures(
        recordings, 2, 8000, 8000, 1, same_corpus_share=1.0
    )
    item = dataset[0]
    a, b = (round(pitch(item[x].numpy())) for x in ("s1_sig", "s2_sig"))
    assert a != b


def test_one_name_in_two_corpora_is_two_people(speech):
    names = {"spk0": "ann", "spk1": "bo", "spk2": "ann", "spk3": "bo"}
    recordings = [
        x._replace(speaker=names[x.speaker], corpus="ab"[x.speaker > "spk1"])
        for x in find_recordings(speech)
    ]
    dataset = DynamicMixtures(
        recordings, 2, 8000, 8000, 1, same_corpus_share=1.0
    )
    pairs = set()
    for n in range(40):
        item = dataset[n]
        tones = [round(pitch(item[x].numpy())) for x in ("s1_sig", "s2_sig")]
        pairs.add(tuple(sorted(tones)))
    assert pairs == {(1, 2), (3, 4)}


def test_in_a_share_one_speaker_is_alone(speech):
    effects = Absence(0.5), RandomEQ(1.0), BandLimit(0.5)
    dataset = mixtures(speech, *effects, num_spks=3)
    alone = 0
    for n in range(100):
        item = dataset[n]
        first, *others = (item[f"s{i}_sig"] for i in (1, 2, 3))
        assert first.any() and len(others[0]) == len(first)
        silent = [not source.any() for source in others]
        assert silent in ([True, True], [False, False])
        if silent[0]:
            torch.testing.assert_close(item["mix_sig"], first)
        alone += silent[0]
    assert 30 < alone < 70


# --- what a mixture is -------------------------------------------------------


def test_number_and_seed_say_all(speech):
    one, two = mixtures(speech), mixtures(speech)
    for n in (0, 7, 10**9):
        a, b = one[n], two[n]
        assert all(torch.equal(a[k], b[k]) for k in a if k != "id")
        assert a["id"] == f"dm{n}"
    numbers = (0, 1, 100, 1000, 10**6, 2**32, 10**12)
    levels = {one[n]["mix_sig"].square().mean().item() for n in numbers}
    assert len(levels) == len(numbers)
    other = mixtures(speech, seed=2)
    assert not torch.equal(one[0]["mix_sig"], other[0]["mix_sig"])


@pytest.mark.parametrize(
    "workers, method", [(1, "fork"), (2, "fork"), (2, "spawn")]
)
def test_workers_make_no_difference(speech, workers, method):
    dataset = mixtures(speech, *EVERY, concatenation_share=0.5)
    sampler = EpochSampler(6)
    sampler.set_epoch(3)

    def load(**options):
        loader = DataLoader(
            dataset, 2, sampler=sampler, collate_fn=PaddedBatch, **options
        )
        return [batch.mix_sig.data for batch in loader]

    alone = load()
    shared = load(num_workers=workers, multiprocessing_context=method)
    assert len(alone) == 3
    assert all(map(torch.equal, alone, shared))


def test_speakers_of_a_mixture_differ_and_all_speak(speech):
    dataset, heard = mixtures(speech), set()
    for n in range(60):
        item = dataset[n]
        pair = {round(pitch(item[f"s{i}_sig"].numpy())) for i in (1, 2)}
        assert len(pair) == 2
        heard |= pair
    assert heard == {1, 2, 3, 4}


def test_mixture_is_the_sum_at_its_peak_and_length(speech):
    dataset = mixtures(speech, num_spks=3)
    for n in range(40):
        item = dataset[n]
        total = sum(item[f"s{i}_sig"] for i in (1, 2, 3))
        torch.testing.assert_close(item["mix_sig"], total)
        assert len(total) == 8000
        assert item["mix_sig"].dtype == torch.float32


def test_what_is_too_loud_is_turned_down_together(tmp_path, monkeypatch):
    # Of a mixture that is softer than its sources: these nearly cancel.
    noise = 0.1 * np.random.default_rng(0).normal(size=4000)
    for name, signal in (("a", noise), ("b", -noise)):
        soundfile.write(tmp_path / f"{name}.wav", signal, 8000)
    made = DynamicMixtures(
        find_recordings(tmp_path, "file"), 2, 8000, 4000, seed=1
    )
    before = made[0]
    monkeypatch.setattr(mixing, "PEAK", 0.01)
    after = made[0]
    names = ("mix_sig", "s1_sig", "s2_sig")
    peaks = {name: after[name].abs().max().item() for name in names}
    assert max(peaks.values()) == pytest.approx(0.01)
    assert peaks["mix_sig"] < 0.009
    for name in names:
        ratio = after[name].norm() / before[name].norm()
        torch.testing.assert_close(after[name], ratio * before[name])
        expected = after["s1_sig"].norm() / before["s1_sig"].norm()
        torch.testing.assert_close(ratio, expected)


def test_levels_stay_within_limits(speech, monkeypatch):
    monkeypatch.setattr(mixing, "LEVEL_LIMITS_DB", (-30.0, -29.0))
    for n in range(20):
        item = mixtures(speech)[n]
        for name in ("s1_sig", "s2_sig"):
            level = 10 * item[name].square().mean().log10().item()
            assert -30.01 < level < -28.99


def test_short_recordings_stand_anywhere(speech):
    dataset = mixtures(speech, samples=16000)
    starts = set()
    for n in range(60):
        for i in (1, 2):
            source = dataset[n][f"s{i}_sig"].numpy()
            spoken = np.flatnonzero(np.abs(source) > 1e-4)
            if spoken[-1] - spoken[0] < 9000 and len(source) > 9000:
                starts.add(spoken[0] // 1000)
    assert len(starts) > 4


@pytest.mark.parametrize("speakers", [1, 2, 3])
def test_speakers_take_turns(speakers, monkeypatch):
    monkeypatch.setattr(turns, "TOGETHER", 0.0)
    rate, rng = 1000, np.random.default_rng(0)
    signals = np.ones((speakers + 1, 60 * rate), np.float32)
    for _ in range(20):
        taken = TurnTaking(1.0)(signals, rng, rate)
        assert (taken[-1] == 1).all()  # the noise goes on
        talking = taken[:-1] > 0
        assert talking.sum(0).max() == 1
        # Turns: (speaker, begin, end).
        edges = np.diff(np.pad(talking, ((0, 0), (1, 1))).astype(int))
        found = sorted(
            (begin, end, who)
            for who, row in enumerate(edges)
            for begin, end in zip(
                np.nonzero(row > 0)[0], np.nonzero(row < 0)[0]
            )
        )
        assert len(found) > 10
        # The ends of the mixture cut the first and the last turn. The first
        # and the last sample of a turn are 0.
        lengths = [(end - begin + 2) / rate for begin, end, _ in found[1:-1]]
        assert TURN_SECONDS[0] <= min(lengths) < max(lengths)
        assert max(lengths) <= TURN_SECONDS[1] + 2 / rate
        for (_, end, who), (begin, _, other) in itertools.pairwise(found):
            assert begin - end <= PAUSE_SECONDS[1] * rate + 2
            assert who != other or speakers == 1


def test_all_speakers_talk_in_some_turns():
    rng, signals = np.random.default_rng(0), np.ones((3, 60000), np.float32)
    shares = [
        (TurnTaking(1.0)(signals, rng, 1000)[:-1] > 0).all(0).mean()
        for _ in range(50)
    ]
    assert 0.1 < np.mean(shares) < 0.25


def test_turns_of_short_mixtures(speech):
    whole, taken = mixtures(speech), mixtures(speech, TurnTaking(1.0))
    changed = 0
    for n in range(40):
        changed += not torch.equal(taken[n]["mix_sig"], whole[n]["mix_sig"])
        for name in ("s1_sig", "s2_sig"):
            # Nobody is left out, and samples stay where they are.
            part, source = taken[n][name], whole[n][name]
            assert part.any() and len(part) == len(source)
            assert (part.abs() <= source.abs() + 1e-6).all()
    # The mixtures are shorter than most turns.
    assert 5 < changed < 40


def test_joined_recordings_are_of_one_speaker_and_go_on(speech):
    # The recordings have 1 to 3 s; each speaker is one tone.
    joined = mixtures(speech, samples=64000, concatenation_share=1.0)
    several = 0
    for n in range(20):
        item = joined[n]
        assert len(item["mix_sig"]) == 64000
        for name in ("s1_sig", "s2_sig"):
            source = item[name].numpy()
            heard = np.flatnonzero(np.abs(source) > 1e-5)
            gaps = np.diff(heard, prepend=0, append=64000)
            assert gaps.max() <= 8000 + CROSSING
            pieces = np.split(source, heard[1:][np.diff(heard) > 400])
            several += len(pieces) > 2
            tones = {round(pitch(x)) for x in pieces if len(x) > 1000}
            assert len(tones) == 1
            levels = [np.abs(x).max() for x in pieces if len(x) > 1000]
            assert max(levels) < 1.3 * min(levels)
    assert several > 20


def test_joined_recordings_are_drawn_by_their_duration(tmp_path):
    # Of each speaker, a long recording of -0.1 and nine short ones of 0.1.
    for speaker in "ab":
        (tmp_path / speaker).mkdir()
        for i in range(10):
            samples = np.full(4000 if i else 80000, 0.1 if i else -0.1)
            path = tmp_path / speaker / f"{i}.wav"
            soundfile.write(path, samples, 8000, "FLOAT")
    joined = mixtures(tmp_path, samples=64000, concatenation_share=1.0)
    pieces = []
    for n in range(20):
        source = joined[n]["s1_sig"].numpy()
        starts = np.flatnonzero(np.diff(source, prepend=0) * (source != 0))
        pieces += list(np.sign(source[starts]))
    long = pieces.count(-1) / len(pieces)
    assert 80000 / 116000 - 0.2 < long < 80000 / 116000 + 0.2


def test_joined_recordings_come_to_one_level(tmp_path):
    rng = np.random.default_rng(0)
    for s, take in np.ndindex(2, 2):
        path = tmp_path / f"{s}" / f"{take}.wav"
        path.parent.mkdir(exist_ok=True)
        noise = 0.1 ** (1 + take) * rng.normal(size=4000)
        soundfile.write(path, noise, 8000, "FLOAT")
    joined = mixtures(tmp_path, samples=32000, concatenation_share=1.0)
    for n in range(5):
        source = joined[n]["s1_sig"].numpy()
        (ends,) = np.nonzero(np.diff(source == 0))
        pieces = [x for x in np.split(source, ends + 1) if len(x) > 1000]
        levels = [x.std() for x in pieces if x.any()]
        assert len(levels) >= 3 and max(levels) < 1.1 * min(levels)


def test_a_share_is_joined_the_rest_is_as_it_was(speech):
    alone = mixtures(speech, samples=64000)
    some = mixtures(speech, samples=64000, concatenation_share=0.5)
    items = [some[n] for n in range(60)]
    joined = [len(item["mix_sig"]) == 64000 for item in items]
    assert 15 < sum(joined) < 45
    assert max(len(alone[n]["mix_sig"]) for n in range(60)) < 64000
    # One source after another, each a recording of 1 to 3 s and one tone.
    for item in (x for x, all_of_it in zip(items, joined) if not all_of_it):
        for name in ("s1_sig", "s2_sig"):
            heard = np.flatnonzero(item[name].abs() > 1e-5)
            assert np.diff(heard).max() < CROSSING
            assert len(heard) < 3 * 8000 * 1.05  # slowed by 5 %


def test_a_mixture_may_stand_in_silence(speech):
    quiet = mixtures(speech, Silence(1.0))
    shares, starts, levels = [], [], []
    for n in range(40):
        item = quiet[n]
        assert len(item["mix_sig"]) <= 8000
        heard = np.flatnonzero(item["mix_sig"].abs() > 1e-4)
        shares.append(np.ptp(heard) / len(item["mix_sig"]))
        starts.append(heard[0])
        power = item["s1_sig"][heard[0] : heard[-1]].square().mean()
        levels.append(10 * np.log10(power))
    assert min(shares) < 0.4 and max(shares) > 0.8 and min(shares) > 0.15
    assert len(set(starts)) > 20
    # The speech is as loud as ever: silence does not count.
    assert abs(np.mean(levels) + 27.43) < 1.5


def test_no_turn_is_silent(tmp_path):
    rng = np.random.default_rng(0)
    for name in "abc":
        late = rng.normal(size=16000) * (np.arange(16000) > 9000)
        soundfile.write(tmp_path / f"{name}.wav", 0.1 * late, 8000)
    made = mixtures(tmp_path, TurnTaking(1.0), speaker="file", samples=16000)
    for n in range(50):
        assert made[n]["s1_sig"].any() and made[n]["s2_sig"].any()


def test_levels_are_those_of_wsj0_mix(speech):
    # Not at the peak limit, for which all are turned down.
    dataset = mixtures(speech)
    levels = []
    for n in range(300):
        item = dataset[n]
        power = [item[f"s{i}_sig"].square().mean() for i in (1, 2)]
        levels.append(10 * np.log10(power))
    first, second = np.array(levels).T
    assert abs(first.mean() + 27.43) < 0.5 and abs(first.std() - 2.57) < 0.4
    relative = second - first
    assert abs(relative.mean() + 2.51) < 0.5
    assert abs(relative.std() - 2.66) < 0.4


@pytest.mark.parametrize("rate", [11025, 22050, 44100])
def test_no_speed_makes_a_huge_filter(tmp_path, monkeypatch, rate):
    ratios = []

    def spy(signal, old, new):
        ratios.append((old, new))
        return resample(signal, old, new)

    monkeypatch.setattr(recordings, "resample", spy)
    for s in range(2):
        (tmp_path / f"{s}").mkdir()
        tone = np.sin(2 * np.pi * 400 * (s + 1) * np.arange(2 * rate) / rate)
        soundfile.write(tmp_path / f"{s}/a.wav", 0.3 * tone, rate)
    item = mixtures(tmp_path, speeds=(97, 97), samples=4000)[0]
    for old, new in ratios:
        # The filter has some 14 old new values; exact, 300 million and more.
        assert old * new < 1e6
        assert old / new == pytest.approx(rate * 0.97 / 8000, rel=1e-5)
    assert len(ratios) >= 2
    pitches = sorted(pitch(item[f"s{s}_sig"]) for s in (1, 2))
    assert pitches == pytest.approx([0.97, 1.94], rel=2e-3)


def test_speed_moves_the_pitch(speech):
    fast = mixtures(speech, speeds=(110, 110))
    pitches = [pitch(fast[n]["s1_sig"].numpy()) for n in range(20)]
    ratios = np.array(pitches) / np.round(np.array(pitches) / 1.1)
    np.testing.assert_allclose(ratios, 1.1, rtol=0.01)


def test_noise_leaves_the_sources_clean(speech, tmp_path):
    hum = np.sign(np.sin(2 * np.pi * 50 * np.arange(4000) / 8000))
    soundfile.write(tmp_path / "hum.wav", 0.1 * hum, 8000)
    for folder in ("", str(tmp_path)):
        dataset = mixtures(speech, Noise(1.0, folder=folder))
        snrs = []
        for n in range(50):
            item = dataset[n]
            sources = [item["s1_sig"], item["s2_sig"]]
            snrs.append(loudest_to_noise_db(item["mix_sig"], sources))
            assert round(pitch(item["s1_sig"].numpy())) in (1, 2, 3, 4)
        assert min(snrs) > 4.9 and max(snrs) < 35.1
        assert max(snrs) - min(snrs) > 15


def test_room_adds_a_tail_after_the_sound():
    rng = np.random.default_rng(0)
    click = np.zeros(4000)
    click[1000] = 1
    room = reverberate(click, 0.3, 8000, rng)
    assert abs(room[1000] - 1) < 1e-9 and abs(room[:1000]).max() < 1e-9
    energy = np.square(room[1001:])
    assert 0 < energy.sum() <= 1 + 1e-6
    # 60 dB in t60: 20 dB in a third of it.
    early, late = energy[:400].sum(), energy[800:1200].sum()
    assert abs(10 * np.log10(early / late) - 20) < 4


def equalized(signal, rng):
    """A signal [T] through a filter; it keeps the energy."""
    silence = np.zeros(len(signal))
    return RandomEQ(1.0)(np.stack([signal, silence, silence]), rng, 8000)[0]


def test_equalization_keeps_the_length_and_the_level():
    rng = np.random.default_rng(0)
    for length in (1, 40, 65, 8000):
        heard = equalized(np.ones(length), rng)
        assert heard.shape == (length,)
        assert heard @ heard == pytest.approx(length)


def test_equalization_stays_within_its_range():
    rng = np.random.default_rng(0)
    click = np.zeros(4000)
    click[2000] = 1
    gains = np.array(
        [
            20 * np.log10(np.abs(np.fft.rfft(equalized(click, rng))))
            for _ in range(20)
        ]
    )
    # Twice the range, as the level is that of before.
    assert np.ptp(gains, axis=1).max() < 12.5
    assert np.std(gains) > 1


@pytest.mark.parametrize("rate, above", [(8000, 3960), (16000, 5500)])
def test_a_telephone_passes_speech_and_little_else(tmp_path, rate, above):
    write_noise(tmp_path, 4 * rate, rate)
    called = mixtures(
        tmp_path,
        BandLimit(1.0),
        **{"speaker": "file", "sample_rate": rate, "samples": 4 * rate},
    )
    hertz = np.fft.rfftfreq(4 * rate, 1 / rate)
    edges = []
    for n in range(10):
        item = called[n]
        total = item["s1_sig"] + item["s2_sig"]
        torch.testing.assert_close(item["mix_sig"], total)
        power = np.abs(np.fft.rfft(item["s1_sig"].numpy())) ** 2
        middle = power[(hertz > 1000) & (hertz < 2000)].mean()
        for outside in (hertz < 40, hertz > above):
            assert power[outside].mean() < 0.1 * middle
        edges.append(power[(hertz > 250) & (hertz < 350)].mean() / middle)
    assert min(edges) < 0.5 and max(edges) > 0.8


def has_a_tail(source):
    return bool((source[2100:].abs() > 1e-7).any())


def is_without_lows(source):
    power = np.abs(np.fft.rfft(source.numpy())) ** 2
    hertz = np.fft.rfftfreq(len(source), 1 / 8000)
    middle = (hertz > 1000) & (hertz < 2000)
    return bool(power[hertz < 40].mean() < 0.2 * power[middle].mean())


@pytest.mark.parametrize(
    "effect, is_changed",
    [(Reverberation, has_a_tail), (BandLimit, is_without_lows)],
)
def test_a_share_is_in_one_room_or_through_one_telephone(
    tmp_path, effect, is_changed
):
    rng = np.random.default_rng(0)
    for name in "abc":
        burst = 0.1 * rng.normal(size=4000) * (np.arange(4000) < 2000)
        soundfile.write(tmp_path / f"{name}.wav", burst, 8000)
    heard = {}
    for share in (0.0, 0.5, 1.0):
        made = mixtures(tmp_path, effect(share), speaker="file", samples=4000)
        items = [made[n] for n in range(40)]
        heard[share] = [
            (is_changed(item["s1_sig"]), is_changed(item["s2_sig"]))
            for item in items
        ]
    assert set(heard[0.0]) == {(False, False)}
    assert set(heard[1.0]) == {(True, True)}
    assert set(heard[0.5]) == {(False, False), (True, True)}
    assert 10 < heard[0.5].count((True, True)) < 30


def test_each_source_has_a_microphone_of_its_own(tmp_path):
    write_noise(tmp_path)

    def response(source):
        """Of eight bands, dB."""
        power = np.abs(np.fft.rfft(source.numpy())[:8000]) ** 2
        return 10 * np.log10(power.reshape(8, 1000).mean(1))

    for share in (0, 1):
        equalize = RandomEQ(share, range_db=10)
        made = mixtures(tmp_path, equalize, speaker="file", samples=16000)
        for n in range(5):
            one, two = (response(made[n][f"s{i}_sig"]) for i in (1, 2))
            assert (np.ptp(one) > 2) == (share > 0)
            assert (np.std(one - two) > 1) == (share > 0)


def test_a_mixture_may_have_the_other_polarity(tmp_path):
    rng = np.random.default_rng(0)
    for name in "abc":
        pulses = 0.1 * rng.exponential(size=4000)  # rises more than it falls
        soundfile.write(tmp_path / f"{name}.wav", pulses - 0.1, 8000)
    ways = []
    flipped = mixtures(
        tmp_path, PolarityFlip(0.5), speaker="file", samples=4000
    )
    for n in range(60):
        item = flipped[n]
        total = item["s1_sig"] + item["s2_sig"]
        torch.testing.assert_close(item["mix_sig"], total)
        skews = [item[f"s{i}_sig"].pow(3).sum().item() for i in (1, 2)]
        ways.append((skews[0] < 0, skews[1] < 0))
    # One microphone hears both.
    assert set(ways) == {(True, True), (False, False)}
    assert 15 < ways.count((True, True)) < 45


def test_noise_is_of_many_colors():
    rng = np.random.default_rng(0)
    slopes = []
    for _ in range(30):
        power = np.square(np.abs(np.fft.rfft(random_noise(8000, rng))))
        slopes.append(np.log10(power[10:40].mean() / power[1000:4000].mean()))
    assert min(slopes) < 0.5 and max(slopes) > 2.5


# --- in a recipe -------------------------------------------------------------


def hparams_of(speech, **options):
    return {
        "base_folder_dm": str(speech),
        "dm_speaker": r"_(id\d)",
        "num_spks": 3,
        "sample_rate": 16000,
        "training_signal_len": 4321,
        "seed": 17,
        "use_speedperturb": True,
        "speed_changes": [100, 105, 95],
        "dm_same_corpus_share": 0.1,
        "dm_concatenation_share": 0.2,
        "dm_effects": {},
        "loss": pit_si_snr_loss,
        **options,
    }


def test_hparams_say_what_is_mixed(speech):
    effects = {"noise": Noise(0.5), "any name": PolarityFlip(0.5)}
    made = dynamic_mix_data_prep(hparams_of(speech, dm_effects=effects))
    assert made.effects == list(effects.values())
    assert (made.same_corpus_share, made.concatenation_share) == (0.1, 0.2)
    assert (made.num_spks, made.sample_rate) == (3, 16000)
    assert (made.samples, made.seed, made.speeds) == (4321, 17, (95, 105))
    assert len(made.reader.paths) == 12 and len(made.spoken) == 4
    plain = dynamic_mix_data_prep(hparams_of(speech, use_speedperturb=False))
    assert plain.speeds == (100, 100)


def test_a_folder_of_noise_without_a_share_is_refused(speech):
    noise = Noise(0.0, folder="rain")
    with pytest.raises(ValueError, match="noise in rain is not used"):
        dynamic_mix_data_prep(hparams_of(speech, dm_effects={"noise": noise}))


@pytest.mark.parametrize("share", [0.0, 0.1])
def test_absence_needs_a_loss_that_knows_silence(speech, share):
    effects = {"absence": Absence(share)}
    dynamic_mix_data_prep(
        hparams_of(speech, dm_effects=effects, loss=pit_snr_loss)
    )
    hparams = hparams_of(speech, dm_effects=effects)
    if share:
        with pytest.raises(ValueError, match="Absence needs .*pit_snr_loss"):
            dynamic_mix_data_prep(hparams)
    else:
        dynamic_mix_data_prep(hparams)


@pytest.mark.parametrize("share", [-0.1, 1.5, float("nan")])
def test_shares_are_checked_at_the_start(speech, share):
    with pytest.raises(ValueError, match="share of Noise must be from 0 to 1"):
        mixtures(speech, Noise(share))
    with pytest.raises(ValueError, match="share of concatenation must be"):
        mixtures(speech, concatenation_share=share)


def test_numbers_of_effects_are_checked():
    with pytest.raises(ValueError, match=r"snr_db of Noise must be \[min"):
        Noise(0.5, snr_db=(35, 5))
    with pytest.raises(ValueError, match="range_db of RandomEQ must be above"):
        RandomEQ(0.5, range_db=0)
    for wrong in (6, (9, 3), (1, 2, 3)):
        with pytest.raises(
            ValueError, match=r"above_db of Clipping must be \["
        ):
            Clipping(0.5, above_db=wrong)


def test_hparams_without_a_folder_are_refused():
    with pytest.raises(ValueError, match="give their folder as base_folder_dm"):
        dynamic_mix_data_prep({"base_folder_dm": ""})


def test_noise_is_any_part_of_a_recording_at_the_rate_of_the_mixture(
    speech, tmp_path
):
    """4 s of 500 Hz and then of 1500 Hz, both at 16 kHz."""
    time = np.arange(8 * 16000) / 16000
    hertz = np.where(time < 4, 500, 1500)
    soundfile.write(tmp_path / "a.wav", np.sin(2 * np.pi * hertz * time), 16000)
    noisy = mixtures(speech, Noise(1.0, folder=tmp_path))
    heard = set()
    for n in range(20):
        item = noisy[n]
        noise = item["mix_sig"] - item["s1_sig"] - item["s2_sig"]
        heard.add(round(400 * pitch(noise.numpy()), -1))
    assert heard == {500, 1500}


def test_noise_is_as_loud_as_asked(speech):
    quiet, loud = (
        mixtures(speech, Noise(1.0, snr_db=(snr, snr))) for snr in (30, -5)
    )
    for dataset, snr in ((quiet, 30), (loud, -5)):
        item = dataset[3]
        sources = [item["s1_sig"], item["s2_sig"]]
        ratio = loudest_to_noise_db(item["mix_sig"], sources)
        assert ratio == pytest.approx(snr, abs=0.1)


def test_a_mixture_clips_at_the_drawn_level_and_its_sources_do_not(speech):
    plain = mixtures(speech)
    clipped = mixtures(speech, Clipping(1.0, above_db=(1, 1)))
    for n in range(5):
        mixture, whole = clipped[n]["mix_sig"], plain[n]["mix_sig"]
        most = mixture.abs().max()
        torch.testing.assert_close(mixture, whole.clamp(-most, most))
        # The speech is heard all the time.
        level = float(whole.square().mean() ** 0.5)
        assert float(most) == pytest.approx(10 ** (1 / 20) * level, rel=0.02)
        # The peak of a tone alone is 3 dB above its level.
        assert whole.abs().max() > 1.2 * most
        assert torch.equal(clipped[n]["s1_sig"], plain[n]["s1_sig"])


# --- effects together --------------------------------------------------------


def test_effects_are_applied_in_their_order(speech):
    """Noise before a band is limited to it, noise after it is not."""
    lows = []
    for effects in (
        (Noise(1.0, snr_db=(0, 0)), BandLimit(1.0)),
        (BandLimit(1.0), Noise(1.0, snr_db=(0, 0))),
    ):
        item = mixtures(speech, *effects)[0]
        noise = item["mix_sig"] - item["s1_sig"] - item["s2_sig"]
        power = np.abs(np.fft.rfft(noise.numpy())) ** 2
        lows.append(power[:40].sum() / power.sum())
    assert lows[0] < 0.1 * lows[1]


def test_an_effect_of_no_mixture_changes_nothing(speech):
    plain = mixtures(speech)
    other = mixtures(speech, *(type(x)(0.0) for x in EVERY))
    for n in range(5):
        assert torch.equal(plain[n]["mix_sig"], other[n]["mix_sig"])


# Not TurnTaking, which changes no sample of a turn.
@pytest.mark.parametrize("effect", EVERY[1:-3], ids=lambda x: type(x).__name__)
def test_effects_keep_the_level_of_each_source(tmp_path, effect):
    write_noise(tmp_path, 8000)
    options = {"speaker": "file", "seed": 3}
    plain = mixtures(tmp_path, **options)
    changed = mixtures(tmp_path, type(effect)(1.0), **options)

    def level(source):
        heard = np.flatnonzero(source.abs() > 1e-3 * source.abs().max())
        power = source[heard[0] : heard[-1] + 1].square().mean()
        return 10 * power.log10().item()

    for n in range(10):
        for name in ("s1_sig", "s2_sig"):
            before, after = plain[n][name], changed[n][name]
            assert not torch.equal(before, after)
            assert level(after) == pytest.approx(level(before), abs=0.5)


def test_a_speaker_without_a_pause_to_lose_is_left_as_it_was():
    """Two that speak one after the other: no piece has only one of them."""
    rng = np.random.default_rng(0)
    signals = np.zeros((3, 1000), np.float32)
    signals[0, :10], signals[1, 990:] = 1, 1
    heard = Silence(1.0)(signals, rng, 8000)
    assert heard[0].any() and heard[1].any()


def test_silent_sources_and_no_noise_stay_so():
    rng = np.random.default_rng(0)
    for effect in EVERY:
        signals = np.zeros((4, 1000), np.float32)
        signals[1] = rng.normal(size=1000)
        heard = effect(signals, rng, 8000)
        assert heard[1].any() and not heard[0].any() and not heard[2].any()
        assert heard[3].any() == isinstance(effect, Noise)

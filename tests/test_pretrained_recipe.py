"""What the pretrained model is made from: speech sorted by who speaks."""

import noise_recordings
import numpy as np
import packaged_speakers
import pretrained_data
import prompt_speakers
import pytest
import soundfile

RATE = 16000


def write_clips(folder, count, name="{}.wav", hertz=300.0, seconds=0.5):
    """Tones with half a second of hush before and after."""
    folder.mkdir(parents=True, exist_ok=True)
    time = np.arange(int(seconds * RATE)) / RATE
    hush = np.zeros(RATE // 2)
    tone = 0.5 * np.sin(2 * np.pi * hertz * time)
    for i in range(count):
        clip = np.concatenate([hush, tone, hush])
        soundfile.write(folder / name.format(i), clip, RATE)


def test_clips_become_strings_of_their_speaker(tmp_path):
    room = tmp_path / "x/usr/share/games/fillets-ng/sound/airplane/nl"
    write_clips(room, 60, "let-m-{:02}.wav", hertz=300)
    write_clips(room, 60, "let-v-{:02}.wav", hertz=700)
    packaged_speakers.main(tmp_path / "x", tmp_path / "out")
    for who, hertz in {"m": 300, "v": 700}.items():
        files = sorted((tmp_path / "out" / f"fillets-ng-nl-{who}").iterdir())
        assert len(files) >= 4
        for file in files:
            signal, rate = soundfile.read(file)
            assert rate == 8000 and len(signal) >= 8 * rate
            spectrum = np.abs(np.fft.rfft(signal))
            assert np.argmax(spectrum) * rate / len(signal) == pytest.approx(
                hertz, abs=1
            )
            # The hush around the clips is gone, but for the pauses.
            assert np.mean(np.abs(signal) < 1e-3) < 0.4


def test_who_is_not_known_or_says_little_is_left_out(tmp_path):
    sounds = tmp_path / "usr/share/ktuberling/sounds"
    write_clips(sounds / "wa", 80)
    write_clips(sounds / "da", 80)
    write_clips(sounds / "sv", 20)
    write_clips(tmp_path / "usr/share/sounds", 80)
    packaged_speakers.main(tmp_path, tmp_path / "out")
    written = [folder.name for folder in (tmp_path / "out").iterdir()]
    assert written == ["ktuberling-wa"]


def test_a_folder_without_their_speech_is_named(tmp_path):
    with pytest.raises(FileNotFoundError, match="none of the packages"):
        packaged_speakers.main(tmp_path, tmp_path / "out")


def test_the_training_list_names_them_by_folder(tmp_path):
    write_clips(tmp_path / "klettres-nl", 2)
    found = pretrained_data.find_people(tmp_path)
    assert [path.parent.name for path in found] == 2 * ["klettres-nl"]
    with pytest.raises(FileNotFoundError, match="SPEAKER/NUMBER.wav"):
        pretrained_data.find_people(tmp_path / "klettres-nl")


def test_a_folder_that_is_there_is_not_added_to(tmp_path):
    (tmp_path / "out").mkdir()
    with pytest.raises(FileExistsError, match="remove it"):
        packaged_speakers.main(tmp_path, tmp_path / "out")


def test_prompts_are_sorted_by_who_speaks(tmp_path):
    sounds = tmp_path / "sounds"
    for name in ("en_f_Ann/digits/1", "es_f_Ann/1", "fr/silence/2", "fr/3"):
        path = sounds / f"{name}.wav"
        path.parent.mkdir(parents=True, exist_ok=True)
        soundfile.write(path, np.ones(80), 8000)
    soundfile.write(sounds / "fr/tt-monkeys.wav", np.ones(80), 8000)
    prompt_speakers.main(sounds, tmp_path / "out")
    found = sorted((tmp_path / "out").rglob("*.wav"))
    names = [path.relative_to(tmp_path / "out").as_posix() for path in found]
    assert names == [
        "Ann/en_f_Ann_digits_1.wav",
        "Ann/es_f_Ann_1.wav",
        "fr/fr_3.wav",
    ]


def test_babble_has_sound_of_many_people_all_the_time(tmp_path, monkeypatch):
    monkeypatch.setattr(noise_recordings, "BABBLES", 2)
    monkeypatch.setattr(noise_recordings, "COLORS", 1)
    rows = ["wav,speaker"]
    for who in range(20):
        # Each speaks with a frequency of its own.
        path = tmp_path / f"{who}.wav"
        rate = 8000 if who % 2 else 16000
        tone = np.sin(2 * np.pi * 100 * (who + 2) * np.arange(rate) / rate)
        soundfile.write(path, tone, rate)
        rows.append(f"{path},{who}")
    speech = tmp_path / "speech.csv"
    speech.write_text("\n".join(rows), "utf-8")
    out = tmp_path / "out"
    noise_recordings.main(["babble", str(speech), str(out)])
    for path in sorted((out / "babble").iterdir()):
        signal, rate = soundfile.read(path)
        assert rate == 8000 and len(signal) == 20 * rate
        seconds = np.abs(signal).reshape(20, rate).max(1)
        assert seconds.min() > 0.05
        lines = np.abs(np.fft.rfft(signal))[2000:44000:2000]
        talkers = np.sum(lines > 0.02 * lines.max())
        assert 4 <= talkers <= 16
    assert len(list((out / "color").iterdir())) == 1


def test_recorded_noise_is_cut_into_pieces_at_8_khz(tmp_path):
    folder = tmp_path / "recordings" / "cafe"
    folder.mkdir(parents=True)
    stereo = np.random.default_rng(0).normal(size=(44 * 16000, 2)) / 10
    soundfile.write(folder / "a.ogg", stereo, 16000)
    # The end is left out.
    soundfile.write(folder / "b.wav", stereo[: 43 * 16000, 0], 16000)
    (folder / "._a.wav").write_bytes(b"Mac OS X")
    noise_recordings.main(["cut", str(folder.parent), str(tmp_path / "out")])
    found = sorted((tmp_path / "out").rglob("*.flac"))
    names = [path.relative_to(tmp_path / "out").as_posix() for path in found]
    assert names == [
        f"cafe/{x}.flac" for x in ("a-0", "a-1", "a-2", "b-0", "b-1")
    ]
    pieces = [soundfile.info(path) for path in found]
    assert {(x.samplerate, x.channels) for x in pieces} == {(8000, 1)}
    assert [x.frames / 8000 for x in pieces] == [20, 20, 4, 20, 20]


def spoil(folder, how):
    """Give noise_recordings.py something that it cannot use."""
    sound, path = np.ones(8000) / 2, folder / "0.wav"
    rows = ["wav,speaker", *(f"{folder / f'{n}.wav'},{n}" for n in range(16))]
    for n in range(1 if how == "one" else 16):
        soundfile.write(folder / f"{n}.wav", sound, 8000)
    (folder / "speech.csv").write_text(
        "\n".join(rows[: 2 if how == "one" else 99])
    )
    if how == "missing":
        path.unlink()
    elif how == "stereo":
        soundfile.write(path, np.stack([sound, sound], 1), 8000)
    elif how == "nan":
        soundfile.write(path, sound * np.nan, 8000, "FLOAT")
    elif how == "empty":
        soundfile.write(path, sound[:0], 8000)
    elif how == "same name":
        soundfile.write(folder / "0.flac", sound, 8000)
    elif how == "silent":
        for file in folder.glob("*.wav"):
            soundfile.write(file, 0 * sound, 8000)


@pytest.mark.parametrize(
    "command, how, message",
    [
        (
            "babble",
            "one",
            "speech.csv lists speech of 1 people; babble requires",
        ),
        ("babble", "missing", r"cannot read .*0\.wav"),
        ("babble", "stereo", r"0\.wav has 2 channels"),
        ("cut", "nan", r"0\.wav holds samples that are not finite"),
        ("cut", "empty", r"0\.wav has no samples"),
        ("cut", "same name", r"0\.flac and .*0\.wav would have pieces of the"),
        ("cut", "silent", "with sound in"),
    ],
)
def test_noise_from_what_cannot_be_used(tmp_path, command, how, message):
    folder = tmp_path / "recordings"
    folder.mkdir()
    spoil(folder, how)
    source = folder / "speech.csv" if command == "babble" else folder
    with pytest.raises(SystemExit, match=message):
        noise_recordings.main([command, str(source), str(tmp_path / "out")])
    assert not (tmp_path / "out").exists()


def test_noise_is_not_cut_into_its_own_folder(tmp_path):
    for source, out, message in (
        (tmp_path, tmp_path / "out", "out is in .*: name another folder"),
        (tmp_path / "no", tmp_path / "out", "no folder .*no"),
    ):
        with pytest.raises(SystemExit, match=message):
            noise_recordings.main(["cut", str(source), str(out)])

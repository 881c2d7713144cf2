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
        time = np.arange(8000) / 8000
        soundfile.write(path, np.sin(2 * np.pi * 100 * (who + 2) * time), 8000)
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
    stereo = np.random.default_rng(0).normal(size=(50 * 16000, 2)) / 10
    soundfile.write(folder / "a.ogg", stereo, 16000)
    noise_recordings.main(["cut", str(folder.parent), str(tmp_path / "out")])
    found = sorted((tmp_path / "out").rglob("*.flac"))
    names = [path.relative_to(tmp_path / "out").as_posix() for path in found]
    assert names == ["cafe/a-0.flac", "cafe/a-1.flac", "cafe/a-2.flac"]
    pieces = [soundfile.info(path) for path in found]
    assert {(x.samplerate, x.channels) for x in pieces} == {(8000, 1)}
    assert sum(x.frames for x in pieces) == pytest.approx(50 * 8000, abs=2)


@pytest.mark.parametrize("command", ["babble", "cut"])
def test_noise_says_what_it_lacks(tmp_path, command):
    few = tmp_path / "few.csv"
    soundfile.write(tmp_path / "a.wav", np.ones(800), 8000)
    few.write_text(f"wav,speaker\n{tmp_path / 'a.wav'},a\n", "utf-8")
    (tmp_path / "empty").mkdir()
    source, message = {
        "babble": (few, "few.csv has 1 speakers; babble requires 16"),
        "cut": (tmp_path / "empty", "no .wav, .flac, .ogg, .mp3 in"),
    }[command]
    with pytest.raises(SystemExit, match=message):
        noise_recordings.main([command, str(source), str(tmp_path / "out")])

"""Speech of Debian's packages by speaker, and the list that takes it."""

import numpy as np
import pytest
import soundfile

RATE = 16000


@pytest.fixture
def packaged(load_benchmark):
    return load_benchmark("packaged_speakers")


def write_clips(folder, count, name="{}.wav", hertz=300.0, seconds=0.5):
    """Tones with half a second of hush before and after."""
    folder.mkdir(parents=True, exist_ok=True)
    time = np.arange(int(seconds * RATE)) / RATE
    hush = np.zeros(RATE // 2)
    tone = 0.5 * np.sin(2 * np.pi * hertz * time)
    for i in range(count):
        clip = np.concatenate([hush, tone, hush])
        soundfile.write(folder / name.format(i), clip, RATE)


def test_clips_become_strings_of_their_speaker(packaged, tmp_path):
    room = tmp_path / "x/usr/share/games/fillets-ng/sound/airplane/nl"
    write_clips(room, 60, "let-m-{:02}.wav", hertz=300)
    write_clips(room, 60, "let-v-{:02}.wav", hertz=700)
    packaged.main(tmp_path / "x", tmp_path / "out")
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


def test_who_is_not_known_or_says_little_is_left_out(packaged, tmp_path):
    sounds = tmp_path / "usr/share/ktuberling/sounds"
    write_clips(sounds / "wa", 80)
    write_clips(sounds / "da", 80)
    write_clips(sounds / "sv", 20)
    write_clips(tmp_path / "usr/share/sounds", 80)
    packaged.main(tmp_path, tmp_path / "out")
    written = [folder.name for folder in (tmp_path / "out").iterdir()]
    assert written == ["ktuberling-wa"]


def test_a_folder_without_their_speech_is_named(packaged, tmp_path):
    with pytest.raises(FileNotFoundError, match="none of the packages"):
        packaged.main(tmp_path, tmp_path / "out")


def test_the_training_list_names_them_by_folder(load_benchmark, tmp_path):
    data = load_benchmark("pretrained_data")
    write_clips(tmp_path / "klettres-nl", 2)
    assert [path.parent.name for path in data.find_people(tmp_path)] == [
        "klettres-nl",
        "klettres-nl",
    ]
    with pytest.raises(FileNotFoundError, match="SPEAKER/NUMBER.wav"):
        data.find_people(tmp_path / "klettres-nl")


def test_a_folder_that_is_there_is_not_added_to(packaged, tmp_path):
    (tmp_path / "out").mkdir()
    with pytest.raises(FileExistsError, match="remove it"):
        packaged.main(tmp_path, tmp_path / "out")

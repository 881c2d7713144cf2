"""The page: what it answers, what it refuses, what it leaves behind."""

import contextlib
import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import httpx
import numpy as np
import pytest
import soundfile
import torch
from gradio_client import Client, handle_file
from gradio_client.exceptions import AppError
from selenium import webdriver
from selenium.webdriver.common.by import By
from selenium.webdriver.support.ui import WebDriverWait

from speechbrain_flashformer import cli
from speechbrain_flashformer.cli import app
from speechbrain_flashformer.cli.spectrogram import (
    COLUMNS,
    draw_spectrograms,
    spectrogram,
)
from speechbrain_flashformer.inference import (
    FlashFormerSeparation,
    built_in_model,
)
from speechbrain_flashformer.inference.audio import AudioReader

CHROMIUM = shutil.which("chromium") or shutil.which("google-chrome")
DRIVER = shutil.which("chromedriver")
# Python tells of every address that a process looks up or calls.
LISTEN = """\
import sys

def hook(event, args):
    if event in ("socket.connect", "socket.getaddrinfo"):
        with open({log!r}, "a") as file:
            print(repr(args[1] if event == "socket.connect" else args[0]),
                  file=file)

sys.addaudithook(hook)
"""


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp("app")


@pytest.fixture(scope="module")
def page(folder):
    """The URL of a page in a process of its own, as users start it."""
    (folder / "site").mkdir()
    listen = LISTEN.format(log=str(folder / "calls"))
    (folder / "site" / "sitecustomize.py").write_text(listen)
    (folder / "temporary").mkdir()
    paths = [str(folder / "site"), os.environ.get("PYTHONPATH", "")]
    environment = {
        **os.environ,
        "PYTHONPATH": os.pathsep.join(paths),
        "TMPDIR": str(folder / "temporary"),
    }
    arguments = ["app", "--max-minutes", "0.5", "--max-mb", "1"]
    process = subprocess.Popen(
        [sys.executable, "-m", "speechbrain_flashformer.cli", *arguments],
        stdout=subprocess.PIPE,
        env=environment,
        text=True,
    )
    try:
        yield process.stdout.readline().strip()
    finally:
        process.send_signal(signal.SIGTERM)
        process.wait(60)
    # Whatever was uploaded and made is gone.
    assert not list((folder / "temporary").iterdir())


@pytest.fixture(scope="module")
def client(page, folder):
    return Client(
        page,
        download_files=folder / "downloads",
        analytics_enabled=False,
        verbose=False,
    )


def speak(path, seconds=1.0, rate=8000, channels=1):
    noise = np.random.default_rng(0).normal(
        size=(int(seconds * rate), channels)
    )
    soundfile.write(path, 0.1 * noise, rate)
    return path


# --- over HTTP ---------------------------------------------------------------


def test_it_answers_what_the_model_gives(client, tmp_path):
    recording = speak(tmp_path / "mix.wav", 1.5, 16000, 2)
    *sounds, _, _, _ = client.predict(handle_file(recording))
    model = FlashFormerSeparation.from_hparams(built_in_model())
    expected = model.separate_to_files(recording, tmp_path, subtype="pcm16")
    assert [Path(sound).name for sound in sounds] == [
        "mix_s1.wav",
        "mix_s2.wav",
    ]
    for sound, path in zip(sounds, expected):
        samples, rate = soundfile.read(sound, dtype="int16")
        assert rate == 16000 and len(samples) == 24000
        difference = samples - soundfile.read(path, dtype="int16")[0]
        assert abs(difference).max() <= 1


def test_it_draws_the_mixture_and_each_speaker(client, tmp_path):
    recording = speak(tmp_path / "mix.flac")
    pictures = client.predict(handle_file(recording))[2:]
    starts = [Path(picture).read_bytes()[:4] for picture in pictures]
    assert starts == [b"\x89PNG"] * 3


def test_progress_is_told(client, tmp_path):
    job = client.submit(handle_file(speak(tmp_path / "mix.wav", 29, 16000)))
    told = set()
    while not job.done():
        for unit in job.status().progress_data or []:
            told.add(unit.desc)
        time.sleep(0.01)
    assert job.exception() is None
    assert told and all(text.endswith(" of 0:29") for text in told)


def test_what_is_too_long_is_refused_by_name(client, tmp_path):
    recording = speak(tmp_path / "long talk.flac", 31)
    with pytest.raises(AppError, match=r"^long talk.flac lasts 0.5 minutes"):
        client.predict(handle_file(recording))


def test_what_is_no_audio_is_refused_by_name(client, tmp_path):
    (tmp_path / "notes.wav").write_text("no audio")
    with pytest.raises(AppError, match="^cannot read notes.wav as audio"):
        client.predict(handle_file(tmp_path / "notes.wav"))


def test_nothing_is_asked_for(client):
    with pytest.raises(AppError, match="Drop or record a mixture first"):
        client.predict(None)


def test_what_is_too_large_is_refused(page):
    """Asked by hand, as the test after: gradio's client looks by itself."""
    large = {"files": ("large.wav", bytes(2**20 + 1))}
    answer = httpx.post(f"{page}gradio_api/upload", files=large)
    assert answer.status_code == 413
    assert "maximum allowed size" in answer.text


def test_files_that_were_not_uploaded_are_not_read(page, tmp_path):
    address, answers = f"{page}gradio_api/call/separate", []
    recording = speak(tmp_path / "secret.wav")
    with recording.open("rb") as file:
        (uploaded,) = httpx.post(
            f"{page}gradio_api/upload", files={"files": file}
        ).json()
    for path in (str(recording), uploaded):
        data = {"path": path, "meta": {"_type": "gradio.FileData"}}
        event = httpx.post(address, json={"data": [data]}).json()["event_id"]
        answer = httpx.get(f"{address}/{event}", timeout=60).text
        answers.append("event: complete" in answer)
        assert ("event: error" in answer) != answers[-1]
    # What was uploaded of the same is read.
    assert answers == [False, True]


# --- where it listens, whom it calls, what it keeps --------------------------


def test_it_listens_on_loopback_alone(page):
    port = int(page.rstrip("/").rsplit(":", 1)[1])
    socket.create_connection(("127.0.0.1", port), 5).close()
    with pytest.raises(OSError):
        socket.create_connection(("127.0.0.2", port), 5)


def test_it_calls_nobody(client, folder, tmp_path):
    client.predict(handle_file(speak(tmp_path / "mix.wav")))
    calls = (folder / "calls").read_text().splitlines()
    assert calls
    local = ("'127.0.0.1'", "('127.0.0.1',", "'localhost'", "b'127.0.0.1'")
    assert [call for call in calls if not call.startswith(local)] == []


def test_all_it_keeps_is_in_one_folder(client, folder, tmp_path):
    client.predict(handle_file(speak(tmp_path / "mix.wav")))
    (only,) = (folder / "temporary").iterdir()
    assert only.name.startswith("flashformer-app-")


def test_what_is_old_goes_and_ten_seconds_take_less_than_five(
    tmp_path, monkeypatch
):
    monkeypatch.setattr(app, "KEEP_SECONDS", 10)
    monkeypatch.setattr(app, "SWEEP_SECONDS", 1)
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path / "temporary"))
    (tmp_path / "temporary").mkdir()
    model = FlashFormerSeparation.from_hparams(built_in_model())
    with app.serve(model) as url:
        client = Client(
            url, download_files=False, analytics_enabled=False, verbose=False
        )
        # Of the processor, server and client: others may be busy on it too.
        start = time.process_time()
        client.predict(handle_file(speak(tmp_path / "mix.wav", 10)))
        assert time.process_time() - start < 5

        def kept():
            files = (tmp_path / "temporary").rglob("*mix*")
            return [file for file in files if file.is_file()]

        assert len(kept()) == 6
        end = time.monotonic() + 60
        while kept() and time.monotonic() < end:
            time.sleep(0.2)
        assert not kept()


@pytest.mark.parametrize(
    "name, proxy",
    [
        ("http_proxy", "http://127.0.0.1:9"),
        ("all_proxy", "socks5://127.0.0.1:9"),
    ],
)
def test_a_proxy_is_not_asked_and_the_environment_stays(
    tmp_path, monkeypatch, name, proxy
):
    monkeypatch.setenv(name, proxy)
    monkeypatch.setenv("GRADIO_TEMP_DIR", str(tmp_path / "new" / "temporary"))
    before = dict(os.environ)
    model = SimpleNamespace(
        hparams=SimpleNamespace(num_spks=2, sample_rate=8000)
    )
    with app.serve(model) as url:
        port = int(url.rstrip("/").rsplit(":", 1)[1])
        socket.create_connection(("127.0.0.1", port), 5).close()
        (kept,) = (tmp_path / "new" / "temporary").iterdir()
        assert os.environ["GRADIO_TEMP_DIR"] == str(kept)
    for changed in ("GRADIO_TEMP_DIR", "NO_PROXY", "no_proxy"):
        assert os.environ.get(changed) == before.get(changed)
    assert not list((tmp_path / "new" / "temporary").iterdir())


# --- the command -------------------------------------------------------------


@pytest.mark.parametrize("limit", (["--max-minutes", "0"], ["--max-mb", "0"]))
def test_limits_that_let_nothing_in(limit, capsys):
    assert cli.main(["app", *limit]) == cli.USAGE
    assert "must be" in capsys.readouterr().err


def test_without_the_extra_it_says_what_to_install(capsys, monkeypatch):
    monkeypatch.setitem(sys.modules, "gradio", None)
    assert cli.main(["app"]) == cli.FAILED
    assert "speechbrain-flashformer[app]" in capsys.readouterr().err


def test_a_port_that_is_taken(page, capsys):
    port = page.rstrip("/").rsplit(":", 1)[1]
    assert cli.main(["app", "--port", port]) == cli.FAILED
    assert port in capsys.readouterr().err


# --- the spectrogram ---------------------------------------------------------


@pytest.mark.parametrize("seconds", (0.01, 1, 95))
def test_a_tone_is_where_it_belongs(tmp_path, seconds):
    rate = 16000
    tone = torch.sin(2 * torch.pi * 1000 * torch.arange(seconds * rate) / rate)
    soundfile.write(tmp_path / "tone.wav", tone.numpy(), rate)
    level = spectrogram(AudioReader(tmp_path / "tone.wav"), top=4000)
    bins, columns = level.shape
    # The lowest bin is 0 Hz, the highest 4000 Hz.
    assert level.mean(1).argmax() == (bins - 1) / 4
    assert columns <= 1.1 * COLUMNS


def test_long_recordings_keep_their_mean_power(tmp_path):
    recording = speak(tmp_path / "noise.wav", 60)
    power = (spectrogram(AudioReader(recording), 4000) / 10 * np.log(10)).exp()
    size = 0.032 * 8000
    window = torch.hann_window(int(size)).square().sum()
    expected = 0.1**2 * window
    assert power.mean().item() == pytest.approx(expected.item(), rel=0.03)


def test_channels_that_cancel_are_in_the_picture(tmp_path):
    noise = 0.1 * torch.randn(8000)
    soundfile.write(tmp_path / "one.wav", noise.numpy(), 8000, "FLOAT")
    both = torch.stack([noise, -noise], 1).numpy()
    soundfile.write(tmp_path / "both.wav", both, 8000, "FLOAT")
    one, both = (
        spectrogram(AudioReader(tmp_path / f"{name}.wav"), 4000)
        for name in ("one", "both")
    )
    torch.testing.assert_close(both, one, rtol=0, atol=0.5)


def test_silence_has_a_picture(tmp_path):
    soundfile.write(tmp_path / "silence.wav", np.zeros(8000), 8000)
    (picture,) = draw_spectrograms([tmp_path / "silence.wav"], tmp_path, 8000)
    assert Path(picture).stat().st_size > 1000


# --- in a browser ------------------------------------------------------------


@pytest.fixture
def browser():
    if not (CHROMIUM and DRIVER):
        pytest.skip(
            "no Chromium here: the page is tested over HTTP alone "
            "(Debian: apt-get install chromium chromium-driver)"
        )
    options = webdriver.ChromeOptions()
    options.binary_location = CHROMIUM
    for argument in (
        "--headless=new",
        "--no-sandbox",
        "--disable-dev-shm-usage",
        "--use-fake-device-for-media-stream",
        "--use-fake-ui-for-media-stream",
    ):
        options.add_argument(argument)
    options.set_capability("goog:loggingPrefs", {"performance": "ALL"})
    service = webdriver.ChromeService(executable_path=DRIVER)
    with contextlib.closing(_Chrome(options, service)) as chrome:
        yield chrome


class _Chrome(webdriver.Chrome):
    def __init__(self, options, service):
        super().__init__(options=options, service=service)

    def close(self):
        self.quit()

    def until(self, condition, seconds=30):
        return WebDriverWait(self, seconds, 0.1).until(lambda _: condition())

    def press(self, text):
        def there():
            return [
                button
                for button in self.find_elements(By.TAG_NAME, "button")
                if text in (button.text, button.get_attribute("aria-label"))
            ]

        self.until(there)[0].click()

    def players(self):
        """Seconds of audio in each player, of those that can play."""
        return self.execute_script(
            "return [...document.querySelectorAll('audio')]"
            ".filter(player => player.readyState >= 2)"
            ".map(player => player.duration)"
        )

    def pictures(self):
        return self.execute_script(
            "return [...document.querySelectorAll('img')]"
            ".filter(image => image.naturalWidth > 500).length"
        )

    def text(self):
        return self.find_element(By.TAG_NAME, "body").text

    def upload(self, path):
        def fields():
            return self.find_elements(By.CSS_SELECTOR, "input[type=file]")

        self.until(fields)[0].send_keys(str(path))

    def foreign_hosts(self):
        """Hosts that the page asked for anything, other than its own."""
        asked = set()
        for entry in self.get_log("performance"):
            message = json.loads(entry["message"])["message"]
            if message["method"] == "Network.requestWillBeSent":
                url = message["params"]["request"]["url"]
                if url.startswith(("http", "ws")):
                    asked.add(url.split("/")[2].split(":")[0])
        assert asked
        return asked - {"127.0.0.1"}


def test_upload_press_and_hear_two_speakers(browser, page, tmp_path):
    recording = speak(tmp_path / "mix.wav", 2.5)
    browser.get(page)
    browser.upload(recording)
    browser.until(lambda: browser.players() == [2.5])
    browser.press("Separate")
    browser.until(lambda: browser.players() == [2.5, 2.5, 2.5])
    browser.until(lambda: browser.pictures() == 3)
    assert "Speaker 2" in browser.text()
    # Another recording: what was shown of the last one goes.
    browser.press("Clear")
    browser.until(lambda: "Speaker" not in browser.text())
    (tmp_path / "notes.wav").write_text("no audio")
    browser.upload(tmp_path / "notes.wav")
    browser.until(lambda: "Drop" not in browser.text().split("Mixture")[1])
    browser.press("Separate")
    browser.until(lambda: "cannot read notes.wav as audio" in browser.text())
    assert not browser.foreign_hosts()


def test_record_press_and_hear_two_speakers(browser, page):
    browser.get(page)
    browser.press("Record audio")
    browser.press("Record")
    time.sleep(1)
    browser.press("Stop")
    (seconds,) = browser.until(browser.players)
    assert seconds > 0.5
    browser.press("Separate")
    browser.until(lambda: browser.players() == [seconds] * 3)


def test_too_large_a_file_is_told_in_the_page(browser, page, tmp_path):
    recording = speak(tmp_path / "large.wav", 20, 44100)
    browser.get(page)
    browser.upload(recording)
    browser.until(lambda: "maximum allowed size of 1.0 Mb" in browser.text())

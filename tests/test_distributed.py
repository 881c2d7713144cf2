"""Two processes train as one with twice the batch, and test together.

Run by ``torchrun`` this file is one of the processes.
"""

import csv
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from prepare_data import prepare_wsjmix
from speechbrain.lobes.models.dual_path import Decoder, Encoder
from speechbrain.nnet.schedulers import ReduceLROnPlateau
from speechbrain.utils.distributed import ddp_init_group
from speechbrain.utils.epoch_loop import EpochCounter

from speechbrain_flashformer import FlashFormer
from speechbrain_flashformer.training.brain import Separation
from speechbrain_flashformer.training.checkpoints import WholeCheckpointer
from speechbrain_flashformer.training.data import EpochSampler, load_dataset
from speechbrain_flashformer.training.losses import pit_si_snr_loss
from speechbrain_flashformer.training.voices import make_voices

RECIPE = Path(__file__).parent.parent / "recipes/WSJ0Mix/separation"
TORCHRUN = [
    sys.executable,
    "-m",
    "torch.distributed.run",
    "--standalone",
    "--nproc_per_node=2",
]
DDP = {"distributed_launch": True, "distributed_backend": "gloo"}
ITEMS, TESTED = 8, 5


class Recording(Separation):
    """Keeps what it heard and the gradients it stepped with."""

    def on_fit_batch_start(self, batch, should_step):
        self.heard.append(list(batch.id))
        super().on_fit_batch_start(batch, should_step)

    def optimizers_step(self):
        self.gradients.append(
            [p.grad.clone() for p in self.modules.parameters()]
        )
        super().optimizers_step()


class Silent:
    def log_stats(self, **stats):
        pass


def easy_for_one(targets, predictions, lengths):
    """The loss, but in the second process all items are learnt."""
    loss = pit_si_snr_loss(targets, predictions, lengths)
    return loss - 100 * (os.environ.get("RANK") == "1")


def train(folder, batch_size, loss=pit_si_snr_loss):
    """Train and test; what this process heard, stepped with and ended as."""
    torch.manual_seed(0)
    run_opts = {"device": "cpu", "noprogressbar": True}
    if "RANK" in os.environ:
        run_opts |= DDP
    modules = {
        "encoder": Encoder(kernel_size=16, out_channels=12),
        "masknet": FlashFormer(12, d_model=32, num_layers=1, nhead=2),
        "decoder": Decoder(12, 1, kernel_size=16, stride=8, bias=False),
    }
    counter = EpochCounter(1)
    output = folder / f"{loss.__name__}_{batch_size}"
    output.mkdir(exist_ok=True)
    brain = Recording(
        modules=modules,
        opt_class=lambda p: torch.optim.AdamW(p, lr=1e-4),
        hparams={
            "num_spks": 2,
            "sample_rate": 8000,
            "loss": loss,
            "threshold_byloss": True,
            "threshold": -30,
            "lr_scheduler": ReduceLROnPlateau(),
            "train_logger": Silent(),
            "epoch_counter": counter,
            "output_folder": str(output),
            "save_audio": True,
            "n_audio_to_save": 3,
        },
        run_opts=run_opts,
        checkpointer=WholeCheckpointer(output / "save", modules),
    )
    brain.heard, brain.gradients = [], []
    hparams = {
        "data_folder": str(folder / "voices"),
        "num_spks": 2,
        "sample_rate": 8000,
        "seed": 5,
    }
    parts = [
        load_dataset(folder / f"wsj_{part}.csv", hparams, crop)
        for part, crop in (("tr", 4000), ("cv", None), ("tt", None))
    ]
    brain.fit(
        counter,
        *parts[:2],
        train_loader_kwargs={
            "batch_size": batch_size,
            "sampler": EpochSampler(ITEMS, shuffle=True, seed=1),
            "drop_last": True,
        },
        valid_loader_kwargs={"batch_size": 1},
    )
    weights = [p.detach().clone() for p in brain.modules.parameters()]
    brain.evaluate(parts[2], min_key="si-snr")
    return {
        "heard": brain.heard,
        "gradients": brain.gradients,
        "weights": weights,
    }


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("ddp")
    voices = make_voices(
        folder / "voices",
        sizes=(ITEMS, 3, TESTED),
        utterances=1,
        progressbar=False,
    )
    prepare_wsjmix(voices, folder)
    return folder


@pytest.fixture(scope="module")
def processes(folder):
    """What each of two processes saw: by loss, then by rank."""
    subprocess.run(
        [*TORCHRUN, __file__, str(folder)],
        check=True,
        env={**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)},
        timeout=300,
    )
    return [torch.load(folder / f"rank{rank}.pt") for rank in range(2)]


def results(folder, name):
    with open(folder / name / "test_results.csv", newline="") as file:
        return list(csv.DictReader(file))


def test_two_processes_are_one_with_twice_the_batch(folder, processes):
    one, other = (process["pit_si_snr_loss"] for process in processes)
    for name in ("gradients", "weights"):
        for a, b in zip(one[name], other[name], strict=True):
            assert all(map(torch.equal, a, b))
    alone = train(folder, batch_size=4)
    for a, b, both in zip(
        one["heard"], other["heard"], alone["heard"], strict=True
    ):
        assert set(a) | set(b) == set(both) and not set(a) & set(b)
    for a, b in zip(one["gradients"], alone["gradients"], strict=True):
        for x, y in zip(a, b):
            torch.testing.assert_close(x, y, atol=1e-5, rtol=1e-3)
    for x, y in zip(one["weights"], alone["weights"]):
        torch.testing.assert_close(x, y, atol=1e-5, rtol=1e-4)

    # They tested together, and wrote one table.
    together = results(folder, "pit_si_snr_loss_2")
    single = results(folder, "pit_si_snr_loss_4")
    assert len(together) == len(single) == TESTED + 3
    for a, b in zip(together, single):
        assert a["snt_id"] == b["snt_id"]
        assert float(a["sdr_i"]) == pytest.approx(float(b["sdr_i"]), abs=0.01)
    saved = [
        sorted(path.name for path in (folder / name).glob("audio_*/*"))
        for name in ("pit_si_snr_loss_2", "pit_si_snr_loss_4")
    ]
    assert saved[0] == saved[1] != []
    assert not list(folder.rglob("*.running"))


def test_a_process_without_anything_to_learn_does_not_stop_the_other(processes):
    one, other = (process["easy_for_one"] for process in processes)
    assert len(one["gradients"]) == len(other["gradients"]) == 2
    for a, b in zip(one["gradients"], other["gradients"]):
        assert all(map(torch.equal, a, b))
    assert any(gradient.any() for gradient in one["gradients"][0])


def test_the_recipe_runs_under_torchrun(folder, tmp_path):
    output = tmp_path / "run"
    done = subprocess.run(
        [
            *TORCHRUN,
            "train.py",
            "hparams/flashformer-demo.yaml",
            "--distributed_backend=gloo",
            "--device=cpu",
            f"--data_folder={folder / 'voices'}",
            f"--output_folder={output}",
            "--model={d_model: 32, num_layers: 1, nhead: 2, d_ffn: 32}",
            "--batch_size=2",
            "--N_epochs=2",
            "--noprogressbar",
        ],
        cwd=RECIPE,
        capture_output=True,
        text=True,
        timeout=300,
        env={**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)},
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert len(results(tmp_path, "run")) == TESTED + 3
    log = (output / "train_log.txt").read_text()
    assert log.count("epoch: 2,") == log.count("epoch loaded") == 1
    assert (output / "results.png").is_file()


if __name__ == "__main__":
    where = Path(sys.argv[1])
    ddp_init_group(DDP)
    seen = {
        loss.__name__: train(where, batch_size=2, loss=loss)
        for loss in (pit_si_snr_loss, easy_for_one)
    }
    torch.save(seen, where / f"rank{os.environ['RANK']}.pt")
    torch.distributed.destroy_process_group()

#!/usr/bin/env python3
"""Train and test a separation model on WSJ0-mix or a set in its layout.

> python train.py hparams/flashformer.yaml --data_folder /path/to/2speakers
> python train.py hparams/flashformer-demo.yaml

``--data_folder voices``, the default of the demo, makes a starter set of
synthetic voices in the output folder. Results on it are not comparable with
those on WSJ0-mix.
"""

import argparse
import contextlib
import logging
import os
import sys
from importlib.util import find_spec
from pathlib import Path

import speechbrain as sb
import torch
from hyperpyyaml import load_hyperpyyaml, resolve_references
from plot_results import check_can_plot, plot_evaluation, plot_results
from prepare_data import prepare_wsjmix
from ruamel.yaml import YAML
from ruamel.yaml.error import YAMLError
from speechbrain.utils.distributed import (
    ddp_init_group,
    if_main_process,
    infer_device,
    run_on_main,
)
from speechbrain.utils.logger import get_logger
from speechbrain.utils.train_logger import TensorboardLogger
from torch.distributed import (
    destroy_process_group,
    get_backend,
    is_initialized,
)

from speechbrain_flashformer import FlashFormer
from speechbrain_flashformer import hparams as model_yamls
from speechbrain_flashformer.inference.pack import start_from
from speechbrain_flashformer.training.brain import Separation
from speechbrain_flashformer.training.data import (
    dataio_prep,
    training_loader_options,
)
from speechbrain_flashformer.training.locks import locked
from speechbrain_flashformer.training.metrics import check_perceptual
from speechbrain_flashformer.training.mixing import dynamic_mix_data_prep
from speechbrain_flashformer.training.optim import has_fast_bfloat16
from speechbrain_flashformer.training.schedules import (
    steps_per_epoch,
    stretch_schedule,
)
from speechbrain_flashformer.training.voices import make_voices

logger = get_logger(__name__)

# The value of data_folder that requests the starter set.
VOICES = "voices"
# Settings that are paths. They are not parsed as yaml, which would not read
# "2024", "no" or "a: b" as a string.
PATHS = (
    "data_folder",
    "output_folder",
    "base_folder_dm",
    "dm_noise_folder",
    "start_from",
)

# Where the package uses the settings that this file does not use.
#
# data.dataio_prep: hparams.train_data, hparams.valid_data,
#   hparams.test_data, hparams.limit_training_signal_len,
#   hparams.training_signal_len
# data.training_loader_options: hparams.dataloader_opts,
#   hparams.dynamic_batching, hparams.max_batch_length, hparams.num_buckets
# mixing.dynamic_mix_data_prep: hparams.base_folder_dm, hparams.dm_speaker,
#   hparams.dm_same_corpus_share, hparams.dm_concatenation_share,
#   hparams.dm_effects
# augment.augment: hparams.use_speedperturb, hparams.speed_perturb,
#   hparams.use_rand_shift, hparams.min_shift, hparams.max_shift,
#   hparams.use_wavedrop, hparams.drop_freq, hparams.drop_chunk
# brain.Separation: hparams.loss, hparams.threshold_byloss,
#   hparams.threshold, hparams.loss_upper_lim, hparams.warmup_steps,
#   hparams.matrix_optimizer, hparams.avg_checkpoints, hparams.train_logger,
#   hparams.save_audio, hparams.n_audio_to_save


def main():
    """Parse the command line, check what is needed, train and test."""
    hparams_file, run_opts, overrides = parse_arguments(sys.argv[1:])
    hparams = load_settings(hparams_file, overrides)
    ddp_init_group(run_opts)
    hparams.setdefault(
        "precision", default_precision(run_opts["device"], hparams["MaskNet"])
    )
    # Check now what would otherwise fail after the training.
    try:
        check_perceptual(hparams["more_metrics"], hparams["sample_rate"])
        if hparams["plot_results"]:
            check_can_plot(hparams)
    except (ImportError, ValueError) as error:
        sys.exit(f"{hparams_file}: {error}")
    if hparams["use_tensorboard"] and find_spec("tensorboard") is None:
        sys.exit("use_tensorboard needs: pip install tensorboard")
    with contextlib.ExitStack() as held:
        if if_main_process():
            reserve(hparams["save_folder"], held)
        sb.create_experiment_directory(
            experiment_directory=hparams["output_folder"],
            hyperparams_to_save=hparams_file,
            overrides=overrides,
        )
        train_and_test(hparams, run_opts)


def reserve(folder, held):
    """Lock the folder of the checkpoints against other trainings.

    Arguments
    ---------
    folder : str
        The setting save_folder. Not output_folder, which the starter set locks
        while it is made.
    held : contextlib.ExitStack
        Holds the lock until it is closed.

    Raises
    ------
    SystemExit
        If another training holds the lock.
    """
    Path(folder).mkdir(parents=True, exist_ok=True)
    try:
        held.enter_context(locked(folder, wait=False))
    except BlockingIOError:
        sys.exit(
            f"another training is writing into {folder}: wait for it, or give "
            "--output_folder"
        )


def train_and_test(hparams, run_opts):
    """Prepare the data, train, test and plot.

    Arguments
    ---------
    hparams : dict
        The hyperparameters.
    run_opts : dict
        SpeechBrain's options of the run.
    """
    logger.info("Precision: %s", hparams["precision"])

    try:
        prepare(hparams, not run_opts.get("noprogressbar", False))
        train_data, valid_data, test_data = dataio_prep(hparams)
        # With dynamic mixing, too, an epoch has as many mixtures as the
        # training set in data_folder.
        loader_opts = training_loader_options(
            hparams, train_data, len(train_data)
        )
        if hparams["dynamic_mixing"]:
            train_data = dynamic_mix_data_prep(hparams)
    except (ImportError, OSError, ValueError) as error:
        logger.error(error)
        sys.exit(1)
    if hparams["use_tensorboard"]:
        hparams["tensorboard_train_logger"] = TensorboardLogger(
            hparams["tensorboard_logs"]
        )
    if hparams["start_from"]:
        start_from(hparams["start_from"], hparams["modules"])
    if "pretrained_separator" in hparams:
        run_on_main(hparams["pretrained_separator"].collect_files)
        hparams["pretrained_separator"].load_collected()

    separator = Separation(
        modules=hparams["modules"],
        opt_class=hparams["optimizer"],
        hparams=hparams,
        run_opts=run_opts,
        checkpointer=hparams["checkpointer"],
    )
    train_loader = separator.make_dataloader(
        train_data, sb.Stage.TRAIN, **loader_opts
    )
    steps = steps_per_epoch(train_loader, separator.grad_accumulation_factor)
    stretch_schedule(hparams["lr_scheduler"], hparams["N_epochs"] * steps)
    separator.fit(
        separator.hparams.epoch_counter,
        train_loader,
        valid_data,
        valid_loader_kwargs=hparams["dataloader_opts_valid"],
    )
    separator.evaluate(
        test_data,
        min_key="si-snr",
        test_loader_kwargs=hparams["dataloader_opts_valid"],
    )
    if hparams["plot_results"]:
        run_on_main(plot_results, args=[hparams["output_folder"]])
        run_on_main(plot_evaluation, args=[hparams["output_folder"]])
    if hparams["use_tensorboard"] and if_main_process():
        hparams["tensorboard_train_logger"].writer.close()


def parse_arguments(arguments):
    """Parse the command line as SpeechBrain does, but keep paths as they are.

    Arguments
    ---------
    arguments : list of str
        The command line, without the name of the script.

    Returns
    -------
    tuple
        Path of the yaml file, ``run_opts`` (dict) and overrides (dict).

    Raises
    ------
    SystemExit
        If a path is not UTF-8 or an option is not valid yaml.
    """
    parser = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    for name in PATHS:
        parser.add_argument(f"--{name}", default=argparse.SUPPRESS)
    paths, rest = parser.parse_known_args(arguments)
    for name, path in vars(paths).items():
        try:
            path.encode()
        except UnicodeEncodeError:
            sys.exit(
                f"{name} {path!r} is not valid UTF-8, as SpeechBrain's files "
                "need it: rename it"
            )
    hparams_file, run_opts, overrides = sb.parse_arguments(rest)
    try:
        overrides = YAML().load(overrides) or {}
    except YAMLError as error:
        sys.exit(f"cannot read the options: {' '.join(str(error).split())}")
    return hparams_file, run_opts, {**overrides, **vars(paths)}


def load_settings(hparams_file, overrides):
    """Load the hyperparameters.

    Arguments
    ---------
    hparams_file : str
        The yaml file.
    overrides : dict
        Values that replace those of the file.

    Returns
    -------
    dict
        The hyperparameters.

    Raises
    ------
    SystemExit
        If a key, a file or the data folder is missing, or a value is invalid;
        the message names it and the remedy.
    """
    try:
        with open(hparams_file, encoding="utf-8") as file:
            text = resolve_references(file, overrides, True)
    except KeyError as error:
        sys.exit(f"{hparams_file}: {error.args[0]}")
    except FileNotFoundError as error:
        if error.filename == hparams_file:
            sys.exit(f"no file {hparams_file}")
        model = Path(model_yamls.__path__[0], Path(error.filename).name)
        sys.exit(
            f"{hparams_file} includes {error.filename}, which is not there: "
            f"keep the recipe in its repository, or include {model}"
        )
    # Checked first, because loading the yaml creates folders.
    check_data_folder(YAML().load(text)["data_folder"])
    text.seek(0)
    try:
        return load_hyperpyyaml(text)
    except (OSError, ValueError) as error:
        sys.exit(f"{hparams_file}: {error}")


def check_data_folder(folder):
    """Exit if there is no data to train on.

    Arguments
    ---------
    folder : str
        The setting data_folder.

    Raises
    ------
    SystemExit
        If it is empty, ambiguous or does not exist; the message has the remedy.
    """
    remedy = (
        "give --data_folder PATH, or --data_folder voices for a starter set "
        "of synthetic voices"
    )
    if not folder:
        sys.exit(f"data_folder is empty: {remedy}")
    if not isinstance(folder, str):
        sys.exit(f"data_folder {folder} is not text for yaml: put it in quotes")
    if folder == VOICES:
        if Path(VOICES).is_dir():
            sys.exit(
                "--data_folder voices makes synthetic voices, but there is "
                "also a folder of that name here: say ./voices to train on "
                "it, or start elsewhere"
            )
        return
    if not Path(folder).is_dir():
        sys.exit(f"there is no data_folder {folder}: {remedy}")
    if not any(Path(folder).iterdir()):
        sys.exit(f"data_folder {folder} is empty: {remedy}")


def prepare(hparams, progressbar):
    """Make the starter set if it is requested, and write the CSV files.

    Arguments
    ---------
    hparams : dict
        The hyperparameters; data_folder is changed for the starter set.
    progressbar : bool
        Whether to show a progress bar.
    """
    if hparams["data_folder"] == VOICES:
        folder = Path(hparams["output_folder"], VOICES)
        hparams["data_folder"] = str(folder)
        logger.warning(
            "Training on synthetic voices in %s. Results on them are not "
            "comparable with those on WSJ0-mix.",
            folder,
        )
        run_on_main(
            make_voices,
            kwargs={
                "folder": folder,
                "num_spks": hparams["num_spks"],
                "sizes": [
                    hparams[f"starter_{part}"]
                    for part in ("train", "valid", "test")
                ],
                "seed": hparams["seed"],
                "sample_rate": hparams["sample_rate"],
                "progressbar": progressbar,
            },
        )
    run_on_main(
        prepare_wsjmix,
        kwargs={
            "datapath": hparams["data_folder"],
            "savepath": hparams["save_folder"],
            "n_spks": hparams["num_spks"],
            "skip_prep": hparams["skip_prep"],
            "fs": hparams["sample_rate"],
            **hparams["data_options"],
        },
    )


def leave_group():
    """End a process of a distributed training.

    DDP keeps a reference to the process group. The threads of gloo therefore
    outlive it, and sometimes abort the process while Python shuts down. With
    gloo, the process exits without this shutdown.
    """
    backend = get_backend()
    destroy_process_group()
    if backend != "gloo":
        return
    logging.shutdown()
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(0)


def default_precision(device, masknet):
    """Choose bfloat16 if the device has instructions for it.

    On a CPU, only FlashFormer uses it: other networks were not tested.

    Arguments
    ---------
    device : str or None
        Device of the training; None is SpeechBrain's default.
    masknet : torch.nn.Module
        The masknet.

    Returns
    -------
    str
        ``bf16`` or ``fp32``.
    """
    device = torch.device(device or infer_device())
    if device.type == "cpu" and not isinstance(masknet, FlashFormer):
        return "fp32"
    return "bf16" if has_fast_bfloat16(device) else "fp32"


if __name__ == "__main__":
    main()
    if is_initialized():
        leave_group()

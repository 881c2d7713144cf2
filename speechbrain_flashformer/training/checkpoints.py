"""Checkpoints that are written completely or not at all."""

import logging
import math
import shutil
from functools import partial

import torch
from speechbrain.utils.checkpoints import (
    Checkpointer,
    average_checkpoints,
    mark_as_loader,
    mark_as_saver,
    register_checkpoint_hooks,
)
from speechbrain.utils.distributed import ddp_barrier, if_main_process
from speechbrain.utils.logger import get_logger
from torch.distributed import (
    all_gather_object,
    get_rank,
    get_world_size,
    is_initialized,
)

logger = get_logger(__name__)

# Prefix of a checkpoint that is still being written.
PARTIAL = "PARTIAL+"


class WholeCheckpointer(Checkpointer):
    """A ``Checkpointer`` that renames a checkpoint once it is complete.

    SpeechBrain's ``Checkpointer`` writes into the folder that it searches. If a
    training stops while it writes, the next run would load the incomplete
    checkpoint as the newest.

    Arguments are those of ``speechbrain.utils.checkpoints.Checkpointer``.

    Example
    -------
    >>> folder = getfixture("tmp_path")
    >>> layer = torch.nn.Linear(1, 1)
    >>> checkpointer = WholeCheckpointer(folder, {"layer": layer})
    >>> checkpointer.save_checkpoint().path.is_dir()
    True
    """

    def save_checkpoint(
        self, meta=(), end_of_epoch=True, name=None, verbosity=logging.INFO
    ):
        """Save a checkpoint; an error leaves the others unchanged.

        Arguments and return value are those of SpeechBrain's ``Checkpointer``.

        Raises
        ------
        OSError
            If the checkpoint cannot be written; names the folder.
        """
        self._remove_partial()
        try:
            checkpoint = super().save_checkpoint(
                dict(meta), end_of_epoch, name, logging.DEBUG
            )
        except (OSError, RuntimeError) as error:
            self._remove_partial()
            # torch raises the death of a data worker at any point of the main
            # process, here too.
            if "DataLoader worker" in str(error):
                raise
            raise OSError(
                f"cannot write a checkpoint into {self.checkpoints_dir}: "
                f"{error}; those in it are complete: make room or repair the "
                "disk and run the same command again"
            ) from error
        ddp_barrier()
        if checkpoint is not None:
            partial = checkpoint.path
            path = partial.with_name(partial.name.removeprefix(PARTIAL))
            partial.rename(path)
            logger.log(verbosity, f"Saved a checkpoint in {path}")
            files = checkpoint.paramfiles.items()
            checkpoint = checkpoint._replace(
                path=path,
                paramfiles={name: path / file.name for name, file in files},
            )
        # Every process lists the checkpoints next, and must see the same ones.
        ddp_barrier()
        return checkpoint

    def _remove_partial(self):
        if if_main_process():
            for folder in self.checkpoints_dir.glob(f"{PARTIAL}*"):
                shutil.rmtree(folder)

    def _new_checkpoint_dirpath(self):
        path = super()._new_checkpoint_dirpath()
        return path.with_name(PARTIAL + path.name)

    def _custom_checkpoint_dirpath(self, name):
        path = super()._custom_checkpoint_dirpath(name)
        return path.with_name(PARTIAL + path.name)


class RandomState:
    """The state of torch's random generators in all processes, a recoverable.

    Without it, dropout and augmentation of a resumed training would differ from
    those of an uninterrupted one.
    """

    @mark_as_saver
    def save(self, path):
        """Write the states of all processes, which all must call this.

        Arguments
        ---------
        path : Path
            File that the main process writes.
        """
        state = {"cpu": torch.get_rng_state()}
        if torch.accelerator.is_available():
            device = torch.accelerator.current_accelerator()
            module = torch.get_device_module(device)
            state[device.type] = module.get_rng_state()
        states = all_gather(state)
        if if_main_process():
            torch.save(states, path)

    @mark_as_loader
    def load(self, path, end_of_epoch):
        """Restore the state of this process.

        A process that did not exist at the time of the save is unchanged.

        Arguments
        ---------
        path : Path
            File from ``save``.
        end_of_epoch : bool
            Not used; SpeechBrain passes it.
        """
        states = torch.load(path, weights_only=True)
        rank = get_rank() if is_initialized() else 0
        if rank >= len(states):
            return
        state = states[rank]
        torch.set_rng_state(state["cpu"])
        if torch.accelerator.is_available():
            device = torch.accelerator.current_accelerator()
            if device.type in state:
                module = torch.get_device_module(device)
                module.set_rng_state(state[device.type])


register_checkpoint_hooks(RandomState, save_on_main_only=False)


def all_gather(thing):
    """Gather one object of every process.

    Arguments
    ---------
    thing : object
        Object of this process; can be pickled.

    Returns
    -------
    list
        Objects of all processes by rank, in every process.

    Example
    -------
    >>> all_gather("row")
    ['row']
    """
    if not is_initialized():
        return [thing]
    things = [None] * get_world_size()
    all_gather_object(things, thing)
    return things


def output_gain(checkpoints):
    """Gain that brings the outputs to the level and polarity of the sources.

    It uses what validation measured: the mean level in dB over the checkpoints,
    and the polarity of their majority.

    Arguments
    ---------
    checkpoints : list of speechbrain.utils.checkpoints.Checkpoint
        At least one. Their meta has ``level_db`` and ``polarity``, unless the
        loss fixes both.

    Returns
    -------
    float
        Factor for the outputs of the averaged weights.
    """
    metas = [checkpoint.meta for checkpoint in checkpoints]
    level_db = sum(meta.get("level_db", 0.0) for meta in metas) / len(metas)
    polarity = sum(meta.get("polarity", 1) for meta in metas)
    return math.copysign(10 ** (-level_db / 20), polarity)


def save_validated(checkpointer, meta, count):
    """Save a checkpoint after a validation; keep the best and the last ones.

    Arguments
    ---------
    checkpointer : speechbrain.utils.checkpoints.Checkpointer
        Saves, and deletes all others.
    meta : dict
        With ``si-snr``, the validation loss.
    count : int
        Number of best checkpoints that are kept, and of last ones.

    Raises
    ------
    OSError
        If the checkpoint cannot be written.
    """
    checkpointer.save_and_keep_only(
        meta=meta,
        num_to_keep=count,
        min_keys=["si-snr"],
        importance_keys=[],  # SpeechBrain's default grows with every call
        ckpt_predicate=validated,
    )
    # Those from the middle of an epoch are older than this one.
    checkpointer.delete_checkpoints(
        num_to_keep=0, ckpt_predicate=lambda x: not x.meta["end-of-epoch"]
    )


def validated(checkpoint):
    """Whether a checkpoint was written after a validation.

    Arguments
    ---------
    checkpoint : speechbrain.utils.checkpoints.Checkpoint
        Its meta has ``si-snr`` after a validation.

    Returns
    -------
    bool
        False for a checkpoint from the middle of an epoch.
    """
    return "si-snr" in checkpoint.meta


def averaged_weights(checkpoints, name):
    """Average the weights of one module over checkpoints.

    Arguments
    ---------
    checkpoints : list of speechbrain.utils.checkpoints.Checkpoint
        At least one.
    name : str
        Name of the module among the recoverables.

    Returns
    -------
    dict
        State dict, on the CPU.
    """
    load = partial(torch.load, weights_only=True)
    return average_checkpoints(checkpoints, name, load)

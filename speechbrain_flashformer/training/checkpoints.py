"""Checkpoints that are whole or not there, and what they must also hold."""

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

PARTIAL = "PARTIAL+"


class WholeCheckpointer(Checkpointer):
    """A ``Checkpointer`` whose checkpoints appear when all is written.

    SpeechBrain's writes into the place where it looks for checkpoints: a
    training stopped in between would take the torn one for its newest.

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
        """As SpeechBrain's; an error leaves the checkpoints as they were."""
        self._remove_partial()
        try:
            checkpoint = super().save_checkpoint(
                dict(meta), end_of_epoch, name, logging.DEBUG
            )
        except (OSError, RuntimeError) as error:
            self._remove_partial()
            # A data worker's death is raised wherever this process then is.
            if "DataLoader worker" in str(error):
                raise
            raise OSError(
                f"cannot write a checkpoint into {self.checkpoints_dir}: "
                f"{error}; those in it are whole: mend the disk and run the "
                "same command again"
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
        # Every process lists the checkpoints next, and must see the same.
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
    """The state of torch's random generators in every process.

    Without it dropout and augmentation would go on otherwise after a stop.
    """

    @mark_as_saver
    def save(self, path):
        """Write the states; called by all processes."""
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
        """Take up the state of this process; a new process has none."""
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
    """A list of what each process has, in every one of them."""
    if not is_initialized():
        return [thing]
    things = [None] * get_world_size()
    all_gather_object(things, thing)
    return things


def output_gain(checkpoints):
    """What brings the outputs of averaged weights to their sources' level.

    Of what validation has measured, the mean in dB and the sign of most.

    Arguments
    ---------
    checkpoints : list of speechbrain.utils.checkpoints.Checkpoint
        At least one. A loss that fixes level and polarity leaves ``level_db``
        and ``polarity`` out of their meta.

    Returns
    -------
    float
        A factor.
    """
    metas = [checkpoint.meta for checkpoint in checkpoints]
    level_db = sum(meta.get("level_db", 0.0) for meta in metas) / len(metas)
    polarity = sum(meta.get("polarity", 1) for meta in metas)
    return math.copysign(10 ** (-level_db / 20), polarity)


def averaged_weights(checkpoints, name):
    """The mean over checkpoints of one module's weights.

    Arguments
    ---------
    checkpoints : list of speechbrain.utils.checkpoints.Checkpoint
        At least one.
    name : str
        Of the module, as the checkpointer knows it.

    Returns
    -------
    dict
        A state dict, on the CPU.
    """
    load = partial(torch.load, weights_only=True)
    return average_checkpoints(checkpoints, name, load)

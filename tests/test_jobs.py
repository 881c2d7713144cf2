"""Workers that die, at any time, are told of and do not end the rest."""

import os
from functools import partial

from speechbrain_flashformer.inference.jobs import run_jobs


def load(alive):
    if not alive:
        os._exit(7)


def double(_, task):
    if task == "die":
        os._exit(9)
    return 2 * task


def death(task, pid, exit_status):
    return f"died with {exit_status}"


def test_every_task_has_its_result():
    done = dict(run_jobs([1, 2, 3], 2, partial(load, True), double, death))
    assert done == {1: 2, 2: 4, 3: 6}


def test_a_worker_that_dies_costs_one_task():
    tasks = [1, "die", 3]
    done = dict(run_jobs(tasks, 2, partial(load, True), double, death))
    assert done == {1: 2, "die": "died with 9", 3: 6}


def test_workers_that_die_while_loading_are_told():
    done = dict(run_jobs([1, 2], 2, partial(load, False), double, death))
    assert done == {1: "died with 7", 2: "died with 7"}

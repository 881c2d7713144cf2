"""Run tasks in worker processes; the death of one does not stop the others."""

import signal
import sys
from contextlib import suppress
from multiprocessing import get_context
from multiprocessing.connection import wait

TERMINATED = 143  # exit status after SIGTERM
CLEANUP_SECONDS = 10  # that a terminated worker has before it is killed


def exit_on_sigterm():
    """Make SIGTERM raise SystemExit, so that open files are cleaned up.

    Returns
    -------
    object
        The handler before, as from ``signal.signal``.
    """

    def _exit(*_):
        # A second signal would interrupt the clean-up.
        signal.signal(signal.SIGTERM, signal.SIG_IGN)
        sys.exit(TERMINATED)

    return signal.signal(signal.SIGTERM, _exit)


def run_jobs(tasks, jobs, load, run, on_death):
    """Run tasks in worker processes.

    When the generator is closed early, also by an exception, the workers are
    terminated and joined.

    Arguments
    ---------
    tasks : list
        Each is passed to ``run``.
    jobs : int
        Number of workers.
    load : callable
        Called once in each worker, without arguments.
    run : callable
        Called in a worker as ``run(loaded, task)`` with the return value of
        ``load``. load, run, tasks and results are pickled.
    on_death : callable
        ``on_death(task, pid, exit_status)`` returns the result of a task whose
        worker died. It is also called for workers that were terminated.

    Yields
    ------
    tuple
        (task, result) in the order of completion.
    """
    context = get_context("spawn")
    waiting = list(reversed(tasks))
    running = {}  # connection -> (process, task)

    def _start():
        ours, theirs = context.Pipe()
        process = context.Process(target=_work, args=(theirs, load, run))
        process.start()
        theirs.close()
        _give(ours, process)

    def _give(connection, process):
        if waiting:
            task = waiting.pop()
            running[connection] = process, task
            # If the worker is dead already, ``recv`` will raise.
            with suppress(OSError):
                connection.send(task)
        else:
            connection.close()
            process.join()

    try:
        for _ in range(min(jobs, len(tasks))):
            _start()
        while running:
            for connection in wait(list(running)):
                process, task = running.pop(connection)
                try:
                    result = connection.recv()
                except (EOFError, OSError):
                    process.join()
                    yield task, on_death(task, process.pid, process.exitcode)
                    if waiting:
                        _start()
                    continue
                yield task, result
                _give(connection, process)
    finally:
        for process, _ in running.values():
            process.terminate()
        for process, task in running.values():
            process.join(CLEANUP_SECONDS)
            process.kill()
            process.join()
            on_death(task, process.pid, process.exitcode)


def _work(connection, load, run):
    """Load, then run tasks until the connection is closed."""
    # Ctrl-C reaches all processes, but the parent decides when to stop.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    exit_on_sigterm()
    loaded = load()
    while True:
        try:
            task = connection.recv()
        except EOFError:
            return
        connection.send(run(loaded, task))

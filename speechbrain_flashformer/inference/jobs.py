"""Tasks in worker processes, any of which may die without ending the rest."""

import signal
import sys
from contextlib import suppress
from multiprocessing import get_context
from multiprocessing.connection import wait

TERMINATED = 143  # exit status after SIGTERM
PATIENCE = 10  # seconds that a terminated worker has to clean up


def exit_on_sigterm():
    """Make SIGTERM an exit, so that what is open is closed; once."""

    def _leave(*_):
        # A second one would break off the cleaning up.
        signal.signal(signal.SIGTERM, signal.SIG_IGN)
        sys.exit(TERMINATED)

    return signal.signal(signal.SIGTERM, _leave)


def run_jobs(tasks, jobs, load, run, on_death):
    """Run tasks on worker processes.

    Leaving the generator early, by an exception too, terminates the workers
    and waits for them.

    Arguments
    ---------
    tasks : list
        Handed to ``run`` one by one.
    jobs : int
        Workers.
    load : callable
        Called once in each worker, without arguments.
    run : callable
        ``run(loaded, task)``, in a worker, with what ``load`` gave; load, run,
        tasks and results are pickled.
    on_death : callable
        ``on_death(task, pid, exit_status)`` gives the result of a task whose
        worker died; called too for one that was terminated.

    Yields
    ------
    tuple
        (task, result), as they come.
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
            # To a worker that died already: receiving will tell.
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
            process.join(PATIENCE)
            process.kill()
            process.join()
            on_death(task, process.pid, process.exitcode)


def _work(connection, load, run):
    """A worker's life."""
    # Ctrl-C goes to all processes; the parent says when to stop.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    exit_on_sigterm()
    loaded = load()
    while True:
        try:
            task = connection.recv()
        except EOFError:
            return
        connection.send(run(loaded, task))

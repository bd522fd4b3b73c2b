"""Workers of data loaders: a SIGTERM to the process group does not end them, and reused ones draw as new ones do.

torch's workers end themselves at a SIGTERM that their parent did not send, and the training process then raises an
error wherever it is, in a save for example. Here they heed their parent alone. One that dies all the same (one that is
still starting, or that is killed) is part of the stop, if one was heard. Imported with torch only.
"""

from __future__ import annotations

import multiprocessing
import os
import signal
import threading
import time
from typing import Any

import torch
from torch.utils.data import _utils

from trainer.machine.flag import Flag

SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGHUP)
PATIENCE_S = 1.0
"""A stop may be heard so much later than a worker has died of it."""

_worker_loop: Any = _utils.worker._worker_loop
"""torch's own; what a worker process runs."""
_heard: Flag | None = None
"""Set once a stop was heard."""


def ignore_signals_of_others() -> None:
    """In a worker: take these signals from the parent alone, which ends its workers by SIGTERM when it exits.

    A handler would not know the sender; so the signals are blocked, and a thread waits for them.
    """
    if SIGNALS[0] in signal.pthread_sigmask(signal.SIG_BLOCK, SIGNALS):
        return  # Done before.
    starter = multiprocessing.parent_process()  # With forkserver, os.getppid() is another process.
    parent = os.getppid() if starter is None or starter.pid is None else starter.pid
    threading.Thread(target=_wait, args=(parent,), daemon=True, name="signals").start()


def _wait(parent: int) -> None:
    while signal.sigwaitinfo(SIGNALS).si_pid != parent:
        pass
    os._exit(0)


def protect_all() -> None:
    """Let every loader's workers that this process starts from now on heed it alone, whoever made the loader.

    torch has no hook for all loaders; its workers call this function of the module by name. One that is spawned has a
    module of its own, and runs what the loader tells it to; but where a library has started threads in it before, those
    do not block the signals, and it may still die of one.
    """
    _utils.worker._worker_loop = protected_loop
    signal_handling: Any = _utils.signal_handling
    given = getattr(signal_handling, "_set_worker_signal_handlers", None)
    if given is None or getattr(given, "protects", False):
        return

    def handle() -> None:
        ignore_signals_of_others()
        given()

    vars(handle)["protects"] = True
    signal_handling._set_worker_signal_handlers = handle


def protected_loop(*args: Any, **more: Any) -> None:
    """In a worker: heed the parent alone, then do what torch's workers do."""
    ignore_signals_of_others()
    _worker_loop(*args, **more)


def outlive_at_stop(heard: Flag) -> None:
    """Let a worker's death raise nothing in the middle of a step, once a stop was heard.

    torch looks for dead workers in its handler of SIGCHLD, so its error comes wherever the training process is. The
    loader raises one too, when it is asked for a batch of that worker.

    Args:
        heard: Set once a stop was heard.
    """
    global _heard
    _heard = heard
    signal_handling: Any = _utils.signal_handling
    given = signal_handling._error_if_any_worker_fails
    if getattr(given, "outlives", False):
        return

    def look() -> None:
        try:
            given()
        except RuntimeError as error:
            if _heard is None or not died_at_stop(error, _heard):
                raise

    vars(look)["outlives"] = True
    signal_handling._error_if_any_worker_fails = look


def died_at_stop(error: BaseException, heard: Flag) -> bool:
    """True if an error is torch's about a worker that has died, and a stop was heard; waits a moment for that.

    It may run in a signal handler, where waiting on the event itself could block for ever.
    """
    if type(error) is not RuntimeError or not str(error).startswith("DataLoader worker (pid"):
        return False
    end = time.monotonic() + PATIENCE_S
    while not heard.is_set() and time.monotonic() < end:
        time.sleep(0.01)
    return heard.is_set()


def seed_each_epoch() -> None:
    """Let every loader with persistent workers draw in each epoch what it draws in its first one.

    torch draws a seed for the workers where it starts them, from the generator that the order of the samples and
    dropout are drawn from too. A resume in a later epoch starts them there, so what follows would differ.
    """
    from torch.utils.data.dataloader import _BaseDataLoaderIter

    given = _BaseDataLoaderIter._reset
    if getattr(given, "seeds", False):
        return

    def reset(self: Any, loader: Any, first_iter: bool = False, *others: Any, **more: Any) -> None:
        if not first_iter:
            iter(self._index_sampler)  # Some draw their order here, and a start does so twice.
            torch.empty((), dtype=torch.int64).random_(generator=loader.generator)
        given(self, loader, first_iter, *others, **more)

    vars(reset)["seeds"] = True
    _BaseDataLoaderIter._reset = reset  # type: ignore[method-assign]

"""Workers of data loaders: a SIGTERM to the process group does not end them, and reused ones draw as new ones do.

torch's workers end themselves at a SIGTERM that their parent did not send, and the training process then raises an
error wherever it is, in a save for example. Here they heed their parent alone. Imported with torch only.
"""

from __future__ import annotations

import os
import signal
import threading
from typing import Any

import torch

SIGNALS = (signal.SIGTERM, signal.SIGINT)


def ignore_signals_of_others() -> None:
    """In a worker: take SIGTERM and SIGINT from the parent alone, which ends its workers by SIGTERM when it exits.

    A handler would not know the sender; so the signals are blocked, and a thread waits for them.
    """
    if SIGNALS[0] in signal.pthread_sigmask(signal.SIG_BLOCK, SIGNALS):
        return  # Done before.
    threading.Thread(target=_wait, args=(os.getppid(),), daemon=True, name="signals").start()


def _wait(parent: int) -> None:
    while signal.sigwaitinfo(SIGNALS).si_pid != parent:
        pass
    os._exit(0)


def protect_all() -> None:
    """Let every loader's workers that this process forks from now on heed it alone, whoever made the loader.

    torch has no hook for all loaders; its workers call this function of the module by name.
    """
    from torch.utils.data import _utils

    signal_handling: Any = _utils.signal_handling
    given = getattr(signal_handling, "_set_worker_signal_handlers", None)
    if given is None or getattr(given, "protects", False):
        return

    def handle() -> None:
        ignore_signals_of_others()
        given()

    vars(handle)["protects"] = True
    signal_handling._set_worker_signal_handlers = handle


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

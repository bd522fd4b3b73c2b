"""CheckpointManager: save, load_latest and interrupted, for a script that wants to keep its loop exactly as it is.

    from trainer import CheckpointManager  # before torch

    manager = CheckpointManager("/checkpoints/my-run", save_every=100)
    step = manager.load_latest(model=model, optimizer=optimizer)  # 0 on a first attempt
    while step < 10_000:
        ...
        step += 1
        manager.save(step, model=model, optimizer=optimizer)
        if manager.interrupted:
            manager.exit()

Checkpoints, their hashes and the attempt's records are those of SpotRun. This module imports torch only once something
is loaded.
"""

from __future__ import annotations

import atexit
import os
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from typing import TYPE_CHECKING, Any, NoReturn

from trainer.errors import RunError
from trainer.training.run import SpotRun
from trainer.training.starting import own_config

if TYPE_CHECKING:
    from trainer.training.managed import Managed


class CheckpointManager:
    """Saves a run's objects, and loads the newest whole checkpoint. On several ranks, all call each method alike.

    Attributes for scripts: `state`, to change too.
    """

    def __init__(self, folder: str | os.PathLike[str], *, save_every: int | None = None, keep: int = 3) -> None:
        """Begin an attempt at the run; from now on SIGTERM and the cloud's notices are heard.

        Args:
            folder: The run's folder in the bucket.
            save_every: Steps between checkpoints; None: each call of `save` saves.
            keep: The number of newest checkpoints to keep; at least 2.

        Raises:
            SystemExit: a value makes no sense, or there is nothing to do (a newer attempt has begun, for example); a
                line says which.
        """
        run = SpotRun(
            own_config(folder, 1 if save_every is None else save_every, keep, who="CheckpointManager", hang_timeout=0),
            {},
        )
        run.unwinds = True
        self.state = run.state
        """Plain values (a best metric, an epoch), saved with the objects."""
        self._run, self._save_every = run.__enter__(), save_every or 1
        self._managed: Managed | None = None
        atexit.register(self._end)

    def load_latest(self, **objects: Any) -> int:
        """Load the newest whole checkpoint in place; call it once, before the first step.

        Args:
            objects: All that is saved: modules, optimizers, and anything with `state_dict` and `load_state_dict`, under
                any names.

        Returns:
            the steps that are done: 0 on a first attempt.

        Raises:
            SystemExit: the checkpoint has other objects, names or shapes, or an object cannot be saved; a line says
                which.
        """
        with self._ends_with_errors():
            if self._managed:
                raise RunError("load_latest() was called already; call it once, with all objects")
            from trainer.training.managed import Managed

            managed = Managed(self._run, self._save_every)
            done = managed.load(objects)
            self._managed = managed
            return done

    def save(self, step: int, **objects: Any) -> bool:
        """Save, if a checkpoint is due or the attempt is interrupted; returns once the checkpoint is committed.

        Args:
            step: Steps that are done in the whole run.
            objects: Those that were given to `load_latest`, under the same names.

        Returns:
            True if the newest checkpoint is that of this step.

        Raises:
            SystemExit: the attempt cannot go on, or the objects are others; a line says why.
        """
        with self._ends_with_errors():
            return self._loaded("save").save(step, objects)

    @property
    def interrupted(self) -> bool:
        """True once the machine is to be taken, or a stop was requested: save, and end the process.

        However the process ends then (`exit()`, the end of the script, an exception), its exit code is 75, with which
        SkyPilot starts it again; after `skyspot cancel` and at a limit in money or time it is 79.
        """
        with self._ends_with_errors():
            return self._loaded("interrupted").is_interrupted()

    def exit(self) -> NoReturn:
        """End an interrupted attempt: the process leaves with 75, or with 79 after `skyspot cancel` or at a limit.

        Raises:
            SystemExit: ends the process.
        """
        with self._ends_with_errors():
            managed = self._loaded("exit")
            if not managed.is_interrupted():
                raise RunError("exit(): nothing has interrupted this attempt; use sys.exit()")
            managed.leave()
        raise AssertionError("the attempt has not left")

    def _loaded(self, call: str) -> Managed:
        if self._managed is None:
            raise RunError(f"CheckpointManager.{call} needs load_latest(...) first; it returns 0 on a first attempt")
        return self._managed

    @contextmanager
    def _ends_with_errors(self) -> Iterator[None]:
        """End the attempt with an error of the trainer's own, with one line and the exit code of README's table."""
        try:
            yield
        except BaseException as error:
            self._run.__exit__(type(error), error, error.__traceback__)
            raise

    def _end(self) -> None:
        """End the attempt with the process."""
        with suppress(SystemExit):
            if self._managed:
                self._managed.end()

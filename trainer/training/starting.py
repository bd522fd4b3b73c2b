"""Starting: what is checked before an attempt begins, and before torch is imported: settings, launcher, process."""

from __future__ import annotations

import os
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NoReturn

from trainer.launch import others
from trainer.launch.link import Link
from trainer.launch.process_count import LaunchError
from trainer.layout.exit_codes import EXIT_FAILED
from trainer.training.config import HANG_TIMEOUT_S, ConfigError, RunConfig, named, not_installed


def own_config(
    folder: object,
    save_every: object,
    keep: object,
    keep_every: object = 0,
    allowed: Sequence[str] = (),
    who: str = "SpotRun",
    hang_timeout: object = HANG_TIMEOUT_S,
    report_to: object = (),
) -> RunConfig:
    """The settings of a run with a loop of its own, which `who` was given.

    Raises:
        SystemExit: a value makes no sense; a line says which.
    """
    trouble = None
    if not isinstance(folder, (str, os.PathLike)):
        trouble = f"{who}({folder!r:.60}): give the run's folder, or a RunConfig"
    elif not (type(save_every) is int and save_every > 0) and (save_every != "auto" or who != "SpotRun"):
        auto = ', or "auto"' if who == "SpotRun" else ""
        trouble = f"{who}(save_every={save_every!r:.60}): give a number of steps{auto}"
    elif not (type(keep) is int and keep > 1):
        trouble = f"{who}(keep={keep!r:.60}): keep at least 2 checkpoints, because a preemption may tear the newest"
    elif not (type(keep_every) is int and keep_every >= 0):
        trouble = f"{who}(keep_every={keep_every!r:.60}): give a number of steps; 0 keeps none for good"
    elif not (isinstance(hang_timeout, (int, float)) and hang_timeout >= 0):
        trouble = f"{who}(hang_timeout={hang_timeout!r:.60}): give a number of seconds; 0 sets no limit"
    elif isinstance(allowed, str):
        trouble = f"{who}(allow_config_change={allowed!r:.60}): give a list of names"
    try:
        trackers = named(report_to, f"{who}(report_to=...)")
    except ConfigError as error:
        trouble = trouble or str(error)
    if trouble:
        refuse(trouble)
    return RunConfig(
        checkpoint_dir=Path(str(folder)),
        save_interval_steps=save_every if isinstance(save_every, int) else None,
        keep_latest=keep if isinstance(keep, int) else 3,
        keep_every=keep_every if isinstance(keep_every, int) else 0,
        allow_config_change=tuple(allowed),
        hang_timeout_s=float(hang_timeout) if isinstance(hang_timeout, (int, float)) else HANG_TIMEOUT_S,
        report_to=trackers,
    )


def refuse_missing_trackers(config: RunConfig) -> None:
    """Refuse a tracker whose package is missing.

    Raises:
        SystemExit: a line says what to install.
    """
    if trouble := not_installed(config.report_to):
        refuse(trouble)


def take_place() -> str:
    """Find this process's rank; returns a note about its launcher.

    Raises:
        SystemExit: the launcher's variables are wrong, or it would lose the exit code; a line says what to do.
    """
    try:
        return others.take_place()
    except LaunchError as error:
        refuse(str(error))


def refuse(trouble: str) -> NoReturn:
    """End the process, after a line that one rank of this machine prints."""
    # Lightning starts its own processes without RANK, from local rank 1 on.
    first = ("", "0") if "RANK" in os.environ else ("", "0", "1")
    if Link.from_env().is_first_to_print(trouble) and (
        os.environ.get("SKYSPOT_LINK") or os.environ.get("LOCAL_RANK", "0") in first
    ):
        print(f"Error: {trouble}", file=sys.stderr, flush=True)
    sys.exit(EXIT_FAILED)


def default_binding(config: RunConfig) -> dict[str, Any]:
    """The binding of a script that gives none: the samples of each step, and the number of steps."""
    return {
        "global_batch_size": config.global_batch_size,
        "seed": config.seed,
        "max_steps": config.max_steps,
    }


def refuse_while_imported() -> None:
    """Refuse an attempt in a process that multiprocessing started, which imports the script to find its functions.

    Raises:
        SystemExit: ends that process, after a line with the reason.
    """
    process = sys.modules.get("multiprocessing.process")
    # multiprocessing itself detects in this way a worker that starts workers while it imports the script.
    if process and getattr(process.current_process(), "_inheriting", False):
        print(
            f"Error: {process.current_process().name} imports this script, like every data-loader worker that is "
            'started with "spawn" or "forkserver", and runs SpotRun, which is outside of `if __name__ == "__main__":`. '
            "Move the training under that line.",
            file=sys.stderr, flush=True,
        )  # fmt: skip
        sys.exit(EXIT_FAILED)  # A message given here would not be printed by a server of workers.

"""`python -m trainer.launch`: run a script once per accelerator. Standard library only.

python -m trainer.launch [--processes N] [--grace S] [--gcp-notice S] [--checkpoint-dir FOLDER] SCRIPT [ARGS ...]
"""

from __future__ import annotations

import argparse
import os
import re
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import NoReturn

from trainer.attempt.limit_variables import DEADLINE_VARIABLE, SPEND_VARIABLE
from trainer.launch.exits import leave_with
from trainer.launch.process_count import LaunchError, process_count
from trainer.launch.supervisor import launch
from trainer.layout.clouds import DEFAULT_GRACE_S, NOTICE_S, default_grace_s, set_gcp_notice
from trainer.layout.exit_codes import EXIT_FAILED


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        raise LaunchError(message)


def parse(argv: Sequence[str]) -> argparse.Namespace:
    """Parse the command line.

    Raises:
        LaunchError: it is wrong.
    """
    parser = _Parser(
        prog="python -m trainer.launch", description="Run a script once per accelerator.", allow_abbrev=False
    )
    parser.add_argument(
        "--processes", type=int, metavar="N", help="number of ranks (default one per accelerator, or 1)"
    )
    parser.add_argument(
        "--grace",
        type=float,
        metavar="S",
        help=f"seconds from SIGTERM to SIGKILL (default: {DEFAULT_GRACE_S:g}; {NOTICE_S['runpod']:g} on RunPod)",
    )
    parser.add_argument(
        "--gcp-notice",
        type=float,
        metavar="S",
        help="seconds of notice on Google Cloud, for instances created with a preemptionNoticeDuration "
        f"(default: {NOTICE_S['gcp']:g})",
    )
    parser.add_argument(
        "--checkpoint-dir",
        type=Path,
        metavar="FOLDER",
        default=os.environ.get("SKYSPOT_CHECKPOINT_DIR") or None,
        help="the run's folder, in which to record the attempt (default SKYSPOT_CHECKPOINT_DIR)",
    )
    parser.add_argument("--cpu", action="store_true", help="start one rank, even if there are GPUs")
    parser.add_argument("script", metavar="SCRIPT", help="the Python script to run")
    parser.add_argument("arguments", nargs=argparse.REMAINDER, metavar="ARGS", help="the script's own arguments")
    return parser.parse_args(argv)


def _limit_without_records(script: Path, run_dir: Path | None) -> str:
    """Why a limit that is set cannot be held; empty if it can.

    The sidecar holds it in the run's folder. Without one, only SpotRun in the script can: it has to import `trainer`.
    """
    name = next((one for one in (SPEND_VARIABLE, DEADLINE_VARIABLE) if os.environ.get(one, "").strip()), None)
    if name and not run_dir and not re.search(rb"^\s*(from|import)\s+trainer\b", script.read_bytes(), re.MULTILINE):
        return (
            f"{name} is set, but there is no folder for the records that a limit is reckoned from. Set "
            "SKYSPOT_CHECKPOINT_DIR in the task's envs or give --checkpoint-dir FOLDER, in a mounted bucket"
        )
    return ""


def main() -> int:
    """Launch the script; returns an exit code of README's table.

    Raises:
        LaunchError: the command line is wrong, or the script cannot be started.
    """
    options = parse(sys.argv[1:])
    script = Path(options.script)
    if not script.is_file():
        raise LaunchError(f"{script}: no such script")
    in_the_way = script.resolve().parent / "trainer.py"
    if in_the_way.exists():
        raise LaunchError(f"{in_the_way} hides skyspot's package of that name from {script.name}: rename it")
    if options.grace is not None and options.grace < 0:
        raise LaunchError(f"--grace: {options.grace} is less than 0")
    if options.gcp_notice is not None and not options.gcp_notice >= 0:
        raise LaunchError(f"--gcp-notice: {options.gcp_notice} is less than 0")
    if trouble := _limit_without_records(script, options.checkpoint_dir):
        print(f"Error: {trouble}", file=sys.stderr)
        return EXIT_FAILED
    set_gcp_notice(options.gcp_notice)
    return launch(
        [sys.executable, str(script), *options.arguments],
        processes=process_count(options.processes, options.cpu),
        grace_s=default_grace_s() if options.grace is None else options.grace,
        sidecar_dir=Path(options.checkpoint_dir) if options.checkpoint_dir else None,
    )


if __name__ == "__main__":
    leave_with(main)

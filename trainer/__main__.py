"""`python -m trainer`: check the settings, then run trainer.finetune once per accelerator."""

from __future__ import annotations

import sys

from trainer.finetune.config import parse
from trainer.launch.exits import leave_with
from trainer.launch.process_count import process_count
from trainer.launch.supervisor import launch
from trainer.layout.clouds import default_grace_s, set_gcp_notice


def main() -> int:
    """Launch the bundled program; returns an exit code of README's table."""
    arguments = sys.argv[1:]
    config = parse(arguments)
    set_gcp_notice(config.gcp_notice_s)
    return launch(
        [sys.executable, "-m", "trainer.finetune", *arguments],
        processes=process_count(config.processes, config.cpu),
        grace_s=default_grace_s() if config.grace_s is None else config.grace_s,
    )


if __name__ == "__main__":
    leave_with(main)

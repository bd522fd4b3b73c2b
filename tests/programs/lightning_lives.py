"""Attempts of lightning_loop.py, one after the other, as forks of one process: its imports take longer than they do.

python tests/programs/lightning_lives.py '[["--dir", "FOLDER", "--strike", "7:SIGKILL"], ["--dir", "FOLDER"]]'
"""

from trainer import SpotRun  # isort: skip  # noqa: F401

import json
import os
import sys
import traceback

import lightning_loop

if "--report-to" in sys.argv[1]:
    import accelerate.tracking  # noqa: F401
    import torch.utils.tensorboard  # noqa: F401


def attempt(arguments: list[str]) -> None:
    """Become an attempt. Never returns."""
    sys.argv[1:] = arguments
    code = 0
    try:
        lightning_loop.main()
    except SystemExit as error:
        code = error.code if isinstance(error.code, int) else 1
    except BaseException:
        traceback.print_exc()
        code = 1
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)


for arguments in json.loads(sys.argv[1]):
    sys.stdout.flush()
    child = os.fork()
    if not child:
        attempt(arguments)
    code = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
    print(f"\n== ended with {code}", flush=True)

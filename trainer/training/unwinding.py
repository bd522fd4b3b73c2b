"""Unwinding: ends a process of a user's own loop as Python ends it, with the exit code that the attempt has.

`finally` blocks, threads and atexit functions get a few seconds. Then, or after the last atexit function, the process
leaves at once: threads that hang in a dead mount, or the shutdown of a library, must not change the code.
A notebook's process goes on.
"""

from __future__ import annotations

import atexit
import gc
import io
import logging
import os
import sys
import threading
import time
from collections.abc import Callable, Iterable
from contextlib import suppress
from pathlib import PurePath
from typing import NoReturn, cast

from trainer.bucket.retry import MOUNT_GONE
from trainer.errors import TrainerError
from trainer.layout.exit_codes import EXIT_FAILED, EXIT_PREEMPTED

CLOSERS_S = 5.0
"""Seconds for `finally` blocks, other threads and atexit functions."""


class Left(SystemExit):
    """Raised where an attempt has ended, with the exit code; the process ends with it whoever catches this."""


def hosted() -> bool:
    """True if a notebook, an interactive Python or pytest runs this process: it goes on after the attempt."""
    main = sys.modules.get("__main__")
    # Python deletes a script's __file__ before it calls the atexit functions.
    file = getattr(main, "__file__", None) or getattr(getattr(main, "__loader__", None), "path", None)
    if os.environ.get("SKYSPOT_LINK"):
        return False
    return file is None or ("pytest" in sys.modules and PurePath(file).stem in ("pytest", "py.test", "__main__"))


_pending: list[Callable[[Iterable[object]], None]] = []
"""What ends the process, once an attempt has."""


def unwind(code: int, report: Callable[[int], None]) -> NoReturn:
    """Raise `Left`, and have the process end with that code in any case, unless it is `hosted`.

    Args:
        code: The exit code.
        report: Reports the code to the launcher; called at the last moment, because the launcher does not wait longer.
    """
    if hosted():
        raise Left(code)

    def end(others: Iterable[object] = ()) -> None:
        with suppress(Exception):
            logging.shutdown()
        files = open_files(others)
        for stream in (sys.stdout, sys.stderr, *files):
            with suppress(Exception):
                stream.flush()
        report(code)
        os._exit(code)

    def end_in_time() -> None:
        time.sleep(CLOSERS_S)
        end()

    _pending.append(end)
    threading.Thread(target=end_in_time, daemon=True, name="leaving").start()
    raise Left(code)


def open_files(objects: Iterable[object]) -> list[io.IOBase]:
    """Return the open files among these objects.

    isinstance() would ask each object for its `__class__`: torch's deprecated `reduce_op` answers with a warning.
    """
    files = [cast("io.IOBase", one) for one in objects if issubclass(type(one), io.IOBase)]
    return [file for file in files if not file.closed]


def _end_if_left() -> None:
    for end in _pending:
        end(gc.get_objects())  # Python would flush open files when it deletes them.


# atexit calls the functions that were registered first last: this module is imported before torch.
atexit.register(_end_if_left)


def exit_code(error: BaseException) -> int:
    """The exit code of an attempt that an error ended."""
    if isinstance(error, TrainerError):
        return error.code
    return EXIT_PREEMPTED if isinstance(error, OSError) and error.errno in MOUNT_GONE else EXIT_FAILED

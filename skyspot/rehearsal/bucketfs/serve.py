"""The daemon: a pass-through FUSE file system over the folder that stands for a bucket.

It runs inside the machine's namespaces, and dies with them. It says `mounted` on its standard output when the mount is
there. At `finish` on its standard input it uploads what waits, and says `finished`.
"""

from __future__ import annotations

import functools
import json
import os
import signal
import sys
import threading
from pathlib import Path

import mfusepy

from skyspot.rehearsal.bucketfs import loop
from skyspot.rehearsal.bucketfs.files import BucketFS
from skyspot.rehearsal.bucketfs.fuse import Fuse


def main(config: str) -> None:
    """Mount it, and serve until the machine dies."""
    settings = json.loads(Path(config).read_text())
    # SIGTERM is meant for the task, which still saves.
    signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGTERM, signal.SIGINT, signal.SIGHUP})
    served = BucketFS(settings)
    threading.Thread(target=_listen, args=(served,), daemon=True).start()
    options = {"allow_other": True} if os.geteuid() == 0 else {}
    mfusepy.fuse_main_real = functools.partial(loop.main, served)
    Fuse(served, settings["point"], raw_fi=True, default_permissions=True, hard_remove=True, fsname="bucket",
         subtype="skyspot", **options)  # fmt: skip


def _listen(served: BucketFS) -> None:
    for line in sys.stdin:
        if line.strip() == "finish":
            served.finish()
            sys.stdout.write("finished\n")
            sys.stdout.flush()

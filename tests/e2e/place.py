"""Where the lab lies on this machine, and as whom it runs: constants alone, so that everybody may import them."""

from __future__ import annotations

import os
import tempfile
from pathlib import Path

REPO = Path(__file__).resolve().parents[2]
FILES = Path(__file__).resolve().parent / "files"
ROOT = Path(os.environ.get("SKYSPOT_E2E_ROOT") or Path(tempfile.gettempdir()) / "skyspot-e2e").resolve()

SKYPILOT = "0.14.1"
# A user of the lab's own: it has a line in a copy of /etc/passwd that only the lab sees, so its id must be free here.
USER, UID = "spot", 61517
CLUSTER = "lab"
# A node for each job that runs at a time, and some more: an allocation that was taken away takes a while to end.
NODES = tuple(f"labnode{number}" for number in range(1, 13))
SPOT, ON_DEMAND, CLOSING = "spot", "ondemand", "closing"
"""Partitions over the same nodes. The last is there to be set DOWN, without a word to who uses the first."""
HOST = "skyspot-e2e"
"""Slurm's controller and login node, SkyPilot, and the S3 server."""
HOST_IP = "10.99.0.1"
NODE_IPS = {name: f"10.99.0.{10 + index}" for index, name in enumerate(NODES)}

SSH_PORT, SLURMCTLD_PORT, SLURMD_PORT = 12222, 16817, 16818
SKY_URL = "http://127.0.0.1:46580"
S3_PORT, S3_KEY, S3_SECRET = 18333, "labaccess", "labsecret"

UV = ROOT / "uv" / "bin" / "uv"
CLIENT = ROOT / "client"
"""The user's environment: skyspot and SkyPilot, its API server too."""
RUNTIME = ROOT / "runtime"
"""What SkyPilot puts on every node, but for its own wheel."""
NODE = ROOT / "node"
"""The nodes' own Python, with torch."""
RCLONE = ROOT / "rclone"
BIN = ROOT / "bin"
"""On the nodes' PATH: python3, goofys, rclone, sudo."""

# Made anew for each lab.
HOME = ROOT / "home"
"""HOME of the user who types skyspot and sky; the API server's too."""
LOGIN = ROOT / "login"
"""HOME on the Slurm cluster."""
SHARED = ROOT / "shared"
"""A file system that all nodes have."""
NODE_TMP = ROOT / "nodetmp"
S3_DATA = ROOT / "s3data"
MOUNTS = ROOT / "mnt"
"""Where jobs mount buckets: the lab's user may not make folders at the top, as a cloud's user may."""
ETC = ROOT / "etc"
LOG = ROOT / "log"
STATE = ROOT / "state"
FRESH = (HOME, LOGIN, SHARED, NODE_TMP, S3_DATA, MOUNTS, ETC, LOG, STATE)

"""Where memory for a copy of the state is short, a save goes on without it: under a real limit, a control group's."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
from needs import needs_root
from support import clean_env

SAVE = """
import sys
from pathlib import Path
from bench import cgroup
from bench.worker import Saving
from trainer.checkpoint import staging
if sys.argv[2] == "unlooked":
    staging.available_bytes = lambda: 1 << 62
group = cgroup.make("skyspot-test")
if group is None:
    sys.exit("no group")
print(group.folder, flush=True)
saving = Saving("skyspot", Path(sys.argv[1]), 400_000_000, 1, group)
saving.warm(8)
group.limit(200_000_000)
saving.first()
print(saving.printed(), saving.extra_bytes(), flush=True)
"""


@pytest.mark.slow
@pytest.mark.parametrize("looked", [True, False])
def test_a_save_without_memory_for_a_copy_goes_on_without_and_says_so(tmp_path: Path, looked: bool) -> None:
    """And is killed where it does not look at how much memory there is."""
    done = subprocess.run(
        [sys.executable, "-c", SAVE, tmp_path, "looked" if looked else "unlooked"],
        env=clean_env(), capture_output=True, text=True, timeout=150,
    )  # fmt: skip
    if "no group" in done.stderr:
        pytest.skip(needs_root("a save without memory for a copy"))
    folder, *rest = done.stdout.splitlines()
    Path(folder).rmdir()
    saved = list(tmp_path.glob("run/checkpoints/*/MANIFEST.json"))
    if looked:
        assert done.returncode == 0, done.stderr
        assert "Not enough memory to stage 0.4 GB of state; saving synchronously." in rest[0]
        assert int(rest[0].split()[-1]) < 100e6
        assert len(saved) == 1
    else:
        assert done.returncode == -9
        assert not saved

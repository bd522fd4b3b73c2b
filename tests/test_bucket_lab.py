"""The bucket and its mounts that tests stand on: they fail as a machine that is taken, and leave nothing behind."""

import subprocess
import sys
import threading
from collections.abc import Iterator
from pathlib import Path

import bucket_lab
import pytest
from bucket_lab import Store, is_mounted, mounted, until
from support import clean_env

pytestmark = pytest.mark.skipif(bucket_lab.missing() is not None, reason=str(bucket_lab.missing()))


@pytest.fixture(scope="module")
def bucket(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Store]:
    with bucket_lab.store(tmp_path_factory.mktemp("s3")) as serving:
        yield serving


def test_a_killed_mount_has_uploaded_nothing_and_only_its_own_cache_knows_the_file(
    bucket: Store, tmp_path: Path
) -> None:
    with mounted(bucket, tmp_path / "a", "--vfs-write-back", "60s", cached=True) as mount:
        (mount.point / "late").write_bytes(b"1")
        until("its cache has it", lambda: "late: vfs cache: queuing for upload" in mount.log.read_text())
        mount.kill()
        assert not any(mount.point.iterdir())
        assert not (bucket.behind / "late").exists()
    with mounted(bucket, tmp_path / "b", cached=True) as another_machine:
        assert not (another_machine.point / "late").exists()
    with mounted(bucket, tmp_path / "a", "--vfs-write-back", "0.1s", cached=True):
        until("what was left in the cache is uploaded", (bucket.behind / "late").exists)


def test_uploads_are_slow_where_they_should_be(bucket: Store, tmp_path: Path) -> None:
    data = bytes(400_000)
    options = ("--vfs-write-back", "0s", "--bwlimit", "100k", "--buffer-size", "0")
    with mounted(bucket, tmp_path, *options, cached=True) as mount:
        (mount.point / "big").write_bytes(data)
        until("it is being uploaded", lambda: "big: vfs cache: queuing for upload" in mount.log.read_text())
        assert not (bucket.behind / "big").exists()
        until("it is there", lambda: (bucket.behind / "big").exists() and (bucket.behind / "big").read_bytes() == data)


def test_a_frozen_mount_answers_nobody_until_it_is_thawed(bucket: Store, tmp_path: Path) -> None:
    with mounted(bucket, tmp_path) as mount:
        mount.freeze()
        writing = threading.Thread(target=lambda: (mount.point / "frozen").write_bytes(b"1"), daemon=True)
        writing.start()
        writing.join(0.3)
        assert writing.is_alive()
        mount.thaw()
        writing.join(10)
        assert (bucket.behind / "frozen").read_bytes() == b"1"


def test_a_daemon_that_cannot_mount_says_why(bucket: Store, tmp_path: Path) -> None:
    with pytest.raises(AssertionError, match="unknown flag: --nonsense"), mounted(bucket, tmp_path, "--nonsense"):
        pass


@pytest.mark.parametrize("frozen", [False, True])
def test_nothing_is_left_over_when_the_process_that_made_it_is_killed(tmp_path: Path, frozen: bool) -> None:
    program = (
        "import os, sys, time, pathlib\n"
        f"sys.path.insert(0, {str(Path(bucket_lab.__file__).parent)!r})\n"
        "from bucket_lab import mounted, store\n"
        f"folder = pathlib.Path({str(tmp_path)!r})\n"
        "with store(folder / 's3') as store, mounted(store, folder / 'm', cached=True) as mount:\n"
        f"    mount.freeze() if {frozen} else None\n"
        "    print(*pathlib.Path(f'/proc/self/task/{os.getpid()}/children').read_text().split(), flush=True)\n"
        "    time.sleep(60)\n"
    )
    process = subprocess.Popen([sys.executable, "-c", program], stdout=subprocess.PIPE, text=True, env=clean_env())
    assert process.stdout
    children = process.stdout.readline().split()
    point = tmp_path / "m" / "mount"
    assert is_mounted(point)
    assert len(children) == 3  # The server, the daemon, and who waits for the end.
    process.kill()
    process.communicate()
    until("neither is there", lambda: not is_mounted(point) and not any(map(runs, children)))


def runs(pid: str) -> bool:
    """Whether a process is there, and not only its exit code."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except OSError:
        return False

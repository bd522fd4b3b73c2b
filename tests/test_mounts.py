"""What a folder lies on, and what shows that a file is in the store: on real mounts of a real S3 server."""

import socket
import subprocess
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path, PurePath

import bucket_lab
import faultfs
import pytest
from bucket_lab import RCLONE, Mounted, Store, child, end, mounted, until
from needs import NOT_HERE
from support import clean_env

from trainer.bucket import mounts
from trainer.bucket.hashing import hash_file
from trainer.bucket.mounts import Mount, Proof, UploadLog, mount_of

needs_rclone = pytest.mark.skipif(bucket_lab.missing() is not None, reason=str(bucket_lab.missing()))
needs_fuse = pytest.mark.skipif(faultfs.missing() is not None, reason=str(faultfs.missing()))
LATER = ("--vfs-write-back", "60s")


@pytest.fixture(scope="module")
def bucket(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Store]:
    with bucket_lab.store(tmp_path_factory.mktemp("s3")) as serving:
        yield serving


@pytest.fixture(scope="module")
def through(bucket: Store, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Mounted]:
    """A mount without a cache; its path needs quoting in /proc."""
    with mounted(bucket, tmp_path_factory.mktemp("m") / "a folder\\x", "--allow-other") as mount:
        yield mount


@pytest.fixture(scope="module")
def cached(bucket: Store, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Mounted]:
    with mounted(bucket, tmp_path_factory.mktemp("m"), "--allow-other", *LATER, cached=True) as mount:
        yield mount


def refute(bucket: Store, mount: Mounted, name: str) -> str | None:
    """What is wrong with the word that a read-back proves something there; None where that was not said, or is true."""
    path = mount.point / name
    path.write_bytes(b"1234")
    if mount_of(path).proof is not Proof.READ_BACK:
        return None
    assert hash_file(path)
    return None if (bucket.behind / name).exists() else "it reads back, and is not in the store"


def test_a_local_folder_writes_through_also_before_it_is_made(tmp_path: Path) -> None:
    assert mount_of(tmp_path / "not" / "yet").proof is Proof.READ_BACK
    assert mount_of(Path("/")).point == Path("/")


@needs_rclone
def test_rclone_without_a_cache_writes_through(bucket: Store, through: Mounted) -> None:
    found = mount_of(through.point / "run")
    assert (found.point, found.kind, found.proof) == (through.point, "rclone", Proof.READ_BACK)
    assert refute(bucket, through, "through") is None


@needs_rclone
@pytest.mark.parametrize(
    ("options", "env", "proof"),
    [
        (["--vfs-cache-mode=minimal"], {}, Proof.READ_BACK),
        (["--vfs-cache-mode=writes"], {}, Proof.UPLOAD_LOG),
        (["--vfs-cache-mode", "FULL"], {}, Proof.UPLOAD_LOG),
        ([], {"RCLONE_VFS_CACHE_MODE": "full"}, Proof.UPLOAD_LOG),
        (["--vfs-cache-mode", "off", "--vfs-cache-mode", "full", "--use-json-log"], {}, Proof.NOTHING),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else "",
)
def test_rclones_mode_is_found_wherever_it_is_given(
    bucket: Store, tmp_path: Path, options: list[str], env: dict[str, str], proof: Proof
) -> None:
    cache = ("--cache-dir", str(tmp_path / "cache"), *LATER)
    with mounted(bucket, tmp_path / "m", *options, *cache, env=env) as mount:
        assert mount_of(mount.point).proof is proof
        assert refute(bucket, mount, f"{tmp_path.name}-1") is None


@needs_rclone
def test_a_cached_mount_that_is_taken_for_one_that_writes_through_is_found_out(
    bucket: Store, cached: Mounted, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert refute(bucket, cached, "honest") is None
    monkeypatch.setattr(mounts, "WRITE_THROUGH_MODES", ("off", "minimal", "writes", "full"))
    assert refute(bucket, cached, "planted") == "it reads back, and is not in the store"


@pytest.mark.slow
@needs_rclone
@pytest.mark.parametrize("prefix", ["", "team/x"])
def test_with_a_cache_the_log_knows_what_is_in_the_store(bucket: Store, tmp_path: Path, prefix: str) -> None:
    (bucket.behind / prefix).mkdir(parents=True, exist_ok=True)
    with mounted(bucket, tmp_path, "--vfs-write-back", "4s", cached=True, prefix=prefix) as mount:
        found = mount_of(mount.point)
        assert (found.kind, found.proof, found.log) == ("rclone with a cache", Proof.UPLOAD_LOG, mount.log)
        log = UploadLog(mount.log)
        (mount.point / "ein Läufer").mkdir()
        (tmp_path / "link").symlink_to(mount.point)
        path = tmp_path / "link" / "ein Läufer" / "late: one"
        path.write_bytes(b"2")
        inside = found.inside(path)
        assert inside == PurePath("ein Läufer/late: one")  # Of the mount, whatever folder of the bucket that is.
        behind = bucket.behind / prefix / inside
        assert hash_file(path)  # The read-back passes ...
        assert not log.has(inside)
        assert not behind.exists()  # ... and proves nothing.
        until("the log knows of the upload", lambda: log.has(inside))
        assert behind.read_bytes() == b"2"
        path.write_bytes(b"3")
        until("it is to be uploaded again", lambda: not log.has(inside))
        until("the log knows of that", lambda: log.has(inside))
        assert behind.read_bytes() == b"3"


@needs_rclone
@pytest.mark.parametrize("log_level", [None, "NOTICE"])
def test_with_a_cache_and_without_a_log_that_tells_nothing_shows_it(
    bucket: Store, tmp_path: Path, log_level: str | None
) -> None:
    with mounted(bucket, tmp_path, cached=True, log_level=log_level) as mount:
        assert mount_of(mount.point) == Mount(mount.point, "rclone with a cache", Proof.NOTHING)


@needs_rclone
def test_the_mount_is_found_by_way_of_links_and_below_what_hides_it(cached: Mounted, tmp_path: Path) -> None:
    (tmp_path / "over").symlink_to(tmp_path / "there")
    (tmp_path / "there").symlink_to(cached.point)
    assert mount_of(tmp_path / "over" / "run").proof is Proof.UPLOAD_LOG
    assert mount_of(tmp_path / "over" / ".." / "run").proof is Proof.READ_BACK  # Beside the mount point.
    (tmp_path / "in-a-ring").symlink_to(tmp_path / "in-a-ring")
    assert mount_of(tmp_path / "in-a-ring").proof is Proof.READ_BACK
    with mounted_over(cached.point.parent):
        assert (mount_of(cached.point).kind, mount_of(cached.point).proof) == ("tmpfs", Proof.READ_BACK)
    assert mount_of(cached.point).proof is Proof.UPLOAD_LOG
    with mounted_over(cached.point):
        assert (mount_of(cached.point).kind, mount_of(cached.point).proof) == ("tmpfs", Proof.READ_BACK)


@contextmanager
def mounted_over(folder: Path) -> Iterator[None]:
    subprocess.run(["mount", "-t", "tmpfs", "tmpfs", str(folder)], check=True)
    try:
        yield
    finally:
        subprocess.run(["umount", str(folder)], check=True)


@needs_rclone
def test_a_frozen_mount_keeps_nobody_waiting(cached: Mounted) -> None:
    (cached.point / "folder").mkdir()
    cached.freeze()
    try:
        found: list[Mount] = []
        asking = threading.Thread(target=lambda: found.append(mount_of(cached.point / "new" / "run")), daemon=True)
        asking.start()
        asking.join(10)
        assert [mount.proof for mount in found] == [Proof.UPLOAD_LOG]
        assert found[0].inside(cached.point / "new" / "run") == PurePath("new/run")
        touching = threading.Thread(target=lambda: (cached.point / "new" / "run").resolve(), daemon=True)
        touching.start()
        touching.join(0.3)
        assert touching.is_alive()  # As whoever touches it has to.
    finally:
        cached.thaw()


@needs_rclone
def test_a_process_that_only_names_the_mount_point_is_not_its_daemon(cached: Mounted, tmp_path: Path) -> None:
    beside = child(RCLONE, "serve", "http", cached.point, "--addr", "127.0.0.1:0", log=tmp_path / "log")
    try:
        until("it runs", lambda: "127.0.0.1:" in (tmp_path / "log").read_text())
        assert mount_of(cached.point).proof is Proof.UPLOAD_LOG
    finally:
        end(beside)


@needs_rclone
def test_of_two_daemons_that_differ_none_is_believed(cached: Mounted, tmp_path: Path) -> None:
    """One of them waits for a store that does not answer, and mounts there later, or never."""
    store = socket.create_server(("127.0.0.1", 0))
    url = f"http://127.0.0.1:{store.getsockname()[1]}"
    other = child(RCLONE, "mount", ":http:", cached.point, "--http-url", url, log=tmp_path / "log")
    try:
        until("it is there", lambda: Path(f"/proc/{other.pid}/comm").read_text() == "rclone\n" or other.poll())
        other.send_signal(19)
        assert other.poll() is None
        assert mount_of(cached.point) == Mount(cached.point, "fuse.rclone", Proof.NOTHING)
    finally:
        end(other)
        store.close()


def as_seen_by(*command: str, path: Path) -> str:
    """What `mount_of` says in a process that is started by way of a command."""
    program = "import sys, pathlib, trainer.bucket.mounts as m; print(m.mount_of(pathlib.Path(sys.argv[1])).proof.name)"
    done = subprocess.run(
        [*command, sys.executable, "-c", program, str(path)],
        capture_output=True,
        text=True,
        check=True,
        env=clean_env(),
    )
    return done.stdout.strip()


@needs_rclone
def test_a_daemon_that_cannot_be_seen_proves_nothing(through: Mounted, cached: Mounted) -> None:
    elsewhere = ("unshare", "--pid", "--fork", "--mount-proc")
    assert as_seen_by(path=through.point) == "READ_BACK"
    assert as_seen_by(*elsewhere, path=through.point) == "NOTHING"
    assert as_seen_by(*elsewhere, path=cached.point) == "NOTHING"


@needs_rclone
def test_a_daemon_whose_environment_cannot_be_read_counts_by_its_arguments(
    through: Mounted, bucket: Store, tmp_path_factory: pytest.TempPathFactory
) -> None:
    """It may have been told in RCLONE_VFS_CACHE_MODE to cache."""
    nobody = ("setpriv", "--reuid", "65534", "--clear-groups")
    if subprocess.run([*nobody, sys.executable, "-c", ""], capture_output=True).returncode:
        pytest.skip(f"a daemon of another user's: {NOT_HERE}: this Python is root's alone")
    assert as_seen_by(*nobody, path=through.point) == "NOTHING"
    folder = tmp_path_factory.mktemp("m")
    with mounted(bucket, folder, "--allow-other", "--vfs-cache-mode", "off") as mount:
        assert as_seen_by(*nobody, path=mount.point) == "READ_BACK"


@needs_fuse
@pytest.mark.parametrize(
    ("name", "arguments", "proof"),
    [
        ("goofys", ["-o", "allow_other"], Proof.READ_BACK),
        ("goofys", ["--cache", "/tmp/catfs"], Proof.NOTHING),
        ("gcsfuse", ["--implicit-dirs"], Proof.READ_BACK),
        ("blobfuse2", ["--no-symlinks", "--container-name", "c"], Proof.READ_BACK),
        ("blobfuse2", ["--lazy-write"], Proof.NOTHING),
        ("blobfuse2", ["--config-file=a.yaml"], Proof.NOTHING),
        ("mount-s3", [], Proof.READ_BACK),
        ("s3fs", [], Proof.NOTHING),
        ("", [], Proof.NOTHING),
    ],
)
def test_a_daemon_is_known_by_its_name_and_arguments(
    tmp_path: Path, name: str, arguments: list[str], proof: Proof
) -> None:
    (tmp_path / "behind").mkdir()
    with faultfs.mounted(tmp_path / "behind", tmp_path / "m", *arguments, name=name) as mount:
        found = mount_of(mount.point / "run")
        assert (found.point, found.proof) == (mount.point, proof)
        assert found.kind == (name if name in mounts.WRITE_THROUGH else "fuse" if name else "fuse.faultfs")


@needs_fuse
def test_a_mount_that_says_what_it_is_is_not_taken_for_another(tmp_path: Path) -> None:
    (tmp_path / "behind").mkdir()
    with faultfs.mounted(tmp_path / "behind", tmp_path / "m") as mount, process(tmp_path, "goofys", "b", mount.point):
        assert mount_of(mount.point) == Mount(mount.point, "fuse.faultfs", Proof.NOTHING)


@needs_fuse
@pytest.mark.parametrize(("daemon", "proof"), [("blobfuse2", Proof.READ_BACK), ("else", Proof.NOTHING)])
def test_a_daemon_behind_skypilots_wrapper_is_known_by_what_the_wrapper_started(
    tmp_path: Path, daemon: str, proof: Proof
) -> None:
    """On Kubernetes the daemon is given an open file instead of the mount point."""
    (tmp_path / "behind").mkdir()
    with faultfs.mounted(tmp_path / "behind", tmp_path / "m", name="unknown") as mount:
        assert mount_of(mount.point).proof is Proof.NOTHING
        with process(tmp_path, mounts.WRAPPER, "-d", "-m", mount.point, "--", daemon, "--foreground", "{}"):
            assert mount_of(mount.point).proof is proof


@contextmanager
def process(folder: Path, name: str, *arguments: object) -> Iterator[None]:
    """A process of a name that does nothing, whatever its arguments are."""
    (folder / name).symlink_to(sys.executable)
    log = folder / "process.log"
    running = child(folder / name, "-c", "import time; print(1, flush=True); time.sleep(60)", *arguments, log=log)
    try:
        until("it runs", log.read_text)
        yield
    finally:
        end(running)


def line(name: str, word: str = "upload succeeded try #1", before: str = "2026/11/25 19:31:56 INFO  ") -> bytes:
    return f"{before}: {name}: vfs cache: {word}\n".encode()


def test_the_log_may_be_cut_off_or_begun_anew_while_it_is_read(tmp_path: Path) -> None:
    path = tmp_path / "log"
    path.write_bytes(line("a/b.txt")[:-5])
    log = UploadLog(path)
    assert not log.has("a/b.txt")
    with path.open("ab") as file:
        file.write(line("a/b.txt")[-5:])
    assert log.has(PurePath("a/b.txt"))
    path.write_bytes(line("a/c.txt")[:40])
    assert not log.has("a/c.txt")
    path.write_bytes(line("a/c.txt")[:30])
    path.write_bytes(line("e")[:20])
    assert not log.has("e")
    with path.open("ab") as file:
        file.write(line("e")[20:])
    assert log.has("e")
    path.write_bytes(line("a/d.txt", "failed to upload try #1, will retry in 10s", "2026/11/25 19:31:56 ERROR "))
    assert not log.has("a/d.txt")


def test_what_was_added_before_the_log_was_moved_away_is_read(tmp_path: Path) -> None:
    path = tmp_path / "log"
    path.write_bytes(line("1"))
    log = UploadLog(path)
    assert log.has("1")
    with path.open("ab") as file:
        file.write(line("2"))
    path.rename(tmp_path / "log.1")
    path.write_bytes(line("3") + line("4") + line("5"))  # It is longer than the one before was when it was read.
    assert all(log.has(name) for name in ("1", "2", "3", "4", "5"))


@pytest.mark.parametrize(
    "before", ["", "INFO  ", "2026/11/25 20:21:12.349416 vfscache/item.go:832: [20694] INFO  ", "2026/11/25 INFO "]
)
def test_the_logs_lines_may_begin_otherwise(tmp_path: Path, before: str) -> None:
    (tmp_path / "log").write_bytes(line("a: b", before=before))
    assert UploadLog(tmp_path / "log").has("a: b") == bool(before)


def test_a_log_that_is_gone_is_said(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError):
        UploadLog(tmp_path / "log").has("a")

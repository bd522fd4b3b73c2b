"""What a folder lies on, and what shows that a file is in the store: on real mounts of a real S3 server."""

from collections.abc import Iterator
from pathlib import Path, PurePath

import bucket_lab
import pytest
from bucket_lab import Store, mounted, until

from trainer.hashing import hash_file
from trainer.mounts import Proof, UploadLog, mount_of

needs_fuse = pytest.mark.skipif(bucket_lab.missing() is not None, reason=str(bucket_lab.missing()))


@pytest.fixture(scope="module")
def bucket(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Store]:
    with bucket_lab.store(tmp_path_factory.mktemp("s3")) as serving:
        yield serving


def test_a_local_folder_writes_through_also_before_it_is_made(tmp_path: Path) -> None:
    assert mount_of(tmp_path / "not" / "yet").proof is Proof.READ_BACK


@needs_fuse
def test_rclone_without_a_cache_writes_through(bucket: Store, tmp_path: Path) -> None:
    with mounted(bucket, tmp_path) as mount:
        found = mount_of(mount.point / "run")
        assert (found.point, found.kind, found.proof) == (mount.point, "rclone", Proof.READ_BACK)
        (mount.point / "through").write_bytes(b"1")
        assert (bucket.behind / "through").read_bytes() == b"1"


@needs_fuse
def test_with_a_cache_a_file_reads_back_long_before_it_is_in_the_store_and_the_log_knows(
    bucket: Store, tmp_path: Path
) -> None:
    with mounted(bucket, tmp_path, "--vfs-write-back", "1.5s", cached=True) as mount:
        found = mount_of(mount.point)
        assert found.proof is Proof.UPLOAD_LOG
        assert found.log == mount.log
        log = UploadLog(found.log)
        (mount.point / "a folder").mkdir()
        path = mount.point / "a folder" / "late: one"
        path.write_bytes(b"2")
        inside = PurePath("a folder") / "late: one"
        behind = bucket.behind / inside
        assert hash_file(path)  # The read-back passes ...
        assert not behind.exists()  # ... and proves nothing.
        assert not log.has(inside)
        until("the log knows of the upload", lambda: log.has(inside))
        assert behind.read_bytes() == b"2"
        path.write_bytes(b"3")
        until("it is to be uploaded again", lambda: not log.has(inside))
        until("the log knows of that", lambda: log.has(inside))
        assert behind.read_bytes() == b"3"


@needs_fuse
def test_with_a_cache_and_a_log_that_is_silent_nothing_shows_it(bucket: Store, tmp_path: Path) -> None:
    with mounted(bucket, tmp_path, cached=True, log_level="NOTICE") as mount:
        assert mount_of(mount.point).proof is Proof.NOTHING


def test_the_log_may_be_cut_off_or_begun_anew_while_it_is_read(tmp_path: Path) -> None:
    path = tmp_path / "log"
    line = b"2026/11/25 19:31:56 INFO  : a/b.txt: vfs cache: upload succeeded try #1\n"
    path.write_bytes(line[:-5])
    log = UploadLog(path)
    assert not log.has(PurePath("a/b.txt"))
    with path.open("ab") as file:
        file.write(line[-5:])
    assert log.has(PurePath("a/b.txt"))
    path.write_bytes(line.replace(b"b.txt", b"c.txt")[:70])
    assert not log.has(PurePath("a/c.txt"))
    path.write_bytes(b"2026/11/25 19:31:56 ERROR : a/d.txt: vfs cache: failed to upload try #1, will retry in 10s\n")
    assert not log.has(PurePath("a/d.txt"))

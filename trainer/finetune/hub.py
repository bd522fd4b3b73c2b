"""Files of the Hugging Face Hub on local disk, at a known commit; the Hub is asked again for a while, like a bucket."""

from __future__ import annotations

import errno
import glob
import json
import re
import threading
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, TypeVar

from trainer.bucket.retry import REFUSED, pause
from trainer.errors import AttemptError
from trainer.layout.exit_codes import EXIT_FAILED, EXIT_PREEMPTED
from trainer.machine import scratch

RETRY_S = 600.0
FIRST_PAUSE_S = 1.0
LONGEST_PAUSE_S = 30.0
_LARGE_REPOSITORY = 1000
"""With more files, the Hub's first answer may not name all of them."""
_T = TypeVar("_T")


class HubError(AttemptError):
    """Files of the Hub cannot be had; the attempt ends with `code`."""


def download(
    name: str,
    *,
    kind: str,
    option: str,
    wanted: Callable[[list[str]], list[str]],
    revision: str | None,
    check_stop: Callable[[], None],
    enough: Callable[[Path], bool] = lambda folder: False,
) -> Path:
    """A folder with the wanted files of a repository; its name is the commit's hash.

    Args:
        name: The repository, ORGANIZATION/NAME.
        kind: `model` or `dataset`.
        option: The option that names it, for messages.
        wanted: Which of all its files.
        revision: A commit; None for the newest.
        check_stop: Called at least every 0.1 s; raises to stop.
        enough: Whether a folder of an earlier download has all that is needed, should the Hub not answer.

    Raises:
        HubError: there is no such repository or no access to it (exit code 1), or the Hub did not answer for ten
            minutes (75).
    """
    from huggingface_hub import HfApi, snapshot_download
    from huggingface_hub.errors import OfflineModeIsEnabled

    cache = _cache()

    def local() -> Path:
        return Path(snapshot_download(name, repo_type=kind, revision=revision, cache_dir=cache, local_files_only=True))

    def work() -> Path:
        api = HfApi()
        try:
            info = api.repo_info(name, repo_type=kind, revision=revision)
        except OfflineModeIsEnabled:
            return local()
        files = [file.rfilename for file in info.siblings or []]
        if not files or len(files) > _LARGE_REPOSITORY:
            files = api.list_repo_files(name, repo_type=kind, revision=info.sha)
        names = wanted(files)
        patterns = [glob.escape(file) for file in names]
        folder = Path(
            snapshot_download(name, repo_type=kind, revision=info.sha, cache_dir=cache, allow_patterns=patterns)
        )
        # Where the Hub stops answering half-way, the call returns what is there.
        if missing := [file for file in names if not (folder / file).exists()]:
            raise TimeoutError(f"{len(missing)} of {len(names)} files were not downloaded")
        return folder

    def work_or_cache() -> Path:
        try:
            return work()
        except Exception as error:
            if revision and _why_not(error, name, revision) is None:
                try:
                    folder = local()
                except Exception:
                    raise error from None
                if enough(folder):
                    return folder
            raise

    return ask(work_or_cache, name, option, revision, check_stop)


def ask(work: Callable[[], _T], name: str, option: str, revision: str | None, check_stop: Callable[[], None]) -> _T:
    """Do something that asks the Hub, again and again for ten minutes while that does not answer.

    Raises:
        HubError: as of `download`.
    """
    end, wait_s, said = time.monotonic() + RETRY_S, FIRST_PAUSE_S, False
    while True:
        try:
            return in_thread(work, check_stop)
        except Exception as error:
            if isinstance(error, OSError) and error.errno in scratch.FULL:
                raise scratch.full(Path(_cache()), error.strerror) from None
            if reason := _why_not(error, name, revision):
                raise HubError(f"{option} {name}: {reason}", EXIT_FAILED) from None
            if time.monotonic() > end:
                raise HubError(
                    f"{option} {name}: the Hugging Face Hub has not answered for {RETRY_S / 60:.0f} minutes "
                    f"({_first_line(error)}). Nothing that was committed is lost",
                    EXIT_PREEMPTED,
                ) from None
            if not said:
                said = True
                print(
                    f"{option} {name}: the Hugging Face Hub does not answer ({_first_line(error)}); "
                    f"retrying for up to {RETRY_S / 60:.0f} minutes",
                    flush=True,
                )
        pause(min(wait_s, max(0.0, end - time.monotonic()) + 0.1), check_stop)
        wait_s = min(LONGEST_PAUSE_S, 2 * wait_s)


def in_thread(work: Callable[[], _T], check_stop: Callable[[], None]) -> _T:
    """Do something that may take long, and hear of a stop meanwhile; a stop leaves it behind."""
    done: list[_T] = []
    failed: list[BaseException] = []
    finished = threading.Event()

    def target() -> None:
        try:
            done.append(work())
        except BaseException as error:
            failed.append(error)
        finally:
            finished.set()

    threading.Thread(target=target, daemon=True, name="hub").start()
    while not finished.wait(0.1):
        check_stop()
    if failed:
        raise failed[0]
    return done[0]


def _cache() -> str:
    """The Hub's cache on this machine."""
    from huggingface_hub import constants

    return str(constants.HF_HUB_CACHE)


def _why_not(error: BaseException, name: str, revision: str | None) -> str | None:
    """Why asking again would not help, as a sentence; None where it may."""
    from huggingface_hub import constants, errors

    chain: list[BaseException] = []
    while error and error not in chain:
        chain.append(error)
        error = error.__cause__  # type: ignore[assignment]
    for link in chain:
        if isinstance(link, errors.GatedRepoError):
            return (
                f"access is gated. Accept its terms at {constants.ENDPOINT}/{name} and pass a token (--secret HF_TOKEN)"
            )
        if isinstance(link, errors.RevisionNotFoundError):
            began = f"commit {revision}, which this run began with, is no longer" if revision else "no commit is"
            return f"{began} on the Hugging Face Hub"
        status = getattr(getattr(link, "response", None), "status_code", None)
        if isinstance(link, errors.RepositoryNotFoundError) or status == 401:
            return (
                "not found here or on the Hugging Face Hub. Check the name; a private one needs a token "
                "(--secret HF_TOKEN)"
            )
        if isinstance(link, (errors.OfflineModeIsEnabled, errors.LocalEntryNotFoundError)) and _is_offline(constants):
            return f"not in the cache {_cache()}, and HF_HUB_OFFLINE forbids downloads"
        if isinstance(link, (errors.HFValidationError, errors.DisabledRepoError)):
            return f"the Hugging Face Hub refuses it ({_first_line(link)})"
        if isinstance(status, int) and 400 <= status < 500 and status not in (408, 425, 429):
            return f"the Hugging Face Hub refuses it ({_first_line(link)})"
        if isinstance(link, OSError) and link.errno in REFUSED | {errno.ENOTDIR}:
            return f"cannot be stored: {link.filename or _cache()}: {link.strerror}. Set HF_HOME to another folder"
    return None if any(map(_is_of_the_network, chain)) else f"cannot be downloaded ({_first_line(chain[0])})"


def _is_of_the_network(error: BaseException) -> bool:
    module = type(error).__module__.partition(".")[0]
    # hf_xet raises plain RuntimeErrors for whatever happens to a transfer.
    return isinstance(error, OSError) or type(error) is RuntimeError or module in ("httpx", "httpcore", "requests")


def _is_offline(constants: Any) -> bool:
    return bool(constants.is_offline_mode())


def _first_line(error: BaseException) -> str:
    text = str(error).strip().splitlines()
    return text[0] if text else type(error).__name__


def model_files(names: Sequence[str]) -> list[str]:
    """Which of a repository's files `from_pretrained` reads: configuration, tokenizer, and one format of weights."""
    top = [name for name in names if "/" not in name]
    small = [name for name in top if name.endswith((".json", ".txt", ".model", ".jinja", ".tiktoken", ".vocab"))]
    for pattern in (
        r"(model|adapter_model)(-\d+-of-\d+)?\.safetensors",
        r"pytorch_model(-\d+-of-\d+)?\.bin",
        r".*\.safetensors",
    ):
        if weights := [name for name in top if re.fullmatch(pattern, name)]:
            return small + weights
    return small


def has_model(folder: Path) -> bool:
    """Whether a folder has a configuration and all files of the weights."""
    if not (folder / "config.json").exists():
        return False
    for index in ("model.safetensors.index.json", "pytorch_model.bin.index.json"):
        if (folder / index).exists():
            try:
                shards = set(json.loads((folder / index).read_text())["weight_map"].values())
                return all((folder / shard).exists() for shard in shards)
            except (ValueError, KeyError, TypeError, AttributeError):  # It was cut.
                return False
    return any((folder / name).exists() for name in ("model.safetensors", "pytorch_model.bin"))

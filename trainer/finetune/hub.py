"""Downloads from the Hugging Face Hub, at a known commit; they are retried while the Hub does not answer."""

from __future__ import annotations

import errno
import glob
import json
import re
import threading
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

from trainer.bucket.retry import REFUSED, pauses, retry_loop
from trainer.errors import AttemptError, first_line
from trainer.layout.exit_codes import EXIT_FAILED, EXIT_PREEMPTED
from trainer.machine import scratch

RETRY_S = 600.0
FIRST_PAUSE_S = 1.0
LONGEST_PAUSE_S = 30.0
_LARGE_REPOSITORY = 1000
"""With more files, the Hub's first answer may not name all of them."""
_T = TypeVar("_T")


class HubError(AttemptError):
    """Files of the Hub are not available; the attempt ends with `code`."""


@dataclass(frozen=True)
class Repository:
    """A repository of the Hub, at a commit."""

    name: str
    """ORGANIZATION/NAME"""
    kind: str
    """`model` or `dataset`"""
    revision: str | None
    """The commit; None for the newest."""

    @property
    def title(self) -> str:
        """Its option and name, for messages."""
        return f"{'--model' if self.kind == 'model' else '--data'} {self.name}"

    def download(self, choose: Callable[[list[str]], list[str]]) -> Path:
        """The folder with the chosen files; its name is the commit's hash."""
        from huggingface_hub import HfApi, snapshot_download
        from huggingface_hub.errors import OfflineModeIsEnabled

        api = HfApi()
        try:
            info: Any = api.repo_info(self.name, repo_type=self.kind, revision=self.revision)
        except OfflineModeIsEnabled:
            return self.cached()
        files = [file.rfilename for file in info.siblings or []]
        if not files or len(files) > _LARGE_REPOSITORY:
            files = api.list_repo_files(self.name, repo_type=self.kind, revision=info.sha)
        chosen = choose(files)
        patterns = [glob.escape(file) for file in chosen]
        folder = Path(
            snapshot_download(
                self.name, repo_type=self.kind, revision=info.sha, cache_dir=_cache(), allow_patterns=patterns
            )
        )
        # If the Hub stops answering half-way, snapshot_download returns an incomplete folder.
        if missing := [file for file in chosen if not (folder / file).exists()]:
            raise TimeoutError(f"{len(missing)} of {len(chosen)} files were not downloaded")
        return folder

    def cached(self) -> Path:
        """The folder of an earlier download, without asking the Hub."""
        from huggingface_hub import snapshot_download

        folder = snapshot_download(
            self.name, repo_type=self.kind, revision=self.revision, cache_dir=_cache(), local_files_only=True
        )
        return Path(folder)


def download(
    repository: Repository,
    *,
    choose: Callable[[list[str]], list[str]],
    check_stop: Callable[[], None],
    is_complete: Callable[[Path], bool] = lambda folder: False,
) -> Path:
    """Download files of a repository into a folder; its name is the commit's hash.

    Args:
        repository: What to download from.
        choose: Selects the files by their names.
        check_stop: Called at least every 0.1 s; raises to stop.
        is_complete: True if the folder of an earlier download will do when the Hub does not answer.

    Raises:
        HubError: there is no such repository or no access to it (exit code 1), or the Hub did not answer for ten
            minutes (75).
    """

    def download_or_cached() -> Path:
        try:
            return repository.download(choose)
        except Exception as error:
            if repository.revision and _reason_to_give_up(error, repository) is None:
                try:
                    folder = repository.cached()
                except Exception:
                    raise error from None
                if is_complete(folder):
                    return folder
            raise

    return _retry(download_or_cached, repository, check_stop)


def _retry(work: Callable[[], _T], repository: Repository, check_stop: Callable[[], None]) -> _T:
    """Do something that needs the Hub; retry for ten minutes while the Hub does not answer."""
    minutes = f"{RETRY_S / 60:.0f} minutes"

    def final_error(error: Exception, no_try_left: bool) -> Exception | None:
        if isinstance(error, OSError) and error.errno in scratch.FULL:
            return scratch.full(Path(_cache()), error.strerror)
        if reason := _reason_to_give_up(error, repository):
            return HubError(f"{repository.title}: {reason}", EXIT_FAILED)
        if not no_try_left:
            return None
        return HubError(
            f"{repository.title}: the Hugging Face Hub has not answered for {minutes} ({first_line(error)}). "
            "No committed step is lost",
            EXIT_PREEMPTED,
        )

    def announce(error: Exception) -> None:
        reason = f"the Hugging Face Hub does not answer ({first_line(error)})"
        print(f"{repository.title}: {reason}; retrying for up to {minutes}", flush=True)

    times = pauses(RETRY_S, FIRST_PAUSE_S, LONGEST_PAUSE_S)
    return retry_loop(lambda: in_thread(work, check_stop), final_error, times, check_stop, announce)


def in_thread(work: Callable[[], _T], check_stop: Callable[[], None]) -> _T:
    """Do something slow in a thread and check for a stop meanwhile; a stop abandons the thread."""
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


def _reason_to_give_up(error: BaseException, repository: Repository) -> str | None:
    """The reason why a retry would not help, as a sentence; None if it may help."""
    from huggingface_hub import constants, errors

    chain: list[BaseException] = []
    while error and error not in chain:
        chain.append(error)
        error = error.__cause__  # type: ignore[assignment]
    for link in chain:
        if isinstance(link, errors.GatedRepoError):
            terms = f"{constants.ENDPOINT}/{repository.name}"
            return f"access is gated. Accept the terms at {terms} and pass a token (--secret HF_TOKEN)"
        if isinstance(link, errors.RevisionNotFoundError):
            revision = repository.revision
            missing = f"commit {revision}, which this run began with, is no longer" if revision else "no commit is"
            return f"{missing} on the Hugging Face Hub"
        status = getattr(getattr(link, "response", None), "status_code", None)
        if isinstance(link, errors.RepositoryNotFoundError) or status == 401:
            return (
                "not found here or on the Hugging Face Hub. Check the name; a private one needs a token "
                "(--secret HF_TOKEN)"
            )
        if isinstance(link, (errors.OfflineModeIsEnabled, errors.LocalEntryNotFoundError)) and _is_offline(constants):
            return f"not in the cache {_cache()}, and HF_HUB_OFFLINE forbids downloads"
        is_refused = isinstance(status, int) and 400 <= status < 500 and status not in (408, 425, 429)
        if is_refused or isinstance(link, (errors.HFValidationError, errors.DisabledRepoError)):
            return f"the Hugging Face Hub refuses it ({first_line(link)})"
        if isinstance(link, OSError) and link.errno in REFUSED | {errno.ENOTDIR}:
            return f"cannot be stored: {link.filename or _cache()}: {link.strerror}. Set HF_HOME to another folder"
    return None if any(map(_is_network_error, chain)) else f"cannot be downloaded ({first_line(chain[0])})"


def _is_network_error(error: BaseException) -> bool:
    module = type(error).__module__.partition(".")[0]
    # hf_xet raises a plain RuntimeError for any failure of a transfer.
    return isinstance(error, OSError) or type(error) is RuntimeError or module in ("httpx", "httpcore", "requests")


def _is_offline(constants: Any) -> bool:
    return bool(constants.is_offline_mode())


def model_files(names: Sequence[str]) -> list[str]:
    """The files that `from_pretrained` reads: configuration, tokenizer, and one format of weights."""
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
    """True if a folder has a configuration, a tokenizer's vocabulary and all files of the weights."""
    if not (folder / "config.json").exists() or not _has_vocabulary(folder):
        return False
    for index in ("model.safetensors.index.json", "pytorch_model.bin.index.json"):
        if (folder / index).exists():
            try:
                shards = set(json.loads((folder / index).read_text())["weight_map"].values())
                return all((folder / shard).exists() for shard in shards)
            except (ValueError, KeyError, TypeError, AttributeError):  # The file was cut off.
                return False
    return any((folder / name).exists() for name in ("model.safetensors", "pytorch_model.bin"))


def _has_vocabulary(folder: Path) -> bool:
    names = {path.name for path in folder.iterdir()}
    return (
        bool(names & {"tokenizer.json", "vocab.txt"})
        or names >= {"vocab.json", "merges.txt"}
        or any(name.endswith((".model", ".tiktoken", ".vocab")) for name in names)
    )

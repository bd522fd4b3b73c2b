"""Models and data sets of the Hugging Face Hub, on loopback: pinned to a commit, retried, errors in one line."""

import json
import os
import signal
import subprocess
import sys
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest
from hub_server import HubServer
from support import clean_env, train

from trainer.finetune import data, hub, model
from trainer.finetune.model import ModelError
from trainer.finetune.sources import DataError
from trainer.layout.events import read_events
from trainer.layout.exit_codes import EXIT_FAILED, EXIT_PREEMPTED
from trainer.layout.names import RunPaths, list_attempts

OLD, NEW = "0" * 39 + "1", "0" * 39 + "2"
NET = {
    OLD: {"config.json": b'{"old": 1}', "model.safetensors": b"weights", "tokenizer.json": b"{}",
          "onnx/model.onnx": b"x", "model.fp16.safetensors": b"x", "pytorch_model.bin": b"x", "README.md": b"x"},
    NEW: {"config.json": b'{"new": 1}', "model.safetensors": b"weights", "tokenizer.json": b"{}"},
}  # fmt: skip
TEXTS = {OLD: {"part/one.TXT": b"the first text " * 400, "two.jsonl": b'{"text": "more"}\n' * 50, "x.bin": b"\0"}}


def nothing() -> None:
    pass


@pytest.fixture
def server(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[HubServer]:
    from huggingface_hub import constants

    with HubServer({"models/org/net": NET, "datasets/somebody/some-set": TEXTS}).serving() as server:
        template = constants.HUGGINGFACE_CO_URL_TEMPLATE.removeprefix(constants.ENDPOINT)
        monkeypatch.setattr(constants, "HUGGINGFACE_CO_URL_TEMPLATE", server.url + template)
        monkeypatch.setattr(constants, "ENDPOINT", server.url)
        monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "cache"))
        monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
        monkeypatch.setattr(hub, "FIRST_PAUSE_S", 0.02)
        monkeypatch.setattr(hub, "LONGEST_PAUSE_S", 0.02)
        yield server


def names(folder: str | Path | None) -> list[str]:
    assert folder
    return sorted(path.relative_to(folder).as_posix() for path in Path(folder).rglob("*") if path.is_file())


def test_a_model_is_known_by_its_commit(server: HubServer) -> None:
    newest = model.find_model("org/net", None)
    assert newest.revision == NEW
    began = model.find_model("org/net", OLD)
    assert began.revision == OLD
    assert names(began.folder) == ["config.json", "model.safetensors", "tokenizer.json"]
    assert Path(str(began.folder), "config.json").read_text() == '{"old": 1}'


def test_a_data_set_is_known_by_its_commit(server: HubServer) -> None:
    folder, source = data.download("somebody/some-set", None, nothing)
    assert source.ignored == {".bin": 1}
    assert (folder.name, names(folder)) == (OLD, ["part/one.TXT", "two.jsonl"])


@pytest.mark.parametrize(
    ("where", "status"), [("/api/", 500), ("/api/", 503), ("/api/", 429), ("/resolve/", 408), ("model.safe", 408)]
)
def test_a_hub_that_does_not_answer_is_asked_again(
    server: HubServer, capsys: pytest.CaptureFixture[str], where: str, status: int
) -> None:
    server.fail, server.fail_for = [(status, "")] * 3 + [(0, "")], where
    assert names(model.find_model("org/net", None).folder) == ["config.json", "model.safetensors", "tokenizer.json"]
    assert capsys.readouterr().out.count("retrying for up to 10 minutes") == 1


def test_a_hub_that_never_answers_is_75_in_the_end(server: HubServer, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(hub, "RETRY_S", 0.3)
    from huggingface_hub import constants

    monkeypatch.setattr(constants, "ENDPOINT", "http://127.0.0.1:9")
    with pytest.raises(hub.HubError, match="--data somebody/some-set: the Hugging Face Hub has not answered") as ended:
        data.download("somebody/some-set", None, nothing)
    assert ended.value.code == EXIT_PREEMPTED
    assert len(str(ended.value).splitlines()) == 1


def test_a_stop_is_heard_while_the_hub_does_not_answer(server: HubServer) -> None:
    class StopNow(Exception):
        pass

    asked = threading.Event()

    def check_stop() -> None:
        if server.asked:
            asked.set()
            raise StopNow

    server.fail = [(503, "")]
    with pytest.raises(StopNow):
        model.find_model("org/net", None, check_stop)
    assert asked.is_set()


def test_a_model_that_is_in_the_cache_needs_no_hub(server: HubServer) -> None:
    before = model.find_model("org/net", OLD)
    server.fail = [(503, "")]
    assert model.find_model("org/net", OLD) == before
    for name in ("model.safetensors", "tokenizer.json", "config.json"):
        Path(str(before.folder), name).unlink()
        server.fail = [(503, "")] * 3 + [(0, "")]
        assert name in names(model.find_model("org/net", OLD).folder)


@pytest.mark.parametrize(
    ("vocabulary", "complete"),
    [
        (["tokenizer.json"], True),
        (["tokenizer.model", "tokenizer_config.json"], True),
        (["vocab.json", "merges.txt"], True),
        (["vocab.txt"], True),
        (["vocab.json"], False),
        (["tokenizer_config.json", "special_tokens_map.json"], False),
        ([], False),
    ],
)
def test_a_model_in_the_cache_is_complete_with_a_tokenizer(
    tmp_path: Path, vocabulary: list[str], complete: bool
) -> None:
    for name in ("config.json", "generation_config.json", "model.safetensors", *vocabulary):
        (tmp_path / name).write_bytes(b"{}")
    assert hub.has_model(tmp_path) == complete


@pytest.mark.parametrize("kind", ["model.safetensors", "pytorch_model.bin"])
def test_a_model_in_the_cache_is_complete_with_all_of_its_shards(tmp_path: Path, kind: str) -> None:
    shards = ["shard-1", "shard-2"]
    index = {"weight_map": {"a": shards[0], "b": shards[1], "c": shards[1]}}
    for name in ("config.json", "tokenizer.json", f"{kind}.index.json"):
        (tmp_path / name).write_text(json.dumps(index))
    for name in shards:
        assert not hub.has_model(tmp_path)
        (tmp_path / name).touch()
    assert hub.has_model(tmp_path)


def test_a_model_in_the_cache_that_was_cut_is_none(server: HubServer, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = Path(str(model.find_model("org/net", OLD).folder))
    (folder / "model.safetensors.index.json").write_text('{"weight_map": {"a"')
    monkeypatch.setattr(hub, "RETRY_S", 0.0)
    server.fail = [(503, "")] * 3
    with pytest.raises(hub.HubError) as ended:
        model.find_model("org/net", OLD)
    assert ended.value.code == EXIT_PREEMPTED, "the Hub may answer the next attempt"


HOPELESS = [
    ("org/net", None, (401, ""), "not found here or on the Hugging Face Hub"),
    ("org/net", None, (403, "GatedRepo"), "access is gated. Accept the terms at http"),
    ("org/net", None, (403, ""), "refuses it"),
    ("org/other", None, None, "not found here or on the Hugging Face Hub. Check the name"),
    ("org/net", "f" * 40, None, f"commit {'f' * 40}, which this run began with, is no longer on"),
]


@pytest.mark.parametrize(("name", "revision", "fail", "said"), HOPELESS)
def test_what_waiting_does_not_mend_is_said_at_once(
    server: HubServer, name: str, revision: str | None, fail: tuple[int, str] | None, said: str
) -> None:
    server.fail = [fail] if fail else []
    with pytest.raises(hub.HubError, match=f"--model {name}: ") as ended:
        model.find_model(name, revision)
    assert said in str(ended.value)
    assert ended.value.code == EXIT_FAILED
    assert len(str(ended.value).splitlines()) == 1


def test_an_offline_machine_is_told_so(server: HubServer, monkeypatch: pytest.MonkeyPatch) -> None:
    from huggingface_hub import constants

    model.find_model("org/net", OLD)
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    assert model.find_model("org/net", OLD).revision == OLD
    with pytest.raises(hub.HubError, match=r"not in the cache .*, and HF_HUB_OFFLINE forbids downloads") as ended:
        model.find_model("org/net", NEW)
    assert ended.value.code == EXIT_FAILED


def test_a_cache_that_cannot_be_written_is_named(
    server: HubServer, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    from huggingface_hub import constants

    (tmp_path / "file").write_text("")
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "file" / "hub"))
    with pytest.raises(hub.HubError, match=r"cannot be stored: .*file.*Set HF_HOME to another folder"):
        model.find_model("org/net", NEW)


def test_a_full_cache_is_named(server: HubServer, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    import errno

    import huggingface_hub

    from trainer.machine.scratch import ScratchError

    def full(*args: object, **options: object) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(huggingface_hub, "snapshot_download", full)
    with pytest.raises(ScratchError, match=f"^{tmp_path}/cache: No space left on device"):
        model.find_model("org/net", NEW)


@pytest.mark.parametrize("name", ["/nowhere/at/all", "./here", "a/b/c", "~/model"])
def test_a_path_is_not_asked_of_the_hub(server: HubServer, name: str) -> None:
    with pytest.raises(ModelError, match="no such folder on this machine"):
        model.find_model(name, None)
    assert not server.asked


def test_a_data_set_without_text_is_said(server: HubServer, tmp_path: Path) -> None:
    from trainer.finetune.config import parse
    from trainer.layout.names import AttemptName

    server.repositories["datasets/somebody/tables"] = {OLD: {"a.parquet": b"x", ".gitattributes": b"x"}}
    config = parse(["--checkpoint-dir", "x", "--data", "somebody/tables"])
    with pytest.raises(DataError, match=r"no \.txt or \.jsonl file in it"):
        data.prepare(RunPaths(tmp_path / "run"), AttemptName(1, "abcdef"), config, nothing)


@pytest.mark.slow
def test_a_data_set_of_the_hub_is_prepared_and_later_attempts_do_not_need_the_hub(tmp_path: Path) -> None:
    args = ["--data", "somebody/some-set", "--max-steps", 2, "--seq-len", 16, "--processes", 1]
    with HubServer({"datasets/somebody/some-set": TEXTS}).serving() as server:
        env = clean_env(HF_ENDPOINT=server.url, HF_HUB_OFFLINE="0", HF_HOME=str(tmp_path))
        first = train("--checkpoint-dir", tmp_path / "run", *args, "--save-every", 1, env=env)
        assert first.code == 0, first.output
    paths = RunPaths(tmp_path / "run")
    bound = [event for event in read_events(paths, list_attempts(paths)[0]) if event.name == "bound"]
    assert bound[0].fields["binding"]["data_revision"] == OLD
    more = ["--allow-config-change", "max_steps", "--max-steps", 3]
    again = train("--checkpoint-dir", tmp_path / "run", *args, *more, env={**env, "HF_HOME": str(tmp_path / "x")})
    assert again.code == 0, again.output
    # A new run needs the Hub, and retries until it gets a stop.
    command = [sys.executable, "-m", "trainer", "--checkpoint-dir", str(tmp_path / "other"), *map(str, args)]
    process = subprocess.Popen(
        command, env={**env, "HF_HOME": str(tmp_path / "x")}, stdout=subprocess.PIPE, text=True, start_new_session=True
    )
    assert process.stdout
    assert any("retrying for up to 10 minutes" in line for line in process.stdout)
    os.kill(process.pid, signal.SIGTERM)
    assert process.wait(60) == EXIT_PREEMPTED
    process.stdout.close()

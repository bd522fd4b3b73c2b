"""Text to packed samples; and the models that eat them."""

import hashlib
import json
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import ClassVar

import numpy as np
import pytest
import torch
from support import clean_env, train

from trainer import data, model
from trainer.config import parse
from trainer.layout import AttemptName, RunPaths

ATTEMPT = AttemptName(1, "abcdef")


@pytest.fixture
def paths(tmp_path: Path) -> RunPaths:
    return RunPaths(tmp_path / "run")


def config(*args: object):
    return parse(["--checkpoint-dir", "x", *map(str, args)])


def texts(folder: Path, **files: str) -> Path:
    folder.mkdir()
    for name, text in files.items():
        (folder / name.replace("_", ".")).write_text(text)
    return folder


def nothing() -> None:
    pass


def prepare(paths: RunPaths, tmp_path: Path, *args: object) -> data.Tokens:
    folder = data.prepare(paths, ATTEMPT, config(*args), nothing)
    return data.open_tokens(paths, folder, tmp_path / "cache")


def test_bytes_are_packed_with_an_end_after_each_document_and_some_are_held_out(
    paths: RunPaths, tmp_path: Path
) -> None:
    source = texts(tmp_path / "src", a_txt="ab" * 300, b_jsonl=json.dumps({"text": "é" * 200}) + "\n\n")
    tokens = prepare(paths, tmp_path, "--data", source, "--seq-len", 10)
    assert tokens.train.shape == (99, 10)
    assert tokens.held_out.shape == (1, 10)
    everything = np.concatenate([tokens.held_out.ravel(), tokens.train.ravel()])
    assert (everything == data.END_OF_DOCUMENT).sum() == 1
    assert tokens.vocab_size == 257
    assert bytes(tokens.held_out[0].astype(np.uint8)) == b"ab" * 5


def test_the_data_is_prepared_once_and_a_torn_folder_does_not_count(paths: RunPaths, tmp_path: Path) -> None:
    source = texts(tmp_path / "src", a_txt="x" * 5000)
    args = ("--data", source, "--seq-len", 10)
    first = data.prepare(paths, ATTEMPT, config(*args), nothing)
    assert data.prepare(paths, AttemptName(2, "aaaaaa"), config(*args), nothing) == first
    (paths.tokens / first / "MANIFEST.json").unlink()
    assert data.prepare(paths, AttemptName(3, "aaaaaa"), config(*args), nothing) != first


def test_the_key_knows_names_and_sizes_and_not_where_the_files_lie(tmp_path: Path) -> None:
    one, same = texts(tmp_path / "one", a_txt="x" * 100), texts(tmp_path / "same", a_txt="y" * 100)
    longer, renamed = texts(tmp_path / "longer", a_txt="x" * 101), texts(tmp_path / "renamed", b_txt="x" * 100)
    keys = [data.data_key(config("--data", folder)) for folder in (one, same, longer, renamed)]
    assert keys[0] == keys[1]
    assert len(set(keys)) == 3
    assert data.data_key(config()) != data.data_key(config("--seq-len", 64))


def test_a_flipped_bit_in_prepared_data_is_found(paths: RunPaths, tmp_path: Path) -> None:
    folder = data.prepare(paths, ATTEMPT, config("--seq-len", 64), nothing)
    path = paths.tokens / folder / "train.bin"
    content = bytearray(path.read_bytes())
    content[100] ^= 1
    path.write_bytes(content)
    with pytest.raises(data.DataError, match="does not hash"):
        data.open_tokens(paths, folder, tmp_path / "cache")


def test_the_standard_library_is_always_there(paths: RunPaths, tmp_path: Path) -> None:
    tokens = prepare(paths, tmp_path)
    assert len(tokens.train) > 10_000
    assert len(tokens.held_out) == pytest.approx(len(tokens.train) / 99, rel=0.02)


MISTAKES = [
    ({"a_txt": "short"}, "samples of"),
    ({"a_csv": "x"}, r"no \.txt or \.jsonl"),
    ({"a_jsonl": '{"text": "x"}\n{"body": 1}\n'}, "line 2: no `text`"),
    ({"a_jsonl": "{nope\n"}, "line 1: not JSON"),
]


@pytest.mark.parametrize(("files", "remedy"), MISTAKES)
def test_data_that_cannot_be_trained_on_is_said_in_a_line(
    paths: RunPaths, tmp_path: Path, files: dict, remedy: str
) -> None:
    source = texts(tmp_path / "src", **files)
    with pytest.raises(data.DataError, match=remedy) as refused:
        data.prepare(paths, ATTEMPT, config("--data", source), nothing)
    assert len(str(refused.value).splitlines()) == 1
    assert not paths.tokens.exists()


def test_bytes_that_are_no_text_and_folders_that_are_not_there_are_said(paths: RunPaths, tmp_path: Path) -> None:
    (tmp_path / "x.txt").write_bytes(b"ok \xff\xfe")
    with pytest.raises(data.DataError, match="not UTF-8 at byte 3"):
        data.prepare(paths, ATTEMPT, config("--data", tmp_path / "x.txt"), nothing)
    with pytest.raises(data.DataError, match="no such folder or file"):
        data.prepare(paths, ATTEMPT, config("--data", "/nowhere/at/all"), nothing)


class Hub(BaseHTTPRequestHandler):
    """The Hugging Face hub on loopback, with one data set in it: what `snapshot_download` asks for."""

    FILES: ClassVar = {
        "part/one.txt": b"the first text " * 400,
        "two.jsonl": b'{"text": "more"}\n' * 50,
        "x.bin": b"\0",
    }
    SHA = "0123456789abcdef0123456789abcdef01234567"

    def do_GET(self) -> None:
        if self.path.split("?")[0].startswith("/api/datasets/somebody/some-set"):
            siblings = [{"rfilename": name} for name in self.FILES]
            document = {"id": "somebody/some-set", "sha": self.SHA, "siblings": siblings, "private": False}
            return self._send(json.dumps(document).encode(), "application/json")
        name = self.path.split(f"/resolve/{self.SHA}/")[-1]
        if name in self.FILES:
            return self._send(self.FILES[name], "application/octet-stream")
        return self.send_error(404)

    do_HEAD = do_GET

    def _send(self, body: bytes, kind: str) -> None:
        self.send_response(200)
        self.send_header("Content-Type", kind)
        self.send_header("Content-Length", str(len(body)))
        self.send_header("ETag", f'"{hashlib.sha1(body).hexdigest()}"')
        self.send_header("X-Repo-Commit", self.SHA)
        self.end_headers()
        if self.command == "GET":
            self.wfile.write(body)

    def log_message(self, *args: object) -> None:
        pass


def test_a_data_set_of_the_hub_is_prepared_and_later_attempts_do_not_need_the_hub(tmp_path: Path) -> None:
    server = ThreadingHTTPServer(("127.0.0.1", 0), Hub)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    args = ["--checkpoint-dir", tmp_path / "run", "--data", "somebody/some-set", "--max-steps", 2, "--warmup-steps", 0,
            "--seq-len", 16, "--processes", 1]  # fmt: skip
    hub = {
        "HF_ENDPOINT": f"http://127.0.0.1:{server.server_address[1]}",
        "HF_HUB_OFFLINE": "0",
        "HF_HOME": str(tmp_path),
    }
    first = train(*args, "--save-every", 1, env=clean_env(**hub))
    assert first.code == 0, first.output
    server.shutdown()
    server.server_close()
    again = train(
        *args[:-2], "--allow-config-change", "max_steps", "--max-steps", 3, "--processes", 1, env=clean_env(**hub)
    )
    assert again.code == 0, again.output
    refused = train(
        "--checkpoint-dir", tmp_path / "other", *args[2:], env=clean_env(**{**hub, "HF_HOME": str(tmp_path / "x")})
    )
    assert refused.code == 1
    assert "somebody/some-set: not to be had from the hub" in refused.output
    assert "Traceback" not in refused.output


def test_a_stop_is_heard_between_pieces(paths: RunPaths) -> None:
    class StopNow(Exception):
        pass

    def between() -> None:
        raise StopNow

    with pytest.raises(StopNow):
        data.prepare(paths, ATTEMPT, config(), between)
    assert not list(paths.tokens.glob("*/MANIFEST.json")) if paths.tokens.exists() else True


def test_the_tiny_model_has_about_a_million_parameters_and_live_dropout() -> None:
    torch.manual_seed(0)
    tiny = model.build_model(config(), 257)
    assert 0.7e6 < sum(parameter.numel() for parameter in tiny.parameters()) < 1.5e6
    tiny.train()
    tokens = torch.arange(64)[None]
    one, other = tiny(input_ids=tokens).logits, tiny(input_ids=tokens).logits
    assert not torch.equal(one, other), "dropout is on"
    torch.manual_seed(5)
    first = tiny(input_ids=tokens).logits
    torch.manual_seed(5)
    assert torch.equal(first, tiny(input_ids=tokens).logits)


def test_a_model_and_tokenizer_in_a_folder_are_trained_on_and_exported(paths: RunPaths, tmp_path: Path) -> None:
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

    folder = tmp_path / "model"
    words = {word: number for number, word in enumerate(["<end>", "<unk>", "to", "be", "or", "not"])}
    raw = Tokenizer(models.WordLevel(words, unk_token="<unk>"))
    raw.pre_tokenizer = pre_tokenizers.Whitespace()
    PreTrainedTokenizerFast(tokenizer_object=raw, eos_token="<end>", unk_token="<unk>").save_pretrained(folder)
    small = LlamaConfig(
        vocab_size=6, hidden_size=16, intermediate_size=16, num_hidden_layers=1, num_attention_heads=2,
        num_key_value_heads=2, eos_token_id=0,
    )  # fmt: skip
    LlamaForCausalLM(small).save_pretrained(folder)
    source = texts(tmp_path / "src", a_txt="to be or not to be " * 50)
    chosen = config("--model", folder, "--data", source, "--seq-len", 8)
    tokens = data.open_tokens(paths, data.prepare(paths, ATTEMPT, chosen, nothing), tmp_path / "cache")
    assert tokens.train[0].tolist()[:4] in ([2, 3, 4, 5], [4, 5, 2, 3])
    loaded = model.build_model(chosen, tokens.vocab_size)
    model.save_model(loaded, chosen, tmp_path / "out")
    AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    assert AutoTokenizer.from_pretrained(tmp_path / "out").eos_token == "<end>"


def test_a_model_that_is_not_there_is_said_in_a_line(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    with pytest.raises(model.ModelError, match="--model /nowhere") as refused:
        model.build_model(config("--model", "/nowhere"), 10)
    assert len(str(refused.value).splitlines()) == 1

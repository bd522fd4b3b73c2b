"""Packing text into samples, and the models that train on them."""

import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from support import clean_env

from trainer.finetune import data, encoding, model, tokens
from trainer.finetune.config import parse
from trainer.layout.names import AttemptName, RunPaths

ATTEMPT = AttemptName(1, "abcdef")
PREPARED_BEFORE = [
    "edd1e4e9156e6431-a0001-abcdef", "e56119ac103d8393d12abf0d02e25799", "e99669c1a6e3d3c9c8f37c3bcb2f5351"
]  # fmt: skip
STDLIB_BEFORE = "87c0d38440b384e2-a0001-abcdef"


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


def prepare(paths: RunPaths, *args: object) -> tokens.Tokens:
    return opened(paths, data.prepare(paths, ATTEMPT, config(*args), nothing))


def key_of(*args: object) -> str:
    return data.data_key(config(*args), data.local_source(config(*args)))


def opened(paths: RunPaths, folder: str) -> tokens.Tokens:
    manifest = tokens.manifest_of(paths, folder)
    with tokens.copied(paths, folder, manifest) as local:
        return tokens.open_copy(folder, manifest, local)


def test_bytes_are_packed_with_an_end_after_each_document_and_some_are_held_out(
    paths: RunPaths, tmp_path: Path
) -> None:
    source = texts(tmp_path / "src", a_txt="ab" * 300, b_jsonl=json.dumps({"text": "é" * 200}) + "\n\n")
    found = prepare(paths, "--data", source, "--seq-len", 10)
    assert found.train.shape == (99, 10)
    assert found.held_out.shape == (1, 10)
    everything = np.concatenate([found.held_out.ravel(), found.train.ravel()])
    assert (everything == encoding.END_OF_DOCUMENT).sum() == 1
    assert found.vocab_size == 257
    assert bytes(found.held_out[0].astype(np.uint8)) == b"ab" * 5


def test_the_data_is_prepared_once_and_a_torn_folder_does_not_count(paths: RunPaths, tmp_path: Path) -> None:
    source = texts(tmp_path / "src", a_txt="x" * 5000)
    args = ("--data", source, "--seq-len", 10)
    first = data.prepare(paths, ATTEMPT, config(*args), nothing)
    assert data.prepare(paths, AttemptName(2, "aaaaaa"), config(*args), nothing) == first
    (paths.tokens / first / "MANIFEST.json").unlink()
    assert data.prepare(paths, AttemptName(3, "aaaaaa"), config(*args), nothing) != first


def test_what_was_prepared_before_is_known_and_made_the_same(paths: RunPaths, tmp_path: Path) -> None:
    """Runs that were begun with another release: their keys and hashes."""
    source = tmp_path / "src"
    (source / "deep").mkdir(parents=True)
    (source / "a.txt").write_bytes("naïve\r\nold\rmac\n".encode() * 400)
    (source / "deep" / "b.jsonl").write_bytes(b'{"text": "one \\u00e9", "n": 1}\r\n\n{"text": ""}\n' * 100)
    (source / "empty.txt").write_bytes(b"")
    folder = data.prepare(paths, ATTEMPT, config("--data", source, "--seq-len", 16), nothing)
    files = tokens.manifest_of(paths, folder).files
    assert [folder, files["train.bin"].hash, files["held_out.bin"].hash] == PREPARED_BEFORE
    folder = data.prepare(paths, ATTEMPT, config("--seq-len", 64), nothing)
    assert folder == STDLIB_BEFORE


def test_the_key_knows_names_and_sizes_and_not_where_the_files_lie(tmp_path: Path) -> None:
    one, same = texts(tmp_path / "one", a_txt="x" * 100), texts(tmp_path / "same", a_txt="y" * 100)
    longer, renamed = texts(tmp_path / "longer", a_txt="x" * 101), texts(tmp_path / "renamed", b_txt="x" * 100)
    keys = [key_of("--data", folder) for folder in (one, same, longer, renamed)]
    assert keys[0] == keys[1]
    assert len(set(keys)) == 3
    assert key_of() != key_of("--seq-len", 64)


def test_a_flipped_bit_in_prepared_data_is_found(paths: RunPaths, tmp_path: Path) -> None:
    folder = data.prepare(paths, ATTEMPT, config("--seq-len", 64), nothing)
    path = paths.tokens / folder / "train.bin"
    content = bytearray(path.read_bytes())
    content[100] ^= 1
    path.write_bytes(content)
    with pytest.raises(tokens.DamagedError, match="does not match the hash"):
        opened(paths, folder)
    path.unlink()
    with pytest.raises(tokens.DamagedError, match="is missing"):
        opened(paths, folder)


def test_the_standard_library_is_always_there(paths: RunPaths, tmp_path: Path) -> None:
    found = prepare(paths)
    assert len(found.train) > 10_000
    assert len(found.held_out) == pytest.approx(len(found.train) / 99, rel=0.02)


MISTAKES = [
    ({"a_txt": "short"}, "samples of"),
    ({"a_txt": "", "b_txt": ""}, "no text in its 2 files"),
    ({}, r"no \.txt or \.jsonl"),
    ({"a_csv": "x"}, r"no \.txt or \.jsonl"),
    ({"a_jsonl": '{"text": "x"}\n{"body": 1}\n'}, r"line 2 \(from byte 14\): no `text`"),
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


def test_a_stop_is_heard_between_pieces(paths: RunPaths) -> None:
    class StopNow(Exception):
        pass

    def check_stop() -> None:
        raise StopNow

    with pytest.raises(StopNow):
        data.prepare(paths, ATTEMPT, config(), check_stop)
    assert not list(paths.tokens.glob("*/MANIFEST.json")) if paths.tokens.exists() else True


def test_a_source_is_listed_once(paths: RunPaths, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A second list may differ from the one that the key is made of."""
    source, real, listed = texts(tmp_path / "src", a_txt="x" * 5000), os.scandir, list[object]()
    monkeypatch.setattr(os, "scandir", lambda path: listed.append(path) or real(path))
    data.prepare(paths, ATTEMPT, config("--data", source, "--seq-len", 10), nothing)
    assert listed.count(source) == 1


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
    found = opened(paths, data.prepare(paths, ATTEMPT, chosen, nothing))
    assert found.train[0].tolist()[:4] in ([2, 3, 4, 5], [4, 5, 2, 3])
    loaded = model.build_model(chosen, found.vocab_size)
    model.save_model(loaded, chosen, tmp_path / "out")
    AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    assert AutoTokenizer.from_pretrained(tmp_path / "out").eos_token == "<end>"


def test_a_model_that_is_not_there_is_said_in_a_line(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    with pytest.raises(model.ModelError, match="--model /nowhere") as refused:
        model.build_model(config("--model", "/nowhere"), 10)
    assert len(str(refused.value).splitlines()) == 1


MEASURE = """
import resource, sys
from pathlib import Path
from trainer.finetune import data
from trainer.finetune import text
from trainer.finetune import tokens
from trainer.finetune.config import parse
from trainer.layout.names import AttemptName, RunPaths
from trainer.finetune.model import ModelFiles, load_tokenizer
source, run, model = sys.argv[1:]
config = parse(["--checkpoint-dir", run, "--data", source, "--model", model])
if model != "tiny":
    load_tokenizer(config)("warm up", return_offsets_mapping=True)
before, calls = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss, []
paths = RunPaths(Path(run))
folder = data.prepare(paths, AttemptName(1, "abcdef"), config, lambda: calls.append(1))
manifest = tokens.manifest_of(paths, folder)
with tokens.copied(paths, folder, manifest):
    pass
print(manifest.facts["n_train"], len(calls), resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before)
"""


def measured(tmp_path: Path, megabytes: int, model: object) -> tuple[int, int, int]:
    """Prepare a file of one line; returns its samples, the number of checks for a stop, and the memory in KB."""
    with (tmp_path / "a.txt").open("w") as file:
        for number in range(megabytes):
            file.write(f"to be or not to be, that is question {number} " * (2**20 // 40))
    command = [sys.executable, "-c", MEASURE, tmp_path / "a.txt", tmp_path / "run", str(model)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=600, env=clean_env())
    assert done.returncode == 0, done.stderr
    samples, calls, kilobytes = map(int, done.stdout.split())
    return samples, calls, kilobytes


def test_preparing_takes_little_memory_and_looks_for_a_stop_all_the_time(tmp_path: Path) -> None:
    samples, calls, kilobytes = measured(tmp_path, 24, "tiny")
    assert samples > 24 * 2**20 / 128 * 0.95
    assert calls > 24 * 2**20 / 65536
    assert kilobytes < 80_000


@pytest.mark.slow
def test_preparing_with_a_tokenizer_takes_little_memory(tmp_path: Path) -> None:
    from tokenizers import Tokenizer, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    raw = Tokenizer(models.BPE())
    raw.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(vocab_size=300, special_tokens=["<end>"], initial_alphabet=alphabet)
    raw.train_from_iterator(["to be or not to be, that is the question"], trainer)
    PreTrainedTokenizerFast(tokenizer_object=raw, eos_token="<end>").save_pretrained(tmp_path / "model")
    (tmp_path / "model" / "config.json").write_text('{"model_type": "gpt2"}')
    samples, calls, kilobytes = measured(tmp_path, 3, tmp_path / "model")
    assert samples > 500
    assert calls > 3 * 2**20 / 65536
    assert kilobytes < 100_000

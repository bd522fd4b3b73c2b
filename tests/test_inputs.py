"""The prepared data and the model of an attempt: a run continues with what it has, and prints a line about it."""

import json
import os
import shutil
import tempfile
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import pytest
from support import train

from trainer.attempt.ending import STOP_REQUEST, Leaving
from trainer.attempt.record import open_attempt
from trainer.finetune import data, model, tokens
from trainer.finetune.__main__ import is_moved
from trainer.finetune.config import parse
from trainer.finetune.hub import Repository
from trainer.finetune.inputs import Inputs
from trainer.finetune.sources import DataError
from trainer.layout.manifest import Manifest, read_manifest
from trainer.layout.names import AttemptName, RunPaths, list_attempts, list_checkpoints
from trainer.training.run import SpotRun

TEXT = "to be or not to be, that is the question\n" * 40


@pytest.fixture
def corpus(tmp_path: Path) -> Path:
    (tmp_path / "corpus").mkdir()
    (tmp_path / "corpus" / "a.txt").write_text(TEXT)
    return tmp_path / "corpus"


class Attempts:
    """The attempts of one run, up to the choice of their inputs."""

    def __init__(self, folder: Path, *args: object, length: tuple[object, ...] = ("--seq-len", 16)) -> None:
        self.paths = RunPaths(folder)
        self.args = ["--checkpoint-dir", folder, *length, *args]
        self.newest: Manifest | None = None

    def begin(self, *more: object, checkpoint: bool = True) -> dict[str, Any]:
        """Begin an attempt and return its choice; writes a checkpoint as training does."""
        config = parse([str(arg) for arg in (*self.args, *more)])
        run = SpotRun(config, config.binding())
        run.is_same = lambda name, first: name == "model" and is_moved(config.model, first)
        run.attempt = open_attempt(self.paths, launch="launch", config=config.to_json(), binding=run.binding)
        run.newest = self.newest
        run.refuse_other_binding()
        with ExitStack() as held:
            inputs = Inputs(run, config, held)
            chosen = inputs.choose()
            assert inputs.local
            manifest = tokens.manifest_of(self.paths, chosen["tokens"])
            assert tokens.open_copy(chosen["tokens"], manifest, inputs.local).train.shape[1] == chosen["seq_len"]
        if checkpoint:
            facts = {"step": 1, "run_id": "x", "tokens": chosen["tokens"], "binding": dict(run.binding)}
            self.newest = Manifest("checkpoint", {}, json.loads(json.dumps(facts, default=str)))
        return chosen

    def damage(self, folder: str, name: str = "train.bin") -> None:
        path = self.paths.tokens / folder / name
        content = bytearray(path.read_bytes())
        content[30] ^= 1
        path.write_bytes(content)


# -- data that has changed --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("change", ["grown", "gone", "shrunk", "moved"])
@pytest.mark.parametrize("checkpoint", [True, False])
def test_a_run_goes_on_with_its_prepared_data_whatever_became_of_the_source(
    tmp_path: Path, corpus: Path, capsys: pytest.CaptureFixture[str], change: str, checkpoint: bool
) -> None:
    run = Attempts(tmp_path / "run", "--data", corpus)
    first = run.begin(checkpoint=checkpoint)
    capsys.readouterr()
    more: list[object] = []
    if change == "grown":
        (corpus / "b.txt").write_text(TEXT)
    elif change == "shrunk":
        (corpus / "a.txt").write_text("short")
    elif change == "gone":
        shutil.rmtree(corpus)
    else:
        more = ["--data", corpus.rename(tmp_path / "elsewhere")]
    assert run.begin(*more) == first
    said = capsys.readouterr().out
    assert ("continues with the data that was prepared for it" in said) == (change != "moved")
    assert len(said.splitlines()) == (change != "moved")
    assert len(list(run.paths.tokens.iterdir())) == 1


def test_other_data_is_refused_and_taken_where_it_is_asked_for(tmp_path: Path, corpus: Path) -> None:
    run = Attempts(tmp_path / "run", "--data", corpus)
    first = run.begin()
    (tmp_path / "other.txt").write_text(TEXT.upper())
    with pytest.raises(Leaving, match="--allow-config-change data_key"):
        run.begin("--data", tmp_path / "other.txt")
    other = run.begin("--data", tmp_path / "other.txt", "--allow-config-change", "data_key")
    assert other["tokens"] != first["tokens"]
    assert run.begin("--data", tmp_path / "other.txt", "--allow-config-change", "data_key") == other
    assert run.begin("--data", tmp_path / "other.txt") == other


def test_data_that_grew_is_taken_where_it_is_asked_for(tmp_path: Path, corpus: Path) -> None:
    run = Attempts(tmp_path / "run", "--data", corpus)
    first = run.begin()
    (corpus / "b.txt").write_text(TEXT)
    assert run.begin("--allow-config-change", "data_key") != first


def test_another_length_of_samples_is_allowed_once_and_not_twice(tmp_path: Path, corpus: Path) -> None:
    run = Attempts(tmp_path / "run", "--data", corpus)
    first = run.begin()
    with pytest.raises(Leaving, match="--allow-config-change seq_len"):
        run.begin("--seq-len", 8)
    assert run.begin("--seq-len", 8, "--allow-config-change", "seq_len") != first


def test_before_the_first_checkpoint_an_attempt_that_prepared_nothing_binds_to_no_data(
    tmp_path: Path, corpus: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = Attempts(tmp_path / "run", "--data", corpus)
    first = run.begin(checkpoint=False)
    shutil.rmtree(run.paths.tokens)
    (corpus / "b.txt").write_text(TEXT)
    assert run.begin() != first


def test_a_resume_lists_the_source_once_and_a_stop_ends_the_listing(
    tmp_path: Path, corpus: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (corpus / "deep").mkdir()
    (corpus / "deep" / "b.txt").write_text(TEXT)
    run = Attempts(tmp_path / "run", "--data", corpus)
    first = run.begin()
    (corpus / "a.txt").write_text(TEXT * 2)
    real, listed = os.scandir, list[object]()
    monkeypatch.setattr(os, "scandir", lambda path: listed.append(path) or real(path))
    assert run.begin() == first
    assert (listed.count(corpus), listed.count(corpus / "deep")) == (1, 1)

    def check_stop(run: SpotRun) -> None:
        if corpus in listed:
            raise Leaving(STOP_REQUEST, "asked to stop")

    listed.clear()
    monkeypatch.setattr(SpotRun, "check_stop", check_stop)
    with pytest.raises(Leaving, match="asked to stop"):
        run.begin()
    assert corpus / "deep" not in listed


def test_what_is_left_out_is_said_when_the_data_is_prepared(
    tmp_path: Path, corpus: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (corpus / "b.pdf").write_bytes(b"%PDF")
    run = Attempts(tmp_path / "run", "--data", corpus)
    run.begin()
    assert f"--data {corpus}: 1 file ignored: .pdf (1)" in capsys.readouterr().out
    run.begin()
    assert not capsys.readouterr().out


# -- data that is damaged ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("how", ["flipped", "cut", "missing", "no manifest", "no folder"])
def test_damaged_data_is_made_again_where_it_becomes_the_same(
    tmp_path: Path, corpus: Path, capsys: pytest.CaptureFixture[str], how: str
) -> None:
    run = Attempts(tmp_path / "run", "--data", corpus)
    first = run.begin()["tokens"]
    before = tokens.manifest_of(run.paths, first).files
    folder = run.paths.tokens / first
    if how == "flipped":
        run.damage(first)
    elif how == "cut":
        (folder / "train.bin").write_bytes((folder / "train.bin").read_bytes()[:-1])
    elif how == "missing":
        (folder / "held_out.bin").unlink()
    elif how == "no manifest":
        (folder / "MANIFEST.json").unlink()
    else:
        shutil.rmtree(folder)
    again = run.begin(checkpoint=False)["tokens"]
    assert tokens.manifest_of(run.paths, again).files == before
    said = capsys.readouterr().out
    assert f"Prepared again from --data {corpus}; the hash is the same." in said
    assert len(said.splitlines()) == 1
    # The next attempt finds it without the source, although the newest checkpoint names the damaged folder.
    shutil.rmtree(corpus)
    assert run.begin()["tokens"] == again


@pytest.mark.parametrize(
    ("change", "said"),
    [("other", "has changed since"), ("gone", "data cannot be prepared again: --data .*no such folder")],
)
def test_damaged_data_that_does_not_become_the_same_is_said(
    tmp_path: Path, corpus: Path, change: str, said: str
) -> None:
    run = Attempts(tmp_path / "run", "--data", corpus)
    first = run.begin()["tokens"]
    run.damage(first)
    if change == "other":
        (corpus / "a.txt").write_text(TEXT.replace("be", "do"))
    else:
        shutil.rmtree(corpus)
    with pytest.raises(DataError, match=f"train.bin does not match the hash in its manifest.*{said}") as refused:
        run.begin()
    assert len(str(refused.value).splitlines()) == 1
    if change == "other":
        assert "--allow-config-change data_key" in str(refused.value)
        assert run.begin("--allow-config-change", "data_key")["tokens"] != first


def test_damage_before_the_first_checkpoint_is_no_loss(tmp_path: Path, corpus: Path) -> None:
    run = Attempts(tmp_path / "run", "--data", corpus)
    first = run.begin(checkpoint=False)["tokens"]
    run.damage(first)
    (corpus / "a.txt").write_text(TEXT.replace("be", "do"))
    assert run.begin()["tokens"] != first


def test_runs_of_older_releases_go_on(tmp_path: Path, corpus: Path) -> None:
    """They recorded neither a hash of the data nor a commit."""
    run = Attempts(tmp_path / "run", "--data", corpus)
    first = run.begin()
    assert run.newest
    binding = {name: value for name, value in run.newest.facts["binding"].items() if name != "data_hash"}
    run.newest = Manifest("checkpoint", {}, {**run.newest.facts, "binding": binding})
    for name in list_attempts(run.paths):
        shutil.rmtree(run.paths.attempt(name))
    assert run.begin(checkpoint=False) == first
    run.damage(first["tokens"])
    assert run.begin(checkpoint=False) != first


# -- the model --------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model with learned positions and its tokenizer, in a folder."""
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import GPT2Config, GPT2LMHeadModel, PreTrainedTokenizerFast

    folder = tmp_path_factory.mktemp("model") / "gpt"
    words = {word: number for number, word in enumerate(["<end>", "<unk>", "to", "be", "or", "not", "that", "is"])}
    raw = Tokenizer(models.WordLevel(words, unk_token="<unk>"))
    raw.pre_tokenizer = pre_tokenizers.Whitespace()
    PreTrainedTokenizerFast(tokenizer_object=raw, eos_token="<end>", unk_token="<unk>").save_pretrained(folder)
    small = GPT2Config(vocab_size=8, n_positions=32, n_embd=16, n_layer=1, n_head=2, bos_token_id=0, eos_token_id=0)
    GPT2LMHeadModel(small).save_pretrained(folder)
    return folder


def test_a_model_that_moved_is_the_same_model(
    tmp_path: Path, corpus: Path, saved: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    there, here = shutil.copytree(saved, tmp_path / "there"), tmp_path / "here"
    run = Attempts(tmp_path / "run", "--data", corpus)
    first = run.begin("--model", there)
    there.rename(here)
    assert run.begin("--model", here) == first
    assert "continues with the data that was prepared for it" in capsys.readouterr().out
    assert run.begin("--model", here) == first


def test_another_model_is_refused_once_and_not_twice(tmp_path: Path, corpus: Path, saved: Path) -> None:
    one, other = shutil.copytree(saved, tmp_path / "one"), shutil.copytree(saved, tmp_path / "other")
    (other / "config.json").write_text((other / "config.json").read_text() + "\n")
    run = Attempts(tmp_path / "run", "--data", corpus)
    first = run.begin("--model", one)
    with pytest.raises(Leaving, match="--allow-config-change model"):
        run.begin("--model", other)
    assert run.begin("--model", other, "--allow-config-change", "model") == first


def test_a_model_of_the_hub_keeps_its_commit(
    tmp_path: Path, corpus: Path, saved: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: list[object] = []
    newest = ["1" * 40]

    def download(repository: Repository, **options: object) -> Path:
        asked.append(repository.revision)
        folder = tmp_path / "cache" / (repository.revision or newest[0])
        return folder if folder.exists() else Path(shutil.copytree(saved, folder))

    monkeypatch.setattr(model.hub, "download", download)
    run = Attempts(tmp_path / "run", "--data", corpus, "--model", "org/net")
    first = run.begin(checkpoint=False)
    newest[0] = "2" * 40
    assert first["model_revision"] == "1" * 40
    assert run.begin() == first  # Existing the first checkpoint, too.
    assert run.begin() == first
    assert asked == [None, "1" * 40, "1" * 40]
    assert tokens.manifest_of(run.paths, first["tokens"]).facts["model_revision"] == "1" * 40


# -- the default length of a sample ------------------------------------------------------------------------------------


@pytest.fixture
def short(tmp_path: Path, corpus: Path, saved: Path) -> Attempts:
    """A run without --seq-len, of a model with 32 positions."""
    return Attempts(tmp_path / "run", "--data", corpus, "--model", saved, length=())


@pytest.mark.parametrize("checkpoint", [True, False])
def test_the_default_length_of_a_sample_is_no_more_than_the_model_has_positions(
    short: Attempts, capsys: pytest.CaptureFixture[str], checkpoint: bool
) -> None:
    first = short.begin(checkpoint=checkpoint)
    assert first["seq_len"] == 32
    assert "has 32 positions: --seq-len is 32, not the default of 128." in capsys.readouterr().out
    facts = tokens.manifest_of(short.paths, first["tokens"]).facts
    assert facts["seq_len"] == 32
    assert short.begin() == first
    assert short.begin("--seq-len", 32) == first, "what was chosen may be given"
    assert short.newest
    assert short.newest.facts["binding"]["seq_len"] == 32
    with pytest.raises(Leaving, match="started with seq_len=32, not seq_len=16"):
        short.begin("--seq-len", 16)


def test_data_of_the_default_length_has_the_name_of_data_of_that_length(short: Attempts, tmp_path: Path) -> None:
    given = Attempts(tmp_path / "given", *short.args[2:], length=("--seq-len", 32))
    assert short.begin()["tokens"][:16] == given.begin()["tokens"][:16]


def test_a_run_of_a_given_length_is_not_resumed_with_the_default(short: Attempts) -> None:
    short.begin("--seq-len", 16)
    with pytest.raises(Leaving, match="started with seq_len=16, not seq_len=32"):
        short.begin()
    assert len(list(short.paths.tokens.iterdir())) == 1, "nothing else is prepared"
    assert short.begin("--allow-config-change", "seq_len")["seq_len"] == 32


def test_a_run_that_bound_its_default_at_its_start_is_resumed(tmp_path: Path, corpus: Path) -> None:
    """As earlier releases did."""
    run = Attempts(tmp_path / "run", "--data", corpus, "--global-batch-size", 2, length=())
    first = run.begin("--seq-len", 128)
    assert run.begin() == first
    assert first["seq_len"] == 128


def test_a_model_with_more_positions_or_of_no_number_has_the_default(tmp_path: Path, saved: Path) -> None:
    def length(**changes: object) -> int:
        folder = Path(tempfile.mkdtemp(dir=tmp_path))
        told = json.loads((saved / "config.json").read_text()) | changes
        (folder / "config.json").write_text(json.dumps(told))
        config = parse(["--checkpoint-dir", "x", "--model", str(folder)])
        return model.seq_len_for(config, model.ModelFiles(str(folder)))

    assert [length(n_positions=number) for number in (2048, 128, 127, 2, 1, 0, -1)] == [128, 128, 127, 2, 128, 128, 128]
    assert length(model_type="bloom", architectures=["BloomForCausalLM"]) == 128


@pytest.mark.slow
def test_each_rank_trains_and_resumes_with_the_default_length(tmp_path: Path, corpus: Path, saved: Path) -> None:
    args = ("--checkpoint-dir", tmp_path / "run", "--model", saved, "--data", corpus, "--cpu", "--processes", 2)
    first = train(*args, "--max-steps", 2, "--save-every", 1)
    assert first.code == 0, first.output
    assert first.output.count("--seq-len is 32, not the default of 128") == 1
    again = train(*args, "--max-steps", 3, "--allow-config-change", "max_steps")
    assert again.code == 0, again.output
    paths = RunPaths(tmp_path / "run")
    facts = read_manifest(paths.checkpoint(list_checkpoints(paths)[0])).facts
    assert (facts["step"], facts["config"]["seq_len"], facts["binding"]["seq_len"]) == (3, 32, 32)
    refused = train(*args, "--seq-len", 33, "--max-steps", 3, "--checkpoint-dir", tmp_path / "other")
    assert refused.code == 1
    assert "Error: --seq-len 33 is more than the 32 positions" in refused.output


# -- what does not fit ------------------------------------------------------------------------------------------------


def fit(saved: Path, corpus: Path, run_dir: Path, *args: object) -> str | None:
    config = parse([str(arg) for arg in ("--checkpoint-dir", run_dir, "--model", saved, "--data", corpus, *args)])
    paths = RunPaths(run_dir)
    attempt = AttemptName(1, "abcdef")
    folder = data.prepare(paths, attempt, config, lambda: None)
    manifest = tokens.manifest_of(paths, folder)
    with tokens.copied(paths, folder, manifest) as local:
        found = tokens.open_copy(folder, manifest, local)
    built: Any = model.build_model(config, found.vocab_size)
    return model.check_fit(built, config, found)


def test_samples_longer_than_the_table_of_positions_are_refused(tmp_path: Path, corpus: Path, saved: Path) -> None:
    assert fit(saved, corpus, tmp_path / "fits", "--seq-len", 32) is None
    with pytest.raises(
        model.ModelError, match=r"--seq-len 33 is more than the 32 positions.*Pass --seq-len 32 or less"
    ):
        fit(saved, corpus, tmp_path / "run", "--seq-len", 33)


def test_samples_longer_than_rotary_positions_are_said(tmp_path: Path, corpus: Path, saved: Path) -> None:
    from transformers import LlamaConfig, LlamaForCausalLM

    folder = shutil.copytree(saved, tmp_path / "llama")
    small = LlamaConfig(
        vocab_size=8, hidden_size=16, intermediate_size=16, num_hidden_layers=1, num_attention_heads=2,
        max_position_embeddings=16,
    )  # fmt: skip
    LlamaForCausalLM(small).save_pretrained(folder)
    assert "16 positions" in str(fit(folder, corpus, tmp_path / "run", "--seq-len", 20))


def test_a_tokenizer_larger_than_the_embedding_is_refused_where_the_data_uses_it(
    tmp_path: Path, corpus: Path, saved: Path
) -> None:
    from transformers import GPT2Config, GPT2LMHeadModel

    folder = shutil.copytree(saved, tmp_path / "small")
    for rows, fits in ((4, False), (6, True)):  # The text uses the ids up to 5, and 8 are known.
        small = GPT2Config(
            vocab_size=rows, n_positions=32, n_embd=16, n_layer=1, n_head=2, bos_token_id=0, eos_token_id=0
        )
        GPT2LMHeadModel(small).save_pretrained(folder)
        (corpus / "a.txt").write_text("to be or not to be " * 60)
        if fits:
            assert fit(folder, corpus, tmp_path / f"run-{rows}", "--seq-len", 8) is None
        else:
            with pytest.raises(
                model.ModelError, match=r"embedding has 4 rows.*ids up to 5.*resize_token_embeddings\(8\)"
            ):
                fit(folder, corpus, tmp_path / f"run-{rows}", "--seq-len", 8)

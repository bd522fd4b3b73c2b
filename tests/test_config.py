"""The trainer's settings: mistakes are refused early, in one line, with the remedy."""

from pathlib import Path

import pytest

from trainer.finetune.config import TrainConfig, parse
from trainer.training.config import ConfigError, RunConfig


def test_the_least_command_is_a_trial() -> None:
    config = parse(["--checkpoint-dir", "/c/run"])
    assert (config.model, config.data, config.max_steps) == ("tiny", "stdlib", 60)
    assert config.checkpoint_dir == Path("/c/run")


def test_flags_beat_the_file(tmp_path: Path) -> None:
    path = tmp_path / "c.yaml"
    path.write_text("checkpoint-dir: /c/run\nmax_steps: 5\nlr: 1e-4\nsave-every: 2\nwarmup_steps: 1\ncpu: true\n")
    config = parse(["--config", str(path), "--max-steps", "7"])
    assert (config.max_steps, config.lr, config.save_interval_steps, config.cpu) == (7, 1e-4, 2, True)


def test_auto_is_no_number() -> None:
    config = parse(["--checkpoint-dir", "/c/run", "--save-every", "auto"])
    assert config.save_interval_steps is None
    assert config.to_json()["save_interval_steps"] is None


MISTAKES = [
    (["--max-stesp", "3"], "--max-steps"),
    (["--max-spend", "3"], "unknown option '--max-spend'"),
    (["--max-spend"], "unknown option '--max-spend'"),
    (["--deadline", "3h"], "unknown option '--deadline'"),
    (["--shard"], "unknown option '--shard'"),
    (["--grad-checkpointing"], "unknown option '--grad-checkpointing'"),
    (["--save-every", "often"], "whole number"),
    (["--save-every", "0"], "above 0"),
    (["--save-failures", "0"], "above 0"),
    (["--keep-every", "-1"], "less than 0"),
    (["--micro-batch-size", "many"], "'many' is not a whole number"),
    (["--report-to", "wandbb"], "--report-to: 'wandbb' is none of"),
    (["--global-batch-size", "10", "--micro-batch-size", "4"], "2 or 5 would"),
    (["--global-batch-size", "0"], "above 0"),
    (["--max-steps", "1.5"], "whole number"),
    (["--lr", "nan"], "number"),
    (["--lr", "inf"], "number"),
    (["--lr", "-1"], "above 0"),
    (["--precision", "fp8"], "fp32"),
    (["--lr-schedule", "step"], "cosine"),
    (["--warmup-steps", "100"], "--max-steps 60"),
    (["--epochs", "1", "--max-steps", "3"], "one of them"),
    (["--keep-latest", "1"], "less than 2"),
    (["--seq-len", "1"], "--seq-len"),
    (["--beta2", "1"], "[0, 1)"),
    (["--grace"], "expected one argument"),
    (["--data", ""], "--data: is empty"),
    (["--model", ""], "--model: is empty"),
    (["--checkpoint-dir", ""], "--checkpoint-dir is missing"),
    (["--config", "/nowhere.yaml"], "No such file"),
    (["stray"], "stray"),
]


@pytest.mark.parametrize(
    ("args", "remedy"), MISTAKES, ids=lambda value: " ".join(value) if isinstance(value, list) else ""
)
def test_a_mistake_is_said_in_a_line(args: list[str], remedy: str) -> None:
    with pytest.raises(ConfigError) as refused:
        parse(["--checkpoint-dir", "x", *args])
    assert remedy in str(refused.value)
    assert len(str(refused.value).splitlines()) == 1


@pytest.mark.parametrize(
    ("text", "remedy"),
    [
        ("max_stesp: 3\n", "max_steps"), ("- a\n", "by name"), ("a: [\n", "not readable"),
        ("max_steps: many\n", "whole"), ("deadline: 3h\n", "unknown key 'deadline'"),
        ("cpu: 3\n", "neither true nor false"), ("lr: true\n", "number"),
    ],
)  # fmt: skip
def test_a_mistake_in_the_file_is_said_in_a_line(tmp_path: Path, text: str, remedy: str) -> None:
    (tmp_path / "c.yaml").write_text(text)
    with pytest.raises(ConfigError, match=remedy) as refused:
        parse(["--checkpoint-dir", "x", "--config", str(tmp_path / "c.yaml")])
    assert len(str(refused.value).splitlines()) == 1


def test_what_binds_a_run_leaves_out_what_a_smaller_machine_may_change() -> None:
    one = parse(["--checkpoint-dir", "x", "--micro-batch-size", "4"]).binding()
    other = parse(
        ["--checkpoint-dir", "y", "--micro-batch-size", "2", "--processes", "2", "--save-every", "5"]
    ).binding()
    assert one == other
    assert parse(["--checkpoint-dir", "x", "--seed", "1"]).binding() != one


@pytest.mark.parametrize(
    ("args", "expected"),
    [
        ([], (8, 4, 6)),
        (["--max-steps", "2"], (8, 4, 2)),
        (["--global-batch-size", "6"], (6, 3, 6)),
        (["--global-batch-size", "2"], (2, 2, 6)),
        (["--global-batch-size", "7"], (7, 1, 6)),
        (["--micro-batch-size", "16"], (16, 16, 6)),
        (["--micro-batch-size", "3"], (9, 3, 6)),
        (["--micro-batch-size", "2"], (8, 2, 6)),
        (["--micro-batch-size", "auto"], (8, "auto", 6)),
        (["--micro-batch-size", "auto", "--global-batch-size", "6"], (6, "auto", 6)),
        (["--epochs", "1"], (8, 4, 6)),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else "",
)
def test_a_default_gives_way_to_what_is_given(args: list[str], expected: tuple[int, int, int]) -> None:
    config = parse(["--checkpoint-dir", "x", *args])
    assert (config.global_batch_size, config.micro_batch_size, config.warmup_for(config.max_steps or 60)) == expected


def test_a_default_warm_up_binds_by_its_name_so_that_a_short_run_can_be_made_longer() -> None:
    assert parse(["--checkpoint-dir", "x", "--max-steps", "2"]).binding()["warmup_steps"] == 6
    assert parse(["--checkpoint-dir", "x", "--max-steps", "2"]).to_json()["warmup_steps"] == 6
    assert parse(["--checkpoint-dir", "x", "--epochs", "1"]).warmup_for(3) == 3


@pytest.mark.parametrize("args", [["--max-steps", "2", "--warmup-steps", "6"], ["--warmup-steps", "61"]])
def test_a_warm_up_that_was_given_does_not_give_way(args: list[str]) -> None:
    with pytest.raises(ConfigError, match="is more than --max-steps"):
        parse(["--checkpoint-dir", "x", *args])


def test_a_users_own_config_bends_its_default_batch_too(tmp_path: Path) -> None:
    assert RunConfig(checkpoint_dir=tmp_path, global_batch_size=6).micro_batch_size == 3


def test_epochs_become_steps_when_the_data_is_known() -> None:
    assert parse(["--checkpoint-dir", "x", "--epochs", "2"]).steps_for(100) == 25


def test_a_users_own_config_needs_but_a_folder(tmp_path: Path) -> None:
    config = RunConfig(checkpoint_dir=tmp_path)
    assert config.to_json()["checkpoint_dir"] == str(tmp_path)


@pytest.mark.parametrize(
    ("given", "expected"),
    [
        ({"max_steps": "2"}, ("2", "8", "4", "2")),
        ({"global_batch_size": "6"}, ("60", "6", "3", "6")),
        ({"micro_batch_size": "16"}, ("60", "16", "16", "6")),
        ({"micro_batch_size": "auto"}, ("60", "8", "auto", "6")),
    ],
)
def test_a_templates_default_gives_way_as_the_trainers_does(given: dict[str, str], expected: tuple[str, ...]) -> None:
    import yaml

    from skyspot.migrate.source import task_yaml
    from skyspot.task.options import Options

    envs = yaml.safe_load(task_yaml(Options(name="run-001", parameters=given)).text)["envs"]
    names = ("MAX_STEPS", "GLOBAL_BATCH_SIZE", "MICRO_BATCH_SIZE", "WARMUP_STEPS")
    assert tuple(envs[f"SKYSPOT_{name}"] for name in names) == expected


def test_epochs_end_after_as_many_samples_whatever_the_batch_size_was(tmp_path: Path) -> None:
    config = TrainConfig(checkpoint_dir=tmp_path, epochs=1.0, global_batch_size=16, micro_batch_size=4)
    assert config.steps_for(800) == 50
    assert config.steps_for(800, done=9, consumed=144) == 50
    assert config.steps_for(800, done=9, consumed=72) == 55, "9 steps of 8 and 46 of 16"
    assert config.steps_for(800, done=9, consumed=900) == 9

"""Whatever a value holds, it comes out of YAML as the same string or is refused in a line."""

import os
from pathlib import Path

import pytest
import yaml
from hypothesis import given, settings
from hypothesis import strategies as st

from skyspot.errors import UsageError
from skyspot.migrate.source import task_yaml
from skyspot.task import options as opts
from skyspot.task.emitter import quoted
from skyspot.task.options import Options
from skyspot.task.render import Rendered
from skyspot.task.settings import merged

NASTY = [
    '"', "'", "\\", "\n", "\r\n", "\t", "$(touch owned)", "`touch owned`", "${HOME}", "$SKYSPOT_MODEL",
    "{{ name }}", "{% for x in y %}", "{# x #}", "!!python/object/apply:os.system ['id']", "!tag x", "&a *a",
    "a: b", "- x", "# x", "|", ">", "%YAML 1.1", "---", "...", "\u0085", "\u2028", "\u2029", "\ufeff", "😀",
    "\x07", "\x7f", "\xa0", "yes", "no", "null", "~", "1e5", "0x10", "1_000", "2001-01-01", "<<", "=",
    "; rm -rf /", "&& id", "\\x41", "é", "a\\\n  b", "envs:\n  X: y", "x" * 100_000, '"\nrun: touch owned\n"',
    "", " ", "  leading", "trailing  ",
]  # fmt: skip
BAD = ["\0", "a\0b", "\ud800", "x\udfff"]
values = st.one_of(
    st.sampled_from(NASTY), st.text(max_size=60), st.lists(st.sampled_from(NASTY[:50]), max_size=4).map("".join)
)
ENV_KEYS = {"SKYSPOT_MOUNT", "SKYSPOT_CHECKPOINT_DIR", "SKYSPOT_DATA"}


def keys_of(task: dict) -> list:
    return [list(task), list(task["resources"]), sorted(task["file_mounts"])]


def plain(name: str = "finetune", **more: object) -> dict:
    return yaml.safe_load(task_yaml(Options(task=name, name="run-001", **more)).text)


def check(given_options: Options, key: str, value: str) -> None:
    """The value is in the envs, as it is, and all else is as without it."""
    rendered: Rendered = task_yaml(given_options)
    task = yaml.safe_load(rendered.text)
    assert task["envs"][key] == value
    usual = plain(given_options.task, **({"parameters": {"command": "x"}} if given_options.task == "command" else {}))
    assert keys_of(task) == keys_of(usual)
    assert (task["run"], task["setup"]) == (usual["run"], usual["setup"])
    assert set(task["envs"]) - set(usual["envs"]) <= {key}
    body = rendered.text.split("\n", 2)[2]
    assert all(" " <= character <= "~" or character == "\n" for character in body)


@pytest.mark.slow
@settings(deadline=None, max_examples=150)
@given(values)
def test_an_environment_variable_comes_out_as_it_went_in(value: str) -> None:
    check_or_refuse(lambda: Options(name="run-001", env={"MINE": value}), "MINE", value)


@pytest.mark.slow
@settings(deadline=None, max_examples=150)
@given(values)
def test_a_parameter_comes_out_as_it_went_in(value: str) -> None:
    check_or_refuse(lambda: Options(name="run-001", parameters={"model": value}), "SKYSPOT_MODEL", value)
    make = lambda: Options(task="command", name="run-001", parameters={"command": value})  # noqa: E731
    check_or_refuse(make, "SKYSPOT_COMMAND", value)


@pytest.mark.slow
@settings(deadline=None, max_examples=100)
@given(values)
def test_data_comes_out_as_it_went_in(value: str) -> None:
    check_or_refuse(lambda: Options(name="run-001", data=value), "SKYSPOT_DATA", value)


def check_or_refuse(make, key: str, value: str) -> None:
    try:
        check(make(), key, value)
    except UsageError as error:
        assert len(str(error).splitlines()) == 1
        surrogate = any("\ud800" <= character <= "\udfff" for character in value)
        assert "\0" in value or surrogate or ("data" in str(error) and ("://" in value or not value))


@pytest.mark.slow
@settings(deadline=None, max_examples=150)
@given(values)
def test_every_other_option_refuses_what_it_cannot_be(value: str) -> None:
    for option in ("name", "bucket", "infra", "gpus", "strategy", "save_every", "prefer"):
        try:
            given_value = (value,) if option == "prefer" else value
            task = yaml.safe_load(task_yaml(Options(**{"name": "run-001", option: given_value})).text)
        except UsageError as error:
            assert len(str(error).splitlines()) == 1
            assert len(str(error)) < 2000
        else:
            assert keys_of(task)[0] == keys_of(plain())[0]
            assert task["run"] == plain()["run"]
    for field, section, kept in (("env", "envs", "x"), ("secret", "secrets", None)):
        try:
            task = yaml.safe_load(task_yaml(Options(name="run-001", **{field: {value: "x"}})).text)
        except UsageError as error:
            assert len(str(error).splitlines()) == 1
        else:
            assert opts.ENV.fullmatch(value)
            assert task[section][value] == kept
    for parameter in ("max_steps", "lr", "save_every"):
        try:
            task = yaml.safe_load(task_yaml(Options(name="run-001", parameters={parameter: value})).text)
        except UsageError as error:
            assert len(str(error).splitlines()) == 1
        else:
            assert float(task["envs"][f"SKYSPOT_{parameter.upper()}"]) == float(value)


@pytest.mark.parametrize("name", ["NO", "no", "ON", "y", "NULL", "null", "TRUE", "_"])
def test_a_variable_may_be_called_what_yaml_takes_for_a_truth_value(name: str) -> None:
    task = yaml.safe_load(task_yaml(Options(name="r", env={name: "1"}, secret={f"{name}": "x"})).text)
    assert task["envs"][name] == "1"
    assert task["secrets"] == {name: None}


@settings(deadline=None, max_examples=150)
@given(st.sampled_from(["name", "gpus", "bucket", "data", "infra", "prefer", "strategy", "save_every", "num_nodes",
                        "max_hourly_cost", "use_spot", "on_demand_last", "secret"]), values)  # fmt: skip
def test_every_key_of_skyspot_yaml_keeps_its_value_or_refuses_it(tmp_path_factory, key: str, value: str) -> None:
    folder = tmp_path_factory.mktemp("settings")
    try:
        text = f"{key}: {quoted(value)}\n"
    except UsageError:
        return
    (folder / "skyspot.yaml").write_text(text)
    try:
        task = yaml.safe_load(task_yaml(merged({} if key == "name" else {"name": "run-001"}, folder)).text)
    except UsageError as error:
        assert len(str(error).splitlines()) == 1
        assert len(str(error)) < 2000
    else:
        assert keys_of(task)[0] in (
            keys_of(plain())[0],
            [*keys_of(plain())[0][:4], "secrets", *keys_of(plain())[0][4:]],
        )
        assert task["run"] == plain()["run"]


@pytest.mark.slow
@settings(deadline=None, max_examples=100)
@given(values)
def test_skyspot_yaml_gives_the_same_string(tmp_path_factory, value: str) -> None:
    folder = tmp_path_factory.mktemp("settings")
    try:
        text = f"set: {{model: {quoted(value)}}}\nenv: {{MINE: {quoted(value)}}}\n"
    except UsageError:
        return
    (folder / "skyspot.yaml").write_text(text)
    task = yaml.safe_load(task_yaml(merged({"name": "run-001"}, folder)).text)
    assert task["envs"]["MINE"] == value
    assert task["envs"]["SKYSPOT_MODEL"] == value


@pytest.mark.parametrize("value", BAD, ids=ascii)
def test_nul_and_lone_surrogates_are_refused_in_a_line(value: str) -> None:
    for make in (
        lambda: Options(env={"MINE": value}),
        lambda: Options(name="r", parameters={"model": value}),
        lambda: Options(name="r", data=value),
    ):
        with pytest.raises(UsageError) as refused:
            task_yaml(make())
        assert len(str(refused.value).splitlines()) == 1


def test_the_shell_gets_the_very_same_string_and_runs_none_of_it(tmp_path: Path) -> None:
    """The constant text of `run`, with a hostile value in the environment, as a shell runs it."""
    import subprocess

    home = tmp_path / "home"
    (home / "skyspot").mkdir(parents=True)
    python = home / "skyspot" / "python"
    python.write_text('#!/bin/sh\nprintf "%s" "$6" > "$HOME/model"\n')
    python.chmod(0o755)
    for value in ('"; touch owned; "', "$(touch owned)", "`touch owned`", "a\nb", "'", "\\", "*"):
        task = plain(parameters={"model": value})
        env = {"PATH": os.environ["PATH"], "HOME": str(home), **task["envs"]}
        done = subprocess.run(["bash", "-c", task["run"]], env=env, cwd=tmp_path, capture_output=True, text=True)
        assert done.returncode == 0, done.stderr
        assert (home / "model").read_text() == value
    assert not list(tmp_path.rglob("owned"))

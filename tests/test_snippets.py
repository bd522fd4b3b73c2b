"""The commands and the Python of all pages: each command is there with its options, and a test runs it."""

from __future__ import annotations

import ast
import re
import shlex
from collections.abc import Iterator

import click
import pytest
from support import REPO

from skyspot.cli.main import cli

PAGES = ["README.md", "CHANGELOG.md", "CONTRIBUTING.md"] + [
    f"docs/{path.name}" for path in (REPO / "docs").glob("*.md")
]
TEXTS = {page: (REPO / page).read_text() for page in sorted(PAGES)}
LINT_TABLE = "test_lint_cli::test_the_table_in_the_docs_is_made_from_the_registry"
RUN_BY = {
    "make ": "test_readme::test_every_target_that_readme_names_is_in_the_makefile",
    ".venv/bin/python -m pytest": "test_quick::test_make_test_leaves_out_what_is_slow_and_ci_does_not",
    "skyspot rehearse my-task.yaml": "test_rehearse_page::test_an_example_is_what_a_rehearsal_prints",
    "skyspot rehearse --kinds": "test_rehearse::test_the_default_task_resumes_exactly_under_every_kind",
    "skyspot plan ": "test_plan::test_the_commands_of_the_page_run",
    "skyspot launch ": "test_readme::test_a_command_that_talks_to_skypilot_or_a_bucket_runs_as_far_as_it_gets_here",
    "skyspot report ": "test_report::test_the_report_as_a_terminal_shows_it",
    "skyspot rehearse examples/": "test_examples::test_an_example_is_rehearsed",
    "python tests/chaos/run.py --plants": "test_chaos::test_a_mistake_in_the_code_is_found",
    ".venv/bin/python tests/chaos/run.py --plants": "test_chaos::test_a_mistake_in_the_code_is_found",
    "python tests/chaos/stops.py --plants": "test_stop_campaign::test_a_planted_mistake_is_found_and_named",
    "python tests/chaos/stops.py": "test_stop_campaign::test_only_a_whole_campaign_is_written",
    ".venv/bin/python tests/chaos/run.py --stores": "test_chaos::test_faults_of_every_kind_are_survived",
    '.venv/bin/python -c "from skyspot.lint import rules': LINT_TABLE,
}
"""Commands on lines of their own in docs and CONTRIBUTING: how each begins, and the test that runs its kind.

test_readme.py has those of README.
"""
API = dict(
    line.removeprefix("trainer.").partition("(")[::2]
    for line in (REPO / "tests" / "golden" / "api.txt").read_text().splitlines()
)
"""The parameters of each public name, as text."""
OBJECTS = {"run": "SpotRun", "manager": "CheckpointManager"}
"""What the pages call them."""


def own_lines(page: str) -> list[str]:
    """The commands that stand on a line of their own."""
    text = re.sub(r"^## The command line\n.*?^## ", "", TEXTS[page], flags=re.M | re.S)  # A synopsis.
    lines = re.findall(r"^ {4,7}((?:make|python|skyspot|\.venv/bin/python) .*)$", text, re.M)
    return [line for line in lines if not re.match(r"skyspot +[^a-z]|skyspot/", line)]


def commands() -> Iterator[tuple[str, list[str]]]:
    """(page, words) of each command of skyspot's that a page has, in a block or in the text."""
    for page, text in TEXTS.items():
        joined = re.sub(r"\\\n", " ", text)
        blocks = "\n".join(re.findall(r"^```(?:ba|)sh\n(.*?)^```", joined, re.M | re.S))
        found = re.findall(r"^(skyspot .*)$", blocks, re.M) + re.findall(r"^ {4,}(skyspot [a-z].*)$", joined, re.M)
        found += re.findall(r"`(skyspot [a-z][^`]*)`", text)
        yield from ((page, shlex.split(line)[1:]) for line in found)


def python_blocks() -> list[tuple[str, str]]:
    return [
        (page, block)
        for page, text in TEXTS.items()
        for block in re.findall(r"^```python\n(.*?)^```", text, re.M | re.S)
    ]


@pytest.mark.parametrize("page", [page for page in TEXTS if page != "README.md"])
def test_every_command_on_a_line_of_its_own_is_of_a_kind_that_a_test_runs(page: str) -> None:
    for line in own_lines(page):
        tests = [test for begins, test in RUN_BY.items() if line.startswith(f"{begins}")]
        assert tests, f"{page}: which test runs this? {line}"
        file, _, function = tests[0].partition("::")
        assert f"\ndef {function}(" in (REPO / "tests" / f"{file}.py").read_text(), tests[0]


def test_every_command_of_skyspots_and_each_of_its_options_is_there() -> None:
    context = click.Context(cli)
    for page, words in commands():
        command = cli.get_command(context, words[0])
        assert command is not None, f"{page}: skyspot {words[0]}"
        if isinstance(command, click.Group) and len(words) > 1 and words[1].isalpha():
            command = command.get_command(context, words[1])
            assert command is not None, f"{page}: skyspot {' '.join(words[:2])}"
        options = {
            name for one in command.params if isinstance(one, click.Option) for name in (*one.opts, *one.secondary_opts)
        }
        given = {word.partition("=")[0] for word in words if re.match(r"--?[a-z]", word)}
        assert given - options - {"--help"} == set(), f"{page}: skyspot {' '.join(words)}"


def test_every_make_target_that_a_page_names_is_in_the_makefile() -> None:
    targets = set(re.findall(r"^([a-z0-9-]+):", (REPO / "Makefile").read_text(), re.M))
    for page, text in TEXTS.items():
        named = set(re.findall(r"(?:`|^ {4})make (?:[A-Z]+=\S+ )?([a-z0-9-]+)", text, re.M))
        assert named <= targets, page


def test_every_extra_that_a_page_installs_is_in_pyproject() -> None:
    extras = re.findall(
        r"^(\w+) = \[", (REPO / "pyproject.toml").read_text().partition("optional-dependencies]\n")[2], re.M
    )
    for page, text in TEXTS.items():
        named = {name for names in re.findall(r"pip install [^\n]*?\[([\w,]+)\]", text) for name in names.split(",")}
        assert named <= set(extras), page


@pytest.mark.parametrize(("page", "block"), python_blocks())
def test_the_python_of_a_page_calls_what_the_trainer_has(page: str, block: str) -> None:
    """With parameters that are there."""
    tree = ast.parse(block)
    for node in ast.walk(tree):
        if isinstance(node, ast.ImportFrom) and (node.module or "").startswith("trainer"):
            inner = f"{node.module}.".removeprefix("trainer.").removeprefix("trainer")
            assert {f"{inner}{alias.name}" for alias in node.names} <= API.keys(), page
        if isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name) and node.value.id in OBJECTS:
            assert f"{OBJECTS[node.value.id]}.{node.attr}" in API, f"{page}: {ast.unparse(node)}"
        if isinstance(node, ast.Call):
            name = ast.unparse(node.func)
            first, _, rest = name.partition(".")
            parameters = API.get(f"{OBJECTS.get(first, first)}{'.' if rest else ''}{rest}")
            if parameters is not None and "**" not in parameters:
                given = {keyword.arg for keyword in node.keywords if keyword.arg}
                assert given <= set(re.findall(r"(\w+)[=,)]", parameters)), f"{page}: {ast.unparse(node)}"


def test_an_option_and_a_name_that_are_not_there_are_found(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(TEXTS, "README.md", "`skyspot rehearse --no-such-option`\n")
    with pytest.raises(AssertionError, match="no-such-option"):
        test_every_command_of_skyspots_and_each_of_its_options_is_there()
    for wrong in ("run.stepz(loader, until=1)", "run.steps(loader, till=1)", "from trainer import SpotRum"):
        with pytest.raises(AssertionError):
            test_the_python_of_a_page_calls_what_the_trainer_has("page", wrong)

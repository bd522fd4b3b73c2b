"""The docs name what is there: files, wings, tests."""

import re
from pathlib import Path

import pytest
from support import REPO

DOCS = [REPO / "README.md", REPO / "CONTRIBUTING.md", *sorted((REPO / "docs").glob("*.md"))]
FILE = re.compile(r"(?<![\w./~<>-])(?:[\w-]+/)+[\w-]+\.(?:py|sh|md|toml|yaml\.j2)\b")
MODULE = re.compile(r"`(\w+\.py)`")


@pytest.mark.parametrize("page", DOCS, ids=lambda page: page.name)
def test_every_file_that_a_page_names_exists(page: Path) -> None:
    """By its path from the top, or from its package's folder."""
    named = set(FILE.findall(page.read_text()))
    missing = {name for name in named if not any((REPO / top / name).is_file() for top in ("", "trainer", "skyspot"))}
    assert not missing


@pytest.mark.parametrize("page", DOCS, ids=lambda page: page.name)
def test_every_module_that_a_page_names_alone_exists(page: Path) -> None:
    there = {
        path.name for top in ("skyspot", "trainer", "tests", "bench", "examples") for path in (REPO / top).rglob("*.py")
    }
    users = {"train.py", "my_script.py"}
    assert not set(MODULE.findall(page.read_text())) - there - users


def anchors(page: Path) -> set[str]:
    """Those that GitHub gives a page's headings."""
    headings = re.findall(r"^#+ (.*)$", page.read_text(), re.MULTILINE)
    return {re.sub(r"[^\w -]", "", heading.lower()).replace(" ", "-") for heading in headings}


@pytest.mark.parametrize("page", DOCS, ids=lambda page: page.name)
def test_every_link_within_the_project_leads_to_a_page_and_a_heading(page: Path) -> None:
    for link in re.findall(r"\]\(([^)\s]+)\)", re.sub(r"```.*?```", "", page.read_text(), flags=re.DOTALL)):
        path, _, anchor = link.partition("#")
        if "://" not in link:
            target = (page.parent / path).resolve() if path else page
            assert target.exists(), link
            assert not anchor or anchor in anchors(target), link


def test_design_lists_every_wing() -> None:
    design = (REPO / "docs" / "design.md").read_text()
    tree = design.partition("\n## Wings\n")[2].partition("\n\n## ")[0]
    listed = re.findall(r"^ {6}(\w+)/ ", tree, re.MULTILINE)
    wings = [path.parent.name for top in ("skyspot", "trainer") for path in (REPO / top).glob("*/__init__.py")]
    assert sorted(listed) == sorted(wings)


def test_contributing_names_every_test_file_once() -> None:
    table = (REPO / "CONTRIBUTING.md").read_text().partition("\n| wing | tests |\n")[2].partition("\n\n")[0]
    assert sorted(re.findall(r"test_\w+\.py", table)) == sorted(
        path.name for path in (REPO / "tests").glob("test_*.py")
    )


@pytest.mark.parametrize("page", ["CONTRIBUTING.md", "docs/design.md"])
def test_every_name_that_a_page_gives_is_in_the_code(page: str) -> None:
    code = "\n".join(path.read_text() for top in ("skyspot", "trainer", "tests") for path in (REPO / top).rglob("*.py"))
    names = set(re.findall(r"`(_?[A-Za-z]\w+)`", (REPO / page).read_text()))
    assert not {name for name in names if not re.search(rf"\b{name}\b", code)}

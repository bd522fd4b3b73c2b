"""The page of a report, looked at in headless Chromium: requests, console, width, contrast; what records may say."""

import html
import json
import math
import os
import re
import stat
import subprocess
import sys
from collections.abc import Callable, Iterator
from dataclasses import replace
from html.parser import HTMLParser
from pathlib import Path

import chromium
import pytest
from chromium import PAPER, PHONE, SCREEN, Browser, Page
from click.testing import CliRunner
from console import in_process
from crafted import NOON, CraftedAttempt, final, three_attempts
from crafted_training import training
from report_picture import HEIGHT, draw
from support import REPO, clean_env

from skyspot.cli.report import report as command
from skyspot.money.prices import Price
from skyspot.money.report import Given, Report, report_of
from skyspot.money.timeline import timeline_of
from skyspot.page.costs import costs_of
from skyspot.page.curves import MOST_POINTS, curves_of
from skyspot.page.page import page
from skyspot.runs.records import RunRecords, read_records
from trainer.layout.names import RunPaths

LATER = NOON + 1e7
HOSTILE = (
    "<script>alert(1)</script>\"'>]]>--></title></style><svg onload=alert(2)>$x_1$ \u05d0\u05d1\u202e{{ 7*7 }}&amp;"
)
needs_browser = pytest.mark.skipif(chromium.missing() is not None, reason=str(chromium.missing()))


@pytest.fixture(scope="module")
def browser() -> Iterator[Browser]:
    with chromium.browser() as found:
        yield found


def reported(root: Path, now: float = LATER, **given: object) -> tuple[Report, RunRecords]:
    records = read_records(RunPaths(root))
    return report_of(records, Given(**{"now": now, "prices": {}, "waits": {}, **given})), records  # type: ignore[arg-type]


def page_of(root: Path, now: float = LATER, **given: object) -> str:
    return page(*reported(root, now, **given), now)


Open = Callable[..., Page]


@pytest.fixture
def shown(browser: Browser, tmp_path: Path) -> Iterator[Open]:
    """Opens HTML in the browser."""
    opened = []

    def open_page(text: str, width: int = SCREEN, **how: object) -> Page:
        path = tmp_path / "page.html"
        path.write_text(text, encoding="utf-8")
        opened.append(browser.open(path.as_uri(), width, **how))  # type: ignore[arg-type]
        return opened[-1]

    yield open_page
    for one in opened:
        one.close()


@pytest.fixture(scope="module")
def usual(tmp_path_factory: pytest.TempPathFactory) -> str:
    return page_of(training(tmp_path_factory.mktemp("usual") / "run-001"))


def faults(found: Page) -> list[str]:
    """What is wrong with a page."""
    wrong = [f"complains: {one}" for one in found.complaints]
    wrong += [f"asks for {url}" for url in found.requests[1:]]
    overflow = found.value("document.documentElement.scrollWidth")
    wrong += [f"is {overflow} px wide"] if overflow > found.width else []
    return wrong + [f"faint: {one}" for one in found.faint_texts()]


WAYS = [
    (PHONE, False, "screen"), (PHONE, True, "screen"), (SCREEN, False, "screen"), (SCREEN, True, "screen"),
    (PAPER, True, "print"),
]  # fmt: skip


@needs_browser
@pytest.mark.parametrize(("width", "dark", "media"), WAYS)
def test_the_page_asks_for_nothing_fits_its_window_and_can_be_read(
    shown: Open, usual: str, width: int, dark: bool, media: str
) -> None:
    assert faults(shown(usual, width, dark=dark, media=media)) == []


LONG = "a row that is much wider than a phone, and cannot be broken"
FAULTS = {
    "a font from elsewhere": (
        "<style>", "<link rel=stylesheet href='http://fonts.example.com/css?family=Inter'><style>", "asks for http://fonts",
    ),
    "a picture from elsewhere": ("<main>", "<main><img alt='' src='http://example.com/x.png'>", "complains"),
    "a script": ("<main>", "<main><script>console.log(1)</script>", "complains"),
    "a wide table": ("<main>", f"<main><table><td style='white-space: nowrap'>{LONG}</table>", "px wide"),
    "pale grey text": ("--muted: #57606a", "--muted: #b0b0b0", "faint"),
    "pale grey text of a plot": (".plot svg text {", ".plot svg text { fill: #c8c8c8 !important;", "faint"),
}  # fmt: skip


@needs_browser
@pytest.mark.parametrize("fault", FAULTS)
def test_a_planted_fault_of_the_page_is_found(shown: Open, usual: str, fault: str) -> None:
    before, after, found = FAULTS[fault]
    assert before in usual
    planted = usual.replace(before, after, 1)
    if "asks for" in found:  # The page's own policy would stop it first.
        planted = re.sub(r"<meta http-equiv=[^\n]*", "", planted)
    assert any(found in one for one in faults(shown(planted, PHONE)))


@needs_browser
def test_in_the_dark_the_page_is_dark_and_on_paper_it_is_light(shown: Open, usual: str) -> None:
    def brightness(**how: object) -> float:
        found = shown(usual, **how)
        values = re.findall(r"\d+", found.value("getComputedStyle(document.body).backgroundColor"))
        return sum(map(int, values[:3])) / 3

    assert brightness() > 240
    assert brightness(dark=True) < 40
    assert brightness(dark=True, media="print") > 240
    assert shown(usual, media="print").pdf().startswith(b"%PDF")


@needs_browser
def test_a_plot_takes_its_colours_from_the_page(shown: Open, usual: str) -> None:
    script = (
        "[...document.querySelectorAll('.plot svg *')].flatMap((one) => ['fill', 'stroke'].map((name) => "
        "getComputedStyle(one)[name])).filter((one, at, all) => one !== 'none' && all.indexOf(one) === at)"
    )
    light, dark = (
        {one for one in shown(usual, dark=dark).value(script) if "url(" not in one} for dark in (False, True)
    )
    assert len(light) >= 10
    assert light & dark <= {"rgb(0, 0, 0)"}, "black is what a group has that nothing is drawn with"
    assert not re.search(r"#0101[0-9a-f]{2}", usual), "a colour that stands for another"


@needs_browser
def test_the_order_of_reading_is_that_of_the_page_and_the_keyboard_reaches_what_opens(shown: Open, usual: str) -> None:
    found = shown(usual)
    levels = found.value("[...document.querySelectorAll('h1, h2, h3')].map((one) => Number(one.tagName[1]))")
    assert levels[0] == 1
    assert set(levels[1:]) == {2}
    assert found.value("[...document.querySelectorAll('[tabindex]')].length") == 0
    focused = "(one) => { one.focus(); return document.activeElement === one }"
    assert found.value(f"[...document.querySelectorAll('summary')].every({focused})")
    assert found.value("document.querySelectorAll('summary').length") == 4
    names = found.value(
        "[...document.querySelectorAll('[role=img]')].map((one) => one.getAttribute('aria-labelledby').split(' ').map("
        "(id) => document.getElementById(id).textContent).join(': '))"
    )
    assert len(names) == 6
    assert all(len(one) > 40 for one in names)
    twice = (
        "[...document.querySelectorAll('[id]')].map((one) => one.id).filter((id, at, all) => all.indexOf(id) !== at)"
    )
    assert found.value(twice) == []
    assert found.value(
        "[...document.querySelectorAll('[href]')].every((one) => document.querySelector(one.getAttribute('href')))"
    )


# -- what a record says ------------------------------------------------------------------------------------------------


class Tags(HTMLParser):
    """The elements of a page, and the attributes that a browser acts on."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.tags: list[str] = []
        self.acting: list[str] = []
        self.feed(text)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        self.acting += [
            name
            for name, value in attrs
            if name.startswith("on") or (name in ("src", "href") and (value or "")[:1] != "#")
        ]


def hostile_run(root: Path) -> Path:
    one = CraftedAttempt(root, 1, NOON)
    place = dict.fromkeys(("cloud", "region", "zone", "instance_type", "accelerator"), HOSTILE)
    one.start(launch=HOSTILE, place={**place, "usd_per_hour": 1.0, "on_demand_usd_per_hour": 3.0})
    one.restored(0, 1)
    one.steps(1, 20, 4, **{HOSTILE: 1})
    one.event("notice", 44, kind=HOSTILE)
    one.end(46, HOSTILE, 75, step=20, notice={"kind": HOSTILE})
    (one.folder / "0009-x.json").write_text("{")
    return root


@needs_browser
def test_whatever_a_run_is_called_it_is_text(shown: Open, tmp_path: Path) -> None:
    report, records = reported(hostile_run(tmp_path / "run"))
    report = replace(report, root=f"s3://bucket/{HOSTILE.replace('/', '|')}", notes=(*report.notes, HOSTILE))
    found = shown(page(report, records, LATER), PHONE)
    assert faults(found) == []
    assert found.value("document.querySelectorAll('script, img, iframe, object, [onload]').length") == 0
    assert found.value("document.title").startswith("<script>alert(1)<|script>")
    assert "\\u202e{{ 7*7 }}&amp;" in found.value("document.querySelector('h1').textContent"), "as it is, not undone"
    assert "<script>alert(1)</script>" in found.value("document.querySelector('#notes').textContent")
    assert found.value("[...document.querySelectorAll('h1 bdi, .rows bdi')].length") > 5, (
        "it turns no other text around"
    )


def test_what_is_not_escaped_is_found(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The same page without escaping has a script; ours has no element that a browser acts on."""
    import jinja2

    text = page_of(hostile_run(tmp_path))
    assert not {"script", "img", "iframe", "link", "base", "form"} & set(Tags(text).tags)
    assert Tags(text).acting == []
    plain = jinja2.Environment
    monkeypatch.setattr(jinja2, "Environment", lambda **given: plain(**{**given, "autoescape": False}))
    assert "script" in Tags(page_of(tmp_path)).tags


# -- all kinds of runs -------------------------------------------------------------------------------------------------


def one_attempt(root: Path) -> Path:
    one = CraftedAttempt(root, 1, NOON)
    one.start()
    one.restored(0, 1)
    one.step(1, 4)
    return root


def without_steps(root: Path) -> Path:
    for number in (1, 2):
        one = CraftedAttempt(root, number, NOON + 100 * number)
        one.start()
        one.end(50, "signal" if number == 1 else "finished", 75 if number == 1 else 0)
    return root


def just_begun(root: Path) -> Path:
    CraftedAttempt(root, 1, NOON).start()
    return root


def torn(root: Path) -> Path:
    attempts = three_attempts(root)
    start = next(attempts[0].folder.glob("*-start.json"))
    start.write_bytes(start.read_bytes()[:40])
    next(attempts[2].folder.glob("*-end.json")).write_bytes(b"")
    with attempts[1].metrics.open("ab") as file:
        file.write(b'{"step": 18, "lo')
    return root


@pytest.mark.parametrize(
    ("is_finished", "said"), [(True, "cost USD 0.33; what"), (False, "cost USD 0.33 so far; what")]
)
def test_a_page_says_so_far_of_a_run_that_may_go_on(tmp_path: Path, is_finished: bool, said: str) -> None:
    one = CraftedAttempt(tmp_path, 1, NOON)
    one.start()
    one.end(3600, "finished" if is_finished else "hang", 0 if is_finished else 75)
    if is_finished:
        final(tmp_path)
    name = str(read_records(RunPaths(tmp_path)).attempts[0].name)
    assert said in page_of(tmp_path, prices={name: Price(0.33, None, "--prices")})


def odd_losses(root: Path) -> Path:
    one = CraftedAttempt(root, 1, NOON)
    one.start()
    one.restored(0, 1)
    for step in range(1, 30):
        one.step(step, 2.0 * step + 2, loss=(None, 5.0, -1e300, 1e300, 0.001, math.nan)[step % 6])
    one.saved(29, 62)
    one.end(63, "error", 1, step=29, committed_step=29)
    return root


def hundreds(root: Path) -> Path:
    return training(root, attempts=200, steps=6000)


def running(root: Path) -> Path:
    return training(root, is_finished=False)


RUNS = [
    (one_attempt, LATER, "1 attempt, 0 preemptions"),
    (without_steps, LATER, "No attempt recorded a step"),
    (just_begun, LATER, "no price is known"),
    (torn, LATER, "a0001-000001: 0001-start.json is torn."),
    (odd_losses, LATER, "without a finite loss are left out"),
    (running, 0.0, "The run was training when this page was written."),
    pytest.param(hundreds, LATER, "The whole run in 12 rows of", marks=pytest.mark.slow),
]


@needs_browser
@pytest.mark.parametrize(("make", "now", "says"), RUNS)
def test_every_kind_of_run_has_a_page_that_can_be_read(
    shown: Open, tmp_path: Path, make: Callable[[Path], object], now: float, says: str
) -> None:
    make(tmp_path / "run")
    text = page(*reported(tmp_path / "run", now), LATER)
    assert says in text
    assert len(text) < 1_500_000
    assert faults(shown(text, PHONE, dark=True)) == []


@pytest.mark.slow
@pytest.mark.parametrize("steps", [4_000, pytest.param(100_000, marks=pytest.mark.slow)])
def test_a_very_long_run_is_thinned_and_the_page_says_so(tmp_path: Path, steps: int) -> None:
    training(tmp_path, steps=steps, step_s=1.0, attempts=5, save_every=steps // 5, evaluate_every=0)
    report, records = reported(tmp_path)
    curve = curves_of(records, report).loss
    assert len(curve.points) <= MOST_POINTS
    values = [line.loss for one in records.attempts for line in one.lines if line.loss is not None]
    assert max(one.high for one in curve.points) == max(values), "no peak is lost"
    text = page(report, records, LATER)
    assert f"Each point is the mean of {steps // 400} steps; the band spans their losses." in text
    assert len(text) < 1_500_000


def test_the_costs_end_where_the_reports_figures_are(tmp_path: Path) -> None:
    report, records = reported(training(tmp_path))
    costs = costs_of(timeline_of(records, report), report)
    assert costs.spent[-1] == (pytest.approx(report.times.total), pytest.approx(report.spend.usd))
    assert costs.on_demand[-1][1] == pytest.approx(report.spend.on_demand_usd)
    assert report.spend.saving
    assert report.spend.saving > 0.5
    three_attempts(tmp_path / "unpriced")
    report, records = reported(tmp_path / "unpriced")
    costs = costs_of(timeline_of(records, report), report)
    assert (costs.unit, costs.spent[-1][1]) == ("node-hours", pytest.approx(report.spend.node_hours))
    assert costs.on_demand[-1][1] == pytest.approx(report.spend.on_demand_node_hours)
    report, records = reported(tmp_path / "unpriced", prices={"a0001-000001": Price(1.0, None, "--prices")})
    assert costs_of(timeline_of(records, report), report).on_demand == ()


def test_the_page_has_all_that_the_terminal_shows(tmp_path: Path) -> None:
    training(tmp_path / "run")
    done = CliRunner(env={"COLUMNS": "300"}).invoke(
        command, [str(tmp_path / "run"), "--html", str(tmp_path / "page.html")]
    )
    assert done.exit_code == 0, done.output
    text = " ".join(html.unescape(re.sub(r"<[^>]+>", " ", (tmp_path / "page.html").read_text())).split())
    terminal = re.sub(r"^Timeline.*?^Goodput", "Goodput", done.output, flags=re.M | re.S).replace(str(tmp_path), "")
    figures = [word for word in terminal.split() if re.search(r"\d", word)]
    assert len(figures) > 60
    assert [word for word in figures if word not in text] == []


# -- the file ----------------------------------------------------------------------------------------------------------


def test_the_page_is_written_whole_and_replaces_an_older_one(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    just_begun(tmp_path / "run")
    skyspot, file = in_process(monkeypatch, capsys), tmp_path / "page.html"
    file.write_text("older")
    older = file.stat().st_ino
    code, out, err = skyspot("report", str(tmp_path / "run"), "--html", str(file))
    assert (code, err, out.splitlines()[-1]) == (0, "", f"Page: {file}")
    assert file.read_text().startswith("<!doctype html>")
    assert file.stat().st_ino != older, "whoever reads the older one, reads it to its end"
    assert stat.S_IMODE(file.stat().st_mode) == 0o644
    assert [path.name for path in tmp_path.iterdir() if path.name.startswith(".")] == []
    link = tmp_path / "link.html"
    link.symlink_to(file)
    code, out, err = skyspot("report", str(tmp_path / "run"), "--json", "--html", str(link))
    assert (code, len(json.loads(out)["attempts"]), err) == (0, 1, f"Page: {link}\n")
    assert link.is_symlink()


def test_a_page_that_cannot_be_written_is_said_in_a_line_before_the_run_is_read(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    skyspot = in_process(monkeypatch, capsys)

    def error(path: Path, code: int) -> str:
        found = skyspot("report", str(tmp_path / "no-run"), "--html", str(path))
        assert (found[0], found[1], len(found[2].splitlines())) == (code, "", 1), found
        return found[2]

    assert "there is no folder" in error(tmp_path / "missing" / "page.html", 2)
    assert "is a folder. Name a file" in error(tmp_path, 2)
    assert "is a device. Name a file" in error(Path("/dev/null"), 2)
    assert Path("/dev/null").is_char_device()
    monkeypatch.setattr("os.access", lambda path, mode: False)
    assert "may not be written to. Name another folder" in error(tmp_path / "page.html", 1)


def test_a_full_disk_leaves_the_older_page_and_a_line(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    just_begun(tmp_path / "run")
    file = tmp_path / "page.html"
    file.write_text("older")
    (tmp_path / f".page.html.{os.getpid()}").mkdir()  # Nothing can be written under this name.
    code, _, err = in_process(monkeypatch, capsys)("report", str(tmp_path / "run"), "--html", str(file))
    assert (code, file.read_text()) == (1, "older")
    assert "cannot be written: Is a directory" in err


def test_without_matplotlib_a_line_says_how_to_get_it(tmp_path: Path) -> None:
    just_begun(tmp_path / "run")
    code = (
        "import importlib.util as util, sys\n"
        "find = util.find_spec\n"
        "util.find_spec = lambda name, *more: None if name == 'matplotlib' else find(name, *more)\n"
        "from skyspot.cli.main import main\n"
        f"sys.argv = ['skyspot', 'report', {str(tmp_path / 'run')!r}, *sys.argv[1:]]\n"
        "main()"
    )
    run = [sys.executable, "-c", code]
    done = subprocess.run(
        [*run, "--html", str(tmp_path / "page.html")], capture_output=True, text=True, env=clean_env()
    )
    assert (done.returncode, done.stdout) == (1, "")
    assert done.stderr == (
        "Error: the page's plots need matplotlib, which is not installed: pip install 'skyspot[report]'\n"
    )
    done = subprocess.run(run, capture_output=True, text=True, env=clean_env())
    assert (done.returncode, done.stderr) == (0, ""), "the terminal needs none"


# -- its picture in README ---------------------------------------------------------------------------------------------


@needs_browser
def test_the_picture_in_readme_is_drawn_by_its_script(browser: Browser, tmp_path: Path) -> None:
    picture = REPO / "docs" / "images" / "report.png"
    assert "](docs/images/report.png)" in (REPO / "README.md").read_text()
    assert picture.stat().st_size < 150_000
    drawn = draw(browser, tmp_path / "report.png")
    size = [int.from_bytes(drawn.read_bytes()[at : at + 4]) for at in (16, 20)]
    assert size == [SCREEN, HEIGHT]
    assert size == [int.from_bytes(picture.read_bytes()[at : at + 4]) for at in (16, 20)]
    assert drawn.stat().st_size < 150_000

"""What keeps the tests quick, and says what they did not show."""

import importlib
import os
import subprocess
import sys
import threading
import time
from pathlib import Path
from types import ModuleType, SimpleNamespace

import budget
import longest_first
import pytest
import shared
import skips
from needs import NOT_HERE
from support import REPO, clean_env

pytest_plugins = ["pytester"]
INI = "[pytest]\nmarkers =\n    slow: x\nfilterwarnings =\n    error\n"


class Clock:
    """A quiet clock that a test sets."""

    def __init__(self) -> None:
        self.at = 0.0

    def now(self) -> float:
        return self.at

    def stop(self) -> None:
        pass


def results(pytester: pytest.Pytester, source: str, *plugins: object) -> pytest.RunResult:
    """Run a test file in this process."""
    pytester.makeini(INI)
    pytester.makepyfile(source)
    return pytester.runpytest_inprocess("-p", "no:xdist", "-p", "no:cacheprovider", "-rfE", plugins=plugins)


def test_a_test_that_takes_too_long_fails_unless_it_is_slow_and_what_is_built_for_all_is_free(
    pytester: pytest.Pytester, monkeypatch: pytest.MonkeyPatch
) -> None:
    clock = Clock()
    watched = budget.Budget(clock)  # type: ignore[arg-type]
    monkeypatch.setattr(shared, "not_counted", watched.building)
    monkeypatch.setattr(pytest, "clock", clock, raising=False)
    done = results(pytester, """
        import pytest, shared
        from pytest import clock

        def take(seconds):
            clock.at += seconds

        @pytest.fixture(scope="session")
        def built():
            take(100)
            yield
            take(100)

        @pytest.fixture(scope="module")
        def upon(built):
            yield
            take(100)

        @pytest.fixture
        def prepared():
            take(6)

        @pytest.fixture
        def tidied(upon):
            yield
            take(7)

        def test_quick(built): take(9)
        def test_long(): take(11)
        def test_long_once(prepared, times=iter((5, 3))): take(next(times))
        def test_long_and_then_wrong(ends=iter((True, False))):
            take(11)
            assert next(ends)
        def test_long_with_its_fixture(prepared): take(5)
        def test_long_to_tidy(tidied): take(6)
        @pytest.mark.slow
        def test_slow(): take(11)
        def test_builds(tmp_path_factory):
            with shared.not_counted():
                take(50)
                shared.built_once(tmp_path_factory, "x", lambda folder: take(50))
            take(1)
        def test_fails():
            take(11)
            assert False
        def test_last(upon): take(9)
    """, watched)  # fmt: skip
    done.assert_outcomes(passed=5, failed=5)
    done.stdout.fnmatch_lines(["*test_long_to_tidy took 13 s, *"])
    done.stdout.fnmatch_lines(["*test_long took 11 s, and a test that is not slow may take 10: *"])
    done.stdout.fnmatch_lines(["*test_long_with_its_fixture took 11 s, *"])
    done.stdout.no_fnmatch_line("*test_fails took*")
    done.stdout.no_fnmatch_line("*test_long_and_then_wrong took*")


def test_these_tests_are_watched(request: pytest.FixtureRequest) -> None:
    plugins = request.config.pluginmanager.get_plugins()
    assert skips in plugins
    assert longest_first in plugins
    [watched] = [plugin for plugin in plugins if isinstance(plugin, budget.Budget)]
    assert shared.not_counted == watched.building
    assert isinstance(watched._clock, budget.QuietClock)
    assert "--durations" in request.config.getini("addopts"), "the slowest tests are printed"


def test_the_longest_tests_begin_first_on_every_worker(pytester: pytest.Pytester) -> None:
    # Workers get parts of 3, 4 and 4 tests.
    assert longest_first.dealt([90, 60, 40, 10], list("abcdefg"), 3) == [90, 10, *"a", 60, *"bcd", 40, *"efg"]
    assert longest_first.dealt([4, 3, 2, 1], [], 3) == [4, 1, 3, 2]
    pytester.makeini(INI)
    source = "def test_a(): pass\n@slow\ndef test_b(): pass\n@slow(40)\ndef test_c(): pass\ndef test_d(): pass\n"
    items = pytester.getitems(f"import pytest\nslow = pytest.mark.slow\n{source}")
    longest_first.pytest_collection_modifyitems(SimpleNamespace(workerinput={"workercount": 2}), items)  # type: ignore[arg-type]
    assert [item.name for item in items] == ["test_c", "test_a", "test_b", "test_d"]


def test_a_second_of_a_busy_machine_counts_as_the_part_that_a_process_gets() -> None:
    clock = budget.QuietClock()
    clock.stop()
    clock._cores, clock._seconds, clock._looked = 2, 0.0, 100.0
    for now, wanted, counted in ((101.0, 0, 1.0), (102.0, 2, 2.0), (104.0, 4, 3.0), (108.0, 8, 4.0), (118.0, 9, 4.0)):
        clock.passed(now, wanted)
        assert clock.now() == pytest.approx(counted)


def test_the_clock_goes_on_by_itself(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(budget, "runnable", lambda: 0)  # On an overloaded machine it would stand still.
    clock = budget.QuietClock()
    end = time.monotonic() + 30
    while clock.now() == 0:
        assert time.monotonic() < end
        time.sleep(0.01)
    clock.stop()


SKIPPED = f"""
    import pytest
    def test_a(): pytest.skip("FUSE mounts: apt install fuse3")
    @pytest.mark.skipif(True, reason="FUSE mounts: apt install fuse3")
    def test_b(): pass
    def test_c(): pytest.skip("uv: {NOT_HERE}: no network")
    @pytest.mark.xfail
    def test_d(): assert False
"""


def test_what_was_skipped_stands_in_the_last_lines(pytester: pytest.Pytester, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("CI", raising=False)
    done = results(pytester, SKIPPED, skips)
    done.assert_outcomes(skipped=3, xfailed=1)
    assert done.ret == 0
    assert "not tested" in done.outlines[-5]
    assert done.outlines[-4:-2] == ["FUSE mounts: apt install fuse3 (2 tests)", f"uv: {NOT_HERE}: no network (1 test)"]


@pytest.mark.parametrize("ci", ["true", "1"])
def test_in_ci_what_could_have_been_tested_and_was_not_is_a_failure(
    pytester: pytest.Pytester, monkeypatch: pytest.MonkeyPatch, ci: str
) -> None:
    monkeypatch.setenv("CI", ci)
    done = results(pytester, SKIPPED, skips)
    done.assert_outcomes(failed=1, errors=1, skipped=1, xfailed=1)
    assert done.ret == 1
    done.stdout.fnmatch_lines(
        ["*would be skipped, and in CI every guarantee is tested: FUSE mounts: apt install fuse3"]
    )


@pytest.fixture
def install(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    """What `make e2e` needs of the machine."""
    monkeypatch.syspath_prepend(REPO / "tests" / "e2e")
    return importlib.import_module("install")


@pytest.mark.parametrize(
    ("system", "user", "tools", "expected"),
    [
        ("darwin", 0, {}, f"{NOT_HERE}: Linux is needed"),
        ("linux", 0, {"unshare": 1, "nsenter": 0, "setpriv": 0, "ip": 0}, f"{NOT_HERE}: namespaces, a bridge and veth"),
        ("linux", 1000, {"unshare": 1, "nsenter": 0, "setpriv": 0, "ip": 0}, f"{NOT_HERE}: root is needed"),
        ("linux", 0, {"unshare": 0, "nsenter": 0, "setpriv": 0}, "apt install util-linux iproute2"),
    ],
)
def test_e2e_skips_as_expected_only_what_no_remedy_brings(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    install: ModuleType,
    system: str,
    user: int,
    tools: dict[str, int],
    expected: str,
) -> None:
    for tool, code in tools.items():
        (tmp_path / tool).write_text(f"#!/bin/sh\nexit {code}\n")
        (tmp_path / tool).chmod(0o755)
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.setattr(sys, "platform", system)
    monkeypatch.setattr(os, "geteuid", lambda: user)
    reason = install.missing()
    assert reason.startswith(expected)
    assert skips.is_expected(f"SkyPilot on Slurm: {reason}") == expected.startswith(NOT_HERE)


def test_a_package_that_e2e_cannot_get_is_no_expected_skip(install: ModuleType) -> None:
    with pytest.raises(install.Unavailable, match=r"`false \.\.\.` failed: exit 1") as failed:
        install._get("false")
    assert not skips.is_expected(f"SkyPilot on Slurm: {failed.value}")


@pytest.mark.parametrize("ci", ["", "true"])
def test_make_e2e_without_what_it_needs_fails_in_ci_alone(tmp_path: Path, ci: str) -> None:
    """Nothing is on PATH, so `unshare` is missing; without root, which is looked for first, it is skipped in CI too."""
    fails = bool(ci) and os.geteuid() == 0
    done = subprocess.run(
        [sys.executable, "tests/e2e/run.py", "tests/e2e/test_ended.py"],
        cwd=REPO, env=clean_env(CI=ci, PATH=str(tmp_path), PYTEST_ADDOPTS=""),
        capture_output=True, text=True, timeout=120,
    )  # fmt: skip
    assert done.returncode == fails, done.stdout + done.stderr
    assert ("would be skipped, and in CI every guarantee is tested: SkyPilot on Slurm: " in done.stdout) == fails
    assert ("\nSkyPilot on Slurm: " in done.stdout) != fails


def test_e2es_downloads_need_no_packages_and_what_is_missing_is_said_later(tmp_path: Path) -> None:
    """`make -j` starts them beside those of the virtual environment. Nothing is on PATH, so nothing is downloaded."""
    done = subprocess.run(
        [sys.executable, "-S", "tests/e2e/run.py", "--install"],
        cwd=REPO, env=clean_env(CI="true", PATH=str(tmp_path)), capture_output=True, text=True, timeout=120,
    )  # fmt: skip
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")


def test_what_workers_share_is_built_by_one_and_again_where_that_failed(
    tmp_path_factory: pytest.TempPathFactory, tmp_path: Path
) -> None:
    class Factory:
        def getbasetemp(self) -> Path:
            return tmp_path / "popen-gw0"

    (tmp_path / "popen-gw0").mkdir()
    built = []

    def fail(folder: Path) -> None:
        (folder / "torn").touch()
        raise ValueError

    def build(folder: Path) -> None:
        built.append(list(folder.iterdir()))
        time.sleep(0.1)
        (folder / "file").touch()

    with pytest.raises(ValueError):  # noqa: PT011
        shared.built_once(Factory(), "name", fail)  # type: ignore[arg-type]
    found = []
    threads = [
        threading.Thread(target=lambda: found.append(shared.built_once(Factory(), "name", build))) for _ in "abc"
    ]  # type: ignore[arg-type]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert built == [[]]
    assert found == [tmp_path / "shared-name"] * 3
    assert [path.name for path in found[0].iterdir()] == ["file"]


def test_make_test_leaves_out_what_is_slow_and_ci_does_not() -> None:
    makefile, ci = (REPO / "Makefile").read_text(), (REPO / ".ci" / "run").read_text()
    assert '-m "not slow"' in makefile.partition("\ntest:")[2].partition("\n\n")[0]
    assert "slow" not in makefile.partition("\ntest-all:")[2].partition("\n\n")[0]
    commands = [line for line in ci.splitlines() if not line.startswith("#")]
    assert [line for line in commands if line.startswith("make")] == ["make -j2 lint e2e", "make test-all"]
    assert "set -euo pipefail" in commands

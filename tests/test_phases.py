"""A stop in each phase of an attempt, and by each way in which it can come: the list of tests, and some of them."""

from __future__ import annotations

import re
import shlex
import signal
import subprocess
import sys
import threading
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import in_process
import one_rank
import pytest
import torch
from support import PROGRAMS, REPO, clean_env, event, mlp
from torch.utils.data import DataLoader, Dataset

from trainer import SpotRun
from trainer.checkpoint import pruning, saving
from trainer.notices import watcher

IN = {
    "import": "test_notice::test_a_sigterm_while_torch_is_imported_is_heard",
    "rendezvous": "test_nodes::test_a_signal_before_the_first_step_ends_all_machines",
    "download": "test_hub::test_a_data_set_of_the_hub_is_prepared_and_later_attempts_do_not_need_the_hub",
    "data preparation": "test_notice::test_an_attempt_that_is_noticed_before_its_first_step_holds_too",
    "first batch": "test_phases::test_a_stop_in_the_first_batch_saves_the_first_step",
    "torch.compile": "test_phases::test_a_stop_while_the_model_is_compiled_saves_the_first_step",
    "micro-steps": "test_fit::test_a_step_of_60_s_in_20_micro_steps_and_a_notice_of_30_s",
    "evaluation, a save under way, a read-back": "test_exact::test_sigterm_loses_no_step",
    "pruning": "test_phases::test_a_stop_while_older_checkpoints_are_pruned_loses_no_step",
    "last step": "test_exact::test_a_stop_in_the_last_step_costs_neither_the_last_evaluation_nor_another_attempt",
    "export": "test_bucket_fails::test_a_bucket_that_fails_at_the_export",
}
BY = {
    "SIGTERM to the launcher": "test_exact::test_sigterm_loses_no_step",
    "SIGTERM to the process group": "test_launch::test_a_signal_reaches_every_rank_once",
    "SIGTERM to one rank": "test_phases::test_a_sigterm_to_one_rank_of_two_stops_both_at_one_boundary",
    "SIGTERM to all, a shell in front": "test_phases::test_a_sigterm_to_a_shell_and_all_beneath_it_loses_no_step",
    "SIGKILL or an exception of one rank": "test_faults::test_a_rank_that_dies_costs_the_attempt_and_a_bug_ends_it",
    "SIGSTOP to one rank": "test_faults::test_a_rank_that_is_frozen_costs_the_attempt_and_not_the_run",
    "a second notice": "test_notice::test_a_sigterm_beside_a_notice_changes_neither_deadline_nor_save",
    "a second SIGTERM": "test_phases::test_a_second_sigterm_changes_nothing",
}


@pytest.mark.parametrize("test", sorted({*IN.values(), *BY.values()}))
def test_each_phase_and_each_way_has_its_test(test: str) -> None:
    file, _, function = test.partition("::")
    assert re.search(rf"^def {function}\(", (REPO / "tests" / f"{file}.py").read_text(), re.MULTILINE)


class Rows(Dataset[torch.Tensor]):
    """Rows; the first one that is loaded calls `loaded`."""

    def __init__(self, loaded: Callable[[], None] = lambda: None) -> None:
        self.loaded: Callable[[], None] | None = loaded

    def __len__(self) -> int:
        return 32

    def __getitem__(self, index: int) -> torch.Tensor:
        loaded, self.loaded = self.loaded, None
        if loaded:
            loaded()
        return torch.full((2,), index / 32)


def loop(run: SpotRun, rows: Rows, wrapped: Callable[[torch.nn.Module], Any] = lambda model: model) -> None:
    model = torch.nn.Linear(2, 1)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    run.register(model=model, optimizer=optimizer)
    called = wrapped(model)
    for batch in run.steps(DataLoader(rows, batch_size=2), until=10):
        called(batch).sum().backward()
        optimizer.step()
        optimizer.zero_grad()
    run.finish()


def stop() -> None:
    in_process.stop()


def test_a_stop_in_the_first_batch_saves_the_first_step(tmp_path: Path) -> None:
    attempts = in_process.Attempts(tmp_path / "run")
    assert attempts.one(lambda run, strike: loop(run, Rows(stop))) == 75
    assert event(tmp_path / "run", "end")["committed_step"] == 1
    assert attempts.one(lambda run, strike: loop(run, Rows())) == 0
    assert event(tmp_path / "run", "restored")["lost_steps"] == 0


def test_a_stop_while_the_model_is_compiled_saves_the_first_step(tmp_path: Path) -> None:
    def compiled(model: torch.nn.Module) -> Any:
        def backend(graph: Any, _: object) -> Any:
            stop()
            return graph.forward

        return torch.compile(model, backend=backend)

    attempts = in_process.Attempts(tmp_path / "run")
    assert attempts.one(lambda run, strike: loop(run, Rows(), compiled)) == 75
    assert event(tmp_path / "run", "end")["committed_step"] == 1


def test_a_stop_in_the_first_batch_of_train_ends_it_before_the_first_step(tmp_path: Path) -> None:
    class Samples(one_rank.Numbers):
        def batch(self, ids: Any) -> torch.Tensor:
            if not self.asked:
                stop()
            return super().batch(ids)

    assert one_rank.train(tmp_path / "run", samples=Samples()).code == 75
    ended = event(tmp_path / "run", "end")
    assert (ended["cause"], ended["committed_step"]) == ("signal", None)


def test_a_stop_while_older_checkpoints_are_pruned_loses_no_step(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pruning_now, stopped = threading.Event(), threading.Event()
    runs: list[one_rank.InProcess] = []
    delete = pruning.delete

    def held(*args: Any) -> Any:
        pruning_now.set()
        assert stopped.wait(60)
        return delete(*args)

    def loss(model: torch.nn.Module, batch: torch.Tensor) -> torch.Tensor:
        if runs[0].steps_done == 5 and not runs[0].notices.received.is_set():
            assert pruning_now.wait(60)
            stop()
            assert runs[0].notices.received.wait(60)
        return one_rank.squares(model, batch)

    monkeypatch.setattr(pruning, "delete", held)
    settings = {"save_interval_steps": 1, "keep_latest": 2, "max_steps": 9}
    assert one_rank.train(tmp_path / "run", loss=loss, before=runs.append, **settings).code == 75
    stopped.set()
    assert event(tmp_path / "run", "end")["committed_step"] == 6


def test_the_last_save_is_recorded_before_a_stop_ends(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    runs: list[one_rank.InProcess] = []
    record = saving.record

    def slow(*args: Any, **fields: Any) -> Any:
        threading.Event().wait(0.2)  # As on a busy machine; the attempt would be over meanwhile.
        return record(*args, **fields)

    def loss(model: torch.nn.Module, batch: torch.Tensor) -> torch.Tensor:
        if runs[0].steps_done == 3 and not runs[0].notices.received.is_set():
            stop()
        return one_rank.squares(model, batch)

    monkeypatch.setattr(saving, "record", slow)
    assert one_rank.train(tmp_path / "run", loss=loss, before=runs.append, save_interval_steps=100).code == 75
    assert event(tmp_path / "run", "saved")["step"] == event(tmp_path / "run", "end")["committed_step"] == 4


def test_a_second_sigterm_changes_nothing(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """It comes while the last boundary is saved."""
    runs: list[one_rank.InProcess] = []

    def begun(run: one_rank.InProcess) -> None:
        runs.append(run)
        print_line = run.print_line

        def printed(text: str) -> None:
            if "saving step" in text:
                stop()
            print_line(text)

        run.print_line = printed  # type: ignore[method-assign]

    def loss(model: torch.nn.Module, batch: torch.Tensor) -> torch.Tensor:
        if runs[0].steps_done == 3 and not runs[0].notices.received.is_set():
            stop()
        return one_rank.squares(model, batch)

    assert one_rank.train(tmp_path / "run", loss=loss, before=begun, save_interval_steps=100).code == 75
    ended = event(tmp_path / "run", "end")
    assert (ended["cause"], ended["step"], ended["committed_step"]) == ("signal", 4, 4)
    assert capsys.readouterr().out.count("saving step") == 1


def test_training_does_not_wait_for_a_metadata_service_that_never_answers(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    trained, asked = threading.Event(), list[bool]()

    def ask() -> list[Any]:
        asked.append(trained.wait(60))
        return []

    source = SimpleNamespace(ask=ask, close=lambda: None, cloud="aws", poll_s=0.01, longest_s=120.0)
    monkeypatch.setattr(watcher, "source_of", lambda cloud: source)
    monkeypatch.setenv("SKYSPOT_CLOUD", "aws")
    samples = one_rank.Numbers()

    def loss(model: torch.nn.Module, batch: torch.Tensor) -> torch.Tensor:
        if len(samples.asked) > 12:  # 6 steps of 2 micro-steps, and the pass that is thrown away.
            trained.set()
        return one_rank.squares(model, batch)

    assert one_rank.train(tmp_path / "run", samples=samples, loss=loss).code == 0
    assert trained.is_set()
    assert asked[:1] == [True], "the first request was under way until then"


@pytest.mark.slow
def test_a_sigterm_to_one_rank_of_two_stops_both_at_one_boundary(tmp_path: Path) -> None:
    run_dir = tmp_path / "run"
    stopped = mlp(run_dir, "--fault", "sigterm-here@6", "--fault-rank", 1, "--save-every", 100, processes=2)
    assert stopped.code == 75, stopped.output
    ended = event(run_dir, "end")
    assert ended["cause"] == "signal"
    assert ended["committed_step"] == ended["step"] >= 6  # type: ignore[operator]
    assert ended["committed_s"] >= 0.5, "from when the other rank heard"  # type: ignore[operator]
    assert mlp(run_dir).code == 0
    assert event(run_dir, "restored")["lost_steps"] == 0


@pytest.mark.slow
def test_a_sigterm_to_a_shell_and_all_beneath_it_loses_no_step(tmp_path: Path) -> None:
    """As SkyPilot ends a job: its shell, the launcher and every rank get it."""
    command = [sys.executable, "-m", "trainer.launch", "--processes", "2", "--grace", "60"]
    command += [PROGRAMS / "faulty.py", "--dir", tmp_path / "run", "--fault", "sigterm-tree@6", "--save-every", "100"]
    with subprocess.Popen(
        ["bash", "-c", f"{shlex.join(map(str, command))}; true"], env=clean_env(OMP_NUM_THREADS="1"),
        start_new_session=True, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
    ) as process:  # fmt: skip
        assert process.stdout
        output = process.stdout.read()  # Until all have left.
    assert process.returncode == -signal.SIGTERM, output
    ended = event(tmp_path / "run", "end")
    assert (ended["cause"], ended["code"]) == ("signal", 75), output
    assert ended["committed_step"] == ended["step"] >= 6  # type: ignore[operator]

"""python -m trainer, end to end on the tiny model, and what it says of mistakes."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import warm
from support import clean_env, column, event, losses, train, weights

from trainer.layout.names import RunPaths, list_attempts, list_checkpoints

SHORT = ("--max-steps", 8, "--save-every", 3, "--warmup-steps", 2, "--seq-len", 32, "--cpu")
LONGER = (*SHORT, "--max-steps", 24)
"""So long that it is not over before a signal arrives that was sent at step 4."""


@pytest.fixture(scope="module")
def corpus(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Enough text for 34 samples of 32: four batches of 8 an epoch, so that 8 steps are two epochs."""
    path = tmp_path_factory.mktemp("corpus") / "text.txt"
    path.write_text("".join(f"line {number}: {number * number}\n" for number in range(75)))
    return path


def strike(run_dir: Path, step: int, number: int, *args: object, env: dict[str, str] | None = None) -> int:
    """Run an attempt and signal it at a step; its exit status."""
    import time

    process = warm.Popen(
        [sys.executable, "-m", "trainer", "--checkpoint-dir", str(run_dir), *map(str, args)],
        env=env or clean_env(OMP_NUM_THREADS="1"), stdout=subprocess.DEVNULL, start_new_session=True,
    )  # fmt: skip
    end = time.monotonic() + 90
    attempts = len(list_attempts(RunPaths(run_dir)))
    while process.poll() is None:
        assert time.monotonic() < end
        names = list_attempts(RunPaths(run_dir))
        if len(names) > attempts:
            lines = b"".join(path.read_bytes() for path in RunPaths(run_dir).attempt(names[-1]).glob("metrics-*"))
            if f'"step": {step},'.encode() in lines:
                os.kill(process.pid, number)
                break
        time.sleep(0.002)
    return process.wait(90)


def test_the_bundled_program_is_bit_identical_after_preemptions(tmp_path: Path, corpus: Path) -> None:
    """With two processes; the rehearsal of the default task shows it with one."""
    args = (*LONGER, "--data", corpus, "--processes", 2, "--eval-every", 4)
    whole, broken = tmp_path / "whole", tmp_path / "broken"
    assert train("--checkpoint-dir", whole, *args).code == 0
    strike(broken, 1, 9, *args)
    strike(broken, 4, 15, *args)
    done = train("--checkpoint-dir", broken, *args)
    assert done.code == 0, done.output
    assert losses(whole) == losses(broken)
    assert sorted(losses(whole)) == list(range(1, 25))
    assert weights(whole) == weights(broken)
    assert len(weights(whole)) > 40
    assert column(whole, "order") == column(broken, "order")
    first_step = event(broken, "first-step")
    assert first_step["seconds"] > 0  # type: ignore[operator]


def test_the_exported_model_loads_with_from_pretrained(tmp_path: Path, corpus: Path) -> None:
    done = train("--checkpoint-dir", tmp_path / "run", *SHORT, "--data", corpus)
    assert done.code == 0, done.output
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(tmp_path / "run" / "final")
    assert set(model.state_dict()) == set(weights(tmp_path / "run"))
    assert "step 8/8" in done.output
    assert "Traceback" not in done.output
    # And the run is bound to what it was begun with.
    before = sorted(path for path in (tmp_path / "run").rglob("*") if "attempts" not in path.parts)
    refused = train("--checkpoint-dir", tmp_path / "run", *SHORT, "--data", corpus, "--seed", 1)
    assert refused.code == 1
    assert "seed=0" in refused.output
    assert "--allow-config-change seed" in refused.output
    other_data = tmp_path / "other.txt"
    other_data.write_text("x" * 5000)
    assert sorted(path for path in (tmp_path / "run").rglob("*") if "attempts" not in path.parts) == before
    again = train("--checkpoint-dir", tmp_path / "run", *SHORT, "--data", corpus)
    assert (again.code, "already finished" in again.output) == (0, True)


def test_a_model_that_was_saved_in_half_precision_trains_in_fp32(tmp_path: Path) -> None:
    import torch

    from trainer.finetune.config import parse
    from trainer.finetune.model import build_model

    config = parse(["--checkpoint-dir", "x"])
    build_model(config, 256).to(torch.bfloat16).save_pretrained(tmp_path / "half")  # type: ignore[operator]
    loaded = build_model(parse(["--checkpoint-dir", "x", "--model", str(tmp_path / "half")]), 256)
    assert {parameter.dtype for parameter in loaded.parameters()} == {torch.float32}


def test_a_resume_says_in_a_line_where_it_goes_on(tmp_path: Path, corpus: Path) -> None:
    run_dir = tmp_path / "run"
    text = tmp_path / "text.txt"
    text.write_bytes(corpus.read_bytes())
    assert strike(run_dir, 4, 15, *LONGER, "--data", text) == 75
    # With other data than it was begun with it is refused, and nothing is lost.
    (tmp_path / "other.txt").write_text("x" * 5000)
    kept = list_checkpoints(RunPaths(run_dir))
    refused = train("--checkpoint-dir", run_dir, *LONGER, "--data", tmp_path / "other.txt")
    assert refused.code == 1, refused.output
    assert "--allow-config-change data_key" in refused.output
    assert list_checkpoints(RunPaths(run_dir)) == kept
    # Without the text it goes on with what was prepared of it.
    text.unlink()
    done = train("--checkpoint-dir", run_dir, *LONGER, "--data", text)
    assert done.code == 0, done.output
    assert "continues with the data that was prepared for it" in done.output
    said = [line for line in done.output.splitlines() if line.startswith("resumed at step")]
    assert len(said) == 1
    step = event(run_dir, "restored")["step"]
    assert f"resumed at step {step} from checkpoint" in said[0]
    assert f"{step * 8} samples consumed, 0 lost steps" in said[0]  # type: ignore[operator]


@pytest.mark.slow
def test_a_start_costs_little_more_than_what_it_loads(tmp_path: Path, corpus: Path) -> None:
    """In CPU seconds, to the first step and the end, beside what the same libraries cost at the same time alone."""

    def cpu_s(*command: object) -> float:
        process = subprocess.Popen([sys.executable, *map(str, command)], env=clean_env(OMP_NUM_THREADS="1"))
        _, status, used = os.wait4(process.pid, 0)
        process.returncode = os.waitstatus_to_exitcode(status)
        assert process.returncode == 0
        return used.ru_utime + used.ru_stime

    one_step = ("--max-steps", 1, "--seq-len", 32, "--cpu", "--data", corpus, "--checkpoint-dir", tmp_path / "run")
    started = cpu_s("-m", "trainer.finetune", *one_step)
    loads = "import torch, torch._dynamo, accelerate; from transformers import LlamaForCausalLM"
    loaded = cpu_s("-c", loads)
    assert started < 2 * loaded


MISTAKES = [
    (["--max-stesp", "3"], 2, "--max-steps"),
    (["--max-spend", "3"], 2, "unknown option '--max-spend'. Did you mean '--max-steps'?"),
    (["--seed", str(2**63)], 2, "more than 63 bits"),
    (["--peer-timeout", "0"], 2, "less than 1"),
    (["--epochs", "1", "--warmup-steps", "6", "--seq-len", "32", "--data", "{corpus}"], 1, "--warmup-steps 6 is more"),
    (["--global-batch-size", "9", "--micro-batch-size", "2"], 2, "does not divide"),
    (["--data", "/nowhere/at/all"], 1, "no such folder"),
    (["--data", "{corpus}", "--global-batch-size", "400"], 1, "samples"),
    (["--model", "/nowhere/at/all", "--data", "{corpus}"], 1, "--model"),
]


@pytest.mark.parametrize(
    ("args", "code", "remedy"), MISTAKES, ids=lambda value: " ".join(value) if isinstance(value, list) else ""
)
def test_a_mistake_is_said_without_a_traceback(
    tmp_path: Path, corpus: Path, args: list[str], code: int, remedy: str
) -> None:
    done = train("--checkpoint-dir", tmp_path / "run", *[part.format(corpus=corpus) for part in args])
    assert done.code == code, done.output
    assert remedy in done.output
    assert "Traceback" not in done.output
    assert len(done.output.strip().splitlines()) <= 2


def test_a_folder_that_cannot_be_written_is_said_in_a_line(tmp_path: Path) -> None:
    (tmp_path / "run").write_text("a file, not a folder")
    done = train("--checkpoint-dir", tmp_path / "run")
    assert done.code == 1
    assert "nothing was trained" in done.output
    assert "Traceback" not in done.output
    assert (tmp_path / "run").read_text() == "a file, not a folder"


def test_a_crash_loop_ends_with_80_and_says_what_happened(tmp_path: Path) -> None:
    from support import mlp

    env = clean_env(SKYPILOT_TASK_ID="sky-managed-1", OMP_NUM_THREADS="1")
    codes = [mlp(tmp_path / "run", "--fault", "die@2", "--fault-rank", 1, processes=2, env=env).code for _ in range(3)]
    assert codes == [75, 75, 75]
    stopped = mlp(tmp_path / "run", processes=2, env=env)
    assert stopped.code == 80, stopped.output
    assert "no progress: 3 attempts in a row" in stopped.output
    assert "another rank is gone" in stopped.output


@pytest.mark.slow
def test_with_a_terminal_there_is_a_bar_and_without_one_there_are_lines(tmp_path: Path, corpus: Path) -> None:
    import pty

    master, slave = pty.openpty()
    process = subprocess.Popen(  # A cold start: the one of the bundled trainer, as users start it.
        [sys.executable, "-m", "trainer", "--checkpoint-dir", str(tmp_path / "run"), "--data", str(corpus),
         *map(str, SHORT)],
        env=clean_env(TERM="xterm", OMP_NUM_THREADS="1"), stdout=slave, stderr=slave, stdin=subprocess.DEVNULL,
    )  # fmt: skip
    os.close(slave)
    output = b""
    while True:
        try:
            data = os.read(master, 65536)
        except OSError:
            break
        if not data:
            break
        output += data
    os.close(master)
    assert process.wait(60) == 0
    text = output.decode(errors="replace")
    assert "\r" in text.replace("\r\n", "\n")
    for word in ("step 8/8", "loss", "lr", "tok/s", "left", "saved"):
        assert word in text

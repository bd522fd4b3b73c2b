"""The examples as the tests rehearse them. An example that is not listed has the values of `Example()`.

Every example reads its number of steps from STEPS, and the run's folder from SKYSPOT_CHECKPOINT_DIR.
"""

from __future__ import annotations

import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

from support import REPO, clean_env

FOLDER = REPO / "examples"


@dataclass(frozen=True)
class Example:
    """How an example is rehearsed, and what the verdict must say."""

    steps: int = 80
    """Steps of a rehearsal: at least four saves."""
    processes: tuple[int, ...] = (1,)
    """The numbers of processes that it can train on."""
    moves: tuple[int, ...] = ()
    """The numbers of processes of a run that changes them: for what promises the same samples on any number."""
    says: str = "bit-identical"
    """The beginning of the verdict."""
    needs: tuple[str, ...] = ()
    """Modules that it imports beside those of the trainer."""
    slow: bool = False
    """True: its short run takes more than some seconds, and is left out of the quick tests."""


EXAMPLES: dict[str, Example] = {
    "accelerate_loop": Example(processes=(1, 2), slow=True),
    "pretrain": Example(slow=True),
    "vision": Example(processes=(1, 2), moves=(1, 2), slow=True),
    "lightning_module": Example(processes=(1, 2), needs=("lightning",), slow=True),
    "hf_trainer": Example(processes=(1, 2), needs=("datasets",), slow=True),
    "trl_sft": Example(processes=(1, 2), needs=("trl",), slow=True),
}


def entry(safe: Path) -> Example:
    """What the table says of an example."""
    return EXAMPLES.get(safe.stem, Example())


@dataclass(frozen=True)
class Broken:
    """A rule of docs/your-own-script.md, broken in an example by edits."""

    rule: str
    example: str
    edits: tuple[tuple[str, str], ...]
    """(a text that is there once, what replaces it)."""
    says: str
    """What the verdict names as the cause."""
    verdict: str = "NOT exact"
    in_ci: bool = False
    """True: the tests rehearse it; `make examples` rehearses all."""

    def text(self) -> str:
        """The script with the rule broken."""
        text = (FOLDER / f"{self.example}.py").read_text()
        for old, new in self.edits:
            assert text.count(old) == 1, f"{self.example}.py: {old!r} is there {text.count(old)} times"
            text = text.replace(old, new)
        return text

    def task(self, folder: Path) -> Path:
        """Write the script and its task into a folder; returns the task."""
        script, task = folder / f"{self.example}.py", folder / f"{self.example}.yaml"
        script.write_text(self.text())
        here, line = (FOLDER / task.name).read_text(), f"./examples/{script.name}"
        assert line in here
        task.write_text(here.replace(line, str(script)))
        return task


_MODEL, _LOOP, _LOG, _END = (
    "model = Model()\n",
    "    for (x,) in run.steps(loader, until=STEPS):\n",
    "        run.log(loss=loss)\n",
    "    run.finish()\n",
)
"""Lines of plain.py."""
_AVERAGE = '''

class Average(nn.Module):
    """An average of the weights, with a counter that its state_dict does not hold."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.head, self.updates = torch.optim.swa_utils.AveragedModel(model.head).module, 0

    def update(self, model: nn.Module) -> None:
        self.updates += 1
        for mine, theirs in zip(self.parameters(), model.head.parameters()):
            mine.data.lerp_(theirs.data, 1 / self.updates)


model = Model()
average = Average(model)
'''
BROKEN = (
    Broken(
        "the scheduler is not registered", "plain", ((", scheduler=scheduler)", ")"),),
        "the learning rate differs from step", in_ci=True,
    ),
    Broken(
        "the model is not registered", "plain", (("model=model, ", ""),),
        "register(optimizer=...): it trains a parameter of no registered module",
        verdict="not checked: the task failed without a preemption",
    ),
    Broken(
        "the optimizer is not registered", "plain", (("optimizer=optimizer, ", ""),),
        "an optimizer (AdamW) of 'model' is not registered, so its state would be lost",
        verdict="not checked: the task failed without a preemption",
    ),
    Broken(
        "a generator is not registered", "plain",
        (
            (_MODEL, f"dice = torch.Generator().manual_seed(1)\n{_MODEL}"),
            (_LOOP, f"{_LOOP}        x = x.roll(int(torch.randint(99, (), generator=dice)), 1)\n"),
        ),
        "and the same batches: something that steps change is not registered",
    ),
    Broken(
        "the loader is not given to run.steps", "plain",
        (
            (_LOOP, f"    batches = iter(loader)\n{_LOOP.replace('(x,)', 'number').replace('loader', 'range(10**9)')}"
             "        (x,) = next(batches)\n"),
        ),
        "No tensor came from run.steps(...): does the loop read its data elsewhere?",
    ),
    Broken(
        "an EMA's counter is in no state_dict", "plain",
        (
            (f"\n\n{_MODEL}", _AVERAGE),
            ("model=model, ", "model=model, average=average, "),
            (_LOG, f"{_LOG}        average.update(model)\n"),
        ),
        "average.updates changes during training and is in no state_dict",
    ),
    Broken(
        "a counter is not in run.state", "plain",
        (
            (_LOOP, f"    seen = 0\n{_LOOP}"),
            (_LOG, "        seen += len(x)\n        run.log(loss=loss, seen=seen)\n"),
        ),
        "the logged seen differs from step",
    ),
    Broken(
        "a patience is not in run.state", "plain",
        (
            (_LOOP, f"    patience = 0\n{_LOOP}"),
            (_LOG, f"{_LOG}        patience += 1\n        if patience == STEPS - 10:\n            break\n"),
        ),
        "is what ends the loop (a counter, a best loss) in run.state?",
    ),
    Broken(
        "the script is not seeded", "plain", (("torch.manual_seed(0)\n", ""),), "is the script seeded?",
        verdict="not reproducible by itself: not checked",
    ),
    Broken(
        "the prepared scheduler is not registered", "accelerate_loop", ((", scheduler=scheduler)", ")"),),
        "is the scheduler registered?",
    ),
    Broken(
        "one of two optimizers is not registered", "gan", ((", opt_c=opt_c)", ")"),),
        "an optimizer (Adam) of 'critic' is not registered, so its state would be lost",
        verdict="not checked: the task failed without a preemption",
    ),
    Broken(
        "an EMA is not registered", "pretrain", (("ema=ema, ", ""),), "the logged held_out differs from step",
    ),
    Broken(
        "Lightning: the script is not seeded", "lightning_module", (("lightning.seed_everything(0)\n", ""),),
        "is the script seeded?", verdict="not reproducible by itself: not checked",
    ),
    Broken(
        "Hugging Face: the callback is forgotten", "hf_trainer", ((", callbacks=[SpotCallback(run)]", ""),),
        "SpotCallback", verdict="not checked: the task failed without a preemption",
    ),
    Broken(
        "workers draw random numbers, without run.sampler", "vision",
        (("batch_sampler=sampler", "batch_size=MICRO, shuffle=True"),), "the batches differ from step",
    ),
)  # fmt: skip


def rehearse(task: Path, steps: int, home: Path, *options: object) -> subprocess.CompletedProcess[str]:
    """Rehearse an example's task, from the repository's folder."""
    command = [sys.executable, "-m", "skyspot", "rehearse", str(task), *map(str, options)]
    command += ["--env", f"STEPS={steps}", "--env", "OMP_NUM_THREADS=1"]
    env = clean_env(HOME=str(home))
    return subprocess.run(command, cwd=REPO, env=env, capture_output=True, text=True, timeout=1200)

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
Edits = tuple[tuple[str, str], ...]
"""(a text that is there once, what replaces it)."""


@dataclass(frozen=True)
class Example:
    """How an example is rehearsed, and what the verdict must say."""

    steps: int = 80
    """Steps of a rehearsal: at least four saves."""
    processes: tuple[int, ...] = (1, 2)
    """The numbers of processes that it can train on."""
    moves: tuple[int, ...] = ()
    """The numbers of processes of a run that changes them: for what promises the same samples on any number."""
    says: str = "bit-identical"
    """The beginning of the verdict."""
    needs: tuple[str, ...] = ()
    """Modules that it imports beside those of the trainer."""
    strikes: str = "sigterm"
    """Kinds of preemption in the tests, one of each. One example of each way to train has a torn checkpoint too; see
    GUARANTEES in test_guarantees.py."""
    report_to: str = ""
    """An experiment tracker that it reports to when the tests rehearse it."""
    slow: bool = False
    """True: its short run takes more than some seconds, and is left out of the quick tests."""


EXAMPLES: dict[str, Example] = {
    "plain": Example(strikes="sigterm,torn", report_to="tensorboard"),
    "accelerate_loop": Example(slow=True),
    "pretrain": Example(moves=(1, 2), slow=True),
    "vision": Example(moves=(1, 2), slow=True, strikes="sigterm,torn"),
    "lightning_module": Example(needs=("lightning",), slow=True, strikes="sigterm,torn"),
    "hf_trainer": Example(needs=("datasets",), slow=True),
    "trl_sft": Example(needs=("trl",), slow=True),
}


def entry(safe: Path) -> Example:
    """What the table says of an example."""
    return EXAMPLES.get(safe.stem, Example())


def edited(example: str, edits: Edits) -> str:
    """The script of an example, edited."""
    text = (FOLDER / f"{example}.py").read_text()
    for old, new in edits:
        assert text.count(old) == 1, f"{example}.py: {old!r} is there {text.count(old)} times"
        text = text.replace(old, new)
    return text


def edited_task(example: str, edits: Edits, folder: Path) -> Path:
    """Write an edited example and its task into a folder; returns the task."""
    script, task = folder / f"{example}.py", folder / f"{example}.yaml"
    script.write_text(edited(example, edits))
    here, line = (FOLDER / task.name).read_text(), f"./examples/{script.name}"
    assert line in here
    task.write_text(here.replace(line, str(script)))
    return task


@dataclass(frozen=True)
class Broken:
    """A rule of docs/your-own-script.md, broken in an example by edits."""

    rule: str
    example: str
    edits: Edits
    says: str
    """What the verdict names as the cause."""
    verdict: str = "NOT exact"
    in_ci: bool = False
    """True: the tests rehearse it; `make examples` rehearses all."""
    processes: tuple[int, ...] = (1,)
    """The numbers of processes that it is rehearsed on: several for the first form of each example."""
    kind: str = ""
    """The column of the report's matrix that it belongs to, one of KINDS; empty: none."""

    @property
    def name(self) -> str:
        """The rule and the example."""
        return f"{self.example}: {self.rule}"

    def text(self) -> str:
        """The script with the rule broken."""
        return edited(self.example, self.edits)

    def task(self, folder: Path) -> Path:
        """Write the script and its task into a folder; returns the task."""
        return edited_task(self.example, self.edits, folder)


KINDS = ("a scheduler", "the data", "a counter or an average")
"""What a broken form does not have saved: what everybody forgets."""
WHY_NOT: dict[tuple[str, str], str] = {
    ("accelerate_loop", "the data"): "in `plain.py`",
    ("accelerate_loop", "a counter or an average"): "it has none",
    ("gan", "a scheduler"): "it has none",
    ("gan", "a counter or an average"): "it has none",
    ("hf_trainer", "a scheduler"): "the Trainer saves its own",
    ("hf_trainer", "a counter or an average"): "in `trl_sft.py`",
    ("lightning_module", "the data"): "`fit` has the loader",
    ("pretrain", "a scheduler"): "in `plain.py`",
    ("pretrain", "the data"): "in `plain.py`",
    ("trl_sft", "a scheduler"): "the Trainer saves its own",
    ("trl_sft", "the data"): "in `hf_trainer.py`",
    ("vision", "a counter or an average"): "it has none",
}
"""Why an example has no broken form of a kind."""
_MODEL, _LOOP, _LOG, _END = (
    "model: nn.Module = Model().to(device)\n",
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
        for mine, theirs in zip(self.parameters(), getattr(model, "module", model).head.parameters()):
            mine.data.lerp_(theirs.data, 1 / self.updates)


model: nn.Module = Model().to(device)
average = Average(model)
'''
_WARM = '''

class Warm(AveragedModel):
    """An average whose decay grows with a counter that its state_dict does not hold."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__(model, multi_avg_fn=lambda mine, now, _: get_ema_multi_avg_fn(self.decay)(mine, now, _))
        self.updates, self.decay = 0, 0.0

    def update_parameters(self, model: nn.Module) -> None:
        self.updates += 1
        self.decay = min(0.9, self.updates / (self.updates + 9))
        super().update_parameters(model)


ema = Warm(model)
'''
_MASKED = """import torch

dice = torch.Generator().manual_seed(1)


class Masked(DataCollatorForLanguageModeling):
    def torch_call(self, examples):
        batch = super().torch_call(examples)
        hidden = torch.rand(batch["input_ids"].shape, generator=dice) < 0.1
        return {**batch, "input_ids": batch["input_ids"].masked_fill(hidden, 0)}


collator = Masked(tokenizer, mlm=False)
"""
_FADE_IN = """from transformers import TrainerCallback


class FadeIn(TrainerCallback):
    count = 0

    def on_pre_optimizer_step(self, args, state, control, model=None, **others):
        self.count += 1
        for parameter in model.parameters():
            if parameter.grad is not None:
                parameter.grad.mul_(min(1.0, self.count / 40))


with SpotRun("""
_NO_SCHEDULER = (", scheduler=scheduler)", ")")
_REFUSED = "not checked: the task failed without a preemption"
"""The verdict on a loop that refuses to train at its first step: nothing is there to compare."""
BROKEN = (
    Broken(
        "the scheduler is not registered", "plain", (_NO_SCHEDULER,), "is the scheduler registered?",
        in_ci=True, processes=(1, 2), kind="a scheduler",
    ),
    Broken(
        "the scheduler is stepped before the loop", "plain",
        ((_LOOP, f"    for _ in range(5):\n        scheduler.step()\n{_LOOP}"),),
        "its scheduler is registered; is it stepped, or the rate set, outside the loop?",
    ),
    Broken(
        "the model is not registered", "plain", (("model=model, ", ""),),
        "register(optimizer=...): it trains a parameter of no registered module", verdict=_REFUSED,
    ),
    Broken(
        "the optimizer is not registered", "plain", (("optimizer=optimizer, ", ""),),
        "an optimizer (AdamW) of 'model' is not registered, so its state would be lost", verdict=_REFUSED,
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
        "No tensor came from run.steps(...): does the loop read its data elsewhere?", kind="the data",
    ),
    Broken(
        "an EMA's counter is in no state_dict", "plain",
        (
            (f"\n\n{_MODEL}", _AVERAGE),
            ("model=model, ", "model=model, average=average, "),
            (_LOG, f"{_LOG}        average.update(model)\n"),
        ),
        "average.updates changes during training and is in no state_dict", kind="a counter or an average",
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
        "the script is not seeded", "plain", (("torch.manual_seed(RANK)\n", ""),), "is the script seeded?",
        verdict="not reproducible by itself: not checked",
    ),
    Broken(
        "the prepared scheduler is not registered", "accelerate_loop", (_NO_SCHEDULER,), "is the scheduler registered?",
        processes=(1, 2), kind="a scheduler",
    ),
    Broken(
        "the noise's generator is not registered", "gan",
        (
            ("data = TensorDataset", "dice = torch.Generator().manual_seed(RANK)\ndata = TensorDataset"),
            ("NOISE, device=device)", "NOISE, generator=dice).to(device)"),
        ),
        "and the same batches: something that steps change is not registered", processes=(1, 2), kind="the data",
    ),
    Broken(
        "one of two optimizers is not registered", "gan", ((", opt_c=opt_c)", ")"),),
        "an optimizer (Adam) of 'critic' is not registered, so its state would be lost", verdict=_REFUSED,
    ),
    Broken(
        "an EMA is not registered", "pretrain", (("ema=ema, ", ""),), "the logged held_out differs from step",
        processes=(1, 2),
    ),
    Broken(
        "an EMA's counter is in no state_dict", "pretrain",
        (("ema = AveragedModel(model, multi_avg_fn=get_ema_multi_avg_fn(0.9))\n", _WARM),),
        "ema.updates change during training and are in no state_dict", kind="a counter or an average",
    ),
    Broken(
        "a module's counter is in no state_dict", "lightning_module",
        (
            ("        self.embed =", "        self.seen = 0\n        self.embed ="),
            ("        return self.loss(batch[0])\n",
             "        self.seen += 1\n        return self.loss(batch[0]) * min(1.0, self.seen / 40)\n"),
        ),
        "model.seen changes during training and is in no state_dict",
        processes=(1, 2), kind="a counter or an average",
    ),
    Broken(
        "the scheduler is not returned", "lightning_module",
        (
            ('        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": scheduler, "interval": "step"}}\n',
             '        self.schedulers = [scheduler]\n        return {"optimizer": optimizer}\n'),
            ("        return self.loss(batch[0])\n",
             "        self.schedulers[0].step()\n        return self.loss(batch[0])\n"),
        ),
        "does Lightning save the scheduler, or what else sets the rate?", kind="a scheduler",
    ),
    Broken(
        "the script is not seeded", "lightning_module", (("lightning.seed_everything(0)\n", ""),),
        "is the script seeded?", verdict="not reproducible by itself: not checked",
    ),
    Broken(
        "a collator draws from a generator of its own", "hf_trainer",
        (("collator = DataCollatorForLanguageModeling(tokenizer, mlm=False)\n", _MASKED),),
        "the batches differ from step", processes=(1, 2), kind="the data",
    ),
    Broken(
        "the callback is forgotten", "hf_trainer", ((", callbacks=[SpotCallback(run)]", ""),), "SpotCallback",
        verdict=_REFUSED,
    ),
    Broken(
        "a callback's counter is in no checkpoint", "trl_sft",
        (("with SpotRun(", _FADE_IN), ("callbacks=[SpotCallback(run)]", "callbacks=[SpotCallback(run), FadeIn()]")),
        "something that steps change is not in the checkpoint of the Trainer (a callback's counter, an EMA)",
        processes=(1, 2), kind="a counter or an average",
    ),
    Broken(
        "the scheduler is not registered", "vision", (_NO_SCHEDULER,), "is the scheduler registered?",
        processes=(1, 2), kind="a scheduler",
    ),
    Broken(
        "workers draw random numbers, without run.sampler", "vision",
        (("batch_sampler=sampler", "batch_size=MICRO, shuffle=True"),), "the batches differ from step", kind="the data",
    ),
)  # fmt: skip


def rehearse(task: Path, steps: int, home: Path, *options: object) -> subprocess.CompletedProcess[str]:
    """Rehearse an example's task, from the repository's folder."""
    command = [sys.executable, "-m", "skyspot", "rehearse", str(task), *map(str, options)]
    command += ["--env", f"STEPS={steps}", "--env", "OMP_NUM_THREADS=1"]
    env = clean_env(HOME=str(home))
    return subprocess.run(command, cwd=REPO, env=env, capture_output=True, text=True, timeout=1200)

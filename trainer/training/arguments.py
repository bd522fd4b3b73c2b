"""Arguments of `train` and `steps`: a mistake in them is refused in a line."""

from __future__ import annotations

import inspect
from collections.abc import Mapping
from typing import Any

import torch
from torch import nn
from torch.utils.data import DataLoader

from trainer.errors import RunError
from trainer.training import accelerate_loader, accelerate_state
from trainer.training.registrable import refuse_stateless
from trainer.training.sampler import RunSampler

OWN_LOOP = "run.register and run.steps, docs/your-own-script.md"


def check_arguments(
    model: Any, optimizer: Any, samples: Any, held_out: Any, extra: Mapping[str, Any], lr_factor: object
) -> None:
    """Refuse arguments that make no sense.

    Raises:
        RunError: names the first one.
    """
    check_model(model, optimizer)
    check_samples("samples", samples)
    if held_out is not None:
        check_samples("held_out", held_out)
    check_extra(extra, optimizer, lr_factor is not None)


def check_model(model: Any, optimizer: Any) -> None:
    """Refuse what is not one model and one optimizer, and an optimizer that needs a closure.

    Raises:
        RunError: names the argument.
    """
    for name, thing, kind in (("model", model, nn.Module), ("optimizer", optimizer, torch.optim.Optimizer)):
        if not isinstance(thing, kind):
            raise RunError(
                f"train({name}=...) is a {type(thing).__name__}; it takes one {kind.__name__}. Several models or "
                f"optimizers train in a loop of your own: {OWN_LOOP}"
            )
    step = inspect.signature(optimizer.step).parameters.get("closure")
    if hasattr(optimizer, "first_step") or (step is not None and step.default is inspect.Parameter.empty):
        raise RunError(
            f"train(optimizer=...): a {type(optimizer).__name__} evaluates the loss several times a step, and train() "
            f"once. Use it in a loop of your own: {OWN_LOOP}"
        )


def check_samples(name: str, samples: Any) -> None:
    """Refuse what makes no batches by ids, or has no sample.

    Raises:
        RunError: names the argument.
    """
    missing = [method for method in ("__len__", "batch", "weight") if not callable(getattr(samples, method, None))]
    if missing:
        remedy = "Give it an object with __len__, batch(ids) and weight(batch)"
        if isinstance(samples, DataLoader):
            remedy += f", or write a loop of your own: {OWN_LOOP}"
        raise RunError(f"train({name}=...): a {type(samples).__name__} has no {' and no '.join(missing)}. {remedy}")
    if not len(samples):
        raise RunError(f"train({name}=...): the data set is empty")


def check_extra(extra: Mapping[str, Any], optimizer: torch.optim.Optimizer, sets_lr: bool) -> None:
    """Refuse extras that cannot be saved, and a scheduler beside `lr_factor`.

    Raises:
        RunError: names the extra.
    """
    for name, thing in extra.items():
        refuse_stateless(f"train(extra={{{name!r}: ...}})", thing, "Give it both, or leave it out")
        if sets_lr and getattr(thing, "optimizer", None) is optimizer:
            raise RunError(
                f"train(extra={{{name!r}: ...}}): both this {type(thing).__name__} and lr_factor set the learning "
                "rate. Leave one of them out"
            )


def agreed_steps(in_config: int | None, given: Any) -> int:
    """The step at which training ends.

    Raises:
        RunError: it is nowhere, no number of steps, or two numbers.
    """
    if given is None and in_config is None:
        raise RunError("max_steps is missing: set it in RunConfig, or pass it to train()")
    if given is None:
        assert in_config is not None
        return in_config
    if type(given) is not int or given < 1:
        raise RunError(f"train(max_steps={given!r:.60}): give a number of steps, 1 or more")
    if in_config not in (None, given):
        raise RunError(f"RunConfig(max_steps={in_config}) and train(max_steps={given}) differ. Give one of them")
    return given


def check_steps(loader: Any, until: Any) -> None:
    """Refuse arguments of `steps` that make no sense.

    Raises:
        RunError: names the argument.
    """
    if type(until) is not int or until < 1:
        raise RunError(f"steps(until={until!r:.60}): give a number of steps, 1 or more")
    if not hasattr(loader, "__iter__") and not hasattr(loader, "__getitem__"):
        raise RunError(f"steps(loader): a {type(loader).__name__} cannot be iterated over. Give a DataLoader")


def batches_of_a_step(sampler: RunSampler | None, given: Any) -> int:
    """The batches of a step: those of our sampler, or the given number; 1 by default.

    Raises:
        RunError: it is no number, or not the sampler's.
    """
    if sampler and given not in (None, sampler.accumulate):
        raise RunError(
            f"steps(accumulate={given!r:.60}): the sampler makes {sampler.accumulate} batches a step. Leave it out"
        )
    if given is not None and not (type(given) is int and given > 0):
        raise RunError(f"steps(accumulate={given!r:.60}): give the number of batches of a step")
    return sampler.accumulate if sampler else given or 1


def refuse_unlike_accelerate(loader: Any, accumulate: int, world_size: int) -> None:
    """Refuse what accelerate and a loop under `steps` understand differently.

    Args:
        loader: As it is given to `steps`.
        accumulate: The batches of a step.
        world_size: The number of processes.

    Raises:
        RunError: the number of processes, of a step's batches, or of the ranks' batches differs.
    """
    accelerate_state.refuse_other_processes(world_size)
    steps = accelerate_state.accumulates()
    if accumulate > 1 and steps > 1:
        raise RunError(
            f"steps(accumulate={accumulate}) and Accelerator(gradient_accumulation_steps={steps}): give one of them. "
            "With accelerator.accumulate(model), leave out the first"
        )
    if not accelerate_loader.is_prepared(loader):
        return
    if getattr(loader, "use_stateful_dataloader", False):
        raise RunError(
            "use_stateful_dataloader=True of accelerate does not resume exactly. Leave it out: run.steps() continues "
            "the loader at the right batch by itself"
        )
    counts = accelerate_loader.lengths(loader)
    if len(set(counts)) > 1:
        raise RunError(
            f"the ranks have different numbers of batches in an epoch ({', '.join(map(str, counts))}), because of "
            "even_batches=False. Leave it out, or use drop_last=True in the DataLoader"
        )

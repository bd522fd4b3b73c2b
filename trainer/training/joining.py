"""Joining: what every loop does before anything is restored: it joins the other ranks, and opens its session."""

from __future__ import annotations

import torch

from trainer.checkpoint.reading import Memory, fresh
from trainer.checkpoint.saving import SavePolicy
from trainer.training.contents import Contents
from trainer.training.participant import Participant
from trainer.training.session import Session


def join(run: Participant) -> None:
    """Join the other ranks of a program with a loop of its own, and begin the records."""
    run.await_all_ready()
    run.group.form_groups(torch.cuda.is_available() and not run.config.cpu)
    run.begin_records()


def open_session(run: Participant, contents: Contents, save_every: int | None, memory: Memory = fresh) -> Session:
    """Return the session of an attempt, as its settings want it.

    Args:
        run: The attempt; its records have begun.
        contents: What is saved.
        save_every: Steps between checkpoints; None: chosen.
        memory: Where tensors are read into.
    """
    config = run.config
    policy = SavePolicy(config.keep_latest, config.keep_every, config.save_failures)
    return Session(run, contents, policy, save_every, run.grace_s, memory)

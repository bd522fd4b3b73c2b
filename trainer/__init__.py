"""The trainer: runs on the GPU node and survives preemptions. It is shipped there as a folder."""

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from trainer.training.config import RunConfig
    from trainer.training.manager import CheckpointManager
    from trainer.training.run import SpotRun

__all__ = ["CheckpointManager", "RunConfig", "SpotRun"]


def __getattr__(name: str) -> object:
    """Load a public name at its first use, so that `import trainer.layout` loads no torch."""
    if name == "CheckpointManager":
        from trainer.training.manager import CheckpointManager

        return CheckpointManager
    if name == "RunConfig":
        from trainer.errors import say_mistakes
        from trainer.training.config import RunConfig

        say_mistakes()
        return RunConfig
    if name == "SpotRun":
        from trainer.training.run import SpotRun

        return SpotRun
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")

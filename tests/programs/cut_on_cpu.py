"""Has accelerate cut models with FSDP on CPUs, too: it does so on accelerators alone, and says nothing."""

from accelerate import PartialState
from accelerate.utils import DistributedType


def cut_on_cpu() -> None:
    """Let accelerate believe that its processes have GPUs; its device stays the CPU, its backend gloo."""
    state = PartialState(cpu=True)
    assert state.distributed_type is DistributedType.MULTI_CPU
    PartialState._shared_state["distributed_type"] = DistributedType.MULTI_GPU

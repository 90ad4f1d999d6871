"""accelerate's FSDP2 on machines without a GPU."""

from __future__ import annotations

import os

from accelerate import PartialState
from accelerate.state import DistributedType


def allow_fsdp2_on_cpus() -> None:
    """Called between the processes' start and their Accelerator; changes nothing but FSDP2 on several CPU processes.

    accelerate turns FSDP on for a list of accelerators that CPUs are not on, and trains by DDP without a word
    (accelerate.state.AcceleratorState.__init__). Named as one of that list, it cuts the model up over gloo: the device
    stays the CPU, and settle_engine holds what comes of it against what was asked.
    """
    state = PartialState()
    wanted = os.environ.get("ACCELERATE_USE_FSDP", "").lower() == "true" and os.environ.get("FSDP_VERSION") == "2"
    if wanted and state.distributed_type == DistributedType.MULTI_CPU:
        PartialState._shared_state["distributed_type"] = DistributedType.MULTI_GPU

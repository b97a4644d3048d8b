"""Where segments run: in this process, on this machine, on a cluster."""

from __future__ import annotations

import os
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from orchestrator.pools.protocol import Pool

GPU_DEVICES = ("/dev/nvidiactl", "/dev/kfd")


def this_machine(workers: int | None = None, gpus_per_worker: float | None = None) -> Pool:
    """Ray workers on this machine. On CPUs, this process works too until they have come up.

    Args:
        workers: how many; by default one for each core, or as many as the GPUs have room for.
        gpus_per_worker: the share of a GPU for each; by default 1 where there is one. 0 forces the CPU.
    """
    from orchestrator.pools.ray import RayPool
    from orchestrator.pools.starting import StartingPool

    if gpus_per_worker or (gpus_per_worker is None and any(Path(device).exists() for device in GPU_DEVICES)):
        return RayPool(workers, gpus_per_worker=gpus_per_worker)
    count = workers or len(os.sched_getaffinity(0))
    return StartingPool(lambda: RayPool(count, gpus_per_worker=0), count)

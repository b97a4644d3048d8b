"""The consensus figure at 50 % a round instead of 20 %, where a mask begins to matter."""

from __future__ import annotations

from orchestrator import StudySpec
from tests.figures import consensus

SEEDS = consensus.SEEDS
told = consensus.told


def study(seeds: int) -> StudySpec:
    return consensus.study(seeds, rate=0.5)

"""What becomes of a stage that came back undone through no fault of its own: tried again, or failed. In one place.

preempted           again, uncounted: the machine was taken away
worker died         again, counted, up to `MOST_TRIES` without getting further; more where workers at nothing die, too
out of GPU memory   again on twice the share of a GPU, up to a whole one; stages like it begin with that share
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from orchestrator.graph import Segment, Step
from orchestrator.ops import Train
from orchestrator.pools.protocol import Failed

MOST_TRIES = 5
"""How often a stage may lose its worker before it counts as failed; a checkpoint in between starts the count anew."""

TRIES_FOR_A_BYSTANDER, MOST_TRIES_EVER = 3, 100
"""So many more tries for each worker that died meanwhile and was at no stage: somebody kills them, and it is hardly the
stage. And never more than that."""


@dataclass(frozen=True, kw_only=True)
class Verdict:
    """What becomes of a failure: `again`, or for good with the reason to be recorded."""

    again: bool
    reason: str
    tries: int = 0
    like: str = ""
    """What names the stages that are to have `gpus` from now on."""
    gpus: float = 0.0


class Retries:
    """Counts tries by stage, and knows which stages want more of a GPU than a worker has.

    Args:
        gpus: the share of a GPU that each worker begins with; 0 on a CPU.
        learnt: shares by what names a stage's like, as verdicts brought them before.
    """

    def __init__(self, gpus: float, learnt: Mapping[str, float] | None = None) -> None:
        self._gpus = gpus
        self._learnt = {like: share for like, share in (learnt or {}).items() if gpus and share > gpus}
        self._tries: dict[str, tuple[int, int, int]] = {}
        """By stage: tries without getting further, how far it was, and how many bystanders had died at the first."""

    def gpus(self, segment: Segment) -> float:
        """The share that a segment is to be run on; 0 where a worker's own will do."""
        if not self._learnt:
            return 0.0
        return max(self._learnt.get(like(step), 0.0) for step in segment.steps)

    def interrupted(self, key: str) -> bool:
        """Whether a worker has died over a stage."""
        return key in self._tries

    def judge(self, segment: Segment, failed: Failed, position: int = 0) -> Verdict:
        """Whether a segment that came back with `failed` is run again.

        Args:
            segment: what was left of it.
            failed: of one of the kinds in `RETRIED`.
            position: how far checkpoints of its stages have come, in steps.
        """
        reason = f"{failed.kind}: {failed.message}"
        if failed.kind == "preempted":
            return Verdict(again=True, reason=reason)
        if failed.kind == "out of GPU memory":
            return self._larger(segment, failed, reason)
        assert failed.kind == "worker died", failed.kind
        tries, before, since = self._tries.get(failed.key, (0, 0, failed.bystanders))
        tries, since = (1, failed.bystanders) if position > before else (tries + 1, since)
        self._tries[failed.key] = tries, max(before, position), since
        if tries < min(MOST_TRIES + TRIES_FOR_A_BYSTANDER * (failed.bystanders - since), MOST_TRIES_EVER):
            return Verdict(again=True, reason=reason, tries=tries)
        why = f"worker died: {tries} workers died over this stage (out of memory, or a crash in native code)"
        return Verdict(again=False, reason=f"{why}; the last: {failed.message}", tries=tries)

    def _larger(self, segment: Segment, failed: Failed, reason: str) -> Verdict:
        share = max(self._gpus, segment.gpus)
        if not 0 < share < 1:
            return Verdict(again=False, reason=reason)
        name = next(like(step) for step in segment.steps if step.key == failed.key)
        self._learnt[name] = max(self._learnt.get(name, 0.0), min(1.0, 2 * share))
        return Verdict(again=True, reason=reason, like=name, gpus=self._learnt[name])


def like(step: Step) -> str:
    """What names the stages that need as much memory as this one: their task, and what fills a batch."""
    what = f"batch_size={step.op.recipe.batch_size}" if isinstance(step.op, Train) else type(step.op).__name__
    return f"{step.task} {what}".strip()

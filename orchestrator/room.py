"""A limit on the room that a store takes, kept while a study runs: `max_store_gb`."""

from __future__ import annotations

import logging
import math
import time
from collections.abc import Callable, Collection
from concurrent.futures import Future, ThreadPoolExecutor

from orchestrator.errors import StoreFull
from orchestrator.retention import Others, sweep
from orchestrator.store.ledger import Ledger
from orchestrator.store.store import Store

_LOG = logging.getLogger("orchardist.room")

GB = 10**9

EVERY_SECONDS = 30.0
"""How often the store is measured, at most: an object store lists every file for it."""
_SOON_SECONDS = 2.0
_INTERVAL_PER_DURATION = 20.0


class Room:
    """Keeps a store below a limit, as far as this study's own states can be spared.

    The states of all its studies count: that is what a disk sees. Above the limit those of this study go that neither a
    front, a ticket, a rewind point, another study nor a trial under way needs. Where that is not enough no further
    trial begins until those under way have ended and theirs can go, too; and where nothing is under way any more, the
    run ends with a clear line. It is measured now and then, so that a limit may be passed for a while by what the
    workers make in half a minute, and by what the trials under way need.

    Args:
        most_gb: the limit in GB of 10⁹ bytes; 0: none.
        ledger: of this process, which drives the study.
        threads: where measuring may take its time.
        clock: in seconds.
    """

    def __init__(
        self,
        store: Store,
        study: str,
        most_gb: float,
        ledger: Ledger,
        threads: ThreadPoolExecutor,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self.store = store
        self.study = study
        self.most_gb = most_gb
        self._ledger = ledger
        self._threads = threads
        self._clock = clock
        self._others = Others(store, study)
        self._measuring: Future[int] | None = None
        self._began_at = 0.0
        self._next_at = -math.inf
        self.full = False
        """No further trial is to begin."""

    def keep(self, under_way: Callable[[], Collection[str]], *, now: bool = False, idle: bool = False) -> None:
        """Called often; measures now and then, and makes room where there is none.

        Args:
            under_way: the states that trials under way may need.
            now: measure at once.
            idle: no trial is under way that could make room by its end.

        Raises:
            StoreFull: there is no room, and nothing that could make some.
        """
        if not self.most_gb:
            return
        if self._measuring is None:
            if not (now or (self.full and idle)) and self._clock() < self._next_at:
                return
            self._began_at = self._clock()
            self._measuring = self._threads.submit(self.store.used)
        if not (now or (self.full and idle) or self._measuring.done()):
            return
        used = self._measuring.result()
        self._measuring = None
        most = self.most_gb * GB
        if used > most:
            swept = sweep(self.store, self.study, self._ledger, others=self._others, under_way=under_way())
            if swept.states or swept.checkpoints:
                _LOG.warning(
                    "the store %s holds %s, max_store_gb is %g: %d states of the study %s that nothing needs are gone, "
                    "%s; asked for, they are made again",
                    *(self.store.name, _gb(used), self.most_gb, swept.states, self.study, _gb(swept.bytes)),
                )
            used -= swept.bytes
        full = used > most
        if full and idle:
            raise StoreFull(
                f"the store {self.store.name} holds {_gb(used)}, and all of it is needed: more than max_store_gb = "
                f"{self.most_gb:g}; raise it, or remove what other studies left (`gc`), and run it again: what is "
                "finished is not lost"
            )
        if full and not self.full:
            _LOG.warning(
                "the store %s holds %s, max_store_gb is %g: no further trial begins until those under way have ended",
                *(self.store.name, _gb(used), self.most_gb),
            )
        self.full = full
        took = self._clock() - self._began_at
        self._next_at = self._clock() + max(_SOON_SECONDS if full else EVERY_SECONDS, _INTERVAL_PER_DURATION * took)


def _gb(count: int) -> str:
    return f"{count / GB:.3g} GB"

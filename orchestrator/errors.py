"""Every error that Orchardist raises on purpose.

OrchardistError
├── InputError (a ValueError)      what the user wrote is wrong: exit code 2
│   ├── SpecError                  the study file
│   ├── TaskError                  the task file, its model or its data
│   ├── PlanError                  a mix of choices that makes no sense, with the reason
│   ├── UnknownName                a name that no registry knows
│   ├── QueryError                 a bound or a key that cannot be answered
│   └── StoreError                 a store that cannot be opened, read or written
│       └── StoreFull              it holds more than the study file lets it
├── StageFailed                    one trial's work went wrong: a failed outcome, the study goes on
│   ├── NotFinite                  a loss, a weight or a score became NaN or infinite
│   └── TimedOut                   a stage took longer than the study lets it
├── StoreFailed                    a store that had answered failed in the middle of a run: exit code 1, run it again
├── WorkersUnusable                workers do not share the driver's store or code: exit code 2
└── WorkersDied                    workers end before they are ready, again and again, and nobody says why
"""

from __future__ import annotations

from collections.abc import Iterable
from difflib import get_close_matches


class OrchardistError(Exception):
    """The root of the family."""


class InputError(OrchardistError, ValueError):
    """Something that the user wrote is wrong; the message names it, its place and what would be legal."""


class SpecError(InputError):
    """The study file is wrong."""


class TaskError(InputError):
    """The task file, its model or its data are wrong."""


class PlanError(InputError):
    """A mix of choices that makes no sense together; the message gives the reason."""


class UnknownName(InputError):
    """A name that its registry does not know."""

    def __init__(self, kind: str, name: object, known: Iterable[str]) -> None:
        names = sorted(known)
        close = get_close_matches(str(name), names, n=1)
        hint = f"; did you mean {close[0]!r}?" if close else "."
        super().__init__(f"unknown {kind} {name!r}{hint} Known: {', '.join(names) or 'none'}")


class QueryError(InputError):
    """A bound, a key or a study name that cannot be answered."""


class StoreError(InputError):
    """A store that cannot be opened, read or written."""


class StoreFull(StoreError):
    """The store holds more than the study file lets it, and all of it is needed."""


class StageFailed(OrchardistError):
    """One stage of one trial could not be done."""


class NotFinite(StageFailed):
    """A loss, a weight or a score became NaN or infinite."""


class TimedOut(StageFailed):
    """A stage took longer than the study lets it."""


class StoreFailed(OrchardistError):
    """A store that answered when the study began has failed since; the same command goes on from what is finished."""


class WorkersUnusable(OrchardistError):
    """The workers do not see the driver's store, or run other code than the driver."""


class WorkersDied(OrchardistError):
    """For a long time every worker has died before it was ready, without a word of its own."""

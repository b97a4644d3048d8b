"""Two data sets of handwritten digits under one network: a ticket found on one can be tried on the other."""

from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import partial

from orchestrator.tasks import Task, digits, mnist
from orchestrator.tasks.models import mlp

DATA: dict[str, Callable[[], Task]] = {"mnist": mnist.task, "digits": partial(digits.task, size=28)}


def task(data: str = "mnist", hidden: Sequence[int] = (128, 64)) -> Task:
    """`data`: "mnist" (5,000 images) or "digits" (1,797, scaled to MNIST's 28x28); `hidden`: the layers' widths."""
    return replace(DATA[data](), model=partial(mlp, 28 * 28, *hidden, 10))

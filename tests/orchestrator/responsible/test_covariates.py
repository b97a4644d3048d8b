"""What sets classes apart, on images of four pixels."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

from orchestrator.responsible.covariates import class_facts, compressed_bytes, entropy_bits
from orchestrator.tasks import Task
from orchestrator.tasks.load import LoadedTask, load
from orchestrator.tasks.source import Source, collect


def loaded(x: Any, y: Any, **given: Any) -> LoadedTask:
    task = Task(model=lambda: nn.Linear(4, 3), train=(x, y), valid=(x, y), classes=["a", "b", "c"], **given)
    return LoadedTask(task, Source(name="fake.py", module="fake", files={}, digest="0"), {})


X = torch.tensor([[0.0, 0.0, 0.0, 0.0], [0.0, 0.0, 1.0, 1.0], [0.0, 0.2, 0.4, 1.0], [1.0, 1.0, 1.0, 1.0]])


def test_by_hand() -> None:
    facts = class_facts(loaded(X, torch.tensor([0, 0, 1, 0])))
    assert facts is not None
    assert [(fact.rows, fact.share) for fact in facts] == [(3, 9 / 4), (1, 3 / 4), (0, 0)]
    assert [fact.entropy_bits for fact in facts] == pytest.approx([1 / 3, 2, None])
    assert facts[2].compressed_bytes is None


def test_entropy_is_in_bits_and_noise_does_not_compress() -> None:
    assert entropy_bits(np.zeros(8, dtype=np.uint8)) == 0
    assert entropy_bits(np.arange(256, dtype=np.uint8)) == 8
    noise = np.random.default_rng(0).integers(256, size=1000).astype(np.uint8)
    assert compressed_bytes(np.zeros(1000, dtype=np.uint8)) < 30 < 1000 < compressed_bytes(noise)


def test_inputs_without_pixels_have_no_complexity() -> None:
    facts = class_facts(loaded((X, X), torch.tensor([0, 1, 2, 2])))
    assert facts is not None and all(fact.rows and fact.entropy_bits is None for fact in facts)


def test_what_is_not_labelled_in_memory_has_no_facts() -> None:
    assert class_facts(loaded(X, torch.zeros(4, 2, dtype=torch.int64))) is None
    rows = [(x, torch.tensor(0)) for x in X]
    task = Task(model=lambda: nn.Linear(4, 3), train=rows, valid=rows, classes=["a", "b"])
    assert class_facts(LoadedTask(task, Source(name="fake.py", module="fake", files={}, digest="0"), {})) is None


def test_a_planted_minority_is_seen() -> None:
    facts = class_facts(load(collect("digits", Path()), {"minority": [8, 9]}))
    assert facts is not None
    assert [fact.share < 0.5 for fact in facts] == [False] * 8 + [True] * 2

"""Sizes and their ratios."""

from __future__ import annotations

from math import inf

import pytest
import torch
from torch import nn

from orchestrator.errors import InputError
from orchestrator.measures.size import compression_ratio, parameters, theoretical_speedup


def test_masked_entries_are_zero_and_all_others_are_not() -> None:
    model = nn.Sequential(nn.Linear(2, 2), nn.BatchNorm1d(2))
    nn.init.zeros_(model.get_parameter("0.bias"))
    assert parameters(model, {}) == (10, 10)
    assert parameters(model, {"0.weight": torch.tensor([[True, False], [False, False]])}) == (7, 10)


def test_tied_tensors_count_once_under_either_name() -> None:
    model = nn.Sequential(nn.Embedding(3, 2), nn.Linear(2, 3, bias=False))
    model[1].weight = model[0].weight
    mask = torch.tensor([[True, True], [True, False], [True, True]])
    assert parameters(model, {"0.weight": mask}) == (5, 6)
    assert parameters(model, {"1.weight": mask}) == (5, 6)
    assert parameters(model, {"0.weight": mask, "1.weight": mask}) == (5, 6)


def test_masks_that_fit_nothing() -> None:
    with pytest.raises(InputError, match="there is a mask for 'x', which is no parameter of the model"):
        parameters(nn.Linear(2, 2), {"x": torch.ones(2, 2, dtype=torch.bool)})
    with pytest.raises(InputError, match=r"the mask of 'weight' has shape \(4,\), its weights \(2, 2\)"):
        parameters(nn.Linear(2, 2), {"weight": torch.ones(4, dtype=torch.bool)})


def test_ratios_are_original_over_new() -> None:
    assert compression_ratio(5, 20) == 4.0
    assert theoretical_speedup(100, 25.0) == 4.0
    assert compression_ratio(0, 20) == inf
    assert theoretical_speedup(100, 0.0) == inf

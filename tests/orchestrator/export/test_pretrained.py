"""Pruned models of transformers, written by `save_pretrained` and read back with nothing of ours."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from orchestrator.errors import InputError
from orchestrator.export import ExportRefused
from orchestrator.export.pretrained import save_pretrained
from orchestrator.pruning.finding import find
from orchestrator.pruning.structure import without
from orchestrator.removal.shrinking import shrink
from orchestrator.tasks.data import call

transformers = pytest.importorskip("transformers", reason="transformers is not installed: the extra `huggingface`")

EXAMPLE = {"input_ids": torch.arange(10).reshape(2, 5)}


def bert() -> Any:
    """Two layers with six hidden neurons each."""
    torch.manual_seed(0)
    config = transformers.BertConfig(
        vocab_size=10,
        max_position_embeddings=5,
        hidden_size=8,
        num_hidden_layers=2,
        num_attention_heads=2,
        intermediate_size=6,
        num_labels=3,
        initializer_range=0.5,
    )
    return transformers.BertForSequenceClassification(config).eval()


def pruned(model: Any, structure: str, kept: list[list[bool]]) -> nn.Module:
    """The model without the units that are not kept, group by group of its feed-forward layers."""
    weights = [name for name, _ in model.named_parameters() if "intermediate.dense.weight" in name]
    weights += [name for name, _ in model.named_parameters() if structure == "layer" and name.endswith("dense.weight")]
    units = find(model, EXAMPLE, structure, weights).units
    shapes = {name: tensor.shape for name, tensor in model.named_parameters()}
    masks = without([(u, torch.tensor(k)) for u, k in zip(units, kept, strict=True)], {}, shapes)
    return shrink(model, masks, units, EXAMPLE).model


def outputs(model: nn.Module) -> Tensor:
    with torch.no_grad():
        found = call(model, EXAMPLE)
    assert isinstance(found, Tensor)
    return found


def test_neurons_that_are_gone_are_gone_from_the_config(tmp_path: Path) -> None:
    whole = bert()
    small = pruned(whole, "neuron", [[True, False, True, True, False, False], [False, True, True, False, True, False]])
    folder = save_pretrained(small, tmp_path / "model", EXAMPLE)
    assert sorted(path.name for path in folder.iterdir()) == ["config.json", "model.safetensors"]
    again = transformers.AutoModelForSequenceClassification.from_pretrained(folder)
    assert again.config.intermediate_size == 3 and whole.config.intermediate_size == 6
    assert again.config.architectures == ["BertForSequenceClassification"]
    assert torch.equal(outputs(again.eval()), outputs(small))
    assert sum(p.numel() for p in again.parameters()) < sum(p.numel() for p in whole.parameters())


def test_single_weights_leave_the_config_as_it_is(tmp_path: Path) -> None:
    model = bert()
    with torch.no_grad():
        model.bert.encoder.layer[0].intermediate.dense.weight[::2] = 0
    again = transformers.AutoModelForSequenceClassification.from_pretrained(save_pretrained(model, tmp_path, EXAMPLE))
    assert again.config.intermediate_size == 6
    assert int((again.bert.encoder.layer[0].intermediate.dense.weight == 0).sum()) == 24
    assert torch.equal(outputs(again.eval()), outputs(model))


def test_layers_of_different_widths_are_refused(tmp_path: Path) -> None:
    small = pruned(bert(), "neuron", [[True] * 2 + [False] * 4, [True] * 4 + [False] * 2])
    with pytest.raises(ExportRefused, match='no BertConfig has these widths .6 became 2, 6 became 4.*scope = "layer"'):
        save_pretrained(small, tmp_path / "model", EXAMPLE)
    assert not (tmp_path / "model").exists()


def test_heads_are_not_found_so_nothing_is_claimed_of_them() -> None:
    """Their attention is written by hand, in a layout that no tracing proves: see the README's limits."""
    names = [name for name, p in bert().named_parameters() if p.dim() == 2]
    assert find(bert(), EXAMPLE, "head", names).units == ()
    refused = find(bert(), EXAMPLE, "neuron", names).refused
    assert refused["bert.encoder.layer.0.attention.self.query.weight"] == "attention mixes its units"


def test_another_model_is_refused(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="and this is a Linear"):
        save_pretrained(nn.Linear(2, 2), tmp_path, torch.zeros(1, 2))


def test_canary_outputs_that_differ_are_seen(tmp_path: Path) -> None:
    model = bert()
    model.bert.encoder.layer[0].register_forward_hook(lambda module, given, out: out + 1)
    with pytest.raises(ExportRefused, match="computes something else"):
        save_pretrained(model, tmp_path, EXAMPLE)

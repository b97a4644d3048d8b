"""Where methods that prune before training lose a whole layer: figure 1 of SynFlow (Tanaka et al., 2020).

The network is 784-300-100-10 without biases: N = 266,200 weights in L = 3 layers. At a compression of c, N / c weights are
left; a method's critical compression is the largest at which every layer still has one, and N / L = 10^4.948 is the
largest that any method could bear.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from itertools import pairwise
from statistics import fmean

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from orchestrator.pruning.criteria import magnitude, random, snip, synflow
from orchestrator.pruning.masks import index_hashes, keep_top
from orchestrator.pruning.statistics import gather
from orchestrator.tasks import Task
from orchestrator.training.loop import arithmetic

WIDTHS = (784, 300, 100, 10)
COUNT = 266_200
LAYERS = 3
MOST = COUNT / LAYERS

Scores = dict[str, Tensor]


def network(seed: int) -> nn.Sequential:
    """Bias-free, Glorot, in double precision."""
    torch.manual_seed(seed)
    layers: list[nn.Module] = []
    for inputs, outputs in pairwise(WIDTHS):
        linear = nn.Linear(inputs, outputs, bias=False).double()
        nn.init.xavier_normal_(linear.weight)
        layers += [linear, nn.ReLU()]
    return nn.Sequential(*layers[:-1])


def weights(seed: int) -> Scores:
    found = {name: p.detach().clone() for name, p in network(seed).named_parameters()}
    assert sum(weight.numel() for weight in found.values()) == COUNT
    return found


def gathered(what: str, masked: Mapping[str, Tensor], batches: list[tuple[Tensor, Tensor]]) -> Scores:
    model = network(seed=0)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            parameter.copy_(masked[name])
    task = Task(model=lambda: model, train=None, valid=None, loss=F.cross_entropy)
    with arithmetic(torch.device("cpu")):
        return gather(what, model, task, batches, [*masked], seed=0, example=torch.zeros(1, 784), parameters={})


def synflow_scores(masked: Mapping[str, Tensor], seed: int = 0) -> Scores:
    del seed
    flows = gathered("synaptic_flow", masked, [])
    return {name: synflow(weight, flows[name]) for name, weight in masked.items()}


def snip_scores(whole: Mapping[str, Tensor], seed: int) -> Scores:
    draw = torch.Generator().manual_seed(seed)
    batch = torch.randn(256, WIDTHS[0], generator=draw, dtype=torch.float64), torch.arange(256) % WIDTHS[-1]
    slopes = gathered("gradient", whole, [batch])
    return {name: snip(weight, slopes[name]) for name, weight in whole.items()}


def random_scores(whole: Mapping[str, Tensor], seed: int) -> Scores:
    draw = torch.Generator().manual_seed(seed)
    return {name: random(weight, draw) for name, weight in whole.items()}


def magnitude_scores(whole: Mapping[str, Tensor], seed: int) -> Scores:
    del seed
    return {name: magnitude(weight) for name, weight in whole.items()}


def kept(scores: Scores, whole: Mapping[str, Tensor], keep: int) -> Scores:
    """The masks of a global ranking."""

    def ties() -> tuple[Tensor, Tensor]:
        sizes = torch.cat([weight.abs().reshape(-1) for weight in whole.values()])
        return sizes, torch.cat([index_hashes(name, weight.numel()) for name, weight in whole.items()])

    mask = keep_top(torch.cat([score.reshape(-1) for score in scores.values()]), keep, ties)
    parts = torch.split(mask, [weight.numel() for weight in whole.values()])
    return {name: part.reshape(whole[name].shape) for name, part in zip(whole, parts, strict=True)}


def left(masks: Mapping[str, Tensor]) -> list[int]:
    return [int(mask.sum()) for mask in masks.values()]


def iterated(compression: float, rounds: int) -> list[list[int]]:
    """Weights left in each layer after each of `rounds` rounds of SynFlow, to c^(-k/n) of all after round k of n."""
    whole = weights(seed=0)
    masks = {name: torch.ones_like(weight, dtype=torch.bool) for name, weight in whole.items()}
    history = []
    for step in range(1, rounds + 1):
        masked = {name: weight * masks[name] for name, weight in whole.items()}
        after = kept(synflow_scores(masked), masked, round(COUNT * compression ** (-step / rounds)))
        assert all(not (after[name] & ~masks[name]).any() for name in masks), "a mask grew"
        masks = after
        history.append(left(masks))
    return history


def critical(scores_of: Callable[[Mapping[str, Tensor], int], Scores], seed: int) -> float:
    """log10 of the largest compression in one shot at which no layer is empty."""
    whole = weights(seed)
    scores = scores_of(whole, seed)
    best = min(float(score.max()) for score in scores.values())
    keep = sum(int((score >= best).sum()) for score in scores.values())
    assert all(left(kept(scores, whole, keep))), "with so many every layer has one"
    assert not all(left(kept(scores, whole, keep - 1))), "with one less a layer is empty"
    return math.log10(COUNT / keep)


def test_the_flow_through_every_layer_is_the_same() -> None:
    scores = [*synflow_scores(weights(seed=0)).values()]
    sums = [float(score.sum()) for score in scores]
    assert sums == pytest.approx([sums[0]] * LAYERS, rel=1e-10)
    for made, read in pairwise(scores):
        assert torch.allclose(made.sum(dim=1), read.sum(dim=0), rtol=1e-10, atol=0)


@pytest.mark.parametrize(
    ("scores_of", "published", "within"),
    [
        (random_scores, 3.25, 0.3),
        (magnitude_scores, 2.95, 0.15),
        (snip_scores, 2.30, 0.3),
        (synflow_scores, 1.20, 0.05),
    ],
)
def test_in_one_shot_layers_collapse_early(
    scores_of: Callable[[Mapping[str, Tensor], int], Scores], published: float, within: float
) -> None:
    assert fmean(critical(scores_of, seed) for seed in range(5)) == pytest.approx(published, abs=within)


@pytest.mark.parametrize("compression", [10**4.8, MOST])
def test_a_hundred_rounds_never_lose_a_layer(compression: float) -> None:
    history = iterated(compression, 100)
    assert [sum(counts) for counts in history] == [round(COUNT * compression ** (-k / 100)) for k in range(1, 101)]
    assert all(all(counts) for counts in history)
    if compression == MOST:
        assert history[-1] == [1, 1, 1]


def test_ten_rounds_do() -> None:
    assert not all(iterated(10**4.8, 10)[-1])

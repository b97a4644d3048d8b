"""What a ticket has to beat: other masks over the same weights, or the same mask over other weights.

Every control starts from dense weights, the ancestor's or another init's, never from weights under the ticket's mask,
and is handed out verified (`verified.control`). Each kind is a function of ticket, ancestor and seed, and of what it
says in `needs`:

    scores   of the ticket's search, by tensor name; higher was kept (optional)
    other    the state of another init, of the same model; the seed is then that init's

What its masks and weights must be, for the verification, stands in `masks` and `weights`.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import replace

import torch
from torch import Tensor

from orchestrator.pruning.masks import index_hashes, keep_top
from orchestrator.registry import Registry
from orchestrator.seeds import derive
from orchestrator.state import State

CONTROLS: Registry[Callable[..., State]] = Registry("control")
register = CONTROLS.register


@register("shuffled", masks="moved", weights="ancestor", needs=())
def shuffled(ticket: State, ancestor: State, seed: int) -> State:
    """The ticket's mask shuffled within each layer, over the same weights (Frankle et al., 2021)."""
    masks = {name: _elsewhere(mask, seed, "shuffled", name) for name, mask in ticket.masks.items()}
    return _over(ancestor, masks)


@register("random", masks="moved overall", weights="ancestor", needs=())
def random(ticket: State, ancestor: State, seed: int) -> State:
    """As many weights as the ticket keeps, drawn from all layers together, over the same weights."""
    sizes = [mask.numel() for mask in ticket.masks.values()]
    joined = torch.cat([mask.reshape(-1) for mask in ticket.masks.values()])
    parts = torch.split(_elsewhere(joined, seed, "random", "all"), sizes)
    masks = {name: part.reshape(ticket.masks[name].shape) for name, part in zip(ticket.masks, parts, strict=True)}
    return _over(ancestor, masks)


@register("random-layer", masks="moved", weights="ancestor", needs=())
def random_layer(ticket: State, ancestor: State, seed: int) -> State:
    """As many weights of each layer as the ticket keeps, drawn anew: a second draw of what "shuffled" draws."""
    masks = {name: _elsewhere(mask, seed, "random-layer", name) for name, mask in ticket.masks.items()}
    return _over(ancestor, masks)


@register("inverted", masks="inverted", weights="ancestor", needs=("scores",))
def inverted(ticket: State, ancestor: State, seed: int, scores: Mapping[str, Tensor] | None = None) -> State:
    """The weights that the ticket dropped, as many in each layer as it keeps (Frankle et al., 2021).

    For a mask that keeps the highest scores of each layer this keeps the lowest. A mask that was found in rounds or
    combined has no one order, so that the rule is told by the mask: dropped weights come first, then kept ones, each
    in ascending order of the scores and then of a seeded hash. A layer more than half dense must keep some of both.
    """
    return _over(ancestor, {name: _inverse(mask, name, seed, scores) for name, mask in ticket.masks.items()})


@register("reinitialised", masks="same", weights="other", needs=("other",))
def reinitialised(ticket: State, ancestor: State, seed: int, other: State) -> State:
    """The ticket's mask over another init's weights (Frankle & Carbin, 2019)."""
    return _over(other, ticket.masks)


@register("sign-kept", masks="same", weights="magnitudes", needs=("other",))
def sign_kept(ticket: State, ancestor: State, seed: int, other: State) -> State:
    """The ticket's mask and signs with another init's magnitudes (Zhou et al., 2019)."""
    return _signed(ticket, ancestor, other, {name: other.weights[name].abs() for name in ticket.masks})


@register("sign-constant", masks="same", weights="constants", needs=("other",))
def sign_constant(ticket: State, ancestor: State, seed: int, other: State) -> State:
    """The ticket's mask and signs with one magnitude per layer, its standard deviation at init (Zhou et al., 2019)."""
    return _signed(ticket, ancestor, other, {name: layer_constant(other.weights[name]) for name in ticket.masks})


def layer_constant(weight: Tensor) -> Tensor:
    """A tensor of the weight's shape that holds its standard deviation everywhere."""
    return torch.full_like(weight, float(weight.double().std(correction=0)))


def _over(dense: State, masks: Mapping[str, Tensor]) -> State:
    return replace(dense, masks=dict(masks), remarks={}).masked()


def _signed(ticket: State, ancestor: State, other: State, sizes: Mapping[str, Tensor]) -> State:
    """The other init with these magnitudes and the ancestor's signs in the masked tensors."""
    signed = {name: torch.copysign(size, ancestor.weights[name]) for name, size in sizes.items()}
    return _over(replace(other, weights={**other.weights, **signed}), ticket.masks)


def _elsewhere(mask: Tensor, seed: int, *names: str) -> Tensor:
    """As many entries, drawn uniformly from all other masks of that count; the same mask where there is no other."""
    flat = mask.reshape(-1)
    free = 0 < int(flat.sum()) < flat.numel()
    drawn, attempt = flat, 0
    while free and torch.equal(drawn, flat):
        generator = torch.Generator().manual_seed(derive(seed, *names, attempt))
        drawn = flat[torch.randperm(flat.numel(), generator=generator)]
        attempt += 1
    return drawn.reshape(mask.shape).clone()


def _inverse(mask: Tensor, name: str, seed: int, scores: Mapping[str, Tensor] | None) -> Tensor:
    flat = mask.reshape(-1)
    worst = torch.zeros(flat.numel(), dtype=torch.float64)
    if scores is not None:
        worst = -scores[name].detach().reshape(-1)
    hashes = index_hashes(f"{seed}/{name}", flat.numel())
    result = torch.zeros_like(flat)
    wanted = int(flat.sum())
    for place in (~flat, flat):
        keep = min(wanted, int(place.sum()))
        result[place] = _kept(worst[place], hashes[place], keep)
        wanted -= keep
    return result.reshape(mask.shape)


def _kept(scores: Tensor, hashes: Tensor, keep: int) -> Tensor:
    return keep_top(scores, keep, lambda: (torch.zeros_like(scores), hashes))

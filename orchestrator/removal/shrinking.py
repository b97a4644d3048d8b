"""Removal: from masks that cover whole units to a physically smaller module that computes the same.

Every tensor is cut along the dimensions in which units lie, the modules around them are refitted, and the result is
compared with the masked model before it is handed out: what cannot be shown to be equal is refused.
"""

from __future__ import annotations

import copy
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize

from orchestrator.pruning.refits import REFITS
from orchestrator.pruning.structure import Units, kept_units
from orchestrator.removal.proof import ShrinkRefused as ShrinkRefused
from orchestrator.removal.proof import copied, evaluated, first_line, outputs_of, prove
from orchestrator.tasks.data import Nested, move

HOOKS = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")


@dataclass(frozen=True, kw_only=True)
class Shrunk:
    """A model without its dead units.

    Args:
        model: computes what the masked model computes, in the same mode (training or not) as the model given.
        kept: for each parameter and buffer of it, under all of its names, the positions that were kept: int64,
            ascending, one tensor for each dimension. What went with a whole layer is not there.
    """

    model: nn.Module
    kept: Mapping[str, tuple[Tensor, ...]]


def shrink(
    model: nn.Module,
    masks: Mapping[str, Tensor],
    units: Iterable[Units],
    example: Nested,
    *,
    inputs: Sequence[Nested] = (),
) -> Shrunk:
    """The model without the units of which nothing that makes them is kept; the model given stays as it is.

    Single weights that are masked in what is left are zero in the shrunk model.

    Args:
        model: its weights; whatever the masks say is gone counts as zero.
        masks: by parameter name, a tied parameter's first; True = kept. A tensor without one is dense.
        units: those that the masks were made with.
        example: inputs of the model; the proof runs on random ones of this shape.
        inputs: batches of real inputs, on which the proof runs too.

    Raises:
        ShrinkRefused: nothing is left of some width, a module cannot take narrower tensors, or the outputs are not
            equal to the masked model's.
    """
    # These stand above this module: they find units by it. Imported, they register refits.
    from orchestrator.pruning import attention, depth, recurrent  # noqa: F401

    units = list(units)
    example = move(example, next((tensor.device for tensor in model.parameters()), torch.device("cpu")))
    masked = masked_copy(model, masks)
    kept = _kept_positions(masked, masks, depth.narrowable(units, masks))
    small = _refitted(masked, kept)
    for group in filter(depth.are_branches, units):
        try:
            small = depth.remove_branches(small, group, kept_units(group, masks), example)
        except ValueError as error:
            raise ShrinkRefused(group.name, first_line(error)) from error
    _fit_bare_norms(small, example)
    prove(masked, small, example, inputs=inputs)
    left = _own(small)
    return Shrunk(model=small, kept={name: positions for name, positions in kept.items() if name in left})


def masked_copy(model: nn.Module, masks: Mapping[str, Tensor]) -> nn.Module:
    """A copy of the model with zeros under the masks."""
    masked = copied(model)
    with torch.no_grad():
        for name, parameter in masked.named_parameters():
            if name in masks:
                parameter.masked_fill_(~masks[name].to(parameter.device), 0)
    return masked


def narrow(weights: Mapping[str, Tensor], kept: Mapping[str, tuple[Tensor, ...]]) -> dict[str, Tensor]:
    """The kept positions of each tensor that the shrunk model has; single numbers pass through.

    Args:
        weights: weights, masks or moments in full coordinates, by parameter or buffer name.
        kept: of a `Shrunk`.
    """
    return {
        name: _cut(tensor, kept[name]) if tensor.dim() else tensor for name, tensor in weights.items() if name in kept
    }


def scatter(
    small: Mapping[str, Tensor], kept: Mapping[str, tuple[Tensor, ...]], like: Mapping[str, Tensor]
) -> dict[str, Tensor]:
    """The exact inverse of `narrow`: full coordinates again, under the names of `like`.

    Args:
        small: narrowed weights, masks or moments by parameter or buffer name.
        kept: of the `Shrunk` they belong to.
        like: gives the full shapes, and the values wherever something was removed.
    """
    full = {}
    for name, tensor in like.items():
        if name not in small or not small[name].dim():
            full[name] = small.get(name, tensor).clone()
            continue
        whole = tensor.to(small[name].dtype, copy=True)
        whole[torch.meshgrid(*(places.to(whole.device) for places in kept[name]), indexing="ij")] = small[name]
        full[name] = whole
    return full


def _cut(tensor: Tensor, positions: Sequence[Tensor]) -> Tensor:
    for dim, places in enumerate(positions):
        if len(places) < tensor.shape[dim]:
            tensor = tensor.index_select(dim, places.to(tensor.device))
    return tensor


def _kept_positions(
    model: nn.Module, masks: Mapping[str, Tensor], units: Iterable[Units]
) -> dict[str, tuple[Tensor, ...]]:
    stays: dict[tuple[str, int], Tensor] = {}
    for group in units:
        alive = kept_units(group, masks)
        if not alive.any():
            raise ShrinkRefused(group.name, f"none of its {group.count} units is left")
        if alive.all():
            continue
        for piece in group.slices:
            place = (piece.tensor, piece.dim)
            here = alive[piece.owner.clamp(min=0)] | (piece.owner < 0)
            stays[place] = stays[place] & here if place in stays else here
    for (name, _), here in stays.items():
        if not here.any():
            raise ShrinkRefused(name.rpartition(".")[0], f"nothing of {name!r} is left")
    kept = {}
    for name, (first, tensor) in _own(model).items():
        full = (torch.ones(size, dtype=torch.bool) for size in tensor.shape)
        kept[name] = tuple(stays.get((first, dim), whole).nonzero().squeeze(1) for dim, whole in enumerate(full))
    return kept


def _own(model: nn.Module) -> dict[str, tuple[str, Tensor]]:
    """Every parameter and buffer under each of its names, with its first name."""
    firsts: dict[int, str] = {}
    found = {}
    for named in (model.named_parameters, model.named_buffers):
        for name, tensor in named(remove_duplicate=False):
            found[name] = (firsts.setdefault(id(tensor), name), tensor)
    return found


def _refitted(masked: nn.Module, kept: Mapping[str, tuple[Tensor, ...]]) -> nn.Module:
    """A copy of the model whose modules hold only what is kept."""
    small = copy.deepcopy(masked)
    own = _own(small)
    paths: dict[int, list[str]] = {}
    for path, module in small.named_modules(remove_duplicate=False):
        paths.setdefault(id(module), []).append(path)
    for path, module in reversed(list(small.named_modules())):
        local = {**dict(module.named_parameters(recurse=False)), **dict(module.named_buffers(recurse=False))}
        cut = {name: _cut(tensor.detach(), kept[_join(path, name)]) for name, tensor in local.items()}
        if all(cut[name].shape == tensor.shape for name, tensor in local.items()):
            continue
        refitted = _refit(path, module, cut)
        for place in paths[id(module)]:
            if not place:
                small = refitted
            else:
                parent, _, name = place.rpartition(".")
                small.get_submodule(parent)._modules[name] = refitted
    for name, (first, _) in own.items():
        if name != first:
            _tie(small, name, first)
    return small


def _refit(path: str, module: nn.Module, cut: Mapping[str, Tensor]) -> nn.Module:
    if isinstance(module, parametrize.ParametrizationList) or parametrize.is_parametrized(module):
        layer = path.partition(".parametrizations")[0]
        raise ShrinkRefused(layer, "its tensors are parametrised, so that what they hold is not what it computes with")
    hooked = [hooks.strip("_").replace("_", " ") for hooks in HOOKS if getattr(module, hooks)]
    if hooked:
        raise ShrinkRefused(path, f"it has {hooked[0]}, which may rely on its width")
    function = REFITS.get(type(module))
    if function is None:
        raise ShrinkRefused(path, f"no refit is known for {type(module).__name__}")
    try:
        return function(module, cut)
    except ValueError as error:
        raise ShrinkRefused(path, first_line(error)) from error


def _tie(model: nn.Module, name: str, first: str) -> None:
    """Lets `name` be the very tensor called `first`."""
    path, _, local = first.rpartition(".")
    tied = getattr(model.get_submodule(path), local)
    path, _, local = name.rpartition(".")
    holder = model.get_submodule(path)
    (holder._parameters if local in holder._parameters else holder._buffers)[local] = tied


def _join(path: str, name: str) -> str:
    return f"{path}.{name}" if path else name


def _fit_bare_norms(small: nn.Module, example: Nested) -> None:
    """Sets the widths of norms that hold no tensor by which they could be told, from what reaches them."""
    bare = [
        module
        for module in small.modules()
        if isinstance(module, nn.modules.batchnorm._NormBase) and not module.state_dict()
    ]

    def fit(module: nn.modules.batchnorm._NormBase, given: tuple[Tensor, ...]) -> None:
        instance = isinstance(module, nn.modules.instancenorm._InstanceNorm)
        unbatched = instance and given[0].dim() == module._get_no_batch_dim()  # type: ignore[operator]
        module.num_features = given[0].shape[0 if unbatched else 1]

    handles = [module.register_forward_pre_hook(fit) for module in bare]
    try:
        with evaluated(small):
            if bare:
                outputs_of(small, example)
    except Exception:  # the proof meets it again, and says where
        return
    finally:
        for handle in handles:
            handle.remove()

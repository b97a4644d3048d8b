"""Constants moved forward: a unit masked in its weights alone still gives its bias, which its readers can take over."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import replace

import torch
from torch import Tensor, nn
from torch.nn.modules.conv import _ConvNd, _ConvTransposeNd

from orchestrator.pruning.structure import Units, kept_units, without
from orchestrator.removal.proof import TOLERANCES, ShrinkRefused, copied, evaluated, outputs_of, prove, random_batch
from orchestrator.removal.shrinking import masked_copy
from orchestrator.tasks.data import Nested, move


def fold(
    model: nn.Module,
    masks: Mapping[str, Tensor],
    units: Iterable[Units],
    example: Nested,
    *,
    inputs: Sequence[Nested] = (),
) -> tuple[nn.Module, dict[str, Tensor]]:
    """The model with other biases, and masks that cover whole units, which `shrink` can remove.

    Where all weights that make a unit are masked, but not its biases and norms, it gives the same number whatever the
    input. What the layers that read it make of that number is added to their biases, and the unit is masked wherever it
    lies. The outputs stay; all shapes stay.

    Args:
        model: stays as it is.
        masks: by parameter name, a tied parameter's first; True = kept.
        units: those that may be removed.
        example: inputs of the model; constants are measured, and the outputs compared, on random ones of this shape.
        inputs: batches of real inputs, for the same.

    Raises:
        ShrinkRefused: what reaches a reader is not constant; it pads with zeros, so that it is another number at the
            border; it has no bias; or it is no linear layer or plain convolution.
    """
    kept = [(only, kept_units(_weights(only, model), masks)) for only in units]
    return _fold(model, masks, kept, example, inputs)


def fold_removed(
    model: nn.Module,
    before: Mapping[str, Tensor],
    after: Mapping[str, Tensor],
    units: Iterable[Units],
    example: Nested,
    *,
    inputs: Sequence[Nested] = (),
) -> nn.Module:
    """The model with other biases, so that without the units that `after` removes it gives what it gave without the
    weights that make them alone.

    Args:
        model: stays as it is.
        before: masks by parameter name, a tied parameter's first; True = kept.
        after: the masks that remove whole units.
        units: those that may be removed.
        example: inputs of the model, as for `fold`.
        inputs: batches of real inputs, for the same.

    Raises:
        ShrinkRefused: as `fold` does.
    """
    kept = [(group, kept_units(group, after)) for group in units]
    shapes = {name: parameter.shape for name, parameter in model.named_parameters()}
    weightless = without([(_weights(group, model), stays) for group, stays in kept], before, shapes)
    return _fold(model, weightless, kept, example, inputs)[0]


def _fold(
    model: nn.Module,
    masks: Mapping[str, Tensor],
    kept: Sequence[tuple[Units, Tensor]],
    example: Nested,
    inputs: Sequence[Nested],
) -> tuple[nn.Module, dict[str, Tensor]]:
    after = without(kept, masks, {name: parameter.shape for name, parameter in model.named_parameters()})
    masked, folded = masked_copy(model, masks), copied(model)
    gone = _columns(masked, kept)
    for path, constants in _constants(masked, gone, example, inputs).items():
        _take(path, folded.get_submodule(path), masked.get_submodule(path), gone[path], constants)
    prove(masked, masked_copy(folded, after), example, inputs=inputs)
    return folded, after


def _weights(group: Units, model: nn.Module) -> Units:
    """The units as the weights that make them, without biases and norms."""
    tensors = dict(model.named_parameters())
    made = tuple(piece for piece in group.slices if piece.role == "makes" and tensors[piece.tensor].dim() > 1)
    return replace(group, slices=made)


def _columns(model: nn.Module, kept: Iterable[tuple[Units, Tensor]]) -> dict[str, Tensor]:
    """Which inputs of each reading layer come from units that are not kept, bool, by the layer's path."""
    gone: dict[str, Tensor] = {}
    for group, stays in kept:
        for piece in group.slices:
            dead = (piece.owner >= 0) & ~stays[piece.owner.clamp(min=0)]
            if piece.role == "reads" and dead.any():
                path = piece.tensor.rpartition(".")[0]
                gone[path] = gone.get(path, torch.zeros_like(dead)) | dead
    for path in gone:
        layer = model.get_submodule(path)
        if not isinstance(layer, (nn.Linear, _ConvNd)):
            raise ShrinkRefused(path, f"what a {type(layer).__name__} makes of a constant is not known")
    return gone


def _constants(
    model: nn.Module, gone: Mapping[str, Tensor], example: Nested, inputs: Sequence[Nested]
) -> dict[str, Tensor]:
    """The number at each of a layer's inputs that come from units that are gone, by the layer's path."""
    found: dict[str, Tensor] = {}
    for path in gone:
        attention = model.get_submodule(path.rpartition(".")[0])
        if isinstance(attention, nn.MultiheadAttention):
            # Its output projection is no call of a module. A head without weights gives the bias of its values, as the
            # weights that it is summed with come to one.
            biases = attention.in_proj_bias
            if biases is None:
                biases = torch.zeros(3 * attention.embed_dim, device=attention.out_proj.weight.device)
            found[path] = biases.detach().chunk(3)[2][gone[path].to(biases.device)]

    def watch(path: str) -> Callable[..., None]:
        def see(layer: nn.Module, given: tuple[Tensor, ...]) -> None:
            along = -len(layer.kernel_size) - 1 if isinstance(layer, _ConvNd) else -1
            values = given[0].movedim(along, 0)[gone[path].to(given[0].device)].flatten(1)
            constants = found.setdefault(path, values[:, 0].clone())
            limit = TOLERANCES.get(values.dtype, 0.0) * max(1.0, float(constants.abs().max()))
            if (values - constants[:, None]).abs().max() > limit:
                raise ShrinkRefused(path, "units without weights reach it, and do not give it a constant")

        return see

    device = next(model.parameters()).device
    with evaluated(model):
        random, _ = random_batch(model, move(example, device))
        watched = [path for path in gone if path not in found]
        handles = [model.get_submodule(path).register_forward_pre_hook(watch(path)) for path in watched]
        try:
            for batch in (random, *(move(batch, device) for batch in inputs)):
                outputs_of(model, batch)
        finally:
            for handle in handles:
                handle.remove()
    return found


def _take(path: str, layer: nn.Module, masked: nn.Module, gone: Tensor, constants: Tensor) -> None:
    """Adds to a layer's biases what it makes of `constants`, in place."""
    assert isinstance(layer, (nn.Linear, _ConvNd)) and isinstance(masked, (nn.Linear, _ConvNd))
    if isinstance(layer, _ConvNd) and layer.groups > 1 and constants.any():
        raise ShrinkRefused(path, "a grouped convolution does not make one number of a constant")
    turned = isinstance(layer, _ConvTransposeNd)
    weight = masked.weight.transpose(0, 1) if turned else masked.weight
    columns = weight[:, gone.to(weight.device)].double()
    # What went before, and was folded then, is read no more.
    constants = constants.double().where(columns.movedim(1, 0).flatten(1).any(dim=1), 0)
    if not constants.any():
        return
    if turned:
        raise ShrinkRefused(path, "a transposed convolution does not make one number of a constant")
    if isinstance(layer, _ConvNd) and layer.padding_mode == "zeros" and any(layer._reversed_padding_repeated_twice):
        raise ShrinkRefused(path, "it pads with zeros, where units without weights give it another constant")
    if layer.bias is None:
        raise ShrinkRefused(path, "it has no bias to take over what units without weights give it")
    with torch.no_grad():
        columns = columns.flatten(2).sum(dim=2) if columns.dim() > 2 else columns
        layer.bias += (columns @ constants).to(layer.bias.dtype)

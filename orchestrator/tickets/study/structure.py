"""The structure in a study's tickets that nobody asked for, each figure beside that of count-matched random masks."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from math import isfinite, isqrt, prod
from statistics import fmean
from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F
from torch import Tensor, fx, nn

from orchestrator.errors import PlanError, TaskError
from orchestrator.stages import Stages
from orchestrator.state import from_bytes
from orchestrator.tasks.data import InMemory, call
from orchestrator.tasks.load import LoadedTask, isolated, load
from orchestrator.tasks.source import collect
from orchestrator.tickets import emergence
from orchestrator.tickets.packed import Masks

if TYPE_CHECKING:
    from orchestrator.study import Study
    from orchestrator.tickets.study.table import Found

CONVOLUTIONS = (nn.Conv1d, nn.Conv2d, nn.Conv3d)
UNIT_BY_UNIT = (
    *(nn.ReLU, nn.ReLU6, nn.LeakyReLU, nn.ELU, nn.SELU, nn.GELU, nn.SiLU, nn.Tanh, nn.Sigmoid, nn.Softplus),
    *(nn.Hardtanh, nn.Hardswish, nn.Dropout, nn.Dropout1d, nn.Dropout2d, nn.Identity, nn.Flatten, nn.Unflatten),
    *(nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d, nn.MaxPool1d, nn.MaxPool2d, nn.AvgPool1d, nn.AvgPool2d),
    *(nn.AdaptiveAvgPool1d, nn.AdaptiveAvgPool2d, nn.AdaptiveMaxPool1d, nn.AdaptiveMaxPool2d),
)
"""Modules that lead from each unit to the same unit alone; those that flatten keep a unit's values together."""
FUNCTIONS = {
    *(F.relu, torch.relu, F.leaky_relu, F.elu, F.gelu, F.silu, F.tanh, torch.tanh, F.sigmoid, torch.sigmoid),
    *(F.dropout, F.max_pool1d, F.max_pool2d, F.avg_pool1d, F.avg_pool2d, F.adaptive_avg_pool2d, torch.flatten),
}
METHODS = {"relu", "tanh", "sigmoid", "flatten", "view", "reshape", "contiguous"}
LAST = (nn.Softmax, nn.LogSoftmax)
LAST_FUNCTIONS = {F.softmax, F.log_softmax, torch.softmax, torch.log_softmax, "softmax", "log_softmax"}
"""They join all outputs, which is the end of every path anyway."""
LEAST_SQUARE = 16
"""A square number of flat inputs, from this one on, is taken for an image; other numbers for a row."""
LEAST_TOLD = 0.0005
"""A share of groups that is printed as 0.000 is below it."""
MOST_TOLD = 100
"""Chance is far from normal where a z is larger than this: all that it says is that chance is out of the question."""


class NoChain(ValueError):
    """A model that is no plain chain of layers, with the reason."""


@dataclass(frozen=True, kw_only=True)
class Body:
    """What the task says of its masks.

    Args:
        chain: the weights of its linear layers and convolutions from input to output; empty where it is no chain.
        shapes: of these.
        no_chain: why it is none.
        geometry: the shape of the inputs, where each weight of the first layer reads one of them.
        constant: which of them are constant in training, bool of shape (inputs,).
        not_known: why that is not known.
    """

    chain: tuple[str, ...] = ()
    shapes: Mapping[str, tuple[int, ...]]
    no_chain: str = ""
    geometry: tuple[int, ...] | None = None
    constant: Tensor | None = None
    not_known: str = ""

    @property
    def first(self) -> str:
        """The weight of the first layer, where its inputs are the task's one by one."""
        return self.chain[0] if self.chain and self.geometry else ""


def look(study: Study) -> Body:
    """Load the study's task and look at its model and data. Where that fails, the reason stands in the body."""
    try:
        source = collect(study.spec.task, study.root, study.spec.checkpoint)
        return body(load(source, study.spec.task_params, study.root))
    except TaskError as error:
        reason = f"the task could not be loaded: {str(error).splitlines()[0]}"
        return Body(shapes={}, no_chain=reason, not_known=reason)


def body(loaded: LoadedTask) -> Body:
    """What the task's model and training data say of its masks."""
    stages = Stages(loaded)
    model = stages.model()
    try:
        with isolated(0):
            names = chain(model, stages.example)
    except NoChain as error:
        return Body(shapes={}, no_chain=str(error), not_known=f"which layer reads the inputs is not: {error}")
    shapes = {name: tuple(model.get_parameter(name).shape) for name in names}
    facts: dict[str, Any] = {"chain": names, "shapes": shapes}
    if len(shapes[names[0]]) != 2:
        return Body(**facts, not_known="the first layer is a convolution, whose weights read many inputs each")
    facts["geometry"] = geometry(tuple(stages.example.shape[1:]))
    data = stages.train
    if not isinstance(data, InMemory) or not isinstance(data.inputs, Tensor):
        return Body(**facts, not_known="the training data are not held in one tensor")
    flat = data.inputs.reshape(len(data), -1)
    return Body(**facts, constant=(flat == flat[:1]).all(dim=0))


def geometry(shape: Sequence[int]) -> tuple[int, ...]:
    """How inputs of this shape lie beside one another: (width,), (height, width) or (channels, height, width).

    Flat inputs of a square number are an image, as digits of 64 or 784 pixels are; others are a row.
    """
    size = prod(shape)
    if len(shape) in (2, 3):
        return tuple(shape)
    side = isqrt(size)
    return (side, side) if side * side == size >= LEAST_SQUARE else (size,)


def chain(model: nn.Module, example: Any) -> tuple[str, ...]:
    """The weights of a chain of linear layers and ungrouped convolutions, in the order in which the signal passes.

    Raises:
        NoChain: the model is none, or cannot be traced; the message gives the reason.
    """
    try:
        graph = fx.symbolic_trace(model).graph
    except Exception as error:  # whatever a user's forward does with what is no tensor while it is traced
        raise NoChain(f"the model's forward pass cannot be traced: {str(error).splitlines()[0]}") from error
    starts = [node for node in graph.nodes if node.op == "placeholder"]
    if len(starts) != 1 or not isinstance(example, Tensor):
        raise NoChain("the model takes more than one input")
    names: list[str] = []
    node = _next(starts[0])
    while node.op != "output":
        following = _next(node)
        if not _passes(model, node, last=following.op == "output"):
            names.append(_layer(model, node))
        node = following
    if len(set(names)) < len(names) or not names:
        raise NoChain("a layer is passed more than once" if names else "the model has no linear layer or convolution")
    _check_flat(model, example)
    return tuple(f"{name}.weight" for name in names)


def masks_of(study: Study, key: str) -> Masks | None:
    """The masks of a state; None where the store no longer has it."""
    data = study.store.states.read(key)
    return None if data is None else from_bytes(data).masks


def structure(study: Study, ticket: Found, body: Body) -> dict[str, Any] | None:
    """The structure of a ticket's masks, means over its seeds; None where a state is no longer in the store.

    "layers" has, for each masked tensor and kind of group in it, the shares of groups left empty and full; each
    figure is {"value", "chance", "z"}, z being null where chance has no freedom. Constant inputs are left out.
    """
    found = [masks_of(study, found["key"]) for found in ticket.tickets.values()]
    masks = [each for each in found if each]
    if len(masks) < len(found):
        return None
    sizes = _sizes(ticket)
    effective, reason = _effective(masks, body, sizes)
    wide = [name for name in sizes if name in masks[0] and masks[0][name].dim() > 1]
    return {
        "layers": {name: _groups(name, [each[name] for each in masks], body) for name in wide},
        "constant_inputs": None if body.constant is None else int(body.constant.sum()),
        "constant_inputs_reason": body.not_known or None,
        "adjacent_pairs": _adjacent(masks, body),
        "effective_sparsity": effective,
        "effective_sparsity_reason": reason or None,
    }


def rows(document: Mapping[str, Any]) -> list[dict[str, str]]:
    """The structure in the document of `ticket_table` as a table: a row for each kind of group in each layer.

    Kinds of which hardly a group is empty or full, in the ticket or by chance, are left out.
    """
    return [
        {
            "ticket": ticket["key"][:12],
            "round": str(ticket["round"]),
            "layer": layer.removesuffix(".weight"),
            "of": f"{found['groups']:,} {kind}",
            **_told("empty", found["empty"]),
            **_told("full", found["full"]),
        }
        for ticket in document["tickets"]
        if ticket["structure"]
        for layer, kinds in ticket["structure"]["layers"].items()
        for kind, found in kinds.items()
        if any(found[what][of] >= LEAST_TOLD for what in ("empty", "full") for of in ("value", "chance"))
    ]


def says(document: Mapping[str, Any]) -> list[str]:
    """What else there is to say of the tickets' structure, a line for each; what is true of all of them stands last."""
    lines, everywhere = [], {}
    for ticket in document["tickets"]:
        name, found = f"{ticket['key'][:12]} (round {ticket['round']})", ticket["structure"]
        if found is None:
            lines.append(f"{name}: a state is no longer in the store.")
            continue
        parts = []
        if found["effective_sparsity"] is None:
            everywhere[f"No effective sparsity: {found['effective_sparsity_reason']}."] = True
        else:
            parts.append(f"{ticket['sparsity']:.2%} sparse, effectively {found['effective_sparsity']:.2%}")
        if found["adjacent_pairs"] is not None:
            pairs = found["adjacent_pairs"]
            z = "" if pairs["z"] is None else f" (z {pairs['z']:+.1f})"
            parts.append(
                f"{pairs['value']:,.0f} pairs of neighbouring inputs kept, {pairs['chance']:,.0f} by chance{z}"
            )
        if parts:
            lines.append(f"{name}: {'; '.join(parts)}.")
        if found["constant_inputs"] is None:
            everywhere[f"Constant inputs were not left out: {found['constant_inputs_reason']}."] = True
        elif found["constant_inputs"]:
            everywhere[f"Left out, for they are constant in training: {found['constant_inputs']} inputs."] = True
    return [*lines, *everywhere]


def _told(what: str, found: Mapping[str, float | None]) -> dict[str, str]:
    z = found["z"]
    return {
        what: f"{found['value']:.3f}",
        f"{what} by chance": f"{found['chance']:.3f}",
        # A z of -0.0 is one that rounds to 0.
        f"z of {what}": "-"
        if z is None
        else f"{round(z, 1) or 0.0:+.1f}"
        if abs(z) < MOST_TOLD
        else f"beyond {MOST_TOLD}",
    }


def _groups(name: str, masks: Sequence[Tensor], body: Body) -> dict[str, Any]:
    constant = body.constant if name == body.first else None
    by_seed = [
        emergence.empty_and_full(mask if constant is None else emergence.varying(mask, constant)) for mask in masks
    ]
    return {
        kind: {
            "groups": by_seed[0][kind].groups,
            "empty": _mean(each[kind].empty for each in by_seed),
            "full": _mean(each[kind].full for each in by_seed),
        }
        for kind in by_seed[0]
    }


def _adjacent(masks: Sequence[Masks], body: Body) -> dict[str, Any] | None:
    if not body.geometry or any(body.first not in each for each in masks):
        return None
    firsts = [each[body.first] for each in masks]
    found = {
        within: _mean(emergence.adjacent_pairs(mask, body.geometry, body.constant, within=within) for mask in firsts)
        for within in ("layer", "row")
    }
    return {"layer": body.first, "geometry": list(body.geometry), **found["layer"], "within_units": found["row"]}


def _mean(found: Iterable[emergence.Found]) -> dict[str, float | None]:
    each = list(found)
    z = [one.z for one in each if isfinite(one.z)]
    return {
        "value": fmean(one.value for one in each),
        "chance": fmean(one.chance for one in each),
        "z": fmean(z) if len(z) == len(each) else None,
    }


def _effective(masks: Sequence[Masks], body: Body, sizes: Mapping[str, int]) -> tuple[float | None, str]:
    """The sparsity without the kept weights that lie on no path; or why there is none."""
    if not body.chain:
        return None, body.no_chain
    if not sizes.keys() <= body.shapes.keys():
        return None, "weights that are no linear layer's or convolution's are prunable too"
    shares = []
    for each in masks:
        whole = {name: each.get(name, torch.ones(shape, dtype=torch.bool)) for name, shape in body.shapes.items()}
        try:
            useful = emergence.on_a_path(whole, body.constant)
        except PlanError as error:
            return None, str(error)
        shares.append(1 - sum(int(useful[name].sum()) for name in sizes) / sum(sizes.values()))
    return fmean(shares), ""


def _sizes(ticket: Found) -> dict[str, int]:
    """How many weights each prunable tensor has."""
    row = next(iter(ticket.rows.values()))
    return {name: size for name, (_, size) in json.loads(row["layers"]).items()}


def _next(node: fx.Node) -> fx.Node:
    """The one node that reads what this one gives, but for those that ask for its shape."""
    readers = [user for user in node.users if not _asks_shape(user)]
    if len(readers) != 1:
        raise NoChain(f"{node.name!r} is read by {len(readers)} operations: the model is no plain chain")
    return readers[0]


def _asks_shape(node: fx.Node) -> bool:
    if node.op == "call_method":
        return node.target in ("size", "dim")
    return node.op == "call_function" and node.target is getattr and node.args[1] in ("shape", "ndim")


def _passes(model: nn.Module, node: fx.Node, *, last: bool) -> bool:
    """Whether a node leads from each unit to the same one; the last may join them."""
    if node.op == "call_module":
        module = model.get_submodule(str(node.target))
        return isinstance(module, UNIT_BY_UNIT) or (last and isinstance(module, LAST))
    known: set[Any] = METHODS if node.op == "call_method" else FUNCTIONS
    return node.target in known or (last and node.target in LAST_FUNCTIONS)


def _layer(model: nn.Module, node: fx.Node) -> str:
    """The name of the layer that a node calls."""
    if node.op != "call_module":
        raise NoChain(f"{node.name!r} joins units, or is not known to keep them apart: the model is no plain chain")
    module, name = model.get_submodule(str(node.target)), str(node.target)
    if isinstance(module, CONVOLUTIONS) and module.groups > 1:
        raise NoChain(f"{name!r} is a convolution in groups")
    if not isinstance(module, (nn.Linear, *CONVOLUTIONS)):
        raise NoChain(f"{name!r} is a {type(module).__name__}: the model is no plain chain")
    return name


def _check_flat(model: nn.Module, example: Tensor) -> None:
    """Refuse linear layers over more than one place: what is flattened after them has its units scattered."""
    wrong: list[str] = []
    hooks = [
        module.register_forward_pre_hook(
            lambda _, given, name=name: wrong.append(name) if given[0].dim() != 2 else None
        )
        for name, module in model.named_modules()
        if isinstance(module, nn.Linear)
    ]
    try:
        with torch.no_grad():
            call(model.eval(), example)
    finally:
        for hook in hooks:
            hook.remove()
    if wrong:
        raise NoChain(f"{wrong[0]!r} is a linear layer over many places: the model is no plain chain")

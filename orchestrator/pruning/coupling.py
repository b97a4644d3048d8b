"""Which weights must go together for a neuron, a filter or a channel to go: found by tracing, proved by removing.

Torch-Pruning's dependency graph (Fang et al., 2023) says which dimensions of which tensors are tied by residual sums,
concatenations, norms and flattening. What it says is not believed: half of all units found are removed, then the other
half, and where the smaller model does not compute what the masked one does, they are refused.
"""

from __future__ import annotations

import copy
import math
import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, NamedTuple, TypeAlias

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _NormBase
from torch.nn.modules.conv import _ConvNd, _ConvTransposeNd
from torch.nn.utils.rnn import PackedSequence
from torch_pruning import DependencyGraph
from torch_pruning.dependency.index_mapping import _FlattenIndexMapping, update_index_mapping

from orchestrator.pruning.structure import Role, Slice, Units, without
from orchestrator.removal.proof import ShrinkRefused, first_line
from orchestrator.removal.shrinking import shrink
from orchestrator.tasks.data import Nested, call, move, tensors, transform

LAYERS = (nn.Linear, _ConvNd, nn.Embedding)
"""The layers that make units."""

STRUCTURES: Mapping[str, tuple[type[nn.Module], ...]] = {
    "neuron": (nn.Linear,),
    "filter": (_ConvNd,),
    "channel": LAYERS,
}
"""The layers whose outputs are the units of each structure."""

ROLES: tuple[Role, ...] = ("makes", "norm", "reads", "buffer")
"""Where a tied tensor is several things to a unit, the first of these counts."""

OPAQUE = (
    nn.MultiheadAttention,
    nn.RNNBase,
    nn.RNNCellBase,
    nn.RMSNorm,
    nn.LocalResponseNorm,
    nn.CrossMapLRN2d,
    nn.Bilinear,
    nn.EmbeddingBag,
)
"""What enters or leaves these is never a unit: the graph is wrong about them, or knows nothing of them."""

TOGETHER = (nn.LayerNorm, nn.GroupNorm, nn.RMSNorm, nn.LocalResponseNorm, nn.CrossMapLRN2d)
"""Norms of one unit's values by those of others."""

MIXING = {
    "NativeLayerNorm": "a layer norm normalises its units together",
    "NativeGroupNorm": "a group norm normalises its units together",
    "FusedRmsNorm": "an RMS norm normalises its units together",
    "Softmax": "a softmax mixes its units",
    "LogSoftmax": "a softmax mixes its units",
    "Bmm": "a product of matrices mixes its units",
    "ScaledDotProduct": "attention mixes its units",
}
"""Functions that are no modules, by how autograd's names for them begin."""

MOST_BITS = 5
"""How many of the numbers' bits the proof goes through: up to 32 units, every two are told apart."""

NORMALISES = "normalises its units together"
INPUT = "its units are tied to the model's input"
SINGLE = "it has a single unit"
OUTPUT = "it feeds the model's output"


@dataclass(frozen=True, kw_only=True)
class Found:
    """The units of one structure in a model.

    Args:
        units: in the model's order; each group is named after the first weight that makes its units.
        refused: the other layers of that structure, by their weights' names, each with a clause that says why.
    """

    units: tuple[Units, ...]
    refused: Mapping[str, str]


def find_units(model: nn.Module, example: Nested, structure: str, prunable: Sequence[str]) -> Found:
    """The units of `model` that can be removed, each with everything that goes with it.

    All of them were removed from copies of the model with random weights, in double precision where it computes in
    that, and what was left gave the same outputs as the masked copy. Of a grouped convolution, a unit is a group.

    Args:
        model: stays as it is.
        example: inputs of the model.
        structure: "neuron" (outputs of linear layers), "filter" (of convolutions) or "channel" (of either, and of
            embeddings, where they are tied to each other too).
        prunable: names of the weights that may be pruned, a tied one's first. All that make a unit must be; layers
            that read it need not.
    """
    kinds = STRUCTURES[structure]
    refused = dict(_layers(model, kinds))
    example = move(example, next((tensor.device for tensor in model.parameters()), torch.device("cpu")))
    try:
        groups = _groups(*_traced(model, example))
    except (MemoryError, torch.OutOfMemoryError):
        raise
    except Exception as error:  # whatever user code, or a graph that does not know what it met, may raise
        reason = f"the model cannot be traced ({first_line(error)})"
        return Found(units=(), refused=dict.fromkeys(refused, reason))
    able: list[_Group] = []
    for group in groups:
        unfit = group.reason or _unfit(group, kinds, prunable)
        if unfit is None:
            able.append(group)
        else:
            refused.update((name, unfit) for name, kind in group.makers.items() if issubclass(kind, kinds))
    kept, changed = _Proof(model, example).split([group.units for group in able])
    for group in able:
        for name in group.makers:
            refused.pop(name, None)
            if group.units.name in changed:
                refused[name] = changed[group.units.name]
    return Found(units=tuple(kept), refused=refused)


def _layers(model: nn.Module, kinds: tuple[type[nn.Module], ...]) -> Iterator[tuple[str, str]]:
    """The layers of some kinds by their weights' names, with why they have no units unless the trace finds some."""
    names = {id(parameter): name for name, parameter in model.named_parameters()}
    inside = {
        child: f"it is a part of the {type(module).__name__} {path!r}"
        for path, module in model.named_modules()
        if isinstance(module, OPAQUE)
        for child in module.modules()
    }
    for path, module in model.named_modules():
        if isinstance(module, kinds):
            weight = module._parameters.get("weight")
            label = f"{path}.weight" if weight is None else names[id(weight)]
            reason = "its weight is parametrised" if weight is None else "nothing was seen to pass through it"
            if _width(module) == 1:
                reason = SINGLE
            yield label, inside.get(module, reason)


def _unfit(group: _Group, kinds: tuple[type[nn.Module], ...], prunable: Sequence[str]) -> str | None:
    for name, kind in group.makers.items():
        if not issubclass(kind, kinds):
            return f"its units are tied to those of {name!r}: these are channels"
        if name not in prunable:
            return f"{name!r}, which makes its units, is not prunable"
    return SINGLE if group.units.count < 2 else None


def _width(layer: nn.Module) -> int:
    """How many outputs a layer has, by which its units are counted."""
    names = {nn.Linear: "out_features", _ConvNd: "out_channels", nn.Embedding: "embedding_dim"}
    width = next(getattr(layer, name) for kind, name in names.items() if isinstance(layer, kind))
    assert isinstance(width, int)
    return width


class _Edge(torch.autograd.Function):
    """Where tracing ends: what comes here is no unit, for the reason that the graph's node carries."""

    @staticmethod
    def forward(ctx: Any, reason: str, tensor: Tensor, *given: Tensor) -> Tensor:
        ctx.reason = reason
        return tensor.clone()


def _traced(model: nn.Module, example: Nested) -> tuple[nn.Module, DependencyGraph]:
    """A copy of the model and Torch-Pruning's graph of it."""
    traced = copy.deepcopy(model).eval()
    for parameter in traced.parameters():
        parameter.requires_grad_(parameter.is_floating_point())
    opaque = {path: module for path, module in traced.named_modules() if _is_opaque(module)}
    for path, module in opaque.items():
        _seal(path, module)
    graph = DependencyGraph()
    with torch.enable_grad(), warnings.catch_warnings(), torch.random.fork_rng(devices=[]):
        warnings.simplefilter("ignore")
        graph.build_dependency(
            traced,
            example,
            forward_fn=_forward,
            unwrapped_parameters=[],  # Torch-Pruning keeps what it is not given from call to call
            customized_pruners={},
            ignored_layers=list(opaque.values()),
            ignored_params=[],
            verbose=False,
        )
        graph._2d_4d = True  # else nothing is flattened once a linear layer has seen three dimensions
        update_index_mapping(graph)
    for node in graph.module2node.values():
        if node.type == graph.ops.OPTYPE.RESHAPE:
            _correct(node)
    return traced, graph


def _correct(node: Any) -> None:
    """Mends the mapping of a flattening whose units lie along the last dimension: Torch-Pruning thinks of images."""
    sizes: Sequence[int] = getattr(node.grad_fn, "_saved_self_sym_sizes", ())
    for tie in (*node.dependencies, *(tie for other in node.inputs for tie in other.dependencies)):
        mapping = tie.index_mapping[0]
        if isinstance(mapping, _FlattenIndexMapping) and node in (tie.source, tie.target) and len(sizes) > 2:
            count = math.prod(sizes[1:]) // mapping._stride
            if sizes[-1] == count and (sizes[1] != count or _from_rows(node)):
                tie.index_mapping[0] = partial(_along_last, count, 1 if mapping.reverse else mapping._stride)


def _from_rows(node: Any) -> bool:
    """Whether what comes to a node was made by a layer whose outputs lie along the last dimension."""
    while node.inputs and not isinstance(node.module, (*LAYERS, _NormBase)):
        node = node.inputs[0]
    return isinstance(node.module, (nn.Linear, nn.Embedding))


def _along_last(count: int, copies: int, pairs: Iterable[_Pair]) -> list[_Pair]:
    """The positions of `count` units, repeated side by side, that belong to the same units as those given."""
    return [_Pair(pair.idx % count + count * copy, pair.root_idx) for pair in pairs for copy in range(copies)]


def _is_opaque(module: nn.Module) -> bool:
    if isinstance(module, _ConvNd):  # Torch-Pruning takes these for depthwise ones
        return module.groups == module.out_channels != module.in_channels and module.groups > 1
    return isinstance(module, OPAQUE)


def _seal(path: str, module: nn.Module) -> None:
    """Lets nothing be traced through a module."""
    kind = type(module).__name__
    reason = f"the {kind} {path!r} {NORMALISES}"
    if not isinstance(module, TOGETHER):
        reason = f"its units pass through the {kind} {path!r}"
    forward = module.forward

    def sealed(*args: Any, **kwargs: Any) -> Any:
        given = [tensor for _, tensor in tensors((args, kwargs)) if tensor.requires_grad]

        def end(tensor: Tensor) -> Tensor:
            ended: Tensor = _Edge.apply(reason, tensor.detach(), *given)  # type: ignore[no-untyped-call]
            return ended

        outputs = forward(*args, **kwargs)
        if isinstance(outputs, tuple) and isinstance(outputs[0], PackedSequence):
            return (outputs[0]._replace(data=end(outputs[0].data)), *transform(end, outputs[1:]))
        return transform(end, outputs)

    vars(module)["forward"] = sealed


def _forward(model: nn.Module, example: Nested) -> list[Tensor]:
    """The outputs, with edges around the model."""

    def edge(reason: str, tensor: Tensor) -> Tensor:
        ended: Tensor = _Edge.apply(reason, tensor)  # type: ignore[no-untyped-call]
        return ended

    def begin(tensor: Tensor) -> Tensor:
        return edge(INPUT, tensor.detach().clone().requires_grad_()) if tensor.is_floating_point() else tensor

    outputs = call(model, transform(begin, example))
    return [edge(OUTPUT, tensor) for _, tensor in tensors(outputs) if tensor.requires_grad]


Place: TypeAlias = tuple[str, int]
"""A dimension of a tensor."""

Handler: TypeAlias = Callable[..., Any]
"""One of Torch-Pruning's methods that prune a module's inputs or outputs: here it only tells the side."""


@dataclass(frozen=True, kw_only=True)
class _Group:
    """Units, the kinds of layers whose weights make them, and why they cannot be removed, if the graph tells."""

    units: Units
    makers: Mapping[str, type[nn.Module]]
    reason: str | None


class _Ties:
    """Numbers that stand for units, as far as is known different ones; `join` learns that two are the same."""

    def __init__(self) -> None:
        self._parents: list[int] = []

    def fresh(self) -> int:
        self._parents.append(len(self._parents))
        return self._parents[-1]

    def find(self, unit: int) -> int:
        while self._parents[unit] != unit:
            self._parents[unit] = self._parents[self._parents[unit]]
            unit = self._parents[unit]
        return unit

    def join(self, one: int, other: int) -> None:
        one, other = self.find(one), self.find(other)
        self._parents[max(one, other)] = min(one, other)


class _Pair(NamedTuple):
    """A position along a width and the unit that lies there, as Torch-Pruning's index mappings take and give them."""

    idx: int
    root_idx: int | None


class _Spread:
    """Spreads units from the layers that make them through the graph, to all that is tied to them."""

    def __init__(self, model: nn.Module, graph: DependencyGraph) -> None:
        self.model = model
        self.graph = graph
        self.ties = _Ties()
        self.owners: dict[Place, dict[int, int]] = {}
        self.roles: dict[Place, Role] = {}
        self.makers: dict[Place, type[nn.Module]] = {}
        self.reasons: dict[int, list[str]] = {}
        self._uses: dict[Place, set[int]] = {}
        self._seen: dict[tuple[Any, Handler], dict[int, int]] = {}
        self._names = {id(tensor): name for name, tensor in (*model.named_buffers(), *model.named_parameters())}
        self._paths = {id(module): path for path, module in model.named_modules()}

    def start(self, layer: nn.Module) -> None:
        """From every output of a layer that was not reached before."""
        node = self.graph.module2node[layer]
        handler = self.graph.get_pruner_of_module(layer).prune_out_channels
        reached = self._seen.get((node, handler), {})
        pairs = [_Pair(index, self.ties.fresh()) for index in range(_width(layer)) if index not in reached]
        pending = [(node, handler, pairs)]
        while pending:
            node, handler, pairs = pending.pop()
            new = self._arrive(node, handler, pairs)
            if not new:
                continue
            pending += self._siblings(node, new, handler)
            for tie in node.dependencies:
                if tie.is_triggered_by(handler):
                    mapped = new
                    for mapping in tie.index_mapping:
                        mapped = mapped if mapping is None else mapping(mapped)
                    pending.append((tie.target, tie.handler, mapped))

    def _arrive(self, node: Any, handler: Handler, pairs: Sequence[_Pair]) -> list[_Pair]:
        """Notes which units lie where in a node; gives the pairs of (position, unit) that are new there."""
        size, places = self._places(node, handler)
        if size == 1:
            return []  # it is broadcast over what it meets, so that nothing is tied to its position
        known = self._seen.setdefault((node, handler), {})
        reason = self._reason(node)
        new = []
        for pair in pairs:
            index, unit = pair.idx, pair.root_idx
            if unit is None:
                continue  # a mapping that forgets where it came from; the proof will notice what is missing
            if index in known:
                self.ties.join(known[index], unit)
                continue
            known[index] = unit
            if size is not None and not 0 <= index < size:
                self._refuse(unit, f"its units do not line up with those of {self._paths.get(id(node.module), '')!r}")
                continue
            new.append(pair)
            for place, role in places:
                self._uses.setdefault(place, set()).add(id(node.module))
                self.ties.join(self.owners.setdefault(place, {}).setdefault(index, unit), unit)
                self.roles[place] = min(self.roles.get(place, role), role, key=ROLES.index)
            if reason is not None:
                self._refuse(unit, reason)
        return new

    def check_ties(self) -> None:
        """Refuses what lies along a dimension of a tied tensor that to another of its layers is something else."""
        holders: dict[str, dict[int, str]] = {}
        for path, module in self.model.named_modules():
            for tensor in module.parameters(recurse=False):
                holders.setdefault(self._names[id(tensor)], {})[id(module)] = path
        for place, owner in self.owners.items():
            others = holders.get(place[0], {})
            stranger = next((path for key, path in others.items() if key not in self._uses[place]), None)
            if stranger is not None and len(others) > 1:
                for unit in owner.values():
                    self._refuse(unit, f"its weight is tied to {stranger!r}, which does not take it in the same way")

    def _refuse(self, unit: int, reason: str) -> None:
        reasons = self.reasons.setdefault(unit, [])
        if reason not in reasons:
            reasons.append(reason)

    def _reason(self, node: Any) -> str | None:
        """Why what comes to a node cannot be removed, if that can be told from the node alone."""
        path = self._paths.get(id(node.module))
        if path is not None:
            kind = type(node.module).__name__
            if isinstance(node.module, LAYERS) and node.module._parameters.get("weight") is None:
                return f"the weight of {path!r} is parametrised"
            return f"the {kind} {path!r} {NORMALISES}" if isinstance(node.module, TOGETHER) else None
        reason: str | None = getattr(node.grad_fn, "reason", None)
        if reason is None and hasattr(node.grad_fn, "name"):
            name = node.grad_fn.name()
            reason = next((why for start, why in MIXING.items() if name.startswith(start)), None)
        return reason

    def _places(self, node: Any, handler: Handler) -> tuple[int | None, list[tuple[Place, Role]]]:
        """How many units pass one side of a node, if it tells, and where they lie in its tensors."""
        module = node.module
        if isinstance(module, nn.Parameter):
            return module.shape[node.pruning_dim], self._named([(module, node.pruning_dim, "norm")])
        if id(module) not in self._paths:
            return None, []
        outward = handler == self.graph.get_pruner_of_module(module).prune_out_channels
        local: list[tuple[str, int, Role]] = []
        size: int | None = None
        if isinstance(module, nn.Linear):
            size = module.out_features if outward else module.in_features
            local = [("weight", 0, "makes"), ("bias", 0, "makes")] if outward else [("weight", 1, "reads")]
        elif isinstance(module, _ConvNd):
            size = module.out_channels if outward else module.in_channels
            local = _places_of_convolution(module, outward)
        elif isinstance(module, _NormBase):
            size = module.num_features
            local = [("weight", 0, "norm"), ("bias", 0, "norm"), ("running_mean", 0, "buffer")]
            local.append(("running_var", 0, "buffer"))
        elif isinstance(module, nn.PReLU) and module.num_parameters > 1:
            size, local = module.num_parameters, [("weight", 0, "norm")]
        elif isinstance(module, nn.Embedding):
            size, local = module.embedding_dim, [("weight", 1, "makes")]
        held = {**module._parameters, **module._buffers}
        places = self._named([(held.get(name), dim, role) for name, dim, role in local])
        if isinstance(module, LAYERS) and held.get("weight") is not None:
            weight = self._names[id(held["weight"])]
            self.makers.update(
                (place, type(module)) for place, role in places if place[0] == weight and role == "makes"
            )
        return size, places

    def _named(self, places: Iterable[tuple[Tensor | None, int, Role]]) -> list[tuple[Place, Role]]:
        return [((self._names[id(tensor)], dim), role) for tensor, dim, role in places if tensor is not None]

    def _siblings(self, node: Any, pairs: Sequence[_Pair], handler: Handler) -> list[tuple[Any, Handler, list[_Pair]]]:
        """What goes with some channels of a grouped convolution: their whole groups, on both sides."""
        module = node.module
        if not isinstance(module, _ConvNd) or module.groups == 1:
            return []
        pruner = self.graph.get_pruner_of_module(module)
        widths = {
            pruner.prune_in_channels: module.in_channels // module.groups,
            pruner.prune_out_channels: module.out_channels // module.groups,
        }
        groups = [(pair.idx // widths[handler], pair.root_idx) for pair in pairs]
        return [
            (
                node,
                side,
                [_Pair(group * width + index, unit) for group, unit in groups for index in range(width)],
            )
            for side, width in widths.items()
        ]


def _places_of_convolution(module: _ConvNd, outward: bool) -> list[tuple[str, int, Role]]:
    turned = isinstance(module, _ConvTransposeNd)
    if module.groups == 1:
        if not outward:
            return [("weight", 0 if turned else 1, "reads")]
        return [("weight", 1 if turned else 0, "makes"), ("bias", 0, "makes")]
    depthwise = module.groups == module.in_channels == module.out_channels  # one unit is both input and output
    places: list[tuple[str, int, Role]] = []
    if depthwise or outward != turned:
        places.append(("weight", 0, "makes"))
    if depthwise or outward:
        places.append(("bias", 0, "makes"))
    return places


def _groups(model: nn.Module, graph: DependencyGraph) -> list[_Group]:
    """All units of a model, those that are made by the same weights side by side."""
    spread = _Spread(model, graph)
    for module in model.modules():
        if isinstance(module, LAYERS) and module in graph.module2node and _width(module) > 1:
            spread.start(module)
    spread.check_ties()
    sizes = {name: tensor.shape for name, tensor in (*model.named_parameters(), *model.named_buffers())}
    order = {name: number for number, name in enumerate(sizes)}
    places = sorted(spread.owners, key=lambda place: (order[place[0]], place[1]))
    owners = {place: {i: spread.ties.find(unit) for i, unit in spread.owners[place].items()} for place in places}
    made = [place for place in places if spread.roles[place] == "makes"]
    groups, members = _Ties(), dict[int, int]()
    for place in made:
        group = groups.fresh()
        for unit in owners[place].values():
            groups.join(members.setdefault(unit, group), group)
    makers: dict[int, list[Place]] = {}
    for place in made:
        makers.setdefault(groups.find(members[next(iter(owners[place].values()))]), []).append(place)
    numbers: dict[int, dict[int, int]] = {}
    for group, of_group in makers.items():
        units = dict.fromkeys(unit for place in of_group for _, unit in sorted(owners[place].items()))
        numbers[group] = {unit: number for number, unit in enumerate(units)}
    slices: dict[int, list[Slice]] = {group: [] for group in makers}
    for place in places:
        for group in dict.fromkeys(groups.find(members[unit]) for unit in owners[place].values()):
            owner = [-1] * sizes[place[0]][place[1]]
            for index, unit in owners[place].items():
                owner[index] = numbers[group].get(unit, -1)
            piece = Slice(tensor=place[0], dim=place[1], owner=torch.tensor(owner), role=spread.roles[place])
            slices[group].append(piece)
    reasons: dict[int, list[str]] = {}
    for unit, whys in spread.reasons.items():
        reasons.setdefault(groups.find(members[spread.ties.find(unit)]), []).extend(whys)
    return [
        _Group(
            units=Units(
                name=next((place[0] for place in of_group if place in spread.makers), of_group[0][0]),
                count=len(numbers[group]),
                slices=tuple(slices[group]),
            ),
            makers={place[0]: spread.makers[place] for place in of_group if place in spread.makers},
            reason=min(
                reasons.get(group, ()), key=lambda why: (not why.endswith(NORMALISES), why != OUTPUT), default=None
            ),
        )
        for group, of_group in makers.items()
    ]


class _Proof:
    """A model with random weights, from which units are removed to see whether it matters."""

    def __init__(self, model: nn.Module, example: Nested) -> None:
        self.draw = torch.Generator().manual_seed(0)
        self.model, self.example = copy.deepcopy(model).eval().double(), _doubled(example)
        try:
            with torch.no_grad():
                call(self.model, self.example)
        except (RuntimeError, TypeError, ValueError):  # something in it insists on single precision
            self.model, self.example = copy.deepcopy(model).eval(), example
        self.shapes = {name: parameter.shape for name, parameter in self.model.named_parameters()}

    def split(self, units: Sequence[Units]) -> tuple[list[Units], dict[str, str]]:
        """The units that can be removed, all of them together; and by name, why the others cannot."""
        reason = self._trouble(units) if units else None
        if reason is None:
            return list(units), {}
        if len(units) == 1:
            return [], {units[0].name: reason}
        half = len(units) // 2
        (first, changed), (second, more) = self.split(units[:half]), self.split(units[half:])
        kept, changed = first + second, changed | more
        reason = self._trouble(kept) if first and second else None
        return (kept, changed) if reason is None else ([], changed | {group.name: reason for group in kept})

    def _trouble(self, units: Sequence[Units]) -> str | None:
        """What goes wrong when half of all units are removed, the other half, or other halves.

        The halves are bits of shuffled numbers, and the weights are drawn afresh for each: of any two units, one goes
        and the other stays some time (of very many, almost any), so that a group of mixed-up owners does not pass.
        """
        numbers = [torch.randperm(group.count, generator=self.draw) for group in units]
        bits = min(MOST_BITS, max(((len(number) - 1).bit_length() for number in numbers), default=0))
        for bit, turned in ((0, True), *((bit, False) for bit in range(bits))):
            _randomise(self.model, self.draw)
            halves = [(number >> bit % (len(number) - 1).bit_length()) & 1 == 1 for number in numbers]
            kept = [~half if turned else half for half in halves]
            masks = without(zip(units, kept, strict=True), {}, self.shapes)
            try:
                shrink(self.model, masks, units, self.example)
            except ShrinkRefused as error:
                return f"removing its units changes more than them: at {error.layer or 'the model'!r}, {error.reason}"
        return None


def _randomise(model: nn.Module, draw: torch.Generator) -> None:
    """Random parameters and running statistics, in place, so that nothing is equal by chance."""
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.is_floating_point():
                values = torch.randn(parameter.shape, generator=draw)
                if parameter.dim() > 1:
                    values *= (2 * parameter.shape[0] / parameter.numel()) ** 0.5
                else:
                    values = values.abs()  # a rectifier that is always shut would prove anything
                parameter.copy_(values)
        for module in model.modules():
            if isinstance(module, _NormBase) and module.running_mean is not None:
                assert module.running_var is not None
                module.running_mean.copy_(torch.randn(module.num_features, generator=draw))
                module.running_var.copy_(torch.rand(module.num_features, generator=draw) + 0.5)


def _doubled(value: Nested) -> Nested:
    return transform(lambda tensor: tensor.double() if tensor.is_floating_point() else tensor, value)

"""Whole layers: branches beside a skip connection, and models without some of them.

A branch is everything that reaches the output only through one layer whose own output is added to a skip connection:
the two convolutions of a residual block, the attention or the feed-forward part of a transformer's layer. Masked, it
adds zero, and what it was added to goes on alone. Branches are read off autograd's graph of one forward pass.
"""

from __future__ import annotations

import copy
import re
from collections.abc import Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.autograd.graph import Node
from torch.nn.modules.batchnorm import _NormBase
from torch.nn.modules.conv import _ConvNd, _ConvTransposeNd

from orchestrator.pruning.attention import NarrowAttention
from orchestrator.pruning.coupling import Found
from orchestrator.pruning.structure import Role, Slice, Units, kept_units
from orchestrator.tasks.data import Nested, call, move, tensors, transform

ATTENTION = (nn.MultiheadAttention, NarrowAttention)
NORMS = (_NormBase, nn.LayerNorm, nn.GroupNorm, nn.RMSNorm)

SUMS = {"Add", "Sub"}
PRODUCTS = {"Mul"}
"""Zero where any operand is."""

KEEP_ZERO = {
    *("Relu", "LeakyRelu", "Elu", "Celu", "Gelu", "Silu", "Mish", "Tanh", "Hardtanh", "Hardswish", "Neg", "Abs"),
    *("View", "UnsafeView", "ReshapeAlias", "Transpose", "T", "Permute", "Squeeze", "Unsqueeze", "Expand", "Clone"),
    *("ToCopy", "Alias", "Slice", "Select", "Split", "SplitWithSizes", "Cat", "Stack", "Flip", "NativeDropout"),
    *("Mean", "Sum", "AvgPool1D", "AvgPool2D", "AvgPool3D", "AdaptiveAvgPool2D", "AdaptiveAvgPool3D", "Div"),
}
"""Zero where all operands are; by the first part of autograd's name for them."""

NO_SKIP = "no skip connection passes by"


@dataclass(frozen=True, kw_only=True)
class _Branch:
    """Layers by path, in the model's order; `exit` is the one whose output is added to the skip connection."""

    exit: str
    members: tuple[str, ...]
    silent: frozenset[Node]
    """What is zero when the exit gives zero."""
    sources: frozenset[Node]
    """Where the branch begins: what it reads of the rest of the model."""
    skips: tuple[tuple[Node, ...], ...]
    """For each sum that the branch ends in, what it is added to."""


class _Call(NamedTuple):
    """The shapes of a module's first input and of its output, or of its first where it gives `others`, too."""

    before: tuple[int, ...]
    after: tuple[int, ...]
    others: int


def find_layers(model: nn.Module, example: Nested, prunable: Collection[str]) -> Found:
    """The branches of `model` that can be removed, all as the units of one group.

    Any of them may go together: a path round all of them is left from the input to the output. Where branches lie
    within one another, the inner ones are the units. Each was removed from a copy, and the result was equal to the
    masked copy. The slices of a unit end with those of the layer that it ends in.

    Args:
        model: stays as it is.
        example: inputs of the model.
        prunable: names of the weights that may be pruned; a branch without any is no unit.
    """
    try:
        example = move(example, next(model.parameters()).device)
        graph = _Graph(model, example)
    except (MemoryError, torch.OutOfMemoryError):
        raise
    except Exception as error:  # whatever user code may raise
        return Found(units=(), refused=dict.fromkeys(prunable, f"the model cannot be traced ({_line(error)})"))
    leaves = _leaves(model)
    reasons: dict[str, str] = {}
    chosen: list[_Branch] = []
    for branch in _innermost(graph.branches(leaves), reasons):
        why = _shared(model, branch)
        if why is None and not any(_is_matrix(leaves[path]) for path in branch.members):
            why = "it holds nothing but scales and shifts"
        if why is None and not graph.go_round([*chosen, branch]):
            why = "nothing would be left beside it if the layers parallel to it went, too"
        if why is None:
            chosen.append(branch)
        else:
            reasons |= dict.fromkeys(branch.members, why)
    order = {path: place for place, path in enumerate(leaves)}
    chosen.sort(key=lambda branch: order[branch.members[0]])
    chosen = [branch for branch in chosen if any(name in prunable for name in _names(model, branch.members))]
    if chosen and _trouble(model, example, chosen) is not None:
        troubles = [_trouble(model, example, [branch]) for branch in chosen]
        for branch, trouble in zip(chosen, troubles, strict=True):
            reasons |= dict.fromkeys(branch.members, trouble or "")
        chosen = [branch for branch, trouble in zip(chosen, troubles, strict=True) if trouble is None]
    units = (_units(model, chosen),) if chosen else ()
    owned = {piece.tensor for group in units for piece in group.slices}
    refused = {
        name: reasons.get(_layer_of(model, name), NO_SKIP)
        for name, _ in model.named_parameters()
        if name in prunable and name not in owned
    }
    return Found(units=units, refused=refused)


def are_branches(units: Units) -> bool:
    """Whether these units are whole layers: every tensor belongs to one of them, and none reads them."""
    return all(
        piece.role != "reads" and piece.owner[0] >= 0 and bool((piece.owner == piece.owner[0]).all())
        for piece in units.slices
    )


def narrowable(units: Sequence[Units], masks: Mapping[str, Tensor]) -> list[Units]:
    """The groups whose units are cut from tensors: no whole layers, and nothing that goes with a dead one.

    Args:
        units: of any structures.
        masks: by parameter name; True = kept.
    """
    gone: set[str] = set()
    for group in units:
        if are_branches(group):
            alive = kept_units(group, masks)
            gone.update(piece.tensor for piece in group.slices if not alive[piece.owner[0]])
    return [
        group
        for group in units
        if not are_branches(group) and not all(piece.tensor in gone for piece in group.slices if piece.role == "makes")
    ]


def remove_branches(model: nn.Module, units: Units, kept: Tensor, example: Nested) -> nn.Module:
    """A copy of `model` without the branches that are not kept, and without their arithmetic.

    The layer that ends a branch gives zeros of the shape that it gave, the others next to nothing. A module that holds
    nothing but the end of a branch goes as a whole. Tensors of what went are no longer in the model.

    Args:
        model: its other units may have been removed before.
        units: whole layers, from `find_layers`.
        kept: bool of shape (units.count,).
        example: inputs of the model, which show the shapes.

    Raises:
        ValueError: a layer gives a shape that cannot be told from its input's, or the model does not run without it.
    """
    small = copy.deepcopy(model)
    gone = _dead(small, units, kept)
    if not gone:
        return small
    example = move(example, next(small.parameters()).device)
    calls = _calls(small, example)
    holders = {exit: _holders(small, exit, members) for exit, members in gone.items()}
    _block_fast_paths(small, [path for exit, members in gone.items() for path in (exit, *members)])
    for exit, members in gone.items():
        for path in (*members, exit):
            _put(small, path, _nothing(path, small.get_submodule(path), calls))
    try:
        expected, silent = _run(small, example, [path for paths in holders.values() for path in paths])
    except Exception as error:  # the code round it may rely on more than shapes
        raise ValueError(f"the model does not run without it ({_line(error)})") from error
    for exit, members in gone.items():
        for path in holders[exit]:
            nothing = _like(small.get_submodule(path), calls.get(path)) if path in silent else None
            if nothing is not None and _tried(small, example, expected, {path: nothing}):
                break
        left = {path: _at(small, path) for path in members}
        _tried(small, example, expected, {path: _thin(module) for path, module in left.items() if module is not None})
    return small


class Nothing(nn.Module):
    """Zeros of the shape of its first input, but for `size` along `dim`; and None for each of `others`, as a tuple."""

    def __init__(self, dim: int | None = None, size: int = 1, others: int = 0) -> None:
        super().__init__()
        self.dim = dim
        self.size = size
        self.others = others

    def forward(self, *given: Any, **named: Any) -> Any:
        first = _first((given, named))
        shape = list(first.shape)
        if self.dim is not None:
            shape[self.dim] = self.size
        zeros = first.new_zeros(shape)
        return (zeros, *[None] * self.others) if self.others else zeros

    def extra_repr(self) -> str:
        return "" if self.dim is None else f"{self.size} along {self.dim}"


class NothingConvolved(nn.Module):
    """Zeros of the shape that a convolution gives, with `channels` channels."""

    def __init__(self, whole: _ConvNd, channels: int) -> None:
        super().__init__()
        self.channels = channels
        self.kernel, self.stride, self.dilation = whole.kernel_size, whole.stride, whole.dilation
        self.padding = whole.padding

    def forward(self, input: Tensor) -> Tensor:
        sizes = []
        for place, size in enumerate(input.shape[-len(self.kernel) :]):
            reach = self.dilation[place] * (self.kernel[place] - 1)
            if self.padding == "same":
                sizes.append(size)
                continue
            padding = 0 if isinstance(self.padding, str) else int(self.padding[place])
            sizes.append((size + 2 * padding - reach - 1) // self.stride[place] + 1)
        return input.new_zeros((*input.shape[: -len(self.kernel) - 1], self.channels, *sizes))


class NothingAttended(nn.Module):
    """Called as attention is; gives zeros and no weights."""

    in_proj_bias = None
    """TransformerEncoderLayer reads these: there is no fast path for nothing."""
    _qkv_same_embed_dim = False

    def __init__(self, batch_first: bool) -> None:
        super().__init__()
        self.batch_first = batch_first

    def forward(self, query: Tensor, *given: Any, **named: Any) -> tuple[Tensor, None]:
        return torch.zeros_like(query), None


class _Graph:
    """Autograd's graph of one forward pass, and where the outputs of a model's layers stand in it."""

    def __init__(self, model: nn.Module, example: Nested) -> None:
        model = copy.deepcopy(model).eval()
        self.places: dict[str, list[list[Node]]] = {}
        self.shapes: dict[str, tuple[tuple[int, ...], tuple[int, ...]]] = {}
        for parameter in model.parameters():
            parameter.requires_grad_(parameter.is_floating_point() or parameter.is_complex())

        def entered(path: str) -> Any:
            def note(_module: nn.Module, _given: Any, outputs: Any) -> None:
                nodes = [tensor.grad_fn for _, tensor in tensors(outputs) if tensor.grad_fn is not None]
                self.places.setdefault(path, []).append(nodes)

            return note

        for path in _leaves(model):
            model.get_submodule(path).register_forward_hook(entered(path))
        with _no_fast_path(), torch.enable_grad():
            outputs = list(tensors(call(model, transform(_tracked, example))))
        self.roots = [tensor.grad_fn for _, tensor in outputs if tensor.grad_fn is not None]
        self.operands: dict[Node, tuple[Node, ...]] = {}
        self.consumers: dict[Node, list[Node]] = {}
        left = list(self.roots)
        while left:
            node = left.pop()
            if node in self.operands:
                continue
            self.operands[node] = tuple(operand for operand, _ in node.next_functions if operand is not None)
            for operand in self.operands[node]:
                self.consumers.setdefault(operand, []).append(node)
                left.append(operand)

    def branches(self, leaves: Collection[str]) -> list[_Branch]:
        """Every layer that ends a branch, with the branch; of layers that end the same one, the last that is called."""
        used = {
            path: {node for nodes in calls for node in nodes if node in self.operands}
            for path, calls in self.places.items()
        }
        found: dict[tuple[str, ...], _Branch] = {}
        for path, calls in self.places.items():
            if len(calls) != 1 or not used[path]:
                continue
            branch = self._branch(path, calls[0][0], leaves, used)
            if branch is not None:
                found[branch.members] = branch
        return list(found.values())

    def _branch(
        self, exit: str, start: Node, leaves: Collection[str], used: Mapping[str, Collection[Node]]
    ) -> _Branch | None:
        if start not in self.operands:
            return None
        silent, ends = self._silenced(start)
        if any(_kind(end) not in SUMS for end in ends) or not ends or any(root in silent for root in self.roots):
            return None
        alive = self._reached(self.roots, silent)
        inside = self._reached([start], frozenset()) - alive
        sources = frozenset(
            operand
            for node in inside
            for operand in self.operands[node]
            if operand in alive and _kind(operand) != "AccumulateGrad"
        )
        members = tuple(path for path in leaves if used.get(path) and not alive & set(used[path]))
        skips = tuple(tuple(node for node in self.operands[end] if node not in silent) for end in ends)
        branch = _Branch(exit=exit, members=members, silent=silent, sources=sources, skips=skips)
        return branch if self.go_round([branch]) else None

    def _silenced(self, start: Node) -> tuple[frozenset[Node], list[Node]]:
        """What is zero when `start` gives zero, and what else reads that."""
        silent, grown = {start}, True
        while grown:
            grown = False
            for node in list(silent):
                for reader in self.consumers.get(node, ()):
                    everything = all(operand in silent for operand in self.operands[reader])
                    kind = _kind(reader)
                    if reader not in silent and (
                        kind in PRODUCTS or (everything and (kind in KEEP_ZERO or kind in SUMS))
                    ):
                        silent.add(reader)
                        grown = True
        ends = {reader: None for node in self.operands if node in silent for reader in self.consumers.get(node, ())}
        return frozenset(silent), [reader for reader in ends if reader not in silent]

    def go_round(self, branches: Sequence[_Branch]) -> bool:
        """Whether, without all of these, each one's beginning still comes by every skip connection that it ends in."""
        silent = frozenset().union(*(branch.silent for branch in branches))
        return all(
            bool(self._reached(skip, silent, branch.sources) & branch.sources)
            for branch in branches
            for skip in branch.skips
        )

    def _reached(
        self, starts: Sequence[Node], silent: Collection[Node], until: Collection[Node] = frozenset()
    ) -> set[Node]:
        """What `starts` are computed from, without `silent` nodes; no further than to the first of `until`."""
        reached: set[Node] = set()
        left = list(starts)
        while left:
            node = left.pop()
            if node in reached or node in silent:
                continue
            reached.add(node)
            if node in until:
                break
            left.extend(self.operands[node])
        return reached


def _kind(node: Node) -> str:
    return re.sub(r"Backward\d*$", "", node.name())


def _tracked(tensor: Tensor) -> Tensor:
    """The tensor with a place in the graph: a parameter's place would be taken for a weight."""
    return tensor.detach().requires_grad_() * 1 if tensor.is_floating_point() else tensor


def _leaves(model: nn.Module) -> dict[str, nn.Module]:
    """The layers by path: modules with weights of their own and no children that have some, attention as one."""
    leaves: dict[str, nn.Module] = {}
    within: tuple[str, ...] = ()
    for path, module in model.named_modules():
        if within and path.startswith(within):
            continue
        if isinstance(module, ATTENTION):
            leaves[path] = module
            within = (*within, f"{path}.")
            continue
        own = sum(1 for parameter in module.parameters(recurse=False) if parameter.dim())
        if path and own and not any(True for child in module.children() for _ in child.parameters()):
            leaves[path] = module
    return leaves


def _layer_of(model: nn.Module, name: str) -> str:
    """The path of the layer that holds the tensor called `name`."""
    path = name.rpartition(".")[0]
    parent = path.rpartition(".")[0]
    return parent if path and isinstance(model.get_submodule(parent), ATTENTION) else path


def _innermost(branches: Sequence[_Branch], reasons: dict[str, str]) -> list[_Branch]:
    """The branches that hold no other, those of most layers first: a path round them is more likely left."""
    chosen = []
    for branch in branches:
        inner = [other for other in branches if other is not branch and set(other.members) < set(branch.members)]
        if inner:
            reasons |= dict.fromkeys(branch.members, f"it lies in a branch that holds others, such as {inner[0].exit}")
        else:
            chosen.append(branch)
    return sorted(chosen, key=lambda branch: -len(branch.members))


def _is_matrix(layer: nn.Module) -> bool:
    """Whether it does more than to scale and shift, as norms do, also those that are not torch's."""
    return not isinstance(layer, NORMS) and any(parameter.dim() > 1 for parameter in layer.parameters())


def _shared(model: nn.Module, branch: _Branch) -> str | None:
    """Why a branch cannot go of which a weight is used elsewhere, too."""
    layers = {path: model.get_submodule(path) for path in branch.members}
    if len(set(names := _names(model, branch.members))) < len(names):
        return "its layers share a weight"
    own = {id(tensor): path for path, layer in layers.items() for tensor in layer.parameters()}
    mine = {id(module) for layer in layers.values() for module in layer.modules()}
    for path, module in model.named_modules():
        for parameter in module._parameters.values():
            if id(module) not in mine and id(parameter) in own:
                return f"{own[id(parameter)]} shares a weight with {path or 'the model'}"
    return None


def _names(model: nn.Module, members: Sequence[str]) -> list[str]:
    names = {id(tensor): name for name, tensor in model.named_parameters()}
    layers = [model.get_submodule(path) for path in members]
    return [names[id(tensor)] for layer in layers for tensor in layer.parameters()]


def _units(model: nn.Module, branches: Sequence[_Branch]) -> Units:
    names = {id(tensor): name for name, tensor in model.named_parameters()}
    slices: dict[str, Slice] = {}

    def own(tensor: Tensor, name: str, unit: int, role: Role) -> None:
        if tensor.dim() and len(tensor) and name not in slices:
            owner = torch.full((tensor.shape[0],), unit)
            slices[name] = Slice(tensor=name, dim=0, owner=owner, role=role)

    for unit, branch in enumerate(branches):
        for path in (*(path for path in branch.members if path != branch.exit), branch.exit):
            layer = model.get_submodule(path)
            for name, buffer in layer.named_buffers(path):
                own(buffer, name, unit, "buffer")
            for parameter in layer.parameters():
                own(parameter, names[id(parameter)], unit, "makes" if _is_matrix(layer) else "norm")
    name = next(piece.tensor for piece in slices.values() if piece.role == "makes")
    return Units(name=name, count=len(branches), slices=tuple(slices.values()))


def _trouble(model: nn.Module, example: Nested, branches: Sequence[_Branch]) -> str | None:
    """What goes wrong when the branches are removed from a copy in which they are masked."""
    units = _units(model, branches)
    masked = copy.deepcopy(model)
    with torch.no_grad():
        for name in {piece.tensor for piece in units.slices if piece.role != "buffer"}:
            masked.get_parameter(name).zero_()
    try:
        small = remove_branches(masked, units, torch.zeros(units.count, dtype=torch.bool), example)
    except ValueError as error:
        return str(error)
    if _same(_run(masked, example, [])[0], _run(small, example, [])[0]):
        return None
    return "without it the model does not compute what the masked one does"


def _dead(model: nn.Module, units: Units, kept: Tensor) -> dict[str, tuple[str, ...]]:
    """For each branch that is not kept the layer that it ends in, and all the others."""
    gone: dict[int, list[str]] = {}
    for piece in units.slices:
        unit = int(piece.owner[0])
        if not kept[unit]:
            gone.setdefault(unit, []).append(_layer_of(model, piece.tensor))
    return {paths[-1]: tuple(path for path in dict.fromkeys(paths) if path != paths[-1]) for paths in gone.values()}


def _calls(model: nn.Module, example: Nested) -> dict[str, _Call]:
    """The calls of each module that is called once, and from tensors to tensors."""
    calls: dict[str, list[_Call | None]] = {}

    def note(path: str) -> Any:
        def noted(_module: nn.Module, given: Any, named: Any, output: Any) -> None:
            first, main = _first((given, named)), _main(output)
            others = 0 if main is output else len(output) - 1 if main is not None else 0
            plain = first is not None and main is not None
            found = _Call(tuple(first.shape), tuple(main.shape), others) if plain else None  # type: ignore[union-attr]
            calls.setdefault(path, []).append(found)

        return noted

    handles = [
        module.register_forward_hook(note(path), with_kwargs=True) for path, module in model.named_modules() if path
    ]
    try:
        _run(model, example, [])
    finally:
        for handle in handles:
            handle.remove()
    return {path: found[0] for path, found in calls.items() if len(found) == 1 and found[0] is not None}


def _nothing(path: str, layer: nn.Module, calls: Mapping[str, _Call]) -> nn.Module:
    """What stands in a dead layer's place, of the same shape."""
    if isinstance(layer, ATTENTION):
        return NothingAttended(layer.batch_first)
    if isinstance(layer, _ConvNd) and not isinstance(layer, _ConvTransposeNd):
        return NothingConvolved(layer, layer.out_channels)
    if isinstance(layer, nn.Linear):
        return Nothing(-1, layer.out_features)
    if isinstance(layer, nn.modules.batchnorm._BatchNorm):
        return Nothing(1, layer.num_features)
    nothing = _like(layer, calls.get(path))
    if nothing is None:
        raise ValueError(f"what shape {path} gives cannot be told from what it is given")
    return nothing


def _like(module: nn.Module, made: _Call | None) -> Nothing | None:
    """Zeros by the rule that one call shows: like the input, or like it but for the number of features."""
    if made is None:
        return None
    if made.before == made.after:
        return Nothing(others=made.others)
    # Along the last dimension convolutions have lengths, which the next input may have others of.
    convolves = any(isinstance(part, (_ConvNd, NothingConvolved)) for part in module.modules())
    return None if convolves or made.before[:-1] != made.after[:-1] else Nothing(-1, made.after[-1], made.others)


def _thin(nothing: nn.Module) -> nn.Module:
    """The same with a single channel."""
    if isinstance(nothing, NothingConvolved):
        nothing = copy.copy(nothing)
        nothing.channels = 1
        return nothing
    return Nothing(nothing.dim, others=nothing.others) if isinstance(nothing, Nothing) else nothing


def _holders(model: nn.Module, exit: str, members: Sequence[str]) -> list[str]:
    """The modules round `exit`, largest first, whose weights are all the branch's."""
    own = {id(tensor) for path in (*members, exit) for tensor in model.get_submodule(path).parameters()}
    parts = exit.split(".")
    paths = [".".join(parts[:length]) for length in range(1, len(parts))]
    return [path for path in paths if all(id(p) in own for p in model.get_submodule(path).parameters())]


def _run(model: nn.Module, example: Nested, watched: Sequence[str]) -> tuple[list[Tensor], set[str]]:
    """The model's outputs in evaluation mode, and which of the watched modules gave nothing but zeros."""
    silent: set[str] = set()

    def note(path: str) -> Any:
        def noted(_module: nn.Module, _given: Any, output: Any) -> None:
            main = _main(output)
            if main is not None and not main.any():
                silent.add(path)

        return noted

    modes = [(module, module.training) for module in model.modules()]
    handles = [model.get_submodule(path).register_forward_hook(note(path)) for path in watched]
    model.eval()
    try:
        with torch.no_grad(), _no_fast_path():
            return [tensor for _, tensor in tensors(call(model, transform(torch.clone, example)))], silent
    finally:
        for handle in handles:
            handle.remove()
        for module, mode in modes:
            module.training = mode


def _tried(model: nn.Module, example: Nested, expected: Sequence[Tensor], changes: Mapping[str, nn.Module]) -> bool:
    """Puts modules into places of the model; puts back what was there if it then computes anything else."""
    before = {path: model.get_submodule(path) for path in changes}
    for path, module in changes.items():
        _put(model, path, module)
    try:
        if _same(expected, _run(model, example, [])[0]):
            return True
    except Exception:  # the code round it may rely on the width
        pass
    for path, module in before.items():
        _put(model, path, module)
    return False


def _same(expected: Sequence[Tensor], found: Sequence[Tensor]) -> bool:
    return len(expected) == len(found) and all(
        one.shape == other.shape and torch.allclose(one, other, rtol=1e-5, atol=1e-6, equal_nan=True)
        for one, other in zip(expected, found, strict=True)
    )


def _at(model: nn.Module, path: str) -> nn.Module | None:
    """The module at `path`, if there still is one."""
    try:
        return model.get_submodule(path)
    except AttributeError:
        return None


def _put(model: nn.Module, path: str, module: nn.Module) -> None:
    """The module in the place of the one at `path`, by whatever other paths that is reached, too."""
    before = model.get_submodule(path)
    module.train(before.training)
    for place, found in list(model.named_modules(remove_duplicate=False)):
        if found is before:
            parent, _, name = place.rpartition(".")
            model.get_submodule(parent)._modules[name] = module


def _block_fast_paths(model: nn.Module, paths: Sequence[str]) -> None:
    """Transformer layers of torch compute without their parts, by the weights alone, where these two allow it."""
    for place, module in model.named_modules():
        if any(path.startswith(f"{place}." if place else "") for path in paths):
            if isinstance(module, nn.TransformerEncoderLayer):
                module.activation_relu_or_gelu = 0
            elif isinstance(module, nn.TransformerEncoder):
                module.use_nested_tensor = False


@contextmanager
def _no_fast_path() -> Iterator[None]:
    """Attention calls its parts while the context lasts, so that hooks see them."""
    was_enabled = torch.backends.mha.get_fastpath_enabled()
    torch.backends.mha.set_fastpath_enabled(False)
    try:
        yield
    finally:
        torch.backends.mha.set_fastpath_enabled(was_enabled)


def _line(error: BaseException) -> str:
    return " ".join(str(error).split())[:200] or type(error).__name__


def _main(output: Any) -> Tensor | None:
    """The output, or the first of several."""
    first = output[0] if isinstance(output, (tuple, list)) and output else output
    return first if isinstance(first, Tensor) else None


def _first(given: Any) -> Any:
    return next((tensor for _, tensor in tensors(given)), None)

"""Hidden units of LSTM, GRU and RNN layers: who reads them, and layers that are left with unlike widths.

A unit owns its row of each gate, its column of the weights that read the last step, and its columns in whatever reads
the layer. Masked, its state stays zero from a zero start: an LSTM's candidate is tanh(0), a GRU's too, an RNN's whole
step is f(0). From another start it fades by the gates' σ(0), which nobody reads.

Who reads a layer is found by running the model with NaN in the place of some units: a NaN passes through everything
that depends on it, and what does not come out at a single place is refused.
"""

from __future__ import annotations

import copy
from collections.abc import Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.utils.rnn import PackedSequence, pack_padded_sequence, pad_packed_sequence

from orchestrator.pruning.coupling import Found
from orchestrator.pruning.refits import refit
from orchestrator.pruning.structure import Slice, Units, without
from orchestrator.removal.shrinking import ShrinkRefused, shrink
from orchestrator.tasks.data import Nested, call, move

GATES = {"LSTM": 4, "GRU": 3, "RNN_TANH": 1, "RNN_RELU": 1}
KINDS = (nn.LSTM, nn.GRU, nn.RNN)


def find_recurrent(model: nn.Module, example: Nested, prunable: Collection[str]) -> Found:
    """The hidden units of every `nn.LSTM`, `nn.GRU` and `nn.RNN` of which a weight is prunable.

    Each layer and direction is a group of its own, so that they may be left with unlike widths. Units were removed from
    a copy of the model so that they were, and the outputs were the masked copy's.

    Args:
        model: is only looked at; a copy is run.
        example: inputs of one example.
        prunable: the names of the tensors whose weights may be pruned; a tied one's first name.
    """
    units: list[Units] = []
    refused: dict[str, str] = {}
    names = {id(parameter): name for name, parameter in model.named_parameters()}
    for path, module in model.named_modules():
        if not isinstance(module, nn.RNNBase):
            continue
        layers = {layer: names[id(getattr(module, f"weight_ih_{_suffix(*layer)}"))] for layer in _layers(module)}
        wanted = {
            layer: name
            for layer, name in layers.items()
            if name in prunable or names[id(getattr(module, f"weight_hh_{_suffix(*layer)}"))] in prunable
        }
        why = _why_not(model, module) if wanted else None
        if why is not None:
            refused |= dict.fromkeys(wanted.values(), why)
        elif wanted:
            try:
                readers, kept_back = _readers(model, path, example)
            except (MemoryError, torch.OutOfMemoryError):
                raise
            except Exception as error:  # whatever user code may raise, at the sight of NaN or before
                said = " ".join(str(error).split())[:200] or type(error).__name__
                refused |= dict.fromkeys(wanted.values(), f"its readers cannot be found ({said})")
                continue
            found = []
            for layer, name in wanted.items():
                if layer in kept_back:
                    refused[name] = kept_back[layer]
                else:
                    slices = (*_within(module, layer, names), *readers.get(layer, ()))
                    found.append(Units(name=name, count=module.hidden_size, slices=slices))
            why = _trouble(model, example, found)
            if why is None:
                units += found
            else:
                refused |= {group.name: why for group in found}
    return Found(units=tuple(units), refused=refused)


class NarrowRecurrent(nn.Module):
    """An LSTM, GRU or RNN whose layers and directions have widths of their own; tensors keep their names.

    Called as torch's are, with a tensor or a `PackedSequence`, and gives (output, states). The states, for each layer
    and direction in torch's order, are a tuple of (batch, width) instead of one tensor, since widths differ: `h[-1]` is
    the last one as before. Initial states are None or of the form that it returns; those of removed units have no
    place in it.
    """

    def __init__(self, whole: nn.RNNBase, tensors: Mapping[str, Tensor]) -> None:
        super().__init__()
        for name, tensor in tensors.items():
            self.register_parameter(name, nn.Parameter(tensor, requires_grad=getattr(whole, name).requires_grad))
        self.mode = whole.mode
        self.num_layers = whole.num_layers
        self.bidirectional = whole.bidirectional
        self.bias = whole.bias
        self.batch_first = whole.batch_first
        self.dropout = whole.dropout
        self.widths = tuple(tensors[f"weight_hh_{_suffix(*layer)}"].shape[1] for layer in _layers(whole))
        self.train(whole.training)

    def forward(self, input: Tensor | PackedSequence, hx: Any = None) -> tuple[Tensor | PackedSequence, Any]:
        """Shapes as for torch's, but for the states.

        Raises:
            ValueError: initial states that are not of the form it returns.
        """
        if isinstance(input, PackedSequence):
            # Sorted from here to the end, so that pieces need no order of their own.
            steps, lengths = pad_packed_sequence(PackedSequence(input.data, input.batch_sizes))
            output, ends = self._through(steps, self._initial(hx, steps, True, input.sorted_indices), lengths)
            data = pack_padded_sequence(output, lengths).data
            packed = PackedSequence(data, input.batch_sizes, input.sorted_indices, input.unsorted_indices)
            return packed, self._shown(ends, True, input.unsorted_indices)
        batched = input.dim() == 3
        steps = input.unsqueeze(1) if not batched else input.transpose(0, 1) if self.batch_first else input
        output, ends = self._through(steps, self._initial(hx, steps, batched, None), None)
        if not batched:
            return output.squeeze(1), self._shown(ends, batched, None)
        return output.transpose(0, 1) if self.batch_first else output, self._shown(ends, batched, None)

    def _through(
        self, steps: Tensor, starts: Sequence[Sequence[Tensor]], lengths: Tensor | None
    ) -> tuple[Tensor, list[tuple[Tensor, ...]]]:
        """All layers over `steps` (time, batch, features): the last one's output, and each one's ends."""
        ends: list[tuple[Tensor, ...]] = []
        directions = 2 if self.bidirectional else 1
        for layer in range(self.num_layers):
            outputs = []
            for direction in range(directions):
                output, *end = self._run(layer, direction, steps, starts[len(ends)], lengths)
                outputs.append(output)
                ends.append(tuple(end))
            steps = torch.cat(outputs, -1)
            if layer < self.num_layers - 1:
                steps = F.dropout(steps, self.dropout, self.training)
        return steps, ends

    def _run(
        self, layer: int, direction: int, steps: Tensor, start: Sequence[Tensor], lengths: Tensor | None
    ) -> tuple[Tensor, ...]:
        """One direction of one layer over `steps` (time, batch, features): outputs in the order of time, and ends."""
        suffix = _suffix(layer, direction)
        kinds = ("weight_ih", "weight_hh", "bias_ih", "bias_hh") if self.bias else ("weight_ih", "weight_hh")
        weights = [getattr(self, f"{kind}_{suffix}") for kind in kinds]
        steps = _reversed(steps, lengths) if direction else steps
        own = (weights, self.bias, 1, 0.0, self.training, False)
        first = tuple(state.unsqueeze(0) for state in start)
        run: Any = getattr(torch, self.mode.lower())
        hx = first if self.mode == "LSTM" else first[0]
        if lengths is None:
            output, *ends = run(steps, hx, *own, False)
        else:
            packed = pack_padded_sequence(steps, lengths)
            data, *ends = run(packed.data, packed.batch_sizes, hx, *own)
            output = pad_packed_sequence(PackedSequence(data, packed.batch_sizes))[0]
        return (_reversed(output, lengths) if direction else output, *(end.squeeze(0) for end in ends))

    def _initial(self, hx: Any, steps: Tensor, batched: bool, order: Tensor | None) -> list[tuple[Tensor, ...]]:
        """The states (batch, width) that each layer and direction starts from: (h,), or (h, c) for an LSTM."""
        parts = 2 if self.mode == "LSTM" else 1
        if hx is None:
            return [(steps.new_zeros(steps.shape[1], width),) * parts for width in self.widths]
        states = list(hx) if parts == 2 else [hx]
        shape = (steps.shape[1],) if batched else ()
        if len(states) != parts or any(
            len(state) != len(self.widths)
            or any(tuple(one.shape) != (*shape, width) for one, width in zip(state, self.widths, strict=True))
            for state in states
        ):
            raise ValueError(f"initial states must have the widths {self.widths}, each (batch, width), or be None")
        starts = zip(*states, strict=True)
        if not batched:
            return [tuple(one.unsqueeze(0) for one in start) for start in starts]
        return [tuple(one if order is None else one.index_select(0, order) for one in start) for start in starts]

    def _shown(self, ends: Sequence[Sequence[Tensor]], batched: bool, order: Tensor | None) -> Any:
        """The last states as `forward` gives them, in the order in which the examples came."""

        def one(state: Tensor) -> Tensor:
            if not batched:
                return state.squeeze(0)
            return state if order is None else state.index_select(0, order)

        states = tuple(tuple(one(end[part]) for end in ends) for part in range(len(ends[0])))
        return states if self.mode == "LSTM" else states[0]

    def extra_repr(self) -> str:
        return f"{self.mode}, widths {self.widths}"


@refit(*KINDS)
def recurrent(module: nn.Module, tensors: Mapping[str, Tensor]) -> nn.Module:
    """The same type where all layers and directions are left with one width, else `NarrowRecurrent`."""
    assert isinstance(module, nn.RNNBase)
    widths = {layer: tensors[f"weight_hh_{_suffix(*layer)}"].shape[1] for layer in _layers(module)}
    for (layer, direction), width in widths.items():
        if width == 0:
            raise ValueError(f"layer {layer}{' backwards' if direction else ''} would have no unit left")
    for place, width in widths.items():
        sizes = {tensor.shape[0] for name, tensor in tensors.items() if name.endswith(f"_{_suffix(*place)}")}
        if sizes != {GATES[module.mode] * width}:
            raise ValueError(f"the gates of layer {place[0]} would have unlike widths")
    narrow = NarrowRecurrent(module, tensors)
    if len(set(widths.values())) > 1:
        return narrow
    module.hidden_size = next(iter(widths.values()))
    module.input_size = tensors["weight_ih_l0"].shape[1]
    for name, parameter in narrow.named_parameters():
        setattr(module, name, parameter)
    module._init_flat_weights()
    return module


def _layers(module: nn.RNNBase) -> list[tuple[int, int]]:
    """(layer, direction) in torch's order; direction 1 runs backwards."""
    return [(layer, way) for layer in range(module.num_layers) for way in range(2 if module.bidirectional else 1)]


def _suffix(layer: int, direction: int) -> str:
    return f"l{layer}{'_reverse' if direction else ''}"


def _reversed(steps: Tensor, lengths: Tensor | None) -> Tensor:
    """Each sequence of `steps` (time, batch, features) the other way round; what lies past its length stays there."""
    if lengths is None:
        return steps.flip(0)
    time = torch.arange(steps.shape[0])[:, None]
    index = torch.where(time < lengths, lengths - 1 - time, time).to(steps.device)
    return steps.gather(0, index[:, :, None].expand_as(steps))


def _why_not(model: nn.Module, module: nn.RNNBase) -> str | None:
    if type(module) not in KINDS:
        return f"a {type(module).__name__} may do with its units what torch's own layers do not"
    if module.proj_size:
        return "a projection of its states (proj_size) ties its units together"
    if module.hidden_size == 1:
        return "it has a single unit"
    own = {id(parameter) for parameter in module.parameters()}
    for path, other in model.named_modules():
        if other is not module:
            shared = [name for name, value in other.named_parameters(recurse=False) if id(value) in own]
            if shared:
                return f"it shares {path}.{shared[0]} with another layer"
    return None


def _within(module: nn.RNNBase, layer: tuple[int, int], names: Mapping[int, str]) -> Iterator[Slice]:
    """What a layer's units own in the module itself."""

    def slice_of(local: str, dim: int, owner: Tensor, makes: bool) -> Slice:
        name = names[id(getattr(module, local))]
        return Slice(tensor=name, dim=dim, owner=owner, role="makes" if makes else "reads")

    depth, direction = layer
    suffix = _suffix(*layer)
    owner = torch.arange(module.hidden_size)
    for kind in ("weight_ih", "weight_hh", "bias_ih", "bias_hh") if module.bias else ("weight_ih", "weight_hh"):
        yield slice_of(f"{kind}_{suffix}", 0, owner.repeat(GATES[module.mode]), True)
    yield slice_of(f"weight_hh_{suffix}", 1, owner, False)
    if depth + 1 < module.num_layers:
        directions = 2 if module.bidirectional else 1
        columns = torch.full((directions * module.hidden_size,), -1)
        columns[direction * module.hidden_size :][: module.hidden_size] = owner
        for way in range(directions):
            yield slice_of(f"weight_ih_{_suffix(depth + 1, way)}", 1, columns, False)


def _trouble(model: nn.Module, example: Nested, units: Sequence[Units]) -> str | None:
    """What goes wrong when some of all units are removed so that unlike widths are left, and when the others are."""
    shapes = {name: parameter.shape for name, parameter in model.named_parameters()}
    for turned in (False, True):
        kept = [(torch.arange(group.count) % (2 + place) == 0) == turned for place, group in enumerate(units)]
        try:
            shrink(model, without(zip(units, kept, strict=True), {}, shapes), units, example)
        except ShrinkRefused as error:
            return f"removing its units changes more than them: at {error.layer or 'the model'!r}, {error.reason}"
    return None


@dataclass
class _Seen:
    """What NaN reached in one run: input features of readers, call by call, and what cannot be followed."""

    features: dict[str, list[Tensor]] = field(default_factory=dict)
    astray: list[str] = field(default_factory=list)


def _readers(
    model: nn.Module, path: str, example: Nested
) -> tuple[dict[tuple[int, int], list[Slice]], dict[tuple[int, int], str]]:
    """For each layer and direction the slices of what reads it outside the module, or why its units cannot go."""
    model = copy.deepcopy(model).eval()
    example = move(example, next(model.parameters()).device)
    module = model.get_submodule(path)
    assert isinstance(module, nn.RNNBase)
    layers, width = _layers(module), module.hidden_size
    marks = torch.zeros(len(layers), width, dtype=torch.bool)
    refused: dict[tuple[int, int], str] = {}
    calm = _seen(model, module, example, marks)
    if calm.astray or calm.features:
        return {}, dict.fromkeys(layers, "the model gives NaN, so that nothing can be followed in it")
    reached: dict[str, set[tuple[int, int]]] = {}
    for index, layer in enumerate(layers):
        seen = _seen(model, module, example, marks.index_fill(0, torch.tensor(index), True))
        if seen.astray:
            refused[layer] = seen.astray[0]
        for name, calls in seen.features.items():
            reached.setdefault(name, set()).add(layer)
            if any(not torch.equal(call, calls[0]) for call in calls):
                refused[layer] = f"{name}, which reads it, reads other things in the same place"
    # Each unit has a number. For every bit of it, one run marks the units that have it and one those that have not: a
    # place that both reach is reached by two units, and of the others the runs spell the number.
    numbers = torch.arange(marks.numel()).view_as(marks)
    open_layers = torch.tensor([layer not in refused for layer in layers])[:, None]
    found: dict[str, Tensor] = {}
    mixed: dict[str, Tensor] = {}
    for bit in range(max(1, (marks.numel() - 1).bit_length())):
        has = (numbers >> bit & 1).bool()
        ones = _features(_seen(model, module, example, has & open_layers))
        zeros = _features(_seen(model, module, example, ~has & open_layers))
        for name in sorted(ones.keys() | zeros.keys()):  # units are told, and their scores added up, in this order
            one, zero = (some.get(name) for some in (ones, zeros))
            one = torch.zeros_like(zero) if one is None and zero is not None else one
            assert one is not None
            zero = torch.zeros_like(one) if zero is None else zero
            number = found.get(name, torch.where(one | zero, 0, -1))
            found[name] = torch.where(one & (number >= 0), number | 1 << bit, number)
            mixed[name] = mixed.get(name, torch.zeros_like(one)) | one & zero
    names = {id(parameter): name for name, parameter in model.named_parameters()}
    slices: dict[tuple[int, int], list[Slice]] = {}
    for name, number in found.items():
        reader = model.get_submodule(name)
        why = _cannot_read(model, name, reader)
        if mixed[name].any():
            why = f"several of its units reach {name} in one place"
        for index, layer in enumerate(layers):
            if layer not in reached[name] or layer in refused:
                continue
            if why is not None:
                refused[layer] = why
                continue
            owner = torch.where(number // width == index, number % width, -1).masked_fill(number < 0, -1)
            for local in _reading(reader):
                tensor = names[id(getattr(reader, local))]
                slices.setdefault(layer, []).append(Slice(tensor=tensor, dim=1, owner=owner, role="reads"))
    return slices, refused


def _cannot_read(model: nn.Module, path: str, reader: nn.Module) -> str | None:
    own = {id(getattr(reader, local)) for local in _reading(reader)}
    for other_path, other in model.named_modules():
        if other is not reader and any(id(value) in own for value in other._parameters.values()):
            return f"{path}, which reads it, shares its weight with {other_path}"
    return None


def _reading(reader: nn.Module) -> list[str]:
    """The weights of a reader whose columns are its input features."""
    if isinstance(reader, nn.RNNBase):
        return [f"weight_ih_{_suffix(0, way)}" for way in range(2 if reader.bidirectional else 1)]
    return ["weight"]


def _features(seen: _Seen) -> dict[str, Tensor]:
    return {name: torch.stack(calls).any(0) for name, calls in seen.features.items() if any(c.any() for c in calls)}


def _seen(model: nn.Module, module: nn.RNNBase, example: Nested, marks: Tensor) -> _Seen:
    """What NaN reaches when it stands in the place of the units that `marks` (layers, width) names."""
    seen = _Seen()
    with _watched(model, module, marks, seen), torch.no_grad():
        output = call(model, example)
    if any(bool(tensor.isnan().any()) for tensor in _floats(output)):
        seen.astray.append("it reaches the model's output other than through a linear layer")
    return seen


@contextmanager
def _watched(model: nn.Module, module: nn.RNNBase, marks: Tensor, seen: _Seen) -> Iterator[None]:
    """Hooks that put NaN into the module's outputs, note where it comes, and stop it there."""
    last = marks[-2 if module.bidirectional else -1 :].reshape(-1)

    def marked(module: nn.Module, inputs: Any, outputs: Any) -> Any:
        output, states = outputs
        if isinstance(output, PackedSequence):
            output = output._replace(data=output.data.masked_fill(last.to(output.data.device), torch.nan))
        else:
            output = output.masked_fill(last.to(output.device), torch.nan)
        of_states = marks[:, None] if _first(outputs[1]).dim() == 3 else marks
        return output, _each(states, lambda state: state.masked_fill(of_states.to(state.device), torch.nan))

    def entered(module: nn.Module, inputs: Any, kwargs: Any, outputs: Any) -> Any:
        given = [tensor for tensor in _floats((inputs, kwargs)) if tensor.isnan().any()]
        first = _first((inputs, kwargs))
        name = paths[module]
        readable = type(module) in (nn.Linear, *KINDS) and all(tensor is first for tensor in given)
        if not given:
            if name in seen.features:
                seen.features[name].append(torch.zeros_like(seen.features[name][0]))
            elif readable and first is not None:
                clean.setdefault(name, torch.zeros(first.shape[-1], dtype=torch.bool))
            return None
        if readable and module is not watched:
            before = [clean[name]] if name in clean and name not in seen.features else []
            found = first.isnan().reshape(-1, first.shape[-1]).any(0).cpu()
            seen.features.setdefault(name, before).append(found)
        else:
            seen.astray.append(f"it reaches {name} ({type(module).__name__}), which cannot do without single units")
        return _each(outputs, torch.zeros_like)

    watched = module
    clean: dict[str, Tensor] = {}
    paths = {module: path for path, module in model.named_modules()}
    handles = [module.register_forward_hook(entered, with_kwargs=True) for module in model.modules() if _own(module)]
    handles.append(module.register_forward_hook(marked))
    was_enabled = torch.backends.mha.get_fastpath_enabled()
    torch.backends.mha.set_fastpath_enabled(False)  # it would pass the hooks by
    try:
        yield
    finally:
        torch.backends.mha.set_fastpath_enabled(was_enabled)
        for handle in handles:
            handle.remove()


def _own(module: nn.Module) -> bool:
    return next(module.parameters(recurse=False), None) is not None


def _floats(given: Any) -> Iterator[Tensor]:
    """Every tensor of floating point in what a module was handed or gave."""
    if isinstance(given, Tensor):
        if given.is_floating_point():
            yield given
    elif isinstance(given, PackedSequence):
        yield given.data
    elif isinstance(given, Mapping):
        for value in given.values():
            yield from _floats(value)
    elif isinstance(given, (tuple, list)):
        for value in given:
            yield from _floats(value)


def _first(given: Any) -> Any:
    return next(_floats(given), None)


def _each(given: Any, change: Any) -> Any:
    """`given` with every tensor of floating point changed."""
    if isinstance(given, Tensor):
        return change(given) if given.is_floating_point() else given
    if isinstance(given, PackedSequence):
        return given._replace(data=change(given.data))
    if isinstance(given, Mapping):
        return {name: _each(value, change) for name, value in given.items()}
    if isinstance(given, (tuple, list)):
        values = [_each(value, change) for value in given]
        return type(given)(*values) if hasattr(given, "_fields") else type(given)(values)
    return given

"""What removal is worth: every model beside itself masked, built that narrow from the start, and Torch-Pruning's.

    python tests/benchmarks/removal.py [--repeats N] [--only WORD]

Half and three quarters of the units go, at equal rates in all layers, smallest first. Latencies are measured in turns,
on one thread, warm, at batches of 1 and of 64, in processor time, so that others on the machine do not count. Prints
one JSON line with a row for each removal:

    difference      the greatest between the outputs of the masked and of the shrunk model
    flops, bytes    of the shrunk model, as fractions of the dense one's; bytes of the weights as safetensors
    latency         of the shrunk model as a fraction of the dense one's, by batch
    over_limit      of the shrunk model as a multiple of that of the same architecture built at its widths, by batch;
                    with the same weights, since some kernels branch on the values
    noise           that of the narrow architecture over its own, measured as a second model
    beside          Torch-Pruning's `latency` and `bytes` of the same removal, and in `fault` what is wrong with it
"""

from __future__ import annotations

import argparse
import copy
import json
import time
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from itertools import product
from random import Random
from statistics import median
from typing import Any

import torch
import torch.nn.functional as F
import torch_pruning
from safetensors.torch import save
from torch import Tensor, nn

from orchestrator.measures.flops import count
from orchestrator.ops import Prune
from orchestrator.pruning.attention import NarrowAttention
from orchestrator.pruning.finding import find
from orchestrator.pruning.prune import Network, prune
from orchestrator.pruning.structure import Units
from orchestrator.removal.shrinking import masked_copy, shrink
from orchestrator.state import of_model
from orchestrator.tasks.models import conv_1d, image_model

CASES = (
    ("lenet-300-100", "neuron"),
    ("lenet-conv", "filter"),
    ("lenet-conv", "channel"),
    ("resnet", "channel"),
    ("depthwise", "channel"),
    ("transformer", "neuron"),
    ("transformer", "head"),
    ("conv-1d", "channel"),
    ("lstm", "neuron"),
    ("tied", "channel"),
)
"""Filters and channels of a network without linear layers between are the same."""
SHARES = (0.5, 0.75)
MULTIPLES = (1, 8)
BATCHES = (1, 64)
SIDE = 28
SHORTEST = 1e-3
"""Seconds; passes that take less are timed several at once."""
TOLERANCE = 1e-5


class PlainAttention(nn.Module):
    """Self-attention with heads that do not fill the width, as one would write it from the start."""

    batch_first = True
    _qkv_same_embed_dim = False
    in_proj_bias = None

    def __init__(self, width: int, heads: int, head_dim: int) -> None:
        super().__init__()
        self.shape = (heads, head_dim)
        self.projections = nn.Linear(width, 3 * heads * head_dim)
        self.out_proj = nn.Linear(heads * head_dim, width)

    def forward(self, tokens: Tensor, *_: Tensor, **__: Any) -> tuple[Tensor, None]:
        batch, length, _width = tokens.shape
        q, k, v = self.projections(tokens).view(batch, length, 3, *self.shape).permute(2, 0, 3, 1, 4)
        return self.out_proj(F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2)), None


def built(name: str) -> nn.Module:
    """The zoo's model as if it had been trained: no bias is zero, and norms have met data like `inputs`."""
    torch.manual_seed(0)
    model = conv_1d() if name == "conv-1d" else image_model(name, SIDE, 300)()
    norms = [module for module in model.modules() if isinstance(module, nn.BatchNorm2d)]
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() == 1:
                parameter.add_(0.1 * torch.randn_like(parameter))
        for norm in norms:
            norm.momentum = 1.0  # the statistics become those of the one batch
        model.train()(inputs(name, 64))
    return model.eval()


def inputs(name: str, batch: int) -> Tensor:
    """A batch of what the model takes, in [0, 1]."""
    shape = {"conv-1d": (40,), "lenet-300-100": (SIDE * SIDE,)}.get(name, (1, SIDE, SIDE))
    return torch.rand(batch, *shape, generator=torch.Generator().manual_seed(1))


def masks_of(
    model: nn.Module, units: Sequence[Units], structure: str, share: float, multiple: int
) -> dict[str, Tensor]:
    """The masks without `share` of the units of each layer, those of the smallest weights."""
    makers = {piece.tensor for group in units for piece in group.slices if piece.role == "makes"}
    parameters = {name: parameter.detach() for name, parameter in model.named_parameters()}
    network = Network(
        weights={name: tensor for name, tensor in parameters.items() if name in makers and tensor.dim() > 1},
        shapes={name: tensor.shape for name, tensor in parameters.items()},
        units=tuple(units),
    )
    op = Prune(criterion="magnitude", scope="layer", structure=structure, rate=share, round_to=multiple)
    return dict(prune(op, network, lambda need: {}).masks)


def as_narrow(name: str, shrunk: nn.Module) -> nn.Module:
    """The architecture called `name` built anew at the widths of `shrunk`, with its weights."""
    twin = built(name)
    for path, narrow in list(shrunk.named_modules()):
        whole = twin.get_submodule(path)
        fresh = _fresh(whole, narrow)
        if fresh is not None:
            if not isinstance(fresh, PlainAttention):
                fresh.load_state_dict(narrow.state_dict())
            parent, _, local = path.rpartition(".")
            setattr(twin.get_submodule(parent), local, fresh)
    if name == "tied":
        twin.get_submodule("embedding").weight = twin.get_submodule("out").weight
    return twin.eval()


def _fresh(whole: nn.Module, narrow: nn.Module) -> nn.Module | None:
    """A module like `whole` that is as narrow as `narrow`; None for one without widths of its own."""
    match whole:
        case nn.MultiheadAttention() if isinstance(narrow, NarrowAttention):
            attention = PlainAttention(narrow.embed_dim, narrow.num_heads, narrow.head_dim)
            weights = {"weight": narrow.in_proj_weight, "bias": narrow.in_proj_bias}
            attention.projections.load_state_dict(weights)
            return attention
        case nn.Linear() if isinstance(narrow, nn.Linear) and type(whole) is nn.Linear:
            return nn.Linear(narrow.weight.shape[1], narrow.weight.shape[0], bias=whole.bias is not None)
        case nn.Conv1d() | nn.Conv2d() if isinstance(narrow, (nn.Conv1d, nn.Conv2d)):
            groups = narrow.weight.shape[0] if whole.groups > 1 else 1
            kind: Callable[..., nn.Module] = type(whole)
            return kind(
                groups * narrow.weight.shape[1],
                narrow.weight.shape[0],
                whole.kernel_size,
                stride=whole.stride,
                padding=whole.padding,
                groups=groups,
                bias=whole.bias is not None,
            )
        case nn.BatchNorm2d():
            return nn.BatchNorm2d(len(narrow.get_buffer("running_mean")))
        case nn.LSTM():
            shape = narrow.get_parameter("weight_hh_l0").shape
            return nn.LSTM(whole.input_size, shape[1], batch_first=True)
        case nn.Embedding():
            return nn.Embedding(*narrow.get_parameter("weight").shape)
        case _:
            return None


def by_torch_pruning(
    model: nn.Module, units: Sequence[Units], structure: str, share: float, multiple: int, example: Tensor
) -> tuple[nn.Module, float]:
    """The same removal by Torch-Pruning, and how far outputs moved from those of the masked model, all steps together.

    Before each of its steps, what it is about to cut is set to zero, which a removal must not differ from.
    """
    model = copy.deepcopy(model)
    makers = {piece.tensor.rpartition(".")[0] for group in units for piece in group.slices if piece.role == "makes"}
    heads = {m: m.num_heads for m in model.modules() if isinstance(m, nn.MultiheadAttention)}
    of_heads = structure == "head"
    roots: list[type[nn.Module]] = [nn.modules.conv._ConvNd, nn.Linear, nn.LSTM, nn.Embedding]
    # With the neighbours of attention ignored, it removes no head and does not say so.
    ignorable = () if of_heads else tuple(roots)
    others = [m for path, m in model.named_modules() if isinstance(m, ignorable) and path not in makers]
    pruner = torch_pruning.pruner.MagnitudePruner(
        model,
        example,
        importance=torch_pruning.importance.GroupMagnitudeImportance(p=2),
        pruning_ratio=share,
        ignored_layers=others,
        round_to=None if multiple == 1 else multiple,
        num_heads=heads,
        prune_num_heads=of_heads,
        prune_head_dims=not of_heads,
        head_pruning_ratio=share if of_heads else 0.0,
        in_channel_groups={},  # these defaults are dicts that every pruner shares
        out_channel_groups={},
        channel_groups={},
        root_module_types=[nn.MultiheadAttention] if of_heads else roots,
    )
    moved = 0.0
    for group in pruner.step(interactive=True):
        for step, places in group:
            _zero(step.target.module, step.handler.__name__, places)
        before = _outputs(model, example)
        group.prune()
        moved += float((_outputs(model, example) - before).abs().max())
    return model.eval(), moved


@torch.no_grad()
def _zero(module: Any, handler: str, places: Sequence[int]) -> None:
    """Masks what one of Torch-Pruning's steps is about to cut out of a module."""
    if not isinstance(module, nn.Module) or getattr(module, "weight", None) is None:
        return
    weight: Tensor = module.weight  # type: ignore[assignment]
    if handler.endswith("_in_channels") and weight.dim() > 1 and "depthwise" not in handler and "norm" not in handler:
        weight[:, places] = 0
        return
    if isinstance(module, nn.Embedding):
        weight[:, places] = 0
        return
    weight[places] = 0
    if getattr(module, "bias", None) is not None:
        module.bias[places] = 0  # type: ignore[operator]


@torch.no_grad()
def _outputs(model: nn.Module, example: Tensor) -> Tensor:
    model.eval()
    found: Tensor = model(example)
    return found


def fault_of(theirs: nn.Module, ours: nn.Module, dense: nn.Module, moved: float) -> str | None:
    """What is wrong with Torch-Pruning's result; None where nothing is."""
    narrower = {name: tensor.shape for name, tensor in theirs.state_dict().items()}
    whole = {name: tensor.shape for name, tensor in dense.state_dict().items()}
    kept = {name: tensor.shape for name, tensor in ours.state_dict().items()}
    if narrower == whole:
        return "removes nothing"
    for name, shape in narrower.items():
        if shape != whole[name] and kept[name] == whole[name]:
            return f"wrong: narrows {name} from {tuple(whole[name])} to {tuple(shape)}, too"
        if shape == whole[name] and kept[name] != whole[name]:
            return f"leaves {name} whole"
    return f"wrong: outputs are {moved:.1g} off" if moved > TOLERANCE else None


def latencies(models: Mapping[str, nn.Module], example: Tensor, repeats: int) -> dict[str, list[float]]:
    """Seconds of a forward pass of each model, `repeats` times in turns; those of one turn stand at the same place."""
    turns, order = list(models), Random(0)
    times: dict[str, list[float]] = {name: [] for name in models}
    with torch.inference_mode():
        passes = {}
        for name, model in models.items():
            for _ in range(10):
                once = _seconds(model, example, 1)
            passes[name] = max(1, round(SHORTEST / once))
        for _ in range(repeats):
            order.shuffle(turns)
            for name in turns:
                times[name].append(_seconds(models[name], example, passes[name]))
    return times


def _seconds(model: nn.Module, example: Tensor, passes: int) -> float:
    model(example)  # caches and memory are left as the model before needed them
    began = time.process_time()
    for _ in range(passes):
        model(example)
    return (time.process_time() - began) / passes


def ratio(times: Sequence[float], beside: Sequence[float]) -> float:
    """The median of the ratios within each turn: what slows the machine for a while slows both."""
    return round(median(one / other for one, other in zip(times, beside, strict=True)), 3)


def size(model: nn.Module) -> int:
    """Bytes of the weights as safetensors, tied ones once."""
    return len(save(of_model(model)))


def rows(wanted: str, repeats: int) -> Iterator[dict[str, Any]]:
    """One row for each removal whose model or structure has `wanted` in its name."""
    for name, structure in CASES:
        if wanted not in f"{name} {structure}":
            continue
        dense, example = built(name), inputs(name, 1)
        prunable = [n for n, parameter in dense.named_parameters() if parameter.dim() > 1 and n != "positions"]
        units = find(dense, example, structure, prunable).units
        assert units, (name, structure)
        seen: list[dict[str, Tensor]] = []
        for share, multiple in product(SHARES, MULTIPLES):
            masks = masks_of(dense, units, structure, share, multiple)
            nothing = all(bool(mask.all()) for mask in masks.values())
            if nothing or any(_equal(masks, other) for other in seen):
                continue  # so few units make no such multiple, or they make it anyhow
            seen.append(masks)
            yield _row(name, structure, share, multiple, dense, units, masks, repeats)


def _equal(one: Mapping[str, Tensor], other: Mapping[str, Tensor]) -> bool:
    return all(torch.equal(mask, other[name]) for name, mask in one.items())


def _row(
    name: str,
    structure: str,
    share: float,
    multiple: int,
    dense: nn.Module,
    units: Sequence[Units],
    masks: Mapping[str, Tensor],
    repeats: int,
) -> dict[str, Any]:
    example, many = inputs(name, 1), inputs(name, 64)
    shrunk = shrink(dense, masks, units, example).model
    limit = as_narrow(name, shrunk)
    assert torch.allclose(_outputs(limit, many), _outputs(shrunk, many), atol=TOLERANCE)
    assert sum(p.numel() for p in limit.parameters()) == sum(p.numel() for p in shrunk.parameters())
    models = {"dense": dense, "shrunk": shrunk, "limit": limit, "again": limit}
    beside: dict[str, Any] = {}
    try:
        theirs, moved = by_torch_pruning(dense, units, structure, share, multiple, many[:2])
        beside["fault"] = fault_of(theirs, shrunk, dense, moved)
    except Exception as error:  # whatever it raises is the figure
        beside["fault"] = f"raises {type(error).__name__}: {str(error).partition(chr(10))[0][:60]}"
    else:
        models["theirs"] = theirs
        beside["bytes"] = round(size(theirs) / size(dense), 3)
    times = {batch: latencies(models, inputs(name, batch), repeats) for batch in BATCHES}
    if "theirs" in models:
        beside["latency"] = {batch: ratio(found["theirs"], found["dense"]) for batch, found in times.items()}
    difference = (_outputs(masked_copy(dense, masks), many) - _outputs(shrunk, many)).abs().max()
    return {
        "model": name,
        "structure": structure,
        "share": share,
        "multiple": multiple,
        "difference": float(difference),
        "flops": round(count(shrunk, example).total / count(dense, example).total, 3),
        "bytes": round(size(shrunk) / size(dense), 3),
        "latency_ms": {batch: round(1000 * median(found["shrunk"]), 4) for batch, found in times.items()},
        "latency": {batch: ratio(found["shrunk"], found["dense"]) for batch, found in times.items()},
        "over_limit": {batch: ratio(found["shrunk"], found["limit"]) for batch, found in times.items()},
        "noise": {batch: ratio(found["again"], found["limit"]) for batch, found in times.items()},
        "beside": beside,
    }


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--repeats", type=int, default=150)
    parser.add_argument("--only", default="", help="part of a model's or a structure's name")
    options = parser.parse_args()
    torch.set_num_threads(1)
    warnings.simplefilter("ignore")  # Torch-Pruning's, of parameters that belong to no module
    print(json.dumps({"rows": list(rows(options.only, options.repeats))}))


if __name__ == "__main__":
    main()

"""What criteria need beside the weight, taken from the model and the training data: one function per statistic.

All are taken in evaluation mode (no dropout, fixed normalisation statistics) at the weights that the model holds. Means
over the data weigh every example alike, whatever the batches' sizes, and are summed in single precision or better.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from functools import partial
from math import ceil, gcd, prod
from operator import itemgetter
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.modules.conv import _ConvNd
from torch.utils._python_dispatch import TorchDispatchMode

from orchestrator.errors import NotFinite, StageFailed
from orchestrator.measures.flops import plain_kernels
from orchestrator.pruning.criteria import FROM_DATA
from orchestrator.registry import Registry
from orchestrator.tasks.data import Nested, call, tensors, transform
from orchestrator.tasks.task import Task
from orchestrator.training.loop import loss_of, rows_of

MOST_OUTPUTS = 1024
"""How many outputs an example may have for their whole Jacobian to be taken."""

JACOBIAN_ROWS = 64
"""How many rows of a Jacobian are held at a time."""

PATCHES = 2**22
"""About how many entries of unfolded inputs are held at a time."""


@dataclass(frozen=True, kw_only=True)
class Source:
    """What a statistic may look at.

    Args:
        model: in evaluation mode, on its device; may be changed.
        task: the loss.
        batches: (inputs, targets) pairs of training examples.
        names: the parameters to take the statistic of.
        seed: of whatever is drawn.
        example: inputs of one example.
    """

    model: nn.Module
    task: Task
    batches: Sequence[tuple[Any, Any]]
    names: Sequence[str]
    seed: int
    example: Nested

    def parameters(self) -> list[nn.Parameter]:
        """Those called `names`, with their gradients on, frozen ones too."""
        found = dict(self.model.named_parameters())
        for name in self.names:
            found[name].requires_grad_(True)
        return [found[name] for name in self.names]


class Unavailable(StageFailed):
    """A statistic that cannot be had of some of the parameters; of the others it may be."""

    def __init__(self, what: str, names: Sequence[str], reason: str) -> None:
        listed = ", ".join(repr(name) for name in names)
        super().__init__(f"there is no {what} of {listed}: {reason}; name what cannot be scored in prune.ignore")
        self.what, self.names, self.reason = what, tuple(names), reason

    def __reduce__(self) -> tuple[type[Unavailable], tuple[str, tuple[str, ...], str]]:
        return type(self), (self.what, self.names, self.reason)


STATISTICS: Registry[Callable[..., dict[str, Tensor]]] = Registry("statistic")
statistic = STATISTICS.register


def gather(
    what: str,
    model: nn.Module,
    task: Task,
    batches: Sequence[tuple[Any, Any]],
    names: Sequence[str],
    *,
    seed: int,
    example: Nested,
    parameters: Mapping[str, Any],
) -> dict[str, Tensor]:
    """The statistic called `what` of each named parameter, on the CPU.

    Args:
        what: a name in `STATISTICS`; `pruning/criteria.py` states its shape.
        model: holds the masked weights, on its device; it may be changed.
        task: the loss, a mean over its batch.
        batches: (inputs, targets) pairs from the training split, on the model's device; may be empty where the
            statistic needs no data.
        names: of the prunable parameters.
        seed: of random probes.
        example: inputs of one example, on the model's device.
        parameters: of the criterion; those that the statistic does not have are passed over.

    Raises:
        Unavailable: the statistic cannot be had of some of the parameters.
        StageFailed: it cannot be had of this model or task.
        NotFinite: a value of it is NaN or infinite.
    """
    model.eval()
    source = Source(model=model, task=task, batches=batches, names=names, seed=seed, example=example)
    own = {name: parameters.get(name, value) for name, value in FROM_DATA.get(what, {}).items() if name != "examples"}
    found = STATISTICS[what].function(source, **own)
    for name in names:
        if not torch.isfinite(found[name]).all():
            raise NotFinite(f"the {what} of {name!r} holds NaN or infinite values")
    return {name: found[name].detach().to("cpu") for name in names}


@statistic("gradient")
def gradient(source: Source) -> dict[str, Tensor]:
    """Gradient of the mean training loss; zero for a parameter that takes no part in it."""
    # cuDNN's recurrent layers have no backward pass in evaluation mode.
    recurrent = any(isinstance(module, nn.RNNBase) for module in source.model.modules())
    with torch.backends.cudnn.flags(enabled=False) if recurrent else nullcontext():
        return _mean(source, lambda loss, parameters: _gradients(loss, parameters))


@statistic("hessian_diagonal")
def hessian_diagonal(source: Source, probes: int) -> dict[str, Tensor]:
    """Diagonal of the mean training loss's Hessian, estimated with random signs (Hutchinson, 1990).

    The mean of z ⊙ Hz over signs z, drawn anew for each batch; one probe is exact for a diagonal Hessian.
    """
    draw = torch.Generator().manual_seed(source.seed)

    def of_batch(loss: Tensor, parameters: list[nn.Parameter]) -> list[Tensor]:
        slopes = _gradients(loss, parameters, create_graph=True)
        total = [torch.zeros_like(parameter) for parameter in parameters]
        for _ in range(probes):
            signs = [_signs(parameter, draw) for parameter in parameters]
            curved = _gradients(_dot(slopes, signs), parameters, retain_graph=True)
            total = [t.addcmul(s, c, value=1 / probes) for t, s, c in zip(total, signs, curved, strict=True)]
        return total

    with plain_kernels():
        return _mean(source, of_batch)


@statistic("hessian_gradient")
def hessian_gradient(source: Source) -> dict[str, Tensor]:
    """Hessian times gradient of the mean training loss, over the named parameters alone (Wang et al., 2020).

    Half the derivative of the gradient's squared norm. The gradient is that of all batches together, so that it does
    not matter how the examples were cut into batches.
    """
    with plain_kernels():
        whole = list(gradient(source).values())

        def of_batch(loss: Tensor, parameters: list[nn.Parameter]) -> list[Tensor]:
            return _gradients(_dot(_gradients(loss, parameters, create_graph=True), whole), parameters)

        return _mean(source, of_batch)


@statistic("hessian_blocks")
def hessian_blocks(source: Source, exact_up_to: int, block: int) -> dict[str, Tensor]:
    """Blocks of the mean training loss's generalised Gauss-Newton matrix, JᵀΛJ (Schraudolph, 2002).

    J is the Jacobian of an example's outputs and Λ the loss's Hessian in them, less directions of negative curvature.
    This is the Hessian where the outputs are linear in the weights, and Fisher's information for cross entropy.

    Raises:
        StageFailed: the task has a `step` of its own, or the outputs are no tensor, or too many.
    """
    parameters = source.parameters()
    sizes = [p.numel() if p.numel() <= exact_up_to else block for p in parameters]
    sums = [
        torch.zeros(ceil(p.numel() / size), size, size, dtype=_sum_dtype(p), device=p.device)
        for p, size in zip(parameters, sizes, strict=True)
    ]
    held: list[list[Tensor]] = []
    with plain_kernels():
        for row in _curved_jacobian(source, parameters):
            held.append(row)
            if len(held) == JACOBIAN_ROWS:
                _add_squares(sums, held)
                held = []
        if held:
            _add_squares(sums, held)
    examples = sum(rows_of(batch) for batch in source.batches)
    for parameter, total in zip(parameters, sums, strict=True):
        total.div_(examples)
        filled = parameter.numel() - (len(total) - 1) * total.shape[1]
        total[-1].diagonal()[filled:] = 1
    return dict(zip(source.names, sums, strict=True))


@statistic("input_norm")
def input_norm(source: Source) -> dict[str, Tensor]:
    """Euclidean norm of each input feature over examples and places (Sun et al., 2024).

    A convolution's features are those that a kernel sees, the zeros of the padding among them.
    """

    def squares(product: _Product) -> Tensor:
        seen = _windows(product, product.inputs.square())
        return seen.sum(dim=tuple(range(seen.dim() - product.weight.dim() + 1)))

    found = {}
    for name, parts in _observe(source, "input_norm", squares).items():
        norms = {rows: total.sqrt().unsqueeze(0) for rows, total in parts.items()}
        whole = [norm.expand(stop - start, *norm.shape[1:]) for (start, stop), norm in norms.items()]
        found[name] = next(iter(norms.values())) if len(norms) == 1 else torch.cat(whole)
    return found


@statistic("input_gram")
def input_gram(source: Source) -> dict[str, Tensor]:
    """Mean over examples and places of the products x·xᵀ of the input features (Frantar & Alistarh, 2023)."""
    places: dict[tuple[str, tuple[int, int]], int] = {}

    def products(product: _Product) -> Tensor:
        width = product.weight[0].numel()
        total = product.inputs.new_zeros(width, width)
        at_once = max(1, PATCHES // max(1, product.places * width // len(product.inputs)))
        for inputs in torch.split(product.inputs, at_once):
            rows = _windows(product, inputs).reshape(-1, width)
            total.addmm_(rows.t(), rows)
        key = (product.name, product.rows)
        places[key] = places.get(key, 0) + product.places
        return total

    found = {}
    for name, parts in _observe(source, "input_gram", products).items():
        means = {rows: total / places[name, rows] for rows, total in parts.items()}
        size = gcd(*(stop - start for start, stop in means))
        grams = [mean for (start, stop), mean in means.items() for _ in range((stop - start) // size)]
        found[name] = grams[0] if len(means) == 1 else torch.stack(grams)
    return found


@statistic("activation")
def activation(source: Source) -> dict[str, Tensor]:
    """Mean absolute output of each row, with its bias, over examples and places (Molchanov et al., 2017)."""
    places: dict[tuple[str, tuple[int, int]], int] = {}

    def outputs(product: _Product) -> Tensor:
        key = (product.name, product.rows)
        places[key] = places.get(key, 0) + product.outputs.numel() // product.outputs.shape[1]
        return product.outputs.abs().movedim(1, 0).flatten(1).sum(dim=1)

    observed = _observe(source, "activation", outputs)
    return {
        name: torch.cat([total / places[name, rows] for rows, total in parts.items()])
        for name, parts in observed.items()
    }


@statistic("synaptic_flow")
def synaptic_flow(source: Source) -> dict[str, Tensor]:
    """∂R/∂|w| of R, the summed output of the network of absolute weights on ones (Tanaka et al., 2020).

    In double precision; buffers are made absolute too. Whole numbers among the inputs stay as in the example; where
    there is nothing else, as with tokens, the ones enter behind the embeddings.

    Raises:
        StageFailed: the model cannot run in double precision; or it takes whole numbers, and there is no embedding
            where ones could enter.
        Unavailable: an embedding is to be scored itself.
    """
    model = source.model.double()
    parameters = source.parameters()
    with torch.no_grad():
        for tensor in (*model.parameters(), *model.buffers()):
            if tensor.is_floating_point():
                tensor.copy_(tensor.abs().where(tensor.isfinite(), tensor))  # attention masks are infinite on purpose
    inputs = transform(_ones, source.example)
    if not any(tensor.is_floating_point() for _, tensor in tensors(inputs)):
        embeddings = [module for module in model.modules() if isinstance(module, (nn.Embedding, nn.EmbeddingBag))]
        if not embeddings:
            raise StageFailed("SynFlow needs an input of ones: the model takes whole numbers and has no nn.Embedding")
        for embedding in embeddings:
            embedding.register_forward_hook(lambda module, given, output: torch.ones_like(output))
    with plain_kernels():
        try:
            given = call(model, inputs)
        except torch.OutOfMemoryError:
            raise
        except RuntimeError as error:  # a model that insists on single precision
            said = str(error).partition("\n")[0]
            raise StageFailed(
                f"SynFlow runs the model in double precision on ones, which it cannot take: {said}"
            ) from error
        outputs = [output.sum() for _, output in tensors(given) if output.is_floating_point()]
        if not outputs:
            raise StageFailed("SynFlow needs outputs that are tensors of real numbers")
        flows = torch.autograd.grad(torch.stack(outputs).sum(), parameters, allow_unused=True)
    passed = [
        name
        for name, flow in zip(source.names, flows, strict=True)
        if flow is None and isinstance(model.get_submodule(name.rpartition(".")[0]), (nn.Embedding, nn.EmbeddingBag))
    ]
    if passed:
        raise Unavailable("synaptic flow", passed, "SynFlow's ones enter behind embeddings")
    return {
        name: torch.zeros_like(parameter) if flow is None else flow
        for name, parameter, flow in zip(source.names, parameters, flows, strict=True)
    }


@statistic("batchnorm_scale")
def batchnorm_scale(source: Source) -> dict[str, Tensor]:
    """Scale γ of the BatchNorm that is handed the layer's output itself, with nothing between (Liu et al., 2017).

    Raises:
        Unavailable: a layer has none.
    """
    made: list[tuple[str, Tensor]] = []
    found: dict[str, Tensor] = {}

    def makes(name: str, module: nn.Module, given: Any, output: Tensor) -> None:
        if not isinstance(module, nn.Linear) or output.dim() == 2:  # else its rows are not the norm's channels
            made.append((name, output))  # held, so that no other tensor can take its place in memory

    def reads(module: nn.Module, given: Any) -> None:
        for name, output in made:
            if any(value is output for value in given) and isinstance(module.weight, Tensor):
                found.setdefault(name, module.weight)

    for name in source.names:
        path, _, leaf = name.rpartition(".")
        module = source.model.get_submodule(path)
        if leaf == "weight" and isinstance(module, (nn.Linear, _ConvNd)):
            module.register_forward_hook(partial(makes, name))
    for module in source.model.modules():
        if isinstance(module, _BatchNorm):
            module.register_forward_pre_hook(reads)
    with torch.no_grad(), plain_kernels():
        call(source.model, source.example)
    missing = [name for name in source.names if name not in found]
    if missing:
        raise Unavailable("BatchNorm scale", missing, "no BatchNorm with a scale reads the layer's output directly")
    return {name: found[name].to(_sum_dtype(found[name])) for name in source.names}


@dataclass(frozen=True, kw_only=True)
class _Product:
    """A product of some rows of a parameter with inputs, as it was run.

    Args:
        name: the parameter's.
        rows: the first of its rows that took part, and the one behind the last.
        weight: these rows.
        inputs: (n, features), or (n, channels, …) of a convolution, those of the rows' group.
        outputs: (n, rows), or (n, rows, …), with the bias.
        steps: stride, padding and dilation of a convolution by dimension.
    """

    name: str
    rows: tuple[int, int]
    weight: Tensor
    inputs: Tensor
    outputs: Tensor
    steps: tuple[Sequence[int], Sequence[int], Sequence[int]] | None = None

    @property
    def places(self) -> int:
        """How often each row was applied: examples times places."""
        return self.outputs.numel() // self.outputs.shape[1]


def _windows(product: _Product, inputs: Tensor) -> Tensor:
    """What each application of the weight sees of `inputs`: (n, …, *weight.shape[1:]), a view but for padding."""
    if product.steps is None:
        return inputs
    kernel = product.weight.shape[2:]
    stride, padding, dilation = (_each(given, len(kernel)) for given in product.steps)
    view = F.pad(inputs, [side for width in reversed(padding) for side in (width, width)])
    for axis, size in enumerate(kernel):
        reach = (size - 1) * dilation[axis] + 1
        view = view.unfold(axis + 2, reach, stride[axis])[..., :: dilation[axis]]
    return view.movedim(1, len(kernel) + 1)


def _each(given: Sequence[int], count: int) -> list[int]:
    return [*given] if len(given) == count else [given[0]] * count


def _observe(source: Source, what: str, of: Callable[[_Product], Tensor]) -> dict[str, dict[tuple[int, int], Tensor]]:
    """The sums of `of` over all products of each named parameter, by the rows that took part, in order.

    Raises:
        Unavailable: some row of a parameter is not seen in a product with inputs.
    """
    source.parameters()
    observer = _Observer(source, of)
    with torch.no_grad(), plain_kernels():
        for batch in source.batches:
            with observer:
                if source.task.step is None:
                    call(source.model, batch[0])
                else:
                    loss_of(source.model, batch, source.task)
    parameters = dict(source.model.named_parameters())
    for name in source.names:
        edges = sorted(observer.sums[name])
        # The rows that took part must follow on each other, from the first to the last.
        if not edges or [0, *(stop for _, stop in edges)] != [*(start for start, _ in edges), len(parameters[name])]:
            observer.missed.add(name)
    missed = [name for name in source.names if name in observer.missed]
    if missed:
        raise Unavailable(what, missed, UNSEEN)
    return {name: dict(sorted(observer.sums[name].items())) for name in source.names}


UNSEEN = "only weights of linear layers, plain convolutions and attention, used as they are, can be observed"

aten = torch.ops.aten


class _Observer(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Sees the products that torch really runs, whichever module or function asked for them."""

    @classmethod
    def _should_skip_dynamo(cls) -> bool:
        return False  # else torch imports its whole compiler at the first call, for more than a second

    def __init__(self, source: Source, of: Callable[[_Product], Tensor]) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.sums: dict[str, dict[tuple[int, int], Tensor]] = {name: {} for name in source.names}
        self.missed: set[str] = set()
        self._of, self._model = of, source.model
        self._places: dict[int, list[tuple[str, nn.Parameter]]] = {
            p.untyped_storage().data_ptr(): [] for p in source.model.parameters()
        }
        for name, parameter in source.model.named_parameters():
            if name in self.sums:
                self._places[parameter.untyped_storage().data_ptr()].append((name, parameter))

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        operation = func.overloadpacket
        if operation is aten.convolution:
            self._convolution(args, result)
        elif operation in (aten.mm, aten.bmm, aten.mv, aten.dot):
            self._matrices(args[0], args[1], result, with_bias=False)
        elif operation in (aten.addmm, aten.baddbmm, aten.addmv, aten.addbmm):
            self._matrices(args[1], args[2], result, with_bias=True)
        return result

    def _convolution(self, args: Any, result: Tensor) -> None:
        inputs, weight, _, stride, padding, dilation, transposed, _, groups = args[:9]
        found = self._named(weight)
        if found is None:
            return
        name, parameter = found
        if transposed or weight.shape != parameter.shape:
            self.missed.add(name)
            return
        rows = len(weight) // groups
        for group in range(groups):
            mine = slice(group * rows, (group + 1) * rows)
            theirs = slice(group * weight.shape[1], (group + 1) * weight.shape[1])
            self._see(
                _Product(
                    name=name,
                    rows=(mine.start, mine.stop),
                    weight=weight[mine],
                    inputs=_widened(inputs[:, theirs]),
                    outputs=_widened(result[:, mine]),
                    steps=(stride, padding, dilation),
                )
            )

    def _matrices(self, inputs: Tensor, matrix: Tensor, result: Tensor, with_bias: bool) -> None:
        first = self._named(inputs)
        if first is not None:
            self.missed.add(first[0])
        found = self._named(matrix)
        if found is None:
            return
        name, parameter = found
        if matrix.dim() == 3 and matrix.stride(0) == 0:  # one matrix for a whole batch of inputs
            matrix = matrix[0]
        width = parameter[0].numel()
        start, beyond = divmod(int(matrix.storage_offset()) - int(parameter.storage_offset()), width)
        straight = matrix.dim() == 2 and matrix.stride(0) == 1 and (matrix.shape[1] == 1 or matrix.stride(1) == width)
        if beyond or not straight or len(matrix) != width or not parameter.is_contiguous():
            self.missed.add(name)
            return
        stop = start + matrix.shape[1]
        outputs = _widened(result).reshape(-1, result.shape[-1])
        if not with_bias:
            bias = self._bias(name)
            outputs = outputs if bias is None else outputs + bias[start:stop]
        self._see(
            _Product(
                name=name,
                rows=(start, stop),
                weight=parameter[start:stop].reshape(stop - start, width),
                inputs=_widened(inputs).reshape(-1, width),
                outputs=outputs,
            )
        )

    def _see(self, product: _Product) -> None:
        sums = self.sums[product.name]
        found = self._of(product)
        sums[product.rows] = sums[product.rows] + found if product.rows in sums else found

    def _named(self, operand: Tensor) -> tuple[str, nn.Parameter] | None:
        """The parameter in whose memory the operand lies."""
        offset = operand.storage_offset()
        for name, parameter in self._places.get(operand.untyped_storage().data_ptr(), ()):
            start = parameter.storage_offset()
            if start <= offset < start + parameter.numel():
                return name, parameter
        return None

    def _bias(self, name: str) -> Tensor | None:
        """What torch's own modules add to the rows of the parameter after the product."""
        path, _, leaf = name.rpartition(".")
        module = self._model.get_submodule(path)
        if isinstance(module, nn.Linear):
            return module.bias
        if isinstance(module, nn.MultiheadAttention) and module.in_proj_bias is not None:
            before = {"k_proj_weight": 1, "v_proj_weight": 2}.get(leaf, 0)
            return module.in_proj_bias[before * module.embed_dim :]
        return None


def _mean(source: Source, of: Callable[[Tensor, list[nn.Parameter]], list[Tensor]]) -> dict[str, Tensor]:
    """The mean over all examples of what `of` makes of each batch's loss."""
    parameters = source.parameters()
    # Sums over many examples need more digits and a wider range than half precision has.
    sums = [torch.zeros_like(p, dtype=_sum_dtype(p), requires_grad=False) for p in parameters]
    examples = 0
    for batch in source.batches:
        size = rows_of(batch)
        for total, found in zip(sums, of(loss_of(source.model, batch, source.task), parameters), strict=True):
            total.add_(found, alpha=size)
        examples += size
    return {name: total / examples for name, total in zip(source.names, sums, strict=True)}


def _gradients(value: Tensor, parameters: Sequence[Tensor], **given: Any) -> list[Tensor]:
    """The gradient of `value` at each parameter; zeros where it does not depend on it."""
    if not value.requires_grad:
        return [torch.zeros_like(parameter) for parameter in parameters]
    return list(torch.autograd.grad(value, parameters, allow_unused=True, materialize_grads=True, **given))


def _dot(first: Sequence[Tensor], second: Sequence[Tensor]) -> Tensor:
    return torch.stack([(a * b).sum() for a, b in zip(first, second, strict=True)]).sum()


def _signs(like: Tensor, draw: torch.Generator) -> Tensor:
    # Drawn on the CPU, so that every device sees the same.
    return torch.randint(0, 2, like.shape, generator=draw).mul_(2).sub_(1).to(like.device, like.dtype)


def _curved_jacobian(source: Source, parameters: list[nn.Parameter]) -> Iterator[list[Tensor]]:
    """The rows r, by parameter, whose products r·rᵀ sum up to JᵀΛJ over all examples."""
    if source.task.step is not None:
        raise StageFailed(
            "hessian_blocks differentiate the loss at the outputs, which a task's own `step` does not show"
        )
    for inputs, targets in source.batches:
        for row in range(rows_of((inputs, targets))):
            example, target = transform(itemgetter(slice(row, row + 1)), (inputs, targets))
            outputs = call(source.model, example)
            if not isinstance(outputs, Tensor) or not outputs.is_floating_point():
                raise StageFailed(f"hessian_blocks need outputs that are one tensor, not {type(outputs).__name__}")
            if outputs.numel() > MOST_OUTPUTS:
                many = f"{outputs.numel()} outputs for one example, at most {MOST_OUTPUTS}"
                raise StageFailed(f"hessian_blocks take the Jacobian of every output: {many}")
            for direction in _curvatures(partial(_loss, source.task, target), outputs.detach()):
                yield _gradients(outputs, parameters, grad_outputs=direction, retain_graph=True)


def _loss(task: Task, targets: Nested, outputs: Tensor) -> Tensor:
    return task.loss(outputs, targets)


def _curvatures(loss: Callable[[Tensor], Tensor], outputs: Tensor) -> Iterator[Tensor]:
    """Directions v in the outputs whose products v·vᵀ sum up to the positive part of the loss's Hessian there."""
    count = outputs.numel()
    hessian: Callable[..., Any] = torch.autograd.functional.hessian
    matrix = hessian(loss, outputs).reshape(count, count).double()
    values, vectors = torch.linalg.eigh((matrix + matrix.t()) / 2)
    least = values.max() * count * torch.finfo(outputs.dtype).eps
    for value, vector in zip(values, vectors.t(), strict=True):
        if value > least:
            yield (value.sqrt() * vector).to(outputs.dtype).reshape(outputs.shape)


def _add_squares(sums: Sequence[Tensor], rows: Sequence[Sequence[Tensor]]) -> None:
    """Adds to each parameter's blocks (k, b, b) the products of its rows with themselves."""
    for total, of_parameter in zip(sums, zip(*rows, strict=True), strict=True):
        table = torch.stack([row.reshape(-1) for row in of_parameter]).to(total.dtype)
        filled = F.pad(table, (0, prod(total.shape[:2]) - table.shape[1]))
        blocks = filled.reshape(len(table), *total.shape[:2]).transpose(0, 1)
        total.baddbmm_(blocks.transpose(1, 2), blocks)


def _ones(tensor: Tensor) -> Tensor:
    return torch.ones_like(tensor, dtype=torch.float64) if tensor.is_floating_point() else tensor


def _sum_dtype(tensor: Tensor) -> torch.dtype:
    return torch.promote_types(tensor.dtype, torch.float32)


def _widened(tensor: Tensor) -> Tensor:
    return tensor.to(_sum_dtype(tensor))

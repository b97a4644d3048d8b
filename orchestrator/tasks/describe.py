"""What the driver must know of a task, found by building its model once and running it on two rows."""

from __future__ import annotations

from hashlib import sha256
from itertools import islice
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from orchestrator.errors import InputError, TaskError
from orchestrator.tasks.data import Batches, InMemory, Nested, Split, call, shape_of, tensors, transform
from orchestrator.tasks.info import Layer, TaskInfo

if TYPE_CHECKING:
    from orchestrator.tasks.load import LoadedTask

TRANSPOSED = (nn.ConvTranspose1d, nn.ConvTranspose2d, nn.ConvTranspose3d)
CONVOLUTIONS = (nn.Conv1d, nn.Conv2d, nn.Conv3d, *TRANSPOSED)
PROJECTIONS = ("in_proj_weight", "q_proj_weight", "k_proj_weight", "v_proj_weight")


def describe(loaded: LoadedTask) -> TaskInfo:
    """The task as plain data, and the proof that its model, data, loss and metrics fit together.

    Leaves the global random generators as they were.

    Raises:
        TaskError: shapes that do not fit, nothing to prune, or data that cannot be hashed and have no `data_version`.
    """
    from orchestrator.tasks.load import BUILD_SEED, blamed, isolated

    task, name = loaded.task, loaded.source.name
    with isolated(BUILD_SEED), blamed(f"task {name!r} failed", loaded.source):
        try:
            model = loaded.model()
            _check_fit(loaded, model)
            layers = prunable_layers(loaded, model)
            batches = loaded.train.count() if isinstance(loaded.train, Batches) else None
            if batches == 0:
                raise TaskError("train has no batches in epoch 0")
            given = _given_weights(loaded)
            digest = _digest(loaded, given)
        except InputError as error:
            if str(error).startswith("task "):
                raise
            raise TaskError(f"task {name!r}: {error}") from error
    return TaskInfo(
        digest=digest,
        layers=layers,
        train_examples=0 if isinstance(loaded.train, Batches) else len(loaded.train),
        parameters=sum(parameter.numel() for parameter in model.parameters()),
        valid_examples=len(loaded.valid),
        test_examples=0 if loaded.test is None else len(loaded.test),
        batches_per_epoch=batches,
        norms=sum(isinstance(m, _BatchNorm) and m.running_mean is not None for m in model.modules()),
        metrics=tuple((metric, given.direction) for metric, given in loaded.metrics.items()),
        classes=loaded.classes,
        groups=tuple(loaded.task.groups),
        comes_trained=task.fresh is not None,
        init_varies=task.fresh is not None or not all(layer.name in given for layer in layers),
    )


def example_of(loaded: LoadedTask) -> Nested:
    """The inputs of one example, with a leading dimension of 1: the task's own, or the first of `train`."""
    if loaded.task.example is not None:
        return loaded.task.example
    inputs, _ = _first_rows(loaded.train, 1)
    return inputs


def prunable_layers(loaded: LoadedTask, model: nn.Module) -> tuple[Layer, ...]:
    """The prunable tensors in the model's order, tied ones once, under their first names.

    By default the weights of linear and convolutional layers and attention's projections.

    Raises:
        TaskError: there are none.
    """
    given = loaded.task.prunable
    weights = _default_prunable(model) if given is None else set()
    transposed = _transposed(model)
    layers = tuple(
        Layer(name=name, shape=tuple(parameter.shape), transposed=transposed.get(id(parameter), 0))
        for name, parameter in model.named_parameters()
        if (id(parameter) in weights if given is None else bool(given(name, parameter)))
    )
    if not layers:
        why = (
            "it has no linear, convolutional or attention layer" if given is None else "`prunable` accepts no parameter"
        )
        raise TaskError(f"there is nothing to prune in the model: {why}")
    return layers


def _transposed(model: nn.Module) -> dict[int, int]:
    """The weights that lie inputs first, by id, with the groups of their convolutions; not what others hold, too."""
    held = [(module, parameter) for module in model.modules() for parameter in module.parameters(recurse=False)]
    elsewhere = {id(parameter) for module, parameter in held if not isinstance(module, TRANSPOSED)}
    return {
        id(module.weight): module.groups
        for module, parameter in held
        if isinstance(module, TRANSPOSED) and parameter is module.weight and id(parameter) not in elsewhere
    }


def _default_prunable(model: nn.Module) -> set[int]:
    found: set[int] = set()
    for module in model.modules():
        names: tuple[str, ...] = ()
        if isinstance(module, (nn.Linear, *CONVOLUTIONS)):
            names = ("weight",)
        elif isinstance(module, nn.MultiheadAttention):
            names = PROJECTIONS
        found.update(id(getattr(module, name)) for name in names if isinstance(getattr(module, name), nn.Parameter))
    return found


def _check_fit(loaded: LoadedTask, model: nn.Module) -> None:
    example = example_of(loaded)
    model.eval()
    with torch.no_grad():
        _forward(model, example, "")
    model.train()
    inputs, targets = _first_rows(loaded.train, 2)
    outputs = None
    if loaded.task.step is None:
        outputs = _forward(model, inputs, "")
    _check_loss(loaded, model, inputs, targets, outputs)
    model.eval()
    for name, split in (("valid", loaded.valid), ("test", loaded.test)):
        if split is not None:
            inputs, targets = _first_rows(split, 2)
            with torch.no_grad():
                outputs = _forward(model, inputs, f" (from {name})")
            _check_metrics(loaded, outputs, targets, name)


def _forward(model: nn.Module, inputs: Nested, origin: str) -> Any:
    try:
        return call(model, inputs)
    except Exception as error:
        shape = shape_of(inputs)
        raise TaskError(f"the model cannot take an input of shape {shape}{origin}: {_said(error)}") from error


def _check_loss(loaded: LoadedTask, model: nn.Module, inputs: Nested, targets: Nested, outputs: Any) -> None:
    step = loaded.task.step
    named = (
        "step" if step is not None else f"loss {getattr(loaded.task.loss, '__name__', type(loaded.task.loss).__name__)}"
    )
    try:
        loss = step(model, (inputs, targets)) if step is not None else loaded.task.loss(outputs, targets)
    except Exception as error:
        if step is not None:
            raise TaskError(f"step failed on a batch of shape {shape_of(inputs)}: {_said(error)}") from error
        fit = f"the model's output {shape_of(outputs)} does not fit {named} with targets {shape_of(targets)}"
        raise TaskError(f"{fit}: {_said(error)}") from error
    if not isinstance(loss, Tensor) or loss.numel() != 1:
        raise TaskError(f"{named} must give a scalar tensor, not {shape_of(loss)}")
    if not loss.requires_grad:
        raise TaskError(f"{named} gives no gradient: it must be computed from the model's output by torch")


def _check_metrics(loaded: LoadedTask, outputs: Any, targets: Nested, name: str) -> None:
    classes = loaded.classes
    if classes is not None and isinstance(outputs, Tensor) and outputs.ndim >= 2:
        columns = outputs.shape[1]
        if columns != len(classes) and not (columns == 1 and len(classes) == 2):
            raise TaskError(f"the model's output {shape_of(outputs)} does not fit the {len(classes)} classes")
    for metric, given in loaded.metrics.items():
        # A user's own metric may rightly refuse two rows, as ROC AUC does where they are of one class.
        if not isinstance(loaded.task.metrics[metric], str):
            continue
        try:
            float(given.function(outputs, targets))
        except Exception as error:
            fit = f"metric {metric!r} failed on outputs {shape_of(outputs)} and targets {shape_of(targets)} of {name}"
            raise TaskError(f"{fit}: {_said(error)}") from error


def _first_rows(split: Split | Batches, count: int) -> tuple[Nested, Nested]:
    if not isinstance(split, Batches):
        return split.take(torch.arange(min(count, len(split))))
    first = next(iter(islice(split.epoch(0, torch.Generator().manual_seed(0)), 1)), None)
    if first is None:
        raise TaskError("train has no batches in epoch 0")
    if not isinstance(first, (tuple, list)) or len(first) != 2:
        raise TaskError(f"the batches of train must be (inputs, targets) pairs, not {type(first).__name__}")
    inputs, targets = first
    return transform(lambda tensor: tensor[:count], inputs), transform(lambda tensor: tensor[:count], targets)


def _digest(loaded: LoadedTask, given: dict[str, Tensor]) -> str:
    from orchestrator.tasks.load import canonical

    digest = sha256()
    digest.update(f"{loaded.source.digest}\0{canonical(loaded.params, loaded.source)}\0".encode())
    version = loaded.task.data_version
    if version:
        digest.update(f"data_version\0{version}\0".encode())
    else:
        for name, split in (("train", loaded.train), ("valid", loaded.valid), ("test", loaded.test)):
            if split is None:
                continue
            if not isinstance(split, InMemory):
                raise TaskError(f"{name} is not held in tensors and cannot be hashed: name its data with data_version")
            hash_tensors(digest, f"{name} inputs", split.inputs)
            hash_tensors(digest, f"{name} targets", split.targets)
    for split_name, groups in loaded.groups.items():
        for group, labels in groups.items():
            digest.update(f"{split_name} group {group}\0{labels.names}\0".encode())
            hash_tensors(digest, f"{split_name} group {group}", labels.codes)
    hash_tensors(digest, "example", loaded.task.example)
    hash_tensors(digest, "weights", given)
    return digest.hexdigest()


def _given_weights(loaded: LoadedTask) -> dict[str, Tensor]:
    """The weights that a model brings from a file, which no digest of source or data covers.

    They are those that do not depend on the init seed: a new head on a trained body is drawn anew and left out. A task
    need not say that its model comes trained for its checkpoint to count.
    """
    from orchestrator.tasks.load import BUILD_SEED, isolated

    with isolated(BUILD_SEED):
        first = loaded.model().state_dict()
    with isolated(BUILD_SEED + 1):
        second = loaded.model().state_dict()
    return {
        name: value
        for name, value in first.items()
        if isinstance(value, Tensor) and name in second and torch.equal(value, second[name])
    }


def hash_tensors(digest: Any, where: str, value: Nested) -> None:
    """Feeds place, dtype, shape and bytes of every tensor of `value` to a hashlib object."""
    for place, tensor in tensors(value):
        digest.update(f"{where}{place}\0{tensor.dtype}\0{tuple(tensor.shape)}\0".encode())
        flat = tensor.detach().cpu().contiguous().reshape(-1)
        digest.update(flat.view(torch.uint8).numpy().data)


def _said(error: BaseException) -> str:
    said = str(error).strip().partition("\n")[0]
    return said or type(error).__name__

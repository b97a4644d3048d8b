"""A user's checkpoint: read without running anything, fitted strictly, sent to workers, and part of every key."""

from __future__ import annotations

import pickle
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file, save_model
from torch import Tensor, nn

from orchestrator import Study, StudySpec
from orchestrator.errors import SpecError, TaskError
from orchestrator.pools.local import LocalPool
from orchestrator.tasks import source as sources
from orchestrator.tasks.checkpoint import lay_over, read_checkpoint
from orchestrator.tasks.load import LoadedTask, load
from orchestrator.tasks.models import ResNet, TiedTokens
from orchestrator.tasks.source import collect

TASK = """\
import torch
from torch import nn
from orchestrator.tasks import Task

X, Y = torch.arange(12.0).reshape(6, 2), torch.tensor([0, 1, 0, 1, 0, 1])

def task() -> Task:
    return Task(model=lambda: nn.Sequential(nn.Linear(2, 3), nn.ReLU(), nn.Linear(3, 2)), train=(X, Y), valid=(X, Y))
"""

Saved = Callable[[Mapping[str, Any], Path], None]
SAVERS: dict[str, Saved] = {
    "w.safetensors": lambda weights, path: save_file(dict(weights), path),
    "w.pt": torch.save,
    "w.pth": torch.save,
    "w.bin": torch.save,
}


def trained(value: float = 1.0) -> dict[str, Tensor]:
    return {
        "0.weight": torch.full((3, 2), value),
        "0.bias": torch.zeros(3),
        "2.weight": torch.full((2, 3), -value),
        "2.bias": torch.ones(2),
    }


def loaded(folder: Path, name: str, weights: Any = None) -> LoadedTask:
    """The task in `folder` with the checkpoint of that name, which is written first where `weights` are given."""
    folder.mkdir(exist_ok=True)
    (folder / "my_task.py").write_text(TASK)
    if weights is not None:
        SAVERS[name](weights, folder / name)
    return load(collect("my_task.py", folder, name), {}, folder)


def said(folder: Path, name: str, weights: Any = None) -> str:
    with pytest.raises(TaskError) as caught:
        loaded(folder, name, weights).info  # noqa: B018 - read for what it raises
    assert "\n" not in str(caught.value)
    return str(caught.value)


@pytest.mark.parametrize("name", SAVERS)
def test_the_model_starts_from_the_file_and_fresh_stays_untrained(name: str, tmp_path: Path) -> None:
    task = loaded(tmp_path, name, trained())
    assert task.info.comes_trained and task.info.init_varies
    assert task.model().get_parameter("0.weight").tolist() == [[1, 1]] * 3
    torch.manual_seed(1)
    assert task.model(fresh=True).get_parameter("0.weight").tolist() != [[1, 1]] * 3


def test_the_digest_follows_the_tensors_not_the_file(tmp_path: Path) -> None:
    plain = loaded(tmp_path / "none", "")
    first = loaded(tmp_path / "a", "w.safetensors", trained()).info.digest
    assert loaded(tmp_path / "b", "w.pt", trained()).info.digest == first
    assert loaded(tmp_path / "c", "w.pt", trained(2)).info.digest != first
    assert plain.info.digest != first and not plain.info.comes_trained


def test_a_file_that_changed_is_read_again(tmp_path: Path) -> None:
    before = loaded(tmp_path, "w.pt", trained()).info.digest
    assert loaded(tmp_path, "w.pt", trained(3)).info.digest != before


def test_without_a_checkpoint_the_digest_is_what_it_was(tmp_path: Path) -> None:
    (tmp_path / "my_task.py").write_text(TASK)
    assert collect("my_task.py", tmp_path) == collect("my_task.py", tmp_path, "")
    SAVERS["w.pt"](trained(), tmp_path / "w.pt")
    assert collect("my_task.py", tmp_path).digest == collect("my_task.py", tmp_path, "w.pt").digest


@pytest.mark.parametrize(
    ("change", "complaint"),
    [
        ({"2.bias": None}, "it lacks '2.bias'"),
        ({"head.weight": torch.zeros(2)}, "it has 'head.weight', which the model does not have"),
        (
            {"0.weight": None, "module.0.weight": torch.zeros(3, 2)},
            "it lacks '0.weight' and it has 'module.0.weight', which the model does not have",
        ),
        ({"0.weight": torch.zeros(2, 3)}, "'0.weight' has shape (2, 3), the model wants (3, 2)"),
    ],
)
def test_what_does_not_fit(change: dict[str, Tensor | None], complaint: str, tmp_path: Path) -> None:
    weights = {name: tensor for name, tensor in (trained() | change).items() if tensor is not None}
    start = "task 'my_task.py': checkpoint 'w.pt' does not fit the model: "
    assert said(tmp_path, "w.pt", weights) == start + complaint


@pytest.mark.parametrize(
    ("weights", "complaint"),
    [
        ([torch.zeros(2)], "checkpoint 'w.pt' holds a list, not a state dict; legal: names to tensors"),
        (
            {"epoch": 3, "state_dict": trained()},
            "checkpoint 'w.pt': 'epoch' is no tensor but of type int; legal: names to tensors",
        ),
        (
            trained() | {"2.bias": torch.zeros(2).to_sparse()},
            "checkpoint 'w.pt': '2.bias' is no plain tensor but torch.sparse_coo of torch.float32",
        ),
        (
            trained() | {"2.bias": torch.zeros(2, dtype=torch.float8_e4m3fn)},
            "checkpoint 'w.pt': '2.bias' is no plain tensor but torch.strided of torch.float8_e4m3fn",
        ),
        (trained() | {"2.bias": torch.tensor([1, torch.nan])}, "checkpoint 'w.pt': '2.bias' holds NaN or infinite"),
    ],
)
def test_what_is_no_state_dict(weights: Any, complaint: str, tmp_path: Path) -> None:
    assert said(tmp_path, "w.pt", weights).startswith(complaint)


@pytest.mark.parametrize("name", ["w.pt", "w.safetensors"])
@pytest.mark.parametrize("content", [b"", b"hello", b"PK\x03\x04 and no more", bytes([128, 2, 75, 0, 133, 82])])
def test_a_file_that_is_something_else(content: bytes, name: str, tmp_path: Path) -> None:
    (tmp_path / name).write_bytes(content)
    assert said(tmp_path, name).startswith(f"checkpoint {name!r} ")


def test_a_file_that_is_not_there(tmp_path: Path) -> None:
    path = tmp_path.resolve() / "gone.pt"
    assert said(tmp_path, "gone.pt") == f"checkpoint 'gone.pt': cannot read {path}: No such file or directory"
    (tmp_path / "folder.pt").mkdir()
    assert said(tmp_path, "folder.pt").endswith("Is a directory")


class Trap:
    """Unpickled, it makes a file."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> Any:
        return Path.touch, (self.path,)


@pytest.mark.parametrize("save", [torch.save, lambda value, path: path.write_bytes(pickle.dumps(value))])
def test_code_in_a_pickle_is_never_run(save: Any, tmp_path: Path) -> None:
    sprung = tmp_path / "sprung"
    save({"0.weight": Trap(sprung)}, tmp_path / "w.pt")
    complaint = said(tmp_path, "w.pt")
    assert complaint.startswith("checkpoint 'w.pt' is no plain state dict, and pickled objects are never loaded")
    assert not sprung.exists()


def test_canary_the_trap_works(tmp_path: Path) -> None:
    pickle.loads(pickle.dumps(Trap(tmp_path / "sprung")))
    assert (tmp_path / "sprung").exists()


def test_a_worker_needs_neither_folder_nor_file(tmp_path: Path) -> None:
    task = loaded(tmp_path / "here", "w.pt", trained())
    (tmp_path / "here" / "w.pt").unlink()
    (tmp_path / "there").mkdir()
    travelled = pickle.loads(pickle.dumps(task.source))
    there = load(travelled, {}, tmp_path / "there")
    assert there is not task and there.info == task.info


def test_a_large_file_is_read_where_the_worker_is(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(sources, "LARGEST_SENT", 10)
    task = loaded(tmp_path / "here", "w.pt", trained())
    assert task.source.checkpoint is not None and task.source.checkpoint.data is None
    assert task.model().get_parameter("0.weight").tolist() == [[1, 1]] * 3
    there = tmp_path / "there"
    there.mkdir()
    with pytest.raises(
        TaskError, match=r"^checkpoint 'w.pt' is too large to be sent to workers, and .* cannot be read"
    ):
        load(task.source, {}, there)
    torch.save(trained(2), there / "w.pt")
    with pytest.raises(TaskError, match=r"w.pt on .* is another file; put it on a disk that they share$"):
        load(task.source, {}, there)


def test_buffers_of_batch_norms_are_part_of_it(tmp_path: Path) -> None:
    model, other = ResNet(), ResNet()
    model(torch.rand(4, 1, 8, 8))
    torch.save(model.state_dict(), tmp_path / "w.pt")
    checkpoint = collect("digits", tmp_path, "w.pt").checkpoint
    assert checkpoint is not None
    lay_over(read_checkpoint(checkpoint), other)
    assert other.norm.num_batches_tracked == 1
    assert torch.equal(model.eval()(torch.ones(1, 1, 8, 8)), other.eval()(torch.ones(1, 1, 8, 8)))


def test_a_tied_tensor_needs_one_of_its_names(tmp_path: Path) -> None:
    model = TiedTokens(4)
    save_model(model, str(tmp_path / "w.safetensors"))  # keeps one name of the two
    checkpoint = collect("digits", tmp_path, "w.safetensors").checkpoint
    assert checkpoint is not None
    weights = read_checkpoint(checkpoint)
    assert len(weights) == len(model.state_dict()) - 1
    for given in (weights, model.state_dict()):
        other = TiedTokens(4)
        lay_over(given, other)
        assert torch.equal(other.embedding.weight, model.embedding.weight)
        assert other.out.weight is other.embedding.weight
    with pytest.raises(
        TaskError, match=r"^'embedding.weight' and 'out.weight' are one tensor in the model, and differ"
    ):
        lay_over(model.state_dict() | {"out.weight": torch.zeros(27, 8)}, TiedTokens(4))


def test_passing_buffers_are_not_asked_for() -> None:
    model = nn.Linear(2, 1)
    model.register_buffer("passing", torch.ones(1), persistent=False)
    lay_over({"weight": torch.zeros(1, 2), "bias": torch.zeros(1)}, model)
    assert model.weight.tolist() == [[0, 0]]


def spec(**fields: Any) -> StudySpec:
    plain = {
        "name": "mine",
        "task": "my_task.py",
        "trials": 1,
        "sampler": "random",
        "train": {"epochs": 0, "retrain_epochs": 1},
        "space": {"criterion": "magnitude", "sparsity": 0.5, "retrain": "none"},
    }
    return StudySpec(**(plain | fields))


def test_a_study_prunes_a_checkpoint_as_it_comes(tmp_path: Path) -> None:
    weights = {name: torch.linspace(-1, 1, tensor.numel()).reshape(tensor.shape) for name, tensor in trained().items()}
    (tmp_path / "my_task.py").write_text(TASK)
    torch.save(weights, tmp_path / "w.pt")
    study = Study(spec(checkpoint="w.pt"), tmp_path / "store", root=tmp_path)
    assert study.run(LocalPool()).done == 1
    row = study.front().points[0]
    home = study.fetch(row["key"], tmp_path / "home")
    pruned = nn.Sequential(nn.Linear(2, 3), nn.ReLU(), nn.Linear(3, 2))
    checkpoint = collect("digits", home, "weights.safetensors").checkpoint  # what was fetched is a checkpoint again
    assert checkpoint is not None
    lay_over(read_checkpoint(checkpoint), pruned)
    kept = {name: tensor != 0 for name, tensor in pruned.state_dict().items() if "weight" in name}
    assert sum(int(mask.sum()) for mask in kept.values()) == 6
    for name, mask in kept.items():
        assert torch.equal(pruned.state_dict()[name][mask], weights[name][mask])
    torch.save(trained(5), tmp_path / "w.pt")
    with pytest.raises(SpecError, match="the task 'my_task.py' is not what the study 'mine' began with"):
        study.run(LocalPool())


def test_a_builtin_task_starts_from_a_file_too(tmp_path: Path) -> None:
    torch.save({}, tmp_path / "empty.pt")
    study = Study(spec(task="digits", checkpoint="empty.pt"), tmp_path / "store", root=tmp_path)
    with pytest.raises(TaskError) as caught:
        study.check()
    assert str(caught.value) == "task 'digits': checkpoint 'empty.pt' does not fit the model: it lacks 'fc1.weight'"


def test_a_study_s_checkpoint_has_a_known_ending_and_leaves_old_digests_alone() -> None:
    with pytest.raises(SpecError) as caught:
        spec(checkpoint="weights.ckpt")
    assert str(caught.value) == "checkpoint: 'weights.ckpt' must end in .safetensors, .pt, .pth or .bin"
    assert spec().digest() == spec(checkpoint="").digest() != spec(checkpoint="w.pt").digest()
    assert StudySpec.parse(spec(checkpoint="w.pt").to_toml()) == spec(checkpoint="w.pt")

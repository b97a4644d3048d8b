"""A graph computes what its model does for any number of rows, and a file of it holds nothing that runs."""

from __future__ import annotations

import io
import json
import pickle
import zipfile
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from orchestrator.errors import InputError
from orchestrator.export import ExportRefused, onnx, pt2
from orchestrator.tasks.data import call
from orchestrator.tasks.models import mlp


class Net(nn.Module):
    """One linear layer and a function of (layer, inputs) as the forward pass."""

    def __init__(self, function: Callable[..., Any]) -> None:
        super().__init__()
        self.fc = nn.Linear(3, 2)
        self.function = function

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        return self.function(self.fc, *args, **kwargs)


class Named(nn.Module):
    """Takes two tensors by name, one of which may be missing, and gives two."""

    def __init__(self) -> None:
        super().__init__()
        self.fc = nn.Linear(3, 2)

    def forward(self, tokens: Tensor, mask: Tensor | None = None) -> dict[str, Tensor]:
        scores = self.fc(tokens)
        return {"scores": scores if mask is None else scores * mask, "sums": tokens.sum(1)}


class Answer:
    """What Hugging Face's models return."""

    def __init__(self, logits: Tensor) -> None:
        self.logits = logits


def rows(count: int, width: int = 3) -> Tensor:
    return torch.randn(count, width, generator=torch.Generator().manual_seed(0))


@pytest.fixture(scope="module")
def archive() -> bytes:
    """The file of a small network."""
    torch.manual_seed(0)
    return pt2.to_bytes(pt2.export(mlp(3, 4, 2).eval(), rows(3)))


def test_any_number_of_rows_goes_through_the_graph(archive: bytes) -> None:
    torch.manual_seed(0)
    model, graph = mlp(3, 4, 2), pt2.from_bytes(archive)
    for count in (1, 2, 5):
        assert torch.equal(graph(rows(count)), model(rows(count)))


def test_inputs_go_by_name_and_outputs_keep_their_form() -> None:
    given = {"mask": rows(3, 1), "tokens": rows(3)}
    model = Named().eval()
    exported = pt2.export(model, given)
    assert exported.rows is None
    found, expected = pt2.from_bytes(pt2.to_bytes(exported))(**given), model(**given)
    assert list(found) == list(expected)
    assert all(torch.equal(found[name], expected[name]) for name in expected)


def test_of_an_object_with_logits_the_graph_gives_the_logits() -> None:
    model = Net(lambda fc, x: Answer(fc(x))).eval()
    graph = pt2.from_bytes(pt2.to_bytes(pt2.export(model, rows(3))))
    assert torch.equal(graph(rows(2)), call(model, rows(2)))


class Answering(nn.Module):
    """Takes two tensors by name, and returns an object."""

    def __init__(self) -> None:
        super().__init__()
        self.fc = nn.Linear(3, 2)

    def forward(self, tokens: Tensor, mask: Tensor) -> Answer:
        return Answer(self.fc(tokens) * mask)


def test_such_a_model_takes_inputs_by_name_and_any_number_of_rows() -> None:
    model = Answering().eval()
    exported = pt2.export(model, {"mask": rows(3, 1), "tokens": rows(3)})
    assert exported.rows is None
    graph = pt2.from_bytes(pt2.to_bytes(exported))
    given = {"tokens": rows(5), "mask": rows(5, 1)}
    assert torch.equal(graph(**given), call(model, given))


@pytest.mark.parametrize(
    "function",
    [
        lambda fc, x: fc(x).reshape(1, 2),
        lambda fc, x: fc(x) if len(x) == 1 else fc(x) + 1,  # the trace sees only several rows
    ],
)
def test_a_model_that_minds_the_number_of_rows_is_for_one(function: Callable[..., Tensor]) -> None:
    exported = pt2.export(Net(function).eval(), rows(3))
    assert exported.rows == 1 and exported.reason
    graph = pt2.from_bytes(pt2.to_bytes(exported))
    assert graph(rows(1)).shape == (1, 2)


def test_a_model_that_cannot_be_traced_says_why() -> None:
    with pytest.raises(ExportRefused, match=r"torch.export cannot trace the model: GuardOnDataDependent"):
        pt2.export(Net(lambda fc, x: fc(x) if float(x.sum()) > 0 else -fc(x)).eval(), rows(3))


def test_the_model_stays_as_it_was() -> None:
    model = nn.LSTM(3, 4, batch_first=True).eval()
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    inputs = rows(6).reshape(3, 2, 3)
    expected = model(inputs)[0]
    pt2.export(Net(lambda _, x: model(x)[0]).eval(), inputs)
    assert torch.equal(model(inputs)[0], expected)
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())


def test_a_graph_is_for_evaluation(archive: bytes) -> None:
    graph = pt2.from_bytes(archive)
    assert not graph.training and graph.eval() is graph
    with pytest.raises(InputError, match="cannot be trained"):
        graph.train()


# What is in the file.


class Bomb:
    """Ends the test when somebody unpickles it."""

    def __reduce__(self) -> tuple[Any, ...]:
        return pytest.fail, ("it was unpickled",)


def changed(archive: bytes, member: str, change: Callable[[bytes], bytes]) -> bytes:
    """The archive with one member changed or added."""
    buffer = io.BytesIO()
    with zipfile.ZipFile(io.BytesIO(archive)) as old, zipfile.ZipFile(buffer, "w") as new:
        names = old.namelist()
        top = names[0].partition("/")[0]
        for name in dict.fromkeys([*names, f"{top}/{member}"]):
            content = old.read(name) if name in names else b""
            new.writestr(name, change(content) if name == f"{top}/{member}" else content)
    return buffer.getvalue()


def in_graph(archive: bytes, before: str, after: str) -> bytes:
    def change(content: bytes) -> bytes:
        assert before.encode() in content
        return content.replace(before.encode(), after.encode())

    return changed(archive, "models/model.json", change)


def test_the_file_holds_no_pickle(archive: bytes) -> None:
    with zipfile.ZipFile(io.BytesIO(archive)) as members:
        (samples,) = [info for info in members.infolist() if "sample_inputs" in info.filename]
        assert samples.file_size == 0
        assert not any(members.read(name)[:2] == b"\x80\x02" for name in members.namelist())


def test_canary_torch_itself_would_have_unpickled_the_sample_inputs(archive: bytes) -> None:
    planted = changed(archive, "data/sample_inputs/model.pt", lambda _: pickle.dumps(Bomb()))
    with pytest.raises(BaseException, match="it was unpickled"):
        torch.export.load(io.BytesIO(planted))
    with pytest.raises(InputError, match=r"'data/sample_inputs/model.pt', which may run code"):
        pt2.from_bytes(planted)


@pytest.mark.parametrize(
    "member", ["data/constants/opaque_obj_0", "data/aotinductor/model/x.so", "data/weights/model.pt", "extra/../x.py"]
)
def test_members_that_may_run_code_are_refused(archive: bytes, member: str) -> None:
    with pytest.raises(InputError, match="may run code"):
        pt2.from_bytes(changed(archive, member, lambda _: b"x"))


def test_a_pickled_weight_is_refused(archive: bytes) -> None:
    def pickled(content: bytes) -> bytes:
        config = json.loads(content)
        next(iter(config["config"].values()))["use_pickle"] = True
        return json.dumps(config).encode()

    with pytest.raises(InputError, match="a pickled tensor"):
        pt2.from_bytes(changed(archive, "data/weights/model_weights_config.json", pickled))


@pytest.mark.parametrize(
    "expression",
    ["__import__('os').abort()", "eval(chr(49))", "Symbol('os.abort()')", "s.system", "(lambda: 1)()", "["],
)
def test_a_shape_that_is_more_than_arithmetic_is_refused(archive: bytes, expression: str) -> None:
    with zipfile.ZipFile(io.BytesIO(archive)) as members:
        graph = json.loads(members.read(next(name for name in members.namelist() if name.endswith("model.json"))))
    (symbol, *_) = {found for found in expressions(graph) if found.startswith("Symbol")}
    with pytest.raises(InputError, match="which is not read"):
        pt2.from_bytes(in_graph(archive, json.dumps(symbol), json.dumps(expression)))


@pytest.mark.parametrize("target", ["torch.os.abort", "torch.ops.load_library.x", "_operator.methodcaller", "#x"])
def test_a_call_that_is_no_tensor_operation_is_refused(archive: bytes, target: str) -> None:
    with pytest.raises(InputError, match="which is no operation on tensors"):
        pt2.from_bytes(in_graph(archive, '"torch.ops.aten.relu.default"', json.dumps(target)))


@pytest.mark.parametrize("content", [b"", b"PK", b"no archive at all"])
def test_what_is_no_archive_is_refused(content: bytes) -> None:
    with pytest.raises(InputError, match="no archive of torch.export"):
        pt2.from_bytes(content)


def expressions(document: Any) -> list[str]:
    """Every expression in which a shape is written."""
    if isinstance(document, list):
        return [found for part in document for found in expressions(part)]
    if isinstance(document, dict):
        own = [document["expr_str"]] if "expr_str" in document else []
        return own + [found for part in document.values() for found in expressions(part)]
    return []


# The same graphs as ONNX.


def test_onnx_runtime_computes_the_same() -> None:
    torch.manual_seed(0)
    model = mlp(3, 4, 2).eval()
    graph = onnx.from_bytes(onnx.to_bytes(pt2.export(model, rows(3))))
    for count in (1, 2, 5):
        assert torch.allclose(graph(rows(count)), model(rows(count)), atol=1e-6)
    with pytest.raises(InputError, match="cannot be trained"):
        graph.train()


def test_onnx_takes_inputs_by_name() -> None:
    given = {"mask": rows(3, 1), "tokens": rows(3)}
    model = Named().eval()
    graph = onnx.from_bytes(onnx.to_bytes(pt2.export(model, given)))
    expected = model(**given)
    for found in (graph(**given), graph(**dict(reversed(given.items())))):
        assert all(torch.allclose(one, other) for one, other in zip(found, expected.values(), strict=True))


def test_an_operation_that_onnx_has_not_is_named() -> None:
    model = Net(lambda fc, x: fc(x) + torch.linalg.eigvals(x[:, None] * x[:, :, None]).abs()[:, :2]).eval()
    exported = pt2.export(model, rows(3))
    with pytest.raises(ExportRefused, match=r"torch.onnx cannot write the model: .*linalg_eig"):
        onnx.to_bytes(exported)


def test_what_is_no_onnx_is_refused() -> None:
    with pytest.raises(InputError, match="ONNX Runtime cannot read the model"):
        onnx.from_bytes(b"no graph at all")


def test_missing_packages_are_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(onnx, "PACKAGES", ("onnx", "no_such_package"))
    with pytest.raises(InputError, match=r"ONNX needs no_such_package: pip install 'orchardist\[export\]'"):
        onnx.refuse_without_packages()

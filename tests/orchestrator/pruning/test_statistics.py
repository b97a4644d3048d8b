"""What criteria are handed, against autograd, finite differences and sums by hand."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from itertools import pairwise
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from orchestrator.errors import NotFinite, StageFailed
from orchestrator.pruning import statistics
from orchestrator.pruning.criteria import FROM_DATA, FROM_STATE, grasp, skeletonization, synflow
from orchestrator.pruning.statistics import STATISTICS, gather
from orchestrator.tasks import Task
from tests.contracts.registry import REGISTRY_CHECKS

Batch = tuple[Any, Any]


def drawn(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float64) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=dtype)


def linear(model: nn.Sequential, number: int) -> nn.Linear:
    layer = model[number]
    assert isinstance(layer, nn.Linear)
    return layer


def net(*widths: int, activation: type[nn.Module] = nn.Tanh, bias: bool = True) -> nn.Sequential:
    torch.manual_seed(0)
    layers: list[nn.Module] = []
    for inputs, outputs in pairwise(widths):
        layers += [nn.Linear(inputs, outputs, bias=bias), activation()]
    return nn.Sequential(*layers[:-1]).double()


def classes(rows: int, count: int) -> Tensor:
    return torch.arange(rows) % count


def gathered(
    what: str,
    model: nn.Module,
    batches: Sequence[Batch],
    names: Sequence[str] | None = None,
    *,
    loss: Callable[..., Tensor] = F.cross_entropy,
    step: Callable[..., Tensor] | None = None,
    seed: int = 0,
    example: Any = None,
    **parameters: Any,
) -> dict[str, Tensor]:
    task = Task(model=lambda: model, train=None, valid=None, loss=loss, step=step)
    names = [name for name, p in model.named_parameters() if p.dim() > 1] if names is None else names
    found = gather(what, model, task, batches, names, seed=seed, example=example, parameters=parameters)
    assert list(found) == list(names)
    assert not any(tensor.requires_grad for tensor in found.values())
    return found


@pytest.mark.parametrize("check", REGISTRY_CHECKS)
def test_contract(check: Any) -> None:
    check(STATISTICS)


def test_there_is_a_statistic_for_everything_that_is_gathered() -> None:
    assert STATISTICS.names == [*FROM_DATA, *FROM_STATE]


# Gradients


def test_the_gradient_is_that_of_the_mean_over_all_examples() -> None:
    model, inputs, targets = net(4, 5, 3), drawn(7, 4), classes(7, 3)
    F.cross_entropy(model(inputs), targets).backward()  # type: ignore[no-untyped-call]
    expected = {name: p.grad for name, p in model.named_parameters()}
    batches = [(inputs[:2], targets[:2]), (inputs[2:], targets[2:])]
    found = gathered("gradient", net(4, 5, 3), batches, list(expected))
    for name, slope in expected.items():
        assert slope is not None
        assert torch.allclose(found[name], slope, rtol=1e-12, atol=1e-15)


def test_the_gradient_leaves_nothing_on_the_model() -> None:
    model = net(4, 3)
    gathered("gradient", model, [(drawn(2, 4), classes(2, 3))])
    assert all(p.grad is None for p in model.parameters())


class Odd(nn.Module):
    """A frozen layer, one that takes no part, dropout, and a normalisation with statistics."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.frozen = nn.Linear(4, 4).requires_grad_(False)
        self.norm = nn.BatchNorm1d(4)
        self.drop = nn.Dropout(0.5)
        self.out = nn.Linear(4, 3)
        self.idle = nn.Linear(2, 2)

    def forward(self, x: Tensor) -> Tensor:
        return self.out(self.drop(self.norm(self.frozen(x))))  # type: ignore[no-any-return]


@pytest.mark.parametrize(
    "what", ["gradient", "hessian_diagonal", "hessian_gradient", "hessian_blocks", "synaptic_flow"]
)
def test_frozen_idle_and_random_parts(what: str) -> None:
    batches = [(drawn(6, 4, dtype=torch.float32), classes(6, 3))]
    first, second = (gathered(what, Odd(), batches, example=batches[0][0][:1]) for _ in range(2))
    assert all(torch.equal(first[name], second[name]) for name in first), "dropout drew"
    assert first["frozen.weight"].any()
    assert not first["idle.weight"].any()


def test_half_precision_is_summed_in_single() -> None:
    model = nn.Linear(1, 1, bias=False).bfloat16()
    nn.init.constant_(model.weight, 1.0)
    targets = [torch.full((1, 1), value, dtype=torch.bfloat16) for value in (-255.0, 0.0, 0.0, 0.0)]
    batches = [(torch.ones(1, 1, dtype=torch.bfloat16), target) for target in targets]
    found = gathered("gradient", model, batches, loss=F.mse_loss)["weight"]
    assert found.dtype == torch.float32
    assert found.item() == (2 * 256 + 3 * 2) / 4


def test_a_step_of_the_user_s_own_is_differentiated() -> None:
    model, batch = net(4, 3), (drawn(5, 4), classes(5, 3))
    step = lambda model, batch: 2 * F.cross_entropy(model(batch[0]), batch[1])  # noqa: E731
    for what in ("gradient", "hessian_diagonal", "hessian_gradient"):
        once, twice = (gathered(what, model, [batch], step=given)["0.weight"] for given in (None, step))
        assert torch.allclose(twice, once * (4 if what == "hessian_gradient" else 2))


@pytest.mark.parametrize(
    "what", sorted(FROM_DATA.keys() - {"input_norm", "input_gram", "activation", "hessian_blocks"})
)
def test_not_finite_is_refused(what: str) -> None:
    with pytest.raises(NotFinite, match=rf"^the {what} of '0.weight' holds NaN or infinite values$"):
        gathered(what, net(4, 3), [(drawn(2, 4) * math.inf, classes(2, 3))])


# Second derivatives


def whole_hessian(model: nn.Module, batch: Batch, name: str, loss: Callable[..., Tensor] = F.cross_entropy) -> Tensor:
    """By autograd: (n, n) over the entries of one parameter."""
    weight = model.get_parameter(name).detach()

    def of(flat: Tensor) -> Tensor:
        outputs = torch.func.functional_call(model, {name: flat.reshape(weight.shape)}, (batch[0],))
        return loss(outputs, batch[1])

    hessian: Callable[..., Any] = torch.autograd.functional.hessian
    return hessian(of, weight.reshape(-1))  # type: ignore[no-any-return]


class Quadratic(nn.Module):
    """½ Σ h·w²."""

    def __init__(self, curvature: Tensor) -> None:
        super().__init__()
        self.curvature = curvature
        self.weight = nn.Parameter(drawn(*curvature.shape))

    def forward(self, x: Tensor) -> Tensor:
        return (self.curvature * self.weight.square()).sum() / 2 * x.mean()


def test_one_probe_finds_a_diagonal_hessian() -> None:
    curvature = drawn(3, 4, seed=5)
    batches = [(torch.ones(size, 1).double(), torch.zeros(size)) for size in (1, 3)]
    found = gathered("hessian_diagonal", Quadratic(curvature), batches, loss=lambda out, _: out, probes=1)
    assert torch.allclose(found["weight"], curvature, rtol=1e-12)


def test_probes_find_the_diagonal() -> None:
    model, batch = net(4, 5, 3), (drawn(7, 4), classes(7, 3))
    found = gathered("hessian_diagonal", model, [batch], probes=2000)
    for name in ("0.weight", "2.weight"):
        expected = whole_hessian(model, batch, name).diagonal().reshape(found[name].shape)
        assert torch.allclose(found[name], expected, atol=0.02)


def test_probes_follow_from_the_seed() -> None:
    first, again, other = (
        gathered("hessian_diagonal", net(4, 5, 3), [(drawn(7, 4), classes(7, 3))], seed=seed)["0.weight"]
        for seed in (1, 1, 2)
    )
    assert torch.equal(first, again)
    assert not torch.equal(first, other)


def test_grasp_is_the_derivative_of_the_gradient_s_squared_norm() -> None:
    inputs, targets = drawn(9, 4), classes(9, 3)
    model = net(4, 5, 3)
    names = ["0.weight", "2.weight"]
    batches = [(inputs[:2], targets[:2]), (inputs[2:], targets[2:])]
    found = gathered("hessian_gradient", model, batches, names)
    weights = {name: model.get_parameter(name).detach().clone() for name in names}

    def squared_norm(changed: str, direction: Tensor) -> float:
        other = net(4, 5, 3)
        other.get_parameter(changed).data += direction
        slopes = torch.autograd.grad(F.cross_entropy(other(inputs), targets), [other.get_parameter(n) for n in names])
        return sum(float(slope.square().sum()) for slope in slopes)

    for name in names:
        score = grasp(weights[name], found[name])
        for place in ((0, 0), (1, 3), (2, 1)):
            step = torch.zeros_like(weights[name])
            step[place] = 1e-5 * weights[name][place]
            difference = (squared_norm(name, step) - squared_norm(name, -step)) / 2e-5
            assert float(2 * score[place]) == pytest.approx(difference, rel=1e-6)


def test_hessian_times_gradient_does_not_depend_on_the_batches() -> None:
    inputs, targets = drawn(9, 4), classes(9, 3)
    whole = gathered("hessian_gradient", net(4, 5, 3), [(inputs, targets)])
    cut = gathered("hessian_gradient", net(4, 5, 3), [(inputs[i : i + 4], targets[i : i + 4]) for i in (0, 4, 8)])
    assert all(torch.allclose(whole[name], cut[name], rtol=1e-10, atol=1e-14) for name in whole)


def test_gauss_newton_is_the_hessian_of_a_linear_regression() -> None:
    batch = drawn(8, 5), drawn(8, 2, seed=1)
    model = nn.Linear(5, 2).double()
    found = gathered(
        "hessian_blocks", model, [(batch[0][:3], batch[1][:3]), (batch[0][3:], batch[1][3:])], loss=F.mse_loss
    )
    assert torch.allclose(found["weight"][0], whole_hessian(model, batch, "weight", F.mse_loss), rtol=1e-10, atol=1e-14)


def test_gauss_newton_is_fisher_s_information_of_cross_entropy() -> None:
    model, inputs = net(4, 5, 3), drawn(6, 4)
    found = gathered("hessian_blocks", model, [(inputs, classes(6, 3))])["0.weight"]
    fisher = torch.zeros_like(found[0])
    for row in inputs:
        logs = F.log_softmax(model(row.unsqueeze(0)), dim=1)[0]
        for value in logs:
            (slope,) = torch.autograd.grad(value, model.get_parameter("0.weight"), retain_graph=True)
            fisher += value.detach().exp() * torch.outer(slope.reshape(-1), slope.reshape(-1))
    assert torch.allclose(found, fisher.unsqueeze(0) / len(inputs), rtol=1e-10, atol=1e-14)


def test_blocks_are_those_of_the_whole_filled_up_with_the_identity() -> None:
    batches = [(drawn(6, 4), classes(6, 3))]
    whole = gathered("hessian_blocks", net(4, 5, 3), batches)["0.weight"]
    blocks = gathered("hessian_blocks", net(4, 5, 3), batches, exact_up_to=19, block=8)["0.weight"]
    assert whole.shape == (1, 20, 20)
    assert blocks.shape == (3, 8, 8)
    for number in range(2):
        here = slice(8 * number, 8 * number + 8)
        assert torch.allclose(blocks[number], whole[0, here, here])
    assert torch.allclose(blocks[2, :4, :4], whole[0, 16:, 16:])
    assert torch.equal(blocks[2, 4:], torch.eye(8).double()[4:])
    assert torch.equal(blocks[2, :, 4:], torch.eye(8).double()[:, 4:])


def test_many_rows_of_the_jacobian_are_added_in_parts(monkeypatch: pytest.MonkeyPatch) -> None:
    batches = [(drawn(6, 4), classes(6, 3))]
    whole = gathered("hessian_blocks", net(4, 5, 3), batches)
    monkeypatch.setattr(statistics, "JACOBIAN_ROWS", 5)
    parts = gathered("hessian_blocks", net(4, 5, 3), batches)
    assert all(torch.allclose(whole[name], parts[name], rtol=1e-10, atol=1e-15) for name in whole)


def test_outputs_that_are_no_one_tensor_are_refused() -> None:
    class Two(nn.Linear):
        def forward(self, x: Tensor) -> Any:
            return {"a": super().forward(x)}

    batch = [(drawn(2, 4, dtype=torch.float32), classes(2, 3))]
    with pytest.raises(StageFailed, match=r"^hessian_blocks need outputs that are one tensor, not dict$"):
        gathered("hessian_blocks", Two(4, 3), batch, loss=lambda out, y: F.cross_entropy(out["a"], y))
    with pytest.raises(StageFailed, match="1025 outputs for one example, at most 1024"):
        gathered("hessian_blocks", nn.Linear(4, 1025), batch)
    with pytest.raises(StageFailed, match="a task's own `step` does not show"):
        gathered("hessian_blocks", nn.Linear(4, 3), batch, step=lambda model, batch: model(batch[0]).sum())


# Inputs and outputs of layers


def test_a_linear_layer_s_inputs_and_outputs() -> None:
    model, inputs = net(4, 5, 3), drawn(7, 4)
    batches = [(inputs[:2], classes(2, 3)), (inputs[2:], classes(5, 3))]
    hidden = torch.tanh(model[0](inputs)).detach()
    norms = gathered("input_norm", model, batches)
    assert torch.allclose(norms["0.weight"], inputs.norm(dim=0, keepdim=True))
    assert torch.allclose(norms["2.weight"], hidden.norm(dim=0, keepdim=True))
    grams = gathered("input_gram", model, batches)
    assert torch.allclose(grams["2.weight"], hidden.t() @ hidden / 7)
    means = gathered("activation", model, batches)
    assert torch.allclose(means["0.weight"], model[0](inputs).abs().mean(dim=0))
    assert torch.allclose(means["2.weight"], model(inputs).abs().mean(dim=0))


@pytest.mark.parametrize("shape", [(7, 4), (2, 3, 4), (2, 2, 3, 4)])
@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("turned", [True, False])
def test_every_position_of_a_sequence_counts(shape: tuple[int, ...], bias: bool, turned: bool) -> None:
    model, inputs = nn.Linear(4, 3, bias=bias).double(), drawn(*shape)
    inputs = inputs.transpose(0, -2).contiguous().transpose(0, -2) if turned else inputs
    rows = inputs.reshape(-1, 4)
    batches = [(inputs, None)]
    assert torch.allclose(gathered("input_norm", model, batches)["weight"], rows.norm(dim=0, keepdim=True))
    assert torch.allclose(gathered("input_gram", model, batches)["weight"], rows.t() @ rows / len(rows))
    assert torch.allclose(gathered("activation", model, batches)["weight"], model(rows).abs().mean(dim=0))


@pytest.mark.parametrize(
    ("convolution", "shape"),
    [
        (nn.Conv1d(4, 6, 3, stride=2, padding=1, dilation=2), (5, 4, 11)),
        (nn.Conv2d(4, 6, (3, 2), stride=(1, 2), padding=(2, 0)), (3, 4, 6, 7)),
        (nn.Conv2d(4, 6, 3, padding="same", padding_mode="reflect", bias=False), (3, 4, 6, 7)),
        (nn.Conv2d(4, 6, (2, 3), padding="same"), (3, 4, 6, 7)),
        (nn.Conv2d(4, 6, 3, groups=2), (3, 4, 6, 7)),
        (nn.Conv2d(4, 4, 3, groups=4, padding=1), (3, 4, 6, 7)),
        (nn.Conv3d(2, 3, 2, stride=2), (2, 2, 4, 5, 4)),
    ],
)
def test_a_convolution_is_the_linear_layer_on_its_windows(
    convolution: nn.Conv2d, shape: tuple[int, ...], monkeypatch: pytest.MonkeyPatch
) -> None:
    # Errors of a changed weight, as Gram matrix and norms foretell them, are those that the convolution makes.
    model, inputs = convolution.double(), drawn(*shape)
    batches = [(inputs[:1], None), (inputs[1:], None)]
    monkeypatch.setattr(statistics, "PATCHES", 100)
    grams, norms = (gathered(what, model, batches)["weight"] for what in ("input_gram", "input_norm"))
    change = drawn(*model.weight.shape, seed=3)
    before, bias = model(inputs).detach(), model.bias
    places = before.numel() // before.shape[1]
    model.weight.data += change
    true = (model(inputs) - before).square().transpose(0, 1).flatten(1).sum(dim=1)
    rows = change.flatten(1).reshape(
        -1, model.out_channels // (len(grams) if grams.dim() == 3 else 1), change[0].numel()
    )
    told = torch.einsum("gri,gij,grj->gr", rows, grams.reshape(-1, *grams.shape[-2:]), rows).reshape(-1) * places
    assert torch.allclose(told, true)
    assert norms.shape == (1 if model.groups == 1 else model.out_channels, *change.shape[1:])
    diagonal = grams.diagonal(dim1=-2, dim2=-1).reshape(-1, *change.shape[1:]) * places
    each = model.out_channels // len(diagonal) if model.groups > 1 else 1
    assert torch.allclose(norms.square(), diagonal.repeat_interleave(each, dim=0))
    model.weight.data -= change
    expected = before.abs().transpose(0, 1).flatten(1).mean(dim=1)
    assert bias is None or bias.any()
    assert torch.allclose(gathered("activation", model, batches)["weight"], expected)


class Attention(nn.Module):
    def __init__(self, **given: Any) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.attention = nn.MultiheadAttention(4, 2, **given)
        nn.init.normal_(self.attention.in_proj_bias)

    def forward(self, query: Tensor, memory: Tensor) -> Tensor:
        return self.attention(query, memory, memory)[0]  # type: ignore[no-any-return]


@pytest.mark.parametrize("batch_first", [True, False])
def test_attention_reads_queries_keys_and_values(batch_first: bool) -> None:
    model = Attention(batch_first=batch_first).double()
    query, memory = drawn(2, 3, 4), drawn(2, 3, 4, seed=1)
    batches = [((query, memory), None)]
    weight, bias = model.attention.in_proj_weight, model.attention.in_proj_bias
    norms = gathered("input_norm", model, batches)
    expected = [x.reshape(-1, 4).norm(dim=0).expand(4, 4) for x in (query, memory, memory)]
    assert torch.allclose(norms["attention.in_proj_weight"], torch.cat(expected))
    grams = gathered("input_gram", model, batches)["attention.in_proj_weight"]
    assert torch.allclose(
        grams, torch.stack([x.reshape(-1, 4).t() @ x.reshape(-1, 4) / 6 for x in (query, memory, memory)])
    )
    outputs = [
        F.linear(x, w, b).abs().mean(dim=(0, 1))
        for x, w, b in zip((query, memory, memory), weight.chunk(3), bias.chunk(3), strict=True)
    ]
    found = gathered("activation", model, batches)
    assert torch.allclose(found["attention.in_proj_weight"], torch.cat(outputs))
    assert torch.allclose(found["attention.out_proj.weight"], model(query, memory).abs().mean(dim=(0, 1)))


def test_self_attention_reads_one_input() -> None:
    class Own(Attention):
        def forward(self, query: Tensor, memory: Tensor | None = None) -> Tensor:
            return self.attention(query, query, query)[0]  # type: ignore[no-any-return]

    model, inputs = Own(batch_first=True).double(), drawn(2, 3, 4)
    found = gathered("input_norm", model, [(inputs, None)])["attention.in_proj_weight"]
    assert torch.allclose(found, inputs.reshape(-1, 4).norm(dim=0, keepdim=True))


def test_separate_projections_read_their_own_inputs() -> None:
    model = Attention(kdim=3, vdim=3, batch_first=True).double()
    query, memory = drawn(2, 3, 4), drawn(2, 3, 3, seed=1)
    found = gathered("activation", model, [((query, memory), None)])
    attention = model.attention
    keys, values = attention.in_proj_bias.chunk(3)[1:]
    for name, bias in (("k_proj_weight", keys), ("v_proj_weight", values)):
        expected = F.linear(memory, getattr(attention, name), bias).abs().mean(dim=(0, 1))
        assert torch.allclose(found[f"attention.{name}"], expected)


@pytest.mark.parametrize("what", [*FROM_DATA, "synaptic_flow"])
def test_a_transformer_layer_has_every_statistic(what: str) -> None:
    torch.manual_seed(0)
    layer = nn.TransformerEncoderLayer(4, 2, 6, batch_first=True)
    model = nn.Sequential(layer, nn.Flatten(), nn.Linear(12, 3)).double()
    names = [name for name, p in model.named_parameters() if p.dim() > 1]
    found = gathered(
        what, model, [(drawn(5, 3, 4), classes(5, 3))], names, example=drawn(1, 3, 4), block=16, exact_up_to=30
    )
    assert all(tensor.any() for tensor in found.values())


@pytest.mark.parametrize("what", ["gradient", "hessian_diagonal", "hessian_gradient", "input_gram", "activation"])
def test_a_recurrent_layer_has_its_statistics(what: str) -> None:
    class Last(nn.LSTM):
        def forward(self, x: Tensor) -> Tensor:  # type: ignore[override]
            return super().forward(x)[0][:, -1]

    torch.manual_seed(0)
    model = Last(4, 3, batch_first=True).double()
    names = ["weight_ih_l0", "weight_hh_l0"]
    found = gathered(what, model, [(drawn(5, 3, 4), classes(5, 3))], names)
    assert all(tensor.any() for tensor in found.values())


def test_a_layer_that_is_used_twice_sees_both_inputs() -> None:
    class Twice(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.fc = nn.Linear(4, 4)

        def forward(self, x: Tensor) -> Tensor:
            return self.fc(self.fc(x))  # type: ignore[no-any-return]

    model, inputs = Twice().double(), drawn(5, 4)
    both = torch.cat([inputs, model.fc(inputs)])
    found = gathered("input_gram", model, [(inputs, None)])["fc.weight"]
    assert torch.allclose(found, both.t() @ both / 10)


def test_a_head_that_is_tied_to_an_embedding_is_seen_as_the_head() -> None:
    class Tied(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.embed = nn.Embedding(6, 4)
            self.head = nn.Linear(4, 6, bias=False)
            self.head.weight = self.embed.weight

        def forward(self, x: Tensor) -> Tensor:
            return self.head(self.embed(x).tanh())  # type: ignore[no-any-return]

    model, tokens = Tied().double(), torch.tensor([[0, 2], [5, 2]])
    rows = model.embed(tokens).tanh().reshape(-1, 4)
    found = gathered("input_norm", model, [(tokens, None)], ["embed.weight"])["embed.weight"]
    assert torch.allclose(found, rows.norm(dim=0, keepdim=True))
    assert gathered("synaptic_flow", model, [], ["embed.weight"], example=tokens)["embed.weight"].any()


def test_a_step_of_the_user_s_own_shows_the_inputs() -> None:
    model, inputs = nn.Linear(4, 3).double(), drawn(5, 4)
    found = gathered("input_norm", model, [(inputs, None)], step=lambda model, batch: model(2 * batch[0]).sum())
    assert torch.allclose(found["weight"], 2 * inputs.norm(dim=0, keepdim=True))


class Table(nn.Module):
    """A weight that multiplies no input as a layer does."""

    def __init__(self, use: Callable[[Tensor, Tensor], Tensor]) -> None:
        super().__init__()
        self.weight = nn.Parameter(drawn(3, 4))
        self.use = use

    def forward(self, x: Tensor) -> Tensor:
        return self.use(x, self.weight)


@pytest.mark.parametrize("what", ["input_norm", "input_gram", "activation"])
@pytest.mark.parametrize(
    "use",
    [
        lambda x, w: x * w,
        lambda x, w: w @ x.t(),
        lambda x, w: x[:, :3] @ w,
        lambda x, w: F.linear(x, w[:2]),
        lambda x, w: F.linear(x[:, 1:], w[:, 1:]),
        lambda x, w: F.linear(x, 2 * w),
        lambda x, w: F.conv_transpose1d(x[:, :3].unsqueeze(2), w.unsqueeze(2)),
    ],
)
def test_what_cannot_be_observed_is_refused(what: str, use: Callable[[Tensor, Tensor], Tensor]) -> None:
    with pytest.raises(
        StageFailed,
        match=rf"^there is no {what} of 'weight': .* can be observed; name what cannot be scored in prune.ignore$",
    ):
        gathered(what, Table(use), [(drawn(3, 4), None)])


# Synaptic flow


def flows(model: nn.Module, example: Any) -> dict[str, Tensor]:
    """SynFlow's scores."""
    weights = {name: p.detach().clone() for name, p in model.named_parameters()}
    found = gathered("synaptic_flow", model, [], list(weights), example=example)
    return {name: synflow(weights[name], flow) for name, flow in found.items()}


def test_synaptic_flow_is_conserved() -> None:
    scores = [*flows(net(8, 6, 5, 3, activation=nn.ReLU, bias=False), drawn(1, 8)).values()]
    ones = torch.ones(1, 8).double()
    total = float(net(8, 6, 5, 3, activation=nn.ReLU, bias=False).apply(made_absolute)(ones).detach().sum())
    assert [float(score.sum()) for score in scores] == pytest.approx([total] * 3, rel=1e-10)
    for made, read in pairwise(scores):
        assert torch.allclose(made.sum(dim=1), read.sum(dim=0), rtol=1e-10, atol=0)


def made_absolute(module: nn.Module) -> None:
    for parameter in module.parameters(recurse=False):
        parameter.data.abs_()


def test_biases_carry_flow_into_a_unit() -> None:
    scores = flows(net(8, 6, 3, activation=nn.ReLU), drawn(1, 8))
    into = scores["0.weight"].sum(dim=1) + scores["0.bias"]
    assert torch.allclose(into, scores["2.weight"].sum(dim=0), rtol=1e-10, atol=0)


def test_synaptic_flow_of_single_precision_is_taken_in_double() -> None:
    model = net(8, 6, 3, activation=nn.ReLU, bias=False).float()
    found = flows(model, drawn(1, 8, dtype=torch.float32))
    assert all(score.dtype == torch.float64 for score in found.values())
    assert float(found["0.weight"].sum()) == pytest.approx(float(found["2.weight"].sum()), rel=1e-10)


def test_buffers_are_made_absolute_but_for_infinite_masks() -> None:
    class Masked(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.fc = nn.Linear(4, 4, bias=False)
            self.register_buffer("scale", -torch.ones(4))
            self.register_buffer("causal", torch.tensor([0.0, -math.inf, 0.0, -math.inf]))

        def forward(self, x: Tensor) -> Tensor:
            return self.fc(x) * self.scale * (self.fc(x) + self.causal).softmax(dim=1)  # type: ignore[no-any-return]

    found = flows(Masked(), torch.ones(1, 4))["fc.weight"]
    assert torch.isfinite(found).all()
    assert found.sum() > 0


def test_inputs_of_any_kind_become_ones() -> None:
    class Named(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.fc = nn.Linear(4, 3, bias=False)

        def forward(self, x: Tensor, keep: Tensor) -> Any:
            return SimpleNamespace(logits=self.fc(x) * keep)

    example = {"x": drawn(1, 4), "keep": torch.tensor([[1, 0, 1]])}
    found = flows(Named().double(), example)["fc.weight"]
    assert (found.sum(dim=1) > 0).tolist() == [True, False, True]


def test_tokens_enter_as_ones_behind_the_embedding() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Embedding(9, 4), nn.Flatten(), nn.Linear(8, 3, bias=False)).double()
    shape = linear(model, 2).weight.shape
    found = gathered("synaptic_flow", model, [], ["2.weight"], example=torch.tensor([[1, 7]]))["2.weight"]
    assert torch.equal(found, torch.ones(shape).double())
    with pytest.raises(
        StageFailed,
        match=r"^there is no synaptic flow of '0.weight': SynFlow's ones enter .*; name what cannot be scored in prune",
    ):
        gathered("synaptic_flow", model, [], ["0.weight"], example=torch.tensor([[1, 7]]))


def test_tokens_without_an_embedding_are_refused() -> None:
    class Counts(nn.Linear):
        def forward(self, x: Tensor) -> Tensor:
            return super().forward(x.to(self.weight.dtype))

    with pytest.raises(StageFailed, match=r"^SynFlow needs an input of ones: .* has no nn.Embedding$"):
        gathered("synaptic_flow", Counts(2, 2), [], example=torch.tensor([[1, 7]]))


def test_a_model_that_insists_on_single_precision_is_refused() -> None:
    class Single(nn.Linear):
        def forward(self, x: Tensor) -> Tensor:
            return super().forward(x.float())

    with pytest.raises(
        StageFailed, match=r"^SynFlow runs the model in double precision on ones, which it cannot take: "
    ):
        gathered("synaptic_flow", Single(2, 2), [], example=torch.ones(1, 2))


# The scale of a normalisation


def normalised(**given: Any) -> nn.Sequential:
    model = nn.Sequential(
        nn.Conv2d(1, 3, 3), nn.BatchNorm2d(3, **given), nn.ReLU(), nn.Flatten(), nn.Linear(12, 2), nn.BatchNorm1d(2)
    )
    for number, norm in enumerate(module for module in model if isinstance(module, (nn.BatchNorm1d, nn.BatchNorm2d))):
        if norm.affine:
            nn.init.constant_(norm.weight, number - 2.0)
    return model


def test_the_scale_is_that_of_the_norm_behind_the_layer() -> None:
    found = gathered("batchnorm_scale", normalised(), [], ["0.weight", "4.weight"], example=torch.ones(1, 1, 4, 4))
    assert found["0.weight"].tolist() == [-2.0] * 3
    assert found["4.weight"].tolist() == [-1.0] * 2


def test_layers_without_a_norm_right_behind_them_are_named() -> None:
    model = nn.Sequential(
        nn.Linear(4, 3), nn.BatchNorm1d(3), nn.Linear(3, 3), nn.ReLU(), nn.BatchNorm1d(3), nn.Linear(3, 2)
    )
    with pytest.raises(StageFailed) as caught:
        gathered("batchnorm_scale", model, [], ["0.weight", "2.weight", "5.weight"], example=torch.ones(1, 4))
    said = "there is no BatchNorm scale of '2.weight', '5.weight': no BatchNorm with a scale reads the layer's output"
    assert str(caught.value) == f"{said} directly; name what cannot be scored in prune.ignore"
    with pytest.raises(StageFailed, match="of '0.weight'"):
        gathered("batchnorm_scale", normalised(affine=False), [], ["0.weight"], example=torch.ones(1, 1, 4, 4))


def test_a_norm_over_a_sequence_s_places_is_not_the_layer_s() -> None:
    model = nn.Sequential(nn.Linear(4, 3), nn.BatchNorm1d(3))
    with pytest.raises(StageFailed, match="of '0.weight'"):
        gathered("batchnorm_scale", model, [], ["0.weight"], example=torch.ones(1, 3, 4))


# From data to scores


def test_relevance_foretells_the_loss_without_a_unit() -> None:
    """Skeletonization's promise, end to end: halving a unit's outgoing weights costs half its relevance, to first order."""
    model, batch = net(4, 5, 3), (drawn(7, 4), classes(7, 3))
    slope = gathered("gradient", model, [batch])["2.weight"]
    relevance = skeletonization(linear(model, 2).weight.detach(), slope).sum(dim=0)
    before = F.cross_entropy(model(batch[0]), batch[1]).item()
    for unit in range(5):
        changed = net(4, 5, 3)
        linear(changed, 2).weight.data[:, unit] *= 1 - 1e-6
        after = F.cross_entropy(changed(batch[0]), batch[1]).item()
        assert (after - before) / 1e-6 == pytest.approx(float(relevance[unit]), abs=1e-6)

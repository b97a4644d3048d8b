"""Attention heads: which there are, and attention that is left with fewer of them.

A head owns its rows of the query, key and value projections, with their biases, and its columns of the output
projection. Masked, its values are zero, so that whatever its scores are it adds nothing. The width of what goes in and
comes out stays as it is.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from orchestrator.pruning.coupling import Found
from orchestrator.pruning.refits import REFITS, refit
from orchestrator.pruning.structure import Slice, Units

HEADS = ("num_heads", "n_heads", "n_head", "nhead", "num_attention_heads", "heads")
"""What attentions written by hand call the number of their heads."""
PROJECTIONS = ("q_proj_weight", "k_proj_weight", "v_proj_weight")


def find_heads(model: nn.Module, prunable: Collection[str]) -> Found:
    """The heads of every `nn.MultiheadAttention` of which a projection is prunable.

    Args:
        model: is only looked at.
        prunable: the names of the tensors whose weights may be pruned; a tied one's first name.
    """
    names = {id(parameter): name for name, parameter in model.named_parameters()}
    units: list[Units] = []
    refused: dict[str, str] = {}
    for module in model.modules():
        if not isinstance(module, nn.MultiheadAttention):
            continue
        local = "in_proj_weight" if module._qkv_same_embed_dim else PROJECTIONS[0]
        projections = (local,) if module._qkv_same_embed_dim else PROJECTIONS
        if not any(names[id(getattr(module, name))] in prunable for name in projections):
            continue
        label = names[id(getattr(module, local))]
        why = _why_not(model, module)
        if why is None:
            units.append(Units(name=label, count=module.num_heads, slices=_slices(module, names)))
        else:
            refused[label] = why
    return Found(units=tuple(units), refused={**refused, **_by_hand(model, names)})


class NarrowAttention(nn.Module):
    """Called as `nn.MultiheadAttention` is, and answers as it does, with any number of heads, none included.

    Tensors keep their names: `in_proj_weight` (3 · heads · head_dim, width), or `q_proj_weight` and so on where keys
    or values have another width, `in_proj_bias`, and `out_proj` from heads · head_dim to the width. Weights that are
    asked for are of the heads that are left; so must be a mask that has an entry for each head.
    """

    batch_first: bool
    in_proj_weight: nn.Parameter | None
    q_proj_weight: nn.Parameter | None
    k_proj_weight: nn.Parameter | None
    v_proj_weight: nn.Parameter | None
    in_proj_bias: nn.Parameter | None

    _qkv_same_embed_dim = False
    """TransformerEncoderLayer reads this: its fast path is for heads that fill the width."""

    def __init__(self, whole: nn.MultiheadAttention, tensors: Mapping[str, Tensor]) -> None:
        super().__init__()
        for name in ("in_proj_weight", *PROJECTIONS, "in_proj_bias"):
            before = getattr(whole, name)
            after = None if before is None else nn.Parameter(tensors[name], requires_grad=before.requires_grad)
            self.register_parameter(name, after)
        self.out_proj = whole.out_proj
        self.embed_dim, inner = whole.out_proj.weight.shape
        self.head_dim = whole.head_dim
        self.num_heads = inner // whole.head_dim
        self.dropout = whole.dropout
        self.batch_first = whole.batch_first
        self.train(whole.training)
        rows = {name: len(parameter) for name, parameter in self.named_parameters(recurse=False)}
        expected = {name: inner if name in PROJECTIONS else 3 * inner for name in rows}
        if rows != expected or inner % whole.head_dim:
            raise ValueError(f"the projections have {rows} rows, the output projection {inner} columns")

    def forward(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        key_padding_mask: Tensor | None = None,
        need_weights: bool = True,
        attn_mask: Tensor | None = None,
        average_attn_weights: bool = True,
        is_causal: bool = False,
    ) -> tuple[Tensor, Tensor | None]:
        """Shapes and meanings as for `nn.MultiheadAttention`: (output, weights or None).

        Raises:
            ValueError: `is_causal` without the mask that it speaks of, or a mask for another number of heads.
        """
        alike = query is key and key is value
        if is_causal and attn_mask is None:
            raise ValueError("is_causal says that attn_mask is causal: give attn_mask, too")
        if query.is_nested:
            assert query is key and key is value and attn_mask is None and key_padding_mask is None
            return self._of_nested(query), None
        batched = query.dim() == 3
        if not batched:
            query, key, value = (given.unsqueeze(0) for given in (query, key, value))
            key_padding_mask = None if key_padding_mask is None else key_padding_mask.unsqueeze(0)
        elif not self.batch_first:
            query, key, value = (given.transpose(0, 1) for given in (query, key, value))
        q, k, v = self._projected_at_once(query) if alike else self._projected(query, key, value)
        if is_causal and key_padding_mask is None and not need_weights:
            mask = None
        else:
            is_causal, mask = False, self._mask(attn_mask, key_padding_mask, q)
        dropout = self.dropout if self.training else 0.0
        weights = None
        if need_weights:
            scores = q * self.head_dim**-0.5 @ k.transpose(-2, -1)
            weights = F.dropout((scores if mask is None else scores + mask).softmax(-1), dropout)
            heads = weights @ v
            weights = weights.sum(1) / max(1, self.num_heads) if average_attn_weights else weights
        elif self.num_heads:
            heads = F.scaled_dot_product_attention(q, k, v, mask, dropout, is_causal)
        else:
            heads = q
        output: Tensor = self.out_proj(heads.transpose(1, 2).flatten(2))
        if not batched:
            return output.squeeze(0), None if weights is None else weights.squeeze(0)
        return output if self.batch_first else output.transpose(0, 1), weights

    def _projected_at_once(self, given: Tensor) -> Sequence[Tensor]:
        """Queries, keys and values of one tensor, by one product where there is one weight."""
        if self.in_proj_weight is None or not self.num_heads:
            return self._projected(given, given, given)
        rows = F.linear(given, self.in_proj_weight, self.in_proj_bias)
        return rows.view(*rows.shape[:2], 3, self.num_heads, self.head_dim).permute(2, 0, 3, 1, 4).unbind()

    def _projected(self, *given: Tensor) -> Sequence[Tensor]:
        """Queries, keys and values: each (batch, heads, length, head_dim)."""
        if self.in_proj_weight is not None:
            weights = self.in_proj_weight.chunk(3) if self.num_heads else [self.in_proj_weight] * 3
        else:
            weights = [getattr(self, name) for name in PROJECTIONS]
        biases: list[Tensor | None] = [None] * 3
        if self.in_proj_bias is not None:
            biases = list(self.in_proj_bias.chunk(3)) if self.num_heads else [self.in_proj_bias] * 3
        rows = (F.linear(*each) for each in zip(given, weights, biases, strict=True))
        return [row.view(*row.shape[:2], self.num_heads, self.head_dim).transpose(1, 2) for row in rows]

    def _mask(self, of_pairs: Tensor | None, of_keys: Tensor | None, q: Tensor) -> Tensor | None:
        """What is added to the scores, to be broadcast to (batch, heads, queries, keys)."""
        batch = q.shape[0]
        if of_pairs is not None and of_pairs.dim() == 3:
            if of_pairs.shape[0] != batch * self.num_heads:
                said = f"attn_mask has {of_pairs.shape[0]} rows for {batch} examples"
                raise ValueError(f"{said}: this attention has {self.num_heads} heads left")
            of_pairs = of_pairs.view(batch, self.num_heads, *of_pairs.shape[1:])
        parts = [of_pairs, None if of_keys is None else of_keys[:, None, None, :]]
        masks = [_added(part, q.dtype) for part in parts if part is not None]
        return sum(masks[1:], masks[0]) if masks else None

    def _of_nested(self, given: Tensor) -> Tensor:
        """Attention within each of several sequences of unlike lengths, as TransformerEncoder hands them over."""
        parts = given.unbind()
        padded = torch.nn.utils.rnn.pad_sequence(list(parts), batch_first=True)
        lengths = torch.tensor([len(part) for part in parts], device=padded.device)
        absent = torch.arange(padded.shape[1], device=padded.device) >= lengths[:, None]
        q, k, v = self._projected_at_once(padded)
        heads = F.scaled_dot_product_attention(q, k, v, self._mask(None, absent, q)) if self.num_heads else q
        output = self.out_proj(heads.transpose(1, 2).flatten(2))
        return torch._nested_tensor_from_mask(output, ~absent, mask_check=False)

    def extra_repr(self) -> str:
        return f"{self.num_heads} heads of {self.head_dim}"


@refit(nn.MultiheadAttention)
def attention(module: nn.Module, tensors: Mapping[str, Tensor]) -> nn.Module:
    """Projections (3 · heads · head_dim, width), or one of (heads · head_dim, width) each, and their bias."""
    assert isinstance(module, nn.MultiheadAttention)
    return NarrowAttention(module, tensors)


def _by_hand(model: nn.Module, names: Mapping[int, str]) -> dict[str, str]:
    """What looks like an attention of the user's own, by its first projection's weight."""
    found = {}
    for path, module in model.named_modules():
        heads = next((getattr(module, name) for name in HEADS if hasattr(module, name)), None)
        layers = [child for child in module.children() if isinstance(child, nn.Linear)]
        torchs = isinstance(module, (nn.MultiheadAttention, NarrowAttention))
        if isinstance(heads, int) and heads > 1 and layers and not torchs:
            label = names.get(id(layers[0].weight), path)
            found[label] = f"the {type(module).__name__} {path!r} is no nn.MultiheadAttention, whose heads are known"
    return found


def _why_not(model: nn.Module, module: nn.MultiheadAttention) -> str | None:
    if type(module) is not nn.MultiheadAttention:
        return f"a {type(module).__name__} may do with its heads what nn.MultiheadAttention does not"
    if module.bias_k is not None:
        return "every head has a learned key and value (add_bias_kv)"
    if module.add_zero_attn:
        return "every head has a zero key and value (add_zero_attn)"
    if type(module.out_proj) not in REFITS:
        return f"its output projection is a {type(module.out_proj).__name__}"
    if module.num_heads == 1:
        return "it has a single head"
    own = {id(parameter) for parameter in module.parameters()}
    for path, other in model.named_modules():
        if other is not module and other is not module.out_proj:
            shared = [name for name, value in other.named_parameters(recurse=False) if id(value) in own]
            if shared:
                return f"it shares {path}.{shared[0]} with another layer"
    return None


def _slices(module: nn.MultiheadAttention, names: Mapping[int, str]) -> tuple[Slice, ...]:
    owner = torch.arange(module.num_heads).repeat_interleave(module.head_dim)
    slices = []
    for local in ("in_proj_weight", *PROJECTIONS, "in_proj_bias"):
        tensor = getattr(module, local)
        if tensor is not None:
            owners = owner if local in PROJECTIONS else owner.repeat(3)
            slices.append(Slice(tensor=names[id(tensor)], dim=0, owner=owners, role="makes"))
    slices.append(Slice(tensor=names[id(module.out_proj.weight)], dim=1, owner=owner, role="reads"))
    return tuple(slices)


def _added(mask: Tensor, dtype: torch.dtype) -> Tensor:
    """A mask as what is added to scores: True becomes minus infinity."""
    if mask.dtype != torch.bool:
        return mask
    return torch.zeros_like(mask, dtype=dtype).masked_fill(mask, float("-inf"))

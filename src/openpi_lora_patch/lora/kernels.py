"""Autograd functions for Linears with a frozen weight and an adapter: the same mathematics, less memory traffic.

What they save against `LoRALinear` after `LoRALinear`:
- Linears on the same input (q/k/v, gate/up) run as one, with their adapters stacked: the input is read once.
- The adapter's part is summed inside the base GEMM, in its float32 accumulator, where adding it to an output that was
  rounded to bfloat16 would lose an update of 1e-4.
- For the backward pass only GEMM outputs are kept; norms and GEGLU are computed again, which costs one pass over memory.

Source of the arithmetic: Hu et al. 2021 (arXiv:2106.09685); RMSNorm and GEGLU as in Gemma.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from . import pointwise
from .layer import LoRALinear

# Rows that a recomputing MLP handles at once: its temporaries stay below 2 GB whatever the batch.
_CHUNK = 8192


@dataclasses.dataclass(frozen=True)
class Norm:
    """A frozen RMS norm to apply to the input first.

    Attributes:
        weight: (in), see `pointwise.rms_norm`.
        eps: added to the mean square.
    """

    weight: Tensor
    eps: float


def fusable(linear: nn.Module) -> bool:
    """Whether the functions below compute what `linear` does: a plain frozen weight, with or without an adapter."""
    base = linear.base_layer if isinstance(linear, LoRALinear) else linear
    if isinstance(linear, LoRALinear) and (linear.merged or (linear.training and linear.config.dropout > 0)):
        return False
    return type(base) is nn.Linear and base.bias is None and not base.weight.requires_grad


def project(x: Tensor, linears: Sequence[Any], norm: Norm | None = None) -> Tensor:
    """`cat([linear(norm(x)) for linear in linears], -1)`.

    Args:
        x: (..., in), of the weights' dtype.
        linears: one or more that are `fusable`.
        norm: applied to `x` first.
    """
    weight, eps = (None, 0.0) if norm is None else (norm.weight, norm.eps)
    scalings, tensors = _parts(linears)
    out = _Projection.apply(x.reshape(-1, x.shape[-1]), weight, eps, scalings, *tensors)  # type: ignore[no-untyped-call]
    return out.view(*x.shape[:-1], -1)


def feed_forward(x: Tensor, mlp: Any, norm: Norm | None = None, *, keep: bool = True) -> Tensor:
    """`down(gelu(gate(n)) * up(n))` with `n = norm(x)`.

    Args:
        x: (..., in), of the weights' dtype.
        mlp: holds `gate_proj`, `up_proj` and `down_proj`, each `fusable`.
        norm: applied to `x` first.
        keep: keep the outputs of gate and up for the backward pass; else compute them again there, in parts.
    """
    weight, eps = (None, 0.0) if norm is None else (norm.weight, norm.eps)
    scalings, tensors = _parts((mlp.gate_proj, mlp.up_proj, mlp.down_proj))
    rows = x.reshape(-1, x.shape[-1])
    return _FeedForward.apply(rows, weight, eps, keep, scalings, *tensors).view(x.shape)  # type: ignore[no-untyped-call]


class JoinRotated(torch.autograd.Function):
    """Packed queries, keys and values of several towers to those of all tokens in a row, rotated (RoPE).

    Inputs: cos and sin (batch, tokens, head_dim); the number of query heads; the number of tokens in the result, which
    are zero beyond those that there are; each tower's packed tensor (batch, length, heads + 2 * kv_heads, head_dim).
    Outputs: (batch, total, heads or kv_heads, head_dim), three of them.
    """

    @staticmethod
    def forward(ctx: Any, cos: Tensor, sin: Tensor, heads: int, total: int, *packed: Tensor) -> tuple[Tensor, ...]:
        ctx.save_for_backward(cos, sin)
        ctx.shapes = [part.shape for part in packed]
        batch, _, all_heads, head_dim = packed[0].shape
        kv_heads = (all_heads - heads) // 2
        joint = [packed[0].new_empty(batch, total, n, head_dim) for n in (heads, kv_heads, kv_heads)]
        offset = 0
        for part in packed:
            pointwise.rotate(part, cos, sin, (joint[0], joint[1], joint[2]), offset)
            offset += part.shape[1]
        for whole in joint:
            whole[:, offset:].zero_()
        return tuple(joint)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        cos, sin = ctx.saved_tensors
        query, key, value = (grad if grad.stride(-1) == 1 else grad.contiguous() for grad in grads)
        results: list[Tensor | None] = []
        offset = 0
        for shape, needed in zip(ctx.shapes, ctx.needs_input_grad[4:], strict=True):
            part = query.new_empty(shape) if needed else None
            if part is not None:
                pointwise.rotate_back(part, cos, sin, (query, key, value), offset)
            results.append(part)
            offset += shape[1]
        return None, None, None, None, *results


class _Projection(torch.autograd.Function):
    """See `project`. Inputs: x (rows, in), norm weight, eps, scalings, then all weights, all As, all Bs."""

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, norm: Tensor | None, eps: float, scalings: tuple[float, ...], *tensors: Tensor
    ) -> Tensor:
        weights, matrices_a, matrices_b = _thirds(tensors)
        a, b = _stack(matrices_a, x.dtype), _block_diagonal(matrices_b, scalings, x.dtype)
        normed = x if norm is None else pointwise.rms_norm(x, norm, eps)
        hidden = None if a is None else normed @ a.T
        ctx.eps, ctx.scalings = eps, scalings
        ctx.save_for_backward(x, norm, hidden, *tensors)
        return _sum_of_products(normed, _cat(weights).T, hidden, None if b is None else b.T)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Any, ...]:
        x, norm, hidden, *tensors = ctx.saved_tensors
        weights, matrices_a, matrices_b = _thirds(tensors)
        a, b = _stack(matrices_a, x.dtype), _block_diagonal(matrices_b, ctx.scalings, x.dtype)
        grads_a, grads_b = [None] * len(weights), [None] * len(weights)
        hidden_grad = None
        if a is not None and b is not None:
            hidden_grad = grad @ b
            normed = x if norm is None else pointwise.rms_norm(x, norm, ctx.eps)
            grads_a = _unstack(hidden_grad.T @ normed, matrices_a)
            grads_b = _unblock(grad.T @ hidden, matrices_b, ctx.scalings)
        x_grad = None
        if ctx.needs_input_grad[0]:
            x_grad = _sum_of_products(grad, _cat(weights), hidden_grad, a)
            if norm is not None:
                x_grad = pointwise.rms_norm_backward(x_grad, x, norm, ctx.eps)
        return x_grad, None, None, None, *(None for _ in weights), *grads_a, *grads_b


class _FeedForward(torch.autograd.Function):
    """See `feed_forward`. Inputs: x (rows, in), norm weight, eps, keep, scalings, then all weights, As, Bs."""

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, norm: Tensor | None, eps: float, keep: bool, scalings: tuple[float, ...], *tensors: Tensor
    ) -> Tensor:
        half = _GateUp(tensors, scalings, norm, eps, x.dtype)
        down, a, b = tensors[2], _stack(tensors[5:6], x.dtype), _block_diagonal(tensors[8:], scalings[2:], x.dtype)
        outputs, kept = [], []
        for rows in (x,) if keep else x.split(_CHUNK):
            gate_up, inner = half(rows)
            activation = pointwise.geglu(gate_up)
            hidden = None if a is None else activation @ a.T
            outputs.append(_sum_of_products(activation, down.T, hidden, None if b is None else b.T))
            kept = [gate_up, inner, hidden] if keep else []
        ctx.eps, ctx.keep, ctx.scalings = eps, keep, scalings
        ctx.save_for_backward(x, norm, *tensors, *kept)
        return outputs[0] if len(outputs) == 1 else torch.cat(outputs)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Any, ...]:
        x, norm, *saved = ctx.saved_tensors
        tensors, kept = saved[:9], saved[9:]
        weights, matrices_a, matrices_b = _thirds(tensors)
        half = _GateUp(tensors, ctx.scalings, norm, ctx.eps, x.dtype)
        a, b = _stack(matrices_a[2:], x.dtype), _block_diagonal(matrices_b[2:], ctx.scalings[2:], x.dtype)
        totals = _Totals()
        x_grads = []
        for rows, out_grad in ((x, grad),) if ctx.keep else zip(x.split(_CHUNK), grad.split(_CHUNK), strict=True):
            gate_up, inner, hidden = kept or (*half(rows), None)
            hidden_grad = None if b is None else out_grad @ b
            activation_grad = _wide_product(out_grad, weights[2], hidden_grad, a)
            gate_up_grad, b_half, a_down = pointwise.geglu_backward(activation_grad, gate_up, inner, hidden_grad)
            del activation_grad
            if a is not None:
                if hidden is None:
                    hidden = pointwise.geglu(gate_up) @ a.T
                totals.add(a_down=a_down, b_down=out_grad.T @ hidden)
            del gate_up
            x_grad, a_half = half.backward(rows, gate_up_grad, needs_x=ctx.needs_input_grad[0])
            totals.add(a_half=a_half, b_half=b_half)
            x_grads.append(x_grad)
        grads_a = [*_unstack(totals["a_half"], matrices_a[:2]), *_unstack(totals["a_down"], matrices_a[2:])]
        grads_b = [
            *_unblock(totals["b_half"], matrices_b[:2], ctx.scalings[:2]),
            *_unblock(totals["b_down"], matrices_b[2:], ctx.scalings[2:]),
        ]
        x_grad = None
        if ctx.needs_input_grad[0]:
            x_grad = x_grads[0] if len(x_grads) == 1 else torch.cat(x_grads)
        return x_grad, None, None, None, None, None, None, None, *grads_a, *grads_b


class _GateUp:
    """Gate and up as one Linear after a norm; its output is the widest tensor of a layer, so nothing is added to it."""

    def __init__(
        self, tensors: Sequence[Tensor], scalings: tuple[float, ...], norm: Tensor | None, eps: float, dtype: torch.dtype
    ) -> None:
        weights, matrices_a, matrices_b = _thirds(tensors)
        self.weights, self.norm, self.eps = weights[:2], norm, eps
        self.a = _stack(matrices_a[:2], dtype)
        self.b = _block_diagonal(matrices_b[:2], scalings[:2], dtype)

    def __call__(self, x: Tensor) -> tuple[Tensor, Tensor | None]:
        """(rows, in) to gate and up, (rows, 2 * dim), and to what the adapters have inside, (rows, r)."""
        rows, size = x.shape
        if self.a is None or self.b is None:
            return self._normed(x) @ _cat(self.weights).T, None
        wide = x.new_empty(rows, size + self.a.shape[0])
        normed, hidden = wide[:, :size], wide[:, size:]
        normed.copy_(x) if self.norm is None else pointwise.rms_norm(x, self.norm, self.eps, out=normed)
        torch.mm(normed, self.a.T, out=hidden)
        weight = torch.cat([_cat(self.weights), self.b], dim=1)
        return wide @ weight.T, hidden.clone()

    def backward(self, x: Tensor, grad: Tensor, *, needs_x: bool) -> tuple[Tensor | None, Tensor | None]:
        """Gradients of `x` and of the stacked A, from that of gate and up."""
        hidden_grad = a_grad = x_grad = None
        if self.b is not None:
            hidden_grad = grad @ self.b
            a_grad = hidden_grad.T @ self._normed(x)
        if needs_x:
            x_grad = _sum_of_products(grad, _cat(self.weights), hidden_grad, self.a)
            if self.norm is not None:
                x_grad = pointwise.rms_norm_backward(x_grad, x, self.norm, self.eps)
        return x_grad, a_grad

    def _normed(self, x: Tensor) -> Tensor:
        return x if self.norm is None else pointwise.rms_norm(x, self.norm, self.eps)


class _Totals(dict[str, "Tensor | None"]):
    """Sums over the parts of a batch, in float32 at least."""

    def add(self, **parts: Tensor | None) -> None:
        for name, part in parts.items():
            if part is not None and name in self:
                self[name] = self[name] + part
            else:
                self[name] = part if part is None or part.dtype == torch.float64 else part.float()

    def __missing__(self, name: str) -> None:
        return None


def _sum_of_products(x: Tensor, weight: Tensor, hidden: Tensor | None, b: Tensor | None) -> Tensor:
    """`x @ weight + hidden @ b`, summed in the accumulator of the first product."""
    if hidden is None or b is None:
        return x @ weight
    return torch.mm(hidden, b).addmm_(x, weight)


def _wide_product(x: Tensor, weight: Tensor, hidden: Tensor | None, b: Tensor | None) -> Tensor:
    """The same as one product of wider factors: for a result so large that reading it again costs more than copies."""
    if hidden is None or b is None:
        return x @ weight
    return torch.cat([x, hidden], dim=1) @ torch.cat([weight, b])


def _parts(linears: Sequence[Any]) -> tuple[tuple[float, ...], list[Tensor]]:
    weights = [linear.weight for linear in linears]
    scalings, matrices_a, matrices_b = [], [], []
    for linear, weight in zip(linears, weights, strict=True):
        adapted = isinstance(linear, LoRALinear)
        scalings.append(linear.scaling if adapted else 1.0)
        matrices_a.append(linear.lora_A if adapted else weight.new_empty(0, weight.shape[1], dtype=torch.float32))
        matrices_b.append(linear.lora_B if adapted else weight.new_empty(weight.shape[0], 0, dtype=torch.float32))
    return tuple(scalings), [*weights, *matrices_a, *matrices_b]


def _thirds(tensors: Sequence[Tensor]) -> tuple[Sequence[Tensor], Sequence[Tensor], Sequence[Tensor]]:
    n = len(tensors) // 3
    return tensors[:n], tensors[n : 2 * n], tensors[2 * n :]


def _cat(weights: Sequence[Tensor]) -> Tensor:
    return weights[0] if len(weights) == 1 else torch.cat(tuple(weights))


def _stack(matrices: Sequence[Tensor], dtype: torch.dtype) -> Tensor | None:
    """The As under one another, (r, in), None where there are none; r is a multiple of 8, which GEMMs need to be fast."""
    stacked = torch.cat(tuple(matrices)).to(dtype)
    return F.pad(stacked, (0, 0, 0, -len(stacked) % 8)) if len(stacked) else None


def _block_diagonal(matrices: Sequence[Tensor], scalings: Sequence[float], dtype: torch.dtype) -> Tensor | None:
    """The scaled Bs, (out, r), each beside the columns of its own A; None where there are none."""
    blocks = torch.block_diag(*(b * scaling for b, scaling in zip(matrices, scalings, strict=True)))
    rank = blocks.shape[1]
    return F.pad(blocks, (0, -rank % 8)).to(dtype) if rank else None


def _unstack(grad: Tensor | None, matrices: Sequence[Tensor]) -> list[Any]:
    """Each A's gradient, out of that of the stack."""
    if grad is None:
        return [None] * len(matrices)
    parts = grad[: sum(len(a) for a in matrices)].split([len(a) for a in matrices])
    return [part.to(a.dtype) for part, a in zip(parts, matrices, strict=True)]


def _unblock(grad: Tensor | None, matrices: Sequence[Tensor], scalings: Sequence[float]) -> list[Any]:
    """Each B's gradient, out of that of the block diagonal."""
    if grad is None:
        return [None] * len(matrices)
    results, row, column = [], 0, 0
    for b, scaling in zip(matrices, scalings, strict=True):
        block = grad[row : row + b.shape[0], column : column + b.shape[1]]
        results.append(block.to(b.dtype) * scaling)
        row, column = row + b.shape[0], column + b.shape[1]
    return results

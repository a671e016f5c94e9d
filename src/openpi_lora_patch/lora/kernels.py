"""Autograd functions for Linears with a frozen weight and an adapter: the same mathematics, less memory traffic.

What they save against `LoRALinear` after `LoRALinear`:
- Linears on the same input (q/k/v, gate/up) run as one, with their adapters stacked: the input is read once.
- The adapter's part is summed in float32, inside the base GEMM or by whatever reads the base's output next, and rounded
  once with it; added to what is rounded already, an update of 1e-4 would be lost.
- For the backward pass only GEMM outputs are kept; norms and GEGLU are computed again, each one pass over memory.

Source of the arithmetic: Hu et al. 2021 (arXiv:2106.09685); RMSNorm and GEGLU as in Gemma.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Sequence
from typing import Any, cast

import torch
from torch import Tensor, nn

from . import pointwise
from .layer import LoRALinear
from .quantized import QuantizedLinear, dense, stored_weight

# Rows that a recomputing MLP handles at once: its temporaries stay below 2 GB whatever the batch.
_CHUNK = 8192
_ROOM = 128  # Columns beside a gradient: enough for openpi's q/k/v at rank 32, and a multiple of 64.
_TILE = 192  # See `_rows_of_a_wave`.


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
    """Whether the functions below compute what `linear` does: a frozen weight, with or without an adapter."""
    base = linear.base_layer if isinstance(linear, LoRALinear) else linear
    if isinstance(linear, LoRALinear) and (
        linear.merged or linear.config.use_dora or (linear.training and linear.config.dropout > 0)
    ):
        return False
    plain = type(base) in (nn.Linear, QuantizedLinear) and base.bias is None
    return plain and not stored_weight(base).requires_grad


def project(x: Tensor, linears: Sequence[Any], residual: Tensor | None = None) -> Tensor:
    """`cat([linear(x) for linear in linears], -1)`, plus `residual`.

    Args:
        x: (..., in), of the weights' dtype.
        linears: one or more that are `fusable`.
        residual: (..., out), added to the result.
    """
    scalings, tensors = _parts(linears)
    rows = None if residual is None else residual.reshape(-1, residual.shape[-1])
    out, _ = _Projection.apply(x.reshape(-1, x.shape[-1]), None, 0.0, rows, scalings, *tensors)
    return cast(Tensor, out.view(*x.shape[:-1], -1))


def project_normed(x: Tensor, linears: Sequence[Any], norm: Norm) -> tuple[Tensor, Tensor]:
    """`project(norm(x), linears)`, and x for whatever else needs it, whose gradient is then added on the way."""
    scalings, tensors = _parts(linears)
    out, rows = _Projection.apply(x.reshape(-1, x.shape[-1]), norm.weight, norm.eps, None, scalings, *tensors)
    return out.view(*x.shape[:-1], -1), rows.view(x.shape)


def feed_forward(x: Tensor, mlp: Any, norm: Norm | None = None, *, keep: bool = True) -> Tensor:
    """`down(gelu(gate(x)) * up(x))`; or, with a norm, `x + down(gelu(gate(n)) * up(n))`, where `n = norm(x)`.

    Args:
        x: (..., in), of the weights' dtype.
        mlp: holds `gate_proj`, `up_proj` and `down_proj`, each `fusable`.
        norm: applied to `x` first, which is then added to the result.
        keep: keep the outputs of gate and up for the backward pass; else compute them again there, in parts.
    """
    weight, eps = (None, 0.0) if norm is None else (norm.weight, norm.eps)
    scalings, tensors = _parts((mlp.gate_proj, mlp.up_proj, mlp.down_proj))
    rows = x.reshape(-1, x.shape[-1])
    out = _FeedForward.apply(rows, weight, eps, keep, scalings, *tensors)
    return cast(Tensor, out.view(x.shape))


class JoinRotated(torch.autograd.Function):
    """Packed queries, keys and values of several towers to those of all tokens in a row, rotated (RoPE).

    Inputs: cos and sin (batch, tokens, head_dim); the number of query heads; how many tokens to add at the end, zeros;
    whether to leave the queries apart; each tower's packed tensor (batch, length, heads + 2 * kv_heads, head_dim).
    Outputs: queries, of all towers or one for each (and none added), keys, values: (batch, tokens, heads, head_dim).
    """

    @staticmethod
    def forward(
        ctx: Any, cos: Tensor, sin: Tensor, heads: int, added: int, apart: bool, *packed: Tensor
    ) -> tuple[Tensor, ...]:
        ctx.save_for_backward(cos, sin)
        ctx.apart, ctx.shapes = apart, [part.shape for part in packed]
        batch, _, all_heads, head_dim = packed[0].shape
        kv_heads = (all_heads - heads) // 2
        lengths = [part.shape[1] for part in packed]
        tokens = sum(lengths) + added

        def room(length: int, n: int) -> Tensor:
            return packed[0].new_empty(batch, length, n, head_dim)

        queries = [room(length, heads) for length in lengths] if apart else [room(tokens, heads)]
        key, value = room(tokens, kv_heads), room(tokens, kv_heads)
        for i, (part, offset) in enumerate(zip(packed, _offsets(lengths), strict=True)):
            query, query_offset = (queries[i], 0) if apart else (queries[0], offset)
            pointwise.rotate(part, cos, sin, (query, key, value), offset, query_offset)
        for whole in (key, value) if apart else (*queries, key, value):
            whole[:, sum(lengths) :].zero_()
        return *queries, key, value

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        cos, sin = ctx.saved_tensors
        *queries, key, value = (grad if grad.stride(-1) == 1 else grad.contiguous() for grad in grads)
        results: list[Tensor | None] = []
        for i, (shape, offset) in enumerate(zip(ctx.shapes, _offsets([s[1] for s in ctx.shapes]), strict=True)):
            part = None
            if ctx.needs_input_grad[5 + i]:
                part = _with_room(key, shape[:2].numel(), shape[2:].numel()).view(shape)
                query, query_offset = (queries[i], 0) if ctx.apart else (queries[0], offset)
                pointwise.rotate_back(part, cos, sin, (query, key, value), offset, query_offset)
            results.append(part)
        return None, None, None, None, None, *results


class _Projection(torch.autograd.Function):
    """See `project` and `project_normed`: the output, and x.

    Inputs: x (rows, in), norm weight, eps, residual, scalings, then all weights, all As, all Bs.
    """

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        norm: Tensor | None,
        eps: float,
        residual: Tensor | None,
        scalings: tuple[float, ...],
        *tensors: Tensor,
    ) -> tuple[Tensor, Tensor]:
        linear, scale = _Stacked.of(*_thirds(tensors), scalings, x.dtype), None
        if residual is None:
            output, hidden, scale = linear(x, norm, eps)
        else:
            hidden = linear.hidden(x)
            output = linear.added(residual, x, hidden)
        ctx.scalings = scalings
        ctx.set_materialize_grads(False)
        _save(ctx, x, norm, scale, hidden, linear.a, linear.b, *tensors)
        return output, x

    @staticmethod
    def backward(ctx: Any, grad: Tensor, added: Tensor | None) -> tuple[Any, ...]:
        x, norm, scale, hidden, a, b, *tensors = _saved(ctx)
        weights, matrices_a, matrices_b = _thirds(tensors)
        linear = _Stacked(weights, a, b)
        wide, hidden_grad, of_b = linear.gradients(grad, hidden, matrices_b)
        of_a = None if hidden_grad is None else pointwise.a_gradient(hidden_grad, x, norm, scale)
        grads_a, grads_b, x_grad = _unstack(of_a, matrices_a), _scaled(of_b, matrices_b, ctx.scalings), None
        if ctx.needs_input_grad[0]:
            x_grad = linear.backward(wide)
            if norm is not None:
                out = _with_room(x, *x.shape)
                x_grad = pointwise.rms_norm_backward(x_grad, x, norm, scale, added, out)
        residual_grad = grad if ctx.needs_input_grad[3] else None
        return x_grad, None, None, residual_grad, None, *(None for _ in weights), *grads_a, *grads_b


class _FeedForward(torch.autograd.Function):
    """See `feed_forward`. Inputs: x (rows, in), norm weight, eps, keep, scalings, then all weights, As, Bs."""

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, norm: Tensor | None, eps: float, keep: bool, scalings: tuple[float, ...], *tensors: Tensor
    ) -> Tensor:
        weights, matrices_a, matrices_b = _thirds(tensors)
        first = _Stacked.of(weights[:2], matrices_a[:2], matrices_b[:2], scalings[:2], x.dtype)
        last = _Stacked.of(weights[2:], matrices_a[2:], matrices_b[2:], scalings[2:], x.dtype)
        outputs: list[Tensor] = []
        kept: list[Tensor | None] = []
        for rows in (x,) if keep else torch.split(x, _CHUNK):
            gate_up, inner, scale = first(rows, norm, eps)
            if norm is None:
                wide, activation = last.room(len(rows), last.size)
                hidden = pointwise.geglu(gate_up, activation, last.narrow)
                outputs.append(last.product(wide, hidden))
            else:
                activation = rows.new_empty(len(rows), last.size)
                hidden = pointwise.geglu(gate_up, activation, last.narrow)
                outputs.append(last.added(rows, activation, hidden))
            kept = [gate_up, inner, scale, hidden] if keep else []
        ctx.eps, ctx.keep, ctx.scalings = eps, keep, scalings
        _save(ctx, x, norm, first.a, first.b, last.a, last.b, *tensors, *kept)
        return outputs[0] if len(outputs) == 1 else torch.cat(outputs)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Any, ...]:
        x, norm, first_a, first_b, last_a, last_b, *saved = _saved(ctx)
        kept = saved[9:]
        weights, matrices_a, matrices_b = _thirds(saved[:9])
        first, last = _Stacked(weights[:2], first_a, first_b), _Stacked(weights[2:], last_a, last_b)
        totals, x_grads = _Totals(), []
        ranks = len(matrices_a[0]), len(matrices_a[1])
        for rows, out_grad in ((x, grad),) if ctx.keep else _chunks(x, grad):
            gate_up, inner, scale, hidden = cast(Sequence[Any], kept or (*first(rows, norm, ctx.eps), None))
            if last.a is not None and hidden is None:
                hidden = pointwise.geglu(gate_up, rows.new_empty(len(rows), last.size), last.narrow)
            wide, hidden_grad, (b_last,) = last.gradients(out_grad, hidden, matrices_b[2:])
            activation_grad = last.backward(wide)
            gate_up_grad = torch.empty_like(gate_up)
            a_last, pair = pointwise.geglu_backward(activation_grad, gate_up, hidden_grad, inner, ranks, gate_up_grad)
            del activation_grad, gate_up
            b_gate, b_up = pair or (None, None)
            totals.add(a_last=a_last, b_last=b_last, b_gate=b_gate, b_up=b_up)
            inner_grad, x_grad = first.backward_apart(gate_up_grad, wanted=ctx.needs_input_grad[0])
            through = None
            if inner_grad is not None:
                totals.add(a_first=pointwise.a_gradient(inner_grad, rows, norm, scale))
                through = pointwise.LowRank(inner_grad, cast(Tensor, first.narrow), inner)
            if x_grad is not None:
                if norm is not None:
                    out = _with_room(rows, *rows.shape)
                    x_grad = pointwise.rms_norm_backward(x_grad, rows, norm, scale, out_grad, out, through)
                elif through is not None:
                    x_grad = torch.addmm(x_grad, through.inner_grad, through.a)
                x_grads.append(x_grad)
        grads_a = [*_unstack(totals["a_first"], matrices_a[:2]), *_unstack(totals["a_last"], matrices_a[2:])]
        grads_b = _scaled([totals[name] for name in ("b_gate", "b_up", "b_last")], matrices_b, ctx.scalings)
        x_total = torch.cat(x_grads) if len(x_grads) > 1 else x_grads[0] if x_grads else None
        return x_total, None, None, None, None, None, None, None, *grads_a, *grads_b


class _Stacked:
    """Linears on one input as one, and their adapters as one beside it, multiplied together:

        y = [ x | x A^T | 0 ] [ W | B | 0 ]^T        x_grad = [ y_grad | y_grad B | 0 ] [ W ; A ; 0 ]

    or, where y_grad is so wide that reading it for `y_grad B` would cost much, `y_grad [ W | B | 0 ]`, which has that
    beside `y_grad W`; its product with A is added by what comes next.

    One product of wider factors sums the adapter's part in the base's float32 accumulator: cuBLAS, given an output to
    add to, rounds to bfloat16 first, which loses an update of 1e-4. The zeros keep rows aligned for the fast kernels.
    """

    def __init__(self, weights: Sequence[Tensor], a: Tensor | None, b: Tensor | None) -> None:
        self.weights, self.a, self.b = [dense(weight) for weight in weights], a, b
        self.size, self.out = self.weights[0].shape[1], sum(len(weight) for weight in self.weights)

    @classmethod
    def of(
        cls,
        weights: Sequence[Tensor],
        matrices_a: Sequence[Tensor],
        matrices_b: Sequence[Tensor],
        scalings: Sequence[float],
        dtype: torch.dtype,
    ) -> _Stacked:
        """The As under one another, and the scaled Bs, (out, r), each beside the columns of its own A.

        r is a multiple of 16, as matrix units have it, and that of the As, with zeros, one of 64. Without any adapter
        both are None.
        """
        ranks = [len(a) for a in matrices_a]
        if sum(ranks) == 0:
            return cls(weights, None, None)
        a = matrices_a[0].new_empty(pointwise.padded(sum(ranks)), matrices_a[0].shape[1], dtype=dtype)
        b = a.new_empty(sum(len(b) for b in matrices_b), -(-sum(ranks) // 16) * 16)
        pointwise.place(matrices_a, matrices_b, scalings, a, b)
        return cls(weights, a, b)

    def __call__(self, x: Tensor, norm: Tensor | None, eps: float) -> tuple[Tensor, Tensor | None, Tensor | None]:
        """Of `norm(x)`, (rows, in), the output (rows, out), what the adapters have inside, (rows, r), and 1 / rms."""
        if norm is None:
            hidden = self.hidden(x)
            if hidden is None:
                return self._product(x), None, None
            wide, _ = self.room(len(x), self.size)
            pointwise.beside((x,), hidden, wide)
            return self._product(wide), hidden, None
        wide, inputs = self.room(len(x), self.size)
        scale = pointwise.rms_norm(x, norm, eps, inputs)
        hidden = self.hidden(inputs)
        return self.product(wide, hidden), hidden, scale

    def added(self, residual: Tensor, x: Tensor, hidden: Tensor | None) -> Tensor:
        """`residual` plus the output, (rows, out)."""
        output = x @ _cat(self.weights).T
        if hidden is None or self.b is None:
            return output.add_(residual)
        return pointwise.add_low_rank(residual, output, hidden, self.b)

    def product(self, wide: Tensor, hidden: Tensor | None) -> Tensor:
        """The output, from `room` whose part for x is filled."""
        if hidden is not None:
            pointwise.beside((), hidden, wide)
        return self._product(wide)

    def gradients(
        self, grad: Tensor, hidden: Tensor | None, matrices_b: Sequence[Tensor]
    ) -> tuple[Tensor, Tensor | None, Sequence[Tensor | None]]:
        """`[ y_grad | y_grad B | 0 ]` for `backward`, its middle, (rows, r), and the gradient of each B, not scaled.

        Without an adapter `y_grad`, and None for the rest.
        """
        if hidden is None or self.b is None:
            return grad, None, [None] * len(matrices_b)
        wide = _roomy(grad, self.out + pointwise.padded(self.b.shape[1]))
        left, right = wide[:, : self.out], wide[:, self.out :]
        sizes, ranks = ([matrix.shape[axis] for matrix in matrices_b] for axis in (0, 1))
        of_b = pointwise.adapter_gradients(left, self.b, hidden, sizes, ranks, right)
        return wide, right[:, : self.b.shape[1]], of_b

    def backward(self, grad: Tensor) -> Tensor:
        """From the output's gradient, (rows, out), as `gradients` returns it, to the input's."""
        return grad @ _cat(self.weights if self.a is None else [*self.weights, self.a])

    def backward_apart(self, grad: Tensor, *, wanted: bool) -> tuple[Tensor | None, Tensor | None]:
        """`hidden_grad`, and in the same product, where wanted, the input's gradient but for the adapters' part."""
        if self.b is None or not wanted:
            return self.hidden_grad(grad), grad @ _cat(self.weights) if wanted else None
        both = _whole_waves(grad, _beside_weights(self.weights, self.b))
        return both[:, self.size : self.size + self.b.shape[1]], both[:, : self.size]

    @property
    def narrow(self) -> Tensor | None:
        """The As, (r, in), without the zeros that make their number a multiple of 64."""
        return None if self.a is None or self.b is None else self.a[: self.b.shape[1]]

    def hidden(self, x: Tensor) -> Tensor | None:
        """`x A^T`, (rows, r)."""
        return None if self.narrow is None else x @ self.narrow.T

    def hidden_grad(self, grad: Tensor) -> Tensor | None:
        """`y_grad B`, (rows, r)."""
        return None if self.b is None else grad @ self.b

    def room(self, rows: int, size: int) -> tuple[Tensor, Tensor]:
        """An empty left factor, and the part of it for x, (rows, size)."""
        extra = 0 if self.a is None else len(self.a)
        wide = self.weights[0].new_empty(rows, size + extra)
        return wide, wide[:, :size]

    def _product(self, wide: Tensor) -> Tensor:
        return wide @ (_cat(self.weights) if self.b is None else _beside_weights(self.weights, self.b)).T


def _beside_weights(weights: Sequence[Tensor], b: Tensor) -> Tensor:
    """`[ W | B | 0 ]`, of weights under one another."""
    wide = b.new_empty(len(b), weights[0].shape[1] + pointwise.padded(b.shape[1]))
    pointwise.beside(weights, b, wide)
    return wide


def _whole_waves(left: Tensor, right: Tensor) -> Tensor:
    """`left @ right`; where that ends with most of the GPU idle, as two products, of which the second is small."""
    wave = _rows_of_a_wave(right.shape[1], left.device)
    cut = len(left) // wave * wave if wave else 0
    if cut in (0, len(left)):
        return left @ right
    out = left.new_empty(len(left), right.shape[1])
    for part in (slice(cut), slice(cut, None)):
        torch.mm(left[part], right, out=out[part])
    return out


def _rows_of_a_wave(columns: int, device: torch.device) -> int:
    """How many rows keep every multiprocessor busy with one tile; 0 where no number does.

    cuBLAS takes tiles of 192 rows and columns for so long sums: the 2112 columns of `[ W | B | 0 ]` are 11 of them, and
    2304 rows then 132, as many as an H100 or H200 has multiprocessors.
    """
    units = torch.cuda.get_device_properties(device).multi_processor_count if device.type == "cuda" else 0
    across = -(-columns // _TILE)
    return 0 if units % across else units // across * _TILE


def _chunks(x: Tensor, grad: Tensor) -> Iterator[tuple[Tensor, Tensor]]:
    return zip(torch.split(x, _CHUNK), torch.split(grad, _CHUNK), strict=True)


def _with_room(like: Tensor, rows: int, size: int) -> Tensor:
    """(rows, size), uninitialised: the left of a wider tensor, whose other columns are for what adapters have."""
    wide = like.new_empty(rows, size + _ROOM)
    wide.has_room = True  # type: ignore[attr-defined]
    return wide[:, :size]


def _roomy(x: Tensor, width: int) -> Tensor:
    """(rows, width) whose left is x, (rows, size); not a copy where x is from `_with_room`, as gradients made here are.

    What is right of x is nothing yet.
    """
    wide: Any = x._base
    if (
        getattr(wide, "has_room", False)
        and wide.shape[1] >= width
        and (len(wide), wide.stride()) == (len(x), x.stride())
    ):
        return cast(Tensor, wide[:, :width])
    wide = x.new_empty(len(x), width)
    wide[:, : x.shape[1]].copy_(x)
    return cast(Tensor, wide)


def _offsets(lengths: Sequence[int]) -> list[int]:
    return [sum(lengths[:i]) for i in range(len(lengths))]


class _Totals(dict[str, "Tensor | None"]):
    """Sums over the parts of a batch; where there are several, in float32 at least."""

    def add(self, **parts: Tensor | None) -> None:
        for name, part in parts.items():
            before = self[name]
            if before is None or part is None:
                self[name] = part
            else:
                self[name] = torch.add(before if before.dtype == torch.float64 else before.float(), part)

    def __missing__(self, name: str) -> None:
        return None


def _parts(linears: Sequence[Any]) -> tuple[tuple[float, ...], list[Tensor]]:
    weights = [stored_weight(linear) for linear in linears]
    scalings, matrices_a, matrices_b = [], [], []
    for linear, weight in zip(linears, weights, strict=True):
        adapted = isinstance(linear, LoRALinear)
        scalings.append(linear.scaling if adapted else 1.0)
        matrices_a.append(linear.lora_A if adapted else weight.new_empty(0, weight.shape[1], dtype=torch.float32))
        matrices_b.append(linear.lora_B if adapted else weight.new_empty(weight.shape[0], 0, dtype=torch.float32))
    return tuple(scalings), [*weights, *matrices_a, *matrices_b]


def _save(ctx: Any, *tensors: Any) -> None:
    """`save_for_backward`; a quantised weight is kept as it is, to be made dense again."""
    ctx.quantized = [tensor if isinstance(tensor, QuantizedLinear) else None for tensor in tensors]
    ctx.save_for_backward(*(None if isinstance(tensor, QuantizedLinear) else tensor for tensor in tensors))


def _saved(ctx: Any) -> list[Any]:
    return [kept or tensor for kept, tensor in zip(ctx.quantized, ctx.saved_tensors, strict=True)]


def _thirds(tensors: Sequence[Tensor]) -> tuple[Sequence[Tensor], Sequence[Tensor], Sequence[Tensor]]:
    n = len(tensors) // 3
    return tensors[:n], tensors[n : 2 * n], tensors[2 * n :]


def _cat(weights: Sequence[Tensor]) -> Tensor:
    return weights[0] if len(weights) == 1 else torch.cat(tuple(weights))


def _unstack(grad: Tensor | None, matrices: Sequence[Tensor]) -> list[Any]:
    """Each A's gradient, out of that of the stack."""
    if grad is None:
        return [None] * len(matrices)
    ranks = [len(a) for a in matrices]
    whole = grad[: sum(ranks)].to(max(matrices, key=len).dtype)  # All at once: there is one dtype, but for no adapter.
    return list(whole.split(ranks))


def _scaled(grads: Sequence[Tensor | None], matrices: Sequence[Tensor], scalings: Sequence[float]) -> list[Any]:
    """The gradients of Bs, from those of the scaled ones."""
    return [
        grad if grad is None else grad.to(b.dtype) if scaling == 1 else grad.to(b.dtype) * scaling
        for grad, b, scaling in zip(grads, matrices, scalings, strict=True)
    ]

"""The memory-bound parts of a Gemma layer, one pass over memory each: Triton where there is a GPU, else plain torch.

Every function takes and returns plain tensors and knows nothing of autograd; `kernels.py` puts them together.
Arithmetic is in float32 (in plain torch, at least), with one rounding at the end.
"""

from __future__ import annotations

import functools
import logging
from collections.abc import Sequence
from typing import Any, NamedTuple, cast

import torch
import torch.nn.functional as F
from torch import Tensor

logger = logging.getLogger("openpi_lora_patch")

Whole = tuple[Tensor, Tensor, Tensor]


class LowRank(NamedTuple):
    """The part of a norm's output's gradient that comes through adapters, `inner_grad @ a`, not yet multiplied.

    Attributes:
        inner_grad: (rows, r), with any row stride.
        a: (r, dim).
        inner: (rows, r), what the adapters have inside, the norm's output times `a.T`.
    """

    inner_grad: Tensor
    a: Tensor
    inner: Tensor


# Of torch 2.6. The compiler of 3.1 dies of one of our kernels, for an H100.
OLDEST_TRITON = (3, 2)


def triton_version() -> tuple[int, ...]:
    """Major and minor number; raises ImportError without Triton."""
    import triton

    return tuple(map(int, triton.__version__.split(".")[:2]))


@functools.cache
def has_triton() -> bool:
    """Whether a Triton that our kernels are for runs on the GPU, found by trying; if not, one log line says why."""
    try:
        if triton_version() < OLDEST_TRITON:
            raise RuntimeError("it is {}.{}, and has to be {}.{} or newer".format(*triton_version(), *OLDEST_TRITON))
        row = torch.ones(1, 64, device="cuda")
        _triton().beside((), row, torch.empty_like(row), 0)
    except Exception as error:
        logger.warning("Triton is not used, plain torch does its part: %s: %s", type(error).__name__, error)
        return False
    return True


def beside(left: Sequence[Tensor], right: Tensor, out: Tensor) -> None:
    """`out = [left | right | 0]`, row by row; without any `left` its part of `out` stays as it is.

    Args:
        left: (..., size) each, under one another, of all rows together.
        right: (rows, r).
        out: (rows, width), contiguous; `right` begins at the last multiple of 64 that leaves it room.
    """
    size = out.shape[1] - padded(right.shape[1])
    if _by_triton(out) and len(left) <= 3:
        _triton().beside(left, right, out, size)
        return
    if left:
        torch.cat(list(left), out=out[:, :size])
    out[:, size : size + right.shape[1]].copy_(right)
    out[:, size + right.shape[1] :].zero_()


def padded(rank: int) -> int:
    """The next multiple of 64: GEMMs are fastest where rows begin at a multiple of 128 bytes."""
    return -(-rank // 64) * 64


def place(
    matrices_a: Sequence[Tensor],
    matrices_b: Sequence[Tensor],
    scalings: Sequence[float],
    stacked_a: Tensor,
    stacked_b: Tensor,
) -> None:
    """The As under one another, the scaled Bs on a diagonal, and zeros into what else there is.

    Args:
        matrices_a: (rank, in) each, in any dtype.
        matrices_b: (out, rank) each.
        scalings: of each B.
        stacked_a: (the sum of the ranks or more, in), contiguous.
        stacked_b: (the sum of the outs, the sum of the ranks or more), contiguous.
    """
    if _by_triton(stacked_a) and len(matrices_a) <= 3:
        _triton().place(matrices_a, matrices_b, scalings, stacked_a, stacked_b)
        return
    for stacked in (stacked_a, stacked_b):
        stacked.zero_()
    row, column = 0, 0
    for a, b, scaling in zip(matrices_a, matrices_b, scalings, strict=True):
        stacked_a[column : column + len(a)] = a
        stacked_b[row : row + len(b), column : column + len(a)] = b * scaling
        row, column = row + len(b), column + len(a)


def rms_norm(x: Tensor, weight: Tensor, eps: float, out: Tensor) -> Tensor:
    """Gemma's RMS norm, `x / rms(x) * (1 + weight)`, into `out`.

    Args:
        x: (rows, dim).
        weight: (dim), in any dtype.
        eps: added to the mean square.
        out: (rows, dim), a view with any row stride.

    Returns:
        `1 / rms(x)`, (rows, 1), float32 at least.
    """
    if _by_triton(x):
        return _triton().rms_norm(x, weight, eps, out)
    wide = widened(x)
    scale = torch.rsqrt(wide.square().mean(-1, keepdim=True) + eps)
    out.copy_(wide * scale * (1 + weight))
    return scale


def rms_norm_backward(
    grad: Tensor,
    x: Tensor,
    weight: Tensor,
    scale: Tensor,
    added: Tensor | None,
    out: Tensor,
    low_rank: LowRank | None = None,
) -> Tensor:
    """Gradient for `x` of `rms_norm`, plus `added`, into `out`.

    Args:
        grad: of its output, (rows, dim), without the part in `low_rank`.
        x, weight: what it was given.
        scale: (rows, 1), what it returned.
        added: (rows, dim) or None.
        out: (rows, dim), a view with any row stride, as are `grad`, `x` and `added`.
        low_rank: that part, or None.
    """
    if _by_triton(x):
        _triton().rms_norm_backward(grad, x, weight, scale, added, out, low_rank)
        return out
    if low_rank is not None:
        grad = widened(grad) + widened(low_rank.inner_grad) @ widened(low_rank.a)
    normed, grad = widened(x) * scale, grad * (1 + weight)
    result = scale * (grad - normed * (grad * normed).mean(-1, keepdim=True))
    return out.copy_(result if added is None else result + added)


def a_gradient(inner_grad: Tensor, x: Tensor, weight: Tensor | None, scale: Tensor | None) -> Tensor:
    """Gradient of adapters' As, `inner_grad.T @ x`, (r, dim); or, with a weight, `inner_grad.T @ rms_norm(x)`.

    Args:
        inner_grad: (rows, r), with any row stride, gradient of what they have inside.
        x, weight: what `rms_norm` was given.
        scale: (rows, 1), what it returned.
    """
    if _by_triton(x) and (grad := _triton().a_gradient(inner_grad, x, weight, scale)) is not None:
        return cast(Tensor, grad)
    if weight is None or scale is None:
        return inner_grad.T @ x
    scaled = torch.mul(inner_grad, scale, out=torch.empty_like(inner_grad, memory_format=torch.contiguous_format))
    product = scaled.T @ x
    return torch.addcmul(product, product, widened(weight))


def add_low_rank(residual: Tensor, base: Tensor, hidden: Tensor, b: Tensor) -> Tensor:
    """`residual + base + hidden @ b.T`, rounded once: (rows, dim), (rows, dim), (rows, r), (dim, r)."""
    out = torch.empty_like(base)
    if _by_triton(base):
        _triton().add_low_rank(residual, base, hidden, b, out)
    else:
        out.copy_(widened(residual) + base + widened(hidden) @ widened(b).T)
    return out


def geglu(gate_up: Tensor, out: Tensor, a: Tensor | None) -> Tensor | None:
    """`out = gelu(gate) * up`, gelu in its tanh form, and what the adapter after it has inside.

    Args:
        gate_up: (rows, 2 * dim), gate first.
        out: (rows, dim), a view with any row stride.
        a: (r, dim), of the adapter; None without one.

    Returns:
        `out @ a.T`, (rows, r), or None.
    """
    if _by_triton(gate_up):
        return _triton().geglu(gate_up, out, a)
    gate, up = widened(gate_up).chunk(2, dim=-1)
    out.copy_(F.gelu(gate, approximate="tanh") * up)
    return None if a is None else out @ a.T


def geglu_backward(
    grad: Tensor,
    gate_up: Tensor,
    inner_grad: Tensor | None,
    inner: Tensor | None,
    ranks: tuple[int, int],
    out: Tensor,
) -> tuple[Tensor | None, tuple[Tensor, Tensor] | None]:
    """Gradient of `geglu`, into `out`, and of the adapters on either side of it, in the same pass over memory.

    Args:
        grad: of the output, (rows, dim).
        gate_up: the input, (rows, 2 * dim).
        inner_grad: (rows, r), with any row stride, gradient of what the adapter after `geglu` has inside; None without
            one.
        inner: (rows, the sum of `ranks` or more), what the adapters of gate and up have inside, one beside the other;
            None without any.
        ranks: of these two.
        out: (rows, 2 * dim), a view with any row stride, for the gradient of `gate_up`.

    Returns:
        Of the A after it, `inner_grad.T @ geglu(gate_up)`, (r, dim), or None; and of the Bs of gate and up, not yet
        scaled, (dim, rank) each, or None. Float32 at least.
    """
    if _by_triton(grad):
        return _triton().geglu_backward(grad, gate_up, inner_grad, inner, ranks, out)
    gate, up = (half.detach().requires_grad_() for half in widened(gate_up).chunk(2, dim=-1))
    with torch.enable_grad():
        output = F.gelu(gate, approximate="tanh") * up
    halves = torch.autograd.grad(output, (gate, up), widened(grad))
    out.copy_(torch.cat(halves, dim=-1))
    grad_a = None if inner_grad is None else widened(inner_grad).T @ output.detach()
    return grad_a, None if inner is None else pair_products(out, inner, ranks)


def pair_products(grad: Tensor, inner: Tensor, ranks: tuple[int, int]) -> tuple[Tensor, Tensor]:
    """`gate.T @ first, up.T @ second`, of `grad`, (rows, 2 * dim), and `inner`, as `geglu_backward` has them."""
    (gate, up), (first, second, _) = grad.chunk(2, dim=1), inner.split([*ranks, inner.shape[1] - sum(ranks)], dim=1)
    return gate.T @ first, up.T @ second


def adapter_gradients(
    grad: Tensor, b: Tensor, inner: Tensor, sizes: Sequence[int], ranks: Sequence[int], out: Tensor
) -> list[Tensor]:
    """Gradients of what adapters side by side have inside, `out = [grad @ b | 0]`, and of their Bs, which it returns.

    Args:
        grad: of their outputs, (rows, the sum of `sizes`), a view with any row stride.
        b: (the sum of `sizes`, r), the Bs on its diagonal.
        inner: (rows, r), what they have inside, one beside the other.
        sizes: how many outputs each has.
        ranks: of each.
        out: (rows, r or more), a view with any row stride.

    Returns:
        Of each B, not yet scaled, (size, rank).
    """
    if _by_triton(grad) and (products := _triton().adapter_gradients(grad, b, inner, sizes, ranks, out)) is not None:
        return cast("list[Tensor]", products)
    torch.mm(grad, b, out=out[:, : b.shape[1]])
    out[:, b.shape[1] :].zero_()
    rows, columns = grad.split(list(sizes), dim=1), inner[:, : sum(ranks)].split(list(ranks), dim=1)
    return [part.T @ own for part, own in zip(rows, columns, strict=True)]


def rotate(packed: Tensor, cos: Tensor, sin: Tensor, whole: Whole, offset: int, query_offset: int) -> None:
    """Rotate the queries and keys of one tower (RoPE) and put them, and its values, into those of both.

    Args:
        packed: (batch, length, heads + 2 * kv_heads, head_dim): queries, keys, values.
        cos, sin: (batch, >= offset + length, head_dim), their halves equal.
        whole: queries, keys, values (batch, tokens, heads or kv_heads, head_dim), written to.
        offset: where among the keys and values, and in `cos`, this tower's tokens begin.
        query_offset: the same among the queries.
    """
    _rotate(packed, cos, sin, whole, offset, query_offset, inverse=False)


def rotate_back(packed: Tensor, cos: Tensor, sin: Tensor, whole: Whole, offset: int, query_offset: int) -> None:
    """Gradient of `rotate`: fill `packed` from the gradients in `whole`."""
    _rotate(packed, cos, sin, whole, offset, query_offset, inverse=True)


def _rotate(
    packed: Tensor, cos: Tensor, sin: Tensor, whole: Whole, offset: int, query_offset: int, *, inverse: bool
) -> None:
    if _by_triton(packed):
        _triton().rotate(packed, cos, sin, whole, offset, query_offset, inverse)
        return
    length = packed.shape[1]
    cos, sin = (angle[:, offset : offset + length, None] for angle in (cos, -sin if inverse else sin))
    parts = packed.split([tensor.shape[2] for tensor in whole], dim=2)
    starts = (query_offset, offset, offset)
    for part, tensor, start, turn in zip(parts, whole, starts, (True, True, False), strict=True):
        own = tensor[:, start : start + length]
        source, target = (own, part) if inverse else (part, own)
        first, second = source.chunk(2, dim=-1)
        target.copy_(source * cos + torch.cat([-second, first], dim=-1) * sin if turn else source)


def widened(x: Tensor) -> Tensor:
    return x if x.dtype == torch.float64 else x.float()


def _by_triton(x: Tensor) -> bool:
    return x.is_cuda and has_triton()


def _triton() -> Any:
    from . import triton_kernels

    return triton_kernels

"""The memory-bound parts of a Gemma layer, one pass over memory each: Triton where there is a GPU, else plain torch.

Every function takes and returns plain tensors and knows nothing of autograd; `kernels.py` puts them together. Arithmetic
is in float32 (in plain torch, at least), with one rounding at the end.
"""

from __future__ import annotations

import functools
import importlib.util
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor


@functools.cache
def has_triton() -> bool:
    """Whether Triton can be imported; torch brings it for NVIDIA GPUs on Linux."""
    return importlib.util.find_spec("triton") is not None


def rms_norm(x: Tensor, weight: Tensor, eps: float, out: Tensor | None = None) -> Tensor:
    """Gemma's RMS norm, `x / rms(x) * (1 + weight)`.

    Args:
        x: (rows, dim).
        weight: (dim), in any dtype.
        eps: added to the mean square.
        out: (rows, dim), a view with any row stride; made where absent.
    """
    if out is None:
        out = torch.empty_like(x)
    if x.is_cuda:
        _triton().rms_norm(x, weight, eps, out)
    else:
        wide = _wide(x)
        out.copy_(wide * torch.rsqrt(wide.square().mean(-1, keepdim=True) + eps) * (1 + weight))
    return out


def rms_norm_backward(grad: Tensor, x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """Gradient for `x` of `rms_norm(x, weight, eps)`, (rows, dim); `grad` is that of its output."""
    if x.is_cuda:
        return _triton().rms_norm_backward(grad.contiguous(), x, weight, eps)
    wide = _wide(x)
    scale = torch.rsqrt(wide.square().mean(-1, keepdim=True) + eps)
    normed, grad = wide * scale, grad * (1 + weight)
    return (scale * (grad - normed * (grad * normed).mean(-1, keepdim=True))).to(x.dtype)


def geglu(gate_up: Tensor) -> Tensor:
    """`gelu(gate) * up`, gelu in its tanh form: (rows, 2 * dim), gate first, to (rows, dim)."""
    if gate_up.is_cuda:
        return _triton().geglu(gate_up)
    gate, up = _wide(gate_up).chunk(2, dim=-1)
    return (F.gelu(gate, approximate="tanh") * up).to(gate_up.dtype)


def geglu_backward(
    grad: Tensor, gate_up: Tensor, inner: Tensor | None, inner_grad: Tensor | None
) -> tuple[Tensor, Tensor | None, Tensor | None]:
    """Gradients of `geglu`, and of the adapters on either side of it while the tiles are at hand.

    Args:
        grad: of the output, (rows, dim).
        gate_up: the input, (rows, 2 * dim).
        inner: (rows, r), what the adapters of gate and up have inside, `x @ A.T`; None without adapters.
        inner_grad: (rows, s), gradient of what the adapter after `geglu` has inside; None without one.

    Returns:
        The gradient of `gate_up`; `gate_up_grad.T @ inner` (2 * dim, r) and `inner_grad.T @ geglu(gate_up)` (s, dim),
        both float32 at least, or None.
    """
    if grad.is_cuda:
        return _triton().geglu_backward(grad, gate_up, inner, inner_grad)
    gate, up = (half.detach().requires_grad_() for half in _wide(gate_up).chunk(2, dim=-1))
    with torch.enable_grad():
        output = F.gelu(gate, approximate="tanh") * up
    halves = torch.autograd.grad(output, (gate, up), _wide(grad))
    gate_up_grad = torch.cat(halves, dim=-1)
    after = None if inner is None else gate_up_grad.T @ _wide(inner)
    before = None if inner_grad is None else _wide(inner_grad).T @ output.detach()
    return gate_up_grad.to(gate_up.dtype), after, before


def rotate(packed: Tensor, cos: Tensor, sin: Tensor, joint: tuple[Tensor, Tensor, Tensor], offset: int) -> None:
    """Rotate the queries and keys of one tower (RoPE) and put them, and its values, into those of both.

    Args:
        packed: (batch, length, heads + 2 * kv_heads, head_dim): queries, keys, values.
        cos, sin: (batch, >= offset + length, head_dim), their halves equal.
        joint: queries, keys, values (batch, >= offset + length, heads or kv_heads, head_dim), written to.
        offset: where in `joint` and `cos` this tower's tokens begin.
    """
    _rotate(packed, cos, sin, joint, offset, inverse=False)


def rotate_back(packed: Tensor, cos: Tensor, sin: Tensor, joint: tuple[Tensor, Tensor, Tensor], offset: int) -> None:
    """Gradient of `rotate`: fill `packed` from the gradients in `joint`."""
    _rotate(packed, cos, sin, joint, offset, inverse=True)


def _rotate(
    packed: Tensor, cos: Tensor, sin: Tensor, joint: tuple[Tensor, Tensor, Tensor], offset: int, *, inverse: bool
) -> None:
    if packed.is_cuda:
        _triton().rotate(packed, cos, sin, joint, offset, inverse)
        return
    heads = [part.shape[2] for part in joint]
    own = slice(offset, offset + packed.shape[1])
    cos, sin = cos[:, own, None], sin[:, own, None] * (-1 if inverse else 1)
    turned = (True, True, False)
    for part, whole, turn in zip(packed.split(heads, dim=2), joint, turned, strict=True):
        source, target = (whole[:, own], part) if inverse else (part, whole[:, own])
        first, second = source.chunk(2, dim=-1)
        target.copy_(source * cos + torch.cat([-second, first], dim=-1) * sin if turn else source)


def _wide(x: Tensor) -> Tensor:
    return x if x.dtype == torch.float64 else x.float()


def _triton() -> Any:
    from . import triton_kernels

    return triton_kernels

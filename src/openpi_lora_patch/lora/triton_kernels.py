# mypy: disable-error-code="no-untyped-def, untyped-decorator, no-untyped-call"
"""The functions of `pointwise.py` as Triton kernels, for CUDA tensors. See there for shapes and meaning."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from .pointwise import Whole

_ADD = {"ROWS": 64, "COLUMNS": 64, "num_warps": 4}  # A tile of `_add_low_rank`.
_BACKWARD = {"ROWS": 32, "COLUMNS": 64, "num_warps": 4, "num_stages": 3}  # A tile of `_geglu_backward`.
_PROGRAMS = 4096  # Enough to fill any GPU several times.


def beside(left: Tensor | None, right: Tensor, out: Tensor, size: int) -> None:
    rows, width = out.shape
    start, block = (size, 64) if left is None else (0, 1024)
    strides = (0 if left is None else left.stride(0), right.stride(0), out.stride(0))
    _beside[(rows, triton.cdiv(width - start, block))](
        left, right, out, *strides, start, size, right.shape[1], width, left is not None, block, num_warps=4
    )


def rms_norm(x: Tensor, weight: Tensor, eps: float, out: Tensor) -> None:
    rows, dim = x.shape
    _rms_norm[(rows,)](x, weight, out, x.stride(0), out.stride(0), eps, dim, triton.next_power_of_2(dim), num_warps=8)


def rms_norm_backward(grad: Tensor, x: Tensor, weight: Tensor, eps: float, added: Tensor | None) -> Tensor:
    rows, dim = x.shape
    out = torch.empty_like(x)
    strides = (grad.stride(0), x.stride(0), 0 if added is None else added.stride(0))
    _rms_norm_backward[(rows,)](
        grad, x, weight, added, out, *strides, eps, dim, triton.next_power_of_2(dim), num_warps=8
    )
    return out


def add_low_rank(residual: Tensor, base: Tensor, hidden: Tensor, b: Tensor, out: Tensor) -> None:
    rows, dim = base.shape
    grid = (triton.cdiv(dim, _ADD["COLUMNS"]), triton.cdiv(rows, _ADD["ROWS"]))
    _add_low_rank[grid](residual, base, hidden, b, out, rows, dim, hidden.shape[1], _block(hidden.shape[1]), **_ADD)


def geglu(gate_up: Tensor, out: Tensor) -> None:
    rows, dim = out.shape
    block = min(1024, triton.next_power_of_2(dim))
    _geglu[(rows, triton.cdiv(dim, block))](gate_up, out, gate_up.stride(0), out.stride(0), dim, block, num_warps=4)


def geglu_backward(
    grad: Tensor, gate_up: Tensor, inner: Tensor | None, rank: int, inner_grad: Tensor | None, out: Tensor
) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
    rows, dim = grad.shape
    columns = triton.cdiv(dim, _BACKWARD["COLUMNS"])
    height = _BACKWARD["ROWS"]
    splits = max(1, min(triton.cdiv(rows, 4 * height), _PROGRAMS // columns))
    length = triton.cdiv(triton.cdiv(rows, splits), height) * height
    ranks = (0, 0) if inner is None else (rank, inner.shape[1] - rank)
    last = 0 if inner_grad is None else inner_grad.shape[1]
    gate, up, before = (_partial(grad, splits, size) for size in (*ranks, last))
    _geglu_backward[(columns, splits)](
        grad, gate_up, out, inner, inner_grad, gate, up, before, rows, dim, length, out.stride(0),
        *ranks, last, _block(*ranks), _block(last), **_BACKWARD,
    )  # fmt: skip
    gate, up, before = (None if sums is None else sums.sum(0) for sums in (gate, up, before))
    return None if gate is None else gate.T, None if up is None else up.T, before


def rotate(
    packed: Tensor, cos: Tensor, sin: Tensor, whole: Whole, offset: int, query_offset: int, inverse: bool
) -> None:
    batch, length, _, head_dim = packed.shape
    query, key, value = whole
    _rotate[(length, batch)](
        packed,
        cos,
        sin,
        query,
        key,
        value,
        offset,
        query_offset,
        length,
        cos.stride(0) if cos.shape[0] > 1 else 0,
        cos.stride(1),
        *query.stride()[:3],
        *key.stride()[:3],
        *value.stride()[:3],
        query.shape[2],
        key.shape[2],
        head_dim // 2,
        triton.next_power_of_2(head_dim // 2),
        inverse,
        num_warps=4,
    )


def _partial(like: Tensor, splits: int, rank: int) -> Tensor | None:
    """Sums over a part of the rows, (splits, rank, dim), which are then added up: always in the same order."""
    return like.new_empty(splits, rank, like.shape[1], dtype=torch.float32) if rank else None


def _block(*ranks: int) -> int:
    """What matrix units and `tl.arange` take for any of these ranks: a power of 2, at least 16."""
    return max(16, triton.next_power_of_2(max(ranks)))


@triton.jit
def _beside(
    left,
    right,
    out,
    left_stride,
    right_stride,
    out_stride,
    start,
    size,
    rank,
    width,
    HAS_LEFT: tl.constexpr,
    BLOCK: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64)
    at = start + tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    value = tl.load(right + row * right_stride + at - size, (at >= size) & (at < size + rank), 0.0)
    if HAS_LEFT:
        value += tl.load(left + row * left_stride + at, at < size, 0.0)
    tl.store(out + row * out_stride + at, value, at < width)


@triton.jit
def _rms_norm(x, weight, out, x_stride, out_stride, eps, DIM: tl.constexpr, BLOCK: tl.constexpr):
    row = tl.program_id(0).to(tl.int64)
    at = tl.arange(0, BLOCK)
    inside = at < DIM
    value = tl.load(x + row * x_stride + at, inside, 0.0).to(tl.float32)
    scale = 1 + tl.load(weight + at, inside, 0.0).to(tl.float32)
    value = value * tl.rsqrt(tl.sum(value * value) / DIM + eps) * scale
    tl.store(out + row * out_stride + at, value.to(out.dtype.element_ty), inside)


@triton.jit
def _rms_norm_backward(
    grad, x, weight, added, out, grad_stride, stride, added_stride, eps, DIM: tl.constexpr, BLOCK: tl.constexpr
):
    row = tl.program_id(0).to(tl.int64)
    at = tl.arange(0, BLOCK)
    inside = at < DIM
    value = tl.load(x + row * stride + at, inside, 0.0).to(tl.float32)
    slope = tl.load(grad + row * grad_stride + at, inside, 0.0).to(tl.float32)
    slope *= 1 + tl.load(weight + at, inside, 0.0).to(tl.float32)
    scale = tl.rsqrt(tl.sum(value * value) / DIM + eps)
    normed = value * scale
    result = scale * (slope - normed * (tl.sum(slope * normed) / DIM))
    if added is not None:
        result += tl.load(added + row * added_stride + at, inside, 0.0).to(tl.float32)
    tl.store(out + row * stride + at, result.to(out.dtype.element_ty), inside)


@triton.jit
def _gelu(gate):
    """gelu(gate) in its tanh form, written with a sigmoid, and its slope."""
    part = tl.sigmoid(1.5957691216057308 * (gate + 0.044715 * gate * gate * gate))
    slope = part + gate * part * (1 - part) * 1.5957691216057308 * (1 + 3 * 0.044715 * gate * gate)
    return gate * part, slope


@triton.jit
def _add_low_rank(
    residual,
    base,
    hidden,
    b,
    out,
    rows,
    dim,
    R: tl.constexpr,
    R_BLOCK: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
):
    row = tl.program_id(1).to(tl.int64) * ROWS + tl.arange(0, ROWS)[:, None]
    column = tl.program_id(0) * COLUMNS + tl.arange(0, COLUMNS)[None, :]
    rank = tl.arange(0, R_BLOCK)
    at, there = row * dim + column, (row < rows) & (column < dim)
    value = tl.load(base + at, there, 0.0).to(tl.float32) + tl.load(residual + at, there, 0.0).to(tl.float32)
    left = tl.load(hidden + row * R + rank[None, :], (row < rows) & (rank[None, :] < R), 0.0)
    right = tl.load(b + column * R + rank[:, None], (column < dim) & (rank[:, None] < R), 0.0)
    tl.store(out + at, (value + tl.dot(left, right)).to(out.dtype.element_ty), there)


@triton.jit
def _geglu(gate_up, out, stride, out_stride, dim, BLOCK: tl.constexpr):
    row = tl.program_id(0).to(tl.int64)
    at = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    inside = at < dim
    gate = tl.load(gate_up + row * stride + at, inside, 0.0).to(tl.float32)
    up = tl.load(gate_up + row * stride + dim + at, inside, 0.0).to(tl.float32)
    gelu, _ = _gelu(gate)
    tl.store(out + row * out_stride + at, (gelu * up).to(out.dtype.element_ty), inside)


@triton.jit
def _columns(inner, first, left, local, SIZE: tl.constexpr, START: tl.constexpr, R: tl.constexpr, BLOCK: tl.constexpr):
    """Some rows of `inner` (rows, SIZE), its R columns from START on, transposed: (BLOCK, rows)."""
    rank = tl.arange(0, BLOCK)[:, None]
    return tl.load(
        inner + first * SIZE + local[None, :] * SIZE + START + rank, (local[None, :] < left) & (rank < R), 0.0
    )


@triton.jit
def _store_sum(target, total, split, column, dim, R: tl.constexpr, BLOCK: tl.constexpr):
    rank = tl.arange(0, BLOCK)[:, None]
    at = (split * R + rank).to(tl.int64) * dim + column[None, :]
    tl.store(target + at, total, (rank < R) & (column[None, :] < dim))


@triton.jit
def _geglu_backward(
    grad,
    gate_up,
    out,
    inner,
    inner_grad,
    gate_target,
    up_target,
    last_target,
    rows,
    dim,
    length,
    out_stride,
    GATE: tl.constexpr,
    UP: tl.constexpr,
    LAST: tl.constexpr,
    BLOCK: tl.constexpr,
    LAST_BLOCK: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
):
    """One program: some columns, one part of the rows; what is summed over rows stays in registers."""
    column = tl.program_id(0) * COLUMNS + tl.arange(0, COLUMNS)
    split = tl.program_id(1)
    element = out.dtype.element_ty
    gate_sum = tl.zeros((BLOCK, COLUMNS), tl.float32)
    up_sum = tl.zeros((BLOCK, COLUMNS), tl.float32)
    last_sum = tl.zeros((LAST_BLOCK, COLUMNS), tl.float32)
    local = tl.arange(0, ROWS)
    # Places within a tile are 32-bit numbers, computed once; only where a tile begins needs 64.
    inside = column[None, :] < dim
    at = local[:, None] * (2 * dim) + column[None, :]
    grad_at = local[:, None] * dim + column[None, :]
    out_at = local[:, None] * out_stride + column[None, :]
    for start in range(split * length, min((split + 1) * length, rows), ROWS):
        first = tl.cast(start, tl.int64)
        left = rows - start
        there = (local[:, None] < left) & inside
        tile, out_tile = gate_up + first * (2 * dim), out + first * out_stride
        gate = tl.load(tile + at, there, 0.0).to(tl.float32)
        up = tl.load(tile + dim + at, there, 0.0).to(tl.float32)
        slope = tl.load(grad + first * dim + grad_at, there, 0.0).to(tl.float32)
        gelu, gelu_slope = _gelu(gate)
        gate_grad = (slope * up * gelu_slope).to(element)
        up_grad = (slope * gelu).to(element)
        tl.store(out_tile + out_at, gate_grad, there)
        tl.store(out_tile + dim + out_at, up_grad, there)
        if GATE > 0:
            gate_sum += tl.dot(_columns(inner, first, left, local, GATE + UP, 0, GATE, BLOCK), gate_grad)
        if UP > 0:
            up_sum += tl.dot(_columns(inner, first, left, local, GATE + UP, GATE, UP, BLOCK), up_grad)
        if LAST > 0:
            hidden = _columns(inner_grad, first, left, local, LAST, 0, LAST, LAST_BLOCK)
            last_sum += tl.dot(hidden, (gelu * up).to(element))
    if GATE > 0:
        _store_sum(gate_target, gate_sum, split, column, dim, GATE, BLOCK)
    if UP > 0:
        _store_sum(up_target, up_sum, split, column, dim, UP, BLOCK)
    if LAST > 0:
        _store_sum(last_target, last_sum, split, column, dim, LAST, LAST_BLOCK)


@triton.jit
def _rotate(
    packed,
    cos,
    sin,
    query,
    key,
    value,
    offset,
    query_offset,
    length,
    cos_batch,
    cos_token,
    query_batch,
    query_token,
    query_head,
    key_batch,
    key_token,
    key_head,
    value_batch,
    value_token,
    value_head,
    HEADS: tl.constexpr,
    KV_HEADS: tl.constexpr,
    HALF: tl.constexpr,
    BLOCK: tl.constexpr,
    INVERSE: tl.constexpr,
):
    """One program: all heads of one token."""
    token, batch = tl.program_id(0), tl.program_id(1).to(tl.int64)
    at = tl.arange(0, BLOCK)
    inside = at < HALF
    angle = batch * cos_batch + (token + offset) * cos_token + at
    cosine = tl.load(cos + angle, inside, 0.0).to(tl.float32)
    sine = tl.load(sin + angle, inside, 0.0).to(tl.float32)
    if INVERSE:
        sine = -sine
    part = packed + (batch * length + token) * ((HEADS + 2 * KV_HEADS) * 2 * HALF)
    for head in tl.static_range(HEADS + 2 * KV_HEADS):
        if head < HEADS:
            whole = query + batch * query_batch + (token + query_offset) * query_token + head * query_head
        elif head < HEADS + KV_HEADS:
            whole = key + batch * key_batch + (token + offset) * key_token + (head - HEADS) * key_head
        else:
            whole = (
                value + batch * value_batch + (token + offset) * value_token + (head - HEADS - KV_HEADS) * value_head
            )
        own = part + head * 2 * HALF
        if INVERSE:
            source, target = whole, own
        else:
            source, target = own, whole
        first = tl.load(source + at, inside, 0.0).to(tl.float32)
        second = tl.load(source + HALF + at, inside, 0.0).to(tl.float32)
        if head < HEADS + KV_HEADS:
            turned = first * cosine - second * sine
            second = second * cosine + first * sine
            first = turned
        tl.store(target + at, first.to(target.dtype.element_ty), inside)
        tl.store(target + HALF + at, second.to(target.dtype.element_ty), inside)

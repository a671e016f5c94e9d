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
_PAIR = {"ROWS": 64, "COLUMNS": 512, "num_warps": 8, "num_stages": 2}  # A tile of `_pair_backward`.
_PROGRAMS = 4096  # Enough to fill any GPU several times.


def beside(left: Tensor | None, right: Tensor, out: Tensor, size: int) -> None:
    rows, width = out.shape
    start, block = (size, 64) if left is None else (0, 1024)
    strides = (0 if left is None else left.stride(0), right.stride(0), out.stride(0))
    _beside[(rows, triton.cdiv(width - start, block))](
        left, right, out, *strides, start, size, right.shape[1], width, left is not None, block, num_warps=4
    )


def place(matrix: Tensor, out: Tensor, column: int, scaling: float) -> None:
    rows, columns = matrix.shape
    grid = (triton.cdiv(out.numel(), 1024),)
    _place[grid](matrix, out, rows, columns, column, out.shape[1], out.numel(), scaling, 1024, num_warps=4)


def rms_norm(x: Tensor, weight: Tensor, eps: float, out: Tensor) -> Tensor:
    rows, dim = x.shape
    scale = x.new_empty(rows, 1, dtype=torch.float32)
    block = triton.next_power_of_2(dim)
    _rms_norm[(rows,)](x, weight, out, scale, x.stride(0), out.stride(0), eps, dim, block, num_warps=8)
    return scale


def rms_norm_backward(
    grad: Tensor, x: Tensor, weight: Tensor, scale: Tensor, added: Tensor | None, out: Tensor
) -> None:
    rows, dim = x.shape
    strides = (grad.stride(0), x.stride(0), 0 if added is None else added.stride(0), out.stride(0))
    _rms_norm_backward[(rows,)](
        grad, x, weight, scale, added, out, *strides, dim, triton.next_power_of_2(dim), num_warps=8
    )


def add_low_rank(residual: Tensor, base: Tensor, hidden: Tensor, b: Tensor, out: Tensor) -> None:
    rows, dim = base.shape
    grid = (triton.cdiv(dim, _ADD["COLUMNS"]), triton.cdiv(rows, _ADD["ROWS"]))
    _add_low_rank[grid](residual, base, hidden, b, out, rows, dim, hidden.shape[1], _block(hidden.shape[1]), **_ADD)


def geglu(gate_up: Tensor, out: Tensor) -> None:
    rows, dim = out.shape
    block = min(1024, triton.next_power_of_2(dim))
    _geglu[(rows, triton.cdiv(dim, block))](gate_up, out, gate_up.stride(0), out.stride(0), dim, block, num_warps=4)


def geglu_backward(grad: Tensor, gate_up: Tensor, inner_grad: Tensor | None, out: Tensor) -> Tensor | None:
    rows, dim = grad.shape
    columns = triton.cdiv(dim, _BACKWARD["COLUMNS"])
    splits, length = _split(rows, _BACKWARD["ROWS"], 4, _PROGRAMS // columns)
    rank = 0 if inner_grad is None else inner_grad.shape[1]
    sums = grad.new_empty(splits, rank, dim, dtype=torch.float32) if rank else None
    _geglu_backward[(columns, splits)](
        grad, gate_up, out, inner_grad, sums, rows, dim, length, out.stride(0), rank, _block(rank), **_BACKWARD
    )
    return None if sums is None else sums.sum(0)


def pair_backward(
    grad: Tensor, inner: Tensor, b: Tensor, ranks: tuple[int, int]
) -> tuple[Tensor, tuple[Tensor, Tensor]]:
    rows, r = inner.shape
    dim, block = grad.shape[1] // 2, _block(*ranks)
    strips = triton.cdiv(dim, _PAIR["COLUMNS"])
    splits, length = _split(rows, _PAIR["ROWS"], 8, _PROGRAMS // (4 * strips))
    # What a strip of columns adds to the gradient of `inner`, and a part of the rows to those of the Bs.
    make = grad.new_empty if r == sum(ranks) else grad.new_zeros
    inner_parts = make(strips, rows, r, dtype=torch.float32)
    b_parts = grad.new_empty(splits, block, 2 * dim, dtype=torch.float32)
    _pair_backward[(2 * strips, splits)](
        grad, inner, b, inner_parts, b_parts, grad.stride(0), rows, dim, length, r, *ranks, block, **_PAIR
    )
    first, second = b_parts.sum(0).chunk(2, dim=1)
    return inner_parts.sum(0).to(grad.dtype), (first[: ranks[0]].T, second[: ranks[1]].T)


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
        *packed.stride()[:2],
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


def _split(rows: int, height: int, least: int, most: int) -> tuple[int, int]:
    """Into how many parts of how many rows, each of `least` tiles or more: their sums are added in the same order."""
    splits = max(1, min(triton.cdiv(rows, least * height), most))
    length = triton.cdiv(triton.cdiv(rows, splits), height) * height
    return triton.cdiv(rows, length), length


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
def _place(matrix, out, rows, columns, first, width, size, scaling, BLOCK: tl.constexpr):
    at = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    row, column = at // width, at % width - first
    value = tl.load(matrix + row * columns + column, (row < rows) & (column >= 0) & (column < columns), 0.0)
    tl.store(out + at, (value.to(tl.float32) * scaling).to(out.dtype.element_ty), at < size)


@triton.jit
def _rms_norm(x, weight, out, scales, x_stride, out_stride, eps, DIM: tl.constexpr, BLOCK: tl.constexpr):
    row = tl.program_id(0).to(tl.int64)
    at = tl.arange(0, BLOCK)
    inside = at < DIM
    value = tl.load(x + row * x_stride + at, inside, 0.0).to(tl.float32)
    scale = 1 + tl.load(weight + at, inside, 0.0).to(tl.float32)
    inverse = tl.rsqrt(tl.sum(value * value) / DIM + eps)
    tl.store(out + row * out_stride + at, (value * inverse * scale).to(out.dtype.element_ty), inside)
    tl.store(scales + row, inverse)


@triton.jit
def _rms_norm_backward(
    grad,
    x,
    weight,
    scales,
    added,
    out,
    grad_stride,
    stride,
    added_stride,
    out_stride,
    DIM: tl.constexpr,
    BLOCK: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64)
    at = tl.arange(0, BLOCK)
    inside = at < DIM
    value = tl.load(x + row * stride + at, inside, 0.0).to(tl.float32)
    slope = tl.load(grad + row * grad_stride + at, inside, 0.0).to(tl.float32)
    slope *= 1 + tl.load(weight + at, inside, 0.0).to(tl.float32)
    scale = tl.load(scales + row)
    normed = value * scale
    result = scale * (slope - normed * (tl.sum(slope * normed) / DIM))
    if added is not None:
        result += tl.load(added + row * added_stride + at, inside, 0.0).to(tl.float32)
    tl.store(out + row * out_stride + at, result.to(out.dtype.element_ty), inside)


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
def _geglu_backward(
    grad,
    gate_up,
    out,
    inner_grad,
    target,
    rows,
    dim,
    length,
    out_stride,
    R: tl.constexpr,
    R_BLOCK: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
):
    """One program: some columns, one part of the rows; what is summed over rows stays in registers."""
    column, rank = tl.program_id(0) * COLUMNS + tl.arange(0, COLUMNS), tl.arange(0, R_BLOCK)[:, None]
    split = tl.program_id(1)
    element = out.dtype.element_ty
    total = tl.zeros((R_BLOCK, COLUMNS), tl.float32)
    local = tl.arange(0, ROWS)
    # Places within a tile are 32-bit numbers, computed once; only where a tile begins needs 64.
    inside = column[None, :] < dim
    at = local[:, None] * (2 * dim) + column[None, :]
    grad_at = local[:, None] * dim + column[None, :]
    out_at = local[:, None] * out_stride + column[None, :]
    inner_at = local[None, :] * R + rank
    for start in range(split * length, min((split + 1) * length, rows), ROWS):
        first = tl.cast(start, tl.int64)
        left = rows - start
        there = (local[:, None] < left) & inside
        tile, out_tile = gate_up + first * (2 * dim), out + first * out_stride
        gate = tl.load(tile + at, there, 0.0).to(tl.float32)
        up = tl.load(tile + dim + at, there, 0.0).to(tl.float32)
        slope = tl.load(grad + first * dim + grad_at, there, 0.0).to(tl.float32)
        gelu, gelu_slope = _gelu(gate)
        tl.store(out_tile + out_at, (slope * up * gelu_slope).to(element), there)
        tl.store(out_tile + dim + out_at, (slope * gelu).to(element), there)
        if R > 0:
            hidden = tl.load(inner_grad + first * R + inner_at, (local[None, :] < left) & (rank < R), 0.0)
            total += tl.dot(hidden, (gelu * up).to(element))
    if R > 0:
        tl.store(target + (split * R + rank).to(tl.int64) * dim + column[None, :], total, (rank < R) & inside)


@triton.jit
def _pair_backward(
    grad,
    inner,
    b,
    inner_parts,
    b_parts,
    stride,
    rows,
    dim,
    length,
    R: tl.constexpr,
    FIRST: tl.constexpr,
    SECOND: tl.constexpr,
    BLOCK: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
):
    """One program: some columns of one of the two, one part of the rows."""
    strips, split = tl.cdiv(dim, COLUMNS), tl.program_id(1)
    second, strip = tl.program_id(0) // strips, tl.program_id(0) % strips
    local, rank = strip * COLUMNS + tl.arange(0, COLUMNS), tl.arange(0, BLOCK)
    inside, own = local < dim, rank < tl.where(second == 0, FIRST, SECOND)
    column, place = second * dim + local, second * FIRST + rank
    right = tl.load(b + column[:, None] * R + place[None, :], inside[:, None] & own[None, :], 0.0)
    total = tl.zeros((BLOCK, COLUMNS), tl.float32)
    for start in range(split * length, min((split + 1) * length, rows), ROWS):
        row = (start + tl.arange(0, ROWS)).to(tl.int64)
        there = row < rows
        tile = tl.load(grad + row[:, None] * stride + column[None, :], there[:, None] & inside[None, :], 0.0)
        left = tl.load(inner + row[None, :] * R + place[:, None], there[None, :] & own[:, None], 0.0)
        total = tl.dot(left, tile, total)
        target = inner_parts + (strip * rows + row)[:, None] * R + place[None, :]
        tl.store(target, tl.dot(tile, right), there[:, None] & own[None, :])
    target = b_parts + (split * BLOCK + rank[:, None]).to(tl.int64) * (2 * dim) + column[None, :]
    tl.store(target, total, inside[None, :])


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
    packed_batch,
    packed_token,
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
    part = packed + batch * packed_batch + token * packed_token
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

# mypy: disable-error-code="no-untyped-def, untyped-decorator, no-untyped-call"
"""Gradients of adapters as Triton kernels: products of many rows, in parts, and sums of the parts.

See `pointwise.py` for shapes and meaning.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence, Sized
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

_PAIR = {"ROWS": 32, "COLUMNS": 256, "num_warps": 4, "num_stages": 3}  # A tile of `_adapter_gradients`.
_PRODUCTS = {"ROWS": 64, "COLUMNS": 128, "num_warps": 4, "num_stages": 3}  # A tile of `_a_gradient`.
_RESIDENT = 264  # Two for each multiprocessor of an H100 or H200, where each program more costs a sum to write.
_SUM = 512  # Elements of a program that sums parts.
NARROW = 32  # Up to this rank kernels take adapters along; above, tiles outgrow smaller GPUs, and parts the memory.


def a_gradient(inner_grad: Tensor, x: Tensor, weight: Tensor | None, scale: Tensor | None) -> Tensor | None:
    """None where the rank is too high."""
    (rows, dim), rank = x.shape, inner_grad.shape[1]
    if rank > 2 * NARROW:
        return None
    strips = triton.cdiv(dim, _PRODUCTS["COLUMNS"])
    splits, length = split_rows(rows, _PRODUCTS["ROWS"], 1, max(1, _RESIDENT // strips))
    sums = x.new_empty(splits, rank, dim, dtype=torch.float32)
    _a_gradient[(strips, splits)](
        inner_grad, x, weight, scale, sums, inner_grad.stride(0), x.stride(0), rows, dim, length, rank, tile_rank(rank),
        **_PRODUCTS,
    )  # fmt: skip
    return sum_parts(sums)


def adapter_gradients(
    grad: Tensor, b: Tensor, inner: Tensor, sizes: Sequence[int], ranks: Sequence[int], out: Tensor
) -> list[Tensor] | None:
    """None where a tile of columns would be of two adapters, or ranks are unequal or too high."""
    (rows, dim), rank, columns = grad.shape, ranks[0], _PAIR["COLUMNS"]
    if rank > NARROW or len(ranks) > 3 or set(ranks) != {rank} or any(size % columns for size in sizes[:-1]):
        return None
    strips = triton.cdiv(dim, columns)
    first, second = ends([range(size // columns) for size in sizes], strips)
    splits, length = split_rows(rows, _PAIR["ROWS"], 1, max(1, _RESIDENT // strips))
    parts, sums = (grad.new_empty(shape, dtype=torch.float32) for shape in ((strips, rank, rows), (splits, dim, rank)))
    _adapter_gradients[(strips, splits)](
        grad, b, inner, parts, sums, grad.stride(0), inner.stride(0), b.shape[1], rows, dim, length, first, second,
        rank, tile_rank(rank), **_PAIR,
    )  # fmt: skip
    grads_b = sums.new_empty(dim, rank)
    _sum_turned[(max(triton.cdiv(rows, 32), triton.cdiv(dim * rank, _SUM)), len(ranks) + 1)](
        parts, out, sums, grads_b, rows, out.stride(0), first, second, strips, dim * rank, splits, len(ranks), rank,
        tile_rank(rank), out.shape[1], 32, _SUM, num_warps=4,
    )  # fmt: skip
    return list(grads_b.split(list(sizes)))


def sum_strips(parts: Tensor, out: Tensor) -> None:
    """`out`, (rows, r), the sum of `parts`, (n, r, rows), float32."""
    n, rank, rows = parts.shape
    _sum_turned[(triton.cdiv(rows, 32), 1)](
        parts, out, None, None, rows, rank, n, n, n, 0, 0, 1, rank, tile_rank(rank), rank, 32, _SUM, num_warps=4
    )


def sum_parts(parts: Tensor) -> Tensor:
    """Sum over the first dimension."""
    out = parts.new_empty(parts.shape[1:])
    _sum[(triton.cdiv(out.numel(), _SUM),)](parts, out, out.numel(), len(parts), _SUM, num_warps=4)
    return out


def split_rows(rows: int, height: int, least: int, most: int) -> tuple[int, int]:
    """Into how many parts of how many rows, each of `least` tiles or more: their sums are added in the same order."""
    splits = max(1, min(triton.cdiv(rows, least * height), most))
    length = triton.cdiv(triton.cdiv(rows, splits), height) * height
    return triton.cdiv(rows, length), length


def ends(parts: Sequence[Sized], whole: int) -> tuple[int, int]:
    """Where the first and the second of up to three parts end, the last of them with the whole."""
    first, second = [*itertools.accumulate(map(len, parts[:-1])), whole, whole][:2]
    return first, second


def three(values: Sequence[Any]) -> list[Any]:
    """For a kernel's three arguments; what is missing it does not read."""
    return [*values, *(3 - len(values)) * [None]]


def tile_rank(*ranks: int) -> int:
    """What matrix units and `tl.arange` take for any of these ranks: a power of 2, at least 16."""
    return max(16, triton.next_power_of_2(max(ranks)))


@triton.jit
def _a_gradient(
    inner_grad,
    x,
    weight,
    scales,
    sums,
    inner_grad_stride,
    stride,
    rows,
    dim,
    length,
    R: tl.constexpr,
    R_BLOCK: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
):
    """One program: some columns, one part of the rows."""
    strip, split = tl.program_id(0), tl.program_id(1)
    column, rank = strip * COLUMNS + tl.arange(0, COLUMNS)[None, :], tl.arange(0, R_BLOCK)[:, None]
    local = tl.arange(0, ROWS)
    inside = column < dim
    at, inner_at = local[:, None] * stride + column, local[None, :] * inner_grad_stride + rank
    total = tl.zeros((R_BLOCK, COLUMNS), tl.float32)
    for start in range(split * length, min((split + 1) * length, rows), ROWS):
        begin = tl.cast(start, tl.int64)
        left = rows - start
        value = tl.load(x + begin * stride + at, (local[:, None] < left) & inside, 0.0)
        there = (local[None, :] < left) & (rank < R)
        factor = tl.load(inner_grad + begin * inner_grad_stride + inner_at, there, 0.0)
        if scales is not None:
            scale = tl.load(scales + begin + local, local < left, 0.0)[None, :]
            factor = (factor.to(tl.float32) * scale).to(value.dtype)
        total = tl.dot(factor, value, total)
    if weight is not None:
        total *= 1 + tl.load(weight + column, inside, 0.0).to(tl.float32)
    tl.store(sums + (split * R + rank).to(tl.int64) * dim + column, total, (rank < R) & inside)


@triton.jit
def _adapter_gradients(
    grad,
    b,
    inner,
    parts,
    sums,
    stride,
    inner_stride,
    b_stride,
    rows,
    dim,
    length,
    first,
    second,
    R: tl.constexpr,
    R_BLOCK: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
):
    """One program: some columns, all of one adapter, and one part of the rows; each tile of `grad` is read once."""
    strip, split = tl.program_id(0), tl.program_id(1)
    column, rank = strip * COLUMNS + tl.arange(0, COLUMNS)[None, :], tl.arange(0, R_BLOCK)[:, None]
    own = ((strip >= first).to(tl.int32) + (strip >= second).to(tl.int32)) * R
    local = tl.arange(0, ROWS)
    inside = column < dim
    at = local[:, None] * stride + column
    inner_at = local[None, :] * inner_stride + own + rank
    right = tl.load(b + column * b_stride + own + rank, (rank < R) & inside, 0.0)
    total = tl.zeros((R_BLOCK, COLUMNS), tl.float32)
    parts += (strip * R + rank).to(tl.int64) * rows
    for start in range(split * length, min((split + 1) * length, rows), ROWS):
        begin = tl.cast(start, tl.int64)
        left = rows - start
        tile = tl.load(grad + begin * stride + at, (local[:, None] < left) & inside, 0.0)
        there = (local[None, :] < left) & (rank < R)
        total = tl.dot(tl.load(inner + begin * inner_stride + inner_at, there, 0.0), tile, total)
        tl.store(parts + begin + local[None, :], tl.dot(right, tl.trans(tile)), there)
    tl.store(sums + (split.to(tl.int64) * dim + column) * R + rank, total, (rank < R) & inside)


@triton.jit
def _sum(parts, out, size, n, BLOCK: tl.constexpr):
    at = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    total = tl.zeros((BLOCK,), tl.float32)
    for _ in range(n):
        total += tl.load(parts + at, at < size, 0.0)
        parts += size
    tl.store(out + at, total, at < size)


@triton.jit
def _sum_turned(
    parts,
    out,
    sums,
    total,
    rows,
    stride,
    first,
    second,
    n,
    size,
    splits,
    ADAPTERS: tl.constexpr,
    R: tl.constexpr,
    R_BLOCK: tl.constexpr,
    WIDTH: tl.constexpr,
    ROWS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """(n, R, rows) to (rows, WIDTH): sums over the parts before `first`, those before `second`, the rest, and zeros.

    And by programs of their own, behind those of the adapters, `_sum` of `sums`.
    """
    adapter = tl.program_id(1)
    if adapter < ADAPTERS:
        begin = tl.where(adapter == 0, 0, tl.where(adapter == 1, first, second))
        end = tl.where(adapter == 0, first, tl.where(adapter == 1, second, n))
        _sum_of_adapter(parts, out, rows, stride, adapter, begin, end, ADAPTERS, R, R_BLOCK, WIDTH, ROWS)
    else:
        if sums is not None:
            _sum(sums, total, size, splits, BLOCK)


@triton.jit
def _sum_of_adapter(
    parts,
    out,
    rows,
    stride,
    adapter,
    begin,
    end,
    ADAPTERS: tl.constexpr,
    R: tl.constexpr,
    R_BLOCK: tl.constexpr,
    WIDTH: tl.constexpr,
    ROWS: tl.constexpr,
):
    row, rank = tl.program_id(0) * ROWS + tl.arange(0, ROWS), tl.arange(0, R_BLOCK)
    at = parts + (begin * R + rank)[:, None].to(tl.int64) * rows + row[None, :]
    there = (rank < R)[:, None] & (row < rows)[None, :]
    value = tl.zeros((R_BLOCK, ROWS), tl.float32)
    for _ in range(begin, end):
        value += tl.load(at, there, 0.0)
        at += R * rows
    target, here = out + row[:, None].to(tl.int64) * stride + rank[None, :], (row < rows)[:, None]
    tl.store(target + adapter * R, tl.trans(value).to(out.dtype.element_ty), here & (rank < R)[None, :])
    if adapter == ADAPTERS - 1:
        for column in tl.static_range(ADAPTERS * R, WIDTH, R_BLOCK):
            nothing = tl.zeros((ROWS, R_BLOCK), out.dtype.element_ty)
            tl.store(target + column, nothing, here & (column + rank < WIDTH)[None, :])

# mypy: disable-error-code="no-untyped-def, untyped-decorator, no-untyped-call"
"""Attention of many queries to keys and values that all heads share, forward and backward, in Triton.

Heads count as so many more queries: rows. Forward is FlashAttention (Dao 2023, arXiv:2307.08691). Backward is not: with
one head the scores of a layer are small enough to stand in memory for a moment, and from there on the gradients are
plain products, which cuBLAS does at twice the rate of a fused backward for heads of 256.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

_FORWARD = {"ROWS": 128, "KEYS": 64, "num_warps": 8, "num_stages": 2}
_SLOPES = {"ROWS": 128, "KEYS": 64, "CHUNK": 64, "num_warps": 4, "num_stages": 4}
# Weights and slopes that stand in memory at once: 1.3 GB, whatever the batch.
_AT_ONCE = 2**28
_LOG2_E = 1.4426950408889634


def forward(query: Tensor, key: Tensor, value: Tensor, there: Tensor | None, scale: float) -> tuple[Tensor, Tensor]:
    """What each row attends to, and the logarithm (base 2) of the sum that its weights were divided by.

    Args:
        query: (batch, rows, dim), contiguous; dim is a power of 2.
        key, value: (batch, keys, dim), each key's numbers in a row.
        there: (batch, keys), bool: which keys there are; None for all.
        scale: of the scores.

    Returns:
        (batch, rows, dim), and (batch, rows) in float32.
    """
    batch, rows, dim = query.shape
    out, level = torch.empty_like(query), query.new_empty(batch, rows, dtype=torch.float32)
    _forward[(triton.cdiv(rows, _FORWARD["ROWS"]), batch)](
        query, key, value, there, out, level, *key.stride()[:2], *value.stride()[:2], _stride(there),
        rows, key.shape[1], scale * _LOG2_E, dim, **_FORWARD,
    )  # fmt: skip
    return out, level


def backward(
    grad: Tensor,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    there: Tensor | None,
    scale: float,
    out: Tensor,
    level: Tensor,
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients for query, key and value, from `grad` (batch, rows, dim), contiguous, and what `forward` returned."""
    batch, rows, dim = query.shape
    key_grad, value_grad = (x.new_empty(batch, x.shape[1], dim) for x in (key, value))
    grads = torch.empty_like(query), key_grad, value_grad
    step = max(1, _AT_ONCE // (rows * key.shape[1]))
    for start in range(0, batch, step):
        part = slice(start, start + step)
        tensors = (grad, query, key, value, there, out, level, *grads)
        _backward(scale, *(None if x is None else x[part] for x in tensors))
    return grads


def _backward(scale, grad, query, key, value, there, out, level, query_grad, key_grad, value_grad):
    batch, rows, dim = query.shape
    keys = key.shape[1]
    wide = triton.cdiv(keys, _SLOPES["KEYS"]) * _SLOPES["KEYS"]  # Rows that begin where vectors can, and whole tiles.
    weights, slopes = (query.new_empty(batch, rows, wide)[:, :, :keys] for _ in range(2))
    inner = torch.empty_like(level)
    _row_products[(triton.cdiv(batch * rows, 16),)](grad, out, inner, batch * rows, dim, 16)
    tiles = triton.cdiv(rows, _SLOPES["ROWS"]) * triton.cdiv(keys, _SLOPES["KEYS"])
    _slopes[(tiles, batch)](
        query, key, value, there, grad, level, inner, weights, slopes, *key.stride()[:2], *value.stride()[:2],
        _stride(there), wide, rows, keys, scale * _LOG2_E, scale, dim, **_SLOPES,
    )  # fmt: skip
    torch.bmm(slopes, key, out=query_grad)
    torch.bmm(slopes.transpose(1, 2), query, out=key_grad)
    torch.bmm(weights.transpose(1, 2), grad, out=value_grad)


def _stride(there: Tensor | None) -> int:
    return 0 if there is None else there.stride(0)


@triton.jit
def _blocked(scores, there, column, keys):
    """Scores of keys that are not there become so low that they weigh nothing, unless there are no others."""
    inside = column < keys
    if there is not None:
        inside = inside & (tl.load(there + column, inside, 0) != 0)
        scores = tl.where(inside[None, :], scores, -1e30)
    return tl.where((column < keys)[None, :], scores, float("-inf"))


@triton.jit
def _forward(
    query,
    key,
    value,
    there,
    out,
    level,
    key_batch,
    key_row,
    value_batch,
    value_row,
    there_batch,
    rows,
    keys,
    scale,
    DIM: tl.constexpr,
    ROWS: tl.constexpr,
    KEYS: tl.constexpr,
):
    batch = tl.program_id(1).to(tl.int64)
    row, at = tl.program_id(0) * ROWS + tl.arange(0, ROWS), tl.arange(0, DIM)
    key += batch * key_batch
    value += batch * value_batch
    if there is not None:
        there += batch * there_batch
    place = (batch * rows + row[:, None]) * DIM + at[None, :]
    asked = tl.load(query + place, row[:, None] < rows, 0.0)
    highest = tl.full((ROWS,), float("-inf"), tl.float32)
    divisor = tl.zeros((ROWS,), tl.float32)
    result = tl.zeros((ROWS, DIM), tl.float32)
    for start in range(0, keys, KEYS):
        column = start + tl.arange(0, KEYS)
        inside = column < keys
        turned = tl.load(key + column[None, :] * key_row + at[:, None], inside[None, :], 0.0)
        scores = _blocked(tl.dot(asked, turned) * scale, there, column, keys)
        before = highest
        highest = tl.maximum(before, tl.max(scores, 1))
        weight = tl.exp2(scores - highest[:, None])
        shrink = tl.exp2(before - highest)
        divisor = divisor * shrink + tl.sum(weight, 1)
        held = tl.load(value + column[:, None] * value_row + at[None, :], inside[:, None], 0.0)
        result = tl.dot(weight.to(held.dtype), held, result * shrink[:, None])
    tl.store(out + place, (result / divisor[:, None]).to(out.dtype.element_ty), row[:, None] < rows)
    tl.store(level + batch * rows + row, highest + tl.log2(divisor), row < rows)


@triton.jit
def _row_products(left, right, out, rows, DIM: tl.constexpr, ROWS: tl.constexpr):
    row = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    at = row[:, None] * DIM + tl.arange(0, DIM)[None, :]
    there = row[:, None] < rows
    product = tl.load(left + at, there, 0.0).to(tl.float32) * tl.load(right + at, there, 0.0).to(tl.float32)
    tl.store(out + row, tl.sum(product, 1), row < rows)


@triton.jit
def _product(
    left,
    left_stride,
    row,
    rows,
    right,
    right_stride,
    column,
    columns,
    DIM: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
    CHUNK: tl.constexpr,
):
    """`left @ right.T` of some rows of each, (ROWS, COLUMNS), in float32."""
    total = tl.zeros((ROWS, COLUMNS), tl.float32)
    for start in range(0, DIM, CHUNK):
        at = start + tl.arange(0, CHUNK)
        first = tl.load(left + row[:, None] * left_stride + at[None, :], row[:, None] < rows, 0.0)
        second = tl.load(right + column[None, :] * right_stride + at[:, None], column[None, :] < columns, 0.0)
        total = tl.dot(first, second, total)
    return total


@triton.jit
def _slopes(
    query,
    key,
    value,
    there,
    grad,
    level,
    inner,
    weights,
    slopes,
    key_batch,
    key_row,
    value_batch,
    value_row,
    there_batch,
    wide,
    rows,
    keys,
    scale,
    slope_scale,
    DIM: tl.constexpr,
    ROWS: tl.constexpr,
    KEYS: tl.constexpr,
    CHUNK: tl.constexpr,
):
    """One tile of the weights, softmax(scores), and of the gradient of the products of queries and keys."""
    batch, tiles = tl.program_id(1).to(tl.int64), tl.cdiv(keys, KEYS)
    row = tl.program_id(0) // tiles * ROWS + tl.arange(0, ROWS)
    column = tl.program_id(0) % tiles * KEYS + tl.arange(0, KEYS)
    first = batch * rows * DIM
    scores = _product(
        query + first, DIM, row, rows, key + batch * key_batch, key_row, column, keys, DIM, ROWS, KEYS, CHUNK
    )
    if there is not None:
        there += batch * there_batch
    highest = tl.load(level + batch * rows + row, row < rows, 0.0)
    weight = tl.exp2(_blocked(scores * scale, there, column, keys) - highest[:, None])
    change = _product(
        grad + first, DIM, row, rows, value + batch * value_batch, value_row, column, keys, DIM, ROWS, KEYS, CHUNK
    )
    mean = tl.load(inner + batch * rows + row, row < rows, 0.0)
    slope = weight * (change - mean[:, None]) * slope_scale
    at = (batch * rows + row[:, None]) * wide + column[None, :]
    # Zeros into the room beside the keys: a mask of columns would have each number stored on its own, where there are
    # no multiple of 16.
    stored = row[:, None] < rows
    tl.store(weights + at, weight.to(weights.dtype.element_ty), stored)
    tl.store(slopes + at, slope.to(slopes.dtype.element_ty), stored)

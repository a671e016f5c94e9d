# mypy: disable-error-code="no-untyped-def, untyped-decorator, no-untyped-call"
"""The functions of `pointwise.py` as Triton kernels, for CUDA tensors. See there for shapes and meaning.

Gradients of adapters are in `triton_gradients.py`, but for those that GEGLU's kernel takes along.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import triton
import triton.language as tl
from torch import Tensor

from . import pointwise
from .pointwise import Whole
from .triton_gradients import NARROW, ends, split_rows, sum_parts, sum_strips, three, tile_rank
from .triton_gradients import a_gradient as a_gradient
from .triton_gradients import adapter_gradients as adapter_gradients

_ADD = {"ROWS": 64, "COLUMNS": 64, "num_warps": 4}  # A tile of `_add_low_rank` and of `_rms_norm_low_rank_backward`.
# Triton 3.2 dies of tiles with three axes that it is to load ahead.
_AHEAD = pointwise.triton_version() >= (3, 3)
# A tile of `_geglu_adapted`, and one of `_geglu_backward`.
_ADAPTED = {"ROWS": 32, "COLUMNS": 128, "num_warps": 4, "num_stages": 3 if _AHEAD else 1}
_BACKWARD = {"ROWS": 16, "COLUMNS": 128, "num_warps": 4, "num_stages": 4 if _AHEAD else 1}
_PROGRAMS = 2048  # Enough to fill any GPU several times.
_STRIPS = 8  # Of the columns in `_geglu_adapted`: enough programs where rows are few.
MANY_ROWS = 4096  # From here on GEGLU takes the adapter after it along; programs for fewer would not fill a GPU.


def beside(left: Sequence[Tensor], right: Tensor, out: Tensor, size: int) -> None:
    rows, width = out.shape
    start, tile = (0, (8, 1024)) if left else (size, (16, 64))
    first, second = ends(left, rows)
    _beside[(triton.cdiv(rows, tile[0]), triton.cdiv(width - start, tile[1]))](
        *three(left), right, out, *three([part.stride(0) for part in left]), right.stride(0), out.stride(0), first,
        second, start, rows, size, right.shape[1], width, len(left), *tile, num_warps=4,
    )  # fmt: skip


def place(
    matrices_a: Sequence[Tensor],
    matrices_b: Sequence[Tensor],
    scalings: Sequence[float],
    stacked_a: Tensor,
    stacked_b: Tensor,
) -> None:
    largest = max(stacked_a.numel(), *(len(b) * stacked_b.shape[1] for b in matrices_b))
    _place[(triton.cdiv(largest, 1024), 2, len(matrices_a))](
        *three([a.contiguous() for a in matrices_a]), *three([b.contiguous() for b in matrices_b]), stacked_a,
        stacked_b, *three([len(a) for a in matrices_a]), *three(scalings), *ends(matrices_a, len(stacked_a)),
        len(stacked_a), *ends(matrices_b, len(stacked_b)), len(stacked_b), *stacked_a.shape[1:], stacked_b.shape[1],
        len(matrices_a), 1024, num_warps=4,
    )  # fmt: skip


def rms_norm(x: Tensor, weight: Tensor, eps: float, out: Tensor) -> Tensor:
    rows, dim = x.shape
    scale = x.new_empty(rows, 1, dtype=torch.float32)
    block = triton.next_power_of_2(dim)
    _rms_norm[(rows,)](x, weight, out, scale, x.stride(0), out.stride(0), eps, dim, block, num_warps=8)
    return scale


def rms_norm_backward(
    grad: Tensor,
    x: Tensor,
    weight: Tensor,
    scale: Tensor,
    added: Tensor | None,
    out: Tensor,
    low_rank: pointwise.LowRank | None,
) -> None:
    rows, dim = x.shape
    if low_rank is not None and len(low_rank.a) > 2 * NARROW:  # It is of two adapters, gate's and up's.
        grad, low_rank = torch.addmm(grad, low_rank.inner_grad, low_rank.a), None
    block = triton.next_power_of_2(dim)
    strides = (grad.stride(0), x.stride(0), 0 if added is None else added.stride(0), out.stride(0))
    if low_rank is None:
        _rms_norm_backward[(rows,)](grad, x, weight, scale, added, out, *strides, dim, block, num_warps=8)
        return
    inner_grad, a, inner = low_rank
    products, r = torch.empty_like(scale), tile_rank(len(a))
    _rms_norm_products[(rows,)](
        grad, x, weight, scale, inner_grad, inner, products, *strides[:2], inner_grad.stride(0), inner.stride(0),
        dim, block, len(a), r, num_warps=4,
    )  # fmt: skip
    _rms_norm_low_rank_backward[(triton.cdiv(dim, _ADD["COLUMNS"]), triton.cdiv(rows, _ADD["ROWS"]))](
        grad, x, weight, scale, products, added, out, inner_grad, a, *strides, inner_grad.stride(0), rows, dim,
        len(a), r, **_ADD,
    )  # fmt: skip


def add_low_rank(residual: Tensor, base: Tensor, hidden: Tensor, b: Tensor, out: Tensor) -> None:
    rows, dim = base.shape
    grid = (triton.cdiv(dim, _ADD["COLUMNS"]), triton.cdiv(rows, _ADD["ROWS"]))
    _add_low_rank[grid](residual, base, hidden, b, out, rows, dim, hidden.shape[1], tile_rank(hidden.shape[1]), **_ADD)


def geglu(gate_up: Tensor, out: Tensor, a: Tensor | None) -> Tensor | None:
    rows, dim = out.shape
    if a is not None and len(a) <= NARROW and rows >= MANY_ROWS:
        return _geglu_with_adapter(gate_up, out, a)
    block = min(1024, triton.next_power_of_2(dim))
    _geglu[(rows, triton.cdiv(dim, block))](gate_up, out, gate_up.stride(0), out.stride(0), dim, block, num_warps=4)
    return None if a is None else out @ a.T


def _geglu_with_adapter(gate_up: Tensor, out: Tensor, a: Tensor) -> Tensor:
    rows, dim = out.shape
    strip = triton.cdiv(triton.cdiv(dim, _STRIPS), _ADAPTED["COLUMNS"]) * _ADAPTED["COLUMNS"]
    strips = triton.cdiv(dim, strip)
    parts = out.new_empty(strips, len(a), rows, dtype=torch.float32)
    _geglu_adapted[(triton.cdiv(rows, _ADAPTED["ROWS"]), strips)](
        gate_up, out, a, parts, gate_up.stride(0), out.stride(0), rows, dim, strip, len(a), tile_rank(len(a)),
        **_ADAPTED,
    )  # fmt: skip
    hidden = out.new_empty(rows, len(a))
    sum_strips(parts, hidden)
    return hidden


def geglu_backward(
    grad: Tensor,
    gate_up: Tensor,
    inner_grad: Tensor | None,
    inner: Tensor | None,
    ranks: tuple[int, int],
    out: Tensor,
) -> tuple[Tensor | None, tuple[Tensor, Tensor] | None]:
    rows, dim = grad.shape
    after = 0 if inner_grad is None else inner_grad.shape[1]
    before = (0, 0) if inner is None or max(ranks) > NARROW else ranks
    block = tile_rank(after, *before)
    # The sums of more ranks would not fit the registers.
    tile = _BACKWARD if block <= 128 else _BACKWARD | {"COLUMNS": 64}
    columns = triton.cdiv(dim, tile["COLUMNS"])
    splits, length = split_rows(rows, tile["ROWS"], 4, _PROGRAMS // columns)
    sums = grad.new_empty(splits, (after + sum(before)) * dim, dtype=torch.float32)
    _geglu_backward[(columns, splits)](
        grad, gate_up, out, inner_grad, inner, sums, rows, dim, length, out.stride(0),
        0 if inner_grad is None else inner_grad.stride(0), 0 if inner is None else inner.stride(0), after, *before,
        block, **tile,
    )  # fmt: skip
    parts = sum_parts(sums).split([rank * dim for rank in (after, *before)])
    grad_a = parts[0].view(after, dim) if after else None
    if inner is None:
        return grad_a, None
    if not sum(before):
        return grad_a, pointwise.pair_products(out, inner, ranks)
    return grad_a, (parts[1].view(dim, before[0]), parts[2].view(dim, before[1]))


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


@triton.jit
def _beside(
    upper,
    middle,
    lower,
    right,
    out,
    upper_stride,
    middle_stride,
    lower_stride,
    right_stride,
    out_stride,
    first,
    second,
    start,
    rows,
    size,
    rank,
    width,
    LEFT: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
):
    """On the left are `LEFT` tensors under one another, the second from row `first` on, the third from `second`."""
    row = (tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS))[:, None]
    begin = start + tl.program_id(1) * COLUMNS
    column = (begin + tl.arange(0, COLUMNS))[None, :]
    there = row < rows
    value = tl.zeros((ROWS, COLUMNS), out.dtype.element_ty)
    if LEFT > 0:
        value += tl.load(upper + row * upper_stride + column, (row < first) & (column < size), 0.0)
    if LEFT > 1:
        own = (row >= first) & (row < second)
        value += tl.load(middle + (row - first) * middle_stride + column, own & (column < size), 0.0)
    if LEFT > 2:
        own = (row >= second) & there
        value += tl.load(lower + (row - second) * lower_stride + column, own & (column < size), 0.0)
    if begin + COLUMNS > size:
        inside = (column >= size) & (column < size + rank)
        value += tl.load(right + row * right_stride + column - size, there & inside, 0.0)
    tl.store(out + row * out_stride + column, value, there & (column < width))


@triton.jit
def _place(
    a0,
    a1,
    a2,
    b0,
    b1,
    b2,
    stacked_a,
    stacked_b,
    rank0,
    rank1,
    rank2,
    scaling0,
    scaling1,
    scaling2,
    column1,
    column2,
    columns,
    row1,
    row2,
    rows,
    size,
    width,
    ADAPTERS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """One program: a part of the A or the B of one adapter; from `column1` and `row1` on are those of the second."""
    adapter = tl.program_id(2)
    if adapter == 0:
        _place_one(a0, b0, stacked_a, stacked_b, rank0, scaling0, 0, column1, 0, row1, size, width, BLOCK)
    elif adapter == 1:
        if ADAPTERS > 1:
            _place_one(a1, b1, stacked_a, stacked_b, rank1, scaling1, column1, column2, row1, row2, size, width, BLOCK)
    else:
        if ADAPTERS > 2:
            _place_one(a2, b2, stacked_a, stacked_b, rank2, scaling2, column2, columns, row2, rows, size, width, BLOCK)


@triton.jit
def _place_one(a, b, stacked_a, stacked_b, rank, scaling, column, columns, row, rows, size, width, BLOCK: tl.constexpr):
    at = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    element = stacked_a.dtype.element_ty
    if tl.program_id(1) == 0:
        own_a = tl.load(a + at, at < rank * size, 0.0).to(element)
        tl.store(stacked_a + column * size + at, own_a, at < (columns - column) * size)
    else:
        own_row, own_column = at // width, at % width - column
        there = (own_row < rows - row) & (own_column >= 0) & (own_column < rank)
        own_b = tl.load(b + own_row * rank + own_column, there, 0.0).to(tl.float32) * scaling
        tl.store(stacked_b + row * width + at, own_b.to(element), at < (rows - row) * width)


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
def _rms_norm_products(
    grad,
    x,
    weight,
    scales,
    inner_grad,
    inner,
    products,
    grad_stride,
    stride,
    inner_grad_stride,
    inner_stride,
    DIM: tl.constexpr,
    BLOCK: tl.constexpr,
    R: tl.constexpr,
    R_BLOCK: tl.constexpr,
):
    """Of each row, the sum over the norm's output times its whole gradient; the low-rank part has it inside."""
    row = tl.program_id(0).to(tl.int64)
    at, rank = tl.arange(0, BLOCK), tl.arange(0, R_BLOCK)
    inside = at < DIM
    value = tl.load(x + row * stride + at, inside, 0.0).to(tl.float32)
    slope = tl.load(grad + row * grad_stride + at, inside, 0.0).to(tl.float32)
    slope *= 1 + tl.load(weight + at, inside, 0.0).to(tl.float32)
    left = tl.load(inner_grad + row * inner_grad_stride + rank, rank < R, 0.0).to(tl.float32)
    right = tl.load(inner + row * inner_stride + rank, rank < R, 0.0).to(tl.float32)
    tl.store(products + row, tl.sum(slope * value) * tl.load(scales + row) + tl.sum(left * right))


@triton.jit
def _rms_norm_low_rank_backward(
    grad,
    x,
    weight,
    scales,
    products,
    added,
    out,
    inner_grad,
    a,
    grad_stride,
    stride,
    added_stride,
    out_stride,
    inner_grad_stride,
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
    there = (row < rows) & (column < dim)
    left = tl.load(inner_grad + row * inner_grad_stride + rank[None, :], (row < rows) & (rank[None, :] < R), 0.0)
    right = tl.load(a + rank[:, None] * dim + column, (rank[:, None] < R) & (column < dim), 0.0)
    slope = tl.load(grad + row * grad_stride + column, there, 0.0).to(tl.float32) + tl.dot(left, right)
    slope *= 1 + tl.load(weight + column, column < dim, 0.0).to(tl.float32)
    scale = tl.load(scales + row, row < rows, 0.0)
    normed = tl.load(x + row * stride + column, there, 0.0).to(tl.float32) * scale
    result = scale * (slope - normed * (tl.load(products + row, row < rows, 0.0) / dim))
    if added is not None:
        result += tl.load(added + row * added_stride + column, there, 0.0).to(tl.float32)
    tl.store(out + row * out_stride + column, result.to(out.dtype.element_ty), there)


@triton.jit
def _gelu(gate):
    """gelu(gate) in its tanh form, written with a sigmoid, and its slope.

    exp2 and rsqrt are one instruction each, where exp and a division are several.
    """
    square = gate * gate
    root = tl.rsqrt(1 + tl.exp2(gate * (-2.302208198144325 - 0.1029432395800235 * square)))
    part = root * root
    gelu = gate * part
    return gelu, part + (gelu - gelu * part) * (1.5957691216057308 + 0.21406444881780073 * square)


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
def _as_factor(tile, like):
    """(1, ROWS, COLUMNS) to (ROWS, COLUMNS), as a factor of a product.

    A sum over one element: no work, but the compiler stops there. What it can follow back to a load, it computes a
    second time, where the matrix unit wants it, so that GEGLU and its slope would cost twice.
    """
    return tl.sum(tile, 0).to(like.dtype.element_ty)


@triton.jit
def _geglu_adapted(
    gate_up,
    out,
    a,
    parts,
    stride,
    out_stride,
    rows,
    dim,
    strip,
    R: tl.constexpr,
    R_BLOCK: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
):
    """One program: some rows, a strip of the columns. Matrix units are fastest with the wide tile on the right."""
    local, rank = tl.arange(0, ROWS), tl.arange(0, R_BLOCK)[:, None]
    first, begin = tl.program_id(0).to(tl.int64) * ROWS, tl.program_id(1) * strip
    inside = local < rows - first
    gate_up += first * stride
    out += first * out_stride
    total = tl.zeros((R_BLOCK, ROWS), tl.float32)
    for start in range(begin, min(begin + strip, dim), COLUMNS):
        column = start + tl.arange(0, COLUMNS)
        there = (inside[:, None] & (column < dim))[None]
        at = (local[:, None] * stride + column)[None]
        gate = tl.load(gate_up + at, there, 0.0).to(tl.float32)
        up = tl.load(gate_up + dim + at, there, 0.0).to(tl.float32)
        gelu, _ = _gelu(gate)
        activation = gelu * up
        tl.store(out + (local[:, None] * out_stride + column)[None], activation.to(out.dtype.element_ty), there)
        factor = tl.load(a + rank * dim + column, (rank < R) & (column < dim), 0.0)
        total = tl.dot(factor, tl.trans(_as_factor(activation, out)), total)
    target = parts + (tl.program_id(1) * R + rank).to(tl.int64) * rows + first + local[None, :]
    tl.store(target, total, inside[None, :] & (rank < R))


@triton.jit
def _geglu_backward(
    grad,
    gate_up,
    out,
    inner_grad,
    inner,
    sums,
    rows,
    dim,
    length,
    out_stride,
    inner_grad_stride,
    inner_stride,
    AFTER: tl.constexpr,
    GATE: tl.constexpr,
    UP: tl.constexpr,
    R_BLOCK: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
):
    """One program: some columns, one part of the rows; what is summed over rows stays in registers."""
    column, rank = tl.program_id(0) * COLUMNS + tl.arange(0, COLUMNS), tl.arange(0, R_BLOCK)[:, None]
    split = tl.program_id(1)
    element = out.dtype.element_ty
    after = tl.zeros((R_BLOCK, COLUMNS), tl.float32)
    of_gate, of_up = after, after
    local = tl.arange(0, ROWS)
    # Places within a tile are 32-bit numbers, computed once; only where a tile begins needs 64.
    inside = column[None, :] < dim
    at = (local[:, None] * (2 * dim) + column)[None]
    grad_at = (local[:, None] * dim + column)[None]
    out_at = (local[:, None] * out_stride + column)[None]
    after_at = local[None, :] * inner_grad_stride + rank
    inner_at = local[None, :] * inner_stride + rank
    for start in range(split * length, min((split + 1) * length, rows), ROWS):
        first = tl.cast(start, tl.int64)
        left = rows - start
        there = ((local[:, None] < left) & inside)[None]
        tile, out_tile = gate_up + first * (2 * dim), out + first * out_stride
        gate = tl.load(tile + at, there, 0.0).to(tl.float32)
        up = tl.load(tile + dim + at, there, 0.0).to(tl.float32)
        slope = tl.load(grad + first * dim + grad_at, there, 0.0).to(tl.float32)
        gelu, gelu_slope = _gelu(gate)
        gate_grad, up_grad = slope * up * gelu_slope, slope * gelu
        tl.store(out_tile + out_at, gate_grad.to(element), there)
        tl.store(out_tile + dim + out_at, up_grad.to(element), there)
        row_there = local[None, :] < left
        if AFTER > 0:
            factor = tl.load(inner_grad + first * inner_grad_stride + after_at, row_there & (rank < AFTER), 0.0)
            after = tl.dot(factor, _as_factor(gelu * up, out), after)
        if GATE > 0:
            factor = tl.load(inner + first * inner_stride + inner_at, row_there & (rank < GATE), 0.0)
            of_gate = tl.dot(factor, _as_factor(gate_grad, out), of_gate)
        if UP > 0:
            factor = tl.load(inner + first * inner_stride + GATE + inner_at, row_there & (rank < UP), 0.0)
            of_up = tl.dot(factor, _as_factor(up_grad, out), of_up)
    sums += split.to(tl.int64) * (AFTER + GATE + UP) * dim
    if AFTER > 0:
        tl.store(sums + rank * dim + column[None, :], after, (rank < AFTER) & inside)
    if GATE > 0:
        tl.store(sums + (AFTER * dim + column * GATE)[None, :] + rank, of_gate, (rank < GATE) & inside)
    if UP > 0:
        tl.store(sums + ((AFTER + GATE) * dim + column * UP)[None, :] + rank, of_up, (rank < UP) & inside)


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

"""What two towers do apart from each other, at once: the second tower on a CUDA stream of its own.

The action expert's kernels are short and fill a fraction of a GPU, so they run among those of the prefix, on a stream
that goes first. The kernels are the same, and so are their results.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor


@functools.cache
def second(device: torch.device) -> torch.cuda.Stream:
    """The stream of the second tower; one for the process, as each has a workspace of cuBLAS's."""
    return torch.cuda.Stream(device, priority=-1)


def alone() -> bool:
    """Whether torch.distributed is not in use: FSDP2 and DDP expect the whole backward pass on one stream."""
    return not (dist.is_available() and dist.is_initialized())


def side_by_side(
    function: Callable[..., Any], first: Sequence[Any], other: Sequence[Any], stream: torch.cuda.Stream | None
) -> tuple[Any, Any]:
    """`function(*first), function(*other)`, the latter on `stream` if there is one; both are done for what comes next.

    Autograd runs each part of the backward pass on the stream of its forward pass, and orders what they exchange. It is
    for the allocator that tensors which cross are recorded here: it must not give their memory away too early.
    """
    if stream is None:
        return function(*first), function(*other)
    main = torch.cuda.current_stream(stream.device)
    stream.wait_stream(main)
    _record(other, stream)
    result = function(*first)
    with torch.cuda.stream(stream):
        beside = function(*other)
    main.wait_stream(stream)
    _record(beside if isinstance(beside, tuple) else (beside,), main)
    return result, beside


def _record(values: Sequence[Any], stream: torch.cuda.Stream) -> None:
    for value in values:
        if isinstance(value, Tensor):
            value.record_stream(stream)

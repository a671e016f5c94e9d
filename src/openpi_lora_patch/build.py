"""Building a model without random numbers, where a strict load replaces every one of them next.

For pi0 they take half a minute on a CPU. Constants (zeros of biases, ones of norms) are set as ever.
"""

from __future__ import annotations

import contextlib
import contextvars
from collections.abc import Iterator
from typing import Any

from torch.overrides import TorchFunctionMode

# Of `torch.nn.init` and of `torch.Tensor`, which share their names; all return their tensor.
_RANDOM = frozenset(
    {"kaiming_normal_", "kaiming_uniform_", "normal_", "trunc_normal_", "uniform_", "xavier_normal_", "xavier_uniform_"}
)
_CHECKPOINT_FOLLOWS = contextvars.ContextVar("_CHECKPOINT_FOLLOWS", default=False)


@contextlib.contextmanager
def checkpoint_follows() -> Iterator[None]:
    """Within it, in this thread, a model that is built is then loaded into, strictly."""
    token = _CHECKPOINT_FOLLOWS.set(True)
    try:
        yield
    finally:
        _CHECKPOINT_FOLLOWS.reset(token)


def initialising() -> contextlib.AbstractContextManager[Any]:
    """Within it weights are made: with random values; where a checkpoint follows, with zeros in their place."""
    return _WithoutRandom() if _CHECKPOINT_FOLLOWS.get() else contextlib.nullcontext()


class _WithoutRandom(TorchFunctionMode):
    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if getattr(func, "__name__", "") in _RANDOM:
            # Not left as memory holds them: truncated ones are drawn anew until all lie within their bounds.
            return (args[0] if args else kwargs["tensor"]).detach().zero_()
        return func(*args, **kwargs)

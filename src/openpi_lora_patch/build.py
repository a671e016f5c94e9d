"""Building a model without random numbers, where a strict load replaces every one of them next.

For pi0 they take half a minute on a CPU, and 14 GB in float32. Constants of norms and biases are set as ever.
"""

from __future__ import annotations

import contextlib
import contextvars
from collections.abc import Iterator
from typing import Any

import torch
from torch import nn
from torch.overrides import TorchFunctionMode

from .checkpoint.training import absent
from .errors import LoRAError

# Of `torch.nn.init` and of `torch.Tensor`, which share their names; all return their tensor.
_RANDOM = frozenset(
    {"kaiming_normal_", "kaiming_uniform_", "normal_", "trunc_normal_", "uniform_", "xavier_normal_", "xavier_uniform_"}
)
_LARGE = 2**16  # Elements.
_CHECKPOINT_FOLLOWS = contextvars.ContextVar("_CHECKPOINT_FOLLOWS", default=False)


@contextlib.contextmanager
def checkpoint_follows() -> Iterator[None]:
    """Within it, in this thread, a model that is built is then loaded into, strictly."""
    token = _CHECKPOINT_FOLLOWS.set(True)
    try:
        yield
    finally:
        _CHECKPOINT_FOLLOWS.reset(token)


def follows() -> bool:
    """Whether a checkpoint follows what is built here."""
    return _CHECKPOINT_FOLLOWS.get()


def initialising() -> contextlib.AbstractContextManager[Any]:
    """Within it weights are made: with random values; where a checkpoint follows, large ones without any memory."""
    return _WithoutValues() if follows() else contextlib.nullcontext()


class _WithoutValues(TorchFunctionMode):
    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if getattr(func, "__name__", "") in _RANDOM:
            # Not left as memory holds them: truncated ones are drawn anew until all lie within their bounds.
            return (args[0] if args else kwargs["tensor"]).detach().zero_()
        if func is torch.empty and kwargs.get("device") is None:
            planned = func(*args, **{**kwargs, "device": "meta"})
            return planned if planned.numel() >= _LARGE else func(*args, **kwargs)
        return func(*args, **kwargs)


def complete(model: Any) -> None:
    """Give the large weights of a model whose checkpoint follows their memory, and refuse its forwards until then.

    In the dtype that they are to have, and without those that were taken out meanwhile: openpi makes all in float32.
    """
    made: dict[Any, nn.Parameter] = {}
    for module in model.modules():
        for name, weight in module.named_parameters(recurse=False):
            if weight.is_meta:
                if weight not in made:
                    made[weight] = nn.Parameter(torch.zeros(weight.shape, dtype=weight.dtype), weight.requires_grad)
                setattr(module, name, made[weight])
    model.awaits_checkpoint = True
    model.register_forward_pre_hook(_require_checkpoint)
    model.register_load_state_dict_post_hook(_note_checkpoint)


def _note_checkpoint(model: Any, keys: Any) -> None:
    model.awaits_checkpoint = model.awaits_checkpoint and bool(absent(model, keys.missing_keys))


def _require_checkpoint(model: Any, *_: Any) -> None:
    if model.awaits_checkpoint:
        raise LoRAError(
            "A model that was built for a checkpoint was never loaded: its weights are zeros.",
            fix="load the whole checkpoint before the first forward",
        )

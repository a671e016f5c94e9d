"""Loading a checkpoint one tensor at a time, into whatever form and onto whatever device the model has.

`safetensors.torch.load_model` has every page of the file in memory by its end; asks the model for a state dict, which
a quantised base makes in full precision; and, given a GPU as `device`, puts the whole file there first.
"""

from __future__ import annotations

import contextlib
import functools
from typing import Any

import safetensors.torch
from torch import nn

from ..lora.inject import lora_layers
from ..replace import Overlay
from . import cache, files
from .stored import stored_tensors
from .training import absent, whole


@functools.wraps(safetensors.torch.load_model)
def load_model(
    model: nn.Module, filename: files.Path, strict: bool = True, *args: Any, keep: bool = False, **kwargs: Any
) -> tuple[list[str], list[str]]:
    """`safetensors.torch.load_model`; for a model with adapters a tensor at a time, wherever they are wanted first.

    Args:
        model, filename, strict: see there.
        keep: keep the quantised form of what is loaded beside the file, and take it from there, see `cache`.

    Raises:
        CheckpointError: the file cannot be read, does not fit, or (`strict`) lacks tensors or has others; the
            model is as it was.
    """
    if not lora_layers(model):
        return safetensors.torch.load_model(model, filename, strict, *args, **kwargs)
    tensors: dict[str, Any] = dict(stored_tensors(filename))
    layers = cache.quantized_layers(model, tensors) if keep else {}
    held = cache.read(layers, filename) if layers else {}
    with whole(model) if strict else contextlib.nullcontext():
        missing, unexpected = model.load_state_dict(tensors | held, strict=False)
    if layers and not held:
        cache.write(layers, filename)
    return absent(model, missing), unexpected


def streaming(*, keep: bool) -> Overlay:
    """What a program is given in the place of the module `safetensors`; `keep` as for `load_model`."""
    loading = functools.partial(load_model, keep=keep)
    return Overlay(safetensors, torch=Overlay(safetensors.torch, load_model=loading))

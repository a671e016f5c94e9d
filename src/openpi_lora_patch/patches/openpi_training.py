"""openpi's `train_pytorch.py` without pickles, with the training config's name in adapter-only checkpoints, and without
random numbers for weights that it then loads.

The script calls `torch.save` and `torch.load(weights_only=False)` on `optimizer.pt` and `metadata.pt`. It runs as
`__main__`, which no import hook sees, so it is patched when it builds its model: its own `torch`, `safetensors`
and `save_checkpoint`, nothing of those modules themselves. What it loads then comes a tensor at a time.

Source: openpi, `scripts/train_pytorch.py` (commit 15a9616), whose code runs unchanged.
"""

from __future__ import annotations

import contextlib
import functools
import sys
from typing import Any

import torch

from ..build import checkpoint_follows
from ..checkpoint import optimizer
from ..checkpoint.streaming import streaming
from ..replace import Overlay, replace
from ..settings import Settings


def patch(undo: contextlib.ExitStack, settings: Settings) -> None:
    """Patch the running program, if it is openpi's script and was not patched before; `undo` takes what restores it.

    With adapter-only checkpoints it writes no pickles either.
    """
    script = _script()
    if script is not None and vars(script).get("torch") is torch:
        save = optimizer.save if settings.save == "adapter" else torch.save
        replace(undo, script, "torch", Overlay(torch, save=save, load=optimizer.load))
        replace(undo, script, "safetensors", streaming(keep=settings.base_cache))
        replace(undo, script, "save_checkpoint", _naming(script.save_checkpoint))


def prepare(undo: contextlib.ExitStack) -> None:
    """Have the running program, if it is openpi's script, build a model with adapters for the weights that follow."""
    script = _script()
    if script is not None and not hasattr(script.train_loop, "__wrapped__"):
        replace(undo, script, "train_loop", _loading(script.train_loop))


def _script() -> Any:
    main = sys.modules["__main__"]
    return main if hasattr(main, "train_loop") and hasattr(main, "save_checkpoint") else None


def _loading(original: Any) -> Any:
    @functools.wraps(original)
    def train_loop(config: Any) -> None:
        variants = [getattr(config.model, f"{tower}_variant", "") for tower in ("paligemma", "action_expert")]
        # Not one to resume from: it may hold adapters alone, for a base that a seed made.
        weights = config.pytorch_weight_path is not None and any(name.endswith("_lora") for name in variants)
        with checkpoint_follows() if weights else contextlib.nullcontext():
            original(config)

    return train_loop


def _naming(original: Any) -> Any:
    @functools.wraps(original)
    def save_checkpoint(model: Any, optimizer: Any, global_step: int, config: Any, *args: Any) -> None:
        getattr(model, "module", model).openpi_config = config.name
        original(model, optimizer, global_step, config, *args)

    return save_checkpoint

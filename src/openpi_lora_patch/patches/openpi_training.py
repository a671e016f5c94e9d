"""openpi's `train_pytorch.py` without pickles, and with the training config's name in adapter-only checkpoints.

The script calls `torch.save` and `torch.load(weights_only=False)` on `optimizer.pt` and `metadata.pt`. It runs as
`__main__`, which no import hook sees, so it is patched when it builds its model: its own name `torch` and its own
`save_checkpoint`, nothing of torch itself.

Source: openpi, `scripts/train_pytorch.py` (commit 15a9616), whose code runs unchanged.
"""

from __future__ import annotations

import contextlib
import functools
import sys
from types import ModuleType
from typing import Any

import torch

from ..checkpoint import optimizer
from ..replace import replace


def patch(undo: contextlib.ExitStack, *, adapters_only: bool) -> None:
    """Patch the running program, if it is openpi's script and was not patched before.

    Args:
        undo: takes what restores it.
        adapters_only: write no pickles, too; without, only what is read is held to be none.
    """
    script: Any = sys.modules["__main__"]
    if vars(script).get("torch") is torch and hasattr(script, "train_loop") and hasattr(script, "save_checkpoint"):
        replace(undo, script, "torch", _Torch(optimizer.save if adapters_only else torch.save))
        replace(undo, script, "save_checkpoint", _naming(script.save_checkpoint))


class _Torch(ModuleType):
    """torch, but for the two functions."""

    def __init__(self, save: Any) -> None:
        super().__init__(torch.__name__)
        self.save, self.load = save, optimizer.load

    def __getattr__(self, name: str) -> Any:
        return getattr(torch, name)


def _naming(original: Any) -> Any:
    @functools.wraps(original)
    def save_checkpoint(model: Any, optimizer: Any, global_step: int, config: Any, *args: Any) -> None:
        getattr(model, "module", model).openpi_config = config.name
        original(model, optimizer, global_step, config, *args)

    return save_checkpoint

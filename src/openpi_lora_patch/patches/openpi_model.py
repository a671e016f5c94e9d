"""`BaseModelConfig.load_pytorch`, which serving calls: its model is not initialised before it is loaded, and streamed.

Source: openpi, `models/model.py` (commit 15a9616).
"""

from __future__ import annotations

import contextlib
import functools
from types import ModuleType
from typing import Any

from ..build import checkpoint_follows
from ..checkpoint.streaming import streaming
from ..replace import replace
from ..settings import Settings


def patch(module: ModuleType, settings: Settings, undo: contextlib.ExitStack) -> None:
    """Say, while `load_pytorch` runs, that a checkpoint follows, and load that one tensor at a time."""
    if settings.skip_init:
        cls = module.BaseModelConfig
        replace(undo, cls, "load_pytorch", _loading(cls.load_pytorch))
    replace(undo, module, "safetensors", streaming(keep=settings.base_cache))


def _loading(original: Any) -> Any:
    @functools.wraps(original)
    def load_pytorch(self: Any, *args: Any, **kwargs: Any) -> Any:
        with checkpoint_follows():
            return original(self, *args, **kwargs)

    return load_pytorch

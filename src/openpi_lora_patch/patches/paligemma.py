"""Have openpi's PaliGemma models, and no others, converted as they are built."""

from __future__ import annotations

import contextlib
import contextvars
from collections.abc import Iterator
from types import ModuleType
from typing import Any

from ..settings import Settings
from . import gemma

_vision: contextvars.ContextVar[dict[str, int] | None] = contextvars.ContextVar("vision", default=None)


@contextlib.contextmanager
def vision_config(**sizes: int) -> Iterator[None]:
    """Build the openpi models inside with these sizes on their `vision_config`; openpi's own is always So400m."""
    token = _vision.set(sizes)
    try:
        yield
    finally:
        _vision.reset(token)


def patch(module: ModuleType, settings: Settings, undo: contextlib.ExitStack) -> None:
    """Convert openpi's PaliGemma models as they are built."""
    gemma.wrap_init(module.PaliGemmaModel, undo, before=_fit_vision, after=_convert_model)
    gemma.wrap_init(module.PaliGemmaForConditionalGeneration, undo, before=_fit_vision, after=_convert)


def _fit_vision(config: Any) -> None:
    # openpi fixes the projection at 2048, which fits its full-size language model only.
    sizes = {"projection_dim": config.text_config.hidden_size, **(_vision.get() or {})}
    for name, value in sizes.items():
        setattr(config.vision_config, name, value)


def _convert_model(built: Any) -> None:
    from ..models import paligemma

    paligemma.convert_model(built)


def _convert(built: Any) -> None:
    from ..models import paligemma

    paligemma.convert(built)

"""What openpi's copied `modeling_paligemma.py` does, for the instances that openpi configured and for no others.

Source: openpi, `models_pytorch/transformers_replace/models/paligemma` (transformers 4.53.2); behaviour only.
"""

from __future__ import annotations

import contextlib
import contextvars
from collections.abc import Iterator
from types import ModuleType
from typing import Any

from torch import Tensor
from transformers.models.paligemma import modeling_paligemma as stock

from ..settings import Settings
from . import gemma, siglip

_vision: contextvars.ContextVar[dict[str, int]] = contextvars.ContextVar("vision", default={})


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
    gemma.wrap_init(module.PaliGemmaForConditionalGeneration, undo, before=_fit_vision, after=convert)


class PaliGemmaModel(stock.PaliGemmaModel):  # type: ignore[misc]
    """PaliGemma whose image features are not divided by sqrt(hidden_size)."""

    def get_image_features(self, pixel_values: Tensor) -> Tensor:
        """Image embeddings (batch, patches, hidden) of `pixel_values` (batch, 3, height, width) in [-1, 1]."""
        return self.multi_modal_projector(self.vision_tower(pixel_values).last_hidden_state)


class PaliGemmaForConditionalGeneration(stock.PaliGemmaForConditionalGeneration):  # type: ignore[misc]
    """PaliGemma with the shortcuts to its parts that releases from 5.0.0 on lack."""

    @property
    def language_model(self) -> Any:
        return self.model.language_model

    @property
    def vision_tower(self) -> Any:
        return self.model.vision_tower

    @property
    def multi_modal_projector(self) -> Any:
        return self.model.multi_modal_projector


def convert(paligemma: Any) -> None:
    """Turn a stock `PaliGemmaForConditionalGeneration`, weights and all, into the one above."""
    model = paligemma.model
    paligemma.__class__ = PaliGemmaForConditionalGeneration
    model.__class__ = PaliGemmaModel
    model.vision_tower = siglip.convert(model.vision_tower)
    gemma.convert(model.language_model)


def _fit_vision(config: Any) -> None:
    # openpi fixes the projection at 2048, which fits its full-size language model only.
    sizes = {"projection_dim": config.text_config.hidden_size, **_vision.get()}
    for name, value in sizes.items():
        setattr(config.vision_config, name, value)

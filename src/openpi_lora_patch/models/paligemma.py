"""What openpi's copied `modeling_paligemma.py` does, as classes that a stock model is converted to once it is built.

Source: openpi, `models_pytorch/transformers_replace/models/paligemma` (transformers 4.53.2); behaviour only.
"""

from __future__ import annotations

from typing import Any

from torch import Tensor
from transformers.models.paligemma import modeling_paligemma as stock

from . import gemma, siglip


class PaliGemmaModel(stock.PaliGemmaModel):
    """PaliGemma whose image features are not divided by sqrt(hidden_size)."""

    def __init__(self, config: Any) -> None:
        super().__init__(config)
        convert_model(self)

    def get_image_features(self, pixel_values: Tensor) -> Tensor:
        """Image embeddings (batch, patches, hidden) of `pixel_values` (batch, 3, height, width) in [-1, 1]."""
        return self.multi_modal_projector(self.vision_tower(pixel_values).last_hidden_state)


class PaliGemmaForConditionalGeneration(stock.PaliGemmaForConditionalGeneration):
    """PaliGemma with the shortcuts to its parts that releases from 5.0.0 on lack."""

    def __init__(self, config: Any) -> None:
        super().__init__(config)
        convert(self)

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
    paligemma.__class__ = PaliGemmaForConditionalGeneration
    convert_model(paligemma.model)
    paligemma.tie_weights()  # 5.0.0 leaves it out on the meta device.


def convert_model(model: Any) -> None:
    """Turn a stock `PaliGemmaModel`, weights and all, into the one above."""
    model.__class__ = PaliGemmaModel
    model.vision_tower = siglip.convert(model.vision_tower)
    gemma.convert(model.language_model)

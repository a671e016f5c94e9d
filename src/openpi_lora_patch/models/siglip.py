"""What openpi's copied `modeling_siglip.py` does, for the vision tower of an openpi model only.

Source: openpi, `models_pytorch/transformers_replace/models/siglip` (transformers 4.53.2); behaviour only.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from transformers.modeling_outputs import BaseModelOutputWithPooling
from transformers.models.siglip import modeling_siglip as stock

# Up to 5.5 the transformer is a module inside `SiglipVisionModel`; from 5.6.0 the model is the transformer itself.
_Transformer = getattr(stock, "SiglipVisionTransformer", stock.SiglipVisionModel)


class SiglipVisionTransformer(_Transformer):  # type: ignore[misc, valid-type]
    """Vision transformer whose encoder runs in bfloat16 where its weights are, its embeddings in their own dtype."""

    def forward(self, pixel_values: Tensor, **_: Any) -> BaseModelOutputWithPooling:
        """`pixel_values` (batch, 3, height, width) to a `last_hidden_state` of (batch, patches, hidden)."""
        hidden_states = self.embeddings(pixel_values)
        if self.encoder.layers[0].self_attn.q_proj.weight.dtype == torch.bfloat16:
            hidden_states = hidden_states.to(torch.bfloat16)
        hidden_states = self.post_layernorm(self.encoder(inputs_embeds=hidden_states).last_hidden_state)
        pooled = self.head(hidden_states) if self.use_head else None
        return BaseModelOutputWithPooling(last_hidden_state=hidden_states, pooler_output=pooled)


class SiglipVisionModel(nn.Module):
    """Gives a flat tower the name `vision_model` again, which openpi's dtype rules and checkpoints hold."""

    def __init__(self, transformer: SiglipVisionTransformer) -> None:
        super().__init__()
        self.vision_model = transformer

    def forward(self, pixel_values: Tensor) -> BaseModelOutputWithPooling:
        """As `SiglipVisionTransformer.forward`."""
        return self.vision_model(pixel_values)


def convert(tower: Any) -> Any:
    """The tower to use in place of a stock `SiglipVisionModel`, with the same weights."""
    if isinstance(tower, _Transformer):
        tower.__class__ = SiglipVisionTransformer
        return SiglipVisionModel(tower)
    tower.vision_model.__class__ = SiglipVisionTransformer
    return tower

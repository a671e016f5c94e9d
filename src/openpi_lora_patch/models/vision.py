"""Image features of a frozen vision tower, compiled: its elementwise parts cost as much as its GEMMs otherwise."""

from __future__ import annotations

import functools
import logging
from typing import Any, cast

import torch
import torch.nn.functional as F
from torch import Tensor

logger = logging.getLogger("openpi_lora_patch")

_failed = False


def features(model: Any, image: Tensor) -> Tensor:
    """`model.get_image_features(image)`, (batch, patches, hidden), by a forward of our own, compiled where that works.

    Args:
        model: a `PaliGemmaModel` whose vision tower and projector are frozen.
        image: (batch, 3, height, width) in [-1, 1].
    """
    global _failed
    if not _failed:
        try:
            return _compiled()(model, image)
        except torch.cuda.OutOfMemoryError:
            raise
        except Exception as error:
            _failed = True
            logger.warning("The vision tower is not compiled: %s: %s", type(error).__name__, str(error)[:200])
    return cast(Tensor, model.get_image_features(image))


def _features(model: Any, image: Tensor) -> Tensor:
    tower = model.vision_tower.vision_model
    hidden = tower.embeddings(image).to(tower.encoder.layers[0].self_attn.q_proj.weight.dtype)
    for layer in tower.encoder.layers:
        hidden = hidden + _attention(layer.self_attn, layer.layer_norm1(hidden))
        hidden = hidden + _mlp(layer.mlp, layer.layer_norm2(hidden))
    return cast(Tensor, model.multi_modal_projector(tower.post_layernorm(hidden)))


def _attention(attention: Any, x: Tensor) -> Tensor:
    # In stock modules compiled, a copy of every layer's output to another memory layout costs a tenth of the tower.
    query, key, value = (
        project(x).unflatten(-1, (-1, attention.head_dim)).transpose(1, 2)
        for project in (attention.q_proj, attention.k_proj, attention.v_proj)
    )
    output = F.scaled_dot_product_attention(query, key, value)
    return cast(Tensor, attention.out_proj(output.transpose(1, 2).flatten(2)))


def _mlp(mlp: Any, x: Tensor) -> Tensor:
    if not x.is_cuda:
        return cast(Tensor, mlp(x))
    # The GEMM applies bias and gelu (its tanh form, which is SigLIP's) before it rounds.
    hidden = torch._addmm_activation(mlp.fc1.bias, x.flatten(0, 1), mlp.fc1.weight.T, use_gelu=True)
    return cast(Tensor, mlp.fc2(hidden).view(x.shape))


@functools.cache
def _compiled() -> Any:
    return torch.compile(_features, dynamic=False)

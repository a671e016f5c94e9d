"""openpi's training forward, without what costs time and changes nothing; for models with adapters only.

Source: openpi, `models_pytorch/pi0_pytorch.py` (commit 15a9616), which calls what is replaced here.
"""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Sequence
from types import ModuleType
from typing import Any

import torch
from torch import Tensor

from ..models import joint
from ..replace import replace
from ..settings import Settings


def patch(module: ModuleType, settings: Settings, undo: contextlib.ExitStack) -> None:
    """Prepare the classes in `module` (openpi's or lerobot's); nothing changes for a model until `enable(model)`."""
    if settings.joint:
        model, towers = module.PI0Pytorch, module.PaliGemmaWithExpertModel
        replace(undo, model, "embed_prefix", _trimming(model.embed_prefix, settings))
        replace(undo, model, "_apply_checkpoint", _once(model._apply_checkpoint))
        replace(undo, towers, "forward", _jointly(towers.forward, settings))


def enable(model: Any) -> None:
    """Have this `PI0Pytorch` train the fast way."""
    model.trains_fast = model.paligemma_with_expert.trains_fast = True


def _fast(module: Any) -> bool:
    return getattr(module, "trains_fast", False)


def _trimming(original: Any, settings: Settings) -> Any:
    @functools.wraps(original)
    def embed_prefix(self: Any, images: Any, img_masks: Any, lang_tokens: Tensor, lang_masks: Tensor) -> Any:
        if _fast(self) and self.training and joint.plan(settings, lang_tokens.device).trim:
            images, img_masks, lang_tokens, lang_masks = trimmed(images, img_masks, lang_tokens, lang_masks)
        return original(self, images, img_masks, lang_tokens, lang_masks)

    return embed_prefix


def trimmed(
    images: Sequence[Tensor], masks: Sequence[Tensor], tokens: Tensor, token_mask: Tensor
) -> tuple[list[Tensor], list[Tensor], Tensor, Tensor]:
    """Without the cameras, and the end of the prompt, that are masked in the whole batch: nothing attends to them.

    Args:
        images: one a camera.
        masks: (batch), bool, one a camera.
        tokens: (batch, length).
        token_mask: the same, bool. What is left of the length is a multiple of 8, so that few shapes occur.
    """
    places = torch.arange(1, token_mask.shape[1] + 1, device=token_mask.device)
    seen = torch.stack([*(mask.any() for mask in masks), (token_mask * places).amax()])
    *present, length = seen.tolist()  # One wait for the GPU, before it has anything to do.
    length = max(8, -(-length // 8) * 8)
    chosen = [(image, mask) for image, mask, there in zip(images, masks, present, strict=True) if there]
    return [x for x, _ in chosen], [x for _, x in chosen], tokens[:, :length], token_mask[:, :length]


def _once(original: Any) -> Any:
    @functools.wraps(original)
    def _apply_checkpoint(self: Any, func: Any, *args: Any, **kwargs: Any) -> Any:
        # The towers, which openpi names so, decide about their layers themselves.
        if _fast(self) and func.__name__ == "forward_func":
            return func(*args, **kwargs)
        return original(self, func, *args, **kwargs)

    return _apply_checkpoint


def _jointly(original: Any, settings: Settings) -> Any:
    @functools.wraps(original)
    def forward(
        self: Any,
        attention_mask: Any = None,
        position_ids: Any = None,
        past_key_values: Any = None,
        inputs_embeds: Any = None,
        use_cache: Any = None,
        adarms_cond: Any = None,
    ) -> Any:
        if not _fast(self) or any(part is None for part in inputs_embeds):
            return original(
                self, attention_mask, position_ids, past_key_values, inputs_embeds, use_cache, adarms_cond
            )
        chosen = joint.plan(settings, inputs_embeds[0].device)
        conds = adarms_cond or (None, None)
        return joint.forward(self, inputs_embeds, attention_mask, position_ids, conds, chosen), None

    return forward

"""openpi's training forward, without what costs time and changes nothing; for models with adapters only.

Source: openpi, `models_pytorch/pi0_pytorch.py` (commit 15a9616), which calls what is replaced here.
"""

from __future__ import annotations

import contextlib
import functools
import math
from collections.abc import Sequence
from types import ModuleType
from typing import Any

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode

from ..models import joint, vision
from ..models.attention import Prefix
from ..replace import replace
from ..settings import Settings


def patch(module: ModuleType, settings: Settings, undo: contextlib.ExitStack) -> None:
    """Prepare the classes in `module` (openpi's or lerobot's); nothing changes for a model until `enable(model)`."""
    if settings.joint:
        model, towers = module.PI0Pytorch, module.PaliGemmaWithExpertModel
        replace(undo, model, "embed_prefix", _trimming(model.embed_prefix, settings))
        replace(undo, model, "embed_suffix", _queued(model.embed_suffix))
        replace(undo, model, "_apply_checkpoint", _once(model._apply_checkpoint))
        replace(undo, towers, "embed_image", _compiled(towers.embed_image, settings))
        replace(undo, towers, "forward", _jointly(towers.forward, settings))


def enable(model: Any) -> None:
    """Have this `PI0Pytorch` train the fast way."""
    model.trains_fast = model.paligemma_with_expert.trains_fast = True
    model.paligemma_with_expert.prefix = None


def _fast(module: Any) -> bool:
    return getattr(module, "trains_fast", False)


def _trimming(original: Any, settings: Settings) -> Any:
    @functools.wraps(original)
    def embed_prefix(self: Any, images: Any, img_masks: Any, lang_tokens: Tensor, lang_masks: Tensor) -> Any:
        if _fast(self):
            self.paligemma_with_expert.prefix = None  # There may be one of a forward that did not come to its end.
        if _fast(self) and self.training and joint.plan(settings, lang_tokens.device).trim:
            (images, img_masks, lang_tokens, lang_masks), whole = trimmed(images, img_masks, lang_tokens, lang_masks)
            embedded = _embedded(self, images, img_masks, lang_tokens, lang_masks)
            self.paligemma_with_expert.prefix = Prefix(embedded[1], whole)
            return embedded
        return original(self, images, img_masks, lang_tokens, lang_masks)

    return embed_prefix


def _embedded(
    model: Any, images: Sequence[Tensor], masks: Sequence[Tensor], tokens: Tensor, token_mask: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """What `embed_prefix` returns: the prefix (batch, length, width), which of it is there, and zeros: one block.

    Unlike openpi's, it makes nothing on the CPU, and so does not wait for the vision tower to finish.
    """
    towers = model.paligemma_with_expert
    parts = [model._apply_checkpoint(towers.embed_image, image) for image in images]
    pads = [mask[:, None].expand(-1, part.shape[1]) for mask, part in zip(masks, parts, strict=True)]
    language = towers.embed_language_tokens(tokens)
    prefix = torch.cat([*parts, language * math.sqrt(language.shape[-1])], dim=1)
    pad = torch.cat([*pads, token_mask], dim=1)
    return prefix, pad, torch.zeros_like(pad)


class _WithoutWaiting(TorchFunctionMode):
    """`torch.tensor(list, device=gpu)` from pinned memory: the copy is queued, where openpi's waits for the GPU."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func is torch.tensor and torch.device(kwargs.get("device") or "cpu").type == "cuda":
            device = kwargs["device"]
            return torch.tensor(*args, **{**kwargs, "device": "cpu"}).pin_memory().to(device, non_blocking=True)
        return func(*args, **kwargs)


def _queued(original: Any) -> Any:
    @functools.wraps(original)
    def embed_suffix(self: Any, *args: Any, **kwargs: Any) -> Any:
        if not (_fast(self) and self.training):
            return original(self, *args, **kwargs)
        with _WithoutWaiting():
            return original(self, *args, **kwargs)

    return embed_suffix


def trimmed(
    images: Sequence[Tensor], masks: Sequence[Tensor], tokens: Tensor, token_mask: Tensor
) -> tuple[tuple[list[Tensor], list[Tensor], Tensor, Tensor], bool]:
    """Without the cameras, and the end of the prompt, that are masked in the whole batch: nothing attends to them.

    Args:
        images: one a camera.
        masks: (batch), bool, one a camera.
        tokens: (batch, length).
        token_mask: the same, bool.

    Returns:
        The same four, and whether nothing that is left is masked. Where something is, what is left of the prompt is a
        multiple of 8 long, so that few lengths occur.
    """
    places = torch.arange(1, token_mask.shape[1] + 1, device=token_mask.device)
    lengths = [(token_mask * places).amax(), token_mask.sum(1).amin()]
    flags = [flag for mask in masks for flag in (mask.any(), mask.all())]
    longest, shortest, *seen = torch.stack([*lengths, *flags]).tolist()  # One wait, before the GPU has work.
    there, in_all = seen[::2], seen[1::2]
    whole = longest == shortest > 0 and all(a == b for a, b in zip(there, in_all, strict=True))
    length = longest if whole else max(8, -(-longest // 8) * 8)
    kept = [(image, mask) for image, mask, present in zip(images, masks, there, strict=True) if present]
    return ([x for x, _ in kept], [x for _, x in kept], tokens[:, :length], token_mask[:, :length]), whole


def _once(original: Any) -> Any:
    @functools.wraps(original)
    def _apply_checkpoint(self: Any, func: Any, *args: Any, **kwargs: Any) -> Any:
        # The towers, which openpi names so, decide about their layers themselves.
        if _fast(self) and func.__name__ == "forward_func":
            return func(*args, **kwargs)
        return original(self, func, *args, **kwargs)

    return _apply_checkpoint


def _compiled(original: Any, settings: Settings) -> Any:
    @functools.wraps(original)
    def embed_image(self: Any, image: Tensor) -> Tensor:
        compiled = _fast(self) and self.training and not _trains_vision(self)
        if compiled and joint.plan(settings, image.device).compile:
            with torch.no_grad():
                return vision.features(self.paligemma.model, image)
        return original(self, image)

    return embed_image


def _trains_vision(towers: Any) -> bool:
    # A preset freezes all of a part or nothing of it, and is held to that: one parameter tells of the rest.
    model = towers.paligemma.model
    return any(next(part.parameters()).requires_grad for part in (model.vision_tower, model.multi_modal_projector))


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
            return original(self, attention_mask, position_ids, past_key_values, inputs_embeds, use_cache, adarms_cond)
        chosen = joint.plan(settings, inputs_embeds[0].device)
        conds = adarms_cond or (None, None)
        prefix, self.prefix = self.prefix, None
        outputs = joint.forward(self, inputs_embeds, attention_mask, position_ids, conds, chosen, prefix=prefix)
        return outputs, None

    return forward

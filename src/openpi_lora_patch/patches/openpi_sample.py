"""`PI0Pytorch.sample_actions` as one graph for `torch.compile`, which openpi calls on it; in eager mode the same bits.

Source: openpi, `models_pytorch/pi0_pytorch.py` (commit 15a9616). Its loop asks a tensor whether to go on, and its
preprocessing defines a class at each call: Dynamo breaks the graph at both.
"""

from __future__ import annotations

import contextlib
import functools
from types import ModuleType
from typing import Any

import torch
from torch import Tensor

from ..replace import replace


def patch(module: ModuleType, undo: contextlib.ExitStack) -> None:
    """Replace what breaks the graph in `module.PI0Pytorch`."""
    cls = module.PI0Pytorch
    replace(undo, cls, "sample_actions", _sampling(cls.sample_actions, module.make_att_2d_masks))
    preprocess = _traceable(cls._preprocess_observation, module._preprocessing)
    replace(undo, cls, "_preprocess_observation", preprocess)


def _sampling(original: Any, make_att_2d_masks: Any) -> Any:
    @functools.wraps(original)
    @torch.no_grad()
    def sample_actions(
        self: Any, device: Any, observation: Any, noise: Tensor | None = None, num_steps: int = 10
    ) -> Tensor:
        batch = len(observation.state)
        if noise is None:
            noise = self.sample_noise((batch, self.config.action_horizon, self.config.action_dim), device)
        *prefix, state = self._preprocess_observation(observation, train=False)
        embedded, present, blocks = self.embed_prefix(*prefix)
        towers = self.paligemma_with_expert
        use_eager_attention(towers)
        _, cache = towers.forward(
            attention_mask=self._prepare_attention_masks_4d(make_att_2d_masks(present, blocks)),
            position_ids=present.cumsum(1) - 1,
            past_key_values=None,
            inputs_embeds=[embedded, None],
            use_cache=True,
        )
        step = torch.full((), -1.0 / num_steps, dtype=torch.float32, device=device)
        time, actions = torch.ones_like(step), noise
        # openpi stops half a step before 0, which float32 sums of up to a thousand steps do not miss.
        for _ in range(num_steps):
            actions = actions + step * self.denoise_step(state, present, cache, actions, time.expand(batch))
            time = time + step
        return actions

    return sample_actions


def use_eager_attention(towers: Any) -> None:
    """As openpi does when it samples. Once at construction too: Dynamo guards the value that a call starts with."""
    for config in (towers.paligemma.language_model.config, towers.gemma_expert.model.config):
        if config._attn_implementation != "eager":
            config._attn_implementation = "eager"


def _traceable(original: Any, preprocessing: ModuleType) -> Any:
    @functools.wraps(original)
    def _preprocess_observation(self: Any, observation: Any, *, train: bool = True) -> Any:
        if train or not torch.compiler.is_compiling():
            return original(self, observation, train=train)
        cameras = preprocessing.IMAGE_KEYS
        unmasked = torch.ones(observation.state.shape[:-1], dtype=torch.bool, device=observation.state.device)
        return (
            [_sized(observation.images[camera], preprocessing) for camera in cameras],
            [observation.image_masks.get(camera, unmasked) for camera in cameras],
            observation.tokenized_prompt,
            observation.tokenized_prompt_mask,
            observation.state,
        )

    return _preprocess_observation


def _sized(image: Tensor, preprocessing: ModuleType) -> Tensor:
    """`image` (batch, 3, height, width) or (batch, height, width, 3) at the model's resolution, laid out as it came."""
    first = image.shape[1] == 3
    pixels = image.permute(0, 2, 3, 1) if first else image
    if pixels.shape[1:3] != preprocessing.IMAGE_RESOLUTION:
        pixels = preprocessing.image_tools.resize_with_pad_torch(pixels, *preprocessing.IMAGE_RESOLUTION)
    return pixels.permute(0, 3, 1, 2) if first else pixels

"""pi0 and pi0.5 on transformers and this package alone, for where openpi is not installed: verification and tests.

Parameter names, shapes and dtypes, the loss and the sampled actions are those of openpi's `PI0Pytorch`
(`openpi/models_pytorch/pi0_pytorch.py`, commit 15a9616); data loading, augmentation and training are openpi's.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import GemmaConfig, GemmaForCausalLM, PaliGemmaConfig, PaliGemmaForConditionalGeneration
from transformers.models.gemma import modeling_gemma

from .models.gemma import AdaptiveNorm
from .patches.gemma import gated_residual

_BLOCKED = -2.3819763e38  # What openpi adds to a score that must not count.


@dataclasses.dataclass(frozen=True)
class Tower:
    """Sizes of one Gemma tower; openpi's `gemma_2b` and `gemma_300m` below."""

    width: int
    mlp_dim: int
    depth: int = 18
    num_heads: int = 8
    num_kv_heads: int = 1
    head_dim: int = 256

    def config(self, *, vocab_size: int, adarms: bool) -> dict[str, Any]:
        return {
            "hidden_size": self.width,
            "intermediate_size": self.mlp_dim,
            "num_hidden_layers": self.depth,
            "num_attention_heads": self.num_heads,
            "num_key_value_heads": self.num_kv_heads,
            "head_dim": self.head_dim,
            "vocab_size": vocab_size,
            "hidden_activation": "gelu_pytorch_tanh",
            "use_adarms": adarms,
            "adarms_cond_dim": self.width if adarms else None,
        }


GEMMA_2B = Tower(width=2048, mlp_dim=16384)
GEMMA_300M = Tower(width=1024, mlp_dim=4096)
SO400M = {"hidden_size": 1152, "intermediate_size": 4304, "num_hidden_layers": 27, "num_attention_heads": 16}


@dataclasses.dataclass(frozen=True)
class PI0Config:
    """A pi0, or with `pi05` a pi0.5; the defaults are openpi's full sizes."""

    pi05: bool = False
    dtype: str = "bfloat16"
    action_dim: int = 32
    action_horizon: int = 50
    vocab_size: int = 257152
    paligemma: Tower = GEMMA_2B
    expert: Tower = GEMMA_300M
    vision: Mapping[str, int] = dataclasses.field(default_factory=lambda: SO400M)


@dataclasses.dataclass
class Observation:
    """What the robot sees; `images` three of (batch, 3, 224, 224) in [-1, 1], `image_masks` of (batch), bool.

    `tokens` and `token_mask` (batch, tokens), `state` (batch, action_dim); pi0.5 has the state among its tokens.
    """

    images: list[Tensor]
    image_masks: list[Tensor]
    tokens: Tensor
    token_mask: Tensor
    state: Tensor


class _Towers(nn.Module):
    """PaliGemma and the action expert, named as in openpi's `PaliGemmaWithExpertModel`."""

    def __init__(self, config: PI0Config) -> None:
        super().__init__()
        text = config.paligemma.config(vocab_size=config.vocab_size, adarms=False)
        vision = {"model_type": "siglip_vision_model", "patch_size": 14, "image_size": 224, "vision_use_head": False}
        whole = PaliGemmaConfig(
            text_config={"model_type": "gemma", **text},
            vision_config={**vision, **config.vision, "projector_hidden_act": "gelu_fast"},
        )
        self.paligemma = PaliGemmaForConditionalGeneration(whole)
        expert = config.expert.config(vocab_size=config.vocab_size, adarms=config.pi05)
        self.gemma_expert = GemmaForCausalLM(GemmaConfig(**expert))
        self.gemma_expert.model.embed_tokens = None
        for part in (self.paligemma.model.language_model, self.gemma_expert.model):
            part.config._attn_implementation = "eager"
        self.cast(getattr(torch, config.dtype))

    def cast(self, dtype: torch.dtype) -> None:
        """Cast all but the norms and SigLIP's embeddings, which stay float32."""
        self.to(dtype)
        vision: Any = self.paligemma.model.vision_tower
        for module in (vision.vision_model.embeddings, *self.modules()):
            if module is vision.vision_model.embeddings or isinstance(module, AdaptiveNorm):
                module.float()

    def forward(self, embeds: list[Any], mask: Tensor, position_ids: Tensor, cond: Tensor | None) -> list[Tensor]:
        """Prefix and suffix `embeds` (batch, seq, width) through both towers; each attends to the other's keys."""
        towers = (self.paligemma.model.language_model, self.gemma_expert.model)
        conds = (None, cond)
        lengths = [part.shape[1] for part in embeds]
        rotary = towers[0].rotary_emb(embeds[0], position_ids)
        for pair in zip(*(tower.layers for tower in towers), strict=True):
            normed = [layer.input_layernorm(x, c) for layer, x, c in zip(pair, embeds, conds, strict=True)]
            attended = _joint_attention([layer.self_attn for layer in pair], [x for x, _ in normed], mask, rotary)
            for i, (layer, part) in enumerate(zip(pair, attended.split(lengths, dim=1), strict=True)):
                middle = gated_residual(embeds[i], layer.self_attn.o_proj(part), normed[i][1])
                x, gate = layer.post_attention_layernorm(middle, conds[i])
                embeds[i] = gated_residual(middle, layer.mlp(x), gate)
        return [tower.norm(x, c)[0] for tower, x, c in zip(towers, embeds, conds, strict=True)]


def _joint_attention(
    attentions: list[Any], hidden: list[Tensor], mask: Tensor, rotary: tuple[Tensor, Tensor]
) -> Tensor:
    def project(name: str) -> Tensor:
        parts = [
            getattr(attention, name)(x).unflatten(-1, (-1, attention.head_dim)).transpose(1, 2)
            for attention, x in zip(attentions, hidden, strict=True)
        ]
        return torch.cat(parts, dim=2)

    query, key = modeling_gemma.apply_rotary_pos_emb(project("q_proj"), project("k_proj"), *rotary)
    first = attentions[0]
    output, _ = modeling_gemma.eager_attention_forward(first, query, key, project("v_proj"), mask, first.scaling)
    return output.flatten(2)


class PI0(nn.Module):
    """pi0 (Black et al. 2024, arXiv:2410.24164) or pi0.5 (arXiv:2504.16054): flow matching over action chunks."""

    def __init__(self, config: PI0Config) -> None:
        super().__init__()
        self.config = config
        width = config.expert.width
        self.paligemma_with_expert = _Towers(config)
        self.action_in_proj = nn.Linear(config.action_dim, width)
        self.action_out_proj = nn.Linear(width, config.action_dim)
        if config.pi05:
            self.time_mlp_in = nn.Linear(width, width)
            self.time_mlp_out = nn.Linear(width, width)
        else:
            self.state_proj = nn.Linear(config.action_dim, width)
            self.action_time_mlp_in = nn.Linear(2 * width, width)
            self.action_time_mlp_out = nn.Linear(width, width)

    def forward(self, observation: Observation, actions: Tensor, noise: Tensor, time: Tensor) -> Tensor:
        """Flow-matching loss, one value an action element: (batch, horizon, action_dim).

        Args:
            observation: see `Observation`.
            actions: (batch, horizon, action_dim).
            noise: of the same shape, standard normal.
            time: (batch), from 0 (the action) to 1 (the noise).
        """
        t = time[:, None, None]
        noisy = t * noise + (1 - t) * actions
        prefix, prefix_pad = self.embed_prefix(observation)
        suffix, cond = self.embed_suffix(observation.state, noisy, time)
        pad, block = self._layout(prefix_pad, suffix)
        dtype = self.paligemma_with_expert.paligemma.lm_head.weight.dtype
        _, out = self.paligemma_with_expert(
            [prefix.to(dtype), suffix.to(dtype)], _mask(pad, pad, block, block), pad.cumsum(1) - 1, cond
        )
        return F.mse_loss(self._velocity(out), noise - actions, reduction="none")

    @torch.no_grad()
    def sample_actions(self, observation: Observation, noise: Tensor, num_steps: int = 10) -> Tensor:
        """Integrate from `noise` (batch, horizon, action_dim) to actions of its shape in `num_steps` Euler steps."""
        towers: Any = self.paligemma_with_expert
        prefix, prefix_pad = self.embed_prefix(observation)
        prefix_block = torch.zeros_like(prefix_pad, dtype=torch.long)
        cache = towers.paligemma.model.language_model(
            inputs_embeds=prefix,
            attention_mask=_mask(prefix_pad, prefix_pad, prefix_block, prefix_block),
            position_ids=prefix_pad.cumsum(1) - 1,
            use_cache=True,
        ).past_key_values
        x, dt = noise, torch.tensor(-1.0 / num_steps)
        time = torch.tensor(1.0)
        for _ in range(num_steps):
            suffix, cond = self.embed_suffix(observation.state, x, time.expand(len(x)))
            pad, block = self._layout(prefix_pad, suffix)
            own = slice(prefix_pad.shape[1], None)
            out = towers.gemma_expert.model(
                inputs_embeds=suffix,
                attention_mask=_mask(pad[:, own], pad, block[:, own], block),
                position_ids=pad.cumsum(1)[:, own] - 1,
                past_key_values=cache,
                use_cache=False,
                adarms_cond=cond,
            ).last_hidden_state
            x = x + dt * self._velocity(out)
            time = time + dt
        return x

    def embed_prefix(self, observation: Observation) -> tuple[Tensor, Tensor]:
        """Image and language tokens (batch, seq, width) and which of them are there (batch, seq)."""
        model: Any = self.paligemma_with_expert.paligemma.model
        images = [model.get_image_features(image) for image in observation.images]
        language = model.language_model.embed_tokens(observation.tokens)
        pads = [
            mask[:, None].expand(-1, image.shape[1])
            for image, mask in zip(images, observation.image_masks, strict=True)
        ]
        embeds = torch.cat([*images, language * math.sqrt(language.shape[-1])], dim=1)
        return embeds, torch.cat([*pads, observation.token_mask], dim=1)

    def embed_suffix(self, state: Tensor, noisy: Tensor, time: Tensor) -> tuple[Tensor, Tensor | None]:
        """Suffix tokens (batch, seq, width), and the condition (batch, width) of pi0.5 or None."""
        actions = self.action_in_proj(noisy)
        embedded_time = _sinusoid(time, actions.shape[-1])
        if self.config.pi05:
            return actions, F.silu(self.time_mlp_out(F.silu(self.time_mlp_in(embedded_time))))
        both = torch.cat([actions, embedded_time[:, None].expand_as(actions)], dim=2)
        mixed = self.action_time_mlp_out(F.silu(self.action_time_mlp_in(both)))
        return torch.cat([self.state_proj(state)[:, None], mixed], dim=1), None

    def _layout(self, prefix_pad: Tensor, suffix: Tensor) -> tuple[Tensor, Tensor]:
        """Which tokens are there, and to which block each belongs; a token sees its own block and those before."""
        batch, length = suffix.shape[:2]
        pad = torch.cat([prefix_pad, prefix_pad.new_ones(batch, length)], dim=1)
        block = torch.zeros_like(pad, dtype=torch.long)
        block[:, prefix_pad.shape[1] :] = 1
        block[:, pad.shape[1] - self.config.action_horizon :] = 2
        return pad, block

    def _velocity(self, suffix_out: Tensor) -> Tensor:
        return self.action_out_proj(suffix_out[:, -self.config.action_horizon :].float())


def _mask(query_pad: Tensor, key_pad: Tensor, query_block: Tensor, key_block: Tensor) -> Tensor:
    allowed = key_block[:, None, :] <= query_block[:, :, None]
    allowed = allowed & query_pad[:, :, None] & key_pad[:, None, :]
    return torch.where(allowed, 0.0, _BLOCKED)[:, None]


def _sinusoid(time: Tensor, dim: int, shortest: float = 4e-3, longest: float = 4.0) -> Tensor:
    """Sines and cosines of `time` (batch) at `dim`/2 periods, computed in float64, as (batch, dim) of time's dtype."""
    fraction = torch.linspace(0.0, 1.0, dim // 2, dtype=torch.float64, device=time.device)
    period = shortest * (longest / shortest) ** fraction
    angle = (1.0 / period * 2 * math.pi)[None] * time[:, None]
    return torch.cat([angle.sin(), angle.cos()], dim=1).to(time.dtype)

"""Full-size pi0 and pi0.5 from openpi's own code, random weights, in each way to fine-tune them that is compared."""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import torch
from openpi.models_pytorch.pi0_pytorch import PI0Pytorch
from torch import Tensor, nn

import openpi_lora_patch
from openpi_lora_patch.lora.config import ATTENTION, FFN
from openpi_lora_patch.patches import openpi_fast

CAMERAS = ("base_0_rgb", "left_wrist_0_rgb", "right_wrist_0_rgb")
RANKS = {"paligemma": 16, "gemma_expert": 32}  # Of openpi's `gemma_2b_lora` and `gemma_300m_lora`; alpha is the rank.


@dataclasses.dataclass(frozen=True)
class Config:
    """What `PI0Pytorch` reads of openpi's `Pi0Config`, which would need jax."""

    pi05: bool = False
    dtype: str = "bfloat16"
    paligemma_variant: str = "gemma_2b"
    action_expert_variant: str = "gemma_300m"
    action_dim: int = 32
    action_horizon: int = 50
    pytorch_compile_mode: str | None = None

    @property
    def max_token_len(self) -> int:
        return 200 if self.pi05 else 48


class NaiveLoRALinear(nn.Module):
    """LoRA as it is usually written, in the base layer's dtype."""

    def __init__(self, base_layer: nn.Linear, rank: int) -> None:
        super().__init__()
        self.base_layer, weight = base_layer, base_layer.weight
        self.lora_A = nn.Parameter(torch.empty(rank, weight.shape[1], dtype=weight.dtype, device=weight.device))
        self.lora_B = nn.Parameter(torch.zeros(weight.shape[0], rank, dtype=weight.dtype, device=weight.device))
        nn.init.kaiming_uniform_(self.lora_A, a=5**0.5)

    @property
    def weight(self) -> Tensor:
        return self.base_layer.weight

    def forward(self, x: Tensor) -> Tensor:
        return self.base_layer(x) + x @ self.lora_A.T @ self.lora_B.T


def build(how: str, *, pi05: bool = False, **settings: Any) -> Any:
    """A model on the GPU, in training mode, that trains as `how` says.

    Args:
        how: "full"; "peft" (its defaults: float32 adapters), "peft bfloat16" and "naive", each in openpi as it is;
            "ours"; "floor" (frozen, no adapters, a gradient through everything) in our forward.
        pi05: which of the two.
        settings: of `openpi_lora_patch.activate`.
    """
    openpi_lora_patch.deactivate()
    openpi_lora_patch.activate(allow_untested=True, **settings)
    suffix = "_lora" if how == "ours" else ""
    config = Config(pi05, paligemma_variant=f"gemma_2b{suffix}", action_expert_variant=f"gemma_300m{suffix}")
    with torch.device("cuda"):
        model = PI0Pytorch(config)
    model.gradient_checkpointing_enable()
    if how not in ("full", "ours"):
        model.paligemma_with_expert.requires_grad_(False)
    if how == "floor":
        openpi_fast.enable(model)
        _require_gradient_of_prefix(model)
    elif how == "naive":
        _add_naive(model)
    elif how.startswith("peft"):
        _add_peft(model, torch.bfloat16 if "bfloat16" in how else torch.float32)
    return model.train()


def batch(model: Any, size: int, *, cameras: int = 3) -> tuple[Any, Tensor]:
    """A random observation and actions; all tokens are there, and so many cameras."""
    config = model.config
    tokens = torch.randint(0, 257152, (size, config.max_token_len), device="cuda")
    observation = SimpleNamespace(
        images={name: torch.rand(size, 3, 224, 224, device="cuda") * 2 - 1 for name in CAMERAS},
        image_masks={
            name: torch.full((size,), i < cameras, dtype=torch.bool, device="cuda") for i, name in enumerate(CAMERAS)
        },
        state=torch.randn(size, config.action_dim, device="cuda"),
        tokenized_prompt=tokens,
        tokenized_prompt_mask=torch.ones_like(tokens, dtype=torch.bool),
        token_ar_mask=None,
        token_loss_mask=None,
    )
    return observation, torch.randn(size, config.action_horizon, config.action_dim, device="cuda")


def training_step(model: Any, observation: Any, actions: Tensor) -> Callable[[], float]:
    """What `scripts/train_pytorch.py` does in a step, with its optimizer; returns the loss."""
    trained = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=2.5e-5, betas=(0.9, 0.95), eps=1e-8, weight_decay=1e-10)

    def step() -> float:
        loss = model(observation, actions).mean()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(trained, max_norm=1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        return float(loss.item())

    return step


def milliseconds(function: Callable[[], Any], count: int, *, skipped: int) -> list[float]:
    """Of each of `count` calls, the GPU's work among it, after some that do not count."""
    times = []
    for _ in range(skipped + count):
        torch.cuda.synchronize()
        start = time.perf_counter()
        function()
        torch.cuda.synchronize()
        times.append(1000 * (time.perf_counter() - start))
    return times[skipped:]


def tera_operations(model: Any, size: int, *, cameras: int = 3, full: bool = False) -> float:
    """Floating-point operations of one step, without recomputation, in 1e12: what the mathematics needs."""
    prefix = cameras * 256 + model.config.max_token_len
    suffix = model.config.action_horizon + (0 if model.config.pi05 else 1)
    passes = 3 if full else 2  # Forward, gradient of the activations, gradient of the weights.
    towers = [layers(model, tower) for tower in RANKS]
    decoder = sum(_base(part) * tokens for part, tokens in zip(towers, (prefix, suffix), strict=True)) * passes
    vision = _base(model.paligemma_with_expert.paligemma.model.vision_tower) * cameras * 256 * (3 if full else 1)
    # Scores and sums, each a product of all tokens with all tokens; the backward pass has five such products.
    attention = 18 * 2 * (prefix + suffix) ** 2 * 2048 * 7 / 2
    return 2 * size * (decoder + vision + attention) / 1e12


def _base(part: nn.Module) -> int:
    """Weights of the Linears without PEFT's adapters, which are Linears too."""
    linears = [module for module in part.modules() if isinstance(module, nn.Linear)]
    return sum(linear.weight.numel() for linear in linears if min(linear.weight.shape) > max(RANKS.values()))


def _add_naive(model: Any) -> None:
    for tower, rank in RANKS.items():
        for layer in layers(model, tower):
            for owner in (layer.self_attn, layer.mlp):
                for name, child in list(owner.named_children()):
                    if name in (*ATTENTION, *FFN):
                        setattr(owner, name, NaiveLoRALinear(child, rank))


def _add_peft(model: Any, dtype: torch.dtype) -> None:
    from peft import LoraConfig, inject_adapter_in_model

    heads = {id(p) for p in model.parameters() if p.requires_grad}
    for tower, rank in RANKS.items():
        config = LoraConfig(r=rank, lora_alpha=rank, target_modules=[*ATTENTION, *FFN])
        inject_adapter_in_model(config, layers(model, tower))
    for name, parameter in model.named_parameters():
        adapter = "lora_" in name
        parameter.requires_grad_(adapter or id(parameter) in heads)
        if adapter:
            parameter.data = parameter.data.to(dtype)


def layers(model: Any, tower: str) -> Any:
    """The decoder layers of one of the two towers."""
    part = getattr(model.paligemma_with_expert, tower).model
    return part.language_model.layers if tower == "paligemma" else part.layers


def _require_gradient_of_prefix(model: Any) -> None:
    embed = model.paligemma_with_expert.embed_language_tokens
    model.paligemma_with_expert.embed_language_tokens = lambda tokens: embed(tokens).requires_grad_()

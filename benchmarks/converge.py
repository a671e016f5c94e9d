"""Whether a quantised base trains as well: 300 steps of the small pi0 on each base, and the loss that they end with.

openpi's flow-matching loss, with adapters and heads that train, on the reference data's observations and actions. For
each seed every base has the same noise, times and first adapters. The final loss is that of 64 other draws of noise
and times, the same for all, since with these a loss changes by more than with the base. The control, `noise`, is a
bf16 base whose weights were moved at random by as much as nf4 moves them. Needs no GPU; nf4 needs bitsandbytes. Run as
`python benchmarks/converge.py` from the repository's root.
"""

from __future__ import annotations

import argparse
import statistics
import sys
from collections.abc import Iterable
from typing import Any

sys.path.insert(0, "tests")

import torch

import golden
from openpi_lora_patch.apply import apply_lora
from openpi_lora_patch.lora import LoRAConfig, LoRALinear, lora_layers
from openpi_lora_patch.lora.config import ATTENTION, FFN
from openpi_lora_patch.lora.quantized import FORMATS, quantize
from openpi_lora_patch.reference import Reference

_DRAWS = 64
_NF4 = 0.09  # Of its norm.


def move(layers: Iterable[LoRALinear]) -> None:
    """Change each base weight at random, by as much as nf4 changes it."""
    for layer in layers:
        weight = layer.weight.data
        weight += torch.randn_like(weight) * (_NF4 * weight.norm() / weight.numel() ** 0.5)


def final_loss(base: str, steps: int, seed: int) -> float:
    data = Reference(golden.GOLDEN / "pi0_bfloat16.safetensors")
    model = data.pi0().train()
    torch.manual_seed(seed)
    targets = dict.fromkeys((*ATTENTION, *FFN), LoRAConfig(rank=4, alpha=4.0))
    apply_lora(model, paligemma=targets, action_expert=targets)
    if base == "noise":
        move(lora_layers(model).values())
    elif base != "bf16":
        quantize(lora_layers(model).values(), base)
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-3)
    observation, actions = data.observation(), data.inputs["actions"]

    def loss(draw: int) -> Any:
        torch.manual_seed(draw)
        return model(observation, actions, torch.randn_like(actions), torch.rand(len(actions))).mean()

    for step in range(steps):
        loss(seed * steps + step).backward()
        optimizer.step()
        optimizer.zero_grad()
    with torch.no_grad():
        return statistics.mean(loss(-draw).item() for draw in range(1, 1 + _DRAWS))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--steps", type=int, default=300)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2, 3], help="of first adapters, noise and times")
    parser.add_argument("--bases", nargs="*", default=[*FORMATS, "noise"])
    options = parser.parse_args()
    finals: dict[str, list[float]] = {}
    for base in ["bf16", *options.bases]:
        finals[base] = [final_loss(base, options.steps, seed) for seed in options.seeds]
        plain, mean = statistics.mean(finals["bf16"]), statistics.mean(finals[base])
        each = ", ".join(
            f"{final:.4f} ({final / own:.4f})" for final, own in zip(finals[base], finals["bf16"], strict=True)
        )
        print(f"{base:5} {mean:.4f}, {mean / plain:.4f} of bf16's; by seed {each}", flush=True)


if __name__ == "__main__":
    main()

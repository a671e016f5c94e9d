"""Whether a quantised base trains as well: 300 steps of the small pi0 on each base, and how its losses end.

openpi's flow-matching loss, with adapters and heads that train, on the reference data's observations and actions. For
each seed every base has the same noise, times and first adapters; what is printed is the mean of the last 20 losses.
Needs no GPU; nf4 needs bitsandbytes. Run as `python benchmarks/converge.py` from the repository's root.
"""

from __future__ import annotations

import argparse
import statistics
import sys

sys.path.insert(0, "tests")

import torch

import golden
from openpi_lora_patch.apply import apply_lora
from openpi_lora_patch.lora import LoRAConfig, lora_layers
from openpi_lora_patch.lora.config import ATTENTION, FFN
from openpi_lora_patch.lora.quantized import FORMATS, quantize
from openpi_lora_patch.reference import Reference


def losses(base: str, steps: int, seed: int) -> list[float]:
    data = Reference(golden.GOLDEN / "pi0_bfloat16.safetensors")
    model = data.pi0().train()
    torch.manual_seed(seed)
    targets = dict.fromkeys((*ATTENTION, *FFN), LoRAConfig(rank=4, alpha=4.0))
    apply_lora(model, paligemma=targets, action_expert=targets)
    if base != "bf16":
        quantize(lora_layers(model).values(), base)
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-3)
    observation, actions = data.observation(), data.inputs["actions"]
    found = []
    for step in range(steps):
        torch.manual_seed(seed * steps + step)
        loss = model(observation, actions, torch.randn_like(actions), torch.rand(len(actions))).mean()
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        found.append(loss.item())
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--steps", type=int, default=300)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2, 3], help="of first adapters, noise and times")
    parser.add_argument("--bases", nargs="*", default=[*FORMATS])
    options = parser.parse_args()
    finals: dict[str, list[float]] = {}
    for base in ["bf16", *options.bases]:
        finals[base] = [statistics.mean(losses(base, options.steps, seed)[-20:]) for seed in options.seeds]
        ratios = [final / plain for final, plain in zip(finals[base], finals["bf16"], strict=True)]
        each = ", ".join(f"{ratio:.3f}" for ratio in ratios)
        mean = statistics.mean(finals[base])
        print(
            f"{base:5} {mean:.4f}, {mean / statistics.mean(finals['bf16']):.4f} of bf16's; by seed {each}", flush=True
        )


if __name__ == "__main__":
    main()

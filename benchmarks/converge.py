"""Whether a quantised base trains as well: 300 steps of the small pi0 on each base, and how its losses end.

openpi's flow-matching loss, with adapters and heads that train, on the reference data's observations and actions. Every
base has the same noise, times and first adapters. Needs no GPU; nf4 needs bitsandbytes. Run as
`python benchmarks/converge.py` from the repository's root.
"""

from __future__ import annotations

import argparse
import math
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
    parser.add_argument("--seed", type=int, default=0, help="of the first adapters, noise and times")
    parser.add_argument("--bases", nargs="*", default=["bf16", *FORMATS])
    options = parser.parse_args()
    plain = math.nan
    for base in options.bases:
        found = losses(base, options.steps, options.seed)
        final = sum(found[-20:]) / len(found[-20:])
        plain = final if base == "bf16" else plain
        print(
            f"{base:5} first {found[0]:.4f}, mean of the last 20 {final:.4f}, {final / plain:.4f} of bf16's", flush=True
        )


if __name__ == "__main__":
    main()

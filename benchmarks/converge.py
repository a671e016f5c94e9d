"""Whether a quantised base trains as well: 300 steps of the small pi0 on each base, and how its losses end.

Needs no GPU; nf4 needs bitsandbytes. Run as `python benchmarks/converge.py` from the repository's root.
"""

from __future__ import annotations

import argparse
import math
import sys

sys.path.insert(0, "tests")

import torch

from openpi_lora_patch.lora import lora_layers
from openpi_lora_patch.lora.quantized import FORMATS, quantize
from openpi_lora_patch.models import joint
from test_fast import PLAIN, adapted


def losses(base: str, steps: int) -> list[float]:
    """Of a small model that learns a fixed, random output from inputs with fresh noise."""
    model, inputs = adapted("pi0", torch.float32)
    model.bfloat16()
    if base != "bf16":
        quantize(lora_layers(model).values(), base)
    parameters = [p for layer in lora_layers(model).values() for p in (layer.lora_A, layer.lora_B)]
    optimizer = torch.optim.AdamW(parameters, lr=3e-3)
    torch.manual_seed(0)
    embeds = [inputs[name].bfloat16() for name in ("prefix_embs", "suffix_embs")]
    mask = torch.where(inputs["attention_allowed"], 0.0, -2.3819763e38).bfloat16()
    target = torch.randn(embeds[1].shape)
    found = []
    for _ in range(steps):
        noisy = [x + 0.1 * torch.randn_like(x) for x in embeds]
        outputs = joint.forward(model.paligemma_with_expert, noisy, mask, inputs["position_ids"], (None, None), PLAIN)
        loss = (outputs[1].float() - target).square().mean()
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        found.append(loss.item())
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--steps", type=int, default=300)
    parser.add_argument("--bases", nargs="*", default=["bf16", *FORMATS])
    options = parser.parse_args()
    plain = math.nan
    for base in options.bases:
        found = losses(base, options.steps)
        final = sum(found[-20:]) / len(found[-20:])
        plain = final if base == "bf16" else plain
        print(
            f"{base:5} first {found[0]:.4f}, mean of the last 20 {final:.4f}, {final / plain:.4f} of bf16's", flush=True
        )


if __name__ == "__main__":
    main()

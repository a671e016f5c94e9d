"""Sampling actions with one sample: without adapters, with them merged, with them apart. Also: injecting them.

Needs what `train.py` needs; run as `python benchmarks/infer.py`.
"""

from __future__ import annotations

import argparse
import json
import pathlib
import statistics
import time
from collections.abc import Callable
from typing import Any

import models
import torch

from openpi_lora_patch.lora import LoRAConfig, inject, lora_layers
from openpi_lora_patch.lora.config import ATTENTION, FFN


def median(function: Callable[[], Any], times: int = 10) -> float:
    """Milliseconds of one call, after two that do not count."""
    found = []
    for _ in range(2 + times):
        torch.cuda.synchronize()
        start = time.perf_counter()
        function()
        torch.cuda.synchronize()
        found.append(1000 * (time.perf_counter() - start))
    return statistics.median(found[2:])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--json", type=pathlib.Path, help="where to write the figures")
    options = parser.parse_args()
    figures = {}
    model = models.build("full").eval()
    observation, _ = models.batch(model, 1)
    noise = torch.randn(1, model.config.action_horizon, model.config.action_dim, device="cuda")

    def sample() -> Any:
        return model.sample_actions("cuda", observation, noise=noise)

    figures["no adapters, ms"] = median(sample)
    start = time.perf_counter()
    for tower, rank in models.RANKS.items():
        config = LoRAConfig(rank=rank, alpha=float(rank))
        inject(models.layers(model, tower), dict.fromkeys((*ATTENTION, *FFN), config))
    torch.cuda.synchronize()
    layers = lora_layers(model).values()
    figures[f"swapping {len(layers)} Linears, ms"] = 1000 * (time.perf_counter() - start)
    model.eval()
    figures["adapters apart, ms"] = median(sample)
    for layer in layers:
        layer.merge()
    figures["adapters merged, ms"] = median(sample)
    for layer in layers:
        layer.unmerge()
    for name, value in figures.items():
        print(f"{name:32} {value:8.1f}")
    if options.json is not None:
        options.json.write_text(json.dumps(figures, indent=1) + "\n")


if __name__ == "__main__":
    main()

"""Sampling actions with one sample, eager and compiled: without adapters, with them merged, with them apart.

Eager, the host decides; what the kernels take on the GPU does not depend on it. Also: injecting them; and for each way
to compile, how many graphs, breaks, recompiles and skipped CUDA graphs.

Needs what `train.py` needs; run as `python benchmarks/infer.py`.
"""

from __future__ import annotations

import argparse
import json
import pathlib
import statistics
import time
from collections.abc import Callable, Iterator
from typing import Any

import models
import torch
from torch._dynamo.utils import counters
from torch.profiler import ProfilerActivity, profile

from openpi_lora_patch.lora import LoRAConfig, inject, lora_layers
from openpi_lora_patch.lora.config import ATTENTION, FFN


def median(function: Callable[[], Any], times: int = 10) -> float:
    """Milliseconds of one call, after two that do not count."""
    return statistics.median(models.milliseconds(function, times, skipped=2))


def on_gpu(function: Callable[[], Any]) -> float:
    """Milliseconds that the GPU works in one call."""
    with profile(activities=[ProfilerActivity.CUDA]) as record:
        function()
        torch.cuda.synchronize()
    kernels = [event for event in record.events() if event.device_type == torch.autograd.DeviceType.CUDA]
    return sum(event.time_range.elapsed_us() for event in kernels) / 1000


def measure(model: Any, observation: Any, noise: torch.Tensor, modes: list[str]) -> Iterator[tuple[str, float]]:
    """Milliseconds of `sample_actions`, eager and in each of torch.compile's `modes`, and what Dynamo counted."""

    def timed(sample: Callable[..., Any]) -> float:
        return median(lambda: sample("cuda", observation, noise=noise))

    yield "eager, ms", timed(model.sample_actions)
    yield "eager, ms on the GPU", on_gpu(lambda: model.sample_actions("cuda", observation, noise=noise))
    for mode in modes:
        torch._dynamo.reset()
        counters.clear()
        start = time.perf_counter()
        yield f"{mode}, ms", timed(torch.compile(model.sample_actions, mode=mode))
        yield f"{mode}, s until measured", time.perf_counter() - start
        # Without breaks, each graph after the first is a recompile.
        yield f"{mode}, graphs", counters["stats"]["unique_graphs"]
        yield f"{mode}, breaks", sum(counters["graph_break"].values())
        yield f"{mode}, CUDA graphs skipped", counters["inductor"]["cudagraph_skips"]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--json", type=pathlib.Path, help="where to write the figures")
    parser.add_argument("--modes", nargs="*", default=["default", "reduce-overhead"], help="torch.compile's modes")
    options = parser.parse_args()
    model = models.build("full").eval()
    observation, _ = models.batch(model, 1)
    noise = torch.randn(1, model.config.action_horizon, model.config.action_dim, device="cuda")
    figures = {}

    def report(name: str, value: float) -> None:
        figures[name] = value
        print(f"{name:44} {value:8.1f}", flush=True)
        if options.json is not None:  # After each: compiling takes minutes.
            options.json.write_text(json.dumps(figures, indent=1) + "\n")

    def sample(how: str) -> None:
        for name, value in measure(model, observation, noise, options.modes):
            report(f"{how}, {name}", value)

    sample("none")
    start = time.perf_counter()
    for tower, rank in models.RANKS.items():
        config = LoRAConfig(rank=rank, alpha=float(rank))
        inject(models.layers(model, tower), dict.fromkeys((*ATTENTION, *FFN), config))
    torch.cuda.synchronize()
    layers = lora_layers(model).values()
    report(f"swapping {len(layers)} Linears, ms", 1000 * (time.perf_counter() - start))
    model.eval()
    for layer in layers:
        layer.merge()
    sample("merged")
    for layer in layers:
        layer.unmerge()
    sample("apart")


if __name__ == "__main__":
    main()

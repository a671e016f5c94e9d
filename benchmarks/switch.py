"""Several adapters on one full-size model: milliseconds a switch, and what is allocated before and after many of them.

Needs a GPU and openpi's `src` on the path; run as `python benchmarks/switch.py --json benchmarks/results/switch.json`.
"""

from __future__ import annotations

import argparse
import json
import pathlib
import statistics
import tempfile
import time
from typing import Any

import models
import torch

from openpi_lora_patch.checkpoint.adapters import save_adapter
from openpi_lora_patch.checkpoint.switch import Switcher
from openpi_lora_patch.lora import lora_layers


def save_random(model: Any, folder: pathlib.Path, count: int) -> dict[str, pathlib.Path]:
    """So many adapters with other values each, by name; the model ends with those of the last."""
    folders = {}
    for number in range(count):
        for layer in lora_layers(model).values():
            torch.nn.init.normal_(layer.lora_B, std=0.01)
        folders[f"adapter{number}"] = folder / str(number)
        save_adapter(model, folders[f"adapter{number}"])
    return folders


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--pi05", action="store_true")
    parser.add_argument("--adapters", type=int, default=4)
    parser.add_argument("--switches", type=int, default=1000)
    parser.add_argument("--json", type=pathlib.Path, help="where to write the figures")
    options = parser.parse_args()
    model = models.build("ours", pi05=options.pi05).eval()
    observation, _ = models.batch(model, 1)
    noise = torch.randn(1, model.config.action_horizon, model.config.action_dim, device="cuda")
    with tempfile.TemporaryDirectory() as folder:
        folders = save_random(model, pathlib.Path(folder), options.adapters)
        alone = torch.cuda.memory_allocated()
        start = time.perf_counter()
        switcher = Switcher(model, folders)
        torch.cuda.synchronize()
        load_ms = 1000 * (time.perf_counter() - start)
        loaded = torch.cuda.memory_allocated()

    def sample(name: str) -> Any:
        with switcher.using(name):
            return model.sample_actions("cuda", observation, noise=noise)

    expected = {name: sample(name) for name in folders}
    before = torch.cuda.memory_allocated()
    milliseconds = []
    for number in range(options.switches):
        torch.cuda.synchronize()
        start = time.perf_counter()
        with switcher.using(f"adapter{number % options.adapters}"):
            torch.cuda.synchronize()
            milliseconds.append(1000 * (time.perf_counter() - start))
    after = torch.cuda.memory_allocated()
    figures = {
        "device": torch.cuda.get_device_name(),
        "model": "pi0.5" if options.pi05 else "pi0",
        "adapters": options.adapters,
        "loading all of them, ms": load_ms,
        "memory for each, MiB": (loaded - alone) / 2**20 / (options.adapters + 1),  # And what the model had.
        "switches": options.switches,
        "median, ms": statistics.median(milliseconds),
        "worst, ms": max(milliseconds),
        "allocated before, bytes": before,
        "allocated after, bytes": after,
        "actions as before": all(torch.equal(sample(name), actions) for name, actions in expected.items()),
        "actions differ": not torch.equal(expected["adapter0"], expected["adapter1"]),
    }
    for name, value in figures.items():
        print(f"{name:28} {value}")
    if options.json is not None:
        options.json.write_text(json.dumps(figures, indent=1) + "\n")


if __name__ == "__main__":
    main()

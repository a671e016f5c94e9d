"""Whole LoRA training steps of pi0 or pi0.5, one way beside the other, in one process.

Needs a GPU, PEFT and an openpi checkout on the path (its `src`); run as `python benchmarks/train.py --help`.
A step is what `scripts/train_pytorch.py` does: forward with augmentation, backward, clipping, AdamW, `loss.item()`.
"""

from __future__ import annotations

import argparse
import gc
import json
import pathlib
import statistics
import time
from typing import Any

import models
import torch

AS_IT_IS = ("full", "peft", "peft bfloat16", "naive")
# One change a rung; each row has the settings of the one above it besides its own.
LADDER: dict[str, dict[str, Any]] = {
    "ours, openpi's forward": {"joint": False},
    "joint forward, one checkpoint": {
        "joint": True, "attention": "eager", "fused": "0", "trim": "0", "prune": False, "compile": "0",
        "overlap": "0", "checkpoint": "layer",
    },
    "and SDPA": {"attention": "sdpa"},
    "and dead prefix part left out": {"prune": True},
    "and fused functions": {"fused": "1"},
    "and no checkpoint": {"checkpoint": "none"},
    "and trimming": {"trim": "1"},
    "and a compiled vision tower": {"compile": "1"},
    "and our own prefix attention": {"attention": "triton"},
    "and the two towers at once": {"overlap": "auto"},
}  # fmt: skip
# The defaults but for one setting.
ALONE = {"attention": "eager", "fused": "0", "trim": "0", "prune": False, "overlap": "0", "checkpoint": "layer"}


def measure(model: Any, size: int, steps: int, cameras: int = 3) -> dict[str, float]:
    """Median milliseconds of a step and peak memory, after three steps that do not count."""
    train_step = models.training_step(model, *models.batch(model, size, cameras=cameras))
    times, losses = [], []
    for step in range(3 + steps):
        if step == 3:
            torch.cuda.reset_peak_memory_stats()
        torch.cuda.synchronize()
        start = time.perf_counter()
        losses.append(train_step())
        torch.cuda.synchronize()
        times.append(1000 * (time.perf_counter() - start))
    median = statistics.median(times[3:])
    return {
        "ms": median,
        "fastest ms": min(times[3:]),
        "slowest ms": max(times[3:]),
        "samples/s": 1000 * size / median,
        "peak GiB": torch.cuda.max_memory_allocated() / 2**30,
        "loss": losses[-1],
    }


def run(name: str, how: str, options: argparse.Namespace, *, cameras: int = 3, **settings: Any) -> dict[str, Any]:
    """Build, measure, print one line, and free everything."""
    row: dict[str, Any] = {"name": name, "how": how, "cameras": cameras, "batch": options.batch, "settings": settings}
    try:
        model = models.build(how, pi05=options.pi05, **settings)
        row |= measure(model, options.batch, options.steps, cameras)
        operations = models.tera_operations(model, options.batch, cameras=cameras, full=how == "full")
        row |= {"TFLOP": operations, "TFLOP/s": 1000 * operations / row["ms"]}
        print(
            f"{name:44} {row['ms']:8.1f} ms ({row['fastest ms']:.1f} to {row['slowest ms']:.1f}) "
            f"{row['samples/s']:7.1f} samples/s {row['peak GiB']:6.1f} GiB {row['TFLOP/s']:6.0f} TFLOP/s "
            f"loss {row['loss']:.4f}",
            flush=True,
        )
    except torch.cuda.OutOfMemoryError:
        row["failed"] = "out of memory"
        print(f"{name:44} out of memory", flush=True)
    model = None
    torch._dynamo.reset()
    gc.collect()
    torch.cuda.empty_cache()
    return row


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--batch", type=int, default=32)
    parser.add_argument("--steps", type=int, default=6)
    parser.add_argument("--pi05", action="store_true")
    parser.add_argument("--only", nargs="*", help="names of rows; all where absent")
    parser.add_argument("--json", type=pathlib.Path, help="where to write the rows")
    options = parser.parse_args()
    wanted: list[tuple[str, str, int, dict[str, Any]]] = [(name, name, 3, {}) for name in AS_IT_IS]
    settings: dict[str, Any] = {}
    for name, change in LADDER.items():
        settings = settings | change
        wanted.append((name, "ours", 3, settings))
    wanted += [
        ("ours, default settings", "ours", 3, {}),
        ("frozen floor", "floor", 3, {"checkpoint": "none"}),
        ("ours, LIBERO masks", "ours", 2, {}),
        ("naive, LIBERO masks", "naive", 2, {}),
    ]
    wanted += [(f"default but {name} {value}", "ours", 3, {name: value}) for name, value in ALONE.items()]
    print(f"{'pi0.5' if options.pi05 else 'pi0'}, batch {options.batch}, {torch.cuda.get_device_name()}")
    versions = {"torch": torch.__version__, "gpu": torch.cuda.get_device_name(), "pi05": options.pi05}
    rows: list[dict[str, Any]] = []
    for name, how, cameras, chosen in wanted:
        if options.only is None or name in options.only:
            rows.append(run(name, how, options, cameras=cameras, **chosen))
            if options.json is not None:  # After each row: a run that is cut off loses none.
                options.json.write_text(json.dumps({**versions, "rows": rows}, indent=1) + "\n")


if __name__ == "__main__":
    main()

"""Which base fits which card: openpi's LoRA training step with the allocator capped at what a smaller card has.

Needs a GPU, bitsandbytes (for nf4) and an openpi checkout on the path (its `src`); run as
`python benchmarks/memory.py --help`. Every layer is computed again in the backward pass, SigLIP runs uncompiled.
"""

from __future__ import annotations

import argparse
import copy
import gc
import json
import pathlib
import time
from typing import Any

import models
import torch
import train

from openpi_lora_patch.lora import lora_layers

CARDS = {"8 GB": 7.2, "12 GB": 10.8, "24 GB": 22.0}  # GiB that a process gets of each.
BASES = ("bf16", "nf4", "int8", "fp8")
# What must fit.
LEAST = {("8 GB", "nf4"): 1, ("12 GB", "nf4"): 4, ("12 GB", "int8"): 4, ("24 GB", "bf16"): 16}
PARTS = ("fit", "time", "error")
_LARGEST = 128


def build(base: str, pi05: bool) -> Any:
    """The same random weights whatever the base; adapters that are not zero."""
    torch.manual_seed(0)
    model = models.build("ours", pi05=pi05, base=base, checkpoint="layer", compile="0")
    for layer in lora_layers(model).values():
        torch.nn.init.normal_(layer.lora_B, std=0.01)
    return model


def cap(gib: float | None) -> None:
    gc.collect()
    torch.cuda.empty_cache()
    total = torch.cuda.get_device_properties(0).total_memory
    torch.cuda.set_per_process_memory_fraction(1.0 if gib is None else gib * 2**30 / total)


def fits(model: Any, size: int) -> dict[str, float] | None:
    """A step after three others; None where they run out of memory."""
    try:
        step = train.measure(model, size, 1)
        row = {"batch": size, "ms": step["ms"], "peak GiB": step["peak GiB"]}
    except torch.cuda.OutOfMemoryError:
        row = None
    # Not before the exception, which holds the step's tensors, is gone.
    model.zero_grad(set_to_none=True)
    gc.collect()
    torch.cuda.empty_cache()
    return row


def largest(model: Any, least: int, until: float) -> dict[str, float] | None:
    """The largest batch that fits, within an eighth: doubled, then bisected. `until`: when to stop looking."""
    best = fits(model, least)
    if best is None and least > 1:
        best, least = fits(model, 1), 1
    if best is None:
        return None
    low, high = int(best["batch"]), None
    while low < _LARGEST and (high is None or high - low > max(1, low // 8)) and time.monotonic() < until:
        size = 2 * low if high is None else (low + high) // 2
        row = fits(model, size)
        low, high, best = (low, size, best) if row is None else (size, high, row)
    return best


def gradients(model: Any) -> tuple[torch.Tensor, torch.Tensor]:
    """The losses and all adapters' gradients of one batch that is always the same, on the CPU."""
    torch.manual_seed(1)
    observation, actions = models.batch(model, 2)
    noise, moment = torch.randn_like(actions), torch.rand(2, device="cuda")
    torch.manual_seed(2)  # The augmentation's.
    losses = model(observation, actions, noise, moment)
    losses.mean().backward()
    parts = [p.grad.flatten() for layer in lora_layers(model).values() for p in (layer.lora_A, layer.lora_B)
             if p.grad is not None]  # fmt: skip
    model.zero_grad(set_to_none=True)
    return losses.detach().float().cpu(), torch.cat(parts).cpu()


def relative(found: torch.Tensor, wanted: torch.Tensor) -> float:
    return ((found - wanted).norm() / wanted.norm()).item()


def run(base: str, options: argparse.Namespace, until: float, exact: Any) -> tuple[dict[str, Any], Any]:
    """One base's row; `exact` is what a float32 base gives, made where it is None."""
    pi05 = options.model == "pi05"
    model = build(base, pi05)
    gc.collect()
    torch.cuda.empty_cache()
    row: dict[str, Any] = {"base": base, "weights GiB": torch.cuda.memory_allocated() / 2**30}
    print(f"{base:5} weights {row['weights GiB']:.2f} GiB", flush=True)
    if "error" in options.only:
        if exact is None and base == "bf16":
            wide = copy.deepcopy(model).float()
            exact = gradients(wide)
            del wide
        losses, grads = gradients(model)
        if exact is not None:
            row["error"] = {"losses": relative(losses, exact[0]), "adapter gradients": relative(grads, exact[1])}
            print(f"{base:5} error {row['error']}", flush=True)
    if "time" in options.only:
        row["time"] = {}
        for size in options.batches:
            step = train.measure(model, size, options.steps)
            row["time"][size] = {name: step[name] for name in ("ms", "fastest ms", "slowest ms", "peak GiB")}
            print(f"{base:5} batch {size:3} {step['ms']:8.1f} ms {step['peak GiB']:6.2f} GiB", flush=True)
    if "fit" in options.only:
        row["fit"] = {}
        for card, gib in CARDS.items():
            cap(gib)
            least = LEAST.get((card, base), 1)
            found = largest(model, least, until)
            row["fit"][card] = found and found | {"must": LEAST.get((card, base))}
            print(f"{base:5} {card:>5}: {found}, must {LEAST.get((card, base), '-')}", flush=True)
        cap(None)
    return row, exact


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", choices=("pi0", "pi05"), default="pi0")
    parser.add_argument("--bases", nargs="*", choices=BASES, default=BASES, help="bf16 first, if errors are asked for")
    parser.add_argument("--only", nargs="*", choices=PARTS, default=PARTS)
    parser.add_argument("--batches", nargs="*", type=int, default=[1, 16, 32], help="whose step time is measured")
    parser.add_argument("--steps", type=int, default=5)
    parser.add_argument("--minutes", type=float, default=3.5, help="no search for a larger batch after this")
    parser.add_argument("--json", type=pathlib.Path, help="where to write the rows, after each")
    options = parser.parse_args()
    until = time.monotonic() + 60 * options.minutes
    rows: list[dict[str, Any]] = []
    exact = None
    for base in options.bases:
        row, exact = run(base, options, until, exact)
        plain = rows[0].get("time", {}) if rows else {}
        for size, step in row.get("time", {}).items():
            if size in plain:
                step["against bf16"] = step["ms"] / plain[size]["ms"]
                print(f"{base:5} batch {size:3} takes {step['against bf16']:.3f} of bf16's time", flush=True)
        rows.append(row)
        gc.collect()
        torch.cuda.empty_cache()
        if options.json is not None:
            versions = {"torch": torch.__version__, "gpu": torch.cuda.get_device_name(), "model": options.model}
            options.json.write_text(json.dumps({**versions, "rows": rows}, indent=1) + "\n")


if __name__ == "__main__":
    main()

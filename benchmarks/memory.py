"""Which base fits which card: openpi's LoRA training step with the allocator capped at what a smaller card has.

A model comes onto the GPU as openpi's script gets it from a base checkpoint: built without values, moved, and loaded
one tensor at a time, with the cap in force from the start, so that what loading takes has to fit as well. Every layer
is computed again in the backward pass, SigLIP runs uncompiled.

Needs a GPU, bitsandbytes (for nf4), an openpi checkout on the path (its `src`), and 8 GB in the temporary folder; run
as `python benchmarks/memory.py --help`.
"""

from __future__ import annotations

import argparse
import copy
import gc
import json
import os
import pathlib
import tempfile
import time
from collections.abc import Callable, Iterator
from typing import Any

import models
import torch
import train
from torch import Tensor

import openpi_lora_patch
from openpi_lora_patch.build import checkpoint_follows
from openpi_lora_patch.checkpoint import files
from openpi_lora_patch.checkpoint.streaming import load_model
from openpi_lora_patch.lora import lora_layers

CARDS = {"8 GB": 7.2, "12 GB": 10.8, "24 GB": 22.0}  # GiB that a process gets of each.
BASES = ("bf16", "nf4", "int8", "fp8")
# What must fit.
LEAST = {("8 GB", "nf4"): 1, ("12 GB", "nf4"): 4, ("12 GB", "int8"): 4, ("24 GB", "bf16"): 16}
PARTS = ("fit", "time", "error")
_TIED = "paligemma_with_expert.paligemma.model.language_model.embed_tokens.weight"  # The `lm_head` is in the file.

Row = dict[str, Any]


def build(pi05: bool, suffix: str = "", **settings: Any) -> Any:
    """A model of these variants on the CPU, as one is built where its weights follow."""
    openpi_lora_patch.deactivate()
    openpi_lora_patch.activate(allow_untested=True, checkpoint="layer", compile="0", **settings)
    config = models.Config(pi05, paligemma_variant=f"gemma_2b{suffix}", action_expert_variant=f"gemma_300m{suffix}")
    with checkpoint_follows():
        return models.PI0Pytorch(config)


def write(path: pathlib.Path, pi05: bool) -> None:
    """A base checkpoint: random matrices that keep the scale of what they are given; norms and biases as built."""
    state = {name: tensor for name, tensor in build(pi05).state_dict().items() if name != _TIED}

    def values() -> Iterator[tuple[str, Tensor]]:
        torch.manual_seed(0)
        for name, tensor in state.items():
            if tensor.ndim > 1:
                tensor = torch.randn(tensor.shape, dtype=tensor.dtype, device="cuda")
                tensor.mul_(tensor[0].numel() ** -0.5)
            yield name, tensor

    files.write_tensors(path, {name: (t.dtype, tuple(t.shape)) for name, t in state.items()}, values(), {})
    release()


def load(base: str, pi05: bool, weights: pathlib.Path) -> Any:
    """As openpi's script does; then adapters that are not zero, the same whatever the base."""
    torch.manual_seed(0)
    model = build(pi05, "_lora", base=base).to("cuda")
    model.gradient_checkpointing_enable()
    load_model(model, weights)
    for layer in lora_layers(model).values():
        torch.nn.init.normal_(layer.lora_B, std=0.01)
    return model.train()


def release() -> None:
    gc.collect()
    torch.cuda.empty_cache()
    torch.cuda.reset_peak_memory_stats()


def cap(gib: float | None) -> None:
    release()
    total = torch.cuda.get_device_properties(0).total_memory
    torch.cuda.set_per_process_memory_fraction(1.0 if gib is None else gib * 2**30 / total)


def attempt(action: Callable[[], Any]) -> Any:
    """What it returns; None where it runs out of memory."""
    try:
        found = action()
    except torch.cuda.OutOfMemoryError:
        found = None
    release()  # Not before the exception, which holds tensors, is gone.
    return found


def loaded(base: str, options: argparse.Namespace, row: Row) -> Any:
    """A loaded model, and in `row` what it holds and what loading took; None where it runs out of memory."""
    start = time.monotonic()
    peak: list[int] = []

    def action() -> Any:
        model = load(base, options.model == "pi05", options.weights)
        peak.extend((torch.cuda.max_memory_allocated(), torch.cuda.max_memory_reserved()))
        return model

    model = attempt(action)
    if model is not None:
        row["weights GiB"] = torch.cuda.memory_allocated() / 2**30
        row["reserved GiB"] = torch.cuda.memory_reserved() / 2**30
        row["loading, peak GiB"], row["loading, peak reserved GiB"] = (size / 2**30 for size in peak)
        print(
            f"{base:5} weights {row['weights GiB']:.2f} GiB (reserved {row['reserved GiB']:.2f}), "
            f"while they were loaded {row['loading, peak GiB']:.2f} ({row['loading, peak reserved GiB']:.2f}); "
            f"{time.monotonic() - start:.0f} s",
            flush=True,
        )
    return model


def fits(model: Any, size: int) -> Row | None:
    """The second step of a training; None where one of the two runs out of memory."""

    def action() -> Row:
        step = models.training_step(model, *models.batch(model, size))
        step()  # Makes the optimizer's state.
        torch.cuda.synchronize()
        start = time.perf_counter()
        step()
        torch.cuda.synchronize()
        ms, peak = 1000 * (time.perf_counter() - start), torch.cuda.max_memory_allocated() / 2**30
        return {"batch": size, "ms": ms, "peak GiB": peak, "reserved GiB": torch.cuda.max_memory_reserved() / 2**30}

    row = attempt(action)
    model.zero_grad(set_to_none=True)
    release()
    return row


def next_size(fitted: list[Row], failed: int | None, least: int, gib: float) -> int | None:
    """The batch to try next; None where the largest is known within an eighth. Memory grows evenly with the batch."""
    low = fitted[-1]["batch"] if fitted else 0
    near = max(1, low // 8)
    if failed is not None:
        return (low + failed) // 2 if failed - low > near else None
    if low < least:
        return least
    if len(fitted) < 2:
        return 2 * low
    one, two = fitted[-2:]
    each = (two["peak GiB"] - one["peak GiB"]) / (two["batch"] - one["batch"])
    return low + max(near, int((gib - two["peak GiB"]) / each) if each > 0 else low)


def largest(model: Any, fitted: list[Row], least: int, gib: float, until: float) -> Row | None:
    """The largest batch that fits; `least` is tried whatever the time, larger and smaller ones until `until`.

    Args:
        fitted: rows of batches that fit a smaller card, the largest last; what fits this one is added.
    """
    failed: int | None = None
    while (size := next_size(fitted, failed, least, gib)) is not None:
        if size != least and time.monotonic() > until:
            break
        row = fits(model, size)
        if row is None:
            failed = size
        else:
            fitted.append(row)
    return fitted[-1] | {"search ended": size is None} if fitted else None


def fit(base: str, options: argparse.Namespace, row: Row, save: Callable[[], None], until: float) -> Any:
    """Fill `row["fit"]`, card by card; returns the model, which the smallest card that holds it loaded, or None."""
    model, fitted, row["fit"] = None, [], {}
    for card, gib in CARDS.items():
        cap(gib)
        least = LEAST.get((card, base))
        model = model or loaded(base, options, row)
        found = None if model is None else largest(model, fitted, least or 1, gib, until)
        row["fit"][card] = found and found | {"must": least}
        print(f"{base:5} {card:>5}: {found or 'does not fit'}, must {least or '-'}", flush=True)
        save()
    cap(None)
    return model


def gradients(model: Any) -> tuple[Tensor, Tensor]:
    """The losses and all adapters' gradients of one batch that is always the same, on the CPU."""
    torch.manual_seed(1)
    observation, actions = models.batch(model, 2)
    noise, moment = torch.randn_like(actions), torch.rand(2, device=actions.device)
    torch.manual_seed(2)  # The augmentation's.
    losses = model(observation, actions, noise, moment)
    losses.mean().backward()
    parts = [p.grad.flatten() for layer in lora_layers(model).values() for p in (layer.lora_A, layer.lora_B)
             if p.grad is not None]  # fmt: skip
    model.zero_grad(set_to_none=True)
    return losses.detach().float().cpu(), torch.cat(parts).cpu()


def relative(found: Tensor, wanted: Tensor) -> float:
    return ((found - wanted).norm() / wanted.norm()).item()


def step_times(model: Any, base: str, options: argparse.Namespace, plain: Row) -> Row:
    """Milliseconds and peak by batch; `plain`, that of the bf16 base, is what they are divided by."""
    times: Row = {}
    for size in options.batches:
        step = train.measure(model, size, options.steps)
        times[size] = {name: step[name] for name in ("ms", "fastest ms", "slowest ms", "peak GiB")}
        print(f"{base:5} batch {size:3} {step['ms']:8.1f} ms {step['peak GiB']:6.2f} GiB", flush=True)
        if size in plain:
            times[size]["against bf16"] = step["ms"] / plain[size]["ms"]
            print(f"{base:5} batch {size:3} takes {times[size]['against bf16']:.3f} of bf16's time", flush=True)
    return times


def run(options: argparse.Namespace, rows: list[Row], save: Callable[[], None], until: Callable[[int], float]) -> None:
    """All rows; `until` says when the search on the base of a number has to end."""
    exact = None
    for number, base in enumerate(options.bases):
        row: Row = {"base": base}
        rows.append(row)
        if "error" in options.only:  # Before any step changes the adapters.
            model = loaded(base, options, row)
            if base == "bf16":
                exact = gradients(copy.deepcopy(model).float())
                release()
            if exact is not None:
                errors = map(relative, gradients(model), exact)
                row["error"] = dict(zip(("losses", "adapter gradients"), errors, strict=True))
                print(f"{base:5} error {row['error']}", flush=True)
            model = None
            save()
        model = fit(base, options, row, save, until(number)) if "fit" in options.only else None
        if "time" in options.only:
            model = model or loaded(base, options, row)
            row["time"] = step_times(model, base, options, rows[0].get("time", {}))
        save()
        model = None
        release()


def main() -> None:
    start = time.monotonic()
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", choices=("pi0", "pi05"), default="pi0")
    parser.add_argument("--bases", nargs="*", choices=BASES, default=BASES, help="bf16 first: others are held to it")
    parser.add_argument("--only", nargs="*", choices=PARTS, default=PARTS)
    parser.add_argument("--batches", nargs="*", type=int, default=[32], help="whose step time is measured")
    parser.add_argument("--steps", type=int, default=5)
    parser.add_argument("--minutes", type=float, default=3.5, help="for the search, shared by the bases")
    parser.add_argument("--json", type=pathlib.Path, help="where to write the rows, after each card and base")
    options = parser.parse_args()
    rows: list[Row] = []
    about = {
        "torch": torch.__version__,
        "gpu": torch.cuda.get_device_name(),
        "model": options.model,
        "allocator": os.environ.get("PYTORCH_CUDA_ALLOC_CONF", ""),
    }

    def save() -> None:
        if options.json is not None:
            options.json.write_text(json.dumps({**about, "rows": rows}, indent=1) + "\n")

    with tempfile.TemporaryDirectory() as folder:
        options.weights = pathlib.Path(folder, "model.safetensors")
        write(options.weights, options.model == "pi05")
        print(f"{options.model}: weights written, {time.monotonic() - start:.0f} s", flush=True)
        run(options, rows, save, lambda number: start + 60 * options.minutes * (number + 1) / len(options.bases))


if __name__ == "__main__":
    main()

"""Where the GPU's time goes in one training step: kernels by kind, and how long it waited.

Needs what `train.py` needs; run as `python benchmarks/profile_step.py --how ours floor --kernels 40`.
"""

from __future__ import annotations

import argparse
import collections
import json
import pathlib
import re
from typing import Any

import models
import torch
from torch.profiler import ProfilerActivity, profile

# The first that matches names a kernel's kind.
KINDS = {
    "attention": r"sdpa|flash|fmha|cudnn.*(attention|bprop|fprop)|^_(forward|slopes|row_products)$",
    "GEMM": r"gemm|nvjet|cutlass|xmma|wgmma",
    "GEGLU": r"^_geglu",
    "RMS norm": r"^_rms_norm",
    "rotation": r"^_rotate",
    "adapters laid beside": r"^_beside",
    "compiled (SigLIP, images)": r"^triton_",
    "copies and fills": r"Memcpy|Memset|copy|Fill|Cat",
    "optimizer and clipping": r"multi_tensor|foreach|lpnorm",
    "reductions": r"reduce",
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--how", nargs="*", default=["ours", "floor"], help="see `models.build`")
    parser.add_argument("--batch", type=int, default=32)
    parser.add_argument("--pi05", action="store_true")
    parser.add_argument("--kernels", type=int, default=0, help="how many of the longest kernels to print by name")
    parser.add_argument("--json", type=pathlib.Path, help="where to write the figures")
    options = parser.parse_args()
    figures = {}
    for how in options.how:
        model = models.build(how, pi05=options.pi05, checkpoint="none")
        figures[how] = summary(kernels_of_step(model, options.batch), options.kernels)
        model = None
        torch.cuda.empty_cache()
        print(how, *(f"  {kind:28} {value:8.1f}" for kind, value in figures[how].items()), sep="\n", flush=True)
    if options.json is not None:
        options.json.write_text(json.dumps(figures, indent=1) + "\n")


def kernels_of_step(model: Any, size: int) -> list[tuple[float, float, str]]:
    """Begin and end in milliseconds, and name, of all that ran on the GPU in a step that follows others at once."""
    step = models.training_step(model, *models.batch(model, size))
    for _ in range(4):
        step()
    with profile(activities=[ProfilerActivity.CUDA]) as record:
        step()
        step()
    kernels = sorted(
        (event.time_range.start / 1000, event.time_range.end / 1000, event.name)
        for event in record.events()
        if event.device_type == torch.autograd.DeviceType.CUDA
    )
    return kernels[len(kernels) // 2 :]


def summary(kernels: list[tuple[float, float, str]], longest: int) -> dict[str, float]:
    """Milliseconds by kind of kernel, and of waiting between the first and the last."""
    kinds: dict[str, float] = collections.defaultdict(float)
    names: dict[str, list[float]] = collections.defaultdict(list)
    waited, until, gaps = 0.0, kernels[0][0], []
    for begin, end, name in kernels:
        kind = next((kind for kind, pattern in KINDS.items() if re.search(pattern, name)), "elementwise and others")
        kinds[kind] += end - begin
        names[name].append(end - begin)
        if begin > until:
            waited += begin - until
            gaps.append((begin - until, begin - kernels[0][0], name))
        until = max(until, end)
    if longest:
        for name, times in sorted(names.items(), key=lambda item: -sum(item[1]))[:longest]:
            print(f"    {sum(times):8.2f} ms {len(times):5} x  {name[:110]}")
        for gap, at, name in sorted(gaps, reverse=True)[:longest]:
            print(f"    waited {gap:6.2f} ms at {at:6.1f} before {name[:90]}")
    return dict(sorted(kinds.items(), key=lambda item: -item[1])) | {"waiting": waited, "kernels": float(len(kernels))}


if __name__ == "__main__":
    main()

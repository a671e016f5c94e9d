"""Seconds that openpi's constructor takes for a full-size pi0 on a CPU, each way in a process of its own.

Needs openpi's `src` and its dependencies on the path; run as `python benchmarks/build.py`.
"""

from __future__ import annotations

import contextlib
import subprocess
import sys
import time

WAYS = ("without adapters", "with adapters", "with adapters, a checkpoint follows")


def seconds(way: str) -> float:
    from openpi.models.pi0_config import Pi0Config
    from openpi.models_pytorch.pi0_pytorch import PI0Pytorch

    import openpi_lora_patch  # noqa: F401 (the first import)
    from openpi_lora_patch.build import checkpoint_follows

    suffix = "_lora" if "with adapters" in way else ""
    variants = {"paligemma_variant": f"gemma_2b{suffix}", "action_expert_variant": f"gemma_300m{suffix}"}
    start = time.perf_counter()
    with checkpoint_follows() if "follows" in way else contextlib.nullcontext():
        PI0Pytorch(Pi0Config(pytorch_compile_mode=None, **variants))
    return time.perf_counter() - start


if __name__ == "__main__":
    if len(sys.argv) > 1:
        print(f"{sys.argv[1]:40} {seconds(sys.argv[1]):6.1f} s")
    else:
        for way in WAYS:
            subprocess.run([sys.executable, __file__, way], check=True)

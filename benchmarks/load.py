"""Seconds, and GiB of host memory at most, to build and load a full-size pi0 on a base, and with the base kept beside
its checkpoint; each in a process of its own, on a CPU.

Needs openpi's `src` and its dependencies on the path, 12 GB of disk, and for nf4 bitsandbytes; run as
`python benchmarks/load.py [bf16 int8 nf4]`.
"""

from __future__ import annotations

import os
import pathlib
import resource
import subprocess
import sys
import tempfile
import time
import types

WAYS = {"": "0", "kept": "1", "from the kept": "1"}
VARIANTS = {"paligemma_variant": "gemma_2b_lora", "action_expert_variant": "gemma_300m_lora"}


def write(path: pathlib.Path) -> None:
    """A base checkpoint of random weights."""
    import torch
    from openpi.models.pi0_config import Pi0Config
    from openpi.models_pytorch.pi0_pytorch import PI0Pytorch

    from openpi_lora_patch.checkpoint import files

    plain = {name: variant.removesuffix("_lora") for name, variant in VARIANTS.items()}
    with torch.device("meta"):
        state = PI0Pytorch(Pi0Config(pytorch_compile_mode=None, **plain)).state_dict()
    del state["paligemma_with_expert.paligemma.model.language_model.embed_tokens.weight"]
    specs = {name: (tensor.dtype, tuple(tensor.shape)) for name, tensor in state.items()}
    values = ((name, torch.randn(shape, dtype=dtype).mul_(0.02)) for name, (dtype, shape) in specs.items())
    files.write_tensors(path, specs, values, {})


def load(path: str) -> str:
    from openpi.models.pi0_config import Pi0Config

    config = Pi0Config(pytorch_compile_mode=None, **VARIANTS)
    start = time.perf_counter()
    config.load_pytorch(types.SimpleNamespace(model=config), path)
    seconds, peak = time.perf_counter() - start, resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20
    return f"{seconds:6.1f} s {peak:5.1f} GiB"


def main(bases: list[str]) -> None:
    with tempfile.TemporaryDirectory() as folder:
        path = pathlib.Path(folder, "model.safetensors")
        write(path)
        for base in bases:
            for way, cache in WAYS.items():
                if base == "bf16" and way:
                    continue
                settings = {"OPENPI_LORA_BASE": base, "OPENPI_LORA_BASE_CACHE": cache}
                command = [sys.executable, __file__, "--load", str(path)]
                done = subprocess.run(command, env=os.environ | settings, check=True, stdout=subprocess.PIPE, text=True)
                print(f"{base:5} {way:14} {done.stdout.strip()}", flush=True)
            pathlib.Path(f"{path}.{base}").unlink(missing_ok=True)


if __name__ == "__main__":
    import openpi_lora_patch  # noqa: F401 (the first import)

    if sys.argv[1:2] == ["--load"]:
        print(load(sys.argv[2]))
    else:
        main(sys.argv[1:] or ["bf16", "int8", "nf4"])

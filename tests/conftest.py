"""Before torch loads: one thread, and bfloat16 kernels of the kind that made the golden data (no AMX)."""

import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

os.environ["ONEDNN_MAX_CPU_ISA"] = "AVX512_CORE_BF16"
os.environ["OMP_NUM_THREADS"] = "1"

import openpi_lora_patch  # noqa: F401, I001 (the first import, as for every user)
import pytest
import torch

torch.set_num_threads(1)

Child = Callable[..., subprocess.CompletedProcess[str]]


@pytest.fixture
def child(tmp_path: Path) -> Child:
    """Run Python code or arguments in a process of its own, with none of our variables but those given."""

    def run(*arguments: str, **environ: str) -> subprocess.CompletedProcess[str]:
        clean = {name: text for name, text in os.environ.items() if not name.startswith("OPENPI_LORA")}
        return subprocess.run(
            [sys.executable, *arguments],
            env=clean | environ,
            cwd=tmp_path,
            capture_output=True,
            text=True,
            timeout=300,
            check=False,
        )

    return run

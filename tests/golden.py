"""Where the golden data lies, and what counts as the same."""

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from openpi_lora_patch.reference import Reference, distance

GOLDEN = Path(__file__).parent / "golden"
TOLERANCE = 1e-6
DISTANCES: list[float] = []  # Every float32 distance of this run.


def whole_model(name: str) -> Reference:
    """A `pi0_*` or `pi05_*` file, with the outputs of openpi's code on this torch where its bfloat16 kernels differ."""
    data = Reference(GOLDEN / f"{name}.safetensors")
    here = GOLDEN / f"torch-{torch.__version__.partition('+')[0]}" / f"{name}.safetensors"
    data.outputs |= load_file(here) if here.exists() else {}
    return data


def assert_same(found: torch.Tensor, expected: torch.Tensor) -> None:
    """Float32 within 1e-6, relative above 1; bfloat16 equal, where this processor has the kernels for it."""
    assert found.dtype == expected.dtype
    assert found.shape == expected.shape
    if expected.dtype == torch.bfloat16:
        if not _has_kernels():
            pytest.skip("bfloat16 is compared bit for bit, which needs a processor with AVX512-BF16")
        assert torch.equal(found, expected)
    else:
        DISTANCES.append(distance(found, expected))
        assert DISTANCES[-1] <= TOLERANCE


def _has_kernels() -> bool:
    # torch 2.4 cannot be asked; its outputs are compared all the same.
    return getattr(torch.cpu, "_is_avx512_bf16_supported", lambda: True)()

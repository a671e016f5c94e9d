"""Where the golden data lies, and what counts as the same."""

from pathlib import Path

import pytest
import torch

from openpi_lora_patch.reference import distance

GOLDEN = Path(__file__).parent / "golden"
TOLERANCE = 1e-6
DISTANCES: list[float] = []  # Every float32 distance of this run.


def assert_same(found: torch.Tensor, expected: torch.Tensor) -> None:
    """Float32 within 1e-6, relative above 1; bfloat16 equal, where this processor has the kernels for it."""
    assert found.dtype == expected.dtype
    assert found.shape == expected.shape
    if expected.dtype == torch.bfloat16:
        if not torch.cpu._is_avx512_bf16_supported():
            pytest.skip("bfloat16 is compared bit for bit, which needs a processor with AVX512-BF16")
        assert torch.equal(found, expected)
    else:
        DISTANCES.append(distance(found, expected))
        assert DISTANCES[-1] <= TOLERANCE

"""The Triton kernels without a GPU: they compile for each kind that is given them, within its shared memory,
and in Triton's interpreter they compute what plain torch does."""

import importlib.util
import math
import os
import pathlib
import re
import subprocess
import sys
from types import SimpleNamespace

import numpy
import pytest
import torch

if importlib.util.find_spec("triton") is None:
    pytest.skip("needs Triton (pip install triton)", allow_module_level=True)

import triton

from openpi_lora_patch.lora import pointwise

VERSION = pointwise.triton_version()
if VERSION < pointwise.OLDEST_TRITON:
    pytest.skip(f"Triton {triton.__version__} is not used, as it is older than 3.2", allow_module_level=True)

# Compute capability, and KiB of shared memory that a block may have.
TARGETS = {
    "A100": (80, 163),
    "RTX 3090": (86, 99),
    "RTX 4090": (89, 99),
    "H100": (90, 227),
    "B200": (100, 227),
    "RTX 5090": (120, 99),
}
ROWS, BFLOAT16 = 64, torch.bfloat16


@pytest.fixture
def compiled(monkeypatch):
    """Have kernels compiled where they would be launched, for a GPU of some capability: name and kernel of each."""
    from triton.backends.compiler import GPUTarget

    found = []
    run = triton.JITFunction.run

    def compile_only(self, *args, grid, warmup, **kwargs):
        kernel = run(self, *args, grid=grid, warmup=True, **kwargs)
        found.append((self.__name__, kernel))

    def for_target(capability):
        target = GPUTarget("cuda", capability, 32)
        answers = {"get_current_device": capability, "get_current_stream": 0, "get_current_target": target}
        gpu = SimpleNamespace(**{name: lambda *_, answer=answer: answer for name, answer in answers.items()})
        driver = triton.runtime.driver
        monkeypatch.setattr(driver, "_active" if hasattr(driver, "_active") else "active", gpu)
        return found

    monkeypatch.setattr(triton.JITFunction, "run", compile_only)
    return for_target


def call_all(kernels, width, dim, rank):
    """Every function of `lora.triton_kernels`, at the sizes of one layer's MLP and attention, with one rank for all."""

    def make(*shape, dtype=BFLOAT16):
        return torch.zeros(shape, dtype=dtype)

    r = -(-rank // 16) * 16
    both = -(-2 * rank // 16) * 16
    x, gate_up = make(ROWS, width), make(ROWS, 2 * dim)
    a, b = make(rank, width, dtype=torch.float32), make(dim, rank, dtype=torch.float32)
    for n in (1, 2, 3):
        kernels.place(n * [a], n * [b], n * [1.0], make(n * rank + 8, width), make(n * dim, n * rank))
        kernels.beside(n * [x], make(n * ROWS, r), make(n * ROWS, width + pointwise.padded(r)), width)
    scale = kernels.rms_norm(x, make(width), 1e-6, make(ROWS, width))
    low_rank = pointwise.LowRank(make(ROWS, both), make(both, width), make(ROWS, both))
    for rest in (low_rank, None):
        kernels.rms_norm_backward(x, x, make(width), scale, x, make(ROWS, width), rest)
    for n in (1, 3):
        kernels.adapter_gradients(
            make(ROWS, n * 256), make(n * 256, n * r), make(ROWS, n * r), n * [256], n * [rank], make(ROWS, 64)
        )
    for given in ((make(width), scale), (None, None)):
        kernels.a_gradient(make(ROWS, both), x, *given)
    kernels.add_low_rank(x, x, make(ROWS, r), make(width, r), make(ROWS, width))
    for a, after, inner in ((make(r, dim), make(ROWS, r), make(ROWS, both)), (None, None, None)):
        kernels.geglu(gate_up, make(ROWS, dim), a)
        kernels.geglu_backward(make(ROWS, dim), gate_up, after, inner, (rank, rank), make(ROWS, 2 * dim))
    heads = tuple(make(1, ROWS, n, 256) for n in (8, 1, 1))
    angle = make(1, ROWS, 256)
    kernels.rotate(make(1, ROWS, 10, 256), angle, angle, heads, 0, 0, False)


@pytest.mark.parametrize("rank", [16, 32, 256])
@pytest.mark.parametrize("gpu", TARGETS)
def test_kernels_fit_every_gpu_that_is_given_them(compiled, monkeypatch, gpu, rank):
    from openpi_lora_patch.lora import triton_kernels

    monkeypatch.setattr(triton_kernels, "MANY_ROWS", 0)
    capability, limit = TARGETS[gpu]
    if capability >= 100 and VERSION < (3, 3):
        pytest.skip("Triton before 3.3 does not know this GPU")
    found = compiled(capability)
    call_all(triton_kernels, 2048, 16384, rank)
    names = {name for name, _ in found}
    assert names >= {"_place", "_beside", "_geglu", "_geglu_backward", "_add_low_rank", "_rms_norm", "_rotate"}
    narrow = {
        "_adapter_gradients",
        "_a_gradient",
        "_geglu_adapted",
        "_rms_norm_products",
        "_rms_norm_low_rank_backward",
    }
    assert names & narrow == (narrow if rank <= triton_kernels.NARROW else set())
    assert not [name for name, kernel in found if kernel.metadata.shared > limit * 1024]


@pytest.mark.parametrize("rank", [16, 32])
def test_gelu_is_computed_once_for_memory_and_for_the_matrix_units(compiled, monkeypatch, rank):
    """Once for each element of a tile: the compiler would rather compute it in both places than move it."""
    from openpi_lora_patch.lora import triton_kernels

    monkeypatch.setattr(triton_kernels, "MANY_ROWS", 0)
    found, dim = compiled(TARGETS["H100"][0]), 16384
    gate_up, inner = torch.zeros(ROWS, 2 * dim, dtype=BFLOAT16), torch.zeros(ROWS, 2 * rank, dtype=BFLOAT16)
    triton_kernels.geglu(gate_up, gate_up[:, :dim], torch.zeros(rank, dim, dtype=BFLOAT16))
    triton_kernels.geglu_backward(gate_up[:, :dim], gate_up, inner[:, :rank], inner, (rank, rank), gate_up)
    kernels = dict(found)
    tiles = {"_geglu_adapted": triton_kernels._ADAPTED, "_geglu_backward": triton_kernels._BACKWARD}
    for name, tile in tiles.items():
        each = tile["ROWS"] * tile["COLUMNS"] // (32 * tile["num_warps"])
        assert kernels[name].asm["ptx"].count("ex2.approx") == each


@pytest.mark.parametrize("rank", [16, 32, 64, 256])
def test_sums_of_any_rank_stay_in_registers(compiled, tmp_path, rank):
    from openpi_lora_patch.lora import triton_kernels

    found, dim = compiled(TARGETS["H100"][0]), 16384
    gate_up, inner = torch.zeros(ROWS, 2 * dim, dtype=BFLOAT16), torch.zeros(ROWS, 2 * rank, dtype=BFLOAT16)
    triton_kernels.geglu_backward(gate_up[:, :dim], gate_up, inner[:, :rank], inner, (rank, rank), gate_up)
    (tmp_path / "kernel").write_bytes(dict(found)["_geglu_backward"].asm["cubin"])
    tool = pathlib.Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "cuobjdump"
    usage = subprocess.run([tool, "--dump-resource-usage", tmp_path / "kernel"], capture_output=True, text=True)
    (spilled,) = map(int, re.findall(r"STACK:(\d+)", usage.stdout))
    assert spilled <= 16  # Bytes a thread: Triton 3.3 spills two numbers at rank 32.


def test_what_the_tiles_do_not_fit_is_left_to_plain_torch(monkeypatch):
    from openpi_lora_patch.lora import triton_kernels

    monkeypatch.setattr(pointwise, "_by_triton", lambda x: True)
    torch.manual_seed(0)
    grad, inner = torch.randn(5, 1024), torch.randn(5, 160)
    for sizes, ranks in (([512, 512], [8, 4]), ([1024], [40]), ([500, 524], [8, 8]), (4 * [256], 4 * [8])):
        b, out = torch.randn(1024, 96), torch.full((5, 128), 7.0)
        own = grad, b, inner, sizes, ranks, out
        assert triton_kernels.adapter_gradients(*own) is None
        found = pointwise.adapter_gradients(*own)
        assert torch.equal(out, torch.cat([grad @ b, torch.zeros(5, 32)], 1))
        parts = zip(grad.split(sizes, 1), inner[:, : sum(ranks)].split(ranks, 1), strict=True)
        for gradient, (part, own_inner) in zip(found, parts, strict=True):
            torch.testing.assert_close(gradient, part.T @ own_inner)
    assert triton_kernels.a_gradient(inner[:, :80], grad, None, None) is None
    assert torch.equal(pointwise.a_gradient(inner[:, :80], grad, None, None), inner[:, :80].T @ grad)


def test_attention_fits_the_gpus_that_are_given_it(compiled):
    from openpi_lora_patch.models import triton_attention

    found = compiled(TARGETS["H100"][0])
    query, key = torch.zeros(1, 8 * ROWS, 256, dtype=BFLOAT16), torch.zeros(1, 2 * ROWS, 256, dtype=BFLOAT16)
    for there in (None, torch.ones(1, 2 * ROWS, dtype=torch.bool)):
        out, level = triton_attention.forward(query, key, key, there, 1.0)
        triton_attention.backward(query, query, key, key, there, 1.0, out, level)
    assert {name for name, _ in found} == {"_forward", "_row_products", "_slopes"}
    assert max(kernel.metadata.shared for _, kernel in found) <= 200 * 1024  # What `shared_attention.fits` asks for.


def test_slopes_are_stored_as_vectors_whatever_the_number_of_keys(compiled):
    from openpi_lora_patch.models import triton_attention

    found, keys = compiled(TARGETS["H100"][0]), 968  # pi0.5's prefix; a multiple of 8 alone.
    query, key = torch.zeros(1, 8 * keys, 256, dtype=BFLOAT16), torch.zeros(1, keys, 256, dtype=BFLOAT16)
    level = torch.zeros(1, 8 * keys)
    triton_attention.backward(query, query, key, key, None, 1.0, query, level)
    assert set(re.findall(r"st\.global[.\w]*", dict(found)["_slopes"].asm["ptx"])) == {"st.global.v4.b32"}


@pytest.mark.skipif(
    tuple(map(int, numpy.__version__.split(".")[:2])) >= (2, 4), reason="Triton's interpreter needs an older NumPy"
)
def test_the_interpreter_computes_what_plain_torch_does():
    done = subprocess.run(
        [sys.executable, __file__], env={**os.environ, "TRITON_INTERPRET": "1"}, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.split() == ["compared", "126"]


def compare(rows, dim, rank, ranks):
    """Each of `triton_kernels` beside that of `pointwise`; float16, as the interpreter has no products in bfloat16."""
    from openpi_lora_patch.lora import triton_kernels

    triton_kernels.MANY_ROWS = 0

    def make(*shape, std=1.0, dtype=torch.float16):
        return (torch.randn(shape) * std).to(dtype)

    def room(*shape):
        return torch.full(shape, 7.0, dtype=torch.float16)

    both = -(-sum(ranks) // 16) * 16
    inner = make(rows, both)
    inner[:, sum(ranks) :] = 0
    gate_up, a, grad, hidden = make(rows, 2 * dim), make(rank, dim, std=0.1), make(rows, dim), make(rows, rank)
    weight, wide = torch.randn(dim), make(rows, dim + both)
    normed, first_a = torch.empty(rows, dim), make(both, dim, std=0.1)
    pointwise.rms_norm(grad, weight, 1e-6, normed)
    low_rank = pointwise.LowRank(wide[:, dim:], first_a, (normed @ first_a.float().T).half())
    places = [(ranks[0], dim), (ranks[0] + 5, dim + 7), (ranks[0] + 2, 8)]
    matrices_a, matrices_b = [torch.randn(r, dim) for r, _ in places], [torch.randn(n, r) for r, n in places]
    many, many_b = make(rows, 1000), make(512, 32, std=0.1)
    packed, angle = make(2, 5, 6, 8), torch.randn(2, 7, 4).repeat(1, 1, 2)

    def results(module):
        out = [room(rows, dim + 64) for _ in range(5)]
        yield module.geglu(gate_up, out[0][:, :dim], a), out[0]
        yield module.geglu(gate_up, out[1][:, :dim], None), out[1]
        for after, before in ((hidden, inner), (hidden, None), (None, inner), (None, None)):
            target = room(rows, 2 * dim + 64)
            grad_a, grads_b = module.geglu_backward(grad, gate_up, after, before, ranks, target[:, : 2 * dim])
            yield grad_a, *(grads_b or (None, None)), target
        for left in ((grad,), (), grad.split(rows - 9), (grad[:3], grad[3:10], grad[10:])):
            target = room(rows, dim + 64)
            module.beside(left, hidden, target, *([dim] if module is triton_kernels else []))
            yield (target,)
        for n in (1, 2, 3):
            stacks = room(3 * (ranks[0] + 5), dim), room(3 * (dim + 7), 200)[: sum(len(b) for b in matrices_b[:n])]
            module.place(matrices_a[:n], matrices_b[:n], (0.5, 1.0, 2.0)[:n], *stacks)
            yield stacks
        norm = module.rms_norm(grad, weight, 1e-6, out[2][:, :dim])
        yield norm, out[2]
        for added, rest in ((grad, None), (None, None), (grad, low_rank), (None, low_rank)):
            module.rms_norm_backward(wide[:, :dim], grad, weight, norm, added, out[3][:, :dim], rest)
            yield (out[3].clone(),)
        for given in ((weight, norm), (None, None)):
            yield (module.a_gradient(many[:, : min(rank, 64)], grad, *given),)
        for sizes in ([dim], [512, 256, 200], [256, 256]):
            r, out_grad = min(ranks[0], 32), many[:, : sum(sizes)]
            target, stack = room(rows, 160), torch.block_diag(*(many_b[:size, :r] for size in sizes))
            own = len(sizes) * r
            yield (
                *module.adapter_gradients(out_grad, stack, many[:, :own], sizes, len(sizes) * [r], target[:, :128]),
                target,
            )
        heads = tuple(torch.zeros(2, 7, n, 8, dtype=torch.float16) for n in (4, 1, 1))
        turn = (packed, angle.cos().half(), angle.sin().half(), heads, 2, 2)
        module.rotate(*turn, *([False] if module is triton_kernels else []))
        yield heads

    count = 0
    for found, expected in zip(results(triton_kernels), results(pointwise), strict=True):
        for x, y in zip(found, expected, strict=True):
            assert (x is None) == (y is None)
            if x is not None:
                assert ((x.double() - y.double()).norm() <= 1e-3 * y.double().norm()).item()
        count += 1
    return count


def compare_attention(rows, keys):
    """As `compare`, where all keys are there and where some are not."""
    from openpi_lora_patch.models import shared_attention, triton_attention

    grad, query = torch.randn(2, 2, rows, 64).half()
    key, value = torch.randn(2, 2, keys, 64).half()

    def results(forward, backward, unit, there):
        out, level = forward(query, key, value, there, 0.125)
        return out, level * unit, *backward(grad, query, key, value, there, 0.125, out, level)

    count = 0
    for there in (None, torch.arange(keys).expand(2, keys) % 3 > 0):
        found = results(triton_attention.forward, triton_attention.backward, math.log(2), there)
        expected = results(shared_attention._forward, shared_attention._backward, 1.0, there)
        for x, y in zip(found, expected, strict=True):
            assert ((x.double() - y.double()).norm() <= 2e-3 * y.double().norm()).item()
            count += 1
    return count


if __name__ == "__main__":
    torch.manual_seed(0)
    sizes = ((70, 192, 16, (16, 16)), (33, 136, 16, (4, 7)), (40, 128, 48, (20, 28)), (20, 128, 64, (40, 8)))
    attention = sum(compare_attention(*each) for each in ((70, 40), (128, 64), (9, 131)))
    print("compared", sum(compare(*each) for each in sizes) + attention)

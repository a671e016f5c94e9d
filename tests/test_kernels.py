"""The fused functions: value and every gradient against the plain modules in float64, rounding no worse than theirs."""

from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import golden  # noqa: F401 (one thread, before torch)
from openpi_lora_patch.lora import LoRAConfig, LoRALinear, kernels, pointwise

EPS = 1e-6


def linear(size, out, rank, dtype=torch.float64):
    base = nn.Linear(size, out, bias=False).to(dtype).requires_grad_(False)
    if not rank:
        return base
    layer = LoRALinear(base, LoRAConfig(rank=rank, alpha=8.0))
    nn.init.normal_(layer.lora_B, std=0.1)
    if dtype == torch.float64:
        layer.lora_A.data, layer.lora_B.data = layer.lora_A.data.double(), layer.lora_B.data.double()
    return layer


class Mlp(nn.Module):
    def __init__(self, ranks, dtype=torch.float64):
        super().__init__()
        self.gate_proj, self.up_proj = linear(16, 24, ranks[0], dtype), linear(16, 24, ranks[1], dtype)
        self.down_proj = linear(24, 16, ranks[2], dtype)

    def forward(self, x):
        return self.down_proj(F.gelu(self.gate_proj(x), approximate="tanh") * self.up_proj(x))


def rms_norm(x, norm):
    if norm is None:
        return x
    wide = x if x.dtype == torch.float64 else x.float()
    return (wide * torch.rsqrt(wide.square().mean(-1, keepdim=True) + EPS) * (1 + norm.weight)).to(x.dtype)


def through(mlp, x, norm):
    return mlp(x) if norm is None else x + mlp(rms_norm(x, norm))


def results(output, x, modules, grad):
    trained = [p for module in modules for p in module.parameters() if p.requires_grad]
    return [output, *torch.autograd.grad(output, [x, *trained], grad)]


@pytest.fixture(autouse=True)
def _seeded():
    torch.manual_seed(0)


@pytest.mark.parametrize("ranks", [(4, 2, 16), (4, 4, 4), (4, 0, 4), (0, 0, 0), (0, 0, 5)])
@pytest.mark.parametrize("normed", [True, False])
def test_projections_on_one_input_in_float64(ranks, normed):
    linears = [linear(16, out, rank) for out, rank in zip((24, 8, 8), ranks, strict=True)]
    norm = kernels.Norm(torch.randn(16, dtype=torch.float64), EPS) if normed else None
    x = torch.randn(2, 7, 16, dtype=torch.float64, requires_grad=True)
    grad = torch.randn(2, 7, 40, dtype=torch.float64)
    expected = results(torch.cat([f(rms_norm(x, norm)) for f in linears], -1), x, linears, grad)
    found = kernels.project(x, linears) if norm is None else kernels.project_normed(x, linears, norm)[0]
    for a, b in zip(results(found, x, linears, grad), expected, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("rank", [4, 0])
def test_an_input_that_goes_on_beside_its_projection_in_float64(rank):
    layer, out = linear(16, 24, rank), torch.randn(24, 16, dtype=torch.float64)
    norm = kernels.Norm(torch.randn(16, dtype=torch.float64), EPS)
    x = torch.randn(2, 7, 16, dtype=torch.float64, requires_grad=True)
    grad = torch.randn(2, 7, 16, dtype=torch.float64)
    found, same = kernels.project_normed(x, [layer], norm)
    expected = x + layer(rms_norm(x, norm)) @ out
    assert torch.equal(same, x)
    for a, b in zip(results(same + found @ out, x, [layer], grad), results(expected, x, [layer], grad), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-12, atol=1e-12)


def test_a_gradient_with_room_beside_it_is_used_where_it_lies_and_others_are_copied():
    left = torch.randn(5, 16)
    roomy = kernels._with_room(left, 5, 16)
    roomy.copy_(left)
    for x, in_place in ((roomy.view(1, 5, 16).reshape(-1, 16), True), (left, False), (roomy[:4], False)):
        wide = kernels._roomy(x, 80)
        assert (wide.data_ptr() == roomy.data_ptr()) == in_place
        assert wide.shape == (len(x), 80)
        assert torch.equal(wide[:, :16], x)
    foreign = torch.randn(5, 80)
    assert kernels._roomy(foreign[:, :16], 80).data_ptr() != foreign.data_ptr()
    assert kernels._roomy(roomy, 16 + 192).shape == (5, 208)  # More than the room there is.


@pytest.mark.parametrize("rank", [4, 0])
def test_a_projection_added_to_a_residual_in_float64(rank):
    layer = linear(24, 16, rank)
    x = torch.randn(2, 7, 24, dtype=torch.float64, requires_grad=True)
    residual = torch.randn(2, 7, 16, dtype=torch.float64, requires_grad=True)
    grad = torch.randn(2, 7, 16, dtype=torch.float64)
    found, expected = kernels.project(x, [layer], residual=residual), residual + layer(x)
    for output in (found, expected):
        residual.grad = None
        output.backward(grad, inputs=[residual], retain_graph=True)
        torch.testing.assert_close(residual.grad, grad, rtol=0, atol=0)
    for a, b in zip(results(found, x, [layer], grad), results(expected, x, [layer], grad), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("ranks", [(4, 3, 5), (4, 4, 0), (0, 0, 4), (0, 0, 0), (0, 4, 4)])
@pytest.mark.parametrize("normed", [True, False])
@pytest.mark.parametrize("keep", [True, False])
def test_feed_forward_in_float64(monkeypatch, ranks, normed, keep):
    monkeypatch.setattr(kernels, "_CHUNK", 5)
    mlp = Mlp(ranks)
    norm = kernels.Norm(torch.randn(16, dtype=torch.float64), EPS) if normed else None
    x = torch.randn(2, 7, 16, dtype=torch.float64, requires_grad=True)
    grad = torch.randn(2, 7, 16, dtype=torch.float64)
    expected = results(through(mlp, x, norm), x, [mlp], grad)
    for a, b in zip(results(kernels.feed_forward(x, mlp, norm, keep=keep), x, [mlp], grad), expected, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-12, atol=1e-12)


def test_an_input_that_needs_no_gradient_gets_none_and_the_adapters_do(monkeypatch):
    monkeypatch.setattr(kernels, "_whole_waves", lambda *_: pytest.fail("computed the gradient of the input"))
    mlp = Mlp((4, 4, 4))
    kernels.feed_forward(torch.randn(3, 16, dtype=torch.float64), mlp).sum().backward()
    assert all(p.grad is not None for p in mlp.parameters() if p.requires_grad)


@pytest.mark.parametrize("rows", [1, 4, 7, 8, 9])
def test_a_product_by_whole_waves_is_the_product(monkeypatch, rows):
    monkeypatch.setattr(kernels, "_rows_of_a_wave", lambda *_: 4)
    left, right = torch.randn(rows, 5, dtype=torch.float64), torch.randn(5, 3, dtype=torch.float64)
    torch.testing.assert_close(kernels._whole_waves(left, right), left @ right, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize(
    ("units", "columns", "rows"),
    [(132, 2112, 2304), (132, 2048, 2304), (132, 1088, 4224), (132, 2688, 0), (108, 2112, 0)],
)
def test_a_wave_is_a_tile_for_every_multiprocessor(monkeypatch, units, columns, rows):
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda _: SimpleNamespace(multi_processor_count=units))
    assert kernels._rows_of_a_wave(columns, torch.device("cuda")) == rows
    assert kernels._rows_of_a_wave(columns, torch.device("cpu")) == 0


def test_bfloat16_is_no_further_from_float64_than_the_plain_modules():
    """Of output and every gradient, the errors of eight draws together: those of a single draw vary by a half."""
    errors = torch.zeros(2, 8, dtype=torch.float64)
    for _ in range(8):
        mlp, exact = Mlp((4, 4, 4), torch.bfloat16), Mlp((4, 4, 4))
        exact.load_state_dict(mlp.state_dict())
        x = torch.randn(512, 16, dtype=torch.bfloat16, requires_grad=True)
        wide = x.detach().double().requires_grad_()
        grad = torch.randn(512, 16, dtype=torch.bfloat16)
        norm = kernels.Norm(torch.randn(16), EPS)
        expected = results(through(exact, wide, kernels.Norm(norm.weight.double(), EPS)), wide, [exact], grad.double())
        ours = results(kernels.feed_forward(x, mlp, norm), x, [mlp], grad)
        plain = results(through(mlp, x, norm), x, [mlp], grad)
        errors += torch.tensor(
            [[(a - b).square().sum() for a, b in zip(run, expected, strict=True)] for run in (ours, plain)]
        )
    assert (errors[0] <= errors[1]).all()


def test_an_update_of_1e_4_arrives_whole():
    layer = linear(64, 64, 8, torch.bfloat16)
    x = torch.randn(4096, 64).bfloat16()
    update = 1e-4 * torch.randn_like(layer.lora_B)
    delta = x.double() @ layer.lora_A.double().T @ update.double().T
    outputs = []
    for b in (torch.zeros_like(update), update):
        layer.lora_B.data = b
        outputs.append(kernels.project(x, [layer]).double())
    slope = ((outputs[1] - outputs[0]) * delta).sum() / delta.square().sum()
    assert 0.97 <= slope <= 1.03  # Its own noise at this size; 0.99 to 1.01 at the sizes of `benchmarks/check.py`.


@pytest.mark.parametrize("apart", [True, False])
def test_joined_and_rotated_is_what_transformers_computes(apart):
    from transformers.models.gemma import modeling_gemma

    lengths, heads, dim = (5, 3), 4, 6
    packed = [torch.randn(2, n, heads + 2, dim, dtype=torch.float64, requires_grad=True) for n in lengths]
    angle = torch.randn(2, sum(lengths), dim // 2, dtype=torch.float64).repeat(1, 1, 2)
    cos, sin = angle.cos(), angle.sin()
    *queries, key, value = kernels.JoinRotated.apply(cos, sin, heads, 2, apart, *packed)
    query = torch.cat(queries, dim=1)[:, : sum(lengths)]
    joint = torch.cat(packed, dim=1).transpose(1, 2)
    expected = modeling_gemma.apply_rotary_pos_emb(joint[:, :heads], joint[:, heads : heads + 1], cos, sin)
    found = (query, key[:, :-2], value[:, :-2])
    for a, b in zip(found, (*(t.transpose(1, 2) for t in expected), packed_values(packed)), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-12, atol=1e-12)
    assert not key[:, -2:].any()
    assert not value[:, -2:].any()
    weights = [torch.randn_like(t) for t in found]
    gradients = [
        torch.autograd.grad(sum((t * w).sum() for t, w in zip(ts, weights, strict=True)), packed, retain_graph=True)
        for ts in (found, (*(t.transpose(1, 2) for t in expected), packed_values(packed)))
    ]
    for a, b in zip(*gradients, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-12, atol=1e-12)


def packed_values(packed):
    return torch.cat(packed, dim=1)[:, :, -1:]


def test_only_plain_frozen_weights_are_fused():
    adapted = linear(4, 4, 2)
    assert kernels.fusable(adapted)
    assert kernels.fusable(linear(4, 4, 0))
    assert not kernels.fusable(nn.Linear(4, 4, bias=False))  # It trains.
    assert not kernels.fusable(nn.Linear(4, 4).requires_grad_(False))  # It has a bias.
    with_dropout = LoRALinear(nn.Linear(4, 4, bias=False), LoRAConfig(rank=2, alpha=2.0, dropout=0.5))
    assert not kernels.fusable(with_dropout)
    assert kernels.fusable(with_dropout.eval())
    adapted.merge()
    assert not kernels.fusable(adapted)


def test_rotating_back_undoes_rotating():
    packed = torch.randn(2, 5, 6, 8, dtype=torch.float64)
    angle = torch.randn(2, 5, 4, dtype=torch.float64).repeat(1, 1, 2)
    whole = tuple(torch.empty(2, 5, n, 8, dtype=torch.float64) for n in (4, 1, 1))
    pointwise.rotate(packed, angle.cos(), angle.sin(), whole, 0, 0)
    back = torch.empty_like(packed)
    pointwise.rotate_back(back, angle.cos(), angle.sin(), whole, 0, 0)
    torch.testing.assert_close(back, packed)

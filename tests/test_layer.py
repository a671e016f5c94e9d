"""LoRALinear against float64 arithmetic, and through everything a module goes through."""

import copy
import pickle

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from openpi_lora_patch import LoRAError
from openpi_lora_patch.lora import LoRAConfig, LoRALinear, inject, lora_layers


def make(rank=4, alpha=6.0, *, in_features=24, out_features=40, bias=False, dtype=torch.float32, trained=True, **more):
    torch.manual_seed(0)
    base = nn.Linear(in_features, out_features, bias=bias).to(dtype)
    layer = LoRALinear(base, LoRAConfig(rank, alpha, **more))
    if trained:
        nn.init.normal_(layer.lora_B, std=0.1)
    return layer


def exact(layer, x):
    """The definition, in float64."""
    weight = layer.weight.double() + layer.scaling * layer.lora_B.double() @ layer.lora_A.double()
    bias = None if layer.bias is None else layer.bias.double()
    return nn.functional.linear(x.double(), weight, bias)


@settings(max_examples=40, deadline=None)
@given(
    rank=st.integers(1, 16),
    alpha=st.floats(0.1, 64),
    rslora=st.booleans(),
    bias=st.booleans(),
    sizes=st.tuples(st.integers(1, 48), st.integers(1, 48)),
    batch=st.lists(st.integers(1, 4), max_size=3),
)
def test_forward_is_the_definition(rank, alpha, rslora, bias, sizes, batch):
    layer = make(rank, alpha, rslora=rslora, bias=bias, in_features=sizes[0], out_features=sizes[1])
    x = torch.randn(*batch, sizes[0])
    expected = exact(layer, x)
    assert layer(x).shape == (*batch, sizes[1])
    torch.testing.assert_close(layer(x).double(), expected, rtol=1e-4, atol=1e-4 * max(1.0, layer.scaling))
    layer.merge()
    torch.testing.assert_close(layer.eval()(x).double(), expected, rtol=1e-4, atol=1e-4 * max(1.0, layer.scaling))


def test_scaling_is_alpha_over_rank_or_its_root():
    assert LoRAConfig(16, 8.0).scaling == 0.5
    assert LoRAConfig(16, 8.0, rslora=True).scaling == 2.0


def test_gradients_are_those_of_the_definition():
    layer = make()
    x = torch.randn(3, 24)
    layer(x).square().sum().backward()
    a, b = layer.lora_A.detach().double().requires_grad_(), layer.lora_B.detach().double().requires_grad_()
    weight = layer.weight.double() + layer.scaling * b @ a
    nn.functional.linear(x.double(), weight).square().sum().backward()
    torch.testing.assert_close(layer.lora_A.grad.double(), a.grad, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(layer.lora_B.grad.double(), b.grad, rtol=1e-5, atol=1e-5)
    assert layer.weight.grad is None


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_fresh_adapter_changes_no_bit(dtype):
    layer = make(dtype=dtype, trained=False, bias=True)
    x = torch.randn(5, 24, dtype=dtype)
    assert torch.equal(layer(x), layer.base_layer(x))


def test_a_bfloat16_input_gives_a_bfloat16_output_from_float32_adapters():
    layer = make(dtype=torch.bfloat16)
    x = torch.randn(64, 24, dtype=torch.bfloat16)
    out = layer(x)
    assert out.dtype == torch.bfloat16
    error = (out.double() - exact(layer, x)).norm() / exact(layer, x).norm()
    assert error < 5e-3


def test_reads_go_to_the_base_layer():
    layer = make(bias=True)
    assert layer.weight is layer.base_layer.weight
    assert layer.bias is layer.base_layer.bias
    assert (layer.in_features, layer.out_features) == (24, 40)
    assert "weight" not in dict(layer.named_parameters(recurse=False))


@pytest.mark.parametrize("bias", [False, True])
def test_names_and_shapes(bias):
    layer = make(bias=bias)
    expected = {"lora_A": (4, 24), "lora_B": (40, 4), "base_layer.weight": (40, 24)}
    expected |= {"base_layer.bias": (40,)} if bias else {}
    assert {name: tuple(tensor.shape) for name, tensor in layer.state_dict().items()} == expected


@pytest.mark.parametrize("cast", [lambda m: m.to(torch.bfloat16), lambda m: m.half(), lambda m: m.double()])
def test_adapters_keep_every_bit_when_the_model_is_cast(cast):
    layer = make()
    layer(torch.randn(2, 24)).sum().backward()
    before = layer.lora_A.detach().clone()
    cast(layer)
    assert layer.lora_A.dtype == layer.lora_B.dtype == layer.lora_A.grad.dtype == torch.float32
    assert torch.equal(layer.lora_A, before)
    assert layer.weight.dtype != torch.float32


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_merge_twice_is_once_and_unmerge_restores_every_bit(dtype):
    layer = make(dtype=dtype).eval()
    x, before = torch.randn(7, 24, dtype=dtype), layer.weight.detach().clone()
    layer.merge()
    once = layer.weight.detach().clone()
    layer.merge()
    assert torch.equal(layer.weight, once)
    assert not torch.equal(once, before)
    assert torch.equal(layer(x), layer.base_layer(x))
    layer.unmerge()
    layer.unmerge()
    assert torch.equal(layer.weight, before)
    assert not layer.merged


def test_a_merged_layer_neither_trains_nor_saves():
    layer = make()
    layer.merge()
    with pytest.raises(LoRAError, match="cannot be trained"):
        layer.train()(torch.randn(1, 24))
    with torch.no_grad():
        layer(torch.randn(1, 24))
    with pytest.raises(LoRAError, match="apply the adapter twice"):
        nn.ModuleDict({"q": layer}).state_dict()


def test_dropout_is_on_in_training_only():
    layer = make(dropout=0.5)
    x = torch.randn(64, 24)
    assert not torch.equal(layer.train()(x), layer(x))
    assert torch.equal(layer.eval()(x), layer(x))
    torch.testing.assert_close(layer(x).double(), exact(layer, x), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("duplicate", [copy.deepcopy, lambda m: pickle.loads(pickle.dumps(m))])
def test_copies_compute_the_same_with_weights_of_their_own(duplicate):
    layer, x = make(), torch.randn(3, 24)
    twin = duplicate(layer)
    assert torch.equal(twin(x), layer(x))
    with torch.no_grad():
        layer.base_layer.weight.zero_()
        layer.lora_B.zero_()
    assert twin(x).abs().sum() > 0


def test_compiles_without_a_graph_break():
    layer, x = make(), torch.randn(3, 24)
    compiled = torch.compile(layer, fullgraph=True, backend="aot_eager")
    compiled(x).sum().backward()
    torch.testing.assert_close(compiled(x), layer(x))
    assert layer.lora_B.grad is not None


@pytest.mark.parametrize(("rank", "dropout"), [(0, 0.0), (-1, 0.0), (4, 1.0), (4, -0.1)])
def test_values_without_meaning_are_refused(rank, dropout):
    with pytest.raises(LoRAError):
        LoRAConfig(rank, alpha=1.0, dropout=dropout)


def tower():
    return nn.ModuleList(
        nn.ModuleDict({"attn": nn.ModuleDict({"q_proj": nn.Linear(4, 4), "norm": nn.LayerNorm(4)})}) for _ in range(3)
    )


def test_inject_swaps_exactly_the_targets():
    root = tower()
    names = inject(root, {"q_proj": LoRAConfig(2, 2.0)})
    assert names == [f"{i}.attn.q_proj" for i in range(3)] == list(lora_layers(root))
    assert type(root[0]["attn"]["norm"]) is nn.LayerNorm


@pytest.mark.parametrize(
    ("targets", "message"), [({"q_proj", "v_proj"}, "no v_proj"), ({"q_proj", "norm"}, "norm is a LayerNorm")]
)
def test_inject_swaps_nothing_where_a_target_does_not_fit(targets, message):
    root = tower()
    with pytest.raises(LoRAError, match=message):
        inject(root, dict.fromkeys(targets, LoRAConfig(2, 2.0)))
    assert not lora_layers(root)


def test_a_second_adapter_is_refused():
    root = tower()
    inject(root, {"q_proj": LoRAConfig(2, 2.0)})
    with pytest.raises(LoRAError, match="is a LoRALinear"):
        inject(root, {"q_proj": LoRAConfig(2, 2.0)})

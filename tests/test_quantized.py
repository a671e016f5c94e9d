"""Quantised bases: what they hold, that gradients are those of the dense weight, checkpoints, merging, refusals."""

import copy

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, load_model, save_file, save_model
from torch import nn

from openpi_lora_patch import merge as command
from openpi_lora_patch.checkpoint import adapters
from openpi_lora_patch.checkpoint.merge import merge
from openpi_lora_patch.checkpoint.training import load_adapters_through, save_adapters_only
from openpi_lora_patch.errors import LoRAError
from openpi_lora_patch.lora import LoRAConfig, kernels, lora_layers, quantized
from openpi_lora_patch.lora.layer import LoRALinear
from openpi_lora_patch.lora.quantized import QuantizedLinear, UnusedLinear, quantize, round_trip
from test_fast import CHANGES, adapted, run
from test_fast import PLAIN as PLAIN_PLAN


def _missing(name):
    try:
        quantized.require(name)
    except LoRAError:
        return True
    return False


FORMATS = [pytest.param(n, marks=pytest.mark.skipif(_missing(n), reason=f"no {n} here")) for n in quantized.FORMATS]
# By how much of its norm a Gaussian weight is changed: 127 and 7.5 levels, 3 bits of mantissa.
DRIFT = {"int8": 0.02, "fp8": 0.04, "nf4": 0.11}


def linear(name=None, rows=128, columns=96):
    torch.manual_seed(0)
    plain = nn.Linear(columns, rows, bias=False, dtype=torch.bfloat16)
    return plain if name is None else QuantizedLinear(plain, name)


def twins(name):
    """A quantised Linear, and a plain one that holds what it computes with."""
    held, plain = linear(name), linear()
    plain.weight.data = held.weight
    return held, plain


@pytest.mark.parametrize("name", FORMATS)
def test_little_is_lost(name):
    weight = linear(rows=256, columns=96).weight.detach().float().normal_().bfloat16()
    drift = (round_trip(weight, name).float() - weight.float()).norm() / weight.float().norm()
    assert 0 < drift < DRIFT[name]


@pytest.mark.parametrize("name", FORMATS)
@settings(max_examples=40, deadline=None)
@given(seed=st.integers(0, 2**16), scale=st.floats(1e-6, 1e3), zeros=st.booleans())
def test_what_is_computed_with_quantises_to_the_same_bits(name, seed, scale, zeros):
    weight = (torch.randn(8, 96, generator=torch.Generator().manual_seed(seed)) * scale).bfloat16()
    weight[:4] *= not zeros
    once = round_trip(weight, name)
    assert torch.equal(round_trip(once, name), once)


@pytest.mark.parametrize("name", FORMATS)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_output_and_gradient_are_those_of_the_weight_it_computes_with(name, dtype):
    held, plain = twins(name)
    x = torch.randn(3, 5, 96, dtype=dtype)
    outputs = []
    for module in (held, plain.to(dtype)):
        own = x.clone().requires_grad_()
        y = module(own)
        y.square().sum().backward()
        outputs.append((y, own.grad))
    for one, other in zip(*outputs, strict=True):
        assert torch.equal(one, other)


@pytest.mark.parametrize("name", FORMATS)
def test_no_dense_weight_is_kept_for_the_backward_pass(name):
    held = linear(name)
    kept = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t) or t, lambda t: t):
        layer = LoRALinear(held, LoRAConfig(rank=2, alpha=2.0))
        x = torch.randn(4, 96, dtype=torch.bfloat16, requires_grad=True)
        layer(x)
        kernels.project(x, [layer])
    assert kept
    assert not any(t.numel() == held.in_features * held.out_features and t.is_floating_point() for t in kept)


@pytest.mark.parametrize("name", FORMATS)
def test_without_a_weight_it_holds_nothing_until_one_is_loaded(name):
    empty, held = QuantizedLinear(nn.Linear(96, 128, bias=False, device="meta"), name), linear(name)
    assert empty.data.nbytes == empty.scale.nbytes == 0
    assert empty.weight.is_meta
    assert (empty.weight.shape, empty.weight.dtype) == (held.weight.shape, held.weight.dtype)
    empty.to(torch.bfloat16).load_state_dict({"weight": linear().weight})
    assert torch.equal(empty.weight, held.weight)


@pytest.mark.parametrize("name", FORMATS)
def test_casts_and_optimizers_do_not_reach_it(name):
    held = linear(name)
    before = held.weight
    assert torch.equal(held.to(torch.float16).double().weight, before)
    assert held.weight.dtype == held.dtype == torch.bfloat16
    assert not list(held.parameters())
    assert not list(held.buffers())


def pi0(name):
    """A small pi0 whose base is quantised, one with the same weights in full, and the inputs of their towers."""
    held, inputs = adapted("pi0", torch.float32)
    quantize(lora_layers(held).values(), name)
    plain, _ = adapted("pi0", torch.float32)
    for one, other in zip(lora_layers(held).values(), lora_layers(plain).values(), strict=True):
        other.base_layer.weight.data = one.weight
    return (
        held.bfloat16(),
        plain.bfloat16(),
        {key: x.bfloat16() if x.is_floating_point() else x for key, x in inputs.items()},
    )


@pytest.mark.parametrize("name", FORMATS)
def test_training_is_that_of_the_dequantised_model(name):
    held, plain, inputs = pi0(name)
    for change in ({}, CHANGES[-1]):  # openpi's plain way, and every part at once.
        plan = type(PLAIN_PLAN)(**{**vars(PLAIN_PLAN), **change})
        outputs, gradients = run(held, inputs, plan)
        wanted_outputs, wanted = run(plain, inputs, plan)
        assert torch.equal(outputs[1], wanted_outputs[1]), change
        assert gradients.keys() == wanted.keys()
        for key in wanted:
            assert torch.equal(gradients[key], wanted[key]), (change, key)


@pytest.mark.parametrize("name", FORMATS)
def test_a_whole_checkpoint_is_a_plain_one_and_comes_back_bit_for_bit(name, tmp_path):
    held, plain, _ = pi0(name)
    save_model(held, tmp_path / "model.safetensors")
    load_model(plain_copy := copy.deepcopy(plain), tmp_path / "model.safetensors")
    for key, tensor in plain.state_dict().items():
        assert torch.equal(plain_copy.state_dict()[key], tensor), key
    fresh, _, _ = pi0(name)
    for layer in lora_layers(fresh).values():
        layer.base_layer.data.zero_()
    load_model(fresh, tmp_path / "model.safetensors")
    for one, other in zip(lora_layers(fresh).values(), lora_layers(held).values(), strict=True):
        assert torch.equal(one.base_layer.data, other.base_layer.data)
        assert torch.equal(one.base_layer.scale, other.base_layer.scale)


@pytest.mark.parametrize("name", FORMATS)
def test_adapters_know_the_base_they_were_trained_on(name, tmp_path):
    held, _, _ = pi0(name)
    original = adapted("pi0", torch.float32)[0]
    adapters.save_adapter(held, tmp_path / "adapter")
    metadata = adapters.read_adapter(tmp_path / "adapter").metadata
    assert metadata["quantization"] == name
    assert metadata["base"] == adapters.take(original).metadata["base"]
    adapters.load_adapter(original, tmp_path / "adapter")
    other, _, _ = pi0(name)
    some = next(iter(lora_layers(other).values())).base_layer
    some.load_state_dict({"weight": some.weight + 1})
    with pytest.raises(adapters.CheckpointError, match="another base"):
        adapters.load_adapter(other, tmp_path / "adapter")


@pytest.mark.parametrize("name", FORMATS)
def test_a_run_that_saves_adapters_only_resumes(name, tmp_path):
    held, _, _ = pi0(name)
    load_adapters_through(held)
    save_adapters_only(held)
    save_model(held, tmp_path / "model.safetensors")
    fresh, _, _ = pi0(name)
    for layer in lora_layers(fresh).values():
        layer.reset_parameters()
    load_adapters_through(fresh)
    save_adapters_only(fresh)
    load_model(fresh, tmp_path / "model.safetensors")
    assert adapters.take(fresh).metadata == adapters.take(held).metadata
    for one, other in zip(lora_layers(fresh).values(), lora_layers(held).values(), strict=True):
        assert torch.equal(one.lora_A, other.lora_A)
        assert torch.equal(one.lora_B, other.lora_B)
        assert torch.equal(one.weight, other.weight)


@pytest.fixture
def base(tmp_path):
    """The small pi0's plain checkpoint, in full."""
    state = adapted("pi0", torch.float32)[0].state_dict()
    plain = {key.replace(".base_layer.", "."): t.clone() for key, t in state.items() if ".lora_" not in key}
    tied = "paligemma_with_expert.paligemma.model.language_model.embed_tokens.weight"
    save_file({key: tensor for key, tensor in plain.items() if key != tied}, tmp_path / "base.safetensors")
    return tmp_path / "base.safetensors"


@pytest.mark.parametrize("name", FORMATS)
def test_merging_adds_to_the_base_that_was_trained_beside(name, base, tmp_path):
    held, _, _ = pi0(name)
    adapters.save_adapter(held, tmp_path / "adapter")
    report = merge(base, tmp_path / "adapter", tmp_path / "out")
    merged = load_file(tmp_path / "out" / "model.safetensors")
    for key, layer in lora_layers(held).items():
        assert torch.equal(merged[f"{key}.weight"], layer.weight.float() + layer.delta_weight()), key
        assert 0 < report[key].drift < 2 * DRIFT[name]


@pytest.mark.parametrize("trained_on", ["bf16", "the same"])
@pytest.mark.parametrize("name", FORMATS)
def test_what_is_merged_for_a_quantised_base_is_that_base_bit_for_bit(name, trained_on, base, tmp_path):
    model = adapted("pi0", torch.float32)[0] if trained_on == "bf16" else pi0(name)[0]
    adapters.save_adapter(model, tmp_path / "adapter")
    report = merge(base, tmp_path / "adapter", tmp_path / "out", dtype=torch.bfloat16, quantize=name)
    merged = load_file(tmp_path / "out" / "model.safetensors")
    assert {tensor.dtype for tensor in merged.values()} == {torch.bfloat16}
    fresh, _, _ = pi0(name)
    load_model(fresh, tmp_path / "out" / "model.safetensors")
    for key, layer in lora_layers(fresh).items():
        stored, own = merged[f"{key}.weight"], lora_layers(model)[key]
        assert torch.equal(layer.weight, stored), key
        weight, delta = own.weight.float(), own.delta_weight()
        kept = ((stored.float() - weight) * delta).sum() / delta.square().sum()
        lost = (stored.float() - weight - delta).norm() / (weight + delta).norm()
        assert report[key].kept == pytest.approx(kept.item(), abs=1e-4)
        assert report[key].requantized == pytest.approx(lost.item(), rel=1e-4)
        assert 0 < report[key].requantized < DRIFT[name]
        assert (report[key].drift == 0) == (trained_on == "bf16")

    for layer in lora_layers(fresh).values():
        layer.lora_B.data.zero_()
    adapters.save_adapter(fresh, tmp_path / "nothing")
    out = tmp_path / "out" / "model.safetensors"
    again = merge(out, tmp_path / "nothing", tmp_path / "again", dtype=torch.bfloat16, quantize=name)
    assert (tmp_path / "again" / "model.safetensors").read_bytes() == out.read_bytes()
    assert {(cost.drift, cost.requantized) for cost in again.values()} == {(0.0, 0.0)}


@pytest.mark.parametrize("name", FORMATS)
def test_an_adapter_that_the_format_is_too_coarse_for_is_reported_as_lost(name, base, tmp_path):
    model, _, _ = pi0(name)
    for layer in lora_layers(model).values():
        layer.lora_B.data.mul_(1e-6)
    adapters.save_adapter(model, tmp_path / "adapter")
    report = merge(base, tmp_path / "adapter", tmp_path / "out", dtype=torch.bfloat16, quantize=name)
    assert all(abs(cost.kept) < 0.01 for cost in report.values())


@pytest.mark.parametrize("dtype", [None, torch.float32, torch.float16])
def test_a_merge_for_a_quantised_base_is_stored_as_bfloat16_or_refused(dtype, tmp_path):
    with pytest.raises(LoRAError, match="--dtype bfloat16"):
        merge(tmp_path / "base", tmp_path / "adapter", tmp_path / "out", dtype=dtype, quantize="int8")


def test_a_weight_that_is_no_whole_blocks_is_refused_and_nothing_is_written(tmp_path, capsys):
    (tmp_path / "base").mkdir()
    save_file({"a.weight": torch.ones(5, 7)}, tmp_path / "base" / "model.safetensors")
    tensors = {
        "base_model.model.a.lora_A.weight": torch.ones(1, 7),
        "base_model.model.a.lora_B.weight": torch.ones(5, 1),
    }
    config = {"peft_type": "LORA", "r": 1, "lora_alpha": 1}
    adapters.write_adapter(adapters.Adapter(config, tensors, {}), tmp_path / "adapter")
    arguments = [str(tmp_path / "base"), str(tmp_path / "adapter"), "--out", str(tmp_path / "out")]
    assert command.main([*arguments, "--dtype", "bfloat16", "--quantize", "int8"]) == 1
    assert "whole blocks" in capsys.readouterr().err
    assert sorted(path.name for path in tmp_path.iterdir()) == ["adapter", "base"]
    assert command.main([*arguments, "--quantize", "int8"]) == 1
    assert "--dtype bfloat16" in capsys.readouterr().err
    assert command.main([*arguments, "--dtype", "bfloat16"]) == 0


@pytest.mark.parametrize("name", FORMATS)
def test_it_compiles_whole(name):
    layer = LoRALinear(linear(name), LoRAConfig(rank=2, alpha=2.0))
    x = torch.randn(4, 96, dtype=torch.bfloat16)
    results = []
    for module in (layer, torch.compile(layer, backend="aot_eager", fullgraph=True)):
        own = x.clone().requires_grad_()
        y = module(own)
        y.float().square().sum().backward()
        results.append((y, own.grad))
    for one, other in zip(*results, strict=True):
        assert torch.equal(one, other)


def test_what_is_missing_is_named(monkeypatch):
    monkeypatch.setattr(quantized.importlib.util, "find_spec", lambda _: None)
    with pytest.raises(LoRAError, match=r"openpi-lora-patch\[quant\]"):
        quantized.require("nf4")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda: (8, 6))
    quantized.require("int8")
    with pytest.raises(LoRAError, match=r"8\.6"):
        quantized.require("fp8")


@pytest.mark.parametrize("name", FORMATS)
def test_an_adapter_is_not_merged_in_place(name):
    layer = LoRALinear(linear(name), LoRAConfig(rank=2, alpha=2.0))
    with pytest.raises(LoRAError, match="merge the files"):
        layer.merge()


def test_a_linear_that_nothing_calls_stays_in_host_memory_and_in_checkpoints():
    model, wanted = nn.Sequential(linear(), linear()), linear().weight + 1
    model[1] = UnusedLinear(model[1])
    assert [name for name, _ in model.named_parameters()] == ["0.weight"]
    assert model.to("meta")[1].weight.device.type == "cpu"
    with pytest.raises(RuntimeError, match="Missing key"):
        UnusedLinear(linear()).load_state_dict({"1.weight": wanted})
    with pytest.raises(RuntimeError, match="size mismatch"):
        UnusedLinear(linear()).load_state_dict({"weight": wanted.T})
    unused = UnusedLinear(linear())
    unused.load_state_dict({"weight": wanted.float()})
    assert unused.weight.dtype == torch.bfloat16
    assert torch.equal(unused.state_dict()["weight"], wanted)

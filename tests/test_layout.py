"""Checkpoints of every layout, as real safetensors files, through the functions openpi calls."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, load_model, save_file, save_model

from golden import GOLDEN
from openpi_lora_patch import CheckpointError
from openpi_lora_patch.apply import apply_lora
from openpi_lora_patch.lora import lora_layers
from openpi_lora_patch.reference import Reference
from test_pi0 import TOWERS, adapters

DATA = Reference(GOLDEN / "pi0_float32.safetensors")


def lora_model(rank=4, seed=None):
    model = DATA.pi0()
    apply_lora(model, **adapters(*TOWERS, rank=rank))
    if seed is not None:
        torch.manual_seed(seed)
        for parameter in model.parameters():
            torch.nn.init.normal_(parameter, std=0.05)
    return model


def bits(model):
    return {name: tensor.clone() for name, tensor in model.state_dict().items()}


def same(one, other):
    return one.keys() == other.keys() and all(torch.equal(one[name], other[name]) for name in one)


def test_a_base_checkpoint_loads_strictly_and_keeps_the_adapters(tmp_path):
    base = DATA.pi0()
    torch.nn.init.normal_(base.action_in_proj.weight)
    save_model(base, tmp_path / "base.safetensors")
    model = lora_model(seed=1)
    before = bits(model)
    assert load_model(model, tmp_path / "base.safetensors") == (set(), [])
    after, expected = bits(model), base.state_dict()
    for name, tensor in after.items():
        assert torch.equal(tensor, before[name] if "lora_" in name else expected[name.replace("base_layer.", "")])


def test_our_own_checkpoint_loads_bit_for_bit(tmp_path):
    model, other = lora_model(seed=1), lora_model(seed=2)
    save_model(model, tmp_path / "lora.safetensors")
    load_model(other, tmp_path / "lora.safetensors")
    assert same(bits(model), bits(other))


def test_transposed_adapters_load(tmp_path):
    model, other = lora_model(seed=1), lora_model(seed=2)
    save_model(model, tmp_path / "lora.safetensors")
    tensors = load_file(tmp_path / "lora.safetensors")
    save_file(
        {name: t.T.contiguous() if "lora_" in name else t for name, t in tensors.items()}, tmp_path / "t.safetensors"
    )
    load_model(other, tmp_path / "t.safetensors")
    assert same(bits(model), bits(other))


def test_a_model_inside_another_loads_too():
    model, other = torch.nn.ModuleDict({"policy": lora_model(seed=1)}), DATA.pi0()
    model.load_state_dict({f"policy.{name}": tensor for name, tensor in other.state_dict().items()})
    weight = model["policy"].paligemma_with_expert.gemma_expert.model.layers[0].mlp.up_proj.weight
    assert torch.equal(weight, other.paligemma_with_expert.gemma_expert.model.layers[0].mlp.up_proj.weight)


@settings(max_examples=12, deadline=None)
@given(st.data())
def test_a_missing_or_foreign_tensor_is_named(tmp_path_factory, data):
    path = tmp_path_factory.mktemp("damaged") / "model.safetensors"
    save_model(lora_model(seed=1), path)
    tensors = load_file(path)
    name = data.draw(st.sampled_from(sorted(tensors)))
    tensor = tensors.pop(name)
    if data.draw(st.booleans()):
        name += "_foreign"
        tensors |= {name.removesuffix("_foreign"): tensor, name: tensor.clone()}
    save_file(tensors, path)
    with pytest.raises(RuntimeError, match=name.replace(".", r"\.")):
        load_model(lora_model(), path)


@settings(max_examples=12, deadline=None)
@given(st.data())
def test_a_tensor_of_another_shape_is_named_and_nothing_is_loaded(data):
    model = lora_model(seed=2)
    state, before = lora_model(seed=1).state_dict(), bits(model)
    name = data.draw(st.sampled_from(sorted(state)))
    state[name] = torch.zeros(*state[name].shape, 2)
    with pytest.raises(CheckpointError, match=name.replace(".", r"\.")):
        model.load_state_dict(state)
    assert same(bits(model), before)


def test_another_rank_is_refused_and_nothing_is_loaded():
    model, before = lora_model(rank=4, seed=2), None
    before = bits(model)
    with pytest.raises(CheckpointError, match=r"lora_A \(8, 64\) for \(4, 64\)"):
        model.load_state_dict(lora_model(rank=8).state_dict())
    assert same(bits(model), before)


def test_a_base_weight_under_both_names_is_refused():
    model = lora_model()
    state = model.state_dict()
    name = next(name for name in state if name.endswith("base_layer.weight"))
    state[name.replace("base_layer.", "")] = state[name]
    with pytest.raises(CheckpointError, match="twice"):
        model.load_state_dict(state)


def test_a_resumed_optimizer_goes_on_bit_for_bit(tmp_path):
    def train(model, optimizer, steps):
        for _ in range(steps):
            DATA.loss(model.train()).mean().backward()
            optimizer.step()
            optimizer.zero_grad()

    whole, resumed = lora_model(seed=3), lora_model(seed=4)
    optimizer = torch.optim.AdamW(whole.parameters(), lr=1e-3)
    train(whole, optimizer, 1)
    save_model(whole, tmp_path / "model.safetensors")
    torch.save(optimizer.state_dict(), tmp_path / "optimizer.pt")
    train(whole, optimizer, 1)

    load_model(resumed, tmp_path / "model.safetensors")
    later = torch.optim.AdamW(resumed.parameters(), lr=1e-3)
    later.load_state_dict(torch.load(tmp_path / "optimizer.pt", weights_only=True))
    train(resumed, later, 1)
    assert same(bits(whole), bits(resumed))
    assert len(lora_layers(resumed)) == 42

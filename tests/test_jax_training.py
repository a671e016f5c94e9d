"""JAX's own parametrisation: the model, its loss and its gradients against what openpi's JAX code computed."""

import dataclasses

import hypothesis.strategies as st
import pytest
import torch
from hypothesis import given, settings
from safetensors.torch import load_file, load_model, save_model
from torch import nn

import jax_reference as reference
from golden import GOLDEN
from openpi_lora_patch.apply import apply_lora
from openpi_lora_patch.checkpoint import adapters
from openpi_lora_patch.checkpoint.jax_layout import TOWERS, as_linears, base_tensors, lora_names, split
from openpi_lora_patch.errors import CheckpointError
from openpi_lora_patch.lora import LoRAConfig, as_jax, from_openpi, inject, kernels, lora_layers
from openpi_lora_patch.lora.jax import FORMS
from openpi_lora_patch.pi0 import PI0, Observation, PI0Config, Tower
from openpi_lora_patch.reference import distance

KINDS = ["pi0", "pi05"]
BOUND = 1e-5
GRADIENT_BOUND = 1e-4  # Of the largest element; float32 on both sides.


@pytest.fixture(params=KINDS)
def golden(request):
    data = load_file(GOLDEN / f"jax_training_{request.param}.safetensors")
    return request.param == "pi05", data, part(data, "params/")


def part(data, prefix):
    return {name.removeprefix(prefix): tensor for name, tensor in data.items() if name.startswith(prefix)}


def adapter_configs(tower, heads=8):
    theirs = {kind: LoRAConfig(rank, alpha) for kind, (rank, alpha) in reference.LORA[tower].items()}
    return as_jax(from_openpi(theirs), heads) if heads else from_openpi(theirs)


def lora_model(pi05, heads=8):
    vision = {"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2, "num_attention_heads": 2}
    towers = (Tower(**reference.PALIGEMMA), Tower(**reference.EXPERT))
    config = PI0Config(pi05, "float32", reference.DIM, reference.HORIZON, reference.VOCABULARY, *towers, vision)
    model = PI0(config)
    apply_lora(model, paligemma=adapter_configs("paligemma", heads), action_expert=adapter_configs("expert", heads))
    return model


def linears(tensors):
    """Each Linear with adapters: its A and B, of JAX's a and b in `tensors`; and b, by layer."""
    for base in (name for name in tensors if lora_names(name)[0] in tensors):
        kind, suffix = split(base)
        for layer, (a, b) in enumerate(zip(*(tensors[name] for name in lora_names(base)), strict=True)):
            for name, (A, B) in as_linears(kind, a, b).items():
                yield f"{TOWERS[suffix]}.layers.{layer}.{name}", A, B, b


def base_state(params):
    names = [name for name in params if "lora_" not in name]
    return {own: value for name in names for own, value in base_tensors(name, params[name])}


def with_params(model, params):
    layers = lora_layers(model)
    state = {
        own: value
        for name, tensor in params.items()
        if "lora_" not in name
        for own, value in base_tensors(name, tensor)
    }
    for name, A, B, b in linears(params):
        state[f"{name}.lora_A"] = A
        own, parameter = list(layers[name].named_parameters(recurse=False))[1]
        # Where JAX has a B for each head, the model has one that differs from the others as JAX's do.
        state[f"{name}.{own}"] = b.transpose(1, 2) if parameter.ndim == 3 else B
    missing, unexpected = model.load_state_dict(state, strict=False)
    assert not unexpected
    assert {name.rpartition(".")[0].rpartition(".")[2] for name in missing} <= {"embed_tokens", "lm_head"}
    return model


def observation():
    data = reference.inputs()
    images = [image.permute(0, 3, 1, 2) for image in data["images"]]
    return Observation(images, list(data["image_masks"]), data["tokens"], data["token_mask"], data["state"])


def training_loss(model, data):
    return model(observation(), reference.inputs()["actions"], data["in/noise"], data["in/time"]).mean()


def test_loss_actions_and_each_adapters_gradient_are_jaxs(golden):
    pi05, data, params = golden
    model = with_params(lora_model(pi05), params)
    loss = training_loss(model, data)
    loss.backward()
    assert distance(loss, data["out/loss"]) <= BOUND
    actions = model.sample_actions(observation(), data["in/noise"], reference.STEPS)
    assert distance(actions, data["out/actions"]) <= BOUND
    compared = 0
    for name, A, B, b in linears({**params, **part(data, "grad/")}):
        (_, own_A), (_, own_B) = lora_layers(model)[name].named_parameters(recurse=False)
        expected = b.transpose(1, 2) if own_B.ndim == 3 else B
        for found, wanted in ((own_A.grad, A), (own_B.grad, expected)):
            found = torch.zeros_like(wanted) if found is None else found
            assert (found - wanted).abs().max() <= GRADIENT_BOUND * max(0.01, wanted.abs().max().item()), name
            compared += bool(wanted.abs().max() > 1e-6)
    assert compared > 2 * 7 * 2 * 2 - 14  # All but what nothing of the last prefix layer reads.


def test_pefts_parametrisation_is_another_model(golden):
    pi05, data, params = golden
    model = lora_model(pi05, heads=None)
    state = base_state(params)
    for name, A, B, _ in linears(params):
        if not name.endswith("q_proj"):
            state |= {f"{name}.lora_A": A, f"{name}.lora_B": B}
    model.load_state_dict(state, strict=False)
    assert distance(training_loss(model, data), data["out/loss"]) > 100 * BOUND


def test_initial_values_are_jaxs():
    layers = lora_layers(lora_model(False)).values()
    for parameters in zip(*(layer.parameters(recurse=False) for layer in layers), strict=True):
        values = torch.cat([parameter.detach().flatten() for parameter in parameters])
        assert abs(values.mean()) < 5e-4
        assert abs(values.std() - 0.01) < 5e-4


def linear(form, rank, heads=2, out=8, size=6):
    base = nn.Linear(size, out, bias=False).requires_grad_(False)
    return FORMS[form](
        base, LoRAConfig(rank=rank * (heads if form == "per_head" else 1), alpha=3.0, form=form, heads=heads)
    )


@settings(max_examples=20, deadline=None)
@given(st.sampled_from(sorted(FORMS)), st.integers(1, 4), st.sampled_from([1, 2, 4]))
def test_every_form_computes_saves_moves_and_merges_as_its_matrices_say(form, rank, heads):
    layer = linear(form, rank, heads)
    with torch.no_grad():
        for parameter in layer.parameters(recurse=False):
            parameter.normal_()
    x = torch.randn(3, 6)
    expected = x @ (layer.weight + layer.scaling * layer.lora_B @ layer.lora_A).T
    torch.testing.assert_close(layer(x), expected)
    torch.testing.assert_close(kernels.project(x, [layer]), expected)  # The fused functions know no forms.
    other = linear(form, rank, heads)
    other.load_state_dict(layer.state_dict())
    assert torch.equal(other(x), layer(x))
    # What stands for a B gives that B again, bit for bit.
    again = layer.parameter_for(layer.lora_B.detach())
    assert again.shape == list(layer.parameters(recurse=False))[1].shape
    with torch.no_grad():
        list(other.parameters(recurse=False))[1].copy_(again)
    assert torch.equal(other.lora_B, layer.lora_B)
    layer.merge()
    torch.testing.assert_close(layer.eval()(x), expected)
    assert {p.dtype for p in layer.bfloat16().parameters(recurse=False)} == {torch.float32}


@pytest.mark.parametrize("form", sorted(FORMS))
def test_fused_gradients_are_those_of_the_plain_path(form):
    layer, x = linear(form, 2), torch.randn(3, 6)
    parameters = list(layer.parameters(recurse=False))
    for parameter in parameters:
        nn.init.normal_(parameter)
    plain = torch.autograd.grad(layer(x).square().sum(), parameters)
    fused = torch.autograd.grad(kernels.project(x, [layer]).square().sum(), parameters)
    for a, b in zip(plain, fused, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-4)


def test_a_split_over_heads_is_the_same_model_under_adamw():
    """So that an adapter file, which holds the sum of o_proj's Bs alone, is enough to go on from."""
    layers = [linear("head_sum", 2, heads=4) for _ in range(2)]
    layers[1].load_state_dict(
        layers[0].state_dict() | {"lora_B_heads": layers[0].parameter_for(layers[0].lora_B.detach())}
    )
    for layer in layers:
        optimizer = torch.optim.AdamW(layer.parameters(recurse=False), lr=0.01, weight_decay=0.1)
        for i in range(5):
            optimizer.zero_grad()
            layer(torch.arange(6.0).sub(i).sin()).square().sum().backward()
            optimizer.step()
    torch.testing.assert_close(layers[0].lora_B, layers[1].lora_B)


def test_adapters_and_whole_checkpoints_come_back(golden, tmp_path):
    pi05, data, params = golden
    model = with_params(lora_model(pi05), params)
    adapters.save_adapter(model, tmp_path / "adapter")
    save_model(model, str(tmp_path / "model.safetensors"))
    adapter = adapters.read_adapter(tmp_path / "adapter")
    assert max(config.rank for config in adapter.lora.values()) == 8 * 4
    resumed = lora_model(pi05)
    load_model(resumed, str(tmp_path / "model.safetensors"))
    assert torch.equal(training_loss(resumed, data), training_loss(model, data))
    loaded = lora_model(pi05)
    with_params(loaded, params)
    for layer in lora_layers(loaded).values():
        layer.reset_parameters()
    adapters.load_adapter(loaded, tmp_path / "adapter")
    assert torch.equal(training_loss(loaded, data), training_loss(model, data))


def test_an_adapter_that_is_not_one_for_each_head_is_refused_and_nothing_is_loaded(tmp_path):
    model = lora_model(False)
    adapters.save_adapter(model, tmp_path / "adapter")
    adapter = adapters.read_adapter(tmp_path / "adapter")
    name = next(name for name in adapter.tensors if "q_proj.lora_B" in name)
    adapter.tensors[name] = torch.ones_like(adapter.tensors[name])
    adapters.write_adapter(adapter, tmp_path / "dense")
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    with pytest.raises(CheckpointError, match="block-diagonal"):
        adapters.load_adapter(model, tmp_path / "dense")
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())


def test_configs_of_a_plain_model_are_left_alone():
    plain = {"q_proj": LoRAConfig(rank=2, alpha=4.0)}
    root = nn.ModuleDict({"q_proj": nn.Linear(4, 8, bias=False)})
    inject(root, plain)
    assert [name for name, _ in root.named_parameters() if "lora" in name] == ["q_proj.lora_A", "q_proj.lora_B"]
    assert as_jax(plain, 4) == {
        "q_proj": dataclasses.replace(plain["q_proj"], rank=8, alpha=16.0, form="per_head", heads=4)
    }

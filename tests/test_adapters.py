"""Adapter checkpoints: what is saved, what is refused, and what a kill at any moment leaves behind."""

import json
import os
import random
from pathlib import Path

import pytest
import safetensors.torch
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from kills import kill_while_it_writes
from openpi_lora_patch.apply import apply_lora
from openpi_lora_patch.checkpoint import adapters, files, training
from openpi_lora_patch.errors import CheckpointError
from openpi_lora_patch.lora import LoRAConfig, inject, lora_layers
from openpi_lora_patch.lora.config import ATTENTION, FFN
from openpi_lora_patch.reference import FOLDER, Reference

DATA = Reference(FOLDER / "pi0_float32.safetensors")


def pi0(preset="default", *, rank=4, expert=True, seed=None, data=DATA, use_dora=False):
    model = data.pi0()
    paligemma = dict.fromkeys(ATTENTION + FFN, LoRAConfig(rank=rank, alpha=8.0, use_dora=use_dora))
    config = LoRAConfig(rank=2, alpha=6.0, rslora=True, use_dora=use_dora)
    action_expert = dict.fromkeys(ATTENTION, config) if expert else None
    apply_lora(model, paligemma=paligemma, action_expert=action_expert, preset=preset)
    return train(model, seed) if seed is not None else model


def train(model, seed):
    """Every trained tensor at a random value."""
    torch.manual_seed(seed)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.add_(torch.randn_like(parameter) * 0.05)
    return model


def bits(model):
    return {name: parameter.detach().clone() for name, parameter in model.named_parameters()}


def loss(model):
    # A weight that needs a gradient may send torch's matmul to another kernel, which rounds differently.
    return DATA.loss(model.eval().requires_grad_(False))


def assert_equal(one, other):
    assert one.keys() == other.keys()
    assert not [name for name in one if not torch.equal(one[name], other[name])]


@pytest.mark.parametrize("expert", [True, False])
@pytest.mark.parametrize("preset", ["default", "jax", "adapters"])
def test_round_trip_through_a_plain_and_a_lora_model(tmp_path, preset, expert):
    model = pi0(preset, expert=expert, seed=0)
    adapters.save_adapter(model, tmp_path / "adapter", openpi_config="some_config")
    for fresh in (pi0(preset, expert=expert), DATA.pi0()):
        adapters.load_adapter(fresh, tmp_path / "adapter")
        assert_equal(bits(fresh), bits(model))
        assert torch.equal(loss(fresh), loss(model))
    metadata = adapters.read_adapter(tmp_path / "adapter").metadata
    assert metadata["preset"] == preset
    assert metadata["openpi_config"] == "some_config"
    assert metadata["version"]


def test_frozen_tensors_are_not_in_the_file(tmp_path):
    adapters.save_adapter(pi0(seed=0), tmp_path / "adapter")
    names = adapters.read_adapter(tmp_path / "adapter").tensors
    assert len(names) == sum(p.requires_grad for p in pi0().parameters())
    assert not [name for name in names if "base_layer" in name or "vision" in name]


def altered(folder, change):
    with files.reading(folder / adapters.WEIGHTS) as file:
        metadata = file.metadata()
    tensors = safetensors.torch.load_file(folder / adapters.WEIGHTS)
    change(tensors)
    safetensors.torch.save_file(tensors, folder / adapters.WEIGHTS, metadata)


def first(tensors, part):
    return next(name for name in sorted(tensors) if part in name)


WRONG = {
    "missing": (lambda t: t.pop(first(t, "lora_A")), "missing: .*lora_A"),
    "missing head": (lambda t: t.pop(first(t, "action_in_proj")), "missing: .*action_in_proj"),
    "unexpected": (lambda t: t.update(stray=torch.zeros(1)), "unexpected: .*stray"),
    "shape": (lambda t: t.update({first(t, "lora_B"): torch.zeros(3, 4)}), r"lora_B.*\(3, 4\)"),
    "nan": (lambda t: t[first(t, "lora_B")].fill_(float("nan")), "lora_B"),
}


@pytest.mark.parametrize("wrong", WRONG)
def test_a_wrong_file_is_named_and_changes_nothing(tmp_path, wrong):
    folder = tmp_path / "adapter"
    adapters.save_adapter(pi0(seed=0), folder)
    change, message = WRONG[wrong]
    altered(folder, change)
    for model in (pi0(), DATA.pi0()):
        before = bits(model)
        with pytest.raises(CheckpointError, match=message):
            adapters.load_adapter(model, folder)
        assert_equal(bits(model), before)


def test_another_base_rank_or_scaling_is_refused(tmp_path):
    adapters.save_adapter(pi0(seed=0), tmp_path / "adapter")
    other = pi0()
    with torch.no_grad():
        for layer in lora_layers(other).values():
            layer.weight.mul_(1.02)
    with pytest.raises(CheckpointError, match="another base"):
        adapters.load_adapter(other, tmp_path / "adapter")
    adapters.load_adapter(other, tmp_path / "adapter", check_base=False)
    with pytest.raises(CheckpointError, match="rank"):
        adapters.load_adapter(pi0(rank=8), tmp_path / "adapter")


def test_the_fingerprint_outlives_bfloat16():
    model = pi0()
    weights = {name: layer.weight for name, layer in lora_layers(model).items()}
    rounded = {name: weight.bfloat16() for name, weight in weights.items()}
    assert adapters.fingerprint(weights.items()) == adapters.fingerprint(reversed(rounded.items()))


def test_a_cut_file_and_no_file_are_refused(tmp_path):
    folder = tmp_path / "adapter"
    adapters.save_adapter(pi0(seed=0), folder)
    content = (folder / adapters.WEIGHTS).read_bytes()
    (folder / adapters.WEIGHTS).write_bytes(content[: len(content) // 2])
    for path in (folder, tmp_path / "nowhere"):
        with pytest.raises(CheckpointError, match="cannot be read"):
            adapters.load_adapter(pi0(), path)


def test_what_cannot_be_saved_is_refused_and_leaves_nothing(tmp_path):
    model = pi0(seed=0)
    layer = next(iter(lora_layers(model).values()))
    layer.merge()
    with pytest.raises(CheckpointError, match="merged"):
        adapters.save_adapter(model, tmp_path / "merged")
    layer.unmerge()
    with torch.no_grad():
        layer.lora_B[0, 0] = float("inf")
    with pytest.raises(CheckpointError, match="finite"):
        adapters.save_adapter(model, tmp_path / "infinite")
    with pytest.raises(CheckpointError, match="without adapters"):
        adapters.save_adapter(DATA.pi0(), tmp_path / "none")
    assert not list(tmp_path.iterdir())


def test_replacing_keeps_the_configuration(tmp_path):
    adapters.save_adapter(pi0(seed=0), tmp_path / "adapter")
    assert len({path.stat().st_mode for path in (tmp_path / "adapter").iterdir()}) == 1, "readable for all or for none"
    second = pi0(seed=1)
    adapters.save_adapter(second, tmp_path / "adapter")
    fresh = pi0()
    adapters.load_adapter(fresh, tmp_path / "adapter")
    assert_equal(bits(fresh), bits(second))
    assert len({path.stat().st_mode for path in (tmp_path / "adapter").iterdir()}) == 1, "readable for all or for none"
    with pytest.raises(CheckpointError, match="same configuration"):
        adapters.save_adapter(pi0(rank=8), tmp_path / "adapter")
    adapters.load_adapter(fresh, tmp_path / "adapter")


@settings(max_examples=25, deadline=None)
@given(data=st.data())
def test_any_ranks_targets_and_dtypes_come_back(tmp_path_factory, data):
    names = data.draw(st.lists(st.sampled_from("abcd"), min_size=1, unique=True))
    configs = {
        name: LoRAConfig(data.draw(st.integers(1, 9)), data.draw(st.floats(0.5, 64)), data.draw(st.booleans()))
        for name in names
    }
    dtype = data.draw(st.sampled_from([torch.float32, torch.bfloat16, torch.float16]))

    def build():
        torch.manual_seed(0)
        model = nn.ModuleDict({name: nn.Linear(5, 7) for name in "abcd"}).to(dtype)
        inject(model, configs)
        return model

    model = train(build(), 1)
    folder = tmp_path_factory.mktemp("any") / "adapter"
    adapters.save_adapter(model, folder)
    fresh = build()
    adapters.load_adapter(fresh, folder)
    assert_equal(bits(fresh), bits(model))
    restored = adapters.read_adapter(folder).lora
    assert {name: config.rank for name, config in restored.items()} == {n: c.rank for n, c in configs.items()}
    for name, config in configs.items():
        assert restored[name].scaling == pytest.approx(config.scaling)


def save_for_ever(folder):
    """In a child: save one whole adapter after the other, to one name and to new ones."""
    first_kind, other = pi0_like(1.0), pi0_like(2.0)
    for number in range(10_000):
        adapters.write_adapter((first_kind, other)[number % 2], folder / "same")
        adapters.write_adapter(first_kind, folder / f"new{number}")


def pi0_like(value):
    tensors = {f"base_model.model.a.lora_{m}.weight": torch.full((64, 64), value) for m in "AB"}
    return adapters.Adapter({"r": 64, "lora_alpha": 64}, tensors, {"value": value})


def test_a_kill_at_any_moment_leaves_whole_files(tmp_path):
    torch.set_num_threads(1)
    generator = random.Random(0)
    stopped_midway = 0
    for run in range(200):
        folder = tmp_path / str(run)
        folder.mkdir()
        child = os.fork()
        if child == 0:
            save_for_ever(folder)
            os._exit(0)
        kill_while_it_writes(child, folder, generator)
        for path in folder.iterdir():
            if path.name.startswith("."):
                stopped_midway += 1
                continue
            adapter = adapters.read_adapter(path)
            assert json.loads((path / adapters.CONFIG).read_text()) == adapter.config
            values = {tensor.unique().item() for tensor in adapter.tensors.values()}
            assert values == {adapter.metadata["value"]}
            assert len(adapter.tensors) == 2
    assert stopped_midway > 20, "the kills came too late or too early to show anything"


def with_hooks(model, *, base=""):
    training.load_adapters_through(model, base)
    training.save_adapters_only(model)
    return model


def test_a_state_dict_saver_writes_adapters_only_and_loads_them(tmp_path):
    model = with_hooks(pi0(seed=0))
    safetensors.torch.save_model(model, tmp_path / "model.safetensors")
    whole = sum(p.numel() * p.element_size() for p in model.parameters())
    assert (tmp_path / "model.safetensors").stat().st_size < whole / 2
    fresh = with_hooks(pi0())
    safetensors.torch.load_model(fresh, tmp_path / "model.safetensors")
    assert_equal(bits(fresh), bits(model))
    adapters.load_adapter(pi0(), tmp_path)


def test_a_state_dict_loader_takes_the_base_it_is_given_and_no_other(tmp_path):
    plain = DATA.pi0()
    safetensors.torch.save_model(plain, tmp_path / "base.safetensors")
    model = with_hooks(pi0(seed=0))
    safetensors.torch.save_model(model, tmp_path / "model.safetensors")

    def elsewhere(**options):
        torch.manual_seed(5)
        other = pi0()
        with torch.no_grad():
            for parameter in other.parameters():
                parameter.normal_()
        return with_hooks(other, **options)

    lost = elsewhere()
    before = bits(lost)
    with pytest.raises(CheckpointError, match="another base"):
        safetensors.torch.load_model(lost, tmp_path / "model.safetensors")
    assert_equal(bits(lost), before)
    fresh = elsewhere(base=str(tmp_path / "base.safetensors"))
    safetensors.torch.load_model(fresh, tmp_path / "model.safetensors")
    assert_equal(bits(fresh), bits(model))
    assert torch.equal(loss(fresh), loss(model))


def test_a_model_that_saves_whole_loads_adapters_only_too(tmp_path):
    model = with_hooks(pi0(seed=0))
    safetensors.torch.save_model(model, tmp_path / "model.safetensors")
    fresh = pi0()
    training.load_adapters_through(fresh)
    assert safetensors.torch.load_model(fresh, tmp_path / "model.safetensors") == (set(), [])
    assert_equal(bits(fresh), bits(model))


def test_with_the_hooks_a_plain_base_still_loads(tmp_path):
    safetensors.torch.save_model(DATA.pi0(), tmp_path / "model.safetensors")
    fresh = with_hooks(pi0())
    safetensors.torch.load_model(fresh, tmp_path / "model.safetensors")
    assert Path(tmp_path / "model.safetensors").exists()
    assert torch.equal(loss(fresh), loss(pi0()))

"""Whole models: openpi's outputs, exact counts, and what trains."""

import copy

import pytest
import torch

from golden import GOLDEN, assert_same, whole_model
from openpi_lora_patch import FrozenParametersError, LoRAError
from openpi_lora_patch.apply import Counts, apply_lora
from openpi_lora_patch.lora import LoRAConfig, freeze, lora_layers
from openpi_lora_patch.lora.config import ATTENTION, FFN
from openpi_lora_patch.pi0 import PI0, PI0Config
from openpi_lora_patch.reference import Reference

TOWERS = ("paligemma", "action_expert")
RANK = {"paligemma": 16, "action_expert": 32}


def adapters(*towers, rank=None):
    return {
        tower: dict.fromkeys((*ATTENTION, *FFN), LoRAConfig(rank or RANK[tower], float(rank or RANK[tower])))
        for tower in towers
    }


@pytest.fixture(params=["pi0_float32", "pi0_bfloat16", "pi05_float32", "pi05_bfloat16"])
def data(request):
    return whole_model(request.param)


@pytest.fixture
def small():
    return Reference(GOLDEN / "pi0_float32.safetensors").pi0()


def test_joint_forward(data):
    mask = torch.where(data.inputs["attention_allowed"], 0.0, -2.3819763e38)
    embeds = [data.inputs["prefix_embs"], data.inputs["suffix_embs"]]
    with torch.no_grad():
        prefix, suffix = data.pi0().paligemma_with_expert(
            embeds, mask, data.inputs["position_ids"], data.inputs.get("adarms_cond")
        )
    assert_same(prefix, data.outputs["prefix_out"])
    assert_same(suffix, data.outputs["suffix_out"])


def test_loss_gradients_and_sampled_actions(data):
    model = data.pi0()
    loss = data.loss(model)
    assert_same(loss, data.outputs["loss"])
    sampled = model.sample_actions(data.observation(), data.inputs["noise"], data.config["num_steps"])
    assert_same(sampled, data.outputs["sample_actions"])
    loss.mean().backward()
    parameters = dict(model.named_parameters())
    for name, gradient in data.grads.items():
        assert_same(parameters[name].grad, gradient)


def test_keys_and_dtypes_are_those_of_openpi(data):
    found = {name: tensor.dtype for name, tensor in data.pi0().state_dict().items()}
    assert found == {name: tensor.dtype for name, tensor in data.state.items()}


# Counted on openpi's own model: (pi05, towers with LoRA) to (LoRA tensors, trainable, total).
COUNTS = {
    (False, ()): (0, 3_501_372_176, 3_501_372_176),
    (False, TOWERS): (504, 36_720_672, 3_534_844_688),
    (False, ("action_expert",)): (252, 2_940_444_432, 3_515_233_040),
    (False, ("paligemma",)): (252, 334_324_768, 3_520_983_824),
    (True, ()): (0, 3_616_757_520, 3_616_757_520),
    (True, TOWERS): (504, 35_638_304, 3_650_230_032),
}


@pytest.mark.parametrize(("pi05", "towers"), COUNTS)
def test_full_size_counts(pi05, towers):
    with torch.device("meta"):
        model = PI0(PI0Config(pi05=pi05))
    if towers:
        apply_lora(model, **adapters(*towers))
    assert Counts.of(model) == Counts(*COUNTS[pi05, towers])


@pytest.mark.parametrize(
    ("preset", "trainable"),
    [("default", 36_720_672), ("jax", 36_720_672 + 414_803_696), ("adapters", 19_611_648 + 13_860_864)],
)
def test_presets(preset, trainable):
    with torch.device("meta"):
        model = PI0(PI0Config())
    assert apply_lora(model, **adapters(*TOWERS), preset=preset).trainable == trainable


def test_the_log_says_what_trains(caplog):
    with torch.device("meta"), caplog.at_level("INFO", "openpi_lora_patch"):
        apply_lora(PI0(PI0Config()), **adapters(*TOWERS))
    assert caplog.messages == [
        "Found 504 LoRA parameters after model creation",
        "Freeze paligemma: True, freeze action expert: True",
        "LoRA fine-tuning: 36,720,672 trainable / 3,534,844,688 total (1.04%)",
    ]


def test_an_unknown_preset_is_refused(small):
    with pytest.raises(LoRAError, match="'everything'"):
        apply_lora(small, **adapters(*TOWERS, rank=2), preset="everything")


def test_a_step_moves_what_trains_and_nothing_else():
    data = Reference(GOLDEN / "pi0_float32.safetensors")
    model = data.pi0()
    apply_lora(model, **adapters(*TOWERS, rank=4))
    for layer in lora_layers(model).values():
        torch.nn.init.normal_(layer.lora_B, std=0.01)
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    # openpi hands every parameter to AdamW; weight decay must not reach the frozen ones.
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2, weight_decay=0.1)
    data.loss(model.train()).mean().backward()
    optimizer.step()
    moved = {name for name, tensor in model.state_dict().items() if not torch.equal(tensor, before[name])}
    trains = {name for name, parameter in model.named_parameters() if parameter.requires_grad}
    # Where nothing reads them, as o, gate, up and down in PaliGemma's last layer, their gradient is zeros: they decay.
    assert moved == trains


def test_thawed_parameters_are_caught_by_name_at_the_next_training_forward(small):
    data = Reference(GOLDEN / "pi0_float32.safetensors")
    apply_lora(small, **adapters(*TOWERS, rank=2))
    data.loss(small.train())
    small.requires_grad_(True)
    with pytest.raises(FrozenParametersError, match=r"thawed: paligemma_with_expert\..* and \d+ more"):
        data.loss(small)
    data.loss(small.eval())
    freeze(small, "adapters")
    data.loss(small.train())
    next(iter(lora_layers(small).values())).lora_A.requires_grad_(False)
    with pytest.raises(FrozenParametersError, match=r"frozen: .*lora_A"):
        data.loss(small)


def test_a_copy_is_guarded_by_itself(small):
    data = Reference(GOLDEN / "pi0_float32.safetensors")
    apply_lora(small, **adapters(*TOWERS, rank=2))
    twin = copy.deepcopy(small)
    twin.requires_grad_(True)
    data.loss(small.train())
    with pytest.raises(FrozenParametersError):
        data.loss(twin.train())

"""PEFT, accelerate and Liger-Kernel in the same process, and models that others derive from Gemma."""

import json
import os
import sys
from pathlib import Path

import pytest
import torch

from golden import GOLDEN, assert_same
from neighbours import TOKENS, build, draw
from openpi_lora_patch.apply import apply_lora
from openpi_lora_patch.lora import LoRAConfig
from openpi_lora_patch.reference import Reference

PROGRAM = Path(__file__).parent / "neighbours.py"
TARGETS = ["q_proj", "v_proj", "down_proj"]


@pytest.fixture
def beside(child):
    """What `neighbours.py` finds, for one neighbour and one order."""

    def run(name, order):
        result = child("-W", "ignore", str(PROGRAM), name, order, OPENPI_LORA="0" if order == "without" else "1")
        assert result.returncode == 0, result.stderr
        return json.loads(result.stdout.splitlines()[-1])

    return run


def importable(name):
    """The package, or a skip with the reason that it gives itself."""
    return pytest.importorskip(name, exc_type=ImportError)


@pytest.fixture
def peft():
    return importable("peft")


@pytest.fixture
def accelerate():
    return importable("accelerate")


@pytest.fixture
def liger():
    return importable("liger_kernel.transformers.monkey_patch")


@pytest.fixture
def openpi():
    """A Gemma as openpi configures its own, and its condition."""
    return build(use_adarms=True), torch.linspace(-1, 1, 64).reshape(2, 32)[:1]


@pytest.mark.parametrize("name", ["peft", "accelerate"])
def test_vanilla_models_compute_the_same_bits_in_every_order(beside, name):
    importable(name)
    expected = beside(name, "without")
    assert beside(name, "before") == expected
    assert beside(name, "after") == expected


def test_models_derived_by_others_are_never_converted(beside):
    """Classes inside, outputs, gradients. Some are there before us, which does not keep us from starting."""
    expected = beside("subclasses", "without")
    assert not any("Adaptive" in name for name in expected["head"])
    assert beside("subclasses", "before") == expected
    assert beside("subclasses", "after") == expected


def test_peft_trains_and_merges_an_openpi_model(peft, openpi):
    model, cond = openpi

    def run(wrapped):
        return wrapped(input_ids=TOKENS, adarms_cond=cond).logits

    expected = run(model)
    wrapped = peft.get_peft_model(model, peft.LoraConfig(r=2, target_modules=TARGETS))
    assert torch.equal(run(wrapped), expected)
    run(wrapped).square().mean().backward()
    trained = {name for name, parameter in wrapped.named_parameters() if parameter.grad is not None}
    assert trained
    assert all("lora_" in name for name in trained)
    tuned = run(draw(wrapped))
    assert not torch.equal(tuned, expected)
    merged = wrapped.merge_and_unload()
    assert_same(run(merged), tuned)
    assert not torch.equal(merged(input_ids=TOKENS, adarms_cond=cond * 2).logits, tuned)


def test_peft_refuses_a_linear_that_has_our_adapter(peft):
    model = Reference(GOLDEN / "pi0_float32.safetensors").pi0()
    apply_lora(model, action_expert={"q_proj": LoRAConfig(2, 2.0)})
    with pytest.raises(ValueError, match="LoRALinear"):
        peft.get_peft_model(model, peft.LoraConfig(target_modules=r".*gemma_expert.*\.q_proj"))


def test_accelerate_trains_lora_on_pi0(accelerate):
    data = Reference(GOLDEN / "pi0_float32.safetensors")
    model = data.pi0()
    apply_lora(model, **{tower: {"q_proj": LoRAConfig(2, 2.0)} for tower in ("paligemma", "action_expert")})
    decided = {name for name, parameter in model.named_parameters() if parameter.requires_grad}
    accelerator = accelerate.Accelerator(cpu=True)
    prepared, optimizer = accelerator.prepare(model, torch.optim.AdamW(model.parameters(), lr=1e-3))
    before = {name: parameter.detach().clone() for name, parameter in prepared.named_parameters()}
    loss = data.loss(prepared.train())
    assert_same(loss, data.outputs["loss"])
    accelerator.backward(loss.mean())
    optimizer.step()
    changed = {name for name, parameter in prepared.named_parameters() if not torch.equal(parameter, before[name])}
    assert changed
    assert changed <= decided


def test_accelerate_offloads_an_openpi_model(accelerate, openpi):
    model, cond = openpi
    expected = model(input_ids=TOKENS, adarms_cond=cond).logits
    offloaded = accelerate.cpu_offload(model, execution_device="cpu")
    assert {parameter.device.type for parameter in offloaded.parameters()} == {"meta"}
    assert torch.equal(offloaded(input_ids=TOKENS, adarms_cond=cond).logits, expected)


def test_accelerate_offloads_lora(accelerate):
    data = Reference(GOLDEN / "pi05_float32.safetensors")
    model = data.pi0()
    apply_lora(model, action_expert={"q_proj": LoRAConfig(2, 2.0)})
    with torch.no_grad():
        assert_same(data.loss(accelerate.cpu_offload(model.eval(), execution_device="cpu")), data.outputs["loss"])


def test_accelerate_keeps_our_layers_whole_on_one_device(accelerate, openpi):
    """It finds the layers that must not be split by class name, which a converted layer keeps."""
    model, _ = openpi

    def parts_of_layers(**options):
        placed = accelerate.infer_auto_device_map(model, {"cpu": 100_000, "disk": 10**9}, **options)
        return [name for name in placed if name.startswith("model.layers.") and name.count(".") > 2]

    assert parts_of_layers()
    assert not parts_of_layers(no_split_module_classes=model._no_split_modules)


@pytest.mark.parametrize("order", ["before", "after"])
def test_liger_and_openpi_models_keep_to_themselves(liger, beside, order):
    """Liger's kernels serve vanilla models as without us; openpi's keep their norms and take the rest from Liger."""
    found, without, alone = beside("liger", order), beside("liger", "without"), beside("alone", "before")
    kinds = ("norm", "mlp", "rotary", "names")
    assert [found["vanilla"][kind] for kind in kinds] == [without["vanilla"][kind] for kind in kinds]
    assert found["openpi"]["norm"] == "AdaptiveNorm"
    assert found["openpi"]["mlp"] == found["vanilla"]["mlp"] == "LigerGEGLUMLP"
    assert found["openpi"]["names"] == alone["openpi"]["names"]
    if found["openpi"]["logits"] is not None:
        for name in ("openpi", "vanilla"):
            torch.testing.assert_close(
                torch.tensor(found[name]["logits"]), torch.tensor(alone[name]["logits"]), rtol=1e-5, atol=1e-5
            )


def test_liger_cannot_be_put_on_a_built_openpi_model(liger, child):
    """It would put its own norm, which gives no gate, in place of ours: refused by the first forward, not silent."""
    code = """
import openpi_lora_patch
from neighbours import build, logits
from liger_kernel.transformers import apply_liger_kernel_to_gemma
model = build(use_adarms=False)
apply_liger_kernel_to_gemma(rope=False, fused_linear_cross_entropy=False, geglu=False, model=model)
logits(model)
"""
    result = child("-W", "ignore", "-c", code, PYTHONPATH=os.pathsep.join(sys.path))
    assert "TypeError: LigerRMSNorm.forward() takes 2 positional arguments" in result.stderr


def test_other_releases_of_lerobot_are_left_alone(child, tmp_path):
    """Before 0.4 and from 0.5 on its pi0 is built from classes of its own; ours would not fit."""
    package = tmp_path / "lerobot/policies/pi0"
    package.mkdir(parents=True)
    (package / "modeling_pi0.py").write_text("class PI0Policy:\n    pass\n")
    code = "import openpi_lora_patch, lerobot.policies.pi0.modeling_pi0 as m; print(sorted(vars(m.PI0Policy)))"
    path = os.pathsep.join([str(tmp_path), *sys.path])
    without, ours = (child("-c", code, PYTHONPATH=path, OPENPI_LORA=switch) for switch in ("0", "1"))
    assert without.returncode == ours.returncode == 0, ours.stderr
    assert without.stdout == ours.stdout

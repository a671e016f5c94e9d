"""PEFT and openpi's own `PI0Pytorch`, both ways. Skipped where openpi or PEFT cannot be imported."""

import pytest
import torch

library = pytest.importorskip("peft", reason="PEFT is not installed")

from golden import GOLDEN
from openpi_lora_patch.checkpoint import adapters
from openpi_lora_patch.lora import lora_layers
from openpi_lora_patch.reference import Reference
from test_adapters import train
from test_openpi import golden_model, observation


@pytest.fixture(params=["pi0", "pi05"])
def openpi(request, monkeypatch):
    """A maker of openpi's model on a golden file's weights, and what it computes."""
    data = Reference(GOLDEN / f"{request.param}_float32.safetensors")

    def make(**options):
        return golden_model(data, monkeypatch, **options)

    def outputs(model):
        inputs = [data.inputs[name] for name in ("actions", "noise", "time")]
        model = model.eval().requires_grad_(False)
        loss = model(observation(data), *inputs)
        return loss, model.sample_actions("cpu", observation(data), inputs[1], data.config["num_steps"])

    return make, outputs


def assert_close(found, expected):
    for one, other in zip(found, expected, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-5, atol=2e-6)


def test_peft_puts_what_we_save_onto_openpis_stock_model(openpi, tmp_path):
    make, outputs = openpi
    for seed in (0, 1):
        adapters.save_adapter(train(make(lora=True), seed), tmp_path / str(seed))
    theirs = library.PeftModel.from_pretrained(make(), tmp_path / "0")
    theirs.load_adapter(tmp_path / "1", adapter_name="second")
    untouched = outputs(make())
    for seed, name in enumerate(("default", "second")):
        theirs.set_adapter(name)
        ours = make(lora=True)
        adapters.load_adapter(ours, tmp_path / str(seed))
        expected = outputs(ours)
        assert not torch.allclose(expected[0], untouched[0], rtol=1e-3)
        assert_close(outputs(theirs.base_model.model), expected)


@pytest.mark.parametrize("rslora", [False, True])
def test_what_peft_saved_loads_into_openpis_model(openpi, tmp_path, rslora):
    make, outputs = openpi
    config = library.LoraConfig(
        r=2,
        lora_alpha=6,
        use_rslora=rslora,
        target_modules=r".*(language_model|gemma_expert)\..*\.(q_proj|v_proj|o_proj|down_proj)",
        modules_to_save=["action_in_proj", "action_out_proj"],
        rank_pattern={"gemma_expert.*q_proj": 5, "o_proj": 1},
        alpha_pattern={r"^paligemma_with_expert.*layers\.0\.self_attn\.q_proj": 9, "down_proj": 1.5},
        init_lora_weights=False,
    )
    theirs = train(library.get_peft_model(make(), config), 0)
    theirs.save_pretrained(tmp_path / "theirs")
    expected = outputs(theirs.base_model.model)
    ours = make()
    adapters.load_adapter(ours, tmp_path / "theirs")
    assert {layer.config.rank for layer in lora_layers(ours).values()} == {1, 2, 5}
    assert_close(outputs(ours), expected)

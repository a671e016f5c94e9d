"""What must hold on every release beside openpi's outputs: everybody else's models are left alone."""

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_model, save_file

from golden import GOLDEN
from openpi_lora_patch.reference import Reference

VANILLA = Path(__file__).parent / "vanilla.py"
# Forward passes of an MLP with checkpointing on, in layers: two a layer, SigLIP's pooling head runs once.
CHECKPOINTED_CALLS = {"gemma": 4, "paligemma": 8, "siglip": 5, "gemma3": 4}


def test_other_models_compute_the_same_bits_with_us_and_checkpointing_works(child):
    found = {}
    for switch in ("0", "1"):
        result = child(str(VANILLA), OPENPI_LORA=switch)
        assert result.returncode == 0, result.stderr
        found[switch] = json.loads(result.stdout)
    assert found["0"] == found["1"]
    calls = {name: found["1"][name]["mlp_calls"] for name in CHECKPOINTED_CALLS}
    assert calls == CHECKPOINTED_CALLS


@pytest.mark.parametrize("name", ["pi0_bfloat16", "pi05_bfloat16"])
def test_a_reference_checkpoint_loads_strictly_and_keeps_its_dtypes(name, tmp_path):
    data = Reference(GOLDEN / f"{name}.safetensors")
    model = data.pi0()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.zero_()
    # The tied embedding is under both its names in this file; one of the two is what safetensors expects.
    tied = "paligemma_with_expert.paligemma.model.language_model.embed_tokens.weight"
    save_file({n: t for n, t in data.state.items() if n != tied}, tmp_path / "model.safetensors")
    assert load_model(model, tmp_path / "model.safetensors") == (set(), [])
    for key, tensor in model.state_dict().items():
        assert tensor.dtype == data.state[key].dtype
        assert torch.equal(tensor, data.state[key])


def test_openpis_float32_pins_are_where_openpi_has_them():
    """Three tensors of SigLIP's embeddings and every norm; a release that renames them would lose the pin silently."""
    model = Reference(GOLDEN / "pi05_bfloat16.safetensors").pi0()
    pinned = {name for name, p in model.paligemma_with_expert.named_parameters() if p.dtype == torch.float32}
    vision = "paligemma.model.vision_tower.vision_model.embeddings."
    names = ("patch_embedding.weight", "patch_embedding.bias", "position_embedding.weight")
    assert {name for name in pinned if "vision" in name} == {vision + name for name in names}
    norms = ("input_layernorm", "post_attention_layernorm", "model.norm")
    assert all(any(norm in name for norm in norms) for name in pinned if "vision" not in name)
    assert len([name for name in pinned if "vision" not in name]) == (3 * 2 + 1) * 3

"""Checkpoints of openpi's JAX code, against what that code computed from them."""

import shutil

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file

from golden import GOLDEN
from openpi_lora_patch.checkpoint import adapters, jax, jax_layout, orbax
from openpi_lora_patch.errors import CheckpointError
from openpi_lora_patch.pi0 import PI0, PI0Config, Tower
from openpi_lora_patch.reference import distance

tensorstore = pytest.importorskip("tensorstore", reason="tensorstore is not installed")

KINDS = ["pi0", "pi05"]
BOUND = 3e-6
ALPHA = (8.0, 6.0)  # As the checkpoints were made; their ranks are 4 and 2.


def golden(kind, rslora):
    with safe_open(GOLDEN / f"jax_lora_{kind}{'_rslora' if rslora else ''}.safetensors", "pt") as file:
        return {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 (not a dict)


def checkpoint(kind):
    return GOLDEN / f"jax_lora_{kind}_checkpoint"


def model(kind, folder):
    """A pi0 of the checkpoint's size; its two language towers are the merged or plain checkpoint in `folder`."""
    paligemma = Tower(width=64, mlp_dim=96, depth=3, num_heads=8, head_dim=16)
    expert = Tower(width=32, mlp_dim=48, depth=3, num_heads=8, head_dim=16)
    vision = {"hidden_size": 32, "intermediate_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2}
    config = PI0Config(kind == "pi05", "float32", 8, 4, 128, paligemma, expert, vision)
    built = PI0(config).eval().requires_grad_(False)
    if folder is not None:
        missing, unexpected = built.load_state_dict(load_file(folder / "model.safetensors"), strict=False)
        assert not unexpected
        assert not [name for name in missing if "language_model.layers" in name or "gemma_expert" in name]
    return built


def outputs(built, data):
    allowed = data["in/attention_allowed"][:, None]
    mask = torch.where(allowed, 0.0, -2.3819763e38)
    embeds = [data["in/prefix_embs"], data["in/suffix_embs"]]
    return built.paligemma_with_expert(embeds, mask, data["in/position_ids"], data.get("in/adarms_cond"))


def assert_outputs(built, data, suffix=""):
    for found, name in zip(outputs(built, data), ("prefix_out", "suffix_out"), strict=True):
        assert distance(found, data[f"out/{name}{suffix}"]) <= BOUND


def without_lora(kind, monkeypatch, tmp_path):
    """The base of a checkpoint, as a plain PyTorch one."""
    with monkeypatch.context() as patched:
        patched.setattr(jax._Lora, "pairs", lambda *_: iter(()))
        jax.convert(checkpoint(kind), tmp_path / "base", merged=torch.float32)
    return tmp_path / "base"


@pytest.mark.parametrize("rslora", [False, True])
@pytest.mark.parametrize("kind", KINDS)
def test_adapters_and_merged_are_what_jax_computes(tmp_path, monkeypatch, kind, rslora):
    data = golden(kind, rslora)
    jax.convert(checkpoint(kind), tmp_path / "merged", alpha=ALPHA, rslora=rslora, merged=torch.float32)
    assert_outputs(model(kind, tmp_path / "merged"), data)
    built = model(kind, without_lora(kind, monkeypatch, tmp_path))
    assert_outputs(built, data, "_without_lora")
    jax.convert(checkpoint(kind), tmp_path / "adapter", alpha=ALPHA, rslora=rslora, openpi_config="mine")
    adapters.load_adapter(built, tmp_path / "adapter")
    assert_outputs(built, data)
    assert adapters.read_adapter(tmp_path / "adapter").metadata["openpi_config"] == "mine"


@pytest.mark.parametrize("whole", ["", "_1"])
@pytest.mark.parametrize("kind", KINDS)
def test_a_tower_that_jax_trained_whole_comes_with_the_adapters_of_the_other(tmp_path, monkeypatch, kind, whole):
    data = golden(kind, rslora=False)
    source = orbax.JaxCheckpoint(checkpoint(kind))
    left_out = [base for base in jax._Lora(source, ALPHA, False).bases if jax_layout.split(base)[1] == whole]
    names = set(source.shapes) - {name for base in left_out for name in jax_layout.lora_names(base)}
    tensors = {name: source.read(name) for name in names}
    (tmp_path / "jax").mkdir()
    specs = {name: (tensor.dtype, tuple(tensor.shape)) for name, tensor in tensors.items()}
    orbax.write(tmp_path / "jax", specs, ((name, None, tensor) for name, tensor in tensors.items()))
    jax.convert(tmp_path / "jax", tmp_path / "merged", alpha=ALPHA, merged=torch.float32)
    jax.convert(tmp_path / "jax", tmp_path / "adapter", alpha=ALPHA)
    built, expected = model(kind, without_lora(kind, monkeypatch, tmp_path)), model(kind, tmp_path / "merged")
    tower = built.get_submodule(jax_layout.TOWERS[whole])
    for parameter in tower.parameters():
        parameter.data.add_(0.1)  # What the tower was before the run.
    adapters.load_adapter(built, tmp_path / "adapter")
    for found, wanted in zip(outputs(built, data), outputs(expected, data), strict=True):
        assert distance(found, wanted) <= BOUND


def test_the_data_can_tell_another_scaling(tmp_path):
    jax.convert(checkpoint("pi0"), tmp_path / "merged", alpha=(4.0, 2.0), merged=torch.float32)
    found = outputs(model("pi0", tmp_path / "merged"), golden("pi0", False))
    assert distance(found[0], golden("pi0", False)["out/prefix_out"]) > 100 * BOUND


def test_the_adapter_knows_its_base(tmp_path):
    jax.convert(checkpoint("pi0"), tmp_path / "adapter", alpha=ALPHA)
    with pytest.raises(CheckpointError, match="another base"):
        adapters.load_adapter(model("pi0", None), tmp_path / "adapter")


def test_vision_and_heads_have_the_names_and_shapes_of_pytorch():
    """The golden checkpoints hold neither, so their names are held against the model, and values against the layout."""
    built = PI0(PI0Config(vision={**VISION}, paligemma=Tower(64, 96, 1, 8, 1, 16), vocab_size=16))
    state = built.state_dict()
    found = {}
    for name, shape in SIGLIP.items():
        found |= dict(jax_layout.base_tensors(name, torch.randn(shape)))
    wanted = {n: tuple(t.shape) for n, t in state.items() if "vision" in n or "multi_modal" in n or "_expert" not in n}
    assert {name: tuple(tensor.shape) for name, tensor in found.items()} == wanted


VISION = {"hidden_size": 12, "intermediate_size": 20, "num_hidden_layers": 2, "num_attention_heads": 3}
_BLOCK = "PaliGemma/img/Transformer/encoderblock"
_ATTENTION = f"{_BLOCK}/MultiHeadDotProductAttention_0"
SIGLIP = {
    "PaliGemma/img/embedding/kernel": (14, 14, 3, 12),
    "PaliGemma/img/embedding/bias": (12,),
    "PaliGemma/img/pos_embedding": (1, 256, 12),
    "PaliGemma/img/Transformer/encoder_norm/scale": (12,),
    "PaliGemma/img/Transformer/encoder_norm/bias": (12,),
    **{f"{_BLOCK}/LayerNorm_{i}/{part}": (2, 12) for i in (0, 1) for part in ("scale", "bias")},
    f"{_BLOCK}/MlpBlock_0/Dense_0/kernel": (2, 12, 20),
    f"{_BLOCK}/MlpBlock_0/Dense_0/bias": (2, 20),
    f"{_BLOCK}/MlpBlock_0/Dense_1/kernel": (2, 20, 12),
    f"{_BLOCK}/MlpBlock_0/Dense_1/bias": (2, 12),
    **{f"{_ATTENTION}/{part}/kernel": (2, 12, 3, 4) for part in ("query", "key", "value")},
    **{f"{_ATTENTION}/{part}/bias": (2, 3, 4) for part in ("query", "key", "value")},
    f"{_ATTENTION}/out/kernel": (2, 3, 4, 12),
    f"{_ATTENTION}/out/bias": (2, 12),
    "PaliGemma/img/head/kernel": (12, 64),
    "PaliGemma/img/head/bias": (64,),
    "action_in_proj/kernel": (32, 1024),
    "action_in_proj/bias": (1024,),
    "action_out_proj/kernel": (1024, 32),
    "action_out_proj/bias": (32,),
    "state_proj/kernel": (32, 1024),
    "state_proj/bias": (1024,),
    "action_time_mlp_in/kernel": (2048, 1024),
    "action_time_mlp_in/bias": (1024,),
    "action_time_mlp_out/kernel": (1024, 1024),
    "action_time_mlp_out/bias": (1024,),
}


def test_what_is_no_checkpoint_is_refused_and_leaves_nothing(tmp_path):
    broken = tmp_path / "broken"
    shutil.copytree(checkpoint("pi0"), broken)
    for path in (broken / "params").rglob("d/*"):
        path.write_bytes(path.read_bytes()[:100])
    for source, message in ((broken, "cannot be read"), (tmp_path / "nowhere", "no Orbax checkpoint")):
        with pytest.raises(CheckpointError, match=message):
            jax.convert(source, tmp_path / "out", merged=torch.float32)
    assert [path.name for path in tmp_path.iterdir()] == ["broken"]
    with pytest.raises(CheckpointError, match="do not have"):
        list(jax_layout.base_tensors("PaliGemma/llm/layers/attn/qkv_einsum/w", torch.zeros(1, 2)))

"""openpi's own JAX model and PyTorch model on each other's checkpoints. Skipped where openpi cannot be imported.

To run it: as `test_openpi.py`.
"""

import importlib.util
import pathlib
import types

import pytest
import torch

if importlib.util.find_spec("openpi") is None:
    pytest.skip("openpi cannot be imported here", allow_module_level=True)
pytest.importorskip("openpi.training.config", reason="openpi's dependencies are missing")
pytest.importorskip("tensorstore", reason="tensorstore is not installed")

import jax.numpy as jnp
import openpi
import openpi.models.model as openpi_model
import openpi.models.pi0 as openpi_pi0
import openpi.models_pytorch.pi0_pytorch as pi0_pytorch
import openpi.models_pytorch.preprocessing_pytorch as preprocessing
import orbax.checkpoint as ocp
from flax import traverse_util

import jax_reference as reference
from openpi_lora_patch.apply import apply_lora
from openpi_lora_patch.checkpoint import adapters, jax
from openpi_lora_patch.checkpoint.jax_export import export
from openpi_lora_patch.checkpoint.jax_layout import base_tensors
from openpi_lora_patch.lora import lora_layers
from openpi_lora_patch.patches import paligemma
from openpi_lora_patch.reference import CAMERAS, distance
from test_jax_export import ALPHA, save_base
from test_jax_training import BOUND, GRADIENT_BOUND, adapter_configs, linears, part

KINDS = pytest.mark.parametrize("pi05", [False, True])
VOCABULARY = 257_152  # openpi's PyTorch code has it fixed.
VISION = {"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2, "num_attention_heads": 2}


@pytest.fixture(autouse=True)
def _tiny(monkeypatch):
    right = preprocessing.preprocess_observation_pytorch
    monkeypatch.setattr(preprocessing, "preprocess_observation_pytorch", lambda seen, train: right(seen, train=False))
    # JAX rounds angles of up to 1570 to float32, which is worth 6e-5 in the time's embedding; PyTorch does not.
    monkeypatch.setattr(pi0_pytorch, "create_sinusoidal_pos_embedding", jaxs_embedding)
    with reference.tiny(VOCABULARY), paligemma.vision_config(**VISION):
        yield


def jaxs_embedding(time, dimension, min_period, max_period, device):
    return reference.tensor(openpi_pi0.posemb_sincos(jnp.asarray(time.numpy()), dimension, min_period, max_period))


def observation():
    data = reference.inputs()
    images, masks = data["images"].permute(0, 1, 4, 2, 3), data["image_masks"]
    return types.SimpleNamespace(
        images=dict(zip(CAMERAS, images, strict=True)),
        image_masks=dict(zip(CAMERAS, masks, strict=True)),
        state=data["state"],
        tokenized_prompt=data["tokens"],
        tokenized_prompt_mask=data["token_mask"],
        token_ar_mask=None,
        token_loss_mask=None,
    )


def loss_of(model, found):
    return model(observation(), reference.inputs()["actions"], found["in/noise"], found["in/time"]).mean()


def restored(folder):
    params = traverse_util.flatten_dict(openpi_model.restore_params(folder / "params", dtype=jnp.float32), sep="/")
    return {name: reference.tensor(value) for name, value in params.items()}


@KINDS
def test_what_was_trained_here_is_the_same_model_in_jax(pi05, tmp_path):
    torch.manual_seed(0)
    model = pi0_pytorch.PI0Pytorch(reference.config(pi05))
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.15)
    save_base(model, tmp_path / "base")
    adapters.save_adapter(model, tmp_path / "adapter")
    export(tmp_path / "adapter", tmp_path / "jax", base=tmp_path / "base", alpha=ALPHA, vision_heads=2)
    found = reference.run(pi05, restored(tmp_path / "jax"), reference.inputs())
    assert distance(loss_of(model, found), found["out/loss"]) <= BOUND
    with torch.no_grad():
        actions = model.eval().sample_actions("cpu", observation(), noise=found["in/noise"], num_steps=reference.STEPS)
    assert distance(actions, found["out/actions"]) <= BOUND


@KINDS
def test_what_jax_trained_trains_on_here(pi05, tmp_path, monkeypatch):
    """Base by openpi's converter, adapter, SigLIP, projector and heads by ours: loss and each gradient are JAX's."""
    folder = tmp_path / ("pi05" if pi05 else "pi0")  # openpi's converter looks for the name.
    params = reference.random_params(pi05)
    tree = {(*name.split("/"), "value"): tensor.numpy() for name, tensor in params.items()}  # As its training saves.
    with ocp.PyTreeCheckpointer() as checkpointer:
        checkpointer.save(folder / "params", {"params": traverse_util.unflatten_dict(tree)})
    found = reference.run(pi05, params, reference.inputs())

    state = openpis_conversion(folder, pi05)
    ours = {own: value for name in params if "lora_" not in name for own, value in base_tensors(name, params[name])}
    embedding = ours.pop("paligemma_with_expert.paligemma.lm_head.weight")
    assert torch.equal(state.pop("paligemma_with_expert.paligemma.model.language_model.embed_tokens.weight"), embedding)
    assert state.keys() == ours.keys()
    assert not [name for name, tensor in state.items() if not torch.equal(tensor, ours[name])]

    with monkeypatch.context() as patched:
        patched.setattr("openpi_lora_patch.patches.openpi._adapters", lambda *_: {})
        model = pi0_pytorch.PI0Pytorch(reference.config(pi05))
    state["paligemma_with_expert.paligemma.lm_head.weight"] = embedding
    missing, unexpected = model.load_state_dict(state, strict=False)
    assert not unexpected
    assert {name.rpartition(".")[0].rpartition(".")[2] for name in missing} <= {"embed_tokens", "lm_head"}
    configs = {"paligemma": adapter_configs("paligemma"), "action_expert": adapter_configs("expert")}
    apply_lora(model, **configs, preset="jax")
    jax.convert(folder, tmp_path / "adapter", alpha=ALPHA)
    adapters.load_adapter(model, tmp_path / "adapter")

    loss = loss_of(model, found)
    loss.backward()
    assert distance(loss, found["out/loss"]) <= BOUND
    trained = {name: p for name, p in model.named_parameters() if p.requires_grad and ".lora_" not in name}
    expected = {}
    for name, grad in part(found, "grad/").items():
        if "lora_" not in name and "/llm/" not in name:
            expected |= dict(base_tensors(name, grad))
    assert trained.keys() == expected.keys()  # openpi's freeze filter, too.
    pairs = [(name, trained[name].grad, grad) for name, grad in expected.items()]
    for name, A, B, b in linears({**params, **part(found, "grad/")}):
        own_A, own_B = lora_layers(model)[name].parameters(recurse=False)
        pairs += [(name, own_A.grad, A), (name, own_B.grad, b.transpose(1, 2) if own_B.ndim == 3 else B)]
    largest = max(grad.abs().max().item() for _, _, grad in pairs)
    for name, grad, wanted in pairs:
        grad = torch.zeros_like(wanted) if grad is None else grad
        assert (grad - wanted).abs().max() <= 3 * GRADIENT_BOUND * max(0.01 * largest, wanted.abs().max().item()), name


def openpis_conversion(folder, pi05):
    path = pathlib.Path(openpi.__file__).parents[2] / "examples" / "convert_jax_model_to_pytorch.py"
    spec = importlib.util.spec_from_file_location("openpis_converter", path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    initial = module.slice_initial_orbax_checkpoint(str(folder), "float32")
    towers = (reference.PALIGEMMA, reference.EXPERT)
    text, expert = (types.SimpleNamespace(**tower, hidden_size=tower["width"]) for tower in towers)
    for config in (text, expert):
        config.num_hidden_layers, config.num_attention_heads = config.depth, config.num_heads
    whole = types.SimpleNamespace(text_config=text, vision_config=types.SimpleNamespace(**VISION))
    state, rest = module.slice_paligemma_state_dict(initial["paligemma_params"], whole)
    kind = "pi05" if pi05 else "pi0"
    state |= module.slice_gemma_state_dict(rest, expert, num_expert=1, checkpoint_dir=kind, pi05=pi05)
    for name, value in traverse_util.flatten_dict(initial["projection_params"]).items():
        if name[0] != "PaliGemma":
            weight = torch.from_numpy(value.copy())
            state[f"{name[0]}.{'weight' if name[1] == 'kernel' else 'bias'}"] = weight.T if weight.ndim == 2 else weight
    return {name: tensor for name, tensor in state.items() if "lora_" not in name}


SETTING = """
import openpi.training.config as training
from openpi.models_pytorch.pi0_pytorch import PI0Pytorch
from openpi_lora_patch.lora import lora_layers
model = PI0Pytorch(training.get_config("debug_lora_pytorch").model)
layers = lora_layers(model)
print("forms", *sorted({f"{name.rpartition('.')[2]}={layer.config.form}" for name, layer in layers.items()}))
print("vision", all(p.requires_grad for p in model.paligemma_with_expert.paligemma.model.vision_tower.parameters()))
"""


def test_the_setting_reaches_openpis_model(child):
    done = child("-c", SETTING, OPENPI_LORA="1", OPENPI_LORA_PARAMETRISATION="jax")
    assert done.returncode == 0, done.stderr
    forms = "down_proj=jax gate_proj=jax k_proj=jax o_proj=head_sum q_proj=per_head up_proj=jax v_proj=jax"
    assert done.stdout.splitlines() == [f"forms {forms}", "vision True"]

"""lerobot's own pi0 and pi0.5, unmodified, on stock transformers: openpi's outputs, LoRA, training, checkpoints."""

import types
from importlib import metadata

import pytest
import torch
from safetensors.torch import load_file, save_file, save_model

import openpi_lora_patch
from golden import GOLDEN, assert_same
from openpi_lora_patch import CheckpointError, FrozenParametersError, LoRAError
from openpi_lora_patch.apply import Counts
from openpi_lora_patch.checkpoint.adapters import load_adapter, save_adapter
from openpi_lora_patch.checkpoint.merge import merge
from openpi_lora_patch.lora import lora_layers, quantized
from openpi_lora_patch.lora.quantized import QuantizedLinear, round_trip
from openpi_lora_patch.reference import Reference

pytest.importorskip("lerobot", reason="lerobot is not installed")
if not metadata.version("lerobot").startswith("0.4."):
    pytest.skip("only lerobot 0.4 builds pi0 from openpi's transformers", allow_module_level=True)
from accelerate import Accelerator
from accelerate.state import AcceleratorState
from lerobot.configs.policies import PreTrainedConfig
from lerobot.configs.types import FeatureType, PolicyFeature
from lerobot.policies.pi0 import modeling_pi0
from lerobot.policies.pi05 import modeling_pi05

LORA = {"paligemma_variant": "gemma_2b_lora", "action_expert_variant": "gemma_300m_lora"}
EXPERT_ONLY = {"action_expert_variant": "gemma_300m_lora"}
HEADS = {
    "pi0": {"action_in_proj", "action_out_proj", "state_proj", "action_time_mlp_in", "action_time_mlp_out"},
    "pi05": {"action_in_proj", "action_out_proj", "time_mlp_in", "time_mlp_out"},
}


class Client:
    """One of lerobot's two policies, at the sizes of a reference file."""

    def __init__(self, name, data):
        self.name, self.data = name, data
        self.module = {"pi0": modeling_pi0, "pi05": modeling_pi05}[name]
        self.Config, self.Model, self.Policy = (
            getattr(self.module, name.upper() + part) for part in ("Config", "Pytorch", "Policy")
        )

    def config(self, **changes):
        sizes = self.data.config
        features = {
            "observation.images.top": PolicyFeature(FeatureType.VISUAL, (3, 224, 224)),
            "observation.state": PolicyFeature(FeatureType.STATE, (5,)),
        }
        return self.Config(**{
            "device": "cpu", "dtype": sizes["dtype"], "push_to_hub": False,
            "max_action_dim": sizes["action_dim"], "max_state_dim": sizes["action_dim"],
            "chunk_size": sizes["action_horizon"], "n_action_steps": sizes["action_horizon"], "num_inference_steps": 2,
            "input_features": features,
            "output_features": {"action": PolicyFeature(FeatureType.ACTION, (5,))},
        } | changes)  # fmt: skip

    def model(self, **changes):
        """The network alone, with the reference weights."""
        model = self.Model(self.config(**changes))
        model.load_state_dict(self.data.state)
        return model

    def policy(self, **changes):
        return self.Policy(self.config(**changes))

    def observation(self):
        """What the network takes before the actions; pi0.5 has the state among its tokens."""
        seen = self.data.observation()
        inputs = [seen.images, seen.image_masks, seen.tokens, seen.token_mask]
        return [*inputs, seen.state] if self.name == "pi0" else inputs

    def batch(self):
        """What `lerobot-train` hands a policy."""
        draw = torch.Generator().manual_seed(0)
        tokens = self.data.observation()
        return {
            "observation.images.top": torch.rand(2, 3, 224, 224, generator=draw),
            "observation.state": torch.randn(2, 5, generator=draw),
            "observation.language.tokens": tokens.tokens,
            "observation.language.attention_mask": tokens.token_mask,
            "action": torch.randn(2, self.data.config["action_horizon"], 5, generator=draw),
        }


@pytest.fixture(params=["pi0_float32", "pi0_bfloat16", "pi05_float32", "pi05_bfloat16"])
def client(request, monkeypatch):
    """lerobot's code with nothing replaced but the sizes that it fixes, in both precisions."""
    name = request.param.split("_")[0]
    made = Client(name, Reference(GOLDEN / f"{request.param}.safetensors"))
    _shrink(made.module, made.data.config, monkeypatch)
    return made


@pytest.fixture
def activated():
    """Activate with other settings, for one test."""

    def activate(**settings):
        openpi_lora_patch.deactivate()
        openpi_lora_patch.activate(**settings)

    yield activate
    activate()


@pytest.fixture(params=["pi0", "pi05"])
def full_precision(request, monkeypatch):
    made = Client(request.param, Reference(GOLDEN / f"{request.param}_float32.safetensors"))
    _shrink(made.module, made.data.config, monkeypatch)
    return made


def _shrink(module, sizes, monkeypatch):
    towers = {2048: sizes["paligemma"]["text"], 1024: sizes["expert"]}

    def tower(width, **_):
        config = towers[width]
        return types.SimpleNamespace(
            width=config["hidden_size"], depth=config["num_hidden_layers"], mlp_dim=config["intermediate_size"],
            num_heads=8, num_kv_heads=1, head_dim=config["head_dim"],
        )  # fmt: skip

    def paligemma(config):
        config.text_config.vocab_size = sizes["expert"]["vocab_size"]
        vision = sizes["paligemma"]["vision"]
        for name in ("hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads"):
            setattr(config.vision_config, name, vision[name])
        return stock_paligemma(config)

    def gemma(config):
        config.vocab_size = sizes["expert"]["vocab_size"]
        return stock_gemma(config)

    stock_paligemma, stock_gemma = module.PaliGemmaForConditionalGeneration, module.GemmaForCausalLM
    monkeypatch.setattr(module, "GemmaConfig", tower)
    monkeypatch.setattr(module, "PaliGemmaForConditionalGeneration", paligemma)
    monkeypatch.setattr(module, "GemmaForCausalLM", gemma)


def trains(model):
    return {name for name, parameter in model.named_parameters() if parameter.requires_grad}


def stir(model):
    """Give adapters, which start as no change, an effect."""
    for i, layer in enumerate(lora_layers(model).values()):
        draw = torch.Generator().manual_seed(i)
        layer.lora_B.data = torch.randn(layer.lora_B.shape, generator=draw) * 0.05


def actions(client, policy):
    torch.manual_seed(0)
    policy.reset()
    return policy.predict_action_chunk(client.batch())


def test_both_modules_are_patched():
    modules = openpi_lora_patch.status().modules
    assert {modules[name] for name in modules if name.startswith("lerobot.")} == {"patched"}


def test_names_and_dtypes_are_openpis(client):
    state = client.Model(client.config()).state_dict()
    assert {name: tensor.dtype for name, tensor in state.items()} == {
        name: tensor.dtype for name, tensor in client.data.state.items()
    }


def test_the_loss_and_every_gradient_are_openpis(client):
    model, inputs = client.model().train(), client.data.inputs
    loss = model(*client.observation(), inputs["actions"], noise=inputs["noise"], time=inputs["time"])
    assert_same(loss, client.data.outputs["loss"])
    loss.mean().backward()
    found = {name: parameter.grad for name, parameter in model.named_parameters() if parameter.grad is not None}
    for name, expected in client.data.grads.items():
        if name in found:  # One of the names of a tied tensor.
            assert_same(found.pop(name), expected)
    assert not client.data.grads or not found


def test_sampled_actions_are_openpis(client):
    model, data = client.model().eval(), client.data
    found = model.sample_actions(*client.observation(), noise=data.inputs["noise"], num_steps=data.config["num_steps"])
    assert_same(found, data.outputs["sample_actions"])


def test_gradient_checkpointing_gives_the_same_gradients(full_precision):
    inputs = full_precision.data.inputs

    def gradients(model):
        loss = model(*full_precision.observation(), inputs["actions"], noise=inputs["noise"], time=inputs["time"])
        loss.mean().backward()
        return {name: parameter.grad for name, parameter in model.named_parameters() if parameter.grad is not None}

    plain, checkpointed = full_precision.model(**LORA).train(), full_precision.model(**LORA).train()
    checkpointed.load_state_dict(plain.state_dict())
    checkpointed.gradient_checkpointing_enable()
    expected, found = gradients(plain), gradients(checkpointed)
    assert expected.keys() == found.keys()
    assert all(torch.equal(found[name], expected[name]) for name in expected)


def test_a_fresh_adapter_changes_nothing(client):
    inputs = client.data.inputs
    loss = client.model(**LORA)(*client.observation(), inputs["actions"], noise=inputs["noise"], time=inputs["time"])
    assert_same(loss, client.data.outputs["loss"])


def test_adapters_are_openpis_in_rank_place_and_precision(client):
    layers = lora_layers(client.Model(client.config(**LORA)))
    depth = {
        "paligemma": client.data.config["paligemma"]["text"]["num_hidden_layers"],
        "gemma_expert": client.data.config["expert"]["num_hidden_layers"],
    }
    for tower, rank in {"paligemma": 16, "gemma_expert": 32}.items():
        own = [layer for name, layer in layers.items() if name.startswith(f"paligemma_with_expert.{tower}.")]
        assert len(own) == 7 * depth[tower]
        assert {(layer.config.rank, layer.scaling) for layer in own} == {(rank, 1.0)}
    assert {p.dtype for layer in layers.values() for p in (layer.lora_A, layer.lora_B)} == {torch.float32}


def test_what_trains_with_both_variants(full_precision):
    model = full_precision.Model(full_precision.config(**LORA))
    adapters = {name for name in trains(model) if name.endswith((".lora_A", ".lora_B"))}
    assert len(adapters) == 2 * len(lora_layers(model))
    assert {name.split(".")[0] for name in trains(model) - adapters} == HEADS[full_precision.name]


def test_what_trains_with_the_expert_variant_alone(full_precision):
    names = trains(full_precision.Model(full_precision.config(**EXPERT_ONLY)))
    assert "paligemma_with_expert.paligemma.model.language_model.layers.0.self_attn.q_proj.weight" in names
    expert = {name for name in names if name.startswith("paligemma_with_expert.gemma_expert.")}
    assert expert
    assert all(name.endswith((".lora_A", ".lora_B")) for name in expert)


def test_without_a_variant_nothing_is_frozen(full_precision):
    model = full_precision.Model(full_precision.config())
    assert trains(model) == {name for name, _ in model.named_parameters()}
    assert not lora_layers(model)


def test_settings_apply(full_precision, activated):
    activated(freeze="adapters", dropout=0.25)
    model = full_precision.Model(full_precision.config(**LORA))
    assert all(name.endswith((".lora_A", ".lora_B")) for name in trains(model))
    assert {layer.config.dropout for layer in lora_layers(model).values()} == {0.25}


@pytest.mark.parametrize(
    ("name", "trainable", "total"), [("pi0", 36_720_672, 3_534_844_688), ("pi05", 35_638_304, 3_650_230_032)]
)
def test_full_size_counts_are_openpis(name, trainable, total):
    client = Client(name, Reference(GOLDEN / f"{name}_float32.safetensors"))
    with torch.device("meta"):
        model = client.Model(client.config(**LORA, max_action_dim=32, max_state_dim=32))
    assert Counts.of(model) == Counts(504, trainable, total)


def test_the_variants_are_lerobots_towers(client):
    assert client.module.get_gemma_config("gemma_2b_lora") == client.module.get_gemma_config("gemma_2b")
    assert client.config(**LORA).paligemma_variant == "gemma_2b_lora"


@pytest.mark.parametrize("variant", ["gemma_7b", "gemma_7b_lora", "gemma_2b_lora_lora", "_lora"])
def test_unknown_variants_are_refused_by_lerobot(full_precision, variant):
    with pytest.raises(ValueError, match=f"Invalid paligemma_variant: {variant}$"):
        full_precision.config(paligemma_variant=variant)


needs_switches = pytest.mark.skipif(
    not hasattr(modeling_pi0.PI0Config, "train_expert_only"), reason="this lerobot cannot freeze parts by its config"
)


@needs_switches
def test_what_lerobots_config_freezes_stays_frozen(full_precision):
    heads_and_adapters = trains(full_precision.Model(full_precision.config(**EXPERT_ONLY, train_expert_only=True)))
    assert not any(".paligemma." in name for name in heads_and_adapters)
    names = trains(full_precision.Model(full_precision.config(**EXPERT_ONLY, freeze_vision_encoder=True)))
    assert not any(".vision_tower." in name for name in names)
    assert any(".multi_modal_projector." in name for name in names)


@needs_switches
def test_training_the_expert_only_contradicts_adapters_in_paligemma(full_precision):
    with pytest.raises(LoRAError, match="train_expert_only=True and paligemma_variant='gemma_2b_lora'"):
        full_precision.Model(full_precision.config(**LORA, train_expert_only=True))


def test_a_policy_trains_on_a_quantised_base_and_what_it_saves_is_a_plain_one(client, activated, tmp_path):
    base = client.policy()
    base.save_pretrained(tmp_path / "base")
    activated(base="int8")
    policy = client.Policy.from_pretrained(tmp_path / "base", config=client.config(**LORA)).train()
    weights = base.state_dict()
    for name, layer in lora_layers(policy).items():
        assert isinstance(layer.base_layer, QuantizedLinear)
        assert torch.equal(layer.weight, round_trip(weights[f"{name}.weight"], "int8")), name
    optimizer = torch.optim.AdamW(policy.get_optim_params(), lr=1e-3)
    losses = []
    for _ in range(4):
        torch.manual_seed(0)
        loss, _ = policy.forward(client.batch())
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    assert losses[-1] < losses[0]
    policy.eval().save_pretrained(tmp_path / "tuned")
    expected = actions(client, policy)
    config = PreTrainedConfig.from_pretrained(tmp_path / "tuned")
    again = client.Policy.from_pretrained(tmp_path / "tuned", config=config).eval()
    assert torch.equal(actions(client, again), expected)
    save_adapter(policy, tmp_path / "adapter")
    report = merge(tmp_path / "base", tmp_path / "adapter", tmp_path / "merged")
    assert report.keys() == lora_layers(policy).keys()
    assert all(0 < cost.drift < 0.02 for cost in report.values())
    activated()
    plain = client.Policy.from_pretrained(tmp_path / "tuned", config=config).eval()
    assert not any(isinstance(module, QuantizedLinear) for module in plain.modules())
    # A quantised base has bfloat16 weights, by which lerobot decides what it computes in.
    tolerance = 0 if client.config().dtype == "bfloat16" else 0.05
    torch.testing.assert_close(actions(client, plain), expected, rtol=0, atol=tolerance)


def test_a_base_that_cannot_be_is_refused_before_anything_is_built(full_precision, activated, monkeypatch):
    activated(base="nf4")
    monkeypatch.setattr(quantized.importlib.util, "find_spec", lambda _: None)
    monkeypatch.setattr(full_precision.module, "GemmaForCausalLM", lambda *_: pytest.fail("built"))
    with pytest.raises(LoRAError, match=r"openpi-lora-patch\[quant\]"):
        full_precision.policy(**LORA)


@pytest.mark.parametrize("mixed_precision", ["no", "bf16"])
def test_a_policy_trains_its_adapters_and_acts(client, mixed_precision):
    """With the calls that `lerobot-train` makes."""
    policy = client.policy(**LORA).train()
    before = {name: parameter.detach().clone() for name, parameter in policy.named_parameters()}
    optimizer = torch.optim.AdamW(policy.get_optim_params(), lr=1e-3)
    AcceleratorState._reset_state(reset_partial_state=True)
    accelerator = Accelerator(cpu=True, mixed_precision=mixed_precision)
    prepared, optimizer = accelerator.prepare(policy, optimizer)
    losses = []
    for _ in range(8):
        torch.manual_seed(0)
        with accelerator.autocast():
            loss, _ = prepared.forward(client.batch())
        accelerator.backward(loss)
        accelerator.clip_grad_norm_(prepared.parameters(), 10.0)
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    policy = accelerator.unwrap_model(prepared, keep_fp32_wrapper=False)
    assert losses[-1] < losses[0]
    changed = {name for name, p in policy.named_parameters() if not torch.equal(p, before[name])}
    assert changed <= trains(policy)
    assert any(".gemma_expert." in name for name in changed)
    assert any(".paligemma." in name for name in changed)
    action = policy.select_action(client.batch())
    assert action.shape == (2, 5)
    assert action.isfinite().all()


def test_thawing_is_noticed_though_lerobot_calls_forward_itself(full_precision):
    policy = full_precision.policy(**LORA).train()
    policy.requires_grad_(True)
    with pytest.raises(FrozenParametersError):
        policy.forward(full_precision.batch())


def test_a_saved_policy_comes_back_with_its_adapters(client, tmp_path):
    policy = client.policy(**LORA).eval()
    stir(policy)
    policy.save_pretrained(tmp_path)
    config = PreTrainedConfig.from_pretrained(tmp_path)
    assert (config.paligemma_variant, config.action_expert_variant) == tuple(LORA.values())
    resumed = client.Policy.from_pretrained(tmp_path, config=config).eval()
    expected = policy.state_dict()
    assert expected.keys() == resumed.state_dict().keys()
    assert all(torch.equal(tensor, expected[name]) for name, tensor in resumed.state_dict().items())
    assert torch.equal(actions(client, resumed), actions(client, policy))


def test_a_base_policy_loads_into_lora_from_the_command_line(client, tmp_path):
    base = client.policy().eval()
    base.save_pretrained(tmp_path)
    # What `--policy.path=... --policy.paligemma_variant=gemma_2b_lora` and so on amount to.
    overrides = [f"--{name}={variant}" for name, variant in LORA.items()]
    config = PreTrainedConfig.from_pretrained(tmp_path, cli_overrides=overrides)
    tuned = client.Policy.from_pretrained(tmp_path, config=config).eval()
    assert lora_layers(tuned)
    assert torch.equal(actions(client, tuned), actions(client, base))


def test_openpis_own_checkpoint_loads_into_lora(full_precision, tmp_path):
    """openpi's names have no `model.` in front; its files hold a tied tensor once."""
    save_model(full_precision.model(), tmp_path / "model.safetensors")
    policy = full_precision.Policy.from_pretrained(tmp_path, config=full_precision.config(**LORA)).eval()
    inputs, outputs = full_precision.data.inputs, full_precision.data.outputs
    found = policy.model.sample_actions(
        *full_precision.observation(), noise=inputs["noise"], num_steps=full_precision.data.config["num_steps"]
    )
    assert_same(found, outputs["sample_actions"])


def test_a_checkpoint_of_another_size_is_refused(full_precision, tmp_path):
    policy = full_precision.policy(**LORA)
    for layer in lora_layers(policy).values():
        layer.lora_A.data, layer.lora_B.data = layer.lora_A.data[:3].clone(), layer.lora_B.data[:, :3].clone()
    policy.save_pretrained(tmp_path)
    with pytest.raises(CheckpointError, match="does not fit the model"):
        full_precision.Policy.from_pretrained(tmp_path, config=full_precision.config(**LORA))


def test_lost_adapters_are_refused(full_precision, tmp_path):
    full_precision.policy(**LORA).save_pretrained(tmp_path)
    file = tmp_path / "model.safetensors"
    tensors = load_file(file)
    tensors.pop(next(name for name in tensors if name.endswith("lora_B")))
    save_file(tensors, file)
    with pytest.raises(CheckpointError, match=r"Missing key.*lora_B"):
        full_precision.Policy.from_pretrained(tmp_path, config=full_precision.config(**LORA))


def test_a_missing_file_is_refused(full_precision, tmp_path):
    with pytest.raises(CheckpointError, match="no weights were found there"):
        full_precision.Policy.from_pretrained(tmp_path, config=full_precision.config(**LORA))
    assert full_precision.Policy.from_pretrained(tmp_path, config=full_precision.config())  # As lerobot has it.


def tuned(client, policy):
    """`policy` on the reference weights."""
    policy.model.load_state_dict(client.data.state)
    return policy.eval()


def test_peft_puts_what_we_save_onto_lerobots_stock_policy(full_precision, tmp_path):
    library = pytest.importorskip("peft", reason="PEFT is not installed")
    policy = tuned(full_precision, full_precision.policy(**LORA))
    stir(policy)
    save_adapter(policy, tmp_path / "whole")
    save_adapter(policy.model, tmp_path / "model")
    expected = actions(full_precision, policy)
    theirs = tuned(full_precision, full_precision.policy())
    assert not torch.allclose(actions(full_precision, theirs), expected, atol=1e-3)
    wrapped = library.PeftModel.from_pretrained(theirs, tmp_path / "whole")
    torch.testing.assert_close(actions(full_precision, wrapped.base_model.model), expected, rtol=1e-5, atol=2e-6)
    inner = tuned(full_precision, full_precision.policy())
    library.PeftModel.from_pretrained(inner.model, tmp_path / "model")
    torch.testing.assert_close(actions(full_precision, inner), expected, rtol=1e-5, atol=2e-6)


def test_what_lerobot_trains_with_peft_loads_into_ours(full_precision, tmp_path):
    library = pytest.importorskip("peft", reason="PEFT is not installed")
    if not hasattr(full_precision.Policy, "wrap_with_peft"):
        pytest.skip("this lerobot does not train with PEFT itself")
    theirs = tuned(full_precision, full_precision.policy())
    theirs.save_pretrained(tmp_path / "base")
    theirs.config.pretrained_path = tmp_path / "base"
    config = library.LoraConfig(r=3, lora_alpha=5, init_lora_weights=False, **theirs._get_default_peft_targets())
    theirs.wrap_with_peft(config).save_pretrained(tmp_path / "adapter")
    expected = actions(full_precision, theirs)
    for part in ("policy", "model"):
        ours = tuned(full_precision, full_precision.policy())
        load_adapter(ours if part == "policy" else ours.model, tmp_path / "adapter")
        assert {layer.config.rank for layer in lora_layers(ours).values()} == {3}
        torch.testing.assert_close(actions(full_precision, ours), expected, rtol=1e-5, atol=2e-6)
    merge(tmp_path / "base", tmp_path / "adapter", tmp_path / "merged")
    merged = full_precision.Policy.from_pretrained(tmp_path / "merged", config=full_precision.config()).eval()
    torch.testing.assert_close(actions(full_precision, merged), expected, rtol=1e-5, atol=2e-6)


def test_deactivation_gives_lerobot_back(activated):
    openpi_lora_patch.deactivate()
    with pytest.raises(ValueError, match="Invalid paligemma_variant: gemma_2b_lora"):
        modeling_pi0.PI0Config(paligemma_variant="gemma_2b_lora")
    with pytest.raises(ValueError, match="Unknown variant: gemma_2b_lora"):
        modeling_pi0.get_gemma_config("gemma_2b_lora")
    assert "load_state_dict" not in vars(modeling_pi0.PI0Policy)

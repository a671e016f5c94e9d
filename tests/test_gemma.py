"""Converted Gemma and PaliGemma against the outputs of openpi's own modified transformers."""

import copy
import pickle

import pytest
import torch
from transformers import (
    GemmaConfig,
    GemmaForCausalLM,
    GemmaForSequenceClassification,
    GemmaForTokenClassification,
    GemmaModel,
    PaliGemmaConfig,
    PaliGemmaForConditionalGeneration,
    PaliGemmaModel,
)

import openpi_lora_patch
from golden import GOLDEN, assert_same
from openpi_lora_patch.reference import Reference

SIZES = {
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_attention_heads": 8,
    "num_key_value_heads": 1,
    "head_dim": 16,
    "num_hidden_layers": 2,
    "vocab_size": 64,
}


@pytest.fixture(params=[False, True], ids=["plain", "adarms"])
def data(request):
    return Reference(GOLDEN / f"gemma_adarms_{str(request.param).lower()}.safetensors")


def build(data):
    model = GemmaForCausalLM(GemmaConfig(**data.config["config"]))
    model.config._attn_implementation = "eager"
    assert set(model.state_dict()) == set(data.state)
    model.load_state_dict(data.state)
    return model.eval()


def inputs(data, queries=slice(None), keys=slice(None)):
    return {
        "inputs_embeds": data.inputs["inputs_embeds"][:, queries],
        "attention_mask": data.inputs["attention_mask"][:, :, queries, keys],
        "position_ids": data.inputs["position_ids"][:, queries],
        "adarms_cond": data.inputs.get("adarms_cond"),
    }


def test_outputs_and_gradients(data):
    model = build(data)
    hidden = model.model(**inputs(data), use_cache=False).last_hidden_state
    assert_same(hidden, data.outputs["last_hidden_state"])
    assert_same(model(**inputs(data), use_cache=False).logits, data.outputs["logits"])
    hidden.square().sum().backward()
    found = {name: parameter.grad for name, parameter in model.named_parameters() if parameter.grad is not None}
    assert found.keys() == data.grads.keys()
    for name, gradient in found.items():
        assert_same(gradient, data.grads[name])


def test_a_model_without_a_head_is_converted_too(data):
    model = GemmaModel(GemmaConfig(**data.config["config"]))
    model.config._attn_implementation = "eager"
    state = {name.removeprefix("model."): tensor for name, tensor in data.state.items() if name.startswith("model.")}
    model.load_state_dict(state)
    assert_same(model(**inputs(data), use_cache=False).last_hidden_state, data.outputs["last_hidden_state"])


def test_the_cache_is_read_and_does_not_grow(data):
    model, prefix = build(data), data.config["prefix"]
    with torch.no_grad():
        first = model.model(**inputs(data, slice(prefix), slice(prefix)), use_cache=True)
        assert_same(first.last_hidden_state, data.outputs["prefix"])
        for _ in range(3):
            second = model.model(
                **inputs(data, slice(prefix, None)), past_key_values=first.past_key_values, use_cache=False
            )
            assert_same(second.last_hidden_state, data.outputs["cached_suffix"])
            assert second.past_key_values is None
            assert first.past_key_values.get_seq_length() == prefix


def test_the_condition_reaches_every_norm():
    data = Reference(GOLDEN / "gemma_adarms_true.safetensors")
    model, given = build(data), inputs(data)
    other = {**given, "adarms_cond": given["adarms_cond"] + 1}
    with torch.no_grad():
        assert not torch.equal(model.model(**given)[0], model.model(**other)[0])
        with pytest.raises(ValueError, match="expected a condition of size 32, got None"):
            model.model(**{**given, "adarms_cond": None})


def test_a_condition_for_a_model_without_adarms_is_refused():
    data = Reference(GOLDEN / "gemma_adarms_false.safetensors")
    with pytest.raises(ValueError, match="expected a condition of size None, got 32"):
        build(data).model(**{**inputs(data), "adarms_cond": torch.zeros(2, 32)})


def test_the_condition_size_defaults_to_the_hidden_size():
    model = GemmaForCausalLM(GemmaConfig(**SIZES, use_adarms=True))
    assert model.model.norm.dense.in_features == 32


@pytest.mark.parametrize("name", ["norm", "layers.0.input_layernorm"])
def test_adaptive_norms_start_as_plain_norms(name):
    norm = GemmaForCausalLM(GemmaConfig(**SIZES, use_adarms=True)).model.get_submodule(name)
    assert not norm.dense.weight.any()


@pytest.mark.parametrize("cls", [GemmaForSequenceClassification, GemmaForTokenClassification])
def test_classification_heads_take_the_condition(cls):
    model = cls(GemmaConfig(**SIZES, use_adarms=True, num_labels=3, pad_token_id=0)).eval()
    torch.nn.init.normal_(model.model.norm.dense.weight)
    tokens = torch.arange(1, 6)[None]
    with torch.no_grad():
        one, other = (model(tokens, adarms_cond=torch.full((1, 32), value)).logits for value in (1.0, 2.0))
    assert not torch.equal(one, other)


def test_embeddings_are_not_scaled():
    model = GemmaForCausalLM(GemmaConfig(**SIZES, use_adarms=False)).eval()
    tokens = torch.arange(8)[None]
    embeds = model.model.embed_tokens.weight[tokens]
    assert torch.equal(model.model.embed_tokens(tokens), embeds)
    assert torch.equal(model.model(tokens)[0], model.model(inputs_embeds=embeds)[0])


def test_a_padding_mask_and_none_mean_causal_attention():
    model = GemmaForCausalLM(GemmaConfig(**SIZES, use_adarms=False)).eval()
    tokens = torch.arange(8)[None]
    with torch.no_grad():
        whole = model.model(tokens)[0]
        masked = model.model(tokens, attention_mask=torch.ones(1, 8))[0]
        short = model.model(tokens[:, :5])[0]
        padded = model.model(tokens, attention_mask=torch.tensor([[0, 0, 1, 1, 1, 1, 1, 1]]))[0]
    assert torch.equal(whole, masked)
    torch.testing.assert_close(whole[:, :5], short)
    assert not torch.allclose(whole[:, 5:], padded[:, 5:])


def again(model):
    twin = type(model)(model.config)
    twin.load_state_dict(model.state_dict())
    return twin.eval()


def again_inactive(model):
    openpi_lora_patch.deactivate()
    try:
        return again(model)
    finally:
        openpi_lora_patch.activate()


@pytest.mark.parametrize("duplicate", [copy.deepcopy, lambda m: pickle.loads(pickle.dumps(m)), again, again_inactive])
def test_copies_compute_the_same(data, duplicate):
    model = build(data)
    twin = duplicate(model)
    assert torch.equal(twin.model(**inputs(data))[0], model.model(**inputs(data))[0])


@pytest.mark.parametrize("duplicate", [lambda m: m, again, again_inactive])
@pytest.mark.parametrize(
    ("cls", "prefix"), [(PaliGemmaForConditionalGeneration, "paligemma."), (PaliGemmaModel, "paligemma.model.")]
)
def test_image_features_are_not_scaled(cls, prefix, duplicate):
    data = Reference(GOLDEN / "paligemma_image_features.safetensors")
    sizes = data.config["paligemma"]
    config = PaliGemmaConfig(
        text_config={"model_type": "gemma", **sizes["text"]},
        vision_config={"model_type": "siglip_vision_model", "vision_use_head": False, **sizes["vision"]},
    )
    built = cls(config)
    state = {name.removeprefix(prefix): tensor for name, tensor in data.state.items() if name.startswith(prefix)}
    assert set(built.state_dict()) == set(state)
    built.load_state_dict(state)
    built = duplicate(built)
    generator = torch.Generator().manual_seed(int(data.inputs["image_seed"]))
    images = torch.rand(2, 3, 224, 224, generator=generator) * 2 - 1
    model = getattr(built, "model", built)
    assert_same(model.get_image_features(images), data.outputs["image_features"])
    assert type(model.language_model).__module__.startswith("openpi_lora_patch.")
    assert built.language_model is model.language_model
    assert built.vision_tower is model.vision_tower
    assert built.multi_modal_projector is model.multi_modal_projector


def test_a_subclass_is_somebody_elses():
    class Theirs(GemmaForCausalLM):
        pass

    model = Theirs(GemmaConfig(**SIZES, use_adarms=True))
    assert type(model.model).__module__.startswith("transformers.")

"""The joint forward: openpi's reference outputs, every adapter's gradient, every setting alone, openpi's own model."""

import copy
import dataclasses
import itertools
from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F

import golden
from openpi_lora_patch.apply import apply_lora
from openpi_lora_patch.lora import LoRAConfig, freeze, lora_layers, pointwise
from openpi_lora_patch.lora.config import ATTENTION, FFN
from openpi_lora_patch.models import joint, vision
from openpi_lora_patch.models.attention import Prefix
from openpi_lora_patch.models.shared_attention import SharedAttention
from openpi_lora_patch.patches import openpi_fast
from openpi_lora_patch.reference import Reference, distance
from openpi_lora_patch.settings import Settings

PLAIN = joint.Plan(
    attention="eager", fused=False, trim=False, prune=False, compile=False, overlap=False, checkpoint="none"
)
CHANGES = [
    {"attention": "sdpa"}, {"fused": True}, {"prune": True}, {"checkpoint": "layer"}, {"checkpoint": "auto"},
    {"attention": "sdpa", "fused": True, "prune": True},
    {"attention": "sdpa", "fused": True, "prune": True, "checkpoint": "layer"},
]  # fmt: skip
MODELS = ("pi0", "pi05")


def adapted(kind, dtype=torch.float64, *, use_dora=False):
    """A small model with adapters that are not zero, and the inputs of its towers."""
    data = Reference(golden.GOLDEN / f"{kind}_float32.safetensors")
    model = data.pi0()
    targets = dict.fromkeys((*ATTENTION, *FFN), LoRAConfig(rank=4, alpha=8.0, use_dora=use_dora))
    torch.manual_seed(0)
    other = {"q_proj": LoRAConfig(rank=3, alpha=3.0, use_dora=use_dora)}
    apply_lora(model, paligemma=targets, action_expert=targets | other)
    for layer in lora_layers(model).values():
        torch.nn.init.normal_(layer.lora_B, std=0.1)
        layer.lora_A.data, layer.lora_B.data = layer.lora_A.data.to(dtype), layer.lora_B.data.to(dtype)
    model.to(dtype).train()
    inputs = {name: x.to(dtype) if x.is_floating_point() else x for name, x in data.inputs.items()}
    return model, inputs


def run(model, inputs, plan, **options):
    """Suffix output and gradients by name, as in training, where the outputs for the prefix are not used."""
    model.zero_grad()
    mask = torch.where(inputs["attention_allowed"], 0.0, -2.3819763e38)
    embeds = [inputs["prefix_embs"], inputs["suffix_embs"]]
    conds = (None, inputs.get("adarms_cond"))
    outputs = joint.forward(
        model.paligemma_with_expert, embeds, mask.to(embeds[0].dtype), inputs["position_ids"], conds, plan, **options
    )
    outputs[1].square().sum().backward()
    return outputs, {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


@pytest.mark.parametrize("name", [f"{kind}_{dtype}" for kind in MODELS for dtype in ("float32", "bfloat16")])
def test_default_on_a_cpu_gives_the_reference_outputs(name):
    data = Reference(golden.GOLDEN / f"{name}.safetensors")
    model, inputs = data.pi0().eval(), data.inputs
    mask = torch.where(inputs["attention_allowed"], 0.0, -2.3819763e38)
    embeds, conds = [inputs["prefix_embs"], inputs["suffix_embs"]], (None, inputs.get("adarms_cond"))
    chosen = joint.plan(Settings(), torch.device("cpu"))
    with torch.no_grad():
        prefix, suffix = joint.forward(model.paligemma_with_expert, embeds, mask, inputs["position_ids"], conds, chosen)
    golden.assert_same(prefix, data.outputs["prefix_out"])
    golden.assert_same(suffix, data.outputs["suffix_out"])


@pytest.mark.parametrize("kind", MODELS)
def test_every_part_on_gives_the_reference_outputs_in_float32(kind):
    data = Reference(golden.GOLDEN / f"{kind}_float32.safetensors")
    model, inputs = data.pi0().eval().requires_grad_(False), data.inputs
    mask = torch.where(inputs["attention_allowed"], 0.0, -2.3819763e38)
    embeds, conds = [inputs["prefix_embs"], inputs["suffix_embs"]], (None, inputs.get("adarms_cond"))
    chosen = joint.Plan(
        attention="sdpa", fused=True, trim=True, prune=True, compile=False, overlap=False, checkpoint="none"
    )
    _, suffix = joint.forward(model.paligemma_with_expert, embeds, mask, inputs["position_ids"], conds, chosen)
    assert distance(suffix, data.outputs["suffix_out"]) <= golden.TOLERANCE


@pytest.mark.parametrize(("kind", "change"), list(itertools.product(MODELS, CHANGES)), ids=str)
def test_a_part_changes_neither_output_nor_any_adapters_gradient(kind, change):
    model, inputs = adapted(kind)
    (_, expected), gradients = run(model, inputs, PLAIN)
    (_, found), found_gradients = run(model, inputs, dataclasses.replace(PLAIN, **change))
    assert distance(found, expected) < 1e-6  # transformers' softmax and norms go through float32.
    assert found_gradients.keys() == gradients.keys()
    adapters = [name for name in gradients if "lora_" in name]
    assert len(adapters) == 2 * len(lora_layers(model)) - 8  # The last prefix layer's o, gate, up and down have none.
    for name, gradient in gradients.items():
        scale = gradient.abs().max().clamp(min=1e-6)
        assert (found_gradients[name] - gradient).abs().max() / scale < 1e-4, name


@pytest.mark.parametrize("kind", MODELS)
def test_checkpointing_is_bitwise_the_same(kind):
    model, inputs = adapted(kind, torch.float32)
    (_, once), gradients = run(model, inputs, PLAIN)
    (_, twice), again = run(model, inputs, dataclasses.replace(PLAIN, checkpoint="layer"))
    assert torch.equal(once, twice)
    assert all(torch.equal(again[name], gradient) for name, gradient in gradients.items())


def test_pruning_leaves_the_prefix_output_out_in_training_only():
    model, inputs = adapted("pi0")
    pruned = dataclasses.replace(PLAIN, prune=True)
    assert run(model, inputs, pruned)[0][0] is None
    assert run(model.eval(), inputs, pruned)[0][0] is not None


def test_a_tower_that_trains_keeps_its_weights_gradients():
    model, inputs = adapted("pi0")
    model.paligemma_with_expert.gemma_expert.model.layers[0].mlp.up_proj.base_layer.weight.requires_grad_()
    _, gradients = run(model, inputs, PLAIN)
    _, found = run(model, inputs, dataclasses.replace(PLAIN, fused=True))
    assert found.keys() == gradients.keys()


def test_trimming_leaves_out_absent_cameras_and_padding():
    images = [torch.full((2, 3, 4, 4), float(i)) for i in range(3)]
    masks = [torch.tensor([True, False]), torch.tensor([False, False]), torch.tensor([True, True])]
    token_mask = torch.zeros(2, 24, dtype=torch.bool)
    token_mask[0, :3] = token_mask[1, :9] = True
    left, whole = openpi_fast.trimmed(images, masks, torch.arange(48).view(2, 24), token_mask)
    kept, kept_masks, tokens, kept_tokens = left
    assert [image[0, 0, 0, 0].item() for image in kept] == [0, 2]
    assert [mask.tolist() for mask in kept_masks] == [[True, False], [True, True]]
    assert tokens.shape == kept_tokens.shape == (2, 16)
    assert kept_tokens.sum() == token_mask.sum()
    assert not whole


@pytest.mark.parametrize(
    ("camera", "prompts", "whole"),
    [([1, 1], ["111", "111"], True), ([0, 0], ["110", "110"], True), ([1, 0], ["111", "111"], False),
     ([1, 1], ["111", "110"], False), ([1, 1], ["011", "011"], False), ([1, 1], ["000", "000"], False)],
)  # fmt: skip
def test_a_prefix_is_whole_where_nothing_left_of_it_is_masked(camera, prompts, whole):
    masks = [torch.ones(2, dtype=torch.bool), torch.tensor(camera).bool()]
    token_mask = torch.tensor([[letter == "1" for letter in prompt] for prompt in prompts])
    left, found = openpi_fast.trimmed(masks, masks, torch.zeros(2, 3), token_mask)
    assert found is whole
    if whole:
        assert all(mask.all() for mask in left[1])
        assert left[3].all()


@pytest.mark.parametrize("kind", MODELS)
@pytest.mark.parametrize("prune", [False, True])
@pytest.mark.parametrize(("attention", "whole"), [("sdpa", True), ("triton", True), ("triton", False)])
def test_a_prefix_that_attends_to_all_of_itself_needs_no_mask(kind, prune, attention, whole):
    model, inputs = adapted(kind)
    batch, length, _ = inputs["prefix_embs"].shape
    there = torch.ones(batch, length, dtype=torch.bool)
    if not whole:
        there[0, length - 3 :] = False
    allowed = inputs["attention_allowed"].clone()
    allowed[:, :, :length, :length] = there[:, None, :, None] & there[:, None, None]
    allowed[:, :, length:, :length] = there[:, None, None]
    inputs["attention_allowed"] = allowed
    (_, expected), gradients = run(model, inputs, PLAIN)
    plan = dataclasses.replace(PLAIN, attention=attention, prune=prune)
    (_, found), found_gradients = run(model, inputs, plan, prefix=Prefix(there, whole))
    assert distance(found, expected) < 1e-6
    for name, gradient in gradients.items():
        scale = gradient.abs().max().clamp(min=1e-6)
        assert (found_gradients[name] - gradient).abs().max() / scale < 1e-4, name


@pytest.mark.parametrize("masked", [False, True])
def test_attention_to_shared_keys_in_float64(masked):
    query, key, value, grad = (torch.randn(2, n, 8, dtype=torch.float64) for n in (12, 5, 5, 12))
    there = torch.tensor([[True, True, False, True, False], [False, False, True, True, True]]) if masked else None
    inputs = [x.requires_grad_() for x in (query, key, value)]
    mask = None if there is None else there[:, None].expand(-1, 12, -1)
    expected = F.scaled_dot_product_attention(*inputs, mask)
    found = SharedAttention.apply(*inputs, there)
    pairs = zip(*((x, *torch.autograd.grad(x, inputs, grad)) for x in (found, expected)), strict=True)
    for a, b in pairs:
        torch.testing.assert_close(a, b, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize(
    ("capability", "triton", "asked", "attention", "fused"),
    [
        (None, True, "auto", "eager", False),
        (None, True, "triton", "triton", False),
        ((7, 5), False, "auto", "eager", False),
        ((8, 9), True, "auto", "sdpa", True),
        ((8, 9), True, "triton", "sdpa", True),
        ((9, 0), True, "auto", "triton", True),
        ((9, 0), True, "eager", "eager", True),
        ((9, 0), False, "auto", "sdpa", False),
        ((9, 0), False, "triton", "sdpa", False),
    ],
)
def test_what_a_gpu_lacks_is_done_without_and_said(monkeypatch, caplog, capability, triton, asked, attention, fused):
    properties = SimpleNamespace(shared_memory_per_block_optin=(227 if capability == (9, 0) else 99) * 1024)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda _: capability)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda _: properties)
    monkeypatch.setattr(pointwise, "has_triton", lambda: triton)
    with caplog.at_level("INFO", logger="openpi_lora_patch"):
        chosen = joint.plan.__wrapped__(Settings(attention=asked), torch.device("cuda" if capability else "cpu"))
    assert (chosen.attention, chosen.fused, chosen.compile) == (attention, fused, fused)
    assert chosen.trim == bool(capability and capability >= (8, 0))
    assert [f"attention='{attention}', fused={fused}" in record.getMessage() for record in caplog.records] == [True]


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU, on which Triton may run")
def test_triton_that_does_not_run_is_said_once_and_done_without(caplog):
    pointwise.has_triton.cache_clear()
    assert not pointwise.has_triton()
    assert not pointwise.has_triton()
    assert [record.levelname for record in caplog.records] == ["WARNING"]
    assert "plain torch does its part" in caplog.text
    assert not pointwise._by_triton(SimpleNamespace(is_cuda=True))


def test_a_trained_model_can_be_copied():
    model, inputs = adapted("pi0")
    openpi_fast.enable(model)
    assert copy.deepcopy(model).paligemma_with_expert.trains_fast
    run(copy.deepcopy(model), inputs, PLAIN)


def test_our_vision_forward_gives_the_features_of_the_stock_modules():
    model = Reference(golden.GOLDEN / "pi0_float32.safetensors").pi0().paligemma_with_expert.paligemma.model
    size = model.config.vision_config.image_size
    image = torch.rand(2, 3, size, size) * 2 - 1
    with torch.no_grad():
        torch.testing.assert_close(
            vision._features(model, image), model.get_image_features(image), rtol=1e-5, atol=1e-6
        )


def test_vision_that_a_later_preset_trains_is_not_compiled_away(monkeypatch):
    model, _ = adapted("pi0")
    openpi_fast.enable(model)
    monkeypatch.setattr(openpi_fast.vision, "features", lambda *_: "compiled, without a gradient")
    embed_image = openpi_fast._compiled(lambda *_: "openpi's", Settings(compile="1"))
    towers, image = model.paligemma_with_expert, torch.zeros(1)
    assert embed_image(towers, image) == "compiled, without a gradient"
    freeze(model, "jax")
    assert embed_image(towers, image) == "openpi's"


def test_a_forward_that_broke_off_leaves_nothing_to_the_next(monkeypatch):
    model, inputs = adapted("pi0")
    openpi_fast.enable(model)
    embed_prefix = openpi_fast._trimming(lambda *_: None, Settings(trim="1"))
    monkeypatch.setattr(openpi_fast, "_embedded", lambda *_: (None, None, None))
    here, tokens = torch.ones(2, dtype=torch.bool), inputs["tokenized_prompt"]
    embed_prefix(model.train(), [tokens], [here], tokens, torch.ones_like(tokens, dtype=torch.bool))
    assert model.paligemma_with_expert.prefix.whole
    embed_prefix(model.eval(), [tokens], [here], tokens, torch.zeros_like(tokens, dtype=torch.bool))
    assert model.paligemma_with_expert.prefix is None


class Gpu:
    """What `torch.cuda` says of one, and tensors that lie on it."""

    def __init__(self, monkeypatch, free, share=1.0):
        answers = {"mem_get_info": (free, 2**40), "memory_reserved": 0, "memory_allocated": 0}
        answers["get_per_process_memory_fraction"] = share
        for name, answer in answers.items():
            monkeypatch.setattr(torch.cuda, name, lambda _, answer=answer: answer, raising=False)

    def recomputed(self, model, inputs, **changes):
        towers = model.paligemma_with_expert
        models = (towers.paligemma.model.language_model, towers.gemma_expert.model)
        embeds = [self.tensor(inputs[name]) for name in ("prefix_embs", "suffix_embs")]
        chosen = dataclasses.replace(PLAIN, **{"checkpoint": "auto", "attention": "sdpa", "fused": True} | changes)
        self.bytes = joint.layer_bytes(models, embeds, chosen)
        self.layers = len(models[0].layers)
        return joint._recomputed(models, embeds, chosen)

    @staticmethod
    def tensor(x):
        facts = {"shape": x.shape, "numel": x.numel, "element_size": x.element_size}
        return SimpleNamespace(**facts, device=torch.device("cuda"))


def test_auto_recomputes_as_few_layers_as_fit_the_free_memory(monkeypatch):
    model, inputs = adapted("pi0")
    counts = []
    for free in [*range(0, 40_000_000, 500_000), 2**40]:
        gpu = Gpu(monkeypatch, free)
        counts.append(gpu.recomputed(model, inputs))
        kept, least, spare = gpu.bytes
        for count, fits in ((counts[-1], counts[-1] < gpu.layers), (counts[-1] - 1, False)):
            needed = (gpu.layers - count) * kept + count * least + spare
            assert count < 0 or count == gpu.layers or (needed <= 0.9 * free) == fits
    assert counts == sorted(counts, reverse=True)
    assert set(counts) == {0, 1, 2, 3}


@pytest.mark.parametrize("costly", ["fused off", "eager", "dora", "a tower that trains", "a small share"])
def test_auto_recomputes_more_where_more_is_kept_or_less_may_be_used(monkeypatch, costly):
    model, inputs = adapted("pi0", use_dora=costly == "dora")
    if costly == "a tower that trains":
        model.paligemma_with_expert.paligemma.requires_grad_(True)
        monkeypatch.setattr(joint, "_times", lambda *_: 1)  # Its gradients alone.
    plain = adapted("pi0")
    free = next(f for f in range(0, 2**30, 100_000) if Gpu(monkeypatch, f).recomputed(*plain) == 0)
    changes = {"fused off": {"fused": False}, "eager": {"attention": "eager"}}.get(costly, {})
    gpu = Gpu(monkeypatch, free, share=0.5 * free / 2**40 if costly == "a small share" else 1.0)
    assert gpu.recomputed(model, inputs, **changes) > 0

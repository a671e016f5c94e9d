"""A program: what each stock model that holds a Gemma or a SigLIP computes, as digests in JSON. Seeded, on tiny models.

For each model: its output, its gradients, and how often an MLP ran: where checkpointing is on, twice a layer. A model
that this release does not have is "absent".
"""

import hashlib
import json
import sys

import torch

torch.set_num_threads(1)
TEXT = {
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_attention_heads": 4,
    "num_key_value_heads": 1,
    "head_dim": 8,
    "num_hidden_layers": 2,
    "vocab_size": 64,
}
VISION = {
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "image_size": 28,
    "patch_size": 14,
}
IMAGE_TOKEN = 63
TOKENS = torch.tensor([[IMAGE_TOKEN] * 4 + [2, 5, 7, 11]])
TEXT_INPUTS = {
    "input_ids": TOKENS,
    "attention_mask": torch.ones_like(TOKENS),
    "token_type_ids": torch.tensor([[0, 0, 0, 0, 0, 1, 1, 1]]),
}
IMAGES = torch.linspace(-1, 1, 3 * 28 * 28).reshape(1, 3, 28, 28)


def gemma():
    from transformers import GemmaConfig, GemmaForCausalLM

    model = GemmaForCausalLM(GemmaConfig(**TEXT))
    return model, lambda: model(TOKENS).logits


def _paligemma_config(text=TEXT):
    from transformers import PaliGemmaConfig

    return PaliGemmaConfig(
        text_config={"model_type": "gemma", **text},
        vision_config={"model_type": "siglip_vision_model", "vision_use_head": False, "projection_dim": 32, **VISION},
        image_token_index=IMAGE_TOKEN,
        image_token_id=IMAGE_TOKEN,
        projection_dim=32,
        hidden_size=32,
    )


def paligemma():
    from transformers import PaliGemmaForConditionalGeneration

    model = PaliGemmaForConditionalGeneration(_paligemma_config())
    return model, lambda: model(pixel_values=IMAGES, **TEXT_INPUTS).logits


def siglip():
    from transformers import SiglipVisionConfig, SiglipVisionModel

    model = SiglipVisionModel(SiglipVisionConfig(**VISION))
    return model, lambda: model(IMAGES).last_hidden_state


def gemma3():
    from transformers import Gemma3ForCausalLM, Gemma3TextConfig

    model = Gemma3ForCausalLM(Gemma3TextConfig(**TEXT))
    return model, lambda: model(TOKENS).logits


def colpali():
    from transformers import ColPaliConfig, ColPaliForRetrieval

    model = ColPaliForRetrieval(ColPaliConfig(vlm_config=_paligemma_config(), embedding_dim=16))
    return model, lambda: model(pixel_values=IMAGES, **TEXT_INPUTS).embeddings


def native_pi0():
    from transformers import PI0Config, PI0ForConditionalGeneration

    config = PI0Config(
        vlm_config=_paligemma_config(),
        dit_config={"model_type": "gemma", **TEXT},
        chunk_size=4,
        max_state_dim=6,
        max_action_dim=6,
    )
    model = PI0ForConditionalGeneration(config)
    noise = torch.linspace(-1, 1, 24).reshape(1, 4, 6)
    return (
        model,
        lambda: (
            model(
                input_ids=TOKENS,
                pixel_values=IMAGES[:, None],
                pixel_attention_mask=torch.ones(1, 1, dtype=torch.bool),
                attention_mask=torch.ones_like(TOKENS),
                state=torch.zeros(1, 6),
                noise=noise,
                timestep=torch.tensor([0.5]),
                actions=noise.flip(1),
            ).loss
        ),
    )


def digest(tensors):
    return hashlib.sha256(b"".join(t.detach().float().numpy().tobytes() for t in tensors)).hexdigest()[:16]


def run(build):
    torch.manual_seed(0)
    try:
        model, forward = build()
    except ImportError:
        return "absent"
    with torch.no_grad():
        output = forward()
    model.train()
    if build in (gemma, paligemma, siglip, gemma3):  # The others do not support it, or need the cache it turns off.
        model.gradient_checkpointing_enable()
    calls = []  # Counted before each: recomputing stops as soon as nothing more is needed.
    for name, module in model.named_modules():
        if name.endswith(".mlp"):
            module.register_forward_pre_hook(lambda *_: calls.append(1))
    torch.manual_seed(0)
    forward().sum().backward()
    gradients = [p.grad for p in model.parameters() if p.grad is not None]
    return {"output": digest([output]), "gradients": digest(gradients), "mlp_calls": len(calls)}


if __name__ == "__main__":
    builders = (gemma, paligemma, siglip, gemma3, colpali, native_pi0)
    json.dump({build.__name__: run(build) for build in builders}, sys.stdout)

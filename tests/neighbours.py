"""A program: `neighbours.py NAME ORDER` prints, as JSON, what a model of ours or of others does beside a neighbour.

ORDER says whether this package is imported "before" everything else, "after" the neighbour has done its work on the
process, or not at all ("without"). The models are tiny; their weights are drawn by the alphabet of their names.
"""

import hashlib
import json
import sys

if __name__ == "__main__" and sys.argv[2] == "before":
    import openpi_lora_patch  # noqa: F401

import torch
from transformers import GemmaConfig, GemmaForCausalLM, PaliGemmaConfig, PaliGemmaForConditionalGeneration
from transformers.models.gemma import modeling_gemma
from transformers.models.gemma.modeling_gemma import GemmaModel

torch.set_num_threads(1)
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
TEXT = {
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_attention_heads": 4,
    "num_key_value_heads": 1,
    "head_dim": 16,
    "num_hidden_layers": 2,
    "vocab_size": 64,
    "hidden_activation": "gelu_pytorch_tanh",
}
VISION = {
    "model_type": "siglip_vision_model",
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "image_size": 28,
    "patch_size": 14,
    "projection_dim": 32,
    "vision_use_head": False,
}
TOKENS = torch.tensor([[63] * 4 + [2, 5, 7, 11]])


def draw(model):
    """`model` with weights that depend on nothing but their names."""
    for i, (_, parameter) in enumerate(sorted(model.named_parameters())):
        parameter.data = torch.randn(parameter.shape, generator=torch.Generator().manual_seed(i)) * 0.1
    return model.eval().to(DEVICE)


def build(cls=GemmaForCausalLM, **marks):
    return draw(cls(GemmaConfig(**TEXT, **marks)))


def digest(tensors):
    whole = hashlib.sha256()
    for tensor in tensors:
        whole.update(tensor.detach().cpu().contiguous().view(torch.uint8).numpy().tobytes())
    return whole.hexdigest()


def logits(model):
    return model(input_ids=TOKENS.to(DEVICE)).logits


def step(model):
    """Digest of the logits and of every gradient."""
    model.zero_grad()
    out = logits(model)
    out.square().mean().backward()
    return digest([out, *(p.grad for _, p in sorted(model.named_parameters()) if p.grad is not None)])


def peft(activate):
    from peft import LoraConfig, get_peft_model

    activate()
    model = get_peft_model(build(), LoraConfig(r=2, target_modules=["q_proj", "v_proj", "down_proj"]))
    return {"names": sorted(model.state_dict()), "step": step(draw(model))}


def accelerate(activate):
    from accelerate import Accelerator, cpu_offload

    activate()
    accelerator = Accelerator(cpu=DEVICE == "cpu")
    model, _ = accelerator.prepare(built := build(), torch.optim.SGD(built.parameters()))
    prepared = step(model)
    return {"step": prepared, "offloaded": digest([logits(cpu_offload(build(), execution_device=DEVICE))])}


def alone(activate):
    activate()
    return {"vanilla": describe(build()), "openpi": describe(build(use_adarms=False))}


def liger(activate):
    from liger_kernel.transformers import apply_liger_kernel_to_gemma

    apply_liger_kernel_to_gemma(fused_linear_cross_entropy=False)
    return alone(activate)


def describe(model):
    return {
        "norm": type(model.model.norm).__name__,
        "mlp": type(model.model.layers[0].mlp).__name__,
        "rotary": modeling_gemma.apply_rotary_pos_emb.__name__,
        "names": sorted(model.state_dict()),
        "logits": logits(model).flatten().tolist() if DEVICE == "cuda" else None,  # Liger's kernels run nowhere else.
    }


def subclasses(activate):
    """Classes like those of lerobot from 0.5.0 on: marked configs, and everything else their own."""

    class OwnNorm(torch.nn.Module):
        def __init__(self, dim):
            super().__init__()
            self.weight = torch.nn.Parameter(torch.zeros(dim))

        def forward(self, x):
            return x * self.weight

    class OwnModel(GemmaModel):
        def __init__(self, config):
            super().__init__(config)
            self.norm = OwnNorm(config.hidden_size)

    class OwnHead(GemmaForCausalLM):
        def __init__(self, config):
            super().__init__(config)
            self.model = OwnModel(config)

    class OwnPaliGemma(PaliGemmaForConditionalGeneration):
        pass

    marks = {"use_adarms": True, "adarms_cond_dim": 32}
    early = build(OwnHead, **marks)
    activate()
    config = PaliGemmaConfig(
        text_config={"model_type": "gemma", **TEXT, "use_adarms": False},
        vision_config=VISION,
        image_token_index=63,
        image_token_id=63,
        projection_dim=32,
        hidden_size=32,
    )
    models = {"early": early, "head": build(OwnHead, **marks), "model": build(OwnModel, **marks)}
    models["paligemma"] = draw(OwnPaliGemma(config))
    found = {name: sorted({type(m).__qualname__ for m in model.modules()}) for name, model in models.items()}
    found |= {f"{name} step": step(models[name]) for name in ("early", "head")}
    images = torch.linspace(-1, 1, 3 * 28 * 28).reshape(1, 3, 28, 28).to(DEVICE)
    inputs = {"attention_mask": torch.ones_like(TOKENS), "token_type_ids": torch.zeros_like(TOKENS)}
    moved = {name: tensor.to(DEVICE) for name, tensor in inputs.items()}
    out = models["paligemma"](input_ids=TOKENS.to(DEVICE), pixel_values=images, **moved).logits
    return found | {"paligemma logits": digest([out])}


def main(name, order):
    def activate():
        import openpi_lora_patch

        assert openpi_lora_patch.status().active

    print(json.dumps(globals()[name](activate if order == "after" else lambda: None)))


if __name__ == "__main__":
    main(*sys.argv[1:])

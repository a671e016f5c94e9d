"""openpi's own JAX pi0 and pi0.5 with LoRA at tiny sizes: weights, a training loss, gradients, actions.

`python tests/jax_reference.py` writes `golden/jax_training_{pi0,pi05}.safetensors`; it needs openpi and JAX.
"""

import contextlib
import unittest.mock

import torch
from safetensors.torch import save_file

from golden import GOLDEN

PALIGEMMA = {"width": 64, "mlp_dim": 48, "depth": 2, "num_heads": 8, "num_kv_heads": 1, "head_dim": 8}
EXPERT = PALIGEMMA | {"width": 16, "mlp_dim": 24}
VISION = {"width": 16, "depth": 2, "mlp_dim": 24, "num_heads": 2, "patch_size": (14, 14)}
VOCABULARY, TOKENS, HORIZON, DIM, BATCH, STEPS = 64, 5, 4, 6, 2, 3
# Rank and alpha, for attention and FFN apart: only so does it show that JAX scales one of them.
LORA = {"paligemma": {"attn": (2, 6.0), "ffn": (3, 12.0)}, "expert": {"attn": (4, 2.0), "ffn": (2, 5.0)}}


@contextlib.contextmanager
def tiny(vocabulary=VOCABULARY):
    """openpi's variants `dummy` (PaliGemma) and `gemma_300m_lora` (expert) at these sizes, with LoRA."""
    import openpi.models.gemma as gemma
    import openpi.models.lora as lora
    import openpi.models.siglip as siglip

    def get_config(variant):
        tower = "paligemma" if variant == "gemma_2b_lora" else "expert"
        configs = {kind: lora.LoRAConfig(rank=rank, alpha=alpha) for kind, (rank, alpha) in LORA[tower].items()}
        return gemma.Config(**(PALIGEMMA if tower == "paligemma" else EXPERT), lora_configs=configs)

    with (
        unittest.mock.patch.object(gemma, "get_config", get_config),
        unittest.mock.patch.object(gemma, "PALIGEMMA_VOCAB_SIZE", vocabulary),
        unittest.mock.patch.object(siglip, "decode_variant", return_value=VISION),
    ):
        yield


def config(pi05):
    from openpi.models.pi0_config import Pi0Config

    variants = {"paligemma_variant": "gemma_2b_lora", "action_expert_variant": "gemma_300m_lora"}
    sizes = {"action_dim": DIM, "action_horizon": HORIZON, "max_token_len": TOKENS}
    return Pi0Config(dtype="float32", pi05=pi05, pytorch_compile_mode=None, **variants, **sizes)


def random_params(pi05):
    """Random values for each tensor of the JAX model, by its name; call it within `tiny`."""
    import jax
    from flax import nnx, traverse_util

    model = nnx.eval_shape(config(pi05).create, jax.random.key(0))
    shapes = traverse_util.flatten_dict(nnx.state(model).to_pure_dict(), sep="/")
    generator = torch.Generator().manual_seed(0)
    return {
        name: torch.randn(tuple(shapes[name].shape), generator=generator) * (0.3 if "lora_" in name else 0.15)
        for name in sorted(shapes)
    }


def inputs():
    """What a training step takes; images (camera, batch, 224, 224, 3) are waves, so that no file needs to hold them."""
    generator = torch.Generator().manual_seed(1)
    wave = torch.arange(3 * BATCH * 224 * 224 * 3, dtype=torch.float64).mul(0.01).sin().float()
    return {
        "images": wave.view(3, BATCH, 224, 224, 3),
        "image_masks": torch.tensor([[True, True], [True, False], [False, True]]),
        "tokens": torch.randint(VOCABULARY, (BATCH, TOKENS), generator=generator),
        "token_mask": torch.tensor([[True] * 5, [True] * 3 + [False] * 2]),
        "state": torch.randn(BATCH, DIM, generator=generator),
        "actions": torch.randn(BATCH, HORIZON, DIM, generator=generator),
    }


def observation(data):
    import jax.numpy as jnp
    import openpi.models.model as model

    images = dict(zip(model.IMAGE_KEYS, data["images"].numpy(), strict=True))
    masks = dict(zip(model.IMAGE_KEYS, data["image_masks"].numpy(), strict=True))
    return model.Observation(
        images={name: jnp.asarray(image) for name, image in images.items()},
        image_masks={name: jnp.asarray(mask) for name, mask in masks.items()},
        state=jnp.asarray(data["state"].numpy()),
        tokenized_prompt=jnp.asarray(data["tokens"].numpy().astype("int32")),
        tokenized_prompt_mask=jnp.asarray(data["token_mask"].numpy()),
    )


def run(pi05, params, data):
    """Loss, gradient of each of `params`, and actions, as openpi's JAX code computes them; within `tiny`."""
    import jax
    import jax.numpy as jnp
    from flax import nnx, traverse_util

    own = {tuple(name.split("/")): jnp.asarray(tensor.numpy()) for name, tensor in params.items()}
    model = config(pi05).load(traverse_util.unflatten_dict(own))
    graph, state = nnx.split(model)
    key, actions = jax.random.key(7), jnp.asarray(data["actions"].numpy())
    _, noise_key, time_key = jax.random.split(key, 3)  # As `compute_loss` draws them.
    noise = jax.random.normal(noise_key, actions.shape)
    time = jax.random.beta(time_key, 1.5, 1, actions.shape[:1]) * 0.999 + 0.001

    def loss(values):
        state.replace_by_pure_dict(values)
        return nnx.merge(graph, state).compute_loss(key, observation(data), actions).mean()

    value, grads = jax.value_and_grad(loss)(state.to_pure_dict())
    state.replace_by_pure_dict(traverse_util.unflatten_dict(own))
    sampled = nnx.merge(graph, state).sample_actions(key, observation(data), num_steps=STEPS, noise=noise)
    flat = traverse_util.flatten_dict(grads, sep="/")
    return {
        "in/noise": tensor(noise),
        "in/time": tensor(time),
        "out/loss": tensor(value),
        "out/actions": tensor(sampled),
        **{f"grad/{name}": tensor(grad) for name, grad in flat.items()},
    }


def tensor(array):
    import numpy as np

    return torch.from_numpy(np.array(array))


def main():
    for pi05 in (False, True):
        with tiny():
            params = random_params(pi05)
            found = run(pi05, params, inputs())
        stored = {name: value for name, value in found.items() if not name.startswith("grad/") or "lora_" in name}
        stored |= {f"params/{name}": value for name, value in params.items()}
        save_file(stored, GOLDEN / f"jax_training_{'pi05' if pi05 else 'pi0'}.safetensors")


if __name__ == "__main__":
    main()

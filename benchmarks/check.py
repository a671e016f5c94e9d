"""On a GPU: the functions against float64, small updates kept, and every adapter's gradient of a full-size model.

Each figure stands beside that of the naive path in bfloat16 (`LoRALinear` after `LoRALinear`, openpi's forward); the
reference is float64 for single functions, and the same weights in float32 for the whole model. Exits with 1 where ours
is worse than 1.05 times the naive path.
"""

from __future__ import annotations

import argparse
import sys
from typing import Any

import models
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import openpi_lora_patch
from openpi_lora_patch.lora import LoRAConfig, LoRALinear, kernels, lora_layers, pointwise
from openpi_lora_patch.models import vision

FAILED: list[str] = []


def error(found: Tensor, expected: Tensor) -> float:
    return ((found.double() - expected.double()).norm() / expected.double().norm()).item()


def report(name: str, ours: float, naive: float) -> None:
    holds = ours <= 1.05 * naive
    print(f"{name:52} ours {ours:.3e}  naive {naive:.3e}{'' if holds else '  WORSE'}", flush=True)
    if not holds:
        FAILED.append(name)


class _Mlp(nn.Module):
    def __init__(self, width: int, dim: int, rank: int) -> None:
        super().__init__()
        self.gate_proj, self.up_proj = adapter(width, dim, rank), adapter(width, dim, rank)
        self.down_proj = adapter(dim, width, rank)

    def forward(self, x: Tensor) -> Tensor:
        return self.down_proj(F.gelu(self.gate_proj(x), approximate="tanh") * self.up_proj(x))


def adapter(size: int, out: int, rank: int) -> LoRALinear:
    linear = LoRALinear(nn.Linear(size, out, bias=False), LoRAConfig(rank=rank, alpha=float(rank)))
    nn.init.normal_(linear.lora_B, std=0.02)
    return linear


def gradients(function: Any, x: Tensor, parameters: list[Tensor], grad: Tensor) -> list[Tensor]:
    x = x.detach().requires_grad_()
    output = function(x)
    return [output.detach(), *torch.autograd.grad(output, [x, *parameters], grad.to(output.dtype))]


def compare(name: str, module: nn.Module, naive: Any, ours: Any, x: Tensor, weight: Tensor) -> None:
    trained = [p for p in module.parameters() if p.requires_grad]
    names = ["output", "input gradient", *(n for n, p in module.named_parameters() if p.requires_grad)]
    bases = [layer.base_layer for layer in lora_layers(module).values()]
    grad = torch.randn_like(naive(module, x, weight))
    found = [gradients(lambda x, f=f: f(module, x, weight), x, trained, grad) for f in (ours, naive)]
    masters = [p.data for p in trained]
    for base in bases:
        base.weight.data = base.weight.data.double()
    for parameter in trained:
        parameter.data = parameter.data.double()
    expected = gradients(lambda x: naive(module, x, weight.double()), x.double(), trained, grad)
    for parameter, master in zip(trained, masters, strict=True):
        parameter.data = master
    for base in bases:
        base.weight.data = base.weight.data.bfloat16()
    for part, a, b, reference in zip(names, *found, expected, strict=True):
        report(f"{name}, {part}", error(a, reference), error(b, reference))


def check_functions(rank: int) -> None:
    """Random inputs at the sizes of PaliGemma's layers: rows that no tile divides, and enough for every kernel."""
    rows, width, eps = 5 * 867, 2048, 1e-6

    def norm(x: Tensor, weight: Tensor) -> Tensor:
        wide = x if x.dtype == torch.float64 else x.float()
        return (wide * torch.rsqrt(wide.square().mean(-1, keepdim=True) + eps) * (1 + weight)).to(x.dtype)

    with torch.device("cuda"):
        x, weight = torch.randn(rows, width).bfloat16(), 0.1 * torch.randn(width)
        linears = nn.ModuleList(adapter(width, out, rank) for out in (2048, 256, 256)).bfloat16()
        mlp = _Mlp(width, 16384, rank).bfloat16()
    compare(
        f"q/k/v, rank {rank}", linears, lambda m, x, w: torch.cat([linear(norm(x, w)) for linear in m], -1),
        lambda m, x, w: kernels.project_normed(x, list(m), kernels.Norm(w, eps))[0], x, weight,
    )  # fmt: skip
    for keep in (True, False):
        compare(
            f"MLP, rank {rank}, keep={keep}", mlp, lambda m, x, w: x + m(norm(x, w)),
            lambda m, x, w, keep=keep: kernels.feed_forward(x, m, kernels.Norm(w, eps), keep=keep), x, weight,
        )  # fmt: skip


def check_rotation() -> None:
    packed = torch.randn(2, 867, 10, 256, device="cuda", dtype=torch.bfloat16)
    angle = torch.randn(2, 867, 128, device="cuda")
    cos, sin = (torch.cat([f(angle)] * 2, -1).bfloat16() for f in (torch.cos, torch.sin))
    query, key, value = kernels.JoinRotated.apply(cos, sin, 8, 5, False, packed)

    def plain(x: Tensor, dtype: torch.dtype) -> Tensor:
        x, c, s = x.to(dtype), cos[:, :, None].to(dtype), sin[:, :, None].to(dtype)
        return x * c + torch.cat([-x[..., 128:], x[..., :128]], -1) * s

    for name, whole, part in (("queries", query, packed[:, :, :8]), ("keys", key, packed[:, :, 8:9])):
        reference = plain(part, torch.float64)
        report(f"rotation, {name}", error(whole[:, :867], reference), error(plain(part, torch.bfloat16), reference))
    if not torch.equal(value[:, :867], packed[:, :, 9:]) or query[:, 867:].any():
        FAILED.append("rotation, values or added tokens")
    back = torch.empty_like(packed)
    pointwise.rotate_back(back, cos, sin, (query, key, value), 0, 0)
    print(f"{'rotation there and back':52} {error(back, packed):.3e}")


def check_small_updates() -> None:
    """The slope of an output on adapters of size 1e-4: 1 where the update arrives whole."""
    with torch.device("cuda"):
        x = torch.randn(4096, 2048).bfloat16()
        linear = adapter(2048, 2048, 16).bfloat16()
    update = 1e-4 * torch.randn_like(linear.lora_B)
    delta = x.double() @ linear.lora_A.double().T @ update.double().T
    slopes = []
    for function in (lambda: kernels.project(x, [linear]), lambda: linear(x)):
        outputs = []
        for b in (torch.zeros_like(update), update):
            linear.lora_B.data = b
            outputs.append(function().double())
        difference = outputs[1] - outputs[0]
        slopes.append((difference * delta).sum().item() / delta.square().sum().item())
    print(f"{'slope on B ~ 1e-4':52} ours {slopes[0]:.4f}  naive {slopes[1]:.4f}")
    if not 0.99 <= slopes[0] <= 1.01:
        FAILED.append("slope")


def check_model(*, pi05: bool) -> None:
    """All adapters' gradients of a full-size model, two samples: ours and openpi's forward in bfloat16, to float32."""
    runs, features = {}, {}
    label = "pi0.5" if pi05 else "pi0"
    model = models.build("ours", pi05=pi05, checkpoint="none", trim="1")
    torch.manual_seed(0)
    for layer in lora_layers(model).values():
        nn.init.normal_(layer.lora_B, std=0.01)
    observation, actions = models.batch(model, 2, cameras=2)
    observation.tokenized_prompt_mask[0, 20:] = False
    noise, moment = torch.randn_like(actions), torch.rand(2, device="cuda")
    model._preprocess_observation = _as_it_is
    for name, settings in (("ours", {"trim": "1"}), ("naive", {"joint": False}), ("float32", {"joint": False})):
        openpi_lora_patch.deactivate()
        openpi_lora_patch.activate(allow_untested=True, **settings)
        if name == "float32":
            model.float()
            torch.set_float32_matmul_precision("highest")
        model.zero_grad()
        features[name] = _image_features(model, observation, ours=name == "ours")
        loss = model(observation, actions, noise, moment).mean()
        loss.backward()
        runs[name] = {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}
        runs[name]["loss"] = loss.detach()
    torch.set_float32_matmul_precision("high")
    report(f"{label}: image features", *(error(features[n], features["float32"]) for n in ("ours", "naive")))
    if len({frozenset(run) for run in runs.values()}) > 1:
        FAILED.append(f"{label}: other parameters have gradients")
    names = [n for n in runs["float32"] if runs["float32"][n].norm() > 0]
    print(f"{label}: {len(names)} gradients that are not zero, {len(runs['float32']) - 1} in all")
    errors = {
        name: torch.tensor([error(runs[name][n], runs["float32"][n]) for n in names]) for name in ("ours", "naive")
    }
    report(f"{label}: median of the gradients' errors", *(errors[n].median().item() for n in ("ours", "naive")))
    report(f"{label}: worst of the gradients' errors", *(errors[n].max().item() for n in ("ours", "naive")))
    print(f"{label}: loss " + ", ".join(f"{name} {run['loss'].item():.6f}" for name, run in runs.items()), flush=True)


def check_overlap() -> None:
    """Whole steps at batch 32 with the towers' parts at once: gradients as close as those of two steps without."""
    model = models.build("ours", checkpoint="none")
    for layer in lora_layers(model).values():
        nn.init.normal_(layer.lora_B, std=0.01)
    observation, actions = models.batch(model, 32)
    noise, moment = torch.randn_like(actions), torch.rand(32, device="cuda")
    model._preprocess_observation = _as_it_is
    runs: dict[str, list[Tensor]] = {}
    for overlap in ("0", "auto"):
        openpi_lora_patch.deactivate()
        openpi_lora_patch.activate(allow_untested=True, checkpoint="none", overlap=overlap)
        runs[overlap] = []
        for _ in range(8):
            model.zero_grad()
            model(observation, actions, noise, moment).mean().backward()
            runs[overlap].append(torch.cat([p.grad.flatten() for p in model.parameters() if p.grad is not None]))
    first, *others = runs["0"]
    expected, found = (max(error(run, first) for run in each) for each in (others, runs["auto"]))
    print(f"{'gradients of steps with overlap':52} {found:.3e}  without {expected:.3e}", flush=True)
    if found > 1.5 * expected:
        FAILED.append("overlap")


def _as_it_is(observation: Any, train: bool) -> tuple[Any, ...]:
    """openpi's `_preprocess_observation` without the augmentation."""
    images, masks = (list(part.values()) for part in (observation.images, observation.image_masks))
    return images, masks, observation.tokenized_prompt, observation.tokenized_prompt_mask, observation.state


@torch.no_grad()
def _image_features(model: Any, observation: Any, *, ours: bool) -> Tensor:
    paligemma, image = model.paligemma_with_expert.paligemma.model, next(iter(observation.images.values()))
    return vision.features(paligemma, image) if ours else paligemma.get_image_features(image)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--functions-only", action="store_true")
    options = parser.parse_args()
    torch.manual_seed(0)
    for rank in (*models.RANKS.values(), 64):  # And one above what the kernels take along.
        check_functions(rank)
    check_rotation()
    check_small_updates()
    if not options.functions_only:
        check_overlap()
        torch.cuda.empty_cache()
        for pi05 in (False, True):
            check_model(pi05=pi05)
            torch.cuda.empty_cache()
    print("failed: " + ", ".join(FAILED) if FAILED else "all checks hold")
    sys.exit(bool(FAILED))


if __name__ == "__main__":
    main()

"""Prove on this machine that the patch works: `python -m openpi_lora_patch.verify`.

Needs no GPU, no openpi and no weights; where openpi can be imported, its own `PI0Pytorch` is what is verified.
"""

from __future__ import annotations

import argparse
import contextlib
import copy
import importlib.util
import json
import os
import pathlib
import platform
import subprocess
import sys
import tempfile
import textwrap
import time
from collections.abc import Callable, Iterator
from typing import Any

import safetensors.torch
import torch
import tqdm
import transformers
from torch import Tensor
from transformers import GemmaConfig, GemmaForCausalLM

from . import activation, pi0, reference
from .apply import Counts, apply_lora
from .lora import LoRAConfig, lora_layers
from .lora.config import ATTENTION, FFN

# pi0 and pi0.5 with `gemma_2b_lora` and `gemma_300m_lora`, counted on openpi's own model.
EXPECTED = {
    "pi0": Counts(lora_tensors=504, trainable=36_720_672, total=3_534_844_688),
    "pi0.5": Counts(lora_tensors=504, trainable=35_638_304, total=3_650_230_032),
}
STEPS = 20

# Prints whether Gemma is patched, and the output of a seeded vanilla one, in hexadecimal.
_VANILLA = """
import torch
from transformers import GemmaConfig, GemmaForCausalLM
from transformers.models.gemma import modeling_gemma
torch.manual_seed(0)
torch.set_num_threads(1)
sizes = dict(hidden_size=32, intermediate_size=64, num_attention_heads=2, num_key_value_heads=1, head_dim=16)
model = GemmaForCausalLM(GemmaConfig(vocab_size=64, num_hidden_layers=2, **sizes)).eval()
with torch.no_grad():
    logits = model(torch.arange(12)[None]).logits
print(hasattr(modeling_gemma, "_gated_residual"), logits.numpy().tobytes().hex())
"""


class Failed(Exception):
    """A check did not hold: what was seen, and what to do."""

    def __init__(self, seen: str, fix: str) -> None:
        super().__init__(seen)
        self.fix = fix


def require(holds: bool, seen: str, fix: str) -> None:
    if not holds:
        raise Failed(seen, fix)


class Subject:
    """The small pi0 that is trained: ours, or openpi's where that can be imported."""

    def __init__(self) -> None:
        self.openpi = importlib.util.find_spec("openpi") is not None
        self._reference = reference.Reference(reference.FOLDER / "pi0_float32.safetensors")

    def plain(self) -> Any:
        """A seeded model without adapters."""
        torch.manual_seed(0)
        return self._openpi("dummy") if self.openpi else self._reference.pi0()

    def with_lora(self) -> Any:
        """The same model with adapters in both towers."""
        model = self.plain()
        config = LoRAConfig(rank=4, alpha=4.0)
        targets = dict.fromkeys((*ATTENTION, *FFN), config)
        apply_lora(model, paligemma=targets, action_expert=targets)
        return model

    def loss(self, model: Any) -> Tensor:
        """A loss that is the same function of the weights at each call, one value an element."""
        if not self.openpi:
            return self._reference.loss(model)
        from openpi.models.model import Observation

        torch.manual_seed(0)
        shape = (2, model.config.action_horizon, model.config.action_dim)
        observation = Observation.from_dict(_fake_observation(model.config))
        noise, actions, moment = torch.randn(shape), torch.randn(shape), torch.rand(2)
        return model(observation, actions, noise, moment)

    def full_size(self, *, pi05: bool) -> Counts:
        """Counts of a full-size model with adapters in both towers, built without memory for its weights."""
        with torch.device("meta"):
            if self.openpi:
                return Counts.of(self._openpi("gemma_2b_lora", "gemma_300m_lora", pi05=pi05))
            model = pi0.PI0(pi0.PI0Config(pi05=pi05))
            return apply_lora(
                model,
                paligemma=dict.fromkeys((*ATTENTION, *FFN), LoRAConfig(rank=16, alpha=16.0)),
                action_expert=dict.fromkeys((*ATTENTION, *FFN), LoRAConfig(rank=32, alpha=32.0)),
            )

    def _openpi(self, paligemma: str, expert: str | None = None, *, pi05: bool = False) -> Any:
        from openpi.models.pi0_config import Pi0Config
        from openpi.models_pytorch.pi0_pytorch import PI0Pytorch

        sizes = {"paligemma_variant": paligemma, "action_expert_variant": expert or paligemma}
        return PI0Pytorch(Pi0Config(pi05=pi05, dtype="float32", pytorch_compile_mode=None, **sizes))


def _fake_observation(config: Any) -> dict[str, Any]:
    tokens = torch.randint(0, 2048, (2, config.max_token_len))
    return {
        "image": {camera: torch.rand(2, 3, 224, 224) * 2 - 1 for camera in reference.CAMERAS},
        "image_mask": {camera: torch.ones(2, dtype=torch.bool) for camera in reference.CAMERAS},
        "state": torch.randn(2, config.action_dim),
        "tokenized_prompt": tokens,
        "tokenized_prompt_mask": torch.ones_like(tokens, dtype=torch.bool),
    }


def check_release(_: Subject) -> str:
    """The guard let this transformers pass, and both transformers modules are patched."""
    from transformers.models.paligemma import modeling_paligemma  # noqa: F401

    modules = activation.status().modules
    table = ", ".join(f"{name.rpartition('.')[2]} {state}" for name, state in modules.items())
    stock = [name for name in modules if name.startswith("transformers.")]
    require(all(modules[name] == "patched" for name in stock), table, "import openpi_lora_patch before transformers")
    return f"transformers {transformers.__version__}; {table}"


def check_hook_is_live(_: Subject) -> str:
    """A child process that only sets OPENPI_LORA=1 is patched; one that sets 0 is not; vanilla Gemma is the same."""
    children = {
        switch: subprocess.Popen(
            [sys.executable, "-c", _VANILLA],
            env={**os.environ, "OPENPI_LORA": switch},
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        for switch in ("1", "0")
    }
    seen = {}
    for switch, child in children.items():
        out, err = child.communicate()
        require(child.returncode == 0, f"child with OPENPI_LORA={switch}: {err[-800:]}", "see the child's error")
        seen[switch] = out.split()
    require(
        seen["1"][0] == "True",
        "OPENPI_LORA=1 did not patch a child process",
        "pip install openpi-lora-patch into this environment, or use sitecustomize_example.py",
    )
    require(seen["0"][0] == "False", "OPENPI_LORA=0 did patch a child process", "remove openpi's copied files")
    require(seen["1"][1] == seen["0"][1], "a vanilla Gemma computes other bits when patched", "report this")
    return f"child patched with 1, not with 0; vanilla logits equal in all {len(seen['1'][1]) // 2} bytes"


def check_conversion(_: Subject) -> str:
    """A Gemma that openpi marked is converted in this process, and its vanilla neighbour is not."""
    sizes = {"hidden_size": 32, "intermediate_size": 48, "num_attention_heads": 2, "num_key_value_heads": 1}
    config = {**sizes, "head_dim": 16, "num_hidden_layers": 1, "vocab_size": 16}
    marked = GemmaForCausalLM(GemmaConfig(**config, use_adarms=True, adarms_cond_dim=32))
    vanilla = GemmaForCausalLM(GemmaConfig(**config))
    ours, theirs = type(marked.model).__module__, type(vanilla.model).__module__
    require(ours.startswith(__package__ or "-"), f"marked model is {ours}", "import openpi_lora_patch first")
    require(theirs.startswith("transformers."), f"vanilla model is {theirs}", "report this")
    return f"marked: {ours}, vanilla: {theirs}"


def check_counts(subject: Subject) -> str:
    """Full-size pi0 and pi0.5 with both LoRA variants have exactly the parameters of openpi's own."""
    found = {name: subject.full_size(pi05=name == "pi0.5") for name in EXPECTED}
    figures = "; ".join(
        f"{name} {c.lora_tensors} LoRA tensors, {c.trainable:,} of {c.total:,} train" for name, c in found.items()
    )
    require(found == EXPECTED, f"{figures}; expected {EXPECTED}", "the model differs from openpi's: report this")
    return figures


def check_reference(_: Subject) -> str:
    """The outputs of openpi's own code are matched."""
    worst = 0.0
    for path in sorted(reference.FOLDER.glob("pi0*.safetensors")):
        data = reference.Reference(path)
        model = data.pi0()
        sampled = model.eval().sample_actions(data.observation(), data.inputs["noise"], data.config["num_steps"])
        with torch.no_grad():
            loss = data.loss(model)
        worst = max(
            worst,
            reference.distance(loss, data.outputs["loss"]),
            reference.distance(sampled, data.outputs["sample_actions"]),
        )
    require(worst <= 1e-6, f"worst relative difference {worst:.1e}", "report this, with the processor's model")
    return f"loss and sampled actions of pi0 and pi0.5, worst relative difference {worst:.1e}"


def check_fresh_adapters(subject: Subject) -> str:
    """Fresh adapters change no bit of the loss, and `.weight` reads go to the base layer."""
    with torch.no_grad():
        plain, adapted = subject.plain(), subject.with_lora()
        # A weight that needs a gradient may send torch's matmul to another kernel, which rounds differently.
        plain.paligemma_with_expert.requires_grad_(False)
        before, after = subject.loss(plain), subject.loss(adapted)
    layers = lora_layers(adapted)
    redirected = sum(layer.weight is layer.base_layer.weight for layer in layers.values())
    require(torch.equal(before, after), "the loss changed", "report this")
    require(redirected == len(layers) > 0, f"{redirected} of {len(layers)} redirected", "report this")
    return f"loss equal in all {before.numel()} elements; {redirected} of {len(layers)} .weight reads redirected"


def check_training(subject: Subject) -> str:
    """Training lowers the loss, moves adapters and heads, and leaves each base weight as it was, bit for bit."""
    model = subject.with_lora()
    losses = _train(subject, model)
    start = subject.with_lora().state_dict()
    moved = {name for name, tensor in model.state_dict().items() if not torch.equal(tensor, start[name])}
    trains = {name for name, parameter in model.named_parameters() if parameter.requires_grad}
    strays = sorted(moved - trains)
    require(not strays, f"frozen, but moved: {strays[:3]}", "report this")
    require(losses[-1] < 0.9 * losses[0], f"loss {losses[0]:.4f} to {losses[-1]:.4f}", "report this")
    adapters = sum("lora_" in name for name in moved)
    return (
        f"loss {losses[0]:.4f} to {losses[-1]:.4f} in {STEPS} steps; {adapters} adapters and "
        f"{len(moved) - adapters} head tensors moved, {len(start) - len(trains)} frozen tensors bit-identical"
    )


def check_checkpoints(subject: Subject) -> str:
    """A trained model saves, loads bit for bit, merges to the same loss, and unmerges bit for bit."""
    model = subject.with_lora()
    torch.manual_seed(1)
    for layer in lora_layers(model).values():
        torch.nn.init.normal_(layer.lora_B, std=0.02)
    with tempfile.TemporaryDirectory() as folder, torch.no_grad():
        path = pathlib.Path(folder, "model.safetensors")
        safetensors.torch.save_model(model, str(path))
        size = path.stat().st_size
        loaded = subject.with_lora()
        safetensors.torch.load_model(loaded, str(path))
        trained, reloaded = subject.loss(model), subject.loss(loaded)
        untouched = copy.deepcopy(loaded.state_dict())
        for layer in lora_layers(loaded).values():
            layer.merge()
        merged = reference.distance(subject.loss(loaded), trained)
        for layer in lora_layers(loaded).values():
            layer.unmerge()
    restored = all(torch.equal(tensor, untouched[name]) for name, tensor in loaded.state_dict().items())
    require(torch.equal(trained, reloaded), "the loaded model computes another loss", "report this")
    require(merged <= 1e-4, f"merging changed the loss by {merged:.1e}", "report this")
    require(restored, "unmerging did not restore the base weights", "report this")
    return f"{size / 1e6:.1f} MB, loss equal after loading, {merged:.1e} from it merged, base bits back after unmerging"


def _train(subject: Subject, model: Any) -> list[float]:
    optimizer = torch.optim.AdamW(model.parameters(), lr=5e-3, weight_decay=0.0)
    losses = []
    model.train()
    for _ in tqdm.trange(STEPS, desc="  training", leave=False, file=sys.stderr):
        loss = subject.loss(model).mean()
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    return losses


CHECKS: dict[str, Callable[[Subject], str]] = {
    "guard and patches": check_release,
    "hook is live": check_hook_is_live,
    "conversion": check_conversion,
    "full-size counts": check_counts,
    "openpi's outputs": check_reference,
    "fresh adapters": check_fresh_adapters,
    "training": check_training,
    "save, load, merge": check_checkpoints,
}


def run(subject: Subject) -> Iterator[dict[str, Any]]:
    """Each check's name, whether it holds, its figure, what to do where it fails, and its seconds."""
    for name, check in CHECKS.items():
        begin = time.perf_counter()
        result: dict[str, Any] = {"check": name, "holds": False, "figure": "", "fix": ""}
        try:
            with contextlib.redirect_stdout(sys.stderr):  # openpi prints as it trains.
                result |= {"figure": check(subject), "holds": True}
        except Failed as failure:
            result |= {"figure": str(failure), "fix": failure.fix}
        except Exception as error:
            result |= {"figure": f"{type(error).__name__}: {error}", "fix": "report this, if the message does not help"}
        yield result | {"seconds": round(time.perf_counter() - begin, 1)}


def main(arguments: list[str] | None = None) -> int:
    """Run every check and print what it found; returns 0 only if all hold."""
    parser = argparse.ArgumentParser(prog="python -m openpi_lora_patch.verify", description=__doc__)
    parser.add_argument("--json", action="store_true", help="print one JSON object in place of the table")
    options = parser.parse_args(arguments)
    activation.activate()
    subject = Subject()
    model = "openpi's PI0Pytorch" if subject.openpi else "this package's pi0 (openpi cannot be imported here)"
    versions = f"Python {platform.python_version()}, torch {torch.__version__}, transformers {transformers.__version__}"
    if not options.json:
        print(f"{versions}\nmodel: {model}\n", flush=True)
    results = []
    for result in run(subject):
        results.append(result)
        if not options.json:
            print(_row(result), flush=True)
    holds = all(result["holds"] for result in results)
    if options.json:
        print(json.dumps({"holds": holds, "versions": versions, "model": model, "checks": results}, indent=2))
    else:
        print("\nAll checks hold." if holds else "\nNot verified: see what to do above.")
    return 0 if holds else 1


def _row(result: dict[str, Any]) -> str:
    mark = "ok  " if result["holds"] else "FAIL"
    text = textwrap.fill(result["figure"], width=90, subsequent_indent=" " * 26)
    fix = f"\n{'':20}to do: {result['fix']}" if result["fix"] else ""
    return f"{mark} {result['seconds']:5.1f} s  {result['check']:<18}  {text}{fix}"


if __name__ == "__main__":
    sys.exit(main())

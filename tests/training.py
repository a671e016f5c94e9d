"""Train the small pi0 from one seed in every way that has to give the same losses, and compare them bit for bit.

    python tests/training.py --steps 300

Each way is a process of its own: orders of import, checkpointing policies, the joint forward on and off, and a run that
is killed and resumed. PEFT, where it is installed, trains the same adapters and has to stay within rounding of them.
"""

from __future__ import annotations

import argparse
import hashlib
import importlib
import importlib.util
import itertools
import pathlib
import signal
import subprocess
import sys
import tempfile
from collections.abc import Iterable, Iterator
from typing import Any

US, GEMMA, PALIGEMMA = (
    "openpi_lora_patch",
    "transformers.models.gemma.modeling_gemma",
    "transformers.models.paligemma.modeling_paligemma",
)
ORDERS = list(itertools.permutations((US, GEMMA, PALIGEMMA)))
SAVE_EVERY = 4


def ways() -> Iterator[tuple[str, list[str]]]:
    """Name and arguments of each; all have the losses of the first."""
    for order in ORDERS:
        yield " < ".join(name.rpartition(".")[2] for name in order), ["--order", ",".join(order)]
    for policy in ("none", "layer", "auto"):
        yield f"joint forward, checkpoint {policy}", ["--joint", policy]


def train(options: argparse.Namespace) -> Iterator[str]:
    """The loss of each step, exactly, and at the end a digest of what was trained."""
    for name in options.order.split(","):
        importlib.import_module(name)
    import torch

    torch.set_num_threads(1)
    from openpi_lora_patch.checkpoint import adapters, optimizer
    from openpi_lora_patch.reference import FOLDER, Reference

    data = Reference(FOLDER / "pi0_float32.safetensors")
    model, start = (_with_peft if options.peft else _with_ours)(data), 0
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    if options.nudge:
        with torch.no_grad():
            trained[0].copy_(torch.nextafter(trained[0], trained[0] + 1))
    if options.joint:
        _use_joint_forward(model, options.joint)
    adamw = torch.optim.AdamW(trained, lr=1e-3, weight_decay=0.01)
    if options.folder and (saved := [int(path.stem) for path in options.folder.glob("*.pt")]):
        start = max(saved)
        adapters.load_adapter(model, options.folder / f"{start}")
        adamw.load_state_dict(optimizer.load(options.folder / f"{start}.pt"))
    for step in range(start, options.steps):
        loss = _loss(model, data, step)
        adamw.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(trained, 1.0)
        adamw.step()
        yield f"{step} {loss.item().hex()}"
        if options.folder and (step + 1) % SAVE_EVERY == 0:
            adapters.save_adapter(model, options.folder / f"{step + 1}")
            optimizer.save(adamw.state_dict(), options.folder / "unfinished")
            (options.folder / "unfinished").rename(options.folder / f"{step + 1}.pt")
    digest = hashlib.sha256()
    for parameter in trained:
        digest.update(parameter.detach().numpy().tobytes())
    yield f"end {digest.hexdigest()}"


def _targets() -> dict[str, Any]:
    from openpi_lora_patch.lora import LoRAConfig
    from openpi_lora_patch.lora.config import ATTENTION, FFN

    return dict.fromkeys((*ATTENTION, *FFN), LoRAConfig(rank=4, alpha=8.0))


def _with_ours(data: Any) -> Any:
    import torch

    from openpi_lora_patch.apply import apply_lora

    model = data.pi0()
    torch.manual_seed(0)
    apply_lora(model, paligemma=_targets(), action_expert=_targets())
    return model.train()


def _with_peft(data: Any) -> Any:
    """PEFT's adapters, on the same Linears with the same initial values; the same heads train."""
    import peft
    import torch

    from openpi_lora_patch.lora import lora_layers

    ours = _with_ours(data)
    layers = lora_layers(ours)
    config = peft.LoraConfig(r=4, lora_alpha=8, target_modules=sorted(layers))
    model = peft.inject_adapter_in_model(config, data.pi0())
    with torch.no_grad():
        for name, layer in layers.items():
            theirs = model.get_submodule(name)
            theirs.lora_A["default"].weight.copy_(layer.lora_A)
            theirs.lora_B["default"].weight.copy_(layer.lora_B)
    for name, parameter in ours.named_parameters():
        if "lora_" not in name:
            model.get_parameter(name).requires_grad_(parameter.requires_grad)
    return model.train()


def _use_joint_forward(model: Any, policy: str) -> None:
    from openpi_lora_patch.models import joint

    towers = model.paligemma_with_expert
    plan = joint.Plan(
        attention="eager", fused=False, trim=False, prune=True, compile=False, overlap=False, checkpoint=policy
    )
    towers.forward = lambda embeds, mask, places, cond: joint.forward(towers, embeds, mask, places, (None, cond), plan)


def _loss(model: Any, data: Any, step: int) -> Any:
    """Of one sample and one camera, with actions, noise and time that the step decides."""
    import torch

    seen, draw = data.observation(), torch.Generator().manual_seed(step)
    seen = type(seen)(
        [seen.images[0][:1]], [seen.image_masks[0][:1]], seen.tokens[:1], seen.token_mask[:1], seen.state[:1]
    )
    actions, noise = (torch.randn(data.inputs["actions"][:1].shape, generator=draw) for _ in range(2))
    return model(seen, actions, noise, torch.rand(1, generator=draw)).mean()


def losses(steps: int, *arguments: str, kill_at: int | None = None) -> list[str]:
    """What `train` yields in a process of its own, which is killed after the step `kill_at`."""
    command = [sys.executable, __file__, "--worker", "--steps", str(steps), *arguments]
    lines: list[str] = []
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        for line in process.stdout:
            lines.append(line.strip())
            if kill_at is not None and line.startswith(f"{kill_at} "):
                process.kill()
    expected = 0 if kill_at is None else -signal.SIGKILL
    if process.returncode != expected:
        raise SystemExit(f"{' '.join(command)} ended with {process.returncode}")
    return lines


def killed_and_resumed(steps: int, kill_at: Iterable[int]) -> list[str]:
    """The losses of a run that is killed after these steps; what was computed again has to be what it was."""
    with tempfile.TemporaryDirectory() as folder:
        arguments = ("--folder", folder)
        found: dict[str, str] = {}
        for last in (*kill_at, None):
            for line in losses(steps, *arguments, kill_at=last):
                step, value = line.split()
                if found.setdefault(step, value) != value:
                    return [f"step {step} was {found[step]}, and {value} when it was computed again"]
    return [f"{step} {value}" for step, value in found.items()]


def distance(one: list[str], other: list[str]) -> float:
    """The largest relative difference of two runs' losses."""
    pairs = [[float.fromhex(line.split()[1]) for line in lines if not line.startswith("end")] for lines in (one, other)]
    return max(abs(a - b) / abs(a) for a, b in zip(*pairs, strict=True))


def compare(steps: int) -> int:
    """Print what each way gave; returns how many did not give the first one's bits, or strayed beyond rounding."""
    first = losses(steps)
    print(f"{first[0]} ... {first[-2]}, {first[-1]}", flush=True)
    wrong = 0
    runs = [(name, losses(steps, *arguments)) for name, arguments in ways()]
    runs.append(("killed twice and resumed", killed_and_resumed(steps, (steps // 3, 2 * steps // 3))))
    for name, found in runs:
        wrong += found != first
        print(f"{name:<60} {'equal' if found == first else 'DIFFERENT'}")
    rounding = distance(first, losses(steps, "--nudge"))
    print(f"{'one parameter in another last bit':<60} {rounding:.1e} off")
    if importlib.util.find_spec("peft"):
        found = distance(first, losses(steps, "--peft"))
        wrong += found > rounding
        print(f"{'PEFT':<60} {found:.1e} off")
    return wrong


def main(arguments: list[str] | None = None) -> int:
    """Compare all ways; returns 0 where they agree, or 1."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=300)
    hidden = {"help": argparse.SUPPRESS}
    parser.add_argument("--worker", action="store_true", **hidden)
    parser.add_argument("--order", default=US, **hidden)
    parser.add_argument("--joint", choices=("none", "layer", "auto"), **hidden)
    parser.add_argument("--folder", type=pathlib.Path, **hidden)
    parser.add_argument("--peft", action="store_true", **hidden)
    parser.add_argument("--nudge", action="store_true", **hidden)
    options = parser.parse_args(arguments)
    if options.worker:
        for line in train(options):
            print(line, flush=True)
        return 0
    return min(1, compare(options.steps))


if __name__ == "__main__":
    sys.exit(main())

"""LoRA training steps of pi0 or pi0.5 in any number of processes, by DDP or FSDP2; each run writes JSON.

Needs an openpi checkout on the path (its `src`), and a GPU for each process, or --small: openpi's dummy sizes on CPUs.
A step is what `scripts/train_pytorch.py` does, but for augmentation: samples, noise and times depend on the step alone,
so that N processes with a batch of B each train on what one process with a batch of N * B does.

    export NCCL_NVLS_ENABLE=0                                       # NVLink multicast off
    run() { torchrun --standalone --nproc-per-node "$@"; }
    run 1 benchmarks/ddp.py --batch 32 --json one.json              # what scaling is measured against
    run 1 benchmarks/ddp.py --batch 64 --json joined.json --save from_one
    run 2 benchmarks/ddp.py --batch 32 --json two.json --against one.json joined.json --save from_two
    run 1 benchmarks/ddp.py --batch 64 --resume from_two --json back.json --against joined.json
    run 2 benchmarks/ddp.py --batch 32 --resume from_one --json forth.json --against joined.json
"""

from __future__ import annotations

import argparse
import collections
import json
import os
import pathlib
import resource
import statistics
import time
from types import SimpleNamespace
from typing import Any

import models
import openpi.models_pytorch.preprocessing_pytorch as preprocessing
import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch import Tensor
from torch.distributed.checkpoint.state_dict import StateDictOptions, get_state_dict, set_state_dict
from torch.distributed.tensor import DTensor
from torch.nn.parallel import DistributedDataParallel
from torch.utils._python_dispatch import TorchDispatchMode

import openpi_lora_patch
from openpi_lora_patch.distributed import shard

TRAINED_ONLY = StateDictOptions(ignore_frozen_params=True, strict=False)
WARM_UP = 3


class Traffic(TorchDispatchMode):
    """Bytes that a process hands to collectives, or gets from gathers, by collective."""

    def __init__(self) -> None:
        super().__init__()
        self.bytes: collections.Counter[str] = collections.Counter()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func.namespace == "c10d":
            name = func.overloadpacket.__name__.strip("_")
            # Of a scatter's output and input, the second is the whole.
            whole = args[1] if name.startswith("reduce_scatter") else args[0]
            tensors = whole if isinstance(whole, list | tuple) else [whole]
            self.bytes[name] += sum(tensor.nbytes for tensor in tensors if isinstance(tensor, Tensor))
        return func(*args, **kwargs or {})


def build(options: argparse.Namespace, device: torch.device) -> Any:
    torch.manual_seed(0)
    right = preprocessing.preprocess_observation_pytorch
    preprocessing.preprocess_observation_pytorch = lambda seen, train: right(seen, train=False)
    if not options.small:
        return models.build("ours", pi05=options.pi05, checkpoint=options.checkpoint)
    openpi_lora_patch.deactivate()
    openpi_lora_patch.activate(allow_untested=True, checkpoint=options.checkpoint)
    variants = {"paligemma_variant": "dummy_lora", "action_expert_variant": "dummy_lora"}
    return models.PI0Pytorch(models.Config(options.pi05, "float32", **variants)).to(device).train()


def batch(model: Any, step: int, size: int, device: torch.device) -> tuple[Any, ...]:
    """This process's `size` samples of a step: observation, actions, noise and time."""
    rank, world, config = dist.get_rank(), dist.get_world_size(), model.config
    generator = torch.Generator(device).manual_seed(step)
    options = {"device": device, "generator": generator}

    def own(draw: Any, *shape: int) -> Tensor:
        return draw((size * world, *shape), **options)[rank * size : (rank + 1) * size]

    tokens = own(lambda shape, **more: torch.randint(0, 257152, shape, **more), config.max_token_len)
    observation = SimpleNamespace(
        images={name: own(torch.rand, 3, 224, 224) * 2 - 1 for name in models.CAMERAS},
        image_masks={name: torch.ones(size, dtype=torch.bool, device=device) for name in models.CAMERAS},
        state=own(torch.randn, config.action_dim),
        tokenized_prompt=tokens,
        tokenized_prompt_mask=torch.ones_like(tokens, dtype=torch.bool),
        token_ar_mask=None,
        token_loss_mask=None,
    )
    actions, noise = (own(torch.randn, config.action_horizon, config.action_dim) for _ in range(2))
    return observation, actions, noise, own(torch.rand)


def train(options: argparse.Namespace, device: torch.device) -> dict[str, Any]:
    """The run's figures; losses by step are means over all processes."""
    model = engine = build(options, device)
    if options.fsdp:
        shard(model)
    else:
        engine = DistributedDataParallel(model, gradient_as_bucket_view=True)
    trained = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=options.lr, betas=(0.9, 0.95), eps=1e-8, weight_decay=1e-10)
    first = load(model, optimizer, options.resume) if options.resume else 0
    times, losses, traffic = [], {}, Traffic()

    def one_step(step: int) -> None:
        inputs = batch(model, step, options.batch, device)
        synchronize(device)
        start = time.perf_counter()
        loss = engine(*inputs).mean()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(trained, max_norm=1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        mean = loss.detach()
        synchronize(device)
        times.append(1000 * (time.perf_counter() - start))
        dist.all_reduce(mean)
        losses[step] = mean.item() / dist.get_world_size()

    for step in range(first, options.steps):
        if step == first + WARM_UP and device.type == "cuda":
            torch.cuda.reset_peak_memory_stats()
        one_step(step)
        if options.save and step + 1 == options.steps // 2:
            save(model, optimizer, step + 1, options.save)
    peak = peak_gib(device)
    with traffic:  # Slower, so not among the steps that are timed; the mean of the loss is 4 bytes of it.
        one_step(options.steps)
    local = sum((p.to_local() if isinstance(p, DTensor) else p).nbytes for p in model.parameters())
    return {
        "engine": "FSDP2" if options.fsdp else "DDP",
        "processes": dist.get_world_size(),
        "batch": options.batch,
        "pi05": options.pi05,
        "small": options.small,
        "device": torch.cuda.get_device_name() if device.type == "cuda" else "cpu",
        "torch": torch.__version__,
        "ms": statistics.median(times[WARM_UP:-1]),
        "peak GiB": peak,
        "weights GiB": local / 2**30,
        "trained bytes": sum(p.numel() * p.element_size() for p in trained),
        "bytes a step": dict(traffic.bytes),
        "losses": losses,
    }


def synchronize(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize()


def peak_gib(device: torch.device) -> float:
    """Of a GPU's memory since the warm-up; else the process's."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated() / 2**30
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20


def save(model: Any, optimizer: Any, step: int, folder: pathlib.Path) -> None:
    state, averages = get_state_dict(model, optimizer, options=TRAINED_ONLY)
    dcp.save({"model": state, "optimizer": averages, "step": torch.tensor(step)}, checkpoint_id=folder)


def load(model: Any, optimizer: Any, folder: pathlib.Path) -> int:
    state, averages = get_state_dict(model, optimizer, options=TRAINED_ONLY)
    step = torch.tensor(0)
    dcp.load({"model": state, "optimizer": averages, "step": step}, checkpoint_id=folder)
    loaded = {"model_state_dict": state, "optim_state_dict": averages}
    set_state_dict(model, optimizer, **loaded, options=TRAINED_ONLY)
    return int(step)


def compare(row: dict[str, Any], other: dict[str, Any], name: str) -> dict[str, float]:
    """Scaling against a run with as many samples a process; losses against one with as many samples a step."""
    found = {}
    if row["batch"] == other["batch"] and row["processes"] > other["processes"]:
        found[f"efficiency against {name}"] = other["ms"] / row["ms"]
    if row["batch"] * row["processes"] == other["batch"] * other["processes"]:
        pairs = [(loss, other["losses"][str(step)]) for step, loss in row["losses"].items()]
        found[f"worst relative difference of a loss from {name}"] = max(abs(a - b) / abs(b) for a, b in pairs)
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--fsdp", action="store_true", help="FSDP2 in place of DDP")
    parser.add_argument("--small", action="store_true", help="openpi's dummy sizes, on CPUs through gloo")
    parser.add_argument("--pi05", action="store_true")
    parser.add_argument("--batch", type=int, default=32, help="samples a process")
    parser.add_argument("--steps", type=int, default=20)
    parser.add_argument("--lr", type=float, default=2.5e-5)
    parser.add_argument("--checkpoint", default="auto", help="OPENPI_LORA_CHECKPOINT")
    parser.add_argument("--save", type=pathlib.Path, help="write a distributed checkpoint there at half of the steps")
    parser.add_argument("--resume", type=pathlib.Path, help="start from such a checkpoint")
    parser.add_argument("--json", type=pathlib.Path, help="where to write the figures")
    parser.add_argument("--against", type=pathlib.Path, nargs="*", default=[], help="figures of runs to compare with")
    options = parser.parse_args()
    device = torch.device("cpu") if options.small else torch.device("cuda", int(os.environ["LOCAL_RANK"]))
    if device.type == "cuda":
        torch.cuda.set_device(device)
    dist.init_process_group("gloo" if options.small else "nccl")
    row = train(options, device)
    for path in options.against:
        row |= compare(row, json.loads(path.read_text()), path.stem)
    if dist.get_rank() == 0:
        text = json.dumps(row, indent=1)
        print(text)
        if options.json is not None:
            options.json.write_text(text + "\n")
    dist.destroy_process_group()


if __name__ == "__main__":
    main()

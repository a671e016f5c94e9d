"""Two and three processes on a CPU against one: gradients, bytes, checkpoints. This file is also what they run."""

import itertools
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch.distributed import fsdp
from torch.distributed.checkpoint.state_dict import StateDictOptions, get_state_dict, set_state_dict
from torch.nn.parallel import DistributedDataParallel
from torch.utils._python_dispatch import TorchDispatchMode

from golden import GOLDEN
from openpi_lora_patch.apply import apply_lora
from openpi_lora_patch.checkpoint.adapters import load_adapter, save_adapter
from openpi_lora_patch.distributed import _unread, shard, whole
from openpi_lora_patch.errors import LoRAError
from openpi_lora_patch.lora import LoRAConfig, lora_layers
from openpi_lora_patch.lora.config import ATTENTION, FFN
from openpi_lora_patch.models import joint
from openpi_lora_patch.reference import Reference

# bfloat16 is the base's dtype in a real run, beside float32 adapters.
KINDS = ("pi0_float32", "pi05_bfloat16")
ENGINES = ("ddp", "fsdp") if hasattr(fsdp, "fully_shard") else ("ddp",)  # FSDP2 came with torch 2.6.
PLAN = joint.Plan(
    attention="sdpa", fused=True, trim=False, prune=True, compile=False, overlap=False, checkpoint="layer"
)
TRAINED_ONLY = StateDictOptions(ignore_frozen_params=True, strict=False)


class Run:
    """A small model with adapters, its optimizer, and the samples of two that this process trains on."""

    def __init__(self, kind, own=slice(None), seed=0):
        data = Reference(GOLDEN / f"{kind}.safetensors")
        self.model = self.engine = data.pi0().train()
        self.reduced = Reduced()
        targets = dict.fromkeys((*ATTENTION, *FFN), LoRAConfig(rank=4, alpha=8.0))
        torch.manual_seed(seed)
        apply_lora(self.model, paligemma=targets, action_expert=targets)
        for layer in lora_layers(self.model).values():
            torch.nn.init.normal_(layer.lora_B, std=0.1)
        towers = self.model.paligemma_with_expert
        towers.forward = lambda embeds, mask, positions, cond: joint.forward(
            towers, embeds, mask.to(embeds[0].dtype), positions, (None, cond), PLAN
        )
        observation = data.observation()
        for name, value in vars(observation).items():
            setattr(observation, name, [x[own] for x in value] if isinstance(value, list) else value[own])
        self.batch = (observation, *(data.inputs[name][own] for name in ("actions", "noise", "time")))

    def start(self):
        self.optimizer = torch.optim.AdamW([p for p in self.model.parameters() if p.requires_grad], lr=1e-2)

    def step(self, batches=None):
        """Loss and gradients of one step on `batches`, equal in weight."""
        batches, total = batches or [self.batch], 0.0
        for batch in batches:
            loss = self.engine(*batch).mean()
            with self.reduced:
                loss.backward()
            total += loss.detach() / len(batches)
        for parameter in self.optimizer.param_groups[0]["params"]:
            if parameter.grad is not None:
                parameter.grad /= len(batches)  # Not of the loss: bfloat16 would round other numbers.
        grads = {name: whole(p.grad).clone() for name, p in self.model.named_parameters() if p.grad is not None}
        self.optimizer.step()
        self.optimizer.zero_grad()
        return total, grads

    def averages(self):
        """The optimizer's averages of the gradients."""
        names = {parameter: name for name, parameter in self.model.named_parameters()}
        return {names[p]: whole(state["exp_avg"]).clone() for p, state in self.optimizer.state.items()}

    def save(self, folder):
        model, optimizer = get_state_dict(self.model, self.optimizer, options=TRAINED_ONLY)
        dcp.save({"model": model, "optimizer": optimizer}, checkpoint_id=folder)

    def load(self, folder):
        model, optimizer = get_state_dict(self.model, self.optimizer, options=TRAINED_ONLY)
        dcp.load({"model": model, "optimizer": optimizer}, checkpoint_id=folder)
        loaded = {"model_state_dict": model, "optim_state_dict": optimizer}
        set_state_dict(self.model, self.optimizer, **loaded, options=TRAINED_ONLY)


class Reduced(TorchDispatchMode):
    """Counts the bytes that this process hands to be reduced or scattered."""

    bytes = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if func is torch.ops.c10d._reduce_scatter_base_.default:
            self.bytes += args[1].nbytes
        assert func is not torch.ops.c10d.reduce_scatter_.default, "not counted"
        return func(*args, **kwargs or {})


def work(folder):
    """What each of several processes does; rank 0 leaves behind what came of it."""
    dist.init_process_group("gloo")
    rank = dist.get_rank()
    for kind, engine in itertools.product(KINDS, ENGINES):
        # Another seed on each rank, as openpi has it: the engine makes them start from the same adapters.
        run, sent, name = Run(kind, sample_of(rank), seed=rank), [], f"{kind}-{engine}"
        if engine == "ddp":
            run.engine = DistributedDataParallel(run.model, gradient_as_bucket_view=True)
            run.engine.register_comm_hook(sent, count_and_reduce)
        else:
            shard(run.model)
        run.start()
        first = run.step()
        local = sum(getattr(p, "to_local", lambda p=p: p)().numel() for p in layers(run.model))
        run.save(folder / f"{name}-many")
        save_adapter(run.model, folder / f"{name}-adapter" if rank == 1 else None)
        second = run.step()
        run.load(folder / f"{kind}-one")
        loaded = run.averages()
        third = run.step()
        dist.barrier()
        load_adapter(run.model, folder / f"{name}-adapter")
        steps = [first, second, third, run.step()]
        losses = torch.stack([loss for loss, _ in steps])
        dist.all_reduce(losses)
        if rank == 0:
            sent = (sum(sent) + run.reduced.bytes) / len(steps)
            result = {"losses": losses / dist.get_world_size(), "grads": first[1], "sent": sent}
            torch.save(result | {"loaded": loaded, "local": local}, folder / f"{name}.pt")
    dist.destroy_process_group()


def layers(model):
    """The parameters of both towers' layers."""
    towers = model.paligemma_with_expert
    return [*towers.paligemma.model.language_model.layers.parameters(), *towers.gemma_expert.model.layers.parameters()]


def count_and_reduce(sent, bucket):
    """A DDP communication hook: the mean over all processes, and how many bytes it is of."""
    sent.append(bucket.buffer().nbytes)
    mean = bucket.buffer().div_(dist.get_world_size())
    return dist.all_reduce(mean, async_op=True).get_future().then(lambda future: future.value()[0])


def test_a_torch_without_fsdp2_is_refused_by_name(monkeypatch):
    monkeypatch.delattr(fsdp, "fully_shard", raising=False)
    with pytest.raises(LoRAError, match="FSDP2"):
        shard(torch.nn.Linear(2, 2))


def sample_of(rank):
    return slice(rank % 2, rank % 2 + 1)


@pytest.fixture(scope="module", params=[2, 3])
def world(request):
    return request.param


@pytest.fixture(scope="module")
def alone(world, tmp_path_factory):
    """By kind, one process's two steps on all samples; and the folder that holds its checkpoint after the first."""
    folder, steps = tmp_path_factory.mktemp("distributed"), {}
    for kind in KINDS:
        run = Run(kind)
        run.start()
        first = run.step(batches(kind, world))
        run.save(folder / f"{kind}-one")
        steps[kind] = [first, run.step(batches(kind, world))]
    return folder, steps


def batches(kind, world):
    """Two at once; in bfloat16 one by one: a product's rounding depends on its rows."""
    at_once = kind == "pi0_float32" and world == 2
    return [Run(kind, own).batch for own in ([slice(2)] if at_once else map(sample_of, range(world)))]


@pytest.fixture(scope="module")
def together(world, alone):
    """The folder that holds what `world` processes left behind."""
    folder, _ = alone
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={world}"]
    command += [__file__, folder]
    environment = os.environ | {"GLOO_SOCKET_IFNAME": "lo"}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    return folder


@pytest.fixture(params=itertools.product(KINDS, ENGINES), ids="-".join)
def case(request, together):
    """Kind, engine, the processes' results."""
    kind, engine = request.param
    return kind, engine, torch.load(together / f"{kind}-{engine}.pt")


def assert_close(found, expected):
    """Tensors by name, each within rounding of its own size, or of a hundredth of the largest's."""
    assert found.keys() == expected.keys()
    largest = max(tensor.norm() for tensor in expected.values())
    for name, tensor in expected.items():
        assert (found[name] - tensor).norm() <= 1e-5 * max(tensor.norm(), largest / 100), name


def test_processes_have_the_gradients_of_one_with_all_samples(case, alone):
    kind, _, result = case
    (loss, grads), _ = alone[1][kind]
    trained = {name: p for name, p in Run(kind).model.named_parameters() if p.requires_grad}
    assert grads.keys() == trained.keys(), "adapters that nothing reads have a gradient too, zeros"
    assert_close(result["grads"], grads)
    torch.testing.assert_close(result["losses"][0], loss)


@pytest.mark.parametrize("kind", KINDS)
def test_ddp_sends_the_gradients_of_what_trains_once_and_nothing_else(kind, together):
    trained = sum(p.numel() for p in Run(kind).model.parameters() if p.requires_grad)
    assert torch.load(together / f"{kind}-ddp.pt")["sent"] == 4 * trained


@pytest.mark.skipif("fsdp" not in ENGINES, reason="this torch has no FSDP2")
@pytest.mark.parametrize("kind", KINDS)
def test_fsdp_reduces_the_gradients_of_what_trains_once_and_nothing_else(kind, world, together):
    model = Run(kind).model
    unread = set(_unread(model))  # Each process gives its own part of these zeros.
    trained = [p for p in model.parameters() if p.requires_grad and p not in unread]
    # Rows are dealt out, as many to each process.
    padded = sum(-(-len(p) // world) * world * p[0].numel() for p in trained)
    assert torch.load(together / f"{kind}-fsdp.pt")["sent"] == 4 * padded


@pytest.mark.parametrize("kind", KINDS)
def test_fsdp_leaves_each_process_its_part_of_the_layers(kind, world, together):
    rows = [(len(p), p[0].numel()) for p in layers(Run(kind).model)]
    assert torch.load(together / f"{kind}-fsdp.pt")["local"] == sum(-(-many // world) * size for many, size in rows)


def test_a_distributed_checkpoint_of_one_loads_on_many_and_of_many_on_one(case, world, alone):
    kind, engine, result = case
    folder, steps = alone
    (_, grads), (second_loss, _) = steps[kind]
    averages = {name: 0.1 * grad for name, grad in grads.items()}  # Adam's, after one step from zero.
    assert_close(result["loaded"], averages)
    torch.testing.assert_close(result["losses"][2], second_loss)
    run = Run(kind, seed=3)
    run.start()
    run.load(folder / f"{kind}-{engine}-many")
    assert_close(run.averages(), averages)
    torch.testing.assert_close(run.step(batches(kind, world))[0], result["losses"][1])


def test_an_adapter_saved_by_the_second_rank_is_whole_and_loads_on_one_and_on_many(case, world, alone):
    kind, engine, result = case
    torch.testing.assert_close(result["losses"][3], result["losses"][1])
    run = Run(kind, seed=3)
    run.start()
    load_adapter(run.model, alone[0] / f"{kind}-{engine}-adapter")
    torch.testing.assert_close(run.step(batches(kind, world))[0], result["losses"][1])


if __name__ == "__main__":
    work(Path(sys.argv[1]))
    os._exit(0)  # A thread of gloo that asks for the GIL while the interpreter ends would abort the process.

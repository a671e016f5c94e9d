"""Training in several processes, on torch's own engines: what DDP and FSDP2 need to know of a pi0 or pi0.5.

Both count on modules being called. The last PaliGemma layer is read for its keys and values alone, and the layers of
the two towers run in pairs, past their own `forward`.
"""

from __future__ import annotations

import itertools
from typing import TYPE_CHECKING, Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from .errors import LoRAError

if TYPE_CHECKING:
    from torch.distributed.device_mesh import DeviceMesh


def shard(model: Any, mesh: DeviceMesh | None = None) -> None:
    """Spread a LoRA model's decoder layers, and all else that trains, over the processes of `mesh`, in place (FSDP2).

    Each pair of layers is one group, gathered when the joint forward comes to it and again in the backward pass. What
    is frozen outside the layers is read all through a step, so it stays whole in every process. To be called by every
    process, after the weights are loaded and before the optimizer is made; all start from rank 0's values.

    Args:
        model: openpi's `PI0Pytorch`, both towers with adapters, training by the joint forward (`OPENPI_LORA_JOINT`).
        mesh: one-dimensional; all processes where absent.

    Raises:
        LoRAError: torch is older than 2.6, which brought FSDP2.
        AssertionError: torch's, where what trains is not of one dtype, as in a tower without adapters in bfloat16.
    """
    try:
        from torch.distributed.fsdp import fully_shard, register_fsdp_forward_method
    except ImportError:
        raise LoRAError("FSDP2 is not in this torch.", found=torch.__version__, expected="2.6 or newer") from None
    group = None if mesh is None else mesh.get_group()
    for tensor in itertools.chain(model.parameters(), model.buffers()):
        dist.broadcast(tensor.detach(), group=group, group_src=0)
    towers = model.paligemma_with_expert
    pairs = zip(towers.paligemma.model.language_model.layers, towers.gemma_expert.model.layers, strict=True)
    for pair in map(list, pairs):
        fully_shard(pair, mesh=mesh)
        register_fsdp_forward_method(pair[0], "run_pair")
    fully_shard(model, mesh=mesh, ignored_params={p for p in model.parameters() if not p.requires_grad})


def whole(tensor: Tensor) -> Tensor:
    """`tensor`, gathered where `shard` has spread it; every process has to ask for it then."""
    return tensor.full_tensor() if hasattr(tensor, "full_tensor") else tensor


def fill(target: Any, tensor: Tensor) -> None:
    """Copy `tensor`, which every process holds whole, into `target`, which `shard` may have spread."""
    if hasattr(target, "full_tensor"):
        from torch.distributed.tensor import distribute_tensor

        tensor = distribute_tensor(tensor.to(target.device), target.device_mesh, target.placements)
    target.copy_(tensor)


def reach_every_parameter(model: Any, _: Any, output: Tensor) -> Tensor:
    """A forward hook: what trains but reaches no output gets a gradient of zeros.

    DDP waits for the gradient of every parameter unless it is told to search for unused ones, and a distributed
    checkpoint wants the optimizer's state of each, whatever number of processes wrote it.
    """
    return _WithZeros.apply(output, *_unread(model)) if output.requires_grad else output


class _WithZeros(torch.autograd.Function):
    """The first input; the others get zeros for a gradient."""

    @staticmethod
    def forward(ctx: Any, output: Tensor, *parameters: Tensor) -> Tensor:
        ctx.save_for_backward(*parameters)
        return output.clone()

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, ...]:
        return grad, *map(torch.zeros_like, ctx.saved_tensors)


def _unread(model: Any) -> list[nn.Parameter]:
    """Parameters that train behind the last keys and values of the prefix: the actions attend to nothing later."""
    language = model.paligemma_with_expert.paligemma.model.language_model
    last = language.layers[-1]
    parts = (last.self_attn.o_proj, last.post_attention_layernorm, last.mlp, language.norm)
    return [p for part in parts for p in part.parameters() if p.requires_grad]

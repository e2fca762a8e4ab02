"""Tensors that FSDP2 spreads over processes (`DTensor`) and ordinary ones, under the same calls."""

from collections.abc import Mapping

import torch
from torch.distributed.fsdp import FSDPModule
from torch.distributed.tensor import DTensor, distribute_tensor


def to_local(tensor: torch.Tensor) -> torch.Tensor:
    """The part of a tensor that this process holds, as memory shared with it: all of an ordinary one."""
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


def full_tensor(tensor: torch.Tensor) -> torch.Tensor:
    """All of a tensor. For a spread one every process must call this."""
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


def full_on_cpu(tensors: Mapping[str, torch.Tensor], keep: bool = True) -> dict[str, torch.Tensor]:
    """All of each tensor, contiguous on the CPU. For spread ones every process must call this; {} where not `keep`."""
    result = {}
    for name, tensor in tensors.items():
        tensor = full_tensor(tensor.detach())
        if keep:
            result[name] = tensor.cpu().contiguous()
    return result


@torch.no_grad()
def copy_full(destination: torch.Tensor, value: torch.Tensor) -> None:
    """Write `value`, a whole tensor of the same shape, into `destination`, spread or not."""
    if isinstance(destination, DTensor):
        value = value.to(destination.device, destination.dtype)
        value = distribute_tensor(value, destination.device_mesh, destination.placements)
    destination.copy_(value)


def reshard(model: torch.nn.Module) -> None:
    """Spread the weights that a call without a backward pass has left whole, as FSDP2 does with the outermost module's."""
    for module in model.modules():
        if isinstance(module, FSDPModule):
            module.reshard()

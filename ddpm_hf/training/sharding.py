"""The same calls for ordinary tensors and for tensors that FSDP2 shards over processes (`DTensor`)."""

from collections.abc import Mapping

import torch
from torch.distributed.fsdp import FSDPModule
from torch.distributed.tensor import DTensor, distribute_tensor


def to_local(tensor: torch.Tensor) -> torch.Tensor:
    """The shard of a tensor on this process, sharing its memory. An ordinary tensor is returned as it is."""
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


def full_tensor(tensor: torch.Tensor) -> torch.Tensor:
    """The full tensor. Must be called on every process if the tensor is sharded."""
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


def full_on_cpu(tensors: Mapping[str, torch.Tensor], keep: bool = True) -> dict[str, torch.Tensor]:
    """The full tensors by name, contiguous and on the CPU; {} if not `keep`.

    Must be called on every process if a tensor is sharded.
    """
    result = {}
    for name, tensor in tensors.items():
        tensor = full_tensor(tensor.detach())
        if keep:
            result[name] = tensor.cpu().contiguous()
    return result


@torch.no_grad()
def copy_full(destination: torch.Tensor, value: torch.Tensor) -> None:
    """Copy the full tensor `value` into `destination`, which has the same shape and may be sharded."""
    if isinstance(destination, DTensor):
        value = value.to(destination.device, destination.dtype)
        value = distribute_tensor(value, destination.device_mesh, destination.placements)
    destination.copy_(value)


def reshard(model: torch.nn.Module) -> None:
    """Shard the weights that a forward pass without a backward pass leaves gathered (FSDP2's outermost module)."""
    for module in model.modules():
        if isinstance(module, FSDPModule):
            module.reshard()

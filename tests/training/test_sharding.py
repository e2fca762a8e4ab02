"""Tensors sharded by FSDP2 and ordinary ones behave alike. Two processes are tested in test_resume.py."""

import pytest
import torch
import torch.distributed as dist
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor, Shard, distribute_tensor

from ddpm_hf.training.ema import EMA
from ddpm_hf.training.sharding import copy_full, full_on_cpu, full_tensor, reshard, to_local


@pytest.fixture
def mesh():
    """A process group of this process alone."""
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    yield DeviceMesh("cpu", [0])
    dist.destroy_process_group()


@pytest.fixture(params=["ordinary", "sharded"])
def as_kind(request):
    """A function that shards a tensor, or returns it as it is."""
    if request.param == "ordinary":
        return lambda tensor: tensor
    mesh = request.getfixturevalue("mesh")
    return lambda tensor: distribute_tensor(tensor, mesh, [Shard(0)])


def test_the_full_tensor_is_an_ordinary_one_with_all_values(as_kind):
    values = torch.randn(4, 3)
    full = full_tensor(as_kind(values))
    assert not isinstance(full, DTensor) and torch.equal(full, values)


def test_the_local_tensor_shares_its_memory(as_kind):
    tensor = as_kind(torch.zeros(4, 3))
    local = to_local(tensor)
    local += 1
    assert not isinstance(local, DTensor) and torch.equal(full_tensor(tensor), torch.ones(4, 3))


def test_copy_full_writes_all_values_in_the_dtype_of_the_destination(as_kind):
    destination, values = as_kind(torch.zeros(4, 3, dtype=torch.bfloat16)), torch.randn(4, 3)
    copy_full(destination, values)
    assert torch.equal(full_tensor(destination), values.bfloat16())


def test_full_on_cpu_is_contiguous_and_empty_unless_kept(as_kind):
    values = torch.randn(2, 3, 4, 4)
    tensors = {"weight": as_kind(values.to(memory_format=torch.channels_last)).requires_grad_()}
    result = full_on_cpu(tensors)
    assert result["weight"].is_contiguous() and not result["weight"].requires_grad
    assert torch.equal(result["weight"], values)
    assert full_on_cpu(tensors, keep=False) == {}


def test_reshard_shards_the_weights_after_a_forward_pass(mesh):
    model = fully_shard(torch.nn.Linear(3, 2), mesh=mesh)
    with torch.no_grad():
        model(torch.ones(1, 3))
    assert not isinstance(model.weight, DTensor)
    reshard(model)
    assert isinstance(model.weight, DTensor)


def test_the_average_of_sharded_weights_is_that_of_ordinary_ones(mesh):
    torch.manual_seed(0)
    ordinary, sharded = torch.nn.Linear(3, 2), torch.nn.Linear(3, 2)
    sharded.load_state_dict(ordinary.state_dict())
    models = (ordinary, fully_shard(sharded, mesh=mesh))
    averages = [EMA(model, 100) for model in models]
    for ema, model in zip(averages, models):
        for parameter in model.parameters():
            copy_full(parameter, torch.arange(float(parameter.numel())).reshape(parameter.shape))
        ema.update(model, 8, 8)
    expected, found = (full_on_cpu(ema.state_dict()) for ema in averages)
    assert expected.keys() == found.keys() and all(torch.equal(found[name], expected[name]) for name in expected)

"""Two gloo processes, each with half of the batch, have the gradients of one with all of it."""

import copy

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from cases import close
from models import LEVELS, Net, distillation_loss, images
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.nn.parallel import DistributedDataParallel

from featkd import Distiller

WORLD = 2


def distiller():
    """The same in every process; normalized by running statistics, as the batches differ."""
    torch.manual_seed(0)
    return Distiller(Net(4).eval(), Net(6), distillation_loss(), LEVELS, shared_input="backbone")


def gradients(model, batch):
    for _ in range(2):  # the second step finds the state that the first has left
        model.zero_grad()
        output, losses = model(batch)
        (output.square().mean() + sum(losses.values())).backward()
    return {name: value.grad for name, value in model.named_parameters() if value.requires_grad}


def by_ddp(batch):
    model = DistributedDataParallel(distiller())
    return {name[len("module.") :]: value for name, value in gradients(model, batch).items()}


def by_fsdp2(batch):
    model = distiller()
    mesh = init_device_mesh("cpu", (WORLD,))
    for part in (model.student.backbone.c1, model.student.backbone.c2, model.loss, model):
        fully_shard(part, mesh=mesh)
    return {name: value.full_tensor() for name, value in gradients(model, batch).items()}


def run(rank, wrapper, folder):
    torch.set_num_threads(1)
    rendezvous = f"file://{folder}/rendezvous"
    dist.init_process_group("gloo", init_method=rendezvous, rank=rank, world_size=WORLD)
    found = wrapper(images(4).chunk(WORLD)[rank])
    torch.save(found, f"{folder}/{rank}")
    dist.destroy_process_group()


@pytest.mark.slow
@pytest.mark.parametrize("wrapper", [by_ddp, by_fsdp2])
def test_gradients_equal_those_of_one_process(wrapper, tmp_path):
    mp.start_processes(run, (wrapper, str(tmp_path)), WORLD, start_method="spawn")
    expected = gradients(copy.deepcopy(distiller()), images(4))
    assert any("loss" in name for name in expected)
    for rank in range(WORLD):
        found = torch.load(tmp_path / str(rank))
        assert found.keys() == expected.keys()
        for name, gradient in found.items():
            assert gradient.abs().sum() > 0, name
            close(gradient, expected[name], 1e-9)

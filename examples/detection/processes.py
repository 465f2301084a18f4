"""The processes of one job: how they join, and how they act as one."""

import os
from collections.abc import Callable, Sequence
from datetime import timedelta
from typing import Any, TypeVar

import torch
import torch.distributed as dist

Result = TypeVar("Result")


class JobError(Exception):
    """What ends the job, in words for the person who started it."""


def world() -> tuple[int, int]:
    """This process's rank and the number of processes."""
    return (dist.get_rank(), dist.get_world_size()) if dist.is_initialized() else (0, 1)


def join_processes(device: torch.device) -> torch.device:
    """Joins the processes that torchrun has started, if any; the device of this one."""
    variables = os.environ
    if "WORLD_SIZE" not in variables:
        return device
    # torchrun's own store outlives a restart, with the addresses of the processes before.
    lasting = variables.get("TORCHELASTIC_USE_AGENT_STORE") == "True"
    nodes = int(variables.get("GROUP_WORLD_SIZE", "1"))
    # Nodes count restarts each for itself: the count is no name for a store that they share.
    if lasting and nodes > 1 and variables["TORCHELASTIC_MAX_RESTARTS"] != "0":
        raise SystemExit(
            "--max-restarts on several nodes wants TORCH_DISABLE_SHARE_RDZV_TCP_STORE=1 set for "
            "torchrun, or restarted processes may wait for those that died"
        )
    cuda = device.type == "cuda"
    if cuda and int(variables["LOCAL_RANK"]) >= torch.cuda.device_count():
        raise SystemExit(
            f"--nproc-per-node must be at most the {torch.cuda.device_count()} GPUs of the node"
        )
    store, rank, ranks = next(dist.rendezvous("env://"))
    if lasting and nodes == 1:
        store = dist.PrefixStore(variables["TORCHELASTIC_RESTART_COUNT"], store)
    # The first process evaluates alone, and the others wait for it.
    patience = timedelta(hours=1)
    backend = "nccl" if cuda else "gloo"
    dist.init_process_group(backend, store=store, rank=rank, world_size=ranks, timeout=patience)
    if not cuda:
        return device
    device = torch.device("cuda", int(variables["LOCAL_RANK"]))
    torch.cuda.set_device(device)
    return device


def by_first_rank(work: Callable[[], Result]) -> Result:
    """What `work()` gives on the first rank, on all of them; its error likewise."""
    rank, ranks = world()
    result: Any = None
    error: Exception | None = None
    if rank == 0:
        try:
            result = work()
        except Exception as found:
            error = found
    if ranks > 1:
        told = [result, error]
        dist.broadcast_object_list(told)
        result, error = told
    if error is not None:
        raise error
    return result


def any_rank(flags: Sequence[bool], device: torch.device) -> list[bool]:
    """Of each flag, whether it is set on any rank; all ranks must ask."""
    if world()[1] == 1:
        return list(flags)
    told = torch.tensor(flags, dtype=torch.uint8, device=device)
    dist.all_reduce(told, dist.ReduceOp.MAX)
    return told.bool().tolist()


def of_all_ranks(value: Result) -> list[Result]:
    """Every rank's, in their order."""
    values: list[Any] = [value]
    if world()[1] > 1:
        values *= world()[1]
        dist.all_gather_object(values, value)
    return values

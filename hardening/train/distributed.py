"""Several processes that train one model, as `torchrun` starts them; alone, nothing here acts.
Gradients are averaged once a step. DistributedDataParallel would gain little and wraps one forward
of one network, where a step here has several.
"""

import atexit
import os
import time
import uuid
from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor
from torch import distributed as dist
from torch.distributed.distributed_c10d import PrefixStore, Store
from torch.distributed.rendezvous import rendezvous


def join(device: torch.device) -> torch.device:
    """Meet the other processes, if `torchrun` started this one; returns this one's device."""
    if "RANK" not in os.environ:
        return device
    if device.type == "cuda":
        device = torch.device("cuda", int(os.environ["LOCAL_RANK"]))
        torch.cuda.set_device(device)
    if not dist.is_initialized():
        store, rank, world = next(rendezvous("env://"))
        dist.init_process_group(
            "nccl" if device.type == "cuda" else "gloo",
            store=PrefixStore(attempt(store, rank, world), store),
            rank=rank,
            world_size=world,
        )
        # Left to the interpreter's end, its threads now and then take the process down.
        atexit.register(dist.destroy_process_group)
    return device


def attempt(store: Store, rank: int, world: int, *, within: float = 1800.0) -> str:
    """A name that `world` processes agree on and that no earlier attempt had.

    torchrun's store outlives a restart, with the addresses of processes that are gone, and its
    count of restarts may differ between machines. So each process signs in anew, and the first
    one lists who is there until all have confirmed the same list.

    Raises:
        TimeoutError: not all came `within` that many seconds.
    """
    own, end = uuid.uuid4().hex, time.monotonic() + within
    store.set(f"present/{rank}", own)
    while time.monotonic() < end:
        if rank == 0:
            present = (store.get(f"present/{other}").decode() for other in range(world))
            store.set("list", "-".join(present))
        name = store.get("list").decode()
        if own in name:
            store.set(f"confirmed/{rank}", name)
        if rank == 0 and all(_says(store, f"confirmed/{other}", name) for other in range(world)):
            store.set("agreed", name)
        if own in name and _says(store, "agreed", name):
            return name
        time.sleep(0.05)
    raise TimeoutError(f"only some of the {world} processes started: start one for each rank")


def _says(store: Store, key: str, value: str) -> bool:
    return store.check([key]) and store.get(key).decode() == value


def place() -> tuple[int, int]:
    """(number of this process, number of processes)."""
    return (dist.get_rank(), dist.get_world_size()) if dist.is_initialized() else (0, 1)


def beside() -> int:
    """How many processes share this machine."""
    return int(os.environ.get("LOCAL_WORLD_SIZE", "1"))


def first() -> bool:
    """Whether this process is the one that prints and writes."""
    return place()[0] == 0


def mine(index: Tensor) -> Tensor:
    """This process's part of a batch's `index`; all parts are of one size where it divides."""
    rank, world = place()
    return index[rank::world]


def portions(index: Tensor, size: int, *, skip: int = 0) -> list[Tensor]:
    """This process's part of each batch of `size` after the first `skip`; what is left at the end
    and fills no batch is left out.
    """
    size = min(size, len(index))
    size -= size % place()[1]
    whole = len(index) - len(index) % size
    return [mine(part) for part in torch.split(index[:whole], size)[skip:]]


def average(tensors: Iterable[Tensor]) -> None:
    """Replace each tensor by its mean over all processes, in one exchange."""
    _, world = place()
    if world == 1:
        return
    every = list(tensors)
    flat = torch.cat([tensor.detach().reshape(-1).float() for tensor in every])
    dist.all_reduce(flat)
    parts = torch.split(flat / world, [tensor.numel() for tensor in every])
    for tensor, part in zip(every, parts, strict=True):
        tensor.detach().copy_(part.view_as(tensor))


def total(count: Tensor) -> Tensor:
    """The sum of `count` over all processes."""
    if place()[1] > 1:
        dist.all_reduce(count)
    return count


def gather(value: Any) -> list[Any]:
    """What each process passes, in all of them."""
    every = [value] * place()[1]
    if len(every) > 1:
        dist.all_gather_object(every, value)
    return every


def from_first(value: Any) -> Any:
    """What the first process passes, in all of them."""
    if place()[1] == 1:
        return value
    held = [value]
    dist.broadcast_object_list(held)
    return held[0]

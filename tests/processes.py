"""Two processes of a test's own, connected as torchrun would connect them."""

import os
import socket
from collections.abc import Callable
from typing import Any

import torch


def spawn_two(function: Callable[..., None], *args: Any) -> None:
    """Runs ``function(rank, *args)`` in two fresh processes, in which Lightning's ``strategy="ddp"`` finds the other.

    The function and its arguments must be picklable; what either process raises is raised here.
    """
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    torch.multiprocessing.spawn(_connected, (port, function, args), nprocs=2)


def _connected(rank: int, port: int, function: Callable[..., None], args: tuple[Any, ...]) -> None:
    os.environ |= {
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(port),
        "RANK": str(rank),
        "LOCAL_RANK": str(rank),
        "GROUP_RANK": "0",
        "WORLD_SIZE": "2",
        "LOCAL_WORLD_SIZE": "2",
        "TORCHELASTIC_RUN_ID": "test",  # tells Lightning that the processes exist already
    }
    torch.set_num_threads(1)
    function(rank, *args)
    # Lightning leaves that to atexit, which such a process passes over: gloo's threads may then abort it
    if torch.distributed.is_initialized():
        torch.distributed.destroy_process_group()

"""A run of several processes as one: they meet, connect, watch one another, and end together. One process knows none
of it.
"""

from __future__ import annotations

import os
import socket
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import timedelta

import psutil
import torch
from accelerate import PartialState

from llama_ft.errors import MachineFault, UserError
from llama_ft.recipe.run import Run
from llama_ft.recipe.schema import Recipe
from llama_ft.train.checks import how_to_go_on
from llama_ft.train.join import join
from llama_ft.train.peers import Peers
from llama_ft.train.stop import StopCleanly
from llama_ft.train.store import DistError, Place

EXCHANGE = timedelta(days=1)
"""How long an exchange may wait: the first process may prepare data, and the others wait for it, for hours. That a
process is lost, or stands still, is found by the watch and not by this bound."""
FAILED = ("gloo", "NCCL", "Connection closed by peer", "Connection reset by peer", "ProcessGroup")
"""What stands in the text of an exchange that failed; torch has no type of its own for those of gloo."""


@contextmanager
def joined(recipe: Recipe, run: Run, stop: StopCleanly) -> Iterator[None]:
    """Around a process's whole part in a run of several; nothing where it is alone.

    Raises as :func:`llama_ft.train.join.join`; MachineFault where an exchange fails although every process lives. When
    another process is lost this one ends inside, with status 1, after one of each machine has said so.
    """
    place = Place.here()
    if place is None:
        yield
        return
    company = join(recipe, run, place)
    # torch's own answer to a lost process is to abort all others, before anybody can say which one it was.
    os.environ.setdefault("TORCH_NCCL_ASYNC_ERROR_HANDLING", "0")
    stop.peers = peers = Peers(company, run, stop, recipe.training.stall_timeout)
    try:
        with _ending_together(peers, run):
            peers.start()
            connect(peers, recipe.training.join_timeout)
            yield
    finally:
        stop.peers = None


def connect(peers: Peers, seconds: float) -> None:
    """torch's own connections between the processes, within so many seconds."""
    headway = peers.headway
    headway.limit = seconds
    headway.move("connecting to the others")
    if len(set(peers.company.machines)) > 1 and (device := device_to(peers.place.address)):
        os.environ.setdefault("GLOO_SOCKET_IFNAME", device)
    PartialState(cpu=not torch.cuda.is_available(), timeout=EXCHANGE)
    headway.limit = 0
    headway.move("starting")


def device_to(address: str) -> str | None:
    """The network device of this machine that the machine at an address is reached by, or that has the address itself.

    gloo takes the one that this machine's name stands for, which on many systems is the loopback. None for that one.
    """
    try:
        family, _, _, _, there = socket.getaddrinfo(address, 9, type=socket.SOCK_DGRAM)[0]
        with socket.socket(family, socket.SOCK_DGRAM) as probe:
            probe.connect(there)  # sends nothing: the system chooses the way
            here = probe.getsockname()[0]
    except OSError:
        return None
    for name, addresses in psutil.net_if_addrs().items():
        if name != "lo" and any(one.address.split("%")[0] == here for one in addresses):
            return name
    return None


@contextmanager
def _ending_together(peers: Peers, run: Run) -> Iterator[None]:
    """However this process's part ends, the others learn of it; or it learns that another one's end is the reason."""
    try:
        yield
    except SystemExit as stop:
        peers.leave(stop.code if isinstance(stop.code, int) else int(stop.code is not None))
        raise
    except UserError as error:
        peers.leave(error.exit_code, str(error).splitlines()[0])
        raise
    except KeyboardInterrupt:
        peers.leave(130, "interrupted")
        raise
    except Exception as error:
        if isinstance(error, RuntimeError):
            peers.settle()  # does not come back where another process is the reason
        first = (str(error).strip() or "no message").splitlines()[0]
        peers.leave(1, f"{type(error).__name__}: {first}")
        if exchange_failed(error):
            hint = (
                "several network devices? name the one that reaches the other machines: GLOO_SOCKET_IFNAME=eth0, "
                f"NCCL_SOCKET_IFNAME=eth0; {how_to_go_on(run)}"
            )
            raise MachineFault(
                f"an exchange between the processes failed while all live: {first}",
                where=peers.company.name(peers.place.rank),
                hint=hint,
            ) from error
        raise
    else:
        peers.leave(0)


def exchange_failed(error: BaseException) -> bool:
    """Whether an exception is that of an exchange between processes."""
    text = str(error)
    return isinstance(error, DistError) or (isinstance(error, RuntimeError) and any(one in text for one in FAILED))

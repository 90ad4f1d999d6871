"""`accelerate launch` or torchrun of several processes, as `llama-ft train` runs it: without its traceback.

    python -m llama_ft.train.agents [--meet ADDRESS:PORT --machine R --of N --within SECONDS] MODULE ARGUMENTS…

Their agent ends with a traceback of its own whenever a process ends with an error, below what that process has said;
and it waits for the other machines for a quarter of an hour without a word. Here the launchers of several machines meet
first, on the port that the processes will meet on, and whoever is missing is named.
"""

from __future__ import annotations

import argparse
import logging
import os
import signal
import socket
import time
from collections.abc import Sequence
from contextlib import suppress
from datetime import timedelta
from typing import Any

import psutil

from llama_ft.errors import EXIT_FAULT, MachineFault, Problem, user_facing
from llama_ft.train.ports import answers, port_in_use, port_taken

ACCELERATE = "accelerate.commands.launch"
WHOLE = "300"
"""Seconds that the other processes have to end in, once one has: the checkpoint of a run that is stopped is written."""


def main() -> None:
    """Meets, starts, and ends with the status of the first process that failed."""
    parser = argparse.ArgumentParser(prog="llama_ft.train.agents")
    parser.add_argument("--meet")
    parser.add_argument("--machine", type=int)
    parser.add_argument("--of", type=int)
    parser.add_argument("--within", type=float)
    parser.add_argument("module")
    parser.add_argument("arguments", nargs=argparse.REMAINDER)
    said = parser.parse_args()
    os.environ.setdefault("PET_SIGNALS_TO_HANDLE", "SIGHUP,SIGQUIT")
    os.environ.setdefault("PET_SHUTDOWN_TIMEOUT", WHOLE)
    os.environ.setdefault("TORCH_CPP_LOG_LEVEL", "FATAL")
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, pass_on)
    with user_facing():
        if said.meet:
            address, _, port = said.meet.rpartition(":")
            meet(address, int(port), said.machine, said.of, said.within)
        start(said.module, said.arguments)


def pass_on(number: int, frame: Any) -> None:
    """A signal is for the processes that train; before there are any, for this one.

    torch's agent would pass it on too, and kill them half a minute later, checkpoint or not. It starts each in a
    session of its own, which Ctrl-C at the terminal does not reach; one of this session has had it already, and a
    second one means at once.
    """
    children = psutil.Process().children()
    if not children:
        raise SystemExit(128 + number)
    for one in children:
        with suppress(OSError, psutil.Error):
            if os.getsid(one.pid) != os.getsid(0):
                one.send_signal(number)


def start(module: str, arguments: list[str]) -> None:
    """Runs the launcher in this process. SystemExit with the status of the first process that failed; MachineFault
    where it could not start them."""
    from torch.distributed import DistError
    from torch.distributed.elastic.multiprocessing.errors import ChildFailedError

    for name in ("torch.distributed.elastic", "torch.distributed.run"):
        logging.getLogger(name).setLevel(logging.CRITICAL)
    try:
        if module == ACCELERATE:
            from accelerate.commands.launch import launch_command, launch_command_parser

            launch_command(launch_command_parser().parse_args(arguments))
        else:
            from torch.distributed.run import main as torchrun

            torchrun(arguments)
    except ChildFailedError as error:
        status = error.get_first_failure()[1].exitcode
        raise SystemExit(status if status > 0 else EXIT_FAULT) from None
    except (DistError, ConnectionError) as error:
        raise MachineFault(f"the launcher could not start the processes: {str(error).splitlines()[0]}") from error


def meet(address: str, port: int, machine: int, machines: int, seconds: float) -> None:
    """Returns when the launchers of all machines are here, and leaves the port free for the run itself.

    MachineFault that names the missing ones after `seconds`, on every machine that came; or that machine 0 was lost.
    """
    from torch.distributed import DistError, TCPStore

    if machine == 0 and port_in_use(port):
        raise port_taken(port)
    began = time.monotonic()
    if machine and not answers(address, port, seconds):
        raise _missing([0], {}, address, port, seconds)
    try:
        store = TCPStore(
            address, port, is_master=machine == 0, wait_for_workers=False, timeout=timedelta(seconds=seconds)
        )
    except DistError:
        raise _missing([0], {}, address, port, seconds) from None
    store.set_timeout(timedelta(seconds=5))
    store.set(f"machine/{machine}", socket.gethostname())
    everyone = range(machines)
    try:
        if machine == 0:
            while not _all(store, everyone) and time.monotonic() - began < seconds:
                time.sleep(0.1)
            store.set("verdict", " ".join(str(one) for one in everyone if not store.check([f"machine/{one}"])))
        else:
            until = time.monotonic() + seconds + 10
            while not store.check(["verdict"]) and time.monotonic() < until:
                time.sleep(0.1)
        missing = [int(one) for one in store.get("verdict").decode().split()]
        came = {one: store.get(f"machine/{one}").decode() for one in everyone if one not in missing}
        store.add("heard", 1)
        until = time.monotonic() + 5
        while machine == 0 and store.add("heard", 0) < len(came) and time.monotonic() < until:
            time.sleep(0.05)
    except DistError:
        raise MachineFault(
            f"machine 0 ({address}:{port}) was lost while the launchers met",
            where=f"machine {machine} ({socket.gethostname()})",
            hint="nothing is lost, start the same command again on every machine",
        ) from None
    if missing:
        raise _missing(missing, came, address, port, seconds)


def _all(store: Any, everyone: Sequence[int]) -> bool:
    return all(store.check([f"machine/{one}"]) for one in everyone)


def _missing(missing: list[int], came: dict[int, str], address: str, port: int, seconds: float) -> MachineFault:
    problems = [Problem(f"machine {one} did not come within {seconds:g} s") for one in missing]
    hint = (
        f"start the same command on every machine with its own --machine-rank; each must reach {address}:{port}; "
        "training.join_timeout says how long to wait; nothing is lost, start again"
    )
    here = ", ".join(f"machine {one} ({host})" for one, host in came.items()) or "nobody else that could be asked"
    return MachineFault([*problems, Problem(f"these came: {here}", None, None, hint)])


if __name__ == "__main__":
    main()

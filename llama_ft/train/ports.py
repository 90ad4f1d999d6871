"""The port that the processes of a run meet on: whether it is free, and who holds it. Needs no torch."""

from __future__ import annotations

import errno
import socket
import time

import psutil

from llama_ft.errors import MachineFault


def port_in_use(port: int) -> bool:
    """Whether something on this machine listens on a TCP port; 0, which stands for any free one, is never in use."""
    if not port:
        return False
    for family, address in ((socket.AF_INET, ""), (socket.AF_INET6, "::")):
        try:
            with socket.socket(family, socket.SOCK_STREAM) as probe:
                # As the store binds it: connections that are closing do not count.
                probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
                if family == socket.AF_INET6:
                    probe.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_V6ONLY, 1)
                probe.bind((address, port))
        except OSError as error:
            if error.errno == errno.EADDRINUSE:  # a machine without IPv6 says something else
                return True
    return False


def answers(address: str, port: int, seconds: float) -> bool:
    """Whether something takes connections at an address, asked again until it does or the time is up.

    torch's own client asks for up to three times as long as it is told to, and says each failure aloud.
    """
    until = time.monotonic() + seconds
    while True:
        try:
            with socket.create_connection((address, port), timeout=max(0.1, min(5.0, until - time.monotonic()))):
                return True
        except OSError:
            if time.monotonic() >= until:
                return False
            time.sleep(0.2)


def holder_of(port: int) -> str | None:
    """`python (process 4711)`: who listens on a TCP port of this machine; None where the system does not say."""
    try:
        connections = psutil.net_connections("tcp")
    except (psutil.Error, OSError):
        return None
    for one in connections:
        if one.status == psutil.CONN_LISTEN and one.laddr and one.laddr.port == port and one.pid:
            try:
                return f"{psutil.Process(one.pid).name()} (process {one.pid})"
            except psutil.Error:
                return f"process {one.pid}"
    return None


def port_taken(port: int) -> MachineFault:
    """What is said where the port that a run should meet on is in use."""
    holder = holder_of(port)
    return MachineFault(
        f"port {port}, on which the processes of this run should meet, is in use"
        + (f" by {holder}" if holder else " by a process that the system does not name"),
        key="main_process_port",
        hint="end that process, or give every machine another port: --main-process-port, MAIN_PROCESS_PORT or "
        "main_process_port in the launch config",
    )

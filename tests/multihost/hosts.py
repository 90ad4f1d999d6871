"""Two hosts on one machine: network namespaces with names of their own, joined by a cable (veth) that can be cut.

Needs root and a kernel that allows namespaces; nothing outside of the two is touched, and all of it goes at the end.
"""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path

import psutil

NETWORK = "10.213.77"


@dataclass
class Hosts:
    """`a` (10.213.77.1) and `b` (10.213.77.2). `name` keeps several pairs apart."""

    name: str
    started: list[subprocess.Popen[str]] = field(default_factory=list)

    def address(self, host: str) -> str:
        """Of its end of the cable."""
        return f"{NETWORK}.{'ab'.index(host) + 1}"

    def start(
        self, host: str, command: Sequence[str], log: Path, environment: Mapping[str, str]
    ) -> subprocess.Popen[str]:
        """Runs a command on a host, all it writes in a file."""
        inside = ["ip", "netns", "exec", self._space(host), "unshare", "--uts", "sh", "-c"]
        line = [*inside, f'hostname host-{host} && exec "$@"', "sh", *command]
        with log.open("w", encoding="utf-8") as file:
            process = subprocess.Popen(line, stdout=file, stderr=file, text=True, env=dict(environment))
        self.started.append(process)
        return process

    def cut(self) -> None:
        """Pulls the cable out at b: nothing is said to either side."""
        self._ip("-n", self._space("b"), "link", "set", "cable", "down")

    def mend(self) -> None:
        """Puts it back."""
        self._ip("-n", self._space("b"), "link", "set", "cable", "up")

    def set_up(self) -> None:
        """Makes both; OSError or CalledProcessError where the system does not allow it."""
        for host in "ab":
            self._ip("netns", "add", self._space(host))
        ends = ("cable", "netns", self._space("a"), "type", "veth", "peer", "name", "cable", "netns", self._space("b"))
        self._ip("link", "add", *ends)
        for host in "ab":
            inside = ("-n", self._space(host))
            self._ip(*inside, "address", "add", f"{self.address(host)}/24", "dev", "cable")
            self._ip(*inside, "link", "set", "cable", "up")
            self._ip(*inside, "link", "set", "lo", "up")

    def remove(self) -> None:
        """Ends every process that still runs in them, and removes both."""
        for process in self.started:
            with suppress(psutil.Error):
                for one in [*psutil.Process(process.pid).children(recursive=True), psutil.Process(process.pid)]:
                    with suppress(psutil.Error):
                        one.kill()
            process.wait()
        for host in "ab":
            found = subprocess.run(["ip", "netns", "pids", self._space(host)], capture_output=True, text=True)
            for pid in found.stdout.split():  # whose parents were gone already
                with suppress(ProcessLookupError):
                    os.kill(int(pid), signal.SIGKILL)
            subprocess.run(["ip", "netns", "delete", self._space(host)], capture_output=True)

    def _space(self, host: str) -> str:
        return f"{self.name}-{host}"

    def _ip(self, *arguments: str) -> None:
        subprocess.run(["ip", *arguments], check=True, capture_output=True, text=True)


def why_not() -> str | None:
    """Why there can be no second host here; None where there can."""
    if os.geteuid() != 0:
        return "network namespaces need root"
    if shutil.which("ip") is None or shutil.which("unshare") is None:
        return "network namespaces need ip (iproute2) and unshare (util-linux)"
    hosts = Hosts(f"lft{os.getpid()}t")
    try:
        hosts.set_up()
    except (OSError, subprocess.CalledProcessError) as error:
        return f"network namespaces are not allowed here: {getattr(error, 'stderr', error)}"
    finally:
        hosts.remove()
    return None


@contextmanager
def two_hosts() -> Iterator[Hosts]:
    """Both hosts, removed with all that runs on them however this ends."""
    hosts = Hosts(f"lft{os.getpid()}")
    try:
        hosts.set_up()
        yield hosts
    finally:
        hosts.remove()

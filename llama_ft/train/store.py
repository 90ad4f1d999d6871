"""Where the processes of a run meet: torch's TCPStore, reached over a connection of its own, and who this process is.

The launcher says where it lies (MASTER_ADDR, MASTER_PORT). Under torchrun and accelerate the launcher of the first
machine keeps it, and every process is a client; where the processes were started one by one, as srun and many clusters
do, rank 0 keeps it, and torch's own connections find the same one (`multi_tenant`).
"""

from __future__ import annotations

import json
import os
import socket
from dataclasses import dataclass
from datetime import timedelta
from typing import Any

from torch.distributed import DistError, DistNetworkError, TCPStore

from llama_ft.train.ports import answers, port_in_use, port_taken

ANSWER = timedelta(seconds=5)
"""How long the store may take for what is known to be there."""


@dataclass(frozen=True)
class Place:
    """This process among those of its run, as the launcher's environment says it.

    machine: a name that processes of one launcher share; agent: a launcher keeps the store.
    """

    rank: int
    world: int
    local_rank: int
    machine: str
    host: str
    address: str
    port: int
    agent: bool
    restart: str = "0"

    @classmethod
    def here(cls) -> Place | None:
        """None for a run of one process, and where the environment names no meeting place (MPI has its own)."""
        said = os.environ
        if any(name not in said for name in ("RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")):
            return None
        world = int(said["WORLD_SIZE"])
        if world < 2:
            return None
        host = socket.gethostname()
        return cls(
            rank=int(said["RANK"]),
            world=world,
            local_rank=int(said.get("LOCAL_RANK", "0")),
            machine=said.get("GROUP_RANK", host),
            host=host,
            address=said["MASTER_ADDR"],
            port=int(said["MASTER_PORT"]),
            agent=said.get("TORCHELASTIC_USE_AGENT_STORE") == "True",
            restart=said.get("TORCHELASTIC_RESTART_COUNT", "0"),
        )

    @property
    def local_world(self) -> int | None:
        """Processes of this machine, where the launcher says so."""
        said = os.environ.get("LOCAL_WORLD_SIZE")
        return int(said) if said else None


class Board:
    """Notes that processes leave for one another, JSON under short names; apart from torch's own and from earlier
    attempts of the same launcher.

    A method raises torch's DistError when the store is gone. One thread at a time: whoever waits holds the connection.
    """

    def __init__(self, place: Place, seconds: float):
        """Connects, waiting `seconds` for the store to come up. MachineFault where rank 0's port is taken, DistError
        where nothing answers."""
        self._prefix = f"llama_ft/{place.restart}"
        keeps = place.rank == 0 and not place.agent
        if keeps and port_in_use(place.port):
            raise port_taken(place.port)
        if not keeps and not answers(place.address, place.port, seconds):
            raise DistNetworkError(f"nothing answers at {place.address}:{place.port}")
        self._store = TCPStore(
            place.address,
            place.port,
            is_master=keeps,
            wait_for_workers=False,
            multi_tenant=True,
            timeout=timedelta(seconds=seconds),
        )
        self._store.set_timeout(ANSWER)

    def put(self, name: str, value: Any) -> None:
        """Leaves a note, in place of an earlier one."""
        self._store.set(self._key(name), json.dumps(value))

    def put_instead(self, name: str, old: Any, new: Any) -> Any:
        """Leaves a note in place of one that says `old`; returns what the note says then, another's where it lost."""
        return json.loads(self._store.compare_set(self._key(name), json.dumps(old), json.dumps(new)))

    def get(self, *names: str) -> list[Any]:
        """Notes that are known to be there, in one round trip."""
        return [json.loads(text) for text in self._store.multi_get([self._key(name) for name in names])]

    def has(self, name: str) -> bool:
        """Whether a note is there."""
        return self._store.check([self._key(name)])

    def add(self, name: str) -> int:
        """Adds one to a counter, which begins at 0; returns what it then holds."""
        return self._store.add(self._key(name), 1)

    def count(self, name: str) -> int:
        """What a counter holds."""
        return self._store.add(self._key(name), 0)

    def _key(self, name: str) -> str:
        return f"{self._prefix}/{name}"


__all__ = ["Board", "DistError", "Place"]

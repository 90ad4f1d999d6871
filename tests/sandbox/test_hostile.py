"""Hostile programs: none does what it wants, none is taken for right, none stays; the harness goes on."""

from __future__ import annotations

import os
import socket
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from llama_ft.errors import UserError
from llama_ft.sandbox import programs, walled
from llama_ft.sandbox.programs import Sandbox, walls
from tests.sandbox.hostile import CHEATS, DEEDS, ENDLESS, HARMLESS, RIGHT, SHARED, TESTS, WRONG
from tests.train.test_rewards import children


@pytest.fixture
def target(tmp_path) -> Iterator[dict]:
    """What the programs aim at: a folder with a file, a server that listens, and this process."""
    (tmp_path / "kept").write_text("kept")
    (tmp_path / "kept").chmod(0o600)
    with socket.create_server(("127.0.0.1", 0)) as server:
        server.setblocking(False)
        yield {"outside": tmp_path, "port": server.getsockname()[1], "parent": os.getpid(), "server": server}


def untouched(target: dict) -> None:
    folder: Path = target["outside"]
    assert [one.name for one in folder.iterdir()] == ["kept"]
    kept = folder / "kept"
    assert (kept.read_text(), kept.stat().st_mode & 0o777, kept.stat().st_uid) == ("kept", 0o600, os.getuid())
    assert kept.stat().st_mtime > 1e9
    with pytest.raises(BlockingIOError):
        target["server"].accept()


def test_hostile_programs_are_contained(target):
    """Every one fails, and the ordinary program that is run beside and after them passes."""
    before = children()
    hostile = {name: [one.format(**target) + RIGHT, TESTS] for name, one in DEEDS.items()}
    hostile |= {name: [WRONG + one.format(**target), TESTS] for name, one in CHEATS.items()}
    hostile["ordinary"] = [RIGHT, TESTS]
    with Sandbox() as sandbox:
        outcomes = dict(zip(hostile, sandbox.run(list(hostile.values()), 20.0), strict=True))
    assert len(hostile) > 30
    assert {name for name, outcome in outcomes.items() if outcome == "passed"} == {"ordinary"}
    untouched(target)
    assert children() == before
    assert not Path("/dev/shm", SHARED).exists()


def test_endless_programs_are_ended(target):
    before = children()
    endless = [*([one, TESTS] for one in ENDLESS.values()), [RIGHT, TESTS]]
    with Sandbox() as sandbox:
        outcomes = dict(zip([*ENDLESS, "ordinary"], sandbox.run(endless, 2.0), strict=True))
    assert outcomes.pop("ordinary") == "passed"
    assert set(outcomes.values()) <= {"timeout", "failed"}, outcomes  # the limit of CPU may come first
    assert children() == before


@pytest.mark.parametrize("name", HARMLESS)
def test_without_walls_the_deed_is_done(name, target):
    """Else its failing behind them shows nothing."""
    if name not in DEEDS:
        pytest.skip("another machine's numbers")
    line = [sys.executable, "-I", "-S", "-c", DEEDS[name].format(**target) + RIGHT + TESTS]
    done = subprocess.run(line, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


def test_what_no_wall_holds():
    """Said in docs/sandbox.md: the walls protect the machine, not an honest score from code that aims at its tests."""
    equal = "class Any:\n    def __eq__(self, other):\n        return True\ndef answer(n):\n    return Any()"
    with Sandbox() as sandbox:
        assert sandbox.run([[equal, TESTS]], 20.0) == ["passed"]


CONFINED = """
import ctypes, importlib.util, os, signal, socket, sys
spec = importlib.util.spec_from_file_location("walled", {walled!r})
walled = sys.modules["walled"] = importlib.util.module_from_spec(spec)
spec.loader.exec_module(walled)
kernel = ctypes.CDLL(None, use_errno=True)
kernel.prctl(38, 1, 0, 0, 0)
assert walled.confine(kernel)
deeds = dict(
    environment=lambda: open("/proc/{parent}/environ").read(),
    written=lambda: open("{outside}/made", "w"),
    longer=lambda: open("{outside}/kept", "a"),
    gone=lambda: os.unlink("{outside}/kept"),
    run=lambda: os.execv("/bin/true", ["true"]),
    connected=lambda: socket.create_connection(("127.0.0.1", {port})),
    signalled=lambda: os.kill({parent}, 0),
)
for name, deed in deeds.items():
    try:
        deed()
    except PermissionError:
        print(name)
"""


def test_landlock_alone_hides_the_parent_and_keeps_files(target):
    """Where a container forbids namespaces, it is what hides the parent's environment."""
    if not next(wall for wall in walls() if wall.name == "Landlock").stands:
        pytest.skip("this kernel has no Landlock")
    line = [sys.executable, "-c", CONFINED.format(walled=walled.__file__, **target)]
    done = subprocess.run(line, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    kept = set(done.stdout.split())
    assert kept >= {"environment", "written", "longer", "gone", "run"}
    assert kept <= {"environment", "written", "longer", "gone", "run", "connected", "signalled"}  # of newer kernels
    untouched(target)


@pytest.fixture
def unfiltered(tmp_path, monkeypatch) -> Iterator[None]:
    """A machine for which there is no filter."""
    text = Path(walled.__file__).read_text()
    child = tmp_path / "walled.py"
    child.write_text(text.replace("machine not in _MACHINES", "machine"))
    monkeypatch.setattr(programs, "_CHILD", child)
    walls.cache_clear()
    yield
    walls.cache_clear()


def test_without_a_filter_nothing_runs_unless_told(unfiltered):
    assert not walls()[0].stands
    with pytest.raises(UserError, match=r"cannot be walled in.*--unsandboxed"):
        Sandbox(hint="--unsandboxed runs it all the same")
    with Sandbox(bare=True) as sandbox:
        no_call_of_the_filter = "import os\nos.getpgid(0)"
        ran = [[RIGHT, TESTS], [WRONG, TESTS], ["import os\nos._exit(0)", TESTS], [no_call_of_the_filter]]
        assert sandbox.run(ran, 20.0) == ["passed", "failed", "failed", "passed"]

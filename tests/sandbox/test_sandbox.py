"""The sandbox: code that passes its tests is worth 1, and nothing that a program does gets out or stays behind."""

from __future__ import annotations

import os
import socket
import time
from dataclasses import replace

import pytest

from llama_ft.errors import UserError
from llama_ft.sandbox import fences, programs, walled
from llama_ft.sandbox.fences import code_in
from llama_ft.sandbox.programs import Sandbox, walls
from tests.train.test_rewards import asked, children, opened, refused

ADD = "Here it is:\n```python\ndef add(a, b):\n    return a + b\n```"
TESTS = "assert add(1, 2) == 3\nassert add(-1, 1) == 0"


def test_the_code_of_an_answer():
    assert code_in("no fence") == "no fence"
    assert code_in("a\n```python\nx = 1\n```\nb\n```py\ny = 2\n```\nc") == "y = 2"
    assert code_in("1. so:\n   ```\n   x = 1\n     y\n   ```\n") == "x = 1\n  y"
    assert code_in("```\nx = '''\n~~~\n'''\n```") == "x = '''\n~~~\n'''"
    assert code_in("````\n```\n````") == "```"
    assert code_in("```python\nx = 1") == "x = 1", "cut off"
    assert code_in("a ```b``` c") == "a ```b``` c"
    assert code_in("```python\n```") == ""
    assert fences.tests_in("```python\nassert f(1)\n```") == "assert f(1)"
    for broken, said in [("assert (", "never closed"), ("  \n", "empty"), ("x\0", "null"), ("(" * 1000, "parentheses")]:
        with pytest.raises(ValueError, match=said):
            fences.tests_in(broken)


def test_code_that_passes_its_tests_is_worth_1():
    with opened({"function": "code"}) as rewards:
        wrong = ADD.replace("+", "-")
        gone = "import sys\ndef add(a, b): return 3\nsys.exit(0)"
        killed = "import os\nos._exit(0)"
        broken = "def add(a, b:\n"
        swallows = "add = lambda a, b: a + b\n'''"  # would take the tests as its own text
        answers = [ADD, wrong, gone, killed, broken, swallows, "I cannot.", ""]
        scored = rewards.score([asked(one, TESTS) for one in answers])
        assert [one.total for one in scored] == [1, 0, 0, 0, 0, 0, 0, 0]
        with pytest.raises(UserError, match=r"rows.jsonl, row 7: reward code: .*is not Python that tests.*line 1"):
            rewards.score([asked(ADD, "It adds right.")])


LIBRARY = """
import asyncio, collections, dataclasses, datetime, decimal, functools, hashlib, itertools, json, math, random, re
import statistics, string, threading, typing, uuid

@dataclasses.dataclass
class Point:
    x: "int"

async def later():
    await asyncio.sleep(0.001)
    return Point(3)

def work():
    found = []
    thread = threading.Thread(target=lambda: found.append(asyncio.run(later())))
    thread.start()
    thread.join()
    return found, uuid.uuid4(), random.random(), datetime.datetime.now(), hashlib.sha256(b"").hexdigest()
"""
FORBIDDEN = {
    "a fork bomb": "import os\nwhile True:\n    os.fork()",
    "a fork": "import os\nos.fork()",
    "a process": "import subprocess\nsubprocess.run(['true'], check=True)",
    "another program": "import os\nos.execv('/bin/true', ['true'])",
    "ten gigabytes": "x = bytearray(10 << 30)",
    "gigabytes bit by bit": "x = []\nwhile True:\n    x.append(bytearray(1 << 26))",
    "a file": "open('{outside}/made', 'w')",
    "a file by number": "import os\nos.open('{outside}/made', os.O_CREAT | os.O_WRONLY)",
    "a longer file": "open('{outside}/kept', 'a').write('x')",
    "an emptied file": "import os\nos.truncate('{outside}/kept', 0)",
    "no file": "import os\nos.unlink('{outside}/kept')",
    "a renamed file": "import os\nos.rename('{outside}/kept', '{outside}/made')",
    "a folder": "import os\nos.mkdir('{outside}/made')",
    "a link": "import os\nos.symlink('/', '{outside}/made')",
    "rights": "import os\nos.chmod('{outside}/kept', 0o777)",
    "a temporary file": "import tempfile\ntempfile.TemporaryFile()",
    "shared memory": "import os\nos.memfd_create('x')",
    "a connection": "import socket\nsocket.create_connection(('127.0.0.1', {port}))",
    "a datagram": "import socket\nsocket.socketpair(type=socket.SOCK_DGRAM)",
    "a server": "import socket\nsocket.socket()",
    "its parent's end": "import os\nos.kill(os.getppid(), 9)",
    "its parent's limits": "import resource, os\nresource.prlimit(os.getppid(), resource.RLIMIT_CPU, (1, 1))",
    "its own limits": "import resource\nresource.setrlimit(resource.RLIMIT_AS, (-1, -1))",
    "an environment": "import os\nassert set(os.environ) - {{'LC_CTYPE', 'LD_LIBRARY_PATH'}}",
    "input": "input()",
    "a crash": "import ctypes\nctypes.string_at(0)",
    "what is installed": "import numpy",
    "a word of its own": "import os\nos.write(3, b'passed\\n')\nraise SystemExit",
    "a flood": "import os\nwhile True:\n    os.write(3, b'x' * 65536)",
}


def test_a_program_may_compute_with_the_standard_library():
    sandbox = Sandbox()
    programs = [[LIBRARY, "assert work()[0] == [Point(3)]"], ["print('x' * 10**6)\nassert open('/etc/hostname')"]]
    assert sandbox.run(programs, 20.0) == ["passed", "passed"]
    sandbox.close()


def test_nothing_that_a_program_does_gets_out(tmp_path):
    """All of it fails, and leaves nothing behind: no file, no process, no message to whoever listens."""
    (tmp_path / "kept").write_text("kept")
    (tmp_path / "kept").chmod(0o600)
    before = children()
    with socket.create_server(("127.0.0.1", 0)) as server:
        server.setblocking(False)
        port = server.getsockname()[1]
        programs = [one.format(outside=tmp_path, port=port) for one in FORBIDDEN.values()]
        sandbox = Sandbox()
        outcomes = dict(zip(FORBIDDEN, sandbox.run([[one] for one in programs], 10.0), strict=True))
        with pytest.raises(BlockingIOError):
            server.accept()
    sandbox.close()
    assert outcomes == dict.fromkeys(FORBIDDEN, "failed")
    assert [one.name for one in tmp_path.iterdir()] == ["kept"]
    assert (tmp_path / "kept").read_text() == "kept"
    assert (tmp_path / "kept").stat().st_mode & 0o777 == 0o600
    assert children() == before


def test_code_that_never_ends_is_ended():
    before = children()
    sandbox = Sandbox()
    start = time.monotonic()
    assert sandbox.run([["while True: pass"], ["import time\ntime.sleep(100)"]], 1.0) == ["timeout", "timeout"]
    assert time.monotonic() - start < 10
    sandbox.close()
    assert children() == before


def test_the_walls_that_are_said_to_stand():
    standing = {wall.name: wall.stands for wall in walls()}
    assert set(standing) == {"system calls", "Landlock", "namespaces", "limits", "interpreter"}
    assert standing["system calls"]
    environment = f"assert open('/proc/{os.getpid()}/environ').read()"
    sandbox = Sandbox()
    readable = sandbox.run([[environment]], 10.0) == ["passed"]
    sandbox.close()
    assert readable != (standing["namespaces"] or standing["Landlock"]), (
        "what this process was given, a key of an API perhaps"
    )


def test_without_walls_nothing_is_run(monkeypatch):
    bare = tuple(replace(wall, stands=False) for wall in walls())
    monkeypatch.setattr(programs, "walls", lambda: bare)
    assert "code cannot be walled in on this machine" in refused({"function": "code"})


@pytest.mark.parametrize("machine", ["x86_64", "aarch64"])
def test_the_filter_jumps_within_itself(machine):
    program = walled.system_call_filter(machine)
    assert program is not None
    instructions = [program[i : i + 8] for i in range(0, len(program), 8)]
    assert len(instructions) < 4096, "the kernel's limit"
    for place, one in enumerate(instructions):
        if one[0] in (0x15, 0x45):
            assert place + 1 + max(one[2], one[3]) < len(instructions)
    assert walled.system_call_filter("s390x") is None

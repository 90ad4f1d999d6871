"""Programs that mean harm, in three kinds. `{outside}` is a folder, `{port}` a server's, `{parent}` the harness."""

from __future__ import annotations

import platform

TESTS = "assert answer(2) == 4\nassert answer(-3) == -6"
RIGHT = "\ndef answer(n):\n    return 2 * n\n"
WRONG = "def answer(n):\n    return 0\n"

SHARED = "llama-ft-hostile"
SYSCALL = "import ctypes\nkernel = ctypes.CDLL(None, use_errno=True)\n"

# What a program does to the machine. Each goes on to RIGHT only where its deed was done, so that to pass is a breach.
DEEDS = {
    "fork bomb": "import os\nwhile True:\n    os.fork()",
    "fork by number": SYSCALL + "assert kernel.syscall(57) >= 0",
    "vfork by number": SYSCALL + "assert kernel.syscall(58) >= 0",
    "fork by x32": SYSCALL + "assert kernel.syscall(0x40000000 + 57) >= 0",
    "fork by 32-bit code": "import ctypes, mmap\nmemory = mmap.mmap(-1, 4096, prot=7)\n"
    "memory.write(bytes([0xB8, 2, 0, 0, 0, 0xCD, 0x80, 0xC3]))\n"
    "assert ctypes.CFUNCTYPE(ctypes.c_int)(ctypes.addressof(ctypes.c_char.from_buffer(memory)))() >= 0",
    "thread in a namespace": SYSCALL + "assert kernel.syscall(56, 0x10010000, 0, 0, 0, 0) >= 0",
    "setsid and daemon": "import os\nif os.fork():\n    os._exit(0)\nos.setsid()\nif os.fork():\n    os._exit(0)\n"
    "open('{outside}/made', 'w')",
    "session of its own": "import os\nos.setsid()",
    "shell": "import subprocess\nsubprocess.run(['sh', '-c', 'touch {outside}/made'], check=True)",
    "os.system": "import os\nassert os.system('touch {outside}/made') == 0",
    "posix_spawn": "import os\nos.posix_spawn('/bin/true', ['true'], {{}})",
    "process pool": "import multiprocessing\nmultiprocessing.Pool(2).map(abs, [1])",
    "threads without end": "import threading, time\nwhile True:\n    "
    "threading.Thread(target=time.sleep, args=(99,), daemon=True).start()",
    "threads on small stacks": "import ctypes, threading, time\nctypes.CDLL(None).mallopt(-8, 1)\n"
    "threading.stack_size(32768)\nfor _ in range(3000):\n"
    "    threading.Thread(target=time.sleep, args=(9,), daemon=True).start()\ntime.sleep(9)",
    "kill the parent": "import os, signal\nos.kill({parent}, signal.SIGKILL)",
    "stop the parent": "import os, signal\nos.kill({parent}, signal.SIGSTOP)",
    "kill everyone": "import os, signal\nos.kill(-1, signal.SIGKILL)",
    "kill its group": "import os, signal\nos.killpg(0, signal.SIGKILL)",
    "kill by tgkill": SYSCALL + "assert kernel.syscall(234, {parent}, {parent}, 9) == 0",
    "kill by pidfd": "import os, signal\nsignal.pidfd_send_signal(os.pidfd_open({parent}), signal.SIGKILL)",
    "stop itself": "import os, signal\nos.kill(os.getpid(), signal.SIGSTOP)",
    "ptrace the parent": SYSCALL + "assert kernel.ptrace(16, {parent}, 0, 0) == 0",
    "parent's environment": "assert b'PATH=' in open('/proc/{parent}/environ', 'rb').read()",
    "everyone's environment": "import glob\nfound = b''\nfor one in glob.glob('/proc/[0-9]*/environ'):\n    try:\n"
    "        found += open(one, 'rb').read()\n    except OSError:\n        pass\nassert b'PATH=' in found",
    "parent's memory": "open('/proc/{parent}/mem', 'rb').read(1)",
    "parent's memory by call": SYSCALL + "import struct\nhere = ctypes.create_string_buffer(8)\n"
    "one = ctypes.create_string_buffer(struct.pack('QQ', ctypes.addressof(here), 8))\n"
    "other = ctypes.create_string_buffer(struct.pack('QQ', 0x400000, 8))\n"
    "assert kernel.syscall(310, {parent}, one, 1, other, 1, 0) == 8 or ctypes.get_errno() == 14",
    "parent's open files": "import os\nassert os.readlink('/proc/{parent}/fd/0')",
    "own memory written": "open('/proc/self/mem', 'r+b')",
    "fill the disk": "with open('{outside}/made', 'wb') as file:\n    while file.tell() < 1 << 30:\n"
    "        file.write(bytes(1 << 20))",
    "fill shared memory": "from multiprocessing import shared_memory\n"
    "shared_memory.SharedMemory('llama-ft-hostile', True, 1 << 30)",
    "temporary file": "import tempfile\ntempfile.NamedTemporaryFile()",
    "file through a descriptor": "import os\nopen('/proc/self/fd/0', 'w').write('x')",
    "symlink out": "import os\nos.symlink('{outside}/kept', '{outside}/made')\nopen('{outside}/made', 'w')",
    "hard link": "import os\nos.link('{outside}/kept', '{outside}/made')",
    "file emptied by reading": "import os\nos.open('{outside}/kept', os.O_RDONLY | os.O_TRUNC)",
    "changed file": "open('{outside}/kept', 'r+').write('x')",
    "file gone": "import shutil\nshutil.rmtree('{outside}')",
    "rights of a file": "import os\nos.chmod('{outside}', 0)",
    "owner of a file": "import os\nos.chown('{outside}/kept', 1, 1)",
    "time of a file": "import os\nos.utime('{outside}/kept', (0, 0))",
    "named pipe": "import os\nos.mkfifo('{outside}/made')",
    "connection": "import socket\nsocket.create_connection(('127.0.0.1', {port}), 2)",
    "page": "import urllib.request\nurllib.request.urlopen('http://127.0.0.1:{port}/', timeout=2)",
    "datagram": "import socket\nsocket.socket(type=socket.SOCK_DGRAM).sendto(b'x', ('127.0.0.1', {port}))",
    "unix socket": "import socket\nsocket.socket(socket.AF_UNIX).bind('{outside}/made')",
    "io_uring": SYSCALL + "assert kernel.syscall(425, 1, ctypes.create_string_buffer(128)) >= 0",
    "no death with its parent": SYSCALL + "assert kernel.prctl(1, 0, 0, 0, 0) == 0",
    "filter of its own": SYSCALL + "assert kernel.prctl(22, 1, 0, 0, 0) == 0",
    "new namespaces": SYSCALL + "assert kernel.unshare(0x10000000) == 0",
    "another root": "import os\nos.chroot('/tmp')",
    "mount": SYSCALL + "assert kernel.mount(b'none', b'/mnt', b'tmpfs', 0, None) == 0",
    "another user": "import os\nos.setuid(0)",
    "limits lifted": "import resource\nresource.setrlimit(resource.RLIMIT_FSIZE, (-1, -1))",
    "clock": "import time\ntime.clock_settime(time.CLOCK_REALTIME, 0)",
    "every core": "import os\nos.sched_setaffinity(0, range(os.cpu_count()))",
    "SysV memory": SYSCALL + "assert kernel.shmget(0, 1 << 20, 0o1600) >= 0",
    "keyring": SYSCALL + "assert kernel.syscall(248, b'user', b'a', b'b', 1, -3) >= 0",
    "ten gigabytes": "x = bytearray(10 << 30)",
    "mapped memory": "import mmap\nkept = [mmap.mmap(-1, 1 << 28) for _ in range(40)]",
    "list without end": "x = []\nwhile True:\n    x.append('x' * 10**6)",
    "stack of C": "import sys\nsys.setrecursionlimit(10**9)\nx = []\nfor _ in range(10**6):\n    x = [x]\nrepr(x)",
    "null pointer": "import ctypes\nctypes.string_at(0)",
    "what trains it": "import llama_ft",
}
if platform.machine() != "x86_64":  # calls have other numbers there
    DEEDS = {name: program for name, program in DEEDS.items() if "kernel.syscall" not in program}
# Known to work where no wall stands, and to do no harm: without these the deeds might fail for reasons of their own.
HARMLESS = [
    *("fork by number", "session of its own", "shell", "os.system", "posix_spawn", "process pool", "temporary file"),
    *("parent's environment", "everyone's environment", "parent's open files", "symlink out", "hard link"),
    *("changed file", "named pipe", "connection", "datagram", "unix socket", "no death with its parent"),
    *("time of a file", "every core"),
]

# Programs with a wrong answer that want to be taken for right.
CHEATS = {
    "exit": "import sys\nsys.exit(0)",
    "exit at once": "import os\nos._exit(0)",
    "exit while tested": "import os\ndef answer(n):\n    os._exit(0)",
    "exit at exit": "import atexit, os, sys\natexit.register(os._exit, 0)\natexit.register(sys.exit)\nraise SystemExit",
    "exit by alarm": "import os, signal\nsignal.signal(signal.SIGALRM, lambda *_: os._exit(0))\n"
    "signal.setitimer(0, 0.01)\nimport time\ntime.sleep(1)",
    "exit of a thread": "import os, threading\nthreading.Thread(target=os._exit, args=(0,)).start()",
    "words printed": "print('passed')\nprint('OK')\nimport sys\nsys.exit(0)",
    "words on all descriptors": "import os\nfor one in range(64):\n"
    "    for word in (b'passed\\n', b'walled 1 1 1\\n', b'1\\n'):\n"
    "        try:\n            os.write(one, word)\n        except OSError:\n            pass\nos._exit(0)",
    "all that its callers know": "import os, sys\nfound, frame = [], sys._getframe()\nwhile frame:\n"
    "    found += frame.f_locals.values()\n    frame = frame.f_back\n"
    "for value in [*found, *(x for y in found if isinstance(y, (list, tuple)) for x in y)]:\n"
    "    said = value if isinstance(value, bytes) else str(value).encode()\n"
    "    for one in range(3, 64):\n        try:\n            os.write(one, said + b'\\n')\n"
    "        except OSError:\n            pass\nos._exit(0)",
    "all that can be read": "import os\nfound = []\nfor one in range(3, 64):\n    try:\n"
    "        found.append(os.read(one, 4096))\n    except OSError:\n        pass\n"
    "for one in range(3, 64):\n    for said in found:\n        try:\n            os.write(one, said + b'\\n')\n"
    "        except OSError:\n            pass\nos._exit(0)",
    "exec does nothing": "import builtins\nbuiltins.exec = lambda *_: None",
    "compile makes nothing": "import builtins\nkept = compile\n"
    "builtins.compile = lambda *_, **__: kept('pass', 'x', 'exec')",
    "os is another": "import os\nos.read = lambda *_: b'0'\nos.write = lambda *_: 1",
    "AssertionError is none": "import builtins\nbuiltins.AssertionError = None",
    "check is its own": "def check(candidate):\n    return None\nimport sys\nsys.modules['answer'].check = check",
    "the tests as text": "text = '''",
    "the tests as comment": "if 0: \\",
    "the tests below a return": "def f():\n    return 0\n    ",
    "no assertions": "import sys\nsys.flags = None\n__debug__ and None",
    "hook of errors": "import os, sys\nsys.excepthook = lambda *_: os._exit(0)",
    "exit in a destructor": "import os\nclass End:\n    def __del__(self):\n        os._exit(0)\nend = End()",
    "error while tested": "def answer(n):\n    raise SystemExit(0)",
}

# Programs that never end, or not in time.
ENDLESS = {
    "loop": "while True:\n    pass",
    "sleep": "import time\ntime.sleep(10**6)",
    "loop in C": "10**10**9",
    "regex": "import re\nre.match('(a+)+b', 'a' * 64)",
    "deaf loop": "import signal\nfor one in (1, 2, 15, 24, 14):\n"
    "    signal.signal(one, signal.SIG_IGN)\nwhile True:\n    pass",
    "thread that outlives": "import threading, time\n"
    "threading.Thread(target=time.sleep, args=(10**6,)).start()\nraise SystemExit",
    "output without end": "while True:\n    print('x' * 10**6)",
    "loop while tested": "def answer(n):\n    while True:\n        pass",
    "loop that swallows": "while True:\n    try:\n        while True:\n            pass\n"
    "    except BaseException:\n        pass",
}

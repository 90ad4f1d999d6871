"""Runs one program that nobody has read, behind walls. A process of its own: `python -I -S walled.py PARENT`.

Standard library alone. Its input: a line `SECONDS BARE KEY BYTES…`, the parts of the program, so many bytes each, and a
challenge. Its output: `walled …` when the walls stand, then, once every part ran to its end without an exception, KEY
xor the challenge, which is not read before, so that `sys.exit(0)` is no success and the mark to print is in no frame of
this process. BARE: 1 runs the program although the filter cannot stand. See llama_ft/sandbox/programs.py.
"""

from __future__ import annotations

import builtins
import ctypes
import io
import os
import resource
import struct
import sys
import types
from dataclasses import dataclass

MEMORY = 1 << 30
"""Bytes of address space: Python itself takes 20 MB of it."""
OPEN_FILES = 64

# What Python needs to compute, to import and to run threads: name, number on x86-64, number on 64-bit ARM (the kernel's
# own tables, asm/unistd_64.h and asm-generic/unistd.h; `-`: it has none). All that is not here is refused: sockets,
# processes, signals, every change of a file, of a limit or of another process.
_CALLS = """
read 0 63, write 1 64, close 3 57, fstat 5 80, stat 4 -, lstat 6 -, newfstatat 262 79, statx 332 291, lseek 8 62,
pread64 17 67, readv 19 65, writev 20 66, access 21 -, faccessat 269 48, faccessat2 439 439, readlink 89 -,
readlinkat 267 78, getcwd 79 17, getdents64 217 61, mmap 9 222, mprotect 10 226, munmap 11 215, mremap 25 216,
madvise 28 233, brk 12 214, rt_sigaction 13 134, rt_sigprocmask 14 135, rt_sigreturn 15 139, sigaltstack 131 132,
setitimer 38 103, getitimer 36 102, alarm 37 -, pause 34 -, dup 32 23, dup2 33 -, dup3 292 24, pipe 22 -, pipe2 293 59,
poll 7 -, ppoll 271 73, select 23 -, pselect6 270 72, epoll_create1 291 20, epoll_ctl 233 21, epoll_wait 232 -,
epoll_pwait 281 22, eventfd2 290 19, sendto 44 206, recvfrom 45 207, getsockname 51 204, getsockopt 55 209,
sched_yield 24 124, sched_getaffinity 204 123, nanosleep 35 101, clock_nanosleep 230 115, clock_gettime 228 113,
clock_getres 229 114, gettimeofday 96 169, time 201 -, times 100 153, getrusage 98 165, getpid 39 172, getppid 110 173,
gettid 186 178, getuid 102 174, geteuid 107 175, getgid 104 176, getegid 108 177, getgroups 115 158, getpgrp 111 -,
uname 63 160, sysinfo 99 179, futex 202 98, set_robust_list 273 99, get_robust_list 274 100, rseq 334 293,
set_tid_address 218 96, membarrier 324 283, getrandom 318 278, exit 60 93, exit_group 231 94, restart_syscall 219 128
"""
# Those that are let through for some arguments only; clone3, whose flags lie in memory, is said not to exist, and the C
# library takes clone.
_OPEN, _OPENAT, _IOCTL, _FCNTL = (2, None), (257, 56), (16, 29), (72, 25)
_CLONE, _CLONE3, _SOCKETPAIR = (56, 220), (435, 435), (53, 199)
_MACHINES = {"x86_64": (0, 0xC000003E), "aarch64": (1, 0xC00000B7)}
"""Column of the table, and the kernel's own name of the machine (linux/audit.h)."""

_WRITES = 0o3 | 0o100 | 0o1000  # O_WRONLY, O_RDWR, O_CREAT, O_TRUNC
_THREAD = 0x10000  # CLONE_THREAD: a thread of this process
_TERMINAL = (0x5401, 0x5413, 0x541B, 0x5421, 0x5450, 0x5451)  # TCGETS, TIOCGWINSZ, FIONREAD, FIONBIO, FIO(N)CLEX
_OWN_FILES = (0, 1, 2, 3, 4, 1030)  # F_DUPFD, F_GETFD, F_SETFD, F_GETFL, F_SETFL, F_DUPFD_CLOEXEC: none reaches others

# Instructions of a socket filter (linux/bpf_common.h) and its answers (linux/seccomp.h).
_LOAD, _AND, _EQUAL, _ANY_BIT, _RETURN = 0x20, 0x54, 0x15, 0x45, 0x06
_ALLOW, _ERROR, _KILL = 0x7FFF0000, 0x00050000, 0x80000000
_EPERM, _ENOSYS = 1, 38
_SET_SECCOMP, _NO_NEW_PRIVS, _DIE_WITH_PARENT, _FILTER, _SIGKILL = 22, 38, 1, 2, 9  # linux/prctl.h
_NEW_USER, _NEW_NETWORK, _NEW_IPC = 0x10000000, 0x40000000, 0x08000000  # linux/sched.h

# Landlock (linux/landlock.h): its calls have these numbers on every machine. What a version of it knows to forbid of
# files: 13 bits at first, among them reading files and listing folders, then moves, truncation, ioctl.
_LANDLOCK_CREATE, _LANDLOCK_ADD, _LANDLOCK_RESTRICT = 444, 445, 446
_READING = 0b1100
_BENEATH = 1
_FILE_BITS = {1: 13, 2: 14, 3: 15, 4: 15}
_NEWEST_FILE_BITS = 16
_TCP, _TCP_SINCE = 0b11, 4  # bind, connect
_SCOPES, _SCOPES_SINCE = 0b11, 6  # abstract Unix sockets, signals


@dataclass(frozen=True)
class Standing:
    """Which walls stand. `apart`: namespaces; `confined`: Landlock; `filtered`: system calls."""

    apart: bool
    confined: bool
    filtered: bool


def system_call_filter(machine: str) -> bytes | None:
    """The filter as `struct sock_filter[]`, or None for a machine whose table is not here."""
    if machine not in _MACHINES or sys.byteorder != "little":
        return None
    column, known_as = _MACHINES[machine]
    code = [(_LOAD, 0, 0, 4), (_EQUAL, 1, 0, known_as), (_RETURN, 0, 0, _KILL), (_LOAD, 0, 0, 0)]

    def rule(call: tuple[int | None, int | None], body: list[tuple[int, int, int, int]]) -> None:
        number = call[column]
        if number is not None:
            code.extend([(_EQUAL, 0, len(body), number), *body])

    def one_of(argument: int, values: tuple[int, ...]) -> list[tuple[int, int, int, int]]:
        tests = [(_EQUAL, len(values) - i, 0, value) for i, value in enumerate(values)]
        return [_argument(argument), *tests, (_RETURN, 0, 0, _ERROR | _EPERM), (_RETURN, 0, 0, _ALLOW)]

    def bits(argument: int, mask: int, *, wanted: bool) -> list[tuple[int, int, int, int]]:
        ends = [(_RETURN, 0, 0, _ERROR | _EPERM), (_RETURN, 0, 0, _ALLOW)]
        return [_argument(argument), (_ANY_BIT, int(wanted), int(not wanted), mask), *ends]

    rule(_OPEN, bits(1, _WRITES, wanted=False))
    rule(_OPENAT, bits(2, _WRITES, wanted=False))
    rule(_CLONE, bits(0, _THREAD, wanted=True))
    rule(_CLONE3, [(_RETURN, 0, 0, _ERROR | _ENOSYS)])
    rule(_IOCTL, one_of(1, _TERMINAL))
    rule(_FCNTL, one_of(1, _OWN_FILES))
    # A stream between two ends of its own, which asyncio wakes itself with; a datagram could be sent to others.
    stream = one_of(1, (1,))
    rule(_SOCKETPAIR, [stream[0], (_AND, 0, 0, 0xF), *stream[1:]])
    for entry in _CALLS.replace("\n", " ").split(","):
        number = entry.split()[1 + column]
        if number != "-":
            code.extend([(_EQUAL, 0, 1, int(number)), (_RETURN, 0, 0, _ALLOW)])
    code.append((_RETURN, 0, 0, _ERROR | _EPERM))
    return b"".join(struct.pack("HBBI", *instruction) for instruction in code)


def _argument(number: int) -> tuple[int, int, int, int]:
    """Loads the low half of an argument; those that are tested here are 32 bits wide, or flags in the low half."""
    return (_LOAD, 0, 0, 16 + 8 * number)


def put_up_walls(seconds: int, parent: int) -> Standing:
    """Cuts this process off, for good, and says which of the walls stand.

    Limits come first: the filter lets nobody change them any more.
    """
    limits = {
        resource.RLIMIT_CPU: (seconds, seconds + 1),  # a signal, then death
        resource.RLIMIT_AS: (MEMORY, MEMORY),
        resource.RLIMIT_FSIZE: (0, 0),
        resource.RLIMIT_CORE: (0, 0),
        resource.RLIMIT_NOFILE: (OPEN_FILES, OPEN_FILES),
    }
    if not sys.platform.startswith("linux"):
        return Standing(False, False, False)
    for name, (soft, hard) in limits.items():
        most = resource.getrlimit(name)[1]
        least = hard if most == resource.RLIM_INFINITY else min(hard, most)
        resource.setrlimit(name, (min(soft, least), least))
    kernel = ctypes.CDLL(None, use_errno=True)
    apart = kernel.unshare(_NEW_USER | _NEW_NETWORK | _NEW_IPC) == 0
    kernel.prctl(_DIE_WITH_PARENT, _SIGKILL, 0, 0, 0)
    if os.getppid() != parent:
        os._exit(1)  # it was gone before that was asked for
    if kernel.prctl(_NO_NEW_PRIVS, 1, 0, 0, 0) != 0:
        return Standing(apart, False, False)
    confined = confine(kernel)
    code = system_call_filter(os.uname().machine)
    if code is None:
        return Standing(apart, confined, False)
    held = ctypes.create_string_buffer(code, len(code))
    program = struct.pack("HxxxxxxP", len(code) // 8, ctypes.addressof(held))
    return Standing(apart, confined, kernel.prctl(_SET_SECCOMP, _FILTER, ctypes.c_char_p(program), 0, 0) == 0)


def confine(kernel: ctypes.CDLL) -> bool:
    """Whether Landlock leaves this process nothing but to read files, and none in /proc, where others' secrets lie.

    Folders in the root are allowed one by one: there is no rule that forbids one. It takes no_new_privs, or root.
    """
    version = kernel.syscall(_LANDLOCK_CREATE, None, ctypes.c_size_t(0), 1)
    if version < 1:
        return False
    files = (1 << _FILE_BITS.get(version, _NEWEST_FILE_BITS)) - 1
    tcp = _TCP if version >= _TCP_SINCE else 0
    scopes = _SCOPES if version >= _SCOPES_SINCE else 0
    rules = struct.pack("QQQ", files, tcp, scopes)  # an older kernel takes zeros where it knows nothing
    handle = kernel.syscall(_LANDLOCK_CREATE, rules, ctypes.c_size_t(len(rules)), 0)
    if handle < 0:
        return False
    stands = True
    with os.scandir("/") as entries:
        for entry in entries:
            if entry.name != "proc" and entry.is_dir(follow_symlinks=False):
                folder = os.open(entry.path, os.O_PATH)
                rule = struct.pack("=Qi", _READING, folder)
                stands &= kernel.syscall(_LANDLOCK_ADD, handle, _BENEATH, rule, 0) == 0
                os.close(folder)
    stands = stands and kernel.syscall(_LANDLOCK_RESTRICT, handle, 0) == 0
    os.close(handle)
    return stands


def run(parts: list[bytes]) -> None:
    """Each part in the same module, one after the other; the first may not change how the next is read or run."""
    module = types.ModuleType("answer")
    sys.modules["answer"] = module  # dataclasses look their module up
    execute, names = exec, builtins.__dict__
    for code in tuple(compile(part, "<answer>", "exec", dont_inherit=True, optimize=0) for part in parts):
        kept = dict(names)
        execute(code, module.__dict__)
        names.update(kept)


def main() -> None:
    with open(0, "rb", buffering=0, closefd=False) as source:  # the challenge stays in the pipe
        seconds, bare, key, *sizes = source.readline().split()
        parts = [_whole(source, int(size)) for size in sizes]
    held, out = os.dup(0), os.dup(1)
    silence = os.open(os.devnull, os.O_RDWR)
    for stream in (0, 1, 2):
        os.dup2(silence, stream)
    standing = put_up_walls(int(seconds), int(sys.argv[1]))
    read, write, leave, number = os.read, os.write, os._exit, int
    write(out, b"walled %d %d %d\n" % (standing.apart, standing.confined, standing.filtered))
    if standing.filtered or bare == b"1":
        run(parts)
        write(out, b"%x\n" % (number(key, 16) ^ number(read(held, 64), 16)))
        leave(0)


def _whole(source: io.RawIOBase, size: int) -> bytes:
    found = b""
    while len(found) < size:
        more = source.read(size - len(found))
        if not more:
            os._exit(1)  # the other side is gone
        found += more
    return found


if __name__ == "__main__":
    main()

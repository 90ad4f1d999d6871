"""What the process does that calls users' reward functions and matches patterns. Runs as `python -P -u called.py`.

Standard library alone, so that it is there at once. JSON lines in and out: `{"open": FILE, "name": NAME}` imports a
function, `{"call": FILE, "name": NAME, "arguments": […]}` calls it, `{"pattern": …, "text": …}` matches; each has
`seconds`. Answers are `{"value": …}` or `{"fault": …, "line": …}`. See llama_ft/train/rewards/worker.py.
"""

from __future__ import annotations

import importlib.util
import inspect
import json
import os
import re
import signal
import sys
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

GRACE = 5.0
"""Seconds after its time that a call may go on: the other side ends it sooner, unless it is gone."""

_modules: dict[str, ModuleType] = {}


class Fault(Exception):
    """What is wrong with a function, in words; `line` of the user's file, `names` that the file has instead."""

    def __init__(self, what: str, line: int | None = None, names: list[str] | None = None):
        super().__init__(what)
        self.answer = {"fault": what, "line": line, "names": names or []}


def open_function(file: str, name: str) -> Callable[..., Any]:
    """Imports the file, and looks whether the function is there and takes three arguments. Raises Fault."""
    if file not in _modules:
        _modules[file] = _import(file)
    module = _modules[file]
    function = getattr(module, name, None)
    if not callable(function):
        own = [
            one
            for one, value in vars(module).items()
            if inspect.isfunction(value) and value.__module__ == module.__name__
        ]
        what = f"{name} is no function" if hasattr(module, name) else f"it has no function '{name}'"
        raise Fault(what, names=own)
    try:
        signature = inspect.signature(function)
    except (TypeError, ValueError):  # written in C
        return function
    try:
        signature.bind([], "", None)
    except TypeError:
        line = inspect.unwrap(function).__code__.co_firstlineno if inspect.isfunction(function) else None
        raise Fault(f"{name}{signature} must take (prompt, answer, reference)", line) from None
    return function


def _import(file: str) -> ModuleType:
    # As if the file were run: what lies beside it can be imported.
    folder = str(Path(file).parent)
    if folder not in sys.path:
        sys.path.insert(0, folder)
    name = f"rewards_in_{Path(file).stem}"
    spec = importlib.util.spec_from_file_location(name, file)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module
    try:
        spec.loader.exec_module(module)
    except BaseException as error:
        raise Fault(f"it cannot be imported: {_said(error)}", _line(error, file)) from error
    return module


def call(file: str, name: str, arguments: list[Any]) -> float:
    """The function's value. Raises Fault for an exception, and for what is no number."""
    function = open_function(file, name)
    try:
        value = function(*arguments)
    except BaseException as error:
        raise Fault(f"raised {_said(error)}", _line(error, file)) from error
    if isinstance(value, (str, bytes)) or not hasattr(value, "__float__"):
        raise Fault(f"returned {_shown(value)}, which is no number")
    try:
        return float(value)
    except BaseException as error:  # an array of several
        raise Fault(f"returned {_shown(value)}, which is no number") from error


def _shown(value: Any) -> str:
    if value is None:
        return "None"
    return f"a value of type {type(value).__name__}"


def _said(error: BaseException) -> str:
    try:
        said = str(error.msg if isinstance(error, SyntaxError) else error)
    except Exception:
        said = ""
    first = next((line.strip() for line in said.splitlines() if line.strip()), "")[:300]
    return f"{type(error).__name__}: {first}" if first else type(error).__name__


def _line(error: BaseException, file: str) -> int | None:
    """The line of the user's file that was being run."""
    if isinstance(error, SyntaxError) and error.filename == file:
        return error.lineno
    line = None
    trace = error.__traceback__
    while trace is not None:
        if trace.tb_frame.f_code.co_filename == file:
            line = trace.tb_lineno
        trace = trace.tb_next
    return line


def answer(request: dict[str, Any]) -> dict[str, Any]:
    try:
        if "open" in request:
            open_function(request["open"], request["name"])
            return {"value": None}
        if "call" in request:
            return {"value": call(request["call"], request["name"], request["arguments"])}
        return {"value": float(re.fullmatch(request["pattern"], request["text"]) is not None)}
    except Fault as fault:
        return fault.answer


def main() -> None:
    # A Ctrl-C is for the process that asks; what a user's function reads and prints is not what these two speak.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    requests, answers = os.fdopen(os.dup(0), "rb"), os.dup(1)
    nothing = os.open(os.devnull, os.O_RDONLY)
    os.dup2(nothing, 0)
    os.dup2(2, 1)
    for line in requests:
        request = json.loads(line)
        # Its default action ends the process even where Python never comes to look at signals, as within a regex.
        signal.signal(signal.SIGALRM, signal.SIG_DFL)
        signal.setitimer(signal.ITIMER_REAL, request["seconds"] + GRACE)
        said = json.dumps(answer(request)).encode() + b"\n"
        signal.setitimer(signal.ITIMER_REAL, 0)
        while said:
            said = said[os.write(answers, said) :]
    # At the end of input nobody is left to ask; threads that a function started must not keep this process.
    os._exit(0)


if __name__ == "__main__":
    main()

"""The engines that answer: which are installed, which to take, how each is started and what each is asked.

None of them is ours. transformers serve: https://huggingface.co/docs/transformers/serving; llama-cpp-python's server:
https://llama-cpp-python.readthedocs.io; vLLM: https://docs.vllm.ai (`llama_ft/serve/vllm.py`).
"""

from __future__ import annotations

import importlib.util
import json
import os
import secrets
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import torch

from llama_ft.errors import Problem, UserError, did_you_mean
from llama_ft.llama.load import DTYPES, choose_compute_dtype
from llama_ft.serve.fields import Ask, Body
from llama_ft.serve.reader import Messages, Reader
from llama_ft.serve.served import Served, staged

HOST = "127.0.0.1"
KEY_VARIABLE = "LLAMA_FT_API_KEY"
_OURS = ("PYTHONPATH", "PYTHONHOME", "VIRTUAL_ENV", "__PYVENV_LAUNCHER__")
"""Variables that tell a Python where its environment is: the last is macOS's."""


@dataclass(frozen=True)
class Engine:
    """One engine. `write`: a request in its words; `view`: the messages as its template is given them.

    absent: what must be installed and is not, as a problem to show, or None. ready: a path that answers 200 once it is
    up. at_once: answers that one child works on at a time, None for as many as come. passes: fields of a request that
    it takes as they are. settles: whether an abandoned answer runs on for a token, which then draws from the random
    numbers of the next. fit: takes over from its list of models what it has memory for.
    """

    name: str
    title: str
    absent: Callable[[], Problem | None]
    ready: str
    write: Callable[[Ask, Reader, str, int], Body]
    view: Callable[[Messages], Messages] = lambda messages: messages
    at_once: int | None = 1
    passes: frozenset[str] = frozenset()
    settles: bool = False
    fit: Callable[[Launch, Sequence[Mapping[str, Any]]], None] | None = None


@dataclass(frozen=True)
class Launch:
    """One child to start: its command line, and under which ids it knows which public names. `note`: for the user.

    apart: whether it lives in a Python environment of its own, where what points into ours would break it.
    """

    line: list[str]
    port: int
    ids: Mapping[str, str]
    readers: Mapping[str, Reader]
    note: str
    key: str | None = None
    environment: Mapping[str, str] = field(default_factory=dict)
    apart: bool = False


def child_environment(launch: Launch) -> dict[str, str]:
    """The environment of a child: never the key of the gateway, and no asking of a hub for what lies on this disk."""
    left_out = {KEY_VARIABLE, *(_OURS if launch.apart else ())}
    kept = {name: value for name, value in os.environ.items() if name not in left_out}
    paths = kept.get("PYTHONPATH")
    if paths:  # it is started in another folder
        kept["PYTHONPATH"] = os.pathsep.join(str(Path(path).resolve()) for path in paths.split(os.pathsep) if path)
    quiet = {"HF_HUB_OFFLINE": "1", "HF_HUB_DISABLE_UPDATE_CHECK": "1", "PYTHONUNBUFFERED": "1"}
    return {**kept, **quiet, **launch.environment}


def lacks(title: str, extra: str, *modules: str) -> Problem | None:
    """An engine of our own environment: the problem where modules that it needs cannot be imported."""
    absent = [module for module in modules if importlib.util.find_spec(module) is None]
    if not absent:
        return None
    return Problem(f"{title} is not installed ({', '.join(absent)} missing)", hint=f"pip install 'llama-ft[{extra}]'")


def sampling(ask: Ask, reader: Reader) -> tuple[float, float]:
    """Temperature (0: greedy) and top-p of an answer: what was asked, else what generation_config.json says.

    Its temperature counts only where it says `do_sample`; an export says greedy. top_p alone asks for sampling.
    """
    stated = reader.settings
    default = float(stated.get("temperature") or 1.0) if stated.get("do_sample") else 0.0
    if ask.temperature is None and ask.top_p is not None and ask.top_p < 1:
        default = default or 1.0
    top_p = ask.top_p if ask.top_p is not None else float(stated.get("top_p") or 1.0)
    return (default if ask.temperature is None else ask.temperature), top_p


def seed_of(ask: Ask) -> int:
    """The seed asked for, or a new one: two answers without a seed differ, and none depends on who asked before."""
    return secrets.randbits(32) if ask.seed is None else ask.seed


# transformers serve


def _for_transformers(ask: Ask, reader: Reader, model: str, room: int) -> Body:
    """Everything goes by a generation_config of its own: a temperature alone would not switch sampling on there.

    Stop strings are left to the gateway: this engine would keep them in the answer.
    """
    temperature, top_p = sampling(ask, reader)
    settings: Body = {
        "max_new_tokens": room,
        "eos_token_id": reader.stop,
        "pad_token_id": reader.tokenizer.pad_token_id,
    }
    if temperature < 1e-5:  # as in llama_ft.serve.generate
        settings["do_sample"] = False
    else:
        settings |= {"do_sample": True, "temperature": temperature, "top_p": top_p, "top_k": 0}
    body: Body = {"model": model, "stream": True, "seed": seed_of(ask), "generation_config": json.dumps(settings)}
    return (
        body
        | ({"messages": openai_messages(ask.messages)} if ask.prompt is None else {"prompt": ask.prompt})
        | ({"tools": ask.tools} if ask.tools else {})
    )


def _seen_by_transformers(messages: Messages) -> Messages:
    """What it hands to the template: role, content (none beside tool calls), calls and their ids."""
    kept = ("role", "tool_calls", "tool_call_id")
    return [
        {
            **{key: message[key] for key in kept if key in message},
            "content": "" if message.get("tool_calls") else message["content"],
        }
        for message in messages
    ]


def openai_messages(messages: Messages) -> Messages:
    """Messages with the arguments of calls as JSON text, as OpenAI's API has them."""
    written = []
    for message in messages:
        calls = []
        for call in message.get("tool_calls", []):
            arguments = json.dumps(call["function"]["arguments"], ensure_ascii=False)
            calls.append({**call, "function": {**call["function"], "arguments": arguments}})
        written.append({**message, "tool_calls": calls} if calls else message)
    return written


def launch_transformers(models: Sequence[Served], stage: Path, ports: Callable[[], int]) -> list[Launch]:
    """One child for each model. It is opened through a link in `stage`, so that no path of the machine is told."""
    device = device_type()
    launches = []
    for number, served in enumerate(models):
        folder = whole(served, "transformers serve")
        name, port = f"m{number}", ports()
        place = staged(served, stage / name)
        shown = compute_type(served.dtype, device)
        line = [sys.executable, "-m", "transformers.cli.transformers", "serve", name, "--host", HOST]
        line += ["--port", str(port), "--device", "auto" if device == "cuda" else "cpu", "--dtype", shown]
        reader = Reader(place, folder, _seen_by_transformers)
        launches.append(Launch(line, port, {served.name: name}, {served.name: reader}, f"{shown} on {device}"))
    return launches


def device_type() -> str:
    """`cuda` where there is a GPU, else `cpu`."""
    return "cuda" if torch.cuda.is_available() else "cpu"


def compute_type(stored: str, device: str) -> str:
    """The name of the type to compute in, for weights stored in `stored`."""
    dtype = choose_compute_dtype(DTYPES.get(stored, torch.float32), torch.device(device))
    return str(dtype).removeprefix("torch.")


def whole(served: Served, engine: str) -> Path:
    """The model's folder. UserError where a run has none."""
    if served.folder is None:
        what = f"{served.name} has no merged/, which {engine} needs"
        raise UserError(what, hint=f"llama-ft export {served.run.path}" if served.run else "use --engine llama-cpp")
    return served.folder


# llama.cpp


def _for_llama_cpp(ask: Ask, reader: Reader, model: str, room: int) -> Body:
    temperature, top_p = sampling(ask, reader)
    body: Body = {"model": model, "stream": True, "max_tokens": room, "temperature": temperature, "top_p": top_p}
    # Its own defaults are top_k 40, min_p 0.05 and a repetition penalty: none was asked for.
    body |= {
        "top_k": 0,
        "min_p": 0.0,
        "repeat_penalty": 1.0,
        "seed": seed_of(ask) % 2**31,
        "stop": ask.stop,
        **ask.passed,
    }
    body |= {"messages": openai_messages(ask.messages)} if ask.prompt is None else {"prompt": ask.prompt}
    return body | ({"tools": ask.tools} if ask.tools else {})


def launch_llama_cpp(models: Sequence[Served], stage: Path, ports: Callable[[], int]) -> list[Launch]:
    """One child for each GGUF file; its key is a word that is made here and told by the environment alone."""
    launches = []
    for number, served in enumerate(models):
        if served.gguf is None:
            hint = f"llama-ft export {served.run.path} --gguf q8_0" if served.run else "name a .gguf file"
            raise UserError(f"{served.name} has no GGUF file, which llama.cpp needs", hint=hint)
        name, port, key = f"m{number}", ports(), secrets.token_urlsafe(24)
        (stage / f"{name}.gguf").symlink_to(served.gguf)
        words = served.words if served.folder or served.run else _words_of(served.gguf)
        reader = Reader(words, served.folder or words)
        layers = "-1" if torch.cuda.is_available() else "0"
        line = [sys.executable, "-m", "llama_cpp.server", "--model", f"{name}.gguf", "--model_alias", name]
        line += ["--host", HOST, "--port", str(port), "--n_ctx", str(reader.context), "--n_gpu_layers", layers]
        line += ["--logits_all", "false", "--interrupt_requests", "false", "--verbose", "false"]
        note = served.gguf.name
        environment = {"API_KEY": key}
        launches.append(Launch(line, port, {served.name: name}, {served.name: reader}, note, key, environment))
    return launches


def _words_of(file: Path) -> Path:
    """Tokenizer and config of a bare GGUF file, read out of it once."""
    from llama_ft.llama.base import locate_base

    return locate_base(str(file), weights=False)


TRANSFORMERS = Engine(
    "transformers", "transformers serve",
    partial(lacks, "transformers serve", "serve", "fastapi", "uvicorn", "openai"),
    "/health", _for_transformers, _seen_by_transformers, settles=True,
)  # fmt: skip
_LLAMA_CPP_NEEDS = ("llama_cpp", "fastapi", "sse_starlette", "starlette_context", "pydantic_settings")
LLAMA_CPP = Engine(
    "llama-cpp", "llama.cpp", partial(lacks, "llama.cpp", "gguf", *_LLAMA_CPP_NEEDS),
    "/v1/models", _for_llama_cpp, passes=frozenset({"frequency_penalty", "presence_penalty", "logit_bias"}),
)  # fmt: skip


def choose(name: str, engines: Mapping[str, Engine], models: Sequence[Served]) -> Engine:
    """The engine asked for, or with `auto` the first that fits: vLLM on a GPU, transformers serve, llama.cpp.

    UserError for an unknown name (with the nearest), or where what it needs is not installed.
    """
    if name != "auto":
        if name not in engines:
            hint = did_you_mean(name, ["auto", *engines], kind="engines")
            raise UserError(f"there is no engine '{name}'", key="--engine", hint=hint)
        order = [name]
    elif all(served.folder is None and served.gguf is not None for served in models):
        order = ["llama-cpp"]
    else:
        order = ["transformers", "llama-cpp"]
        if torch.cuda.is_available() and engines["vllm"].absent() is None:
            order.insert(0, "vllm")
    absent: list[Problem] = []
    for candidate in order:
        problem = engines[candidate].absent()
        if problem is None:
            return engines[candidate]
        absent.append(problem)
    raise UserError(absent)

"""vLLM, a program of its own environment: merged models, or several adapters on one base, each under its own name.

Its releases want other torch, transformers and fastapi than ours, so it is never imported here: `vllm serve` is started
as a command. The flags and fields are those of 0.32 and 0.33 (vllm/entrypoints, vllm/config).
"""

from __future__ import annotations

import json
import os
import secrets
import shutil
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import psutil

from llama_ft.errors import Problem, UserError
from llama_ft.export.trained import base_folder
from llama_ft.recipe.run import Run
from llama_ft.serve.engines import (
    HOST,
    Engine,
    Launch,
    compute_type,
    device_type,
    openai_messages,
    sampling,
    seed_of,
    whole,
)
from llama_ft.serve.fields import Ask, Body
from llama_ft.serve.reader import Messages, Reader
from llama_ft.serve.served import Served

VARIABLE = "LLAMA_FT_VLLM"
TRIED = "0.32.0"
RANKS = (8, 16, 32, 64, 128, 256, 320, 512)
"""What --max-lora-rank takes, from 8 on."""
BASE = "base"
_HINT = "serve it alone, after llama-ft export, or use --engine transformers"
_KV_SPACE = "VLLM_CPU_KVCACHE_SPACE"
_BILLING = "x-anthropic-billing-header"


def find_command() -> Path | None:
    """The `vllm` command that $LLAMA_FT_VLLM names, else the one on PATH, or None; as an absolute path.

    UserError where the variable names something that cannot be run, or a Python.
    """
    named = os.environ.get(VARIABLE)
    found = shutil.which(os.path.expanduser(named or "vllm"))  # noqa: PTH111 (which takes a bare name too)
    if not named:
        return Path(found).absolute() if found else None
    hint = f"give the path of the file `vllm` in the bin folder of its environment: export {VARIABLE}=~/vllm/bin/vllm"
    if found is None:
        raise UserError(f"'{named}' is no command that can be run", where=f"${VARIABLE}", hint=hint)
    if Path(found).name.startswith("python"):
        raise UserError(f"'{named}' is a Python, and not its `vllm` command", where=f"${VARIABLE}", hint=hint)
    return Path(found).absolute()


def _absent() -> Problem | None:
    if find_command() is not None:
        return None
    install = f"python3 -m venv ~/vllm && ~/vllm/bin/pip install vllm=={TRIED} && export {VARIABLE}=~/vllm/bin/vllm"
    why = "in an environment of its own, since it wants other versions of torch and transformers than llama-ft"
    what = f"vLLM is not installed: ${VARIABLE} is not set and there is no `vllm` on PATH"
    return Problem(what, hint=f"install it {why}: {install} (without a GPU: see docs/serve.md)")


class VllmReader(Reader):
    """Reads a conversation as vLLM's template is given it."""

    def __init__(self, words: Path, config: Path):
        """words: folder of the tokenizer; config: folder of config.json."""
        super().__init__(words, config, _seen_by_vllm)

    def _as_engine(self, messages: Messages, tools: list[dict[str, Any]] | None) -> list[int]:
        return super()._as_engine(messages, tools and [_seen_tool(tool) for tool in tools])


def _with_ids(messages: Messages) -> Messages:
    """Every call of a tool has an id, which vLLM demands and OpenAI's clients send; templates rarely write them."""
    written, calls = [], 0
    for message in messages:
        named = []
        for call in message.get("tool_calls", []):
            named.append({"id": f"call_{calls}", **call})
            calls += 1
        written.append({**message, "tool_calls": named} if named else message)
    return written


def _seen_by_vllm(messages: Messages) -> Messages:
    """What the template is given (vllm/renderers/chat_utils.py): ids of calls with results alone; no billing lines."""
    seen = []
    for message in _with_ids(messages):
        kept = ["role", "content", "name"]
        kept += {"assistant": ["tool_calls"], "tool": ["tool_call_id"]}.get(message["role"], [])
        one = {key: message[key] for key in kept if key in message}
        if message["role"] == "system" and message["content"].startswith(_BILLING):
            one["content"] = message["content"].partition("\n")[2]
        seen.append(one)
    return seen


def _seen_tool(tool: dict[str, Any]) -> dict[str, Any]:
    """Its description of a tool (`FunctionDefinition`): these keys in this order, null where one is not named."""
    function = tool["function"]
    named = {key: function.get(key) for key in ("name", "description", "parameters")}
    named |= {key: function[key] for key in ("strict", "defer_loading") if function.get(key) is not None}
    return {"type": tool.get("type", "function"), "function": named}


def _write(ask: Ask, reader: Reader, model: str, room: int) -> Body:
    temperature, top_p = sampling(ask, reader)
    body: Body = {"model": model, "stream": True, "stream_options": {"include_usage": True}, "max_tokens": room}
    body |= {"temperature": temperature, "top_p": top_p, "top_k": 0, "seed": seed_of(ask), **ask.passed}
    body |= {"stop": ask.stop, "stop_token_ids": reader.stop}
    if ask.prompt is not None:
        return body | {"prompt": ask.prompt}
    return (
        body
        | {"messages": openai_messages(_with_ids(ask.messages))}
        | ({"tools": ask.tools, "tool_choice": "none"} if ask.tools else {})  # shown to the model; its calls stay text
    )


def _fit(launch: Launch, listed: Sequence[Mapping[str, Any]]) -> None:
    """Readers take over the tokens that vLLM has memory for, where a model could read more. listed: its /v1/models."""
    room = min(model["max_model_len"] for model in listed if model.get("max_model_len"))  # adapters say none
    for reader in launch.readers.values():
        reader.context = min(reader.context, room)


VLLM = Engine(
    "vllm", "vLLM", _absent, "/health", _write, at_once=None, fit=_fit,
    passes=frozenset({"frequency_penalty", "presence_penalty", "logit_bias", "response_format"}),
)  # fmt: skip


def launch_vllm(models: Sequence[Served], stage: Path, ports: Callable[[], int]) -> list[Launch]:
    """One child: a merged model, or one base with the adapters of several runs (`--lora-modules`).

    UserError, with every reason, where several models cannot share one engine: two engines do not fit one GPU, since
    vLLM takes most of its memory at the start.
    """
    device = device_type()
    if len(models) == 1 and (folder := models[0].folder) is not None:
        name, dtype = models[0].name, compute_type(models[0].dtype, device)
        reader = VllmReader(models[0].words, folder)
        return [_launch(folder, ports(), device, dtype, {name: "m0"}, {name: reader}, "merged")]
    if len(models) == 1 and models[0].run is None:
        whole(models[0], "vLLM")  # a GGUF file
    runs = {served.name: run for served in models if (run := served.base_of or served.run) is not None}
    tuned = {served.name: runs[served.name] for served in models if served.base_of is None and served.name in runs}
    _check_shareable(models, runs)
    base = base_folder(next(iter(runs.values())))
    readers: dict[str, Reader] = {name: VllmReader(run.adapter, base) for name, run in tuned.items()}
    _check_alike(readers)
    ids = {name: f"m{i}" for i, name in enumerate(tuned)}
    first = next(iter(tuned))
    for name in runs.keys() - tuned.keys():  # the base, asked in the words of its runs
        ids[name], readers[name] = BASE, readers[first]
    stored = {run.recipe.model.dtype for run in runs.values()}
    dtype = compute_type(stored.pop() if len(stored) == 1 else "float32", device)
    rank = max(run.recipe.adapter.r for run in tuned.values())
    # Until 0.33 it answers on a CPU with its last place's adapter (index −1) where the base is asked beside an adapter
    # (vllm-project/vllm#48421). One place more stays empty: zeros.
    places = len(tuned) + (device == "cpu")
    more = ["--tokenizer", str(_words(tuned[first], stage)), "--enable-lora", "--max-loras", str(places)]
    more += ["--max-lora-rank", str(next(one for one in RANKS if one >= rank)), "--lora-modules"]
    more += [json.dumps({"name": ids[name], "path": str(run.adapter)}) for name, run in tuned.items()]
    note = f"{len(tuned)} {'adapter' if len(tuned) == 1 else 'adapters'} on one base"
    return [_launch(base, ports(), device, dtype, ids, readers, note, more)]


def _launch(
    folder: Path,
    port: int,
    device: str,
    dtype: str,
    ids: dict[str, str],
    readers: dict[str, Reader],
    note: str,
    more: Sequence[str] = (),
) -> Launch:
    """The command line: defaults of the model's folder and of vLLM that would change an answer are ruled out."""
    command, key = find_command(), secrets.token_urlsafe(24)
    if command is None:
        raise UserError([problem for problem in [_absent()] if problem])
    line = [str(command), "serve", str(folder), "--served-model-name", BASE if more else "m0"]
    line += ["--host", HOST, "--port", str(port), "--dtype", dtype, "--max-model-len", "auto"]
    line += ["--load-format", "safetensors", "--generation-config", "vllm", "--chat-template-content-format", "string"]
    environment = {"VLLM_API_KEY": key, "VLLM_NO_USAGE_STATS": "1", "DO_NOT_TRACK": "1", "VLLM_HOST_IP": HOST}
    # Its other commands (ninja) are looked for there.
    environment["PATH"] = os.pathsep.join([str(command.resolve().parent), os.environ.get("PATH", os.defpath)])
    if device == "cpu":
        line += ["--enforce-eager"]  # compiling takes minutes there
        # By itself it asks for 92 % of the machine's memory, and ends where others have some of it.
        free = psutil.virtual_memory().available // (4 * 2**30)
        environment[_KV_SPACE] = os.environ.get(_KV_SPACE) or str(max(1, free))
    note = f"{dtype} on {device}, {note}"
    return Launch([*line, *more], port, ids, readers, note, key, environment, apart=True)


def _words(run: Run, stage: Path) -> Path:
    """A folder of what the run's tokenizer and template are read from, and of nothing else."""
    folder = stage / "words"
    folder.mkdir()
    for file in run.adapter.iterdir():
        if not file.name.startswith("adapter_") and file.suffix in (".json", ".jinja", ".model"):
            (folder / file.name).symlink_to(file.resolve())
    return folder


def _check_shareable(models: Sequence[Served], runs: Mapping[str, Run]) -> None:
    problems = [
        Problem(f"{served.name} is no run with an adapter: vLLM cannot serve it beside others", hint=_HINT)
        for served in models
        if served.name not in runs
    ]
    for run in {run.path: run for run in runs.values()}.values():
        reason = _no_adapter(run)
        if reason:
            problems.append(Problem(f"{run.path.name} cannot be served as an adapter: {reason}", hint=_HINT))
    if not problems and len({base_folder(run).resolve() for run in runs.values()}) > 1:
        problems.append(Problem("the runs were tuned from different bases: vLLM serves one", hint=_HINT))
    if problems:
        raise UserError(problems)


def _check_alike(readers: Mapping[str, Reader]) -> None:
    tokenizers = [reader.tokenizer for reader in readers.values()]
    if len({str(one.chat_template) for one in tokenizers}) > 1:
        raise UserError("the runs have different templates: vLLM has one for all", hint=_HINT)
    first = tokenizers[0]
    for one in tokenizers[1:]:
        if one.get_vocab() != first.get_vocab() or one.special_tokens_map != first.special_tokens_map:
            raise UserError("the runs have different tokenizers: vLLM has one for all", hint=_HINT)


def _no_adapter(run: Run) -> str | None:
    """Why vLLM cannot lay a run's adapter on its base, or None."""
    recipe, file = run.recipe, run.adapter / "adapter_config.json"
    if not file.is_file():
        return "it has no adapter/"
    if recipe.adapter.method != "lora":
        return f"it was trained with {recipe.adapter.method}, so its weights are those of merged/ alone"
    if recipe.model.rope_scaling is not None:
        return "its recipe scales RoPE, and the base's config does not"
    config = json.loads(file.read_text(encoding="utf-8"))
    if config.get("use_dora") or config.get("modules_to_save"):
        return "it is DoRA, or trained tokens or layers whole"
    if recipe.adapter.r > RANKS[-1]:
        return f"its rank is above {RANKS[-1]}"
    return None

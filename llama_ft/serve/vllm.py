"""vLLM, for a GPU: merged models, or several adapters on one base, each under its own name."""

from __future__ import annotations

import json
import secrets
import sys
from collections.abc import Callable, Sequence
from pathlib import Path

from llama_ft.errors import Problem, UserError
from llama_ft.export.trained import base_folder
from llama_ft.recipe.run import Run
from llama_ft.serve.engines import HOST, Engine, Launch, openai_messages, sampling, seed_of, whole
from llama_ft.serve.fields import Ask, Body
from llama_ft.serve.reader import Reader
from llama_ft.serve.served import Served

RANKS = (8, 16, 32, 64, 128, 256, 512)
"""What --max-lora-rank takes."""


def _write(ask: Ask, reader: Reader, model: str, room: int) -> Body:
    temperature, top_p = sampling(ask, reader)
    body: Body = {"model": model, "stream": True, "stream_options": {"include_usage": True}, "max_tokens": room}
    body |= {"temperature": temperature, "top_p": top_p, "top_k": 0, "seed": seed_of(ask), **ask.passed}
    body |= {"stop": ask.stop, "stop_token_ids": reader.stop}
    if ask.prompt is not None:
        return body | {"prompt": ask.prompt}
    return (
        body
        | {"messages": openai_messages(ask.messages)}
        | ({"tools": ask.tools, "tool_choice": "none"} if ask.tools else {})
    )


VLLM = Engine(
    "vllm", "vLLM", ("vllm",), "vllm", "/health", _write, at_once=None,
    passes=frozenset({"frequency_penalty", "presence_penalty", "logit_bias", "response_format"}),
)  # fmt: skip


def launch_vllm(models: Sequence[Served], stage: Path, ports: Callable[[], int]) -> list[Launch]:
    """One child: a merged model, or one base with the adapters of several runs (`--lora-modules`).

    UserError, with every reason, where several models cannot share one engine: two engines do not fit one GPU, since
    vLLM takes most of its memory at the start.
    """
    if len(models) == 1 and models[0].folder is not None:
        served, port, key = models[0], ports(), secrets.token_urlsafe(24)
        folder = whole(served, "vLLM")
        line = [*_line(folder, port), "--served-model-name", served.name]
        reader = Reader(served.words, folder)
        return [_launch(line, port, key, [served], {served.name: reader}, f"{served.dtype}, merged")]
    runs = [run for served in models if (run := served.base_of or served.run) is not None]
    _check_shareable(models, runs)
    base, port, key = base_folder(runs[0]), ports(), secrets.token_urlsafe(24)
    tuned = [served for served in models if served.base_of is None]
    plain = [served.name for served in models if served.base_of is not None] or [f"{tuned[0].name}-base"]
    rank = max(served.run.recipe.adapter.r for served in tuned if served.run)
    template = stage / "chat_template.jinja"
    readers = {served.name: Reader(served.run.adapter, base) for served in tuned if served.run}
    template.write_text(str(readers[tuned[0].name].tokenizer.chat_template), encoding="utf-8")
    line = [*_line(base, port), "--served-model-name", plain[0], "--chat-template", template.name, "--enable-lora"]
    line += ["--max-loras", str(len(tuned)), "--max-lora-rank", str(next(one for one in RANKS if one >= rank))]
    line += ["--lora-modules", *(f"{served.name}={served.run.adapter}" for served in tuned if served.run)]
    readers |= {served.name: readers[tuned[0].name] for served in models if served.base_of is not None}
    return [_launch(line, port, key, models, readers, f"{len(tuned)} adapters on one base")]


def _line(folder: Path, port: int) -> list[str]:
    server = [sys.executable, "-m", "vllm.entrypoints.openai.api_server", "--model", str(folder)]
    return [*server, "--host", HOST, "--port", str(port)]


def _launch(
    line: list[str], port: int, key: str, models: Sequence[Served], readers: dict[str, Reader], note: str
) -> Launch:
    quiet = {"VLLM_API_KEY": key, "VLLM_NO_USAGE_STATS": "1", "DO_NOT_TRACK": "1"}
    return Launch(line, port, {served.name: served.name for served in models}, readers, note, key, quiet)


def _check_shareable(models: Sequence[Served], runs: Sequence[Run]) -> None:
    hint = "serve it alone, after llama-ft export, or use --engine transformers"
    problems = [
        Problem(f"{served.name} is no run with an adapter: vLLM cannot serve it beside others", hint=hint)
        for served in models
        if (served.base_of or served.run) is None
    ]
    for run in runs:
        reason = _no_adapter(run)
        if reason:
            problems.append(Problem(f"{run.path.name} cannot be served as an adapter: {reason}", hint=hint))
    if not problems:
        bases = {str(base_folder(run).resolve()) for run in runs}
        templates = {Reader(run.adapter, base_folder(run)).tokenizer.chat_template for run in runs}
        if len(bases) > 1:
            problems.append(Problem("the runs were tuned from different bases: vLLM serves one", hint=hint))
        if len(templates) > 1:
            problems.append(Problem("the runs have different templates: vLLM has one for all", hint=hint))
    if problems:
        raise UserError(problems)


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

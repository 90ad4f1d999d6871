"""Who is there to talk to: a run, a model folder or a base's name, opened as our LLaMA with the right template."""

from __future__ import annotations

import json
import warnings
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from transformers.utils import logging

from llama_ft.data.render import Renderer
from llama_ft.data.template import Template
from llama_ft.errors import UserError, did_you_mean
from llama_ft.llama import smollm2
from llama_ft.llama.base import locate_base
from llama_ft.llama.context import context_length
from llama_ft.llama.init import resize_embeddings
from llama_ft.llama.load import DTYPES, choose_compute_dtype, load_model
from llama_ft.llama.model import LlamaForCausalLM
from llama_ft.llama.projections import project_each
from llama_ft.llama.reward import is_reward_model
from llama_ft.recipe.run import Run
from llama_ft.tokenizer.load import load_tokenizer


@dataclass(frozen=True)
class Opened:
    """A model ready to answer. `stop`: ids that end an answer; `context`: tokens it can hold; `notices`: for the user.

    `system` is the system prompt that all of a run's rows were trained with, if they have one in common.
    """

    model: LlamaForCausalLM
    renderer: Renderer
    stop: frozenset[int]
    context: int
    system: str | None
    notices: tuple[str, ...]


def open_source(source: str) -> Opened:
    """Opens a run folder (merged, else base + adapter), a model folder or file, `smollm2-135m` or a hub id.

    Raises UserError when there is no such thing, a run has nothing trained yet, or it is a reward model.
    """
    logging.disable_progress_bar()
    path = Path(source).expanduser()
    run = find_run(source)
    if run is not None:
        if run.recipe.training.objective == "reward":
            raise _scores_only(run.path)
        return _open_run(run)
    if path.exists() or source == smollm2.NAME or not _is_path(source):
        if (path / "config.json").is_file() and is_reward_model(path):
            raise _scores_only(path)
        return _open_folder(locate_base(source))
    raise UserError(f"there is no run and no model '{source}'", hint=did_you_mean(source, _known(), kind="sources"))


def _scores_only(path: Path) -> UserError:
    what = f"{path} is a reward model: it scores the answers of others and writes none"
    hint = f"a recipe of objective rejection_sampling, rloo or grpo names it: rewards: [{{model: {path}}}]"
    return UserError(what, hint=hint)


def find_run(source: str) -> Run | None:
    """The run that a source names, by its folder or as a name below runs/; None where it names a model."""
    path = Path(source).expanduser()
    for candidate in (path, Path("runs", path)):
        # A base's own name wins over a run called the same.
        if (candidate / "recipe.yaml").is_file() and not (source == smollm2.NAME and candidate != path):
            return Run.open(candidate)
    return None


def _is_path(source: str) -> bool:
    """Whether a name that does not exist was meant as a place on this disk and not as a hub id (owner/name)."""
    return source.count("/") != 1 or source.startswith((".", "~", "/", "runs/")) or Path(source).parent.is_dir()


def _known() -> list[str]:
    return [smollm2.NAME, *(str(found.parent) for found in sorted(Path("runs").glob("*/recipe.yaml")))]


def _open_run(run: Run) -> Opened:
    systems = {entry.system for entry in run.recipe.data}
    system = systems.pop() if len(systems) == 1 else None
    if (run.merged / "config.json").is_file():
        return _open_folder(run.merged, system)
    if not (run.adapter / "adapter_model.safetensors").is_file():
        raise UserError(f"{run.path} holds no merged/ and no adapter/ to talk to yet", hint="finish its training")
    from peft import PeftModel

    from llama_ft.export.trained import base_folder

    dtype = DTYPES[run.recipe.model.dtype]
    device = _device()
    compute = choose_compute_dtype(dtype, device)
    recipe = run.recipe
    model: Any = load_model(
        base_folder(run),
        dtype,
        compute_dtype=compute,
        rope_scaling=recipe.model.rope_scaling,
        max_length=recipe.sequence.max_length,
    )
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)  # what PEFT still calls in transformers is theirs to settle
        PeftModel.from_pretrained(model, str(run.adapter))  # puts its factors into `model` itself
    refused = (run.path / "merged.rejected").is_dir()
    why = "its merged model was refused (see export.json)" if refused else "no merged/ yet (llama-ft export makes it)"
    return _opened(model.to(device), run.adapter, system, (f"{why}: talking to base + adapter",))


def open_base(run: Run, tuned: Opened) -> Opened:
    """What a run started from, to talk to beside it: with its own chat template, or with the run's if it has none.

    Then tokens that the run added get the rows that its training began with. Raises UserError when the base is gone,
    or was made by the run and its weights never written (full tuning of new weights).
    """
    from llama_ft.export.trained import base_folder

    folder = base_folder(run)
    if not any(folder.glob("*.safetensors")):
        raise UserError(f"{run.path} was trained from new weights: there is no base to compare it with")
    if load_tokenizer(folder).chat_template:
        return _open_folder(folder)
    recipe, device = run.recipe, _device()
    dtype = DTYPES[recipe.model.dtype]
    model: Any = load_model(
        folder,
        dtype,
        compute_dtype=choose_compute_dtype(dtype, device),
        rope_scaling=recipe.model.rope_scaling,
        max_length=recipe.sequence.max_length,
    )
    if tuned.model.config.vocab_size > model.config.vocab_size:
        resize_embeddings(model, tuned.model.config.vocab_size)
    model.eval()
    model.model.set_project(project_each)
    notices = ("the base has no chat template: it is asked in the run's",)
    return Opened(model.to(device), tuned.renderer, tuned.stop, context_length(model.config), None, notices)


def _open_folder(folder: Path, system: str | None = None) -> Opened:
    config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    stated = config.get("dtype") or config.get("torch_dtype") or "float32"
    dtype = DTYPES.get(stated, torch.float32)
    device = _device()
    model: Any = load_model(folder, dtype, compute_dtype=choose_compute_dtype(dtype, device))
    return _opened(model.to(device), folder, system, ())


def _opened(model: LlamaForCausalLM, folder: Path, system: str | None, notices: tuple[str, ...]) -> Opened:
    tokenizer = load_tokenizer(folder)
    if not tokenizer.chat_template:
        raise UserError(
            f"{folder} has no chat template: it continues text and does not converse",
            hint="tune it first; a run's template travels with it",
        )
    renderer = Renderer(Template.load("base", tokenizer), tokenizer)
    ends = getattr(model.generation_config, "eos_token_id", None)
    ends = ends if isinstance(ends, list) else [ends]
    stop = frozenset(token for token in (renderer.end_token_id, tokenizer.eos_token_id, *ends) if token is not None)
    model.eval()
    # One product each: joining q, k and v's weights for every single token would cost more than it saves.
    model.model.set_project(project_each)
    return Opened(model, renderer, stop, context_length(model.config), system, notices)


def _device() -> torch.device:
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")

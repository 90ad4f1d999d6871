"""Opens what is to be measured: of a run its base, what was trained, and the export; or a model by itself.

All subjects of a run are asked in the run's template and with its token ids, so that they differ in weights alone and
their items can be paired. Numbers are computed in float32 on a CPU and in the recipe's type on a GPU.
"""

from __future__ import annotations

import json
import warnings
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from llama_ft.adapters.lora_file import read_lora
from llama_ft.data.render import Renderer
from llama_ft.data.template import Template
from llama_ft.errors import Problem, UserError, did_you_mean
from llama_ft.evaluate.rope import rope_name
from llama_ft.evaluate.subject import Subject
from llama_ft.export.folder import stop_ids
from llama_ft.export.trained import (
    base_folder,
    check_quantised,
    check_scale,
    full_model,
    newest_weights,
    read_back,
)
from llama_ft.llama import smollm2
from llama_ft.llama.base import locate_base
from llama_ft.llama.context import context_length
from llama_ft.llama.init import resize_embeddings
from llama_ft.llama.load import DTYPES, load_config, load_model, quiet_transformers
from llama_ft.llama.projections import project_each
from llama_ft.llama.reward import is_reward_model
from llama_ft.recipe.run import Run
from llama_ft.recipe.schema_model import RopeScaling
from llama_ft.serve.source import find_run
from llama_ft.tokenizer.load import load_tokenizer

if TYPE_CHECKING:
    from llama_ft.data.prepare import Prepared

SUBJECTS = ("unscaled", "base", "tuned", "merged")
"""What can be measured of a run. `unscaled` is the base without the recipe's RoPE scaling, read as far as with it."""
DEFAULT = ("base", "tuned")
UNSPOKEN = "{{ raise_exception('the model has no chat template') }}"


def find_source(source: str) -> Run | None:
    """The run that is named; None for a model. UserError for a reward model, or a name that is neither."""
    run = find_run(source)
    if run is not None:
        if run.recipe.training.objective == "reward":
            what = f"{run.path} is a reward model: it scores answers and has no tokens to measure"
            raise UserError(what, hint="its accuracy on held-out pairs is in eval/accuracy.json")
        return run
    path = Path(source).expanduser()
    if path.exists() or source == smollm2.NAME or (source.count("/") == 1 and not source.startswith((".", "runs/"))):
        return None
    known = [smollm2.NAME, *(str(found.parent) for found in sorted(Path("runs").glob("*/recipe.yaml")))]
    raise UserError(f"there is no run and no model '{source}'", hint=did_you_mean(source, known, kind="sources"))


def check_subjects(run: Run, names: Sequence[str]) -> list[str]:
    """The names of subjects, each once. UserError with all that a run does not have."""
    problems = []
    for name in names:
        if name not in SUBJECTS:
            hint = did_you_mean(name, SUBJECTS, kind="subjects")
            problems.append(Problem(f"no such subject '{name}'", key="--subjects", hint=hint))
        elif name == "merged" and not (run.merged / "config.json").is_file():
            what = f"{run.path} has no merged/"
            problems.append(Problem(what, key="--subjects", hint=f"make it: llama-ft export {run.path}"))
        elif name == "tuned" and _nothing_trained(run):
            hint = "finish its training" + (": llama-ft train RECIPE --resume" if run.steps() else "")
            problems.append(Problem(f"{run.path} holds nothing trained yet", key="--subjects", hint=hint))
        elif name == "unscaled" and run.recipe.model.rope_scaling is None:
            what = f"the recipe of {run.path} has no model.rope_scaling: its base is not scaled"
            problems.append(Problem(what, key="--subjects", hint="--subjects base,tuned"))
        elif (
            name in ("base", "unscaled")
            and run.lock.get("init") == "random"
            and not any(run.base.glob("*.safetensors"))
        ):
            what = f"{run.path} was trained from new weights, which are gone: it has no base"
            problems.append(Problem(what, key="--subjects", hint="--subjects tuned"))
    if problems or not names:
        raise UserError(problems or [Problem("no subject was named", key="--subjects", hint=", ".join(SUBJECTS))])
    return list(dict.fromkeys(names))


def _nothing_trained(run: Run) -> bool:
    if run.recipe.adapter.method != "full":
        return not (run.adapter / "adapter_model.safetensors").is_file()
    whole = (run.merged / "config.json").is_file()
    return not whole and not any(any(run.checkpoint(step).glob("model*.safetensors")) for step in run.steps())


def open_subjects(run: Run, names: Sequence[str], prepared: Prepared) -> Iterator[Subject]:
    """The subjects of a run, one after the other: a caller that lets go of one makes room for the next."""
    for name in names:
        yield {"unscaled": _unscaled, "base": _base, "tuned": _tuned, "merged": _merged}[name](run, prepared)


def _unscaled(run: Run, prepared: Prepared) -> Subject:
    """The base with its own RoPE, beyond its context too: what a scaling is to be better than."""
    subject = _base(run, prepared, scaled=False)
    model, length = run.recipe.model, run.recipe.sequence.max_length
    subject.context = max(subject.context, context_length(load_config(base_folder(run), model.rope_scaling, length)))
    return subject


def _base(run: Run, prepared: Prepared, *, scaled: bool = True) -> Subject:
    """What training started from, with the rows of tokens that it added."""
    recipe, folder = run.recipe, base_folder(run)
    model = _load(folder, DTYPES[recipe.model.dtype], recipe if scaled else None)
    wanted = len(read_lora(run.adapter).whole.get("model.embed_tokens.weight", ())) if _has_adapter(run) else 0
    if max(wanted, len(prepared.tokenizer)) > model.config.vocab_size:
        resize_embeddings(model, max(wanted, len(prepared.tokenizer)))
    return _subject("base" if scaled else "unscaled", model, run, prepared, folder)


def _tuned(run: Run, prepared: Prepared) -> Subject:
    """What training left: base + adapter, a quantised base quantised again; or the weights of full tuning."""
    recipe = run.recipe
    if recipe.adapter.method == "full":
        if (run.merged / "config.json").is_file():
            model: Any = _load(run.merged, DTYPES[recipe.export.dtype or recipe.model.dtype], None)
            return _subject("tuned", model, run, prepared, run.merged)
        return _subject("tuned", full_model(run, None), run, prepared, newest_weights(run))
    lora, device = read_lora(run.adapter), _device()
    check_scale(lora, recipe)
    compute = DTYPES[run.lock.get("compute_dtype", "float32")]
    with quiet_transformers(), warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)  # what PEFT still calls in transformers is theirs to settle
        read = read_back(base_folder(run), lora, recipe, compute, device)
        if recipe.adapter.method == "qlora":
            check_quantised(read, run, device)
    return _subject("tuned", read.get_base_model(), run, prepared, run.adapter)


def _merged(run: Run, prepared: Prepared) -> Subject:
    stated = run.recipe.export.dtype or run.recipe.model.dtype
    return _subject("merged", _load(run.merged, DTYPES[stated], None), run, prepared, run.merged)


def _has_adapter(run: Run) -> bool:
    return (run.adapter / "adapter_model.safetensors").is_file()


def _subject(name: str, model: Any, run: Run, prepared: Prepared, weights: Path) -> Subject:
    renderer = Renderer(prepared.template, prepared.tokenizer)
    stop = frozenset(stop_ids(renderer.end_token_id, prepared.tokenizer))
    systems = {entry.system for entry in run.recipe.data}
    system = systems.pop() if len(systems) == 1 else None
    return Subject(
        name, _settled(model, run.recipe.model.dtype), renderer, stop, system=system, fingerprint=_stamp(weights)
    )


def open_model(source: str, template: str | None = None, rope: RopeScaling | None = None, longest: int = 0) -> Subject:
    """A model folder or file, `smollm2-135m` or a hub id, under its own name; in a template of one's choice.

    rope: another RoPE scaling, which its name then tells; it reads up to `longest` tokens where the scaling itself does
    not say how far. A model without a chat template can be opened: its template refuses conversations. UserError for a
    reward model.
    """
    folder = locate_base(source)
    if is_reward_model(folder):
        raise UserError(f"{source} is a reward model: it scores answers and has no tokens to measure")
    config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    stated = str(config.get("dtype") or config.get("torch_dtype") or "float32")
    dtype = DTYPES.get(stated, torch.float32)
    model: Any = load_model(folder, dtype, compute_dtype=torch.float32, rope_scaling=rope, max_length=longest)
    tokenizer = load_tokenizer(folder)
    notices = []
    if template is not None:
        spoken = Template.load(template, tokenizer)
    elif tokenizer.chat_template:
        spoken = Template.load("base", tokenizer)
    else:
        spoken = Template("none", UNSPOKEN)
        notices.append(f"{source} has no chat template: conversations need --template")
    silent = template is None and not tokenizer.chat_template
    renderer = Renderer(spoken, tokenizer)
    ends = getattr(model.generation_config, "eos_token_id", None)
    ends = ends if isinstance(ends, list) else [ends]
    own = [tokenizer.eos_token_id, *ends, None if silent else renderer.end_token_id]
    stop = frozenset(int(token) for token in own if token is not None)
    name = Path(source).expanduser().resolve().name if Path(source).expanduser().exists() else source
    name += f"-{rope_name(rope)}" if rope is not None else ""
    return Subject(name, _settled(model, stated), renderer, stop, fingerprint=_stamp(folder), notices=notices)


def _load(folder: Path, dtype: torch.dtype, recipe: Any) -> Any:
    """Weights rounded to `dtype`, held in float32: rounding is part of a model, the type that it multiplies in is not.
    recipe: whose RoPE scaling the folder does not have yet."""
    scaling = None if recipe is None else recipe.model.rope_scaling
    length = 0 if recipe is None else recipe.sequence.max_length
    return load_model(folder, dtype, compute_dtype=torch.float32, rope_scaling=scaling, max_length=length)


def _settled(model: Any, dtype: str) -> Any:
    """Ready to be asked, where it computes fastest."""
    device = _device()
    model.eval()
    # One product each: joining q, k and v's weights for every single token would cost more than it saves.
    model.model.set_project(project_each)
    return model.to(device, DTYPES.get(dtype, torch.float32) if device.type == "cuda" else torch.float32)


def _device() -> torch.device:
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


def _stamp(folder: Path) -> str:
    """Names, sizes and times of the weights of a folder: enough to see that they are others."""
    files = [(file.name, file.stat()) for file in sorted(folder.glob("*.safetensors"))]
    return "; ".join(f"{name} {found.st_size} {found.st_mtime_ns}" for name, found in files)

"""Several runs' adapters as one, with weights: a run of its own, which is merged and proven like any other.

The combination is PEFT's (`add_weighted_adapter`), on a base without weights. `cat` is exact: Σ wᵢ·sᵢ·Bᵢ·Aᵢ with the
factors side by side. `svd` is that sum at the largest rank. `linear`, `ties` (arXiv 2306.01708), `dare_linear` and
`dare_ties` (arXiv 2311.03099) combine A's and B's each for themselves, as PEFT does, and need equal ranks; DARE drops
entries by chance, which the seed settles.
"""

from __future__ import annotations

import re
import shutil
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from peft import PeftModel
from torch import nn

from llama_ft.adapters.lora_file import LoraFile, read_lora
from llama_ft.errors import Problem, UserError, did_you_mean
from llama_ft.export.trained import base_folder
from llama_ft.files import publish, write_json, write_text
from llama_ft.llama.init import meta_model
from llama_ft.llama.load import load_config
from llama_ft.recipe import dump
from llama_ft.recipe.run import Run

HOW = ("cat", "svd", "linear", "ties", "dare_linear", "dare_ties")
PRUNING = ("ties", "dare_linear", "dare_ties")
"""Those that keep a share of the entries, `density`."""
EQUAL_RANKS = ("linear", *PRUNING)
ALIKE = (
    ("base_hash", "base"),
    ("base_digest", "quantised base"),
)
"""What the locks of combined runs must agree about, and what it is called."""
_ITEM = re.compile(r"(?P<run>.+)=(?P<weight>[+-]?(\d+\.?\d*|\.\d+))")


@dataclass(frozen=True)
class Part:
    """A run and the weight of its adapter."""

    run: Run
    weight: float
    lora: LoraFile


def parse_parts(items: Sequence[str]) -> list[tuple[str, float]]:
    """`RUN=0.5` as (RUN, 0.5); a bare RUN weighs 1. UserError for a weight of zero."""
    found = []
    for item in items:
        match = None if Path(item).exists() else _ITEM.fullmatch(item)
        run, weight = (match["run"], float(match["weight"])) if match else (item, 1.0)
        if not weight:
            raise UserError(f"{run} weighs nothing", hint="leave it out")
        found.append((run, weight))
    return found


def combine_runs(
    items: Sequence[tuple[str, float]], out: Path, *, how: str = "cat", density: float | None = None, seed: int = 42
) -> Run:
    """Writes a run folder with the combined adapter, the first run's recipe and a lock that names all of them.

    density: share of entries that TIES and DARE keep, in (0, 1]. UserError for runs that do not go together, a folder
    that is there, or a way that is not known; all mistakes at once.
    """
    if how not in HOW:
        raise UserError(f"there is no way '{how}' to combine adapters", hint=did_you_mean(how, HOW, kind="ways"))
    parts = [_part(name, weight) for name, weight in items]
    problems = _faults(parts, how, density)
    if out.exists():
        problems.append(Problem(f"{out} is there already", hint="name another --out"))
    if problems:
        raise UserError(problems)
    first = parts[0].run
    staged = out.with_name(f".{out.name}.combining")
    shutil.rmtree(staged, ignore_errors=True)
    try:
        scale_of = _write_adapter(parts, staged, how, density, seed)
        changed = {"name": out.name, "output_dir": str(out)}
        adapter = first.recipe.adapter.model_copy(update={"r": scale_of[0], "alpha": scale_of[1], "rslora": False})
        recipe = first.recipe.model_copy(update={**changed, "adapter": adapter})
        write_text(staged / "recipe.yaml", dump(recipe))
        said = [{"run": one.run.recipe.name, "weight": one.weight, "sha256": one.lora.sha256} for one in parts]
        combined = {"how": how, "density": density, "seed": seed, "of": said}
        write_json(staged / "run.lock.json", first.lock | {"name": out.name, "combined": combined})
        publish(staged, out)
    finally:
        shutil.rmtree(staged, ignore_errors=True)
    return Run(out)


def _part(name: str, weight: float) -> Part:
    run = Run.open(name)
    if not run.adapter.is_dir():
        raise UserError(f"{run.path} has no adapter/", hint="only runs of lora and qlora can be combined")
    return Part(run, weight, read_lora(run.adapter))


def _faults(parts: Sequence[Part], how: str, density: float | None) -> list[Problem]:
    found = []
    if len(parts) < 2:
        found.append(Problem("one adapter alone is nothing to combine", hint="name two runs or more"))
    if how in PRUNING and density is None:
        found.append(Problem(f"{how} keeps a share of the entries", hint="say how many: --density 0.5"))
    if how not in PRUNING and density is not None:
        found.append(Problem(f"--density is read by {', '.join(PRUNING)} and not by {how}"))
    if density is not None and not 0 < density <= 1:
        found.append(Problem(f"--density is a share above 0 and at most 1, not {density:g}"))
    first = parts[0]
    for one in parts:
        path = str(one.run.path)
        if one.lora.magnitudes or one.lora.whole:
            what = "DoRA" if one.lora.magnitudes else "weights that were trained whole"
            found.append(Problem(f"{what} cannot be combined", path))
        for key, name in ALIKE:
            if one.run.lock.get(key) != first.run.lock.get(key):
                found.append(Problem(f"its {name} is another than that of {first.run.path}", path))
        if one.run.recipe.template != first.run.recipe.template:
            said = f"'{one.run.recipe.template}', that of {first.run.path} is '{first.run.recipe.template}'"
            found.append(Problem(f"its template is {said}", path))
        ranks = [next(iter(lora.factors.values()))[0].shape[0] for lora in (one.lora, first.lora)]
        if how in EQUAL_RANKS and ranks[0] != ranks[1]:
            hint = "take cat or svd"
            found.append(Problem(f"its rank is {ranks[0]}, that of {first.run.path} {ranks[1]}", path, hint=hint))
        if how != "cat" and one.lora.factors.keys() != first.lora.factors.keys():
            found.append(Problem(f"it sits on other layers than {first.run.path}", path, hint="take cat"))
    return found


def _write_adapter(
    parts: Sequence[Part], out: Path, how: str, density: float | None, seed: int
) -> tuple[int, int | float]:
    """adapter/ under `out`, with the first run's tokenizer; returns its (r, alpha)."""
    first = parts[0].run
    base: Any = _weightless(meta_model(load_config(base_folder(first))))
    names = [f"part{number}" for number in range(len(parts))]
    model: Any = PeftModel.from_pretrained(base, str(first.adapter), adapter_name=names[0], torch_device="cpu")
    for name, part in list(zip(names, parts, strict=True))[1:]:
        model.load_adapter(str(part.run.adapter), adapter_name=name, torch_device="cpu")
    torch.manual_seed(seed)
    said = {"density": density} if density is not None else {}
    weights = [part.weight for part in parts]
    model.add_weighted_adapter(names, weights, "combined", combination_type=how, **said)
    model.save_pretrained(str(out), selected_adapters=["combined"], save_embedding_layers=False)
    adapter = out / "adapter"
    (out / "combined").rename(adapter)
    (out / "README.md").unlink(missing_ok=True)
    for file in first.adapter.iterdir():  # the tokenizer and its template
        if not (adapter / file.name).exists() and file.suffix != ".safetensors":
            shutil.copyfile(file, adapter / file.name)
    config = model.peft_config["combined"]
    return config.r, config.lora_alpha


def _weightless(model: nn.Module) -> nn.Module:
    """Its linear layers on the CPU, one zero for all weights of each: PEFT puts its factors where these lie."""
    for module in model.modules():
        if isinstance(module, nn.Linear):
            module.weight = nn.Parameter(torch.zeros(1).expand(module.weight.shape), requires_grad=False)
    return model

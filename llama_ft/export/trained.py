"""What was trained, read back from disk: the other side of the proof."""

from __future__ import annotations

import copy
import math
from contextlib import nullcontext
from pathlib import Path
from typing import Any, cast

import torch
from peft import PeftModel, get_peft_model_state_dict
from peft.tuners.lora import LoraLayer
from torch import nn
from transformers import PreTrainedModel

from llama_ft.adapters.base import load_base
from llama_ft.adapters.lora import prepare_forward
from llama_ft.adapters.lora_file import LoraFile
from llama_ft.adapters.quantised import digest, known_as_quantised, without_quantisation
from llama_ft.errors import Problem, UserError
from llama_ft.llama.base import locate_base
from llama_ft.llama.load import load_model
from llama_ft.llama.reward import load_reward_model
from llama_ft.recipe.run import Run
from llama_ft.recipe.schema import Recipe

_SHOWN = 4


def base_folder(run: Run) -> Path:
    """The folder that the run started from: its own, else the one it noted, else (it has moved) the recipe's base."""
    if (run.base / "config.json").is_file():
        return run.base
    if run.lock.get("init") == "random":
        raise UserError(f"the run's own base is gone: there is no {run.base}", hint="train again with --overwrite")
    noted = run.lock.get("base_folder")
    if noted and (Path(noted) / "config.json").is_file():
        return Path(noted)
    return locate_base(run.recipe.model.base, run.recipe.model.revision)


def check_scale(lora: LoraFile, recipe: Recipe) -> None:
    """The saved adapter multiplies its update by what the recipe says: a changed alpha would rescale all of it."""
    adapter = recipe.adapter
    wanted = float(adapter.alpha) / (math.sqrt(adapter.r) if adapter.rslora else adapter.r)
    if abs(lora.scale - wanted) > 1e-9 * wanted:
        formula = "alpha / √r" if adapter.rslora else "alpha / r"
        raise UserError(
            f"the adapter's scale is {lora.scale:g}, the recipe's {formula} is {wanted:g}",
            where=str(lora.path / "adapter_config.json"),
            hint="the file was changed after training: set lora_alpha and r back",
        )


def read_back(base: Path, lora: LoraFile, recipe: Recipe, compute: torch.dtype, device: torch.device) -> PeftModel:
    """Base + adapter through PEFT on our LLaMA, in float32 with the weights that training computed with.

    compute, device: what a quantised base was trained in, and is quantised on again; it is left so. Raises UserError if
    PEFT did not take up every tensor of the adapter bit for bit, or scales it otherwise.
    """
    rows = len(lora.whole.get("model.embed_tokens.weight", ()))
    model = load_base(base, recipe, compute if recipe.adapter.method == "qlora" else torch.float32, device, rows=rows)
    with known_as_quantised(model, recipe.adapter) if recipe.adapter.method == "qlora" else nullcontext():
        peft_model = PeftModel.from_pretrained(model, str(lora.path))
    prepare_forward(peft_model)
    modules = peft_model.get_base_model().named_modules()
    layers = {name: layer for name, layer in modules if isinstance(layer, LoraLayer)}
    problems = []
    state: Any = get_peft_model_state_dict(peft_model, save_embedding_layers=False)
    wanted = {f"base_model.model.{name}": tensor for name, tensor in lora.whole.items()}
    for name, tensor in lora.magnitudes.items():
        wanted[f"base_model.model.{name.removesuffix('.weight')}.lora_magnitude_vector"] = tensor
    for name, tensor in wanted.items():
        if name not in state or not torch.equal(state[name].cpu().float(), tensor):
            problems.append(Problem(f"PEFT read another {name} than the file holds", str(lora.path)))
    for name in sorted({f"{layer}.weight" for layer in layers} ^ lora.factors.keys()):
        problems.append(Problem(f"PEFT and the adapter's file disagree about {name}", str(lora.path)))
    for name, layer in layers.items():
        if problems:
            break
        down, up = lora.factors[f"{name}.weight"]
        read_down: Any = layer.lora_A["default"].weight
        read_up: Any = layer.lora_B["default"].weight
        if not torch.equal(read_down.cpu(), down) or not torch.equal(read_up.cpu(), up):
            problems.append(Problem(f"PEFT read other values for {name} than the file holds", str(lora.path)))
        elif layer.scaling["default"] != lora.scale:
            problems.append(Problem(f"PEFT scales {name} by {layer.scaling['default']:g}, the merge by {lora.scale:g}"))
    if problems:
        raise UserError(problems[:_SHOWN])
    return peft_model


def check_live(live: nn.Module, read: nn.Module) -> None:
    """Base and adapter in memory equal what was read back, bit for bit. UserError naming tensors that do not.

    Equal after widening to float32, which is exact: a GPU trains on the same values in 16 bits.
    """
    here, there = live.state_dict(), read.state_dict()
    differing = []
    for name in sorted(here.keys() | there.keys()):
        if name not in here or name not in there:
            differing.append(f"{name} is {'missing on disk' if name in here else 'not in the trained model'}")
        elif here[name].shape != there[name].shape or not torch.equal(
            here[name].detach().cpu().float(), there[name].detach().cpu().float()
        ):
            differing.append(f"{name} differs")
    scales = [layer.scaling for layer in live.modules() if isinstance(layer, LoraLayer)]
    read_scales = [layer.scaling for layer in read.modules() if isinstance(layer, LoraLayer)]
    if scales != read_scales:
        differing.append("the adapter's scale differs")
    if differing:
        more = f" (and {len(differing) - _SHOWN} more)" if len(differing) > _SHOWN else ""
        raise UserError(
            [Problem(f"what was saved is not what was trained: {what}{more}") for what in differing[:_SHOWN]]
        )


def check_quantised(read: PeftModel, run: Run, device: torch.device) -> None:
    """The base was quantised again to the very values that training computed with; it is plain afterwards.

    Raises UserError where it was not: what was trained can then not be merged here. LLM.int8() also rounds the inputs
    of a layer, in training as in serving; merged weights are compared with its weights alone.
    """
    noted, found = run.lock.get("base_digest"), digest(read)
    if noted is not None and noted != found:
        raise UserError(
            f"quantised on this machine ({device.type}) the base is not the one that was trained on",
            where=str(run.lock_file),
            hint=f"its files changed, or the machine does: the run was trained on {run.lock.get('device')}",
        )
    without_quantisation(read)


def full_model(run: Run, live: PreTrainedModel | PeftModel | None) -> PreTrainedModel:
    """A fully tuned model in float32: the one in memory, or the newest checkpoint's weights."""
    if live is not None:
        in_float32 = all(parameter.dtype == torch.float32 for parameter in live.parameters())
        return cast(PreTrainedModel, live if in_float32 else copy.deepcopy(live).float())
    recipe = run.recipe
    scaling, max_length = recipe.model.rope_scaling, recipe.sequence.max_length
    load: Any = load_reward_model if recipe.training.objective == "reward" else load_model
    return load(newest_weights(run), torch.float32, rope_scaling=scaling, max_length=max_length)


def newest_weights(run: Run) -> Path:
    """The newest checkpoint of a fully tuned run. UserError if none is left to compare an export with."""
    for step in reversed(run.steps()):
        if any(run.checkpoint(step).glob("model*.safetensors")):
            return run.checkpoint(step)
    raise UserError(
        f"{run.path} holds no checkpoint: nothing is left to compare merged/ with",
        hint="a run proves its export when it ends; its export.json stands",
    )

"""An adapter folder in PEFT's layout, read and judged: every tensor accounted for, every odd thing named."""

from __future__ import annotations

import hashlib
import json
import math
import re
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor

from llama_ft.errors import Problem, UserError
from llama_ft.llama.reward import SCORE

# What may be said in adapter_config.json without changing the formula. Every other entry must be empty: a variant that
# a later PEFT invents is refused too, instead of being merged as if it were plain LoRA.
_HARMLESS = {
    "auto_mapping", "base_model_name_or_path", "ensure_weight_tying", "inference_mode", "lora_alpha", "lora_dropout",
    "megatron_core", "modules_to_save", "peft_type", "peft_version", "qalora_group_size", "r", "revision",
    "target_modules", "task_type", "use_dora", "use_rslora",
}  # fmt: skip
_PLAIN = {"bias": "none", "init_lora_weights": (True, False, "gaussian")}
_FACTOR = re.compile(r"base_model\.model\.(?P<module>.+)\.lora_(?P<side>[AB])\.weight")
_MAGNITUDE = re.compile(r"base_model\.model\.(?P<module>.+)\.lora_magnitude_vector")
_WHOLE = re.compile(r"base_model\.model\.(?P<name>(?P<module>[^:]+)\.weight)")
_SHOWN = 4


@dataclass(frozen=True)
class LoraFile:
    """A saved adapter, all in float32, by the base weight each part belongs to.

    factors: A [r, in] and B [out, r]; magnitudes: DoRA's length of each output row [out]; whole: weights that were
    trained themselves and replace the base's. `targets` as in adapter_config.json: names, or a regex.
    """

    path: Path
    scale: float
    targets: tuple[str, ...] | str
    factors: dict[str, tuple[Tensor, Tensor]]
    sha256: str
    magnitudes: dict[str, Tensor] = field(default_factory=dict)
    whole: dict[str, Tensor] = field(default_factory=dict)

    @property
    def scores(self) -> bool:
        """Whether it makes a reward model of its base: a score was trained whole."""
        return SCORE in self.whole

    @property
    def tensors(self) -> int:
        """How many tensors the file holds."""
        return 2 * len(self.factors) + len(self.magnitudes) + len(self.whole)

    def is_target(self, weight: str) -> bool:
        """Whether the adapter says that it sits on this weight."""
        module = weight.removesuffix(".weight")
        if isinstance(self.targets, str):
            return re.fullmatch(self.targets, module) is not None
        return module.rpartition(".")[2] in self.targets


def read_lora(folder: Path) -> LoraFile:
    """Reads an adapter folder in PEFT's layout. UserError naming everything that keeps it from being merged."""
    config = _config(folder)
    file = folder / "adapter_model.safetensors"
    try:
        tensors = load_file(file)
    except FileNotFoundError as error:
        raise UserError(
            f"{folder} holds no adapter_model.safetensors", hint="pickled adapters are not read; save it again"
        ) from error
    except (SafetensorError, OSError) as error:
        raise UserError(f"the adapter cannot be read: {error}", where=str(file)) from error
    sides: dict[str, dict[str, Tensor]] = {}
    magnitudes: dict[str, Tensor] = {}
    whole: dict[str, Tensor] = {}
    odd = []
    saved = tuple(config.get("modules_to_save") or ())
    for key, tensor in tensors.items():
        if match := _FACTOR.fullmatch(key):
            sides.setdefault(f"{match['module']}.weight", {})[match["side"]] = tensor.float()
        elif config.get("use_dora") and (match := _MAGNITUDE.fullmatch(key)):
            magnitudes[f"{match['module']}.weight"] = tensor.float()
        elif (match := _WHOLE.fullmatch(key)) and _is_saved(match["module"], saved):
            whole[match["name"]] = tensor.float()
        else:
            odd.append(key)
    problems = [Problem(f"{key} is not a LoRA factor of a linear layer", str(file)) for key in sorted(odd)[:_SHOWN]]
    problems += _faults_of_pairs(sides, config["r"], file)
    if config.get("use_dora"):
        unpaired = sorted(sides.keys() ^ magnitudes.keys())
        problems += [Problem(f"{name} has factors or a length, not both", str(file)) for name in unpaired[:_SHOWN]]
    missing = [
        name for name in saved if not any(_is_saved(weight.removesuffix(".weight"), (name,)) for weight in whole)
    ]
    problems += [Problem(f"modules_to_save names {name}, which the file does not hold", str(file)) for name in missing]
    if not problems:
        problems = _zero_problems({name: pair["B"] for name, pair in sides.items()}, file)
    if problems:
        raise UserError(problems)
    r, alpha = config["r"], config["lora_alpha"]
    scale = alpha / math.sqrt(r) if config.get("use_rslora") else alpha / r  # rsLoRA: arXiv 2312.03732
    with file.open("rb") as opened:
        digest = hashlib.file_digest(opened, "sha256").hexdigest()
    factors = {name: (pair["A"], pair["B"]) for name, pair in sorted(sides.items())}
    targets = config["target_modules"]
    targets = targets if isinstance(targets, str) else tuple(targets)
    lora = LoraFile(folder, scale, targets, factors, digest, magnitudes, whole)
    stray = [name for name in factors if not lora.is_target(name)]
    if stray:
        said = json.dumps(config["target_modules"])
        what = f"it holds factors of {stray[0]}, which target_modules ({said}) does not name"
        raise UserError(what, where=str(file), hint="PEFT would leave them out without a word; save the adapter again")
    return lora


def _is_saved(module: str, saved: tuple[str, ...]) -> bool:
    """Whether PEFT takes this module for one that `modules_to_save` names; a tied head comes with its embedding."""
    tied = module == "lm_head" and any(name.endswith("embed_tokens") for name in saved)
    return tied or module.endswith(saved)  # as PEFT does: `norm` is every norm


def _faults_of_pairs(sides: dict[str, dict[str, Tensor]], r: int, file: Path) -> list[Problem]:
    problems = []
    for name, pair in sides.items():
        if len(pair) == 1:
            problems.append(Problem(f"{name} has lora_{next(iter(pair))} but not its partner", str(file)))
        elif pair["A"].shape[0] != r or pair["B"].shape[1] != r:
            found = f"A {list(pair['A'].shape)}, B {list(pair['B'].shape)}"
            problems.append(Problem(f"{name} has {found}, which is not rank {r}", str(file)))
    return problems


def _config(folder: Path) -> dict[str, Any]:
    path = folder / "adapter_config.json"
    try:
        config = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise UserError(f"{folder} holds no readable adapter_config.json: {error}", hint="is it an adapter?") from error
    problems = []
    if config.get("peft_type") != "LORA":
        problems.append(Problem(f"found a '{config.get('peft_type')}' adapter, only LORA can be merged", str(path)))
    for key, value in config.items():
        if key in _PLAIN:
            plain = _PLAIN[key]
            unusual = value not in plain if isinstance(plain, tuple) else value != plain
        else:
            unusual = key not in _HARMLESS and bool(value)
        if unusual:
            what = f"{key} is {json.dumps(value)}: this variant of LoRA cannot be merged here"
            problems.append(Problem(what, str(path), hint="only LoRA, rsLoRA and DoRA can"))
    for key, kind in (("r", int), ("lora_alpha", (int, float)), ("target_modules", (list, str))):
        value = config.get(key)
        if not isinstance(value, kind) or not value:
            problems.append(Problem(f"{key} is {json.dumps(value)}", str(path), hint="save the adapter again"))
    if problems:
        raise UserError(problems)
    return config


def _zero_problems(ups: dict[str, Tensor], file: Path) -> list[Problem]:
    """An all-zero B adds nothing: the mark of a run that did not train, or of a shard lost while saving."""
    zero = [name for name, up in ups.items() if not bool(up.any())]
    if len(zero) == len(ups):
        hint = "look at the losses of the run"
        return [Problem("the adapter is zero: nothing was trained", str(file), hint=hint)]
    return [Problem(f"lora_B of {name} is zero: it was not trained or not saved", str(file)) for name in zero[:_SHOWN]]

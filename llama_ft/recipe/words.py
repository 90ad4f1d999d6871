"""Plain words for what a key takes, and the nearest key for a name that is none."""

from __future__ import annotations

import re
from typing import Any

from pydantic import BaseModel, TypeAdapter

from llama_ft.errors import did_you_mean, nearest
from llama_ft.recipe.fields import Field, fields_of, section_models
from llama_ft.recipe.nodes import Items, Map, Node, Scalar
from llama_ft.recipe.yaml_words import one_line

OTHER_NAMES = {
    "base_model": "model.base",
    "model_name_or_path": "model.base",
    "torch_dtype": "model.dtype",
    "lora_r": "adapter.r",
    "rank": "adapter.r",
    "lora_alpha": "adapter.alpha",
    "lora_dropout": "adapter.dropout",
    "target_modules": "adapter.targets",
    "lora_target": "adapter.targets",
    "lora_target_modules": "adapter.targets",
    "dataset": "data",
    "datasets": "data",
    "val_set_size": "eval_data.holdout",
    "chat_template": "template",
    "prompt_template": "template",
    "cutoff_len": "sequence.max_length",
    "max_seq_length": "sequence.max_length",
    "sequence_len": "sequence.max_length",
    "sample_packing": "sequence.packing",
    "train_on_inputs": "sequence.train_on",
    "lr": "training.learning_rate",
    "num_epochs": "training.epochs",
    "num_train_epochs": "training.epochs",
    "batch_size": "training.global_batch",
    "train_batch_size": "training.global_batch",
    "micro_batch_size": "training.micro_batch",
    "per_device_train_batch_size": "training.micro_batch",
    "lr_scheduler": "training.schedule",
    "lr_scheduler_type": "training.schedule",
    "warmup_ratio": "training.warmup",
    "warmup_steps": "training.warmup",
    "save_steps": "training.save_every",
    "eval_steps": "training.eval_every",
    "save_total_limit": "training.keep_checkpoints",
    "optim": "training.optimizer",
    "adam_beta2": "training.betas",
    "adam_epsilon": "training.eps",
    "min_lr_ratio": "training.final_rate",
    "neftune_noise_alpha": "training.neftune_alpha",
    "load_in_4bit": "adapter.bits",
    "load_in_8bit": "adapter.bits",
    "quantization_bit": "adapter.bits",
    "use_dora": "adapter.dora",
    "use_rslora": "adapter.rslora",
    "loraplus_lr_ratio": "adapter.lora_plus",
    "lora_modules_to_save": "adapter.modules_to_save",
    "additional_target": "adapter.modules_to_save",
    "unfrozen_parameters": "adapter.freeze",
    "report_to": "tracking",
}
"""What the same thing is called in other projects' configs."""


def expected(field: Field) -> str:
    """What a key takes, e.g. `a number above 0`, `one of cosine, linear, constant`, `a list of maps`."""
    schema = TypeAdapter(field.type).json_schema()
    return _describe(schema, schema.get("$defs", {}))


def _describe(schema: dict[str, Any], defs: dict[str, Any]) -> str:
    if "anyOf" in schema:
        branches = [branch for branch in schema["anyOf"] if branch.get("type") != "null"]
        if "number" in [branch.get("type") for branch in branches]:  # a whole number or a fraction: a number
            branches = [branch for branch in branches if branch.get("type") != "integer"]
        return " or ".join(_describe(branch, defs) for branch in branches)
    if "enum" in schema:
        return "one of " + ", ".join(map(str, schema["enum"]))
    if "const" in schema:
        return f"'{schema['const']}'"
    names = list(defs.get(schema.get("$ref", "").rpartition("/")[2], {}).get("properties", {}))
    if len(names) == 1:
        return f"{{{names[0]}: …}}"
    return _TYPES[schema.get("type", "object")](schema)


def _number(noun: str, schema: dict[str, Any]) -> str:
    low, above = schema.get("minimum"), schema.get("exclusiveMinimum")
    high, below = schema.get("maximum"), schema.get("exclusiveMaximum")
    if low is not None:
        if high is not None:
            return f"{noun} from {low:g} to {high:.10g}"
        return f"{noun} from {low:g} " + (f"to below {below:g}" if below is not None else "up")
    bounds = [
        f"above {above:g}" if above is not None else "",
        f"below {below:g}" if below is not None else "",
        f"at most {high:g}" if high is not None else "",
    ]
    return f"{noun} {' and '.join(filter(None, bounds))}".strip()


def _list(schema: dict[str, Any]) -> str:
    items = schema.get("items", {})
    kind = "maps" if "$ref" in items else f"names ({', '.join(items['enum'])})" if "enum" in items else "texts"
    return f"a list of {'one or more ' if schema.get('minItems') else ''}{kind}"


_TYPES = {
    "integer": lambda schema: _number("a whole number", schema),
    "number": lambda schema: _number("a number", schema),
    "boolean": lambda schema: "true or false",
    "string": lambda schema: (
        "a name of letters, digits, '.', '-' and '_' (100 at most)" if "pattern" in schema else "text"
    ),
    "array": _list,
    "object": lambda schema: "a map",
}


def shown(node: Node) -> str:
    """A value as a message names it: `'fast'`, `true`, `a list`."""
    if isinstance(node, Scalar):
        text = one_line(node.text)
        return f"'{text}'" if node.quoted or node.form in ("text", "date") else text or "empty"
    if isinstance(node, Map):
        return "a map" if node.entries else "an empty map"
    return ("a list" if node.items else "an empty list") if isinstance(node, Items) else "unreadable"


def key_hint(name: str, model: type[BaseModel], prefix: str) -> str:
    """The nearest key for an unknown one: its own section's, another section's, or another project's name for it."""
    name = name[:100]
    everywhere = _all_keys()
    if "." in name and re.sub(r"\.\d+\.", ".0.", name) in everywhere:
        return f"in a file it is nested: {_nested(name)}"
    leaf = re.sub(r"\W", "_", name.split(".")[-1]).lower()
    meant = _same_name(leaf, model, prefix)
    near = nearest(leaf, fields_of(model))
    if not meant and near:
        meant = [near]
    if not meant:
        far = nearest(leaf, {key.split(".")[-1] for key in everywhere})
        meant = [key for key in everywhere if key.split(".")[-1] == far]
    if meant:
        where = (
            " at the top of the recipe"
            if prefix and meant[0] in valid_top() and meant[0] not in fields_of(model)
            else ""
        )
        return f"did you mean {' or '.join(map(repr, meant))}{where}?"
    return did_you_mean(name, fields_of(model), kind="keys here" if prefix else "keys")


def _same_name(leaf: str, model: type[BaseModel], prefix: str) -> list[str]:
    """The keys that are called so here, in another section, at the top, or in another project."""
    if leaf in fields_of(model):
        return [leaf]
    elsewhere = [key for key in _all_keys() if "." in key and key.split(".")[-1] == leaf]
    if not elsewhere and prefix and leaf in valid_top():
        return [leaf]
    return elsewhere or [OTHER_NAMES[leaf]] if leaf in OTHER_NAMES else elsewhere


def valid_top() -> list[str]:
    """The top-level keys of a recipe, `extends` among them."""
    return [*section_models()[""].model_fields, "extends"]


def _all_keys() -> list[str]:
    """Every dotted key; a source's keys are shown under `data.0` alone, though `eval_data.0` takes them too."""
    keys = []
    for section, model in section_models().items():
        if section != "eval_data.0":
            keys += [f"{section}.{name}" if section else name for name in model.model_fields]
    return keys


def _nested(dotted: str) -> str:
    *sections, leaf = dotted.split(".")
    text = f"{leaf}: …"
    for section in reversed(sections):
        text = f"- {text}" if section.isdigit() else f"{section}: {{{text}}}"
    return text

"""The model card of a run: what it is, what it was made of, what was measured. No path of the machine is in it."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import yaml

from llama_ft.data.cards import Card, Hub, load_card
from llama_ft.errors import UserError
from llama_ft.export.card_objective import counted, limits, of_buckets, of_losses, of_samples, settings, task, use
from llama_ft.export.gguf.table import HEAD, format_rows
from llama_ft.export.licence import Licence, licence_of, terms_of
from llama_ft.export.table import proof_rows
from llama_ft.files import write_text
from llama_ft.llama.base import hub_id
from llama_ft.recipe.run import Run
from llama_ft.recipe.schema import Data, Recipe

# Bases that have another name here than on the hub.
_HUB_NAMES = {"smollm2-135m": "HuggingFaceTB/SmolLM2-135M-Instruct"}
MEASURED = {
    "loss": "training loss",
    "eval_loss": "held-out loss",
    "accuracy": "training accuracy",
    "eval_accuracy": "held-out accuracy",
}
"""What of metrics.jsonl a card shows, and what it calls it."""


def write_card(run: Run) -> Path:
    """Writes README.md of a run from what lies in its folder; what is missing there is left out. Returns its path."""
    recipe = run.recipe
    sections = [
        f"# {recipe.name}",
        _what_it_is(recipe),
        _combined(run),
        f"## Use\n\n{use(recipe)}",
        _results(run),
        _proof(run),
        _formats(run),
        _data(run),
        _settings(run),
        _limits(recipe),
    ]
    front = yaml.safe_dump(_front_matter(recipe), sort_keys=False, allow_unicode=True)
    write_text(run.card_file, f"---\n{front}---\n\n" + "\n\n".join(filter(None, sections)) + "\n")
    return run.card_file


def base_names(recipe: Recipe) -> tuple[str | None, Licence | None]:
    """(hub id, licence) of the base model; None where it has none that is known, or only lent its shapes."""
    base = recipe.model.base
    if recipe.model.starts_new:
        return None, None
    name = _HUB_NAMES.get(base) or hub_id(base)
    return name, licence_of(name)


def _cards(recipe: Recipe) -> list[tuple[Data, Card | None]]:
    found: list[tuple[Data, Card | None]] = []
    for entry in recipe.data:
        card = None
        if entry.use is not None:
            try:
                card = load_card(entry.use)
            except UserError:  # a card of the user's that has moved since
                card = None
        found.append((entry, card))
    return found


def _front_matter(recipe: Recipe) -> dict[str, Any]:
    base, base_licence = base_names(recipe)
    cards = _cards(recipe)
    licences = {card.licence.lower() if card and card.licence else None for _, card in cards}
    if not recipe.model.starts_new:
        licences.add(base_licence.identifier if base_licence else None)
    front: dict[str, Any] = {"library_name": "transformers", "pipeline_tag": task(recipe)}
    if base is not None:
        front |= {"base_model": base, "base_model_relation": "finetune"}
    # One licence is named only when everything is known to be under it; a base's own terms bind whatever is beside it.
    only = licences.pop() if len(licences) == 1 else None
    front["license"] = base_licence.identifier if base_licence and base_licence.terms else only or "other"
    hubs = [card.source.hub for _, card in cards if card is not None and isinstance(card.source, Hub)]
    if hubs:
        front["datasets"] = hubs
    front["tags"] = ["llama", "llama_ft", recipe.training.objective, recipe.adapter.method]
    return front


def _base_in_words(recipe: Recipe) -> str:
    base, licence = base_names(recipe)
    if recipe.model.starts_new:
        local = Path(recipe.model.base).exists()
        return f"New weights in the shapes of {'a LLaMA from a local folder' if local else f'`{recipe.model.base}`'}"
    if base is None:
        return "A LLaMA from a local folder"
    return f"[{base}](https://huggingface.co/{base})" + (f" ({licence.name})" if licence else "")


def _what_it_is(recipe: Recipe) -> str:
    adapter = recipe.adapter
    how = "with all weights" if adapter.method == "full" else f"with LoRA (r {adapter.r}, alpha {adapter.alpha:g})"
    became = "made a reward model" if recipe.training.objective == "reward" else "tuned"
    parts = [f"{_base_in_words(recipe)}, {became} {how} by [llama_ft](https://github.com/llama-ft/llama_ft)."]
    if recipe.reproduces is not None:
        parts.append(f"It follows {recipe.reproduces.what} ({recipe.reproduces.source}), with these deviations:")
        parts.append("\n".join(f"- {line}" for line in recipe.reproduces.deviations) or "- none")
    return "\n\n".join(parts)


def _combined(run: Run) -> str:
    """Of several adapters as one: which, and how."""
    said = _lock(run).get("combined")
    if not said:
        return ""
    parts = " + ".join(f"{one['weight']:g} × {one['run']}" for one in said["of"])
    return f"Its adapter is a combination of several runs' by PEFT's `{said['how']}`: {parts}."


def _results(run: Run) -> str:
    rows = []
    for key, name in MEASURED.items():
        values = [(record["step"], record[key]) for record in _metrics(run) if isinstance(record.get(key), int | float)]
        if values:
            (first_step, first), (last_step, last) = values[0], values[-1]
            rows.append((name, f"{first:.4f} (step {first_step})", f"{last:.4f} (step {last_step})"))
    parts = []
    if rows:
        parts += ["## Results", of_losses(run.recipe), _table(("", "first", "last"), rows)]
    if (run.path / "loss.png").is_file():
        parts.append("![losses](loss.png)")
    buckets = _json(run.path / "eval" / "accuracy.json") or []
    if buckets:
        lines = [
            (f"{one['bucket']}", f"{one['pairs']}", f"{one['accuracy']:.3f} ± {one['error']:.3f}") for one in buckets
        ]
        parts += [of_buckets(buckets), _table(("margin", "pairs", "accuracy"), lines)]
    samples = _json(run.samples_file) or []
    if samples:
        what, columns = of_samples(run.recipe)
        answers = [tuple(_cell(sample.get(key)) for key in columns) for sample in samples]
        parts += [what, _table(tuple(columns.values()), answers)]
    return "\n\n".join(parts)


def _proof(run: Run) -> str:
    proof = _json(run.proof_file)
    if not proof:
        return ""
    if proof["ok"]:
        said = f"`merged/` ({proof['dtype']}), opened with {proof['opened_with']}, compared with what was trained:"
    else:
        faults = "; ".join(proof["faults"])
        said = f"**The merged model was refused and is not part of this run** ({faults}). Measured:"
    rows = [(_cell(what), found, allowed) for what, found, allowed in proof_rows(proof)]
    return "\n\n".join(["## Proof of the export", said, _table(("", "measured", "allowed"), rows)])


def _formats(run: Run) -> str:
    """Files in other formats than merged/, those that were refused too."""
    proofs = (_json(run.proof_file) or {}).get("formats")
    if not proofs:
        return ""
    rows = [tuple(map(_cell, row)) for row in format_rows(proofs)]
    said = "Made of `merged/`, and compared with it; limits stand in brackets."
    return "\n\n".join(["## Other formats", said, _table((*map(_cell, HEAD[:-1]), "proof"), rows)])


def _data(run: Run) -> str:
    recipe = run.recipe
    counted = [entry for entry in _lock(run).get("data", {}).get("sources", []) if entry.get("role") == "train"]
    rows = []
    for number, (entry, card) in enumerate(_cards(recipe)):
        name = _file_name(entry.path) if card is None or entry.path else card.title
        if card is not None and card.homepage:
            name = f"[{name}]({card.homepage})"
        licence = (card.licence if card else None) or "not stated"
        counts = counted[number] if number < len(counted) else {}
        dropped = sum(counts.get("dropped", {}).values()) if counts else "?"
        shown = (counts.get(key, "?") for key in ("rows", "kept", "held_out"))
        rows.append((name, licence, entry.split, *map(str, shown), str(dropped)))
    table = _table(("source", "licence", "split", "rows", "trained on", "held out", "dropped"), rows)
    return f"## Data\n\n{table}"


def _settings(run: Run) -> str:
    recipe, lock = run.recipe, _lock(run)
    training, sequence = recipe.training, recipe.sequence
    steps = max((record.get("step", 0) for record in _metrics(run)), default=None)
    batch = str(training.global_batch)
    if "micro_batch" in lock:
        batch += f" {counted(recipe)} = {lock['micro_batch']} × {lock['accumulation']} × {lock['world_size']} processes"
    tokens = training.warmup_tokens
    warmup = f"{training.warmup:g}" if tokens is None else f"{tokens:,} tokens"
    rows = [
        ("objective", settings(recipe)),
        ("global batch", batch),
        ("optimizer", f"{training.optimizer}, weight decay {training.weight_decay:g}, clip {training.max_grad_norm:g}"),
        ("learning rate", f"{training.learning_rate:g}, {training.schedule}, warm-up {warmup}"),
        ("epochs, steps", f"{training.epochs:g}" + (f", {steps}" if steps is not None else "")),
        ("longest document", f"{sequence.max_length} tokens, longer ones: {sequence.overlong}"),
        ("weights", f"base {recipe.model.dtype}, computed in {lock.get('compute_dtype', '?')}"),
        ("seed", str(training.seed)),
    ]
    result = lock.get("result", {})
    if result.get("checkpoint") == "best":
        said = f"after step {result['step']}, where the held-out loss was lowest ({result['held_out_loss']:.4f})"
        rows.append(("result", said))
    if recipe.adapter.method != "full":
        adapter = recipe.adapter
        targets = adapter.targets if isinstance(adapter.targets, str) else ", ".join(adapter.targets)
        rows.insert(
            1, ("adapter", f"LoRA r {adapter.r}, alpha {adapter.alpha:g}, dropout {adapter.dropout:g}, {targets}")
        )
    parts = ["## Training", _table(("", ""), rows)]
    if lock.get("versions"):
        parts.append("Versions: " + ", ".join(f"{name} {version}" for name, version in lock["versions"].items()) + ".")
    return "\n\n".join(parts)


def _limits(recipe: Recipe) -> str:
    _, licence = base_names(recipe)
    other = "" if licence or recipe.model.starts_new else " The base model's own licence and terms apply."
    terms = terms_of(licence) if licence else ""
    licensed = f"\n\n## Licence of the base\n\n{terms}" if terms else ""
    return f"## Limits\n\n{limits(recipe)}{other}{licensed}"


def _metrics(run: Run) -> list[dict[str, Any]]:
    if not run.metrics_file.is_file():
        return []
    records = []
    for line in run.metrics_file.read_text(encoding="utf-8").splitlines():
        try:
            records.append(json.loads(line))
        except ValueError:  # the last line of a killed run may be cut
            continue
    return records


def _json(path: Path) -> Any:
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None


def _lock(run: Run) -> dict[str, Any]:
    return _json(run.lock_file) or {}


def _file_name(path: str | None) -> str:
    return Path(path or "").name


def _cell(value: Any, longest: int = 400) -> str:
    """Text in a table: one line, no column of its own, no markup; the two scores of a pair."""
    if isinstance(value, dict):
        value = " and ".join(f"{score:.2f}" for score in value.values())
    text = " ".join(str(value or "—").split())
    text = text if len(text) <= longest else text[:longest] + " …"
    return text.replace("\\", "\\\\").replace("|", "\\|").replace("<", "&lt;")


def _table(head: tuple[str, ...], rows: Sequence[tuple[str, ...]]) -> str:
    lines = [head, tuple("---" for _ in head), *rows]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)

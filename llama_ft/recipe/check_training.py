"""Combinations in `training` and `export` that cannot work."""

from __future__ import annotations

from collections.abc import Callable

from llama_ft.recipe.objectives import POLICY
from llama_ft.recipe.schema import Recipe
from llama_ft.recipe.view import View


def unused_training_keys(recipe: Recipe) -> tuple[str, ...]:
    """Keys of `training` that mean nothing beside others of them."""
    training = recipe.training
    return (
        *(("warmup",) if training.warmup_tokens is not None else ()),
        *(("decay",) if training.schedule != "wsd" else ()),
        *(("final_rate",) if training.schedule == "constant" else ()),
        *(("betas", "eps") if training.optimizer == "adafactor" else ()),
    )


def warmup_ends(view: View) -> None:
    _ends(view, "training.warmup", "warm-up takes", "write fewer steps, or a share such as 0.03")


def warmup_in_tokens_is_for_tokens(view: View) -> None:
    """A batch of `pretrain` alone is told in tokens; and one warm-up is enough."""
    tokens, steps = view.value("training.warmup_tokens"), view.value("training.max_steps")
    if tokens is None:
        return
    objective, batch = view.value("training.objective"), view.value("training.global_batch")
    key = "training.warmup_tokens"
    if objective != "pretrain":
        view.wrong(key, f"{objective} counts documents, not tokens", "write warmup, in steps or as a share")
    elif view.stated_beside("training.warmup", key):
        view.wrong(
            key, "warmup says how long the warm-up is, too", "remove one of the two, or write warmup_tokens: null"
        )
    elif steps is not None and -(-tokens // batch) >= steps:
        what = f"warm-up takes {-(-tokens // batch)} steps of {batch} tokens, training stops after {steps}"
        view.wrong(key, what, "write fewer tokens")


def decay_ends(view: View) -> None:
    schedule = view.value("training.schedule")
    if schedule == "wsd":
        _ends(view, "training.decay", "the decay takes", "write fewer steps, or a share such as 0.1")
    elif view.stated_beside("training.decay", "training.schedule"):
        what = f"decay belongs to schedule: wsd, {schedule} has no stable part that it would end"
        view.wrong("training.decay", what, "remove it")


def _ends(view: View, key: str, takes: str, hint: str) -> None:
    length, steps = view.value(key), view.value("training.max_steps")
    if length >= 1 and length != int(length):
        view.wrong(key, f"{length} is neither a share below 1 nor a whole number of steps", f"write {round(length)}")
    elif length >= 1 and steps is not None and length >= steps:
        place = key if view.stated(key) else "training.max_steps"
        view.wrong(place, f"{takes} {length} steps, training stops after {steps}", hint)


def constant_does_not_fall(view: View) -> None:
    constant = view.value("training.schedule") == "constant"
    if constant and view.stated_beside("training.final_rate", "training.schedule"):
        view.wrong("training.final_rate", "a constant learning rate ends where it started", "remove it")


def moments_belong_to_adam(view: View) -> None:
    if view.value("training.optimizer") != "adafactor":
        return
    for name in ("betas", "eps"):
        if view.stated_beside(f"training.{name}", "training.optimizer"):
            view.wrong(f"training.{name}", f"{name} belongs to AdamW and Muon, adafactor has its own", "remove it")


def micro_batch_divides(view: View) -> None:
    whole, part = view.value("training.global_batch"), view.value("training.micro_batch")
    objective, unit = view.value("training.objective"), "documents"
    if objective in POLICY:
        whole, unit = whole // view.value("sampling.answers"), "prompts"
    if part == "auto" or objective == "pretrain" or whole % part == 0 or not whole:
        return
    near = max(size for size in range(1, min(part, whole) + 1) if whole % size == 0)
    what = f"a global batch of {whole} {unit} cannot be made of micro-batches of {part}"
    view.wrong("training.micro_batch", what, f"write {near}, or auto")


def batch_holds_a_pack(view: View) -> None:
    """`pretrain` fills rows of max_length tokens: a step is a whole number of them, never none."""
    if view.value("training.objective") != "pretrain":
        return
    batch, length = view.value("training.global_batch"), view.value("sequence.max_length")
    if batch < length:
        what = f"pretrain counts tokens, and a global batch of {batch} does not fill one pack of {length}"
        place = "training.global_batch" if view.stated("training.global_batch") else "training.objective"
        view.wrong(place, what, f"write a multiple of {length}, such as {8 * length}")
    if not view.value("sequence.packing"):
        view.wrong("sequence.packing", "pretrain lays documents into packs of max_length tokens", "remove it")


def best_is_known(view: View) -> None:
    if view.value("export.checkpoint") == "best" and view.value("eval_data") is None:
        what = "the best checkpoint is the one with the lowest held-out loss, and there is no eval_data"
        view.wrong("export.checkpoint", what, "add eval_data: {holdout: 0.02}, or write last")


RULES: tuple[Callable[[View], None], ...] = (
    warmup_ends,
    warmup_in_tokens_is_for_tokens,
    batch_holds_a_pack,
    decay_ends,
    constant_does_not_fall,
    moments_belong_to_adam,
    micro_batch_divides,
    best_is_known,
)

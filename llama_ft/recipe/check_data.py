"""Combinations of data keys that cannot work; the rules that `check` runs beside its own."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import suppress
from typing import Any

from llama_ft.recipe.objectives import COMPARED, ONLINE, PAIRS, POLICY
from llama_ft.recipe.schema import Data, Mixture
from llama_ft.recipe.view import Unknown, View

MOST = 10_000
"""The largest weight, and passes over a source per pass over the mixture, that a recipe can ask for."""
SLACK = 0.005
"""How far shares, which papers round, may miss 1 together; what is drawn is in their proportion."""
CONVERSATIONS = ("alpaca", "sharegpt", "messages", "prompt-completion")
NEEDS: dict[str, tuple[str, ...]] = {
    "pretrain": ("text",),
    **dict.fromkeys(PAIRS, ("preference",)),
    "kto": ("rated",),
    "sft": (*CONVERSATIONS, "text", "preference"),
    **dict.fromkeys(ONLINE, (*CONVERSATIONS, "preference", "rated")),
}
"""Layouts that an objective trains on. Of a pair sft learns the better answer. Prompts are drawn from whatever has
an answer: the last one is taken off, and is what exact_match and code compare with."""


def layout_fits(objective: str, layout: str) -> tuple[str, str] | None:
    """What is wrong with a layout for an objective, and what to do; None when they fit."""
    needed = NEEDS[objective]
    if layout in needed:
        return None
    if objective in ONLINE:
        return f"{objective} draws prompts from conversations, not from {layout} rows", "name rows with a user's turn"
    if objective == "sft":
        return f"sft cannot train on {layout} rows", "sft takes conversations, text and pairs; kto takes rated rows"
    hint = "write layout: text, or objective: sft" if objective == "pretrain" else f"use a set in layout {needed[0]}"
    return f"{objective} reads layout {needed[0]}, not {layout}", hint


def some_source_weighs(view: View) -> None:
    count = len(view.value("data"))
    if all(view.value(f"data.{number}.weight") == 0 for number in range(count)):
        view.wrong("data", "every source has weight 0, there is nothing to train on", "give one a weight above 0")


def streaming_ends(view: View) -> None:
    """A stream has no length and no second look: what needs either cannot be had."""
    if not view.value("mixture.streaming"):
        return
    if view.value("training.max_steps") is None:
        view.wrong("mixture.streaming", "a stream has no length to count epochs by", "add training.max_steps")
    if view.value("mixture.dedupe") != "none":
        view.wrong("mixture.dedupe", "copies are found in a prepared set, not in a stream", "write dedupe: none")
    if view.value("mixture.temperature") != 1:
        view.wrong("mixture.temperature", "a stream has no sizes to temper", "weigh the sources instead")
    for number in range(len(view.value("data"))):
        if view.stated(f"data.{number}.epochs"):
            view.wrong(f"data.{number}.epochs", "passes cannot be counted in a stream", "weigh the sources instead")
    with suppress(Unknown):
        if "holdout" in (view.shaped.data.get("eval_data") or {}):
            view.wrong("eval_data", "a share of a stream cannot be held out", "name rows of their own in eval_data")


def shares_are_whole(view: View) -> None:
    """Shares are of all tokens: every source has one, they come to 1, and nothing else says how often it is drawn."""
    sources = range(len(view.value("data")))
    shares = [view.value(f"data.{number}.share") for number in sources]
    if all(share is None for share in shares):
        return
    objective, streaming = view.value("training.objective"), view.value("mixture.streaming")
    for number, share in enumerate(shares):
        key = f"data.{number}.share"
        if share is None:
            what = "the other sources say which share of the tokens is theirs"
            view.wrong(f"data.{number}", what, "add share to this one", of_value=True)
        elif objective != "pretrain" or not streaming:
            hint = "write objective: pretrain with mixture: {streaming: true}, or weigh the sources instead"
            view.wrong(key, "shares of tokens are held by pretrain, from a stream", hint)
        elif view.value(f"data.{number}.weight") != 1:
            view.wrong(f"data.{number}.weight", "share says how often the source is drawn, too", "remove one of them")
    total = sum(share for share in shares if share is not None)
    if None not in shares and abs(total - 1) > SLACK:
        view.wrong("data.0.share", f"the shares of all sources come to {total:.4g}, not to 1", "mend one of them")


def stream_fits_objective(view: View) -> None:
    """What looks at rows before training, or at others of them, needs a prepared set."""
    objective = view.value("training.objective")
    if not view.value("mixture.streaming"):
        return
    if objective == "kto":
        what = "kto measures its KL on the answers of other rows, which a stream has not read yet"
        view.wrong("mixture.streaming", what, "write streaming: false")
    elif objective in COMPARED:
        what = f"{objective} numbers its rows, whose both answers a stream does not keep"
        view.wrong("mixture.streaming", what, "write streaming: false")
    elif objective in ONLINE:
        view.wrong("mixture.streaming", f"{objective} draws prompts from a prepared set", "write streaming: false")


def text_is_split(view: View) -> None:
    """Half an answer is another answer, and half a prompt asks for something else."""
    objective = view.value("training.objective")
    if view.value("sequence.overlong") != "split":
        return
    if objective in COMPARED:
        what = f"{objective} compares whole answers, which cannot be split"
    elif objective in ONLINE:
        what = f"{objective} answers whole prompts, which cannot be split"
    else:
        return
    view.wrong("sequence.overlong", what, "write drop or truncate")


def answers_are_learned_from(view: View) -> None:
    """Losses of answers speak of answers alone: a prompt has no chosen and no rejected side."""
    objective = view.value("training.objective")
    if objective in (*COMPARED, *POLICY) and view.value("sequence.train_on") == "all":
        what = f"{objective} compares answers, the prompt is not learned from"
        view.wrong("sequence.train_on", what, "write responses, or last_response")


def something_to_compare(view: View) -> None:
    """Decontamination takes rows out that overlap something: it must be named."""
    stated = view.shaped.data.get("eval_data")
    if view.value("mixture.decontaminate") and not view.value("mixture.benchmarks") and not isinstance(stated, list):
        what = "there is nothing that rows could overlap"
        hint = "add mixture.benchmarks: [humaneval, mbpp], or rows of their own in eval_data"
        view.wrong("mixture.decontaminate", what, hint)


def no_idle_key(view: View) -> None:
    """A key that another key's value makes meaningless."""
    defaults: dict[str, Any] = {name: field.default for name, field in Mixture.model_fields.items()}
    idle = (
        ("mixture.similarity", view.value("mixture.dedupe") != "near", "near copies", "dedupe: near"),
        ("mixture.shuffle_buffer", not view.value("mixture.streaming"), "a stream", "streaming: true"),
    )
    for key, unused, of_what, hint in idle:
        if unused and view.stated(key) and view.value(key) != defaults[key.rpartition(".")[2]]:
            view.wrong(key, f"speaks of {of_what}, which this recipe does not ask for", f"remove it, or write {hint}")


def infilling_has_text(view: View) -> None:
    if not view.stated("infilling"):
        return
    if view.value("training.objective") not in ("pretrain", "sft"):
        view.wrong("infilling", "only text that is trained on as it stands can be filled in", "remove infilling")
    tokens = view.value("infilling.tokens")
    if tokens is not None and len(set(tokens)) < len(tokens):
        view.wrong("infilling.tokens", "the four tokens must differ", "name four different ones")


def source_is_named(view: View, key: str) -> None:
    if any(bad.startswith(f"{key}.") for bad in view.shaped.bad):
        return  # a mistyped key may be the one that is missed here
    use, path, layout = (view.value(f"{key}.{name}") for name in ("use", "path", "layout"))
    if use is None and path is None:
        view.wrong(
            key, "a source needs use (a card) or path (a file)", "add use: NAME, or path and layout", of_value=True
        )
    elif use is not None and layout is not None:
        view.wrong(f"{key}.layout", "the card that use names has its own layout", "remove layout, or use")
    if view.value(f"{key}.unit") != "file" and layout not in (None, "text"):
        view.wrong(f"{key}.unit", f"unit speaks of plain text, not of {layout} rows", "remove unit")


def numbers_are_sane(view: View, key: str) -> None:
    """A pass over a source a million times is a slip of the pen."""
    for name in ("weight", "epochs"):
        value = view.value(f"{key}.{name}")
        if value is not None and value > MOST:
            view.wrong(f"{key}.{name}", f"{value:g} is more than {MOST:,}", "write a smaller number")


def split_has_a_card(view: View, key: str) -> None:
    if view.value(f"{key}.use") is None and view.value(f"{key}.split") != "train":
        view.wrong(f"{key}.split", "a file has no splits, only a card has", "remove split, or add use")


def quality_judges_text(view: View, key: str) -> None:
    """Steps are for text, each once; languages are for the steps that look at them."""
    steps, layout = view.value(f"{key}.quality"), view.value(f"{key}.layout")
    if steps and layout not in (None, "text"):
        view.wrong(f"{key}.quality", f"the steps judge text, not {layout} rows", "remove quality")
    if len(set(steps)) < len(steps):
        view.wrong(f"{key}.quality", "a step is named twice", "name each once")
    named = view.value(f"{key}.languages") != Data.model_fields["languages"].default
    if named and not {"language", "gopher-quality"} & set(steps):
        what = "no quality step of this source looks at the language"
        view.wrong(f"{key}.languages", what, "remove languages, or add quality: [language]")


def source_layout_fits(view: View, key: str) -> None:
    layout = view.value(f"{key}.layout")
    fault = layout_fits(view.value("training.objective"), layout) if layout is not None else None
    if fault is not None:
        view.wrong(f"{key}.layout", *fault)


def evaluation_is_whole(view: View, key: str) -> None:
    """Held-out rows are looked at once each: shares mean nothing there."""
    if not key.startswith("eval_data"):
        return
    for name, whole in (("weight", 1), ("epochs", None), ("share", None)):
        if view.value(f"{key}.{name}") != whole:
            view.wrong(f"{key}.{name}", "eval_data is evaluated whole, each row once", f"remove {name}")


RULES: tuple[Callable[[View], None], ...] = (
    some_source_weighs,
    streaming_ends,
    shares_are_whole,
    stream_fits_objective,
    text_is_split,
    answers_are_learned_from,
    something_to_compare,
    no_idle_key,
    infilling_has_text,
)
SOURCE_RULES: tuple[Callable[[View, str], None], ...] = (
    source_is_named,
    numbers_are_sane,
    split_has_a_card,
    source_layout_fits,
    quality_judges_text,
    evaluation_is_whole,
)

"""What a report shows of drawn answers and of scores: the best of K, groups of answers, accuracy by margin."""

from __future__ import annotations

import math
from typing import Any

from llama_ft.data.page.tokens import plural, safe
from llama_ft.recipe.objectives import POLICY
from llama_ft.train.page.curves import Curve, curve_html
from llama_ft.train.page.gather import ReportView
from llama_ft.train.page.html import number, section, table, text
from llama_ft.train.page.sections import answer_row

SHOWN = 4
"""Answers to a prompt from which on only the best and the worst are not folded."""
DAMAGED = (KeyError, TypeError, ValueError, AttributeError, IndexError, OverflowError)
"""What records of another version may raise."""
CHANCE = 0.5


def accuracy(view: ReportView) -> str:
    """eval/accuracy.json of a reward model: how often it is right, by margin; nothing without it."""
    if not view.accuracy:
        return ""
    try:
        rows = [_bucket(one) for one in view.accuracy]
        parts = [one for one in view.accuracy if one["bucket"] != "all"]
        whole = next((one for one in view.accuracy if one["bucket"] == "all"), None)
        verdict = _above_chance(whole) if whole else ""
        rated = any(one.get("by") == "rating" for one in parts)
    except DAMAGED:
        return _of_another_version("accuracy", "Accuracy", "eval/accuracy.json")
    by = (
        "by how much better the chosen answer was rated"
        if rated
        else "by how far the model's own two scores lie apart: clear calls should be right more often than close ones"
    )
    about = f"Held-out pairs at the last evaluation, {by}." if parts else "Held-out pairs at the last evaluation."
    head = ["rating apart" if rated else "scores apart", "pairs", "accuracy", "standard error"]
    return section("accuracy", "Accuracy", about, verdict + table("Accuracy", head, rows))


def _bucket(one: dict[str, Any]) -> list[str]:
    share, error = (f"{one[key]:.1%}" if math.isfinite(one[key]) else "–" for key in ("accuracy", "error"))
    return [safe(one["bucket"]), f"{one['pairs']:,}", share, error]


def _above_chance(whole: dict[str, Any]) -> str:
    share, error = float(whole["accuracy"]), float(whole["error"])
    if not math.isfinite(share) or not error > 0:
        return ""
    far = (share - CHANCE) / error
    side = "above" if far >= 0 else "below"
    said = f"{share:.1%} of {plural(whole['pairs'], 'pair')} rank right, {abs(far):.1f} standard errors {side} chance."
    return f'<p class="about">{said}</p>'


def scores(view: ReportView) -> str:
    """eval/samples.json of a reward model: held-out pairs and what both answers scored at each moment."""
    articles = []
    for place, sample in enumerate(view.samples, 1):
        try:
            during = sample.get("during") or {}
            moments = [("before", sample.get("before"))]
            moments += [(f"step {step}", during[step]) for step in sorted(during, key=int)]
            moments += [("after", sample.get("after"))]
            rows = [_scored(when, said) for when, said in moments if said is not None]
            answers = answer_row("chosen", sample["reference"]) + answer_row("rejected", sample["rejected"])
            question = f'<p class="asked" dir="auto">{text(sample["question"])}</p>'
        except DAMAGED:
            return _of_another_version("scores", "Scores", "eval/samples.json")
        told = table(f"Scores of pair {place}", ["", "chosen", "rejected", "difference"], rows) if rows else ""
        articles.append(f'<article class="sample"><h3>Pair {place}</h3>{question}<dl>{answers}</dl>{told}</article>')
    about = "Held-out pairs and what both answers scored. A difference above 0 puts the chosen answer first."
    return section("scores", "Scores", about, "".join(articles))


def _scored(when: str, said: dict[str, Any]) -> list[str]:
    chosen, rejected = float(said["chosen"]), float(said["rejected"])
    return [safe(when), number(chosen), number(rejected), f"<b>{chosen - rejected:+.3f}</b>"]


def best_of_k(view: ReportView) -> str:
    """sampled/best_of_k.json: the curve that rejection sampling climbs; nothing without it."""
    try:
        means = [(int(one["k"]), float(one["mean"])) for one in view.best_of_k]
        errors = [(int(one["k"]), float(one["error"])) for one in view.best_of_k]
    except DAMAGED:
        return _of_another_version("best", "Best of K", "sampled/best_of_k.json")
    curve = Curve("Mean reward of the best of k answers", means, by="k", errors=errors, large=True)
    about = (
        "The highest reward among k of the answers drawn to a prompt, exact over all choices of k, mean over prompts. "
        "Bars: one standard error over prompts."
    )
    drawn = curve_html(curve)
    return section("best", "Best of K", about, drawn and f'<div class="curves">{drawn}</div>')


def drawn(view: ReportView) -> str:
    """sampled/answers.jsonl: some prompts with the answers that were drawn to them, and what each was worth."""
    policy = view.objective in POLICY
    try:
        articles = [_group(group, policy=policy) for group in view.sampled]
    except DAMAGED:
        return _of_another_version("drawn", "Drawn answers", "sampled/answers.jsonl")
    if policy:
        about = "The answers to one prompt of each of the first and of the last steps, by their rewards."
    else:
        about = (
            "Some of the prompts. The first answer was tuned on: the one with the highest reward, and one that came to "
            "its end before any that was cut."
        )
    return section("drawn", "Drawn answers", about, "".join(articles))


def _group(group: dict[str, Any], *, policy: bool) -> str:
    """One prompt with its answers, the best first; those between the best and the worst are folded."""
    turns = group["turns"]
    asked = "\n".join(filter(None, (turns[-1]["content"], turns[-1].get("input"))))
    answers = sorted(group["answers"], key=lambda one: (not policy and one["ended"], one["reward"]), reverse=True)
    rows = [_drawn_answer(one, "" if policy or place else "after") for place, one in enumerate(answers)]
    if len(rows) > SHOWN:
        folded = f"<dl>{''.join(rows[1:-1])}</dl>"
        between = f"<summary>{plural(len(rows) - 2, 'answer')} between</summary>"
        rows = [rows[0], f"<div><details>{between}{folded}</details></div>", rows[-1]]
    before = "".join(answer_row(safe(turn["role"]), turn["content"], "turn") for turn in turns[:-1])
    earlier = plural(len(turns) - 1, "turn")
    context = before and f"<details><summary>{earlier} before</summary><dl>{before}</dl></details>"
    head = " · ".join([*([f"Step {group['step']:,}"] if "step" in group else []), safe(group["where"])])
    question = f'<p class="asked" dir="auto">{text(asked)}</p>'
    return f'<article class="sample"><h3>{head}</h3>{context}{question}<dl>{"".join(rows)}</dl></article>'


def _drawn_answer(one: dict[str, Any], kind: str) -> str:
    parts = one["parts"] if len(one["parts"]) > 1 else {}
    told = [f"{safe(name)} {number(value)}" for name, value in parts.items()]
    told += [] if one["ended"] else ["cut"]
    more = f"<small>{' · '.join(told)}</small>" if told else ""
    return answer_row(number(float(one["reward"])), one["text"], kind or "drawn", more)


def _of_another_version(anchor: str, title: str, file: str) -> str:
    return section(anchor, title, "", f"<p>{file} is of another version and cannot be shown.</p>")

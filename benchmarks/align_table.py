"""What each step of `benchmarks.align` gave: rewards, accuracy, KL, seconds and an answer, as a table.

Every model is asked the same held-out prompts with the same seeds, and its answers are scored by the chain's own reward
model. Its KL to another model is told from its own answers, in nats per token: the mean of e^(−d) − 1 + d over their
tokens, where d = log π − log π_other. Standard errors of rewards are over prompts.
"""

from __future__ import annotations

import argparse
import json
import math
import statistics
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from benchmarks.align import CHAIN, REWARD, RLOO, SFT, Link, overrides_of, rows, training_of
from benchmarks.scaling import machine
from llama_ft import load_recipe, prepare_data
from llama_ft.data.ends import lay_out
from llama_ft.files import write_json, write_text
from llama_ft.llama.base import locate_base
from llama_ft.llama.load import load_model
from llama_ft.recipe import Recipe
from llama_ft.recipe.run import Run
from llama_ft.train.asking import Answer, Asker, Prompt, context_of
from llama_ft.train.objectives.losses import k3
from llama_ft.train.online import HELD_OUT
from llama_ft.train.online_run import held_out_prompts
from llama_ft.train.rewards.rewards import Rewards

START = "start"
"""The row of the model that the chain starts from."""
TOGETHER = 8
"""Prompts that are asked, and read again, in one go."""
SHOWN = 240
"""Letters of a prompt or an answer that the table shows."""
Said = list[list[Answer]]


@dataclass(frozen=True)
class Mean:
    """A mean and its standard error; NaN where one value says nothing of it."""

    value: float
    error: float

    @classmethod
    def of(cls, values: Sequence[float]) -> Mean:
        error = statistics.stdev(values) / math.sqrt(len(values)) if len(values) > 1 else math.nan
        return cls(statistics.fmean(values), error)


def asking_recipe(options: argparse.Namespace) -> Recipe:
    """The last step's recipe with held-out prompts: how all models are asked and scored."""
    link = next(one for one in CHAIN if one.name == RLOO)
    held_out = rows(options.out / "data" / "held-out.jsonl", options.held_out_prompts)
    return load_recipe(link.recipe, [*overrides_of(link, options), f"eval_data={held_out}"])


def folders(options: argparse.Namespace) -> dict[str, Path]:
    """The models that write, by their step; the one that the chain starts from first."""
    merged = {link.name: Run(options.out / link.name).merged for link in CHAIN if link.name != REWARD}
    return {START: locate_base(base_of(options)), **merged}


def base_of(options: argparse.Namespace) -> str:
    """What the chain starts from, as its first recipe or the command line calls it."""
    return options.base or load_recipe(CHAIN[0].recipe).model.base


def model_of(folder: Path) -> Any:
    """A model to ask, in float32, as the chain computes."""
    model: Any = load_model(folder, torch.float32)
    return model.eval()


def ask(model: Any, prompts: Sequence[Prompt], answers: int, recipe: Recipe, prepared: Any, rewards: Rewards) -> Said:
    """Scored answers to each prompt, by the seeds of an evaluation."""
    asker = Asker(recipe, prepared, rewards, context_of(model))
    said: Said = []
    for first in range(0, len(prompts), TOGETHER):
        said += asker.ask(model, prompts[first : first + TOGETHER], answers, HELD_OUT)
    return said


@torch.no_grad()
def log_probs(model: Any, prompts: Sequence[Prompt], said: Said) -> torch.Tensor:
    """What a model thinks of answers, whoever gave them: log-probabilities of all their tokens, float32 [tokens]."""
    found = []
    for first in range(0, len(prompts), TOGETHER):
        part = zip(prompts[first : first + TOGETHER], said[first : first + TOGETHER], strict=True)
        batch = lay_out([(prompt.ids, [answer.ids for answer in group]) for prompt, group in part], share=True)
        layout = {name: batch[name] for name in ("input_ids", "position_ids", "cu_seqlens", "shared")}
        found.append(model(**layout, rows=batch["rows"], targets=batch["targets"]).log_probs)
    return torch.cat(found)


def others_of(name: str) -> list[str]:
    """The models that a model's KL is told to: the one that its step started from, and the first step's."""
    if name == START:
        return []
    link = next(one for one in CHAIN if one.name == name)
    return list(dict.fromkeys([link.start or START, *([] if name == SFT else [SFT])]))


def measure(options: argparse.Namespace) -> tuple[dict[str, Said], dict[tuple[str, str], float], list[Prompt]]:
    """The answers of every model, its KL to others by (model, other), and the prompts. Holds one model at a time."""
    recipe = asking_recipe(options)
    prepared, found = prepare_data(recipe), folders(options)
    prompts = held_out_prompts(prepared)
    said: dict[str, Said] = {}
    own: dict[str, torch.Tensor] = {}
    with Rewards.open(recipe, torch.device("cpu")) as rewards:
        for name, folder in found.items():
            model = model_of(folder)
            said[name] = ask(model, prompts, options.answers, recipe, prepared, rewards)
            own[name] = log_probs(model, prompts, said[name])
            print(f"asked: {name}", flush=True)
    kl: dict[tuple[str, str], float] = {}
    for other in found:
        askers = [name for name in found if other in others_of(name)]
        model = model_of(found[other]) if askers else None
        for name in askers:
            kl[name, other] = k3(own[name] - log_probs(model, prompts, said[name])).double().mean().item()
    return said, kl, prompts


def row_of(link: Link | None, options: argparse.Namespace, said: dict[str, Said], kl: dict[Any, float]) -> dict:
    """One line of the table: of a step, or of where the chain starts for None."""
    name = link.name if link is not None else START
    row: dict[str, Any] = {"step": name}
    if link is not None:
        row["seconds"] = training_of(link, options).seconds
    if name == REWARD:
        accuracy = json.loads((options.out / name / "eval" / "accuracy.json").read_text(encoding="utf-8"))[-1]
        return row | {"accuracy": accuracy["accuracy"], "accuracy_error": accuracy["error"], "pairs": accuracy["pairs"]}
    rewards, first = ([statistics.fmean(a.scored.total for a in group) for group in said[one]] for one in (name, SFT))
    reward, gain = Mean.of(rewards), Mean.of([one - other for one, other in zip(rewards, first, strict=True)])
    every = [answer for group in said[name] for answer in group]
    row |= {
        "reward": reward.value,
        "reward_error": reward.error,
        "answer_tokens": statistics.fmean(len(answer.ids) for answer in every),
        "ended": statistics.fmean(answer.ended for answer in every),
        "answer": every[0].text,
    }
    if name != SFT:
        row |= {"over_sft": gain.value, "over_sft_error": gain.error}
    start = (link.start or START) if link is not None else None
    if start is not None:
        row["kl_to_start"] = kl[name, start]
    if (name, SFT) in kl:
        row["kl_to_sft"] = kl[name, SFT]
    return row


def table(found: Sequence[dict[str, Any]]) -> str:
    """Markdown, a line for each step."""
    lines = [
        "| step | reward | over step 1 | pairs ranked right | KL to its start | KL to step 1 | tokens, ended | seconds "
        "| answer |",
        "|---|---|---|---|---|---|---|---|---|",
    ]
    for row in found:
        told = f"{row['answer_tokens']:.0f}, {row['ended']:.0%}" if "ended" in row else "–"
        ranked = "–"
        if "accuracy" in row:
            ranked = f"{row['accuracy']:.1%} ± {row['accuracy_error']:.1%} of {row['pairs']}"
        cells = [
            row["step"],
            *(_with_error(row, key, sign) for key, sign in (("reward", ""), ("over_sft", "+"))),
            ranked,
            *(f"{row[key]:.4f}" if key in row else "–" for key in ("kl_to_start", "kl_to_sft")),
            told,
            f"{row['seconds']:.0f}" if "seconds" in row else "–",
            shown(row["answer"]) if "answer" in row else "–",
        ]
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


def _with_error(row: dict[str, Any], key: str, sign: str) -> str:
    return f"{row[key]:{sign}.3f} ± {row[f'{key}_error']:.3f}" if key in row else "–"


def shown(text: str) -> str:
    """A text as a cell of a table has it: on one line, cut, and without what would end the cell."""
    line = " ".join(text.split()).replace("|", "\\|")
    return line if len(line) <= SHOWN else f"{line[:SHOWN]} …"


def report(options: argparse.Namespace) -> str:
    """Asks and scores all models, writes align.md and align.json, and returns the former."""
    said, kl, prompts = measure(options)
    found = [row_of(link, options, said, kl) for link in (None, *CHAIN)]
    about, asked = machine(), prompts[0].turns[-1]["content"]
    packages = ", ".join(f"{name} {number}" for name, number in about["versions"].items() if number)
    text = (
        f"# Llama-2-Chat's chain on {Path(base_of(options)).name}\n\n{about['cpu']}; {packages}; {about['date']}. "
        f"Rows: {options.data.name}, one conversation in five held out of all steps. Rewards are the second step's "
        f"scores of answers to {len(prompts)} held-out prompts, {options.answers} to each, drawn by all with the same "
        "seeds; ± is a standard error; KL in nats per token of own answers. What a small model says to people who lead "
        f"it astray may offend.\n\n{table(found)}\n\nThe prompt of these answers: {shown(asked)}\n"
    )
    write_text(options.out / "align.md", text)
    write_json(options.out / "align.json", {"machine": about, "steps": found, "prompt": asked, "kl": _named(kl)})
    return text


def _named(kl: dict[tuple[str, str], float]) -> dict[str, float]:
    return {f"{name} to {other}": value for (name, other), value in kl.items()}

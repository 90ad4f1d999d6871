"""Llama-2-Chat's chain on a laptop: supervised tuning, reward model, rejection sampling, RLOO, and what each gave.

    make align DATA=hh_rlhf_harmless_test.jsonl.gz
    python -m benchmarks.align --data PAIRS --out FOLDER

The four recipes llama-2-chat/smollm2-135m-* through `llama-ft train`, each from the merged model of the one before it.
A fifth of the conversations is held out of all four. A run that is finished is not repeated, one that was stopped goes
on; `--overwrite` begins again. At the end the models are asked the same held-out prompts with the same seeds
(benchmarks.align_table): FOLDER/align.md and align.json.
"""

from __future__ import annotations

import argparse
import hashlib
import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from benchmarks.runs import Training
from llama_ft.data.problems import Problems
from llama_ft.data.sources import open_sources
from llama_ft.errors import UserError, user_facing
from llama_ft.files import write_text
from llama_ft.recipe import load_recipe
from llama_ft.recipe.schema import Data

NEVER = 100_000
"""Steps between evaluations: one before the first step and one after the last are enough."""


@dataclass(frozen=True)
class Link:
    """One run of the chain. `start`: the link whose merged model it starts from; `limit`: the option that says on how
    many rows it learns; `judged`: whether it is scored by the reward model."""

    name: str
    recipe: str
    limit: str
    start: str | None = None
    judged: bool = False

    @property
    def stands_on(self) -> list[str]:
        """The links that must be there before it."""
        return [name for name in (self.start, REWARD if self.judged else None) if name is not None]


SFT, REWARD, REJECTION, RLOO = "1-sft", "2-reward", "3-rejection-sampling", "4-rloo"
CHAIN = (
    Link(SFT, "llama-2-chat/smollm2-135m-1-sft", "sft_rows"),
    Link(REWARD, "llama-2-chat/smollm2-135m-2-reward", "pairs", start=SFT),
    Link(REJECTION, "llama-2-chat/smollm2-135m-3-rejection-sampling", "prompts", start=SFT, judged=True),
    Link(RLOO, "llama-2-chat/smollm2-135m-4-rloo", "rloo_prompts", start=REJECTION, judged=True),
)


def opening(value: Any, where: str) -> str:
    """What a pair's conversation begins with. UserError for a row that is no pair."""
    said = value.get("prompt", value.get("chosen")) if isinstance(value, dict) else None
    if isinstance(said, str):
        return said.partition("\n\nAssistant:")[0]
    if isinstance(said, list) and said:
        return json.dumps(said[0])
    raise UserError("a row has neither a prompt nor a chosen answer", where=where, hint="rows such as HH-RLHF's")


def is_held_out(text: str, one_in: int) -> bool:
    """One conversation in so many, by a hash of what it begins with: all that begin alike stay together."""
    return hashlib.sha256(text.encode()).digest()[0] % one_in == 0


def split(data: Path, folder: Path, one_in: int = 5) -> tuple[Path, Path]:
    """Writes the rows to train on and those held out, one conversation in `one_in`, into `folder`, in their order.

    UserError for rows of no pair.
    """
    problems = Problems()
    (source,) = open_sources([Data(path=str(data), layout="preference")])
    parts: dict[bool, list[str]] = {False: [], True: []}
    for row, value in source.rows(problems):
        parts[is_held_out(opening(value, source.where(row)), one_in)].append(
            json.dumps(value, ensure_ascii=False) + "\n"
        )
    problems.raise_if_any()
    files = folder / "train.jsonl", folder / "held-out.jsonl"
    for file, lines in zip(files, parts.values(), strict=True):
        if not lines:
            raise UserError(f"{data} has too few rows to hold one in {one_in} of them out")
        write_text(file, "".join(lines))
    return files


def rows(file: Path, limit: int) -> str:
    """A source of a recipe, as an override has it."""
    return json.dumps([{"path": str(file), "layout": "preference", "limit": limit}])


def overrides_of(link: Link, options: argparse.Namespace) -> list[str]:
    """What the chain changes of a link's recipe."""
    out, data = options.out, options.out / "data"
    changed = [f"data={rows(data / 'train.jsonl', getattr(options, link.limit))}", f"output_dir={out / link.name}"]
    base = options.base if link.start is None else out / link.start / "merged"
    changed += [f"model.base={base}"] if base is not None else []
    changed += [f"rewards.0.model={out / REWARD / 'merged'}"] if link.judged else []
    if link.name == RLOO:
        changed += [f"training.max_steps={options.rloo_steps}"]
    if link.judged:
        return changed
    held_out = options.held_out_pairs if link.name == REWARD else options.held_out_prompts
    return [*changed, f"eval_data={rows(data / 'held-out.jsonl', held_out)}", f"training.eval_every={NEVER}"]


def command_of(link: Link, options: argparse.Namespace) -> list[str]:
    """The arguments of `llama-ft`."""
    return ["train", link.recipe, *overrides_of(link, options)]


def training_of(link: Link, options: argparse.Namespace) -> Training:
    """A link as a run."""
    return Training(options.out, link.name, command_of(link, options), link.stands_on)


def parse(arguments: list[str] | None = None) -> argparse.Namespace:
    """The command line; see the module's docstring."""
    parser = argparse.ArgumentParser(prog="benchmarks.align")
    parser.add_argument("--data", type=Path, required=True, help="pairs, such as HH-RLHF's harmless-base/test.jsonl.gz")
    parser.add_argument("--out", type=Path, default=Path("runs/align"), help="folder for the runs and the table")
    parser.add_argument("--base", help="model that the first step starts from", default=None)
    parser.add_argument("--sft-rows", type=int, default=384, help="rows of supervised tuning")
    parser.add_argument("--pairs", type=int, default=448, help="pairs that the reward model learns from")
    parser.add_argument("--prompts", type=int, default=160, help="prompts of rejection sampling")
    parser.add_argument("--rloo-prompts", type=int, default=1000, help="rows that RLOO's prompts are taken from")
    parser.add_argument("--rloo-steps", type=int, default=10, help="steps of RLOO, 64 answers each")
    parser.add_argument("--held-out-pairs", type=int, default=200, help="pairs that the reward model is judged on")
    parser.add_argument("--held-out-prompts", type=int, default=48, help="prompts that models are asked, at most 64")
    parser.add_argument("--answers", type=int, default=2, help="answers to each of them")
    parser.add_argument("--overwrite", action="store_true", help="repeat what is there")
    options = parser.parse_args(arguments)
    options.out = options.out.absolute()
    return options


def main() -> None:
    """See the module's docstring."""
    options = parse()
    with user_facing():
        split(options.data, options.out / "data")
        for link in CHAIN:  # a mistake in the last one is told before the first one costs anything
            load_recipe(link.recipe, overrides_of(link, options), look_up=False)
        for link in CHAIN:
            training_of(link, options).train(options.overwrite)
        from benchmarks.align_table import report

        print(f"\n{report(options)}")


if __name__ == "__main__":
    main()

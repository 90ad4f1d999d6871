"""What the objectives give on real rows and the whole SmolLM2-135M, each with its standard error: the longer runs.

    python -m benchmarks.align_studies --data FOLDER --out runs/studies
    python -m benchmarks.align_studies --data FOLDER --only dpo kto

The shipped laptop recipes through `llama-ft train`: a reward model, rejection sampling by it, DPO, KTO, GRPO. A quarter
of HH-RLHF's conversations, by a hash of what they begin with, is held out; KTO holds a fifth of its rows out, and the
sums of GRPO have held-out ones. A finished run is not repeated, a stopped one goes on. Each must show what
`benchmarks.align_claims` says; the command ends with status 1 where one does not. With `--write` the table goes to
`benchmarks/results/`.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from benchmarks.align import NEVER, rows, split
from benchmarks.align_claims import (
    Claim,
    best_of_claims,
    dpo_claims,
    grpo_claims,
    kto_claims,
    reward_claims,
    samples,
    series,
)
from benchmarks.align_table import shown
from benchmarks.machine import RESULTS, describe, machine
from benchmarks.runs import Training
from llama_ft.errors import user_facing
from llama_ft.files import write_json, write_text
from llama_ft.recipe import load_recipe
from llama_ft.recipe.run import Run

ONE_IN = 4
"""One conversation in so many is held out of HH-RLHF's: more than 500 pairs."""
PAIRS, VERDICTS = "hh_rlhf_harmless_test.jsonl.gz", "kto_en_demo.json"
REWARD, BEST_OF, DPO, KTO, GRPO = "reward", "best-of-k", "dpo", "kto", "grpo"


@dataclass(frozen=True)
class Study:
    """One run. `limit`: rows of HH-RLHF to train on, None for those that the recipe names; `held_out`: the same of
    those held out; `curve`: what of metrics.jsonl the table shows."""

    name: str
    recipe: str
    claims: Callable[[Run], list[Claim]]
    curve: str
    changes: list[str] = field(default_factory=list)
    limit: int | None = None
    held_out: int | None = None
    stands_on: list[str] = field(default_factory=list)

    def training(self, data: Path, out: Path) -> Training:
        """The run as `llama-ft` is told of it; data: the folder with the rows that are not the project's."""
        changes = [change.format(data=data, out=out) for change in self.changes]
        if self.limit is not None and self.held_out is not None:
            changes += [f"data={rows(out / 'data' / 'train.jsonl', self.limit)}"]
            changes += [f"eval_data={rows(out / 'data' / 'held-out.jsonl', self.held_out)}"]
        command = ["train", self.recipe, *changes, f"output_dir={out / self.name}"]
        return Training(out, self.name, command, self.stands_on)


EVERY = 10_000
"""More rows than there are."""
STUDIES = (
    Study(
        REWARD,
        "llama-2-chat/smollm2-135m-2-reward",
        reward_claims,
        "eval_accuracy",
        [f"training.eval_every={NEVER}"],
        EVERY,
        EVERY,
    ),
    Study(
        BEST_OF,
        "llama-2-chat/smollm2-135m-3-rejection-sampling",
        best_of_claims,
        "eval_reward",
        [f"rewards.0.model={{out}}/{REWARD}/merged", f"training.eval_every={NEVER}"],
        160,
        64,
        [REWARD],
    ),
    Study(DPO, "zephyr/smollm2-135m-dpo", dpo_claims, "eval_accuracy", [f"training.eval_every={NEVER}"], EVERY, EVERY),
    Study(
        KTO,
        "kto/smollm2-135m",
        kto_claims,
        "eval_loss",
        [f"data.0.path={{data}}/{VERDICTS}", "eval_data.holdout=0.2", "training.epochs=2", "training.eval_every=10"],
    ),
    Study(GRPO, "grpo/smollm2-135m-sums", grpo_claims, "eval_reward"),
)


def found_of(study: Study, training: Training) -> dict[str, Any]:
    """What a finished run shows: claims, a held-out curve, the first answers before and after."""
    claims = study.claims(training.run)
    kept = ("question", "before", "after")
    return {
        "study": study.name,
        "command": training.command,
        "seconds": training.seconds,
        "claims": [{"said": claim.said, "holds": claim.holds} for claim in claims],
        "curve": {"of": study.curve, "values": series(training.run, study.curve)},
        "samples": [{key: one.get(key) for key in kept} for one in samples(training.run)[:2]],
    }


def report(found: list[dict[str, Any]]) -> str:
    """Markdown: what was shown, line by line, then curves and answers."""
    lines = ["| study | minutes | shown | |", "|---|---|---|---|"]
    for one in found:
        for number, claim in enumerate(one["claims"]):
            name, minutes = ("", "") if number else (one["study"], f"{one['seconds'] / 60:.0f}")
            lines.append(f"| {name} | {minutes} | {claim['said']} | {'holds' if claim['holds'] else '**not**'} |")
    lines += ["", "| study | held-out curve, step: value |", "|---|---|"]
    for one in found:
        values = ", ".join(f"{step}: {value:.4f}" for step, value in one["curve"]["values"])
        lines.append(f"| {one['study']} | {one['curve']['of']}: {values} |")
    lines += ["", "| study | question | before | after |", "|---|---|---|---|"]
    for one in found:
        for sample in one["samples"]:
            cells = [shown(_text(sample[key])) for key in ("question", "before", "after")]
            lines.append(f"| {one['study']} | {' | '.join(cells)} |")
    return "\n".join(lines)


def _text(value: Any) -> str:
    return value if isinstance(value, str) else json.dumps(value)


def parse(arguments: list[str] | None = None) -> argparse.Namespace:
    """The command line; see the module's docstring."""
    names = [study.name for study in STUDIES]
    parser = argparse.ArgumentParser(prog="benchmarks.align_studies")
    parser.add_argument("--data", type=Path, required=True, help=f"folder with {PAIRS} and {VERDICTS}")
    parser.add_argument("--out", type=Path, default=Path("runs/studies"), help="folder for the runs")
    parser.add_argument("--only", nargs="+", choices=names, default=names, help="some of the studies")
    parser.add_argument("--overwrite", action="store_true", help="repeat what is there")
    parser.add_argument("--write", action="store_true", help="keep the table in benchmarks/results")
    options = parser.parse_args(arguments)
    options.out, options.data = options.out.absolute(), options.data.absolute()
    return options


def run(options: argparse.Namespace) -> list[dict[str, Any]]:
    """Trains what is not trained yet, and tells what all of it shows. SystemExit where a run does not end well."""
    split(options.data / PAIRS, options.out / "data", ONE_IN)
    studies = [study for study in STUDIES if study.name in options.only]
    trainings = [study.training(options.data, options.out) for study in studies]
    for training in trainings:  # a mistake in the last one is told before the first one costs anything
        load_recipe(training.command[1], training.command[2:], look_up=False)
    for training in trainings:
        training.train(options.overwrite)
    return [found_of(study, training) for study, training in zip(studies, trainings, strict=True)]


def main() -> None:
    """See the module's docstring."""
    options = parse()
    with user_facing():
        found = run(options)
    about = machine()
    text = f"`python -m benchmarks.align_studies {' '.join(sys.argv[1:])}`\n\n{describe(about)}.\n\n{report(found)}\n"
    print(text)
    if options.write:
        stem = f"align-studies-{about['date']}"
        write_text(RESULTS / f"{stem}.md", text)
        write_json(RESULTS / f"{stem}.json", {"machine": about, "studies": found})
    if not all(claim["holds"] for one in found for claim in one["claims"]):
        sys.exit(1)


if __name__ == "__main__":
    main()

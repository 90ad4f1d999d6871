"""Greedy answers: Subject.answers, which draws many side by side, beside transformers' `generate` called row by row.

    python -m benchmarks.generate [--model smollm2-135m] [--prompts 24] [--tokens 64]

Both compute in float32 with the same weights, prompts and end tokens; the prompts are held-out questions of the card
llama-qa in the model's own chat template. Answers must be equal token for token. Rounds are in turn; the fastest of
each counts, for noise only slows. Writes JSON and Markdown to `benchmarks/results/`.
"""

from __future__ import annotations

import argparse
import os
import sys
import time
from typing import Any

import torch
from transformers import LlamaForCausalLM

from benchmarks.machine import RESULTS, describe, machine
from llama_ft.evaluate.opening import open_model
from llama_ft.evaluate.subject import Subject
from llama_ft.files import write_json, write_text
from llama_ft.llama.base import locate_base

ROUNDS = 2


def questions(subject: Subject, count: int) -> list[list[int]]:
    """Prompts of the card's held-out questions, as ids."""
    from llama_ft.data.problems import Problems
    from llama_ft.data.sources import open_sources
    from llama_ft.recipe.schema import Data

    [source] = open_sources([Data(use="llama-qa", split="heldout")])
    rows = [row for _, row in source.rows(Problems())][:count]
    return [subject.renderer.prompt_ids(row["messages"][:1]) for row in rows]


@torch.inference_mode()
def row_by_row(model: Any, prompts: list[list[int]], tokens: int, stop: list[int]) -> list[list[int]]:
    """What transformers' generate adds to each prompt, one after the other."""
    found = []
    for prompt in prompts:
        ids = torch.tensor([prompt])
        said = model.generate(
            input_ids=ids,
            attention_mask=torch.ones_like(ids),
            max_new_tokens=tokens,
            do_sample=False,
            eos_token_id=stop,
            pad_token_id=stop[0],
        )
        found.append(said[0, len(prompt) :].tolist())
    return found


def main() -> None:
    """Runs both, compares, writes the result. Exit 1 where an answer differs."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--model", default="smollm2-135m")
    parser.add_argument("--prompts", type=int, default=24)
    parser.add_argument("--tokens", type=int, default=64)
    asked = parser.parse_args()
    here = machine()
    torch.set_num_threads(len(os.sched_getaffinity(0)))
    subject = open_model(asked.model)
    prompts = questions(subject, asked.prompts)
    plain = LlamaForCausalLM.from_pretrained(locate_base(asked.model), dtype=torch.float32).eval()
    stop = sorted(subject.stop)
    subject.answers(prompts[:2], 4)
    row_by_row(plain, prompts[:1], 4, stop)
    seconds: dict[str, list[float]] = {"ours": [], "transformers": []}
    for _ in range(ROUNDS):
        start = time.perf_counter()
        ours = [answer.tokens for [answer] in subject.answers(prompts, asked.tokens)]
        seconds["ours"].append(time.perf_counter() - start)
        start = time.perf_counter()
        theirs = row_by_row(plain, prompts, asked.tokens, stop)
        seconds["transformers"].append(time.perf_counter() - start)
    equal = sum(left == right for left, right in zip(ours, theirs, strict=True))
    count = sum(map(len, ours))
    best = {name: min(times) for name, times in seconds.items()}
    result = {"machine": here, "asked": vars(asked), "seconds": seconds, "equal": equal, "tokens": count}
    name = f"generate-{here['date']}"
    write_json(RESULTS / f"{name}.json", result)
    write_text(RESULTS / f"{name}.md", _markdown(asked, here, best, equal, len(prompts), count))
    print((RESULTS / f"{name}.md").read_text(encoding="utf-8"))
    sys.exit(0 if equal == len(prompts) else 1)


def _markdown(asked: Any, here: Any, best: dict[str, float], equal: int, prompts: int, tokens: int) -> str:
    rows = [
        f"| {name} | {spent:.1f} | {tokens / spent:.1f} | {best['transformers'] / spent:.2f}× |"
        for name, spent in best.items()
    ]
    return "\n".join(
        [
            f"`python -m benchmarks.generate --model {asked.model} --prompts {prompts} --tokens {asked.tokens}`",
            "",
            describe(here),
            "",
            f"{prompts} prompts, up to {asked.tokens} tokens each, {tokens:,} tokens in all, greedy, float32; "
            f"{equal} of {prompts} answers equal token for token; {torch.get_num_threads()} threads, best of {ROUNDS}.",
            "",
            "| | s | tokens/s | against row by row |",
            "|---|---|---|---|",
            *rows,
            "",
        ]
    )


if __name__ == "__main__":
    main()

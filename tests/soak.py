"""`python -m tests.soak --kills 100`: kills training runs at seeded moments, resumes them, compares them bit by bit.

Runs of every variant (LoRA, QLoRA and full; packed and padded) on SmolLM2-135M cut to two layers, each killed one to
four times before it may end. A line per run; what was done lies in FOLDER/soak.jsonl, so that Ctrl-C loses one run at
most and the same command goes on. Exit 1 when a run differed from the unbroken one.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import shutil
import tempfile
import time
from collections import Counter
from collections.abc import Sequence
from pathlib import Path

os.environ["HF_HUB_OFFLINE"] = "1"

from tests.train.kills import VARIANTS, Bench


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="tests.soak", description=__doc__)
    parser.add_argument("--kills", type=int, default=100, help="how many kills in all")
    parser.add_argument("--seed", type=int, default=0, help="which moments")
    parser.add_argument("--only", help="one variant, e.g. 'qlora, packed'")
    parser.add_argument("--folder", type=Path, help="where runs lie; one in the temporary folder by default")
    parser.add_argument("--base", type=Path, help="the model to train; SmolLM2-135M cut to two layers by default")
    given = parser.parse_args(arguments)
    folder = given.folder or Path(tempfile.gettempdir(), f"llama_ft-soak-{given.seed}")
    folder.mkdir(parents=True, exist_ok=True)
    base = given.base or small_base(folder / "base")
    log = folder / "soak.jsonl"
    chains = [json.loads(line) for line in log.read_text().splitlines()] if log.exists() else []
    started, benches = time.monotonic(), {}
    total = sum(len(chain["kills"]) for chain in chains)
    if total:
        print(f"{total} kills were done before: {log}")
    variants = [given.only] if given.only else list(VARIANTS)
    try:
        while total < given.kills:
            number = len(chains)
            variant = variants[number % len(variants)]
            if variant not in benches:
                benches[variant] = Bench(folder / variant.replace(", ", "-"), base, variant)
                benches[variant].unbroken()
            chain = one_run(benches[variant], number, random.Random(f"{given.seed} {number}"), given.kills - total)
            chains.append(chain)
            with log.open("a", encoding="utf-8") as file:
                file.write(json.dumps(chain) + "\n")
            total += len(chain["kills"])
            sites = "; ".join(f"{site} {nth} after step {step}" for step, site, nth in chain["kills"])
            print(
                f"{total}/{given.kills} · {time.monotonic() - started:.0f} s · {variant} · {sites} · "
                f"{'differs: ' + '; '.join(chain['differs']) if chain['differs'] else 'bit-identical'}",
                flush=True,
            )
    except KeyboardInterrupt:
        print("stopped; the same command goes on")
    return summary(chains, log)


def one_run(bench: Bench, number: int, draw: random.Random, most: int) -> dict:
    """A run killed one to four times, at most `most`, and what became of it."""
    name = f"run-{number}"
    shutil.rmtree(bench.folder / name, ignore_errors=True)
    kills = bench.killed(name, min(most, draw.randint(1, 4)), draw, [])
    differs = bench.differs(name)
    if not differs:
        shutil.rmtree(bench.folder / name)
    return {
        "run": name,
        "variant": bench.variant,
        "kills": [(step, kill.site, kill.nth) for step, kill in kills],
        "differs": differs,
    }


def summary(chains: list[dict], log: Path) -> int:
    """Prints what was found; the exit status."""
    kills = [kill for chain in chains for kill in chain["kills"]]
    wrong = [chain for chain in chains if chain["differs"]]
    for site, count in sorted(Counter(site for _, site, _ in kills).items()):
        print(f"  {count:3} {site}")
    for variant, count in Counter(chain["variant"] for chain in chains for _ in chain["kills"]).items():
        print(f"  {count:3} {variant}")
    verdict = f"{len(wrong)} of {len(chains)} runs differ, see {log}" if wrong else "all runs bit-identical"
    print(f"{len(kills)} kills, {verdict}")
    return 1 if wrong else 0


def small_base(folder: Path) -> Path:
    """SmolLM2-135M cut to two layers, made once."""
    from llama_ft.llama.smollm2 import smollm2_folder
    from tests.train.conftest import cut_short

    if not (folder / "tokenizer_config.json").is_file():
        cut_short(smollm2_folder(), folder)
    return folder


if __name__ == "__main__":
    raise SystemExit(main())

"""`pretrain` through the real trainer: a plain loop's curve, a mixture that is killed and goes on, losses by source."""

from __future__ import annotations

import json
import math
import random
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from transformers import AutoTokenizer

from benchmarks.plain_pretrain import plain_curve
from llama_ft import load_recipe, train_recipe
from llama_ft.data.prepare import prepare_data
from llama_ft.plan.steps import run_packs
from llama_ft.recipe.run import Run
from tests.conftest import ROOT
from tests.train.conftest import ENVIRONMENT
from tests.train.kills import Bench

SHARES = {"training.md": 0.5, "data.md": 0.3, "README.md": 0.2}


def sources(*, share: bool) -> str:
    """Three texts that lie in every checkout."""
    found = []
    for name, part in SHARES.items():
        path = ROOT / name if name == "README.md" else ROOT / "docs" / name
        found.append({"path": str(path), "layout": "text", "unit": "line"} | ({"share": part} if share else {}))
    return json.dumps(found)


def settings(tokenizer: Path, **changes: Any) -> list[str]:
    """A new `tiny` on these texts, all weights, LLaMA's optimizer: eight packs of 128 tokens a step, six steps."""
    wanted = {
        "model": "{base: preset:tiny, tokenizer: %s, dtype: float32}" % tokenizer,  # noqa: UP031 (braces are YAML's)
        "adapter": "{method: full}",
        "data": sources(share=False),
        "eval_data": "null",
        "template": "plain",
        "sequence": "{max_length: 128, overlong: split, train_on: all}",
        "training.objective": "pretrain",
        "training.global_batch": 1024,
        "training.micro_batch": 4,
        "training.max_steps": 6,
        "training.learning_rate": 3e-3,
        "training.betas": "[0.9, 0.95]",
        "training.weight_decay": 0.1,
        "training.final_rate": 0.1,
        "training.warmup_tokens": 2000,
        "training.save_every": 2,
        "training.eval_every": 3,
        "export.merged": "false",
        "tracking": "[]",
    } | changes
    return [f"{key}={value}" for key, value in wanted.items()]


def lines(run: Run, key: str) -> list[Any]:
    records = [json.loads(line) for line in run.metrics_file.read_text().splitlines()]
    return [record[key] for record in records if key in record]


def test_the_curve_is_that_of_a_plain_loop_over_the_same_packs(tiny_base, tmp_path):
    recipe = load_recipe("quickstart", [*settings(tiny_base), f"output_dir={tmp_path / 'run'}"])
    run = train_recipe(recipe)
    losses, norms = plain_curve(recipe, run, 6)
    assert lines(run, "loss") == pytest.approx(losses, abs=1e-4)
    assert lines(run, "grad_norm") == pytest.approx(norms, rel=1e-3)
    assert losses[-1] < losses[0] - 0.5 and max(norms) > 1.0  # it learns, and a gradient is clipped
    assert lines(run, "learning_rate")[:3] == pytest.approx([0, 1.5e-3, 3e-3])  # transformers logs the next step's
    assert lines(run, "tokens")[-1] == sum(sum(step.values()) for step in lines(run, "tokens_by_source"))


def test_a_streamed_mixture_that_is_killed_goes_on_with_the_same_tokens_and_weights(tiny_base, tmp_path):
    bench = Bench(tmp_path, tiny_base, "full, packed")
    changes = {"data": sources(share=True), "mixture": "{streaming: true, shuffle_buffer: 50, decontaminate: true}"}
    held = f'[{{"path": "{ROOT / "docs" / "plan.md"}", "layout": "text", "unit": "line"}}]'
    # Steps of more packs than a window of documents gives: a resume begins far inside the stream.
    changes |= {"training.global_batch": 16384, "training.micro_batch": 32}
    bench.settings = settings(tiny_base, **changes, eval_data=held)
    bench.unbroken()
    position = json.loads((Run(tmp_path / "unbroken").checkpoint(4) / "position.json").read_text())
    assert 0 < position["stream"]["packs"] <= 4 * 128 and max(position["stream"]["stream"]["tokens"]) > 10_000
    done = bench.killed("killed", 3, random.Random(11), ["step: gradient", "save: before the rename", "step: logged"])
    assert [kill for _, kill in done] and bench.differs("killed") == [], done
    told = lines(Run(tmp_path / "unbroken"), "tokens_by_source")
    tokens = {name: sum(step[name] for step in told) for name in SHARES}
    assert len(told) == 6 and all(tokens.values())
    bits = lines(Run(tmp_path / "unbroken"), "eval_bits_per_byte")
    nats = lines(Run(tmp_path / "unbroken"), "eval_loss")
    count = lines(Run(tmp_path / "unbroken"), "eval_labelled_tokens")[0]
    text = [one for one in (ROOT / "docs" / "plan.md").read_text().splitlines() if one.strip()]
    size = sum(len(one.encode()) for one in text)
    assert bits[-1] == pytest.approx(nats[-1] * count / math.log(2) / size, rel=1e-3)
    assert bits[-1] < bits[0]


def test_a_run_without_max_steps_reads_its_epochs_and_no_more(tiny_base, tmp_path):
    changes = {
        "training.max_steps": "null",
        "training.epochs": 1.5,
        "training.micro_batch": 3,
        "training.global_batch": 768,
    }
    recipe = load_recipe("quickstart", [*settings(tiny_base, **changes), f"output_dir={tmp_path / 'run'}"])
    prepared = prepare_data(recipe)
    packs = run_packs(recipe, prepared.mixture, prepared.lengths)
    run = train_recipe(recipe)
    assert len(lines(run, "loss")) == -(-len(packs) // 6)
    assert lines(run, "tokens")[-1] == int(prepared.lengths[np.concatenate(packs)].sum())
    assert run.lock["plan"]["steps"] == len(lines(run, "loss"))


def test_continued_from_a_run_with_lora_and_its_embedding(tiny_base, tmp_path):
    first = load_recipe(
        "quickstart", [*settings(tiny_base, **{"export.merged": "true"}), f"output_dir={tmp_path / 'first'}"]
    )
    train_recipe(first)
    changes = {
        "model": f"{{base: {tmp_path / 'first' / 'merged'}, dtype: float32}}",
        "adapter": "{method: lora, r: 4, modules_to_save: [embed_tokens, norms]}",
        "training.max_steps": 3,
        "export.merged": "true",
    }
    run = train_recipe(
        load_recipe("quickstart", [*settings(tiny_base, **changes), f"output_dir={tmp_path / 'second'}"])
    )
    assert lines(run, "loss")[0] < lines(Run(tmp_path / "first"), "loss")[0] - 0.5  # goes on where the first ended
    assert json.loads((run.path / "export.json").read_text())["ok"]
    assert len(AutoTokenizer.from_pretrained(run.path / "merged")) == 360


def test_two_processes_see_every_document_of_a_step_once(tiny_base, tmp_path):
    def wanted(world: int) -> list[str]:
        return [*settings(tiny_base, **{"training.micro_batch": 2}), f"output_dir={tmp_path / str(world)}"]

    one = train_recipe(load_recipe("quickstart", wanted(1)))
    launch = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2"]
    line = [*launch, "-m", "llama_ft.train", "quickstart", *wanted(2)]
    done = subprocess.run(line, capture_output=True, text=True, env=ENVIRONMENT, cwd=ROOT, timeout=300)
    assert done.returncode == 0, done.stderr[-3000:]
    two = Run(tmp_path / "2")
    assert lines(two, "loss") == pytest.approx(lines(one, "loss"), abs=1e-5)
    assert lines(two, "tokens_by_source") == lines(one, "tokens_by_source")
    for mine, theirs in zip(lines(one, "loss_by_source"), lines(two, "loss_by_source"), strict=True):
        assert theirs == pytest.approx(mine, abs=1e-5)

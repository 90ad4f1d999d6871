"""Runs on pairs, judged answers and sampled ones through the real trainer: they learn, go on exactly, name rows."""

from __future__ import annotations

import gzip
import json
import shutil
import subprocess
from pathlib import Path

import pytest

from llama_ft import load_recipe, train_recipe
from llama_ft.recipe import dump
from llama_ft.train.guards import Diverged
from tests.conftest import ROOT
from tests.train.conftest import ACCELERATE, ENVIRONMENT, metric

RATE = {"reward": 1e-3}
REAL = ("dpo", "reward")
"""Objectives that are shown on real rows and weights here; the others on a random model of two layers."""


@pytest.fixture(scope="module")
def pairs(tmp_path_factory, real_data) -> Path:
    """Real pairs of HH-RLHF, short ones."""
    file = tmp_path_factory.mktemp("rows") / "pairs.jsonl"
    with gzip.open(real_data / "preference" / "hh_rlhf_harmless_test.jsonl.gz", "rt") as rows:
        short = [line for line in rows if len(line) < 700][:56]
    file.write_text("".join(short))
    return file


@pytest.fixture(scope="module")
def judged(pairs) -> Path:
    """The same answers one by one, with a verdict."""
    file = pairs.with_name("judged.jsonl")
    rows = []
    for number, line in enumerate(pairs.read_text().splitlines()):
        row = json.loads(line)
        text = row["chosen" if number % 2 else "rejected"]
        prompt, _, answer = text.rpartition("\n\nAssistant: ")
        rows.append({"prompt": prompt, "completion": answer, "label": bool(number % 2)})
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return file


@pytest.fixture(scope="module")
def small_rows(tmp_path_factory) -> dict[str, Path]:
    """Pairs and judged answers that a tokenizer of 360 tokens writes in few."""
    folder = tmp_path_factory.mktemp("small")
    files = {"preference": folder / "pairs.jsonl", "rated": folder / "judged.jsonl"}
    asked = [(f"What does llama {n} eat?", f"Llama {n} eats grass.", f"Stones, {n} of them!") for n in range(56)]
    rows: dict[str, list[dict]] = {
        "preference": [{"prompt": q, "chosen": good, "rejected": bad} for q, good, bad in asked],
        "rated": [
            {"prompt": q, "completion": (bad, good)[n % 2], "label": bool(n % 2)}
            for n, (q, good, bad) in enumerate(asked)
        ],
    }
    for layout, file in files.items():
        file.write_text("".join(json.dumps(row) + "\n" for row in rows[layout]))
    return files


@pytest.fixture
def aligned(tiny_base, small_base, pairs, judged, small_rows, tmp_path):
    """A recipe with an objective, made small; more overrides may follow. real: on two layers of SmolLM2 and HH-RLHF."""

    def make(objective: str, *overrides: str, run: str = "run", real: bool = False):
        layout = "rated" if objective == "kto" else "preference"
        rows = {"preference": pairs, "rated": judged}[layout] if real else small_rows[layout]
        return load_recipe(
            "quickstart",
            [
                f"model.base={small_base if real else tiny_base}",
                f"training.objective={objective}",
                "data.0.use=null",
                f"data.0.path={rows}",
                f"data.0.layout={layout}",
                "eval_data={holdout: 0.2}",
                "training.global_batch=8",
                "training.micro_batch=4",
                "training.max_steps=8",
                "training.epochs=3",
                "training.save_every=4",
                "training.eval_every=8",
                f"training.learning_rate={RATE.get(objective, 5e-4)}",
                f"output_dir={tmp_path / run}",
                *overrides,
            ],
        )

    return make


@pytest.mark.parametrize(
    ("objective", "extra"),
    [
        ("dpo", ()),
        ("kto", ("preference.beta=0.5",)),
        ("orpo", ()),
        ("simpo", ("preference.beta=2.0",)),
        ("reward", ()),
    ],
)
def test_it_learns_its_objective(aligned, objective, extra, tmp_path):
    """The loss of the training set falls, the export is proven, and every figure is there."""
    run = train_recipe(aligned(objective, "training.max_steps=12", *extra, real=objective in REAL))
    losses = metric(run.path)
    assert sum(losses[-3:]) < sum(losses[:3])
    assert json.loads(run.proof_file.read_text())["ok"]
    records = [json.loads(line) for line in run.metrics_file.read_text().splitlines()]
    told = [one for one in records if "eval_loss" in one][-1]
    assert told["eval_items"] == 11
    if objective != "kto":
        assert sum(metric(run.path, "accuracy")[-3:]) > 1.5 and "eval_accuracy" in told
    if objective in ("orpo", "simpo"):  # of the small rows, which all teach the same
        margins = metric(run.path, "eval_margin")
        assert margins[-1] > margins[0]
    if objective == "reward":
        buckets = json.loads((run.path / "eval" / "accuracy.json").read_text())
        assert buckets[-1]["pairs"] == 11 == sum(one["pairs"] for one in buckets[:-1])
        samples = json.loads(run.samples_file.read_text())
        assert samples[0]["before"] != samples[0]["after"] and set(samples[0]["after"]) == {"chosen", "rejected"}


def test_micro_batches_and_references_do_not_show(aligned):
    """The same curve cut otherwise, laid out plainly, and with the reference asked for beforehand, or as a copy."""
    curves = {}
    for name, extra in {
        "whole": ("training.micro_batch=8",),
        "cut": ("training.micro_batch=2",),
        "plain": ("sequence.packing=false",),
        "precomputed": ("preference.reference=precomputed",),
        "copy": ("preference.reference=copy",),
    }.items():
        run = train_recipe(
            aligned("dpo", "training.max_steps=3", "eval_data=null", "export.merged=false", *extra, run=name)
        )
        curves[name] = metric(run.path)
    for name, curve in curves.items():
        assert curve == pytest.approx(curves["whole"], abs=1e-5), name


def test_kto_does_not_see_how_a_step_is_cut(aligned):
    curves = []
    for size in (8, 2):
        extra = ("training.max_steps=3", "eval_data=null", "export.merged=false", f"training.micro_batch={size}")
        weights = (
            "preference.desirable_weight=4.0",
            "preference.undesirable_weight=0.25",
        )  # all become likelier: z > 0
        run = train_recipe(aligned("kto", "preference.beta=0.5", *weights, *extra, run=f"cut-{size}"))
        curves.append((metric(run.path), metric(run.path, "kl")))
    for one, other in zip(*curves, strict=True):
        assert one == pytest.approx(other, abs=1e-5)
    assert max(curves[0][1]) > 0


def test_a_step_that_breaks_names_its_pairs(aligned, small_rows):
    recipe = aligned("dpo", "training.learning_rate=1.0e+19", "training.max_grad_norm=0", "training.warmup=0")
    with pytest.raises(Diverged) as error:
        train_recipe(recipe)
    block = error.value.block()
    assert "the weights are broken, not a row" in block and "faults" in block
    faults = next(Path(recipe.run_dir).glob("faults/*.jsonl")).read_text().splitlines()
    records = [json.loads(line) for line in faults]
    assert len(records) == 8 and all("rejected" in one and one["text"] != one["rejected"] for one in records)
    assert all(f"{small_rows['preference'].name}, row " in one["where"] for one in records)


def test_a_resumed_run_is_exact(aligned):
    """Also where the reference was asked beforehand: it is that of the start and not of the checkpoint."""
    full = ("adapter.method=full", "preference.reference=precomputed", "export.merged=false", "eval_data=null")
    recipe = aligned("dpo", *full, "training.learning_rate=1.0e-4", "training.max_steps=4", "training.save_every=2")
    run = train_recipe(recipe)
    whole = {key: metric(run.path, key) for key in ("loss", "margin", "grad_norm")}
    assert whole["margin"][-1] != 0
    shutil.rmtree(run.checkpoint(4))
    train_recipe(recipe, resume=True)
    assert {key: metric(run.path, key) for key in whole} == whole


@pytest.mark.parametrize(
    ("objective", "config", "extra"),
    [
        ("dpo", "cpu_ddp_2", ()),
        pytest.param("kto", "cpu_ddp_2", (), marks=pytest.mark.slow),
        pytest.param("reward", "cpu_zero2_2", (), marks=pytest.mark.slow),
        pytest.param("dpo", "cpu_fsdp2_2", (), marks=pytest.mark.slow),
        pytest.param("dpo", "cpu_zero3_2", (), marks=pytest.mark.slow),
        pytest.param("dpo", "cpu_fsdp2_2", ("adapter.method=full",), marks=pytest.mark.slow),
    ],
)
def test_two_processes_train_as_one(aligned, tmp_path, objective, config, extra):
    """Items dealt to two processes, one of them with less to do in the last step: the curve of one."""
    keys = ("training.max_steps=3", "export.merged=false", "training.micro_batch=2", *extra)
    recipe = aligned(objective, *keys, run="one")
    one = train_recipe(recipe)
    file = tmp_path / "two.yaml"
    file.write_text(dump(recipe.model_copy(update={"output_dir": str(tmp_path / "two")})))
    launch = str(ROOT / "accelerate_configs" / f"{config}.yaml")
    line = [*ACCELERATE, "--config_file", launch, "-m", "llama_ft.train", str(file)]
    done = subprocess.run(line, capture_output=True, text=True, env=ENVIRONMENT, timeout=500)
    assert done.returncode == 0, done.stderr[-3000:]
    for key in ("loss", "kl" if objective == "kto" else "margin", "eval_loss", "eval_items"):
        assert metric(tmp_path / "two", key) == pytest.approx(metric(one.path, key), abs=1e-5), key
        assert metric(one.path, key)

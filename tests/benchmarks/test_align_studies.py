"""The longer runs on answers: what they are told, and that every claim of theirs can fail."""

from __future__ import annotations

import json
import os
import random
import statistics
from pathlib import Path
from types import SimpleNamespace

import pytest

from benchmarks import align_claims, align_studies
from benchmarks.align_studies import BEST_OF, DPO, GRPO, KTO, PAIRS, REWARD, STUDIES, VERDICTS
from llama_ft.recipe import load_recipe
from llama_ft.recipe.run import Run

BY_NAME = {study.name: study for study in STUDIES}


def held_out_of(values: dict[str, tuple[float, float]]) -> list[dict]:
    """Lines of metrics.jsonl: before the first step, two steps, after the last."""
    before, after = ({f"eval_{key}": both[side] for key, both in values.items()} for side in (0, 1))
    return [{"step": 0, **before}, {"step": 1, "loss": 1.0}, {"step": 2, "loss": 1.0}, {"step": 2, **after}]


def run_of(folder: Path, metrics: list[dict], count: int = 400) -> Run:
    run = Run(folder)
    for file in (run.metrics_file, run.path / "eval" / "samples.json", run.path / "sampled" / "answers.jsonl"):
        file.parent.mkdir(parents=True, exist_ok=True)
    run.metrics_file.write_text("".join(json.dumps(line) + "\n" for line in metrics))
    sources = [{"role": "train", "kept": 900, "held_out": 0}, {"role": "eval", "kept": count, "held_out": 0}]
    run.lock_file.write_text(json.dumps({"data": {"sources": sources}}))
    return run


def holds(claims: list[align_claims.Claim]) -> list[bool]:
    return [claim.holds for claim in claims]


@pytest.mark.parametrize(
    ("accuracy", "pairs", "clearest", "expected"),
    [
        (0.6, 555, 0.7, [True, True]),
        (0.6, 499, 0.7, [False, True]),
        (0.55, 555, 0.7, [False, True]),  # 2.4 standard errors
        (0.6, 555, 0.5, [True, False]),
    ],
)
def test_a_reward_model(tmp_path, accuracy, pairs, clearest, expected):
    run = run_of(tmp_path, [])
    shares = [("a", 0.52), ("b", 0.55), ("c", 0.6), ("d", clearest), ("all", accuracy)]
    told = [{"bucket": name, "pairs": pairs, "accuracy": share, "error": 0.02} for name, share in shares]
    (run.path / "eval" / "accuracy.json").write_text(json.dumps(told))
    assert holds(align_claims.reward_claims(run)) == expected


def test_normal_order_statistics():
    """E max of 2: 1/√π; of 3: 3/(2√π); of 8 as tables have it (Harter 1961)."""
    assert align_claims.normal_best_of(1) == pytest.approx(0, abs=1e-9)
    assert align_claims.normal_best_of(2) == pytest.approx(0.5641896, abs=1e-6)
    assert align_claims.normal_best_of(3) == pytest.approx(0.8462844, abs=1e-6)
    assert align_claims.normal_best_of(8) == pytest.approx(1.4236003, abs=1e-6)
    draw = random.Random(0)
    spreads = [align_claims.spread_of([draw.gauss(0, 2) for _ in range(4)]) for _ in range(20000)]
    assert statistics.fmean(spreads) == pytest.approx(2, rel=0.01)


def best_of(folder: Path, groups: list[list[float]]) -> list[bool]:
    from llama_ft.train.rejection import best_of_k

    run = run_of(folder, [])
    said = [{"answers": [{"reward": reward} for reward in group]} for group in groups]
    (run.path / "sampled" / "answers.jsonl").write_text("".join(json.dumps(one) + "\n" for one in said))
    (run.path / "sampled" / "best_of_k.json").write_text(json.dumps(best_of_k(said)))
    return holds(align_claims.best_of_claims(run))


def test_the_best_of_k(tmp_path):
    """Normal rewards pass whatever a prompt's own mean; one lucky answer in eight has another rise; none has none."""
    draw = random.Random(0)
    normal = [[draw.gauss(mean, 1) for _ in range(8)] for mean in range(160)]
    assert best_of(tmp_path / "normal", normal) == [True, True]
    lucky = [[float(draw.random() < 0.02) for _ in range(8)] for _ in range(160)]
    assert best_of(tmp_path / "lucky", [[one + 1e-9 * draw.random() for one in group] for group in lucky])[0] is False
    fading = [[8.0 - place + draw.random() for place in range(8)] for _ in range(160)]
    assert best_of(tmp_path / "fading", fading)[1] is False


@pytest.mark.parametrize(
    ("margin", "share", "count", "expected"),
    [
        (0.3, 0.6, 400, [True, True]),
        (-0.1, 0.6, 400, [False, True]),
        (0.3, 0.55, 400, [True, False]),  # 2 standard errors
        (0.3, 0.6, 100, [True, False]),
    ],
)
def test_dpo(tmp_path, margin, share, count, expected):
    run = run_of(tmp_path, held_out_of({"margin": (0.0, margin), "accuracy": (0.5, share)}), count)
    assert holds(align_claims.dpo_claims(run)) == expected


def test_kto(tmp_path):
    def claims(chosen: float, rejected: float, loss: float) -> list[bool]:
        values = {"rewards_chosen": (0.0, chosen), "rewards_rejected": (0.0, rejected), "loss": (0.5, loss)}
        return holds(align_claims.kto_claims(run_of(tmp_path, held_out_of(values))))

    assert claims(0.1, -0.1, 0.4) == [True, True]
    assert claims(0.1, 0.2, 0.4) == [False, True]
    assert claims(-0.1, -0.2, 0.6) == [True, False]


def test_grpo(tmp_path):
    def claims(after: float, last: float, count: int = 60) -> list[bool]:
        values = {"reward": (0.1, after + 0.1), "reward/exact_match": (0.05, after)}
        shares = [0.04, 0.06] * 5 + [last - 0.01, last + 0.01] * 5
        steps = [{"step": step, "reward/exact_match": share} for step, share in enumerate(shares, 1)]
        return holds(align_claims.grpo_claims(run_of(tmp_path, [*held_out_of(values), *steps], count)))

    assert claims(0.4, 0.4) == [True, True]
    assert claims(0.15, 0.4) == [False, True]
    assert claims(0.4, 0.05) == [True, False]


def test_nothing_is_claimed_of_a_run_that_was_not_judged_before_it_began(tmp_path):
    values = held_out_of({"margin": (0.0, 1.0), "accuracy": (0.5, 0.9)})
    with pytest.raises(ValueError, match="before and after"):
        align_claims.dpo_claims(run_of(tmp_path, values[1:]))


def test_what_the_runs_are_told(real_data, tmp_path):
    """The real recipes take it; no conversation is on both sides; enough pairs are held out."""
    said = align_studies.parse(["--data", str(real_data / "preference"), "--out", str(tmp_path)])
    assert {PAIRS, VERDICTS} <= {file.name for file in said.data.iterdir()}
    files = align_studies.split(said.data / PAIRS, tmp_path / "data", align_studies.ONE_IN)
    held_out, train = files[1].read_text().count("\n"), files[0].read_text().count("\n")
    assert held_out > 550 and held_out + train == 2312
    (tmp_path / REWARD / "merged").mkdir(parents=True)
    recipes = {}
    for study in STUDIES:
        training = study.training(said.data, said.out)
        recipes[study.name] = load_recipe(training.command[1], training.command[2:])
        assert recipes[study.name].output_dir == str(tmp_path / study.name)
    assert recipes[BEST_OF].rewards[0].model == str(tmp_path / REWARD / "merged")
    assert {recipes[name].data[0].path for name in (REWARD, BEST_OF, DPO)} == {str(files[0])}
    assert {recipes[name].eval_data[0].path for name in (REWARD, BEST_OF, DPO)} == {str(files[1])}
    assert recipes[KTO].data[0].path == str(said.data / VERDICTS) and recipes[GRPO].data[0].use == "small-sums"
    assert {recipe.model.base for recipe in recipes.values()} == {"smollm2-135m"}


def test_the_table(tmp_path):
    run = run_of(tmp_path / DPO, held_out_of({"margin": (0.0, 0.3), "accuracy": (0.5, 0.55)}))
    said = [{"question": "Why | how?", "before": "No.", "after": "Yes."}] * 3
    (run.path / "eval" / "samples.json").write_text(json.dumps(said))
    found = align_studies.found_of(BY_NAME[DPO], SimpleNamespace(run=run, command=["train"], seconds=600.0))
    text = align_studies.report([found])
    assert "| dpo | 10 | held-out margin 0.000 → 0.300 | holds |" in text
    assert "55.0% ± 2.5% of 400 held-out pairs | **not** |" in text
    assert "| dpo | eval_accuracy: 0: 0.5000, 2: 0.5500 |" in text
    assert text.count("| dpo | Why \\| how? | No. | Yes. |") == 2


@pytest.mark.slow
def test_every_claim_holds(real_data, tmp_path):
    """All of it on the whole model, an hour or two. STUDIES_OUT: a folder whose finished runs are taken as they are."""
    out = os.environ.get("STUDIES_OUT", str(tmp_path))
    found = align_studies.run(align_studies.parse(["--data", str(real_data / "preference"), "--out", out]))
    broken = [claim["said"] for one in found for claim in one["claims"] if not claim["holds"]]
    assert len(found) == len(STUDIES) and broken == []

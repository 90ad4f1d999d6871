"""Policies that sample: they learn what is rewarded, draw the same after a resume, and blame what breaks by name."""

from __future__ import annotations

import json
import shutil
import subprocess
from itertools import combinations
from pathlib import Path
from statistics import mean

import pytest
import torch
from transformers import AutoTokenizer

from llama_ft import load_recipe, train_recipe
from llama_ft.errors import UserError
from llama_ft.recipe import dump
from llama_ft.serve.chat import chat
from llama_ft.train.rejection import best_of, best_of_k
from tests.conftest import ROOT
from tests.train.conftest import ACCELERATE, ENVIRONMENT, metric

ROWS = 24
LETTER = "def worth(prompt, answer, reference):\n    return answer.count('e') / 10\n"


@pytest.fixture(scope="module")
def rows(tmp_path_factory) -> Path:
    """Questions with short answers."""
    file = tmp_path_factory.mktemp("rows") / "rows.jsonl"
    turns = [
        [{"role": "user", "content": f"Say number {n}."}, {"role": "assistant", "content": f"{n} is the number."}]
        for n in range(ROWS)
    ]
    file.write_text("".join(json.dumps({"messages": one}) + "\n" for one in turns))
    return file


@pytest.fixture
def policy(tiny_base, rows, tmp_path):
    """A recipe of an objective that samples, made small; its reward is a function in a file of the user's."""

    def make(objective: str, *overrides: str, run: str = "run", worth: str = LETTER):
        (tmp_path / "worth.py").write_text(worth)
        size = ["training.global_batch=8"] if objective == "rejection_sampling" else ["training.global_batch=32"]
        return load_recipe(
            "quickstart",
            [
                f"model.base={tiny_base}",
                f"training.objective={objective}",
                "data.0.use=null",
                f"data.0.path={rows}",
                "data.0.layout=messages",
                "eval_data={holdout: 0.2}",
                *size,
                "training.micro_batch=4",
                "training.max_steps=6",
                "training.epochs=20",
                "training.save_every=3",
                "training.eval_every=3",
                "training.schedule=constant",
                "training.warmup=0",
                "training.learning_rate=3e-3",
                "sampling={answers: 4, max_new_tokens: 12}",
                f"rewards=[{{function: '{tmp_path / 'worth.py'}:worth'}}]",
                f"output_dir={tmp_path / run}",
                *overrides,
            ],
        )

    return make


@pytest.mark.parametrize("objective", ["grpo", "rloo"])
def test_a_policy_learns_what_is_rewarded(policy, objective, capsys):
    extra = ("policy.whiten=true",) if objective == "rloo" else ()
    run = train_recipe(
        policy(objective, "training.max_steps=16", "training.eval_every=16", "training.learning_rate=1e-2", *extra)
    )
    rewards = metric(run.path, "reward")
    assert len(rewards) == 16 and mean(rewards[-4:]) > mean(rewards[:4])
    kl = metric(run.path, "kl")
    assert kl[0] == pytest.approx(0, abs=1e-6) and kl[-1] > 1e-4
    assert json.loads(run.proof_file.read_text())["ok"]
    held_out = metric(run.path, "eval_reward")
    assert held_out[-1] > held_out[0] and metric(run.path, "eval_loss") == [-one for one in held_out]
    chat(str(run.path), once="Say number 1.", temperature=0, max_tokens=4)
    assert capsys.readouterr().out
    lines = [json.loads(line) for line in (run.path / "sampled" / "answers.jsonl").read_text().splitlines()]
    assert [one["step"] for one in lines] == list(range(1, 17)) and len(lines[0]["answers"]) == 4


def test_a_resumed_policy_draws_the_same(policy):
    """Gone on with from step 3, by its own weights and random numbers: curve and answers are those of one go."""
    recipe = policy("grpo", "export.merged=false")
    run = train_recipe(recipe)
    said = run.path / "sampled/answers.jsonl"
    whole = [metric(run.path, key) for key in ("loss", "reward", "kl", "eval_reward")] + [said.read_text()]
    shutil.rmtree(run.checkpoint(6))
    train_recipe(recipe, resume=True)
    assert [metric(run.path, key) for key in ("loss", "reward", "kl", "eval_reward")] + [said.read_text()] == whole


@pytest.mark.parametrize("objective", ["grpo", "rloo"])
def test_micro_batches_do_not_show_in_what_is_learnt(policy, objective):
    """Drawn and judged for the step as a whole: how it is cut, or laid out, moves the curve by rounding alone."""
    curves = []
    for extra in (("training.micro_batch=8",), ("training.micro_batch=2", "sequence.packing=false")):
        keys = ["training.max_steps=2", "eval_data=null", "export.merged=false", *extra]
        keys += ["policy.whiten=true"] if objective == "rloo" else []
        run = train_recipe(policy(objective, *keys, run=extra[0][-1]))
        curves.append([metric(run.path, key) for key in ("reward", "loss", "kl", "grad_norm")])
    for one, other in zip(*curves, strict=True):
        assert one == pytest.approx(other, abs=1e-5, rel=1e-3)


def test_scores_are_whitened_before_the_distance_is_taken_off(policy, monkeypatch):
    """Llama 2, section 3.2.3: R = whiten(score) − β · KL, so that β weighs against scores of deviation 1."""
    from llama_ft.train import online

    seen = []
    monkeypatch.setattr(online, "leave_one_out", lambda rewards, answers: seen.append(rewards) or rewards)
    monkeypatch.setattr(online, "per_end", lambda values, ends: torch.ones(len(ends) - 1))  # every answer's KL is 1
    keys = ("policy.whiten=true", "policy.kl=0.5", "training.max_steps=1", "eval_data=null", "export.merged=false")
    train_recipe(policy("rloo", *keys))
    assert seen[0].mean().item() == pytest.approx(-0.5, abs=1e-5)
    assert seen[0].std(unbiased=False).item() == pytest.approx(1, abs=1e-4)


def test_rejection_sampling_tunes_on_the_best(policy, tmp_path):
    run = train_recipe(policy("rejection_sampling"))
    groups = [json.loads(line) for line in (run.path / "sampled" / "answers.jsonl").read_text().splitlines()]
    assert len(groups) == 19 and all(len(one["answers"]) == 4 for one in groups)
    curve = json.loads((run.path / "sampled" / "best_of_k.json").read_text())
    means = [one["mean"] for one in curve]
    assert means == sorted(means) and means[-1] > means[0]
    for k, told in enumerate(means, 1):
        every = [[one["reward"] for one in group["answers"]] for group in groups]
        assert told == pytest.approx(mean(mean(max(some) for some in combinations(group, k)) for group in every))
    losses = metric(run.path)
    assert losses[-1] < losses[0] and metric(run.path, "eval_reward")
    assert json.loads(run.proof_file.read_text())["ok"]


def test_a_run_that_was_stopped_draws_no_block_again(policy, monkeypatch):
    """Killed while it draws: what was drawn before is read."""
    from llama_ft.train import asking, rejection

    monkeypatch.setattr(rejection, "BLOCK", 8)
    keys = ("training.max_steps=1", "export.merged=false", "eval_data=null", "training.seed=7")
    drawn: list[int] = []
    real = asking.sample

    def until(last: int):
        def draw(model, prompts, **said):
            if len(drawn) == last:
                raise KeyboardInterrupt
            drawn.append(len(prompts))
            return real(model, prompts, **said)

        return draw

    monkeypatch.setattr(asking, "sample", until(2))
    with pytest.raises(KeyboardInterrupt):
        train_recipe(policy("rejection_sampling", *keys))
    monkeypatch.setattr(asking, "sample", until(99))
    train_recipe(policy("rejection_sampling", *keys), overwrite=True)
    assert drawn == [8, 8, 8], "24 prompts, each asked once"


def test_answers_are_drawn_once(policy, tiny_base, monkeypatch):
    """A run that starts anew under the same settings reads what was drawn; another seed draws again.

    Drawing stops where the template says that an answer ends.
    """
    from llama_ft.train import asking

    train_recipe(policy("rejection_sampling", "training.max_steps=1", "export.merged=false", "eval_data=null"))
    drawn: list[frozenset[int]] = []
    real = asking.sample
    monkeypatch.setattr(asking, "sample", lambda *args, **keys: drawn.append(keys["stop"]) or real(*args, **keys))
    keys = ("training.max_steps=1", "export.merged=false", "eval_data=null")
    train_recipe(policy("rejection_sampling", *keys), overwrite=True)
    assert not drawn
    train_recipe(policy("rejection_sampling", *keys, "training.seed=43"), overwrite=True)
    assert drawn and AutoTokenizer.from_pretrained(tiny_base).convert_tokens_to_ids("<|im_end|>") in drawn[0]


def test_the_best_has_come_to_its_end():
    group = {
        "answers": [{"ended": False, "reward": 3.0}, {"ended": True, "reward": 1.0}, {"ended": True, "reward": 2.0}]
    }
    assert best_of(group)["reward"] == 2.0
    assert best_of({"answers": group["answers"][:1]})["reward"] == 3.0
    assert best_of_k([group])[-1]["mean"] == 3.0


def test_a_reward_that_raises_is_named(policy, rows):
    broken = "def worth(prompt, answer, reference):\n    return 1 / 0\n"
    with pytest.raises(UserError, match="ZeroDivisionError") as error:
        train_recipe(policy("grpo", worth=broken))
    assert f"{rows.name}, row" in error.value.block() and "worth.py:2" in error.value.block()


def test_a_prompt_without_room_is_named(policy, rows):
    with pytest.raises(UserError, match="than the 512 that") as error:
        train_recipe(policy("grpo", "sampling.max_new_tokens=500", "sequence.max_length=512"))
    assert rows.name in error.value.block() and "sampling.max_new_tokens" in error.value.block()


@pytest.mark.slow
@pytest.mark.parametrize("objective", ["grpo", "rloo", "rejection_sampling"])
def test_two_processes_draw_as_one(policy, tmp_path, objective):
    """19 prompts in steps of 8: an epoch's last step gives one process less to do. The same answers, the same curve."""
    keys = ["export.merged=false", "training.max_steps=4", "training.micro_batch=2", "training.eval_every=4"]
    recipe = policy(objective, *keys, *(["policy.whiten=true"] if objective == "rloo" else []), run="one")
    one = train_recipe(recipe)
    file = tmp_path / "two.yaml"
    file.write_text(dump(recipe.model_copy(update={"output_dir": str(tmp_path / "two")})))
    launch = str(ROOT / "accelerate_configs" / "cpu_ddp_2.yaml")
    line = [*ACCELERATE, "--config_file", launch, "-m", "llama_ft.train", str(file)]
    environment = ENVIRONMENT | {"LLAMA_FT_CACHE": str(tmp_path / "cache")}  # draws its own answers
    done = subprocess.run(line, capture_output=True, text=True, env=environment, timeout=500)
    assert done.returncode == 0, done.stderr[-3000:]
    keys = ["loss", "eval_reward"] + (["reward", "kl"] if objective != "rejection_sampling" else [])
    for key in keys:
        assert metric(tmp_path / "two", key) == pytest.approx(metric(one.path, key), abs=1e-5), key
        assert metric(one.path, key)

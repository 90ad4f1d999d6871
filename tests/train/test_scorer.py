"""Reward models that score answers: equal to transformers' own class on its own rendering, whatever the batch."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from transformers import AutoTokenizer, LlamaConfig
from transformers import LlamaForSequenceClassification as HFScorer

from llama_ft.data.template import Template
from llama_ft.errors import UserError
from llama_ft.recipe.schema_online import Reward
from llama_ft.train.rewards.rewards import Asked, Rewards
from llama_ft.train.rewards.scorer import Group, Scorer, batches, grouped, locate
from tests.tiny_run import make_base

CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def scorer_folder(tmp_path_factory) -> Path:
    """A random reward model in HF's layout, with ChatML for its template."""
    base = make_base(tmp_path_factory.mktemp("base"))
    folder = tmp_path_factory.mktemp("models") / "judge"
    config = LlamaConfig.from_pretrained(base, num_labels=1)
    torch.manual_seed(3)
    HFScorer(config).save_pretrained(folder)
    tokenizer = AutoTokenizer.from_pretrained(base)
    tokenizer.chat_template = Template.load("chatml").source
    tokenizer.save_pretrained(folder)
    return folder


def asked(question: str, answer: str, row: int = 0, ended: bool = True) -> Asked:
    prompt = [{"role": "user", "content": question}]
    return Asked(prompt, answer, None, f"rows.jsonl, row {row}", [1, 2, 3], ended, 1)


ANSWERS = [
    asked("What does the llama eat?", "Grass and hay."),
    asked("What does the llama eat?", "Stones, and the hill that they lie on, near the river"),
    asked("What does the llama eat?", ""),
    asked("What does the llama eat?", "Grass and hay."),
    asked("And the alpaca?", "It sleeps <|im_end|> and eats.", 1),
    asked("What does the llama eat?", "Hay", 2, ended=False),
]


def reference(folder: Path, one: Asked) -> float:
    """transformers alone: its tokenizer, its template, its model, one answer at a time."""
    tokenizer = AutoTokenizer.from_pretrained(folder)
    model = HFScorer.from_pretrained(folder, dtype=torch.float32)
    messages = [*one.prompt, {"role": "assistant", "content": one.answer}]
    ids = tokenizer.apply_chat_template(messages, return_tensors="pt", return_dict=False)
    with torch.no_grad():
        return float(model(input_ids=ids, attention_mask=torch.ones_like(ids)).logits[0, 0])


@pytest.mark.parametrize("most", [8192, 40, 1])
def test_scores_are_those_of_transformers(scorer_folder, most, monkeypatch):
    monkeypatch.setattr("llama_ft.train.rewards.scorer.TOKENS", most)
    scorer = Scorer.open(str(scorer_folder), CPU)
    assert scorer.share
    values = scorer.values(ANSWERS)
    plain = [
        one for one in ANSWERS if "<|" not in one.answer
    ]  # what a user wrote is text to us, a control token to them
    assert [value for one, value in zip(ANSWERS, values, strict=True) if one in plain] == pytest.approx(
        [reference(scorer_folder, one) for one in plain], abs=1e-5
    )
    assert len({round(value, 4) for value in values}) == 5, "each answer a score of its own, equal ones the same"
    scorer.share = False
    assert scorer.values(ANSWERS) == pytest.approx(values, abs=1e-5)
    assert scorer.values([]) == []


def test_it_is_one_of_a_recipes_rewards(scorer_folder):
    recipe = SimpleNamespace(rewards=[Reward(model=str(scorer_folder), weight=2.0)])
    with Rewards.open(recipe, CPU) as rewards:
        scored = rewards.score(ANSWERS[:2])
        first = rewards.fingerprint()
    assert list(scored[0].parts) == ["judge"]
    assert scored[0].total == pytest.approx(2 * reference(scorer_folder, ANSWERS[0]), abs=1e-5)
    assert json.loads(json.dumps(first)) == first


def test_dynamic_rope_takes_plain_rows(scorer_folder, tmp_path):
    folder = shutil.copytree(scorer_folder, tmp_path / "dynamic")
    config = json.loads((folder / "config.json").read_text())
    config["rope_parameters"] = {"rope_type": "dynamic", "factor": 2.0, "rope_theta": 10000.0}
    (folder / "config.json").write_text(json.dumps(config))
    scorer = Scorer.open(str(folder), CPU)
    assert not scorer.share
    one = [ANSWERS[0], ANSWERS[1]]
    assert scorer.values(one) == pytest.approx([reference(folder, each) for each in one], abs=1e-5)


def test_documents_are_laid_out_by_what_they_share():
    group = grouped([[1, 2, 3, 4], [1, 2, 5], [1, 2, 3]], [7, 8, 9])
    assert group == Group([1, 2], [[3, 4], [5], [3]], [7, 8, 9])
    assert grouped([[1, 2], [1, 2]], [0, 1]) == Group([1], [[2], [2]], [0, 1]), "a token of its own is left to each"
    assert grouped([[5]], [0]) == Group([], [[5]], [0])
    laid = list(batches([group, grouped([[9, 9, 9]], [10])], 5))
    assert [[one.numbers for one in batch] for batch in laid] == [[[7, 8]], [[9]], [[10]]]
    laid = list(batches([group, grouped([[9, 9, 9]], [10])], 9))
    assert [[one.numbers for one in batch] for batch in laid] == [[[7, 8, 9], [10]]]
    assert [[one.numbers for one in batch] for batch in batches([group], 1)] == [[[7]], [[8]], [[9]]]


def test_what_is_no_reward_model_is_told_by_name(scorer_folder, tiny_base, tmp_path, monkeypatch):
    models = tmp_path / "models"
    shutil.copytree(tiny_base, models / "writer")
    shutil.copytree(scorer_folder, models / "judge")
    (models / "empty").mkdir()

    def said(name: str) -> str:
        with pytest.raises(UserError) as error:
            Scorer.open(name, CPU, key="rewards.0.model")
        return str(error.value)

    assert "rewards.0.model: there is no run and no folder" in said(str(models / "jugde"))
    assert f"did you mean '{models}/judge'?" in said(str(models / "jugde"))
    assert "is a model that writes text, not a reward model" in said(str(models / "writer"))
    assert "valid reward models: judge" in said(str(models / "writer"))
    assert "it has no config.json" in said(str(models / "empty"))
    assert "train one with training.objective: reward" in said("nowhere/at/all")
    (models / "judge" / "chat_template.jinja").unlink()
    assert "has no chat template" in said(str(models / "judge"))


def run_of(folder: Path, objective: str) -> Path:
    """A run's folder by its recipe."""
    folder.mkdir(parents=True)
    recipe = {
        "name": folder.name,
        "model": {"base": "smollm2-135m"},
        "data": [{"path": "rows.jsonl", "layout": "preference" if objective == "reward" else "alpaca"}],
        "template": "chatml",
        "training": {"objective": objective},
    }
    (folder / "recipe.yaml").write_text(json.dumps(recipe))
    return folder


def test_a_run_is_taken_by_its_merged_model(scorer_folder, tiny_base, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    good, unfinished, other = (
        run_of(tmp_path / "runs" / name, objective)
        for name, objective in [("good", "reward"), ("half", "reward"), ("goof", "sft")]
    )
    shutil.copytree(scorer_folder, good / "merged")
    assert locate("good") == Path("runs/good/merged")
    assert locate(str(good)) == good / "merged"
    with pytest.raises(UserError, match=r"has no merged/ yet .*llama-ft export"):
        locate(str(unfinished))
    with pytest.raises(UserError, match=r"goof is a run of objective sft, not of reward — did you mean '.*/good'?"):
        locate(str(other))
    shutil.copytree(tiny_base, other / "merged")
    with pytest.raises(UserError, match=r"is a run of objective sft, not a reward model — did you mean '.*/good'?"):
        locate(str(other))


def test_a_row_that_cannot_be_scored_is_named(scorer_folder):
    scorer = Scorer.open(str(scorer_folder), CPU, key="rewards.0.model")
    with pytest.raises(UserError, match=r"rows.jsonl, row 5: rewards.0.model: [\d,]+ tokens with its answer"):
        scorer.values([ANSWERS[0], asked("Say it", "hay and grass " * 300, 5)])
    odd = Asked([{"role": "judge", "content": "?"}], "x", None, "rows.jsonl, row 6", [1], True, 0)
    with pytest.raises(UserError, match=r"row 6: rewards.0.model: the template of the reward model .*'judge'"):
        scorer.values([odd])

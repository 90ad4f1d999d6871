"""The proof of a reward model: what it measures, that it passes and that it refuses; exports of other objectives."""

from __future__ import annotations

import json
import math
import shutil
from types import SimpleNamespace

import pytest
import torch
import transformers
from datasets import Dataset
from safetensors.torch import load_file, save_file
from transformers import AutoModelForSequenceClassification, AutoTokenizer
from transformers import LlamaForSequenceClassification as Reference

from llama_ft.adapters import merge as merge_module
from llama_ft.adapters.lora_file import read_lora
from llama_ft.adapters.merge import merge_adapter
from llama_ft.errors import UserError
from llama_ft.export import run as export_module
from llama_ft.export import scores as scores_module
from llama_ft.export.prompts import choose_prompts
from llama_ft.export.run import ProofFailed, export_run
from llama_ft.export.scores import PAIRS, TOKENS, TOLERANCES, Pair, choose_pairs, compare, judge, score
from llama_ft.files import write_json
from llama_ft.llama.reward import SCORE, load_reward_model
from llama_ft.recipe.run import Run
from llama_ft.serve.source import open_source
from tests.export.conftest import copy_of
from tests.export.reward_runs import PAIRS as ROWS
from tests.export.reward_runs import prepare_run, reward_run
from tests.tiny_run import QUESTIONS, make_base, train_a_little


@pytest.fixture(scope="module")
def ranked(tiny_base, tmp_path_factory):
    """A reward run with these overrides, its model and its data, trained once."""
    made = {}

    def get(**overrides):
        key = str(sorted(overrides.items()))
        if key not in made:
            made[key] = reward_run(tmp_path_factory.mktemp("reward"), tiny_base, **overrides)
        return made[key]

    return get


@pytest.fixture
def run(ranked, tmp_path) -> Run:
    """A copy of the float32 LoRA run, not exported yet."""
    return copy_of(ranked()[0], tmp_path / "run")


# What it writes


def test_a_float32_run(ranked, tmp_path, capsys):
    run = copy_of(ranked()[0], tmp_path / "run")
    proof = export_run(run, trained=ranked()[1]).proof
    assert (proof["kind"], proof["ok"], proof["faults"]) == ("scores", True, [])
    assert proof["tolerance"] == {"max_delta": 1e-3, "mean_kl": None}
    measured = proof["measured"]
    assert 0 < measured["max_delta_score"] < 1e-4
    assert measured["pairs"] == len(proof["scored"]) == 8
    assert (measured["turned"], measured["near_ties"]) == (0, 0)
    assert measured["accuracy_trained"] == measured["accuracy_merged"] > 0.9
    assert measured["mean_margin_trained"] > 1
    assert proof["adapter"]["tensors"] == 29  # 2 layers × 7 projections × 2 factors, and the score
    assert proof["adapter"]["equals_memory"] is True
    assert proof["opened_with"] == f"transformers {transformers.__version__} LlamaForSequenceClassification"
    said = capsys.readouterr().out
    assert "max |Δ score|" in said
    assert "accuracy, trained → merged    100.00% → 100.00%" in said
    assert f"rewards: [{{model: {run.path}}}]" in said
    assert "chat" not in said


def test_the_folder_scores_in_plain_transformers(run, tiny_base):
    """As the model card says, one conversation at a time and in a padded batch: the scores of the proof."""
    proof = export_run(run).proof
    config = json.loads((run.merged / "config.json").read_text())
    assert config["architectures"] == ["LlamaForSequenceClassification"]
    assert (config["id2label"], config["problem_type"]) == ({"0": "LABEL_0"}, "regression")
    assert (config["pad_token_id"], config["eos_token_id"]) == (0, 2)
    assert not (run.merged / "generation_config.json").exists(), "it generates nothing"
    assert set(load_file(run.merged / "model.safetensors")) == {SCORE, *load_file(tiny_base / "model.safetensors")}
    model = AutoModelForSequenceClassification.from_pretrained(run.merged).eval()
    tokenizer = AutoTokenizer.from_pretrained(run.merged)
    conversations = [
        [{"role": "user", "content": row["prompt"]}, {"role": "assistant", "content": row[end]}]
        for row in ROWS[16:18]
        for end in ("chosen", "rejected")
    ]
    batch = tokenizer.apply_chat_template(conversations, return_tensors="pt", return_dict=True, padding=True)
    assert not batch["attention_mask"].all()
    with torch.no_grad():
        found = model(**batch).logits.flatten().tolist()
    assert found == pytest.approx([value for one in proof["scored"][:2] for value in one["trained"]], abs=1e-4)


def test_a_head_of_its_own_is_left_out(tmp_path):
    run, model, _ = reward_run(tmp_path / "run", make_base(tmp_path / "base", tied=False))
    assert export_run(run, trained=model).ok
    assert "lm_head.weight" not in load_file(run.merged / "model.safetensors")


def test_tokens_that_the_base_does_not_know(tmp_path, tiny_base):
    """The embedding is trained whole beside the score."""
    run, model, _ = reward_run(tmp_path / "run", tiny_base, adapter__modules_to_save="[embed_tokens, norms]")
    proof = export_run(run, trained=model).proof
    assert proof["measured"]["max_delta_score"] < 1e-4
    assert {"model.embed_tokens.weight", "model.norm.weight", SCORE} <= read_lora(run.adapter).whole.keys()


def test_a_quantised_base(tmp_path):
    base = make_base(tmp_path / "base", intermediate_size=192)
    run, model, _ = reward_run(tmp_path / "run", base, adapter__method="qlora")
    proof = export_run(run, trained=model).proof
    assert proof["ok"]
    assert proof["adapter"]["merged_into"] == "the base out of NF4 with double quantisation"
    assert proof["measured"]["max_delta_score"] < 1e-4
    assert load_file(run.merged / "model.safetensors")[SCORE].shape == (1, 64)


@pytest.mark.parametrize("live", [True, False], ids=["model in memory", "newest checkpoint"])
def test_a_full_run(ranked, tmp_path, live):
    trained, model, _ = ranked(adapter__method="full")
    run = copy_of(trained, tmp_path / "run")
    if live:
        shutil.copytree(trained.merged, run.merged)
    else:
        model.save_pretrained(run.checkpoint(6))
    result = export_run(run, trained=model if live else None)
    assert result.proof["adapter"] is None
    assert result.proof["measured"]["max_delta_score"] < 1e-4
    assert result.proof["measured"]["accuracy_merged"] > 0.9
    written = load_file(run.merged / "model.safetensors")
    assert torch.equal(written[SCORE], model.score.weight)
    assert json.loads((run.merged / "config.json").read_text())["architectures"] == ["LlamaForSequenceClassification"]


def test_without_held_out_rows_training_pairs_serve(ranked, tmp_path):
    proof = export_run(copy_of(ranked(eval_data="null")[0], tmp_path / "run")).proof
    assert proof["ok"]
    assert proof["measured"]["pairs"] == 16


def test_the_card_says_how_to_score(run):
    sample = {"question": "What?", "reference": "Hay.", "rejected": "Stones.", "before": {"chosen": 0.1, "rejected": 2}}
    write_json(run.samples_file, [sample | {"after": {"chosen": 4.567, "rejected": -4.5}}])
    bucket = {"bucket": "0.00 to 1.50", "pairs": 30, "accuracy": 0.6, "error": 0.0894, "by": "rating"}
    write_json(run.path / "eval" / "accuracy.json", [bucket])
    export_run(run)
    card = run.card_file.read_text()
    for said in (
        "pipeline_tag: text-classification",
        "made a reward model with LoRA",
        'AutoModelForSequenceClassification.from_pretrained("merged"',
        'peft.AutoPeftModelForSequenceClassification.from_pretrained("adapter", num_labels=1)',
        "| accuracy, trained → merged | 100.00% → 100.00% |",
        "| What? | Hay. | Stones. | 0.10 and 2.00 | 4.57 and -4.50 |",
        "by how much better the better answer was rated, with its standard error",
        "| 0.00 to 1.50 | 30 | 0.600 ± 0.089 |",
        "| objective | reward, margin no, center 0 |",
        "rewards: [{model: runs/tiny}]",
        "Answers that are sought for their score alone",
    ):
        assert said in card, said
    assert "generate" not in card
    assert "chat runs" not in card


def test_nobody_chats_with_it(run, tmp_path):
    for place in (run.path, export_run(run).path):
        with pytest.raises(
            UserError, match=r"is a reward model: it scores the answers of others .*rewards: \[\{model:"
        ):
            open_source(str(place))


# What it refuses


def damage(monkeypatch, name: str, change) -> None:
    """Every merge from here on writes another tensor of that name."""

    def damaged(*args, **kwargs):
        result = merge_module.merge_adapter(*args, **kwargs)
        path = result.path / "model.safetensors"
        tensors = load_file(path)
        tensors[name] = change(tensors[name])
        save_file(tensors, path, metadata={"format": "pt"})
        return result

    monkeypatch.setattr(export_module, "merge_adapter", damaged)


@pytest.mark.parametrize(
    ("name", "change"),
    [
        (SCORE, lambda weight: weight * 1.02),
        ("model.norm.weight", lambda weight: weight * 1.02),
        ("model.layers.1.self_attn.v_proj.weight", lambda weight: weight * 1.02),
        ("model.layers.0.mlp.down_proj.weight", lambda weight: weight.flip(0)),
    ],
)
def test_damaged_weights_are_refused(run, monkeypatch, name, change):
    damage(monkeypatch, name, change)
    with pytest.raises(ProofFailed, match=r"max \|Δ score\| is .*, allowed 0.001"):
        export_run(run)
    assert json.loads(run.proof_file.read_text())["ok"] is False
    assert not run.merged.exists()
    assert (run.path / "merged.rejected" / "model.safetensors").exists()


@pytest.mark.parametrize(
    "change", [lambda weight: -weight, lambda weight: weight * 0.5], ids=["turned around", "half as large"]
)
def test_damaged_weights_are_refused_in_16_bits(ranked, tmp_path, monkeypatch, change):
    run = copy_of(ranked(export__dtype="bfloat16")[0], tmp_path / "run")
    damage(monkeypatch, SCORE, change)
    with pytest.raises(ProofFailed, match="mean KL of preferences is"):
        export_run(run)


def test_an_overflow_is_refused(run, monkeypatch):
    damage(monkeypatch, SCORE, lambda weight: weight * math.nan)
    with pytest.raises(ProofFailed, match="is nan"):
        export_run(run)
    assert json.loads(run.proof_file.read_text())["measured"]["max_delta_score"] is None


def test_another_padding_token_is_refused(run, monkeypatch):
    """Plain transformers would score at the token before the padding: here before the newline that ends a turn."""
    real = export_module.write_companions

    def other(folder, *args):
        real(folder, *args)
        newline = AutoTokenizer.from_pretrained(folder).encode("\n")[0]
        path = folder / "config.json"
        path.write_text(json.dumps(json.loads(path.read_text()) | {"pad_token_id": newline}))

    monkeypatch.setattr(export_module, "write_companions", other)
    with pytest.raises(ProofFailed, match=r"max \|Δ score\|"):
        export_run(run)


def test_a_template_that_renders_otherwise_is_refused(run, monkeypatch):
    real = export_module.write_companions

    def other(folder, *args):
        real(folder, *args)
        template = folder / "chat_template.jinja"
        template.write_text(template.read_text().replace("assistant\\n", "assistant:\\n"))

    monkeypatch.setattr(export_module, "write_companions", other)
    with pytest.raises(ProofFailed, match="the exported chat template differs from training at token"):
        export_run(run)


def test_a_score_that_differs_from_memory_is_refused(ranked, tmp_path):
    trained, model, _ = ranked()
    run = copy_of(trained, tmp_path / "run")
    path = run.adapter / "adapter_model.safetensors"
    tensors = load_file(path)
    flat = tensors["base_model.model.score.weight"].view(-1)
    flat[0] = torch.nextafter(flat[0], torch.tensor(9.0))  # one bit
    save_file(tensors, path)
    with pytest.raises(UserError, match=r"what was saved is not what was trained: .*score\.modules_to_save"):
        export_run(run, trained=model)


def test_a_score_of_another_width_is_refused(run, tiny_base, tmp_path):
    path = run.adapter / "adapter_model.safetensors"
    save_file(load_file(path) | {"base_model.model.score.weight": torch.ones(1, 48)}, path)
    with pytest.raises(UserError, match=r"score\.weight is \[1, 48\] in the adapter, .* hidden states are 64 wide"):
        merge_adapter(
            tiny_base,
            read_lora(run.adapter),
            tmp_path / "out",
            base_dtype=torch.float32,
            dtype=torch.float32,
        )


# The measurements


def test_measurements_by_hand():
    trained = [(1.0, 0.0), (0.5, 0.5), (0.0, 2.0)]
    merged = [(1.0, 0.0), (0.5, 0.6), (0.0, 2.0)]
    found = compare(trained, merged)
    assert found["max_delta_score"] == pytest.approx(0.1)
    p, q = 0.5, 1 / (1 + math.exp(0.1))
    kl = p * math.log(p / q) + (1 - p) * math.log((1 - p) / (1 - q))
    assert found["mean_kl"] == pytest.approx(kl / 3, rel=1e-6)
    assert (found["near_ties"], found["turned"]) == (1, 0)
    assert (found["accuracy_trained"], found["accuracy_merged"]) == (1 / 3, 1 / 3)
    assert found["mean_margin_trained"] == pytest.approx(-1 / 3)
    assert compare([(3.0, 0.0)] * 2, [(3.0, 0.0), (0.0, 0.1)])["turned"] == 0, "within 2 · max|Δ| of a tie"
    assert math.isnan(compare([(1.0, math.nan)], [(1.0, 2.0)])["max_delta_score"])


@pytest.mark.parametrize(
    ("dtype", "changes", "said"),
    [
        ("float32", {}, None),
        ("float32", {"max_delta_score": 1e-3, "mean_kl": 1.0}, None),
        ("float32", {"max_delta_score": 1.1e-3}, "max |Δ score| is 0.0011, allowed 0.001"),
        ("float32", {"max_delta_score": math.nan}, "max |Δ score| is nan, allowed 0.001"),
        ("bfloat16", {"max_delta_score": 0.3, "mean_kl": 1e-3}, None),
        ("bfloat16", {"mean_kl": 1.1e-3}, "mean KL of preferences is 0.0011 nats, allowed 0.001"),
        ("float16", {"mean_kl": math.nan}, "mean KL of preferences is nan nats, allowed 0.001"),
        ("bfloat16", {"turned": 1}, "1 of 8 pairs are put in another order, and are no near ties"),
    ],
)
def test_limits(dtype, changes, said):
    good = {"pairs": 8, "max_delta_score": 1e-5, "mean_kl": 1e-6, "turned": 0}
    assert judge(TOLERANCES[dtype], good | changes) == ([] if said is None else [said])


def pairs_of(*lengths: int) -> Dataset:
    return Dataset.from_list([{"input_ids": [i] * n, "rejected_ids": [i] * n} for i, n in enumerate(lengths)])


def chosen(rows: Dataset | None, train: Dataset | None = None) -> list[int]:
    return [pair.chosen[0] for pair in choose_pairs(SimpleNamespace(eval=rows, train=train))]


def test_pairs_are_spread_and_bounded():
    assert chosen(pairs_of(*[5] * 40)) == list(range(0, 32, 2))
    half = TOKENS // 4
    assert chosen(pairs_of(half, half, half, 10, 12)) == [0, 1], "two fill the budget"
    assert chosen(pairs_of(half, half + 1, 10)) == [0, 2]
    assert chosen(pairs_of(TOKENS, TOKENS - 1, TOKENS)) == [1], "the shortest, where none fits"
    assert len(chosen(None, pairs_of(*[5] * 100))) == PAIRS
    assert min(chosen(None, pairs_of(*[5] * 100))) == 36, "the last of training"


def test_a_score_is_taken_at_the_last_token(run):
    """… by both sides, and one answer is not seen by another."""
    export_run(run)
    ours, theirs = load_reward_model(run.merged, torch.float32), Reference.from_pretrained(run.merged)
    pairs = [Pair([5, 6, 7], [5, 6, 9, 11]), Pair([8], [9, 10])]
    ours.train()
    found = score(ours, pairs)
    assert ours.training
    assert sum(found, ()) == pytest.approx(sum(score(theirs, pairs), ()), abs=1e-5)
    assert score(ours, pairs[1:]) == found[1:]


def test_16_bits_on_real_weights(smollm2, tmp_path, monkeypatch):
    """SmolLM2-135M cut to two layers, base and export in bfloat16: within the tolerance, and rounding shows."""
    from tests.train.conftest import cut_short

    monkeypatch.setattr(scores_module, "PAIRS", 4)
    run, model, _ = reward_run(tmp_path / "run", cut_short(smollm2, tmp_path / "base"), model__dtype="bfloat16")
    proof = export_run(run, trained=model).proof
    assert proof["tolerance"] == {"max_delta": None, "mean_kl": 1e-3}
    assert 1e-4 < proof["measured"]["max_delta_score"] < 1
    assert proof["measured"]["pairs"] == 4
    assert AutoModelForSequenceClassification.from_pretrained(run.merged, dtype="auto").dtype == torch.bfloat16


# Other objectives on answers: exported as a model that writes


RATED = [{"prompt": q, "completion": a, "label": bool(i % 2)} for i, (q, a) in enumerate(QUESTIONS)]
ASKED = [{"messages": [{"role": "user", "content": q}, {"role": "assistant", "content": a}]} for q, a in QUESTIONS]
OTHERS = {
    "dpo": (ROWS, "preference", {}),
    "kto": (RATED, "rated", {}),
    "grpo": (ASKED, "messages", {"rewards": "[{function: length, target: 9}]"}),
}


@pytest.mark.parametrize("objective", OTHERS)
def test_other_objectives_are_proven_by_what_they_write(tiny_base, tmp_path, objective):
    from llama_ft.adapters.lora import attach_lora
    from llama_ft.llama.load import load_model
    from llama_ft.train.adapter import save_adapter

    rows, layout, overrides = OTHERS[objective]
    run, prepared = prepare_run(tmp_path / "run", tiny_base, objective, rows, layout, **overrides)
    torch.manual_seed(1)
    model = attach_lora(load_model(tiny_base, torch.float32), run.recipe.adapter)
    train_a_little(model, prepared)
    save_adapter(model, prepared.tokenizer, run)
    proof = export_run(run, trained=model).proof
    assert proof["ok"]
    assert proof["measured"]["documents"] == 8
    assert proof["greedy"][0]["prompt"].endswith("16 eat on hill 2?<|im_end|>\n<|im_start|>assistant\n")
    assert [answer["equal"] for answer in proof["greedy"]] == [True] * 3
    card = run.card_file.read_text()
    assert "AutoModelForCausalLM" in card
    assert f"| objective | {objective}, " in card


def test_prompts_without_answers_are_asked_whole(tiny_base, tmp_path):
    _, prepared = prepare_run(tmp_path / "run", tiny_base, "sft", ASKED, "messages")
    asked = [turns[:1] for turns in prepared.eval_conversations]
    silent = prepared.eval.map(lambda row: {"input_ids": row["input_ids"][:7], "labels": [-100] * 7})
    stand_in = SimpleNamespace(**{**vars(prepared), "eval": silent, "eval_conversations": asked})
    documents, prompts = choose_prompts(stand_in)
    assert [document.ids for document in documents] == silent["input_ids"]
    whole = choose_prompts(prepared)[1]
    assert prompts == whole, "a question is asked the same whether its answer is known or not"
    stand_in.eval_conversations = []
    assert [prompt.ids for prompt in choose_prompts(stand_in)[1]] == [document.ids for document in documents[:3]]

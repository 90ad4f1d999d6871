"""The laptop chain: what is held out, what each step is told, when it is repeated, what the table says of it."""

from __future__ import annotations

import gzip
import json
import math
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from transformers import LlamaForCausalLM as HFLlama

from benchmarks import align, align_table
from benchmarks.align import CHAIN, REJECTION, REWARD, RLOO, SFT
from llama_ft.errors import UserError
from llama_ft.llama.load import load_model
from llama_ft.recipe import load_recipe
from llama_ft.train.asking import Answer, Prompt
from llama_ft.train.objectives.losses import k3
from llama_ft.train.rewards.rewards import Scored
from tests.conftest import ROOT
from tests.train.conftest import small_base  # noqa: F401 (a fixture)


def options(folder: Path, *arguments: str):
    return align.parse(["--data", str(folder / "pairs.jsonl.gz"), "--out", str(folder / "out"), *arguments])


def flag(link, said, *, overwrite: bool = False) -> str | None:
    return align.training_of(link, said).next_flag(overwrite)


@pytest.fixture
def pairs(tmp_path) -> Path:
    """Two hundred pairs as HH-RLHF writes them; every conversation comes twice, once with a turn more."""
    lines = []
    for number in range(200):
        begins = f"\n\nHuman: What of hill {number // 2}?\n\nAssistant:"
        more = f" Llamas.\n\nHuman: How many?\n\nAssistant: {number}" if number % 2 else " Alpacas"
        lines.append(json.dumps({"chosen": f"{begins}{more}.", "rejected": f"{begins}{more} or none."}) + "\n")
    file = tmp_path / "pairs.jsonl.gz"
    file.write_bytes(gzip.compress("".join(lines).encode()))
    return file


def test_a_conversation_is_on_one_side_alone(pairs, tmp_path):
    files = align.split(pairs, tmp_path / "data")
    train, held_out = ([json.loads(line) for line in file.read_text().splitlines()] for file in files)
    assert len(train) + len(held_out) == 200 and 20 <= len(held_out) <= 60
    begin = [{row["chosen"].partition("\n\nAssistant:")[0] for row in part} for part in (train, held_out)]
    assert not begin[0] & begin[1] and len(begin[0]) + len(begin[1]) == 100
    before = [file.read_bytes() for file in files]
    assert [file.read_bytes() for file in align.split(pairs, tmp_path / "data")] == before


def test_rows_that_are_no_pairs_are_named(tmp_path):
    file = tmp_path / "rows.jsonl"
    file.write_text(json.dumps({"chosen": "\n\nHuman: a\n\nAssistant: b", "rejected": "c"}) + '\n{"text": "d"}\n')
    with pytest.raises(UserError, match="neither a prompt nor a chosen answer") as raised:
        align.split(file, tmp_path / "data")
    assert "row 1" in str(raised.value)
    assert align.opening({"prompt": [{"role": "user", "content": "a"}, {"role": "assistant"}]}, "") == align.opening(
        {"prompt": [{"role": "user", "content": "a"}]}, ""
    )


def test_every_step_starts_from_the_one_before(pairs, tmp_path):
    """The real recipes take what the chain tells them."""
    said = options(tmp_path, "--rloo-steps", "3", "--base", "smollm2-135m")
    align.split(pairs, said.out / "data")
    for name in (SFT, REWARD, REJECTION):
        (said.out / name / "merged").mkdir(parents=True)
    found = {link.name: load_recipe(link.recipe, align.overrides_of(link, said)) for link in CHAIN}
    merged = {name: str(said.out / name / "merged") for name in found}
    assert [one.model.base for one in found.values()] == ["smollm2-135m", merged[SFT], merged[SFT], merged[REJECTION]]
    assert [one.training.objective for one in found.values()] == ["sft", "reward", "rejection_sampling", "rloo"]
    assert [[one.model for one in recipe.rewards] for recipe in found.values()] == [[], [], *[[merged[REWARD]]] * 2]
    assert [recipe.data[0].limit for recipe in found.values()] == [384, 448, 160, 1000]
    assert found[RLOO].training.max_steps == 3
    for recipe in found.values():
        assert recipe.data[0].path == str(said.out / "data" / "train.jsonl")
    assert found[REWARD].eval_data[0].path == str(said.out / "data" / "held-out.jsonl")
    asked = align_table.asking_recipe(said)
    assert asked.eval_data[0].limit == 48 and asked.rewards[0].model == merged[REWARD]


def test_what_is_done_is_not_repeated(pairs, tmp_path):
    said, (sft, reward, *_) = options(tmp_path), CHAIN
    assert flag(sft, said) == ""

    def write(link, state: str, ended: str | None, **record) -> None:
        run = said.out / link.name
        (run / "merged").mkdir(parents=True, exist_ok=True)
        (run / "recipe.yaml").touch()
        (run / "merged" / "config.json").touch()
        (run / "status.json").write_text(json.dumps({"state": state, "ended": ended}))
        training = align.training_of(link, said)
        known = {"command": training.command, "on": training.standing(), "seconds": 1.0}
        training.record_file.write_text(json.dumps(known | record))

    write(sft, "finished", "one")
    write(reward, "finished", "two")
    assert [flag(link, said) for link in (sft, reward)] == [None, None]
    write(sft, "finished", "three")  # trained once more: what stands on it is another's
    assert [flag(link, said) for link in (sft, reward)] == [None, "--overwrite"]
    write(reward, "stopped", None)
    assert flag(reward, said) == "--overwrite"
    (said.out / REWARD / "checkpoints" / "step-3").mkdir(parents=True)
    assert flag(reward, said) == "--resume"
    assert flag(sft, said, overwrite=True) == "--overwrite"
    with pytest.raises(UserError, match="other settings"):
        flag(sft, options(tmp_path, "--sft-rows", "50"))
    (said.out / SFT / "merged" / "config.json").unlink()
    assert flag(sft, said) == "--overwrite", "its export was never made"


def test_a_mistake_is_told_before_anything_is_trained(pairs, tmp_path, monkeypatch, capsys):
    """The last step's, for one step is less than its warm-up takes."""
    line = ["benchmarks.align", "--data", str(pairs), "--out", str(tmp_path / "out"), "--rloo-steps", "1"]
    monkeypatch.setattr("sys.argv", line)
    with pytest.raises(SystemExit) as stopped:
        align.main()
    assert stopped.value.code == 2 and "warm-up takes 2 steps" in capsys.readouterr().err
    assert not (tmp_path / "out" / SFT).exists()


def test_a_step_that_fails_ends_the_chain_with_its_status(tmp_path, monkeypatch):
    said = options(tmp_path, "--base", "no-such-model")
    (said.out / "data").mkdir(parents=True)
    (said.out / "data" / "train.jsonl").touch()
    with pytest.raises(SystemExit) as stopped:
        align.training_of(CHAIN[0], said).train()
    assert stopped.value.code == 2 and align.training_of(CHAIN[0], said).seconds > 0


def answer(ids: list[int], reward: float = 0.0, text: str = "", *, ended: bool = True) -> Answer:
    return Answer(ids, text, ended, Scored(reward, {"model": reward}))


def test_log_probabilities_and_kl_are_those_of_transformers(tiny_base):
    """Of answers of several lengths to several prompts, in the order of the answers."""
    prompts = [Prompt([7, 8, 9, 10 + n], [], None, n, "") for n in range(9)]
    said = [[answer([20 + n, 21, 2]), answer([40 + n])] for n in range(9)]
    found = align_table.log_probs(align_table.model_of(tiny_base), prompts, said)
    reference = HFLlama.from_pretrained(tiny_base, dtype=torch.float32)
    expected = []
    for prompt, group in zip(prompts, said, strict=True):
        for one in group:
            ids = torch.tensor([[*prompt.ids, *one.ids]])
            logits = reference(ids).logits[0].log_softmax(-1)[len(prompt.ids) - 1 : -1]
            expected += logits.gather(-1, torch.tensor(one.ids)[:, None])[:, 0].tolist()
    assert found.tolist() == pytest.approx(expected, abs=1e-4)
    assert k3(found - found).abs().max() == 0
    other = load_model(tiny_base, torch.float32)
    with torch.no_grad():
        other.model.norm.weight *= 0.9
    assert k3(found - align_table.log_probs(other.eval(), prompts, said)).mean() > 0


def test_who_is_compared_with_whom():
    assert align_table.others_of(align_table.START) == []
    assert align_table.others_of(SFT) == [align_table.START]
    assert align_table.others_of(REJECTION) == [SFT]
    assert align_table.others_of(RLOO) == [REJECTION, SFT]


def test_the_table(tmp_path):
    said = options(tmp_path)
    for link in CHAIN:
        (said.out / link.name / "eval").mkdir(parents=True)
        align.training_of(link, said).record_file.write_text(json.dumps({"seconds": 60.4}))
    buckets = [{"bucket": "0 to 1"}, {"bucket": "all", "pairs": 200, "accuracy": 0.6, "error": 0.0346}]
    (said.out / REWARD / "eval" / "accuracy.json").write_text(json.dumps(buckets))
    rewards = {align_table.START: [0, 1, 2], SFT: [1, 2, 3], REJECTION: [2, 3, 4], RLOO: [3, 3, 6]}
    answers = {
        name: [
            [answer([1, 2, 2], value - 1, "Yes | no\nand more"), answer([1], value + 1, ended=False)]
            for value in values
        ]
        for name, values in rewards.items()
    }
    kl = {(SFT, align_table.START): 0.5, (REJECTION, SFT): 0.25, (RLOO, REJECTION): 0.125, (RLOO, SFT): 0.375}
    found = [align_table.row_of(link, said, answers, kl) for link in (None, *CHAIN)]
    lines = align_table.table(found).splitlines()[2:]
    cells = [[cell.strip() for cell in line.replace("\\|", "¦").strip("|").split("|")] for line in lines]
    assert [line[0] for line in cells] == ["start", SFT, REWARD, REJECTION, RLOO]
    assert all(len(line) == 9 for line in cells)
    assert cells[4][1] == f"4.000 ± {math.sqrt(3 / 3):.3f}"  # of 3, 3 and 6: deviation √3 over √3 prompts
    assert cells[4][2] == f"+2.000 ± {math.sqrt(1 / 3):.3f}"  # of 2, 1 and 3, prompt by prompt
    assert cells[1][2] == "–" and cells[0][2].startswith("-1.000 ± 0.000")
    assert cells[2] == [REWARD, "–", "–", "60.0% ± 3.5% of 200", "–", "–", "–", "60", "–"]
    assert [line[4:6] for line in cells] == [
        ["–", "–"],
        ["0.5000", "–"],
        ["–", "–"],
        ["0.2500"] * 2,
        ["0.1250", "0.3750"],
    ]
    assert cells[3][6:] == ["2, 50%", "60", "Yes ¦ no and more"] and cells[0][7] == "–"


@pytest.mark.slow
def test_the_whole_chain(small_base, real_data, tmp_path):  # noqa: F811
    """Real rows, real recipes, the first two layers of the real model; a second call trains nothing."""
    data = real_data / "preference" / "hh_rlhf_harmless_test.jsonl.gz"
    small = ["--base", str(small_base), "--sft-rows", "32", "--pairs", "32", "--prompts", "40", "--rloo-prompts", "60"]
    small += ["--rloo-steps", "3", "--held-out-pairs", "16", "--held-out-prompts", "8", "--answers", "1"]
    line = [sys.executable, "-m", "benchmarks.align", "--data", str(data), "--out", str(tmp_path / "out"), *small]
    first = subprocess.run(line, capture_output=True, text=True, cwd=ROOT)
    assert first.returncode == 0, first.stdout[-3000:] + first.stderr[-3000:]
    found = json.loads((tmp_path / "out" / "align.json").read_text())
    start, sft, reward, rejection, rloo = found["steps"]
    assert 10 <= reward["pairs"] <= 16 and 0 <= reward["accuracy"] <= 1
    assert all(math.isfinite(step["reward"]) for step in (start, sft, rejection, rloo))
    assert sft["kl_to_start"] > 0 and rejection["kl_to_start"] == rejection["kl_to_sft"] > 0
    assert found["kl"].keys() == {
        f"{SFT} to start",
        f"{REJECTION} to {SFT}",
        f"{RLOO} to {REJECTION}",
        f"{RLOO} to {SFT}",
    }
    assert all(step["seconds"] > 0 for step in (sft, reward, rejection, rloo)) and found["prompt"]
    assert (tmp_path / "out" / "align.md").read_text().count("\n| ") == 6
    again = subprocess.run(line, capture_output=True, text=True, cwd=ROOT)
    assert again.returncode == 0 and again.stdout.count("done before") == 4
    assert json.loads((tmp_path / "out" / "align.json").read_text())["steps"] == found["steps"]

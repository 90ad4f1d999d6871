"""The preference benchmark: its steps, its gates, and that both sides compute the same on the same pairs."""

from __future__ import annotations

import json
import math
import subprocess
import sys
from argparse import Namespace
from pathlib import Path

import pytest
import torch

from benchmarks import machine, preference, preference_gpu, trl_dpo
from benchmarks.pairs import as_trl, bfloat16_noise, choose_rows, expected_steps, spread, write_pairs
from llama_ft import load_recipe, prepare_data, train_recipe
from llama_ft.data.render import MASKED
from tests.train.conftest import small_base  # noqa: F401 (a fixture)


def options(**changes) -> Namespace:
    return Namespace(**{**vars(preference.parse([])), **changes})


def test_steps_hold_pairs_of_like_length_the_longest_first():
    lengths = [number * 7 % 100 for number in range(100)]  # every number below 100 once
    numbers = spread(lengths, 8, 4)
    steps = [[lengths[number] for number in numbers[first : first + 8]] for first in range(0, 32, 8)]
    assert len(set(numbers)) == 32 and min(steps[0]) == 92
    assert all(max(step) - min(step) == 7 for step in steps)
    assert [max(step) for step in steps[1:]] == sorted(max(step) for step in steps[1:])
    assert abs(sum(map(sum, steps[1:])) / 24 - sum(lengths) / 100) < 8
    for documents, count in ((31, 4), (100, 1)):
        with pytest.raises(ValueError, match="steps of 8"):
            spread(lengths[:documents], 8, count)


def test_a_pair_in_trls_form():
    pair = {"input_ids": [1, 2, 3, 4, 9], "labels": [MASKED, MASKED, 3, 4, MASKED]}
    other = {"rejected_ids": [1, 2, 5, 9], "rejected_labels": [MASKED, MASKED, 5, MASKED]}
    assert as_trl(pair | other) == {"prompt": [1, 2], "chosen": [3, 4], "rejected": [5]}
    with pytest.raises(ValueError, match="two prompts"):
        as_trl(pair | other | {"rejected_ids": [1, 7, 5, 9]})
    with pytest.raises(ValueError, match="last answer"):
        as_trl(pair | other | {"labels": [MASKED, 2, MASKED, 4, 9]})


@pytest.fixture(scope="module")
def both(tiny_base, tmp_path_factory) -> dict:
    """Ours and TRL's steps on the same pairs of a tiny model, in this process, and what must be in them."""
    folder = tmp_path_factory.mktemp("both")
    rows = []
    for number in range(40):
        question = f"What does llama {number} eat on hill {number % 7}?" + " Think of the hay." * (number * 5 % 9)
        chosen = f"Llama {number} eats grass" + " and hay" * (number % 4)
        rows.append({"prompt": question, "chosen": chosen, "rejected": f"{number % 3} stones."})
    source = folder / "pairs.jsonl"
    source.write_text("".join(json.dumps(row) + "\n" for row in rows))
    small = options(batch=4, micro_batch=2, steps=3, pool=40, override=[f"model.base={tiny_base}"])
    pool = load_recipe(preference.RECIPE, preference.overrides_of(small, source, small.pool))
    overrides = preference.overrides_of(small, choose_rows(pool, folder), None)
    recipe = load_recipe(preference.RECIPE, [*overrides, "training.learning_rate=1e-3", f"output_dir={folder / 'run'}"])
    prepared = prepare_data(recipe)
    pairs, adapter = write_pairs(prepared, folder), preference.write_adapter(recipe, prepared, folder)
    train_recipe(recipe)
    found = {"pairs": pairs, "expected": expected_steps(pairs, 4), "ours": preference.steps_of(folder / "run")}
    for variant in preference.PEERS["trl"]:
        spec = preference.spec_of(variant, recipe, pairs, adapter, folder)
        trl_dpo.main(spec | {"threads": torch.get_num_threads()})
        found[variant] = json.loads((folder / "out.json").read_text())["steps"]
    noise = bfloat16_noise(tiny_base, pairs)
    limits = preference.limits_of(found["expected"], 4, 0.1, noise)
    return found | {"trl": found[preference.REFERENCE], "noise": noise, "limits": limits}


def test_both_sides_compute_the_same(both):
    """No gate is hit, and the losses fell, so that something was compared."""
    assert preference.faults("llama_ft", both["ours"], both["expected"], both["trl"], both["limits"]) == []
    for variant in preference.PEERS["trl"]:
        assert preference.faults(variant, both[variant], both["expected"], both["trl"], both["limits"]) == []
    assert max(preference.losses_apart("llama_ft", both["ours"], both["trl"])) < 1e-5
    assert preference.gradient_apart(both["ours"], both["trl"]) < 1e-4
    assert both["ours"][-1]["loss"] < both["ours"][0]["loss"] - 1e-3


def test_steps_are_those_that_were_chosen(both):
    """The longest pairs came first, and ours computed each prompt once."""
    lengths = [len(one["prompt"]) + max(len(one["chosen"]), len(one["rejected"])) for one in read(both["pairs"])]
    assert min(lengths[:4]) >= max(lengths[4:])
    prompts = [sum(len(one["prompt"]) for one in read(both["pairs"])[i : i + 4]) for i in range(0, 12, 4)]
    for ours, trl, prompt in zip(both["ours"], both["trl"], prompts, strict=True):
        unlabelled_tails = 8  # a line break behind each answer, which TRL's side is spared
        assert ours["computed"] == trl["tokens"] - prompt + unlabelled_tails
        assert trl["computed"] > trl["tokens"]


def test_what_rounding_does_to_a_loss(both):
    """The limit is four deviations of the mean loss of pairs whose tokens are moved by that noise, twice each."""
    assert 1e-4 < both["noise"] < 0.1
    assert both["limits"]["float32"] == [1e-4] * 3
    noise, step = 0.05, {"labelled": 640}
    (limit,) = preference.limits_of([step], 8, 0.1, noise)["bfloat16"]
    torch.manual_seed(0)
    moved = torch.randn(4000, 2, 640).sum(1) * noise  # policy and reference; by token
    signs = torch.tensor([1.0, -1.0]).repeat_interleave(40).repeat(8)  # chosen and rejected answers of 40 tokens
    margins = (moved * signs).sum(1) / 8
    losses = -torch.nn.functional.logsigmoid(0.1 * margins)
    assert losses.std().item() * preference.DEVIATIONS == pytest.approx(limit, rel=0.05)


def read(pairs: Path) -> list[dict]:
    return [json.loads(line) for line in pairs.read_text().splitlines()]


@pytest.mark.parametrize(
    ("damage", "said"),
    [
        (lambda steps: steps[0].update(loss=0.6932), "not log 2"),
        (lambda steps: steps[2].update(loss=steps[2]["loss"] + 0.01), "the loss of step 3 is 1.0e-02 from"),
        (lambda steps: steps[0].update(grad_norm=steps[0]["grad_norm"] * 1.01), "gradient's norm"),
        (lambda steps: steps[1].update(labelled=1), "1 labelled tokens in step 2"),
        (lambda steps: steps.pop(), "took 2 steps of 3"),
    ],
)
def test_a_gate_names_what_is_not_the_same(both, damage, said):
    steps = json.loads(json.dumps(both["ours"]))
    damage(steps)
    (fault,) = preference.faults("llama_ft", steps, both["expected"], both["trl"], both["limits"])
    assert fault.startswith("llama_ft") and said in fault


def test_other_ids_are_seen(both):
    steps = json.loads(json.dumps(both["trl"]))
    steps[1]["rows"], steps[2]["rows"] = steps[2]["rows"], steps[1]["rows"]
    assert (
        preference.faults("trl-default", steps, both["expected"], both["trl"], both["limits"]) == []
    )  # in an order of its own
    assert len(preference.faults("trl-tuned-fp32", steps, both["expected"], both["trl"], both["limits"])) == 2
    steps[2]["rows"][0] = trl_dpo.digest([1, 2, 3], 2)
    assert preference.faults("trl-default", steps, both["expected"], both["trl"], both["limits"]) == [
        "trl-default: other ids in all"
    ]


def test_the_table_counts_all_steps_but_the_first():
    def run(rate: float, rss: float) -> dict:
        seconds = [100.0, 8 / rate, 8 / rate]
        steps = [{"seconds": s, "computed": 800, "loss": 0.69, "grad_norm": 1.0, "rows": []} for s in seconds]
        return {"steps": steps, "rss": rss}

    rates = {"llama_ft": [1.0, 1.2, 1.1], "trl-default": [0.1] * 3, "trl-tuned-fp32": [0.5, 0.4, 0.6]}
    runs = {name: [run(rate, 2.0 if name == "llama_ft" else 8.0) for rate in given] for name, given in rates.items()}
    reference = runs["trl-tuned-fp32"][0]["steps"]
    rows = {name: preference.summary(name, done, 8, reference) for name, done in runs.items()}
    assert rows["llama_ft"]["pairs_per_second"] == pytest.approx(1.1)
    assert rows["llama_ft"]["spread"] == pytest.approx([1.0, 1.2])
    assert rows["llama_ft"]["tokens_per_pair"] == 100 and rows["llama_ft"]["warm_up_seconds"] == 100
    text = preference.table(rows)
    assert "| trl-tuned-fp32 | 0.500 (0.400–0.600) | 2.20× | 100 | 8.00 | 0.25 | 0.0e+00 | 0.0e+00 |" in text
    assert "| trl-default | 0.100 (0.100–0.100) | 11.00× | 100 | 8.00 | 0.25 | other order |" in text
    assert "2.20× the pairs of trl-tuned-fp32 at 0.25 of its memory (llama_ft)." in text


def test_memory_of_a_process_tree(tmp_path):
    """A child that holds 200 MiB and its own child that holds as much are seen together; one from before is not."""
    other = subprocess.Popen([sys.executable, "-c", "import time; held = bytearray(300 << 20); time.sleep(60)"])
    hold = "import time; held = bytearray(200 << 20); time.sleep(1.5)"
    code = f"import subprocess, sys; p = subprocess.Popen([sys.executable, '-c', {hold!r}]); {hold}; p.wait()"
    try:
        _, rss = machine.measured([sys.executable, "-c", code], tmp_path)
    finally:
        other.kill()
        other.wait()
    assert 0.39 < rss < 0.5


@pytest.mark.parametrize("contender", ["ours, checkpointed", "trl-tuned"])
def test_a_preset_shape(contender, tiny_base, tmp_path):
    """Both sides of the GPU benchmark on a tiny shape: as many steps as asked for, the first of them at log 2."""
    said = ["--shape", "tiny", "--lengths", "24,12,9", "--rank", "4", "--steps", "2", "--device", "cpu", "--batch", "4"]
    said += ["--micro-batch", "2", "--tokenizer", str(tiny_base), "--contender", contender]
    options = preference_gpu.parse(said)
    preference_gpu.write_pairs(options, tmp_path / "pairs.jsonl")
    if contender in preference_gpu.OURS:
        found = preference_gpu.measure_ours(options, tmp_path / "pairs.jsonl")
    else:
        found = preference_gpu.measure_trl(options, tmp_path / "pairs.jsonl", tmp_path / "out.json")
        assert [step["labelled"] for step in found["steps"]] == [4 * (12 + 9)] * 4
    losses = [step["loss"] for step in found["steps"]]
    assert len(losses) == 4 and abs(losses[0] - math.log(2)) < preference.FIRST_LOSS
    assert losses[1] != losses[0]
    row = preference_gpu.summary(found, options.batch)
    text = preference_gpu.table({contender: row, "trl-default": {"error": "out of memory"}})
    assert f"| {contender} | {row['pairs_per_second']:.3f} |" in text and "| trl-default | out of memory |" in text


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_without_a_gpu_it_says_so(capsys):
    with pytest.raises(SystemExit) as stopped:
        preference_gpu.parse(["--shape", "llama-3-8b"])
    assert stopped.value.code == 2 and "there is no GPU here" in capsys.readouterr().err


@pytest.mark.slow
def test_all_contenders_in_turn(small_base, real_data):  # noqa: F811
    """The whole benchmark on real pairs and the first two layers of the real model."""
    small = options(
        data=str(real_data / "preference" / "hh_rlhf_harmless_test.jsonl.gz"),
        rounds=1,
        steps=2,
        pool=64,
        override=[f"model.base={small_base}"],
    )
    text, data = preference.compare(small)
    assert [*data["rows"]] == ["llama_ft", "llama_ft-bf16", "trl-default", "trl-tuned", "trl-tuned-fp32"]
    assert data["rows"]["llama_ft"]["tokens_per_pair"] < data["rows"]["trl-tuned"]["tokens_per_pair"]
    assert text.count("|\n") >= 6

"""report.html of runs on answers: it speaks of pairs, scores, rewards and drawn answers as their objective does."""

from __future__ import annotations

import json

import pytest

from llama_ft.recipe.run import Run
from llama_ft.train.page.gather import gather
from llama_ft.train.page.html import number
from tests.train.report_runs import ALIGNED, HOSTILE, RTL, aligned_metrics, drawn_answers, make_aligned_run, make_run
from tests.train.test_report_page import read


@pytest.mark.parametrize("objective", ["reward", "grpo", "rejection_sampling"])
@pytest.mark.parametrize("said", [HOSTILE, RTL], ids=["hostile", "rtl"])
def test_drawn_answers_and_names_of_rewards_stay_text(tmp_path, objective, said):
    plain = read(make_aligned_run(tmp_path / "plain", objective, said="x"))
    quoted = read(make_aligned_run(tmp_path / "run", objective, said=said))
    assert [tag for tag, _ in quoted.tags] == [tag for tag, _ in plain.tags]
    html = (tmp_path / "run" / "report.html").read_text(encoding="utf-8")
    assert not any(hidden in html for hidden in ("\u202e", "\u2066", "\x00", "\x1b", "\u200b"))
    if said == HOSTILE:
        assert quoted.words.count("</script><script>window.hacked = 1") >= 6


ALIGNED_WORDS = {
    "dpo": (
        "tuned with LoRA by DPO on 62 pairs. The held-out accuracy rose from 50.0% to 90.0% in 40 steps.",
        "objective dpo, loss sigmoid, beta 0.1",
        "4 pairs = 4 × 1 × 1",
        "held-out accuracy 50.0% → 90.0% held-out margin 0 → 1 labelled tokens 7,200",
        "Loss per pair 0.685 at step 1, 0.49 at step 40; held-out 0.69 at step 0, 0.59 at step 40.",
        "Rewards of chosen and rejected answers chosen",
        "log-ratio to the reference, in nats.",
    ),
    "orpo": ("by ORPO", "Log-odds of chosen over rejected", "Chosen answers, per token 1.975 nats", "nats per token."),
    "simpo": ("by SimPO", "log-probability, in nats per token."),
    "kto": (
        "by KTO on 62 judged answers. The held-out loss fell from 0.69 to 0.59",
        "held-out reward of desirable answers 0 → 0.5 held-out reward of undesirable answers 0 → -0.5",
        "Loss per judged answer",
        "Rewards of desirable and undesirable answers desirable",
        "KL estimate z",
    ),
    "reward": (
        "made a reward model with LoRA on 62 pairs. The held-out accuracy rose",
        "tokens 36,000 time in steps",
        "tokens/s, median 450",
        "61.0% of 600 pairs rank right, 5.5 standard errors above chance.",
        "0.40 to 3.10 300 67.0% 2.7%",
        "how far the model's own two scores lie apart",
        "before 0 -0.25 +0.250 step 10 0.5 -0.25 +0.750 after 1 -0.25 +1.250",
        "rejected not an answer",
    ),
    "grpo": (
        "by GRPO on 62 prompts. The held-out reward rose from 0.1 to 0.6 in 40 steps.",
        "16 answers = 8 × 4 × 1 × 1",
        "held-out reward 0.1 → 0.6 held-out KL to the reference, nats 0.000 → 0.02",
        "answer tokens 7,200",
        "Reward by exact_match",
        "Prompts all of whose answers are worth the same 25.0%",
    ),
    "rloo": ("by RLOO", "held-out reward 0.1 → 0.6 held-out tokens of an answer 12.5"),
    "rejection_sampling": (
        "tuned with LoRA on the best answer to each of 62 prompts. The best of 8 drawn answers is worth 1.2 in the "
        "mean, one alone 0.3. The held-out reward rose from 0.1 to 0.6 in 40 steps.",
        "reward, one answer → best of 8 0.3 → 1.2 held-out reward 0.1 → 0.6",
        "Loss 0.685 nats at step 1",
        "0.3 at k 1, 1.2 at k 8.",
        "k value 1 0.3 ± 0.02",
        "nats per labelled token of the best answers",
    ),
}


@pytest.mark.parametrize("objective", ALIGNED)
def test_an_objective_on_answers_is_told_in_its_own_words(tmp_path, objective):
    page = read(make_aligned_run(tmp_path / "run", objective))
    for said in ALIGNED_WORDS[objective]:
        assert said in page.words, (said, page.words[:1500])
    assert ("nats per labelled token" in page.words) == (objective == "rejection_sampling")
    anchors = [attrs["id"] for tag, attrs in page.tags if tag == "h2" and "id" in attrs]
    own = {"reward": ["accuracy", "scores"], "rejection_sampling": ["best", "drawn", "answers"]}
    own |= {name: ["drawn", "answers"] for name in ("grpo", "rloo")}
    asked = own.get(objective, ["answers"])
    assert anchors == ["curves", *asked, "data", "proof", "environment", "recipe"]
    drawn = 7 if objective in ("reward", "dpo", "simpo") else 8  # each figure of metrics.jsonl is drawn once
    assert sum(tag == "figure" for tag, _ in page.tags) >= drawn
    assert sum(tag == "dt" for tag, _ in page.tags[: page.tags.index(("nav", {"aria-label": "Sections"}))]) == 15


def test_noisy_steps_are_told_by_their_means(tmp_path):
    """Without held-out rows the head tells means of a tenth of the steps, not two single steps."""
    run = make_aligned_run(tmp_path / "run", "grpo")
    lines = [line for line in aligned_metrics("grpo") if "loss" in line]
    run.metrics_file.write_text("".join(json.dumps(line) + "\n" for line in lines))
    rewards = [line["reward"] for line in lines]
    first, last = (number(sum(part) / 4) for part in (rewards[:4], rewards[-4:]))
    words = read(run).words
    assert (
        f"The training reward rose from {first} to {last} in 40 steps (means of the first and the last tenth)." in words
    )
    assert f"training reward, by tenths of the run {first} → {last}" in words
    assert first != number(rewards[0])


def test_drawn_answers_stand_by_their_worth(tmp_path):
    """Of a policy the highest reward stands first; of rejection sampling the answer that was tuned on, an ended one."""
    grpo = read(make_aligned_run(tmp_path / "grpo", "grpo")).words
    assert [f"Step {step} ·" in grpo for step in range(1, 13)] == [
        step in (1, 2, 3, 10, 11, 12) for step in range(1, 13)
    ]
    assert "2 turns before user an answer assistant earlier prompt 0: an answer 0.8 an answer 3" in grpo
    assert "exact_match 0.5 · format 3 · cut 4 answers between" in grpo
    best = read(make_aligned_run(tmp_path / "best", "rejection_sampling")).words
    assert [f"row {row} " in best for row in range(12)] == [row % 2 == 0 for row in range(12)]
    assert "prompt 2: an answer 0.7 an answer 2" in best and "cut" in best.split("prompt 2: an answer")[1]


def test_a_file_of_answers_is_read_line_by_line(tmp_path):
    run = make_aligned_run(tmp_path / "run", "rejection_sampling")
    answers = run.path / "sampled" / "answers.jsonl"
    for lines, wanted in ((0, []), (1, [0]), (7, [0, 1, 2, 3, 4, 5]), (60, [0, 10, 20, 30, 40, 50])):
        answers.write_text("".join(drawn_answers("rejection_sampling", "x", lines).splitlines(keepends=True)[:lines]))
        assert [one["where"] for one in gather(run).sampled] == [f"rows.jsonl, row {row}" for row in wanted]
    answers.unlink()
    assert gather(Run(run.path)).sampled == []


@pytest.mark.parametrize(
    ("file", "written", "said"),
    [
        ("sampled/answers.jsonl", '{"turns": 3}\n', "sampled/answers.jsonl is of another version"),
        ("sampled/best_of_k.json", '[{"k": "one"}]', "sampled/best_of_k.json is of another version"),
        ("sampled/best_of_k.json", '{"k": 1}', "These could not be read: best_of_k.json"),
        ("eval/accuracy.json", '[{"bucket": "all"}]', "eval/accuracy.json is of another version"),
        ("eval/accuracy.json", '[{"bucket": "all", "pairs": 0, "accuracy": NaN, "error": NaN}]', "all 0 – –"),
        ("eval/samples.json", '[{"question": "q", "before": "an answer"}]', "eval/samples.json is of another version"),
    ],
)
def test_damaged_files_of_an_objective_are_said_to_be(tmp_path, file, written, said):
    run = make_aligned_run(tmp_path / "run", "rejection_sampling" if file.startswith("sampled") else "reward")
    (run.path / file).write_text(written)
    assert said in read(run).words


def test_a_loss_of_an_unknown_objective_has_no_unit(tmp_path):
    run = make_run(tmp_path / "run")
    assert "4.100 nats" in read(run).words
    run.recipe_file.write_text("name: [")
    words = read(Run(run.path)).words
    assert "nats" not in words.partition("Learning rate")[0] and "Loss" in words

"""Suite `academic`: the harness's own model class on the same weights gives the same numbers."""

from __future__ import annotations

import json
from importlib.util import find_spec
from pathlib import Path
from types import SimpleNamespace

import pytest

from llama_ft.errors import UserError
from llama_ft.evaluate.academic import Academic
from llama_ft.evaluate.opening import open_model
from llama_ft.evaluate.subject import Subject
from llama_ft.evaluate.suites import Context
from tests.evaluate.harness_rows import ANSWER, CHOICE, write_rows, write_task

harness = pytest.mark.skipif(find_spec("lm_eval") is None, reason="the extra eval is not installed")


@pytest.fixture(scope="session")
def model(tiny_base) -> Subject:
    return open_model(str(tiny_base))


@pytest.fixture(scope="session")
def theirs(tiny_base):
    from lm_eval.models.huggingface import HFLM

    return HFLM(pretrained=str(tiny_base), dtype="float32", device="cpu", batch_size=3)


@pytest.fixture(autouse=True)
def own_rows_cache(tmp_path, monkeypatch):
    import datasets

    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", str(tmp_path / "cache"))


@pytest.fixture
def task(real_data, tmp_path) -> Path:
    return write_task(tmp_path / "easy.yaml", real_data / "eval" / "arc_easy.jsonl", CHOICE)


def requests(*arguments: tuple) -> list[SimpleNamespace]:
    return [SimpleNamespace(args=one) for one in arguments]


@harness
def test_requests_are_answered_as_by_the_harness(model, theirs):
    """Likelihoods of endings, of texts longer than the context, and greedy text, against lm_eval's own `hf`."""
    from llama_ft.evaluate.harness import SubjectLM

    ours = SubjectLM(model)
    pairs = [("the llama eats", " hay"), ("the alpaca sleeps ", "on a hill of stones"), ("", "grass"), ("a\n", "b c d")]
    for (nats, greedy), (own, likely) in zip(
        ours.loglikelihood(requests(*pairs)), theirs.loglikelihood(requests(*pairs)), strict=True
    ):
        assert nats == pytest.approx(own, abs=1e-3)
        assert greedy == likely
    texts = [("the llama eats grass",), ("hay and stones near the river " * 60,), ("the llama eats grass",)]
    mine, their = (one.loglikelihood_rolling(requests(*texts)) for one in (ours, theirs))
    assert mine[0] == pytest.approx(their[0], abs=1e-3) and mine[2] == mine[0]
    assert mine[1] == pytest.approx(their[1], rel=0.02), "windows are one token shorter"


@harness
def test_answers_of_all_settings_are_those_of_the_harness_and_drawn_together(model, theirs, monkeypatch):
    """Forty requests whose stops, lengths and prompts alternate: three calls of the sampler, and the same text each."""
    from llama_ft.evaluate.harness import SubjectLM

    base = {"until": ["."], "max_gen_toks": 24, "do_sample": False}
    kinds = [base, {**base, "until": ["a", "he ", "<|im_end|>"]}, {"until": "\n", "max_new_tokens": 9}]
    texts = ["the llama", "grass and hay while", "what", "river " * 300, "on a hill of stones near the llama sleeps"]
    asked = [(texts[n % 5] + str(n // 15), kinds[n % 3]) for n in range(40)]
    calls = []
    real = Subject.answers

    def answers(self, prompts, *rest, **named):
        calls.append(len(prompts))
        return real(self, prompts, *rest, **named)

    monkeypatch.setattr(Subject, "answers", answers)
    mine = SubjectLM(model).generate_until(requests(*asked))
    assert mine == theirs.generate_until(requests(*asked))
    assert len(set(mine)) > 10, "random weights that always say the same would prove nothing"
    assert len(calls) == 3 and sum(calls) == len({json.dumps(one) for one in asked})


@harness
def test_repeats_that_are_drawn_differ_and_come_again(model):
    from llama_ft.evaluate.harness import SubjectLM

    drawn = {"until": [], "max_gen_toks": 12, "do_sample": True, "temperature": 1.0}
    asked = requests(*[("the llama", drawn)] * 70, ("grass", drawn))
    once = SubjectLM(model).generate_until(asked)
    assert len(set(once)) > 60
    assert SubjectLM(model).generate_until(asked) == once
    assert SubjectLM(model, seed=1).generate_until(asked) != once


@harness
@pytest.mark.parametrize(
    ("settings", "said"),
    [
        ({"num_beams": 4}, "the task draws answers with num_beams=4"),
        ({"do_sample": True, "temperature": 1.0, "top_k": 50}, "draws answers with top_k=50"),
        ({"max_gen_toks": 512}, "asks for answers of up to 512 tokens, .* reads 512"),
    ],
)
def test_settings_that_are_not_followed_are_refused(model, settings, said):
    from llama_ft.evaluate.harness import SubjectLM

    with pytest.raises(UserError, match=said):
        SubjectLM(model).generate_until(requests(("the llama", {"until": [], **settings})))
    followed = {"until": [], "max_gen_toks": 2, "num_beams": 1, "top_k": 50, "temperature": 0}
    assert SubjectLM(model).generate_until(requests(("the llama", followed)))


@harness
def test_a_task_from_a_file(model, task, tmp_path):
    seen = []
    context = Context(tmp_path / "eval", tasks=[str(task)], limit=8, report=lambda *one: seen.append(one))
    assert not Academic().needs(context)
    result = Academic().run(model, context)
    assert [score.name for score in result.scores] == ["easy: acc", "easy: acc_norm"]
    for score in result.scores:
        assert score.rows == 8
        assert score.low <= score.value <= score.high
        assert score.value == sum(row["values"][score.name] for row in result.rows) / 8
    assert len(result.rows) == 8
    assert "Answer:" in result.rows[0]["asked"]
    assert json.dumps(result.as_dict())
    asked = seen[-1][2]
    assert seen[-1] == ("easy: requests", asked, asked) and 24 <= asked <= 40, "three to five choices to a question"


@harness
def test_a_finished_result_is_taken_over_while_its_files_are_the_same(model, tmp_path):
    rows = write_rows(tmp_path / "rows.jsonl")
    task = write_task(tmp_path / "told.yaml", rows, ANSWER)
    seen = []
    context = Context(tmp_path / "eval", tasks=[str(task)], limit=3, report=lambda *one: seen.append(one))
    first = Academic().run(model, context)
    first.write(context.folder)
    seen.clear()
    assert Academic().run(model, context).as_dict() == first.as_dict()
    assert not seen, "nothing was asked again"
    write_rows(rows, 20)
    with pytest.raises(UserError, match=r"other settings \(files\).*--overwrite"):
        Academic().run(model, context)


@harness
def test_a_task_that_cannot_be_run(model, task, tmp_path):
    other = task.with_name("other.yaml")
    task.rename(other)
    with pytest.raises(UserError, match=r"other.yaml' cannot be run.*its file must be named as the task in it"):
        Academic().run(model, Context(tmp_path / "eval", tasks=[str(other)], limit=2))


@harness
def test_a_template_that_is_not_there_is_refused(model, task, tmp_path):
    with pytest.raises(UserError, match=r"--apply-chat-template: .* has no chat template.*--template chatml"):
        Academic().run(model, Context(tmp_path / "eval", tasks=[str(task)], limit=2, chat=True))


@harness
def test_a_template_that_refuses_a_request_says_so(tiny_base, tmp_path):
    """Alpaca's template takes one question, and examples are earlier turns."""
    spoken = open_model(str(tiny_base), "alpaca")
    rows = write_rows(tmp_path / "rows.jsonl")
    shots = {"num_fewshot": 2, "fewshot_split": "test"}
    task = write_task(tmp_path / "told.yaml", rows, {**ANSWER, **shots})
    with pytest.raises(UserError, match=r"--apply-chat-template: the template 'alpaca' does not take a request"):
        Academic().run(spoken, Context(tmp_path / "eval", tasks=[str(task)], limit=2, chat=True))


def test_what_is_missing_is_told_before_a_model_is_loaded(tmp_path, monkeypatch):
    monkeypatch.setattr("llama_ft.evaluate.academic.find_spec", lambda name: None)
    said = [str(one) for one in Academic().needs(Context(tmp_path))]
    assert "pip install 'llama-ft[eval]'" in said[0]
    assert said[1].startswith("--tasks: suite academic needs tasks")
    [_, problem] = Academic().needs(Context(tmp_path, tasks=["none.yaml", "arc_easy"]))
    assert "there is no file 'none.yaml'" in str(problem)

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

harness = pytest.mark.skipif(find_spec("lm_eval") is None, reason="the extra eval is not installed")
TASK = """
task: {name}
dataset_path: json
dataset_kwargs: {{data_files: {{test: {rows}}}}}
output_type: {kind}
test_split: test
doc_to_text: "{{{{query}}}}\\nAnswer:"
doc_to_target: "{target}"
doc_to_choice: "{{{{choices}}}}"
metric_list: [{{metric: acc}}, {{metric: acc_norm}}]
"""


@pytest.fixture(scope="session")
def model(tiny_base) -> Subject:
    return open_model(str(tiny_base))


@pytest.fixture
def task(real_data, tmp_path, monkeypatch) -> Path:
    monkeypatch.setenv("HF_DATASETS_CACHE", str(tmp_path / "cache"))
    path = tmp_path / "easy.yaml"
    rows = real_data / "eval" / "arc_easy.jsonl"
    path.write_text(TASK.format(name="easy", rows=rows, kind="multiple_choice", target="{{gold}}"))
    return path


def requests(*arguments: tuple) -> list[SimpleNamespace]:
    return [SimpleNamespace(args=one) for one in arguments]


@harness
def test_requests_are_answered_as_by_the_harness(model, tiny_base):
    """Likelihoods of endings, of texts longer than the context, and greedy text, against lm_eval's own `hf`."""
    from lm_eval.models.huggingface import HFLM

    from llama_ft.evaluate.harness import SubjectLM

    theirs = HFLM(pretrained=str(tiny_base), dtype="float32", device="cpu", batch_size=2)
    ours = SubjectLM(model)
    pairs = [("the llama eats", " hay"), ("the alpaca sleeps ", "on a hill of stones"), ("", "grass"), ("a\n", "b c d")]
    for (nats, greedy), (own, likely) in zip(
        ours.loglikelihood(requests(*pairs)), theirs.loglikelihood(requests(*pairs)), strict=True
    ):
        assert nats == pytest.approx(own, abs=1e-3)
        assert greedy == likely
    texts = [("the llama eats grass",), ("hay and stones near the river " * 60,)]
    mine, their = (one.loglikelihood_rolling(requests(*texts)) for one in (ours, theirs))
    assert mine[0] == pytest.approx(their[0], abs=1e-3)
    assert mine[1] == pytest.approx(their[1], rel=0.02), "windows are one token shorter"
    settings = {"until": ["."], "max_gen_toks": 24, "do_sample": False}
    asked = [("the llama", settings), ("grass and hay while", settings), ("what", {**settings, "until": ["a"]})]
    mine, their = (one.generate_until(requests(*asked)) for one in (ours, theirs))
    assert mine == their


@harness
def test_a_task_from_a_file(model, task, tmp_path):
    context = Context(tmp_path / "eval", tasks=[str(task)], limit=8)
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


@harness
def test_a_task_that_cannot_be_run(model, task, tmp_path):
    other = task.with_name("other.yaml")
    task.rename(other)
    with pytest.raises(UserError, match=r"other.yaml' cannot be run.*its file must be named as the task in it"):
        Academic().run(model, Context(tmp_path / "eval", tasks=[str(other)], limit=2))


def test_what_is_missing_is_told_before_a_model_is_loaded(tmp_path, monkeypatch):
    monkeypatch.setattr("llama_ft.evaluate.academic.find_spec", lambda name: None)
    said = [str(one) for one in Academic().needs(Context(tmp_path))]
    assert "pip install 'llama-ft[eval]'" in said[0]
    assert said[1].startswith("--tasks: suite academic needs tasks")
    [_, problem] = Academic().needs(Context(tmp_path, tasks=["none.yaml", "arc_easy"]))
    assert "there is no file 'none.yaml'" in str(problem)

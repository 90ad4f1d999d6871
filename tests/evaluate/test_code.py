"""Suite `code`: the estimator, both files whole through the sandbox, and a run of the suite."""

from __future__ import annotations

import json
import math
import random
from itertools import combinations
from pathlib import Path

import pytest

from llama_ft.errors import UserError
from llama_ft.evaluate import code, material
from llama_ft.evaluate.code import Code, converses, pass_at_k, prompt_ids
from llama_ft.evaluate.code_tasks import HUMANEVAL_STOPS, Task, kind_of, read_tasks
from llama_ft.evaluate.opening import open_model
from llama_ft.evaluate.subject import Answer, Subject
from llama_ft.evaluate.suites import Context
from llama_ft.sandbox.programs import Sandbox

SECONDS = 30.0
"""For a program of which it is known that it ends: tests share their cores."""


@pytest.fixture(scope="session")
def human_eval(real_data) -> Path:
    return real_data / "eval" / "HumanEval.jsonl.gz"


@pytest.fixture(scope="session")
def mbpp(real_data) -> Path:
    return real_data / "eval" / "mbpp.jsonl"


def passed(tasks: list[Task], answers: list[str], *, chat: bool) -> int:
    programs = [task.program(answer, chat=chat) for task, answer in zip(tasks, answers, strict=True)]
    with Sandbox() as sandbox:
        return sandbox.run(programs, SECONDS).count("passed")


# The estimator


@pytest.mark.parametrize("samples", [1, 2, 5, 8])
def test_pass_at_k_is_the_share_of_all_draws_that_hold_one_that_passed(samples):
    for right in range(samples + 1):
        for k in range(1, samples + 1):
            draws = list(combinations([True] * right + [False] * (samples - right), k))
            assert pass_at_k(samples, right, k) == pytest.approx(sum(map(any, draws)) / len(draws), abs=1e-12)


def test_pass_at_k_of_many_samples():
    """Binomials of 1000 over 100 have 140 digits; Python's own are exact."""
    for right in (0, 1, 37, 900, 901, 1000):
        exact = 1 - math.comb(1000 - right, 100) / math.comb(1000, 100)
        assert pass_at_k(1000, right, 100) == pytest.approx(exact, rel=1e-9)
    assert pass_at_k(200, 7, 1) == pytest.approx(7 / 200)
    for bad in ((5, 0, 6), (5, 6, 1), (5, 1, 0), (5, -1, 1)):
        with pytest.raises(ValueError, match="pass@"):
            pass_at_k(*bad)


# The files


def test_human_eval_through_the_sandbox(human_eval):
    """All canonical solutions pass, no empty one does."""
    tasks = read_tasks(str(human_eval), "HumanEval")
    assert len(tasks) == 164
    assert passed(tasks, [task.solution for task in tasks], chat=False) == 164
    assert passed(tasks, [""] * 164, chat=False) == 0


def test_human_eval_from_fenced_blocks(human_eval):
    """Whole functions, bodies alone, and blocks before and after the one that counts."""
    tasks = random.Random(0).sample(read_tasks(str(human_eval), "HumanEval"), 12)
    tasks += [task for task in read_tasks(str(human_eval), "HumanEval") if task.id in ("HumanEval/32", "HumanEval/38")]
    whole = [f"Sure:\n```python\n{task.before}{task.solution}\n```\nIt is used so:\n```\n2\n```" for task in tasks]
    bodies = [f"Install it:\n\n```python\n{task.solution}\n```" for task in tasks]
    behind = [f"```sh\npip install x\n```\n1. then\n\n{indented(task.before + task.solution)}" for task in tasks]
    plain = [task.before + task.solution for task in tasks]
    closed = [f"{task.before}{task.solution}\n```\nIt is used so." for task in tasks]
    body = [f"{task.solution}\n```" for task in tasks]
    for answers in (whole, bodies, behind, plain, closed, body):
        assert passed(tasks, answers, chat=True) == len(tasks)
    for answers in (["I cannot."] * len(tasks), [""] * len(tasks), ["```python\n```"] * len(tasks)):
        assert passed(tasks, answers, chat=True) == 0


def indented(text: str) -> str:
    return "\n".join(f"   {line}" for line in ["```python", *text.split("\n"), "```"])


def test_mbpp_through_the_sandbox(mbpp):
    """Each tenth of its test split; all of them below."""
    tasks = read_tasks(str(mbpp), "MBPP")
    assert [task.id for task in tasks] == [f"MBPP/{number}" for number in range(11, 511)]
    part = tasks[::10]
    assert passed(part, [task.solution for task in part], chat=False) == 50
    assert passed(part, [f"```python\n{task.solution}\n```" for task in part], chat=True) == 50
    assert passed(part, [""] * 50, chat=False) == 0


@pytest.mark.slow
def test_all_of_mbpp_through_the_sandbox(mbpp):
    tasks = read_tasks(str(mbpp), "MBPP")
    assert passed(tasks, [task.solution for task in tasks], chat=False) == 500
    assert passed(tasks, [""] * 500, chat=False) == 0


def test_what_a_base_continues(human_eval, mbpp):
    """HumanEval's prompt as it is; MBPP's with three tasks before it, as its authors write them."""
    first = read_tasks(str(human_eval), "HumanEval")[0]
    assert first.complete == first.before
    assert first.complete.endswith('"""\n')
    task = read_tasks(str(mbpp), "MBPP")[0]
    assert task.complete.count("You are an expert Python programmer, and here is your task: ") == 4
    assert task.complete.count("[DONE]") == 3
    assert "\r" not in task.complete
    assert task.complete.endswith('assert remove_Occ("PHP","P") == "H"\n[BEGIN]\n')


def test_files_that_hold_no_tasks(tmp_path, human_eval, mbpp, real_data):
    assert kind_of(str(human_eval)) == "HumanEval"
    assert kind_of(str(mbpp)) == "MBPP"
    assert kind_of(str(real_data / "eval" / "arc_easy.jsonl")) is None
    assert kind_of(str(tmp_path / "none")) is None
    (tmp_path / "cut.jsonl.gz").write_bytes(human_eval.read_bytes()[:30000])
    with pytest.raises(UserError, match="cannot be read"):
        read_tasks(str(tmp_path / "cut.jsonl.gz"), "HumanEval")
    good = {
        "task_id": "a",
        "prompt": "def f():\n",
        "entry_point": "f",
        "canonical_solution": "    return 1",
        "test": "",
    }
    rows = [good, {**good, "test": "def check(:"}, {k: v for k, v in good.items() if k != "prompt"}, good]
    (tmp_path / "bad.jsonl").write_text("\n".join(map(json.dumps, rows)))
    with pytest.raises(UserError) as error:
        read_tasks(str(tmp_path / "bad.jsonl"), "HumanEval")
    said = str(error.value)
    assert "bad.jsonl, row 1: this is no row of HumanEval: its code is no Python (invalid syntax, line 1)" in said
    assert "bad.jsonl, row 2: this is no row of HumanEval: 'prompt' is missing" in said
    assert "two rows have the same task_id" in said


# The suite


class Knows(Subject):
    """A subject that answers with what it was given, by the words of its prompt: the model behind it is never asked."""

    def __init__(self, subject: Subject, said: dict[str, list[str]]):
        super().__init__("knows", subject.model, subject.renderer, subject.stop)
        self.said = said
        self.asked: list[str] = []

    def answers(self, prompts, max_tokens, stop=(), temperature=0.0, top_p=1.0, seed=0, samples=1, tick=None):
        found = []
        for ids in prompts:
            prompt = self.tokenizer.decode(ids)
            self.asked.append(prompt)
            said = next(said for words, said in self.said.items() if words in prompt)
            found.append([Answer(one, [1], "end") for one in (said * samples)[:samples]])
        return found


@pytest.fixture(scope="session")
def model(tiny_base) -> Subject:
    return open_model(str(tiny_base), "chatml")


def test_scores_of_a_subject_that_knows_some(model, human_eval, tmp_path):
    """8 tasks, 10 samples each: of task n the first n pass."""
    context = Context(tmp_path, data=[str(human_eval)], limit=8, samples=10)
    tasks = code.drawn(read_tasks(str(human_eval), "HumanEval"), 8, 0)
    said = {}
    for number, task in enumerate(tasks):
        right = f"```python\n{task.before}{task.solution}\n```"
        said[task.complete.strip()] = [right] * number + ["```python\nimport os\nos._exit(0)\n```"] * (10 - number)
    subject = Knows(model, said)
    result = Code().run(subject, context)
    assert [score.name for score in result.scores] == ["HumanEval: pass@1", "HumanEval: pass@10"]
    first, ten = result.scores
    assert first.value == pytest.approx(sum(range(8)) / 80)
    assert ten.value == pytest.approx(7 / 8)
    assert first.low < first.value < first.high
    assert (first.rows, first.unit, first.better) == (8, "share", "higher")
    assert [row["passed"] for row in result.rows] == list(range(8))
    assert result.settings["asked"] == "chat"
    assert all("<|im_start|>user\nComplete this Python function." in prompt for prompt in subject.asked)
    Code().run(subject, context)
    assert len(subject.asked) == 8, "rows that are there are not measured again"


def test_a_real_model_answers_and_is_run(model, human_eval, mbpp, tmp_path):
    """Both files, two samples each; drawn again they are the same."""
    context = Context(tmp_path / "a", data=[str(human_eval), str(mbpp)], limit=2, samples=2)
    result = Code().run(model, context)
    assert [score.name for score in result.scores] == ["HumanEval: pass@1", "MBPP: pass@1"]
    assert [score.value for score in result.scores] == [0.0, 0.0]
    again = Code().run(model, Context(tmp_path / "b", data=[str(human_eval), str(mbpp)], limit=2, samples=2))
    assert [row["answers"] for row in again.rows] == [row["answers"] for row in result.rows]
    assert not Code().needs(context)


def test_a_model_without_a_template_continues(tiny_base, human_eval, tmp_path):
    """And no row holds a stop string."""
    result = Code().run(open_model(str(tiny_base)), Context(tmp_path, data=[str(human_eval)], limit=3))
    assert result.settings["asked"] == "completion"
    assert result.settings["top_p"] == 1.0
    assert not any(stop in row["answer"] for row in result.rows for stop in HUMANEVAL_STOPS)


def test_who_is_asked_in_a_template(model, tiny_base, human_eval, tmp_path):
    silent = open_model(str(tiny_base))
    context = Context(tmp_path)
    assert converses(model, context)
    assert not converses(silent, context)
    task = read_tasks(str(human_eval), "HumanEval")[0]
    assert model.tokenizer.decode(prompt_ids(silent, task, chat=False)) == task.complete
    model_says = model.tokenizer.decode(prompt_ids(model, task, chat=True))
    assert model_says.startswith("<|im_start|>user\nComplete")
    assert model_says.endswith("<|im_start|>assistant\n")


def test_a_base_is_asked_in_the_way_that_it_knows(subjects, context):
    """The run's base came without a template of its own; what was trained has the run's."""
    assert not converses(subjects["base"], context)
    assert converses(subjects["tuned"], context)


def test_what_is_missing_is_told_before_a_model_is_loaded(tmp_path):
    [problem] = Code().needs(Context(tmp_path))
    assert "needs a file of HumanEval or MBPP" in str(problem)
    assert "HumanEval.jsonl.gz" in str(problem)


def test_without_walls_it_says_how_to_go_on(tmp_path, human_eval, monkeypatch):
    from llama_ft.sandbox import programs

    monkeypatch.setattr(programs, "walls", lambda: (programs.Wall("system calls", False, ""),))
    context = Context(tmp_path, data=[str(human_eval)])
    [problem] = Code().needs(context)
    assert "cannot be walled in" in str(problem)
    assert "--unsandboxed" in str(problem)
    context.unsandboxed = True
    assert not Code().needs(context)


def test_two_files_of_the_same_tasks_are_refused(tmp_path, human_eval, mbpp):
    """Their rows have the same ids: the second file would never be asked, and each score counted twice."""
    twin = tmp_path / "other.jsonl.gz"
    twin.write_bytes(human_eval.read_bytes())
    [problem] = Code().needs(Context(tmp_path, data=[str(human_eval), str(twin), str(mbpp)]))
    assert "hold the same tasks (HumanEval/0, 164 in all)" in str(problem)


def test_a_file_that_lacks_a_column_is_not_passed_over(tmp_path):
    """One thing says what a file of tasks is: what one part takes for code, the other reads."""
    path, whole = tmp_path / "stripped.jsonl", tmp_path / "whole.jsonl"
    row = {"task_id": "HumanEval/0", "prompt": "def f():\n", "entry_point": "f", "test": "def check(f): pass"}
    path.write_text(json.dumps(row) + "\n")
    assert kind_of(str(path)) is None
    assert not holds_code(str(path))
    whole.write_text(json.dumps({**row, "canonical_solution": "    pass\n"}) + "\n")
    assert kind_of(str(whole)) == "HumanEval" and holds_code(str(whole))


def holds_code(path: str) -> bool:
    return material.kind_of(path) == "code"


def test_the_result_says_in_which_template(model, tiny_base, human_eval, tmp_path):
    """So that `compare` can say where two were asked in different ones."""
    context = Context(tmp_path / "a", data=[str(human_eval)], limit=1)
    chat = Code().run(model, context).settings
    assert chat["template"] == model.renderer.template.sha256[:16]
    plain = Code().run(open_model(str(tiny_base)), Context(tmp_path / "b", data=[str(human_eval)], limit=1)).settings
    assert plain["template"] is None

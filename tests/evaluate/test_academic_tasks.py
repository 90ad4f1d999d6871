"""`--tasks NAME=FILE`: the harness's own task with rows of a file, and what is told before a model is loaded."""

from __future__ import annotations

import json
from importlib.util import find_spec
from pathlib import Path

import pytest

from llama_ft.evaluate.academic import Academic
from llama_ft.evaluate.academic_tasks import Item, opened, parse, splits, stamps
from llama_ft.evaluate.opening import open_model
from llama_ft.evaluate.suites import Context
from tests.evaluate.harness_rows import CHOICE, write_rows, write_task
from tests.tiny_run import make_base

harness = pytest.mark.skipif(find_spec("lm_eval") is None, reason="the extra eval is not installed")
IFEVAL = {"key": 1, "prompt": "Say llama.", "instruction_id_list": ["punctuation:no_comma"], "kwargs": [{}]}


@pytest.fixture(autouse=True)
def own_rows_cache(tmp_path, monkeypatch):
    import datasets

    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", str(tmp_path / "cache"))


def has_punkt() -> bool:
    if find_spec("nltk") is None:
        return False
    import nltk

    try:
        nltk.data.find("tokenizers/punkt_tab")
    except LookupError:
        return False
    return True


def needs(tmp_path: Path, *tasks: str) -> list[str]:
    return [str(one) for one in Academic().needs(Context(tmp_path, tasks=list(tasks)))]


def write(path: Path, *rows: dict) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def test_what_tasks_are_read_as(tmp_path):
    assert parse("arc_easy") == Item("arc_easy", "arc_easy")
    assert parse("some/mine.yaml") == Item("mine", "some/mine.yaml")
    assert parse("gsm8k=a.jsonl") == Item("gsm8k", "gsm8k=a.jsonl", Path("a.jsonl"))
    assert parse("gsm8k=a.jsonl+b.jsonl") == Item("gsm8k", "gsm8k=a.jsonl+b.jsonl", Path("a.jsonl"), Path("b.jsonl"))
    odd = write_rows(tmp_path / "a+b.jsonl")
    assert parse(f"gsm8k={odd}").rows == odd and parse(f"gsm8k={odd}").examples is None


@pytest.mark.parametrize(
    ("config", "found"),
    [
        ({"test_split": "test", "training_split": "train", "num_fewshot": 5}, ("test", "train", 5)),
        ({"validation_split": "validation", "training_split": "train"}, ("validation", "train", 0)),
        ({"test_split": "test", "fewshot_split": "dev", "training_split": "train"}, ("test", "dev", 0)),
        ({"test_split": "test", "num_fewshot": 4, "fewshot_config": {"samples": "utils.mine"}}, ("test", "test", 0)),
        ({"test_split": "train", "num_fewshot": 3}, ("train", "train", 3)),
    ],
)
def test_which_rows_are_asked_and_which_are_examples(config, found):
    assert splits(config) == found


@harness
def test_gsm8k_asks_the_files_rows_behind_examples_of_the_other_file(tiny_base, real_data, tmp_path):
    """The harness's prompts, its five examples and its two readings of answers, under its name."""
    lines = (real_data / "eval" / "gsm8k_test.jsonl").read_text().splitlines()
    rows, shots = tmp_path / "rows.jsonl", tmp_path / "shots.jsonl"
    rows.write_text("\n".join(lines[:3]))
    shots.write_text("\n".join(lines[100:130]))
    place = f"gsm8k={rows}+{shots}"
    assert needs(tmp_path, place) == []
    result = Academic().run(open_model(str(tiny_base)), Context(tmp_path / "eval", tasks=[place]))
    names = ["gsm8k: exact_match (strict-match)", "gsm8k: exact_match (flexible-extract)"]
    assert [score.name for score in result.scores] == names
    questions = [json.loads(line)["question"] for line in lines]
    assert [row["id"] for row in result.rows] == ["gsm8k:0", "gsm8k:1", "gsm8k:2"]
    for row, question in zip(result.rows, questions, strict=False):
        assert row["asked"].endswith(f"Question: {question}\nAnswer:")
    with opened(parse(place)) as manager:
        task = manager.load(["gsm8k"])["tasks"]["gsm8k"]
    task.set_fewshot_seed(1234)
    context = task.fewshot_context(next(iter(task.eval_docs)), 5)
    assert sum(f"Question: {question}\n" in context for question in questions[100:130]) == 5
    assert set(result.settings["files"]) == {str(rows), str(shots)}


@harness
def test_other_formats_and_a_task_that_makes_its_own_columns(tmp_path):
    """hellaswag joins columns of its rows, and has examples that nobody asked for."""
    import pandas

    row = {"ind": 3, "activity_label": "Llamas", "ctx_a": "A llama", "ctx_b": "it", "label": "1", "source_id": "x"}
    row |= {"split": "val", "split_type": "indomain", "ctx": "A llama it"}
    pandas.DataFrame([row | {"endings": ["eats", "sings"]}]).to_parquet(tmp_path / "rows.parquet")
    assert needs(tmp_path, f"hellaswag={tmp_path / 'rows.parquet'}") == []
    lacking = write(tmp_path / "rows.jsonl", {"ctx_a": "A llama", "ctx_b": "it"})
    [said] = needs(tmp_path, f"hellaswag={lacking}")
    assert "rows.jsonl lacks what the task 'hellaswag' looks for in a row: 'activity_label'" in said
    pandas.DataFrame([{"question": "1+1?", "answer": "#### 2"}]).to_csv(tmp_path / "rows.csv", index=False)
    assert needs(tmp_path, f"gsm8k={tmp_path / 'rows.csv'}+{tmp_path / 'rows.csv'}") == []


@harness
def test_mistakes_are_told_together(tmp_path):
    rows = write(tmp_path / "rows.jsonl", {"query": "?", "answer": "#### 2"})
    empty = write(tmp_path / "empty.jsonl")
    other = tmp_path / "rows.txt"
    other.write_text("?")
    said = needs(tmp_path, "gsm8k=none.jsonl", f"hellaswag={other}", f"gsm8k={rows}+{other}")
    assert "the task 'gsm8k' is named twice" in said[0]
    assert "there is no file 'none.jsonl'" in said[1]
    assert "of no format that is read here" in said[2] and ".jsonl, .json, .parquet, .csv" in said[2]
    assert "are of different formats" in said[-1]
    [said] = needs(tmp_path, f"gsm8k={rows}")
    assert "puts 5 examples of its split 'train' into prompts" in said and f"gsm8k={rows}+EXAMPLES" in said
    [said] = needs(tmp_path, f"gsm8k={rows}+{rows}")[:1]
    assert "rows.jsonl lacks columns of the task 'gsm8k': question — it has query, answer" in said
    assert needs(tmp_path, f"gsm8k={empty}+{empty}")[0] == f"--tasks: {empty} holds no rows"
    empty.write_text("{broken\n")
    [said] = needs(tmp_path, f"gsm8k={empty}+{empty}")
    assert said.startswith(f"--tasks: {empty} cannot be read as rows: ")


@harness
def test_a_name_that_there_is_none_of(tmp_path, monkeypatch):
    """Among the tasks of one folder: reading all 15,000 takes seconds."""
    from lm_eval import tasks

    folder = Path(tasks.__file__).parent / "arc"
    few = tasks.TaskManager(include_path=str(folder), include_defaults=False)
    monkeypatch.setattr("llama_ft.evaluate.academic_tasks._index", lambda path: few)
    [said] = needs(tmp_path, "arc_eazy")
    assert said == "--tasks: lm-evaluation-harness has no task 'arc_eazy' — did you mean 'arc_easy'?"
    [said] = needs(tmp_path, f"ai2_arc={write_rows(tmp_path / 'rows.jsonl')}")
    assert "'ai2_arc' is a group of tasks" in said


@harness
def test_data_of_nltk_is_asked_for_before_anything_is_answered(tmp_path, monkeypatch):
    import nltk
    from lm_eval import tasks

    monkeypatch.setattr(nltk.data, "path", [])
    [said] = needs(tmp_path, "ifeval")
    assert "'ifeval' needs nltk's data punkt_tab, which is not here — python -m nltk.downloader punkt_tab" in said
    assert "NLTK_DATA" in said
    include = {"include": str(Path(tasks.__file__).parent / "ifeval" / "ifeval.yaml")}
    [said] = needs(tmp_path, str(write_task(tmp_path / "mine.yaml", write_rows(tmp_path / "rows.jsonl"), include)))
    assert "'mine' needs nltk's data punkt_tab" in said
    leaderboard = tasks.TaskManager(
        include_path=str(Path(tasks.__file__).parent / "leaderboard"), include_defaults=False
    )
    monkeypatch.setattr("llama_ft.evaluate.academic_tasks._index", lambda path: leaderboard)
    [said] = needs(tmp_path, "leaderboard_instruction_following")
    assert "needs nltk's data punkt_tab" in said


@harness
def test_files_that_a_task_file_names_belong_to_the_settings(tmp_path):
    rows = write_rows(tmp_path / "rows.jsonl")
    task = write_task(tmp_path / "mine.yaml", rows, CHOICE)
    before = stamps(parse(str(task)))
    assert set(before) == {str(task), str(rows)}
    write_rows(rows, 3)
    assert stamps(parse(str(task)))[str(rows)] != before[str(rows)]


@harness
@pytest.mark.skipif(not has_punkt(), reason="nltk's punkt_tab is not here")
def test_ifeval_with_real_rows(real_data, tmp_path):
    """Six of its own rows, whose `kwargs` have other keys each: the scores and answers of lm_eval's model class."""
    from lm_eval import simple_evaluate

    place = f"ifeval={real_data / 'eval' / 'ifeval_input_data.jsonl'}"
    lacking = write(tmp_path / "rows.jsonl", {k: v for k, v in IFEVAL.items() if k != "kwargs"})
    assert "looks for in a row: 'kwargs'" in needs(tmp_path, f"ifeval={lacking}")[0]
    assert needs(tmp_path, place, f"gsm8k={lacking}") != [] == needs(tmp_path, place)
    base = make_base(tmp_path / "base", max_position_embeddings=4096)
    ours = Academic().run(open_model(str(base)), Context(tmp_path / "eval", tasks=[place], limit=6))
    with opened(parse(place)) as manager:
        theirs = simple_evaluate(
            model="hf",
            model_args={"pretrained": str(base), "dtype": "float32"},
            device="cpu",
            batch_size=6,
            tasks=["ifeval"],
            limit=6,
            bootstrap_iters=0,
            task_manager=manager,
        )
    assert theirs is not None and len(ours.scores) == 4
    for score in ours.scores:
        assert score.value == theirs["results"]["ifeval"][score.name.removeprefix("ifeval: ") + ",none"]
    for row, sample in zip(ours.rows, theirs["samples"]["ifeval"], strict=True):
        assert row["answer"] == str(sample["filtered_resps"])[:2000]

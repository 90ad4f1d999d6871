"""Rewards: built-in functions against values by hand, and users' functions that fail in every way, each by its name."""

from __future__ import annotations

import json
import os
import re
import signal
import sys
import time
from fractions import Fraction
from pathlib import Path
from types import SimpleNamespace

import psutil
import pytest
import torch

from llama_ft.errors import UserError
from llama_ft.recipe.schema_online import Reward
from llama_ft.sandbox import walled
from llama_ft.train.rewards import called
from llama_ft.train.rewards.function import last_number, matches
from llama_ft.train.rewards.rewards import Asked, Rewards, distinct, name_of
from llama_ft.train.rewards.worker import Worker

CPU = torch.device("cpu")


def asked(answer: str, reference: str | None = "4", row: str = "rows.jsonl, row 7", tokens: int = 10) -> Asked:
    prompt = [{"role": "user", "content": "2 + 2?"}]
    return Asked(prompt, answer, reference, row, list(range(5 + tokens)), True, 5)


def opened(*entries: dict) -> Rewards:
    return Rewards.open(SimpleNamespace(rewards=[Reward(**one) for one in entries]), CPU)


def refused(*entries: dict) -> str:
    with pytest.raises(UserError) as error:
        opened(*entries).close()
    return str(error.value)


def children() -> set[int]:
    """Processes below this one, and of sessions that they began."""
    return {one.pid for one in psutil.Process().children(recursive=True) if one.status() != psutil.STATUS_ZOMBIE}


# Numbers and texts


@pytest.mark.parametrize(
    ("text", "number"),
    [
        ("so it is 1,234.50.", Fraction(2469, 2)),
        ("#### 72", 72),
        ("x = -5", -5),
        ("5 - 3 = 2", 2),
        ("(3)-2", 2),
        ("\u22127 apples", -7),
        ("1/2", Fraction(1, 2)),
        ("12/4", 3),
        ("on 5/12/2020", 2020),
        ("1/0", 0),
        ("$1,000,000", 1_000_000),
        ("1,2,3", 3),
        (".5", Fraction(1, 2)),
        ("2e-3", Fraction(1, 500)),
        ("50 %", 50),
        ("version 2.0.1", 1),
        ("none at all", None),
        ("9" * 5000, "9" * 5000),
        ("1e999999999", "1e999999999"),
    ],
)
def test_the_last_number_of_a_text(text, number):
    assert last_number(text) == number


def test_reading_numbers_takes_linear_time():
    """What a sampler may produce: the slowest of these took 0.2 s for 200,000 characters."""
    start = time.process_time()
    for part in ("1,", "-", "1.1.1", "1e", "111,", "1/", ".1", "1"):
        last_number(part * (200_000 // len(part)))
    assert time.process_time() - start < 5


def test_exact_match():
    assert matches("First 3, then 1 more: 4.0", "2 + 2 = 4")
    assert not matches("I say 5", "4")
    assert not matches("four", "4")
    assert matches("  Paris\n", "paris")
    assert not matches("Paris, France", "Paris")
    with opened({"function": "exact_match"}) as rewards:
        assert [one.total for one in rewards.score([asked("it is 4"), asked("it is 5")])] == [1.0, 0.0]
        assert rewards.score([]) == []
        with pytest.raises(UserError, match=r"rows.jsonl, row 7: .*the row has no answer of its own"):
            rewards.score([asked("4", None)])


def test_length_counts_tokens_from_0_at_the_target_to_minus_1():
    with opened({"function": "length", "target": 10}) as rewards:
        answers = [asked("a", tokens=count) for count in (10, 5, 15, 20, 40, 1)]
        assert [one.total for one in rewards.score(answers)] == pytest.approx([0, -0.5, -0.5, -1, -1, -0.9])


def test_format_matches_the_whole_answer():
    with opened({"function": "format", "pattern": r"(?s)<think>.*</think>\s*\d+"}) as rewards:
        said = ["<think>two\nand two</think>\n4", "<think>two</think> 4 it is", "4"]
        assert [one.total for one in rewards.score([asked(one) for one in said])] == [1.0, 0.0, 0.0]
    with opened({"function": "format", "pattern": r".*= ?-?\d+\.?"}) as rewards:
        said = ["12 + 5 = 17", "12 + 5 = 17 I think"]
        assert [one.total for one in rewards.score([asked(one) for one in said])] == [1.0, 0.0]


def test_values_are_weighed_and_named():
    entries = [
        {"function": "exact_match", "weight": 2},
        {"function": "length", "target": 10, "weight": -0.5},
        {"function": "length", "target": 5, "weight": 0.25},
    ]
    with opened(*entries) as rewards:
        scored = rewards.score([asked("4", tokens=5)])[0]
    assert scored.parts == {"exact_match": 1.0, "length": -0.5, "length-2": 0.0}
    assert scored.total == 2.25
    assert name_of(Reward(model="runs/helpful/")) == "helpful"
    assert name_of(Reward(function="mine/judge.py:polite")) == "polite"
    assert distinct(["a", "a-2", "a", "a"]) == ["a", "a-2", "a-3", "a-4"]


# The worker


def test_a_regex_that_hangs_is_ended_and_named():
    before = children()
    with opened({"function": "format", "pattern": "(a+)+b", "timeout": 1}) as rewards:
        assert rewards.score([asked("aaab")])[0].total == 1.0
        start = time.monotonic()
        with pytest.raises(UserError) as error:
            rewards.score([asked("a" * 40)])
        assert time.monotonic() - start < 10
    assert "rows.jsonl, row 7: rewards.0.pattern: reward format: the pattern '(a+)+b' was not done" in str(error.value)
    assert children() == before


def test_the_worker_starts_quickly_and_brings_nothing():
    """In seconds of CPU: other processes share the cores."""
    worker = Worker()
    assert worker.ask({"pattern": "a", "text": "a"}, 60.0) == {"value": 1.0}
    taken = psutil.Process(worker._process.pid).cpu_times()
    worker.close()
    assert taken.user + taken.system < 0.3
    heavy = ("torch", "numpy", "llama_ft", "transformers")
    source = Path(called.__file__).read_text() + Path(walled.__file__).read_text()
    assert not re.search(rf"^\s*(from|import) ({'|'.join(heavy)})", source, re.MULTILINE)


USER = """
import os, subprocess, sys, time
from beside import BONUS

def fine(prompt, answer, reference):
    print("I was called", flush=True)
    return len(answer) + BONUS + (prompt[0]["content"] == "2 + 2?") + (reference == "4")

def yes(prompt, answer, reference):
    return answer == reference

def raises(prompt, answer, reference):
    numbers = {}
    return numbers[answer]

def deep(prompt, answer, reference):
    import json
    return json.loads(answer)

def hangs(prompt, answer, reference):
    subprocess.Popen(["sleep", "611.25"])
    time.sleep(611)

def dies(prompt, answer, reference):
    os._exit(3)

def shot(prompt, answer, reference):
    os.kill(os.getpid(), 11)

def leaves(prompt, answer, reference):
    sys.exit("enough")

def nothing(prompt, answer, reference):
    pass

def words(prompt, answer, reference):
    return "0.5"

def wild(prompt, answer, reference):
    return float(answer)

def reads(prompt, answer, reference):
    return float(len(sys.stdin.read()))

def two(prompt, answer):
    return 0.0

def large(prompt, answer, reference):
    return len(answer)

NUMBER = 3
"""


@pytest.fixture
def users(tmp_path) -> Path:
    (tmp_path / "beside.py").write_text("BONUS = 100\n")
    (tmp_path / "mine.py").write_text(USER)
    return tmp_path / "mine.py"


def test_a_users_function_is_called_with_prompt_answer_and_reference(users, capfd):
    before = children()
    with opened({"function": f"{users}:fine"}, {"function": f"{users}:yes"}, {"function": f"{users}:large"}) as rewards:
        scored = rewards.score([asked("4"), asked("four"), asked("\U0001f999\ud800\n" * 100_000)])
        assert len(children() - before) == 1, "one process for all of them"
    assert [one.parts["fine"] for one in scored] == [103, 106, 300102]
    assert [one.parts["yes"] for one in scored] == [1, 0, 0]
    out, err = capfd.readouterr()
    assert out == ""
    assert err.count("I was called") == 3
    assert children() == before


@pytest.mark.parametrize(
    ("name", "answer", "expected"),
    [
        ("raises", "x", "raised KeyError: 'x' ({file}:14)"),
        ("deep", "{", "raised JSONDecodeError: Expecting property name"),
        ("deep", "{", "({file}:18)"),
        ("dies", "x", "ended its process (exit status 3)"),
        ("shot", "x", "ended its process (SIGSEGV)"),
        ("leaves", "x", "raised SystemExit: enough ({file}:"),
        ("nothing", "x", "returned None, which is no number"),
        ("words", "x", "returned a value of type str, which is no number"),
    ],
)
def test_a_function_that_fails_is_named_with_row_and_line(users, name, answer, expected):
    with opened({"function": f"{users}:{name}"}) as rewards, pytest.raises(UserError) as error:
        rewards.score([asked(answer)])
    said = str(error.value)
    assert said.startswith(f"rows.jsonl, row 7: rewards.0.function: reward mine.py:{name} ")
    assert expected.format(file=users) in said


@pytest.mark.parametrize("value", ["nan", "inf", "-inf"])
def test_a_value_that_is_no_number_is_named_with_its_row(users, value):
    with opened({"function": f"{users}:wild"}) as rewards:
        assert rewards.score([asked("0.5")])[0].total == 0.5
        with pytest.raises(UserError) as error:
            rewards.score([asked("1", row="rows.jsonl, row 1"), asked(value, row="rows.jsonl, row 2")])
    said = (
        f"rows.jsonl, row 2: rewards.0: reward wild gave an answer the value {value}, which is no number to learn from"
    )
    assert str(error.value) == said


def test_a_function_that_hangs_is_ended_with_all_it_started(users):
    before = children()
    with opened({"function": f"{users}:hangs", "timeout": 1}, {"function": f"{users}:yes"}) as rewards:
        start = time.monotonic()
        with pytest.raises(UserError) as error:
            rewards.score([asked("4")])
        assert 1 <= time.monotonic() - start < 10
        assert "reward mine.py:hangs was not done with an answer in 1 s" in str(error.value)
        # init takes over what the worker left; killed, it is gone in a moment
        gone = time.monotonic() + 10
        while any(one.info["cmdline"] == ["sleep", "611.25"] for one in psutil.process_iter(["cmdline"])):
            assert time.monotonic() < gone
            time.sleep(0.02)
        assert rewards._judges[1].values([asked("4")]) == [1.0], "the next call gets a new process"
    assert children() == before


def test_a_function_does_not_read_what_is_meant_for_the_worker(users):
    with opened({"function": f"{users}:reads"}) as rewards:
        assert [one.total for one in rewards.score([asked("a"), asked("b")])] == [0, 0]


def test_ctrl_c_reaches_the_worker_by_nobody_but_the_trainer(users):
    with opened({"function": f"{users}:yes"}) as rewards:
        process = rewards._judges[0].worker._process
        assert os.getsid(process.pid) == process.pid
        process.send_signal(signal.SIGINT)
        assert rewards.score([asked("4")])[0].total == 1.0


def test_a_worker_whose_trainer_is_gone_ends_by_itself(users):
    """Also within a call that does not look at signals or at its input."""
    line = [sys.executable, "-P", called.__file__]
    source = json.dumps({"pattern": "(a+)+b", "text": "a" * 60, "seconds": 0.2 - called.GRACE}).encode() + b"\n"
    process = psutil.Popen(line, stdin=-1, stdout=-1)
    process.stdin.write(source)
    process.stdin.flush()
    assert process.wait(10) == -signal.SIGALRM
    process = psutil.Popen(line, stdin=-1, stdout=-1)
    process.stdin.close()
    assert process.wait(10) == 0


def test_what_is_wrong_with_a_users_file_is_told_with_its_line(users, tmp_path):
    assert "did you mean 'raises'?" in refused({"function": f"{users}:raise"})
    assert "NUMBER is no function" in refused({"function": f"{users}:NUMBER"})
    two = refused({"function": f"{users}:two"})
    assert re.search(r"mine.py:\d+: rewards.0.function: reward mine.py:two: two\(prompt, answer\) must take", two)
    assert "no such file of reward functions" in refused({"function": f"{tmp_path}/mime.py:two"})
    assert "did you mean 'mine.py'?" in refused({"function": f"{tmp_path}/mime.py:two"})
    (tmp_path / "broken.py").write_text("def f(prompt, answer, reference):\n    return (1\n")
    assert re.search(
        r"broken.py:2: .*cannot be imported: SyntaxError: '\(' was never",
        refused({"function": f"{tmp_path}/broken.py:f"}),
    )
    (tmp_path / "lacks.py").write_text("import re\nimport no_such_thing\n")
    said = refused({"function": f"{tmp_path}/lacks.py:f"})
    assert "lacks.py:2: rewards.0.function: reward lacks.py:f: it cannot be imported: ModuleNotFoundError" in said


def test_all_that_is_wrong_is_told_at_once(users):
    before = children()
    said = refused({"function": f"{users}:raise"}, {"model": "runs/none"}, {"function": f"{users}:two"}).splitlines()
    assert len(said) == 3
    assert children() == before


def test_the_fingerprint_follows_the_users_file(users):
    def seen() -> dict:
        with opened({"function": f"{users}:yes"}, {"function": "length", "target": 1}) as rewards:
            return rewards.fingerprint()

    first = seen()
    assert seen() == first
    users.write_text(USER + "\n")
    assert seen() != first

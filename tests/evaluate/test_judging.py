"""Suite `judge`: verdicts over HTTP from an endpoint that judges by a rule, and from a real reward model's forward."""

from __future__ import annotations

import json
import re
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

import pytest
import torch
from transformers import AutoTokenizer, LlamaConfig
from transformers import LlamaForSequenceClassification as HFScorer

from llama_ft.data.template import Template
from llama_ft.errors import MachineFault, UserError
from llama_ft.evaluate.chat import endpoint
from llama_ft.evaluate.chat.judges import Case, Judging, TextJudge
from llama_ft.evaluate.chat.judging import SWAYED, UNREAD, Judged
from llama_ft.evaluate.chat.prompts import PROMPTS, choice_of, grade_of, read_prompts
from llama_ft.evaluate.chat.suite import Chat
from llama_ft.evaluate.result import SuiteResult
from llama_ft.evaluate.suites import Context

ROWS = [
    {"question_id": 1, "category": "writing", "turns": ["Write of hay.", "Shorter."]},
    {"question_id": 2, "category": "math", "turns": ["What is 2 + 2?", "And 3 + 3?"]},
    {"question_id": 3, "category": "generic", "turns": ["Who eats grass?"]},
]


class Rule:
    """An endpoint of OpenAI's protocol whose model judges by a rule: longer answers are better. It can also fail."""

    def __init__(self) -> None:
        self.model, self.asked, self.lock = "rule-2026-01-01", list[dict[str, Any]](), threading.Lock()
        self.says = self.rule
        self.refuses: dict[str, str] = {}
        outer = self

        class Handler(BaseHTTPRequestHandler):
            def do_POST(self) -> None:
                body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
                with outer.lock:
                    outer.asked.append(body)
                    number = len(outer.asked)
                status, said = outer.answer(body, number, self.headers.get("Authorization", ""))
                data = json.dumps(said).encode()
                self.send_response(status)
                self.send_header("Content-Type", "application/json")
                self.send_header("Content-Length", str(len(data)))
                self.end_headers()
                self.wfile.write(data)

            def do_GET(self) -> None:
                data = json.dumps({"object": "list", "data": [{"id": "rule", "object": "model"}]}).encode()
                self.send_response(200)
                self.send_header("Content-Type", "application/json")
                self.end_headers()
                self.wfile.write(data)

            def log_message(self, *_: Any) -> None:
                pass

        self.server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        threading.Thread(target=self.server.serve_forever, daemon=True).start()
        self.url = f"http://127.0.0.1:{self.server.server_port}/v1"

    def answer(self, body: dict[str, Any], number: int, key: str) -> tuple[int, dict[str, Any]]:
        if key == "Bearer wrong":
            return 401, {"error": {"message": "no such key"}}
        if body["model"] != "rule":
            return 404, {"error": {"message": f"no model {body['model']}"}}
        for name, message in self.refuses.items():
            if name in body or (name == "stops" and number > int(message)):
                return (500 if name == "stops" else 400), {"error": {"message": message}}
        said = {"role": "assistant", "content": self.says(body["messages"][-1]["content"])}
        choice = {"index": 0, "message": said, "finish_reason": "stop"}
        return 200, {"id": "1", "object": "chat.completion", "created": 1, "model": self.model, "choices": [choice]}

    @staticmethod
    def rule(text: str) -> str:
        """A grade by the answer's length; of a pair the longer one."""
        sides = [re.findall(rf"<answers?-of-{side}>\n(.*?)\n</", text, re.S) for side in "AB"]
        if all(sides):
            a, b = (len(side[-1].rpartition("\n2. ")[2]) for side in sides)
            return f"They differ. [[{'A' if a > b else 'B' if b > a else 'C'}]]"
        said = re.findall(r"<answer>\n(.*?)\n</answer>|Assistant: (.*?)\n(?:</|\n)", text, re.S)
        return f"Well. Grade: [[{min(10, 1 + len(max(said[-1])))}]]" if said else "ready"

    def requests(self) -> list[str]:
        """What was asked, the greetings apart."""
        return [body["messages"][-1]["content"] for body in self.asked if len(body["messages"]) > 1]


@pytest.fixture
def rule(monkeypatch) -> Iterator[Rule]:
    monkeypatch.delenv("OPENAI_BASE_URL", raising=False)
    monkeypatch.setenv("OPENAI_API_KEY", "right")
    monkeypatch.setattr(endpoint, "TRIES", 0)
    made = Rule()
    yield made
    made.server.shutdown()
    made.server.server_close()


@pytest.fixture
def answered(context, subjects, tmp_path) -> Context:
    """Base and tuned have answered three questions; their answers are then set, so that verdicts are known."""
    path = tmp_path / "questions.jsonl"
    path.write_text("\n".join(map(json.dumps, ROWS)))
    context.data, context.max_tokens = [str(path)], 4
    said = {"base": ["hay", "hm", "four", "6", "llamas"], "tuned": ["hay and grass", "h", "4", "6", "alpacas, llamas"]}
    for name, texts in said.items():
        result = Chat().run(subjects[name], context)
        left = iter(texts)
        for turn in (turn for row in result.rows for turn in row["turns"]):
            turn["answer"] = next(left)
        result.write(context.folder)
    return context


def judged(context: Context, subject: Any, judging: Judging) -> SuiteResult:
    context.judging, context.judge = judging, None
    assert not Judged().needs(context)
    return Judged().run(subject, context)


def values(result: SuiteResult, name: str) -> dict[str, float]:
    return {row["id"]: row["values"].get(name) for row in result.rows}


def test_grades(answered, subjects, rule):
    result = judged(answered, subjects["tuned"], Judging("rule", rule.url))
    assert values(result, "grade") == {"questions:1": (10 + 2) / 2, "questions:2": 2.0, "questions:3": 10.0}
    assert result.score("grade").value == pytest.approx((6 + 2 + 10) / 3)
    assert result.score("grade, turn 2").rows == 2 and result.score(UNREAD).value == 0
    assert result.settings["version"] == "rule-2026-01-01" and result.settings["temperature"] == 0
    assert len(rule.requests()) == 5
    assert result.remarks == [
        "1 questions of math, reasoning and coding are judged without a reference answer (--data)"
    ]
    judged(answered, subjects["tuned"], Judging("rule", rule.url))
    assert len(rule.requests()) == 5, "what was judged is not asked again"


def test_pairs_are_asked_in_both_orders(answered, subjects, rule):
    judging = Judging("rule", rule.url, pairs=True)
    result = judged(answered, subjects["tuned"], judging)
    name = "win rate against base"
    assert values(result, name) == {"questions:1": 0.5, "questions:2": 0.25, "questions:3": 1.0}
    assert values(result, f"{name}, turn 1") == {"questions:1": 1.0, "questions:2": 0.0, "questions:3": None}
    assert values(result, f"{name}, turn 2") == {"questions:1": 0.0, "questions:2": 0.5, "questions:3": None}
    assert result.score(SWAYED).value == 0 and len(rule.requests()) == 10
    base = judged(answered, subjects["base"], judging)
    assert not base.scores and not base.rows and base.remarks == ["the others are held against it"]


def test_a_judge_that_follows_the_order_gives_ties(answered, subjects, rule):
    rule.says = lambda text: "The first. [[A]]"
    result = judged(answered, subjects["tuned"], Judging("rule", rule.url, pairs=True))
    assert result.score("win rate against base").value == 0.5 and result.score(SWAYED).value == 1
    assert result.score("win rate against base").low == result.score("win rate against base").high == 0.5


def test_verdicts_that_say_nothing_are_counted_and_left_out(answered, subjects, rule):
    rule.says = lambda text: "I would not say." if "hay" in text else "[[7]]"
    result = judged(answered, subjects["tuned"], Judging("rule", rule.url))
    assert values(result, "grade") == {"questions:1": None, "questions:2": 7.0, "questions:3": 7.0}
    assert values(result, UNREAD) == {"questions:1": 1.0, "questions:2": 0.0, "questions:3": 0.0}
    assert result.score("grade").rows == 2 and "I would not say." in result.rows[0]["answer"]


def test_references_stand_beside_what_can_be_right(answered, subjects, rule, tmp_path):
    path = tmp_path / "reference.jsonl"
    answers = [{"question_id": n, "choices": [{"turns": [f"ref {n} a", f"ref {n} b"]}]} for n in (1, 2)]
    path.write_text("\n".join(map(json.dumps, answers)))
    answered.data.append(str(path))
    chat = answered.path("chat", "tuned")
    written = json.loads(chat.read_text())
    assert judged(answered, subjects["tuned"], Judging("rule", rule.url)).remarks == []
    assert json.loads(chat.read_text()) == written
    assert [text.count("ref 2 a") for text in rule.requests() if "2 + 2" in text] == [1, 1]
    assert not any("ref 1" in text for text in rule.requests()), "writing has no right answer"


def test_prompts_of_a_file(answered, subjects, rule, tmp_path):
    """FastChat's format: every prompt is one of the file's, its fields filled."""
    fields = {
        "single-v1": "{question}|{answer}",
        "single-v1-multi-turn": "{question_1}|{answer_1}|{question_2}|{answer_2}",
    }
    rows = [{"name": n, "system_prompt": f"be {n}", "prompt_template": fields.get(n, "x")} for n in PROMPTS]
    path = tmp_path / "judge_prompts.jsonl"
    path.write_text("\n".join(map(json.dumps, rows)))
    rule.says = lambda text: "[[5]]"
    judged(answered, subjects["tuned"], Judging("rule", rule.url, prompts=path))
    asked = [body["messages"] for body in rule.asked if len(body["messages"]) > 1]
    assert [
        {"role": "system", "content": "be single-v1"},
        {"role": "user", "content": "Write of hay.|hay and grass"},
    ] in asked
    assert (
        asked.count(
            [
                {"role": "system", "content": "be single-v1-multi-turn"},
                {"role": "user", "content": "Write of hay.|hay and grass|Shorter.|h"},
            ]
        )
        == 1
    )
    rows[0]["prompt_template"] = "{question} {anwser}"
    path.write_text("\n".join(map(json.dumps, rows[:-1])))
    with pytest.raises(UserError) as told:
        read_prompts(path)
    assert "did you mean 'answer'" in str(told.value) and "no prompt 'pair-math-v1-multi-turn'" in str(told.value)


def test_every_prompt_of_ours_has_its_fields():
    fields = {name: set(re.findall(r"{(\w+)}", one.template)) for name, one in PROMPTS.items()}
    right, talk = {"ref_answer_1"}, {"ref_answer_1", "ref_answer_2"}
    single, pair = {"question", "answer"}, {"question", "answer_a", "answer_b"}
    turns = {"question_1", "question_2"}
    assert fields == {
        "single-v1": single,
        "single-math-v1": single | right,
        "single-v1-multi-turn": turns | {"answer_1", "answer_2"},
        "single-math-v1-multi-turn": turns | {"answer_1", "answer_2"} | talk,
        "pair-v2": pair,
        "pair-math-v1": pair | right,
        "pair-v2-multi-turn": turns | {f"answer_{side}_{turn}" for side in "ab" for turn in (1, 2)},
        "pair-math-v1-multi-turn": turns | {f"answer_{side}_{turn}" for side in "ab" for turn in (1, 2)} | talk,
    }


def test_verdicts_are_read():
    assert [grade_of(text) for text in ("Rating: [[7]]", "[[7.5]] or so", "[3]", "[[0]]", "[[11]]", "7/10")] == [
        *(7.0, 7.5, 3.0),
        *(None, None, None),
    ]
    assert [choice_of(text) for text in ("[[A]]", "so [[C]].", "A", "[[A]] or [[B]]")] == ["A", "C", None, None]


def test_a_judge_that_stops_costs_nothing_twice(answered, subjects, rule, monkeypatch):
    monkeypatch.setattr("llama_ft.evaluate.chat.judging.AT_ONCE", 1)
    rule.refuses = {"stops": "4"}
    with pytest.raises(MachineFault, match="the judge stopped answering"):
        judged(answered, subjects["tuned"], Judging("rule", rule.url))
    rule.refuses = {}
    before = len(rule.requests())
    result = judged(answered, subjects["tuned"], Judging("rule", rule.url))
    assert result.score("grade").rows == 3
    assert len(rule.requests()) - before == 3, "the first question's two verdicts were kept"


def test_another_version_is_not_the_same_judge(answered, subjects, rule):
    context, subject = answered, subjects["tuned"]
    context.judging = Judging("rule", rule.url)
    assert not Judged().needs(context)
    rule.model = "rule-2026-06-01"
    with pytest.raises(UserError, match=r"another one now: rule-2026-06-01.*name a version that stays"):
        Judged().run(subject, context)


@pytest.mark.parametrize("refuses", [("max_tokens",), ("max_tokens", "temperature")])
def test_endpoints_that_take_other_parameters(rule, refuses):
    rule.refuses = dict.fromkeys(refuses, "unsupported")
    opened = endpoint.Endpoint.open("rule", rule.url)
    assert opened.spoken == endpoint.SPOKEN[len(refuses)]
    assert opened.ask([[{"role": "user", "content": "<answer>\nhay\n</answer>"}]], lambda more: None)[0].text


def test_words_that_the_endpoint_refuses(rule):
    """One request of two is refused: it gives no verdict, the other does."""
    judge = TextJudge(endpoint.Endpoint.open("rule", rule.url), PROMPTS)
    rule.answer = lambda body, *_: (
        (400, {"error": {"message": "too long"}}) if "zebra" in str(body) else Rule.answer(rule, body, 0, "")
    )
    turns = [{"asked": "What?", "answer": "zebra"}], [{"asked": "What?", "answer": "yes"}]
    found = judge.opinions([Case("1", "", turns[0]), Case("2", "", turns[1])], lambda more: None)
    assert found[0][0].value is None and "too long" in found[0][0].words[0] and found[1][0].value == 4


def test_wrong_keys_names_and_addresses_are_told_before_anything_is_done(answered, rule, monkeypatch, tmp_path):
    def told(*asked: Any, **how: Any) -> str:
        answered.judging, answered.judge = Judging(*asked, **how), None
        return "; ".join(map(str, Judged().needs(answered)))

    assert "no model 'ruel'" in told("ruel", rule.url) and "did you mean 'rule'" in told("ruel", rule.url)
    assert "does not take the key" in (monkeypatch.setenv("OPENAI_API_KEY", "wrong") or told("rule", rule.url))
    assert "no judge answers at" in told("rule", "http://127.0.0.1:9/v1")
    monkeypatch.delenv("OPENAI_API_KEY")
    assert "no key to ask the judge" in told("gpt-4-0613")
    assert "there is no folder runs/none" in told("runs/none")
    assert "there is no file" in told("rule", rule.url, pairs=True, against=tmp_path / "none.json")
    assert "--against" in told("rule", rule.url, against=tmp_path / "none.json")
    assert "not a reward model" in told(str(answered.run.path))
    answered.judging = None
    assert "needs a judge" in str(Judged().needs(answered)[0])


def test_answers_of_others(answered, subjects, rule, tmp_path):
    """A result of suite chat, or a file of AlpacaEval, by what was asked; questions of one side alone are left out."""
    path = tmp_path / "alpaca_eval.json"
    path.write_text(json.dumps([{"instruction": "Who eats grass?", "output": "hm", "generator": "x", "dataset": "y"}]))
    result = judged(answered, subjects["tuned"], Judging("rule", rule.url, pairs=True, against=path))
    assert values(result, "win rate against alpaca_eval") == {"questions:3": 1.0}
    assert result.remarks == ["2 of 3 questions were not asked of the other: they are left out"]
    other = answered.path("chat", "base")
    result = judged(answered, subjects["tuned"], Judging("rule", rule.url, pairs=True, against=other))
    assert set(values(result, "win rate against chat-base")) == {"questions:1", "questions:2", "questions:3"}


def test_a_reward_model_judges_offline(answered, subjects, tiny_base, tmp_path):
    """Rewards are those of transformers' own class on its own rendering, averaged over turns."""
    folder = tmp_path / "judge"
    torch.manual_seed(3)
    HFScorer(LlamaConfig.from_pretrained(tiny_base, num_labels=1)).save_pretrained(folder)
    tokenizer = AutoTokenizer.from_pretrained(tiny_base)
    tokenizer.chat_template = Template.load("chatml").source
    tokenizer.save_pretrained(folder)
    results = {name: judged(answered, subjects[name], Judging(str(folder))) for name in ("base", "tuned")}
    model = HFScorer.from_pretrained(folder, dtype=torch.float32)

    def reward(*said: str) -> float:
        messages = [{"role": ("user", "assistant")[place % 2], "content": text} for place, text in enumerate(said)]
        ids = tokenizer.apply_chat_template(messages, return_tensors="pt", return_dict=False)
        with torch.no_grad():
            return float(model(ids).logits)

    wanted = (reward("Write of hay.", "hay") + reward("Write of hay.", "hay", "Shorter.", "hm")) / 2
    assert values(results["base"], "reward")["questions:1"] == pytest.approx(wanted, abs=1e-4)
    pairs = judged(answered, subjects["tuned"], Judging(str(folder), pairs=True))
    for number, name in ((1, "questions:1"), (2, "questions:3")):
        turn = (
            [values(results[who], "reward, turn 1") for who in ("base", "tuned")]
            if number == 1
            else [values(results[who], "reward") for who in ("base", "tuned")]
        )
        key = "win rate against base, turn 1" if number == 1 else "win rate against base"
        assert values(pairs, key)[name] == float(turn[1][name] > turn[0][name])
    assert pairs.score(UNREAD).value == 0


def test_an_answer_that_a_reward_model_cannot_read(answered, subjects, tiny_base, tmp_path):
    folder = tmp_path / "judge"
    HFScorer(LlamaConfig.from_pretrained(tiny_base, num_labels=1, max_position_embeddings=16)).save_pretrained(folder)
    tokenizer = AutoTokenizer.from_pretrained(tiny_base)
    tokenizer.chat_template = Template.load("chatml").source
    tokenizer.save_pretrained(folder)
    with pytest.raises(UserError, match=r"questions:1.*reads 16.*--max-tokens"):
        judged(answered, subjects["tuned"], Judging(str(folder)))

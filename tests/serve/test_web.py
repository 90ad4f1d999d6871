"""The chat page as a client without a browser sees it: a real server, a real (tiny) model, Gradio's own client."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from dataclasses import replace
from itertools import pairwise
from typing import Any

import pytest

pytest.importorskip("gradio", reason="gradio is not installed (extra web)")

import httpx
from gradio_client import Client

from llama_ft import load_recipe, prepare_data
from llama_ft.errors import UserError
from llama_ft.serve.chat import chat
from llama_ft.serve.web.gate import LARGEST_BODY
from llama_ft.serve.web.page import MOST_SESSIONS
from llama_ft.serve.web.server import PASSWORD, listen, password_of, serve_page
from llama_ft.serve.web.speaker import Sampling
from llama_ft.serve.web.talk import Malformed, Side, Talk
from tests.serve.pages import make_page, served
from tests.serve.test_chat import QUESTION, greedy_answer

DRAWN = Sampling(temperature=1.0, top_p=0.95, max_tokens=24, seed=7)
LONG = 400
"""Tokens of an answer that is to be interrupted; the tiny model's greedy one has no end."""


@pytest.fixture(scope="module")
def page(run):
    return make_page(run.path)


@pytest.fixture(scope="module")
def address(page):
    with served(page) as url:
        yield url


@pytest.fixture(scope="module")
def pair_address(run):
    """The run beside its base."""
    with served(make_page(run.path, compare=True)) as url:
        yield url


class Browser:
    """What a tab sends and shows. `states` are those of the last question, each as the page's components had it."""

    def __init__(self, url: str, sides: int = 1, **options: Any):
        self.client = Client(url, verbose=False, analytics_enabled=False, **options)
        self.sides, self.talk, self.states = sides, None, []

    def submit(self, question: str, **changes: Any):
        values = {"system": "", "temperature": 0, "top_p": 1, "max_tokens": 48, "seed": "", "formatted": False}
        return self.client.submit(question=question, talk=self.talk, **values | changes, api_name="/answer")

    def ask(self, question: str, **changes: Any) -> dict[str, Any]:
        self.states = list(self.submit(question, **changes))
        self.talk = self.last(0) or self.talk
        return {"status": self.last(2), "answers": self.answers(), "costs": [self.cost(n) for n in range(self.sides)]}

    def answers(self) -> list[str]:
        sides = self.talk["sides"] if self.talk else []
        return [side["said"][-1]["content"] if side["said"] else "" for side in sides]

    def seen(self, index: int) -> list[Any]:
        """Every value that a component was given, in order."""
        return [state[index] for state in self.states if not isinstance(state[index], dict) or "system" in state[index]]

    def last(self, index: int) -> Any:
        return (self.seen(index) or [None])[-1]

    def cost(self, side: int) -> str:
        return self.last(3 + self.sides + side)

    def shown(self, side: int = 0) -> list[list[str]]:
        """The texts of a chat, in each of its states."""
        return [[part["text"] for message in chat for part in message["content"]] for chat in self.seen(3 + side)]


# Answers


def test_a_greedy_answer_is_that_of_the_terminal_and_of_the_proof(address, run, capsys):
    told = Browser(address).ask(QUESTION)
    chat(str(run.path), once=QUESTION, temperature=0, max_tokens=48)
    assert told["answers"] == [greedy_answer(run)] == [capsys.readouterr().out.rstrip("\n")]
    assert told["status"] == "Done."
    assert told["costs"][0].startswith("48 tokens · ")
    assert told["costs"][0].endswith(" s · greedy · cut at 48 tokens")


def test_a_seed_gives_what_the_terminal_gives_with_it(address, run, capsys):
    told = Browser(address).ask(QUESTION, temperature=1, top_p=0.95, seed="5", max_tokens=16)
    chat(str(run.path), once=QUESTION, temperature=1.0, top_p=0.95, seed=5, max_tokens=16)
    assert told["answers"] == [capsys.readouterr().out.strip()]
    assert "seed 5" in told["costs"][0]


def test_an_answer_is_streamed(address, run):
    browser = Browser(address)
    browser.ask(QUESTION, max_tokens=LONG)
    texts = [chat[1] for chat in browser.shown() if len(chat) == 2]
    assert len(texts) > 3, "it came in pieces"
    assert all(later.startswith(earlier) for earlier, later in pairwise(texts[:-1]))
    assert browser.shown()[0] == [QUESTION], "the question is shown before anything is computed"
    assert browser.seen(1) == [""], "and its box is emptied"


def test_turns_are_kept(address, page):
    browser = Browser(address)
    first = browser.ask(QUESTION)["answers"][0]
    second = browser.ask(QUESTION)["answers"][0]
    assert second != first, "the model sees the first turn"
    assert [message["content"] for message in browser.talk["sides"][0]["said"]] == [QUESTION, first, QUESTION, second]
    # The same through the terminal's own conversation and generator.
    opened = page.speakers[0].opened
    from llama_ft.serve.conversation import Dialogue
    from llama_ft.serve.generate import Generator

    dialogue, said = Dialogue(opened.renderer, opened.context), []
    for _ in range(2):
        ids = dialogue.ask(QUESTION, 48)
        tokens = list(
            Generator(opened.model, opened.stop, opened.context).stream(ids, max_tokens=48, temperature=0, top_p=1)
        )
        said.append(opened.renderer.tokenizer.decode(tokens, skip_special_tokens=True).strip())
        dialogue.answered(said[-1])
    assert said == [first, second]


def test_another_system_prompt_starts_anew(address):
    browser = Browser(address)
    browser.ask(QUESTION)
    browser.ask(QUESTION, system="Be short.")
    assert browser.talk["system"] == "Be short."
    assert len(browser.talk["sides"][0]["said"]) == 2
    talk, *_ = browser.client.predict(system="Be short.", api_name="/new")
    assert talk == {"system": "Be short.", "sides": [{"said": [], "forgotten": 0}]}


def test_text_is_shown_as_it_was_typed(address):
    browser = Browser(address)
    typed = "<b>Hi</b> & **you** <|im_end|>\n    indented"
    browser.ask(typed, max_tokens=2)
    assert browser.shown()[-1][0] == "&lt;b&gt;Hi&lt;/b&gt; &amp; **you** &lt;|im_end|&gt;\n    indented"
    assert browser.talk["sides"][0]["said"][0]["content"] == typed
    browser.talk = None
    browser.ask(typed, max_tokens=2, formatted=True)
    assert browser.shown()[-1][0] == typed


# Side by side


def test_base_and_tuned_answer_with_one_seed(pair_address, run):
    browser = Browser(pair_address, sides=2)
    told = browser.ask(QUESTION)
    assert told["answers"][1] == greedy_answer(run)
    assert told["answers"][0] != told["answers"][1]
    drawn = browser.ask(QUESTION, temperature=1)
    seeds = [next(part for part in cost.split(" · ") if part.startswith("seed ")) for cost in drawn["costs"]]
    assert seeds[0] == seeds[1]
    assert browser.seen(2)[0].startswith("base: base") and browser.seen(2)[0].endswith(" is answering …")


def test_two_equal_models_draw_equal_answers(run):
    page = make_page(run.path, run.merged)
    assert [speaker.name for speaker in page.speakers] == [run.path.name, "merged"]
    with served(page) as url:
        browser = Browser(url, sides=2)
        for _ in range(3):
            left, right = browser.ask(QUESTION, temperature=1.5)["answers"]
            assert left == right != ""


def test_a_base_without_a_template_is_asked_in_the_runs(run):
    page = make_page(run.path, compare=True)
    base, tuned = (speaker.opened for speaker in page.speakers)
    assert base.notices == ("the base has no chat template: it is asked in the run's",)
    assert base.renderer is tuned.renderer
    with pytest.raises(UserError, match="is no run: there is no base to compare it with"):
        make_page(run.merged, compare=True)


# Interruptions


def test_stop_keeps_what_came(address):
    browser = Browser(address)
    job = browser.submit(QUESTION, max_tokens=LONG)
    while not job.outputs():
        time.sleep(0.005)
    browser.client.predict(api_name="/stop")
    browser.states = list(job)
    browser.talk = browser.last(0)
    assert browser.last(2) == "Stopped."
    tokens = int(browser.cost(0).split()[0]) if " token" in browser.cost(0) else 0
    assert tokens < LONG and browser.cost(0).endswith("stopped")
    assert bool(browser.talk["sides"][0]["said"]) == bool(tokens)
    browser.client.predict(api_name="/stop")  # nothing to stop: nothing happens
    assert browser.ask(QUESTION, max_tokens=4)["status"] == "Done."


def test_a_new_conversation_ends_the_answer_of_the_old(address):
    browser = Browser(address)
    browser.ask(QUESTION, max_tokens=4)
    job = browser.submit(QUESTION, max_tokens=LONG)
    while not job.outputs():
        time.sleep(0.005)
    browser.client.predict(system="", api_name="/new")
    browser.states = list(job)
    assert browser.last(2) == "New conversation."
    assert browser.last(0) == Talk.new(1).as_dict()
    assert browser.shown()[-1] == [] and browser.cost(0) == ""


def test_a_stopped_answer_is_a_turn(page):
    speaker, side = page.speakers[0], Side()
    states = []
    for state in speaker.answer(side, "", QUESTION, replace(DRAWN, max_tokens=LONG), lambda: len(states) > 1):
        states.append(state)
    assert states[-1].ended == "stopped"
    assert 0 < states[-1].tokens < LONG
    assert side.said[-1]["content"] == states[-1].text


def request_of(page: Any, session: str, question: str, max_tokens: int) -> dict[str, Any]:
    number = next(one["id"] for one in page.blocks.config["dependencies"] if one["api_name"] == "answer")
    return {"data": [question, None, "", 0, 1, max_tokens, "", False], "fn_index": number, "session_hash": session}


def raw_events(http: httpx.Client, page: Any, session: str, question: str, max_tokens: int) -> Iterator[str]:
    """Asks as the page's script does, without fetching the page; yields what its event stream says."""
    asked = request_of(page, session, question, max_tokens)
    http.post("gradio_api/queue/join", json=asked).raise_for_status()
    with http.stream("GET", "gradio_api/queue/data", params={"session_hash": session}, timeout=60) as events:
        yield from events.iter_lines()


def test_a_closed_tab_ends_its_answer(address, page):
    """As a browser does it: the stream of its session breaks off in the middle of an answer."""
    with httpx.Client(base_url=address) as http:
        events = raw_events(http, page, "tab", QUESTION, LONG)
        while "process_generating" not in next(events):
            pass
        assert page._answering
        events.close()
    end = time.monotonic() + 60
    while page._answering and time.monotonic() < end:
        time.sleep(0.02)
    assert not page._answering
    prompt = len(page.speakers[0].opened.renderer.prompt_ids([{"role": "user", "content": QUESTION}]))
    assert len(page.speakers[0]._generator.seen) < prompt + LONG - 1, "it was computed to its end all the same"
    assert Browser(address).ask(QUESTION, max_tokens=4)["status"] == "Done."


def test_a_second_question_ends_an_abandoned_answer(page):
    speaker = page.speakers[0]
    first = speaker.answer(Side(), "", QUESTION, replace(DRAWN, max_tokens=LONG), lambda: False)
    for _ in range(2):
        next(first)
    wanted = list(speaker.answer(Side(), "", QUESTION, DRAWN, lambda: False))[-1].text
    assert list(first)[-1].tokens < LONG
    again = list(speaker.answer(Side(), "", QUESTION, DRAWN, lambda: False))[-1].text
    assert again == wanted != ""


def test_memory_does_not_grow_with_conversations(address, page):
    with httpx.Client(base_url=address) as http:
        for number in range(MOST_SESSIONS + 8):
            events = list(raw_events(http, page, f"session-{number}", f"Question {number}?", 2))
            assert any("Done." in line for line in events)
    state = page.blocks.state_holder
    assert len(state.session_data) <= MOST_SESSIONS
    assert len(state.time_last_used) <= MOST_SESSIONS
    assert not page._answering and not page.blocks.app.iterators
    assert sum(thread.name.startswith("model") for thread in threading.enumerate()) == 1


# Words in place of errors


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"question": "  "}, "Type a question first."),
        ({"question": "word " * 600}, "The question has no answer."),
        ({"seed": "seven"}, "The seed is a whole number from 0 to 2,147,483,647, or empty."),
        ({"seed": "²"}, "The seed is a whole number from 0 to 2,147,483,647, or empty."),
        ({"max_tokens": None}, "Temperature, top-p and the longest answer want a number."),
        ({"talk": {"system": "", "sides": []}}, "The conversation belongs to another page: start a new one."),
        ({"talk": [1]}, "The conversation cannot be read: start a new one."),
    ],
)
def test_mistakes_are_told(address, changes, said):
    browser = Browser(address)
    changes = dict(changes)
    browser.talk = changes.pop("talk", None)
    question = changes.pop("question", QUESTION)
    browser.states = list(browser.submit(question, **changes))
    assert browser.last(2) == said
    if "word" in question:
        assert browser.cost(0).startswith("not asked: the question is ")
        assert browser.cost(0).endswith(" tokens long, the model holds 512")
        assert browser.last(1) == question.strip(), "it is back in its box"
        assert browser.shown()[-1] == []
    assert browser.last(0) in (None, Talk.new(1).as_dict()), "the conversation is as before"


def test_a_template_without_system_prompt_says_so(alpaca_run):
    with served(make_page(alpaca_run.path)) as url:
        browser = Browser(url)
        told = browser.ask(QUESTION, system="Be short.")
        assert told["status"] == "The question has no answer."
        assert "no place for a system prompt" in told["costs"][0]
        browser = Browser(url)
        assert "one question at a time" not in browser.ask(QUESTION, max_tokens=4)["costs"][0]
        assert "one question at a time" in browser.ask(QUESTION, max_tokens=4)["costs"][0]
        assert browser.talk["sides"][0]["forgotten"] == 2


def test_a_model_that_fails_is_told(address, page, monkeypatch, capsys):
    def fail(*_: Any, **__: Any):
        raise RuntimeError("the card is lost")

    monkeypatch.setattr(page.speakers[0].opened.model, "forward", fail)
    browser = Browser(address)
    browser.states = list(browser.submit(QUESTION))
    assert browser.last(2) == "The question has no answer."
    assert browser.cost(0) == "the model failed: RuntimeError: the card is lost"
    assert browser.last(1) == QUESTION, "it is back in its box"
    assert "the card is lost" in capsys.readouterr().err
    monkeypatch.undo()
    assert Browser(address).ask(QUESTION, max_tokens=4)["status"] == "Done."


@pytest.mark.parametrize(
    "value",
    [
        {"system": "", "sides": [{"said": [{"role": "assistant", "content": "Hi"}], "forgotten": 0}]},
        {"system": "", "sides": [{"said": [{"role": "user", "content": "Hi"}], "forgotten": 0}]},
        {"system": "", "sides": [{"said": [], "forgotten": 3}]},
        {"system": 5, "sides": [{"said": [], "forgotten": 0}]},
        {"system": "", "sides": [{"said": "text", "forgotten": 0}]},
        {"sides": None},
        "text",
    ],
)
def test_a_conversation_that_is_none(value):
    with pytest.raises(Malformed):
        Talk.read(value, 1)


# Saving


def test_a_saved_conversation_is_a_row_to_train_on(pair_address, run, tmp_path):
    browser = Browser(pair_address, sides=2)
    assert browser.client.predict(kept=None, api_name="/save_jsonl")[1] == "Nothing to save yet."
    browser.ask(QUESTION, system="Be short.")
    browser.ask("And 🦙?\nOn two lines?", system="Be short.", max_tokens=6)
    file, said = browser.client.predict(kept=browser.talk, api_name="/save_jsonl")
    assert said == f"Saved as {file['name']}." and file["name"].endswith(".jsonl")
    (tmp_path / "rows.jsonl").write_text(file["text"], encoding="utf-8")
    overrides = [f"model.base={run.merged}", f"data=[{{path: {tmp_path / 'rows.jsonl'}, layout: messages}}]"]
    prepared = prepare_data(load_recipe("quickstart", [*overrides, "eval_data=null", f"output_dir={tmp_path / 'run'}"]))
    assert len(prepared.train) == 2
    rows = [json.loads(line) for line in file["text"].splitlines()]
    for row, side, role in zip(rows, browser.talk["sides"], ("base", "tuned"), strict=True):
        assert row["messages"] == [{"role": "system", "content": "Be short."}, *side["said"]]
        assert row["model"].startswith(f"{role}: ")
    markdown, _ = browser.client.predict(kept=browser.talk, api_name="/save_md")
    assert markdown["name"].endswith(".md")
    assert markdown["text"].startswith(f"# {rows[0]['model']}\n\n## System\n\nBe short.\n\n## User\n\n{QUESTION}")
    assert markdown["text"].count("And 🦙?\nOn two lines?") == 2


# Who may ask


def test_only_this_machine_and_this_page_may_ask(address):
    with httpx.Client(base_url=address) as http:
        home = http.get("/")
        assert home.status_code == 200
        assert "default-src 'self'" in home.headers["content-security-policy"]
        assert http.get("/", headers={"Host": "evil.example"}).status_code == 421
        assert http.get("/", headers={"Host": "localhost:1"}).status_code == 200
        assert http.get("/config", headers={"Origin": "http://evil.example"}).status_code == 403
        assert http.get("/config", headers={"Origin": "null"}).status_code == 403
        join = "gradio_api/queue/join"
        assert http.post(join, content=b" " * (LARGEST_BODY + 1)).status_code == 413
        assert http.post(join, content=iter([b"{}"])).status_code == 411
        assert http.post(join, content=b"{").status_code == 422


def test_doors_of_gradio_that_the_page_does_not_use_are_closed(address):
    with httpx.Client(base_url=address) as http:
        for path in ("upload", "run/answer", "call/answer", "component_server", "process_recording", "vibe-edit"):
            assert http.post(f"gradio_api/{path}", json={"data": []}).status_code == 404, path
        for path in (
            "gradio_api/proxy=https://example.com/",
            f"gradio_api/file={__file__}",
            "gradio_api/runs",
            "gradio_api/vibe-code/",
            "gradio_api/run-history/buckets",
            "monitoring",
            "docs",
            "manifest.json",
        ):
            assert http.get(path).status_code == 404, path


def test_no_answer_goes_past_the_queue(address, page):
    with httpx.Client(base_url=address) as http:
        assert http.post("gradio_api/run/predict", json=request_of(page, "past", QUESTION, 4)).status_code == 404


def test_a_password_stands_before_everything(run):
    with served(make_page(run.path), password="long enough") as url, httpx.Client(base_url=url) as http:
        for path in ("/", "/config", "/theme.css", "/gradio_api/info", "/gradio_api/queue/data", "/nothing"):
            refused = http.get(path)
            assert refused.status_code == 401, path
            assert refused.headers["www-authenticate"].startswith("Basic ")
            assert http.get(path, auth=("me", "wrong")).status_code == 401
        for odd in ("Basic", "Basic !!", "Bearer long enough", "Basic bG9uZw=="):
            assert http.get("/", headers={"Authorization": odd}).status_code == 401
        assert http.get("/", auth=("anyone", "long enough")).status_code == 200
        assert http.get("/", auth=("me", "long enough"), headers={"Host": "my-machine.lan:7860"}).status_code == 200


def test_passwords():
    assert password_of({PASSWORD: "long enough"}) == "long enough"
    made = {password_of({}) for _ in range(5)}
    assert len(made) == 5 and min(map(len, made)) >= 16
    with pytest.raises(UserError, match="LLAMA_FT_PASSWORD has 5 characters"):
        password_of({PASSWORD: "short"})


# The command


def test_where_it_cannot_be_served(run, monkeypatch):
    with listen("127.0.0.1", 0) as taken:
        port = taken.getsockname()[1]
        with pytest.raises(UserError, match=f"cannot listen at 127.0.0.1, port {port}: Address already in use"):
            serve_page(str(run.path), port=port)
    with pytest.raises(UserError, match=r"there is no address 'no\.such\.host\.invalid'"):
        serve_page(str(run.path), host="no.such.host.invalid", port=0)
    with pytest.raises(UserError, match="--once answers in the terminal"):
        serve_page(str(run.path), once="Hi")
    with pytest.raises(UserError, match="two models are compared on the page"):
        serve_page(str(run.path), compare=True, web=False)
    with pytest.raises(UserError, match="there is no run and no model"):
        serve_page(str(run.path / "nothing"), port=0)
    monkeypatch.setitem(sys.modules, "gradio", None)
    with pytest.raises(UserError, match=r"needs Gradio.*pip install 'llama-ft\[web\]'"):
        serve_page(str(run.path), port=0)


def start(run: Any, *options: str, **environment: str) -> tuple[subprocess.Popen[str], str]:
    """The command, once it serves, and what it said."""
    command = [sys.executable, "-m", "llama_ft.cli", "chat", str(run.path), "--web", "--port", "0", *options]
    process = subprocess.Popen(
        command, stderr=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env=os.environ | environment
    )
    said = ""
    while "Ctrl-C ends it" not in said:
        line = process.stderr.readline()
        assert line, said
        said += line
    return process, said


@pytest.mark.parametrize(("sign", "status"), [(signal.SIGINT, 0), (signal.SIGTERM, -signal.SIGTERM)])
def test_the_command_ends_at_once_and_without_a_word(run, sign, status):
    process, said = start(run)
    url = said.split("chat page at ")[1].split()[0]
    job = Browser(url).submit(QUESTION, max_tokens=LONG)
    while not job.outputs():
        time.sleep(0.01)
    process.send_signal(sign)
    out, err = process.communicate(timeout=60)
    assert (process.returncode, out, err) == (status, "", "")


def test_beyond_this_machine_it_asks_for_a_password(run):
    process, said = start(run, "--host", "0.0.0.0")
    try:
        port = int(said.split("http://0.0.0.0:")[1].split("/")[0])
        told = process.stderr.readline()
        password = told.split("a password: ")[1].strip("]\n")
        url = f"http://127.0.0.1:{port}/"
        assert httpx.get(url).status_code == 401
        assert httpx.get(url, auth=("me", password)).status_code == 200
    finally:
        process.send_signal(signal.SIGINT)
        process.communicate(timeout=60)
    process, said = start(run, "--host", "0.0.0.0", **{PASSWORD: "of my own choice"})
    assert "of my own choice" not in said + process.stderr.readline()
    process.send_signal(signal.SIGINT)
    process.communicate(timeout=60)


def test_nobody_else_is_asked(run, tmp_path):
    """Every connection that the command opens is to this machine."""
    (tmp_path / "sitecustomize.py").write_text(
        "import socket, sys\n"
        "def watch(event, arguments):\n"
        "    if event == 'socket.connect' and arguments[0].family != socket.AF_UNIX:\n"
        "        print('CONNECTS', arguments[1], file=sys.stderr, flush=True)\n"
        "    if event == 'socket.getaddrinfo' and arguments[0] not in ('127.0.0.1', 'localhost', None):\n"
        "        print('LOOKS UP', arguments[0], file=sys.stderr, flush=True)\n"
        "sys.addaudithook(watch)\n"
        "print('WATCHED', file=sys.stderr, flush=True)\n"
    )
    process, said = start(run, PYTHONPATH=os.pathsep.join([str(tmp_path), os.environ.get("PYTHONPATH", "")]))
    Browser(said.split("chat page at ")[1].split()[0]).ask(QUESTION, max_tokens=4)
    process.send_signal(signal.SIGINT)
    said += process.communicate(timeout=60)[1]
    assert "WATCHED" in said
    assert "CONNECTS" not in said and "LOOKS UP" not in said

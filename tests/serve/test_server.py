"""`llama-ft serve` with a real engine, asked over HTTP: answers as in `llama-ft chat`, and a clean end."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import httpx2
import psutil
import pytest

pytest.importorskip("uvicorn")
pytest.importorskip("fastapi")
pytest.importorskip("openai")

from llama_ft.serve.conversation import Dialogue
from llama_ft.serve.generate import Generator
from llama_ft.serve.source import open_source
from tests.serve.serving import CLI, KEY, Serving, ask, streamed, text_of

QUESTIONS = [f"What does llama number {i} eat on hill {i * 3 % 11}?" for i in range(20)]
TWO = ["Where is the hay?", "Naïve 🦙 or not?"]


@pytest.fixture(scope="module")
def chat(run) -> Callable[..., str]:
    """What `llama-ft chat --temperature 0` answers, from its own parts."""
    opened = open_source(str(run.path))
    generator = Generator(opened.model, opened.stop, opened.context)

    def answer(*questions: str, system: str | None = None, max_tokens: int = 24) -> str:
        dialogue = Dialogue(opened.renderer, opened.context, system)
        for question in questions:
            ids = dialogue.ask(question, max_tokens)
            said = list(generator.stream(ids, max_tokens=max_tokens, temperature=0, top_p=1))
            text = opened.renderer.tokenizer.decode(said, skip_special_tokens=True)
            dialogue.answered(text.strip())
        return text

    return answer


@pytest.fixture(scope="module")
def served(run) -> Iterator[SimpleNamespace]:
    """The run beside its base, with a key; four requests at once."""
    with Serving(str(run.path), "--compare", "--max-concurrent", "8") as serving, serving.client() as client:
        yield SimpleNamespace(serving=serving, client=client, name=run.path.name)
        status, said = serving.end()
        assert (status, said.splitlines()[-1]) == (0, "[stopped]"), said


def text(response: httpx2.Response) -> str:
    assert response.status_code == 200, response.text
    return response.json()["choices"][0]["message"]["content"]


# Answers


def test_the_line(served) -> None:
    name, line = served.name, served.serving.line
    assert line.startswith(f"serving {name}, {name}-base at http://127.0.0.1:")
    for stated in (
        "transformers serve, float32 on cpu",
        "context 512 tokens",
        "8 requests at once, one answered at a time",
    ):
        assert stated in line
    assert line.endswith("bodies to 1 MB · for whoever has the API key\n")


def test_twenty_greedy_chats_are_those_of_the_terminal(served, chat) -> None:
    differing = []
    for number, question in enumerate(QUESTIONS):
        if number % 2:
            said = text(ask(served.client, served.name, question, temperature=0, max_tokens=24))
        else:
            said = text_of(streamed(served.client, served.name, question, temperature=0, max_tokens=24))
        # A cut character is left out by the one and shown as a sign by the other.
        differing += [question] if said.strip() != chat(question).strip().rstrip("�") else []
    assert not differing
    assert len({chat(question) for question in QUESTIONS}) > 5, "answers that are all alike would say little"


def test_a_conversation_with_a_system_prompt(served, chat) -> None:
    first = chat(TWO[0], system="Be short.").strip()
    messages = [{"role": "system", "content": "Be short."}, {"role": "user", "content": TWO[0]}]
    messages += [{"role": "assistant", "content": first}, {"role": "user", "content": TWO[1]}]
    body = {"model": served.name, "messages": messages, "temperature": 0, "max_tokens": 24}
    said = text(served.client.post("/v1/chat/completions", json=body))
    assert said.strip() == chat(*TWO, system="Be short.").strip().rstrip("�")


def test_the_base_stands_beside_it(served) -> None:
    """This base has no template: it is asked in the run's. It answers otherwise, and to as many tokens."""
    tuned = ask(served.client, served.name, QUESTIONS[0], temperature=0, max_tokens=24)
    base = ask(served.client, f"{served.name}-base", QUESTIONS[0], temperature=0, max_tokens=24)
    assert text(tuned) != text(base)
    assert tuned.json()["usage"]["prompt_tokens"] == base.json()["usage"]["prompt_tokens"]
    assert [model["id"] for model in served.client.get("/v1/models").json()["data"]] == [
        served.name,
        f"{served.name}-base",
    ]


def test_length_and_usage(served, run) -> None:
    from transformers import AutoTokenizer

    answer = ask(served.client, served.name, QUESTIONS[0], temperature=0, max_tokens=5).json()
    assert answer["choices"][0]["finish_reason"] == "length"
    tokenizer = AutoTokenizer.from_pretrained(run.merged)
    messages = [{"role": "user", "content": QUESTIONS[0]}]
    wanted = len(tokenizer.apply_chat_template(messages, add_generation_prompt=True, return_dict=True)["input_ids"])
    assert answer["usage"] == {"prompt_tokens": wanted, "completion_tokens": 5, "total_tokens": wanted + 5}
    told = streamed(
        served.client, served.name, QUESTIONS[0], temperature=0, max_tokens=5, stream_options={"include_usage": True}
    )
    assert told[-1]["usage"] == answer["usage"]


def test_a_stop_string_is_left_out(served, chat) -> None:
    whole = chat(QUESTIONS[0])
    stop = whole.strip()[4:7]
    before = whole[: whole.index(stop)]
    for stream in (False, True):
        if stream:
            told = streamed(served.client, served.name, QUESTIONS[0], temperature=0, max_tokens=24, stop=[stop])
            said, finish = text_of(told), told[-1]["choices"][0]["finish_reason"]
        else:
            answer = ask(served.client, served.name, QUESTIONS[0], temperature=0, max_tokens=24, stop=[stop])
            said, finish = text(answer), answer.json()["choices"][0]["finish_reason"]
            assert 0 < answer.json()["usage"]["completion_tokens"] < 24
        assert (said, finish) == (before, "stop")


def test_sampling_is_on_and_a_seed_repeats_it(served) -> None:
    """transformers serve by itself ignores a temperature where generation_config says greedy, as an export does."""
    said = [
        text(ask(served.client, served.name, "Hay?", temperature=1.0, seed=seed, max_tokens=16)) for seed in (5, 5, 6)
    ]
    assert said[0] == said[1] != said[2]
    unseeded = {text(ask(served.client, served.name, "Hay?", temperature=1.5, max_tokens=16)) for _ in range(4)}
    assert len(unseeded) > 1
    plain = [text(ask(served.client, served.name, "Hay?", max_tokens=16)) for _ in range(2)]
    assert plain[0] == plain[1] == text(ask(served.client, served.name, "Hay?", temperature=0, max_tokens=16))
    narrow = text(ask(served.client, served.name, "Hay?", temperature=1.0, top_p=1e-9, seed=5, max_tokens=16))
    assert narrow == plain[0]


def test_seeds_hold_among_others(served) -> None:
    """The engine has one source of random numbers for all: answers come one after the other."""
    alone = [
        text(ask(served.client, served.name, "Hay?", temperature=1.0, seed=seed, max_tokens=16)) for seed in range(6)
    ]
    together: dict[int, str] = {}

    def go(seed: int) -> None:
        with served.serving.client() as client:
            together[seed] = text(ask(client, served.name, "Hay?", temperature=1.0, seed=seed, max_tokens=16))

    threads = [threading.Thread(target=go, args=(seed,)) for seed in range(6)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert [together[seed] for seed in range(6)] == alone


def test_bare_text(served) -> None:
    body = {"model": served.name, "prompt": "the llama eats", "max_tokens": 6, "temperature": 0}
    answer = served.client.post("/v1/completions", json=body).json()
    assert answer["object"] == "text_completion"
    assert answer["usage"]["completion_tokens"] == 6


# The official client


def test_the_official_client(served, chat) -> None:
    import openai

    client = openai.OpenAI(base_url=f"{served.serving.url}/v1", api_key=KEY, max_retries=0, timeout=60)
    messages: Any = [{"role": "user", "content": QUESTIONS[1]}]
    wanted = chat(QUESTIONS[1]).strip().rstrip("�")
    answer = client.chat.completions.create(model=served.name, messages=messages, temperature=0, max_tokens=24)
    assert answer.choices[0].message.content.strip() == wanted
    stream = client.chat.completions.create(
        model=served.name, messages=messages, temperature=0, max_tokens=24, stream=True
    )
    assert "".join(chunk.choices[0].delta.content or "" for chunk in stream).strip() == wanted
    # A message of the client's own goes back as it came.
    more: Any = [*messages, answer.choices[0].message, {"role": "user", "content": "And then?"}]
    assert client.chat.completions.create(model=served.name, messages=more, max_tokens=4).usage.completion_tokens == 4
    assert [model.id for model in client.models.list()] == [served.name, f"{served.name}-base"]

    def refused(error: type[openai.APIStatusError], **more: Any) -> str:
        with pytest.raises(error) as caught:
            client.chat.completions.create(**{"model": served.name, "messages": messages, **more})
        return caught.value.message

    assert "did you mean" in refused(openai.NotFoundError, model=served.name[:-1])
    assert "n=2 is not served" in refused(openai.BadRequestError, n=2)
    assert "control token" in refused(openai.BadRequestError, messages=[{"role": "user", "content": "<|im_end|>"}])
    large: Any = [{"role": "user", "content": "x" * 1_000_000}]
    assert "larger than 1 MB" in refused(openai.APIStatusError, messages=large)
    stranger = openai.OpenAI(base_url=f"{served.serving.url}/v1", api_key="wrong", max_retries=0)
    with pytest.raises(openai.AuthenticationError, match="the API key is wrong"):
        stranger.models.list()


def test_a_long_message_that_is_just_allowed(served) -> None:
    """Far beyond the context: told so, and soon; others are answered meanwhile."""
    said: list[httpx2.Response] = []
    with served.serving.client() as other:
        thread = threading.Thread(target=lambda: said.append(ask(other, served.name, "hay " * 240_000)))
        start = time.monotonic()
        thread.start()
        assert text(ask(served.client, served.name, "Hay?", max_tokens=2))
        thread.join(60)
    assert said[0].status_code == 400
    assert said[0].json()["error"]["code"] == "context_length_exceeded"
    assert time.monotonic() - start < 60


def test_the_key_is_nobodys_business(served) -> None:
    assert served.serving.children
    for child in served.serving.children:
        with psutil.Process(child.pid).oneshot():
            assert not any(KEY in part for part in child.cmdline())
            assert KEY not in json.dumps(child.environ())
            addresses = {line.laddr.ip for line in child.net_connections("inet") if line.status == psutil.CONN_LISTEN}
            assert addresses <= {"127.0.0.1"}


# The end


def gone(children: list[psutil.Process], seconds: float = 20) -> bool:
    """Whether none of them is left: dead ones that nobody has waited for yet are gone too."""
    end = time.monotonic() + seconds
    while time.monotonic() < end:
        if not any(child.is_running() and child.status() != psutil.STATUS_ZOMBIE for child in children):
            return True
        time.sleep(0.05)
    return False


def test_ctrl_c_in_the_middle_of_an_answer(run) -> None:
    with Serving(str(run.path), key=None) as serving, serving.client() as client:
        assert serving.line.endswith("no API key: for this machine alone\n")
        body = {"model": run.path.name, "messages": [{"role": "user", "content": "Hay?"}], "stream": True}
        with client.stream(
            "POST", "/v1/chat/completions", json=body | {"max_tokens": 400, "temperature": 1}
        ) as response:
            next(response.iter_bytes())
            status, said = serving.end(signal.SIGINT)
        assert (status, said.splitlines()[-1]) == (0, "[stopped]"), said
        assert gone(serving.children)


def test_an_engine_that_dies_ends_the_command(run) -> None:
    with Serving(str(run.path)) as serving, serving.client() as client:
        assert ask(client, run.path.name, "Hay?", max_tokens=2).status_code == 200
        engine = next(child for child in serving.children if "transformers.cli.transformers" in child.cmdline())
        engine.kill()
        _, said = serving.process.communicate(timeout=120)
        assert serving.process.returncode == 1
        assert "llama-ft: stopped by the machine (1 problem)" in said
        assert f"transformers serve ({run.path.name}) was killed by SIGKILL" in said
        assert "Traceback" not in said
        assert gone(serving.children)


def test_a_server_that_is_killed_leaves_no_engine(run) -> None:
    with Serving(str(run.path)) as serving:
        serving.process.kill()
        assert gone(serving.children)


def test_a_signal_while_the_engine_starts(run) -> None:
    process = subprocess.Popen(
        [*CLI, str(run.path), "--port", "0"], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )
    assert process.stderr.readline().startswith("[starting transformers serve:")
    time.sleep(1)
    children = psutil.Process(process.pid).children(recursive=True)
    process.send_signal(signal.SIGTERM)
    out, said = process.communicate(timeout=120)
    assert (process.returncode, out) == (0, "")
    assert "Traceback" not in said
    assert children
    assert gone(children)


def test_an_engine_that_cannot_start(run, tmp_path) -> None:
    """A config that its weights do not fit. Of a folder we look at both; of a finished run the engine is the first."""
    folder = tmp_path / "odd"
    shutil.copytree(run.path, folder)
    config = json.loads((folder / "merged" / "config.json").read_text())
    (folder / "merged" / "config.json").write_text(json.dumps(config | {"intermediate_size": 96}))
    result = subprocess.run([*CLI, str(folder), "--port", "0"], capture_output=True, text=True, timeout=600)
    assert result.returncode == 1, result.stderr
    assert result.stdout == ""
    assert "transformers serve (odd) ended with status 1; its last words:" in result.stderr


def test_an_engine_whose_template_is_another(run, tmp_path) -> None:
    """The first question is read by both sides: a folder that changes under the engine's feet is found out."""
    import asyncio

    from llama_ft.errors import MachineFault
    from llama_ft.serve.child import free_port
    from llama_ft.serve.engines import TRANSFORMERS, launch_transformers
    from llama_ft.serve.limits import Limits
    from llama_ft.serve.served import Served, find_served
    from llama_ft.serve.server import Server, bound

    folder = tmp_path / "model"
    folder.mkdir()
    for file in run.merged.iterdir():
        (folder / file.name).symlink_to(file)
    stage = tmp_path / "stage"
    stage.mkdir()
    launches = launch_transformers(find_served([str(folder)]), stage, free_port)
    template = (folder / "chat_template.jinja").read_text()
    (folder / "chat_template.jinja").unlink()
    (folder / "chat_template.jinja").write_text("Once upon a time. " + template)
    assert isinstance(find_served([str(folder)])[0], Served)
    server = Server(TRANSFORMERS, launches, ["model"], Limits(), None, stage)
    with (
        bound("127.0.0.1", 0) as listener,
        pytest.raises(MachineFault, match=r"reads a question to model as \d+ tokens, training as"),
    ):
        asyncio.run(server.run(listener))


def test_without_the_extra(run) -> None:
    code = (
        "import sys; sys.modules['fastapi'] = None; from llama_ft.cli import app\n"
        f"app(['serve', {str(run.path)!r}, '--port', '0'])"
    )
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=os.environ, timeout=600)
    assert result.returncode == 2
    assert "transformers serve is not installed (fastapi missing) — pip install 'llama-ft[serve]'" in result.stderr


def test_mistakes_end_before_anything_is_loaded(run, tmp_path) -> None:
    from llama_ft.errors import UserError
    from llama_ft.serve.server import serve

    def said(*sources: str | Path, **more: Any) -> str:
        with pytest.raises(UserError) as caught:
            serve([str(source) for source in sources], port=0, **more)
        return str(caught.value)

    assert "there is no engine 'vlm' — did you mean 'vllm'?" in said(run.path, engine="vlm")
    assert f"two models would be called '{run.path.name}'" in said(run.path, run.path)
    assert "there is no run and no model 'runs/nobody'" in said("runs/nobody")
    assert "is no run: there is no base to compare it with" in said(tmp_model(run, tmp_path), compare=True)
    cut = tmp_path / "cut"
    cut.mkdir()
    for file in run.merged.iterdir():
        data = file.read_bytes()
        (cut / file.name).write_bytes(data[: len(data) // 2] if file.suffix == ".safetensors" else data)
    assert "is cut off or damaged" in said(cut)
    bare = tmp_path / "bare"
    bare.mkdir()
    (bare / "recipe.yaml").write_bytes(run.recipe_file.read_bytes())
    assert "holds no merged/ and no adapter/ to serve yet" in said(bare)
    (bare / "adapter").symlink_to(run.adapter)
    assert f"has no merged/, which transformers serve needs — llama-ft export {bare}" in said(bare)
    assert "has no GGUF file" in said(run.path, engine="llama-cpp") or "is not installed" in said(
        run.path, engine="llama-cpp"
    )


def tmp_model(run, folder: Path) -> Path:
    model = folder / "model"
    model.symlink_to(run.merged)
    return model

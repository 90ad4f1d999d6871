"""`llama-ft serve --engine vllm` with a real vLLM, where there is one: $LLAMA_FT_VLLM, or `vllm` on PATH.

vLLM starts in half a minute on a quiet machine, so most tests share one server, with two LoRA runs of SmolLM2-135M and
its base. On a CPU everything is float32, and greedy answers can be held to those of the terminal.
"""

from __future__ import annotations

import contextlib
import json
import os
import re
import signal
import subprocess
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from functools import cache
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import httpx2
import psutil
import pytest
from transformers import LlamaConfig, LlamaForCausalLM

pytest.importorskip("uvicorn")
pytest.importorskip("openai")

from llama_ft.data.render import Renderer, TemplateRefusal
from llama_ft.data.template import Template
from llama_ft.errors import UserError
from llama_ft.export.folder import write_companions
from llama_ft.serve.child import free_port
from llama_ft.serve.conversation import Dialogue
from llama_ft.serve.engines import child_environment
from llama_ft.serve.generate import Generator
from llama_ft.serve.refusal import Refusal
from llama_ft.serve.served import find_served
from llama_ft.serve.source import open_source
from llama_ft.serve.vllm import VLLM, VllmReader, find_command, launch_vllm
from llama_ft.tokenizer.load import load_tokenizer
from tests.data.template_help import chats, llama3_tokenizer, tool_chats
from tests.serve.serving import CLI, KEY, Serving, ask, streamed, text_of
from tests.serve.test_contract import CASES, TAKES, TOKENIZERS, asked, exported
from tests.serve.test_server_engines import gone

try:
    HERE = find_command() is not None
except UserError:
    HERE = True  # and the tests say what is wrong with it
pytestmark = [
    pytest.mark.peers,
    pytest.mark.skipif(not HERE, reason="vLLM is not here: neither $LLAMA_FT_VLLM nor `vllm` on PATH names it"),
]
SMALL = {"VLLM_CPU_KVCACHE_SPACE": "1"}
QUESTIONS = [
    "What is LoRA?", "Name three rivers of France.", "How do I boil an egg?", "Write a line about the sea.",
    "What does a tokenizer do?", "Who wrote Hamlet?", "Explain gravity to a child.", "What is 2 + 2?",
]  # fmt: skip
TOKENS = 24


@pytest.fixture(scope="module")
def runs(smollm2, tmp_path_factory) -> list[Path]:
    """Two real trainings of SmolLM2-135M, a few steps each: they answer differently."""
    from llama_ft import load_recipe, train_recipe

    folder, made = tmp_path_factory.mktemp("runs"), []
    for name, rate, seed in (("one", "3e-3", 1), ("two", "6e-3", 2)):
        where = ["output_dir=" + str(folder / name), "data.0.limit=48", "eval_data=null"]
        steps = ["training.max_steps=6", f"training.learning_rate={rate}", f"training.seed={seed}"]
        made.append(train_recipe(load_recipe("quickstart", [*where, *steps])).path)
    return made


@pytest.fixture(scope="module")
def chat(runs, smollm2) -> Callable[..., str]:
    """What `llama-ft chat --temperature 0` answers, from its own parts; `base`: in the words of the runs."""
    words = open_source(str(runs[0]))

    @cache
    def generator(name: str) -> Generator:
        folders = {"base": str(smollm2), **{run.name: str(run) for run in runs}}
        return Generator(open_source(folders[name]).model, words.stop, words.context)

    def answer(name: str, *questions: str, system: str | None = None) -> str:
        dialogue = Dialogue(words.renderer, words.context, system)
        for question in questions:
            ids = dialogue.ask(question, TOKENS)
            said = list(generator(name).stream(ids, max_tokens=TOKENS, temperature=0, top_p=1))
            text = words.renderer.tokenizer.decode(said, skip_special_tokens=True)
            dialogue.answered(text.strip())
        return text.strip().rstrip("�")

    return answer


def shared_memory(children: list[psutil.Process]) -> set[Path]:
    """Files through which its processes share some 400 MB of memory: they outlive processes that are killed."""
    found: set[str] = set()
    for child in children:
        with contextlib.suppress(OSError):
            found |= set(re.findall(r"/dev/shm/psm_\w+", Path(f"/proc/{child.pid}/maps").read_text()))
    assert found
    return {Path(file) for file in found}


def given_back(files: set[Path], seconds: float = 20) -> bool:
    end = time.monotonic() + seconds
    while any(file.exists() for file in files) and time.monotonic() < end:
        time.sleep(0.1)
    return not any(file.exists() for file in files)


@pytest.fixture(scope="module")
def served(runs) -> Iterator[SimpleNamespace]:
    """Two runs beside their base, with a key."""
    sources = [str(run) for run in runs]
    with (
        Serving(*sources, "--compare", "--engine", "vllm", "--max-concurrent", "8", environment=SMALL) as serving,
        serving.client() as client,
    ):
        yield SimpleNamespace(serving=serving, client=client)
        shared = shared_memory(serving.children)
        status, said = serving.end()
        assert (status, said.splitlines()[-1]) == (0, "[stopped]"), said
        assert "Traceback" not in said
        assert gone(serving.children)
        assert given_back(shared)


def text(response: httpx2.Response) -> str:
    assert response.status_code == 200, response.text
    return response.json()["choices"][0]["message"]["content"]


# Answers


def test_the_line(served) -> None:
    assert served.serving.line.startswith("serving one, one-base, two, two-base at http://127.0.0.1:")
    assert "vLLM, float32 on cpu, 2 adapters on one base · context 8192 tokens" in served.serving.line
    assert "answered at a time" not in served.serving.line


def test_greedy_chats_are_those_of_the_terminal(served, chat) -> None:
    """Each adapter under its own name, and the base under both of its names; eight at a time, every second streamed."""

    def go(case: tuple[int, str, str]) -> str:
        number, name, question = case
        with served.serving.client() as client:
            settings = {"temperature": 0, "max_tokens": TOKENS}
            if number % 2:
                return text_of(streamed(client, name, question, **settings)).strip()
            return text(ask(client, name, question, **settings)).strip()

    names = ("one", "two", "one-base", "two-base")
    cases = [(number, name, question) for name in names for number, question in enumerate(QUESTIONS)]
    with ThreadPoolExecutor(8) as pool:
        said = dict(zip(cases, pool.map(go, cases), strict=True))
    wanted = {case: chat("base" if case[1].endswith("base") else case[1], case[2]) for case in cases}
    assert said == wanted
    assert len({wanted[0, name, QUESTIONS[0]] for name in names}) == 3, "answers that are all alike would say little"


def test_a_conversation_with_a_system_prompt(served, chat) -> None:
    first = chat("one", QUESTIONS[1], system="Be short.")
    messages = [{"role": "system", "content": "Be short."}, {"role": "user", "content": QUESTIONS[1]}]
    messages += [{"role": "assistant", "content": first}, {"role": "user", "content": "And of Italy?"}]
    body = {"model": "one", "messages": messages, "temperature": 0, "max_tokens": TOKENS}
    said = text(served.client.post("/v1/chat/completions", json=body))
    assert said.strip() == chat("one", QUESTIONS[1], "And of Italy?", system="Be short.")


def test_length_and_usage(served, runs) -> None:
    answer = ask(served.client, "two", QUESTIONS[1], temperature=0, max_tokens=5).json()
    assert answer["choices"][0]["finish_reason"] == "length"
    tokenizer = load_tokenizer(runs[0] / "merged")
    messages = [{"role": "user", "content": QUESTIONS[1]}]
    wanted = len(tokenizer.apply_chat_template(messages, add_generation_prompt=True, return_dict=True)["input_ids"])
    assert answer["usage"] == {"prompt_tokens": wanted, "completion_tokens": 5, "total_tokens": wanted + 5}
    options = {"include_usage": True}
    told = streamed(served.client, "two", QUESTIONS[1], temperature=0, max_tokens=5, stream_options=options)
    assert told[-1]["usage"] == answer["usage"]


def test_a_stop_string_is_left_out(served, chat) -> None:
    whole = chat("one", QUESTIONS[1])
    stop, later = whole[6:9], whole[12:14]
    for stream in (False, True):
        more = {"temperature": 0, "max_tokens": TOKENS, "stop": [later, stop]}
        if stream:
            told = streamed(served.client, "one", QUESTIONS[1], **more)
            said, finish = text_of(told), told[-1]["choices"][0]["finish_reason"]
        else:
            answer = ask(served.client, "one", QUESTIONS[1], **more)
            said, finish = text(answer), answer.json()["choices"][0]["finish_reason"]
            assert 0 < answer.json()["usage"]["completion_tokens"] < TOKENS
        assert (said, finish) == (whole[: whole.index(stop)], "stop")


def test_sampling_and_seeds(served) -> None:
    def said(**more: Any) -> str:
        return text(ask(served.client, "one", "Hay?", max_tokens=12, **more))

    one, again, other = (said(temperature=1.0, seed=seed) for seed in (5, 5, 6))
    assert one == again != other
    assert len({said(temperature=1.5) for _ in range(4)}) > 1
    assert said() == said() == said(temperature=0), "the model's generation_config.json says greedy"
    assert said(temperature=1.0, top_p=1e-9, seed=5) == said()
    assert said(temperature=1.0, seed=2**63 - 1)


def test_seeds_hold_among_others(served) -> None:
    def go(seed: int) -> str:
        with served.serving.client() as client:
            return text(ask(client, "one", "Hay?", temperature=1.0, seed=seed, max_tokens=12))

    alone = [go(seed) for seed in range(6)]
    with ThreadPoolExecutor(6) as pool:
        assert list(pool.map(go, range(6))) == alone


def test_bare_text(served) -> None:
    body = {"model": "one", "prompt": "The llama", "max_tokens": 6, "temperature": 0}
    answer = served.client.post("/v1/completions", json=body).json()
    assert answer["object"] == "text_completion"
    assert answer["usage"]["completion_tokens"] == 6


def test_the_fields_that_it_takes(served) -> None:
    def said(**more: Any) -> str:
        return text(ask(served.client, "one", "Name a city.", temperature=0, max_tokens=16, **more))

    schema = {"type": "object", "properties": {"city": {"enum": ["Paris", "Rome"]}}, "required": ["city"]}
    wanted = {"type": "json_schema", "json_schema": {"name": "city", "schema": schema}}
    assert json.loads(said(response_format=wanted))["city"] in ("Paris", "Rome")
    assert said(response_format={"type": "json_object"}).lstrip().startswith("{")
    assert len(set(said(logit_bias={"100": 100}))) == 1

    def poem(**more: Any) -> str:
        return text(ask(served.client, "one", "Repeat: hay, hay, hay, hay.", temperature=0, max_tokens=32, **more))

    assert len({poem(), poem(frequency_penalty=2.0), poem(presence_penalty=-2.0)}) == 3


@pytest.mark.parametrize(
    ("field", "value", "said"),
    [
        ("presence_penalty", 9, "presence_penalty must be in [-2, 2]"),
        ("logit_bias", {"a": 1}, "cannot be converted to integer token IDs"),
        ("logit_bias", {"9999999": 1}, "out-of-vocab token ids"),
        ("response_format", {"type": "nonsense"}, "'json_object' or 'json_schema'"),
        (
            "response_format",
            {"type": "json_schema", "json_schema": {"name": "x", "schema": {"type": "nonsense"}}},
            "Invalid type: nonsense",
        ),
    ],
)
def test_what_it_refuses_is_the_clients(served, field, value, said) -> None:
    told = ask(served.client, "one", "Hi", max_tokens=4, **{field: value})
    assert told.status_code == 400
    assert told.json()["error"]["param"] == field
    assert said in told.json()["error"]["message"]


def test_the_official_client(served, chat) -> None:
    import openai

    client = openai.OpenAI(base_url=f"{served.serving.url}/v1", api_key=KEY, max_retries=0, timeout=120)
    messages: Any = [{"role": "user", "content": QUESTIONS[0]}]
    more: Any = {"model": "two", "messages": messages, "temperature": 0, "max_tokens": TOKENS}
    stream = client.chat.completions.create(**more, stream=True)
    assert "".join(chunk.choices[0].delta.content or "" for chunk in stream).strip() == chat("two", QUESTIONS[0])
    assert [model.id for model in client.models.list()] == ["one", "one-base", "two", "two-base"]
    with pytest.raises(openai.NotFoundError, match="did you mean 'one'"):
        client.chat.completions.create(**more | {"model": "onne"})
    with pytest.raises(openai.BadRequestError, match="control token"):
        client.chat.completions.create(**more | {"messages": [{"role": "user", "content": "<|im_end|>"}]})


def engine_of(serving: Serving) -> tuple[psutil.Process, str]:
    """vLLM's own front, and its address."""
    for child in serving.children:
        line = child.cmdline()
        if "--served-model-name" in line and not any("tether" in part for part in line):
            return child, f"http://127.0.0.1:{line[line.index('--port') + 1]}"
    raise AssertionError("vLLM is no child of the command")


def running(address: str) -> int:
    """Answers that vLLM works on."""
    told = httpx2.get(f"{address}/metrics", trust_env=False).text
    names = ("vllm:num_requests_running", "vllm:num_requests_waiting")
    counts = [line.split()[-1] for line in told.splitlines() if line.split("{")[0] in names]
    assert counts
    return round(sum(map(float, counts)))


def until(count: int, address: str, seconds: float = 30) -> None:
    end = time.monotonic() + seconds
    while running(address) != count:
        assert time.monotonic() < end, running(address)
        time.sleep(0.1)


@pytest.mark.parametrize("stream", [True, False])
def test_who_goes_away_ends_its_answer(served, stream) -> None:
    _, address = engine_of(served.serving)
    until(0, address)
    # Forced to go on for longer than the test lasts.
    body = {"model": "one", "messages": [{"role": "user", "content": "Hi"}], "logit_bias": {"100": 100}}
    with served.serving.client() as client:
        asking = threading.Thread(target=_hang_up_on, args=(client, body | {"stream": stream, "max_tokens": 8000}))
        asking.start()
        until(1, address)
        client.close()
        asking.join(30)
    until(0, address)


def _hang_up_on(client: httpx2.Client, body: dict[str, Any]) -> None:
    """Gives up after a few seconds."""
    try:
        with client.stream("POST", "/v1/chat/completions", json=body, timeout=3) as response:
            for _ in response.iter_bytes():
                pass
    except (httpx2.HTTPError, RuntimeError):
        return


def test_keys_and_addresses(served) -> None:
    assert len(served.serving.children) >= 3, "its front, its engine, its worker"
    for child in served.serving.children:
        with psutil.Process(child.pid).oneshot():
            assert not any(KEY in part for part in child.cmdline())
            assert KEY not in json.dumps(child.environ())
            addresses = {line.laddr.ip for line in child.net_connections("inet") if line.status == psutil.CONN_LISTEN}
            assert addresses <= {"127.0.0.1"}
    engine, address = engine_of(served.serving)
    own = engine.environ()["VLLM_API_KEY"]
    assert not any(own in part for child in served.serving.children for part in child.cmdline())
    assert httpx2.get(f"{address}/v1/models", trust_env=False).status_code == 401
    headers = {"Authorization": f"Bearer {own}"}
    assert httpx2.get(f"{address}/v1/models", headers=headers, trust_env=False).status_code == 200
    # What docs/serve.md warns of: it guards its /v1 alone.
    body = {"model": "m0", "messages": [{"role": "user", "content": "Hi"}], "max_tokens": 1}
    assert httpx2.post(f"{address}/invocations", json=body, timeout=60, trust_env=False).status_code == 200


# The end


def test_a_merged_model_and_an_engine_that_dies(runs, chat) -> None:
    """Its front notices that its worker is gone, and ends; then all of it is gone, and the command says so."""
    with (
        Serving(str(runs[1]), "--engine", "vllm", key=None, environment=SMALL) as serving,
        serving.client() as client,
    ):
        assert "vLLM, float32 on cpu, merged · context 8192 tokens" in serving.line
        for question in QUESTIONS[:4]:
            assert text(ask(client, "two", question, temperature=0, max_tokens=TOKENS)).strip() == chat("two", question)
        shared = shared_memory(serving.children)
        core = next(child for child in serving.children if child.name().startswith("VLLM::EngineCor"))
        core.kill()
        _, said = serving.process.communicate(timeout=120)
        assert serving.process.returncode == 1
        assert "llama-ft: stopped by the machine (1 problem)" in said
        assert "vLLM (two) ended with status" in said
        assert gone(serving.children)
        assert given_back(shared)


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGKILL], ids=["SIGTERM", "SIGKILL"])
def test_a_signal_while_it_starts(runs, number) -> None:
    """vLLM itself takes no notice of SIGTERM then, and its workers outlive it."""
    line = [*CLI, str(runs[0]), "--engine", "vllm", "--port", "0"]
    process = subprocess.Popen(line, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=os.environ | SMALL)
    end, children = time.monotonic() + 300, []
    while not any(child.name().startswith("VLLM::Worker") for child in children):
        assert process.poll() is None
        assert time.monotonic() < end
        time.sleep(0.2)
        children = psutil.Process(process.pid).children(recursive=True)
    shared = shared_memory(children)
    process.send_signal(number)
    out, said = process.communicate(timeout=60)
    assert (process.returncode, out) == (0 if number == signal.SIGTERM else -number, "")
    assert "Traceback" not in said
    assert gone(children, 30)
    assert given_back(shared)


@pytest.mark.parametrize(
    ("space", "cause"),
    [("4000", "less than requested memory for kv (4000.0 GiB)"), ("1", "Unsupported CPU attention configuration")],
    ids=["at its start", "at its first question"],
)
def test_one_that_cannot_answer(run, space, cause) -> None:
    """Too little memory; heads of 16, which its kernels do not know. The cause stands before pages of other things."""
    line = [*CLI, str(run.path), "--engine", "vllm", "--port", "0"]
    environment = os.environ | {"VLLM_CPU_KVCACHE_SPACE": space}
    result = subprocess.run(line, capture_output=True, text=True, timeout=900, env=environment)
    assert (result.returncode, result.stdout) == (1, ""), result.stderr
    assert f"vLLM ({run.path.name}) ended with status" in result.stderr
    assert cause in "".join(result.stderr.splitlines()[3:6])


# The template contract


class Alone:
    """A vLLM that takes a template with each request, and tells the ids it made of it."""

    def __init__(self, folder: Path, stage: Path):
        (launch,) = launch_vllm(find_served([str(folder)]), stage, free_port)
        self.url, self.headers = f"http://127.0.0.1:{launch.port}", {"Authorization": f"Bearer {launch.key}"}
        environment = child_environment(launch) | SMALL
        self.log = (stage / "log").open("w+")
        line = [*launch.line, "--trust-request-chat-template"]
        self.process = subprocess.Popen(line, stdout=self.log, stderr=self.log, env=environment, start_new_session=True)

    def __enter__(self) -> Alone:
        end = time.monotonic() + 600
        while True:
            try:
                if httpx2.get(f"{self.url}/health", trust_env=False).status_code == 200:
                    return self
            except httpx2.HTTPError:
                if self.process.poll() is not None or time.monotonic() > end:
                    self.log.seek(0)
                    raise AssertionError(self.log.read()[-4000:]) from None
            time.sleep(0.5)

    def reads(self, body: dict[str, Any], template: str | None) -> list[int]:
        body = {key: value for key, value in body.items() if key != "stream_options"}
        body |= {"stream": False, "max_tokens": 1, "return_token_ids": True}
        body |= {} if template is None else {"chat_template": template}
        url = f"{self.url}/v1/chat/completions"
        told = httpx2.post(url, json=body, headers=self.headers, timeout=120, trust_env=False)
        assert told.status_code == 200, told.text
        return told.json()["prompt_token_ids"]

    def __exit__(self, *_: object) -> None:
        self.process.terminate()
        self.process.wait(60)
        self.log.close()


@pytest.mark.parametrize("tokenizer", TOKENIZERS)
def test_it_reads_what_was_trained(tokenizer, tiny_base, tmp_path, request) -> None:
    """Each shipped template, in one server for each tokenizer; with Llama 3's real conversations and tools as well."""
    if tokenizer == "tiny":
        own = load_tokenizer(tiny_base)
    else:
        real_data = request.getfixturevalue("real_data")
        if tokenizer == "llama3":
            own = llama3_tokenizer(real_data)
        else:
            (tmp_path / "llama2").mkdir()
            file = tmp_path / "llama2" / "tokenizer.model"
            file.write_bytes((real_data / "tokenizers" / "llama2_tokenizer.model").read_bytes())
            own = load_tokenizer(tmp_path / "llama2")
    folder, stage = tmp_path / "model", tmp_path / "stage"
    shape = {"hidden_size": 32, "intermediate_size": 32, "num_hidden_layers": 1, "num_attention_heads": 1}
    config = LlamaConfig(vocab_size=len(own), max_position_embeddings=4096, tie_word_embeddings=True, **shape)
    model = LlamaForCausalLM(config)
    model.save_pretrained(folder)
    before, own.chat_template = own.chat_template, Template.load(TOKENIZERS[tokenizer][0]).source
    write_companions(folder, config, model.dtype, own, [own.eos_token_id])
    own.chat_template = before
    stage.mkdir()
    with Alone(folder, stage) as engine:
        for number, name in enumerate(TOKENIZERS[tokenizer]):
            template = Template.load(name)
            training, words = Renderer(template, own), exported(tmp_path / name, own, template)
            reader, taken = VllmReader(words, words), set()
            for case, (messages, tools) in CASES.items():
                its = asked(messages, tools)
                try:
                    wanted = training.prompt_ids(messages, tools)
                except TemplateRefusal:
                    with pytest.raises(Refusal):
                        reader.chat(its.messages, its.tools)
                    continue
                taken.add(case)
                body = VLLM.write(its, reader, "m0", 1)
                assert engine.reads(body, template.source) == wanted, (name, case)
                if number == 0:  # the one in its folder
                    assert engine.reads(body, None) == wanted, (name, case)
                assert reader.chat(its.messages, its.tools) == wanted
            assert taken == TAKES[name]
        if tokenizer == "llama3":
            check_real_conversations(engine, real_data, training, reader)


def check_real_conversations(engine: Alone, real_data: Path, training: Renderer, reader: VllmReader) -> None:
    conversations = [(turns, None) for turns in chats(real_data, 10)] + tool_chats(real_data)[:10]
    several = with_calls = 0
    for said, tools in conversations:
        last = max((i for i, turn in enumerate(said) if turn["role"] != "assistant"), default=-1)
        turns = said[: last + 1]
        its = asked(turns, tools or None)
        try:
            wanted = training.prompt_ids(turns, tools or None)
        except TemplateRefusal:
            continue
        if len(wanted) > 4000:
            continue
        assert reader.chat(its.messages, its.tools) == wanted
        assert engine.reads(VLLM.write(its, reader, "m0", 1), None) == wanted
        several += len(turns) > 2
        with_calls += any("tool_calls" in turn for turn in turns)
    assert several > 5
    assert with_calls > 1

"""Two hundred chats, eight at a time, by the official client on the real SmolLM2-135M: nothing hangs, nothing grows."""

from __future__ import annotations

import statistics
import time
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import psutil
import pytest

pytest.importorskip("uvicorn")
pytest.importorskip("fastapi")
pytest.importorskip("openai")

from llama_ft.serve.conversation import Dialogue
from llama_ft.serve.generate import Generator
from llama_ft.serve.source import open_source
from tests.serve.conftest import finished
from tests.serve.serving import KEY, Serving
from tests.tiny_run import QUESTIONS

CHATS, AT_ONCE, WARM, TOKENS = 200, 8, 24, 16
TOPICS = ["llamas", "the sea", "bread", "Paris", "rain", "a bicycle", "the moon", "tea", "chess", "a violin"]


def memory(serving: Serving) -> int:
    """Resident bytes of the command and all it started."""
    return sum(one.memory_info().rss for one in [psutil.Process(serving.process.pid), *serving.children])


@pytest.mark.slow
def test_two_hundred_chats(smollm2, tmp_path) -> None:
    run = finished(smollm2, tmp_path / "smollm2-run", training__learning_rate=1e-4)
    with Serving(str(run.path), "--max-concurrent", str(AT_ONCE)) as serving:
        import openai

        client = openai.OpenAI(base_url=f"{serving.url}/v1", api_key=KEY, max_retries=0, timeout=600)
        name, waits = run.path.name, []

        def chat(number: int) -> str:
            """Every second one streamed, every tenth with a stop string, every fifth a bad request beside it."""
            question = f"{QUESTIONS[number % 24][0]} And what about {TOPICS[number % 10]}, number {number}?"
            messages: Any = [{"role": "user", "content": question}]
            more: dict[str, Any] = {"stop": [". "]} if number % 10 == 9 else {}
            more |= {"model": name, "messages": messages, "temperature": 0, "max_tokens": TOKENS}
            start = time.monotonic()
            if number % 2:
                said = "".join(
                    c.choices[0].delta.content or "" for c in client.chat.completions.create(**more, stream=True)
                )
            else:
                answer = client.chat.completions.create(**more)
                said = answer.choices[0].message.content
                assert answer.choices[0].finish_reason in ("stop", "length")
            waits.append(time.monotonic() - start)
            if number % 5 == 0:
                bad(client, serving, name, number)
            return said

        with ThreadPoolExecutor(AT_ONCE) as pool:
            warm = list(pool.map(chat, range(WARM)))
            before, start = memory(serving), time.monotonic()
            said = [*warm, *pool.map(chat, range(WARM, CHATS))]
            seconds, after = time.monotonic() - start, memory(serving)
        assert len(said) == CHATS
        status, told = serving.end()
        assert (status, told.splitlines()[-1]) == (0, "[stopped]")
    opened = open_source(str(run.path))
    generator = Generator(opened.model, opened.stop, opened.context)
    for number in range(0, CHATS, 5):  # streamed ones and others; the tenths with a stop string are none of them
        question = f"{QUESTIONS[number % 24][0]} And what about {TOPICS[number % 10]}, number {number}?"
        ids = Dialogue(opened.renderer, opened.context).ask(question, TOKENS)
        tokens = list(generator.stream(ids, max_tokens=TOKENS, temperature=0, top_p=1))
        assert said[number].strip() == opened.renderer.tokenizer.decode(
            tokens, skip_special_tokens=True
        ).strip().rstrip("�")
    print(
        f"\n{CHATS - WARM} chats in {seconds:.0f} s, median wait {statistics.median(waits):.1f} s, "
        f"longest {max(waits):.1f} s; resident {before / 2**20:.0f} MiB after {WARM} chats, "
        f"{after / 2**20:.0f} MiB after {CHATS}"
    )
    assert after < 1.05 * before


def bad(client: Any, serving: Serving, name: str, number: int) -> None:
    """What is wrong is told while the others are answered."""
    import openai

    hi: Any = [{"role": "user", "content": "Hi"}]
    wrong: list[tuple[dict[str, Any], int]] = [
        ({"model": "nobody", "messages": hi}, 404),
        ({"model": name, "messages": [{"role": "user", "content": "x" * 1_000_000}]}, 413),
        ({"model": name, "messages": []}, 400),
        ({"model": name, "messages": hi, "n": 3}, 400),
    ]
    which = number // 5 % (len(wrong) + 2)
    if which == len(wrong):
        kind = {"content-type": "application/json"}
        assert serving.client().post("/v1/chat/completions", content=b'{"model": ', headers=kind).status_code == 400
        return
    if which > len(wrong):
        stranger = openai.OpenAI(base_url=f"{serving.url}/v1", api_key="not-the-key-of-this-one", max_retries=0)
        with pytest.raises(openai.AuthenticationError):
            stranger.chat.completions.create(model=name, messages=hi)
        return
    asked, status = wrong[which]
    with pytest.raises(openai.APIStatusError) as caught:
        client.chat.completions.create(**asked)
    assert caught.value.status_code == status

"""The server's parts that need no model: stop strings, fields, events, addresses and keys."""

from __future__ import annotations

import asyncio
import json
import random
import socket

import pytest

from llama_ft.errors import UserError
from llama_ft.serve.fields import parse, read
from llama_ft.serve.limits import show_size
from llama_ft.serve.refusal import Refusal
from llama_ft.serve.stops import Cutter
from llama_ft.sizes import parse_size

pytest.importorskip("httpx2")

from llama_ft.serve.events import Piece, pieces
from llama_ft.serve.refusal import EngineFault
from llama_ft.serve.server import bound, check_key, is_loopback, serve

HI = [{"role": "user", "content": "Hi"}]


# Stop strings


def cut(parts: list[str], stops: list[str]) -> tuple[str, bool]:
    cutter = Cutter(stops)
    shown = "".join([*map(cutter.feed, parts), cutter.rest()])
    return shown, cutter.cut


def test_a_stop_cuts_wherever_the_pieces_break() -> None:
    """Against the definition: the text before the stop that is complete first."""
    dice = random.Random(4)
    found = 0
    for _ in range(3000):
        text = "".join(dice.choices("ab\n#", k=dice.randrange(24)))
        stops = ["".join(dice.choices("ab\n#", k=dice.randrange(1, 5))) for _ in range(dice.randrange(4))]
        borders = sorted(dice.choices(range(len(text) + 1), k=dice.randrange(6)))
        parts = [text[i:j] for i, j in zip([0, *borders], [*borders, len(text)], strict=True)]
        ends = [(text.find(stop) + len(stop), text.find(stop)) for stop in stops if stop in text]
        found += bool(ends)
        assert cut(parts, stops) == (text[: min(ends)[1]] if ends else text, bool(ends)), (parts, stops)
    assert 500 < found < 2900


def test_nothing_is_held_back_without_need() -> None:
    cutter = Cutter(["\nUser:"])
    assert cutter.feed("Hello\n") == "Hello"
    assert cutter.feed("You") == "\nYou"
    assert cutter.feed(" and\nUs") == " and"
    assert cutter.feed("er: more") == ""
    assert cutter.feed("and more") == cutter.rest() == ""


# Fields


def refused(text: str | bytes, chat: bool = True, passes: frozenset[str] = frozenset()) -> Refusal:
    with pytest.raises(Refusal) as caught:
        read(parse(text if isinstance(text, bytes) else text.encode()), chat=chat, passes=passes)
    return caught.value


def with_field(**more: object) -> str:
    return json.dumps({"model": "m", "messages": HI, **more})


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("", "the body is not JSON"),
        ('{"model": ', "the body is not JSON"),
        ("[]", "the body is not a JSON object"),
        ('{"temperature": NaN}', "NaN is no number of JSON"),
        ("[" * 100_000, "nested too deeply"),
        (b"\xff\xfe\xff", "the body is not JSON"),
        ('{"model": "\\ud800"}', "half of a character"),
        ('{"max_tokens": ' + "9" * 5000 + "}", "the body is not JSON"),
    ],
)
def test_what_is_no_json(text: str | bytes, said: str) -> None:
    refusal = refused(text)
    assert (refusal.status, refusal.code) == (400, "invalid_json")
    assert said in refusal.message


@pytest.mark.parametrize(
    ("field", "value", "said"),
    [
        ("max_token", 5, "there is no field 'max_token' here: did you mean 'max_tokens'?"),
        ("input", "x", "there is no field 'input' here"),
        ("generation_config", "{}", "there is no field 'generation_config' here"),
        ("n", 2, "n=2 is not served"),
        ("n", True, "n=true is not served"),
        ("logprobs", True, "logprobs=true is not served"),
        ("frequency_penalty", 0.5, "frequency_penalty=0.5 is not served"),
        ("response_format", {"type": "json_object"}, "response_format="),
        ("tool_choice", "required", "tool_choice can be auto or none"),
        ("temperature", 3, "temperature must be a number from 0 to 2"),
        ("temperature", True, "temperature must be a number"),
        ("temperature", "0", "temperature must be a number"),
        ("top_p", 0, "top_p must be a number above 0, to 1"),
        ("max_tokens", 0, "max_tokens must be at least 1"),
        ("max_tokens", 1.5, "max_tokens must be a whole number"),
        ("max_completion_tokens", -1, "max_completion_tokens must be at least 1"),
        ("seed", "x", "seed must be a whole number"),
        ("stream", "yes", "stream must be true or false"),
        ("stream", 1, "stream must be true or false"),
        ("stream_options", {"include_usag": True}, "stream_options has no 'include_usag'"),
        ("stop", ["a"] * 5, "stop must be a text, or a list of up to 4"),
        ("stop", "", "a stop must be a text of 1 to 256 characters"),
        ("stop", [1], "a stop must be a text of 1 to 256 characters"),
        ("messages", [], "messages must be a list of at least one message"),
        ("messages", "Hi", "messages must be a list"),
        ("messages", ["Hi"], "messages[0] must be an object"),
        ("messages", [{"role": "robot", "content": "Hi"}], "messages[0].role must be one of"),
        ("messages", [{"role": "user"}], "messages[0].content must be a text"),
        ("messages", [{"role": "user", "content": 5}], "messages[0].content must be a text"),
        ("messages", [*HI, {"role": "user", "content": [{"type": "image_url"}]}], "messages[1].content must be a text"),
        ("messages", [{"role": "user", "content": "Do", "input": "it"}], "messages[0] has the key 'input'"),
        ("messages", [{"role": "assistant", "tool_calls": [{"function": {}}]}], "messages[0].tool_calls must be"),
        ("messages", [{"role": "user", "content": "", "tool_calls": [{"function": {"name": "f"}}]}], "only an"),
        ("tools", [{"name": "f"}], "tools[0] must be"),
        ("model", None, "no model is named"),
        ("model", 5, "model must be the name of a model"),
    ],
)  # fmt: skip
def test_what_is_refused_by_name(field: str, value: object, said: str) -> None:
    refusal = refused(with_field(**{field: value}))
    assert refusal.status == 400
    assert said in refusal.message, refusal.message
    assert refusal.body()["error"]["type"] == "invalid_request_error"
    assert field.rstrip("s")[:5] in str(refusal.param)


def test_what_asks_for_nothing_else_is_taken() -> None:
    same = {"n": 1, "frequency_penalty": 0.0, "presence_penalty": 0, "logprobs": False, "logit_bias": {}, "user": "me"}
    same |= {
        "response_format": {"type": "text"},
        "metadata": {"a": "b"},
        "tools": [],
        "temperature": None,
        "store": False,
    }
    ask = read(parse(with_field(**same).encode()), chat=True, passes=frozenset())
    assert (ask.temperature, ask.tools, ask.passed, ask.stop) == (None, None, {}, [])
    assert read(
        parse(with_field(frequency_penalty=0.5).encode()), chat=True, passes=frozenset({"frequency_penalty"})
    ).passed == {"frequency_penalty": 0.5}


def test_messages_become_what_templates_know() -> None:
    call = {"id": "c1", "type": "function", "function": {"name": "f", "arguments": '{"a": [1, "ü"]}'}}
    turns = [
        {"role": "developer", "content": "Be brief."},
        {"role": "user", "content": [{"type": "text", "text": "One"}, {"type": "text", "text": "two"}]},
        {"role": "assistant", "content": None, "tool_calls": [call], "refusal": None},
        {"role": "tool", "tool_call_id": "c1", "content": "4"},
    ]
    messages = read({"model": "m", "messages": turns}, chat=True, passes=frozenset()).messages
    assert messages == [
        {"role": "system", "content": "Be brief."},
        {"role": "user", "content": "One\ntwo"},
        {
            "role": "assistant",
            "content": "",
            "tool_calls": [{"id": "c1", "type": "function", "function": {"name": "f", "arguments": {"a": [1, "ü"]}}}],
        },
        {"role": "tool", "content": "4", "tool_call_id": "c1"},
    ]


def test_a_prompt_is_one_text() -> None:
    assert read({"model": "m", "prompt": ["a"]}, chat=False, passes=frozenset()).prompt == "a"
    for prompt in ("", ["a", "b"], [1, 2], None):
        assert refused(json.dumps({"model": "m", "prompt": prompt}), chat=False).param == "prompt"
    assert "there is no field 'messages' here" in refused(with_field(prompt="a"), chat=False).message


# Events


def read_events(*chunks: bytes) -> list[Piece]:
    async def come():
        for chunk in chunks:
            yield chunk

    async def run() -> list[Piece]:
        return [piece async for piece in pieces(come())]

    return asyncio.run(run())


def test_events_may_break_anywhere_and_hold_any_character() -> None:
    """U+2028 and U+0085 are no ends of a line here, though str.splitlines takes them for some."""
    text = "a\u2028b\u0085c 🦙"
    data = (
        b": ping\r\n\r\ndata: " + json.dumps({"choices": [{"delta": {"content": text}}]}, ensure_ascii=False).encode()
    )
    data += b'\n\ndata: {"choices":[{"delta":{},"finish_reason":"stop"}],"usage":{"completion_tokens":3}}'
    data += b"\n\ndata: [DONE]\n\n"
    wanted = [Piece(text), Piece("", "stop", 3)]
    assert read_events(data) == wanted
    for size in (1, 2, 7):
        assert read_events(*(data[i : i + size] for i in range(0, len(data), size))) == wanted


@pytest.mark.parametrize("data", [b'{"error": "a "quoted" word"}', b'{"error": {"message": "no"}}', b"[1]", b"oops"])
def test_an_engine_that_fails_in_its_stream(data: bytes) -> None:
    with pytest.raises(EngineFault, match="the engine failed"):
        read_events(b"data: " + data + b"\n\n")


# Addresses, keys, sizes


def test_who_may_be_served() -> None:
    assert all(map(is_loopback, ("127.0.0.1", "127.8.8.8", "::1", "[::1]", "localhost")))
    assert not any(map(is_loopback, ("0.0.0.0", "::", "192.168.0.4", "example.org", "localhost.example.org", "")))
    check_key("127.0.0.1", None)
    check_key("0.0.0.0", "k" * 16)
    with pytest.raises(UserError, match="others could use this server: that takes an API key"):
        check_key("0.0.0.0", None)
    for key in ("", "short", "with a space in the middle", "schlüssel-schlüssel"):
        with pytest.raises(UserError, match="at least 16 characters"):
            check_key("127.0.0.1", key)


def test_a_port_in_use() -> None:
    pytest.importorskip("uvicorn")
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        with pytest.raises(UserError, match=f"127.0.0.1 port {port} cannot be used: Address already in use.*--port 0"):
            serve(["nobody"], port=port)
    with pytest.raises(UserError, match="no address of this machine"):
        bound("no.such.host.invalid", 80)
    with pytest.raises(UserError, match="cannot be used"):
        bound("192.0.2.1", 80)  # TEST-NET-1: nobody's


def test_sizes() -> None:
    sizes = {"1MB": 10**6, "512 KiB": 2**19, "1000000": 10**6, "1.5 MB": 1_500_000}
    assert {size: parse_size(size, "--max-body") for size in sizes} == sizes
    assert [show_size(size) for size in (10**6, 1_500_000, 999, 2**20)] == ["1 MB", "1.5 MB", "999 bytes", "1.049 MB"]
    for size in ("", "0", "much", "-1MB", "1 Mangold"):
        with pytest.raises(UserError, match="is no size"):
            parse_size(size, "--max-body")

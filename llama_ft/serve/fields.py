"""The fields of a request: read strictly. What no engine does is refused by name, and nothing is ignored in silence."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

from llama_ft.errors import did_you_mean
from llama_ft.serve.limits import ANSWER_TOKENS
from llama_ft.serve.refusal import Refusal

Body = dict[str, Any]

SHARED = {"model", "stream", "stream_options", "max_tokens", "temperature", "top_p", "seed", "stop"}
CHAT = {*SHARED, "messages", "max_completion_tokens", "tools", "tool_choice"}
TEXT = {*SHARED, "prompt"}
NOTES = {"user", "metadata", "safety_identifier", "prompt_cache_key"}
"""Notes of the caller's to the operator: taken, and nothing is done with them."""

# Fields of the API that are taken where they ask for what is done anyway.
NEUTRAL: dict[str, tuple[Any, ...]] = {
    "n": (1,), "best_of": (1,), "echo": (False,), "suffix": ("",), "logprobs": (False,), "top_logprobs": (0,),
    "frequency_penalty": (0,), "presence_penalty": (0,), "logit_bias": ({},), "response_format": ({"type": "text"},),
    "parallel_tool_calls": (True,), "service_tier": ("auto", "default"), "store": (False,), "modalities": (["text"],),
}  # fmt: skip
MESSAGE = {"role", "content", "tool_calls", "tool_call_id", "name"}
ROLES = ("system", "user", "assistant", "tool", "developer")
MAX_STOPS, MAX_STOP = 4, 256


@dataclass(frozen=True)
class Ask:
    """A request as understood. `prompt` is None for a chat. `max_tokens`: None where none was named.

    temperature, top_p: None leaves it to the model's generation_config.json. `passed`: fields that this engine takes
    as they are.
    """

    model: str
    messages: list[Body] = field(default_factory=list)
    prompt: str | None = None
    tools: list[Body] | None = None
    stream: bool = False
    usage: bool = False
    max_tokens: int | None = None
    temperature: float | None = None
    top_p: float | None = None
    seed: int | None = None
    stop: list[str] = field(default_factory=list)
    passed: Body = field(default_factory=dict)

    def room(self, prompt: int, context: int) -> int:
        """Tokens that the answer may have. Refusal where the prompt fills the model already."""
        if prompt >= context:
            what = f"the request is {prompt} tokens long, the model holds {context}"
            param = "messages" if self.prompt is None else "prompt"
            raise Refusal(400, what, param=param, code="context_length_exceeded")
        return min(self.max_tokens or ANSWER_TOKENS, context - prompt)


def parse(text: bytes) -> Body:
    """The JSON object of a body. Refusal for anything else."""
    try:
        body = json.loads(text, parse_constant=_no_number)
        json.dumps(body, ensure_ascii=False).encode("utf-8")  # half a character can be written in JSON, and not read
    except UnicodeEncodeError as error:
        raise Refusal(400, "the body holds half of a character (a lone surrogate)", code="invalid_json") from error
    except (ValueError, RecursionError) as error:
        what = "nested too deeply" if isinstance(error, RecursionError) else str(error)
        raise Refusal(400, f"the body is not JSON: {what}", code="invalid_json") from error
    if not isinstance(body, dict):
        raise Refusal(400, "the body is not a JSON object", code="invalid_json")
    return body


def _no_number(name: str) -> Any:
    raise ValueError(f"{name} is no number of JSON")


def read(body: Body, *, chat: bool, passes: frozenset[str]) -> Ask:
    """A request of /v1/chat/completions or /v1/completions. `passes`: fields that the engine takes as they are."""
    body = {key: value for key, value in body.items() if value is not None}
    model = _typed(body, "model", str, "the name of a model")
    if model is None:
        raise Refusal(400, "no model is named", param="model", code="missing_field")
    _check_names(body, (CHAT if chat else TEXT) | passes)
    tools = _tools(body) if chat else None
    limit = _whole(body, "max_completion_tokens", 1) if chat else None
    return Ask(
        model=model,
        messages=_messages(body) if chat else [],
        prompt=None if chat else _prompt(body),
        tools=tools,
        stream=bool(_typed(body, "stream", bool, "true or false")),
        usage=_usage(body),
        max_tokens=limit if limit is not None else _whole(body, "max_tokens", 1),
        temperature=_number(body, "temperature", lambda value: 0 <= value <= 2, "from 0 to 2"),
        top_p=_number(body, "top_p", lambda value: 0 < value <= 1, "above 0, to 1"),
        seed=_seed(body),
        stop=_stop(body),
        passed={key: body[key] for key in sorted(passes & body.keys())},
    )


def _check_names(body: Body, known: set[str] | frozenset[str]) -> None:
    for key, value in body.items():
        if key in known or key in NOTES:
            continue
        if key in NEUTRAL:
            if any(value == one and isinstance(value, bool) == isinstance(one, bool) for one in NEUTRAL[key]):
                continue
            raise Refusal(400, f"{key}={json.dumps(value)[:60]} is not served", param=key, code="unsupported_value")
        hint = did_you_mean(key, known, kind="fields")
        raise Refusal(400, f"there is no field '{key}' here: {hint}", param=key, code="unknown_field")


def _typed(body: Body, key: str, kind: type, wanted: str) -> Any:
    value = body.get(key)
    if value is not None and (not isinstance(value, kind) or (kind is not bool and isinstance(value, bool))):
        raise Refusal(400, f"{key} must be {wanted}", param=key, code="invalid_type")
    return value


def _whole(body: Body, key: str, least: int) -> int | None:
    value = _typed(body, key, int, "a whole number")
    if value is not None and value < least:
        raise Refusal(400, f"{key} must be at least {least}", param=key, code="invalid_value")
    return value


def _number(body: Body, key: str, fits: Callable[[float], bool], wanted: str) -> float | None:
    value = body.get(key)
    if value is None:
        return None
    if isinstance(value, bool) or not isinstance(value, int | float) or not fits(value):
        raise Refusal(400, f"{key} must be a number {wanted}", param=key, code="invalid_value")
    return float(value)


def _seed(body: Body) -> int | None:
    seed = _typed(body, "seed", int, "a whole number")
    return None if seed is None else seed % 2**63  # what torch and the others take


def _stop(body: Body) -> list[str]:
    stop = body.get("stop", [])
    stops = [stop] if isinstance(stop, str) else stop
    if not isinstance(stops, list) or len(stops) > MAX_STOPS:
        raise Refusal(400, f"stop must be a text, or a list of up to {MAX_STOPS}", param="stop", code="invalid_value")
    if not all(isinstance(one, str) and 0 < len(one) <= MAX_STOP for one in stops):
        what = f"a stop must be a text of 1 to {MAX_STOP} characters"
        raise Refusal(400, what, param="stop", code="invalid_value")
    return stops


def _usage(body: Body) -> bool:
    options = _typed(body, "stream_options", dict, "an object") or {}
    unknown = options.keys() - {"include_usage", "include_obfuscation"}
    if unknown:
        raise Refusal(400, f"stream_options has no '{min(unknown)}'", param="stream_options", code="unknown_field")
    return bool(options.get("include_usage"))


def _prompt(body: Body) -> str:
    prompt = body.get("prompt")
    if isinstance(prompt, list) and len(prompt) == 1:
        prompt = prompt[0]
    if not isinstance(prompt, str) or not prompt:
        raise Refusal(400, "prompt must be one text", param="prompt", code="invalid_type")
    return prompt


def _tools(body: Body) -> list[Body] | None:
    tools = _typed(body, "tools", list, "a list of tools") or None
    choice = body.get("tool_choice", "auto")
    if choice not in ("auto", "none"):
        what = "tool_choice can be auto or none: no engine here holds a model to a call"
        raise Refusal(400, what, param="tool_choice", code="unsupported_value")
    for i, tool in enumerate(tools or []):
        function = tool.get("function") if isinstance(tool, dict) else None
        if not isinstance(function, dict) or not isinstance(function.get("name"), str):
            what = f'tools[{i}] must be {{"type": "function", "function": {{"name": …}}}}'
            raise Refusal(400, what, param="tools", code="invalid_type")
    return None if choice == "none" else tools


def _messages(body: Body) -> list[Body]:
    messages = body.get("messages")
    if not isinstance(messages, list) or not messages:
        raise Refusal(400, "messages must be a list of at least one message", param="messages", code="invalid_type")
    return [_message(message, f"messages[{i}]") for i, message in enumerate(messages)]


def _message(message: Any, place: str) -> Body:
    """A message as the templates know it: content one text, `arguments` of a call an object."""
    if not isinstance(message, dict):
        raise Refusal(400, f"{place} must be an object", param=place, code="invalid_type")
    message = {key: value for key, value in message.items() if value is not None}
    unknown = message.keys() - MESSAGE
    if unknown:
        what = f"{place} has the key '{min(unknown)}', which the engines do not pass on to the template"
        raise Refusal(400, what, param=place, code="unknown_field")
    role = message.get("role")
    if role not in ROLES:
        raise Refusal(400, f"{place}.role must be one of {', '.join(ROLES)}", param=f"{place}.role")
    calls = _calls(message, place)
    if calls and role != "assistant":
        raise Refusal(400, f"{place}: only an assistant calls tools", param=place, code="invalid_value")
    kept = {key: message[key] for key in ("tool_call_id", "name") if isinstance(message.get(key), str)}
    read_as = {"role": "system" if role == "developer" else role, "content": _content(message, place, bool(calls))}
    return {**read_as, **({"tool_calls": calls} if calls else {}), **kept}


def _content(message: Body, place: str, optional: bool) -> str:
    content = message.get("content", "" if optional else None)
    if isinstance(content, list):
        parts = [
            part.get("text") if isinstance(part, dict) and part.get("type") == "text" else None for part in content
        ]
        content = "\n".join(parts) if all(isinstance(part, str) for part in parts) else None  # type: ignore[arg-type]
    if not isinstance(content, str):
        what = f"{place}.content must be a text, or a list of parts of type text"
        raise Refusal(400, what, param=f"{place}.content", code="invalid_type")
    return content


def _calls(message: Body, place: str) -> list[Body]:
    calls = message.get("tool_calls") or []
    wanted = f'{place}.tool_calls must be a list of {{"type": "function", "function": {{"name", "arguments"}}}}'
    bad = Refusal(400, wanted, param=f"{place}.tool_calls", code="invalid_type")
    if not isinstance(calls, list):
        raise bad
    found = []
    for one in calls:
        function = one.get("function") if isinstance(one, dict) else None
        if not isinstance(function, dict) or not isinstance(function.get("name"), str):
            raise bad
        arguments = function.get("arguments") or "{}"
        try:
            arguments = json.loads(arguments) if isinstance(arguments, str) else arguments
        except (ValueError, RecursionError) as error:
            raise bad from error
        if not isinstance(arguments, dict):
            raise bad
        made: Body = {"type": "function", "function": {"name": function["name"], "arguments": arguments}}
        found.append({**({"id": one["id"]} if isinstance(one.get("id"), str) else {}), **made})
    return found

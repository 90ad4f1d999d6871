"""A judge behind an OpenAI-compatible endpoint: one fixed version of it, asked at temperature 0, many at once."""

from __future__ import annotations

import asyncio
import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from importlib.util import find_spec
from typing import Any

from llama_ft.errors import MachineFault, UserError, did_you_mean

MAX_TOKENS = 2048
"""Of a verdict, as FastChat's judges have it."""
AT_ONCE = 8
"""Requests under way at the same time."""
TRIES, SECONDS = 8, 300.0
"""Of a request, waits between them doubling (the client's own); and of the clock for each."""
SPOKEN: tuple[dict[str, Any], ...] = (
    {"temperature": 0, "max_tokens": MAX_TOKENS},
    {"temperature": 0, "max_completion_tokens": MAX_TOKENS},
    {"max_completion_tokens": MAX_TOKENS},
)
"""What a request says beside its messages, the first of these that the endpoint takes: newer models refuse
`max_tokens`, and those that reason refuse a temperature."""


@dataclass(frozen=True)
class Reply:
    """A verdict's text, and the words of the endpoint that refused to give one."""

    text: str
    refused: str | None = None


class Endpoint:
    """An open judge. `version`: what the endpoint calls the model that answers, which must stay the same."""

    def __init__(self, key: str, url: str, model: str, version: str, spoken: dict[str, Any]):
        self.key, self.url, self.model, self.version, self.spoken = key, url, model, version, spoken

    @classmethod
    def open(cls, model: str, url: str | None) -> Endpoint:
        """Asks for one word, so that a wrong key, name or address is known before anything else is done.

        url: up to `/v1`; None: OPENAI_BASE_URL, or OpenAI's own. The key is OPENAI_API_KEY's; an endpoint of one's own
        may need none. UserError where the endpoint cannot be reached or does not take the key, or the name.
        """
        if find_spec("openai") is None:
            raise UserError("a judge behind an endpoint needs the package openai", hint="pip install 'llama-ft[eval]'")
        import openai

        key = os.environ.get("OPENAI_API_KEY")
        url = url or os.environ.get("OPENAI_BASE_URL")
        if not key and url is None:
            hint = "set OPENAI_API_KEY, name an endpoint of your own with --judge-url, or the folder of a reward model"
            raise UserError(f"no key to ask the judge '{model}' with", key="--judge", hint=hint)
        quick = openai.OpenAI(api_key=key or "none", base_url=url, max_retries=1, timeout=60.0)
        where = str(quick.base_url).rstrip("/")
        refusal = ""
        for spoken in SPOKEN:
            try:
                said = quick.chat.completions.create(model=model, messages=_GREETING, **spoken)
            except openai.BadRequestError as error:
                refusal = error.message
            except openai.AuthenticationError as error:
                raise UserError(f"{where} does not take the key", key="OPENAI_API_KEY", hint=error.message) from error
            except openai.NotFoundError as error:
                what = f"{where} has no model '{model}': {error.message}"
                raise UserError(what, key="--judge", hint=_nearest(quick, model)) from error
            except openai.APIConnectionError as error:
                hint = "is it running, and does the address end with /v1?"
                raise UserError(f"no judge answers at {where}", key="--judge-url", hint=hint) from error
            except openai.APIError as error:
                raise MachineFault(f"the judge at {where} cannot judge: {error.message}") from error
            else:
                return cls(key or "none", where, model, str(said.model), spoken)
        raise UserError(f"{where} takes no request to '{model}': {refusal}", key="--judge")

    def ask(self, requests: Sequence[list[dict[str, str]]], came: Callable[[int], None]) -> list[Reply]:
        """The judge's words to each request (messages), in order; `came` is told the number of each when it is there.

        MachineFault when it stops answering; UserError when another version of it answers than at first.
        """
        return asyncio.run(self._all(requests, came))

    async def _all(self, requests: Sequence[list[dict[str, str]]], came: Callable[[int], None]) -> list[Reply]:
        import openai

        room = asyncio.Semaphore(AT_ONCE)
        async with openai.AsyncOpenAI(
            api_key=self.key, base_url=self.url, max_retries=TRIES, timeout=SECONDS
        ) as client:

            async def one(number: int, messages: list[dict[str, str]]) -> Reply:
                async with room:
                    reply = await self._one(client, messages)
                came(number)
                return reply

            waiting = [asyncio.create_task(one(*each)) for each in enumerate(requests)]
            try:
                return list(await asyncio.gather(*waiting))
            finally:  # the first that fails, and Ctrl-C, end all of them at once
                for task in waiting:
                    task.cancel()

    async def _one(self, client: Any, messages: list[dict[str, str]]) -> Reply:
        import openai

        kept = "what is judged is kept, the same command goes on"
        try:
            said: Any = await client.chat.completions.create(model=self.model, messages=messages, **self.spoken)
        except openai.BadRequestError as error:  # of these words alone: too long for it, or kept out by a filter
            return Reply("", error.message)
        except openai.APIError as error:
            raise MachineFault(f"the judge stopped answering: {error.message}", hint=kept) from error
        if said.model != self.version:
            what = f"the judge is another one now: {said.model}, and it was {self.version}"
            raise UserError(what, key="--judge", hint="name a version that stays, with its date for example")
        words = said.choices[0].message.content if said.choices else None
        return Reply(words or "")


_GREETING: Any = [{"role": "user", "content": "Say: ready"}]


def _nearest(client: Any, model: str) -> str | None:
    """The nearest name that the endpoint has; None where it does not list them."""
    import openai

    try:
        return did_you_mean(model, [str(one.id) for one in client.models.list()], kind="models")
    except openai.OpenAIError:
        return None

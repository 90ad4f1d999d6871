"""What a model reads of a request: the ids that training would have made of it, or a refusal.

An engine renders and tokenises by itself. Its ids are those of training but for one thing: it takes a control string in
a user's words for the token itself. So every conversation is read twice before an engine sees it, as in training and
as the engine will; where the two differ it is refused, and nobody is answered to something else than they said.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from threading import Lock
from typing import Any

from transformers import LlamaConfig

from llama_ft.data.render import Renderer, TemplateRefusal
from llama_ft.data.template import Template
from llama_ft.llama.context import context_length
from llama_ft.serve.refusal import Refusal
from llama_ft.tokenizer.load import load_tokenizer

Messages = list[dict[str, Any]]


class Reader:
    """The words of one model: tokenizer, template, tokens it can hold, how it ends an answer.

    `stop`: ids that end an answer, as in `llama-ft chat`. `settings`: its generation_config.json.
    """

    def __init__(self, words: Path, config: Path, view: Callable[[Messages], Messages] = lambda messages: messages):
        """words: folder of the tokenizer; config: folder of config.json; view: what the engine's template is given."""
        self.tokenizer = load_tokenizer(words)
        self.renderer = None
        if self.tokenizer.chat_template:
            self.renderer = Renderer(Template.load("base", self.tokenizer), self.tokenizer)
        self.context = context_length(LlamaConfig.from_pretrained(config))
        stated = words / "generation_config.json"
        self.settings: dict[str, Any] = json.loads(stated.read_text(encoding="utf-8")) if stated.is_file() else {}
        self.stop = self._stop()
        self._view = view
        self._lock = Lock()  # asked from several threads; a renderer is one thread's at a time

    def _stop(self) -> list[int]:
        ends = self.settings.get("eos_token_id")
        own = self.renderer.end_token_id if self.renderer is not None else None
        found = [own, self.tokenizer.eos_token_id, *(ends if isinstance(ends, list) else [ends])]
        return list(dict.fromkeys(token for token in found if token is not None))

    def chat(self, messages: Messages, tools: list[dict[str, Any]] | None) -> list[int]:
        """Ids of a conversation that the model is to continue, the same in training and at the engine.

        Raises Refusal when the template does not take it, or the engine would read something else.
        """
        if self.renderer is None:
            hint = "use /v1/completions, or tune it first: a run's template travels with it"
            raise Refusal(400, f"this model has no chat template: {hint}", param="model", code="no_chat_template")
        with self._lock:
            try:
                wanted = self.renderer.prompt_ids([dict(message) for message in messages], tools)  # type: ignore[misc]
                engine = self._as_engine(messages, tools)
            except TemplateRefusal as refusal:
                raise Refusal(400, str(refusal), param="messages", code="template_refused") from refusal
            except RecursionError as error:
                raise Refusal(400, "the request is nested too deeply", param="messages") from error
        if wanted != engine:
            raise self._unfaithful(messages, tools)
        return wanted

    def _as_engine(self, messages: Messages, tools: list[dict[str, Any]] | None) -> list[int]:
        tokenizer: Any = self.tokenizer
        encoded = tokenizer.apply_chat_template(
            self._view(messages), tools=tools, add_generation_prompt=True, tokenize=True, return_dict=True
        )
        return encoded["input_ids"]

    def _unfaithful(self, messages: Messages, tools: list[dict[str, Any]] | None) -> Refusal:
        assert self.renderer is not None
        for i, message in enumerate(messages):
            said = json.dumps(message, ensure_ascii=False)
            for token in self.renderer.control:
                if token in said:
                    what = f"messages[{i}] holds '{token}', which the engine would take for a control token"
                    return Refusal(400, what, param="messages", code="control_string")
            if message.get("tool_calls") and message["content"]:
                what = f"messages[{i}] has tool_calls and content, and the engine would drop the content"
                return Refusal(400, what, param="messages", code="template_mismatch")
        what = "the engine would read other tokens than in training" + (" (look at the tools)" if tools else "")
        return Refusal(400, what, param="messages", code="template_mismatch")

    def text(self, prompt: str) -> list[int]:
        """Ids of a bare text, as the engines tokenise it: with BOS where the tokenizer writes one."""
        with self._lock:
            return self.tokenizer(prompt)["input_ids"]

    def count(self, said: str) -> int:
        """Tokens of an answer, or of a part of one."""
        with self._lock:
            return len(self.tokenizer(said, add_special_tokens=False)["input_ids"])

"""A subject as lm-evaluation-harness asks a model: likelihoods of endings, of whole texts, and text up to a stop.

Encoding, truncation, windows, and how an answer is cut are the harness's own rules for causal models
(lm_eval/models/huggingface.py of 0.4.13), so that scores are those of `lm_eval --model hf` in the same number type.
"""

from __future__ import annotations

import hashlib
import json
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from itertools import accumulate, groupby
from typing import Any

from jinja2 import TemplateError
from lm_eval.api.model import TemplateLM
from lm_eval.models.utils import handle_stop_sequences, normalize_gen_kwargs, postprocess_generated_text
from lm_eval.utils import get_rolling_token_windows, make_disjoint_window

from llama_ft.data.render import MASKED
from llama_ft.errors import UserError
from llama_ft.evaluate.subject import Subject

MAX_TOKENS = 256
"""Of an answer, where a task says no number: the harness's default."""
AT_ONCE = 64
"""Requests after which their answers are kept; prompts whose answers are drawn side by side."""
DRAWN_BY = {"until", "max_gen_toks", "do_sample", "temperature", "top_p"}
"""Settings of an answer that are followed here."""
NEUTRAL = {
    "num_beams": 1,
    "num_return_sequences": 1,
    "repetition_penalty": 1.0,
    "length_penalty": 1.0,
    "use_cache": True,
}
"""Values of others that ask for nothing."""
OF_DRAWS = {"top_k", "min_p", "typical_p"}
"""Settings that say nothing about greedy answers."""
Values = Callable[[Sequence[Any], Callable[[int], None]], list[Any]]
"""Answers some requests' contents, in their order; told how many more are done."""


@dataclass(frozen=True)
class Request:
    """What is asked: `id` is the same for the same question, `content` what the model needs for an answer."""

    id: str
    content: Any


Keep = Callable[[Sequence[Request], Callable[[Sequence[Request], Callable[[int], None]], list[dict[str, Any]]]], Any]
"""Answers requests by a function that answers some, unless their rows ({"id", "value"}) are known: Context.items."""


def _at_once(requests: Sequence[Request], work: Any) -> list[dict[str, Any]]:
    return work(requests, lambda more: None)


class SubjectLM(TemplateLM):
    """`keep` holds the answers of an earlier call, and keeps those of this one; `seed` is that of drawn answers."""

    def __init__(self, subject: Subject, keep: Keep = _at_once, seed: int = 0):
        super().__init__()
        self.subject, self.keep, self.seed = subject, keep, seed
        self.tokenizer: Any = subject.tokenizer

    @property
    def eot_token_id(self) -> int:
        """The token that ends a text."""
        return int(self.tokenizer.eos_token_id)

    @property
    def prefix_token_id(self) -> int:
        """What stands before a text without a context."""
        bos = self.tokenizer.bos_token_id
        return self.eot_token_id if bos is None else int(bos)

    @property
    def tokenizer_name(self) -> str:
        """For the harness's cache of requests, which is not used."""
        return self.subject.name

    def apply_chat_template(self, chat_history: list[dict[str, str]], add_generation_prompt: bool = True) -> str:
        """A conversation in the subject's template, as text; without its system turn where the template refuses that,
        as in the harness. UserError where it refuses all the same."""
        for turns in (chat_history, [turn for turn in chat_history if turn["role"] != "system"]):
            try:
                return self.tokenizer.apply_chat_template(
                    turns,
                    chat_template=self.subject.renderer.template.source,
                    tokenize=False,
                    add_generation_prompt=add_generation_prompt,
                    continue_final_message=not add_generation_prompt,
                )
            except TemplateError as error:
                reason = str(error)
        what = f"the template '{self.subject.renderer.template.name}' does not take a request of the task: {reason}"
        raise UserError(what, key="--apply-chat-template", hint="leave it out")

    def tok_encode(self, string: str, add_special_tokens: bool | None = None, **_: Any) -> list[int]:
        """Ids of a text, with what its tokenizer puts before texts unless it stands there already."""
        if add_special_tokens is None:
            add_special_tokens = not string.startswith(str(self.tokenizer.decode([self.prefix_token_id])))
        return [int(token) for token in self.tokenizer(string, add_special_tokens=add_special_tokens)["input_ids"]]

    def _loglikelihood_tokens(
        self, requests: Sequence[tuple[Any, list[int], list[int]]], **_: Any
    ) -> list[tuple[float, bool]]:
        """(log p(ending | context) in nats, whether the ending is what the model would say) of each."""

        def values(pairs: Sequence[tuple[list[int], list[int]]], tick: Callable[[int], None]) -> list[Any]:
            documents = []
            for context, ending in pairs:
                ids = [*context, *ending][-self.subject.context :]
                kept = min(len(ending), len(ids) - 1)
                documents.append((ids, [MASKED] * (len(ids) - kept) + ids[len(ids) - kept :]))
            return [(-cost.nats, cost.hits == cost.tokens) for cost in self.subject.costs(documents, tick)]

        asked = [("likelihood", (list(context), list(ending))) for _, context, ending in requests]
        return [(float(nats), bool(said)) for nats, said in self._answered(asked, values)]

    def loglikelihood_rolling(self, requests: Sequence[Any], disable_tqdm: bool = False) -> list[float]:
        """log p of whole texts in nats, in windows of the context."""
        parts: list[Any] = []
        counts = []
        for request in requests:
            [text] = request.args
            windows = get_rolling_token_windows(
                token_list=self.tok_encode(text),
                prefix_token=self.prefix_token_id,
                max_seq_len=self.subject.context - 1,  # a window is one token longer than its context
                context_len=1,
            )
            own = [(None, *make_disjoint_window(window)) for window in windows]
            parts += own
            counts.append(len(own))
        nats = [one for one, _ in self._loglikelihood_tokens(parts)]
        return [sum(nats[end - count : end]) for count, end in zip(counts, accumulate(counts), strict=True)]

    def generate_until(self, requests: Sequence[Any], disable_tqdm: bool = False) -> list[str]:
        """What follows each text, up to the first of its `until` strings or the end token. UserError for settings that
        are not followed here, or that leave no room for a prompt."""
        asked: list[tuple[str, dict[str, Any], int]] = []
        times: Counter[str] = Counter()
        for request in requests:
            text, wanted = request.args
            settings = self._settings(wanted)
            key = _hash(text, settings)
            asked.append((text, settings, times[key]))
            times[key] += bool(settings["temperature"])  # repeats of a request are draws of their own
        lengths = {text: len(self.tok_encode(text)) for text, _, _ in asked}
        # Those of one kind together, and of like length: what is read side by side is filled up to the longest.
        order = sorted(range(len(asked)), key=lambda n: (_hash(asked[n][1]), lengths[asked[n][0]], n))
        found = self._answered([("answer", asked[number]) for number in order], self._drawn)
        return [str(text) for _, text in sorted(zip(order, found, strict=True))]

    def _settings(self, wanted: dict[str, Any]) -> dict[str, Any]:
        given: dict[str, Any] = dict(normalize_gen_kwargs(wanted, MAX_TOKENS))
        drawn = bool(given["do_sample"])
        others = {
            name: value
            for name, value in given.items()
            if name not in DRAWN_BY | (set() if drawn else OF_DRAWS) and NEUTRAL.get(name, object()) != value
        }
        if others:
            what = "the task draws answers with " + ", ".join(f"{name}={value}" for name, value in others.items())
            raise UserError(what, key="--tasks", hint=f"followed are {', '.join(sorted(DRAWN_BY))}")
        most = int(given["max_gen_toks"])
        if most >= self.subject.context:
            what = f"the task asks for answers of up to {most} tokens, {self.subject.name} reads {self.subject.context}"
            hint = "leave the task out, or a YAML file: include: TASK.yaml, generation_kwargs: {max_gen_toks: N}"
            raise UserError(what, key="--tasks", hint=hint)
        return {
            "until": handle_stop_sequences(given.get("until"), self.tokenizer.decode([self.eot_token_id])),
            "max_gen_toks": most,
            "temperature": float(given.get("temperature", 0.0)) if drawn else 0.0,
            "top_p": float(given.get("top_p", 1.0)) if drawn else 1.0,
        }

    def _drawn(self, asked: Sequence[tuple[str, dict[str, Any], int]], tick: Callable[[int], None]) -> list[Any]:
        """Answers to (text, settings, number of the draw): those of the same settings side by side."""
        found: list[str] = []
        for _, group in groupby(asked, key=lambda one: _hash(one[1])):
            texts, [settings, *_], draws = zip(*group, strict=True)
            most, stops = settings["max_gen_toks"], settings["until"]
            answers = self.subject.answers(
                [self.tok_encode(text)[most - self.subject.context :] for text in texts],
                most,
                [stop for stop in stops if stop],
                settings["temperature"],
                settings["top_p"],
                seed=int(_hash(self.seed, texts, draws)[:12], 16),  # blocks are the same in a call that goes on
                tick=tick,
            )
            for [answer] in answers:
                said = self.tokenizer.decode(answer.tokens, skip_special_tokens=True)
                found.append(postprocess_generated_text(said, stops, None))
        return found

    def _answered(self, asked: Iterable[tuple[str, Any]], values: Values) -> list[Any]:
        """The answer to each (kind, content); the same question is asked once."""
        requests = [Request(_hash(kind, content), content) for kind, content in asked]

        def work(block: Sequence[Request], tick: Callable[[int], None]) -> list[dict[str, Any]]:
            found = values([one.content for one in block], tick)
            return [{"id": one.id, "value": value} for one, value in zip(block, found, strict=True)]

        rows = {row["id"]: row["value"] for row in self.keep(list({one.id: one for one in requests}.values()), work)}
        return [rows[one.id] for one in requests]


def _hash(*parts: Any) -> str:
    return hashlib.sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest()

"""A subject as lm-evaluation-harness asks a model: likelihoods of endings, of whole texts, and text up to a stop.

Encoding, truncation and windows are the harness's own rules for causal models (lm_eval/models/huggingface.py of
0.4.13), so that scores are those of `lm_eval --model hf` in the same number type.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from lm_eval.api.model import TemplateLM
from lm_eval.utils import get_rolling_token_windows, make_disjoint_window

from llama_ft.data.render import MASKED
from llama_ft.evaluate.subject import Subject

MAX_TOKENS = 256
"""Of an answer, where a task says no number: the harness's default."""
AT_ONCE = 64
"""Documents or prompts after which progress is told."""


class SubjectLM(TemplateLM):
    """`tick` is told how many more requests are answered."""

    def __init__(self, subject: Subject, tick: Callable[[int], None] = lambda more: None):
        super().__init__()
        self.subject, self.tick = subject, tick
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

    def tok_encode(self, string: str, add_special_tokens: bool | None = None, **_: Any) -> list[int]:
        """Ids of a text, with what its tokenizer puts before texts unless it stands there already."""
        if add_special_tokens is None:
            add_special_tokens = not string.startswith(str(self.tokenizer.decode([self.prefix_token_id])))
        return [int(token) for token in self.tokenizer(string, add_special_tokens=add_special_tokens)["input_ids"]]

    def _loglikelihood_tokens(
        self, requests: Sequence[tuple[Any, list[int], list[int]]], **_: Any
    ) -> list[tuple[float, bool]]:
        """(log p(ending | context) in nats, whether the ending is what the model would say) of each."""
        documents = []
        for _asked, context, ending in requests:
            ids = [*context, *ending][-self.subject.context :]
            kept = min(len(ending), len(ids) - 1)
            documents.append((ids, [MASKED] * (len(ids) - kept) + ids[len(ids) - kept :]))
        found = []
        for start in range(0, len(documents), AT_ONCE):
            costs = self.subject.costs(documents[start : start + AT_ONCE])
            found += [(-cost.nats, cost.hits == cost.tokens) for cost in costs]
            self.tick(len(costs))
        return found

    def loglikelihood_rolling(self, requests: Sequence[Any], disable_tqdm: bool = False) -> list[float]:
        """log p of whole texts in nats, in windows of the context."""
        found = []
        for request in requests:
            [text] = request.args
            windows = get_rolling_token_windows(
                token_list=self.tok_encode(text),
                prefix_token=self.prefix_token_id,
                max_seq_len=self.subject.context - 1,  # a window is one token longer than its context
                context_len=1,
            )
            parts = [(None, *make_disjoint_window(window)) for window in windows]
            found.append(sum(nats for nats, _ in self._loglikelihood_tokens(parts)))
        return found

    def generate_until(self, requests: Sequence[Any], disable_tqdm: bool = False) -> list[str]:
        """What follows each text, up to the first of its `until` strings."""
        found: list[str] = []
        groups: list[tuple[dict[str, Any], list[str]]] = []
        for request in requests:
            text, settings = request.args
            if not groups or groups[-1][0] != settings or len(groups[-1][1]) == AT_ONCE:
                groups.append((settings, []))
            groups[-1][1].append(text)
        for number, (settings, texts) in enumerate(groups):
            stops = settings.get("until") or []
            stops = [stops] if isinstance(stops, str) else [stop for stop in stops if stop]
            most = int(settings.get("max_gen_toks", MAX_TOKENS))
            drawn = bool(settings.get("do_sample", False))
            temperature = float(settings.get("temperature", 1.0)) if drawn else 0.0
            room = max(1, self.subject.context - most)
            prompts = [self.tok_encode(text)[-room:] for text in texts]
            top_p = float(settings.get("top_p", 1.0))
            answers = self.subject.answers(prompts, most, stops, temperature, top_p, seed=number)
            found += [answer.text for [answer] in answers]
            self.tick(len(texts))
        return found

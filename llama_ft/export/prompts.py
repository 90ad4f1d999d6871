"""What a run's export is asked: held-out documents, and conversations in the run's own template.

Of a pair the better answer is the document; a prompt that has no answer of its own is asked whole.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from transformers import PreTrainedTokenizerFast

from llama_ft.data.examples import Conversation
from llama_ft.data.prepare import Prepared
from llama_ft.data.render import Renderer, TemplateRefusal
from llama_ft.export.proof import LONGEST, PROMPTS, Document, choose_documents

_LAST = 64  # training documents to choose from where nothing is held out


@dataclass(frozen=True)
class Prompt:
    """Ids to be continued. `turns` are the messages they came from, where re-rendering must give the same ids."""

    ids: list[int]
    turns: Conversation | None


def choose_prompts(prepared: Prepared) -> tuple[list[Document], list[Prompt]]:
    """Documents to compare logits on and prompts to answer: held-out ones, or the last of training if none are."""
    if prepared.eval is not None and len(prepared.eval) > 0:
        documents = choose_documents(prepared.eval)
        return documents, _from_conversations(prepared) or _from_documents(documents)
    count = len(prepared.train)
    documents = choose_documents(prepared.train.select(range(max(0, count - _LAST), count)))
    return documents, _from_documents(documents)


def whole_conversations(prepared: Prepared) -> list[Prompt]:
    """Held-out conversations with their answers, as training read them; of a pair, the better answer."""
    return _rendered(prepared, [turns for turns in prepared.eval_conversations if turns])


def _from_conversations(prepared: Prepared) -> list[Prompt]:
    spoken = [turns for turns in prepared.eval_conversations if turns]
    asked = [turns if _to_be_answered(turns) else turns[:-1] for turns in spoken]
    return _rendered(prepared, [turns for turns in asked if turns])


def _rendered(prepared: Prepared, conversations: list[Conversation]) -> list[Prompt]:
    """PROMPTS of the conversations, spread over all; those that end with a question are to be answered."""
    renderer = Renderer(prepared.template, prepared.tokenizer)
    found: list[Prompt] = []
    for turns in conversations[:: max(1, len(conversations) // PROMPTS)]:
        try:
            rendered = renderer.render(turns, add_generation_prompt=_to_be_answered(turns))
        except TemplateRefusal:
            continue
        ids = [int(token) for token in renderer.encode([rendered])[0].ids]
        # Text that spells a control token stays text here; a plain tokenizer reads it as the token.
        found.append(Prompt(ids, turns if rendered.sealed is None else None))
        if len(found) == PROMPTS:
            break
    return found


def _to_be_answered(turns: Conversation) -> bool:
    return turns[-1]["role"] != "assistant"


def _from_documents(documents: list[Document]) -> list[Prompt]:
    """What stands before a document's first labelled token; all of it where nothing is labelled, a prompt without an
    answer; its first half where every token is.
    """
    found = []
    for document in documents[:PROMPTS]:
        first = next((i for i, label in enumerate(document.labels) if label >= 0), len(document.ids))
        cut = first or max(1, min(len(document.ids), LONGEST) // 2)
        found.append(Prompt(document.ids[:cut], None))
    return found


def template_faults(prompts: list[Prompt], tokenizer: PreTrainedTokenizerFast) -> list[str]:
    """Where the exported tokenizer's `apply_chat_template` gives other ids than training; empty = nowhere."""
    faults = []
    for number, prompt in enumerate(prompts, 1):
        if prompt.turns is None:
            continue
        messages: Any = prompt.turns
        open_end = _to_be_answered(prompt.turns)
        ids = tokenizer.apply_chat_template(messages, add_generation_prompt=open_end, tokenize=True, return_dict=False)
        if ids != prompt.ids:
            pairs = enumerate(zip(ids, prompt.ids, strict=False))
            at = next((i for i, (left, right) in pairs if left != right), min(len(ids), len(prompt.ids)))
            faults.append(f"prompt {number}: the exported chat template differs from training at token {at}")
    return faults

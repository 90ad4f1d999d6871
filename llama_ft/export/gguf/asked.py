"""What every file is asked, and what the merged model said to it."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from transformers import LlamaForCausalLM, PreTrainedTokenizerFast

from llama_ft.data.examples import Conversation
from llama_ft.data.prepare import Prepared
from llama_ft.export.job import reopen
from llama_ft.export.prompts import Prompt, choose_prompts
from llama_ft.export.proof import Document, Seen, compare, compare_answers, observe, pick_device
from llama_ft.export.streamed import DOCUMENTS, LONGEST, merged_side, observe_streamed, too_large
from llama_ft.llama.checkpoints.shards import stored_tensors
from llama_ft.llama.load import quiet_transformers


@dataclass(frozen=True)
class Asked:
    """Documents and prompts, as the proof of merged/ has them, and what it said.

    `prompts` are answered; `streamed`: the model is larger than memory, is read from disk as it is asked, and answers
    none. `turns`: messages that a server would be sent, and their ids in training.
    """

    merged: Path
    tokenizer: PreTrainedTokenizerFast
    documents: list[Document]
    prompts: list[Prompt]
    seen: Seen
    turns: list[tuple[Conversation, list[int]]]
    streamed: bool = False

    @classmethod
    def of(
        cls,
        merged: Path,
        tokenizer: PreTrainedTokenizerFast,
        prepared: Prepared,
        *,
        low_memory: bool | None = None,
    ) -> Asked:
        """Asks the merged model in float32. tokenizer: its own. low_memory: `streamed`; None: where memory is short."""
        documents, prompts = choose_prompts(prepared)
        turns = _turns(prompts)
        streamed = too_large(stored_tensors(merged)) if low_memory is None else low_memory
        if streamed:
            documents = [Document(one.ids[:LONGEST], one.labels[:LONGEST]) for one in documents[:DOCUMENTS]]
            seen = observe_streamed(merged_side(merged), documents)
            return cls(merged, tokenizer, documents, [], seen, turns, True)
        with quiet_transformers():
            model, _ = reopen(merged, LlamaForCausalLM)
        seen = observe(model.to(pick_device(model)), documents, [prompt.ids for prompt in prompts])
        return cls(merged, tokenizer, documents, prompts, seen, turns)

    def compare(self, seen: Seen, *, side: str = "gguf") -> tuple[dict[str, Any], list[dict[str, Any]]]:
        """The measurements over all documents, and of each prompt whether the answer is the merged model's.

        side: what the other answer is called.
        """
        greedy = []
        for prompt, left, right in zip(self.prompts, self.seen.answers, seen.answers, strict=True):
            answers = {"merged": self.tokenizer.decode(left.ids), side: self.tokenizer.decode(right.ids)}
            greedy.append({"prompt": self.tokenizer.decode(prompt.ids), **answers, **compare_answers(left, right)})
        return compare(self.seen, seen, self.documents), greedy


def _turns(prompts: list[Prompt]) -> list[tuple[Conversation, list[int]]]:
    return [(prompt.turns, prompt.ids) for prompt in prompts if prompt.turns is not None]

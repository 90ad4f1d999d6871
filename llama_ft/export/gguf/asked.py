"""What every file is asked, and what the merged model said to it."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from transformers import LlamaForCausalLM, PreTrainedTokenizerFast

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
    none. `rendered`: texts that a server would build from messages, and their ids in training.
    """

    merged: Path
    tokenizer: PreTrainedTokenizerFast
    documents: list[Document]
    prompts: list[Prompt]
    seen: Seen
    rendered: list[tuple[str, list[int]]]
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
        rendered = _rendered(prompts, tokenizer)
        streamed = too_large(stored_tensors(merged)) if low_memory is None else low_memory
        if streamed:
            documents = [Document(one.ids[:LONGEST], one.labels[:LONGEST]) for one in documents[:DOCUMENTS]]
            seen = observe_streamed(merged_side(merged), documents)
            return cls(merged, tokenizer, documents, [], seen, rendered, True)
        with quiet_transformers():
            model, _ = reopen(merged, LlamaForCausalLM)
        seen = observe(model.to(pick_device(model)), documents, [prompt.ids for prompt in prompts])
        return cls(merged, tokenizer, documents, prompts, seen, rendered)

    def compare(self, seen: Seen, *, side: str = "gguf") -> tuple[dict[str, Any], list[dict[str, Any]]]:
        """The measurements over all documents, and of each prompt whether the answer is the merged model's.

        side: what the other answer is called.
        """
        greedy = []
        for prompt, left, right in zip(self.prompts, self.seen.answers, seen.answers, strict=True):
            answers = {"merged": self.tokenizer.decode(left.ids), side: self.tokenizer.decode(right.ids)}
            greedy.append({"prompt": self.tokenizer.decode(prompt.ids), **answers, **compare_answers(left, right)})
        return compare(self.seen, seen, self.documents), greedy


def _rendered(prompts: list[Prompt], tokenizer: Any) -> list[tuple[str, list[int]]]:
    found = []
    for prompt in prompts:
        if prompt.turns is not None:
            is_open = prompt.turns[-1]["role"] != "assistant"
            text = tokenizer.apply_chat_template(prompt.turns, add_generation_prompt=is_open, tokenize=False)
            found.append((text, prompt.ids))
    return found

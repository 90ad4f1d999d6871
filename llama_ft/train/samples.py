"""Answers to five held-out questions before, during and after training: what a person would notice of the run."""

from __future__ import annotations

import json
from typing import Any

import torch
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from llama_ft.adapters.quantised import unpacked
from llama_ft.data.examples import Conversation
from llama_ft.data.prepare import Prepared
from llama_ft.data.render import Renderer
from llama_ft.files import write_json
from llama_ft.recipe.run import Run

QUESTIONS = 5
MAX_NEW_TOKENS = 96
DURING_NEW_TOKENS = 64
"""At an evaluation, where training waits."""


class Samples:
    """eval/samples.json of a run: [{question, reference, before, during: {step: text}, after}], greedy answers.

    Empty without eval data.
    """

    def __init__(self, run: Run, prepared: Prepared):
        self.run, self.prepared = run, prepared
        conversations = prepared.eval_conversations if prepared.eval is not None else []
        stride = max(1, len(conversations) // QUESTIONS)
        answered = [turns for turns in conversations[::stride] if turns and turns[-1]["role"] == "assistant"]
        self.chosen = answered[:QUESTIONS]
        self.ended: list[bool] = []
        """Whether each of the last answers came to its end token; empty for a template without one."""

    def answer(self, model: Any, when: str | int) -> None:
        """Answers every question with the model as it is and writes the file; keeps what other moments wrote.

        when: `before`, `after`, or the step under way, of which each is answered once. Leaves the model's mode and all
        random states as they were.
        """
        if not self.chosen:
            return
        records = self._records()
        if isinstance(when, int) and all(str(when) in record.get("during", {}) for record in records):
            return
        answers = self._generate(model, DURING_NEW_TOKENS if isinstance(when, int) else MAX_NEW_TOKENS)
        for record, answer in zip(records, answers, strict=True):
            if isinstance(when, int):
                record.setdefault("during", {})[str(when)] = answer
            else:
                record[when] = answer
        write_json(self.run.samples_file, records)

    def lacks(self, when: str) -> bool:
        """Whether the file has no answers of a moment, `before` or `after`."""
        return any(when not in record for record in self._records())

    # Not inference mode: what is made in it, and kept by the model, could not be used in a backward pass.
    @torch.no_grad()
    def _generate(self, model: Any, new_tokens: int) -> list[str]:
        tokenizer = self.prepared.tokenizer
        renderer = Renderer(self.prepared.template, tokenizer)
        prompts = [renderer.prompt_ids(turns[:-1]) for turns in self.chosen]
        longest = max(map(len, prompts))
        # All at once, padded on the left: one pass over the weights per token serves every question.
        padding = [longest - len(prompt) for prompt in prompts]
        ids = [[tokenizer.pad_token_id] * pad + prompt for pad, prompt in zip(padding, prompts, strict=True)]
        mask = [[0] * pad + [1] * len(prompt) for pad, prompt in zip(padding, prompts, strict=True)]
        was_training = model.training
        model.eval()
        no_trace = torch.random.fork_rng(devices=[model.device] if model.device.type == "cuda" else [])
        with no_trace, unpacked(model, model.get_input_embeddings().weight.dtype):
            answers = model.generate(
                input_ids=torch.tensor(ids, device=model.device),
                attention_mask=torch.tensor(mask, device=model.device),
                max_new_tokens=new_tokens,
                do_sample=False,
                use_cache=True,
                eos_token_id=renderer.end_token_id,
                pad_token_id=tokenizer.pad_token_id,
            )
        model.train(was_training)
        end = renderer.end_token_id
        self.ended = [] if end is None else (answers[:, longest:] == end).any(-1).tolist()
        texts: Any = tokenizer.batch_decode(answers[:, longest:], skip_special_tokens=True)
        return [text.strip() for text in texts]

    def _records(self) -> list[dict[str, Any]]:
        try:
            written = json.loads(self.run.samples_file.read_text(encoding="utf-8"))
            if len(written) == len(self.chosen):
                return written
        except (OSError, ValueError):
            pass
        return self._new_records()

    def _new_records(self) -> list[dict[str, Any]]:
        """What is known of each question before it is asked."""
        return [{"question": question_of(turns), "reference": turns[-1]["content"]} for turns in self.chosen]


def question_of(turns: Conversation) -> str:
    """The last thing the user asked, with its input if the row has one."""
    asked = next(turn for turn in reversed(turns) if turn["role"] == "user")
    return "\n".join(filter(None, (asked["content"], asked.get("input"))))


class SampleAtEvaluations(TrainerCallback):
    """Answers the questions after each evaluation but the last step's, which the finished run answers at length.

    Only the main process has one; the others wait for it at their next exchange. Not for engines that shard weights:
    no process has them whole.
    """

    def __init__(self, samples: Samples):
        self.samples = samples

    def on_evaluate(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any):
        if 0 < state.global_step < state.max_steps:
            self.samples.answer(kwargs["model"], state.global_step)

"""What a model card says that depends on the objective: how to use the result, what its losses and settings are."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from llama_ft.recipe.objectives import COMPARED, PAIRS, POLICY, READS, unused_objective_keys, value_at
from llama_ft.recipe.schema import Recipe

_CHAT = """`merged/` is an ordinary LLaMA with its chat template; nothing of llama_ft is needed:

```python
from transformers import AutoModelForCausalLM, AutoTokenizer

model = AutoModelForCausalLM.from_pretrained("merged", dtype="auto")
tokenizer = AutoTokenizer.from_pretrained("merged")
messages = [{"role": "user", "content": "What is LoRA?"}]
inputs = tokenizer.apply_chat_template(messages, add_generation_prompt=True, return_tensors="pt", return_dict=True)
answer = model.generate(**inputs, max_new_tokens=256)
print(tokenizer.decode(answer[0, inputs["input_ids"].shape[1]:], skip_special_tokens=True))
```"""
_SCORE = """`merged/` is an ordinary `LlamaForSequenceClassification` of one label with its chat template; nothing of
llama_ft is needed. It scores a conversation that ends with an answer:

```python
import torch
from transformers import AutoModelForSequenceClassification, AutoTokenizer

model = AutoModelForSequenceClassification.from_pretrained("merged", dtype="auto")
tokenizer = AutoTokenizer.from_pretrained("merged")
messages = [
    {"role": "user", "content": "What is LoRA?"},
    {"role": "assistant", "content": "A way to tune a model by few weights."},
]
inputs = tokenizer.apply_chat_template(messages, return_tensors="pt", return_dict=True)
with torch.no_grad():
    print(model(**inputs).logits.item())
```

Higher is better. Only the difference of two answers to the same prompt means anything: where it is x, the first is
preferred with a probability of 1 / (1 + exp(−x))."""
_ADAPTER = """ The adapter alone opens with
`peft.AutoPeftModelForSequenceClassification.from_pretrained("adapter", num_labels=1)`; before a batch with padding, set
`model.config.pad_token_id` to the tokenizer's."""


def use(recipe: Recipe) -> str:
    """How the exported model is opened and asked."""
    template = f"The template is `{Path(recipe.template).name}`."
    if recipe.training.objective != "reward":
        return f"{_CHAT}\n\nOr in a terminal: `llama-ft chat runs/{recipe.name}`. {template}"
    adapter = _ADAPTER if recipe.adapter.method != "full" else ""
    named = f"A recipe that samples answers names it: `rewards: [{{model: runs/{recipe.name}}}]`."
    return f"{_SCORE}{adapter}\n\n{named} {template}"


def task(recipe: Recipe) -> str:
    """The hub's word for what the model does."""
    return "text-classification" if recipe.training.objective == "reward" else "text-generation"


def of_losses(recipe: Recipe) -> str:
    """What the numbers of the results are."""
    objective = recipe.training.objective
    if objective in PAIRS:
        return "Losses are the objective's own, per pair. Accuracy: the share of pairs whose better answer comes first."
    if objective == "kto":
        return "Losses are the objective's own, per judged answer."
    return "Losses are the objective's own, per answer." if objective in POLICY else "Nats per labelled token."


def of_buckets(buckets: Sequence[dict[str, Any]]) -> str:
    """What a reward model's accuracy is told apart by: eval/accuracy.json."""
    rated = any(one.get("by") == "rating" for one in buckets)
    by = "how much better the better answer was rated" if rated else "the model's own margin"
    return f"Share of held-out pairs whose better answer scores higher, by {by}, with its standard error:"


def of_samples(recipe: Recipe) -> tuple[str, dict[str, str]]:
    """What is shown of held-out questions: a sentence, and the keys of eval/samples.json with their headings."""
    if recipe.training.objective == "reward":
        answers = {"question": "question", "reference": "better answer", "rejected": "worse answer"}
        said = "Scores of the better and of the worse answer to held-out questions:"
        return said, {**answers, "before": "scores before", "after": "after"}
    keys = ("question", "before", "after", "reference")
    return "Greedy answers to held-out questions, as they came:", {key: key for key in keys}


def counted(recipe: Recipe) -> str:
    """What a batch counts."""
    objective = recipe.training.objective
    return "pairs" if objective in PAIRS else "answers" if objective in POLICY else "documents"


def settings(recipe: Recipe) -> str:
    """The objective with all that it read: of rewards only names, no place of this machine."""
    objective = recipe.training.objective
    said: list[str] = [objective]
    if objective not in (*COMPARED, *POLICY):
        said.append(f"loss on {recipe.sequence.train_on}")
    unused, data = set(unused_objective_keys(recipe)), recipe.model_dump()
    for key in READS.get(objective, ()):
        if key == "rewards":
            said += [f"{one.weight:g} × {Path(one.model or one.function or '').name}" for one in recipe.rewards]
        elif key not in unused and value_at(data, key) is not None:
            said.append(f"{key.rpartition('.')[2]} {_plain(value_at(data, key))}")
    return ", ".join(said)


def _plain(value: object) -> str:
    if isinstance(value, bool):
        return "yes" if value else "no"
    return f"{value:g}" if isinstance(value, float) else str(value)


def limits(recipe: Recipe) -> str:
    """What nobody should take the model for."""
    if recipe.training.objective == "reward":
        return (
            "The model prefers what the raters of these rows preferred, with their errors, in answers like those of "
            "these rows. Answers that are sought for their score alone find what it is wrong about."
        )
    return (
        "The model knows what its base and these rows taught it, and states wrong things as confidently as right ones. "
        "It was not tuned or tested for safety; nothing beyond the measurements above is claimed."
    )

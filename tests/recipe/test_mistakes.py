"""Wrong names, wrong values and impossible combinations: one exact line each, with place, key and what to do."""

from __future__ import annotations

import pytest

from llama_ft.recipe import Recipe
from llama_ft.recipe.fields import fields_of, section_models
from llama_ft.recipe.words import OTHER_NAMES
from tests.recipe.conftest import GOOD, Report


def good(**changes: str) -> str:
    """GOOD with whole lines replaced: good(model="{base: x}")."""
    lines = dict(line.split(": ", 1) for line in GOOD.splitlines())
    return "".join(f"{key}: {value}\n" for key, value in (lines | changes).items())


NAMES = {
    "typo in a section": (
        GOOD + "training: {learning_rat: 1e-4}\n",
        ["r.yaml:5:12: training.learning_rat: unknown key 'learning_rat' — did you mean 'learning_rate'?"],
    ),
    "typo at the top": (
        GOOD + "tempalte: x\n",
        ["r.yaml:5:1: tempalte: unknown key 'tempalte' — did you mean 'template'?"],
    ),
    "capitals": (GOOD + "Export: {}\n", ["r.yaml:5:1: Export: unknown key 'Export' — did you mean 'export'?"]),
    "dashes": (
        GOOD + "training: {global-batch: 4}\n",
        ["r.yaml:5:12: training.global-batch: unknown key 'global-batch' — did you mean 'global_batch'?"],
    ),
    "key of another section": (
        GOOD + "learning_rate: 1e-4\n",
        ["r.yaml:5:1: learning_rate: unknown key 'learning_rate' — did you mean 'training.learning_rate'?"],
    ),
    "key of two other sections": (
        GOOD + "dtype: bfloat16\n",
        ["r.yaml:5:1: dtype: unknown key 'dtype' — did you mean 'model.dtype' or 'export.dtype'?"],
    ),
    "key of a source": (
        GOOD + "limit: 4\n",
        ["r.yaml:5:1: limit: unknown key 'limit' — did you mean 'data.0.limit'?"],
    ),
    "top key in a section": (
        GOOD + "training: {template: alpaca}\n",
        ["r.yaml:5:12: training.template: unknown key 'template' — did you mean 'template' at the top of the recipe?"],
    ),
    "dotted key": (
        GOOD + "training.seed: 1\n",
        ["r.yaml:5:1: training.seed: unknown key 'training.seed' — in a file it is nested: training: {seed: …}"],
    ),
    "another project's name": (
        GOOD + "per_device_train_batch_size: 1\nlora_alpha: 16\n",
        [
            "r.yaml:5:1: per_device_train_batch_size: unknown key 'per_device_train_batch_size'"
            " — did you mean 'training.micro_batch'?",
            "r.yaml:6:1: lora_alpha: unknown key 'lora_alpha' — did you mean 'adapter.alpha'?",
        ],
    ),
    "nothing near": (
        GOOD + "model_parallel_zzz: 1\nsequence: {qqq: 1}\n",
        [
            "r.yaml:5:1: model_parallel_zzz: unknown key 'model_parallel_zzz' — valid keys: adapter, data, eval_data, "
            "export, infilling, launch, mixture, model, name, output_dir, policy, preference …",
            "r.yaml:6:12: sequence.qqq: unknown key 'qqq' — valid keys here: max_length, "
            "max_truncated, overlong, packing, train_on",
        ],
    ),
    "extends in a section": (
        GOOD + "training: {extends: x}\n",
        [
            "r.yaml:5:12: training.extends: unknown key 'extends' — extends stands at the top of a recipe file",
        ],
    ),
    "newline in a key": (
        GOOD + 'sequence: {"a\\nb": 1}\n',
        [
            "r.yaml:5:12: sequence.a\\nb: unknown key 'a\\nb' — valid keys here: max_length, "
            "max_truncated, overlong, packing, train_on"
        ],
    ),
    "all required keys": (
        "# a comment\ntraining: {seed: 1}\n",
        [
            "r.yaml:2:1: name: name is missing"
            " — add 'name: …' (Name of the run; letters, digits, dot, dash, underscore)",
            "r.yaml:2:1: model: model is missing"
            " — add 'model: {base: …}' (The base model: where its weights come from and how they are held)",
            "r.yaml:2:1: data: data is missing — add 'data: [{use: …}]' (Sources of training rows)",
            "r.yaml:2:1: template: template is missing"
            " — add 'template: …' (A shipped template's name, a .jinja path, or `base` for the base model's own)",
        ],
    ),
    "required in a section": (
        good(reproduces="\n  source: x"),
        ["r.yaml:6:3: reproduces.what: what is missing — add 'what: …' (Name of the published model or experiment)"],
    ),
    "required but null": (
        good(name="null"),
        ["r.yaml:1:7: name: name is missing — add 'name: …' (Name of the run; letters, digits, dot, dash, underscore)"],
    ),
}
NUMBER = "a number above 0 is needed"
VALUES = {
    "text for a number": (
        "training: {learning_rate: fast}",
        [f"r.yaml:5:27: training.learning_rate: learning_rate is 'fast', {NUMBER}"],
    ),
    "quoted number": (
        "training: {learning_rate: '2e-5'}",
        [f"r.yaml:5:27: training.learning_rate: learning_rate is '2e-5', {NUMBER} — remove the quotes"],
    ),
    "out of range": (
        "training: {learning_rate: -1e-4, seed: -1}",
        [
            f"r.yaml:5:27: training.learning_rate: learning_rate is -1e-4, {NUMBER}",
            "r.yaml:5:40: training.seed: seed is -1, a whole number from 0 to 4294967295 is needed",
        ],
    ),
    "infinity and NaN": (
        "training: {epochs: .inf, weight_decay: .nan}",
        [
            f"r.yaml:5:20: training.epochs: epochs is .inf, {NUMBER} — infinity and NaN are no settings",
            "r.yaml:5:40: training.weight_decay: weight_decay is .nan, a number from 0 up is needed"
            " — infinity and NaN are no settings",
        ],
    ),
    "too large": (
        "training: {epochs: 1e999}",
        [f"r.yaml:5:20: training.epochs: epochs is 1e999, {NUMBER} — this is too long or too large to be meant"],
    ),
    "true for a number": ("training: {epochs: true}", [f"r.yaml:5:20: training.epochs: epochs is true, {NUMBER}"]),
    "fraction for a count": (
        "adapter: {r: 16.0}",
        ["r.yaml:5:14: adapter.r: r is 16.0, a whole number from 1 up is needed — write 16"],
    ),
    "underscores": (
        "training: {save_every: 1_000}",
        ["r.yaml:5:24: training.save_every: save_every is 1_000, a whole number from 1 up is needed — write 1000"],
    ),
    "leading zero": (
        "adapter: {r: 010}",
        ["r.yaml:5:14: adapter.r: r is 010, a whole number from 1 up is needed — write 10"],
    ),
    "share": (
        "adapter: {dropout: 1}",
        ["r.yaml:5:20: adapter.dropout: dropout is 1, a number from 0 to below 1 is needed"],
    ),
    "yes and off": (
        "sequence: {packing: yes}\nexport: {merged: Off}",
        [
            "r.yaml:5:21: sequence.packing: packing is yes, true or false is needed — write true",
            "r.yaml:6:18: export.merged: merged is Off, true or false is needed — write false",
        ],
    ),
    "quoted true": (
        "sequence: {packing: 'true'}",
        ["r.yaml:5:21: sequence.packing: packing is 'true', true or false is needed — remove the quotes"],
    ),
    "no in a text": (
        "output_dir: no",
        [
            "r.yaml:5:13: output_dir: output_dir is no, which YAML reads as true or false, text is needed"
            ' — quote it: "no"'
        ],
    ),
    "true in a text": (
        "output_dir: true",
        [
            "r.yaml:5:13: output_dir: output_dir is true, which YAML reads as true or false, text is needed"
            ' — quote it: "true"'
        ],
    ),
    "date in a text": (
        "output_dir: 2024-01-01",
        [
            "r.yaml:5:13: output_dir: output_dir is 2024-01-01, which YAML reads as a date, text is needed"
            ' — quote it: "2024-01-01"'
        ],
    ),
    "number in a text": (
        "output_dir: 12e4",
        [
            "r.yaml:5:13: output_dir: output_dir is 12e4, which YAML reads as a number, text is needed"
            ' — quote it: "12e4"'
        ],
    ),
    "base 60 in a text": (
        "output_dir: 12:30",
        [
            "r.yaml:5:13: output_dir: output_dir is 12:30, which YAML reads as a number, text is needed"
            ' — quote it: "12:30"'
        ],
    ),
    "word in capitals": (
        "training: {schedule: Cosine}",
        [
            "r.yaml:5:22: training.schedule: schedule is 'Cosine', one of cosine, linear, constant, wsd is needed"
            " — did you mean 'cosine'?"
        ],
    ),
    "auto misspelt": (
        "training: {micro_batch: auot}",
        [
            "r.yaml:5:25: training.micro_batch: micro_batch is 'auot', a whole number from 1 up or 'auto' is needed"
            " — did you mean 'auto'?"
        ],
    ),
    "zero for auto or a count": (
        "training: {micro_batch: 0}",
        ["r.yaml:5:25: training.micro_batch: micro_batch is 0, a whole number from 1 up or 'auto' is needed"],
    ),
    "nothing after the colon": (
        "training:\n  max_steps:\n  seed: 1",
        [
            "r.yaml:6:13: training.max_steps: max_steps has no value"
            " — write a whole number from 1 up after the colon, or null for the default"
        ],
    ),
    "one word for a list": (
        "tracking: wandb\nadapter: {targets: q_proj}",
        [
            "r.yaml:5:11: tracking: tracking is 'wandb', a list of names (tensorboard, wandb, mlflow, trackio)"
            " is needed — write it as a list: [wandb]",
            "r.yaml:6:20: adapter.targets: a LLaMA has no projections called 'q_proj' — write a list: [q_proj]",
        ],
    ),
    "map for a list": (
        "tracking: {wandb: true}",
        [
            "r.yaml:5:11: tracking: tracking is a map, a list of names (tensorboard, wandb, mlflow, trackio) is needed"
            " — write '- ' before its first key"
        ],
    ),
    "wrong entry of a list": (
        "tracking: [wandb, tensorbord, null]",
        [
            "r.yaml:5:19: tracking.1: tracking is 'tensorbord', one of tensorboard, wandb, mlflow, trackio is needed"
            " — did you mean 'tensorboard'?",
            "r.yaml:5:31: tracking.2: this entry of the list is null"
            " — one of tensorboard, wandb, mlflow, trackio is needed, or remove it",
        ],
    ),
    "gguf": (
        "export: {gguf: [Q4_K_M, f17]}",
        [
            "r.yaml:5:17: export.gguf.0: gguf is 'Q4_K_M', one of f32, bf16, f16, q8_0, q6_k, q5_k_m, q4_k_m is needed"
            " — did you mean 'q4_k_m'?",
            "r.yaml:5:25: export.gguf.1: gguf is 'f17', one of f32, bf16, f16, q8_0, q6_k, q5_k_m, q4_k_m is needed"
            " — did you mean 'f16'?",
        ],
    ),
    "value for a section": (
        "adapter: lora\nsequence: 512\ntraining: [a]\nexport: []",
        [
            "r.yaml:5:10: adapter: adapter is 'lora', a map is needed — write {method: lora}",
            "r.yaml:6:11: sequence: sequence is 512, a map is needed — write {max_length: 512}",
            "r.yaml:7:11: training: training is a list, a map is needed — write its keys without '- '",
            "r.yaml:8:9: export: export is an empty list, a map is needed — remove export for its default",
        ],
    ),
    "union of a map and a list": (
        "eval_data: {use: llama-qa}",
        [
            "r.yaml:5:12: eval_data: eval_data is a map, {holdout: …} or a list of one or more maps is needed"
            " — write '- ' before its first key"
        ],
    ),
    "union, a number": (
        "eval_data: 0.1",
        [
            "r.yaml:5:12: eval_data: eval_data is 0.1, {holdout: …} or a list of one or more maps is needed"
            " — write {holdout: 0.1}"
        ],
    ),
    "holdout in a list": (
        "eval_data: [{holdout: 0.1}]",
        [
            "r.yaml:5:14: eval_data.0.holdout: unknown key 'holdout'"
            " — holdout stands alone, not in a list: eval_data: {holdout: 0.02}"
        ],
    ),
    "holdout of a list": (
        "eval_data: {holdout: [0.1], limit: 3}",
        [
            "r.yaml:5:22: eval_data.holdout: holdout is a list, a number above 0 and below 1 is needed",
            "r.yaml:5:29: eval_data.limit: unknown key 'limit' — did you mean 'data.0.limit'?",
        ],
    ),
}
SOURCES = {
    "a name for a source": (
        good(data="[llama-qa, null, [x], {use: alpcaa}]"),
        [
            "r.yaml:3:8: data.0: data is 'llama-qa', a map is needed — write {use: llama-qa}",
            "r.yaml:3:18: data.1: this entry of the list is null — a map is needed, or remove it",
            "r.yaml:3:24: data.2: data is a list, a map is needed — write its keys without '- '",
            "r.yaml:3:35: data.3.use: no such card 'alpcaa' — did you mean 'alpaca'?",
        ],
    ),
    "a map for the list": (
        good(data="{use: llama-qa}"),
        ["r.yaml:3:7: data: data is a map, a list of one or more maps is needed — write '- ' before its first key"],
    ),
    "empty list": (
        good(data="[]"),
        ["r.yaml:3:7: data: data is an empty list, a list of one or more maps is needed — give one"],
    ),
    "name": (
        good(name="my/run"),
        [
            "r.yaml:1:7: name: name is 'my/run', a name of letters, digits, '.', '-' and '_' (100 at most) is needed",
        ],
    ),
    "empty text": (good(template='""'), ["r.yaml:4:11: template: template is '', text is needed"]),
}
COMBINATIONS = {
    "no source": (
        good(data="[{split: train}]"),
        ["r.yaml:3:8: data.0: a source needs use (a card) or path (a file) — add use: NAME, or path and layout"],
    ),
    "no layout is guessed": (good(data="[{path: r.yaml}]"), []),
    "shares of what is evaluated": (
        good(eval_data="[{use: llama-qa, split: heldout, weight: 2, epochs: 3}]"),
        [
            "r.yaml:5:45: eval_data.0.weight: eval_data is evaluated whole, each row once — remove weight",
            "r.yaml:5:56: eval_data.0.epochs: eval_data is evaluated whole, each row once — remove epochs",
        ],
    ),
    "lines of rows": (
        good(data="[{path: r.yaml, layout: alpaca, unit: line}]"),
        ["r.yaml:3:39: data.0.unit: unit speaks of plain text, not of alpaca rows — remove unit"],
    ),
    "stream without an end": (
        good(data="[{use: llama-qa, epochs: 2}]", mixture="{streaming: true, dedupe: exact, temperature: 2}"),
        [
            "r.yaml:3:24: data.0.epochs: passes cannot be counted in a stream — weigh the sources instead",
            "r.yaml:5:11: mixture.streaming: a stream has no length to count epochs by — add training.max_steps",
            "r.yaml:5:28: mixture.dedupe: copies are found in a prepared set, not in a stream — write dedupe: none",
            "r.yaml:5:43: mixture.temperature: a stream has no sizes to temper — weigh the sources instead",
        ],
    ),
    "part of a stream held out": (
        good(eval_data="{holdout: 0.1}", mixture="{streaming: true}", training="{max_steps: 9}"),
        ["r.yaml:5:1: eval_data: a share of a stream cannot be held out — name rows of their own in eval_data"],
    ),
    "nothing to decontaminate from": (
        good(mixture="{decontaminate: true}"),
        [
            "r.yaml:5:11: mixture.decontaminate: there is nothing that rows could overlap"
            " — add mixture.benchmarks: [humaneval, mbpp], or rows of their own in eval_data"
        ],
    ),
    "keys without effect": (
        good(mixture="{similarity: 0.5, shuffle_buffer: 7}"),
        [
            "r.yaml:5:11: mixture.similarity: speaks of near copies, which this recipe does not ask for"
            " — remove it, or write dedupe: near",
            "r.yaml:5:28: mixture.shuffle_buffer: speaks of a stream, which this recipe does not ask for"
            " — remove it, or write streaming: true",
        ],
    ),
    "benchmark in a file": (good(mixture="{benchmarks: [r.yaml, humaneval]}"), []),
    "a slip of the pen": (
        good(data="[{use: llama-qa, weight: 1e308, epochs: 20000}]"),
        [
            "r.yaml:3:24: data.0.weight: 1e+308 is more than 10,000 — write a smaller number",
            "r.yaml:3:39: data.0.epochs: 20000 is more than 10,000 — write a smaller number",
        ],
    ),
    "unknown benchmark": (
        good(mixture="{benchmarks: [humanevil]}"),
        ["r.yaml:5:24: mixture.benchmarks.0: no such card or file 'humanevil' — did you mean 'humaneval'?"],
    ),
    "infilling of pairs": (
        good(infilling="{tokens: [a, b, b, c]}", training="{objective: dpo}", sequence="{packing: false}"),
        [
            "r.yaml:5:1: infilling: only text that is trained on as it stands can be filled in — remove infilling",
            "r.yaml:5:13: infilling.tokens: the four tokens must differ — name four different ones",
        ],
    ),
    "two layouts": (
        good(data="[{use: llama-qa, path: r.yaml, layout: alpaca}]"),
        ["r.yaml:3:38: data.0.layout: the card that use names has its own layout — remove layout, or use"],
    ),
    "split of a file": (
        good(data="[{path: r.yaml, layout: alpaca, split: test}]"),
        ["r.yaml:3:39: data.0.split: a file has no splits, only a card has — remove split, or add use"],
    ),
    "split of a card": (
        good(data="[{use: llama-qa, split: held}]"),
        ["r.yaml:3:31: data.0.split: the card llama-qa has no split 'held' — did you mean 'heldout'?"],
    ),
    "no weight": (
        good(data="[{use: llama-qa, weight: 0}, {use: alpaca, weight: 0.0}]"),
        ["r.yaml:3:1: data: every source has weight 0, there is nothing to train on — give one a weight above 0"],
    ),
    "the better answers of pairs": (good(data="[{path: r.yaml, layout: preference}]"), []),
    "preference rows": (
        good(data="[{path: r.yaml, layout: preference}]", training="{objective: kto}"),
        [
            "r.yaml:3:23: data.0.layout: kto reads layout rated, not preference — use a set in layout rated",
        ],
    ),
    "rated rows": (
        good(data="[{path: r.yaml, layout: rated}]"),
        [
            "r.yaml:3:23: data.0.layout: sft cannot train on rated rows"
            " — sft takes conversations, text and pairs; kto takes rated rows"
        ],
    ),
    "pretrain": (
        good(data="[{path: r.yaml, layout: alpaca}]", training="{objective: pretrain, global_batch: 4096}"),
        [
            "r.yaml:3:23: data.0.layout: pretrain reads layout text, not alpaca"
            " — write layout: text, or objective: sft",
        ],
    ),
    "a pack that no step fills": (
        good(data="[{path: r.yaml, layout: text}]", training="{objective: pretrain, global_batch: 128}"),
        [
            "r.yaml:5:33: training.global_batch: pretrain counts tokens, and a global batch of 128"
            " does not fill one pack of 2048 — write a multiple of 2048, such as 16384",
        ],
    ),
    "tokens without packs": (
        good(data="[{path: r.yaml, layout: text}]", training="{objective: pretrain, global_batch: 4096}")
        + "sequence: {packing: false}\n",
        [
            "r.yaml:6:12: sequence.packing: pretrain lays documents into packs of max_length tokens — remove it",
        ],
    ),
    "warm-up in tokens of documents": (
        GOOD + "training: {warmup_tokens: 5000}\n",
        [
            "r.yaml:5:12: training.warmup_tokens: sft counts documents, not tokens"
            " — write warmup, in steps or as a share",
        ],
    ),
    "warm-up twice, or longer than the run": (
        good(
            data="[{path: r.yaml, layout: text}]",
            training="{objective: pretrain, global_batch: 4096, max_steps: 9, warmup: 3, warmup_tokens: 10000}",
        ),
        [
            "r.yaml:5:78: training.warmup_tokens: warmup says how long the warm-up is, too"
            " — remove one of the two, or write warmup_tokens: null",
        ],
    ),
    "warm-up in tokens longer than the run": (
        good(
            data="[{path: r.yaml, layout: text}]",
            training="{objective: pretrain, global_batch: 4096, max_steps: 3, warmup_tokens: 9000}",
        ),
        [
            "r.yaml:5:67: training.warmup_tokens: warm-up takes 3 steps of 4096 tokens, training stops after 3"
            " — write fewer tokens",
        ],
    ),
    "shares": (
        good(
            data="[{path: r.yaml, layout: text, share: 0.5}, {path: r.yaml, layout: text}]",
            training="{objective: pretrain, global_batch: 4096}",
        ),
        [
            "r.yaml:3:37: data.0.share: shares of tokens are held by pretrain, from a stream"
            " — write objective: pretrain with mixture: {streaming: true}, or weigh the sources instead",
            "r.yaml:3:50: data.1: the other sources say which share of the tokens is theirs — add share to this one",
        ],
    ),
    "shares that miss 1": (
        good(
            data="[{path: r.yaml, layout: text, share: 0.5}, {path: r.yaml, layout: text, share: 0.4, weight: 2}]",
            training="{objective: pretrain, global_batch: 4096, max_steps: 5}",
        )
        + "mixture: {streaming: true}\n",
        [
            "r.yaml:3:37: data.0.share: the shares of all sources come to 0.9, not to 1 — mend one of them",
            "r.yaml:3:91: data.1.weight: share says how often the source is drawn, too — remove one of them",
        ],
    ),
    "packing": (GOOD + "sequence: {packing: true}\ntraining: {objective: reward}\n", []),
    "split answers": (
        GOOD + "sequence: {packing: false, overlong: split}\ntraining: {objective: dpo}\n",
        [
            "r.yaml:5:28: sequence.overlong: dpo compares whole answers, which cannot be split"
            " — write drop or truncate",
        ],
    ),
    "gguf": (GOOD + "export: {gguf: [q8_0, q4_k_m]}\n", []),
    "gguf of nothing": (
        GOOD + "export: {merged: false, gguf: [q8_0]}\n",
        [
            "r.yaml:5:25: export.gguf: GGUF files are made of merged/, and export.merged is false — write merged: true",
        ],
    ),
    "gguf of a reward model": (
        GOOD + "training: {objective: reward}\nexport: {gguf: [q8_0]}\n",
        ["r.yaml:6:10: export.gguf: a reward model has no GGUF form — remove gguf"],
    ),
    "sampling": (GOOD + "export: {sampling: {temperature: 0.6, top_p: 0.9}}\n", []),
    "sampling told nowhere": (
        GOOD + "export: {merged: false, sampling: {temperature: 0.6}}\n",
        ["r.yaml:5:25: export.sampling: it is told in merged/, and export.merged is false — write merged: true"],
    ),
    "sampling of a reward model": (
        GOOD + "training: {objective: reward}\nexport: {sampling: {}}\n",
        ["r.yaml:6:10: export.sampling: a reward model writes no answers — remove sampling"],
    ),
    "sampling from nothing": (
        GOOD + "export: {sampling: {temperature: 0, top_p: 1.5}}\n",
        [
            "r.yaml:5:34: export.sampling.temperature: temperature is 0, a number above 0 is needed",
            "r.yaml:5:44: export.sampling.top_p: top_p is 1.5, a number above 0 and at most 1 is needed",
        ],
    ),
    "qlora in float16 on a CPU": (
        good(model="{base: smollm2-135m, dtype: float16}", adapter="{method: qlora}"),
        [
            "r.yaml:2:29: model.dtype: qlora with float16 cannot run on a CPU, which the launch config asks for"
            " — write bfloat16 or float32, or another launch config",
        ],
    ),
    "float16 on a CPU": (
        good(model="{base: smollm2-135m, dtype: float16}"),
        [
            "r.yaml:2:29: model.dtype: lora with float16 cannot run on a CPU, which the launch config asks for"
            " — write bfloat16 or float32, or another launch config"
        ],
    ),
    "float16 on a GPU": (
        good(model="{base: smollm2-135m, dtype: float16}", launch="accelerate_configs/ddp.yaml"),
        [],
    ),
    "full with an adapter": (
        GOOD + "adapter:\n  method: full\n  r: 8\n  targets: attention\n  alpha: null\n",
        [
            "r.yaml:7:3: adapter.r: r belongs to lora and qlora, method: full trains every weight — remove it",
            "r.yaml:8:3: adapter.targets: targets belongs to lora and qlora, method: full trains every weight"
            " — remove it",
        ],
    ),
    "projection": (
        GOOD + "adapter: {targets: [q_proj, v_prj]}\n",
        ["r.yaml:5:29: adapter.targets.1: a LLaMA has no projection 'v_prj' — did you mean 'v_proj'?"],
    ),
    "warm-up without end": (
        GOOD + "training: {warmup: 10, max_steps: 10}\n",
        [
            "r.yaml:5:12: training.warmup: warm-up takes 10 steps, training stops after 10"
            " — write fewer steps, or a share such as 0.03"
        ],
    ),
    "warm-up that ends": (GOOD + "training: {warmup: 9, max_steps: 10}\n", []),
    "half a step": (
        GOOD + "training: {warmup: 1.6}\n",
        [
            "r.yaml:5:12: training.warmup: 1.6 is neither a share below 1 nor a whole number of steps — write 2",
        ],
    ),
    "micro-batch": (
        GOOD + "training: {global_batch: 12, micro_batch: 5}\n",
        [
            "r.yaml:5:30: training.micro_batch: a global batch of 12 documents cannot be made of micro-batches of 5"
            " — write 4, or auto"
        ],
    ),
    "micro-batch above the default global batch": (
        GOOD + "training: {micro_batch: 256}\n",
        [
            "r.yaml:5:12: training.micro_batch: a global batch of 128 documents cannot be made of micro-batches of 256"
            " — write 128, or auto"
        ],
    ),
    "too long": (
        GOOD + "sequence: {max_length: 8193}\n",
        [
            "r.yaml:5:12: sequence.max_length: 8193 tokens are more than smollm2-135m can read, 8192"
            " — write 8192 or less, or set model.rope_scaling"
        ],
    ),
    "a regex that matches nothing": (
        good(adapter="{targets: '.*k_projection'}"),
        [
            "r.yaml:5:20: adapter.targets: the regex '.*k_projection' matches no projection of a LLaMA"
            r" — it must match whole names, such as model.layers.0.mlp.up_proj: .*layers\.\d+\.mlp\..*"
        ],
    ),
    "a regex that is none": (
        good(adapter="{targets: 'model.(layers'}"),
        [
            "r.yaml:5:20: adapter.targets: 'model.(layers' is no regex: missing ), unterminated subpattern at"
            " position 6 — all-linear, attention, or a list"
        ],
    ),
    "a regex": (good(adapter=r"{targets: 'model\.layers\.[01]\..*'}"), []),
    "a misspelt group": (
        good(adapter="{targets: all-liner}"),
        ["r.yaml:5:20: adapter.targets: a LLaMA has no projections called 'all-liner' — did you mean 'all-linear'?"],
    ),
    "keys of qlora beside lora": (
        good(adapter="{method: lora, bits: 8, freeze: [norm]}"),
        [
            "r.yaml:5:25: adapter.bits: bits belongs to qlora, method: lora does not quantise"
            " — remove it, or write method: qlora",
            "r.yaml:5:34: adapter.freeze: freeze belongs to full, lora trains nothing of the base"
            " — remove it; targets says which layers get an adapter",
        ],
    ),
    "double quantisation in eight bits": (
        good(adapter="{method: qlora, bits: 8, double_quant: false}"),
        [
            "r.yaml:5:35: adapter.double_quant: double_quant belongs to bits: 4, eight bits have one scale per row"
            " — remove it"
        ],
    ),
    "a frozen part that is no regex": (
        good(adapter="{method: full, freeze: ['layers.[0']}"),
        ["r.yaml:5:34: adapter.freeze.0: 'layers.[0' is no regex: unterminated character set at position 7"],
    ),
    "a decay without its schedule": (
        good(training="{schedule: linear, decay: 0.2}"),
        [
            "r.yaml:5:30: training.decay: decay belongs to schedule: wsd, linear has no stable part that it would end"
            " — remove it"
        ],
    ),
    "a decay that never ends": (
        good(training="{schedule: wsd, decay: 20, max_steps: 20}"),
        [
            "r.yaml:5:27: training.decay: the decay takes 20 steps, training stops after 20"
            " — write fewer steps, or a share such as 0.1"
        ],
    ),
    "a constant rate that falls": (
        good(training="{schedule: constant, final_rate: 0.1}"),
        ["r.yaml:5:32: training.final_rate: a constant learning rate ends where it started — remove it"],
    ),
    "Adam's moments beside Adafactor": (
        good(training="{optimizer: adafactor, betas: [0.9, 0.95]}"),
        ["r.yaml:5:34: training.betas: betas belongs to AdamW and Muon, adafactor has its own — remove it"],
    ),
    "the best of nothing": (
        good(export="{checkpoint: best}"),
        [
            "r.yaml:5:10: export.checkpoint: the best checkpoint is the one with the lowest held-out loss, and there is"
            " no eval_data — add eval_data: {holdout: 0.02}, or write last"
        ],
    ),
    "preset without tokenizer": (
        good(model="{base: 'preset:tiny'}"),
        ["r.yaml:2:9: model.base: preset:tiny has no tokenizer of its own — add model.tokenizer, e.g. smollm2-135m"],
    ),
    "preset": (good(model="{base: 'preset:tiny', tokenizer: smollm2-135m}", sequence="{max_length: 100000}"), []),
    "revision": (
        good(model="{base: smollm2-135m, revision: main}"),
        ["r.yaml:2:29: model.revision: smollm2-135m is not on the hub and has no revisions — remove revision"],
    ),
}


@pytest.mark.parametrize(("text", "expected"), NAMES.values(), ids=NAMES.keys())
def test_names(report: Report, text: str, expected: list[str]) -> None:
    assert report(text) == expected


@pytest.mark.parametrize(("lines", "expected"), VALUES.values(), ids=VALUES.keys())
def test_values(report: Report, lines: str, expected: list[str]) -> None:
    assert report(f"{GOOD}{lines}\n") == expected


@pytest.mark.parametrize(("text", "expected"), SOURCES.values(), ids=SOURCES.keys())
def test_sources(report: Report, text: str, expected: list[str]) -> None:
    assert report(text) == expected


@pytest.mark.parametrize(("text", "expected"), COMBINATIONS.values(), ids=COMBINATIONS.keys())
def test_combinations(report: Report, text: str, expected: list[str]) -> None:
    assert report(text) == expected


def test_all_mistakes_of_a_file_in_one_report_in_file_order(report: Report) -> None:
    """YAML's own mistakes, names, values, look-ups and combinations stand together, sorted by line and column."""
    problems = report(
        "template: alpca\n"
        "name: no\n"
        "name: x\n"
        "model: {base: smolm2-135m, dtyp: float16}\n"
        "1: x\n"
        "adapter: {r: 8, method: full}\n"
        "data: [{use: alpcaa}]\n"
        "training: {warmup: 9, max_steps: 5, epochs: three}\n"
        "launch: accelerate_configs/gpus.yaml\n"
        "output_dir: !x y\n"
    )
    assert [problem.split(" ")[:2] for problem in problems] == [
        ["r.yaml:1:11:", "template:"],
        ["r.yaml:2:7:", "name:"],
        ["r.yaml:3:1:", "name:"],
        ["r.yaml:4:15:", "model.base:"],
        ["r.yaml:4:28:", "model.dtyp:"],
        ["r.yaml:5:1:", "the"],
        ["r.yaml:6:11:", "adapter.r:"],
        ["r.yaml:7:14:", "data.0.use:"],
        ["r.yaml:8:12:", "training.warmup:"],
        ["r.yaml:8:45:", "training.epochs:"],
        ["r.yaml:9:9:", "launch:"],
        ["r.yaml:10:13:", "output_dir:"],
    ]


def test_every_word_of_pydantic_is_translated(report: Report) -> None:
    """A wrong value for each key of the schema in turn: the report never speaks pydantic's own words."""
    jargon = ("Input should", "valid integer", "type=", "validation error", "Extra inputs", "literal", "strict", "str ")
    for section, model in section_models().items():
        for name, field in fields_of(model).items():
            wrong = "[[1]]" if field.model else "{a: {b: c}}"
            body = f"{name}: {wrong}"
            for part in reversed(section.split(".") if section else []):
                body = (
                    f"[{{{body}}}]"
                    if part == "0"
                    else f"{part}: {{{body}}}"
                    if not body.startswith("[")
                    else f"{part}: {body}"
                )
            body = body.replace(": {[", ": [")
            top = body.split(":")[0]
            text = "\n".join(line for line in GOOD.splitlines() if not line.startswith(f"{top}:"))
            problems = report(f"{text}\n{body}\n")
            key = f"{section}.{name}" if section else name
            assert any(f" {key}: " in problem or f" {key}." in problem for problem in problems), (key, problems)
            assert not any(word in problem.split(" — ")[0] for problem in problems for word in jargon), problems


def test_other_projects_names_point_to_real_keys() -> None:
    for target in OTHER_NAMES.values():
        section, _, name = target.rpartition(".")
        assert name in fields_of(section_models()[section])
    for name in OTHER_NAMES:
        assert name not in Recipe.model_fields

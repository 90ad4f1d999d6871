"""The families hold the originals' hyper-parameters, and their cards say what a user must know before training."""

from __future__ import annotations

from pathlib import Path
from typing import Any, NamedTuple

import pytest

from llama_ft.data.cards import Hub, load_card
from llama_ft.data.layouts import check_layout, read_example
from llama_ft.data.problems import Problems
from llama_ft.recipe import load_recipe
from llama_ft.recipe.check_data import layout_fits
from llama_ft.recipe.extends import shipped_recipes
from llama_ft.recipe.lookup import shipped_cards
from llama_ft.recipe.objectives import POLICY
from llama_ft.recipe.schema import Data, Recipe
from tests.conftest import ROOT

STARTING_POINTS = [name for name in shipped_recipes() if name.startswith("llama-3/")]
"""Recipes that reproduce nothing: what a user begins with."""
FAMILIES = [name for name in shipped_recipes() if "/" in name and name not in STARTING_POINTS]
TWINS = [name for name in FAMILIES if "smollm2" in name]
PAGE = ROOT / "docs" / "families.md"


class Numbers(NamedTuple):
    """Learning rate, epochs, global batch, max_length, schedule, warm-up, template, train_on."""

    learning_rate: float
    epochs: float
    global_batch: int
    max_length: int
    schedule: str
    warmup: float
    template: str
    train_on: str


ORIGINALS = {
    # stanford_alpaca README and train.py; GPT-4-LLM README: 16 x 1 x 4
    "alpaca/llama-7b-full": Numbers(2e-5, 3, 128, 512, "cosine", 0.03, "alpaca", "responses"),
    "alpaca/llama-7b-cleaned": Numbers(2e-5, 3, 128, 512, "cosine", 0.03, "alpaca", "responses"),
    "alpaca/llama-7b-gpt4": Numbers(2e-5, 3, 64, 512, "cosine", 0.03, "alpaca", "responses"),
    "alpaca/llama-13b-full": Numbers(1e-5, 5, 128, 512, "cosine", 0.03, "alpaca", "responses"),
    # alpaca-lora finetune.py, README
    "alpaca-lora/llama-7b": Numbers(3e-4, 3, 128, 256, "linear", 100, "alpaca-lora", "all"),
    "alpaca-lora/llama-7b-published": Numbers(3e-4, 10, 128, 512, "linear", 100, "alpaca-lora", "all"),
    # dolly train_dolly.py, config/a100_config.json: 8 x 6
    "dolly/llama-2-7b-full": Numbers(5e-6, 2, 48, 2048, "constant", 50, "alpaca", "responses"),
    # FastChat README, scripts/train_vicuna_7b.sh
    "vicuna/llama-7b-v1.3": Numbers(2e-5, 3, 128, 2048, "cosine", 0.04, "vicuna_v1.1", "responses"),
    "vicuna/llama-2-7b-v1.5": Numbers(2e-5, 3, 128, 4096, "cosine", 0.03, "vicuna_v1.1", "responses"),
    "vicuna/llama-2-7b-v1.5-16k": Numbers(2e-5, 3, 128, 16384, "cosine", 0.03, "vicuna_v1.1", "responses"),
    # codealpaca README: 8 x 8 x 4
    "code-alpaca/llama-7b-full": Numbers(2e-5, 3, 256, 512, "cosine", 0.03, "alpaca", "responses"),
    # arXiv 2308.12950, section 2.6; batches in tokens
    "code-llama/llama-2-7b-infilling": Numbers(3e-4, 1, 4_194_304, 4096, "cosine", 1000, "plain", "all"),
    "code-llama/llama-2-7b-python": Numbers(1e-4, 1, 4_194_304, 4096, "cosine", 1000, "plain", "all"),
    "code-llama/llama-2-7b-long-context": Numbers(2e-5, 1, 2_097_152, 16384, "cosine", 1000, "plain", "all"),
    # arXiv 2302.13971 section 2.3 and table 2; batches in tokens, 1.0T or 1.4T of them in all
    "pretrain/llama-1-mixture": Numbers(3e-4, 1, 4_194_304, 2048, "cosine", 2000, "plain", "all"),
    "pretrain/llama-1-mixture-13b": Numbers(3e-4, 1, 4_194_304, 2048, "cosine", 2000, "plain", "all"),
    "pretrain/llama-1-mixture-33b": Numbers(1.5e-4, 1, 4_194_304, 2048, "cosine", 2000, "plain", "all"),
    "pretrain/llama-1-mixture-65b": Numbers(1.5e-4, 1, 4_194_304, 2048, "cosine", 2000, "plain", "all"),
    # qlora scripts/finetune_guanaco_7b.sh
    "guanaco/llama-7b-qlora": Numbers(2e-4, 4, 16, 512, "constant", 0, "guanaco", "all"),
    "guanaco/smollm2-135m-qlora": Numbers(2e-4, 4, 16, 512, "constant", 0, "guanaco", "all"),
    # alignment-handbook recipes/zephyr-7b-beta
    "zephyr/llama-2-7b-sft-full": Numbers(2e-5, 1, 128, 2048, "cosine", 0.1, "zephyr", "responses"),
    "zephyr/llama-2-7b-sft-qlora": Numbers(2e-4, 1, 128, 2048, "cosine", 0.1, "zephyr", "responses"),
    "zephyr/llama-2-7b-dpo-full": Numbers(5e-7, 1, 128, 1024, "cosine", 0.1, "zephyr", "responses"),
    "zephyr/llama-2-7b-dpo-qlora": Numbers(5e-6, 1, 128, 1024, "cosine", 0.1, "zephyr", "responses"),
    # arXiv 2307.09288 sections 3.1, 3.2.2 and 3.2.3; batches in documents, pairs and answers
    "llama-2-chat/1-sft": Numbers(2e-5, 2, 64, 4096, "cosine", 0, "llama2-chat", "responses"),
    "llama-2-chat/2-reward-helpful": Numbers(1e-5, 1, 512, 4096, "cosine", 0.03, "llama2-chat", "responses"),
    "llama-2-chat/2-reward-safety": Numbers(1e-5, 1, 512, 4096, "cosine", 0.03, "llama2-chat", "responses"),
    "llama-2-chat/4-rloo": Numbers(1e-6, 3, 512, 1024, "constant", 0, "llama2-chat", "responses"),
    # open-instruct docs/tulu3.md
    "tulu/llama-3.1-8b-sft": Numbers(5e-6, 2, 128, 4096, "linear", 0.03, "tulu", "responses"),
    "tulu/llama-3.1-8b-dpo": Numbers(5e-7, 1, 128, 2048, "linear", 0.1, "tulu", "responses"),
}
ADAPTERS: dict[str, tuple[str, int, int, float, Any]] = {
    "alpaca-lora/llama-7b": ("lora", 8, 16, 0.05, ["q_proj", "v_proj"]),
    "alpaca-lora/llama-7b-published": ("lora", 16, 16, 0.05, ["q_proj", "k_proj", "v_proj", "o_proj"]),
    "guanaco/llama-7b-qlora": ("qlora", 64, 16, 0.1, "all-linear"),
    "guanaco/smollm2-135m-qlora": ("qlora", 64, 16, 0.1, "all-linear"),
    "zephyr/llama-2-7b-sft-qlora": ("qlora", 16, 16, 0.05, "all-linear"),
    "zephyr/llama-2-7b-dpo-qlora": ("qlora", 128, 128, 0.05, "all-linear"),
}
_TOLD = {"chosen": "\n\nHuman: q\n\nAssistant: a", "rejected": "\n\nHuman: q\n\nAssistant: b"}
_SAID = [{"role": "user", "content": "q"}, {"role": "assistant", "content": "a"}]
_ALPACA = {"instruction": "i", "input": "", "output": "o"}
_LOGGED = {"country": None, "hashed_ip": "0", "header": {"user-agent": "x"}, "redacted": False, "toxic": False}
_SHARED = [{"from": "human", "value": "q"}, {"from": "gpt", "value": "a"}]
_PILE = {"id": "0", "text": "t", "source": "s", "added": "2024", "created": "2024", "metadata": {"license": "CC0"}}
ROWS: dict[str, dict[str, Any]] = {
    "alpaca": {**_ALPACA, "text": "t"},
    "alpaca-cleaned": _ALPACA,
    "alpaca-gpt4": {**_ALPACA, "text": "t"},
    "code-alpaca": _ALPACA,
    "arxiv-papers": _PILE,
    "c4": {"text": "t", "timestamp": "2019-04-25T12:57:54Z", "url": "https://example.org"},
    "codeparrot-clean": {"repo_name": "r", "path": "p.py", "content": "x = 1", "license": "mit"},
    "dolly": {"instruction": "i", "context": "", "response": "o", "category": "open_qa"},
    "fineweb": {"text": "t", "id": "i", "dump": "CC-MAIN-2013-20", "url": "u", "language": "en", "token_count": 1},
    "gpteacher": {"instruction": "i", "input": "", "response": "o"},
    "gutenberg": _PILE,
    **dict.fromkeys(("hh-rlhf", "hh-rlhf-helpful", "hh-rlhf-harmless"), _TOLD),
    "humaneval": {
        "task_id": "HumanEval/0",
        "prompt": "def f():",
        "canonical_solution": "",
        "test": "",
        "entry_point": "f",
    },
    "kto-mix-14k": {"prompt": _SAID[:1], "completion": _SAID[1:], "label": True},
    "lmsys-chat-1m": {"conversation_id": "0", "model": "vicuna-13b", "conversation": _SAID, "turn": 1},
    "mbpp": {"task_id": 11, "text": "q", "code": "c", "test_list": ["assert f()"], "test_setup_code": ""},
    "openassistant-guanaco": {"text": "### Human: q### Assistant: a", "messages": _SAID, "language": "en"},
    "sharegpt-90k": {"id": "0", "conversations": [{**turn, "markdown": "m"} for turn in _SHARED], "lang": "en"},
    "sharegpt-v3": {"id": "0", "conversations": _SHARED},
    "stack-v2-edu": _PILE,
    "stackexchange": _PILE,
    "tulu-3-preference": {
        "id": "0",
        "prompt": "q",
        "chosen": _SAID,
        "rejected": [_SAID[0], {**_SAID[1], "content": "b"}],
    },
    "tulu-3-sft-mixture": {"id": "0", "messages": _SAID, "source": "s"},
    "ultrachat-200k": {"prompt": "q", "prompt_id": "0", "messages": _SAID},
    "ultrafeedback-binarized": {
        **{"prompt": "q", "prompt_id": "0", "messages": _SAID, "chosen": _SAID, "score_chosen": 8.0},
        **{"rejected": [_SAID[0], {**_SAID[1], "content": "b"}], "score_rejected": 5.0},
    },
    "wikipedia": {"id": "1", "url": "u", "title": "t", "text": "t"},
    "wildchat-1m": {"conversation_hash": "0", "conversation": [{**turn, **_LOGGED} for turn in _SAID], "turn": 1},
}
"""One row of each hub set with the columns it is published with."""
OWN_NUMBERS = (
    "code-llama/codellama-7b-instruct",
    "llama-2-chat/3-rejection-sampling",
    "pretrain/from-nothing",
    "pretrain/laptop-mixture",
    *(name for name in TWINS if name not in ORIGINALS),
)
"""Recipes whose hyper-parameters no original states, or that are made for a laptop."""


@pytest.mark.parametrize("name", FAMILIES)
def test_hyper_parameters_are_the_originals(name: str) -> None:
    recipe = load_recipe(name)
    if name in OWN_NUMBERS:
        assert any("batch" in text for text in deviations(recipe)), "say which numbers are ours"
        return
    training, sequence = recipe.training, recipe.sequence
    assert ORIGINALS[name] == Numbers(
        training.learning_rate,
        training.epochs,
        training.global_batch,
        sequence.max_length,
        training.schedule,
        training.warmup,
        recipe.template,
        sequence.train_on,
    )


@pytest.mark.parametrize("name", [name for name in FAMILIES if name not in OWN_NUMBERS])
def test_adapters_are_the_originals(name: str) -> None:
    adapter = load_recipe(name).adapter
    found = (adapter.method, adapter.r, adapter.alpha, adapter.dropout, adapter.targets)
    assert found == ADAPTERS[name] if name in ADAPTERS else adapter.method == "full"


def test_numbers_that_one_family_has_alone() -> None:
    guanaco = load_recipe("guanaco/llama-7b-qlora").training
    assert (guanaco.max_steps, guanaco.max_grad_norm, guanaco.weight_decay, guanaco.seed) == (1875, 0.3, 0, 0)
    lora = load_recipe("alpaca-lora/llama-7b")
    assert lora.training.micro_batch == 4
    assert round(lora.eval_data.holdout * load_card("alpaca-cleaned").rows["train"], -1) == 2000  # type: ignore[union-attr,index]
    rope = load_recipe("vicuna/llama-2-7b-v1.5-16k").model.rope_scaling
    assert rope is not None and (rope.rope_type, rope.factor) == ("linear", 4)
    infilling = load_recipe("code-llama/llama-2-7b-infilling")
    assert infilling.infilling is not None
    assert (infilling.infilling.rate, infilling.infilling.spm, infilling.infilling.split) == (0.9, 0.5, "character")
    long = load_recipe("code-llama/llama-2-7b-long-context")
    assert long.model.rope_scaling is not None and long.model.rope_scaling.rope_theta == 1e6
    # arXiv 2308.12950: tokens of figure 2, of the long-context stage the steps that section 2.6 gives for 7B
    stages = {"infilling": 500e9, "python": 100e9, "long-context": 3000 * 2**21}
    for stage, tokens in stages.items():
        training = load_recipe(f"code-llama/llama-2-7b-{stage}").training
        assert training.max_steps is not None
        assert abs(training.max_steps * training.global_batch / tokens - 1) < 1e-4
        assert training.betas == [0.9, 0.95] and round(1 / training.final_rate) == 30
    # the same paper's table 1: code, or Python and code; natural language related to code; natural language
    shares = {stage: [one.share for one in load_recipe(f"code-llama/llama-2-7b-{stage}").data] for stage in stages}
    assert shares["infilling"] == shares["long-context"] == [0.85, 0.08, 0.07]
    assert shares["python"] == [0.75, 0.10, 0.10, 0.05]
    python = load_recipe("code-llama/llama-2-7b-python")
    assert python.infilling is None and python.model.tokenizer is None and python.model.rope_scaling is None
    objectives = {name: load_recipe(name).training.objective for name in FAMILIES}
    assert {name for name, objective in objectives.items() if objective == "dpo"} == {
        name for name in FAMILIES if "-dpo" in name
    }


MIXTURE = {  # arXiv 2302.13971, table 1: CommonCrawl, C4, GitHub, Wikipedia, Books, ArXiv, StackExchange
    **{"fineweb": 0.67, "c4": 0.15, "stack-v2-edu": 0.045, "wikipedia": 0.045, "gutenberg": 0.045},
    **{"arxiv-papers": 0.025, "stackexchange": 0.02},
}


@pytest.mark.parametrize(("size", "tokens"), [("", 1.0), ("-13b", 1.0), ("-33b", 1.4), ("-65b", 1.4)])
def test_llamas_mixture_has_the_papers_shares_and_as_many_tokens(size: str, tokens: float) -> None:
    recipe, shares = load_recipe(f"pretrain/llama-1-mixture{size}"), dict.fromkeys(MIXTURE, 0.0)
    for source in recipe.data:
        assert source.use is not None and source.share is not None
        shares[source.use] += source.share
        assert source.quality == (["code"] if source.use == "stack-v2-edu" else [])  # no rule for prose judges code
    assert {use: round(share, 4) for use, share in shares.items()} == MIXTURE
    training = recipe.training
    assert training.max_steps is not None
    assert training.max_steps * training.global_batch / 1e12 == pytest.approx(tokens, rel=0.05)  # 4M, in powers of two
    assert (training.betas, training.weight_decay, training.max_grad_norm) == ([0.9, 0.95], 0.1, 1.0)
    assert training.final_rate == 0.1 and recipe.model.base == f"preset:llama-1{size or '-7b'}"
    assert recipe.model.starts_new and recipe.mixture.streaming


@pytest.mark.parametrize("name", FAMILIES)
def test_a_recipe_is_named_after_its_file_and_says_where_its_numbers_come_from(name: str) -> None:
    recipe = load_recipe(name)
    assert recipe.name == name.replace("/", "-")
    assert recipe.reproduces is not None and recipe.reproduces.source.startswith("https://")
    assert len(set(deviations(recipe))) == len(deviations(recipe)) >= 3


@pytest.mark.parametrize("name", FAMILIES)
def test_layouts_of_the_cards_fit_the_objective(name: str) -> None:
    recipe = load_recipe(name)
    for source in sources(recipe):
        assert source.use is not None, "a shipped recipe names a card"
        card = load_card(source.use)
        assert source.split in card.splits
        assert layout_fits(recipe.training.objective, card.layout) is None


@pytest.mark.parametrize("name", TWINS)
def test_a_laptop_twin_is_small(name: str) -> None:
    recipe = load_recipe(name)
    method = {"qlora": "qlora", "full": "full"}.get(name.rpartition("-")[2], "lora")
    if recipe.training.objective == "pretrain":  # the originals tune all weights
        method = "full"
    assert (recipe.model.base, recipe.adapter.method) == ("smollm2-135m", method)
    assert recipe.adapter.dora == name.endswith("-dora")
    assert recipe.launch.endswith("accelerate_configs/cpu.yaml")
    if recipe.training.objective == "pretrain":
        assert recipe.training.global_batch <= 16384 and recipe.training.micro_batch == 1
        assert recipe.sequence.max_length == (16384 if name.startswith("long-context/") else 1024)
        return
    documents = recipe.training.global_batch // (recipe.sampling.answers if recipe.training.objective in POLICY else 1)
    assert documents <= 32 and recipe.sequence.max_length <= 1024


@pytest.mark.parametrize("name", [name for name in TWINS if name.startswith("long-context/")])
def test_long_context_twins_differ_in_their_scaling_alone(name: str) -> None:
    recipe, yarn = load_recipe(name), load_recipe("long-context/smollm2-135m-16k-yarn")
    scaling = recipe.model.rope_scaling
    assert scaling is not None
    expected = {
        "yarn": {"rope_type": "yarn", "factor": 2.0},
        "linear": {"rope_type": "linear", "factor": 2.0},
        "theta": {"rope_type": "default", "rope_theta": 1e6},
    }
    assert scaling.parameters() == expected[name.rpartition("-")[2]]
    apart = {"name", "reproduces", "model"}
    assert recipe.model_dump(exclude=apart) == yarn.model_dump(exclude=apart)
    assert recipe.training.gradient_checkpointing is True and recipe.sequence.overlong == "split"


def test_the_infilling_twin_names_tokens_that_it_can_tell_apart(smollm2: Path) -> None:
    """SmolLM2's unused control tokens have one embedding; of the four none is near another."""
    import torch
    from safetensors.torch import load_file

    from llama_ft.data.infilling import InfillingTokens
    from llama_ft.tokenizer.load import load_tokenizer

    infilling = load_recipe("code-llama/smollm2-135m-infilling").infilling
    assert infilling is not None and infilling.tokens is not None
    tokenizer = load_tokenizer(smollm2)
    assert InfillingTokens.find(tokenizer, infilling.tokens).end == "<|endoftext|>"
    table = next(
        w for f in smollm2.glob("*.safetensors") for n, w in load_file(f).items() if "embed_tokens" in n
    ).float()

    def nearest(names: list[str]) -> float:
        rows = torch.nn.functional.normalize(table[tokenizer.convert_tokens_to_ids(names)], dim=-1)
        return float((rows @ rows.T - torch.eye(len(rows))).max())

    assert nearest(infilling.tokens) < 0.98 < nearest(["<file_sep>", "<gh_stars>", "<jupyter_code>", "<empty_output>"])


@pytest.mark.parametrize("name", STARTING_POINTS)
def test_a_starting_point_is_for_one_card_and_for_a_model_that_knows_the_template(name: str) -> None:
    recipe = load_recipe(name)
    assert recipe.name == name.rpartition("/")[2] and recipe.reproduces is None
    assert recipe.model.base.endswith("-Instruct") and recipe.template == "llama3-chat"
    assert recipe.launch.endswith("accelerate_configs/single_gpu.yaml")
    assert recipe.adapter.method == name.rpartition("-")[2]


def test_most_families_have_a_twin() -> None:
    found = {name.split("/")[0] for name in TWINS}
    assert {"alpaca", "vicuna", "code-llama", "guanaco", "llama-2-chat", "zephyr", "kto", "grpo"} <= found


@pytest.mark.parametrize("name", [name for name in FAMILIES if name.startswith("code") and name not in TWINS])
def test_code_is_kept_apart_from_the_benchmarks(name: str) -> None:
    mixture = load_recipe(name).mixture
    assert mixture.decontaminate and set(mixture.benchmarks) == {"humaneval", "mbpp"}
    assert {load_card(benchmark).layout for benchmark in mixture.benchmarks} == {"text"}


@pytest.mark.parametrize("name", shipped_cards())
def test_a_card_says_what_must_be_known_before_training(name: str) -> None:
    card = load_card(name)
    assert card.name == name
    assert card.title and card.licence and card.description
    assert set(card.rows or {}) <= set(card.splits)
    if isinstance(card.source, Hub):
        assert card.homepage and card.homepage.startswith("https://")


@pytest.mark.parametrize("name", [name for name in shipped_cards() if isinstance(load_card(name).source, Hub)])
def test_rows_with_the_published_columns_are_read_through_the_card(name: str) -> None:
    card, problems = load_card(name), Problems()
    check_layout(card.layout, card.columns, key=name)
    example = read_example(ROWS[name], card.layout, card.columns, "row 0", problems)
    assert not problems.count and example is not None and example.dropped is None
    assert example.text or [message["role"] for message in example.messages] == ["user", "assistant"]


def test_benchmarks_and_test_splits_stay_out_of_training() -> None:
    for name in FAMILIES:
        for source in load_recipe(name).data:
            assert source.use not in ("humaneval", "mbpp")
            assert source.split == "train" or source.use == "wikipedia"  # its splits are languages


@pytest.mark.skipif(not PAGE.is_file(), reason="the documentation is not shipped with the package")
def test_the_page_names_every_recipe_and_every_card_that_a_family_trains_on() -> None:
    text = PAGE.read_text(encoding="utf-8")
    used = {source.use for name in FAMILIES for source in sources(load_recipe(name))}
    missing = [name for name in (*FAMILIES, *used) if f"`{name}`" not in text]
    assert not missing


def deviations(recipe: Recipe) -> list[str]:
    assert recipe.reproduces is not None
    return recipe.reproduces.deviations


def sources(recipe: Recipe) -> list[Data]:
    return [*recipe.data, *(recipe.eval_data if isinstance(recipe.eval_data, list) else [])]

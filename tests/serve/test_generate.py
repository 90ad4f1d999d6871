"""Our token loop against transformers' generate, and its cache against none."""

from __future__ import annotations

import pytest
import torch
from transformers import AutoTokenizer, LlamaForCausalLM

from llama_ft.serve.generate import Generator, pick
from llama_ft.serve.source import Opened, open_source

GREEDY = {"max_tokens": 40, "temperature": 0.0, "top_p": 1.0}


@pytest.fixture(scope="module")
def opened(run) -> Opened:
    return open_source(str(run.path))


@pytest.fixture
def generator(opened) -> Generator:
    return Generator(opened.model, opened.stop, opened.context)


def prompt(opened: Opened, *texts: str) -> list[int]:
    roles = ["user", "assistant"] * 9
    turns = [{"role": role, "content": text} for role, text in zip(roles, texts, strict=False)]
    return opened.renderer.prompt_ids(turns)


def fresh(opened: Opened, ids: list[int]) -> list[int]:
    return list(Generator(opened.model, opened.stop, opened.context).stream(ids, **GREEDY))


@pytest.mark.parametrize("number", range(4))
def test_greedy_equals_transformers_generate_on_the_merged_model(run, opened, generator, number):
    model = LlamaForCausalLM.from_pretrained(run.merged)
    tokenizer = AutoTokenizer.from_pretrained(run.merged)
    turns = [{"role": "user", "content": f"What does llama number {number} eat?"}]
    inputs = tokenizer.apply_chat_template(turns, add_generation_prompt=True, return_tensors="pt", return_dict=True)
    expected = model.generate(**inputs, max_new_tokens=40)[0, inputs["input_ids"].shape[1] :].tolist()
    ids = prompt(opened, turns[0]["content"])
    assert ids == inputs["input_ids"][0].tolist()
    found = list(generator.stream(ids, **GREEDY))
    assert found == [token for token in expected if token != 2]
    assert len(found) > 5


def test_the_cache_of_the_last_turn_is_used_and_changes_nothing(opened, generator, monkeypatch):
    first = prompt(opened, "What does llama 3 eat?")
    answer = list(generator.stream(first, **GREEDY))
    fed = []
    forward = opened.model.forward

    def spy(*args, input_ids, **kwargs):
        fed.append(input_ids.shape[1])
        return forward(*args, input_ids=input_ids, **kwargs)

    monkeypatch.setattr(opened.model, "forward", spy)
    # the same words again, as ids: what the user sees as the next turn
    second = [*first, *answer, 2, 5, 6, 7]
    found = list(generator.stream(second, **GREEDY))
    # all but the last token of an answer has been through the model
    assert fed[0] == len(second) - len(first) - len(answer) + 1
    assert set(fed[1:]) == {1}
    assert found == fresh(opened, second)
    # … an edited history: only what is common stays
    fed.clear()
    third = [*first[:8], 9, *first[8:]]
    found = list(generator.stream(third, **GREEDY))
    assert fed[0] == len(third) - 8
    assert found == fresh(opened, third)
    # … the very same prompt: its last token is asked again
    fed.clear()
    assert list(generator.stream(third, **GREEDY)) == found
    assert fed[0] == 1
    # … another beginning: nothing is common
    fed.clear()
    other = [7, *third]
    assert list(generator.stream(other, **GREEDY)) == fresh(opened, other)
    assert fed[0] == len(other)


def test_an_interruption_leaves_a_cache_that_is_right(opened, generator, monkeypatch):
    ids = prompt(opened, "What does llama 3 eat?")
    layer = opened.model.model.layers[1]
    forward = layer.forward
    calls = 0

    def interrupted(*args, **kwargs):
        nonlocal calls
        calls += 1
        if calls == 4:  # layer 0 has cached the token, layer 1 has not
            raise KeyboardInterrupt
        return forward(*args, **kwargs)

    monkeypatch.setattr(layer, "forward", interrupted)
    with pytest.raises(KeyboardInterrupt):
        list(generator.stream(ids, **GREEDY))
    monkeypatch.undo()
    assert list(generator.stream(ids, **GREEDY)) == fresh(opened, ids)


def test_a_caller_that_stops_early_leaves_a_cache_that_is_right(opened, generator):
    ids = prompt(opened, "What does llama 3 eat?")
    stream = generator.stream(ids, **GREEDY)
    begun = [next(stream) for _ in range(3)]
    stream.close()
    assert list(generator.stream([*ids, *begun, 2, 8], **GREEDY)) == fresh(opened, [*ids, *begun, 2, 8])


def test_it_stops(opened):
    ids = prompt(opened, "What does llama 3 eat?")
    free = fresh(opened, ids)
    stopping = Generator(opened.model, opened.stop | {free[4]}, opened.context)
    assert list(stopping.stream(ids, **GREEDY)) == free[: free.index(free[4])]
    assert list(stopping.stream(ids, **{**GREEDY, "max_tokens": 2})) == free[:2]
    short = Generator(opened.model, opened.stop, len(ids) + 3)
    assert list(short.stream(ids, **GREEDY)) == free[:3]


def test_a_seed_repeats_itself(opened):
    ids = prompt(opened, "What does llama 3 eat?")
    hot = {"max_tokens": 20, "temperature": 1.5, "top_p": 1.0}
    draws = [list(Generator(opened.model, opened.stop, opened.context, seed).stream(ids, **hot)) for seed in (1, 1, 2)]
    assert draws[0] == draws[1] != draws[2]
    assert fresh(opened, ids) not in draws


def shares(logits: list[float], temperature: float, top_p: float, draws: int = 4000) -> list[float]:
    random = torch.Generator().manual_seed(0)
    counts = [0] * len(logits)
    for _ in range(draws):
        counts[pick(torch.tensor(logits), temperature, top_p, random)] += 1
    return [count / draws for count in counts]


def test_sampling():
    logits = torch.tensor([0.1, 0.5, 0.3, 0.1]).log().tolist()
    assert pick(torch.tensor(logits), 0.0, 1.0, torch.Generator()) == 1
    assert shares(logits, 1.0, 1.0) == pytest.approx([0.1, 0.5, 0.3, 0.1], abs=0.03)
    # squared and normalised: (.01, .25, .09, .01) / .36
    assert shares(logits, 0.5, 1.0) == pytest.approx([0.028, 0.694, 0.25, 0.028], abs=0.03)
    # the smallest set that reaches 0.7 is {0.5, 0.3}
    assert shares(logits, 1.0, 0.7) == pytest.approx([0, 0.625, 0.375, 0], abs=0.03)
    assert shares(logits, 1.0, 0.4, 50) == [0, 1, 0, 0]
    assert shares(logits, 1.0, 0.0, 50) == [0, 1, 0, 0]

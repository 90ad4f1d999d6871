"""What a subject measures and answers, beside plain transformers."""

from __future__ import annotations

import pytest
import torch
from transformers import LlamaForCausalLM

import llama_ft.evaluate.subject as module
from llama_ft.data.render import MASKED
from llama_ft.errors import UserError
from llama_ft.evaluate.answers import read_answer
from llama_ft.evaluate.opening import open_model
from llama_ft.evaluate.subject import Subject
from llama_ft.llama.sampling import Sampled


@pytest.fixture(scope="module")
def prompts(subjects) -> list[list[int]]:
    """Of different lengths."""
    renderer = subjects["merged"].renderer
    asked = ["Hay?", "What does llama number 3 eat on hill 4?", "grass " * 20, "Who sleeps near the river?", "Hill"]
    return [renderer.prompt_ids([{"role": "user", "content": text}]) for text in asked]


@pytest.fixture(scope="module")
def plain(tiny_run) -> LlamaForCausalLM:
    return LlamaForCausalLM.from_pretrained(tiny_run.merged, dtype=torch.float32).eval()


@torch.no_grad()
def generated(model, prompt: list[int], tokens: int, stop: frozenset[int]) -> list[int]:
    """Greedy tokens that transformers adds to one prompt."""
    ids = torch.tensor([prompt])
    mask = torch.ones_like(ids)
    said = model.generate(
        ids, attention_mask=mask, max_new_tokens=tokens, do_sample=False, eos_token_id=sorted(stop), pad_token_id=0
    )
    return said[0, len(prompt) :].tolist()


@torch.no_grad()
def cost(model, ids: list[int], labels: list[int]) -> tuple[float, int, int]:
    """Nats, labelled tokens and right guesses of one document, by transformers alone."""
    log_probs = torch.log_softmax(model(torch.tensor([ids])).logits[0].double(), -1)
    kept = [t for t in range(1, len(ids)) if labels[t] != MASKED]
    nats = -sum(log_probs[t - 1, labels[t]].item() for t in kept)
    return nats, len(kept), sum(int(log_probs[t - 1].argmax()) == labels[t] for t in kept)


def test_greedy_answers_are_those_of_generate_row_by_row(subjects, plain, prompts):
    subject = subjects["merged"]
    answers = subject.answers(prompts, 48)
    for prompt, [answer] in zip(prompts, answers, strict=True):
        assert answer.tokens == generated(plain, prompt, 48, subject.stop)
        assert answer.ended == ("end" if answer.tokens[-1] in subject.stop else "length")
    assert len({tuple(answer.tokens) for [answer] in answers}) == len(prompts)


def test_greedy_answers_of_smollm2_are_those_of_generate(smollm2):
    """The real model, cut off nowhere: 4 questions of different lengths, 16 tokens each."""
    subject = open_model(str(smollm2))
    asked = [
        "Hi",
        "What is the capital of France?",
        "Count from 1 to 20.",
        "Name three rivers in South America, please.",
    ]
    prompts = [subject.renderer.prompt_ids([{"role": "user", "content": text}]) for text in asked]
    model = LlamaForCausalLM.from_pretrained(smollm2, dtype=torch.float32).eval()
    answers = subject.answers(prompts, 16)
    assert [answer.tokens for [answer] in answers] == [generated(model, one, 16, subject.stop) for one in prompts]
    assert "Paris" in answers[1][0].text
    assert answers[1][0].ended == "end"


def test_memory_decides_what_is_drawn_together_and_changes_nothing(subjects, prompts, monkeypatch):
    subject = subjects["merged"]
    together = subject.answers(prompts, 24, temperature=1.0, samples=2)
    monkeypatch.setitem(module.CACHE_BYTES, "cpu", 1)  # each prompt alone
    assert len(list(subject._batches([len(p) for p in prompts], 24, 2))) == len(prompts)
    assert subject.answers(prompts, 24, temperature=1.0, samples=2) == together


def test_samples_differ_and_a_seed_repeats_them(subjects, prompts):
    subject = subjects["merged"]
    drawn = subject.answers(prompts[:2], 16, temperature=1.5, samples=3, seed=1)
    assert drawn == subject.answers(prompts[:2], 16, temperature=1.5, samples=3, seed=1)
    assert drawn != subject.answers(prompts[:2], 16, temperature=1.5, samples=3, seed=2)
    assert len({tuple(one.tokens) for group in drawn for one in group}) == 6


def test_a_stop_string_ends_an_answer_before_itself(subjects, prompts):
    subject = subjects["merged"]
    [[free]] = subject.answers(prompts[1:2], 40)
    string = free.text[6:9]
    assert string
    [[cut]] = subject.answers(prompts[1:2], 40, stop=["never said", string])
    assert cut.ended == "stop"
    assert cut.text == free.text[: free.text.index(string)]
    # … and no token is computed after it
    assert cut.tokens == free.tokens[: len(cut.tokens)] and len(cut.tokens) < len(free.tokens)
    shorter = subject.tokenizer.decode(cut.tokens[:-1], skip_special_tokens=True)
    assert string not in shorter


def test_an_answer_has_the_room_that_its_prompt_leaves(subjects, prompts):
    subject = subjects["merged"]
    filled = (prompts[1] * 40)[: subject.context - 3]
    full = (prompts[1] * 40)[: subject.context]
    long, none, short, nothing = subject.answers([filled, full, prompts[0], []], 8)
    assert len(long[0].tokens) <= 3
    assert none[0].tokens == [] and none[0].ended == "length" and none[0].text == ""
    assert short == subject.answers(prompts[:1], 8)[0]
    assert nothing[0].tokens == []


def test_documents_cost_what_transformers_says(subjects, plain, prompts):
    documents = []
    for number, prompt in enumerate(prompts):
        ids = [*prompt, *prompts[number - 1], 2]
        labels = [MASKED] * len(prompt) + ids[len(prompt) :]
        documents.append((ids, labels))
    documents.append((prompts[0], [MASKED] * len(prompts[0])))  # nothing labelled
    documents.append((prompts[0], prompts[0]))  # all labelled, but the first token is predicted by nothing
    costs = subjects["merged"].costs(documents)
    for found, (ids, labels) in zip(costs, documents, strict=True):
        nats, tokens, hits = cost(plain, ids, labels)
        assert (found.tokens, found.hits) == (tokens, hits)
        assert found.nats == pytest.approx(nats, rel=1e-4)
    assert subjects["merged"].nll(documents) == [(one.nats, one.tokens) for one in costs]


def test_documents_do_not_see_each_other(subjects, prompts, monkeypatch):
    documents = [(ids, ids) for ids in prompts]
    packed = subjects["merged"].costs(documents)
    monkeypatch.setitem(module.READ_AT_ONCE, "cpu", 1)
    ticks: list[int] = []
    alone = subjects["merged"].costs(documents, ticks.append)
    assert ticks == [1] * len(prompts)
    assert [one.nats for one in packed] == pytest.approx([one.nats for one in alone], rel=1e-5)


def test_a_loss_is_that_of_training(subjects, prompts):
    """Nats over tokens are what the model's own loss head answers."""
    ids = prompts[2]
    labels = [MASKED] * 4 + ids[4:]
    subject = subjects["tuned"]
    with torch.no_grad():
        loss = subject.model(input_ids=torch.tensor([ids]), labels=torch.tensor([labels])).loss.item()
    [(nats, tokens)] = subject.nll([(ids, labels)])
    assert nats / tokens == pytest.approx(loss, rel=1e-5)


def test_endings_of_a_shared_prompt_cost_what_they_cost_alone(subjects, plain, prompts):
    questions = [(prompts[0], [[5, 6, 7], [9]]), (prompts[1], [prompts[2][:5], prompts[3][:2], [8, 8]])]
    found = subjects["merged"].endings(questions)
    for (prompt, endings), said in zip(questions, found, strict=True):
        for ending, nats in zip(endings, said, strict=True):
            labels = [MASKED] * len(prompt) + ending
            assert -nats == pytest.approx(cost(plain, [*prompt, *ending], labels)[0], rel=1e-4)
    assert subjects["merged"].endings([(prompts[0], [[], [5, 6, 7]])])[0] == pytest.approx([0.0, found[0][0]], rel=1e-4)
    assert subjects["merged"]._endings_apart(questions, None)[1] == pytest.approx(found[1], rel=1e-4)


def test_a_document_that_is_too_long_is_told(subjects):
    subject: Subject = subjects["base"]
    ids = [5] * (subject.context + 1)
    with pytest.raises(UserError, match="item 0 is 513 tokens long, base reads 512"):
        subject.costs([(ids, ids)])


def test_a_text_begins_with_the_space_that_it_was_said_with(subjects, prompts):
    """Decoded after its prompt: what is cut from a completion of code must be put behind it as it is."""
    subject = subjects["merged"]
    space = subject.tokenizer.encode(" grass", add_special_tokens=False)
    assert read_answer(subject.tokenizer, prompts[0], Sampled(space, False), []).text == " grass"


def test_merged_answers_as_tuned_and_base_otherwise(subjects, prompts):
    said = {name: [answer.tokens for [answer] in one.answers(prompts, 24)] for name, one in subjects.items()}
    assert said["tuned"] == said["merged"] != said["base"]

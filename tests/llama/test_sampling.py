"""Answers drawn many at a time: beside transformers' generate, by their own seeds, and as likely as the model says."""

from __future__ import annotations

import pytest
import torch
from transformers import LlamaForCausalLM as Reference

from llama_ft.adapters.lora import attach_lora
from llama_ft.llama import sampling
from llama_ft.llama.fast import Fast
from llama_ft.llama.model import LlamaForCausalLM
from llama_ft.llama.projections import project
from llama_ft.llama.sampling import Sampled, sample
from llama_ft.recipe.schema import Adapter
from tests.llama.conftest import SHAPES

PROMPTS = [[7, 8, 9, 10, 11], [5], [20, 21, 22], list(range(40, 77))]


def make(shape: str = "llama-3.2-tied") -> LlamaForCausalLM:
    torch.manual_seed(0)
    model = LlamaForCausalLM(SHAPES[shape]).eval()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "norm" not in name:
                parameter.mul_(10)  # blocks that say more than the token itself, probabilities that differ
    return model


def draw(model, prompts=PROMPTS, *, answers=3, seeds=None, **asked) -> list[list[Sampled]]:
    settings = {"max_new_tokens": 20, "temperature": 1.0, "top_p": 1.0, "stop": frozenset()} | asked
    seeds = list(range(100, 100 + len(prompts) * answers)) if seeds is None else seeds
    return sample(model, prompts, answers=answers, seeds=seeds, **settings)


def flat(groups: list[list[Sampled]]) -> list[Sampled]:
    return [answer for group in groups for answer in group]


def by_hand(reference, prompt: list[int], new: int) -> list[int]:
    """Greedy, by transformers' generate."""
    ids = torch.tensor([prompt])
    mask = torch.ones_like(ids)
    out = reference.generate(
        ids, attention_mask=mask, do_sample=False, max_new_tokens=new, pad_token_id=0, eos_token_id=None
    )
    return out[0, len(prompt) :].tolist()


@pytest.mark.parametrize("shape", SHAPES)
def test_greedy_equals_generate(shape, monkeypatch):
    """Over every shape of heads; answers outgrow their first room, prompts are read in several passes."""
    monkeypatch.setattr(sampling, "GROWTH", 4)
    monkeypatch.setattr(sampling, "READ_AT_ONCE", 8)
    ours = make(shape)
    reference = Reference(SHAPES[shape]).eval()
    reference.load_state_dict(ours.state_dict())
    found = draw(ours, answers=2, temperature=0.0)
    for prompt, group in zip(PROMPTS, found, strict=True):
        expected = by_hand(reference, prompt, 20)
        assert len(set(expected)) > 3, "an answer that says something"
        assert group == [Sampled(expected, False)] * 2


def test_an_adapter_acts_and_all_is_left_as_it_was():
    base = make()
    plain = draw(base, temperature=0.0)
    assert all(layer.mlp.project is project for layer in base.model.layers)
    model = attach_lora(base, Adapter(r=4, dropout=0.5))
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(parameter, std=0.5)
    model.train()
    base.model.layers[1].eval()
    modes = [module.training for module in model.modules()]
    random = torch.get_rng_state()
    found = draw(model, temperature=0.0)
    assert [module.training for module in model.modules()] == modes
    assert torch.equal(torch.get_rng_state(), random)
    assert found != plain
    with model.disable_adapter():
        assert draw(model, temperature=0.0) == plain
    for prompt, group in zip(PROMPTS, found, strict=True):
        ids = prompt + group[0].ids
        with torch.no_grad():
            best = model.eval()(input_ids=torch.tensor([ids])).logits[0].argmax(-1)
        assert best[len(prompt) - 1 : -1].tolist() == group[0].ids


def test_an_answer_depends_on_its_seed_alone(monkeypatch):
    """Whatever is drawn beside it, in whatever order, and whenever answers leave."""
    model, stop = make(), frozenset(range(0, 307, 9))
    seeds = [3, 2**63 + 3, 17, 3, 5, 6, 7, 8, 9, 10, 11, 2**63 + 11]
    whole = draw(model, seeds=seeds, stop=stop)
    assert len({tuple(answer.ids) for answer in flat(whole)}) == 12
    assert len({len(answer.ids) for answer in flat(whole)}) > 3
    for number, prompt in enumerate(PROMPTS):
        for answer in range(3):
            alone = draw(model, [prompt], answers=1, seeds=[seeds[3 * number + answer]], stop=stop)
            assert alone == [[whole[number][answer]]]
    turned = draw(model, PROMPTS[::-1], seeds=seeds[::-1], stop=stop)
    assert [group[::-1] for group in turned[::-1]] == whole
    for idle in (0.0, 1.0):  # answers leave at once, or never
        monkeypatch.setattr(sampling, "IDLE", idle)
        assert draw(model, seeds=seeds, stop=stop) == whole
    longer = draw(model, seeds=seeds, stop=stop, max_new_tokens=30)
    for a, b in zip(flat(whole), flat(longer), strict=True):
        assert b.ids[: len(a.ids)] == a.ids
    assert draw(model, seeds=[seed + 1 for seed in seeds], stop=stop) != whole


def test_stop_tokens_end_an_answer():
    model = make()
    free = draw(model)
    stop = frozenset({free[0][1].ids[6], free[3][2].ids[0]})
    ended = draw(model, stop=stop)
    for a, b in zip(flat(free), flat(ended), strict=True):
        until = next((i + 1 for i, token in enumerate(a.ids) if token in stop), len(a.ids))
        assert b == Sampled(a.ids[:until], a.ids[until - 1] in stop)
    assert {answer.ended for answer in flat(ended)} == {True, False}


def chi_square(counts: torch.Tensor, probabilities: torch.Tensor) -> float:
    """Standard deviations above what chance gives: those that expect fewer than 5 are one cell, with the least."""
    expected = probabilities.double() * counts.sum()
    rare = expected <= max(5.0, float(expected.min()))
    cells = [torch.cat([t[~rare], t[rare].sum()[None]]) for t in (counts.double(), expected)]
    statistic, freedom = ((cells[0] - cells[1]) ** 2 / cells[1]).sum(), len(cells[0]) - 1
    return float((statistic - freedom) / (2 * freedom) ** 0.5)


@torch.no_grad()
@pytest.mark.parametrize("top_p", [1.0, 0.7])
def test_tokens_are_as_likely_as_the_model_says(top_p):
    """The first two tokens of 4,000 answers, the second one after the commonest first; and the test can fail."""
    model, prompt, n = make(), PROMPTS[0], 4000
    drawn = draw(model, [prompt], answers=n, max_new_tokens=2, temperature=0.8, top_p=top_p)[0]
    ids = torch.tensor([answer.ids for answer in drawn])
    common = int(ids[:, 0].mode().values)
    assert (ids[:, 0] == common).sum() > 500
    for tokens, before in ((ids[:, 0], prompt), (ids[ids[:, 0] == common, 1], [*prompt, common])):
        logits = model(input_ids=torch.tensor([before])).logits[0, -1]
        counts = tokens.bincount(minlength=307)
        for temperature, wrong in ((0.8, False), (0.9, True)):
            p, order = torch.softmax(logits / temperature, -1).sort(descending=True)
            inside = p.cumsum(0) - p < top_p
            p = torch.zeros(307).scatter(0, order, p * inside)
            assert int(counts[p == 0].sum()) == 0 or wrong
            off = chi_square(counts[p > 0], p[p > 0] / p.sum())
            assert off > 8 if wrong and len(tokens) == n else off < 5 or wrong, (off, temperature)


@pytest.mark.parametrize("count", [1, 5, 256, 257, 1000])
def test_the_drawn_token_is_where_the_sums_pass_the_chance(count):
    """Beside one sum over all tokens in float64; a token of probability 0 is never drawn, at either end."""
    generator = torch.Generator().manual_seed(count)
    p = torch.softmax(4 * torch.randn(200, count, generator=generator), -1)
    p[:, torch.rand(count, generator=generator) < 0.3] = 0
    p[:, : count // 3] = p[:, count - count // 3 :] = 0
    p[:, count // 2] += 1e-9
    chance = torch.rand(200, generator=generator, dtype=torch.float64)
    chance[:2] = torch.tensor([0.0, 1 - 2**-53], dtype=torch.float64)
    found = sampling._inverse(p, chance)
    sums = p.double().cumsum(-1)
    assert torch.equal(found, torch.searchsorted(sums, (chance * sums[:, -1])[:, None], right=True))
    assert (p.gather(1, found) > 0).all()


def test_a_wide_nucleus_is_sorted_whole(monkeypatch):
    model = make()
    whole = draw(model, top_p=0.95)
    monkeypatch.setattr(sampling, "NUCLEUS", 4)
    assert draw(model, top_p=0.95) == whole
    assert draw(model, top_p=1e-9) == draw(model, temperature=0.0), "the best token is always in the set"


def test_the_kernel_for_prompts_is_the_models():
    model = make()
    whole = draw(model)
    model.model.set_fast(Fast(attention="flex"))
    assert draw(model) == whole


@torch.no_grad()
@pytest.mark.parametrize("autocast", [False, True])
def test_sixteen_bits(autocast):
    """Greedy tokens are the best ones of the same weights in float32, but where two are nearly as good."""
    model = make().to(torch.bfloat16)
    exact = make().to(torch.bfloat16).float()
    with torch.autocast("cpu", dtype=torch.bfloat16, enabled=autocast):
        found = draw(exact if autocast else model, temperature=0.0)
    for prompt, group in zip(PROMPTS, found, strict=True):
        logits = exact(input_ids=torch.tensor([prompt + group[0].ids])).logits[0, len(prompt) - 1 : -1]
        gaps = logits.amax(-1) - logits.gather(-1, torch.tensor(group[0].ids)[:, None]).squeeze(-1)
        assert gaps.max() <= 0.1 * logits.std(), gaps


def test_a_batch_of_nothing_and_what_is_refused():
    model = make()
    assert draw(model, []) == []
    assert draw(model, answers=0) == [[], [], [], []]
    with pytest.raises(ValueError, match="seeds"):
        draw(model, seeds=[1])
    for wrong in ({"prompts": [[]]}, {"max_new_tokens": 0}):
        with pytest.raises(ValueError, match="one token or more"):
            draw(model, **wrong)
    config = SHAPES["llama-1"].to_dict() | {"rope_parameters": {"rope_type": "dynamic", "rope_theta": 1e4, "factor": 2}}
    dynamic = LlamaForCausalLM(SHAPES["llama-1"].__class__(**config)).eval()
    assert len(draw(dynamic)[3][0].ids) == 20
    with pytest.raises(ValueError, match="dynamic"):
        draw(dynamic, max_new_tokens=28)

"""Scaling laws against what their papers print, hours against what LLaMA took, shapes against LLaMA's own."""

from __future__ import annotations

import math

import pytest

from llama_ft.llama.shapes import PRESETS
from llama_ft.plan.compute import (
    BESIROGLU,
    FITS,
    HOFFMANN,
    Fit,
    Point,
    extrapolated,
    rule_for_compute,
)
from llama_ft.plan.compute_runs import CARD, LLAMA, LLAMA_2, PUBLISHED, UTILISATION, gpu_hours, said_utilisation
from llama_ft.plan.compute_shape import aspect, exact_flops, inner_width, nearest_presets, suggest

GOPHER = 5.76e23
"""FLOP of Gopher, and of Chinchilla (arXiv 2203.15556, table 3)."""
SARDANA = Fit("", 1.69, 406.4, 410.7, 0.336, 0.283, "arXiv 2401.00448, appendix A")


@pytest.mark.parametrize("fit", FITS, ids=lambda fit: fit.name)
@pytest.mark.parametrize("compute", [1e18, 1e21, GOPHER, 1e26])
def test_the_optimum_of_a_budget_is_the_lowest_loss_on_it(fit: Fit, compute: float) -> None:
    best = fit.for_compute(compute)
    assert best.compute == pytest.approx(compute)
    around = [Point(best.parameters * by, best.tokens / by) for by in (0.5, 0.9, 0.99, 1.01, 1.1, 2.0)]
    assert all(fit.loss(point) > fit.loss(best) for point in around)
    # One line of optima, whichever side it is entered from.
    for same in (fit.for_parameters(best.parameters), fit.for_tokens(best.tokens), fit.for_loss(fit.loss(best))):
        assert same.parameters == pytest.approx(best.parameters) and same.tokens == pytest.approx(best.tokens)
    assert fit.pays_from(best) == pytest.approx(0, abs=1e-6 * best.tokens)


def test_chinchillas_own_projections() -> None:
    """Figure 4 says 40B for Gopher's compute, table 2 says a 0.46 and b 0.54; the text's rounded constants say 32B."""
    assert HOFFMANN.for_compute(GOPHER).parameters == pytest.approx(40e9, rel=0.02)
    a = math.log(HOFFMANN.for_compute(1e22).parameters / HOFFMANN.for_compute(1e21).parameters, 10)
    assert round(a, 2) == 0.46 and round(1 - a, 2) == 0.54
    rounded = Fit("", 1.69, 406.4, 410.7, 0.34, 0.28, "equation 10 of arXiv 2203.15556")
    assert rounded.for_compute(GOPHER).parameters == pytest.approx(32e9, rel=0.01)
    assert [round(getattr(HOFFMANN, name), 4) for name in ("e", "a", "b", "alpha", "beta")] == [
        1.6934, 406.4010, 410.7228, 0.3392, 0.2849,
    ]  # fmt: skip


@pytest.mark.parametrize(
    ("parameters", "flops", "tokens"),
    [(400e6, 2.21e19, 9.2e9), (1e9, 1.62e20, 27.1e9), (10e9, 2.46e22, 410.1e9), (67e9, 1.71e24, 4.1e12)],
)
def test_table_a3_of_chinchilla(parameters: float, flops: float, tokens: float) -> None:
    """Approach 3 there; the constants that are published give it to 11 %, rounded as they are in the text to 77 %."""
    found = HOFFMANN.for_parameters(parameters)
    assert found.compute == pytest.approx(flops, rel=0.11) and found.tokens == pytest.approx(tokens, rel=0.11)


def test_the_replication_agrees_with_chinchilla_itself_and_with_twenty() -> None:
    """70B on 1.4T, by approaches 1 and 2 and by the replicated third."""
    table_1 = {"e": 1.8172, "a": 482.01, "b": 2085.43, "alpha": 0.3478, "beta": 0.3658}
    assert {name: getattr(BESIROGLU, name) for name in table_1} == table_1
    found = BESIROGLU.for_compute(GOPHER)
    assert found.parameters == pytest.approx(70e9, rel=0.05) and 17 < found.ratio < 20
    rule = rule_for_compute(GOPHER)
    assert rule.tokens == 20 * rule.parameters and rule.compute == pytest.approx(GOPHER)


@pytest.mark.parametrize(
    ("parameters", "served", "smaller", "longer", "saved"),
    [(13e9, 2e12, 7.0e9, None, 0.17), (7e9, 1e11, 6.0e9, 1.18, None), (30e9, 1e13, 13.6e9, 2.84, 0.28),
     (70e9, 1e13, 41.6e9, 7.92 / 4.26, 0.12)],
)  # fmt: skip
def test_the_examples_of_sardana_and_frankle(parameters, served, smaller, longer, saved) -> None:
    """arXiv 2401.00448, figure 1, section 2 and appendix B.1, to the digits that are printed."""
    before = SARDANA.for_parameters(parameters)
    after = SARDANA.served(SARDANA.loss(before), served)
    assert after.parameters == pytest.approx(smaller, rel=0.005)
    assert SARDANA.loss(after) == pytest.approx(SARDANA.loss(before))
    if longer is not None:
        assert after.tokens / before.tokens == pytest.approx(longer, abs=0.006)
    if saved is not None:
        assert 1 - after.lifetime(served) / before.lifetime(served) == pytest.approx(saved, abs=0.005)
    if parameters == 13e9:
        assert before.lifetime(served) - after.lifetime(served) == pytest.approx(1.7e22, rel=0.01)


@pytest.mark.parametrize("fit", FITS, ids=lambda fit: fit.name)
@pytest.mark.parametrize("served", [0.0, 1e10, 1e12, 1e15, 1e20])
def test_serving_makes_models_smaller_by_the_least_sum(fit: Fit, served: float) -> None:
    loss = fit.loss(fit.for_compute(1e22))
    best = fit.served(loss, served)
    assert fit.loss(best) == pytest.approx(loss, rel=1e-9)
    for by in (0.999, 1.001):
        tokens = fit.tokens_for(loss, best.parameters * by)
        assert tokens is None or Point(best.parameters * by, tokens).lifetime(served) > best.lifetime(served)
    if served < 1e15:  # beyond, tokens are infinitely steep in parameters
        assert fit.pays_from(best) == pytest.approx(served, rel=1e-3, abs=1e-3 * best.tokens)
    assert fit.tokens_for(loss, 1e6) is None


def test_what_the_fits_have_seen() -> None:
    assert not extrapolated(Point(7e9, 300e9))
    assert extrapolated(Point(7e9, 1e12)) and extrapolated(Point(17e9, 1e11)) and extrapolated(Point(60e6, 1e10))


PRINTED = {"7B": 82_432, "13B": 135_168, "33B": 530_432, "65B": 1_022_362}


@pytest.mark.parametrize("one", [one for one in PUBLISHED if one.family == LLAMA], ids=lambda one: one.size)
def test_hours_of_llama_within_ten_percent(one) -> None:
    """arXiv 2302.13971, table 15, at 47 % of 312 TFLOP/s, from shapes and tokens."""
    tokens = {"7B": 1e12, "13B": 1e12, "33B": 1.4e12, "65B": 1.4e12}[one.size]
    by_hand = 6 * PRESETS[one.preset].parameters * tokens / (312e12 * 0.47) / 3600
    assert one.hours == PRINTED[one.size] and UTILISATION == 0.47 and CARD.flops == 312e12
    assert one.planned() == pytest.approx(by_hand)
    assert one.planned() == pytest.approx(one.hours, rel=0.10)


def test_the_exact_flop_are_hours_within_thirteen_percent() -> None:
    """Attention and head counted, the 13B is 12 % off: it ran at more of the card than the others."""
    off = {one.size: one.planned(exact=True) / one.hours - 1 for one in PUBLISHED if one.family == LLAMA}
    assert {size: round(100 * part, 1) for size, part in off.items()} == {
        "7B": -4.6,
        "13B": 12.2,
        "33B": -0.2,
        "65B": 3.6,
    }
    shares = {one.size: one.utilisation(exact=True) for one in PUBLISHED if one.family == LLAMA}
    assert max(shares, key=shares.__getitem__) == "13B"


def test_were_all_layers_computed_again() -> None:
    """The formula of docs/plan.md with R = 1: 56 to 66 % of the card."""
    shares = []
    for one in [one for one in PUBLISHED if one.family == LLAMA]:
        shape = one.shape
        again = 2 * shape.linear_weights - 2 * shape.layers * shape.hidden * shape.intermediate
        again += 2 * shape.layers * shape.hidden * 2048
        shares.append((one.exact + again * one.tokens) / (one.hours * 3600 * 312e12))
    assert round(min(shares), 2) == 0.56 and round(max(shares), 2) == 0.66


def test_the_papers_own_speed_is_the_utilisation() -> None:
    """380 tokens/s per A100 for the 65B, 21 days on 2,048 (arXiv 2302.13971 §2.4)."""
    big = next(one for one in PUBLISHED if one.size == "65B")
    assert big.rate == pytest.approx(380, abs=1) and said_utilisation() == pytest.approx(0.477, abs=5e-4)
    assert big.utilisation() == pytest.approx(said_utilisation(), rel=0.005)
    assert big.hours / 2048 / 24 == pytest.approx(21, rel=0.02)


def test_llama_2_reached_less_of_its_cards() -> None:
    shares = {one.size: round(100 * one.utilisation()) for one in PUBLISHED if one.family == LLAMA_2}
    assert shares == {"7B": 39, "13B": 38, "70B": 43}
    assert {one.size: one.hours for one in PUBLISHED if one.family == LLAMA_2} == {
        "7B": 184_320, "13B": 368_640, "70B": 1_720_320,
    }  # fmt: skip


def test_exact_flop_by_hand() -> None:
    """LLaMA 7B in rows of 2,048: 6 per weight of blocks and head, 3.5 causal attentions."""
    blocks = 32 * (4 * 4096**2 + 3 * 4096 * 11008)
    attention = 2 * 32 * 4096 * 2048
    expected = 6 * (blocks + 32_000 * 4096) + 3.5 * attention
    assert exact_flops(PRESETS["llama-1-7b"], 2048) == pytest.approx(expected)
    assert gpu_hours(3600e12, 1e12, 0.5) == 2


@pytest.mark.parametrize("name", ["llama-1-7b", "llama-1-13b", "llama-1-33b", "llama-1-65b"])
def test_llamas_shapes_are_suggested_for_their_sizes(name: str) -> None:
    theirs = PRESETS[name]
    ours = suggest(theirs.parameters)
    assert ours is not None
    for key in ("hidden", "layers", "heads", "kv_heads", "intermediate", "vocabulary", "parameters"):
        assert getattr(ours, key) == getattr(theirs, key), key


@pytest.mark.parametrize("parameters", [5e6, 3e7, 1.35e8, 1e9, 3e9, 2e10, 4e11, 1e13, 1e15])
def test_any_size_has_a_shape_near_it(parameters: float) -> None:
    shape = suggest(parameters)
    assert shape is not None and shape.parameters == pytest.approx(parameters, rel=0.05)
    assert shape.heads * shape.dim == shape.hidden and shape.dim in (64, 128)
    assert shape.intermediate == inner_width(shape.hidden) and shape.intermediate % 256 == 0
    if parameters >= 1e9:
        assert shape.hidden / shape.layers == pytest.approx(aspect(parameters), rel=0.15)


def test_less_than_an_embedding_has_no_shape() -> None:
    assert suggest(2e6) is None


def test_inner_widths_are_the_published_ones() -> None:
    assert [inner_width(width) for width in (4096, 5120, 6656, 8192)] == [11008, 13824, 17920, 22016]


def test_nearest_presets_are_one_of_each_size_and_sorted() -> None:
    names = [one.name for one in nearest_presets(7e9)]
    assert names == ["smollm2-1.7b", "llama-3.2-3b", "llama-1-7b", "llama-3-8b", "llama-1-13b"]
    everything = nearest_presets(7e9, 99)
    assert not {"tiny", "code-llama-7b", "code-llama-34b"} & {one.name for one in everything}
    sizes = [one.shape.parameters for one in everything]
    assert sizes == sorted(set(sizes))
    assert {one.name: one.context for one in everything if one.name in ("llama-1-7b", "llama-3-8b")} == {
        "llama-1-7b": 2048, "llama-3-8b": 8192,
    }  # fmt: skip

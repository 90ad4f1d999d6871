"""The judgement itself: each limit from both sides."""

from __future__ import annotations

import math

import pytest
import torch

from llama_ft.export.proof import Answer, Document, Seen, choose_documents, compare, compare_answers
from llama_ft.export.tolerance import TOLERANCES, judge

GOOD = {"max_delta_logit": 1e-5, "mean_kl": 1e-6, "top1_agreement": 1.0}
SAME = {"equal": True}


def differs(gap):
    return {"equal": False, "differs_at": 7, "top2_gap": gap}


@pytest.mark.parametrize(
    ("dtype", "changes", "greedy", "said"),
    [
        ("float32", {}, [SAME], None),
        ("float32", {"max_delta_logit": 1e-3}, [SAME], None),
        ("float32", {"max_delta_logit": 1.01e-3}, [SAME], "max |Δ logit| is 0.00101, allowed 0.001"),
        ("float32", {"max_delta_logit": math.nan}, [SAME], "max |Δ logit| is nan"),
        ("float32", {"mean_kl": 1.0, "top1_agreement": 0.0}, [SAME], None),
        ("float32", {}, [SAME, differs(1e-9)], "greedy answer 2 differs from its token 7 on"),
        ("bfloat16", {"max_delta_logit": 0.3}, [SAME], None),
        ("bfloat16", {"mean_kl": 1e-3}, [SAME], None),
        ("bfloat16", {"mean_kl": 1.1e-3}, [SAME], "mean KL is 0.0011 nats, allowed 0.001"),
        ("bfloat16", {"mean_kl": math.nan}, [SAME], "mean KL is nan"),
        ("bfloat16", {"top1_agreement": 0.99}, [SAME], None),
        ("bfloat16", {"top1_agreement": 0.9899}, [SAME], "top-1 agreement is 98.99%, allowed 99% or more"),
        ("bfloat16", {"max_delta_logit": 0.3}, [differs(0.59)], None),
        ("bfloat16", {"max_delta_logit": 0.3}, [differs(0.6)], "differs where the top-2 gap is 0.6"),
        ("bfloat16", {"max_delta_logit": 0.3}, [differs(None)], "differs where the top-2 gap is no gap"),
        ("float16", {"mean_kl": 1.1e-3}, [SAME], "mean KL is"),
    ],
)
def test_limits(dtype, changes, greedy, said):
    faults = judge(TOLERANCES[dtype], GOOD | changes, greedy)
    if said is None:
        assert faults == []
    else:
        assert len(faults) == 1
        assert said in faults[0]


def test_all_faults_are_told():
    bad = {"max_delta_logit": 1.0, "mean_kl": 1.0, "top1_agreement": 0.5}
    assert len(judge(TOLERANCES["bfloat16"], bad, [differs(5.0)])) == 3


def seen(*logits):
    return Seen([torch.tensor(one) for one in logits], [])


def test_measurements_by_hand():
    """Two positions over two tokens: one the same, one where p = (1/2, 1/2) and q = (3/4, 1/4)."""
    trained = seen([[1.0, 0.0], [0.0, 0.0]])
    merged = seen([[1.0, 0.0], [math.log(3.0), 0.0]])
    found = compare(trained, merged, [Document([5, 1], [-100, 1])])
    assert found["positions"] == 2
    assert found["max_delta_logit"] == pytest.approx(math.log(3))
    kl = 0.5 * math.log(0.5 / 0.75) + 0.5 * math.log(0.5 / 0.25)
    assert found["mean_kl"] == pytest.approx(kl / 2, rel=1e-6)
    assert found["top1_agreement"] == 1.0
    # the label of position 1 is predicted at position 0, with probability 1 / (1 + e)
    assert found["labelled_tokens"] == 1
    assert found["nll_trained"] == pytest.approx(math.log(1 + math.e))


def test_more_rows_than_one_piece():
    torch.manual_seed(0)
    p, q = torch.randn(150, 40), torch.randn(150, 40)
    q[149, 3] += 100
    labels = [-100, *range(39), *range(40), *range(40), *range(30)]
    found = compare(Seen([p], []), Seen([q], []), [Document([0] * 150, labels)])
    assert found["max_delta_logit"] == pytest.approx((p - q).abs().max().item())
    assert found["top1_agreement"] == pytest.approx((p.argmax(-1) == q.argmax(-1)).float().mean().item())
    expected = torch.nn.functional.cross_entropy(p[:-1], torch.tensor(labels[1:]))
    assert found["nll_trained"] == pytest.approx(expected.item(), rel=1e-5)


def test_a_nan_at_any_place_is_seen():
    for place in range(3):
        logits = torch.zeros(3, 200, 4)
        logits[place, 10, 2] = math.nan
        merged = Seen(list(logits), [])
        trained = Seen([torch.zeros(200, 4)] * 3, [])
        found = compare(trained, merged, [Document([0] * 200, [-100] * 200)] * 3)
        assert math.isnan(found["max_delta_logit"])
        assert math.isnan(found["mean_kl"])
        assert judge(TOLERANCES["float32"], found, [])
        assert judge(TOLERANCES["bfloat16"], found, [])


def test_answers():
    left = Answer([5, 6, 7], [1.0, 0.5, 0.25])
    assert compare_answers(left, Answer([5, 6, 7], [1, 1, 1])) == {"equal": True, "tokens": 3}
    other = compare_answers(left, Answer([5, 9, 7], [1, 1, 1]))
    assert other == {"equal": False, "tokens": 3, "differs_at": 1, "top2_gap": 0.5}
    assert compare_answers(left, Answer([5], [1]))["top2_gap"] == 0.5  # the merged one stopped too early
    assert compare_answers(left, Answer([5, 6, 7, 8], [1] * 4))["top2_gap"] is None  # … or too late


def test_documents_are_spread_and_short_ones_bring_more():
    rows = [{"input_ids": [i] * 10, "labels": [i] * 10} for i in range(100)]
    chosen = choose_documents(rows)
    assert len(chosen) == 50  # 500 positions
    assert [document.ids[0] for document in chosen[:8]] == [0, 12, 24, 36, 48, 60, 72, 84]
    assert len({document.ids[0] for document in chosen}) == 50
    long = [{"input_ids": [1] * 1000, "labels": [1] * 1000}] * 20
    assert [len(document.ids) for document in choose_documents(long)] == [256] * 8
    assert choose_documents([]) == []
    assert len(choose_documents(rows[:3])) == 3

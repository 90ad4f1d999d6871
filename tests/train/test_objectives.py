"""Losses on answers: equal to TRL's on the same numbers, and what a figure says."""

from __future__ import annotations

import ast
import inspect
import textwrap
from collections import defaultdict
from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F
from trl import DPOTrainer, KTOTrainer, RewardTrainer
from trl.experimental.cpo import CPOTrainer
from trl.experimental.orpo import ORPOTrainer

from llama_ft.data.ends import end_lengths, lay_out
from llama_ft.recipe.schema_objective import Preference, RewardModel
from llama_ft.train.objectives.judged import KTO
from llama_ft.train.objectives.losses import group_advantages, k3, leave_one_out, log1mexp
from llama_ft.train.objectives.objective import Ends, sums
from llama_ft.train.objectives.pairs import DPO, ORPO, SimPO
from llama_ft.train.objectives.policy import answer_losses
from llama_ft.train.objectives.ranking import Ranking

PAIRS = 6
VOCABULARY = 40


def branches_of_trl(trainer: type, name: str, loss: str) -> list[str]:
    """Every piece of code that TRL's trainer runs for one loss type, out of its own source."""
    tree = ast.parse(textwrap.dedent(inspect.getsource(trainer._compute_loss)))
    found = [
        ast.unparse(ast.Module(node.body, []))
        for node in ast.walk(tree)
        if isinstance(node, ast.If) and ast.unparse(node.test) == f"{name} == '{loss}'"
    ]
    assert found, f"TRL has no loss {loss}"
    return found


def assigned_in_trl(trainer: type, name: str) -> str:
    """The statement with which TRL's trainer computes one variable."""
    tree = ast.parse(textwrap.dedent(inspect.getsource(trainer._compute_loss)))
    targets = (node for node in ast.walk(tree) if isinstance(node, ast.Assign) and ast.unparse(node.targets[0]) == name)
    return ast.unparse(next(targets))


@pytest.fixture
def ends() -> Ends:
    """Pairs whose answers have 1 to 9 tokens, with log-probabilities of a policy and of a reference."""
    random = torch.Generator().manual_seed(5)
    lengths = torch.randint(1, 10, (2 * PAIRS,), generator=random)
    values = -lengths * (0.2 + torch.rand(2 * PAIRS, generator=random))
    reference = values + 2 * torch.randn(2 * PAIRS, generator=random)
    return Ends(values.requires_grad_(), lengths, reference)


@pytest.mark.parametrize(
    ("loss", "theirs", "smoothing", "normalised"),
    [
        ("sigmoid", "sigmoid", 0.0, False),
        ("ipo", "ipo", 0.0, False),
        ("hinge", "hinge", 0.0, False),
        ("robust", "robust", 0.1, False),
        ("sigmoid", "sigmoid_norm", 0.0, True),
    ],
)
def test_dpo_is_trls(ends, loss, theirs, smoothing, normalised):
    """Loss and gradient, by the lines of TRL's own source."""
    beta = 0.3
    preference = Preference(loss=loss, beta=beta, label_smoothing=smoothing, length_normalised=normalised)
    ours = DPO(preference).judge(ends).losses
    chosen, rejected = ends.pairs
    scores = (ends.values - ends.reference).detach().requires_grad_()
    # TRL counts an answer's tokens in a mask over all positions, prompts masked.
    mask = (torch.arange(10)[None] < ends.lengths[:, None]).long()
    names = {
        "F": F,
        "torch": torch,
        "self": SimpleNamespace(beta=beta, label_smoothing=smoothing),
        "chosen_scores": scores[chosen],
        "rejected_scores": scores[rejected],
        "delta_score": scores[chosen] - scores[rejected],
        "completion_mask": torch.cat([mask[chosen], mask[rejected]]),
    }
    exec(branches_of_trl(DPOTrainer, "loss_type", theirs)[0], names)
    torch.testing.assert_close(ours, names["per_sequence_loss"])
    mine = torch.autograd.grad(ours.mean(), ends.values)[0]
    torch.testing.assert_close(mine, torch.autograd.grad(names["per_sequence_loss"].mean(), scores)[0])


def test_smoothing_is_the_mean_over_flipped_labels(ends):
    """Conservative DPO: a share ε of the pairs the wrong way round."""
    flipped = Ends(
        ends.values.view(-1, 2).flip(1).flatten(), ends.lengths, ends.reference.view(-1, 2).flip(1).flatten()
    )
    plain, turned = (DPO(Preference()).judge(one).losses for one in (ends, flipped))
    smoothed = DPO(Preference(label_smoothing=0.2)).judge(ends).losses
    torch.testing.assert_close(smoothed, 0.8 * plain + 0.2 * turned)


def test_orpo_is_trls(ends):
    preference = Preference(beta=0.7)
    found = ORPO(preference).judge(ends)
    each = ends.values / ends.lengths
    own = SimpleNamespace(beta=0.7, accelerator=SimpleNamespace(device="cpu"))
    losses, *_ = ORPOTrainer.odds_ratio_loss(own, each[0::2], each[1::2])
    torch.testing.assert_close(found.losses, -each[0::2] - losses)


def test_simpo_is_trls(ends):
    preference = Preference(beta=2.0, margin=1.2)
    each = ends.values / ends.lengths
    own = SimpleNamespace(
        beta=2.0,
        simpo_gamma=1.2,
        loss_type="simpo",
        label_smoothing=0,
        alpha=0,
        accelerator=SimpleNamespace(device="cpu"),
    )
    losses, *_ = CPOTrainer.cpo_loss(own, each[0::2], each[1::2])
    torch.testing.assert_close(SimPO(preference).judge(ends).losses, losses)


def test_kto_is_trls(ends):
    """Loss and gradient, by the lines of TRL's own source."""
    beta, kl = 0.3, 0.4
    desirable = torch.arange(2 * PAIRS) % 3 != 0
    objective = KTO(Preference(beta=beta, desirable_weight=1.5, undesirable_weight=0.5))
    objective.settle(kl * 8, 8)
    ours = objective.judge(Ends(ends.values, ends.lengths, ends.reference, {"desirable": desirable}))
    ratios = (ends.values - ends.reference).detach().requires_grad_()
    names = {
        "F": F,
        "torch": torch,
        "self": SimpleNamespace(beta=beta, desirable_weight=1.5, undesirable_weight=0.5),
        "chosen_logratios": ratios[desirable],
        "rejected_logratios": ratios[~desirable],
        "kl": torch.tensor(kl),
    }
    for piece in branches_of_trl(KTOTrainer, "self.loss_type", "kto"):
        exec(piece, names)
    exec(assigned_in_trl(KTOTrainer, "losses"), names)
    torch.testing.assert_close(torch.cat([ours.losses[desirable], ours.losses[~desirable]]), names["losses"])
    mine = torch.autograd.grad(ours.losses.sum(), ends.values)[0]
    torch.testing.assert_close(mine, torch.autograd.grad(names["losses"].sum(), ratios)[0])
    figures = sums(ours, objective.real(ends.lengths))
    assert figures["rewards_chosen"][1] == desirable.sum() and figures["kl"][0] / figures["kl"][1] == pytest.approx(kl)


def test_kto_stands_nowhere_below_zero():
    objective = KTO(Preference())
    objective.settle(-3.0, 4)
    assert objective.kl == 0
    objective.settle(0.0, 0)  # a step of filling alone
    assert objective.kl == 0


@pytest.mark.parametrize("margin", [False, True])
def test_ranking_is_trls(margin):
    """TRL's own compute_loss on a model that gives the same scores."""
    random = torch.Generator().manual_seed(1)
    scores = torch.randn(2 * PAIRS, generator=random).requires_grad_()
    margins = torch.rand(PAIRS, generator=random)
    own = SimpleNamespace(
        args=SimpleNamespace(center_rewards_coefficient=0.01),
        aux_loss_enabled=False,
        model=SimpleNamespace(training=False),
        accelerator=SimpleNamespace(gather_for_metrics=lambda value: value, gather=lambda value: value),
        _metrics={"eval": defaultdict(list)},
        _total_train_tokens=0,
    )
    inputs = {"input_ids": torch.zeros(2 * PAIRS, 3), "attention_mask": torch.ones(2 * PAIRS, 3)}
    if margin:
        inputs["margin"] = margins
    logits = torch.cat([scores[0::2], scores[1::2]])[:, None]  # all chosen ones first
    loss = RewardTrainer.compute_loss(own, lambda **_: SimpleNamespace(logits=logits), inputs)
    lengths = torch.ones(2 * PAIRS, dtype=torch.long)
    ours = Ranking(RewardModel(margin=margin, center=0.01)).judge(Ends(scores, lengths, None, {"margin": margins}))
    torch.testing.assert_close(ours.losses.mean(), loss)
    torch.testing.assert_close(*(torch.autograd.grad(one, scores)[0] for one in (ours.losses.mean(), loss)))


def test_a_pair_without_a_rating_asks_for_no_margin():
    scores, lengths = torch.tensor([1.0, 0.0, 1.0, 0.0]), torch.ones(4, dtype=torch.long)
    margins = torch.tensor([torch.nan, 2.0])
    losses = Ranking(RewardModel(margin=True)).judge(Ends(scores, lengths, None, {"margin": margins})).losses
    torch.testing.assert_close(losses, -F.logsigmoid(torch.tensor([1.0, -1.0])))


def test_filling_counts_nowhere(ends):
    """A pair without tokens, which several processes add to a last step."""
    lengths = ends.lengths.clone()
    lengths[2:4] = 0
    objective = DPO(Preference())
    real = objective.real(lengths)
    assert real.tolist() == [True, False, *[True] * (PAIRS - 2)]
    found = sums(objective.judge(Ends(ends.values, lengths, ends.reference)), real)
    assert found["loss"][1] == PAIRS - 1


def test_accuracy_of_a_model_that_knows_nothing_is_a_half():
    zeros = torch.zeros(8)
    judged = DPO(Preference()).judge(Ends(zeros, torch.ones(8, dtype=torch.long), zeros))
    assert judged.figures["accuracy"].tolist() == [0.5] * 4


def test_sft_is_mixed_in(ends):
    """A weighted nll per token of the chosen answer (arXiv 2404.19733)."""
    for make in (DPO, SimPO):
        plain, mixed = (make(Preference(sft_weight=weight)).judge(ends).losses for weight in (0.0, 0.5))
        torch.testing.assert_close(mixed - plain, -0.5 * (ends.values / ends.lengths)[0::2])


def test_log1mexp_keeps_its_digits():
    x = torch.tensor([-1e-6, -1e-3, -0.5, -1.0, -30.0])
    want = torch.log1p(-torch.exp(x.double()))
    torch.testing.assert_close(log1mexp(x), want.float(), rtol=1e-5, atol=1e-7)
    assert torch.isfinite(log1mexp(torch.zeros(1)))


def test_advantages_by_hand():
    rewards = torch.tensor([1.0, 0.0, 0.0, 3.0, 5.0, 5.0, 5.0, 5.0])
    group = rewards[:4]
    want = (group - 1) / (group.std() + 1e-4)
    torch.testing.assert_close(group_advantages(rewards, 4), torch.cat([want, torch.zeros(4)]))
    torch.testing.assert_close(leave_one_out(rewards, 4)[:4], torch.tensor([0.0, -4 / 3, -4 / 3, 8 / 3]))


def test_policy_losses_have_the_gradient_of_their_formulas():
    """∇ of −A log π per token for GRPO, with the k3 term's own; of −A Σ log π for RLOO."""
    batch = lay_out([([1, 2], [[3, 4, 5], [6]])], share=True)
    random = torch.Generator().manual_seed(3)
    log_probs = (-torch.rand(4, generator=random)).requires_grad_()
    reference = -torch.rand(4, generator=random)
    advantages = torch.tensor([0.5, -2.0])
    grpo = answer_losses(log_probs, batch["ends"], advantages, reference, objective="grpo", beta=0.1)
    own = torch.tensor([0.5, 0.5, 0.5, -2.0])
    plain = -own * log_probs + 0.1 * k3(log_probs - reference)
    want = plain[:3].mean() + plain[3]
    torch.testing.assert_close(torch.autograd.grad(grpo.sum(), log_probs)[0], torch.autograd.grad(want, log_probs)[0])
    rloo = answer_losses(log_probs, batch["ends"], advantages, None, objective="rloo", beta=0.1)
    torch.testing.assert_close(torch.autograd.grad(rloo.sum(), log_probs)[0], -own)
    torch.testing.assert_close(rloo.detach(), -advantages)
    assert end_lengths(batch["ends"]).tolist() == [3, 1]

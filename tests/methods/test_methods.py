"""The losses as plain arithmetic: no model, no loop."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch.nn import functional as F

from bench.methods.base import Errors, Pairing
from bench.methods.diffusion_dpo import DiffusionDPO
from bench.methods.preference import preference_loss
from bench.methods.sft import SFT
from bench.methods.spin import SPIN
from bench.training.batches import facts

FACTS = facts(torch.tensor([3]), torch.linspace(0.999, 0.01, 10))  # under a constant weight they decide nothing
values = st.lists(st.floats(0, 2, width=32), min_size=4, max_size=4)


def errors(winner: list[float], loser: list[float] | None = None) -> Errors:
    return Errors(torch.tensor(winner), None if loser is None else torch.tensor(loser))


def test_preference_loss_and_gradient_worked_by_hand():
    """beta 10; winner error 0.10 against 0.12 for the reference, loser error 0.30 against 0.25.

    winner drift   0.10 - 0.12 = -0.02   (the policy got better on the winner)
    loser drift    0.30 - 0.25 = +0.05   (and worse on the loser)
    logit          -0.5 * 10 * (-0.02 - 0.05) = 0.35
    loss           log(1 + e^-0.35) = log(1.704688) = 0.533382
    d loss/d logit = -1 / (1 + e^0.35) = -0.413382
    d loss/d w     = -0.413382 * (-0.5 * 10) = +2.066912, and d loss/d l = -2.066912
    """
    policy = Errors(torch.tensor([0.10], requires_grad=True), torch.tensor([0.30], requires_grad=True))
    loss, signals = preference_loss(policy, errors([0.12], [0.25]), beta=10)
    loss.sum().backward()
    assert loss.item() == pytest.approx(0.533382, abs=1e-6)
    assert policy.winner.grad.item() == pytest.approx(2.066912, abs=1e-5)
    assert policy.loser.grad.item() == pytest.approx(-2.066912, abs=1e-5)
    assert {name: round(signal.item(), 5) for name, signal in signals.items()} == {
        "implicit_accuracy": 1.0,
        "logit": 0.35,
        "winner_drift": -0.02,
        "loser_drift": 0.05,
    }
    assert not any(signal.requires_grad for signal in signals.values())


@pytest.mark.parametrize("method", [DiffusionDPO, SPIN])
@pytest.mark.parametrize("beta", [2000.0, 5000.0])
def test_loss_parity_on_fixed_random_tensors(method, beta):
    """Loss and gradient in fp32 against the formulas in float64, at the betas and errors of SD-1.5.

    For each pair, with winner errors w, w_ref and loser errors l, l_ref read as exact numbers:

        logit = -0.5 beta ((w - w_ref) - (l - l_ref))
        loss = log(1 + exp(-logit)),    d loss/d w = 0.5 beta / (1 + exp(logit)) = -d loss/d l

    Row 0 in full, beta 2000: w_ref 0.125, w 0.124, l_ref 0.25, l 0.2505 (all but 0.125 and 0.25 rounded to fp32):
    logit = -1000 (-0.001 - 0.0005) = 1.5, loss = log(1 + e^-1.5) = log(1.22313016) = 0.20141328, and
    d loss/d w = 1000 / (1 + e^1.5) = 1000 / 5.48168907 = 182.42552.
    The fp32 result may differ by 1e-6: an error near 0.1 subtracted from one within a factor of two is exact
    (Sterbenz), so only the last difference and the logistic are rounded.
    """
    generator = torch.Generator().manual_seed(0)
    reference = 0.05 + 0.2 * torch.rand(2, 64, generator=generator)
    policy = reference + 1e-3 * torch.randn(2, 64, generator=generator)
    reference[:, 0], policy[:, 0] = torch.tensor([0.125, 0.25]), torch.tensor([0.124, 0.2505])
    policy.requires_grad_(True)
    loss, signals = method(beta).loss(Errors(*policy), Errors(*reference), FACTS)
    loss.sum().backward()
    assert loss.dtype == torch.float32

    (w, l), (w_ref, l_ref) = policy.detach().double().numpy(), reference.double().numpy()  # noqa: E741
    logit = -0.5 * beta * ((w - w_ref) - (l - l_ref))
    np.testing.assert_allclose(loss.detach().numpy(), np.log1p(np.exp(-logit)), rtol=0, atol=1e-6)
    np.testing.assert_allclose(signals["logit"].numpy(), logit, rtol=1e-6)
    slope = 0.5 * beta / (1 + np.exp(logit))
    np.testing.assert_allclose(policy.grad.numpy(), [slope, -slope], rtol=2e-6)
    if beta == 2000:  # the tolerance is that of 0.124 and 0.2505 in fp32
        assert loss[0].item() == pytest.approx(0.20141328, abs=1e-5)
        assert policy.grad[0, 0].item() == pytest.approx(182.42552, abs=1e-2)


@given(values, values)
def test_policy_equal_to_reference_is_log_2_exactly(winner, loser):
    same = errors(winner, loser)
    loss, signals = preference_loss(same, same, beta=5000)
    assert torch.equal(loss, torch.full_like(loss, math.log(2)))
    assert torch.equal(signals["implicit_accuracy"], torch.full_like(loss, 0.5))


@given(values, values, values, values, st.floats(0.1, 50))
def test_preference_loss_equals_a_float64_reference(w, l, w_ref, l_ref, beta):  # noqa: E741
    loss, signals = preference_loss(errors(w, l), errors(w_ref, l_ref), beta)
    for row in range(len(w)):
        logit = -0.5 * beta * ((w[row] - w_ref[row]) - (l[row] - l_ref[row]))
        expected = math.log1p(math.exp(-abs(logit))) + max(-logit, 0)
        assert loss[row].item() == pytest.approx(expected, rel=1e-6, abs=2e-6 * beta)
        if abs(logit) > 1e-4 * beta:
            assert signals["implicit_accuracy"][row] == (1 if logit > 0 else 0)


@given(values, values, values, values)
def test_swapping_winner_and_loser_turns_the_logit_around(w, l, w_ref, l_ref):  # noqa: E741
    _, signals = preference_loss(errors(w, l), errors(w_ref, l_ref), beta=10)
    _, swapped = preference_loss(errors(l, w), errors(l_ref, w_ref), beta=10)
    assert torch.equal(signals["logit"], -swapped["logit"])
    assert torch.equal(signals["implicit_accuracy"], 1 - swapped["implicit_accuracy"])


def test_a_pair_that_is_won_sends_nothing_back():
    """Beyond logit 46 the loss stays at 1e-20 and the gradient is 0, not a number too small for fp32."""
    policy = Errors(torch.tensor([0.1, 0.1], requires_grad=True), torch.tensor([0.12, 0.14]))
    loss, signals = preference_loss(policy, errors([0.1, 0.1], [0.1, 0.1]), beta=5000)
    loss.sum().backward()
    assert loss.tolist() == pytest.approx([math.exp(-46)] * 2, rel=1e-4, abs=0)
    assert policy.winner.grad.eq(0).all()
    assert signals["logit"].tolist() == pytest.approx([50, 100], rel=1e-4)

    almost = Errors(torch.tensor([0.1], requires_grad=True), torch.tensor([0.118]))  # logit 45: as ever
    preference_loss(almost, errors([0.1], [0.1]), beta=5000)[0].sum().backward()
    assert almost.winner.grad.item() == pytest.approx(2500 * math.exp(-45), rel=1e-3, abs=0)


def test_conversion_to_the_other_conventions():
    """On 2x4x4 latents ours, the paper's (summed) and diffusers' (no 0.5) agree as the docstring says."""
    generator = torch.Generator().manual_seed(0)
    w, l, w_ref, l_ref = torch.randn(4, 3, 2, 4, 4, generator=generator).square()  # noqa: E741
    means = [side.mean(dim=(1, 2, 3)) for side in (w, l, w_ref, l_ref)]
    sums = [side.sum(dim=(1, 2, 3)) for side in (w, l, w_ref, l_ref)]
    ours, _ = preference_loss(Errors(means[0], means[1]), Errors(means[2], means[3]), beta=8.0)
    summed = -F.logsigmoid(-(0.5 * 8.0 / 32) * ((sums[0] - sums[2]) - (sums[1] - sums[3])))
    diffusers = -F.logsigmoid((0.5 * 8.0) * ((means[2] - means[3]) - (means[0] - means[1])))
    torch.testing.assert_close(ours, summed)
    torch.testing.assert_close(ours, diffusers)


def test_sft_is_the_winners_error_and_shows_drift_only_against_a_reference():
    policy = errors([0.2, 0.4])
    loss, signals = SFT().loss(policy, None, FACTS)
    assert torch.equal(loss, policy.winner) and signals == {}
    _, signals = SFT().loss(policy, errors([0.1, 0.5]), FACTS)
    torch.testing.assert_close(signals["winner_drift"], torch.tensor([0.1, -0.1]))


def test_spin_and_dpo_share_the_loss_and_differ_in_data_and_reference():
    policy, reference = errors([0.2], [0.5]), errors([0.3], [0.4])
    losses = [method(7.0).loss(policy, reference, FACTS)[0] for method in (SPIN, DiffusionDPO)]
    assert torch.equal(*losses) and not issubclass(SPIN, DiffusionDPO)
    assert [method.pairing for method in (SFT, DiffusionDPO, SPIN)] == [
        Pairing.WINNER,
        Pairing.HUMAN,
        Pairing.SELF_PLAY,
    ]
    assert [method.needs_reference for method in (SFT, DiffusionDPO, SPIN)] == [False, True, True]
    assert SFT().next_reference("base", "previous") is None
    assert DiffusionDPO(1.0).next_reference("base", "previous") == "base"
    assert SPIN(1.0).next_reference("base", "previous") == "previous"


@pytest.mark.parametrize("beta", [0.0, -1.0, float("nan")])
def test_beta_must_be_above_zero(beta):
    with pytest.raises(ValueError, match="above 0"):
        DiffusionDPO(beta)

"""The contract is wide enough for other people's losses, and what it tells them is true."""

from __future__ import annotations

import copy
from dataclasses import replace

import numpy as np
import pytest
import torch
from plug_ins import DSPO, SDPO, DiffusionKTO, MaPO, safeguarded
from tiny import make_unet
from torch import Tensor
from train_tiny import SCHEDULER, SETTINGS, make_data

from bench.errors import BenchError
from bench.methods.base import Errors, Facts, Products
from bench.methods.diffusion_dpo import DiffusionDPO
from bench.methods.preference import preference_loss
from bench.methods.sft import SFT
from bench.methods.spin import SPIN
from bench.methods.weightings import WEIGHTINGS, h_squared, min_snr
from bench.training.batches import facts
from bench.training.denoising import denoising_errors, inner_products
from bench.training.train import Loop, train

TABLE = torch.tensor([0.9, 0.5, 0.1])  # alpha_bar of a process of three timesteps


def told(**more: object) -> Facts:
    return facts(torch.tensor([1]), TABLE)._replace(**more)


def pair(winner: float, loser: float) -> Errors:
    return Errors(torch.tensor([winner], requires_grad=True), torch.tensor([loser], requires_grad=True))


def go(method, data=None, **changes):
    """Train the tiny UNet; return its weights and the history."""
    from accelerate import Accelerator

    torch.manual_seed(0)
    base = make_unet()
    policy, reference = copy.deepcopy(base), copy.deepcopy(base) if method.needs_reference else None
    settings = replace(SETTINGS, **changes)
    history = train(policy, reference, method, data or make_data(), settings, SCHEDULER, 0, Accelerator(cpu=True))
    return torch.cat([weight.detach().flatten() for weight in policy.parameters()]), history


def test_facts_are_those_of_the_forward_process():
    """log(.9 / .1) = 2.197225; before the first timestep nothing is noised yet."""
    found = facts(torch.tensor([2, 0, 1]), TABLE)
    torch.testing.assert_close(found.log_snr, torch.tensor([-2.1972246, 2.1972246, 0.0]))
    torch.testing.assert_close(found.alpha_bar, torch.tensor([0.1, 0.9, 0.5]))
    torch.testing.assert_close(found.alpha_bar_previous, torch.tensor([0.5, 1.0, 0.9]))
    assert found.timestep.tolist() == [2, 0, 1] and found.products is found.batch_mean is None


def test_weights_of_timesteps_by_hand():
    """snr 9, 1, 1/9: min(snr, 5) / snr = 5/9, 1, 1.  h^2 = (1 - c)^2 / (c (1 - a)):

    c = .9:    .01 / (.9 * .1)          = 1/9
    c = 5/9:   (4/9)^2 / (5/9 * .5)     = 32/45
    c = 1/5:   .64 / (.2 * .9)          = 32/9
    """
    found = facts(torch.arange(3), TABLE)
    torch.testing.assert_close(min_snr(found), torch.tensor([5 / 9, 1, 1]))
    torch.testing.assert_close(min_snr(found, gamma=0.5), torch.tensor([0.5 / 9, 0.5, 1]))
    torch.testing.assert_close(h_squared(found), torch.tensor([1 / 9, 32 / 45, 32 / 9]))
    assert WEIGHTINGS["constant"](found).tolist() == [1, 1, 1]


def test_h_squared_is_equation_c6_with_the_deviation_of_ddpm():
    """As printed, with the square root that the print lost (1 - a_t under the second), in float64, for SD-1.5."""
    a = SCHEDULER.alphas_cumprod.double()
    before = torch.cat([torch.ones(1, dtype=a.dtype), a[:-1]])
    sigma2 = (1 - before) / (1 - a) * (1 - a / before)
    h = (1 - before - sigma2).clamp(min=0).sqrt() - (before / a).sqrt() * (1 - a).sqrt()
    ours = h_squared(facts(torch.arange(len(a)), SCHEDULER.alphas_cumprod))
    torch.testing.assert_close(ours.double(), h.square(), rtol=2e-3, atol=0)  # 1 - c of fp32 numbers near 1
    assert ours.argmin() == 162
    assert ours[[0, 162, 999]].tolist() == pytest.approx([8.5e-4, 1.7e-5, 1.5e-4], rel=0.03)


@pytest.mark.parametrize("method", [DiffusionDPO, SPIN])
def test_a_weighting_multiplies_the_logit_and_for_sft_the_loss(method):
    """h^2 at timestep 1 is 32/45: beta 10 * 32/45 is the same as 7.1111 without it."""
    policy, reference = pair(0.10, 0.30), pair(0.12, 0.25)
    weighted = method(10.0, weighting="h_squared").loss(policy, reference, told())
    plain = method(10 * 32 / 45).loss(policy, reference, told())
    torch.testing.assert_close(weighted, plain)
    assert weighted[1]["logit"].item() == pytest.approx(0.35 * 32 / 45)
    loss, _ = SFT(weighting="min_snr").loss(Errors(torch.tensor([0.2])), None, facts(torch.tensor([0]), TABLE))
    assert loss.item() == pytest.approx(0.2 * 5 / 9)


def test_products_by_hand():
    """Two pairs of latents of two numbers; p_w - n = (1, 3) and (2, 0), p_l - n = (2, -1) and (4, 5), r_w - n below.

    (1 * 2 - 3 * 1) / 2 = -.5,  2 * 4 / 2 = 4;  with r: (1 * 1 + 3 * 1) / 2 = 2,  2 * 3 / 2 = 3.
    """

    def latents(*rows: tuple[float, float]) -> Tensor:
        return torch.tensor(rows).view(-1, 1, 1, 2)

    policy = latents((1.0, 3.0), (2.0, 0.0), (2.0, -1.0), (4.0, 5.0)).requires_grad_()
    reference = latents((1.0, 1.0), (3.0, 7.0), (9.0, 9.0), (9.0, 9.0))
    products = inner_products(policy, reference, paired=True)
    assert (products.losers.tolist(), products.reference.tolist()) == ([-0.5, 4], [2, 3])
    assert denoising_errors(policy, paired=True).winner.tolist() == [5, 2]
    products.losers.sum().backward()  # half of the other side each
    assert policy.grad.flatten(1).tolist() == [[1, -0.5], [2, 2.5], [0.5, 1.5], [1, 0]]
    alone = inner_products(policy[:2], None, paired=False)
    assert alone == Products(None, None)


def test_kto_by_hand():
    """beta 10, kl .01; g_w = .12 - .10 = .02, g_l = .25 - .30 = -.05, so the statistic is -.015.

    1 - sigmoid(10 * .01) = .475021, 1 - sigmoid(10 * .06) = .354344;  (2 * .475021 + .354344) / 2 = .652193
    """
    policy, reference = pair(0.10, 0.30), pair(0.12, 0.25)
    assert DiffusionKTO(10.0).statistic(policy, reference, told()).item() == pytest.approx(-0.015, rel=1e-5)
    loss, _ = DiffusionKTO(10.0, desirable_weight=2.0).loss(policy, reference, told(batch_mean=torch.tensor(0.01)))
    assert loss.item() == pytest.approx(0.652193, abs=1e-6)


def test_mapo_by_hand():
    """s .5: f(.2) = .1 / (e^.1 - 1) = .950833, f(.4) = .2 / (e^.2 - 1) = .903331; T 10.

    logsigmoid(10 * .0475021) = -.483574
    """
    loss, _ = MaPO(temperature=10.0).loss(pair(0.2, 0.4), None, told())
    assert loss.item() == pytest.approx(0.2 + 0.1 * 0.483574, abs=1e-5)


def test_dspo_by_hand():
    """e = p_w - n = (.2, -.4), f = r_w - n = (.1, .3), l = l_ref; beta 1: x = -.025, c = sigmoid(.025) = .50625.

    e - c (e - f) = (.149375, -.045625), whose mean square is .0121974
    """
    policy, reference = pair(0.10, 0.30), pair(0.05, 0.30)
    products = Products(None, torch.tensor([(0.2 * 0.1 - 0.4 * 0.3) / 2]))
    loss, _ = DSPO(beta=1.0).loss(policy, reference, told(products=products))
    assert loss.item() == pytest.approx(0.0121974, abs=1e-6)


@pytest.mark.parametrize(("product", "share"), [(0.2, 0.25), (0.01, 1.0), (-0.2, 1.0), (0.0, 1.0)])
def test_sdpo_by_hand(product, share):
    """mu .5, w .1: lambda = .5 * .1 / .2 = .25; the loser's gradient is scaled by it, and nothing else changes."""
    policy, reference = pair(0.10, 0.30), pair(0.12, 0.25)
    loss, _ = SDPO(10.0, mu=0.5).loss(policy, reference, told(products=Products(torch.tensor([product]), None)))
    loss.sum().backward()
    plain = pair(0.10, 0.30)
    expected, _ = preference_loss(plain, reference, 10.0)
    expected.sum().backward()
    torch.testing.assert_close(loss, expected)
    torch.testing.assert_close(policy.winner.grad, plain.winner.grad)
    torch.testing.assert_close(policy.loser.grad, share * plain.loser.grad)


def test_products_leave_the_errors_alone_to_the_last_bit(accelerator):
    asked = type("Asked", (DiffusionDPO,), {"needs_products": True})
    (one, first), (two, second) = go(DiffusionDPO(500.0)), go(asked(500.0))
    assert torch.equal(one, two)
    assert [row["loss"] for row in first] == [row["loss"] for row in second]


def test_products_reach_the_loss_with_the_gradient_of_the_policy(accelerator):
    """What the loop hands over is, on its own, the same as from the models' predictions."""
    seen = []

    class Spy(DSPO):
        def loss(self, policy, reference, facts):
            seen.append((policy, reference, facts))
            return super().loss(policy, reference, facts)

    go(Spy(), steps=1, micro_batch=6)
    ((policy, reference, found),) = seen
    assert torch.equal(policy.winner, reference.winner)  # nothing learned yet, so the two predict alike
    torch.testing.assert_close(found.products.reference, reference.winner)
    assert found.products.losers.requires_grad and found.products.reference.requires_grad
    assert not found.log_snr.requires_grad and found.batch_mean is None
    torch.testing.assert_close(found.alpha_bar, SCHEDULER.alphas_cumprod[found.timestep])


def test_the_batch_mean_is_that_of_the_global_batch_whatever_the_micro_batch(accelerator):
    """32 pairs in one pass or in four of 8: a mean of each micro-batch's own pairs would make other weights."""

    class Local(DiffusionKTO):
        def loss(self, policy, reference, facts):
            return super().loss(
                policy,
                reference,
                facts._replace(
                    batch_mean=self.statistic(policy, reference, facts._replace(batch_mean=None)).mean().detach()
                ),
            )

    settings = {"batch_size": 32, "steps": 4, "log_every": 1}
    data = make_data(40)
    whole, parts, local = (
        go(method(500.0), data, micro_batch=size, **settings)
        for method, size in ((DiffusionKTO, 32), (DiffusionKTO, 8), (Local, 8))
    )
    gains = [[row["kl"] for row in history] for _, history in (whole, parts)]
    assert gains[0][0] == 0 and abs(gains[0][3]) > 1e-6
    np.testing.assert_allclose(*gains, rtol=1e-3, atol=1e-8)
    assert (whole[0] - parts[0]).norm() / whole[0].norm() < 1e-6
    assert (whole[0] - local[0]).norm() / whole[0].norm() > 1e-5


def test_only_a_method_with_a_statistic_pays_for_another_pass(accelerator, monkeypatch):
    calls = []
    run = Loop._pass
    monkeypatch.setattr(Loop, "_pass", lambda self, batch: calls.append(torch.is_grad_enabled()) or run(self, batch))
    go(DiffusionDPO(500.0), steps=1)
    assert calls == [True, True]
    calls.clear()
    go(DiffusionKTO(500.0), steps=1)
    assert calls == [False, False, True, True]


@pytest.mark.parametrize("method", [MaPO(), DSPO(), SDPO(500.0), DiffusionKTO(500.0, 2.0)], ids=lambda one: one.name)
def test_plug_ins_train_in_the_shared_loop(accelerator, method):
    weights, history = go(method, log_every=1)
    assert weights.isfinite().all() and len(history) == 4
    assert {signal.name for signal in method.signals} <= set(history[0])


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (lambda loss, signals: (loss.mean(), signals), r"loss has shape \[\], but one value a sample, \[3\]"),
        (lambda loss, signals: (loss, {"kll": loss}), r"logs 'kll', which is not among its signals.*mean 'kl'"),
        (lambda loss, signals: (loss, {"kl": loss[:1]}), r"kl has shape \[1\]"),
    ],
)
def test_a_loss_that_breaks_the_contract_is_named(accelerator, change, said):
    class Broken(DiffusionKTO):
        def loss(self, policy, reference, facts):
            return change(*super().loss(policy, reference, facts))

    with pytest.raises(BenchError, match=f"diffusion_kto: .*{said}"):
        go(Broken(500.0))


def test_the_safeguard_changes_no_value():
    errors = pair(0.1, 0.3)
    assert safeguarded(errors, Products(torch.tensor([0.2]), None), 0.9).loser.item() == errors.loser.item()

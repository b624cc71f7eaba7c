"""The one model of uncertainty, behind intervals, p-values, detectable differences and what is said of them.

A score (a difference of two models, a win) of training seed s and prompt p is d[s, p] = mu + a[s] + b[p] + e[s, p]:
seeds and prompts are crossed random effects, because the prompts are the same for every seed and an untrained base
is the same under every seed. The variance of the mean over S seeds and P prompts is estimated by the two-way analysis
of variance as

    B + max(V - R, 0),   B = var(means of seeds) / S,   V = var(means of prompts) / P,   R = residual / (S P)

(R is part of both). B is known from S - 1 degrees of freedom only, V from P - 1. With w = B / (B + max(V - R, 0)) a
value T standard errors from the null has p = w p[S-1](T) + (1 - w) p[P-1](T), with the two-sided tails p of Student's
t, and an interval holds what has p >= .05. The usual Satterthwaite degrees of freedom are too sure, w being itself
estimated from few seeds: a little at p = .05, and many times over far out, where Holm's correction looks. The mixture
is sure of what it may be from three seeds on; two say so little of w that it is taken as 1.

One seed gives B = 0 and the plain paired t interval over prompts: it speaks of these weights, and of no method.
Medians and win rates: see `estimates`.

Assumed: seeds and prompts are draws from what one speaks of, and their means about normal. `bench.reports.calibration`
simulates it (results/measured/calibration.csv) with 50 and 500 prompts, seeds that differ by 0 to 7 standard errors
over prompts, normal and exponential noise. From three seeds on, 95 % intervals cover .94 to .97, say "better" of
nothing in .01 to .03, and tell equal methods apart on .02 to .05 of pages; what is called detectable is found with
power .78 to .89. With two seeds they cover .97 to 1.00, and .00 to .00 of pages tell apart what is equal. One seed
covers .94 to .97 of its own weights; read as one of the method .21 to .95. Beyond what is simulated: seeds so far
apart that the win rates of few of them are all 0 or 1 look as if they did not differ.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from typing import NamedTuple

import numpy as np

LEVEL = 0.95  # of intervals; what they exclude has p < 0.05
POWER = 0.8  # with which a detectable difference is found
STEPS = 8  # to a quantile; they give all digits of a double, whatever the numbers of seeds and prompts


class Estimates(NamedTuple):
    """A statistic of many series, each field [n], with its 95 % interval.

    p: two-sided, of no difference (0, for win rates one half); below .05 exactly where the interval excludes that.
    detectable: the true difference that such an experiment finds with 80 % power. NaN where unknown.
    """

    value: np.ndarray
    low: np.ndarray
    high: np.ndarray
    p: np.ndarray
    detectable: np.ndarray


def estimates(stack: np.ndarray, stat: str = "mean") -> Estimates:
    """The statistic of n series at once (scores, differences or wins), with everything said about its uncertainty.

    stack: [n, training seeds, prompts] without NaN; of win rates wins in [0, 1]. The statistic is taken over the
    prompts of each seed and averaged over seeds. A median is linearised first: its prompts become pseudo-values with
    the same median and standard error. Intervals of means and medians are value +- quantile * standard error, those
    of win rates Wilson's, which stay within [0, 1].
    """
    values = stack.astype(np.float64)
    error = _Error.of(_pseudo_values(values) if stat == "median" else values)
    if stat == "winrate":
        return _rates(values, error)
    value = (np.median if stat == "median" else np.mean)(values, axis=2).mean(axis=1)
    size = np.sqrt(error.variance)
    distance = np.divide(value, size, out=np.where(value == 0, 0.0, np.inf), where=size != 0)
    half = error.quantile * size
    return Estimates(value, value - half, value + half, error.p(distance), error.findable * size)


def _rates(wins: np.ndarray, error: _Error) -> Estimates:
    """Wilson's interval, with the quantile of `error` and the number of prompts that would give its variance.

    Without any variance (every prompt won, or lost, or tied) that number is one less than there are, which is what
    it is with one loss. A rate cannot be further than one half from one half: where even that would not be found,
    detectable is NaN.
    """
    value = wins.mean(axis=(1, 2))
    few = np.full(len(value), wins.shape[2] - 1.0)
    number = np.divide(value * (1 - value), error.variance, out=few, where=error.variance > 0)
    square = error.quantile**2
    centre, half = number * value + square / 2, np.sqrt(square * (number * value * (1 - value) + square / 4))
    root = 2 * np.sqrt(number)  # one over the standard error of a rate of one half
    found = np.divide(error.findable, root, out=np.full(len(value), np.nan), where=error.findable <= root / 2)
    low, high = (np.clip((centre + side * half) / (number + square), 0, 1) for side in (-1, 1))  # clip: rounding
    return Estimates(value, low, high, error.p((value - 0.5) * root), found)


@dataclass(frozen=True)
class _Error:
    """Variance [n] of a mean over seeds and prompts, NaN of one prompt; the share [n] of it that lies between seeds."""

    variance: np.ndarray
    share: np.ndarray
    seeds: int
    prompts: int

    @classmethod
    def of(cls, values: np.ndarray) -> _Error:
        """Of values [n, seeds, prompts], as the module's docstring says."""
        n, seeds, prompts = values.shape
        if prompts == 1:
            return cls(np.full(n, np.nan), np.zeros(n), seeds, prompts)
        of_prompts = values.mean(axis=1)
        between_prompts = of_prompts.var(axis=1, ddof=1) / prompts
        if seeds == 1:
            return cls(between_prompts, np.zeros(n), seeds, prompts)
        of_seeds = values.mean(axis=2)
        rest = values - of_seeds[:, :, None] - of_prompts[:, None] + of_seeds.mean(axis=1)[:, None, None]
        residual = np.square(rest).sum(axis=(1, 2)) / ((seeds - 1) * (prompts - 1) * seeds * prompts)
        between_seeds = of_seeds.var(axis=1, ddof=1) / seeds
        variance = between_seeds + np.maximum(between_prompts - residual, 0)
        share = np.divide(between_seeds, variance, out=np.zeros(n), where=variance > 0)
        if seeds == 2:  # of one degree of freedom the share says nothing: the cautious one is taken
            share = np.ones(n)
        return cls(variance, share, seeds, prompts)

    @property
    def df(self) -> tuple[int, int]:
        """Degrees of freedom of what lies between seeds and of what lies between prompts; at least one."""
        return max(self.seeds - 1, 1), max(self.prompts - 1, 1)

    def p(self, distance: np.ndarray) -> np.ndarray:
        """Two-sided p [n] of values this many standard errors from the null."""
        from scipy.special import stdtr

        of_seeds, of_prompts = (2 * stdtr(df, -np.abs(distance)) for df in self.df)
        return self.share * of_seeds + (1 - self.share) * of_prompts

    @cached_property
    def quantile(self) -> np.ndarray:
        """The distance [n] whose p is 1 - LEVEL: Newton's steps from below, which never go too far, p being convex."""
        from scipy.special import beta, stdtrit

        found = np.full(len(self.share), min(stdtrit(df, (1 + LEVEL) / 2) for df in self.df))
        for _ in range(STEPS if self.share.any() else 0):
            of_seeds, of_prompts = (
                2 * (1 + found**2 / df) ** (-(df + 1) / 2) / (np.sqrt(df) * beta(0.5, df / 2)) for df in self.df
            )
            found += (self.p(found) - (1 - LEVEL)) / (self.share * of_seeds + (1 - self.share) * of_prompts)
        return found

    @cached_property
    def findable(self) -> np.ndarray:
        """The effect [n], in estimated standard errors, that intervals are clear of with probability POWER.

        A noncentrality of t, its degrees of freedom the parts' harmonic mean weighted by their shares. The root of a
        variance of few degrees of freedom is too small on average; that mean (c4 of quality control) is divided out,
        so that differences called detectable are the right ones on average.
        """
        from scipy.special import gammaln, nctdtrinc

        of_seeds, of_prompts = self.df
        df = 1 / (self.share / of_seeds + (1 - self.share) / of_prompts)
        c4 = np.sqrt(2 / df) * np.exp(gammaln((df + 1) / 2) - gammaln(df / 2))
        return nctdtrinc(df, 1 - POWER, self.quantile) / c4


def _pseudo_values(values: np.ndarray) -> np.ndarray:
    """Values whose mean over prompts is each seed's median, and whose standard error is that median's.

    A prompt moves a median by the side of it on which it lies (its influence function), so prompts that several
    seeds share correlate as their medians do. The size is Maritz and Jarrett's (1978) standard error, what the
    bootstrap gives with infinitely many resamples.
    """
    from scipy.special import betainc

    prompts = values.shape[2]
    chance = np.diff(betainc((prompts + 1) / 2, (prompts + 1) / 2, np.arange(prompts + 1) / prompts))
    median = np.median(values, axis=2, keepdims=True)
    ordered = np.sort(values - median, axis=2)  # centred: squares lose no digits
    error = np.sqrt(np.maximum(np.square(ordered) @ chance - np.square(ordered @ chance), 0))[..., None]
    side = np.sign(values - median)
    side -= side.mean(axis=2, keepdims=True)
    spread = side.std(axis=2, ddof=min(1, prompts - 1), keepdims=True)
    return median + error * np.sqrt(prompts) * np.divide(side, spread, out=np.zeros_like(side), where=spread > 0)

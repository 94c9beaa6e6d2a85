import math

import numpy as np
import pytest
from scipy import stats

from accountants import (
    FullBatch,
    PoissonSampling,
    RandomAllocation,
    TrainingRun,
    delta,
    tradeoff,
)

N = 60_000
RATES = (0.0, 1e-6, 1e-3, 0.01, 0.1, 0.5, 0.9, 1.0)


def sampled(**kwargs):
    return tradeoff(runs=[TrainingRun(1.0, PoissonSampling(600), N, 1000)], **kwargs)


@pytest.mark.parametrize("shift", [0.1, 1.0, 4.0])
def test_of_unsampled_gaussians_is_the_closed_form(shift):
    curve = tradeoff(noise_multiplier=2 / shift, sampling=FullBatch(), num_examples=N, steps=4)
    assert curve.gdp_mu() == pytest.approx(shift)
    assert curve.advantage == pytest.approx(2 * stats.norm.cdf(shift / 2) - 1)
    for rate in RATES:
        truth = stats.norm.cdf(stats.norm.ppf(rate) + shift)
        assert curve.true_positive_rate(rate) == pytest.approx(truth)
        assert curve.false_negative_rate(rate) == pytest.approx(1 - truth)


def test_the_general_way_agrees_with_the_closed_form():
    # By RDP or zCDP the same run is no Gaussian curve any more, but a bound on it.
    run = {"noise_multiplier": 2.0, "sampling": FullBatch(), "num_examples": N, "steps": 4}
    exact, general = tradeoff(**run), tradeoff(**run, accountant="zcdp")
    for rate in RATES:
        assert exact.true_positive_rate(rate) <= general.true_positive_rate(rate) + 1e-12
    assert exact.gdp_mu() <= general.gdp_mu() < 2 * exact.gdp_mu()
    assert exact.advantage <= general.advantage


def test_no_attack_on_the_pair_does_better():
    # The best attacks on one Poisson sampled step are thresholds of the noisy sum.
    sigma, q = 0.7, 0.2
    curve = tradeoff(runs=[TrainingRun(sigma, PoissonSampling(20), 100, 1)])
    thresholds = np.linspace(-4, 6, 400)
    without = stats.norm.sf(thresholds, 0, sigma)
    within = (1 - q) * without + q * stats.norm.sf(thresholds, 1, sigma)
    attacks = [(without, within), (1 - within, 1 - without)]
    for rate in np.linspace(0.001, 0.999, 60):
        best = max(np.interp(rate, *(np.sort(one) for one in attack)) for attack in attacks)
        assert best - 1e-4 <= curve.true_positive_rate(float(rate)) <= best + 0.02
    assert curve.advantage == pytest.approx((within - without).max(), rel=1e-3)


@pytest.mark.parametrize("sampling", [PoissonSampling(600), RandomAllocation(100)])
def test_curves_are_trade_offs(sampling):
    curve = tradeoff(noise_multiplier=1.0, sampling=sampling, num_examples=N, steps=1000)
    found = [curve.true_positive_rate(rate) for rate in RATES]
    assert np.all(np.diff(found) >= 0) and found[-1] == 1.0
    assert all(
        rate <= tpr <= rate + curve.advantage + 1e-9 for rate, tpr in zip(RATES, found, strict=True)
    )


def test_mu_supports_the_curve():
    curve = sampled()
    mu = curve.gdp_mu(floor=1e-8)
    gaussian = tradeoff(noise_multiplier=1 / mu, sampling=FullBatch(), num_examples=N, steps=1)
    for target in np.linspace(0.0, 5.0, 60):
        claimed = delta(
            noise_multiplier=1.0,
            sampling=PoissonSampling(600),
            num_examples=N,
            steps=1000,
            epsilon=float(target),
        )
        if claimed > 1e-8:
            assert claimed <= gaussian.curve.delta(float(target))
    assert curve.gdp_mu(floor=1e-4) < mu
    # The advantage alone asks for some of it, and the central limit theorem for about the rest.
    assert 2 * stats.norm.ppf((1 + curve.advantage) / 2) <= mu
    limit = 0.01 * math.sqrt(1000 * math.expm1(1.0))
    assert limit * 0.9 < mu < limit * 1.6


def test_limits():
    nothing = tradeoff(noise_multiplier=1.0, sampling=FullBatch(), num_examples=N, steps=0)
    assert nothing.gdp_mu() == nothing.advantage == 0.0
    assert nothing.true_positive_rate(0.3) == pytest.approx(0.3)
    everything = tradeoff(noise_multiplier=0.0, sampling=FullBatch(), num_examples=N, steps=1)
    assert everything.gdp_mu() == math.inf and everything.advantage == 1.0
    assert everything.true_positive_rate(0.0) == 1.0
    assert sampled(group_size=2).advantage > sampled().advantage
    assert sampled(accountant="rdp").advantage >= sampled().advantage
    assert sampled(relation="replace_one").advantage > sampled().advantage


@pytest.mark.parametrize("rate", [-0.1, 1.1, math.nan])
def test_bad_rates(rate):
    with pytest.raises(ValueError, match="false_positive_rate"):
        sampled().true_positive_rate(rate)
    with pytest.raises(ValueError, match="floor"):
        sampled().gdp_mu(floor=rate)

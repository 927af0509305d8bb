"""The stability of a run, on series whose noise, spikes and failures are put in by hand."""

from __future__ import annotations

import dataclasses
import json
import math

import numpy as np
import pytest

from curvelora.errors import UserError
from curvelora_eval.lab.stability import POOLED, StabilitySettings, pool, running_median, stability, trailing_median


def lines(losses, **fields):
    """One line a step from 1 on; NaN and infinite losses become null, as in the file."""
    columns = {"loss": losses, **fields}
    rows = zip(*columns.values(), strict=True)
    return [
        {"step": step, **{k: to_json(v) for k, v in zip(columns, row, strict=True)}}
        for step, row in enumerate(rows, start=1)
    ]


def to_json(value):
    return None if isinstance(value, float) and not math.isfinite(value) else value


def noise(n, std, seed=0):
    return np.random.default_rng(seed).normal(0, std, n)


# --- trend and noise ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("n", "half"), [(1, 3), (2, 3), (7, 3), (50, 6), (50, 1), (12, 40)])
def test_the_running_median_agrees_with_sorting_each_window(n, half):
    values = noise(n, 1.0, seed=n)
    for i, found in enumerate(running_median(values, half)):
        room = min(half, i, n - 1 - i)
        assert found == sorted(values[i - room : i + room + 1])[room]


def test_the_trailing_median_passes_over_what_is_not_finite():
    values = np.array([math.nan, 4.0, 2.0, math.nan, math.nan, math.nan, 1.0])
    assert trailing_median(values, 3).tolist() == pytest.approx([math.nan, 4, 3, 3, 2, math.nan, 1], nan_ok=True)


@pytest.mark.parametrize("std", [0.02, 0.5])
def test_the_noise_about_a_straight_line_is_recovered(std):
    """4000 draws give a standard deviation to 1.1 %; the running median of 101 takes 0.2 % away; MAD is good to 1.9 %."""
    n = 4000
    found = stability(lines(3 - 1e-4 * np.arange(n) + noise(n, std)))
    assert found["residual_std"] == pytest.approx(std, rel=0.04)
    assert found["residual_sigma"] == pytest.approx(std, rel=0.06)
    assert found["loss_variance"] == found["residual_std"] ** 2
    assert found["spikes"] == 0 and found["diverged"] is False


def test_a_smooth_decay_has_no_residual_and_no_spikes():
    """A centred median of a falling series is the value in its middle, at the ends too."""
    losses = 2 + 8 * np.exp(-np.arange(400) / 30)
    found = stability(lines(losses))
    assert found["residual_std"] == found["residual_sigma"] == 0.0
    assert found["spikes"] == 0 and found["spike_steps"] == [] and found["spike_depth"] is None
    assert found["diverged"] is False and found["diverged_at"] is None
    assert found["first_loss"] == losses[2] and found["last_loss"] == np.median(losses[-20:])


def test_a_steep_noisy_start_is_no_spike():
    """An untrained model: 9 nats fall in 40 steps, 45 times the noise a step."""
    found = stability(lines(2 + 9 * np.exp(-np.arange(1000) / 10) + noise(1000, 0.02)))
    assert found["spikes"] == 0
    assert found["residual_sigma"] == pytest.approx(0.02, rel=0.1) and found["residual_std"] < 0.023
    assert found["diverged"] is False


def test_spikes_move_the_plain_deviation_but_not_the_robust_one():
    losses = 2 + noise(1000, 0.1)
    clean = stability(lines(losses))
    losses[100:1000:100] += 5.0
    spiky = stability(lines(losses))
    assert spiky["residual_sigma"] == pytest.approx(clean["residual_sigma"], rel=0.02)
    assert spiky["residual_std"] > 4 * clean["residual_std"]
    # nine of 998 residuals at about 5: the variance of the mixture
    assert spiky["loss_variance"] == pytest.approx(0.1**2 + 25 * (9 / 998) * (1 - 9 / 998), rel=0.05)


def test_pairing_removes_the_noise_of_the_data():
    """Common noise 0.1, the arm's own 0.001: 1000 draws give the latter to 2.2 %."""
    trend, common = 2 + np.exp(-np.arange(1000) / 50), noise(1000, 0.1)
    arm, baseline = lines(trend + common + noise(1000, 0.001, seed=1)), lines(trend + common)
    found = stability(arm, baseline)
    assert found["residual_std"] == pytest.approx(0.1, rel=0.08)
    assert found["paired_residual_std"] == pytest.approx(0.001, rel=0.08)
    assert found["paired_steps"] == 1000
    assert stability(arm)["paired_residual_std"] is None and stability(arm)["paired_steps"] is None
    assert stability(baseline, baseline)["paired_residual_std"] == 0.0


def test_pairing_leaves_a_drift_between_the_runs_out():
    common = noise(600, 0.1)
    drift = np.linspace(0, 1, 600)
    found = stability(lines(2 + common + drift + noise(600, 0.01, seed=2)), lines(2 + common))
    assert found["paired_residual_std"] == pytest.approx(0.01, rel=0.12)


def test_pairing_goes_by_step_and_needs_both_sides():
    """Misaligned by one step, the common noise would not cancel but add to 0.1 sqrt(2)."""
    common = noise(300, 0.1)
    arm, baseline = lines(common + 2), lines(common + 3)
    del arm[10]
    baseline[50]["loss"] = None
    found = stability(arm, list(reversed(baseline)))
    assert found["paired_steps"] == 298 and found["paired_residual_std"] < 1e-12
    few = stability(arm, baseline[:19])
    assert few["paired_residual_std"] is None and few["paired_steps"] == 18


# --- spikes ---------------------------------------------------------------------------------------------------------


def test_injected_spikes_are_counted_located_and_measured():
    """Three spikes in noise of 0.1, where 6 sigma is 0.6: 5 steps of 2 nats, 1 of 4, 2 of 1.5; and a dip, which is none."""
    losses = 3 - 0.001 * np.arange(1000) + noise(1000, 0.1)
    for first, length, depth in ((200, 5, 2.0), (500, 1, 4.0), (800, 2, 1.5), (650, 3, -3.0)):
        losses[first - 1 : first - 1 + length] += depth
    found = stability(lines(losses))
    assert found["spikes"] == 3 and found["spike_steps"] == [200, 500, 800]
    assert found["spike_recovery"] == 5
    assert found["spike_depth"] == pytest.approx(4.0, abs=0.35)
    assert found["spike_depth_sigma"] == pytest.approx(found["spike_depth"] / found["residual_sigma"])
    assert found["diverged"] is False


def test_the_threshold_is_k_robust_deviations():
    losses = 2 + noise(500, 0.1)
    losses[250] = 2.9
    residual = (losses - running_median(losses, 25))[1:-1]
    sigma = 1.4826 * np.median(np.abs(residual - np.median(residual)))
    k = residual[249] / sigma
    above, below = (stability(lines(losses), settings=StabilitySettings(spike_threshold=k * f)) for f in (1.001, 0.999))
    assert above["residual_sigma"] == sigma and above["residual_std"] == np.std(residual, ddof=1)
    assert above["spikes"] == 0 and below["spike_steps"] == [251]
    assert below["spike_depth"] == residual[249] and below["spike_depth_sigma"] == pytest.approx(k, rel=1e-12)


def test_a_lasting_change_of_level_is_no_spike():
    losses = np.where(np.arange(600) < 300, 3.0, 3.8) + noise(600, 0.05)
    assert stability(lines(losses))["spikes"] == 0


def test_an_excursion_is_a_spike_up_to_the_half_window():
    losses = 3.0 + noise(600, 0.05)
    losses[200:230] += 2.0
    assert stability(lines(losses), settings=StabilitySettings(half_window=30))["spike_recovery"] == 30
    assert stability(lines(losses), settings=StabilitySettings(half_window=12))["spikes"] == 0


def test_without_noise_there_is_no_scale_and_no_spike():
    losses = np.full(100, 2.0)
    losses[50] = 9.0
    found = stability(lines(losses))
    assert found["residual_sigma"] == 0.0 and found["spikes"] == 0 and found["residual_std"] > 0.6
    constant = stability(lines(np.full(100, 2.0)))
    assert constant["residual_std"] == 0.0 and constant["spikes"] == 0 and constant["diverged"] is False
    assert constant["rise_from_best"] == 0.0


def test_gradient_spikes_are_of_the_logarithm():
    """Norms scatter by a factor e^0.2 about 0.01; a norm of 0.05 is e^1.6, eight sigma, up, one of 0.02 is not."""
    norms = 0.01 * np.exp(noise(400, 0.2))
    norms[99], norms[199], norms[299], norms[300] = 0.05, 0.02, 0.0, math.nan
    found = stability(lines(np.full(400, 2.0), grad_norm=norms))
    assert found["gradient_spikes"] == 1 and found["gradient_spike_steps"] == [100]
    assert found["spikes"] == 0 and found["nonfinite_gradients"] == 1
    skewed = np.exp(
        noise(400, 1.0)
    )  # the largest lies 20 robust deviations of the norm itself up, three of its logarithm
    assert stability(lines(np.full(400, 2.0), grad_norm=skewed))["gradient_spikes"] == 0


def test_gradients_of_exactly_zero_do_not_hide_a_spike():
    norms = 0.01 * np.exp(noise(400, 0.2))
    norms[:60] = 0.0
    norms[199] = 0.1
    assert stability(lines(np.full(400, 2.0), grad_norm=norms))["gradient_spike_steps"] == [200]


# --- failures -------------------------------------------------------------------------------------------------------


def test_a_run_that_blows_up_diverged():
    """From step 301 the loss climbs by 0.05 a step; the median of 25 crosses 3 sigma = 0.3 about 6 + 12 steps later."""
    losses = 2 + noise(500, 0.1) + np.maximum(0, np.arange(1, 501) - 300) * 0.05
    found = stability(lines(losses))
    assert found["diverged"] is True
    assert 306 < found["diverged_at"] < 330
    assert found["rise_from_best"] == pytest.approx(9.4, abs=0.3) and found["first_loss"] == pytest.approx(2.0, abs=0.2)


def test_a_run_that_fails_early_diverged():
    """The median of the first 50 steps would be that of the failure."""
    losses = np.where(np.arange(1000) < 8, 2.0, 9.0) + noise(1000, 0.1)
    found = stability(lines(losses))
    assert found["diverged"] is True and 9 <= found["diverged_at"] <= 18
    assert found["first_loss"] == pytest.approx(2.0, abs=0.2)


def test_diverged_at_is_where_it_stays_above():
    """An excursion that comes back is not where the divergence began."""
    losses = 2 + noise(600, 0.05)
    losses[100:200] += 3
    assert stability(lines(losses))["diverged"] is False
    losses[400:] += 3
    assert 401 <= stability(lines(losses))["diverged_at"] <= 430


def test_a_climb_back_below_the_start_is_no_divergence_but_is_reported():
    losses = np.concatenate([np.linspace(10, 5, 200), np.linspace(5, 9, 200)]) + noise(400, 0.05)
    found = stability(lines(losses))
    assert found["diverged"] is False
    # medians of 20 steps lag by 9.5: 9 - 9.5 * 0.02 at the end, and 5 and a little at best
    assert found["rise_from_best"] == pytest.approx(9 - 0.19 - 5.1, abs=0.1)


@pytest.mark.parametrize(("rise", "diverged"), [(0.25, False), (0.40, True)])
def test_the_end_must_lie_three_sigma_above_the_start(rise, diverged):
    losses = 2 + noise(2000, 0.1) + np.where(np.arange(2000) < 1000, 0, rise)
    losses[:5] = 2.0
    assert stability(lines(losses))["diverged"] is diverged


@pytest.mark.parametrize(("rise", "diverged"), [(0.009, False), (0.011, True)])
def test_without_noise_the_end_must_lie_one_per_cent_above_the_start(rise, diverged):
    losses = np.where(np.arange(200) < 100, 2.0, 2.0 * (1 + rise))
    assert stability(lines(losses))["diverged"] is diverged


def test_a_single_nan_in_the_middle_is_counted_and_no_divergence():
    losses = 3 - 0.002 * np.arange(500) + noise(500, 0.05)
    whole = stability(lines(losses))
    losses[249] = math.nan
    found = stability(lines(losses))
    assert found["nonfinite_losses"] == 1 and found["first_nonfinite_step"] == 250
    assert found["diverged"] is False and found["diverged_at"] is None and found["spikes"] == 0
    assert found["last_loss"] == whole["last_loss"] and found["steps"] == 500
    assert found["residual_std"] == pytest.approx(whole["residual_std"], rel=0.01)


def test_a_gap_longer_than_the_window_is_no_divergence_once_it_ends():
    losses = 2 + noise(500, 0.05)
    losses[100:200] = math.nan
    found = stability(lines(losses))
    assert found["nonfinite_losses"] == 100 and found["diverged"] is False


def test_nan_to_the_end_is_a_divergence():
    losses = 2 + noise(500, 0.05)
    losses[100] = math.inf
    losses[400:] = math.nan
    found = stability(lines(losses))
    assert found["diverged"] is True and found["diverged_at"] == 401
    assert found["nonfinite_losses"] == 101 and found["first_nonfinite_step"] == 101
    assert found["last_loss"] is None and found["rise_from_best"] is None
    assert found["residual_std"] == pytest.approx(0.05, rel=0.15)
    json.dumps(found, allow_nan=False)


def test_losses_that_are_lost_at_the_very_end_leave_no_last_loss():
    found = stability(lines(np.append(2 + noise(497, 0.05), [math.nan] * 3)))
    assert found["last_loss"] is None and found["diverged"] is True and found["diverged_at"] == 498


def test_a_gap_within_a_divergence_does_not_interrupt_it():
    losses = np.where(np.arange(500) < 200, 2.0, 9.0) + noise(500, 0.05)
    losses[300:400] = math.nan
    assert 201 <= stability(lines(losses))["diverged_at"] <= 214


def test_infinite_and_nan_read_as_null():
    losses, norms = 2 + noise(60, 0.1), np.ones(60)
    losses[[20, -1]] = math.nan, math.inf
    norms[[30, 31]] = math.inf, math.nan
    raw = [{"step": i, "loss": x, "grad_norm": g} for i, (x, g) in enumerate(zip(losses, norms, strict=True), start=1)]
    assert stability(raw) == stability(lines(losses, grad_norm=norms))
    assert stability(raw, raw)["paired_steps"] == 58


def test_one_easy_batch_at_the_start_is_not_the_best_loss():
    losses = np.full(200, 2.0)
    losses[0] = 0.5
    assert stability(lines(losses))["rise_from_best"] == 0.0


def test_a_climb_into_nan_diverged_with_the_climb():
    losses = np.where(np.arange(500) < 400, 2.0, 9.0) + noise(500, 0.05)
    losses[450:] = math.nan
    found = stability(lines(losses))
    assert found["diverged"] is True and 401 <= found["diverged_at"] <= 414


def test_a_gradient_that_is_not_finite_comes_before_the_loss():
    losses, norms = np.full(40, 2.0), np.full(40, 1.0)
    norms[20:22] = math.inf
    losses[25] = math.nan
    found = stability(lines(losses, grad_norm=norms))
    assert found["nonfinite_gradients"] == 2 and found["nonfinite_losses"] == 1 and found["first_nonfinite_step"] == 21


@pytest.mark.parametrize("n", [1, 2, 7, 19])
def test_a_short_run_says_little(n):
    losses = np.linspace(3, 2, n) if n > 1 else np.array([3.0])
    found = stability(lines(losses), lines(losses))
    unknown = (
        "residual_std",
        "residual_sigma",
        "loss_variance",
        "paired_residual_std",
        "spikes",
        "spike_steps",
        "spike_depth",
    )
    assert {found[key] for key in (*unknown, "gradient_spikes", "diverged", "diverged_at", "rise_from_best")} == {None}
    room = max(1, min(5, n // 2))
    assert found["first_loss"] == np.median(losses[:room]) and found["last_loss"] == np.median(losses[-room:])
    assert found["steps"] == n and found["nonfinite_losses"] == 0


def test_twenty_steps_are_enough():
    found = stability(lines(2 + noise(20, 0.1)))
    assert found["residual_std"] > 0.03 and found["spikes"] == 0 and found["diverged"] is False


def test_a_run_that_dies_at_once_diverged():
    found = stability(lines([2.0, 2.1, math.nan]))
    assert found["diverged"] is True and found["diverged_at"] == 3 and found["last_loss"] is None
    dead = stability(lines([math.nan] * 30))
    assert dead["diverged"] is True and dead["diverged_at"] == 1 and dead["first_loss"] is None


def test_a_run_without_steps_is_all_unknown():
    found = stability([], [])
    assert found["steps"] == found["missing_steps"] == found["nonfinite_losses"] == found["paired_steps"] == 0
    assert found["first_loss"] is found["diverged"] is found["clipped_share"] is found["first_nonfinite_step"] is None
    assert found["grad_norms"] == found["update_ratio"] == {} and found["grad_norm"]["max"] is None


# --- lines ----------------------------------------------------------------------------------------------------------


def test_order_does_not_matter_and_the_later_line_of_a_step_counts():
    whole = lines(3 - 0.01 * np.arange(100) + noise(100, 0.1), clipped=[False] * 100)
    stale = [{"step": step, "loss": 50.0, "clipped": True} for step in (40, 41, 42)]
    assert stability([*stale, *reversed(whole)]) == stability(whole)
    assert stability([*whole, *stale])["spikes"] == 1


def test_missing_steps_are_counted_and_do_not_shift_the_rest():
    losses = 2 + noise(300, 0.1)
    losses[200:203] += 4
    kept = [line for line in lines(losses) if line["step"] not in (50, 51, 202)]
    found = stability(kept)
    assert found["missing_steps"] == 3 and found["steps"] == 297
    assert found["spike_steps"] == [201] and found["spike_recovery"] == 3


@pytest.mark.parametrize("step", [None, "7", 1.5, True])
def test_a_line_without_a_step_is_refused(step):
    with pytest.raises(UserError, match="line 2 of the steps"):
        stability([{"step": 1, "loss": 2.0}, {"step": step, "loss": 2.0}])


def test_the_clipped_share_is_exact():
    clipped = [i % 8 == 0 for i in range(40)]
    assert stability(lines([2.0] * 40, clipped=clipped))["clipped_share"] == 0.125
    assert stability(lines([2.0] * 40))["clipped_share"] is None
    assert stability(lines([2.0] * 4, clipped=[True, None, False, True]))["clipped_share"] == 2 / 3


def test_norms_and_update_ratios_by_hand():
    norms = [*range(1, 21), math.nan]  # p95 by linear interpolation: 1 + 0.95 * 19
    types = [{"q_proj": float(i), "v_proj": None if i else 5.0} for i in range(21)]
    ratios = [{"q_proj": None}, *({"q_proj": 0.1 * i} for i in range(1, 21))]
    found = stability(lines([2.0] * 21, grad_norm=norms, grad_norms=types, update_ratio=ratios))
    assert found["grad_norm"] == {"median": 10.5, "p95": pytest.approx(19.05), "max": 20.0}
    assert found["grad_norms"]["q_proj"] == {"median": 10.0, "p95": pytest.approx(19.0), "max": 20.0}
    assert found["grad_norms"]["v_proj"] == {"median": 5.0, "p95": 5.0, "max": 5.0}
    assert found["update_ratio"] == {"q_proj": {"median": pytest.approx(1.05), "max": pytest.approx(2.0)}}
    assert list(found["grad_norms"]) == ["q_proj", "v_proj"]


@pytest.mark.parametrize(
    "wrong",
    [
        *({"half_window": 0}, {"window": 0}, {"start_window": 0}, {"min_rise": -0.1}, {"min_steps": 3}),
        *({"spike_threshold": 0}, {"spike_threshold": math.nan}, {"divergence_threshold": -1}),
    ],
)
def test_settings_that_mean_nothing_are_refused(wrong):
    with pytest.raises(UserError, match=next(iter(wrong))):
        StabilitySettings(**wrong)


def test_windows_follow_the_length_of_the_run_and_the_settings():
    for n, expected in ((40, 5), (400, 20), (4000, 50)):
        found = stability(lines(2 + noise(n, 0.1)))
        assert found["half_window"] == found["window"] == expected
    chosen = stability(lines(2 + noise(400, 0.1)), settings=StabilitySettings(half_window=7, window=9))
    assert (chosen["half_window"], chosen["window"]) == (7, 9)
    with pytest.raises(dataclasses.FrozenInstanceError):
        StabilitySettings().window = 3


# --- seeds ----------------------------------------------------------------------------------------------------------


def test_seeds_are_pooled():
    runs = []
    for seed, depth in ((1, 0.0), (2, 3.0), (3, math.nan)):
        losses = 2 + noise(500, 0.1, seed)
        losses[300] += depth
        if seed == 3:
            losses[400:] = math.nan
        runs.append(stability(lines(losses, grad_norm=np.full(500, float(seed)), clipped=[False] * 500)))
    pooled = pool(runs)
    assert set(pooled) == {*POOLED, "grad_norm_median", "grad_norm_p95", "grad_norm_max", "spike_rate", "diverged"}
    assert pooled["diverged"] == {"count": 1, "n": 3}
    assert pooled["last_loss"]["n"] == 2  # the survivors
    assert pooled["spikes"]["mean"] == pytest.approx(1 / 3) and pooled["spike_depth"]["n"] == 1
    assert pooled["grad_norm_median"]["mean"] == 2.0 and pooled["grad_norm_median"]["std"] == 1.0
    assert pooled["residual_sigma"]["mean"] == pytest.approx(0.1, rel=0.1)
    assert pooled["paired_residual_std"] == {"mean": None, "std": None, "low": None, "high": None, "n": 0}
    # one event in 1,500 steps: Garwood's 0.0253 and 5.572 over 1.5
    rate = pooled["spike_rate"]
    assert (rate["spikes"], rate["steps"], rate["rate"]) == (1, 1500, pytest.approx(1 / 1.5))
    assert (rate["low"], rate["high"]) == (pytest.approx(0.0253 / 1.5, abs=1e-4), pytest.approx(5.572 / 1.5, abs=1e-3))
    json.dumps(pooled, allow_nan=False)


def test_pooling_short_runs_leaves_rates_unknown():
    pooled = pool([stability(lines([2.0, 1.9]))])
    assert pooled["spike_rate"] == {"rate": None, "low": None, "high": None, "spikes": 0, "steps": 0}
    assert pooled["diverged"] == {"count": 0, "n": 0}
    assert pooled["last_loss"]["mean"] == 1.9 and pooled["last_loss"]["low"] is None

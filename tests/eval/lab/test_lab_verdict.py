"""The verdict's sentences on synthetic results whose answer is known."""

from __future__ import annotations

import pytest
from lab_files import lab_results, write_sweep

from curvelora_eval.lab.presence_verdict import rounding
from curvelora_eval.lab.verdict import verdict

PAIR = ("qlora", "loran:sinter")


def joined(results: dict, group: str, sweep: dict | None = None) -> str:
    return " ".join(verdict(results, sweep)[group])


def with_values(results: dict, key: str, path: tuple[str, ...], values: list[float]) -> None:
    for run, value in zip(results["runs"][key].values(), values, strict=True):
        place = run
        for name in path[:-1]:
            place = place[name]
        place[path[-1]] = value


def test_cost_names_ratio_interval_and_memory():
    said = verdict(lab_results(arms=PAIR))["cost"]
    assert said[0] == (
        "LoRAN Sinter (a = 5e-5) takes 1.62 times QLoRA's step (95 % interval 1.60 to 1.65) and 1.10 times its peak memory."
    )
    assert said[1] == "QLoRA's step takes 800 ms at 41.0 % of the device's peak (MFU)."


def test_cost_that_cannot_be_told_apart():
    results = lab_results(arms=PAIR)
    results["cost"]["arms"]["loran:sinter"] |= {
        "overhead": {"ratio": 1.01, "low": 0.98, "high": 1.03, "pairs": 5},
        "peak_allocated_bytes": None,
    }
    assert verdict(results)["cost"][0] == (
        "LoRAN Sinter (a = 5e-5) takes 1.01 times QLoRA's step (95 % interval 0.98 to 1.03); the interval holds 1, so the "
        "two cannot be told apart."
    )


def test_identity_in_bf16():
    """3.5e-5 against 0.213 * 2^-7 = 1.664e-3: 48 times less."""
    (sentence,) = verdict(lab_results(arms=PAIR))["presence"]
    assert sentence.startswith(
        "At this setting LoRAN Sinter (a = 5e-5) is numerically the identity in bf16: 0.6 % of the entries that enter the "
        "product differ from LoRA's, and what f adds to a layer's output is 3.5e-5 of the adapter's, 48 times less than "
        "rounding to bf16 (0.0017). What remains is the derivative, which differs from the linear map's in 40.0 % of the "
        "entries by 0.0030 rms"
    )
    assert "correlation of 0.55" in sentence


def test_present_at_a_large_amplitude_and_in_fp32():
    large, fp32 = verdict(lab_results(arms=("qlora", "loran:sinter-large", "loran:sinter@fp32")))["presence"]
    assert large.startswith("In LoRAN Sinter (a = 2e-2) the nonlinearity is present in bf16: 71.0 % of the entries")
    assert "0.014 of the adapter's, 8.4 times more than rounding to bf16 (0.0017)" in large
    # 3.5e-5 / (0.213 * 2^-23) = 1378
    assert "is present in fp32" in fp32 and "1,400 times more than rounding to fp32" in fp32


def test_between_the_two_it_is_at_the_edge():
    results = lab_results(arms=PAIR)
    with_values(results, "loran:sinter", ("presence", "forward"), [0.2] * 3)
    with_values(results, "loran:sinter", ("presence", "output_ratio", "exact"), [8.2e-4] * 3)
    (sentence,) = verdict(results)["presence"]
    assert sentence.startswith("LoRAN Sinter (a = 5e-5) is at the edge of bf16: 20.0 % of the entries")
    assert "2 times less than rounding" in sentence or "2.0 times less than rounding" in sentence


def test_a_linear_arm_has_no_presence_and_activation_space_has_its_own_sentence():
    assert verdict(lab_results(arms=("qlora", "loran:identity")))["presence"] == []
    assert verdict(lab_results(arms=("qlora", "aurora")))["presence"] == [
        "Of what AuroRA adds to a layer's output, 34.0 % (in norm) is no affine map of its input."
    ]


@pytest.mark.parametrize(("dtype", "measured"), [("bfloat16", 1.662e-3), ("float16", 2.079e-4)])
def test_rounding_is_what_it_is_on_products_of_gaussian_factors(dtype, measured):
    torch = pytest.importorskip("torch")
    generator = torch.Generator().manual_seed(0)
    u = torch.randn(256, 32, generator=generator) @ torch.randn(32, 256, generator=generator) * 1e-3
    rounded = u.to(getattr(torch, dtype)).float()
    assert ((rounded - u).norm() / u.norm()).item() == pytest.approx(rounding(dtype), rel=0.01)
    assert rounding(dtype) == pytest.approx(measured, rel=0.003)
    assert rounding("int8") is None


def test_no_divergence_and_no_spikes():
    said = verdict(lab_results(steps=2000, arms=PAIR))["stability"]
    assert said[0] == "No arm diverged in 3 seeds × 2,000 steps."
    assert said[1] == "No arm's loss spiked in 3 seeds × 2,000 steps."


def test_diverged_arm():
    results = lab_results(arms=("qlora", "loran:sinter-large"))
    results["runs"]["loran:sinter-large"]["43"]["status"] = "diverged"
    stability = results["runs"]["loran:sinter-large"]["44"]["stability"]
    stability |= {"diverged": True, "diverged_at": 77}
    said = verdict(results)["stability"]
    assert said[0] == "LoRAN Sinter (a = 2e-2) diverged in 2 of 3 seeds from step 77."
    assert not any("No arm diverged" in sentence for sentence in said)
    assert "Loss spikes over all seeds: LoRAN Sinter (a = 2e-2) 6 and the others none." in said


def test_noise_is_compared_seed_by_seed():
    """Ratios 2, 2.2, 1.8 to the baseline: log ratios 0.693, 0.788, 0.588; mean 0.690, sd 0.1004, t(2) = 4.303.

    exp(0.690 ± 0.2495) = 1.553 to 2.558.
    """
    results = lab_results(arms=PAIR)
    with_values(results, "qlora", ("stability", "residual_std"), [0.01, 0.02, 0.03])
    with_values(results, "loran:sinter", ("stability", "residual_std"), [0.02, 0.044, 0.054])
    assert (
        "Loss noise as a multiple of QLoRA's, with 95 % intervals over seeds: "
        "LoRAN Sinter (a = 5e-5) 1.99 (1.55 to 2.56)." in verdict(results)["stability"]
    )
    with_values(results, "loran:sinter", ("stability", "residual_std"), [0.02, 0.01, 0.03])
    assert "which the seeds do not distinguish from 1" in joined(results, "stability")


def test_heldout_loss_against_the_baseline():
    results = lab_results(arms=PAIR)
    with_values(results, "qlora", ("heldout", "loss"), [2.0, 2.1, 2.2])
    with_values(results, "loran:sinter", ("heldout", "loss"), [2.11, 2.20, 2.30])
    # differences 0.11, 0.10, 0.10: mean 0.1033, half width 4.303 * 0.00577 / sqrt(3) = 0.0143
    assert (
        "The held-out loss of LoRAN Sinter (a = 5e-5) is 0.103 above QLoRA's (95 % interval 0.0890 to 0.118 over 3 seeds)."
        in verdict(results)["stability"]
    )
    with_values(results, "loran:sinter", ("heldout", "loss"), [2.1, 2.0, 2.2])
    assert "differs by 0 from QLoRA's, which the seeds do not distinguish from 0." in joined(results, "stability")


def test_one_seed_and_random_weights_are_limits():
    results = lab_results(seeds=(42,), arms=PAIR)
    results["settings"]["weights"] = "random"
    results["environment"]["hardware"]["gpu"] = None
    said = verdict(results)
    limits = " ".join(said["limits"])
    assert "The base weights are random" in limits and "There is one seed" in limits
    assert "Step times are a CPU's" in limits
    assert "`curvelora sweep` makes the map" in limits
    assert "in the one seed there is: LoRAN Sinter (a = 5e-5)" in " ".join(said["stability"])
    assert "distinguish" not in " ".join(said["stability"])


@pytest.mark.parametrize(
    ("cost", "run", "cpu"),
    [
        (None, "GPU", False),
        (None, None, False),
        ("GPU", None, False),
        (..., "GPU", True),
        ("GPU", ..., False),
        (..., ..., True),
    ],
)
def test_the_hardware_is_that_of_the_cost(cost, run, cpu):
    """None leaves the part out, ... is a CPU; of what is not known nothing is said."""
    results = lab_results(arms=PAIR)
    del results["environment"]
    for record, gpu in ((results["cost"], cost), (results, run)):
        if gpu is not None:
            record["environment"] = {"hardware": {"cpu": "EPYC", "gpu": None if gpu is ... else gpu}}
    assert ("Step times are a CPU's" in joined(results, "limits")) is cpu


def test_intervals_are_not_corrected_for_their_number():
    (said,) = (s for s in verdict(lab_results(arms=PAIR))["limits"] if "not corrected" in s)
    assert said.startswith("Every interval is of 95 % by itself, not corrected for the number of arms and measures")
    assert "not corrected" not in joined(lab_results(seeds=(42,), arms=PAIR) | {"cost": None}, "limits")


def test_few_rounds_are_a_limit():
    results = lab_results(arms=PAIR)
    assert "too narrow" not in joined(results, "limits")
    results["cost"]["arms"]["loran:sinter"]["overhead"]["pairs"] = 3
    assert "Step times come from 3 pairs of rounds" in joined(results, "limits")


def test_rule_of_three():
    """No event in n steps leaves rates up to 3 / n at 95 %: 3000 / 6000 in 1,000 steps."""
    assert "up to 0.5 times in 1,000 steps" in joined(lab_results(steps=2000, arms=PAIR), "limits")


def test_sweep_sentences(tmp_path):
    sweep = write_sweep(tmp_path)
    said = verdict(lab_results(arms=PAIR), sweep)
    assert "2 of the 19 runs of the sweep diverged, all of them from amplitude 0.2 on." in said["stability"]
    best = "The sweep's lowest held-out loss is 2.312 at amplitude 0.002, frequency 1,000; the baseline's is 2.335."
    assert best in said["stability"]
    assert said["presence"][-1] == (
        "In the sweep f changes 1 % of the entries in the forward pass from amplitude 0.002 on (5e-5 does not)."
    )
    assert not any("curvelora sweep" in sentence for sentence in said["limits"])


def test_nothing_measured():
    said = verdict({"schema": 1, "kind": "lab"})
    assert (said["cost"], said["stability"], said["presence"]) == ([], [], [])
    assert any("Cost was not measured" in sentence for sentence in said["limits"])

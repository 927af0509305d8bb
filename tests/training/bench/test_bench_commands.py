"""`bench layer` and `bench step` from the command line, on shapes of a moment."""

from __future__ import annotations

import json
from collections import Counter

import pytest
import torch
from peft.utils.integrations import dequantize_bnb_weight

from curvelora_training.bench import adapted
from curvelora_training.bench.layer import OneLayer
from curvelora_training.bench.trial import PHASES
from liger_stub import install


def read(path):
    return json.loads(path.read_text(), parse_constant=pytest.fail)


@pytest.mark.parametrize("stored", ["nf4", "bf16", "fp32"])
def test_layers_are_timed(cli, tmp_path, stored):
    out = tmp_path / "sub" / "layer.json"
    code, printed, err = cli(
        "bench", "layer", "--shapes", "96x64,64x128", "--tokens", 32, "--rank", 4, "--alpha", 8, "--base", stored,
        "--arms", "qlora,loran:sinter,ranlora,aurora,loran:tanh@fp32", "--rounds", 2, "--timed", 2, "--out", out,
    )  # fmt: skip
    assert code == 0, err
    record = read(out)
    assert (record["schema"], record["kind"], record["device"]) == (1, "bench_layer", "cpu")
    assert record["settings"]["base"] == stored and record["settings"]["r"] == 4
    assert [(la["d_out"], la["d_in"]) for la in record["layers"]] == [(96, 64), (64, 128)]
    for layer in record["layers"]:
        assert list(layer["arms"]) == ["qlora", "loran:sinter", "ranlora", "aurora", "loran:tanh@fp32"]
        for key, arm in layer["arms"].items():
            assert arm["std_BA"] == pytest.approx(0.01, rel=0.15)
            assert len(arm["raw_step_seconds"]) == 4 and set(arm["phases"]) == {"forward", "backward"}
            assert (arm["overhead"] is None) == (key == "qlora") and arm["extra_bytes"] is None
    assert "96 x 64 on cpu, std(BA) = 0.01" in printed and str(out) in printed


@pytest.mark.parametrize(
    ("stored", "dtype"), [("nf4", torch.bfloat16), ("bf16", torch.bfloat16), ("fp32", torch.float32)]
)
def test_the_layer_alone_is_the_linear_map_of_its_weight(stored, dtype):
    layer = OneLayer(64, 96, stored, torch.device("cpu"))
    weight = layer.proj.weight
    if stored == "nf4":
        weight = dequantize_bnb_weight(weight, state=weight.quant_state)
    x = torch.randn(5, 64, dtype=dtype)
    expected = x.double() @ weight.double().T
    assert not weight.requires_grad and layer.config.dtype == dtype
    assert (layer(x).double() - expected).norm() / expected.norm() < (1e-6 if stored == "fp32" else 1e-2)


@pytest.mark.parametrize(
    ("argv", "said"),
    [
        (["--shapes", "96"], "--shapes '96' is not understood"),
        (["--shapes", "0x64"], "--shapes '0x64' is not understood"),
        (["--shapes", "96x64,"], "--shapes '' is not understood"),
        (["--tokens", "0"], "--tokens and --rank must be at least 1"),
        (["--alpha", "nan"], "--alpha positive"),
        (["--arms", "qlora,lora@liger"], "arm lora@liger: @liger and @keep are for what lies around linear layers"),
        (["--arms", "qlora@keep=2"], "arm qlora@keep=2: @liger and @keep"),
        (["--arms", "qlora,full"], "the arm full belongs to `bench compare`"),
        (["--rounds", "0"], "--rounds and --timed must be at least 1"),
        (["--std", "0"], "--std must be positive, not 0.0"),
        (["--std", "nan"], "--std must be positive, not nan"),
        (["--shapes", "96x64", "--arms", "qlora,loran", "--rank", "80", "--tokens", "4"], "rank"),
    ],
)
@pytest.mark.parametrize("command", ["layer"])
def test_bad_options_of_layer(cli, tmp_path, command, argv, said):
    code, _, err = cli("bench", command, "--out", tmp_path / "x.json", *argv)
    assert code == 2 and said in err and not (tmp_path / "x.json").exists()
    assert err.startswith("error: ") and "Traceback" not in err


def test_steps_of_a_shape_are_timed(cli, config, tmp_path):
    config().save_pretrained(tmp_path)
    out = tmp_path / "step.json"
    code, printed, err = cli(
        "bench", "step", "--model", tmp_path / "config.json", "--batch-size", 2, "--length", 16, "--rank", 4,
        "--arms", "qlora,loran:sinter", "--arm", "wide=loran,r=8", "--rounds", 2, "--timed", 1, "--out", out,
    )  # fmt: skip
    assert code == 0, err
    record = read(out)
    assert (record["kind"], record["rounds"], record["tokens_per_step"], record["processes"]) == (
        "bench_step",
        2,
        32,
        1,
    )
    assert record["settings"]["base"] == "nf4" and record["settings"]["checkpointing"] is True
    assert list(record["arms"]) == ["qlora", "loran:sinter", "wide"]
    trained = {key: arm["trainable_parameters"] for key, arm in record["arms"].items()}
    assert trained["wide"] == 2 * trained["qlora"] == 2 * trained["loran:sinter"]
    for arm in record["arms"].values():
        assert set(arm["phases"]) == set(PHASES) and arm["step_seconds"]["n"] == 2
        assert arm["std_BA"] == pytest.approx(0.01, rel=0.15)
    assert "(nf4) ready in" in printed and "round 2 of 2" in printed and f"written: {out}" in printed


@pytest.fixture
def asked(monkeypatch):
    """The modes in which fused kernels were asked for; with "auto" three layers have them."""
    modes = []
    answers = {"auto": (3, Counter({"on Mars": 11})), "off": (0, Counter({"kernels: off": 14}))}
    monkeypatch.setattr(adapted, "use_kernels", lambda model, mode: modes.append(mode) or answers[mode])
    return modes


def test_arms_are_computed_as_their_switches_say(cli, config, tmp_path, monkeypatch, asked):
    install(tmp_path, monkeypatch)
    config().save_pretrained(tmp_path)
    out = tmp_path / "step.json"
    arms = "qlora@eager,qlora,qlora@liger,loran:sinter@keep=1@eager,qlora@keep=9@liger"
    code, printed, err = cli(
        "bench", "step", "--model", tmp_path / "config.json", "--batch-size", 2, "--length", 16, "--rank", 4,
        "--arms", arms, "--rounds", 2, "--timed", 1, "--reentrant", "--dropout", 0.1, "--out", out,
    )  # fmt: skip
    assert code == 0, err
    assert asked == ["off", "auto", "auto", "off", "auto"]
    record = read(out)
    assert record["settings"]["reentrant"] and record["settings"]["dropout"] == 0.1
    assert {key: (a["fused_layers"], a["liger"], a["kept_layers"]) for key, a in record["arms"].items()} == {
        "qlora@eager": (0, False, 0),
        "qlora": (3, False, 0),
        "qlora@liger": (3, True, 0),
        "loran:sinter@keep=1@eager": (0, False, 1),
        "qlora@keep=9@liger": (3, True, 2),
    }
    assert record["arms"]["qlora"]["unfused_layers"] == {"on Mars": 11}
    assert "ready: qlora@liger, trains" in printed and "fused layers: 3" in printed
    from liger_kernel.transformers.monkey_patch import calls

    steps = 2 * (4 + 1 + 2 + 1)  # of two arms, untimed and timed
    assert calls["loss"] == steps
    assert (
        calls["rope"] == 2 * 2 * steps // 2
    )  # two layers, whose forward pass is made again; not where products are kept


def test_a_layer_alone_has_fused_kernels_or_not(cli, tmp_path, asked):
    out = tmp_path / "layer.json"
    options = ["--shapes", "96x64", "--tokens", 8, "--rank", 4, "--rounds", 1, "--timed", 1, "--out", out]
    code, _, err = cli("bench", "layer", *options, "--arms", "qlora@eager,qlora")
    assert code == 0, err
    assert {key: arm["fused_layers"] for key, arm in read(out)["layers"][0]["arms"].items()} == {
        "qlora@eager": 0,
        "qlora": 3,
    }


def test_what_was_measured_is_kept_when_a_later_round_fails(cli, config, tmp_path, monkeypatch):
    from curvelora_training.bench.devices import Device

    config().save_pretrained(tmp_path)
    resets = iter(range(99))

    def stop_in_the_second_round(self):
        if next(resets) == 1:
            raise KeyboardInterrupt

    monkeypatch.setattr(Device, "reset_peak", stop_in_the_second_round)
    out = tmp_path / "step.json"
    model = ["--model", tmp_path / "config.json", "--batch-size", 1, "--length", 8, "--rank", 4]
    code, _, err = cli("bench", "step", *model, "--arms", "qlora", "--rounds", 3, "--timed", 1, "--out", out)
    assert (code, err) == (130, "interrupted\n") and read(out)["rounds"] == 1


def test_bad_options_of_step_in_one_message(cli, tmp_path):
    code, _, err = cli(
        "bench", "step", "--model", "llama2-7c", "--rank", 0, "--length", 0, "--out", tmp_path / "x.json"
    )
    assert code == 2 and not (tmp_path / "x.json").exists()
    for part in ("did you mean 'llama2-7b'", "--rank must be", "--length must be"):
        assert part in err


def test_the_group_lists_its_commands(cli):
    code, printed, _ = cli("bench")
    assert code == 0 and all(f"  {name} " in printed for name in ("layer", "step", "compare", "report"))
    code, _, err = cli("bench", "compar")
    assert code == 2 and "did you mean 'compare'" in err

"""The benchmark of the singular factors: its record, its drawn spectra, and what it refuses."""

from __future__ import annotations

import json

import pytest
import torch

import curvelora.svd
from curvelora.cli import run_guarded, run_module
from curvelora_training.bench import svd_factors

CPU = torch.device("cpu")


def bench(*argv: object) -> int:
    words = [str(word) for word in argv]
    return run_guarded(lambda: run_module(svd_factors, "svd_factors", words))


def test_the_shapes_are_those_of_the_model():
    assert svd_factors.layer_shapes("llama3-8b", 1) == {
        "q_proj": (4096, 4096),
        "k_proj": (1024, 4096),
        "v_proj": (1024, 4096),
        "up_proj": (14336, 4096),
        "down_proj": (4096, 14336),
    }


@pytest.mark.parametrize(
    ("spectrum", "expected"), [("decaying", [1, 0.5**0.5]), ("clustered", [1, 1 - 0.4 / 41]), ("random", None)]
)
def test_a_drawn_weight_has_its_spectrum(spectrum, expected):
    weight = svd_factors.drawn(spectrum, (64, 48), 0, CPU)
    S = torch.linalg.svdvals(weight.double())
    assert weight.shape == (64, 48)
    if expected:
        assert S[:2].tolist() == pytest.approx(expected, rel=5e-3)
    if spectrum == "clustered":
        assert S[-6:].tolist() == pytest.approx([0.5] * 6, abs=2e-9) and S[-7] > 0.59
    assert torch.equal(weight, svd_factors.drawn(spectrum, (64, 48), 0, CPU))
    assert not torch.equal(weight, svd_factors.drawn(spectrum, (64, 48), 1, CPU))


def test_the_record(tmp_path, monkeypatch):
    monkeypatch.setattr(curvelora.svd, "SMALL", 100)
    monkeypatch.setattr(curvelora.svd, "LARGEST_SHARE", 1 / 8)
    out = tmp_path / "new/svd.json"
    argv = ("--shape", "llama3-8b", "--ranks", "2,3", "--scale", 32, "--layers", 2, "--device", "cpu", "--out", out)
    assert bench(*argv) == 0
    record = json.loads(out.read_text())
    assert record["kind"] == "bench_svd_factors" and record["totals"] == "2 layers, scaled to 32"
    assert record["environment"]["versions"]["torch"] == torch.__version__ and record["device"] == "cpu"
    assert len(record["cases"]) == 3 * 2 * 2 * 2  # spectra, ranks, ends, solvers
    for case in record["cases"]:
        assert case["weights"] == case["proved"] == 10 and case["total_seconds"] > 0
        assert set(case["median_seconds"]) == set(record["modules"])
        assert case["searched"] == (6 if case["solver"] == "auto" else 0)  # k and v are narrow
        errors = case.get("against_full_svd", {})
        assert bool(errors) == (case["solver"] == "auto")
        for error in errors.values():
            assert error["values"] < 1e-12 and error["bound_on_values"] < 1e-6
            assert error["bound_on_subspace"] is None or error["subspace"] <= error["bound_on_subspace"] + 1e-12


def test_without_the_full_svd(tmp_path):
    argv = ("--ranks", "2", "--scale", 64, "--spectra", "random", "--solvers", "auto", "--device", "cpu", "--no-svd")
    assert bench(*argv, "--out", tmp_path / "svd.json") == 0
    record = json.loads((tmp_path / "svd.json").read_text())
    assert [(case["solver"], case["end"]) for case in record["cases"]] == [("auto", "first"), ("auto", "last")]
    assert record["full_svd_seconds"] == {} and "against_full_svd" not in record["cases"][0]


@pytest.mark.parametrize(
    ("options", "said"),
    [
        (["--shape", "llama3-8"], "--shape llama3-8 is unknown; did you mean 'llama3-8b'?"),
        (["--ranks", "two"], "--ranks two is not understood: write 2,16"),
        (["--ranks", "0,2"], "--ranks 0,2: a rank is at least 1 and below 16"),
        (["--ranks", "16"], "--ranks 16: a rank is at least 1 and below 16"),
        (["--spectra", "flat"], "--spectra flat: known are decaying"),
        (["--solvers", "eig"], "--solvers eig: known are auto, eigh"),
        (["--layers", "0"], "--scale and --layers must be at least 1"),
    ],
)
def test_what_is_refused(capsys, tmp_path, options, said):
    assert bench("--scale", 64, "--device", "cpu", "--out", tmp_path / "svd.json", *options) == 2
    err = capsys.readouterr().err
    assert said in err and len(err.splitlines()) == 1

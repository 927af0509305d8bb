"""docs/evaluation.md is true: its commands run on tiny models and the sample rows of this repository."""

from __future__ import annotations

import re
import shlex
from pathlib import Path
from typing import Any

import pytest

from curvelora import cli
from run_files import result

LAUNCHERS = {"torchrun", "accelerate"}


def test_every_command_of_the_page_runs(
    root: Path, tmp_path: Path, llama_folder: Path, adapters: dict[str, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "tests").symlink_to(root / "tests")
    names = {"M": llama_folder, "A": adapters["lora"], "B": adapters["ranlora"], "D": root / "tests/data/benchmarks"}
    blocks = re.findall(r"```bash\n(.*?)```", (root / "docs/evaluation.md").read_text(encoding="utf-8"), re.DOTALL)
    lines = [line for block in blocks for line in block.splitlines()]
    assert len(lines) > 6
    for line in lines:
        line = line.replace("first/A ", "first/lora ").replace("first/B ", "first/ranlora ")
        words = [str(names.get(word, word)) for word in shlex.split(line)]
        if words[0] in LAUNCHERS:  # what they start, in one process: test_eval_processes.py has several
            assert words[words.index("-m") + 1] == "curvelora.cli"
            words = words[words.index("-m") + 1 :]
        assert cli.main(words[1:]) == 0, line
    scores = tmp_path / "scores"
    assert {p.name for p in (scores / "first").iterdir()} == {
        "baseline",
        "lora",
        "ranlora",
        "summary.json",
        "summary.md",
    }
    assert (scores / "first-compared/compare.md").is_file()
    assert result(scores / "merged/lora/piqa-loglikelihood", "evaluation.json")["merged"]["differ"] == 0
    assert "perplexity" in result(scores / "own", "evaluation.json")["metrics"]


def test_the_commonsense_eight_have_a_mean(
    root: Path, tmp_path: Path, llama_folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    from curvelora_eval.evaluation.summary import GROUPS

    given: list[Any] = ["--model", llama_folder, "--dtype", "float32", "--protocol", "loglikelihood", "--limit", 2]
    given += ["--batch-check", 0, "--data-dir", root / "tests/data/benchmarks", "--out", tmp_path]
    assert cli.main(["eval", "--task", ",".join(GROUPS["commonsense"]), *map(str, given)]) == 0
    summary = result(tmp_path, "summary.json")
    values = [score["value"] for score in summary["scores"]["baseline"].values()]
    mean = summary["averages"]["baseline"]["commonsense, loglikelihood"]
    assert len(values) == 8 and mean["value"] == pytest.approx(sum(values) / 8)
    assert len(mean["subsets"]) == 8
    assert "mean of commonsense, loglikelihood" in (tmp_path / "summary.md").read_text(encoding="utf-8")


@pytest.mark.parametrize("storage", ["nf4", "int8"])
def test_a_quantised_base(
    storage: str, root: Path, tmp_path: Path, llama_folder: Path, adapters: dict[str, Path], capsys: Any
) -> None:
    """It is stored so, is the same after an adapter, and is not merged into."""
    given: list[Any] = ["--model", llama_folder, "--quantization", storage, "--dtype", "float32", "--merge-check"]
    given += ["--adapter", adapters["lora"], "--adapter", adapters["loran"], "--task", "boolq", "--limit", 2]
    given += ["--protocol", "loglikelihood", "--data-dir", root / "tests/data/benchmarks", "--out", tmp_path]
    assert cli.main(["eval", *map(str, given)]) == 0
    said = capsys.readouterr().out
    assert "the base in memory is what it was" in said and f"the base is stored as {storage}" in said
    found = result(tmp_path / "loran/boolq-loglikelihood", "evaluation.json")
    assert found["model"]["quantization"] == storage and found["merged"]["exact"] is False

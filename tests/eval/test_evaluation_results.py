"""docs/evaluation_results.md says what its files say: the tables, the numbers in its text, and the comparison made again."""

from __future__ import annotations

import json
from collections import Counter
from pathlib import Path
from typing import Any

import pytest

from curvelora import cli
from curvelora_eval.evaluation.summary import GROUPS

PAGE, KEPT = "docs/evaluation_results.md", "docs/results/evaluation"
CHOICES = {"boolq": 2, "piqa": 2, "siqa": 3, "hellaswag": 4, "winogrande": 2, "openbookqa": 4}
CHOICES |= {"arc_easy": 4, "arc_challenge": 4}  # but for a few questions of three or five
GLUE = ("mrpc", "rte", "cola", "stsb", "sst2")


def read(path: Path) -> Any:
    return json.loads(path.read_text(encoding="utf-8"))


def interval(metric: dict[str, float], scale: float = 100) -> str:
    return f"{scale * metric['value']:.1f} [{scale * metric['low']:.1f}, {scale * metric['high']:.1f}]"


def share(record: dict[str, Any], count: str) -> str:
    return f"{100 * record['counts'][count] / record['counts']['rows']:.1f}"


def rows(record: dict[str, Any]) -> str:
    """As many as there are, or of how many."""
    benchmark = record["benchmark"]
    return f"{benchmark['rows']:,}" + (f" of {benchmark['published']:,}" if benchmark["subset"] else "")


def table(head: list[str], lines: list[list[str]], words: int) -> str:
    rule = ["---"] * words + ["---:"] * (len(head) - words)
    return "\n".join("| " + " | ".join(cells) + " |" for cells in (head, rule, *lines))


def commonsense(kept: Path) -> str:
    lines = []
    for task in GROUPS["commonsense"]:
        asked = read(kept / f"commonsense-loglikelihood/baseline/{task}-loglikelihood/evaluation.json")
        wrote = read(kept / f"commonsense-llm-adapters/baseline/{task}-clean/evaluation.json")
        norm = asked["metrics"].get("accuracy_norm")
        cells = [task, rows(asked), f"{100 / CHOICES[task]:.1f}", interval(asked["metrics"]["accuracy"])]
        cells += [interval(norm) if norm else "–", interval(wrote["metrics"]["accuracy"])]
        lines.append([*cells, share(wrote, "unparsable"), share(wrote, "truncated"), alone(wrote)])
    means = []
    for name, way in (("loglikelihood", "loglikelihood"), ("llm-adapters", "llm-adapters (clean)")):
        averages = read(kept / f"commonsense-{name}/summary.json")["averages"]["baseline"]
        means.append(f"{100 * averages[f'commonsense, {way}']['value']:.1f}")
    chance = sum(100 / n for n in CHOICES.values()) / len(CHOICES)
    lines.append(["mean", "", f"{chance:.1f}", means[0], "", means[1], "", "", ""])
    head = ["task", "rows", "chance", "loglikelihood", "by characters", "llm-adapters", "no answer", "cut off"]
    return table([*head, "other when alone"], lines, 1)


def alone(record: dict[str, Any]) -> str:
    check = record["batch_independence"]
    return f"{check['differ']} of {check['checked']}"


def gsm8k(kept: Path) -> str:
    lines = []
    for name, template in (("llm-adapters", "clean"), ("metamath", "metamath")):
        record = read(kept / f"gsm8k-{name}/baseline/gsm8k-{template}/evaluation.json")
        decoding = record["decoding"]
        cells = [name, f"{decoding['num_beams']}, {decoding['max_new_tokens']:,}", rows(record)]
        cells += [interval(record["metrics"]["accuracy"]), share(record, "unparsable"), share(record, "truncated")]
        lines.append([*cells, alone(record)])
    head = ["protocol", "beams, new tokens", "rows", "accuracy", "no answer", "cut off", "other when alone"]
    return table(head, lines, 1)


def predictions(kept: Path, arm: str, task: str) -> list[dict[str, Any]]:
    path = kept / f"minilm/scores/{arm}/{task}/predictions.jsonl"
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


def constant(kept: Path, task: str) -> str:
    """The accuracy of the most frequent answer, where accuracy is the metric."""
    if task in ("cola", "stsb"):
        return "0"
    references = Counter(record["reference"] for record in predictions(kept, "lora", task))
    return f"{100 * references.most_common(1)[0][1] / references.total():.1f}"


def minilm(kept: Path) -> str:
    compared = {task["task"]: task for task in read(kept / "minilm/compared/compare.json")["tasks"]}
    lines = []
    for task in GLUE:
        arms = [read(kept / f"minilm/scores/{arm}/{task}/evaluation.json") for arm in ("lora", "loran")]
        (metric,) = (m for m in compared[task]["metrics"] if m["primary"])
        (between,) = metric["comparisons"]
        losses = []
        for arm in ("lora", "loran"):
            result = read(kept / f"minilm/training/{arm}/{task}/result.json")
            losses.append(f"{result['first_loss']:.2f} → {result['last_loss']:.2f}")
        difference = f"{100 * between['difference']:+.1f} [{100 * between['low']:+.1f}, {100 * between['high']:+.1f}]"
        p = f"{between['p_corrected']:.3f}" if between["p_corrected"] >= 1e-3 else "< 0.001"
        cells = [f"{task}, {metric['metric']}", rows(arms[0]), constant(kept, task)]
        cells += [interval(arm["metrics"][metric["metric"]]) for arm in arms]
        verdict = {"A is better": "LoRA is better"}.get(between["verdict"], between["verdict"])
        lines.append([*cells, difference, p, verdict, *losses])
    head = ["task, metric x 100", "rows", "constant answer", "LoRA", "LoRAN", "LoRAN - LoRA", "p, Holm", "verdict"]
    return table([*head, "loss of LoRA", "loss of LoRAN"], lines, 1)


@pytest.mark.parametrize("block", [commonsense, gsm8k, minilm])
def test_the_tables_are_those_of_the_files(root: Path, block: Any) -> None:
    page = (root / PAGE).read_text(encoding="utf-8")
    shown = page.split(f"<!-- {block.__name__} -->\n")[1].split("\n<!-- end -->")[0]
    assert shown == block(root / KEPT)


def test_the_numbers_in_the_text_are_those_of_the_files(root: Path) -> None:
    text = " ".join((root / PAGE).read_text(encoding="utf-8").split())
    kept = root / KEPT
    ppl = read(kept / "wikitext2/baseline/wikitext2/evaluation.json")
    value = ppl["metrics"]["perplexity"]
    counts = f"{ppl['counts']['tokens']:,} tokens, {ppl['counts']['windows']} windows"
    assert f"{value['value']:.2f} [{value['low']:.2f}, {value['high']:.2f}] ({counts})" in text
    for name, task in (("eval_speed_gsm8k_h200.json", "gsm8k"), ("eval_speed_h100.json", "arc_easy")):
        record = read(root / "docs/results" / name)["tasks"][0]
        (engine,), loop = record["engine"], record["original"]
        assert record["task"] == task and f"{engine['ratio']:.0f} times" in text
        assert f"{engine['rows_per_second']:.1f} rows" in text and f"{loop['rows_per_second']:.2f}" in text
        assert f"{engine['same_answer']} of its {engine['compared']} answers" in text
    stsb = [record["prediction"] for record in predictions(kept, "lora", "stsb")]
    assert f"between {min(stsb):.3f} and {max(stsb):.3f}" in text
    assert {record["prediction"] for record in predictions(kept, "loran", "cola")} == {1}
    lines = (kept / "minilm/training/loran/sst2/metrics.jsonl").read_text(encoding="utf-8").splitlines()
    losses = [line["loss"] for line in map(json.loads, lines) if "loss" in line]
    means = [sum(losses[i : i + 20]) / 20 for i in (20, 260)]  # a line every 20 steps
    assert f"falls to {means[0]:.2f} within the first 800 steps and then rises to {means[1]:.2f}" in text
    metamath = read(kept / "gsm8k-metamath/baseline/gsm8k-metamath/evaluation.json")
    assert metamath["resumed_batches"] == 4 and "took all four batches from its journal" in text
    assert metamath["counts"]["rows"] - metamath["counts"]["unparsable"] == 30 and "only 30 of the 880" in text
    records = [read(path) for path in kept.rglob("evaluation.json")]
    assert len(records) == 8 + 8 + 1 + 2 + 10
    made = Counter((record["task"] == "stsb", record["commit"], record["hardware"]["gpu"]) for record in records)
    assert made == {(False, "012611f9cd93", "NVIDIA H200"): 27, (True, "1d1737741d42", None): 2}
    assert "commit 012611f9cd93, but for STS-B" in text and "torch 2.13, commit 1d1737741d42" in text


def test_the_comparison_is_made_again_by_its_command(
    root: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(root / KEPT / "minilm")
    assert cli.main(["compare", "scores/lora", "scores/loran", "--out", str(tmp_path)]) == 0
    assert_close(read(tmp_path / "compare.json"), read(Path("compared/compare.json")))


def assert_close(found: Any, wanted: Any) -> None:
    """The same but for the last digits of floats, in which processors differ."""
    assert type(found) is type(wanted)
    if isinstance(found, dict):
        assert list(found) == list(wanted)
        found, wanted = list(found.values()), list(wanted.values())
    if isinstance(found, list):
        for one, other in zip(found, wanted, strict=True):
            assert_close(one, other)
    elif isinstance(found, float):
        assert found == pytest.approx(wanted, rel=1e-12, abs=1e-15)
    else:
        assert found == wanted

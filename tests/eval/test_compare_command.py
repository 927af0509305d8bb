"""`curvelora compare` on folders as `curvelora eval` writes them: what it says, what it writes and what it refuses; no models."""

from __future__ import annotations

import json
import re
import shlex
import xml.etree.ElementTree as ET
from pathlib import Path

import numpy as np
import pytest
from evaluation_files import labelled, write_evaluation

from curvelora.cli import run_guarded, run_module
from curvelora_eval import compare_command
from curvelora_eval.compare.build import compare, load_arms
from curvelora_eval.compare.forest import forest_plot
from curvelora_eval.scoring import Score

pytestmark = pytest.mark.usefixtures("offline")

LABEL = [Score("label_accuracy")]
RNG = np.random.default_rng(17)
HARD = RNG.random(200)
A, SAME, BETTER = HARD < 0.6, (HARD + RNG.normal(0, 0.1, 200)) < 0.6, HARD < 0.75


def run(*arguments: object) -> int:
    argv = [str(argument) for argument in ("--resamples", 300, *arguments)]
    return run_guarded(lambda: run_module(compare_command, "curvelora compare", argv), debug=False)


@pytest.fixture(scope="module")
def pair(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """a and b differ by chance, a and c really."""
    folder = tmp_path_factory.mktemp("pair")
    for name, right in {"a": A, "b": SAME, "c": BETTER}.items():
        write_evaluation(folder / name, labelled(right), LABEL)
    return folder


def result_of(*texts: object, **options: object) -> dict:
    return compare(load_arms([str(text) for text in texts]), resamples=300, **options)


def test_a_real_difference_and_none(pair, capsys):
    assert run(pair / "a", pair / "b", pair / "c") == 0
    out = capsys.readouterr().out
    assert (
        "not distinguishable" in out and "C is better" in out and "B is better" not in out and "A is better" not in out
    )
    assert "another training seed would change is not covered" in out
    assert max(map(len, out.splitlines())) <= 100

    result = result_of(pair / "a", pair / "c")
    metric = result["tasks"][0]["metrics"][0]
    found = metric["comparisons"][0]
    assert metric["metric"] == "accuracy" and metric["arms"]["A"] == {"value": A.mean(), "sd": None, "runs": [A.mean()]}
    assert found["difference"] == pytest.approx(BETTER.mean() - A.mean())
    assert found["low"] < found["difference"] < found["high"] and found["low"] > 0
    gained = int((BETTER & ~A).sum())
    assert found["mcnemar"] == {
        "both_right": int(A.sum()),
        "only_a": 0,
        "only_b": gained,
        "both_wrong": int((~BETTER).sum()),
        "p": pytest.approx(2 * 0.5**gained),
    }


def test_the_files_hold_what_the_terminal_says(pair, tmp_path, capsys):
    assert run(pair / "a", pair / "c", "--out", tmp_path / "out") == 0
    assert "written: " in capsys.readouterr().out
    record = json.loads((tmp_path / "out/compare.json").read_text(), parse_constant=pytest.fail)
    assert (
        record["kind"] == "comparison"
        and record["tasks"][0]["metrics"][0]["comparisons"][0]["verdict"] == "B is better"
    )
    assert record == json.loads(json.dumps(result_of(pair / "a", pair / "c")))  # the seed decides
    markdown = (tmp_path / "out/compare.md").read_text()
    assert "| B is better |" in markdown and "(compare.svg)" in markdown and record["rule"] in markdown
    svg = ET.parse(tmp_path / "out/compare.svg").getroot()
    titles = [each.text for each in svg.iter("{http://www.w3.org/2000/svg}title")]
    assert svg.tag == "{http://www.w3.org/2000/svg}svg" and len(titles) == 1 and titles[0].startswith("boolq: +")
    assert "var(" not in (tmp_path / "out/compare.svg").read_text()


def test_the_order_of_the_rows_does_not_matter(pair, tmp_path):
    shuffled = [labelled(BETTER)[i] for i in np.random.default_rng(0).permutation(200)]
    write_evaluation(tmp_path / "c", shuffled, LABEL)
    assert result_of(pair / "a", tmp_path / "c")["tasks"] == result_of(pair / "a", pair / "c")["tasks"]


def test_a_model_against_itself(pair):
    found = result_of(pair / "a", pair / "a")["tasks"][0]["metrics"][0]["comparisons"][0]
    assert (found["difference"], found["low"], found["high"], found["p"]) == (0, 0, 0, 1)
    assert found["verdict"] == "not distinguishable"


def test_metrics_of_whole_corpora_resample_pairs_of_rows(tmp_path):
    """Matthews on the drawn rows of both sides, as scikit-learn computes it."""
    from sklearn.metrics import matthews_corrcoef

    rng = np.random.default_rng(3)
    wanted = rng.integers(0, 2, 80)
    sides = [np.where(rng.random(80) < share, wanted, 1 - wanted) for share in (0.6, 0.9)]
    for name, given in zip("ab", sides, strict=True):
        records = [
            {"row": i, "prediction": int(p), "reference": int(r)}
            for i, (p, r) in enumerate(zip(given, wanted, strict=True))
        ]
        write_evaluation(tmp_path / name, records, [Score("matthews"), Score("accuracy")], task="cola")
    result = result_of(tmp_path / "a", tmp_path / "b")
    matthews, accuracy = result["tasks"][0]["metrics"]
    draws = np.random.default_rng([0, 1, 0])
    rows = [draws.integers(0, 80, 80) for _ in range(300)]
    apart = [matthews_corrcoef(wanted[r], sides[1][r]) - matthews_corrcoef(wanted[r], sides[0][r]) for r in rows]
    found = matthews["comparisons"][0]
    assert [found["low"], found["high"]] == pytest.approx(np.quantile(apart, [0.025, 0.975]).tolist())
    assert found["mcnemar"] is None and found["test"] == "paired bootstrap" and matthews["primary"]
    assert accuracy["comparisons"][0]["mcnemar"] and not accuracy["primary"]


def test_a_lower_perplexity_is_the_better_one(tmp_path):
    for name, loss in {"a": 2.0, "b": 1.0}.items():
        records = [{"row": i, "id": f"t{i}", "nll": loss * (10 + i % 3), "tokens": 10} for i in range(30)]
        write_evaluation(tmp_path / name, records, [Score("perplexity")], task="text")
    found = result_of(tmp_path / "a", tmp_path / "b")["tasks"][0]["metrics"][0]["comparisons"][0]
    assert found["difference"] < 0 and found["verdict"] == "B is better"


@pytest.mark.parametrize("n", [1, 5])
def test_a_few_rows_never_tell(n, tmp_path, capsys):
    """One text in one window, and five with the same sign, of which every bootstrap draw is above 0."""
    for name, loss in {"a": 1000.0, "b": 999.0}.items():
        records = [{"row": 0, "window": i, "id": f"t/{i}", "nll": loss + i, "tokens": 500} for i in range(n)]
        counts = {"rows": 1, "windows": n, "tokens": 500 * n}
        write_evaluation(tmp_path / name, records, [Score("perplexity")], task="text", counts=counts)
    result = result_of(tmp_path / "a", tmp_path / "b")
    found = result["tasks"][0]["metrics"][0]["comparisons"][0]
    assert found["difference"] < 0 and found["verdict"] == "too few rows to tell" and found["rows"] == n
    assert [found[key] for key in ("low", "high", "p", "p_corrected")] == [None] * 4
    assert run(tmp_path / "a", tmp_path / "b", "--out", tmp_path / "out") == 0
    out = capsys.readouterr().out
    assert "too few rows to tell" in out and f"1 rows, {n} windows" in out and "is better" not in out
    for name, right in {"c": [False] * n, "d": [True] * n}.items():
        write_evaluation(tmp_path / name, labelled(right), LABEL)
    (accuracy,) = result_of(tmp_path / "c", tmp_path / "d")["tasks"][0]["metrics"]
    assert accuracy["comparisons"][0]["verdict"] == "too few rows to tell"
    assert accuracy["comparisons"][0]["mcnemar"]["only_b"] == n


def test_an_average_is_no_wiser_than_its_smallest_task(tmp_path):
    for arm, right in {"a": A, "b": BETTER}.items():
        write_evaluation(tmp_path / arm / "boolq", labelled(right), LABEL, "boolq")
        write_evaluation(tmp_path / arm / "piqa", labelled([arm == "b"] * 5), LABEL, "piqa")
    result = result_of(tmp_path / "a", tmp_path / "b")
    said = [task["metrics"][0]["comparisons"][0]["verdict"] for task in result["tasks"]]
    assert said == ["B is better", "too few rows to tell"]
    assert result["tasks"][0]["metrics"][0]["comparisons"][0]["tests"] == 1
    assert result["macro"]["comparisons"][0]["verdict"] == "too few rows to tell"


def test_rows_of_the_users_own_compare_too(tmp_path, capsys):
    """No protocol, no ids, and a perplexity whose losses stand in the common fields, as `curvelora eval --data` writes them."""
    for name, loss in {"a": 2.0, "b": 1.9}.items():
        records = [{"row": i, "nll": loss * 10 + (i * 7 % 5), "tokens": 10} for i in range(30)]
        folder = write_evaluation(
            tmp_path / name, records, [Score("perplexity")], "causal_lm", benchmark=None, decoding=None
        )
        result = json.loads((folder / "evaluation.json").read_text())
        (folder / "evaluation.json").write_text(json.dumps(result | {"protocol": None}))
        own = [{"row": r["row"], "prediction": r["nll"], "reference": r["tokens"]} for r in records]
        (folder / "predictions.jsonl").write_text("".join(json.dumps(r) + "\n" for r in own))
    assert run(tmp_path / "a", tmp_path / "b") == 0
    assert "B is better" in capsys.readouterr().out


@pytest.fixture(scope="module")
def seeds(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("seeds")
    rng = np.random.default_rng(5)
    for arm, centre in {"lora": 0.5, "sinter": 0.8}.items():
        for seed in (3, 1, 2):
            right = centre + 0.02 * seed + rng.normal(0, 0.01) > HARD
            write_evaluation(folder / f"{arm}-seed-{seed}", labelled(right), LABEL)
    return folder


def comma(folder: Path, arm: str, *numbers: int) -> str:
    return ",".join(str(folder / f"{arm}-seed-{number}") for number in numbers)


def test_seeds_are_mean_and_spread_and_pairs(seeds, capsys):
    result = result_of(comma(seeds, "lora", 3, 1, 2), comma(seeds, "sinter", 1, 2, 3))
    assert [run["seed"] for run in result["arms"][0]["runs"]] == [1, 2, 3]
    metric = result["tasks"][0]["metrics"][0]
    for arm, letter in (("lora", "A"), ("sinter", "B")):
        records = [(seeds / f"{arm}-seed-{n}" / "predictions.jsonl").read_text().splitlines() for n in (1, 2, 3)]
        each = [np.mean([r["prediction"] == r["reference"] for r in map(json.loads, lines)]) for lines in records]
        assert metric["arms"][letter] == {
            "value": pytest.approx(np.mean(each)),
            "sd": pytest.approx(np.std(each, ddof=1)),
            "runs": each,
        }
    found = metric["comparisons"][0]
    assert found["over_seeds"]["test"] == "paired t over seeds" and found["mcnemar"] is None
    assert found["verdict"] == "B is better" and found["p"] == max(found["p_bootstrap"], found["over_seeds"]["p"])
    assert any("paired by seed" in note for note in result["notes"]) and not any(
        "not covered" in n for n in result["notes"]
    )

    assert run(comma(seeds, "lora", 1, 2), comma(seeds, "sinter", 1, 3)) == 0
    out = capsys.readouterr().out
    assert "±" in out and "not paired" in out and max(map(len, out.splitlines())) <= 100


def test_one_run_against_several_says_what_is_not_covered(seeds):
    result = result_of(comma(seeds, "lora", 1), comma(seeds, "sinter", 1, 2, 3))
    assert result["notes"][0].startswith(
        "A is one training run: what another training seed would change is not covered"
    )
    assert result["tasks"][0]["metrics"][0]["comparisons"][0]["over_seeds"] is None


@pytest.fixture(scope="module")
def tasks(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Three tasks an arm; arm b is better on the first only."""
    folder = tmp_path_factory.mktemp("tasks")
    for number, task in enumerate(("boolq", "piqa", "siqa")):
        write_evaluation(folder / "a" / task, labelled(A), LABEL, task)
        write_evaluation(folder / "b" / task, labelled(SAME if number else BETTER), LABEL, task)
    return folder


def test_several_tasks_are_corrected_together_and_averaged(tasks, capsys):
    result = result_of(tasks / "a", tasks / "b")
    found = [task["metrics"][0]["comparisons"][0] for task in result["tasks"]]
    assert [each["verdict"] for each in found] == ["B is better", "not distinguishable", "not distinguishable"]
    ordered = sorted(each["p"] for each in found)
    assert found[0]["p_corrected"] == pytest.approx(3 * ordered[0]) and all(each["tests"] == 3 for each in found)
    macro = result["macro"]
    assert macro["comparisons"][0]["difference"] == pytest.approx(np.mean([each["difference"] for each in found]))
    assert macro["arms"]["A"]["value"] == pytest.approx(A.mean())
    widths = [each["high"] - each["low"] for each in (*found, macro["comparisons"][0])]
    assert widths[-1] < max(widths[:-1])  # tasks draw their rows independently
    assert run(tasks / "a", tasks / "b", "--task", "piqa,siqa") == 0
    out = capsys.readouterr().out
    assert "boolq" not in out and "macro average of 2 tasks" in out


def test_two_templates_of_a_task_are_two_tables_never_one(tmp_path, capsys):
    for arm, right in {"a": A, "b": BETTER}.items():
        for template in ("legacy", "clean"):
            folder = tmp_path / arm / f"boolq-{template}"
            write_evaluation(folder, labelled(right), LABEL, protocol={"template": template, "hash": template})
    result = result_of(tmp_path / "a", tmp_path / "b")
    assert sorted(task["template"] for task in result["tasks"]) == ["clean", "legacy"]
    assert result["macro"] is None
    assert "the prompt template differs" in refusal(capsys, tmp_path / "a/boolq-legacy", tmp_path / "b/boolq-clean")


def refusal(capsys: pytest.CaptureFixture, *arguments: object) -> str:
    assert run(*arguments) == 2
    captured = capsys.readouterr()
    assert captured.out == "" and captured.err.startswith("error: ")
    return captured.err


@pytest.mark.parametrize(
    ("changes", "sentence"),
    [
        ({"protocol": {"template": "clean"}}, "the prompt template differs: A has legacy, B has clean"),
        (
            {"protocol": {"quirks": ["adapter-dropout"]}},
            "list of legacy quirks differs: A has none, B has adapter-dropout",
        ),
        ({"protocol": {"version": 2, "hash": "f"}}, "the version of the protocol differs: A has 1, B has 2"),
        ({"protocol": {"hash": "f"}}, "the hash of the protocol differs, so another version wrote one of them"),
        ({"benchmark": {"split": "validation", "version": 1}}, "the split differs: A has test, B has validation"),
        (
            {"protocol": {"name": "loglikelihood"}},
            "hold other tasks (only A has boolq (llm-adapters); only B has boolq (logl",
        ),
        ({"task": "piqa"}, "they have no task in common"),
    ],
)
def test_what_does_not_compare_is_refused(pair, tmp_path, capsys, changes, sentence):
    write_evaluation(tmp_path / "b", labelled(SAME), LABEL, **changes)
    assert sentence in refusal(capsys, pair / "a", tmp_path / "b")


def test_other_rows_and_references_are_refused(pair, tmp_path, capsys):
    write_evaluation(tmp_path / "few", labelled(SAME[:150]), LABEL)
    write_evaluation(tmp_path / "other", labelled(SAME, start=2), LABEL)
    write_evaluation(tmp_path / "turned", [r | {"reference": "true"} for r in labelled(SAME)], LABEL)
    error = refusal(capsys, pair / "a", tmp_path / "few", tmp_path / "other", tmp_path / "turned")
    assert "A has 200 and B 150, 150 of them with the same id (one of the others: 'boolq-150')" in error
    assert "A has 200 and C 200, 198 of them with the same id" in error
    assert "row 'boolq-1' has false in A and true in D" in error


def test_everything_is_refused_at_once(pair, tmp_path, capsys):
    write_evaluation(tmp_path / "b", labelled(SAME), LABEL, protocol={"template": "clean", "quirks": ["pad-0"]})
    write_evaluation(tmp_path / "c", labelled(SAME[:9]), LABEL, benchmark={"split": "train", "version": 1})
    error = refusal(capsys, pair / "a", tmp_path / "b", tmp_path / "c")
    assert error.count("\n  - ") == 4


def test_seeds_of_one_arm_must_be_alike_too(seeds, tmp_path, capsys):
    write_evaluation(tmp_path / "seed-9", labelled(SAME), LABEL, protocol={"template": "clean"})
    arm = f"{comma(seeds, 'lora', 1)},{tmp_path / 'seed-9'}"
    assert "A has legacy, run 2 of A has clean" in refusal(capsys, arm, comma(seeds, "sinter", 1))
    twice = f"{comma(seeds, 'lora', 1)},{comma(seeds, 'lora', 1)}"
    assert "the same folder stands twice" in refusal(capsys, twice, comma(seeds, "sinter", 1))


def damaged(pair: Path, folder: Path, **files: str) -> Path:
    for name in ("evaluation.json", "predictions.jsonl"):
        folder.mkdir(exist_ok=True)
        text = (pair / "a" / name).read_text()
        (folder / name).write_text(files.get(name.split(".")[0], text))
    return folder


def test_broken_folders_are_refused(pair, tmp_path, capsys):
    lines = (pair / "a/predictions.jsonl").read_text()
    result = json.loads((pair / "a/evaluation.json").read_text())
    first, *rest = lines.splitlines(keepends=True)
    wrong = json.dumps(json.loads(first) | {"prediction": "neither"}) + "\n"
    right = "".join(
        [json.dumps(json.loads(line) | {"prediction": json.loads(line)["reference"]}) + "\n" for line in rest]
    )
    cases = {
        "cut": (
            {"predictions": lines[:-20]},
            "half-written or damaged (its last line is cut): run `curvelora eval` again",
        ),
        "noise": ({"predictions": "{]\n" + lines}, "line 1 is not JSON"),
        "short": ({"predictions": "".join(rest)}, "199 predictions and a result of 200 rows"),
        "foreign": ({"predictions": wrong + right}, "the predictions give accuracy 0.995, and evaluation.json says"),
        "twice": ({"predictions": first + lines}, "has 1 ids twice, first 'boolq-0'"),
        "empty": ({"predictions": ""}, "predictions.jsonl is empty"),
        "strange": ({"predictions": '{"text": 1}\n'}, "line 1 has neither id nor row"),
        "fields": ({"predictions": lines.replace('"prediction"', '"answer"')}, "record 0 does not have"),
        "json": ({"evaluation": "{"}, "evaluation.json is damaged"),
        "kind": ({"evaluation": "{}"}, "is not the result of an evaluation"),
        "old": (
            {"evaluation": json.dumps(result | {"scoring": None})},
            "lacks scoring, as results of older versions do",
        ),
    }
    for name, (files, _) in cases.items():
        damaged(pair, tmp_path / name, **files)
    (damaged(pair, tmp_path / "unfinished") / "evaluation.json").unlink()
    (damaged(pair, tmp_path / "bare") / "predictions.jsonl").unlink()
    said = [sentence for _, sentence in cases.values()] + ["its evaluation did not end", "has no predictions.jsonl"]
    names = [*cases, "unfinished", "bare"]
    for start in range(0, len(names), 7):  # 8 arms at most
        error = refusal(capsys, pair / "a", *(tmp_path / name for name in names[start : start + 7]))
        assert [s for s in said[start : start + 7] if s not in error] == []
        assert error.count("\n  - ") == len(names[start : start + 7])


def test_folders_that_do_not_say_which(tasks, pair, tmp_path, capsys):
    error = refusal(capsys, tasks, pair / "a")
    assert (
        "holds 2 evaluations of boolq (llm-adapters) (and 2 other tasks), in a/boolq, b/boolq: name the folder of one"
        in error
    )
    assert "--task boolq compares what both have" in refusal(capsys, tasks / "a", pair / "a")
    assert "is no folder" in refusal(capsys, pair / "none", pair / "a")
    assert "holds no evaluation:" in refusal(capsys, tmp_path, pair / "a")
    assert "takes 2 to 8 evaluation folders, found 1" in refusal(capsys, pair / "a")
    assert "--resamples must be at least 100" in refusal(capsys, pair / "a", pair / "b", "--resamples", 5)


def test_other_bases_compare_and_are_named(pair, tmp_path):
    write_evaluation(
        tmp_path / "b", labelled(SAME), LABEL, model={"path": "base", "dtype": "float32", "quantization": "nf4"}
    )
    assert "The base's quantization differs: A none; B nf4." in result_of(pair / "a", tmp_path / "b")["notes"]


def test_the_help_has_an_example(capsys):
    with pytest.raises(SystemExit) as end:
        run_module(compare_command, "curvelora compare", ["--help"])
    assert end.value.code == 0
    assert "curvelora compare out/lora out/sinter --out" in capsys.readouterr().out


def test_the_examples_of_the_page_are_what_the_command_says(root, monkeypatch, capsys):
    page = (root / "docs/comparing.md").read_text(encoding="utf-8")
    blocks = re.findall(r"```\n\$ curvelora compare (.*?)\n(.*?)```", page, flags=re.DOTALL)
    assert len(blocks) == 2
    monkeypatch.chdir(root / "docs/results/comparing")
    for arguments, shown in blocks:
        assert run_module(compare_command, "curvelora compare", shlex.split(arguments)) == 0
        assert capsys.readouterr().out == shown
    drawn = forest_plot(compare(load_arms(shlex.split(blocks[0][0]))))
    assert drawn == Path("compare.svg").read_text(encoding="utf-8")

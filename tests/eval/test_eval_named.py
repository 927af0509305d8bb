"""`curvelora eval --task` on tiny models: layout, results, resuming, refusals."""

from __future__ import annotations

import hashlib
import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from curvelora import cli
from curvelora_eval.evaluation.checkpoint_hash import checkpoint_hash
from curvelora_eval.predict.choices import Choices
from curvelora_eval.predict.perplexity import Perplexity
from curvelora_eval.spec import ModelSpec, TaskSpec, read_task, write_task
from named_tasks import read_lines, save_adapter
from run_files import result

pytestmark = pytest.mark.usefixtures("offline")
CHOICES = ["--task", "boolq,piqa", "--protocol", "loglikelihood"]


def test_many_adapters_on_one_base(
    evaluate: Callable[..., Path],
    adapters: dict[str, Path],
    llama_folder: Path,
    task_data: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Each has the scores that it has alone; the base is loaded once, and the first adapter leaves nothing behind."""
    from curvelora_eval.evaluation import work

    loads: list[Any] = []
    load = work.load_base
    monkeypatch.setattr(work, "load_base", lambda *a, **k: loads.append(a) or load(*a, **k))
    both = ["--adapter", adapters["ranlora"], "--adapter", adapters["lora"]]
    out = evaluate(*CHOICES, *both, "--baseline")
    assert len(loads) == 1
    said = capsys.readouterr().out
    assert said.count("the base in memory is what it was") == 2 and "lora (3 of 3)" in said
    labels = ("baseline", "ranlora", "lora")
    names = {f"{label}/{task}-loglikelihood" for label in labels for task in ("boolq", "piqa")}
    assert {str(p.parent.relative_to(out)) for p in out.rglob("evaluation.json")} == names
    assert {p.name for p in (out / "lora/boolq-loglikelihood").iterdir()} == {"evaluation.json", "predictions.jsonl"}
    records = {label: read_lines(out / label / "boolq-loglikelihood/predictions.jsonl") for label in labels}
    assert records["baseline"] != records["lora"] != records["ranlora"]
    alone = evaluate(*CHOICES, "--adapter", adapters["lora"], out=out.parent / "alone")
    for task in ("boolq", "piqa"):
        place = f"lora/{task}-loglikelihood/predictions.jsonl"
        assert (alone / place).read_bytes() == (out / place).read_bytes()

    found = result(out / "lora/boolq-loglikelihood", "evaluation.json")
    right = [r["prediction"] == r["reference"] for r in records["lora"]]
    assert found["metrics"]["accuracy"]["value"] == pytest.approx(sum(right) / len(right))
    assert (found["task"], found["kind"], found["primary_metric"]) == ("boolq", "evaluation", "accuracy")
    assert found["benchmark"]["subset"] == "subset 7 of 3270" and found["benchmark"]["limit"] is None
    assert found["protocol"]["name"] == "loglikelihood" and len(found["protocol"]["hash"]) == 64
    assert found["counts"] == {"rows": 7, "unparsable": 0, "truncated": 0, "over_limit": 0}
    assert found["batch_independence"]["checked"] == 8 and found["batch_independence"]["differ"] == 0
    assert 0 <= found["batch_independence"]["largest_difference"] < 1e-3
    weights = (adapters["lora"] / "adapter_model.safetensors").read_bytes()
    assert found["adapter"] == {"path": str(adapters["lora"]), "sha256": hashlib.sha256(weights).hexdigest()}
    data = (task_data / "commonsense/boolq/test.json").read_bytes()
    assert found["dataset"]["sha256"] == hashlib.sha256(data).hexdigest()
    assert found["model"]["sha256"] == checkpoint_hash(ModelSpec(path=str(llama_folder)))["sha256"]
    assert found["processes"] == 1 and found["resumed_batches"] == 0 and found["tokens_counted"] == "input"
    assert found["rows_per_second"] == pytest.approx(7 / found["seconds"])

    summary = result(out, "summary.json")
    assert summary["models"] == ["baseline", "ranlora", "lora"]
    assert summary["scores"]["lora"]["boolq-loglikelihood"]["value"] == found["metrics"]["accuracy"]["value"]
    assert summary["averages"] == {"baseline": {}, "ranlora": {}, "lora": {}}  # two of eight are no average
    page = (out / "summary.md").read_text(encoding="utf-8")
    assert "| model | boolq-loglikelihood | piqa-loglikelihood |" in page and "subset 7 of 3270" in page


def test_a_run_that_was_killed_ends_in_the_same_bytes(
    evaluate: Callable[..., Path], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    """It ends after any number of batches, with a half-written line at the end, and goes on."""
    task = ["--task", "boolq", "--protocol", "loglikelihood", "--batch-check", 0]
    whole = (evaluate(*task, out=tmp_path / "whole") / "baseline/boolq-loglikelihood/predictions.jsonl").read_bytes()
    folder = tmp_path / "cut/baseline/boolq-loglikelihood"
    ask = Choices.predict
    for batches in (0, 1, 2):
        asked: list[int] = []

        def predict(self: Choices, model: Any, units: list[int], asked: Any = asked, most: int = batches) -> Any:
            if len(asked) == most:
                raise KeyboardInterrupt
            asked.append(1)
            return ask(self, model, units)

        monkeypatch.setattr(Choices, "predict", predict)
        evaluate(*task, out=tmp_path / "cut", code=130)
        assert not (folder / "evaluation.json").exists()
        journal = folder / "predictions.part-0.jsonl"
        journal.write_bytes(journal.read_bytes() + b'{"batch": 4, "outp')
    monkeypatch.setattr(Choices, "predict", ask)
    capsys.readouterr()
    evaluate(*task, out=tmp_path / "cut")
    assert "half-written batch" in capsys.readouterr().out
    assert (folder / "predictions.jsonl").read_bytes() == whole
    found = result(folder, "evaluation.json")
    assert found["resumed_batches"] == 3 and len(found["repaired"]) == 1
    assert {p.name for p in folder.iterdir()} == {"evaluation.json", "predictions.jsonl"}
    # once finished, nothing is done again
    monkeypatch.setattr(Choices, "predict", lambda *a: pytest.fail("asked again"))
    evaluate(*task, out=tmp_path / "cut")
    assert "nothing to do" in capsys.readouterr().out


def test_another_evaluation_in_the_folder_is_refused(
    evaluate: Callable[..., Path], capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    from curvelora_eval.evaluation import work

    task = ["--task", "boolq", "--protocol", "loglikelihood", "--batch-check", 0, "--limit", 3]
    out = evaluate(*task)
    with monkeypatch.context() as patch:
        patch.setattr(work, "load_base", lambda *a, **k: pytest.fail("loaded"))
        capsys.readouterr()
        evaluate(*task, "--dtype", "bfloat16", code=2)
        error = capsys.readouterr().err
        assert 'dtype was "float32" and is now "bfloat16"' in error and "--overwrite" in error
    evaluate(*task, "--dtype", "bfloat16", "--overwrite")
    assert result(out / "baseline/boolq-loglikelihood", "evaluation.json")["model"]["dtype"] == "bfloat16"


def test_generation_and_its_counts(evaluate: Callable[..., Path], capsys: pytest.CaptureFixture[str]) -> None:
    out = evaluate("--task", "boolq", "--limit", 4, "--batch-check", 2)
    found = result(out / "baseline/boolq", "evaluation.json")
    lines = read_lines(out / "baseline/boolq/predictions.jsonl")
    assert set(lines[0]) == {"row", "id", "prediction", "reference", "text", "new_tokens", "truncated"}
    assert found["counts"]["unparsable"] == sum(line["prediction"] is None for line in lines) > 0
    assert found["counts"]["truncated"] == sum(line["truncated"] for line in lines)
    assert found["decoding"]["num_beams"] == 4 and found["decoding"]["do_sample"] is False
    assert found["tokens_counted"] == "new" and found["batch_independence"]["differ"] == 0
    assert found["benchmark"]["limit"] == 4
    said = capsys.readouterr().out
    assert "no answer found in" in said and "the first 4 only, subset 4 of 3270" in said


def test_batches_that_matter_are_said(
    evaluate: Callable[..., Path], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """A model that looks at its neighbours in the batch: the check finds it, and the result says so."""
    ask = Choices.predict

    def predict(self: Choices, model: Any, units: list[int]) -> Any:
        outputs = ask(self, model, units)
        return outputs if len(units) == 1 else [{"log_probability": -float(unit)} for unit in units]

    monkeypatch.setattr(Choices, "predict", predict)
    out = evaluate("--task", "piqa", "--protocol", "loglikelihood", "--batch-check", 6)
    check = result(out / "baseline/piqa-loglikelihood", "evaluation.json")["batch_independence"]
    assert check["checked"] == 6 and check["differ"] > 0 and check["largest_difference"] > 1
    sentence = f"the batch size matters here: {check['differ']} of 6 answers were others when asked alone"
    assert sentence in capsys.readouterr().out and sentence in (out / "summary.md").read_text(encoding="utf-8")


def test_merging_is_checked_where_it_is_exact(
    evaluate: Callable[..., Path], adapters: dict[str, Path], capsys: pytest.CaptureFixture[str]
) -> None:
    given = [f for name in ("loran", "ranlora") for f in ("--adapter", adapters[name])]
    task = ["--task", "boolq", "--protocol", "loglikelihood", "--batch-check", 0]
    evaluate(*task, *given)  # the scores may be there before
    out = evaluate(*task, *given, "--merge-check")
    said = capsys.readouterr().out
    merged = result(out / "loran/boolq-loglikelihood", "evaluation.json")["merged"]
    assert merged["exact"] is True and merged["differ"] == 0 and merged["rows"] == 7
    own = read_lines(out / "loran/boolq-loglikelihood/predictions.jsonl")
    other = read_lines(out / "loran/boolq-loglikelihood/merged/predictions.jsonl")
    for a, b in zip(own, other, strict=True):
        assert a["scores"] == pytest.approx(b["scores"], rel=1e-4)
    assert own != other  # it was another model that was asked, and rounding shows it
    assert "it changed the base itself" in said and "loaded again" in said
    refused = result(out / "ranlora/boolq-loglikelihood", "evaluation.json")["merged"]
    assert refused["exact"] is False and "RanLoRA" in refused["why"]
    assert f"not merged, because {refused['why']}" in said
    evaluate(*task, *given, "--merge-check")
    assert capsys.readouterr().out.count("nothing to do") == 2


def test_perplexity_over_a_text(evaluate: Callable[..., Path], monkeypatch: pytest.MonkeyPatch) -> None:
    import math

    windows: list[int] = []
    ask = Perplexity.predict
    monkeypatch.setattr(Perplexity, "predict", lambda s, m, u: windows.extend(u) or ask(s, m, u))
    out = evaluate("--task", "wikitext2", "--batch-check", 0)
    lines = read_lines(out / "baseline/wikitext2/predictions.jsonl")
    found = result(out / "baseline/wikitext2", "evaluation.json")
    nll, tokens = (sum(line[key] for line in lines) for key in ("nll", "tokens"))
    assert found["metrics"]["perplexity"]["value"] == pytest.approx(math.exp(nll / tokens))
    assert found["counts"] == {"rows": 1, "windows": len(lines), "tokens": tokens} and found["benchmark"]["lines"] == 7
    assert found["benchmark"]["rows"] == found["dataset"]["rows"] == 1  # a text, in a line a window
    assert [line["id"] for line in lines] == [f"{lines[0]['id'].split('/')[0]}/{i}" for i in range(len(windows))]
    assert sorted(windows) == list(range(len(windows)))


def test_a_bad_result_keeps_no_other_from_being_made(
    evaluate: Callable[..., Path], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """A loss that is no number is a result without a value; what cannot be scored at all is said at the end."""
    from curvelora_eval.evaluation import result as results

    ask = Perplexity.predict

    def predict(self: Perplexity, model: Any, units: list[int]) -> Any:
        return [output | {"nll": None} for output in ask(self, model, units)]

    monkeypatch.setattr(Perplexity, "predict", predict)
    tasks = ["--task", "wikitext2,boolq,piqa", "--limit", 2, "--batch-check", 0]
    score = results.score_records
    with monkeypatch.context() as patch:

        def refuse(records: Any, *rest: Any) -> Any:
            if records[0]["reference"] == "true":
                raise ValueError("this one is bad")
            return score(records, *rest)

        patch.setattr(results, "score_records", lambda r, *a: refuse(r, *a) if "reference" in r[0] else score(r, *a))
        out = evaluate(*tasks, code=2)
    captured = capsys.readouterr()
    assert "boolq: this one is bad" in captured.err and "perplexity undefined (" in captured.out
    assert {p.parent.name for p in out.rglob("evaluation.json")} == {"wikitext2", "piqa"}
    assert set(result(out, "summary.json")["scores"]["baseline"]) == {"wikitext2", "piqa"}
    found = result(out / "baseline/wikitext2", "evaluation.json")
    assert found["metrics"]["perplexity"]["value"] is None and found["counts"]["tokens"] > 0
    page = (out / "summary.md").read_text(encoding="utf-8")
    assert "perplexity is undefined: " in page and "have no finite loss" in page
    evaluate(*tasks)  # what was predicted is not asked again
    assert result(out / "baseline/boolq", "evaluation.json")["resumed_batches"] == 1


def test_a_trained_head(trained_run: Path, task_data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """A classifier that was trained for two classes answers MRPC; the order of its classes is its own."""
    adapter = Path(shutil.copytree(trained_run / "adapter", tmp_path / "run/adapter"))
    given = ["eval", "--task", "mrpc", "--data-dir", str(task_data), "--batch-check", "3", "--adapter", str(adapter)]
    assert cli.main([*given, "--out", str(tmp_path / "a")]) == 0
    lines = read_lines(tmp_path / "a/run/mrpc/predictions.jsonl")
    found = result(tmp_path / "a/run/mrpc", "evaluation.json")
    assert set(found["metrics"]) == {"accuracy", "f1"} and found["counts"]["at_max_length"] > 0
    said = capsys.readouterr().out
    assert "cut at the training's length limit" in said and "the adapter numbers its classes" in said
    assert found["classes"] == {"order": ["not_equivalent", "equivalent"], "known_by": "number"}
    assert all(line["prediction"] == int(line["logits"][1] > line["logits"][0]) for line in lines)
    model, task = read_task(adapter)
    assert [line["prediction"] for line in lines] == by_the_task_kind(adapter, model, task, task_data)
    task.labels = ["equivalent", "not_equivalent"]  # the benchmark's names the other way round
    write_task(adapter, model, task)
    assert cli.main([*given, "--out", str(tmp_path / "b")]) == 0
    turned = read_lines(tmp_path / "b/run/mrpc/predictions.jsonl")
    assert [line["logits"][::-1] for line in turned] == [line["logits"] for line in lines]
    assert [1 - line["prediction"] for line in turned] == [line["prediction"] for line in lines]
    assert "numbers its classes" not in capsys.readouterr().out
    bare = ["eval", "--task", "mrpc", "--data-dir", str(task_data), "--model", model.path]
    assert cli.main([*bare, "--out", str(tmp_path / "d")]) == 2
    assert "has no head that was trained for mrpc" in capsys.readouterr().err


def by_the_task_kind(adapter: Path, model: ModelSpec, task: TaskSpec, task_data: Path) -> list[int]:
    """The same rows through the task kind that training scores with."""
    from datasets import Dataset

    from curvelora.loading import load_adapter
    from curvelora_eval import benchmarks
    from curvelora_eval.models import load_base, load_processor
    from curvelora_eval.tasks import make_task

    mrpc = benchmarks.get("mrpc")
    protocol = mrpc.protocol()
    rows = Dataset.from_list([protocol.columns(row) for row in benchmarks.load(mrpc, task_data).rows])
    kind = make_task(protocol.task_spec(task.max_length))
    loaded = load_adapter(load_base(model, kind, trained=["classifier"]), adapter)
    return kind.predict(loaded, rows, load_processor(model, kind), 4).predictions


def test_everything_wrong_is_said_at_once(
    evaluate: Callable[..., Path], adapters: dict[str, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    other = Path(shutil.copytree(adapters["lora"], tmp_path / "other"))
    model, _ = read_task(other)
    write_task(other, model, TaskSpec(kind="sequence_classification", labels=["a", "b"]))
    evaluate(
        *("--task", "boolk,boolq,rte,causal_lm"),
        *("--adapter", other, "--adapter", tmp_path / "none", "--limit", "0", "--metrics", "f1"),
        *("--legacy-quirks", "pad-id-1", "--batch-check", "-1"),
        code=2,
    )
    error = capsys.readouterr().err
    first, *rest = error.strip().split("\n")
    assert first == f"error: {len(rest)} things are wrong:" and all(line.startswith("  - ") for line in rest)
    for part in (
        "no task 'boolk'; did you mean 'boolq'?",
        "rte has no file for its split",
        "causal_lm is a task kind",
        f"{tmp_path / 'none'} is no folder",
        "--limit must be at least 1, not 0",
        "--metrics is for rows of your own",
        "no quirk 'pad-id-1'",
        "--batch-check must be at least 0",
    ):
        assert error.count(part) == 1, part
    evaluate("--task", "boolq", "--adapter", other, code=2)
    assert "was trained as sequence_classification, and task boolq" in capsys.readouterr().err
    evaluate("--task", "boolq", "--adapter", adapters["lora"], "--adapter", adapters["lora"], code=2)
    assert "is given twice" in capsys.readouterr().err
    evaluate("--task", "boolq, piqa", "--max-length", 64, code=2)
    error = capsys.readouterr().err
    for name in ("boolq", "piqa"):  # both are found, with the blank before the second
        assert f"--max-length is for heads, and protocol llm-adapters of task {name} never cuts its inputs" in error
    evaluate("--task", "mrpc", "--protocol", "loglikelihood", "--split", "tset", code=2)
    assert "protocol 'loglikelihood'" in capsys.readouterr().err


def test_an_adapter_of_another_base_is_refused_before_weights_load(
    evaluate: Callable[..., Path], adapters: dict[str, Path], tiny_models: dict[str, Path], tmp_path: Path, capsys: Any
) -> None:
    from transformers import AutoTokenizer, LlamaConfig, LlamaForCausalLM

    wide = LlamaConfig.from_pretrained(tiny_models["llama"], hidden_size=128, head_dim=32)
    LlamaForCausalLM(wide).save_pretrained(tmp_path / "wide")
    AutoTokenizer.from_pretrained(tiny_models["llama"]).save_pretrained(tmp_path / "wide")
    evaluate("--task", "boolq", "--model", tmp_path / "wide", "--adapter", adapters["lora"], code=2)
    assert "belongs to another model" in capsys.readouterr().err


def test_a_learnt_prompt_does_not_get_the_bare_models_scores(
    evaluate: Callable[..., Path],
    llama_folder: Path,
    task_data: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """Neither here nor under lm-eval, which would both run the base alone."""
    from peft import PromptTuningConfig

    prompt = save_adapter(tmp_path / "a", llama_folder, PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=2))
    evaluate("--task", "boolq", "--adapter", prompt, code=2)
    assert "PROMPT_TUNING changes no weight of the base" in capsys.readouterr().err
    given = ["--adapter", str(prompt), "--task", "piqa", "--data-dir", str(task_data), "--out", str(tmp_path / "lm")]
    assert cli.main(["lm-eval", *given]) == 2
    assert "PROMPT_TUNING changes no weight of the base" in capsys.readouterr().err


def test_what_nobody_asked_for_is_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str], unseen_rows: str) -> None:
    out = ["--out", str(tmp_path / "out")]
    for given, part in (
        ([], "there is nothing to score"),
        (["--task", "boolq", "--data", unseen_rows], "'boolq' is no task kind"),
        (["--task", "causal_lm", "--data", unseen_rows, "--protocol", "x"], "--protocol is for named tasks"),
        (["--task", "causal_lm", "--data", unseen_rows, "--overwrite"], "--overwrite is for named tasks"),
        (["--task", "causal_lm", "--data", unseen_rows, "--batch-check", "0"], "--batch-check is for named tasks"),
        (["--task", "boolq"], "the base model is not known: give --model"),
    ):
        assert cli.main(["eval", *given, *out]) == 2
        assert part in capsys.readouterr().err, given


def test_rows_of_ones_own_are_for_one_process(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    unseen_rows: str,
    llama_folder: Path,
) -> None:
    monkeypatch.setenv("WORLD_SIZE", "2")
    given = ["--model", str(llama_folder), "--task", "causal_lm", "--data", unseen_rows, "--column", "text=sentence"]
    assert cli.main(["eval", *given, "--limit", "2", "--out", str(tmp_path / "out")]) == 2
    assert "--data is scored by one process" in capsys.readouterr().err and not (tmp_path / "out").exists()


@pytest.fixture
def unseen_rows(root: Path) -> str:
    return str(root / "tests/data/sst2_sentences_unseen.tsv")


def test_several_adapters_on_rows_of_ones_own(trained_run: Path, unseen_rows: str, tmp_path: Path) -> None:
    second = shutil.copytree(trained_run / "adapter", tmp_path / "second")
    both = ["--adapter", str(trained_run / "adapter"), "--adapter", str(second)]
    assert cli.main(["eval", "--data", unseen_rows, "--limit", "8", "--out", str(tmp_path / "out"), *both]) == 0
    found = [json.loads((tmp_path / "out" / label / "evaluation.json").read_text()) for label in ("run", "second")]
    assert found[0]["metrics"] == found[1]["metrics"] and found[0]["adapter"] != found[1]["adapter"]


def test_quirks_are_named_and_repeatable(
    evaluate: Callable[..., Path], adapters: dict[str, Path], capsys: pytest.CaptureFixture[str]
) -> None:
    """Live dropout changes the scores; it draws the same in every run, so that a killed one can go on."""
    task = ["--task", "boolq", "--protocol", "loglikelihood", "--batch-check", 0, "--adapter", adapters["loran"]]
    out = evaluate(*task)
    plain = read_lines(out / "loran/boolq-loglikelihood/predictions.jsonl")
    found = []
    for name in ("first", "second"):
        evaluate(*task, "--legacy-quirks", "all", "--baseline", "--batch-check", 4, out=out / name)
        found.append(read_lines(out / name / "loran/boolq-loglikelihood-quirks/predictions.jsonl"))
    assert found[0] == found[1] != plain
    record = result(out / "first/loran/boolq-loglikelihood-quirks", "evaluation.json")
    assert record["protocol"]["quirks"] == ["adapter-dropout"]  # the others are about generated text
    bare = result(out / "first/baseline/boolq-loglikelihood-quirks", "evaluation.json")
    assert bare["protocol"]["quirks"] == []
    # a row asked again is drawn anew, which says nothing of batches
    assert record["batch_independence"] is None and bare["batch_independence"]["differ"] == 0
    assert "with the original scripts' defects adapter-dropout" in capsys.readouterr().out

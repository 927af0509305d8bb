"""The report on synthetic run folders: cells, verdicts, damaged files, and that the page stands alone and escapes."""

from __future__ import annotations

import argparse
import json
import math
import re
from html.parser import HTMLParser
from pathlib import Path

import pytest
import yaml

from curvelora.errors import UserError
from curvelora_eval import report_command
from curvelora_eval.report import write_report
from curvelora_eval.report.load import load_run, load_runs
from curvelora_eval.report.svg import smooth, ticks
from curvelora_eval.report.table import cells, headings, metric_cell, percent
from curvelora_eval.report.verdict import baseline, caveats, verdict

LOSSES = [{"step": 10 * i, "seconds": float(i), "loss": 0.7 * 0.97**i} for i in range(1, 31)]


def make_run(
    folder: Path, name: str, interval=(0.826, 0.792, 0.859), metric="accuracy", lines=LOSSES, sha="a" * 64, **result
) -> Path:
    """Write a run folder as training and evaluation do; `interval` None leaves evaluation.json out."""
    folder.mkdir(parents=True)
    written = {
        "schema": 1,
        "kind": "training",
        "status": "completed",
        "name": name,
        "method": "lora",
        "settings": {"activation": "sinter", "amplitude": 5e-5},
        "trainable_parameters": 73728,
        "steps": 300,
        "step_seconds": {"median": 0.16, "p10": 0.15, "p90": 0.2},
        "examples_per_second": 98.14,
        "peak_memory_bytes": 900_000_000,
        "peak_memory_kind": "host resident set",
        "first_loss": 0.69,
        "last_loss": 0.41,
        "resolvability": {"forward": 0.93, "derivative": 0.99, "dtype": "bfloat16"},
        "error": None,
    }
    (folder / "result.json").write_text(json.dumps(written | result))
    if interval:
        evaluation = {
            "schema": 1,
            "kind": "evaluation",
            "metrics": {metric: dict(zip(("value", "low", "high"), interval, strict=True))},
            "primary_metric": metric,
            "interval": {"method": "percentile bootstrap", "level": 0.95, "resamples": 1000, "seed": 0},
            "dataset": {"path": "rows.jsonl", "sha256": sha, "rows": 510},
        }
        (folder / "evaluation.json").write_text(json.dumps(evaluation))
    if lines:
        (folder / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    return folder


def head_only(folder: Path, interval=(0.698, 0.657, 0.737), **result) -> Path:
    small = {"trainable_parameters": 770, "method": "none", "resolvability": None}
    return make_run(folder, "head only", interval, **small | result)


def verdict_of(*folders: Path) -> list[str]:
    return verdict(load_runs(list(folders)))


def test_cells_of_a_full_run(tmp_path):
    assert cells(load_run(make_run(tmp_path / "a", "QLoRA")), []) == [
        "QLoRA", "lora", "73,728", "160", "98.1", "900", "82.6 % [79.2, 85.9]", "0.690 → 0.410", "93.0 % / 99.0 %"
    ]  # fmt: skip


def test_cells_of_an_untrained_run_are_dashes(tmp_path):
    empty = {"schema": 1, "status": "untrained", "name": "untrained", "steps": 0, "resolvability": None}
    (tmp_path / "a").mkdir()
    (tmp_path / "a" / "result.json").write_text(json.dumps(empty))
    assert cells(load_run(tmp_path / "a"), []) == ["untrained"] + ["–"] * 8


@pytest.mark.parametrize(
    ("metric", "interval", "cell"),
    [
        ("perplexity", (12.34567, 11.9, 12.8), "12.346 [11.900, 12.800]"),
        ("matthews", (0.5, 0.4, 0.6), "0.500 [0.400, 0.600]"),
        ("f1", (0.5, None, None), "50.0 %"),
        ("f1", (None, None, None), "–"),
    ],
)
def test_metric_cell(tmp_path, metric, interval, cell):
    assert metric_cell(load_run(make_run(tmp_path / "a", "x", interval, metric))) == cell


def test_numbers_of_the_wrong_kind_show_as_dashes(tmp_path):
    run = load_run(make_run(tmp_path / "a", "x", first_loss=math.nan, last_loss="0.4", peak_memory_bytes=True))
    assert cells(run, [run])[5] == "–" and cells(run, [run])[7] == "–"


def test_a_shifted_start_and_a_merged_form_have_columns_of_their_own(tmp_path):
    plain = make_run(tmp_path / "a", "QLoRA", start_shift={"relative": 0.0}, merge_gap=None)
    moved = make_run(tmp_path / "b", "RanLoRA", start_shift={"relative": 0.0123}, merge_gap=None)
    other = make_run(tmp_path / "c", "AuroRA", start_shift={"relative": 0.0}, merge_gap={"relative": 0.21})
    path = other / "evaluation.json"
    scored = json.loads(path.read_text()) | {
        "merged_form": {"metrics": {"accuracy": {"value": 0.71, "low": 0.7, "high": 0.72}}}
    }
    path.write_text(json.dumps(scored))
    runs = load_runs([plain, moved, other])
    assert headings(runs)[9:] == ["outputs moved before training", "after merging [outputs moved]"]
    assert [cells(run, runs)[9:] for run in runs] == [["0", "–"], ["1.2 %", "–"], ["0", "71.0 % [21.0 %]"]]
    assert headings(runs[:1])[9:] == [] and len(cells(runs[0], runs[:1])) == 9  # nothing to show, nothing shown
    assert [s for s in verdict(runs) if "merged" in s] == [
        "AuroRA, merged as its method does it, is another function: accuracy 82.6 % becomes 71.0 %, with outputs that differ by "
        "21.0 %."
    ]


@pytest.mark.parametrize(
    ("share", "text"), [(0.0, "0.0 %"), (0.0001, "< 0.1 %"), (0.5, "50.0 %"), (0.9999, "> 99.9 %"), (1.0, "100.0 %")]
)
def test_percent_keeps_the_ends_apart(share, text):
    assert percent(share) == text


def test_verdict_says_larger_only_where_the_intervals_are_apart(tmp_path):
    head = head_only(tmp_path / "head")
    apart = make_run(tmp_path / "apart", "apart", (0.826, 0.792, 0.859))
    touching = make_run(tmp_path / "touching", "touching", (0.770, 0.737, 0.80))
    below = make_run(tmp_path / "below", "below", (0.600, 0.550, 0.656))
    assert verdict_of(apart, head, touching, below) == [
        "apart beats head only by 12.8 points of accuracy; "
        "the difference is larger than the 95 % intervals, which do not overlap.",
        "touching is ahead of head only by 7.2 points of accuracy; "
        "the 95 % intervals overlap, so these rows do not settle which is better.",
        "below falls short of head only by 9.8 points of accuracy; "
        "the difference is larger than the 95 % intervals, which do not overlap.",
        # and against the first linear adapter, which `make_run` makes of every run
        "touching is behind apart by 5.6 points of accuracy; "
        "the 95 % intervals overlap, so these rows do not settle which is better.",
        "below falls short of apart by 22.6 points of accuracy; "
        "the difference is larger than the 95 % intervals, which do not overlap.",
    ]


def test_an_adapter_is_held_against_the_linear_one_nearest_in_size(tmp_path):
    head = head_only(tmp_path / "head")
    large = make_run(tmp_path / "large", "QLoRA", trainable_parameters=590_594)
    small = make_run(tmp_path / "small", "QLoRA, r = 2", trainable_parameters=19_202)
    thick = make_run(tmp_path / "thick", "LoRAN", method="loran", trainable_parameters=590_594)
    thin = make_run(tmp_path / "thin", "AuroRA", method="aurora", trainable_parameters=19_442)
    assert verdict_of(head, large, small, thick, thin)[4:] == [
        "QLoRA, r = 2 and QLoRA have the same accuracy.",
        "LoRAN and QLoRA have the same accuracy.",
        "AuroRA and QLoRA, r = 2 have the same accuracy.",
    ]


def test_verdict_on_perplexity_prefers_the_smaller(tmp_path):
    head = head_only(tmp_path / "head", (12.0, 11.5, 12.5), metric="perplexity")
    lora = make_run(tmp_path / "lora", "QLoRA", (10.0, 9.5, 10.5), "perplexity")
    assert verdict_of(head, lora)[0].startswith("QLoRA beats head only by 2.000 of perplexity;")


def test_verdict_does_not_compare_unlike_scores(tmp_path):
    head = head_only(tmp_path / "head")
    rows = make_run(tmp_path / "rows", "rows", sha="b" * 64)
    metric = make_run(tmp_path / "metric", "metric", metric="f1")
    none = make_run(tmp_path / "none", "none", interval=None)
    bare = make_run(tmp_path / "bare", "bare", (0.8, None, None))
    sentences = verdict_of(head, rows, metric, none, bare)
    assert sentences[0] == "rows and head only were evaluated on different rows, so they are not compared."
    assert sentences[1] == "metric is scored by f1 and head only by accuracy, so they are not compared."
    assert sentences[2] == "none has no score on unseen rows, so it is not compared with head only."
    assert sentences[3].endswith("without an interval for both, the difference may be chance.")
    assert verdict_of(none) == ["No run has been evaluated on unseen rows, so none can be called better."]
    assert verdict_of(head) == ["There is one run, so there is nothing to compare it with."]


def test_baseline_is_the_smallest_trained_run(tmp_path):
    large = make_run(tmp_path / "large", "large")
    untrained = make_run(tmp_path / "untrained", "untrained", status="untrained", trainable_parameters=770)
    frozen = make_run(tmp_path / "frozen", "frozen", trainable_parameters=0)
    head = head_only(tmp_path / "head")
    assert baseline(load_runs([large, untrained, frozen, head])).label == "head only"
    assert baseline(load_runs([frozen])).label == "frozen"


@pytest.mark.parametrize(("forward", "said"), [(0.009, True), (0.0, True), (0.01, False), (None, False)])
def test_absent_nonlinearity_is_said_below_one_percent(tmp_path, forward, said):
    found = {"forward": forward, "derivative": 0.9, "dtype": "bfloat16"}
    text = " ".join(verdict_of(make_run(tmp_path / "a", "sinter", resolvability=found)))
    assert ("the nonlinearity is numerically absent from the forward pass in bfloat16" in text) is said


def test_page_stands_alone_and_holds_the_cells(tmp_path):
    lines = [line | {"resolvability_forward": 0.9, "resolvability_derivative": 0.95} for line in LOSSES]
    lines = [line | {"spline_beyond_grid": 0.25, "spline_beyond_support": 0.01} for line in lines]
    lines.append({"step": 300, "eval_loss": 0.45})
    runs = [head_only(tmp_path / "runs" / "head"), make_run(tmp_path / "runs" / "qlora", "QLoRA", lines=lines)]
    (runs[1] / "config.yaml").write_text("method: lora  # <r>\n")
    (runs[1] / "environment.json").write_text(json.dumps({"commit": "abc1234", "versions": {"torch": "2.13.0"}}))
    html, markdown = write_report(runs, tmp_path / "out", "A title")
    page = Page(html)

    assert "http" not in page.source and "<script" not in page.source and "@import" not in page.source
    assert "url(" not in page.source
    assert {tag for tag, _ in page.links} == {"a"}
    assert [link for _, link in page.links] == ["../runs/head/", "../runs/qlora/"]
    assert page.text("h1") == ["A title"]
    assert page.text("td")[5] == "69.8 % [65.7, 73.7]" and "0.690 → 0.410" in page.text("td")
    assert page.text("h2")[:3] == ["accuracy on unseen rows", "Loss by step", "Resolvability by step"]
    assert page.text("h2")[3] == "Spline inputs beyond the grid by step"
    assert "QLoRA, beyond support, step 10: 1 %" in page.text("title")
    assert "QLoRA, step 10: 0.679" in page.text("title")
    assert "QLoRA, step 300, evaluation: 0.45" in page.text("title")
    assert page.source.count('class="line dashed" d="M5') == 2
    assert "method: lora  # <r>\n" in page.text("pre") and "abc1234" in page.text("dd")
    assert markdown.read_text().splitlines()[0] == "# A title"
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == ["report.html", "report.md"]


def test_page_without_logs_or_scores_has_no_chart(tmp_path):
    html, _ = write_report([make_run(tmp_path / "a", "x", interval=None, lines=None)], tmp_path / "out")
    assert 'class="chart"' not in html.read_text()


def test_names_are_escaped(tmp_path):
    runs = [head_only(tmp_path / "head"), make_run(tmp_path / "a&b", '<b>x</b> | "y"', error="<i>no</i>")]
    html, markdown = write_report(runs, tmp_path / "out", "<u>t</u>")
    page = Page(html)
    assert page.tags.isdisjoint({"b", "i", "u"})
    assert '<b>x</b> | "y"' in page.text("a") and '<b>x</b> | "y"' in page.text("li")
    assert "<b>" not in markdown.read_text() and r'&lt;b>x&lt;/b> \| "y"' in markdown.read_text()


def test_runs_that_share_a_name_are_told_apart(tmp_path):
    folders = [make_run(tmp_path / "s1", "QLoRA"), make_run(tmp_path / "s2", "QLoRA"), head_only(tmp_path / "h")]
    runs = load_runs(folders)
    assert [run.label for run in runs] == ["QLoRA (s1)", "QLoRA (s2)", "head only"]


def test_cut_last_line_is_dropped_and_noted(tmp_path):
    run = make_run(tmp_path / "a", "killed", status="interrupted", steps=20)
    (run / "metrics.jsonl").write_bytes(b'{"step": 10, "loss": 0.5}\n{"step": 20, "loss": 0.4}\n{"step": 30, "lo\xc3')
    assert load_run(run).series("loss") == [(10, 0.5), (20, 0.4)]
    html, markdown = write_report([run], tmp_path / "out")
    for text in (html.read_text(), markdown.read_text()):
        assert "the last line of metrics.jsonl is cut off" in text and "killed was interrupted after 20 steps." in text


def test_series_skips_what_is_not_finite_and_keeps_the_resumed_line(tmp_path):
    lines = [{"step": 1, "loss": 9.0}, {"step": 2, "loss": math.nan}, {"step": 1, "loss": 0.5}, {"eval_loss": 1.0}]
    run = load_run(make_run(tmp_path / "a", "x", lines=lines))
    assert run.series("loss") == [(1, 0.5)]
    assert run.notes == ["1 of the logged losses are not finite and are missing from the chart"]


@pytest.mark.parametrize(
    ("file", "content", "said"),
    [
        ("result.json", '{"schema": 1,', "result.json cannot be read as JSON: Expecting property name"),
        ("result.json", "[1]", "result.json holds a JSON list; expected an object"),
        ("result.json", '{"schema": 2}', "result.json has schema 2; this version reads schema 1"),
        ("evaluation.json", "", "evaluation.json cannot be read as JSON: Expecting value"),
        ("environment.json", "{", "environment.json cannot be read as JSON"),
        ("metrics.jsonl", '{"step": 1}\n{"ste\n{"step": 3}\n', "metrics.jsonl, entry 2 of 3, cannot be read as JSON"),
    ],
)
def test_damaged_files_are_user_errors(tmp_path, file, content, said):
    run = make_run(tmp_path / "a", "x")
    (run / file).write_text(content)
    with pytest.raises(UserError, match=re.escape(said)):
        write_report([run], tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_scores_of_named_tasks_are_shown_elsewhere(root):
    with pytest.raises(UserError, match=r"scores has scores of named tasks.*summary\.md.*curvelora compare"):
        load_runs([root / "docs/results/evaluation/minilm/scores"])


def test_missing_folders_are_user_errors(tmp_path):
    with pytest.raises(UserError, match=r"the run folder .*nowhere does not exist"):
        load_runs([tmp_path / "nowhere"])
    with pytest.raises(UserError, match=r"has no result.json"):
        load_runs([tmp_path])
    with pytest.raises(UserError, match=r"at least one run folder"):
        load_runs([])


def test_command_prints_the_table_and_the_paths(tmp_path, capsys):
    parser = argparse.ArgumentParser()
    report_command.add_arguments(parser)
    run, out = make_run(tmp_path / "a", "QLoRA"), tmp_path / "deep" / "out"
    assert report_command.run(parser.parse_args([str(run), "--out", str(out)])) == 0
    printed = capsys.readouterr().out
    row = "| QLoRA | lora | 73,728 | 160 | 98.1 | 900 | 82.6 % [79.2, 85.9] | 0.690 → 0.410 | 93.0 % / 99.0 % |"
    assert row in printed.splitlines()
    assert f"page:  {out / 'report.html'}" in printed and f"table: {out / 'report.md'}" in printed


def test_ticks_are_round_and_enclose():
    assert ticks(0, 300) == pytest.approx([0, 100, 200, 300])
    assert ticks(0.41, 0.69) == pytest.approx([0.4, 0.5, 0.6, 0.7])
    low, *_, high = ticks(5.0, 5.0)
    assert low < 5.0 < high


def test_smooth_keeps_a_constant_and_a_span_of_one_is_no_smoothing():
    assert [y for _, y in smooth([(0, 2.0), (1, 2.0), (2, 2.0)], 9)] == pytest.approx([2.0, 2.0, 2.0])
    points = [(0, 1.0), (1, 3.0), (2, -4.0)]
    assert smooth(points, 1) == points
    # span 3 keeps half: (1 * 0.5 + 3) / 1.5
    assert smooth(points, 3)[1] == (1, pytest.approx(3.5 / 1.5))


class Page(HTMLParser):
    """The page as a parser sees it: its tags, the text in each kind of element, and all that could load something."""

    def __init__(self, path: Path) -> None:
        super().__init__()
        self.source = path.read_text(encoding="utf-8")
        self.tags: set[str] = set()
        self.links: list[tuple[str, str]] = []
        self._open: list[list] = []
        self._texts: list[tuple[str, str]] = []
        self.feed(self.source)

    def text(self, tag: str) -> list[str]:
        return [text for found, text in self._texts if found == tag]

    def handle_starttag(self, tag, attrs):
        self.tags.add(tag)
        self.links += [(tag, value) for key, value in attrs if key in ("href", "src", "srcset", "data", "xlink:href")]
        if tag != "meta":
            self._open.append([tag, ""])

    def handle_data(self, data):
        for element in self._open:
            element[1] += data

    def handle_endtag(self, tag):
        opened, text = self._open.pop()
        assert opened == tag, f"<{opened}> is closed by </{tag}>"
        self._texts.append((tag, text))


def with_published(folder: Path, section: object) -> Path:
    (folder / "config.yaml").write_text(
        yaml.safe_dump({"seed": 1, "published": section}, sort_keys=False), encoding="utf-8"
    )
    return folder


def test_what_a_paper_prints_stands_beside_ours(tmp_path):
    paper = {
        "source": "A paper, table 1",
        "metrics": {"accuracy": 0.836, "f1": 0.9},
        "parameters": "0.1M",
        "notes": ["Prints <b> 0.1M."],
    }
    same = with_published(make_run(tmp_path / "a", "RanLoRA", adapter_parameters=73_776), paper)
    other = make_run(tmp_path / "b", "AuroRA", metric="matthews")
    with_published(
        other,
        {
            "source": "A paper, table 1",
            "metrics": {"mean_accuracy": 0.838, "loss": 1.5},
            "parameters": None,
            "notes": [],
        },
    )
    none = with_published(make_run(tmp_path / "c", "QLoRA"), None)
    runs = load_runs([same, other, none])
    assert headings(runs)[2:5] == ["trainable parameters", "published parameters", "step time, median (ms)"]
    assert headings(runs)[8] == "published score" and "unseen rows" in headings(runs)[7]
    assert [cells(run, runs)[3] for run in runs] == ["0.1M (ours 73,776)", "–", "–"]
    assert [cells(run, runs)[8] for run in runs] == ["83.6 %", "mean_accuracy 83.8 %; loss 1.500", "–"]
    assert all(len(cells(run, runs)) == len(headings(runs)) for run in runs)
    assert caveats(runs)[-2:] == [
        "RanLoRA, AuroRA: published values are those of A paper, table 1.",
        "RanLoRA: Prints <b> 0.1M.",
    ]
    page, table = write_report([same, other, none], tmp_path / "report")
    assert "0.1M (ours 73,776)" in page.read_text() and "Prints &lt;b&gt; 0.1M." in page.read_text()
    assert "| 82.6 % [79.2, 85.9] | 83.6 % |" in table.read_text() and "&lt;b> 0.1M" in table.read_text()


@pytest.mark.parametrize(
    "section", [None, "words", [1], {}, {"metrics": [0.8], "notes": "one"}, {"metrics": {"accuracy": "high"}}]
)
def test_a_published_section_with_nothing_to_show_adds_nothing(tmp_path, section):
    runs = load_runs([with_published(make_run(tmp_path / "a", "QLoRA"), section)])
    assert len(headings(runs)) == len(cells(runs[0], runs)) == 9


def test_a_config_that_is_no_yaml_is_shown_as_it_is(tmp_path):
    folder = make_run(tmp_path / "a", "QLoRA")
    (folder / "config.yaml").write_text("seed: [1")
    run = load_run(folder)
    assert run.config == "seed: [1" and run.published == {}

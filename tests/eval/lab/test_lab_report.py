"""The lab's page: five plots with the right marks, links that exist, no network, and nothing that a browser complains about."""

from __future__ import annotations

import json
import re
import shutil
import subprocess
import xml.etree.ElementTree as ElementTree
from html.parser import HTMLParser
from pathlib import Path
from urllib.parse import unquote

import pytest
from lab_files import AMPLITUDES, ARMS, FREQUENCIES, TYPES, lab_results, write_lab, write_sweep

from curvelora.errors import UserError
from curvelora_eval.lab.canvas import Axis, linear_axis, log_axis, power_text, setting_text, short
from curvelora_eval.lab.folder import Arm, read_lab
from curvelora_eval.lab.heatmap import RAMP, colour, colour_scale, is_published
from curvelora_eval.lab.report import write_lab_report, write_sweep_report

VOID = {"meta", "input", "br", "link", "img", "hr"}


class Page(HTMLParser):
    """Checks that tags nest, and keeps every attribute that may load or lead to something, and all ids."""

    def __init__(self, text: str):
        super().__init__()
        self.stack, self.links, self.ids, self.tags = [], [], [], []
        self.feed(text)
        assert self.stack == []

    def handle_starttag(self, tag, attrs):
        self.tags.append(tag)
        values = dict(attrs)
        self.links += [values[name] for name in ("href", "src", "srcset", "action", "data") if name in values]
        self.ids += [values["id"]] if "id" in values else []
        if tag not in VOID:
            self.stack.append(tag)

    def handle_endtag(self, tag):
        assert self.stack.pop() == tag


@pytest.fixture(scope="module")
def lab(tmp_path_factory) -> Path:
    """A lab of all arms with a sweep beside it; its report is written."""
    folder = tmp_path_factory.mktemp("lab")
    write_sweep(folder / "sweep")
    write_lab(folder / "lab", steps=60, sweep="../sweep")
    assert write_lab_report(folder / "lab") == folder / "lab" / "report.html"
    return folder / "lab"


def read(folder: Path) -> str:
    return (folder / "report.html").read_text(encoding="utf-8")


def plot(folder: Path, number: int) -> ElementTree.Element:
    """The n-th plot of the first screen, its charts parsed as XML."""
    figure = re.search(rf'<figure class="[^"]*" id="plot-{number}">.*?</figure>', read(folder), re.S).group()
    charts = "".join(re.findall(r"<svg class=\"chart.*?</svg>(?=\s*(?:</div>|<ul|<figcaption))", figure, re.S))
    return ElementTree.fromstring(f"<plot>{charts}</plot>")


def marks(tree: ElementTree.Element, tag: str, kind: str) -> list[ElementTree.Element]:
    return [mark for mark in tree.iter(tag) if kind in (mark.get("class") or "").split()]


def titles(tree: ElementTree.Element) -> list[str]:
    return [title.text for title in tree.iter("title")]


def test_page_stands_alone_and_its_links_exist(lab):
    text = read(lab)
    page = Page(text)
    assert "script" not in page.tags and "http" not in re.sub(r"https?://www\.w3\.org\S*", "", text)
    assert "@import" not in text and "url(" not in text
    assert len(page.ids) == len(set(page.ids))
    assert len(page.links) > 200
    for link in set(page.links):
        assert not link.startswith(("/", "#", "data:")) and ":" not in link
        assert (lab / unquote(link)).exists(), link
    expected = {"results.json", "cost.json", "../sweep/sweep.json", "runs/loran_sinter/seed-42/steps.jsonl"}
    assert expected <= set(page.links)


def test_every_chart_is_an_image_with_a_name(lab):
    charts = re.findall(r'<svg class="chart[^"]*"[^>]*>', read(lab))
    assert len(charts) > 20
    for head in charts:
        assert 'role="img"' in head
        assert len(re.search(r'aria-label="([^"]*)"', head).group(1)) > 4
        assert re.search(r'viewBox="0 0 \d+ \d+(\.\d+)?"', head)


def test_overhead_bars_start_at_one_and_are_as_long_as_the_excess(tmp_path):
    results = lab_results(steps=10, arms=("qlora", "loran:identity", "loran:sinter"))
    for key, ratio in (("loran:identity", 2.0), ("loran:sinter", 3.0)):
        overhead = {"ratio": ratio, "low": ratio - 0.5, "high": ratio + 0.5, "pairs": 9}
        results["cost"]["arms"][key]["overhead"] = overhead
    write_lab(tmp_path / "a", steps=10, arms=tuple(results["arms"]), cost=results["cost"])
    write_lab_report(tmp_path / "a")
    tree = plot(tmp_path / "a", 1)
    base, twice, thrice = marks(tree, "rect", "bar")
    assert float(base.get("width")) == 0
    assert float(base.get("x")) == float(twice.get("x")) == float(thrice.get("x"))
    assert float(thrice.get("width")) == pytest.approx(2 * float(twice.get("width")), abs=0.2)
    assert float(twice.get("width")) > 50
    # the whisker of 2.0 [1.5, 2.5] is as long as the bar from 1 to 2, around its end
    ends = [float(x) for x in re.findall(r"[ML](\S+) ", marks(tree, "path", "whisker")[0].get("d"))]
    end = float(twice.get("x")) + float(twice.get("width"))
    assert ends[1] - ends[0] == pytest.approx(float(twice.get("width")), abs=0.2)
    assert sum(ends) / 2 == pytest.approx(end, abs=0.2)
    assert titles(tree)[1] == "LoRAN identity: 2.00 × [1.50, 2.50]"


def test_a_faster_arm_has_a_bar_to_the_left(tmp_path):
    results = lab_results(steps=10, arms=("qlora", "ranlora"))
    results["cost"]["arms"]["ranlora"]["overhead"] = {"ratio": 0.8, "low": 0.79, "high": 0.81, "pairs": 9}
    write_lab(tmp_path / "a", steps=10, arms=("qlora", "ranlora"), cost=results["cost"])
    write_lab_report(tmp_path / "a")
    base, faster = marks(plot(tmp_path / "a", 1), "rect", "bar")
    assert float(faster.get("x")) + float(faster.get("width")) == pytest.approx(float(base.get("x")), abs=0.2)
    assert float(faster.get("width")) > 20


def test_loss_plot_has_a_line_and_a_band_for_each_arm(lab):
    tree = plot(lab, 2)
    assert len(marks(tree, "path", "line")) == len(marks(tree, "path", "band")) == len(ARMS)
    hover = titles(tree)
    assert len(hover) == len(ARMS) * 31  # of 60 steps every second one, and the last
    first = next(text for text in hover if text.startswith("QLoRA, step 1:"))
    # the moving average of one point is that point, and the line is the seeds' median
    losses = []
    for seed in (42, 43, 44):
        lines = (lab / f"runs/qlora/seed-{seed}/steps.jsonl").read_text().splitlines()
        losses.append(json.loads(lines[0])["loss"])
    low, middle, high = (short(loss) for loss in sorted(losses))
    assert first == f"QLoRA, step 1: {middle} ({low} to {high} over 3 seeds)"


def test_spikes_stand_at_their_steps_in_a_lane_for_each_seed(lab):
    tree = plot(lab, 3)
    results = json.loads((lab / "results.json").read_text())
    runs = results["runs"]["loran:sinter-large"]
    expected = [step for run in runs.values() for step in run["stability"]["spike_steps"]]
    spikes = marks(tree, "circle", "spike")
    assert [int(re.search(r"at step (\d+)", spike.find("title").text).group(1)) for spike in spikes] == expected
    assert len(marks(tree, "path", "lane")) == 3 * len(ARMS)
    assert len({spike.get("cy") for spike in spikes}) == 3
    # equal steps lie equally far apart: one unit of x a step
    units = {
        (float(b.get("cx")) - float(a.get("cx"))) / (y - x)
        for (a, x), (b, y) in zip(
            list(zip(spikes, expected, strict=True))[::2], list(zip(spikes, expected, strict=True))[1::2], strict=True
        )
    }
    assert max(units) - min(units) < 0.05 and min(units) > 1
    # residual_std for all arms, the paired one for all but the baseline
    assert len(marks(tree, "circle", "dot")) == 2 * len(ARMS) - 1
    assert len(marks(tree, "circle", "hollow")) == len(ARMS) - 1


def test_no_spike_is_said_in_words(tmp_path):
    write_lab(tmp_path / "a", steps=30, seeds=(1, 2), arms=("qlora", "loran:sinter"))
    write_lab_report(tmp_path / "a")
    tree = plot(tmp_path / "a", 3)
    assert marks(tree, "circle", "spike") == []
    assert "No spikes in 30 steps × 2 seeds" in [text.text for text in tree.iter("text")]


def test_resolvability_is_solid_forward_and_dashed_in_the_derivative(lab):
    tree = plot(lab, 4)
    weight_space = [key for key, arm in ARMS.items() if arm[4] is not None]
    lines = marks(tree, "path", "line")
    assert len(lines) == 2 * len(weight_space)
    assert len(marks(tree, "path", "dashed")) == len(weight_space)
    last = next(text for text in titles(tree) if text.startswith("LoRAN Sinter (a = 5e-5), derivative, step 60:"))
    # 0.4 (1 - exp(-5)) at the tenth look
    assert last.startswith("LoRAN Sinter (a = 5e-5), derivative, step 60: 39.7 %")


def test_map_has_a_cell_for_each_setting_in_four_views(lab):
    tree = plot(lab, 5)
    cells = marks(tree, "rect", "cell")
    points = len(AMPLITUDES) * len(FREQUENCIES)
    assert len(cells) == 4 * points
    loss = [cell.find("title").text for cell in cells[:points]]
    assert "frequency 10,000, amplitude 5e-5: 2.330" in loss
    assert "frequency 10,000, amplitude 0.2: not measured; 1 of 1 diverged" in loss
    assert "frequency 50,000, amplitude 1e-5: not run" in loss
    outlined = marks(tree, "rect", "published")
    assert len(outlined) == 4
    inner = next(cell for cell in cells if cell.find("title").text.startswith("frequency 10,000, amplitude 5e-5"))
    assert float(outlined[0].get("x")) - float(inner.get("x")) == pytest.approx(1.5, abs=0.11)
    assert float(outlined[0].get("y")) - float(inner.get("y")) == pytest.approx(1.5, abs=0.11)
    # two strokes a cross, two diverged cells, four views; the smallest amplitude is at the bottom
    assert len(marks(tree, "path", "cross")) == 2 * 2 * 4
    heights = {re.search(r"amplitude (\S+):", c.find("title").text).group(1): float(c.get("y")) for c in cells}
    assert heights["1e-5"] > heights["5e-5"] > heights["0.2"]
    assert read(lab).count('type="radio"') == 4
    divergence = [cell for cell in cells[2 * points : 3 * points] if "0.2" in cell.find("title").text]
    assert [cell.find("title").text.split(": ")[1] for cell in divergence if "10,000" in cell.find("title").text] == [
        "100 %; 1 of 1 diverged"
    ]


def test_map_colours_follow_the_values(lab):
    cells = {cell.find("title").text: cell.get("fill") for cell in marks(plot(lab, 5), "rect", "cell")[:20]}
    darkest, lightest = (f"#{r:02x}{g:02x}{b:02x}" for r, g, b in (RAMP[-1], RAMP[0]))
    losses = {text: float(text.rsplit(": ", 1)[1]) for text in cells if text[-1].isdigit() and ": 2." in text}
    assert cells[max(losses, key=losses.get)] == darkest
    assert lightest in {cells[text] for text, loss in losses.items() if loss == min(losses.values())}
    light = [sum(int(colour(i / 20)[j : j + 2], 16) for j in (1, 3, 5)) for i in range(21)]
    assert light == sorted(light, reverse=True)
    assert colour_scale([1.0, 3.0])(2.0) == 0.5
    assert colour_scale([1e-4, 1.0])(1e-2) == pytest.approx(0.5)
    assert is_published({"amplitude": 5e-5, "frequency": 1e4})
    assert not is_published({"amplitude": 1e-4, "frequency": 1e4}) and not is_published({"frequency": 1e4})


def test_without_a_sweep_the_panel_names_the_command(tmp_path):
    write_lab(tmp_path / "a", steps=10, arms=("qlora", "loran:sinter"))
    write_lab_report(tmp_path / "a")
    figure = re.search(r'id="plot-5">.*?</figure>', read(tmp_path / "a"), re.S).group()
    assert "<code>curvelora sweep --model CHECKPOINT --grid wide --out SWEEP</code>" in figure and "<svg" not in figure
    write_sweep(tmp_path / "s")
    write_lab_report(tmp_path / "a", tmp_path / "s")
    assert len(marks(plot(tmp_path / "a", 5), "rect", "cell")) == 80


def test_missing_parts_are_left_out(tmp_path):
    """A folder with nothing but results.json still gives a page with five plots, each with a chart or a reason."""
    folder = tmp_path / "a"
    results = write_lab(folder, steps=8, arms=("qlora", "loran:sinter"), cost=None, paths=None)
    for runs in results["runs"].values():
        for run in runs.values():
            run |= {"presence": None, "sharpness": None, "spectra": None, "stability": {}}
            run["heldout"] = {"loss": None, "accuracy": None}
    shutil.rmtree(folder / "runs")
    (folder / "results.json").write_text(json.dumps(results))
    write_lab_report(folder)
    text = read(folder)
    Page(text)
    assert text.count('<p class="missing">') == 5 and text.count('id="plot-') == 5
    assert "Cost in detail" not in text and "Spectra" not in text
    assert "Every run" in text

    (folder / "results.json").write_text(json.dumps({"schema": 1, "kind": "lab"}))
    write_lab_report(folder)
    assert read(folder).count('<p class="missing">') == 5


def test_a_diverged_run_is_marked_and_does_not_stretch_the_axis(tmp_path):
    folder = tmp_path / "a"
    results = write_lab(folder, steps=60, arms=("qlora", "loran:sinter-large"))
    run = results["runs"]["loran:sinter-large"]["43"]
    run["status"] = "diverged"
    path = folder / run["folder"] / "steps.jsonl"
    lines = [json.loads(line) for line in path.read_text().splitlines()]
    for line in lines[30:]:
        line["loss"] = 1e4 if line["step"] < 50 else None
    path.write_text("\n".join(map(json.dumps, lines)) + '\n{"step": 61, "lo')
    (folder / "results.json").write_text(json.dumps(results))
    write_lab_report(folder)
    tree = plot(folder, 2)
    assert len(marks(tree, "path", "cross")) == 2
    assert "LoRAN Sinter (a = 2e-2), seed 43: diverged at step 49" in titles(tree)
    labels = [float(t.text) for t in tree.iter("text") if t.get("class") == "end"]
    assert max(labels) < 6


def test_details_have_the_numbers_with_links(lab):
    text = read(lab)
    assert re.search(r'<td><a href="cost.json">1\.30 \[1\.28, 1\.31\]</a></td>', text)
    assert "MFU = model FLOPs / step time / (processes × peak)" in text
    for heading in ("Peak memory", "Sharpness", "Path of the update", "Every run", "Spectra of the update"):
        assert heading in text
    small = re.findall(r"<h4>(\w+)</h4>", text)
    assert set(small) == set(TYPES) and len(small) == 4 * len(TYPES)
    # the stacked parts of QLoRA's bar have the phases' shares
    bars = re.search(r'<svg class="chart stacked".*?</svg>', text, re.S).group()
    widths = [float(w) for w in re.findall(r'class="part part-\d" [^>]* width="([\d.]+)"', bars)][:5]
    assert widths[2] / widths[1] == pytest.approx(0.55 / 0.3, rel=0.02)
    assert widths[1] / widths[3] == pytest.approx(0.3 / 0.04, rel=0.05)


def test_approximation_table(tmp_path):
    errors = {"fit": 0.2, "held": 0.3}
    record = {"rank": 8, "best_linear": errors | {"floor_held": 0.21}, "aurora": errors | {"start": 0.5}}
    write_lab(tmp_path / "a", steps=8, arms=("qlora", "aurora"), approximation={"q_proj": record})
    write_lab_report(tmp_path / "a")
    text = read(tmp_path / "a")
    assert "best linear, q_proj" in text and "aurora, q_proj" in text
    assert '<a href="results.json">0.210</a>' in text


def test_controls_share_the_hue_of_their_arm_and_the_baseline_has_its_own(lab):
    arms = {arm.key: arm for arm in read_lab(lab).arms}
    assert arms["qlora"].hue == 0 and arms["qlora"].baseline
    assert arms["loran:sinter@fp32"].hue == arms["loran:sinter"].hue and arms["loran:sinter@fp32"].control
    hues = [arm.hue for arm in arms.values() if not arm.control]
    assert len(set(hues)) == len(hues)


def test_labels_are_escaped(tmp_path):
    results = write_lab(tmp_path / "a", steps=8, arms=("qlora", "loran:sinter"), title="<i>x</i>")
    results["arms"]["loran:sinter"]["label"] = '<b>"a" & b</b>'
    (tmp_path / "a/results.json").write_text(json.dumps(results))
    write_lab_report(tmp_path / "a")
    text = read(tmp_path / "a")
    Page(text)
    assert "<b>" not in text and "<i>x" not in text and "&lt;b&gt;" in text


def test_a_lost_cell_does_not_stretch_the_colours(tmp_path):
    """A diverged cell may have a finite loss of any size: the colours span the others, and it takes the darkest."""
    sweep = write_sweep(tmp_path / "s")
    for cell in sweep["cells"]:
        cell["heldout_loss"] = 1e6 if cell["diverged"] else cell["heldout_loss"]
    (tmp_path / "s/sweep.json").write_text(json.dumps(sweep))
    write_sweep_report(tmp_path / "s")
    cells = {cell.find("title").text: cell.get("fill") for cell in marks(plot(tmp_path / "s", 1), "rect", "cell")[:20]}
    lost = cells["frequency 10,000, amplitude 0.2: 1e6; 1 of 1 diverged"]
    assert lost == cells["frequency 5,000, amplitude 0.2: 2.552"] == "#1b2150"
    assert len(set(cells.values())) > 5


def test_sweep_alone(tmp_path):
    write_sweep(tmp_path / "s")
    assert write_sweep_report(tmp_path / "s") == tmp_path / "s" / "report.html"
    text = read(tmp_path / "s")
    page = Page(text)
    assert all((tmp_path / "s" / unquote(link)).exists() for link in page.links)
    assert len(marks(plot(tmp_path / "s", 1), "rect", "cell")) == 80
    assert text.count("<tr>") == 1 + 20


def test_sweep_of_one_axis_is_a_dot_plot(tmp_path):
    cells = [
        {
            "values": {"rank": r},
            "seed": seed,
            "status": "completed",
            "heldout_loss": 2 + 1 / r + seed / 100,
            "diverged": False,
        }
        for r in (4, 8, 16)
        for seed in (1, 2)
    ]
    write_sweep(tmp_path / "s", axes={"rank": [4, 8, 16]}, cells=cells, baseline=None)
    write_sweep_report(tmp_path / "s")
    tree = plot(tmp_path / "s", 1)
    dots = [float(dot.get("cx")) for dot in marks(tree, "circle", "dot")]
    # 1/4, 1/8, 1/16: the first gap is twice the second
    assert (dots[0] - dots[1]) / (dots[1] - dots[2]) == pytest.approx(2, rel=0.02)
    assert titles(tree)[0] == "rank 4: 2.265"


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (None, "has no results.json"),
        ("{", "cannot be read as JSON"),
        ("[]", "holds a JSON list"),
        ('{"schema": 2, "kind": "lab"}', "schema 2"),
        ('{"schema": 1, "kind": "sweep"}', "of kind 'sweep'"),
    ],
)
def test_bad_folders_are_refused(tmp_path, content, message):
    if content is not None:
        (tmp_path / "results.json").write_text(content)
    with pytest.raises(UserError, match=re.escape(message)):
        write_lab_report(tmp_path)
    assert not (tmp_path / "report.html").exists()


def test_axes():
    axis = Axis((0.0, 10.0), (100.0, 200.0), [0.0, 5.0, 10.0])
    assert (axis(5), axis(-3), axis(20), axis.free(20)) == (150, 100, 200, 300)
    log = log_axis(3e-5, 2e-1, (0.0, 4.0))
    assert log.marks == pytest.approx([1e-5, 1e-4, 1e-3, 1e-2, 1e-1, 1.0])
    assert log(1e-3) == pytest.approx(1.6)
    narrow = log_axis(0.3, 4.0, (0.0, 1.0))
    assert narrow.marks == pytest.approx([0.2, 0.5, 1, 2, 5])
    assert log_axis(1.0, 1.0, (0.0, 1.0)).span == (1.0, 2.0)
    assert linear_axis(0.2, 0.9, (0, 1), snug=True).span == (0.2, 0.9)


def test_numbers_in_words():
    assert [short(v) for v in (None, 0, 1234.5, 0.01234, 3.5e-5, -2.0, 1e7)] == [
        *("–", "0", "1,234", "0.0123", "3.5e-5", "−2.00", "1e7")
    ]
    assert [setting_text(v) for v in (0.002, 5e-5, 1e4, "tanh", 2.5e7)] == ["0.002", "5e-5", "10,000", "tanh", "2.5e7"]
    assert [power_text(v) for v in (1e-4, 0.01, 100.0, 1e5, 2e-4)] == ["10⁻⁴", "0.01", "100", "10⁵", "2e-4"]


def test_arm_without_seeds_is_empty(tmp_path):
    results = lab_results(steps=8, arms=("qlora", "aurora")) | {"runs": {}}
    (tmp_path / "results.json").write_text(json.dumps(results))
    lab = read_lab(tmp_path)
    arm = lab.arms[1]
    assert isinstance(arm, Arm) and lab.over_seeds(arm, "heldout", "loss") is None and lab.series(arm, "loss") == {}


def test_bars_of_two_seeds_are_the_two_and_never_below_zero(tmp_path):
    results = write_lab(tmp_path, seeds=(1, 2, 3), steps=8, arms=("qlora", "aurora"))
    for value, run in zip((1.0, 2.0, 9.0), results["runs"]["aurora"].values(), strict=True):
        run["sharpness"]["value"] = value
    (tmp_path / "results.json").write_text(json.dumps(results))
    lab = read_lab(tmp_path)
    aurora = lab.arms[1]
    assert lab.spread(aurora, "sharpness", "value")["low"] == 0.0 and "Student" in lab.bars
    # mean 4, sd 4.359, 4.303 * 4.359 / sqrt(3) = 10.83
    assert lab.spread(aurora, "sharpness", "value")["high"] == pytest.approx(14.83, abs=0.01)
    for runs in results["runs"].values():
        del runs["3"]
    (tmp_path / "results.json").write_text(json.dumps(results))
    lab = read_lab(tmp_path)
    found = lab.spread(aurora, "sharpness", "value")
    assert (found["mean"], found["low"], found["high"], lab.bars) == (1.5, 1.0, 2.0, "Bars: the two seeds.")


CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")


@pytest.mark.skipif(CHROMIUM is None, reason="no Chromium")
def test_a_browser_shows_it_without_a_complaint(lab, tmp_path):
    """Rendered by Chromium: no message on the console, and the charts and switches are in the tree that it built."""
    command = [CHROMIUM, "--headless", "--no-sandbox", "--disable-gpu", "--enable-logging=stderr", "--v=0"]
    command += [f"--user-data-dir={tmp_path}", "--dump-dom", (lab / "report.html").as_uri()]
    found = subprocess.run(command, capture_output=True, text=True, timeout=60)
    assert found.returncode == 0
    assert [line for line in found.stderr.splitlines() if "CONSOLE" in line] == []
    assert found.stdout.count('class="chart') == read(lab).count('class="chart') > 20
    assert found.stdout.rstrip().endswith("</html>")

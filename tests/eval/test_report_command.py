"""`curvelora report` on a run folder that training wrote: both files, the run's own numbers, and nothing from a network."""

from __future__ import annotations

import json
import re
import shutil
from html.parser import HTMLParser
from pathlib import Path

import pytest

from curvelora import cli
from run_files import result

LOADING = {"src", "srcset", "data", "poster", "action", "background", "manifest", "ping", "xlink:href"}


class Resources(HTMLParser):
    """Collects what a browser would load or run, and where links lead."""

    def __init__(self, page: str) -> None:
        super().__init__()
        self.loaded: list[str] = []
        self.links: list[str] = []
        self.feed(page)

    def handle_starttag(self, tag: str, attributes: list[tuple[str, str | None]]) -> None:
        if tag in ("script", "iframe", "object", "embed", "link", "base"):
            self.loaded.append(tag)
        for name, value in attributes:
            if name in LOADING or name.startswith("on"):
                self.loaded.append(f"{tag} {name}={value}")
            if name == "href":
                self.links.append(value or "")


@pytest.fixture
def report(trained_run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> tuple[str, str, str]:
    """The page, the table and what was printed."""
    out = tmp_path / "report"
    capsys.readouterr()
    assert cli.main(["report", str(trained_run), "--out", str(out)]) == 0
    assert {p.name for p in out.iterdir()} == {"report.html", "report.md"}
    page, table = ((out / name).read_text(encoding="utf-8") for name in ("report.html", "report.md"))
    return page, table, capsys.readouterr().out


def test_the_table_has_the_run(report: tuple[str, str, str], trained_run: Path) -> None:
    _, table, printed = report
    rows = [line for line in table.splitlines() if line.startswith("|")]
    assert len(rows) == 3  # heading, rule, the run
    run, accuracy = result(trained_run), result(trained_run, "evaluation.json")["metrics"]["accuracy"]
    assert "LoRAN on sentences" in rows[2]
    assert f"{run['trainable_parameters']:,}" in rows[2]
    for number in (accuracy["value"], accuracy["low"], accuracy["high"]):
        assert f"{100 * number:.1f}" in rows[2]
    assert table in printed and "report.html" in printed


def test_the_page_has_the_run_and_its_curves(report: tuple[str, str, str], trained_run: Path) -> None:
    page = report[0]
    steps = result(trained_run)["steps"]
    assert "LoRAN on sentences" in page and page.count("<svg") >= 2 and f"{steps}" in page
    assert result(trained_run, "evaluation.json")["dataset"]["sha256"] in page


def test_nothing_is_loaded_from_anywhere(report: tuple[str, str, str]) -> None:
    page = report[0]
    found = Resources(page)
    assert found.loaded == []
    assert not re.search(r"@import|url\(", page)
    # the links lead to the run folder, by a path that still holds when both are moved together
    assert found.links and not [link for link in found.links if "://" in link or link.startswith("/")]


def test_the_links_lead_to_the_run(report: tuple[str, str, str], trained_run: Path, tmp_path: Path) -> None:
    folders = {
        (tmp_path / "report" / link).resolve() for link in Resources(report[0]).links if not link.startswith("#")
    }
    assert trained_run.resolve() in folders


def test_two_runs_and_a_title(trained_run: Path, tmp_path: Path) -> None:
    other = Path(shutil.copytree(trained_run, tmp_path / "other"))
    changed = result(other) | {"name": "LoRA on sentences"}
    (other / "result.json").write_text(json.dumps(changed), encoding="utf-8")
    out = tmp_path / "report"
    assert cli.main(["report", str(trained_run), str(other), "--out", str(out), "--title", "Both <runs>"]) == 0
    table = (out / "report.md").read_text(encoding="utf-8")
    assert "LoRAN on sentences" in table and "LoRA on sentences" in table
    assert "Both &lt;runs&gt;" in (out / "report.html").read_text(encoding="utf-8")


def test_bad_folders_are_one_sentence(trained_run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "empty").mkdir()
    (tmp_path / "file").write_text("mine", encoding="utf-8")
    capsys.readouterr()
    cases = [
        ([str(tmp_path / "none")], tmp_path / "report", "none does not exist"),
        ([str(tmp_path / "empty")], tmp_path / "report", "no result.json"),
        ([str(trained_run)], tmp_path / "file", "file"),
    ]
    for runs, out, part in cases:
        assert cli.main(["report", *runs, "--out", str(out)]) == 2
        error = capsys.readouterr().err
        assert error.startswith("error: ") and part in error and len(error.splitlines()) == 1
    assert not (tmp_path / "report").exists() and (tmp_path / "file").read_text(encoding="utf-8") == "mine"

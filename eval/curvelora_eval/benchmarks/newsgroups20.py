"""20 Newsgroups: which of 20 groups a post went to (Lang 1995), the split by date."""

from __future__ import annotations

import re
from pathlib import Path

from curvelora.errors import UserError
from curvelora_eval.benchmarks.archives import read_members
from curvelora_eval.benchmarks.base import Benchmark, Row, Split
from curvelora_eval.benchmarks.protocols.head import HeadProtocol
from curvelora_eval.scoring import Score

LABELS = (
    "alt.atheism",
    "comp.graphics",
    "comp.os.ms-windows.misc",
    "comp.sys.ibm.pc.hardware",
    "comp.sys.mac.hardware",
    "comp.windows.x",
    "misc.forsale",
    "rec.autos",
    "rec.motorcycles",
    "rec.sport.baseball",
    "rec.sport.hockey",
    "sci.crypt",
    "sci.electronics",
    "sci.med",
    "sci.space",
    "soc.religion.christian",
    "talk.politics.guns",
    "talk.politics.mideast",
    "talk.politics.misc",
    "talk.religion.misc",
)
# where the header ends: an empty line; some copies of the training posts have tabs for line ends
HEADER_END = re.compile(r"\r?\n[ \t]*\r?\n|\t\t")


def body(content: bytes) -> str:
    """A post without its header, every run of white space as one blank; Latin-1 where it is not UTF-8."""
    try:
        text = content.decode("utf-8")
    except UnicodeDecodeError:
        text = content.decode("latin-1")
    parts = HEADER_END.split(text, maxsplit=1)
    return " ".join(parts[-1].split())


def read(path: Path, split: str) -> list[Row]:
    """`20news-bydate-<split>/<group>/<number>` inside the archive; a row's id is `<group>/<number>`."""
    rows = []
    for inside, content in read_members(path):
        if inside.name.startswith(".") or len(inside.parts) < 3 or not inside.parts[-3].endswith(f"-{split}"):
            continue
        rows.append(Row("/".join(inside.parts[-2:]), {"text": body(content)}, inside.parts[-2]))
    if not rows:
        raise UserError(f"{path} holds no post below a folder that ends in -{split}: it should hold the by-date split")
    return rows


FILES = ("20newsgroups/20news-bydate.tar", "20news-bydate.tar")
PROTOCOL = HeadProtocol(
    kind="sequence_classification",
    labels=LABELS,
    metrics=("accuracy", "f1"),
    scores=(Score("accuracy"), Score("f1", options={"labels": list(range(len(LABELS)))})),
    description="a head trained with the adapter; accuracy and macro F1; posts without their header",
)
BENCHMARK = Benchmark(
    name="newsgroups20",
    kind="classification",
    title="20 Newsgroups by date",
    source="Lang 1995, qwone.com/~jason/20Newsgroups (no licence stated: research use)",
    splits={"train": Split(FILES, 11314), "test": Split(FILES, 7532)},
    default_split="test",
    read=read,
    answers=LABELS,
    protocols={PROTOCOL.name: PROTOCOL},
    notes=(
        "The header (From, Subject, Organization, ...) is left out, because it gives the group away; quotations and signatures "
        "stay. Scores that keep the header are several points higher.",
        "White space becomes single blanks: in the usual copy the training posts have lost their line ends and the test posts "
        "have not, and a model would learn from one form and be asked in the other.",
    ),
)

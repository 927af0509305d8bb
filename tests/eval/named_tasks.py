"""What the tests of named tasks share: small rows in the tasks' own formats, and adapters for the tiny Llama."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from peft import PeftConfig, get_peft_model
from torch import nn
from transformers import AutoModelForCausalLM

from curvelora_eval.spec import ModelSpec, TaskSpec, write_task

QUESTIONS = (
    "is the sun a star",
    "do fish have lungs of the kind that mammals have, or do all of them breathe through gills in the water they live in",
    "can glass be recycled without loss of quality",
    "is it raining",
    "was the first moon landing before the first flight of an aeroplane across the ocean between europe and america",
    "are all squares rectangles",
    "does bread contain flour and water and usually a little salt as well",
)


def write_data(folder: Path) -> Path:
    """BoolQ, PIQA and GSM8K rows, MRPC pairs and a text below `folder`, in the layout of `docs/tasks.md`."""
    boolq = [
        {
            "instruction": f"Please answer the following question with true or false, question: {text}?\n\n"
            "Answer format: true/false",
            "input": "",
            "output": f"the correct answer is {answer}",
            "answer": answer,
        }
        for text, answer in zip(QUESTIONS, ("true", "false") * 4, strict=False)
    ]
    ways = ("do it now", "wait for a day and then do all of it again")
    piqa = [
        {
            "instruction": f"Please choose the correct solution to the question: {text}?\n\nSolution1: {ways[i % 2]}\n\n"
            f"Solution2: {ways[1 - i % 2]}\n\nAnswer format: solution1/solution2",
            "input": "",
            "output": f"the correct answer is solution{1 + i % 2}",
            "answer": f"solution{1 + i % 2}",
        }
        for i, text in enumerate(QUESTIONS)
    ]
    for name, rows in (("boolq", boolq), ("piqa", piqa)):
        (folder / "commonsense" / name).mkdir(parents=True)
        (folder / "commonsense" / name / "test.json").write_text(json.dumps(rows), encoding="utf-8")
    (folder / "gsm8k").mkdir()
    solved = [
        {"question": f"{i} apples and {i} pears?", "answer": f"{i} + {i} = {2 * i}\n#### {2 * i}"} for i in range(5)
    ]
    (folder / "gsm8k/test.jsonl").write_text("".join(json.dumps(row) + "\n" for row in solved), encoding="utf-8")
    (folder / "mrpc").mkdir()
    pairs = ["Quality\t#1 ID\t#2 ID\t#1 String\t#2 String"]
    pairs += [f"{i % 2}\t{i}\t{i}\t{text}\t{QUESTIONS[i - 1]}" for i, text in enumerate(QUESTIONS)]
    (folder / "mrpc/dev.tsv").write_text("\n".join(pairs) + "\n", encoding="utf-8")
    (folder / "wikitext-2").mkdir()
    (folder / "wikitext-2/test.txt").write_text("\n".join(QUESTIONS) + "\n", encoding="utf-8")
    return folder


def save_adapter(folder: Path, base: Path, config: PeftConfig, seed: int = 0, model: nn.Module | None = None) -> Path:
    """An adapter with random weights, loud enough to change answers, and its task.json."""
    wrapped = get_peft_model(model or AutoModelForCausalLM.from_pretrained(base), config)
    torch.manual_seed(seed)
    with torch.no_grad():
        for parameter in wrapped.parameters():
            if parameter.requires_grad:
                parameter.add_(0.3 * torch.randn_like(parameter))
    wrapped.save_pretrained(folder)
    write_task(folder, ModelSpec(path=str(base), dtype="float32"), TaskSpec(kind="causal_lm"))
    return folder


def read_lines(path: Path) -> list[dict[str, Any]]:
    """The objects of a JSON lines file."""
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]

"""The prompts of two lines of work, both descended from Alpaca, letter for letter.

LLM-Adapters (arXiv 2304.01933) indents its prompt by 16 blanks and asks in evaluation with other blanks than in training:
`legacy` keeps that, `clean` is the plain Alpaca form in both places. Scores of the two must not stand in one table.
"""

from __future__ import annotations

from curvelora_eval.benchmarks.protocols.generate import Wording

PREAMBLE = "Below is an instruction that describes a task. Write a response that appropriately completes the request."
RESPONSE = "### Response:"
INDENT = " " * 16

LEGACY = Wording(
    asked=f"{PREAMBLE} \n\n{INDENT}### Instruction:\n{INDENT}{{instruction}}\n\n{INDENT}{RESPONSE}\n{INDENT}",
    # two blanks after the preamble, and a line of 16 blanks where evaluation has an empty one
    trained=f"{PREAMBLE}  \n\n{INDENT}### Instruction:\n{INDENT}{{instruction}}\n{INDENT}\n{INDENT}{RESPONSE}\n{INDENT}",
)
_PLAIN = f"{PREAMBLE}\n\n### Instruction:\n{{instruction}}\n\n{RESPONSE}"
CLEAN = Wording(asked=f"{_PLAIN}\n", trained=f"{_PLAIN}\n")
# PiSSA and MiLoRA: evaluation begins the answer with a sentence that training does not have there
STEP_BY_STEP = Wording(asked=f"{_PLAIN} Let's think step by step.", trained=_PLAIN)

TEMPLATES = {"legacy": LEGACY, "clean": CLEAN}

"""The protocol classes; each predictor serves one of them."""

from curvelora_eval.benchmarks.protocols.base import Protocol, Row
from curvelora_eval.benchmarks.protocols.choices import ChoiceProtocol
from curvelora_eval.benchmarks.protocols.generate import GenerateProtocol, Wording
from curvelora_eval.benchmarks.protocols.head import HeadProtocol
from curvelora_eval.benchmarks.protocols.perplexity import PerplexityProtocol

__all__ = ["ChoiceProtocol", "GenerateProtocol", "HeadProtocol", "PerplexityProtocol", "Protocol", "Row", "Wording"]

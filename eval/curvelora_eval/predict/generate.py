"""Generative protocols: prompts in, deterministic text out, an answer read out of the text.

Prompts are padded on the left, so that every row's new tokens follow its own last token. What the checkpoint's generation config
says about decoding is put aside: the protocol says all of it.
"""

from __future__ import annotations

import contextlib
from collections.abc import Collection, Iterator, Sequence
from typing import Any

import torch
from torch import nn
from transformers import GenerationConfig

from curvelora_eval.benchmarks.protocols import GenerateProtocol, Row
from curvelora_eval.benchmarks.protocols.answers import MetaMathProtocol
from curvelora_eval.benchmarks.quirks import HUNDREDFOLD
from curvelora_eval.predict.base import Output, Predictor, padding_token
from curvelora_eval.tasks.base import device_of


class Generate(Predictor):
    """One prompt a row.

    Args:
        protocol, template: what is asked and how the answer is read.
        rows: the rows, in order.
        tokenizer: of the model.
        limit: the most tokens that prompt and new tokens may have together; None for no limit.
        quirks: names of defects to reproduce (`curvelora_eval.benchmarks.quirks`).

    Raises:
        UserError: the tokenizer has no token to pad with.
    """

    counted = "new"

    def __init__(
        self,
        protocol: GenerateProtocol,
        template: str,
        rows: Sequence[Row],
        tokenizer: Any,
        limit: int | None,
        quirks: Collection[str] = (),
    ) -> None:
        self.protocol, self.rows, self.tokenizer = protocol, rows, tokenizer
        self.quirks = frozenset(quirks)
        self._own_pad = padding_token(tokenizer)
        prompts = tokenizer([protocol.prompt(row, template) for row in rows], verbose=False)["input_ids"]
        room = None if limit is None else limit - protocol.max_new_tokens
        self.over_limit = {i for i, ids in enumerate(prompts) if room is not None and len(ids) > room}
        self.row_of = [i for i in range(len(rows)) if i not in self.over_limit]
        self.prompts = [prompts[i] for i in self.row_of]
        self.lengths = [len(ids) for ids in self.prompts]
        self._ends: tuple[int, ...] = ()

    @property
    def as_checkpoint(self) -> bool:
        """Whether the checkpoint's generation config fills what LLM-Adapters' script leaves open."""
        return "checkpoint-sampling" in self.quirks

    @property
    def pad(self) -> int:
        return 0 if "pad-id-0" in self.quirks else self._own_pad

    @property
    def skip_special_tokens(self) -> bool:
        return self.protocol.skip_special_tokens and "special-tokens" not in self.quirks

    @property
    def decoding(self) -> dict[str, Any]:
        return {
            "do_sample": "as the checkpoint says" if self.as_checkpoint else False,
            "num_beams": self.protocol.num_beams,
            "max_new_tokens": self.protocol.max_new_tokens,
            "stop": list(self.protocol.stop),
            "skip_special_tokens": self.skip_special_tokens,
            "pad_token": self.pad,
        }

    def predict(self, model: nn.Module, units: Sequence[int]) -> list[Output]:
        width = max(self.lengths[unit] for unit in units)
        padded = [[self.pad] * (width - self.lengths[u]) + self.prompts[u] for u in units]
        mask = [[0] * (width - self.lengths[u]) + [1] * self.lengths[u] for u in units]
        device = device_of(model)
        self._ends = end_tokens(model, self.tokenizer)
        settings = self._settings()
        with contextlib.nullcontext() if self.as_checkpoint else put_aside(model, settings):
            tokens = model.generate(
                input_ids=torch.tensor(padded, device=device),
                attention_mask=torch.tensor(mask, device=device),
                generation_config=settings,
                **({"tokenizer": self.tokenizer} if self.protocol.stop else {}),
            )
        return [self._read(new) for new in tokens[:, width:].tolist()]

    def _settings(self) -> GenerationConfig:
        sampling = {"temperature": 0.1, "top_p": 0.75, "top_k": 40} if self.as_checkpoint else {"do_sample": False}
        return GenerationConfig(
            **sampling,
            num_beams=self.protocol.num_beams,
            max_new_tokens=self.protocol.max_new_tokens,
            pad_token_id=self.pad,
            eos_token_id=list(self._ends) or None,
            stop_strings=list(self.protocol.stop) or None,
            use_cache="no-cache" not in self.quirks,
        )

    def _read(self, new: list[int]) -> Output:
        """The text of one row's new tokens; what comes after its end is padding."""
        end = next((i for i, token in enumerate(new) if token in self._ends), None)
        if end is not None:
            new = new[: end + 1]
        else:
            while new and new[-1] == self.pad:
                new = new[:-1]
        text = self.tokenizer.decode(new, skip_special_tokens=self.skip_special_tokens)
        stops = [at for stop in self.protocol.stop if (at := text.find(stop)) >= 0]
        cut = end is None and not stops and len(new) >= self.protocol.max_new_tokens
        return {"text": text[: min(stops, default=None)], "new_tokens": len(new), "truncated": cut}

    def tokens(self, units: Sequence[int], outputs: Sequence[Output]) -> int:
        return sum(output["new_tokens"] for output in outputs)

    def records(self, outputs: dict[int, Output]) -> list[dict[str, Any]]:
        unit_of = {row: unit for unit, row in enumerate(self.row_of)}
        records = []
        for i, row in enumerate(self.rows):
            said = outputs.get(unit_of.get(i, -1))
            if said is None and i not in self.over_limit:
                continue
            record = {"row": i, "id": row.id, "prediction": None, "reference": self.protocol.reference(row)}
            if said is None:
                records.append(record | {"text": None, "new_tokens": 0, "truncated": False, "over_limit": True})
            else:
                records.append(record | {"prediction": self._extract(said["text"], row)} | said)
        return records

    def _extract(self, text: str, row: Row) -> str | float | None:
        found = self.protocol.extract(text, row)
        if HUNDREDFOLD in self.quirks and isinstance(self.protocol, MetaMathProtocol):
            return self.protocol.forgiven(found, row)
        return found

    def differs(self, first: Sequence[Output], second: Sequence[Output]) -> tuple[bool, float | None]:
        return first[0]["text"] != second[0]["text"], None


def end_tokens(model: nn.Module, tokenizer: Any) -> tuple[int, ...]:
    """Every token that ends a text, by the checkpoint's generation config, its config, and its tokenizer."""
    found: set[int] = set()
    for source in (getattr(model, "generation_config", None), model.config, tokenizer):
        ends = getattr(source, "eos_token_id", None)
        found |= {ends} if isinstance(ends, int) else set(ends or ())
    return tuple(sorted(found))


@contextlib.contextmanager
def put_aside(model: nn.Module, settings: GenerationConfig) -> Iterator[None]:
    """Inside, `model` has `settings` for a generation config.

    transformers fills what a call leaves open from the checkpoint's own (a repetition penalty, say), and PEFT hands that down.
    """
    base = model.get_base_model() if hasattr(model, "get_base_model") else model
    before = base.generation_config
    try:
        for each in {id(base): base, id(model): model}.values():
            each.generation_config = settings
        yield
    finally:
        for each in {id(base): base, id(model): model}.values():
            each.generation_config = before

"""Causal language modelling and sequence-to-sequence: text out.

Decoding is deterministic: greedy, `do_sample=False`, whatever the checkpoint's own generation config says.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from datasets import Dataset
from torch import nn
from torch.nn import functional as F
from transformers import AutoModelForCausalLM, AutoModelForSeq2SeqLM, DataCollatorForSeq2Seq

from curvelora.errors import UserError
from curvelora_eval.tasks.base import Predictions, Task, batches_by_length, compute_context, device_of

IGNORED = -100  # the label that PyTorch's cross-entropy leaves out


class CausalLM(Task):
    """Roles text (perplexity), or prompt and completion (loss on the completion; generation is scored)."""

    optional = ("text", "prompt", "completion")
    auto_class = AutoModelForCausalLM
    possible_metrics = ("perplexity", "exact_match", "rouge")
    token_loss = True

    def __init__(self, spec: Any) -> None:
        super().__init__(spec)
        self.default_metrics = ("exact_match", "rouge") if "completion" in spec.columns else ("perplexity",)

    def roles(self, rows: Dataset) -> dict[str, str]:
        """As for every kind; where the settings map text alone, columns called prompt and completion are only columns."""
        mapped = super().roles(rows)
        if set(self.spec.columns) == {"text"}:
            mapped = {"text": mapped["text"]}
        return mapped

    def check(self, rows: Dataset, name: str) -> None:
        super().check(rows, name)
        roles = self.roles(rows)
        if ("prompt" in roles) != ("completion" in roles) or not ({"text", "prompt"} & set(roles)):
            raise UserError(
                f"{name}: task causal_lm needs a column for 'text', or one each for 'prompt' and 'completion' "
                f"(columns: {', '.join(rows.column_names)})"
            )
        generated = [metric for metric in self.metrics if metric != "perplexity"]
        if generated and (len(generated) < len(self.metrics) or "completion" not in roles):
            raise UserError(
                f"{name}: {' and '.join(generated)} compare generated text with a completion: map 'prompt' and 'completion', "
                "and leave out perplexity, which generates nothing"
            )

    def _pairs(self, rows: Dataset, tokenizer: Any) -> list[tuple[list[int], list[int]]]:
        """(prompt ids, completion ids with end-of-sequence) of every row; plain text has an empty prompt."""
        end = [tokenizer.eos_token_id] if tokenizer.eos_token_id is not None else []
        if "completion" not in self.roles(rows):
            return [([], ids + end) for ids in tokenizer([str(t) for t in self.values(rows, "text")])["input_ids"]]
        prompts = tokenizer([str(t) for t in self.values(rows, "prompt")])["input_ids"]
        completions = tokenizer([str(t) for t in self.values(rows, "completion")], add_special_tokens=False)[
            "input_ids"
        ]
        return [(p, c + end) for p, c in zip(prompts, completions, strict=True)]

    def _fit(self, prompt: list[int], completion: list[int]) -> tuple[list[int], list[int]]:
        """Cut to max_length: the start of the prompt goes first, because the completion is what is learnt."""
        completion = completion[: self.spec.max_length]
        room = self.spec.max_length - len(completion)
        return prompt[len(prompt) - min(room, len(prompt)) :], completion

    def encode(self, rows: Dataset, processor: Any) -> Dataset:
        features: dict[str, list[list[int]]] = {"input_ids": [], "attention_mask": [], "labels": []}
        for pair in self._pairs(rows, processor):
            prompt, completion = self._fit(*pair)
            features["input_ids"].append(prompt + completion)
            features["attention_mask"].append([1] * len(prompt + completion))
            features["labels"].append((prompt if self.spec.loss_on_prompt else [IGNORED] * len(prompt)) + completion)
        return Dataset.from_dict(features)

    def collator(self, processor: Any) -> Callable[[list[dict[str, Any]]], dict[str, torch.Tensor]]:
        return DataCollatorForSeq2Seq(processor, label_pad_token_id=IGNORED)

    def predict(self, model: nn.Module, rows: Dataset, processor: Any, batch_size: int) -> Predictions:
        model.eval()
        if "perplexity" in self.metrics:
            return self._log_likelihoods(model, rows, processor, batch_size)
        whole = [prompt for prompt, _ in self._pairs(rows, processor)]
        prompts = [self._fit(prompt, [])[0] for prompt in whole]
        texts = generate(model, processor, prompts, self.spec.max_new_tokens, batch_size, left_padding=True)
        references = [str(value).strip() for value in self.values(rows, "completion")]
        cut = sum(len(prompt) >= self.spec.max_length for prompt in whole)
        return Predictions([text.strip() for text in texts], references, {"rows": len(texts), "at_max_length": cut})

    @torch.inference_mode()
    def _log_likelihoods(self, model: nn.Module, rows: Dataset, processor: Any, batch_size: int) -> Predictions:
        """Per row: the negative log-likelihood (nats, summed) as prediction and the number of tokens as reference."""
        encoded, collate = self.encode(rows, processor), self.collator(processor)
        lengths = [len(ids) for ids in encoded["input_ids"]]
        losses, tokens = [0.0] * len(lengths), [0] * len(lengths)
        for chosen in batches_by_length(lengths, batch_size, "evaluating"):
            batch = collate([encoded[i] for i in chosen]).to(device_of(model))
            labels = batch.pop("labels")[:, 1:]
            with compute_context(model):
                logits = model(**batch).logits[:, :-1].float()
            per_token = F.cross_entropy(logits.transpose(1, 2), labels, ignore_index=IGNORED, reduction="none")
            for i, loss, count in zip(
                chosen, per_token.sum(1).tolist(), (labels != IGNORED).sum(1).tolist(), strict=True
            ):
                losses[i], tokens[i] = loss, count
        cut = sum(length >= self.spec.max_length for length in lengths)
        return Predictions(losses, tokens, {"rows": len(lengths), "tokens": sum(tokens), "at_max_length": cut})


class Seq2Seq(Task):
    """Roles source and target."""

    required = ("source", "target")
    auto_class = AutoModelForSeq2SeqLM
    default_metrics = possible_metrics = ("rouge", "exact_match")

    def encode(self, rows: Dataset, processor: Any) -> Dataset:
        sources = [str(t) for t in self.values(rows, "source")]
        targets = [str(t) for t in self.values(rows, "target")]
        features = dict(processor(sources, truncation=True, max_length=self.spec.max_length))
        encoded = processor(text_target=targets, truncation=True, max_length=self.spec.max_target_length)
        return Dataset.from_dict({**features, "labels": encoded["input_ids"]})

    def collator(self, processor: Any) -> Callable[[list[dict[str, Any]]], dict[str, torch.Tensor]]:
        return DataCollatorForSeq2Seq(processor, label_pad_token_id=IGNORED)

    def predict(self, model: nn.Module, rows: Dataset, processor: Any, batch_size: int) -> Predictions:
        model.eval()
        sources = [str(t) for t in self.values(rows, "source")]
        encoded = processor(sources, truncation=True, max_length=self.spec.max_length)["input_ids"]
        texts = generate(model, processor, encoded, self.spec.max_new_tokens, batch_size, left_padding=False)
        cut = sum(len(ids) >= self.spec.max_length for ids in encoded)
        references = [str(value).strip() for value in self.values(rows, "target")]
        return Predictions([text.strip() for text in texts], references, {"rows": len(texts), "at_max_length": cut})


@torch.inference_mode()
def generate(
    model: nn.Module, tokenizer: Any, prompts: list[list[int]], max_new_tokens: int, batch_size: int, left_padding: bool
) -> list[str]:
    """Greedy continuations of `prompts` (token ids), without special tokens; decoders need `left_padding`."""
    outputs: list[str] = [""] * len(prompts)
    for chosen in batches_by_length([len(p) for p in prompts], batch_size, "generating"):
        width = max(len(prompts[i]) for i in chosen)
        pad = tokenizer.pad_token_id
        padded = [
            [pad] * (width - len(prompts[i])) + prompts[i]
            if left_padding
            else prompts[i] + [pad] * (width - len(prompts[i]))
            for i in chosen
        ]
        lengths = [len(prompts[i]) for i in chosen]
        mask = [[0] * (width - n) + [1] * n if left_padding else [1] * n + [0] * (width - n) for n in lengths]
        # weights in shares have to be gathered by all processes together, as long as one of them writes
        together = any(hasattr(parameter, "whole") for parameter in model.parameters())
        with compute_context(model):
            tokens = model.generate(
                input_ids=torch.tensor(padded, device=device_of(model)),
                attention_mask=torch.tensor(mask, device=device_of(model)),
                max_new_tokens=max_new_tokens,
                do_sample=False,
                num_beams=1,
                temperature=None,
                top_p=None,
                top_k=None,
                pad_token_id=pad,
                **({"synced_gpus": True} if together else {}),
            )
        new = tokens[:, width:] if left_padding else tokens
        for i, text in zip(chosen, tokenizer.batch_decode(new, skip_special_tokens=True), strict=True):
            outputs[i] = text
    return outputs

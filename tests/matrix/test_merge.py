"""Merging: exact where declared, approximate only when asked for and with its gap, impossible refused; always undone."""

from __future__ import annotations

import contextlib
from collections.abc import Callable

import pytest
import torch
from cases import CASES, MAIN, Case
from models import adapted_layers, logits, relative, tensors_of, train_a_little
from refusals import MIXED_MERGED, WEIGHT_WITH_ANOTHER, merge_refusal

from curvelora.merging import Merge, allow_approximate, merged_form
from curvelora.output_change import merge_gap


def those_that(merge: Callable[[Merge], bool], cases: list[Case]) -> pytest.MarkDecorator:
    """Parametrise over the cases whose declared merge property fits."""
    return pytest.mark.parametrize("case", [c for c in cases if merge(c.entry.merge(c.config()))], ids=str)


mergeable, refusing = (lambda kind: kind is not Merge.IMPOSSIBLE), (lambda kind: kind is not Merge.EXACT)
EXACT = 1e-5  # relative, fp32
LINEAR_RANLORA = {"r": 3, "activation": "identity"}
# A 4-bit sum is rounded again: measured 0.11 on the tiny model, 1.3 where the weight were dequantised wrongly.
QUANTISED = 0.3


def weights(model) -> dict[str, torch.Tensor]:
    """Everything that the adapter does not own."""
    return {n: p.detach().clone() for n, p in model.named_parameters() if ".default" not in n}


def unchanged(model, before: dict[str, torch.Tensor]) -> bool:
    return all(torch.equal(p, before[n]) for n, p in weights(model).items())


@pytest.mark.cell("merging", "what the method cannot do is refused before a weight is touched")
@those_that(refusing, CASES)
def test_refusal(case, adapted, refused):
    refusal = merge_refusal(case)
    model = adapted(case)
    before = weights(model)
    for merge in (model.merge_adapter, model.merge_and_unload):
        with refused(refusal):
            merge()
        assert unchanged(model, before)


@pytest.mark.cell(
    "merging", "merge keeps the function (exact: 1e-5; approximate: the gap), unmerge brings the weights back"
)
@those_that(mergeable, CASES)
def test_merge_and_unmerge(case, adapted, ids, measure):
    kind = case.entry.merge(case.config())
    model = adapted(case)
    before, stored = logits(model, ids), weights(model)
    gap = merge_gap(model, [{"input_ids": ids}]).relative if case.entry.provided_by == "curvelora" else 0.0
    with allow_approximate() if kind is Merge.APPROXIMATE else contextlib.nullcontext():
        model.merge_adapter()
    changed = [name for name, p in weights(model).items() if not torch.equal(p, stored[name])]
    assert len(changed) == 4  # it is in the weights now
    difference = relative(logits(model, ids), before)
    measure("change of the logits by merging", difference)
    if kind is Merge.APPROXIMATE:
        assert gap > 1e-3 and difference == pytest.approx(gap, rel=1e-3)  # what merged_form says beforehand
    else:
        assert gap < EXACT and difference < (QUANTISED if case.entry.required_quantization else EXACT)
    model.unmerge_adapter()
    if case.entry.provided_by == "curvelora":
        assert unchanged(model, stored) and torch.equal(logits(model, ids), before)
    else:  # PEFT subtracts what it added, and a 4-bit weight is rounded once more
        assert relative(logits(model, ids), before) < (QUANTISED if case.entry.required_quantization else EXACT)


@pytest.mark.cell("merging", "merge and unload leaves a plain model")
@those_that(mergeable, MAIN)
def test_merge_and_unload(case, adapted, base, ids):
    kind = case.entry.merge(case.config())
    model = adapted(case)
    before = logits(model, ids)
    with allow_approximate() if kind is Merge.APPROXIMATE else contextlib.nullcontext():
        plain = model.merge_and_unload()
    assert type(plain) is type(base(case)) and set(plain.state_dict()) == set(base(case).state_dict())
    if kind is Merge.EXACT and not case.entry.required_quantization:
        assert relative(logits(plain, ids), before) < EXACT


@pytest.mark.cell("merging", "an unloaded model is the base again, bit for bit")
@those_that(lambda kind: True, MAIN)
def test_unload(case, adapted, base, ids):
    assert torch.equal(logits(adapted(case).unload(), ids), logits(base(case), ids))


# the main cases that merge, and a RanLoRA that does
MERGING = [*(c for c in MAIN if c.entry.merge(c.config()) is not Merge.IMPOSSIBLE), Case("ranlora", LINEAR_RANLORA)]
merging = pytest.mark.parametrize("case", [c for c in MERGING if c.has("second")], ids=str)


@pytest.mark.cell("merging", "two adapters: one merged by its name, both together, unmerged together")
@merging
def test_by_name(case, two, ids):
    stored, bound = weights(two), QUANTISED if case.entry.required_quantization else EXACT
    for names in (["second"], ["default", "second"]):
        two.base_model.set_adapter(names)
        with merged_form(two) if case.entry.merge(case.config()) is Merge.APPROXIMATE else contextlib.nullcontext():
            wanted = logits(two, ids)
        with allow_approximate():
            two.merge_adapter(adapter_names=names)
        assert relative(logits(two, ids), wanted) < bound
        two.unmerge_adapter()
        if case.entry.provided_by == "curvelora":
            assert unchanged(two, stored)


@pytest.mark.cell(
    "merging", "two adapters of which one cannot: its own name counts, and a refusal leaves every weight as it was"
)
@pytest.mark.parametrize(
    ("case", "exact"),
    [
        (c, {"ranlora": LINEAR_RANLORA, "aurora": {"r": 2, "mode": "static"}}[c.method])
        for c in MAIN
        if merge_refusal(c)
    ],
    ids=str,
)
def test_one_of_two(case, exact, adapted, ids, refused):
    model = adapted(case)
    model.add_adapter("exact", Case(case.method, exact).config())
    model = train_a_little(model, seed=5, adapter="exact").eval()
    before = weights(model)
    for merge in (model.merge_adapter, model.merge_and_unload):
        with refused(merge_refusal(case)):
            merge(adapter_names=["exact", "default"])
        assert unchanged(model, before)
    model.set_adapter("exact")
    wanted = logits(model, ids)
    model.set_adapter("default")
    model.merge_adapter(adapter_names=["exact"])
    assert relative(logits(model, ids), wanted) < EXACT


@pytest.mark.cell("merging", "a weight that would not be finite, with `safe_merge`: refused, and no other one merged")
@pytest.mark.parametrize("case", [c for c in MERGING if c.entry.provided_by == "curvelora"], ids=str)
def test_safe_merge(case, adapted, ids):
    """PEFT's LoRA leaves the layers before it merged."""
    model = adapted(case)
    before = weights(model)
    last = list(adapted_layers(model).values())[-1]
    tensors_of(last)["B"].data[0, 0] = torch.inf
    with allow_approximate(), pytest.raises(ValueError, match="gives NaN or infinite weights"):
        model.merge_adapter(safe_merge=True)
    assert unchanged(model, before) and not any(layer.merged for layer in adapted_layers(model).values())


@pytest.mark.cell("merging", "a merged adapter: no rows with adapters of their own, no factors of the changed weight")
@merging
def test_while_merged(case, two, ids, refused):
    with allow_approximate():
        two.merge_adapter()
    with refused(MIXED_MERGED) if case.has("refused rows") else contextlib.nullcontext():
        two.eval()(ids, adapter_names=["default", "second"])
    if case.method == "ranlora":
        before = logits(two, ids)
        with refused(WEIGHT_WITH_ANOTHER):
            two.add_adapter("third", case.config())
        assert torch.equal(logits(two, ids), before) and "third" not in two.peft_config
    two.unmerge_adapter()
    two.add_adapter("third", case.config())


@pytest.mark.cell("merging", "merged, cast to bf16, unmerged: the base's weights in bf16")
@pytest.mark.parametrize("case", [c for c in MERGING if not c.entry.required_quantization], ids=str)
def test_cast_while_merged(case, adapted, base, ids):
    model = adapted(case)
    with allow_approximate():
        model.merge_adapter()
    model.to(torch.bfloat16).unmerge_adapter()
    assert logits(model, ids).dtype == torch.bfloat16  # it runs
    wanted = base(case).to(torch.bfloat16).state_dict()
    found = {name: p for name, p in weights(model).items() if "base_layer" in name}
    assert len(found) == 4
    for name, weight in found.items():
        stored = wanted[name.replace("base_model.model.", "").replace(".base_layer", "")]
        if case.entry.provided_by == "curvelora":
            assert torch.equal(weight, stored)
        else:  # PEFT subtracts what it added
            assert relative(weight, stored) < 0.02

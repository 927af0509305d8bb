"""`--merge-check`: the score of an adapter beside the score of its base with the adapter added to the weights."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from peft.mapping import PEFT_TYPE_TO_TUNER_MAPPING

from curvelora.merging import Merge
from curvelora_eval.evaluation.arms import Arm
from curvelora_eval.merge import method_of, title_of
from curvelora_eval.models import load_config, storage_of
from curvelora_eval.spec import ModelSpec, TaskSpec
from curvelora_eval.tasks import make_task

ANSWERS = ("prediction", "prediction_norm", "text")


def why_not_exact(arm: Arm, model: ModelSpec, spec: TaskSpec) -> str | None:
    """Why merging this adapter into this base gives another function, in a sentence; None where it is exact."""
    storage = storage_of(model, load_config(model, make_task(spec)))
    if storage != "none":
        return (
            f"the base is stored as {storage}, and a merged weight would be rounded to that again: merge into the unquantised "
            "base with `curvelora merge`, and evaluate that"
        )
    if not hasattr(PEFT_TYPE_TO_TUNER_MAPPING.get(arm.config.peft_type), "merge_and_unload"):
        return f"{arm.config.peft_type.value} changes no weight of the base"
    method = method_of(arm.config, arm.stored[0].quantization if arm.stored else "none")
    if method is None:
        return f"{arm.config.peft_type.value} is PEFT's own, and whether it merges exactly is not known here"
    kind = method.merge(arm.config)
    if kind in (Merge.EXACT, Merge.WHEN_ANNEALED):  # one that is not annealed yet says so when it is merged
        return None
    return f"in {title_of(method)} as set here {getattr(arm.config, 'why_not_exact', '') or kind.meaning}"


def merged_record(
    metrics: dict[str, Any], records: Sequence[dict[str, Any]], adapter: Sequence[dict[str, Any]]
) -> dict[str, Any]:
    """`merged` of evaluation.json: the merged model's metrics, and how many answers are not the adapter's."""
    differ = sum(any(a.get(name) != b.get(name) for name in ANSWERS) for a, b in zip(records, adapter, strict=True))
    return {"exact": True, "metrics": metrics, "rows": len(records), "differ": differ}

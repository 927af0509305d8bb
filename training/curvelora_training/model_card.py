"""The model card beside an adapter: what it is, how it was trained, how to load it, and what to know."""

from __future__ import annotations

from typing import Any

from curvelora_eval.eval_command import describe_interval
from curvelora_eval.wording import percent
from curvelora_training.config import Recipe


def model_card(recipe: Recipe, result: dict[str, Any], evaluation: dict[str, Any] | None) -> str:
    """Markdown with the metadata block that the hub reads."""
    method, settings = recipe.method, recipe.adapter_options()
    lines = [
        "---",
        f"base_model: {recipe.model.path}",
        "library_name: peft",
        f"tags: [{method.name}, curvelora]",
        "---",
        "",
        f"# {result['name']}",
        "",
        f"{method.title}; {method.paper}. Trained on `{recipe.data.train.path}` for {recipe.task.kind}.",
        "",
        f"    {method.formula}",
        "",
        "| | |",
        "|---|---|",
        f"| base | {recipe.model.path}, {recipe.model.dtype}, quantisation {result['quantization']} |",
        *(f"| {key} | {_plain(value)} |" for key, value in settings.items() if value is not None),
        f"| trainable parameters | {result['trainable_parameters']:,} |",
        f"| steps, seed | {result['steps']}, {recipe.seed} |",
    ]
    if evaluation is not None:
        rows = evaluation["counts"]["rows"]
        lines += [
            f"| {name} | {describe_interval(value)} on {rows} rows |" for name, value in evaluation["metrics"].items()
        ]
    if result["resolvability"] is not None:
        share = result["resolvability"]
        lines.append(
            f"| resolvability | forward {percent(share['forward'])} in {share['dtype']}, "
            f"derivative {percent(share['derivative'])} in {share['derivative_dtype']}, std(BA) {share['std_u']:.2e} |"
        )
    lines += effects(recipe, result, evaluation)
    lines += ["", "## Load it", "", "```python", "import curvelora", "from curvelora.loading import load_adapter", ""]
    lines += ["model = load_adapter(base_model, this_folder)", "```", "", "## Caveats", ""]
    lines += [f"- {caveat}" for caveat in method.caveats] or ["- none known"]
    return "\n".join(lines) + "\n"


def effects(recipe: Recipe, result: dict[str, Any], evaluation: dict[str, Any] | None) -> list[str]:
    """Table rows on the start, on where splines were asked, and on merging."""
    merge = recipe.method.merge(recipe.method.build_config(**recipe.adapter_options()))
    lines = [f"| merging | {merge.value}: {merge.meaning} |"]
    if (shift := result["start_shift"]) and (shift["relative"] or 0) > 0:
        lines.append(f"| before training | outputs {percent(shift['relative'])} away from the base model's |")
    if gap := result["merge_gap"]:
        merged = (evaluation or {}).get("merged_form", {}).get("metrics", {})
        scores = "".join(
            f", {name} {value['value']:.4f}" for name, value in merged.items() if value["value"] is not None
        )
        moved = "not finite" if gap["relative"] is None else f"{percent(gap['relative'])} away from the adapter's"
        lines.append(f"| merged form | outputs {moved}{scores} |")
    if spline := result["spline"]:
        lines.append(
            f"| spline inputs at the end | {percent(spline['beyond_grid'])} beyond the grid, "
            f"{percent(spline['beyond_support'])} beyond its support |"
        )
    return lines


def _plain(value: Any) -> str:
    return ", ".join(map(str, value)) if isinstance(value, list | tuple | set) else str(value)

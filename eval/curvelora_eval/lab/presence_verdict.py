"""Is the nonlinearity there? Two numbers decide, each against what the dtype does anyway.

    forward         the share of entries that enter the product and differ from the linear map's (resolvability)
    output ratio    ||(f(BA) - BA) x|| / ||BA x||, exact: what f adds to what the adapter adds to a layer's output

Rounding BA to a dtype moves it by about 0.213 eps of its norm (eps = 2^-7 in bf16: 1.7e-3; computed on products of Gaussian
factors). An f that adds less than that and changes under 1 % of the entries cannot be told from the identity; one that
adds more is present. Between the two it is at the edge: some entries move, by less than rounding moves the others.
"""

from __future__ import annotations

from collections.abc import Iterator

from curvelora_eval.lab.canvas import setting_text, short
from curvelora_eval.lab.folder import Arm, Lab, dig
from curvelora_eval.report.load import number
from curvelora_eval.report.verdict import ABSENT
from curvelora_eval.wording import percent

EPS = {"bfloat16": 2.0**-7, "float16": 2.0**-10, "float32": 2.0**-23}
ROUNDING = 0.213  # times eps: relative rms of rounding, see the module
CLOSE = 0.95  # a correlation above this is as good as exact
SHORT = {"bfloat16": "bf16", "float16": "fp16", "float32": "fp32"}


def rounding(dtype: str | None) -> float | None:
    """The relative rms error of rounding to `dtype`, dimensionless; None for a dtype that is not known."""
    return ROUNDING * EPS[dtype] if dtype in EPS else None


def presence_class(lab: Lab, arm: Arm) -> str | None:
    """ "linear", "absent", "edge" or "present" by the means over seeds; None where it was not measured."""
    forward = lab.of_arm(arm, "presence", "forward")
    added = lab.of_arm(arm, "presence", "output_ratio", "exact")
    if forward is None:
        return None
    if added == 0 or (added is None and forward == 0 and not lab.of_arm(arm, "presence", "derivative")):
        return "linear"
    noise = rounding(product_dtype(lab, arm))
    below = added is None or noise is None or added < noise
    if forward < ABSENT and below:
        return "absent"
    return "edge" if below and added is not None and noise is not None else "present"


def product_dtype(lab: Lab, arm: Arm) -> str | None:
    """The dtype of the forward product: the presence record's, or the arm's."""
    for run in lab.runs(arm).values():
        if isinstance(dig(run, "presence", "dtype"), str):
            return run["presence"]["dtype"]
    return arm.record.get("dtype")


def presence_sentences(lab: Lab, sweep: dict | None) -> Iterator[str]:
    """The sentences on presence, in the order of the arms; empty where nothing was measured."""
    for arm in lab.arms:
        kind = presence_class(lab, arm)
        if kind is not None:
            yield from _weight_space(lab, arm, kind)
        share = lab.of_arm(arm, "presence", "nonlinear_share")
        if share is not None:
            yield (
                f"Of what {arm.label} adds to a layer's output, {percent(share)} (in norm) is no affine map of its input."
            )
    yield from _threshold(sweep)


def _weight_space(lab: Lab, arm: Arm, kind: str) -> Iterator[str]:
    dtype = product_dtype(lab, arm)
    name = SHORT.get(str(dtype), str(dtype))
    forward = lab.of_arm(arm, "presence", "forward") or 0.0
    added = lab.of_arm(arm, "presence", "output_ratio", "exact")
    noise = rounding(dtype)
    entries = f"{percent(forward)} of the entries that enter the product differ from LoRA's"
    against = ""
    if added and noise:
        factor = noise / added if added < noise else added / noise
        side = "less" if added < noise else "more"
        times = f"{_round(factor)} times {side}" if factor >= 1.05 else "as much"
        against = f", {times} {'than' if factor >= 1.05 else 'as'} rounding to {name} ({short(noise, 2)})"
    output = f"what f adds to a layer's output is {short(added, 2)} of the adapter's" if added is not None else ""
    if kind == "linear":
        return
    if kind == "absent":
        facts = f"{entries}, and {output}{against}" if output else entries
        yield f"At this setting {arm.label} is numerically the identity in {name}: {facts}.{_slope(lab, arm, ' What remains')}"
    elif kind == "edge":
        yield f"{arm.label} is at the edge of {name}: {entries}, but {output}{against}.{_slope(lab, arm, '')}"
    else:
        facts = f"{entries}, and {output}{against}" if output else entries
        yield f"In {arm.label} the nonlinearity is present in {name}: {facts}.{_slope(lab, arm, '')}"


def _slope(lab: Lab, arm: Arm, opening: str) -> str:
    """What the derivative does, as a sentence that follows another one, or nothing."""
    share, rms = lab.of_arm(arm, "presence", "derivative"), lab.of_arm(arm, "presence", "slope_rms")
    if share is None:
        return ""
    if share == 0:
        return " Nor does the derivative differ from the linear map's in any entry." if opening else ""
    size = f" by {short(rms, 2)} rms" if rms is not None else ""
    subject = f"{opening} is the derivative, which" if opening else " Its derivative"
    naive = lab.of_arm(arm, "presence", "slope_correlation", "naive_bf16")
    blurred = f"; a plain bf16 evaluation would have it right only to a correlation of {short(naive, 2)}"
    ending = blurred if naive is not None and naive < CLOSE and product_dtype(lab, arm) == "bfloat16" else ""
    return f"{subject} differs from the linear map's in {percent(share)} of the entries{size}{ending}."


def _threshold(sweep: dict | None) -> Iterator[str]:
    """The smallest amplitude of a sweep at which f leaves the forward pass' rounding in a per cent of the entries."""
    shares: dict[float, list[float]] = {}
    for cell in (sweep or {}).get("cells", []):
        amplitude = number(dig(cell, "values", "amplitude"))
        share = number(cell.get("resolvability_forward"))
        if amplitude is not None and share is not None:
            shares.setdefault(amplitude, []).append(share)
    if not shares:
        return
    seen = [amplitude for amplitude, found in sorted(shares.items()) if max(found) >= ABSENT]
    if not seen:
        yield f"In the sweep no amplitude up to {setting_text(max(shares))} changes 1 % of the entries in the forward pass."
    else:
        below = [amplitude for amplitude in shares if amplitude < seen[0]]
        gap = f" ({setting_text(max(below))} does not)" if below else ""
        yield f"In the sweep f changes 1 % of the entries in the forward pass from amplitude {setting_text(seen[0])} on{gap}."


def _round(factor: float) -> str:
    """Two significant digits: a factor of this kind is no more certain."""
    return f"{float(f'{factor:.2g}'):,.0f}" if factor >= 10 else f"{factor:.2g}"

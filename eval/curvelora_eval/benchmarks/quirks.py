"""Known defects of the papers' own scripts that `--legacy-quirks` brings back; none is on by default."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

from curvelora.errors import UserError, nearest


@dataclass(frozen=True)
class Quirk:
    """One defect of an original script."""

    name: str
    what: str
    """What the original does."""
    where: str
    """Script and place."""
    effect: str
    """What it does to scores."""


HUNDREDFOLD = "metamath-hundredfold"

_ALL = (
    Quirk(
        "adapter-dropout",
        "the adapters' dropout stays live: the model is never put into eval mode on a GPU",
        "LLM-Adapters commonsense_evaluate.py, load_model (its evaluate.py calls .eval() in one version at least)",
        "scores are drawn anew in every run and lie a little lower",
    ),
    Quirk(
        "special-tokens",
        "special tokens stay in the text out of which the answer is read, also where the protocol leaves them out",
        "LLM-Adapters evaluate.py: tokenizer.decode without skip_special_tokens",
        "reserved tokens with digits in their name count as numbers",
    ),
    Quirk(
        "checkpoint-sampling",
        "sampling fields of the checkpoint's generation config are used, because do_sample is not set",
        "LLM-Adapters: GenerationConfig(temperature=0.1, top_p=0.75, top_k=40, num_beams=4) without do_sample",
        "none where the checkpoint does not sample; otherwise scores are random, and depend on the transformers version",
    ),
    Quirk(
        "pad-id-0",
        "batches are padded with token 0 whatever it is",
        "LLM-Adapters commonsense_evaluate.py: tokenizer.pad_token_id = 0",
        "none where padding is masked; 0 is a real token (!) in LLaMA 3",
    ),
    Quirk(
        "no-cache",
        "keys and values are computed again for every new token",
        "LLM-Adapters evaluate.py: use_cache=False, not in every version",
        "slow, the same text up to rounding",
    ),
    Quirk(
        HUNDREDFOLD,
        "an answer a hundred times too large or too small counts as right; only for protocol metamath",
        "MiLoRA gsm8k_inference.py: the comparison of the extracted number with the right one",
        "scores are equal or higher; the prediction in such a row is the right number, and the text what was said",
    ),
)
QUIRKS: dict[str, Quirk] = {quirk.name: quirk for quirk in _ALL}


def choose(names: Iterable[str]) -> tuple[Quirk, ...]:
    """The quirks called `names`, in their own order; `all` means every one.

    Raises:
        UserError: no quirk is called that.
    """
    wanted = set(names)
    if unknown := sorted(wanted - set(QUIRKS) - {"all"}):
        raise UserError(
            f"there is no quirk {unknown[0]!r}{nearest(unknown[0], QUIRKS)}: --legacy-quirks takes all, or some of "
            f"{', '.join(QUIRKS)}"
        )
    return tuple(quirk for quirk in QUIRKS.values() if "all" in wanted or quirk.name in wanted)

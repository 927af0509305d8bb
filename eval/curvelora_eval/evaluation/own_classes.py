"""Which class each output of a checkpoint's own head stands for, by the names in its config."""

from __future__ import annotations

import re
from collections.abc import Sequence

from curvelora.errors import UserError
from curvelora_eval.models import load_config
from curvelora_eval.spec import ModelSpec, TaskSpec
from curvelora_eval.tasks import make_task


def own_classes(spec: ModelSpec) -> tuple[str, ...]:
    """The names in the checkpoint's id2label, in the order of the head's outputs; LABEL_0, LABEL_1 where it has none.

    Raises:
        UserError: as `load_config`.
    """
    names = load_config(spec, make_task(TaskSpec(kind="causal_lm"))).id2label or {}
    return tuple(str(names[i]) for i in sorted(names))


def unnamed(classes: Sequence[str]) -> bool:
    """Whether the names only count the outputs (LABEL_0, LABEL_1, or 0, 1)."""
    return all(name.lower() in (f"label_{i}", str(i)) for i, name in enumerate(classes))


def in_own_order(classes: Sequence[str], labels: Sequence[str], task: str) -> list[str]:
    """The task's class names in the order of the head's outputs; in the task's own order where the head names none.

    Case, blanks, hyphens and underscores make no difference between names.

    Raises:
        UserError: the head has other classes.
    """
    if unnamed(classes) and len(classes) == len(labels):
        return list(labels)
    wanted = {_plain(name): name for name in labels}
    own = [_plain(name) for name in classes]
    if sorted(own) != sorted(wanted):
        raise UserError(
            f"the bare model's head has the classes {', '.join(classes)}, and {task} has {', '.join(labels)}: leave --baseline "
            "out, or, where they mean the same, give them the task's names in id2label of the checkpoint's config.json"
        )
    return [wanted[name] for name in own]


def _plain(name: str) -> str:
    return re.sub(r"[\s_-]+", "_", name.strip()).casefold()

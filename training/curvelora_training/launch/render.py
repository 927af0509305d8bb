"""From a `Job` to a script, by the templates of this package."""

from __future__ import annotations

import shlex
from pathlib import Path
from typing import Any

from jinja2 import Environment, FileSystemLoader, StrictUndefined

from curvelora_training.launch.job import Job

TEMPLATES = Path(__file__).parent / "templates"


def render(job: Job, template: str = "job.sbatch.j2", **more: Any) -> str:
    """The text of a script. In templates `| quote` writes a value as one word of the shell.

    Args:
        template: file name below templates/.
        more: further names for the template.

    Raises:
        UserError: the job has errors; all of them are in the message.
    """
    environment = Environment(
        loader=FileSystemLoader(TEMPLATES),
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
        keep_trailing_newline=True,
        comment_start_string="{%#",  # `{#` stands in ${#array[@]}
        comment_end_string="#%}",
        autoescape=False,  # shell, not HTML; values are quoted by the filter
    )
    environment.filters["quote"] = lambda value: shlex.quote(str(value))
    return environment.get_template(template).render(job=job.check(), **more)

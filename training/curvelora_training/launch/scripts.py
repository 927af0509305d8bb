"""The plain scripts below launch/, from the same templates as `curvelora launch`; a test holds them together.

    python -m curvelora_training.launch.scripts [FOLDER]      writes them again (default launch)

They are for users who would rather copy a script and change it by hand.
"""

from __future__ import annotations

import sys
from dataclasses import dataclass
from pathlib import Path

from curvelora_training.launch.job import Job
from curvelora_training.launch.render import render

OWN = "export PATH=$PWD/.venv/bin:$PATH # the environment of the clone; here also module load, conda activate and the like"
FOUR = ("loran", "qlora", "ranlora", "aurora")


@dataclass(frozen=True)
class Size:
    """A model on as many GPUs as serve it. Its script shares the recipe's rows a step out among the processes that it gets."""

    stem: str
    """Recipe without its arm."""
    title: str
    arms: tuple[str, ...]
    nodes: int
    gpus: int
    rows: int
    """A step's, of the recipe."""
    batch: int = 1
    """The recipe's, the most that a process takes at once."""
    time: str = "12:00:00"
    memory: str | None = None
    scored: bool = True
    """At the end of training, on one of its GPUs while the others wait."""
    notes: tuple[str, ...] = ()


SIZES = (
    Size(
        *("llama32_1b_samsum", "Llama-3.2-1B on SAMSum, base in NF4: one node of 4 GPUs.", FOUR, 1, 4, 16, 4),
        time="4:00:00",
    ),
    Size("llama2_7b_samsum", "Llama-2-7B on SAMSum, base in NF4: one node of 8 GPUs.", FOUR, 1, 8, 16, 4),
    Size(
        *("llama3_8b_commonsense", "Llama-3-8B on commonsense reasoning: one node of 8 GPUs."),
        *(("aurora", "ranlora", "lora", "loran", "qlora"), 1, 8, 16, 4),
        time="24:00:00",
    ),
    Size("llama2_13b_samsum", "Llama-2-13B on SAMSum, base in NF4: 2 nodes of 8 GPUs.", FOUR, 2, 8, 16, 4),
    *(
        Size(
            *(stem, f"{title}, base in NF4: 8 nodes of 8 GPUs of 80 GB.", arms, 8, 8, 64),
            time="24:00:00",
            memory="0",
            scored=False,
            notes=(
                "The base takes 37 GB of each GPU, and nodes exchange the adapter's gradients only. On GPUs of 40 GB add",
                "training.deepspeed=ds_configs/zero3.json: each GPU holds a share of the base, which goes through the network.",
                "Each of the 64 processes reads the checkpoint (140 GB) and quantises it:",
                "copy it to each node's own disk (model.path=/local/...), or have 140 GB of memory free for its cache.",
            ),
        )
        for stem, title, arms in (
            ("llama2_70b_samsum", "Llama-2-70B on SAMSum", FOUR),
            ("llama3_70b_commonsense", "Llama-3-70B on commonsense reasoning", ("aurora", "ranlora", "loran", "qlora")),
        )
    ),
)
ONE_GPU = {"recipe": "", "output": "runs", "nodes": 1, "gpus_per_node": 1, "cpus_per_task": 8, "setup": (OWN,)}


def scripts() -> dict[str, str]:
    """Path below launch/ -> text."""
    found = {f"slurm/{size.stem}.sbatch": sized(size) for size in SIZES}
    found["slurm/compare.sbatch"] = render(
        job_of(
            "compare", nodes=1, gpus_per_node=8, cpus_per_task=64, time="24:00:00", module="curvelora_training.bench"
        ),
        "compare.sbatch.j2",
        stem="llama2_7b_samsum_qlora",
        seeds=3,
        steps=300,
    )
    found["slurm/sweep.sbatch"] = render(
        job_of("sweep", array="0-7", time="12:00:00", log="slurm-%x-%A_%a.out"),
        "sweep.sbatch.j2",
        stem="llama32_1b_samsum_loran",
        shares=8,
    )
    found["slurm/evaluate.sbatch"] = render(
        job_of("evaluate", time="4:00:00"), "evaluate.sbatch.j2", by_hand=True, stem="llama2_7b_samsum"
    )
    for place in ("local", "multinode"):
        found[f"{place}/finetune.sh"] = render(job_of("finetune"), f"{place}.sh.j2", any_launcher=True)
    return found


def job_of(name: str, **fields: object) -> Job:
    """A job whose script says by its own variables what the run is."""
    return Job(name=name, **(ONE_GPU | {"log": "slurm-%x-%j.out"} | fields))


def sized(size: Size) -> str:
    """The script of one size."""
    job = job_of(
        size.stem,
        nodes=size.nodes,
        gpus_per_node=size.gpus,
        cpus_per_task=8 * size.gpus,
        memory=size.memory,
        time=size.time,
    )
    return render(job, "finetune.sbatch.j2", size=size)


def main(argv: list[str]) -> int:
    """Write every script."""
    folder = Path(argv[0] if argv else "launch")
    for name, text in scripts().items():
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text, encoding="utf-8")
        path.chmod(0o755)
        print(path)
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))

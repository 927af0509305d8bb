"""The engine of a job: a DeepSpeed file of ds_configs by its name, FSDP2 through Accelerate, or DistributedDataParallel.

DistributedDataParallel serves every adapter whose base fits on a GPU, 70B in NF4 too: its processes exchange the adapter's
gradients only, and the moments that ZeRO-2 would share are 1 GB there (131 million parameters, LoRAN at r = 64).
"""

from __future__ import annotations

from pathlib import Path

from curvelora.errors import UserError, nearest

FSDP2, PLAIN = "fsdp2", "ddp"
# of a clone, seen from the current folder and from this file
PLACES = (Path("ds_configs"), Path(__file__).resolve().parents[3] / "ds_configs")


def configurations() -> Path:
    """The folder ds_configs. Raises `UserError` where there is none."""
    for place in PLACES:
        if (place / "zero2.json").is_file():
            return place.resolve()
    raise UserError(
        f"the engines' files are not at {' or '.join(map(str, PLACES))}: run in a clone of the project, or name a file with "
        "training.deepspeed=FILE"
    )


def chosen_engine(engine: str | None, launcher: str) -> str | None:
    """`engine` as a job has it. The launcher `deepspeed` means ZeRO-2 where nothing else is said.

    Raises:
        UserError: no such engine, or one that the launcher has not.
    """
    if engine is None:
        return "zero2" if launcher == "deepspeed" else None
    if engine == PLAIN and launcher == "deepspeed":
        raise UserError("--launcher deepspeed always runs DeepSpeed: take --engine zero2, or another launcher for ddp")
    if engine == PLAIN:
        return None
    if engine == FSDP2:
        if launcher != "accelerate":
            raise UserError("--engine fsdp2 is asked for by an Accelerate configuration: add --launcher accelerate")
        return engine
    known = sorted(path.stem for path in configurations().glob("zero*.json"))
    if engine not in known:
        known += [FSDP2, PLAIN]
        raise UserError(f"--engine {engine!r} is none of {', '.join(known)}{nearest(engine, known)}")
    return engine


def deepspeed_file(engine: str | None) -> Path | None:
    """The DeepSpeed file of an engine, None where it needs none."""
    return None if engine in (None, FSDP2) else configurations() / f"{engine}.json"

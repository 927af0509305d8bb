"""Say how runs stand, from their folders alone: state, step, loss, checkpoint, speed, time left, attempts.

    curvelora status runs/mine
    curvelora status runs/* --watch 30
    curvelora status runs/mine --json

States: submitted, starting, training, evaluating, finished, requeued (SLURM will start it again), stopped (--resume continues),
failed, stalled. Nothing is asked of a scheduler and nothing is written, so that it works on any machine that sees the folder.
Exit code 2: a folder is no run.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from pathlib import Path
from typing import Any

from curvelora.errors import UserError

CLEAR = "\033[2J\033[H"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the options."""
    parser.add_argument("runs", nargs="+", type=Path, metavar="RUN", help="run folders (`output` in their recipes)")
    parser.add_argument("--json", action="store_true", help="print plain data")
    watch = "print again after so many seconds, until no run goes on any more"
    parser.add_argument("--watch", type=float, metavar="SECONDS", help=watch)


def run(args: argparse.Namespace) -> int:
    """Print the status. Raises `UserError` for folders that are no runs, after those that are."""
    if args.watch is not None and not args.watch > 0:
        raise UserError(f"--watch is {args.watch:g}: write a number of seconds above 0")
    from curvelora_training.status.judge import GOING, statuses

    try:
        while True:
            found, problems = statuses(args.runs)
            if args.watch is not None and sys.stdout.isatty() and not args.json:
                print(CLEAR, end="")
            if args.json:
                print(
                    json.dumps({"schema": 1, "kind": "status", "runs": found}, allow_nan=False, indent=2, default=str)
                )
            elif found:
                print("\n".join(detailed(found[0]) if len(args.runs) == 1 else table(found)), flush=True)
            if problems:
                raise UserError("; ".join(problems))
            if args.watch is None or not any(status["state"] in GOING for status in found):
                return 0
            sys.stdout.flush()
            time.sleep(args.watch)
    except KeyboardInterrupt:
        if args.watch is None:
            raise
        return 0  # that is how watching ends


def detailed(status: dict[str, Any]) -> list[str]:
    """One run, a line each topic."""
    from curvelora_training.status.judge import span

    why = f": {status['why']}" if status["why"] else ""
    lines = [f"{status['run']}: {status['state']}{why}"]

    def say(topic: str, text: str | None) -> None:
        if text:
            lines.append(f"  {topic:<11} {text}")

    epochs = f" of {status['epochs']:g}" if status["epochs"] is not None else ""
    epoch = f", epoch {status['epoch']:.2f}{epochs}" if status["epoch"] is not None else ""
    say("step", _step(status) and _step(status) + epoch)
    if status["loss"] is not None:
        scored = f", validation {status['eval_loss']:.4g}" if status["eval_loss"] is not None else ""
        age = f" ({span(status['log_age_seconds'])} ago)" if status["log_age_seconds"] is not None else ""
        say("loss", f"{status['loss']:.4g}{scored}{age}")
    if status["nonfinite_steps"]:
        say("not finite", f"{status['nonfinite_steps']} steps (metrics.jsonl has their rows)")
    if status["steps_per_second_recent"]:
        rows = status["rows_per_second_recent"]
        rate = f"{status['steps_per_second_recent']:.3g} steps/s" + (f", {rows:.3g} rows/s" if rows else "")
        say("speed", f"{rate} over the last lines; {status['steps_per_second']:.3g} steps/s over all")
    if status["seconds_left"] is not None:
        end = time.strftime("%Y-%m-%d %H:%M", time.localtime(time.time() + status["seconds_left"]))
        say("time left", f"{span(status['seconds_left'])} (until {end}, scoring not counted)")
    if (checkpoint := status["checkpoint"]) is not None:
        whole = (
            "whole by its manifest" if checkpoint["hashed"] else "of the sizes in its manifest (too large to read here)"
        )
        say("checkpoint", f"step {checkpoint['step']}, {span(checkpoint['age_seconds'])} old, {whole}")
    elif status["state"] not in ("finished", "submitted"):
        say("checkpoint", "none that is whole")
    for name, flaw in status["damaged_checkpoints"].items():
        say("damaged", f"{name}: {flaw}")
    if status["attempts"] is not None:
        last = status["last_attempt"]
        nodes = last.get("nodes")
        where = f" on {', '.join(map(str, nodes))}" if isinstance(nodes, list) else ""
        end = f" with code {last.get('code')}, {last.get('why')}" if last.get("event") == "end" else ""
        what = "ended" if last.get("event") == "end" else "began"
        say("attempts", f"{status['attempts']}; job {last.get('job')} {what} {last.get('time')}{where}{end}")
    if (holder := status["holder"]) is not None:
        job = f", SLURM job {holder['slurm_job']}" if holder.get("slurm_job") else ""
        heard = f"heard of {span(holder['renewed_seconds_ago'])} ago"
        say(
            "held by", f"process {holder.get('pid')} on {holder.get('host')}{job}, since {holder.get('since')}, {heard}"
        )
    for note in status["notes"]:
        say("note", note)
    return lines


def table(found: list[dict[str, Any]]) -> list[str]:
    """Several runs, a line each."""
    from curvelora_training.status.judge import span

    head = ("run", "state", "step", "epoch", "loss", "checkpoint", "steps/s", "left", "attempts")
    rows = [head]
    for status in found:
        checkpoint, rate = status["checkpoint"], status["steps_per_second_recent"]
        rows.append(
            (
                status["run"],
                status["state"],
                _step(status) or "-",
                f"{status['epoch']:.2f}" if status["epoch"] is not None else "-",
                f"{status['loss']:.4g}" if status["loss"] is not None else "-",
                f"{checkpoint['step']}, {span(checkpoint['age_seconds'])}" if checkpoint else "-",
                f"{rate:.3g}" if rate else "-",
                span(status["seconds_left"]) if status["seconds_left"] is not None else "-",
                str(status["attempts"]) if status["attempts"] is not None else "-",
            )
        )
    widths = [max(len(row[i]) for row in rows) for i in range(len(head))]
    lines = ["  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip() for row in rows]
    return lines + [f"{s['run']}: {s['why']}" for s in found if s["why"] and s["state"] in ("failed", "stalled")]


def _step(status: dict[str, Any]) -> str | None:
    if status["step"] is None:
        return None
    return f"{status['step']} of {status['total_steps']}" if status["total_steps"] is not None else str(status["step"])

"""Runs of a comparison or a sweep, one after another or packed: several worker processes on each device take what is left.

A run is claimed by a file that only one process can create, and is finished when its run.json is there. Whoever starts first
removes the claims that an interrupted comparison left. Packing pays where one run cannot fill a device, as with small models;
timing does not work then, which is why cost is measured before.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
import traceback
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from tqdm.auto import tqdm

from curvelora.cli import quiet_libraries
from curvelora.errors import UserError
from curvelora_training.bench.arms import Arm
from curvelora_training.bench.ground import Ground, build_ground
from curvelora_training.bench.processes import barrier, join, say
from curvelora_training.bench.settings import LabSettings
from curvelora_training.bench.single import make_run
from curvelora_training.distributed import rank, world_size

SETTINGS = "lab.json"
PARENT = "CURVELORA_LAB_PARENT"
CLAIM, FAILED, DONE = "claimed", "failed.txt", "run.json"
Share = tuple[int, int]  # (index, number of shares)
WHOLE: Share = (0, 1)


@dataclass(frozen=True)
class Job:
    """One run: an arm, a seed, and its folder below the comparison's."""

    arm: Arm
    seed: int
    folder: str


def jobs_of(settings: LabSettings) -> list[Job]:
    """Every arm with every seed, seed by seed, so that an interrupted comparison has whole rows."""
    return [Job(arm, seed, f"runs/{arm.slug}/seed-{seed}") for seed in settings.seeds for arm in settings.arms]


def shared(jobs: list[Job], share: Share) -> list[Job]:
    """Those of the jobs that are this share's: every N-th one, so that shares take about the same time."""
    index, count = share
    return jobs[index::count]


def check_jobs(workers: int) -> None:
    """Raise `UserError` where packed runs would meet a launcher's processes."""
    if workers > 1 and world_size() > 1:
        raise UserError("--jobs packs runs on the devices itself: start it without a launcher")


def run_all(
    settings: LabSettings, out: Path, workers: int, ground: Ground | None = None, share: Share = WHOLE
) -> list[str]:
    """Make every run that is not finished; returns the folders of those that failed.

    Args:
        workers: processes for each device; 1 runs in this process.
        ground: what is loaded already, for runs in this process.
        share: only these runs; others may be made by another share at the same time, and are not touched.
    """
    jobs = shared(jobs_of(settings), share)
    if rank() == 0:
        for job in jobs:
            for name in (CLAIM, FAILED):
                _mark(out, job, name).unlink(missing_ok=True)
    barrier()
    left = [job for job in jobs if not (out / job.folder / DONE).is_file()]
    if len(left) < len(jobs):
        say(f"{len(jobs) - len(left)} of {len(jobs)} runs are there already")
    if workers == 1 or not left:
        if left:
            work(ground or build_ground(settings, join()), left, out)
    else:
        _spawn(out, workers, left, share)
    barrier()  # only the first process writes run.json, when the others are through already
    return [job.folder for job in jobs if not (out / job.folder / DONE).is_file()]


def work(ground: Ground, jobs: Sequence[Job], out: Path) -> None:
    """Take jobs until none is left; one that fails is noted and the next one is taken."""
    for number, job in enumerate(jobs, start=1):
        if not _claim(out, job):
            continue
        title = f"[{number}/{len(jobs)}] {job.arm.key} seed {job.seed}"
        with tqdm(total=ground.settings.steps, desc=title, unit="step", disable=rank() != 0) as bar:

            def progress(step: int, loss: float, bar: tqdm = bar) -> None:
                _stop_if_left_alone()
                bar.set_postfix(loss=f"{loss:.4f}", refresh=False)
                bar.update(step - bar.n)

            try:
                make_run(ground, job.arm, job.seed, out / job.folder, progress)
            except torch.OutOfMemoryError as error:
                _fail(out, job, f"out of device memory: use fewer --jobs or a smaller --batch-size ({error})")
            except Exception as error:  # whatever it is, the other runs are worth having
                _fail(out, job, f"{type(error).__name__}: {error}\n{traceback.format_exc()}")
        if torch.cuda.is_available():
            torch.cuda.empty_cache()


def _stop_if_left_alone() -> None:
    """A worker whose parent was killed must not write into folders that another comparison takes over."""
    parent = os.environ.get(PARENT)
    if parent and int(parent) != os.getppid():
        raise SystemExit("the comparison that started this worker is gone")


def _fail(out: Path, job: Job, why: str) -> None:
    if torch.distributed.is_initialized():
        raise UserError(f"run {job.folder} failed: {why.splitlines()[0]}")
    print(f"\nrun {job.folder} failed: {why.splitlines()[0]}", file=sys.stderr, flush=True)
    _mark(out, job, FAILED).write_text(why, encoding="utf-8")


def _mark(out: Path, job: Job, name: str) -> Path:
    return out / f"{job.folder}.{name}"


def _claim(out: Path, job: Job) -> bool:
    """Whether this process may make the run; the processes of one data-parallel run make it together."""
    if torch.distributed.is_initialized():
        return True
    path = _mark(out, job, CLAIM)
    path.parent.mkdir(parents=True, exist_ok=True)
    try:
        with path.open("x", encoding="utf-8") as stream:
            stream.write(str(os.getpid()))
    except FileExistsError:
        return False
    return True


def _spawn(out: Path, workers: int, jobs: list[Job], share: Share) -> None:
    """Start the workers, wait, and say what is finished."""
    devices = max(1, torch.cuda.device_count())
    logs = out / "workers"
    logs.mkdir(exist_ok=True)
    processes = []
    for number in range(min(workers * devices, len(jobs))):
        environment = dict(os.environ)
        threads = max(1, (os.cpu_count() or 1) // (workers * devices))
        environment |= {"OMP_NUM_THREADS": str(threads), PARENT: str(os.getpid())}
        if torch.cuda.is_available():
            environment["CUDA_VISIBLE_DEVICES"] = _visible(number % devices)
        command = [sys.executable, "-m", "curvelora_training.bench.pool", str(out), *map(str, share)]
        with _log(logs, number, share).open("w", encoding="utf-8") as log:
            processes.append(subprocess.Popen(command, env=environment, stdout=log, stderr=subprocess.STDOUT))
    say(f"{len(jobs)} runs in {len(processes)} processes on {devices} device(s); logs in {logs}")
    seen: set[str] = set()
    try:
        while True:
            running = any(p.poll() is None for p in processes)
            for job in jobs:
                path = out / job.folder / DONE
                if job.folder not in seen and path.is_file():
                    seen.add(job.folder)
                    record = json.loads(path.read_text(encoding="utf-8"))
                    loss = record["heldout"]["loss"]
                    shown = "not finite" if loss is None else f"{loss:.4f}"
                    count, seconds = f"[{len(seen)}/{len(jobs)}]", f"{record['seconds']:.0f} s"
                    say(f"{count} {job.arm.key} seed {job.seed}: held-out loss {shown}, {seconds}")
            if not running:
                break
            time.sleep(0.5)
    finally:
        for process in processes:
            if process.poll() is None:
                process.terminate()
                process.wait()
    if broken := [number for number, p in enumerate(processes) if p.returncode]:
        say(f"{len(broken)} worker(s) ended with an error: see {', '.join(str(_log(logs, n, share)) for n in broken)}")


def _log(logs: Path, number: int, share: Share) -> Path:
    return logs / (f"{number}.log" if share == WHOLE else f"share-{share[0]}-{number}.log")


def _visible(number: int) -> str:
    """The n-th of the devices that this process may use, as its children must name it."""
    given = [d for d in os.environ.get("CUDA_VISIBLE_DEVICES", "").split(",") if d]
    return given[number] if given else str(number)


def main() -> None:
    """A worker: `python -m curvelora_training.bench.pool DIR SHARE SHARES`."""
    quiet_libraries()
    out, share = Path(sys.argv[1]), (int(sys.argv[2]), int(sys.argv[3]))
    settings = LabSettings.read(out / SETTINGS)
    torch.set_num_threads(int(os.environ.get("OMP_NUM_THREADS", "1")))
    ground = build_ground(settings, join())
    work(ground, [job for job in shared(jobs_of(settings), share) if not (out / job.folder / DONE).is_file()], out)


if __name__ == "__main__":
    main()

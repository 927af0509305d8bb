"""srun, scontrol and torchrun by stand-ins, so that a job script runs here without SLURM.

As on clusters that track processes by cgroups (proctrack/cgroup), a signal to a step reaches the one process that srun started on
each node and none of its children.
"""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from curvelora_training.launch.job import Job
from curvelora_training.launch.render import render

STAND_IN = Path(__file__).parents[1] / "slurm"
PYTHON = f"#!{sys.executable}\n"
COMMANDS = {
    "srun": PYTHON
    + """
import os, pathlib, signal, subprocess, sys
signal.signal(signal.SIGINT, signal.SIG_DFL)  # which a shell has what it starts with & ignore, and SLURM not
run = pathlib.Path(os.environ["RUN"])
(run / "srun").write_text(" ".join(sys.argv[1:]))
first = next(i for i, word in enumerate(sys.argv) if i and not word.startswith("--"))
tasks = [
    subprocess.Popen(sys.argv[first:], env=os.environ | {"SLURM_NODEID": str(node)}, start_new_session=True)
    for node in range(int(os.environ["NODES"]))
]
signal.signal(signal.SIGUSR1, lambda number, _: [task.send_signal(number) for task in tasks])
(run / "tasks.new").write_text(" ".join(str(task.pid) for task in tasks))
os.rename(run / "tasks.new", run / "tasks")
code = max(task.wait() % 256 for task in tasks)
signal.signal(signal.SIGUSR1, signal.SIG_IGN)  # Python would die of it on its way out
sys.exit(code)
""",
    "torchrun": PYTHON  # dies of SIGUSR1 and SIGTERM, and ends with 1 whatever its processes say
    + """
import os, pathlib, subprocess, sys
command = sys.argv[sys.argv.index("--no-python") + 1:]
count, node = int(os.environ["PROCESSES"]), int(os.environ["NODE_RANK"])
processes = [
    subprocess.Popen(command, env=os.environ | {"RANK": str(node * count + i)}, start_new_session=True)
    for i in range(count)
]
codes = [process.wait() for process in processes]
pathlib.Path(os.environ["RUN"], f"launcher-{node}").touch()
sys.exit(any(codes))
""",
    "python": """#!/bin/bash
[[ $2 == curvelora_training.preflight ]] || exec "$PYTHON" "$@"
echo "preflight of $RANK: $*"
echo "${REFUSES:-0}" >"$CURVELORA_EXIT_CODES/$RANK"
exit "${REFUSES:-0}"
""",
    "scontrol": """#!/bin/bash
case "$1 $2" in
    "show hostnames") for ((i = 0; i < SLURM_JOB_NUM_NODES; i++)); do echo localhost; done ;;
    *)
        echo "$1" >>"$RUN/asked"
        (($(grep -c "$1" "$RUN/asked") > ${BUSY:-0})) || { echo "Socket timed out" >&2; exit 1; }
        echo "JobState=RUNNING" ;;
esac
""",
    "sleep": "#!/bin/sh\nexec /bin/sleep 0.1\n",
}


class Attempt:
    """One attempt of a job, as the batch script of its first node makes it.

    Args:
        plan: of `stand_in.py`.
        restart: how often it was started again.
        variables: of its environment. BUSY: questions that scontrol leaves unanswered; REFUSES: exit code of preflight.
    """

    def __init__(self, folder: Path, plan: str, restart: int = 0, nodes: int = 1, **variables: str) -> None:
        self.run, commands = folder / "run", folder / "commands"
        for needed in (commands, self.run / "launch"):
            needed.mkdir(parents=True, exist_ok=True)
        for name, text in COMMANDS.items():
            (commands / name).write_text(text, encoding="utf-8")
            (commands / name).chmod(0o755)
        job = Job(name="test", recipe="r.yaml", output=str(self.run), nodes=nodes, gpus_per_node=0, module="stand_in",
                  processes_per_node=2)  # fmt: skip
        script = self.run / "launch/job.sbatch"
        script.write_text(render(job), encoding="utf-8")
        settings = {"PATH": f"{commands}{os.pathsep}{os.environ['PATH']}", "PYTHONPATH": str(STAND_IN)}
        settings |= {"PYTHON": sys.executable, "PLAN": plan, "PREFLIGHT": "0", "SLURM_JOB_ID": "77"}
        settings |= {"SLURM_JOB_NUM_NODES": str(nodes), "SLURM_JOB_NODELIST": "n", "SLURM_RESTART_COUNT": str(restart)}
        self.process = subprocess.Popen(
            ["bash", str(script)], env=os.environ | settings | variables, stdout=subprocess.PIPE, text=True
        )

    def listens(self, processes: int) -> None:
        """Wait until so many processes handle signals."""
        self._until(lambda: len(list(self.run.glob("listening-*"))) == processes)

    def signal_tasks(self, number: signal.Signals) -> None:
        """To the shell that srun started, and to nothing else."""
        self._until((self.run / "tasks").exists)
        for task in (self.run / "tasks").read_text().split():
            os.kill(int(task), number)

    def ends(self) -> tuple[int, str]:
        """The script's exit code, and why it ended as it has written it down."""
        self.said, _ = self.process.communicate(timeout=60)
        lines = (self.run / "launch/attempts.jsonl").read_text().splitlines()
        last: dict[str, Any] = json.loads(lines[-1])
        assert (last["event"], last["code"]) == ("end", self.process.returncode), self.said
        return last["code"], last["why"]

    def asked(self, what: str) -> int:
        """How often scontrol was asked for this."""
        path = self.run / "asked"
        return path.read_text().split().count(what) if path.exists() else 0

    def log(self, name: str) -> str:
        """One of the logs."""
        return (self.run / "logs" / name).read_text(encoding="utf-8")

    def _until(self, happened: Callable[[], bool]) -> None:
        end = time.monotonic() + 60
        while not happened():
            assert self.process.poll() is None and time.monotonic() < end, self.process.stdout
            time.sleep(0.02)

"""The plain scripts below launch/: what the templates give, clean for shellcheck, of recipes that exist; snapshots of code."""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from curvelora.errors import UserError
from curvelora_training.config import load_recipe
from curvelora_training.launch import scripts
from curvelora_training.launch.engines import chosen_engine
from curvelora_training.launch.job import Job
from curvelora_training.launch.plan import override
from curvelora_training.launch.render import render
from curvelora_training.launch.snapshot import code_state
from run_files import metrics, result

STORED = scripts.scripts()
BIN = Path(sys.executable).parent
MULTINODE = "launch/multinode/finetune.sh"


def rendered() -> dict[str, str]:
    """Job scripts of every launcher, on GPUs and CPUs, with and without an engine and what a site adds."""
    site = {"setup": ("module load cuda",), "environment": {"HF_HOME": "/a b"}, "sbatch_options": ("--exclusive",)}
    kinds = {
        "torchrun": {"gpus_per_node": 4, "engine": "zero2", **site},
        "accelerate": {"gpus_per_node": 2, "engine": "fsdp2"},
        "deepspeed": {"gpus_per_node": 0, "processes_per_node": 2},
    }
    jobs = (
        Job(recipe="r.yaml", output="/run", name=kind, launcher=kind, nodes=2, **more) for kind, more in kinds.items()
    )
    return {job.name: render(job) for job in jobs}


def test_the_stored_scripts_are_what_the_templates_give(root: Path) -> None:
    kept = {str(path.relative_to(root / "launch")) for path in (root / "launch").glob("*/*") if path.is_file()}
    assert kept == set(STORED)
    for name, text in STORED.items():
        path = root / "launch" / name
        assert path.read_text(encoding="utf-8") == text, "write it again: python -m curvelora_training.launch.scripts"
        assert os.access(path, os.X_OK)


def test_what_a_script_replaces_is_there_to_be_replaced() -> None:
    """Jinja says nothing of a block that the template underneath does not have."""
    templates = Path(scripts.__file__).parent / "templates"
    blocks = {path.name: set(re.findall(r"{% block (\w+)", path.read_text())) for path in templates.glob("*.j2")}
    for name in ("finetune.sbatch.j2", "compare.sbatch.j2"):
        assert blocks[name] and blocks[name] <= blocks["job.sbatch.j2"]


def test_scripts_are_clean(tmp_path: Path) -> None:
    texts = STORED | rendered()
    paths = []
    for name, text in texts.items():
        paths.append(tmp_path / name.replace("/", "-"))
        paths[-1].write_text(text, encoding="utf-8")
        assert "{{" not in text and "{%" not in text
        lines = text.splitlines()
        assert lines[0] == "#!/usr/bin/env bash" and "set -euo pipefail" in lines
        options = [line for line in lines if line.startswith("#SBATCH")]
        assert not any(sign in line for line in options for sign in "$`")  # sbatch expands nothing
        assert not options or lines.index(options[-1]) < lines.index("set -euo pipefail")  # and reads none after that
    found = shutil.which("shellcheck", path=f"{BIN}{os.pathsep}{os.environ['PATH']}")
    if found is None:
        pytest.skip("shellcheck is not installed (requirements-dev.txt brings it)")
    for size in scripts.SIZES[1:-1]:  # which differ in numbers and names; a second of shellcheck each
        paths.remove(tmp_path / f"slurm-{size.stem}.sbatch")
    halves = [[found, "--shell=bash", *paths[i::2]] for i in (0, 1)]
    for process in [subprocess.Popen(command, stdout=subprocess.PIPE, text=True) for command in halves]:
        printed, _ = process.communicate(timeout=300)
        assert process.returncode == 0, printed[-3000:]


@pytest.mark.parametrize("size", scripts.SIZES, ids=lambda size: size.stem)
def test_sizes_keep_the_rows_of_a_step(size: scripts.Size, root: Path) -> None:
    """Whatever the number of GPUs: a step has the rows that the recipe says on one."""
    lines = STORED[f"slurm/{size.stem}.sbatch"].splitlines()
    start = next(i for i, line in enumerate(lines) if line.startswith("rows="))
    end = next(i for i, line in enumerate(lines) if line.startswith("set -- "))
    code = "\n".join([*lines[start : end + 1], 'echo "$@"'])

    def shared(nodes: int) -> tuple[int, str]:
        command = ["bash", "-euc", f"NODES={nodes} PROCESSES={size.gpus}\n{code}", "job", "seed=1"]
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        return done.returncode, done.stdout + done.stderr

    for nodes in (1, 2, size.nodes):
        code_of, said = shared(nodes)
        batch, accumulation, *rest = said.split()
        assert code_of == 0 and rest == ([] if size.scored else ["data.test=null"]) + ["seed=1"]
        batch, accumulation = (
            batch.removeprefix("training.batch_size="),
            accumulation.removeprefix("training.accumulation="),
        )
        assert int(batch) * int(accumulation) * nodes * size.gpus == size.rows and int(batch) <= size.batch
    code_of, said = shared(3)
    assert code_of == 2 and f"cannot share the {size.rows} rows" in said
    for arm in size.arms:
        recipe = load_recipe(root / f"training/recipes/{size.stem}_{arm}.yaml")
        assert recipe.adapter["method"] == arm
        assert recipe.training.batch_size * recipe.training.accumulation == size.rows
        assert recipe.training.batch_size == size.batch
    others = {path.stem.rpartition("_")[2] for path in (root / "training/recipes").glob(f"{size.stem}_*.yaml")}
    assert others == set(size.arms)


def test_the_arm_is_an_argument_of_a_script() -> None:
    lines = STORED["slurm/llama2_70b_samsum.sbatch"].splitlines()
    start = lines.index("arm=loran")
    end = next(i for i, line in enumerate(lines) if line.startswith("export RECIPE"))
    code = "\n".join([*lines[start : end + 1], 'echo "$RECIPE $RUN $*"'])

    def run(*arguments: str, **variables: str) -> subprocess.CompletedProcess[str]:
        command = ["bash", "-uc", code, "job", *arguments]
        environment = {"PATH": os.environ["PATH"]} | variables
        return subprocess.run(command, capture_output=True, text=True, check=False, env=environment, cwd="/")

    recipe = "training/recipes/llama2_70b_samsum_{}.yaml {} seed=1"
    assert run("seed=1").stdout.strip() == recipe.format("loran", "//runs/llama2_70b_samsum_loran")
    assert run("aurora", "seed=1", RUN="/mine").stdout.strip() == recipe.format("aurora", "/mine")
    wrong = run("lora")
    assert wrong.returncode == 2 and "the arm lora is none of loran, qlora, ranlora, aurora" in wrong.stderr


@pytest.mark.parametrize(
    ("hosts", "variables", "said"),
    [
        ("", {}, "names no machine"),
        ("a slots=2\nb slots=4\n", {}, "as many slots as the first"),
        ("a slots=0\n", {}, "a line is like 'a slots=8'"),
        ("a\n", {}, "a line is like 'a slots=8'"),
        ("$(touch x) slots=2\n", {}, "is no name of a machine"),
        ("-oProxyCommand=x slots=2\n", {}, "is no name of a machine"),
        ("a slots=2\n", {"NODE_RANK": "1"}, "are 0 to 0"),
        ("a slots=2\n", {"LAUNCHER": "mpirun"}, "mpirun is none of torchrun"),
        ("a slots=2\n", {"ENGINE": "zero9"}, "zero9 is neither ddp, nor fsdp2, nor a file"),
        ("a slots=2\n", {"LAUNCHER": "deepspeed", "ENGINE": "ddp"}, "always runs DeepSpeed"),
        (None, {}, "cannot be read"),
    ],
)
def test_a_hostfile_is_read_with_care(
    root: Path, tmp_path: Path, hosts: str | None, variables: dict[str, str], said: str
) -> None:
    file = tmp_path / "hosts"
    if hosts is not None:
        file.write_text(f"# machines\n\n{hosts}")
    environment = os.environ | {"HOSTFILE": str(file), "RUN": str(tmp_path / "run")} | variables
    command = [str(root / MULTINODE), "recipe.yaml"]
    done = subprocess.run(
        command, cwd=tmp_path, env=environment, capture_output=True, text=True, check=False, timeout=60
    )
    assert done.returncode == 2 and said in done.stderr and not (tmp_path / "x").exists()


@pytest.mark.slow
def test_two_machines_without_slurm(
    root: Path, tmp_path: Path, recipe: dict[str, Any], write: Callable[..., Path], finetune: Callable[..., Path]
) -> None:
    """By a stand-in of ssh: the run of one process, its exit codes, and SIGTERM stops both machines with a checkpoint."""
    recipe["adapter"]["dropout"] = 0.0
    recipe["training"] |= {"batch_size": 4, "epochs": 10}
    path, run = str(write(recipe)), tmp_path / "run two"
    (tmp_path / "hosts").write_text("first slots=1\nsecond slots=1\n")
    # a shell that has nothing of this one's environment
    ssh = tmp_path / "ssh"
    ssh.write_text('#!/bin/bash\nexec env -i HOME="$HOME" bash -c "${*: -1}"\n')
    ssh.chmod(0o755)
    environment = os.environ | {"PATH": f"{BIN}{os.pathsep}{os.environ['PATH']}", "SSH": f"{ssh} -o BatchMode=yes"}
    environment |= {"HOSTFILE": str(tmp_path / "hosts"), "HEAD": "127.0.0.1", "RUN": str(run), "PREFLIGHT": "0"}
    environment |= {"OMP_NUM_THREADS": "1", "DS_ACCELERATOR": "cpu"}

    def start(*more: str) -> subprocess.Popen[str]:
        command = [str(root / MULTINODE), path, *more]
        return subprocess.Popen(command, cwd=root, env=environment, text=True, stderr=subprocess.PIPE)

    stopped = start("name=it's $HOME")
    until = time.monotonic() + 200
    while time.monotonic() < until and not (run.is_dir() and (run / "metrics.jsonl").exists() and metrics(run)):
        time.sleep(0.2)
    stopped.terminate()
    _, said = stopped.communicate(timeout=200)
    assert stopped.returncode == 75 and "asked to stop" in said
    assert metrics(run)[-1]["stopped"]["code"] == 75
    again = start("name=it's $HOME")
    said = again.communicate(timeout=200)[1]
    assert (said, again.returncode) == ("", 0), (run / "logs/node0.log").read_text()[-2000:]
    straight = finetune(Path(path), "training.batch_size=8", f"output={tmp_path / 'straight'}")
    losses = [[line["loss"] for line in metrics(folder) if "loss" in line] for folder in (run, straight)]
    assert losses[0][-1] == pytest.approx(losses[1][-1], rel=1e-3)
    assert result(run)["engine"]["processes"] == 2 and result(run)["name"] == "it's $HOME"
    assert {p.name for p in (run / "logs").iterdir()} == {f"node{n}{r}.log" for n in (0, 1) for r in ("", f"-rank{n}")}
    changed = start("seed=5")
    assert (
        "ended with code 2: the others are stopped" in changed.communicate(timeout=200)[1] and changed.returncode == 2
    )


def test_machines_are_told_no_secrets() -> None:
    """Of the variables that a machine's part is told, on a command line that `ps` shows."""
    lines = STORED["multinode/finetune.sh"].splitlines()
    start, end = lines.index("kept=()"), lines.index("done < <(compgen -e)")
    code = "\n".join([*lines[start : end + 1], "printf '%s\\n' \"${kept[@]}\""])
    told = {"HF_HOME": "/models", "NCCL_DEBUG": "WARN"}
    secret = {"HF_TOKEN": "x", "CURVELORA_API_KEY": "x", "HF_SECRET": "x", "OTHER": "x"}
    done = subprocess.run(["bash", "-euc", code], env=told | secret, capture_output=True, text=True, check=True)
    assert sorted(done.stdout.split()) == sorted(f"{name}={value}" for name, value in told.items())


def test_engines(monkeypatch: pytest.MonkeyPatch) -> None:
    assert chosen_engine(None, "torchrun") is None and chosen_engine("ddp", "accelerate") is None
    assert chosen_engine(None, "deepspeed") == "zero2" and chosen_engine("zero3_offload", "torchrun") == "zero3_offload"
    assert chosen_engine("fsdp2", "accelerate") == "fsdp2"
    with pytest.raises(UserError, match="always runs DeepSpeed"):
        chosen_engine("ddp", "deepspeed")


@pytest.mark.parametrize("value", ["/runs/a", "1", "yes", "a: b", "[x", "it's", "#x"])
def test_overrides_are_read_back_as_they_were(value: str, tmp_path: Path, root: Path) -> None:
    recipe = load_recipe(root / "training/recipes/demo.yaml", [override("name", value)])
    assert recipe.name == value


@pytest.fixture
def repository(tmp_path: Path) -> Path:
    """A git repository with one commit and a package in it."""
    folder = tmp_path / "clone"
    (folder / "training").mkdir(parents=True)
    (folder / "training/code.py").write_text("one = 1\n")
    (folder / "training/gone.py").write_text("two = 2\n")
    git(folder, "init", "--quiet", "--initial-branch=work")
    git(folder, "config", "user.name", "a")
    git(folder, "config", "user.email", "a@example.org")
    git(folder, "config", "diff.noprefix", "true")
    git(folder, "add", ".")
    git(folder, "commit", "--quiet", "--message=first")
    return folder


def git(folder: Path, *arguments: str, text: str | None = None) -> str:
    done = subprocess.run(["git", *arguments], cwd=folder, input=text, capture_output=True, text=True, check=True)
    return done.stdout


def test_the_snapshot_of_the_code_brings_it_back(repository: Path, tmp_path: Path) -> None:
    here = repository / "training/code.py"
    record, diff = code_state(here)
    head = git(repository, "rev-parse", "HEAD").strip()
    assert (record["commit"], record["branch"], record["dirty"], diff) == (head, "work", False, "")
    here.write_text("one = 1.5  # é\n")
    (repository / "training/gone.py").unlink()
    (repository / "training/new file.yaml").write_text("three: 3\n")
    (repository / "staged.py").write_text("four = 4\n")
    git(repository, "add", "staged.py")
    (repository / "credentials.json").write_text("PASSWORD=secret\n")
    (repository / "training/weights.json").write_text("x" * (1 << 21))
    record, diff = code_state(here)
    assert (
        record["dirty"]
        and sorted(record["left_out"]) == ["credentials.json", "training/weights.json"]
        and "secret" not in diff
    )
    assert json.loads(json.dumps(record)) == record
    other = tmp_path / "other"
    git(tmp_path, "clone", "--quiet", str(repository), str(other))
    git(other, "apply", "--index", text=diff)
    left = {str(path.relative_to(other)) for path in other.rglob("*") if path.is_file() and ".git" not in path.parts}
    assert left == {"training/code.py", "training/new file.yaml", "staged.py"}
    assert all((other / name).read_bytes() == (repository / name).read_bytes() for name in left)


def test_without_a_repository_versions_are_known(tmp_path: Path, repository: Path) -> None:
    (tmp_path / "alone.py").write_text("")
    installed = repository / "venv/package.py"  # inside somebody's repository, which does not track it
    installed.parent.mkdir()
    installed.write_text("")
    for path in (tmp_path / "alone.py", installed):
        record, diff = code_state(path)
        assert record["commit"] is None and "does not lie in a git repository" in record["why"] and diff == ""
        assert record["versions"]["torch"]

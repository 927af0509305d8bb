"""`curvelora launch`: what it hands to sbatch and leaves in the run folder, and what it refuses in words; SLURM is a stand-in."""

from __future__ import annotations

import json
import subprocess
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from curvelora.cli import run_guarded, run_module
from curvelora_training.config import load_recipe
from curvelora_training.launch import command
from curvelora_training.launch.cluster import partitions
from curvelora_training.launch.job import Job, seconds
from curvelora_training.launch.render import render
from curvelora_training.launch.submission import share_of
from curvelora_training.preflight.code import hash_of_code
from launch_stubs import Slurm

Launch = Callable[..., tuple[int, str, str]]


@pytest.fixture
def slurm(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Slurm:
    """A SLURM of three GPU nodes, and no site file."""
    monkeypatch.setenv("XDG_CONFIG_HOME", str(tmp_path / "config"))
    monkeypatch.delenv("CURVELORA_SITE", raising=False)
    return Slurm(tmp_path / "slurm", monkeypatch)


@pytest.fixture
def launch(
    recipe: dict[str, Any], write: Callable[..., Path], capsys: pytest.CaptureFixture[str], root: Path
) -> Launch:
    """`launch("--nodes", "2")` -> (exit code, stdout, stderr), on the small recipe unless --recipe is given."""

    def run(*arguments: str) -> tuple[int, str, str]:
        given = [] if "--recipe" in arguments or "--show-site" in arguments else ["--recipe", str(write(recipe))]
        code = run_guarded(lambda: run_module(command, "curvelora launch", [*given, *arguments]))
        return code, *capsys.readouterr()

    return run


def arguments_of(script: str) -> list[str]:
    """What the script hands to training, as bash reads it; RUN, RECIPE and CONFIGS by their names."""
    lines = script.splitlines()
    start = next(i for i, line in enumerate(lines) if line.startswith("ARGUMENTS=("))
    code = f"RUN=run RECIPE=recipe CONFIGS=configs\n{lines[start]}\nprintf '%s\\0' \"${{ARGUMENTS[@]}}\""
    done = subprocess.run(["bash", "-uc", code], capture_output=True, text=True, check=True)
    return done.stdout.split("\0")[:-1]


def test_a_run_is_submitted(slurm: Slurm, launch: Launch, recipe: dict[str, Any], write: Callable[..., Path]) -> None:
    run = Path(recipe["output"])
    code, out, err = launch("--nodes", "2", "--gpus-per-node", "2", "--time", "2:00:00", "--mem", "90G", "seed=7")
    assert (code, err) == (0, "")
    assert slurm.heard("sbatch")[-2:] == ["--parsable", str(run / "launch/job.sbatch")]
    assert "job 4711, 2 nodes of 2 GPUs" in out and str(run) in out and f"curvelora status {run}" in out
    kept = load_recipe(run / "launch/recipe.yaml")
    assert (kept.seed, kept.output, kept.adapter["amplitude"]) == (7, str(run), 5e-5)
    script = (run / "launch/job.sbatch").read_text()
    wanted = ("--nodes=2", "--ntasks-per-node=1", "--gpus-per-node=2", "--time=2:00:00", "--mem=90G", "--requeue")
    wanted += ("--cpus-per-task=16",)  # of SLURM's own all processes of a node would have one
    assert "8 rows a step = batch 2 x accumulation 1 x 4 processes" in out
    assert (kept.training.batch_size, kept.training.accumulation) == (2, 1)  # 8 and 1 in the recipe
    assert all(f"\n#SBATCH {option}\n" in script for option in wanted)
    assert f"\n#SBATCH --output={run}/logs/slurm-%j.out\n" in script and (run / "logs").is_dir()
    assert not any("$" in line for line in script.splitlines() if line.startswith("#SBATCH"))
    assert arguments_of(script) == ["--config", "recipe", "output=run", "--resume"]
    assert f"RECIPE={run}/launch/recipe.yaml" in script
    (line,) = (run / "launch/submitted.jsonl").read_text().splitlines()
    noted = json.loads(line)
    assert (noted["job"], noted["processes"], noted["kind"]) == ("4711", 4, "train") and "seed=7" in noted["overrides"]
    code = json.loads((run / "launch/code.json").read_text())
    assert code["versions"]["torch"] and code["sha256"] == hash_of_code()

    # while that job is in the queue there is no second one for its folder
    slurm.says("squeue", "PENDING\n")
    code, _, err = launch("--gpus-per-node", "2")
    assert code == 2 and "job 4711" in err and "scancel 4711" in err and slurm.heard("sbatch").count("--parsable") == 1
    slurm.says("squeue", "", "slurm_load_jobs error: Invalid job id specified", 1)
    (run / "metrics.jsonl").write_text("")
    code, _, err = launch("--gpus-per-node", "2")
    assert code == 2 and "holds a run already (metrics.jsonl): add --resume" in err
    assert launch("--gpus-per-node", "2", "--resume")[0] == 0
    (run / "config.yaml").write_text(kept.as_yaml())
    code, _, err = launch("--gpus-per-node", "2", "--resume")
    assert code == 2 and "seed was 7 and is 42" in err
    (run / "adapter").mkdir()
    (run / "result.json").write_text("{}")
    assert "holds a complete run" in launch("--gpus-per-node", "2", "--resume")[2]


def test_the_evaluation_waits_for_the_run(slurm: Slurm, launch: Launch, recipe: dict[str, Any]) -> None:
    run, rows = Path(recipe["output"]), recipe["data"]["test"]["path"]
    size = ["--nodes", "2", "--gpus-per-node", "2", "--cpus-per-gpu", "4", "--mem", "9G", "--gpu-type", "1g.10gb"]
    code, out, _ = launch(*size, "--evaluate-after", rows)
    assert load_recipe(run / "launch/recipe.yaml").data.test is None  # one job scores, and not both
    assert code == 0 and "evaluation: job 4711" in out
    assert slurm.heard("sbatch")[-1] == str(run / "launch/evaluate.sbatch")
    script = (run / "launch/evaluate.sbatch").read_text()
    wanted = (
        "--nodes=1",
        "--gpus-per-node=1g.10gb:1",
        "--mem=4608M",
        "--cpus-per-task=4",
        "--dependency=afterok:4711",
        "--kill-on-invalid-dep=yes",
    )
    assert all(f"\n#SBATCH {option}\n" in script for option in wanted)
    assert f"--adapter {run}/adapter --data {rows} --out {run}/evaluation-sst2_sentences_unseen" in script
    log = next(line for line in script.splitlines() if line.startswith("#SBATCH --output=")).partition("=")[2]
    assert Path(log).parent == run / "logs" and (run / "logs").is_dir()  # SLURM makes no folder for it
    assert (
        "no_such.csv does not exist"
        in launch("--gpus-per-node", "1", "--evaluate-after", "no_such.csv", "--dry-run")[1]
    )


def test_print_shows_a_script_that_works_by_hand(
    slurm: Slurm, launch: Launch, recipe: dict[str, Any], root: Path
) -> None:
    """Whatever stands in a value is one word of the shell; nothing is written."""
    strange = 'name=it\'s $(touch never) "quoted" `id` \\ *'
    code, out, _ = launch("--gpus-per-node", "1", "--print", "--launcher", "deepspeed", "--engine", "zero3", strange)
    assert code == 0 and not slurm.heard("sbatch") and not Path(recipe["output"]).exists()
    assert arguments_of(out) == [
        *("--config", "recipe", "output=run", strange),
        *("training.deepspeed=configs/zero3.json", "--resume"),
    ]
    assert f"CONFIGS={root / 'ds_configs'} " in out and "\n#SBATCH --output=slurm-%x-%j.out\n" in out
    assert subprocess.run(["bash", "-n"], input=out, text=True, check=False).returncode == 0
    code, out, _ = launch("--gpus-per-node", "1", "--print", "training.deepspeed=ds_configs/zero1.json")
    assert code == 0 and f"training.deepspeed={root / 'ds_configs/zero1.json'}" in arguments_of(out)
    own = ["--gpus-per-node", "1", "--print", "training.deepspeed=ds_configs/zero1.json", "--launcher", "accelerate"]
    code, out, _ = launch(*own, "--engine", "ddp")
    assert code == 0 and "training.deepspeed=null" in arguments_of(out) and f"CONFIGS={root / 'ds_configs'} " in out


def test_a_dry_run_says_what_it_found(slurm: Slurm, launch: Launch, recipe: dict[str, Any]) -> None:
    code, out, _ = launch("--nodes", "3", "--gpus-per-node", "2", "--dry-run", "training.batch_size=8")
    assert code == 0 and [line.split(":")[0].split()[1] for line in out.splitlines()[:4]] == [
        "run",
        "model",
        "recipe",
        "cluster",
    ]
    assert (
        "96 rows, 48 rows a step = batch 8 x accumulation 1 x 6 processes" in out
        and "trains " in out
        and "partition main" in out
    )
    assert not Path(recipe["output"]).exists() and "--parsable" not in slurm.heard("sbatch")
    code, out, _ = launch("--nodes", "4", "--gpus-per-node", "2", "--dry-run", "model.path=nobody/no-such-model")
    assert code == 2 and "neither a folder here nor in the hub's cache" in out and "curvelora fetch" in out
    assert "--nodes 4 are more than the 3" in out and "ok      run folder" in out
    code, out, _ = launch("--gpus-per-node", "1", "--dry-run", "--unchecked", "model.path=/only/on/nodes")
    assert code == 0 and "model" not in out
    slurm.says("sinfo", "", "slurm_load_partitions: Unable to contact slurm controller", 1)
    code, out, _ = launch("--gpus-per-node", "1", "--dry-run")
    assert code == 2 and "Unable to contact slurm controller" in out


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["--nodes", "4"], ["--nodes 4 are more than the 3 that the partition main has"]),
        (["--partition", "mian"], ["there is no partition 'mian'; did you mean 'main'?", "long", "cpu"]),
        (["--time", "2-00:00:00"], ["--time 2-00:00:00 is above the limit of the partition main, 1-00:00:00"]),
        (["--gpus-per-node", "4"], ["--gpus-per-node 4 are more than the 2 of a node in main"]),
        (["--partition", "cpu", "--time", "30"], ["the partition cpu has no GPUs"]),
        (["--cpus-per-gpu", "9"], ["18 CPUs a node are more than the 16", "--cpus-per-gpu"]),
        (["--nodes", "3"], ["8 rows, which 6 processes cannot share", "start 4 or 8", "training.batch_size=N"]),
        (["--gpu-type", "h 100"], ["--gpu-type 'h 100'"]),
        (
            ["--nodes", "0", "--time", "5 hours", "--warning-seconds", "0"],
            ["--nodes must", "'5 hours'", "--warning-seconds must"],
        ),
        (["--time", "5:00"], ["--warning-seconds 300 is not less than the time limit of 300 s"]),
        (
            ["--name", "a b", "--account", "x;y", "--dependency", "4711"],
            ["--name 'a b'", "--account 'x;y'", "afterok:123"],
        ),
        (["--engine", "zero4", "trainng.epochs=1"], ["--engine 'zero4' is none of", "trainng: unknown key"]),
        (["--engine", "fsdp2"], ["add --launcher accelerate"]),
        (["--recipe", "lama2_70b_samsum_loran"], ["did you mean 'llama2_70b_samsum_loran'"]),
        (["--output", "/dev/null/run"], ["/dev/null is a file"]),
        (["--output", "runs/50% more"], ["has a space, %, $"]),
        (["data.train.path=gone.tsv"], ["gone.tsv does not exist"]),
    ],
)
def test_what_is_refused_before_anything_is_written(
    slurm: Slurm, launch: Launch, recipe: dict[str, Any], arguments: list[str], said: list[str]
) -> None:
    gpus = [] if "--gpus-per-node" in arguments else ["--gpus-per-node", "2"]
    code, out, err = launch(*gpus, *arguments)
    assert (code, out) == (2, "") and err.startswith("error: ") and "Traceback" not in err
    assert all(part in err for part in said), err
    assert "--parsable" not in slurm.heard("sbatch") and not Path(recipe["output"]).exists()


def test_a_partition_of_several_kinds_of_nodes(slurm: Slurm, launch: Launch) -> None:
    """`long` has two nodes of 4 GPUs and one without any, and no limit."""
    size = ["--nodes", "2", "--gpus-per-node", "4", "--time", "30-00", "--dry-run"]
    assert launch("--partition", "long", *size)[0] == 0
    assert launch("--partition", "cpu,long", "--gpus-per-node", "4", "--dry-run")[0] == 0
    slurm.says("sinfo", "only|down|infinite|1|(null)|8\n")
    code, out, _ = launch("--gpus-per-node", "1", "--dry-run")
    assert code == 0 and "partition that the site chooses" in out  # a plugin of it may; else sbatch refuses
    assert "takes no jobs now" in launch("--gpus-per-node", "0", "--processes-per-node", "2", "--partition", "only")[2]


@pytest.mark.parametrize(
    ("gres", "gpus"),
    [
        *(("gpu:8", 8), ("gpu:3090:4", 4), ("gpu:1g.10gb:7", 7), ("nvme:1,gpu:h100:8(S:0-1)", 8)),
        *(("gpu:a:2,gpu:b:3", 5), ("notgpu:4", 0), ("(null)", 0)),
    ],
)
def test_gpus_of_a_node(gres: str, gpus: int, slurm: Slurm) -> None:
    slurm.says("sinfo", f"only*|up|infinite|1|{gres}|8\n")
    assert partitions()["only"].gpus == gpus and "--all" in slurm.heard("sinfo")


def test_sbatch_is_told_nothing_of_another_allocation(
    slurm: Slurm, launch: Launch, monkeypatch: pytest.MonkeyPatch
) -> None:
    outer = {"SLURM_MEM_PER_CPU": "1", "SBATCH_TIMELIMIT": "1", "SBATCH_PARTITION": "cpu"}
    kept = {"SLURM_CONF": "/etc/slurm", "SBATCH_ACCOUNT": "mine", "HF_HOME": "/models"}
    for name, value in (outer | kept).items():
        monkeypatch.setenv(name, value)
    sbatch = slurm.folder / "sbatch"
    sbatch.write_text(sbatch.read_text().replace("\ncat", f"\nenv >{slurm.folder}/env\ncat", 1))
    assert launch("--gpus-per-node", "1", "--partition", "main")[0] == 0
    told = dict(line.partition("=")[::2] for line in (slurm.folder / "env").read_text().splitlines())
    assert kept.items() <= told.items() and not outer.keys() & told.keys()


@pytest.mark.parametrize(
    ("memory", "parts", "one"),
    [
        ("480G", 8, "61440M"),
        ("1T", 8, "131072M"),
        ("9000", 4, "2250M"),
        ("0", 8, None),
        (None, 8, None),
        ("1K", 8, "1M"),
    ],
)
def test_an_evaluation_takes_its_share_of_memory(memory: str | None, parts: int, one: str | None) -> None:
    assert share_of(memory, parts) == one


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("Batch job submission failed: Invalid partition name specified", "there is no partition main here"),
        ("Batch job submission failed: Node count specification invalid", "does not have 1 nodes for one job"),
        ("Batch job submission failed: Requested node configuration is not available", "ask for less"),
        ("Batch job submission failed: Invalid account or account/partition combination specified", "another one"),
        ("Batch job submission failed: Requested time limit is invalid (missing or exceeds some limit)", "--time"),
        ("Batch job submission failed: Something new", "it refused the job"),
    ],
)
def test_what_sbatch_refuses(slurm: Slurm, launch: Launch, text: str, said: str) -> None:
    slurm.says("sbatch", "", f"sbatch: error: {text}\n", 1)
    code, out, err = launch("--gpus-per-node", "1", "--partition", "main")
    assert (code, out) == (2, "") and said in err and f"(sbatch: {text})" in err
    assert err.count("\n") == 1


def test_without_slurm(slurm: Slurm, launch: Launch, monkeypatch: pytest.MonkeyPatch, recipe: dict[str, Any]) -> None:
    monkeypatch.setenv("PATH", str(slurm.folder))
    slurm.remove("sbatch")
    code, _, err = launch("--gpus-per-node", "1")
    assert code == 2 and "there is no SLURM here" in err and "--print" in err and "launch/multinode" in err
    assert not Path(recipe["output"]).exists()


def test_the_site_file(slurm: Slurm, launch: Launch, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "config/curvelora/site.yaml"
    code, out, _ = launch("--show-site")
    assert code == 0 and str(path) in out and "is not there" in out and "partition: null" in out
    assert "--gpus-per-node is missing" in launch("--print")[2]
    path.parent.mkdir(parents=True)
    path.write_text(
        "partition: long\naccount: mine\ngpus_per_node: 8\ngpu_type: h100\ncpus_per_gpu: 6\n"
        "time: '10:00:00'\nrun_root: /scratch/me\n"
        "setup: [module load cuda]\nenvironment: {HF_HOME: /a b/$x}\nsbatch_options: [--exclusive]\n"
    )
    code, out, err = launch("--print", "--account", "other", "output=runs/here")
    assert "all of a node's, as neither --mem nor the site file says" in err and "#SBATCH --mem=0\n" in out
    assert code == 0 and all(
        f"\n{line}\n" in out
        for line in (
            *(
                "#SBATCH --partition=long",
                "#SBATCH --account=other",
                "#SBATCH --gpus-per-node=h100:8",
                "#SBATCH --exclusive",
            ),
            *("#SBATCH --cpus-per-task=48", "#SBATCH --time=10:00:00", "module load cuda", "export HF_HOME='/a b/$x'"),
        )
    )
    assert "export RUN=/scratch/me/runs/here " in out
    path.write_text("acount: mine\ngpus_per_node: 0\nenvironment: {A: 1}\n")
    err = launch("--print")[2]
    assert (
        "unknown key 'acount'; did you mean 'account'?" in err
        and "gpus_per_node" in err
        and "environment.A must be" in err
    )
    path.write_text("environment: {RANK: '0', 'A B': x}\nsbatch_options: [--nodes=4, exclusive]\nsetup: [\"a\\nb\"]\n")
    err = launch("--print", "--gpus-per-node", "1")[2]
    for said in (
        "RANK is set by the launcher",
        "'A B' is no name",
        "--nodes is written by",
        "'exclusive' must be like",
        "one line",
    ):
        assert said in err
    monkeypatch.setenv("CURVELORA_SITE", str(tmp_path / "gone.yaml"))
    assert "there is no such file" in launch("--print")[2]


@pytest.mark.parametrize(
    ("text", "wanted"),
    [("90", 5400), ("10:30", 630), ("1:00:00", 3600), ("2-12", 216000), ("1-00:30", 88200), ("1-01:01:01", 90061)]
    + [(text, None) for text in ("", "1h", "1:2:3:4", "-5", "1-", "unlimited")],
)
def test_time_limits(text: str, wanted: int | None) -> None:
    """sbatch's own forms (its manual, --time)."""
    assert seconds(text) == wanted


def test_a_job_is_checked_before_it_is_rendered() -> None:
    from curvelora.errors import UserError

    with pytest.raises(UserError, match=r"--launcher 'mpi' is none of .*; --nodes must"):
        render(Job(recipe="r.yaml", output="/run", name="a", nodes=0, launcher="mpi"))

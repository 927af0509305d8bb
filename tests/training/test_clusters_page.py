"""Every command of docs/clusters.md, in its order, as somebody types them on a login node; hub, model and SLURM are stand-ins."""

from __future__ import annotations

import json
import re
import shlex
import subprocess
from pathlib import Path
from typing import Any

import pytest
import yaml
from transformers import LlamaConfig, LlamaForCausalLM

from curvelora import cli
from curvelora_training import finetune
from curvelora_training.config import load_recipe
from curvelora_training.launch import site
from hub_stub import Hub, serving
from launch_stubs import Slurm

INSTALLED = [  # what the test suite itself runs in
    "python3 -m venv .venv",
    ".venv/bin/pip install -r requirements.txt",
    "source .venv/bin/activate",
]
RUN = "runs/llama2_70b_samsum_loran"
ROWS = [{"id": str(i), "dialogue": f"Ann: Is it {i}?\nBob: Yes.", "summary": f"It is {i}."} for i in range(8)]


def test_every_command_of_the_page_runs(
    root: Path,
    tmp_path: Path,
    tiny_models: dict[str, Path],
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    page = (root / "docs/clusters.md").read_text(encoding="utf-8")
    shown = [line for block in re.findall(r"```bash\n(.*?)```", page, re.DOTALL) for line in block.splitlines()]
    assert shown[: len(INSTALLED)] == INSTALLED and len(shown) > 10
    for name in ("requirements.txt", "ds_configs", "launch"):
        (tmp_path / name).symlink_to(root / name)
    (tmp_path / "data/samsum").mkdir(parents=True)
    for name in ("train", "val", "test"):
        (tmp_path / f"data/samsum/{name}.json").write_text(json.dumps(ROWS), encoding="utf-8")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("XDG_CONFIG_HOME", str(tmp_path / "config"))
    monkeypatch.delenv("CURVELORA_SITE", raising=False)
    slurm = Slurm(tmp_path / "slurm", monkeypatch)
    slurm.says("sinfo", "main*|up|infinite|4|gpu:8|96\n")
    wheels: list[str] = []

    def pip(arguments: list[str], **_: Any) -> subprocess.CompletedProcess:
        wheels.append(arguments[-1])
        return subprocess.CompletedProcess(arguments, 0, stderr="")

    stand_in = LlamaConfig.from_pretrained(tiny_models["llama"], num_key_value_heads=4)  # whose v_proj holds r = 64
    LlamaForCausalLM(stand_in).save_pretrained(tmp_path / "stand_in")
    files = {
        path.name: path.read_bytes() for name in (tiny_models["llama"], "stand_in") for path in Path(name).iterdir()
    }
    for line in shown[len(INSTALLED) :]:
        command, *arguments = shlex.split(line)
        assert command == "curvelora", f"{line}: say here how this is tested"
        if arguments[0] == "report":  # of the run that the job would have made
            train_as_submitted(capsys)
        with monkeypatch.context() as patch, serving(Hub(files, "meta-llama/Llama-2-70b-hf"), patch):
            if "--wheels" in arguments:
                patch.setattr("subprocess.run", pip)
            if "fetch" not in arguments or "--verify" in arguments:
                patch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
            code = cli.main(arguments)
        out, err = capsys.readouterr()
        assert code == 0, f"{line}\n{out}{err}"
        if arguments[0] == "fetch":
            assert f"model.path={tmp_path}/fetched/70b/model" in out
        elif "--dry-run" in arguments:
            assert (
                "64 rows a step = batch 1 x accumulation 2 x 32 processes" in out
                and "--parsable" not in slurm.heard("sbatch")
            )
        elif arguments[0] == "status":
            assert "submitted" in out
    assert wheels == ["requirements.txt"]
    assert slurm.heard("sbatch").count("--parsable") == 2
    assert "#SBATCH --dependency=afterok:4711" in Path(f"{RUN}/launch/evaluate.sbatch").read_text(encoding="utf-8")
    assert (tmp_path / "runs/report/report.html").is_file()


def train_as_submitted(capsys: pytest.CaptureFixture[str]) -> None:
    """One step of the recipe that lies in the run folder, on this machine."""
    recipe = load_recipe(f"{RUN}/launch/recipe.yaml")
    assert recipe.training.accumulation * recipe.training.batch_size * 4 * 8 == 64
    assert recipe.training.deepspeed is None and recipe.data.test is None  # scored by the second job
    here = ["training.max_steps=1", "task.max_new_tokens=4", "training.timeout_minutes=1"]
    assert finetune.main(["--config", f"{RUN}/launch/recipe.yaml", *here]) == 0, capsys.readouterr()


def test_the_site_file_of_the_page_is_one(root: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    page = (root / "docs/clusters.md").read_text(encoding="utf-8")
    [text] = re.findall(r"```yaml\n(.*?)```", page, re.DOTALL)
    (tmp_path / "site.yaml").write_text(text, encoding="utf-8")
    monkeypatch.setenv("CURVELORA_SITE", str(tmp_path / "site.yaml"))
    read = site.load_site()
    for key, value in yaml.safe_load(text).items():
        assert list(getattr(read, key)) == value if isinstance(value, list) else getattr(read, key) == value

"""The shape of the repository: imports point one way, nothing dangerous is called, and the versions asked for are admitted."""

from __future__ import annotations

import ast
import subprocess
import sys
import tomllib
from collections.abc import Iterator
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from packaging.specifiers import SpecifierSet

ROOT = Path(__file__).resolve().parents[1]
PACKAGES = {"adapters": "curvelora", "eval": "curvelora_eval", "training": "curvelora_training"}
# top-level package -> what it must not import, in functions neither
FORBIDDEN = {
    "adapters": {"curvelora_eval", "curvelora_training", "deepspeed", "datasets", "evaluate", "accelerate"},
    "eval": {"curvelora_training", "deepspeed"},
    "training": set(),
}
REQUIRED = {
    *("adapters", "eval", "training", "launch", "ds_configs", "tests", "docs"),
    *("requirements.txt", "README.md", "Makefile", ".ci", "LICENSE", "CHANGELOG.md", "pyproject.toml"),
}
ALLOWED = REQUIRED | {".gitignore", *(f"requirements-{name}.txt" for name in ("cuda", "demo", "dev", "lm-eval"))}
LONGEST = 450  # lines of a file
# what the ranges must admit, and the first version that nobody has tried
ADMITTED = {
    "torch": (["2.11.0", "2.12.1", "2.13.0"], "2.14.0"),
    "transformers": (["5.17.0", "5.20.0", "5.23.0", "5.23.9"], "5.24.0"),
}


def sources(*folders: str) -> list[Path]:
    """The Python files below these folders of the repository."""
    return sorted(p for folder in folders for p in (ROOT / folder).rglob("*.py") if "build" not in p.parts)


def name(path: Path) -> str:
    return path.relative_to(ROOT).as_posix()


def imported(tree: ast.AST) -> Iterator[str]:
    """Top-level names of every module that is imported, also by `importlib.import_module("...")`."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from (alias.name.split(".")[0] for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and node.level == 0:
            yield (node.module or "").split(".")[0]
        elif isinstance(node, ast.Call) and called(node) in ("importlib.import_module", "import_module", "__import__"):
            yield from (a.value.split(".")[0] for a in node.args if isinstance(a, ast.Constant))


def called(node: ast.Call) -> str:
    """`torch.load` for `torch.load(...)`."""
    return ast.unparse(node.func)


def parse(path: Path) -> ast.AST:
    return ast.parse(path.read_text(encoding="utf-8"), filename=str(path))


@pytest.mark.parametrize("package", PACKAGES)
def test_imports_point_one_way(package: str) -> None:
    files = sources(package)
    assert len(files) > 5
    found = {(name(path), module) for path in files for module in imported(parse(path))}
    assert {(path, module) for path, module in found if module in FORBIDDEN[package]} == set()
    assert not {(path, module) for path, module in found if module in ("tests", "conftest")}


def test_packages_import_only_what_they_declare() -> None:
    """A package that works only because another one brought its dependency breaks when installed alone."""
    distributions = {"yaml": "pyyaml", "sklearn": "scikit-learn", "PIL": "pillow", "rouge_score": "rouge-score"}
    distributions |= {"pynvml": "nvidia-ml-py"}
    # what comes with torch, transformers and jinja2, in every version of them
    implied = {"numpy", "tqdm", "safetensors", "tokenizers", "huggingface_hub", "markupsafe"}
    standard = sys.stdlib_module_names
    for package, own in PACKAGES.items():
        declared = {Requirement(line).name for line in project(package)["dependencies"]}
        for extra in project(package).get("optional-dependencies", {}).values():
            declared |= {Requirement(line).name for line in extra}
        for other in ("curvelora", "curvelora-eval"):
            if other in declared:
                declared |= {
                    Requirement(line).name
                    for folder, module in PACKAGES.items()
                    if module.replace("_", "-") == other
                    for line in project(folder)["dependencies"]
                }
        for path in sources(package):
            for module in imported(parse(path)):
                distribution = distributions.get(module, module.replace("_", "-"))
                assert module in {*standard, *implied, own} or distribution in declared, (name(path), module)


@pytest.mark.parametrize("path", sources("adapters", "eval", "training", "tests"), ids=name)
def test_no_file_is_long(path: Path) -> None:
    assert len(path.read_text(encoding="utf-8").splitlines()) <= LONGEST


def test_the_top_level_is_as_designed() -> None:
    assert {name for name in REQUIRED if not (ROOT / name).exists()} == set()
    listed = subprocess.run(
        ["git", "ls-files", "--cached", "--others", "--exclude-standard"], cwd=ROOT, capture_output=True, text=True
    )
    if listed.returncode != 0:
        pytest.skip("this is no git checkout, so what belongs to the project is not known")
    assert {path.split("/")[0] for path in listed.stdout.splitlines()} - ALLOWED == set()


def project(package: str) -> dict:
    with (ROOT / package / "pyproject.toml").open("rb") as stream:
        return tomllib.load(stream)["project"]


@pytest.mark.parametrize("package", PACKAGES)
def test_every_package_says_what_it_runs_on(package: str) -> None:
    described = project(package)
    pythons = SpecifierSet(described["requires-python"])
    assert pythons == SpecifierSet(">=3.11,<3.13")
    assert [v for v in ("3.10.14", "3.11.0", "3.11.9", "3.12.7", "3.13.0") if v in pythons] == [
        "3.11.0",
        "3.11.9",
        "3.12.7",
    ]
    ranges = {r.name: r.specifier for r in map(Requirement, described["dependencies"])}
    for library, (versions, untried) in ADMITTED.items():
        # the two other packages leave the ranges to the core, which they need in their own version
        if package == "adapters" or library in ranges:
            assert all(version in ranges[library] for version in versions) and untried not in ranges[library]
    for other in set(ranges) & {"curvelora", "curvelora-eval"}:
        assert described["version"] in ranges[other]
    assert (ROOT / package / described["readme"]).is_file()


def test_the_pinned_versions_are_within_the_ranges() -> None:
    lines = (ROOT / "requirements.txt").read_text(encoding="utf-8").splitlines()
    pins = [Requirement(line) for line in lines if line and not line.startswith(("#", "-"))]
    pinned = {pin.name: next(iter(pin.specifier)).version for pin in pins}
    assert all(str(pin.specifier).startswith("==") for pin in pins)
    for package in PACKAGES:
        for requirement in map(Requirement, project(package)["dependencies"]):
            if not requirement.name.startswith("curvelora"):
                if requirement.name not in pinned:
                    assert requirement.name == "scipy"
                else:
                    assert pinned[requirement.name] in requirement.specifier, requirement


def dangers(tree: ast.AST) -> Iterator[str]:
    """Calls that run what a file or a word says: unsafe YAML, pickles, shells, code from a checkpoint, eval."""
    safe = {"SafeLoader", "CSafeLoader"}
    for node in ast.walk(tree):  # classes that derive from the safe loader are safe as well
        if isinstance(node, ast.ClassDef) and any(ast.unparse(base).split(".")[-1] in safe for base in node.bases):
            safe.add(node.name)
    for node in ast.walk(tree):
        if not isinstance(node, ast.Call):
            continue
        function, keywords = called(node), {k.arg: k.value for k in node.keywords}
        if function in ("torch.load", "eval", "exec", "os.system", "os.popen", "yaml.unsafe_load", "yaml.full_load"):
            yield function
        if function == "yaml.load":
            loader = keywords.get("Loader") or (node.args[1] if len(node.args) > 1 else None)
            if loader is None or ast.unparse(loader).split(".")[-1] not in safe:
                yield "yaml.load without a safe loader"
        for keyword in ("shell", "trust_remote_code", "allow_pickle"):
            value = keywords.get(keyword)
            if isinstance(value, ast.Constant) and value.value is True:
                yield f"{keyword}=True"
    yield from {"pickle", "dill", "cloudpickle", "marshal", "shelve"} & set(imported(tree))


@pytest.mark.parametrize("package", PACKAGES)
def test_nothing_dangerous_is_called(package: str) -> None:
    assert {name(path): list(dangers(parse(path))) for path in sources(package) if list(dangers(parse(path)))} == {}


@pytest.mark.parametrize(
    "code",
    [
        "yaml.load(x)",
        "yaml.load(x, yaml.Loader)",
        "yaml.load(x, Loader=yaml.FullLoader)",
        "class L(yaml.Loader): pass\nyaml.load(x, L)",
        "torch.load(x, weights_only=True)",
        "import pickle",
        "from pickle import loads",
        "importlib.import_module('pickle')",
        "subprocess.run(x, shell=True)",
        "AutoModel.from_pretrained(x, trust_remote_code=True)",
    ],
)
def test_the_scan_sees_what_it_looks_for(code: str) -> None:
    assert list(dangers(ast.parse(code)))


@pytest.mark.parametrize(
    "code",
    [
        "yaml.safe_load(x)",
        "class L(yaml.SafeLoader): pass\nyaml.load(x, L)",
        "subprocess.run([x], shell=False)",
        "AutoModel.from_pretrained(x, trust_remote_code=spec.trust_remote_code)",
        "model.eval()",
    ],
)
def test_the_scan_lets_the_rest_pass(code: str) -> None:
    assert not list(dangers(ast.parse(code)))

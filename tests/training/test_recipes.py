"""The recipes that come with the project: each is valid, launches as it says and counts what its source prints."""

from __future__ import annotations

import argparse
import functools
import gzip
import itertools
import json
import re
from pathlib import Path
from typing import Any

import pytest
from datasets import Image
from PIL import Image as Pillow
from transformers import LlamaConfig, RobertaConfig, ViTConfig

from curvelora import prepare_command
from curvelora.errors import UserError
from curvelora.registry import METHODS
from curvelora_training import recipes, recipes_command
from curvelora_training.bench.shapes import SHAPES
from curvelora_training.config import RecipeError, load_recipe, parse_recipe, read_yaml
from curvelora_training.prepare import load_and_prepare
from curvelora_training.resuming import check_same_recipe

FOLDER = Path(__file__).resolve().parents[2] / "training/recipes"
OLDER = {"demo", "lab_smollm2", "minilm_glue"}  # with models that are here
NAMES = sorted({path.stem for path in FOLDER.glob("*.yaml")} - OLDER)
# hub name -> (stand-in, shape)
MODELS = {
    "meta-llama/Llama-3.2-1B": ("llama", "llama-1b"),
    "meta-llama/Llama-2-7b-hf": ("llama", "llama2-7b"),
    "meta-llama/Llama-2-13b-hf": ("llama", "llama2-13b"),
    "meta-llama/Llama-2-70b-hf": ("llama", "llama2-70b"),
    "meta-llama/Meta-Llama-3-8B": ("llama", "llama3-8b"),
    "meta-llama/Meta-Llama-3-70B": ("llama", "llama3-70b"),
    "FacebookAI/roberta-base": ("roberta", (12, 768)),
    "FacebookAI/roberta-large": ("roberta", (24, 1024)),
    "google/vit-base-patch16-224-in21k": ("vit", (12, 768)),
    "google/vit-large-patch16-224-in21k": ("vit", (24, 1024)),
}
SMALL = {"hidden_size": 128, "intermediate_size": 128, "num_hidden_layers": 1, "num_attention_heads": 4}
STAND_INS = {
    "llama": LlamaConfig(**SMALL, num_key_value_heads=2, vocab_size=64, architectures=["LlamaForCausalLM"]),
    "roberta": RobertaConfig(**SMALL, vocab_size=64, architectures=["RobertaForMaskedLM"]),
    "vit": ViTConfig(**SMALL, architectures=["ViTModel"]),
}
# the rows of each file, in the format in which the data set is published
ROWS: dict[str, Any] = {
    "gsm8k/test.jsonl": [{"question": "1 + 1?", "answer": "2\n#### 2"}],
    "metamath.json": [
        {"query": "1 + 1?", "response": "The answer is: 2", "type": "GSM", "original_question": "1 + 1?"}
    ],
    "sst2/train.tsv.gz": "sentence\tlabel\nfine\t1\npoor\t0\n",
    "sst2/dev.tsv": "sentence\tlabel\nfine\t1\npoor\t0\n",
}
for _name in ("samsum/train.json", "samsum/val.json", "samsum/test.json"):
    ROWS[_name] = [{"id": "1", "dialogue": "A: Hi\r\nB: Hi", "summary": "A greets B."}]
for _name in ("commonsense/commonsense_170k.json", "commonsense/boolq/test.json"):
    ROWS[_name] = [{"instruction": "True?", "input": "", "output": "the correct answer is true", "answer": "true"}]
for _part in ("train", "test"):
    ROWS[f"20newsgroups/20news-bydate-{_part}/sci.med/1"] = "Subject: it\n\nText \xe9"
    ROWS[f"20newsgroups/20news-bydate-{_part}/rec.autos/2"] = "Subject: that\n\nText"
for _part in ("train", "dev"):
    _pairs = "\ufeffQuality\t#1 ID\t#2 ID\t#1 String\t#2 String\n"
    ROWS[f"mrpc/{_part}.tsv"] = _pairs + '1\t7\t8\tHe said "no\tHe said no\n0\t7\t8\tYes\tNo\n'
    ROWS[f"cola/{_part}.tsv"] = "gj04\t1\t\tThey left.\ngj04\t0\t*\tThey leaves.\n"
    _pairs = "index\tgenre\tfilename\tyear\told_index\tsource1\tsource2\tsentence1\tsentence2\tscore\n"
    ROWS[f"stsb/{_part}.tsv"] = _pairs + "0\tm\tM\t2012\t1\tn\tn\tA\tB\t3.800\n"
    _pairs = "\tlabel\n0\tA cat.\tAn animal.\tentailment\n1\tA cat.\tA dog.\tnot_entailment\n"
    ROWS[f"rte/{_part}.tsv"] = "index\tsentence1\tsentence2" + _pairs
    ROWS[f"qnli/{_part}.tsv.gz"] = "index\tquestion\tsentence" + _pairs


def write_rows(folder: Path) -> None:
    for name, content in ROWS.items():
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        if isinstance(content, list):
            content = "\n".join(map(json.dumps, content)) if name.endswith(".jsonl") else json.dumps(content, indent=1)
        encoded = content.encode("latin-1" if "20news" in name else "utf-8")
        path.write_bytes(gzip.compress(encoded) if name.endswith(".gz") else encoded)
    for part, group in itertools.product(("train", "test"), ("airplane", "cat")):
        path = folder / "cifar10" / part / group / "0000.jpg"
        path.parent.mkdir(parents=True, exist_ok=True)
        Pillow.new("RGB", (32, 32)).save(path)


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder as users have it: rows below data/, and stand-ins with the modules of the real models."""
    folder = tmp_path_factory.mktemp("recipes")
    write_rows(folder / "data")
    for name, config in STAND_INS.items():
        config.save_pretrained(folder / name)
    return folder


@functools.cache
def raw(name: str) -> dict[str, Any]:
    return read_yaml((FOLDER / f"{name}.yaml").read_text(encoding="utf-8"))


@pytest.mark.parametrize("name", NAMES)
def test_a_dry_run_on_a_stand_in(name: str, place: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(place)
    recipe = load_recipe(name)
    overrides = [f"model.path={MODELS[recipe.model.path][0]}"]
    if recipe.data.train.path == "meta-math/MetaMathQA":
        overrides.append("data.train={path: data/metamath.json}")
    prepared = load_and_prepare(Path(name), overrides)

    wanted = set(recipe.adapter["target_modules"])
    base = prepared.shapes.base_model
    adapted = {module.rpartition(".")[2] for module in base.targeted_module_names}
    if wanted == {"q_proj", "v_proj", "query", "value"}:  # either pair, as transformers' version has it
        assert adapted in ({"q_proj", "v_proj"}, {"query", "value"})
    else:
        assert adapted == wanted
    for rows in prepared.rows.values():
        for role, pattern in prepared.task.roles(rows).items():
            if not isinstance(rows.features.get(pattern), Image):
                assert str(prepared.task.values(rows, role)[0]).strip(), (role, pattern)


def layers_of(shape: str | tuple[int, int]) -> tuple[int, dict[str, tuple[int, int]]]:
    """(how many layers, module -> (d_out, d_in)) of the real model."""
    if isinstance(shape, tuple):
        count, width = shape
        return count, {name: (width, width) for name in ("query", "value", "q_proj", "v_proj")}
    config = SHAPES[shape]
    width, inner = config["hidden_size"], config["intermediate_size"]
    narrow = width // config["num_attention_heads"] * config["num_key_value_heads"]
    return config["num_hidden_layers"], {
        "q_proj": (width, width),
        "k_proj": (narrow, width),
        "v_proj": (narrow, width),
        "up_proj": (inner, width),
        "down_proj": (width, inner),
    }


def count(name: str) -> int:
    """What the adapter trains on the real model, by the method's formula."""
    recipe = load_recipe(name)
    layers, shapes = layers_of(MODELS[recipe.model.path][1])
    targets = recipe.adapter["target_modules"]
    if len(targets) == 4:
        targets = targets[:2]
    return layers * sum(recipe.method.trainable_parameters(recipe.peft_config(), *shapes[t]) for t in targets)


# by hand, from the papers' shapes: r(d_in + d_out) a module, r more for v, r^2 + 8r more for AuroRA
COUNTED = {
    "llama3_8b_commonsense_lora": 3_538_944,
    "llama3_8b_commonsense_ranlora": 3_539_264,
    "llama3_8b_commonsense_aurora": 3_542_144,
    "llama2_7b_gsm8k_ranlora": 14_025_984,
    "llama2_7b_gsm8k_lora": 112_197_632,
    "roberta_base_mrpc_ranlora": 73_776,
    "roberta_base_mrpc_aurora": 74_208,
    "roberta_base_mrpc_lora": 294_912,
    "roberta_large_mrpc_ranlora": 196_704,
    "roberta_large_mrpc_lora": 786_432,
    "vit_base_cifar10_ranlora": 73_776,
    "vit_base_cifar10_aurora": 74_208,
    "vit_base_cifar10_lora": 589_824,
    "vit_large_cifar10_ranlora": 196_704,
    "vit_large_cifar10_aurora": 197_568,
    "vit_large_cifar10_lora": 1_572_864,
    "llama2_7b_samsum_loran": 33_554_432,
    "llama2_7b_20newsgroups_qlora": 33_554_432,
    "llama2_13b_samsum_loran": 52_428_800,
}


@pytest.mark.parametrize("name", COUNTED)
def test_the_adapter_counts_what_the_formula_gives(name: str) -> None:
    assert count(name) == COUNTED[name]


@pytest.mark.parametrize("name", [n for n in NAMES if (raw(n).get("published") or {}).get("parameters")])
def test_a_printed_count_is_ours_or_a_note_says_what_ours_is(name: str) -> None:
    section, ours = raw(name)["published"], count(name)
    printed = section["parameters"]
    assert re.fullmatch(r"\d+(\.\d+)?[MK]", printed)
    digits = len(printed[:-1].partition(".")[2])
    exact = ours / {"M": 1e6, "K": 1e3}[printed[-1]]
    cut = int(exact * 10**digits) / 10**digits
    agrees = float(printed[:-1]) in (round(exact, digits), cut)
    assert agrees or any(f"the formula gives {ours:,}" in note for note in section["notes"]), (ours, printed)


def test_a_recipe_says_which_of_its_settings_are_choices() -> None:
    for name in NAMES:
        text = (FOLDER / f"{name}.yaml").read_text(encoding="utf-8")
        assert text.startswith("# ") and "\n# Source: " in text and "\n# Rows: " in text, name
        assert max(map(len, text.splitlines())) <= 130, name
        ours = "\n# Source: ours; nothing is published for this run." in text
        assert ours != ("published" in raw(name)), name
        assert ours or recipes_command.describe(name)["open"], f"{name}: papers leave something open"


@pytest.mark.parametrize("name", NAMES)
def test_every_launch_line_has_the_rows_of_a_step(name: str) -> None:
    head = "".join(
        itertools.takewhile(lambda line: line.startswith("#"), (FOLDER / f"{name}.yaml").open(encoding="utf-8"))
    )
    head = head.replace("\\\n#  ", "")
    recipe, stated = load_recipe(name), int(re.search(r"processes = (\d+) in every line", head)[1])
    lines = [line.split() for line in re.findall(r"^#   (\S.*)$", head, re.MULTILINE)]
    if name.startswith("llama") and recipe.method.name == "ranlora":
        asked = vars(prepare_arguments().parse_args(lines.pop(0)[2:]))
        targets = ",".join(recipe.adapter["target_modules"])
        wanted = {
            "model": recipe.model.path,
            "method": "ranlora",
            "init": recipe.adapter["init"],
            "dtype": recipe.model.dtype,
        }
        assert asked.items() >= (wanted | {"rank": recipe.adapter["r"], "target_modules": targets}).items()
    assert [line[0] for line in lines] == ["curvelora", "torchrun", "curvelora"]
    assert recipe.training.batch_size * recipe.training.accumulation == stated
    for line, option in zip(lines, ("--config", "--config", "--recipe"), strict=True):
        assert line[line.index(option) + 1] == name
        changed = load_recipe(name, [word for word in line if re.match(r"training\.\w+=", word)]).training
        value = lambda key: int(line[line.index(key) + 1]) if key in line else 1  # noqa: B023, E731
        processes = value("--nproc-per-node") * value("--nodes") * value("--gpus-per-node")
        assert changed.batch_size * changed.accumulation * processes == stated, line


def prepare_arguments() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser()
    prepare_command.add_arguments(parser)
    return parser


# keys in which a recipe and its counterpart may differ
ALWAYS = {"name", "output", "adapter", "published"}


def differences(one: str, other: str) -> set[str]:
    a, b = raw(one), raw(other)
    top = {key for key in a.keys() | b.keys() if key != "training" and a.get(key) != b.get(key)}
    own, others = a["training"], b["training"]
    return top - ALWAYS | {f"training.{k}" for k in own.keys() | others.keys() if own.get(k) != others.get(k)}


def test_counterparts_differ_in_the_adapter_alone() -> None:
    stems: dict[str, set[str]] = {}
    for name in NAMES:
        stem, _, method = name.rpartition("_")
        stems.setdefault(stem, set()).add(method)
        assert raw(name)["adapter"]["method"] == method and raw(name)["output"] == f"runs/{name}"
    for stem, methods in stems.items():
        linear = {"lora", "qlora"} & methods
        assert linear and len(methods) > 1, f"{stem} has nothing to be compared with"
        pairs = [("loran", "qlora"), ("ranlora", "lora")]
        if not any("published" in raw(f"{stem}_{method}") for method in ("ranlora", "aurora") if method in methods):
            pairs += [("ranlora", "qlora"), ("aurora", "qlora")]  # what no paper has is trained as its QLoRA is
        for own, other in pairs:
            if {own, other} <= methods:
                stated = {"training.learning_rate"} if stem == "llama3_8b_commonsense" else set()
                assert differences(f"{stem}_{own}", f"{stem}_{other}") <= stated
        if {"aurora", "ranlora"} <= methods:  # each paper has its own rate, epochs and seed
            stated = {"seed", "training.learning_rate", "training.epochs"}
            assert differences(f"{stem}_aurora", f"{stem}_ranlora") <= stated


def test_one_method_has_one_adapter_for_a_model_family() -> None:
    """What differs between two recipes of a method is what their papers state, or the names of modules."""
    found: dict[str, dict[str, set[str]]] = {}
    for name in NAMES:
        for key, value in raw(name)["adapter"].items():
            found.setdefault(name.rpartition("_")[2], {}).setdefault(key, set()).add(str(value))
    varied = {(m, key) for m, options in found.items() for key, values in options.items() if len(values) > 1}
    stated = {(m, "target_modules") for m in found} | {(m, k) for m in ("lora", "ranlora") for k in ("r", "alpha")}
    small = {
        (m, key) for m in ("loran", "qlora") for key in ("r", "alpha", "dropout")
    }  # as small as RanLoRA, beside it
    assert varied <= stated | small


def test_recipes_are_found_by_name_and_by_path(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert recipes.find("demo") == recipes.find("demo.yaml") == recipes.folder() / "demo.yaml"
    assert recipes.folder().resolve() == FOLDER and set(NAMES) | OLDER == set(recipes.names())
    own = tmp_path / "demo.yaml"
    own.write_text("{}")
    assert recipes.find(own) == own
    monkeypatch.chdir(tmp_path)
    assert recipes.find("demo.yaml") == Path("demo.yaml")  # a file that is there comes first
    near = ["llama2_7b_samsun_loran does not exist", "'llama2_7b_samsum_loran'", "curvelora recipes"]
    for wrong, words in (("llama2_7b_samsun_loran", near), ("here/demo.yaml", ["here/demo.yaml does not exist"])):
        with pytest.raises(UserError) as caught:
            load_recipe(wrong)
        assert all(word in str(caught.value) for word in words) and "\n" not in str(caught.value)


def test_recipes_outside_of_a_clone_are_found(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """As a wheel has them: share/curvelora/recipes beside the package, or below the environment."""
    monkeypatch.setattr(recipes, "__file__", str(tmp_path / "curvelora_training/recipes.py"))
    monkeypatch.setattr(recipes.sysconfig, "get_path", lambda name: str(tmp_path / "environment"))
    with pytest.raises(UserError, match="name a recipe by its path"):
        recipes.folder()
    shared = tmp_path / "environment" / recipes.SHARED
    shared.mkdir(parents=True)
    (shared / "demo.yaml").write_text("{}")
    assert recipes.find("demo") == shared / "demo.yaml"


def test_the_command_lists_recipes_and_prints_one(capsys: pytest.CaptureFixture[str]) -> None:
    parse = lambda *words: recipes_command.run(recipes_command.argparse.Namespace(name=words[0] if words else None))  # noqa: E731
    assert parse() == 0
    lines = capsys.readouterr().out.splitlines()
    assert [line.split()[0] for line in lines] == recipes.names()
    line = next(line for line in lines if line.startswith("llama2_70b_samsum_loran "))
    assert line.split() == ["llama2_70b_samsum_loran", "meta-llama/Llama-2-70b-hf", "causal_lm", "loran", "ours"]
    assert parse("demo") == 0
    assert capsys.readouterr().out == (FOLDER / "demo.yaml").read_text(encoding="utf-8")
    assert recipes_command.describe("roberta_base_mrpc_aurora")["open"].split(", ")[:2] == ["dtype", "dropout"]


def test_the_published_section_is_checked() -> None:
    good = dict(raw("llama3_8b_commonsense_aurora"))
    assert parse_recipe(good, "r").published.metrics["average_of_8_merged_accuracy"] == 0.836
    good["published"] = {"metrics": {"accuracy": "high"}, "parameter": "3.5M", "notes": "one"}
    with pytest.raises(RecipeError) as caught:
        parse_recipe(good, "r")
    problems = sorted(caught.value.problems)
    assert [problem.partition(":")[0] for problem in problems] == [
        "published.metrics.accuracy",
        "published.notes",
        "published.parameter",
        "published.source is missing",
    ]
    assert "did you mean 'parameters'" in problems[2]


def test_what_a_paper_prints_may_change_when_a_run_is_resumed(tmp_path: Path) -> None:
    recipe = load_recipe("llama3_8b_commonsense_aurora", [f"output={tmp_path}"])
    (tmp_path / "config.yaml").write_text(recipe.as_yaml(), encoding="utf-8")
    recipe.published = None
    check_same_recipe(recipe)
    recipe.training.learning_rate *= 2
    with pytest.raises(UserError, match=r"training\.learning_rate"):
        check_same_recipe(recipe)


def test_methods_of_recipes_are_known() -> None:
    assert (
        {raw(name)["adapter"]["method"] for name in NAMES}
        == {"loran", "qlora", "lora", "ranlora", "aurora"}
        <= set(METHODS)
    )

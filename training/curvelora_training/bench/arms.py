"""The arms of a comparison: which method, with which options, and how it is computed.

An arm is named `method[:variant][@switch...]`, for example `qlora`, `loran:sinter`, `loran:identity@fp32`, `qlora@eager@liger`.

    @fp32    end to end: base, products and adapter in fp32 with TF32 off, as a control for what bf16 takes away
    @eager   without the fused kernels for adapters, which other arms take where a layer can
    @fp8     LoRAN's gradients partly from products in FP8, where their error is bounded
    @liger   with liger-kernel's kernels in the rest of the model
    @keep=N  the last N layers keep the results of large products under gradient checkpointing

Own arms are given as `NAME=method[@switch...],option=value,...`.
"""

from __future__ import annotations

import dataclasses
from dataclasses import asdict, dataclass, field
from typing import Any

import yaml

from curvelora.activations import NAMES
from curvelora.errors import UserError, nearest
from curvelora.registry import METHODS
from curvelora_training.config import read_yaml

# variant -> options and how a reader calls it. `sinter-large` is the positive control: an amplitude that bf16 resolves.
LORAN_VARIANTS: dict[str, tuple[dict[str, Any], str]] = {
    name: ({"activation": name}, f"LoRAN {name}") for name in NAMES if name != "sinter"
} | {
    "sinter": ({"activation": "sinter"}, "LoRAN Sinter (a = 5e-5)"),
    "sinter-large": ({"activation": "sinter", "amplitude": 2e-2}, "LoRAN Sinter (a = 2e-2)"),
}
FULL = "full"
PLAIN = {"lora": "LoRA", "qlora": "QLoRA", "loran": "LoRAN Sinter (a = 5e-5)", "ranlora": "RanLoRA", "aurora": "AuroRA"}
PLAIN |= {"neat": "NEAT", "moslora": "MoSLoRA", "pissa": "PiSSA", "milora": "MiLoRA", "olora": "OLoRA"}
SWITCHES = {"fp32": "@fp32", "eager": "@eager", "fp8": "@fp8", "liger": "@liger", "keep": "@keep=N"}
DEFAULT_ARMS = "qlora,loran:identity,loran:sinter,loran:sinter-large,ranlora,aurora"


@dataclass(frozen=True, kw_only=True)
class Switches:
    """How an arm is computed, whatever its method; see the module. Each is written `@name`, `@keep` with a number of layers."""

    fp32: bool = False
    eager: bool = False
    fp8: bool = False
    liger: bool = False
    keep: int = 0

    @property
    def said(self) -> str:
        """As the end of a label."""
        words = {
            ", eager": self.eager,
            ", FP8": self.fp8,
            ", Liger": self.liger,
            f", products of {self.keep} layers kept": self.keep,
        }
        return " in fp32" * self.fp32 + "".join(word for word, on in words.items() if on)


@dataclass(frozen=True)
class Arm(Switches):
    """One arm.

    Args:
        key: its name in files and on the command line.
        label: its name in reports.
        method: a name of the registry, or `full` (fine-tuning of the adapted layers' weights themselves).
        options: the method's options that make it this arm.
        learning_rate: its own, where a sweep varies it.
    """

    key: str
    label: str
    method: str
    options: dict[str, Any] = field(default_factory=dict)
    learning_rate: float | None = None

    @property
    def slug(self) -> str:
        """The name as a folder."""
        return "".join(c if c.isalnum() or c in "-." else "_" for c in self.key)

    def as_dict(self) -> dict[str, Any]:
        """Plain data, for JSON."""
        return dataclasses.asdict(self)


def parse_arms(names: str, own: list[str] = ()) -> list[Arm]:
    """The arms that a command line names, in its order; the first one is the baseline of every ratio.

    Args:
        names: comma-separated names.
        own: definitions `NAME=method,option=value,...`, appended.

    Raises:
        UserError: every name or option that is unknown, or a name that occurs twice.
    """
    arms, problems = [], []
    for text, parse in [*((n, named_arm) for n in names.split(",") if n), *((d, own_arm) for d in own)]:
        try:
            arms.append(parse(text.strip()))
        except UserError as error:
            problems.append(str(error))
    named: dict[str, list[str]] = {}
    for arm in arms:
        named.setdefault(arm.slug, []).append(arm.key)
    for keys in named.values():
        if len(keys) > 1 and len(set(keys)) == 1:
            problems.append(f"arm {keys[0]!r} is named twice")
        elif len(keys) > 1:
            problems.append(f"arms {', '.join(map(repr, keys))} would share one folder: give one of them another name")
    if not arms and not problems:
        problems.append(f"--arms names no arm: write for example {DEFAULT_ARMS}")
    if problems:
        raise UserError("; ".join(problems))
    return arms


def named_arm(text: str) -> Arm:
    """`loran:sinter@fp32` -> its arm. Raises `UserError` where the name or a switch is unknown."""
    name, switches = split_switches(text)
    method, colon, variant = name.partition(":")
    if method == FULL and not colon:
        return Arm(text, f"full fine-tuning of these layers{switches.said}", FULL, **asdict(switches))
    # of PEFT's own methods those whose update is s B A on an untouched base
    layered = [name for name, m in METHODS.items() if m.provided_by == "curvelora" and name != FULL]
    known = ["lora", "qlora", "rslora", *layered]
    if method not in known:
        raise UserError(f"unknown arm {text!r}{nearest(method, [*known, FULL])} (methods: {', '.join([*known, FULL])})")
    if not colon:
        return Arm(text, PLAIN.get(method, method) + switches.said, method, **asdict(switches))
    if method != "loran" or variant not in LORAN_VARIANTS:
        raise UserError(
            f"arm {text!r}: there is no such variant{nearest(variant, LORAN_VARIANTS)} (loran has {', '.join(LORAN_VARIANTS)}; "
            "an arm with other options is written --arm NAME=method,option=value)"
        )
    options, label = LORAN_VARIANTS[variant]
    return Arm(text, label + switches.said, method, dict(options), **asdict(switches))


def split_switches(text: str) -> tuple[str, Switches]:
    """`qlora@eager@keep=8` -> `qlora` and its switches. Raises `UserError` for one that is unknown, or written twice."""
    name, *written = text.split("@")
    found: dict[str, bool | int] = {}
    for switch in written:
        key, equals, value = switch.partition("=")
        right = value.isdecimal() and int(value) > 0 if key == "keep" else not equals
        if key not in SWITCHES or not right:
            known = ", ".join(SWITCHES.values())
            raise UserError(f"arm {text!r}: there is no switch '@{switch}'{nearest(key, SWITCHES)} (known: {known})")
        if key in found:
            raise UserError(f"arm {text!r} has @{key} twice")
        found[key] = int(value) if key == "keep" else True
    if {"eager", "fp8"} <= found.keys():
        raise UserError(f"arm {text!r}: FP8 is in the kernels, which @eager leaves out: write one of the two")
    return name, Switches(**found)


def own_arm(text: str) -> Arm:
    """`mine=loran,amplitude=1e-3` -> its arm. Raises `UserError` for a method or an option that does not exist."""
    name, separator, definition = text.partition("=")
    method, *settings = definition.split(",")
    if not separator or not any(c.isalnum() for c in name) or not method:
        raise UserError(
            f"--arm {text!r} is not understood: write NAME=method,option=value, for example mine=loran,r=16"
        )
    start = named_arm(method)
    options = dict(start.options)
    for setting in settings:
        key, equals, value = setting.partition("=")
        if not equals:
            raise UserError(f"--arm {text!r}: {setting!r} is no option=value")
        try:
            options[key] = read_yaml(value)
        except yaml.YAMLError as error:
            raise UserError(f"--arm {text!r}: {value!r} is no value that YAML can read") from error
    if start.method == FULL and options:
        raise UserError(f"--arm {text!r}: full fine-tuning has no options")
    if options.get("use_dora"):
        raise UserError(
            f"--arm {text!r}: DoRA's update is not s B A, which is what is measured here: leave use_dora out"
        )
    if start.method != FULL:
        METHODS[start.method].build_config(**options)
    label = f"{name} ({', '.join([PLAIN.get(start.method, start.method), *settings])}){start.said}"
    return dataclasses.replace(start, key=name, label=label, options=options)

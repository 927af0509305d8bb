"""The command `curvelora`. Each sub-command is a module with `add_arguments(parser)` and `run(args) -> int`, or a group of them:
a module with `COMMANDS`, sub-command -> (module, what it does).

Packages add sub-commands through the entry-point group `curvelora.commands`, so this package knows nothing of the others but
which one to name when it is missing.
"""

from __future__ import annotations

import argparse
import contextlib
import logging
import os
import sys
import traceback
import warnings
from importlib import import_module
from importlib.metadata import EntryPoint, entry_points
from pathlib import Path
from types import ModuleType

from curvelora.errors import UserError, nearest

GROUP = "curvelora.commands"
# command -> the package that brings it and what it does; for help and for the message when the package is missing
HOME = {
    "methods": ("curvelora", "list the methods, or explain one"),
    "prepare": ("curvelora", "compute the singular factors that a method starts from, once"),
    "fetch": ("curvelora-training", "bring a recipe's model, rows and wheels to machines without network"),
    "preflight": ("curvelora-training", "whether all nodes of a job are fit to begin, and why not"),
    "train": ("curvelora-training", "fine-tune a model from a recipe"),
    "launch": ("curvelora-training", "submit a recipe to SLURM, on one node or many"),
    "status": ("curvelora-training", "how runs stand, from their folders alone"),
    "bench": (
        "curvelora-training",
        "what a nonlinearity costs, whether it is stable and whether it is there, beside QLoRA",
    ),
    "sweep": ("curvelora-training", "train over a grid of amplitudes, frequencies, ranks or rates"),
    "matrix": ("curvelora-training", "every method under every engine, against one process"),
    "tasks": ("curvelora-eval", "list the named tasks, or explain one"),
    "eval": ("curvelora-eval", "score adapters on named tasks or on your own rows, offline"),
    "lm-eval": ("curvelora-eval", "run lm-evaluation-harness with an adapter, on our tasks or its own"),
    "compare": ("curvelora-eval", "whether one adapter is better than another on the same rows"),
    "merge": ("curvelora-eval", "add an adapter to the weights of its base, and measure what that changes"),
    "extract": ("curvelora-eval", "a plain LoRA from an adapter, for servers that know LoRA only, with the error"),
    "report": ("curvelora-eval", "one page and one table from run folders"),
}
USER_ERROR = 2


def installed_commands() -> dict[str, EntryPoint]:
    """Sub-command -> entry point, for every package that is installed."""
    return {point.name: point for point in entry_points(group=GROUP)}


def main(argv: list[str] | None = None) -> int:
    """Run one sub-command; returns the exit code (2 for bad input)."""
    argv = list(sys.argv[1:] if argv is None else argv)
    commands = installed_commands()
    if not argv or argv[0] in ("-h", "--help"):
        print(_help(commands))
        return 0
    if argv[0] == "--version":
        from curvelora import __version__

        print(f"curvelora {__version__}")
        return 0
    name, rest = argv[0], argv[1:]
    return run_guarded(lambda: _dispatch(name, rest, commands), debug="--debug" in rest)


def _dispatch(name: str, rest: list[str], commands: dict[str, EntryPoint]) -> int:
    if name not in commands:
        if name in HOME:
            package = HOME[name][0]
            raise UserError(
                f"`curvelora {name}` is part of the package {package}: install it with `pip install {package}`"
            )
        raise UserError(f"unknown command {name!r}{nearest(name, HOME | commands)} (see `curvelora --help`)")
    command = commands[name].load()
    if not hasattr(command, "COMMANDS"):
        return run_module(command, f"curvelora {name}", rest)
    if not rest or rest[0] not in command.COMMANDS:
        return _group_help(name, command, rest)
    return run_module(import_module(command.COMMANDS[rest[0]][0]), f"curvelora {name} {rest[0]}", rest[1:])


def _group_help(name: str, group: ModuleType, rest: list[str]) -> int:
    """Print what the group has. Raises `UserError` for a sub-command that it has not."""
    if rest and not rest[0].startswith("-"):
        raise UserError(
            f"unknown command {f'{name} {rest[0]}'!r}{nearest(rest[0], group.COMMANDS)} (see `curvelora {name} --help`)"
        )
    lines = [f"usage: curvelora {name} COMMAND [options]", "", (group.__doc__ or "").strip(), "", "commands:"]
    lines += [f"  {sub:<10} {text}" for sub, (_, text) in group.COMMANDS.items()]
    print("\n".join(lines))
    return 0


def run_module(command: ModuleType, program: str, argv: list[str]) -> int:
    """Parse `argv` for one command module and run it."""
    quiet_libraries()
    parser = argparse.ArgumentParser(
        prog=program, description=command.__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--debug", action="store_true", help="show the traceback of an error")
    command.add_arguments(parser)
    return command.run(parser.parse_intermixed_args(argv))


def quiet_libraries() -> None:
    """Silence what libraries say on every start and no user can act on; everything else is left alone."""
    # peft 0.21 with transformers 5.23: PEFT's own code uses the old name
    warnings.filterwarnings("ignore", message=".*is_gradient_checkpointing.* is deprecated")
    # torch 2.13: a new name for what transformers and accelerate pass on
    warnings.filterwarnings("ignore", message="`broadcast_buffers` is deprecated")
    # DeepSpeed says so on every machine without a GPU, also where it is not used
    logging.getLogger("DeepSpeed").addFilter(lambda record: "Setting accelerator to CPU" not in record.getMessage())


def run_guarded(action, debug: bool = False) -> int:
    """Run `action() -> exit code`; bad input becomes one sentence on stderr and exit code 2, with a traceback if `debug`.

    An `OSError` (disk full, read-only, no such file) is the user's to mend as well, so it is treated alike.
    """
    code = _guarded(action, debug)
    _keep(code)
    return code


def _keep(code: int) -> None:
    """Write the exit code where a job script asks for it: launchers answer 1 whatever their processes said."""
    if folder := os.environ.get("CURVELORA_EXIT_CODES"):
        with contextlib.suppress(OSError):
            Path(folder, os.environ.get("RANK", "0")).write_text(f"{code}\n", encoding="ascii")


def _guarded(action, debug: bool) -> int:
    try:
        code = action()
        sys.stdout.flush()  # a closed pipe shows here, not at exit
        return code
    except BrokenPipeError:  # before OSError, which it is: `curvelora methods | head -1` is no error
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 0
    except (UserError, OSError) as error:
        with contextlib.suppress(OSError):  # a log on the disk that is full
            if debug:
                traceback.print_exc()
            print(f"error: {_sentence(error)}", file=sys.stderr, flush=True)
        return USER_ERROR
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        return 130


def _sentence(error: Exception) -> str:
    if isinstance(error, OSError) and error.strerror:
        where = f" ({error.filename})" if error.filename else ""
        return f"{error.strerror}{where}"
    return str(error)


def _help(commands: dict[str, EntryPoint]) -> str:
    lines = ["usage: curvelora COMMAND [options]", "", "Nonlinear low-rank adapters for transformers.", "", "commands:"]
    for name, (package, text) in HOME.items():
        lines.append(f"  {name:<10} {text}" + ("" if name in commands else f"  (needs {package})"))
    for name in sorted(set(commands) - set(HOME)):
        lines.append(f"  {name:<10} (from {commands[name].value.split('.')[0]})")
    lines += ["", "`curvelora COMMAND --help` explains one; `--debug` after a command shows the traceback of an error."]
    return "\n".join(lines)


if __name__ == "__main__":
    sys.exit(main())

"""The command `curvelora`: the list of methods, and errors that are one sentence with a remedy."""

from __future__ import annotations

import io
import json
import subprocess
import sys
import types

import pytest

import curvelora
from curvelora import METHODS, cli


def run(capsys, *argv: str) -> tuple[int, str, str]:
    code = cli.main(list(argv))
    captured = capsys.readouterr()
    return code, captured.out, captured.err


def test_methods_lists_every_method_on_one_line(capsys):
    code, out, err = run(capsys, "methods")
    assert (code, err) == (0, "")
    assert [line.split()[0] for line in out.splitlines()] == ["method", *METHODS]


def test_methods_as_json(capsys):
    code, out, _ = run(capsys, "methods", "--json")
    listed = json.loads(out)
    assert code == 0 and [method["name"] for method in listed] == list(METHODS)
    for method in listed:
        assert {"name", "family", "merge", "identity_at_init", "paper", "provided_by"} <= set(method)
        assert method["merge"] in ("exact", "approximate", "impossible", "when_annealed")
        assert isinstance(method["identity_at_init"], bool)


def test_one_method_as_json_is_one_object(capsys):
    described = json.loads(run(capsys, "methods", "loran", "--json")[1])
    assert (
        described["name"] == "loran" and described["defaults"]["amplitude"] == 5e-5 and described["defaults"]["r"] == 64
    )


@pytest.mark.parametrize("name", METHODS)
def test_every_method_is_explained(capsys, name):
    code, out, _ = run(capsys, "methods", name)
    assert code == 0
    assert METHODS[name].formula in out and METHODS[name].paper in out and METHODS[name].title in out
    assert "Traceback" not in out


def test_loran_is_explained_with_its_defaults_and_caveats(capsys):
    out = run(capsys, "methods", "loran")[1]
    for expected in (
        "2509.21870",
        "amplitude: 5e-05",
        "frequency: 10000",
        "dropout: 0.2",
        "merge             exact",
        "caveats",
    ):
        assert expected in out


@pytest.mark.parametrize(
    ("argv", "said"),
    [
        (["methods", "loarn"], "unknown method 'loarn'; did you mean 'loran'?"),
        (["methodz"], "unknown command 'methodz'; did you mean 'methods'?"),
        (["trian"], "unknown command 'trian'; did you mean 'train'?"),
        (["zzzzzz"], "unknown command 'zzzzzz' (see `curvelora --help`)"),
    ],
)
def test_bad_input_is_one_sentence_and_code_2(capsys, argv, said):
    code, out, err = run(capsys, *argv)
    assert (code, out) == (2, "")
    assert said in err and err.startswith("error: ") and len(err.splitlines()) == 1


def test_debug_shows_the_traceback(capsys):
    code, _, err = run(capsys, "methods", "loarn", "--debug")
    assert code == 2 and "Traceback" in err and "get_method" in err and "did you mean 'loran'?" in err


@pytest.mark.parametrize(
    ("command", "package"),
    [
        ("train", "curvelora-training"),
        ("eval", "curvelora-eval"),
        ("merge", "curvelora-eval"),
        ("report", "curvelora-eval"),
    ],
)
def test_a_command_of_a_missing_package_names_the_package(capsys, monkeypatch, command, package):
    monkeypatch.setattr(cli, "installed_commands", dict)
    code, _, err = run(capsys, command, "recipe.yaml")
    assert code == 2 and f"pip install {package}" in err and len(err.splitlines()) == 1


@pytest.mark.parametrize("argv", [[], ["--help"], ["-h"]])
def test_help_names_every_command_and_what_it_needs(capsys, monkeypatch, argv):
    monkeypatch.setattr(cli, "installed_commands", dict)
    code, out, _ = run(capsys, *argv)
    assert code == 0
    for name, (package, text) in cli.HOME.items():
        assert f"{text}  (needs {package})" in out and name in out


def test_version(capsys):
    assert run(capsys, "--version") == (0, f"curvelora {curvelora.__version__}\n", "")


@pytest.mark.parametrize(
    ("error", "code", "said"),
    [
        (FileNotFoundError(2, "No such file or directory", "a.yaml"), 2, "error: No such file or directory (a.yaml)\n"),
        (OSError(28, "No space left on device"), 2, "error: No space left on device\n"),
        (curvelora.UserError("write r <= 4"), 2, "error: write r <= 4\n"),
        (KeyboardInterrupt(), 130, "interrupted\n"),
    ],
)
def test_errors_that_the_user_can_mend(capsys, error, code, said):
    def action():
        raise error

    assert cli.run_guarded(action) == code
    assert capsys.readouterr().err == said


def test_an_error_of_ours_keeps_its_traceback():
    with pytest.raises(ZeroDivisionError):
        cli.run_guarded(lambda: 1 // 0)


def test_the_installed_command_and_a_closed_pipe():
    """One real process: the entry point is found, and a reader who stops early (`| head -1`) is no error."""
    command = [sys.executable, "-m", "curvelora.cli", "methods", "--json"]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    process.stdout.close()
    _, err = process.communicate(timeout=120)
    assert process.returncode == 0, err
    assert "error:" not in err and "Traceback" not in err and "BrokenPipe" not in err


@pytest.fixture
def group(monkeypatch):
    """A command `toys` of two sub-commands, beside the installed ones."""
    pieces = types.ModuleType("toys", "Things to play with.")
    pieces.COMMANDS = {"ball": ("toys_ball", "throw it"), "kite": ("toys_kite", "let it fly")}
    for name in ("ball", "kite"):
        module = types.ModuleType(f"toys_{name}", f"Take the {name}.")
        module.add_arguments = lambda parser: parser.add_argument("--times", type=int, default=1)
        module.run = lambda args, name=name: print(f"{name} {args.times}") or 3
        monkeypatch.setitem(sys.modules, module.__name__, module)
    point = types.SimpleNamespace(load=lambda: pieces, value="toys")
    before = cli.installed_commands
    monkeypatch.setattr(cli, "installed_commands", lambda: before() | {"toys": point})


def test_a_sub_command_of_a_group_is_run(capsys, group):
    assert run(capsys, "toys", "kite", "--times", "4") == (3, "kite 4\n", "")


@pytest.mark.parametrize("argv", [[], ["--help"], ["-h"]])
def test_a_group_lists_its_sub_commands(capsys, group, argv):
    code, out, err = run(capsys, "toys", *argv)
    assert (code, err) == (0, "")
    assert out.startswith("usage: curvelora toys COMMAND") and "Things to play with." in out
    assert [line.split() for line in out.splitlines()[-2:]] == [["ball", "throw", "it"], ["kite", "let", "it", "fly"]]


def test_an_unknown_sub_command_is_named_with_the_nearest(capsys, group):
    code, out, err = run(capsys, "toys", "kit")
    assert (code, out) == (2, "") and len(err.splitlines()) == 1
    assert "unknown command 'toys kit'; did you mean 'kite'? (see `curvelora toys --help`)" in err


def test_a_sub_command_has_help_of_its_own(capsys, group):
    with pytest.raises(SystemExit) as left:
        cli.main(["toys", "ball", "--help"])
    out = capsys.readouterr().out
    assert left.value.code == 0 and out.startswith("usage: curvelora toys ball") and "Take the ball." in out


def test_debug_of_a_sub_command_shows_the_traceback(capsys, group, monkeypatch):
    def fail(args):
        raise curvelora.UserError("no wind")

    monkeypatch.setattr(sys.modules["toys_kite"], "run", fail)
    assert run(capsys, "toys", "kite")[2] == "error: no wind\n"
    assert "Traceback" in run(capsys, "toys", "kite", "--debug")[2]


def test_every_sub_command_of_the_installed_groups_is_there(capsys):
    for name, point in cli.installed_commands().items():
        for sub, (module, text) in getattr(point.load(), "COMMANDS", {}).items():
            assert text
            with pytest.raises(SystemExit) as left:
                cli.main([name, sub, "--help"])
            assert left.value.code == 0, module
            assert capsys.readouterr().out.startswith(f"usage: curvelora {name} {sub}")


def test_exit_codes_are_kept_for_job_scripts(tmp_path, monkeypatch, capsys):
    """A file a process, none from one that crashed; a message or a code that cannot be written is no error of its own."""
    monkeypatch.setenv("CURVELORA_EXIT_CODES", str(tmp_path))

    def wrong() -> int:
        raise cli.UserError("the disk is full")

    for rank, action in (("0", lambda: 75), ("3", wrong)):
        monkeypatch.setenv("RANK", rank)
        cli.run_guarded(action)
    monkeypatch.setenv("RANK", "4")
    with pytest.raises(ZeroDivisionError):
        cli.run_guarded(lambda: 1 // 0)
    assert {path.name: path.read_text() for path in tmp_path.iterdir()} == {"0": "75\n", "3": "2\n"}

    class Full(io.StringIO):
        def write(self, text: str) -> int:
            raise OSError(28, "No space left on device")

    with monkeypatch.context() as patched:
        patched.setattr("sys.stderr", Full())
        assert cli.run_guarded(wrong) == cli.USER_ERROR
    monkeypatch.setenv("CURVELORA_EXIT_CODES", str(tmp_path / "gone"))
    assert cli.run_guarded(lambda: 0) == 0

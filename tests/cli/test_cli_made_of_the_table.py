"""What is made from the table of commands: parsers, completions, reference pages; and how fast a command starts."""

from __future__ import annotations

import importlib
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from supervisor.cli.commands import COMMANDS, GLOBAL
from supervisor.cli.completion import script
from supervisor.cli.parser import build, help_of
from supervisor.cli.reference import pages

ROOT = Path(__file__).parents[2]

CONTRACT = {
    "daemon": "--config --dsn --state --socket --on-term",
    "submit": "--set --kind --many --after --follow --wait --key",
    "ps": "--state --kind --label --all --limit",
    "show": "",
    "attempts": "",
    "logs": "-f --step --stream --attempt --since-offset --raw",
    "wait": "--any --timeout",
    "stop": "--grace --kill --state --kind --label --all --limit --yes",
    "retry": "--state --kind --label --all --limit --yes",
    "delete": "--state --kind --label --all --limit --yes",
    "status": "",
    "hosts": "",
    "drain": "--wait --deadline",
    "resume": "",
    "reload": "",
    "events": "-f",
    "actors": "",
    "config": "",
    "doctor": "",
    "migrate": "",
    "version": "",
    "completion": "",
    "demo": "",
}


def test_names_and_flags_are_those_that_were_promised() -> None:
    assert {command.name for command in COMMANDS} == set(CONTRACT)
    for command in COMMANDS:
        known = set(build(command)._option_string_actions)
        assert {"--json", "--socket", *CONTRACT[command.name].split()} <= known


def test_every_command_has_its_function_and_its_help() -> None:
    for command in COMMANDS:
        assert callable(getattr(importlib.import_module(f"supervisor.cli.{command.module}"), command.function))
        text = help_of(command, 100)
        assert all(name in text for argument in command.arguments for name in argument.names if name.startswith("-"))


@pytest.mark.parametrize("shell", ["bash", "zsh", "fish"])
def test_completion_is_a_script_of_its_shell(shell: str, tmp_path: Path) -> None:
    text = script(shell)
    assert all(command.name in text for command in COMMANDS)
    if shutil.which(shell) is not None:
        file = tmp_path / "script"
        file.write_text(text)
        done = subprocess.run([shell, "-n", str(file)], capture_output=True, text=True)
        assert (done.returncode, done.stderr) == (0, "")


@pytest.mark.parametrize(
    ("typed", "offered"),
    [
        (["st"], {"stop", "status"}),
        (["logs", "--str"], {"--stream"}),
        (["logs", "--stream", ""], {"out", "err"}),
        (["--socket", "x", "completion", "z"], {"zsh"}),
        (["ps", "--state", "s"], {"suspended", "succeeded"}),
    ],
)
def test_bash_offers_what_fits(typed: list[str], offered: set[str]) -> None:
    words = " ".join(f"'{word}'" for word in ["bsup", *typed])
    code = (
        f"{script('bash')}\nCOMP_WORDS=({words}); COMP_CWORD={len(typed)}; _bsup; printf '%s\\n' \"${{COMPREPLY[@]}}\""
    )
    done = subprocess.run(["bash", "-c", code], capture_output=True, text=True)
    assert (set(done.stdout.split()), done.stderr) == (offered, "")


def test_the_reference_pages_are_up_to_date() -> None:
    """`python -m supervisor.cli.reference` writes them."""
    for path, text in pages(ROOT).items():
        assert path.read_text() == text, path


@pytest.mark.parametrize("words", [["--help"], ["status", "--socket", "/nonexistent"], ["ps", "--help"]])
def test_a_start_imports_nothing_slow(words: list[str]) -> None:
    """Commands feel instant because of what they leave out; a list of modules is a steadier test than a stopwatch."""
    code = (
        "import sys; from supervisor.cli.entry import main; main(sys.argv[1:]); "
        "slow = {'anyio', 'asyncio', 'asyncpg', 'uvloop', 'yaml', 'subprocess', 'difflib'} & set(sys.modules); "
        "sys.exit(', '.join(sorted(slow)) or 0)"
    )
    done = subprocess.run([sys.executable, "-c", code, *words], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr.splitlines()[-1:]


def test_help_needs_no_msgspec() -> None:
    code = "import sys; from supervisor.cli.entry import main; main(['--help']); sys.exit('msgspec' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True).returncode == 0


def test_global_flags_are_not_taken_twice() -> None:
    names = [name for argument in GLOBAL for name in argument.names]
    for command in COMMANDS:
        assert not set(names) & {name for argument in command.arguments for name in argument.names}

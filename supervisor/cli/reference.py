"""The reference pages of the command line and of the configuration, made from what the program itself uses.

``python -m supervisor.cli.reference`` writes ``docs/reference/cli.md`` and ``config.md``; a test holds them to what
it makes.
"""

from __future__ import annotations

import sys
from pathlib import Path

from supervisor.cli.commands import COMMANDS, GLOBAL, Argument
from supervisor.cli.exits import MEANING
from supervisor.cli.parser import flags_of, usage_of

_HEAD = """# Command line

`bsup COMMAND …`. Global flags are taken before and after the command's name. What a command was asked for goes to
standard output; progress, questions, warnings and errors go to standard error. On a terminal there are colours (not
with `NO_COLOR`) and tables that fit its width; in a pipe there is plain, uncut text.

Names, flags and the keys of `--json` are kept from version to version; keys may be added.
"""

_ENVIRONMENT = """## Environment

| variable | does |
|---|---|
| `BSUP_SOCKET` | the control socket, as `--socket` |
| `BSUP_CONFIG` | the configuration file, as `--config` |
| `BSUP_DSN` | the database, as `--dsn` |
| `NO_COLOR` | no colours, whatever its value |

A flag beats the environment, the environment beats the configuration file, the file beats the defaults.
"""

_JSON = """## JSON

With `--json` every command prints one object a line. Times are RFC 3339 in UTC, durations are seconds, sizes bytes;
null: not known, or not so.

| command | an object is |
|---|---|
| `submit` | first `id`; then with `--follow` the lines of `logs`; with it or `--wait` at last the job |
| `ps`, `wait`, `retry` | a job: at least `id`, `name`, `kind`, `state`, `exit_code` |
| `show` | a job, and `spec`, `parents`, `children`, `attempt_list` |
| `attempts` | an attempt: `id` (of the job), `attempt`, `outcome`, `exit_code`, `steps` … |
| `logs` | a piece of the log: see below |
| `stop` | `id`, `did` (`canceled`, `stopping`, `unavailable`, or the state that it had reached before), `recorded` |
| `delete` | `deleted`, a number |
| `status` | `ok`, `problems` (sentences), `host`, `running`, `database`, `isolation`, `socket`, `actors` … |
| `hosts`, `events`, `actors` | a host, an event, an actor |
| `drain` / `resume` / `reload` | `running` / `resumed` / `changed` |
| `config check` / `config show` | `ok`, `file` / the whole configuration, "auto" resolved, passwords masked |
| `doctor` | `check`, `level` (`ok`, `warn`, `fail`), `text`, `mend` |
| `migrate` | `applied`, the versions |
| `version` | `version`, `daemon` (null: none answers) |

A piece of a log has `id`, `attempt`, `offset`, `step`, `step_name`, `stream`, `at` and `text`; where its bytes are not
UTF-8 also `data`, the exact bytes in base64. At an attempt's end comes an object with `id` and `end`.
"""


def cli_page() -> str:
    """docs/reference/cli.md."""
    parts = [_HEAD, "## Global flags\n", _rows(GLOBAL)]
    for group in dict.fromkeys(command.group for command in COMMANDS):
        parts.append(f"## {group}\n")
        for command in COMMANDS:
            if command.group != group:
                continue
            parts.append(f"### bsup {command.name}\n")
            parts.append(f"```text\n{usage_of(command)}\n```\n")
            parts.append(f"{command.summary[:1].upper()}{command.summary[1:]}.\n")
            if command.notes:
                parts.append(f"{command.notes}\n")
            if command.arguments:
                parts.append(_rows(command.arguments))
            if command.examples:
                parts.append("```sh\n" + "\n".join(command.examples) + "\n```\n")
    codes = "\n".join(f"| {int(code)} | {meaning} |" for code, meaning in MEANING.items())
    parts.append(
        "## Exit codes\n\n| code | means |\n|---|---|\n" + codes + "\n\n"
        "`wait` and `submit --follow|--wait` end with the job's own exit code: 0 if it succeeded, 128+n if signal n "
        "ended it, 1 if it failed or was canceled without an exit code.\n"
    )
    parts += [_ENVIRONMENT, _JSON]
    return "\n".join(parts)


def _rows(arguments: tuple[Argument, ...]) -> str:
    rows = []
    for argument in arguments:
        flag = flags_of(argument).replace("|", "\\|")
        text = argument.help
        if argument.choices and "|".join(argument.choices) != argument.value:
            text += f": {', '.join(f'`{choice}`' for choice in argument.choices)}"
        rows.append(f"| `{flag}` | {text} |")
    return "| argument | does |\n|---|---|\n" + "\n".join(rows) + "\n"


def config_page(toml: str) -> str:
    """docs/reference/config.md, from the text of config/bsup.toml: its comments are the reference."""
    parts = ["# Configuration\n"]
    comment: list[str] = []
    for line in [*toml.splitlines(), ""]:
        if line.startswith("#"):
            comment.append(line[1:].strip())
        elif line.startswith("["):
            parts.append(f"## [{line.strip('[]')}]\n")
        elif line:
            parts.append(f"### {line.partition(' = ')[0]}\n\n```toml\n{line}\n```\n\n{chr(10).join(comment)}\n")
            comment = []
        elif comment:
            parts.append("\n".join(comment) + "\n")
            comment = []
    return "\n".join(parts)


def pages(root: Path) -> dict[Path, str]:
    """Each page's path below the checkout, and its text."""
    return {
        root / "docs/reference/cli.md": cli_page(),
        root / "docs/reference/config.md": config_page((root / "config/bsup.toml").read_text()),
    }


def main() -> None:
    root = Path(sys.argv[1] if len(sys.argv) > 1 else ".")
    for path, text in pages(root).items():
        path.write_text(text)


if __name__ == "__main__":
    main()

"""``completion``: a shell's completion script, made from the table of commands. Ids of jobs are asked of the
daemon.
"""

from __future__ import annotations

from argparse import Namespace
from collections.abc import Iterable

from supervisor.cli.commands import COMMANDS, GLOBAL, Argument, Command
from supervisor.cli.exits import Exit
from supervisor.cli.terminal import Terminal

_IDS = r"""bsup ps --all --limit 200 --json 2>/dev/null | sed -n 's/^{"id":\([0-9]*\).*/\1/p'"""


def completion(args: Namespace, terminal: Terminal) -> int:
    terminal.text(script(args.shell))
    return Exit.OK


def script(shell: str) -> str:
    """The script for bash, zsh or fish."""
    return {"bash": _bash, "zsh": _zsh, "fish": _fish}[shell]()


def _flags(command: Command | None) -> list[Argument]:
    own = [a for a in command.arguments if not a.positional] if command is not None else []
    return [*own, *GLOBAL]


def _names(arguments: Iterable[Argument]) -> list[str]:
    return [name for argument in arguments for name in argument.names]


def _positional(command: Command) -> Argument | None:
    return next((a for a in command.arguments if a.positional), None)


def _with_value(command: Command | None) -> list[Argument]:
    return [a for a in _flags(command) if a.kind != "switch"]


# --- bash ----------------------------------------------------------------------------------------------------------


def _bash() -> str:
    """One function: the command is the first word that is no flag; then its flags, values of the one before, ids."""
    cases = []
    for command in COMMANDS:
        lines = [f"        {command.name})", f'            flags="{" ".join(_names(_flags(command)))}"']
        values = [f"                {'|'.join(a.names)}) {_bash_values(a)}; return ;;" for a in _with_value(command)]
        lines += ['            case "$prev" in', *values, "            esac"]
        positional = _positional(command)
        if positional is not None:
            lines.append(f'            if [[ "$cur" != -* ]]; then {_bash_values(positional)}; return; fi')
        cases.append("\n".join([*lines, "            ;;"]))
    names = " ".join(command.name for command in COMMANDS)
    return f"""# bash completion for bsup; load it with: eval "$(bsup completion bash)"
_bsup() {{
    local cur prev word command="" flags="{" ".join(_names(GLOBAL))}" i
    cur="${{COMP_WORDS[COMP_CWORD]}}"
    prev="${{COMP_WORDS[COMP_CWORD-1]}}"
    for ((i = 1; i < COMP_CWORD; i++)); do
        word="${{COMP_WORDS[i]}}"
        case "$word" in
            --socket|--config) ((i++)) ;;
            -*) ;;
            *) command="$word"; break ;;
        esac
    done
    case "$command" in
        "")
            if [[ "$cur" != -* ]]; then COMPREPLY=($(compgen -W "{names}" -- "$cur")); return; fi
            ;;
{chr(10).join(cases)}
    esac
    COMPREPLY=($(compgen -W "$flags" -- "$cur"))
}}
complete -F _bsup bsup
"""


def _bash_values(argument: Argument) -> str:
    if argument.choices:
        return f'COMPREPLY=($(compgen -W "{" ".join(argument.choices)}" -- "$cur"))'
    if argument.kind == "id":
        return f'COMPREPLY=($(compgen -W "$({_IDS})" -- "$cur"))'
    if argument.kind == "path":
        return 'compopt -o filenames; COMPREPLY=($(compgen -f -- "$cur"))'
    return "COMPREPLY=()"


# --- zsh -----------------------------------------------------------------------------------------------------------


def _zsh() -> str:
    commands = "\n".join(f"        {_quote(f'{c.name}:{c.summary}'.replace('`', ''))}" for c in COMMANDS)
    cases = []
    for command in COMMANDS:
        specs = [_zsh_flag(a) for a in _flags(command)] + [
            _zsh_positional(a) for a in command.arguments if a.positional
        ]
        lines = " \\\n                ".join(_quote(spec) for spec in specs)
        cases.append(f"        {command.name})\n            _arguments -S \\\n                {lines}\n            ;;")
    return f"""#compdef bsup
# zsh completion for bsup; put it into a directory of $fpath as _bsup, or: source <(bsup completion zsh)
_bsup_ids() {{
    local -a ids
    ids=(${{(f)"$({_IDS})"}})
    compadd -a ids
}}
_bsup() {{
    local -a commands
    commands=(
{commands}
    )
    local i=2 command=""
    while (( i < CURRENT )); do
        case "${{words[i]}}" in
            --socket|--config) (( i++ )) ;;
            -*) ;;
            *) command="${{words[i]}}"; break ;;
        esac
        (( i++ ))
    done
    case "$command" in
        "")
            _describe command commands
            return
            ;;
    esac
    words=("$command" "${{(@)words[i+1,-1]}}")
    (( CURRENT -= i - 1 ))
    case "$command" in
{chr(10).join(cases)}
    esac
}}
if [ "$funcstack[1]" = "_bsup" ]; then _bsup "$@"; else compdef _bsup bsup; fi
"""


def _zsh_words(text: str) -> str:
    return text.replace("\\", "\\\\").replace(":", "\\:").replace("[", "\\[").replace("]", "\\]").replace("`", "")


def _zsh_flag(argument: Argument) -> str:
    # Of the names of a flag the longest does; zsh shows one line for each.
    name = max(argument.names, key=len)
    times = "*" if argument.repeat else ""
    value = "" if argument.kind == "switch" else f":{_zsh_words(argument.value)}:{_zsh_values(argument)}"
    return f"{times}{name}[{_zsh_words(argument.help)}]{value}"


def _zsh_positional(argument: Argument) -> str:
    times = "*" if argument.nargs in ("*", "+") else ""
    return f"{times}:{_zsh_words(argument.help)}:{_zsh_values(argument)}"


def _zsh_values(argument: Argument) -> str:
    if argument.choices:
        return f"({' '.join(argument.choices)})"
    return {"id": "_bsup_ids", "path": "_files"}.get(argument.kind, " ")


# --- fish ----------------------------------------------------------------------------------------------------------


def _fish() -> str:
    lines = [
        "# fish completion for bsup; put it into ~/.config/fish/completions/bsup.fish",
        "function __bsup_ids",
        f"    {_IDS}",
        "end",
        "complete -c bsup -f",
    ]
    for command in COMMANDS:
        lines.append(f"complete -c bsup -n __fish_use_subcommand -a {command.name} -d {_fish_quote(command.summary)}")
    for flag in GLOBAL:
        lines.append(_fish_flag("complete -c bsup", flag))
    for command in COMMANDS:
        begin = f"complete -c bsup -n '__fish_seen_subcommand_from {command.name}'"
        lines += [_fish_flag(begin, a) for a in command.arguments if not a.positional]
        positional = _positional(command)
        if positional is not None and (values := _fish_values(positional)):
            lines.append(f"{begin} {values}")
    return "\n".join(lines) + "\n"


def _fish_flag(begin: str, argument: Argument) -> str:
    for name in argument.names:
        begin += f" -l {name[2:]}" if name.startswith("--") else f" -s {name[1:]}"
    if argument.kind != "switch":
        begin += f" -x {values}" if (values := _fish_values(argument)) and "-F" not in values else " -r"
    return f"{begin} -d {_fish_quote(argument.help)}"


def _fish_values(argument: Argument) -> str:
    if argument.choices:
        return f"-a {_fish_quote(' '.join(argument.choices))}"
    return {"id": "-a '(__bsup_ids)'", "path": "-F"}.get(argument.kind, "")


def _fish_quote(text: str) -> str:
    return "'" + text.replace("\\", "\\\\").replace("'", "\\'").replace("`", "") + "'"


def _quote(text: str) -> str:
    return "'" + text.replace("'", "'\\''") + "'"

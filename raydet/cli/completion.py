"""`raydet completion SHELL`: scripts that complete commands, options, choices and files in bash, zsh and fish.

A script asks `raydet completion words -- WORD...` for what may stand at the cursor, so that it fits any version of
raydet. The answer comes from the table of commands and their configs, and needs neither torch nor Ray.
"""

import typing
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Literal

from raydet.cli.commands import COMMANDS
from raydet.cli.usage import GROUPS
from raydet.common.console import write_out
from raydet.common.errors import UserError
from raydet.config import default_of, fields_of, is_required
from raydet.config.fields import flag, types_in
from raydet.config.output import OutputOptions

_FILES = ":files"
"""Line of an answer: names of files fit too."""

_BASH = """\
_raydet() {
  local current="${COMP_WORDS[COMP_CWORD]}" line
  [[ $current == "=" ]] && current=""
  COMPREPLY=()
  while IFS= read -r line; do
    case $line in
      :files) compopt -o filenames 2>/dev/null; while IFS= read -r line; do COMPREPLY+=("$line"); done \\
        < <(compgen -f -- "$current") ;;
      *) COMPREPLY+=("${line%%$'\\t'*}") ;;
    esac
  done < <("${COMP_WORDS[0]}" completion words -- "${COMP_WORDS[@]:1:COMP_CWORD}" 2>/dev/null)
}
complete -F _raydet raydet
"""

_ZSH = """\
#compdef raydet
_raydet() {
  local -a answers described
  local line entry
  answers=("${(@f)$("${words[1]}" completion words -- "${(@)words[2,CURRENT]}" 2>/dev/null)}")
  for line in $answers; do
    if [[ $line == ":files" ]]; then
      _files
    else
      entry="${${line%%$'\\t'*}//:/\\\\:}"
      [[ $line == *$'\\t'* ]] && entry+=":${line#*$'\\t'}"
      described+=("$entry")
    fi
  done
  (( $#described )) && _describe -V raydet described
}
if [[ $funcstack[1] == _raydet ]]; then _raydet "$@"; else compdef _raydet raydet; fi
"""

_FISH = """\
function __raydet_complete
    set -l words (commandline -opc) (commandline -ct)
    for line in ($words[1] completion words -- $words[2..-1] 2>/dev/null)
        if test "$line" = :files
            __fish_complete_path (commandline -ct)
        else
            echo $line
        end
    end
end
complete -c raydet -f -a '(__raydet_complete)'
"""

_SCRIPTS = {"bash": _BASH, "zsh": _ZSH, "fish": _FISH}
_HELP_PAGE = """\
usage: raydet completion bash | zsh | fish

Print a script that completes commands, options, choices and file names in a shell. Once for each user:

  bash   raydet completion bash >> ~/.bash_completion
  zsh    mkdir -p ~/.zfunc && raydet completion zsh > ~/.zfunc/_raydet
         and in ~/.zshrc: fpath=(~/.zfunc $fpath); autoload -U compinit && compinit
  fish   raydet completion fish > ~/.config/fish/completions/raydet.fish

New shells then complete `raydet`. The script need not be made again when raydet changes.

Example:
  raydet completion bash
"""


@dataclass(frozen=True)
class _Option:
    """An option as the shell completes it.

    Attributes:
        takes_value: A value follows it.
        choices: Values that it accepts, if they are few.
        has_files: A value may be the name of a file or folder.
        has_several: Several values may follow it.
    """

    help: str
    takes_value: bool = True
    choices: tuple[str, ...] = ()
    has_files: bool = False
    has_several: bool = False


def run(arguments: Sequence[str]) -> int:
    """Run `raydet completion` and return its exit code.

    Raises:
        UserError: The shell is none of those that are supported.
    """
    match list(arguments):
        case ["words", "--", *words]:
            write_out("".join(f"{line}\n" for line in answers(words)))
            return 0
        case [shell] if shell in _SCRIPTS:
            write_out(_SCRIPTS[shell])
            return 0
        case [("-h" | "--help" | "help"), *_]:
            write_out(_HELP_PAGE)
            return 0
    got = f", got {' '.join(arguments)}" if arguments else ""
    raise UserError(f"completion needs a shell: {', '.join(_SCRIPTS)}{got}; see raydet completion --help")


def answers(words: Sequence[str]) -> list[str]:
    """Return what may stand at the cursor.

    Args:
        words: The command line after `raydet`, up to the cursor; the last one is being written and may be empty.

    Returns:
        Lines of a candidate, a tab and its description; `:files` for names of files.
    """
    # bash makes a word of the `=` in `--name=value`.
    *before, current = words or [""]
    before, current = [word for word in before if word != "="], "" if current == "=" else current
    return [line for line in _candidates(before, current) if line == _FILES or line.startswith(current)]


def _candidates(before: list[str], current: str) -> Iterator[str]:
    if not before:
        yield from (f"{name}\t{command.summary}" for name, command in COMMANDS.items() if " " not in name)
        yield from (f"{name}\t{text}" for name, text in GROUPS.items())
        yield "completion\tprint a script that completes raydet in a shell"
        yield from ("--help\tlist the commands", "--version\tprint the version")
        return
    name, *rest = before
    if name == "completion":
        yield from (f"{shell}\tprint the script of {shell}" for shell in _SCRIPTS if not rest)
        return
    if name in GROUPS:
        if not rest:
            formats = {own: COMMANDS[own].summary for own in COMMANDS if own.startswith(f"{name} ")}
            yield from (f"{own.removeprefix(f'{name} ')}\t{summary}" for own, summary in formats.items())
            yield "--help\tlist the formats"
            return
        name = f"{name} {rest.pop(0)}"
    if name in COMMANDS:
        options = _options(COMMANDS[name].config)
        if not COMMANDS[name].writes_page:
            del options["--open"]
        yield from _of_options(options, rest, current)


def _of_options(options: dict[str, _Option], before: list[str], current: str) -> Iterator[str]:
    given: list[str] = []
    num_values = 0
    for word in before:
        if word.startswith("--"):
            given.append(word.partition("=")[0].replace("_", "-"))
            num_values = int("=" in word)
        else:
            num_values += 1
    start, equals, _ = current.partition("=")
    if equals and start in options:
        yield from (f"{start}={choice}" for choice in options[start].choices)
        return
    last = options.get(given[-1]) if given else None
    awaits_value = last is not None and last.takes_value and num_values == 0
    if last is not None and (awaits_value or last.has_several):
        yield from last.choices
        if last.has_files and not current.startswith("-"):
            yield _FILES
    if not awaits_value:
        yield from (f"{name}\t{option.help}" for name, option in options.items() if name not in given)


def _options(config_class: Any) -> dict[str, _Option]:
    """Return the options of a command by their spelling: required ones first, those shared with others last."""
    hints = typing.get_type_hints(config_class)
    options: dict[str, _Option] = {}
    own = config_class.__annotations__
    for item in sorted(fields_of(config_class), key=lambda item: (not is_required(item), item.name not in own)):
        text, hint = item.metadata["help"], hints[item.name]
        members = types_in(hint)
        if bool in members:
            options[flag(item.name)] = _Option(text, takes_value=False)
            if is_required(item) or default_of(item) is not False:
                options[flag(f"no_{item.name}")] = _Option(f"not: {text}", takes_value=False)
            continue
        lists = [typing.get_args(member)[0] for member in members if typing.get_origin(member) is list]
        literals = [member for member in (*members, *lists) if typing.get_origin(member) is Literal]
        options[flag(item.name)] = _Option(
            text,
            choices=tuple(str(choice) for literal in literals for choice in typing.get_args(literal)),
            has_files=str in members,
            has_several=str in members and str in lists,
        )
    for item in fields_of(OutputOptions):
        options[flag(item.name)] = _Option(item.metadata["help"], takes_value=False)
    options["--config"] = _Option("YAML file with any of these options", has_files=True)
    options["--print-config"] = _Option("print the resulting config as YAML and exit", takes_value=False)
    options["--help"] = _Option("explain the options", takes_value=False)
    return options

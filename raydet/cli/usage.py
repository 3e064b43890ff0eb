"""The lists of commands: of all, and of a group such as `prepare`; which command a misspelt name may mean."""

from raydet.cli.commands import COMMANDS
from raydet.common.errors import UserError
from raydet.config.options import closest

HELP = ("-h", "--help", "help")
GROUPS = {
    "prepare": "Annotations and images in one of these formats → an images table, cleaned and optionally split.",
    "export": "A table or a checkpoint → one of these formats, which other programs read.",
}
"""The groups of commands, with what they do."""
_WITHOUT_CONFIG = ("completion", "help")


def usage(group: str = "") -> str:
    """Return the list of commands, or of those of a group; it ends with an example."""
    names = [name for name in COMMANDS if not group or name.startswith(f"{group} ")]
    program = f"raydet {group} FORMAT" if group else "raydet COMMAND"
    lines = [f"usage: {program} [options]", ""]
    lines += [GROUPS[group], ""] if group else []
    lines += [f"  {name:<20} {COMMANDS[name].summary}" for name in names]
    if group:
        lines += ["", f"{program} --help lists the options of a format."]
    else:
        lines += [
            "",
            "raydet COMMAND --help lists the options of a command. Every command reads options from --config FILE.yaml",
            "(the command line overrides it), and prints the resulting config with --print-config.",
            "--quiet prints only the result, --json all output as JSON lines; --open opens the page that it wrote.",
            "Set RAY_ADDRESS to run on a Ray cluster; without it raydet starts Ray on this machine.",
            "raydet completion --help explains how bash, zsh or fish complete commands and options.",
        ]
    # Of all commands, the example is the one that needs nothing.
    example = COMMANDS[names[0] if group else "demo"]
    return "\n".join([*lines, "", "Example:", f"  raydet {example.name} {example.example}"]) + "\n"


def unknown_command(words: list[str]) -> UserError:
    """Return the error for a command line that begins with no command; its first word may be a group."""
    name, *rest = words
    known, start, advice = [*COMMANDS, *GROUPS, *_WITHOUT_CONFIG], "", "raydet --help lists the commands"
    if name in GROUPS:
        start = f"{name} "
        known = [own.removeprefix(start) for own in COMMANDS if own.startswith(start)]
        advice = f"the formats are {', '.join(known)}"
        if not rest or rest[0].startswith("-"):
            return UserError(f"{name} needs a format: {', '.join(known)}")
        name = rest[0]
    close = closest(name, known)
    return UserError(f"unknown command `{start}{name}`; {f'did you mean `{start}{close}`?' if close else advice}")

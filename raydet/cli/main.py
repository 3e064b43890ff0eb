"""The `raydet` command: options → a config → one call → the lines of its result.

Exit codes: 0 success, 1 a failure, 2 a mistake in the input, 130 or 143 stopped by Ctrl-C or SIGTERM.
"""

import importlib
import inspect
import sys
from collections.abc import Callable, Sequence
from pathlib import PurePath
from typing import Any

import raydet
from raydet.cli.commands import COMMANDS, Command
from raydet.cli.failures import lines_of
from raydet.cli.pages import open_page
from raydet.cli.reachable import check_reachable
from raydet.cli.usage import GROUPS, HELP, unknown_command, usage
from raydet.common.console import Console, write_out
from raydet.common.errors import UserError
from raydet.common.signals import INTERRUPTED, ending_on_second_ctrl_c, ending_on_sigterm
from raydet.config import to_yaml
from raydet.config.options import load
from raydet.config.output import OutputOptions, split_output_options


def main(arguments: Sequence[str] | None = None) -> int:
    """Run a command line and return its exit code."""
    output, words = split_output_options(sys.argv[1:] if arguments is None else arguments)
    console = Console("json" if output.json else None, is_quiet=output.quiet)
    return _exit_code(lambda: _run(words, output, console), console)


def run_function(function: Callable[[Any], int | None], config_class: type) -> None:
    """Run a function of a config as a command of its own, with the options of this process; end the process.

    The function may return an exit code.
    """
    program = PurePath(sys.argv[0]).name
    raise SystemExit(_exit_code(lambda: function(load(config_class, sys.argv[1:], program=program)), Console()))


def _exit_code(function: Callable[[], int | None], console: Console) -> int:
    try:
        with ending_on_second_ctrl_c(), ending_on_sigterm():
            return function() or 0
    except Exception as error:
        lines, code = lines_of(error)
        console.failure(lines, code)
        return code
    except KeyboardInterrupt:
        console.failure([INTERRUPTED], 130)
        return 130


def run_job(name: str) -> None:
    """Run a command, or a group of commands such as `prepare`, with the options of this process; end the process."""
    raise SystemExit(main([name, *sys.argv[1:]]))


def _run(arguments: list[str], output: OutputOptions, console: Console) -> int:
    if arguments and arguments[0] in HELP and arguments[1:]:  # `raydet help train`
        arguments = [*arguments[1:], "--help"]
    if not arguments or arguments[0] in HELP:
        write_out(usage())
        return 0
    if arguments[0] == "--version":
        write_out(f"{raydet.__version__}\n")
        return 0
    name, *options = arguments
    if name == "completion":
        from raydet.cli import completion

        return completion.run(options)
    if name in GROUPS and (not options or options[0] in HELP):
        write_out(usage(name))
        return 0 if options else 2
    if name in GROUPS:
        name = f"{name} {options.pop(0)}"
    command = COMMANDS.get(name)
    if command is None:
        raise unknown_command(arguments)
    console.command = name
    if output.open and not command.writes_page:
        names = ", ".join(f"`{name}`" for name, command in COMMANDS.items() if command.writes_page)
        raise UserError(f"--open: `{name}` writes no page; it applies to {names}")
    config: Any = load(
        command.config,
        options,
        program=f"raydet {name}",
        example=command.example,
        to_text=_printer(command),
        output_class=OutputOptions,
    )
    check_reachable(config)
    with console.own_stdout():
        call = getattr(raydet, command.function)
        shows_progress = "console" in inspect.signature(call).parameters
        result = call(config, console=console) if shows_progress else call(config)
    exit_code = int(getattr(result, "exit_code", 0))
    console.result(result, exit_code=exit_code)
    if output.open:
        open_page(result.page)
    return exit_code


def _printer(command: Command) -> Callable[[Any], str]:
    """Return the function that formats a command's config; its module is imported when it is called."""
    if not command.printed_by:
        return to_yaml
    return lambda config: getattr(importlib.import_module(command.module), command.printed_by)(config)

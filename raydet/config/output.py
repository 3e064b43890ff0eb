"""Options of every command about its output. They are no part of a config, and so never of a run's identity."""

from collections.abc import Sequence

from raydet.config.fields import config, fields_of, flag, option


@config
class OutputOptions:
    """Choice of the lines or objects that a command prints, and of its page in the browser."""

    quiet: bool = option("print only the result, or the error", False)
    json: bool = option("print one JSON object per line: messages, progress and, last, the result or the error", False)
    open: bool = option("open the page that the command wrote in the browser", False)


def split_output_options(arguments: Sequence[str]) -> tuple[OutputOptions, list[str]]:
    """Take the options about the output out of a command line; return them and the other arguments."""
    names = {flag(item.name): item.name for item in fields_of(OutputOptions)}
    given = {names[word]: True for word in arguments if word in names}
    return OutputOptions(**given), [word for word in arguments if word not in names]

"""The one exception that means "the user can fix this".

The command line prints its message as a single line and exits with code 2; anything else is a bug or a
failure of the machine and keeps its traceback.
"""


class UserError(ValueError):
    """A mistake in the input: the message says what is wrong, where, and what would be right."""

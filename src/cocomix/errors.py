"""The one exception that means "the person gave something that cannot work"."""


class InputError(ValueError):
    """An input that a person can mend.

    The message is one line that says what was given, what was expected and what to change. The
    command line prints it without a traceback and exits with 2; Python callers catch it as the
    `ValueError` that it is. Our own mistakes are assertions, never this.
    """


class UnreachableError(InputError):
    """A source that is not on this machine could not be fetched."""

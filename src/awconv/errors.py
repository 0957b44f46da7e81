"""The one exception that means "your input is wrong", shared by every room."""


class InputError(ValueError):
    """Bad input, explained in one line: the argument, its value, what was expected and the remedy.

    The command line prints the message without a traceback and exits with code 2; in Python it is an
    ordinary ``ValueError``.
    """

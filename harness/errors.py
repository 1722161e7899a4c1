"""The one exception whose message is meant for the person at the terminal, and how the commands end."""

FAILED, WRONG_REQUEST, INTERRUPTED = 1, 2, 75
"""Exit codes beside 0; the last (EX_TEMPFAIL) means stopped and saved: the same command goes on."""


class UserError(ValueError):
    """A wrong request: the command prints the message without a traceback and exits with 2."""


class Unavailable(UserError):
    """What is asked for needs something that is not here: a language model with a head, a package, enough facts."""

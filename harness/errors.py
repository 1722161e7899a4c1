"""The one exception whose message is meant for the person at the terminal."""


class UserError(ValueError):
    """A wrong request: the command prints the message without a traceback and exits with 2."""

"""The error a user can mend, shown as one line and never as a traceback."""


class UserError(Exception):
    """A mistake in what was asked for or given: the message says what was found, expected, and what to do."""

    def __init__(self, message: str) -> None:
        # A loader worker hands its error over as text with the worker's traceback in front of the message.
        lines = message.rsplit("UserError: ", 1)[-1].strip().splitlines()
        text = " ".join(line.strip() for line in lines)
        # what a file says or is called must not control the terminal
        super().__init__("".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in text))


class SaveError(UserError):
    """Something of a run could not be written; what was there before is intact."""

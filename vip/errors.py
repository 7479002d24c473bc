"""The error a user can mend, shown as one line and never as a traceback."""


def printable(text: str) -> str:
    """A text that cannot control the terminal, whatever a file is called or says: the rest is written as escapes."""
    return "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in text)


class UserError(Exception):
    """A mistake in what was asked for or given: the message says what was found, expected, and what to do."""

    def __init__(self, message: str) -> None:
        # A loader worker hands its error over as text with the worker's traceback in front of the message.
        lines = message.rsplit("UserError: ", 1)[-1].strip().splitlines()
        text = " ".join(line.strip() for line in lines)
        super().__init__(printable(text))


class SaveError(UserError):
    """Something of a run could not be written; what was there before is intact."""

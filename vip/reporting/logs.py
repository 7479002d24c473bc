"""Where log lines go: the console, and the file of a run."""

import logging
import sys
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from vip.reporting import progress


def setup_logging(is_primary: bool) -> None:
    """Log to standard error: everything from the primary process, warnings from the others.

    On a terminal the lines of progress bars are left out, as the bars themselves are there.
    """
    logging.basicConfig(level=logging.INFO if is_primary else logging.WARNING, format="%(message)s")
    for name in ("timm", "vip.models"):  # a line for each checkpoint kept and each matrix resampled, at every turn
        logging.getLogger(name).setLevel(logging.WARNING)
    if sys.stderr.isatty():
        logging.getLogger().handlers[0].addFilter(lambda record: record.name != progress.__name__)


class _LogFile(logging.FileHandler):
    """A log file that may become impossible to write, on a full disk, without more than one line about it."""

    failed = False

    def handleError(self, record: logging.LogRecord) -> None:
        """Say so once, where logging would print a traceback for every line."""
        if not self.failed:
            self.failed = True
            with suppress(OSError):  # standard error may be a file on the same disk
                print(f"Cannot write {self.baseFilename}: {sys.exc_info()[1]}; it misses lines.", file=sys.stderr)


@contextmanager
def log_to_file(path: Path) -> Iterator[None]:
    """Log to a file as well, with times."""
    handler = _LogFile(path, encoding="utf-8")
    handler.setFormatter(logging.Formatter("%(asctime)s %(message)s", "%Y-%m-%d %H:%M:%S"))
    logging.getLogger().addHandler(handler)
    try:
        yield
    finally:
        logging.getLogger().removeHandler(handler)
        with suppress(OSError):  # what is still unwritten, on a full disk
            handler.close()

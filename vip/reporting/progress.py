"""What a user watches: a live bar on a terminal, plain lines everywhere else."""

import logging
import math
import sys
import time
from types import TracebackType

import torch
from tqdm import tqdm

_logger = logging.getLogger(__name__)


def memory_gb(device: torch.device) -> float:
    """Peak memory in GB: of the device where it is a GPU, of this process otherwise."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 1e9
    if sys.platform == "win32":  # Windows has no resource module
        return 0.0
    import resource

    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak / (1e9 if sys.platform == "darwin" else 1e6)  # bytes on macOS, kilobytes on Linux


class ProgressBar:
    """Progress of one pass over a loader, as a context manager.

    Args:
        title: What is going on, such as 'Epoch 3/300'.
        batches: Number of batches, None if unknown.
        log_interval: Batches between plain lines.
        device: Device whose memory is shown.
        quiet: Show nothing, for all processes but one.
    """

    def __init__(
        self, title: str, batches: int | None, log_interval: int, device: torch.device, quiet: bool = False
    ) -> None:
        self.title, self.batches, self.log_interval = title, batches, log_interval
        self.device, self.quiet = device, quiet
        self.live = sys.stderr.isatty() and not quiet
        self.done = self.images = 0
        self.values: dict[str, float] = {}
        self.bar: tqdm | None = None
        self.start = time.perf_counter()
        self.shown = -math.inf  # when values other than the learning rate were last new

    def __enter__(self) -> "ProgressBar":
        if self.live:
            self.bar = tqdm(total=self.batches, desc=self.title, leave=False, dynamic_ncols=True, unit="batch")
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self.bar is not None:
            self.bar.close()

    def wants_values(self, batch: int) -> bool:
        """Whether new values of batch number `batch` would be shown; computing them makes the device wait."""
        if self.live and time.perf_counter() - self.shown >= 1:
            return True
        return not self.quiet and ((batch + 1) % self.log_interval == 0 or batch + 1 == self.batches)

    @property
    def images_per_second(self) -> float:
        """Images a second since the start."""
        return self.images / max(time.perf_counter() - self.start, 1e-9)

    def update(self, images: int, **values: float) -> None:
        """Count a batch of `images` images and take over new values."""
        self.done += 1
        self.images += images
        if values.keys() - {"lr"}:
            self.shown = time.perf_counter()
        self.values.update(values)
        if self.bar is not None:
            self.bar.set_postfix_str(self._text(), refresh=False)
            self.bar.update()
        if not self.quiet and (self.done % self.log_interval == 0 or self.done == self.batches):
            left = (time.perf_counter() - self.start) / self.done * ((self.batches or self.done) - self.done)
            _logger.info(f"{self.title} [{self.done}/{self.batches or '?'}] {self._text()}, {_clock(left)} left")

    def _text(self) -> str:
        shown = [f"{name} {_number(name, value)}" for name, value in self.values.items()]
        shown.append(f"{self.images_per_second:,.0f} img/s")
        shown.append(f"{memory_gb(self.device):.1f} GB")
        return ", ".join(shown)


def _number(name: str, value: float) -> str:
    return f"{value:.2e}" if name == "lr" else f"{value:.2f}" if name.startswith("top") else f"{value:.4f}"


def _clock(seconds: float) -> str:
    minutes, seconds = divmod(int(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02}:{seconds:02}"

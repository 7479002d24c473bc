"""torchrun without its own traceback when a training process has already said what is wrong."""

import logging
import os
import signal
import sys

from torch.distributed.elastic.multiprocessing.api import SignalException
from torch.distributed.elastic.multiprocessing.errors import ChildFailedError
from torch.distributed.run import main as torchrun

from vip.training.recovery import REQUEUE

if __name__ == "__main__":
    # restarted processes must not find the addresses of dead ones (github.com/pytorch/pytorch/issues/135712)
    os.environ.setdefault("TORCH_DISABLE_SHARE_RDZV_TCP_STORE", "1")
    logging.getLogger("torch.distributed.elastic").setLevel(logging.CRITICAL)  # its report of what we report below
    if hasattr(signal, "SIGUSR1"):  # torchrun would die of it, and leave its processes alone
        signal.signal(signal.SIGUSR1, lambda *_: os.kill(os.getpid(), signal.SIGTERM))
    try:
        torchrun(sys.argv[1:])
    except ChildFailedError as e:
        rank, failure = e.get_first_failure()
        print(f"Process {rank} ended with status {failure.exitcode}, the group was stopped.", file=sys.stderr)
        sys.exit(failure.exitcode if failure.exitcode > 0 else 1)
    except SignalException as e:
        print(f"Stopped by {e.sigval.name}.", file=sys.stderr)
        sys.exit(REQUEUE if e.sigval == signal.SIGTERM else 128 + e.sigval)

"""torchrun without its own traceback when a training process has already said what is wrong."""

import logging
import sys

from torch.distributed.elastic.multiprocessing.api import SignalException
from torch.distributed.elastic.multiprocessing.errors import ChildFailedError
from torch.distributed.run import main as torchrun

if __name__ == "__main__":
    logging.getLogger("torch.distributed.elastic").setLevel(logging.CRITICAL)  # its report of what we report below
    try:
        torchrun(sys.argv[1:])
    except ChildFailedError as e:
        rank, failure = e.get_first_failure()
        print(f"Process {rank} ended with status {failure.exitcode}, the group was stopped.", file=sys.stderr)
        sys.exit(failure.exitcode if failure.exitcode > 0 else 1)
    except SignalException as e:
        print(f"Stopped by {e.sigval.name}.", file=sys.stderr)
        sys.exit(128 + e.sigval)

#!/usr/bin/env python3
"""Validate checkpoints: `validate.py DATA --checkpoint PATH ...`, the same as `vip validate`."""

import sys

from vip.cli import run
from vip.cli.validate import main

if __name__ == "__main__":
    sys.exit(run("validate.py", main))

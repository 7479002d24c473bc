#!/usr/bin/env python3
"""Train a model: `train.py DATA --model vip_s7 ...`, the same as `vip train`."""

import sys

from vip.cli import run
from vip.cli.train import main

if __name__ == "__main__":
    sys.exit(run("train.py", main))

#!/usr/bin/env python3
"""Write label maps: `generate_label.py TRAIN_DIR OUT_DIR --model NAME ...`, the same as `vip generate-label`."""

import sys

from vip.cli import run
from vip.cli.generate_label import main

if __name__ == "__main__":
    sys.exit(run("generate_label.py", main))

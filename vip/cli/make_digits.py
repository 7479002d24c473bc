"""`vip make-digits`: a small real data set for demonstrations, from scikit-learn, without a download."""

import argparse

from vip.data.digits import write_digits


def main(argv: list[str]) -> None:
    """Parse the command line and write the images."""
    parser = argparse.ArgumentParser(prog="vip make-digits", description=__doc__)
    parser.add_argument("folder", help="where to write train/ and val/")
    train, val = write_digits(parser.parse_args(argv).folder)
    print(f"{train} training and {val} validation images")

"""`vip prepare-imagenet`: make the image folder of ImageNet-1k from its two archives."""

import argparse
import shlex
import sys
from functools import partial

from tqdm import tqdm

from vip.cli.arguments import Parser
from vip.data.imagenet import Report, ilsvrc2012, prepare


def main(argv: list[str]) -> int:
    """Parse the command line and do it; 1 if numbers of images are not what they should be."""
    args = _parser().parse_args(argv)
    progress = partial(tqdm, dynamic_ncols=True, leave=False, disable=not sys.stderr.isatty())
    report = prepare(args.train_tar, args.val_tar, args.out, ilsvrc2012(), not args.no_checksum, progress)
    print(_describe(report))
    out = shlex.quote(args.out)
    if report.wrong:
        print("Remove the folders that differ, and run the same again: it makes only these.")
    elif report.unusual and not args.no_checksum:
        print("These are not the archives of ILSVRC2012; --no-checksum takes them as they are.")
    else:
        print(f"All is there. Next: vip check-data {out}; python train.py {out} --config models/vip_s7/recipe.yaml")
        return 0
    return 1


def _parser() -> argparse.ArgumentParser:
    parser = Parser(
        prog="vip prepare-imagenet",
        description="Make OUT/train and OUT/val, with a folder for each class, from the archives of image-net.org. Run "
        "it again after it was stopped: it goes on where it was, and checks what is there.",
    )
    parser.add_argument("train_tar", metavar="TRAIN_TAR", help="ILSVRC2012_img_train.tar")
    parser.add_argument("val_tar", metavar="VAL_TAR", help="ILSVRC2012_img_val.tar")
    parser.add_argument("out", metavar="OUT", help="folder to make or to complete")
    text = "take archives that someone else packed; other numbers of images are warnings then"
    parser.add_argument("--no-checksum", action="store_true", help=text)
    return parser


def _describe(report: Report) -> str:
    lines = [
        f"{split}: {report.images[split]:,} images of {report.classes[split]:,} classes, "
        f"{report.unpacked[split]:,} of them unpacked now"
        for split in ("train", "val")
    ]
    if wrong := report.wrong:
        lines.append(f"{len(wrong)} folders differ: {'; '.join(wrong[:5])}{'; ...' * (len(wrong) > 5)}")
    return "\n".join([*lines, *(f"warning: {line}" for line in report.unusual)])

"""`vip push-to-hub`: publish a checkpoint on the Hugging Face Hub, with a card written from its run."""

import argparse
from pathlib import Path

from vip.checkpoints.hub import CARD, Publication
from vip.cli.arguments import Parser


def main(argv: list[str]) -> None:
    """Parse the command line, and upload or write the folder."""
    args = _parser().parse_args(argv)
    publication = Publication(args.checkpoint, args.repo, args.model, args.use_ema, args.license)
    if args.dry_run:
        files = publication.write(args.dry_run)
        print(f"{', '.join(file.name for file in files)} written to {args.dry_run}, nothing uploaded")
        print(f"It loads as local-dir:{args.dry_run}, and after an upload as hf-hub:{args.repo}.")
        return
    new_card = publication.push(args.private)
    print(f"Uploaded to {args.repo}; it loads as hf-hub:{args.repo}.")
    if not new_card:
        print(f"The {CARD} that was there is kept: --dry-run FOLDER writes the one of this checkpoint.")


def _parser() -> argparse.ArgumentParser:
    parser = Parser(prog="vip push-to-hub", description=__doc__)
    parser.add_argument("checkpoint", help="a checkpoint, or the folder of a run: its best, else its last")
    parser.add_argument("repo", help="repository, as OWNER/NAME; it is made if it is not there")
    parser.add_argument("--private", action="store_true", help="make a repository that only its owners see")
    parser.add_argument("--dry-run", type=Path, metavar="FOLDER", help="write it there and upload nothing")
    parser.add_argument("--license", metavar="NAME", help="license of the weights, such as apache-2.0 (default: none)")
    parser.add_argument("--model", default="", help="model (default: what the checkpoint holds)")
    text = "take the averaged weights, or the plain ones (default: averaged where there are any)"
    parser.add_argument("--use-ema", action=argparse.BooleanOptionalAction, help=text)
    return parser

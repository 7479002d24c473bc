"""`vip export`: write a model for ONNX Runtime, AOTInductor, torch.export or TorchScript."""

import argparse
from pathlib import Path

from vip.cli.arguments import Parser
from vip.errors import UserError
from vip.export.check import BATCHES, TOLERANCE
from vip.export.formats import FORMATS, check_target, export_model
from vip.reporting.logs import setup_logging
from vip.training.config import EvaluationConfig
from vip.training.factory import resolve_data_config
from vip.training.preprocessing import describe
from vip.training.validation import load_model


def main(argv: list[str]) -> None:
    """Parse the command line, load the model, export it and say how well the file agrees with it."""
    args = _parser().parse_args(argv)
    setup_logging(is_primary=True)
    check_target(args.out, args.format)
    if args.out.exists() and not args.overwrite:
        raise UserError(f"{args.out} is there already: name another --out, or add --overwrite.")
    config, given = _config(args)
    config, model, checkpoint, source = load_model(config, args.checkpoint, given)
    about = describe(model, resolve_data_config(model, config), checkpoint.get("class_to_idx"))
    difference = export_model(model, args.out, args.format, about, args.normalize, check=not args.no_check)
    weights = source if args.checkpoint or args.pretrained else "random weights"
    size, values = "x".join(map(str, about["input_size"])), "from 0 to 1" if args.normalize else "normalized"
    print(f"{about['architecture']} ({weights}), input {size} {values}, {about['num_classes']} classes")
    print(f"{args.format}, {args.out.stat().st_size / 1e6:,.2f} MB, written to {args.out}")
    if difference is not None:
        batches = " and ".join(map(str, BATCHES))
        print(f"differs from the model by {difference:.1e} of its largest output (of {TOLERANCE:.0e} allowed)", end=" ")
        print(f"on random images in batches of {batches}")


def _parser() -> argparse.ArgumentParser:
    parser = Parser(prog="vip export", description=__doc__)
    text = "a checkpoint, or the folder of a run: its best, else its last"
    parser.add_argument("checkpoint", nargs="?", default="", help=text)
    parser.add_argument("--model", default="", help="model (default: what the checkpoint holds)")
    parser.add_argument("--pretrained", action="store_true", help="with timm's weights, where there is no checkpoint")
    parser.add_argument("--format", required=True, choices=tuple(FORMATS), help="what to write")
    endings = ", ".join(f"{' or '.join(chosen.endings)} of {name}" for name, chosen in FORMATS.items())
    parser.add_argument("--out", required=True, type=Path, metavar="FILE", help=f"file to write: {endings}")
    parser.add_argument("--overwrite", action="store_true", help="replace FILE if it is there")
    parser.add_argument("--normalize", action="store_true", help="let the file normalize: it takes values from 0 to 1")
    parser.add_argument("--no-check", action="store_true", help="do not run the file to compare it with the model")
    parser.add_argument("--img-size", type=int, metavar="N", help="height and width of the image")
    parser.add_argument("--num-classes", type=int, metavar="N", help="classes, where there is no checkpoint")
    text = "take the averaged weights, or the plain ones (default: averaged where there are any)"
    parser.add_argument("--use-ema", action=argparse.BooleanOptionalAction, help=text)
    return parser


def _config(args: argparse.Namespace) -> tuple[EvaluationConfig, set[str]]:
    """The configuration of a model that is to be exported, and what of it wins over what a checkpoint says."""
    if not (args.checkpoint or args.model):
        raise UserError("Nothing to export: give a checkpoint, or --model NAME --pretrained.")
    if args.checkpoint and args.pretrained:
        raise UserError("--pretrained and a checkpoint are two sets of weights; leave one out.")
    names = ("model", "pretrained", "img_size", "num_classes", "use_ema")
    config = EvaluationConfig(
        **{name: getattr(args, name) for name in names},
        device="cpu",
        torchscript=args.format == "torchscript",  # which timm's models have to be made for
        no_kernels=True,
    )
    return config, {"no_kernels", *(name for name in names if getattr(args, name))}

"""`vip show`: draw what a training sees, or what a model mixes."""

import argparse
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from vip.cli.arguments import Parser, at_least, parse
from vip.data.datasets import create_split
from vip.data.loaders import create_eval_loader
from vip.errors import UserError, printable
from vip.options import option
from vip.prediction.classes import class_names
from vip.reporting.contact_sheet import draw_contact_sheet
from vip.reporting.mixing_pictures import branch_weights, draw_branch_weights, draw_mixing, find_permute_mlps
from vip.reporting.plots import new_figure, save_figure
from vip.training.config import TRAIN_FLAGS_WITHOUT_EFFECT, EvaluationConfig, TrainConfig
from vip.training.factory import resolve_data_config
from vip.training.preview import preview
from vip.training.validation import load_model
from vip.training.weights import find_checkpoint

_BATCH_SIZE = 64


@dataclass(kw_only=True)
class BatchConfig(TrainConfig):
    """Contact sheet of training images; all other options are those of vip train."""

    images: int = option(16, "images to draw", metavar="N", low=1, high=400)
    out: str = option("batch.png", "picture to write, a PNG file", metavar="FILE")
    workers: int = option(0, "loader processes; the images do not depend on them", "-j", metavar="N", low=0)


def main(argv: list[str]) -> None:
    """Parse the command line, draw and say where."""
    actions = {"batch": _show_batch, "model": _show_model}
    parser = Parser(prog="vip show", usage="vip show {batch,model} ...", description=__doc__)
    text = "batch: a contact sheet of training images; model: a checkpoint's mixing matrices and branch weights"
    parser.add_argument("what", choices=tuple(actions), help=f"{text}; each has a --help of its own")
    what = parser.parse_args(argv[:1]).what
    new_figure()  # what is missing is to be known before anything is read
    for path in actions[what](argv[1:]):
        print(printable(str(path)))


def _show_batch(argv: list[str]) -> list[Path]:
    config, _ = parse(BatchConfig, argv, "vip show batch", TRAIN_FLAGS_WITHOUT_EFFECT)
    out = Path(config.out)
    if out.suffix.lower() != ".png":
        raise UserError(f"--out is {config.out}, expected a file name that ends in .png.")
    seen = preview(config, config.images)
    title = f"{config.data or config.dataset}: the first {len(seen.pictures)} training images of {config.model}"
    names = class_names(seen.shares.shape[1], seen.class_to_idx)
    figure = draw_contact_sheet(seen.pictures, seen.shares, names, seen.tokens, title)
    return save_figure(figure, out.with_suffix(""), ["png"])


def _show_model(argv: list[str]) -> list[Path]:
    args = _model_parser().parse_args(argv)
    path = find_checkpoint(args.checkpoint)
    config = EvaluationConfig(model=args.model, data=args.data, use_ema=args.use_ema, workers=0)
    config, model, _, _ = load_model(config, str(path), {"model"})
    layers = find_permute_mlps(model)
    data_config = resolve_data_config(model, config)
    about = f"{config.model}, {path}"
    folder, stem = Path(args.out or path.parent), path.name.partition(".")[0]
    mixing = draw_mixing(layers, about, args.full)
    files = save_figure(mixing, folder / f"{stem}-mixing", ["png"])
    weights, count = branch_weights(model.eval(), _batches(config, data_config, args.images))
    over = f"images of {args.data}" if args.data else "standard-normal inputs (--data takes images)"
    title = f"{about}: branch weights, mean over {count} {over}"
    return files + save_figure(draw_branch_weights(layers, weights, title), folder / f"{stem}-branches", ["png"])


def _model_parser() -> argparse.ArgumentParser:
    parser = Parser(prog="vip show model", description="Draw a checkpoint's mixing matrices and branch weights.")
    parser.add_argument("checkpoint", metavar="CKPT", help="a checkpoint, or the folder of a run")
    parser.add_argument("--model", default="", metavar="NAME", help="its model (default: what the checkpoint holds)")
    parser.add_argument("--data", metavar="DIR", help="data set whose validation images the branches are weighed for")
    parser.add_argument(
        "--images", type=at_least(1), default=_BATCH_SIZE, metavar="N", help="how many of them (default: 64)"
    )
    parser.add_argument("--full", action="store_true", help="draw the whole mixing matrices, channel by channel")
    text = "take the averaged weights, or the plain ones (default: averaged where there are any)"
    parser.add_argument("--use-ema", action=argparse.BooleanOptionalAction, help=text)
    parser.add_argument("--out", metavar="DIR", help="folder to write the pictures to (default: the checkpoint's)")
    return parser


def _batches(config: EvaluationConfig, data_config: dict[str, Any], count: int) -> Any:
    """Images from all over the validation split, or standard-normal inputs."""
    shape, device = data_config["input_size"], torch.device("cpu")
    if not config.data:
        generator = torch.Generator().manual_seed(0)
        return torch.randn(count, *shape, generator=generator).split(_BATCH_SIZE)
    dataset: Any = create_split(config, "validation", is_training=False, in_chans=shape[0])
    count = min(count, len(dataset))
    indices = [i * len(dataset) // count for i in range(count)]  # one folder follows the other
    loader = create_eval_loader(dataset, config, data_config, _BATCH_SIZE, device, indices=indices)
    return (images for images, _ in loader)

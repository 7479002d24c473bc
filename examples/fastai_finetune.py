"""A Vision Permutator in fastai's `vision_learner`, on scikit-learn's digits.

python -m examples.fastai_finetune --model vip_nano4_32 --epochs 3
"""

import sys
from pathlib import Path
from tempfile import TemporaryDirectory

from fastai.vision.all import ImageDataLoaders, Learner, Normalize, Resize, accuracy, imagenet_stats, vision_learner

from vip.cli import run  # whatever is imported of vip registers its models with timm
from vip.cli.arguments import Parser, at_least
from vip.data.digits import write_digits
from vip.training.weights import check_model_name


def train(model: str, epochs: int) -> Learner:
    """Train a model, by its name in timm, from random weights. With pretrained ones `learn.fine_tune` is the way."""
    with TemporaryDirectory() as folder:
        write_digits(Path(folder) / "digits")
        dls = ImageDataLoaders.from_folder(
            Path(folder) / "digits",
            valid="val",
            item_tfms=Resize(32),  # the size the model is for; of another, give img_size to vision_learner too
            batch_tfms=Normalize.from_stats(*imagenet_stats),  # which fastai adds itself to pretrained models only
            num_workers=0,
        )
        learn = vision_learner(dls, model, pretrained=False, metrics=accuracy)
        learn.fit_one_cycle(epochs, 3e-3)
        return learn


def main(argv: list[str]) -> None:
    """Train, and say how well."""
    parser = Parser(prog="fastai_finetune", description=__doc__)
    parser.add_argument("--model", default="vip_nano4_32", help="name in timm (default: vip_nano4_32)")
    parser.add_argument("--epochs", type=at_least(1), default=3, help="passes over the 1437 digits (default: 3)")
    args = parser.parse_args(argv)
    check_model_name(args.model)
    learn = train(args.model, args.epochs)
    print(f"{args.model}: {learn.recorder.values[-1][-1]:.1%} of the held-out digits, 10.0% by chance")


if __name__ == "__main__":
    sys.exit(run("fastai_finetune", main))

"""A Vision Permutator in a LightningModule, on scikit-learn's digits.

python -m examples.lightning_train --model vip_nano4_32 --epochs 6
"""

import sys

import lightning
import timm
import torch
import torch.nn.functional as F
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.utilities.types import OptimizerLRScheduler
from sklearn.datasets import load_digits
from sklearn.model_selection import train_test_split
from timm.optim import create_optimizer_v2
from torch.utils.data import DataLoader, TensorDataset

from vip.cli import run  # whatever is imported of vip registers its models with timm
from vip.cli.arguments import Parser, at_least
from vip.training.weights import check_model_name


class Classifier(lightning.LightningModule):
    """Any timm model, its loss and its optimizer."""

    def __init__(self, model: str, lr: float = 2e-3) -> None:
        super().__init__()
        self.save_hyperparameters()  # so that Classifier.load_from_checkpoint(path) needs nothing else
        self.model = timm.create_model(model, in_chans=1, num_classes=10)

    def training_step(self, batch: list[torch.Tensor]) -> torch.Tensor:
        """Cross entropy of a batch."""
        loss = F.cross_entropy(self.model(batch[0]), batch[1])
        self.log("train_loss", loss, prog_bar=True)
        return loss

    def validation_step(self, batch: list[torch.Tensor]) -> None:
        """Accuracy of a batch; Lightning averages it over all of them, by their sizes."""
        correct = self.model(batch[0]).argmax(1) == batch[1]
        self.log("val_accuracy", correct.float().mean(), prog_bar=True)

    def configure_optimizers(self) -> OptimizerLRScheduler:
        """AdamW, with a learning rate that falls to zero along a cosine."""
        optimizer = create_optimizer_v2(self, "adamw", lr=self.hparams["lr"], weight_decay=0.05)
        schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, int(self.trainer.estimated_stepping_batches))
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": schedule, "interval": "step"}}


def digits() -> tuple[DataLoader, DataLoader]:
    """The digits as 32x32 images of mean 0 and deviation 1: batches for training, and held-out ones."""
    images, labels = (torch.from_numpy(values) for values in load_digits(return_X_y=True))
    images = F.interpolate(images.float().view(-1, 1, 8, 8), size=32, mode="bilinear")
    images = (images - images.mean()) / images.std()
    train, held_out = train_test_split(range(len(images)), test_size=0.2, random_state=0, stratify=labels)
    sets = [TensorDataset(images[indices], labels[indices]) for indices in (train, held_out)]
    return DataLoader(sets[0], 64, shuffle=True), DataLoader(sets[1], 64)


def main(argv: list[str]) -> None:
    """Train, and say how well."""
    parser = Parser(prog="lightning_train", description=__doc__)
    parser.add_argument("--model", default="vip_nano4_32", help="name in timm of a model for 32x32 images")
    parser.add_argument("--epochs", type=at_least(1), default=6, help="passes over the 1437 digits (default: 6)")
    parser.add_argument("--output", default="output/lightning", help="folder for checkpoints (default: %(default)s)")
    args = parser.parse_args(argv)
    check_model_name(args.model)
    lightning.seed_everything(0, verbose=False)
    train_loader, val_loader = digits()
    checkpoints = ModelCheckpoint(args.output, monitor="val_accuracy", mode="max")
    trainer = lightning.Trainer(max_epochs=args.epochs, callbacks=[checkpoints], logger=False)
    trainer.fit(Classifier(args.model), train_loader, val_loader)
    accuracy = float(trainer.callback_metrics["val_accuracy"])
    print(f"{args.model}: {accuracy:.1%} of the held-out digits, 10.0% by chance")
    print(f"checkpoint: {checkpoints.best_model_path}")


if __name__ == "__main__":
    sys.exit(run("lightning_train", main))

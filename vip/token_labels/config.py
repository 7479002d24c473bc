"""Options of token labeling."""

from dataclasses import dataclass

from vip.options import Options, option

READINGS = ("aligned", "published")


@dataclass(kw_only=True)
class TokenLabelConfig(Options):
    """Token labeling."""

    token_label: bool = option(False, "supervise every token; other defaults become those of the published script")
    token_label_data: str = option(
        "", "label maps, made by vip generate-label; the class labels without", metavar="DIR"
    )
    token_label_size: int | None = option(None, "side of the token grid (default: the model's own)", metavar="N", low=1)
    token_label_crop: str = option(
        "aligned",
        "read the map where the crop is, and follow flips, rotations, shears and shifts; or, as the published code, "
        "with the axes of the crop exchanged",
        choices=READINGS,
    )
    token_label_mix: str = option(
        "aligned",
        "mixup and CutMix mix each token's target as its pixels; or, as the published code, all of them by one factor",
        choices=READINGS,
    )
    token_label_region: str = option(
        "auto",
        "what the maps cover: the square in the middle, or the whole image (default: what label_maps.json says, else "
        "the square)",
        choices=("auto", "center", "image"),
    )
    dense_weight: float = option(1.0, "weight of the tokens' loss", low=0)
    cls_weight: float = option(1.0, "weight of the class output's loss", low=0)
    ground_truth: bool = option(
        False, "mix the image's class into the class target: half where the map agrees, else 0.1"
    )
    mix_token: float = option(1.0, "MixToken alpha, 0 for none", low=0)


# What --token-label changes unless it is given otherwise: the defaults of the published token-labeling script.
PUBLISHED_DEFAULTS = {
    "batch_size": 32,
    "lr": 1.6e-3,
    "warmup_epochs": 5,
    "drop_path": None,
    "mixup": 0.0,
    "cutmix": 0.0,
    "model_ema_decay": 0.99992,
}

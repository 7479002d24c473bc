"""Options of prediction."""

from dataclasses import dataclass

from vip.data.config import IMAGE_MODES, InputConfig
from vip.options import option
from vip.training.config import ModelConfig, PrecisionConfig

FORMATS = ("table", "json", "csv")


@dataclass(kw_only=True)
class PredictConfig(InputConfig, PrecisionConfig, ModelConfig):
    """What is in images; what is not given comes from the checkpoint, then from the model."""

    alternatives = ({"img_size", "input_size"}, {"amp", "native_amp", "apex_amp"})

    images: list[str] = option(
        [],
        "image files, folders of them, quoted glob patterns, or - for a list of files on standard input",
        positional=True,
        metavar="IMAGE",
    )
    model: str = option("", "model (default: what the checkpoint holds)", "-m")
    checkpoint: str = option("", "a checkpoint, or the folder of a run", metavar="PATH")
    use_ema: bool | None = option(None, "use the averaged weights (default: where the checkpoint has them)")
    top_k: int = option(5, "classes to name for each image", metavar="N", low=1)
    format: str = option("table", "form of the output; json is one object a line", choices=FORMATS)
    out: str = option("", "write the predictions to this file (default: standard output)", metavar="FILE")
    heatmap: str = option("", "write a picture for each image of which tokens drove the class", metavar="FOLDER")
    heatmap_class: str = option("", "class of --heatmap (default: each image's likeliest)", metavar="NAME|INDEX")
    tta: int = option(0, "test-time augmentation: 2 averages an image and its mirror image", choices=(0, 1, 2))
    batch_size: int = option(64, "batch size", "-b", metavar="N", low=1)
    workers: int = option(4, "threads that read images", "-j", metavar="N", low=1)
    input_img_mode: str | None = option(
        None, "PIL mode images are converted to (default: RGB, or L for one channel)", choices=IMAGE_MODES
    )

"""Options of the data side: which images, how they are read, and how they are augmented."""

from dataclasses import dataclass

from vip.options import Options, option

IMAGE_MODES = ("L", "LA", "RGB", "RGBA", "CMYK", "YCbCr", "HSV")  # of PIL's those with 8 bits a channel
INTERPOLATIONS = ("nearest", "bilinear", "bicubic", "box", "hamming", "lanczos")


@dataclass(kw_only=True)
class DatasetConfig(Options):
    """Dataset."""

    data: str | None = option(None, "data set: a folder with train/ and val/, or what --dataset reads", positional=True)
    data_dir: str | None = option(None, "the same as the positional argument", metavar="DIR")
    dataset: str = option("", "data set type and name, such as torch/cifar10; a folder or tar file if empty", "-d")
    dataset_download: bool = option(False, "download the data set where its type (torch/, hfds/, ...) can")
    class_map: str = option("", "text file that maps class names to indices", metavar="FILE")
    input_key: str | None = option(None, "name of the image column, for data sets with named columns")
    target_key: str | None = option(None, "name of the label column, for data sets with named columns")
    input_img_mode: str | None = option(
        None, "PIL mode images are converted to (default: RGB, or L for one channel)", choices=IMAGE_MODES
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        self.data = self.data or self.data_dir


@dataclass(kw_only=True)
class InputConfig(Options):
    """Model input; what is not given comes from the model."""

    img_size: int | None = option(None, "height and width of the image", metavar="N", low=1)
    input_size: list[int] | None = option(None, "channels, height and width of the image", metavar="N", count=3, low=1)
    in_chans: int | None = option(None, "image channels", metavar="N", low=1)
    crop_pct: float | None = option(None, "share of the image that the validation crop covers", low=0.01, high=2)
    crop_mode: str | None = option(None, "validation crop", choices=("squash", "border", "center"))
    mean: list[float] | None = option(None, "mean of each channel, of values from 0 to 1", low=0, high=1)
    std: list[float] | None = option(None, "standard deviation of each channel", low=1e-06, high=1)
    interpolation: str = option("", "resizing of validation images", choices=("", *INTERPOLATIONS))


@dataclass(kw_only=True)
class LoaderConfig(Options):
    """Loading."""

    workers: int = option(8, "loader processes of each training process", "-j", metavar="N", low=0)
    pin_mem: bool = option(False, "pin host memory, which speeds up copies to a GPU")
    no_prefetcher: bool = option(False, "normalize images in the loader processes instead of on the device")
    loader_timeout: float = option(
        1800.0, "seconds to wait for a batch of the loader processes, 0 for ever", metavar="X", low=0
    )
    max_bad_images: int = option(100, "unreadable images to skip before the run stops", metavar="N", low=0)


@dataclass(kw_only=True)
class AugmentationConfig(Options):
    """Augmentation."""

    no_aug: bool = option(False, "switch all training augmentation off")
    train_crop_mode: str | None = option(None, "training crop", choices=("rrc", "rkrc", "rkrr"))
    scale: list[float] = option([0.08, 1.0], "range of the area of random resized crops", count=2, low=0, high=1)
    ratio: list[float] = option(
        [3.0 / 4.0, 4.0 / 3.0], "range of the aspect ratio of random resized crops", count=2, low=0.01
    )
    hflip: float = option(0.5, "probability of a horizontal flip", low=0, high=1)
    vflip: float = option(0.0, "probability of a vertical flip", low=0, high=1)
    color_jitter: float = option(0.4, "strength of color jitter, unused with --aa", low=0, high=100)
    color_jitter_prob: float | None = option(None, "probability of color jitter", low=0, high=1)
    grayscale_prob: float = option(0.0, "probability of a gray image", low=0, high=1)
    gaussian_blur_prob: float = option(0.0, "probability of a Gaussian blur", low=0, high=1)
    aa: str | None = option("rand-m9-mstd0.5-inc1", "AutoAugment, RandAugment or AugMix policy; 'none' for none")
    aug_repeats: float = option(
        0.0, "repeated augmentation: views of an image in one epoch, 0 or at least 1", low=0, high=1000
    )
    aug_splits: int = option(0, "augmentation splits of a batch, 0 or at least 2", low=0, high=100)
    reprob: float = option(0.25, "probability of random erasing", low=0, high=1)
    remode: str = option("pixel", "fill of random erasing", choices=("const", "rand", "pixel"))
    recount: int = option(1, "erased regions of an image", low=1, high=1000)
    resplit: bool = option(False, "do not erase in the first augmentation split")
    mixup: float = option(0.8, "mixup alpha, 0 for none", low=0)
    cutmix: float = option(1.0, "CutMix alpha, 0 for none", low=0)
    cutmix_minmax: list[float] | None = option(
        None, "range of the CutMix ratio, instead of alpha", count=2, low=0, high=1
    )
    mixup_prob: float = option(1.0, "probability of mixup or CutMix", low=0, high=1)
    mixup_switch_prob: float = option(0.5, "probability of CutMix rather than mixup", low=0, high=1)
    mixup_mode: str = option("batch", "what shares one mixup parameter", choices=("batch", "pair", "elem"))
    mixup_off_epoch: int = option(0, "epoch from which mixup and CutMix are off, 0 for never", metavar="N", low=0)
    fast_images: bool = option(
        False,
        "decode, resize and turn training images with simplejpeg, torch and OpenCV; they differ from Pillow's by "
        "rounding and filters",
    )
    train_interpolation: str = option(
        "random", "resizing of training images; random picks bilinear or bicubic", choices=("random", *INTERPOLATIONS)
    )

    @property
    def mixup_active(self) -> bool:
        """Whether targets are mixed."""
        return self.mixup > 0 or self.cutmix > 0 or self.cutmix_minmax is not None

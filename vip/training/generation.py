"""Label maps for a data set, by an annotator: resumable, in one process or many."""

import dataclasses
import hashlib
import logging
from collections.abc import Callable, Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from timm.task import ClassificationEvaluator
from timm.utils import random_seed
from torch import nn

from vip.data.datasets import ReadableImageDataset, class_to_idx, create_split, training_split, unreadable_files
from vip.data.loaders import create_eval_loader, naming_lost_workers
from vip.errors import UserError
from vip.reporting.logs import setup_logging
from vip.reporting.progress import ProgressBar
from vip.token_labels.annotator import Annotation, Annotator, averages
from vip.token_labels.geometry import Region
from vip.token_labels.maps import (
    EXACT_CLASSES,
    DamagedMap,
    FolderMaps,
    LabelMap,
    MapRecord,
    check_shape,
    map_keys,
)
from vip.token_labels.packing import shards_in
from vip.token_labels.store import maps_in
from vip.token_labels.writers import FolderWriter, Labelled, PackedWriter, Writer
from vip.training.config import GenerateConfig
from vip.training.engine import gather_metrics
from vip.training.factory import check_compile_backend, resolve_data_config
from vip.training.runtime import (
    Precision,
    Runtime,
    all_reduce_sum,
    leave_together,
    naming_lost_processes,
    setup_precision,
    setup_runtime,
)
from vip.training.validation import check_classes, load_model

_logger = logging.getLogger(__name__)


def generate_labels(config: GenerateConfig, given: set[str]) -> None:
    """Write the label maps that are not there yet, and log how often the annotator is right.

    Raises:
        UserError: For anything the user can mend.
    """
    if not config.token_label_root:
        raise UserError("Name two folders: the one with the images, and the one to write label maps to.")
    if not (config.checkpoint or config.model):
        raise UserError("Name an annotator: --checkpoint PATH, or --model NAME --pretrained.")
    if not config.checkpoint and "pretrained" not in given:
        config = dataclasses.replace(config, pretrained=True)  # as the published generator
    runtime = setup_runtime(config.device, workers=config.workers)
    setup_logging(runtime.is_primary)
    random_seed(config.seed)  # the same in all processes, which have to agree on weights that no file holds
    config, model, checkpoint, source = load_model(config, config.checkpoint, given)
    if runtime.is_primary and not (config.checkpoint or config.pretrained):
        _logger.warning(f"{config.model} has random weights: leave out --no-pretrained, or give a --checkpoint.")
    data_config = resolve_data_config(model, config)
    images = _open_images(config, data_config)
    if not config.transfer:
        advice = "For part of it give a --class-map, for any other images --transfer."
        check_classes(images, config, model, checkpoint, advice)
    model = model.to(runtime.device)
    if config.channels_last:
        model = model.to(memory_format=torch.channels_last)
    annotator = Annotator(model, data_config["input_size"], config.top_k)
    _describe(annotator, data_config, source)
    writer = _open_writer(config, images, annotator, runtime)
    _write_record(config, annotator, images, data_config, runtime)
    precision = setup_precision(config, runtime.device)
    if precision.apex_amp is not None:
        precision.apex_amp.initialize(model, opt_level="O1")  # patches the model in place
    with naming_lost_processes(runtime, lambda: "the annotation"), naming_lost_workers(runtime.rank, images):
        _annotate(annotator, images, writer, config, data_config, runtime, precision)
    leave_together(runtime)


def _open_images(config: GenerateConfig, data_config: dict[str, Any]) -> "IndexedImages":
    dataset = create_split(
        config,
        config.split or training_split(config.data),
        is_training=False,
        max_bad_images=config.max_bad_images,
        in_chans=data_config["input_size"][0],
        load_bytes=config.tf_preprocessing,
    )
    if not isinstance(dataset, ReadableImageDataset):
        raise UserError("Label maps go by the names of image files: give an image folder or a tar file.")
    return IndexedImages(dataset)


class IndexedImages(ReadableImageDataset):
    """Images whose samples say which one they are: an image, and its index and class."""

    def __init__(self, dataset: ReadableImageDataset) -> None:
        super().__init__(dataset, is_training=False, max_bad_images=dataset.max_bad_images)
        self.keys = map_keys(self.filenames())

    def make_sample(self, index: int, image: Any, target: Any) -> tuple[Any, torch.Tensor]:
        """Make the sample of a decoded image."""
        image, target = super().make_sample(index, image, target)
        return image, torch.tensor((index, target))


def _describe(annotator: Annotator, data_config: dict[str, Any], source: str) -> None:
    height, width = annotator.layout.grid
    agrees = averages(annotator, data_config["input_size"])
    _logger.info(
        f"{source}: {height}x{width} cells at {tuple(data_config['input_size'][1:])} pixels; "
        + (
            "its classifier, applied to each of them, averages to its own logits"
            if agrees
            else "its classifier is applied to each of them, but their average is not what it says of the image"
        )
    )


def _write_record(
    config: GenerateConfig, annotator: Annotator, images: IndexedImages, data_config: dict[str, Any], runtime: Runtime
) -> None:
    """Say beside the maps what they cover, and refuse to mix maps that cover something else."""
    root = Path(str(config.token_label_root))
    size = tuple(data_config["input_size"][1:])
    crop_pct, crop_mode = data_config["crop_pct"], data_config["crop_mode"]
    if config.tf_preprocessing:
        crop_pct, crop_mode = size[0] / (size[0] + 32), "center"  # TensorFlow's crop padding
    known = class_to_idx(images)
    record = MapRecord(
        Region(size, crop_pct, crop_mode),
        num_classes=annotator.model.num_classes,
        classes=sorted(known, key=known.__getitem__) if known and not (config.class_map or config.transfer) else None,
        model=config.model,
        weights=fingerprint(annotator.model),
        transfer=config.transfer,
    )
    there = MapRecord.read(root)
    if there is not None and there != record:
        differ = [f.name for f in dataclasses.fields(record) if getattr(there, f.name) != getattr(record, f.name)]
        differ = [name for name in differ if name != "weights"] or differ  # which another size resamples
        raise UserError(
            f"{root} holds label maps that were made otherwise ({', '.join(differ)} in label_maps.json): name another "
            "folder, or repeat the command they were made with."
        )
    _check_maps_there(root, there, (annotator.top_k, *annotator.layout.grid))
    if runtime.distributed:
        dist.barrier()
    if runtime.is_primary and there is None:
        try:
            record.write(root)
        except OSError as e:
            raise UserError(f"Cannot write to {root} ({e.strerror}); name another folder.") from e


def fingerprint(model: nn.Module) -> str:
    """A hash of a model's weights."""
    digest = hashlib.sha256()
    for name, tensor in model.state_dict().items():
        digest.update(name.encode())
        digest.update(tensor.detach().cpu().contiguous().flatten().view(torch.uint8).numpy())
    return digest.hexdigest()[:16]


def _check_maps_there(root: Path, record: MapRecord | None, shape: tuple[int, ...]) -> None:
    """Refuse to go on with maps of another shape, or of another origin."""
    if not root.is_dir():
        return
    maps = maps_in(root)
    if (key := next(iter(maps.keys()), None)) is None:
        return
    if record is None:
        raise UserError(f"{root} holds label maps of another origin, without label_maps.json: name another folder.")
    with suppress(DamagedMap):
        if (label_map := maps.read(key)) is not None and label_map.values.shape != shape:
            raise UserError(
                f"{root} holds label maps of {list(label_map.values.shape)}, these would be {list(shape)}: name "
                "another folder, or repeat the command they were made with."
            )


def _open_writer(config: GenerateConfig, images: IndexedImages, annotator: Annotator, runtime: Runtime) -> Writer:
    root = Path(str(config.token_label_root))
    try:
        check_shape((annotator.top_k, *annotator.layout.grid))
    except ValueError as e:
        raise UserError(f"The label maps would have {e}: choose a lower --top-k or --img-size.") from e
    try:
        lowest = next(path for path in (root, *root.parents) if path.exists())
    except OSError as e:  # such as a name that is too long
        raise UserError(f"Cannot write to {root} ({e.strerror}); name another folder.") from e
    if not lowest.is_dir():
        raise UserError(f"{lowest} is a file, expected a folder to write label maps to.")
    source = getattr(images.reader, "root", None)
    if source and Path(source).resolve() in (root.resolve(), *root.resolve().parents):
        raise UserError(f"{root} is among the images; name a folder beside them to write label maps to.")
    if config.format == "packed":
        if root.is_dir() and FolderMaps(root).classes():
            raise UserError(f"{root} holds maps in the published layout: name another folder, or leave out --format.")
        return PackedWriter(root, images.keys, runtime.rank, runtime.world_size)
    if root.is_dir() and shards_in(root):
        raise UserError(f"{root} holds packed maps: name another folder, or add --format packed.")
    if (classes := annotator.model.num_classes) > EXACT_CLASSES:
        raise UserError(
            f"The published layout holds class indices up to {EXACT_CLASSES} exactly, and the annotator has {classes} "
            "classes: add --format packed."
        )
    return FolderWriter(root, images.keys, runtime.rank, runtime.world_size)


def _annotate(
    annotator: Annotator,
    images: IndexedImages,
    writer: Writer,
    config: GenerateConfig,
    data_config: dict[str, Any],
    runtime: Runtime,
    precision: Precision,
) -> None:
    loader = create_eval_loader(
        images,
        config,
        data_config,
        config.batch_size,
        runtime.device,
        tf_preprocessing=config.tf_preprocessing,
        indices=writer.pending,
    )
    own, mean = ClassificationEvaluator(runtime.device), ClassificationEvaluator(runtime.device)
    check_compile_backend(config.torchcompile)
    annotate: Any = annotator
    if config.torchcompile:
        annotate = torch.compile(annotator, backend=config.torchcompile, mode=config.torchcompile_mode)
    with ProgressBar("Label maps", len(loader), config.log_freq, runtime.device, not runtime.is_primary) as progress:
        writer.write(_labelled(annotate, loader, images, config, runtime, precision, (own, mean), progress))
    images.unreadable = all_reduce_sum(images.unreadable.int().to(runtime.device), runtime) > 0
    if runtime.is_primary and (skipped := unreadable_files(images)):
        _logger.warning(f"{len(skipped)} unreadable images have no label map: {', '.join(skipped[:5])}")
    result, of_maps = gather_metrics(own, runtime), gather_metrics(mean, runtime)
    written = int(all_reduce_sum(torch.tensor(progress.images, device=runtime.device), runtime))
    accuracy = (
        f" Annotator{' on those written' * (writer.there > 0)}: top-1 {result.top1:.3f}, top-5 {result.top5:.3f}; "
        f"average of its maps: top-1 {of_maps.top1:.3f}"
    )
    _logger.info(f"{written} label maps written, {writer.there} were there.{accuracy if result.count else ''}")


@torch.inference_mode()
def _labelled(
    annotator: Callable[[torch.Tensor], Annotation],
    loader: Any,
    images: IndexedImages,
    config: GenerateConfig,
    runtime: Runtime,
    precision: Precision,
    evaluators: tuple[ClassificationEvaluator, ClassificationEvaluator],
    progress: ProgressBar,
) -> Iterator[Labelled]:
    """Annotate the batches of a loader, one map at a time."""
    for i, (batch, about) in enumerate(loader):
        if not len(batch):
            continue
        index, target = about.unbind(1)
        batch, target = batch.to(runtime.device, non_blocking=True), target.to(runtime.device, non_blocking=True)
        if config.channels_last:
            batch = batch.contiguous(memory_format=torch.channels_last)
        with precision.autocast():
            annotation = annotator(batch)
        if not config.transfer:
            for evaluator, logits in zip(evaluators, (annotation.logits, annotation.mean_logits), strict=True):
                evaluator.update(logits, target)
        values, indices = annotation.values.half().cpu(), annotation.indices.int().cpu()
        progress.update(
            len(batch), **(evaluators[0].summary() if not config.transfer and progress.wants_values(i) else {})
        )
        for image, *label_map in zip(index.tolist(), values, indices, strict=True):
            if not label_map[0].isfinite().all():
                raise UserError(
                    f"The annotator's logits for {images.filename(image)} are not finite in float16; leave out "
                    "--amp, or take another annotator."
                )
            yield image, images.keys[image], LabelMap(*label_map)

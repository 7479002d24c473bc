"""Validation of checkpoints and models: one, or a table of many."""

import argparse
import dataclasses
import glob
import json
import logging
import math
import os
from pathlib import Path
from typing import Any, TypeVar

import timm
import torch
from timm.layers import apply_test_time_pool
from timm.utils import random_seed
from torch import nn
from torch.utils.data import Dataset

from vip.data.datasets import class_to_idx, create_split, unreadable_files
from vip.data.loaders import create_eval_loader, naming_lost_workers
from vip.errors import UserError
from vip.reporting.logs import setup_logging
from vip.reporting.predictions import Recorder, write_predictions
from vip.reporting.progress import ProgressBar
from vip.reporting.results import Metrics, format_result, format_table, result_row, write_results
from vip.training.config import EvaluationConfig, TrainConfig, ValidateConfig
from vip.training.engine import evaluate
from vip.training.factory import check_compile_backend, choose_attention, create_model, resolve_data_config
from vip.training.labels import check_test_set, create_real_labels, label_subset
from vip.training.preprocessing import label_names
from vip.training.runtime import (
    Precision,
    Runtime,
    leave_together,
    naming_lost_processes,
    setup_precision,
    setup_runtime,
)
from vip.training.weights import (
    check_model_name,
    count_classes,
    find_checkpoint,
    load_weights,
    read_checkpoint,
    recognise,
    state_dict_of,
)

_logger = logging.getLogger(__name__)

ConfigT = TypeVar("ConfigT", bound=EvaluationConfig)

# What a checkpoint's `args` say about how its model is to be evaluated, obeyed unless a flag says otherwise.
_FROM_CHECKPOINT = (
    "img_size",
    "input_size",
    "in_chans",
    "input_img_mode",
    "crop_pct",
    "crop_mode",
    "mean",
    "std",
    "interpolation",
    "gp",
    "model_kwargs",
    "amp",
    "amp_dtype",
    "native_amp",
    "apex_amp",
    "channels_last",
    "fast_norm",
    "no_kernels",
    "tta",
)

_BATCH_SIZES = ("batch_size", "validation_batch_size", "validation_batch_size_multiplier")
_SAID = ("args", "data_config", "class_to_idx")


def validate_all(config: ValidateConfig, given: set[str]) -> int:
    """Validate what the configuration names and print the results.

    Args:
        config: What to validate, and how.
        given: Options the user gave, which win over what a checkpoint says.

    Returns:
        0, or 1 if some of several could not be validated.

    Raises:
        UserError: If there is one thing to validate and it cannot be, or nothing.
    """
    runtime = setup_runtime(config.device, workers=config.workers)
    setup_logging(runtime.is_primary)
    random_seed(config.seed, runtime.rank)
    jobs = _jobs(config)
    _check(config, len(jobs), runtime)
    rows: list[dict[str, Any]] = []
    for name, job in jobs:
        try:
            with naming_lost_processes(runtime, lambda: "the validation"):
                rows.append(validate(job, given, runtime))
        except (UserError, torch.OutOfMemoryError) as e:
            if len(jobs) == 1:
                raise UserError(str(e)) from e
            _logger.error(f"{name}: {e}")
            rows.append({"model": name, "error": str(e)})
    if runtime.is_primary:
        print(format_table(rows) if len(rows) > 1 else format_result(rows[0]))
        print(f"--result\n{json.dumps(rows if len(rows) > 1 else rows[0], indent=4)}")
        if config.results_file:
            write_results(config.results_file, config.results_format, rows)
    leave_together(runtime)
    return int(any("error" in row for row in rows))


def _check(config: ValidateConfig, jobs: int, runtime: Runtime) -> None:
    """Refuse flags that do not go together."""
    for name in ("valid_labels", "real_labels", "class_map"):
        if config.test_set and getattr(config, name):
            raise UserError(f"--test-set has labels of its own: leave out --{name.replace('_', '-')}.")
    if config.predictions and jobs > 1:
        raise UserError(f"--predictions is for one model, and there are {jobs}: name one.")
    if config.predictions and runtime.distributed:
        raise UserError("--predictions needs those of all images in one process; validate without torchrun.")
    if config.predictions and (config.real_labels or config.test_set == "imagenet-real"):
        raise UserError("--predictions keeps one right class of each image, ReaL labels have several: leave one out.")
    folder = Path(config.predictions).absolute().parent
    if config.predictions and not os.access(folder, os.W_OK):
        raise UserError(f"Cannot write {config.predictions}: give --predictions a file in a folder that is there.")


def _jobs(config: ValidateConfig) -> list[tuple[str, ValidateConfig]]:
    """One configuration a checkpoint, or a model."""
    if "" in config.checkpoint:
        raise UserError("--checkpoint is empty: give the path of a checkpoint, or leave it out.")
    if config.checkpoint:
        paths = []
        for pattern in config.checkpoint:
            found = sorted(glob.glob(pattern)) if glob.has_magic(pattern) else [pattern]
            if not found:
                raise UserError(f"No file matches {pattern}.")
            paths += found
        return [(path, dataclasses.replace(config, checkpoint=[path])) for path in paths]
    if not config.model:
        raise UserError("Nothing to validate: give --checkpoint PATH, or --model NAME --pretrained.")
    patterns = config.model.split(",")
    names = [n for p in patterns for n in (timm.list_models(p, pretrained=True) if glob.has_magic(p) else [p])]
    if not names:
        raise UserError(f"No model with pretrained weights matches {config.model!r}.")
    return [(name, dataclasses.replace(config, model=name, pretrained=True)) for name in names]


def validate(config: ValidateConfig, given: set[str], runtime: Runtime) -> dict[str, Any]:
    """Validate one checkpoint, or one pretrained model.

    Args:
        config: What to validate; `checkpoint` has at most one entry.
        given: Options the user gave, which win over what the checkpoint says.
        runtime: Device and processes.

    Returns:
        A row of results under timm's names.

    Raises:
        UserError: For anything the user can mend.
    """
    config, model, checkpoint, source = load_model(config, config.checkpoint[0] if config.checkpoint else "", given)
    data_config = resolve_data_config(model, config)
    dataset = _open_split(config, data_config["input_size"][0], model, checkpoint)
    param_count = sum(p.numel() for p in model.parameters())
    precision = setup_precision(config, runtime.device)
    model = prepare_model(model, config, data_config, runtime, precision)
    recorder = Recorder() if config.predictions else None
    metrics, images_per_second = _run(model, dataset, config, data_config, runtime, precision, recorder)
    if not math.isfinite(metrics.loss):
        raise UserError(
            f"The loss of {source} is {metrics.loss}, in {precision.description}: leave out --amp or give --amp-dtype "
            "bfloat16, and see --mean and --std, or take another checkpoint."
        )
    if recorder is not None:
        write_predictions(
            config.predictions, recorder.predictions(_class_names(dataset, config, model), config.model, source)
        )
    return result_row(config.model, source, metrics, param_count, data_config, images_per_second)


def load_model(
    config: ConfigT, checkpoint_path: str, given: set[str]
) -> tuple[ConfigT, nn.Module, dict[str, Any], str]:
    """Load the model of a checkpoint, or the pretrained one that the configuration names.

    Args:
        config: Configuration.
        checkpoint_path: A checkpoint or the folder of a run, empty for none.
        given: Options the user gave, which win over what the checkpoint says.

    Returns:
        The configuration with what the checkpoint says, the model, the checkpoint (of a published model the classes
        that its configuration names), and where the weights are from.

    Raises:
        UserError: If there is no such checkpoint, or it does not fit.
    """
    if not checkpoint_path:
        model: Any = create_model(config, config.num_classes)
        indices = {name: index for index, name in enumerate(label_names(model))}
        said = {"class_to_idx": indices} if indices and len(indices) == model.num_classes else {}
        return config, model, said, config.model
    path = find_checkpoint(checkpoint_path)
    checkpoint = read_checkpoint(path)
    checkpoint.update({name: _said(checkpoint, name, path) for name in _SAID if name in checkpoint})
    try:
        config = _complete(config, checkpoint, given)
    except UserError as e:
        raise UserError(f"{path} says how its model is evaluated, and {e}") from e
    return config, _load_weights(config, checkpoint, path), checkpoint, str(path)


def _said(checkpoint: dict[str, Any], name: str, path: Path) -> dict[str, Any]:
    """What a checkpoint says of its run under a name."""
    content = checkpoint[name]
    content = vars(content) if isinstance(content, argparse.Namespace) else {} if content is None else content
    if not isinstance(content, dict):
        raise UserError(f"{path} holds {name} as {type(content).__name__}, expected dict; take another one of the run.")
    return content


def _complete(config: ConfigT, checkpoint: dict[str, Any], given: set[str]) -> ConfigT:
    """Fill in what was not given from the checkpoint's own `args`."""
    args = checkpoint.get("args", {})
    for name, value in checkpoint.get("data_config", {}).items():  # what training resolved wins over any default
        if name in _FROM_CHECKPOINT and name != "input_size" and not args.get(name):
            args = {**args, name: list(value) if isinstance(value, tuple) else value}
    known = {k: args[k] for k in _FROM_CHECKPOINT if args.get(k) is not None and k not in given}
    if {"img_size", "input_size"} & given:
        known.pop("img_size", None), known.pop("input_size", None)
    if {"amp", "amp_dtype", "native_amp", "apex_amp"} & given:
        known = {k: v for k, v in known.items() if "amp" not in k}
    if "batch_size" not in given and "validation_batch_size_multiplier" in args:
        # the same batches as in training, so that results agree to the last digit
        sizes = {name: args[name] for name in _BATCH_SIZES if args.get(name) is not None}
        known["batch_size"] = TrainConfig(**sizes).eval_batch_size
    if config.use_ema is None and args.get("model_ema_force_cpu"):
        known["use_ema"] = False  # training did not evaluate them either
    fields = {f.name for f in dataclasses.fields(config)}
    return dataclasses.replace(config, **{k: v for k, v in known.items() if k in fields})


def _load_weights(config: EvaluationConfig, checkpoint: dict[str, Any], path: Path) -> nn.Module:
    state_dict = state_dict_of(checkpoint, config.use_ema, path)
    arch = checkpoint.get("arch")
    if not config.model:
        arch = arch if isinstance(arch, str) and timm.is_model(arch) else recognise(state_dict)
        if not arch:
            raise UserError(f"{path} does not say which model it is of, and it is none of ours; name it with --model.")
        config.model = arch
        _logger.info(f"{path} holds {arch}")
    check_model_name(config.model)
    num_classes = config.num_classes or count_classes(config.model, state_dict)
    model = create_model(dataclasses.replace(config, pretrained=False), num_classes)
    load_weights(model, state_dict, path)
    return model


def _open_split(config: ValidateConfig, in_chans: int, model: Any, checkpoint: dict[str, Any]) -> Dataset:
    dataset = create_split(
        config,
        config.split,
        is_training=False,
        in_chans=in_chans,
        max_bad_images=config.max_bad_images,
        num_samples=config.num_samples,
        batch_size=config.batch_size,
        load_bytes=config.tf_preprocessing,
    )
    found = class_to_idx(dataset)
    if config.test_set:
        check_test_set(config, dataset, model.num_classes, checkpoint.get("class_to_idx"))
        return dataset
    if (subset := label_subset(config)) is not None:
        if len(subset) == 0 or not 0 <= int(subset.min()) <= int(subset.max()) < model.num_classes:
            raise UserError(
                f"{config.valid_labels} names classes the model has not: it has {model.num_classes}, from 0 on."
            )
        if found is not None and len(subset) != len(found):
            raise UserError(f"{config.valid_labels} names {len(subset)} classes and {config.data} has {len(found)}.")
        return dataset
    if not config.real_labels:
        check_classes(dataset, config, model, checkpoint)
    return dataset


def check_classes(
    dataset: Dataset,
    config: EvaluationConfig,
    model: Any,
    checkpoint: dict[str, Any],
    advice: str = "For part of it give a --class-map or --valid-labels.",
) -> None:
    """Refuse a data set of other classes than the model has; `advice` says what to do then.

    Raises:
        UserError: With what differs.
    """
    found, trained_on = class_to_idx(dataset), checkpoint.get("class_to_idx")
    if found is None:
        return
    if config.class_map:
        if max(found.values()) >= model.num_classes:
            raise UserError(
                f"{config.class_map} names {max(found.values()) + 1} classes, the model has {model.num_classes}."
            )
        return
    if len(found) != model.num_classes:
        raise UserError(
            f"{config.data} has {len(found)} classes and the model {model.num_classes}: is it the data set the model "
            f"was trained on? {advice}"
        )
    if trained_on and trained_on != found:
        differ = next(name for name in found if trained_on.get(name) != found[name])
        raise UserError(f"{config.data} has other classes than the model was trained on, for example {differ!r}.")


def _class_names(dataset: Dataset, config: ValidateConfig, model: Any) -> list[str]:
    """Names of the classes that can be predicted, in their order; their indices where the data set has no names."""
    names = {index: name for name, index in (class_to_idx(dataset) or {}).items()}
    subset = label_subset(config)
    return [names.get(i, str(i)) for i in range(model.num_classes if subset is None else len(subset))]


def prepare_model(
    model: Any, config: ValidateConfig, data_config: dict[str, Any], runtime: Runtime, precision: Precision
) -> nn.Module:
    """Put a model on its device, in the form in which the configuration lets it run; `data_config` may change.

    Raises:
        UserError: If the model or the machine cannot be used so.
    """
    check_compile_backend(config.torchcompile)
    if config.test_pool:
        if getattr(model, "output_fmt", "NCHW") != "NCHW":
            raise UserError(f"--test-pool is for CNNs; {config.model} takes another size with --img-size alone.")
        model, pooled = apply_test_time_pool(model, data_config)
        if pooled:
            data_config["crop_pct"] = 1.0
    model = model.to(runtime.device).eval()
    choose_attention(model, config, runtime.device, training=False)
    if config.channels_last:
        model = model.to(memory_format=torch.channels_last)
    if precision.apex_amp is not None:
        model = precision.apex_amp.initialize(model, opt_level="O1")
    if config.torchscript:
        model = torch.jit.script(model)
    elif config.torchcompile:
        model = torch.compile(model, backend=config.torchcompile, mode=config.torchcompile_mode)
    if config.num_gpu > 1:
        if torch.cuda.device_count() < config.num_gpu:
            raise UserError(f"--num-gpu {config.num_gpu}, but there are {torch.cuda.device_count()} GPUs.")
        model = nn.DataParallel(model, device_ids=list(range(config.num_gpu)))
    return model


def _run(
    model: nn.Module,
    dataset: Any,
    config: ValidateConfig,
    data_config: dict[str, Any],
    runtime: Runtime,
    precision: Precision,
    recorder: Recorder | None,
) -> tuple[Metrics, float]:
    place = runtime.device, runtime.rank, runtime.world_size
    loader = create_eval_loader(dataset, config, data_config, config.batch_size, *place, config.tf_preprocessing)
    real_labels = create_real_labels(config, dataset, runtime)

    def on_output(output: torch.Tensor, target: torch.Tensor) -> None:
        if real_labels is not None:
            real_labels.add_result(output)
        if recorder is not None:
            recorder.add(output, target)

    batches = len(loader) if hasattr(loader, "__len__") else None
    bar = ProgressBar("Validation", batches, config.log_freq, runtime.device, not runtime.is_primary)
    with naming_lost_workers(runtime.rank, dataset), bar as progress:
        metrics = evaluate(
            model,
            loader,
            runtime,
            precision,
            progress,
            channels_last=config.channels_last,
            tta=config.tta,
            label_subset=label_subset(config),
            on_output=on_output,
        )
    if skipped := unreadable_files(dataset):
        if real_labels is not None:
            raise UserError(f"ReaL labels go by the order of images, and {skipped[0]} cannot be read; repair it.")
        _logger.warning(f"{len(skipped)} unreadable images were left out: {', '.join(skipped[:5])}")
    if real_labels is not None:
        metrics = dataclasses.replace(
            metrics,
            top1=real_labels.get_accuracy(k=1),
            top5=real_labels.get_accuracy(k=5),
            count=len(real_labels.is_correct[1]),
            correct1=sum(real_labels.is_correct[1]),
            correct5=sum(real_labels.is_correct[5]),
        )
    return metrics, progress.images_per_second * runtime.world_size

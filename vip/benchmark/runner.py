"""The benchmark: models take turns, and become rows."""

import dataclasses
import glob
import itertools
import logging
from collections.abc import Hashable, Iterable
from statistics import median
from typing import Any

import timm
import torch
from tqdm import tqdm

from vip.benchmark.config import BenchmarkConfig
from vip.benchmark.contenders import Case, Contender, prepare
from vip.benchmark.measure import Step, Turns, free_memory, matmul_step, one_line, take_turns, within_available_memory
from vip.benchmark.published import published_rows
from vip.errors import UserError
from vip.training.config import TrainConfig
from vip.training.factory import check_compile_backend, create_optimizer
from vip.training.weights import check_model_name

_logger = logging.getLogger(__name__)

MATMUL = "matrix product"
# a backward pass has two products for each of the forward pass, for the gradients of weights and of inputs
PRODUCTS = {"inference": 1, "train": 3}

Row = dict[str, Any]


def run(config: BenchmarkConfig, models: list[str], baseline: str, device: torch.device) -> list[Row]:
    """Measure every model at every image size and batch size.

    Args:
        config: Sizes, setting and timing.
        models: What `choose_models` gave.
        baseline: The one of them that ratios refer to.
        device: Device.

    Returns:
        A row for each: what it is and costs, the published figures if it is in the published table, and for each phase
        its measurements under names that begin with 'inference_' or 'train_'; a phase that failed has an '_error'.

    Raises:
        UserError: If the device cannot multiply matrices in this precision.
    """
    sizes: list[int | None] = [*config.img_size] or [None]
    sweeps = itertools.product(sizes, config.batch_size, config.width, models)
    cases = list(dict.fromkeys(Case(model, size, batch, width=width) for size, batch, width, model in sweeps))
    rows = {case: _described(case) for case in cases}
    with within_available_memory(device):
        for phase in config.phases:
            for case, measured in _measure(cases, phase, baseline, config, device).items():
                rows[case].update(measured)
    return list(rows.values())


def choose_models(config: BenchmarkConfig) -> list[str]:
    """Names of the models to measure.

    Raises:
        UserError: If no model matches a name or pattern.
    """
    patterns = config.models or [row.model for row in published_rows()]
    if config.table and config.models:
        raise UserError("--table and --models both say what to measure; give one.")
    names: list[str] = []
    for pattern in patterns:
        if glob.has_magic(pattern):
            found = timm.list_models(pattern, include_tags="." in pattern)
            if not found:
                raise UserError(
                    f"No model matches --models {pattern!r}; 'vip_*' or 'resnet*' are patterns of names in timm."
                )
            names += found
        else:
            check_model_name(pattern)
            names.append(pattern)
    return list(dict.fromkeys(names))


def check_setting(config: BenchmarkConfig) -> None:
    """Refuse before anything is measured what would fail afterwards.

    Raises:
        UserError: If a flag has no effect, or names no compiler backend or optimizer.
    """
    check_compile_backend(config.torchcompile)
    if config.torchcompile_mode and not config.torchcompile:
        raise UserError("--torchcompile-mode is a mode of --torchcompile: add it.")
    if config.memory_budget is not None and (config.torchcompile != "inductor" or "train" not in config.phases):
        raise UserError("--memory-budget is for training with --torchcompile: add it.")
    if "train" in config.phases:
        create_optimizer(TrainConfig(opt=config.opt), torch.nn.Linear(1, 1), 1)


def choose_baseline(config: BenchmarkConfig, models: list[str]) -> str:
    """The model that ratios refer to.

    Raises:
        UserError: If the one that was asked for is not among the models.
    """
    if config.baseline and config.baseline not in models:
        raise UserError(f"--baseline {config.baseline} is not among the models: {', '.join(models[:8])}.")
    return config.baseline or ("vip_s7" if "vip_s7" in models else models[0])


def _described(case: Case) -> Row:
    published = {row.model: row for row in published_rows()}.get(case.model)
    row: Row = {"model": case.model, "img_size": case.img_size, "batch_size": case.batch_size, "width": case.width}
    if published is not None and case.width == 1:
        row |= {
            "published_name": published.name,
            "published_top1": published.top1,
            "published_v100_images_per_second": published.images_per_second,
            "published_img_size": published.img_size,
        }
    return row


def _measure(
    cases: list[Case], phase: str, baseline: str, config: BenchmarkConfig, device: torch.device
) -> dict[Case, Row]:
    """Prepare all cases, let them take turns, and compare them; what fails is a row with an error."""
    # before the models: what they leave of the memory may be too little for it
    matmul, products = matmul_step(getattr(torch, config.precision), device)
    matmul()
    contenders: dict[Case, Contender] = {}
    measured: dict[Case, Row] = {}
    for case in tqdm(cases, f"Preparing {phase}", leave=False, disable=None):
        try:
            contenders[case] = prepare(case, phase, config, device)
        except Exception as e:  # any model may fail in a way of its own, and the other rows are worth having
            measured[case] = {f"{phase}_error": _failed(case, phase, one_line(e))}
            free_memory(device)
    while True:
        steps: dict[Hashable, Step] = {MATMUL: matmul}
        steps.update((case, contender.step) for case, contender in contenders.items())
        with tqdm(total=config.rounds * len(steps), desc=f"Timing {phase}", leave=False, disable=None) as progress:
            turns = take_turns(steps, config.rounds, config.seconds, device, progress.update)
        short = [case for case in contenders if turns[case].out_of_memory and contenders[case].batch_size > 1]
        if not short:
            break
        del steps
        for case in short:  # beside the others it did not fit: all turns again, with half its batch
            half = dataclasses.replace(case, batch_size=contenders.pop(case).batch_size // 2)
            free_memory(device)
            _logger.warning(f"{case.model}: out of memory beside the others, trying a batch of {half.batch_size}.")
            try:
                contenders[case] = prepare(half, phase, config, device)
            except Exception as e:  # as above
                measured[case] = {f"{phase}_error": _failed(case, phase, one_line(e))}
    if turns[MATMUL].error:
        raise UserError(f"A matrix product in {config.precision} fails on {device}: {turns[MATMUL].error}")
    rate = products / median(turns[MATMUL].seconds)
    for case, contender in contenders.items():
        own = turns[case]
        if own.error:
            measured[case] = {f"{phase}_error": _failed(case, phase, own.error)}
            continue
        base = Case(baseline, case.img_size, case.batch_size, width=case.width)
        speed = _images_per_second(contender, own)
        compared = base in contenders and not turns[base].error
        base_speed = _images_per_second(contenders[base], turns[base]) if compared else []
        figures = _figures(contender, speed, base_speed, rate / PRODUCTS[phase])
        measured[case] = {**_about(contender), **{f"{phase}_{name}": value for name, value in figures.items()}}
    del contenders, steps, matmul
    free_memory(device)
    return measured


def _failed(case: Case, phase: str, reason: str) -> str:
    _logger.warning(f"{case.model}: {phase} failed: {reason}")
    return reason


def _images_per_second(contender: Contender, turns: Turns) -> list[float]:
    return [contender.batch_size / seconds for seconds in turns.seconds]


def _about(contender: Contender) -> Row:
    counts = contender.counts
    return {
        "img_size": contender.input_size[-1],
        "params_m": counts.params / 1e6,
        "gmacs": counts.macs / 1e9,
        "activations_m": counts.activations / 1e6,
    }


def _figures(contender: Contender, speed: list[float], base_speed: list[float], products_per_second: float) -> Row:
    """Median and range of the rounds, of the throughput and of its ratio to the baseline's in the same round."""
    ratios = [own / base for own, base in zip(speed, base_speed, strict=False)]
    macs_per_second = median(speed) * contender.counts.macs
    return {
        "batch_size": contender.batch_size,
        "rounds": len(speed),
        "images_per_second": median(speed),
        "images_per_second_low": min(speed),
        "images_per_second_high": max(speed),
        **_ratio(ratios),
        "share_of_matmul_rate": macs_per_second / products_per_second,
        "memory_gb": None if contender.memory is None else contender.memory / 1e9,
        "first_step_seconds": contender.first_seconds,
    }


def _ratio(ratios: Iterable[float]) -> Row:
    values = list(ratios)
    if not values:
        return {}
    return {"ratio": median(values), "ratio_low": min(values), "ratio_high": max(values)}

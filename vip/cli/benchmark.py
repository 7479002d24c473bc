"""`vip benchmark`: measure models side by side."""

import dataclasses
import logging
import time
from collections.abc import Callable
from math import inf
from pathlib import Path
from typing import Any

import torch

from vip.benchmark.config import BenchmarkConfig
from vip.benchmark.environment import clocks, environment
from vip.benchmark.runner import check_setting, choose_baseline, choose_models, run
from vip.benchmark.scale import growth_rows, make_plans
from vip.benchmark.suite import (
    Finding,
    beside_parts,
    check_suite,
    run_parts,
    target_parts,
    where_time_goes,
)
from vip.cli.arguments import parse
from vip.data.augmentation import import_fast_images
from vip.errors import UserError
from vip.reporting.benchmarks import (
    csv_table,
    draw_benchmark,
    draw_growth,
    findings_table,
    json_table,
    markdown_table,
    plan_table,
    shares_table,
    write_texts,
)
from vip.reporting.logs import setup_logging
from vip.reporting.plots import new_figure
from vip.training.runtime import setup_runtime

_OF_SUITES = {"suite", "out", "device", "batch_size", "rounds", "seconds", "minutes", "warmup", "seed"}
_MINUTES_ON_GPU = 6  # what is begun then is meant to end within eight

_logger = logging.getLogger(__name__)


def main(argv: list[str]) -> int:
    """Parse the command line, measure, print and draw; 1 if a row failed, or a target of a suite was missed."""
    config, given = parse(BenchmarkConfig, argv, "vip benchmark")
    setup_logging(is_primary=True)
    device = setup_runtime(config.device).device
    if config.minutes is not None and config.suite != "performance":
        raise UserError("--minutes is for --suite performance: give that, or leave --minutes out.")
    if config.suite:
        return _suite(config, given, device)
    if config.out:
        raise UserError("--out is for the table of --suite: add it, or name a folder with --output.")
    check_setting(config)
    models = choose_models(config)
    baseline = choose_baseline(config, models)
    folder = Path(config.output or time.strftime("output/benchmark/%Y%m%d-%H%M%S"))
    write_texts(folder, {})  # whether it can be written is to be known before, and not after, everything is measured
    facts = environment(device)
    rows = run(config, models, baseline, device)
    facts |= clocks(device)  # while the device is still at work
    texts = {
        "table.md": markdown_table(rows, facts, baseline, config.setting),
        "results.csv": csv_table(rows),
        "results.json": json_table(rows, facts, dataclasses.asdict(config)),
    }
    print(texts[{"markdown": "table.md", "csv": "results.csv", "json": "results.json"}[config.format]])
    files = write_texts(folder, texts)
    files += draw_benchmark(rows, folder)
    _logger.info(f"Written to {folder}: {', '.join(file.name for file in files)}")
    return int(any(name.endswith("_error") for row in rows for name in row))


def _suite(config: BenchmarkConfig, given: set[str], device: torch.device) -> int:
    if others := given - _OF_SUITES:
        names = ", ".join(f"--{name.replace('_', '-')}" for name in sorted(others))
        raise UserError(f"--suite chooses models and settings itself: leave out {names}.")
    if not config.out:
        raise UserError("--suite needs a file for its table: add --out FILE.")
    gpu = device.type == "cuda"
    if "batch_size" not in given:
        config.batch_size = [256 if gpu else 8]
    if gpu and "seconds" not in given:
        config.seconds = 0.5  # as there is more to measure than on a CPU
    if len(config.batch_size) > 1:
        raise UserError(f"--suite takes one --batch-size, {len(config.batch_size)} given.")
    out = Path(config.out)
    if out.is_dir():
        raise UserError(f"--out {out} is a folder, expected the name of a file for the table.")
    write_texts(out.parent, {}, "--out")  # whether it can be written is to be known before

    def keep(text: str) -> None:
        """Write what there is so far, as the command may be stopped."""
        try:
            write_texts(out.parent, {out.name: f"{text}\n\nUnfinished: there is more to measure.\n"}, "--out")
        except UserError as e:  # later there may be room again, and what is found is printed in the end
            _logger.warning(str(e))

    text, status = (_performance if config.suite == "performance" else _scale)(config, device, keep)
    print(text)
    write_texts(out.parent, {out.name: text + "\n"}, "--out")
    return status


def _performance(config: BenchmarkConfig, device: torch.device, keep: Callable[[str], None]) -> tuple[str, int]:
    check_suite()
    gpu, begin = device.type == "cuda", time.monotonic()
    minutes = config.minutes if config.minutes is not None else _MINUTES_ON_GPU if gpu else inf
    facts = environment(device)
    setting = f"{config.turns}, optimized models compiled"
    if gpu:
        setting += "; kernels a tenth of a turn, other models half, at most 3 rounds"
    tables: list[str] = []
    at_work: dict[str, Any] = {}

    def text(findings: list[Finding]) -> str:
        if not at_work:
            at_work.update(clocks(device))  # after the first part, which keeps the device busy to its end
        so_far = f"{setting}; {(time.monotonic() - begin) / 60:.1f} minutes"
        return "\n\n".join([*tables, findings_table(findings, facts | at_work, so_far)])

    until = begin + 60 * minutes
    findings = run_parts(target_parts(device), config, device, lambda findings: keep(text(findings)))
    shares = where_time_goes(config, device)
    tables.append(shares_table(shares))
    findings += run_parts(beside_parts(device), config, device, lambda more: keep(text(findings + more)), until)
    missed = any(finding.failed or finding.verdict == "no" for finding in findings)
    failed = any(isinstance(share, str) for share in shares.values())
    return text(findings), int(missed or failed)


def _scale(config: BenchmarkConfig, device: torch.device, keep: Callable[[str], None]) -> tuple[str, int]:
    new_figure()
    import_fast_images()  # what is missing is to be known before anything is measured
    about = environment(device)
    config.precision = "bfloat16" if device.type == "cuda" else "float32"
    texts, failed = [], False

    def facts() -> str:
        return "; ".join(f"{name} {value}" for name, value in (about | clocks(device)).items() if value is not None)

    for grows, rows in growth_rows(config, device):
        texts.append(f"Growth with `{grows}`:\n\n{markdown_table(rows, {}, rows[0]['model'], config.setting).rstrip()}")
        keep("\n\n".join((*texts, facts())))
        draw_growth(rows, Path(config.out).parent)
        failed |= any(name.endswith("_error") for row in rows for name in row)
    texts.append(f"300 epochs of ImageNet:\n\n{plan_table(make_plans(config, device))}")
    return "\n\n".join((*texts, facts())), int(failed)

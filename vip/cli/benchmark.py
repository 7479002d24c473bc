"""`vip benchmark`: measure models side by side."""

import dataclasses
import logging
import time
from pathlib import Path

from vip.benchmark.config import BenchmarkConfig
from vip.benchmark.environment import clocks, environment
from vip.benchmark.runner import check_setting, choose_baseline, choose_models, run
from vip.cli.arguments import parse
from vip.reporting.benchmarks import csv_table, draw_benchmark, json_table, markdown_table, write_texts
from vip.reporting.logs import setup_logging
from vip.training.runtime import setup_runtime

_logger = logging.getLogger(__name__)


def main(argv: list[str]) -> int:
    """Parse the command line, measure, print and draw; 1 if a row failed."""
    config, _ = parse(BenchmarkConfig, argv, "vip benchmark")
    setup_logging(is_primary=True)
    device = setup_runtime(config.device).device
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

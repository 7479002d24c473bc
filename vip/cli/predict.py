"""`vip predict`: name what is in images."""

import os
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import torch
from tqdm import tqdm

from vip.cli.arguments import parse
from vip.errors import UserError, printable
from vip.files import replacing
from vip.prediction.classes import find_class
from vip.prediction.config import PredictConfig
from vip.prediction.formats import HEADINGS, WRITERS
from vip.prediction.heatmaps import Heatmap, name_pictures
from vip.prediction.inputs import find_images
from vip.prediction.predictor import Predictor, load_predictor
from vip.reporting.logs import setup_logging


def main(argv: list[str]) -> int:
    """Parse the command line, predict and print; 1 if an image could not be read."""
    config, given = parse(PredictConfig, argv, "vip predict")
    if config.heatmap_class and not config.heatmap:
        raise UserError("--heatmap-class is for heat maps: add --heatmap FOLDER.")
    folder = Path(config.out).absolute().parent
    if config.out and (not os.access(folder, os.W_OK) or os.path.isdir(config.out)):
        raise UserError(f"Cannot write {config.out}: give --out a file in a folder that is there.")
    setup_logging(is_primary=True)
    images = find_images(config.images, sys.stdin.buffer)
    if config.out and os.path.realpath(config.out) in map(os.path.realpath, [*images, config.checkpoint]):
        raise UserError(f"--out {config.out} would take the place of what is read: name another file.")
    pictures = name_pictures(images, config.heatmap) if config.heatmap else {}
    predictor = load_predictor(**{name: getattr(config, name) for name in given})
    try:
        return _predict(predictor, images, pictures, config)
    except torch.OutOfMemoryError as e:
        raise UserError(f"{str(e).splitlines()[0]} Give a smaller --batch-size than {predictor.batch_size}.") from e


def _predict(predictor: Predictor, images: list[str], pictures: dict[str, Path], config: PredictConfig) -> int:
    wanted = find_class(config.heatmap_class, predictor.classes) if config.heatmap_class else None
    predictions = predictor.predict(images, config.top_k, bool(pictures), wanted)
    bar = tqdm(total=len(images), unit="image", dynamic_ncols=True, leave=False, disable=not sys.stderr.isatty())
    failed = False
    with bar, _writer(config.out, bar) as write:
        write(HEADINGS[config.format])
        for prediction in predictions:
            picture = None
            if prediction.error:
                failed = True
                bar.write(printable(f"{prediction.image}: {prediction.error}"), sys.stderr)
            elif prediction.heatmap is not None:
                picture = pictures[str(prediction.image)]
                _draw(prediction.heatmap, picture)
            write(WRITERS[config.format](prediction, picture))
            bar.update()
    return int(failed)


@contextmanager
def _writer(path: str, bar: tqdm) -> Iterator[Callable[[str], None]]:
    """Gives a function that writes text to a file, or to standard output where there is no path."""
    if not path:
        encoding = sys.stdout.encoding or "utf-8"  # which may not have a name's bytes, or a class's letters

        def show(text: str) -> None:
            bar.write(text.encode(encoding, "backslashreplace").decode(encoding), sys.stdout, end="")
            sys.stdout.flush()  # who reads from a pipe is not to wait for the end

        yield show
        return
    try:
        with replacing(path) as unfinished, open(unfinished, "w", encoding="utf-8", errors="backslashreplace") as file:
            yield lambda text: print(text, end="", file=file)
    except OSError as e:
        raise UserError(f"Cannot write {path} ({e.strerror}); make room, or name another file.") from e


def _draw(heatmap: Heatmap, path: Path) -> None:
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with replacing(path) as unfinished:
            heatmap.overlay().save(unfinished, "PNG")
    except OSError as e:
        raise UserError(f"Cannot write {path} ({e.strerror}); make room, or give --heatmap another folder.") from e

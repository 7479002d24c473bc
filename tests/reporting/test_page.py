"""The page of a report: its parts, its pictures, and how a browser shows it."""

import base64
import html
import io
import json
import re
import shutil
import subprocess
from collections.abc import Callable
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image
from test_analysis import random_predictions

from vip.reporting.curves import draw_curves, make_curves
from vip.reporting.page import _names, write_report
from vip.reporting.predictions import Predictions, write_predictions
from vip.reporting.runs import EpochLog, read_run, with_speed

BROWSER = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
ZOO = Path(__file__).parents[2] / "models"
HOSTILE = "_<script>alert(1)<!--$x^$ \"'&lt;"
VOID = {"meta", "img", "source", "br", "link", "hr", "input"}


def write_run(folder: Path, epochs: int, speed_from: int | None = 0) -> EpochLog:
    """A run whose top-1 is best in the epoch before the last, if it has that many."""
    folder.mkdir(parents=True)
    rng = np.random.default_rng(epochs)
    top1 = [10 + 60 * e / epochs for e in range(epochs)]
    top1[-1] -= 30 if epochs > 2 else 0
    rows = [f"{e},{3 - e / 9},{rng.uniform(1, 2)},{top1[e]},{top1[e]},{0.1 / (e + 1)}" for e in range(epochs)]
    header = "epoch,train_loss,eval_loss,eval_top1,eval_top5,lr"
    (folder / "summary.csv").write_text("\n".join([header, *rows, ""]))
    if speed_from is not None:
        rows = [f"{e},{100 + e},{2 + e / 10}" for e in range(speed_from, epochs)]
        (folder / "speed.csv").write_text("\n".join(["epoch,train_images_per_second,train_memory_gb", *rows, ""]))
    return read_run(folder)


class Page(HTMLParser):
    """Elements of a page with their attributes; what is opened has to be closed."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.elements: list[tuple[str, dict[str, str | None]]] = []
        self.open: list[str] = []
        self.text = ""
        self.feed(text)
        self.close()
        assert self.open == []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        assert len({name for name, _ in attrs}) == len(attrs)
        self.elements.append((tag, dict(attrs)))
        self.open += [] if tag in VOID else [tag]

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        self.text += f"{data} " if self.open[-1:] not in (["style"], ["script"]) else ""

    def all(self, tag: str) -> list[dict[str, str | None]]:
        return [attrs for name, attrs in self.elements if name == tag]


@pytest.fixture(scope="module")
def page(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Runs of 7, 1 and 3 epochs, the first of a hostile name, two with a validation, beside a published log."""
    root = tmp_path_factory.mktemp("runs")
    runs = [write_run(root / HOSTILE, 7), write_run(root / "one", 1, None), write_run(root / "late", 3, 1)]
    few, many = random_predictions(), random_predictions(classes=60)
    few.classes[3] = HOSTILE
    write_predictions(root / HOSTILE / "predictions.npz", few)
    write_predictions(root / "one" / "predictions.npz", many)
    return write_report(runs, [read_run(ZOO / "vip_s7")], ["Behind.\nBy <b>two</b>."], root / "out" / "report")


def test_parts(page: Path) -> None:
    parsed = Page(page.read_text(encoding="utf-8"))
    words = " ".join(parsed.text.split())
    assert words.startswith(f"Report of {HOSTILE}, one, late Report of {HOSTILE}, one, late Top-1")
    for part in (
        f"{HOSTILE} – 7 of 7 52.86 5 31.43",
        "one – 1 of 1 10.00 0 10.00 3.0000 – –",
        "late – 3 of 3 30.00 1 20.00 2.7778 102 2.20 GB",
        "published vip_s7 vip_s7 310 of 310 81.52",
        "Behind. By <b>two</b>.",
        f"Validation of {HOSTILE}",
        "Validation of one",
        "Worst classes",
        "Best classes",
    ):
        assert part in words, part
    assert words.count("Classes, the worst first") == 1 and words.count("Most confused") == 2
    ids = [attrs["id"] for _, attrs in parsed.elements if "id" in attrs]
    assert len(set(ids)) == len(ids)
    assert all(attrs["aria-labelledby"] in ids for _, attrs in parsed.elements if "aria-labelledby" in attrs)


def test_it_needs_nothing_from_outside(page: Path) -> None:
    parsed = Page(page.read_text(encoding="utf-8"))
    sources = [value for _, a in parsed.elements for name, value in a.items() if name in ("src", "srcset", "href")]
    assert len(sources) > 10 and all(str(source).startswith("data:image/png;base64,") for source in sources)
    assert not {"script", "link", "iframe", "object", "base"} & {tag for tag, _ in parsed.elements}
    assert not [name for _, attrs in parsed.elements for name in attrs if name.startswith("on")]
    assert "@import" not in page.read_text() and "url(" not in page.read_text()


def test_pictures(page: Path) -> None:
    """Those in the page are those beside it, one for each scheme, with words for who cannot see them."""
    parsed = Page(page.read_text(encoding="utf-8"))
    beside = {file.read_bytes(): file.stem for file in page.parent.glob("*.png")}
    names = {}
    for tag, key in (("img", "src"), ("source", "srcset")):
        contents = [base64.b64decode(str(attrs[key]).partition(",")[2]) for attrs in parsed.all(tag)]
        names[tag] = [beside.pop(content) for content in contents]
        for content in contents:
            with Image.open(io.BytesIO(content)) as image:
                corner = image.convert("L").getpixel((2, 2))
                assert (
                    len(image.convert("RGB").getcolors(10**6)) > 10 and corner == 255 if tag == "img" else corner < 40
                )
    assert not beside and names["source"] == [f"{name}-dark" for name in names["img"]]
    assert names["img"] == [
        *("top-1", "validation-loss", "training-loss", "learning-rate", "throughput", "memory"),
        *("classes-1", "reliability-1", "confidence-1", "reliability-2", "confidence-2"),
    ]
    assert all(len(str(attrs["alt"])) > 40 for attrs in parsed.all("img"))
    assert f"{HOSTILE} 31.43" in str(parsed.all("img")[0]["alt"])


CHECK = """
<script>
const errors = [];
addEventListener("error", event => errors.push(String(event.message || event.target.outerHTML).slice(0, 200)), true);
addEventListener("load", () => {
  const result = document.createElement("pre");
  result.id = "check";
  result.textContent = JSON.stringify({
    errors,
    images: [...document.images].map(image => [image.naturalWidth, image.clientWidth, image.clientHeight]),
    shown: [...document.images].map(image => image.currentSrc),
    requests: performance.getEntriesByType("resource").map(entry => entry.name),
    overflow: document.documentElement.scrollWidth - document.documentElement.clientWidth,
    width: innerWidth,
    dark: matchMedia("(prefers-color-scheme: dark)").matches,
    background: getComputedStyle(document.body).backgroundColor,
  });
  document.body.append(result);
});
</script>
"""


@pytest.fixture
def browse(tmp_path: Path) -> Callable[..., dict[str, Any]]:
    """Shows a page in a browser without a window, and tells what came of it; the console's lines are among it."""
    if BROWSER is None:
        pytest.skip("no Chromium or Chrome in PATH")

    def show(text: str, width: int = 1200, dark: bool = False) -> dict[str, Any]:
        file = tmp_path / "checked.html"
        text = text.replace("default-src 'none'", "default-src 'none'; script-src 'unsafe-inline'")
        file.write_text(text.replace("<head>", f"<head>{CHECK}", 1), encoding="utf-8")
        flags = ["--headless", "--no-sandbox", "--disable-gpu", "--disable-dev-shm-usage", "--enable-logging=stderr"]
        flags += [f"--user-data-dir={tmp_path / 'profile'}", f"--window-size={width},900", "--dump-dom"]
        flags += [f"--blink-settings=preferredColorScheme={0 if dark else 1}", "--host-resolver-rules=MAP * ~NOTFOUND"]
        done = subprocess.run([BROWSER, *flags, file.as_uri()], capture_output=True, text=True, timeout=60)
        found = re.search(r'<pre id="check">(.*?)</pre>', done.stdout, re.DOTALL)
        assert found, done.stderr[-2000:]
        console = [line for line in done.stderr.splitlines() if ":CONSOLE" in line]
        return {**json.loads(html.unescape(found[1])), "console": console}

    return show


@pytest.mark.parametrize("width, dark", [(1200, False), (1200, True), (500, False)])
def test_a_browser_shows_it(page: Path, browse: Callable[..., dict[str, Any]], width: int, dark: bool) -> None:
    text = page.read_text(encoding="utf-8")
    found = browse(text, width, dark)
    assert (found["width"], found["dark"]) == (width, dark)
    assert (found["console"], found["errors"], found["requests"], found["overflow"]) == ([], [], [], 0)
    assert len(found["images"]) == 11 and all(natural == 780 for natural, _, _ in found["images"])
    assert all(250 < w <= width and h > 100 for _, w, h in found["images"])
    shown = [attrs["srcset" if dark else "src"] for attrs in Page(text).all("source" if dark else "img")]
    assert found["shown"] == shown
    assert found["background"] == ("rgb(17, 19, 22)" if dark else "rgb(243, 245, 247)")


def test_the_browser_would_tell(page: Path, browse: Callable[..., dict[str, Any]]) -> None:
    """What the test above looks for is found where it is."""
    text = page.read_text(encoding="utf-8").replace("</main>", "<img src='http://missing.invalid/x.png' alt=''></main>")
    found = browse(text.replace('src="data:image/png;base64,iVBOR', 'src="data:image/png;base64,AAAAA', 1), 700)
    assert sum(natural == 0 for natural, _, _ in found["images"]) == 2
    assert found["console"], "the page's policy forbids pictures from outside"
    text = re.sub("<meta http-equiv[^>]*>", "", text).replace("</main>", "<p style='width: 900px'>wide</p></main>")
    found = browse(text, 700)
    assert found["errors"] and found["overflow"] > 100 and any("missing.invalid" in name for name in found["requests"])


@pytest.fixture
def figures(monkeypatch: pytest.MonkeyPatch) -> dict[str, Any]:
    """The figures that are drawn, by name."""
    drawn: dict[str, Any] = {}

    def save_figure(figure: Any, path: Path, endings: list[str]) -> list[Path]:
        drawn[path.name] = figure
        return [path.with_suffix(".png")]

    monkeypatch.setattr("vip.reporting.curves.save_figure", save_figure)
    return drawn


def test_curves(figures: dict[str, Any], tmp_path: Path) -> None:
    long, one, late = write_run(tmp_path / "a", 12), write_run(tmp_path / "b", 1, None), write_run(tmp_path / "c", 4, 2)
    published = read_run(ZOO / "vip_s7")
    curves = make_curves([with_speed(run) for run in (long, one, late)], [published], ["a", "b", "c", "p"])
    draw_curves(curves, tmp_path)
    (ax,) = figures["top-1"].axes
    lines = [line for line in ax.get_lines() if line.get_marker() != "*"]
    stars = [line for line in ax.get_lines() if line.get_marker() == "*"]
    for line, run in zip(lines, (long, one, late, published), strict=True):
        assert list(line.get_xdata()) == list(range(len(line.get_xdata())))
        assert list(line.get_ydata()) == run.column("eval_top1")[:24], "twice as long as the longest run"
        assert line.get_linestyle() == ("--" if run is published else "-")
    assert [star.get_xdata()[0] for star in stars] == [np.argmax(r.column("eval_top1")) for r in (long, one, late)]
    assert [text.get_text() for text in figures["top-1"].legends[0].get_texts()] == ["a", "b", "c", "p", "best top-1"]
    (ax,) = figures["throughput"].axes
    assert [list(line.get_ydata()) for line in ax.get_lines()] == [
        [100 + e for e in range(12)],
        [pytest.approx(np.nan, nan_ok=True)] * 2 + [102, 103],
    ]
    assert len(figures["learning-rate"].axes[0].get_lines()) == 3, "the published log has none"


def test_no_two_curves_look_the_same(figures: dict[str, Any], tmp_path: Path) -> None:
    runs = [write_run(tmp_path / f"run{i}", 2) for i in range(20)]
    draw_curves(make_curves(runs, [], [run.path.parent.name for run in runs]), tmp_path)
    for name in ("learning-rate", "learning-rate-dark"):
        lines = figures[name].axes[0].get_lines()
        assert len({(line.get_color(), line.get_marker()) for line in lines}) == 20


def test_names_differ(tmp_path: Path) -> None:
    runs = [write_run(tmp_path / name, 1) for name in ("x/run", "y/run", "other")]
    assert _names([*runs, runs[2]], [read_run(ZOO / "vip_s7")]) == [
        *(str(tmp_path / "x/run"), str(tmp_path / "y/run")),
        *(f"{tmp_path}/other (1)", f"{tmp_path}/other (2)", "published vip_s7"),
    ]


def test_few_classes_and_none_confused(tmp_path: Path) -> None:
    """Two classes have no five likeliest."""
    run = write_run(tmp_path / "run", 1)
    target = np.array([0, 1, 1])
    top = np.stack([target, 1 - target], 1)
    found = Predictions(target, top, np.array([[0.9, 0.1]] * 3, np.float32), ["a", "b"], "m", "c")
    write_predictions(tmp_path / "run" / "predictions.npz", found)
    words = " ".join(Page(write_report([run], [], [], tmp_path / "out").read_text()).text.split())
    assert "top-1 100.00 % expected calibration error 10.00 %" in words and "top-5" not in words
    assert "No image was taken for one of another class." in words

"""What the site has besides the pages in docs/: the files of the repository that they link to, and tables of flags."""

import dataclasses
import io
import posixpath
import re
import sys
import typing
from collections.abc import Iterator
from contextlib import redirect_stdout, suppress
from pathlib import Path
from typing import Any

from mkdocs.structure.files import File, Files

from vip.benchmark.config import BenchmarkConfig
from vip.cli import COMMANDS, main
from vip.options import Options, value_type
from vip.prediction.config import PredictConfig
from vip.training.config import (
    GENERATE_FLAGS_WITHOUT_EFFECT,
    TRAIN_FLAGS_WITHOUT_EFFECT,
    VALIDATE_FLAGS_WITHOUT_EFFECT,
    GenerateConfig,
    TrainConfig,
    ValidateConfig,
)

DOCS = Path(__file__).resolve().parent
ROOT = DOCS.parent
LINK = re.compile(r"\]\(([^)#\s]+)(#[^)\s]*)?\)")
FLAGS = "<!-- tables of flags -->"
OPTIONS: dict[str, tuple[type[Options], dict[str, str]]] = {
    "train": (TrainConfig, TRAIN_FLAGS_WITHOUT_EFFECT),
    "validate": (ValidateConfig, VALIDATE_FLAGS_WITHOUT_EFFECT),
    "generate-label": (GenerateConfig, GENERATE_FLAGS_WITHOUT_EFFECT),
    "predict": (PredictConfig, {}),
    "benchmark": (BenchmarkConfig, {}),
}


def on_files(files: Files, *, config: Any) -> Files:
    """Add the files outside docs/ that pages lead to, so that the site needs no other host."""
    seen = set(DOCS.glob("*.md"))
    pages = sorted(seen)
    while pages:
        for target in sorted(set(_targets(pages.pop())) - seen):
            seen.add(target)
            if target.suffix == ".md":
                pages.append(target)
            if not target.is_relative_to(DOCS):
                files.append(File.generated(config, _uri(target), abs_src_path=str(target)))
    return files


def on_page_markdown(markdown: str, *, page: Any, config: Any, files: Files) -> str:
    """Turn links between files of the repository into links between pages of the site, and fill in the flags."""
    source, here = Path(page.file.abs_src_path), posixpath.dirname(page.file.src_uri)

    def rewrite(link: re.Match) -> str:
        target = _resolve(source, link[1])
        return f"]({posixpath.relpath(_uri(target), here)}{link[2] or ''})" if target else link[0]

    return LINK.sub(rewrite, markdown).replace(FLAGS, "\n\n".join(map(describe, COMMANDS)) if FLAGS in markdown else "")


def _targets(page: Path) -> Iterator[Path]:
    links = LINK.finditer(page.read_text(encoding="utf-8"))
    return (target for link in links if (target := _resolve(page, link[1])))


def _resolve(page: Path, link: str) -> Path | None:
    """The file of the repository that a link leads to: of a folder its README, as hosts of repositories show it."""
    target = (page.parent / link).resolve()
    target = target / "README.md" if target.is_dir() else target
    return target if target.is_file() and target.is_relative_to(ROOT) else None


def _uri(target: Path) -> str:
    """Where a file of the repository is in the site."""
    if target.is_relative_to(DOCS):
        return target.relative_to(DOCS).as_posix()
    return "repository/" + target.relative_to(ROOT).as_posix()


def describe(command: str) -> str:
    """What a command takes, as a section of Markdown."""
    if command not in OPTIONS:
        with redirect_stdout(io.StringIO()) as text, suppress(SystemExit):
            main([command, "--help"])
        return f"## vip {command}\n\n```text\n{text.getvalue().strip()}\n```"
    config, without_effect = OPTIONS[command]
    hints = typing.get_type_hints(config)
    fields = {field.name: field for field in dataclasses.fields(config)}
    lines = [f"## vip {command}", "", str(config.__doc__), ""]
    lines += [
        "`-c FILE`, `--config FILE` reads a recipe, whose keys are these flags without `--`; flags win over it.",
        "",
    ]
    for base in reversed(config.__mro__):
        rows = [_row(fields.pop(name), hints[name]) for name in vars(base).get("__annotations__", {}) if name in fields]
        if rows:
            heading = (base.__doc__ or "").split(".")[0].split(";")[0]
            lines += [f"### {heading}", "", "| flag | default | what it says |", "| :--- | :--- | :--- |", *rows, ""]
    if without_effect:
        lines += ["### Accepted without effect", "", "| flag | why |", "| :--- | :--- |"]
        lines += [f"| `{flag}` | {reason} |" for flag, reason in without_effect.items()]
    return "\n".join(lines)


def _row(field: dataclasses.Field, annotation: Any) -> str:
    meta, (kind, is_list) = field.metadata, value_type(annotation)
    flag = "--" + field.name.replace("_", "-")
    names = [field.name.upper()] if meta["positional"] else [flag, *meta["flags"]]
    if kind is bool:
        long = [name for name in names if name.startswith("--")]
        names += [name.replace("--no-", "--") if flag.startswith("--no-") else "--no-" + name[2:] for name in long]
    default = field.default if field.default_factory is dataclasses.MISSING else field.default_factory()
    says = [meta["help"]]
    if meta["choices"]:
        says.append("one of " + ", ".join(f"`{choice}`" for choice in meta["choices"] if choice != ""))
    low, high = meta["low"], meta["high"]
    if low is not None or high is not None:
        says.append(f"at least {low}" if high is None else f"at most {high}" if low is None else f"{low} to {high}")
    if is_list and not meta["positional"]:
        says.append("may be repeated" if meta["append"] else f"{meta['count'] or 'several'} values")
    shown = "" if default in (None, "", [], {}) else f"`{default}`"
    cells = [", ".join(f"`{name}`" for name in names), shown, "; ".join(says)]
    return "| " + " | ".join(cell.replace("|", "\\|") for cell in cells) + " |"


if __name__ == "__main__":
    print("\n\n".join(map(describe, sys.argv[1:] or COMMANDS)))

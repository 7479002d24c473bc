"""The README against the program it describes."""

import re
import shlex
from pathlib import Path

import pytest

from vip.benchmark.config import BenchmarkConfig
from vip.benchmark.runner import choose_models
from vip.cli.arguments import build_parser, parse
from vip.prediction.config import PredictConfig
from vip.training.config import (
    GENERATE_FLAGS_WITHOUT_EFFECT,
    TRAIN_FLAGS_WITHOUT_EFFECT,
    VALIDATE_FLAGS_WITHOUT_EFFECT,
    GenerateConfig,
    TrainConfig,
    ValidateConfig,
)

ROOT = Path(__file__).parents[1]
README = (ROOT / "README.md").read_text()
DOCUMENTS = sorted(p for folder in (".", "docs", "models/*") for p in ROOT.glob(f"{folder}/*.md"))


def test_flags_without_effect_are_listed_with_their_reasons():
    table = README.partition("## Flags without effect")[2].partition("\n\n`")[0]
    listed = {}
    for line in table.splitlines():
        if line.startswith("| `--"):
            flags, reason = [cell.strip() for cell in line.strip("|").split("|")]
            listed.update(dict.fromkeys(re.findall(r"`(--[\w-]+)`", flags), reason.replace("`", "")))
    expected = {
        flag.partition(" ")[0]: reason.replace("`", "")
        for flags in (TRAIN_FLAGS_WITHOUT_EFFECT, VALIDATE_FLAGS_WITHOUT_EFFECT, GENERATE_FLAGS_WITHOUT_EFFECT)
        for flag, reason in flags.items()
    }
    assert listed == expected


@pytest.mark.parametrize("path", DOCUMENTS, ids=lambda p: str(p.relative_to(ROOT)))
def test_flags_in_documents_exist(path: Path):
    known = {"--help", "--version", "--constraint", "--standalone", "--nproc-per-node"}  # the last two are torchrun's
    known |= {"--gpus", "--ipc", "--nodes"}  # docker's and sbatch's
    for config, ignored in (
        (TrainConfig, TRAIN_FLAGS_WITHOUT_EFFECT),
        (ValidateConfig, VALIDATE_FLAGS_WITHOUT_EFFECT),
        (GenerateConfig, GENERATE_FLAGS_WITHOUT_EFFECT),
        (BenchmarkConfig, {}),
        (PredictConfig, {}),
    ):
        known |= set(build_parser(config, "vip", ignored)._option_string_actions)
    for program in (p for folder in ("studies", "vip/cli", "tests/soak") for p in ROOT.glob(f"{folder}/**/*.py")):
        known |= set(re.findall(r'add_argument\("(--[\w-]+)"', program.read_text()))
    assert not {flag for flag in re.findall(r"(?<![\w-])--[a-z][\w-]*", path.read_text())} - known


@pytest.mark.parametrize("path", DOCUMENTS, ids=lambda p: str(p.relative_to(ROOT)))
def test_links_in_documents_lead_somewhere(path: Path):
    for target in re.findall(r"\]\(([^)#]+)\)", path.read_text()):
        if "://" not in target:
            assert (path.parent / target).exists(), target


def test_files_in_commands_exist():
    for name in set(re.findall(r"(?:\./|bash |python |--config )([\w./-]+\.(?:sh|py|yaml))", README)) - {"recipe.yaml"}:
        assert (ROOT / name).exists(), name


def test_code_runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """The example, with the small model at sizes it can take so that it takes seconds."""
    import timm
    import torch

    code = README.partition("```python\n")[2].partition("```")[0]
    for old, new in (("vip_s7", "vip_nano4_32"), ("224", "32"), ("336", "48"), ("448", "64")):
        code = code.replace(old, new)
    monkeypatch.chdir(tmp_path)
    import vip  # noqa: F401  # registers the models

    torch.save(timm.create_model("vip_nano4_32").state_dict(), "vip_nano4_32_trained_at_32.pth.tar")
    names: dict = {}
    exec(compile(code, "README.md", "exec"), names)
    assert names["logits"].shape == (2, 10)
    assert names["model"].patch_embed.img_size == (64, 64)


def test_benchmark_commands_of_the_readme_are_understood() -> None:
    lines = [line.partition(" #")[0] for line in README.splitlines() if line.startswith("vip benchmark")]
    assert len(lines) >= 5
    for line in lines:
        config, _ = parse(BenchmarkConfig, shlex.split(line)[2:], "vip benchmark")
        assert choose_models(config)

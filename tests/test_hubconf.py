"""`hubconf.py` through torch.hub."""

from pathlib import Path

import pytest
import timm
import torch

import vip

ROOT = str(Path(__file__).parents[1])
PUBLISHED = {"vip_s7", "vip_m7", "vip_l7", "vip_nano4_32", "lvvit_s", "lvvit_m", "lvvit_l", "eamlp_7"}


@pytest.fixture
def repository(monkeypatch: pytest.MonkeyPatch) -> str:
    """A name of a repository on GitHub of which torch.hub has this folder: `list` and `help` take no folders."""
    monkeypatch.setattr("torch.hub._get_cache_or_reload", lambda *args, **kwargs: ROOT)
    return "owner/repository"


def test_it_lists_our_models_and_nothing_else(repository: str) -> None:
    names = set(torch.hub.list(repository))
    assert names >= PUBLISHED
    assert all(timm.model_entrypoint(name).__module__.startswith("vip.models.") for name in names)
    ours = {name for kind in ("vip", "lvvit", "eamlp") for name in timm.list_models(f"{kind}_*")}
    assert names == ours | {"resmlp_big_24_p16_224"}


@pytest.mark.parametrize("name", ["vip_s7", "lvvit_s", "eamlp_7"])
def test_their_descriptions_are_shown(repository: str, name: str) -> None:
    text = torch.hub.help(repository, name)
    assert text == timm.model_entrypoint(name).__doc__ and len(text) > 10


@pytest.mark.parametrize("name, size", [("vip_nano4_32", 64), ("lvvit_t", 32), ("eamlp_7", 32)])
def test_models_are_those_of_timm(name: str, size: int) -> None:
    kwargs = dict(num_classes=7, img_size=size)
    model = torch.hub.load(ROOT, name, source="local", pretrained=False, **kwargs).eval()
    expected = timm.create_model(name, **kwargs).eval()
    assert type(model) is type(expected) and type(model).__module__.startswith(vip.models.__name__)
    model.load_state_dict(expected.state_dict())
    x = torch.randn(2, 3, size, size)
    with torch.no_grad():
        assert torch.equal(model(x), expected(x))

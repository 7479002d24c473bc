"""For torch.hub: `torch.hub.load(FOLDER_OR_REPOSITORY, "vip_s7", pretrained=False, ...)`, with every model of vip."""

import timm

import vip

dependencies = ["torch", "timm"]

globals().update(
    {
        name: timm.model_entrypoint(name)
        for name in timm.list_models()
        if timm.model_entrypoint(name).__module__.startswith(f"{vip.models.__name__}.")
    }
)

"""Which of diffusers' tests run, and which of them are left out."""

from __future__ import annotations

from dataclasses import dataclass
from fnmatch import fnmatchcase

KEYWORD = "group_offloading"  # in the name of the test or of its file

FILES = (
    "hooks/test_group_offloading.py",
    *(
        f"models/transformers/test_models_transformer_{name}.py"
        for name in ("flux", "hunyuan_video", "ltx", "qwenimage", "sd3", "wan", "wan_vace")
    ),
    "models/unets/test_models_unet_2d_condition.py",
    "models/unets/test_models_unet_controlnetxs.py",
    "models/controlnets",
    "pipelines/controlnet",
    "pipelines/controlnet_flux",
    "pipelines/controlnet_sd3",
    "pipelines/flux",
    "pipelines/hunyuan_video",
    "pipelines/ltx",
    "pipelines/qwenimage",
    "pipelines/stable_diffusion_3",
    "pipelines/stable_diffusion_xl",
    "pipelines/wan",
    *(
        f"lora/test_lora_layers_{name}.py"
        for name in ("flux", "hunyuanvideo", "ltx_video", "qwenimage", "sd", "sd3", "sdxl", "wan")
    ),
    "lora/test_lora_layers_wanvace.py",
)


@dataclass(frozen=True)
class LeftOut:
    """Tests that cannot run here, for a reason that has nothing to do with blockswap.

    Attributes:
        tests: pattern on the test's id.
        reason: why not.
        device: only there; None: anywhere.
    """

    tests: str
    reason: str
    device: str | None = None


DOWNLOAD = "downloads a tiny model from the hub"
LEFT_OUT = (
    LeftOut("*::test_compile_with_group_offloading", "no compiler for the device", "fake"),
    LeftOut("tests/models/controlnets/*", "needs torchvision"),
    LeftOut("tests/pipelines/qwenimage/*", DOWNLOAD),
    LeftOut("tests/pipelines/hunyuan_video/*", DOWNLOAD),
    LeftOut("tests/lora/test_lora_layers_hunyuanvideo.py::*", DOWNLOAD),
    LeftOut("tests/lora/test_lora_layers_qwenimage.py::*", DOWNLOAD),
)


def left_out(test: str, device: str) -> LeftOut | None:
    """Return why a test is left out on a device, if it is."""
    found = (entry for entry in LEFT_OUT if entry.device in (None, device))
    return next((entry for entry in found if fnmatchcase(test, entry.tests)), None)

"""SDXL, alone and with a ControlNet and an IP-Adapter."""

from __future__ import annotations

from typing import Any

import numpy as np
from torch import nn

from benchmarks.recipes.recipe import PROMPT, Recipe, decode_in_tiles
from benchmarks.recipes.source import Source
from blockswap.demo.pipelines import demo_model

NUM_IMAGE_TOKENS = 4  # of the IP-Adapter, beside those of the text


def sdxl(source: Source) -> Recipe:
    """SDXL base 1.0: a UNet of 2.57 billion parameters and two CLIP text encoders."""
    from diffusers import StableDiffusionXLPipeline

    pipe = StableDiffusionXLPipeline(**_components(source))
    return Recipe(pipe, _call(source), decode_in_tiles(source, pipe.vae))


def sdxl_controlnet_ip(source: Source) -> Recipe:
    """SDXL with a ControlNet of 1.25 billion parameters, and an IP-Adapter on images."""
    from diffusers import ControlNetModel, StableDiffusionXLControlNetPipeline
    from transformers import CLIPImageProcessor, CLIPVisionConfig, CLIPVisionModelWithProjection

    parts = _components(source)
    unet, width = parts["unet"], 1280 if source.full else 64
    vision = CLIPVisionConfig(  # ViT-H/14
        hidden_size=width,
        intermediate_size=4 * width,
        num_hidden_layers=32 if source.full else 2,
        num_attention_heads=16 if source.full else 4,
        projection_dim=1024 if source.full else 32,
        patch_size=14,
        image_size=224 if source.full else 56,
        hidden_act="gelu",
    )
    pipe = StableDiffusionXLControlNetPipeline(
        **parts,
        # The published ControlNets have the UNet's configuration.
        controlnet=source.module(
            lambda: ControlNetModel.from_unet(unet, load_weights_from_unet=False)
        ),
        image_encoder=source.module(lambda: CLIPVisionModelWithProjection(vision)),
        feature_extractor=CLIPImageProcessor(
            size={"shortest_edge": vision.image_size},
            crop_size={"height": vision.image_size, "width": vision.image_size},
        ),
    )
    pipe.load_ip_adapter(_ip_adapter(source, unet, vision.projection_dim), None, None)
    pipe.set_ip_adapter_scale(0.6)
    pixels = 1024 if source.full else 128
    pictures = {"image": _picture(pixels), "ip_adapter_image": _picture(vision.image_size)}
    return Recipe(pipe, _call(source) | pictures, decode_in_tiles(source, pipe.vae))


def _components(source: Source) -> dict[str, Any]:
    size = "full" if source.full else "tiny"
    return demo_model("sdxl", size).components(source.full, source.module, source.folder)


def _call(source: Source) -> dict[str, Any]:
    pixels = 1024 if source.full else 128
    return {
        "prompt": PROMPT,
        "height": pixels,
        "width": pixels,
        "guidance_scale": 5.0,
        "num_inference_steps": 8 if source.full else 4,
    }


def _ip_adapter(source: Source, unet: nn.Module, image_width: int) -> dict[str, Any]:
    """Return an adapter as ip-adapter_sdxl_vit-h.safetensors holds it."""
    config: Any = unet.config
    text_width = config.cross_attention_dim
    projection = source.matrix(NUM_IMAGE_TOKENS * text_width, image_width)
    norm = source.matrix(2, text_width)
    weights = {}
    for index, (name, width) in enumerate(_attentions(unet)):
        if name.endswith("attn2"):
            for part in ("to_k_ip", "to_v_ip"):
                weights[f"{index}.{part}.weight"] = source.matrix(width, text_width)
    return {
        "image_proj": {
            "proj.weight": projection,
            "proj.bias": source.matrix(1, NUM_IMAGE_TOKENS * text_width)[0],
            "norm.weight": 1 + norm[0],
            "norm.bias": norm[1],
        },
        "ip_adapter": weights,
    }


def _attentions(unet: nn.Module) -> list[tuple[str, int]]:
    """Return the attentions of a UNet and their widths, in the order of the adapter's numbers."""
    model: Any = unet
    names = [name.removesuffix(".processor") for name in model.attn_processors]
    return [(name, model.get_submodule(name).to_q.out_features) for name in names]


def _picture(pixels: int) -> Any:
    from PIL import Image

    across = np.linspace(0, 255, pixels, dtype=np.uint8)
    colours = np.stack(np.broadcast_arrays(across[:, None], across[None], across[::-1, None]), -1)
    return Image.fromarray(colours)

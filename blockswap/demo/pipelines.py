"""The demo's models: real diffusers pipelines with random weights, in a tiny and in the full size.

Each family is one function that makes the pipeline's components; all else is shared.
"""

from __future__ import annotations

import json
import warnings
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from blockswap.demo.tokenizers import save_clip_tokenizer, save_t5_tokenizer
from blockswap.demo.weights import align, random_module
from blockswap.errors import ConfigError

MARKER = "blockswap-demo.json"  # names what a checkpoint folder holds; only such folders are reused

Draw = Callable[[Callable[[], torch.nn.Module]], torch.nn.Module]


@dataclass(frozen=True)
class DemoModel:
    """One pipeline of the demo: how it is made and how it is called."""

    family: str  # "sdxl", "flux" or "wan"
    size: str  # "tiny" or "full"
    pipeline: str  # class name in diffusers
    denoiser: str  # component that swaps
    dtype: torch.dtype
    call: dict[str, Any]  # arguments of the pipeline besides prompt, steps and generator
    steps: int
    components: Callable[[bool, Draw, Path], dict[str, Any]]
    note: str = ""  # what is not as in the published model

    @property
    def is_video(self) -> bool:
        """Whether the pipeline draws frames instead of one image."""
        return "num_frames" in self.call


def demo_model(family: str, size: str) -> DemoModel:
    """The demo's model of that name. Raises ConfigError for an unknown one, naming the known."""
    if family not in FAMILIES:
        raise ConfigError(f"unknown model {family!r}: choose one of {', '.join(FAMILIES)}")
    if size not in ("tiny", "full"):
        raise ConfigError(f"unknown size {size!r}: choose tiny or full")
    return FAMILIES[family](size)


def write_checkpoint(model: DemoModel, folder: Path, device: torch.device, seed: int) -> bool:
    """Draws all weights on `device` and saves the pipeline as safetensors; False if it was there.

    Raises ConfigError when the folder holds anything else: nothing of the user's is overwritten.
    """
    marker = folder / MARKER
    content = {"family": model.family, "size": model.size, "seed": seed}
    found = _read_marker(marker)
    if found == content | {"complete": True}:
        return False
    is_empty = not folder.exists() or not any(folder.iterdir())
    if not is_empty and found != content | {"complete": False}:
        raise ConfigError(f"{folder} holds something else: choose another --out")
    folder.mkdir(parents=True, exist_ok=True)
    marker.write_text(json.dumps(content | {"complete": False}), "utf-8")
    seeds: Iterator[int] = iter(range(seed * 100, seed * 100 + 100))  # one per component

    def draw(make: Callable[[], torch.nn.Module]) -> torch.nn.Module:
        return random_module(make, model.dtype, device, next(seeds))

    components = model.components(model.size == "full", draw, folder)
    _pipeline_class(model)(**components).save_pretrained(
        str(folder), safe_serialization=True, max_shard_size="4GB"
    )
    marker.write_text(json.dumps(content | {"complete": True}), "utf-8")
    return True


def _read_marker(marker: Path) -> Any:
    try:
        return json.loads(marker.read_text("utf-8"))
    except (OSError, ValueError):
        return None


def load_pipeline(model: DemoModel, folder: Path) -> Any:
    """Reads the pipeline back from disk, weights in host memory. Nothing is downloaded."""
    with warnings.catch_warnings():
        # Newer diffusers call it dtype; both know this name until diffusers 1.0.
        warnings.filterwarnings("ignore", message=".*torch_dtype", category=FutureWarning)
        pipe = _pipeline_class(model).from_pretrained(
            str(folder), torch_dtype=model.dtype, local_files_only=True
        )
    for component in pipe.components.values():
        if isinstance(component, torch.nn.Module):
            align(component)
    return pipe


def _pipeline_class(model: DemoModel) -> Any:
    import diffusers

    return getattr(diffusers, model.pipeline)


def _sdxl(size: str) -> DemoModel:
    pixels = 1024 if size == "full" else 256
    return DemoModel(
        family="sdxl",
        size=size,
        pipeline="StableDiffusionXLPipeline",
        denoiser="unet",
        dtype=torch.bfloat16 if size == "full" else torch.float32,
        call={"height": pixels, "width": pixels, "guidance_scale": 5.0},
        steps=20 if size == "full" else 8,
        components=_sdxl_components,
    )


def _sdxl_components(full: bool, draw: Draw, folder: Path) -> dict[str, Any]:
    from diffusers import AutoencoderKL, EulerDiscreteScheduler, UNet2DConditionModel

    widths = (320, 640, 1280) if full else (32, 64, 128)
    text, text_2 = clip_config(full, 768, 12), clip_config(full, 1280, 32)
    unet = draw(
        lambda: UNet2DConditionModel(
            sample_size=128 if full else 32,
            block_out_channels=widths,
            layers_per_block=2,
            down_block_types=("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
            up_block_types=("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"),
            transformer_layers_per_block=(1, 2, 10) if full else (1, 1, 3),
            attention_head_dim=(5, 10, 20) if full else (2, 4, 8),
            cross_attention_dim=text.hidden_size + text_2.hidden_size,
            addition_embed_type="text_time",
            addition_time_embed_dim=256 if full else 32,
            projection_class_embeddings_input_dim=text_2.projection_dim + 6 * (256 if full else 32),
            use_linear_projection=True,
        )
    )
    from transformers import CLIPTextModel, CLIPTextModelWithProjection

    return {
        "unet": unet,
        "vae": draw(lambda: AutoencoderKL(**vae_config(full, 4), scaling_factor=0.13025)),
        "text_encoder": draw(lambda: CLIPTextModel(text)),
        "text_encoder_2": draw(lambda: CLIPTextModelWithProjection(text_2)),
        "tokenizer": save_clip_tokenizer(folder / "tokenizer", text.vocab_size),
        "tokenizer_2": save_clip_tokenizer(folder / "tokenizer_2", text_2.vocab_size),
        "scheduler": EulerDiscreteScheduler(
            beta_start=0.00085,
            beta_end=0.012,
            beta_schedule="scaled_linear",
            timestep_spacing="leading",
            steps_offset=1,
        ),
    }


def _flux(size: str) -> DemoModel:
    pixels = 1024 if size == "full" else 256
    return DemoModel(
        family="flux",
        size=size,
        pipeline="FluxPipeline",
        denoiser="transformer",
        dtype=torch.bfloat16 if size == "full" else torch.float32,
        call={
            "height": pixels,
            "width": pixels,
            "guidance_scale": 3.5,
            "max_sequence_length": 512 if size == "full" else 64,
        },
        steps=20 if size == "full" else 8,
        components=_flux_components,
        note="T5 has 2 layers instead of 24, to save minutes" if size == "full" else "",
    )


def _flux_components(full: bool, draw: Draw, folder: Path) -> dict[str, Any]:
    from diffusers import AutoencoderKL, FlowMatchEulerDiscreteScheduler, FluxTransformer2DModel
    from transformers import CLIPTextModel, T5Config, T5EncoderModel

    text = clip_config(full, 768, 12)
    text_2 = T5Config(**t5_config(full, 32128))
    return {
        "transformer": draw(
            lambda: FluxTransformer2DModel(
                in_channels=64,
                num_layers=19 if full else 3,
                num_single_layers=38 if full else 6,
                attention_head_dim=128 if full else 32,
                num_attention_heads=24 if full else 6,
                joint_attention_dim=text_2.d_model,
                pooled_projection_dim=text.hidden_size,
                guidance_embeds=True,
                axes_dims_rope=(16, 56, 56) if full else (8, 12, 12),
            )
        ),
        "vae": draw(
            lambda: AutoencoderKL(
                **vae_config(full, 16),
                scaling_factor=0.3611,
                shift_factor=0.1159,
                use_quant_conv=False,
                use_post_quant_conv=False,
            )
        ),
        "text_encoder": draw(lambda: CLIPTextModel(text)),
        "text_encoder_2": draw(lambda: T5EncoderModel(text_2)),
        "tokenizer": save_clip_tokenizer(folder / "tokenizer", text.vocab_size),
        "tokenizer_2": save_t5_tokenizer(folder / "tokenizer_2"),
        "scheduler": FlowMatchEulerDiscreteScheduler(shift=3.0, use_dynamic_shifting=True),
    }


def _wan(size: str) -> DemoModel:
    full = size == "full"
    return DemoModel(
        family="wan",
        size=size,
        pipeline="WanPipeline",
        denoiser="transformer",
        dtype=torch.bfloat16 if full else torch.float32,
        call={
            "height": 480 if full else 96,
            "width": 832 if full else 160,
            "num_frames": 33 if full else 9,
            "guidance_scale": 5.0,
            "max_sequence_length": 512 if full else 64,
        },
        steps=8 if full else 5,
        components=_wan_components,
        note="UMT5 has 2 layers instead of 24, 33 frames instead of 81" if full else "",
    )


def _wan_components(full: bool, draw: Draw, folder: Path) -> dict[str, Any]:
    from diffusers import AutoencoderKLWan, UniPCMultistepScheduler, WanTransformer3DModel
    from transformers import UMT5Config, UMT5EncoderModel

    text = UMT5Config(**t5_config(full, 256384))
    return {
        "transformer": draw(
            lambda: WanTransformer3DModel(
                num_attention_heads=40 if full else 6,
                attention_head_dim=128 if full else 32,
                text_dim=text.d_model,
                freq_dim=256 if full else 64,
                ffn_dim=13824 if full else 512,
                num_layers=40 if full else 8,
            )
        ),
        "vae": draw(
            lambda: AutoencoderKLWan(base_dim=96 if full else 8, num_res_blocks=2 if full else 1)
        ),
        "text_encoder": draw(lambda: UMT5EncoderModel(text)),
        "tokenizer": save_t5_tokenizer(folder / "tokenizer"),
        "scheduler": UniPCMultistepScheduler(
            prediction_type="flow_prediction", use_flow_sigmas=True, flow_shift=3.0
        ),
    }


FAMILIES: dict[str, Callable[[str], DemoModel]] = {"sdxl": _sdxl, "flux": _flux, "wan": _wan}


def clip_config(full: bool, width: int, num_layers: int) -> Any:
    """A CLIP text encoder of that width."""
    from transformers import CLIPTextConfig

    num_tokens = 49408 if full else 2048
    return CLIPTextConfig(
        vocab_size=num_tokens,
        hidden_size=width if full else 64,
        projection_dim=width if full else 64,
        intermediate_size=4 * width if full else 128,
        num_hidden_layers=num_layers if full else 2,
        num_attention_heads=width // 64 if full else 4,
        hidden_act="quick_gelu" if width == 768 else "gelu",
        bos_token_id=num_tokens - 2,
        eos_token_id=num_tokens - 1,
        pad_token_id=num_tokens - 1,
    )


def t5_config(full: bool, num_tokens: int) -> dict[str, Any]:
    """T5-XXL or UMT5-XXL but for its depth: 2 layers, which the demo draws in little time."""
    return {
        "vocab_size": num_tokens if full else 256,
        "d_model": 4096 if full else 64,
        "d_kv": 64 if full else 16,
        "d_ff": 10240 if full else 128,
        "num_layers": 2,
        "num_heads": 64 if full else 4,
        "feed_forward_proj": "gated-gelu",
    }


def vae_config(full: bool, latent_channels: int) -> dict[str, Any]:
    """The VAE of SDXL, SD3 and FLUX."""
    return {
        "block_out_channels": (128, 256, 512, 512) if full else (32, 32, 64, 64),
        "layers_per_block": 2 if full else 1,
        "latent_channels": latent_channels,
        "sample_size": 1024 if full else 256,
        "down_block_types": ("DownEncoderBlock2D",) * 4,
        "up_block_types": ("UpDecoderBlock2D",) * 4,
        "force_upcast": False,
    }

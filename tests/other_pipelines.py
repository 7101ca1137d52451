"""Tiny pipelines with random weights whose denoisers are called neither transformer nor unet."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import diffusers
import numpy as np
import torch
from diffusers.pipelines.deprecated.unclip import UnCLIPTextProjModel
from diffusers.pipelines.deprecated.versatile_diffusion.modeling_text_unet import (
    UNetFlatConditionModel,
)
from diffusers.pipelines.deprecated.wuerstchen import PaellaVQModel
from diffusers.pipelines.deprecated.wuerstchen.modeling_wuerstchen_diffnext import (
    WuerstchenDiffNeXt,
)
from transformers import CLIPTextModel, CLIPTextModelWithProjection

from blockswap.demo.pipelines import clip_config
from blockswap.demo.tokenizers import save_clip_tokenizer
from blockswap.demo.weights import random_module

CPU = torch.device("cpu")
WIDTH = 64  # of the text encoder's states and of what it projects them to
Made = tuple[Any, dict[str, Any]]


class Parts:
    """Makes the components of one pipeline, each with weights of its own."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._seeds: Iterator[int] = iter(range(100))

    def __call__(self, kind: Callable[..., torch.nn.Module], **config: Any) -> Any:
        return random_module(lambda: kind(**config), torch.float32, CPU, next(self._seeds))

    def text(self, kind: Any = CLIPTextModelWithProjection) -> dict[str, Any]:
        """Return a text encoder and its tokenizer."""
        config = clip_config(False, 768, 2)
        return {
            "text_encoder": self(lambda: kind(config)),
            "tokenizer": save_clip_tokenizer(self._folder / "tokenizer", config.vocab_size),
        }

    def vqgan(self) -> Any:
        """Return the decoder of latents that the Wuerstchen family shares."""
        return self(
            PaellaVQModel,
            bottleneck_blocks=1,
            embed_dim=16,
            num_vq_embeddings=16,
            scale_factor=0.05,
        )


def noise(*shape: int) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(5))


def make_cascade(make: Parts) -> Made:
    """Return StableCascadeDecoderPipeline."""
    decoder = make(
        diffusers.StableCascadeUNet,
        in_channels=4,
        out_channels=4,
        conditioning_dim=64,
        block_out_channels=(64, 128),
        num_attention_heads=(2, 2),
        down_num_layers_per_block=(2, 2),
        up_num_layers_per_block=(2, 2),
        down_blocks_repeat_mappers=(1, 1),
        up_blocks_repeat_mappers=(1, 1),
        block_types_per_layer=(("SDCascadeResBlock", "SDCascadeTimestepBlock"),) * 2,
        effnet_in_channels=16,
        clip_text_pooled_in_channels=WIDTH,
        dropout=(0.0, 0.0),
    )
    pipe = diffusers.StableCascadeDecoderPipeline(
        decoder=decoder,
        scheduler=diffusers.DDPMWuerstchenScheduler(),
        vqgan=make.vqgan(),
        latent_dim_scale=4.0,
        **make.text(),
    )
    return pipe, {"image_embeddings": noise(1, 16, 4, 4), "guidance_scale": 2.0}


def make_wuerstchen(make: Parts) -> Made:
    """Return WuerstchenDecoderPipeline."""
    decoder = make(
        WuerstchenDiffNeXt,
        c_cond=WIDTH,
        c_hidden=[64, 128],
        nhead=[-1, 4],
        blocks=[2, 2],
        level_config=["CT", "CTA"],
        inject_effnet=[False, True],
        effnet_embd=16,
        clip_embd=WIDTH,
        dropout=0.0,
    )
    pipe = diffusers.WuerstchenDecoderPipeline(
        decoder=decoder,
        scheduler=diffusers.DDPMWuerstchenScheduler(),
        vqgan=make.vqgan(),
        latent_dim_scale=4.0,
        **make.text(),
    )
    return pipe, {"image_embeddings": noise(1, 16, 4, 4), "guidance_scale": 2.0}


def make_unclip(make: Parts) -> Made:
    """Return UnCLIPPipeline: four denoisers, of which the last one runs once a call."""
    prior = make(
        diffusers.PriorTransformer,
        num_attention_heads=4,
        attention_head_dim=32,
        embedding_dim=WIDTH,
        num_layers=2,
    )
    decoder = make(
        diffusers.UNet2DConditionModel,
        sample_size=16,
        in_channels=3,
        out_channels=6,
        down_block_types=("ResnetDownsampleBlock2D", "SimpleCrossAttnDownBlock2D"),
        up_block_types=("SimpleCrossAttnUpBlock2D", "ResnetUpsampleBlock2D"),
        mid_block_type="UNetMidBlock2DSimpleCrossAttn",
        block_out_channels=(32, 64),
        layers_per_block=1,
        cross_attention_dim=100,
        attention_head_dim=4,
        resnet_time_scale_shift="scale_shift",
        class_embed_type="identity",
    )
    first, last = (
        make(
            diffusers.UNet2DModel,
            sample_size=32,
            layers_per_block=1,
            down_block_types=("ResnetDownsampleBlock2D",) * 2,
            up_block_types=("ResnetUpsampleBlock2D",) * 2,
            block_out_channels=(32, 64),
            in_channels=6,
            out_channels=3,
        )
        for _ in range(2)
    )
    scheduler = diffusers.UnCLIPScheduler
    pipe = diffusers.UnCLIPPipeline(
        prior=prior,
        decoder=decoder,
        text_proj=make(
            UnCLIPTextProjModel,
            clip_embeddings_dim=WIDTH,
            time_embed_dim=128,
            cross_attention_dim=100,
        ),
        super_res_first=first,
        super_res_last=last,
        prior_scheduler=scheduler(
            variance_type="fixed_small_log", prediction_type="sample", clip_sample_range=5.0
        ),
        decoder_scheduler=scheduler(variance_type="learned_range"),
        super_res_scheduler=scheduler(variance_type="fixed_small_log"),
        **make.text(),
    )
    stages = ("prior", "decoder", "super_res")
    return pipe, {f"{stage}_num_inference_steps": 4 for stage in stages}


def make_ideogram(make: Parts) -> Made:
    """Return Ideogram4Pipeline; its text encoder, a language model, is stood in for by noise."""
    transformer, unconditional = (
        make(
            diffusers.Ideogram4Transformer2DModel,
            in_channels=16,
            num_layers=4,
            attention_head_dim=16,
            num_attention_heads=8,
            intermediate_size=256,
            adaln_dim=16,
            llm_features_dim=24,
            mrope_section=(4, 2, 2),
        )
        for _ in range(2)
    )

    class Pipeline(diffusers.Ideogram4Pipeline):
        def encode_prompt(self, grid_h: int, grid_w: int, device: Any, **_: Any) -> Any:
            ids = self._prepare_ids([8], grid_h, grid_w, 8, device)
            return (noise(1, 8 + grid_h * grid_w, 24).to(device), *ids)

    scheduler = diffusers.FlowMatchEulerDiscreteScheduler()
    pipe = Pipeline(scheduler, None, None, None, transformer, unconditional)
    call = {"height": 64, "width": 64, "max_sequence_length": 8, "output_type": "latent"}
    return pipe, call | {"guidance_scale": 3.0, "guidance_schedule": None}


SMALL_UNET = {
    "sample_size": 16,
    "block_out_channels": (32, 64),
    "layers_per_block": 2,
    "cross_attention_dim": WIDTH,
    "attention_head_dim": 4,
}


def make_unet(make: Parts, kind: Any = diffusers.UNet2DConditionModel) -> Any:
    """Return a UNet that knows text."""
    return make(
        kind,
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D"),
        up_block_types=("CrossAttnUpBlock2D", "UpBlock2D"),
        **SMALL_UNET,
    )


def make_vae(make: Parts) -> Any:
    return make(
        diffusers.AutoencoderKL,
        block_out_channels=(32, 64),
        down_block_types=("DownEncoderBlock2D",) * 2,
        up_block_types=("UpDecoderBlock2D",) * 2,
        latent_channels=4,
    )


def versatile_parts(make: Parts) -> dict[str, Any]:
    """Return the components of Versatile Diffusion: text_unet lends image_unet its attention."""
    return make.text() | {
        "image_unet": make_unet(make),
        "text_unet": make(
            UNetFlatConditionModel,
            down_block_types=("DownBlockFlat", "CrossAttnDownBlockFlat"),
            up_block_types=("CrossAttnUpBlockFlat", "UpBlockFlat"),
            **SMALL_UNET,
        ),
        "vae": make_vae(make),
        "scheduler": diffusers.DDIMScheduler(),
    }


def make_versatile(make: Parts) -> Made:
    """Return VersatileDiffusionTextToImagePipeline."""
    return diffusers.VersatileDiffusionTextToImagePipeline(**versatile_parts(make)), {}


def make_animatediff(make: Parts) -> Made:
    """Return AnimateDiffPipeline: its UNet is made with a copy of what is in the motion adapter."""
    adapter = make(
        diffusers.MotionAdapter,
        block_out_channels=(32, 64),
        motion_layers_per_block=2,
        motion_norm_num_groups=2,
        motion_num_attention_heads=4,
    )
    pipe = diffusers.AnimateDiffPipeline(
        vae=make_vae(make),
        unet=make_unet(make),
        motion_adapter=adapter,
        scheduler=diffusers.DDIMScheduler(beta_schedule="linear", clip_sample=False),
        **make.text(CLIPTextModel),
    )
    return pipe, {"num_frames": 2, "height": 32, "width": 32}


def make_controlnet_xs(make: Parts) -> Made:
    """Return StableDiffusionControlNetXSPipeline: one model is made of both, and runs."""
    unet = make_unet(make)
    adapter = make(
        lambda: diffusers.ControlNetXSAdapter.from_unet(
            unet, size_ratio=0.5, conditioning_embedding_out_channels=(16, 32)
        )
    )
    pipe = diffusers.StableDiffusionControlNetXSPipeline(
        vae=make_vae(make),
        unet=unet,
        controlnet=adapter,
        scheduler=diffusers.DDIMScheduler(),
        safety_checker=None,
        feature_extractor=None,
        requires_safety_checker=False,
        **make.text(CLIPTextModel),
    )
    return pipe, {"image": noise(1, 3, 32, 32).sigmoid(), "height": 32, "width": 32}


MAKERS: dict[str, Callable[[Parts], Made]] = {
    "cascade": make_cascade,
    "wuerstchen": make_wuerstchen,
    "unclip": make_unclip,
    "ideogram": make_ideogram,
    "versatile": make_versatile,
    "animatediff": make_animatediff,
    "controlnet-xs": make_controlnet_xs,
}


def make_other(kind: str, folder: Path) -> Made:
    """Return a silent pipeline of that kind and its call's arguments."""
    pipe, call = MAKERS[kind](Parts(folder))
    pipe.set_progress_bar_config(disable=True)
    steps = {} if kind == "unclip" else {"num_inference_steps": 4}
    return pipe, {"prompt": "a red fox", "output_type": "np"} | steps | call


def picture(pipe: Any, call: dict[str, Any]) -> np.ndarray:
    """Return what the pipeline draws; the same seed each time."""
    drawn = pipe(generator=torch.Generator().manual_seed(1), **call)[0]
    return np.asarray(drawn.cpu() if isinstance(drawn, torch.Tensor) else drawn)

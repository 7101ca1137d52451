"""A cap over a whole call, VAE decode included: `python -m benchmarks.decode --help`.

SDXL's UNet and VAE with random weights in diffusers' own pipeline; prompts are given as embeddings.
Each row is one cap: three calls that end with the image, three that end with the latents, and
whether the image is that of the unswapped pipeline. The VAE decodes in tiles in both. The caps are
those of the sweep: twelve from the smallest ring to everything resident, and the very smallest.
"""

from __future__ import annotations

import argparse
import contextlib
import gc
import itertools
import statistics
import sys
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch

import blockswap
from benchmarks import command_line, write_rows
from benchmarks.caps import DeviceWatch, Ends
from benchmarks.quiet import quiet_ms
from blockswap.bench import zoo
from blockswap.bench.core import quiet_core
from blockswap.bench.head import make_head
from blockswap.bench.rows import GIB, Row, smallest_ring_bytes
from blockswap.bench.timing import peaks, reset_peaks

CALLS = 3
LEARNING_CALLS = 2
FULL_VAE = {"block_out_channels": (128, 256, 512, 512), "layers_per_block": 2, "sample_size": 1024}
TINY_VAE = {"block_out_channels": (32, 32), "layers_per_block": 1, "sample_size": 32}


@dataclass
class Call:
    """What one call gave.

    Attributes:
        result: image or latents.
        steps_ms: between the ends of its steps; on a CPU there are none.
    """

    result: np.ndarray
    steps_ms: list[float] = field(default_factory=list)


def build_pipeline(size: str, device: str) -> Any:
    """Return the pipeline; weights on the device."""
    from diffusers import AutoencoderKL, EulerDiscreteScheduler, StableDiffusionXLPipeline

    dtype = torch.float32 if device == "cpu" else torch.bfloat16
    unet = zoo.build("sdxl", size, dtype, device, 0)  # type: ignore[arg-type]
    shape = FULL_VAE if size == "full" else TINY_VAE
    stages = len(shape["block_out_channels"])  # type: ignore[arg-type]
    torch.manual_seed(0)
    vae = AutoencoderKL(
        **shape,
        down_block_types=("DownEncoderBlock2D",) * stages,
        up_block_types=("UpDecoderBlock2D",) * stages,
        latent_channels=4,
        scaling_factor=0.13025,
        force_upcast=False,
    )
    vae.to(device, dtype).eval().requires_grad_(False).enable_tiling()
    pipe = StableDiffusionXLPipeline(
        vae=vae,
        text_encoder=None,
        text_encoder_2=None,
        tokenizer=None,
        tokenizer_2=None,
        unet=unet,
        scheduler=EulerDiscreteScheduler(),
        add_watermarker=False,
    )
    pipe.set_progress_bar_config(disable=True)
    return pipe


def call(pipe: Any, size: str, steps: int, output: str, device: str) -> Call:
    """Run the pipeline once, always with the same noise and prompts."""
    generator = torch.Generator().manual_seed(1)
    config = pipe.unet.config
    pooled = config.projection_class_embeddings_input_dim - 6 * config.addition_time_embed_dim

    def random(*shape: int) -> torch.Tensor:
        drawn = torch.randn(*shape, generator=generator)
        return drawn.to(device, pipe.unet.dtype)

    marks = []

    def at_step_end(_: Any, __: int, ___: Any, tensors: dict[str, Any]) -> dict[str, Any]:
        if device != "cpu":
            marks.append(torch.Event(device, enable_timing=True))
            marks[-1].record()
        return tensors

    pixels = 1024 if size == "full" else 16
    made = pipe(
        prompt_embeds=random(1, 77, config.cross_attention_dim),
        negative_prompt_embeds=random(1, 77, config.cross_attention_dim),
        pooled_prompt_embeds=random(1, pooled),
        negative_pooled_prompt_embeds=random(1, pooled),
        height=pixels,
        width=pixels,
        num_inference_steps=steps,
        generator=torch.Generator().manual_seed(2),
        output_type=output,
        callback_on_step_end=at_step_end,
    ).images
    if device != "cpu":
        torch.cuda.synchronize()
    times = [a.elapsed_time(b) for a, b in itertools.pairwise(marks)]
    result = made.float().cpu().numpy() if isinstance(made, torch.Tensor) else np.asarray(made)
    return Call(result, times)


def run_under(pipe: Any, cap: int | None, expected: np.ndarray, how: dict[str, Any]) -> Row:
    """Return the row of one cap; None: no cap, half the UNet streamed (on a CPU)."""
    options = {"vram": cap} if cap is not None else {"offload": "1TB"}
    with blockswap.attach(pipe, device=how["device"], **options) as session:
        for _ in range(LEARNING_CALLS):
            call(pipe, output="np", **how)
        images, latents = [], []
        for _ in range(CALLS):  # in turns: a host may become slower from one minute to the next
            with quiet_core():
                images.append(call(pipe, output="np", **how))
                in_calls = session.sessions["unet"].report()
                latents.append(call(pipe, output="latent", **how))
        report = session.report()
    unet, vae = report.parts["unet"], report.guests["vae"]

    def steps_of(calls: list[Call]) -> list[float]:
        return [ms for one in calls for ms in one.steps_ms]

    def median(calls: list[Call]) -> float | None:
        return statistics.median(steps_of(calls)) if steps_of(calls) else None

    def quiet(calls: list[Call]) -> float | None:
        return quiet_ms(steps_of(calls)) if steps_of(calls) else None

    peak = max(unet.peak_device_bytes or 0, vae.peak_bytes or 0)
    return {
        "cap_bytes": cap,
        "peak_device_bytes": peak,
        "holds": cap is None or peak <= cap,
        "bit_identical": all(np.array_equal(one.result, expected) for one in images),
        "step_ms": median(images),
        "latent_step_ms": median(latents),
        "quiet_step_ms": quiet(images),
        "quiet_latent_step_ms": quiet(latents),
        "first_step_ms": [one.steps_ms[0] for one in images if one.steps_ms],
        "resident_bytes": in_calls.resident_bytes,
        "leaf_bytes": unet.leaf_bytes,
        "streamed_bytes": unet.streamed_bytes,
        "activation_bytes": unet.activation_bytes,
        "decode_peak_bytes": vae.peak_bytes,
        "ooms": unet.ooms,
    }


@torch.no_grad()
def measure(size: str, steps: int, numbers: list[int], device: str) -> Iterator[Row]:
    """Run the unswapped pipeline, then every cap; yield a row as soon as it is known."""
    pipe = build_pipeline(size, device)
    how: dict[str, Any] = {"size": size, "steps": steps, "device": device}
    if device != "cpu":
        torch.cuda.empty_cache()
    call(pipe, output="np", **how)
    reset_peaks()
    expected = call(pipe, output="np", **how)
    peak = peaks().reserved
    streamable = blockswap.leaf_bytes(pipe.unet)
    yield {"model": "sdxl", "engine": "resident", "peak_device_bytes": peak} | {
        "step_ms": statistics.median(expected.steps_ms) if expected.steps_ms else None
    }
    pipe.unet.to("cpu")
    pipe.vae.to("cpu")
    gc.collect()
    caps: list[int | None] = [None]
    watch = None
    if device != "cpu":
        ends = Ends(peak - streamable, smallest_ring_bytes(pipe.unet), peak)
        caps, watch = list(ends.caps()), DeviceWatch()
    for number in numbers or range(len(caps)):
        cap = caps[number]
        before = watch.beside_pytorch() if watch is not None else 0
        try:
            with watch.running() if watch is not None else contextlib.nullcontext():
                row = run_under(pipe, cap, expected.result, how) | {"status": "ok"}
        except (blockswap.BlockswapError, torch.OutOfMemoryError) as error:
            row = {"cap_bytes": cap, "status": f"{type(error).__name__}: {error}"}
        if watch is not None:
            row |= {"driver_peak_bytes": watch.peak_bytes, "driver_before_bytes": before}
        row = {"model": "sdxl", "engine": "blockswap", "number": number} | row
        label = "no cap" if cap is None else f"cap {cap / GIB:.3f} GiB"
        keys = ("status", "quiet_step_ms", "quiet_latent_step_ms", "holds", "bit_identical")
        print(label, {key: row.get(key) for key in keys}, flush=True)
        yield row


def main() -> None:
    """Run what the command line names."""
    parser = argparse.ArgumentParser(description=str(__doc__).splitlines()[0])
    parser.add_argument("--size", default="full", choices=["full", "tiny"])
    parser.add_argument("--steps", type=int, default=16)
    parser.add_argument("--numbers", default="", help="of the caps, such as 0,12; default all 13")
    parser.add_argument("--out", type=Path, required=True)
    options = parser.parse_args()
    device = "cuda" if torch.cuda.is_available() else "cpu"
    numbers = [int(n) for n in options.numbers.split(",") if n]
    rows = measure(options.size, options.steps, numbers, device)
    write_rows(rows, make_head(command_line(sys.argv)), options.out)


if __name__ == "__main__":
    main()

"""Runs one prompt twice, unswapped and swapped, and compares every bit of the outcome."""

from __future__ import annotations

import contextlib
import gc
import importlib.util
import itertools
import os
import statistics
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

import blockswap
from blockswap.config import SwapConfig
from blockswap.demo import outputs, pipelines
from blockswap.errors import ConfigError
from blockswap.profile import Profile
from blockswap.progress import Progress
from blockswap.report import Report, Timeline
from blockswap.sizes import format_bytes

PROMPT = "a red fox walking in a quiet forest, soft light"
KEPT_SHARE_ON_CPU, KEPT_SHARE = 0.4, 0.5
MAX_STEPS = 1000

Say = Callable[[str, str], None]


@dataclass(frozen=True)
class DemoRequest:
    """What to run. Raises ConfigError or DeviceError when made, before anything is written.

    Args:
        model: "sdxl", "flux" or "wan".
        size: "tiny" or "full".
        device: "auto" or a device of torch.
        vram: cap while swapped, as `SwapConfig.vram`; None: on a GPU what the unswapped run used
            less half of the denoiser's weights, on a CPU 40 % of those weights kept.
        steps: denoising steps, at least 2; None: as the model says.
        out: folder for everything that is written.
        seed: of the weights and of the noise.
    """

    out: Path
    model: str = "sdxl"
    size: str = "tiny"
    device: str = "auto"
    vram: str | None = None
    steps: int | None = None
    seed: int = 0

    def __post_init__(self) -> None:
        pipelines.demo_model(self.model, self.size)
        if self.steps is not None and not 2 <= self.steps <= MAX_STEPS:
            raise ConfigError(f"steps={self.steps} is not between 2 and {MAX_STEPS}")
        if not 0 <= self.seed < 2**32:
            raise ConfigError(f"seed={self.seed} is not between 0 and 2^32 - 1")
        device = self.target_device()
        total_bytes = None
        if device.type != "cpu":
            total_bytes = torch.accelerator.get_memory_info(device)[1]
        SwapConfig(vram=self.vram).resolve(total_bytes)

    def target_device(self) -> torch.device:
        """The device, with its index. Raises DeviceError when it does not exist."""
        return SwapConfig(device=None if self.device == "auto" else self.device).target_device()


@dataclass(frozen=True)
class DemoResult:
    """Both runs. Times are ms, medians of the second half of the steps."""

    identical: bool  # image and final latents, every bit
    num_different: int  # values of the image
    resident_step_ms: float
    step_ms: float
    resident_peak_bytes: int | None  # torch reserved; None on a CPU
    peak_bytes: int | None  # pool, and what PyTorch reserved
    report: Report
    timeline: Timeline | None


@dataclass(frozen=True)
class _Run:
    image: np.ndarray[Any, Any]  # [1, H, W, 3] or [1, frames, H, W, 3], 0 to 1
    latents: torch.Tensor
    step_ms: float
    seconds: float
    denoising_bytes: int | None  # as below, up to the last step: decoding is not in it


def run_demo(request: DemoRequest, say: Say) -> DemoResult:
    """Builds, saves, loads, runs whole, attaches, runs swapped, compares, and writes to `out`.

    Args:
        request: what to run.
        say: called with a label and a line of text for each thing done.

    Raises:
        ConfigError: a missing package, an `out` that cannot be used, a cap that cannot be met.
    """
    _require_packages()
    folder = _writable(request.out)
    model = pipelines.demo_model(request.model, request.size)
    device = request.target_device()
    with _quiet():
        pipe = _make_pipeline(model, folder / "checkpoint", device, request.seed, say)
        pipe.to(device)
        denoiser: torch.nn.Module = getattr(pipe, model.denoiser)
        weight_bytes = sum(p.numel() * p.element_size() for p in denoiser.parameters())
        name, dtype = type(denoiser).__name__, str(model.dtype).removeprefix("torch.")
        weights = f"{format_bytes(weight_bytes)} of random {dtype} weights"
        note = f" ({model.note})" if model.note else ""
        say("model", f"{model.family} {model.size}: {name}, {weights}, on {device}{note}")
        _reset_peak(device)
        resident = _run(pipe, model, request, "unswapped run")
        resident_peak_bytes = _peak_bytes(device)
        say("unswapped", _describe(resident, resident_peak_bytes))

        denoiser.to("cpu")  # attach takes weights from host memory; the cap counts from there
        _reset_peak(device)
        limit = _limit(request, weight_bytes, resident.denoising_bytes)
        session = blockswap.attach(denoiser, device=device, **limit)
        try:
            swapped = _run(pipe, model, request, "swapped run")
            report, timeline = session.report(), session.timeline()
            profile = Profile.of(session) if session.state == "ready" else None
            peak_bytes = None if device.type == "cpu" else report.peak_device_bytes
        finally:
            session.detach()  # also on Ctrl-C: the model is whole again
        say("swapped", _describe(swapped, peak_bytes))
    result = DemoResult(
        identical=np.array_equal(resident.image, swapped.image)
        and torch.equal(resident.latents, swapped.latents),
        num_different=int((resident.image != swapped.image).sum()),
        resident_step_ms=resident.step_ms,
        step_ms=swapped.step_ms,
        resident_peak_bytes=resident_peak_bytes,
        peak_bytes=peak_bytes,
        report=report,
        timeline=timeline,
    )
    say("weights", _describe_weights(report))
    title = f"{name}, {model.family} {model.size}, on {device}"
    files = outputs.write_outputs(folder, result, swapped.image, resident.image, title)
    if profile is not None:
        profile.save(folder / "profile.json")
        files.append("profile.json")
    say("written", f"{folder}: {', '.join(files)}")
    return result


def _make_pipeline(
    model: pipelines.DemoModel, folder: Path, device: torch.device, seed: int, say: Say
) -> Any:
    say("building", f"{model.pipeline}, {model.size}, random weights of seed {seed}")
    began = time.perf_counter()
    is_new = pipelines.write_checkpoint(model, folder, device, seed)
    gc.collect()  # a pipeline holds cycles: its weights would stay beside the new ones
    _empty_cache(device)
    written = time.perf_counter()
    pipe = pipelines.load_pipeline(model, folder)
    loaded = time.perf_counter()
    pipe.set_progress_bar_config(disable=True)
    num_bytes = sum(file.stat().st_size for file in folder.rglob("*.safetensors"))
    how = f"written in {written - began:.1f} s" if is_new else "found from an earlier run"
    text = f"{format_bytes(num_bytes)} of safetensors, {how}, read in {loaded - written:.1f} s"
    say("checkpoint", f"{folder}: {text}")
    return pipe


def _run(pipe: Any, model: pipelines.DemoModel, request: DemoRequest, what: str) -> _Run:
    """One image. Step times come from events on the device, so the host never waits in between."""
    device = request.target_device()
    num_steps = request.steps or model.steps
    marks: list[Any] = []
    latents: list[torch.Tensor] = []
    denoising_bytes: list[int | None] = []

    with Progress(what, num_steps, "steps") as tick:

        def at_step_end(_: Any, index: int, __: Any, tensors: dict[str, Any]) -> dict[str, Any]:
            marks.append(_mark(device))
            latents[:] = [tensors["latents"]]
            denoising_bytes[:] = [_peak_bytes(device)]
            tick(index + 1)
            return tensors

        began = time.perf_counter()
        output = pipe(
            prompt=PROMPT,
            num_inference_steps=num_steps,
            generator=torch.Generator("cpu").manual_seed(request.seed),
            output_type="np",
            callback_on_step_end=at_step_end,
            **model.call,
        )
        seconds = time.perf_counter() - began
    step_ms = [_ms_between(a, b) for a, b in itertools.pairwise(marks)]
    return _Run(
        image=np.asarray(output.frames if model.is_video else output.images),
        latents=latents[0].cpu(),
        step_ms=statistics.median(step_ms[len(step_ms) // 2 :]),
        seconds=seconds,
        denoising_bytes=denoising_bytes[-1],
    )


def _limit(request: DemoRequest, weight_bytes: int, peak_bytes: int | None) -> dict[str, Any]:
    """The options of attach that make the demo swap."""
    if request.vram is not None:
        return {"vram": request.vram}
    if peak_bytes is None:
        return {"offload": f"{int((1 - KEPT_SHARE_ON_CPU) * weight_bytes)}B"}
    return {"vram": int(peak_bytes - (1 - KEPT_SHARE) * weight_bytes)}


def _mark(device: torch.device) -> Any:
    if device.type == "cpu":
        return time.perf_counter()
    event = torch.Event(device, enable_timing=True)
    event.record()
    return event


def _ms_between(begin: Any, end: Any) -> float:
    if isinstance(begin, float):
        return (float(end) - begin) * 1e3
    end.synchronize()
    return float(begin.elapsed_time(end))


def _describe(run: _Run, peak_bytes: int | None) -> str:
    peak = "" if peak_bytes is None else f", peak {format_bytes(peak_bytes)}"
    return f"{run.step_ms:.1f} ms per step, {run.seconds:.1f} s in all{peak}"


def _describe_weights(report: Report) -> str:
    kept_bytes = report.resident_bytes + report.ring_bytes + report.fixed_bytes
    cap = "" if report.cap_bytes is None else f" under a cap of {format_bytes(report.cap_bytes)}"
    return (
        f"{format_bytes(kept_bytes)} of {format_bytes(report.weight_bytes)} on the device{cap}, "
        f"{format_bytes(report.streamed_bytes)} streamed per step"
    )


def _reset_peak(device: torch.device) -> None:
    _empty_cache(device)
    if device.type != "cpu":
        torch.accelerator.reset_peak_memory_stats(device)


def _peak_bytes(device: torch.device) -> int | None:
    return None if device.type == "cpu" else torch.accelerator.max_memory_reserved(device)


def _empty_cache(device: torch.device) -> None:
    if device.type != "cpu":
        torch.accelerator.empty_cache()


def _require_packages() -> None:
    missing = [n for n in ("diffusers", "transformers") if importlib.util.find_spec(n) is None]
    if missing:
        names = " and ".join(missing)
        raise ConfigError(f"the demo needs {names}: pip install 'blockswap[demo]'")


def _writable(folder: Path) -> Path:
    """The folder, made when missing. Raises ConfigError when nothing can be written to it."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise ConfigError(f"--out {folder} cannot be made: {error.strerror}") from error
    if not os.access(folder, os.W_OK | os.X_OK):
        raise ConfigError(f"--out {folder} is not writable: choose another folder")
    return folder


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Silences the bars and advice of diffusers and transformers; one line is enough here."""
    import diffusers.utils.logging as diffusers_logging
    import transformers.utils.logging as transformers_logging

    loggings = (diffusers_logging, transformers_logging)
    verbosities = [module.get_verbosity() for module in loggings]
    had_bars = [module.is_progress_bar_enabled() for module in loggings]
    for module in loggings:
        module.set_verbosity_error()
        module.disable_progress_bar()
    try:
        yield
    finally:
        for module, verbosity, had_bar in zip(loggings, verbosities, had_bars, strict=True):
            module.set_verbosity(verbosity)
            if had_bar:
                module.enable_progress_bar()

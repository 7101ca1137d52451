"""The command line: `blockswap bench | demo | plan | probe | doctor | version`.

Exit codes: 0 done; 1 it ran and the result is wrong, or memory or a disk ran out; 2 bad input or a
device that cannot be used, one line on stderr; 130 interrupted.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from json import dumps
from pathlib import Path

import typer

app = typer.Typer(
    add_completion=False,
    no_args_is_help=True,
    rich_markup_mode=None,
    pretty_exceptions_enable=False,
    help="Runs diffusion models that do not fit in VRAM, bit for bit the same.",
)


def main() -> None:
    """Entry point of the `blockswap` command."""
    app(prog_name="blockswap")


@app.callback()
def _commands() -> None:
    """Keeps `blockswap COMMAND` the form of every call, however many commands there are."""


@app.command()
def bench(
    model: str = typer.Option("flux", help="flux, sdxl, wan, qwen; several with commas."),
    size: str = typer.Option("full", help="full: the published configuration; or tiny."),
    engines: str = typer.Option("", help="Names with commas. Default: all that are installed."),
    steps: int = typer.Option(10, help="Timed steps of each engine; slow ones get fewer."),
    device: str = typer.Option("auto", help="auto, cpu, cuda, cuda:1, ..."),
    out: Path = typer.Option(Path("blockswap-bench.json"), help="The result file."),
    picture: Path | None = typer.Option(None, help="Draw time over memory (.png, .svg, .pdf)."),
    draw: bool = typer.Option(False, help="Measure nothing: table and picture from --out."),
) -> None:
    """Compare with other engines on this machine, at their own settings and at equal memory.

    Weights are random; nothing is downloaded. Exit code 1 when another engine is faster.
    """
    with _readable_errors(interrupted=f"the rows measured so far are in {out}"):
        from blockswap.bench.command import bench_and_show

        words = [tuple(filter(None, text.split(","))) for text in (model, engines)]
        holds = bench_and_show(words[0], size, words[1], steps, device, out, picture, draw, _say)
    if not holds:
        raise typer.Exit(1)


@app.command()
def demo(
    model: str = typer.Option("sdxl", help="sdxl, flux or wan."),
    size: str = typer.Option("tiny", help="tiny, or full: the published configuration."),
    device: str = typer.Option("auto", help="auto, cpu, cuda, cuda:1, ..."),
    vram: str | None = typer.Option(
        None, help="Cap on device memory while swapped, as 10GiB. Default: half the weights leave."
    ),
    steps: int | None = typer.Option(None, help="Denoising steps, at least 2."),
    out: Path = typer.Option(Path("blockswap-demo"), help="Folder for all that is written."),
    seed: int = typer.Option(0, help="Seed of the weights and of the noise."),
) -> None:
    """Draw one picture unswapped and swapped; compare every bit.

    The pipeline is real, its weights are random: nothing is downloaded.
    """
    with _readable_errors(interrupted=f"the model was put back; what was written is in {out}"):
        from blockswap.demo import DemoRequest, run_demo

        request = DemoRequest(out, model, size, device, vram, steps, seed)
        result = run_demo(request, _say)
    if result.identical:
        _say("identical", "yes: picture and latents are equal bit for bit")
        return
    _say("identical", f"NO: {result.num_different} values of the picture differ")
    raise typer.Exit(1)


@app.command()
def plan(
    model: Path = typer.Argument(help="A profile (JSON), or a diffusers folder with its config."),
    vram: str | None = typer.Option(
        None, help="Cap on device memory, as 10GiB. Default: half of what can stream stays."
    ),
    dtype: str = typer.Option("bfloat16", help="Of the weights, for a folder."),
    picture: Path | None = typer.Option(
        None, help="Draw expected time over memory (.png, .svg, .pdf); needs a profile."
    ),
) -> None:
    """Explain what would stay and what would stream, without running anything.

    With a profile, which `blockswap demo` and Profile.of(session) write, also how fast.
    """
    with _readable_errors(interrupted="nothing was written"):
        from blockswap.planning import check_picture, draw_curve, explain_plan, open_profile

        profile = open_profile(model, dtype)
        if picture is not None:
            check_picture(profile, picture)
        for label, text in explain_plan(profile, vram):
            _say(label, text)
        if picture is not None:
            draw_curve(profile, picture)
            _say("written", str(picture))


@app.command()
def probe(
    out: Path | None = typer.Option(None, help="Write all figures here (.json)."),
    picture: Path | None = typer.Option(
        None, help="Draw speed over size of copy (.png, .svg, .pdf)."
    ),
    device: str = typer.Option("auto", help="cpu, or one GPU and its peers: cuda, cuda:1, ..."),
) -> None:
    """Measure what the links of this machine carry: host and GPUs, GPU and GPU, their memories.

    Each by size of copy, since small copies cost speed; GB/s are 10^9 bytes.
    """
    with _readable_errors(interrupted="nothing was written"):
        from blockswap.probe import check_files, measure, save
        from blockswap.probe_meter import TorchMeter
        from blockswap.probe_text import as_text

        check_files(out, picture)
        found = measure(TorchMeter(device))
        typer.echo(as_text(found))
        save(found, out, picture)
        for path in (out, picture):
            if path is not None:
                _say("written", str(path))


@app.command()
def doctor(
    json: bool = typer.Option(False, "--json", help="Facts and findings as one JSON object."),
) -> None:
    """Say what is missing or slow on this machine, and what to do.

    Exit code 1 when something is wrong, 0 when nothing or only slow.
    """
    from blockswap.doctor import as_json, diagnose, look

    machine = look()
    findings = diagnose(machine)
    if json:
        typer.echo(dumps(as_json(machine, findings), indent=2))
    else:
        _say("torch", f"{machine.torch}; blockswap built for {machine.build}")
        _say("GPUs", ", ".join(machine.gpus) or "none")
        for finding in findings:
            _say(finding.severity, finding.what)
            _say("", f"-> {finding.way_out}")
        if not findings:
            _say("all well", "nothing is missing or slow")
    if any(finding.severity == "wrong" for finding in findings):
        raise typer.Exit(1)


@app.command()
def version() -> None:
    """Print the versions of blockswap and torch."""
    import torch

    import blockswap

    typer.echo(f"blockswap {blockswap.__version__}, torch {torch.__version__}")


def _say(label: str, text: str) -> None:
    typer.echo(f"{label:<11} {text}".rstrip())


@contextlib.contextmanager
def _readable_errors(interrupted: str) -> Iterator[None]:
    """Turns expected errors into one line on stderr and an exit code; others stay tracebacks."""
    import torch

    from blockswap.errors import ConfigError, DeviceError

    try:
        yield
    except (ConfigError, DeviceError) as error:
        _fail(str(error), 2)
    except OSError as error:
        _fail(f"reading or writing failed: {error}", 1)
    except torch.OutOfMemoryError:
        _fail("the device ran out of memory: raise --vram, or choose --size tiny", 1)
    except KeyboardInterrupt:
        _fail(f"interrupted: {interrupted}", 130)


def _fail(message: str, code: int) -> None:
    typer.echo(f"blockswap: {' '.join(message.split())}", err=True)
    raise typer.Exit(code) from None

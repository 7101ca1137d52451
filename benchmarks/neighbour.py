"""A session without a cap beside a program that takes and returns memory: `--out FILE`.

A second process first takes all but 2 GiB of what the session leaves, then, for a minute, asks for
512 MiB at a time until it holds 8 GiB, and returns blocks at random. Meanwhile the model runs calls
at two resolutions. Noted: how long a request had to be retried, whether any call failed or gave
other bits, and how many steps after the last return the step is as fast as before.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import random
import statistics
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import torch
from torch import nn

import blockswap
from benchmarks import command_line
from blockswap.bench import zoo
from blockswap.bench.core import Core
from blockswap.bench.head import make_head

GIB = 2**30
REQUEST_BYTES = 2**29
MOST_BYTES = 8 * GIB
LEFT_BYTES = 2 * GIB
RETRY_S = 0.02
MOST_WAIT_S = 10.0
STEPS_PER_CALL = 4
AS_FAST = 1.02
DISTURBED = 1.25


@dataclass
class Played:
    """What became of the neighbour's requests."""

    requests: int = 0
    retried: int = 0
    refused: int = 0  # after so much waiting
    longest_wait_s: float = 0.0
    most_bytes: int = 0


def play(
    seconds: float,
    take: Callable[[], Any],
    give_back: Callable[[], None],
    clock: Callable[[], float] = time.monotonic,
    sleep: Callable[[float], None] = time.sleep,
    seed: int = 0,
) -> Played:
    """Take and return blocks of `REQUEST_BYTES` at random, at most `MOST_BYTES` of them at once.

    Args:
        seconds: how long.
        take: returns a block, or None where there is no memory.
        give_back: called after a block was dropped.
        clock: in seconds.
        sleep: lets so many seconds pass.
        seed: of all choices.
    """
    draw, played = random.Random(seed), Played()
    held: list[Any] = []
    end = clock() + seconds
    while clock() < end:
        is_full = len(held) * REQUEST_BYTES >= MOST_BYTES
        if held and (is_full or draw.random() < 0.45):
            held.pop(draw.randrange(len(held)))
            give_back()
        else:
            begin = clock()
            block = take()
            played.requests += 1
            played.retried += block is None
            while block is None and clock() - begin < MOST_WAIT_S:
                sleep(RETRY_S)
                block = take()
            played.longest_wait_s = max(played.longest_wait_s, clock() - begin)
            if block is None:
                played.refused += 1
            else:
                held.append(block)
        played.most_bytes = max(played.most_bytes, len(held) * REQUEST_BYTES)
        sleep(draw.uniform(0.0, 0.4))
    held.clear()
    give_back()
    return played


def as_fast_after(steps_ms: Sequence[float], undisturbed_ms: float) -> int | None:
    """Return how many steps pass until the others are as fast as before; None: they are not.

    A step that brings weights back is longer by far; the others are told by their median, since
    the host's pace alone moves single ones by more than 2 %.
    """
    far = [n for n, ms in enumerate(steps_ms, 1) if ms > DISTURBED * undisturbed_ms]
    after = far[-1] if far else 0
    rest = steps_ms[after:]
    is_fast = len(rest) > 0 and statistics.median(rest) <= AS_FAST * undisturbed_ms
    return after if is_fast else None


def live_beside(pipe: Connection, seed: int) -> None:
    """The other process: ballast, then its play, each when it is told to."""

    def take() -> torch.Tensor | None:
        try:
            return torch.empty(REQUEST_BYTES, dtype=torch.uint8, device="cuda")
        except torch.OutOfMemoryError:
            torch.cuda.empty_cache()
            return None

    torch.empty(1, device="cuda")
    pipe.send("ready")
    ballast = torch.empty(pipe.recv(), dtype=torch.uint8, device="cuda")
    pipe.send("loaded")
    pipe.send(play(pipe.recv(), take, torch.cuda.empty_cache, seed=seed))
    pipe.recv()
    del ballast


def smaller_inputs(inputs: dict[str, Any]) -> dict[str, Any]:
    """Return FLUX's inputs for fewer image tokens: 768 x 768 instead of 1024 x 1024."""
    tokens = inputs["hidden_states"].shape[1] * 9 // 16
    image = {"hidden_states": inputs["hidden_states"][:, :tokens].contiguous()}
    return inputs | image | {"img_ids": inputs["img_ids"][:tokens].contiguous()}


class Caller:
    """Runs steps at two resolutions and compares each output."""

    def __init__(self, model: nn.Module, inputs: list[dict[str, Any]]) -> None:
        self._model = model
        self._inputs = inputs
        self._expected = [model(**one)[0] for one in inputs]
        self.calls = self.failed = self.different = 0

    def step_ms(self, which: int) -> float:
        """Run one step; its time on the host's clock, from an idle device to its end."""
        torch.cuda.synchronize()
        begin = time.perf_counter()
        output = self._model(**self._inputs[which])[0]
        torch.cuda.synchronize()
        seconds = time.perf_counter() - begin
        self.different += not torch.equal(output, self._expected[which])
        return 1e3 * seconds

    def call(self, which: int) -> None:
        """Run a call's steps; one that fails is counted and not repeated."""
        self.calls += 1
        try:
            for _ in range(STEPS_PER_CALL):
                self.step_ms(which)
        except (torch.OutOfMemoryError, blockswap.BlockswapError) as error:
            print(f"a call failed: {error}", flush=True)
            self.failed += 1


@torch.no_grad()
def measure(seconds: float, seed: int) -> dict[str, Any]:
    """Return the row."""
    context = multiprocessing.get_context("spawn")
    pipe, end = context.Pipe()
    other = context.Process(target=live_beside, args=(end, seed), daemon=True)
    other.start()
    model = zoo.build("flux", "full", torch.bfloat16, "cuda", 0)
    inputs = zoo.make_inputs("flux", model, "cuda", torch.bfloat16, 1)
    caller = Caller(model, [inputs, smaller_inputs(inputs)])
    model.to("cpu")
    torch.cuda.empty_cache()
    draw = random.Random(seed)
    with blockswap.attach(model, device="cuda") as session:
        for which in (0, 1, 0):
            for _ in range(12):
                caller.step_ms(which)
        assert pipe.recv() == "ready"
        pipe.send(torch.cuda.mem_get_info()[0] - LEFT_BYTES)
        assert pipe.recv() == "loaded"
        for _ in range(10):
            caller.step_ms(0)
        core = Core()
        core.choose()
        undisturbed_ms = statistics.median(caller.step_ms(0) for _ in range(10))
        pipe.send(seconds)
        while not pipe.poll():
            caller.call(draw.randrange(2))
        played: Played = pipe.recv()
        core.choose()
        after_ms = [caller.step_ms(0) for _ in range(12)]
        core.free()
        pipe.send("end")
        report = session.report()
    other.join()
    return {
        "model": "flux",
        "seconds": seconds,
        "neighbour": asdict(played),
        "calls": caller.calls,
        "failed": caller.failed,
        "different": caller.different,
        "undisturbed_ms": undisturbed_ms,
        "after_ms": after_ms,
        "as_fast_after": as_fast_after(after_ms, undisturbed_ms),
        "sheds": report.sheds,
        "growths": report.growths,
        "ooms": report.ooms,
        "peak_device_bytes": report.peak_device_bytes,
    }


def main() -> None:
    """Measure and write the file."""
    parser = argparse.ArgumentParser(description=str(__doc__).splitlines()[0])
    parser.add_argument("--seconds", type=float, default=60.0)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=Path, required=True)
    options = parser.parse_args()
    row = measure(options.seconds, options.seed)
    print(json.dumps(row), flush=True)
    head = make_head(command_line(sys.argv))
    options.out.write_text(json.dumps(head | {"rows": [row]}, indent=1) + "\n")


if __name__ == "__main__":
    main()

"""What is told where weights are not pinned, and how large the ring is that they pass through."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch
from torch import nn

import blockswap
from blockswap.telling import pageable_note

MIB = 2**20


def note(pageable: int, bounce: int, refused: bool) -> str | None:
    host = SimpleNamespace(
        pageable_bytes=pageable,
        bounce_bytes=bounce,
        pinner=SimpleNamespace(was_refused=refused),
    )
    return pageable_note(host)  # type: ignore[arg-type]


def test_nothing_is_told_when_all_is_pinned() -> None:
    assert note(0, 0, refused=False) is None


@pytest.mark.parametrize(
    ("bounce", "refused", "words"),
    [
        (4 * MIB, False, ["8.0 MiB of the weights are not pinned (host_memory)", "ring of 4.0"]),
        (4 * MIB, True, ["8.0 MiB of the weights could not be pinned", "ring of 4.0", "ulimit -l"]),
        (0, True, ["could not be pinned", "nor a ring for them: the host waits", "ulimit -l"]),
    ],
)
def test_a_note_says_how_much_why_and_what_it_costs(
    bounce: int, refused: bool, words: list[str]
) -> None:
    text = note(8 * MIB, bounce, refused)
    assert text is not None
    for word in words:
        assert word in text


def test_a_cpu_keeps_to_the_bound_and_needs_no_ring() -> None:
    model = nn.Sequential(*(nn.Linear(512, 512) for _ in range(8))).requires_grad_(False)
    x = torch.ones(1, 512)
    expected = model(x)
    with blockswap.attach(
        model, device="cpu", offload="1GiB", host_memory="3MiB", blocks=["*"]
    ) as session:
        report = session.report()
        assert 0 < report.pinned_bytes <= 3 * MIB < report.host_bytes
        assert report.bounce_bytes == 0
        assert report.notes == ()
        assert torch.equal(model(x), expected)

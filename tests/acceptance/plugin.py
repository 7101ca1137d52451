"""The pytest plugin: replaces group offloading, marks the expected deviations, tells what ran.

Load it with `-p tests.acceptance.plugin`: it must be there before test modules import diffusers.
Only tests of diffusers are on the list of deviations; one's own run as they are.
"""

from __future__ import annotations

import gc
import os
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

import tests
from blockswap.session import Session
from tests.acceptance.deviations import deviation
from tests.acceptance.offloading import replace_group_offloading
from tests.acceptance.selection import left_out

ATTACHED = "attached"  # the property of a test's report that names the models

# Their classes alone: who held the sessions would keep their memory from the test.
_attached: list[str] = []


def _note(session: Session) -> None:
    _attached.append(type(session.model).__name__)


replace_group_offloading(_note)


def pytest_addoption(parser: pytest.Parser) -> None:
    """Add where diffusers' tests are."""
    parser.addoption(
        "--diffusers-tests", type=Path, help="the folder that holds tests/ of diffusers"
    )


@pytest.hookimpl(tryfirst=True)
def pytest_load_initial_conftests(early_config: pytest.Config) -> None:
    """Let diffusers' tests and ours, which both say `tests`, live in one process."""
    folder = early_config.known_args_namespace.diffusers_tests
    if folder is not None:
        tests.__path__ = [str(folder / "tests"), *tests.__path__]
        sys.path.insert(0, str(folder))


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Mark what is left out, and what is expected to fail."""
    device = os.environ.get("DIFFUSERS_TEST_DEVICE", "cuda")
    for item in items:
        if (entry := left_out(item.nodeid, device)) is not None:
            item.add_marker(pytest.mark.skip(reason=f"left out: {entry.reason}"))
        elif (expected := deviation(item.nodeid)) is not None:
            item.add_marker(
                pytest.mark.xfail(reason=expected.reason, raises=expected.raises, strict=True)
            )


@pytest.hookimpl(wrapper=True)
def pytest_runtest_call(item: pytest.Item) -> Iterator[None]:
    """Note what a test attaches."""
    _attached.clear()
    try:
        yield
    finally:
        item.user_properties.append((ATTACHED, list(_attached)))


@pytest.hookimpl(wrapper=True)
def pytest_runtest_teardown() -> Iterator[None]:
    """Leave nothing of a test's sessions to the next one."""
    yield
    gc.collect()
    if hasattr(torch, "fake"):
        torch.fake.reset()


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    """Count; a test that made no session says nothing about blockswap, or wants a refusal."""
    stats = terminalreporter.stats
    calls = [report for report in stats.get("passed", []) if report.when == "call"]
    with_session = sum(bool(dict(report.user_properties)[ATTACHED]) for report in calls)
    skipped = stats.get("skipped", [])
    ours = sum("left out: " in str(report.longrepr) for report in skipped)
    counts = {
        "passed": with_session,
        "passed without a session": len(calls) - with_session,
        "deviating": len(stats.get("xfailed", [])),
        "left out": ours,
        "skipped by diffusers": len(skipped) - ours,
        "failed": len(stats.get("failed", [])) + len(stats.get("error", [])),
    }
    told = ", ".join(f"{count} {name}" for name, count in counts.items())
    terminalreporter.write_line(f"acceptance: {told}")

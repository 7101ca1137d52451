"""`blockswap doctor` names each fault that it knows, with numbers and a way out."""

from __future__ import annotations

import json
from dataclasses import replace

import pytest
from typer.testing import CliRunner

from blockswap import doctor
from blockswap.cli import app
from blockswap.doctor import GIB, Machine, diagnose

HEALTHY = Machine(
    platform="linux",
    kernel="6.8.0-generic",
    torch="2.13.0+cu130",
    torch_gpu="cuda",
    build="cuda",
    gpus=("NVIDIA GeForce RTX 4090",),
    memory_bytes=64 * GIB,
    available_bytes=50 * GIB,
    lock_limit_bytes=None,
    huge_pages="madvise",
    diffusers=True,
)
# What is changed, the severity, and words of the finding and of its way out.
FAULTS = {
    "CPU torch": ({"torch_gpu": None, "gpus": ()}, "note", "is a CPU build", "CUDA or ROCm build"),
    "built for the CPU": ({"build": "cpu"}, "wrong", "built for cpu", "--force-reinstall"),
    "built for ROCm": ({"build": "rocm"}, "wrong", "built for rocm", "--force-reinstall"),
    "no GPU": ({"gpus": ()}, "wrong", "sees no GPU", "nvidia-smi"),
    "WSL2": (
        {"kernel": "5.15.153.1-microsoft-standard-WSL2"},
        "slow",
        "WSL2 pins about half of its 64.00 GiB",
        ".wslconfig",
    ),
    "lock limit": (
        {"lock_limit_bytes": 8 * GIB},
        "slow",
        "may lock 8.00 GiB of 64.00 GiB",
        "ulimit -l",
    ),
    "no huge pages": ({"huge_pages": "never"}, "slow", "huge pages are off", "madvise"),
    "little memory": ({"available_bytes": 6 * GIB}, "note", "6.00 GiB of host memory", "smaller"),
    "no diffusers": ({"diffusers": False}, "note", "diffusers is not installed", "pip install"),
}


def test_nothing_is_found_on_a_healthy_machine() -> None:
    assert diagnose(HEALTHY) == []


@pytest.mark.parametrize("fault", FAULTS)
def test_fault_is_named_with_its_way_out(fault: str) -> None:
    change, severity, what, way_out = FAULTS[fault]
    (finding,) = diagnose(replace(HEALTHY, **change))
    assert finding.severity == severity
    assert what in finding.what
    assert way_out in finding.way_out


def test_what_is_wrong_comes_before_what_is_slow() -> None:
    ill = replace(HEALTHY, huge_pages="never", diffusers=False, gpus=())
    assert [finding.severity for finding in diagnose(ill)] == ["wrong", "slow", "note"]


def test_this_machine_can_be_looked_at() -> None:
    machine = doctor.look()
    assert machine.memory_bytes >= machine.available_bytes > 0
    assert machine.huge_pages in ("always", "madvise", "never", "")


def test_command_prints_findings_and_exits_1_when_something_is_wrong(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(doctor, "look", lambda: replace(HEALTHY, gpus=(), huge_pages="never"))
    done = CliRunner().invoke(app, ["doctor"])
    assert done.exit_code == 1
    assert done.stdout.index("wrong") < done.stdout.index("slow")
    assert "-> check the driver" in done.stdout
    monkeypatch.setattr(doctor, "look", lambda: HEALTHY)
    done = CliRunner().invoke(app, ["doctor"])
    assert done.exit_code == 0
    assert "nothing is missing" in done.stdout


def test_json_holds_facts_and_findings(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(doctor, "look", lambda: replace(HEALTHY, diffusers=False))
    done = CliRunner().invoke(app, ["doctor", "--json"])
    said = json.loads(done.stdout)
    assert said["machine"]["memory_bytes"] == 64 * GIB
    assert [finding["severity"] for finding in said["findings"]] == ["note"]

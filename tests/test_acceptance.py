"""The plugin behind diffusers' own tests: it attaches, it counts, and its deviations must fail."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from diffusers.hooks import group_offloading
from doc_pages import read, rows_of
from torch import nn

from tests.acceptance.deviations import DEVIATIONS
from tests.acceptance.offloading import attach
from tests.acceptance.selection import LEFT_OUT

ROOT = Path(__file__).resolve().parent.parent
PLUGIN = ("-p", "tests.acceptance.plugin")

TESTS = '''
import torch
from diffusers import DiffusionPipeline, ModelMixin
from diffusers.configuration_utils import ConfigMixin
from diffusers.hooks import HookRegistry, apply_group_offloading
from diffusers.hooks.group_offloading import _maybe_remove_and_reapply_group_offloading

from blockswap.attached import session_of


class Model(ModelMixin, ConfigMixin):
    def __init__(self):
        super().__init__()
        self.blocks = torch.nn.ModuleList(torch.nn.Linear(64, 64) for _ in range(3))

    def forward(self, x):
        for block in self.blocks:
            x = block(x)
        return x


class Pipe(DiffusionPipeline):
    def __init__(self, transformer):
        super().__init__()
        self.register_modules(transformer=transformer)


HOW = {"onload_device": torch.device("cpu"), "offload_type": "block_level"}


def test_function():
    model = Model()
    apply_group_offloading(model, num_blocks_per_group=1, **HOW)
    assert session_of(model) is not None


def test_model_method():
    model, x = Model(), torch.ones(1, 64)
    with torch.no_grad():
        before = model(x)
        model.enable_group_offload(num_blocks_per_group=1, **HOW)
        assert torch.equal(model(x), before)
    assert session_of(model) is not None


def test_pipeline_method():
    pipe = Pipe(Model())
    pipe.enable_group_offload(num_blocks_per_group=1, **HOW)
    assert session_of(pipe.transformer) is not None


def test_applied_again():
    model = Model()
    model.enable_group_offload(num_blocks_per_group=1, **HOW)
    session = session_of(model)
    _maybe_remove_and_reapply_group_offloading(model)
    assert session_of(model) is session
    assert HookRegistry.check_if_exists_or_initialize(model).get_hook("group_offloading")


def test_own_check():
    try:
        Model().enable_group_offload(**HOW)
    except ValueError as error:
        assert "num_blocks_per_group" in str(error)


def test_model_with_only_standalone_layers():
    """On the list of deviations, and passes."""


def test_without_a_model():
    """Not on the list of deviations, and passes."""


class TestOther:
    def test_model_with_only_standalone_layers(self):
        raise RuntimeError("not how it is expected to fail")


class TestExpected:
    def test_model_with_only_standalone_layers(self):
        apply_group_offloading(torch.nn.Linear(4, 4), num_blocks_per_group=1, **HOW)
'''


def run(folder: Path, *options: str) -> tuple[dict[str, str], str]:
    """Run the tests above in a process of their own; outcomes by name, and all that it says."""
    file = folder / "tests/hooks/test_tiny.py"
    file.parent.mkdir(parents=True)
    file.write_text(TESTS)
    command = [sys.executable, "-m", "pytest", *options, "--rootdir", str(folder), "-vv", str(file)]
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    done = subprocess.run(command, cwd=ROOT, env=environment, text=True, capture_output=True)
    found = re.findall(r"test_tiny\.py::(\S+) ([A-Z]+)", done.stdout)
    assert found, done.stdout + done.stderr
    return dict(found), done.stdout


@pytest.fixture(scope="module")
def ran(tmp_path_factory: pytest.TempPathFactory) -> tuple[dict[str, str], str]:
    return run(tmp_path_factory.mktemp("tiny"), *PLUGIN)


WAYS = ["test_function", "test_model_method", "test_pipeline_method", "test_applied_again"]


@pytest.mark.parametrize("way", WAYS)
def test_every_way_to_group_offloading_attaches(way, ran):
    assert ran[0][way] == "PASSED", ran[1]


def test_without_the_plugin_nothing_is_attached(tmp_path):
    outcomes, _ = run(tmp_path)
    assert {way: outcomes[way] for way in WAYS} == dict.fromkeys(WAYS, "FAILED")


def test_checks_of_diffusers_stay_in_force(ran):
    assert ran[0]["test_own_check"] == "PASSED"


def test_a_deviation_that_passes_is_a_failure(ran):
    outcomes, text = ran
    assert outcomes["test_model_with_only_standalone_layers"] == "FAILED"
    assert "XPASS(strict)" in text


def test_a_deviation_fails_only_as_it_is_expected_to(ran):
    outcomes, _ = ran
    assert outcomes["TestOther::test_model_with_only_standalone_layers"] == "FAILED"
    assert outcomes["TestExpected::test_model_with_only_standalone_layers"] == "XFAIL"


def test_the_summary_tells_which_tests_made_a_session(ran):
    assert "acceptance: 4 passed, 2 passed without a session, 1 deviating" in ran[1]


@pytest.mark.parametrize(
    ("level", "mode"), [("block_level", "adaptive"), ("leaf_level", "layerwise")]
)
@pytest.mark.parametrize("streams", [False, True])
def test_settings_of_group_offloading_become_ours(level, mode, streams):
    model = nn.Sequential(nn.Linear(64, 64), nn.Linear(64, 64), nn.Linear(64, 64))
    config = group_offloading.GroupOffloadingConfig(
        onload_device=torch.device("cpu"),
        offload_device=torch.device("cpu"),
        offload_type=group_offloading.GroupOffloadingType(level),
        non_blocking=False,
        record_stream=False,
        low_cpu_mem_usage=False,
        stream=object() if streams else None,
    )
    with attach(model, config) as session:
        for _ in range(6):
            model(torch.ones(1, 64))
        assert (session.config.mode, session.config.lookahead) == (mode, int(streams))
        assert session.report().resident_bytes == 0


def test_the_page_lists_every_deviation_and_what_is_left_out():
    page = read("acceptance.md")
    told = [(tests, reason) for tests, _number, reason in rows_of(page, "deviating tests")]
    assert told == [(f"`{entry.tests}`", entry.reason) for entry in DEVIATIONS]
    told = [(tests, reason) for tests, _where, reason in rows_of(page, "tests left out")]
    assert told == [(f"`{entry.tests}`", entry.reason) for entry in LEFT_OUT]

"""The command line, for real: nothing is mocked where a run is promised."""

import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from typer.testing import CliRunner

import blockswap
from blockswap.cli import app

ROOT = Path(__file__).resolve().parent.parent


@pytest.fixture(autouse=True)
def one_thread(monkeypatch):
    """Keeps the tests quick on a crowded machine; both runs of a demo share it."""
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def run(*arguments):
    return CliRunner().invoke(app, [str(argument) for argument in arguments])


def command(*arguments):
    return [sys.executable, "-m", "blockswap", *map(str, arguments)]


def run_process(*arguments):
    return subprocess.run(
        command(*arguments), cwd=ROOT, capture_output=True, text=True, timeout=280, check=False
    )


def needs_diffusers():
    pytest.importorskip("diffusers")
    pytest.importorskip("transformers")


def assert_refused(result, *parts):
    """One line on stderr that holds `parts`, exit code 2."""
    assert result.exit_code == 2, result.output
    assert len(result.stderr.strip().splitlines()) == 1
    for part in parts:
        assert part in result.stderr


def test_help_lists_the_commands_that_exist():
    text = run("--help").output
    for command_name in ("demo", "plan", "doctor", "version"):
        assert command_name in text


def test_version_names_blockswap_and_torch():
    output = run("version").output
    assert output.startswith("blockswap ")
    assert torch.__version__ in output


@pytest.mark.parametrize(
    ("arguments", "parts"),
    [
        (["--model", "dall-e"], ["unknown model 'dall-e'", "sdxl, flux, wan"]),
        (["--size", "huge"], ["unknown size 'huge'", "tiny or full"]),
        (["--vram", "3 parrots"], ["vram='3 parrots'"]),
        (["--vram", "-1GiB"], ["vram"]),
        (["--device", "abacus"], ["abacus"]),
        (["--device", "cuda:99"], ["cuda:99"]),
        (["--steps", "1"], ["steps=1", "2 and 1000"]),
        (["--seed", "-1"], ["seed=-1"]),
    ],
)
def test_bad_input_is_one_line_and_leaves_no_folder(tmp_path, arguments, parts):
    out = tmp_path / "out"
    assert_refused(run("demo", "--out", out, *arguments), *parts)
    assert not out.exists()


def test_an_out_that_cannot_be_made_is_refused(tmp_path):
    needs_diffusers()
    (tmp_path / "file").write_text("mine")
    assert_refused(run("demo", "--out", tmp_path / "file"), "--out", "cannot be made")
    assert_refused(run("demo", "--out", tmp_path / "file" / "deeper"), "cannot be made")
    assert (tmp_path / "file").read_text() == "mine"


@pytest.mark.parametrize("marker", [None, "not json", '{"family": "flux"}'])
def test_a_checkpoint_folder_of_the_user_is_never_written_to(tmp_path, marker):
    needs_diffusers()
    folder = tmp_path / "checkpoint"
    folder.mkdir()
    (folder / "model_index.json").write_text("mine")
    if marker is not None:
        (folder / "blockswap-demo.json").write_text(marker)
    before = sorted(folder.iterdir())
    assert_refused(run("demo", "--out", tmp_path, "--device", "cpu"), "holds something else")
    assert sorted(folder.iterdir()) == before
    assert (folder / "model_index.json").read_text() == "mine"


def test_a_missing_package_is_named_with_the_command_that_installs_it(tmp_path, monkeypatch):
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    refused = run("demo", "--out", tmp_path / "out", "--device", "cpu")
    assert_refused(refused, "diffusers and transformers", "pip install 'blockswap[demo]'")


def test_a_different_picture_is_told_and_fails(tmp_path, monkeypatch):
    needs_diffusers()
    real_attach = blockswap.attach

    def spoiling_attach(model, **config):
        with torch.no_grad():
            model.proj_out.bias.add_(0.5)
        return real_attach(model, **config)

    monkeypatch.setattr(blockswap, "attach", spoiling_attach)
    result = run("demo", "--model", "flux", "--out", tmp_path, "--device", "cpu", "--steps", 2)
    assert result.exit_code == 1, result.output
    assert "identical   NO" in result.output
    assert (tmp_path / "unswapped.png").is_file()
    assert json.loads((tmp_path / "report.json").read_text())["identical"] is False


def test_an_interrupt_in_a_swapped_run_leaves_the_model_whole(tmp_path, monkeypatch):
    needs_diffusers()
    real_attach = blockswap.attach
    seen = {}

    def interrupting_attach(model, **config):
        seen["model"] = model
        seen["weights"] = {name: value.clone() for name, value in model.state_dict().items()}
        session = real_attach(model, **config)
        calls = []

        def interrupt(*_):
            calls.append(1)
            if len(calls) == 2:
                raise KeyboardInterrupt

        seen["handle"] = model.transformer_blocks[1].register_forward_pre_hook(interrupt)
        return session

    monkeypatch.setattr(blockswap, "attach", interrupting_attach)
    result = run("demo", "--model", "flux", "--out", tmp_path, "--device", "cpu", "--steps", 4)
    assert result.exit_code == 130, result.output
    assert "interrupted" in result.stderr
    seen["handle"].remove()
    model = seen["model"]
    for name, value in model.state_dict().items():
        assert torch.equal(value, seen["weights"][name]), name
    assert not any(module._forward_pre_hooks for module in model.modules())
    with torch.no_grad():
        output = model(
            hidden_states=torch.ones(1, 4, 64),
            encoder_hidden_states=torch.ones(1, 2, model.config.joint_attention_dim),
            pooled_projections=torch.ones(1, model.config.pooled_projection_dim),
            timestep=torch.ones(1),
            img_ids=torch.zeros(4, 3),
            txt_ids=torch.zeros(2, 3),
            guidance=torch.ones(1),
        ).sample
    assert output.isfinite().all()
    assert (tmp_path / "checkpoint" / "model_index.json").is_file()


def test_control_c_ends_the_command_with_130_and_no_traceback(tmp_path):
    needs_diffusers()
    arguments = command(
        "demo", "--model", "flux", "--out", tmp_path, "--device", "cpu", "--steps", 900
    )
    process = subprocess.Popen(
        arguments, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
        env=os.environ | {"PYTHONUNBUFFERED": "1"},
        # A shell's background job ignores the signal, and so would its children.
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
    )  # fmt: skip
    assert process.stdout is not None
    for line in process.stdout:
        if line.startswith("model"):  # the unswapped run begins
            break
    process.send_signal(signal.SIGINT)
    _, stderr = process.communicate(timeout=120)
    assert process.returncode == 130, stderr
    assert "interrupted" in stderr
    assert "Traceback" not in stderr


@pytest.mark.parametrize("model", ["sdxl", "flux", "wan"])
def test_demo_runs_from_the_shell_and_the_picture_is_identical(tmp_path, model):
    needs_diffusers()
    result = run_process("demo", "--model", model, "--device", "cpu", "--out", tmp_path)
    assert result.returncode == 0, result.stdout + result.stderr
    assert "identical   yes" in result.stdout
    assert "Traceback" not in result.stderr
    numbers = json.loads((tmp_path / "report.json").read_text())
    report = numbers["report"]
    assert numbers["identical"] is True
    # About 40 % of the weights stay, so at least half of them cross the link in each step.
    assert report["streamed_bytes"] > 0.5 * report["weight_bytes"]
    assert report["resident_bytes"] > 0
    assert report["state"] == "ready"  # the default number of steps is enough to learn
    for name in ("image.png", "timeline.png", "memory.png", "trace.json", "report.txt"):
        assert (tmp_path / name).stat().st_size > 500
    assert any((tmp_path / "checkpoint").rglob("*.safetensors"))
    if model == "wan":
        assert (tmp_path / "image.gif").stat().st_size > 5000


def test_a_second_demo_reuses_the_checkpoint_and_draws_the_same_picture(tmp_path):
    needs_diffusers()
    pictures = []
    for _ in range(2):
        result = run("demo", "--model", "flux", "--device", "cpu", "--out", tmp_path, "--steps", 2)
        assert result.exit_code == 0, result.output
        pictures.append((tmp_path / "image.png").read_bytes())
    assert "found from an earlier run" in result.output
    assert pictures[0] == pictures[1]

"""Planning without running: from a profile, or from a model's configuration alone."""

import json

import pytest
from session_models import attach, attach_ready, make_input, make_stack
from typer.testing import CliRunner

from blockswap.bench import zoo
from blockswap.cli import app
from blockswap.errors import CapError, ConfigError, UseError
from blockswap.profile import Profile
from blockswap.session import Session

X = make_input()
MIB = 2**20


def run(*arguments):
    return CliRunner().invoke(app, ["plan", *map(str, arguments)])


def assert_refused(result, *parts):
    assert result.exit_code == 2, result.output
    assert len(result.stderr.strip().splitlines()) == 1
    for part in parts:
        assert part in result.stderr


@pytest.fixture(scope="module")
def profile():
    session = attach_ready(make_stack(), X, offload="4MiB")
    yield Profile.of(session)
    session.detach()


@pytest.fixture
def saved(profile, tmp_path):
    path = tmp_path / "stack.json"
    profile.save(path)
    return path


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    path = tmp_path_factory.mktemp("flux")
    zoo.build("flux", "tiny", zoo.torch.float32, "cpu", 0).save_config(path)
    return path


def test_a_profile_holds_what_the_session_planned_with():
    session: Session = attach_ready(make_stack(), X, offload="4MiB")
    profile = Profile.of(session)
    learned, units = session._steward.learned, session._state.units
    assert [leaf.name for leaf in profile.leaves] == [units[i].name for i in learned.order]
    assert [leaf.seconds for leaf in profile.leaves] == [learned.seconds[i] for i in learned.order]
    assert profile.link_bytes_per_s == session._steward.plans.link.speed
    session.detach()


def test_a_saved_profile_plans_as_the_one_that_was_saved(profile, saved):
    cap = (profile.smallest_cap + profile.largest_cap) // 2
    again = Profile.load(saved)
    assert again == profile
    assert again.plan(cap)[0].predicted_seconds == profile.plan(cap)[0].predicted_seconds


def test_a_session_that_learns_has_no_profile_yet():
    session = attach(make_stack(), offload="4MiB")
    with pytest.raises(UseError, match="learning"):
        Profile.of(session)
    session.detach()
    with pytest.raises(UseError, match="detached"):
        Profile.of(session)


def test_the_curve_leads_from_the_smallest_cap_to_everything_resident(profile):
    curve = profile.curve(points=6)
    assert curve[0][0] == profile.smallest_cap
    assert curve[-1][0] == profile.largest_cap
    plan, _ = profile.plan(profile.largest_cap)
    assert plan.streamed_bytes == 0
    assert curve[-1][1] == 1e3 * plan.predicted_seconds
    assert all(step_ms >= curve[-1][1] * (1 - 1e-9) for _, step_ms in curve)


def test_a_cap_below_the_smallest_plan_is_refused_with_both_numbers(profile):
    with pytest.raises(CapError, match="smallest plan of Stack"):
        profile.plan(profile.smallest_cap - 1)


@pytest.mark.parametrize(
    ("damage", "named"),
    [
        (lambda text: text[: len(text) // 2], "no profile"),
        (lambda text: "[]", "no profile"),
        (lambda text: text.replace('"seconds": ', '"seconds": -1', 1), "seconds"),
        (
            lambda text: text.replace('"schema_version": 1', '"new": 0, "schema_version": 9'),
            "schema 9",
        ),
        (lambda text: json.dumps(json.loads(text) | {"leaves": []}), "leaves"),
        (
            lambda text: text.replace('"head_seconds": ', '"head_seconds": 1e999, "x": '),
            "head_seconds",
        ),
        (lambda text: text.replace('"block": 0', '"block": 77', 1), "missing block"),
    ],
)
def test_a_damaged_profile_is_refused_by_name(saved, damage, named):
    saved.write_text(damage(saved.read_text()))
    with pytest.raises(ConfigError, match=named):
        Profile.load(saved)
    assert_refused(run(saved), str(saved), named)


def test_plan_with_a_profile_says_how_fast_and_draws_it(saved, tmp_path):
    picture = tmp_path / "curve.png"
    result = run(saved, "--picture", picture)
    assert result.exit_code == 0, result.output
    for part in ("Stack", "resident", "ring", "streamed", "predicted", "compute"):
        assert part in result.output
    assert picture.read_bytes().startswith(b"\x89PNG")


def test_plan_of_a_folder_says_what_stays_and_streams_and_no_times(folder):
    result = run(folder, "--dtype", "float32")
    assert result.exit_code == 0, result.output
    assert "FluxTransformer2DModel" in result.output
    assert "activations come on top" in result.output
    assert "predicted" not in result.output


def test_plan_counts_the_bytes_of_the_dtype(folder):
    from blockswap.planning import open_profile

    half, whole = (open_profile(folder, dtype) for dtype in ("bfloat16", "float32"))
    assert half.total_bytes == pytest.approx(whole.total_bytes / 2, rel=0.01)


def test_plan_of_a_pipeline_folder_takes_its_denoiser(folder, tmp_path):
    (tmp_path / "transformer").mkdir()
    (tmp_path / "transformer" / "config.json").write_text((folder / "config.json").read_text())
    index = {"_class_name": "FluxPipeline", "transformer": ["diffusers", "X"], "vae": ["d", "Y"]}
    (tmp_path / "model_index.json").write_text(json.dumps(index))
    assert "FluxTransformer2DModel" in run(tmp_path).output


def test_plan_of_a_pipeline_folder_whose_names_tell_nothing_takes_what_its_class_tells(tmp_path):
    import diffusers

    unet = diffusers.UNet2DModel(
        block_out_channels=(32, 64),
        layers_per_block=1,
        sample_size=16,
        down_block_types=("DownBlock2D",) * 2,
        up_block_types=("UpBlock2D",) * 2,
    )
    unet.save_config(tmp_path / "decoder")
    (tmp_path / "vqgan").mkdir()
    index = {"_class_name": "X", "vqgan": ["wuerstchen", "PaellaVQModel"], "fits": [None, None]}
    (tmp_path / "model_index.json").write_text(json.dumps(index))
    assert_refused(run(tmp_path), "a pipeline without a denoiser: it has _class_name, fits, vqgan")
    index["decoder"] = ["diffusers", "UNet2DModel"]
    (tmp_path / "model_index.json").write_text(json.dumps(index))
    assert "UNet2DModel" in run(tmp_path).output


def test_what_cannot_be_planned_is_refused_in_one_line(folder, tmp_path, saved):
    assert_refused(run("black-forest-labs/FLUX.1-dev"), "nothing is downloaded")
    assert_refused(run(tmp_path / "missing.json"), "neither a profile nor a folder")
    empty = tmp_path / "empty"
    empty.mkdir()
    assert_refused(run(empty), "neither config.json nor model_index.json")
    (empty / "config.json").write_text("{")
    assert_refused(run(empty), "cannot be read")
    (empty / "config.json").write_text('{"_class_name": "NoSuchModel"}')
    assert_refused(run(empty), "NoSuchModel")
    (empty / "config.json").write_text(
        '{"_class_name": "FluxTransformer2DModel", "num_layers": "two"}'
    )
    assert_refused(run(empty), "FluxTransformer2DModel")
    assert_refused(run(folder, "--dtype", "int8"), "int8")
    assert_refused(run(folder, "--vram", "plenty"), "plenty")
    assert_refused(run(saved, "--vram", "1KiB"), "smallest plan")
    assert_refused(run(folder, "--dtype", "float8_e4m3fn"), "float8_e4m3fn")
    assert_refused(run(saved, "--picture", tmp_path / "x.txt"), ".png")
    assert_refused(run(folder, "--picture", tmp_path / "x.png"), "profile with times")
    assert not (tmp_path / "x.png").exists()

import pytest
import torch
from torch import nn

from blockswap.bench import zoo
from blockswap.errors import ConfigError, UnsupportedError
from blockswap.preflight import check_attachable


@pytest.fixture
def model():
    return zoo.build("flux")


def state(model):
    """Everything that a refusal must leave alone."""
    hooks = [
        (name, dict(m._forward_pre_hooks), dict(m._forward_hooks), m.forward)
        for name, m in model.named_modules()
    ]
    return hooks, [(n, id(p), p.data_ptr()) for n, p in model.named_parameters()]


def assert_refused(model, match, error=ConfigError):
    before = state(model)
    with pytest.raises(error, match=match):
        check_attachable(model)
    assert state(model) == before


@pytest.mark.parametrize("kind", zoo.KINDS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_ordinary_model_is_accepted(kind, dtype):
    check_attachable(zoo.build(kind, dtype=dtype))


@pytest.mark.parametrize("thing", [None, 7, "flux", nn.Linear, torch.zeros(2)])
def test_what_is_not_a_module_is_refused_by_type(thing):
    kind = thing.__name__ if isinstance(thing, type) else type(thing).__name__
    with pytest.raises(
        ConfigError, match=rf"{kind}; accepted: a diffusers pipeline, or a torch\.nn\.Module"
    ):
        check_attachable(thing)


def test_model_without_parameters_is_refused():
    assert_refused(nn.ReLU(), "holds no parameters")


def test_weights_on_meta_are_refused_with_count_and_first_name(model):
    model.x_embedder.to("meta")
    total = len(list(model.parameters()))
    assert_refused(model, rf"2 of {total} parameters are on the meta.*'x_embedder\.weight'")


def test_weights_made_under_inference_mode_are_refused():
    with torch.inference_mode():
        model = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4))
    with pytest.raises(ConfigError, match=r"4 of 4 tensors .*, the first is '0\.weight'"):
        check_attachable(model)


def test_weights_without_shape_are_refused():
    with pytest.raises(ConfigError, match=r"no shape yet, the first is '0\.weight'"):
        check_attachable(nn.Sequential(nn.LazyLinear(2)))


def test_accelerate_sequential_offload_is_refused_with_the_way_out(model):
    from accelerate import cpu_offload

    cpu_offload(model, execution_device=torch.device("cpu"))
    assert_refused(model, r"accelerate offloads.*AlignDevicesHook.*remove_hook_from_module")


def test_accelerate_model_offload_is_refused(model):
    from accelerate import cpu_offload_with_hook

    model, _ = cpu_offload_with_hook(model, execution_device=torch.device("cpu"))
    assert_refused(model, r"accelerate offloads the model \(CpuOffload\)")


def test_offload_hook_behind_another_hook_is_seen(model):
    from accelerate.hooks import CpuOffload, ModelHook, add_hook_to_module

    add_hook_to_module(model, ModelHook())
    check_attachable(model)
    add_hook_to_module(model, CpuOffload("cpu"), append=True)
    assert_refused(model, "CpuOffload")


def test_offload_hook_that_was_removed_is_no_obstacle(model):
    from accelerate import cpu_offload
    from accelerate.hooks import remove_hook_from_module

    cpu_offload(model, execution_device=torch.device("cpu"))
    remove_hook_from_module(model, recurse=True)
    check_attachable(model)


def test_device_map_over_several_places_is_refused(model):
    model.hf_device_map = {"transformer_blocks": 0, "proj_out": "cpu"}
    assert_refused(model, "device_map over 0, cpu")
    model.hf_device_map = {"": "cpu"}
    check_attachable(model)


@pytest.mark.parametrize("offload_type", ["block_level", "leaf_level"])
def test_diffusers_group_offloading_is_refused(model, offload_type):
    model.enable_group_offload(
        onload_device=torch.device("cpu"),
        offload_device=torch.device("cpu"),
        offload_type=offload_type,
        num_blocks_per_group=1 if offload_type == "block_level" else None,
    )
    assert_refused(model, "group offloading is enabled")


def test_our_own_hook_under_diffusers_name_is_no_obstacle(model):
    from diffusers.hooks import HookRegistry, ModelHook

    shim = type("Shim", (ModelHook,), {"__module__": "blockswap.adapters.diffusers"})
    HookRegistry.check_if_exists_or_initialize(model).register_hook(shim(), "group_offloading")
    check_attachable(model)


def test_layerwise_casting_is_refused_where_it_takes_more_than_a_leaf(model):
    from diffusers.hooks import apply_layerwise_casting

    model.enable_layerwise_casting(storage_dtype=torch.float8_e4m3fn, compute_dtype=torch.bfloat16)
    check_attachable(model)
    block = model.transformer_blocks[0]
    apply_layerwise_casting(block, torch.float8_e4m3fn, torch.bfloat16, skip_modules_pattern=None)
    assert_refused(model, "casting of module 'transformer_blocks.0' as a whole", UnsupportedError)


def test_parameters_on_several_devices_are_refused_with_counts(model):
    class Elsewhere(nn.Parameter):
        device = torch.device("cuda:0")  # stands in for a device that this machine lacks

    total = len(list(model.parameters()))
    model.proj_out.bias = Elsewhere(model.proj_out.bias.data, requires_grad=False)
    assert_refused(model, rf"{total - 1} on cpu, 1 on cuda:0 \(such as 'proj_out\.bias'\)")


class Packed(torch.Tensor):
    """A tensor subclass, as quantisers make them."""


@pytest.mark.parametrize("where", ["parameter", "buffer"])
def test_tensor_subclass_is_refused_by_class_and_name(model, where):
    packed = torch.zeros(4).as_subclass(Packed)
    if where == "parameter":
        model.proj_out.bias = nn.Parameter(packed, requires_grad=False)
    else:
        model.proj_out.register_buffer("bias_scale", packed)
    assert_refused(model, r"'proj_out\.bias.* is Packed.*not supported yet", UnsupportedError)


def test_sparse_weights_are_refused():
    linear = nn.Linear(2, 2)
    linear.weight = nn.Parameter(torch.eye(2).to_sparse(), requires_grad=False)
    with pytest.raises(UnsupportedError, match="layout"):
        check_attachable(linear)

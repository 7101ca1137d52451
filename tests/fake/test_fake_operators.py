"""Operators on the fake accelerator give the bits of the CPU."""

from __future__ import annotations

import pytest
import torch
from torch import nn


def test_views_share_memory(device_module):
    x = torch.zeros(4, 6, device="fake")
    views = [
        x.view(24)[:4], x.t()[0], x[1], x[:, 2:4], x.unsqueeze(0)[0, 2], x.reshape(2, 12)[0],
        x.expand(3, 4, 6)[1, 3], x.permute(1, 0)[5], *x.chunk(2, dim=1), *x.split(2), *x.unbind(0),
        x.detach(), x.as_strided((2,), (1,), 3), x.unfold(1, 2, 2), torch.view_as_complex(x.view(4, 3, 2)),
        x.view(torch.int32), x.diagonal(), x.squeeze(), x.flatten(), x.movedim(0, 1), x.unflatten(1, (2, 3)),
    ]  # fmt: skip
    base = x.untyped_storage().data_ptr()
    assert all(view.untyped_storage().data_ptr() == base for view in views)
    views[0].fill_(7)
    assert (x.cpu().flatten()[:4] == 7).all()


def test_out_arguments_are_resized(device_module):
    out = torch.empty(0, device="fake")
    torch.add(torch.ones(3, 3, device="fake"), 1, out=out)
    assert torch.equal(out.cpu(), torch.full((3, 3), 2.0))


def test_forgotten_move_to_the_device_is_an_error(device_module):
    x = torch.ones(2, 2, device="fake")
    for call in (
        lambda: x + torch.ones(2, 2),
        lambda: x @ torch.ones(2, 2),
        lambda: nn.functional.linear(x, torch.ones(2, 2)),
        lambda: x + torch.ones(2, 2, device="fake:1"),
        lambda: nn.functional.embedding(torch.zeros(2, dtype=torch.int64), x),
    ):
        with pytest.raises(RuntimeError, match="device"):
            call()
    assert ((x + torch.tensor(2.0)).cpu() == 3).all()


def test_failure_on_a_worker_is_raised_at_the_next_wait(device_module):
    table = torch.ones(4, 4, device="fake")
    index = torch.tensor([99], device="fake")
    nn.functional.embedding(index, table)
    with pytest.raises((RuntimeError, IndexError), match="range"):
        device_module.synchronize()
    device_module.synchronize()


def test_wrong_shapes_are_refused_at_once(device_module):
    with pytest.raises(RuntimeError, match="shapes|size"):
        torch.ones(2, 3, device="fake") @ torch.ones(2, 3, device="fake")


OPERATORS = {
    "linear": lambda f, g: f.linear(g(2, 5, 8), g(6, 8), g(6)),
    "conv2d": lambda f, g: f.conv2d(g(2, 4, 9, 9), g(8, 4, 3, 3), g(8), padding=1),
    "conv2d channels last": lambda f, g: f.conv2d(
        g(2, 4, 9, 9).to(memory_format=torch.channels_last), g(8, 4, 3, 3), stride=2
    ),
    "conv3d": lambda f, g: f.conv3d(g(1, 3, 4, 6, 6), g(5, 3, 1, 2, 2), stride=(1, 2, 2)),
    "group_norm": lambda f, g: f.group_norm(g(2, 8, 5, 5), 4, g(8), g(8)),
    "layer_norm": lambda f, g: f.layer_norm(g(2, 3, 16), (16,), g(16), g(16)),
    "rms_norm": lambda f, g: f.rms_norm(g(2, 3, 16), (16,), g(16)),
    "gelu": lambda f, g: f.gelu(g(4, 16), approximate="tanh"),
    "silu": lambda f, g: f.silu(g(4, 16)),
    "softmax": lambda f, g: f.softmax(g(4, 16), -1),
    "attention": lambda f, g: f.scaled_dot_product_attention(
        g(2, 4, 7, 16), g(2, 4, 9, 16), g(2, 4, 9, 16)
    ),
    "interpolate": lambda f, g: f.interpolate(g(1, 2, 4, 4), scale_factor=2.0, mode="nearest"),
    "bilinear": lambda f, g: f.interpolate(g(1, 2, 4, 4), size=(7, 7), mode="bilinear"),
    "pad": lambda f, g: f.pad(g(1, 2, 4), (1, 2)),
    "cat": lambda f, g: torch.cat([g(2, 3), g(2, 4)], 1),
    "stack": lambda f, g: torch.stack([g(2, 3), g(2, 3)], -1),
    "einsum": lambda f, g: torch.einsum("bij,bjk->bik", g(2, 3, 4), g(2, 4, 5)),
    "bmm": lambda f, g: torch.bmm(g(2, 3, 4), g(2, 4, 5)),
    "addmm": lambda f, g: torch.addmm(g(5), g(3, 4), g(4, 5)),
    "where": lambda f, g: torch.where(g(3, 4) > 0, g(3, 4), g(4)),
    "index": lambda f, g: g(5, 4)[[0, 3, 1]],
    "mask": lambda f, g: (lambda x: x[x > 0])(g(5, 4)),
    "assign": lambda f, g: g(5, 4).index_put((torch.tensor([1, 2]),), g(2, 4)),
    "cumsum": lambda f, g: g(3, 4).cumsum(1),
    "mean": lambda f, g: g(3, 4).mean(1, keepdim=True),
    "var": lambda f, g: g(3, 4).var(1),
    "topk": lambda f, g: g(3, 9).topk(3)[0],
    "sort": lambda f, g: g(3, 9).sort(descending=True)[1],
    "cast": lambda f, g: g(3, 4).half().float().to(torch.float64).to(torch.int64),
    "foreach": lambda f, g: torch.cat(torch._foreach_add([g(2), g(3)], 1.0)),
    "repeat": lambda f, g: g(2, 3).repeat_interleave(2, 0).repeat(1, 2),
    "flip and roll": lambda f, g: g(3, 4).flip(0).roll(1, 1),
    "clamp, pow, rsqrt": lambda f, g: g(3, 4).clamp(min=0.1).pow(2).rsqrt(),
}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("name", OPERATORS)
def test_operator_gives_the_bits_of_the_cpu(device_module, name, dtype):
    def run(device: str) -> torch.Tensor:
        torch.manual_seed(0)
        return OPERATORS[name](nn.functional, lambda *size: torch.randn(size).to(device, dtype))

    assert torch.equal(run("fake").cpu(), run("cpu"))
    assert device_module.sync_fallbacks() == {}


def test_rotary_operators_give_the_bits_of_the_cpu(device_module):
    def run(device: str) -> torch.Tensor:
        torch.manual_seed(0)
        angles = torch.outer(torch.arange(6, device=device), torch.rand(4).to(device))
        turns = torch.polar(torch.ones_like(angles), angles)
        x = torch.randn(2, 6, 8).to(device)
        turned = torch.view_as_real(torch.view_as_complex(x.view(2, 6, 4, 2)) * turns).flatten(2)
        return turned + torch.cat([angles.cos(), angles.sin()], -1)

    assert torch.equal(run("fake").cpu(), run("cpu"))


def test_random_numbers_are_those_of_the_cpu(device_module):
    torch.manual_seed(3)
    expected = [torch.randn(5), torch.rand(5), torch.randint(9, (5,)), torch.randperm(6)]
    torch.manual_seed(3)
    options = {"device": "fake"}
    actual = [
        torch.randn(5, **options), torch.rand(5, **options), torch.randint(9, (5,), **options),
        torch.randperm(6, **options),
    ]  # fmt: skip
    assert all(torch.equal(a.cpu(), e) for a, e in zip(actual, expected, strict=True))
    generator = torch.Generator().manual_seed(1)
    assert torch.equal(
        torch.randn(4, generator=torch.Generator().manual_seed(1)),
        torch.empty(4, device="fake").normal_(generator=generator).cpu(),
    )


def test_autocast_picks_lower_precision_for_matmul_and_fp32_for_norms(device_module):
    x, w = torch.randn(4, 8, device="fake"), torch.randn(8, 8, device="fake")
    with torch.autocast("fake", dtype=torch.bfloat16):
        y = nn.functional.linear(x, w)
        assert y.dtype == torch.bfloat16
        assert nn.functional.layer_norm(y, (8,)).dtype == torch.float32
        assert nn.functional.softmax(y, -1).dtype == torch.float32
    expected = nn.functional.linear(x.cpu().bfloat16(), w.cpu().bfloat16())
    assert torch.equal(y.cpu(), expected)


def test_parameters_move_back_and_forth_and_survive_saving(device_module, tmp_path):
    model = nn.Linear(4, 4)
    expected = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    model.to("fake")
    torch.save(model.state_dict(), tmp_path / "state.pt")
    loaded = torch.load(tmp_path / "state.pt", map_location="fake")
    model.cpu()
    for name, tensor in expected.items():
        assert torch.equal(model.state_dict()[name], tensor)
        assert loaded[name].device.type == "fake" and torch.equal(loaded[name].cpu(), tensor)


def test_inference_mode_runs(device_module):
    model = nn.Sequential(nn.Linear(4, 4), nn.ReLU(inplace=True)).to("fake")
    with torch.inference_mode():
        y = model(torch.ones(2, 4, device="fake"))
        y.mul_(2)
    assert y.cpu().shape == (2, 4)

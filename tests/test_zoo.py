"""The toy models must be fit to test with: alive, fast, and with no weight that does not matter."""

import pytest
import torch

from blockswap.bench import zoo
from blockswap.bench.zoo_configs import CONFIGS

# Dead by the model's own design: the last block's text stream is not read (queries included).
DEAD = {
    "qwen": (
        "transformer_blocks.2.attn.add_q_proj.",
        "transformer_blocks.2.attn.norm_added_q.",
        "transformer_blocks.2.attn.to_add_out.",
        "transformer_blocks.2.txt_mlp.",
    )
}


@pytest.mark.parametrize("kind", zoo.KINDS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@torch.no_grad()
def test_toy_model_gives_finite_output_that_does_not_vanish(kind, dtype):
    model = zoo.build(kind, dtype=dtype)
    out = model(**zoo.make_inputs(kind, model, dtype=dtype))[0]
    assert out.dtype == dtype
    assert out.isfinite().all()
    assert 0.1 < out.float().std() < 10


@pytest.mark.parametrize("kind", zoo.KINDS)
def test_output_depends_on_every_parameter(kind):
    model = zoo.build(kind).requires_grad_(True)
    model(**zoo.make_inputs(kind, model))[0].square().mean().backward()
    dead = {
        n for n, p in model.named_parameters() if p.grad is None or not p.grad.abs().max() > 1e-6
    }
    assert dead == {n for n, _ in model.named_parameters() if n.startswith(DEAD.get(kind, "?"))}


@pytest.mark.parametrize("kind", zoo.KINDS)
def test_same_seed_gives_the_same_weights_and_another_seed_others(kind):
    first, again, other = (zoo.build(kind, dtype=torch.bfloat16, seed=seed) for seed in (3, 3, 4))
    pairs = list(zip(first.parameters(), again.parameters(), other.parameters(), strict=True))
    assert all(torch.equal(a, b) for a, b, _ in pairs)
    assert not any(torch.equal(a, c) for a, _, c in pairs)
    a, b = (zoo.make_inputs(kind, first, seed=5), zoo.make_inputs(kind, first, seed=5))
    assert torch.equal(a["encoder_hidden_states"], b["encoder_hidden_states"])


def test_wan_keeps_three_fp32_tensors_per_block():
    model = zoo.build("wan", dtype=torch.bfloat16)
    for block in model.blocks:
        assert sum(p.dtype == torch.float32 for p in block.parameters()) == 3


def test_overrides_change_the_configuration():
    assert len(zoo.build("flux", num_layers=5).transformer_blocks) == 5


@pytest.mark.parametrize(
    ("kind", "key", "shape"),
    [
        ("flux", "hidden_states", (1, 4096, 64)),
        ("flux", "encoder_hidden_states", (1, 512, 4096)),
        ("sdxl", "sample", (2, 4, 128, 128)),
        ("wan", "hidden_states", (1, 16, 21, 60, 104)),
        ("wan", "encoder_hidden_states", (1, 512, 4096)),
        ("qwen", "hidden_states", (1, 4096, 64)),
        ("qwen", "encoder_hidden_states", (1, 128, 3584)),
    ],
)
def test_full_size_inputs_have_the_shapes_of_the_benchmarks(kind, key, shape):
    config = CONFIGS[kind, "full"]()
    assert zoo.make_inputs(kind, config, dtype=torch.bfloat16)[key].shape == shape

"""Streams a small FLUX transformer with random weights and shows that no bit changes.

`python examples/stream_a_model.py` runs anywhere; with real weights only the first line of `main`
changes: `FluxTransformer2DModel.from_pretrained(...)`.
"""

from __future__ import annotations

import torch
from diffusers import FluxTransformer2DModel

import blockswap


def main() -> None:
    torch.manual_seed(0)
    model = FluxTransformer2DModel(
        in_channels=4,
        num_layers=2,
        num_single_layers=2,
        attention_head_dim=16,
        num_attention_heads=4,
        joint_attention_dim=32,
        pooled_projection_dim=32,
        axes_dims_rope=(4, 4, 8),
    )
    model.requires_grad_(False).eval()
    inputs = {
        "hidden_states": torch.randn(1, 16, 4),
        "encoder_hidden_states": torch.randn(1, 8, 32),
        "pooled_projections": torch.randn(1, 32),
        "timestep": torch.tensor([0.5]),
        "img_ids": torch.zeros(16, 3),
        "txt_ids": torch.zeros(8, 3),
        "return_dict": False,
    }
    before = model(**inputs)[0]
    with blockswap.attach(model, device="cpu", offload=3) as session:  # three blocks stream
        outputs = [model(**inputs)[0] for _ in range(8)]
        print(session.report())
    print("identical:", all(torch.equal(output, before) for output in outputs))


if __name__ == "__main__":
    main()

"""Small models of transformers' real classes with random weights."""

from __future__ import annotations

from typing import Any

import torch

TEXT = {
    "hidden_size": 128,
    "intermediate_size": 256,
    "num_hidden_layers": 6,
    "num_attention_heads": 4,
    "vocab_size": 256,
}
T5 = {
    "d_model": 128,
    "d_ff": 256,
    "num_layers": 6,
    "num_heads": 4,
    "d_kv": 32,
    "vocab_size": 256,
    "feed_forward_proj": "gated-gelu",
}
DECODER = TEXT | {"num_key_value_heads": 2, "bos_token_id": 1, "eos_token_id": 2}
MODELS = ("t5", "umt5", "clip", "llama", "qwen2", "qwen2.5-vl")
WRITES = ("llama", "qwen2", "qwen2.5-vl")  # text, token by token


def make(kind: str) -> Any:
    """Return one of `MODELS`."""
    import transformers as t

    torch.manual_seed(0)
    makers = {
        "t5": lambda: t.T5EncoderModel(t.T5Config(**T5)),
        "umt5": lambda: t.UMT5EncoderModel(t.UMT5Config(**T5)),
        "clip": lambda: t.CLIPTextModel(t.CLIPTextConfig(**TEXT, bos_token_id=1, eos_token_id=2)),
        "llama": lambda: t.LlamaForCausalLM(t.LlamaConfig(**DECODER)),
        "qwen2": lambda: t.Qwen2ForCausalLM(t.Qwen2Config(**DECODER)),
        "qwen2.5-vl": lambda: t.Qwen2_5_VLForConditionalGeneration(_qwen_vl(t)),
    }
    return makers[kind]().eval().requires_grad_(False)


def _qwen_vl(t: Any) -> Any:
    rope = {"type": "mrope", "mrope_section": [4, 6, 6]}
    vision = {"depth": 2, "hidden_size": 64, "intermediate_size": 128, "num_heads": 4}
    return t.Qwen2_5_VLConfig(
        text_config=DECODER | {"rope_scaling": rope},
        vision_config=vision | {"out_hidden_size": 128},
        bos_token_id=1,
        eos_token_id=2,
    )


def tokens() -> torch.Tensor:
    """Return int64 [1, 24]."""
    return torch.randint(3, 255, (1, 24), generator=torch.Generator().manual_seed(1))

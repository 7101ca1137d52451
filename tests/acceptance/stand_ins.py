"""Local folders in the place of the hub repositories that most tiny pipelines are made from.

transformers looks for a folder of that name where it runs before it asks the hub: nothing is
patched, nothing is downloaded. Sizes are those that the tests' models expect; weights are random.
"""

from __future__ import annotations

from pathlib import Path

import torch

from blockswap.demo.tokenizers import save_clip_tokenizer, save_t5_tokenizer

NUM_CLIP_TOKENS = 1000
NUM_T5_TOKENS = 1103
CLIP_TOKENIZERS = ("hf-internal-testing/tiny-random-clip",)
CLIP_MODELS = (
    "hf-internal-testing/tiny-sd3-text_encoder",
    "hf-internal-testing/tiny-sd3-text_encoder-2",
)
CLIP_BOTH = ("peft-internal-testing/tiny-clip-text-2",)
T5 = "hf-internal-testing/tiny-random-t5"


def make_stand_ins(folder: Path) -> None:
    """Make all of them under the folder that the tests run in."""
    torch.manual_seed(0)
    for name in CLIP_TOKENIZERS + CLIP_BOTH:
        save_clip_tokenizer(folder / name, NUM_CLIP_TOKENS)
    for name in CLIP_MODELS + CLIP_BOTH:
        _save_clip_text_model(folder / name)
    save_t5_tokenizer(folder / T5)
    _save_t5_encoder(folder / T5)


def _save_clip_text_model(folder: Path) -> None:
    from transformers import CLIPTextConfig, CLIPTextModelWithProjection

    config = CLIPTextConfig(
        vocab_size=NUM_CLIP_TOKENS,
        hidden_size=32,
        intermediate_size=37,
        projection_dim=32,
        num_hidden_layers=5,
        num_attention_heads=4,
        bos_token_id=NUM_CLIP_TOKENS - 2,
        eos_token_id=NUM_CLIP_TOKENS - 1,
        pad_token_id=NUM_CLIP_TOKENS - 1,
    )
    CLIPTextModelWithProjection(config).save_pretrained(folder)


def _save_t5_encoder(folder: Path) -> None:
    from transformers import T5Config, T5EncoderModel

    config = T5Config(
        vocab_size=NUM_T5_TOKENS, d_model=32, d_kv=8, d_ff=37, num_layers=5, num_heads=4
    )
    T5EncoderModel(config).save_pretrained(folder)

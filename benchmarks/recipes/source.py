"""Where a recipe's components come from: random weights, made-up tokenizers."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import nn

from blockswap.demo.weights import default_dtype, random_module

# What a word tokenizer must split off, so that a template counts about as many tokens as in the
# model's own tokenizer.
WORDS_AND_MARKS = r"<\|[a-z_]+\|>|\n+|\w+|[^\w\s]"


@dataclass(frozen=True)
class Source:
    """Makes components in one size on one device.

    On the meta device they have shapes and no memory.

    Attributes:
        full: in the published size; else in one that a CPU runs in seconds.
        device: where weights are drawn, and stay.
        folder: for the files of tokenizers, which are read once.
    """

    full: bool
    device: torch.device
    folder: Path
    _seeds: Iterator[int] = field(default_factory=itertools.count, repr=False)

    @property
    def dtype(self) -> torch.dtype:
        """Return what the weights are: on a CPU, bf16 would take the time of the test."""
        return torch.bfloat16 if self.full else torch.float32

    def module(self, make: Callable[[], nn.Module]) -> nn.Module:
        """Return what ``make`` builds, weights drawn; fp32 where a checkpoint would load so."""
        if self.device.type == "meta":
            with default_dtype(self.dtype), self.device:
                return make().eval()
        module = random_module(make, self.dtype, self.device, next(self._seeds))
        # Of diffusers' models; those of transformers name what fp16 needs and bf16 does not.
        is_diffusers = type(module).__module__.startswith("diffusers.")
        fp32 = set(getattr(module, "_keep_in_fp32_modules", None) or ()) if is_diffusers else set()
        for name, parameter in module.named_parameters():
            if fp32 & set(name.split(".")):
                parameter.data = parameter.detach().float()
        return module

    def matrix(self, rows: int, columns: int) -> torch.Tensor:
        """Return a matrix as an adapter's file holds it: a unit input gives a unit output."""
        if self.device.type == "meta":
            return torch.empty(rows, columns, dtype=self.dtype, device=self.device)
        generator = torch.Generator(self.device).manual_seed(next(self._seeds))
        made = torch.empty(rows, columns, dtype=self.dtype, device=self.device)
        return made.normal_(std=columns**-0.5, generator=generator)


def word_tokenizer(text: str, num_tokens: int) -> Any:
    """Return a tokenizer whose words are those of a text; all others are one and the same token.

    Stands in for a vocabulary that is only to be had by a download.

    Args:
        text: a prompt template, and the prompt.
        num_tokens: the size of the text encoder's vocabulary, which bounds the tokens' ids.
    """
    import re

    from tokenizers import Regex, Tokenizer, pre_tokenizers
    from tokenizers.models import WordLevel
    from transformers import PreTrainedTokenizerFast

    words = ["<pad>", "<unk>", *dict.fromkeys(re.findall(WORDS_AND_MARKS, text))]
    if len(words) > num_tokens:
        raise ValueError(f"{len(words)} words, but the vocabulary has {num_tokens}")
    tokenizer = Tokenizer(WordLevel({w: i for i, w in enumerate(words)}, unk_token="<unk>"))
    split = pre_tokenizers.Split(Regex(WORDS_AND_MARKS), behavior="removed", invert=True)
    tokenizer.pre_tokenizer = split
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, pad_token="<pad>", unk_token="<unk>", padding_side="right"
    )


def num_words(text: str) -> int:
    """Return how many tokens a `word_tokenizer` makes of a text."""
    import re

    return len(re.findall(WORDS_AND_MARKS, text))

"""Real tokenizers without a download: vocabularies made up here, read back by their own classes.

CLIP: byte-level BPE, 256 bytes, the same 256 as word ends, then merges of letters (pairs, triples,
fours) until the vocabulary is full, then begin and end of text; 49408 tokens give CLIP's own size.
T5: Unigram over single characters and frequent English pieces.
"""

from __future__ import annotations

import itertools
import json
import string
from pathlib import Path
from typing import Any

BEGIN, END = "<|startoftext|>", "<|endoftext|>"
NUM_CLIP_TOKENS = 49408
T5_WORDS = """
the of and in on with at to by from over under fox fern forest river mountain sea sky sun light moon
star rain snow cloud cat dog bird fish horse ship house tree flower stone fire water red green blue
golden white black quiet bright dark soft small old photo painting walking running standing sitting
"""


def save_clip_tokenizer(folder: Path, num_tokens: int = NUM_CLIP_TOKENS) -> Any:
    """Writes vocab.json and merges.txt into `folder` and reads them as a `CLIPTokenizer`.

    Args:
        folder: where the files go; made when missing.
        num_tokens: size of the vocabulary, 514 to 49408.
    """
    from transformers import CLIPTokenizer

    tokens, merges = clip_vocabulary(num_tokens)
    folder.mkdir(parents=True, exist_ok=True)
    vocabulary = {token: index for index, token in enumerate(tokens)}
    (folder / "vocab.json").write_text(json.dumps(vocabulary, ensure_ascii=False), "utf-8")
    (folder / "merges.txt").write_text("\n".join(["#version: 0.2", *merges, ""]), "utf-8")
    specials = {"bos_token": BEGIN, "eos_token": END, "unk_token": END, "pad_token": END}
    config = {"tokenizer_class": "CLIPTokenizer", "model_max_length": 77, **specials}
    (folder / "tokenizer_config.json").write_text(json.dumps(config), "utf-8")
    return CLIPTokenizer.from_pretrained(str(folder), local_files_only=True)


def clip_vocabulary(num_tokens: int) -> tuple[list[str], list[str]]:
    """The tokens in the order of their ids, the two specials last, and the merges."""
    letters = string.ascii_lowercase
    pairs = [(a, b) for a, b in itertools.product(letters, letters)]
    triples = [(a + b, c) for (a, b), c in itertools.product(pairs, letters)]
    fours = [(a + b, c + d) for (a, b), (c, d) in itertools.product(pairs, pairs)]
    bytes_ = _byte_letters()
    tokens = bytes_ + [letter + "</w>" for letter in bytes_]
    num_merges = num_tokens - len(tokens) - 2
    merges: list[str] = []
    for left, right in itertools.chain(pairs, triples, fours):
        for end in ("", "</w>"):
            if len(merges) < num_merges:
                merges.append(f"{left} {right}{end}")
                tokens.append(f"{left}{right}{end}")
    return [*tokens, BEGIN, END], merges


def save_t5_tokenizer(folder: Path, max_length: int = 512) -> Any:
    """Writes tokenizer.json into `folder` and reads it as a `T5TokenizerFast`."""
    from tokenizers import Tokenizer, decoders, normalizers, pre_tokenizers, processors
    from tokenizers.models import Unigram
    from transformers import T5TokenizerFast

    vocabulary = [("<pad>", 0.0), ("</s>", 0.0), ("<unk>", 0.0), ("▁", -2.0)]
    vocabulary += [(letter, -8.0) for letter in string.digits + string.ascii_letters + ",.;:!?'-"]
    vocabulary += [("▁" + word, -4.0) for word in T5_WORDS.split()]
    tokenizer = Tokenizer(Unigram(vocabulary, unk_id=2, byte_fallback=False))
    tokenizer.normalizer = normalizers.NFKC()
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace(replacement="▁", prepend_scheme="always")
    tokenizer.decoder = decoders.Metaspace(replacement="▁", prepend_scheme="always")
    tokenizer.post_processor = processors.TemplateProcessing(
        single=["$A", "</s>"], pair=["$A", "</s>", "$B", "</s>"], special_tokens=[("</s>", 1)]
    )
    folder.mkdir(parents=True, exist_ok=True)
    tokenizer.save(str(folder / "tokenizer.json"))
    config = {
        "tokenizer_class": "T5TokenizerFast",
        "model_max_length": max_length,
        "eos_token": "</s>",
        "unk_token": "<unk>",
        "pad_token": "<pad>",
        "extra_ids": 0,
    }
    (folder / "tokenizer_config.json").write_text(json.dumps(config), "utf-8")
    return T5TokenizerFast.from_pretrained(str(folder), local_files_only=True)


def _byte_letters() -> list[str]:
    """One printable letter per byte: GPT-2's table, which CLIP's files are written in."""
    printable = [*range(33, 127), *range(161, 173), *range(174, 256)]
    hidden = [byte for byte in range(256) if byte not in printable]
    letters = {byte: chr(byte) for byte in printable}
    letters |= {byte: chr(256 + index) for index, byte in enumerate(hidden)}
    return [letters[byte] for byte in (*printable, *hidden)]

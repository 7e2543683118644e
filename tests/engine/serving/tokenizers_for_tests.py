"""Tokenizers of the kinds that models have: byte-level, SentencePiece's two ways to decode, words."""

from __future__ import annotations

from pathlib import Path

from tests.tiny_tokenizer import make_tiny_tokenizer
from tokenizers import Tokenizer, decoders, models
from transformers import PreTrainedTokenizerBase, PreTrainedTokenizerFast

import moesaic
from moesaic.models.tokenizer import load_folder

__all__ = ["demo_tokenizer", "sentencepiece_like", "tiny_tokenizer", "word_piece"]

WORDS = ["▁", "▁▁", "▁Hello", "▁world", "wor", "ld", "!", "▁é", "中", "<", "0x41", "\n", "�"]


def demo_tokenizer() -> PreTrainedTokenizerBase:
    """That of the built-in model: byte-level BPE."""
    return load_folder(Path(moesaic.__file__).parent / "demo" / "tokenizer")


def tiny_tokenizer() -> PreTrainedTokenizerBase:
    """A token for every byte."""
    return make_tiny_tokenizer()


def sentencepiece_like(decoder: str) -> PreTrainedTokenizerFast:
    """Ids 0 to 2 are special, then the 256 bytes, then words.

    Args:
        decoder: "strip": as llama 2 in GGUF; "keep": as Gemma; "metaspace": the step of that name.
    """
    names = ["<unk>", "<s>", "</s>", *(f"<0x{byte:02X}>" for byte in range(256)), *WORDS]
    ids = {name: i for i, name in enumerate(names)}
    tokenizer = Tokenizer(models.BPE(ids, [], unk_token="<unk>", byte_fallback=True))
    steps = [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()]
    if decoder == "strip":
        steps.append(decoders.Strip(" ", 1, 0))
    if decoder == "metaspace":
        steps = [decoders.ByteFallback(), decoders.Metaspace()]
    tokenizer.decoder = decoders.Sequence(steps)
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, unk_token="<unk>", bos_token="<s>", eos_token="</s>")


def word_piece() -> PreTrainedTokenizerFast:
    """Words with a space between; those with ## go on."""
    names = ["[UNK]", "[SEP]", "hello", "##s", "world", "a"]
    tokenizer = Tokenizer(models.WordPiece({name: i for i, name in enumerate(names)}, unk_token="[UNK]"))
    tokenizer.decoder = decoders.WordPiece(cleanup=False)
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, unk_token="[UNK]", eos_token="[SEP]")

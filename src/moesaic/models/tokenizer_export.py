"""A tokenizer folder as the `tokenizer.*` keys of a GGUF, so that the file can be used alone, by llama.cpp too.

Only byte-level BPE tokenizers in the form of a tokenizer.json are written; others stay in their folder. It does not
know which model the tokenizer belongs to.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
from transformers import PreTrainedTokenizerBase

from moesaic.errors import TokenizerError
from moesaic.models.pretokenizers import name_of_patterns
from moesaic.models.tokenizer import load_folder

__all__ = ["tokenizer_metadata"]

_NORMAL, _CONTROL, _USER_DEFINED, _UNUSED = 1, 3, 4, 5


def tokenizer_metadata(folder: Path, vocab_size: int) -> dict[str, Any]:
    """Key-values of the tokenizer in `folder`, padded to the `vocab_size` rows of the embedding.

    Raises:
        TokenizerError: there is no tokenizer, it is no byte-level BPE, it splits text by a rule that GGUF has no name
            for, or it has more tokens than the embedding has rows.
    """
    tokenizer = load_folder(folder)
    backend = getattr(tokenizer, "backend_tokenizer", None)
    if backend is None:
        raise TokenizerError(f"{folder}: has no tokenizer.json: only such tokenizers can be written into a GGUF.")
    description = json.loads(backend.to_str())
    model = description["model"]
    tokens, types = _tokens(folder, tokenizer, description, vocab_size)
    values: dict[str, Any] = {
        "tokenizer.ggml.model": "gpt2",
        "tokenizer.ggml.pre": _rule_name(folder, description),
        "tokenizer.ggml.tokens": tokens,
        "tokenizer.ggml.token_type": np.array(types, np.int32),  # llama.cpp refuses other widths
        "tokenizer.ggml.merges": [" ".join(pair) if isinstance(pair, list) else pair for pair in model["merges"]],
    }
    for key in ("bos", "eos", "unk", "pad"):
        number = getattr(tokenizer, f"{key}_token_id")
        if number is not None:
            name = {"unk": "unknown", "pad": "padding"}.get(key, key)
            values[f"tokenizer.ggml.{name}_token_id"] = number
    probe = [None, *tokenizer("a")["input_ids"]]
    for key, place in (("bos", min(1, len(probe) - 1)), ("eos", -1)):
        number = getattr(tokenizer, f"{key}_token_id")
        values[f"tokenizer.ggml.add_{key}_token"] = number is not None and probe[place] == number
    if isinstance(tokenizer.chat_template, str):
        values["tokenizer.chat_template"] = tokenizer.chat_template
    return values


def _tokens(
    folder: Path, tokenizer: PreTrainedTokenizerBase, description: dict[str, Any], vocab_size: int
) -> tuple[list[str], list[int]]:
    """Every token by number and its type; rows of the embedding without a token are marked unused."""
    added = {entry["id"]: entry for entry in description["added_tokens"]}
    by_number = {number: token for token, number in tokenizer.get_vocab().items()}
    if by_number and max(by_number) >= vocab_size:
        raise TokenizerError(f"{folder}: has token {max(by_number)}, but the embedding has only {vocab_size} rows.")
    tokens, types = [], []
    for number in range(vocab_size):
        tokens.append(by_number.get(number, f"[PAD{number}]"))
        if number in added:
            types.append(_CONTROL if added[number]["special"] else _USER_DEFINED)
        else:
            types.append(_NORMAL if number in by_number else _UNUSED)
    return tokens, types


def _rule_name(folder: Path, description: dict[str, Any]) -> str:
    """The name of the rule by which text is split; byte-level BPE only."""
    pre = description.get("pre_tokenizer") or {}
    steps = pre.get("pretokenizers", [pre])
    is_byte_level = bool(steps) and steps[-1].get("type") == "ByteLevel"
    if description["model"].get("type") != "BPE" or not is_byte_level:
        raise TokenizerError(f"{folder}: is no byte-level BPE tokenizer: only these can be written into a GGUF.")
    patterns = tuple(step.get("pattern", {}).get("Regex", "") for step in steps[:-1])
    normalizer = description.get("normalizer") or {}
    name = name_of_patterns(patterns, normalizer.get("type") == "NFC", bool(description["model"].get("ignore_merges")))
    if name is None and not patterns and steps[-1].get("use_regex"):
        name = "gpt-2"
    if name is None:
        raise TokenizerError(f"{folder}: splits text by a rule that GGUF has no name for here: {patterns}.")
    return name

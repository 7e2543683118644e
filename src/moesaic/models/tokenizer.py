"""The tokenizer of a model: from its folder if there is one, otherwise rebuilt from the GGUF's vocabulary.

A GGUF holds tokens, merges or scores, special ids and the chat template, but not everything that a tokenizer.json says;
where the result may differ from the original, that is said with the reason. Vocabularies and templates are an
attacker's input: no code is run, templates only in the sandbox of transformers.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, processors
from transformers import AutoTokenizer, PreTrainedTokenizerBase, PreTrainedTokenizerFast

from moesaic.errors import TokenizerError
from moesaic.models.pretokenizers import PRE_TOKENIZERS
from moesaic.weights import Checkpoint

__all__ = ["LoadedTokenizer", "load_folder", "load_tokenizer"]

# Token types of the GGUF specification.
_NORMAL, _UNKNOWN, _CONTROL, _USER_DEFINED, _UNUSED, _BYTE = 1, 2, 3, 4, 5, 6
_SPECIAL_TOKENS = {
    "bos_token": "bos",
    "eos_token": "eos",
    "unk_token": "unknown",
    "sep_token": "seperator",  # spelt so in the specification
    "pad_token": "padding",
    "mask_token": "mask",
    "cls_token": "cls",
}
_FILES = ("tokenizer.json", "tokenizer_config.json", "tokenizer.model", "vocab.json")
_NUM_COMPARED = 200
_ADVICE = "name the model's own tokenizer with --tokenizer FOLDER"


@dataclass(frozen=True, slots=True)
class LoadedTokenizer:
    """A tokenizer and what is known of its fidelity.

    Attributes:
        tokenizer: ready for use, chat template included.
        inexact: why it may split some texts in another way than the original; None if it is the original or equal.
    """

    tokenizer: PreTrainedTokenizerBase
    inexact: str | None = None


def load_tokenizer(checkpoint: Checkpoint, folder: Path | None = None) -> LoadedTokenizer:
    """The tokenizer from `folder`, or, without one, rebuilt from a GGUF checkpoint.

    Raises:
        TokenizerError: the folder holds none that can be used without running its code, the GGUF's vocabulary is
            damaged or of an unknown kind, or there is neither.
    """
    if folder is not None:
        tokenizer = load_folder(folder)
        _check_same_vocabulary(tokenizer, folder, checkpoint)
        return LoadedTokenizer(tokenizer)
    if checkpoint.kind != "gguf":
        raise TokenizerError(f"{checkpoint.path}: has no tokenizer files: {_ADVICE}.")
    return _GgufVocabulary(checkpoint).build()


def load_folder(folder: Path) -> PreTrainedTokenizerBase:
    """The tokenizer of a folder; TokenizerError if there is none that works without running the folder's code."""
    if not folder.is_dir():
        raise TokenizerError(f"{folder}: no such folder: expected one with {' or '.join(_FILES)}.")
    if not any((folder / name).is_file() for name in _FILES):  # transformers would make an empty one
        raise TokenizerError(f"{folder}: holds no tokenizer: expected {' or '.join(_FILES)}.")
    try:
        tokenizer = AutoTokenizer.from_pretrained(folder, local_files_only=True, trust_remote_code=False)
    except Exception as error:  # the library raises what its parsers raise, down to the base class
        raise TokenizerError(
            f"{folder}: holds no tokenizer that can be used: {type(error).__name__}: {error}"
        ) from error
    assert isinstance(tokenizer, PreTrainedTokenizerBase)
    return tokenizer


def _check_same_vocabulary(tokenizer: PreTrainedTokenizerBase, folder: Path, checkpoint: Checkpoint) -> None:
    """Refuse the tokenizer of another model, as far as a GGUF tells: most tokens must be those of the file."""
    tokens = checkpoint.metadata.get("tokenizer.ggml.tokens")
    if not isinstance(tokens, tuple) or not tokens:
        return
    num_common = min(len(tokens), len(tokenizer))  # rows behind the tokens are padding
    numbers = range(0, num_common, max(1, num_common // _NUM_COMPARED))
    same = sum(tokenizer.convert_ids_to_tokens(number) == tokens[number] for number in numbers)
    if 2 * same < len(numbers) or len(tokenizer) > 2 * len(tokens):
        raise TokenizerError(
            f"{folder}: is the tokenizer of another model: {same} of {len(numbers)} tokens looked at are those of "
            f"{checkpoint.path.name}; name the right folder, or none to rebuild the tokenizer from the GGUF."
        )


class _GgufVocabulary:
    """Builds a tokenizer from the `tokenizer.*` keys of one GGUF file."""

    def __init__(self, checkpoint: Checkpoint) -> None:
        self._path = checkpoint.path
        self._metadata: Mapping[str, object] = checkpoint.metadata
        self._tokens = self._strings("tokens")
        embedding = checkpoint.tensors.get("token_embd.weight")
        if embedding is not None and len(self._tokens) > embedding.shape[0]:
            raise self._error(f"{len(self._tokens)} tokens for an embedding of {embedding.shape[0]} rows")
        self._types = self._numbers("token_type", default=_NORMAL)
        self._reasons: list[str] = []
        self._ids: dict[str, int] = {}
        for index, token in enumerate(self._tokens):
            self._ids.setdefault(token, index)
        if len(self._ids) != len(self._tokens):
            self._reasons.append(f"{len(self._tokens) - len(self._ids)} tokens occur twice in its vocabulary")

    def build(self) -> LoadedTokenizer:
        """The tokenizer, with special tokens and chat template."""
        kind = self._metadata.get("tokenizer.ggml.model")
        builders = {"gpt2": self._byte_level_bpe, "llama": self._sentencepiece_bpe}
        if kind not in builders:
            raise self._error(f"its vocabulary is of the kind {kind!r}, expected one of {', '.join(builders)}")
        try:
            tokenizer = builders[str(kind)]()
            self._add_special(tokenizer)
            special = {name: self._tokens[number] for name in _SPECIAL_TOKENS if (number := self._id(name)) is not None}
            self._add_template(tokenizer, str(kind), special)
        except TokenizerError:
            raise
        except Exception as error:  # the tokenizers library raises plain Exception for bad vocabularies
            raise self._error(f"its vocabulary is refused: {error}") from error
        template = self._metadata.get("tokenizer.chat_template")
        wrapped = PreTrainedTokenizerFast(
            tokenizer_object=tokenizer,
            chat_template=template if isinstance(template, str) else None,
            clean_up_tokenization_spaces=False,
            **special,
        )
        inexact = "; ".join(self._reasons)
        note = f"{self._path.name}: the tokenizer was rebuilt from the GGUF and may be inexact: {inexact}; {_ADVICE}."
        return LoadedTokenizer(wrapped, note if inexact else None)

    def _byte_level_bpe(self) -> Tokenizer:
        name = self._metadata.get("tokenizer.ggml.pre")
        rule = PRE_TOKENIZERS.get(str(name))
        if rule is None and name not in (None, "default"):
            raise self._error(f"it splits text by the rule {name!r}, which is not known here")
        if rule is None:
            rule = PRE_TOKENIZERS["gpt-2"]
            self._reasons.append("the file does not say how text is split")
        elif not rule.exact:
            self._reasons.append(f"the format does not hold all rules of '{name}' tokenizers")
        merges = [self._merge(text) for text in self._strings("merges")]
        tokenizer = Tokenizer(models.BPE(self._ids, merges, ignore_merges=rule.ignore_merges, fuse_unk=False))
        splits = [pre_tokenizers.Split(Regex(pattern), "isolated") for pattern in rule.patterns]
        byte_level = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
        tokenizer.pre_tokenizer = pre_tokenizers.Sequence([*splits, byte_level])
        if rule.nfc:
            tokenizer.normalizer = normalizers.NFC()
        tokenizer.decoder = decoders.ByteLevel()
        return tokenizer

    def _sentencepiece_bpe(self) -> Tokenizer:
        """SentencePiece's BPE: the best-scored pair merges first, unknown characters fall back to bytes."""
        scores = self._numbers("scores", default=0.0)
        unknown = self._id("unk_token")
        tokenizer = Tokenizer(
            models.BPE(
                self._ids,
                self._merges_by_score(scores),
                unk_token=None if unknown is None else self._tokens[unknown],
                fuse_unk=True,
                byte_fallback=_BYTE in self._types,
            )
        )
        prefix = self._metadata.get("tokenizer.ggml.add_space_prefix", True) is True
        steps = [normalizers.Prepend("▁")] if prefix else []
        tokenizer.normalizer = normalizers.Sequence([*steps, normalizers.Replace(" ", "▁")])
        strip = [decoders.Strip(" ", 1, 0)] if prefix else []
        tokenizer.decoder = decoders.Sequence(
            [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), *strip]
        )
        self._reasons.append("spaces beside special tokens may be treated otherwise")
        return tokenizer

    def _merges_by_score(self, scores: list[float]) -> list[tuple[str, str]]:
        """Every way to make a token of two others, the best token first, then the better left part."""
        merges: list[tuple[float, int, int, tuple[str, str]]] = []
        for index, token in enumerate(self._tokens):
            if self._types[index] != _NORMAL:
                continue
            for cut in range(1, len(token)):
                left, right = self._ids.get(token[:cut]), self._ids.get(token[cut:])
                if left is not None and right is not None:
                    merges.append((-scores[index], left, right, (token[:cut], token[cut:])))
        return [pair for *_, pair in sorted(merges)]

    def _merge(self, text: str) -> tuple[str, str]:
        left, _, right = text.partition(" ")
        if not left or not right:
            raise self._error(f"{text[:40]!r} is no merge, expected two tokens with a space between")
        return left, right

    def _add_special(self, tokenizer: Tokenizer) -> None:
        """Tokens that are found in text as they stand; control tokens are left out of decoded answers."""
        for kind, special in ((_CONTROL, True), (_USER_DEFINED, False)):
            tokens = [token for token, number in self._ids.items() if self._types[number] == kind and token]
            added = [AddedToken(token, normalized=False, special=special) for token in tokens]
            tokenizer.add_special_tokens(added) if special else tokenizer.add_tokens(added)

    def _add_template(self, tokenizer: Tokenizer, kind: str, special: Mapping[str, str]) -> None:
        """Put the begin and end token around a text, where the file (or the kind's habit) says so."""
        pieces = ["$A"]
        if self._flag("add_bos_token", kind == "llama") and "bos_token" in special:
            pieces.insert(0, special["bos_token"])
        if self._flag("add_eos_token", False) and "eos_token" in special:
            pieces.append(special["eos_token"])
        if len(pieces) > 1:
            ids = [(token, self._ids[token]) for token in dict.fromkeys(pieces) if token != "$A"]
            tokenizer.post_processor = processors.TemplateProcessing(single=pieces, special_tokens=ids)

    def _error(self, problem: str) -> TokenizerError:
        return TokenizerError(f"{self._path}: no tokenizer can be rebuilt from this file: {problem}; {_ADVICE}.")

    def _strings(self, key: str) -> tuple[str, ...]:
        value = self._metadata.get(f"tokenizer.ggml.{key}")
        if not isinstance(value, tuple) or not all(isinstance(item, str) for item in value):
            raise self._error(f"tokenizer.ggml.{key} is {'missing' if value is None else 'no list of strings'}")
        return value

    def _numbers(self, key: str, default: float) -> list[Any]:
        value = self._metadata.get(f"tokenizer.ggml.{key}")
        if value is None:
            return [default] * len(self._tokens)
        if not isinstance(value, np.ndarray) or len(value) != len(self._tokens) or not np.isfinite(value).all():
            raise self._error(f"tokenizer.ggml.{key} does not hold one number per token")
        return list(value.tolist())

    def _flag(self, key: str, default: bool) -> bool:
        value = self._metadata.get(f"tokenizer.ggml.{key}", default)
        return value if isinstance(value, bool) else default

    def _id(self, name: str) -> int | None:
        """Id of a special token; None if the file does not name it."""
        key = f"{_SPECIAL_TOKENS[name]}_token_id"
        value = self._metadata.get(f"tokenizer.ggml.{key}")
        if value is None:
            return None
        if type(value) is not int or not 0 <= value < len(self._tokens):
            raise self._error(f"tokenizer.ggml.{key} is {value!r}, expected the number of a token")
        return value

"""The demo's tokenizer: byte-level BPE trained on the demo's own data, and its chat template.

The split before BPE is the one that GGUF files call "qwen2": every digit stands alone, so that numbers of any length
are spelled the same way. Merges are learned within English words and within single Chinese characters only: a Chinese
character is one token, whatever its neighbours.

    python -m demo.tokenizer --out DIR
"""

from __future__ import annotations

import argparse
import re
from collections.abc import Iterator
from pathlib import Path
from random import Random

from tokenizers import Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast

from demo.items import LANGUAGES, accept_split
from demo.lexicon import EN_NAMES, EN_NOUNS, EN_VERBS, ZH_NAMES, ZH_NOUNS, ZH_VERBS
from demo.model_config import CONTEXT_LENGTH, VOCAB_SIZE
from demo.tasks import TASKS

__all__ = [
    "ASSISTANT",
    "CHAT_TEMPLATE",
    "END",
    "GGUF_PRE_TOKENIZER",
    "PAD",
    "SPECIAL_TOKENS",
    "SYSTEM",
    "USER",
    "train_tokenizer",
]

PAD, END, SYSTEM, USER, ASSISTANT = "<|endoftext|>", "<|end|>", "<|system|>", "<|user|>", "<|assistant|>"
SPECIAL_TOKENS = (PAD, END, SYSTEM, USER, ASSISTANT)  # their ids are 0 to 4

CHAT_TEMPLATE = (
    "{%- for message in messages -%}"
    "{{- '<|' + message['role'] + '|>' + message['content'] | trim -}}"
    "{{- '<|end|>' -}}"
    "{%- endfor -%}"
    "{%- if add_generation_prompt -%}{{- '<|assistant|>' -}}{%- endif -%}"
)

GGUF_PRE_TOKENIZER = "qwen2"
_SPLIT = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
_PIECES = re.compile(r"[\u3000-\u303f\u4e00-\u9fff\uff00-\uffef]|[^\u3000-\u303f\u4e00-\u9fff\uff00-\uffef]+")
_NUM_SAMPLES = 4000  # questions per task and language


def _texts() -> Iterator[str]:
    rng = Random(0)
    accept = accept_split(held_out=False)
    for language in LANGUAGES:
        for generate in TASKS.values():
            for _ in range(_NUM_SAMPLES):
                item = generate(rng, language, accept, 60)
                yield item.turn.prompt
                yield item.turn.answer
    for word in EN_NOUNS + EN_VERBS + tuple(name.capitalize() for name in EN_NAMES):
        yield from (word, " " + word) * 200
    for word in ZH_NOUNS + ZH_NAMES + ZH_VERBS:
        yield from (word,) * 200


def _pieces() -> Iterator[str]:
    for text in _texts():
        yield from _PIECES.findall(text)


def train_tokenizer() -> PreTrainedTokenizerFast:
    """Train the tokenizer; the same code gives the same vocabulary."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.normalizer = normalizers.NFC()
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(_SPLIT), behavior="isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCAB_SIZE,
        min_frequency=8,  # leaves out pieces of random letters
        special_tokens=list(SPECIAL_TOKENS),
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    tokenizer.train_from_iterator(_pieces(), trainer)
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        pad_token=PAD,
        eos_token=END,
        additional_special_tokens=[SYSTEM, USER, ASSISTANT],
        chat_template=CHAT_TEMPLATE,
        model_max_length=CONTEXT_LENGTH,
        clean_up_tokenization_spaces=False,
    )


def main() -> None:
    """Train the tokenizer and write its folder."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True, help="folder to write")
    arguments = parser.parse_args()
    train_tokenizer().save_pretrained(arguments.out)


if __name__ == "__main__":
    main()

"""Tokenizers rebuilt from GGUF against the originals, hostile vocabularies, and templates in their sandbox."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from random import Random

import numpy as np
import pytest
import sentencepiece
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from jinja2.exceptions import SecurityError
from tests.tiny_tokenizer import make_tiny_tokenizer
from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast

from moesaic.errors import TokenizerError
from moesaic.models import load_tokenizer, tokenizer_metadata
from moesaic.models.pretokenizers import PRE_TOKENIZERS
from moesaic.quant.formats import get_format
from moesaic.weights import Checkpoint, GgufWriter, open_checkpoint

CORPUS = [
    "The quick brown fox jumps over the lazy dog. It's 1234 o'clock, isn't it?",
    "小明有三个苹果，他给了小红一个。现在他有两个苹果。1234567",
    "def main():\n    print('hello world')\n\n\treturn 0  # done\r\n",
    "Ünïcödé tëxt, naïve café; ελληνικά, русский, 日本語テキスト, 한국어.",
] * 8
TEXTS = [
    *CORPUS[:4],
    "",
    " ",
    "  leading",
    "trailing  \n\n",
    "a\n\n\nb",
    "I'LL we'Ve 3.14159 + 2=5",
    "e\u0301 \u00e9 ẛ̣",
]


def train(pre_name: str, folder: Path) -> PreTrainedTokenizerFast:
    """An original: a tokenizer trained with the rule of this name, saved as its publisher would."""
    rule = PRE_TOKENIZERS[pre_name]
    tokenizer = Tokenizer(models.BPE(ignore_merges=rule.ignore_merges))
    splits = [pre_tokenizers.Split(Regex(pattern), "isolated") for pattern in rule.patterns]
    byte_level = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence([*splits, byte_level])
    if rule.nfc:
        tokenizer.normalizer = normalizers.NFC()
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=600,
        special_tokens=["<|pad|>", "<|end|>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(CORPUS, trainer)
    tokenizer.add_tokens([AddedToken("<think>", normalized=False, special=False)])
    wrapped = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        eos_token="<|end|>",
        pad_token="<|pad|>",
        chat_template="{% for m in messages %}{{ m.content }}<|end|>{% endfor %}",
    )
    wrapped.save_pretrained(folder)
    return wrapped


def gguf_with(path: Path, metadata: Mapping[str, object], rows: int = 1024) -> Checkpoint:
    with GgufWriter(path, "test") as writer:
        writer.add_metadata(metadata)
        writer.declare("token_embd.weight", get_format("F16"), (rows, 2))
        writer.write("token_embd.weight", np.zeros((rows, 4), np.uint8))
    return open_checkpoint(path)


@pytest.mark.parametrize("pre_name", PRE_TOKENIZERS)
def test_rebuilt_equals_the_original(pre_name: str, tmp_path: Path) -> None:
    original = train(pre_name, tmp_path / "tokenizer")
    metadata = tokenizer_metadata(tmp_path / "tokenizer", 1024)
    written = PRE_TOKENIZERS[metadata["tokenizer.ggml.pre"]]
    expected = PRE_TOKENIZERS[pre_name]
    assert (written.patterns, written.nfc, written.ignore_merges) == (
        expected.patterns,
        expected.nfc,
        expected.ignore_merges,
    )
    loaded = load_tokenizer(gguf_with(tmp_path / "m.gguf", metadata))
    assert (loaded.inexact is None) == written.exact
    rebuilt = loaded.tokenizer
    for text in [*TEXTS, "x<think>y<|end|>z"]:
        ids = original(text)["input_ids"]
        assert rebuilt(text)["input_ids"] == ids, text
        assert rebuilt.decode(ids) == original.decode(ids)
        assert rebuilt.decode(ids, skip_special_tokens=True) == original.decode(ids, skip_special_tokens=True)
    assert (rebuilt.eos_token_id, rebuilt.pad_token_id) == (original.eos_token_id, original.pad_token_id)
    messages = [{"role": "user", "content": "hi"}]
    assert rebuilt.apply_chat_template(messages, tokenize=False) == "hi<|end|>"


@settings(max_examples=200, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(text=st.text(max_size=60))
def test_byte_level_tokenizers_lose_nothing(text: str, tmp_path: Path) -> None:
    path = tmp_path / "m.gguf"
    if not path.exists():
        train("deepseek-v3", tmp_path / "tokenizer")
        gguf_with(path, tokenizer_metadata(tmp_path / "tokenizer", 1024)).close()
    rebuilt = load_tokenizer(open_checkpoint(path)).tokenizer
    assert rebuilt.decode(rebuilt(text)["input_ids"]) == text


SPLITS: dict[str, tuple[str, list[str]]] = {
    "gpt-2": ("It's  12345 days\n\nx", ["It", "'s", " ", " 12345", " days", "\n", "\n", "x"]),
    "llama-bpe": ("I'LL pay 12345!\n\n  x", ["I", "'LL", " pay", " ", "123", "45", "!\n\n", " ", " x"]),
    "qwen2": ("I'LL pay 12345!\n\n  x", ["I", "'LL", " pay", " ", *"12345", "!\n\n", " ", " x"]),
    "gpt-4o": ("HelloWorld'S can't 1234 a/b\n", ["Hello", "World'S", " can't", " ", "123", "4", " a", "/b", "\n"]),
    "tekken": ("HelloWorld 1234", ["Hello", "World", " ", *"1234"]),
    "deepseek-v3": ("ab12345你好！ (x)", ["ab", "123", "45", "你好", "！", " (", "x", ")"]),
    "kimi-k2": ("Hello你好world 1234", ["Hello", "你好", "world", " ", "123", "4"]),
    "refact": ("a 12", ["a", " ", "1", "2"]),
    "bailingmoe": ("It's 12\n\nx", ["It", "'s", " ", "1", "2", "\n\n", "x"]),
}


@pytest.mark.parametrize("pre_name", SPLITS)
def test_texts_split_as_published(pre_name: str) -> None:
    """By hand from the models' published patterns, so that a slip in the table is seen."""
    text, expected = SPLITS[pre_name]
    steps = [pre_tokenizers.Split(Regex(pattern), "isolated") for pattern in PRE_TOKENIZERS[pre_name].patterns]
    assert [piece for piece, _ in pre_tokenizers.Sequence(steps).pre_tokenize_str(text)] == expected


def test_the_pattern_of_qwen_is_that_of_transformers() -> None:
    from transformers.models.qwen2.tokenization_qwen2 import PRETOKENIZE_REGEX

    assert PRE_TOKENIZERS["qwen2"].patterns == (PRETOKENIZE_REGEX,)


def test_sentencepiece_against_its_library(tmp_path: Path) -> None:
    rng = Random(0)
    syllables = ["ba", "bar", "ra", "rab", "ab", "ar", "a", "in", "ing", "ring", "st", "str", "tra", "an", "and"]
    words = ["".join(rng.choices(syllables, k=rng.randint(1, 4))) for _ in range(400)]
    lines = [" ".join(rng.choices(words, k=12)) for _ in range(300)]
    (tmp_path / "corpus.txt").write_text("\n".join([*CORPUS, *lines]))
    sentencepiece.SentencePieceTrainer.train(
        input=str(tmp_path / "corpus.txt"),
        model_prefix=str(tmp_path / "spm"),
        model_type="bpe",
        vocab_size=900,
        byte_fallback=True,
        normalization_rule_name="identity",
        remove_extra_whitespaces=False,
        character_coverage=0.98,
        minloglevel=2,
    )
    original = sentencepiece.SentencePieceProcessor(model_file=str(tmp_path / "spm.model"))
    size = original.vocab_size()
    types = [
        6 if original.is_byte(i) else 3 if original.is_control(i) else 2 if original.is_unknown(i) else 1
        for i in range(size)
    ]
    metadata = {
        "tokenizer.ggml.model": "llama",
        "tokenizer.ggml.tokens": [original.id_to_piece(i) for i in range(size)],
        "tokenizer.ggml.scores": np.array([original.get_score(i) for i in range(size)], np.float32),
        "tokenizer.ggml.token_type": np.array(types, np.int32),
        "tokenizer.ggml.bos_token_id": original.bos_id(),
        "tokenizer.ggml.eos_token_id": original.eos_id(),
        "tokenizer.ggml.unknown_token_id": original.unk_id(),
    }
    loaded = load_tokenizer(gguf_with(tmp_path / "m.gguf", metadata))
    assert loaded.inexact is not None and "special tokens" in loaded.inexact
    for text in [*CORPUS[:4], *lines[:50], "".join(words), "hello  world", "x", "🙂 smile"]:
        ids = original.encode(text)
        assert loaded.tokenizer(text)["input_ids"] == [original.bos_id(), *ids], text
        assert loaded.tokenizer.decode(ids) == original.decode(ids)


def _metadata(**changes: object) -> dict[str, object]:
    values: dict[str, object] = {
        "model": "gpt2",
        "pre": "qwen2",
        "tokens": ["a", "b", "ab", "<s>"],
        "token_type": np.array([1, 1, 1, 3], np.int32),
        "merges": ["a b"],
        "eos_token_id": 3,
    } | changes
    return {f"tokenizer.ggml.{key}": value for key, value in values.items() if value is not None}


def test_the_smallest_vocabulary(tmp_path: Path) -> None:
    loaded = load_tokenizer(gguf_with(tmp_path / "m.gguf", _metadata(add_bos_token=True, bos_token_id=3)))
    assert loaded.inexact is None
    assert loaded.tokenizer("aba")["input_ids"] == [3, 2, 0]


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"model": "bert"}, "'bert', expected one of gpt2, llama"),
        ({"model": None}, "None, expected one of"),
        ({"tokens": None}, "tokens is missing"),
        ({"tokens": np.arange(4)}, "tokens is no list of strings"),
        ({"tokens": ["x"] * 2000}, "2000 tokens for an embedding of 1024"),
        ({"token_type": np.array([1], np.int32)}, "one number per token"),
        ({"merges": ["ab"]}, "'ab' is no merge"),
        ({"merges": [" "]}, "is no merge"),
        ({"merges": ["a z"]}, "refused"),
        ({"eos_token_id": 4}, "eos_token_id is 4"),
        ({"eos_token_id": "x"}, "eos_token_id is 'x'"),
        ({"pre": "no-such-rule"}, "'no-such-rule', which is not known"),
        ({"model": "llama", "scores": np.full(4, np.nan, np.float32)}, "one number per token"),
    ],
)
def test_damaged_vocabularies(changes: dict[str, object], message: str, tmp_path: Path) -> None:
    with pytest.raises(TokenizerError, match=message) as caught:
        load_tokenizer(gguf_with(tmp_path / "m.gguf", _metadata(**changes)))
    assert "m.gguf" in str(caught.value) and "--tokenizer" in str(caught.value)


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"pre": None}, "does not say how text is split"),
        ({"pre": "kimi-k2"}, "does not hold all rules of 'kimi-k2'"),
        ({"tokens": ["a", "b", "ab", "a"]}, "1 tokens occur twice"),
    ],
)
def test_what_may_be_inexact_is_said(changes: dict[str, object], reason: str, tmp_path: Path) -> None:
    loaded = load_tokenizer(gguf_with(tmp_path / "m.gguf", _metadata(**changes)))
    assert loaded.inexact is not None and reason in loaded.inexact


@pytest.mark.parametrize(
    "template",
    [
        "{{ ''.__class__.__mro__[1].__subclasses__() }}",
        "{{ messages.append(1) }}",
        "{% for m in messages %}{{ m.update({'role': 'x'}) }}{% endfor %}",
        "{{ cycler.__init__.__globals__.os.system('true') }}",
    ],
)
def test_templates_stay_in_their_sandbox(template: str, tmp_path: Path) -> None:
    checkpoint = gguf_with(tmp_path / "m.gguf", _metadata() | {"tokenizer.chat_template": template})
    tokenizer = load_tokenizer(checkpoint).tokenizer
    with pytest.raises(SecurityError):
        tokenizer.apply_chat_template([{"role": "user", "content": "hi"}], tokenize=False)


def test_the_folder_comes_first(tmp_path: Path) -> None:
    original = train("kimi-k2", tmp_path / "tokenizer")
    checkpoint = gguf_with(tmp_path / "m.gguf", tokenizer_metadata(tmp_path / "tokenizer", 1024))
    loaded = load_tokenizer(checkpoint, tmp_path / "tokenizer")
    assert loaded.inexact is None and len(loaded.tokenizer) == len(original)


def test_the_tokenizer_of_another_model_is_refused(tmp_path: Path) -> None:
    train("qwen2", tmp_path / "tokenizer")
    checkpoint = gguf_with(tmp_path / "m.gguf", tokenizer_metadata(tmp_path / "tokenizer", 1024))
    make_tiny_tokenizer().save_pretrained(tmp_path / "other")
    with pytest.raises(TokenizerError, match="other: is the tokenizer of another model"):
        load_tokenizer(checkpoint, tmp_path / "other")


def test_folders_without_a_tokenizer(tmp_path: Path) -> None:
    checkpoint = gguf_with(tmp_path / "m.gguf", _metadata())
    with pytest.raises(TokenizerError, match="no such folder"):
        load_tokenizer(checkpoint, tmp_path / "absent")
    (tmp_path / "empty").mkdir()
    (tmp_path / "empty" / "config.json").write_text('{"model_type": "olmoe"}')
    with pytest.raises(TokenizerError, match=r"empty: holds no tokenizer: expected tokenizer\.json"):
        load_tokenizer(checkpoint, tmp_path / "empty")
    (tmp_path / "broken").mkdir()
    (tmp_path / "broken" / "tokenizer.json").write_text("{")
    (tmp_path / "broken" / "tokenizer_config.json").write_text('{"tokenizer_class": "PreTrainedTokenizerFast"}')
    with pytest.raises(TokenizerError, match="broken: holds no tokenizer"):
        load_tokenizer(checkpoint, tmp_path / "broken")


def test_code_in_a_folder_is_not_run(tmp_path: Path) -> None:
    folder = tmp_path / "tokenizer"
    folder.mkdir()
    (folder / "evil.py").write_text(f"open({str(tmp_path / 'ran')!r}, 'w')")
    (folder / "tokenizer_config.json").write_text(
        '{"tokenizer_class": "Evil", "auto_map": {"AutoTokenizer": ["evil.Evil", null]}}'
    )
    with pytest.raises(TokenizerError):
        load_tokenizer(gguf_with(tmp_path / "m.gguf", _metadata()), folder)
    assert not (tmp_path / "ran").exists()

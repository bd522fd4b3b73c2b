"""Token ids of long documents: windows leave no trace."""

import random
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
from tokenizers import Tokenizer, models, normalizers, pre_tokenizers, processors, trainers
from tokenizers.models import Model
from transformers import PreTrainedTokenizerFast

from trainer.finetune import encoding

SMALL = {"window": 400, "overlap": 120}


def corpus(seed: int = 0, length: int = 900) -> str:
    """Words, numbers, indents, blank lines, code, accents in two spellings, emoji."""
    rng = random.Random(seed)
    words = [
        "the",
        "tokenizer",
        "of",
        "windows",
        "don't",
        "Straße",
        "naïve",
        "nai\u0308ve",
        "東京都",
        "𝄞👩‍🚀",
        "x=1;",
        "(a,b)",
        "...",
        "1234567",
        "to be",
        "ﬁne",
    ]
    joins = [" "] * 12 + ["\n", "\n\n", "\n    ", "  ", "\t", ". ", ", ", "-", "", "\n \n\n"]
    return "".join(rng.choice(words) + rng.choice(joins) for _ in range(length))


def trained(model: Model, trainer: Any, *, normalizer: Any = None, pre: Any = None, post: Any = None) -> Any:
    raw = Tokenizer(model)
    if normalizer:
        raw.normalizer = normalizer
    if pre:
        raw.pre_tokenizer = pre
    if post:
        raw.post_processor = post
    raw.train_from_iterator([corpus(seed) for seed in range(5)], trainer)
    return PreTrainedTokenizerFast(tokenizer_object=raw, eos_token="</s>", unk_token="<unk>")


SPECIAL = ["<unk>", "</s>"]
QWEN = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|" + (
    r"[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
ALPHABET = pre_tokenizers.ByteLevel.alphabet()


def gpt2() -> Any:
    return trained(
        models.BPE(), trainers.BpeTrainer(vocab_size=700, special_tokens=SPECIAL, initial_alphabet=ALPHABET),
        pre=pre_tokenizers.ByteLevel(add_prefix_space=False), post=processors.ByteLevel(trim_offsets=True),
    )  # fmt: skip


def qwen() -> Any:
    from tokenizers import Regex

    split = pre_tokenizers.Split(Regex(QWEN), "isolated")
    return trained(
        models.BPE(), trainers.BpeTrainer(vocab_size=700, special_tokens=SPECIAL, initial_alphabet=ALPHABET),
        normalizer=normalizers.NFC(),
        pre=pre_tokenizers.Sequence([split, pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)]),
    )  # fmt: skip


def llama2() -> Any:
    """No words: merges reach over the whole text, and a space is put before it."""
    return trained(
        models.BPE(unk_token="<unk>"),
        trainers.BpeTrainer(vocab_size=500, special_tokens=SPECIAL, max_token_length=12),
        normalizer=normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")]),
    )  # fmt: skip


def t5() -> Any:
    return trained(
        models.Unigram(), trainers.UnigramTrainer(vocab_size=300, special_tokens=SPECIAL, unk_token="<unk>"),
        normalizer=normalizers.NFKC(), pre=pre_tokenizers.Metaspace(prepend_scheme="always"),
    )  # fmt: skip


def bert() -> Any:
    return trained(
        models.WordPiece(unk_token="<unk>"), trainers.WordPieceTrainer(vocab_size=400, special_tokens=SPECIAL),
        normalizer=normalizers.BertNormalizer(), pre=pre_tokenizers.BertPreTokenizer(),
    )  # fmt: skip


@pytest.mark.parametrize("make", [gpt2, qwen, llama2, t5, bert], ids=lambda make: make.__name__)
def test_a_long_document_has_the_tokens_that_it_has_as_a_whole(make: Callable[[], Any]) -> None:
    tokenizer = make()
    encoder = encoding.Pretrained(tokenizer, tokenizer.eos_token_id)
    for seed in range(10, 22):
        rng, text = random.Random(seed), corpus(seed)
        cuts = sorted(rng.sample(range(len(text)), 30))
        pieces = [text[a:b] for a, b in zip([0, *cuts], [*cuts, len(text)], strict=True)]
        found = np.concatenate(list(encoding.in_windows(encoder._tokens, pieces, **SMALL)))
        whole = tokenizer(text, add_special_tokens=False)["input_ids"]
        assert found.tolist() == whole, seed
        assert len(text) > 8 * SMALL["window"]


@pytest.mark.parametrize("make", [gpt2, qwen])
@pytest.mark.parametrize("text", ["31415926535" * 300, "ab" * 2000, " " * 3000, "\n" * 3000, "x\n" * 2000, "", "a"])
def test_text_without_words_has_the_same_tokens_too(make: Callable[[], Any], text: str) -> None:
    tokenizer = make()
    encoder = encoding.Pretrained(tokenizer, tokenizer.eos_token_id)
    found = np.concatenate([np.zeros(0, np.int64), *encoding.in_windows(encoder._tokens, [text], **SMALL)])
    assert found.tolist() == tokenizer(text, add_special_tokens=False)["input_ids"]


def test_no_character_is_lost_where_no_window_agrees_with_the_next() -> None:
    """A tokenizer that is another one in each window."""
    shift = 0

    def contrary(text: str) -> encoding.Tokenized:
        nonlocal shift
        shift += 1
        starts = np.array([0, *range(1 + shift % 2, len(text), 2)])
        ends = np.append(starts[1:], len(text))
        return encoding.Tokenized(np.array([ord(text[at]) for at in starts]) + 1000 * shift, starts, ends)

    text = "".join(map(chr, range(40, 4000)))
    found = np.concatenate(list(encoding.in_windows(contrary, [text], **SMALL)))
    assert len(found) == pytest.approx(len(text) / 2, rel=0.05)


def test_a_tokenizer_that_does_not_say_places_is_cut_at_lines() -> None:
    text = corpus(3, 2000)
    windows = list(encoding.in_lines([text[:7000], text[7000:]], 300))
    assert "".join(windows) == text
    assert len(windows) > 5
    assert max(map(len, windows)) <= 1000
    assert "".join(encoding.in_lines(["ab" * 2000], 300)) == "ab" * 2000


def test_halves_of_surrogate_pairs_are_replaced() -> None:
    tokenizer = gpt2()
    encoder = encoding.Pretrained(tokenizer, tokenizer.eos_token_id)
    ids = np.concatenate(list(encoder.ids(["a \ud83d b"])))
    assert ids.tolist() == tokenizer("a ? b", add_special_tokens=False)["input_ids"]
    assert b"".join(piece.tobytes() for piece in encoding.Bytes().ids(["a \ud83d"])) == b"a ?"


def test_a_vocabulary_with_gaps_has_room_for_its_highest_id() -> None:
    raw = Tokenizer(models.WordLevel({"<unk>": 0, "</s>": 1, "far": 70_000}, unk_token="<unk>"))
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=raw, eos_token="</s>", unk_token="<unk>")
    assert encoding.Pretrained(tokenizer, 1).vocab_size == 70_001

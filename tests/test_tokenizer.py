"""The vocabulary, its file, padding and seeded BPE dropout of dalle_fast.data.tokenizer."""

import json
import unicodedata

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from dalle_fast.data.tokenizer import PAD_ID, Tokenizer

CAPTIONS = [
    f"A {size} {color} {shape} in the {place}, on a {ground} background"
    for size in ("small", "large")
    for color in ("red", "green", "blue")
    for shape in ("circle", "square", "triangle")
    for place in ("centre", "top left", "bottom right")
    for ground in ("white", "grey")
]
# No surrogates: UTF-8 cannot spell them. "Σ" ends words differently in Python's lower().
TEXT = st.text(st.characters(exclude_categories=["Cs"]), min_size=1, max_size=60).filter(str.strip)
WORDS = st.lists(st.sampled_from(" ".join(CAPTIONS).split()), min_size=1, max_size=12).map(" ".join)


@pytest.fixture(scope="module")
def tokenizer():
    return Tokenizer.train(CAPTIONS, 400)


def test_training_learns_whole_words_and_fits_vocab_size(tokenizer):
    assert 257 < tokenizer.vocab_size <= 400
    assert len(tokenizer.encode("a large red circle")) == 4
    assert Tokenizer.train(CAPTIONS, 300).vocab_size == 300


def test_training_is_deterministic(tokenizer):
    again = Tokenizer.train(iter(CAPTIONS), 400)
    assert again.sha256 == tokenizer.sha256
    assert Tokenizer.train(CAPTIONS, 300).sha256 != tokenizer.sha256


def test_little_variety_gives_a_smaller_vocabulary():
    assert 257 <= Tokenizer.train(["aa"], 5000).vocab_size < 300


def test_captions_are_lower_cased_and_composed(tokenizer):
    assert tokenizer.encode("A LARGE Red circle") == tokenizer.encode("a large red circle")
    assert tokenizer.encode("cafe\u0301") == tokenizer.encode("CAF\u00c9")
    assert tokenizer.normalize("CAFE\u0301") == "caf\u00e9"


@pytest.mark.parametrize("caption", ["naïve 日本語 🦊", "\x00\x7f", "ÅÄÖ \u200d ß İ", "a  b\tc\n", "<pad>"])
def test_nothing_is_unknown(tokenizer, caption):
    ids = tokenizer.encode(caption)
    assert PAD_ID not in ids
    assert tokenizer.decode(ids) == tokenizer.normalize(caption)


@given(TEXT | WORDS)
@settings(max_examples=200, deadline=None)
def test_decode_returns_the_lower_cased_caption(tokenizer, caption):
    decoded = tokenizer.decode(tokenizer.encode(caption))
    assert decoded == tokenizer.normalize(caption)
    if "Σ" not in unicodedata.normalize("NFC", caption):
        assert decoded == unicodedata.normalize("NFC", caption.lower())


@given(TEXT | WORDS)
@settings(max_examples=200, deadline=None)
def test_the_merge_loop_without_drops_equals_the_package(tokenizer, caption):
    # The smallest positive probability runs the loop written here and never drops a merge.
    ids = tokenizer.encode(caption, dropout=5e-324, rng=np.random.default_rng(0))
    assert ids == tokenizer.encode(caption)


def test_the_merge_loop_equals_the_package_on_repeated_letters():
    tokenizer = Tokenizer.train(["aaaa aaaaaaa aaa aa", "abab babab abba", "aab baa"] * 3, 290)
    for length in range(1, 20):
        for word in ("a" * length, "ab" * length, "aab" * length, "abba" * length):
            ids = tokenizer.encode(word, dropout=5e-324, rng=np.random.default_rng(0))
            assert ids == tokenizer.encode(word)


@given(TEXT | WORDS, st.floats(0.01, 1), st.integers(0, 2**32))
@settings(max_examples=200, deadline=None)
def test_dropout_keeps_the_text_and_follows_its_seed(tokenizer, caption, dropout, seed):
    ids = tokenizer.encode(caption, dropout=dropout, rng=np.random.default_rng(seed))
    assert tokenizer.decode(ids) == tokenizer.normalize(caption)
    assert ids == tokenizer.encode(caption, dropout=dropout, rng=np.random.default_rng(seed))


@given(TEXT | WORDS)
@settings(max_examples=50, deadline=None)
def test_full_dropout_gives_single_bytes(tokenizer, caption):
    ids = tokenizer.encode(caption, dropout=1.0, rng=np.random.default_rng(0))
    assert len(ids) == len(tokenizer.normalize(caption).encode())


def test_dropout_drops_merges_at_its_rate():
    """With the one merge a+b, the word "ab" stays in two pieces with probability p."""
    tokenizer = Tokenizer.train(["ab"], 258)
    rng = np.random.default_rng(0)
    split = np.mean([len(tokenizer.encode("ab", dropout=0.1, rng=rng)) == 2 for _ in range(4000)])
    assert 0.08 < split < 0.12  # four standard deviations


def test_padding_and_cutting(tokenizer):
    ids = tokenizer.encode("a large red circle")
    padded, truncated = tokenizer.encode_padded("a large red circle", 6)
    assert padded.tolist() == [*ids, PAD_ID, PAD_ID] and not truncated
    assert padded.dtype == torch.int64
    exact, truncated = tokenizer.encode_padded("a large red circle", 4, strict=True)
    assert exact.tolist() == ids and not truncated
    cut, truncated = tokenizer.encode_padded("a large red circle", 3)
    assert cut.tolist() == ids[:3] and truncated
    assert tokenizer.decode(padded) == "a large red circle"


def test_padding_with_dropout(tokenizer):
    padded, truncated = tokenizer.encode_padded("red", 5, dropout=1.0, rng=np.random.default_rng(0))
    assert tokenizer.decode(padded) == "red" and not truncated
    assert (padded != PAD_ID).sum() == 3


def test_save_and_load(tokenizer, tmp_path):
    path = tmp_path / "tokenizer.json"
    tokenizer.save(path)
    loaded = Tokenizer.load(path)
    assert loaded.sha256 == tokenizer.sha256
    assert loaded.vocab_size == tokenizer.vocab_size
    for caption in [*CAPTIONS, "<pad>", "Ünseen 🦊"]:
        assert loaded.encode(caption) == tokenizer.encode(caption)
        rngs = np.random.default_rng(1), np.random.default_rng(1)
        assert loaded.encode(caption, dropout=0.3, rng=rngs[0]) == tokenizer.encode(caption, dropout=0.3, rng=rngs[1])


@pytest.mark.parametrize(
    "call, message",
    [
        (lambda t: t.encode(""), "caption must not be empty, got ''"),
        (lambda t: t.encode_padded(" \n", 4), "caption must not be empty, got"),
        (lambda t: t.encode("a \udc80"), "caption must be valid Unicode, got"),
        (lambda t: t.encode("a", dropout=1.5), r"dropout must be in \[0, 1\], got 1.5"),
        (lambda t: t.encode("a", dropout=float("nan")), r"dropout must be in \[0, 1\], got nan"),
        (lambda t: t.encode("a", dropout=0.1), "rng must be given when dropout > 0, got dropout 0.1"),
        (lambda t: t.encode_padded("a", 0), "length must be >= 1, got 0"),
        (
            lambda t: t.encode_padded("a large red circle", 3, strict=True),
            'caption must have at most 3 tokens, got 4: "a large red circle"',
        ),
        (lambda t: t.decode([-1]), r"ids must be in 0 .. \d+, got -1"),
        (lambda t: t.decode(torch.tensor([5, 10**6])), r"ids must be in 0 .. \d+, got 1000000"),
        (lambda t: Tokenizer.train([], 300), "captions must hold at least one caption, got none"),
        (
            lambda t: Tokenizer.train(["a"], 256),
            r"vocab_size must be >= 257 \(256 bytes and the pad token\), got 256",
        ),
    ],
)
def test_errors_name_the_rule_and_the_value(tokenizer, call, message):
    with pytest.raises(ValueError, match=message):
        call(tokenizer)


def drop_byte(state):
    state["model"]["vocab"].pop("!")
    state["model"]["vocab"] = {token: i for i, token in enumerate(state["model"]["vocab"])}


@pytest.mark.parametrize(
    "damage, message",
    [
        (lambda s: s.pop("model"), "whose layout is wrong: 'model'"),
        (lambda s: s["model"].update(vocab=[]), "whose layout is wrong"),
        (lambda s: s.update(normalizer=None), "whose layout is wrong"),
        (lambda s: s["model"].update(type="WordPiece"), "whose model is WordPiece and not BPE"),
        (lambda s: s["normalizer"]["normalizers"].pop(0), r"whose normalizer is \['NFC'\] and not"),
        (lambda s: s["pre_tokenizer"].update(type="Whitespace"), "whose pre-tokenizer is not ByteLevel"),
        (lambda s: s["model"]["vocab"].update({"<pad>": 7}), "whose <pad> has id 7 and not 0"),
        (lambda s: s["model"]["vocab"].update(zzz=9999), r"whose \d+ ids are not 0 .. \d+"),
        (drop_byte, "whose vocabulary lacks 1 of the 256 bytes"),
        (
            lambda s: s["model"]["merges"].append(["q", "q"]),
            "whose merge of 'q' and 'q' is not in its vocabulary",
        ),
    ],
)
def test_foreign_files_are_refused_in_one_sentence(tokenizer, tmp_path, damage, message):
    path = tmp_path / "tokenizer.json"
    tokenizer.save(path)
    state = json.loads(path.read_text(encoding="utf-8"))
    damage(state)
    path.write_text(json.dumps(state), encoding="utf-8")
    with pytest.raises(ValueError, match=message) as caught:
        Tokenizer.load(path)
    assert str(caught.value).startswith(f"tokenizer file must be one that Tokenizer.save wrote, got {path}")
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("content", [b"", b"{", b"\xff\xfe{}"])
def test_corrupt_files_are_refused_in_one_sentence(tmp_path, content):
    path = tmp_path / "tokenizer.json"
    path.write_bytes(content)
    with pytest.raises(ValueError, match="which is not JSON"):
        Tokenizer.load(path)


def test_a_missing_file_is_named(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"none\.json"):
        Tokenizer.load(tmp_path / "none.json")


def test_dropout_never_cuts_what_fits_without_it(tokenizer):
    caption = "a large red circle"
    fits = len(tokenizer.encode(caption))
    for seed in range(20):
        rng = np.random.default_rng(seed)
        ids, truncated = tokenizer.encode_padded(caption, fits, dropout=0.5, rng=rng, strict=True)
        assert not truncated
        assert tokenizer.decode(ids) == caption

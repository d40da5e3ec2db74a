"""Captions to token ids: a byte-level BPE vocabulary with seeded BPE dropout.

A caption is lower-cased, brought to Unicode normal form C, split into words (a space belongs to the word it
precedes), spelled in UTF-8 bytes, and adjacent tokens are merged in the order in which training learned the
merges. All 256 bytes are tokens, so no caption has an unknown part. Id 0 is the pad token and no caption
contains it.

BPE dropout: at every step each possible merge of a word is left out with probability p, the best of the rest
is made, and the word is finished when none is left. Training needs it to be a pure function of a seed, which
the `tokenizers` package does not offer, so the loop with dropout is written out here on the trained merges;
without dropout the package encodes.

Source: Ramesh et al. 2021, section 2.2 (16,384 tokens, 256 a caption, dropout 0.1 in training only);
Provilkov et al., "BPE-Dropout" (2020), algorithm 1.
Limits: `tokenizers` must be installed. One dropped-out caption costs about a tenth of a millisecond.
"""

import hashlib
import json
from collections.abc import Iterable, Iterator, Sequence
from itertools import pairwise
from pathlib import Path

import numpy as np
import torch

PAD_ID = 0
PAD_TOKEN = "<pad>"
MIN_VOCAB_SIZE = 257  # the pad token and the 256 bytes


class Tokenizer:
    """A trained byte-level BPE vocabulary. Make one with `Tokenizer.train` or `Tokenizer.load`.

    Args:
        vocab: token to id; ids are 0 .. len(vocab) - 1, `"<pad>"` is 0, every byte is there.
        merges: the pairs of tokens to merge, best first.
    """

    def __init__(self, vocab: dict[str, int], merges: Sequence[tuple[str, str]]) -> None:
        from tokenizers import AddedToken, models
        from tokenizers import Tokenizer as PackageTokenizer

        self._tokenizer = PackageTokenizer(models.BPE(vocab=vocab, merges=list(merges)))
        _set_text_rules(self._tokenizer)
        self._tokenizer.add_special_tokens([AddedToken(PAD_TOKEN, special=True, normalized=False)])
        # A caption that spells "<pad>" means those five letters, not the pad token.
        self._tokenizer.encode_special_tokens = True
        self._vocab = vocab
        # pair of ids -> (rank, id of the merged token); ranks are unique, so the tuples sort by rank alone
        self._merges = {
            (vocab[left], vocab[right]): (rank, vocab[left + right]) for rank, (left, right) in enumerate(merges)
        }

    @classmethod
    def train(cls, captions: Iterable[str], vocab_size: int) -> "Tokenizer":
        """Learns the merges from captions; the same captions in the same order give the same vocabulary.

        Args:
            captions: at least one.
            vocab_size: upper limit of the number of tokens; captions with little variety give fewer.

        Raises:
            ValueError: no caption, or vocab_size below 257.
        """
        from tokenizers import Tokenizer as PackageTokenizer
        from tokenizers import models, pre_tokenizers, trainers

        if vocab_size < MIN_VOCAB_SIZE:
            raise ValueError(f"vocab_size must be >= {MIN_VOCAB_SIZE} (256 bytes and the pad token), got {vocab_size}")
        captions = list(captions)
        if not captions:
            raise ValueError("captions must hold at least one caption, got none")
        learner = PackageTokenizer(models.BPE())
        _set_text_rules(learner)
        trainer = trainers.BpeTrainer(
            vocab_size=vocab_size,
            special_tokens=[PAD_TOKEN],
            initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
            show_progress=False,
        )
        learner.train_from_iterator(captions, trainer)
        model = json.loads(learner.to_str())["model"]
        return cls(model["vocab"], [(left, right) for left, right in model["merges"]])

    @classmethod
    def load(cls, path: str | Path) -> "Tokenizer":
        """Reads what `save` wrote.

        Raises:
            FileNotFoundError: there is no such file.
            ValueError: the file is corrupt, or describes another kind of tokenizer.
        """
        rule = f"tokenizer file must be one that Tokenizer.save wrote, got {path}"
        try:
            state = json.loads(Path(path).read_text(encoding="utf-8"))
        except ValueError as error:
            raise ValueError(f"{rule}, which is not JSON: {error}") from error
        try:
            vocab, merges = _parse(state)
        except (KeyError, TypeError, IndexError) as error:
            raise ValueError(f"{rule}, whose layout is wrong: {error}") from error
        except ValueError as error:
            raise ValueError(f"{rule}, {error}") from error
        return cls(vocab, merges)

    def save(self, path: str | Path) -> None:
        """Writes the vocabulary to `path` in the JSON format of the `tokenizers` package."""
        Path(path).write_text(self._tokenizer.to_str(), encoding="utf-8")

    @property
    def vocab_size(self) -> int:
        """Number of tokens, the pad token included."""
        return self._tokenizer.get_vocab_size()

    @property
    def sha256(self) -> str:
        """Hash of the file that `save` writes: equal hashes mean equal tokenizers."""
        return hashlib.sha256(self._tokenizer.to_str().encode()).hexdigest()

    def normalize(self, caption: str) -> str:
        """The caption as the tokens spell it: lower case, normal form C."""
        return self._tokenizer.normalizer.normalize_str(caption)

    def encode(self, caption: str, *, dropout: float = 0.0, rng: np.random.Generator | None = None) -> list[int]:
        """Token ids of a caption, without padding.

        Args:
            caption: any text that is not blank.
            dropout: probability with which a possible merge is left out at each step, for training only.
            rng: the only source of randomness; needed when dropout > 0.

        Raises:
            ValueError: blank caption, text that is not valid Unicode, dropout outside [0, 1], or no rng.
        """
        if not caption.strip():
            raise ValueError(f"caption must not be empty, got {caption!r}")
        if not caption.isascii() and any("\ud800" <= letter <= "\udfff" for letter in caption):
            raise ValueError(f"caption must be valid Unicode, got {caption!r}")
        if not 0 <= dropout <= 1:
            raise ValueError(f"dropout must be in [0, 1], got {dropout}")
        if dropout == 0:
            return self._tokenizer.encode(caption, add_special_tokens=False).ids
        if rng is None:
            raise ValueError(f"rng must be given when dropout > 0, got dropout {dropout} and rng None")
        words = self._tokenizer.pre_tokenizer.pre_tokenize_str(self.normalize(caption))
        draws = _uniforms(rng)
        return [token for word, _ in words for token in self._merge_with_dropout(word, dropout, draws)]

    def _merge_with_dropout(self, word: str, dropout: float, draws: Iterator[float]) -> list[int]:
        tokens = [self._vocab[letter] for letter in word]
        while True:
            best = None
            for position, pair in enumerate(pairwise(tokens)):
                merge = self._merges.get(pair)
                if merge is not None and next(draws) >= dropout and (best is None or merge < best):
                    best, best_position = merge, position
            if best is None:
                return tokens
            _, merged = best
            tokens[best_position : best_position + 2] = [merged]

    def encode_padded(
        self,
        caption: str,
        length: int,
        *,
        dropout: float = 0.0,
        rng: np.random.Generator | None = None,
        strict: bool = False,
    ) -> tuple[torch.Tensor, bool]:
        """Token ids of a caption at a fixed length. One that fits without dropout is never cut.

        Args:
            caption, dropout, rng: as for `encode`.
            length: number of tokens to return; shorter captions are padded with `PAD_ID`, longer ones cut.
            strict: refuse a longer caption instead of cutting it.

        Returns:
            int64 tensor (length,), and whether the caption was cut.

        Raises:
            ValueError: as for `encode`, length below 1, or too long a caption with `strict`.
        """
        if length < 1:
            raise ValueError(f"length must be >= 1, got {length}")
        ids = self.encode(caption, dropout=dropout, rng=rng)
        if dropout > 0 and len(ids) > length:
            # Dropout must not cut what fits without it.
            whole = self.encode(caption)
            ids = whole if len(whole) <= length else ids
        if strict and len(ids) > length:
            raise ValueError(f'caption must have at most {length} tokens, got {len(ids)}: "{caption}"')
        padded = torch.full((length,), PAD_ID, dtype=torch.int64)
        kept = ids[:length]
        padded[: len(kept)] = torch.tensor(kept, dtype=torch.int64)
        return padded, len(ids) > length

    def decode(self, ids: Sequence[int] | torch.Tensor) -> str:
        """The text that token ids spell; pads are left out, and bytes that are no UTF-8 show as U+FFFD.

        Raises:
            ValueError: an id outside the vocabulary.
        """
        ids = ids.tolist() if isinstance(ids, torch.Tensor) else list(ids)
        for token in ids:
            if not 0 <= token < self.vocab_size:
                raise ValueError(f"ids must be in 0 .. {self.vocab_size - 1}, got {token}")
        return self._tokenizer.decode(ids, skip_special_tokens=True)


def _uniforms(rng: np.random.Generator) -> Iterator[float]:
    # In blocks, because one call per draw would cost more than the merge it decides.
    while True:
        yield from rng.random(128).tolist()


def _set_text_rules(tokenizer) -> None:
    from tokenizers import decoders, normalizers, pre_tokenizers

    tokenizer.normalizer = normalizers.Sequence([normalizers.Lowercase(), normalizers.NFC()])
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()


def _parse(state: dict) -> tuple[dict[str, int], list[tuple[str, str]]]:
    """Vocabulary and merges of a parsed tokenizer.json, checked so far that the package accepts them.

    The package reports a bad file with a bare Exception, so everything it could object to is checked here.
    """
    from tokenizers import pre_tokenizers

    model = state["model"]
    if model["type"] != "BPE":
        raise ValueError(f"whose model is {model['type']} and not BPE")
    normalizers = [step["type"] for step in state["normalizer"]["normalizers"]]
    if normalizers != ["Lowercase", "NFC"]:
        raise ValueError(f"whose normalizer is {normalizers} and not ['Lowercase', 'NFC']")
    if state["pre_tokenizer"]["type"] != "ByteLevel" or state["pre_tokenizer"]["add_prefix_space"]:
        raise ValueError("whose pre-tokenizer is not ByteLevel without a prefix space")
    vocab: dict[str, int] = model["vocab"]
    if vocab[PAD_TOKEN] != PAD_ID:
        raise ValueError(f"whose {PAD_TOKEN} has id {vocab[PAD_TOKEN]} and not {PAD_ID}")
    if sorted(vocab.values()) != list(range(len(vocab))):
        raise ValueError(f"whose {len(vocab)} ids are not 0 .. {len(vocab) - 1}")
    missing = set(pre_tokenizers.ByteLevel.alphabet()) - vocab.keys()
    if missing:
        raise ValueError(f"whose vocabulary lacks {len(missing)} of the 256 bytes")
    merges = [(left, right) for left, right in model["merges"]]
    for left, right in merges:
        if not {left, right, left + right} <= vocab.keys():
            raise ValueError(f"whose merge of {left!r} and {right!r} is not in its vocabulary")
    return vocab, merges

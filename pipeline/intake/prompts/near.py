"""Training prompts that an evaluation has nearly or partly seen.

Near prompts are found by MinHash and locality-sensitive hashing (Broder 1997; Indyk and Motwani
1998) and confirmed by their exact Jaccard similarity; contamination by runs of words in common, as
language models' evaluations look for it (Brown et al. 2020, arXiv 2005.14165, appendix C).
"""

import hashlib
import re
from collections.abc import Iterable
from functools import lru_cache

import numpy as np
import polars as pl
from rensa import RMinHash

SHINGLE = 5
"""Characters of a shingle."""

JACCARD = 0.8
"""Similarity of two prompts' shingles from which they are near."""

GRAM = 10
"""Words of a run that two texts must not share."""

_PERMUTATIONS, BANDS = 128, 16
"""Bands of 8: two prompts of similarity 0.8 meet with probability 0.95, of 0.85 with 0.996."""

_KEPT = 16
_SEED = 1
_ODD = np.random.default_rng(_SEED).integers(1, 2**63, _PERMUTATIONS // BANDS, np.uint64) * 2 + 1
_POWERS = np.power(np.uint64(0x9E3779B97F4A7C15), np.arange(GRAM, dtype=np.uint64))
_WORD = re.compile(r"\w+")


def spoken(prompt: pl.Expr) -> pl.Expr:
    """A prompt's text without its system messages, which many prompts share."""
    element = pl.element().struct
    said = pl.when(element.field("role") != "system").then(element.field("content"))
    return prompt.list.eval(said).list.drop_nulls().list.join("\n")


def shingles(text: str) -> set[str]:
    """The character 5-grams of a text, without case and with runs of white space as one space."""
    plain = " ".join(text.lower().split())
    return {plain[i : i + SHINGLE] for i in range(max(1, len(plain) - SHINGLE + 1))}


def jaccard(a: set[str], b: set[str]) -> float:
    """Shared share of two sets."""
    return len(a & b) / len(a | b)


def band_keys(texts: Iterable[str]) -> np.ndarray:
    """Keys under which near texts are likely to meet, uint64 [n, 16]."""
    signatures = []
    for text in texts:
        sketch = RMinHash(num_perm=_PERMUTATIONS, seed=_SEED)
        sketch.update(list(shingles(text)))
        signatures.append(sketch.digest())
    table = np.array(signatures, np.uint64).reshape(-1, BANDS, _PERMUTATIONS // BANDS)
    return np.asarray((table * _ODD).sum(axis=2, dtype=np.uint64))


class NearIndex:
    """Prompts of an evaluation, to be asked which other prompts are near one of them.

    Args:
        texts: the prompts.
        keys: their `band_keys`.
    """

    def __init__(self, texts: pl.Series, keys: np.ndarray) -> None:
        self._texts = texts
        # Texts that meet under one key are mostly alike, so a few of them stand for all.
        met = pl.col("number").sort().head(_KEPT)
        self._keys = _banded(keys).group_by("band", "key").agg(met)

    def near(self, texts: pl.Series, keys: np.ndarray) -> np.ndarray:
        """Whether each text has a near one in the index, bool [n]."""
        result = np.zeros(len(texts), bool)
        met = (
            _banded(keys)
            .rename({"number": "asked"})
            .join(self._keys, on=["band", "key"])
            .explode("number")
            .select("asked", "number")
            .unique()
            .sort("asked", "number")
        )
        for asked, number in met.iter_rows():
            if not result[asked]:
                found = jaccard(shingles(texts[asked]), shingles(self._texts[number]))
                result[asked] = found >= JACCARD
        return result


def word_grams(text: str) -> np.ndarray:
    """A hash of every run of 10 words, uint64 [n - 9], without case and punctuation."""
    words = np.array([_word_hash(word) for word in _WORD.findall(text.lower())], np.uint64)
    if len(words) < GRAM:
        return np.empty(0, np.uint64)
    runs = np.lib.stride_tricks.sliding_window_view(words, GRAM)
    return np.asarray((runs * _POWERS).sum(axis=1, dtype=np.uint64))


def shares_grams(text: str, grams: np.ndarray) -> bool:
    """Whether a text has a run of words whose hash is in `grams`, which is sorted."""
    if not len(grams):
        return False
    mine = word_grams(text)
    place = np.searchsorted(grams, mine)
    place[place == len(grams)] = 0
    return bool((grams[place] == mine).any())


@lru_cache(maxsize=1 << 16)
def _word_hash(word: str) -> int:
    return int.from_bytes(hashlib.blake2b(word.encode(), digest_size=8).digest(), "big")


def _banded(keys: np.ndarray) -> pl.DataFrame:
    """`number, band, key`, a row per key."""
    n = len(keys)
    return pl.DataFrame(
        {
            "number": np.repeat(np.arange(n, dtype=np.uint32), BANDS),
            "band": np.tile(np.arange(BANDS, dtype=np.uint8), n),
            "key": keys.reshape(-1),
        }
    )

"""Length scores: LongWriter's word counter and length score (Bai et al., 2024, arXiv 2408.07055)."""

import re

_LATIN = re.compile(r"\b[a-zA-Z]+\b")
_HAN = re.compile(r"[一-鿿]")


def count_words(text: str) -> int:
    """Chinese characters plus whole runs of ASCII letters: "don't" is 2, "B2B" 0, a word glued to a character 0."""
    return len(_HAN.findall(text)) + len(_LATIN.findall(text))


def length_score(required: int, produced: int) -> float:
    """S_l / 100: 1 at the required length, 0 from four times it or from a third of it, linear in the ratio between.

    Raises ValueError for a required length below 1.
    """
    if required < 1:
        raise ValueError(f"the required length is {required}: it must be at least 1 word")
    if produced <= 0:
        return 0.0
    if produced > required:
        return max(0.0, 1.0 - (produced / required - 1.0) / 3.0)
    return max(0.0, 1.0 - (required / produced - 1.0) / 2.0)

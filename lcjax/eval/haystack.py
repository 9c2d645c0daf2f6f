"""Haystacks from real text: a folder of books, or by default the documentation of Python's own standard library.

A haystack is a fixed list of sentences; a prefix of it that is measured in words or in sentences is the filler of an
example. `budget.Fitter` decides how many units fit. Text that ends is repeated.
"""

import functools
import hashlib
import itertools
import re
import sysconfig
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from random import Random

_SENTENCE_END = re.compile(r"([.!?][\"'”’)]*) (?=[\"'“‘(]*[A-Z0-9])")
_DOCSTRING = re.compile(r'^[ ]*"""([^"]+)"""$', re.MULTILINE)
_LEFT_OUT = {"site-packages", "test", "tests", "idlelib", "lib2to3", "pydoc_data"}
_SHORTEST_DOCUMENT = 80
_LONGEST = 40  # words of a sentence
_LONGEST_WORD = 30  # characters


@dataclass(frozen=True)
class Haystack:
    """Sentences of running text. `source` and `fingerprint` (SHA-256 of the text) go into an example's metadata."""

    source: str
    sentences: tuple[str, ...]
    fingerprint: str

    def take_words(self, count: int, start: int = 0) -> list[str]:
        """Sentences from index `start` on with `count` words in all: the last one is cut, a text that ends repeats."""
        taken: list[str] = []
        for sentence in self.cycle(start):
            if count <= 0:
                break
            words = sentence.split()
            taken.append(sentence if len(words) <= count else " ".join(words[:count]))
            count -= len(words)
        return taken

    def take(self, count: int, start: int = 0, shortest: int = 0) -> list[str]:
        """`count` whole sentences of at least `shortest` words, from index `start` on."""
        kept = (sentence for sentence in self.cycle(start) if not shortest or len(sentence.split()) >= shortest)
        return list(itertools.islice(kept, count))

    def cycle(self, start: int = 0) -> Iterator[str]:
        """Endless sentences from index `start` (taken modulo the number of sentences) on."""
        start %= len(self.sentences)
        yield from self.sentences[start:]
        yield from itertools.cycle(self.sentences)

    def random_start(self, rng: Random) -> int:
        """A sentence index to start from."""
        return rng.randrange(len(self.sentences))


@functools.lru_cache(maxsize=4)
def load_haystack(source: str = "python") -> Haystack:
    """The sentences of `read_text(source)`. Raises ValueError for text without sentences."""
    text = read_text(source)
    sentences = tuple(split_sentences(text))
    if not sentences:
        raise ValueError(f"haystack {source!r} holds no text")
    label = source if source == "python" else Path(source).name
    return Haystack(label, sentences, hashlib.sha256(text.encode()).hexdigest())


def read_text(source: str) -> str:
    """The text of "python" (documentation of the standard library), of a file, or of a folder's `*.txt` by name.

    Raises FileNotFoundError for a path that does not exist.
    """
    if source == "python":
        return "\n\n".join(_python_documentation())
    path = Path(source)
    files = sorted(path.rglob("*.txt")) if path.is_dir() else [path]
    if not files or not files[0].exists():
        raise FileNotFoundError(f"haystack {source!r} is no text file and no folder with *.txt files in it")
    return "\n\n".join(file.read_text(encoding="utf-8") for file in files)


def split_sentences(text: str) -> list[str]:
    """Sentences of a text: paragraphs split after a full stop, question or exclamation mark, white space joined."""
    sentences = []
    for paragraph in re.split(r"\n\s*\n", text):
        joined = " ".join(paragraph.split())
        pieces = _SENTENCE_END.sub(r"\1\n", joined).split("\n")
        sentences += [short for piece in pieces for short in _shorten(piece) if any(map(str.isalpha, short))]
    return sentences


def _shorten(sentence: str) -> list[str]:
    """The sentence, or its pieces where it is so long that it would be a coarse unit of a haystack."""
    words = [word for word in sentence.split() if len(word) <= _LONGEST_WORD]
    return [" ".join(words[i : i + _LONGEST]) for i in range(0, len(words), _LONGEST)]


def insert_at(lines: list[str], needles: list[str], places: list[int]) -> list[str]:
    """Lines with needle j before the line that had index `places[j]`; places ascend, `len(lines)` is the end."""
    result: list[str] = []
    done = 0
    for needle, place in zip(needles, places, strict=True):
        result += [*lines[done:place], needle]
        done = place
    return result + lines[done:]


def at_depths(lines: list[str], depths: list[float]) -> list[int]:
    """Places int(len x depth) of depths in [0, 1]."""
    return [int(len(lines) * depth) for depth in depths]


def _python_documentation() -> Iterator[str]:
    """The language reference that `pydoc` ships, then the documentation strings of the library's sources, by path."""
    from pydoc_data.topics import topics

    for name in sorted(topics):
        yield topics[name]
    root = Path(sysconfig.get_paths()["stdlib"])
    for file in sorted(root.rglob("*.py")):
        if not _LEFT_OUT & set(file.relative_to(root).parts):
            source = file.read_text(encoding="utf-8", errors="ignore")
            yield from (text for text in _DOCSTRING.findall(source) if len(text) >= _SHORTEST_DOCUMENT)

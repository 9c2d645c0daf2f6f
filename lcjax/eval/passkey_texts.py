"""Passkey questions with their answers as training text, in the wording of the passkey test."""

from dataclasses import dataclass
from pathlib import Path
from random import Random

from lcjax.data.made import MadeTexts
from lcjax.eval.tasks.passkey import Passkey
from lcjax.eval.words import compound


@dataclass(frozen=True)
class PasskeyTexts:
    """A `lcjax.data` source of `count` questions with `least` to `most` lines of filler each, depths and keys drawn.

    One line of filler is about 26 tokens. The keys come from other draws than the test's. named: further keys, each
    with a name and at a depth of its own, asked for in another order behind the pass key itself, whose question follows
    the text as in the test: what a model learns to retrieve from a long text grows with them, and the text hardly does.
    Every second pass key and a third of the named ones stand at the beginning, farthest from their questions, which is
    what models learn last.
    """

    count: int = 10_000
    least: int = 2
    most: int = 34
    named: int = 0
    seed: int = 1
    split: str = "train"

    def __post_init__(self):
        if not 0 <= self.least <= self.most or self.count < 1:
            raise ValueError(f"PasskeyTexts: count {self.count} must be positive and {self.least} <= {self.most} lines")
        if self.named < 0:
            raise ValueError(f"PasskeyTexts.named is {self.named}; it must be positive, or 0 for the pass key alone")

    def open(self, data_dir: str | Path) -> "_Questions":
        """The texts, made as they are read; nothing is written to `data_dir`."""
        return _Questions(self)


class _Questions(MadeTexts):
    def __init__(self, source: PasskeyTexts):
        self._source = source
        super().__init__(source.count, str(source))

    def text(self, index: int) -> str:
        rng = Random(f"{self._source.seed}-{index}")
        lines = rng.randint(self._source.least, self._source.most)
        draft = Passkey(depths=(rng.choice((0.0, rng.random())),)).draft(rng, lines, 0)
        *body, question = draft.body.split("\n")
        asked = [question, f"{draft.answer_prefix} {draft.references[0]}."]
        keys: dict[str, int] = {}
        while len(keys) < self._source.named:
            keys[compound(rng)] = rng.randrange(10_000, 100_000)
        for name, key in keys.items():
            place = rng.choice((2, rng.randint(2, len(body)), rng.randint(2, len(body))))
            body.insert(place, f"The pass key of {name} is {key}. Remember it.")
        for name in rng.sample([*keys], len(keys)):
            asked += [f"What is the pass key of {name}?", f"The pass key of {name} is {keys[name]}."]
        return "\n".join(body + asked)

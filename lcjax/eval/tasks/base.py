"""What the generated tasks share: one seeded draft function per task, filled to the budget and measured."""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from random import Random
from typing import Any, ClassVar

from lcjax.eval.budget import Draft, Encoder, Fitter
from lcjax.eval.haystack import Haystack, load_haystack
from lcjax.eval.metrics import metric
from lcjax.eval.task import Example

GENERATOR_VERSION = 2


@dataclass(frozen=True, kw_only=True)
class GeneratedTask:
    """Base of the tasks that are built from a seed.

    A subclass gives `draft`, a pure function of (rng, units, index). `units` is the amount of haystack (words, lines,
    sentences, pairs, ...); `step` is the first guess of it, `least` the smallest that makes sense.
    `chat=None` uses the tokenizer's chat template where it has one. `haystack` is as in `load_haystack`, `category` as
    in `Task`.
    """

    num_examples: int = 50
    chat: bool | None = None
    haystack: str = "python"
    category: str = ""

    kind: ClassVar[str] = ""
    metric: ClassVar[str] = "all_substrings"
    step: ClassVar[int] = 16

    @property
    def least(self) -> int:
        """Smallest number of haystack units."""
        return 1

    @property
    def most(self) -> int | None:
        """Largest number of haystack units, None for no end."""
        return None

    @property
    def name(self) -> str:
        """Name in tables; says which variant it is."""
        return self.kind

    def text(self) -> Haystack:
        """The haystack's sentences."""
        return load_haystack(self.haystack)

    def sized(self, fitter: Fitter) -> "GeneratedTask":
        """The form of the task for a budget, where it has more than one."""
        return self

    def draft(self, rng: Random, units: int, index: int) -> Draft:
        """Question number `index` with `units` of haystack."""
        raise NotImplementedError

    def examples(self, tokenizer: Encoder, budget: int, seed: int) -> Iterator[Example]:
        """Yield `num_examples` examples of at most `budget` tokens; BudgetError when even the smallest is larger."""
        chat = bool(tokenizer.chat_template) if self.chat is None else self.chat
        fitter = Fitter(tokenizer, budget, chat)
        task = self.sized(fitter)
        for index in range(self.num_examples):
            label = f"{self.name}-{seed}-{index}"
            draft, tokens = fitter.fit(
                lambda units, index=index, label=label: task.draft(Random(label), units, index),
                label,
                minimum=task.least,
                maximum=task.most,
                step=self.step,
            )
            common = {"prompt_tokens": tokens, "budget": budget, "seed": seed, "generator": GENERATOR_VERSION}
            metadata = {**draft.metadata, **common, "ideal": draft.ideal}
            yield Example(label, draft.prompt(chat), draft.references, draft.max_new_tokens, metadata)

    def score(self, example: Example, text: str) -> float | Mapping[str, float]:
        """The task's metric of an answer text."""
        return metric(self.metric)(text, example.references)

    def ideal(self, example: Example) -> str:
        """An answer that scores 1, for checks of a suite from end to end."""
        return str(example.metadata["ideal"])


def depth_grid(index: int, count: int = 11) -> float:
    """Depth of example `index` on an even grid over [0, 1]."""
    return (index % count) / (count - 1)


def spread_depths(rng: Random, count: int) -> list[float]:
    """`count` ascending depths out of RULER's 40 even steps, each once while there are enough of them."""
    steps = [round(100 * i / 39) / 100 for i in range(40)]
    drawn: list[float] = []
    while len(drawn) < count:
        drawn += rng.sample(steps, min(len(steps), count - len(drawn)))
    return sorted(drawn)


def haystack_facts(haystack: Haystack, **more: Any) -> dict[str, Any]:
    """Metadata that says which text was used."""
    return {"haystack": haystack.source, "haystack_sha256": haystack.fingerprint[:16], **more}

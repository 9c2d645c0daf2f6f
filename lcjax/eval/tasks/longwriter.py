"""LongBench-Write (Bai et al., 2024, arXiv 2408.07055): does the model write as much as asked, and well?

The length score is exact; the quality score needs a judge and is left out of the result without one.
"""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from typing import Any, ClassVar

from lcjax.eval.budget import Draft, Encoder, prompt_ids, require_fit
from lcjax.eval.metrics.judge import Judge, ask_scores, quality_score
from lcjax.eval.metrics.length import count_words, length_score
from lcjax.eval.task import Example
from lcjax.eval.tasks.rows import read_rows

DIMENSIONS = ("Relevance", "Accuracy", "Coherence", "Clarity", "Breadth and Depth", "Reading Experience")
BINS = (0, 500, 2000, 4000, 20000)
SUBJECTS = (
    "a guide to keeping bees in a small garden",
    "a story about a lighthouse keeper who finds a letter",
    "a history of how bread is made",
    "a report on the water supply of an imaginary town",
    "a travel book about a railway across a desert",
    "a plan for a school that teaches only by projects",
    "a biography of an invented composer",
    "an essay on why people collect things",
)
_TOKENS_PER_WORD = 2


@dataclass(frozen=True, kw_only=True)
class LongWrite:
    """Texts of a required length.

    `source`: JSON lines of {prompt, length, type}; empty: the ruler, eight subjects of ours at each of `lengths` words.
    New tokens are two a required word, and no more than the budget leaves: an item that could not be written within the
    budget is an error. `judge` answers a prompt with six scores of 1 to 5. `category`: see `Task`.
    """

    source: str = ""
    lengths: tuple[int, ...] = (1000, 2000, 5000)
    judge: Judge | None = None
    chat: bool | None = None
    category: str = ""
    kind: ClassVar[str] = "longbench_write"

    @property
    def name(self) -> str:
        """Name in tables."""
        return self.kind

    def examples(self, tokenizer: Encoder, budget: int, seed: int) -> Iterator[Example]:
        """One item a prompt; the metadata hold the required words and the bin they belong to."""
        chat = bool(tokenizer.chat_template) if self.chat is None else self.chat
        for number, row in enumerate(self._rows()):
            required = int(row["length"])
            facts = {"required_words": required, "bin": sum(required >= edge for edge in BINS[1:]), "type": row["type"]}
            ideal = " ".join(["word"] * required)
            draft = Draft(row["prompt"], (), _TOKENS_PER_WORD * required, answer=ideal, metadata=facts)
            tokens = len(prompt_ids(tokenizer, draft.prompt(chat)))
            label = f"{self.name}-{number}"
            least = max(draft.max_new_tokens, len(tokenizer.encode(ideal)))
            require_fit(label, tokens, least, budget)
            draft = replace(draft, max_new_tokens=least)
            metadata = {**facts, "prompt_tokens": tokens, "budget": budget, "ideal": ideal}
            yield Example(label, draft.prompt(chat), (), least, metadata)

    def _rows(self) -> list[dict[str, Any]]:
        if self.source:
            return read_rows(self.source, ("prompt", "length", "type"))
        return [
            {"prompt": f"Write {subject}. It should have {length} words.", "length": length, "type": "ruler"}
            for length in self.lengths
            for subject in SUBJECTS
        ]

    def score(self, example: Example, text: str) -> Mapping[str, float]:
        """The length score; with a judge also the quality, and the mean of the two first."""
        words = count_words(text)
        length = length_score(example.metadata["required_words"], words)
        if self.judge is None:
            return {"length_score": length}
        asked = self.judge_prompt(example, text)
        quality = quality_score(ask_scores(self.judge, asked, DIMENSIONS, low=1, high=5), DIMENSIONS) if words else 0.0
        return {"overall": (length + quality) / 2, "length_score": length, "quality_score": quality}

    def judge_prompt(self, example: Example, text: str) -> str:
        """What the judge is asked: six scores, whatever the length."""
        ask = example.prompt if isinstance(example.prompt, str) else example.prompt[0]["content"]
        fields = ", ".join(f'"{name}"' for name in DIMENSIONS)
        return (
            f"Judge a text that answers this request: {ask}\n\n<answer>\n{text}\n</answer>\n\n"
            f"Give each of {fields} an integer from 1 (poor) to 5 (excellent). Ignore how long the text is. "
            "Reply with one JSON object that holds these six numbers and nothing else."
        )

    def ideal(self, example: Example) -> str:
        """A text of the required number of words."""
        return str(example.metadata["ideal"])

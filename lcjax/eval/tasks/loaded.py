"""What the tasks that read a data set share: documents with a named truncation policy, scores by name."""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from typing import ClassVar

from lcjax.eval.budget import Draft, Encoder, Truncation, truncate_text
from lcjax.eval.metrics import metric
from lcjax.eval.task import Example


@dataclass(frozen=True)
class Row:
    """One question of a data set: the document, and how it becomes a prompt.

    `template` holds one `{document}`. `group` names rows that share the document, for prefix reuse.
    """

    id: str
    document: str
    template: str
    draft: Draft
    group: str = ""

    def build(self, document: str) -> Draft:
        """The draft with this document in it."""
        return replace(self.draft, body=self.template.replace("{document}", document, 1))


@dataclass(frozen=True, kw_only=True)
class LoadedTask:
    """Base of the tasks from data. A subclass gives `rows`.

    `truncation` is what happens to a document that is over the budget: "error" (default), "drop" (left out; every
    example's metadata say how many were), "head" or "tail" (the part that is kept) or "middle" (its first and last
    half are). `limit`: at most so many questions, None for all. `chat=None`: the tokenizer's template, if any.
    `category`: see `Task`.
    """

    source: str
    truncation: Truncation = "error"
    limit: int | None = None
    chat: bool | None = None
    category: str = ""

    kind: ClassVar[str] = ""

    @property
    def name(self) -> str:
        """Name in tables; says which variant it is."""
        return self.kind

    def rows(self) -> Iterator[Row]:
        """All questions in a fixed order."""
        raise NotImplementedError

    def template(self) -> bool | None:
        """Whether the task uses the chat template: None where the tokenizer decides."""
        return self.chat

    def examples(self, tokenizer: Encoder, budget: int, seed: int) -> Iterator[Example]:
        """Examples in the data set's order; BudgetError for a document over the budget under the policy "error"."""
        wanted = self.template()
        chat = bool(tokenizer.chat_template) if wanted is None else wanted
        made: list[Example] = []
        dropped = 0
        for row in self.rows():
            if len(made) == self.limit:
                break
            example = self._example(row, tokenizer, budget, chat)
            dropped += example is None
            made += [example] if example else []
        yield from (replace(example, metadata={**example.metadata, "dropped": dropped}) for example in made)

    def _example(self, row: Row, tokenizer: Encoder, budget: int, chat: bool) -> Example | None:
        """The row within the budget, None where the policy drops it."""
        ideal = len(tokenizer.encode(row.draft.ideal)) + 8
        row = replace(row, draft=replace(row.draft, max_new_tokens=max(row.draft.max_new_tokens, ideal)))
        fitted = truncate_text(tokenizer, row.document, row.build, budget, chat, self.truncation, row.id)
        if fitted is None:
            return None
        draft, tokens = fitted
        metadata = {**draft.metadata, "prompt_tokens": tokens, "budget": budget, "ideal": draft.ideal}
        metadata["prefix_group"] = row.group
        return Example(row.id, draft.prompt(chat), draft.references, draft.max_new_tokens, metadata)

    def score(self, example: Example, text: str) -> float | Mapping[str, float]:
        """The metric that the item's metadata names."""
        return metric(example.metadata["metric"])(text, example.references)

    def ideal(self, example: Example) -> str:
        """An answer that scores 1."""
        return str(example.metadata["ideal"])

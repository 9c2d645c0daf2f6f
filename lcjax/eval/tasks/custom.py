"""A user's own task: JSON lines of {id, prompt, references, metric, max_new_tokens} and optionally document, group.

`prompt` may hold `{document}`, which stands for the field `document` and is what a truncation policy cuts.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from lcjax.eval.budget import Draft
from lcjax.eval.metrics import metric
from lcjax.eval.tasks.loaded import LoadedTask, Row
from lcjax.eval.tasks.rows import RowError, read_rows

_FIELDS = ("id", "prompt", "references", "metric", "max_new_tokens")


@dataclass(frozen=True, kw_only=True)
class JsonTask(LoadedTask):
    """Reads `source`; the task's name is `label` or the file's."""

    label: str = ""

    @property
    def name(self) -> str:
        """`label`, or the file's stem."""
        return self.label or Path(self.source).stem

    def rows(self) -> Iterator[Row]:
        """Every row is checked before the first one is asked."""
        rows = read_rows(self.source, _FIELDS)
        for number, row in enumerate(rows, 1):
            try:
                metric(row["metric"])
            except ValueError as cause:
                raise RowError(f"{self.name}, row {number}: {cause}") from None
        for row in rows:
            references = tuple(row["references"])
            ideal = ", ".join(references) if row["metric"] == "all_substrings" else references[0]
            draft = Draft("", references, int(row["max_new_tokens"]), answer=ideal, metadata={"metric": row["metric"]})
            document = row.get("document", "")
            template = row["prompt"] if "{document}" in row["prompt"] else "{document}" + row["prompt"]
            yield Row(str(row["id"]), document, template, draft, group=str(row.get("group", "")))

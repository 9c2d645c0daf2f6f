"""What a person sees while a run goes on: a progress bar on a terminal, a line per report elsewhere."""

import math
from types import TracebackType

import rich.console
import rich.progress


class Progress:
    """A bar over `total` steps, starting at `done`; silent where `visible` is False (all processes but one)."""

    def __init__(self, total: int, done: int, *, visible: bool = True):
        self._console = rich.console.Console(quiet=not visible, highlight=False)
        columns = (
            rich.progress.TextColumn("step {task.completed:.0f}/{task.total:.0f}"),
            rich.progress.BarColumn(),
            rich.progress.TextColumn("loss {task.fields[loss]}  {task.fields[rate]} tokens/s"),
            rich.progress.TimeElapsedColumn(),
            rich.progress.TextColumn("left"),
            rich.progress.TimeRemainingColumn(),
        )
        self._bar = rich.progress.Progress(
            *columns, console=self._console, disable=not self._console.is_terminal, transient=True
        )
        self._task = self._bar.add_task("train", total=total, completed=done, loss="-", rate="-")
        self._total = total

    def __enter__(self) -> "Progress":
        self._bar.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._bar.stop()

    def advance(self) -> None:
        """One step was started."""
        self._bar.advance(self._task)

    def report(self, step: int, loss: float, tokens_per_second: float, mfu: float | None) -> None:
        """Show a report in the bar and as a line above it."""
        shown = f"{loss:.4f}" if math.isfinite(loss) else str(loss)
        rate = f"{tokens_per_second:,.0f}"
        self._bar.update(self._task, loss=shown, rate=rate)
        share = "" if mfu is None else f"  MFU {mfu:.1%}"
        self.say(f"step {step:>{len(str(self._total))}}/{self._total}  loss {shown}  {rate} tokens/s{share}")

    def say(self, text: str) -> None:
        """A line of text, above the bar."""
        self._console.print(text, markup=False, soft_wrap=True)

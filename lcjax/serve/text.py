"""From token ids to text as it comes: no half characters, nothing past a stop string."""

from collections.abc import Sequence

from lcjax.data.tokenizers import Tokenizer

UNFINISHED = "\ufffd"  # what a decoder shows for bytes that are not (yet) a character


class TextStream:
    """Feed ids with `push`; each call returns the text that is final by then. `stopped` after a stop string."""

    def __init__(self, tokenizer: Tokenizer, stop: Sequence[str] = ()):
        if "" in stop:
            raise ValueError("stop: an empty stop string would end every text at once; remove it")
        self._tokenizer = tokenizer
        self._stop = tuple(stop)
        self._ids: list[int] = []
        self._shown = 0  # ids before this one are in the text already...
        self._context = 0  # ...and are decoded again from here, for tokenizers that join neighbours with spaces
        self._held = ""
        self.text = ""
        self.stopped = False

    def push(self, ids: Sequence[int]) -> str:
        """Take more ids; return new text."""
        if self.stopped:
            return ""
        for token in ids:
            self._ids.append(int(token))
            self._held += self._new_text(final=False)
            if self._cut_at_stop():
                return self._release(len(self._held))
        return self._release(len(self._held) - self._possible_stop())

    def finish(self) -> str:
        """The rest, when no more ids come."""
        if self.stopped:
            return ""
        self._held += self._new_text(final=True)
        self._cut_at_stop()
        return self._release(len(self._held))

    def _new_text(self, final: bool) -> str:
        shown = self._tokenizer.decode(self._ids[self._context : self._shown], skip_special=True)
        known = self._tokenizer.decode(self._ids[self._context :], skip_special=True)
        unfinished = known.endswith(UNFINISHED) and not final
        if len(known) <= len(shown) or unfinished:
            return ""
        self._context, self._shown = self._shown, len(self._ids)
        return known[len(shown) :]

    def _cut_at_stop(self) -> bool:
        found = [self._held.find(stop) for stop in self._stop]
        found = [place for place in found if place >= 0]
        if not found:
            return False
        self._held, self.stopped = self._held[: min(found)], True
        return True

    def _possible_stop(self) -> int:
        """Length of the longest tail that a stop string may still complete."""
        sizes = (
            size
            for stop in self._stop
            for size in range(min(len(stop) - 1, len(self._held)), 0, -1)
            if self._held.endswith(stop[:size])
        )
        return max(sizes, default=0)

    def _release(self, size: int) -> str:
        out, self._held = self._held[:size], self._held[size:]
        self.text += out
        return out

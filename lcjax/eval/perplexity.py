"""Perplexity of one long text, by context length and by position.

Inputs are tokens[start : start + N] and targets the tokens one later, N for each of `lengths`. The whole text is one
context, read in chunks through the cache, so that neither T x T scores nor T x V logits ever exist. With `context`,
each target sees only the tokens shortly before it instead: compare the two on the same targets. With `targets`, the
same last tokens are scored for every N, given the N tokens that lead up to them: what more context is worth.
"""

import functools
import json
import math
import time
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax import lax
from jaxtyping import Array, Bool, Float, Int
from rich.console import Console
from rich.progress import track

from lcjax.cache import init_caches
from lcjax.eval.measure import Table
from lcjax.eval.metrics.statistics import bootstrap_interval
from lcjax.eval.plots import by_position
from lcjax.serve.source import Loaded

PIECE = 64  # tokens whose logits exist at a time
BLOCK, FEWEST = 512, 8  # neighbouring targets are alike: an interval draws stretches, and needs this many


@dataclass(frozen=True)
class Perplexity:
    """Perplexity of the file `text` for each of `lengths`; several files are read one after another, as one text.

    start: first input token. window: tokens averaged for one point by position. max_chars: only the beginning of the
    text is tokenized. context: None for one context of all tokens; else a sliding context of at most this many tokens
    (each target sees at least half of it, the first ones what there is). targets: None, or how many tokens at the
    end of tokens[start : start + max(lengths)] are scored for every length; N then counts backwards. add_bos: put
    the beginning-of-text token before the inputs; the targets stay the same. chunk: tokens read at a time. batch:
    sliding contexts read together.
    """

    text: str | tuple[str, ...]
    start: int = 0
    lengths: tuple[int, ...] = (4096,)
    window: int = 2048
    max_chars: int = 2_000_000
    context: int | None = None
    targets: int | None = None
    add_bos: bool = False
    chunk: int = 512
    batch: int = 4
    name: str = "perplexity"

    def __post_init__(self):
        if not self.text:
            raise ValueError("perplexity.text is empty; name a file or several")
        for name in ("window", "max_chars", "chunk", "batch"):
            if getattr(self, name) < 1:
                raise ValueError(f"perplexity.{name} must be positive, got {getattr(self, name)}")
        if not self.lengths or min(self.lengths) < 1 or self.start < 0:
            raise ValueError(f"perplexity: lengths {self.lengths} must be positive and start {self.start} not negative")
        if self.context is not None and self.context < 2:
            raise ValueError(f"perplexity.context must be at least 2 tokens, got {self.context}")
        if self.targets is not None and not 1 <= self.targets <= min(self.lengths):
            raise ValueError(
                f"perplexity.targets is {self.targets}; it must lie in 1..{min(self.lengths)}, the least length"
            )
        if self.targets is not None and self.context is not None:
            raise ValueError("perplexity: context and targets are two different comparisons; set one of them")

    def check(self) -> None:
        """Refuse a missing text before the model is loaded."""
        for path in self.files:
            if not path.is_file():
                raise FileNotFoundError(f"perplexity.text names {str(path)!r}, which is not a file; correct the path")

    @property
    def files(self) -> tuple[Path, ...]:
        """The files of the text, in order."""
        return tuple(map(Path, (self.text,) if isinstance(self.text, str) else self.text))

    @property
    def title(self) -> str:
        """Of figures."""
        others = len(self.files) - 1
        named = self.files[0].stem + (f" and {others} more" if others else "")
        return f"{named}, windows of {self.window:,} tokens"

    def run(self, model: Loaded, output: Path) -> dict[str, Table]:
        """{name: {N: perplexity}, name_by_position: {end of window: perplexity of its targets}}.

        Also name_low and name_high, 95 % bootstrap intervals over stretches of BLOCK targets, where there are FEWEST.
        """
        tokens = self.tokens(model)
        if self.targets is not None:
            losses = {str(n): self._leading_up(model, tokens, n) for n in self.lengths}
            found = {n: perplexity(nll) for n, nll in losses.items()}
            print(f"{self.name} of the same {self.targets} tokens by context: {found}", flush=True)
            return {self.name: found, **intervals(self.name, losses)}
        began = time.perf_counter()
        nll = self.losses(model, tokens)
        rate = len(nll) / (time.perf_counter() - began)
        table = {str(n): perplexity(nll[:n]) for n in self.lengths}
        windows = self.windows(nll)
        self._write(windows, model, output)
        print(f"{self.name}: {table}, {rate:,.0f} tokens/s with compilation", flush=True)
        places = {f"{self.name}_by_position": {str(end): value for end, value in windows.items()}}
        return {self.name: table, **intervals(self.name, {str(n): nll[:n] for n in self.lengths}), **places}

    def _write(self, windows: dict[int, float], model: Loaded, output: Path) -> None:
        """The curve by position as JSON lines and as a figure."""
        names = [path.name for path in self.files]
        with (output / f"{self.name}.jsonl").open("w") as file:
            for end, value in windows.items():
                row = {"text": names, "begin": end - self.window, "end": end, "perplexity": value}
                file.write(json.dumps(row) + "\n")
        if windows:
            curve = np.array([0, *windows]), np.array(list(windows.values()))
            path = output / f"{self.name}.png"
            by_position({model.source: curve}, title=self.title, path=path, trained=model.spec.max_length)

    def windows(self, nll: np.ndarray) -> dict[int, float]:
        """{end of a window: perplexity of its targets}; the last one is left out where it is not whole."""
        return {end: perplexity(nll[end - self.window : end]) for end in range(self.window, len(nll) + 1, self.window)}

    def _leading_up(self, model: Loaded, tokens: np.ndarray, length: int) -> np.ndarray:
        """Losses of the last targets, given the `length` tokens up to the end."""
        bos = self._bos(model)
        rows = np.concatenate([bos, tokens[-length - 1 :]])[None]
        return score(model, rows, self.chunk, self.targets, len(bos) + max(self.lengths))[0]

    def _bos(self, model: Loaded) -> np.ndarray:
        if not self.add_bos:
            return np.zeros(0, np.int32)
        if model.tokenizer.bos_id is None:
            raise ValueError(
                "perplexity.add_bos: the model's tokenizer has no beginning-of-text token; set it to False"
            )
        return np.array([model.tokenizer.bos_id], np.int32)

    def tokens(self, model: Loaded) -> np.ndarray:
        """The inputs of the longest length and one more."""
        self.check()
        ids = model.tokenizer.encode(self._read(), add_bos=False)
        needed = self.start + max(self.lengths) + 1
        if len(ids) < needed:
            raise ValueError(
                f"perplexity.text {self.text!r} has {len(ids)} tokens in its first {self.max_chars} characters, but "
                f"start {self.start} and length {max(self.lengths)} need {needed}; use a longer text or shorter lengths"
            )
        return np.array(ids[self.start : needed], np.int32)

    def _read(self) -> str:
        """The beginning of the text, `max_chars` long where the files have as much."""
        parts, left = [], self.max_chars
        for path in self.files:
            with path.open(encoding="utf-8") as file:
                parts.append(file.read(left))
            left -= len(parts[-1])
        return "".join(parts)

    def losses(self, model: Loaded, tokens: np.ndarray) -> np.ndarray:
        """Negative log-likelihood in nats of each token after the first."""
        bos = self._bos(model)
        if self.context is None:
            return score(model, np.concatenate([bos, tokens])[None], self.chunk, grows=True)[0, len(bos) :]
        return self._sliding(model, tokens, bos)

    def _sliding(self, model: Loaded, tokens: np.ndarray, bos: np.ndarray) -> np.ndarray:
        """Contexts that overlap by half; each scores the targets that the one before did not."""
        assert self.context is not None
        count = len(tokens) - 1
        width = min(self.context - len(bos), count)
        step = max(width // 2, 1)
        begins = [*range(0, count - width, step), count - width]
        nll, done = np.zeros(count), 0
        for group in range(0, len(begins), self.batch):
            mine = begins[group : group + self.batch]
            rows = np.stack([np.concatenate([bos, tokens[b : b + width + 1]]) for b in mine])
            padded = np.pad(rows, ((0, min(self.batch, len(begins)) - len(mine)), (0, 0)))
            for begin, losses in zip(mine, score(model, padded, self.chunk)[:, len(bos) :], strict=False):
                nll[done : begin + width] = losses[done - begin :]
                done = begin + width
        return nll


def stretches(nll: np.ndarray) -> list[float]:
    """Mean losses of BLOCK targets each; none for a text of fewer than FEWEST such stretches."""
    means = nll[: len(nll) // BLOCK * BLOCK].reshape(-1, BLOCK).mean(axis=1)
    return means.tolist() if len(means) >= FEWEST else []


def intervals(name: str, losses: Mapping[str, np.ndarray]) -> dict[str, Table]:
    """{name_low: {N: perplexity}, name_high: ...} of the losses by length."""
    found: dict[str, dict[str, float]] = {}
    for length, nll in losses.items():
        if drawn := stretches(nll):
            _, low, high, _ = bootstrap_interval(drawn)
            found.setdefault(f"{name}_low", {})[length] = math.exp(low)
            found.setdefault(f"{name}_high", {})[length] = math.exp(high)
    return dict(found)


def score(
    model: Loaded,
    rows: np.ndarray,
    chunk: int,
    last: int | None = None,
    longest: int | None = None,
    grows: bool = False,
) -> np.ndarray:
    """rows `[B,N+1]` of tokens -> negative log-likelihood `[B,N]` (float64) of each token given all before it.

    With `last`, only that of the last tokens, `[B,last]`. With `longest`, the largest N of several calls, one program
    serves all of them. Laws that follow the length see all N tokens from the start, as in one pass; those of a text
    that `grows` see what was read so far.
    """
    batch, count = rows.shape[0], rows.shape[1] - 1
    chunk = min(chunk, count)
    whole = lambda tokens: -(-tokens // chunk) * chunk
    model = model.at(whole(count))
    caches = init_caches(model.spec, batch, whole(longest or count))
    first = 0 if last is None else count - last
    lengths = None if grows else np.full(batch, count, np.int32)
    pieces = []
    console = Console(stderr=True)
    chunks = track(list(_chunks(rows, chunk)), "reading", console=console, disable=not console.is_terminal)
    for begin, (tokens, targets, valid) in chunks:
        if begin + chunk <= first:
            caches = _reader(model.graphdef)(model.params, caches, tokens, valid, lengths)
        else:
            nll, caches = _scorer(model.graphdef)(model.params, caches, tokens, targets, valid, lengths)
            pieces.append(np.asarray(nll, np.float64))
    scored = np.concatenate(pieces, axis=1)
    return scored[:, : scored.shape[1] - -count % chunk][:, -(count - first) :]


def _chunks(rows: np.ndarray, chunk: int) -> Iterator[tuple[int, tuple[np.ndarray, np.ndarray, np.ndarray]]]:
    """(first position, (tokens, targets, valid)) of each chunk."""
    batch, count = rows.shape[0], rows.shape[1] - 1
    padded = np.pad(rows, ((0, 0), (0, -count % chunk))).astype(np.int32)
    for begin in range(0, count, chunk):
        valid = np.broadcast_to(np.arange(begin, begin + chunk) < count, (batch, chunk))
        yield begin, (padded[:, begin : begin + chunk], padded[:, begin + 1 : begin + chunk + 1], valid)


@functools.lru_cache(maxsize=4)
def _reader(graphdef: Any) -> Any:
    """One chunk into the caches; compiled once per model and shape."""

    def read(
        params: Any, caches: Any, tokens: Int[Array, "B C"], valid: Bool[Array, "B C"], lengths: Any
    ) -> tuple[Any, ...]:
        return nnx.merge(graphdef, params).hidden(tokens, caches=caches, valid=valid, lengths=lengths)[1]

    return jax.jit(read, donate_argnums=1)


@functools.lru_cache(maxsize=4)
def _scorer(graphdef: Any) -> Any:
    """As `_reader`, and the losses `[B,C]` of the targets."""

    def read(
        params: Any, caches: Any, tokens: Array, targets: Int[Array, "B C"], valid: Array, lengths: Any
    ) -> tuple[Array, Any]:
        model = nnx.merge(graphdef, params)
        hidden, caches = model.hidden(tokens, caches=caches, valid=valid, lengths=lengths)
        return token_losses(model, hidden, targets), caches

    return jax.jit(read, donate_argnums=1)


def token_losses(model: Any, hidden: Float[Array, "B T width"], targets: Int[Array, "B T"]) -> Float[Array, "B T"]:
    """Cross-entropy of each target, from logits that exist for PIECE tokens of a row at a time."""
    batch, length, width = hidden.shape
    pieces = -(-length // PIECE)
    pad = pieces * PIECE - length
    hidden = jnp.pad(hidden, ((0, 0), (0, pad), (0, 0))).reshape(batch, pieces, PIECE, width).swapaxes(0, 1)
    targets = jnp.pad(targets, ((0, 0), (0, pad))).reshape(batch, pieces, PIECE).swapaxes(0, 1)

    def losses(piece: tuple[Array, Array]) -> Array:
        logits = model.logits(piece[0])
        return jax.nn.logsumexp(logits, axis=-1) - jnp.take_along_axis(logits, piece[1][..., None], axis=-1)[..., 0]

    return lax.map(losses, (hidden, targets)).swapaxes(0, 1).reshape(batch, -1)[:, :length]


def perplexity(nll: np.ndarray) -> float:
    """Of targets with these losses, in nats."""
    return math.exp(float(np.mean(nll)))

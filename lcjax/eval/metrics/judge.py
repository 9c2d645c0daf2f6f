"""Judging by a model: a protocol, a local model, and an HTTP endpoint with the OpenAI chat schema."""

import json
import os
import re
import urllib.error
import urllib.request
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Protocol, runtime_checkable


class JudgeError(RuntimeError):
    """The judge gave no usable answer; the message names the judge and the cause."""


@runtime_checkable
class Judge(Protocol):
    """Anything that answers a prompt with a text."""

    @property
    def name(self) -> str:
        """Who judges."""
        ...

    def __call__(self, prompt: str) -> str: ...


@dataclass(frozen=True)
class LocalJudge:
    """A judge behind a plain function, for example the decode engine of a loaded model."""

    generate: Callable[[str], str]
    name: str = "local"

    def __call__(self, prompt: str) -> str:
        return self.generate(prompt)


@dataclass(frozen=True)
class HttpJudge:
    """POSTs to `{url}/chat/completions`; the key, if any, comes from the environment variable named `key_variable`."""

    url: str
    model: str
    timeout: float = 60.0
    max_tokens: int = 512
    key_variable: str = ""

    @property
    def name(self) -> str:
        """Model and address."""
        return f"{self.model} at {self.url}"

    def __call__(self, prompt: str) -> str:
        body = {
            "model": self.model,
            "messages": [{"role": "user", "content": prompt}],
            "temperature": 0.0,
            "max_tokens": self.max_tokens,
        }
        headers = {"Content-Type": "application/json"}
        if self.key_variable:
            headers["Authorization"] = f"Bearer {os.environ.get(self.key_variable, '')}"
        address = self.url.rstrip("/") + "/chat/completions"
        request = urllib.request.Request(address, json.dumps(body).encode(), headers)
        try:
            with urllib.request.urlopen(request, timeout=self.timeout) as reply:
                answer = json.load(reply)
            return str(answer["choices"][0]["message"]["content"])
        except TimeoutError:
            raise JudgeError(f"judge {self.name} gave no answer in {self.timeout:g} s; raise `timeout`") from None
        except (urllib.error.URLError, json.JSONDecodeError, KeyError, IndexError, TypeError) as cause:
            if isinstance(getattr(cause, "reason", None), TimeoutError):
                raise JudgeError(f"judge {self.name} gave no answer in {self.timeout:g} s; raise `timeout`") from None
            raise JudgeError(f"judge {self.name} failed: {type(cause).__name__}: {cause}") from None


def ask_scores(
    judge: Judge, prompt: str, fields: Sequence[str], *, low: int, high: int, retries: int = 5
) -> dict[str, int]:
    """Integers for the named fields from a JSON object in the judge's reply; asks again when none can be read.

    A field that a readable reply leaves out is not in the result. Raises JudgeError after `retries` unreadable replies.
    """
    for _ in range(retries):
        reply = judge(prompt)
        for block in re.findall(r"\{[^{}]*\}", reply):
            try:
                values = json.loads(block)
            except json.JSONDecodeError:
                continue
            found = {name: values[name] for name in fields if isinstance(values.get(name), int)}
            if found:
                return {name: min(high, max(low, value)) for name, value in found.items()}
    raise JudgeError(f"judge {judge.name} gave no readable scores for {', '.join(fields)} in {retries} replies")


def quality_score(scores: dict[str, int], fields: Sequence[str], missing: int = 3) -> float:
    """LongWriter's S_q / 100: the mean over fields of (score - 1) / 4, missing fields taken as 3."""
    return sum((scores.get(name, missing) - 1) / 4 for name in fields) / len(fields)

"""A judge that is a model of ours, loaded when it is first asked."""

import functools
from dataclasses import dataclass, field

from lcjax.eval.budget import Draft, prompt_ids
from lcjax.eval.metrics.judge import LocalJudge
from lcjax.serve.engine import Engine, Generator, Request
from lcjax.serve.source import Pretrained


@dataclass(frozen=True)
class ModelJudge:
    """Greedy answers of `model`, through its chat template where it has one."""

    model: Pretrained
    max_tokens: int = 256
    engine: Engine = field(default_factory=lambda: Engine(batch=1))

    @property
    def name(self) -> str:
        """The model's source."""
        return self.model.source

    def __call__(self, prompt: str) -> str:
        return _load(self)(prompt)


@functools.lru_cache(maxsize=1)
def _load(judge: ModelJudge) -> LocalJudge:
    loaded = judge.model.load()
    generator = Generator(loaded.graphdef, loaded.params, loaded.spec, loaded.tokenizer, judge.engine)

    def generate(prompt: str) -> str:
        chat = Draft(prompt, (), judge.max_tokens).prompt(bool(loaded.tokenizer.chat_template))
        ids = tuple(prompt_ids(loaded.tokenizer, chat))
        (answer,) = generator.generate([Request(ids, max_new_tokens=judge.max_tokens)])
        return answer.text

    return LocalJudge(generate, judge.name)

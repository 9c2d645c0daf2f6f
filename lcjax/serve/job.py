"""The job behind `decode.py`: answer prompts with a model."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import jax

from lcjax.models.spec import ModelSpec
from lcjax.parallel.mesh import MeshSpec
from lcjax.parallel.rules import shardings, spread
from lcjax.serve.engine import Completion, Engine, Generator, Request
from lcjax.serve.report import Report
from lcjax.serve.sampling import Sampling
from lcjax.serve.source import Loaded, Pretrained


@dataclass(frozen=True)
class Generate:
    """How to answer. chat: render each prompt as a user's message with the model's chat template, after `system`.

    mesh: spread requests over data and fsdp, heads over tensor; None uses one device. A bare spec can only be sized.
    """

    model: Pretrained | ModelSpec
    engine: Engine = field(default_factory=Engine)
    sampling: Sampling = field(default_factory=Sampling)
    max_new_tokens: int = 128
    stop: tuple[str, ...] = ()
    chat: bool = False
    system: str | None = None
    mesh: MeshSpec | None = None

    def __post_init__(self):
        if self.system is not None and not self.chat:
            raise ValueError("generate.system is for chats; set generate.chat = True or remove it")

    def request(self, prompt: str, loaded: Loaded) -> Request:
        """The request for one prompt. A rendered chat brings its own special tokens, also at its start."""
        common = {"max_new_tokens": self.max_new_tokens, "stop": self.stop, "sampling": self.sampling}
        if not self.chat:
            return Request(prompt, **common)
        messages = [{"role": "system", "content": self.system}] if self.system is not None else []
        text = loaded.tokenizer.render_chat([*messages, {"role": "user", "content": prompt}])
        return Request(tuple(loaded.tokenizer.encode(text)), **common)

    def spec(self) -> ModelSpec:
        """The model's shape."""
        return self.model if isinstance(self.model, ModelSpec) else self.model.read().spec

    def _load(self) -> Loaded:
        if isinstance(self.model, ModelSpec):
            raise ValueError("generate.model is a ModelSpec, which has no weights: bind it to @pretrained()")
        return self.model.load()

    def run(
        self, prompts: Sequence[str], show: Callable[[str], None], loaded: Loaded | None = None
    ) -> tuple[list[Completion], Report]:
        """Answer, passing text to `show`: a single answer as it comes, several each when it is whole."""
        if not prompts:
            raise ValueError("there is no prompt: give --prompt, --prompt_file or text on standard input")
        if self.mesh is None and jax.process_count() > 1:
            raise ValueError(
                f"generate.mesh is not set, and {jax.process_count()} processes answer together: bind it to @Mesh(), "
                "such as Mesh.fsdp = -1"
            )
        loaded = loaded or self._load()
        requests = [self.request(prompt, loaded) for prompt in prompts]
        completions = [Completion() for _ in requests]
        params, mesh = loaded.params, None if self.mesh is None else self.mesh.build()
        if mesh is not None:
            params = spread(params, shardings(params, mesh))
        generator = Generator(loaded.graphdef, params, loaded.spec, loaded.tokenizer, self.engine, mesh=mesh)
        for piece in generator.stream(requests, completions):
            if len(prompts) == 1:
                show(piece.text + "\n" * piece.done)
            elif piece.done:
                show(f"[{piece.index}] {completions[piece.index].text}\n")
        return completions, generator.report

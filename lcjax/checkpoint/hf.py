"""Pretrained weights in and out: HF safetensors folders, GGUF files, models on the Hugging Face hub."""

import json
import math
import shutil
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from lcjax.checkpoint import gguf, safetensors
from lcjax.checkpoint.source import TensorFileError, TensorSource
from lcjax.models import native
from lcjax.models.decoder import abstract
from lcjax.models.family import Family
from lcjax.models.from_gguf import config_from_gguf
from lcjax.models.registry import family_of_config, spec_to_hf
from lcjax.models.spec import ModelSpec
from lcjax.parallel.rules import shardings

HUB_FILES = [
    "config.json",
    "*.safetensors",
    "*.safetensors.index.json",
    "tokenizer*",
    "*.model",
    "special_tokens_map.json",
]
TOKENIZER_FILES = ("tokenizer.json", "tokenizer.model", "tokenizer_config.json", "special_tokens_map.json")
# Stored by some exporters, computed here; and the text tower's prefixes in multimodal checkpoints.
COMPUTED = ("rotary_emb.inv_freq", "rope_freqs.weight")
TEXT_PREFIXES = ("model.language_model.", "language_model.model.")
OTHER_TOWERS = ("vision_tower.", "multi_modal_projector.", "model.vision_tower.", "model.multi_modal_projector.")


@dataclass(frozen=True)
class Pretrained:
    """A loaded model: `params` fits `lcjax.models.decoder.abstract(spec)`; `tokenizer_source` loads its tokenizer."""

    spec: ModelSpec
    params: nnx.State
    tokenizer_source: str


def load_pretrained(source: str | Path, *, dtype: str = "float32", mesh: jax.sharding.Mesh | None = None) -> Pretrained:
    """Load a model, tensor by tensor, into arrays of `dtype` ('float32' or 'bfloat16'), sharded when a mesh is given.

    source: a HF folder (config.json and safetensors), a `*.gguf` file, or "hf:org/name" for the Hugging Face hub.
    The spec computes in `dtype`. Raises ValueError naming the config field, tensor or file that doesn't fit.
    """
    path = _download(str(source)) if str(source).startswith("hf:") else Path(source)
    if path.suffix == ".gguf":
        tensors: TensorSource = gguf.open_file(path)
        config = config_from_gguf(tensors)
    else:
        config = _read_config(path)
        tensors = safetensors.open_folder(path)
    family = family_of_config(config)
    spec = replace(family.spec_from_hf(config), dtype=dtype)
    reader = _Reader(tensors, family, spec, is_gguf=path.suffix == ".gguf", path=path)
    return Pretrained(spec, reader.load(mesh), str(path))


def _download(source: str) -> Path:
    import huggingface_hub

    try:
        return Path(huggingface_hub.snapshot_download(source.removeprefix("hf:"), allow_patterns=HUB_FILES))
    except (OSError, ValueError) as error:
        raise ValueError(f"{source} could not be fetched from the Hugging Face hub: {error}") from error


def _read_config(folder: Path) -> dict[str, Any]:
    file = folder / "config.json"
    if not file.is_file():
        raise FileNotFoundError(f"{folder} has no config.json; give a HF model folder, a .gguf file or 'hf:org/name'")
    try:
        config = json.loads(file.read_text())
    except json.JSONDecodeError as error:
        raise ValueError(f"{file} is not valid JSON ({error}); fetch it again") from error
    if not isinstance(config, dict):
        raise ValueError(f"{file} holds a {type(config).__name__}, not an object; fetch it again")
    return config


def _flat(params: nnx.State) -> list[tuple[tuple[Any, ...], nnx.Variable]]:
    return list(nnx.to_flat_state(params))


def _dotted(path: tuple[Any, ...]) -> str:
    return ".".join(map(str, path))


def _stored_shape(path: str, shape: tuple[int, ...]) -> tuple[int, ...]:
    """Shape of a parameter in a file: kernels are [out, in] there, all else is as here with merged axes."""
    if path.endswith("kernel"):
        inputs = 2 if path.endswith("mixer.out.kernel") else 1
        return math.prod(shape[inputs:]), math.prod(shape[:inputs])
    return shape if path == "embed.table" else (math.prod(shape),)


def _unpaired(array: np.ndarray, head_dim: int) -> np.ndarray:
    """Rows of each head from interleaved rotary pairs (0, n, 1, n + 1, ...) back to two halves."""
    heads = array.reshape(-1, head_dim // 2, 2, *array.shape[1:])
    return heads.swapaxes(1, 2).reshape(array.shape)


@dataclass(frozen=True)
class _Reader:
    """Maps the tensors of one file or folder to parameters."""

    tensors: TensorSource
    family: Family
    spec: ModelSpec
    is_gguf: bool
    path: Path

    def load(self, mesh: jax.sharding.Mesh | None) -> nnx.State:
        _, params = abstract(self.spec, jnp.dtype(self.spec.dtype))
        flat = _flat(params)
        places = [None] * len(flat) if mesh is None else [v.get_value() for _, v in _flat(shardings(params, mesh))]
        names = self._match([_dotted(path) for path, _ in flat])
        loaded = [
            (path, variable.replace(self._array(_dotted(path), names[_dotted(path)], variable, place)))
            for (path, variable), place in zip(flat, places, strict=True)
        ]
        return nnx.from_flat_state(loaded)

    def _match(self, paths: list[str]) -> dict[str, str]:
        """File name of every parameter; missing and unexpected tensors are errors."""
        stored = {self._canonical(name): name for name in self.tensors.names()}
        wanted = {path: self.family.names(path)[self.is_gguf] for path in paths}
        missing = [name for name in wanted.values() if name not in stored]
        if missing:
            raise TensorFileError(f"{self.path} lacks {len(missing)} tensors of the model, the first is {missing[0]!r}")
        unexpected = sorted(
            set(stored) - set(wanted.values()) - ({"lm_head.weight"} if self.spec.tie_embeddings else set())
        )
        unexpected = [name for name in unexpected if not name.endswith(COMPUTED) and not name.startswith(OTHER_TOWERS)]
        if unexpected:
            raise TensorFileError(
                f"{self.path} holds {len(unexpected)} tensors that its config doesn't explain, "
                f"the first is {unexpected[0]!r}"
            )
        return {path: stored[name] for path, name in wanted.items()}

    @staticmethod
    def _canonical(name: str) -> str:
        for prefix in TEXT_PREFIXES:
            if name.startswith(prefix):
                return "model." + name.removeprefix(prefix)
        return name.removeprefix("language_model.") if name == "language_model.lm_head.weight" else name

    def _array(self, path: str, name: str, variable: nnx.Variable, place: Any) -> jax.Array:
        shape, dtype = variable.shape, np.dtype(variable.dtype)
        due = _stored_shape(path, shape)
        if tuple(self.tensors.shape(name)) != due:
            raise TensorFileError(
                f"{self.path}: tensor {name!r} has shape {self.tensors.shape(name)}; the config needs {due}"
            )
        array = self.tensors.read(name)
        if self.is_gguf and self.family.gguf_pairs and path.split(".")[-2] in ("query", "key"):
            array = _unpaired(array, self.spec.head_dim)
        if self.is_gguf and self.spec.norm_offset and "norm" in path.split(".")[-2]:
            array = array - self.spec.norm_offset
        array = (array.T if path.endswith("kernel") else array).reshape(shape).astype(dtype)
        if place is None:
            return jnp.asarray(array)
        return jax.make_array_from_callback(shape, place, lambda index: array[index])


def _stored_tensors(family: Family, params: nnx.State) -> Iterator[tuple[str, np.ndarray]]:
    """(HF name, array in HF's layout) of every parameter, one at a time."""
    for path, variable in _flat(params):
        dotted, array = _dotted(path), np.asarray(variable.get_value())
        rows = _stored_shape(dotted, array.shape)
        yield family.names(dotted)[0], array.reshape(rows[::-1]).T if dotted.endswith("kernel") else array.reshape(rows)


def export_pretrained(
    spec: ModelSpec, params: nnx.State, folder: str | Path, tokenizer: str | Path | None = None
) -> None:
    """Write config.json and safetensors that `load_pretrained` reads, in the parameters' dtype.

    HF transformers reads them too, unless no HF family expresses the spec: then its `model_type` is 'lcjax'.
    tokenizer: a folder whose tokenizer files are copied along.
    """
    try:
        family, config = spec_to_hf(spec)
    except ValueError:
        family, config = native.FAMILY, native.spec_to_config(spec)
    folder = Path(folder)
    dtype = str(jax.tree.leaves(params)[0].dtype)
    safetensors.write_folder(folder, _stored_tensors(family, params))
    (folder / "config.json").write_text(json.dumps(config | {"torch_dtype": dtype}, indent=2) + "\n")
    if tokenizer is None:
        return
    copied = [name for name in TOKENIZER_FILES if (Path(tokenizer) / name).is_file()]
    if not copied:
        raise FileNotFoundError(f"{tokenizer} holds none of {', '.join(TOKENIZER_FILES)}")
    for name in copied:
        shutil.copyfile(Path(tokenizer) / name, folder / name)

"""Text to training batches: corpora, tokenizers and the input pipeline.

`grain` and `tensorflow_datasets` take seconds to import; the names that need them load on first use.
"""

from typing import Any

from lcjax.data.excerpts import Excerpts
from lcjax.data.sources import DataError, JsonLines, PythonStdlib, SourceTree, TextFiles, TFDSText
from lcjax.data.spec import DataSpec, Mixture
from lcjax.data.tokenizers import Tokenizer, TokenizerError, load_tokenizer

__all__ = [
    "DataError",
    "DataSpec",
    "Excerpts",
    "JsonLines",
    "Mixture",
    "PythonStdlib",
    "SourceTree",
    "TFDSText",
    "TextFiles",
    "Tokenizer",
    "TokenizerError",
    "build_pipeline",
    "load_tokenizer",
    "merge_states",
]


def __getattr__(name: str) -> Any:
    if name in ("build_pipeline", "merge_states", "Pipeline"):
        from lcjax.data import pipeline

        return getattr(pipeline, name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")

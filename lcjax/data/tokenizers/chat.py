"""Chat templates: Jinja in a sandbox, with the names and white-space rules that Hugging Face templates expect."""

import datetime
import functools
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jinja2
import jinja2.ext
import jinja2.nodes
import jinja2.sandbox

from lcjax.data.tokenizers.base import TokenizerError


class _Generation(jinja2.ext.Extension):
    """`{% generation %}` marks the assistant's text for training masks; rendering passes it through."""

    tags = {"generation"}  # noqa: RUF012 - the attribute's type is the base class's

    def parse(self, parser: Any) -> Any:
        line = next(parser.stream).lineno
        body = parser.parse_statements(("name:endgeneration",), drop_needle=True)
        return jinja2.nodes.Scope(body).set_lineno(line)


def _raise(message: str) -> None:
    raise jinja2.TemplateError(message)


def _tojson(value: Any, ensure_ascii: bool = False, indent: int | None = None, **options: Any) -> str:
    """Plain JSON: Jinja's own filter escapes `<`, `>`, `&` and `'` for HTML."""
    return json.dumps(value, ensure_ascii=ensure_ascii, indent=indent, **options)


def _now(pattern: str) -> str:
    return datetime.datetime.now().strftime(pattern)


@functools.lru_cache(maxsize=32)
def _compile(template: str) -> jinja2.Template:
    environment = jinja2.sandbox.ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=[_Generation, jinja2.ext.loopcontrols]
    )
    environment.filters["tojson"] = _tojson
    return environment.from_string(template, globals={"raise_exception": _raise, "strftime_now": _now})


def render(
    template: str | None,
    messages: list[dict[str, Any]],
    add_generation_prompt: bool,
    special_tokens: Mapping[str, str],
    variables: Mapping[str, Any],
) -> str:
    """A template filled with messages, special tokens (`bos_token`, ...) and further variables (`tools`, ...).

    Raises:
      TokenizerError: there is no template, it is not valid Jinja, or it refuses the messages.
    """
    if template is None:
        raise TokenizerError("this tokenizer has no chat template: send plain text, or give it a chat_template")
    context = {"tools": None, "documents": None} | dict(special_tokens) | dict(variables)
    try:
        return _compile(template).render(messages=messages, add_generation_prompt=add_generation_prompt, **context)
    except jinja2.TemplateError as error:
        raise TokenizerError(f"the chat template refused the messages: {error}") from error


def write_config(folder: str | Path, config: Mapping[str, Any], template: str | None) -> None:
    """Write `tokenizer_config.json` with the chat template in it."""
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    content = dict(config) | ({"chat_template": template} if template is not None else {})
    (folder / "tokenizer_config.json").write_text(json.dumps(content, indent=2, ensure_ascii=False) + "\n")

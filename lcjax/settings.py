"""Gin at the edge: flags and gin files in, one checked job object out.

A job (`train`, `decode`, `evaluate`...) is a frozen dataclass whose fields are other dataclasses; gin builds that tree.
Whatever can be wrong with a configuration is found while the tree is built, before a device is touched: an unknown
name, a binding that nothing reads, a wrong type, a missing value. Each ends in one sentence with the file, the line
and the nearest valid name. Gin keeps neither types nor places, so the files are read twice: with gin's parser for the
places, then by gin itself for the values.

Only this module and the scripts import gin.
"""

import argparse
import contextlib
import difflib
import importlib
import inspect
import re
import sys
import typing
from collections.abc import Callable, Generator, Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import gin
from gin import config_parser

from lcjax.configurables import CONFIGURABLES
from lcjax.parallel.platform import skip_absent_chips
from lcjax.typecheck import Mismatch, coerce

ROOT = Path(__file__).resolve().parent.parent
"""Where `include 'configs/...'` is looked for when the working directory does not have it."""


class SettingsError(ValueError):
    """A configuration that cannot run; the message is one sentence with the place and the remedy."""


class Launch(NamedTuple):
    """What a script needs to run its job."""

    job: Any
    output: Path | None
    config: str  # the resolved configuration as gin text: every value in use, defaults included
    flags: argparse.Namespace


class Binding(NamedTuple):
    """One line `scope/name.parameter = value` and where it stands. For a macro, `parameter` is empty."""

    scope: str
    name: str
    parameter: str
    value: Any
    place: str

    @property
    def key(self) -> str:
        return "/".join(filter(None, (self.scope, self.name))) + ("." + self.parameter if self.parameter else "")


class _Reference(NamedTuple):
    scoped_name: str

    @property
    def name(self) -> str:
        return self.scoped_name.rsplit("/", 1)[-1]


class _Macro(NamedTuple):
    name: str


class _Places(config_parser.ParserDelegate):
    """Keeps references as plain records, so that reading places needs no registered name."""

    def configurable_reference(self, scoped_configurable_name: str, evaluate: bool) -> _Reference:
        return _Reference(scoped_configurable_name)

    def macro(self, macro_name: str) -> _Macro:
        return _Macro(macro_name)


# Flags


def flags(description: str) -> argparse.ArgumentParser:
    """A parser with the three flags that every script has; a script may add its own."""
    parser = argparse.ArgumentParser(description=description, allow_abbrev=False)
    parser.add_argument("--gin_file", action="append", default=[], metavar="FILE", help="gin file (repeatable)")
    parser.add_argument("--gin_bindings", action="append", default=[], metavar="NAME.FIELD=VALUE", help="(repeatable)")
    parser.add_argument("--output", type=Path, metavar="DIR", help="folder for everything that the run writes")
    return parser


def main(job_name: str, argv: Sequence[str] | None = None, parser: argparse.ArgumentParser | None = None) -> Launch:
    """Parse the command line and build its job; bad input exits with status 2 and one sentence."""
    parser = parser or flags(f"Run the {job_name} job.")
    args = parser.parse_args(argv)
    skip_absent_chips()
    with refusals(parser.prog):
        job, config = load(job_name, args.gin_file, args.gin_bindings)
    return Launch(job, args.output, config, args)


@contextlib.contextmanager
def refusals(program: str, kinds: tuple[type[Exception], ...] = (ValueError, OSError)) -> Generator[None]:
    """Turn errors about the user's input or machine into one sentence on stderr and exit status 2.

    The default kinds are for the stages before a device is busy: building the job, opening files, fitting shapes to
    the mesh. Later stages name the errors that speak to the user; any other keeps its traceback.
    """
    try:
        yield
    except kinds as error:
        print(f"{program}: {error}", file=sys.stderr)
        raise SystemExit(2) from error


# Building


def load(job_name: str, gin_files: Sequence[str | Path], bindings: Sequence[str] = ()) -> tuple[Any, str]:
    """Build `job_name` from gin files, then bindings (the later wins); return it and the resolved configuration.

    Raises SettingsError for anything that the job would not use exactly as written.
    """
    global _active
    build = _Build([*_read_files(gin_files), *_read_bindings(bindings)])
    build.check_names()
    for name in (job_name, *build.names()):
        _register(name, f"the job {job_name!r}")
    gin.clear_config()
    _active = build
    try:
        gin.parse_config_files_and_bindings([str(path) for path in gin_files], list(bindings), finalize_config=False)
        job = gin.get_configurable(job_name)()
        config = _resolved(build)
    except Exception as error:
        # Gin wraps what a factory raises in a new type with a trace of its own: report the first cause instead.
        raise build.error or error from None
    finally:
        _active = None
        gin.clear_config()
    build.check_all_read()
    return job, config


def _resolved(build: "_Build") -> str:
    """Gin's record of every value in use, and as comments the defaults that are records themselves."""
    text = gin.operative_config_str(max_line_length=100)
    for package, _, short in (name.rpartition(".") for name in build.names()):
        if package:  # gin shortens dotted names; written out, the text loads again
            text = re.sub(rf"(^|[@/ ]){short}(?=[.(:])", rf"\1{package}.{short}", text, flags=re.MULTILINE)
    rest = [f"# {line}\n" for line in sorted(build.unwritten)]
    return text.rstrip("\n") + "\n" + "".join(["\n# Defaults without a gin literal:\n", *rest] if rest else [])


def _read_files(paths: Sequence[str | Path], included_from: str = "") -> list[Binding]:
    found = []
    for path in map(str, paths):
        file = next((p for p in (Path(path), ROOT / path) if p.is_file()), None)
        if file is None:
            raise SettingsError(f"gin file {path!r}{included_from} does not exist (looked in '.' and in {str(ROOT)!r})")
        found += _parse(file.read_text(), path)
    return found


def _read_bindings(bindings: Sequence[str]) -> list[Binding]:
    return [binding for text in bindings for binding in _parse(text, f"--gin_bindings={text!r}", lines=False)]


def _parse(text: str, source: str, lines: bool = True) -> list[Binding]:
    found = []
    try:
        for statement in config_parser.ConfigParser(text, _Places()):
            place = f"{source}:{statement.location.line_num}" if lines else source
            match statement:
                case config_parser.IncludeStatement():
                    found += _read_files([statement.filename], f", included from {place},")
                case config_parser.ImportStatement():
                    raise SettingsError(f"{place}: remove 'import {statement.module}'; write the dotted name instead")
                case config_parser.BindingStatement(scope, selector, parameter, value, _):
                    found.append(Binding(scope, selector, parameter, value, place))
    except SyntaxError as error:
        line = f":{error.lineno}" if lines and isinstance(error.lineno, int) else ""
        raise SettingsError(f"{source}{line}: not gin syntax: {error.msg.splitlines()[0]}") from None
    return found


class _Build:
    """One configuration while its job is built: the bindings, which of them were read, and the first error."""

    def __init__(self, statements: list[Binding]):
        self.statements = statements
        self.bindings = {(b.scope, b.name, b.parameter): b for b in statements}  # a later line replaces an earlier
        self.read: set[tuple[str, str, str]] = set()
        self.unwritten: set[str] = set()  # defaults in use that gin has no literal for
        self.error: SettingsError | None = None

    def names(self) -> set[str]:
        """Every configurable that a line names, replaced lines included: gin parses them all."""
        used = {b.name for b in self.statements if b.parameter}
        return used | {r.name for b in self.statements for r in _leaves(b.value) if isinstance(r, _Reference)}

    def macros(self) -> dict[str, Binding]:
        return {b.key: b for b in self.bindings.values() if not b.parameter}

    def check_names(self) -> None:
        """Names, parameters and macros exist, and nothing is left at `%gin.REQUIRED`."""
        macros = self.macros()
        for b in self.bindings.values():
            if b.parameter:
                parameters = _parameters(_register(b.name, b.place))
                if b.parameter not in parameters:
                    hint = _nearest(b.parameter, parameters)
                    raise SettingsError(f"{b.place}: {b.name} has no parameter {b.parameter!r}{hint}")
            for leaf in _leaves(b.value):
                if isinstance(leaf, _Reference):
                    _register(leaf.name, b.place)
                elif leaf.name == "gin.REQUIRED":
                    raise SettingsError(f"{b.place}: {b.key} is required; bind it in a later file or --gin_bindings")
                elif leaf.name not in macros:
                    raise SettingsError(f"{b.place}: no macro {leaf.name!r} is defined{_nearest(leaf.name, macros)}")

    def construct(self, name: str, target: Callable, values: dict[str, Any]) -> Any:
        """Called by gin with the bound values of `name` in the current scope: check types, note the reads, build."""
        origin = {parameter: self._binding(name, parameter) for parameter in values}
        self.read.update((b.scope, b.name, b.parameter) for b in origin.values() if b)
        hints = _hints(target)
        try:
            for parameter, value in values.items():
                try:
                    values[parameter] = coerce(value, hints.get(parameter, Any))
                except Mismatch as error:
                    raise SettingsError(f"{_place(origin[parameter])}{name}.{parameter} {error}") from None
            missing = [n for n, p in _parameters(target).items() if p.default is p.empty and n not in values]
            if missing:
                where = self._where(name)
                raise SettingsError(f"{where}{name}.{missing[0]} has no value: bind it to {_say(hints, missing[0])}")
            built = target(**values)
            for parameter in _parameters(target):
                value = getattr(built, parameter, None)
                if parameter not in values and not _is_literal(value):
                    self.unwritten.add(f"{'/'.join([*gin.current_scope(), name])}.{parameter} = {value!r}")
            return built
        except SettingsError as error:
            self.error = self.error or error
            raise
        except ValueError as error:  # the object refuses its own fields
            self.error = self.error or SettingsError(f"{self._where(name)}{name}: {error}")
            raise

    def _binding(self, name: str, parameter: str) -> Binding | None:
        """The line that gave `name.parameter` its value: the deepest enclosing scope wins."""
        scopes = gin.current_scope()
        for depth in range(len(scopes), -1, -1):
            if found := self.bindings.get(("/".join(scopes[:depth]), name, parameter)):
                return found
        return None

    def _where(self, name: str) -> str:
        """The first line that speaks of `name` (as a parameter, else as a reference)."""
        lines = self.bindings.values()
        refers = lambda b: any(isinstance(r, _Reference) and r.name == name for r in _leaves(b.value))
        return _place(next((b for b in lines if b.name == name), None) or next(filter(refers, lines), None))

    def check_all_read(self) -> None:
        """Every binding reached an object and every macro is used by one that did."""
        macros, pending = self.macros(), [b for key, b in self.bindings.items() if key in self.read]
        used: set[str] = set()
        while pending:
            for leaf in _leaves(pending.pop().value):
                if isinstance(leaf, _Macro) and leaf.name not in used:
                    used.add(leaf.name)
                    pending.append(macros[leaf.name])
        for key, b in self.bindings.items():
            if b.parameter and key not in self.read:
                built = sorted({f"{scope + '/' if scope else ''}{name}" for scope, name, _ in self.read})
                name = b.key.rpartition(".")[0]
                raise SettingsError(f"{b.place}: nothing reads {b.key}: no {name} is built{_nearest(name, built)}")
            if not b.parameter and b.key not in used:
                raise SettingsError(f"{b.place}: nothing reads the macro {b.key!r}{_nearest(b.key, used)}")


_active: _Build | None = None
_registered: dict[str, Callable] = {}


def _register(name: str, place: str) -> Callable:
    """Import the object behind a gin name and make it known to gin, once; return the object."""
    if name in _registered:
        return _registered[name]
    if name == "gin.singleton":
        return gin.config.singleton
    path = CONFIGURABLES.get(name) or ":".join(name.rsplit(".", 1))
    module, _, attribute = path.partition(":")
    try:
        target = getattr(importlib.import_module(module), attribute) if attribute else None
    except (ModuleNotFoundError, AttributeError) as error:
        if name in CONFIGURABLES or (
            isinstance(error, ModuleNotFoundError) and not module.startswith(error.name or "-")
        ):
            raise
        target = None
    if target is None:
        raise SettingsError(f"{place}: {name!r} is not a configurable{_nearest(name, CONFIGURABLES)}")

    # A function, not the class itself: gin would subclass it, and a subclass is not equal to what code builds.
    def factory(**values: Any) -> Any:
        assert _active is not None, f"{name} is built by settings.load only"
        return _active.construct(name, target, values)

    factory.__signature__ = inspect.Signature(list(_parameters(target).values()))  # ty: ignore[missing-attribute]
    package, _, short = name.rpartition(".")
    gin.external_configurable(factory, name=short, module=package or None)
    return _registered.setdefault(name, target)


def _is_literal(value: Any) -> bool:
    if isinstance(value, tuple | list):
        return all(map(_is_literal, value))
    return value is None or isinstance(value, bool | int | float | str | dict)


def _parameters(target: Callable) -> dict[str, inspect.Parameter]:
    return {
        n: p.replace(kind=p.KEYWORD_ONLY, annotation=p.empty) for n, p in inspect.signature(target).parameters.items()
    }


def _hints(target: Callable) -> dict[str, Any]:
    return typing.get_type_hints(target.__init__ if inspect.isclass(target) else target)


def _leaves(value: Any) -> Iterator[_Reference | _Macro]:
    match value:
        case _Reference() | _Macro():
            yield value
        case dict():
            for pair in value.items():
                yield from _leaves(pair)
        case list() | tuple():
            for item in value:
                yield from _leaves(item)


def _place(binding: Binding | None) -> str:
    return f"{binding.place}: " if binding else ""


def _say(hints: dict[str, Any], parameter: str) -> str:
    hint = hints.get(parameter, "a value")
    return getattr(hint, "__name__", str(hint))


def _nearest(word: str, known: Any) -> str:
    close = difflib.get_close_matches(word, list(known), n=1, cutoff=0.4)
    return f"; did you mean {close[0]!r}?" if close else (f"; known: {', '.join(sorted(known))}" if known else "")


gin.add_config_file_search_path(str(ROOT))

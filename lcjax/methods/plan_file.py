"""Plans that methods keep in JSON files."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

FORMAT = 1


def write_plan(path: Path, method: str, held: dict[str, Any]) -> None:
    """Write what a plan of `method` holds."""
    text = json.dumps({"format": FORMAT, "method": method, **held}, indent=1)
    path.write_text(text + "\n", encoding="utf-8")


def read_plan[T](path: str | Path, method: str, make: Callable[[dict[str, Any]], T], remedy: str) -> T:
    """What `make` builds of that which `write_plan` wrote for `method`.

    Raises ValueError for any other file, with what is wrong with it and `remedy`, where plans are made; OSError for no
    file.
    """
    try:
        held = json.loads(Path(path).read_text(encoding="utf-8"))
        if not isinstance(held, dict) or (held.pop("format", None), held.pop("method", None)) != (FORMAT, method):
            raise ValueError(f"it is not of format {FORMAT} of {method}")
        return make(held)
    except KeyError as error:
        fault = f"{error} is missing"
    except (ValueError, TypeError, AttributeError) as error:
        fault = str(error)
    raise ValueError(f"{path} is no plan of {method} ({fault}): make one with {remedy}")

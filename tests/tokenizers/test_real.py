"""The tokenizers of SmolLM2 and Gemma 3 from their GGUF files, on real books; skipped where the files are absent."""

import os
from pathlib import Path

import pytest

from lcjax.data.tokenizers import load_tokenizer

pytestmark = pytest.mark.data
MODELS = Path(__file__).parents[2] / "models"


def model_file(variable: str, pattern: str) -> Path:
    if variable in os.environ:
        return Path(os.environ[variable])
    found = sorted(MODELS.glob(pattern))
    if not found:
        pytest.skip(f"{variable} is not set and models/{pattern} does not exist")
    return found[0]


@pytest.fixture(scope="module")
def smollm2():
    return load_tokenizer(model_file("LCJAX_SMOLLM2", "**/SmolLM2*.gguf"))


@pytest.fixture(scope="module")
def gemma3():
    return load_tokenizer(model_file("LCJAX_GEMMA3", "**/gemma-3*.gguf"))


@pytest.fixture(scope="module")
def book():
    if "LCJAX_BOOKS" not in os.environ:
        pytest.skip("LCJAX_BOOKS, a folder of text files, is not set")
    files = sorted(Path(os.environ["LCJAX_BOOKS"]).glob("*.txt"))
    return min(files, key=lambda path: path.stat().st_size).read_text()


def test_smollm2_ids_of_the_published_tokenizer(smollm2):
    assert smollm2.vocab_size == 49152
    assert smollm2.encode("Hello") == [19556]
    assert smollm2.encode("The capital of France is") == [504, 3575, 282, 4649, 314]
    assert smollm2.encode("def fibonacci(n):") == [1604, 3987, 46477, 24, 94, 727]
    assert smollm2.encode("1984") == [smollm2.encode(digit)[0] for digit in "1984"]
    chat = smollm2.render_chat([{"role": "user", "content": "Hi"}])
    assert chat.endswith("<|im_start|>user\nHi<|im_end|>\n<|im_start|>assistant\n")
    ids = smollm2.encode(chat)
    assert ids.count(1) == 3
    assert ids.count(2) == 2
    assert smollm2.stop_ids == {2}


def test_gemma3_ids_of_the_published_tokenizer(gemma3):
    assert gemma3.vocab_size == 262144
    assert (gemma3.bos_id, gemma3.eos_id, gemma3.pad_id, gemma3.adds_bos) == (2, 1, 0, True)
    assert gemma3.encode("Hello world", add_bos=True) == [2, 9259, 1902]
    assert gemma3.encode("\n\n") == [108]
    assert gemma3.encode("<end_of_turn>") == [106]
    assert gemma3.decode(gemma3.encode("a   b\t\u65e5\u672c 🤗")) == "a   b\t\u65e5\u672c 🤗"


@pytest.mark.parametrize("name", ["smollm2", "gemma3"])
def test_a_book_survives(name, request, book):
    tokenizer = request.getfixturevalue(name)
    ids = tokenizer.encode(book)
    assert tokenizer.decode(ids) == book
    assert 0.2 < len(ids) / len(book.encode()) < 0.26

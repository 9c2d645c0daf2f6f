"""Tokenizers from files: the same text gives the same ids from tokenizer.json, GGUF and SentencePiece models."""

import io
import json

import gguf
import pytest
import sentencepiece
import tokenizers
from tokenizers import decoders, models, normalizers, pre_tokenizers, trainers

from lcjax.data.tokenizers import Tokenizer, TokenizerError, load_tokenizer

SPECIAL = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]
CORPUS = [
    "The quick brown fox jumps over the lazy dog. It's 1984, isn't it?",
    "def f(x):\n    return x + 12345\n\n\nclass A:\n\tpass  # naïve 日本語 🤗",
    "We'll see   many    spaces\t\ttabs and\r\nnew lines.\n\n",
] * 4
PROBES = [
    *CORPUS[:3],
    "",
    " ",
    "\n\n\n",
    "a<|im_start|>b",
    "<|im_end|>",
    "x\u2581y",
    "e\u0301é ＡＢ",
    "🤗" * 3,
    "0123456789",
]
TEMPLATE = "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}"


def byte_level(pre_tokenizer, normalizer=None):
    """A small trained byte-level BPE."""
    core = tokenizers.Tokenizer(models.BPE())
    core.pre_tokenizer = pre_tokenizer
    if normalizer is not None:
        core.normalizer = normalizer
    core.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=400,
        special_tokens=SPECIAL,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    core.train_from_iterator(CORPUS, trainer)
    return core


def split_then_bytes(pattern):
    return pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(tokenizers.Regex(pattern), "isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )


# The patterns of the published Llama 3 and Qwen 2 tokenizers.
LLAMA3 = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}"
    r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
DIGITS = pre_tokenizers.Sequence(
    [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)]
)
KINDS = {
    "smollm": (DIGITS, None),
    "gpt-2": (pre_tokenizers.ByteLevel(add_prefix_space=False), None),
    "llama-bpe": (split_then_bytes(LLAMA3), None),
    "qwen2": (split_then_bytes(LLAMA3.replace("{1,3}", "")), normalizers.NFC()),
}


def write_gguf(path, model, tokens, kinds, *, merges=None, scores=None, pre=None, **ids):
    writer = gguf.GGUFWriter(path, "llama")
    writer.add_tokenizer_model(model)
    writer.add_token_list(tokens)
    writer.add_token_types(kinds)
    if merges is not None:
        writer.add_token_merges(merges)
    if scores is not None:
        writer.add_token_scores(scores)
    if pre is not None:
        writer.add_tokenizer_pre(pre)
    for name, value in ids.items():
        if isinstance(value, bool):
            writer.add_bool(f"tokenizer.ggml.{name}", value)
        elif isinstance(value, str):
            writer.add_string(f"tokenizer.{name}", value)
        else:
            writer.add_uint32(f"tokenizer.ggml.{name}_token_id", value)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.close()
    return path


def gguf_of(core, path, pre):
    """The same byte-level tokenizer as a GGUF."""
    content = json.loads(core.to_str())["model"]
    tokens = sorted(content["vocab"], key=content["vocab"].get)
    kinds = [3 if token in SPECIAL else 1 for token in tokens]
    merges = [" ".join(merge) for merge in content["merges"]]
    ids = {"bos": 1, "eos": 2, "padding": 2, "unknown": 0, "add_bos_token": False, "chat_template": TEMPLATE}
    return write_gguf(path, "gpt2", tokens, kinds, merges=merges, pre=pre, **ids)


@pytest.fixture(scope="module", params=list(KINDS))
def pair(request, tmp_path_factory):
    """One tokenizer, loaded from tokenizer.json and from GGUF, and the core that made both."""
    folder = tmp_path_factory.mktemp(request.param)
    core = byte_level(*KINDS[request.param])
    core.model.ignore_merges = request.param == "llama-bpe"
    core.save(str(folder / "tokenizer.json"))
    config = {
        "bos_token": "<|im_start|>",
        "eos_token": {"content": "<|im_end|>"},
        "pad_token": "<|im_end|>",
        "unk_token": "<|endoftext|>",
        "chat_template": [{"name": "tool_use", "template": "no"}, {"name": "default", "template": TEMPLATE}],
    }
    (folder / "tokenizer_config.json").write_text(json.dumps(config))
    return load_tokenizer(folder), load_tokenizer(gguf_of(core, folder / "x.gguf", request.param)), core


def test_json_and_gguf_agree_with_the_library(pair):
    from_json, from_gguf, core = pair
    assert isinstance(from_json, Tokenizer)
    assert isinstance(from_gguf, Tokenizer)
    for text in PROBES:
        expected = core.encode(text, add_special_tokens=False).ids
        assert from_json.encode(text) == expected, text
        assert from_gguf.encode(text) == expected, text
        assert from_gguf.decode(expected) == core.decode(expected, skip_special_tokens=False)


def test_facts_agree(pair):
    from_json, from_gguf, core = pair
    for tokenizer in (from_json, from_gguf):
        assert tokenizer.vocab_size == core.get_vocab_size()
        assert (tokenizer.bos_id, tokenizer.eos_id, tokenizer.pad_id) == (1, 2, 2)
        assert tokenizer.stop_ids == {2}
        assert not tokenizer.adds_bos
        assert tokenizer.encode("a", add_bos=True)[0] == 1
        chat = tokenizer.render_chat([{"role": "user", "content": "Hi"}])
        assert chat == "<|im_start|>user\nHi<|im_end|>\n"
        assert tokenizer.encode(chat)[0] == 1
        assert 2 in tokenizer.encode(chat)


def test_round_trip_and_special_text(pair):
    for tokenizer in pair[:2]:
        for text in PROBES:
            plain = tokenizer.encode(text, special=False)
            if "e\u0301" not in text:  # composed by Qwen's normaliser
                assert tokenizer.decode(tokenizer.encode(text)) == text
                assert tokenizer.decode(plain) == text
            assert not {0, 1, 2} & set(plain)
        assert tokenizer.decode(tokenizer.encode("a<|im_start|>b"), skip_special=True) == "ab"


def test_digits(pair):
    name = next(n for n, (p, _) in KINDS.items() if str(p) == str(pair[2].pre_tokenizer))
    pieces = [pair[1].decode([i]) for i in pair[1].encode("9876")]
    if name in ("smollm", "qwen2"):
        assert pieces == list("9876")


def test_save_and_load_keeps_everything(pair, tmp_path):
    for number, tokenizer in enumerate(pair[:2]):
        tokenizer.save(tmp_path / str(number))
        loaded = load_tokenizer(tmp_path / str(number))
        assert loaded.fingerprint == tokenizer.fingerprint
        assert loaded.chat_template == TEMPLATE
        assert (loaded.bos_id, loaded.eos_id, loaded.pad_id, loaded.adds_bos) == (1, 2, 2, False)
        assert [loaded.encode(text) for text in PROBES] == [tokenizer.encode(text) for text in PROBES]


def test_fingerprints_tell_tokenizers_apart(tmp_path):
    prints = set()
    for name, (pre, normalizer) in KINDS.items():
        path = gguf_of(byte_level(pre, normalizer), tmp_path / f"{name}.gguf", name)
        prints.add(load_tokenizer(path).fingerprint)
        assert load_tokenizer(path).fingerprint in prints
    assert len(prints) == len(KINDS)


def test_bos_from_the_post_processor_and_ids_from_config_json(tmp_path):
    core = byte_level(*KINDS["smollm"])
    core.post_processor = tokenizers.processors.TemplateProcessing(
        single="<|im_start|> $A", pair="$A $B", special_tokens=[("<|im_start|>", 1)]
    )
    core.save(str(tmp_path / "tokenizer.json"))
    (tmp_path / "config.json").write_text('{"bos_token_id": 1, "eos_token_id": [0, 2]}')
    (tmp_path / "chat_template.jinja").write_text("from a file")
    tokenizer = load_tokenizer(tmp_path / "tokenizer.json")
    assert tokenizer.adds_bos
    assert (tokenizer.bos_id, tokenizer.eos_id, tokenizer.pad_id) == (1, 0, None)
    assert tokenizer.stop_ids == {0, 2}
    assert tokenizer.render_chat([]) == "from a file"
    assert tokenizer.encode("a")[0] != 1


@pytest.fixture(scope="module")
def piece_model():
    """A small SentencePiece BPE with byte fallback, a control piece and user-defined pieces of spaces."""
    model = io.BytesIO()
    sentencepiece.SentencePieceTrainer.Train(
        sentence_iterator=iter(CORPUS * 3),
        model_writer=model,
        model_type="bpe",
        vocab_size=420,
        byte_fallback=True,
        pad_id=0,
        eos_id=1,
        bos_id=2,
        unk_id=3,
        control_symbols=["<end_of_turn>"],
        user_defined_symbols=["  ", "\n", "\t"],
        normalization_rule_name="identity",
        remove_extra_whitespaces=False,
        add_dummy_prefix=False,
        split_digits=True,
        minloglevel=2,
    )
    return model.getvalue()


def gguf_of_pieces(model, path, **changes):
    core = sentencepiece.SentencePieceProcessor(model_proto=model)
    count = core.GetPieceSize()

    def kind(i):
        if core.IsUnknown(i) or core.IsControl(i):
            return 3  # as converters of Gemma write it
        if core.IsByte(i):
            return 6
        return 4 if core.IdToPiece(i).strip("\u2581\n\t") == "" and core.GetScore(i) == 0 else 1

    kinds = [kind(i) for i in range(count)]
    tokens = [core.IdToPiece(i).replace("\u2581", " ") if kinds[i] == 4 else core.IdToPiece(i) for i in range(count)]
    ids = {"bos": 2, "eos": 1, "unknown": 3, "padding": 0, "add_space_prefix": False} | changes
    return write_gguf(path, "llama", tokens, kinds, scores=[core.GetScore(i) for i in range(count)], **ids)


def test_sentencepiece_and_gguf_agree_with_the_library(piece_model, tmp_path):
    core = sentencepiece.SentencePieceProcessor(model_proto=piece_model)
    (tmp_path / "tokenizer.model").write_bytes(piece_model)
    from_model, from_gguf = load_tokenizer(tmp_path), load_tokenizer(gguf_of_pieces(piece_model, tmp_path / "x.gguf"))
    for tokenizer in (from_model, from_gguf):
        assert isinstance(tokenizer, Tokenizer)
        assert (tokenizer.bos_id, tokenizer.eos_id, tokenizer.pad_id) == (2, 1, 0)
        assert tokenizer.adds_bos
        turn = core.PieceToId("<end_of_turn>")
        assert tokenizer.stop_ids == {1, turn}
        for text in PROBES:
            assert tokenizer.encode(text) == core.EncodeAsIds(text), text
            if "\u2581" not in text:  # SentencePiece's own sign for a space
                assert tokenizer.decode(tokenizer.encode(text)) == text
        ids = tokenizer.encode(f"{core.IdToPiece(2)}Hi<end_of_turn>\n")
        assert ids == [2, *core.EncodeAsIds("Hi"), turn, *core.EncodeAsIds("\n")]
        assert tokenizer.decode(ids, skip_special=True) == "Hi\n"
        assert tokenizer.decode(ids) == f"{core.IdToPiece(2)}Hi<end_of_turn>\n"
        assert turn not in tokenizer.encode("<end_of_turn>", special=False)
        tokenizer.save(tmp_path / "saved")
        assert load_tokenizer(tmp_path / "saved").fingerprint == tokenizer.fingerprint


def test_space_prefix(piece_model, tmp_path):
    path = gguf_of_pieces(piece_model, tmp_path / "x.gguf", add_space_prefix=True, add_bos_token=False)
    tokenizer = load_tokenizer(path)
    plain = load_tokenizer(gguf_of_pieces(piece_model, tmp_path / "y.gguf"))
    assert not tokenizer.adds_bos
    assert tokenizer.encode("The fox") == plain.encode(" The fox")
    assert tokenizer.decode(tokenizer.encode("The fox")) == "The fox"


def test_damage_and_unknown_kinds_are_named(tmp_path, piece_model):
    def refused(message, source):
        with pytest.raises(TokenizerError, match=message):
            load_tokenizer(source)

    refused("is not a file or folder", tmp_path / "none")
    (tmp_path / "empty").mkdir()
    refused("neither tokenizer.json nor tokenizer.model", tmp_path / "empty")
    other = tmp_path / "x.bin"
    other.write_bytes(b"x")
    refused(r"suffix '\.bin'", other)
    bad = tmp_path / "tokenizer.json"
    bad.write_text('{"version": "1.0", "mod')
    refused(r"tokenizer\.json is not a tokenizer\.json that can be read", bad)
    model = tmp_path / "t.model"
    model.write_bytes(piece_model[:99])
    refused(r"t\.model is not a SentencePiece model", model)
    tokens, kinds = ["a", "b", "ab"], [1, 1, 1]
    file = tmp_path / "bad.gguf"
    refused("tokenizer model 'rwkv'", write_gguf(file, "rwkv", tokens, kinds))
    refused("pre-tokenizer 'new-kind'", write_gguf(file, "gpt2", tokens, kinds, merges=["a b"], pre="new-kind"))
    refused("holds token 'a' twice", write_gguf(file, "gpt2", ["a", "a", "b"], kinds, merges=["a b"], pre="gpt-2"))
    refused("3 tokens and 2 token types", write_gguf(file, "gpt2", tokens, [1, 1], merges=["a b"], pre="gpt-2"))
    refused("no tokenizer.ggml.merges", write_gguf(file, "gpt2", tokens, kinds, pre="gpt-2"))
    refused(r"the merge \('b', 'a'\)", write_gguf(file, "gpt2", tokens, kinds, merges=["b a"], pre="gpt-2"))
    refused("3 tokens and 2 scores", write_gguf(file, "llama", tokens, kinds, scores=[0.0, 1.0]))
    refused("0 unknown tokens", write_gguf(file, "llama", tokens, kinds, scores=[0.0, 1.0, 2.0]))
    writer = gguf.GGUFWriter(file, "llama")
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.close()
    refused("holds no tokenizer", file)


def test_special_token_that_is_not_in_the_vocabulary(tmp_path):
    byte_level(*KINDS["gpt-2"]).save(str(tmp_path / "tokenizer.json"))
    (tmp_path / "tokenizer_config.json").write_text('{"eos_token": "</s>"}')
    with pytest.raises(TokenizerError, match=r"holds no token '</s>', which tokenizer_config\.json names as eos_token"):
        load_tokenizer(tmp_path)
    (tmp_path / "tokenizer_config.json").write_text("{")
    with pytest.raises(TokenizerError, match=r"tokenizer_config\.json is not JSON"):
        load_tokenizer(tmp_path)
    (tmp_path / "tokenizer_config.json").unlink()
    tokenizer = load_tokenizer(tmp_path)
    assert tokenizer.eos_id is None
    with pytest.raises(TokenizerError, match="without a beginning-of-text token"):
        tokenizer.encode("a", add_bos=True)

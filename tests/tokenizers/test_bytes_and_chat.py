"""The byte tokenizer, and chat templates as Hugging Face renders them."""

import datetime

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from lcjax.data.tokenizers import Tokenizer, TokenizerError, load_tokenizer
from lcjax.data.tokenizers.bytes import ByteTokenizer
from lcjax.data.tokenizers.chat import render

MESSAGES = [{"role": "user", "content": "Hi & <bye>"}, {"role": "assistant", "content": "Yes"}]


@settings(max_examples=30, deadline=None)
@given(st.text())
def test_bytes_round_trip(text):
    tokenizer = load_tokenizer("bytes")
    ids = tokenizer.encode(text)
    assert bytes(ids) == text.encode()
    assert tokenizer.decode(ids) == text
    assert tokenizer.encode(text, add_bos=True) == [256, *ids]


def test_bytes_facts():
    tokenizer = load_tokenizer("bytes")
    assert isinstance(tokenizer, Tokenizer)
    assert (tokenizer.vocab_size, tokenizer.bos_id, tokenizer.eos_id, tokenizer.pad_id) == (259, 256, 257, 258)
    assert tokenizer.stop_ids == {257}
    assert tokenizer.decode([256, 104, 105, 257, 258]) == "hi"
    assert tokenizer.decode([0xE6, 0x97]) == "\ufffd"
    assert tokenizer.decode(tokenizer.encode("a\ud800b")).startswith("a\ufffd")


def test_bytes_save_and_load(tmp_path):
    tokenizer = ByteTokenizer(chat_template="{{ messages[0].content }}")
    tokenizer.save(tmp_path)
    loaded = load_tokenizer(tmp_path)
    assert isinstance(loaded, ByteTokenizer)
    assert loaded.fingerprint == tokenizer.fingerprint
    assert loaded.render_chat(MESSAGES) == "Hi & <bye>"


def test_no_template_is_an_error():
    with pytest.raises(TokenizerError, match="has no chat template"):
        load_tokenizer("bytes").render_chat(MESSAGES)


def test_white_space_rules_and_special_tokens():
    template = """{% for m in messages %}
    {% if m.role == 'user' %}
[{{ m.content }}]
    {% else %}
{{ bos_token }}{{ m['content'] | trim }}{{ eos_token }}
    {% endif %}
{% endfor %}
{%- if add_generation_prompt %}
>
{%- endif %}"""
    got = render(template, MESSAGES, True, {"bos_token": "<s>", "eos_token": "</s>"}, {})
    assert got == "[Hi & <bye>]\n<s>Yes</s>\n>"
    assert not render(template, MESSAGES, False, {"bos_token": "", "eos_token": ""}, {}).endswith(">")


def test_tojson_is_plain_json():
    assert render("{{ messages[0] | tojson }}", MESSAGES, False, {}, {}) == '{"role": "user", "content": "Hi & <bye>"}'
    assert render("{{ 'é' | tojson }}", [], False, {}, {}) == '"é"'
    assert render("{{ {'a': 1} | tojson(indent=2) }}", [], False, {}, {}) == '{\n  "a": 1\n}'


def test_variables_generation_blocks_loop_controls_and_date():
    assert render("{{ tools }}{{ documents }}", [], False, {}, {}) == "NoneNone"
    assert render("{{ tools[0] }}{{ thinking }}", [], False, {}, {"tools": ["t"], "thinking": 1}) == "t1"
    assert render("{% generation %}x{{ messages|length }}{% endgeneration %}y", MESSAGES, False, {}, {}) == "x2y"
    loop = "{% for i in range(9) %}{% if i == 2 %}{% break %}{% endif %}{{ i }}{% endfor %}"
    assert render(loop, [], False, {}, {}) == "01"
    assert render("{{ strftime_now('%Y') }}", [], False, {}, {}) == str(datetime.datetime.now().year)
    macro = "{% macro f() %}{{ raise_exception('no') }}{% endmacro %}{{ f() }}"
    with pytest.raises(TokenizerError, match="refused the messages: no"):
        render(macro, [], False, {}, {})


@pytest.mark.parametrize(
    ("template", "message"),
    [
        ("{{ raise_exception('roles must alternate') }}", "refused the messages: roles must alternate"),
        ("{% for %}", "refused the messages"),
        ("{{ messages.append(1) }}", "refused the messages"),
        ("{{ ''.__class__.__mro__[1].__subclasses__() }}", "refused the messages"),
    ],
)
def test_bad_templates(template, message):
    with pytest.raises(TokenizerError, match=message):
        render(template, list(MESSAGES), True, {}, {})

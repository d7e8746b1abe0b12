"""Text to ids, and conversations to text exactly as transformers writes them."""

import datetime
import itertools
import json
import random

import pytest
import tokenizers
from tiny import LLAMA3_STYLE, ODD_TEXTS, refusal, shared, write_sentencepiece, write_tokenizer

from teamtr_min import load_tokenizer


def said(*turns: tuple[str, str]) -> list[dict]:
    return [{"role": role, "content": content} for role, content in turns]


LOOK = {"type": "function", "function": {"name": "look", "arguments": {"at": "Zürich <b>"}}}
LOOKS = [{"role": "assistant", "content": "", "tool_calls": [LOOK]}]
TALK = ("user", "B: 3+4"), ("assistant", "7"), ("user", "B: no, 8"), ("assistant", "8 it is\n")
CHATS = [
    said(("user", "What is 7*8?")), said(("system", "Be brief.\n"), ("user", " hi ")),
    said(("system", "You are A."), *TALK), said(*(("user", text or "nothing") for text in ODD_TEXTS)),
    said(("user", "weather?")) + LOOKS + said(("tool", '{"degrees": 21}'), ("assistant", "21")),
]  # fmt: skip

# Everything else that templates out there rely on.
ODDITIES = """\
{% for message in messages %}
    {% if loop.index > 3 %}{% break %}{% elif message.role == 'system' %}{% continue %}{% endif %}
    {% if message.role == 'assistant' %}
{{ message.content }}{{ eos_token }}
    {% else %}
{{ message | tojson }}|{{ message | tojson(indent=2) }}
    {% endif %}
{% endfor %}
{% set ns = namespace(count=0) %}
{% for message in messages %}{% set ns.count = ns.count + 1 %}{% endfor %}
{{ ns.count }}{{ unk_token }}{{ pad_token }}{{ sep_token is defined }}{{ image_token }}{{ additional }}
{{ tools is none }}{{ documents is none }}{{ extra }}{{ add_generation_prompt }}
{%- macro twice(x) %}{{ x }}{{ x }}{% endmacro %}
{{ twice(messages[0].content) }}
"""


def in_transformers(directory):
    transformers = pytest.importorskip("transformers", reason="compares with transformers")
    return transformers.PreTrainedTokenizerFast.from_pretrained(directory)


def test_any_text_survives_encoding_and_decoding(tmp_path):
    made = (write_tokenizer(tmp_path / str(i), shift=i // 2) for i in range(3))
    draw, (same, tokenizer, other) = random.Random(0), map(load_tokenizer, made)
    texts = ODD_TEXTS + ["".join(chr(draw.randrange(1, 0xD800)) for _ in range(n)) for n in range(40)]
    for text in texts:
        ids = tokenizer.encode(text)
        assert all(type(i) is int and 0 <= i < tokenizer.vocab_size for i in ids)
        assert tokenizer.decode(ids, skip_special_tokens=False) == text
    assert tokenizer.backend.decode_batch([tokenizer.encode(text) for text in texts[-9:]]) == texts[-9:]
    ids = tokenizer.encode("1<|im_end|>2")
    assert [i in tokenizer.special_ids for i in ids] == [False, True, False] and tokenizer.decode(ids) == "12"
    assert same.hash == tokenizer.hash != other.hash and other.encode("x1") != tokenizer.encode("x1")


NEW = {"content": "<new>", "lstrip": False, "normalized": False, "rstrip": False, "single_word": False}
SPACED = NEW | {"content": "<tool>", "lstrip": True, "rstrip": True, "special": False}
PAD = SPACED | {"content": "<pad>", "__type": "AddedToken"}
DECLARED = {  # beside a tokenizer.json that knows <|im_start|>, <|im_end|>, <s> and </s> as 258 to 261
    "in tokenizer_config.json": {"added_tokens_decoder": {"262": NEW | {"special": True}, "263": SPACED}},
    "as text before": {"added_tokens_decoder": {"256": NEW | {"content": "ab", "special": True}}},
    "special, which tokenizer.json denies": {
        "tokenizer": False, "added_tokens_decoder": {"259": NEW | {"content": "<|im_end|>", "special": True}},
    },
    "by a name alone": {"eos_token": "<new>", "pad_token": PAD},
    "by a name, as text before": {"eos_token": "ab"},
    "by a name, which tokenizer.json denies": {"tokenizer": False, "eos_token": "<|im_end|>"},
    "in a list": {"extra_special_tokens": ["<new>", "<newer>"]},
    "in a list of old": {"additional_special_tokens": ["<new>", {"content": "</s>", "__type": "AddedToken"}]},
    "in added_tokens.json": {"added_tokens.json": {"<new>": 263, "<tool>": 262, "</s>": 261}},
    "in both old files": {
        "added_tokens.json": {"<new>": 262, "<tool>": 263},
        "special_tokens_map.json": {"eos_token": NEW, "extra_special_tokens": ["<tool>"]},
    },
    "in old files that no longer count": {
        "added_tokens_decoder": {}, "added_tokens.json": {"<new>": 262},
        "special_tokens_map.json": {"eos_token": "<tool>"},
    },
}  # fmt: skip


@pytest.mark.parametrize("where", DECLARED)
def test_tokens_that_only_other_files_declare_count(tmp_path, where):
    """As transformers reads them, and special where a file says so or they have a name."""
    declared = dict(DECLARED[where])
    special = declared.pop("tokenizer", True)
    for name in ("added_tokens.json", "special_tokens_map.json"):
        if name in declared:
            (tmp_path / name).write_text(json.dumps(declared.pop(name)))
    file = write_tokenizer(tmp_path, **declared) / "tokenizer.json"
    if not special:
        file.write_text(file.read_text().replace('"special": true', '"special": false'))
    tokenizer, theirs = load_tokenizer(tmp_path), in_transformers(tmp_path)
    for text in ("a<new>b", "x <tool> ab<newer>", "x <pad> </s>a<|im_end|>1", " <new>\n"):
        assert tokenizer.encode(text) == theirs.encode(text)
    assert tokenizer.special_ids == set(theirs.all_special_ids) | {
        i for i, token in theirs.added_tokens_decoder.items() if token.special
    }
    assert tokenizer.vocab_size == len(theirs)
    plain = load_tokenizer(write_tokenizer(tmp_path / "plain"))
    assert (tokenizer.hash == plain.hash) == (where == "in old files that no longer count")


def test_a_batch_setting_in_the_file_neither_pads_nor_truncates(tmp_path):
    file = write_tokenizer(tmp_path) / "tokenizer.json"
    backend = tokenizers.Tokenizer.from_file(str(file))
    backend.enable_truncation(3)
    backend.enable_padding(length=9)
    backend.save(str(file))
    tokenizer = load_tokenizer(tmp_path)
    assert [len(tokenizer.encode(text)) for text in ("x", "xxxxx")] == [1, 5]


TOKENS = {
    "unk_token": {"content": "<|im_end|>", "__type": "AddedToken"}, "pad_token": None, "image_token": "</s>",
    "extra_special_tokens": {"additional": "<s>"},
}  # fmt: skip


RENDERED = {  # template, chats, further values
    "Qwen2.5": (None, CHATS, [{}]),
    "Llama 3": (LLAMA3_STYLE, CHATS[:4], [{}, {"date_string": "26 Jul 2024"}, {"bos_token": "other"}]),
    "everything": (ODDITIES, CHATS, [{"extra": "é"}, {"extra": "é", "tools": []}]),
}


@pytest.mark.parametrize("kind", RENDERED)
def test_templates_render_as_in_transformers(tmp_path, kind):
    template, chats, values = RENDERED[kind]
    directory = write_tokenizer(tmp_path, template, **TOKENS) if template else shared("qwen2.5-tokenizer")
    theirs, mine, before = in_transformers(directory), load_tokenizer(directory), json.dumps(chats)
    for text in ODD_TEXTS:
        assert mine.encode(text) == theirs.encode(text)
        assert mine.decode(mine.encode(text)) == theirs.decode(theirs.encode(text), skip_special_tokens=True)
    for chat, prompt, more in itertools.product(chats, (True, False), values):
        text = mine.render(chat, add_generation_prompt=prompt, **more)
        assert text == theirs.apply_chat_template(chat, tokenize=False, add_generation_prompt=prompt, **more)
        if kind == "Llama 3":
            assert f"Today: {more.get('date_string', datetime.datetime.now().strftime('%Y'))}\n" in text
    assert json.dumps(chats) == before


def test_a_template_file_counts_before_the_default_of_several_named_ones(tmp_path):
    named = [{"name": "tool_use", "template": "tools"}, {"name": "default", "template": "plain"}]
    write_tokenizer(tmp_path, named)
    for expected in ("plain", "from the file, é", ""):
        if expected != "plain":
            (tmp_path / "chat_template.jinja").write_text(expected, encoding="utf-8")
        theirs = in_transformers(tmp_path).apply_chat_template(CHATS[0], tokenize=False)
        assert load_tokenizer(tmp_path).render(CHATS[0]) == expected == theirs
    assert "'default'" in refusal(load_tokenizer, write_tokenizer(tmp_path / "no", named[:1]))


def test_without_a_template_it_is_chatml(tmp_path):
    """Where there is no <|im_end|>, only an assistant's message ends the text."""
    plain, other = write_tokenizer(tmp_path / "bytes"), write_sentencepiece(tmp_path, "normalizer", None)
    for directory, inner, last in ((plain, "<|im_end|>", "<|im_end|>"), (other, "", "</s>")):
        expected = f"<|im_start|>user\nB: 3+4{inner}\n<|im_start|>assistant\n7{last}\n"
        tokenizer, chat = load_tokenizer(directory), CHATS[2][1:3]
        assert tokenizer.render(chat, add_generation_prompt=False) == expected
        assert tokenizer.render(chat) == expected + "<|im_start|>assistant\n"


FAILING = {  # templates are programs of strangers
    "{{ ''.__class__.__mro__[1].__subclasses__() }}": "unsafe",
    "{{ self._TemplateReference__context.environment }}": "unsafe",
    "{{ messages[0].update(content='changed') }}": "unsafe",
    "{% for i in range(10**9) %}x{% endfor %}": "Range too big",
    "{{ raise_exception('roles must alternate') }}": "roles must alternate",
    "{% macro f() %}{{ f() }}{% endmacro %}{{ f() }}": "recursion",
}


@pytest.mark.parametrize("template", FAILING)
def test_a_template_that_fails_or_reaches_for_python_gets_a_sentence(tmp_path, template):
    tokenizer, chat = load_tokenizer(write_tokenizer(tmp_path, template)), [{"role": "user", "content": "x"}]
    sentence = refusal(tokenizer.render, chat)
    assert f"chat template of {tmp_path} fails on a conversation: " in sentence
    assert FAILING[template] in sentence and chat == [{"role": "user", "content": "x"}]


def test_missing_and_damaged_files_get_a_sentence(tmp_path):
    assert f"No such file or directory: '{tmp_path}/tokenizer.json'" in refusal(load_tokenizer, tmp_path)
    write_tokenizer(tmp_path)
    whole = (tmp_path / "tokenizer.json").read_text()
    kinds = "{}", whole[:-20], whole.replace('"BPE"', '"Unheard"')
    cases = [*((kind, "{}") for kind in kinds), *((whole, config) for config in ("{", "[]"))]
    for content, config in (*cases, (whole, '{"added_tokens_decoder": {"x": {}}}')):
        (tmp_path / "tokenizer.json").write_text(content)
        (tmp_path / "tokenizer_config.json").write_text(config)
        assert str(tmp_path) in refusal(load_tokenizer, tmp_path)

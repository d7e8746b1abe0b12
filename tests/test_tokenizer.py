"""Text to ids, and conversations to text exactly as transformers writes them."""

import datetime
import json
import random

import pytest
from tiny import LLAMA3_STYLE, ODD_TEXTS, refusal, shared, write_tokenizer

from teamtr_min import load_tokenizer

LOOK = {"name": "look", "arguments": {"at": "Zürich <b>"}}
CHATS = [
    [{"role": "user", "content": "What is 7*8?"}],
    [{"role": "system", "content": "Be brief.\n"}, {"role": "user", "content": " hi "}],
    [
        {"role": "system", "content": "You are A."},
        {"role": "user", "content": "B: 3+4"},
        {"role": "assistant", "content": "7"},
        {"role": "user", "content": "B: no, 8"},
        {"role": "assistant", "content": "8 it is\n"},
    ],
    [{"role": "user", "content": text or "nothing"} for text in ODD_TEXTS],
    [
        {"role": "user", "content": "weather?"},
        {"role": "assistant", "content": None, "tool_calls": [{"type": "function", "function": LOOK}]},
        {"role": "tool", "content": '{"degrees": 21}'},
        {"role": "tool", "content": "sunny"},
        {"role": "assistant", "content": "21 degrees."},
    ],
]

# Everything else that templates out there rely on.
ODDITIES = """\
{% for message in messages %}
    {% if loop.index > 3 %}
        {% break %}
    {% elif message.role == 'system' %}
        {% continue %}
    {% endif %}
    {% if message.role == 'assistant' %}
        {% generation %}
{{ message.content }}{{ eos_token }}
        {% endgeneration %}
    {% else %}
{{ message | tojson }}|{{ message | tojson(indent=2) }}|{{ message | tojson(true) }}
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


def rendered_by_transformers(directory, chat, **kwargs) -> str:
    return in_transformers(directory).apply_chat_template(chat, tokenize=False, **kwargs)


# Ids


def test_any_text_survives_encoding_and_decoding(tmp_path):
    """Special tokens that are written out too; they are one id each, and not shown unless asked for."""
    tokenizer = load_tokenizer(write_tokenizer(tmp_path))
    draw = random.Random(0)
    texts = ODD_TEXTS + ["".join(chr(draw.randrange(1, 0xD800)) for _ in range(n)) for n in range(40)]
    for text in texts:
        ids = tokenizer.encode(text)
        assert all(type(i) is int and 0 <= i < tokenizer.vocab_size for i in ids)
        assert tokenizer.decode(ids, skip_special_tokens=False) == text
    assert tokenizer.decode_batch([tokenizer.encode(text) for text in texts[-9:]]) == texts[-9:]
    ids = tokenizer.encode("1<|im_end|>2")
    assert [tokenizer.is_special(i) for i in ids] == [False, True, False]
    assert tokenizer.decode(ids) == "12"
    assert tokenizer.eos_id == tokenizer.encode("</s>")[0] and tokenizer.unk_id is None


def test_the_tokenizers_own_special_tokens_can_be_left_out(tmp_path):
    tokenizer = load_tokenizer(write_tokenizer(tmp_path, bos=True))
    plain = tokenizer.encode("x1", add_special_tokens=False)
    assert tokenizer.encode("x1") == [*tokenizer.encode("<s>", add_special_tokens=False), *plain]
    assert len(plain) == 2


def test_qwens_tokenizer_encodes_and_renders_as_in_transformers():
    directory = shared("qwen2.5-tokenizer")
    theirs, mine = in_transformers(directory), load_tokenizer(directory)
    for text in ODD_TEXTS:
        assert mine.encode(text) == theirs(text)["input_ids"]
        assert mine.decode(mine.encode(text)) == theirs.decode(theirs.encode(text), skip_special_tokens=True)
    assert mine.eos_id == theirs.eos_token_id
    for chat in CHATS:
        for prompt in (True, False):
            text = mine.render(chat, add_generation_prompt=prompt)
            assert text == theirs.apply_chat_template(chat, tokenize=False, add_generation_prompt=prompt)
            assert text.endswith("<|im_start|>assistant\n") == prompt


def test_a_batch_setting_in_the_file_neither_pads_nor_truncates(tmp_path):
    file = write_tokenizer(tmp_path) / "tokenizer.json"
    raw = json.loads(file.read_text())
    raw["truncation"] = {"direction": "Right", "max_length": 3, "strategy": "LongestFirst", "stride": 0}
    raw["padding"] = {"strategy": {"Fixed": 9}, "direction": "Right", "pad_to_multiple_of": None}
    raw["padding"] |= {"pad_id": 0, "pad_type_id": 0, "pad_token": "<s>"}
    file.write_text(json.dumps(raw))
    tokenizer = load_tokenizer(tmp_path)
    assert [len(tokenizer.encode(text)) for text in ("x", "xxxxx")] == [1, 5]


def test_equal_hash_means_equal_ids(tmp_path):
    one, same, other = (load_tokenizer(write_tokenizer(tmp_path / str(i), shift=i // 2)) for i in range(3))
    assert one.hash == same.hash != other.hash
    assert one.encode("x1") == same.encode("x1") != other.encode("x1")


# Conversations


@pytest.mark.parametrize(
    "kwargs", [{}, {"date_string": "26 Jul 2024"}, {"bos_token": "other"}, {"tools": []}]
)
def test_a_llama3_style_template_renders_as_in_transformers(tmp_path, kwargs):
    tokenizer = load_tokenizer(write_tokenizer(tmp_path, LLAMA3_STYLE))
    for chat in CHATS[:4]:
        text = tokenizer.render(chat, **kwargs)
        assert text.startswith(kwargs.get("bos_token", "<s>") + "<|header|>system")
        assert f"Today: {kwargs.get('date_string', datetime.datetime.now().strftime('%Y'))}\n" in text
        assert text == rendered_by_transformers(tmp_path, chat, add_generation_prompt=True, **kwargs)


TOKENS = {
    "unk_token": {"content": "<|im_end|>", "__type": "AddedToken"},
    "pad_token": None,
    "image_token": "</s>",
    "extra_special_tokens": {"additional": "<s>"},
}


def test_every_construct_that_templates_rely_on_renders(tmp_path):
    """As spelled out here, and as in transformers; and the messages are as before."""
    chat = [{"role": "user", "content": "é<b>"}, {"role": "system", "content": "s"}]
    chat += [{"role": "assistant", "content": "7"}, {"role": "user", "content": "behind the break"}]
    tokenizer = load_tokenizer(write_tokenizer(tmp_path, ODDITIES, **TOKENS))
    assert tokenizer.render(chat, add_generation_prompt=False, extra="é") == (
        '{"role": "user", "content": "é<b>"}|{\n  "role": "user",\n  "content": "é<b>"\n}|'
        '{"role": "user", "content": "\\u00e9<b>"}\n'
        "7</s>\n"
        "4<|im_end|>False</s><s>\n"
        "TrueTrueéFalseé<b>é<b>"
    )
    before = json.dumps(CHATS)
    texts = [tokenizer.render(chat, add_generation_prompt=False, extra="é") for chat in CHATS]
    assert json.dumps(CHATS) == before
    for chat, text in zip(CHATS, texts):
        assert text == rendered_by_transformers(tmp_path, chat, add_generation_prompt=False, extra="é")


def test_special_tokens_may_stand_in_a_file_of_their_own(tmp_path):
    template = "{{ bos_token }}|{{ eos_token }}|{{ pad_token }}"
    write_tokenizer(tmp_path, template, eos_token="<s>")
    listing = {"eos_token": {"content": "</s>", "lstrip": False}, "pad_token": "<|im_end|>"}
    (tmp_path / "special_tokens_map.json").write_text(json.dumps(listing))
    tokenizer = load_tokenizer(tmp_path)
    assert tokenizer.render(CHATS[0]) == "<s>|</s>|<|im_end|>"
    assert tokenizer.render(CHATS[0]) == rendered_by_transformers(tmp_path, CHATS[0])
    write_tokenizer(tmp_path, template, eos_token="<s>", added_tokens_decoder={})
    tokenizer = load_tokenizer(tmp_path)  # a newer file says everything itself
    assert tokenizer.render(CHATS[0]) == "<s>|<s>|"


def test_a_special_token_that_is_no_text_is_refused(tmp_path):
    write_tokenizer(tmp_path, "{{ eos_token }}", eos_token="\ud800")  # half of a surrogate pair
    assert "cannot look up the eos_token" in refusal(load_tokenizer, tmp_path)


def test_of_several_named_templates_the_default_counts(tmp_path):
    named = [{"name": "tool_use", "template": "tools"}, {"name": "default", "template": "plain"}]
    assert load_tokenizer(write_tokenizer(tmp_path, named)).render(CHATS[0]) == "plain"
    assert rendered_by_transformers(tmp_path, CHATS[0]) == "plain"
    assert "default" in refusal(load_tokenizer, write_tokenizer(tmp_path, named[:1]))


def test_a_template_file_goes_before_the_configuration(tmp_path):
    write_tokenizer(tmp_path, "from the configuration")
    (tmp_path / "chat_template.jinja").write_text("from the file, é", encoding="utf-8")
    assert load_tokenizer(tmp_path).render(CHATS[0]) == "from the file, é"
    assert rendered_by_transformers(tmp_path, CHATS[0]) == "from the file, é"
    (tmp_path / "tokenizer_config.json").unlink()
    assert load_tokenizer(tmp_path).render(CHATS[0]) == "from the file, é"


def test_an_empty_template_is_a_template(tmp_path):
    assert load_tokenizer(write_tokenizer(tmp_path, "")).render(CHATS[0]) == ""


def test_without_a_template_it_is_chatml(tmp_path):
    tokenizer = load_tokenizer(write_tokenizer(tmp_path))
    text = tokenizer.render(CHATS[2])
    expected = "".join(f"<|im_start|>{m['role']}\n{m['content']}<|im_end|>\n" for m in CHATS[2])
    assert text == expected + "<|im_start|>assistant\n"
    assert tokenizer.render(CHATS[2], add_generation_prompt=False) == expected


def test_chatml_ends_messages_with_the_end_of_sequence_of_those_who_have_no_im_end():
    tokenizer = load_tokenizer(shared("stories260K/hf_llama"))
    assert tokenizer.render(CHATS[0], False) == "<|im_start|>user\nWhat is 7*8?</s>\n"


# Templates are programs of strangers


ESCAPES = [
    "{{ ''.__class__.__mro__[1].__subclasses__() }}",
    "{{ messages.__class__.__base__.__subclasses__() }}",
    "{{ raise_exception.__globals__['os'].getcwd() }}",
    "{{ strftime_now.__globals__.keys() | list }}",
    "{{ strftime_now.__code__.co_consts }}",
    "{{ lipsum.__globals__['os'].popen('id').read() }}",
    "{{ cycler.__init__.__globals__ }}",
    "{{ (messages | attr('__class__')).mro() }}",
    "{{ '{0.__class__.__mro__}'.format(messages) }}",
    "{{ '{x.__class__.__mro__}'.format_map({'x': messages}) }}",
    "{{ dict.mro() }}",
    "{{ dict.__subclasses__() }}",
    "{{ self._TemplateReference__context.environment }}",
    "{{ messages.append(1) }}{{ 1/0 }}",
    "{{ messages[0].update(content='changed') }}",
    "{{ [messages] | map(attribute='__class__') | map(attribute='__mro__') | first | first }}",
    "{% set ns = namespace() %}{% set ns.x = ''.__class__ %}{{ ns.x.mro() }}",
    "{% include 'tokenizer_config.json' %}",
    "{% import 'os' as os %}{{ os.getcwd() }}",
]


@pytest.mark.parametrize("template", ESCAPES)
def test_templates_cannot_reach_python(tmp_path, template):
    tokenizer = load_tokenizer(write_tokenizer(tmp_path, template))
    chat = [{"role": "user", "content": "x"}]
    assert "refuses this conversation" in refusal(tokenizer.render, chat)
    assert chat == [{"role": "user", "content": "x"}]


FAILING = {
    "{% for i in range(10**9) %}x{% endfor %}": "Range too big",
    "{{ raise_exception('roles must alternate') }}": "roles must alternate",
    "{{ messages[0].content + 1 }}": "str",
    "{{ 1 / 0 }}": "division by zero",
    "{{ 'x' * 10**15 }}": "MemoryError",
    "{% macro f() %}{{ f() }}{% endmacro %}{{ f() }}": "recursion",
    "{{ nowhere.attribute }}": "undefined",
}


@pytest.mark.parametrize("template", FAILING)
def test_a_template_that_fails_gets_a_sentence(tmp_path, template):
    sentence = refusal(load_tokenizer(write_tokenizer(tmp_path, template)).render, CHATS[0])
    assert f"chat template of {tmp_path} refuses this conversation" in sentence
    assert FAILING[template] in sentence


UNPARSABLE = ["{{ messages[0] | nosuchthing }}", "{% for %}", "{{ unclosed", "{% generation %} never ends"]


@pytest.mark.parametrize("template", UNPARSABLE)
def test_a_template_that_does_not_parse_gets_a_sentence(tmp_path, template):
    sentence = refusal(load_tokenizer, write_tokenizer(tmp_path, template))
    assert f"chat template of {tmp_path} does not parse" in sentence


# Damaged files


def test_missing_and_damaged_files_get_a_sentence(tmp_path):
    assert "give a directory" in refusal(load_tokenizer, "qwen9")
    assert "tokenizer.json does not exist" in refusal(load_tokenizer, tmp_path)
    write_tokenizer(tmp_path)
    whole = (tmp_path / "tokenizer.json").read_text()
    for content in ("", "{}", whole[:-20], whole.replace('"BPE"', '"Unheard"'), "[1, 2]"):
        (tmp_path / "tokenizer.json").write_text(content)
        assert "tokenizer.json is not a tokenizer" in refusal(load_tokenizer, tmp_path)
    (tmp_path / "tokenizer.json").write_text(whole)
    for content in (b"{", b"[]", b"\xff"):
        (tmp_path / "tokenizer_config.json").write_bytes(content)
        assert "tokenizer_config.json" in refusal(load_tokenizer, tmp_path)
    for template in (7, {"default": "x"}, ["x"]):
        (tmp_path / "tokenizer_config.json").write_text(json.dumps({"chat_template": template}))
        assert "neither a text nor a list" in refusal(load_tokenizer, tmp_path)
    (tmp_path / "chat_template.jinja").write_bytes(b"\xff\xfe")
    assert "chat_template.jinja cannot be read" in refusal(load_tokenizer, tmp_path)

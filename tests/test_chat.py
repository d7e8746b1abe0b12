"""A transcript as each agent sees it: the ids of transformers, growing at the end alone."""

import functools
import json
import random

import pytest
from tiny import LLAMA3_STYLE, SCHEMES, ZEPHYR, real_model, refusal, shared, write_sentencepiece
from tiny import write_tokenizer as write_bytes

from teamtr_min import load_tokenizer
from teamtr_min.hf.chat import CHATML, MARK, ChatFormat
from teamtr_min.tasks.task import Message, Problem, Role
from teamtr_min.team import Agent, Rendered, Team

# Histories are rewritten: thinking is only shown while it is fresh, as with Qwen3.
FORGETFUL = """\
{%- for m in messages -%}
<|im_start|>{{ m.role }}
{{ m.content.split('</think>')[-1] if m.role == 'assistant' and not loop.last else m.content }}<|im_end|>
{% endfor -%}
{%- if add_generation_prompt %}<|im_start|>assistant
{% endif -%}"""

ALTERNATING = """\
{%- for m in messages -%}{%- if (m.role == 'user') != (loop.index0 % 2 == 0) -%}
{{ raise_exception('roles must alternate') }}{% endif -%}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>
{% endfor -%}"""

# User and assistant are parted by ordinary text alone, as with Vicuna.
VICUNA = """\
{%- for m in messages %}{% if m.role == 'assistant' %}{{ 'ASSISTANT: ' + m.content + eos_token }}
{%- else %}{{ 'USER: ' + m.content + ' ' }}{% endif %}{% endfor %}
{%- if add_generation_prompt %}ASSISTANT:{% endif %}"""

# Between messages stand two line ends and ordinary text.
HASHES = """\
{%- for m in messages %}{{ '### ' + m.role + '\\n' + m.content + eos_token + '\\n\\n' }}{% endfor %}
{%- if add_generation_prompt %}{{ '### assistant\\n' }}{% endif %}"""

# Nothing stands behind a user's message, and both headers are special tokens that begin alike, as with R1.
R1 = """\
{{- bos_token }}{% for m in messages %}{% if m.role == 'system' %}{{ m.content }}{% elif m.role == 'user' %}
{{- '<\uff5cUser\uff5c>' + m.content }}{% else %}{{ '<\uff5cAssistant\uff5c>' + m.content + eos_token }}
{%- endif %}{% endfor %}{% if add_generation_prompt %}{{ '<\uff5cAssistant\uff5c>' }}{% endif %}"""


def write_r1(directory, source):
    """The tokenizer in `source` with R1's special tokens and template."""
    raw = json.loads((source / "tokenizer.json").read_text())
    for name in ("begin", "end", "User", "Assistant"):
        number = max(token["id"] for token in raw["added_tokens"]) + 1
        new = {"id": number, "content": f"<\uff5c{name}\uff5c>"}
        raw["added_tokens"].append(raw["added_tokens"][0] | new)
    directory.mkdir(parents=True, exist_ok=True)
    (directory / "tokenizer.json").write_text(json.dumps(raw))
    config = {"bos_token": "<\uff5cbegin\uff5c>", "eos_token": "<\uff5cend\uff5c>", "chat_template": R1}
    (directory / "tokenizer_config.json").write_text(json.dumps(config))
    return directory


def write_gpt2(directory):
    """Two line ends are one token, but not before a word; the post-processor takes spaces out of offsets."""
    file = write_bytes(directory, HASHES) / "tokenizer.json"
    raw = json.loads(file.read_text())
    raw["model"]["vocab"]["ĊĊ"] = 262
    raw["model"]["merges"].append(["Ċ", "Ċ"])
    raw["post_processor"] = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True}
    file.write_text(json.dumps(raw))
    return directory


# How each kind of tokenizer is made: its directory, given an empty one.
KINDS = {f"{scheme}, Zephyr": lambda d, s=scheme: write_sentencepiece(d, s) for scheme in SCHEMES}
KINDS |= {f"{scheme}, no template": lambda d, s=scheme: write_sentencepiece(d, s, None) for scheme in SCHEMES}
LLAMA, OLD = {"tokenizer_class": "LlamaTokenizer"}, {"tokenizer_class": "LlamaTokenizerFast", "legacy": True}
KINDS |= {
    "BOS in the template": lambda d: write_sentencepiece(d, "normalizer", "{{ bos_token }}" + ZEPHYR),
    "read as Llama's": lambda d: write_sentencepiece(d, "normalizer", **LLAMA),
    "read as Llama's of old": lambda d: write_sentencepiece(d, "never", **OLD),
    "first, an end token is added": lambda d: write_sentencepiece(d, "first", None, add_eos=True),
    "bytes, Llama 3": lambda d: write_bytes(d, LLAMA3_STYLE, bos=True),
    "bytes, no template": lambda d: write_bytes(d, bos=True),
    "bytes as GPT-2's": write_gpt2,
    "bytes as GPT-2's, R1": lambda d: write_r1(d, write_gpt2(d)),
    "Qwen2.5, R1": lambda d: write_r1(d, shared("qwen2.5-tokenizer")),
    "Qwen2.5": lambda d: shared("qwen2.5-tokenizer"),
    "stories260K": lambda d: shared("stories260K/hf_llama"),
    "a real model": lambda d: real_model(),
}
each_kind = pytest.mark.parametrize("kind", KINDS)
PIECES = [
    "a", "ab", "12", "7", "3.5", " ", "  ", "\n", "\n\n", "\t", "\r\n", "é", "日本", "🧮🇨🇭", "e\u0301",
    "Hello", " world", "?", "!\n", "<", ">", "|", "\u2581", "A:", "user", "\u200b",
    "{{ 1 }}", MARK, MARK[0], MARK[1:],
]  # fmt: skip


def random_text(draw: random.Random) -> str:
    return "".join(draw.choices(PIECES, k=draw.randrange(8)))


ROLES = [Role("A", "You are A.\nBe brief."), Role("B", ""), Role("Solver", " hi "), Role("D", "")]


def team_of(*tokenizers) -> Team:
    chats = {tokenizer: ChatFormat(tokenizer) for tokenizer in tokenizers}
    return Team([Agent(role, object(), t, chats[t]) for role, t in zip(ROLES, tokenizers)], task=None)


def say(team: Team, j: int, text: str, stopped: bool = True, ids: list[int] | None = None) -> Message:
    """A message as agent j would have sampled it, by default in the ids that encoding gives."""
    chat = team.agents[j].chat
    ids = chat.encode(text) if ids is None else ids
    tokens = ids + [chat.end_of_message] if stopped else ids
    return Message(j, tokens, text, [-1.0] * len(tokens), stopped)


def seen(team: Team, j: int, messages: list[Message], problem: str = "2+2?", prompt: bool = True) -> Rendered:
    return team.render(j, Problem("", problem, ""), messages, add_generation_prompt=prompt)


@functools.cache
def in_transformers(directory):
    transformers = pytest.importorskip("transformers", reason="compares with transformers")
    llama = "LlamaTokenizer" in (directory / "tokenizer_config.json").read_text()
    kind = transformers.LlamaTokenizerFast if llama else transformers.PreTrainedTokenizerFast
    return kind.from_pretrained(directory)


def by_transformers(team: Team, j: int, messages: list[tuple[int, str]], problem: str = "2+2?") -> list[int]:
    """The ids of the whole conversation, in the eyes of agent j, by transformers' apply_chat_template."""
    role, tokenizer = team.agents[j].role, team.agents[j].tokenizer
    theirs = in_transformers(tokenizer.directory)
    turns = [("system", role.system)] * bool(role.system) + [("user", problem)]
    for writer, text in messages:
        own = writer == j
        turns.append(("assistant", text) if own else ("user", f"{team.agents[writer].role.name}:\n{text}"))
    turns = [{"role": role, "content": content} for role, content in turns]
    more = {"date_string": "2024", "add_generation_prompt": True, "return_dict": False}
    if tokenizer.template is not None:
        return theirs.apply_chat_template(turns, **more)
    more |= {name: tokenizer.special[name] for name in ("end_of_message", "end_of_input")}
    start = [theirs.bos_token_id] if theirs("")["input_ids"] else []
    return start + theirs.apply_chat_template(turns, chat_template=CHATML, **more)


@each_kind
def test_a_prompt_has_the_ids_of_transformers(tmp_path, kind):
    team, draw = team_of(*[load_tokenizer(KINDS[kind](tmp_path / "t"))] * 3), random.Random(kind)
    for _ in range(60):
        problem, j = random_text(draw), draw.randrange(3)
        messages = [(draw.randrange(3), random_text(draw)) for _ in range(draw.randrange(6))]
        assert team.prompt(j, problem, messages) == by_transformers(team, j, messages, problem)


@each_kind
def test_sampled_ids_stand_where_transformers_writes_them(tmp_path, kind):
    """Or a reader of another tokenizer encodes the text. Texts begin with no space: it would be joined."""
    ours, other = load_tokenizer(KINDS[kind](tmp_path / "t")), load_tokenizer(write_bytes(tmp_path / "o"))
    team, draw = team_of(ours, other, ours), random.Random(kind)
    for _ in range(60):
        problem, j = random_text(draw), draw.choice([0, 2])
        texts = [random_text(draw).strip() + "." for _ in range(draw.randrange(6))]
        messages = [say(team, draw.randrange(3), text) for text in texts]
        expected = by_transformers(team, j, [(m.agent, m.text) for m in messages], problem)
        assert seen(team, j, messages, problem).ids == expected


@each_kind
def test_spelled_special_tokens_are_mere_text_to_the_reader(tmp_path, kind):
    tokenizer = load_tokenizer(KINDS[kind](tmp_path / "t"))
    chat = ChatFormat(tokenizer)
    spelled = tokenizer.decode([*tokenizer.special_ids], skip_special_tokens=False)
    assert set(tokenizer.encode(spelled)) >= tokenizer.special_ids and "<" in spelled
    for written in (chat.teammate, lambda name, text: chat.said("assistant", f"{name}{text}")):
        special, plain = (
            [i for i in written("B", text) if i in tokenizer.special_ids] for text in (f"1{spelled}2", "1")
        )
        assert special == plain
    assert not tokenizer.special_ids & {*chat.encode(f"1{spelled}2")}
    assert tokenizer.decode(chat.encode(f"x{spelled}")).replace(" ", "") == f"x{spelled}".replace(" ", "")


@pytest.mark.parametrize("agents", [1, 2, 3, 4])
def test_a_transcript_grows_at_its_end_alone(tmp_path, agents):
    """Any writers; any ids, cut off or not, some just an end; a template that rewrites histories."""
    tokenizers = [load_tokenizer(write_bytes(tmp_path / str(i), FORGETFUL, shift=i)) for i in range(2)]
    team, draw = team_of(*(tokenizers[j % 2] for j in range(agents))), random.Random(agents)
    for _ in range(60):
        messages = []
        for _ in range(draw.randrange(9)):
            j, stopped = draw.randrange(agents), draw.random() < 0.6
            ids = [draw.randrange(250) for _ in range(draw.randrange(0 if stopped else 1, 6))]
            messages.append(say(team, j, tokenizers[j % 2].decode(ids), stopped, ids))
        closed = [say(team, m.agent, m.text, ids=m.content) for m in messages]
        for j, agent in enumerate(team.agents):
            final, trained = seen(team, j, messages), seen(team, j, messages, prompt=False)
            own = [(t, message) for t, message in enumerate(messages) if message.agent == j]
            assert len(trained.spans) == len(own) and trained.spans == final.spans
            for (t, message), (start, stop) in zip(own, final.spans):
                before = seen(team, j, messages[:t])
                # What was sampled stands right behind what was prefilled, and nothing of either ever changes.
                assert final.ids[:stop] == before.ids + message.tokens and start == len(before.ids)
            assert final.ids == seen(team, j, closed).ids  # as context what was cut off is closed
            # Trained on is no context behind the last trainable token.
            end = final.spans[-1][1] if own else len(agent.chat.opening(agent.role.system, "2+2?"))
            assert trained.ids == final.ids[:end]


@pytest.mark.parametrize("generation, config, ends", [
    ([2, 1], None, {1, 2}), (1, [5, 7], {1, 2, 5, 7}), (None, 1, {1, 2}), (None, None, {2}),
])  # fmt: skip
def test_every_end_token_that_a_checkpoint_names_ends_a_message(tmp_path, generation, config, ends):
    source = write_sentencepiece(tmp_path / "t", "normalizer")
    for name, value in (("generation_config.json", generation), ("config.json", config)):
        if value is not None:
            (source / name).write_text(json.dumps({"eos_token_id": value, "other": 0}))
    tokenizer = load_tokenizer(source)
    assert ChatFormat(tokenizer).end_tokens == ends and ChatFormat(tokenizer).end_of_message == 2
    (tmp_path / "saved").mkdir()  # a run's agents have no such config.json
    tokenizer.save(tmp_path / "saved")
    saved = load_tokenizer(tmp_path / "saved")
    assert saved.hash == tokenizer.hash and ChatFormat(saved).end_tokens == ends
    # Sampled with another end than the template's, a message keeps it in its writer's eyes alone.
    team, message = team_of(tokenizer, tokenizer), Message(0, [300, 1], "x", [0.0, 0.0], stopped=True)
    chat = team.agents[0].chat
    for j, expected in ((0, [300, 1, *chat.assistant_footer]), (1, [300, *chat.user_footer])):
        ids = seen(team, j, [message]).ids
        assert ids[ids.index(300) : -len(chat.assistant_header)] == expected


def test_a_template_is_told_the_day_of_the_run(tmp_path):
    tokenizer = load_tokenizer(write_bytes(tmp_path, LLAMA3_STYLE))
    for date, year in (("2024-07-26", "2024"), ("1999-01-01", "1999")):
        ids = ChatFormat(tokenizer, date).opening("", "Hi")
        assert f"Today: {year}\n" in tokenizer.decode(ids)
    assert ChatFormat(tokenizer).opening("", "Hi") == ChatFormat(tokenizer, "2024-07-26").opening("", "Hi")


# Behind a user's message "<|user|>" goes on with a text, behind an assistant's it begins one.
UNLIKE = """\
{%- for m in messages %}{{ '<|' + m.role + '|>\\n' + m.content }}
{{- eos_token if m.role == 'assistant' else '\\n' }}{% endfor %}
{%- if add_generation_prompt %}{{ '<|assistant|>\\n' }}{% endif %}"""

ENDLESS = """\
{% for m in messages %}{% if m.role == 'user' %}<s>{{ m.content }}</s>{% else %}{{ m.content }}{% endif %}
{%- endfor %}{% if add_generation_prompt %}:{% endif %}"""


@pytest.mark.parametrize("template, reason", [
    (ALTERNATING, "roles must alternate"), ("{{ unclosed", "unexpected end of template"),
    ("{% for m in messages %}{{ m.content }}{% endfor %}", "alike"), ("{{ messages[-1].content }}", "alike"),
    ("nothing at all", "alike"), (ENDLESS, "does not end an assistant's message"), (UNLIKE, "alike"),
    (VICUNA, "alike"),
])  # fmt: skip
def test_a_template_that_cannot_carry_a_team_is_refused(tmp_path, template, reason):
    """With Vicuna " USER" and " ASSISTANT" begin with the space that ends the message before."""
    file = write_sentencepiece(tmp_path, "normalizer", template) / "tokenizer.json"
    raw = json.loads(file.read_text())
    raw["model"]["merges"] += [["\u2581", "U"], ["\u2581", "A"]]
    raw["model"]["vocab"] |= {"\u2581U": 1000, "\u2581A": 1001}
    file.write_text(json.dumps(raw))
    sentence = refusal(ChatFormat, load_tokenizer(tmp_path))
    assert reason in sentence and str(tmp_path) in sentence

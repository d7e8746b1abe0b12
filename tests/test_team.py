"""The shared transcript as each agent sees it: spliced from ids, growing only at its end."""

import random
import unicodedata
from pathlib import Path

import pytest
from tiny import LLAMA3_STYLE, ODD_TEXTS, shared, write_tokenizer

from teamtr_min import load_tokenizer
from teamtr_min.files import UserError
from teamtr_min.team import Agent, ChatFormat, Message, Rendered, Role, Team

# Histories are rewritten: thinking is only shown while it is fresh, as with Qwen3.
FORGETFUL = """\
{%- for message in messages -%}
<|im_start|>{{ message.role }}
{% if message.role == 'assistant' and not loop.last %}{{ message.content.split('</think>')[-1] }}
{%- else %}{{ message.content }}{% endif %}<|im_end|>
{% endfor -%}
{%- if add_generation_prompt %}<|im_start|>assistant
{% endif -%}"""

ALTERNATING = """\
{%- for message in messages -%}
{%- if (message.role == 'user') != (loop.index0 % 2 == 0) -%}
{{ raise_exception('roles must alternate') }}{% endif -%}
<|im_start|>{{ message.role }}\n{{ message.content }}<|im_end|>
{% endfor -%}"""


def team_of(*tokenizers) -> Team:
    roles = [Role(name, f"You are {name}.\nBe brief.") for name in "ABCD"]
    return Team([Agent(None, t, ChatFormat(t), role) for t, role in zip(tokenizers, roles)])


def say(team: Team, j: int, text: str, stopped: bool = True, ids: list[int] | None = None) -> Message:
    """A message as agent j would have sampled it, by default in the ids that encoding gives."""
    chat = team.agents[j].chat
    ids = chat.encode(text) if ids is None else ids
    tokens = ids + [chat.end_of_message] if stopped else ids
    return Message(j, tokens, text, [-1.0] * len(tokens), stopped)


def seen(team: Team, j: int, messages: list[Message], problem: str = "2+2?") -> Rendered:
    return team.render(j, problem, messages, add_generation_prompt=True)


def by_template(team: Team, j: int, messages: list[Message], problem: str = "2+2?") -> str:
    """The transcript by the template itself, every turn anew."""
    agent = team.agents[j]
    turns = [{"role": "system", "content": agent.role.system}, {"role": "user", "content": problem}]
    for message in messages:
        name = team.agents[message.agent].role.name
        own = {"role": "assistant", "content": message.text}
        turns.append(own if message.agent == j else {"role": "user", "content": f"{name}:\n{message.text}"})
    return agent.tokenizer.render(turns, add_generation_prompt=True, date_string="26 Jul 2024")


def assert_reads_as_the_template_writes(team: Team, messages: list[Message], problem: str = "2+2?") -> None:
    for j, agent in enumerate(team.agents):
        text = agent.tokenizer.decode(seen(team, j, messages, problem).ids, skip_special_tokens=False)
        # Normalized, since Qwen's tokenizer does so to all it reads.
        assert text == unicodedata.normalize("NFC", by_template(team, j, messages, problem))


@pytest.fixture(scope="module")
def qwen():
    return load_tokenizer(shared("qwen2.5-tokenizer"))


@pytest.fixture
def tiny(tmp_path):
    return load_tokenizer(write_tokenizer(tmp_path / "tiny"))


def test_a_soloists_transcript_is_what_the_template_encodes_to(qwen):
    """Qwen2.5's real tokenizer, messages in the ids that encoding gives: splicing shows in no id."""
    team = team_of(qwen)
    texts = [text for text in ODD_TEXTS if text and text[0] != "\n" and "<|" not in text] + ["42", "x\ny"]
    messages = [say(team, 0, text) for text in texts]
    for problem in texts:
        assert seen(team, 0, messages, problem).ids == qwen.encode(by_template(team, 0, messages, problem))


def test_a_teams_transcript_reads_as_the_template_writes_it(qwen):
    team = team_of(qwen, qwen, qwen)
    draw = random.Random(0)
    for _ in range(25):
        texts = draw.choices([text for text in ODD_TEXTS if "<|" not in text], k=6)
        messages = [say(team, draw.randrange(3), text) for text in texts]
        assert_reads_as_the_template_writes(team, messages, "12 + 3\n\n")
    # A name and a number share no token, so there even the ids agree.
    messages = [say(team, 1, "15"), say(team, 0, "15, so 16"), say(team, 2, "1"), say(team, 2, "6\n")]
    assert seen(team, 0, messages).ids == qwen.encode(by_template(team, 0, messages))


@pytest.mark.parametrize("template", [None, LLAMA3_STYLE, FORGETFUL])
def test_other_templates_read_alike_too(tmp_path, template):
    team = team_of(*[load_tokenizer(write_tokenizer(tmp_path, template))] * 2)
    messages = [say(team, 0, "7*8"), say(team, 1, "56"), say(team, 1, "or so"), say(team, 0, "yes, 56")]
    assert_reads_as_the_template_writes(team, messages)


def random_transcript(team: Team, draw: random.Random) -> list[Message]:
    """Any order of writers; messages of any ids, cut off or not, some with nothing in them but their end."""
    messages = []
    for _ in range(draw.randrange(9)):
        j, stopped = draw.randrange(len(team.agents)), draw.random() < 0.6
        ids = [draw.randrange(250) for _ in range(draw.randrange(0 if stopped else 1, 6))]
        messages.append(say(team, j, team.agents[j].tokenizer.decode(ids), stopped, ids))
    return messages


@pytest.mark.parametrize("agents", [1, 2, 3, 4])
def test_what_an_agent_sees_only_ever_grows_at_its_end(tmp_path, agents):
    tokenizers = [load_tokenizer(write_tokenizer(tmp_path / str(i), shift=i)) for i in range(2)]
    team = team_of(*(tokenizers[j % 2] for j in range(agents)))
    draw = random.Random(agents)
    for _ in range(60):
        messages = random_transcript(team, draw)
        for j, agent in enumerate(team.agents):
            final = seen(team, j, messages)
            trained = team.render(j, "2+2?", messages, add_generation_prompt=False)
            own = [(t, message) for t, message in enumerate(messages) if message.agent == j]
            assert len(trained.spans) == len(own) and trained.spans == final.spans
            for (t, message), (start, stop) in zip(own, final.spans):
                before = seen(team, j, messages[:t])
                # What was sampled stands right behind what was prefilled, and nothing of either ever changes.
                assert final.ids[:stop] == before.ids + message.tokens and start == len(before.ids)
            # Trained on is no context behind the last trainable token.
            end = final.spans[-1][1] if own else len(agent.chat.opening(agent.role.system, "2+2?"))
            assert trained.ids == final.ids[:end]


def test_sampled_ids_are_never_encoded_anew(qwen):
    team = team_of(qwen, qwen)
    spelled = [qwen.encode(letter)[0] for letter in "hello"]  # encoding "hello" gives one id
    assert len(qwen.encode("hello")) == 1
    message = say(team, 0, "hello", ids=spelled)
    for j in range(2):
        ids = seen(team, j, [message]).ids
        assert any(ids[i : i + 5] == spelled for i in range(len(ids)))


def test_a_message_cut_off_is_closed_as_context(tiny):
    team = team_of(tiny, tiny)
    whole, cut = say(team, 0, "12 and"), say(team, 0, "12 and", stopped=False)
    end = team.agents[0].chat.end_of_message
    for j in range(2):
        closed = seen(team, j, [cut]).ids
        assert closed == seen(team, j, [whole]).ids and closed.count(end) == 3
    both = seen(team, 0, [whole, cut])
    (start, stop), (start_cut, stop_cut) = both.spans
    assert both.ids[start:stop] == whole.tokens and both.ids[stop - 1] == end
    assert both.ids[start_cut:stop_cut] == cut.tokens
    assert both.ids[stop_cut] == end  # behind the span: never trained


def test_agents_with_other_tokenizers_read_each_others_text(tmp_path):
    team = team_of(*(load_tokenizer(write_tokenizer(tmp_path / str(i), shift=i)) for i in (0, 5)))
    messages = [say(team, 0, "ab12"), say(team, 1, "né\n"), say(team, 0, "cut", stopped=False)]
    assert_reads_as_the_template_writes(team, messages)
    first, second = (seen(team, j, messages) for j in range(2))
    assert (len(first.spans), len(second.spans)) == (2, 1) and first.ids != second.ids


@pytest.mark.parametrize("problem", ["", "  ", "\n", "\N{SECTION SIGN}U\N{SECTION SIGN}", "{{ 1 + 1 }}"])
def test_a_problem_is_taken_literally(tiny, problem):
    assert_reads_as_the_template_writes(team_of(tiny), [], problem)


def test_the_end_of_message_is_one_special_id(qwen, tiny):
    assert ChatFormat(qwen).end_of_message == qwen.encode("<|im_end|>")[0] == qwen.eos_id
    assert ChatFormat(tiny).end_of_message == tiny.encode("<|im_end|>")[0]
    stories = load_tokenizer(shared("stories260K/hf_llama"))
    chat = ChatFormat(stories)
    assert (chat.end_of_message, chat.opening("", "Once")[0]) == (2, 1)


@pytest.mark.parametrize("template", [None, LLAMA3_STYLE])
def test_a_transcript_has_one_bos(tmp_path, template):
    """A checkpoint's template writes it; ChatML does not, so there the tokenizer puts its own."""
    tokenizer = load_tokenizer(write_tokenizer(tmp_path, template, bos=True))
    team = team_of(tokenizer, tokenizer)
    ids = seen(team, 0, [say(team, 0, "7*8"), say(team, 1, "56")]).ids
    assert ids[0] == tokenizer.encode("")[0] and ids.count(ids[0]) == 1


def test_todays_date_is_not_in_a_transcript(tmp_path):
    tokenizer = load_tokenizer(write_tokenizer(tmp_path, LLAMA3_STYLE))
    assert "Today: 26 Jul 2024" in tokenizer.decode(ChatFormat(tokenizer).opening("", "Hi"))


@pytest.mark.parametrize(
    "template, reason",
    [
        (ALTERNATING, "roles must alternate"),
        ("{% for m in messages %}{{ m.content }}{% endfor %}", "does not treat messages alike"),
        ("{{ messages[-1].content }}", "does not treat messages alike"),
        ("nothing at all", "does not treat messages alike"),
        (
            "{% for m in messages %}{% if m.role == 'user' %}<s>{{ m.content }}</s>{% else %}{{ m.content }}"
            "{% endif %}{% endfor %}{% if add_generation_prompt %}:{% endif %}",
            "does not end an assistant's message",
        ),
    ],
)
def test_a_template_that_cannot_carry_a_team_is_refused(tmp_path: Path, template, reason):
    tokenizer = load_tokenizer(write_tokenizer(tmp_path, template))
    with pytest.raises(UserError, match=reason) as caught:
        ChatFormat(tokenizer)
    assert str(tmp_path) in str(caught.value)

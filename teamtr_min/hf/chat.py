"""Text <-> token ids, conversations -> text, and the ids of a team's messages as one agent sees them. Chat
templates are programs of strangers, so they run in jinja2's sandbox."""

import datetime
import functools
import hashlib
import json
import os
import re
import shutil
from collections.abc import Iterable
from pathlib import Path

import jinja2
from jinja2.sandbox import ImmutableSandboxedEnvironment
from tokenizers import AddedToken
from tokenizers import Tokenizer as Backend

from teamtr_min.files import UserError, read_json, write_json
from teamtr_min.hf.weights import TOKENIZER_FILES, find_base, find_model

# For checkpoints without a template. Where there is no <|im_end|>, a model ends its own messages with its end
# of text. No other message has that token: to a base model it says that an unrelated text begins.
CHATML = """\
{%- for message in messages -%}
{{ '<|im_start|>' + message['role'] + '\\n' + message['content'] }}
{{- (end_of_message if message['role'] == 'assistant' else end_of_input) + '\\n' }}
{%- endfor -%}
{%- if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% endif -%}"""
GENERATION = "generation_config.json"
MARK = "\N{SECTION SIGN}M\N{SECTION SIGN}"  # stands for a content


class Tokenizer:
    """Text <-> token ids, and conversations -> text. Two tokenizers with equal `hash` agree on every id.

    special: bos_token, eos_token, ... as templates know them. special_ids: ids that mere text never becomes.
    start: ids that it puts before a text. end_ids: end tokens of generation_config.json and config.json.
    template: the checkpoint's own, or None."""

    def __init__(self, directory: str | os.PathLike):
        directory, base = Path(directory), find_base(Path(directory))[0]  # an adapter may lack a tokenizer
        self.directory = directory if (directory / "tokenizer.json").is_file() else base
        config = _read(self.directory / "tokenizer_config.json")
        jinja = self.directory / "chat_template.jinja"
        try:
            text = _as_transformers_reads((self.directory / "tokenizer.json").read_text("utf-8"), config)
            self.backend, self.special = self._load(text, config)
            self.template = jinja.read_text("utf-8") if jinja.is_file() else config.get("chat_template")
            if isinstance(self.template, list):  # several, by name
                self.template = {one["name"]: one["template"] for one in self.template}["default"]
        except Exception as error:  # the backend raises bare Exceptions
            raise UserError(f"{self.directory} holds no usable tokenizer: {error}") from None
        added = self.backend.get_added_tokens_decoder()
        self.special_ids = {i for i, token in added.items() if token.special}
        self._spelled = re.compile("|".join(re.escape(added[i].content) for i in self.special_ids) or "(?!)")
        self.hash = hashlib.sha256(f"{text}{sorted(map(str, added.items()))}".encode()).hexdigest()
        around, alone = self.backend.encode("x"), self.backend.encode("x", add_special_tokens=False).ids
        before = (around.special_tokens_mask + [0]).index(0)
        self.start, self._end = around.ids[:before], around.ids[before + len(alone) :]
        self.vocab_size = self.backend.get_vocab_size()
        self.backend.post_processor = None  # all that is left of it moves the offsets that `between` goes by
        self.end_ids = set()
        for file in [at / name for at in (self.directory, base) for name in (GENERATION, "config.json")]:
            ids = _read(file).get("eos_token_id")
            self.end_ids |= {*(ids if isinstance(ids, list) else [ids])} - {None}
        if self.template is None:
            known = self.backend.token_to_id("<|im_end|>") is not None
            self.special["end_of_message"] = "<|im_end|>" if known else self.special.get("eos_token", "</s>")
            self.special["end_of_input"] = "<|im_end|>" if known else ""

    def encode(self, text: str, add_special_tokens: bool = True) -> list[int]:
        """Ids of `text`, by default with those put around every text (Llama's BOS). A special token that is
        spelled in `text` becomes its id, as in a rendered template."""
        ids = self.backend.encode(text, add_special_tokens=False).ids
        return [*self.start, *ids, *self._end] if add_special_tokens else ids

    def between(self, before: str, text: str, after: str = "") -> list[int]:
        """Ids of `text` where it stands between `before` and `after`, as if all three were encoded at once.
        Raises UserError where a token reaches across an end of `text`."""
        encoding = self.backend.encode(before + text + after, add_special_tokens=False)
        low, high = len(before), len(before) + len(text)
        if any(start < edge < stop for start, stop in encoding.offsets for edge in (low, high)):
            raise UserError(f"{self.directory}: a token reaches across an end of {text[-60:]!r}")
        return [i for i, (start, _) in zip(encoding.ids, encoding.offsets) if low <= start < high]

    def mere(self, text: str) -> str:
        """`text` with a space inside each special token that it spells, so that it cannot end a message."""
        return self._spelled.sub(lambda token: f"{token[0][:-1][:1]} {token[0][1:]}", text)

    def decode(self, ids: list[int], skip_special_tokens: bool = True) -> str:
        return self.backend.decode(list(ids), skip_special_tokens=skip_special_tokens)

    def render(self, messages: list[dict], add_generation_prompt: bool = True, **template_kwargs) -> str:
        """The conversation as the chat template writes it, and transformers' `apply_chat_template` does.
        `messages` are {"role", "content"}. Raises UserError where the template fails."""
        values = {"tools": None, "documents": None, **self.special, **template_kwargs, "messages": messages}
        try:
            template = _compiled(CHATML if self.template is None else self.template)
            return template.render(values, add_generation_prompt=add_generation_prompt)
        except Exception as error:  # a template may raise anything
            why = str(error) or type(error).__name__
            raise UserError(f"the chat template of {self.directory} fails on a conversation: {why}") from None

    def save(self, directory: Path, end_tokens: Iterable[int] = ()) -> None:
        """Copy the tokenizer's files; generation_config.json there names all end tokens, `end_tokens` too."""
        for name in TOKENIZER_FILES:
            if (self.directory / name).is_file():
                shutil.copyfile(self.directory / name, directory / name)
        if ends := sorted({*self.end_ids, *end_tokens}):
            write_json(directory / GENERATION, _read(directory / GENERATION) | {"eos_token_id": ends})

    def _load(self, text: str, config: dict) -> tuple[Backend, dict[str, str]]:
        """The backend with every token that a file beside tokenizer.json declares, and special ones by name,
        as transformers reads them: without `added_tokens_decoder` the older files count."""
        backend = Backend.from_str(text)
        backend.no_truncation()
        backend.no_padding()
        listed, older = config.get("added_tokens_decoder"), {}
        if listed is None:
            config = config | _read(self.directory / "special_tokens_map.json")
            older = _read(self.directory / "added_tokens.json")
        extra = config.get("extra_special_tokens") or config.get("additional_special_tokens") or []
        named = {name: token for name, token in config.items() if name.endswith("_token")}
        named |= extra if isinstance(extra, dict) else dict(enumerate(extra))
        named = {name: _special(token) for name, token in named.items() if isinstance(token, str | dict)}
        known = {t.content: t for t in [*named.values(), *backend.get_added_tokens_decoder().values()]}
        listed = sorted((listed or {}).items(), key=lambda item: int(item[0]))
        new = {fields["content"]: AddedToken(**fields) for _, fields in listed}
        for content in [*sorted(older, key=older.get), *(token.content for token in named.values())]:
            new.setdefault(content, known.get(content) or AddedToken(content))
        for token in named.values():
            new[token.content].special = True
        backend.add_tokens([*new.values()])
        return backend, {name: token.content for name, token in named.items() if isinstance(name, str)}


def load_tokenizer(name_or_dir: str | os.PathLike) -> Tokenizer:
    """The tokenizer of a model directory, or of a name that `load_model` knows. Raises UserError."""
    return Tokenizer(find_model(name_or_dir))


class ChatFormat:
    """The ids of a transcript in the eyes of an agent that has this tokenizer and its chat template.

    A transcript is `opening`, then each message: `teammate`, or where the agent wrote it `assistant_header`,
    the sampled ids with their end token, `assistant_footer`. Together they are the ids of the conversation,
    rendered and encoded at once; only sampled ids stay as they are. Raises UserError for a template that does
    not treat messages alike wherever they stand. date: the day that the template is told. end_tokens: the ids
    that end a message; end_of_message: the one that the template writes."""

    def __init__(self, tokenizer: Tokenizer, date: str = "2024-07-26"):
        self.tokenizer, self.date = tokenizer, datetime.date.fromisoformat(date)
        between, footer = tokenizer.between, self._behind_first()
        turns = [("user", MARK), ("assistant", MARK), ("user", MARK)] * 2
        gaps = self._render(turns, prompt=True).split(MARK)[1:]
        try:
            to_own, to_user, to_third, *_ = gaps
            header, user_header = to_own.removeprefix(footer), to_third.removeprefix(footer)
            closing = to_user.removesuffix(user_header)
            parts = [footer + header, closing + user_header, footer + user_header]
            self.header, self.user_header, self.footer, self.closing = header, user_header, footer, closing
            self.user_footer = self._ending("x", footer)
            self.end_of_message, *self.assistant_footer = self._ending("x", closing)
            headers = header, user_header + "A:\n"
            ids, again = ([between("x" + end, h) for h in headers] for end in (footer, closing))
            told = self._render([("system", "x"), *turns], prompt=True).split(MARK)[1:]
            alike = header and told == gaps == [*parts, *parts[:2], parts[0]] and ids == again
        except (ValueError, UserError):  # too few parts, or a token reaches across the end of one
            alike = False
        if not alike or self.end_of_message not in tokenizer.special_ids:  # else mere text could hold its end
            raise UserError(
                f"no team can talk by the chat template of {tokenizer.directory}: it does not treat messages "
                "alike wherever they stand, or does not end an assistant's message with a special token"
            )
        self.assistant_header = ids[0]
        self.end_tokens = frozenset([self.end_of_message, *tokenizer.end_ids])

    @functools.lru_cache(maxsize=4096)  # noqa: B019  one format lives as long as its team
    def opening(self, system: str, problem: str) -> tuple[int, ...]:
        """System prompt and problem, up to the end of the problem's message."""
        tokenizer = self.tokenizer
        unknown = tokenizer.backend.token_to_id(tokenizer.special.get("unk_token", ""))
        if unknown in tokenizer.encode(problem):
            other = "give a --model that has, such as HuggingFaceTB/SmolLM2-135M-Instruct"
            why = f"the model in {tokenizer.directory} has no tokens for problem {problem[:60]!r}"
            raise UserError(f"{why}; {other}")
        turns = [("system", system)] * bool(system) + [("user", problem)]
        text = self._render(turns, prompt=True).removesuffix(self.header)
        # A checkpoint's own template writes its BOS. ChatML does not, so there the tokenizer adds it.
        start = tokenizer.start if tokenizer.template is None else []
        return (*start, *self._ending("", text))

    @functools.lru_cache(maxsize=4096)  # noqa: B019
    def teammate(self, name: str, text: str) -> list[int]:
        """A message of another agent, given as text. It cannot end by spelling a special token."""
        return self.said("user", f"{name}:\n{text}")

    def teammate_ids(self, name: str, ids: list[int]) -> list[int]:
        """A message of another agent, given as the ids that it sampled, without its end token."""
        return [*self._name(name), *ids, *self.user_footer]

    def encode(self, text: str) -> list[int]:
        """The ids that this agent would sample to write `text`, without an end token."""
        between, text = self.tokenizer.between, self.tokenizer.mere(text)
        try:
            return between("x" + self.footer + self.header, text, self.closing)
        except UserError:  # encoded at once, it would share a token with the header
            return between("x", text, self.closing)

    @functools.lru_cache(maxsize=1024)  # noqa: B019
    def _name(self, name: str) -> list[int]:
        return self.tokenizer.between("x" + self.footer, f"{self.user_header}{name}:\n")

    def said(self, role: str, content: str) -> list[int]:
        """A message given as text: header, content, which the template may trim, end token and footer."""
        turns = (role, self.tokenizer.mere(content)), ("user", MARK)
        part = self._behind_first(*turns).removeprefix(self.footer).rpartition(MARK)[0]
        return self._ending("x" + self.footer, part.removesuffix(self.user_header))

    def _ending(self, before: str, text: str) -> list[int]:
        """Ids of `text`, which ends a message. Raises UserError where they depend on who writes the next."""
        ids, again = (self.tokenizer.between(before, text, h) for h in (self.header, self.user_header))
        if ids != again:
            raise UserError(f"{self.tokenizer.directory}: what follows changes the ids of {text[-60:]!r}")
        return ids

    def _behind_first(self, *turns: tuple[str, str]) -> str:
        """What the template writes behind the content of a first message when `turns` follow it."""
        return self._render([("user", MARK), *turns], prompt=False).partition(MARK)[2]

    def _render(self, turns: list[tuple[str, str]], prompt: bool) -> str:
        messages = [{"role": role, "content": content} for role, content in turns]
        return self.tokenizer.render(messages, prompt, strftime_now=self.date.strftime)


def _read(file: Path) -> dict:
    return read_json(file) if file.is_file() else {}


def _as_transformers_reads(text: str, config: dict) -> str:
    """tokenizer.json, of which transformers 5 takes only vocabulary and merges where the class is Llama's."""
    llama = config.get("tokenizer_class") in ("LlamaTokenizer", "LlamaTokenizerFast")
    if not llama or '"ByteLevel"' in text:
        return text
    scheme = "always" if config.get("legacy") else "first"
    spaces = {"type": "Metaspace", "replacement": "\u2581", "split": False}
    parts = json.loads(text) | {"normalizer": None, "pre_tokenizer": spaces}
    spaces["prepend_scheme"] = scheme
    if config.get("add_prefix_space") is False:
        spaces["prepend_scheme"] = "never"
        steps = (parts["decoder"] or {}).get("decoders", [])  # of which one takes the added space away again
        parts["decoder"] = {"type": "Sequence", "decoders": [s for s in steps if s["type"] != "Strip"]}
    return json.dumps(parts)


def _special(token: str | dict) -> AddedToken:
    fields = {"content": token} if isinstance(token, str) else {k: token[k] for k in token if k != "__type"}
    return AddedToken(**fields | {"special": True})


@functools.cache
def _compiled(template: str) -> jinja2.Template:
    """A template with the filters and functions that chat templates rely on."""

    def refuse(message: str):
        raise jinja2.TemplateError(message)

    blocks = {"trim_blocks": True, "lstrip_blocks": True}
    environment = ImmutableSandboxedEnvironment(**blocks, extensions=["jinja2.ext.loopcontrols"])
    environment.filters["tojson"] = functools.partial(json.dumps, ensure_ascii=False)
    environment.globals |= {"raise_exception": refuse, "strftime_now": datetime.datetime.now().strftime}
    return environment.from_string(template)

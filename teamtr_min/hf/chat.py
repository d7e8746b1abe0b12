"""tokenizer.json through tokenizers, and the checkpoint's own chat template (template.py)."""

import functools
import json
import math
import os
from pathlib import Path

from tokenizers import Tokenizer as Backend

from teamtr_min.files import UserError, one_line, plain_file, read_json, sha256
from teamtr_min.hf import template
from teamtr_min.hf.weights import find_model

MOST_GROWTH = 1000  # of a text, by what tokenizer.json does to it before or after

# ChatML, for checkpoints that bring no template of their own.
CHATML = """\
{%- for message in messages -%}
{{ '<|im_start|>' + message['role'] + '\\n' + message['content'] + end_of_message + '\\n' }}
{%- endfor -%}
{%- if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% endif -%}"""


class Tokenizer:
    """Text <-> token ids, and conversations -> text. Two tokenizers with equal `hash` agree on every id.

    `eos_id` is the end-of-sequence token, for `generate`'s stop_ids; `unk_id` stands for text that the
    tokenizer cannot write. Either may be None, as may `template_text`, the checkpoint's own chat template.
    """

    def __init__(self, directory: str | os.PathLike):
        self.directory = Path(directory)
        path = self.directory / "tokenizer.json"
        if not plain_file(path).is_file():
            raise UserError(f"{path} does not exist; a checkpoint needs its tokenizer.json")
        self.backend = self._safely(Backend.from_file, str(path), fault="is not a tokenizer")
        self.backend.no_truncation()
        self.backend.no_padding()
        self.hash = sha256(path)
        for part in (self.backend.normalizer, self.backend.decoder):
            if part is not None and not _growth(json.loads(part.__getstate__())) <= MOST_GROWTH:
                raise UserError(f"{path}: its {type(part).__name__} makes texts many times as long")
        config_path, legacy = (
            self.directory / name for name in ("tokenizer_config.json", "special_tokens_map.json")
        )
        config = read_json(config_path) if os.path.lexists(config_path) else {}
        # Only then transformers reads it too.
        if "added_tokens_decoder" not in config and os.path.lexists(legacy):
            config |= read_json(legacy)
        self.special = _special_tokens(config)
        self.eos_id, self.unk_id = self._special_id("eos_token"), self._special_id("unk_token")
        self.template_text = text = _template_text(self.directory, config)
        if text is None:
            text = CHATML
            known = self.backend.token_to_id("<|im_end|>") is not None
            self.special["end_of_message"] = "<|im_end|>" if known else self.special.get("eos_token", "</s>")
        self._template = text
        self._render(None, "does not parse")

    @property
    def vocab_size(self) -> int:
        return self.backend.get_vocab_size(with_added_tokens=True)

    def is_special(self, token: int) -> bool:
        """Whether this id is one of the tokenizer's special tokens, which text is never split into."""
        added = self.backend.get_added_tokens_decoder().get(token)
        return added is not None and added.special

    def encode(self, text: str, add_special_tokens: bool = True) -> list[int]:
        """Ids of `text`; special tokens are those of the tokenizer's own post-processor (Llama's BOS).

        A special token that is written out in `text` becomes its id, as in a rendered template.
        """
        return self._safely(self.backend.encode, text, add_special_tokens=add_special_tokens).ids

    def encode_text(self, text: str) -> list[int]:
        """Ids of `text` as mere text: a special token written out in it is spelled, piece by piece."""
        self.backend.encode_special_tokens = True
        try:
            return self.backend.encode(text, add_special_tokens=False).ids
        finally:
            self.backend.encode_special_tokens = False

    def decode(self, ids: list[int], skip_special_tokens: bool = True) -> str:
        return self._safely(self.backend.decode, list(ids), skip_special_tokens=skip_special_tokens)

    def decode_batch(self, batch: list[list[int]]) -> list[str]:
        return self._safely(self.backend.decode_batch, batch)

    def _safely(self, function, *given, fault: str = "cannot be used", **named):
        try:
            return function(*given, **named)
        except KeyboardInterrupt:
            raise
        except BaseException as error:  # the backend raises bare Exceptions, and panics, which are none
            path = self.directory / "tokenizer.json"
            raise UserError(f"{path} {fault}: {one_line(error)}") from None

    def render(self, messages: list[dict], add_generation_prompt: bool = True, **template_kwargs) -> str:
        """The conversation as the checkpoint's template writes it; `messages` are {"role", "content"}.

        As transformers' `apply_chat_template(tokenize=False)`. Raises UserError when the template refuses.
        """
        given = [{key: v for key, v in message.items() if v is not None} for message in messages]
        values = {"tools": None, "documents": None, **self.special, **template_kwargs}
        values |= {"messages": given, "add_generation_prompt": add_generation_prompt}
        return self._render(values, "refuses this conversation")

    def _render(self, values: dict | None, fault: str) -> str:
        try:
            return template.render(self._template, values)
        except template.TemplateError as error:
            why = one_line(error)
            raise UserError(f"the chat template of {self.directory} {fault}: {why}") from None

    def _special_id(self, name: str) -> int | None:
        token = self.special.get(name)
        if token is None:
            return None
        return self._safely(
            self.backend.token_to_id, token, fault=f"cannot look up the {name} that is configured"
        )


def load_tokenizer(name_or_dir: str | os.PathLike) -> Tokenizer:
    """The tokenizer of a model directory, or of a name that `load_model` knows.

    Raises UserError when a file is missing or damaged, or the chat template does not parse.
    """
    return Tokenizer(find_model(name_or_dir))


def _special_tokens(config: dict) -> dict[str, str]:
    """bos_token, eos_token, ... and those of the model's own, as templates expect them: plain strings."""
    extra = config.get("extra_special_tokens")
    named = {name: token for name, token in config.items() if name.endswith("_token")}
    named |= extra if isinstance(extra, dict) else {}
    plain = {name: t.get("content") if isinstance(t, dict) else t for name, t in named.items()}
    return {name: token for name, token in plain.items() if isinstance(token, str)}


def _template_text(directory: Path, config: dict) -> str | None:
    file = directory / "chat_template.jinja"
    if os.path.lexists(file):
        try:
            return plain_file(file).read_text(encoding="utf-8")
        except (OSError, UnicodeDecodeError) as error:
            raise UserError(f"{file} cannot be read: {error}") from None
    text = config.get("chat_template")
    if isinstance(text, list):  # several named templates
        named = {str(one.get("name")): one.get("template") for one in text if isinstance(one, dict)}
        text = named.get("default", text)
    if not isinstance(text, str | None):
        wanted = "neither a text nor a list of named texts with one called default"
        raise UserError(f"the chat_template of {directory} is {wanted}")
    return text


def _growth(step: dict) -> float:
    """How many times as long a text may get by a normalizer or decoder of tokenizer.json, at most."""
    if step.get("type") == "Sequence":
        return math.prod(map(_growth, step.get("normalizers") or step.get("decoders") or []))
    if step.get("type") == "Prepend":
        return 1 + len(step["prepend"])
    if step.get("type") != "Replace":
        return 1  # Unicode's own forms do not grow further by repetition
    length, literal = len(step["content"]), step["pattern"].get("String")
    return max(1, length / len(literal)) if literal else 1 + length  # a regex may match at every character


class ChatFormat:
    """The ids that stand around messages, taken once from the chat template by rendering sentinels.

    Rendering the template anew each turn would not do: sampled ids must survive, and some templates rewrite
    history. Every part is tokenized by itself; BPE therefore never merges a header with what follows it.
    """

    def __init__(self, tokenizer: Tokenizer):
        self.tokenizer = tokenizer
        user, user2, assistant = (f"\N{SECTION SIGN}{c}\N{SECTION SIGN}" for c in "UVA")

        def gap(left: str, right: str | None, *turns: tuple[str, str], prompt: bool = False) -> str:
            text = self._render([{"role": role, "content": content} for role, content in turns], prompt)
            after = text.partition(left)[2]
            return after if right is None else after.partition(right)[0]

        footer = gap(user, None, ("user", user))
        header = gap(user, None, ("user", user), prompt=True).removeprefix(footer)
        user_to_user = gap(user, user2, ("user", user), ("user", user2))
        user_header = user_to_user.removeprefix(footer)
        to_user = gap(assistant, user2, ("user", user), ("assistant", assistant), ("user", user2))
        if not (header and user_to_user.startswith(footer) and to_user.endswith(user_header)):
            raise UserError(
                f"the chat template of {tokenizer.directory} does not treat messages alike wherever they "
                "stand, so no shared transcript can be built with it"
            )
        self.user_header, self.user_footer = self.encode(user_header), self.encode(footer)
        self.assistant_header = self.encode(header)
        footer_ids = self.encode(to_user.removesuffix(user_header))
        # What ends a message is sampled, so it must be a token that ordinary text never holds.
        if not footer_ids or not tokenizer.is_special(footer_ids[0]):
            raise UserError(
                f"the chat template of {tokenizer.directory} does not end an assistant's message "
                "with a special token"
            )
        self.end_of_message, *self.assistant_footer = footer_ids
        self.end_tokens = frozenset([self.end_of_message])

    def teammate_ids(self, name: str, ids: list[int]) -> list[int]:
        return [*self.user_header, *self.encode(name + ":\n"), *ids, *self.user_footer]

    def teammate(self, name: str, text: str) -> list[int]:
        return self.teammate_ids(name, self.tokenizer.encode_text(text))

    def encode(self, text: str) -> list[int]:
        return self.tokenizer.encode(text, add_special_tokens=False)

    @functools.lru_cache(maxsize=4096)  # noqa: B019  one format lives as long as its team
    def opening(self, system: str, problem: str) -> tuple[int, ...]:
        """System prompt and problem, up to the end of the problem's message."""
        sentinel = "\N{SECTION SIGN}U\N{SECTION SIGN}"
        turns = [{"role": "system", "content": system}] if system else []
        before = self._render([*turns, {"role": "user", "content": sentinel}], False).partition(sentinel)[0]
        # A checkpoint's own template writes its BOS; ChatML does not, so there the tokenizer adds it.
        start = self.tokenizer.encode(before, add_special_tokens=self.tokenizer.template_text is None)
        text = self.encode(problem)
        if self.tokenizer.unk_id in text:
            raise UserError(
                f"the model in {self.tokenizer.directory} has no tokens for the problem {problem[:60]!r}"
            )
        return tuple(start + text + self.user_footer)

    def _render(self, turns: list[dict], prompt: bool) -> str:
        # Llama 3.2's template prints today's date unless told one: a run must not change overnight.
        return self.tokenizer.render(turns, add_generation_prompt=prompt, date_string="26 Jul 2024")

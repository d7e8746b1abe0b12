"""Agents, routers, and the shared transcript as each agent sees it.

A transcript is the problem and every message so far. Agent j sees: its own system prompt, the problem as
`user`, then each message as `assistant` if j wrote it, else as `user` with the writer's name in front. What
an agent sees only ever grows at its end, so its KV cache stays valid from turn to turn, and sampled ids are
never encoded again.
"""

import functools
import operator
import shutil
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path

import torch

import kernels
from teamtr_min.config import Config
from teamtr_min.engine.distributed import ALONE, Ranks
from teamtr_min.engine.lora import Adapter, load_models, save_adapter
from teamtr_min.engine.model import Transformer
from teamtr_min.files import UserError, function_from_file, one_line, replacing, write_sums
from teamtr_min.hf.chat import Tokenizer, load_tokenizer
from teamtr_min.hf.hub import TOKENIZER_FILES
from teamtr_min.hf.weights import DTYPES, find_model, save_model
from teamtr_min.tasks.task import Message, Role


@dataclass
class Agent:
    model: Transformer
    tokenizer: Tokenizer
    chat: "ChatFormat"
    role: Role
    adapter: Adapter | None = None  # with LoRA; the base is shared


@dataclass(frozen=True)
class Rendered:
    """Token ids of a transcript in one agent's eyes, and where its own messages stand in them."""

    ids: list[int]
    spans: list[tuple[int, int]]  # (start, stop) of each own message's sampled tokens


# (turn, messages so far, number of agents, one uniform draw in [0, 1)) -> the agent whose turn it is.
Router = Callable[[int, list[Message], int, float], int]


def round_robin(turn: int, messages: list[Message], agents: int, uniform: float) -> int:
    return turn % agents


def random_router(turn: int, messages: list[Message], agents: int, uniform: float) -> int:
    return int(uniform * agents)


def load_router(name: str) -> Router:
    """`round-robin`, `random`, or the function `router` of a Python file of one's own."""
    routers = {"round-robin": round_robin, "random": random_router}
    if name in routers:
        return routers[name]
    if not name.endswith(".py"):
        raise UserError(f"no router {name!r}: give round-robin, random, or a FILE.py that defines `router`")
    router = function_from_file(name, "router")
    return lambda turn, messages, agents, uniform: router(
        turn, [message.copy() for message in messages], agents, uniform
    )


@dataclass
class Team:
    """Agents in turn order, who names the next, and how they write."""

    agents: list[Agent]
    router: Router = round_robin
    rounds: int = 1
    temperature: float = 1.0  # of sampling, and of every log-prob
    max_new_tokens: int = 16  # longest message
    batch_rows: int = 2048  # rollouts sampled at once
    ranks: Ranks = ALONE  # the processes that hold this team, each all of it or with `--shard` a part

    @property
    def sharded(self) -> bool:
        """Whether weights are spread over ranks."""
        return any(agent.model.shards for agent in self.agents)

    @property
    def turns(self) -> int:
        return len(self.agents) * self.rounds

    @property
    def caches_stay(self) -> bool:
        """Whether an agent may have another turn, for which the cache of its first is kept."""
        return self.router is not round_robin or self.rounds > 1

    def writes_last(self, j: int, turn: int) -> bool:
        """Whether agent j, writing at `turn`, is known to have no turn in the rest of the rollout."""
        return self.router is round_robin and turn + len(self.agents) >= self.turns

    def route(self, turn: int, messages: list[Message], uniform: float) -> int:
        """The agent whose turn is next; UserError when a router of the user's own fails or names nobody."""
        n = len(self.agents)
        choice = self.router(turn, messages, n, uniform)
        try:
            chosen = -1 if isinstance(choice, bool) else operator.index(choice)
        except Exception as error:
            raise UserError(f"the router failed at turn {turn}: {type(error).__name__}: {error}") from None
        if not 0 <= chosen < n:
            shown = one_line(repr(choice))
            raise UserError(f"the router chose {shown} at turn {turn}; agents are numbered 0 to {n - 1}")
        return chosen

    def render(self, j: int, problem: str, messages: list[Message], add_generation_prompt: bool) -> Rendered:
        """The transcript as agent j sees it, ending with the header of its next message if asked to.

        Without that header it ends with j's latest message: nothing later can be trained on.
        """
        agent = self.agents[j]
        chat = agent.chat
        ids, spans = list(chat.opening(agent.role.system, problem)), []
        if not add_generation_prompt:
            own = [t for t, message in enumerate(messages) if message.agent == j]
            messages = messages[: own[-1] + 1] if own else []
        for message in messages:
            if message.agent == j:
                ids += chat.assistant_header
                spans.append((len(ids), len(ids) + len(message.tokens)))
                ids += message.tokens
                ids += chat.assistant_footer[1:] if message.stopped else chat.assistant_footer
            else:
                writer = self.agents[message.agent]
                same = writer.tokenizer.hash == agent.tokenizer.hash
                # A message cannot end, or begin another, by spelling a special token of its reader.
                content = message.content if same else agent.tokenizer.encode_text(message.text)
                ids += chat.user_header + chat.encode(writer.role.name + ":\n") + content + chat.user_footer
        if add_generation_prompt:
            ids += chat.assistant_header
        elif spans:
            del ids[spans[-1][1] :]
        return Rendered(ids, spans)

    def save(self, directory: Path) -> None:
        """agents/0..n-1 in Hugging Face layout, or PEFT's, in the compute dtype; replaced as a whole.

        The first rank writes; where weights are spread the others must call this too.
        """
        if not self.ranks.first:
            for agent in self.agents:
                for _ in agent.model.shards.weights():
                    pass
            return
        with replacing(directory) as aside:
            aside.mkdir()  # not its parents: a run's directory that is gone is not made again
            for j, agent in enumerate(self.agents):
                if agent.adapter:
                    save_adapter(agent.model, agent.adapter, aside / str(j))
                else:
                    save_model(agent.model, aside / str(j))
                for file in TOKENIZER_FILES:
                    if (agent.tokenizer.directory / file).is_file():
                        shutil.copyfile(agent.tokenizer.directory / file, aside / str(j) / file)
            write_sums(aside)


def load_team(
    config: Config, roles: list[Role], sources: list[str | Path] | None = None, ranks: Ranks = ALONE
) -> Team:
    """One agent per role, each with its own weights, or adapter; `sources` replaces `config.model`."""
    device, dtype = placement(config)
    sources = sources or config.model_of_each
    chats = {path: ChatFormat(load_tokenizer(path)) for path in {find_model(source) for source in sources}}
    spread = config.shard and ranks.size > 1
    to = ("cpu", torch.float32) if spread else (device, dtype)
    if spread:
        from teamtr_min.engine.shards import Shards  # its imports take a second
    models = load_models(sources, *to, config.lora_rank, config.lora_alpha, config.seed)
    agents = []
    for source, role, (model, adapter) in zip(sources, roles, models):
        if spread and adapter:
            raise UserError(f"{source} is an adapter, and --shard spreads the weights of whole models alone")
        if spread:
            Shards(model, device, dtype, ranks)
        chat = chats[find_model(source)]
        if config.max_new_tokens >= model.config.max_positions:
            raise UserError(
                f"--max-new-tokens {config.max_new_tokens} leaves no room in "
                f"the {model.config.max_positions} positions of {source}"
            )
        if chat.tokenizer.vocab_size > model.config.vocab_size:
            raise UserError(
                f"{source}: the tokenizer has {chat.tokenizer.vocab_size} tokens, "
                f"but the model only {model.config.vocab_size}"
            )
        agents.append(Agent(model, chat.tokenizer, chat, role, adapter))
    how = config.temperature, config.max_new_tokens, config.batch_rows or Team.batch_rows
    return Team(agents, load_router(config.router), config.rounds, *how, ranks)


def placement(config: Config) -> tuple[torch.device, torch.dtype]:
    """Device and compute dtype: bf16 where a GPU has it, fp32 otherwise, unless the config says which."""
    name = config.device
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    try:
        device = torch.device(name)
        if device.type not in ("cpu", "cuda", "mps"):
            raise RuntimeError("only cpu, cuda and mps can")
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError) as error:
        raise UserError(f"--device {name} cannot be used here: {str(error).splitlines()[0]}") from None
    try:
        kernels.use_triton(torch.empty(0, device=device))
    except ValueError as error:
        raise UserError(str(error)) from None
    bf16 = device.type == "cuda" and torch.cuda.is_bf16_supported()
    return device, DTYPES[{"auto": "bf16" if bf16 else "fp32"}.get(config.dtype, config.dtype)]


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
        self.assistant_footer = self.encode(to_user.removesuffix(user_header))
        # What ends a message is sampled, so it must be a token that ordinary text never holds.
        if not self.assistant_footer or not tokenizer.is_special(self.assistant_footer[0]):
            raise UserError(
                f"the chat template of {tokenizer.directory} does not end an assistant's message "
                "with a special token"
            )
        self.end_of_message = self.assistant_footer[0]

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


def longest_transcript(config: Config, views: list[tuple], problems: Iterable[str]) -> int:
    """Tokens of the longest transcript that any agent can see; `views`: chat format and role of each.

    A teammate's message in another tokenizer is counted as long as in its own.
    """
    texts = sorted(set(problems), key=len)[-64:]  # tokens go with characters
    longest = 0
    for chat, role in views:
        opening = max(len(chat.opening(role.system, text)) for text in texts)
        own = len(chat.assistant_header) + len(chat.assistant_footer)
        names = max(len(chat.encode(writer.name + ":\n")) for _, writer in views)
        others = len(chat.user_header) + names + len(chat.user_footer)
        longest = max(longest, opening + config.turns * (config.max_new_tokens + max(own, others)))
    return longest

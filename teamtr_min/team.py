"""Agents, routers, and the shared transcript as each agent sees it.

A transcript is the problem and every message so far. Agent j sees its own system prompt, the problem as
`user`, then each message: as `assistant` if j wrote it, else as `user` with the writer's name in front. This
view only grows at its end, so a KV cache stays valid, and sampled ids are never encoded again.
"""

import dataclasses
import operator
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

from teamtr_min.engine import rng
from teamtr_min.engine.distributed import ALONE, Ranks, unsharded, whole
from teamtr_min.engine.model import Transformer
from teamtr_min.engine.sampler import Sampler
from teamtr_min.files import UserError, function_from_file, replacing
from teamtr_min.hf.chat import ChatFormat, Tokenizer
from teamtr_min.hf.lora import Adapter, save_adapter
from teamtr_min.hf.weights import save_model
from teamtr_min.tasks.task import Message, Problem, Role, Task
from teamtr_min.tasks.tools import spoken

# (turn, messages so far, number of agents, one uniform draw in [0, 1)) -> the agent whose turn it is.
Router = Callable[[int, list[Message], int, float], int]
Listener = Callable[[int, int, int | Message], None]  # is told agent, rollout, and a token or a whole message


@dataclass
class Agent:
    """A language model with its role; a tool, whose role has a function, has nothing else."""

    role: Role
    model: Transformer | None = None
    tokenizer: Tokenizer | None = None
    chat: ChatFormat | None = None
    adapter: Adapter | None = None  # with LoRA; the base is shared
    sampler: Sampler | None = None


class Rendered(NamedTuple):  # a transcript in one agent's eyes
    ids: list[int]
    spans: list[tuple[int, int]]  # (start, stop) of each own message's sampled tokens


def same_ids(writer: Agent, reader: Agent, message: Message) -> bool:
    """Whether the reader can be given the message's ids: all are tokens, not padding of the embedding."""
    alike = writer.model is not None and writer.tokenizer.hash == reader.tokenizer.hash
    return alike and max(message.content, default=0) < reader.tokenizer.vocab_size


class Said(NamedTuple):  # one message of an Answer
    agent: int
    name: str
    text: str


class Answer(NamedTuple):  # one rollout of a team
    messages: list[Said]
    answer: str | None  # the team's; None: no message states one


def round_robin(turn: int, messages: list[Message], agents: int, uniform: float) -> int:
    return turn % agents


def load_router(name: str) -> Router:
    """`round-robin`, `random`, or the function `router` of a user's Python file."""
    routers = {"round-robin": round_robin, "random": lambda turn, messages, n, uniform: int(uniform * n)}
    if name not in routers and not name.endswith(".py"):
        raise UserError(f"no router {name!r}: give round-robin, random, or a FILE.py that defines `router`")
    return routers.get(name) or function_from_file(name, "router")


@dataclass
class Team:
    """Agents in turn order, the router that names the next, and how they write."""

    agents: list[Agent]
    task: Task
    router: Router = round_robin
    rounds: int = 1
    temperature: float = 1.0  # of sampling, and of every log-prob
    max_new_tokens: int = 16  # longest message
    batch_rows: int = 2048  # rollouts sampled at once
    ranks: Ranks = ALONE  # the processes that hold this team, a part of its weights each
    tools: int = 0  # as many agents, the last ones, have a turn after each turn of the others

    @property
    def turns(self) -> int:
        return (len(self.agents) - self.tools) * self.rounds * (1 + self.tools)

    def route(self, turn: int, messages: list[Message], uniform: float) -> int:
        """The agent whose turn is next. Raises UserError for a router that returns no agent's number."""
        n = len(self.agents) - self.tools
        turn, tool = divmod(turn, 1 + self.tools)
        if tool:
            return n + tool - 1
        choice = self.router(turn, [m for m in messages if m.agent < n], n, uniform)
        whole = hasattr(choice, "__index__") and not isinstance(choice, bool)
        if not whole or not 0 <= operator.index(choice) < n:
            code = getattr(self.router, "__code__", None)  # a callable object has none
            place = f"{self.router.__module__}{f', line {code.co_firstlineno}' if code else ''}"
            raise UserError(f"{place}: `router` returned {choice!r} at turn {turn}; agents are 0 to {n - 1}")
        return operator.index(choice)

    def render(
        self, j: int, problem: Problem, messages: list[Message], add_generation_prompt: bool
    ) -> Rendered:
        """The transcript as agent j sees it, ending with the header of its next message if asked to. Without
        that header it ends with j's latest message: nothing later can be trained on."""
        agent, chat = self.agents[j], self.agents[j].chat
        view = getattr(self.task, "view", None)
        ids = list(chat.opening(agent.role.system, view(problem, j) if view else problem.text))
        spans = []
        if not add_generation_prompt:
            last = max((t for t, message in enumerate(messages) if message.agent == j), default=-1)
            messages = messages[: last + 1]
        for message in messages:
            writer = self.agents[message.agent]
            if message.agent == j:
                ids += chat.assistant_header
                spans.append((len(ids), len(ids) + len(message.tokens)))
                ids += message.tokens if message.stopped else [*message.tokens, chat.end_of_message]
                ids += chat.assistant_footer
            elif same_ids(writer, agent, message):
                ids += chat.teammate_ids(writer.role.name, message.content)
            else:  # a message cannot end, or begin another, by spelling a special token of its reader
                ids += chat.teammate(writer.role.name, message.text)
        if add_generation_prompt:
            ids += chat.assistant_header
        elif spans:
            del ids[spans[-1][1] :]
        return Rendered(ids, spans)

    def take_turns(
        self, problems: list[Problem], path: rng.RngPath, first: int = 0,
        progress: Callable = lambda n: None, listen: Listener | None = None,
    ) -> list[list[Message]]:  # fmt: skip
        """All turns of one rollout per problem, side by side. The first is number `first` of its collection;
        `progress` is told how many more messages are written."""
        transcripts: list[list[Message]] = [[] for _ in problems]
        samplers = [agent.sampler for agent in self.agents if agent.sampler]
        for sampler in samplers:
            sampler.start(len(problems))
        for turn in range(self.turns):
            counts = [len(messages) for messages in transcripts]  # a tool may write no message
            draws = [path.key("route", first + r, turn) / 2**64 for r in range(len(problems))]
            routed = [self.route(turn, messages, draw) for messages, draw in zip(transcripts, draws)]
            for j, agent in enumerate(self.agents):
                rows = [r for r, chosen in enumerate(routed) if chosen == j]
                if agent.model is None:
                    for r in rows:
                        transcripts[r] += spoken(j, agent.role, problems[r], transcripts[r])
                    progress(len(rows))
                    continue
                if not any(self.ranks.gather(len(rows))):  # all processes gather sharded weights, or none
                    continue
                prompts = [self.render(j, problems[r], transcripts[r], True).ids for r in rows]
                keys = [path.key("rollout", first + r, turn) for r in rows]
                how = self.max_new_tokens, self.temperature, agent.chat.end_tokens, progress
                heard = listen and (lambda r, token, j=j: listen(j, r, token))
                with unsharded(agent.model):
                    done = agent.sampler.generate(rows, prompts, keys, *how, heard)
                contents = [c.tokens[: len(c.tokens) - c.stopped] for c in done]
                texts = agent.tokenizer.backend.decode_batch(contents)
                for r, c, text in zip(rows, done, texts):
                    transcripts[r].append(Message(j, c.tokens, text, c.logprobs, c.stopped))
                if self.router is round_robin and turn >= self.turns - self.turns // self.rounds:  # last turn
                    agent.sampler.finish()
            for r in (r for r, n in enumerate(counts) if listen and len(transcripts[r]) > n):
                listen(transcripts[r][-1].agent, r, transcripts[r][-1])
        for sampler in samplers:
            sampler.finish()
        return transcripts

    def prompt(self, agent: int, question: str, messages: Sequence[tuple[int, str]] = ()) -> list[int]:
        """The ids that an agent sees before its next message; `messages` are (agent, text), in turn order."""
        chat = self.agents[agent].chat
        ids = self.render(agent, Problem("", question, ""), [], add_generation_prompt=False).ids
        for j, text in ((m[0], m[-1]) for m in messages):
            name = self.agents[j].role.name
            ids += chat.said("assistant", text) if j == agent else chat.teammate(name, text)
        return [*ids, *chat.assistant_header]

    def solve(
        self, question: str, samples: int = 1, temperature: float = None, seed: int = 0, listen=None
    ) -> list[Answer]:
        """Let the team work on a question `samples` times, at its own temperature unless one is given."""
        team = self if temperature is None else dataclasses.replace(self, temperature=temperature)
        problems, path = [Problem("", question, "")] * samples, rng.RngPath(seed, "solve")
        rows = team.take_turns(problems, path, listen=listen)
        names = [agent.role.name for agent in self.agents]
        state = getattr(self.task, "answer", lambda messages: messages[-1].text.strip())
        return [Answer([Said(m.agent, names[m.agent], m.text) for m in row], state(row)) for row in rows]

    def save(self, directory: Path) -> None:
        """agents/0..n-1 in Hugging Face layout, or PEFT's, in the compute dtype; replaced as a whole. The
        first process writes; where weights are sharded, all must call this."""
        if not self.ranks.first:
            for p in (p for agent in self.agents if agent.model for p in agent.model.parameters()):
                whole(p)
            return
        with replacing(directory) as aside:
            aside.mkdir()  # not its parents: a run's directory that is gone is not made again
            for j, agent in enumerate(self.agents):
                if agent.adapter:
                    save_adapter(agent.model, agent.adapter, aside / str(j))
                elif agent.model:
                    save_model(agent.model, aside / str(j))
                if agent.tokenizer:
                    agent.tokenizer.save(aside / str(j), agent.chat.end_tokens)

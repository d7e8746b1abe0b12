"""Models and roles -> a Team: from a Config, from the directory of a run, or from a list of models."""

import json
import os
from collections.abc import Sequence
from pathlib import Path

import torch

import kernels
from teamtr_min.config import Config
from teamtr_min.engine.distributed import ALONE, Ranks, shard
from teamtr_min.engine.sampler import Sampler
from teamtr_min.files import UserError
from teamtr_min.hf.chat import ChatFormat, load_tokenizer
from teamtr_min.hf.lora import load_models
from teamtr_min.hf.weights import DTYPES, find_model
from teamtr_min.tasks import TASKS, Role, Task, WordProblems, load_task, tools
from teamtr_min.team import Agent, Team, load_router


def load_team(source: str | Path | Sequence, roles: Sequence | None = None, **knobs) -> Team:
    """A team to talk to. `source`: the directory of a run, or a list of model directories, one per agent.
    `roles`: a Role, {"name", "system"} or system prompt per agent (default: those of the run's task, or a
    solver, checkers and a finisher). `knobs` are Config's, such as device, dtype, temperature, rounds."""
    if isinstance(source, str | Path):
        config = Config.load(Path(source) / "config.json", **knobs)
        task, sources = task_to_ask(config), [Path(source) / "agents" / str(j) for j in range(config.agents)]
    else:
        sources = list(source)
        config = Config(**{"agents": len(sources), "task": "jsonl", "model": str(sources[0])} | knobs)
        task = WordProblems(config, read=False)
    if roles is not None:
        task.roles = lambda agents: [as_role(j, role) for j, role in enumerate(roles)]
    return build_team(config, task, sources=sources)


def task_to_ask(config: Config) -> Task:
    """The task of a team that only answers: where the problems come from a data set, none is loaded."""
    word_problems = TASKS.get(config.task) is WordProblems
    return WordProblems(config, read=False) if word_problems else load_task(config)


def as_role(j: int, given: Role | dict | str) -> Role:
    given = {"name": f"Agent {j + 1}", "system": given} if isinstance(given, str) else given
    return Role(**given) if isinstance(given, dict) else given


def roles_of(config: Config, task: Task) -> list[Role]:
    """One role per agent, the task's or those of --roles, and then those of --tools. Raises UserError."""
    roles = task.roles(config.agents)
    if config.roles:
        try:
            given = json.loads(Path(config.roles).read_text("utf-8"))
            roles = [as_role(j, role) for j, role in enumerate(given)]
            named = all(isinstance(r, Role) and isinstance(r.name + r.system, str) for r in roles)
            if not isinstance(given, list) or not named:
                raise TypeError("an entry has no name and system")
        except (OSError, ValueError, TypeError) as error:
            raise UserError(f"--roles {config.roles}: not a JSON list of roles: {error}") from None
    if len(roles) != config.agents:
        raise UserError(f"{config.roles or config.task} has {len(roles)} roles for {config.agents} agents")
    return tools.with_tools(roles, config.tools)


def build_team(
    config: Config, task: Task, ranks: Ranks = ALONE, sources: Sequence | None = None, meta: bool = False
) -> Team:
    """Load a model, or adapter, per agent; with `meta` their shapes alone. `sources` replace
    `config.model_of_each` for a team that only speaks: its weights are frozen. Raises UserError."""
    if config.shipped and "OMP_NUM_THREADS" not in os.environ:
        torch.set_num_threads(1)  # with models so small a second thread mostly waits: 1.4 times as long
    device, dtype = placement(config)
    agents = [Agent(role) for role in roles_of(config, task)]
    speakers = [j for j, agent in enumerate(agents) if agent.role.tool is None]
    names = [(sources or config.model_of_each)[j] for j in speakers]
    directories = [find_model(name) for name in names]
    chats = {path: ChatFormat(load_tokenizer(path), config.date) for path in set(directories)}
    first = "meta" if meta else "cpu" if ranks.size > 1 else device  # `shard` brings the parts to the device
    models = load_models(names, first, dtype, config.lora_rank, 2.0 * config.lora_rank, config.seed)
    for j, name, path, (model, adapter) in zip(speakers, names, directories, models):
        chat, embedded = chats[path], model.config.vocab_size
        if (known := chat.tokenizer.vocab_size) > embedded:
            raise UserError(f"{name}: the tokenizer has {known} tokens, but the model only {embedded}")
        if sources is not None and ranks.size == 1:
            model.requires_grad_(False)
        elif ranks.size > 1 and not meta:
            shard(model, ranks, device, dtype)
        agents[j] = Agent(agents[j].role, model, chat.tokenizer, chat, adapter, Sampler(model))
    rows, router = config.batch_rows or Team.batch_rows, load_router(config.router)
    how = config.rounds, config.temperature, config.max_new_tokens, rows, ranks, len(agents) - config.agents
    return Team(agents, task, router, *how)


def placement(config: Config) -> tuple[torch.device, torch.dtype]:
    """Device and compute dtype; auto: a GPU and bf16 where there are. Raises UserError."""
    auto = "cuda" if torch.cuda.is_available() else "cpu"
    name = auto if config.device == "auto" else config.device
    try:
        device = torch.device(name)
        kernels.use_triton(torch.empty(0, device=device))
    except (RuntimeError, AssertionError, ValueError) as error:
        raise UserError(f"--device {name} cannot be used here: {str(error).splitlines()[0]}") from None
    auto = "bf16" if device.type == "cuda" and torch.cuda.is_bf16_supported(False) else "fp32"
    return device, DTYPES[auto if config.dtype == "auto" else config.dtype]

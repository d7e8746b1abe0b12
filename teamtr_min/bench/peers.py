"""What others would write for `eval.py sampling` and `training`, with transformers and TRL."""

import functools
import importlib
import tempfile

import torch
from torch import Tensor

from teamtr_min.config import Config
from teamtr_min.engine.model import Transformer, checkpoint_tensors
from teamtr_min.hf.weights import config_json, find_model
from teamtr_min.learner import GRADIENT_NORM
from teamtr_min.run.loading import placement
from teamtr_min.tasks import Problem
from teamtr_min.team import Team

BATCH_TOKENS = 4096  # of a forward pass of `training`, for all contestants


@functools.cache
def in_transformers(model: Transformer):
    """The same weights, shared and not copied, in transformers' class. Raises ModuleNotFoundError."""
    transformers = importlib.import_module("transformers")
    config = transformers.AutoConfig.for_model(**config_json(model.config, model.dtype))
    with model.device:
        theirs = transformers.AutoModelForCausalLM.from_config(config)
    theirs.load_state_dict(checkpoint_tensors(model), strict=False, assign=True)
    theirs.tie_weights()
    return theirs.eval().requires_grad_()


@torch.no_grad()
def plain_sample(model: Transformer, prompts: Tensor, new: int) -> None:
    how = {"do_sample": True, "top_k": 0, "use_cache": True, "eos_token_id": None, "pad_token_id": 0}
    mask = torch.ones_like(prompts)
    in_transformers(model).generate(prompts, attention_mask=mask, max_new_tokens=new, **how)


@functools.lru_cache(maxsize=1)  # the moments of one agent at a time
def adamw(model) -> torch.optim.AdamW:
    return torch.optim.AdamW(model.parameters(), lr=0.0, betas=(0.9, 0.99), weight_decay=0.0)


def plain_step(ours: Transformer, rows: Tensor, pull: Tensor, temperature: float) -> tuple[Tensor]:
    """One step on rows (R, T) padded by -1, with all logits and AdamW. Returns the norm of the gradient. At
    pi_old the gradient of Eq. 10 is that of a token's log-prob times its advantage, pull (R, T)."""
    model, B = in_transformers(ours), max(1, BATCH_TOKENS // rows.shape[1])
    for ids, weight in zip(rows.split(B), pull.split(B)):
        longest = (ids >= 0).sum(1).max()
        ids, weight = ids[:, :longest], weight[:, 1:longest]  # (B, T), (B, T-1) of this pass
        output = model(input_ids=ids.clamp(min=0), attention_mask=(ids >= 0).long(), use_cache=False)
        logp = (output.logits[:, :-1].float() / temperature).log_softmax(-1)  # (B, T-1, V)
        (-(logp.gather(2, ids[:, 1:, None].clamp(min=0))[..., 0] * weight).sum() / len(rows)).backward()
    norm = torch.nn.utils.clip_grad_norm_(model.parameters(), GRADIENT_NORM)
    adamw(model).step()
    adamw(model).zero_grad(set_to_none=True)
    return (norm.cpu()[None],)


def trl_step(team: Team, problems: tuple[Problem, ...], config: Config) -> None:
    trainer, batch = trl_trainer(config, problems, team.agents[0].role.system)
    trainer._step = 0  # of its buffer: sample anew
    trainer.training_step(trainer.model, batch, None)
    torch.nn.utils.clip_grad_norm_(trainer.model.parameters(), GRADIENT_NORM)
    trainer.optimizer.step()
    trainer.optimizer.zero_grad()


@functools.lru_cache(maxsize=1)
def trl_trainer(config: Config, problems: tuple[Problem, ...], system: str) -> tuple:
    """TRL's trainer of the same model on the same prompts, and its batch of them; returns are drawn."""
    trl, path = importlib.import_module("trl"), str(find_model(config.model))
    models = importlib.import_module("transformers").AutoModelForCausalLM
    how = {"lora_alpha": 2 * config.lora_rank, "target_modules": "all-linear"}
    peft = importlib.import_module("peft").LoraConfig(r=config.lora_rank, **how) if config.lora_rank else None
    turns = [[("system", system), ("user", problem.text)] for problem in problems]
    rows = [{"prompt": [{"role": role, "content": text} for role, text in turn]} for turn in turns]
    args = trl.GRPOConfig(
        per_device_train_batch_size=len(problems) * config.group, num_generations=config.group,
        max_completion_length=config.max_new_tokens, temperature=config.temperature, beta=0.0,
        learning_rate=0.0, max_steps=1 << 20, report_to=[], gradient_checkpointing=False, bf16=False,
        use_cpu=not torch.cuda.is_available(), output_dir=tempfile.mkdtemp(), logging_steps=1 << 20,
    )  # fmt: skip
    model = models.from_pretrained(path, dtype=placement(config)[1])
    data = importlib.import_module("datasets").Dataset.from_list(rows)
    trainer = trl.GRPOTrainer(model, draw_returns, args, data, peft_config=peft)
    trainer.create_optimizer_and_scheduler(1)
    trainer.current_gradient_accumulation_steps = 1
    return trainer, next(iter(trainer.get_train_dataloader()))


def draw_returns(completions: list, **_) -> list[float]:
    return torch.randn(len(completions)).tolist()

"""What a language model says: while it is being tuned, after each evaluation, and to prompts."""

from __future__ import annotations

from typing import Any, Final

import torch
from torch import Tensor

from tempo.recipes.finetune.examples import chat, start
from tempo.recipes.finetune.job import Job

TOP_P: Final = 0.9


def continuation(model: Any, tokenizer: Any, prompt: Tensor, tokens: int, most: int, top_p: float = TOP_P) -> Tensor:
    """How ``model`` goes on.

    Args:
        model: Causal, of `transformers`.
        tokenizer: Its.
        prompt: Token numbers 1×T; its end, where that is long, so that half of what the model can read is left.
        tokens: To add, at most.
        most: Tokens that the model can read.
        top_p: Share of the likeliest tokens to draw from; 0: take the likeliest.

    Returns:
        The prompt, as it was read, and then the tokens that were added.
    """
    prompt = prompt[:, -(most // 2) :]
    drawn: dict[str, Any] = {"do_sample": True, "top_k": 0, "top_p": top_p} if top_p else {"do_sample": False}
    with torch.no_grad():
        found: Tensor = model.eval().generate(
            input_ids=prompt,
            attention_mask=torch.ones_like(prompt),
            max_new_tokens=min(tokens, most - prompt.shape[1]),
            pad_token_id=tokenizer.pad_token_id or tokenizer.eos_token_id or 0,
            **drawn,
        )
    return found


def sample(job: Job) -> str:
    """A prompt and how the model goes on from it, drawn alike every time; torch's generator stays as it was."""
    tokenizer: Any = job.tokenizer
    prompt = _prompt(job)[:, -(job.most // 2) :]
    with torch.random.fork_rng(devices=()):
        torch.manual_seed(job.tuning.run.seed)
        drawn = continuation(job.model, tokenizer, prompt, job.tuning.run.sample_tokens, job.most)
    texts = (tokenizer.decode(part, skip_special_tokens=True) for part in drawn[0].tensor_split([prompt.shape[1]]))
    return " ... ".join(text.strip() for text in texts)


def _prompt(job: Job) -> Tensor:
    """Token numbers 1×T: what the user gave, laid out as the data is, or how a line begins."""
    run, tokenizer = job.tuning.run, job.tokenizer
    if not run.prompt:
        return (job.examples.validation or job.examples.train)[0].prompt[None]
    if job.examples.conversations:
        text, first = chat([{"role": "user", "content": run.prompt}], tokenizer, "--prompt", answer=True), []
    else:
        text, first = run.prompt, start(tokenizer)
    return torch.tensor([[*first, *tokenizer(text, add_special_tokens=False)["input_ids"]]])

"""What the model says while it is being tuned, shown after each evaluation."""

from __future__ import annotations

from typing import Any, Final

import torch
from torch import Tensor

from tempo.recipes.finetune.examples import chat, start
from tempo.recipes.finetune.job import Job

_TOP_P: Final = 0.9


def sample(job: Job) -> str:
    """A prompt and how the model goes on from it, drawn alike every time; torch's generator stays as it was."""
    tokenizer: Any = job.tokenizer
    prompt = _prompt(job)[:, -(job.most // 2) :]
    count = min(job.tuning.run.sample_tokens, job.most - prompt.shape[1])
    with torch.random.fork_rng(devices=()), torch.no_grad():
        torch.manual_seed(job.tuning.run.seed)
        model: Any = job.model.eval()
        drawn = model.generate(
            input_ids=prompt,
            attention_mask=torch.ones_like(prompt),
            max_new_tokens=count,
            do_sample=True,
            top_k=0,
            top_p=_TOP_P,
            pad_token_id=tokenizer.pad_token_id or tokenizer.eos_token_id or 0,
        )
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

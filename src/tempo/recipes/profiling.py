"""Steps of a recipe for their own sake: some to warm up, and one that is recorded. Nothing is saved."""

from __future__ import annotations

import time
from collections.abc import Callable

from tempo.profile.recording import Recording, record
from tempo.recipes import data
from tempo.recipes.inference import protected
from tempo.recipes.job import Job, one_step
from tempo.recipes.recipe import Recipe


def profile(
    recipe: Recipe, step: int, report: Callable[[str], None], *, plain: bool = False
) -> tuple[Recording, list[float]]:
    """Take ``step`` steps by ``recipe``, and record the last of them.

    Args:
        recipe: What to do.
        step: Which step; those before it warm up.
        report: Called with a line before each.
        plain: Compute everything here, without a session.

    Returns:
        The recording, and the seconds that each step before it took, which nothing recorded.
    """
    source = data.load(recipe.data.source, recipe.data.train_limit, recipe.data.test_limit)
    job = Job(recipe, source, None, None, secret=recipe.session.base == "secret" and not plain)
    report("starting")
    with protected(job.model, recipe.session, plain) as session:
        job.session = session
        if session is not None:
            session.optimizer(job.optimizer)
        job.generators.restore()
        began = time.perf_counter()
        unrecorded = []
        for number in range(1, step):
            report(f"step {number} of {step}")
            unrecorded.append(sum(one_step(job, began).seconds.values()))
        report(f"recording step {step}")
        return record(lambda: one_step(job, began), job.model, session), unrecorded

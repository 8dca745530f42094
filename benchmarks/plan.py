"""What `tempo plan` foretells of a run beside what the run takes: LoRA of a small Llama through two workers over TLS.

    OMP_NUM_THREADS=1 python benchmarks/plan.py [--width 512] [--blocks 2] [--rounds 3] [--json FILE]

Two workers of this machine play two operators, over TCP, each with one thread. In every round rates are measured as
`tempo plan` does without --bench, workers as it does with --workers, and then the run takes two steps; medians of all
rounds are shown. The trusted side has one thread.
"""

from __future__ import annotations

import argparse
import re
import shutil
import subprocess
import sys
import tempfile
import time
from contextlib import ExitStack
from pathlib import Path
from statistics import median
from typing import Any

import msgspec
import torch
from peft import LoraConfig, get_peft_model
from transformers import LlamaConfig, LlamaForCausalLM

from tempo.bench.lora import LENGTH, RANK
from tempo.bench.measure import machine
from tempo.engine.memory import keep_heap
from tempo.plan import rates
from tempo.plan.estimate import Assumptions, Estimate, estimate
from tempo.plan.models import Shape
from tempo.plan.probe import probe
from tempo.session import Session, connect
from tempo.settings import Settings
from tempo.wire import identity

BATCH = 8
"""Sequences."""
OPERATORS = ("one", "two")


def serve(folder: Path, stack: ExitStack) -> list[str]:
    """Addresses of two workers with key pairs of their own, which end with ``stack``."""
    identity.generate(folder, "trusted")
    found = []
    for name in OPERATORS:
        key, certificate, _ = identity.generate(folder, name)
        (accepted := folder / "peers" / name).mkdir()
        shutil.copy(certificate, accepted)
        options = ["--listen", "127.0.0.1:0", "--threads", "1", "--identity", key, "--peers", folder / "trusted.pub"]
        command = [sys.executable, "-m", "tempo.worker", *map(str, options)]
        worker = stack.enter_context(subprocess.Popen(command, stderr=subprocess.PIPE, text=True))  # noqa: S603
        stack.callback(worker.terminate)
        said = (re.search(r"listening on (\S+)", line) for line in worker.stderr or ())
        found.append(f"{next(match for match in said if match)[1]}@{name}")
    return found


class Run:
    """LoRA of a model, protected."""

    def __init__(self, config: LlamaConfig, session: Session) -> None:
        torch.manual_seed(0)
        adapters = LoraConfig(r=RANK, target_modules="all-linear", init_lora_weights=False)
        self.model = get_peft_model(LlamaForCausalLM(config), adapters)
        self.session, self.ids = session, torch.randint(config.vocab_size, (BATCH, LENGTH))
        session.protect(self.model)
        self.optimizer = torch.optim.AdamW([p for p in self.model.parameters() if p.requires_grad], 1e-4)

    def step(self) -> dict[str, float]:
        """Seconds of a step, by part, and bytes."""
        before, began = self.session.stats(), time.perf_counter()
        self.optimizer.zero_grad()
        self.model(input_ids=self.ids, labels=self.ids).loss.backward()
        self.optimizer.step()
        took, used = time.perf_counter() - began, self.session.stats() - before
        wire, workers = used.seconds["wire"], used.seconds["worker"]
        sizes = {"bytes up": float(used.bytes_sent), "bytes down": float(used.bytes_received)}
        return {"trusted side": took - wire - workers, "wire": wire, "workers": workers, "step": took, **sizes}


def foretold(plan: Estimate, tokens: int) -> dict[str, float]:
    """The same of a plan: everything in turn, as a single batch gets it."""
    seconds = {
        "trusted side": plan.trusted_seconds,
        "wire": plan.wire_seconds_in_turn,
        "workers": plan.worker_seconds,
        "step": 1 / plan.tokens_per_second_in_turn,
    }
    sizes = {"bytes up": plan.bytes_up, "bytes down": plan.bytes_down}
    return {name: value * tokens for name, value in (seconds | sizes).items()}


def main() -> None:
    """Measure, compare, print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--width", type=int, default=512)
    parser.add_argument("--blocks", type=int, default=2)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--json", type=Path)
    args = parser.parse_args()
    torch.set_num_threads(1)
    keep_heap()
    sizes: dict[str, Any] = {
        "hidden_size": args.width,
        "intermediate_size": 3 * args.width,
        "num_hidden_layers": args.blocks,
        "num_attention_heads": args.width // 64,
        "vocab_size": 4096,
    }
    tokens = BATCH * LENGTH
    assumed = Assumptions(sequence=LENGTH, batch=tokens, cores=1)
    plans, steps = [], []
    with ExitStack() as stack:
        folder = Path(stack.enter_context(tempfile.TemporaryDirectory()))
        workers = serve(folder, stack)
        settings = Settings(
            scheme="split",
            base="public",
            placement="all",
            identity=str(folder / "trusted.key"),
            peers=str(folder / "peers"),
        )
        run = Run(LlamaConfig(**sizes), stack.enter_context(connect(*workers, settings=settings)))
        run.step(), run.step()  # which layers share an input is learned, and weights go out
        for _ in range(args.rounds):
            trusted = rates.here(lambda line: None)
            with connect(*workers, settings=settings) as session:
                seen = probe(session._engine.links, Shape(**sizes), assumed.weight_bits)
            plan = estimate(Shape(**sizes), seen, seen.link, trusted, assumed)
            plans.append(foretold(plan, tokens))
            steps += [run.step(), run.step()]
            print(seen, trusted.per_byte, plans[-1], steps[-2:], file=sys.stderr)
    outcome = {
        name: {"foretold": median(one[name] for one in plans), "measured": median(one[name] for one in steps)}
        for name in plans[0]
    }
    print(f"{tokens} tokens a step, {args.blocks} blocks of width {args.width} and a head of {sizes['vocab_size']}")
    for name, pair in outcome.items():
        unit = 1e6 if name.startswith("bytes") else 1.0
        print(f"{name:12} {pair['foretold'] / unit:9.3f} {pair['measured'] / unit:9.3f} {'MB' if unit > 1 else 's'}")
    print("tokens/s    ", *(f"{tokens / value:9.0f}" for value in outcome["step"].values()))
    if args.json:
        figures = {"model": sizes, "tokens": tokens, "rounds": args.rounds, "step": outcome, "machine": machine()}
        args.json.write_bytes(msgspec.json.format(msgspec.json.encode(figures), indent=1) + b"\n")


if __name__ == "__main__":
    main()

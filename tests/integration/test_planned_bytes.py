"""What `tempo plan` says of bytes is what a run over workers sends and gets."""

from __future__ import annotations

import pytest
import torch
import transformers as hf
from peft import LoraConfig, get_peft_model

from tempo.plan import models
from tempo.plan.estimate import Assumptions, estimate
from tempo.plan.hardware import GPUS, Link
from tempo.plan.rates import Rates
from tempo.wire.residues import SEED_BYTES

# Versions of PEFT and transformers that do not know each other's latest names yet.
pytestmark = pytest.mark.filterwarnings("ignore:.*gradient_checkpointing:FutureWarning")

CONFIG = {
    "vocab_size": 50,
    "hidden_size": 24,
    "intermediate_size": 40,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
}
RATES = Rates(per_byte=1e-9, per_attention_flop=1e-10, measured="by hand", machine={})


@pytest.mark.parametrize("colluders", [1, 2])
def test_a_step_of_lora_sends_and_gets_the_bytes_that_were_planned(connect, tmp_path, colluders):
    config = hf.LlamaConfig(**CONFIG)
    config.save_pretrained(tmp_path)
    model = get_peft_model(hf.LlamaForCausalLM(config), LoraConfig(r=2, target_modules="all-linear"))
    session = connect(colluders + 1, colluders + 1, scheme="split", base="public", split_colluders=colluders)
    session.protect(model)
    ids = torch.randint(50, (3, 7))
    for _ in range(3):  # which layers share an input is learned at first, and weights go out
        before = session.stats()
        model(input_ids=ids, labels=ids).loss.backward()
    used = session.stats() - before
    shape = models.find(str(tmp_path))
    plan = estimate(shape, GPUS["a100"], Link(up=1, down=1, latency=0), RATES, Assumptions(colluders=colluders))
    products = used.encryptions["x"] + used.encryptions["g"]
    assert products == len(shape.products) + len(shape.backward)
    assert used.bytes_sent == ids.numel() * plan.bytes_up + products * colluders * SEED_BYTES
    assert used.bytes_received == ids.numel() * plan.bytes_down

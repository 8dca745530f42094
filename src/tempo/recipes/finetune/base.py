"""The public base: its tokenizer, and its model with a fresh adapter on it. Never a pickle, never its own code."""

from __future__ import annotations

import sys
import warnings
from pathlib import Path
from typing import Any

import torch

from tempo.errors import SettingsError, nearest
from tempo.recipes.finetune.tuning import Model


def load_tokenizer(base: str) -> Any:
    """The tokenizer of ``base``.

    Raises:
        SettingsError: There is none.
    """
    from transformers import AutoTokenizer

    _check(base)
    try:
        return AutoTokenizer.from_pretrained(base)
    except (OSError, ValueError, KeyError) as error:
        raise SettingsError(f"{base}: cannot load its tokenizer: {_first_line(error)}") from None


def load_base(base: str) -> Any:
    """The base alone, in float32.

    Raises:
        SettingsError: It cannot be loaded.
    """
    import transformers as hf

    _check(base)
    hf.utils.logging.disable_progress_bar()
    try:
        return hf.AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32, use_safetensors=True)
    except (OSError, ValueError, KeyError) as error:
        raise SettingsError(f"{base}: cannot load as a causal language model: {_first_line(error)}") from None


def load_adapted(base: str, adapter: Path) -> Any:
    """The base with an adapter that was stored, both frozen.

    Raises:
        SettingsError: One of them cannot be loaded, or does not fit the other.
    """
    peft = _peft()
    if not (adapter / "adapter_model.safetensors").is_file():
        raise SettingsError(f"{adapter}: no adapter in PEFT's format: adapter_model.safetensors is missing")
    try:
        return peft.PeftModel.from_pretrained(load_base(base), adapter)
    except (OSError, ValueError, KeyError, RuntimeError) as error:
        raise SettingsError(f"{adapter}: cannot put this adapter on {base}: {_first_line(error)}") from None


def load_model(model: Model) -> Any:
    """The base in float32, frozen, with a fresh adapter; seed torch before, for the same adapter again.

    Raises:
        SettingsError: The base cannot be loaded, or has no layers of the names that were given.
    """
    import transformers as hf

    peft, base = _peft(), load_base(model.base)
    targets = [name.strip() for name in model.targets.split(",") if name.strip()]
    linear = {name.rpartition(".")[2] for name, module in base.named_modules() if hasattr(module, "weight")}
    for name in targets:
        if targets != ["all-linear"] and name.rpartition(".")[2] not in linear:
            raise SettingsError(f"--targets: {model.base} has no layer {name!r}; {nearest(name, linear)}")
    config = peft.LoraConfig(
        r=model.rank,
        lora_alpha=model.alpha,
        lora_dropout=model.dropout,
        target_modules=targets if targets != ["all-linear"] else "all-linear",
        use_rslora=model.rslora,
        use_dora=model.dora,
        fan_in_fan_out=any(isinstance(module, hf.pytorch_utils.Conv1D) for module in base.modules()),
        task_type="CAUSAL_LM",
    )
    try:
        with warnings.catch_warnings():
            # A PEFT that does not know the latest names of transformers: nothing that a user can do about.
            warnings.simplefilter("ignore", FutureWarning)
            adapted = peft.get_peft_model(base, config)
    except ValueError as error:
        raise SettingsError(f"{model.base}: cannot put an adapter on it: {_first_line(error)}") from None
    if model.gradient_checkpointing:
        adapted.gradient_checkpointing_enable({"use_reentrant": False})
    return adapted


def most_tokens(model: Any) -> int:
    """How many tokens ``model`` can read at once."""
    return getattr(model.config, "max_position_embeddings", None) or sys.maxsize


def _peft() -> Any:
    try:
        import peft
    except ImportError as error:
        raise SettingsError(f"adapters need {error.name}: pip install 'tempo-train[finetune]'") from None
    return peft


def _check(base: str) -> None:
    """Tell a folder that is not there from a name on the hub, which transformers would go and ask."""
    if not Path(base).exists() and (base.startswith((".", "/", "~")) or base.count("/") != 1):
        raise SettingsError(f"{base}: no such folder; name one in Hugging Face's format, or OWNER/NAME on the hub")


def _first_line(error: Exception) -> str:
    return str(error).strip().partition("\n")[0]

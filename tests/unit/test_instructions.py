"""The guard of the native kernels' speed: their instruction counts, which no other load on the machine changes."""

from __future__ import annotations

import importlib.util
import os
from pathlib import Path
from types import ModuleType

import pytest

from tempo import kernels

SCRIPT = Path(__file__).parents[2] / "benchmarks" / "instructions.py"


@pytest.fixture(scope="module")
def instructions() -> ModuleType:
    spec = importlib.util.spec_from_file_location("instructions", SCRIPT)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_no_kernel_takes_more_instructions_than_it_did(instructions: ModuleType) -> None:
    if instructions.ISA not in kernels.available():
        pytest.skip(f"there are no {instructions.ISA} kernels here: {kernels.available()}")
    try:
        counted = instructions.count()
    except LookupError as error:
        if os.environ.get("CI"):
            raise
        pytest.skip(str(error))
    assert instructions.above(counted, instructions.expected()) == []


def test_what_became_slower_or_is_unknown_is_named(instructions: ModuleType) -> None:
    expected = {"slower": 10.0, "within": 10.0, "gone": 1.0, "faster": 10.0}
    counted = {"slower": 11.1, "within": 10.9, "new": 1.0, "faster": 5.0}
    wrong = instructions.above(counted, expected)
    assert [line.split(":")[0] for line in wrong] == ["gone", "new", "slower"]

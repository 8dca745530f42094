"""What goes wrong says where, what happened and what to do; and what can go on afterwards does."""

from __future__ import annotations

import copy
import os
import threading
from collections.abc import Callable, Iterator
from contextlib import ExitStack

import pytest
import torch
from torch import Tensor, nn

import tempo
from tempo.errors import (
    AddressError,
    NonFiniteError,
    SessionClosedError,
    SettingsError,
    UnsafeError,
    WorkerLostError,
    WorkerOutOfMemoryError,
    WorkerUnreachableError,
)
from tempo.layers.base import Protected
from tempo.wire.address import Address
from tempo.worker.server import Options, Server


def network() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(6, 8), nn.Tanh(), nn.Linear(8, 3))


def data(*shape: int) -> Tensor:
    torch.manual_seed(1)
    return torch.randn(shape or (4, 6))


def assert_works(model: nn.Module, plain: nn.Module) -> None:
    for each in (model, plain):
        each.zero_grad()
        each(data()).square().sum().backward()
    for actual, expected in zip(model.parameters(), plain.parameters(), strict=True):
        torch.testing.assert_close(actual.grad, expected.grad, rtol=1e-4, atol=1e-6)


@pytest.fixture
def worker(tmp_path) -> Iterator[Callable[..., str]]:
    """Start workers inside this process; returns their addresses."""
    with ExitStack() as stack:

        def start(**options: object) -> str:
            server = Server(Options(insecure_no_tls=True, **options))
            address = Address.parse(server.listen(f"unix:{tmp_path}/worker.sock"))
            thread = threading.Thread(target=server.accept_forever)
            thread.start()
            stack.callback(thread.join)
            stack.callback(server.close)
            return str(address)

        yield start


# --- numbers ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -float("inf")])
def test_a_non_finite_input_names_the_layer_and_harms_nothing(connect, bad):
    session = connect(scheme="tempo")
    plain = network()
    model = session.protect(copy.deepcopy(plain))
    x = data()
    x[1, 2] = bad
    with pytest.raises(NonFiniteError, match=r"layer '0': its input of shape \(4, 6\) has 1 NaN or infinite") as caught:
        model(x)
    assert "learning rate" in str(caught.value)
    assert isinstance(caught.value, FloatingPointError)
    assert_works(model, plain)


def test_a_non_finite_weight_names_the_layer_and_harms_nothing(connect):
    session = connect(2, scheme="tempo")
    plain = network()
    model = session.protect(copy.deepcopy(plain))
    with torch.no_grad():
        model[2].weight[0, 0] = float("nan")
    with pytest.raises(NonFiniteError, match=r"layer '2': its weight"):
        model(data())
    model.load_state_dict(plain.state_dict())
    assert_works(model, plain)


def test_a_large_sum_of_finite_numbers_is_no_error(connect):
    model = connect(scheme="insecure-plain").protect(nn.Linear(4, 2, bias=False))
    nn.init.constant_(model.weight, 1e-3)
    assert model(torch.full((8, 4), 3e38)).isfinite().all()


def test_non_finite_gradients_pass_with_a_warning_as_loss_scalers_need_them(connect):
    model = connect(scheme="tempo").protect(network())
    with pytest.warns(RuntimeWarning, match="layer '[02]': its output gradient holds NaN or infinity"):
        (model(data()) * float("inf")).sum().backward()
    assert not model[0].weight.grad.isfinite().all()


# --- sessions ---------------------------------------------------------------------------------------------------------


def test_a_closed_session_says_what_to_do_and_gives_the_model_back(connect):
    session = connect(scheme="tempo")
    plain = network()
    model = session.protect(copy.deepcopy(plain))
    y = model(data())
    session.close()
    session.close()
    with pytest.raises(SessionClosedError, match="unprotect"):
        y.sum().backward()
    with pytest.raises(SessionClosedError, match="unprotect"):
        model(data())
    with pytest.raises(SessionClosedError):
        session.protect(network())
    session.unprotect(model)
    assert torch.equal(model(data()), plain(data()))
    other = connect(scheme="tempo")
    assert_works(other.protect(model), plain)
    assert other.stats().flops_offloaded > 0


def test_unprotect_restores_the_model_with_its_present_weights(connect):
    session = connect(scheme="tempo")
    model = session.protect(network())
    with torch.no_grad():
        model[0].weight += 1
    assert session.unprotect(model) is model
    assert not any(isinstance(module, Protected) for module in model.modules())
    assert all("_tempo" not in vars(module) for module in model.modules())
    reference = network()
    with torch.no_grad():
        reference[0].weight += 1
    assert torch.equal(model(data()), reference(data()))
    assert session.stats().flops_offloaded == 0
    assert session.summary().lines == []


def test_a_model_is_protected_once(connect):
    session = connect(scheme="tempo")
    model = session.protect(network())
    with pytest.raises(SettingsError, match="protected already"):
        session.protect(model)
    with pytest.raises(SettingsError, match="protected already"):
        connect(scheme="tempo").protect(nn.Sequential(model, nn.Linear(3, 3)))


@pytest.mark.filterwarnings("ignore:.*fork:DeprecationWarning")  # of newer Pythons, in a process with threads
def test_a_fork_cannot_use_its_parent_s_masks(connect):
    session = connect(scheme="tempo")
    model = session.protect(network())
    read, write = os.pipe()
    if (child := os.fork()) == 0:  # a child that does nothing but report
        try:
            model(data())
            os.write(write, b"computed")
        except UnsafeError as error:
            os.write(write, str(error).encode())
        finally:
            os._exit(0)
    os.waitpid(child, 0)
    os.close(write)
    with os.fdopen(read) as pipe:
        assert "fork" in pipe.read()
    model(data())


# --- settings ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"scheme": "temppo"}, "unknown scheme 'temppo'; did you mean 'tempo'?"),
        ({"shceme": "tempo"}, "unknown setting 'shceme'; did you mean 'scheme'?"),
        ({"placement": "everything"}, "placement"),
        ({"wire_dtype": "float16"}, "wire_dtype"),
        ({"rekey_rows": 0}, "rekey_rows"),
        ({"local_workers": "two"}, "local_workers"),
    ],
)
def test_wrong_settings_are_named_before_anything_starts(fields, message):
    with pytest.raises(SettingsError) as caught:
        tempo.connect(**fields)
    assert message in str(caught.value)


def test_wrong_addresses_and_absent_workers_are_named(tmp_path):
    with pytest.raises(AddressError, match="gpu-a"):
        tempo.connect("gpu-a")
    with pytest.raises(WorkerUnreachableError, match=r"absent\.sock: nothing listens there; start it with"):
        tempo.connect(f"unix:{tmp_path}/absent.sock")


def test_trusted_patterns_keep_layers_from_settings_and_from_the_call(connect):
    session = connect(scheme="tempo", trusted=["0"])
    plain = network()
    assert_works(session.protect(copy.deepcopy(plain)), plain)
    assert session.stats().encryptions["x"] == 1
    session = connect(scheme="tempo")
    assert_works(session.protect(copy.deepcopy(plain), trusted=["[02]"]), plain)
    assert session.stats().flops_offloaded == 0
    assert {line.reason for line in session.summary().lines} == {"kept by trusted='[02]'"}


def test_a_model_on_another_device_is_refused(connect):
    with pytest.raises(SettingsError, match=r"0\.weight is on meta.*model\.cpu\(\)"):
        connect(scheme="tempo").protect(nn.Sequential(nn.Linear(3, 3, device="meta")))


# --- workers ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("during", ["forward", "backward"])
def test_a_killed_worker_is_named_with_the_layer_that_needed_it(during):
    with tempo.connect(scheme="tempo", placement="all", local_threads=1, patience=0) as session:
        plain = network()
        model = session.protect(copy.deepcopy(plain))
        y = model(data())
        process = session._engine.links[0].process
        process.kill()
        process.wait()
        layer = "2" if during == "backward" else "0"
        with pytest.raises(WorkerLostError, match=rf"layer '{layer}': worker local:0.*connection lost"):
            y.sum().backward() if during == "backward" else model(data())
        with pytest.raises(WorkerLostError, match="layer '0': worker local:0"):
            model(data())
        session.unprotect(model)
        assert torch.equal(model(data()), plain(data()))


def test_a_worker_out_of_memory_is_named_with_the_layer(worker):
    address = worker(memory_limit="40MiB")
    with tempo.connect(address, scheme="tempo", placement="all") as session:
        plain = network()
        model = session.protect(copy.deepcopy(plain))
        large = session.protect(nn.Sequential(nn.utils.skip_init(nn.Linear, 4096, 4096)))
        nn.init.ones_(large[0].weight)
        for _ in range(2):
            with pytest.raises(WorkerOutOfMemoryError, match=r"layer '0': worker unix:.*out of memory.*memory-limit"):
                large(data(2, 4096))
        assert_works(model, plain)
        assert session.stats().flops_offloaded > 0

"""What people do with plain PyTorch models works on protected ones, unchanged, and gives plain PyTorch's numbers."""

from __future__ import annotations

import copy
import io
from collections.abc import Callable, Iterable
from shutil import which

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.utils.parametrizations import weight_norm
from torch.overrides import TorchFunctionMode
from torch.utils.checkpoint import checkpoint

from tempo.errors import SettingsError
from tempo.layers.base import Protected
from tempo.session import Session
from tempo.summary import Line

TOLERANCE = 1e-5


class Network(nn.Module):
    """Two fully connected layers with something between them."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.norm, self.second = nn.Linear(12, 16), nn.LayerNorm(16), nn.Linear(16, 7)

    def forward(self, x: Tensor) -> Tensor:
        return self.second(torch.tanh(self.norm(self.first(x))))


def both(session: Session, make: Callable[[], nn.Module]) -> tuple[nn.Module, nn.Module]:
    """A plain model and a protected copy of it."""
    torch.manual_seed(0)
    plain = make()
    return plain, session.protect(copy.deepcopy(plain))


def data(*shape: int) -> Tensor:
    torch.manual_seed(1)
    return torch.randn(shape or (9, 12))


def close(actual: Tensor | Iterable[Tensor], expected: Tensor | Iterable[Tensor]) -> bool:
    pairs = [(actual, expected)] if isinstance(actual, Tensor) else list(zip(actual, expected, strict=True))
    return all(a.shape == e.shape and bool((a - e).norm() <= TOLERANCE * e.norm() + 1e-7) for a, e in pairs)


def gradients(model: nn.Module) -> list[Tensor]:
    return [p.grad for p in model.parameters()]


def line(session: Session, name: str) -> Line:
    return next(line for line in session.summary().lines if line.name == name)


@pytest.fixture
def session(connect) -> Session:
    return connect(scheme="tempo")


# --- identity, copies, storage ----------------------------------------------------------------------------------------


def test_protecting_changes_nothing_that_can_be_seen(session):
    model = Network()
    before = (list(model.state_dict()), list(map(id, model.parameters())), repr(model))
    parameters, layer = dict(model.named_parameters()), model.first
    assert session.protect(model) is model
    assert (list(model.state_dict()), list(map(id, model.parameters())), repr(model)) == before
    assert {type(value) for value in model.state_dict().values()} == {Tensor}
    assert all(type(p) is nn.Parameter and parameters[n] is p for n, p in model.named_parameters())
    assert model.first is layer
    assert isinstance(layer, nn.Linear)
    assert (type(layer).__name__, type(layer).__module__) == ("Linear", "torch.nn.modules.linear")
    session.unprotect(model)
    assert type(layer) is nn.Linear
    assert (list(model.state_dict()), list(map(id, model.parameters())), repr(model)) == before


def test_a_deep_copy_is_protected_under_masks_of_its_own(session):
    plain, model = both(session, Network)
    double, x = copy.deepcopy(model), data()
    assert double.first._tempo is not model.first._tempo
    assert close(model(x), plain(x))
    with torch.no_grad():
        double.first.weight.mul_(2)
    assert close(model(x), plain(x))
    assert not close(double(x), plain(x))
    # Two layers in each: the copy had its own weights masked, and did not displace the original's.
    assert session.stats().encryptions == {"x": 6, "w": 4, "g": 0}
    assert session.stats().flops_trusted == 0


def test_a_stored_state_dict_loads_anywhere(session):
    plain, model = both(session, Network)
    file = io.BytesIO()
    torch.save(model.state_dict(), file)
    file.seek(0)
    state = torch.load(file, weights_only=True)
    other = Network()
    other.load_state_dict(state)
    assert close(other(data()), plain(data()))
    changed = {name: value + 1 for name, value in state.items()}
    plain.load_state_dict(changed)
    model(data())
    model.load_state_dict(changed)
    assert close(model(data()), plain(data()))
    model.load_state_dict(state, assign=True)
    assert close(model(data()), other(data()))
    assert session.stats().encryptions["w"] == 6


def test_a_model_stored_whole_loads_as_a_plain_one(session):
    plain, model = both(session, Network)
    model(data())
    file = io.BytesIO()
    torch.save(model, file)
    file.seek(0)
    loaded = torch.load(file, weights_only=False)
    assert type(loaded.first) is nn.Linear
    assert not any(isinstance(module, Protected) for module in loaded.modules())
    assert "_tempo" not in vars(loaded.first)
    assert close(loaded(data()), plain(data()))
    assert isinstance(model.first, Protected)


# --- differentiation --------------------------------------------------------------------------------------------------


def test_a_default_device_is_for_what_the_model_makes(session):
    """A function mode, as `torch.device` sets one, changes nothing of what masks and buffers are made of."""
    plain, protected = both(session, Network)
    x = data()
    with torch.device("meta"):
        protected(x).square().sum().backward()
    plain(x).square().sum().backward()
    assert session.summary().offloaded_share > 0
    assert close([p.grad for p in protected.parameters()], [p.grad for p in plain.parameters()])


class Watching(TorchFunctionMode):
    """Notes the functions that it is asked about, but for attributes."""

    def __init__(self):
        self.seen = set()

    def __torch_function__(self, func, types, args=(), kwargs=None):
        if func.__name__ != "__get__":
            self.seen.add(func)
        return func(*args, **(kwargs or {}))


def test_function_modes_see_the_model_and_nothing_of_our_own(session):
    plain, protected = both(session, Network)
    with Watching() as of_plain:
        plain(data())
    with Watching() as of_protected:
        protected(data())
    assert session.summary().offloaded_share > 0
    assert of_protected.seen < of_plain.seen  # all but the products


@pytest.mark.parametrize("reentrant", [True, False])
def test_checkpointed_layers_are_recomputed_under_fresh_masks(session, reentrant):
    plain, model = both(session, Network)
    results = []
    for network in (plain, model):
        x = data().requires_grad_()
        y = checkpoint(network, x, use_reentrant=reentrant)
        y.square().sum().backward()
        results.append([y.detach(), x.grad, *gradients(network)])
    assert close(results[1], results[0])
    used = session.stats()
    assert used.encryptions["g"] == 2
    # Non-reentrant recomputation stops at the last tensor that is needed.
    assert used.encryptions["x"] == 4
    assert used.flops_trusted == 0


def test_a_second_backward_pass_through_one_graph_has_fresh_masks(session):
    plain, model = both(session, Network)
    results = []
    for network in (plain, model):
        x = data().requires_grad_()
        y = network(x)
        y.sum().backward(retain_graph=True)
        y.square().sum().backward()
        results.append([x.grad, *gradients(network)])
    assert close(results[1], results[0])
    assert session.stats().encryptions == {"x": 4, "w": 4, "g": 4}


def test_a_second_gradient_that_does_not_need_the_input_s_weights(session):
    """A vector-Jacobian product at a time, as Jacobians are computed."""
    plain, model = both(session, Network)
    rows = []
    for network in (plain, model):
        x = data().requires_grad_()
        y = network(x)
        rows.append([torch.autograd.grad(y[:, i].sum(), x, retain_graph=True)[0] for i in range(3)])
    assert close(rows[1], rows[0])
    assert session.stats().encryptions["g"] == 6


def test_autograd_grad_of_inputs_and_of_weights(session):
    plain, model = both(session, Network)
    results = []
    for network in (plain, model):
        x = data().requires_grad_()
        inputs = [x, network.first.weight, network.second.bias]
        results.append(torch.autograd.grad(network(x).square().sum(), inputs))
        assert gradients(network) == [None] * 6
    assert close(results[1], results[0])
    assert session.stats().encryptions["g"] == 2


def test_what_cannot_be_differentiated_twice_says_so(session):
    model = session.protect(Network())
    x = data().requires_grad_()
    (dx,) = torch.autograd.grad(model(x).square().sum(), x, create_graph=True)
    with pytest.raises(RuntimeError, match="once_differentiable"):
        dx.square().sum().backward()


def test_hooks_see_the_gradients_that_plain_pytorch_shows(session):
    plain, model = both(session, Network)
    seen = []
    for network in (plain, model):
        x, events = data().requires_grad_(), {}
        network.first.weight.register_hook(lambda g, events=events: events.setdefault("weight", g.clone()) * 3)
        network.second.weight.register_post_accumulate_grad_hook(
            lambda p, events=events: events.update(accumulated=p.grad.clone())
        )
        network.first.register_forward_hook(lambda m, a, y, events=events: events.update(forward=y.detach()))
        network.second.register_full_backward_hook(
            lambda m, gx, gy, events=events: events.update(gx=gx[0].clone(), gy=gy[0].clone())
        )
        y = network(x)
        y.register_hook(lambda g, events=events: events.setdefault("output", g.clone()) * 2)
        y.square().sum().backward()
        names = ["accumulated", "forward", "gx", "gy", "output", "weight"]
        assert sorted(events) == names
        seen.append([*(events[name] for name in names), x.grad, *gradients(network)])
    assert close(seen[1], seen[0])
    assert session.stats().flops_offloaded > 0


def test_an_optimizer_may_step_inside_the_backward_pass(session):
    plain, model = both(session, Network)
    for network in (plain, model):
        for p in network.parameters():

            def step(p: Tensor) -> None:
                with torch.no_grad():
                    p -= 0.1 * p.grad
                p.grad = None

            p.register_post_accumulate_grad_hook(step)
        for _ in range(3):
            network(data()).square().mean().backward()
    assert close(model.parameters(), plain.parameters())
    assert session.stats().encryptions == {"x": 6, "w": 6, "g": 6}


def test_functional_call_computes_with_the_weights_it_is_given(session):
    plain, model = both(session, Network)
    model(data())
    weights = {name: (p.detach() + 0.5).requires_grad_() for name, p in plain.named_parameters()}
    results = []
    for network in (plain, model):
        y = torch.func.functional_call(network, weights, data())
        results.append([y.detach(), *torch.autograd.grad(y.square().sum(), list(weights.values()))])
    assert close(results[1], results[0])
    assert close(model(data()), plain(data()))
    assert session.stats().flops_trusted == 0


def test_torch_func_transforms_stay_trusted_and_correct(session):
    plain, model = both(session, Network)
    results = [
        torch.func.vmap(torch.func.grad(lambda x, network=network: network(x).square().sum()))(data())
        for network in (plain, model)
    ]
    assert close(results[1], results[0])
    assert session.stats().flops_offloaded == 0
    assert "torch.func" in line(session, "first").reason


# --- wrappers ---------------------------------------------------------------------------------------------------------


def test_distributed_data_parallel(session, tmp_path):
    plain, model = both(session, Network)

    def train() -> None:
        wrapped = nn.parallel.DistributedDataParallel(model)
        for _ in range(2):
            wrapped(data()).square().sum().backward()
            plain(data()).square().sum().backward()

    torch.distributed.init_process_group("gloo", init_method=f"file://{tmp_path}/store", rank=0, world_size=1)
    try:
        # The wrapper must not outlive the group: dropping gloo's last reference from there can wait for ever, as it
        # joins threads that may want the interpreter's lock, which it holds (PyTorch's own, protected or not).
        train()
    finally:
        torch.distributed.destroy_process_group()
    assert close(gradients(model), gradients(plain))
    assert session.stats().encryptions == {"x": 4, "w": 2, "g": 4}


# PyTorch's own, of its compiler's insides.
@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf", "ignore::DeprecationWarning")
@pytest.mark.parametrize(
    "backend",
    ["aot_eager", pytest.param("inductor", marks=pytest.mark.skipif(not which("g++"), reason="needs a C++ compiler"))],
)
def test_compiled_models_break_their_graphs_at_products(session, backend, monkeypatch):
    monkeypatch.setenv("TORCHINDUCTOR_COMPILE_THREADS", "1")
    torch.compiler.reset()
    plain, model = both(session, Network)
    compiled = torch.compile(model, backend=backend)
    for _ in range(2):
        loss = compiled(data()).square().sum()
        loss.backward()
        plain(data()).square().sum().backward()
    assert close(gradients(model), gradients(plain))
    assert session.stats().encryptions == {"x": 4, "w": 2, "g": 4}
    assert session.stats().flops_trusted == 0


# --- weights ----------------------------------------------------------------------------------------------------------


class Tied(nn.Module):
    """An embedding whose table is the output projection too."""

    def __init__(self) -> None:
        super().__init__()
        self.embedding, self.head = nn.Embedding(11, 12), nn.Linear(12, 11, bias=False)
        self.head.weight = self.embedding.weight

    def forward(self, tokens: Tensor) -> Tensor:
        return self.head(self.embedding(tokens))


def test_tied_weights_get_both_gradients(session):
    plain, model = both(session, Tied)
    assert model.head.weight is model.embedding.weight
    tokens = torch.arange(10).view(2, 5)
    for network in (plain, model):
        F.cross_entropy(network(tokens).flatten(0, 1), tokens.flatten()).backward()
    assert close(gradients(model), gradients(plain))
    assert session.stats().encryptions == {"x": 1, "w": 1, "g": 1}


class LowRank(nn.Module):
    """A frozen layer with a low-rank adapter beside it."""

    def __init__(self) -> None:
        super().__init__()
        self.base, self.down, self.up = nn.Linear(12, 12), nn.Linear(12, 2, bias=False), nn.Linear(2, 12, bias=False)
        self.base.requires_grad_(False)

    def forward(self, x: Tensor) -> Tensor:
        return self.base(x) + self.up(self.down(x))


def test_frozen_weights_are_masked_once_and_get_no_gradient(connect):
    session = connect(scheme="tempo", trusted=["down", "up"])
    plain, model = both(session, LowRank)
    results = []
    for network in (plain, model):
        for _ in range(3):
            x = data().requires_grad_()
            network(x).square().sum().backward()
        results.append([x.grad, *(p.grad for p in network.parameters() if p.requires_grad)])
    assert close(results[1], results[0])
    used = session.stats()
    assert used.encryptions == {"x": 3, "w": 1, "g": 3}
    assert used.decryptions["dw"] == 0
    assert used.flops_offloaded == 3 * 2 * (2 * 9 * 12 * 12)


def test_workers_keep_no_input_where_no_weight_gradient_can_be_asked_for(session, monkeypatch):
    kept = []
    link = session._engine.links[0]
    request = link.request

    def spy(message, *rest):
        kept.append(getattr(message, "operand", None))
        return request(message, *rest)

    monkeypatch.setattr(link, "request", spy)
    model = session.protect(LowRank().requires_grad_(False))
    model(data().requires_grad_()).sum().backward()
    with torch.no_grad():
        session.protect(Network())(data())
    assert kept
    assert not any(kept)


@pytest.mark.parametrize("when", ["before", "after"])
def test_parametrized_weights(session, when):
    torch.manual_seed(0)
    plain = Network()
    model = copy.deepcopy(plain)
    weight_norm(plain.first)
    if when == "before":
        weight_norm(model.first)
    session.protect(model)
    if when == "after":
        weight_norm(model.first)
    for _ in range(2):
        for network in (plain, model):
            network.zero_grad()
            network(data()).square().sum().backward()
        assert close(gradients(model), gradients(plain))
    assert session.stats().flops_trusted == 0
    assert session.stats().flops_offloaded > 0
    if when == "after":
        with pytest.raises(SettingsError, match=r"'first'.*remove_parametrizations"):
            session.unprotect(model)
        nn.utils.parametrize.remove_parametrizations(model.first, "weight")
    session.unprotect(model)
    assert close(model(data()), plain(data()))


@pytest.mark.parametrize("change", ["data", "no_grad", "numpy", "assigned"])
def test_a_changed_weight_is_noticed_however_it_changed(session, change):
    plain, model = both(session, Network)
    for network in (plain, model):
        network(data())
        weight = network.first.weight
        if change == "data":
            weight.data.mul_(-1)
        elif change == "no_grad":
            with torch.no_grad():
                weight[3, 2] += 1
        elif change == "numpy":
            weight.detach().numpy()[1, 1] = 0.5
        else:
            network.first.weight = nn.Parameter(weight.detach().flip(0))
    assert close(model(data()), plain(data()))
    assert session.stats().encryptions["w"] == 3


# --- calls ------------------------------------------------------------------------------------------------------------


class Repeated(nn.Module):
    """One layer, called on what it made of its input."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(12, 12)

    def forward(self, x: Tensor) -> Tensor:
        return self.layer(x) + self.layer(torch.tanh(self.layer(x)))


def test_a_layer_called_again_in_one_forward_pass(session):
    plain, model = both(session, Repeated)
    for network in (plain, model):
        network(data()).square().sum().backward()
    assert close(gradients(model), gradients(plain))
    assert session.stats().encryptions == {"x": 3, "w": 1, "g": 3}


@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode, torch.enable_grad])
def test_evaluation_and_training_by_turns(connect, mode):
    session = connect(scheme="tempo")
    plain, model = both(session, lambda: nn.Sequential(Network(), nn.Dropout(0.5), SharedInput(7)))
    for _ in range(3):
        outputs = []
        for network in (plain, model):
            network.eval()
            with mode():
                outputs.append(network(data()).clone())
        assert outputs[1].requires_grad == outputs[0].requires_grad
        assert close(outputs[1], outputs[0])
        for network in (plain, model):
            network.train().zero_grad()
            torch.manual_seed(2)
            network(data()).square().sum().backward()
        assert close(gradients(model), gradients(plain))
    assert session.stats().flops_trusted == 0


@pytest.mark.parametrize("shape", [(0, 12), (3, 0, 12), (1, 12), (12,), (2, 1, 3, 12)])
def test_empty_single_and_deep_batches(session, shape):
    plain, model = both(session, Network)
    for network in (plain, model):
        network(data(*shape)).square().sum().backward()
    assert close(model(data(*shape)), plain(data(*shape)))
    assert close(gradients(model), gradients(plain))
    assert (session.stats().flops_offloaded > 0) == (0 not in shape)


@pytest.mark.parametrize(
    ("make", "x"),
    [
        (lambda: nn.Linear(4, 3), torch.randn(2, 5)),
        (lambda: nn.Linear(4, 3), torch.randn(2, 4).double()),
        (lambda: nn.Linear(4, 3), torch.tensor(1.0)),
        (lambda: nn.Conv2d(4, 3, 3), torch.randn(2, 5, 6, 6)),
        (lambda: nn.Conv2d(4, 3, 3), torch.randn(2, 4, 2, 2)),
        (lambda: nn.Conv2d(4, 3, 3), torch.randn(2, 4)),
    ],
)
def test_wrong_inputs_raise_what_plain_pytorch_raises(session, make, x):
    plain, model = both(session, make)
    errors = []
    for network in (plain, model):
        with pytest.raises(RuntimeError) as caught:
            network(x)
        errors.append(str(caught.value))
    assert errors[1] == errors[0]


def test_complex_products_stay_trusted_and_correct(session):
    plain, model = both(session, lambda: nn.Linear(4, 3, dtype=torch.complex64))
    x = torch.randn(2, 4, dtype=torch.complex64)
    assert torch.equal(model(x), plain(x))
    assert session.stats().flops_offloaded == 0
    assert "complex64" in session.summary().lines[0].reason


# --- layers -----------------------------------------------------------------------------------------------------------


class PaddedConv(nn.Conv2d):
    """Pads by itself, as many vision models do."""

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(F.pad(x, (0, 1, 0, 1)))


class StandardizedConv(nn.Conv2d):
    """Normalises its weight on the way."""

    def forward(self, x: Tensor) -> Tensor:
        weight = self.weight - self.weight.mean((1, 2, 3), keepdim=True)
        return self._conv_forward(x, weight, self.bias)


class ScaledLinear(nn.Linear):
    """Rescales what the product gives."""

    def forward(self, x: Tensor) -> Tensor:
        return 0.5 * super().forward(2 * x) + 1


class OwnLinear(nn.Linear):
    """Computes its product itself."""

    def forward(self, x: Tensor) -> Tensor:
        return x @ self.weight.t().exp()


@pytest.mark.parametrize(
    ("make", "x"),
    [
        (lambda: nn.Sequential(PaddedConv(4, 3, 2)), (2, 4, 5, 5)),
        (lambda: nn.Sequential(StandardizedConv(4, 3, 2)), (2, 4, 5, 5)),
        (lambda: nn.Sequential(ScaledLinear(6, 5)), (3, 6)),
    ],
)
def test_subclasses_that_work_around_the_product_are_offloaded(session, make, x):
    plain, model = both(session, make)
    for network in (plain, model):
        network(data(*x)).square().sum().backward()
    assert close(model(data(*x)), plain(data(*x)))
    assert close(gradients(model), gradients(plain))
    assert session.stats().flops_trusted == 0
    assert session.stats().flops_offloaded > 0


def test_unknown_overrides_stay_trusted_with_a_warning(session):
    plain = nn.Sequential(OwnLinear(6, 5, bias=False), nn.Linear(5, 4))
    with pytest.warns(UserWarning, match="'0' stays trusted: OwnLinear.forward"):
        model = session.protect(copy.deepcopy(plain))
    assert type(model[0]) is OwnLinear
    assert close(model(data(3, 6)), plain(data(3, 6)))
    assert session.stats().encryptions["x"] == 1
    assert "OwnLinear.forward" in line(session, "0").reason


def test_a_forward_set_on_the_instance_stays_trusted_with_a_warning(session):
    model = nn.Sequential(nn.Linear(6, 5), nn.Linear(5, 4))
    original = model[0].forward
    model[0].forward = lambda x: original(x) + 1
    with pytest.warns(UserWarning, match="'0' stays trusted: .*forward"):
        session.protect(model)
    model(data(3, 6))
    assert session.stats().encryptions["x"] == 1
    assert "forward" in line(session, "0").reason


def test_lazy_layers_are_protected_once_they_know_their_shapes(session):
    model = nn.Sequential(nn.LazyLinear(6), nn.Tanh(), nn.LazyConv1d(3, 2))
    x = data(2, 5, 12)
    session.protect(model)
    expected = model(x)
    assert session.stats().flops_offloaded == 0
    assert "lazy" in line(session, "0").reason
    session.unprotect(model)
    session.protect(model)
    assert close(model(x), expected)
    assert session.stats().encryptions["x"] == 2


@pytest.mark.filterwarnings("ignore:enable_nested_tensor", "ignore:The PyTorch API of nested tensors")
@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode])
def test_the_fused_encoder_of_evaluation_does_not_bypass_the_workers(session, mode):
    def make() -> nn.Module:
        layer = nn.TransformerEncoderLayer(8, 2, 12, batch_first=True)
        return nn.TransformerEncoder(layer, 2)

    plain, model = both(session, make)
    padding = torch.tensor([[False] * 5, [False] * 3 + [True] * 2])
    outputs = []
    for network in (plain, model):
        network.eval()
        with mode():
            outputs.append(network(data(2, 5, 8), src_key_padding_mask=padding))
    used = ~padding[:, : outputs[0].shape[1]]
    assert close(outputs[1][used], outputs[0][used])
    assert session.stats().flops_trusted == 0
    # In each layer the packed projection, the output's, and two of the feed-forward network.
    assert session.stats().encryptions["x"] == 2 * 4


class SharedInput(nn.Module):
    """Three layers on one input; ``only`` uses one of them."""

    def __init__(self, width: int = 12) -> None:
        super().__init__()
        self.q, self.k, self.v = nn.Linear(width, 4), nn.Linear(width, 4), nn.Linear(width, 6)

    def forward(self, x: Tensor, only: str = "") -> Tensor:
        return getattr(self, only)(x) if only else torch.cat([self.q(x), self.k(x), self.v(x)], -1)


def test_layers_that_share_an_input_are_sent_it_once(session):
    plain, model = both(session, SharedInput)
    counts = []
    for _ in range(3):
        before = session.stats()
        for network in (plain, model):
            network.zero_grad()
            network(data()).square().sum().backward()
        assert close(gradients(model), gradients(plain))
        counts.append((session.stats() - before).encryptions)
    # Found to share the first time; the three weights then go out once more, as one.
    assert counts == [{"x": 3, "w": 3, "g": 3}, {"x": 1, "w": 1, "g": 1}, {"x": 1, "w": 0, "g": 1}]


def test_layers_that_stop_sharing_an_input_are_separate_again(session):
    plain, model = both(session, SharedInput)
    for network in (plain, model):
        network(data())
        network(data())
    for _ in range(10):
        for network in (plain, model):
            network.zero_grad()
            network(data(), "k").square().sum().backward()
        assert close(model.k.weight.grad, plain.k.weight.grad)
        # The others went unused: no gradient at all, so that no optimizer moves them.
        assert model.q.weight.grad is None
        assert model.v.bias.grad is None
    before = session.stats()
    model(data(), "k")
    flops = (session.stats() - before).flops_offloaded
    assert flops == 2 * 9 * 12 * 4


class Readers(nn.Module):
    """Attention layers that read one memory."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList(nn.MultiheadAttention(8, 2) for _ in range(2))

    def forward(self, x: Tensor, memory: Tensor) -> Tensor:
        for layer in self.layers:
            x = x + layer(x, memory, memory, need_weights=False)[0]
        return x


@pytest.mark.parametrize("memory", [(5, 2, 8), None])
def test_attention_layers_that_share_an_input_use_their_present_weights(session, memory):
    """Evaluated first: what was learnt without gradients, or from weights replaced since, must not stick."""

    class SelfReaders(Readers):
        def forward(self, x: Tensor, memory: Tensor) -> Tensor:
            return torch.cat([layer(x, x, x, need_weights=False)[0] for layer in self.layers])

    plain, model = both(session, Readers if memory else SelfReaders)
    x, memory = data(3, 2, 8), data(*(memory or (1,)))
    for _ in range(2):
        with torch.no_grad():
            for _ in range(2):
                assert close(model(x, memory), plain(x, memory))
        for network in (plain, model):
            network.zero_grad()
            network(x, memory).square().sum().backward()
        assert close(gradients(model), gradients(plain))
        for network in (plain, model):
            network.load_state_dict({k: v.flip(0).clone() for k, v in network.state_dict().items()}, assign=True)
            network.requires_grad_()
    assert session.stats().flops_trusted == 0


def test_depthwise_convolutions_stay_trusted(session):
    plain, model = both(session, lambda: nn.Sequential(nn.Conv2d(6, 6, 3, groups=6), nn.Conv2d(6, 8, 3, groups=2)))
    x = data(2, 6, 8, 8)
    assert close(model(x), plain(x))
    assert "depthwise" in line(session, "0").reason
    assert session.stats().encryptions["x"] == 1


def test_the_first_convolution_stays_trusted_under_automatic_placement(connect):
    session = connect(scheme="tempo", placement="auto", offload=("1",))
    session._engine.planner.placement = "all"  # anything pays off
    plain, model = both(session, lambda: nn.Sequential(nn.Conv2d(6, 8, 3), nn.Conv2d(8, 8, 3)))
    x = data(2, 6, 8, 8)
    assert close(model(x), plain(x))
    assert "first convolution" in line(session, "0").reason
    assert line(session, "1").offloaded > 0
    assert session.stats().encryptions["x"] == 1

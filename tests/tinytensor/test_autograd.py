"""The engine: orders of derivatives, what is recorded and for how long, random programs, threads."""

from __future__ import annotations

import copy
import gc
import pickle
import sys
import threading
import weakref
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import event, given, settings
from hypothesis import strategies as st

import tinytensor as tt
from tests.tinytensor.small import close, leaf, line
from tinytensor.autograd import Op, apply

pytestmark = [pytest.mark.filterwarnings("error"), pytest.mark.filterwarnings("ignore:.*torch.jit.script")]

RNG = np.random.default_rng(0)


@pytest.fixture(autouse=True)
def _the_same_numbers_for_every_test() -> None:
    global RNG
    RNG = np.random.default_rng(0)


# -- derivatives of all orders, and as functions


def polynomial(x: Any) -> Any:
    return (x**4 * 0.3 + x.sin() * x.exp() / (1 + x * x)).sum()


def test_derivatives_to_the_fourth_order() -> None:
    values = RNG.uniform(0.3, 2, 5)
    x, y = leaf(values), torch.tensor(values, requires_grad=True)
    ours, theirs = polynomial(x), polynomial(y)
    for _ in range(4):
        (ours,) = tt.grad(ours, x, create_graph=True)
        (theirs,) = torch.autograd.grad(theirs, y, create_graph=True)
        close(ours, theirs, 1e-10)
        ours, theirs = (ours * ours).sum(), (theirs * theirs).sum()


def network(x: Any, w: Any, b: Any) -> Any:
    h = (x @ w + b).tanh()
    return (h * h.exp()).mean()


def network_inputs() -> list[np.ndarray]:
    return [RNG.normal(size=s) for s in [(4, 3), (3, 2), (2,)]]


def test_grad_of_several_outputs_and_inputs() -> None:
    arrays = network_inputs()
    ours, theirs = [leaf(a) for a in arrays], [torch.tensor(a, requires_grad=True) for a in arrays]
    outs, touts = (ours[0] @ ours[1], ours[1] * 2), (theirs[0] @ theirs[1], theirs[1] * 2)
    seeds = [RNG.normal(size=y.shape) for y in outs]
    grads = tt.grad(outs, ours[:2], grad_outputs=[tt.tensor(s) for s in seeds])
    for a, b in zip(grads, torch.autograd.grad(touts, theirs[:2], [torch.tensor(s) for s in seeds]), strict=True):
        close(a, b)
    assert all(x.grad is None for x in ours)


def test_grad_at_a_result() -> None:
    x = leaf([1.0, 2.0])
    h = x * x
    y = (h * h).sum()
    gh, gx = tt.grad(y, [h, x])
    assert gh.tolist() == [2, 8] and gx.tolist() == [4, 32]


def test_grad_of_an_unused_input() -> None:
    x, y = leaf([1.0]), leaf([2.0])
    with pytest.raises(RuntimeError, match="no output depends on input 1; pass allow_unused=True"):
        tt.grad((x * 2).sum(), [x, y])
    assert tt.grad((x * 2).sum(), [x, y], allow_unused=True)[1] is None
    with pytest.raises(RuntimeError, match=r"input 0, of shape \(1,\), does not require gradients"):
        tt.grad((x * 2).sum(), [tt.ones(1)])


def test_grad_leaves_the_rest_of_the_graph_alone() -> None:
    x, y = leaf([1.0, 2.0]), leaf([3.0, 4.0])
    shared = y.exp()
    (g,) = tt.grad((x * 3 + shared).sum(), x)
    assert g.tolist() == [3, 3] and y.grad is None
    shared.sum().backward()  # not freed: it was not on the way to x
    close(y.grad, np.exp([3.0, 4.0]))


def test_gradients_of_grad_are_arrays_of_their_own() -> None:
    a, b, seed = leaf([1.0, 2.0]), leaf([3.0, 4.0]), tt.tensor([1.0, 1.0], "float64")
    for create_graph in (False, True):
        ga, gb = tt.grad(a + b, [a, b], grad_outputs=seed, create_graph=create_graph)
        ga += 1
        assert gb.tolist() == seed.tolist() == [1, 1]
    (g,) = tt.grad(a.sum(), a)
    g *= 5  # a broadcast array, made writable
    assert g.tolist() == [5, 5]


def test_value_and_grad_equals_torch() -> None:
    arrays = network_inputs()
    value, grads = tt.value_and_grad(network, argnums=(0, 2))(*map(tt.tensor, arrays))
    expected, theirs = torch.func.grad_and_value(network, argnums=(0, 2))(*map(torch.tensor, arrays))[::-1]
    close(value, expected)
    for a, b in zip(grads, theirs, strict=True):
        close(a, b)
    _, alone = tt.value_and_grad(network)(*map(tt.tensor, arrays))
    close(alone, theirs[0])
    assert not value.requires_grad


def test_value_and_grad_of_an_unused_argument_is_zero() -> None:
    _, (gx, gy) = tt.value_and_grad(lambda x, y: (x * x).sum(), argnums=(0, 1))(tt.ones(2), tt.ones(3))
    assert gx.tolist() == [2, 2] and gy.tolist() == [0, 0, 0]


def test_value_and_grad_of_a_constant_is_zero() -> None:
    value, g = tt.value_and_grad(lambda x: tt.tensor(3.0))(tt.ones(2))
    assert (value.item(), g.tolist()) == (3, [0, 0])


def test_value_and_grad_passes_keywords_and_needs_one_element() -> None:
    value, g = tt.value_and_grad(lambda x, power: (x**power).sum())(tt.tensor([2.0]), power=3)
    assert (value.item(), g.item()) == (8, 12)
    with pytest.raises(ValueError, match=r"shape \(2,\) needs `gradient`"):
        tt.value_and_grad(lambda x: x * 2)(tt.ones(2))


def test_vjp_and_jvp_equal_torch() -> None:
    arrays = network_inputs()

    def f(x: Any, w: Any, b: Any) -> Any:
        return (x @ w + b).sin() * w.sum()

    value, pullback = tt.vjp(f, *map(tt.tensor, arrays))
    expected, torch_pullback = torch.func.vjp(f, *map(torch.tensor, arrays))
    close(value, expected)
    for _ in range(2):  # a pullback may be used again
        v = RNG.normal(size=value.shape)
        for a, b in zip(pullback(tt.tensor(v)), torch_pullback(torch.tensor(v)), strict=True):
            close(a, b)
    tangents = [RNG.normal(size=a.shape) for a in arrays]
    ours = tt.jvp(f, [tt.tensor(a) for a in arrays], [tt.tensor(t) for t in tangents])
    theirs = torch.func.jvp(f, tuple(map(torch.tensor, arrays)), tuple(map(torch.tensor, tangents)))
    for a, b in zip(ours, theirs, strict=True):
        close(a, b)


def test_vjp_and_jvp_of_constants_are_zero() -> None:
    x = tt.tensor([1.0, 2.0])
    assert tt.jvp(lambda x: tt.ones(3), [x], [x])[1].tolist() == [0, 0, 0]
    assert tt.jvp(lambda x: x.relu().detach() * 1.0, [x], [x])[1].tolist() == [0, 0]
    assert tt.vjp(lambda x: tt.ones(3), x)[1](tt.ones(3))[0].tolist() == [0, 0]
    with pytest.raises(ValueError, match=r"tangent 0 has shape \(3,\), its primal \(2,\)"):
        tt.jvp(lambda x: x, [x], [tt.ones(3)])


def test_hessian_vector_product_equals_torch() -> None:
    values, v = RNG.uniform(0.5, 1, 4), RNG.normal(size=4)
    x = leaf(values)
    (g,) = tt.grad(polynomial(x), x, create_graph=True)
    (hv,) = tt.grad(g, x, grad_outputs=tt.tensor(v))
    close(hv, torch.autograd.functional.hvp(polynomial, torch.tensor(values), torch.tensor(v))[1], 1e-10)
    close(tt.jvp(lambda x: tt.vjp(polynomial, x)[1](1.0)[0], [x], [tt.tensor(v)])[0], g)


def test_create_graph_may_be_differentiated_through_backward() -> None:
    x = leaf([2.0])
    (x**3).sum().backward(create_graph=True)
    g, x.grad = x.grad, None
    g.sum().backward()
    assert x.grad.item() == 12


def test_a_gradient_of_outputs_may_be_an_array() -> None:
    x = tt.tensor([1.0, 2.0, 3.0], requires_grad=True)
    for seed in (np.arange(3.0), tt.arange(3), [np.arange(3.0)], (tt.arange(3),)):
        (g,) = tt.grad(x * x, x, grad_outputs=seed)
        assert g.tolist() == [0, 4, 12]


# -- backward and .grad


def test_gradients_accumulate_over_backward_calls() -> None:
    x, y = leaf([1.0, 2.0]), torch.tensor([1.0, 2.0], dtype=torch.float64, requires_grad=True)
    for k in (1.0, 2.0, 3.0):
        (x * x * k).sum().backward()
        (y * y * k).sum().backward()
        close(x.grad, y.grad)
    x.grad = None
    x.sum().backward()
    assert x.grad.tolist() == [1, 1]


@pytest.mark.parametrize("f", [lambda a: a + a, lambda a: a * a, lambda a: a - a, lambda a: a * 2 + a.exp() * a])
def test_a_tensor_used_twice(f: Callable[..., Any]) -> None:
    values = RNG.normal(size=3)
    x, y = leaf(values), torch.tensor(values, requires_grad=True)
    f(x).sum().backward()
    f(y).sum().backward()
    close(x.grad, y.grad)


@pytest.mark.parametrize("create_graph", [False, True])
def test_gradients_of_leaves_share_no_memory(create_graph: bool) -> None:
    a, b, c, seed = leaf([1.0, 2.0]), leaf([3.0, 4.0]), leaf([[1.0, 1.0]]), tt.ones(2, dtype="float64")
    h = a + b
    h.retain_grad()
    (h + c.reshape(2)).backward(seed, create_graph=create_graph)
    arrays = [a.grad.data, b.grad.data, c.grad.data, h.grad.data, seed.data]
    for i, x in enumerate(arrays):
        for y in arrays[:i]:
            assert not np.shares_memory(x, y)
    (a * 3).sum().backward()
    assert (a.grad.tolist(), b.grad.tolist(), seed.tolist()) == ([4, 4], [1, 1], [1, 1])


def test_backward_of_a_leaf_and_of_a_view() -> None:
    x = leaf([1.0, 2.0])
    seed = tt.tensor([3.0, 4.0], "float64")
    x.backward(seed)
    x.T.backward(seed)
    assert x.grad.tolist() == [6, 8] and seed.tolist() == [3, 4]


def test_retain_graph() -> None:
    x = leaf([3.0])
    y = (x * x).exp().log()
    y.backward(retain_graph=True)
    y.backward(retain_graph=True)
    y.backward()
    assert x.grad.item() == pytest.approx(18)


def test_a_second_backward_is_refused_and_names_op_and_line() -> None:
    x = leaf([3.0])
    born = line() + 1
    y = x.exp()
    loss = y.sum()
    loss.backward()
    with pytest.raises(RuntimeError, match=rf"exp at .*test_autograd\.py:{born}: a second backward .*retain_graph=True"):
        (y * 2).sum().backward()
    assert x.grad.item() == pytest.approx(np.exp(3))


@pytest.mark.parametrize(
    ("call", "error", "message"),
    [
        (lambda x: (x * 2).backward(), ValueError, r"shape \(2,\) needs `gradient` of that shape, or \.sum\(\) first"),
        (lambda x: (x * 2).backward(tt.ones(3)), ValueError, r"gradient of shape \(3,\) does not fit .* \(2,\)"),
        (lambda x: tt.ones(1).backward(), RuntimeError, "no gradient flows to: none of its inputs requires gradients"),
        (lambda x: x.detach().sum().backward(), RuntimeError, "no gradient flows to"),
        (lambda x: tt.tensor([1, 2], requires_grad=True), TypeError, "only floating-point tensors have gradients.* int64"),
        (lambda x: setattr(tt.tensor([True]), "requires_grad", True), TypeError, "only floating-point .* bool"),
        (lambda x: setattr(x * 2, "requires_grad", False), RuntimeError, r"use detach\(\)"),
        (lambda x: setattr(x, "grad", tt.ones(3)), ValueError, r"gradient of shape \(3,\) does not fit shape \(2,\)"),
        (lambda x: setattr(tt.ones(2), "grad", tt.ones(2)), RuntimeError, "does not require gradients has no .grad"),
        (lambda x: tt.ones(2).retain_grad(), RuntimeError, "never have one to retain"),
        (lambda x: tt.ones(2).register_hook(print), RuntimeError, "never call a hook"),
        (lambda x: np.asarray(x), TypeError, r"call detach\(\)\.numpy\(\)"),
    ],
)
def test_errors(call: Callable[..., Any], error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        call(leaf([1.0, 2.0]))


def test_integer_results_end_the_gradient() -> None:
    x = leaf([1.7, 2.2])
    assert not x.astype("int64").requires_grad
    assert not (x > 2).requires_grad
    assert not x.argmax().requires_grad
    assert (x * x.astype("int64")).requires_grad


def test_grad_and_requires_grad_can_be_reset() -> None:
    x = tt.ones(2)
    x.grad = None  # nothing to forget
    x.requires_grad = True
    (x * 2).sum().backward()
    x.grad = tt.tensor([5.0, 5.0])
    x.sum().backward()
    assert x.grad.tolist() == [6, 6]
    x.requires_grad = False
    assert x.grad is None and x.is_leaf and not (x * 2).requires_grad


@pytest.mark.parametrize("shape", [(), (3,), (2, 3)])
def test_views_and_other_uses_add_up(shape: tuple[int, ...]) -> None:
    """Whatever came first: a slice's gradient is added to a whole one, and the other way round."""
    index = (slice(1, None),) * len(shape)
    uses = [lambda x: x * 2, lambda x: x[index], lambda x: x, lambda x: x[...]]
    for ordered in (uses, uses[::-1]):
        x = leaf(RNG.normal(size=shape))
        sum(use(x).sum() for use in ordered).backward()
        expected = np.full(shape, 4.0)
        expected[index] += 1
        close(x.grad, expected)


# -- hooks and retained gradients


def test_a_hook_sees_the_whole_gradient_once() -> None:
    x, seen = leaf([1.0, 2.0]), []
    h = x * 1
    h.register_hook(lambda g: seen.append(g.tolist()))
    x.register_hook(lambda g: seen.append(g.tolist()))
    (h * 2 + h * 3 + h.exp() * 0).sum().backward()
    assert seen == [[5, 5], [5, 5]]


@pytest.mark.parametrize("on_leaf", [True, False])
def test_a_hook_replaces_the_gradient(on_leaf: bool) -> None:
    values = [1.0, 2.0]
    x, y = leaf(values), torch.tensor(values, dtype=torch.float64, requires_grad=True)
    h, k = x * 3, y * 3
    for t in (x, y) if on_leaf else (h, k):
        t.register_hook(lambda g: g * 10)
        t.register_hook(lambda g: g + 1)
    (h * h).sum().backward()
    (k * k).sum().backward()
    close(x.grad, y.grad)


def test_what_a_hook_returns_stays_the_hooks_own() -> None:
    x, constant, kept = leaf([1.0, 2.0]), tt.ones(2, dtype="float64"), []
    remove = x.register_hook(lambda g: constant)
    (x + x * 2).sum().backward()
    (x + x * 2).sum().backward()
    remove()
    assert x.grad.tolist() == [2, 2] and constant.tolist() == [1, 1]
    x.grad = None
    x.register_hook(kept.append)
    (x + x * 2).sum().backward()
    (x + x * 2).sum().backward()
    assert x.grad.tolist() == [6, 6] and [g.tolist() for g in kept] == [[3, 3], [3, 3]]


def test_hooks_are_removed_one_by_one() -> None:
    x, calls = leaf([1.0]), []

    def hook(g: tt.Tensor) -> None:
        calls.append(1)

    removers = [x.register_hook(hook) for _ in range(3)]
    for left in (2, 1, 0):
        removers.pop()()
        x.sum().backward()
        assert len(calls) == left
        calls.clear()
    removers = [x.register_hook(hook)]
    removers[0]()
    removers[0]()  # nothing more to remove
    x.sum().backward()
    assert not calls


def test_a_hook_must_keep_the_shape_and_gives_the_dtype() -> None:
    x = leaf([1.0, 2.0], "float32")
    x.register_hook(lambda g: g.astype("float64") * 2)
    x.sum().backward()
    assert x.grad.dtype == np.float32 and x.grad.tolist() == [2, 2]
    y = leaf([1.0, 2.0])
    y.register_hook(lambda g: g.sum())
    with pytest.raises(ValueError, match=r"hook returned shape \(\) for a gradient of shape \(2,\)"):
        y.sum().backward()


@pytest.mark.parametrize("owner", ["nobody", "optimizer"])
def test_a_hook_may_run_a_backward_pass_of_its_own(owner: str) -> None:
    w = leaf(np.ones((2, 2)))
    if owner == "optimizer":
        tt.optim.SGD([w])
    x = tt.ones(1, 2, dtype="float64")
    h = tt.linear(x, w)

    def hook(g: tt.Tensor) -> None:
        with tt.enable_grad():
            tt.linear(x * 10, w).sum().backward()

    h.register_hook(hook)
    tt.linear(h @ w, w).sum().backward()  # w has part of its gradient when the hook is called
    assert w.grad.tolist() == [[22, 22], [22, 22]]


def test_hooks_under_create_graph_are_differentiated() -> None:
    x = leaf([3.0])
    x.register_hook(lambda g: g * g)
    (g,) = tt.grad((x * x).sum(), x, create_graph=True)  # (2x)²
    assert g.item() == 36
    x.node.hooks = None
    assert tt.grad(g, x)[0].item() == 24


def test_retain_grad_equals_torch() -> None:
    x, y = leaf([1.0, 2.0]), torch.tensor([1.0, 2.0], dtype=torch.float64, requires_grad=True)
    grads = []
    for t in (x, y):
        h = t * 3
        h.retain_grad()
        loss = (h * h).sum()
        for _ in range(2):
            loss.backward(retain_graph=True)
        grads.append(h.grad)
        plain = t * 3
        plain.sum().backward()
        assert plain.grad is None if isinstance(plain, tt.Tensor) else True
    close(*grads)
    assert x.grad.tolist() == y.grad.tolist()


def test_a_retained_gradient_may_be_cleared_and_survives_a_write() -> None:
    x = leaf([1.0, 2.0])
    h = x * 3
    h.retain_grad()
    loss = (h * 2).sum()
    loss.backward(retain_graph=True)
    h.grad = None
    assert h.grad is None
    loss.backward()
    assert h.grad.tolist() == [2, 2]
    k = x * 3
    k.retain_grad()
    k += 1
    (k * 5).sum().backward()
    assert k.grad.tolist() == [5, 5]
    x.retain_grad()  # a leaf keeps its gradient anyway


# -- recording or not


def test_no_grad_as_context_and_decorator() -> None:
    x = leaf([1.0])

    @tt.no_grad()
    def double(x: tt.Tensor, depth: int = 0) -> tt.Tensor:
        return double(x, depth - 1) if depth else x * 2

    with tt.no_grad():
        assert not (x * 2).requires_grad
        with tt.enable_grad():
            assert (x * 2).requires_grad
            with tt.no_grad():
                assert not tt.is_grad_enabled()
            assert tt.is_grad_enabled()
        assert not (x * 2).requires_grad
    assert not double(x, 3).requires_grad
    assert tt.enable_grad()(lambda: (x * 2).requires_grad)()
    assert (x * 2).requires_grad


def test_an_exception_restores_the_mode() -> None:
    with pytest.raises(ZeroDivisionError), tt.no_grad():
        1 / 0  # noqa: B018
    assert tt.is_grad_enabled()
    with tt.no_grad(), pytest.raises(ZeroDivisionError), tt.enable_grad():
        1 / 0  # noqa: B018
    assert tt.is_grad_enabled()


def test_one_context_may_be_entered_again() -> None:
    mode = tt.no_grad()
    with mode:
        with mode:
            pass
        assert not tt.is_grad_enabled()
    assert tt.is_grad_enabled()


def test_recording_is_local_to_a_thread() -> None:
    inside, done, seen = threading.Event(), threading.Event(), []

    def other() -> None:
        inside.wait(10)
        seen.append(tt.is_grad_enabled())
        with tt.no_grad():
            done.set()

    thread = threading.Thread(target=other)
    thread.start()
    with tt.no_grad():
        inside.set()
        done.wait(10)
    thread.join()
    assert seen == [True] and tt.is_grad_enabled()


def test_backward_does_not_record_unless_asked() -> None:
    x, modes = leaf([1.0]), []
    x.register_hook(lambda g: modes.append(tt.is_grad_enabled()))
    (x * x).sum().backward()
    (x * x).sum().backward(create_graph=True)
    with tt.no_grad():
        (leaf([1.0]) * 2).detach()
    assert modes == [False, True] and tt.is_grad_enabled()


# -- how long things live


@pytest.fixture
def no_gc() -> Iterator[None]:
    gc.collect()
    gc.disable()
    yield
    gc.enable()


def make_graph(x: tt.Tensor) -> tuple[tt.Tensor, list[weakref.ref[Any]]]:
    a = x.exp()
    b = a.tanh()
    c = tt.softmax(b @ b.T)
    refs = [weakref.ref(t.data) for t in (a, b, c)]
    return tt.checkpoint(lambda c: (c * c).sum(), c), refs


def fail(g: tt.Tensor) -> None:
    raise KeyError("hook")


@pytest.mark.usefixtures("no_gc")
@pytest.mark.parametrize("end", ["dropped", "backward", "grad", "create_graph", "failed", "hooked"])
def test_a_graph_dies_by_reference_count(end: str) -> None:
    x = leaf(RNG.normal(size=(3, 3)))
    loss, refs = make_graph(x)
    if end == "backward":
        loss.backward()
    elif end == "grad":
        tt.grad(loss, x, retain_graph=True)
    elif end == "create_graph":
        (g,) = tt.grad(loss, x, create_graph=True)
        tt.grad(g.sum(), x, create_graph=True)
        del g
    elif end == "failed":
        remove = x.register_hook(fail)
        with pytest.raises(KeyError):
            loss.backward()
        remove()
    elif end == "hooked":
        loss.register_hook(lambda g: g * 2)
    else:
        assert all(r() is not None for r in refs)
    del loss
    if end == "failed":
        sys.exc_info()
    assert [r() for r in refs] == [None] * len(refs)


@pytest.mark.usefixtures("no_gc")
def test_saved_arrays_are_freed_on_the_way_back() -> None:
    x, alive, refs = leaf([-1.0, 0.2]), [], []

    def chain() -> tt.Tensor:
        h = x * 1
        h.register_hook(lambda g: alive.append([r() is not None for r in refs]))
        for _ in range(3):
            h = h.exp()
            refs.append(weakref.ref(h.data))
        return h.sum()

    loss = chain()
    assert all(r() is not None for r in refs)
    loss.backward(retain_graph=True)
    loss.backward()
    assert alive == [[True] * 3, [False] * 3]


@pytest.mark.usefixtures("no_gc")
def test_an_op_keeps_only_what_its_derivative_needs() -> None:
    x = leaf(RNG.normal(size=4))
    a = x * 2
    refs = [weakref.ref(a.data)]
    b = (a + 1).sum()
    del a
    assert refs[0]() is None
    constant = tt.Tensor(RNG.normal(size=4))
    h = x * 2
    refs = [weakref.ref(h.data)]
    y = h * constant  # only the constant is needed: h alone wants a gradient
    del h
    assert refs[0]() is None
    (y.sum() + b).backward()
    close(x.grad, 2 * constant.data + 2)


def test_a_chain_of_100_000_ops() -> None:
    x = leaf([1.0])
    y = x
    for _ in range(100_000):
        y = y + 1.0
    y.backward()
    assert (y.item(), x.grad.item()) == (100_001, 1)
    del y


def test_a_wide_graph_adds_up() -> None:
    x = leaf([1.0, 2.0])
    total = x * 0
    for k in range(500):
        total = total + x * k
    total.sum().backward()
    assert x.grad.tolist() == [124_750, 124_750]


# -- random programs

PURE: dict[str, Callable[..., Any]] = {
    "add": lambda lib, a, b, c: a + b * c,
    "mul": lambda lib, a, b, c: a * b,
    "div": lambda lib, a, b, c: a / (b * b + 1),
    "tanh": lambda lib, a, b, c: (a * c).tanh(),
    "exp": lambda lib, a, b, c: (a * 0.3).exp(),
    "matmul": lambda lib, a, b, c: (a @ b.T) @ b * 0.1,
    "views": lambda lib, a, b, c: a.reshape(4, 3).T.reshape(4, 3).T,
    "rows": lambda lib, a, b, c: a[[2, 0, 2]],
    "halves": lambda lib, a, b, c: (torch.cat if lib is torch else tt.concat)([a[1:], b[:1]]),
    "where": lambda lib, a, b, c: lib.where(a > b, a, b),
    "maximum": lambda lib, a, b, c: lib.maximum(a, b),
    "softmax": lambda lib, a, b, c: lib.softmax(a, -1),
    "sum": lambda lib, a, b, c: a.sum(0) + b,
    "mean": lambda lib, a, b, c: a.mean(1)[:, None] * b,
    "einsum": lambda lib, a, b, c: lib.einsum("ij,kj,kl->il", a, b, a) * 0.1,
}


def on_a_result(write: Callable[..., Any]) -> Callable[..., Any]:
    def step(lib: Any, a: Any, b: Any, c: float) -> Any:
        a = a * 1.0 if a.is_leaf else a
        return write(a, b, c)

    return step


def set_row(a: Any, b: Any, c: float) -> Any:
    a[1] = b[0]
    return a


def set_where(a: Any, b: Any, c: float) -> Any:
    a[a > c] = b[2, 1]
    return a


WRITES: dict[str, Callable[..., Any]] = {
    "+=": on_a_result(lambda a, b, c: a.__iadd__(b)),
    "*=": on_a_result(lambda a, b, c: a.__imul__(b)),
    "-= number": on_a_result(lambda a, b, c: a.__isub__(c)),
    "row": on_a_result(set_row),
    "mask": on_a_result(set_where),
}


def programs(steps: dict[str, Any]) -> Any:
    place = st.integers(0, 20)
    return st.lists(st.tuples(st.sampled_from(sorted(steps)), place, place, st.floats(-1, 1, width=16)), max_size=10)


def outcome(lib: Any, program: list[Any], steps: dict[str, Any]) -> list[np.ndarray]:
    """Loss and gradients of a program whose steps take any of the results so far."""
    arrays = np.random.default_rng(1).normal(size=(2, 3, 4))
    leaves = [leaf(a) if lib is tt else torch.tensor(a, requires_grad=True) for a in arrays]
    values = list(leaves)
    with np.errstate(over="ignore", invalid="ignore"):
        for name, i, j, c in program:
            values.append(steps[name](lib, values[i % len(values)], values[j % len(values)], c))
        loss = sum((v * v).sum() for v in values[-3:])
        loss.backward()
    grads = [x.grad for x in leaves]
    return [x.detach().numpy() for x in [loss, *(y * 0 if g is None else g for g, y in zip(grads, leaves, strict=True))]]


@settings(max_examples=150)
@given(programs(PURE))
def test_random_programs_equal_torch(program: list[Any]) -> None:
    for a, b in zip(outcome(tt, program, PURE), outcome(torch, program, PURE), strict=True):
        np.testing.assert_allclose(a, b, 1e-8, 1e-8)


@settings(max_examples=300)
@given(programs(PURE | WRITES))
def test_random_programs_with_writes_equal_torch_or_are_refused(program: list[Any]) -> None:
    try:
        ours = outcome(tt, program, PURE | WRITES)
    except RuntimeError as error:
        event("refused")
        assert "in place" in str(error) or "in-place" in str(error)
        return
    try:
        theirs = outcome(torch, program, PURE | WRITES)
    except RuntimeError:
        event("PyTorch saves more")
        return
    for a, b in zip(ours, theirs, strict=True):
        np.testing.assert_allclose(a, b, 1e-8, 1e-8)


# -- threads


def in_threads(work: Callable[[int], Any], count: int) -> list[Any]:
    barrier = threading.Barrier(count)

    def run(i: int) -> Any:
        barrier.wait(10)
        return work(i)

    with ThreadPoolExecutor(count) as pool:
        return list(pool.map(run, range(count)))


@pytest.mark.parametrize("owner", ["nobody", "optimizer"])
def test_threads_differentiate_shared_parameters_at_once(owner: str) -> None:
    """The sum of all their gradients arrives, also where an optimiser keeps the memory for it."""
    w, v = leaf(RNG.normal(size=(64, 64))), leaf(RNG.normal(size=(64, 64)))
    inputs = [tt.tensor(RNG.normal(size=(64, 64)) / 8) for _ in range(4)]

    def loss(x: tt.Tensor) -> tt.Tensor:
        return (tt.linear(tt.linear(x, w).tanh(), v) ** 2).mean() + (w[3:5] * v[3:5]).sum()

    expected = [sum(g) for g in zip(*([h.data for h in tt.grad(loss(x), [w, v])] for x in inputs), strict=True)]
    if owner == "optimizer":
        tt.optim.SGD([w, v])
    for _ in range(25):
        w.grad = v.grad = None
        in_threads(lambda i: loss(inputs[i]).backward(), len(inputs))
        close(w.grad, expected[0], 1e-9)
        close(v.grad, expected[1], 1e-9)


def test_threads_write_and_differentiate_at_once() -> None:
    base = tt.zeros(64, 8)

    def work(i: int) -> float:
        for k in range(100):
            row = tt.Tensor(base.data[i * 8 + k % 8])
            row[...] = float(i)
            x = leaf(np.ones(8), "float32")
            (x * row).sum().backward()
            assert x.grad.tolist() == [i] * 8
        return True

    assert all(in_threads(work, 8))


# -- copies


def test_a_copied_leaf_is_a_leaf_of_its_own() -> None:
    x = leaf([2.0])
    for duplicate in (copy.deepcopy, lambda t: pickle.loads(pickle.dumps(t))):
        y = duplicate(x)
        gx, gy = tt.grad((x * x * y).sum() * y.sum() * x.sum(), [x, y])
        assert (gx.item(), gy.item()) == (48, 32)


def test_a_result_is_not_copied_with_its_graph() -> None:
    for duplicate in (copy.deepcopy, pickle.dumps):
        with pytest.raises(TypeError, match=r"a result of mul is not copied or pickled .* use detach\(\)"):
            duplicate(leaf([2.0]) * 2)
    assert copy.deepcopy((leaf([2.0]) * 2).detach()).tolist() == [4]


# -- ops of one's own


class Scale(Op):
    """y = k·a·b"""

    saves = {"a": "b", "b": "a"}

    def forward(xp: Any, a: Any, b: Any, k: float) -> Any:
        return k * a * b

    def vjp(g: Any, y: Any, a: Any, b: Any, k: float) -> Any:
        return lambda: g * b * k, lambda: g * a * k


def test_an_op_of_ones_own() -> None:
    a, b = leaf([1.0, 2.0]), leaf([[3.0], [4.0]])
    assert tt.testing.gradgradcheck(lambda a, b: apply(Scale, a, b, k=3.0), [a, b])
    y = apply(Scale, a, b, k=3.0)
    y.sum().backward()
    assert a.grad.tolist() == [21, 21] and b.grad.tolist() == [[9], [9]]
    assert "op=scale" in repr(y)


def test_gradients_are_only_made_for_inputs_that_want_them() -> None:
    made = []

    class Traced(Op):
        def forward(xp: Any, a: Any, b: Any) -> Any:
            return a + b

        def vjp(g: Any, y: Any, a: Any, b: Any) -> Any:
            return lambda: made.append("a") or g, lambda: made.append("b") or g

    apply(Traced, leaf([1.0]), tt.ones(1)).backward()
    assert made == ["a"]


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        (lambda g: g.reshape(3, 2), r"vjp of wrong at .*test_autograd.*gradient of shape \(3, 2\) .* input of shape \(2, 3\)"),
        (lambda g: g.sum(), r"vjp of wrong at .*gradient of shape \(\) .* input of shape \(2, 3\)"),
        (lambda g: g.reshape(6), r"vjp of wrong at .*gradient of shape \(6,\)"),
        (lambda g: (g, g), r"vjp of wrong at .*: 2 gradients for 1 inputs"),
    ],
)
def test_a_wrong_vjp_is_refused(wrong: Callable[..., Any], message: str) -> None:
    class Wrong(Op):
        def forward(xp: Any, a: Any) -> Any:
            return a * 1

        def vjp(g: Any, y: Any, a: Any) -> Any:
            return wrong(g)

    x = leaf(np.ones((2, 3)))
    with pytest.raises(ValueError, match=message):
        apply(Wrong, x).sum().backward()


def test_none_means_no_gradient() -> None:
    class First(Op):
        def forward(xp: Any, a: Any, b: Any) -> Any:
            return a * 1

        def vjp(g: Any, y: Any, a: Any, b: Any) -> Any:
            return g, None

    a, b = leaf([1.0]), leaf([1.0])
    apply(First, a, b).backward()
    assert a.grad.item() == 1 and b.grad is None

"""checkpoint: the same bits with less memory, and what it cannot do, refused."""

from __future__ import annotations

import contextlib
import weakref
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import numpy as np
import pytest

import tinytensor as tt
from tests.tinytensor.small import close, leaf

pytestmark = pytest.mark.filterwarnings("error")


@pytest.fixture(name="rng")
def the_same_numbers_for_every_test() -> np.random.Generator:
    return np.random.default_rng(0)


def block(x: Any, w: tt.Tensor, p: float = 0.0) -> tt.Tensor:
    h = tt.gelu(x @ w)
    return tt.dropout(h, p) if p else h


def test_checkpoint_of_checkpoints(rng: np.random.Generator) -> None:
    x, w, v = leaf(rng.normal(size=(4, 3))), leaf(rng.normal(size=(3, 3))), leaf(rng.normal(size=(3, 3)))

    def inner(x: tt.Tensor) -> tt.Tensor:
        return tt.checkpoint(lambda x: block(x, w), x) + tt.checkpoint(lambda x: block(x, v), x) * w.sum()

    plain = tt.grad((block(block(x, w) + block(x, v) * w.sum(), w) ** 2).sum(), [x, w, v])
    loss = (tt.checkpoint(lambda x: block(inner(x), w), x) ** 2).sum()
    for a, g in zip(tt.grad(loss, [x, w, v]), plain, strict=True):
        close(a, g)


def checkpointed(f: Callable[..., tt.Tensor]) -> Callable[..., tt.Tensor]:
    return lambda *inputs: tt.checkpoint(f, *inputs)


@pytest.mark.parametrize("scoped", [True, False])
@pytest.mark.parametrize("around", [checkpointed, lambda f: checkpointed(checkpointed(f))], ids=["once", "nested"])
@pytest.mark.parametrize("create_graph", [False, True])
def test_checkpoint_changes_no_bits(around: Any, scoped: bool, create_graph: bool, rng: np.random.Generator) -> None:
    """Neither of values and gradients, nor of the random numbers that are drawn after f and after backward."""
    values, weights = rng.normal(size=(4, 3)), rng.normal(size=(3, 3))

    def run(around: Callable[[Any], Any]) -> list[Any]:
        x, w = leaf(values, "float32"), leaf(weights, "float32")

        def f(x: tt.Tensor) -> tt.Tensor:
            h = block(tt.dropout(x, 0.3), w, 0.5)
            with tt.random.scope(9):
                return block(h, w, 0.2) + tt.dropout(h, 0.4)

        tt.manual_seed(5)
        with tt.random.scope(7, 8, 9) if scoped else contextlib.nullcontext():
            h = around(f)(tt.dropout(x, 0.1))
            loss = (around(f)(tt.dropout(h, 0.1) * w.sum()) ** 2).sum()
            seen = [h, loss, tt.rand(3)]
            first = tt.grad(loss, [x, w], create_graph=create_graph)
            seen += [*first, tt.rand(3)]
        return [t.detach().numpy().tobytes() for t in [*seen, tt.rand(3)]]

    assert run(around) == run(lambda f: f)


def test_checkpoint_repeats_its_dropout_while_others_draw() -> None:
    x = tt.ones(1000, requires_grad=True)
    with ThreadPoolExecutor(1) as other:

        def f(x: tt.Tensor) -> tt.Tensor:
            h = tt.dropout(x, 0.5) + 1
            other.submit(tt.rand, 1).result()
            return tt.dropout(h, 0.3)

        y = tt.checkpoint(f, x)
        tt.manual_seed(3)
        y.sum().backward()
    kept = y.data > 2
    np.testing.assert_array_equal(x.grad.data > 0, kept)  # x counts where both masks kept it
    assert 200 < kept.sum() < 500


def test_checkpoint_refuses_another_dropout_than_that_of_forward() -> None:
    x, dropout = leaf(np.ones(5)), tt.nn.Dropout(0.5)
    y = tt.checkpoint(lambda x: dropout(x) * 2, x)
    dropout.eval()
    with pytest.raises(RuntimeError, match=r"checkpoint at .*: f drew 1 random arrays in forward, and not the same ones \(0\)"):
        y.sum().backward()
    z = tt.checkpoint(lambda x: dropout(x) * 2, x)
    dropout.train()
    with pytest.raises(RuntimeError, match=r"f drew 0 random arrays in forward, .* \(1\) .* call train\(\) or eval\(\) after"):
        z.sum().backward()
    streams = iter("ab")
    w = tt.checkpoint(lambda x: x * tt.random.next_key(next(streams)).call, x)
    with pytest.raises(RuntimeError, match=r"f drew 1 random arrays in forward, and not the same ones \(1\)"):
        w.sum().backward()
    assert x.grad is None


def test_checkpoint_is_differentiated_twice(rng: np.random.Generator) -> None:
    x, w = leaf(rng.normal(size=(2, 3))), leaf(rng.normal(size=(3, 3)))

    def second(around: Callable[[Any], Any]) -> tuple[Any, ...]:
        with tt.random.scope(5):
            y = around(lambda x: block(x, w, 0.3))(x)
            g = tt.grad((y**3).sum(), [x, w], create_graph=True)
            return tt.grad(sum((h * h).sum() for h in g), [x, w])

    plain = second(lambda f: f)
    for around in (checkpointed, lambda f: checkpointed(checkpointed(f))):
        for a, b in zip(second(around), plain, strict=True):
            close(a, b, 1e-10)


def test_checkpoint_reaches_results_that_it_closes_over() -> None:
    w, x = leaf([1.0, 2.0, 3.0]), leaf([1.0, 1.0, 1.0])
    w2 = w * w
    loss = tt.checkpoint(lambda x: (x * w2).sum(), x) + w.sum()
    assert tt.grad(loss, w)[0].tolist() == [3, 5, 7]


def test_checkpoint_calls_f_twice_and_keeps_nothing_between(rng: np.random.Generator) -> None:
    x, refs = leaf(rng.normal(size=5)), []

    def f(x: tt.Tensor) -> tt.Tensor:
        h = x.exp()
        refs.append(weakref.ref(h.data))
        return h * h

    y = tt.checkpoint(f, x)
    assert len(refs) == 1 and refs[0]() is None
    y.sum().backward()
    assert len(refs) == 2
    close(x.grad, 2 * np.exp(2 * x.data))


def test_checkpoint_under_no_grad_and_on_constants() -> None:
    x = leaf([1.0])
    with tt.no_grad():
        assert not tt.checkpoint(lambda x: x * 2, x).requires_grad
    y = tt.checkpoint(lambda x: x * 2, tt.ones(1)) * x
    y.sum().backward()
    assert x.grad.item() == 2


def test_checkpoint_errors() -> None:
    x = leaf([1.0])
    with pytest.raises(TypeError, match="f must return one tensor, it returned tuple"):
        tt.checkpoint(lambda x: (x, x), x)
    y = tt.checkpoint(lambda x: x * x, x)
    y.sum().backward(retain_graph=True)
    y.sum().backward()
    assert x.grad.item() == 4
    with pytest.raises(RuntimeError, match=r"checkpoint at .*: a second backward"):
        y.sum().backward()


@pytest.mark.parametrize("through", ["leaf", "result", "array", "tuple", "closure"])
def test_what_checkpoint_reads_again_must_not_have_been_written(through: str) -> None:
    """As without it: the recomputed part would mix the old values with the new."""
    x, w = tt.ones(3, requires_grad=True), tt.ones(3)
    h = x * 1
    made = {
        "result": lambda: tt.checkpoint(lambda h: (h * h).sum(), h),
        "leaf": lambda: tt.checkpoint(lambda x, w: (x * w).sum(), x, w),
        "array": lambda: tt.checkpoint(lambda x, w: (x * w).sum(), x, w.data),
        "tuple": lambda: tt.checkpoint(lambda x, w: (x * w[0]).sum(), x, (w,)),
        "closure": lambda: tt.checkpoint(lambda x: (x * w).sum(), x),
    }[through]()
    with tt.no_grad():
        w *= 5
        h *= 5
    with pytest.raises(RuntimeError, match=r"checkpoint at .*test_recompute.* saved an array of shape \(3,\) .* wrote into it"):
        made.backward()


def test_what_is_written_within_checkpoint_or_after_another_may_be_read_again() -> None:
    w = tt.ones(3)
    w += 1  # older than the graph

    def f(x: tt.Tensor) -> tt.Tensor:
        own = tt.zeros(3)
        own += 2
        return (x * w * own).sum()

    x = tt.ones(3, requires_grad=True)
    tt.checkpoint(f, x).backward()
    assert x.grad.tolist() == [4, 4, 4]


def test_memory_that_was_written_is_another_arrays_once_it_is_free() -> None:
    x, held = tt.ones(3, requires_grad=True), [tt.zeros(3)]

    def f(x: tt.Tensor) -> tt.Tensor:
        if begun:
            held.clear()
        return (x * tt.zeros(3)).sum()

    begun = False
    y, begun = tt.checkpoint(f, x), True
    held[0] += 1
    y.backward()
    assert x.grad.tolist() == [0, 0, 0]


def test_a_function_that_writes_into_its_input_is_refused() -> None:
    x = tt.ones(2, requires_grad=True)

    def f(h: tt.Tensor) -> tt.Tensor:
        h += 1
        return (h * h).sum()

    with pytest.raises(RuntimeError, match="checkpoint: f wrote into an input in place"):
        tt.checkpoint(f, x * 1)
    with tt.no_grad():  # nothing will be done again
        assert tt.checkpoint(f, x * 1).item() == 8


def test_what_is_read_without_a_gradient_may_have_been_written() -> None:
    """As counters and running means are: what no_grad reads is not differentiated."""
    x, mean = tt.ones(2, requires_grad=True), tt.zeros(2)

    def f(x: tt.Tensor) -> tt.Tensor:
        with tt.no_grad():
            shift = mean * 0
        return (x * x + shift).sum()

    y = tt.checkpoint(f, x)
    mean += 1
    y.backward()
    assert x.grad.tolist() == [2, 2]


@pytest.mark.parametrize("nested", [False, True])
@pytest.mark.parametrize("read", ["weight", "index", "ids", "targets"])
def test_checkpoint_watches_over_all_that_it_reads(read: str, nested: bool) -> None:
    x, w, ids = tt.ones(3, 3, requires_grad=True), leaf([2.0, 2.0, 2.0]), tt.tensor([0, 1, 1])
    f = {
        "weight": lambda x: (x * w).sum(),
        "index": lambda x: x[ids].sum(),
        "ids": lambda x: tt.embedding(x, ids).sum(),
        "targets": lambda x: tt.cross_entropy(x, ids),
    }[read]
    y = tt.checkpoint((lambda x: tt.checkpoint(f, x) * 1) if nested else f, x)
    with tt.no_grad():
        (w if read == "weight" else ids).__imul__(2 if read == "weight" else 0)
    with pytest.raises(RuntimeError, match=r"checkpoint at .* saved an array of shape \(3,\) .* wrote into it in place"):
        y.backward()


@pytest.mark.parametrize("who", ["f", "user"])
def test_a_write_is_noticed_also_where_f_writes_there_again_before_it_reads(who: str) -> None:
    x, w = leaf([1.0, 2.0]), tt.ones(2)

    def f(x: tt.Tensor) -> tt.Tensor:
        with tt.no_grad():
            w.__iadd__(1 if who == "f" else 0)
        return x * w

    y = tt.checkpoint(f, x)
    if who == "user":
        w *= 5
    with pytest.raises(RuntimeError, match=r"checkpoint at .*test_recompute.* saved an array of shape \(2,\) .* wrote into it"):
        y.sum().backward()
    assert x.grad is None


@pytest.mark.parametrize("how", ["add", "mul", "set", "return"])
def test_checkpoint_finds_what_f_only_writes_from(how: str) -> None:
    w = leaf([3.0, 4.0])

    def f(x: tt.Tensor) -> tt.Tensor:
        y = x * 1
        if how == "add":
            y += w
        elif how == "mul":
            y *= w
        elif how == "set":
            y[:] = w
        return w if how == "return" else y

    f(tt.tensor([1.0, 2.0])).sum().backward()
    expected, w.grad = w.grad.tolist(), None
    tt.checkpoint(f, tt.tensor([1.0, 2.0])).sum().backward()
    assert w.grad.tolist() == expected


def test_checkpoint_keeps_what_it_read_when_a_tensor_is_given_other_data() -> None:
    x = tt.tensor([1.0, 2.0], requires_grad=True)
    h = x * 1
    y = tt.checkpoint(lambda h: (h * h).sum(), h)
    h.data = np.array([9, 9], np.float32)
    y.backward()
    assert x.grad.tolist() == [2, 4]


def test_what_f_did_not_make_is_returned_as_a_view() -> None:
    x, w = leaf([1.0]), leaf([3.0])
    for f in (lambda x: x, lambda x: w):
        with pytest.raises(RuntimeError, match="in-place write"):
            tt.checkpoint(f, x).__iadd__(1)
    assert (x.item(), w.item()) == (1, 3)


def test_checkpoint_of_what_wants_no_gradients_wants_none() -> None:
    linear, w = tt.nn.Linear(2, 2).requires_grad_(False), leaf([1.0, 2.0])
    x = tt.ones(1, 2)
    for f in (linear, lambda x: linear(x) * 2, lambda x: linear(x) + w.detach(), lambda x: tt.checkpoint(linear, x)):
        assert not tt.checkpoint(f, x).requires_grad
        assert tt.checkpoint(f, tt.ones(1, 2, requires_grad=True)).requires_grad


class Keeper(tt.nn.Module):
    """A module that reads more than its parameters: a result, layers in a plain list, and a frozen parameter of its own."""

    def __init__(self, of: str) -> None:
        self.frozen = tt.nn.Parameter([2.0, 3.0], requires_grad=False)
        self.w = tt.ones(2, requires_grad=True)
        self.result = self.w * 2 if of == "result" else 0
        self.layers = [tt.nn.Linear(2, 2)] if of == "list" else []
        self.inner = Keeper("result") if of == "checkpoint" else None

    def forward(self, x: tt.Tensor) -> tt.Tensor:
        x = x * self.frozen + self.result
        for layer in self.layers:
            x = layer(x)
        return x if self.inner is None else tt.checkpoint(self.inner, x)

    def read(self) -> list[tt.Tensor]:
        return [self.w, *(p for layer in self.layers for p in layer.parameters()), *(self.inner.read() if self.inner else ())]


@pytest.mark.parametrize("of", ["result", "list", "checkpoint"])
def test_checkpoint_sends_gradients_to_whatever_a_module_reads(of: str) -> None:
    plain, checkpointed = Keeper(of), Keeper(of)
    for a, b in zip(plain.layers, checkpointed.layers, strict=True):
        b.load_state_dict(a.state_dict())
    plain(tt.ones(1, 2)).sum().backward()
    tt.checkpoint(checkpointed, tt.ones(1, 2)).sum().backward()
    wanted = [None if p.grad is None else p.grad.tolist() for p in plain.read()]
    assert [None if p.grad is None else p.grad.tolist() for p in checkpointed.read()] == wanted
    assert any(wanted)


def test_checkpoint_lets_go_of_its_function_after_backward() -> None:
    class Held:
        pass

    held = Held()
    seen = weakref.ref(held)
    y = tt.checkpoint(lambda x, held=held: (x * x).sum(), tt.ones(2, requires_grad=True))
    del held
    assert seen() is not None
    y.backward()
    assert seen() is None


def test_hooks_of_what_was_not_asked_for_stay_silent_also_through_checkpoint() -> None:
    module, x = tt.nn.Linear(2, 2), tt.ones(1, 2, requires_grad=True)
    module.weight.register_hook(lambda g: pytest.fail("not asked for"))
    for y in (module(x), tt.checkpoint(module, x)):
        assert tt.grad(y.sum(), x)[0].shape == (1, 2)

"""Memory shared with others: DLPack both ways, np.asarray, and whatever has the buffer protocol."""

from __future__ import annotations

import array
import ctypes
import importlib.util
import mmap
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch

import tinytensor as tt
from tests.cuda.conftest import cuda  # noqa: F401  (the fixture)
from tinytensor import nn
from tinytensor.optim import clip_grad_norm_

# -- DLPack

SHARED = {
    "matrix": lambda: np.arange(6.0).reshape(2, 3),
    "columns": lambda: np.asfortranarray(np.arange(6, dtype=np.float32).reshape(2, 3)),
    "every other": lambda: np.arange(10, dtype=np.int64)[1::2],
    "number": lambda: np.array(3, np.int32),
    "flags": lambda: np.array([True, False]),
    "halves": lambda: np.ones((2, 1, 2), np.float16),
    "nothing": lambda: np.zeros((0, 3), np.float32),
}
EXPORTERS: dict[str, Callable[[np.ndarray], Any]] = {"torch": torch.from_numpy, "numpy": lambda a: a, "tinytensor": tt.Tensor}


@pytest.mark.parametrize("layout", SHARED)
@pytest.mark.parametrize("library", EXPORTERS)
def test_what_one_side_writes_the_other_reads(library: str, layout: str) -> None:
    memory = SHARED[layout]()
    x = tt.from_dlpack(EXPORTERS[library](memory))
    assert type(x) is tt.Tensor and type(x.data) is np.ndarray and not x.requires_grad
    assert (x.shape, x.dtype, x.data.strides) == (memory.shape, memory.dtype, memory.strides)
    for back in (torch.from_dlpack(x).numpy(), np.from_dlpack(x)):
        memory[...] = 0
        assert not back.any() and not x.data.any()
        x[...] = 1
        assert memory.all() and back.all()


def test_torch_takes_a_tensor_as_its_own() -> None:
    x = tt.zeros(3)
    for theirs in (torch.from_dlpack(x), torch.as_tensor(x), torch.asarray(x)):
        theirs += 1
        assert theirs.dtype == torch.float32
    assert x.tolist() == [3, 3, 3]


def test_memory_outlives_the_tensor_that_shared_it() -> None:
    theirs = torch.from_dlpack(tt.full(1000, 7.0))
    assert (theirs == 7).all()
    ours = tt.from_dlpack(torch.full((1000,), 7.0))
    assert (ours.data == 7).all()


def test_jax_shares_memory_that_may_only_be_read() -> None:
    jax = pytest.importorskip("jax", reason="JAX is no dependency")
    theirs = jax.numpy.arange(3.0)
    x = tt.from_dlpack(theirs)
    assert x.data.ctypes.data == theirs.unsafe_buffer_pointer() and x.tolist() == [0, 1, 2]
    assert (x * 2).tolist() == [0, 2, 4]
    with pytest.raises(ValueError, match="may only be read"):
        x += 1


def test_jax_reads_the_memory_of_a_tensor() -> None:
    jax = pytest.importorskip("jax", reason="JAX is no dependency")
    buffer = np.zeros(4096 + 64, np.uint8)
    aligned = buffer[-buffer.ctypes.data % 64 :][:4096].view(np.float32)  # JAX copies memory that is not
    x = tt.as_tensor(aligned)
    theirs = jax.dlpack.from_dlpack(x, copy=False)
    x[0] = 5
    assert theirs[0] == 5 and theirs.unsafe_buffer_pointer() == aligned.ctypes.data


class OnDevice:
    """An array of a library, as DLPack sees it: its device, then a capsule."""

    def __init__(self, kind: int, memory: Any = None) -> None:
        self._kind, self._memory = kind, memory

    def __dlpack_device__(self) -> tuple[int, int]:
        return self._kind, 0

    def __dlpack__(self, **options: Any) -> Any:
        return self._memory.__dlpack__(**options)


@pytest.mark.usefixtures("cuda")
def test_cuda_arrays_go_through_cupy(monkeypatch: pytest.MonkeyPatch) -> None:
    x = tt.zeros(3, device="cuda")
    for theirs in (x, x.data, OnDevice(13, x)):
        y = tt.from_dlpack(theirs)
        assert y.device == "cuda" and y.__dlpack_device__() == (2, 0)
        y.data += 1
    assert x.tolist() == [3, 3, 3]
    monkeypatch.setattr(type(x.data), "__dlpack__", lambda _, **options: options)
    options = {"stream": 7, "max_version": (1, 0), "dl_device": (1, 0), "copy": True}
    assert x.__dlpack__(**options) == options


@pytest.mark.parametrize("make", [lambda: tt.ones(2, requires_grad=True), lambda: tt.ones(2, requires_grad=True).exp()])
def test_a_tensor_with_gradients_does_not_leave_by_dlpack(make: Callable[[], tt.Tensor]) -> None:
    x = make()
    for export in (torch.from_dlpack, np.from_dlpack, tt.from_dlpack, lambda x: x.__dlpack__()):
        with pytest.raises(BufferError, match=r"does not leave by DLPack, past autograd; use detach\(\)"):
            export(x)
    assert torch.from_dlpack(x.detach()).data_ptr() == x.data.ctypes.data
    with pytest.raises(BufferError, match="require gradient"):
        tt.from_dlpack(torch.ones(2, requires_grad=True))


@pytest.mark.parametrize(
    ("call", "error", "message"),
    [
        (lambda: tt.from_dlpack([1.0]), TypeError, r"__dlpack_device__, which list has not; use tensor\(\)"),
        (lambda: tt.from_dlpack(torch.ones(2).bfloat16()), TypeError, "no Tensor of dtype torch.bfloat16 .*one of float16"),
        (lambda: tt.from_dlpack(torch.ones(2) * 1j), TypeError, "dtype complex64 .*; convert it to one of float16, float32"),
        (lambda: tt.from_dlpack(torch.ones(2).to(torch.uint64)), TypeError, "dtype uint64 .*; convert it to one of float16"),
        (lambda: tt.from_dlpack(OnDevice(8)), ValueError, "this OnDevice lives on a device of DLPack's type 8; move it"),
        (lambda: torch.from_dlpack(tt.arange(3).flip(0)), BufferError, r"shape \(3,\) with negative strides .*; use clone\(\)"),
        (lambda: tt.as_tensor(np.ones(2)).__dlpack__(dl_device=(2, 0)), BufferError, "device"),
    ],
)
def test_what_dlpack_refuses(call: Callable[[], Any], error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        call()


def test_bfloat16_does_not_leave_by_dlpack() -> None:
    pytest.importorskip("ml_dtypes")
    x = tt.ones(2).to("bfloat16")
    with pytest.raises(BufferError, match=r"bfloat16 does not travel by DLPack; use astype\('float32'\)"):
        torch.from_dlpack(x)
    assert torch.from_dlpack(x.astype("float32")).tolist() == [1, 1]


@pytest.mark.skipif(importlib.util.find_spec("cupy") is not None, reason="there may be a GPU")
def test_without_a_gpu_a_cuda_array_is_refused() -> None:
    with pytest.raises(RuntimeError, match='device "cuda"'):
        tt.from_dlpack(OnDevice(2))


# -- memory that may only be read


def constant() -> tt.Tensor:
    return tt.as_tensor(np.broadcast_to(np.float32(1), (2, 2)))


@pytest.mark.parametrize(
    "write",
    [
        lambda x: x.__setitem__(0, 5.0),
        lambda x: x.__iadd__(1),
        lambda x: x.__imul__(tt.ones(2, 2, requires_grad=True)),
        lambda x: nn.init.zeros_(x),
        lambda x: nn.init.normal_(x),
    ],
)
def test_writing_into_read_only_memory_names_the_line(write: Callable[[tt.Tensor], Any]) -> None:
    x = constant()
    with pytest.raises(ValueError, match=r"write at .*test_sharing.py:\d+ to an array of shape \(2, 2\) in memory"):
        write(x)
    write(x.clone())
    assert x.tolist() == [[1, 1], [1, 1]] and not x.requires_grad


def test_parameters_and_gradients_in_read_only_memory() -> None:
    layer = nn.Linear(2, 2)
    state, bias = layer.state_dict(), layer.bias.tolist()
    layer.weight = nn.Parameter(constant())
    with pytest.raises(ValueError, match="weight lies in memory that may only be read"):
        layer.load_state_dict({**state, "bias": state["bias"] + 1})
    assert layer.bias.tolist() == bias
    optimizer = tt.optim.SGD([layer.weight], lr=1.0)  # which lays it out in memory of its own
    layer.weight.grad = constant()
    clip_grad_norm_([layer.weight], 1.0)
    (layer.weight * 2).sum().backward()
    optimizer.step()
    np.testing.assert_allclose(layer.weight.data, 1 - 2.5, 1e-5)


# -- np.asarray


def test_asarray_shares_where_numpy_lets_it() -> None:
    x = tt.tensor([[1.0, 2.0]])
    assert all(np.asarray(x, copy=copy) is x.data for copy in (None, False))
    assert np.asarray(x.T).base is x.data and np.asarray(x, np.float32) is x.data
    copies = [np.array(x), np.asarray(x, copy=True), np.asarray(x, dtype="float64"), np.array(x, "int8", copy=None)]
    assert [c.dtype.name for c in copies] == ["float32", "float32", "float64", "int8"]
    assert not any(np.shares_memory(c, x.data) for c in copies)
    with pytest.raises(ValueError, match="Unable to avoid copy"):
        np.asarray(x, dtype="float64", copy=False)


def test_asarray_of_a_tensor_with_gradients() -> None:
    x = tt.ones(2, requires_grad=True)
    for y in (x, x.exp()):
        with pytest.raises(TypeError, match=r"call detach\(\).numpy\(\)"):
            np.asarray(y)
        with tt.no_grad():
            assert np.asarray(y, copy=False) is y.data


def test_asarray_of_a_tensor_elsewhere_is_a_copy(monkeypatch: pytest.MonkeyPatch) -> None:
    fetched = np.ones(2, np.float32)
    x = tt.ones(2)
    monkeypatch.setattr(tt.backend, "device_of", lambda array: "cuda")
    monkeypatch.setattr(tt.backend, "to_device", lambda array, device: fetched)
    assert np.asarray(x) is fetched and np.array(x, copy=True) is fetched
    assert np.asarray(x, "float64").tolist() == [1, 1]
    with pytest.raises(ValueError, match="a tensor on cuda becomes a NumPy array by a copy only; leave out copy=False"):
        np.asarray(x, copy=False)


# -- buffers


def mapped() -> mmap.mmap:
    memory = mmap.mmap(-1, 4)
    memory[:] = b"abcd"
    return memory


BUFFERS: dict[str, tuple[Callable[[], Any], str, Any]] = {
    "bytes": (lambda: b"abc", "uint8", [97, 98, 99]),
    "no bytes": (lambda: b"", "uint8", []),
    "bytearray": (lambda: bytearray(b"abc"), "uint8", [97, 98, 99]),
    "memoryview": (lambda: memoryview(bytearray(b"abcd")), "uint8", [97, 98, 99, 100]),
    "read-only memoryview": (lambda: memoryview(b"abcd"), "uint8", [97, 98, 99, 100]),
    "every other byte": (lambda: memoryview(bytearray(b"abcd"))[::2], "uint8", [97, 99]),
    "backwards": (lambda: memoryview(bytearray(b"abcd"))[::-1], "uint8", [100, 99, 98, 97]),
    "cast memoryview": (lambda: memoryview(bytearray(32)).cast("d", [2, 2]), "float64", [[0, 0], [0, 0]]),
    "array of doubles": (lambda: array.array("d", [0.1, 2]), "float64", [0.1, 2]),
    "array of floats": (lambda: array.array("f", [1.5]), "float32", [1.5]),
    "array of shorts": (lambda: array.array("h", [-1, 2]), "int16", [-1, 2]),
    "ctypes array": (lambda: (ctypes.c_double * 3)(1, 2, 3), "float64", [1, 2, 3]),
    "ctypes matrix": (lambda: ((ctypes.c_int * 2) * 2)((1, 2), (3, 4)), "int32", [[1, 2], [3, 4]]),
    "ctypes number": (lambda: ctypes.c_float(2.5), "float32", 2.5),
    "mmap": (mapped, "uint8", [97, 98, 99, 100]),
}


@pytest.mark.parametrize("kind", BUFFERS)
def test_tensor_copies_a_buffer_and_as_tensor_shares_it(kind: str) -> None:
    make, dtype, values = BUFFERS[kind]
    buffer = make()
    copied, shared = tt.tensor(buffer), tt.as_tensor(buffer)
    assert copied.dtype == shared.dtype == dtype and copied.tolist() == shared.tolist() == values
    copied[...] = 1
    assert shared.tolist() == values
    if memoryview(buffer).readonly:
        with pytest.raises(ValueError, match="may only be read"):
            shared[...] = 1
    else:
        shared[...] = 1
        assert tt.tensor(buffer).tolist() == copied.tolist()
    assert tt.tensor(make(), "float64").dtype == np.float64


@pytest.mark.parametrize(
    ("make", "error", "message"),
    [
        (lambda: memoryview(b"abc").cast("c"), TypeError, r"dtype \|S1 from memoryview; use numbers"),
        (lambda: (ctypes.c_char * 3)(), TypeError, "from c_char_Array_3; use numbers"),
        (lambda: (ctypes.py_object * 2)(), TypeError, "dtype object from py_object_Array_2; use numbers"),
        (lambda: (ctypes.c_void_p * 2)(), ValueError, "cannot make an array of this c_void_p_Array_2: '<P' is not a valid"),
        (lambda: array.array("Q", [1]), TypeError, "dtype uint64 from array; convert it to one of float16, float32"),
        (lambda: (ctypes.c_double.__ctype_be__ * 2)(), TypeError, "dtype >f8 from .*; convert it to one of float16, float32"),
        (lambda: np.ones(2, ">f4"), TypeError, "dtype >f4 from ndarray; convert it to one of"),
    ],
)
def test_buffers_of_what_is_no_number(make: Callable[[], Any], error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        tt.as_tensor(make())


def test_a_buffer_that_is_gone() -> None:
    memory, view = mapped(), memoryview(b"abc")
    memory.close()
    view.release()
    for gone in (memory, view):
        with pytest.raises(ValueError, match="cannot make an array of this"):
            tt.tensor(gone)


def test_a_mapped_file_cannot_be_closed_under_a_tensor() -> None:
    memory = mapped()
    shared = tt.as_tensor(memory)
    with pytest.raises(BufferError):
        memory.close()
    del shared
    memory.close()


class WithInterface:
    def __init__(self) -> None:
        self.memory = np.ones(3)
        self.__array_interface__ = self.memory.__array_interface__


class WithArray:
    def __init__(self) -> None:
        self.memory = np.ones(3)

    def __array__(self, dtype: Any = None, copy: bool | None = None) -> np.ndarray:
        return np.array(self.memory, dtype, copy=copy)


@pytest.mark.parametrize("kind", [WithInterface, WithArray])
def test_objects_that_describe_an_array_keep_dtype_and_memory(kind: Any) -> None:
    source = kind()
    copied, shared = tt.tensor(source), tt.as_tensor(source)
    source.memory[0] = 5
    assert copied.dtype == shared.dtype == np.float64
    assert copied.tolist() == [1, 1, 1] and shared.tolist() == [5, 1, 1]


def test_an_array_of_a_subclass_becomes_a_plain_one_in_the_same_memory() -> None:
    masked = np.ma.array([[1.0, 2.0]], mask=[[False, True]])
    x = tt.as_tensor(masked)
    assert type(x.data) is np.ndarray and np.shares_memory(x.data, masked.data) and x.sum().item() == 3


def twice(kind: str) -> tuple[tt.Tensor, tt.Tensor]:
    """Two tensors on one memory, which got there by different ways."""
    if kind == "torch":
        t = torch.ones(3)
        return tt.from_dlpack(t), tt.from_dlpack(t)
    if kind == "there and back":
        t = tt.ones(3)
        return t, tt.from_dlpack(torch.from_dlpack(t))
    if kind == "array":
        a = np.ones(3, np.float32)
        return tt.as_tensor(a), tt.from_dlpack(a)
    if kind == "buffer":
        b = array.array("f", [1, 1, 1])
        return tt.as_tensor(b), tt.as_tensor(b)
    t = tt.ones(3)
    return t, tt.as_tensor(memoryview(t.numpy()))


@pytest.mark.parametrize("kind", ["torch", "there and back", "array", "buffer", "memoryview"])
@pytest.mark.parametrize("swapped", [False, True])
@pytest.mark.parametrize("gone", [False, True])
def test_a_write_is_found_by_whichever_way_it_came(kind: str, swapped: bool, gone: bool) -> None:
    a, b = twice(kind)[:: -1 if swapped else 1]
    w = tt.ones(3, requires_grad=True)
    y = (w * a).sum()
    other = tt.ones(3)
    other += 1  # elsewhere
    y.backward(retain_graph=True)
    b *= 7
    assert a.tolist() == [7, 7, 7]
    if gone:
        del b
    with pytest.raises(RuntimeError, match=r"mul at .* saved an array of shape \(3,\) .* wrote into it in place"):
        y.backward()


def test_memory_that_others_wrote_before_it_was_ours_may_be_read() -> None:
    """What was written through an array that is gone may since have become another's memory."""
    x = tt.ones(3, requires_grad=True)
    for _ in range(200):
        y = tt.checkpoint(lambda x: (x * 2 * 3).sum(), x)
        t = tt.from_dlpack(np.ones(3, np.float32))
        t += 1
        del t
        y.backward()
    assert x.grad.tolist() == [1200] * 3


@pytest.mark.parametrize("make", [lambda: tt.as_tensor(bytes(8)), lambda: tt.ones(1).broadcast_to((3,))])
def test_what_may_only_be_read_does_not_leave_by_dlpack(make: Callable[[], tt.Tensor]) -> None:
    with pytest.raises(BufferError, match=r"that may only be read does not travel by DLPack; use clone\(\)"):
        torch.from_dlpack(make())
    assert torch.from_dlpack(make().clone()).shape == make().shape


def test_arrays_of_no_dtype_of_ours_are_refused_by_from_dlpack() -> None:
    for dtype in (">f4", "M8[s]", "O"):
        with pytest.raises(TypeError, match="from_dlpack: numpy takes no ndarray of dtype"):
            tt.from_dlpack(np.zeros(2, dtype))

"""Module: a tree of parameters with a forward."""

from __future__ import annotations

import weakref
from collections.abc import Iterable, Iterator, Mapping
from typing import Any, Self

import numpy as np

from tinytensor import autograd, backend, notebook, writes
from tinytensor.state import thread
from tinytensor.tensor import Tensor


class Parameter(Tensor):
    """A tensor that a module owns and an optimiser updates: a leaf that requires gradients."""

    __slots__ = ()

    def __init__(self, data: Any, requires_grad: bool = True) -> None:
        array = data.data if isinstance(data, Tensor) else backend.as_array(data)
        super().__init__(array)
        self.requires_grad = requires_grad


class Module:
    """A part of a network. Parameters and modules assigned to its attributes are found by name, in order of assignment.

    A parameter that appears twice (tied weights) is one parameter, named by its first place.
    """

    training: bool = True

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        raise NotImplementedError(f"{type(self).__name__} defines no forward()")

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        outer = thread.call
        thread.call = weakref.ref(self), outer  # which nodes keep, to say whose they are
        try:
            return self.forward(*args, **kwargs)
        finally:
            thread.call = outer

    def children(self) -> Iterator[Module]:
        """Direct submodules."""
        return (module for _, module in self.named_children())

    def named_children(self) -> Iterator[tuple[str, Module]]:
        """(name, module) for direct submodules."""
        return ((name, value) for name, value in vars(self).items() if isinstance(value, Module))

    def modules(self) -> Iterator[Module]:
        """This module and all below it, each once."""
        return (module for _, module in self.named_modules())

    def named_modules(self) -> Iterator[tuple[str, Module]]:
        """(dotted name, module) for this module and all below it, each once."""
        seen: set[int] = set()

        def walk(module: Module, path: str) -> Iterator[tuple[str, Module]]:
            if id(module) not in seen:
                seen.add(id(module))
                yield path, module
                for name, child in module.named_children():
                    yield from walk(child, f"{path}.{name}" if path else name)

        return walk(self, "")

    def named_parameters(self, shared: bool = False) -> Iterator[tuple[str, Parameter]]:
        """(dotted name, parameter); a shared parameter once under its first name, or under every name with shared=True."""
        seen: set[int] = set()

        def walk(value: Any, path: str) -> Iterator[tuple[str, Parameter]]:
            if isinstance(value, Parameter | Module) and id(value) not in seen:
                seen.add(id(value))
                if isinstance(value, Parameter):
                    yield path, value
                else:
                    for name, child in vars(value).items():
                        yield from walk(child, f"{path}.{name}" if path else name)
                if shared:  # it may be met again, but not within itself
                    seen.remove(id(value))

        return walk(self, "")

    def parameters(self) -> Iterator[Parameter]:
        """Every parameter, once."""
        return (parameter for _, parameter in self.named_parameters())

    def state_dict(self) -> dict[str, np.ndarray]:
        """Copies of all parameters as NumPy arrays, by name."""
        return {name: np.array(p.numpy()) for name, p in self.named_parameters()}

    def load_state_dict(self, state: Mapping[str, Any], strict: bool = True, assign: bool = False) -> None:
        """Copy arrays into the parameters in place. All keys are checked first, and nothing is written if any is wrong.

        With assign the parameters take the arrays themselves, where dtype and device agree, and no memory but theirs is
        needed: do it before making the optimiser, and use them no more.

        Raises ValueError naming every missing, unexpected (when strict) and misshapen key. A shared parameter may be given
        under any of its names.
        """
        every = dict(self.named_parameters(shared=True))
        arrays = {k: np.asarray(backend.to_device(v.data if isinstance(v, Tensor) else v, "cpu")) for k, v in state.items()}
        given = {id(every[k]) for k in arrays if k in every}
        problems = []
        if strict:
            problems += [f"missing {n} {p.shape}" for n, p in self.named_parameters() if id(p) not in given]
            problems += [f"unexpected {k} {a.shape}" for k, a in arrays.items() if k not in every]
        for k, a in arrays.items():
            if k in every and a.shape != every[k].shape:
                problems.append(f"{k} has shape {a.shape} where the model has {every[k].shape}")
            elif k in every and a.dtype.kind not in "fiu":
                problems.append(f"{k} has dtype {a.dtype}, which is not a number")
            elif k in every and not assign and backend.read_only(every[k].data):
                problems.append(f"{k} lies in memory that may only be read; make the parameter of a clone()")
        if problems:
            raise ValueError(f"state does not fit {type(self).__name__}: " + "; ".join(problems))
        for k, a in arrays.items():
            if k not in every:
                continue
            p = every[k]
            a = backend.to_device(a.astype(p.dtype, copy=False), p.device)
            if assign:
                _adopt(p, a)
            else:
                p.data[...] = a
                writes.record(p.data)

    def train(self, mode: bool = True) -> Self:
        """Training mode for this module and all below (dropout active), or not."""
        for module in self.modules():
            module.training = mode
        return self

    def eval(self) -> Self:
        """Evaluation mode: dropout does nothing."""
        return self.train(False)

    def to(self, target: Any) -> Self:
        """Move all parameters to a device or dtype, in place. Do it before making the optimiser."""
        on_device = target in ("cpu", "cuda")
        dtype = None if on_device else backend.as_dtype(target)
        if dtype is not None and dtype.kind != "f":
            raise TypeError(f"parameters need a floating-point dtype, not {dtype}")
        for p in self.parameters():
            _adopt(p, backend.to_device(p.data, target) if on_device else p.data.astype(dtype, copy=False))
        return self

    def zero_grad(self) -> None:
        """Forget all gradients."""
        for p in self.parameters():
            if p.node is not None:
                p.node.grad = None

    def requires_grad_(self, mode: bool = True) -> Self:
        """Let gradients flow to all parameters, or to none (to freeze them)."""
        for p in self.parameters():
            p.requires_grad = mode
        return self

    def extra_repr(self) -> str:
        """What to show between the parentheses of a module without children."""
        return ""

    def __repr__(self) -> str:
        children = list(self.named_children())
        if not children:
            return f"{type(self).__name__}({self.extra_repr()})"
        lines = [f"({name}): " + repr(child).replace("\n", "\n  ") for name, child in children]
        return f"{type(self).__name__}(\n  " + "\n  ".join(lines) + "\n)"

    def _repr_html_(self) -> str:
        return notebook.module_html(self)


def _adopt(p: Parameter, array: backend.Array) -> None:
    """Another array for a parameter, whose gradient, and the optimiser's place for it, were for the one before."""
    p.data = array
    p.grad = None
    if isinstance(p.node, autograd.Leaf):
        p.node.slot = None


class ModuleList(Module):
    """Modules in a list, named by their position."""

    def __init__(self, modules: Iterable[Module] = ()) -> None:
        for module in modules:
            self.append(module)

    def append(self, module: Module) -> Self:
        """Add a module at the end."""
        setattr(self, str(len(self)), module)
        return self

    def __iter__(self) -> Iterator[Module]:
        return self.children()

    def __len__(self) -> int:
        return sum(1 for _ in self.children())

    def __getitem__(self, index: int) -> Module:
        return list(self)[index]


class Sequential(ModuleList):
    """Modules applied one after the other."""

    def __init__(self, *modules: Module) -> None:
        super().__init__(modules)

    def forward(self, x: Any) -> Any:
        for module in self:
            x = module(x)
        return x

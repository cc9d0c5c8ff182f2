"""Optimisers. Parameters and gradients of a model live in flat buffers, so an update is a few passes over memory."""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator
from typing import Any

import numpy as np

from tinytensor import backend, parallel, writes
from tinytensor.autograd import Leaf
from tinytensor.backend import Array
from tinytensor.tensor import Tensor

_ALIGNMENT = 64  # bytes: each parameter starts on a cache line of its buffer


class FlatBuffer:
    """The parameters of one dtype and device laid end to end, their gradients likewise; each parameter becomes a view."""

    def __init__(self, parameters: list[Tensor]) -> None:
        first = parameters[0].data
        step = _ALIGNMENT // first.itemsize
        starts = [0]
        for p in parameters:
            starts.append(starts[-1] + -(-p.size // step) * step)
        self._allocate(parameters, starts, [p.shape for p in parameters], first.dtype, backend.device_of(first))
        for p, view, slot in zip(parameters, self.views, self.slots, strict=True):
            view[...] = p.data
            p.data = view
            if isinstance(p.node, Leaf):
                p.node.slot = slot

    def _allocate(self, parameters: list[Tensor], starts: list[int], shapes: list[Any], dtype: np.dtype, device: str) -> None:
        xp = backend.xp_for(device)
        self.parameters, self.starts = parameters, starts
        self.data, self.grad = xp.zeros(starts[-1], dtype), xp.zeros(starts[-1], dtype)
        places = [(start, start + math.prod(shape), shape) for start, shape in zip(starts, shapes, strict=False)]
        self.views = [self.data[start:end].reshape(shape) for start, end, shape in places]
        self.slots = [self.grad[start:end].reshape(shape) for start, end, shape in places]

    def __getstate__(self) -> tuple[Any, ...]:
        in_views = [p.data is view for p, view in zip(self.parameters, self.views, strict=True)]
        in_slots = [p.grad is not None and p.grad.data is slot for p, slot in zip(self.parameters, self.slots, strict=True)]
        memory = self.starts, [view.shape for view in self.views], self.data.dtype, backend.device_of(self.data)
        return self.parameters, *memory, in_views, in_slots

    def __setstate__(self, state: tuple[Any, ...]) -> None:
        """Copied arrays are views no more, so copied parameters are laid out anew."""
        *memory, in_views, in_slots = state
        self._allocate(*memory)
        if not all(hasattr(p, "data") for p in self.parameters):  # a hook of theirs led here first; `gather` will do it
            return
        for p, view, slot, viewed, inside in zip(self.parameters, self.views, self.slots, in_views, in_slots, strict=True):
            if viewed:
                view[...] = p.data
                p.data = view
            if isinstance(p.node, Leaf):
                p.node.slot = slot
            if inside and p.grad is not None:
                slot[...] = p.grad.data
                p.grad = Tensor(slot)

    def gather(self) -> list[bool]:
        """Bring back what a user (or another optimiser) replaced, and say which parameters have a gradient."""
        present = []
        for p, view, slot in zip(self.parameters, self.views, self.slots, strict=True):
            if p.data is not view:
                view[...] = p.data
                writes.record(view)
                p.data = view
            leaf = p.node
            present.append(isinstance(leaf, Leaf) and leaf.grad is not None)
            if isinstance(leaf, Leaf) and leaf.grad is not None:
                leaf.busy = False  # also where a pass failed half-way
                if leaf.grad.data is not slot:
                    slot[...] = leaf.grad.data
                    writes.record(slot)
                    leaf.grad, leaf.slot = Tensor(slot), slot
        return present


class Optimizer:
    """Parameter groups, flat buffers and state; a subclass says how to update a stretch of memory.

    `params`: tensors, or dicts with "params" and any of the hyper-parameters. Hyper-parameters are read from `param_groups` at
    each step, so whoever owns the schedule sets group["lr"]. A parameter without gradient is left as it is.
    """

    state_names: tuple[str, ...] = ()

    def __init__(self, params: Iterable[Any], defaults: dict[str, Any]) -> None:
        given = list(params)
        if not given:
            raise ValueError(f"{type(self).__name__} got no parameters")
        groups = given if isinstance(given[0], dict) else [{"params": given}]
        self.param_groups: list[dict[str, Any]] = []
        seen: set[int] = set()
        for group in groups:
            unknown = set(group) - set(defaults) - {"params"}
            if unknown:
                raise ValueError(f"{type(self).__name__} does not know {sorted(unknown)}; it takes {sorted(defaults)}")
            members = [group["params"]] if isinstance(group["params"], Tensor) else list(group["params"])
            for p in members:
                if not isinstance(p, Tensor) or not p.requires_grad or not p.is_leaf:
                    raise ValueError(f"{type(self).__name__} optimises leaf tensors that require gradients, got {p!r}")
                if id(p) in seen:
                    raise ValueError(
                        f"a parameter of shape {p.shape} was given twice; shared weights belong in one group, once"
                    )
                seen.add(id(p))
            self.param_groups.append({**defaults, **group, "params": members})
            self._check(self.param_groups[-1])
        self._parameters = [p for group in self.param_groups for p in group["params"]]
        kinds: dict[tuple[str, str], list[int]] = {}
        for i, p in enumerate(self._parameters):
            kinds.setdefault((p.dtype.name, p.device), []).append(i)
        self._buffers = [(FlatBuffer([self._parameters[i] for i in places]), places) for places in kinds.values()]
        self._state = [{n: backend.xp_of(b.data).zeros_like(b.data) for n in self.state_names} for b, _ in self._buffers]
        self._steps = [0] * len(self._parameters)
        self._group_of = [g for g, group in enumerate(self.param_groups) for _ in group["params"]]

    def _check(self, group: dict[str, Any]) -> None:
        for name in ("lr", "weight_decay", "eps", "momentum"):
            if name in group and not (group[name] >= 0 and math.isfinite(group[name])):
                raise ValueError(f"{type(self).__name__}: {name} must be finite and not negative, got {group[name]}")

    def step(self) -> None:
        """Update every parameter that has a gradient."""
        pieces = []
        on_cpu = all(isinstance(buffer.data, np.ndarray) for buffer, _ in self._buffers)
        for (buffer, places), state in zip(self._buffers, self._state, strict=True):
            for first, last in self._stretches(places, buffer.gather()):
                group, steps = self.param_groups[self._group_of[places[first]]], self._steps[places[first]]
                length = _PIECE if on_cpu else buffer.starts[last]
                for begin in range(buffer.starts[first], buffer.starts[last], length):
                    piece = slice(begin, min(begin + length, buffer.starts[last]))
                    moments = [state[name][piece] for name in self.state_names]
                    pieces.append((buffer.data[piece], buffer.grad[piece], moments, group, steps))
        large = sum(p.size for p, *_ in pieces) > _PIECE  # a small update is over before a second thread wakes
        parallel.map(lambda piece: self._update(*piece), pieces, threads=None if large and on_cpu else 1)
        for buffer, _ in self._buffers:
            writes.record(buffer.data)

    def flat_gradients(self) -> list[Array]:
        """The gradients as they lie in memory, one array for each dtype and device: what several processes add up.

        Writing there writes the parameters' .grad. A parameter that has none gets zeros.
        """
        for buffer, _ in self._buffers:
            for p, slot, present in zip(buffer.parameters, buffer.slots, buffer.gather(), strict=True):
                if not present and isinstance(p.node, Leaf):
                    slot[...] = 0
                    writes.record(slot)
                    p.grad = Tensor(slot)
        return [buffer.grad for buffer, _ in self._buffers]

    def _stretches(self, places: list[int], present: list[bool]) -> Iterator[tuple[int, int]]:
        """Longest runs [first, last) of parameters with gradients that share a group and a step count, counting this step."""
        for i, there in zip(places, present, strict=True):
            self._steps[i] += there
        first = None
        for k in range(len(places) + 1):
            if first is not None and (
                k == len(places)
                or not present[k]
                or self._group_of[places[k]] != self._group_of[places[first]]
                or self._steps[places[k]] != self._steps[places[first]]
            ):
                yield first, k
                first = None
            if k < len(places) and present[k] and first is None:
                first = k

    def _update(self, p: Array, g: Array, state: list[Array], group: dict[str, Any], step: int) -> None:
        raise NotImplementedError

    def zero_grad(self, set_to_none: bool = True) -> None:
        """Forget all gradients; with set_to_none=False they become zeros, in the optimiser's own memory."""
        for p in self._parameters:
            p.grad = None
        for buffer, _ in () if set_to_none else self._buffers:
            buffer.grad[...] = 0
            writes.record(buffer.grad)
            for p, slot in zip(buffer.parameters, buffer.slots, strict=True):
                if isinstance(p.node, Leaf):  # it may have been frozen since
                    p.grad, p.node.slot = Tensor(slot), slot

    def state_dict(self) -> dict[str, Any]:
        """Step counts, moments (copies, by parameter index) and the groups' hyper-parameters."""
        state: dict[str, Any] = {"steps": list(self._steps)}
        for name in self.state_names:
            arrays: dict[int, Any] = {}
            for (buffer, places), moments in zip(self._buffers, self._state, strict=True):
                for k, i in enumerate(places):
                    p, start = self._parameters[i], buffer.starts[k]
                    arrays[i] = np.array(backend.to_device(moments[name][start : start + p.size], "cpu")).reshape(p.shape)
            state[name] = [arrays[i] for i in range(len(self._parameters))]
        state["param_groups"] = [{k: v for k, v in g.items() if k != "params"} for g in self.param_groups]
        return state

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Take over another optimiser's state; ValueError, and nothing changed, when the parameters do not fit."""
        shapes = [p.shape for p in self._parameters]
        missing = [name for name in ("steps", *self.state_names, "param_groups") if name not in state]
        if missing:
            raise ValueError(f"optimiser state has no {', '.join(missing)}; is it another optimiser's?")
        for name in self.state_names:
            theirs = [np.shape(a) for a in state[name]]
            if theirs != shapes:
                raise ValueError(f"optimiser state {name} has shapes {theirs} where the parameters have {shapes}")
        if len(state["steps"]) != len(shapes) or len(state["param_groups"]) != len(self.param_groups):
            raise ValueError("optimiser state has another number of parameters or groups")
        self._steps = [int(s) for s in state["steps"]]
        for (buffer, places), moments in zip(self._buffers, self._state, strict=True):
            for k, i in enumerate(places):
                start, size = buffer.starts[k], self._parameters[i].size
                for name in self.state_names:
                    values = np.asarray(state[name][i], moments[name].dtype).reshape(-1)
                    moments[name][start : start + size] = backend.to_device(values, backend.device_of(moments[name]))
        for group, theirs in zip(self.param_groups, state["param_groups"], strict=True):
            group.update(theirs)


class SGD(Optimizer):
    """v ← μv + g (+ λp);  p ← p − lr·v, or with Nesterov p ← p − lr·(g + μv)  (Sutskever et al. 2013, PyTorch's form)."""

    state_names = ("momentum_buffer",)

    def __init__(
        self,
        params: Iterable[Any],
        lr: float = 1e-3,
        momentum: float = 0.0,
        weight_decay: float = 0.0,
        nesterov: bool = False,
    ) -> None:
        if nesterov and momentum <= 0:
            raise ValueError(f"SGD: Nesterov needs momentum > 0, got {momentum}")
        super().__init__(params, {"lr": lr, "momentum": momentum, "weight_decay": weight_decay, "nesterov": nesterov})

    def _update(self, p: Array, g: Array, state: list[Array], group: dict[str, Any], step: int) -> None:
        if group["weight_decay"]:
            g = g + group["weight_decay"] * p
        if group["momentum"]:
            (v,) = state
            v *= group["momentum"]
            v += g
            g = g + group["momentum"] * v if group["nesterov"] else v
        p -= group["lr"] * g


class AdamW(Optimizer):
    """m ← β₁m + (1−β₁)g;  v ← β₂v + (1−β₂)g²;  p ← p·(1 − lr·λ) − lr·m̂/(√v̂ + ε),  m̂ = m/(1−β₁ᵗ), v̂ = v/(1−β₂ᵗ)

    λ is the decoupled weight decay (Loshchilov & Hutter, "Decoupled weight decay regularization", 2019).
    """

    state_names = ("exp_avg", "exp_avg_sq")

    def __init__(
        self,
        params: Iterable[Any],
        lr: float = 1e-3,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float = 1e-2,
    ) -> None:
        super().__init__(params, {"lr": lr, "betas": betas, "eps": eps, "weight_decay": weight_decay})

    def _check(self, group: dict[str, Any]) -> None:
        super()._check(group)
        if not all(0 <= b < 1 for b in group["betas"]):
            raise ValueError(f"AdamW: betas must be in [0, 1), got {group['betas']}")

    def _update(self, p: Array, g: Array, state: list[Array], group: dict[str, Any], step: int) -> None:
        m, v = state
        beta1, beta2 = group["betas"]
        if not isinstance(p, np.ndarray) and p.dtype == np.float32:
            backend.cuda.adamw(
                p, g, m, v, beta1=beta1, beta2=beta2, eps=group["eps"], decay=1 - group["lr"] * group["weight_decay"],
                rate=group["lr"] / (1 - beta1**step), correction=1 / math.sqrt(1 - beta2**step),
            )  # fmt: skip
            return
        for i in range(0, p.size, _BLOCK):
            block = slice(i, i + _BLOCK)
            self._update_block(p[block], g[block], m[block], v[block], group, beta1, beta2, step)

    def _update_block(
        self, p: Array, g: Array, m: Array, v: Array, group: dict[str, Any], beta1: float, beta2: float, step: int
    ) -> None:
        scratch = g * (1 - beta1)
        m *= beta1
        m += scratch
        scratch = g * g
        scratch *= 1 - beta2
        v *= beta2
        v += scratch
        xp = backend.xp_of(p)
        xp.sqrt(v, out=scratch)  # √v̂ + ε
        scratch *= 1 / math.sqrt(1 - beta2**step)
        scratch += group["eps"]
        xp.divide(m, scratch, out=scratch)
        scratch *= group["lr"] / (1 - beta1**step)
        if group["weight_decay"]:
            p *= 1 - group["lr"] * group["weight_decay"]
        p -= scratch


_PIECE = 1 << 19  # elements that one thread updates at a time
_BLOCK = 1 << 16  # elements of a block: fewer stay in cache better, more keep two threads from waiting for the interpreter


def clip_grad_norm_(parameters: Iterable[Tensor], max_norm: float) -> float:
    """Scale all gradients by min(1, max_norm/(norm + 1e-6)) in place, norm = √Σg² over all of them; returns norm.

    Squares are added in the gradients' dtype within blocks, in float64 over the blocks. Gradients that fill an
    optimiser's flat buffer are measured and scaled as one array.
    """
    if not max_norm > 0:
        raise ValueError(f"clip_grad_norm_: max_norm must be positive, got {max_norm}")
    given = [parameters] if isinstance(parameters, Tensor) else parameters
    arrays = _gradient_memory([p for p in given if p.grad is not None])
    norm = math.sqrt(sum(_sum_of_squares(a) for a in arrays))
    scale = max_norm / (norm + 1e-6)
    if scale < 1:
        for a in arrays:
            a *= scale
            writes.record(a)
    return norm


def _gradient_memory(parameters: list[Tensor]) -> list[Array]:
    """Their gradients, each once; a flat buffer in place of its slots where they cover all of it but the padding."""
    gradients: dict[int, tuple[Array, bool]] = {}
    for p in parameters:
        g = p.grad.data  # type: ignore[union-attr]
        gradients[id(g)] = g, g is getattr(p.node, "slot", None)
    arrays = [g for g, in_buffer in gradients.values() if not in_buffer]
    buffers: dict[int, list[Array]] = {}
    for g, in_buffer in gradients.values():
        if in_buffer:
            buffers.setdefault(id(g.base), []).append(g)
    for slots in buffers.values():
        step = _ALIGNMENT // slots[0].itemsize
        whole = sum(-(-g.size // step) * step for g in slots) == slots[0].base.size
        arrays.extend([slots[0].base] if whole else slots)
    return arrays


def _sum_of_squares(a: Array) -> float:
    if not isinstance(a, np.ndarray) and a.dtype == np.float32 and a.flags.c_contiguous:
        return backend.cuda.sum_of_squares(a.reshape(-1))
    flat = a.reshape(-1) if a.itemsize > 2 else a.reshape(-1).astype(np.float32)
    return float(sum(float(block @ block) for block in (flat[i : i + _BLOCK] for i in range(0, flat.size, _BLOCK))))

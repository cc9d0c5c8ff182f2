"""Derivatives as functions: grad, value_and_grad, vjp, jvp."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

from tinytensor import autograd, state
from tinytensor.tensor import Tensor, root


def grad(
    outputs: Tensor | Sequence[Tensor],
    inputs: Tensor | Sequence[Tensor],
    grad_outputs: Any = None,
    retain_graph: bool | None = None,
    create_graph: bool = False,
    allow_unused: bool = False,
) -> tuple[Tensor | None, ...]:
    """∂(Σ outputs·grad_outputs)/∂input for each input; no .grad is touched.

    Inputs may be leaves or results. grad_outputs: one per output, of its shape; may be left out for outputs of one element.
    create_graph records the pass, so that the result can be differentiated again, as deep as you like. An input that no
    output depends on raises, or gives None with allow_unused.
    """
    ins = [inputs] if isinstance(inputs, Tensor) else list(inputs)
    if isinstance(outputs, Tensor):
        one_seed = isinstance(grad_outputs, list | tuple) and len(grad_outputs) == 1
        outs, seeds = [outputs], list(grad_outputs) if one_seed else [grad_outputs]
    else:
        outs = list(outputs)
        seeds = [None] * len(outs) if grad_outputs is None else list(grad_outputs)
    for i, x in enumerate(ins):
        if x.node is None:
            raise RuntimeError(f"grad: input {i}, of shape {x.shape}, does not require gradients; set requires_grad=True")
    found: dict[Any, Any] = {}
    wanted: set[Any] = {x.node for x in ins}

    def keep(node: Any, g: Any, owned: bool) -> None:
        if node in wanted:  # a constant may be the seed itself, or belong to two inputs
            found[node] = g if owned or getattr(g, "node", None) is not None else autograd.as_value(g).clone()

    autograd.sweep(
        [root(out, seed, create_graph) for out, seed in zip(outs, seeds, strict=True)],
        keep,
        retain_graph=create_graph if retain_graph is None else retain_graph,
        create_graph=create_graph,
        wanted=wanted,
    )
    missing = [i for i, x in enumerate(ins) if x.node not in found]
    if missing and not allow_unused:
        raise RuntimeError(f"grad: no output depends on input {missing[0]}; pass allow_unused=True to get None for it")
    return tuple(None if x.node not in found else autograd.as_value(found[x.node]) for x in ins)


def value_and_grad(f: Callable[..., Tensor], argnums: int | Sequence[int] = 0) -> Callable[..., tuple[Tensor, Any]]:
    """A function that returns f(*args), one element, and its gradient with respect to the arguments `argnums`."""
    places = (argnums,) if isinstance(argnums, int) else tuple(argnums)

    def value_and_gradient(*args: Any, **kwargs: Any) -> tuple[Tensor, Any]:
        leaves = list(args)
        for i in places:
            leaves[i] = _fresh_leaf(args[i])
        with state.enable_grad():
            y = f(*leaves, **kwargs)
        grads = _pulled(y, [leaves[i] for i in places])
        return y.detach(), grads[0] if isinstance(argnums, int) else grads

    return value_and_gradient


def vjp(f: Callable[..., Tensor], *primals: Any) -> tuple[Tensor, Callable[[Any], tuple[Tensor, ...]]]:
    """f(*primals) and the function v ↦ vᵀJ, one gradient per primal, J the Jacobian of f there."""
    leaves = [_fresh_leaf(x) for x in primals]
    with state.enable_grad():
        y = f(*leaves)

    return y.detach(), lambda v: _pulled(y, leaves, [v], retain_graph=True)


def jvp(f: Callable[..., Tensor], primals: Sequence[Any], tangents: Sequence[Any]) -> tuple[Tensor, Tensor]:
    """f(*primals) and J·tangents: the change of f along the tangents.

    u ↦ uᵀJ is linear in u, so its own vjp with the tangents is Jt: two backward passes make one forward derivative.
    """
    leaves = [_fresh_leaf(x) for x in primals]
    moves = [autograd.as_value(t) for t in tangents]
    for i, (x, t) in enumerate(zip(leaves, moves, strict=True)):
        if x.shape != t.shape:
            raise ValueError(f"jvp: tangent {i} has shape {t.shape}, its primal {x.shape}")
    with state.enable_grad():
        y = f(*leaves)
        zero = Tensor(np.zeros_like(y.data))
        if not y.requires_grad:
            return y, zero
        u = _fresh_leaf(zero)
        pulled = grad(y, leaves, grad_outputs=[u], create_graph=True, allow_unused=True)
        pairs = [(g, t) for g, t in zip(pulled, moves, strict=True) if g is not None and g.requires_grad]
        if not pairs:
            return y.detach(), zero
        (result,) = grad([g for g, _ in pairs], [u], grad_outputs=[t for _, t in pairs], allow_unused=True)
    return y.detach(), zero if result is None else result


def _pulled(y: Tensor, leaves: list[Tensor], v: Any = None, retain_graph: bool | None = None) -> tuple[Tensor, ...]:
    """The gradients of leaves, zeros for those that y does not depend on."""
    if y.requires_grad:
        grads = grad(y, leaves, v, retain_graph, allow_unused=True)
    else:
        grads = (None,) * len(leaves)
    return tuple(Tensor(np.zeros_like(x.data)) if g is None else g for x, g in zip(leaves, grads, strict=True))


def _fresh_leaf(x: Any) -> Tensor:
    leaf = Tensor(autograd.as_value(x).data)
    leaf.requires_grad = True
    return leaf

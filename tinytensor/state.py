"""What each thread is in the midst of: whether it records operations, which module it is in, and who looks on."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from contextlib import ContextDecorator, contextmanager
from typing import Any, Literal, Self

Call = tuple[Any, Any]  # a module's call: a weak reference to the module, and the Call around it, None for the outermost


Precision = Literal["fp32", "tf32", "bf16"]


class _Thread(threading.local):
    recording: bool | None = True  # None: not now, but backward will do this again, recorded
    initialises = True
    precision: Precision = "fp32"
    call: Call | None = None
    observers: tuple[Observer, ...] = ()


thread = _Thread()


class Setting(ContextDecorator):
    """One of this thread's settings, another within a `with` block or a decorated function."""

    def __init__(self, name: str, value: Any) -> None:
        self.name, self.value = name, value
        self._outer: list[Any] = []

    def __enter__(self) -> None:
        self._outer.append(getattr(thread, self.name))
        setattr(thread, self.name, self.value)

    def __exit__(self, *_: object) -> None:
        setattr(thread, self.name, self._outer.pop())

    def _recreate_cm(self) -> Setting:  # a decorated function may recurse or run in several threads
        return Setting(self.name, self.value)


def no_grad() -> Setting:
    """Within this block (or decorated function) nothing is recorded in this thread."""
    return Setting("recording", False)


def enable_grad() -> Setting:
    """Within this block (or decorated function) operations are recorded, also inside `no_grad`."""
    return Setting("recording", True)


def is_grad_enabled() -> bool:
    return bool(thread.recording)


def is_differentiated() -> bool:
    """Whether gradients will flow here: it is recorded now, or when backward does it again."""
    return thread.recording is not False


def to_be_replayed() -> Setting:
    """Within this block nothing is recorded, for backward will do it again, if it would be recorded now."""
    return Setting("recording", thread.recording and None)


class Observer:
    """Looks on while the engine works, in the thread that enters it and those that `parallel` lends it."""

    def forward(self, op: Any, inputs: tuple[Any, ...], params: dict[str, Any], run: Callable[[], Any]) -> Any:
        """Called for an op on its inputs, with its parameters; run() computes, and returns the result, a tensor, to return."""
        return run()

    def backward(self, node: Any, g: Any, run: Callable[[], None]) -> None:
        """Called for a node with its whole gradient; run() sends on what it sends to its inputs."""
        run()

    def sent(self, node: Any, edge: Any, share: Any) -> None:
        """Called for each share of a gradient that a node sends to one of its inputs."""

    def __enter__(self) -> Self:
        if self in thread.observers:
            raise RuntimeError(f"this {type(self).__name__}() looks on already; make another one for the inner block")
        thread.observers = (*thread.observers, self)
        return self

    def __exit__(self, *_: object) -> None:
        thread.observers = tuple(o for o in thread.observers if o is not self)


def settings() -> tuple[Any, ...]:
    """What another thread needs to work for this one: see `lent`."""
    return thread.recording, thread.precision, thread.call, thread.observers


@contextmanager
def lent(theirs: tuple[Any, ...]) -> Iterator[None]:
    """Within this block this thread has another's `settings`."""
    before = settings()
    thread.recording, thread.precision, thread.call, thread.observers = theirs
    try:
        yield
    finally:
        thread.recording, thread.precision, thread.call, thread.observers = before


def path(call: Call | None) -> str:
    """The dotted name of the module that was called, as the outermost module's named_modules() has it: "h.3.mlp".

    A module that is not one of these is named by its class, after the last one that is.
    """
    chain: list[Any] = []
    while call is not None:
        chain.insert(0, call[0]())
        call = call[1]
    names = {id(module): name for name, module in chain[0].named_modules()} if chain and chain[0] is not None else {}
    strangers: list[str] = []
    for module in reversed(chain[1:]):
        if id(module) in names:
            return ".".join([name for name in (names[id(module)], *strangers) if name])
        strangers.insert(0, "a module that is no more" if module is None else type(module).__name__)
    return ".".join(strangers)


def within(call: Call | None) -> str:
    """ " in h.3.mlp", to end the name of a place; "" outside of modules."""
    return f" in {module}" if (module := path(call)) else ""

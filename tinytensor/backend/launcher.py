"""Typed launches of the CUDA kernels in the `.cu` files beside this one.

A raw kernel checks nothing: an array of another dtype, a strided view or a missing argument is garbage or a crash on the
device. So the parameters that the source declares are read from the source, and every launch is held to them.
"""

from __future__ import annotations

import functools
import re
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from tinytensor.backend import Array, bfloat16

INSTANCES = {"typename T": ("float", "bf16"), "int D": ("16", "32", "64")}  # what a template of each kind is compiled for
_KERNEL = re.compile(
    r"(?:template <(?P<template>[^>]*)>\s*)?"
    r"__global__ void (?:__launch_bounds__\([^)]*\) )?(?P<name>\w+)\((?P<parameters>[^)]*)\)"
)
_SCALARS = {"int": np.int32, "long long": np.int64, "u32": np.uint32, "u64": np.uint64, "float": np.float32}
_ARRAYS = {**_SCALARS, "u16": np.uint16}


class Strided(NamedTuple):
    """An array whose layout the kernel is told by further arguments, so that it need not be contiguous."""

    array: Array


def kernels_of(source: str) -> dict[str, list[str]]:
    """The C types of each kernel's parameters, by the name it is launched under: `gelu<float>`, `set_place`, …"""
    found = {}
    for match in _KERNEL.finditer(re.sub(r"//[^\n]*", "", source)):
        types = [_type(parameter) for parameter in match["parameters"].split(",")]
        if not match["template"]:
            found[match["name"]] = types
            continue
        for instance in INSTANCES[match["template"]]:
            found[f"{match['name']}<{instance}>"] = [re.sub(r"\bT\b", instance, t) for t in types]
    return found


def _type(parameter: str) -> str:
    words = parameter.replace("*", " * ").split()
    return " ".join(w for w in words[:-1] if w not in ("const", "__restrict__")).replace(" *", "*")


class Source:
    """The kernels of one `.cu` file, compiled when the first of them is launched."""

    def __init__(self, path: Path) -> None:
        self.path = path

    @functools.cached_property
    def kernels(self) -> dict[str, list[str]]:
        return kernels_of(self.path.read_text(encoding="utf-8"))

    @functools.cached_property
    def _module(self) -> Any:
        import cupy

        options = ("-std=c++17",)
        return cupy.RawModule(code=self.path.read_text(encoding="utf-8"), options=options, name_expressions=list(self.kernels))

    def launch(self, name: str, grid: tuple[int, ...], block: int, *arguments: Any) -> None:
        """Run a kernel on `grid` blocks of `block` threads, on the current stream. None stands for a null pointer."""
        types = self.kernels[name]
        if len(arguments) != len(types):
            raise TypeError(f"kernel {name} takes {len(types)} arguments, got {len(arguments)}")
        if not all(0 < n < limit for n, limit in zip(grid, (2**31, 2**16, 2**16), strict=False)) or not 0 < block <= 1024:
            raise ValueError(f"kernel {name} cannot run on a grid of {grid} blocks of {block} threads")
        checked = [_checked(name, i, t, a) for i, (t, a) in enumerate(zip(types, arguments, strict=True))]
        self._module.get_function(name)(grid, (block,), tuple(checked))


def _checked(kernel: str, place: int, kind: str, value: Any) -> Any:
    where = f"kernel {kernel}, argument {place} ({kind})"
    if not kind.endswith("*"):
        whole = "" if kind == "float" else "whole "
        if not (isinstance(value, int | np.integer) or (isinstance(value, float | np.floating) and not whole)):
            raise TypeError(f"{where}: a {whole}number was expected, got {value!r}")
        try:
            return np.array(int(value) if whole else value, _SCALARS[kind])[()]  # NumPy holds Python's numbers alone to a range
        except OverflowError:
            raise OverflowError(f"{where}: {value} does not fit") from None
    if value is None:
        return np.uintp(0)
    array = value.array if isinstance(value, Strided) else value
    if array.dtype != _dtype(kind):
        raise TypeError(f"{where}: an array of {_dtype(kind)} was expected, got {array.dtype}")
    if not isinstance(value, Strided) and not array.flags.c_contiguous:
        raise ValueError(f"{where}: a contiguous array was expected, got strides {array.strides} for shape {array.shape}")
    return array


def _dtype(kind: str) -> np.dtype:
    pointed = kind.removesuffix("*")
    return bfloat16() if pointed == "bf16" else np.dtype(_ARRAYS[pointed])

"""Triton's interpreter, quicker: at every operation it makes anew what never changes.

For each operation of a program it replaces nothing of what is computed, only how types and shapes are made on the way:
those of equal shapes are shared, names of types are spelled when somebody asks, and the functions of `triton.language`
are replaced once a launch, not again at each call of a function on the device.
"""

from __future__ import annotations

import inspect
import sys
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

Function = Callable[..., Any]


def quicken_interpreter() -> None:
    """For the rest of the process, if it has the interpreter."""
    interpreter: Any = sys.modules.get("triton.runtime.interpreter")
    if interpreter is None or isinstance(interpreter.inspect, RememberedMembers):
        return
    core = interpreter.tl.core
    interpreter.inspect = RememberedMembers(core.is_builtin)
    interpreter._patch_lang = Patches(interpreter)
    interpreter._patch_attr = _patch_attr(interpreter)
    interpreter._get_np_dtype = _numpy_types(core, interpreter._get_np_dtype)
    core._unwrap_if_constexpr = _unwrap(core, core._unwrap_if_constexpr)
    core.dtype.__eq__ = _equal(core.dtype.__eq__)
    core.block_type.__init__ = _block_type(core, core.block_type.__init__)
    core.block_type.name = property(lambda self: f"<{self.shape}, {self.element_ty}>", lambda self, name: None)
    core.tensor.__init__ = _tensor(core)
    semantic = interpreter.interpreter_semantic
    semantic.broadcast_impl_value = _broadcast(semantic.broadcast_impl_value)
    semantic.computation_type_impl = _remembered(semantic.computation_type_impl)
    semantic.cast = _cast(semantic.cast)


class RememberedMembers:
    """The module `inspect` for the interpreter: `getmembers` gives only the members that it replaces."""

    def __init__(self, is_replaced: Callable[[object], bool]) -> None:
        self._is_replaced = is_replaced
        self._names: dict[object, list[str]] = {}

    def __getattr__(self, name: str) -> Any:
        return getattr(inspect, name)

    def getmembers(self, of: object) -> list[tuple[str, Any]]:
        """As they are now; the first call finds the names, before anything was replaced."""
        names = self._names.get(of)
        if names is None:
            names = [name for name, member in inspect.getmembers(of) if self._is_replaced(member)]
            self._names[of] = names
        return [(name, getattr(of, name)) for name in names]


class NothingToRestore:
    """The scope of a call while everything is replaced."""

    def restore(self) -> None:
        """Do nothing: the launch restores."""


class Patches:
    """`_patch_lang`: a launch replaces all there is to replace, for the functions that it calls, too."""

    def __init__(self, interpreter: Any) -> None:
        self._patch: Function = interpreter._patch_lang
        self._everything = SimpleNamespace(__globals__={"tl": interpreter.tl, "core": interpreter.tl.core})
        self._is_replaced = False

    def __call__(self, function: object) -> Any:
        if self._is_replaced:
            return NothingToRestore()
        scope, self._is_replaced = self._patch(self._everything), True
        restore = scope.restore

        def restore_all() -> None:
            restore()
            self._is_replaced = False

        scope.restore = restore_all
        return scope


def _patch_attr(interpreter: Any) -> Function:
    semantic = interpreter.interpreter_semantic
    checked = interpreter.tl.core.builtin(lambda: None).__code__  # it looks only whether there is a `_semantic`

    def patch(of: object, name: str, member: Any, builder: object, scope: Any) -> None:
        function = member.__wrapped__ if getattr(member, "__code__", None) is checked else member

        def call(*args: Any, _semantic: object = None, **kwargs: Any) -> Any:
            return function(*args, _semantic=semantic, **kwargs)

        scope.set_attr(of, name, call)

    return patch


def _numpy_types(core: Any, original: Function) -> Function:
    by_name: dict[str, Any] = {}

    def numpy_type(of: Any) -> Any:
        if isinstance(of, core.block_type):
            of = of.element_ty
        if of.name not in by_name:
            by_name[of.name] = original(of)
        return by_name[of.name]

    return numpy_type


def _unwrap(core: Any, original: Function) -> Function:
    plain = {core.tensor, core.dtype, core.block_type, core.pointer_type, int, float, bool, str, type(None)}

    def unwrap(value: Any) -> Any:
        kind = type(value)
        if kind in plain:
            return value
        return value.value if kind is core.constexpr else original(value)

    return unwrap


def _equal(original: Function) -> Function:
    return lambda self, other: self is other or original(self, other)


def _block_type(core: Any, original: Function) -> Function:
    known: dict[tuple[Any, ...], tuple[Any, int]] = {}

    def init(self: Any, element_ty: Any, shape: Any) -> None:
        sizes = tuple(size.value if type(size) is core.constexpr else size for size in shape)
        if sizes not in known:
            original(self, element_ty, shape)
            known[sizes] = self.shape, self.numel
        self.element_ty = element_ty
        self.shape, self.numel = known[sizes]

    return init


def _tensor(core: Any) -> Function:
    known: dict[tuple[Any, ...], tuple[Any, Any]] = {}
    original = core.tensor.__init__

    def init(self: Any, handle: Any, type: Any) -> None:
        sizes = tuple(type.shape) if type.is_block() else ()
        if sizes not in known:
            original(self, handle, type)
            known[sizes] = self.shape, self.numel
        self.handle, self.type, self.dtype = handle, type, type.scalar
        self.shape, self.numel = known[sizes]

    return init


def _broadcast(original: Function) -> Function:
    def broadcast(lhs: Any, rhs: Any) -> Any:
        if lhs.shape is rhs.shape:  # those of equal sizes are the same object
            return lhs, rhs
        return original(lhs, rhs)

    return broadcast


def _cast(original: Function) -> Function:
    def cast(value: Any, to: Any, *args: Any, **kwargs: Any) -> Any:
        return value if value.dtype is to else original(value, to, *args, **kwargs)

    return cast


def _remembered(original: Function) -> Function:
    results: dict[tuple[Any, ...], Any] = {}

    def computation_type(a: Any, a_is_scalar: bool, b: Any, b_is_scalar: bool, *args: Any) -> Any:
        key = a.name, a_is_scalar, b.name, b_is_scalar, args
        if key not in results:
            results[key] = original(a, a_is_scalar, b, b_is_scalar, *args)
        return results[key]

    return computation_type

"""Triton's interpreter, quicker: at every operation it makes anew what never changes.

For each operation of a program it replaces nothing of what is computed, only how types and shapes are made on the way:
those of equal shapes are shared, names of types are spelled when somebody asks, operands that fit are not made to fit,
and the functions of `triton.language` are replaced once a launch, not again at each call of a function on the device.
"""

from __future__ import annotations

import inspect
import math
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
    core.block_type.with_element_ty = _others(core)
    core.block_type.to_ir = _same_in_numpy(core, interpreter.interpreter_builder, core.block_type.to_ir)
    core.block_type.name = property(lambda self: f"<{self.shape}, {self.element_ty}>", lambda self, name: None)
    core.tensor.__init__ = _tensor(core)
    semantic = interpreter.interpreter_semantic
    semantic.broadcast_impl_value = _broadcast(semantic.broadcast_impl_value)
    semantic.computation_type_impl = _remembered(semantic.computation_type_impl)
    semantic.cast = _cast(semantic.cast)
    semantic.binary_op_sanitize_overflow_impl = _overflow(semantic)
    semantic.binary_op_type_checking_impl = _operands(core, semantic)
    interpreter.TensorHandle.__init__ = _handle(core, interpreter.TensorHandle.__init__)


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


def _others(core: Any) -> Function:
    known: dict[tuple[Any, ...], Any] = {}

    def with_element_ty(self: Any, element: Any) -> Any:
        if type(element) is not core.dtype:
            return core.block_type(element, self.shape)
        key = element.name, tuple(self.shape)
        if key not in known:
            known[key] = core.block_type(element, self.shape)
        return known[key]

    return with_element_ty


def _same_in_numpy(core: Any, builder: Any, original: Function) -> Function:
    def to_ir(self: Any, builder_of: Any) -> Any:
        if builder_of is builder and type(self.element_ty) is core.dtype:
            return self
        return original(self, builder_of)

    return to_ir


def _tensor(core: Any) -> Function:
    known: dict[tuple[Any, ...], tuple[Any, Any]] = {}
    original, block_type = core.tensor.__init__, core.block_type

    def init(self: Any, handle: Any, type: Any) -> None:
        sizes = tuple(type.shape) if type.__class__ is block_type else ()
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


def _overflow(semantic: Any) -> Function:
    original = semantic.binary_op_sanitize_overflow_impl

    def check(*args: Any) -> None:
        if semantic.builder.options.debug:  # otherwise what it computes in 64 bits is thrown away
            original(*args)

    return check


def _operands(core: Any, semantic: Any) -> Function:
    original, computation_type = semantic.binary_op_type_checking_impl, semantic.computation_type_impl
    broadcast, constants = semantic.broadcast_impl_value, Constants(original)
    plain, pointer = core.dtype, core.pointer_type

    def operands(
        lhs: Any,
        rhs: Any,
        allow_lhs_ptr: bool = False,
        allow_rhs_ptr: bool = False,
        arithmetic_check: bool = True,
        div_or_mod: bool = False,
    ) -> Any:
        if type(lhs) is core.tensor:
            of = lhs.dtype
            if type(rhs) is core.tensor and type(rhs.dtype) is plain:
                if type(of) is plain:
                    if of.name == rhs.dtype.name and (
                        not arithmetic_check or computation_type(of, False, of, False, div_or_mod).name == of.name
                    ):
                        return broadcast(lhs, rhs)
                elif type(of) is pointer and allow_lhs_ptr and not rhs.dtype.is_floating():
                    return broadcast(lhs, rhs)
            elif type(rhs) in (int, float) and type(of) is plain and arithmetic_check:
                return constants.beside(lhs, rhs, div_or_mod)
        return original(lhs, rhs, allow_lhs_ptr, allow_rhs_ptr, arithmetic_check, div_or_mod)

    return operands


class Constants:
    """Numbers as tensors of the shapes of those that they are combined with; nobody writes into them."""

    def __init__(self, make: Function) -> None:
        self._make = make
        self._known: dict[tuple[Any, ...], Any] = {}

    def beside(self, lhs: Any, number: float, div_or_mod: bool) -> tuple[Any, Any]:
        """Both, of the type in which they are combined."""
        itself = type(number), number, math.copysign(1.0, number)
        key = itself, lhs.dtype.name, getattr(lhs.type, "shape", ()), div_or_mod
        if key in self._known:
            return lhs, self._known[key]
        both: tuple[Any, Any] = self._make(lhs, number, False, False, True, div_or_mod)
        if both[0] is lhs and number == number:
            both[1].handle.data.flags.writeable = False
            self._known[key] = both[1]
        return both


def _handle(core: Any, original: Function) -> Function:
    plain = core.dtype

    def init(self: Any, data: Any, dtype: Any, attr: Any = None) -> None:
        size = data.itemsize
        if type(dtype) is plain and (size == 1 or 8 * size <= dtype.primitive_bitwidth):
            self.data, self.dtype = data, dtype
            self.attr = {} if attr is None else attr
        else:
            original(self, data, dtype, *(() if attr is None else (attr,)))

    return init

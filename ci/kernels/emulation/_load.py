"""Load a tree's Python package on an emulated extension, with poisoned and guarded tensors."""

from __future__ import annotations

import ctypes
import importlib.machinery
import importlib.util
import itertools
import sys
import types
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from unittest import mock

import torch
from torch.multiprocessing.reductions import StorageWeakRef

UNSET = 0xFF  # Memory that nobody has written: NaN in all float types.
GUARD = 4096  # bytes on either side of a guarded tensor

INTERPRET = mock.patch.dict("os.environ", TRITON_INTERPRET="1")

_loaded: list[ctypes.CDLL] = []
_guards: list[tuple[StorageWeakRef, int, int]] = []  # storage, addresses of the two zones
_numbers = itertools.count()
_order = (0, 0)
# Under the address sanitizer guard zones are poisoned, so that a read of them is found as well.
_poison = getattr(ctypes.CDLL(None), "__asan_poison_memory_region", None)


def load_extension(name: str, library: Path) -> types.ModuleType:
    """Load an extension; each of its functions checks all guards when it returns."""
    # pybind11 keeps modules by their full name, and would return the one that was loaded before.
    full_name = f"{unique('emulated')}.{name}"
    loader = importlib.machinery.ExtensionFileLoader(full_name, str(library))
    spec = importlib.util.spec_from_loader(full_name, loader)
    assert spec is not None
    extension = importlib.util.module_from_spec(spec)
    loader.exec_module(extension)
    handle = ctypes.CDLL(str(library))
    handle.emulation_order(*_order)
    _loaded.append(handle)

    checked = types.ModuleType(name)
    for key, value in vars(extension).items():
        if callable(value):
            setattr(checked, key, _with_guards(value))
    return checked


def set_order(which: int, seed: int) -> tuple[int, int]:
    """Set the order of threads in all extensions, also later ones; return the previous order."""
    global _order
    before, _order = _order, (which, seed)
    for handle in _loaded:
        handle.emulation_order(which, seed)
    return before


def set_mutant(number: int) -> None:
    """Switch a mutant on in all extensions that are loaded; 0 is none."""
    for handle in _loaded:
        handle.emulation_mutant(number)


def _with_guards(function: Callable[..., Any]) -> Callable[..., Any]:
    def call(*args: Any, **kwargs: Any) -> Any:
        result = function(*args, **kwargs)
        check_guards(function.__name__)
        return result

    return call


def empty(size: Sequence[int], stride: Sequence[int], dtype: torch.dtype) -> torch.Tensor:
    """Return a tensor of NaN that lies between guard zones."""
    span = 1 + sum((n - 1) * s for n, s in zip(size, stride, strict=True))
    count = 0 if 0 in size else span * dtype.itemsize
    base = torch.full((GUARD + count + GUARD,), UNSET, dtype=torch.uint8)
    before, after = base.data_ptr(), base.data_ptr() + GUARD + count
    if _poison:
        _poison(ctypes.c_void_p(before), ctypes.c_size_t(GUARD))
        _poison(ctypes.c_void_p(after), ctypes.c_size_t(GUARD))
    else:
        _guards.append((StorageWeakRef(base.untyped_storage()), before, after))
    # This is not a view of `base`, as autograd treats views that a function returns specially.
    tensor = torch.empty(0, dtype=dtype)
    return tensor.set_(base.untyped_storage(), GUARD // dtype.itemsize, size, stride)


def guarded(tensor: torch.Tensor) -> torch.Tensor:
    """Return a copy of a tensor, with its strides, that lies between guard zones.

    An extension that writes into them raises when it returns; under the address sanitizer, one that
    reads them ends the process. The copy is a leaf, and requires a gradient if the tensor does.
    """
    copy = empty(tensor.shape, tensor.stride(), tensor.dtype)
    source, target = tensor.detach(), copy
    for dim, stride in enumerate(tensor.stride()):
        if stride == 0 and tensor.shape[dim]:
            source, target = source.narrow(dim, 0, 1), target.narrow(dim, 0, 1)
    target.copy_(source)
    return copy.detach().requires_grad_(tensor.requires_grad)


def check_guards(function: str) -> None:
    """Raise if anything was written beside a guarded tensor that is still alive."""
    _guards[:] = [guard for guard in _guards if not guard[0].expired()]
    for _, before, after in _guards:
        for side, address in (("before", before), ("after", after)):
            if ctypes.string_at(address, GUARD) != bytes([UNSET]) * GUARD:
                ctypes.memset(address, UNSET, GUARD)
                raise RuntimeError(f"CUDA emulation: {function} wrote {side} a guarded tensor")


class _Torch(types.ModuleType):
    """The `torch` that the package under test sees: its `empty` gives NaN between guard zones."""

    def __getattr__(self, name: str) -> Any:
        return getattr(torch, name)

    @staticmethod
    def empty(*size: Any, dtype: torch.dtype | None = None, **kwargs: Any) -> torch.Tensor:
        return _poisoned(torch.empty(*size, dtype=dtype, **kwargs))

    @staticmethod
    def empty_like(like: torch.Tensor, **kwargs: Any) -> torch.Tensor:
        return _poisoned(torch.empty_like(like, **kwargs))

    @staticmethod
    def zeros_like(like: torch.Tensor, **kwargs: Any) -> torch.Tensor:
        return _poisoned(torch.empty_like(like, **kwargs)).zero_()


def _poisoned(like: torch.Tensor) -> torch.Tensor:
    return empty(like.shape, like.stride(), like.dtype)


@contextmanager
def modules_replaced(
    replaced: Mapping[str, types.ModuleType | None], prefix: str
) -> Iterator[None]:
    """Put `replaced` into sys.modules during an import, and take out other modules of `prefix`.

    None stands for a module that is absent.
    """

    def own(name: str) -> bool:
        return name in replaced or name == prefix or name.startswith(f"{prefix}.")

    before = {name: module for name, module in sys.modules.items() if own(name)}
    for name in before:
        del sys.modules[name]
    sys.modules.update(replaced)  # type: ignore[arg-type]
    try:
        yield
    finally:
        for name in [name for name in sys.modules if own(name)]:
            del sys.modules[name]
        sys.modules.update(before)


def load_package(
    folder: Path,
    extensions: dict[str, types.ModuleType],
    submodules: list[str],
    change: Callable[[str], str],
) -> dict[str, types.ModuleType]:
    """Run a package's modules under their own names, and leave no trace in sys.modules.

    Args:
        folder: the package's folder, as `…/causal_conv1d`.
        extensions: the compiled modules that `import name` in it finds, by name.
        submodules: the modules to load, in an order that fits their imports.
        change: maps a module's source to what is run instead.

    Returns:
        Module by name, "" for the package itself.
    """
    package = folder.name
    parent = types.ModuleType(package)
    parent.__path__ = [str(folder)]
    result = {"": parent}
    with modules_replaced({**extensions, package: parent}, package):
        for name in [*submodules, ""]:
            path = folder / f"{name or '__init__'}.py"
            module = result.setdefault(name, types.ModuleType(f"{package}.{name}"))
            module.__file__ = str(path)
            sys.modules[module.__name__] = module
            if name:
                setattr(parent, name, module)
            code = compile(change(path.read_text()), str(path), "exec")
            exec(code, vars(module))
    for module in result.values():
        if getattr(module, "torch", None) is torch:
            module.torch = _Torch("torch")  # type: ignore[attr-defined]
    return result


def unique(name: str) -> str:
    """Return the name with a number, so that nothing else that is loaded has it."""
    return f"{name}_{next(_numbers)}"


def interpreted(function: Callable[..., Any]) -> Callable[..., Any]:
    """Run `function`, which launches a Triton kernel, in Triton's interpreter without a device."""

    def call(*args: Any, **kwargs: Any) -> Any:
        with INTERPRET, mock.patch.object(torch.cuda, "device", mock.MagicMock()):
            return function(*args, **kwargs)

    return call

"""Hub kernels: projects for kernel-builder, made of our files, the patched forks' and compat's.

`forks/kernels-community/KERNEL` has what is ours, and propagate.toml, which says what is copied
besides. In copied Python files imports become relative and ops get the kernel's own namespace.
"""

from __future__ import annotations

import hashlib
import json
import re
import tomllib
from dataclasses import dataclass, field
from pathlib import Path, PurePosixPath
from typing import Any

from ci.forks._commands import patched
from ci.forks._release import ROOT, ForkError, locked, replace, scratch
from ci.forks._tree import git
from ci.forks.relative_imports import Package, RewriteError, called_ops, relative_imports

_NOT_COPIED = ("propagate.toml", ".gitignore", "tree/", ".new-")
_TRACES = {"__pycache__", ".pytest_cache", ".ruff_cache", ".mypy_cache", ".hypothesis"}
_COMPILED = {".cpp", ".cu", ".cuh", ".h"}
# The one variant that needs no compiler. `kernels` loads it wherever there is no GPU.
_VARIANT = "build/torch-cpu"
_OPS = '''"""The namespace of this kernel's ops."""

import torch

ops = torch.ops.{name}


def add_op_namespace_prefix(op_name: str) -> str:
    """The full name of an op."""
    return f"{name}::{{op_name}}"
'''


@dataclass(frozen=True)
class Kernel:
    """A hub kernel, as its propagate.toml has it.

    Attributes:
        name: Of its folder, and on the Hub.
        root: The repository.
        published: The newest version on the Hub; build.toml has the next one.
        forks: For each fork `copy`, a table of "from" = "to", and `leave`, a list; a folder stands
            for all files in it, and of two that fit the longer one counts.
        overlays: Files of this repository: path in the tree of each.
        compiled: Modules whose functions are ops here, and what the ops' names begin with.
        rewrite: Texts to change: `file` in the tree; `find`, a regular expression that fits once;
            and `by`.
    """

    name: str
    root: Path
    published: int
    forks: dict[str, dict[str, Any]]
    overlays: dict[str, str] = field(default_factory=dict)
    compiled: dict[str, str] = field(default_factory=dict)
    rewrite: list[dict[str, str]] = field(default_factory=list)

    @classmethod
    def read(cls, name: str, root: Path = ROOT) -> Kernel:
        """Read its propagate.toml; a ForkError names what is wrong in it."""
        if name not in kernels(root):
            raise ForkError(f"{name}: no such kernel; there are {', '.join(kernels(root))}.")
        path = root / "forks/kernels-community" / name / "propagate.toml"
        try:
            return cls(name, root, **tomllib.loads(path.read_text()))
        except (TypeError, tomllib.TOMLDecodeError) as error:
            raise ForkError(f"{path}: {error}") from error

    @property
    def folder(self) -> Path:
        """Return where the kernel is defined and built."""
        return self.root / "forks/kernels-community" / self.name

    @property
    def tree(self) -> Path:
        """The project that is built."""
        return self.folder / "tree"

    @property
    def package(self) -> str:
        """The folder of its Python files in the tree."""
        return f"torch-ext/{self.name.replace('-', '_')}"

    def fault(self, text: str) -> ForkError:
        """An error in what the tree would be made of."""
        return ForkError(f"{self.name}: {text} See {self.folder / 'propagate.toml'}.")


def kernels(root: Path = ROOT) -> list[str]:
    """All hub kernels."""
    return sorted(p.parent.name for p in root.glob("forks/kernels-community/*/propagate.toml"))


def propagate(name: str, root: Path = ROOT, *, check: bool = False) -> bool:
    """Build forks/kernels-community/KERNEL/tree, with the variant of it that runs on a CPU.

    Args:
        name: Of the kernel.
        root: The repository.
        check: Write nothing, and raise if the tree is not what would be built.

    Returns:
        Whether there was anything to do.

    Raises:
        ForkError: A file of a fork is neither copied nor left out; something that is named fits
            nothing; an import leads out of the kernel; sources, ops or versions do not agree. The
            tree is left as it was.
    """
    kernel = Kernel.read(name, root)
    with locked(kernel):
        wanted = _contents(kernel)
        found = _files(kernel.tree)
        if wanted == found:
            return False
        if check:
            paths = sorted(p for p in wanted.keys() | found.keys() if wanted.get(p) != found.get(p))
            raise ForkError(
                f"{name}: {kernel.tree} is not what would be built ({', '.join(paths[:5])}). Run "
                f"`python -m ci.forks propagate {name}`; what was changed there is lost."
            )
        with scratch(kernel) as folder:
            new = Path(folder, "tree")
            for path, content in wanted.items():
                (new / path).parent.mkdir(parents=True, exist_ok=True)
                (new / path).write_bytes(content)
            replace(kernel.tree, new)
    return True


def _files(folder: Path) -> dict[str, bytes]:
    """The files in a folder by path, but for traces of running them."""
    paths = {path.relative_to(folder): path for path in folder.rglob("*") if path.is_file()}
    return {
        name.as_posix(): path.read_bytes()
        for name, path in paths.items()
        if not _TRACES.intersection(name.parts)
    }


def _contents(kernel: Kernel) -> dict[str, bytes]:
    """The files of the tree by path."""
    ours = {
        path: content
        for path, content in _files(kernel.folder).items()
        if not path.startswith(_NOT_COPIED)
    }
    copied, modules = _copied(kernel, ours)
    files = ours | copied
    package = Package(
        {
            module: PurePosixPath(path).relative_to(kernel.package)
            for module, path in modules.items()
            if path.startswith(f"{kernel.package}/")
        },
        kernel.compiled,
    )
    names = {path: module for module, path in modules.items() if path in copied}
    for path, content in list(files.items()):
        if path.startswith(f"{kernel.package}/") and path.endswith(".py"):
            name = PurePosixPath(path).relative_to(kernel.package)
            try:
                text = package.rewrite(content.decode(), names.get(path, ""), name)
            except RewriteError as error:
                raise kernel.fault(f"{error}.") from error
            files[path] = text.encode()
            if path in ours and files[path] != content:
                raise kernel.fault(f"{path} imports by names that are not relative.")
    for change in kernel.rewrite:
        text = files.get(change["file"], b"").decode()
        text, count = re.subn(change["find"], change["by"], text, flags=re.MULTILINE)
        if count != 1:
            raise kernel.fault(
                f"{change['find']!r} fits {count} times in {change['file']}; needed: once."
            )
        files[change["file"]] = text.encode()
    _agree(kernel, files)
    return files | _variant(kernel, files)


def _copied(kernel: Kernel, ours: dict[str, bytes]) -> tuple[dict[str, bytes], dict[str, str]]:
    """The files that are copied, by path in the tree, and the path of each module of theirs."""
    copied: dict[str, bytes] = {}
    modules: dict[str, str] = {}

    def add(source: Path, target: str) -> None:
        if target in ours or target in copied:
            raise kernel.fault(f"{source} would be a second {target}; leave one of them out.")
        copied[target] = source.read_bytes()

    for library, rules in kernel.forks.items():
        copy, leave = rules["copy"], rules["leave"]
        tree = patched(library, kernel.root)
        unused = {*copy, *leave}
        for path in git(tree, "ls-files").splitlines():
            fitting = {rule for rule in [*copy, *leave] if f"{path}/".startswith(f"{rule}/")}
            if not fitting:
                raise kernel.fault(f"{path} of {library} is neither copied nor left out.")
            unused -= fitting
            source = max(fitting & copy.keys(), key=len, default=None)
            target = "" if source is None else copy[source] + path.removeprefix(source)
            if max(fitting, key=len) in copy:
                add(tree / path, target)
            if path.endswith(".py"):
                modules[_module(path)] = target
        if unused:
            raise kernel.fault(f"{library} has no {', '.join(sorted(unused))}, which is named.")
    for path, target in kernel.overlays.items():
        if not (kernel.root / path).is_file():
            raise kernel.fault(f"There is no {path}, which is an overlay.")
        add(kernel.root / path, target)
        if path.endswith(".py"):
            modules[_module(path)] = target
    # Another file may stand in the place of a module that is left out.
    return copied, {name: path for name, path in modules.items() if path in ours | copied}


def _module(path: str) -> str:
    """The name of a Python file as a module."""
    return path.removesuffix(".py").removesuffix("/__init__").replace("/", ".")


def _agree(kernel: Kernel, files: dict[str, bytes]) -> None:
    """Raise if build.toml, the bindings and the Python files say different things."""
    build = tomllib.loads(files["build.toml"].decode())
    version = build["general"]["version"]
    if version != kernel.published + 1:
        raise kernel.fault(
            f"build.toml has version {version}, and {kernel.published} is the newest on the Hub; "
            f"needed: {kernel.published + 1}."
        )
    in_package = {path for path in files if path.startswith(f"{kernel.package}/")}
    sections = [build["torch"], *build["kernel"].values()]
    listed = [path for section in sections for path in section["src"]]
    found = {p for p in files.keys() - in_package if PurePosixPath(p).suffix in _COMPILED}
    if len(listed) != len(set(listed)) or found ^ set(listed):
        raise kernel.fault(
            "build.toml must name each source once; found otherwise: "
            f"{', '.join(sorted((found ^ set(listed)) or listed))}."
        )
    shipped = {f".{suffix}" for suffix in build["torch"].get("pyext", ["py", "pyi"])}
    if left := sorted(path for path in in_package if PurePosixPath(path).suffix not in shipped):
        raise kernel.fault(f"build.toml's pyext would leave out {', '.join(left)}.")
    python = {
        PurePosixPath(path).relative_to(kernel.package): files[path].decode()
        for path in in_package
        if path.endswith(".py")
    }
    modules = {PurePosixPath("_ops"), *(path.with_suffix("") for path in python)}
    modules |= {folder for path in python for folder in path.parents}
    for path, text in python.items():
        if missing := relative_imports(text, path) - modules:
            raise kernel.fault(f"{path} imports {', '.join(map(str, missing))}: no such file.")
    bindings = "".join(files[path].decode() for path in build["torch"]["src"])
    defined = set(re.findall(r'\bops\.def\(\s*"(\w+)\(', bindings))
    called = set[str]().union(*map(called_ops, python.values()))
    if defined != called:
        raise kernel.fault(
            f"The bindings define the ops {', '.join(sorted(defined))}; the Python files call "
            f"{', '.join(sorted(called)) or 'none'}."
        )


def _variant(kernel: Kernel, files: dict[str, bytes]) -> dict[str, bytes]:
    """The package as it is loaded on a CPU: with the files that kernel-builder adds."""
    general = tomllib.loads(files["build.toml"].decode())["general"]
    package = {path: files[path] for path in sorted(files) if path.startswith(f"{kernel.package}/")}
    digest = hashlib.sha256(repr((general, list(package.items()))).encode()).hexdigest()
    name = f"_{kernel.name.replace('-', '_')}_cpu_{digest[:10]}"
    metadata = {key: general[key] for key in ("name", "version", "license", "upstream")}
    metadata |= {"id": name, "backend": {"type": "cpu"}}
    metadata |= {"python-depends": general["python-depends"]}
    variant = {path.removeprefix(f"{kernel.package}/"): package[path] for path in package}
    variant["_ops.py"] = _OPS.format(name=name).encode()
    variant["metadata.json"] = f"{json.dumps(metadata, indent=2)}\n".encode()
    return {f"{_VARIANT}/{path}": content for path, content in variant.items()}

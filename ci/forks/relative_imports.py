"""Python files of libraries, rewritten for a package that is loaded from anywhere, by any name."""

from __future__ import annotations

import ast
import re
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import accumulate
from pathlib import PurePosixPath

# Of torch.library: their first argument names an op.
_NAMES_AN_OP = {"custom_op", "define", "impl", "register_autograd", "register_fake"}
_NAMES_AN_OP |= {"register_kernel", "register_vmap", "triton_op"}
# The module that kernel-builder adds to the package.
_OPS = PurePosixPath("_ops")


class RewriteError(Exception):
    """A file that cannot be rewritten; says what was found where."""


@dataclass(frozen=True)
class Package:
    """The modules from which the files of a package are made.

    Attributes:
        modules: Path, in the package, of each module of the libraries that is in it.
        compiled: The modules that `_ops.ops` stands for, and what their functions' names begin with
            there.
    """

    modules: dict[str, PurePosixPath]
    compiled: dict[str, str]

    def rewrite(self, source: str, module: str, path: PurePosixPath) -> str:
        """The text of a file of the package.

        Args:
            source: Its text in the library.
            module: Its name in the library.
            path: Where it lies in the package.

        Raises:
            RewriteError: It imports what is not in the package, or in a way that cannot be made
                relative, or names an op otherwise than by a text.
        """
        content, tree = source.encode(), ast.parse(source)
        starts = [0, *accumulate(map(len, content.splitlines(keepends=True)))]
        edits = []
        named = list(self._named_ops(tree, path))
        changes: list[tuple[ast.stmt | ast.expr, str]]
        changes = [*self._imports(source, tree, module, path), *self._called_ops(tree), *named]
        for node, text in changes:
            begin = starts[node.lineno - 1] + node.col_offset
            end = starts[(node.end_lineno or 0) - 1] + (node.end_col_offset or 0)
            edits.append((begin, end, text))
        if named:
            begin = starts[_first_import(tree) - 1]
            text = f"from {_relative(_OPS, path)} import add_op_namespace_prefix\n"
            edits.append((begin, begin, text))
        for begin, end, text in sorted(edits, reverse=True):
            content = content[:begin] + text.encode() + content[end:]
        return content.decode()

    def _imports(
        self, source: str, tree: ast.Module, module: str, path: PurePosixPath
    ) -> Iterator[tuple[ast.stmt, str]]:
        for node in ast.walk(tree):
            if isinstance(node, ast.ImportFrom):
                base = _absolute(node, module, path.name == "__init__.py")
                # What is relative and not of the library stands beside it in the package.
                if self._is_known(base) and (not node.level or base in self.modules):
                    text = ast.get_source_segment(source, node) or ""
                    yield node, self._from(node, text, base, path)
            elif isinstance(node, ast.Import):
                names = [alias for alias in node.names if self._is_known(alias.name)]
                if names and len(node.names) > 1:
                    raise RewriteError(f"{path}:{node.lineno} imports several modules at once")
                for alias in names:
                    yield node, self._import(alias, node.lineno, path)

    def _is_known(self, name: str) -> bool:
        """Return whether a module is one of those libraries' that the package is made of."""
        top = name.partition(".")[0]
        return top in self.compiled or any(m.partition(".")[0] == top for m in self.modules)

    def _from(self, node: ast.ImportFrom, text: str, base: str, path: PurePosixPath) -> str:
        statements: dict[str, list[str]] = {}
        renamed = False
        for alias in node.names:
            bound = alias.asname or alias.name
            if (found := self.modules.get(f"{base}.{alias.name}")) is not None:
                place, name = _folder_and_name(found)
            elif (found := self.modules.get(base)) is not None:
                place, name = PurePosixPath(*_folder_and_name(found)), alias.name
            else:
                raise RewriteError(
                    f"{path}:{node.lineno} imports {alias.name} of {base}, which is not copied"
                )
            renamed |= name != alias.name
            named = name if name == bound else f"{name} as {bound}"
            statements.setdefault(_relative(place, path), []).append(named)
        if len(statements) == 1 and not renamed:
            return re.sub(r"^from\s+\S+", f"from {next(iter(statements))}", text)
        return f"\n{' ' * node.col_offset}".join(
            f"from {module} import {', '.join(names)}" for module, names in statements.items()
        )

    def _import(self, alias: ast.alias, line: int, path: PurePosixPath) -> str:
        bound = alias.asname or alias.name
        if alias.name in self.compiled and bound == alias.name:
            return f"from {_relative(_OPS, path)} import ops as {bound}"
        found = self.modules.get(alias.name)
        folder, name = _folder_and_name(found) if found else (_OPS, "")
        if not name or "." in bound:
            raise RewriteError(
                f"{path}:{line} imports {alias.name}, which is not copied, or in a way that cannot "
                "be made relative"
            )
        return f"from {_relative(folder, path)} import {name} as {bound}"

    def _called_ops(self, tree: ast.Module) -> Iterator[tuple[ast.expr, str]]:
        """The functions of compiled modules, by their names as ops."""
        for node in ast.walk(tree):
            if isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name):
                module = node.value.id
                if self.compiled.get(module):
                    yield node, f"{module}.{self.compiled[module]}{node.attr}"

    def _named_ops(self, tree: ast.Module, path: PurePosixPath) -> Iterator[tuple[ast.expr, str]]:
        """Texts that name an op, with the namespace that is the package's own."""
        for node in ast.walk(tree):
            if not isinstance(node, ast.Call):
                continue
            function = ast.unparse(node.func)
            library, _, name = function.rpartition(".")
            if library == "torch.library" and name in _NAMES_AN_OP:
                text = ast.unparse(node.args[0]) if node.args else "nothing"
                op = text.rstrip("\"'").rpartition("::")[2]
                if "::" not in text or not op.isidentifier():
                    raise RewriteError(
                        f"{path}:{node.lineno} has {function} of {text}, and not of a text "
                        "NAMESPACE::NAME"
                    )
                yield node.args[0], f'add_op_namespace_prefix("{op}")'


def called_ops(source: str) -> set[str]:
    """The ops that a file of the package calls, as attributes of what it imports as `ops`."""
    tree = ast.parse(source)
    names = {
        alias.asname or alias.name
        for node in ast.walk(tree)
        if isinstance(node, ast.ImportFrom) and node.level and node.module == "_ops"
        for alias in node.names
        if alias.name == "ops"
    }
    return {
        node.attr
        for node in ast.walk(tree)
        if isinstance(node, ast.Attribute)
        and isinstance(node.value, ast.Name)
        and node.value.id in names
    }


def relative_imports(source: str, path: PurePosixPath) -> set[PurePosixPath]:
    """Say what a file of the package imports from it: modules or folders, without their endings."""
    return {
        PurePosixPath(*path.parts[: -node.level], *(node.module or "").split("."))
        for node in ast.walk(ast.parse(source))
        if isinstance(node, ast.ImportFrom) and node.level
    }


def _first_import(tree: ast.Module) -> int:
    """The line of the first import that is not from __future__."""
    return next(
        node.lineno
        for node in tree.body
        if isinstance(node, ast.Import)
        or (isinstance(node, ast.ImportFrom) and node.module != "__future__")
    )


def _absolute(node: ast.ImportFrom, module: str, is_package: bool) -> str:
    """The full name of the module that a statement imports from."""
    parts = module.split(".")
    if node.level:
        parts = parts[: len(parts) - node.level + is_package]
        return ".".join([*parts, node.module] if node.module else parts)
    return node.module or ""


def _folder_and_name(path: PurePosixPath) -> tuple[PurePosixPath, str]:
    """The folder in which a module lies, and its name there; no name for the package itself."""
    found = path.parent if path.name == "__init__.py" else path.with_suffix("")
    return found.parent, found.name


def _relative(target: PurePosixPath, path: PurePosixPath) -> str:
    """Say what stands after `from` in a file, for a module or a folder of the package."""
    here, there = path.parent.parts, target.parts
    common = 0
    while common < min(len(here), len(there)) and here[common] == there[common]:
        common += 1
    return "." * (len(here) - common + 1) + ".".join(there[common:])

"""A copy of the sources of one family of the installed transformers, to be rewritten.

Each place to change is named, by class and function. Where it is not found as often as expected,
`DoesNotApply` is raised, so that an unchanged source never passes for a rewritten one.
"""

from __future__ import annotations

import ast
import re
from collections.abc import Collection, Iterator
from dataclasses import dataclass, field
from importlib.util import find_spec
from pathlib import Path


class DoesNotApply(Exception):
    """Raised where the installed sources lack the place that a mutation changes."""


@dataclass(frozen=True)
class Parts:
    """The names of the parts of a family's modeling module.

    Attributes:
        mixer, block, body, head: The recurrent layer, the block that holds it, the model, the
            language model.
        scan: The function of the recurrence.
        output: The class of the model's output; None where it is one that others share.
        states: The names that a state may have in a forward and in an output.
        carriers: The classes through which the state is handed on, from the model to the layers.
        calls: The calls with which they do that.
    """

    mixer: str
    block: str
    body: str
    head: str
    scan: str
    output: str | None
    states: tuple[str, ...]
    carriers: tuple[str, ...]
    calls: tuple[str, ...]


_CACHES = ("cache", "cache_params", "past_key_values")


def _named(
    prefix: str,
    mixer: str,
    block: str,
    scan: str,
    calls: tuple[str, ...],
    output: str | None = "Output",
    states: tuple[str, ...] = _CACHES,
    others: tuple[str, ...] = (),
) -> Parts:
    body, head = f"{prefix}Model", f"{prefix}ForCausalLM"
    mixer, block, output = prefix + mixer, prefix + block, output and prefix + output
    carriers = (mixer, *(prefix + name for name in others), block) if calls else ()
    return Parts(mixer, block, body, head, scan, output, states, (*carriers, body), calls)


FAMILIES = {
    "mamba2": _named(
        "Mamba2", "Mixer", "Block", "mamba2_chunk_scan", ("self.mixer", "mixer_block")
    ),
    "mamba": _named(
        "Mamba", "Mixer", "Block", "mamba_selective_scan", ("self.mixer", "mixer_block")
    ),
    "bamba": _named(
        "Bamba",
        "Mixer",
        "DecoderLayer",
        "mamba2_chunk_scan",
        ("self.mamba", "self.self_attn", "decoder_layer"),
        output=None,
        others=("Attention",),
    ),
    "rwkv": _named(
        "Rwkv",
        "SelfAttention",
        "Block",
        "rwkv_linear_attention",
        ("self.attention", "self.feed_forward", "self.extract_key_value", "block"),
        states=("state",),
        others=("FeedForward",),
    ),
    # Its blocks receive tensors instead.
    "xlstm": _named("xLSTM", "Layer", "Block", "xLSTMBackend.forward", ()),
}


@dataclass
class Copy:
    """The sources of a family, to be mutated.

    Attributes:
        family: Its model type.
        sources: The modules that differ from the installed ones, by name.
        argument, output: The model's names for its state, as an argument and in the output.
        settings: Settings that the configuration of the model needs.
    """

    family: str
    sources: dict[str, str] = field(default_factory=dict)
    argument: str = ""
    output: str = ""
    settings: dict[str, object] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self.text = installed(self.module)
        (body,) = find(ast.parse(self.text), f"{self.parts.body}.forward")
        names = [argument.arg for argument in arguments(body) if argument.arg in self.parts.states]
        if len(names) != 1:
            raise DoesNotApply(f"{self.parts.body}.forward takes its state as {names}")
        self.argument = self.output = names[0]

    @property
    def parts(self) -> Parts:
        """Return the names of its parts."""
        return FAMILIES[self.family]

    @property
    def module(self) -> str:
        """Return the name of its modeling module."""
        return f"transformers.models.{self.family}.modeling_{self.family}"

    @property
    def is_shared(self) -> bool:
        """Return whether a module is changed that other families use too."""
        return any(not name.startswith("transformers.models.") for name in self.sources)

    @property
    def text(self) -> str:
        """Return the modeling module's source."""
        return self.sources[self.module]

    @text.setter
    def text(self, text: str) -> None:
        self.sources[self.module] = text

    def sub_all(self, module: str, pattern: str, new: str) -> None:
        """Replace all matches of a pattern in a module; there must be at least one."""
        text = self.sources.get(module) or installed(module)
        self.sources[module], found = re.subn(pattern, new, text)
        if not found:
            raise DoesNotApply(f"{module} has no {pattern!r}")

    def span(self, where: str) -> tuple[int, int]:
        """Return the first line of a class or function, its decorators included, and its end."""
        nodes = find(ast.parse(self.text), where)
        if len(nodes) != 1:
            raise DoesNotApply(f"{self.module} has {len(nodes)} {where}")
        node = nodes[0]
        first = min([node.lineno, *(decorator.lineno for decorator in node.decorator_list)])
        assert node.end_lineno is not None
        return first - 1, node.end_lineno

    def sub(self, where: str, pattern: str, new: str, times: int = 1) -> None:
        """Replace a pattern's matches in a class or function; there must be exactly `times`."""
        lines = self.text.splitlines(keepends=True)
        first, last = self.span(where)
        inside, found = re.subn(pattern, new, "".join(lines[first:last]), flags=re.MULTILINE)
        if found != times:
            raise DoesNotApply(f"{self.module}: {where} has {pattern!r} {found} times, not {times}")
        self.text = "".join([*lines[:first], inside, *lines[last:]])

    def swap(self, where: str, old: str, new: str, times: int = 1) -> None:
        """Replace a text in a class or function; it must occur exactly `times`."""
        self.sub(where, re.escape(old), new.replace("\\", r"\\"), times)

    def rename(
        self, names: Collection[str], new: str, within: Collection[str], calls: Collection[str] = ()
    ) -> None:
        """Rename variables and parameters.

        Args:
            names: Their present names.
            new: Their new name.
            within: The classes and functions in which they are.
            calls: Functions, as they are called, whose keyword arguments are renamed.
        """
        tree = ast.parse(self.text)
        places: set[tuple[int, int, str]] = set()
        for where in within:
            nodes = find(tree, where)
            own = {place for node in nodes for place in variables(node, names)}
            if not own:
                raise DoesNotApply(f"{self.module}: {where} has no {', '.join(names)}")
            places |= own
        for function in calls:
            own = set(keywords(tree, function, names))
            if not own:
                raise DoesNotApply(f"{self.module}: nobody calls {function} with {names}")
            places |= own
        self._write(places, new)

    def rename_read(self, where: str, names: Collection[str], new: str) -> None:
        """Rename the attribute that is read from a variable whose name ends in "outputs"."""
        places = {
            (node.end_lineno, node.end_col_offset - len(node.attr), node.attr)
            for scope in find(ast.parse(self.text), where)
            for node in ast.walk(scope)
            if isinstance(node, ast.Attribute)
            and isinstance(node.value, ast.Name)
            and node.value.id.endswith("outputs")
            and node.attr in names
            and node.end_lineno is not None
            and node.end_col_offset is not None
        }
        if not places:
            raise DoesNotApply(f"{self.module}: {where} reads no {', '.join(names)}")
        self._write(places, new)

    def _write(self, places: set[tuple[int, int, str]], new: str) -> None:
        lines = [line.encode() for line in self.text.splitlines(keepends=True)]
        for line, column, old in sorted(places, reverse=True):
            text = lines[line - 1]
            assert text[column : column + len(old)] == old.encode()
            lines[line - 1] = text[:column] + new.encode() + text[column + len(old) :]
        self.text = b"".join(lines).decode()

    def bring_in(self, line: str) -> None:
        """Add an import."""
        pattern = rf"^(from \.configuration_{self.family} import .*)$"
        self.text, found = re.subn(pattern, rf"{line}\n\1", self.text, flags=re.MULTILINE)
        if found != 1:
            raise DoesNotApply(f"{self.module} imports its configuration {found} times")


def installed(module: str) -> str:
    """Return the source of an installed module, without importing it."""
    spec = find_spec(module)
    if spec is None or spec.origin is None:
        raise DoesNotApply(f"there is no {module}")
    return Path(spec.origin).read_text(encoding="utf-8")


Definition = ast.ClassDef | ast.FunctionDef


def find(tree: ast.AST, where: str) -> list[Definition]:
    """Return the classes and functions of that name; a dot leads into a class."""
    name, _, rest = where.partition(".")
    found = [
        node for node in _definitions(tree) if isinstance(node, Definition) and node.name == name
    ]
    return [inner for node in found for inner in find(node, rest)] if rest else found


def _definitions(tree: ast.AST) -> Iterator[ast.AST]:
    for node in ast.iter_child_nodes(tree):
        if isinstance(node, Definition):
            yield node
        elif isinstance(node, ast.If):
            yield from _definitions(node)


def arguments(function: ast.AST) -> list[ast.arg]:
    """Return the parameters of a function, without those with stars."""
    assert isinstance(function, ast.FunctionDef)
    return [*function.args.posonlyargs, *function.args.args, *function.args.kwonlyargs]


def variables(tree: ast.AST, names: Collection[str]) -> Iterator[tuple[int, int, str]]:
    """Yield line, column and name of each use of a variable or parameter."""
    for node in ast.walk(tree):
        if isinstance(node, ast.arg) and node.arg in names:
            yield node.lineno, node.col_offset, node.arg
        elif isinstance(node, ast.Name) and node.id in names:
            yield node.lineno, node.col_offset, node.id


def keywords(
    tree: ast.AST, function: str, names: Collection[str]
) -> Iterator[tuple[int, int, str]]:
    """Yield line, column and name of the keyword arguments in the calls of a function."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Call) and ast.unparse(node.func) == function:
            for keyword in node.keywords:
                if keyword.arg in names:
                    yield keyword.lineno, keyword.col_offset, str(keyword.arg)

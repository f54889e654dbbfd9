"""What the next transformers may do to a model: its installed sources, with one change each.

A mutation is written for a `Copy` of the sources of one family. It names the place that it changes;
where that place is not found as often as expected, `DoesNotApply` is raised, so that no source is
ever taken for mutated that is not.
"""

from __future__ import annotations

import ast
import re
from collections.abc import Callable, Collection, Iterator
from dataclasses import dataclass, field
from importlib.util import find_spec
from pathlib import Path

HARMLESS, MEANING = "harmless", "meaning"


class DoesNotApply(Exception):
    """The installed sources do not have the place that a mutation is about."""


@dataclass(frozen=True)
class Parts:
    """What the parts of a family's modeling module are called.

    Attributes:
        mixer, block, body, head: The recurrent layer, what holds it, the model, the language model.
        scan: The function of the recurrence.
        output: The class of what the model returns; None where it is one that others share.
        states: What a state may be called in a forward and in an output.
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
FAMILIES = {
    "mamba2": Parts(
        "Mamba2Mixer",
        "Mamba2Block",
        "Mamba2Model",
        "Mamba2ForCausalLM",
        "mamba2_chunk_scan",
        "Mamba2Output",
        _CACHES,
        ("Mamba2Mixer", "Mamba2Block", "Mamba2Model"),
        ("self.mixer", "mixer_block"),
    ),
    "mamba": Parts(
        "MambaMixer",
        "MambaBlock",
        "MambaModel",
        "MambaForCausalLM",
        "mamba_selective_scan",
        "MambaOutput",
        _CACHES,
        ("MambaMixer", "MambaBlock", "MambaModel"),
        ("self.mixer", "mixer_block"),
    ),
    "bamba": Parts(
        "BambaMixer",
        "BambaDecoderLayer",
        "BambaModel",
        "BambaForCausalLM",
        "mamba2_chunk_scan",
        None,
        _CACHES,
        ("BambaMixer", "BambaAttention", "BambaDecoderLayer", "BambaModel"),
        ("self.mamba", "self.self_attn", "decoder_layer"),
    ),
    "rwkv": Parts(
        "RwkvSelfAttention",
        "RwkvBlock",
        "RwkvModel",
        "RwkvForCausalLM",
        "rwkv_linear_attention",
        "RwkvOutput",
        ("state",),
        ("RwkvSelfAttention", "RwkvFeedForward", "RwkvBlock", "RwkvModel"),
        ("self.attention", "self.feed_forward", "self.extract_key_value", "block"),
    ),
    "xlstm": Parts(
        "xLSTMLayer",
        "xLSTMBlock",
        "xLSTMModel",
        "xLSTMForCausalLM",
        "xLSTMBackend.forward",
        "xLSTMOutput",
        _CACHES,
        ("xLSTMModel",),
        (),
    ),
}
MAMBA2 = ("mamba2", "bamba")
MAMBAS = ("mamba2", "mamba", "bamba")
SCANS = (*MAMBAS, "rwkv")
ALL = tuple(FAMILIES)


@dataclass
class Copy:
    """The sources of a family, to be mutated.

    Attributes:
        family: Its model type.
        sources: The modules that differ from the installed ones, by name.
        argument, output: What the model calls its state, going in and coming out.
    """

    family: str
    sources: dict[str, str] = field(default_factory=dict)
    argument: str = ""
    output: str = ""

    def __post_init__(self) -> None:
        spec = find_spec(self.module)
        assert spec is not None
        assert spec.origin is not None
        self.text = Path(spec.origin).read_text(encoding="utf-8")
        (body,) = find(ast.parse(self.text), f"{self.parts.body}.forward")
        names = [argument.arg for argument in arguments(body) if argument.arg in self.parts.states]
        if len(names) != 1:
            raise DoesNotApply(f"{self.parts.body}.forward takes its state as {names}")
        self.argument = self.output = names[0]

    @property
    def parts(self) -> Parts:
        """What its parts are called."""
        return FAMILIES[self.family]

    @property
    def module(self) -> str:
        """The name of its modeling module."""
        return f"transformers.models.{self.family}.modeling_{self.family}"

    @property
    def text(self) -> str:
        """The modeling module's source."""
        return self.sources[self.module]

    @text.setter
    def text(self, text: str) -> None:
        self.sources[self.module] = text

    def span(self, where: str) -> tuple[int, int]:
        """The lines of a class or function, decorators included: the first, and the one after."""
        nodes = find(ast.parse(self.text), where)
        if len(nodes) != 1:
            raise DoesNotApply(f"{self.module} has {len(nodes)} {where}")
        node = nodes[0]
        first = min([node.lineno, *(decorator.lineno for decorator in node.decorator_list)])
        assert node.end_lineno is not None
        return first - 1, node.end_lineno

    def sub(self, where: str, pattern: str, new: str, times: int = 1) -> None:
        """Replace what a pattern matches in a class or function; so often, and no more."""
        lines = self.text.splitlines(keepends=True)
        first, last = self.span(where)
        inside, found = re.subn(pattern, new, "".join(lines[first:last]), flags=re.MULTILINE)
        if found != times:
            raise DoesNotApply(f"{self.module}: {where} has {pattern!r} {found} times, not {times}")
        self.text = "".join([*lines[:first], inside, *lines[last:]])

    def swap(self, where: str, old: str, new: str, times: int = 1) -> None:
        """Replace a text in a class or function; so often, and no more."""
        self.sub(where, re.escape(old), new.replace("\\", r"\\"), times)

    def rename(
        self, names: Collection[str], new: str, within: Collection[str], calls: Collection[str] = ()
    ) -> None:
        """Rename variables and parameters.

        Args:
            names: What they are called.
            new: What they are to be called.
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


Definition = ast.ClassDef | ast.FunctionDef


def find(tree: ast.AST, where: str) -> list[Definition]:
    """The classes and functions of that name, of which a dot leads into a class."""
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
    """The parameters of a function, but for those with stars."""
    assert isinstance(function, ast.FunctionDef)
    return [*function.args.posonlyargs, *function.args.args, *function.args.kwonlyargs]


def variables(tree: ast.AST, names: Collection[str]) -> Iterator[tuple[int, int, str]]:
    """Line, column and name of each use of a variable or parameter."""
    for node in ast.walk(tree):
        if isinstance(node, ast.arg) and node.arg in names:
            yield node.lineno, node.col_offset, node.arg
        elif isinstance(node, ast.Name) and node.id in names:
            yield node.lineno, node.col_offset, node.id


def keywords(
    tree: ast.AST, function: str, names: Collection[str]
) -> Iterator[tuple[int, int, str]]:
    """Line, column and name of the keyword arguments in the calls of a function."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Call) and ast.unparse(node.func) == function:
            for keyword in node.keywords:
                if keyword.arg in names:
                    yield keyword.lineno, keyword.col_offset, str(keyword.arg)


@dataclass(frozen=True)
class Mutation:
    """One change.

    Attributes:
        name: What is changed.
        kind: `HARMLESS` where the model computes what it did, `MEANING` where it does not.
        families: Where it is made.
        make: Makes it.
    """

    name: str
    kind: str
    families: tuple[str, ...]
    make: Callable[[Copy], None]

    def applied(self, family: str) -> Copy:
        """The mutated sources of a family.

        Raises:
            DoesNotApply: They do not have the place.
        """
        copy = Copy(family)
        before = copy.text
        self.make(copy)
        if copy.text == before and self is not MUTATIONS[UNCHANGED]:
            raise DoesNotApply(f"{self.name} leaves {copy.module} as it is")
        return copy


MUTATIONS: dict[str, Mutation] = {}
UNCHANGED = "nothing is changed"


def mutation(
    name: str, kind: str, families: tuple[str, ...]
) -> Callable[[Callable[[Copy], None]], Callable[[Copy], None]]:
    """Put a function into `MUTATIONS`."""

    def put(make: Callable[[Copy], None]) -> Callable[[Copy], None]:
        MUTATIONS[name] = Mutation(name, kind, families, make)
        return make

    return put


@mutation(UNCHANGED, HARMLESS, ALL)
def _unchanged(copy: Copy) -> None:
    pass


# The state's name.

UNKNOWN = "memory"  # What no release has called it.


def _elsewhere(copy: Copy) -> str:
    """What the state is called in another family."""
    return "cache" if copy.family == "rwkv" else "state"


def _rename_argument(copy: Copy, new: str) -> None:
    parts = copy.parts
    copy.rename(parts.states, new, parts.carriers, parts.calls)
    base = {"bamba": "self.model", "rwkv": "self.rwkv"}.get(copy.family, "self.backbone")
    copy.rename((copy.argument,), new, (), [base])  # The language model keeps the name.
    copy.argument = new


def _rename_output(copy: Copy, new: str) -> None:
    parts = copy.parts
    output = parts.output
    if output is None:
        output = f"{parts.body}Output"
        copy.swap(f"{parts.body}.forward", "return BaseModelOutputWithPast(", f"return {output}(")
        fields = ("last_hidden_state: torch.Tensor", copy.output, "hidden_states", "attentions")
        text = "".join(
            f"    {name} | None = None\n" if ":" in name else f"    {name}: object = None\n"
            for name in fields
        )
        copy.bring_in("from dataclasses import dataclass\nfrom ...utils import ModelOutput")
        start = copy.span(parts.body)[0]
        lines = copy.text.splitlines(keepends=True)
        lines.insert(start, f"@dataclass\nclass {output}(ModelOutput):\n{text}\n\n")
        copy.text = "".join(lines)
    copy.rename((copy.output,), new, [output], [output])
    copy.rename_read(copy.parts.head, (copy.output,), new)
    copy.output = new


def _deprecate(copy: Copy, new: str, old: dict[str, str]) -> None:
    """Let the forwards of some classes take the state's old name, with a warning."""
    if "import deprecate_kwarg" not in copy.text:
        copy.bring_in("from ...utils.deprecation import deprecate_kwarg")
    for name, was in old.items():
        where = f"{name}.forward"
        line = rf'\1@deprecate_kwarg("{was}", "9.0.0", new_name="{new}")' + "\n"
        copy.sub(where, r"^( +)(?=def forward\()", line + r"\1")
        forward = re.escape(f'new_name="{was}"')
        if f'new_name="{was}"' in _inside(copy, where):
            copy.sub(where, forward, f'new_name="{new}"')


def _undeprecate(copy: Copy) -> None:
    """Let no old name of the state's through but as one of `**kwargs`."""
    for name in copy.parts.carriers:
        if "@deprecate_kwarg" in _inside(copy, f"{name}.forward"):
            copy.sub(f"{name}.forward", r"^ +@deprecate_kwarg\(.*\)\n", "")


def _inside(copy: Copy, where: str) -> str:
    first, last = copy.span(where)
    return "".join(copy.text.splitlines(keepends=True)[first:last])


@mutation("the state renamed; its old name deprecated", HARMLESS, ALL)
def _renamed_and_deprecated(copy: Copy) -> None:
    tree, old = ast.parse(copy.text), {}
    for name in copy.parts.carriers:
        (forward,) = find(tree, f"{name}.forward")
        (old[name],) = (a.arg for a in arguments(forward) if a.arg in copy.parts.states)
    _rename_output(copy, UNKNOWN)
    _rename_argument(copy, UNKNOWN)
    _deprecate(copy, UNKNOWN, old)


@mutation("the state renamed; its old name dropped", HARMLESS, ALL)
def _renamed(copy: Copy) -> None:
    _undeprecate(copy)
    _rename_output(copy, UNKNOWN)
    _rename_argument(copy, UNKNOWN)


@mutation("the state renamed to what another family calls it", HARMLESS, ALL)
def _renamed_as_elsewhere(copy: Copy) -> None:
    _undeprecate(copy)
    _rename_output(copy, _elsewhere(copy))
    _rename_argument(copy, _elsewhere(copy))


@mutation("the state renamed in what the model takes", HARMLESS, ALL)
def _renamed_argument(copy: Copy) -> None:
    _undeprecate(copy)
    _rename_argument(copy, UNKNOWN)


@mutation("the state renamed in what the model returns", HARMLESS, ALL)
def _renamed_output(copy: Copy) -> None:
    _rename_output(copy, UNKNOWN)


@mutation("the state renamed below the model only", HARMLESS, ALL)
def _renamed_below(copy: Copy) -> None:
    parts = copy.parts
    if copy.family == "xlstm":
        copy.rename(("state",), UNKNOWN, [parts.block, parts.mixer], ["xlstm_block"])
        return
    below = [name for name in parts.carriers if name != parts.body]
    for name in below:
        if "@deprecate_kwarg" in _inside(copy, f"{name}.forward"):
            copy.sub(f"{name}.forward", r"^ +@deprecate_kwarg\(.*\)\n", "")
    copy.rename(parts.states, UNKNOWN, below, parts.calls)


@mutation("the scan's state renamed", HARMLESS, (*MAMBA2, "rwkv", "xlstm"))
def _renamed_in_scan(copy: Copy) -> None:
    old = {"rwkv": "state", "xlstm": "c_initial"}.get(copy.family, "initial_states")
    call = {"xlstm": "self.mlstm_backend"}.get(copy.family, copy.parts.scan)
    copy.rename((old,), "first", [copy.parts.scan], [call])


@mutation("the attribute of the cache renamed", HARMLESS, ("xlstm",))
def _cache_attribute(copy: Copy) -> None:
    copy.text, found = re.subn(r"(?<=\.)rnn_state\b", "held", copy.text)
    if not found:
        raise DoesNotApply(f"{copy.module} has no rnn_state")


# Arguments.


@mutation("the mixer's arguments in another order", HARMLESS, ALL)
def _mixer_reordered(copy: Copy) -> None:
    if copy.family == "rwkv":
        where = "RwkvSelfAttention.forward"
        copy.swap(where, "state=None, use_cache=False", "use_cache=False, state=None")
    elif copy.family == "xlstm":
        copy.sub(copy.parts.scan, r"^( +query: torch.*\n)( +key: torch.*\n)", r"\2\1")
    else:
        where, state = f"{copy.parts.mixer}.forward", "|".join(copy.parts.states)
        copy.sub(where, rf"^( +(?:{state}): .*\n)( +attention_mask: .*\n)", r"\2\1")


@mutation("the mixer's arguments by keyword only", HARMLESS, ALL)
def _mixer_keyword_only(copy: Copy) -> None:
    if copy.family == "rwkv":
        copy.swap("RwkvSelfAttention.forward", "hidden, state=None", "hidden, *, state=None")
    elif copy.family == "xlstm":
        copy.sub(copy.parts.scan, r"^( +)(query: torch.*\n)", r"\1*,\n\1\2")
    else:
        where, state = f"{copy.parts.mixer}.forward", "|".join(copy.parts.states)
        copy.sub(where, rf"^( +)((?:{state}): .*\n)", r"\1*,\n\1\2")


@mutation("the scan's arguments in another order", HARMLESS, SCANS)
def _scan_reordered(copy: Copy) -> None:
    parts = copy.parts
    if copy.family == "rwkv":
        copy.swap(parts.scan, "key, value, state=None", "value, key, state=None")
        copy.sub(f"{parts.mixer}.forward", r"^( +key,\n)( +value,\n)", r"\2\1")
    else:
        copy.sub(parts.scan, r"^( +B: .*\n)( +C: .*\n)", r"\2\1")
        call = r"^( +B\.(?:view|transpose)\(.*\n)( +C\.(?:view|transpose)\(.*\n)(?=(?: +chunk| +D=))"
        copy.sub(f"{parts.mixer}.forward", call, r"\2\1")


@mutation("the scan's arguments by keyword only", HARMLESS, SCANS)
def _scan_keyword_only(copy: Copy) -> None:
    parts = copy.parts
    if copy.family == "rwkv":
        names = "time_decay", "time_first", "key", "value"
        copy.swap(parts.scan, f"def {parts.scan}(", f"def {parts.scan}(*, ")
    else:
        names = "hidden_states", "dt", "A", "B", "C"
        copy.sub(parts.scan, r"^( +)(hidden_states: torch)", r"\1*,\n\1\2")
    pattern = rf"({parts.scan}\(\n)" + r"( +)(.*,\n)" * len(names)
    new = r"\1" + "".join(rf"\{2 * n + 2}{name}=\{2 * n + 3}" for n, name in enumerate(names))
    copy.sub(f"{parts.mixer}.forward", pattern, new)


def _mixer_takes(copy: Copy, value: str) -> None:
    """Let the block pass the mixer a new argument, which is a factor, or None."""
    parts, forward = copy.parts, f"{copy.parts.mixer}.forward"
    factor = "(1.0 if scale is None else scale)"
    if copy.family == "rwkv":
        call = "state=state, use_cache=use_cache"
        copy.swap("RwkvBlock.forward", call, f"{call}, scale={value}")
        copy.swap(forward, "use_cache=False)", "use_cache=False, scale=None)")
        copy.swap(forward, "(receptance * rwkv), state", f"(receptance * rwkv) * {factor}, state")
    elif copy.family == "xlstm":
        copy.swap("xLSTMBlock.forward", "(x_mlstm, state)", f"(x_mlstm, state, scale={value})")
        copy.swap(forward, "StateType | None = None", "StateType | None = None, scale=None")
        copy.swap(forward, "return y, state", f"return y * {factor}, state")
    else:
        call = r"(self\.(?:mixer|mamba)\([^)]*?attention_mask=attention_mask)"
        copy.sub(f"{parts.block}.forward", call, rf"\1, scale={value}")
        copy.sub(forward, r"^( +)(attention_mask: .*\n)", r"\1\2\1scale=None,\n")
        copy.swap(forward, "return contextualized_states", f"return contextualized_states * {factor}")


@mutation("a new argument for the mixer, None", HARMLESS, ALL)
def _mixer_takes_none(copy: Copy) -> None:
    _mixer_takes(copy, "None")


@mutation("a new argument for the mixer, a factor", MEANING, ALL)
def _mixer_takes_factor(copy: Copy) -> None:
    _mixer_takes(copy, "0.5")


def _scan_takes(copy: Copy, value: str) -> None:
    """Let the mixer pass the scan a new argument, which is a factor, or None."""
    parts, forward = copy.parts, f"{copy.parts.mixer}.forward"
    if copy.family == "rwkv":
        copy.swap(parts.scan, "return_state=False)", "return_state=False, scale=None)")
        copy.swap(forward, "return_state=use_cache,", f"return_state=use_cache, scale={value},")
        copy.sub(parts.scan, r"^( +)(no_cuda = )", r"\1value = value * (scale or 1.0)\n\1\2")
    elif copy.family == "xlstm":
        copy.sub(parts.scan, r"^( +)(m_initial: torch.*\n)", r"\1\2\1scale=None,\n")
        copy.swap(forward, "m_initial=m_initial,", f"m_initial=m_initial, scale={value},")
        copy.sub(
            parts.scan, r"^( +)(if mode is None:)", r"\1value = value * (scale or 1.0)\n\1\2"
        )
    else:
        name, result, before = {
            "mamba": ("return_last_state", "scan_output", "D"),
        }.get(copy.family, ("return_final_states", "output", "D_residual"))
        copy.sub(parts.scan, rf"^( +)({name}: .*\n)", r"\1\2\1scale=None,\n")
        copy.swap(forward, f"{name}=output_final_state,", f"{name}=output_final_state, scale={value},")
        copy.sub(
            parts.scan,
            rf"^( +)(if {before} is not None:\n +{result} = )",
            rf"\1{result} = {result} * (scale or 1.0)\n\1\2",
        )


@mutation("a new argument for the scan, None", HARMLESS, ALL)
def _scan_takes_none(copy: Copy) -> None:
    _scan_takes(copy, "None")


@mutation("a new argument for the scan, a factor", MEANING, ALL)
def _scan_takes_factor(copy: Copy) -> None:
    _scan_takes(copy, "0.5")


# Where things are.


def _move_scan(copy: Copy) -> str:
    """Move the scan into a module of its own, and return that module's name."""
    parts = copy.parts
    lines = copy.text.splitlines(keepends=True)
    new = f"scan_{copy.family}"
    # All that stands before the mixer, which is more than the scan needs.
    text = "".join(lines[: copy.span(parts.mixer)[0]])
    copy.sources[f"transformers.models.{copy.family}.{new}"] = text
    first, last = copy.span(parts.scan)
    copy.text = "".join([*lines[:first], *lines[last:]])
    return new


@mutation("the scan in another module, imported by name", HARMLESS, SCANS)
def _moved_by_name(copy: Copy) -> None:
    copy.bring_in(f"from .{_move_scan(copy)} import {copy.parts.scan}")


@mutation("the scan in another module, called through it", HARMLESS, SCANS)
def _moved(copy: Copy) -> None:
    new = _move_scan(copy)
    copy.text = re.sub(rf"\b{copy.parts.scan}\b(?!_)", rf"{new}.{copy.parts.scan}", copy.text)
    copy.bring_in(f"from . import {new}")


@mutation("a local variable renamed", HARMLESS, ALL)
def _local_renamed(copy: Copy) -> None:
    old = {"rwkv": "receptance", "xlstm": "i_preact"}.get(copy.family, "projected_states")
    copy.rename((old,), "renamed", [f"{copy.parts.mixer}.forward"])


@mutation("two statements in another order", HARMLESS, ALL)
def _statements_swapped(copy: Copy) -> None:
    where, pair = f"{copy.parts.mixer}.forward", r"^( +.*hidden_states\.shape.*\n)( +dtype = .*\n)"
    if copy.family == "rwkv":
        where, pair = "RwkvSelfAttention.extract_key_value", r"^( +key = self.*\n)( +value = .*\n)"
    elif copy.family == "xlstm":
        pair = r"^( +query = query\.reshape.*\n)( +key = key\.reshape.*\n)"
    copy.sub(where, pair, r"\2\1")


# What is computed.


@mutation("time steps not clamped by the scan", MEANING, MAMBA2)
def _no_clamp(copy: Copy) -> None:
    copy.sub(copy.parts.scan, r"^ +dt = torch\.clamp\(.*\n", "")


@mutation("time steps not clamped, as the mixer drops dt_limit", MEANING, MAMBA2)
def _no_limit(copy: Copy) -> None:
    copy.sub(f"{copy.parts.mixer}.forward", r"^ +dt_limit=self\.time_step_limit,\n", "")


@mutation("the initial state ignored by the scan", MEANING, (*MAMBA2, "rwkv", "xlstm"))
def _no_initial_state(copy: Copy) -> None:
    if copy.family == "rwkv":
        copy.swap("rwkv_linear_attention_cpu", "if state is None:", "if True:")
    elif copy.family == "xlstm":
        copy.swap(copy.parts.scan, "c_initial=c_initial,", "c_initial=None,", 2)
    else:
        copy.swap(copy.parts.scan, "if initial_states is not None", "if False")


@mutation("the initial state taken by the scan, under a new name", MEANING, ("mamba",))
def _initial_state(copy: Copy) -> None:
    scan, forward = copy.parts.scan, f"{copy.parts.mixer}.forward"
    copy.sub(scan, r"^( +)(return_last_state: .*\n)", r"\1\2\1first_state=None,\n")
    start = r"\1if first_state is not None:\n\1    ssm_state = first_state\n\1\2"
    copy.sub(scan, r"^( +)(scan_outputs = \[\]\n)", start)
    call = "return_last_state=output_final_state,"
    copy.swap(forward, call, f"{call} first_state=recurrent_state,")


@mutation("no activation after the convolution", MEANING, MAMBAS)
def _no_activation(copy: Copy) -> None:
    for name in ("causal_conv1d_fn", "causal_conv1d_update"):
        copy.swap(name, "if activation is not None:", "if False:")


@mutation("the gated norm over all groups", MEANING, MAMBA2)
def _one_group(copy: Copy) -> None:
    norm = {"mamba2": "MambaRMSNormGated"}.get(copy.family, "BambaRMSNormGated")
    copy.swap(f"{norm}.forward", "self.group_size", "last_dim", 3)


@mutation("D not added", MEANING, MAMBAS)
def _no_skip(copy: Copy) -> None:
    if copy.family == "mamba":
        copy.swap(copy.parts.scan, "if D is not None:", "if False:")
    else:
        copy.swap(copy.parts.scan, "if D_residual is not None:", "if False:")
    step = {"mamba": "mamba_selective_state_update"}.get(copy.family, "mamba2_selective_state_update")
    copy.swap(step, "if D is not None:", "if False:")


@mutation("the bonus of the present token dropped", MEANING, ("rwkv",))
def _no_bonus(copy: Copy) -> None:
    copy.swap("rwkv_linear_attention_cpu", "current_key + time_first", "current_key", 2)


@mutation("another function in the gate", MEANING, ALL)
def _other_gate(copy: Copy) -> None:
    if copy.family == "mamba":
        copy.swap(copy.parts.scan, "F.silu(z)", "F.sigmoid(z)")
        copy.swap("mamba_selective_state_update", "F.silu(z)", "F.sigmoid(z)")
    elif copy.family == "rwkv":
        copy.swap("RwkvSelfAttention.extract_key_value", "torch.sigmoid(", "torch.tanh(")
    elif copy.family == "xlstm":
        copy.swap("xLSTMLayer.__init__", "nn.Sigmoid()", "nn.Tanh()")
    else:
        norm = {"mamba2": "MambaRMSNormGated"}.get(copy.family, "BambaRMSNormGated")
        copy.swap(f"{norm}.forward", "functional.silu(gate", "functional.sigmoid(gate")


@mutation("a factor on the mixer's output", MEANING, ALL)
def _factor(copy: Copy) -> None:
    forward = f"{copy.parts.mixer}.forward"
    if copy.family == "rwkv":
        copy.swap(forward, "(receptance * rwkv), state", "(receptance * rwkv) * 0.5, state")
    elif copy.family == "xlstm":
        copy.swap(forward, "return y, state", "return y * 0.5, state")
    else:
        copy.swap(forward, "return contextualized_states", "return contextualized_states * 0.5")

"""Changes that the next transformers may make to a model, each applied to its installed sources."""

from __future__ import annotations

import ast
import re
from collections.abc import Callable
from dataclasses import dataclass

from ci.futures.rewrite import FAMILIES, Copy, DoesNotApply, arguments, find

HARMLESS, MEANING = "harmless", "meaning"
MAMBA2 = ("mamba2", "bamba")
MAMBAS = ("mamba2", "mamba", "bamba")
SCANS = (*MAMBAS, "rwkv")
ALL = tuple(FAMILIES)


@dataclass(frozen=True)
class Mutation:
    """A change of the sources.

    Attributes:
        name: A name for the change.
        kind: `HARMLESS` where the model's outputs stay the same, `MEANING` where they change.
        families: The families that it is applied to.
        make: The function that makes the change.
    """

    name: str
    kind: str
    families: tuple[str, ...]
    make: Callable[[Copy], None]

    def applied(self, family: str) -> Copy:
        """Return the mutated sources of a family.

        Raises:
            DoesNotApply: They do not have the place.
        """
        copy = Copy(family)
        before = dict(copy.sources)
        self.make(copy)
        if copy.sources == before and self.name != UNCHANGED:
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


# Changes of the state's name.

UNKNOWN = "memory"  # A name that no release has used.


def _elsewhere(copy: Copy) -> str:
    """Return the name of the state in another family."""
    return "cache" if copy.family == "rwkv" else "state"


def _rename_argument(copy: Copy, new: str) -> None:
    parts = copy.parts
    copy.rename(parts.states, new, parts.carriers, parts.calls)
    base = {"bamba": "self.model", "rwkv": "self.rwkv"}.get(copy.family, "self.backbone")
    copy.rename((copy.argument,), new, (), [base])  # The language model keeps the old name.
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
    copy.rename_read(f"{copy.parts.head}.forward", (copy.output,), new)
    copy.output = new


def _deprecate(copy: Copy, new: str, old: dict[str, str]) -> None:
    """Let the forwards of some classes accept the state's old name, with a warning."""
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
    """Let old names of the state pass only as `**kwargs`."""
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


# Changes of the cache.

CACHE = "transformers.cache_utils"


@mutation("the attribute of the cache renamed that holds the states", HARMLESS, (*MAMBAS, "xlstm"))
def _cache_attribute(copy: Copy) -> None:
    if copy.family == "xlstm":
        copy.sub_all(copy.module, r"(?<=\.)rnn_state\b", "held")
    else:
        copy.sub_all(CACHE, r"(?<=\.)recurrent_states\b", "held")


@mutation("the methods of the cache renamed that give the states", HARMLESS, MAMBAS)
def _cache_getters(copy: Copy) -> None:
    for module in (CACHE, copy.module):
        copy.sub_all(module, r"\bget_(conv|recurrent)_state\b", r"\1_state_of")


@mutation("the method of the cache renamed that selects rows", HARMLESS, ("mamba2",))
def _cache_rows(copy: Copy) -> None:
    copy.sub_all(CACHE, r"\breorder_cache\b", "select_rows")


# Changes of arguments.


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


CALL = r"(self\.(?:mixer|mamba)\(\s*)(?:hidden_states=)?hidden_states"  # A block's mixer call.


@mutation("the mixer's arguments by position", HARMLESS, MAMBAS)
def _mixer_positional(copy: Copy) -> None:
    others = r",(\s*)\w+=(\w+),(\s*)attention_mask=attention_mask"
    copy.sub(f"{copy.parts.block}.forward", CALL + others, r"\1hidden_states,\2\3,\4attention_mask")


@mutation("the mixer's input renamed, and by keyword", HARMLESS, ALL)
def _mixer_input(copy: Copy) -> None:
    forward = f"{copy.parts.mixer}.forward"
    if copy.family == "rwkv":
        copy.rename(("hidden",), "inputs", [forward])
        copy.swap("RwkvBlock.forward", "self.attention(self.ln1", "self.attention(inputs=self.ln1")
    elif copy.family == "xlstm":
        copy.rename(("query",), "inputs", [copy.parts.scan], ["self.mlstm_backend"])
    else:
        copy.rename(("hidden_states",), "inputs", [forward])
        copy.sub(f"{copy.parts.block}.forward", CALL, r"\1inputs=hidden_states")


@mutation("the mixer's mask renamed", HARMLESS, MAMBAS)
def _mixer_mask(copy: Copy) -> None:
    call = "self.mamba" if copy.family == "bamba" else "self.mixer"
    copy.rename(("attention_mask",), "padding_mask", [f"{copy.parts.mixer}.forward"], [call])


@mutation("the mixer returns a pair", HARMLESS, MAMBAS)
def _mixer_pair(copy: Copy) -> None:
    old = "return contextualized_states"
    copy.swap(f"{copy.parts.mixer}.forward", old, f"{old}, None")
    call = r"(self\.(?:mixer|mamba)\([^)]*\))"
    copy.sub(f"{copy.parts.block}.forward", call, r"\1[0]")


@mutation("the scan returns a third value", HARMLESS, MAMBAS)
def _scan_triple(copy: Copy) -> None:
    old = r"(return (?:scan_output, ssm_state|output, final_state))$"
    copy.sub(copy.parts.scan, old, r"\1, None")
    unpack = "scan_output, final_state = scan_result"
    copy.swap(f"{copy.parts.mixer}.forward", unpack, unpack.replace(" =", ", _ ="))


@mutation("the scan's arguments in another order", HARMLESS, SCANS)
def _scan_reordered(copy: Copy) -> None:
    parts = copy.parts
    if copy.family == "rwkv":
        copy.swap(parts.scan, "key, value, state=None", "value, key, state=None")
        copy.sub(f"{parts.mixer}.forward", r"^( +key,\n)( +value,\n)", r"\2\1")
    else:
        copy.sub(parts.scan, r"^( +B: .*\n)( +C: .*\n)", r"\2\1")
        call = (
            r"^( +B\.(?:view|transpose)\(.*\n)( +C\.(?:view|transpose)\(.*\n)(?=(?: +chunk| +D=))"
        )
        copy.sub(f"{parts.mixer}.forward", call, r"\2\1")


@mutation("the scan's arguments by keyword only", HARMLESS, SCANS)
def _scan_keyword_only(copy: Copy) -> None:
    parts = copy.parts
    if copy.family == "rwkv":
        names = ["time_decay", "time_first", "key", "value"]
        copy.swap(parts.scan, f"def {parts.scan}(", f"def {parts.scan}(*, ")
    else:
        names = ["hidden_states", "dt", "A", "B", "C"]
        copy.sub(parts.scan, r"^( +)(hidden_states: torch)", r"\1*,\n\1\2")
    pattern = rf"({parts.scan}\(\n)" + r"( +)(.*,\n)" * len(names)
    new = r"\1" + "".join(rf"\{2 * n + 2}{name}=\{2 * n + 3}" for n, name in enumerate(names))
    copy.sub(f"{parts.mixer}.forward", pattern, new)


def _mixer_takes(copy: Copy, value: str) -> None:
    """Let the block pass the mixer a new argument, a factor or None."""
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
        copy.swap(
            forward, "return contextualized_states", f"return contextualized_states * {factor}"
        )


@mutation("a new argument for the mixer, None", HARMLESS, ALL)
def _mixer_takes_none(copy: Copy) -> None:
    _mixer_takes(copy, "None")


@mutation("a new argument for the mixer, a factor", MEANING, ALL)
def _mixer_takes_factor(copy: Copy) -> None:
    _mixer_takes(copy, "0.5")


def _scan_takes(copy: Copy, value: str) -> None:
    """Let the mixer pass the scan a new argument, a factor or None."""
    parts, forward = copy.parts, f"{copy.parts.mixer}.forward"
    if copy.family == "rwkv":
        copy.swap(parts.scan, "return_state=False)", "return_state=False, scale=None)")
        copy.swap(forward, "return_state=use_cache,", f"return_state=use_cache, scale={value},")
        copy.sub(parts.scan, r"^( +)(no_cuda = )", r"\1value = value * (scale or 1.0)\n\1\2")
    elif copy.family == "xlstm":
        copy.sub(parts.scan, r"^( +)(m_initial: torch.*\n)", r"\1\2\1scale=None,\n")
        copy.swap(forward, "m_initial=m_initial,", f"m_initial=m_initial, scale={value},")
        copy.sub(parts.scan, r"^( +)(if mode is None:)", r"\1value = value * (scale or 1.0)\n\1\2")
    else:
        name, result, before = {
            "mamba": ("return_last_state", "scan_output", "D"),
        }.get(copy.family, ("return_final_states", "output", "D_residual"))
        copy.sub(parts.scan, rf"^( +)({name}: .*\n)", r"\1\2\1scale=None,\n")
        copy.swap(
            forward, f"{name}=output_final_state,", f"{name}=output_final_state, scale={value},"
        )
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


# Changes of places.


def _move_scan(copy: Copy) -> str:
    """Move the scan into a module of its own, and return that module's name."""
    parts = copy.parts
    lines = copy.text.splitlines(keepends=True)
    new = f"scan_{copy.family}"
    # Copy everything before the mixer, which is more than the scan needs.
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


@mutation("the mixer's class renamed", HARMLESS, ALL)
def _mixer_class(copy: Copy) -> None:
    old = "xLSTMBackend" if copy.family == "xlstm" else copy.parts.mixer
    copy.sub_all(copy.module, rf"\b{old}\b", f"{old}Renamed")


@mutation("an attribute of the mixer renamed", HARMLESS, (*MAMBAS, "rwkv"))
def _mixer_attribute(copy: Copy) -> None:
    if copy.family == "rwkv":
        copy.sub_all(copy.module, r"(?<=\.)layer_id\b", "renamed")
        return
    old = {"mamba": "layer_idx"}.get(copy.family, "conv_kernel_size")
    names = rf"\bself\.{old}\b"
    times = len(re.findall(names, _inside(copy, copy.parts.mixer)))
    copy.sub(copy.parts.mixer, names, "self.renamed", max(times, 1))


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


# Changes of what is computed.


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
    step = {"mamba": "mamba_selective_state_update"}.get(
        copy.family, "mamba2_selective_state_update"
    )
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


def _multiply(copy: Copy, factor: str) -> None:
    """Multiply the output of the mixer by a factor."""
    forward = f"{copy.parts.mixer}.forward"
    if copy.family == "rwkv":
        copy.swap(forward, "(receptance * rwkv), state", f"(receptance * rwkv) * {factor}, state")
    elif copy.family == "xlstm":
        copy.swap(forward, "return y, state", f"return y * {factor}, state")
    else:
        old = "return contextualized_states"
        copy.swap(forward, old, f"{old} * {factor}")


@mutation("a factor on the mixer's output", MEANING, ALL)
def _factor(copy: Copy) -> None:
    _multiply(copy, "0.5")


@mutation("a factor on the output of the second mixer", MEANING, SCANS)
def _factor_of_a_layer(copy: Copy) -> None:
    index = "layer_id" if copy.family == "rwkv" else "layer_idx"
    _multiply(copy, f"(0.5 if self.{index} else 1.0)")


@mutation("a factor on the mixer's output, of a new setting", MEANING, ALL)
def _factor_of_a_setting(copy: Copy) -> None:
    config = f"transformers.models.{copy.family}.configuration_{copy.family}"
    copy.sub_all(config, r"(?m)^( +)(vocab_size: int = .*\n)", r"\1\2\1mixer_factor: float = 1.0\n")
    mixer = f"{copy.parts.mixer}.__init__"
    copy.sub(
        mixer, r"^( +)(super\(\).__init__\(\)\n)", r"\1\2\1self.factor = config.mixer_factor\n"
    )
    _multiply(copy, "self.factor")
    copy.settings["mixer_factor"] = 0.5


@mutation("D not added where a new setting says so", MEANING, MAMBAS)
def _no_skip_by_a_setting(copy: Copy) -> None:
    config = f"transformers.models.{copy.family}.configuration_{copy.family}"
    copy.sub_all(config, r"(?m)^( +)(vocab_size: int = .*\n)", r"\1\2\1adds_d: bool = True\n")
    mixer = copy.parts.mixer
    copy.sub(
        f"{mixer}.__init__",
        r"^( +)(super\(\).__init__\(\)\n)",
        r"\1\2\1self.adds_d = config.adds_d\n",
    )
    given = r"\bD=(self\.D(?:\.float\(\))?),(\n +z=)"
    copy.sub(f"{mixer}.forward", given, r"D=\1 if self.adds_d else None,\2")
    copy.settings["adds_d"] = False

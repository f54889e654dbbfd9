"""Mamba-1's selective scan, stock and patched, on its emulated CUDA kernels, against float64.

A block reads 128, 256, 512, 1024 or 2048 tokens at once, by the row's length; longer rows are read
2048 by 2048, with the state carried in between. The quick part has the patched kernels for rows of
up to 128 and of more than 1024 tokens, in float32.
"""

import functools
import re

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from support.selective_scan_oracle import selective_scan_oracle
from support.tolerances import KERNEL_SELECTIVE_SCAN

from ci import forks
from ci.kernels import emulation
from ci.kernels.emulation import selective_scan

QUICK_SIZES = ((32, 4), (128, 16))
TYPES = (
    ("float", "float"),
    ("float", "complex_t"),
    ("at::Half", "float"),
    ("at::BFloat16", "float"),
)
SLOW = pytest.mark.slow
DIFFERENTIABLE = ("u", "delta", "A", "B", "C", "D", "z", "delta_bias", "initial_states")


def _load(source, **options):
    tree = forks.sources("mamba-ssm", source)
    try:
        return selective_scan.selective_scan(tree, **options)
    except emulation.Unavailable as reason:
        pytest.skip(str(reason))


@functools.cache
def quick():
    """Load the patched interface, on few kernels."""
    return _load("patched", sizes=QUICK_SIZES)


@functools.cache
def full(source):
    """Load a tree's interface, on the kernels of all sizes and types."""
    return _load(source, types=TYPES)


def inputs(
    seqlen,
    *,
    dtype=torch.float32,
    weight=torch.float32,
    variable_b=True,
    variable_c=True,
    groups=2,
    optional=True,
    states=True,
    batch=2,
    dim=4,
    dstate=3,
):
    """Make arguments of the scan between guard zones; `optional` are D, z and delta_bias."""
    generator = torch.Generator().manual_seed(seqlen)

    def normal(*shape, dtype=torch.float32):
        return torch.randn(*shape, dtype=dtype, generator=generator)

    def weights(variable):
        if not variable:
            return normal(dim, dstate, dtype=weight)
        length = 2 * seqlen if weight.is_complex else seqlen
        return normal(batch, groups, dstate, length).to(dtype)

    a = -torch.rand(dim, dstate, generator=generator).to(weight)
    result = {
        "u": normal(batch, dim, seqlen).to(dtype),
        "delta": (0.5 * torch.rand(batch, dim, seqlen, generator=generator)).to(dtype),
        "A": a + 1j * normal(dim, dstate) if weight.is_complex else a,
        "B": weights(variable_b),
        "C": weights(variable_c),
    }
    if optional:
        result |= {
            "D": normal(dim),
            "z": normal(batch, dim, seqlen).to(dtype),
            "delta_bias": 0.5 * torch.rand(dim, generator=generator),
        }
    if states:
        result["initial_states"] = normal(batch, dim, dstate, dtype=weight)
    return {n: emulation.guarded(t.contiguous()).requires_grad_() for n, t in result.items()}


def results(scan, arguments, *, softplus=True, through_state=True):
    """Return output, last state and gradients, of a loss that reads the last state or does not."""
    out, last = scan(**arguments, delta_softplus=softplus)
    generator = torch.Generator().manual_seed(1)
    # They are rounded, so that the gradient of the output is the same in all dtypes.
    loss = (out * torch.randn(out.shape, generator=generator).bfloat16().to(out.dtype)).sum()
    if through_state:
        weight = torch.randn(last.shape, generator=generator)
        loss = loss + (last * weight).sum().real
    names = [name for name in DIFFERENTIABLE if name in arguments]
    gradients = torch.autograd.grad(loss, [arguments[name] for name in names])
    return {"out": out, "last_state": last} | dict(zip(names, gradients, strict=True))


def kernel(module):
    return functools.partial(module.selective_scan_fn, return_last_state=True)


def exact(arguments):
    """Convert arguments to float64."""
    return {
        n: t.detach().to(torch.complex128 if t.is_complex() else torch.float64).requires_grad_()
        for n, t in arguments.items()
    }


def agree(found, expected, dtype=torch.float32):
    """Expect all within the tolerance of the dtype, relative to the largest value of each."""
    for name, value in expected.items():
        error = (found[name].detach() - value.detach()).abs().max() / value.abs().max()
        # In this form a NaN fails.
        assert error <= KERNEL_SELECTIVE_SCAN[dtype], f"{name}: {error:.1e} of the largest value"


def check(module, arguments, *, dtype=torch.float32, softplus=True, through_state=True):
    options = {"softplus": softplus, "through_state": through_state}
    expected = results(selective_scan_oracle, exact(arguments), **options)
    agree(results(kernel(module), arguments, **options), expected, dtype)


@pytest.mark.parametrize("seqlen", [1, 2, 31, 127, 128, 2049])
def test_equals_the_recurrence(seqlen):
    check(quick(), inputs(seqlen))


@pytest.mark.parametrize("order", ["reverse", "random"])
@pytest.mark.parametrize("seqlen", [100, 128, 1025])
def test_no_order_of_threads_changes_anything(seqlen, order):
    with emulation.order(order, seed=seqlen):
        check(quick(), inputs(seqlen))


def test_without_the_optional_inputs():
    check(quick(), inputs(100, optional=False))


@pytest.mark.parametrize("variable_b", [False, True])
@pytest.mark.parametrize("softplus", [False, True])
def test_constant_weights(variable_b, softplus):
    """They have no states but the last, and that without a gradient."""
    for variable_c in (False, not variable_b):
        arguments = inputs(
            100, groups=1, variable_b=variable_b, variable_c=variable_c, states=False
        )
        check(quick(), arguments, softplus=softplus, through_state=False)


def test_without_softplus():
    check(quick(), inputs(100), softplus=False)


def pieces(module, arguments, cuts, length):
    """Run the scan piece by piece; each last state is the next initial state."""

    def scan(delta_softplus, initial_states=None, **rest):
        outputs = []
        for start, end in zip([0, *cuts], [*cuts, length], strict=True):
            part = {
                n: t[..., start:end].contiguous() if n in ("u", "delta", "B", "C", "z") else t
                for n, t in rest.items()
            }
            out, initial_states = kernel(module)(
                **part, delta_softplus=delta_softplus, initial_states=initial_states
            )
            outputs.append(out)
        return torch.cat(outputs, -1), initial_states

    return results(scan, arguments)


@settings(max_examples=15)
@given(
    st.integers(2, 128).flatmap(
        lambda length: st.tuples(
            st.just(length), st.sets(st.integers(1, length - 1), max_size=4).map(sorted)
        )
    ),
    st.booleans(),
)
def test_chunking_is_invisible(row, states):
    """Split rows anywhere; include the gradients, which go through the states."""
    length, cuts = row
    arguments = inputs(length, states=states)
    whole = results(selective_scan_oracle, exact(arguments))
    agree(pieces(quick(), arguments, cuts, length), whole)


@pytest.mark.parametrize("cuts", [[1], [2048], [1030], [60, 2110]])
def test_chunking_is_invisible_in_long_rows(cuts):
    arguments = inputs(2150, batch=1, dim=2, dstate=2)
    whole = results(selective_scan_oracle, exact(arguments))
    agree(pieces(quick(), arguments, cuts, 2150), whole)


def test_batching_is_invisible():
    """Compare bit for bit: a row alone, and in a batch whose other rows and states are NaN."""
    arguments = inputs(100)
    with torch.no_grad():
        whole = kernel(quick())(**arguments)
        for name in ("u", "delta", "B", "C", "z", "initial_states"):
            arguments[name][1] = torch.nan
        for found, expected in zip(kernel(quick())(**arguments), whole, strict=True):
            assert torch.equal(found[0], expected[0])


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda state: state[:, :, :2], r"shape \(batch, dim, dstate\), got \[2, 4, 2\]"),
        (lambda state: state[:1], "shape"),
        (lambda state: state.to(torch.bfloat16), "float32 on cpu, got BFloat16"),
        (lambda state: state.to("meta"), "float32 on cpu, got Float on meta"),
    ],
)
def test_a_state_that_does_not_fit_is_refused(change, message):
    arguments = inputs(100)
    arguments["initial_states"] = change(arguments["initial_states"])
    with pytest.raises(RuntimeError, match=f"initial_states must .*{message}"):
        quick().selective_scan_fn(**arguments)


@pytest.mark.parametrize("constant", ["variable_b", "variable_c"])
def test_what_has_no_states_is_refused(constant):
    arguments = inputs(100, groups=1, **{constant: False})
    with pytest.raises(RuntimeError, match="initial_states needs real A, and input-dependent B"):
        quick().selective_scan_fn(**arguments)
    del arguments["initial_states"]
    _, last = kernel(quick())(**arguments)
    with pytest.raises(RuntimeError, match="the gradient of last_state needs real A"):
        last.sum().backward()


@pytest.mark.parametrize("cuts", [[1], [3, 40], [41, 42]])
def test_the_module_reads_a_prompt_in_pieces(cuts):
    class Parameters:
        def __init__(self):
            self.seqlen_offset, self.key_value_memory_dict = 0, {}

    torch.manual_seed(0)
    layer = quick().mamba_simple.Mamba(8, d_state=3, layer_idx=0)
    hidden, whole, parts, outputs = torch.randn(2, 100, 8), Parameters(), Parameters(), []
    with torch.no_grad():
        expected = layer(hidden, inference_params=whole)
        for start, end in zip([0, *cuts], [*cuts, 100], strict=True):
            outputs.append(layer(hidden[:, start:end], inference_params=parts))
            parts.seqlen_offset = end
    conv, ssm = parts.key_value_memory_dict[0]
    conv_whole, ssm_whole = whole.key_value_memory_dict[0]
    agree(
        {"out": torch.cat(outputs, 1), "conv": conv, "ssm": ssm},
        {"out": expected, "conv": conv_whole, "ssm": ssm_whole},
    )


# --- The slow part: all types and sizes, both sources, mutants -----------------------------------


@SLOW
@pytest.mark.parametrize("source", ["stock", "patched"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("seqlen", [5, 128, 200, 256, 300, 512, 900, 1024, 1500, 2048, 4099])
def test_every_size_and_dtype(seqlen, dtype, source):
    arguments = inputs(seqlen, dtype=dtype, states=source == "patched", batch=1, dim=2, dstate=2)
    check(full(source), arguments, dtype=dtype, through_state=source == "patched")


@SLOW
@pytest.mark.parametrize("source", ["stock", "patched"])
@pytest.mark.parametrize("softplus", [False, True])
@pytest.mark.parametrize("variable_c", [False, True])
@pytest.mark.parametrize("variable_b", [False, True])
@pytest.mark.parametrize("weight", [torch.float32, torch.complex64])
def test_every_kind_of_weight(weight, variable_b, variable_c, softplus, source):
    arguments = inputs(
        100,
        weight=weight,
        variable_b=variable_b,
        variable_c=variable_c,
        groups=1,
        states=source == "patched" and variable_b and variable_c and not weight.is_complex,
    )
    expected = results(
        selective_scan_oracle, exact(arguments), softplus=softplus, through_state=False
    )
    if source == "stock" and not variable_b:
        del expected["last_state"]  # See test_the_last_state.
    found = results(kernel(full(source)), arguments, softplus=softplus, through_state=False)
    agree(found, expected)


@SLOW
@pytest.mark.parametrize("seqlen", [100, 512, 2049])
def test_complex_weights(seqlen):
    arguments = inputs(seqlen, weight=torch.complex64, batch=1, states=False)
    check(full("patched"), arguments, through_state=False)


@SLOW
def test_complex_states_are_refused():
    with pytest.raises(RuntimeError, match="initial_states needs real A"):
        full("patched").selective_scan_fn(**inputs(100, weight=torch.complex64))


NO_B = "the last state is without a constant B, which the kernel multiplies with C after the scan"
IGNORED = "the gradient of the last state is ignored"
STOCK_AND_PATCHED = {
    reason: [
        pytest.param(
            "stock", marks=pytest.mark.xfail(strict=True, raises=AssertionError, reason=reason)
        ),
        "patched",
    ]
    for reason in (NO_B, IGNORED)
}


@SLOW
@pytest.mark.parametrize("source", STOCK_AND_PATCHED[NO_B])
def test_the_last_state_with_a_constant_b(source):
    arguments = inputs(100, groups=1, variable_b=False, states=False)
    check(full(source), arguments, through_state=False)


@SLOW
@pytest.mark.parametrize("source", STOCK_AND_PATCHED[IGNORED])
def test_the_gradient_of_the_last_state(source):
    check(full(source), inputs(100, states=False))


OUT_OF_BOUNDS = pytest.mark.xfail(
    strict=True,
    raises=AssertionError,
    reason="dB and dC of a complex A are written at twice a group's offset, beyond their end",
)


@SLOW
@pytest.mark.parametrize("source", [pytest.param("stock", marks=OUT_OF_BOUNDS), "patched"])
def test_groups_of_complex_weights(source):
    """Keep it so small that writes out of bounds stay in a guard zone, and break nothing."""
    arguments = inputs(60, weight=torch.complex64, states=False, batch=1, dim=2, dstate=1)
    check(full(source), arguments, through_state=False)


MISALIGNED = pytest.mark.xfail(
    strict=True,
    raises=RuntimeError,
    reason="whole blocks are read 16 bytes at once, at any address: a fault on a GPU",
)


@SLOW
@pytest.mark.parametrize("source", [pytest.param("stock", marks=MISALIGNED), "patched"])
@pytest.mark.parametrize("name", ["u", "delta", "B", "C", "z", "out"])
def test_views_of_a_longer_row(name, source):
    """Slice along the sequence; "out" is its gradient, which torch.cat makes such a slice."""
    arguments = inputs(128, states=False)
    expected = results(selective_scan_oracle, exact(arguments), through_state=False)

    def scan(**arguments):
        out, last = kernel(full(source))(**arguments)
        longer = torch.cat([out, out.detach()[..., :3]], -1) if name == "out" else out
        return longer[..., :128], last

    if name != "out":
        longer = torch.nn.functional.pad(arguments[name].detach(), (1, 2))
        arguments[name] = emulation.guarded(longer)[..., 1:129].requires_grad_()
    agree(results(scan, arguments, through_state=False), expected)


@SLOW
@pytest.mark.parametrize("seqlen", [1, 100, 128, 512, 2049])
def test_without_states_the_numbers_are_those_of_stock(seqlen):
    """Compare bit for bit, with a loss that does not read the last state."""
    arguments = inputs(seqlen, states=False, batch=1)
    stock, patched = (
        results(kernel(full(source)), arguments, through_state=False)
        for source in ("stock", "patched")
    )
    assert all(torch.equal(stock[name], patched[name]) for name in stock)


FWD, BWD = "selective_scan_fwd_kernel.cuh", "selective_scan_bwd_kernel.cuh"
REVERSE = "reverse_scan.cuh"
SEEDS = "chunk == 0 && threadIdx.x % 32 == 0"
# By name: the file, the text, and its replacement.
FAULTS = {
    "no initial state": (FWD, SEEDS, f"!FAULT && {SEEDS}"),
    "no initial state in the backward": (BWD, SEEDS, f"!FAULT && {SEEDS}"),
    "the last state's gradient at the token before": (
        BWD,
        "params.seqlen - 1 - chunk * kChunkSize",
        "params.seqlen - 1 - FAULT - chunk * kChunkSize",
    ),
    "no decay of the initial state's gradient": (
        BWD,
        "= smem_delta_a[state_idx] *",
        "= (FAULT ? 1.f : smem_delta_a[state_idx]) *",
    ),
    "the initial state's gradient in the last chunk": (
        BWD,
        "chunk == 0 && threadIdx.x == 0 &&",
        "chunk == (FAULT ? params.n_chunks - 1 : 0) && threadIdx.x == 0 &&",
    ),
} | {
    f"{name} of another channel in {file}": (
        file,
        f"(params.{name}_ptr) + (batch_id * params.dim + dim_id{rows}) * params.dstate",
        f"(params.{name}_ptr) + (batch_id * params.dim + dim_id{rows}) * (params.dstate - FAULT)",
    )
    for file, rows, names in (
        (FWD, " * kNRows", ["initial_states"]),
        (BWD, "", ["initial_states", "dinitial_states", "dlast_state"]),
    )
    for name in names
}
# The barriers of each file that must not be missing. The others are dead code (more than one row
# per block), of the complex kernels, or not needed: a store after a load, or a load after a store,
# exchanges its items through the very slots that the lane itself touched last.
BARRIERS = {FWD: (2, 3), BWD: (1, 2, 3, 4, 7, 8, 12, 13), REVERSE: (0, 1)}
NAMES = [*FAULTS, *(f"{file}, barrier {i}" for file, which in BARRIERS.items() for i in which)]


@functools.cache
def faulty():
    """Load the patched interface with all faults, of which `emulation.mutant` turns one on."""
    csrc = forks.patched("mamba-ssm") / "csrc" / "selective_scan"
    texts = {file: (csrc / file).read_text() for file in BARRIERS}
    for name, (file, old, new) in FAULTS.items():
        assert old in texts[file], f"found no {old!r} in {file}; mend FAULTS"
        number = NAMES.index(name) + 1
        texts[file] = texts[file].replace(old, new.replace("FAULT", f"emulation::mutant({number})"))
    for file, which in BARRIERS.items():
        pieces = re.split(r"(?<!// )__syncthreads\(\);", texts[file])
        for i in which:
            number = NAMES.index(f"{file}, barrier {i}") + 1
            pieces[i] += f"{{ if (!emulation::mutant({number})) {{ __syncthreads(); }} }}"
        for i in set(range(len(pieces) - 1)) - set(which):
            pieces[i] += "__syncthreads();"
        texts[file] = "".join(pieces)
    return _load("patched", sizes=QUICK_SIZES, replace=texts)


@functools.cache
def _row(seqlen):
    """Return arguments with a strided state, and the kernels' results for them."""
    arguments = inputs(seqlen, groups=1, batch=1, dim=2, dstate=2)
    state = arguments["initial_states"].detach()
    strided = emulation.guarded(torch.stack([state, state + 1], -1))[..., 0]
    arguments["initial_states"] = strided.requires_grad_()
    return arguments, results(kernel(faulty()), arguments)


@SLOW
@pytest.mark.parametrize("name", NAMES)
def test_a_fault_is_caught(name):
    """Catch it in one of four orders of threads, in rows of a warp, of part or whole blocks."""
    with emulation.mutant(0):
        rows = [_row(seqlen) for seqlen in (100, 2500, 4096)]
    with emulation.mutant(NAMES.index(name) + 1):
        for order, seed in (("forward", 0), ("reverse", 0), ("random", 1), ("random", 2)):
            for arguments, expected in rows:
                with emulation.order(order, seed):
                    try:
                        agree(results(kernel(faulty()), arguments), expected)
                    except (AssertionError, RuntimeError):
                        return
    pytest.fail("no test would have seen it")


# Reads of one element past the end of a row, on which nothing that is stored depends.
READS = {
    "the input": (
        FWD,
        "u_vals[r], smem_load, params.seqlen",
        "u_vals[r], smem_load, FAULT + params.seqlen",
    ),
    "the output, in the backward": (
        BWD,
        "out_vals, smem_load, params.seqlen",
        "out_vals, smem_load, FAULT + params.seqlen",
    ),
}


def misreading(**options):
    """Load the patched interface with all of `READS`, of which `emulation.mutant` turns one on."""
    csrc = forks.patched("mamba-ssm") / "csrc" / "selective_scan"
    texts = {}
    for number, (file, old, new) in enumerate(READS.values(), 1):
        text = (csrc / file).read_text()
        assert text.count(old) == 1, f"found {old!r} {text.count(old)} times in {file}; mend READS"
        texts[file] = text.replace(old, new.replace("FAULT", f"emulation::mutant({number})"))
    return _load("patched", sizes=QUICK_SIZES[:1], replace=texts, **options)


SANITIZED = """
import sys
import torch
from ci.kernels import emulation
from tests.kernels.test_selective_scan import inputs, kernel, misreading, results
torch.set_num_threads(1)
scan = kernel(misreading(sanitize=True))
for seqlen in (1, 100, 127, 128):
    results(scan, inputs(seqlen))
results(scan, inputs(100, optional=False, states=False))
constant = inputs(100, groups=1, variable_b=False, variable_c=False, states=False)
results(scan, constant, through_state=False)
print("clean so far", flush=True)
with emulation.mutant(int(sys.argv[1])):
    results(scan, inputs(100))
"""


@SLOW
@pytest.mark.parametrize("name", READS)
def test_address_sanitizer_finds_a_read_that_changes_nothing(sanitized, name):
    number, arguments = list(READS).index(name) + 1, inputs(100)
    scan = kernel(misreading())
    with emulation.mutant(number):
        agree(results(scan, arguments), results(selective_scan_oracle, exact(arguments)))
    done = sanitized(SANITIZED, number)
    assert "clean so far" in done.stdout, done.stderr
    assert "AddressSanitizer: use-after-poison" in done.stderr
    assert "READ of size 4" in done.stderr
    assert f"in void {READS[name][0].removesuffix('.cuh')}<" in done.stderr

"""The emulation itself: it finds what it claims to find, also in causal-conv1d's kernels."""

import ctypes
import re
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import torch

from ci import forks
from ci.kernels import emulation
from ci.kernels.emulation import _build, _load

ORDERS = [("forward", 0), ("reverse", 0), ("random", 1), ("random", 2)]

# --- Small kernels, each with one thing that the emulation must raise, or must do ----------------

KERNELS = r"""
#include <cub/block/block_load.cuh>
#include <cub/block/block_store.cuh>
#include <cub/block/block_reduce.cuh>
#include <stdexcept>

__global__ void exits_early(float *) { if (threadIdx.x != 5) { __syncthreads(); } }
__global__ void two_places(float *) {
    if (threadIdx.x < 64) {
        __syncthreads();
    } else {
        __syncthreads();
    }
}
__global__ void half_a_warp(float *data) {
    if (threadIdx.x % 32 < 16) { data[threadIdx.x] = __shfl_xor_sync(0xffffffff, 1.f, 1); }
}
__global__ void misaligned(float *data) {
    uint4 value = *reinterpret_cast<uint4 *>(data + 1);
    data[0] = value.x;
}
__global__ void own_variables(float *data) {
    float own[5] = {0, 1, 2, 3, 4};
    *reinterpret_cast<uint4 *>(data) = *reinterpret_cast<uint4 *>(own + 1);
}
__global__ void past_shared(float *) {
    __shared__ float a[128];
    a[threadIdx.x + 1] = 0;
}
__global__ void past_dynamic(float *) {
    extern __shared__ float a[];
    a[threadIdx.x + 1] = 0;
}
__global__ void unset(float *data) {
    __shared__ float a[128];
    data[threadIdx.x] = a[threadIdx.x];
}
__global__ void no_barrier(float *data) {
    __shared__ float a[128];
    a[threadIdx.x] = threadIdx.x;
    data[threadIdx.x] = a[127 - threadIdx.x];
}
__global__ void reversed(float *data) {
    __shared__ float a[128];
    a[threadIdx.x] = threadIdx.x;
    __syncthreads();
    data[threadIdx.x] = a[127 - threadIdx.x];
}
__global__ void nothing(float *) {}
__global__ void sums(float *data) {
    using Reduce = cub::BlockReduce<float, 128>;
    __shared__ Reduce::TempStorage storage;
    const float sum = Reduce(storage).Sum(data[threadIdx.x]);
    if (threadIdx.x == 0) { atomicAdd(data, sum); }
    if (threadIdx.x == 1) { data[1] = sum; }
    const float next = __shfl_down_sync(0xffffffff, float(threadIdx.x), 1);
    if (threadIdx.x >= 64) { data[threadIdx.x] = next; }
}
__global__ void copies(float *data) {
    using Load = cub::BlockLoad<float, 128, 4, cub::BLOCK_LOAD_WARP_TRANSPOSE>;
    using Store = cub::BlockStore<float, 128, 4, cub::BLOCK_STORE_WARP_TRANSPOSE>;
    __shared__ Load::TempStorage load;
    __shared__ Store::TempStorage store;
    float items[4] = {-1, -1, -1, -1};
    Load(load).Load(data, items, 200);
    for (float &item : items) { item += 1000 * threadIdx.x; }
    Store(store).Store(data + 512, items, 300);
}

void launch(void (*kernel)(float *), dim3 grid, unsigned threads, unsigned bytes, float *data) {
    kernel<<<grid, threads, bytes, nullptr>>>(data);
}

extern "C" const char *run(const char *name, float *data, unsigned x, unsigned y, unsigned threads,
                           unsigned bytes) {
    static std::string message;
    const dim3 grid(x, y);
    message = "";
    try {
#define RUN(of) if (name == std::string(#of)) { launch(of, grid, threads, bytes, data); }
        RUN(exits_early) RUN(two_places) RUN(half_a_warp) RUN(misaligned) RUN(own_variables)
        RUN(past_shared) RUN(past_dynamic) RUN(unset) RUN(no_barrier) RUN(reversed) RUN(nothing)
        RUN(sums) RUN(copies)
    } catch (const std::exception &error) { message = error.what(); }
    return message.c_str();
}
"""


@pytest.fixture(scope="module")
def kernels(tmp_path_factory):
    folder = tmp_path_factory.mktemp("kernels")
    (folder / "kernels.cu").write_text(KERNELS)
    try:
        library = ctypes.CDLL(str(_build.build("kernels", folder, [], False, {})))
    except emulation.Unavailable as reason:
        pytest.skip(str(reason))
    library.run.restype = ctypes.c_char_p

    def run(name, data=None, grid=(1, 1), threads=128, shared=0, order="forward", seed=0):
        data = torch.arange(1024.0) if data is None else data
        library.emulation_order(emulation.ORDERS.index(order), seed)
        pointer = ctypes.c_void_p(data.data_ptr())
        message = library.run(name.encode(), pointer, *grid, threads, shared).decode()
        if message:
            raise RuntimeError(message)
        return data

    return run


@pytest.mark.parametrize(("order", "seed"), ORDERS)
@pytest.mark.parametrize(
    ("name", "message"),
    [
        (
            "exits_early",
            r"exits_early.*divergent barrier: thread \d+ waits at the barrier in "
            r"kernels.cu:\d+, but thread 5 has exited",
        ),
        (
            "two_places",
            r"divergent barrier: .*kernels.cu:10, but thread .*kernels.cu:12|"
            r"divergent barrier: .*kernels.cu:12, but thread .*kernels.cu:10",
        ),
        ("half_a_warp", r"divergent barrier: thread \d+ waits for its warp"),
        (
            "misaligned",
            r"misaligned, block \(0, 0, 0\), thread .*: misaligned address 0x\w+4: "
            r"an access of 16 bytes",
        ),
        ("past_shared", "past_shared.*wrote outside of its shared memory"),
        ("past_dynamic", "past_dynamic.*wrote outside of its shared memory"),
    ],
)
def test_fault_is_raised(kernels, name, message, order, seed):
    with pytest.raises(RuntimeError, match=message):
        kernels(name, order=order, seed=seed, shared=512)
    kernels("reversed")  # The next launch runs.


@pytest.mark.parametrize(
    ("launch", "message"),
    [
        ({"grid": (0, 1)}, "gridDim.x is 0, must be 1 to 2147483647"),
        ({"grid": (1, 65536)}, "gridDim.y is 65536, must be 1 to 65535"),
        ({"threads": 1025}, "blockDim.x is 1025, must be 1 to 1024"),
        ({"shared": 227 * 1024 + 1}, "dynamic shared memory is 232449, must be 0 to 232448"),
        ({"shared": 48 * 1024 + 1}, "without cudaFuncSetAttribute is 49153"),
    ],
)
def test_invalid_launch_is_raised(kernels, launch, message):
    with pytest.raises(RuntimeError, match=re.escape(message)):
        kernels("nothing", **launch)


@pytest.mark.parametrize(("order", "seed"), ORDERS)
def test_what_is_right_runs_in_any_order(kernels, order, seed):
    assert kernels("reversed", order=order, seed=seed)[:128].equal(torch.arange(127.0, -1, -1))
    assert kernels("own_variables")[:4].equal(torch.arange(1.0, 5))
    data = kernels("sums", order=order, seed=seed)
    assert data[0] == 127 * 128 / 2
    assert data[1].isnan()  # Only thread 0 has the sum.
    assert data[64:95].equal(torch.arange(65.0, 96))
    copied = kernels("copies", torch.arange(1024.0), order=order, seed=seed)[512:]
    position = torch.arange(300)
    # Beyond the 200 that are loaded an item keeps what its thread had.
    loaded = torch.where(position < 200, position, -1) + 1000 * (position // 4)
    assert copied[:300].equal(loaded.float())
    assert copied[300:].equal(torch.arange(812.0, 1024))


def test_unset_shared_memory_is_nan(kernels):
    assert kernels("unset")[:128].isnan().all()


def test_missing_barrier_is_seen(kernels):
    expected = torch.arange(127.0, -1, -1)
    seen = [kernels("no_barrier", order=o, seed=s)[:128].equal(expected) for o, s in ORDERS]
    assert not any(seen)


@pytest.mark.parametrize(
    "line", ["kernels[0]<<<1, 2>>>(x);", "f<<<g()>>>;", "__shared__ A<int> a;"]
)
def test_cuda_syntax_that_is_not_understood_is_an_error(line):
    with pytest.raises(ValueError, match=r"there.cu:2: a \w+ that is not understood: '"):
        _build.rewrite(f"// __shared__ and k<<<1>>>()\n{line}\n", Path("there.cu"))


def test_what_several_processes_need_is_made_once(tmp_path):
    target = tmp_path / "folder" / "made.so"

    def make(text):
        with _build._making(target) as temporary:
            if temporary:
                time.sleep(0.1)  # This gives the others time to look.
                temporary.write_text(text)
        return target.read_text()

    with ThreadPoolExecutor(4) as pool:
        assert len(set(pool.map(make, "abcd"))) == 1
    with pytest.raises(ValueError, match="fails"), _build._making(tmp_path / "other.so"):
        raise ValueError("fails")
    assert not (tmp_path / "other.so").exists()


def test_guard_zones():
    tensor = _load.guarded(torch.arange(6.0).view(2, 3).t().requires_grad_())
    assert tensor.stride() == (1, 3)
    assert tensor.is_leaf
    assert tensor.requires_grad
    _load.check_guards("f")
    beyond = tensor.detach().as_strided((1,), (1,), tensor.storage_offset() + 6)
    assert beyond.isnan().all()
    beyond.fill_(0)
    with pytest.raises(RuntimeError, match="f wrote after a guarded tensor"):
        _load.check_guards("f")
    del tensor, beyond


# --- causal-conv1d's kernels --------------------------------------------------------------------


def channel_first(length, activation):
    return {"channel_last": False, "length": length, "activation": activation, "dim": 2}


def channel_last(length, activation, states=(), ids=False, dim=40):
    return {"channel_last": True, "length": length, "activation": activation, "states": states,
            "ids": ids, "dim": dim}  # fmt: skip


# Rows of more than one of a block's rounds, with and without 16-byte accesses; blocks of columns
# that are full, begun, or shorter than the filter.
CASES = {
    "first": channel_first(1540, None),
    "first-odd": channel_first(1038, None),
    "first-silu": channel_first(1540, "silu"),
    "first-silu-odd": channel_first(1038, "silu"),
    "last": channel_last(150, None, ("initial", "final")),
    "last-64": channel_last(64, "silu", ("initial", "final")),
    "last-130": channel_last(130, "silu", ("initial",)),
    "last-2": channel_last(2, "silu", ("initial", "final")),
    "last-ids": channel_last(150, "silu", ("initial",), ids=True),
}


def run(package, *, channel_last, length, activation, dim, states=(), ids=False):
    """Return the outputs and gradients by name."""
    torch.manual_seed(0)
    batch, width = 2, 4

    def make(*shape, last=False):
        if last:  # Channels are the last in memory.
            shape = (shape[0], shape[2], shape[1])
        tensor = torch.randn(*shape)
        tensor = tensor.transpose(1, 2) if last else tensor
        return emulation.guarded(tensor.requires_grad_())

    inputs = {
        "x": make(batch, dim, length, last=channel_last),
        "weight": make(dim, width),
        "bias": make(dim),
    }
    if "initial" in states:
        inputs["initial_states"] = make(batch, dim, width - 1, last=True)
    extra = {}
    if ids:
        row = (torch.arange(length) + 36) // 37  # The first sequence has one token.
        rows = torch.stack([torch.where(row < 1, -1, row), torch.where(row > 3, -1, row)])
        extra["seq_idx"] = emulation.guarded(rows.int())
    results = package.causal_conv1d_fn(
        **inputs, **extra, activation=activation, return_final_states="final" in states
    )
    results = results if "final" in states else (results,)
    outputs = dict(zip(("out", "final_states"), results, strict=False))
    grads = {f"d{name}": make(*out.shape, last=channel_last) for name, out in outputs.items()}
    if ids:
        # Padding has no gradient here: the kernel's result for one is a defect, and not meant.
        grads["dout"].data.masked_fill_((extra["seq_idx"] < 0)[:, None], 0)
    found = torch.autograd.grad(results, list(inputs.values()), list(grads.values()))
    outputs |= {f"d{name}": grad for name, grad in zip(inputs, found, strict=True)}
    return {name: value.detach() for name, value in outputs.items()}


def differences(found, expected):
    """Name the results that differ; sums over blocks may differ by rounding."""
    names = []
    for name, value in expected.items():
        assert not value.isnan().any(), name
        sums = name in ("dweight", "dbias")
        close = torch.allclose(found[name], value, rtol=1e-4, atol=1e-3)
        if not (close if sums else found[name].equal(value)):
            names.append(name)
    return names


# Faults put into the kernels: the file, the occurrence of the text, and the text, with the addition
# between @; M is 1 when the fault is on, else 0. All are compiled at once, and switched on one by
# one.
FAULTS = {
    "forward: last thread writes early": ("fwd", 0, "tidx < kNThreads - 1@ + M@"),
    "forward: last thread never writes": ("fwd", 0, "tidx == kNThreads - 1@ + M@"),
    "forward: first thread's left": ("fwd", 0, "tidx - 1 : kNThreads - 1@ - M@"),
    "forward: store one too many": ("fwd", 3, "params.seqlen - chunk * kChunkSize@ + M@)"),
    "forward: initial state in block 1": ("fwd", 0, "chunk_l_id > 0@ + M@"),
    "forward: final state of block 0": ("fwd", 0, "chunk_l_id < gridDim.y - 1@ - M@"),
    "forward: one column short before": ("fwd", 0, "l_idx < kWidth - 1@ - M@)"),
    "forward: first column dropped": ("fwd", 0, "(kWidth - 1) >= 0@ + M@"),
    "forward: store one row too many": ("fwd", 2, "l_idx < params.seqlen@ + M@"),
    "forward: store channels too many": ("fwd", 4, "kNElts < params.dim@ + M@"),
    "forward: padding is computed": ("fwd", 0, "seq_idx_cur < 0@ - M@"),
    "forward: other sequence is seen": ("fwd", 0, "@M || @seq_idx_thread[i + w] == seq_idx_cur"),
    "backward: next thread's": ("bwd", 0, "tidx < kNThreads - 1@ - M@ ?"),
    "backward: next thread's, silu": ("bwd", 1, "tidx < kNThreads - 1@ - M@ ?"),
    "backward: previous thread's x": ("bwd", 1, "tidx > 0@ + M@)"),
    "backward: previous round's x": ("bwd", 0, "tidx == 0 && chunk > 0@ + M@"),
    "backward: another thread's sum": ("bwd", 1, "== 0@ + M@) {\n            if constexpr"),
    "backward: dout, one row too many": ("bwd", 0, "kChunkSizeL + l_idx < params.seqlen@ + M@"),
    "backward: final state, one row late": ("bwd", 0, "params.seqlen - kWidth + 1@ + M@"),
    "backward: final to initial state": ("bwd", 0, "i >= params.seqlen@ + M@)"),
    "backward: initial state twice": ("bwd", 1, "!= nullptr && col_idx@ / (1 + M)@ == 0"),
    "backward: initial state, any id": ("bwd", 0, "@M || @seq_idx_thread[i] == seq_idx_thread"),
}

# Mutants that change nothing, with the reason.
ORDERED = "the barriers before and after the next exchange keep the two apart already"
OWN_PART = "CUB's store ends in a barrier of its own; each warp has its own part of the memory"
EQUIVALENT = {
    "forward: initial state in block 1": "only the columns before block 0 are taken from it",
    "forward: first column dropped": "what is before a block is never column 0",
    "fwd: without barrier 0": OWN_PART,
    "fwd: without barrier 1": ORDERED,
    "bwd: without barrier 0": OWN_PART,
    "bwd: without barrier 2": ORDERED,
    "bwd: without barrier 5": ORDERED,
    "bwd: without barrier 7": ORDERED,
    "bwd: without barrier 13": "a channel is of one warp, which shuffles before",
}


BARRIER = "__syncthreads();"


def mutants(tree):
    """Return the names of all mutants, and the sources that have them all."""
    texts = {key: (tree / f"csrc/causal_conv1d_{key}.cu").read_text() for key in ("fwd", "bwd")}
    faults = dict(FAULTS)
    for key, text in texts.items():
        for number in range(text.count(BARRIER)):
            faults[f"{key}: without barrier {number}"] = (key, number, f"@if (!M) @{BARRIER}")
    edits = []
    for number, (name, (key, occurrence, text)) in enumerate(faults.items()):
        old = re.sub("@.*?@", "", text)
        new = re.sub(r"\bM\b", f"emulation::mutant({number + 1})", text.replace("@", ""))
        starts = [match.start() for match in re.finditer(re.escape(old), texts[key])]
        assert len(starts) > occurrence, f"{name}: found {len(starts)} times: {old!r}"
        edits.append((starts[occurrence], key, old, new))
    for start, key, old, new in sorted(edits, reverse=True):
        texts[key] = texts[key][:start] + new + texts[key][start + len(old) :]
    return list(faults), {f"causal_conv1d_{key}.cu": text for key, text in texts.items()}


try:
    NAMES, SOURCES = mutants(forks.stock("causal-conv1d"))
except forks.ForkError as reason:
    pytest.skip(str(reason), allow_module_level=True)


@pytest.fixture(scope="module")
def faulty():
    """Return the package with all faults in it, and its results where none is on."""
    try:
        package = emulation.causal_conv1d(
            forks.stock("causal-conv1d"), types=[("float", "float")], replace=SOURCES
        )
    except emulation.Unavailable as reason:
        pytest.skip(str(reason))
    return package, {name: run(package, **case) for name, case in CASES.items()}


@pytest.mark.slow  # Another build of the kernels.
@pytest.mark.parametrize("name", CASES)
def test_order_of_threads_is_invisible(faulty, name):
    package, expected = faulty
    for order, seed in ORDERS[1:]:
        with emulation.order(order, seed):
            assert not differences(run(package, **CASES[name]), expected[name]), (order, seed)


def first_difference(package, expected):
    """Say how the mutant that is on differs from the original, or return None."""
    for case, kind in CASES.items():
        for order, seed in ORDERS:
            try:
                with emulation.order(order, seed):
                    wrong = differences(run(package, **kind), expected[case])
            except RuntimeError as error:
                wrong = str(error)
            if wrong:
                return case, order, seed, wrong
    return None


@pytest.mark.slow  # Another build of the kernels.
@pytest.mark.parametrize("name", NAMES)
def test_mutant_is_caught(faulty, name):
    with emulation.mutant(NAMES.index(name) + 1):
        found = first_difference(*faulty)
    if name in EQUIVALENT:
        assert not found, "not equivalent"
    else:
        assert found, "no case in any order tells it from the original"


SANITIZED = """
import sys
from pathlib import Path
import torch
from tests.kernels.test_emulation import run, channel_first, channel_last
from ci.kernels import emulation
torch.set_num_threads(1)
conv = emulation.causal_conv1d(Path(sys.argv[1]), sanitize=True, types=[("float", "float")])
run(conv, **channel_first(600, "silu"))
run(conv, **channel_last(150, "silu", ("initial",), ids=True))
run(conv, **channel_last(150, None, ("initial", "final")))
print("clean so far", flush=True)
run(conv, **channel_last(1, None, ("initial", "final"), dim=8))
"""


@pytest.mark.slow
def test_address_sanitizer_finds_the_read_past_dfinal_states(sanitized):
    done = sanitized(SANITIZED, forks.stock("causal-conv1d"))
    assert "clean so far" in done.stdout, done.stderr
    assert "AddressSanitizer: use-after-poison" in done.stderr
    assert "READ of size 4" in done.stderr
    assert "in void causal_conv1d_channellast_bwd_kernel<" in done.stderr

"""The native kernels: building them, finding them again, doing without; and what they share."""

import ctypes
import errno
import math
import os
import re
import stat
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import compat
from compat import ops
from compat.ops import compiled

ROOT = Path(compat.__file__).parent.parent
SOURCE = 'extern "C" void compat_set_team(void*) {}\n'


@pytest.fixture
def build(monkeypatch, tmp_path):
    """Build a small source in a separate cache; return the library, or None, and the reason."""
    folder, cache = tmp_path / "native", tmp_path / "cache"
    folder.mkdir()
    (folder / "a.cpp").write_text(SOURCE)
    monkeypatch.setattr(compiled, "_FOLDER", folder)
    monkeypatch.setenv("XDG_CACHE_HOME", str(cache))
    monkeypatch.delenv("COMPAT_NATIVE", raising=False)
    return compiled._loaded.__wrapped__


@pytest.fixture
def compiler(monkeypatch, tmp_path):
    """Put a script in the compiler's place, and count its compilations."""
    found = next((c for c in ("c++", "g++", "clang++") if _has(c)), None)

    def install(body, version="script 1.0"):
        log, script = tmp_path / "log", tmp_path / "script"
        log.touch()
        script.write_text(
            f'#!/bin/sh\nif [ "$1" = --version ]; then echo "{version}"; exit 0; fi\n'
            f'echo x >> "{log}"\n{body.format(compiler=found)}\n'
        )
        script.chmod(script.stat().st_mode | stat.S_IXUSR)
        monkeypatch.setenv("CXX", str(script))
        return lambda: len(log.read_text().splitlines())

    if found is None:
        pytest.skip("no C++ compiler was found")
    return install


def _has(command):
    return any((Path(p) / command).exists() for p in os.environ["PATH"].split(os.pathsep))


def libraries(tmp_path):
    """Return the libraries in the cache, in which only they and their sums may be."""
    found = sorted(path for path in (tmp_path / "cache").rglob("*") if path.is_file())
    whole = [path for path in found if path.suffix == ".so"]
    assert found == sorted([*whole, *(path.with_suffix(".sum") for path in whole)])
    return whole


# Built once, and found again.


def test_it_is_built_on_first_use_and_then_taken_from_the_cache(build, compiler, tmp_path):
    compilations = compiler('exec {compiler} "$@"')
    library, reason = build()
    assert isinstance(library, ctypes.CDLL)
    assert re.fullmatch(r"built by script 1\.0, \w+, on torch's threads", reason)
    assert [len(libraries(tmp_path)), compilations()] == [1, 1]
    library, again = build()
    assert library is not None
    assert again == reason
    assert [len(libraries(tmp_path)), compilations()] == [1, 1]


def test_another_source_header_compiler_or_option_is_built_anew(
    build, compiler, tmp_path, monkeypatch
):
    compilations = compiler('exec {compiler} "$@"')
    build()
    (tmp_path / "native" / "a.cpp").write_text(SOURCE + "\n")
    build()
    (tmp_path / "native" / "a.h").write_text("\n")
    build()
    compiler('exec {compiler} "$@"', version="script 1.1")
    build()
    monkeypatch.setattr(compiled, "_FLAGS", [*compiled._FLAGS, "-DOTHER"])
    build()
    assert [len(libraries(tmp_path)), compilations()] == [5, 5]


def in_a_new_process(tmp_path, before=""):
    """Build that source in a new process, which loading a torn library would end."""
    code = before + (
        "from pathlib import Path; from compat.ops import compiled; "
        f"compiled._FOLDER = Path({str(tmp_path / 'native')!r}); "
        "compiled._loaded.cache_clear(); print(compiled.library() is not None, compiled.reason())"
    )
    command = [sys.executable, "-c", code]
    return subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, text=True)


def test_processes_that_build_at_the_same_time_all_get_it(build, compiler, tmp_path):
    compilations = compiler('sleep 1; exec {compiler} "$@"')
    running = [in_a_new_process(tmp_path) for _ in range(2)]
    for process in running:
        said, _ = process.communicate()
        assert process.returncode == 0
        assert said.startswith("True "), said
    assert compilations() == 2
    assert len(libraries(tmp_path)) == 1


TORN = {
    "half of it": lambda whole: whole[: len(whole) // 2],
    "its first bytes": lambda whole: whole[:100],
    "zeros in its middle": lambda whole: whole[:4096] + bytes(4096) + whole[8192:],
    "another byte": lambda whole: whole[:-1] + bytes([whole[-1] ^ 1]),
}


@pytest.mark.parametrize("torn", TORN)
def test_a_torn_library_is_built_anew_and_then_kept(build, compiler, tmp_path, torn):
    compilations = compiler('exec {compiler} "$@"')
    build()
    [kept] = libraries(tmp_path)
    whole = kept.read_bytes()
    kept.unlink()  # The process that has loaded it keeps its own.
    kept.write_bytes(TORN[torn](whole))
    process = in_a_new_process(tmp_path)
    said, _ = process.communicate()
    assert process.returncode == 0
    assert re.fullmatch(r"True built by script 1\.0, \w+, on torch's threads\n", said)
    assert libraries(tmp_path) == [kept]
    assert kept.read_bytes() == whole
    assert build()[0] is not None
    assert compilations() == 2


@pytest.mark.parametrize("torn", [None, b"", b"12", b"\xff\xfe"])
def test_a_library_without_its_sum_is_built_anew(build, compiler, tmp_path, torn):
    compilations = compiler('exec {compiler} "$@"')
    build()
    [kept] = libraries(tmp_path)
    beside = kept.with_suffix(".sum")
    beside.unlink() if torn is None else beside.write_bytes(torn)
    for _ in range(2):
        assert build()[0] is not None
        assert libraries(tmp_path) == [kept]
        assert compilations() == 2


def test_what_is_kept_is_on_the_disk_before_it_has_its_name(build, compiler, tmp_path, monkeypatch):
    compiler('exec {compiler} "$@"')
    steps = []
    sync, rename = os.fsync, Path.replace

    def synced(handle):
        steps.append(Path(f"/proc/self/fd/{handle}").resolve().suffix)
        sync(handle)

    def renamed(path, target):
        steps.append(f"{target.suffix} named")
        return rename(path, target)

    if not Path("/proc/self/fd").exists():
        pytest.skip("this system does not tell a handle's path")
    monkeypatch.setattr(os, "fsync", synced)
    monkeypatch.setattr(Path, "replace", renamed)
    build()
    assert steps == [".so", ".so named", ".sum", ".sum named"]


# Libraries that cannot be kept: each process has its own.


def test_a_process_builds_for_itself_where_the_cache_cannot_be_written(
    build, compiler, tmp_path, monkeypatch
):
    compilations = compiler('exec {compiler} "$@"')
    scratch = tmp_path / "scratch"
    scratch.mkdir()
    monkeypatch.setattr("tempfile.tempdir", str(scratch))
    (tmp_path / "cache").write_text("a file")
    for count in (1, 2):
        library, reason = build()
        library.compat_set_team(None)
        assert "on torch's threads, for this process only: [Errno 20] Not a directory" in reason
        assert str(tmp_path / "cache") in reason
        assert compilations() == count
    assert not list(scratch.iterdir())


@pytest.mark.parametrize("step", ["fsync", "mkdir", "rename"])
def test_a_full_disk_or_a_folder_that_is_read_only_leaves_nothing_torn(
    build, compiler, tmp_path, monkeypatch, step
):
    """Fail in each step that writes to the cache in turn; the compiler writes elsewhere."""
    compilations = compiler('exec {compiler} "$@"')

    def refuse(*args, **kwargs):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), "there")

    where = {"fsync": (os, "fsync"), "mkdir": (Path, "mkdir"), "rename": (Path, "replace")}
    with monkeypatch.context() as full:
        full.setattr(*where[step], refuse)
        library, reason = build()
    assert library is not None
    assert reason.endswith("for this process only: [Errno 28] No space left on device: 'there'")
    assert libraries(tmp_path) == []
    assert build()[1].endswith("on torch's threads")
    assert len(libraries(tmp_path)) == 1
    with monkeypatch.context() as full:  # An existing file needs no writing.
        full.setattr(*where[step], refuse)
        assert build()[1].endswith("on torch's threads")
    assert compilations() == 2


def test_a_disk_that_is_full_for_the_compiler_too_is_a_reason(build, compiler, tmp_path):
    compiler('exec {compiler} "$@"')
    limited = "import resource; resource.setrlimit(resource.RLIMIT_FSIZE, (2048, 2048)); "
    process = in_a_new_process(tmp_path, before=limited)
    said, _ = process.communicate()
    assert process.returncode == 0
    assert said.startswith("False ")
    assert libraries(tmp_path) == []
    process = in_a_new_process(tmp_path)
    assert process.communicate()[0].startswith("True ")


def test_no_home_is_no_cache(build, compiler, monkeypatch):
    compiler('exec {compiler} "$@"')

    def homeless():
        raise RuntimeError("Could not determine home directory.")

    monkeypatch.delenv("XDG_CACHE_HOME")
    monkeypatch.setattr(Path, "home", homeless)
    library, reason = build()
    assert library is not None
    assert reason.endswith(
        "for this process only: there is no cache folder: Could not determine home directory."
    )


# No library at all.


FAILS = {
    "COMPAT_NATIVE=0": ({"COMPAT_NATIVE": "0"}, None, "COMPAT_NATIVE=0"),
    "no compiler": ({"PATH": "", "CXX": None}, None, "no C++ compiler (c++, g++ or clang++)"),
    "a compiler that is not there": ({"CXX": "nowhere -m64"}, None, "compiler (nowhere -m64)"),
    "a compiler that does not run": ({"CXX": "false"}, None, "false does not run: exit status 1"),
    "an error in the source": ({}, 'echo "a.cpp:1: error: no" >&2; exit 1', "a.cpp:1: error: no"),
    "a compiler that dies": ({}, 'echo half > "$0.so"; kill -9 $$', "failed: exit status -9"),
    "a compiler that writes nothing": ({}, "exit 0", "script failed: it wrote no library"),
    "an object that cannot be loaded": (
        {},
        'while [ $# -gt 1 ]; do shift; done; echo text > "$1"',
        "cannot be written or loaded",
    ),
}


@pytest.mark.parametrize("case", FAILS)
def test_without_it_plain_torch_runs_and_the_reason_is_said(
    build, compiler, monkeypatch, tmp_path, case
):
    environment, script, said = FAILS[case]
    if script:
        compiler(script)
    for name, value in environment.items():
        monkeypatch.setenv(name, value) if value is not None else monkeypatch.delenv(name, False)
    library, reason = build()
    assert library is None
    assert said in reason
    assert "\n" not in reason
    monkeypatch.setattr(compiled, "_loaded", lambda: (None, reason))
    assert ops.backend() == "torch"
    assert f"plain torch, as the native kernels are not available: {reason}" in str(compat.status())
    with pytest.raises(RuntimeError, match=re.escape(reason)), ops.using("native"):
        pass


def test_an_unknown_backend_is_refused():
    with pytest.raises(ValueError, match="'fast'"), ops.using("fast"):
        pass


def test_a_choice_holds_in_its_block_only():
    before = ops.backend()
    with ops.using("released"):
        assert ops.backend() == "released"
        with ops.using("torch"):
            assert ops.backend() == "torch"
        assert ops.backend() == "released"
        assert "transformers' own path" in compat.status().cpu
    assert ops.backend() == before


# Things that the kernels share.


@pytest.fixture
def library():
    if compiled.library() is None:
        pytest.skip(compiled.reason())
    return compiled.library()


def test_exp_is_right_to_two_units_in_the_last_place(library):
    x = torch.cat([torch.linspace(-87.3, 88.7, 1_000_001), torch.linspace(-1e-3, 1e-3, 1001)])
    out = torch.empty_like(x)
    library.compat_exp(
        ctypes.c_void_p(x.data_ptr()), ctypes.c_void_p(out.data_ptr()), ctypes.c_int64(len(x))
    )
    exact = x.double().exp()
    assert ((out - exact).abs() / exact).max() <= 2 * 2**-23


def test_exp_at_its_ends(library):
    x = torch.tensor([-math.inf, -1e30, -104.0, -0.0, 89.0, 1e30, math.inf, math.nan] * 5)
    out = torch.empty_like(x)
    library.compat_exp(
        ctypes.c_void_p(x.data_ptr()), ctypes.c_void_p(out.data_ptr()), ctypes.c_int64(len(x))
    )
    assert torch.equal(out.isnan(), x.isnan())
    assert torch.equal(out[~x.isnan()], x.exp()[~x.isnan()])


def test_the_threads_are_those_that_torch_has(library):
    """Expect no second pool: a call leaves the number of the process's threads as before."""
    code = """if True:
        import os, torch
        from compat.ops import mamba2, using
        torch.set_num_threads(3)
        torch.randn(2000, 2000) @ torch.randn(2000, 2000)
        torch.randn(3_000_000).exp()
        before = len(os.listdir("/proc/self/task"))
        given = dict(zxbcdt=torch.randn(1, 300, 98), conv1d_weight=torch.randn(64, 4),
                     conv1d_bias=None, dt_bias=torch.randn(2), A=-torch.rand(2), D=torch.ones(2))
        with using("native"), torch.no_grad():
            mamba2.mamba_split_conv1d_scan_combined(**given, headdim=16)
        assert before >= 3
        assert len(os.listdir("/proc/self/task")) == before
    """
    if not Path("/proc/self/task").exists():
        pytest.skip("this system does not list a process's threads")
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr

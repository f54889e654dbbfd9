"""How the native kernels are built, found again, and done without; and what they share."""

import ctypes
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
from compat.ops import _native

ROOT = Path(compat.__file__).parent.parent
SOURCE = 'extern "C" void compat_set_team(void*) {}\n'


@pytest.fixture
def build(monkeypatch, tmp_path):
    """Builds a small source in a cache of its own; gives the library, or None, and the reason."""
    folder, cache = tmp_path / "native", tmp_path / "cache"
    folder.mkdir()
    (folder / "a.cpp").write_text(SOURCE)
    monkeypatch.setattr(_native, "_FOLDER", folder)
    monkeypatch.setenv("XDG_CACHE_HOME", str(cache))
    monkeypatch.delenv("COMPAT_NATIVE", raising=False)
    return _native._loaded.__wrapped__


@pytest.fixture
def compiler(monkeypatch, tmp_path):
    """Puts a script in the compiler's place, and counts its compilations."""
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
    return sorted(path.name for path in (tmp_path / "cache").rglob("*") if path.is_file())


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
    monkeypatch.setattr(_native, "_FLAGS", [*_native._FLAGS, "-DOTHER"])
    build()
    assert [len(libraries(tmp_path)), compilations()] == [5, 5]


def test_processes_that_build_at_the_same_time_all_get_it(build, compiler, tmp_path):
    compilations = compiler('sleep 1; exec {compiler} "$@"')
    code = (
        "from pathlib import Path; from compat.ops import _native; "
        f"_native._FOLDER = Path({str(tmp_path / 'native')!r}); "
        "_native._loaded.cache_clear(); assert _native.library(), _native.reason()"
    )
    command = [sys.executable, "-c", code]
    running = [subprocess.Popen(command, cwd=ROOT, env=os.environ) for _ in range(2)]
    assert [process.wait() for process in running] == [0, 0]
    assert compilations() == 2
    assert len(libraries(tmp_path)) == 1


# Where it is not to be had.


FAILS = {
    "COMPAT_NATIVE=0": ({"COMPAT_NATIVE": "0"}, None, "COMPAT_NATIVE=0"),
    "no compiler": ({"PATH": "", "CXX": None}, None, "no C++ compiler (c++, g++ or clang++)"),
    "a compiler that is not there": ({"CXX": "nowhere -m64"}, None, "compiler (nowhere -m64)"),
    "a compiler that does not run": ({"CXX": "false"}, None, "false does not run: exit status 1"),
    "an error in the source": ({}, 'echo "a.cpp:1: error: no" >&2; exit 1', "a.cpp:1: error: no"),
    "a compiler that writes nothing": ({}, "exit 0", "cannot be written"),
    "an object that cannot be loaded": (
        {},
        'while [ $# -gt 1 ]; do shift; done; echo text > "$1"',
        "cannot be loaded",
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
    monkeypatch.setattr(_native, "_loaded", lambda: (None, reason))
    assert ops.backend() == "torch"
    assert f"plain torch, as the native kernels are not to be had: {reason}" in str(compat.status())
    with pytest.raises(RuntimeError, match=re.escape(reason)), ops.using("native"):
        pass


def test_a_cache_that_cannot_be_written_is_a_reason(build, compiler, tmp_path):
    compiler('exec {compiler} "$@"')
    (tmp_path / "cache").write_text("a file")
    library, reason = build()
    assert library is None
    assert f"{tmp_path / 'cache'}/vertical-chunking cannot be written" in reason


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


# What the kernels share.


@pytest.fixture
def library():
    if _native.library() is None:
        pytest.skip(_native.reason())
    return _native.library()


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
    """No second pool: the process has as many threads after a call as before."""
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

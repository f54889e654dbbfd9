"""Hub kernels made of the patched forks: files that are copied or rewritten, and drift."""

import ast
import functools
import importlib.machinery
import importlib.util
import json
import os
import re
import shutil
import subprocess
import sys
import sysconfig
import tomllib
from pathlib import Path
from textwrap import dedent

import pytest
import torch

from ci import forks
from ci.forks import __main__, _tree, hub_kernels

FORK = {
    "LICENSE": "MIT\n",
    "csrc/tiny.cpp": "#include <python.h>\nvoid fwd();\nMODULE(m) {\n  m.def();\n}\n",
    "csrc/tiny.h": "// tiny\n",
    "tiny/__init__.py": "from tiny.core import f\n",
    "tiny/core.py": """
        from __future__ import annotations

        import torch

        import tiny.deep.low as low
        import tiny_cuda
        from tiny.deep import low as deeper, NAME
        from tiny.deep.low import (
            a,
            b as c,  # ü: two bytes
        )

        SPACE = "tiny"


        @torch.library.custom_op(f"{SPACE}::_f", mutates_args=())
        def _f(x: torch.Tensor) -> torch.Tensor:
            return tiny_cuda.fwd(x)
    """,
    "tiny/deep/__init__.py": 'NAME = "deep"\n',
    "tiny/deep/low.py": """
        def a():
            if True:
                from tiny import core
            import tiny.deep as named
            from .. import f
            return core
    """,
    "tiny/huge.py": "import gigabytes\n",
    "setup.py": "import tiny\n",
}
OURS = {
    ".gitignore": "/tree/\n",
    "CARD.md": "# tiny-hub\n",
    "build.toml": """
        [general]
        name = "tiny-hub"
        version = 3
        license = "MIT"
        upstream = "https://example.org/tiny"
        backends = ["cpu", "cuda"]
        python-depends = []

        [torch]
        pyext = ["h", "py"]
        src = ["torch-ext/torch_binding.cpp"]

        [kernel.tiny]
        backend = "cuda"
        depends = ["torch"]
        src = ["kernel/tiny.cpp", "kernel/tiny.h"]
    """,
    "propagate.toml": """
        published = 2

        [forks.tiny]
        leave = ["setup.py", "tiny/__init__.py", "tiny/huge.py"]

        [forks.tiny.copy]
        "LICENSE" = "LICENSE"
        "csrc" = "kernel"
        "tiny" = "torch-ext/tiny_hub/lib"

        [overlays]
        "ours/op.py" = "torch-ext/tiny_hub/cpu/op.py"
        "ours/helper.py" = "torch-ext/tiny_hub/cpu/_helper.py"
        "ours/op.h" = "torch-ext/tiny_hub/cpu/op.h"

        [compiled]
        tiny_cuda = "tiny_"

        [[rewrite]]
        file = "kernel/tiny.cpp"
        find = '^#include <python.h>\\n'
        by = ""

        [[rewrite]]
        file = "kernel/tiny.cpp"
        find = '^MODULE[^}]*\\}\\n'
        by = ""
    """,
    "torch-ext/torch_binding.cpp": 'ops.def(\n    "tiny_fwd(Tensor x) -> Tensor");\n',
    "torch-ext/tiny_hub/__init__.py": "from .cpu.op import g\nfrom .lib import f\n",
    "torch-ext/tiny_hub/lib/__init__.py": "from .core import _f as f\n",
}
OVERLAYS = {
    "ours/op.py": "from ours import helper\nfrom ours.helper import x\n\ng = helper, x\n",
    "ours/helper.py": "x = 1\n",
    "ours/op.h": "// op\n",
}
PACKAGE = "torch-ext/tiny_hub"


def write(folder, files):
    for name, text in files.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text(dedent(text).removeprefix("\n") if "\n " in text else text)


@pytest.fixture
def root(tmp_path, monkeypatch):
    """Make a repository with one fork and one hub kernel."""
    fork = tmp_path / "forks/tiny/tree"
    write(fork, FORK)
    write(tmp_path / "forks/kernels-community/tiny-hub", OURS)
    write(tmp_path, OVERLAYS)
    _tree.git(fork, "init", "-q")
    _tree.git(fork, "add", "--all")
    monkeypatch.setattr(
        hub_kernels, "patched", lambda library, root: root / f"forks/{library}/tree"
    )
    return tmp_path


@pytest.fixture
def kernel(root):
    """Return the folder of that kernel."""
    return root / "forks/kernels-community/tiny-hub"


def change(path, old, new):
    text = path.read_text()
    assert text.count(old) == 1
    path.write_text(text.replace(old, new))


def built(kernel):
    return {
        path.relative_to(kernel / "tree").as_posix(): path.read_text()
        for path in (kernel / "tree").rglob("*")
        if path.is_file()
    }


def test_what_a_hub_kernel_is_made_of(root, kernel):
    assert forks.propagate("tiny-hub", root)
    files = built(kernel)
    in_package = {path for path in files if path.startswith(f"{PACKAGE}/")}
    assert files.keys() - in_package == {
        "CARD.md",
        "LICENSE",
        "build.toml",
        "kernel/tiny.cpp",
        "kernel/tiny.h",
        "torch-ext/torch_binding.cpp",
        *(path.replace(PACKAGE, "build/torch-cpu") for path in in_package),
        "build/torch-cpu/_ops.py",
        "build/torch-cpu/metadata.json",
    }
    assert files["kernel/tiny.cpp"] == "void fwd();\n"
    assert files[f"{PACKAGE}/lib/core.py"] == dedent("""\
        from __future__ import annotations

        from .._ops import add_op_namespace_prefix
        import torch

        from .deep import low as low
        from .._ops import ops as tiny_cuda
        from .deep import low as deeper, NAME
        from .deep.low import (
            a,
            b as c,  # ü: two bytes
        )

        SPACE = "tiny"


        @torch.library.custom_op(add_op_namespace_prefix("_f"), mutates_args=())
        def _f(x: torch.Tensor) -> torch.Tensor:
            return tiny_cuda.tiny_fwd(x)
    """)
    assert files[f"{PACKAGE}/lib/deep/low.py"] == dedent("""\
        def a():
            if True:
                from .. import core
            from .. import deep as named
            from .. import f
            return core
    """)
    assert files[f"{PACKAGE}/lib/__init__.py"] == OURS[f"{PACKAGE}/lib/__init__.py"]
    assert files[f"{PACKAGE}/cpu/op.py"] == (
        "from . import _helper as helper\nfrom ._helper import x\n\ng = helper, x\n"
    )
    assert f"{PACKAGE}/lib/huge.py" not in files

    metadata = json.loads(files["build/torch-cpu/metadata.json"])
    name = metadata.pop("id")
    assert re.fullmatch("_tiny_hub_cpu_[0-9a-f]{10}", name)
    assert metadata == {
        "name": "tiny-hub",
        "version": 3,
        "license": "MIT",
        "upstream": "https://example.org/tiny",
        "python-depends": [],
        "backend": {"type": "cpu"},
    }
    module = {}
    exec(files["build/torch-cpu/_ops.py"], module)
    assert module["add_op_namespace_prefix"]("_f") == f"{name}::_f"
    assert module["ops"] is getattr(torch.ops, name)


def test_it_is_built_once_and_always_the_same(root, kernel):
    assert forks.propagate("tiny-hub", root)
    before = built(kernel)
    (kernel / "tree" / PACKAGE / "__pycache__").mkdir()
    (kernel / "tree" / PACKAGE / "__pycache__/x.pyc").write_bytes(b"")
    assert not forks.propagate("tiny-hub", root)
    assert not forks.propagate("tiny-hub", root, check=True)
    (kernel / "tree/LICENSE").unlink()
    (kernel / "tree/more.txt").write_text("")
    assert forks.propagate("tiny-hub", root)
    assert built(kernel) == before


@pytest.mark.parametrize(
    ("changed", "names"),
    [
        ("forks/tiny/tree/tiny/core.py", ["build/torch-cpu/_ops.py", f"{PACKAGE}/lib/core.py"]),
        ("forks/tiny/tree/csrc/tiny.h", ["kernel/tiny.h"]),
        ("ours/op.py", [f"{PACKAGE}/cpu/op.py"]),
        ("forks/kernels-community/tiny-hub/CARD.md", ["CARD.md"]),
        ("forks/kernels-community/tiny-hub/tree/kernel/tiny.cpp", ["kernel/tiny.cpp"]),
    ],
)
def test_check_names_what_is_not_as_it_would_be_built(root, kernel, capsys, changed, names):
    assert __main__.main(["propagate"], root) == 0
    assert __main__.main(["propagate", "tiny-hub", "--check"], root) == 0
    (root / changed).write_text((root / changed).read_text() + "\n")
    before = built(kernel)
    capsys.readouterr()
    assert __main__.main(["propagate", "--check"], root) == 1
    said = capsys.readouterr().err
    assert all(name in said for name in names)
    assert "python -m ci.forks propagate tiny-hub" in said
    assert built(kernel) == before


TOML = "forks/kernels-community/tiny-hub/propagate.toml"
BUILD = "forks/kernels-community/tiny-hub/build.toml"
BINDING = "forks/kernels-community/tiny-hub/torch-ext/torch_binding.cpp"
INIT = f"forks/kernels-community/tiny-hub/{PACKAGE}/__init__.py"
CORE = "forks/tiny/tree/tiny/core.py"


@pytest.mark.parametrize(
    ("path", "old", "new", "message"),
    [
        ("forks/tiny/tree/tests.py", None, "", "tests.py of tiny is neither copied nor left out"),
        ("forks/tiny/tree/csrc/b.cu", None, "", "name each source once.*kernel/b.cu"),
        ("forks/tiny/tree/tiny/data.json", None, "", "pyext would leave out .*lib/data.json"),
        (TOML, '"setup.py",', '"setup.py", "setup.cfg",', "tiny has no setup.cfg"),
        (TOML, '"csrc" = "kernel"', '"src" = "kernel"', "csrc/tiny.cpp of tiny is neither"),
        (TOML, "ours/op.h", "ours/o.h", "no ours/o.h, which is an overlay"),
        (TOML, "cpu/op.h", "cpu/op.py", "a second .*cpu/op.py"),
        (TOML, '"tiny/__init__.py", ', "", "a second .*lib/__init__.py"),
        (TOML, "#include <python.h>", "#include <pyth.h>", "pyth.h.* fits 0 times"),
        (TOML, "'^MODULE[^}]*\\}\\n'", "'f'", "'f' fits 2 times"),
        (TOML, "published = 2", "published = 3", "version 3, and 3 is the newest.*needed: 4"),
        (TOML, "published = 2", "", "published"),
        (BUILD, '"kernel/tiny.h"', '"kernel/small.h"', "small.h, kernel/tiny.h"),
        (BUILD, '"kernel/tiny.h"', '"kernel/tiny.h", "kernel/tiny.h"', "name each source once"),
        (BINDING, "tiny_fwd", "tiny_bwd", "define the ops tiny_bwd; .* call tiny_fwd"),
        (CORE, "tiny_cuda.fwd(x)", "tiny_cuda.other(x)", "call tiny_other"),
        (CORE, "import tiny_cuda", "import tiny_cuda as t", r"lib/core.py:6 imports tiny_cuda"),
        (CORE, "import tiny.deep.low as low", "import tiny.deep.low", "core.py:5 .* relative"),
        (CORE, "import tiny.deep.low as low", "import os, tiny.deep", "5 imports several"),
        (CORE, "import tiny.deep.low as low", "import tiny.huge as low", "5 imports tiny.huge"),
        (CORE, "import tiny.deep.low as low", "from tiny.huge import low", "low of tiny.huge"),
        (CORE, 'f"{SPACE}::_f"', "SPACE", "torch.library.custom_op of SPACE"),
        (INIT, "from .lib", "from tiny.core", "__init__.py imports by names .* not relative"),
        (INIT, "from .lib", "from .lab", "imports lab: no such file"),
        ("ours/op.py", "from ours.helper", "from ours.gone", "imports x of ours.gone"),
    ],
)
def test_drift_is_an_error(root, kernel, path, old, new, message):
    forks.propagate("tiny-hub", root)
    before = built(kernel)
    if old is None:
        write(root, {path: new})
        _tree.git(root / "forks/tiny/tree", "add", "--all")
    else:
        change(root / path, old, new)
    with pytest.raises(forks.ForkError, match=f"(?s){message}"):
        forks.propagate("tiny-hub", root)
    assert built(kernel) == before
    assert not list(kernel.glob(".new-*"))


def test_a_kernel_that_is_not_there(root):
    with pytest.raises(forks.ForkError, match="no such kernel; there are tiny-hub"):
        forks.propagate("tiny", root)


# The hub kernels of this repository.


@functools.cache
def tree_of(name):
    forks.propagate(name)
    return forks.ROOT / "forks/kernels-community" / name / "tree"


@pytest.fixture(params=forks.kernels())
def tree(request):
    """Return the tree of a built hub kernel."""
    return tree_of(request.param)


def schemas(tree):
    """Return the ops that the bindings define, by name."""
    texts = "".join(path.read_text() for path in sorted((tree / "torch-ext").glob("*.h")))
    found = re.findall(r'\bops\.def\(((?:\s*"[^"]*")+)\);', texts)
    parsed = [torch._C.parse_schema("".join(re.findall('"(.*?)"', text))) for text in found]
    return {schema.name: schema for schema in parsed}


def test_calls_of_ops_fit_their_schemas(tree):
    known, called = schemas(tree), set()
    for path in (tree / "torch-ext").rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text())):
            function = node.func if isinstance(node, ast.Call) else None
            if isinstance(function, ast.Attribute) and ast.unparse(function.value).endswith(
                "_cuda"
            ):
                arguments = known[function.attr].arguments
                required = [argument for argument in arguments if not argument.has_default_value()]
                assert len(required) <= len(node.args) <= len(arguments), (path, node.lineno)
                assert not node.keywords
                called.add(function.attr)
    assert called == known.keys()


def test_a_tensor_is_marked_if_and_only_if_upstream_says_that_it_is_written_to(tree):
    """Compare with `mutates_args` of the custom ops that call them, less what kernels only read."""
    for path in (tree / "torch-ext").rglob("cpp_functions.py"):
        for node in ast.parse(path.read_text()).body:
            if isinstance(node, ast.FunctionDef) and node.decorator_list:
                (written,) = (k.value for k in node.decorator_list[0].keywords)
                (call,) = (n for n in ast.walk(node) if isinstance(n, ast.Call) and len(n.args) > 5)
                schema = schemas(tree)[call.func.attr]
                names = [argument.id for argument in call.args]
                assert names == [argument.name for argument in schema.arguments]
                marked = {
                    a.name for a in schema.arguments if a.alias_info and a.alias_info.is_write
                }
                # dfinal_states is an incoming gradient.
                assert marked == ast.literal_eval(written) - {"dfinal_states"}


def test_both_kernels_have_the_same_convolution():
    first, second = (
        {path.name: path.read_bytes() for path in (tree_of(name) / "causal-conv1d").iterdir()}
        for name in ("causal-conv1d", "mamba-ssm")
    )
    second.pop("LICENSE")
    assert first == second


def test_licences_of_all_that_is_copied_are_there(tree):
    general = tomllib.loads((tree / "build.toml").read_text())["general"]
    names = {"Apache-2.0": "Apache License", "BSD-3-Clause": "Redistribution and use"}
    assert names[general["license"]] in (tree / "LICENSE").read_text()
    texts = [path.read_text() for path in tree.rglob("LICENSE*")]
    assert all(any(name in text for text in texts) for name in names.values())


# The code that kernel-builder generates for the bindings, as far as they use it.
REGISTRATION = """
#include <Python.h>
#define TORCH_LIBRARY_EXPAND(NAME, MODULE) TORCH_LIBRARY(NAME, MODULE)
#define JOIN(A, B) A##B
#define REGISTER_EXTENSION(NAME) REGISTER_AS(NAME)
#define REGISTER_AS(NAME) \\
  PyMODINIT_FUNC JOIN(PyInit_, NAME)() { \\
    static PyModuleDef module = {PyModuleDef_HEAD_INIT, #NAME, nullptr, 0, nullptr}; \\
    return PyModule_Create(&module); \\
  }
"""


def compiled(sources, folder, *options):
    """Compile object files with the compiler of `options` or g++, for torch and the limited API."""
    torch_headers = Path(torch.__file__).parent / "include"
    (folder / "c10/cuda/impl").mkdir(parents=True, exist_ok=True)
    (folder / "c10/cuda/impl/cuda_cmake_macros.h").touch()  # torch's build for CPUs lacks it.
    (folder / "registration.h").write_text(REGISTRATION)
    headers = [folder, torch_headers, torch_headers / "torch/csrc/api/include"]
    headers += [sysconfig.get_path("include")]
    objects = [folder / f"{source.stem}.o" for source in sources]
    for source, made in zip(sources, objects, strict=True):
        command = [*options, "-std=c++20", "-c", "-DPy_LIMITED_API=0x03090000"]
        command += [*(f"-I{header}" for header in headers), str(source), "-o", str(made)]
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        assert not done.returncode, done.stderr
    return objects


def loaded(name, library):
    """Load an extension in which functions may be undefined as long as they are not called."""
    loader = importlib.machinery.ExtensionFileLoader(name, str(library))
    flags = sys.getdlopenflags()
    sys.setdlopenflags(os.RTLD_LAZY)
    try:
        spec = importlib.util.spec_from_loader(name, loader)
        loader.exec_module(importlib.util.module_from_spec(spec))
    finally:
        sys.setdlopenflags(flags)
    return getattr(torch.ops, name)


@pytest.mark.slow
@pytest.mark.parametrize("backend", ["CPU", "CUDA"])
def test_bindings_register_the_ops(tree, backend, tmp_path):
    if not shutil.which("g++"):
        pytest.skip("no g++")
    name = f"_{tree.parent.name.replace('-', '_')}_{backend.lower()}_test"
    options = ["g++", "-fPIC", f"-D{backend}_KERNEL", f"-DTORCH_EXTENSION_NAME={name}"]
    objects = compiled([tree / "torch-ext/torch_binding.cpp"], tmp_path, *options)
    lib = Path(torch.__file__).parent / "lib"
    command = ["g++", "-shared", *map(str, objects), f"-L{lib}", "-ltorch_cpu", "-ltorch", "-lc10"]
    subprocess.run([*command, "-o", str(tmp_path / "binding.so")], check=True)
    ops = loaded(name, tmp_path / "binding.so")
    for op, schema in schemas(tree).items():
        assert str(getattr(ops, op).default._schema) == f"{name}::{schema}"
        on_gpu = torch._C._dispatch_has_kernel_for_dispatch_key(f"{name}::{op}", "CUDA")
        assert on_gpu == (backend == "CUDA")
        arguments = [torch.ones(2) if str(a.type) == "Tensor" else None for a in schema.arguments]
        arguments = [
            True if str(a.type) == "bool" else value
            for a, value in zip(schema.arguments, arguments, strict=True)
        ]
        with pytest.raises(NotImplementedError, match=f"{op}' with arguments from the 'CPU'"):
            getattr(ops, op)(*arguments)


@pytest.mark.slow
def test_bindings_call_functions_that_the_sources_define(tree, tmp_path):
    if not (shutil.which("nvcc") and shutil.which("nm")):
        pytest.skip("no nvcc, which finds CUDA's headers, or no nm")
    options = ["nvcc", "-O0", "-DCUDA_KERNEL", "-DTORCH_EXTENSION_NAME=_test"]
    sources = sorted(tree.glob("*/*.cpp"))
    binding = sources.index(tree / "torch-ext/torch_binding.cpp")
    symbols = []
    for made in compiled(sources, tmp_path, *options):
        command = ["nm", "--extern-only", "--format=posix", str(made)]
        lines = subprocess.run(command, capture_output=True, text=True, check=True).stdout
        symbols.append([line.split()[:2] for line in lines.splitlines()])
    own = re.compile("|".join(rf"_Z\d+{op}[A-Z]" for op in schemas(tree)))
    called = {name for name, kind in symbols.pop(binding) if kind == "U" and own.match(name)}
    defined = {name for symbols_of in symbols for name, kind in symbols_of if kind == "T"}
    assert len(called) == len(schemas(tree))
    assert called <= defined

"""The report of `status()`: libraries, where chunking is native or patched, what models run on.

To find out what a type of model runs on, its mixers are run, so that part waits until it is read.
"""

from __future__ import annotations

from contextlib import nullcontext
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, version
from typing import Literal

from packaging.version import Version

from compat import ops
from compat.errors import UnsupportedVersionError
from compat.families import delta, exact, fla_rwkv, mamba1, mamba2, mamba2_kernels, rwkv4
from compat.hooks import encoder, own_chunks
from compat.installed import hub_kernels, recurrent_cache

State = Literal["native", "patched", "absent"]

TESTED = {"transformers": "5.24.0", "sentence-transformers": "6.2.0"}
"""The newest releases that the repository was tested on."""


@dataclass(frozen=True)
class LibraryStatus:
    """Vertical chunking in one library.

    Attributes:
        library: The distribution's name.
        version: Its installed version; None where it is not installed.
        state: `native` where the library does it itself, `patched` where compat's hooks do it,
            `absent` where there is no support.
        reason: Why it is in that state, and whether the version is newer than the newest tested.
    """

    library: str
    version: str | None
    state: State
    reason: str


@dataclass(frozen=True)
class Report:
    """The status of each library, and what models run on; printed as a table and some lines.

    Attributes:
        libraries: The status of each library: native, patched or absent, and the reason.
    """

    libraries: tuple[LibraryStatus, ...]

    @property
    def fused(self) -> str:
        """Say what runs the Mamba2 mixers of a model on a GPU, or why compat offers no path."""
        if native := _native():
            return native
        path = mamba2_kernels.probe()
        if not path.run:
            return _with_hub(path.reason)
        return _served(path.reason, [name for name in mamba2.MIXERS if mamba2.on_cpu(name) == ""])

    @property
    def cpu(self) -> str:
        """Say what runs mixers on a CPU: native kernels, or torch and why."""
        if native := _native():
            return native
        if ops.backend() == "released":
            return "not used, as transformers' own path was chosen"
        return _served(ops.describe(), [name for name, why in self.paths.items() if not why])

    @property
    def paths(self) -> dict[str, str]:
        """Say for each model type with a fast path on a CPU why it is not taken; empty where it is.

        A reason names the case, and the two figures in which the released code differs from
        compat's.
        """
        found = {name: mamba2.on_cpu(name) for name in mamba2.MIXERS}
        found |= {name: mamba1.on_cpu(name) for name in mamba1.MIXERS}
        found |= {name: delta.on_cpu(name) for name in delta.RULES} | {"rwkv": rwkv4.on_cpu()}
        found |= {f"{name} (fla)": why for name, why in fla_rwkv.on_cpu().items()}
        return {name: why for name, why in sorted(found.items()) if why is not None}

    def __str__(self) -> str:
        head = ("library", "version", "state", "reason")
        rows = [head] + [(s.library, s.version or "-", s.state, s.reason) for s in self.libraries]
        widths = [max(len(row[column]) for row in rows) for column in range(3)]
        lines = [
            "  ".join([*(cell.ljust(w) for cell, w in zip(row, widths, strict=False)), row[3]])
            for row in rows
        ]
        runs = [f"fused path of Mamba2 on a GPU: {self.fused}", f"on a CPU: {self.cpu}"]
        slower = [f"    {name}: {why}" for name, why in self.paths.items() if why]
        wrong = [
            f"not in chunks: {name}, which {why}" for name, why in exact.asked().items() if why
        ]
        return "\n".join([*lines, "", *runs, *slower, *wrong])


def library_status(library: str, state: State, reason: str) -> LibraryStatus:
    """Return the status of a library as it is installed."""
    try:
        installed = version(library)
    except PackageNotFoundError:
        return LibraryStatus(library, None, state, reason)
    if Version(installed) > Version(TESTED[library]):
        reason += f"; newer than tested, which is {TESTED[library]}"
    return LibraryStatus(library, installed, state, reason)


def transformers_status(patched: bool) -> LibraryStatus:
    """Return the status of transformers.

    Args:
        patched: True while compat's hooks are in it.
    """
    if reason := recurrent_cache.probe():
        return library_status("transformers", "absent", reason)
    if patched:
        reason = "Mamba-1, RWKV and xLSTM are patched; the others continue from their cache"
        return library_status("transformers", "patched", reason)
    reason = "models continue from their cache; compat.iter_chunks feeds them"
    return library_status("transformers", "native", reason)


def sentence_transformers_status(patched: bool) -> LibraryStatus:
    """Return the status of sentence-transformers.

    Args:
        patched: True while compat's hooks are in it.
    """
    name = "sentence-transformers"
    if not encoder.installed():
        return LibraryStatus(name, None, "absent", "not installed")
    if own_chunks.is_native():
        reason = "this release has vertical_chunk_size itself"
        added = "; a model's own default is compat's" if patched else ""
        return library_status(name, "native", reason + added)
    if patched:
        reason = "encode takes vertical_chunk_size; Transformer and Pooling work on chunks"
        return library_status(name, "patched", reason)
    reason = "hooks not installed: call compat.enable_vertical_chunking()"
    try:
        encoder.plan(nullcontext)
    except UnsupportedVersionError as error:
        reason = error.found
    return library_status(name, "absent", reason)


def _native() -> str | None:
    """Describe a transformers that has the fused path itself and is left alone; None for others."""
    has = [name for name in mamba2.MIXERS if mamba2.is_native(name)]
    if not has:
        return None
    installed = f"transformers {version('transformers')}"
    return f"native: {installed} runs the fused op of its kernels itself, for {', '.join(has)}"


def _served(reason: str, names: list[str]) -> str:
    if not names:
        return f"not used, as the models of transformers {version('transformers')} are others"
    return _with_hub(f"{reason}; for {', '.join(sorted(names))}")


def _with_hub(reason: str) -> str:
    said = hub_kernels.describe(sorted(mamba2.MIXERS))
    return f"{reason}; {said}" if said else reason

"""Corpora beyond one machine: the command's own promises, on Ray Data.

The work goes in blocks, each a list of documents in one row of a Dataset. An actor embeds a block
and writes it as one Parquet file; what it returns are the problems, and how much it made.
"""

from __future__ import annotations

import math
import os
import pickle
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import pyarrow as pa  # type: ignore[import-untyped]
import ray
import torch

import compat
from compat.errors import VerticalChunkingError
from compat.jobs.documents import Columns, Document, Known, Note, Problem, read_documents, read_rows
from compat.jobs.embed import say_made
from compat.jobs.embedder import DocumentEmbedder
from compat.jobs.journal import PassageRow, Row, locked
from compat.jobs.loading import in_short, label
from compat.jobs.parts import (
    Finished,
    build_index,
    drop_index,
    in_blocks,
    next_run,
    note_ids,
    write_part,
)
from compat.jobs.rows import id_of
from compat.stream.rows import Auto
from compat.stream.text import TextStream

Item = Document | Problem | Note
# What an actor tells of a block: problems and notes, what it made, or why it could not.
_TOLD = pa.schema(
    [
        ("line", pa.string()),
        ("problems", pa.int64()),
        ("documents", pa.int64()),
        ("made", pa.int64()),
        ("failure", pa.binary()),
    ]
)


def embed(
    source: Any,
    output: str | Path,
    *,
    model: str | None = None,
    vertical_chunk_size: int | Auto = 512,
    batch_size: int = 8,
    dtype: str = "auto",
    device: str | None = None,
    text_column: str = "text",
    id_column: str | None = None,
    max_seq_length: int | None = None,
    truncate: bool = False,
    traceback: bool = False,
    every: tuple[int, int] | None = None,
    spans_column: str | None = None,
    workers: int | None = None,
    resources: Mapping[str, float] | None = None,
    block_rows: int = 4096,
    block_bytes: int = 8 << 20,
) -> int:
    """Embed documents on all machines of a Ray cluster; the same call carries on.

    The model, the output, and inputs that are files must have the same path on every machine.

    Args:
        source: A Ray Dataset with the columns, or a path or paths as the command takes them.
        output: A folder of Parquet files, with the command's columns.
        workers: Actors, each with a model; by default as many as have room, with a CPU to spare.
        resources: What each of them needs, such as {"CPU": 4, "GPU": 1}; by default a CPU, and a
            GPU where the cluster has any. It has as many threads as CPUs.
        block_rows: The most documents of a block, which is lost when its actor is killed.
        block_bytes: The most bytes of text of a block; a longer text is alone. Texts of more than
            a quarter of that begin first.

    All others are those of the command.

    Returns:
        The number of problems; each was one line on stderr.

    Raises:
        VerticalChunkingError: It cannot be carried out; finished rows are kept.
        OSError: The output cannot be written; finished rows are kept.
    """
    if not ray.is_initialized():
        ray.init()
    if isinstance(source, ray.data.Dataset) and id_column is None:
        raise VerticalChunkingError(
            "a Dataset without id_column", "a column of ids, by which a run carries on", "name it"
        )
    if isinstance(source, str | Path):
        source = [source]
    folder = Path(output).absolute()
    folder.mkdir(exist_ok=True)
    arguments = {
        "model": model,
        "vertical_chunk_size": vertical_chunk_size,
        "dtype": dtype,
        "device": device,
        "max_seq_length": max_seq_length,
        "truncate": truncate,
        "every": every,
        "spans_column": spans_column,
    }
    columns = Columns(text_column, id_column, spans_column)
    needs = _needs(resources)
    workers = _workers(workers, needs)
    with locked(folder / "_lock"):
        if (line := label(model)) is not None:
            print(line, file=sys.stderr)
        settings = _settings(arguments, needs)
        run = next_run(folder)
        build_index(folder, settings)
        if isinstance(source, ray.data.Dataset):
            blocks = _blocks_of_dataset(source, folder, columns, block_rows, block_bytes)
        else:
            blocks = _blocks_of_inputs(source, folder, columns, block_rows, block_bytes, traceback)
        start = time.perf_counter()
        results = blocks.repartition(target_num_rows_per_block=1).map_batches(
            _Worker,
            batch_size=1,
            batch_format="pyarrow",
            compute=ray.data.ActorPoolStrategy(size=workers),
            fn_constructor_args=(
                arguments,
                settings,
                folder,
                run,
                batch_size,
                traceback,
                Path.cwd(),
                needs["num_cpus"],
            ),
            **needs,
        )
        problems, documents, made = _follow(results)
        seconds = time.perf_counter() - start
        kept = build_index(folder, settings)
        drop_index(folder)
    unit = "passages" if every or spans_column else "tokens"
    say_made(documents, made, unit, seconds, f"{kept} rows in {output}")
    return problems


def _needs(resources: Mapping[str, float] | None) -> dict[str, Any]:
    """Return what an actor needs, in the words of Ray's options."""
    wanted = dict(resources or {})
    gpus = wanted.pop("GPU", float(resources is None and ray.cluster_resources().get("GPU", 0) > 0))
    needs: dict[str, Any] = {"num_cpus": wanted.pop("CPU", 1.0)}
    if gpus:
        needs["num_gpus"] = gpus
    return needs | ({"resources": wanted} if wanted else {})


def _workers(wanted: int | None, needs: Mapping[str, Any]) -> int:
    """Return how many actors there are to be, with a CPU left to those who read."""
    there = ray.cluster_resources()
    rooms = [(there.get("CPU", 1.0) - 1) / needs["num_cpus"]] if needs["num_cpus"] else []
    if gpus := needs.get("num_gpus"):
        rooms.append(there.get("GPU", 0.0) / gpus)
    room = math.floor(min(rooms, default=wanted or 1))
    if room < (wanted or 1):
        # They would wait for each other.
        raise VerticalChunkingError(
            f"a Ray cluster with room for {max(0, room)} workers beside a CPU that reads",
            f"room for {wanted or 1}, each with {dict(needs)}",
            "give fewer --workers, or give Ray more resources",
        )
    return wanted or room


def _settings(arguments: Mapping[str, Any], needs: Mapping[str, Any]) -> dict[str, str]:
    """Ask a machine that can hold the model what decides the numbers."""
    task = ray.remote(_try_model).options(**needs)
    found = ray.get(task.remote(arguments, Path.cwd()))
    if isinstance(found, tuple):
        raise VerticalChunkingError(*found)
    return dict(found)


def _try_model(arguments: Mapping[str, Any], place: Path) -> dict[str, str] | tuple[str, str, str]:
    os.chdir(place)
    try:
        return DocumentEmbedder(**arguments).settings
    except VerticalChunkingError as error:  # Ray would hand on another kind of error.
        return error.found, error.needed, error.remedy


def _follow(results: Any) -> tuple[int, int, int]:
    """Have the work done; return the numbers of problems, documents, and tokens or passages."""
    problems = documents = made = 0
    for table in results.iter_batches(batch_size=None, batch_format="pyarrow"):
        for row in table.to_pylist():
            if row["failure"] is not None:
                raise pickle.loads(row["failure"])
            if row["line"] is not None:
                print(row["line"], file=sys.stderr)
            problems += row["problems"]
            documents += row["documents"]
            made += row["made"]
    return problems, documents, made


def _pickled_error(error: Exception) -> bytes:
    try:
        data = pickle.dumps(error)
        pickle.loads(data)
    except Exception:
        return pickle.dumps(RuntimeError(in_short(error)))
    return data


class _Worker:
    """An actor: it loads the model once, and makes of each block a file."""

    def __init__(
        self,
        arguments: Mapping[str, Any],
        settings: dict[str, str],
        folder: Path,
        run: int,
        batch_size: int,
        traceback: bool,
        place: Path,
        cores: float,
    ) -> None:
        os.chdir(place)
        torch.set_num_threads(max(1, int(cores)))
        compat.enable_vertical_chunking()
        self._embedder = DocumentEmbedder(**arguments)
        self._folder, self._run = folder, run
        self._batch_size, self._traceback = batch_size, traceback
        self._settings = settings

    def __call__(self, table: pa.Table) -> pa.Table:
        """Embed the blocks of a table; return a line for each problem, and what was made."""
        try:
            told = [row for block in table["block"].to_pylist() for row in self._embed(block)]
        except Exception as error:  # Ray would hand on another kind of error.
            if self._traceback:
                raise
            told = [{"failure": _pickled_error(error)}]
        return pa.Table.from_pylist(told, _TOLD)

    def _embed(self, block: bytes) -> Iterator[dict[str, Any]]:
        if self._embedder.settings != self._settings:
            raise VerticalChunkingError(
                f"a machine where the model is {self._embedder.settings}",
                f"{self._settings}, as on the others",
                "install the same package and copy the same model everywhere",
            )
        items: list[Item] = pickle.loads(block)
        documents = [item for item in items if isinstance(item, Document)]
        others: list[Any] = [item for item in items if not isinstance(item, Document)]
        rows: list[Row | PassageRow] = []
        for batch in self._embedder.batches(documents, self._batch_size):
            for _, made in self._embedder(batch, self._traceback):
                if isinstance(made, Problem):
                    others.append(made)
                else:
                    rows.append(made)
        if rows:
            write_part(self._folder, self._run, documents, rows, self._embedder.settings)
        for item in others:
            problem = isinstance(item, Problem)
            yield {"line": f"{item}", "problems": int(problem), "documents": 0, "made": 0}
        yield {
            "line": None,
            "problems": 0,
            "documents": len({row.id for row in rows}),
            "made": sum(row.num_tokens if isinstance(row, Row) else 1 for row in rows),
        }


def _blocks_of_inputs(
    inputs: Sequence[str | Path],
    folder: Path,
    columns: Columns,
    rows: int,
    size: int,
    traceback: bool,
) -> Any:
    """Read files in one task, as the command does: it knows the ids that it has seen."""
    place, paths = Path.cwd(), [Path(path) for path in inputs]

    def read(_: Any) -> Iterator[dict[str, list[bytes]]]:
        os.chdir(place)
        finished, known = Finished(folder), Known()

        def unfinished() -> Iterator[Item]:
            found = read_documents(paths, columns.text, columns.id, traceback, known, columns.spans)
            return (doc for doc in found if not (isinstance(doc, Document) and finished.has(doc)))

        # Long files are not held, and can be put in order.
        files: list[Document] = []
        for item in unfinished():
            if _is_long(item, size) and isinstance(item, Document):
                if isinstance(item.text, TextStream):
                    files.append(item)
                else:
                    yield _packed([item])
        for file in sorted(files, key=lambda file: -file.size):
            yield _packed([file])
        rest = (item for item in unfinished() if not _is_long(item, size))
        yield from map(_packed, in_blocks(rest, rows, size))

    blocks = ray.data.range(1).map_batches(read, batch_size=1, num_cpus=0.5)
    # What has been read goes to the actors at once.
    blocks.context.target_max_block_size = 1 << 20
    return blocks


def _blocks_of_dataset(dataset: Any, folder: Path, columns: Columns, rows: int, size: int) -> Any:
    """Read a Dataset where its blocks are: its ids, its long texts, and then all others."""
    names = dataset.select_columns([columns.id])
    ids = names.iter_batches(batch_size=None, batch_format="pyarrow")
    note_ids(
        folder,
        ([str(name) for name in some[columns.id].to_pylist() if name is not None] for some in ids),
    )

    def read(table: pa.Table, long: bool) -> Iterator[dict[str, list[bytes]]]:
        finished = Finished(folder)

        def unfinished() -> Iterator[Item]:
            for number, item in enumerate(read_rows(table, columns, "")):
                where = id_of(table, number, columns) or "a row without an id"
                if isinstance(item, Problem) or not finished.is_doubled(item):
                    if isinstance(item, Problem) or not finished.has(item):
                        yield item._replace(where=where)
                else:
                    yield Problem(where, "found the id more than once, needed an id of its own")

        found = (item for item in unfinished() if _is_long(item, size) is long)
        yield from map(_packed, in_blocks(found, 1 if long else rows, size))

    first, rest = (
        dataset.map_batches(read, batch_size=None, batch_format="pyarrow", fn_kwargs={"long": long})
        for long in [True, False]
    )
    return first.union(rest)


def _is_long(item: Item, size: int) -> bool:
    return isinstance(item, Document) and item.size > size // 4


def _packed(block: Sequence[object]) -> dict[str, list[bytes]]:
    return {"block": [pickle.dumps(block)]}

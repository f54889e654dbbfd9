"""Arrow tables in, Arrow tables out: what an engine that calls a function for each batch needs."""

from __future__ import annotations

from typing import Any

import numpy as np
import pyarrow as pa  # type: ignore[import-untyped]

import compat
from compat.errors import VerticalChunkingError
from compat.jobs.documents import Columns, Document, Problem, read_rows
from compat.jobs.embedder import DocumentEmbedder
from compat.jobs.journal import PassageRow, Row
from compat.stream.rows import Auto


class RowEmbedder:
    """A model that is loaded once, with the hooks on, and embeds the rows of Arrow tables.

    The numbers are those of `python -m compat embed`, whose arguments have the same names. To the
    last bit they are where the batches are the same too.

    Example:
        >>> embedder = RowEmbedder("folder of a model")
        >>> embedder(pa.table({"id": ["a"], "text": ["one text"]}))["embedding"]

    Args:
        model: The folder of a SentenceTransformer; None for the default model.
        vertical_chunk_size: Tokens of each text that go through the model at a time; "auto" for the
            fastest size.
        batch_size: Rows that are embedded at the same time.
        dtype: "auto", "float32", "bfloat16" or "float16".
        device: Where to compute; None for a GPU if there is one.
        text_column: The column of the texts.
        id_column: The column of the ids, strings or integers.
        max_seq_length: The most tokens of a text; None for the limit in the model's files.
        truncate: Whether longer texts are cut there.
        every: The tokens of the passages that are embedded in place of whole texts, and how many
            of them the next one has too.
        spans_column: The column that names the passages of each text, in place of `every`.

    Attributes:
        settings: What decides the numbers, in words.

    Raises:
        VerticalChunkingError: There is no such device or model, or it cannot be used.
    """

    def __init__(
        self,
        model: str | None = None,
        vertical_chunk_size: int | Auto = 512,
        batch_size: int = 8,
        dtype: str = "auto",
        device: str | None = None,
        text_column: str = "text",
        id_column: str = "id",
        *,
        max_seq_length: int | None = None,
        truncate: bool = False,
        every: tuple[int, int] | None = None,
        spans_column: str | None = None,
    ) -> None:
        compat.enable_vertical_chunking()
        self._embedder = DocumentEmbedder(
            model,
            vertical_chunk_size,
            dtype,
            device,
            max_seq_length=max_seq_length,
            truncate=truncate,
            every=every,
            spans_column=spans_column,
        )
        self.settings = self._embedder.settings
        self._batch_size = batch_size
        self._columns = Columns(text_column, id_column, spans_column)
        names = ["start", "end"] if self._embedder.passages else ["num_tokens"]
        self._schema = pa.schema(
            [
                ("id", pa.string()),
                *((name, pa.int64()) for name in names),
                ("embedding", pa.list_(pa.float32(), self._embedder.dimension)),
                ("sha256", pa.string()),
                ("problem", pa.string()),
            ]
        )

    def __call__(self, table: pa.Table) -> pa.Table:
        """Embed the rows of a table.

        Returns:
            The table of id, num_tokens, embedding, sha256 and problem, in the order of the rows:
            where there is a problem, it says what was found and is needed, and all but the id is
            null. With passages there is start and end in place of num_tokens, in characters, and
            a row for each of them.

        Raises:
            VerticalChunkingError: The table lacks a column.
        """
        for name in self._columns.wanted():
            if table.schema.names.count(name) != 1:
                raise VerticalChunkingError(
                    f"the columns {', '.join(map(repr, table.schema.names)) or 'of no name'}",
                    f"one column {name!r}",
                    "give text_column and id_column their names, or rename them",
                )
        table = table.combine_chunks()
        items = list(read_rows(table, self._columns, ""))
        # A place is that of one row, while ids may be doubled.
        found: dict[str, list[Row | PassageRow | Problem]] = {}
        documents = [item for item in items if isinstance(item, Document)]
        for batch in self._embedder.batches(documents, self._batch_size):
            for doc, made in self._embedder(batch):
                found.setdefault(doc.where, []).append(made)
        rows: list[dict[str, Any]] = []
        for number, item in enumerate(items):
            for row in [item] if isinstance(item, Problem) else found[item.where]:
                if isinstance(row, Problem):
                    rows.append({"id": id_of(table, number, self._columns), "problem": row.what})
                else:
                    vector = row.embedding.astype(np.float32)
                    rows.append({**row._asdict(), "embedding": vector})
        columns = [[row.get(name) for row in rows] for name in self._schema.names]
        arrays = [
            pa.array(values, kind) for values, kind in zip(columns, self._schema.types, strict=True)
        ]
        return pa.table(arrays, self._schema)


def id_of(table: pa.Table, number: int, columns: Columns) -> str | None:
    """Return the id of a row as a string; None if it has none, or one that is not text."""
    try:
        value = table[columns.id][number].as_py()
    except UnicodeDecodeError:
        return None
    return None if value is None else str(value)

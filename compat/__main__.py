"""The command line: `python -m compat status` and `python -m compat embed`."""

from __future__ import annotations

import re
import sys
from collections.abc import Callable
from enum import StrEnum
from functools import partial
from importlib.util import find_spec
from pathlib import Path
from typing import Annotated, Literal

from compat.errors import VerticalChunkingError

_EXTRA = 'pip install "vertical-chunking[embed]"'
_RAY = 'pip install "vertical-chunking[embed,ray]"'

try:
    import typer
except ImportError as error:
    if __name__ != "__main__":
        raise
    missing = VerticalChunkingError(f"no {error.name}", "typer, for the command line", _EXTRA)
    print(f"Error: {missing}", file=sys.stderr)
    raise SystemExit(2) from error

app = typer.Typer(
    help="Embed texts of any length in constant memory with recurrent language models.",
    no_args_is_help=True,
    add_completion=False,
)


class Dtype(StrEnum):
    """The choices of --dtype."""

    auto = "auto"
    float32 = "float32"
    bfloat16 = "bfloat16"
    float16 = "float16"


class Engine(StrEnum):
    """The choices of --engine."""

    local = "local"
    ray = "ray"


@app.command()
def status(
    models: Annotated[
        bool, typer.Option("--models", help="Print the model families and what is known of them.")
    ] = False,
) -> None:
    """Print what is installed, and where vertical chunking is native, patched or absent."""
    import compat

    typer.echo(compat.supported_models_table() if models else str(compat.status()))


def _output(context: typer.Context, path: Path) -> Path:
    try:
        str(path).encode()
        if context.params.get("engine") is Engine.ray:
            if path.exists() and not path.is_dir():
                raise typer.BadParameter(f"{path} is a file; with --engine ray it is a folder.")
        elif path.is_dir():
            raise typer.BadParameter(f"{path} is a folder; a file is needed.")
        if not path.parent.is_dir():
            raise typer.BadParameter(f"The folder {path.parent} does not exist; create it first.")
    except OSError as error:
        raise typer.BadParameter(f"{path} cannot be written ({error.strerror}).") from error
    except UnicodeEncodeError as error:
        raise typer.BadParameter("Its name is not UTF-8; give another one.") from error
    return path


def _every(value: str) -> tuple[int, int]:
    """Return the two numbers of --spans."""
    found = re.fullmatch(r"every=(\d+)(?:,overlap=(\d+))?", value)
    every, overlap = (int(number or 0) for number in found.groups()) if found else (0, 0)
    if not overlap < every:
        raise typer.BadParameter(
            f"{value!r} is not of the form every=256,overlap=32, with an overlap below every.",
            param_hint="--spans",
        )
    return every, overlap


@app.command()
def embed(
    inputs: Annotated[
        list[Path],
        typer.Argument(
            metavar="INPUT",
            readable=False,  # An unreadable input is one problem among others.
            help="Tables (.parquet, .csv, .tsv) and JSON lines (.jsonl, .ndjson, .jl) have a "
            "document in each row; any other file is one text in UTF-8. Formats that are not prose "
            "(.json, .pdf, .docx, .html and the like) are refused. All but .parquet may be "
            "compressed (.gz, .bz2, .zst). Folders are searched through all levels and links, in "
            "sorted order, for texts only: files that end in .txt, .md, .rst or .text, compressed "
            "or not. The number of other files is printed on stderr. A text file may have any "
            "size: a piece of it is in memory at a time; of tables and JSON lines, a record.",
            show_default=False,
        ),
    ],
    output: Annotated[
        Path,
        typer.Option(
            "--output",
            "-o",
            metavar="FILE",
            callback=_output,
            help="The Parquet file to write: id, num_tokens (of the text as the model reads it, "
            "without a prompt), embedding and the text's sha256, one row for each document, in "
            "the order of the inputs. Documents that it already has are not embedded again unless "
            "their text has changed, and rows of documents that are no longer among the inputs are "
            "kept, at the end.",
            show_default=False,
        ),
    ],
    model: Annotated[
        str | None,
        typer.Option(
            metavar="PATH",
            help="Folder of a SentenceTransformer; by default the package's own small model. "
            "A line on stderr says whether its weights are trained.",
            show_default=False,
        ),
    ] = None,
    vertical_chunk_size: Annotated[
        str,
        typer.Option(
            metavar="TOKENS|auto",
            help="Tokens of each text that go through the model at a time; auto for the fastest "
            "size. It affects the memory, not the numbers.",
        ),
    ] = "512",
    batch_size: Annotated[
        int,
        typer.Option(min=1, metavar="N", help="Documents that are embedded at the same time."),
    ] = 8,
    max_seq_length: Annotated[
        int | None,
        typer.Option(
            min=1,
            metavar="TOKENS",
            help="The most tokens that a text may have, with prompt and special tokens; by default "
            "the limit in the model's files. A longer text is named and not embedded.",
            show_default=False,
        ),
    ] = None,
    truncate: Annotated[
        bool,
        typer.Option("--truncate", help="Cut longer texts to that length, and embed them."),
    ] = False,
    dtype: Annotated[
        Dtype,
        typer.Option(
            metavar="TYPE",
            help="Number format of the model: float32, bfloat16, float16, or auto for that of its "
            "files.",
        ),
    ] = Dtype.auto,
    device: Annotated[
        str | None,
        typer.Option(
            metavar="D",
            help="Device to compute on, such as cpu or cuda:0; by default a GPU if there is one.",
            show_default=False,
        ),
    ] = None,
    text_column: Annotated[
        str, typer.Option(metavar="NAME", help="Column of the texts in tables and JSON lines.")
    ] = "text",
    spans: Annotated[
        str | None,
        typer.Option(
            metavar="every=N,overlap=M",
            help="Embed passages of N tokens in place of whole texts, each with all the text "
            "before it as its context; the next one begins with the last M of them (0 if left "
            "out). The output has a row for each passage: id, start and end in characters of the "
            "text, embedding, sha256. Documents are read one after another.",
            show_default=False,
        ),
    ] = None,
    spans_column: Annotated[
        str | None,
        typer.Option(
            metavar="NAME",
            help="Embed the passages that this column of JSON lines or .parquet names for each "
            "text, in place of --spans: a list of pairs of start and end, in characters, "
            "overlapping or not. The sha256 is then of the text and its spans.",
            show_default=False,
        ),
    ] = None,
    id_column: Annotated[
        str | None,
        typer.Option(
            metavar="NAME",
            help="Column of the ids (strings or integers) in tables and JSON lines; without it, a "
            "document's id is FILE:LINE, counted from 1 (in .parquet, FILE:ROW). A text file's id "
            "is its path.",
            show_default=False,
        ),
    ] = None,
    engine: Annotated[
        Engine,
        typer.Option(
            is_eager=True,  # What --output may be depends on it.
            metavar="NAME",
            help="local, or ray: on all machines of a Ray cluster, into a folder of Parquet files, "
            "in no order. The model, the inputs and the output have the same path on every "
            "machine.",
        ),
    ] = Engine.local,
    address: Annotated[
        str | None,
        typer.Option(
            metavar="HOST:PORT",
            help="The Ray cluster; by default the one of RAY_ADDRESS, or this machine alone.",
            show_default=False,
        ),
    ] = None,
    workers: Annotated[
        int | None,
        typer.Option(
            min=1,
            metavar="N",
            help="Models that are loaded on the Ray cluster; by default one for each GPU, or for "
            "each CPU but one.",
            show_default=False,
        ),
    ] = None,
    traceback: Annotated[
        bool,
        typer.Option(
            "--traceback",
            envvar="COMPAT_TRACEBACK",
            help="End in a traceback at the first unexpected error, to report it.",
            show_default=False,
        ),
    ] = False,
) -> None:
    """Embed documents into a Parquet file.

    Finished rows are kept in FILE.partial until all is done; with
    --engine ray they are in the folder at once. After an interruption,
    the same command carries on where it stopped.
    Documents that cannot be embedded are named on stderr, one line each,
    and the rest is embedded.

    Exit status: 0 if every document is in the output, 1 if some could
    not be embedded, 2 if the command could not be carried out.
    """
    if spans is not None and spans_column is not None:
        raise typer.BadParameter("Give --spans or --spans-column, not both.")
    if engine is not Engine.ray and (address is not None or workers is not None):
        raise typer.BadParameter("--address and --workers are for --engine ray.")
    every = None if spans is None else _every(spans)
    size = _size(vertical_chunk_size)
    try:
        if find_spec("pyarrow") is None:
            raise VerticalChunkingError("no pyarrow", "pyarrow, for Parquet", _EXTRA)
        if engine is Engine.ray:
            run = _on_ray(address, workers)
        else:
            from compat.jobs.embed import embed as run
        problems = run(
            inputs,
            output,
            model=model,
            vertical_chunk_size=size,
            batch_size=batch_size,
            dtype=dtype.value,
            device=device,
            text_column=text_column,
            id_column=id_column,
            max_seq_length=max_seq_length,
            truncate=truncate,
            traceback=traceback,
            every=every,
            spans_column=spans_column,
        )
    except KeyboardInterrupt as error:
        typer.echo("Interrupted. The same command carries on after the last full batch.", err=True)
        raise typer.Exit(130) from error
    except Exception as error:
        if traceback:
            raise
        raise _failure(error, output) from error
    if problems:
        typer.echo(f"Not embedded: {problems}, named above.", err=True)
        raise typer.Exit(1)


def _size(given: str) -> Literal["auto"] | int:
    """Read --vertical-chunk-size."""
    if given == "auto":
        return "auto"
    if re.fullmatch(r"0*[1-9]\d*", given) is None:
        raise typer.BadParameter(
            f"{given!r} is neither a number of at least 1 nor auto.",
            param_hint="--vertical-chunk-size",
        )
    return int(given)


def _on_ray(address: str | None, workers: int | None) -> Callable[..., int]:
    if find_spec("ray") is None:
        raise VerticalChunkingError("no ray", "ray, for --engine ray", _RAY)
    import ray

    from compat.jobs.ray import embed as run

    try:
        ray.init(address=address, ignore_reinit_error=True)
    except ConnectionError as error:
        raise VerticalChunkingError(
            f"no Ray cluster at {address}", "one that runs", "start it, or leave out --address"
        ) from error
    return partial(run, workers=workers)


def _failure(error: Exception, output: Path) -> typer.Exit:
    """Print in one line the error that ended the command and its remedy; return the exit."""
    if not isinstance(error, VerticalChunkingError):
        error = _explained(error, output)
    typer.echo(f"Error: {error}", err=True)
    return typer.Exit(2)


def _explained(error: Exception, output: Path) -> VerticalChunkingError:
    try:
        from compat.jobs.loading import in_short, is_of_memory, too_little_memory
    except Exception:
        return VerticalChunkingError(
            f"libraries that cannot be imported ({type(error).__name__}: {error})",
            "whole libraries, and the memory to load them",
            "free some memory, or install them again",
        )
    if is_of_memory(error):
        return too_little_memory()
    if isinstance(error, OSError):
        return VerticalChunkingError(
            f"that {error.filename or output} cannot be written ({error.strerror or error})",
            "a folder that this user may write in, with room for the rows",
            "see to that and run the same command, which carries on, or give another --output",
        )
    return VerticalChunkingError(
        in_short(error),
        "nothing of the kind: this is a fault of the command",
        "run it with --traceback and report what that prints; finished rows are kept",
    )


if __name__ == "__main__":
    app(prog_name="python -m compat")

"""Records by index from files, folders and the hub.

What of a folder is data, its splits and its configurations are decided by `datasets`, which also keeps records as Arrow
on disk; it is imported where it is needed, for it takes a second. Read here are .jsonl files, whose faulty records are
named by their line (and whose texts `datasets` would turn into dates where all of them look like one), and .txt files,
whose paragraphs are documents (for `datasets`, lines).
"""

import glob
import itertools
import json
import logging
import os
import re
import shutil
import tempfile
import weakref
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from importlib import resources
from pathlib import Path
from typing import Any
from zipfile import BadZipFile

import numpy as np
from numpy.typing import NDArray

from engine.data.chat import COLUMNS, FIELDS, Record

SUFFIXES = (".txt", ".jsonl", ".jsonl.gz", ".jsonl.zst", ".parquet")
OTHERS = (".json", ".csv", ".tsv", ".gz", ".zst", ".zip", ".arrow")  # of files too, which no hub name ends in
FILES = ".txt, .jsonl, .parquet (or .jsonl.gz, .jsonl.zst)"
COMPRESSIONS = {".gz": "gzip", ".zst": "zstd"}
DEFAULT_SPLIT = "train"
NO_DATA = re.compile(r"(licen[cs]e|copying|notice|readme|requirements|changelog|citation)[^/]*\.txt", re.IGNORECASE)
"""Texts that lie beside data and are none."""


@dataclass(frozen=True)
class Source:
    """Records by index, each with the place to name when it is faulty."""

    count: int
    record: Callable[[int], Record]
    place: Callable[[int], str]
    empty_turns: bool = False
    """whether turns without text belong to it; elsewhere they are refused"""


def read_source(data: str, data_config: str | None, split: str) -> Source:
    """The records of `data`; see load_corpus for what it may name and what is raised."""
    if not data.strip():
        raise ValueError(
            "data is empty, expected chitchat, a file, a folder or a hub name: give one (. is this folder)"
        )
    path = Path(data).expanduser()
    if data == "chitchat" or path.is_file():
        if data_config is not None or split != DEFAULT_SPLIT:
            raise ValueError(
                f"data {data} has no configurations and no splits, got config {data_config or 'none'} and split "
                f"{split}: leave out --data-config and --split, or give the folder"
            )
        return _chitchat() if data == "chitchat" else _file_source(path)
    if path.is_dir():
        return _folder_source(path, data_config, split)
    if data.endswith((*SUFFIXES, *OTHERS)) or data.startswith((".", "/", "~")):
        raise ValueError(f"data {data} does not exist: give chitchat, a {FILES} file, a folder of them, or a hub name")
    return hub_source(data, data_config, split)


def hub_source(name: str, data_config: str | None, split: str) -> Source:
    """A dataset as `datasets` loads it: a hub name, or a local folder of the hub's layout."""
    what = f"{name} (config {data_config or 'none'}, split {split})"
    with _library(what, "check the three names, or give a local file") as (datasets, cache):
        rows = datasets.load_dataset(name, data_config, split=split, cache_dir=cache)
    return _rows_source(rows, name, lambda index: f"{name} row {index}")


def _chitchat() -> Source:
    """BYU's Chit-Chat Challenge: 7,168 dialogues of two people (Myers et al. 2020).

    Whoever speaks second is the assistant; what one person says in a row is one message of lines.
    """
    text = resources.files("chitchat_dataset").joinpath("dataset.json").read_bytes()
    dialogues = list(json.loads(text).values())

    def record(index: int) -> Record:
        said = [line for turn in dialogues[index]["messages"] for line in turn]
        messages = []
        for sender, lines in itertools.groupby(said, key=lambda line: line["sender"]):
            role = "user" if sender == said[0]["sender"] else "assistant"
            messages.append({"role": role, "content": "\n".join(line["text"] for line in lines)})
        return {"messages": messages}

    return Source(len(dialogues), record, lambda index: f"chitchat dialogue {index}", empty_turns=True)


# Files


def _file_source(file: Path) -> Source:
    if not file.name.endswith(SUFFIXES):
        raise ValueError(
            f"data {file} ends in {file.suffix or 'nothing'}, expected one of {FILES}: convert or rename it"
        )
    if file.suffix == ".txt":
        return _paragraphs([file])
    return _parquet_source([file]) if file.suffix == ".parquet" else _json_lines([file])


def _folder_source(folder: Path, data_config: str | None, split: str) -> Source:
    """The folder's files of a configuration and a split, as `datasets` chooses them from what is visible."""
    if not any(folder.iterdir()):
        raise ValueError(f"data {folder} holds no {FILES} file: give another folder")
    what, mend = f"{folder} (config {data_config or 'none'}, split {split})", "check the folder and its README.md"
    with _visible(folder) as path:
        with _library(what, mend) as (datasets, cache):
            names = [] if data_config is None else datasets.get_dataset_config_names(path)
        name, options = data_config, {}
        if data_config is not None and data_config not in names:
            if not (folder / data_config).is_dir():
                raise ValueError(
                    f"data {folder} has no configuration and no folder {data_config}, but {', '.join(names)}: "
                    f"give another --data-config or none"
                )
            name, options = None, {"data_dir": data_config}
        with _library(what, mend) as (datasets, cache):
            builder = datasets.load_dataset_builder(path, name, cache_dir=cache, **options)
        of_split = {
            str(key): [os.path.relpath(f, path) for f in files] for key, files in builder.config.data_files.items()
        }
        if split not in of_split:
            raise ValueError(
                f"data {folder} has no split {split}, but {', '.join(of_split)}: give one of these by --split"
            )
        chosen = of_split[split]
        if not all(file.endswith(SUFFIXES) for file in chosen):
            try:
                with _library(what, mend):
                    builder.download_and_prepare()
                    rows = builder.as_dataset(split=split)
            except ValueError:
                _blame(builder.__module__.rsplit(".", 1)[-1], [folder / file for file in chosen])
                raise
            return _rows_source(rows, str(folder), lambda row: f"{folder} row {row}")
    files = [folder / file for file in chosen]
    if files[0].suffix == ".txt":
        _refuse_other_kinds(folder, chosen)
        return _paragraphs(files)
    return _parquet_source(files) if files[0].suffix == ".parquet" else _json_lines(files)


def _refuse_other_kinds(folder: Path, texts: list[str]) -> None:
    """`datasets` reads what there is most of: where that is texts, records beside them would go unread."""
    for file in sorted(folder.rglob("*")):
        name = str(file.relative_to(folder))
        if name.endswith(SUFFIXES[1:]) and file.is_file() and not re.search(r"/[._]", f"/{name}"):
            raise ValueError(
                f"data {folder} holds {name} beside more .txt files ({', '.join(texts[:3])}): give {file}, or a folder "
                f"of one kind of data"
            )


def _is_no_data(name: str) -> bool:
    return name.startswith((".", "_")) or NO_DATA.fullmatch(name) is not None


@contextmanager
def _visible(folder: Path) -> Iterator[str]:
    """A path by which `datasets` sees of a folder what may be data: the folder, or one of links to its files.

    Links serve where a name begins with an underscore or is a licence's or the like (all these would be read, and count
    where `datasets` chooses the kind of file there is most of), and where the path has brackets or stars, which
    `datasets` takes for a pattern.
    """
    folder = folder.resolve()
    if not glob.has_magic(str(folder)) and not any(_is_no_data(file.name) for file in folder.rglob("*")):
        yield str(folder)
        return
    with tempfile.TemporaryDirectory() as place:
        links = Path(place, "data")
        shutil.copytree(
            folder,
            links,
            ignore=lambda _, names: set(filter(_is_no_data, names)),
            copy_function=os.symlink,
            ignore_dangling_symlinks=True,
        )
        yield str(links)


def _paragraphs(files: list[Path]) -> Source:
    documents = []
    for file in files:
        try:
            text = file.read_text(encoding="utf-8")
        except UnicodeDecodeError as error:
            raise ValueError(f"{file} is not UTF-8 text (byte {error.start}): convert it to UTF-8") from error
        paragraphs = [part for part in re.split(r"\n\s*\n", text) if part.strip()]
        documents += [(f"{file} paragraph {number}", part) for number, part in enumerate(paragraphs, 1)]
    return Source(len(documents), lambda index: {"text": documents[index][1]}, lambda index: documents[index][0])


class _JsonLines:
    """The lines of .jsonl files, found once and parsed when asked for; compressed files are unpacked into a
    temporary one."""

    def __init__(self, files: list[Path]):
        self.files = files
        self.unpacked: Any = None
        if any(file.suffix in COMPRESSIONS for file in files):
            self.unpacked = tempfile.TemporaryFile()  # noqa: SIM115 - open as long as the source is
            weakref.finalize(self, self.unpacked.close)
        lines = [np.empty((0, 4), np.int64)]
        for number, file in enumerate(files):
            if file.suffix in COMPRESSIONS:
                start = _unpack(file, self.unpacked)
                self.unpacked.seek(start)
                lines.append(_found_lines(number, self.unpacked, start))
            else:
                with file.open("rb") as stream:
                    lines.append(_found_lines(number, stream, 0))
        self.lines = np.concatenate(lines)
        """[count, 4] file, line number from 1, first byte, length"""

    def place(self, index: int) -> str:
        number, line = self.lines[index, :2]
        return f"{self.files[number]} line {line}"

    def record(self, index: int) -> Record:
        number, _, start, length = map(int, self.lines[index])
        if self.files[number].suffix in COMPRESSIONS:
            self.unpacked.seek(start)
            line = self.unpacked.read(length)
        else:
            with self.files[number].open("rb") as stream:
                stream.seek(start)
                line = stream.read(length)
        try:
            record = json.loads(line)
        except ValueError as error:
            raise ValueError(f"{self.place(index)} is not JSON ({error}): mend or remove it") from error
        except (RecursionError, MemoryError) as error:
            raise ValueError(f"{self.place(index)} is nested too deeply or too large: mend or remove it") from error
        if not isinstance(record, dict):
            raise ValueError(
                f"{self.place(index)} is a JSON {type(record).__name__}, expected an object: mend or remove it"
            )
        return record


def _json_lines(files: list[Path]) -> Source:
    lines = _JsonLines(files)
    return Source(len(lines.lines), lines.record, lines.place)


def _found_lines(file: int, stream: Any, start: int) -> NDArray[np.int64]:
    """[count, 4] file, number, start and length of each line that is not blank, from `start` on."""

    def found() -> Iterator[tuple[int, int, int, int]]:
        end = start
        for number, line in enumerate(stream, 1):
            end += len(line)
            if line.strip():
                yield file, number, end - len(line), len(line)

    return np.fromiter(found(), np.dtype((np.int64, 4)))


def _unpack(file: Path, target: Any) -> int:
    """Appends what a compressed file holds to `target`; the place where it starts."""
    import pyarrow

    start = target.seek(0, os.SEEK_END)
    try:
        with pyarrow.input_stream(str(file), compression=COMPRESSIONS[file.suffix]) as stream:
            shutil.copyfileobj(stream, target, 2**20)
    except (OSError, pyarrow.ArrowException) as error:
        raise ValueError(f"{file} cannot be unpacked ({_line(error)}): write it anew") from error
    return start


# Arrow, through `datasets`


def _parquet_source(files: list[Path]) -> Source:
    """Rows of parquet files; columns that no layout knows are not read."""
    import pyarrow
    from pyarrow import parquet

    ends, columns = [], []
    for file in files:
        try:
            with parquet.ParquetFile(file) as opened:
                ends.append(opened.metadata.num_rows)
                columns.append(_known_columns(opened.schema_arrow.names, str(file)))
        except (pyarrow.ArrowException, OSError) as error:
            raise ValueError(f"{file} is not a readable parquet file ({_line(error)}): write it anew") from error
        if set(columns[-1]) != set(columns[0]):
            raise ValueError(
                f"{file} has fields {columns[-1]}, but {files[0]} has {columns[0]}: give files of one layout"
            )
    ends = list(itertools.accumulate(ends))
    names = str(files[0]) if len(files) == 1 else f"{files[0]} … {files[-1].name}"
    patterns = [_literal(file) for file in files]
    try:
        with _library(names, "write the file anew") as (datasets, cache):
            rows = datasets.load_dataset(
                "parquet", data_files={"train": patterns}, columns=columns[0], split="train", cache_dir=cache
            )
    except ValueError:
        _blame("parquet", files, columns=columns[0])
        raise

    def place(index: int) -> str:
        file = int(np.searchsorted(ends, index, side="right"))
        return f"{files[file]} row {index - (ends[file - 1] if file else 0)}"

    return _rows_source(rows, names, place)


def _literal(file: Path) -> str:
    """A file's path as a pattern that only it matches."""
    return glob.escape(str(file.resolve()))


def _blame(builder: str, files: list[Path], **options: Any) -> None:
    """ValueError naming the first of some files that `datasets` cannot load by itself, if there is one."""
    with tempfile.TemporaryDirectory() as cache:
        for file in files:
            with _library(str(file), "write the file anew") as (datasets, _):
                datasets.load_dataset(builder, data_files=_literal(file), cache_dir=cache, **options)


def _known_columns(columns: list[str], what: str) -> list[str]:
    known = [column for column in columns if column in COLUMNS]
    if not known:
        raise ValueError(f"data {what} has fields {columns}, expected {FIELDS}: rename the fields")
    return known


def _rows_source(rows: Any, what: str, place: Callable[[int], str]) -> Source:
    """Records of a `datasets.Dataset`, only of the columns that a layout knows."""
    rows = rows.select_columns(_known_columns(rows.column_names, what))

    def record(index: int) -> Record:
        try:
            return rows[index]
        except (OverflowError, ValueError, OSError) as error:  # dates beyond Python's, text that is no UTF-8
            raise ValueError(f"{place(index)} cannot be read ({_line(error)}): mend or remove it") from error

    return Source(len(rows), record, place)


class _Kept(logging.Handler):
    """Keeps what `datasets` logs, which names the file where its errors do not."""

    def __init__(self) -> None:
        super().__init__()
        self.said: list[str] = []

    def emit(self, record: logging.LogRecord) -> None:
        self.said.append(record.getMessage())


@contextmanager
def _library(what: str, mend: str) -> Iterator[tuple[Any, str]]:
    """`datasets`, silent, with a folder for its cache; its errors and those below it become one line."""
    import datasets
    import pyarrow
    import yaml
    from datasets.exceptions import DatasetGenerationCastError, DatasetGenerationError, DatasetsError
    from huggingface_hub.errors import HTTPError
    from huggingface_hub.utils import logging as hub_logging

    hub_logging.set_verbosity_error()  # its retries; the reason is said below
    datasets.disable_progress_bars()
    logger, kept = logging.getLogger("datasets"), _Kept()
    handlers, logger.handlers = logger.handlers, [kept]
    named = (DatasetsError, pyarrow.ArrowException, BadZipFile, yaml.YAMLError, HTTPError, OSError, ValueError)
    careless = (RuntimeError, TypeError, KeyError, AttributeError, MemoryError)  # of faulty READMEs and scripts
    try:
        yield datasets, _cache_folder(datasets)
    except (*named, *careless) as error:
        hidden = isinstance(error, DatasetGenerationError) and not isinstance(error, DatasetGenerationCastError)
        reason = _line(error.__cause__ if hidden and error.__cause__ is not None else error)
        if hidden and kept.said:
            reason = _line(kept.said[-1])
        raise ValueError(f"data {what} cannot be loaded: {reason}: {mend}") from error
    finally:
        logger.handlers = handlers


def _cache_folder(datasets: Any) -> str:
    """Where `datasets` keeps its Arrow files: its own place, or a temporary one where that cannot be written."""
    folder = Path(datasets.config.HF_DATASETS_CACHE)
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=folder):
            return str(folder)
    except OSError:
        folder = Path(tempfile.gettempdir(), f"fractal-llm-datasets-{os.getuid()}")
        folder.mkdir(exist_ok=True, mode=0o700)
        return str(folder)


def _line(error: object) -> str:
    return " ".join(str(error).split()).removesuffix(".")

"""Data set files as rows: .json, .jsonl, .csv and .parquet, every row with the place it came from."""

import csv
import difflib
import json
from collections.abc import Iterator
from dataclasses import dataclass, field
from itertools import islice
from pathlib import Path
from typing import Any

from mindrlhf.errors import UserError


@dataclass(frozen=True, slots=True)
class Row:
    """One row of a data set file."""

    values: dict[str, Any]  # column name -> value; text only where the file is a .csv
    where: str  # "file:line" for .jsonl and .csv, "file: row 3" (counted from 1) for .json and .parquet


@dataclass
class UnusableRows:
    """Rows that are well-formed but empty or too long: an error where strict, else skipped and counted."""

    strict: bool
    skipped: dict[str, int] = field(default_factory=dict)  # reason -> number of rows

    def refuse(self, row: Row, reason: str, problem: str) -> None:
        """Count the row under `reason`; where strict, raise UserError with the longer `problem`."""
        if self.strict:
            raise UserError(f"{row.where}: {problem}, or set data.strict: false to skip such rows")
        self.skipped[reason] = self.skipped.get(reason, 0) + 1


def read_rows(path: str | Path, max_rows: int = 0) -> list[Row]:
    """The first `max_rows` rows of a file (0: all of them), in the file's order.

    Raises UserError, naming the file and where possible the line: no such file, an unknown ending, text that is not
    UTF-8, broken JSON, CSV or parquet, a row that is not an object, no rows at all.
    """
    path = Path(path)
    if path.suffix.lower() not in _READERS:
        raise UserError(f"{path}: unknown ending {path.suffix!r}; a data set is one of {', '.join(_READERS)}")
    if not path.is_file():
        raise UserError(f"{path}: no such data file; paths in a YAML are relative to it, others to where you are")
    try:
        rows = list(islice(_READERS[path.suffix.lower()](path), max_rows or None))
    except UnicodeDecodeError as error:
        raise UserError(f"{path}: not UTF-8 text ({error.reason}); save the file as UTF-8") from None
    if not rows:
        raise UserError(f"{path}: the data set has no rows; add some or remove the file from the config")
    return rows


def column(row: Row, key: str, option: str = "the config's data.*_key") -> Any:
    """The row's value in column `key`; `option` is the config key that chose the column, for the error message.

    Raises UserError naming the row, the missing column, the columns there are and the nearest name.
    """
    if key in row.values:
        return row.values[key]
    near = difflib.get_close_matches(key, row.values, n=1)
    hint = f"; did you mean {near[0]!r}?" if near else ";"
    raise UserError(f"{row.where}: no column {key!r}{hint} set {option} to one of: {', '.join(row.values) or '(none)'}")


def _read_json(path: Path) -> Iterator[Row]:
    text = path.read_text(encoding="utf-8-sig")
    try:
        rows = json.loads(text)
    except json.JSONDecodeError as error:
        if error.msg == "Extra data" and text.lstrip().startswith("{"):
            yield from _read_jsonl(path)  # one object a line under this ending, as the Belle files are
            return
        raise UserError(f"{path}:{error.lineno}: not JSON: {error.msg}; one object a line is .jsonl") from None
    if not isinstance(rows, list):
        raise UserError(f"{path}: holds one {_json_type(rows)}; a .json data set is a list of objects")
    for number, values in enumerate(rows, 1):
        yield _object_row(values, f"{path}: row {number}")


def _read_jsonl(path: Path) -> Iterator[Row]:
    with path.open(encoding="utf-8-sig") as file:
        for number, line in enumerate(file, 1):
            text = line.rstrip()  # else an error at the line's end would be told for the next line
            if not text:
                continue
            where = f"{path}:{number}"
            try:
                values = json.loads(text)
            except json.JSONDecodeError as error:
                what = error.msg.removesuffix(" at")
                problem = f"not JSON: {what} at column {error.colno}"
                raise UserError(f"{where}: {problem}; a .jsonl file has one whole object a line") from None
            yield _object_row(values, where)


def _read_csv(path: Path) -> Iterator[Row]:
    csv.field_size_limit(2**31 - 1)  # the default of 128 KiB is less than a long text
    with path.open(encoding="utf-8-sig", newline="") as file:
        reader = csv.reader(file, strict=True)
        line = 1
        header: list[str] = []
        try:
            for fields in reader:
                where = f"{path}:{line}"
                line = reader.line_num + 1  # where the next row starts: quoted values may hold line breaks
                if not fields:
                    continue
                if not header:
                    header = fields
                    if len(set(header)) < len(header):
                        raise UserError(f"{where}: two columns have the same name; rename one: {', '.join(header)}")
                    continue
                if len(fields) != len(header):
                    problem = f"{len(fields)} values for {len(header)} columns"
                    raise UserError(f"{where}: {problem}; put values that hold commas or quotes in double quotes")
                yield Row(dict(zip(header, fields, strict=True)), where)
        except csv.Error as error:
            raise UserError(f"{path}:{line}: not CSV: {error}; close the double quotes of this row") from None


def _read_parquet(path: Path) -> Iterator[Row]:
    import pyarrow
    import pyarrow.parquet

    number = 0
    try:
        with pyarrow.parquet.ParquetFile(path) as file:
            for batch in file.iter_batches(batch_size=1024):
                for values in batch.to_pylist():
                    number += 1
                    yield Row(values, f"{path}: row {number}")
    except (pyarrow.ArrowException, OSError) as error:
        raise UserError(f"{path}: not a whole parquet file: {error}; write or download it again") from None


def _object_row(values: Any, where: str) -> Row:
    if not isinstance(values, dict):
        raise UserError(f'{where}: a row is {{"column": value, ...}}, this one is one {_json_type(values)}')
    return Row(values, where)


def _json_type(value: Any) -> str:
    names = {dict: "object", list: "list", str: "string", int: "number", float: "number", bool: "true or false"}
    return names.get(type(value), "null")


_READERS = {".json": _read_json, ".jsonl": _read_jsonl, ".csv": _read_csv, ".parquet": _read_parquet}

import json

import pyarrow
import pyarrow.parquet
import pytest

from mindrlhf.data.readers import Row, UnusableRows, column, read_rows
from mindrlhf.errors import UserError


def write(path, text):
    path.write_bytes(text.encode("utf-8"))
    return path


def failure(path):
    """The message of the UserError that reading the file gives."""
    with pytest.raises(UserError) as caught:
        read_rows(path)
    assert "\n" not in str(caught.value)
    return str(caught.value)


def test_json(tmp_path):
    path = write(tmp_path / "a.json", '[{"prompt": "1+1", "label": 2},\n {"prompt": [{"role": "user"}]}]')
    assert read_rows(path) == [
        Row({"prompt": "1+1", "label": 2}, f"{path}: row 1"),
        Row({"prompt": [{"role": "user"}]}, f"{path}: row 2"),
    ]


def test_jsonl_counts_lines_and_skips_blank_ones(tmp_path):
    path = write(tmp_path / "a.jsonl", '\ufeff{"prompt": "line\u2028separator"}\n\n{"prompt": "b"}')
    assert read_rows(path) == [
        Row({"prompt": "line\u2028separator"}, f"{path}:1"),
        Row({"prompt": "b"}, f"{path}:3"),
    ]


def test_csv_names_the_line_where_a_row_starts(tmp_path):
    path = write(tmp_path / "a.csv", 'prompt,label\r\n"two\nlines, ""quoted""",1\r\n\r\nc,\r\n')
    assert read_rows(path) == [
        Row({"prompt": 'two\nlines, "quoted"', "label": "1"}, f"{path}:2"),
        Row({"prompt": "c", "label": ""}, f"{path}:5"),
    ]


def test_csv_holds_long_values(tmp_path):
    path = write(tmp_path / "a.csv", "prompt\n" + "x" * 200_000)
    assert len(read_rows(path)[0].values["prompt"]) == 200_000


def test_parquet(tmp_path):
    path = tmp_path / "a.parquet"
    messages = [{"role": "user", "content": "hi"}]
    pyarrow.parquet.write_table(pyarrow.table({"prompt": [messages, messages], "label": ["1", None]}), path)
    assert read_rows(path) == [
        Row({"prompt": messages, "label": "1"}, f"{path}: row 1"),
        Row({"prompt": messages, "label": None}, f"{path}: row 2"),
    ]


@pytest.mark.parametrize("ending", ["json", "jsonl", "csv", "parquet"])
def test_max_rows_takes_the_first(tmp_path, ending):
    path = tmp_path / f"a.{ending}"
    if ending == "parquet":
        pyarrow.parquet.write_table(pyarrow.table({"n": ["0", "1", "2"]}), path)
    else:
        json = '[{"n": "0"}, {"n": "1"}, {"n": "2"}]'
        texts = {"json": json, "jsonl": json[1:-1].replace(", ", "\n"), "csv": "n\n0\n1\n2\n"}
        write(path, texts[ending])
    assert [row.values["n"] for row in read_rows(path, max_rows=2)] == ["0", "1"]
    assert [row.values["n"] for row in read_rows(path)] == ["0", "1", "2"]


@pytest.mark.parametrize(
    ("name", "text", "expected"),
    [
        ("a.txt", "x", "{path}: unknown ending '.txt'; a data set is one of .json, .jsonl, .csv, .parquet"),
        ("a.jsonl", '{"a": 1}\n{"a": \n', "{path}:2: not JSON: Expecting value at column 6; a .jsonl file has"),
        ("a.jsonl", '{"a": 1}\n[1]\n', '{path}:2: a row is {{"column": value, ...}}, this one is one list'),
        ("a.jsonl", "\n\n", "{path}: the data set has no rows"),
        ("a.json", '[{"a": 1},\n {"a" 2}]', "{path}:2: not JSON: Expecting ':' delimiter"),
        ("a.json", '{"a": 1}', "{path}: holds one object; a .json data set is a list of objects"),
        ("a.json", '[{"a": 1}, "b"]', '{path}: row 2: a row is {{"column": value, ...}}, this one is one string'),
        ("a.json", "[]", "{path}: the data set has no rows"),
        ("a.csv", "a,b\n1,2\n1,2,3\n", "{path}:3: 3 values for 2 columns; put values that hold commas"),
        ("a.csv", "a,a\n1,2\n", "{path}:1: two columns have the same name; rename one: a, a"),
        ("a.csv", 'a\nb\n"open\nstill\n', "{path}:3: not CSV: unexpected end of data"),
        ("a.csv", "a,b\n", "{path}: the data set has no rows"),
        ("a.parquet", "not parquet at all", "{path}: not a whole parquet file"),
    ],
)
def test_broken_files_are_one_line_that_names_the_place(tmp_path, name, text, expected):
    path = write(tmp_path / name, text)
    assert failure(path).startswith(expected.format(path=path))


def test_missing_file_and_wrong_encoding(tmp_path):
    assert failure(tmp_path / "none.jsonl").startswith(f"{tmp_path / 'none.jsonl'}: no such data file")
    path = tmp_path / "latin.csv"
    path.write_bytes("a\ncafé\n".encode("latin-1"))
    assert failure(path) == f"{path}: not UTF-8 text (invalid continuation byte); save the file as UTF-8"


def test_column():
    row = Row({"question": "q", "answer": None}, "a.jsonl:7")
    assert column(row, "question") == "q"
    assert column(row, "answer") is None
    with pytest.raises(UserError) as caught:
        column(row, "questions", "data.prompt_key")
    assert str(caught.value) == (
        "a.jsonl:7: no column 'questions'; did you mean 'question'? set data.prompt_key to one of: question, answer"
    )


def test_unusable_rows_are_counted_or_an_error():
    row = Row({}, "a.jsonl:7")
    unusable = UnusableRows(strict=False)
    unusable.refuse(row, "empty", "the prompt is empty")
    unusable.refuse(row, "empty", "the prompt is empty")
    assert unusable.skipped == {"empty": 2}
    with pytest.raises(UserError, match="a.jsonl:7: the prompt is empty, or set data.strict: false"):
        UnusableRows(strict=True).refuse(row, "empty", "the prompt is empty")


def test_a_json_file_with_one_object_a_line_as_belle_is(tmp_path):
    path = tmp_path / "Belle_open_source_0.5M.json"
    rows = [
        {"instruction": "\u5199\u4e00\u53e5\u8bdd", "input": "", "output": "\u597d"},
        {"instruction": "b", "input": "c", "output": "d"},
    ]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    assert [row.values for row in read_rows(path)] == rows
    path.write_text(path.read_text() + '{"instruction": 1', encoding="utf-8")
    with pytest.raises(UserError, match=r"0.5M.json:3: not JSON"):
        read_rows(path)

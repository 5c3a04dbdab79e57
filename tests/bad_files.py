"""The table of data files that cannot be trained on."""

import gzip


def _changed(content: bytes) -> bytes:
    middle = len(content) // 2
    return (
        content[:middle] + bytes(255 - byte for byte in content[middle : middle + 9]) + content[middle + 9 :]
    )


GOOD_CSV = b"text,label\ngood one,1\nbad one,0\ngood two,1\nbad two,0\n"
GOOD_JSON = (
    b'{"text": "good one", "label": 1}\n{"text": "bad one", "label": 0}\n'
    b'{"text": "good two", "label": 1}\n{"text": "bad two", "label": 0}\n'
)

# name of the file, its content, what the message must say
FILE_FAULTS: dict[str, tuple[str, bytes, str]] = {
    "empty csv": ("train.csv", b"", "train.csv: is empty"),
    "blank csv": ("train.csv", b" \n\n", "train.csv: is empty"),
    "header only": ("train.csv", b"text,label\n", "holds no reviews"),
    "no text column": (
        "train.csv",
        b"body,label\na,1\n",
        "train.csv:1: no column named text or review, got 'body, label'; name it by --text-column",
    ),
    "no label column": ("train.csv", b"text,stars\na,1\n", "train.csv:1: no column named label or sentiment"),
    "no header": ("train.csv", b"good,1\nbad,0\n", "no column named text"),
    "duplicated text column": ("train.csv", b"text,text,label\na,b,1\n", "more than one column named text"),
    "duplicated label column": (
        "train.csv",
        b"text,label,label\na,1,1\n",
        "more than one column named label",
    ),
    "label 2": ("train.csv", GOOD_CSV + b"worse,2\n", "train.csv:6: label is '2', expected 0 or 1"),
    "label 0.5": (
        "train.csv",
        GOOD_CSV + b"worse,0.5\n",
        "train.csv:6: label is '0.5', expected 0 or 1, neg or pos",
    ),
    "label neutral": ("train.csv", GOOD_CSV + b"worse,neutral\n", "train.csv:6: label is 'neutral'"),
    "label in Arabic digits": ("train.csv", GOOD_CSV + "worse,\u0661\n".encode(), "train.csv:6: label is"),
    "too few cells": ("train.csv", GOOD_CSV + b"worse\n", "train.csv:6: row has 1 cells, expected 2"),
    "too many cells": ("train.csv", GOOD_CSV + b"so, so,1\n", "train.csv:6: row has 3 cells, expected 2"),
    "NUL byte": ("train.csv", GOOD_CSV + b"a\0b,1\n", "train.csv:6: text holds a NUL byte"),
    "lost quotation mark": (
        "train.csv",
        GOOD_CSV + b'"worse,1\n' + b"so so,0\n" * 20_000,
        "train.csv:6: a quotation mark in this row is never closed",
    ),
    "lost quotation mark before another": (
        "train.csv",
        GOOD_CSV + b'"worse,1\nbad,0\n"bad, too",0\n',
        "train.csv:6: a quotation mark opens in this row and closes in line 8 with text behind it",
    ),
    "two lost quotation marks": (
        "train.csv",
        GOOD_CSV + b'"worse,1\n' + b"so so,0\n" * 20_000 + b'bad",0\n',
        "train.csv:6: text runs over whole rows to line 20007",
    ),
    "two lost quotation marks around long lines": (
        "train.csv",
        GOOD_CSV + b'"worse,1\nso ' + b"so " * 100_000 + b',0\nbad",0\n',
        "train.csv:6: text runs over whole rows to line 8",
    ),
    "text after a quotation": (
        "train.csv",
        GOOD_CSV + b'"a"b,1\n',
        "train.csv:6: a quotation mark opens in this row and closes in line 6 with text behind it",
    ),
    "text after a quotation in tabs": (
        "train.tsv",
        b'text\tlabel\n"a"b\t1\n',
        "train.tsv:2: a quotation mark opens in this row and closes in line 2 with text behind it",
    ),
    "commas in a tab file": ("train.tsv", GOOD_CSV, "train.tsv:1: no column named text or review"),
    "after a row of two lines": ("train.csv", GOOD_CSV + b'"a\nb",1\nworse,3\n', "train.csv:8: label is '3'"),
    "not UTF-8": ("train.csv", GOOD_CSV + b"caf\xe9,1\n", "train.csv:6: byte 0xe9 is not UTF-8"),
    "UTF-16": ("train.csv", GOOD_CSV.decode().encode("utf-16"), "train.csv:1: byte 0xff is not UTF-8"),
    "positive only": ("train.csv", b"text,label\na,1\nb,1\nc,1\n", "no review in train has label 0"),
    "too few to hold out": (
        "train.csv",
        b"text,label\na,1\nb,0\nc,1\n",
        "expected at least 2 to hold one out",
    ),
    "one text again and again": (
        "train.csv",
        b"text,label\n" + b"a,1\nb,0\n" * 9,
        "0 different training reviews",
    ),
    "broken JSON": ("train.jsonl", b'{"text": "a", "label": 1}\n{"text": \n', "train.jsonl:2: "),
    "JSON without a label": ("train.jsonl", b'{"text": "a"}\n', "train.jsonl:1: no column named label"),
    "JSON line is a list": ("train.jsonl", b'{"text":"a","label":1}\n["a", 1]\n', "train.jsonl:2: "),
    "JSON label 2.0": ("train.jsonl", b'{"text": "a", "label": 2.0}\n', "train.jsonl:1: label is 2.0"),
    "JSON label a list": ("train.jsonl", b'{"text": "a", "label": [1]}\n', "train.jsonl:1: label is [1]"),
    "JSON label NaN": (
        "train.jsonl",
        b'{"text": "a", "label": NaN}\n',
        "1 of 1 rows have no text or no label",
    ),
    "JSON object over several lines": (
        "train.json",
        b'{\n "text": "a",\n "label": 1\n}\n',
        "train.json: holds a JSON object over several lines, expected one object a line or an array of objects",
    ),
    "JSON label of 5,000 digits": (
        "train.jsonl",
        b'{"text": "a", "label": 1}\n{"text": "a", "label": ' + b"1" * 5_000 + b"}\n",
        "train.jsonl:2: a number has too many digits, expected 0 or 1",
    ),
    "JSON label twice": (
        "train.json",
        b'[{"text": "a", "label": 1}, {"text": "b", "label": 0, "label": 1}]',
        "train.json:2: more than one column named label",
    ),
    "JSON text twice": (
        "train.jsonl",
        b'{"text": "a", "text": "b", "label": 1}\n',
        "train.jsonl:1: more than one column named text",
    ),
    "JSON text number": ("train.json", b'[{"text": 5, "label": 1}]', "train.json:1: text is 5"),
    "JSON half a surrogate pair": (
        "train.json",
        b'[{"text": "\\ud800", "label": 1}]',
        "half a surrogate pair",
    ),
    "JSON too deep": ("train.json", b"[" * 200_000, "train.json:1: JSON is nested too deeply"),
    "JSON empty list": ("train.json", b"[]", "train.json: holds no reviews"),
    "no parquet": ("train.parquet", b"text,label\n", "train.parquet: cannot be read as parquet"),
    "empty parquet": ("train.parquet", b"", "train.parquet: cannot be read as parquet"),
    "cut parquet": (
        "train.parquet",
        b"PAR1" + b"\0" * 40 + b"PAR1",
        "train.parquet: cannot be read as parquet",
    ),
    "gzip that is none": (
        "train.csv.gz",
        GOOD_CSV,
        "train.csv.gz: cannot be read as gzip: Not a gzipped file",
    ),
    "gzip cut short": (
        "train.csv.gz",
        gzip.compress(GOOD_CSV)[:-9],
        "train.csv.gz: cannot be read as gzip: ",
    ),
    "gzip changed": (
        "train.jsonl.gz",
        _changed(gzip.compress(GOOD_CSV * 99)),
        "train.jsonl.gz: cannot be read as gzip: ",
    ),
    "gzip of nothing": ("train.tsv.gz", gzip.compress(b""), "train.tsv.gz: is empty"),
    "parquet in gzip": (
        "train.parquet.gz",
        gzip.compress(b"PAR1"),
        "train.parquet.gz: is parquet inside gzip",
    ),
    "unlabelled for the most part": (
        "train.csv",
        GOOD_CSV + b"so so,-1\n" * 5,
        "train.csv: 5 of 9 rows have no text or no label, expected at most half; the first is ",
    ),
    "zip": ("train.csv.zip", b"PK", "train.csv.zip: is no data file"),
    "unknown suffix": ("train.xlsx", b"PK", "train.xlsx: is no data file"),
}

# Rows that --strict-data refuses and that are left out otherwise.
STRICT_FAULTS: dict[str, tuple[str, bytes, str]] = {
    "label -1": ("train.csv", GOOD_CSV + b"worse,-1\n", "train.csv:6: label is '-1', expected 0 or 1"),
    "label nan": ("train.csv", GOOD_CSV + b"worse,nan\n", "train.csv:6: label is 'nan'"),
    "label missing": ("train.csv", GOOD_CSV + b"worse,\n", "train.csv:6: label is ''"),
    "empty text": ("train.csv", GOOD_CSV + b",1\n", "train.csv:6: text is empty, expected a review"),
    "white space only": ("train.csv", GOOD_CSV + b'" \t ",1\n', "train.csv:6: text is empty"),
    "tabs": ("train.tsv", GOOD_CSV.replace(b",", b"\t") + b"\t1\n", "train.tsv:6: text is empty"),
    "JSON label NaN": (
        "train.jsonl",
        GOOD_JSON + b'{"text": "a", "label": NaN}\n',
        "train.jsonl:5: label is nan",
    ),
    "JSON label null": (
        "train.jsonl",
        GOOD_JSON + b'{"text": "a", "label": null}\n',
        "train.jsonl:5: label is None",
    ),
    "JSON without a label": ("train.jsonl", GOOD_JSON + b'{"text": "a"}\n', "train.jsonl:5: label is None"),
    "JSON text null": (
        "train.jsonl",
        GOOD_JSON + b'{"text": null, "label": 1}\n',
        "train.jsonl:5: text is empty",
    ),
}

"""Files are what their bytes say: kinds, encodings, delimiters, shapes of JSON, saved data sets."""

from __future__ import annotations

import bz2
import gzip
import json
import lzma
import pickle
import sqlite3
import subprocess
import sys
import tarfile
import zipfile
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pytest

from vicuna import config
from vicuna.data.conversation import Problem
from vicuna.data.records import columns, file_types, json_stream, reasons
from vicuna.data.records.find_files import expand, expand_noting
from vicuna.data.records.formats import parse
from vicuna.data.records.read_file import read
from vicuna.data.report import FileReport
from vicuna.errors import SettingsError, UserError

RECORDS = [
    {"instruction": "怎么退货？", "output": "请在“我的订单”里点退货；七天内免费。"},
    {"instruction": "几点上班？", "output": "早上九点。"},
]
ANSWERS = [r["output"] for r in RECORDS]
JSONL = "".join(json.dumps(r, ensure_ascii=False) + "\n" for r in RECORDS)


def answers(path: Path, encoding: str | None = None) -> tuple[list[str], list[Problem]]:
    problems: list[Problem] = []
    found = []
    for raw in read(path, problems, encoding):
        parsed = parse(raw)
        problems += parsed.problems
        if parsed.conversation:
            found.append(parsed.conversation.turns[-1].text)
    return found, problems


def made(path: Path, content: bytes | str) -> Path:
    path.write_bytes(content.encode() if isinstance(content, str) else content)
    return path


# What cannot be read is named


def _zip(path: Path, *names: str) -> None:
    with zipfile.ZipFile(path, "w") as file:
        for name in names:
            file.writestr(name, JSONL)


def _tar(path: Path, mode: str) -> None:
    inner = made(path.with_name("inner.jsonl"), JSONL * 50)
    with tarfile.open(path, mode) as file:  # type: ignore[call-overload]
        file.add(inner, "inner.jsonl")


def _sqlite(path: Path) -> None:
    with sqlite3.connect(path) as base:
        base.execute("create table t (instruction text, output text)")


FOREIGN: dict[str, tuple[Any, str]] = {
    "xlsx": (lambda p: _zip(p, "[Content_Types].xml", "xl/workbook.xml"), file_types.WORKBOOK),
    "docx": (lambda p: _zip(p, "[Content_Types].xml", "word/document.xml"), file_types.WORD),
    "zip": (lambda p: _zip(p, "a.jsonl", "b.jsonl"), file_types.ARCHIVE),
    "tar": (lambda p: _tar(p, "w"), file_types.ARCHIVE),
    "tar.gz": (lambda p: _tar(p, "w:gz"), file_types.ARCHIVE),
    "tar.xz": (lambda p: _tar(p, "w:xz"), file_types.ARCHIVE),
    "7z": (lambda p: made(p, b"7z\xbc\xaf\x27\x1c\0\4" + bytes(50)), file_types.ARCHIVE),
    "rar": (lambda p: made(p, b"Rar!\x1a\x07\x01\0" + bytes(50)), file_types.ARCHIVE),
    "xls": (
        lambda p: made(p, b"\xd0\xcf\x11\xe0\xa1\xb1\x1a\xe1" + bytes(600)),
        file_types.OLD_OFFICE,
    ),
    "pdf": (lambda p: made(p, b"%PDF-1.7\n%\xe2\xe3\xcf\xd3\n" + bytes(50)), file_types.PDF),
    "db": (_sqlite, file_types.SQLITE),
    "pkl": (lambda p: made(p, pickle.dumps(RECORDS)), file_types.PICKLE),
    "npy": (lambda p: np.save(p, np.zeros(3)), file_types.NUMPY),
    "npz": (lambda p: np.savez(p, a=np.zeros(3)), file_types.NUMPY),
    "png": (lambda p: made(p, b"\x89PNG\r\n\x1a\n" + bytes(50)), file_types.MEDIA_FILE),
    "html": (lambda p: made(p, "<!DOCTYPE html><html><body>好</body></html>"), file_types.WEB_PAGE),
    "yaml": (lambda p: made(p, "- instruction: 好\n  output: 是\n"), file_types.YAML),
    "lfs": (
        lambda p: made(p, "version https://git-lfs.github.com/spec/v1\noid x\n"),
        file_types.LFS,
    ),
    "bin": (lambda p: made(p, bytes(range(256)) * 9), file_types.BINARY),
}


@pytest.mark.parametrize("name", FOREIGN)
def test_what_is_no_text_is_named_whatever_it_is_called(tmp_path: Path, name: str) -> None:
    make, reason = FOREIGN[name]
    path = tmp_path / f"d.{name}"
    make(path)
    for called in ("d.jsonl", "d.csv", f"x.{name}"):
        if name == "yaml" and called != "x.yaml":
            continue
        target = path.rename(tmp_path / called)
        assert answers(target) == ([], [Problem(1, "", reason, "dropped")]), called
        path = target


def test_what_cannot_be_read_is_not_passed_over_in_a_folder(tmp_path: Path) -> None:
    made(tmp_path / "a.jsonl", JSONL)
    for name in ("xlsx", "zip", "tar.gz", "db", "pkl", "npz"):
        FOREIGN[name][0](tmp_path / f"d.{name}")
    found = {path.name for path in expand(str(tmp_path))}
    assert {"a.jsonl", "d.xlsx", "d.zip", "d.tar.gz", "d.db", "d.pkl", "d.npz"} <= found


@pytest.mark.parametrize(
    ("ending", "pack"),
    [("gz", gzip.compress), ("bz2", bz2.compress), ("xz", lzma.compress), ("zst", None)],
)
def test_compressed_files(tmp_path: Path, ending: str, pack: Any) -> None:
    pack = pack or (lambda data: pa.compress(data, "zstd", asbytes=True))
    path = made(tmp_path / f"d.jsonl.{ending}", pack(JSONL.encode()))
    assert answers(path) == (ANSWERS, [])
    assert answers(path.rename(tmp_path / "d.jsonl")) == (ANSWERS, [])
    assert expand(str(tmp_path)) == [tmp_path / "d.jsonl"]
    many = "".join(json.dumps({"text": str(i**40)}) + "\n" for i in range(4000))
    whole = pack(many.encode())
    cut, problems = answers(made(tmp_path / "cut", whole[: len(whole) // 2]))
    assert len(cut) < 4000
    assert [p.action for p in problems][-1:] == ["dropped"]
    if ending != "zst":
        two = made(tmp_path / "two", pack(JSONL.encode()) + pack(JSONL.encode()))
        assert answers(two) == (ANSWERS * 2, [])


# Encodings


SAID = {
    "zh": ["怎么退货？", "请在我的订单里点退货，七天内免费。"],
    "tw": ["怎麼退貨？", "請在我的訂單裡點退貨，七天內免費。"],
    "jp": ["日本の首都はどこですか？", "東京です。人口がいちばん多いです。"],
    "kr": ["한국의 수도는 어디입니까?", "서울입니다. 사람이 가장 많습니다."],
    "de": ["Wie groß ist München?", "Über 1,5 Millionen Einwohner – ziemlich schön für 5 €."],
    "fr": ["Où est-ce que tu habites ?", "À côté de l’école, près du théâtre. C’est ça."],
    "pl": ["Gdzie jest łódź?", "Łódź stoi w żółtej zatoce, gdzieś daleko. Źródło świeci."],
    "ru": ["Где ты живёшь?", "Я живу в Москве, недалеко от центра города."],
}
WAYS = {
    "zh": ("utf-8", "utf-8-sig", "gb18030", "gbk", "utf-16", "utf-16-le", "utf-16-be", "utf-32-le"),
    "tw": ("utf-8", "big5", "cp950", "gb18030", "utf-16-be"),
    "jp": ("cp932", "shift_jis", "euc-jp", "utf-16-le"),
    "kr": ("euc-kr", "cp949", "utf-16-le"),
    "de": ("cp1252", "latin-1", "utf-16-le", "utf-32-be"),
    "fr": ("cp1252", "utf-8"),
    "pl": ("cp1250",),
    "ru": ("cp1251", "koi8-r", "utf-16"),
}


@pytest.mark.parametrize(("tongue", "encoding"), [(t, e) for t, es in WAYS.items() for e in es])
def test_encodings_of_the_world(tmp_path: Path, tongue: str, encoding: str) -> None:
    question, answer = SAID[tongue]
    record = json.dumps({"instruction": question, "output": answer}, ensure_ascii=False)
    table = f"instruction;output\r\n{question};{answer}\r\n"
    for name, text in (("d.jsonl", record + "\n"), ("d.csv", table)):
        try:
            data = text.encode(encoding)
        except UnicodeEncodeError:  # the euro sign of Latin-1
            data = text.replace("€", "E").replace("–", "-").encode(encoding)
            answer = answer.replace("€", "E").replace("–", "-")
        found, problems = answers(made(tmp_path / name, data))
        assert found == [answer], name
        assert all(p.reason.startswith("encoding is ") for p in problems)
        assert answers(tmp_path / name, encoding)[0] == [answer]


def test_utf_16_that_was_named_and_has_no_mark(tmp_path: Path) -> None:
    for encoding in ("utf-16-le", "utf-16-be", "utf-32-le"):
        path = made(tmp_path / "d.jsonl", JSONL.encode(encoding))
        assert answers(path, encoding[:6])[0] == ANSWERS


def test_excel_in_half_of_europe(tmp_path: Path) -> None:
    rows = "".join(f"Was kostet Größe {i}?;Für Größe {i} sind es {i},50 €.\r\n" for i in range(60))
    path = made(tmp_path / "d.csv", f"Frage;Antwort\r\n{rows}".encode("cp1252"))
    problems: list[Problem] = []
    assert len(list(read(path, problems))) == 60
    assert [p.reason for p in problems] == ["encoding is cp1252, decoded"]


@pytest.mark.parametrize("name", ["utf-9", "base64", "rot13", "zip", "idna", "hex", "", "\0"])
def test_an_encoding_that_is_none_is_said(tmp_path: Path, name: str) -> None:
    path = made(tmp_path / "d.jsonl", JSONL)
    if not name:
        assert answers(path, None)[0] == ANSWERS
        return
    with pytest.raises(UserError, match="unknown encoding"):
        answers(path, name)


# Delimiters


HEADERS = [("instruction", "output"), ("问题", "答案"), ("客户说", "我们说")]


@pytest.mark.parametrize("mark", [",", ";", "\t", "|"])
@pytest.mark.parametrize("header", HEADERS)
@pytest.mark.parametrize("encoding", ["utf-8-sig", "gb18030", "utf-16"])
def test_the_delimiter_comes_from_the_content(
    tmp_path: Path, mark: str, header: tuple[str, str], encoding: str
) -> None:
    cells = [header, ("退货，怎么办？", f'"点{mark}""退货""；\n再等"'), ("几点？", "九点。")]
    text = "".join(mark.join(row) + "\r\n" for row in cells)
    for start in ("", f"sep={mark}\r\n"):
        path = made(tmp_path / "d.csv", (start + text).encode(encoding))
        raws = list(read(path, []))
        assert [r.value for r in raws] == [
            dict(zip(header, ("退货，怎么办？", f'点{mark}"退货"；\n再等'))),
            dict(zip(header, ("几点？", "九点。"))),
        ]
        assert list(read(path.rename(tmp_path / "d.tsv"), [])) == raws


def test_one_column_and_wide_tables(tmp_path: Path) -> None:
    one = made(tmp_path / "d.csv", "text\n一；二\n三\n")
    assert [r.value for r in read(one, [])] == [{"text": "一；二"}, {"text": "三"}]
    wide = made(tmp_path / "e.csv", "id;x,y;问题;答案\n1;2,5;甲;乙\n2;3,5;丙;丁\n")
    assert answers(wide)[0] == ["乙", "丁"]


def test_a_tables_own_names(tmp_path: Path) -> None:
    path = made(tmp_path / "d.csv", "﻿用户提问;客服回答;部门\n几点上班？;早上九点。;前台\n")
    (entry,) = config.dataset_entries(
        [f"{path}@columns.instruction=用户提问,columns.output=客服回答"]
    )
    assert entry == config.DatasetEntry.model_validate(
        {"path": str(path), "columns": {"instruction": "用户提问", "output": "客服回答"}}
    )
    own = columns.settled(entry.columns)
    seen = columns.keys_of(read(path, []))
    columns.check(path, own, seen)
    (raw,) = read(path, [])
    parsed = parse(raw, own)
    assert parsed.conversation is not None
    assert [t.text for t in parsed.conversation.turns] == ["几点上班？", "早上九点。"]
    assert parsed.unused == ("部门",)
    with pytest.raises(UserError, match="Did you mean 用户提问"):
        columns.check(path, columns.settled({"instruction": "用户问"}), seen)
    with pytest.raises(UserError, match=r"columns\.instruction"):
        columns.settled({"instructoin": "用户提问"})
    with pytest.raises(SettingsError, match="colum"):
        config.dataset_entries([f"{path}@colum.instruction=x"])
    with pytest.raises(UserError, match=r"columns\.output is missing") as found:
        columns.check(path, columns.settled({"instruction": "用户提问"}), seen)
    assert found.value.fix.endswith("@columns.instruction=用户提问,columns.output=客服回答")
    columns.check(path, columns.settled({"instruction": "问"}), ["问", "Output"])
    columns.check(path, columns.settled({"system": "问"}), ["问", "答"])
    lines = made(tmp_path / "d.jsonl", '{"q1": "甲", "a1": "乙", "output": "旧"}\n')
    (raw,) = read(lines, [])
    parsed = parse(raw, columns.settled({"instruction": "q1", "output": "a1"}))
    assert parsed.unused == ("output (the file's own)",)


# Shapes of JSON


TALK = {"messages": [{"role": "user", "content": "甲"}, {"role": "assistant", "content": "乙"}]}
TWO = [{"instruction": "一加一", "output": "二"}, {"instruction": "二加二", "output": "四"}]
SHAPES: list[tuple[Any, list[str]]] = [
    ({"version": 1, "meta": {"a": [1]}, "data": TWO}, ["二", "四"]),
    ({"result": {"items": TWO}}, ["二", "四"]),
    ({"train": TWO, "test": [TWO[0]]}, ["二", "四"]),
    ({"test": [TWO[0]], "train": TWO}, ["二", "四"]),
    ({"test": TWO}, ["二", "四"]),
    ({"q1": TWO[0], "q2": TWO[1]}, ["二", "四"]),
    ({"a": TALK, "b": TALK}, ["乙", "乙"]),
    ({"rows": [{"row_idx": 0, "row": TWO[0]}, {"row_idx": 1, "row": TWO[1]}]}, ["二", "四"]),
    ({"instruction": {"0": "一", "1": "三"}, "output": {"0": "二", "1": "四"}}, ["二", "四"]),
    ({"instruction": ["一", "三"], "output": ["二", "四"]}, ["二", "四"]),
    ({"columns": ["instruction", "output"], "index": [0, 1], "data": [["一", "二"], ["三", "四"]]}, ["二", "四"]),
    ({"data": [["一", "二"], ["三", "四"]], "columns": ["instruction", "output"]}, ["二", "四"]),
    ({"schema": {"fields": [{"name": "index"}]}, "data": TWO}, ["二", "四"]),
    ({"conversations": [TALK, TALK]}, ["乙", "乙"]),
    ({"dialogs": [TALK["messages"], TALK["messages"]]}, ["乙", "乙"]),
    (TALK, ["乙"]),
    (TWO[0], ["二"]),
    ({"input": ["一", "三"], "output": ["二", "四"]}, ["四"]),
    ({"prompt": "一", "chosen": [{"role": "assistant", "content": "二"}], "rejected": []}, ["二"]),
    ({"history": [{"input": "一", "output": "二"}]}, ["二"]),
]  # fmt: skip


@pytest.mark.parametrize(("value", "wanted"), SHAPES)
@pytest.mark.parametrize("indent", [None, 2])
def test_the_list_inside_is_found(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, value: Any, wanted: list[str], indent: Any
) -> None:
    text = json.dumps(value, ensure_ascii=False, indent=indent)
    path = made(tmp_path / "d.json", text)
    found, problems = answers(path)
    assert found == wanted
    assert not [p for p in problems if p.action == "dropped"]
    inside = value not in (TALK, TWO[0]) and len(wanted) > 1
    assert bool(problems) == inside  # said where something was taken apart
    monkeypatch.setattr("vicuna.data.records.text_stream.BUFFER", 7)
    monkeypatch.setattr("vicuna.data.records.read_file.HEAD", 16)
    assert answers(path) == (found, problems)
    if "test" in value and "train" in value:
        assert any(p.reason == f"{reasons.OTHER_LIST}: test" for p in problems)


def test_a_list_inside_is_streamed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(json_stream, "LIMIT", 2000)
    monkeypatch.setattr("vicuna.data.records.json_layouts.LIMIT", 2000)
    monkeypatch.setattr("vicuna.data.records.text_stream.BUFFER", 100)
    monkeypatch.setattr("vicuna.data.records.read_file.HEAD", 100)
    many = [{"instruction": str(i), "output": "答"} for i in range(2000)]
    for value in ({"n": 1, "data": many, "more": many}, many):
        found, problems = answers(made(tmp_path / "d.json", json.dumps(value)))
        assert len(found) == 2000
        assert not [p for p in problems if p.action == "dropped"]
    large = {"instruction": [str(i) for i in range(2000)], "output": ["答"] * 2000}
    found, problems = answers(made(tmp_path / "d.json", json.dumps(large)))
    assert not found
    assert any("write one record a line" in p.reason for p in problems)


def test_lines_and_elements_in_pythons_notation(tmp_path: Path) -> None:
    lines = "".join(f"{r}\n" for r in TWO)
    for text in (lines, lines.splitlines()[0]):
        found, problems = answers(made(tmp_path / "d.jsonl", text))
        assert found == ["二", "四"][: len(found)] != []
        assert {p.action for p in problems} == {"repaired"}


# Saved data sets


def _arrow(folder: Path, rows: list[dict[str, Any]], *names: str) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    for name in names:
        table = pa.Table.from_pylist(rows)
        with (
            pa.OSFile(str(folder / name), "wb") as sink,
            pa.ipc.new_stream(sink, table.schema) as writer,
        ):
            writer.write_table(table)
    state = {"_data_files": [{"filename": n} for n in names if not n.startswith("cache")]}
    (folder / "state.json").write_text(json.dumps(state))
    (folder / "dataset_info.json").write_text("{}")


def test_a_data_set_that_was_saved_to_disk(tmp_path: Path) -> None:
    one = tmp_path / "one"
    _arrow(one, TWO, "data-00000-of-00001.arrow", "cache-abc.arrow")
    assert [p.name for p in expand(str(one))] == ["data-00000-of-00001.arrow"]
    assert answers(expand(str(one))[0]) == (["二", "四"], [])
    with pytest.raises(UserError, match="Give its folder"):
        expand(str(one / "state.json"))
    both = tmp_path / "both"
    for split in ("test", "train"):
        _arrow(both / split, TWO, "data-00000-of-00001.arrow")
    (both / "dataset_dict.json").write_text('{"splits": ["test", "train"]}')
    notes: list[str] = []
    (path,) = expand_noting(str(both), notes)
    assert path.parent.name == "train"
    assert notes == ["of the splits train is read, not test"]
    file = tmp_path / "d.feather"
    pa.feather.write_feather(pa.Table.from_pylist(TWO), str(file)) if hasattr(pa, "feather") else (
        pytest.importorskip("pyarrow.feather").write_feather(pa.Table.from_pylist(TWO), str(file))
    )
    assert answers(file) == (["二", "四"], [])
    broken = made(tmp_path / "d.arrow", path.read_bytes()[:-40])
    assert [p.action for p in answers(broken)[1]] in ([], ["dropped"])


def test_reading_loads_nothing_heavy() -> None:
    code = (
        "import vicuna.data.records.formats, vicuna.data.records.read_file, sys; "
        "print({'torch', 'pyarrow', 'transformers', 'numpy'} & set(sys.modules))"
    )
    assert subprocess.check_output([sys.executable, "-c", code], text=True).strip() == "set()"


@pytest.mark.parametrize(
    ("name", "content", "said", "unsaid"),
    [
        ("a.csv", "怎么退货,七天内可退\n怎么换货,三十天内可换\n", "if the first row is data", ""),
        ("b.csv", "怎么退货？,七天内可退。\n怎么换货？,可换。\n", "looks like data", "@columns"),
        ("c.csv", "用户提问,客服回复\n怎么换货,可换\n", "@columns.instruction=用户提问", "header"),
        ("d.json", '{"你好吗": "很好", "冬天冷": "很冷"}', "map of questions", "@columns"),
        ("e.json", '{"甲": "很好", "冬天": "很冷", "夏天": "热"}', "map of questions", "@columns"),
        (
            "f.jsonl",
            '{"q1": "甲", "a1": "乙"}\n',
            "@columns.instruction=q1,columns.output=a1",
            "map",
        ),
    ],
)
def test_names_that_are_data_are_not_taken_for_columns(
    name: str, content: str, said: str, unsaid: str, tmp_path: Path
) -> None:
    path = made(tmp_path / name, content)
    report = FileReport(str(path))
    for raw in read(path, []):
        report.add(parse(raw))
    hint = report.notes()[1]
    assert said in hint
    assert not unsaid or unsaid not in hint

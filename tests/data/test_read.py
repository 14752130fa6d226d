"""Reading files: every layout, encoding and kind of damage, and sources by name."""

from __future__ import annotations

import gzip
import json
import sys
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from vicuna.data.conversation import Problem, Raw
from vicuna.data.records import json_stream, text_stream
from vicuna.data.records import read_file as reader
from vicuna.data.records.find_files import digest, expand
from vicuna.data.records.read_file import read
from vicuna.errors import UserError

RECORDS = [
    {"instruction": "茶叶怎样保存？", "input": "", "output": "密封、避光，放在干燥的地方。"},
    {"instruction": "翻译成英文", "input": "春天来了", "output": "Spring is here."},
    {
        "instruction": "算一算",
        "input": "七乘八",
        "output": '五十六\n就是 56，写作 "56"，[五六]{}。',
    },
]
JSONL = "".join(json.dumps(r, ensure_ascii=False) + "\n" for r in RECORDS)
LINES = JSONL.splitlines()
PRETTY = json.dumps(RECORDS, ensure_ascii=False, indent=2)
COMPACT = json.dumps(RECORDS, ensure_ascii=False)
CUT = "file is cut off here"


def load(path: Path, content: bytes | str, **kw: str) -> tuple[list[Raw], list[Problem]]:
    path.write_bytes(content.encode() if isinstance(content, str) else content)
    problems: list[Problem] = []
    return list(read(path, problems, **kw)), problems


def values(raws: list[Raw]) -> list[object]:
    return [json.loads(r.value) if isinstance(r.value, str) else r.value for r in raws]


def marks(problems: list[Problem]) -> list[tuple[int, str]]:
    return [(p.line, p.action) for p in problems]


# Encodings


@pytest.mark.parametrize(
    ("encoding", "named"),
    [("utf-8", ""), ("utf-8-sig", ""), ("gb18030", "GB18030"), ("utf-16", "UTF-16")],
)
@pytest.mark.parametrize("content", [JSONL, JSONL.replace("\n", "\r\n"), PRETTY, COMPACT])
@pytest.mark.parametrize("packed", [False, True])
def test_encodings(tmp_path, encoding, named, content, packed):
    data = content.encode(encoding)
    raws, problems = load(tmp_path / "d.json", gzip.compress(data) if packed else data)
    assert values(raws) == RECORDS
    assert not any("\r" in r.value for r in raws)
    expected = [Problem(1, "", f"encoding is {named}, decoded", "warned")] if named else []
    assert problems == expected


def test_big_endian_utf16(tmp_path):
    raws, problems = load(tmp_path / "d", b"\xfe\xff" + JSONL.encode("utf-16-be"))
    assert values(raws) == RECORDS
    assert marks(problems) == [(1, "warned")]


def test_gb18030_shows_only_after_much_ascii(tmp_path):
    plain = '{"text": "%s"}\n' % ("a" * 1000)
    content = (plain * 1500).encode() + JSONL.encode("gb18030")
    raws, problems = load(tmp_path / "d.jsonl", content)
    assert values(raws)[1500:] == RECORDS
    assert marks(problems) == [(1, "warned")]


def test_sample_that_ends_within_a_character(tmp_path):
    for shift in range(4):
        body = "x" * shift + "茶" * text_stream.SAMPLE
        for encoding in ("utf-8", "gb18030"):
            content = json.dumps({"text": body}, ensure_ascii=False).encode(encoding) + b"\n"
            raws, problems = load(tmp_path / "d.jsonl", content)
            assert values(raws) == [{"text": body}]
            assert len(problems) == (encoding == "gb18030")


def test_encoding_given(tmp_path):
    raws, problems = load(tmp_path / "d.jsonl", JSONL.encode("gb18030"), encoding="gbk")
    assert (values(raws), problems) == (RECORDS, [])
    raws, problems = load(tmp_path / "d.jsonl", LINES[0].encode("big5", "ignore"), encoding="big5")
    assert len(raws) == 1
    with pytest.raises(UserError, match="gb18030"):
        load(tmp_path / "d.jsonl", JSONL, encoding="utf-9")


@pytest.mark.parametrize("encoding", ["utf-8", "gb18030"])
def test_line_that_does_not_decode_is_dropped_alone(tmp_path, encoding):
    many = LINES * 10
    lines = [line.encode(encoding) for line in many]
    lines[4] = lines[4].replace("春".encode(encoding), b"\xff")
    raws, problems = load(tmp_path / "d.jsonl", b"\n".join(lines) + b"\n")
    assert values(raws) == (RECORDS * 10)[:4] + (RECORDS * 10)[5:]
    dropped = [p for p in problems if p.action == "dropped"]
    assert dropped == [Problem(5, "", f"bytes that are not {encoding.upper()}", "dropped")]


def test_array_element_that_does_not_decode(tmp_path):
    data = PRETTY.encode().replace("春".encode(), b"\xe6\x98")
    raws, problems = load(tmp_path / "d.json", data)
    assert values(raws) == [RECORDS[0], RECORDS[2]]
    assert marks(problems) == [(7, "dropped")]


# Layouts


@pytest.mark.parametrize("name", ["d.json", "d.jsonl", "d.txt", "d.csv", "d", "d.parquet", "d.gz"])
@pytest.mark.parametrize("content", [JSONL, PRETTY, COMPACT])
def test_content_decides_not_the_name(tmp_path, name, content):
    raws, problems = load(tmp_path / name, content)
    assert (values(raws), problems) == (RECORDS, [])


def test_lines_are_those_of_the_file(tmp_path):
    raws, _ = load(tmp_path / "d", "\n\n" + LINES[0] + "\n \t\n" + LINES[1] + "\r\n")
    assert raws == [Raw(3, LINES[0]), Raw(5, LINES[1])]
    raws, _ = load(tmp_path / "d", "\n" + PRETTY)
    assert [r.line for r in raws] == [3, 8, 13]
    assert [r.line for r in load(tmp_path / "d", COMPACT)[0]] == [1, 1, 1]
    odd = json.dumps({"text": "甲\u2028乙\x85丙\x0c丁"}, ensure_ascii=False)
    raws, _ = load(tmp_path / "d", odd + "\n" + odd)
    assert raws == [Raw(1, odd), Raw(2, odd)]


def test_lines_are_not_validated(tmp_path):
    content = LINES[0] + '\n{"text": "\\d"}\nnot JSON\n' + LINES[1] + "\n"
    raws, problems = load(tmp_path / "d.jsonl", content)
    assert [r.line for r in raws] == [1, 2, 3, 4]
    assert problems == []


def test_objects_one_after_another(tmp_path):
    pretty = [json.dumps(r, ensure_ascii=False, indent=4) for r in RECORDS]
    assert load(tmp_path / "d", pretty[0]) == ([Raw(1, pretty[0])], [])
    raws, problems = load(tmp_path / "d", "\n".join(pretty))
    assert (values(raws), problems) == (RECORDS, [])
    assert [r.line for r in raws] == [1, 6, 11]
    assert values(load(tmp_path / "d", "".join(LINES))[0]) == RECORDS


def test_lines_that_end_in_commas(tmp_path):
    raws, problems = load(tmp_path / "d.jsonl", ",\n".join(LINES) + ",\n")
    assert values(raws) == RECORDS
    assert marks(problems) == [(1, "repaired")]


def test_wrapped_elements_and_lines_of_arrays(tmp_path):
    wrapped = [[r] for r in RECORDS]
    for indent in (None, 2):
        raws, problems = load(tmp_path / "d", json.dumps(wrapped, indent=indent))
        assert (values(raws), problems) == (wrapped, [])
    raws, problems = load(tmp_path / "d", "".join(json.dumps(w) + "\n" for w in wrapped))
    assert (values(raws), problems) == (wrapped, [])
    assert [r.line for r in raws] == [1, 2, 3]


@pytest.mark.parametrize("content", ["", "\n \r\n", "\ufeff", "[]", " [ ]\n", gzip.compress(b"")])
def test_nothing_in_it(tmp_path, content):
    for name in ("d.jsonl", "d.csv", "d.txt"):
        if content not in ("[]", " [ ]\n") or name == "d.jsonl":
            assert load(tmp_path / name, content) == ([], [])


# Damage


def test_line_cut_off(tmp_path):
    whole = JSONL.encode()
    last = len("".join(LINES[:2]).encode()) + 2
    for end in range(last + 1, len(whole) - 1):
        raws, problems = load(tmp_path / "d.jsonl", whole[:end])
        if end < len(whole) - 1:
            assert values(raws) == RECORDS[:2], end
            assert problems == [Problem(3, "", CUT, "dropped")], end
    raws, problems = load(tmp_path / "d.jsonl", whole[:-1])
    assert (values(raws), problems) == (RECORDS, [])


def test_broken_last_line_is_not_called_cut_off(tmp_path):
    raws, problems = load(tmp_path / "d.jsonl", JSONL + '{"text": "\\d", "more": "words"}')
    assert (len(raws), problems) == (4, [])


@pytest.mark.parametrize("content", [PRETTY, COMPACT])
def test_array_cut_off(tmp_path, content):
    whole = content.encode()
    for end in range(2, len(whole)):
        raws, problems = load(tmp_path / "d.json", whole[:end])
        assert values(raws) == RECORDS[: len(raws)], end
        assert [(p.reason, p.action) for p in problems] == [(CUT, "dropped")], end
    assert [r.line for r in raws] == ([1, 1, 1] if content is COMPACT else [2, 7, 12])


def test_trailing_comma(tmp_path):
    content = "[\n" + ",\n".join(LINES) + ",\n]\n"
    raws, problems = load(tmp_path / "d.json", content)
    assert values(raws) == RECORDS
    assert problems == [Problem(5, "", "trailing comma before ]", "repaired")]


BREAKS = {
    "escape": ('"input": "春', '"input": "\\d 春', "Invalid \\escape"),
    "colon": ('"input": "春', '"input" "春', "Expecting ':' delimiter"),
    "quotes in text": ("春天来了", '他说"好"了', "Expecting ',' delimiter"),
    "quote missing": ('春天来了",', "春天来了,", "Expecting ',' delimiter"),
    "single quotes": ('"input": "春天来了"', "'input': '春天来了'", "Expecting property name"),
    "bare word": ('"春天来了"', "春天来了", "Expecting value"),
    "brace missing": ('here."}', 'here."', "Expecting property name"),
    "bracket too many": ('here."}', 'here."]}', "Expecting ',' delimiter"),
}


@pytest.mark.parametrize("kind", BREAKS)
@pytest.mark.parametrize("indent", [None, 0, 2])
@pytest.mark.parametrize("buffer", [text_stream.BUFFER, 7])
def test_broken_element(tmp_path, monkeypatch, kind, indent, buffer):
    monkeypatch.setattr(text_stream, "BUFFER", buffer)
    monkeypatch.setattr(reader, "HEAD", buffer)
    old, new, words = BREAKS[kind]
    content = json.dumps(RECORDS + RECORDS, ensure_ascii=False, indent=indent)
    if indent is not None:
        content = content.replace('here."\n', 'here."').replace('here."  }', 'here."}')
    assert content.count(old) == 2
    raws, problems = load(tmp_path / "d.json", content.replace(old, new, 1))
    assert values(raws) == RECORDS[:1] + RECORDS[2:] + RECORDS
    assert [p.action for p in problems] == ["dropped"]
    assert words in problems[0].reason
    assert problems[0].line in ((1,) if indent is None else range(7, 13))


def test_nothing_between_and_rubbish_between(tmp_path):
    raws, problems = load(tmp_path / "d.json", f"[{LINES[0]}, oops, {LINES[1]} {LINES[2]}]")
    assert values(raws) == RECORDS
    assert [p.reason for p in problems] == ["not valid JSON: Expecting value"]


def test_nested_too_deeply(tmp_path):
    deep = '{"a": ' * 100_000 + "1" + "}" * 100_000
    raws, problems = load(tmp_path / "d.json", f"[{LINES[0]}, {deep}, {LINES[1]}]")
    assert values(raws)[:1] + values(raws)[-1:] == RECORDS[:2]
    assert marks(problems) == [(1, "dropped")]


def test_value_without_end_is_bounded(tmp_path, monkeypatch):
    monkeypatch.setattr(json_stream, "LIMIT", 1000)
    monkeypatch.setattr(text_stream, "BUFFER", 100)
    monkeypatch.setattr(reader, "HEAD", 100)
    raws, problems = load(tmp_path / "d", f'[{LINES[0]}, "' + "长" * 100_000)
    assert values(raws) == RECORDS[:1]
    assert problems[0].action == "dropped"


def test_gzip_cut_and_damaged(tmp_path):
    lines = [json.dumps({"text": str(i**40)}) for i in range(3000)]
    packed = gzip.compress("".join(line + "\n" for line in lines).encode())
    raws, problems = load(tmp_path / "d.jsonl.gz", packed[: len(packed) // 2])
    assert 0 < len(raws) < 3000
    assert [r.value for r in raws] == lines[: len(raws)]
    assert problems == [Problem(len(raws) + 1, "", CUT, "dropped")]
    raws, problems = load(tmp_path / "d.gz", packed[:-9] + b"\0\0\0\0\0\0\0\0\0")
    assert [p.action for p in problems][-1:] == ["dropped"]


def test_gzip_of_several_members(tmp_path):
    packed = b"".join(gzip.compress((line + "\n").encode()) for line in LINES) + bytes(100)
    raws, problems = load(tmp_path / "d.gz", packed)
    assert (values(raws), problems) == (RECORDS, [])


def test_unreadable_file(tmp_path):
    with pytest.raises(UserError, match="cannot read"):
        list(read(tmp_path / "none.jsonl", []))
    with pytest.raises(UserError, match="cannot read"):
        list(read(tmp_path, []))


# Tables and text


@pytest.mark.parametrize(("name", "mark"), [("d.csv", ","), ("d.tsv", "\t"), ("d.csv.gz", ",")])
@pytest.mark.parametrize("encoding", ["utf-8-sig", "gb18030"])
@pytest.mark.parametrize("end", ["\n", "\r\n"])
def test_tables(tmp_path, name, mark, encoding, end):
    rows = ["instruction,input,output", '茶,"一,\n二","他说""好"""', "", "春,,来", "短,x"]
    content = "\n".join(rows).replace(",", mark).replace("\n", end).encode(encoding)
    raws, problems = load(
        tmp_path / name, gzip.compress(content) if name.endswith("gz") else content
    )
    assert raws == [
        Raw(2, {"instruction": "茶", "input": f"一{mark}{end}二", "output": '他说"好"'}),
        Raw(5, {"instruction": "春", "input": "", "output": "来"}),
        Raw(6, {"instruction": "短", "input": "x"}),
    ]
    assert len(problems) == (encoding == "gb18030")


def test_table_damage(tmp_path):
    content = b'instruction,output\na,b\nc,d,e\n\xff,f\ng,"h\ni,j\n'
    raws, problems = load(tmp_path / "d.csv", content)
    assert raws == [Raw(2, {"instruction": "a", "output": "b"})]
    assert marks(problems) == [(3, "dropped"), (4, "dropped"), (5, "dropped")]
    long = "长" * 200_000
    raws, _ = load(tmp_path / "d.csv", f"text\n{long}\n")
    assert raws == [Raw(2, {"text": long})]


def test_plain_text(tmp_path, monkeypatch):
    content = "\n第一段\r\n还是第一段\n\n \u3000\n[注] 第二段\n\n\n第三段"
    raws, problems = load(tmp_path / "d.txt", content)
    assert raws == [
        Raw(2, {"text": "第一段\n还是第一段"}),
        Raw(6, {"text": "[注] 第二段"}),
        Raw(9, {"text": "第三段"}),
    ]
    assert problems == []
    assert load(tmp_path / "d.txt", "[1] 参考文献\n")[0] == [Raw(1, {"text": "[1] 参考文献"})]
    monkeypatch.setattr(reader, "PARAGRAPH", 4)
    raws, problems = load(tmp_path / "d.txt", "一二三\n四五\n六七八\n九十\n\n十一")
    assert [r.line for r in raws] == [1, 2, 4, 6]
    assert (
        "".join(str(r.value["text"]) for r in raws).replace("\n", "") == "一二三四五六七八九十十一"
    )
    assert [p.action for p in problems] == ["warned"]


def test_parquet(tmp_path):
    pa = pytest.importorskip("pyarrow")
    import pyarrow.parquet as pq

    rows = [{"messages": [{"role": "user", "content": f"第{i}问"}]} for i in range(2500)]
    path = tmp_path / "d.json"
    pq.write_table(pa.Table.from_pylist(rows), path, row_group_size=1000)
    problems: list[Problem] = []
    assert list(read(path, problems)) == [Raw(i, row) for i, row in enumerate(rows, 1)]
    assert problems == []
    raws, problems = load(path, path.read_bytes()[:-20])
    assert raws == []
    assert marks(problems) == [(1, "dropped")]
    bad = pa.array([b"good", b"\xff", b"fine"]).view(pa.string())
    pq.write_table(pa.table({"text": bad}), path)
    problems = []
    assert list(read(path, problems)) == [Raw(1, {"text": "good"}), Raw(3, {"text": "fine"})]
    assert marks(problems) == [(2, "dropped")]


# Properties

QUICK = settings(
    deadline=None, max_examples=60, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | st.text(),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(), inner, max_size=3),
    max_leaves=5,
)
OBJECTS = st.lists(st.dictionaries(st.text(min_size=1), JSON, min_size=1, max_size=3), max_size=5)


def plain(value: object) -> object:
    """Without lone surrogates, which no file in UTF-8 can hold."""
    return json.loads(json.dumps(value, ensure_ascii=False).encode("utf-8", "replace"))


@QUICK
@given(
    records=OBJECTS.map(plain),
    layout=st.sampled_from(["jsonl", "compact", 0, 2, "objects"]),
    buffer=st.sampled_from([1, 2, 5, 64, text_stream.BUFFER]),
    ascii=st.booleans(),
    packed=st.booleans(),
)
def test_records_come_back(tmp_path, records, layout, buffer, ascii, packed):
    def dumps(value: object, indent: int | None = None) -> str:
        return json.dumps(value, ensure_ascii=ascii, indent=indent)

    lines = range(1, len(records) + 1)
    if layout == "jsonl":
        content = "".join(dumps(r) + "\n" for r in records)
    elif layout == "compact":
        content, lines = dumps(records), [1] * len(records)
    else:
        parts = [dumps(r, 2 if layout == "objects" else layout) for r in records]
        heights = [p.count("\n") + 1 for p in parts]
        first = 1 if layout == "objects" else 2
        lines = [first + sum(heights[:i]) for i in range(len(parts))]
        content = "\n".join(parts) if layout == "objects" else dumps(records, layout)
    data = content.encode()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(text_stream, "BUFFER", buffer)
        patch.setattr(reader, "HEAD", 16 * buffer)
        raws, problems = load(tmp_path / "d", gzip.compress(data) if packed else data)
    assert values(raws) == records
    assert [r.line for r in raws] == list(lines)
    assert problems == []


FRAGMENTS = st.lists(
    st.sampled_from(
        [b"[", b"]", b"{", b"}", b",", b'"', b'"a":', b"1", b"tru", b"\\", b"\\u12", b"\n", b" ",
         b"\r", b"\xe8\x8c", b"\x8c\xb6", b"\xff", b'{"a":1}', b'"x"', b"\xb4\xba", b"\0", b"\t"]
    ),
    max_size=30,
).map(b"".join)  # fmt: skip
STARTS = [b"", b"\x1f\x8b\x08\0\0\0\0\0\0\0", b"PAR1", b"\xff\xfe", b"\xef\xbb\xbf", b"[", b'{"a":']


@settings(QUICK, max_examples=300)
@given(
    start=st.sampled_from(STARTS),
    body=st.binary(max_size=60) | FRAGMENTS,
    packed=st.booleans(),
    name=st.sampled_from(["d.jsonl", "d.csv", "d.tsv", "d.txt", "d.parquet"]),
    buffer=st.sampled_from([1, 3, text_stream.BUFFER]),
)
def test_no_bytes_raise(tmp_path, start, body, packed, name, buffer):
    data = start + body
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(text_stream, "BUFFER", buffer)
        patch.setattr(reader, "HEAD", 4 * buffer)
        raws, problems = load(tmp_path / name, gzip.compress(data) if packed else data)
    assert all(r.line >= 1 for r in raws)
    assert all(p.line >= 1 and p.reason for p in problems)
    assert not any(text_stream.MARK in str(r.value) for r in raws)


# Sources


@pytest.fixture
def folder(tmp_path, monkeypatch):
    for name in ("b.jsonl", "a.JSON", "sub/c.csv", "sub/d.jsonl.gz", ".hidden/x.json", ".y.json",
                 "sub/notes.md", "dataset_info.json"):  # fmt: skip
        path = tmp_path / "data" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.touch()
    monkeypatch.chdir(tmp_path)
    return tmp_path / "data"


def names(paths: list[Path]) -> list[str]:
    return [p.name for p in paths]


def test_files_folders_globs(folder):
    assert expand("data/sub/notes.md") == [Path("data/sub/notes.md")]
    assert names(expand("data")) == ["a.JSON", "b.jsonl", "c.csv", "d.jsonl.gz"]
    assert names(expand(str(folder) + "/")) == names(expand("data"))
    assert names(expand("data/*")) == ["a.JSON", "b.jsonl"]
    assert names(expand("data/**/*.csv")) == ["c.csv"]
    assert names(expand("data/sub/*.md")) == ["notes.md"]
    (folder / "odd[1].jsonl").touch()
    assert names(expand("data/odd[1].jsonl")) == ["odd[1].jsonl"]


@pytest.mark.parametrize(
    ("source", "words"),
    [
        ("data/b.json", "Did you mean data/b.jsonl?"),
        ("dat/b.jsonl", "Did you mean data/b.jsonl?"),
        ("data/sup/x.csv", "Did you mean data/sub?"),
        ("data/zzz", "a.JSON, b.jsonl"),
        ("data/b.jsonl/x", "is a file"),
        ("data/*.parquet", "no file matches"),
        ("empty", "no data files"),
        ("./owner/name", "no such file"),
        ("a/b/c", "no such file"),
        ("nothing", "there is: data, empty"),
        ("", "no such file"),
    ],
)
def test_wrong_sources(folder, source, words):
    (folder.parent / "empty").mkdir()
    if not source:  # the current folder, as Path has it
        assert expand(source)
        return
    with pytest.raises(UserError) as error:
        expand(source)
    assert words in str(error.value)


def test_hub(folder, monkeypatch):
    import huggingface_hub
    from huggingface_hub import errors

    def answer(result):
        def snapshot_download(repo, *, repo_type, allow_patterns):
            assert (repo, repo_type) == ("owner/name-1.0", "dataset")
            assert "*.jsonl.gz" in allow_patterns
            if isinstance(result, Exception):
                raise result
            return str(result)

        monkeypatch.setattr(huggingface_hub, "snapshot_download", snapshot_download)

    answer(folder)
    assert len(expand("owner/name-1.0")) == 4
    (folder.parent / "bare").mkdir()
    answer(folder.parent / "bare")
    with pytest.raises(UserError, match="no data files"):
        expand("owner/name-1.0")
    answer(errors.HFValidationError("bad name"))
    with pytest.raises(UserError, match="bad name"):
        expand("owner/name-1.0")
    answer(errors.LocalEntryNotFoundError("no"))
    with pytest.raises(UserError, match="HF_ENDPOINT"):
        expand("owner/name-1.0")


def test_hub_offline(folder, monkeypatch):
    from huggingface_hub import constants

    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(folder.parent / "cache"))
    with pytest.raises(UserError) as error:
        expand("owner/name")
    assert "HF_HUB_OFFLINE" in error.value.fix


def test_digest(tmp_path):
    (tmp_path / "d").write_bytes(b"abc")
    assert digest(tmp_path / "d").startswith("ba7816bf8f01cfea")


def test_no_heavy_imports():
    import subprocess

    code = "import vicuna.data.records.read_file, sys; print({'torch', 'numpy', 'pyarrow'} & set(sys.modules))"
    assert subprocess.check_output([sys.executable, "-c", code], text=True).strip() == "set()"

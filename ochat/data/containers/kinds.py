"""What a file is, told by its first bytes: what is read, and what is refused by its name with what to do about it.

    kind = packing(start)                  # "gzip", "Parquet", ...; "" is text
    encoding = encoding_of(head)           # of the text: "utf-8", "utf-16"
    refuse(path, start, "")                # raises DataError for an archive, a table, a web page, ...

Names say nothing: a `.jsonl` of the hub may be the pointer that git-lfs leaves, or the page that asks for a password.
"""

from __future__ import annotations

import codecs
import json
import re
import shlex
from pathlib import Path

from ochat.errors import DataError

HEAD_BYTES = 1 << 16  # that are looked at
READ = {
    "gzip": rb"\x1f\x8b",
    "bzip2": rb"BZh[1-9](1AY&SY|\x17rE8P\x90)",
    "xz": rb"\xfd7zXZ\x00",
    "zstd": rb"\x28\xb5\x2f\xfd|[\x50-\x5f]\x2a\x4d\x18",  # a frame to skip: pzstd writes one in front
    "Parquet": rb"PAR1",
    "Arrow": rb"ARROW1\x00\x00|\xff\xff\xff\xff",
}
TABLES = ("Parquet", "Arrow")
TOOLS = {"gzip": "gzip", "bzip2": "bzip2", "xz": "xz", "zstd": "zstd --long=31"}  # that unpack with -dc
_AGAIN = "write its records as JSON Lines or Parquet"
_SHEET = "save the sheet as CSV, and give that"
_UNPACK = "unpack it with {} and give that folder"
REFUSED = (  # what it is, how it begins, what to do
    ("an Excel workbook", rb"\xd0\xcf\x11\xe0|PK\x03\x04(?s:.)*xl/(workbook|worksheets|theme|styles)", _SHEET),
    ("a spreadsheet", rb"PK\x03\x04(?s:.){26}mimetypeapplication/vnd\.oasis\.opendocument\.spreadsheet", _SHEET),
    ("an array of numpy", rb"\x93NUMPY|PK\x03\x04(?s:.){26}[^/\n]{1,99}\.npy", _AGAIN),
    ("a zip archive", rb"PK(\x03\x04|\x05\x06)", _UNPACK.replace("{}", "python -m zipfile -e {path} {folder},")),
    ("a tar archive", rb"(?s:.{257})ustar", _UNPACK.replace("{}", "python -m tarfile -e {path} {folder},")),
    ("lz4", rb"\x04\x22\x4d\x18|\x02\x21\x4c\x18", "unpack it with lz4 -d {path} {new}"),
    ("a 7z archive", rb"7z\xbc\xaf\x27\x1c", "unpack it with 7z x {path}"),
    ("a rar archive", rb"Rar!\x1a\x07", "unpack it with unrar x {path}"),
    ("lzma of the old kind", rb"\x5d\x00\x00(?s:.{2})\xff{8}", "unpack it with xz -dc -F lzma {path} > {new}"),
    ("lzip", rb"LZIP", "unpack it with lzip -dc {path} > {new}"),
    ("what `compress` writes", rb"\x1f\x9d", "unpack it with gzip -dc {path} > {new}"),
    ("snappy", rb"\xff\x06\x00\x00sNaPpY", "unpack it with snzip -d {path}"),
    ("Feather of the old kind", rb"FEA1", _AGAIN),
    ("encrypted Parquet", rb"PARE", "write it without encryption"),
    ("ORC", rb"ORC", _AGAIN),
    ("Avro", rb"Obj\x01", _AGAIN),
    ("an SQLite database", rb"SQLite format 3\x00", _AGAIN),
    ("HDF5", rb"\x89HDF\r\n", _AGAIN),
    ("a pickle", rb"\x80[\x02-\x05][}\](ctKX\x8c\x95]|\([ld]p\d", f"it can run any program when it is read; {_AGAIN}"),
    ("safetensors", rb'(?s:.{5})\x00\x00\x00\{"', "records are needed: `ochat prepare` makes such files of them"),
    ("PDF", rb"%PDF-", _AGAIN),
    ("the pointer of a file in git-lfs", rb"version https://git-lfs", "fetch the file itself with git lfs pull"),
    ("a web page", rb"(?i:\s*<(!doctype html|html))", "the download failed, or needs a login; fetch the file again"),
    ("what macOS keeps beside a file", rb"\x00\x05\x16[\x00\x07]", "give the file of this name without ._"),
    ("XML", rb"\s*<\?xml", _AGAIN),
)
ENCODINGS = (  # what a text begins with, its encoding; of two where one begins the other the longer first
    (b"\xff\xfe\0\0|\0\0\xfe\xff", "utf-32"),
    (b"\xff\xfe|\xfe\xff", "utf-16"),
    (rb"[\t-~]\0\0\0", "utf-32-le"),
    (rb"\0\0\0[\t-~]", "utf-32-be"),
    (rb"([\t-~]\0){2}", "utf-16-le"),
    (rb"(\0[\t-~]){2}", "utf-16-be"),
)
CSV_TO_LINES = (
    "import csv, json, sys; csv.field_size_limit(1 << 30); [print(json.dumps(row)) for row in "
    "csv.DictReader(open(sys.argv[1], encoding='{encoding}', newline=''), delimiter='{delimiter}')]"
)


def packing(start: bytes) -> str:
    """The name in READ of what the file is, "" for what may be text."""
    return next((name for name, begins in READ.items() if re.match(begins, start)), "")


def encoding_of(head: bytes) -> str:
    """The encoding that a text's first bytes show."""
    return next((name for begins, name in ENCODINGS if re.match(begins, head)), "utf-8")


def refuse(path: Path, head: bytes, packed: str) -> None:
    """Look at the first bytes of a file, or of what a `packed` one holds.

    Raises: DataError saying what the file is, and what to do, where it holds no records.
    """
    inside, once = "", ""
    if packed:
        inside = f" within {packed}"
        once = f"unpack it once with {TOOLS[packed]} -dc {{path}} > {{unpacked}}, and give that"
        if inner := packing(head):
            raise _error(path, inner + inside, once)
    for what, begins, remedy in REFUSED:
        if re.match(begins, head):
            reads_packed = what == "a tar archive" and packed != "zstd"
            raise _error(path, what + inside, once if once and "{path}" in remedy and not reads_packed else remedy)
    encoding = encoding_of(head)
    text = codecs.getincrementaldecoder(encoding)("replace").decode(head).lstrip("\ufeff")
    if head and not text.strip("\0"):
        raise _error(path, "nothing but zero bytes", "it was not written to its end; write it again")
    lines = [line.strip() for line in text.splitlines() if line.strip()]
    if not lines or lines[0].startswith(("{", "[", '"{', '"[')) or any(map(_is_record, lines[:1000])):
        return
    if re.search(r"[\0-\x08\x0e-\x1d]", text[:1000]):
        raise _error(path, f"a binary file of a kind that is not known{inside}", _AGAIN)
    shown = _shorten(lines[0])
    if not (delimiter := _delimiter(lines[0])):
        raise _error(path, f"text that is no JSON ({shown}){inside}", "write each conversation as one line of JSON")
    named = {"\t": "TSV", ",": "CSV"}.get(delimiter, f"a table with {delimiter!r} between its columns")
    if packed:
        raise _error(path, f"{named} ({shown}){inside}", once)
    encoding = "utf-8-sig" if encoding == "utf-8" else encoding
    program = CSV_TO_LINES.format(encoding=encoding, delimiter=delimiter.replace("\t", "\\t"))
    raise _error(path, f"{named} ({shown})", f'make JSON Lines of it with python -c "{program}" {{path}} > {{new}}')


def _error(path: Path, what: str, remedy: str) -> DataError:
    """The remedy's {path}, {new}, {unpacked} and {folder} are names for a shell: the file, what may be made beside."""
    stem = path.name.split(".")[0]
    names = {
        "path": path,
        "new": path.with_name(path.name + ".jsonl"),  # which overwrites nothing of the user's
        "unpacked": path.with_name(path.name + ".unpacked"),
        "folder": path.with_name(stem if stem not in ("", path.name) else path.name + "-unpacked"),
    }
    remedy = re.sub(r"\{(path|new|unpacked|folder)\}", lambda found: shlex.quote(str(names[found[1]])), remedy)
    return DataError(f"{path}:1: it is {what}; {remedy}")


def _is_record(line: str) -> bool:
    """Whether a line is a record of JSON, or looks like one that is damaged."""
    if line.startswith(('{"', "{'")):
        return True
    try:
        return line.startswith(("{", "[")) and bool(json.loads(line))
    except (ValueError, RecursionError):
        return False


def _delimiter(line: str) -> str:
    """What parts the columns, if the line is the header of a table: several short names; "" if it is not."""
    for delimiter in "\t,;|":
        names = [name.strip('"') for name in line.split(delimiter)]
        if len(names) > 1 and any(names) and all(name == name.strip() and len(name) <= 40 for name in names):
            return delimiter
    return ""


def _shorten(line: str) -> str:
    return repr(line if len(line) <= 40 else line[:40] + "...")

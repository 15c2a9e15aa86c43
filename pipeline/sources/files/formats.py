"""Which format a file has: by the ending of its name, else by its first bytes."""

from typing import Literal

Format = Literal["json_lines", "json_array", "csv", "tsv", "parquet", "arrow"]

COMPRESSIONS = (".gz", ".zst")

_JSON = (".json",)
_BY_SUFFIX: dict[str, Format] = {
    ".jsonl": "json_lines",
    ".ndjson": "json_lines",
    ".csv": "csv",
    ".tsv": "tsv",
    ".parquet": "parquet",
    ".arrow": "arrow",
}

SUFFIXES = tuple(
    suffix + packed for suffix in (*_BY_SUFFIX, *_JSON) for packed in ("", *COMPRESSIONS)
)
"""What files of a folder are read; compared in lower case."""

_MAGIC: dict[bytes, Format] = {
    b"PAR1": "parquet",
    b"ARRO": "arrow",
    b"\xff\xff\xff\xff": "arrow",  # a stream: a continuation marker, then a message's length
}


def format_of(name: str, head: bytes) -> Format:
    """The format of a file with this name, whose uncompressed bytes begin with `head`.

    A `.json` file, and one whose name says nothing, is a JSON array if its first byte that is not
    blank is `[`, else JSON lines.
    """
    stem = name.lower()
    for packed in COMPRESSIONS:
        stem = stem.removesuffix(packed)
    for suffix, said in _BY_SUFFIX.items():
        if stem.endswith(suffix):
            return said
    if not stem.endswith(_JSON) and head[:4] in _MAGIC:
        return _MAGIC[head[:4]]
    return "json_array" if head.lstrip().startswith(b"[") else "json_lines"

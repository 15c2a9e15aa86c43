"""Rows of Arrow columns as JSON text, with nothing repaired on the way.

Only the leaves become Python objects, and a dictionary's values are written once and then pointed
to, so that many rows with one long text take no memory before each is put together.
"""

from collections.abc import Iterator
from json.encoder import encode_basestring as quoted

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from pyarrow import types

_TEXTS = (types.is_string, types.is_large_string, types.is_string_view)
_LISTS = (types.is_list, types.is_large_list, types.is_fixed_size_list)
_FLOATS = {"nan": "NaN", "inf": "Infinity", "-inf": "-Infinity"}


class TooMuchError(Exception):
    """Rows that are together longer than the limit."""

    def __init__(self, n_bytes: int) -> None:
        super().__init__(n_bytes)
        self.n_bytes = n_bytes


def json_rows(batch: pa.RecordBatch, limit: int) -> Iterator[bytes | TooMuchError]:
    """Each row as a JSON object, or by how much it is too long.

    A number that is not finite is written as Python's parser knows it (`NaN`), a time in ISO 8601,
    and what JSON has no word for (bytes, durations, unions) as an object that names its type.
    """
    try:
        rows = _texts(batch.to_struct_array(), limit)
    except TooMuchError as error:
        if batch.num_rows == 1:
            yield error
        else:
            half = batch.num_rows // 2
            yield from json_rows(batch.slice(0, half), limit)
            yield from json_rows(batch.slice(half), limit)
    else:
        for row in rows:
            yield row.encode(errors="surrogateescape")


def _texts(array: pa.Array, limit: int) -> list[str]:
    """Each value's JSON text.

    Raises:
        TooMuchError: they are longer than `limit` together.
    """
    kind = array.type
    if types.is_dictionary(kind):
        used = pc.unique(array.indices.drop_null())
        of_values = _texts(array.dictionary.take(used), limit)
        texts = dict(zip(used.to_pylist(), of_values, strict=True))
        return ["null" if i is None else texts[i] for i in array.indices.to_pylist()]
    if isinstance(array, pa.ExtensionArray):
        return _texts(array.storage, limit)
    if types.is_struct(kind):
        return _structs(array, limit)
    if types.is_map(kind):
        entries = pa.StructArray.from_arrays([array.keys, array.items], ["key", "value"])
        array = pa.ListArray.from_arrays(array.offsets, entries, mask=array.is_null())
        return _lists(array, limit)
    if _is_list(kind):
        return _lists(array, limit)
    return _leaves(array, limit)


def _structs(array: pa.StructArray, limit: int) -> list[str]:
    heads = [quoted(field.name) + ":" for field in array.type]
    columns = [_texts(child, limit) for child in array.flatten()]
    _check(sum(_length(column) for column in columns), limit)
    rows = zip(*columns, strict=True) if columns else [()] * len(array)
    texts = [
        "{" + ",".join([head + text for head, text in zip(heads, row, strict=True)]) + "}"
        for row in rows
    ]
    return _with_nulls(array, texts)


def _lists(array: pa.Array, limit: int) -> list[str]:
    flat = _texts(pc.list_flatten(array), limit)
    _check(_length(flat), limit)
    texts, start = [], 0
    for length in pc.list_value_length(array).to_pylist():
        end = start + (length or 0)
        texts.append("[" + ",".join(flat[start:end]) + "]")
        start = end
    return _with_nulls(array, texts)


def _leaves(array: pa.Array, limit: int) -> list[str]:
    kind = array.type
    if _is_text(kind):
        _check(_text_bytes(array), limit)
        try:
            values = array.to_pylist()
        except UnicodeDecodeError:
            raw = array.cast(pa.large_binary()).to_pylist()
            values = [v if v is None else v.decode(errors="surrogateescape") for v in raw]
        return ["null" if v is None else quoted(v) for v in values]
    if types.is_null(kind):
        return ["null"] * len(array)
    if types.is_boolean(kind):
        names = {None: "null", True: "true", False: "false"}
        return [names[v] for v in array.to_pylist()]
    if types.is_integer(kind):
        return ["null" if v is None else str(v) for v in array.to_pylist()]
    if types.is_floating(kind):
        texts = ["null" if v is None else repr(v) for v in array.to_pylist()]
        return [_FLOATS.get(text, text) for text in texts]
    if types.is_decimal(kind):
        return ["null" if v is None else v for v in array.cast(pa.string()).to_pylist()]
    if types.is_timestamp(kind) or types.is_date(kind) or types.is_time(kind):
        if types.is_timestamp(kind) and kind.tz is not None:
            array = array.cast(pa.timestamp(kind.unit, "UTC"))
        values = array.cast(pa.string()).to_pylist()
        return ["null" if v is None else quoted(v.replace(" ", "T", 1)) for v in values]
    unsupported = "{" + quoted("unsupported") + ":" + quoted(str(kind)) + "}"
    return _with_nulls(array, [unsupported] * len(array))


def _text_bytes(array: pa.Array) -> int:
    if not types.is_string_view(array.type):
        return pc.sum(pc.binary_length(array)).as_py() or 0
    if not len(array):
        return 0
    views = np.frombuffer(array.buffers()[1], np.int32).reshape(-1, 4)  # each begins with a length
    return int(views[array.offset : array.offset + len(array), 0].sum(dtype=np.int64))


def _is_text(kind: pa.DataType) -> bool:
    return any(is_it(kind) for is_it in _TEXTS)


def _is_list(kind: pa.DataType) -> bool:
    return any(is_it(kind) for is_it in _LISTS)


def _with_nulls(array: pa.Array, texts: list[str]) -> list[str]:
    if not array.null_count:
        return texts
    return [t if v else "null" for t, v in zip(texts, array.is_valid().to_pylist(), strict=True)]


def _length(texts: list[str]) -> int:
    return sum(map(len, texts))


def _check(n_bytes: int, limit: int) -> None:
    if n_bytes > limit:
        raise TooMuchError(n_bytes)

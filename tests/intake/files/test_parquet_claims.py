"""The footer as we read it is the footer as Arrow reads it; what lies in it is refused."""

import io
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from pipeline.errors import SourceError
from pipeline.sources.files.arrow import parquet_claims


def written(table: pa.Table, **options: Any) -> io.BytesIO:
    out = io.BytesIO()
    pq.write_table(table, out, **options)
    return out


TABLE = pa.table(
    {
        "text": [f"text {i}" for i in range(1000)],
        "turns": [[{"role": "user", "n": i}] * (i % 4) for i in range(1000)],
        "ok": [i % 2 == 0 for i in range(1000)],
    }
)


@pytest.mark.parametrize("options", [{}, {"version": "1.0"}, {"data_page_version": "2.0"}])
def test_the_footer_is_read_as_arrow_reads_it(options: dict[str, Any]) -> None:
    out = written(TABLE, row_group_size=300, **options)
    data = out.getvalue()
    length = int.from_bytes(data[-8:-4], "little")
    footer = parquet_claims._Compact(data[-8 - length : -8]).struct()
    theirs = pq.read_metadata(out)
    assert footer[3] == theirs.num_rows == 1000
    assert [
        [(chunk[3][5], chunk[3][6], chunk[3][7]) for chunk in group[1]] for group in footer[4]
    ] == [
        [
            (c.num_values, c.total_uncompressed_size, c.total_compressed_size)
            for c in (theirs.row_group(i).column(j) for j in range(theirs.num_columns))
        ]
        for i in range(theirs.num_row_groups)
    ]
    assert theirs.num_row_groups == 4
    assert parquet_claims._depth(footer[2]) == 5  # root, turns, list, element, role
    parquet_claims.check_footer(out)


@pytest.mark.parametrize(("deep", "refused"), [(20, False), (40, True)])
def test_columns_deep_in_one_another_are_refused(deep: int, refused: bool) -> None:
    kind = pa.int8()
    for _ in range(deep):
        kind = pa.list_(kind)  # two levels each
    out = written(pa.table({"x": pa.nulls(1, kind)}))
    if refused:
        with pytest.raises(SourceError, match="columns more than 64 deep"):
            parquet_claims.check_footer(out)
    else:
        parquet_claims.check_footer(out)


def test_values_in_lists_count_as_well_as_rows(monkeypatch: pytest.MonkeyPatch) -> None:
    out = written(pa.table({"x": [[None] * 100_000]}))
    parquet_claims.check_footer(out)
    monkeypatch.setattr(parquet_claims, "MANY_VALUES", 1000)
    with pytest.raises(SourceError, match=r"100,000 values in a file of .* are not believed"):
        parquet_claims.check_footer(out)

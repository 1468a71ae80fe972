import csv
import io

from kvbits.bench.counters import _STALL, METRICS, STALLS, counters_of, read_rows


def ncu_table(**values: str) -> str:
    """A page of raw values as Nsight Compute prints it: its own lines first, then units."""
    names = [name for name, _ in METRICS.values()] + [_STALL.format(name) for name in STALLS]
    header = ["ID", "Kernel Name", *names]
    row = ["0", "attend_int8", *(values.get(name, "0") for name in names)]
    text = io.StringIO()
    writer = csv.writer(text, quoting=csv.QUOTE_ALL)
    writer.writerows([header, ["", "", *("unit" for _ in names)], row])
    return "==PROF== Connected to process 7\n" + text.getvalue()


def test_counters_become_fields_of_a_record():
    values = {
        "gpu__time_duration.sum": "76,000",
        "smsp__issue_active.avg.pct_of_peak_sustained_active": "62.5",
        "launch__registers_per_thread": "168",
        _STALL.format("wait"): "0.5",
        _STALL.format("long_scoreboard"): "1.25",
        _STALL.format("barrier"): "0.01",
    }
    (row,) = read_rows(ncu_table(**values))
    assert row["Kernel Name"] == "attend_int8"
    found = counters_of(row)
    assert found["time_us"] == 76.0
    assert found["issue_share"] == 0.625
    assert found["registers"] == 168
    assert list(found["stalls"].items()) == [("long_scoreboard", 1.25), ("wait", 0.5)]


def test_a_page_without_a_table_has_no_kernels():
    assert read_rows("==ERROR== no kernels were profiled\n") == []

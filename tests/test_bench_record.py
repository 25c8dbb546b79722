"""Result files: merging, what identifies a row, and that an old row never takes on a new run's circumstances."""

import json

import pytest

from bench import record

DECODE = {"name": "decode_step_ms", "value": 5.0, "unit": "ms", "model": "m", "batch": 8, "tp": 1}


def save(folder, rows, command="python -m bench.x"):
    return record.save("offline", "NVIDIA H200", command, rows, folder)


def test_a_file_says_where_its_rows_come_from(tmp_path):
    path = save(tmp_path, [DECODE])
    assert path.name == "offline-nvidia-h200.json"
    kept = json.loads(path.read_text())
    assert list(kept) == ["device", "versions", "command", "commit", "date", "rows"]
    assert kept["device"] == "NVIDIA H200" and kept["command"] == "python -m bench.x" and kept["rows"] == [DECODE]
    assert set(kept["versions"]) == {"jax", "jaxlib", "python", "driver"}


def test_a_new_row_replaces_the_old_one_of_the_same_workload(tmp_path):
    save(tmp_path, [DECODE, DECODE | {"batch": 64}])
    path = save(tmp_path, [DECODE | {"value": 4.0, "limit": 3.6, "anchor": 5.14}])
    rows = json.loads(path.read_text())["rows"]
    assert [(row["batch"], row["value"]) for row in rows] == [(64, 5.0), (8, 4.0)]


def test_a_kept_row_keeps_the_command_that_measured_it(tmp_path):
    save(tmp_path, [DECODE], "first")
    save(tmp_path, [DECODE | {"batch": 64}], "second")
    path = save(tmp_path, [DECODE | {"batch": 256}], "third")
    kept = json.loads(path.read_text())
    commands = {row["batch"]: row.get("command", kept["command"]) for row in kept["rows"]}
    assert commands == {8: "first", 64: "second", 256: "third"}


def test_rows_of_one_command_carry_nothing_twice(tmp_path):
    save(tmp_path, [DECODE])
    path = save(tmp_path, [DECODE | {"batch": 64}])
    assert all("command" not in row and "date" not in row for row in json.loads(path.read_text())["rows"])


@pytest.mark.parametrize("text", ["not json", "[]", '{"device": "NVIDIA H200"}'])
def test_a_foreign_file_is_not_overwritten(tmp_path, text):
    path = tmp_path / "offline-nvidia-h200.json"
    path.write_text(text)
    with pytest.raises(ValueError, match="is not a result file of this bench"):
        save(tmp_path, [DECODE])
    assert path.read_text() == text


def test_committed_results_are_whole():
    """Every file in bench/results parses, names its device and versions, and measures no workload twice."""
    for path in record.RESULTS.glob("*.json"):
        kept = json.loads(path.read_text())
        assert {"device", "versions", "command", "commit", "date", "rows"} <= set(kept), path.name
        assert path.stem.endswith(record.slug(kept["device"])), path.name
        assert all({"name", "value", "unit"} <= set(row) for row in kept["rows"]), path.name
        workloads = [json.dumps(record._workload(row)) for row in kept["rows"]]
        assert len(workloads) == len(set(workloads)), path.name


def test_the_commit_can_be_told_where_there_is_no_git(monkeypatch):
    monkeypatch.setenv("BENCH_COMMIT", "0123456789ab")
    assert record.commit() == "0123456789ab"

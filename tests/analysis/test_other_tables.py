"""Tables that other tools and other hands write: which rows are used, and what is said about it."""

import bz2
import gzip
import json
import lzma

import numpy as np
import pandas as pd
import pyarrow as pa
import pytest

from analysis import RunTable, fit, load
from analysis.cli import main
from analysis.notes import has
from harness.errors import UserError
from tests.analysis.generate import grid_frame


def _cells():
    frame = grid_frame(2 ** np.arange(10, 17), 2 ** np.arange(3, 7), 0.004)
    return frame.rename(columns={"n_latents": "n", "fvu": "loss"})[["n", "k", "loss"]]


ROWS = len(_cells())
TRUTH = _cells()["loss"].to_numpy()


def _used(table):
    """The losses that a fit of the table would use."""
    return fit(table, starts=2, ci="wald", weights="none")


# -- a column's mere name ----------------------------------------------------------------------------------------------

NAMES = {
    "status of MLflow": {"status": "FINISHED"},
    "status of Slurm": {"status": ["COMPLETED", "TIMEOUT"] * (ROWS // 2)},
    "status of a person": {"status": [f"see page {i}" for i in range(ROWS)]},
    "seeds called run": {"run": [0, 1] * (ROWS // 2)},
    "tokens that are not recorded": {"tokens": np.nan},
    "no experts": {"experts": 0},
    "FLOPs in words": {"flops": "many"},
    "converged in words": {"converged": ["yes", "no"] * (ROWS // 2)},
    "names of SAEs": {"sae": [f"release-{i}" for i in range(ROWS)]},
    "x, unused": {"x": -1.0},
    "dead in words": {"dead": "few"},
}


@pytest.mark.parametrize("name", NAMES)
def test_a_mere_name_excludes_no_run(name):
    result = _used(load(_cells().assign(**NAMES[name])))
    assert result.points == ROWS and not result.excluded
    np.testing.assert_array_equal(np.sort(result.y), np.sort(TRUTH))


def test_our_own_words_count_without_being_named():
    table = load(_cells().assign(status=["done"] * (ROWS - 1) + ["diverged"]))
    assert len(table) == ROWS - 1 and table.left_out()[0]["reason"] == "status diverged"


def test_a_name_that_the_law_needs_excludes_with_a_reason():
    frame = _cells().astype({"n": object})
    frame.loc[3, "n"] = "16k"
    result = _used(load(frame))
    assert result.excluded == [{"run": "row 4", "reason": "n is '16k', not a positive number"}]


@pytest.mark.parametrize(
    ("word", "done"),
    [
        *((word, True) for word in ("done", "FINISHED", "finished", "COMPLETED", "CD", "Success", "True", "1", "yes")),
        *((word, False) for word in ("FAILED", "CANCELLED by 1000", "CANCELLED+", "OUT_OF_ME+", "crashed", "KILLED")),
        *(
            (word, False)
            for word in ("NODE_FAIL", "TIMEOUT", "preempted", "running", "False", "no", "RunStatus.FAILED")
        ),
    ],
)
def test_words_for_done(word, done):
    table = RunTable(_cells().assign(state=word), {"n": "n", "k": "k", "loss": "loss", "status": "state"})
    assert len(table) == (ROWS if done else 0) and not has(table.notes, "unknown_words")


def test_unknown_words_are_named():
    table = RunTable(_cells().assign(state="splendid"), {"n": "n", "k": "k", "loss": "loss", "status": "state"})
    assert "'splendid'" in next(entry.message for entry in table.notes if entry.code == "unknown_words")


@pytest.mark.parametrize("no", ["no", "False", "false", "0", 0, False, "N"])
@pytest.mark.parametrize("yes", ["yes", "True", "true", "1", 1, True, "Y"])
def test_words_for_converged(yes, no):
    frame = _cells().assign(flag=pd.Series([yes] * (ROWS - 4) + [no] * 4, dtype=object))
    table = load(frame, {"converged": "flag"})
    assert table.column("converged").tolist() == [True] * (ROWS - 4) + [False] * 4
    assert _used(table).points == ROWS - 4


# -- repeated names ----------------------------------------------------------------------------------------------------


def _checkpoints(step="step"):
    """Three checkpoints of every run in a mixed order, the last of each with the losses of `_cells`."""
    cells = _cells().assign(name=[f"r{i}" for i in range(ROWS)])
    parts = [cells.assign(**{step: at, "loss": cells["loss"] * factor}) for at, factor in ((1, 3), (4, 1), (2, 2))]
    return pd.concat(parts)


@pytest.mark.parametrize("step", ["step", "_step", "trainer/global_step", "tokens", "Iteration", "epoch"])
@pytest.mark.parametrize("role", ["named", "guessed"])
def test_the_last_checkpoint_of_each_run_is_fitted(step, role):
    frame = _checkpoints(step)
    frame = frame if role == "named" else frame.rename(columns={"name": "run"})
    table = load(frame, {"run": "name"} if role == "named" else None)
    result = _used(table)
    np.testing.assert_array_equal(np.sort(result.y), np.sort(TRUTH))
    assert f"the last of each by {step} was used" in str(
        next(e for e in result.notes if e.code == "earlier_checkpoints")
    )


def test_a_run_whose_last_checkpoint_is_lost_is_left_out():
    frame = _checkpoints()
    frame.loc[(frame["name"] == "r5") & (frame["step"] == 4), "loss"] = np.nan
    table = load(frame, {"run": "name"}).use("loss")
    assert len(table) == ROWS - 1 and "r5" not in set(table.column("run"))


@pytest.mark.parametrize(
    ("edit", "says"),
    [
        (lambda f: f.drop(columns="step"), "appears 3 times with different values"),
        (lambda f: f.assign(step=7), "appears 3 times with different values"),
        (lambda f: f.assign(n=f["n"] * f["step"]), "appears with n"),
    ],
)
def test_names_that_are_no_names_are_refused(edit, says):
    with pytest.raises(UserError, match=says):
        load(edit(_checkpoints()), {"run": "name"})


def test_a_run_that_was_tried_again_counts_once():
    cells = _cells().assign(name=[f"r{i}" for i in range(ROWS)], status="done")
    failed = cells[:2].assign(status="failed", loss=np.nan)
    table = load(pd.concat([failed, cells]), {"run": "name"})
    assert len(table) == ROWS


def test_tables_without_names_are_stacked_whole():
    first, second = _cells()[:10], _cells()[10:]
    assert len(load([first, second])) == ROWS


# -- text --------------------------------------------------------------------------------------------------------------


def _csv(frame=None, **options):
    return (_cells() if frame is None else frame).to_csv(index=False, **options)


def _with_names(pattern):
    return _csv(_cells().assign(name=[pattern.format(i) for i in range(ROWS)])[["name", "n", "k", "loss"]])


TEXTS = {
    "number sign in names": _with_names("topk-{} (retry #2)"),
    "quoted names that begin with it": _with_names('"#{}"').replace('"""', '"').replace('""', ""),
    "number sign over lines": _csv(_cells().assign(note="see\n# 3")),
    "comments before, between, after": "# a\n# b, c\n" + _csv().replace("\n", "\n# in between\n", 3) + "  # end\n",
    "commented header": "# " + _csv(),
    "second comment is the header": "# measured on Monday\n#" + _csv(),
    "byte-order mark": "\ufeff" + _csv(),
    "byte-order mark and commented header": "\ufeff# " + _csv(),
    "old line ends": _csv().replace("\n", "\r"),
    "Windows line ends": _csv().replace("\n", "\r\n"),
    "blanks after commas": _csv().replace(",", ", "),
    "a comma at the end of rows": _csv().replace("\n", ",\n").replace(",\n", "\n", 1),
    "blank lines first": "\n\n" + _csv(),
}


@pytest.mark.parametrize("name", TEXTS)
def test_text(name, tmp_path):
    path = tmp_path / "t.csv"
    path.write_bytes(TEXTS[name].encode("utf-8"))
    np.testing.assert_array_equal(load(path).values("loss"), TRUTH)


@pytest.mark.parametrize("suffix", [".csv", ".txt"])
def test_what_numpy_writes(tmp_path, suffix):
    cells = _cells()
    options = {"delimiter": ","} if suffix == ".csv" else {}
    header = ("," if options else " ").join(cells.columns)
    np.savetxt(tmp_path / f"t{suffix}", cells.to_numpy(), header=header, **options)
    np.testing.assert_array_equal(load(tmp_path / f"t{suffix}").values("loss"), TRUTH)


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("n,k,loss,loss\n1,2,3,4\n", "'loss' appears twice with different values"),
        ("n,k,loss\n0,1,2,3\n1,2,2,3\n", "more fields than its header"),
    ],
)
def test_headers_that_do_not_fit(tmp_path, text, says):
    (tmp_path / "t.csv").write_text(text)
    with pytest.raises(UserError, match=says):
        load(tmp_path / "t.csv")


def test_a_column_twice_with_equal_values_is_one(tmp_path):
    frame = _cells()
    (tmp_path / "t.csv").write_text(_csv(pd.concat([frame, frame["loss"]], axis=1)))
    np.testing.assert_array_equal(load(tmp_path / "t.csv").values("loss"), TRUTH)


def test_numbers_without_end(tmp_path, capsys):
    lines = _csv().splitlines()
    lines[3] = f"{'9' * 5000},8,0.5"
    lines[5] = f"1024,8,{'9' * 5000}"
    (tmp_path / "t.csv").write_text("\n".join(lines) + "\n")
    assert main(["fit", str(tmp_path / "t.csv"), "--starts", "2", "--ci", "wald"]) == 0
    assert "left out: 2 run(s)" in capsys.readouterr().out
    table = load(_cells().astype({"n": object}).assign(n=lambda f: [10**5000, *f["n"][1:]]))
    assert len(table.use("n")) == ROWS - 1


# -- compressed files, other formats, other libraries ------------------------------------------------------------------


def _zstd_frame(data):
    sink = pa.BufferOutputStream()
    with pa.CompressedOutputStream(sink, "zstd") as stream:
        stream.write(data)
    return sink.getvalue().to_pybytes()


PACKERS = {".gz": gzip.compress, ".bz2": bz2.compress, ".xz": lzma.compress, ".zst": _zstd_frame, "": bytes}


def _parquet():
    sink = pa.BufferOutputStream()
    _cells().to_parquet(sink)
    return sink.getvalue().to_pybytes()


FORMATS = {
    ".csv": lambda: _csv().encode(),
    ".tsv": lambda: _csv(sep="\t").encode(),
    ".parquet": _parquet,
    ".json": lambda: json.dumps(_cells().to_dict("records")).encode(),
    ".jsonl": lambda: "".join(json.dumps(row) + "\n" for row in _cells().to_dict("records")).encode(),
}


@pytest.mark.parametrize("packer", PACKERS)
@pytest.mark.parametrize("kind", FORMATS)
def test_compressed(tmp_path, kind, packer):
    path = tmp_path / f"runs.v2{kind}{packer}"
    path.write_bytes(PACKERS[packer](FORMATS[kind]()))
    np.testing.assert_array_equal(load(path).values("loss"), TRUTH)


@pytest.mark.parametrize("packer", [".gz", ".bz2", ".xz", ".zst"])
def test_damaged_archives_are_one_line(tmp_path, packer, capsys):
    whole = PACKERS[packer](_csv().encode())
    for content in (whole[: len(whole) // 2], b"no archive at all", b""):
        (tmp_path / f"t.csv{packer}").write_bytes(content)
        assert main(["fit", str(tmp_path / f"t.csv{packer}")]) == 2
        assert len(capsys.readouterr().err.splitlines()) == 1


class _Arrow:
    """What polars and duckdb offer."""

    def __arrow_c_stream__(self, requested_schema=None):
        return pa.Table.from_pandas(_cells(), preserve_index=False).__arrow_c_stream__(requested_schema)


class _Pandas:
    def to_pandas(self):
        return _cells()


def _records():
    return _cells().to_records(index=False)


SOURCES = {
    "arrow table": lambda: pa.Table.from_pandas(_cells(), preserve_index=False),
    "arrow stream": _Arrow,
    "to_pandas": _Pandas,
    "numpy records": _records,
    "numpy, other byte order": lambda: np.asarray(_records()).astype(_records().dtype.newbyteorder(">")),
    "dict of columns": lambda: _cells().to_dict("list"),
    "dict of arrays": lambda: {name: _cells()[name].to_numpy() for name in _cells()},
    "list of rows": lambda: _cells().to_dict("records"),
    "index of two levels": lambda: _cells().set_index(["n", "k"]),
    "series": lambda: _cells().set_index(["n", "k"])["loss"],
    "categories": lambda: _cells().astype({"n": "category", "k": "category"}),
    "nullable": lambda: _cells().convert_dtypes(),
    "generator of frames": lambda: (part for part in (_cells()[:5], _cells()[5:])),
    "table of runs": lambda: load(_cells()),
}


@pytest.mark.parametrize("name", SOURCES)
def test_tables_of_other_libraries(name):
    table = load(SOURCES[name]())
    np.testing.assert_array_equal(table.use("n", "k", "loss").values("loss"), TRUTH)
    assert _used(table).points == ROWS


@pytest.mark.parametrize("source", [None, 3, [], (), np.zeros((3, 3)), [1, 2], b"t.csv", open, [None]])
def test_what_is_no_table_is_refused_in_a_line(source):
    with pytest.raises(UserError) as refused:
        load(source)
    assert "\n" not in str(refused.value)


def test_columns_of_two_levels_have_plain_names():
    frame = _cells().groupby(["n", "k"]).agg({"loss": ["mean", "count"]})
    table = load(frame, {"loss": "loss.mean"})
    assert len(table) == ROWS and "loss.count" in table.frame

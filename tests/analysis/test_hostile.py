"""Hostile tables through the command line: a clear note or a one-line error each, never a traceback."""

import time
import tracemalloc

import numpy as np
import pandas as pd
import pytest

from analysis import RunTable, fit
from analysis.cli import main
from tests.analysis.generate import grid_frame

ROLE_OPTIONS = ["--n", "n", "--k", "k", "--loss", "loss"]


def _good():
    frame = grid_frame(2 ** np.arange(11, 20), 2 ** np.arange(5, 10), 0.005)
    return frame.rename(columns={"n_latents": "n", "fvu": "loss"})[["n", "k", "loss"]]


def _set(row, column, value):
    def edit(frame):
        frame = frame.astype({column: object})
        frame.loc[row, column] = value
        return frame

    return edit


def _text(text):
    return lambda path: path.write_text(text, encoding="utf-8")


def _bytes(data):
    return lambda path: path.write_bytes(data)


def _csv(edit=lambda frame: frame, **options):
    return lambda path: edit(_good()).to_csv(path, **{"index": False, **options})


# name: (writer, extra options, exit code, text in what is printed)
CASES = {
    "clean": (_csv(), [], 0, "status: ok"),
    "duplicated rows": (_csv(lambda f: pd.concat([f, f.iloc[:5]])), [], 0, "duplicate_run"),
    "string among numbers": (_csv(_set(3, "loss", "crashed")), [], 0, "loss is 'crashed', not a finite number"),
    "string among sizes": (_csv(_set(3, "n", "16k")), [], 0, "n is '16k', not a positive number"),
    "all strings": (_csv(lambda f: f.assign(loss="high")), [], 1, "0 usable run(s)"),
    "units in the header": (_csv(lambda f: f.rename(columns={"n": "n [latents]"})), [], 2, "no column 'n'"),
    "units named": (
        _csv(lambda f: f.rename(columns={"n": "n [latents]"})),
        ["--n", "n [latents]"],
        0,
        "status: ok",
    ),
    "zero loss": (_csv(_set(3, "loss", 0.0)), [], 0, "nonpositive_loss"),
    "negative loss": (_csv(_set(3, "loss", -0.2)), [], 0, "nonpositive_loss"),
    "zero n": (_csv(_set(3, "n", 0)), [], 0, "not a positive number"),
    "negative k": (_csv(_set(3, "k", -8)), [], 0, "not a positive number"),
    "NaN loss": (_csv(_set(3, "loss", np.nan)), [], 0, "nonfinite_loss"),
    "inf loss": (_csv(_set(3, "loss", "inf")), [], 0, "nonfinite_loss"),
    "minus inf loss": (_csv(_set(3, "loss", "-inf")), [], 0, "nonfinite_loss"),
    "NaN everywhere": (_csv(lambda f: f.assign(loss=np.nan)), [], 1, "too_few_points"),
    "one k only": (_csv(lambda f: f[f["k"] == 32]), [], 1, "needs at least 2 values of k, found 1"),
    "two n only": (_csv(lambda f: f[f["n"] <= 4096]), [], 1, "needs at least 3 values of n, found 2"),
    "one row": (_csv(lambda f: f.iloc[:1]), [], 1, "too_few_points"),
    "as many rows as parameters": (_csv(lambda f: f.iloc[[0, 9, 18, 22, 27, 38]]), [], 1, "too_few_points"),
    "missing column": (_csv(lambda f: f.drop(columns="k")), [], 2, "no column 'k'"),
    "wrong delimiter": (_csv(sep=";"), [], 2, "columns must be separated by commas"),
    "tab as delimiter": (_csv(sep="\t"), [], 2, "columns must be separated by commas"),
    "empty file": (_text(""), [], 2, "is empty"),
    "blank lines only": (_text("\n\n\n"), [], 2, "is empty"),
    "header only": (_text("n,k,loss\n"), [], 2, "has a header but no rows"),
    "ragged rows": (_text("n,k,loss\n1,2,3\n1,2,3,4,5\n"), [], 2, "cannot be read as a table"),
    "binary": (_bytes(bytes(range(256)) * 8), [], 2, "table.csv"),
    "UTF-16": (_bytes("n,k,loss\n1,2,3\n".encode("utf-16")), [], 2, "UTF-8"),
    "column named twice": (_csv(lambda f: f.rename(columns={"k": "n"})), [], 2, "no column 'k'"),
    "three hook points": (
        _csv(lambda f: f.assign(hook=[("resid_post", "mlp_out", "attn_out")[i % 3] for i in range(len(f))])),
        [],
        0,
        "mixed_population",
    ),
    "spaces around names": (_csv(lambda f: f.rename(columns={"n": " n ", "loss": " loss"})), [], 0, "status: ok"),
    "thousands separators": (
        _csv(lambda f: f.assign(n=[f"{v:,}" for v in f["n"]])),
        [],
        1,
        "0 usable run(s)",
    ),
    "booleans for losses": (_csv(lambda f: f.assign(loss=True)), [], 1, "0 usable run(s)"),
    "constant loss": (_csv(lambda f: f.assign(loss=0.2)), [], 0, "sae_nk"),
    "loss that grows with n": (_csv(lambda f: f.assign(loss=0.1 * f["n"] ** 0.2)), [], 0, "sae_nk"),
    "huge values": (_csv(lambda f: f.assign(loss=f["loss"] * 1e200)), [], 0, "status: ok"),
    "tiny values": (_csv(lambda f: f.assign(loss=f["loss"] * 1e-200)), [], 0, "status: ok"),
    "comment line": (_text("# from a colleague\n" + _good().to_csv(index=False)), [], 0, "status: ok"),
    "parquet in disguise": (lambda path: _good().to_parquet(path), [], 2, "table.csv"),
}


def test_there_are_enough_cases():
    assert len(CASES) >= 30


@pytest.mark.filterwarnings("error")
@pytest.mark.parametrize("name", CASES)
def test_hostile_table(name, tmp_path, capsys):
    write, options, code, text = CASES[name]
    path = tmp_path / "table.csv"
    write(path)
    got = main(["fit", str(path), *ROLE_OPTIONS, *options, "--starts", "16", "--out", str(tmp_path / "fit.json")])
    out, err = capsys.readouterr()
    assert got == code, out + err
    assert text in out + err and "Traceback" not in err
    if code == 2:
        assert len(err.strip().splitlines()) == 1 and not (tmp_path / "fit.json").exists()


def test_damaged_parquet_and_unknown_suffix(tmp_path, capsys):
    (tmp_path / "t.parquet").write_bytes(b"PAR1 nothing")
    (tmp_path / "t.xlsx").write_bytes(b"PK")
    for name, text in (("t.parquet", "cannot be read"), ("t.xlsx", "unknown kind of table")):
        assert main(["fit", str(tmp_path / name), *ROLE_OPTIONS]) == 2
        assert text in capsys.readouterr().err


@pytest.mark.slow
def test_a_million_rows():
    rng = np.random.default_rng(0)
    size = 1_000_000
    n, k = rng.choice(2.0 ** np.arange(11, 20), size), rng.choice(2.0 ** np.arange(5, 10), size)
    y = (np.exp(0.5 - 0.2 * np.log(n)) + np.exp(-1.5 - 0.1 * np.log(k))) * np.exp(0.01 * rng.standard_normal(size))
    frame = pd.DataFrame({"n": n, "k": k, "loss": y})
    tracemalloc.start()
    before = time.perf_counter()
    result = fit(RunTable(frame, {"n": "n", "k": "k", "loss": "loss"}))
    seconds, peak = time.perf_counter() - before, tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    print(f"10^6 rows: {seconds:.1f} s, {peak / 1e9:.2f} GB, beta_n {result.values['beta_n']:.4f}")
    assert result.values["zeta"] == pytest.approx(-1.5, abs=0.02) and peak < 1e9

"""The notebooks run from top to bottom on a real sweep that was recorded."""

from pathlib import Path

import pytest

from tests.gallery.made_up import write_examples

ROOT = Path(__file__).resolve().parents[2]
SWEEP = Path(__file__).parent / "data" / "recorded_quick"
NOTEBOOKS = sorted((ROOT / "analysis" / "notebooks").glob("*.ipynb"))


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_notebook_runs(path, monkeypatch, tmp_path):
    import nbformat
    from nbclient import NotebookClient

    monkeypatch.setenv("SWEEP", str(tmp_path if path.stem == "04_look_at_features" else SWEEP))
    write_examples(tmp_path / "topk", 64, [" the", " a"])
    notebook = nbformat.read(path, as_version=4)
    NotebookClient(
        notebook, timeout=300, startup_timeout=300, resources={"metadata": {"path": str(path.parent)}}
    ).execute()
    outputs = [output for cell in notebook.cells if cell.cell_type == "code" for output in cell.outputs]
    assert any("image/svg+xml" in output.get("data", {}) for output in outputs)
    assert not any(output.output_type == "stream" and output.name == "stderr" for output in outputs)

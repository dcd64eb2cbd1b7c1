"""The notebooks run from top to bottom, on CPU, with a model that has hardly been trained."""

from pathlib import Path

import nbformat
import pytest
from nbclient import NotebookClient

NOTEBOOKS = sorted((Path(__file__).parent.parent / "notebooks").glob("*.ipynb"))
SHOWN = {
    "pacore": ("usage of all calls", "PaCoRe [8, 4]"),
    "post_training": ("mean of 8", "rewards of the answers shown", "PaCoRe [8], SFT and RL"),
}


def text_of(notebook) -> str:
    outputs = [output for cell in notebook.cells if cell.cell_type == "code" for output in cell.outputs]
    return "".join(output.get("text", "") for output in outputs)


@pytest.fixture(scope="module")
def directory(tmp_path_factory):
    """Both notebooks begin with the same model; the second one finds it trained."""
    return tmp_path_factory.mktemp("notebooks")


@pytest.mark.slow  # CI runs it by name
@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_a_notebook_runs_from_top_to_bottom(path, directory, monkeypatch):
    monkeypatch.setenv("STEPJAX_NOTEBOOK_TOKENS", "12000")
    monkeypatch.setenv("STEPJAX_NOTEBOOK_PROBLEMS", "3")
    monkeypatch.setenv("STEPJAX_NOTEBOOK_OUT", str(directory))
    monkeypatch.setenv("JAX_PLATFORMS", "cpu")
    monkeypatch.setenv("JAX_DISABLE_MOST_OPTIMIZATIONS", "1")  # code is made once and hardly used
    # Its commands compile what it has compiled itself.
    monkeypatch.setenv("JAX_COMPILATION_CACHE_DIR", str(directory / "cache"))
    monkeypatch.setenv("JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS", "0")
    monkeypatch.setenv("JAX_PERSISTENT_CACHE_MIN_ENTRY_SIZE_BYTES", "0")
    notebook = nbformat.read(path, as_version=4)
    NotebookClient(
        notebook, timeout=600, kernel_name="python3", resources={"metadata": {"path": str(path.parent)}}
    ).execute()
    shown = text_of(notebook)
    assert [text for text in SHOWN[path.stem] if text not in shown] == []

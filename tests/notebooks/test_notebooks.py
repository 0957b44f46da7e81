"""Every notebook: clean in the repository, and run from the first cell to the last as a reader would see it."""

import os
import re
import shutil
from pathlib import Path

import nbclient
import nbformat
import pytest

PROJECT = Path(__file__).parents[2]
README = (PROJECT / "README.md").read_text()
NOTEBOOKS = sorted((PROJECT / "notebooks").glob("**/*.ipynb"))

# absolute paths of somebody's machine
MACHINE_PATH = re.compile(r"(?<![\w.])/(?:home|root|Users|tmp|mnt|opt|private)/|[A-Z]:\\\\")


def read(path: Path) -> nbformat.NotebookNode:
    return nbformat.read(path, as_version=nbformat.NO_CONVERT)


def test_there_are_notebooks():
    names = {path.stem for path in NOTEBOOKS}
    assert names >= {"quickstart", "attention_maps", "convert_your_model", "detection", "add_your_own"}


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
class TestAsItLies:
    """In the repository a notebook holds what was written, and nothing of a run."""

    def test_is_valid_and_stripped(self, path):
        notebook = read(path)
        nbformat.validate(notebook)
        assert (notebook.nbformat, notebook.nbformat_minor) >= (4, 5)
        assert set(notebook.metadata) == {"kernelspec", "language_info"}
        assert notebook.metadata.kernelspec.name == "python3"
        assert notebook.metadata.language_info == {"name": "python"}
        for cell in notebook.cells:
            assert not cell.metadata, cell.source
            assert cell.source.strip()
            if cell.cell_type == "code":
                assert cell.outputs == [], cell.source
                assert cell.execution_count is None, cell.source

    def test_begins_with_a_title_and_names_no_machine(self, path):
        cells = read(path).cells
        assert cells[0].cell_type == "markdown"
        assert cells[0].source.startswith("# ")
        assert not MACHINE_PATH.search(path.read_text())

    def test_what_it_names_is_there(self, path):
        text = "\n".join(cell.source for cell in read(path).cells)
        for name in re.findall(r"configs/[\w/*]+\.yaml", text):
            assert list(PROJECT.glob(name)), name
        for name in re.findall(r"\b\w+\.ipynb", text):
            assert path.with_name(name).is_file(), name
        for target in re.findall(r"`make ([\w-]+)`", text):
            assert re.search(rf"^{target}:", (PROJECT / "Makefile").read_text(), re.MULTILINE), target
        # measured figures that a notebook quotes are the README's
        for value in re.findall(r"AP(?:50)? (0\.\d+)", text):
            assert value in README, value


@pytest.mark.slow
@pytest.mark.timeout(1200)
@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_runs_from_the_first_cell_to_the_last(path, tmp_path, monkeypatch):
    # as in the repository: a notebook finds the command line and the configs in the folder above its own
    folder = tmp_path / "repository"
    (folder / "notebooks").mkdir(parents=True)
    shutil.copy(PROJECT / "lightning_cli.py", folder)
    shutil.copytree(PROJECT / "configs", folder / "configs")
    before = files_of(folder)
    temporary = tmp_path / "temporary"
    temporary.mkdir()
    monkeypatch.setenv("TMPDIR", str(temporary))
    # the very package that is tested
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join([str(PROJECT / "src"), os.environ.get("PYTHONPATH", "")]))

    notebook = read(path)
    client = nbclient.NotebookClient(
        notebook, timeout=900, kernel_name="python3", resources={"metadata": {"path": str(folder / "notebooks")}}
    )
    client.execute()  # raises CellExecutionError, with the traceback of the cell

    code = [cell for cell in notebook.cells if cell.cell_type == "code"]
    assert [cell.execution_count for cell in code] == list(range(1, len(code) + 1)), "a cell was not run"
    outputs = [output for cell in code for output in cell.outputs]
    figures = [output for output in outputs if "image/png" in output.get("data", {})]
    assert figures, "no figure was drawn"
    shown = "\n".join(output.text for output in outputs if output.output_type == "stream")
    assert not [output.text for output in outputs if output.get("name") == "stderr"]
    assert not re.search(r"Warning\b|\bGPU available|Seed set to|\x1b\[|\r", shown), shown
    # a figure as its repr is one that was not shown
    for output in outputs:
        text = output.get("data", {}).get("text/plain", "")
        assert "Figure" not in text or "image/png" in output.data, text

    assert files_of(folder) == before, "something was left in the repository"
    assert not any(temporary.rglob("*.ckpt")), "a run was left among the temporary files"


def files_of(folder: Path) -> set[Path]:
    """All files but what Python compiles."""
    return {path for path in folder.rglob("*") if path.is_file() and "__pycache__" not in path.parts}

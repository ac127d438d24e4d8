"""Execute a notebook in place: ``python tutorials/run.py NOTEBOOK``.

The kernel is the interpreter that runs this file, whatever kernels are installed. The notebook
runs in an empty folder that is thrown away, so it may write files. What would differ between two
machines is taken out of the result: execution times, versions, and this machine's folders.
"""

import argparse
import re
import sys
import sysconfig
import tempfile
from pathlib import Path

import nbformat
from ipykernel.kernelspec import get_kernel_dict
from jupyter_client import AsyncKernelManager
from jupyter_client.kernelspec import KernelSpec, KernelSpecManager
from nbclient import NotebookClient
from nbclient.exceptions import CellExecutionError

KERNEL = {"name": "python3", "display_name": "Python 3", "language": "python"}
SECONDS_A_CELL = 600
# tqdm warns where ipywidgets is missing, once for every reader and with this machine's folders
QUIET = {"PYTHONWARNINGS": "ignore:IProgress not found"}


class CurrentInterpreter(KernelSpecManager):
    """Finds one kernel, whatever its name: the interpreter that runs this file."""

    def get_kernel_spec(self, kernel_name: str) -> KernelSpec:
        """The kernel of this interpreter."""
        spec = get_kernel_dict()
        # errors only: every kernel warns that its connection on this machine is not encrypted
        spec["argv"] = [*spec["argv"], "--log-level=40"]
        return KernelSpec(**{**spec, "env": {**spec.get("env", {}), **QUIET}})


def execute(notebook: nbformat.NotebookNode, folder: str) -> None:
    """Run all cells in a new kernel, with ``folder`` as its working folder."""
    manager = AsyncKernelManager(kernel_spec_manager=CurrentInterpreter())
    client = NotebookClient(
        notebook,
        km=manager,
        timeout=SECONDS_A_CELL,
        record_timing=False,
        coalesce_streams=True,  # one block of text a cell, however it was flushed
        resources={"metadata": {"path": folder}},
    )
    client.execute()


def clean(notebook: nbformat.NotebookNode, folder: str) -> None:
    """Take out what says when and where the notebook ran."""
    notebook.metadata = {"kernelspec": KERNEL, "language_info": {"name": "python"}}
    for place, cell in enumerate(notebook.cells):
        cell.id = f"cell-{place}"  # nbformat draws ids at random
        cell.metadata.pop("execution", None)
        for output in cell.get("outputs", []):
            for holder, key in _texts(output):
                holder[key] = without_folders(holder[key], folder)


def _texts(output: nbformat.NotebookNode) -> list[tuple[dict, str]]:
    """Where an output holds text: pairs of a dict and a key."""
    if output.output_type == "stream":
        return [(output, "text")]
    data = output.get("data", {})
    return [(data, kind) for kind in data if kind.startswith("text/")]


def without_folders(text: str, folder: str) -> str:
    """The text with this machine's folders replaced by what they are."""
    root = Path(__file__).resolve().parents[1]
    known = {
        "notebook's folder": [folder, str(Path(folder).resolve())],
        "site-packages": [sysconfig.get_path("purelib")],
        "repository": [str(root)],
        "python": [sys.prefix, sys.base_prefix],
        "home": [str(Path.home())],
    }
    for name, paths in known.items():
        for path in filter(lambda path: len(path) > 1, paths):  # a home may be "/"
            # whole folder names only: a home of /root must not change /roots
            text = re.sub(rf"{re.escape(path)}(?=[/\\]|\b)", f"<{name}>", text)
    # a kernel names the file of a cell after its process
    return re.sub(r"\S*ipykernel_\d+[/\\]\d+\.py", "<cell>", text)


def main() -> int:
    """Execute the notebook of the command line and save it; returns the exit status."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("notebook", type=Path)
    path = parser.parse_args().notebook
    notebook = nbformat.read(path, as_version=4)
    with tempfile.TemporaryDirectory() as folder:
        try:
            execute(notebook, folder)
        except CellExecutionError as error:
            # the file keeps its last good outputs
            print(f"{path} failed:\n{error}", file=sys.stderr)
            return 1
        clean(notebook, folder)
    nbformat.validate(notebook)
    nbformat.write(notebook, path)
    return 0


if __name__ == "__main__":
    sys.exit(main())

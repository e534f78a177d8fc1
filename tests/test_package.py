"""The house: imports run one way, the package stays light, and an install leaves one name behind."""

import ast
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
MAY_IMPORT = {
    "masks": ("anchor_attn.masks",),
    "anchor_attn": ("anchor_attn.",),
    "train": ("anchor_attn.",),
}
MAY_NOT_IMPORT = {
    "masks": (),
    "anchor_attn": ("anchor_attn.train", "anchor_attn.cli"),
    "train": ("anchor_attn.cli",),
}


def imported_modules(path):
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: relative import"
            yield node.module
            yield from (f"{node.module}.{alias.name}" for alias in node.names)


@pytest.mark.parametrize("room", MAY_IMPORT)
def test_imports_run_one_way(room):
    files = [path for path in (ROOT / room).rglob("*.py") if path.parent.name != "cli"]  # the roof sees all rooms
    assert files
    for path in files:
        for name in imported_modules(path):
            if name.startswith("anchor_attn."):
                assert name.startswith(MAY_IMPORT[room]), f"{path} imports {name}"
                assert not name.startswith(MAY_NOT_IMPORT[room] or ("-",)), f"{path} imports {name}"


def test_masks_import_torch_and_the_standard_library_only():
    for path in (ROOT / "masks").rglob("*.py"):
        tops = {name.split(".")[0] for name in imported_modules(path)}
        assert tops <= {"torch", "anchor_attn", "matplotlib", *sys.stdlib_module_names}, path


@pytest.mark.parametrize("module", ["anchor_attn", "anchor_attn.masks", "anchor_attn.train", "anchor_attn.cli"])
def test_importing_stays_light(module):
    heavy = "[m for m in ('transformers', 'datasets', 'matplotlib', 'scipy', 'accelerate') if m in sys.modules]"
    ended = subprocess.run(
        [sys.executable, "-c", f"import sys, {module}; print({heavy})"], capture_output=True, text=True, check=True
    )
    assert ended.stdout.strip() == "[]"


def test_every_folder_of_modules_is_installed():
    installed = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["setuptools"]["packages"]
    folders = [path.parent.relative_to(ROOT) for room in MAY_IMPORT for path in (ROOT / room).rglob("__init__.py")]
    names = [".".join(folder.parts) for folder in folders]
    assert sorted(installed) == sorted(n if n.startswith("anchor_attn") else f"anchor_attn.{n}" for n in names)


@pytest.mark.slow
def test_an_install_leaves_one_package_and_the_marker_of_its_types(tmp_path):
    subprocess.run(
        [sys.executable, "-m", "pip", "wheel", "-q", "--no-deps", "--no-build-isolation", "-w", tmp_path, ROOT],
        check=True,
    )
    import zipfile

    (wheel,) = tmp_path.glob("anchor_attn-*.whl")
    names = zipfile.ZipFile(wheel).namelist()
    assert {name.split("/")[0].split("-")[0] for name in names} == {"anchor_attn"}
    assert "anchor_attn/py.typed" in names
    for source in ("masks/layout.py", "train/packing.py", "cli/main.py", "engines/varlen.py"):
        assert f"anchor_attn/{source}" in names

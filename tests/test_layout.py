"""Rules about the source tree itself."""

import ast
import importlib.metadata
import subprocess
import sys
from pathlib import Path

import pytest

from launching import ROOT

MODULES = sorted(
    path for path in (ROOT / "vaetrain").iterdir() if path.suffix == ".py" or (path / "__init__.py").exists()
)


def test_no_module_shadows_a_package_or_a_standard_module():
    """`accelerate launch vaetrain/train.py` puts vaetrain/ first on sys.path, where `random.py` would replace `random`."""
    installed = set(importlib.metadata.packages_distributions()) - {"vaetrain"}
    names = {path.stem for path in MODULES} - {"__init__"}
    assert "tracking" in names
    assert not names & (installed | set(sys.stdlib_module_names))


@pytest.mark.parametrize(
    "script",
    [
        *(f"vaetrain/{name}.py" for name in ("train", "sample", "evaluate", "scale")),
        *sorted(f"tools/{p.name}" for p in (ROOT / "tools").glob("*.py") if "__main__" in p.read_text()),
    ],
)
def test_help_answers_without_importing_torch(script):
    """torch takes four seconds to import; --help promises two."""
    code = (
        "import runpy, sys\n"
        f"sys.argv = ['{script}', '--help']\n"
        "try:\n"
        f"    runpy.run_path('{script}', run_name='__main__')\n"
        "except SystemExit as end:\n"
        "    assert end.code in (0, None), end.code\n"
        "assert 'torch' not in sys.modules, 'torch was imported'\n"
    )
    result = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, timeout=300)
    assert result.returncode == 0, result.stderr
    assert "usage:" in result.stdout
    assert "default" in result.stdout or "positional" in result.stdout


def test_one_module_reads_the_launchers_environment():
    for path in (ROOT / "vaetrain").rglob("*.py"):
        names = {node.value for node in ast.walk(ast.parse(path.read_text())) if isinstance(node, ast.Constant)}
        if path.name != "launcher_environment.py":
            assert not names & {"RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE"}, path


def test_nothing_is_unpickled():
    """torch.load only with weights_only=True; no pickle.load, eval or exec."""
    for path in (*(ROOT / "vaetrain").rglob("*.py"), *(ROOT / "tools").glob("*.py")):
        for node in ast.walk(ast.parse(path.read_text())):
            if not isinstance(node, ast.Call):
                continue
            called = ast.unparse(node.func)
            assert called not in ("pickle.load", "pickle.loads", "eval", "exec"), f"{path}:{node.lineno}"
            if called == "torch.load":
                assert "weights_only=True" in ast.unparse(node), f"{path}:{node.lineno}"


def test_no_file_names_a_machine_path_or_a_registry():
    tracked = subprocess.run(["git", "ls-files", "-z"], cwd=ROOT, capture_output=True, text=True, check=True).stdout
    forbidden = ("pythonhos" + "ted", "pypi." + "org", "/wor" + "k/main", "/wor" + "k/shared")
    for name in filter(None, tracked.split("\0")):
        path = Path(ROOT, name)
        if path.suffix in (".png", ".jpg") or not path.is_file():
            continue
        text = path.read_text(encoding="utf-8")
        assert not [word for word in forbidden if word in text], name

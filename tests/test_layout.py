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
    assert "training" in names
    assert not names & (installed | set(sys.stdlib_module_names))


@pytest.mark.parametrize(
    "script",
    [
        *(f"vaetrain/{name}.py" for name in ("train", "sample", "evaluate", "scale", "encode", "train_prior")),
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


ORDER = (
    "machine files strict_json http_deadline exit_codes picture_text progress_bar upload", "documents wandb_account",
    "command_line",
    "distributed objective", "model", "data", "config",
    "runs metrics interchange", "training report sweeps", "export", "latents", "priors scaling", "sampling", "evaluation",
    "exploration", "preflight", "train sample evaluate scale encode", "train_prior",
)  # fmt: skip
"""What may import what stands before it, and nothing beside it (docs/architecture.md)."""

ORDER_IN_DATA = ("config format", "sources remote", "readers sharding")


def imported(file: Path) -> set[str]:
    """The modules of vaetrain that a file imports, wherever it does."""
    modules: set[str] = set()
    for node in ast.walk(ast.parse(file.read_text())):
        if isinstance(node, ast.ImportFrom) and (node.module or "").split(".")[0] == "vaetrain":
            modules |= {node.module} if node.module != "vaetrain" else {f"vaetrain.{each.name}" for each in node.names}
        elif isinstance(node, ast.Import):
            modules |= {each.name for each in node.names if each.name.split(".")[0] == "vaetrain"}
    return modules


@pytest.mark.parametrize(("folder", "order"), [("vaetrain", ORDER), ("vaetrain/data", ORDER_IN_DATA)])
def test_imports_run_one_way(folder, order):
    depth = len(Path(folder).parts)
    place = {name: number for number, names in enumerate(order) for name in names.split()}
    files = [file for file in (ROOT / folder).rglob("*.py") if file != ROOT / "vaetrain" / "__init__.py"]
    rooms = {file.relative_to(ROOT / folder).parts[0].removesuffix(".py") for file in files} - {"__init__"}
    assert rooms == set(place), "a folder or module without a place in the order"
    for file in files:
        here = file.relative_to(ROOT / folder).parts[0].removesuffix(".py")
        for module in imported(file):
            there = module.split(".")[depth : depth + 1]
            if module.startswith(folder.replace("/", ".")) and there and there != [here]:
                assert place[there[0]] < place.get(here, 0), f"{file.relative_to(ROOT)} imports {module}"


def test_the_architecture_says_this_order():
    text = (ROOT / "docs" / "architecture.md").read_text()
    lines = [line for line in text.split("\n") if (line.startswith("|") and "`machine`" in line) or "| | `" in line]
    for names, line in zip(ORDER[:-2], lines, strict=True):
        assert {f"`{name}`" for name in names.split()} <= set(line.replace(":", " ").replace(",", " ").split()), line


def test_every_folder_says_what_lives_in_it():
    for folder in {file.parent for file in (ROOT / "vaetrain").rglob("*.py")} - {ROOT / "vaetrain"}:
        if folder.name != "faces":
            assert 5 <= len((folder / "README.md").read_text().splitlines()) <= 15, folder


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
        if path.suffix in (".png", ".jpg", ".gz") or not path.is_file():
            continue
        text = path.read_text(encoding="utf-8")
        assert not [word for word in forbidden if word in text], name

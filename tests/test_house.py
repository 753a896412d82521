"""The house rules that a machine can check."""

import ast
import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
SRC = ROOT / "src" / "moestro"
SOURCES = sorted(SRC.rglob("*.py"))
TESTS = sorted((ROOT / "tests").rglob("*.py"))
NATIVE = sorted(p for p in (ROOT / "native").iterdir() if p.suffix in {".cpp", ".h", ".inc"})

# A room may import rooms of a lower level, and itself; rooms of one level never each other.
LEVELS = {
    "errors": 0,
    "strictjson": 0,
    "settings": 1,
    "templates": 0,
    "worker": 0,
    "sandbox": 1,
    "streaming": 1,
    "machine": 1,
    "files": 1,
    "config": 2,
    "text": 2,
    "chat": 2,
    "kernels": 3,
    "foreign": 4,
    "data": 4,
    "moe": 5,
    "models": 6,
    "checkpoints": 7,
    "train": 8,
    "infer": 8,
    "plan": 8,
    "probe": 8,
    "surgery": 8,
    "bench": 9,
    "hf": 9,
    "serve": 10,
    "check": 10,
    "cli": 11,
    "__main__": 12,
}


def short(path: Path) -> str:
    return str(path.relative_to(ROOT))


def room(path: Path) -> str:
    return path.relative_to(SRC).parts[0].removesuffix(".py")


def imported_rooms(path: Path) -> set[str]:
    """Rooms that the file imports anywhere, functions included."""
    found = set()
    for node in ast.walk(ast.parse(path.read_text())):
        names = []
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{short(path)}: relative import"
            names = [f"{node.module}.{alias.name}" for alias in node.names]
        found |= {name.split(".")[1] for name in names if name.startswith("moestro.")}
    return found & set(LEVELS)


def module(path: Path) -> str:
    return ".".join(path.relative_to(SRC.parent).with_suffix("").parts).removesuffix(".__init__")


MODULES = {module(path): path for path in SOURCES}


def imported_files(path: Path) -> set[str]:
    """Modules that the file imports anywhere: in functions and under TYPE_CHECKING too."""
    found = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            inner = {f"{node.module}.{alias.name}" for alias in node.names}
            found |= {each if each in MODULES else node.module for each in inner}
    return found & set(MODULES)


def reached(start: str, imports: dict[str, set[str]]) -> set[str]:
    found, waiting = set(), [*imports[start]]
    while waiting:
        name = waiting.pop()
        if name not in found:
            found.add(name)
            waiting += imports[name]
    return found


def test_no_file_imports_itself_in_the_end():
    imports = {name: imported_files(path) for name, path in MODULES.items()}
    assert "moestro.moe.mixing" in imports["moestro.moe.experts"]
    circular = {name for name in MODULES if name in reached(name, imports)}
    assert not circular, f"files that import each other: {sorted(circular)}"


def test_the_walk_finds_the_files():
    assert len(SOURCES) > 20
    assert "kernels" in imported_rooms(SRC / "moe" / "experts.py")


@pytest.mark.parametrize("path", [*SOURCES, *TESTS], ids=short)
def test_files_are_at_most_400_lines(path):
    assert len(path.read_text().splitlines()) <= 400


@pytest.mark.parametrize("path", NATIVE, ids=short)
def test_native_lines_are_at_most_120_columns(path):
    for number, line in enumerate(path.read_text().splitlines(), 1):
        assert len(line) <= 120, f"line {number}"


@pytest.mark.parametrize("path", SOURCES, ids=short)
def test_functions_are_at_most_60_lines(path):
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            assert node.end_lineno - node.lineno + 1 <= 60, node.name


@pytest.mark.parametrize("path", SOURCES, ids=short)
def test_every_file_says_what_lives_there(path):
    text = ast.get_docstring(ast.parse(path.read_text()))
    assert text, "no docstring"
    assert text.split("\n\n")[0].rstrip().endswith((".", ":"))


@pytest.mark.parametrize("path", [p for p in SOURCES if p.name != "__init__.py"], ids=short)
def test_imports_run_one_way(path):
    own = room(path)
    for other in imported_rooms(path) - {own}:
        assert LEVELS[other] < LEVELS[own], f"{own} must not import {other}"


def test_every_room_has_a_level():
    rooms = {room(path) for path in SOURCES} - {"__init__"}
    assert rooms <= set(LEVELS), "give the new room its place in LEVELS"


@pytest.mark.parametrize("path", SOURCES, ids=short)
def test_imports_are_at_the_top(path):
    """Only cli/ imports inside functions, for a quick --help."""
    if room(path) == "cli":
        return
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            inner = [n for n in ast.walk(node) if isinstance(n, ast.Import | ast.ImportFrom)]
            names = {alias.name for n in inner for alias in n.names}
            # Optional extras may be imported where they are used.
            extras = {"SummaryWriter", "huggingface_hub.errors", "gguf"}
            assert names <= extras, f"{node.name} imports {names}"


@pytest.mark.parametrize("path", SOURCES, ids=short)
def test_names_of_files(path):
    assert path.stem not in {"utils", "util", "common", "helpers", "helper", "misc"}
    if not path.stem.startswith("__"):
        assert path.stem not in sys.stdlib_module_names


@pytest.mark.parametrize("path", SOURCES, ids=short)
def test_no_pickle_is_read_or_written(path):
    text = path.read_text()
    tree = ast.parse(text)
    forbidden = {"pickle", "cPickle", "dill", "cloudpickle", "joblib", "shelve", "marshal"}
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            assert not forbidden & {alias.name.split(".")[0] for alias in node.names}
        if isinstance(node, ast.ImportFrom):
            assert (node.module or "").split(".")[0] not in forbidden
        if isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name):
            assert (node.value.id, node.attr) not in {("torch", "load"), ("torch", "save")}
    assert "allow_pickle=True" not in text


@pytest.mark.parametrize("path", [p for p in SOURCES if room(p) != "cli"], ids=short)
def test_only_the_command_line_prints(path):
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Call) and isinstance(node.func, ast.Name):
            assert node.func.id != "print", f"line {node.lineno}"


@pytest.mark.parametrize("module", ["moestro", "moestro.config", "moestro.settings"])
def test_importing_settings_does_not_import_torch(module):
    code = f"import sys, {module}; sys.exit('torch' in sys.modules or 'numpy' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT / "src", check=False)
    assert done.returncode == 0


def test_public_names_exist():
    import moestro

    assert set(moestro.__all__) <= set(dir(moestro))
    for name in moestro.__all__:
        assert getattr(moestro, name) is not None
    with pytest.raises(AttributeError, match="no_such_name"):
        _ = moestro.no_such_name


def test_no_path_of_one_machine():
    places = re.compile(r"(/work/|/home/\w|/root/|/Users/)")
    for path in [*SOURCES, *TESTS, *ROOT.glob("docs/**/*.md"), *ROOT.glob("*.md")]:
        if path != Path(__file__):
            assert not places.search(path.read_text()), short(path)


def tree_of(page: Path) -> str:
    """The page's picture of the project's folders."""
    blocks = re.findall(r"```[^\n]*\n(.*?)```", page.read_text(), flags=re.DOTALL)
    trees = [block for block in blocks if "src/moestro/" in block and "├" in block]
    assert trees, f"{page.name} has lost its tree"
    return trees[0]


def test_readme_tree_has_every_package():
    """Each package of src has a line of its own in the README's tree, and no other is there."""
    there = {f"{path.parent.name}/" for path in (ROOT / "src/moestro").glob("*/__init__.py")}
    lines = re.findall(r"^│ [├└] (\w+/)", tree_of(ROOT / "README.md"), flags=re.MULTILINE)
    assert sorted(lines) == sorted(there)


def test_tree_has_every_file():
    """Every file of src is named in the whole tree, and every name there exists."""
    files = {path.name for path in SOURCES if not path.name.startswith("__")}
    named = set(re.findall(r"[\w.-]+\.py\b", tree_of(ROOT / "docs/tree.md")))
    assert files <= named, f"not in docs/tree.md: {sorted(files - named)}"
    everywhere = {path.name for path in ROOT.rglob("*.py") if ".venv" not in path.parts}
    assert named <= everywhere, f"in docs/tree.md only: {sorted(named - everywhere)}"

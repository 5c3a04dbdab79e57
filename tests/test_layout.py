"""The house rules that code can check: source roots without packages, one direction of imports, light imports."""

import ast
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
SOURCE_ROOTS = ("kernels", "model", "bench", "tests")
PADFREE_PUBLIC = {
    "padfree",
    "padfree.packed",
    "padfree.reference",
    "padfree.testing",
    "padfree.integrations",
    "padfree.integrations.transformers",
}


def imported_modules(path: Path, *, at_import_time_only: bool = False) -> set[str]:
    """Every absolute module that a file imports; with the flag, without those inside functions."""
    found: set[str] = set()

    def visit(node: ast.AST) -> None:
        if at_import_time_only and isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            return
        if isinstance(node, ast.Import):
            found.update(alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and node.module and not node.level:
            # `from package import name` may name a module of the package
            found.update({node.module, *(f"{node.module}.{alias.name}" for alias in node.names)})
        for child in ast.iter_child_nodes(node):
            visit(child)

    visit(ast.parse(path.read_text(encoding="utf-8")))
    return found


def modules_of_the_house() -> dict[str, Path]:
    """Every module of the three packages by its dotted name."""
    found = {}
    for root in ("kernels", "model", "bench"):
        for path in (ROOT / root).glob("*/**/*.py"):
            parts = path.relative_to(ROOT / root).with_suffix("").parts
            found[".".join(parts[:-1] if parts[-1] == "__init__" else parts)] = path
    return found


def import_graph() -> dict[str, set[str]]:
    """Which modules of the house each of them imports, inside functions too; `from package import module` means the module."""
    modules = modules_of_the_house()
    graph: dict[str, set[str]] = {name: set() for name in modules}
    for name, path in modules.items():
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.Import):
                graph[name].update(alias.name for alias in node.names)
            elif isinstance(node, ast.ImportFrom) and node.module:
                inner = {alias.name: f"{node.module}.{alias.name}" for alias in node.names}
                graph[name].update(inner[n] if inner[n] in modules else node.module for n in inner)
        graph[name] &= modules.keys() - {name}
    return graph


def folder_of(module: str) -> str:
    """The folder of a module: `padfree_bench.peers.base` lies in `padfree_bench.peers`."""
    return module if modules_of_the_house()[module].name == "__init__.py" else module.rpartition(".")[0]


def top_level(modules: set[str]) -> set[str]:
    return {module.partition(".")[0] for module in modules}


def run_python(code: str) -> str:
    path = f"import sys; sys.path[:0] = {[str(ROOT / 'kernels'), str(ROOT / 'model')]!r}\n"
    done = subprocess.run([sys.executable, "-c", path + code], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return done.stdout


@pytest.mark.parametrize("folder", SOURCE_ROOTS)
def test_a_source_root_is_a_plain_folder(folder):
    # A package called `kernels` on sys.path would be taken for Hugging Face's, and break transformers.
    assert (ROOT / folder).is_dir()
    assert not (ROOT / folder / "__init__.py").exists()


# Which other folders of its own package a folder may import; what is missing may import everything.
BENCH = "padfree_bench"
MAY_IMPORT = {
    "padfree._triton": {"padfree"},
    f"{BENCH}.measuring": set(),
    f"{BENCH}.peers": {f"{BENCH}.measuring"},
    f"{BENCH}.compiled": {f"{BENCH}.measuring"},
    f"{BENCH}.reports": {f"{BENCH}.measuring"},
    f"{BENCH}.tuning": {f"{BENCH}.{name}" for name in ("measuring", "peers", "compiled")},
    f"{BENCH}.suites": {
        f"{BENCH}.{name}" for name in ("measuring", "peers", "compiled", "reports", "tuning")
    },
    "imdb_classifier.data": {"imdb_classifier"},
    "imdb_classifier.checkpoints": {"imdb_classifier", "imdb_classifier.data"},
    "imdb_classifier.training": {f"imdb_classifier{name}" for name in ("", ".data", ".checkpoints")},
    "imdb_classifier": set(),
}
# Offers names of all folders, each loaded when it is used; the folders import its modules and never itself.
OFFERS = "imdb_classifier"


@pytest.mark.parametrize("folder", MAY_IMPORT)
def test_a_folder_imports_only_the_folders_beneath_it(folder):
    package = folder.partition(".")[0]
    seen = 0
    for module, imported in import_graph().items():
        if folder_of(module) != folder or module == OFFERS:
            continue
        seen += 1
        assert package != OFFERS or OFFERS not in imported, f"{module} imports {OFFERS} itself"
        others = {folder_of(m) for m in imported if m.startswith(package)} - {folder}
        assert others <= MAY_IMPORT[folder], f"{module} imports {sorted(others - MAY_IMPORT[folder])}"
    assert seen, f"no module in {folder}"


def test_no_modules_import_each_other_in_a_circle():
    graph = {name: set(imported) for name, imported in import_graph().items()}
    while leaves := {name for name, imported in graph.items() if not imported & graph.keys()}:
        graph = {name: imported for name, imported in graph.items() if name not in leaves}
    assert not graph, f"a circle runs through some of {sorted(graph)}"


def test_the_kernels_know_no_classifier_and_the_classifier_no_benchmark():
    order = ["padfree", "imdb_classifier", "padfree_bench"]
    for module, imported in import_graph().items():
        above = set(order[order.index(module.partition(".")[0]) + 1 :])
        assert not top_level(imported) & above, module


def test_every_folder_says_what_lives_there_and_what_it_may_import():
    for name, path in modules_of_the_house().items():
        if path.name == "__init__.py" and "." in name:
            said = ast.get_docstring(ast.parse(path.read_text(encoding="utf-8"))) or ""
            assert "import" in said and 2 <= len(said.splitlines()) <= 6, path.relative_to(ROOT)


def test_no_folder_holds_more_than_a_third_of_the_house():
    lines: dict[str, int] = {}
    for module, path in modules_of_the_house().items():
        lines[folder_of(module)] = lines.get(folder_of(module), 0) + len(path.read_text().splitlines())
    largest = max(lines, key=lambda folder: lines[folder])
    assert lines[largest] < 0.35 * sum(lines.values()), largest


def test_padfree_knows_torch_and_triton_only():
    allowed = {"padfree", "torch", "triton", "numpy"} | set(sys.stdlib_module_names)
    for path in (ROOT / "kernels").rglob("*.py"):
        extra = top_level(imported_modules(path)) - allowed
        if path.parent.name == "integrations":
            extra -= {"transformers"}
        assert not extra, f"{path.relative_to(ROOT)} imports {sorted(extra)}"


def test_the_classifier_uses_padfree_through_its_public_modules_only():
    modules = list((ROOT / "model" / "imdb_classifier").rglob("*.py"))
    assert modules
    for path in modules:
        used = {m for m in imported_modules(path) if m.split(".")[0] == "padfree"}
        private = {m for m in used if any(part.startswith("_") for part in m.split(".")[1:])}
        assert not private, f"{path.name} imports {sorted(private)}"
        homes = {m for m in used if m in PADFREE_PUBLIC or m.rpartition(".")[0] in PADFREE_PUBLIC}
        assert used == homes, f"{path.name} imports {sorted(used - homes)}"
        assert not top_level(imported_modules(path)) & {"bench", "tests"}, path.name


def test_the_reference_never_needs_triton():
    assert "triton" not in top_level(imported_modules(ROOT / "kernels" / "padfree" / "reference.py"))


def test_the_exported_model_files_import_no_third_party_but_torch_and_transformers():
    # Hugging Face asks whoever loads an exported checkpoint to install every top-level import of these files.
    for name in ("modeling.py", "layers.py", "packing.py", "configuration.py"):
        used = top_level(imported_modules(ROOT / "model" / "imdb_classifier" / name))
        assert used <= {"torch", "transformers"} | set(sys.stdlib_module_names), (name, used)


def test_importing_padfree_loads_neither_transformers_nor_triton_kernels():
    loaded = run_python("import padfree; print(*sorted(sys.modules))").split()
    assert "padfree" in loaded
    assert not {
        "transformers",
        "padfree.integrations",
        "padfree._triton.forward",
        "padfree._triton.backward",
    } & set(loaded)


def test_importing_the_classifier_package_loads_nothing_heavy():
    loaded = run_python(
        "import imdb_classifier; from imdb_classifier.attention import ATTENTION_NAMES; print(*sys.modules)"
    ).split()
    assert "imdb_classifier.attention" in loaded
    assert not {"torch", "transformers", "numpy"} & set(loaded)


def test_transformers_loads_a_model_from_the_repository_root():
    # `python -m ...` puts the root, and with it the folder `kernels`, on sys.path.
    done = subprocess.run(
        [sys.executable, "-c", "from transformers import BertModel; print(BertModel.__name__)"],
        capture_output=True,
        text=True,
        check=False,
        cwd=ROOT,
    )
    assert done.stdout.strip() == "BertModel", done.stderr

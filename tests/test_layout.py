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
    for name in ("modeling.py", "configuration.py"):
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

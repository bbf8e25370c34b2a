"""The rules of the house: who may import whom, and what `import qat` costs."""

import ast
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
PACKAGE = ROOT / "qat"

# From the top of the house to the bottom: a module imports only from its own line or from lines above.
ORDER = [
    "qat.processes",
    "qat.recompute",
    "qat.stopping",
    "qat.numerics.draws",
    "qat.refusals",
    "qat.numerics.rounding",
    "qat.numerics.fixed_point",
    "qat.numerics.affine",
    "qat.numerics.native",
    "qat.numerics.kernels",
    "qat.numerics.codes",
    "qat.numerics.order",
    "qat.numerics.blocks",
    "qat.numerics.gradients",
    "qat.numerics.fast",
    "qat.numerics.fake_quantize",
    "qat.numerics",  # formats, codebook, product, granularity, packing
    "qat.observers",
    "qat.ranges",
    "qat.scheme",
    "qat.targets",
    "qat.presets",
    "qat.fitted",
    "qat.mode",
    "qat.plain",
    "qat.fake_quant",
    "qat.modes",
    "qat.turns",
    "qat.encoding",
    "qat.cells",
    "qat.layers",
    "qat.widths",
    "qat.attention",
    "qat.lean",
    "qat.places",
    "qat.inside",
    "qat.smoothing",
    "qat.calls",
    "qat.results",
    "qat.kinds",
    "qat.prepared",
    "qat.graph",
    "qat.advice",
    "qat.tracing",
    "qat.decompose",
    "qat.einsum",
    "qat.functional",
    "qat.structures",
    "qat.record",
    "qat.adapters",
    "qat.choices",
    "qat.function_inputs",
    "qat.trial",
    "qat.in_place",
    "qat.reads",
    "qat.requests",
    "qat.place",
    "qat.subclass",
    "qat.split",
    "qat.macs",
    "qat.prepare",
    "qat.parts",
    "qat.calibrate",
    "qat.fold",
    "qat.runtime",  # above `lower`, which builds it: an integer network does not know the training code
    "qat.sizes",
    "qat.translate",
    "qat.lower_calls",
    "qat.lower_layers",
    "qat.lowering",
    "qat.lower_recurrent",
    "qat.fixed_layers",
    "qat.lower_fixed",
    "qat.lower",
    "qat.ptq",
    "qat.export",
    "qat.analysis",
    "qat.training",
    "qat.zoo",
    "qat.hydra_schema",
    "qat.hydra_resume",
    "qat.inspection",
    "qat.sides",
    "qat.comparison",
    "qat",  # __init__: the public names
    "qat.__main__",
]

HEAVY = {
    "lightning": lambda path: path.startswith("training/") or path in ("zoo/data.py", "zoo/loading.py"),
    "pytorch_lightning": lambda path: False,
    "hydra": lambda path: path in ("hydra_schema.py", "hydra_resume.py"),
    "omegaconf": lambda path: path in ("hydra_schema.py", "hydra_resume.py"),
    "experiments": lambda path: False,
    "tests": lambda path: False,
}
"""Which files of qat may import a package."""


def module_name(path: Path) -> str:
    parts = path.relative_to(ROOT).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


FILES = {module_name(path): path for path in sorted(PACKAGE.rglob("*.py"))}


def is_type_checking(node: ast.If) -> bool:
    return ast.unparse(node.test) in ("TYPE_CHECKING", "typing.TYPE_CHECKING")


def imports(tree: ast.AST, package: str, at_load: bool = False) -> list[str]:
    """Modules that a file imports; with `at_load`, only those that importing the file loads."""
    found = []
    for node in ast.iter_child_nodes(tree):
        if isinstance(node, ast.Import):
            found += [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            base = node.module or ""
            if node.level:
                base = ".".join([*package.split(".")[: len(package.split(".")) - node.level + 1], base]).strip(".")
            submodules = [f"{base}.{alias.name}" for alias in node.names]
            found += [name if name in FILES else base for name in submodules]
        elif at_load and (
            isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.Lambda)
            or (isinstance(node, ast.If) and is_type_checking(node))
        ):
            continue
        else:
            found += imports(node, package, at_load)
    return found


def of_file(name: str, at_load: bool = False) -> list[str]:
    path = FILES[name]
    package = name if path.name == "__init__.py" else name.rpartition(".")[0]
    return imports(ast.parse(path.read_text()), package, at_load)


def rank(name: str) -> int:
    """The line of ORDER that is the longest prefix of a module's name."""
    fits = [line for line in ORDER if name == line or (line != "qat" and name.startswith(f"{line}."))]
    assert fits, f"{name} has no place in ORDER"
    return ORDER.index(max(fits, key=len))


def test_the_reader_reads() -> None:
    source = "import a.b\nfrom qat import fold\nfrom .scheme import x\ndef f():\n    import lightning.pytorch\n"
    tree = ast.parse(source)
    assert imports(tree, "qat") == ["a.b", "qat.fold", "qat.scheme", "lightning.pytorch"]
    assert imports(tree, "qat", at_load=True) == ["a.b", "qat.fold", "qat.scheme"]
    assert rank("qat.lower") > rank("qat.translate") > rank("qat.fold")
    assert rank("qat.fold") > rank("qat.layers.conv") > rank("qat.fake_quant")
    assert rank("qat.numerics.packing") == ORDER.index("qat.numerics")
    assert len(FILES) > 20


@pytest.mark.parametrize("name", FILES)
def test_imports_go_upward(name: str) -> None:
    for imported in of_file(name):
        if imported == "qat" or imported.startswith("qat."):
            assert rank(imported) <= rank(name), f"{name} imports {imported}, which stands below it"


def test_no_cycles_at_load() -> None:
    edges = {name: {i for i in of_file(name, at_load=True) if i in FILES and i != name} for name in FILES}
    done: set[str] = set()

    def visit(name: str, path: list[str]) -> None:
        assert name not in path, f"import cycle: {' -> '.join([*path, name])}"
        if name not in done:
            for imported in edges[name]:
                visit(imported, [*path, name])
            done.add(name)

    for name in FILES:
        visit(name, [])


@pytest.mark.parametrize("name", FILES)
def test_heavy_packages_are_imported_only_where_they_may(name: str) -> None:
    path = FILES[name].relative_to(PACKAGE).as_posix()
    for imported in of_file(name):
        top = imported.partition(".")[0]
        assert top not in HEAVY or HEAVY[top](path), f"qat/{path} imports {imported}"


def test_import_qat_loads_nothing_heavy() -> None:
    code = "import sys, qat; print(' '.join(sorted({m.partition('.')[0] for m in sys.modules})))"
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, cwd=ROOT)
    loaded = set(result.stdout.split())
    assert {"qat", "torch"} <= loaded
    heavy = {"lightning", "pytorch_lightning", "torchmetrics", "hydra", "omegaconf"}
    heavy |= {"onnx", "onnxruntime", "onnxscript", "datasets", "pyarrow", "pandas", "PIL"}
    heavy |= {"matplotlib", "sklearn", "wandb", "rich", "jinja2"}
    assert not loaded & heavy

"""The package's layers, read from its source: who imports whom, who changes PEFT, what is loaded and documented."""

import ast
import inspect
import re
import subprocess
import sys
from pathlib import Path

import peft
import pytest
from peft.tuners import tuners_utils

import peft_residual
from peft_residual.compat import check_peft


try:
    import tomllib
except ModuleNotFoundError:  # Python 3.10, where pytest brings it
    import tomli as tomllib

PACKAGE = Path(peft_residual.__file__).parent
COMMAND_LINE = PACKAGE.parent / "peft_residual_cli"
TREES = {
    path.relative_to(folder).as_posix(): ast.parse(path.read_text(encoding="utf-8"))
    for folder, paths in ((PACKAGE, PACKAGE.rglob("*.py")), (PACKAGE.parent, COMMAND_LINE.rglob("*.py")))
    for path in sorted(paths)
}
# What may be imported when a module is; anything else only inside the function that needs it.
AT_IMPORT = {"peft", "safetensors", "torch", *sys.stdlib_module_names}  # by the command line, the last ones only
# Base classes of transformers, whose modules load in 20 ms after PEFT
ALSO_AT_IMPORT = {
    "analysis/callback.py": {"transformers"},
    "training/checks.py": {"transformers"},
    "compat.py": {"transformers"},
    "__main__.py": {"peft_residual_cli"},
}
TOUCHES_PEFT = {"peft_model/register.py"}
TEST_MODULES = sorted(Path(__file__).parent.glob("test_*.py"))


def imports(node):
    """(level, module, names) of every import below a node."""
    for child in ast.walk(node):
        if isinstance(child, ast.Import):
            for alias in child.names:
                yield 0, alias.name, []
        elif isinstance(child, ast.ImportFrom):
            yield child.level, child.module or "", [alias.name for alias in child.names]


def at_import(tree):
    """The statements that run when a module is imported: not functions' bodies, nor what is for type checkers."""
    for node in tree.body:
        if isinstance(node, ast.If) and ast.unparse(node.test) == "TYPE_CHECKING":
            continue
        if isinstance(node, ast.ClassDef):
            yield from at_import(node)
        elif isinstance(node, (ast.If, ast.Try, ast.With, ast.For)):
            yield from (child for child in ast.walk(node) if isinstance(child, (ast.Import, ast.ImportFrom)))
        elif not isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef)):
            yield node


def test_contributing_has_the_layers_in_the_order_that_import_linter_holds():
    """The contracts in pyproject.toml, highest first; the table in CONTRIBUTING.md, lowest first."""
    root = PACKAGE.parent
    contracts = tomllib.loads((root / "pyproject.toml").read_text())["tool"]["importlinter"]["contracts"]
    inside, (command_line, package) = (found["layers"] for found in contracts)
    assert package == PACKAGE.name
    layers = [command_line, *inside]
    contract = [re.findall(r"[\w.]+", layer) for layer in layers]
    rows = re.findall(r"^\| (`.+?) \|", (root / "CONTRIBUTING.md").read_text(), re.M)
    table = [
        name.strip("/").removesuffix(".py").replace("/", ".") for row in rows for name in re.findall("`(.+?)`", row)
    ]
    places = [i for name in table for i, layer in enumerate(reversed(contract)) if name in layer]
    assert places == sorted(places)
    assert {name for layer in contract for name in layer} == set(table)


@pytest.mark.parametrize("name", TREES)
def test_nothing_heavy_is_imported_with_a_module(name):
    found = {m.split(".")[0] for node in at_import(TREES[name]) for level, m, _ in imports(node) if not level}
    allowed = sys.stdlib_module_names if name.startswith(COMMAND_LINE.name) else AT_IMPORT
    assert found <= allowed | ALSO_AT_IMPORT.get(name, set())


# --- who changes PEFT -----------------------------------------------------------------------------------------------


def peft_names(tree):
    """The names under which a module knows PEFT, its parts, and aliases of parts."""
    found = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            found.update((a.asname or a.name).split(".")[0] for a in node.names if a.name.split(".")[0] == "peft")
        elif isinstance(node, ast.ImportFrom) and not node.level and (node.module or "").split(".")[0] == "peft":
            found.update(a.asname or a.name for a in node.names)
    return found


def root(node):
    while isinstance(node, (ast.Attribute, ast.Subscript, ast.Call)):
        node = node.func if isinstance(node, ast.Call) else node.value
    return node.id if isinstance(node, ast.Name) else None


def changes_to(tree, names):
    """Lines that assign to, delete from, or call a changing method of one of the names."""
    for node in ast.walk(tree):
        targets = []
        if isinstance(node, (ast.Assign, ast.Delete)):
            targets = node.targets
        elif isinstance(node, (ast.AugAssign, ast.AnnAssign)):
            targets = [node.target]
        elif isinstance(node, ast.Call):
            function = node.func
            if isinstance(function, ast.Name) and function.id in ("setattr", "delattr"):
                targets = [ast.Attribute(node.args[0], "changed")]
            elif isinstance(function, ast.Attribute) and function.attr in (
                *(
                    "update",
                    "setdefault",
                    "pop",
                    "popitem",
                    "clear",
                    "__setitem__",
                    "__setattr__",
                    "register_peft_method",
                ),
                *("add", "append", "extend", "insert", "remove"),
            ):
                targets = [ast.Attribute(function.value, "changed")]
        for target in targets:
            if isinstance(target, (ast.Attribute, ast.Subscript)) and root(target) in names:
                yield node.lineno


@pytest.mark.parametrize("name", TREES)
def test_only_register_changes_anything_of_peft(name):
    lines = sorted(changes_to(TREES[name], peft_names(TREES[name])))
    assert bool(lines) == (name in TOUCHES_PEFT), f"lines {lines}"


@pytest.mark.parametrize("name", TREES)
def test_only_register_changes_the_class_of_an_object(name):
    assigned = {
        target.attr
        for node in ast.walk(TREES[name])
        if isinstance(node, ast.Assign)
        for target in node.targets
        if isinstance(target, ast.Attribute)
    }
    assert ("__class__" in assigned) == (name in TOUCHES_PEFT)


@pytest.mark.parametrize(
    "code",
    (
        "from peft import PeftModel\nPeftModel.forward = 3",
        "import peft\npeft.mapping.TABLE['a'] = 3",
        "import peft.mapping\ndef f():\n    setattr(peft.PeftModel, 'forward', 3)",
        "from peft.mapping import TABLE as table\ntable.update(a=3)",
        "from peft.mapping import TABLE\ndel TABLE['a']",
    ),
)
def test_a_change_to_peft_is_seen(code):
    tree = ast.parse(code)
    assert list(changes_to(tree, peft_names(tree)))


@pytest.mark.parametrize("name", TREES)
def test_nothing_unpickles(name):
    """No `torch.load`, no pickle, no code from a checkpoint."""
    tree = TREES[name]
    assert not {module.split(".")[0] for _, module, _ in imports(tree)} & {"pickle", "cloudpickle", "dill", "joblib"}
    calls = [node for node in ast.walk(tree) if isinstance(node, ast.Call)]
    dotted = {f"{root(c.func)}.{c.func.attr}" for c in calls if isinstance(c.func, ast.Attribute)}
    assert not dotted & {"torch.load", "pickle.load", "pickle.loads"}
    assert not {c.func.id for c in calls if isinstance(c.func, ast.Name)} & {"eval", "exec", "__import__"}
    keywords = {(k.arg, getattr(k.value, "value", None)) for c in calls for k in c.keywords}
    assert not keywords & {("allow_pickle", True), ("trust_remote_code", True), ("weights_only", False)}


# --- import ---------------------------------------------------------------------------------------------------------


def test_importing_the_package_loads_nothing_heavy_beyond_peft_and_is_silent():
    code = (
        "import sys, warnings, peft; before = set(sys.modules); warnings.simplefilter('error')\n"
        "warnings.filterwarnings('ignore', 'PEFT .* itself generates wrong tokens')\n"  # `test_compat.py`
        "import peft_residual; new = {name.split('.')[0] for name in set(sys.modules) - before}\n"
        "heavy = {'matplotlib', 'datasets', 'accelerate', 'sklearn', 'pandas', 'scipy'}\n"
        "assert not new & heavy, new & heavy\n"
        "assert not {'matplotlib', 'datasets', 'transformers.trainer'} & set(sys.modules)\n"
    )
    command = [sys.executable, "-c", code]
    result = subprocess.run(command, capture_output=True, text=True, cwd=PACKAGE.parent, check=False)
    assert (result.returncode, result.stdout) == (0, ""), result.stderr
    assert "peft_residual" not in result.stderr


def test_peft_is_checked_before_anything_else_of_the_package_is_imported():
    lines = [ast.unparse(node) for node in TREES["__init__.py"].body]
    check = lines.index("check_peft()")
    imported = [line for line in lines[1:check] if "import" in line]
    assert imported == ["from .compat import check_peft, warn_of_stock_generation, warn_of_untested_hosts"]


@pytest.mark.parametrize(
    ("owner", "name", "words"),
    [
        (tuners_utils, "BasePromptEncoder", "BasePromptEncoder._get_adapter_state_dict"),
        (tuners_utils.BasePromptEncoder, "_get_adapter_state_dict", "BasePromptEncoder._get_adapter_state_dict"),
        (tuners_utils.BasePromptEncoder, "_load_adapter_state_dict", "BasePromptEncoder._load_adapter_state_dict"),
        (peft.PeftModel, "get_prompt_embedding_to_save", "PeftModel.get_prompt_embedding_to_save"),
        (peft.mapping, "PEFT_TYPE_TO_TUNER_MAPPING", "PEFT_TYPE_TO_TUNER_MAPPING[PROMPT_TUNING]"),
    ],
)
def test_a_peft_without_a_hook_is_refused_by_name(owner, name, words, monkeypatch):
    monkeypatch.delattr(owner, name)
    with pytest.raises(ImportError) as error:
        check_peft()
    message = str(error.value)
    assert words in message and f"peft {peft.__version__}" in message
    assert "pip install 'peft>=0.21.2,<0.22'" in message


# --- documentation --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", TREES)
def test_every_module_says_what_it_is(name):
    assert len(ast.get_docstring(TREES[name]) or "") > 20


def public_definitions():
    """Every public module-level function and class, and every public method."""
    for module, tree in TREES.items():
        for node in tree.body:
            if isinstance(node, (ast.FunctionDef, ast.ClassDef)) and not node.name.startswith("_"):
                yield f"{module}.{node.name}", node
                if isinstance(node, ast.ClassDef):
                    for method in node.body:
                        if isinstance(method, ast.FunctionDef) and not method.name.startswith("_"):
                            yield f"{module}.{node.name}.{method.name}", method


def test_every_public_definition_has_a_docstring():
    assert [name for name, node in public_definitions() if not ast.get_docstring(node)] == []


def test_every_public_name_exists_is_sorted_and_is_documented():
    names = peft_residual.__all__
    assert names == sorted(names)
    assert [name for name in names if not inspect.getdoc(getattr(peft_residual, name))] == []


@pytest.mark.parametrize("name", [n for n in peft_residual.__all__ if inspect.isfunction(getattr(peft_residual, n))])
def test_the_docstring_of_a_public_function_names_every_argument(name):
    function = getattr(peft_residual, name)
    missing = [
        arg
        for arg in inspect.signature(function).parameters
        if not re.search(rf"^        {arg}( \(|:)", function.__doc__, re.M)
    ]
    assert missing == []
    assert "Raises:" in function.__doc__


def test_the_package_prints_nothing():
    calls = [
        n.func.id for t in TREES.values() for n in ast.walk(t) if isinstance(n, ast.Call) and hasattr(n.func, "id")
    ]
    assert "print" not in calls


@pytest.mark.parametrize("name", TREES)
def test_a_module_is_read_in_one_sitting(name):
    folder = PACKAGE.parent if name.startswith(COMMAND_LINE.name) else PACKAGE
    assert len((folder / name).read_text(encoding="utf-8").splitlines()) <= 300


def test_inputs_are_not_checked_with_assert():
    """`python -O` removes it."""
    found = [(name, n.lineno) for name, tree in TREES.items() for n in ast.walk(tree) if isinstance(n, ast.Assert)]
    assert found == []


# --- tests ----------------------------------------------------------------------------------------------------------


def imported_test_modules(source):
    """The test modules that a file imports, also in code that it runs in another process."""
    return re.findall(r"^\s*(?:from|import) (test_\w+)", source, re.MULTILINE)


@pytest.mark.parametrize("path", TEST_MODULES, ids=lambda path: path.name)
def test_no_test_module_imports_another(path):
    """What several of them use is in helper modules."""
    assert imported_test_modules(path.read_text()) == []


@pytest.mark.parametrize("code", ("from test_x import y", "def f():\n    import test_x", "import test_x as x"))
def test_an_import_of_a_test_module_is_found(code):
    assert imported_test_modules(f'CODE = """\n{code}\n"""') == imported_test_modules(code) == ["test_x"]

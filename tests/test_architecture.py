"""The shape of the code base, checked on its syntax trees: who may import whom, how long things get, what is banned.

Everything a reader may want to change stands in the tables at the top. A failing test names the file and line.
"""

import ast
import dataclasses
from collections.abc import Iterator
from functools import cache
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
PACKAGES = ("jaxserve", "pallas_kernels", "sharding")

# A module imports lower layers and its own group, nothing else of ours. The longest matching prefix counts.
LAYERS: list[tuple[str, ...]] = [
    ("pallas_kernels",),
    ("sharding",),
    ("jaxserve.version",),
    ("jaxserve.checks", "jaxserve.interpreter"),
    ("jaxserve.sampling_params",),
    ("jaxserve.types",),
    ("jaxserve.distributed",),
    ("jaxserve.config",),
    ("jaxserve.quant",),
    ("jaxserve.kv_cache",),
    ("jaxserve.sums",),
    ("jaxserve.batch",),
    ("jaxserve.layers",),
    ("jaxserve.models",),
    ("jaxserve.checkpoints",),
    ("jaxserve.weights",),
    ("jaxserve.convert",),
    ("jaxserve.tokenizers_gguf", "jaxserve.chat"),
    ("jaxserve.text",),
    ("jaxserve.sampling", "jaxserve.repetition", "jaxserve.inputs"),
    ("jaxserve.engine",),
    ("jaxserve.beam_search",),
    ("jaxserve.llm", "jaxserve.server"),
    ("jaxserve.ray",),
    ("jaxserve",),  # the package itself: its public names
    ("jaxserve.bench",),
    ("jaxserve.cli",),
    ("jaxserve.__main__",),
]
ALONE = ("pallas_kernels", "sharding")  # import nothing of ours outside their own group
WITHOUT_JAX = ("jaxserve.engine.scheduler", "jaxserve.engine.balancer", "jaxserve.engine.pages",
               "jaxserve.engine.queues", "jaxserve.types", "jaxserve.sampling_params",
               "jaxserve.server.router_lifecycle", "jaxserve.server.ending")  # fmt: skip

# Imports of our own code inside functions. The public names and the model registry are lazy so that only what is used
# is loaded; the command line is, so that `--help` and a misspelled flag answer before jax is there.
LAZY = ("jaxserve", "jaxserve.models", "jaxserve.cli.bench", "jaxserve.cli.chat", "jaxserve.cli.compile",
        "jaxserve.cli.convert", "jaxserve.cli.dry_run", "jaxserve.cli.generate", "jaxserve.cli.launch",
        "jaxserve.cli.router", "jaxserve.cli.run_batch", "jaxserve.cli.serve")  # fmt: skip

READS_ENVIRONMENT = ("sharding.launch", "jaxserve.cli")
BANNED_CALLS = ("hasattr", "eval", "exec", "__import__")
BANNED_MODULES = ("pickle", "cPickle", "dill", "cloudpickle", "marshal", "shelve", "torch", "optax")
IMPORT_TIME_CALLS = ("jax.tree_util.register", "tree_util.register")  # all that a module may do when it is imported

FILE_LINES, KERNEL_FILE_LINES = 400, 700
FUNCTION_LINES, KERNEL_FUNCTION_LINES, FUNCTION_P90 = 60, 120, 35
CLASS_METHODS = 25
CONFIG_FIELDS = 30
OWN_ANCESTORS = 1  # our classes above a class of ours

Function = ast.FunctionDef | ast.AsyncFunctionDef


@dataclasses.dataclass(frozen=True)
class Module:
    """One source file: its dotted name, its lines and its syntax tree."""

    name: str
    path: Path
    lines: int
    tree: ast.Module

    @property
    def is_kernel(self) -> bool:
        return self.name.startswith("pallas_kernels")

    @property
    def package(self) -> str:
        return self.name if self.path.name == "__init__.py" else self.name.rpartition(".")[0]

    def at(self, node: ast.AST, what: str) -> str:
        return f"{self.path.relative_to(ROOT)}:{getattr(node, 'lineno', 1)} {what}"

    def functions(self) -> Iterator[Function]:
        return (node for node in ast.walk(self.tree) if isinstance(node, Function))

    def classes(self) -> Iterator[ast.ClassDef]:
        return (node for node in ast.walk(self.tree) if isinstance(node, ast.ClassDef))


@cache
def modules() -> dict[str, Module]:
    found = {}
    for package in PACKAGES:
        for path in sorted((ROOT / package).rglob("*.py")):
            name = ".".join(path.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__")
            text = path.read_text(encoding="utf-8")
            found[name] = Module(name, path, text.count("\n"), ast.parse(text, str(path)))
    return found


def imported(module: Module, node: ast.AST) -> list[str]:
    """Dotted names that an import statement loads; `from package import submodule` is the submodule."""
    if isinstance(node, ast.Import):
        return [alias.name for alias in node.names]
    if not isinstance(node, ast.ImportFrom):
        return []
    parents = module.package.split(".")
    base = ".".join(parents[: len(parents) - node.level + 1]) if node.level else ""
    source = ".".join(filter(None, (base, node.module)))
    names = [f"{source}.{alias.name}" for alias in node.names]
    return [name if name in modules() else source for name in names]


def ours(name: str) -> bool:
    return name.partition(".")[0] in PACKAGES


def own_imports(module: Module) -> set[str]:
    return {name for node in ast.walk(module.tree) for name in imported(module, node) if ours(name)}


def group(name: str) -> str:
    """The longest prefix of a module name that has a place in `LAYERS`."""
    prefixes = [prefix for layer in LAYERS for prefix in layer if f"{name}.".startswith(f"{prefix}.")]
    best = max(prefixes, key=len, default="")
    assert best not in ("", "jaxserve") or name == best, f"{name} has no place in LAYERS of {Path(__file__).name}"
    return best


def level(name: str) -> int:
    return next(i for i, layer in enumerate(LAYERS) if group(name) in layer)


def dotted(node: ast.AST) -> str:
    """`a.b.c` of a name or attribute expression, "" of anything else."""
    if isinstance(node, ast.Name):
        return node.id
    if isinstance(node, ast.Attribute):
        return f"{dotted(node.value)}.{node.attr}"
    return ""


def walk(kind: type[ast.AST] | tuple[type[ast.AST], ...]) -> Iterator[tuple[Module, ast.AST]]:
    return ((module, node) for module in modules().values() for node in ast.walk(module.tree) if isinstance(node, kind))


def report(found: list[str], rule: str) -> None:
    assert not found, rule + "\n  " + "\n  ".join(found)


def test_the_checks_see_the_code():
    assert {"jaxserve.types", "jaxserve.kv_cache", "pallas_kernels.attention"} <= modules().keys()
    assert "jaxserve.sampling_params" in own_imports(modules()["jaxserve.types"])


def test_every_module_imports_only_lower_layers():
    found = []
    for module in modules().values():
        group(module.name)  # it has a place
        for node in ast.walk(module.tree):
            for name in filter(ours, imported(module, node)):
                same = group(name) == group(module.name)
                if not same and (level(name) >= level(module.name) or group(module.name) in ALONE):
                    found.append(module.at(node, f"{module.name} imports {name}"))
    report(found, "Imports must point to a lower layer (see LAYERS):")


def test_imports_have_no_cycle():
    done: set[str] = set()

    def visit(name: str, path: tuple[str, ...]) -> None:
        assert name not in path, "import cycle: " + " -> ".join((*path[path.index(name) :], name))
        if name in done or name not in modules():
            return
        for target in sorted(own_imports(modules()[name]) - {name}):
            visit(target, (*path, name))
        done.add(name)

    for name in modules():
        visit(name, ())


def with_parents(name: str) -> list[str]:
    """A module and the packages whose `__init__` is imported before it."""
    parts = name.split(".")
    return [".".join(parts[: i + 1]) for i in range(len(parts))]


@pytest.mark.parametrize("start", WITHOUT_JAX)
def test_host_modules_never_load_jax(start: str):
    assert start in modules(), f"{start} does not exist"
    seen: set[str] = set()
    todo = with_parents(start)
    found = []
    while todo:
        name = todo.pop()
        if name in seen or name not in modules():
            continue
        seen.add(name)
        module = modules()[name]
        statements = [node for node in ast.walk(module.tree) if not (name in LAZY and inside_function(module, node))]
        targets = [(node, target) for node in statements for target in imported(module, node)]
        found += [module.at(node, f"imports {t}") for node, t in targets if t.partition(".")[0] in ("jax", "flax")]
        if name != "jaxserve":  # the public names under TYPE_CHECKING are not loaded
            todo += [parent for _, target in targets if ours(target) for parent in with_parents(target)]
    report(found, f"{start} must stay free of jax, also through what it imports:")


@cache
def function_nodes(name: str) -> frozenset[int]:
    return frozenset(id(node) for function in modules()[name].functions() for node in ast.walk(function))


def inside_function(module: Module, node: ast.AST) -> bool:
    return id(node) in function_nodes(module.name)


def test_no_import_of_our_own_code_inside_functions():
    found = [
        module.at(node, f"imports {name}")
        for module, node in walk((ast.Import, ast.ImportFrom))
        if module.name not in LAZY and inside_function(module, node)
        for name in imported(module, node)
        if ours(name)
    ]
    report(found, "Import our own modules at the top of the file:")


def test_no_banned_import_or_call():
    found = []
    for module, node in walk((ast.Import, ast.ImportFrom)):
        names = imported(module, node)
        found += [module.at(node, f"imports {name}") for name in names if name.partition(".")[0] in BANNED_MODULES]
    for module, node in walk(ast.Call):
        if isinstance(node, ast.Call) and dotted(node.func) in BANNED_CALLS:
            found.append(module.at(node, f"calls {dotted(node.func)}"))
    report(found, "Banned (give fields defaults instead of asking hasattr; never run or unpickle data):")


def test_environment_is_read_in_two_places_only():
    names = ("os.environ", "os.getenv", "os.putenv", "environ", "getenv")
    found = [
        module.at(node, f"uses {dotted(node)}")
        for module, node in walk((ast.Attribute, ast.Name))
        if dotted(node) in names and module.name not in READS_ENVIRONMENT
    ]
    report(found, f"Only {' and '.join(READS_ENVIRONMENT)} read environment variables:")


def test_no_global_state():
    report([module.at(node, "global") for module, node in walk(ast.Global)], "No `global`; pass state as arguments:")


def test_imports_only_define_names():
    found = []
    for module in modules().values():
        for node in module.tree.body:
            if isinstance(node, ast.Expr) and isinstance(node.value, ast.Call):
                name = dotted(node.value.func)
                if not name.startswith(IMPORT_TIME_CALLS):
                    found.append(module.at(node, f"calls {name or 'something'} when imported"))
    report(found, "Importing a module must have no side effect:")


def test_files_stay_short():
    found = []
    for module in modules().values():
        limit = KERNEL_FILE_LINES if module.is_kernel else FILE_LINES
        if module.lines > limit:
            found.append(module.at(module.tree, f"has {module.lines} lines, at most {limit}"))
    report(found, "Split these files:")


def length(node: Function) -> int:
    return (node.end_lineno or node.lineno) - node.lineno + 1


def test_functions_stay_short():
    found = []
    for module in modules().values():
        limit = KERNEL_FUNCTION_LINES if module.is_kernel else FUNCTION_LINES
        found += [
            module.at(node, f"{node.name} has {length(node)} lines, at most {limit}")
            for node in module.functions()
            if length(node) > limit
        ]
    report(found, "Split these functions:")


def test_nine_of_ten_functions_fit_a_screen():
    lengths = sorted(
        length(node) for module in modules().values() if not module.is_kernel for node in module.functions()
    )
    p90 = lengths[int(0.9 * (len(lengths) - 1))]
    assert p90 <= FUNCTION_P90, f"the 90th percentile of function lengths is {p90} lines, at most {FUNCTION_P90}"


def test_classes_stay_small():
    found = []
    for module in modules().values():
        for node in module.classes():
            methods = sum(isinstance(item, Function) for item in node.body)
            if methods > CLASS_METHODS:
                found.append(module.at(node, f"{node.name} has {methods} methods, at most {CLASS_METHODS}"))
    report(found, "Let these classes hold collaborators:")


def test_inheritance_is_shallow():
    bases = {node.name: [dotted(base).rpartition(".")[2] for base in node.bases] for _, node in walk(ast.ClassDef)}  # type: ignore[attr-defined]

    def own_ancestors(name: str) -> int:
        return max((1 + own_ancestors(base) for base in bases[name] if base in bases and base != name), default=0)

    found = []
    for module in modules().values():
        for node in module.classes():
            if own_ancestors(node.name) > OWN_ANCESTORS or sum(base in bases for base in bases[node.name]) > 1:
                found.append(module.at(node, f"{node.name}({', '.join(bases[node.name])})"))
    report(found, "At most one class of ours above a class, and no mixins:")


def test_engine_config_stays_small():
    from jaxserve.config import EngineConfig

    number = len(dataclasses.fields(EngineConfig))
    assert number <= CONFIG_FIELDS, f"EngineConfig has {number} fields, at most {CONFIG_FIELDS}: choose, or group them"

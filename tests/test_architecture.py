"""The rules of docs/architecture.md that a machine can check: floors, owners of libraries, sizes, names, docstrings, keys."""

import ast
import pathlib
import re
import sys

import pytest

from configs import base

ROOT = pathlib.Path(__file__).parents[1]
PACKAGE = sorted((ROOT / "pgrpo_jax").rglob("*.py"))
CODE = PACKAGE + sorted((ROOT / "launch").rglob("*.py")) + sorted((ROOT / "configs").rglob("*.py"))
TEXTS = CODE + sorted((ROOT / "tests").rglob("*.py")) + sorted((ROOT / "docs").rglob("*.md")) + sorted(ROOT.glob("*.md"))

FLOORS = (
    {"structs", "buckets", "algorithms"},
    {"models", "generation", "tasks", "parallel", "batching", "preemption", "rollout_files", "exchange", "schedule", "verifiers"}
    | {"digests", "weight_versions", "batch_metrics", "curation", "laboratory", "contributions", "batch_files", "compile_cache", "late_record", "packing"},
    {"controller", "checkpoints", "update", "parameter_server", "gradient_shares", "kl_control", "train_state", "optimiser"},
    {"actor", "learner", "learner_settings"},
    {"engines"},
    {"train", "evaluate", "deployment", "assembly", "settings", "placement", "metrics", "run_directory", "step_records", "console"}
    | {"report", "report_sections", "report_page", "charts", "alarms", "metric_table", "algorithm_settings"}
    | {"laboratory_charts"}
    | {"base_policy", "microscope", "microscope_measures", "microscope_charts", "microscope_page", "record", "histories", "policies", "export", "sample"},
)
# importer -> what it may import on its own floor
SAME_FLOOR = {
    "algorithms": {"structs"},
    "generation": {"models"},
    "exchange": {"preemption"},
    "parallel": {"models"},
    "digests": {"parallel"},
    "weight_versions": {"digests"},
    "batching": {"packing"},
    "curation": {"batching"},
    "gradient_shares": {"update"},
    "histories": {"algorithm_settings", "assembly", "microscope", "policies", "run_directory", "settings"},
    "export": {"assembly", "policies", "settings"},
    "sample": {"assembly", "policies", "settings"},
    "policies": {"assembly", "base_policy", "placement", "run_directory", "settings"},
    "record": {"assembly", "policies", "settings", "run_directory"},
    "train_state": {"optimiser"},
    "update": {"optimiser"},
    "learner": {"learner_settings"},
    "settings": {"algorithm_settings"},
    "train": {"deployment", "settings", "evaluate", "step_records", "console", "alarms"},
    "evaluate": {"deployment", "settings", "run_directory", "console"},
    "deployment": {"assembly", "base_policy", "placement", "record", "run_directory"},
    "placement": {"settings"},
    "assembly": {"base_policy", "settings", "algorithm_settings"},
    "alarms": {"metrics"},
    "console": {"metrics", "alarms"},
    "report": {"report_sections", "report_page", "run_directory"},
    "laboratory_charts": {"charts"},
    "microscope_measures": {"microscope"},
    "microscope_charts": {"charts"},
    "microscope_page": {"microscope", "microscope_measures", "microscope_charts", "charts", "report_page", "metrics"},
    "report_sections": {"report_page", "charts", "metrics", "metric_table", "alarms"},
}
ANYWHERE = {"jax", "numpy", "chex", "etils", "absl", "pgrpo_jax"}
FLOOR_0_LIBRARIES = {"jax", "numpy", "chex", "pgrpo_jax", "dataclasses", "typing", "math", "functools"}
OWNERS = {
    "orbax": {"checkpoints", "exchange", "weight_versions", "late_record"},
    "optax": {"optimiser", "update"},
    "xxhash": {"parameter_server"},
    "ray": {"engines"},
    "flax": {"models"},
    "gguf": {"models"},
    "safetensors": {"models"},
    "ml_dtypes": {"models"},
    "tokenizers": {"models"},
    "jinja2": {"models"},
    "tensorflow_datasets": {"tasks"},
    "grain": {"tasks"},
    "sklearn": {"tasks"},
    "threadpoolctl": {"tasks"},
    "ml_collections": {"train", "evaluate", "settings"},
    "rich": {"console"},
    "tensorboardX": {"run_directory"},
    "matplotlib": {"charts", "microscope_charts", "laboratory_charts"},
}
MAX_MODULE_LINES, MAX_FUNCTION_LINES = 300, 40

# "group" alone could mean the completions of a prompt or the people who agree: always "preference group" here. The exceptions: the
# title of the GRPO paper and its quoted word, an operating system's processes, Ray's placement of processes, and the method of a regular expression's match.
GROUP = r"(?<![a-z])groups?(?![a-z])"
QUALIFIED = r"(preference[\s#_-]+|process[\s#_-]+|placement[\s_]+|grpo's [\"“]|\.(?=groups?\())"
EXPLAINED = r"(?!\s+relative\s+policy)"


def parse(path: pathlib.Path) -> ast.Module:
    return ast.parse(path.read_text(), str(path))


def where(path: pathlib.Path) -> str:
    return str(path.relative_to(ROOT))


def component(path: pathlib.Path) -> str:
    """The module, or the folder of modules, that a file of the package belongs to."""
    return path.relative_to(ROOT / "pgrpo_jax").parts[0].removesuffix(".py")


def imports(path: pathlib.Path) -> list[tuple[int, str]]:
    """(line, full dotted name) of everything that a file imports, at the top or inside a function."""
    found = []
    for node in ast.walk(parse(path)):
        if isinstance(node, ast.Import):
            found += [(node.lineno, alias.name) for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{where(path)}:{node.lineno}: write the import in full, not relative"
            found += [(node.lineno, f"{node.module}.{alias.name}") for alias in node.names]
    return found


def floor(name: str) -> int:
    floors = [number for number, names in enumerate(FLOORS) if name in names]
    assert len(floors) == 1, f"pgrpo_jax/{name} has no floor: add it to FLOORS in {where(pathlib.Path(__file__))}"
    return floors[0]


def check(faults: list[str]) -> None:
    assert not faults, "\n" + "\n".join(faults)


def test_imports_only_go_down():
    faults = []
    for path in PACKAGE:
        importer = component(path)
        if importer == "__init__":
            continue
        own = floor(importer)  # a module without a floor fails here, whatever it imports
        for line, name in imports(path):
            parts = name.split(".")
            if parts[0] != "pgrpo_jax" or parts[1] == importer:
                continue
            if floor(parts[1]) >= own and parts[1] not in SAME_FLOOR.get(importer, ()):
                faults.append(f"{where(path)}:{line}: {importer} (floor {own}) imports {parts[1]} (floor {floor(parts[1])})")
    check(faults)


def test_libraries_stay_with_their_owners():
    faults = []
    for path in PACKAGE:
        for line, name in imports(path):
            library = name.split(".")[0]
            if component(path) in FLOORS[0]:
                if library not in FLOOR_0_LIBRARIES:
                    faults.append(f"{where(path)}:{line}: floor 0 is pure maths and records, it may not import {library}")
            elif library not in ANYWHERE | sys.stdlib_module_names and component(path) not in OWNERS.get(library, ()):
                owners = ", ".join(sorted(OWNERS.get(library, ["no module so far"])))
                faults.append(f"{where(path)}:{line}: {library} belongs to {owners}")
    check(faults)


def test_names_and_sizes():
    faults = []
    for path in CODE:
        if re.search(r"util|common|helper|misc", path.stem):
            faults.append(f"{where(path)}: a module is named after what is in it")
        lines = len(path.read_text().splitlines())
        if lines > MAX_MODULE_LINES:
            faults.append(f"{where(path)}: {lines} lines, at most {MAX_MODULE_LINES}")
        for node in ast.walk(parse(path)):
            if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
                first = node.body[1:2] if ast.get_docstring(node) is not None else node.body
                length = node.end_lineno - first[0].lineno + 1 if first else 0
                if length > MAX_FUNCTION_LINES:
                    faults.append(f"{where(path)}:{node.lineno}: {node.name} has {length} lines, at most {MAX_FUNCTION_LINES}")
    check(faults)


def public(body: list[ast.stmt]) -> list[ast.stmt]:
    kinds = ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef
    return [node for node in body if isinstance(node, kinds) and not node.name.startswith("_")]


def test_everything_public_has_a_docstring():
    faults = []
    for path in CODE:
        tree = parse(path)
        if tree.body and not ast.get_docstring(tree):
            faults.append(f"{where(path)}:1: the module has no docstring")
        names = public(tree.body)
        methods = [method for node in names if isinstance(node, ast.ClassDef) for method in public(node.body)]
        faults += [f"{where(path)}:{node.lineno}: {node.name} has no docstring" for node in names + methods if not ast.get_docstring(node)]
    check(faults)


def bare_groups(text: str) -> list[int]:
    """Lines of `text` on which the word stands without what it is a group of."""
    matches = re.finditer(f"{QUALIFIED}?{GROUP}{EXPLAINED}", text, re.IGNORECASE)
    return [text.count("\n", 0, match.start()) + 1 for match in matches if not match[1]]


@pytest.mark.parametrize("bare", ["group", "the Groups", "per_group", "group_ids", "GROUP_SIZE", "in-group", 'the "group"'])
def test_finds_the_bare_word(bare):
    assert bare_groups(f"first line\n{bare}") == [2]


def test_leaves_the_qualified_word():
    fine = ["preference group", "num_preference_groups", "preference\n    # groups", "process group", "GroupLens"]
    fine += ["Group Relative\nPolicy", "m.group(1)", 'GRPO\'s "group"']
    assert [text for text in fine if bare_groups(text)] == []


def test_group_is_always_a_preference_group():
    texts = [path for path in TEXTS if path != pathlib.Path(__file__)]  # this file has to spell what it looks for
    found = [f"{where(path)}:{line}" for path in texts for line in bare_groups(path.read_text())]
    check([f'{place}: say "preference group" or "completions of a prompt"' for place in found])


def test_every_key_is_documented_and_marked():
    faults = [f"configs/base.py: {name} has no doc" for name, key in base.KEYS.items() if not key.doc.strip()]
    for name, key in base.KEYS.items():
        if key.kind not in ("identity", "free"):
            faults.append(f"configs/base.py: {name} is marked {key.kind!r}: identity or free")
    check(faults)

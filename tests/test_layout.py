# Copyright 2026 The HAM authors. Licensed under the Apache License, Version 2.0.
"""Holds the source to short files, short functions and imports without circles."""

import ast
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
SOURCES = sorted(
    path.relative_to(ROOT)
    for folder in ("ham_hf", "kernels", "tests", "conversion_scripts", "model_cards")
    for path in (ROOT / folder).rglob("*.py")
)
LONGEST_FILE = 600
LONGEST_FUNCTION = 60


def function_lines(function):
    """Lines of a function's body without its docstring."""
    body = function.body[1:] if ast.get_docstring(function) is not None else function.body
    return body[-1].end_lineno - body[0].lineno + 1 if body else 0


def long_functions(text):
    """Functions of this text that are too long, with their lines."""
    functions = [x for x in ast.walk(ast.parse(text)) if isinstance(x, ast.FunctionDef | ast.AsyncFunctionDef)]
    return {x.name: lines for x in functions if (lines := function_lines(x)) > LONGEST_FUNCTION}


def module_name(path):
    """The name under which a file is imported, from the folder of its package."""
    parts = path.with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


def imported(path, text, modules):
    """The `modules` that a file imports, wherever in it; those only for type checkers are left out."""
    tree = ast.parse(text)
    for node in ast.walk(tree):
        if (
            isinstance(node, ast.If)
            and "TYPE_CHECKING" in ast.unparse(node.test)
            and " or " not in ast.unparse(node.test)
        ):
            node.body = []
    package = path.parent.parts
    found = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            above = package[: len(package) - node.level + 1] if node.level else ()
            module = ".".join([*above, *([node.module] if node.module else [])])
            names = {f"{module}.{alias.name}" for alias in node.names}
            found |= {name if name in modules else module for name in names}
    return found & modules - {module_name(path)}


def circles(graph):
    """The part of a graph of imports, by name, that lies on a circle or between two."""
    left = {name: set(imports) for name, imports in graph.items()}
    while left:
        needed = set().union(*left.values())
        ends = {name for name, imports in left.items() if not imports & left.keys() or name not in needed}
        if not ends:
            break
        left = {name: imports for name, imports in left.items() if name not in ends}
    return left


@pytest.mark.parametrize("path", SOURCES, ids=str)
def test_files_and_functions_are_short(path):
    text = (ROOT / path).read_text(encoding="utf-8")
    assert len(text.splitlines()) <= LONGEST_FILE
    assert not long_functions(text)


@pytest.mark.parametrize("package", ["ham_hf", "kernels/torch-ext/ham_kernels", "model_cards"])
def test_imports_form_no_circle(package):
    top = (ROOT / package).parent
    files = {path.relative_to(top) for path in (ROOT / package).rglob("*.py")}
    modules = {module_name(path) for path in files}
    graph = {module_name(x): imported(x, (top / x).read_text(encoding="utf-8"), modules) for x in files}
    assert not circles(graph)


def test_a_long_function_is_found_whatever_its_docstring():
    body = "    x = 1\n" * LONGEST_FUNCTION
    assert long_functions(f"def f():\n{body}    x = 1\n") == {"f": LONGEST_FUNCTION + 1}
    docstring = '    """Short.\n\n    Long.\n    """\n'
    assert not long_functions(f"def f():\n{docstring}{body}")


def test_a_circle_is_found():
    modules = {"p.a", "p.b", "p.c", "p"}
    a, b, c = Path("p/a.py"), Path("p/b.py"), Path("p/c.py")
    texts = {a: "from .b import x", b: "def f():\n    from . import a", c: "import p.a"}
    graph = {module_name(path): imported(path, text, modules) for path, text in texts.items()}
    assert graph == {"p.a": {"p.b"}, "p.b": {"p.a"}, "p.c": {"p.a"}}
    assert circles(graph).keys() == {"p.a", "p.b"}
    texts[b] = "if TYPE_CHECKING:\n    from .a import y"
    assert not circles({module_name(path): imported(path, text, modules) for path, text in texts.items()})

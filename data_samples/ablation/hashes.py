"""Hashes of code and data, by which finished runs are found again."""
import ast
import hashlib
from pathlib import Path


def syntax(node) -> str:
    """A syntax tree as text, without docstrings and line numbers."""
    if isinstance(node, list):
        return "[" + " ".join(map(syntax, node)) + "]"
    if not isinstance(node, ast.AST):
        return repr(node)
    text = type(node).__name__
    for name, value in ast.iter_fields(node):
        if name == "body" and isinstance(node, (ast.Module, ast.ClassDef, ast.FunctionDef)):
            if ast.get_docstring(node, clean=False) is not None:
                value = value[1:]
        # Each version of Python adds fields that are empty in older code.
        if value is not None and value != []:
            text += f" {name}={syntax(value)}"
    return f"({text})"

def code_hash(path: str | Path) -> str:
    """Of a Python file. Comments, blank lines and docstrings do not change it."""
    return hash_of(syntax(ast.parse(Path(path).read_text(encoding="utf-8"), path)))

def hash_of(*parts) -> str:
    return hashlib.sha256(repr(parts).encode()).hexdigest()[:16]

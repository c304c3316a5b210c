"""Hashes of code and data, by which finished runs are found again."""
import ast
import hashlib
from pathlib import Path

import perl

HERE = Path(__file__).resolve().parent

def base_hash() -> str:
    """Of what all arms share: perl.py, how it is measured, the samples, the start model."""
    parts = [code_hash(perl.__file__), code_hash(HERE / "measure.py")]
    for pattern in ("train.jsonl", "test.jsonl", "images/*", "tiny/*"):
        for path in sorted(HERE.parent.glob(pattern)):
            parts += [path.name, path.read_bytes()]
    return hash_of(*parts)

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

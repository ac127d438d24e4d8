"""A hash of a function's source: the same in every version of Python, and anywhere in a file.

Comments, layout, docstrings and type annotations do not count. Where the source of a function
cannot be found, or is not what runs (code made by ``exec``, a file edited since it was imported),
its bytecode is hashed instead; such a hash names the one version of Python that it holds for.
"""

import ast
import hashlib
import inspect
import sys
import textwrap
from collections.abc import Iterator
from functools import lru_cache
from types import CodeType, FunctionType
from typing import Any

Definition = ast.FunctionDef | ast.AsyncFunctionDef | ast.Lambda
Position = tuple[int, int]
# fields of the syntax tree that do not change what is computed
IGNORED = {"annotation", "returns", "type_comment", "type_params", "kind", "ctx"}


def source_hash(function: FunctionType, owner: type | None = None) -> str:
    """A hash of what a function computes, 16 hexadecimal digits.

    Args:
        function: one written in Python.
        owner: its class, whose source counts where the function has none: that of a dataclass,
            whose ``__init__`` is generated.

    Returns:
        The hash of the source; where there is none, ``"Python 3.12 bytecode: ..."``.
    """
    node: ast.AST | None = _definition(function.__code__)
    if node is None and owner is not None:
        node = _class_definition(owner)
    if node is not None:
        return _digest(_text(node))
    version = f"{sys.version_info[0]}.{sys.version_info[1]}"
    return f"Python {version} bytecode: {bytecode_hash(function.__code__)}"


def bytecode_hash(code: CodeType) -> str:
    """A hash of compiled code, without its position and layout."""
    parts = [code.co_code.hex()]
    for item in (*code.co_consts, code.co_names, code.co_varnames):
        if isinstance(item, CodeType):
            parts.append(bytecode_hash(item))
        else:
            # the order of a set differs between processes
            parts.append(
                str(sorted(map(repr, item))) if isinstance(item, frozenset) else repr(item)
            )
    return _digest("".join(parts))


def _digest(text: str) -> str:
    return hashlib.sha256(text.encode("utf-8", "surrogatepass")).hexdigest()[:16]


def _definition(code: CodeType) -> Definition | None:
    """The definition that code was compiled from; None if that is not certain."""
    try:
        lines, _ = inspect.findsource(code)
        tree, compiled = _parsed("".join(lines))
    except (OSError, SyntaxError, ValueError, TypeError):
        return None
    if (code.co_name, code.co_firstlineno, bytecode_hash(code)) not in compiled:
        return None  # the file has been edited since
    kind = ast.Lambda if code.co_name == "<lambda>" else (ast.FunctionDef, ast.AsyncFunctionDef)
    found = [
        node
        for node in ast.walk(tree)
        if isinstance(node, kind)
        and _first_line(node) == code.co_firstlineno
        and getattr(node, "name", "<lambda>") == code.co_name
    ]
    if len(found) > 1:
        found = _around_positions(found, code)
    return found[0] if len(found) == 1 else None


@lru_cache(maxsize=16)
def _parsed(text: str) -> tuple[ast.Module, set[tuple[str, int, str]]]:
    """The syntax tree of a file, and the code in it by name, first line and hash."""
    tree = ast.parse(text)
    whole = compile(tree, "<source>", "exec", dont_inherit=True)
    found = {(code.co_name, code.co_firstlineno, bytecode_hash(code)) for code in nested(whole)}
    return tree, found


def nested(code: CodeType) -> Iterator[CodeType]:
    """Code, and all code within it: of inner functions, lambdas and comprehensions."""
    yield code
    for item in code.co_consts:
        if isinstance(item, CodeType):
            yield from nested(item)


def _first_line(node: Definition) -> int:
    decorators = [] if isinstance(node, ast.Lambda) else node.decorator_list
    return min([node.lineno, *(decorator.lineno for decorator in decorators)])


def _around_positions(nodes: list[Definition], code: CodeType) -> list[Definition]:
    """Of several lambdas in a line, the innermost around all of the code's own positions."""
    if not hasattr(code, "co_positions"):  # Python 3.10
        return nodes
    spans = [
        ((line, start), (last, end))
        for line, last, start, end in code.co_positions()
        if line is not None and start is not None and end  # else it is of no text
    ]
    if not spans:
        return nodes
    first, last = min(start for start, _ in spans), max(end for _, end in spans)
    around = [node for node in nodes if _start(node) <= first and last <= _end(node)]
    return sorted(around, key=_start)[-1:]


def _start(node: Any) -> Position:
    return (node.body.lineno, node.body.col_offset)


def _end(node: Any) -> Position:
    return (node.body.end_lineno, node.body.end_col_offset)


def _class_definition(owner: type) -> ast.ClassDef | None:
    try:
        lines, _ = inspect.getsourcelines(owner)
        tree, _ = _parsed(textwrap.dedent("".join(lines)))
    except (OSError, SyntaxError, ValueError, TypeError):
        return None
    (node,) = tree.body
    return node if isinstance(node, ast.ClassDef) else None


def _text(node: Any) -> str:
    """A syntax tree as text, without what changes nothing; the same in all versions of Python."""
    if isinstance(node, list):
        return "[" + ",".join(_text(item) for item in node if not _is_docstring(item)) + "]"
    if not isinstance(node, ast.AST):
        return repr(node)
    fields = {name: value for name, value in ast.iter_fields(node) if name not in IGNORED}
    if isinstance(node, ast.JoinedStr):  # Python 3.12 adds empty parts to f-strings
        fields["values"] = [part for part in node.values if getattr(part, "value", None) != ""]
    # newer versions have more fields, and leave out those that are empty
    written = [f"{k}={_text(v)}" for k, v in fields.items() if v is not None and v != []]
    return f"{type(node).__name__}({','.join(written)})"


def _is_docstring(node: Any) -> bool:
    if isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant):
        return isinstance(node.value.value, str)
    return False

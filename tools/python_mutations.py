"""Small mistakes that a program can make in a Python module: what ``mutate_host`` puts in, one at a time."""

from __future__ import annotations

import ast
import copy
from collections.abc import Iterator
from dataclasses import dataclass

__all__ = ["Mutation", "mutations", "with_mutation"]

_COMPARISONS: dict[type[ast.cmpop], type[ast.cmpop]] = {
    ast.Lt: ast.LtE, ast.LtE: ast.Lt, ast.Gt: ast.GtE, ast.GtE: ast.Gt, ast.Eq: ast.NotEq, ast.NotEq: ast.Eq,
    ast.Is: ast.IsNot, ast.IsNot: ast.Is, ast.In: ast.NotIn, ast.NotIn: ast.In,
}  # fmt: skip
_ARITHMETIC: dict[type[ast.operator], type[ast.operator]] = {
    ast.Add: ast.Sub, ast.Sub: ast.Add, ast.Mult: ast.Add, ast.FloorDiv: ast.Mult, ast.Div: ast.Mult,
    ast.Mod: ast.FloorDiv, ast.LShift: ast.RShift, ast.RShift: ast.LShift, ast.BitOr: ast.BitAnd, ast.BitAnd: ast.BitOr,
}  # fmt: skip
_SYMMETRIC = {"max", "min"}  # functions whose arguments may change places
_NOT_RUN = {"annotation", "returns", "decorator_list", "type_params"}
_TEXT = (ast.JoinedStr, ast.Assert, ast.Import, ast.ImportFrom)  # messages, and what has no mutation
_ASSERTIONS = {"strict"}  # arguments that only check what holds anyway: of zip


@dataclass(frozen=True)
class Mutation:
    """One edit of a module. number: among the module's edits; first, last: lines of the statement it is in.

    local: whether it is inside a function, so that only calls of that function run it; constant: the name that the
    module gives the value it is in, "" for none.
    """

    number: int
    first: int
    last: int
    local: bool
    before: str
    after: str
    constant: str = ""

    def __str__(self) -> str:
        return f"{self.first}: `{_brief(self.before)}` -> `{_brief(self.after)}`"


@dataclass(frozen=True)
class _Site:
    node: ast.AST
    first: int
    last: int
    local: bool
    constant: str = ""


def mutations(source: str) -> list[Mutation]:
    """Every edit of a module's text."""
    return [
        Mutation(i, site.first, site.last, site.local, ast.unparse(site.node), ast.unparse(new), site.constant)
        for i, (site, new) in enumerate(_edits(ast.parse(source)))
    ]


def with_mutation(source: str, number: int) -> ast.Module:
    """The module with one of its edits made, ready to be compiled."""
    tree = ast.parse(source)
    site, new = list(_edits(tree))[number]
    _Replace(site.node, new).visit(tree)
    return ast.fix_missing_locations(tree)


class _Replace(ast.NodeTransformer):
    def __init__(self, old: ast.AST, new: ast.AST) -> None:
        self._old, self._new = old, new

    def visit(self, node: ast.AST) -> ast.AST:
        return ast.copy_location(self._new, node) if node is self._old else self.generic_visit(node)


def _edits(tree: ast.Module) -> Iterator[tuple[_Site, ast.AST]]:
    for site in _sites(tree, _Site(tree, 1, 1, False)):
        for new in _variants(site.node):
            yield site, new


def _sites(node: ast.AST, around: _Site) -> Iterator[_Site]:
    """The nodes that run, each with the lines of its statement; of a compound statement those of its head."""
    for name, value in ast.iter_fields(node):
        if name in _NOT_RUN:
            continue
        for child in value if isinstance(value, list) else [value]:
            if not isinstance(child, ast.AST) or _untouched(child):
                continue
            local = around.local or isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef, ast.Lambda))
            site = _Site(child, around.first, around.last, local and name != "args", around.constant)
            if isinstance(child, ast.stmt):
                body = getattr(child, "body", None)
                last = body[0].lineno - 1 if body else child.end_lineno or child.lineno
                constant = _constant(child) if isinstance(node, ast.Module) else ""
                site = _Site(child, child.lineno, max(child.lineno, last), local, constant)
            yield site
            yield from _sites(child, site)


def _constant(statement: ast.stmt) -> str:
    match statement:
        case ast.Assign(targets=[ast.Name(id=name)]) | ast.AnnAssign(target=ast.Name(id=name)):
            return name
    return ""


def _untouched(node: ast.AST) -> bool:
    """Documentation, messages, logs, lists of public names, assertions, and what is for type checkers."""
    match node:
        case ast.Expr(value=ast.Constant()):
            return True
        case ast.Expr(value=ast.Call(func=ast.Attribute(value=ast.Name(id="_log")))):
            return True
        case ast.Assign(targets=[ast.Name(id="__all__" | "__slots__")]):
            return True
        case ast.If(test=ast.Name(id="TYPE_CHECKING")):
            return True
        case ast.keyword(arg=str() as name) if name in _ASSERTIONS:
            return True
    return isinstance(node, _TEXT)


def _variants(node: ast.AST) -> Iterator[ast.AST]:
    yield from _wrong_statements(node)
    yield from _wrong_expressions(node)


def _wrong_statements(node: ast.AST) -> Iterator[ast.AST]:
    match node:
        case ast.Expr(value=ast.Call()) | ast.AugAssign() | ast.Raise() | ast.Delete():
            yield ast.Pass()
        case ast.Return(value=ast.expr() as value) if not (isinstance(value, ast.Constant) and value.value is None):
            yield ast.Return(value=ast.Constant(None))
        case ast.Continue():
            yield ast.Break()
        case ast.Break():
            yield ast.Continue()


def _wrong_expressions(node: ast.AST) -> Iterator[ast.AST]:
    match node:
        case ast.Compare(ops=ops):
            for i, op in enumerate(ops):
                yield _changed(node, ops=[*ops[:i], _COMPARISONS[type(op)](), *ops[i + 1 :]])
        case ast.BoolOp(op=op):
            yield _changed(node, op=ast.Or() if isinstance(op, ast.And) else ast.And())
        case ast.UnaryOp(op=ast.Not() | ast.USub(), operand=operand):
            yield operand
        case ast.BinOp(op=op) if type(op) in _ARITHMETIC:
            yield _changed(node, op=_ARITHMETIC[type(op)]())
        case ast.Constant(value=bool() as value):
            yield ast.Constant(not value)
        case ast.Constant(value=int() | float() as value):
            yield ast.Constant(value + 1)
        case ast.IfExp(body=body, orelse=orelse):
            yield _changed(node, body=orelse, orelse=body)
        case ast.Call(args=[first, second, *rest]) if not any(isinstance(a, ast.Starred) for a in (first, second)):
            if ast.dump(first) != ast.dump(second) and ast.unparse(node.func) not in _SYMMETRIC:
                yield _changed(node, args=[second, first, *rest])


def _changed(node: ast.AST, **fields: object) -> ast.AST:
    new = copy.copy(node)
    vars(new).update(fields)
    return new


def _brief(text: str) -> str:
    line = " ".join(text.split())
    return line if len(line) <= 70 else f"{line[:67]}..."

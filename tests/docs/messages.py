"""What llmpipe says to its users, read from its sources, with \\0 where something is filled in."""

import ast
from functools import cache
from itertools import product

from commands import REPOSITORY

Named = dict[str, list[ast.expr]]
"""What a constant, or a call of a function, may be."""


def texts() -> list[str]:
    """Every text in the sources and the Makefile."""
    found = [(REPOSITORY / "Makefile").read_text()]
    for tree in trees():
        for node in ast.walk(tree):
            if isinstance(node, ast.JoinedStr):
                found.append(
                    "".join(str(part.value) if isinstance(part, ast.Constant) else "\0" for part in node.values)
                )
            elif isinstance(node, ast.Constant) and isinstance(node.value, str):
                found.append(node.value)
    return found


@cache
def errors() -> list[str]:
    """Every message of a UserError, in each of its wordings."""
    everywhere = {name: values for tree in trees() for name, values in named(tree).items()}
    found = []
    for tree in trees():
        known = everywhere | named(tree)
        for node in ast.walk(tree):
            match node:
                case ast.Call(func=ast.Name(id="UserError" | "OtherShape"), args=[message, *_]):
                    found += wordings(message, known)
    return found


@cache
def trees() -> list[ast.Module]:
    return [ast.parse(file.read_text()) for file in sorted((REPOSITORY / "src").rglob("*.py"))]


def named(tree: ast.Module) -> Named:
    """A module's constants, and what its functions return."""
    found: Named = {}
    for node in tree.body:
        match node:
            case ast.Assign(targets=[ast.Name(id=name)], value=value):
                found[name] = [value]
            case ast.FunctionDef(name=name):
                found[name] = [line.value for line in ast.walk(node) if isinstance(line, ast.Return) and line.value]
    return found


def wordings(text: ast.expr, known: Named) -> list[str]:
    """What an expression may say: of a choice both, of a constant its text, of a call what the function returns."""
    match text:
        case ast.Constant(value=str(said)):
            return [said]
        case ast.JoinedStr(values=parts):
            return ["".join(said) for said in product(*(wordings(part, known) for part in parts))]
        case ast.BinOp(left=left, right=right):
            return ["".join(said) for said in product(wordings(left, known), wordings(right, known))]
        case ast.FormattedValue(value=value):
            return wordings(value, known)
        case ast.IfExp(body=one, orelse=other):
            return wordings(one, known) + wordings(other, known)
        case ast.Name(id=name) | ast.Attribute(attr=name) if name.isupper() and name in known:
            return [said for value in known[name] for said in wordings(value, known)]
        case ast.Call(func=ast.Name(id=name) | ast.Attribute(value=ast.Name(), attr=name)) if name in known:
            inner = {other: values for other, values in known.items() if other != name}
            return [said for value in known[name] for said in wordings(value, inner)] or ["\0"]
    return ["\0"]

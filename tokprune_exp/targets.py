"""What a `_target_` of the configuration takes, read from its source: importing it, with torch, costs seconds."""

import ast
import difflib
from collections.abc import Iterable
from dataclasses import dataclass
from functools import cache
from importlib.util import find_spec
from pathlib import Path


@dataclass(frozen=True)
class Parameter:
    """One argument of a constructor; `annotation` is None where the source gives none."""

    name: str
    required: bool
    annotation: ast.expr | None


@dataclass(frozen=True)
class Constructor:
    """The arguments of a class or function; `open_ended` if it takes any further ones by name."""

    name: str
    parameters: tuple[Parameter, ...]
    open_ended: bool = False

    @property
    def names(self) -> list[str]:
        """Names of the arguments in the order of the source."""
        return [parameter.name for parameter in self.parameters]


def constructor(target: str) -> Constructor:
    """Find what `target`, a dotted path, takes.

    Raises:
        LookupError: No module, or no class or function in it, has that name; the message says which.
    """
    file, name = _module_file(target)
    file, definition = _definition(file, name)
    return _signature(file, definition)


def nearest(word: str, words: Iterable[str]) -> str | None:
    """The one of `words` that `word` was probably meant to be."""
    return next(iter(difflib.get_close_matches(word, list(words), n=1, cutoff=0.6)), None)


def hint(name: str, known: Iterable[str]) -> str:
    """What to write instead of a `name` that is none of the `known`: the nearest of them, or what there is."""
    known = [other for other in known if not other.startswith("_")]
    guess = nearest(name, known)
    return f"did you mean {guess}?" if guess else f"it has {', '.join(sorted(known)) or 'none'}"


def mismatch(value: object, annotation: ast.expr | None) -> list[str]:
    """What `annotation` allows, in words, if the plain `value` is not that; empty if it is, or if that is not known.

    Known are int, float, bool, str, None, Literal, list and unions of them. A dictionary may become any object.
    """
    members = _union(annotation)
    known = [member for member in members if _is_known(member)]
    if all(_is_none(member) for member in known) or isinstance(value, dict):
        return []
    if any(_accepts(member, value) for member in known):
        return []
    return [words for member in known for words in _words(member)]


def _module_file(target: str) -> tuple[Path, str]:
    """The file of the longest prefix of `target` that is a module, and the name looked for in it."""
    top, *rest = target.split(".")
    spec = find_spec(top)
    if spec is None or not spec.submodule_search_locations:
        raise LookupError(f"there is no package {top}")
    place = Path(next(iter(spec.submodule_search_locations)))
    while len(rest) > 1 and (place / rest[0]).is_dir():
        place /= rest.pop(0)
    file = place / "__init__.py"
    if len(rest) > 1 and (place / f"{rest[0]}.py").is_file():
        file = place / f"{rest.pop(0)}.py"
    if len(rest) != 1 or not file.is_file():
        raise LookupError(f"there is no module {target.rpartition('.')[0]}")
    return file, rest[0]


@cache
def _parsed(file: Path) -> ast.Module:
    return ast.parse(file.read_text(encoding="utf-8"))


def _definition(file: Path, name: str) -> tuple[Path, ast.ClassDef | ast.FunctionDef]:
    """The class or function called `name` in `file`, or in the module that `file` imports it from."""
    for node in _parsed(file).body:
        if isinstance(node, ast.ClassDef | ast.FunctionDef) and node.name == name:
            return file, node
        if isinstance(node, ast.ImportFrom):
            for alias in node.names:
                if (alias.asname or alias.name) == name:
                    return _definition(*_imported(file, node, alias.name))
    known = [node.name for node in _parsed(file).body if isinstance(node, ast.ClassDef)]
    hint = f"; it has {', '.join(known)}" if known else ""
    raise LookupError(f"there is no {name} in {file.parent.name}/{file.name}{hint}")


def _imported(file: Path, node: ast.ImportFrom, name: str) -> tuple[Path, str]:
    """The file that a `from … import name` in `file` reads, and the name in it."""
    if not node.level:
        return _module_file(f"{node.module}.{name}")
    place = file.parents[node.level - 1].joinpath(*(node.module or "").split("."))
    module = place.with_suffix(".py")
    return (module if module.is_file() else place / "__init__.py"), name


def _signature(file: Path, definition: ast.ClassDef | ast.FunctionDef) -> Constructor:
    if isinstance(definition, ast.FunctionDef):
        return _arguments(definition.name, definition.args)
    for node in definition.body:
        if isinstance(node, ast.FunctionDef) and node.name == "__init__":
            arguments = _arguments(definition.name, node.args)
            return Constructor(definition.name, arguments.parameters[1:], arguments.open_ended)
    inherited: list[Parameter] = []
    for base in definition.bases:
        if isinstance(base, ast.Name):
            try:
                inherited += _signature(*_definition(file, base.id)).parameters
            except LookupError:  # a built-in, or a package that is not installed
                continue
    if any("dataclass" in ast.unparse(decorator) for decorator in definition.decorator_list):
        inherited += [
            Parameter(node.target.id, node.value is None, node.annotation)
            for node in definition.body
            if isinstance(node, ast.AnnAssign) and isinstance(node.target, ast.Name)
        ]
    return Constructor(definition.name, tuple(inherited))


def _arguments(name: str, arguments: ast.arguments) -> Constructor:
    positional = arguments.posonlyargs + arguments.args
    required = len(positional) - len(arguments.defaults)
    parameters = [Parameter(argument.arg, i < required, argument.annotation) for i, argument in enumerate(positional)]
    parameters += [
        Parameter(argument.arg, default is None, argument.annotation)
        for argument, default in zip(arguments.kwonlyargs, arguments.kw_defaults, strict=True)
    ]
    return Constructor(name, tuple(parameters), arguments.kwarg is not None)


def _union(annotation: ast.expr | None) -> list[ast.expr]:
    """The members of `A | B`, `Union[A, B]` or `Optional[A]`; any other annotation is its own only member."""
    match annotation:
        case None:
            return []
        case ast.Constant(value=str(source)):
            return _union(ast.parse(source, mode="eval").body)
        case ast.BinOp(left=left, right=right):
            return _union(left) + _union(right)
        case ast.Subscript(value=ast.Name(id="Union"), slice=ast.Tuple(elts=elements)):
            return [member for element in elements for member in _union(element)]
        case ast.Subscript(value=ast.Name(id="Optional"), slice=inner):
            return [*_union(inner), ast.Constant(None)]
    return [annotation]


def _is_none(member: ast.expr) -> bool:
    return isinstance(member, ast.Constant) and member.value is None


def _is_known(member: ast.expr) -> bool:
    match member:
        case ast.Name(id="int" | "float" | "bool" | "str") | ast.Subscript(value=ast.Name(id="Literal" | "list")):
            return True
    return _is_none(member)


def _accepts(member: ast.expr, value: object) -> bool:
    match member:
        case ast.Name(id="float"):
            return type(value) in (int, float)
        case ast.Name(id=name):
            return type(value).__name__ == name
        case ast.Subscript(value=ast.Name(id="Literal")):
            return any(value == choice and type(value) is type(choice) for choice in _choices(member))
        case ast.Subscript(slice=element):
            return isinstance(value, list) and not any(mismatch(item, element) for item in value)
    return value is None


def _choices(literal: ast.Subscript) -> list[object]:
    elements = literal.slice.elts if isinstance(literal.slice, ast.Tuple) else [literal.slice]
    return [ast.literal_eval(element) for element in elements]


def _words(member: ast.expr) -> list[str]:
    match member:
        case ast.Subscript(value=ast.Name(id="Literal")):
            return [str(choice) for choice in _choices(member)]
    return ["null" if _is_none(member) else ast.unparse(member)]

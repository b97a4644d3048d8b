"""What an archive of `torch.export` may hold before torch is let near it: numbers, JSON, arithmetic, tensor operations.

Torch itself would unpickle what an archive asks it to, run compiled code, evaluate the expressions in which shapes are
written as Python, and call any function of its own package by name.
"""

from __future__ import annotations

import ast
import json
import re
import zipfile
from io import BytesIO
from typing import Any

import torch

from orchestrator.errors import InputError

MEMBERS = re.compile(
    r"data/(weights/weight_\d+|constants/tensor_\d+|(weights|constants)/model_\w+_config\.json)"
    r"|models/model\.json|data/sample_inputs/model\.pt|archive_format|archive_version|byteorder|\.data/\w+"
)
"""Those that are read. Sample inputs are a pickle, so that only an empty file of them is let through."""

FUNCTIONS = (
    *("Symbol", "Integer", "Rational", "Add", "Mul", "Pow", "Max", "Min"),
    *("Mod", "PythonMod", "FloorDiv", "CleanDiv", "CeilDiv", "IntTrueDiv"),
)
"""What shapes may be computed with."""

_ARITHMETIC = (ast.Expression, ast.BinOp, ast.UnaryOp, ast.Name, ast.keyword, ast.operator, ast.unaryop, ast.Load)
_OPERATION = re.compile(r"torch\.ops\.(?P<space>[a-z]\w*)\.\w+(\.\w+)?|torch\.sym_\w+|math\.\w+|_operator\.\w+")
_CALLS = ("_operator.call", "_operator.methodcaller", "_operator.attrgetter")


def refuse_code(content: bytes) -> None:
    """Refuse an archive that holds anything else.

    Raises:
        InputError: naming the member, expression or operation; or this is no such archive.
    """
    try:
        with zipfile.ZipFile(BytesIO(content)) as archive:
            members = archive.infolist()
            for member in members:
                name = member.filename.partition("/")[2]
                pickled = name.startswith("data/sample_inputs/") and member.file_size > 0
                if pickled or not MEMBERS.fullmatch(name):
                    raise InputError(f"the archive holds {name!r}, which may run code and is not read")
            for member in members:
                if member.filename.endswith(".json"):
                    _refuse_words(json.loads(archive.read(member)))
    except InputError:
        raise
    except (zipfile.BadZipFile, ValueError, RecursionError) as error:
        raise InputError(f"this is no archive of torch.export ({error})") from error


def _refuse_words(document: Any) -> None:
    if isinstance(document, list):
        for part in document:
            _refuse_words(part)
    elif isinstance(document, dict):
        if document.get("use_pickle"):
            raise InputError("the archive holds a pickled tensor, which is not read")
        for name, part in document.items():
            if name == "expr_str" and not _is_arithmetic(part):
                raise InputError(f"the archive holds the expression {str(part)[:60]!r}, which is not read")
            if name in ("target", "as_operator") and isinstance(part, str) and not _is_operation(part):
                raise InputError(f"the archive calls {part[:60]!r}, which is no operation on tensors")
            _refuse_words(part)


def _is_arithmetic(expression: Any) -> bool:
    try:
        tree = ast.parse(expression, mode="eval")
    except (SyntaxError, TypeError, ValueError):
        return False
    return all(
        isinstance(node, _ARITHMETIC)
        or (isinstance(node, ast.Constant) and re.fullmatch(r"\w+", str(node.value)))
        or (isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and node.func.id in FUNCTIONS)
        for node in ast.walk(tree)
    )


def _is_operation(target: str) -> bool:
    """Whether a name is that of a tensor operation, or none that torch would look up."""
    if not target.startswith(("torch.", "math.", "_operator.", "#")):
        return True  # of a parameter, say
    found = _OPERATION.fullmatch(target)
    return found is not None and target not in _CALLS and found["space"] not in dir(type(torch.ops))

"""Arithmetic in descriptions: `"num_attention_heads * head_dim"` with the values of a config.

Whole numbers, names of settings, `+ - * //` and brackets; nothing else is evaluated.
"""

from __future__ import annotations

import ast
import functools
import operator
from collections.abc import Mapping
from typing import Any

_OPERATORS = {
    ast.Add: operator.add,
    ast.Sub: operator.sub,
    ast.Mult: operator.mul,
    ast.FloorDiv: operator.floordiv,
}


def size(expression: str, settings: Mapping[str, Any]) -> int:
    """The value of an expression.

    Raises:
        ValueError: it holds anything but the above.
        KeyError: a name that is no setting.
    """
    return _value(_parsed(expression), expression, settings)


def names(expression: str) -> list[str]:
    """The settings that an expression reads, in order."""
    return [node.id for node in ast.walk(_parsed(expression)) if isinstance(node, ast.Name)]


@functools.cache
def _parsed(expression: str) -> ast.expr:
    try:
        return ast.parse(expression, mode="eval").body
    except SyntaxError as error:
        raise ValueError(f"{expression!r} is no arithmetic: {error.msg}") from None


def _value(node: ast.expr, whole: str, settings: Mapping[str, Any]) -> int:
    if isinstance(node, ast.Constant) and type(node.value) is int:
        return node.value
    if isinstance(node, ast.Name):
        return settings[node.id]
    if isinstance(node, ast.BinOp) and type(node.op) in _OPERATORS:
        return _OPERATORS[type(node.op)](_value(node.left, whole, settings), _value(node.right, whole, settings))
    raise ValueError(f"{whole!r}: only whole numbers, names, + - * // and brackets are evaluated")

r"""The exact value of a closed form: numerals, + - * / ^ !, `\frac`, `\binom` and brackets."""

import ast
import math
import operator
import re
from fractions import Fraction

BITS = 14_000  # of a numerator or denominator: 4,214 digits, and Python writes no more than 4,300
LONGEST = 1000  # characters

# A second + never goes back: no text takes long.
_NUMERAL = re.compile(r"(?:\d++\.?+\d*+|\.\d++)(?:[eE][+-]?\d{1,3}+)?+", re.ASCII)
_ALLOWED = re.compile(
    rf"(?:{_NUMERAL.pattern}|\\(?:frac|binom|cdot|times|div)(?![a-zA-Z])|[-+*/^!(){{}} ])++", re.ASCII
)
_THOUSANDS = re.compile(r"(?<![\d.,])\d{1,3}(?:[, ]\d{3})+(?![\d,])", re.ASCII)
_MIXED = re.compile(r"(?<![\d.^])(\d+)(?: ?\\frac\{(\d+)\}\{(\d+)\}| (\d+) ?/ ?(\d+))", re.ASCII)
_FACTORIAL = re.compile(r"(\d+|\((?:[^()]|\([^()]*\))*\))!(?!!)", re.ASCII)
_PYTHON = [("{", "("), ("}", ")"), ("^", "**"), (r"\cdot", "*"), (r"\times", "*"), (r"\div", "/"), ("\\", "")]
_OPERATORS = {
    ast.Add: operator.add, ast.Sub: operator.sub, ast.Mult: operator.mul, ast.Div: operator.truediv
}  # fmt: skip


def closed_form(text: str) -> Fraction | float | None:
    """The value of `text`; None if it is no closed form; math.inf if it has more than BITS bits."""
    if len(text) > LONGEST:
        return None
    if "(" not in text:  # (1,234) is a pair
        text = _THOUSANDS.sub(lambda m: re.sub("[, ]", "", m.group()), text)
    text = _MIXED.sub(_mixed, text.removesuffix("%")).strip()
    if not _ALLOWED.fullmatch(text) or re.search(
        r"\^(?:\{[^{}]*\}|[\d.]+)!", text
    ):  # 2^3! may be read in two ways
        return None
    for latex, python in _PYTHON:
        text = text.replace(latex, python)
    text = _NUMERAL.sub(r"['\g<0>']", _FACTORIAL.sub(r"factorial(\1)", text))
    try:
        return _value(ast.parse(text, mode="eval").body)
    except OverflowError:
        return math.inf
    except (SyntaxError, ValueError, ZeroDivisionError, RecursionError):
        return None


def _mixed(m: re.Match) -> str:
    r"""`3\frac{1}{2}` and `3 1/2` are sums; `3\frac{2}{1}` is no number."""
    whole, over, under = (int(digits) for digits in m.groups() if digits)
    return f"({whole}+{over}/{under})" if over < under else "?"


def _value(node: ast.expr) -> Fraction:
    """Raises ValueError for anything but a closed form, OverflowError beyond BITS."""
    match node:
        case ast.List(elts=[ast.Constant(value=str(numeral))]):
            return Fraction(numeral)
        case ast.UnaryOp(op=ast.USub() | ast.UAdd(), operand=operand):
            return -_value(operand) if isinstance(node.op, ast.USub) else _value(operand)
        case ast.BinOp(left=left, op=ast.Pow(), right=right):
            base, exponent = _value(left), _whole(right)
            if abs(exponent) * max(base.numerator.bit_length(), base.denominator.bit_length()) > 2 * BITS:
                raise OverflowError
            value = base**exponent
        case ast.BinOp(left=left, op=op, right=right) if type(op) in _OPERATORS:
            value = _OPERATORS[type(op)](_value(left), _value(right))
        case ast.Call(func=ast.Call(func=ast.Name(id="frac"), args=[over]), args=[under]):
            value = _value(over) / _value(under)
        case ast.Call(func=ast.Call(func=ast.Name(id="binom"), args=[n]), args=[k]):
            value = Fraction(math.comb(_small(n), _small(k)))
        case ast.Call(func=ast.Name(id="factorial"), args=[n]):
            value = Fraction(math.factorial(_small(n)))
        case _:
            raise ValueError
    if max(value.numerator.bit_length(), value.denominator.bit_length()) > BITS:
        raise OverflowError
    return value


def _whole(node: ast.expr) -> int:
    value = _value(node)
    if value.denominator != 1:
        raise ValueError
    return value.numerator


def _small(node: ast.expr) -> int:
    if _whole(node) > 1500:  # 1500! has 13,664 bits
        raise OverflowError
    return _whole(node)

r"""Answers in free text: which answer a text states, and when two answers are equal.

Numbers and closed forms such as `\frac{1}{2^{55}}` are compared exactly, as fractions; anything else as
text. What that leaves open, such as `x^2-1` and `(x-1)(x+1)`, equivalence.py decides.
"""

import ast
import math
import operator
import re
from fractions import Fraction

from teamtr_min.tasks.equivalence import equivalent

RULES = 9  # counts up when a verdict may change; part of a run's fingerprint
LONGEST = 1000  # characters of an answer that is worked out
BITS = 14_000  # the largest numerator or denominator: 4,214 digits, and Python writes no more than 4,300

# Which answer a text states. A second + never goes back, so a search is linear in the length of the text.
_BRACES = re.compile(r"\\(?:boxed|fbox)\s*+\{|\\?[{}]")
_TAKES_BACK = re.compile(r"(?i)\b(?:no|not|wait|actually|instead|wrong|mistake|sorry)\b")
_HASHES = re.compile(r"(?i)(?<!#)####(?!#)[ \t*]*+(?:(?:the )?(?:final )?answer(?: is)?\b[ :*]*)?([^\n]*+)")
_LABEL = re.compile(r"(?im)^[ \t*_>]*+(?:(?:the |my |our )?final )?answer[ \t*_]*+:([^\n]*+)")
_CLAUSE = r" (?:not\b|I\b|i\.e|e\.g|(?:an?|(?!(?:and|or)\b)[a-z']{2,}+) [a-z]{2})"  # behind a comma
_DISPLAY = r"(?:\$\$\s++|\\\[\s*+)?+"  # maths on a line of its own
_SAYS = re.compile(rf"\b(?i:answer\s++is)\b\s*+:?\s*+{_DISPLAY}((?:[^\n.,;]|\.(?=\d)|[,;](?!{_CLAUSE}))++)")
_MARKS = ' \t*_`"!,;:#'
_CHOICE = re.compile(r"(?:yes|no|true|false)$|(?:pi|sqrt|sin|cos|tan|log|ln|exp|infinity)\b")
_LEADS_UP = re.compile(
    r"(?i)(?:[\s*_:`\"]|(?:also|still|therefore|thus|hence|then|now|so|indeed|again|simply|just|exactly|"
    r"about|approximately|equal to)\b)*+"
)
_ASIDE = re.compile(r",? (?:which|because|since|as|so|but|and (?:it|that|this|we|the|so))\b.*| \([a-z]{2}.*")
_MATHS = re.compile(  # at the beginning; not the heading "2. Check"
    r"(?!\d+[.):]\s+[^\W\d])[^A-Za-z]*(?:[\d\\π∞∅]|[A-Za-z](?![A-Za-z]|\s+[a-z]{2}))"
)
_NO_VALUE = set(  # words of sentences such as "the answer is right", and of headings
    "right correct incorrect wrong valid invalid accurate fine good ok okay same above below unchanged "
    "longer change not verified confirmed checked clear unclear known unknown found shown stated written it "
    "given boxed this that what missing reasonable consistent complete my your our their check verification "
    "verify step part case final answer conclusion summary explanation note".split()
)


def extract_answer(text: str) -> str | None:
    r"""The answer that `text` states, or None: `\boxed{X}` outranks `#### X`, which outranks "answer is X" or
    "Answer: X". Of one kind the last counts. `#### Check` and "the answer is right" state none."""
    end, hashes = len(text.rstrip()), [(_value(m[1]), m.end()) for m in _HASHES.finditer(text)]
    hashes = [said for said, at in hashes if said and (_MATHS.match(said) or at >= end)]
    sayings = [(m.start(), _value(m[1], prose=True)) for m in _SAYS.finditer(text)]
    sayings += [(m.start(), _label(m[1])) for m in _LABEL.finditer(text)]
    sayings.sort(key=operator.itemgetter(0))
    stated = _boxes(text) or hashes or [said for _, said in sayings if said]
    return stated[-1] if stated else None


def _boxes(text: str) -> list[str]:
    """The content of each box."""
    opened, found = [], []  # of every open brace: whether it is a box's, and where its content begins
    for m in _BRACES.finditer(text):
        if m[0].endswith("{") and m[0] != r"\{":
            opened.append((m[0] != "{", m.end()))
        elif m[0] == "}" and opened:
            is_box, begin = opened.pop()
            content = text[begin : m.start()].strip()
            if is_box and content and "\\boxed" not in content:
                found.append(content)
    return found


def _value(text: str, prose: bool = False) -> str | None:
    """`text` without what surrounds a value, or None. In prose a word must look like a name: X, **red**."""
    said = _ASIDE.sub("", _LEADS_UP.sub("", text, count=1), count=1).strip(_MARKS)
    words = re.findall(r"[^\s,:;]+", said.lower())
    marked = text[: text.find(said)].endswith(("*", "_", "`", '"'))
    named = not prose or marked or not said[:1].islower() or _CHOICE.match(said)
    is_value = _MATHS.match(said) or named and 0 < len(words) <= 3 and _NO_VALUE.isdisjoint(words)
    return said if is_value and "\\boxed" not in said else None


def _label(text: str) -> str | None:
    """What stands behind "Answer:", any words, as long as they are few enough for an answer."""
    said = _ASIDE.sub("", text, count=1).strip(_MARKS)
    return said if 0 < len(said.split()) <= 8 and "\\boxed" not in said else None


def is_correct(response: str, answer: str) -> bool:
    """Whether the answer that `response` states equals `answer`; several boxes may be a list, as `1, 2`."""
    given, wanted = extract_answer(response), extract_answer(answer) or answer
    if given is None or len(wanted) > LONGEST:
        return given == wanted
    if _equal(given, wanted):
        return True
    plain = _UNITS.sub("", _plain(wanted))
    is_list = "\\pm" in plain or closed_form(plain) is None and len(_items(plain)) > 1
    kept = list(filter(None, map(_boxes, _TAKES_BACK.split(response))))
    return is_list and bool(kept) and _equal(", ".join(dict.fromkeys(kept[-1])), wanted)


# What does not change an answer, in this order.
_REWRITES = [(re.compile(pattern), to) for pattern, to in [
    (r"\s+", " "),
    ("[\N{MINUS SIGN}\N{EN DASH}\N{NON-BREAKING HYPHEN}]", "-"), (r"\\varnothing|∅", r"\\emptyset "),
    ("²", "^2"), ("³", "^3"), ("×", r"\\times "), ("π", r"\\pi "),
    (r"\\(?:text(?:bf|it|rm)?|mathrm|mathbf|mbox) ?\{([^{}]*)\}", r" \1 "),
    (r"\\(?:left|right)(?![a-zA-Z])", ""),
    (r", ?\\! ?|\{,\}", ","),  # 2,\!598 and 2{,}598
    (r"(?<!\\)\\[!()\[\]]|\\?[$€£]", ""),  # after a backslash it would be a new row of a matrix
    (r"(?<!\\)\\[,;: ]|\\q?quad(?![a-zA-Z])|~", " "),
    (r"\^ ?(?:\\circ|\{ ?\\circ ?\}|\\degree) ?|[°º] ?", " "), (r"\\%", "%"),
    (r"\\[dtc]frac", r"\\frac"),
    (r"\\(frac|sqrt) ?(\w|\\pi)", r"\\\1{\2}"), (r"(\\frac\{[^{}]*\}) ?(\w|\\pi)", r"\1{\2}"),
    (r" ?([_^]) ?", r"\1"), (r"([_^])\{(\w)\}", r"\1\2"), (r",? ?\b(?:and|or)\b", ", "),
    (r" +", " "), (r"^[ *]+|[ *.]+$", ""),
    (r"^\(([A-Z])\)$", r"\1"),  # the choice (A) is A
]]  # fmt: skip

# Words after a number are its unit, unless they change its value.
_UNIT = "cm|mm|km|in|ft|yd|mi|kg|mg|lbs?|oz|m[lL]|hrs?|mph|kph|[ap]m"
_NO_UNIT = (
    "is|are|was|not|but|if|than|to|wrong|incorrect|plus|minus|times|over|divided|squared|cubed|sin|cos|tan|"
    "log|mod|sqrt|theta|factorial|hundreds?|thousands?|[mbtr]+illions?|dozens?|halves|thirds|"
    "lakhs?|crores?|below|(?:four|fif|six|seven|eigh|nin|ten|eleven|twelf|[a-z]+teen|[a-z]+tie|hundred|thousand|"
    "million)ths"
)
_WORD = rf"(?!(?:{_NO_UNIT})\b)[^\W\d_]++(?:\^[23])?"
_UNITS = re.compile(
    rf"(?:(?<=[\d)}}%])|(?<=\\pi))(?: ?(?=(?:{_UNIT})\b)| (?=[mgLCF]\b|[^\W\d_]{{3}}))"
    rf"{_WORD}(?:[ /-]+{_WORD})*\.?$"
)
_DATED = re.compile(r"\d+(?: ?- ?\d+)+|\d+(?: ?/ ?\d+){2,}")  # a date, range, score: no difference
_CONDITION = re.compile(r"[<>]|\\[lg](?:eq?|t)(?![a-z])|^[^\d\\=]*$")  # what "and" and "or" join differently
_ALIASES = dict(pair.split(":") for pair in (
    "feet:ft foot:ft inche:in inch:in yard:yd mile:mi meter:m metre:m kilometer:km kilometre:km "
    "centimeter:cm centimetre:cm millimeter:mm millimetre:mm gram:g kilogram:kg pound:lb ounce:oz liter:l "
    "litre:l hour:h hr:h minute:min mins:min second:s sec:s"
).split())  # fmt: skip


def _unit(text: str) -> str:
    """One text for a unit's usual spellings: of feet ft, of square inches in^2, of miles per hour mph."""
    words = [w.removesuffix("s") for w in re.findall(r"[^\W\d_]+(?:\^[23])?|/", text.lower())]
    words = " ".join(_ALIASES.get(w, w) for w in words).replace(" / ", " per ")
    words = re.sub(
        r"\b(square|sq|cubic|cu) (\w+)", lambda m: m[2] + ("^2" if m[1][0] == "s" else "^3"), words
    )
    return {"mi per h": "mph", "km per h": "kph"}.get(words, words)


_NAMED = re.compile(r"(^|, *)([A-Za-z]) *= *")


def _equal(given: str, wanted: str) -> bool:
    if len(given) > LONGEST:
        return False
    joined = [{*re.findall(r"\b(?:and|or)\b", text)} for text in (given, wanted)]
    given, wanted = map(_plain, (given, wanted))
    if all(joined) and joined[0].isdisjoint(joined[1]) and any(map(_CONDITION.search, _items(wanted))):
        return False  # x < 1 and x > 0 is not x < 1 or x > 0; the numbers 1 and 2 are 1 or 2
    units = {_unit(m[0]) for m in map(_UNITS.search, (given, wanted)) if m}
    if len(units) < 2:  # 4 July is not 4 June
        given, wanted = (_UNITS.sub("", text) for text in (given, wanted))
    sides = [closed_form(side) for side in given.split("=")]
    if "=" not in wanted and None not in sides:  # 9*2=18
        if len({*sides}) > 1:  # 9*2=19
            return False
        given = given.rpartition("=")[2]
    if ("=" in given) != ("=" in wanted):  # x = 2, x = 3 is 2, 3, though x = 5 is not y = 5
        given, wanted = (_NAMED.sub(r"\1", text) if len({m[2] for m in _NAMED.finditer(text)}) == 1 else text
                         for text in (given, wanted))  # fmt: skip
        if any(len({m[2] for m in _NAMED.finditer(text)}) > 1 for text in (given, wanted)):
            return False  # 3, 2 is not x = 2, y = 3
    if _DATED.fullmatch(wanted):
        return "".join(given.split()) == "".join(wanted.split())
    one, other = _canonical(given), _canonical(wanted)
    if one == other:
        return True
    if closed_form(given) is not None and closed_form(wanted) is not None or one.lower() == other.lower():
        return False
    same = "\\pm" in given + wanted or len(_items(given)) == len(_items(wanted))
    same_brackets = given.startswith(r"\{") == wanted.startswith(r"\{") or "(" not in (given[:1], wanted[:1])
    return same and same_brackets and _is_maths(given) and _is_maths(wanted) and equivalent(given, wanted)


def canonical(answer: str) -> str:
    """One text for all ways to write an answer that can be told without algebra."""
    if len(answer) > LONGEST:
        return answer
    text = _UNITS.sub("", _plain(answer))
    return "".join(text.split()) if _DATED.fullmatch(text) else _canonical(text)


def _plain(text: str) -> str:
    """An answer without what only LaTeX needs."""
    for pattern, to in _REWRITES:
        text = pattern.sub(to, text)
    return text


def _canonical(text: str) -> str:
    if (value := closed_form(text)) is not None:
        return str(value)
    if len(items := _items(text)) > 1:
        items = [_canonical(item) for item in items]
        # Numbers without brackets may come in any order, words may not.
        return ", ".join(sorted(items) if all(re.search(r"[\d\\]", item) for item in items) else items)
    parts = re.split(r"([,;=&()\[\]]|\\[{}\\])", text)
    text = "".join(part if (value := closed_form(part)) is None else str(value) for part in parts)
    text = re.sub(r"(?<!\d) | (?!\d)", "", text)  # "5 6" does not become 56
    return text if _is_maths(text) and re.search(r"[\\^=<>+*-]", text) else text.lower()  # R - r is not r - R


def _items(text: str) -> list[str]:
    r"""What commas outside of all brackets part. A set `\{1, 2\}` is the list `1, 2`."""
    if inside := re.fullmatch(r"\\\{((?:[^\\]|\\[^{}])*)\\\}", text):
        text = inside[1]
    depth, items = 0, [""]
    for piece in re.split(r"([,()\[\]{}])", text):
        depth += (piece in tuple("([{")) - (piece in tuple(")]}"))
        if piece == "," and depth == 0:
            items.append("")
        else:
            items[-1] += piece
    return [item.strip() for item in items]


def _is_maths(text: str) -> bool:
    """Whether letters are variables in it: words, 0x10 and 12_3 are not for algebra."""
    bare = re.sub(r"\\(?:begin|end)\{\w*\}|\\[a-zA-Z]+", " ", text)
    return bool(re.search(r"[\d\\^=<>+*/-]", text)) and not re.search(r"[^\W\d_]{3}|\d_|\d[^\W\d_]+\d", bare)


_THOUSANDS = re.compile(r"(?<![\d.,])\d{1,3}(?:[, ]\d{3})+(?![\d,])")
_MIXED = re.compile(r"(?<![\d.^])(\d+)(?: ?\\frac\{(\d+)\}\{(\d+)\}| (\d+)/(\d+))")
_FACTORIAL = re.compile(r"(?<![\d.^])(\d+|\([^()]*\))!(?!!)")  # 2^3! may be read in two ways
_NUMERAL = re.compile(r"(?:\d++\.?+\d*+|\.\d++)(?:[eE][+-]?\d{1,3}+)?+")
_PYTHON = {"{": "(", "}": ")", "^": "**", r"\cdot": "*", r"\times": "*", r"\div": "/", r"\frac": "frac"}
_ALLOWED = re.compile(r"(?:[0-9+*/() -]|frac|fact)*+")
_OPERATORS = {ast.Add: operator.add, ast.Sub: operator.sub, ast.Mult: operator.mul, ast.Div: operator.truediv}


def closed_form(text: str) -> Fraction | None:
    r"""Exact value of numerals with + - * / ^ !, `\frac` and brackets; None for others and beyond BITS."""
    if not text.isascii():
        return None
    if "(" not in text:  # (1,234) is a pair
        text = _THOUSANDS.sub(lambda m: re.sub("[, ]", "", m[0]), text)
    text = _MIXED.sub(r"(\1+\2\4/\3\5)", text.removesuffix("%"))
    text = _FACTORIAL.sub(r"fact(\1)", text)
    try:
        text = _NUMERAL.sub(lambda m: "({}/{})".format(*Fraction(m[0]).as_integer_ratio()), text)
        for latex, python in _PYTHON.items():
            text = text.replace(latex, python)
        return _evaluate(ast.parse(text.strip(), mode="eval").body) if _ALLOWED.fullmatch(text) else None
    except (SyntaxError, ValueError, ZeroDivisionError, RecursionError):
        return None


def _evaluate(node: ast.expr) -> Fraction:
    match node:
        case ast.Constant(value=value):
            return Fraction(value)
        case ast.UnaryOp(operand=operand):
            return -_evaluate(operand) if isinstance(node.op, ast.USub) else _evaluate(operand)
        case ast.Call(func=ast.Name(id="fact"), args=[operand]):
            n = _evaluate(operand)
            if n.denominator != 1 or n > 1500:  # 1500! has 13,664 bits
                raise ValueError
            value = Fraction(math.factorial(n.numerator))
        case ast.Call(func=ast.Call(func=ast.Name(id="frac"), args=[over]), args=[under]):
            value = _evaluate(over) / _evaluate(under)
        case ast.BinOp(left=left, op=ast.Pow(), right=right):
            base, exponent = _evaluate(left), _evaluate(right)
            if exponent.denominator != 1 or abs(exponent) * _bits(base) > 2 * BITS:
                raise ValueError
            value = base**exponent
        case ast.BinOp(left=left, op=op, right=right) if type(op) in _OPERATORS:
            value = _OPERATORS[type(op)](_evaluate(left), _evaluate(right))
        case _:
            raise ValueError
    if _bits(value) > BITS:
        raise ValueError
    return value


def _bits(value: Fraction) -> int:
    return max(map(int.bit_length, value.as_integer_ratio()))

"""Answers in free text: where one is stated, and when two are equal.

Numbers are compared exactly, anything else as text. About what is left, such as `x^2-1` and `(x-1)(x+1)`,
equivalence.py is asked.
"""

import re
from fractions import Fraction

from teamtr_min.tasks.equivalence import equivalent

LONGEST = 1000  # characters; a longer answer is only compared as text, so no answer takes long

# The quantifiers with a second + never go back, which keeps the search linear in the length of the text.
_HASHES = re.compile(r"####[ \t]*+([^\n]++)")
# "is" up to the end of the sentence: a full stop inside a number does not end it.
_SAYS = re.compile(r"answer\s++is\s*+:?\s*+((?:[^\n.]|\.(?=\d))++)", re.IGNORECASE)
_BRACES = re.compile(r"(\\boxed\s*+\{)|\\[{}]|(\{)|(\})")

# What does not change an answer, in this order.
_REWRITES = [(re.compile(pattern), to) for pattern, to in [
    (r"\s+", " "),
    ("\N{MINUS SIGN}", "-"), ("²", "^2"), ("³", "^3"), ("×", r"\\times "), ("π", r"\\pi "),
    (r"\\(?:text(?:bf|it|rm)?|mathrm|mathbf|mbox) ?\{([^{}]*)\}", r" \1 "),
    (r"\\(?:left|right)(?![a-zA-Z])", ""),
    (r", ?\\! ?|\{,\}", ","),  # 2,\!598 and 2{,}598
    (r"(?<!\\)\\[!()\[\]]|\\?[$€£]", ""),  # after a backslash it would be a new row of a matrix
    (r"(?<!\\)\\[,;: ]|\\q?quad(?![a-zA-Z])|~", " "),
    (r"\^ ?(?:\\circ|\{ ?\\circ ?\}|\\degree) ?|[°º] ?", " "), (r"\\%", "%"),
    (r"\\[dtc]frac", r"\\frac"),
    (r"\\(frac|sqrt) ?(\w|\\pi)", r"\\\1{\2}"), (r"(\\frac\{[^{}]*\}) ?(\w|\\pi)", r"\1{\2}"),
    (r" +", " "), (r" ?([_^]) ?", r"\1"), (r"([_^])\{(\w)\}", r"\1\2"),
    (r"\\(le|ge|ne)(?![a-zA-Z])", r"\\\1q"), (r"(?<=\d)i(?![a-zA-Z])", " i"),
    (r" ?(?:\\times|\\cdot) ?10\^(?:\{([+-]?\d+)\}|(\d))", r"e\1\2"),
    (r",? ?\b(?:and|or)\b", ", "),
    (r"^[ *]+|[ *.]+$", ""),
    (r"^\{([^{}]*)\}$|^\(([A-Z])\)$", r"\1\2"),  # the choice (A) is A
]]  # fmt: skip

# Words after a number are its unit, unless they change its value.
_UNIT = "cm|mm|km|in|ft|yd|mi|kg|mg|lbs?|oz|m[lL]|hrs?|mph|kph|[ap]m"
_NO_UNIT = (
    "is|are|was|not|but|if|than|to|wrong|incorrect|plus|minus|times|over|divided|squared|cubed|sin|cos|tan|"
    "log|mod|sqrt|theta|factorial|hundreds?|thousands?|[mbtr]+illions?|dozens?"
)
_WORD = rf"(?!(?:{_NO_UNIT})\b)[^\W\d_]++(?:\^[23])?"
_UNITS = re.compile(
    rf"(?:(?<=[\d)}}%])|(?<=\\pi))(?: ?(?=(?:{_UNIT})\b)| (?=[mgLCF]\b|[^\W\d_]{{3}}))"
    rf"{_WORD}(?:[ /-]+{_WORD})*\.?$"
)
_DECIMAL = r"(?:[0-9]{1,3}(?:[, ][0-9]{3})+(?:\.[0-9]*)?|[0-9]+(?:\.[0-9]*)?|\.[0-9]+)"
_NUMBER = re.compile(
    rf"([+-]?) ?(?:([0-9]+) (?=[0-9]+ ?/))?({_DECIMAL})(?: ?/ ?({_DECIMAL})|[eE]([+-]?[0-9]{{1,3}}))? ?%?"
)


def extract_answer(text: str) -> str | None:
    r"""The last answer that `text` states, as `\boxed{X}`, `#### X` or `answer is X`; None without one."""
    spans = [m.span(1) for m in _HASHES.finditer(text)]
    spans += [m.span(1) for m in _SAYS.finditer(text) if "\\boxed" not in m.group(1)]
    opened = []  # of every brace that is still open: whether it is a box, and where its content begins
    for m in _BRACES.finditer(text):
        if m.group(1) or m.group(2):
            opened.append((bool(m.group(1)), m.end()))
        elif m.group(3) and opened:
            is_box, begin = opened.pop()
            spans += [(begin, m.start())] * is_box
    return text[slice(*max(spans))].strip() if spans else None


def is_correct(response: str, answer: str) -> bool:
    """Whether the last answer that `response` states equals `answer`."""
    given, wanted = extract_answer(response), extract_answer(answer) or answer
    if given is None:
        return False
    if ("=" in given) != ("=" in wanted):  # x = 5 is 5, though it is not y = 5
        given, wanted = (re.sub(r"^[\s$]*[A-Za-z]\s*=", "", text) for text in (given, wanted))
    if canonical(given) == canonical(wanted):
        return True
    if max(len(given), len(wanted)) > LONGEST or None not in (number(given), number(wanted)):
        return False
    given, wanted = _plain(given), _plain(wanted)
    same_brackets = given.startswith(r"\{") == wanted.startswith(r"\{") or "(" not in (given[:1], wanted[:1])
    return same_brackets and _is_maths(given) and _is_maths(wanted) and equivalent(given, wanted)


def canonical(answer: str) -> str:
    """One text for all ways to write an answer that can be told without algebra."""
    if len(answer) > LONGEST:
        return "".join(answer.split()).lower()
    value = number(answer)
    if value is not None:
        return str(value)
    parts = re.split(r"([,;=&()\[\]]|\\[{}\\])", _plain(answer))
    parts = [part if (value := number(part)) is None else str(value) for part in parts]
    return re.sub(r"(?<!\d) | (?!\d)", "", "".join(parts)).lower()  # "5 6" does not become 56


def number(text: str) -> Fraction | None:
    """The exact value of a number with its trimmings ("$1,234.50", "-3/4", "50%", "12 apples"), or None."""
    if len(text) > LONGEST:
        return None
    m = _NUMBER.fullmatch(re.sub(r"\\frac\{([^{}]*)\}\{([^{}]*)\}", r" \1/\2", _plain(text)).strip())
    if m is None:
        return None
    sign, whole, over, under, exponent = m.groups()
    value, divisor = (Fraction(re.sub("[, ]", "", digits or "1")) for digits in (over, under))
    if divisor == 0 or whole and value >= divisor:
        return None
    value = value / divisor * Fraction(10) ** int(exponent or 0) + int(whole or 0)
    return -value if sign == "-" else value


def _plain(text: str) -> str:
    """An answer without its unit and without what only LaTeX needs."""
    for pattern, to in _REWRITES:
        text = pattern.sub(to, text)
    return _UNITS.sub("", text)


def _is_maths(text: str) -> bool:
    """Whether letters are variables in it: words, 0x10 and 12_3 are not for algebra."""
    bare = re.sub(r"\\(?:begin|end)\{\w*\}|\\[a-zA-Z]+", " ", text)
    return bool(re.search(r"[\d\\^=<>+-]", text)) and not re.search(r"[^\W\d_]{3}|\d_|\d[^\W\d_]+\d", bare)

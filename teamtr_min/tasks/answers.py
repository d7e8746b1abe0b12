r"""Answers in free text: which answer a text states, and when two answers are equal.

Numbers and closed forms such as `\frac{1}{2^{55}}` are compared exactly, as fractions; anything else as
text. What that leaves open, such as `x^2-1` and `(x-1)(x+1)`, equivalence.py decides.
"""

import math
import re
from fractions import Fraction

from teamtr_min.tasks.closed_form import LONGEST, closed_form
from teamtr_min.tasks.equivalence import equivalent

RULES = 2  # counts up when a verdict may change; part of a run's fingerprint

# Which answer a text states. A second + never goes back, so a search is linear in the length of the text.
_BRACES = re.compile(r"(\\(?:boxed|fbox)\s*+\{)|\\[{}]|(\{)|(\})")
_TAKES_BACK = re.compile(r"(?i)\b(?:no|not|wait|actually|instead|wrong|mistake|sorry)\b")
_HASHES = re.compile(r"(?i)(?<!#)####(?!#)[ \t*]*+(?:(?:the )?(?:final )?answer(?: is)?\b[ :*]*)?([^\n]*+)")
_SAYS = re.compile(r"(?i)\banswer\s++is\b\s*+:?\s*+((?:[^\n.]|\.(?=\d))++)")
_LEADS_UP = re.compile(
    r"(?i)(?:[\s*_:`\"]|(?:also|still|therefore|thus|hence|then|now|so|indeed|again|clearly|simply|just|exactly|"
    r"actually|really|about|approximately|equal to|given by)\b)*+"
)
_ASIDE = re.compile(r",? (?:which|because|since|as|so|but|and (?:it|that|this|we|the|so))\b.*| \([a-z]{2}.*")
_MATHS = re.compile(r"[^A-Za-z]*(?:[\d\\π∞∅]|[A-Za-z](?![A-Za-z]|\s+[a-z]{2}))")  # at the beginning
_NUMBERED = re.compile(r"\d+[.):]\s+[^\W\d]")  # the heading "2. Check"
_NO_VALUE = set(  # words of sentences such as "the answer is right", and of headings
    "right correct incorrect wrong valid invalid accurate fine good ok okay same above below unchanged "
    "longer change not verified confirmed checked clear unclear obvious known unknown found shown stated "
    "written it given boxed this that what missing reasonable consistent complete my your our their check "
    "verification verify step part case final answer conclusion summary explanation note".split()
)


def extract_answer(text: str) -> str | None:
    r"""The answer that `text` states, or None.

    `\boxed{X}` outranks `#### X`, which outranks "answer is X"; of one kind the last counts. A heading such
    as `#### Check` and a sentence such as "the answer is right" state no answer.
    """
    stated = [content for _, content in _boxes(text)] or _after_hashes(text) or _sayings(text)
    return stated[-1] if stated else None


def _boxes(text: str) -> list[tuple[int, str]]:
    """Where the content of each box begins, and the content."""
    opened, found = [], []  # of every open brace: whether it is a box's, and where its content begins
    for m in _BRACES.finditer(text):
        if m.group(1) or m.group(2):
            opened.append((bool(m.group(1)), m.end()))
        elif m.group(3) and opened:
            is_box, begin = opened.pop()
            content = text[begin : m.start()].strip()
            if is_box and content and "\\boxed" not in content:
                found.append((begin, content))
    return sorted(found)


def _after_hashes(text: str) -> list[str]:
    """What stands after ####. Words are a heading, unless they end the text."""
    end, stated = len(text.rstrip()), []
    for m in _HASHES.finditer(text):
        said = _value(m.group(1))
        if said and (m.end() >= end or _MATHS.match(said) and not _NUMBERED.match(said)):
            stated.append(said)
    return stated


def _sayings(text: str) -> list[str]:
    return [said for m in _SAYS.finditer(text) if (said := _value(m.group(1))) and "\\boxed" not in said]


def _value(said: str) -> str | None:
    """`said` without what leads up to a value or follows it; None where no value is said."""
    said = _ASIDE.sub("", _LEADS_UP.sub("", said, count=1), count=1).strip(' \t*_`"!,;:#')
    words = re.findall(r"[^\s,:;]+", said.lower())
    return said if _MATHS.match(said) or 0 < len(words) <= 3 and _NO_VALUE.isdisjoint(words) else None


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
_NAMED = re.compile(r"(^|, *)([A-Za-z]) *= *")
_DEPTH = dict.fromkeys("([{", 1) | dict.fromkeys(")]}", -1)


def is_correct(response: str, answer: str) -> bool:
    """Whether the answer that `response` states equals `answer`.

    Where `answer` is a list, such as `1, 2`, several boxes are one too.
    """
    given, wanted = extract_answer(response), extract_answer(answer) or answer
    if given is None:
        return False
    return _equal(given, wanted) or _is_list(wanted) and _equal(", ".join(_listed_boxes(response)), wanted)


def _listed_boxes(text: str) -> list[str]:
    """The different boxes after the last word that takes an earlier one back."""
    boxes = _boxes(text)
    taken_back = [m.end() for m in _TAKES_BACK.finditer(text, 0, boxes[-1][0])] if boxes else []
    return list(dict.fromkeys(content for begin, content in boxes if begin > max(taken_back, default=0)))


def _is_list(answer: str) -> bool:
    return "\\pm" in answer or number(answer) is None and len(_items(_plain(answer))) > 1


def _equal(given: str, wanted: str) -> bool:
    given, wanted = _plain(given), _plain(wanted)
    if ("=" in given) != ("=" in wanted):  # x = 5 is 5, though it is not y = 5
        given, wanted = _nameless(given), _nameless(wanted)
    if _canonical(given) == _canonical(wanted):
        return True
    if max(len(given), len(wanted)) > LONGEST:
        return False
    values = closed_form(given), closed_form(wanted)
    both_huge = values == (math.inf, math.inf)
    if not both_huge and (None not in values or math.inf in values):
        return False  # two exact values that differ, or one too large to work out
    same_brackets = given.startswith(r"\{") == wanted.startswith(r"\{") or "(" not in (given[:1], wanted[:1])
    return same_brackets and _is_maths(given) and _is_maths(wanted) and equivalent(given, wanted)


def canonical(answer: str) -> str:
    """One text for all ways to write an answer that can be told without algebra."""
    return _canonical(_plain(answer))


def number(text: str) -> Fraction | None:
    r"""The exact value of a number with its trimmings ("$1,234.50", "50%", "12 apples") or of a closed form
    ("-3/4", "2^{10}", `\frac{1}{19!}`). None for anything else, and beyond 14,000 bits."""
    value = closed_form(_plain(text))
    return None if value == math.inf else value


def _plain(text: str) -> str:
    """An answer without its unit and without what only LaTeX needs."""
    if len(text) > LONGEST:
        return "".join(text.split())
    for pattern, to in _REWRITES:
        text = pattern.sub(to, text)
    return _UNITS.sub("", text)


def _canonical(text: str) -> str:
    if len(text) > LONGEST:
        return text.lower()
    if (exact := _exact(text)) != text:
        return exact
    if len(items := _items(text)) > 1:
        items = [_canonical(item) for item in items]
        # Numbers without brackets may come in any order, words may not.
        return ", ".join(sorted(items) if all(re.search(r"[\d\\]", item) for item in items) else items)
    parts = map(_exact, re.split(r"([,;=&()\[\]]|\\[{}\\])", text))
    return re.sub(r"(?<!\d) | (?!\d)", "", "".join(parts)).lower()  # "5 6" does not become 56


def _exact(text: str) -> str:
    """A closed form as its value; any other text as it is."""
    value = closed_form(text)
    return text if value in (None, math.inf) else str(value)


def _items(text: str) -> list[str]:
    r"""What commas outside of all brackets part. A set `\{1, 2\}` is the list `1, 2`."""
    if inside := re.fullmatch(r"\\\{((?:[^\\]|\\[^{}])*)\\\}", text):
        text = inside.group(1)
    depth, items = 0, [""]
    for piece in re.split(r"([,()\[\]{}])", text):
        depth += _DEPTH.get(piece, 0)
        if piece == "," and depth == 0:
            items.append("")
        else:
            items[-1] += piece
    return [item.strip() for item in items]


def _nameless(text: str) -> str:
    """`x = 2, x = 3` -> `2, 3`. Values of several names stay as they are."""
    return _NAMED.sub(r"\1", text) if len({m.group(2) for m in _NAMED.finditer(text)}) == 1 else text


def _is_maths(text: str) -> bool:
    """Whether letters are variables in it: words, 0x10 and 12_3 are not for algebra."""
    bare = re.sub(r"\\(?:begin|end)\{\w*\}|\\[a-zA-Z]+", " ", text)
    return bool(re.search(r"[\d\\^=<>+-]", text)) and not re.search(r"[^\W\d_]{3}|\d_|\d[^\W\d_]+\d", bare)

"""Answers in free text: where one is stated, and when two are equal."""

import re
from collections.abc import Iterator
from fractions import Fraction


def extract_answer(text: str) -> str | None:
    r"""The last answer that `text` states, as `\boxed{X}`, `#### X` or `answer is X`; None without one."""
    found = list(_boxed(text))
    found += [(m.start(), m.group(1)) for m in re.finditer(r"####[ \t]*([^\n]+)", text)]
    # "is" up to the end of the sentence: a full stop inside a number does not end it.
    says = re.finditer(r"answer\s+is\s*:?\s*((?:[^\n.]|\.(?=\d))+)", text, flags=re.IGNORECASE)
    found += [(m.start(), m.group(1)) for m in says if "\\boxed" not in m.group(1)]
    return max(found)[1].strip() if found else None


def is_correct(response: str, answer: str) -> bool:
    """Whether the last answer that `response` states equals `answer`: exact as numbers, else as text."""
    given, wanted = extract_answer(response), extract_answer(answer) or answer
    if given is None:
        return False
    a, b = number(given), number(wanted)
    return _tidy(given) == _tidy(wanted) if a is None or b is None else a == b


def canonical(answer: str) -> str:
    """One text for all ways to write an answer."""
    value = number(answer)
    return _tidy(answer) if value is None else str(value)


def number(text: str) -> Fraction | None:
    """The exact value of a number with its trimmings ("$1,234.50", "-3/4", "50%", "12 apples"), or None."""
    text = re.sub(r"\\text\{[^}]*\}|\\[,;! ]", " ", text)
    text = re.sub(r"\\d?frac\{(-?\d+)\}\{(\d+)\}", r"\1/\2", text)
    text = re.sub(r"[$€£*\\{}]", "", text.replace("\N{MINUS SIGN}", "-")).strip()
    m = re.fullmatch(
        r"([+-]?)\s*((?:\d{1,3}(?:,\d{3})+|\d+)?(?:\.\d+)?)(?:\s*/\s*(\d+))?\.?\s*%?(?:\s*[^\W\d].*)?", text
    )
    if m is None or not m.group(2) or (m.group(3) and int(m.group(3)) == 0):
        return None
    value = Fraction(m.group(2).replace(",", "")) / int(m.group(3) or 1)
    return -value if m.group(1) == "-" else value


def _boxed(text: str) -> Iterator[tuple[int, str]]:
    """(position, content) of every \\boxed{...} whose braces balance."""
    for m in re.finditer(r"\\boxed\s*\{", text):
        depth = 1
        for end in range(m.end(), len(text)):
            depth += {"{": 1, "}": -1}.get(text[end], 0)
            if depth == 0:
                yield m.start(), text[m.end() : end]
                break


def _tidy(text: str) -> str:
    """Text without what does not change an answer: spaces, dollar signs, \\text, case, a final full stop."""
    text = re.sub(r"\\(?:text|mathrm)\{([^}]*)\}|\\left|\\right|\\[,;! ]", r"\1", text)
    return re.sub(r"[\s$]", "", text.replace("dfrac", "frac")).rstrip(".").lower()

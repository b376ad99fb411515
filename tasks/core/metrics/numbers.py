"""The result of an answer as an exact value: numbers as people and LaTeX write them, and when two are the same.

A text becomes readings (`readings`), and the result is one of them (`result_of`): what is boxed or marked, what follows
"the answer is", one side of an equation, else the last one. Every pattern here runs in linear time.
"""

from __future__ import annotations

import re
import unicodedata
from collections.abc import Iterator
from dataclasses import dataclass
from decimal import Decimal, InvalidOperation
from fractions import Fraction
from typing import Literal

Kind = Literal["number", "percent", "time", "ratio", "date"]

_RELATIVE_TOLERANCE = Fraction(1, 10**9)
_LARGEST_EXPONENT = 5000  # powers of ten beyond it are never worked out
_LOOKED_AT = 8_000  # characters at the end of an answer, where its result stands
_LONGEST_SEGMENT = 1_000
_MOST_PHRASES = 20

_SCALES = {
    "hundred": 2, "thousand": 3, "thousands": 3, "k": 3, "million": 6, "millions": 6, "mio": 6, "mn": 6, "mln": 6,
    "billion": 9, "billions": 9, "bn": 9, "trillion": 12, "trillions": 12, "tn": 12, "lakh": 5, "lakhs": 5,
    "crore": 7, "crores": 7,
}  # fmt: skip
_LETTER_SCALES = {"k": 3, "K": 3, "M": 6, "B": 9}
_MONTHS = {
    name: number
    for number, names in enumerate(
        ("january jan", "february feb", "march mar", "april apr", "may", "june jun", "july jul", "august aug",
         "september sept sep", "october oct", "november nov", "december dec"), start=1)
    for name in names.split()
}  # fmt: skip
_UNITS = (
    "zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine", "ten", "eleven", "twelve",
    "thirteen", "fourteen", "fifteen", "sixteen", "seventeen", "eighteen", "nineteen",
)  # fmt: skip
_TENS = ("twenty", "thirty", "forty", "fifty", "sixty", "seventy", "eighty", "ninety")
_SMALL = {name: number for number, name in enumerate(_UNITS)}
_SMALL |= {name: 10 * number for number, name in enumerate(_TENS, start=2)}

_MONTH = "(?:" + "|".join(sorted(_MONTHS, key=len, reverse=True)) + r")\b\.?"
_ORDINAL = r"(?:st|nd|rd|th)?"
_DATE = re.compile(
    rf"""(?xi) (?<![\w./-]) (?:
      (?P<y1>\d{{4}}) (?P<s1>[-/.]) (?P<m1>\d{{1,2}}) (?P=s1) (?P<d1>\d{{1,2}})
    | (?P<d2>\d{{1,2}}) (?P<s2>[-/.]) (?P<m2>\d{{1,2}}) (?P=s2) (?P<y2>\d{{4}})
    | (?P<m3>{_MONTH}) \s (?P<d3>\d{{1,2}}) {_ORDINAL} ,? \s (?P<y3>\d{{4}})
    | (?P<d4>\d{{1,2}}) {_ORDINAL} \s (?:of\s)? (?P<m4>{_MONTH}) ,? \s (?P<y4>\d{{4}})
    ) (?![\w]|[./-]\d)"""
)
_CLOCK = re.compile(r"(?<![\w:.])(\d{1,9}(?::\d{1,9}){1,3})(?![\w:]|\.\d)(\s?[ap]\.?m\b\.?)?", re.IGNORECASE)
# Digits with marks and thin spaces between them; `_plain` says what the marks mean.
_NUMBER = re.compile("\\d+(?:[.,_'\u2019\u00a0\u2007\u2009\u202f]\\d+)*|\\.\\d+")
_EXPONENT = re.compile(r"[eE]([-+]?\d{1,12})(?![\w.]*\d)")
_POWER_OF_TEN = re.compile(r"\s?[x\u00d7*·⋅]\s?10\s?(?:\^|\*\*)\s?[({]?\s?([-+]?\d{1,6})[)}]?(?![\w.])")
_RAISED = re.compile(r"\s?(?:\^|\*\*)\s?[({]?([-+]?\d{1,4})[)}]?(?![\w.])")
_UNDER = re.compile(r"\s?[/\u2044]\s?(\d+(?:\.\d+)?)(?![\w/]|[.,/]\d)")
_MIXED = re.compile(r"(?:\s|\sand\s|-)(\d+)\s?[/\u2044]\s?(\d+)(?![\w/]|[.,/]\d)")
_PERCENT = re.compile(r"\s?(?:%|percent\b|per\scent\b|pct\b)", re.IGNORECASE)
_SCALE = re.compile(r"[\s-]?(" + "|".join(sorted(_SCALES, key=len, reverse=True)) + r")\b", re.IGNORECASE)
_LETTER_SCALE = re.compile(r"\s?([kKMB])(?![\w'])")
_BEFORE = re.compile(
    r"(?P<sign>[-+]|\b(?:negative|minus)\s)?\s?(?:[$€£¥₹₩₽₺¢~≈#]|\b(?:rs\.?|usd|eur|gbp|inr)\s?)*(?P<inner>[-+]?)\Z",
    re.IGNORECASE,
)
_LABEL = re.compile(r"\b(?:step|question|problem|exercise|example|part|case)\s?\Z", re.IGNORECASE)
_WORDS = re.compile(
    r"\b(?:" + "|".join([*_SMALL, "hundred", "thousand", "million", "and"]) + r")(?:[\s-]+(?:"
    + "|".join([*_SMALL, "hundred", "thousand", "million", "and"]) + r"))*\b",
    re.IGNORECASE,
)  # fmt: skip


@dataclass(frozen=True, slots=True)
class Value:
    """What a reading means. `parts` holds one number, or the parts of a time (h, m, s), ratio or date (y, m, d).

    `spelling` is set for numbers too large to work out: they equal only what is spelled alike. `is_whole` tells that
    it was written without a fraction, so it must be met exactly.
    """

    kind: Kind
    parts: tuple[Fraction, ...]
    is_whole: bool = True
    spelling: str | None = None


@dataclass(frozen=True, slots=True)
class Reading:
    """A value and where it stands in the cleaned text."""

    value: Value
    start: int
    end: int


def same_value(one: Value, other: Value) -> bool:
    """Whether two values are the same: whole numbers exactly, others within a relative 1e-9.

    A percentage equals its number and its share: 50 %, 50 and 0.5 (but 0.5 % is not 50 %).
    """
    if one.spelling is not None or other.spelling is not None:
        return one.spelling == other.spelling
    kinds = {one.kind, other.kind}
    if kinds == {"number", "percent"}:
        percent, number = (one, other) if one.kind == "percent" else (other, one)
        share = Value("number", (percent.parts[0] / 100,), is_whole=False)
        return _close(percent, number) or _close(share, number)
    if kinds == {"time", "ratio"}:
        return one.parts == other.parts
    if len(kinds) > 1:
        return False
    if one.kind in ("number", "percent"):
        return _close(one, other)
    if one.kind == "ratio":
        return len(one.parts) == len(other.parts) and _lowest(one.parts) == _lowest(other.parts)
    return one.parts == other.parts


def _close(one: Value, other: Value) -> bool:
    first, second = one.parts[0], other.parts[0]
    if first == second or (one.is_whole and other.is_whole):
        return first == second
    return abs(first - second) <= _RELATIVE_TOLERANCE * max(abs(first), abs(second))


def _lowest(parts: tuple[Fraction, ...]) -> tuple[Fraction, ...]:
    first = next((part for part in parts if part), Fraction(1))
    return tuple(part / first for part in parts)


# --- cleaning

_THOUGHTS_END = re.compile(r"</(?:think|thinking|thought|thoughts|reasoning)>|\[/THINK\]|<\|END_THINKING\|>")
_CONTROL = re.compile(r"<\|[^|<>\n]{1,60}\|>|</?s>|<(?:end_of_turn|eos|pad)>")
_NEXT_QUESTION = re.compile(
    r"\n\s{0,8}(?:\W{0,4})(?:question|problem|q|user|human|instruction|input|exercise|task)\s?(?:\d+\s?)?\W{0,3}:",
    re.IGNORECASE,
)
_DIGIT = re.compile(r"\d")
_FRACTION = re.compile(r"(-?)\s?\\[dtc]?frac\s?\{([^{}]{1,200})\}\s?\{([^{}]{1,200})\}")
_SHORT_FRACTION = re.compile(r"(-?)\\[dtc]?frac\s?(\d)\s?(\d)")
_WRAPPED = re.compile(
    r"\\(?:text|textbf|mathrm|mathbf|mathit|mbox|operatorname|bm|textit)\s?\{([^{}]{0,200})\}"
)
_BOXED = "\\boxed"
_SUPERSCRIPT = re.compile("[⁻⁺]?[⁰¹²³⁴⁵⁶⁷⁸⁹]+")
_LATEX = (
    (re.compile(r"\{,\}"), ","),
    (re.compile(r"\\[,!;:]"), ""),
    (re.compile(r"\\\$"), "$"),
    (re.compile(r"\\%"), "%"),
    (re.compile(r"\^\s?\{?\\circ\}?|\\degree"), "° "),
    (re.compile(r"\\(?:times|cdot|ast)\b"), "\N{MULTIPLICATION SIGN}"),
    (re.compile(r"\\(?:approx|simeq|sim)\b"), "≈"),
    (re.compile(r"\\(?:left|right|quad|qquad|displaystyle|[bB]igg?)\b"), " "),
    (re.compile(r"\\[()\[\]]"), " "),
    (re.compile(r"[*`]{2,}|(?<!\S)[*_`](?=\S)|(?<=\S)[*_`](?!\S)"), ""),
)


def cleaned(text: str) -> str:
    """The answer without thoughts, control tokens, a next question, LaTeX's dress and full-width forms."""
    thought = _THOUGHTS_END.search(text)
    text = text if thought is None else text[thought.end() :]
    following = _NEXT_QUESTION.search(text, *_first_digit(text))
    text = (text if following is None else text[: following.start()])[-_LOOKED_AT:]
    text = _CONTROL.sub(" ", text)
    text = _SUPERSCRIPT.sub(
        lambda found: "^" + unicodedata.normalize("NFKC", found[0]).replace("\N{MINUS SIGN}", "-"), text
    )
    text = "".join(
        character if character in "\u00a0\u2007\u2009\u202f" else unicodedata.normalize("NFKC", character)
        for character in re.sub("(?<=\\d)(?=[¼-¾⅐-⅞])", " ", text)
    )
    text = re.sub("[\u2010-\u2015\u2212\ufe63]", "-", text)
    for _ in range(4):  # fractions within fractions
        text, inner = _WRAPPED.subn(r" \1 ", text)
        text, fractions = _FRACTION.subn(_written_fraction, text)
        text, shorts = _SHORT_FRACTION.subn(r" \1\2/\3 ", text)
        if not inner + fractions + shorts:
            break
    for pattern, plain in _LATEX:
        text = pattern.sub(plain, text)
    return text


def _first_digit(text: str) -> tuple[int]:
    """Where the first digit stands: what looks like a next question before it begins the answer."""
    found = _DIGIT.search(text)
    return (len(text) if found is None else found.start(),)


def _written_fraction(found: re.Match[str]) -> str:
    sign, above, below = found[1], found[2].strip(), found[3].strip()
    if above.startswith("-") and not sign:
        sign, above = "-", above[1:].strip()
    return f" {sign}{above}/{below} "


# --- readings


def readings(text: str) -> list[Reading]:
    """All values of a cleaned text, in its order; what only looks like one (versions, H2O, x_1) is left out."""
    found = [*_dates(text), *_clocks(text)]
    taken = [False] * (len(text) + 1)
    for reading in found:
        taken[reading.start : reading.end] = [True] * (reading.end - reading.start)
    position = 0
    for match in _NUMBER.finditer(text):
        if match.start() < position or taken[match.start()]:
            continue
        is_label = _LABEL.search(text[max(0, match.start() - 12) : match.start()]) is not None
        number = None if is_label else _number(text, match)
        position = match.end() if number is None else number.end
        found += [] if number is None else [number]
    if not found:
        found = list(_worded(text))
    return sorted(found, key=lambda reading: reading.start)


def _dates(text: str) -> Iterator[Reading]:
    for found in _DATE.finditer(text):
        groups = found.groupdict()
        number = next(n for n in "1234" if groups[f"y{n}"])
        month = groups[f"m{number}"].rstrip(".").lower()
        parts = (groups[f"y{number}"], str(_MONTHS.get(month, month)), groups[f"d{number}"])
        yield Reading(Value("date", tuple(Fraction(int(part)) for part in parts)), *found.span())


def _clocks(text: str) -> Iterator[Reading]:
    for found in _CLOCK.finditer(text):
        parts = [Fraction(int(part)) for part in found[1].split(":")]
        pieces = found[1].split(":")
        is_time = all(len(piece) == 2 for piece in pieces[1:]) and all(part < 60 for part in parts[1:])
        if found[2]:
            half = found[2].strip().lower()[0]
            parts[0] = parts[0] % 12 + (12 if half == "p" else 0)
        kind: Kind = "time" if is_time and len(pieces) <= 3 else "ratio"
        yield Reading(Value(kind, tuple(parts)), *found.span())


def _number(text: str, found: re.Match[str]) -> Reading | None:
    start, end = found.span()
    if start and (text[start - 1].isalpha() or text[start - 1] in "_\\^") and not _follows_unit(text, start):
        return None
    decimal = _plain(found[0])
    if decimal is None:
        return None
    negative, start = _sign(text, start)
    exponent = _EXPONENT.match(text, end)
    if exponent is not None:
        decimal, end = decimal.shifted(int(exponent[1])), exponent.end()
    value, end = _followed(text, decimal, end)
    if negative:
        value = _negated(value)
    return Reading(value, start, end)


def _follows_unit(text: str, start: int) -> bool:
    """Whether the letters before belong to a currency ("Rs500", "USD5"), not to a name ("H2O", "x1")."""
    return (
        re.search(r"(?:\brs\.?|\busd|\beur|\bgbp|\binr)\Z", text[max(0, start - 5) : start], re.IGNORECASE)
        is not None
    )


def _sign(text: str, start: int) -> tuple[bool, int]:
    """Whether a minus stands before the number, and where all that belongs to it begins."""
    window = text[max(0, start - 16) : start]
    before = _BEFORE.search(window)
    if before is None:
        return False, start
    begins = start - len(window) + before.start()
    sign = before["sign"] or ""
    preceding = text[begins - 1] if begins else " "
    # After a digit, a letter or a bracket a minus is an operation or a hyphen, and before a line a bullet.
    is_sign = not (preceding.isalnum() or preceding in ")]}%") or sign.strip().isalpha()
    is_bullet = text[begins : begins + 2] == "- " and not text[:begins].rpartition("\n")[2].strip()
    is_sign &= not is_bullet
    if sign.strip() in ("-", "+") and not is_sign:
        return before["inner"] == "-", begins + 1
    return (sign.strip().lower() in ("-", "negative", "minus")) != (before["inner"] == "-"), begins


@dataclass(frozen=True, slots=True)
class _Written:
    """Digits as they are written, and the power of ten they are multiplied with."""

    digits: str
    exponent: int = 0

    def shifted(self, by: int) -> _Written:
        return _Written(self.digits, self.exponent + by)

    def value(self, kind: Kind = "number") -> Value:
        if abs(self.exponent) > _LARGEST_EXPONENT:
            try:
                spelling = str(Decimal(self.digits).normalize()) + f"e{self.exponent}"
            except InvalidOperation:
                spelling = f"{self.digits}e{self.exponent}"
            return Value(kind, (), spelling=spelling)
        whole, _, rest = self.digits.partition(".")
        shift = self.exponent - len(rest)
        number = Fraction(int(Decimal(whole + rest or "0")))
        number = number * 10**shift if shift >= 0 else number / 10**-shift
        return Value(kind, (number,), is_whole=number.denominator == 1)


def _plain(written: str) -> _Written | None:
    """Digits with at most one point, from marks by locale; None for what is no number (1.2.3, 12,34,5)."""
    written = re.sub("[_'\u2019\u00a0\u2007\u2009\u202f]", "\u00a0", written)
    if "\u00a0" in written:
        head, *groups = written.split("\u00a0")
        tail = re.split("[.,]", groups[-1])
        sizes = [len(group) for group in (*groups[:-1], tail[0])]
        if any(size != 3 for size in sizes) or len(head) > 3 or len(tail) > 2 or not head.isdigit():
            return None
        written = head + "".join(groups)
    marks = [mark for mark in written if mark in ".,"]
    if not marks:
        return _Written(written)
    last = marks[-1]
    groups = re.split("[.,]", written)
    if len(set(marks)) == 2:  # both: the last one is the decimal mark, the other one stands between thousands
        if marks.count(last) > 1 or not _grouped(groups[:-1]):
            return None
        return _Written("".join(groups[:-1]) + "." + groups[-1])
    if len(marks) > 1:
        return _Written("".join(groups)) if _grouped(groups) else None
    head, decimals = groups
    if (
        last == ","
        and head
        and ((len(decimals) == 3 and len(head) <= 3) or len(decimals) == 4)
        and head != "0"
    ):
        return _Written(head + decimals)
    return _Written(f"{head or '0'}.{decimals}")


def _grouped(groups: list[str]) -> bool:
    """Thousands as 1,234,567, as 12,34,567 (India) or as 1,0000,0000 (China, Japan)."""
    head, *rest = groups
    if not rest:
        return head.isdigit()
    sizes = [len(group) for group in rest]
    western = 1 <= len(head) <= 3 and all(size == 3 for size in sizes)
    indian = 1 <= len(head) <= 2 and sizes[-1] == 3 and all(size == 2 for size in sizes[:-1])
    eastern = 1 <= len(head) <= 4 and all(size == 4 for size in sizes)
    return western or indian or eastern


def _followed(text: str, written: _Written, end: int) -> tuple[Value, int]:
    """What stands behind the digits changes them: a power, a fraction, a scale, a percent sign."""
    if tens := _POWER_OF_TEN.match(text, end):
        return written.shifted(int(tens[1])).value(), tens.end()
    value = written.value()
    if raised := _RAISED.match(text, end):
        power = int(raised[1])
        if value.spelling is None and abs(power) * len(written.digits) <= _LARGEST_EXPONENT:
            base = value.parts[0]
            if base or power >= 0:
                value = Value("number", (base**power,), value.is_whole and power >= 0)
        return value, raised.end()
    if value.spelling is None and value.is_whole and (mixed := _MIXED.match(text, end)) and int(mixed[2]):
        part = Fraction(int(mixed[1]), int(mixed[2]))
        if part < 1:
            return Value("number", (value.parts[0] + part,), is_whole=False), mixed.end()
    if value.spelling is None and (under := _UNDER.match(text, end)) and Fraction(under[1]):
        number = value.parts[0] / Fraction(under[1])
        value, end = Value("number", (number,), is_whole=number.denominator == 1), under.end()
    if value.spelling is None and (scale := _scale(text, end)):
        number = value.parts[0] * 10 ** scale[0]
        return Value("number", (number,), is_whole=number.denominator == 1), scale[1]
    if percent := _PERCENT.match(text, end):
        return Value("percent", value.parts, value.is_whole, value.spelling), percent.end()
    return value, end


def _scale(text: str, end: int) -> tuple[int, int] | None:
    if word := _SCALE.match(text, end):
        return _SCALES[word[1].lower()], word.end()
    letter = _LETTER_SCALE.match(text, end)
    return None if letter is None or letter[0] != letter[1] else (_LETTER_SCALES[letter[1]], letter.end())


def _negated(value: Value) -> Value:
    spelling = None if value.spelling is None else f"-{value.spelling}"
    return Value(value.kind, tuple(-part for part in value.parts), value.is_whole, spelling)


def _worded(text: str) -> Iterator[Reading]:
    """Numbers in English words, where a text has no digits: "twenty-one", "two hundred and five"."""
    for found in _WORDS.finditer(text):
        total = current = 0
        words = [word for word in re.split(r"[\s-]+", found[0].lower()) if word != "and"]
        if not words:
            continue
        for word in words:
            if word in _SMALL:
                current += _SMALL[word]
            elif word == "hundred":
                current = max(1, current) * 100
            else:
                total += max(1, current) * (1000 if word == "thousand" else 10**6)
                current = 0
        before = text[max(0, found.start() - 10) : found.start()]
        sign = -1 if re.search(r"\b(?:negative|minus)\s\Z", before, re.IGNORECASE) else 1
        yield Reading(Value("number", (Fraction(sign * (total + current)),)), *found.span())


# --- the result

_MARK = re.compile(r"####[^\n]*")
_ANSWER_IS = re.compile(
    r"\b(?:answer|result|solution)\b\s?(?:\([^()\n]{0,40}\)\s?)?(?:(?:is|are|was|equals|would\sbe|should\sbe|will\sbe)\b"
    r"\s?:?|:|=|→|->)\s{0,3}|\banswer\s(?=\$?-?\d)",
    re.IGNORECASE,
)
_SENTENCE_END = re.compile(r"(?<=[^\d\s.])[.!?](?=\s|\Z)|(?<=\d)[.!?](?=\s|\Z)|\n")
_OPERATOR = re.compile(r"\s?[-+*/\u00d7÷·x^](?=\s?[\d($\\-])")
_JOINED = re.compile(r"\s?(?:and|or|to|through|-)\s?\Z", re.IGNORECASE)
_RANGE_BEGINS = re.compile(r"\b(?:between|either|from)\b\W{0,3}\Z", re.IGNORECASE)
_QUALIFIES = re.compile(
    r"\b(?:in|for|per|every|each|within|after|over|during|at|on|by|out\sof|of|step|steps|from|with|see|using)\b"
    r"(?:\s(?:the|only|about|all|a|an|next|last|first|day|week|step|steps|question|problem))*\s?[($]*\Z",
    re.IGNORECASE,
)
_IS = re.compile(
    r"(?:\b(?:is|are|equals?)\b|=)\s?(?:about|approximately|only|exactly|just|around|roughly|≈|:)?\s?\W{0,3}\Z"
)


def result_of(answer: str) -> Value | None:
    """The value that an answer ends in; None where it has none, or leaves it open ("between 5 and 6")."""
    text = cleaned(answer)
    boxed = _last_boxed(text)
    if boxed is not None:
        found = readings(boxed)
        return _of_segment(boxed, found) if found else None
    for marked in _MARK.finditer(text):
        found = readings(marked[0][4:])
        if found:
            return _of_segment(marked[0][4:], found)
    text = text.replace(_BOXED, " ")
    said = [match.end() for match in _ANSWER_IS.finditer(text)]
    for position in reversed(said[-_MOST_PHRASES:]):
        # The result may stand on the next line.
        segment = next(
            filter(str.strip, _SENTENCE_END.split(text[position : position + _LONGEST_SEGMENT])), ""
        )
        found = readings(segment)
        if found:
            return _of_segment(segment, found)
    segment = _last_sentence_with_a_value(text)
    return None if segment is None else _of_segment(segment, readings(segment))


def _last_boxed(text: str) -> str | None:
    """What stands in the last box, braces matched."""
    start = text.rfind(_BOXED)
    if start < 0:
        return None
    inside = text[start + len(_BOXED) :].lstrip(" ")
    if not inside.startswith("{"):
        return next(iter(inside[:40].split()), "")
    depth = 0
    for at, character in enumerate(inside):
        depth += (character == "{") - (character == "}")
        if depth == 0:
            return inside[1:at]
    return inside[1:]


def _last_sentence_with_a_value(text: str) -> str | None:
    """The end of a text from its last sentence on that has a value; of a long one its last characters."""
    sentences = _SENTENCE_END.split(text)
    worded = _DIGIT.search(text) is None
    for sentence in reversed(sentences):
        if worded or _DIGIT.search(sentence):
            segment = sentence[-_LONGEST_SEGMENT:]
            if readings(segment):
                return segment
    return None


def _of_segment(segment: str, found: list[Reading]) -> Value | None:
    """The result within one sentence."""
    if not found:
        return None
    first, last = found[0], found[-1]
    if len(found) == 1:
        return first.value
    equation = _of_equation(segment, found)
    if equation is not None:
        return equation
    if _leaves_open(segment, found):
        return None
    leads = not segment[: first.start].strip(" \t\n*_~≈=:#([{$\"'")
    if leads and not _OPERATOR.match(segment, first.end) and _qualified(segment, found[1:]):
        return first.value
    for reading, following in zip(reversed(found[:-1]), range(len(found) - 1, 0, -1), strict=True):
        if _IS.search(segment[max(0, reading.start - 24) : reading.start]):
            return reading.value if _qualified(segment, found[following:]) else last.value
    return last.value


def _of_equation(segment: str, found: list[Reading]) -> Value | None:
    """The side of the last equation that is one value: "9 * 2 = 18", "18 = 9 x 2"."""
    sides: list[list[Reading]] = []
    start = 0
    for match in re.finditer(r"=|≈", segment):
        sides.append([reading for reading in found if start <= reading.start < match.start()])
        start = match.end()
    if not sides:
        return None
    sides.append([reading for reading in found if reading.start >= start])
    right, left = sides[-1], next((side for side in reversed(sides[:-1]) if side), [])
    if len(right) > 1 and len(left) == 1 and _OPERATOR.match(segment, right[0].end):
        return left[0].value
    if len(right) == 1 or (len(right) > 1 and _qualified(segment, right[1:])):
        return right[0].value
    return None


def _qualified(segment: str, later: list[Reading]) -> bool:
    """Whether all later values only qualify the one before: "18 in 2 days", "18 (see step 3)"."""
    return all(_QUALIFIES.search(segment[max(0, one.start - 30) : one.start]) for one in later)


def _leaves_open(segment: str, found: list[Reading]) -> bool:
    """Whether the last two values are a range or a choice."""
    one, other = found[-2:]
    between = segment[one.end : other.start]
    if not _JOINED.fullmatch(between.strip() + " ") and not _JOINED.fullmatch(between):
        return False
    word = between.strip().lower()
    starts = _RANGE_BEGINS.search(segment[max(0, one.start - 12) : one.start]) is not None
    alone = not segment[: one.start].strip(" \t\n*_~≈=:#([{$\"'") and not segment[other.end :].strip(" .\n)*")
    return word == "or" or (starts and word in ("and", "to", "or", "-")) or (alone and word in ("to", "-"))


def numeric_match(answer: str, reference: str) -> float | None:
    """1 when both end in the same value; None when the reference has none."""
    wanted = result_of(reference)
    if wanted is None:
        return None
    found = result_of(answer)
    return float(found is not None and same_value(found, wanted))

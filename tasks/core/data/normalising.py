"""What two texts must share to be the same answer: their words, in order, in one form.

Forgiven are Unicode form, case, blanks, typographic quotes and dashes, punctuation around words, articles before a
word, and how a number is written (1.0, $1,000). Not forgiven are signs, decimal points, operators and symbols: 3.14 is
not 314, 1/2 is not 12. A text never becomes empty. SQuAD's rule, which drops all punctuation, is `squad_normalised`.
"""

from __future__ import annotations

import re
import string
import unicodedata
from collections.abc import Iterator

_WITHOUT_WIDTH = dict.fromkeys(map(ord, "\u00ad\u200b\u200c\u200d\u2060\ufeff"))
TYPOGRAPHY = str.maketrans(
    {
        **dict.fromkeys("\u2018\u2019\u201a\u201b\u02bc\u00b4`", "'"),
        **dict.fromkeys("\u201c\u201d\u201e\u201f\u00ab\u00bb\u300c\u300d\u300e\u300f", '"'),
        **dict.fromkeys("\u2010\u2011\u2012\u2013\u2014\u2015\u2212", "-"),
    }
)
_AROUND = ".,;:!?\"'()[]{}*_~\u2026\u3002\u3001\u30fb\uff61\u00bf\u00a1\u061f\u060c\u0964\u104b"
_ARTICLES = frozenset(("a", "an", "the"))
_NUMBER = re.compile(r"([-+]?)[$€£¥₹]?([-+]?)(\d{1,3}(?:,\d{3})+(?!\d)|\d+)?(\.\d+)?\Z")
# Scripts written without blanks between words: Thai, Lao, Burmese, Khmer, kana, Han.
UNSPACED = re.compile("[\u0e00-\u0eff\u1000-\u109f\u1780-\u17ff\u3040-\u30ff\u3400-\u9fff\uf900-\ufaff]")
_FINE = re.compile(r"(?:(?<![\w.])[-+])?\d+(?:[.,]\d+)*|[^\W\d_]+(?:['.&-][^\W\d_]+)*|\d+|[^\w\s]|_")


def words(text: str) -> list[str]:
    """The words of a text in the form in which two answers are compared; none only for a text of blanks."""
    form = unicodedata.normalize("NFKC", text).translate(TYPOGRAPHY).translate(_WITHOUT_WIDTH)
    tokens = form.casefold().split()
    kept = [plain for token in tokens if (plain := token if token.isalpha() else _plain(token))]
    if not kept:
        return tokens
    return [
        token
        for token, following in zip(kept, (*kept[1:], None), strict=True)
        if token not in _ARTICLES or following is None
    ]


def _plain(token: str) -> str:
    """A token without the punctuation around it, a number in one form; a point before a digit is a decimal point."""
    behind = token.rstrip(_AROUND)
    bare = behind.lstrip(_AROUND)
    at = len(behind) - len(bare)
    if at and bare[:1].isdigit() and behind[at - 1] == ".":
        bare = "." + bare
    return _number(bare)


def _number(token: str) -> str:
    """A number in one form: no currency, no marks between thousands, no plus, no zeros behind the last place."""
    found = _NUMBER.match(token) if token[-1:].isdigit() else None
    if found is None or not (found[3] or found[4]):
        return token
    whole = (found[3] or "0").replace(",", "").lstrip("0") or "0"
    places = (found[4] or "").rstrip("0").rstrip(".")
    negative = (found[1] == "-") != (found[2] == "-")
    return ("-" if negative and whole + places != "0" else "") + whole + places


def compared_units(text: str) -> list[str]:
    """The words of a text, with each character of a script without blanks as a word of its own."""
    found = words(text)
    return [unit for word in found for unit in _units(word)] if UNSPACED.search(text) else found


def _units(word: str) -> Iterator[str]:
    if not UNSPACED.search(word):
        yield word
        return
    start = 0
    for found in UNSPACED.finditer(word):
        if found.start() > start:
            yield word[start : found.start()]
        yield found[0]
        start = found.end()
    if start < len(word):
        yield word[start:]


def contains_words(answer: str, wanted: str) -> bool | None:
    """Whether the words of `wanted` stand one after another in the answer; None when it has no words."""
    needle, hay = _fine_units(wanted), _fine_units(answer)
    if not needle:
        return None
    # A separator that no unit holds makes this a search for a text, which is fast for any length.
    separated = "\x00".join(needle)
    return f"\x00{separated}\x00" in f"\x00{chr(0).join(hay)}\x00"


def _fine_units(text: str) -> list[str]:
    """Words, numbers and operators, also where no blank is between them (x=18)."""
    fine: list[str] = []
    for word in compared_units(text):
        if word.isalpha():
            fine.append(word)
        else:
            fine += (_number(piece) for piece in _FINE.findall(word))
    return [piece for piece in fine if piece not in _AROUND] or fine


_SQUAD_ARTICLES = re.compile(r"\b(a|an|the)\b")
_WITHOUT_PUNCTUATION = str.maketrans("", "", string.punctuation)


def squad_normalised(text: str) -> str:
    """SQuAD's evaluation script: lower case, no ASCII punctuation, no English articles, single spaces."""
    bare = text.lower().translate(_WITHOUT_PUNCTUATION)
    return " ".join(_SQUAD_ARTICLES.sub(" ", bare).split())

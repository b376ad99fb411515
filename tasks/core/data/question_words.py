"""What two questions must share to be the same question: their words, numbers and operators, in order.

Forgiven are Unicode form, invisible characters, case, blanks, punctuation, how dashes and quotes are drawn, marks
between thousands, and a number that the question has in a list. Numbers and the operators between them are content.
"""

from __future__ import annotations

import re
import unicodedata

from tasks.core.data.normalising import TYPOGRAPHY, UNSPACED

_INVISIBLE = re.compile(
    "[\u00ad\u034f\u061c\u115f\u1160\u17b4\u17b5\u180b-\u180f\u200b-\u200f\u202a-\u202e\u2060-\u206f"
    "\u3164\ufe00-\ufe0f\ufeff\U000e0000-\U000e0fff]"
)
# Vowel signs and accents belong to the word, but are no word characters to Python.
_MARKS = "".join(
    chr(code)
    for code in (*range(0x300, 0x2000), *range(0xA600, 0xAC00))
    if unicodedata.category(chr(code))[0] == "M"
)
_ENUMERATION = re.compile(r"[(\[]?\d{1,4}[.):\]] (?=\S)")
_THOUSANDS = re.compile(r"(?<=\d),(?=\d{3}(?!\d))")
_SYMBOLS = "\u00b1\u00d7\u00f7\u2211\u220f\u221a\u221e\u2248\u2260\u2264\u2265"
_TOKEN = re.compile(
    r"\d+(?:\.\d+)+"
    rf"|(?:[^\W_]|[{_MARKS}])+"
    r"|(?:(?<=[\d)])|(?<=[\d)] ))[-+*/^](?= ?[-\d(])"  # between numbers
    r"|(?<![^\s(])[-+](?=\d)"  # a sign
    r"|(?:(?<=[\w)])|(?<=[\w)] ))(?:!=|[<>=]+)(?= ?[\w(-])"
    r"|(?<=[^\W_])[+#]+(?![^\W_])"  # C++
    rf"|[{_SYMBOLS}]"
)
_ASCII_TOKEN = re.compile(_TOKEN.pattern.replace(rf"(?:[^\W_]|[{_MARKS}])+", r"[^\W_]+"), re.ASCII)
_NUMBER = re.compile(rf"[\d+*/^<>=!#{_SYMBOLS}-]")
_PIECE = re.compile(f"{UNSPACED.pattern}+|(?:(?!{UNSPACED.pattern}).)+")
_CHARACTERS_IN_WORD = 3


def question_words(text: str) -> list[str]:
    """The words of a question in the form in which two are compared.

    Of scripts without blanks each three successive characters are a word, whatever blanks or punctuation are between.
    """
    if text.isascii():
        return _ASCII_TOKEN.findall(_tidy(text.lower()))
    form = unicodedata.normalize("NFKC", _INVISIBLE.sub("", text)).translate(TYPOGRAPHY)
    tokens: list[str] = _TOKEN.findall(_tidy(form.casefold()))
    return _in_trigrams(tokens) if UNSPACED.search(form) else tokens


def is_number(word: str) -> bool:
    """Whether a word of a question is, or holds, a number or an operator."""
    return _NUMBER.search(word) is not None


def _tidy(text: str) -> str:
    single_spaced = " ".join(text.split())
    enumeration = _ENUMERATION.match(single_spaced)
    return _THOUSANDS.sub("", single_spaced[enumeration.end() :] if enumeration else single_spaced)


def _in_trigrams(tokens: list[str]) -> list[str]:
    words: list[str] = []
    run = ""
    for piece in (piece for token in tokens for piece in _PIECE.findall(token)):
        if UNSPACED.match(piece):
            run += piece
            continue
        words += _trigrams(run)
        run = ""
        words.append(piece)
    return words + _trigrams(run)


def _trigrams(run: str) -> list[str]:
    last = max(1, len(run) - _CHARACTERS_IN_WORD + 1)
    return [run[start : start + _CHARACTERS_IN_WORD] for start in range(last)] if run else []

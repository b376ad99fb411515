"""Thoughts and answers: which markers a model declares, and how a text is split by them."""

from __future__ import annotations

from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tasks.core.errors import ConfigError
from tasks.core.prompts.thought_markers import find_markers
from tasks.core.prompts.thoughts import (
    HARMONY,
    KNOWN_MARKERS,
    MarkerPair,
    ThoughtMarkers,
    could_open,
    open_pair,
    split,
)
from tests.conftest import build_tiny_tokenizer

THINK = ThoughtMarkers.from_setting(["<think>", "</think>"])
ANALYSIS, FINAL = "<|channel|>analysis<|message|>", "<|end|><|start|>assistant<|channel|>final<|message|>"


@pytest.mark.parametrize(
    ("text", "answer", "reasoning"),
    [
        ("<think>\nTwo and two.\n</think>\n\n4", "4", "Two and two."),
        ("  \n<think>a</think>4", "4", "a"),
        ("<think>\n\n</think>\n\n4", "4", None),
        ("<think></think>4", "4", None),
        ("<think>a</think>\n<think>b</think>\n4", "4", "a\n\nb"),
        ("<think>a<think>b</think>c</think>4", "4", "a<think>b</think>c"),
        ("<think>\n<think>a</think>4", "4", "a"),
        ("<think>I open <think> again</think>4", "4", "I open <think> again"),
        ("<think>it ends with `</think>` then</think>4", "4", "it ends with `</think>` then"),
        ('<think>the text says "4"</think>"4"', '"4"', 'the text says "4"'),
        ("<think>\n```\nx</think>4", "4", "```\nx"),
        ("<thinking>a</thinking>4", "4", "a"),
        ("<reasoning>\na\n</reasoning>\n4", "4", "a"),
        ("<seed:think>a</seed:think>4", "4", "a"),
        ("[THINK]a[/THINK]4", "4", "a"),
        ("◁think▷a◁/think▷4", "4", "a"),
        ("<|START_THINKING|>a<|END_THINKING|><|START_RESPONSE|>4<|END_RESPONSE|>", "4", "a"),
        ("Here is my thought process: a\n\nHere is my response: 4", "4", "a"),
        (f"{ANALYSIS}a{FINAL}4<|return|>", "4", "a"),
        (f"{ANALYSIS}a<|end|><|start|>assistant<|channel|>commentary<|message|>b{FINAL}4", "4", "a\n\nb"),
        (f"{ANALYSIS}a<|end|><|start|>assistant<|channel|>final <|constrain|>json<|message|>4", "4", "a"),
        ("<|channel|>final<|message|>4<|return|>", "4", None),
        ("analysisWe add them.assistantfinal4", "4", "We add them."),
    ],
)
def test_thoughts_at_the_beginning_are_split_from_the_answer(
    text: str, answer: str, reasoning: str | None
) -> None:
    assert split(text, KNOWN_MARKERS)[:3] == (answer, reasoning, False)


@pytest.mark.parametrize(
    "text",
    [
        "a\n</think>\n\n4",
        "a.</think>4",
        "a </think> 4",
        "```\ncode\n```\n</think>\n4",
        "\n</think>\n\n4",
        "</think>4",
    ],
)
@pytest.mark.parametrize("known_from_the_prompt", [True, False])
def test_a_closing_marker_alone_ends_thoughts_that_began_in_the_prompt(
    text: str, known_from_the_prompt: bool
) -> None:
    assert split(text, THINK, known_from_the_prompt).answer == "4"


@pytest.mark.parametrize(
    "text",
    [
        "4",
        "",
        "Write `<think>` before and `</think>` behind your thoughts.",
        "Models write <think>…</think> around their thoughts.",
        "Use `</think>`.",
        'The tag "</think>" closes them',
        "The closing tag is </think>.",
        "Code:\n```html\n</think>\n```\nThat is all.",
        "```xml\n<think>\nno thoughts\n</think>\n```",
        "`<think>` opens thoughts",
        "<result><reasoning>x</reasoning><score>3</score></result>",
        "Sure. <think>not at the beginning</think> 4",
        "analysis of the data shows nothing",
        "the assistantfinal word",
    ],
)
def test_an_answer_that_only_speaks_of_markers_stays_whole(text: str) -> None:
    assert split(text, KNOWN_MARKERS) == (text, None, False, 0, None)


@pytest.mark.parametrize(
    ("text", "inside", "reasoning"),
    [
        ("<think>Two and", False, "Two and"),
        ("Two and", True, "Two and"),
        ("", True, None),
        ("<think>a</think>\n<think>b", False, "a\n\nb"),
        ("<think>it ends with `</think>` and", False, "it ends with `</think>` and"),
        (f"{ANALYSIS}a<|end|><|start|>assistant", False, "a<|end|><|start|>assistant"),
        ("analysisWe need to add", False, "We need to add"),
    ],
)
def test_thoughts_that_never_close_leave_an_empty_answer(
    text: str, inside: bool, reasoning: str | None
) -> None:
    found = split(text, KNOWN_MARKERS, inside)
    assert (found.answer, found.is_cut) == ("", True)
    assert (found.reasoning or "").startswith((reasoning or "")[:1])


def test_without_markers_nothing_is_split() -> None:
    assert split("<think>a</think>4", ThoughtMarkers()).answer == "<think>a</think>4"


def test_an_empty_opening_marker_means_that_every_text_begins_inside_its_thoughts() -> None:
    markers = ThoughtMarkers.from_setting(["", "</think>"])
    assert split("a</think>4", markers).answer == "4"
    assert split("a", markers).is_cut
    assert open_pair("Question?", markers) is not None


@pytest.mark.parametrize("setting", [["<think>"], ["<think>", ""]])
def test_markers_that_are_no_pairs_are_refused(setting: list[str]) -> None:
    with pytest.raises(ConfigError, match="no pairs"):
        ThoughtMarkers.from_setting(setting)


words = st.text(st.characters(exclude_categories=["Cs"], exclude_characters="<>`\"'“\u2018«„"), max_size=40)


@given(thoughts=words, answer=words)
def test_whatever_is_thought_and_answered_the_answer_comes_back(thoughts: str, answer: str) -> None:
    found = split(f"<think>{thoughts}</think>{answer}", THINK)
    assert found.answer == answer.lstrip()
    assert found.reasoning == (thoughts.strip() or None)


@pytest.mark.parametrize(
    ("prompt", "inside"),
    [
        ("<|im_start|>assistant\n<think>\n", True),
        ("<|Assistant|><think>", True),
        ("<|im_start|>assistant\n<think>\n\n</think>\n\n", False),
        ("<|im_start|>assistant\n", False),
        ("<|im_start|>user\nWhat is <think><|im_end|>\n<|im_start|>assistant\n", False),
        ("Question: what is <think>\n\nAnswer:", False),
        (f"<|start|>assistant{ANALYSIS}", True),
        ("<|start|>assistant<|channel|>final<|message|>", False),
    ],
)
def test_a_prompt_is_inside_thoughts_when_an_opening_marker_ends_it(prompt: str, inside: bool) -> None:
    assert (open_pair(prompt, THINK | ThoughtMarkers((HARMONY,))) is not None) is inside


@pytest.mark.parametrize(
    ("begun", "could"), [("", True), (" <th", True), ("<think>a", True), ("<table>", False), ("4", False)]
)
def test_the_beginning_of_a_text_tells_whether_it_may_open_thoughts(begun: str, could: bool) -> None:
    assert could_open(begun, THINK) is could


# --- what models declare

_USER = "{{ '<|im_start|>' + m['role'] + '\\n' + m['content'] + '<|im_end|>\\n' }}"
_ASK = "{% if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% endif %}"


def _chat(assistant: str, ask: str = _ASK) -> str:
    return (
        "{% for m in messages %}{% if m['role'] == 'assistant' %}"
        + assistant
        + "{% else %}"
        + _USER
        + "{% endif %}{% endfor %}"
        + ask
    )


def _around(opening: str, closing: str, key: str = "m.reasoning_content") -> str:
    return (
        f"{{{{ '<|im_start|>assistant\\n' }}}}{{% if {key} %}}{{{{ '{opening}' + {key} + '{closing}' }}}}{{% endif %}}"
        "{{ m['content'] + '<|im_end|>\\n' }}"
    )


TEMPLATES: dict[str, tuple[str, tuple[str, str] | None]] = {
    "plain ChatML": (_chat("{{ '<|im_start|>assistant\\n' + m['content'] + '<|im_end|>\\n' }}"), None),
    "Qwen 3": (_chat(_around("<think>\\n", "\\n</think>\\n\\n")), ("<think>", "</think>")),
    "Qwen 3, thinking only": (
        _chat(
            _around("<think>\\n", "\\n</think>\\n\\n"),
            "{% if add_generation_prompt %}{{ '<|im_start|>assistant\\n<think>\\n' }}{% endif %}",
        ),
        ("<think>", "</think>"),
    ),
    "an empty block in the prompt": (
        _chat(
            _around("<think>\\n", "\\n</think>\\n\\n"),
            "{% if add_generation_prompt %}{{ '<|im_start|>assistant\\n<think>\\n\\n</think>\\n\\n' }}{% endif %}",
        ),
        ("<think>", "</think>"),
    ),
    "DeepSeek R1, which cuts thoughts off": (
        _chat(
            "{% set c = m['content'] %}{% if '</think>' in c %}{% set c = c.split('</think>')[-1] %}{% endif %}"
            "{{ '<|im_start|>assistant\\n' + c + '<|im_end|>\\n' }}",
            "{% if add_generation_prompt %}{{ '<|im_start|>assistant\\n<think>\\n' }}{% endif %}",
        ),
        ("<think>", "</think>"),
    ),
    "Seed": (_chat(_around("<seed:think>", "</seed:think>")), ("<seed:think>", "</seed:think>")),
    "another key": (
        _chat(_around("<reasoning>", "</reasoning>", "m.thinking")),
        ("<reasoning>", "</reasoning>"),
    ),
    "Command A": (
        _chat(_around("<|START_THINKING|>", "<|END_THINKING|><|START_RESPONSE|>")),
        ("<|START_THINKING|>", "<|END_THINKING|>"),
    ),
    "Magistral": (
        _chat(
            "{{ '<|im_start|>assistant\\n' }}{% if m['content'] is string %}{{ m['content'] }}{% else %}"
            "{% for part in m['content'] %}{% if part.type == 'thinking' %}{{ '[THINK]' + part.thinking + '[/THINK]' }}"
            "{% else %}{{ part.text }}{% endif %}{% endfor %}{% endif %}{{ '<|im_end|>\\n' }}"
        ),
        ("[THINK]", "[/THINK]"),
    ),
    "gpt-oss": (
        "{% for m in messages %}{% if m['role'] == 'assistant' %}"
        "{% if m.thinking %}"
        "{{ '<|start|>assistant<|channel|>analysis<|message|>' + m.thinking + '<|end|>' }}{% endif %}"
        "{{ '<|start|>assistant<|channel|>final<|message|>' + m['content'] + '<|return|>' }}"
        "{% else %}{{ '<|start|>' + m['role'] + '<|message|>' + m['content'] + '<|end|>' }}{% endif %}{% endfor %}"
        "{% if add_generation_prompt %}{{ '<|start|>assistant' }}{% endif %}",
        (HARMONY.opening, HARMONY.closing),
    ),
    "markers of no known shape": (
        _chat(_around("<|plan|>", "<|say|>")),
        ("<|plan|>", "<|say|>"),
    ),
    "words of the language": (
        _chat(_around("My notes: ", "\\nMy answer: ")),
        ("My notes:", "My answer:"),
    ),
}


@pytest.mark.parametrize("name", TEMPLATES)
def test_the_markers_are_found_from_what_the_template_writes(name: str) -> None:
    tokenizer = build_tiny_tokenizer()
    tokenizer.chat_template, declared = TEMPLATES[name]
    pairs = find_markers(tokenizer).pairs
    assert [(pair.opening, pair.closing) for pair in pairs[:1]] == ([declared] if declared else [])


def test_what_a_template_writes_around_the_answer_goes_with_the_thoughts() -> None:
    tokenizer = build_tiny_tokenizer()
    tokenizer.chat_template = _chat(
        "{{ '<|im_start|>assistant\\n' }}{% if m.reasoning_content %}"
        "{{ '<think>\\n' + m.reasoning_content + '\\n</think>\\n<answer>\\n' + m['content'] + '\\n</answer>' }}"
        "{% else %}{{ m['content'] }}{% endif %}{{ '<|im_end|>\\n' }}"
    )
    markers = find_markers(tokenizer)
    assert markers.pairs == (MarkerPair("<think>", "</think>", "<answer>", "</answer>"),)
    assert split("<think>\na\n</think>\n<answer>\n4\n</answer>", markers).answer == "4"


@pytest.mark.parametrize("special", [True, False])
def test_markers_that_only_the_tokenizer_knows_are_found(special: bool) -> None:
    tokenizer: Any = build_tiny_tokenizer()
    tokenizer.add_tokens(["<think>", "</think>"], special_tokens=special)
    tokenizer.chat_template = None
    assert find_markers(tokenizer).flat == ("<think>", "</think>")


def test_a_model_without_thoughts_declares_none(tiny_tokenizer: Any) -> None:
    assert not find_markers(tiny_tokenizer)

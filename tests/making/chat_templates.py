"""Chat templates of the families in wide use, rebuilt small: the same structure, and what has to come of each.

The conversations behind the expected texts: the question "Why?" with the answer "So." (thoughts: "Hm."), with and
without the system prompt "Be brief.", and two turns, "One?" "Uno." (thoughts: "A.") and "Two?" "Dos." ("B.").
"""

# ruff: noqa: RUF001  (DeepSeek's bars are wide ones)

from __future__ import annotations

import copy
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class TemplateCase:
    """A template, the tokens of its tokenizer, and what is asked and learnt with it, in literal text.

    `asks` and `asks_system` are prompts; `asks_closed` is the prompt behind which an answer without thoughts is
    learnt, where that is another one than `asks`. `learns` and `learns_thoughts` are what is learnt of the one
    answer, `turns` and `turns_thoughts` of the conversation of two, one text a row, the row of the last answer
    first. None for thoughts: they are left out. `end` closes a turn.
    """

    name: str
    template: str
    asks: str
    asks_system: str
    learns: str
    turns: tuple[str, ...]
    end: str | None
    asks_closed: str | None = None
    learns_thoughts: str | None = None
    turns_thoughts: tuple[str, ...] = ()
    bos: str | None = None
    eos: str = "<eos>"
    special: tuple[str, ...] = ()
    added: tuple[str, ...] = ()


def tokenizer_for(base: Any, case: TemplateCase) -> Any:
    """The tiny byte-level tokenizer with the tokens and the template of a case; like Qwen's it adds no BOS itself."""
    from tokenizers import processors

    tokenizer = copy.deepcopy(base)
    tokenizer.backend_tokenizer.post_processor = processors.ByteLevel(trim_offsets=True)
    special = [token for token in (*case.special, case.eos, case.bos) if token is not None]
    tokenizer.add_special_tokens({"additional_special_tokens": list(dict.fromkeys(special))})
    if case.added:
        tokenizer.add_tokens(list(case.added), special_tokens=False)
    tokenizer.eos_token, tokenizer.bos_token = case.eos, case.bos
    tokenizer.chat_template = case.template
    return tokenizer


_CHATML_TURNS = (
    "{% for m in messages %}{{ '<|im_start|>' + m.role + '\n' + m.content + '<|im_end|>\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
_CHATML_ASKS = "<|im_start|>user\nWhy?<|im_end|>\n<|im_start|>assistant\n"

LLAMA_2 = TemplateCase(
    name="llama 2",
    template=(
        "{% if messages[0].role == 'system' %}{% set turns = messages[1:] %}"
        "{% set rules = '<<SYS>>\n' + messages[0].content + '\n<</SYS>>\n\n' %}"
        "{% else %}{% set turns = messages %}{% set rules = '' %}{% endif %}"
        "{% for m in turns %}{% if m.role == 'user' %}"
        "{{ bos_token + '[INST] ' + (rules if loop.first else '') + m.content + ' [/INST]' }}"
        "{% else %}{{ ' ' + m.content + ' ' + eos_token }}{% endif %}{% endfor %}"
    ),
    bos="<s>",
    eos="</s>",
    asks="<s>[INST] Why? [/INST]",
    asks_system="<s>[INST] <<SYS>>\nBe brief.\n<</SYS>>\n\nWhy? [/INST]",
    learns=" So. </s>",
    turns=(" Uno. </s> Dos. </s>",),
    end="</s>",
)
LLAMA_3 = TemplateCase(
    name="llama 3",
    template=(
        "{{ bos_token }}{% for m in messages %}"
        "{{ '<|start_header_id|>' + m.role + '<|end_header_id|>\n\n' + m.content | trim + '<|eot_id|>' }}"
        "{% endfor %}{% if add_generation_prompt %}"
        "{{ '<|start_header_id|>assistant<|end_header_id|>\n\n' }}{% endif %}"
    ),
    bos="<|begin_of_text|>",
    eos="<|end_of_text|>",
    special=("<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>"),
    asks="<|begin_of_text|><|start_header_id|>user<|end_header_id|>\n\nWhy?<|eot_id|>"
    "<|start_header_id|>assistant<|end_header_id|>\n\n",
    asks_system="<|begin_of_text|><|start_header_id|>system<|end_header_id|>\n\nBe brief.<|eot_id|>"
    "<|start_header_id|>user<|end_header_id|>\n\nWhy?<|eot_id|><|start_header_id|>assistant<|end_header_id|>\n\n",
    learns="So.<|eot_id|>",
    turns=("Uno.<|eot_id|>Dos.<|eot_id|>",),
    end="<|eot_id|>",
)
QWEN_25 = TemplateCase(
    name="qwen 2.5",
    template=(
        "{% if messages[0].role != 'system' %}{{ '<|im_start|>system\nYou are Q.<|im_end|>\n' }}{% endif %}"
        + _CHATML_TURNS
    ),
    eos="<|im_end|>",
    special=("<|im_start|>", "<|endoftext|>"),
    asks="<|im_start|>system\nYou are Q.<|im_end|>\n" + _CHATML_ASKS,
    asks_system="<|im_start|>system\nBe brief.<|im_end|>\n" + _CHATML_ASKS,
    learns="So.<|im_end|>",
    turns=("Uno.<|im_end|>Dos.<|im_end|>",),
    end="<|im_end|>",
)
_QWEN_3_TURNS = (
    "{% set last = namespace(user=0) %}"
    "{% for m in messages %}{% if m.role == 'user' %}{% set last.user = loop.index0 %}{% endif %}{% endfor %}"
    "{% for m in messages %}{% if m.role != 'assistant' %}"
    "{{ '<|im_start|>' + m.role + '\n' + m.content + '<|im_end|>\n' }}{% else %}"
    "{% set said = m.content %}{% set thought = '' %}"
    "{% if m.reasoning_content is string %}{% set thought = m.reasoning_content %}"
    "{% elif '</think>' in said %}{% set thought = said.split('</think>')[0].split('<think>')[-1] %}"
    "{% set said = said.split('</think>')[-1].lstrip('\n') %}{% endif %}"
    "{% if loop.index0 > last.user %}"
    "{{ '<|im_start|>assistant\n<think>\n' + thought.strip('\n') + '\n</think>\n\n' + said.lstrip('\n') }}"
    "{% else %}{{ '<|im_start|>assistant\n' + said }}{% endif %}{{ '<|im_end|>\n' }}{% endif %}{% endfor %}"
)
QWEN_3 = TemplateCase(
    name="qwen 3",
    template=(
        _QWEN_3_TURNS + "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}"
        "{% if enable_thinking is defined and enable_thinking is false %}{{ '<think>\n\n</think>\n\n' }}{% endif %}"
        "{% endif %}"
    ),
    eos="<|im_end|>",
    special=("<|im_start|>",),
    added=("<think>", "</think>"),
    asks=_CHATML_ASKS,
    asks_system="<|im_start|>system\nBe brief.<|im_end|>\n" + _CHATML_ASKS,
    asks_closed=_CHATML_ASKS + "<think>\n\n</think>\n\n",
    learns="So.<|im_end|>",
    learns_thoughts="<think>\nHm.\n</think>\n\nSo.<|im_end|>",
    turns=("Dos.<|im_end|>", "Uno.<|im_end|>"),
    turns_thoughts=("<think>\nB.\n</think>\n\nDos.<|im_end|>", "<think>\nA.\n</think>\n\nUno.<|im_end|>"),
    end="<|im_end|>",
)
QWEN_3_THINKING = TemplateCase(
    name="qwen 3, thinking only",
    template=_QWEN_3_TURNS
    + "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n<think>\n' }}{% endif %}",
    eos="<|im_end|>",
    special=("<|im_start|>",),  # here the markers of thoughts are plain text to the tokenizer
    asks=_CHATML_ASKS + "<think>\n",
    asks_system="<|im_start|>system\nBe brief.<|im_end|>\n" + _CHATML_ASKS + "<think>\n",
    asks_closed=_CHATML_ASKS + "<think>\n\n</think>\n\n",
    learns="So.<|im_end|>",
    learns_thoughts="Hm.\n</think>\n\nSo.<|im_end|>",
    turns=("Dos.<|im_end|>", "Uno.<|im_end|>"),
    turns_thoughts=("B.\n</think>\n\nDos.<|im_end|>", "A.\n</think>\n\nUno.<|im_end|>"),
    end="<|im_end|>",
)
MISTRAL_1 = TemplateCase(
    name="mistral v1",
    template=(
        "{{ bos_token }}{% for m in messages %}"
        "{% if (m.role == 'user') != (loop.index0 % 2 == 0) %}{{ raise_exception('roles must alternate') }}{% endif %}"
        "{% if m.role == 'user' %}{{ '[INST] ' + m.content + ' [/INST]' }}"
        "{% else %}{{ ' ' + m.content + eos_token }}{% endif %}{% endfor %}"
    ),
    bos="<s>",
    eos="</s>",
    asks="<s>[INST] Why? [/INST]",
    asks_system="<s>[INST] Be brief.\n\nWhy? [/INST]",
    learns=" So.</s>",
    turns=(" Uno.</s> Dos.</s>",),
    end="</s>",
)
MISTRAL_NEMO = TemplateCase(
    name="mistral nemo",
    template=(
        "{% set rules = '' %}{% set turns = messages %}{% if messages[0].role == 'system' %}"
        "{% set rules = messages[0].content + '\n\n' %}{% set turns = messages[1:] %}{% endif %}"
        "{{ bos_token }}{% set last = (turns | selectattr('role', 'equalto', 'user') | list)[-1] %}"
        "{% for m in turns %}{% if m.role == 'user' %}"
        "{{ '[INST]' + (rules if m == last else '') + m.content + '[/INST]' }}"
        "{% else %}{{ m.content + eos_token }}{% endif %}{% endfor %}"
    ),
    bos="<s>",
    eos="</s>",
    special=("[INST]", "[/INST]"),
    asks="<s>[INST]Why?[/INST]",
    asks_system="<s>[INST]Be brief.\n\nWhy?[/INST]",
    learns="So.</s>",
    turns=("Uno.</s>Dos.</s>",),
    end="</s>",
)
_GEMMA_TURNS = (
    "{% for m in turns %}{{ '<start_of_turn>' + ('model' if m.role == 'assistant' else m.role) + '\n' }}"
    "{{ (rules if loop.first else '') + m.content | trim + '<end_of_turn>\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<start_of_turn>model\n' }}{% endif %}"
)
_GEMMA_ASKS = "<bos><start_of_turn>user\nWhy?<end_of_turn>\n<start_of_turn>model\n"
_GEMMA_ASKS_SYSTEM = "<bos><start_of_turn>user\nBe brief.\n\nWhy?<end_of_turn>\n<start_of_turn>model\n"
GEMMA_2 = TemplateCase(
    name="gemma 2",
    template=(
        "{{ bos_token }}{% if messages[0].role == 'system' %}{{ raise_exception('no system role') }}{% endif %}"
        "{% set turns = messages %}{% set rules = '' %}" + _GEMMA_TURNS
    ),
    bos="<bos>",
    special=("<start_of_turn>", "<end_of_turn>"),
    asks=_GEMMA_ASKS,
    asks_system=_GEMMA_ASKS_SYSTEM,
    learns="So.<end_of_turn>",
    turns=("Uno.<end_of_turn>Dos.<end_of_turn>",),
    end="<end_of_turn>",
)
GEMMA_3 = TemplateCase(
    name="gemma 3",
    template=(
        "{{ bos_token }}{% if messages[0].role == 'system' %}{% set rules = messages[0].content + '\n\n' %}"
        "{% set turns = messages[1:] %}{% else %}{% set rules = '' %}{% set turns = messages %}{% endif %}"
        + _GEMMA_TURNS
    ),
    bos="<bos>",
    special=("<start_of_turn>", "<end_of_turn>"),
    asks=_GEMMA_ASKS,
    asks_system=_GEMMA_ASKS_SYSTEM,
    learns="So.<end_of_turn>",
    turns=("Uno.<end_of_turn>Dos.<end_of_turn>",),
    end="<end_of_turn>",
)
PHI_3 = TemplateCase(
    name="phi 3",
    template=(
        "{% for m in messages %}{{ '<|' + m.role + '|>\n' + m.content + '<|end|>\n' }}{% endfor %}"
        "{% if add_generation_prompt %}{{ '<|assistant|>\n' }}{% else %}{{ eos_token }}{% endif %}"
    ),
    eos="<|endoftext|>",
    special=("<|user|>", "<|assistant|>", "<|system|>", "<|end|>"),
    asks="<|user|>\nWhy?<|end|>\n<|assistant|>\n",
    asks_system="<|system|>\nBe brief.<|end|>\n<|user|>\nWhy?<|end|>\n<|assistant|>\n",
    learns="So.<|end|>",
    turns=("Uno.<|end|>Dos.<|end|>",),  # what it puts behind a whole conversation rewrites no turn
    end="<|end|>",
)
PHI_4 = TemplateCase(
    name="phi 4",
    template=(
        "{% for m in messages %}{{ '<|im_start|>' + m.role + '<|im_sep|>' + m.content + '<|im_end|>' }}{% endfor %}"
        "{% if add_generation_prompt %}{{ '<|im_start|>assistant<|im_sep|>' }}{% endif %}"
    ),
    eos="<|endoftext|>",
    special=("<|im_start|>", "<|im_sep|>", "<|im_end|>"),
    asks="<|im_start|>user<|im_sep|>Why?<|im_end|><|im_start|>assistant<|im_sep|>",
    asks_system="<|im_start|>system<|im_sep|>Be brief.<|im_end|><|im_start|>user<|im_sep|>Why?<|im_end|>"
    "<|im_start|>assistant<|im_sep|>",
    learns="So.<|im_end|>",
    turns=("Uno.<|im_end|>Dos.<|im_end|>",),
    end="<|im_end|>",
)
SMOLLM_2 = TemplateCase(
    name="smollm 2",
    template=(
        "{% for m in messages %}{% if loop.first and m.role != 'system' %}"
        "{{ '<|im_start|>system\nYou are S.<|im_end|>\n' }}{% endif %}"
        "{{ '<|im_start|>' + m.role + '\n' + m.content + '<|im_end|>\n' }}{% endfor %}"
        "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
    ),
    bos="<|im_start|>",  # which it writes, but not as a BOS
    eos="<|im_end|>",
    asks="<|im_start|>system\nYou are S.<|im_end|>\n" + _CHATML_ASKS,
    asks_system="<|im_start|>system\nBe brief.<|im_end|>\n" + _CHATML_ASKS,
    learns="So.<|im_end|>",
    turns=("Uno.<|im_end|>Dos.<|im_end|>",),
    end="<|im_end|>",
)
SMOLLM_3 = TemplateCase(
    name="smollm 3",
    template=(
        "{% if enable_thinking is not defined %}{% set enable_thinking = true %}{% endif %}"
        "{% set mode = '/think' if enable_thinking else '/no_think' %}"
        "{% set head = '' if enable_thinking else '<think>\n\n</think>\n' %}"
        "{% set rules = messages[0].content if messages[0].role == 'system' else 'You are S.' %}"
        "{{ '<|im_start|>system\nReasoning Mode: ' + mode + '\n' + rules + '<|im_end|>\n' }}"
        "{% for m in messages %}{% if m.role == 'user' %}{{ '<|im_start|>user\n' + m.content + '<|im_end|>\n' }}"
        "{% elif m.role == 'assistant' %}"
        "{{ '<|im_start|>assistant\n' + head + m.content.lstrip('\n') + '<|im_end|>\n' }}{% endif %}{% endfor %}"
        "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' + head }}{% endif %}"
    ),
    eos="<|im_end|>",
    special=("<|im_start|>",),
    added=("<think>", "</think>"),
    asks="<|im_start|>system\nReasoning Mode: /think\nYou are S.<|im_end|>\n" + _CHATML_ASKS,
    asks_system="<|im_start|>system\nReasoning Mode: /think\nBe brief.<|im_end|>\n" + _CHATML_ASKS,
    asks_closed="<|im_start|>system\nReasoning Mode: /no_think\nYou are S.<|im_end|>\n"
    + _CHATML_ASKS
    + "<think>\n\n</think>\n",
    learns="So.<|im_end|>",
    learns_thoughts="<think>\nHm.\n</think>\n\nSo.<|im_end|>",
    turns=("Uno.<|im_end|>Dos.<|im_end|>",),
    turns_thoughts=("<think>\nB.\n</think>\n\nDos.<|im_end|>", "<think>\nA.\n</think>\n\nUno.<|im_end|>"),
    end="<|im_end|>",
)
CHATML = TemplateCase(
    name="chatml on a base model",
    template=_CHATML_TURNS,
    eos="<|endoftext|>",
    special=("<|im_start|>", "<|im_end|>"),
    asks=_CHATML_ASKS,
    asks_system="<|im_start|>system\nBe brief.<|im_end|>\n" + _CHATML_ASKS,
    learns="So.<|im_end|>",
    turns=("Uno.<|im_end|>Dos.<|im_end|>",),
    end="<|im_end|>",
)
_DEEPSEEK_START = (
    "{% set rules = namespace(text='') %}{% for m in messages %}{% if m.role == 'system' %}"
    "{% set rules.text = rules.text + m.content %}{% endif %}{% endfor %}{{ bos_token + rules.text }}"
    "{% for m in messages %}{% if m.role == 'user' %}{{ '<｜User｜>' + m.content }}{% elif m.role == 'assistant' %}"
)
_DEEPSEEK_TOKENS = {
    "bos": "<｜begin▁of▁sentence｜>",
    "eos": "<｜end▁of▁sentence｜>",
    "special": ("<｜User｜>", "<｜Assistant｜>"),
}
_DEEPSEEK_ASKS = "<｜begin▁of▁sentence｜><｜User｜>Why?<｜Assistant｜>"
_DEEPSEEK_ASKS_SYSTEM = "<｜begin▁of▁sentence｜>Be brief.<｜User｜>Why?<｜Assistant｜>"
DEEPSEEK_V3 = TemplateCase(
    name="deepseek v3",
    template=(
        _DEEPSEEK_START
        + "{{ '<｜Assistant｜>' + m.content + '<｜end▁of▁sentence｜>' }}{% endif %}{% endfor %}"
        "{% if add_generation_prompt %}{{ '<｜Assistant｜>' }}{% endif %}"
    ),
    asks=_DEEPSEEK_ASKS,
    asks_system=_DEEPSEEK_ASKS_SYSTEM,
    learns="So.<｜end▁of▁sentence｜>",
    turns=("Uno.<｜end▁of▁sentence｜>Dos.<｜end▁of▁sentence｜>",),
    end="<｜end▁of▁sentence｜>",
    **_DEEPSEEK_TOKENS,  # type: ignore[arg-type]
)
DEEPSEEK_V31 = TemplateCase(
    name="deepseek v3.1",
    template=(
        "{% if thinking is not defined %}{% set thinking = false %}{% endif %}"
        + _DEEPSEEK_START
        + "{{ '<｜Assistant｜>' "
        "+ ('</think>' if loop.last else '') + m.content.split('</think>')[-1] + '<｜end▁of▁sentence｜>' }}"
        "{% endif %}{% endfor %}"
        "{% if add_generation_prompt %}{{ '<｜Assistant｜>' + ('<think>' if thinking else '</think>') }}{% endif %}"
    ),
    added=("<think>", "</think>"),
    asks=_DEEPSEEK_ASKS + "</think>",
    asks_system=_DEEPSEEK_ASKS_SYSTEM + "</think>",
    learns="So.<｜end▁of▁sentence｜>",
    turns=("Dos.<｜end▁of▁sentence｜>", "Uno.<｜end▁of▁sentence｜>"),
    end="<｜end▁of▁sentence｜>",
    **_DEEPSEEK_TOKENS,  # type: ignore[arg-type]
)
DEEPSEEK_R1 = TemplateCase(
    name="deepseek r1",
    template=(
        _DEEPSEEK_START
        + "{{ '<｜Assistant｜>' + m.content.split('</think>')[-1] + '<｜end▁of▁sentence｜>' }}"
        "{% endif %}{% endfor %}{% if add_generation_prompt %}{{ '<｜Assistant｜><think>\n' }}{% endif %}"
    ),
    added=("<think>", "</think>"),
    asks=_DEEPSEEK_ASKS + "<think>\n",
    asks_system=_DEEPSEEK_ASKS_SYSTEM + "<think>\n",
    asks_closed=_DEEPSEEK_ASKS + "<think>\n\n</think>\n\n",
    learns="So.<｜end▁of▁sentence｜>",
    learns_thoughts="Hm.\n</think>\n\nSo.<｜end▁of▁sentence｜>",
    turns=("Dos.<｜end▁of▁sentence｜>", "Uno.<｜end▁of▁sentence｜>"),
    turns_thoughts=("B.\n</think>\n\nDos.<｜end▁of▁sentence｜>", "A.\n</think>\n\nUno.<｜end▁of▁sentence｜>"),
    end="<｜end▁of▁sentence｜>",
    **_DEEPSEEK_TOKENS,  # type: ignore[arg-type]
)
GPT_OSS = TemplateCase(
    name="gpt-oss",
    template=(
        "{{ '<|start|>system<|message|>Reasoning: ' + (reasoning_effort or 'medium') + '<|end|>' }}"
        "{% for m in messages %}{% if m.role == 'system' %}"
        "{{ '<|start|>developer<|message|># Instructions\n\n' + m.content + '<|end|>' }}"
        "{% elif m.role == 'user' %}{{ '<|start|>user<|message|>' + m.content + '<|end|>' }}"
        "{% elif loop.last and not add_generation_prompt %}{% if m.thinking %}"
        "{{ '<|start|>assistant<|channel|>analysis<|message|>' + m.thinking + '<|end|>' }}{% endif %}"
        "{{ '<|start|>assistant<|channel|>final<|message|>' + m.content + '<|return|>' }}"
        "{% else %}{{ '<|start|>assistant<|channel|>final<|message|>' + m.content + '<|end|>' }}{% endif %}"
        "{% endfor %}{% if add_generation_prompt %}{{ '<|start|>assistant' }}{% endif %}"
    ),
    bos="<|startoftext|>",
    eos="<|return|>",
    special=("<|start|>", "<|message|>", "<|channel|>", "<|end|>", "<|call|>"),
    asks="<|start|>system<|message|>Reasoning: medium<|end|><|start|>user<|message|>Why?<|end|><|start|>assistant",
    asks_system="<|start|>system<|message|>Reasoning: medium<|end|><|start|>developer<|message|># Instructions\n\n"
    "Be brief.<|end|><|start|>user<|message|>Why?<|end|><|start|>assistant",
    asks_closed="<|start|>system<|message|>Reasoning: medium<|end|><|start|>user<|message|>Why?<|end|>"
    "<|start|>assistant<|channel|>final<|message|>",
    learns="So.<|return|>",
    learns_thoughts="<|channel|>analysis<|message|>Hm.<|end|><|start|>assistant<|channel|>final<|message|>So.<|return|>",
    turns=("Dos.<|return|>", "Uno.<|return|>"),  # in a conversation that goes on, an answer ends with <|end|>
    turns_thoughts=(
        "<|channel|>analysis<|message|>B.<|end|><|start|>assistant<|channel|>final<|message|>Dos.<|return|>",
        "<|channel|>analysis<|message|>A.<|end|><|start|>assistant<|channel|>final<|message|>Uno.<|return|>",
    ),
    end="<|return|>",
)
GLM_4 = TemplateCase(
    name="glm 4",
    template=(
        "{{ '[gMASK]<sop>' }}{% for m in messages %}{{ '<|' + m.role + '|>\n' + m.content }}{% endfor %}"
        "{% if add_generation_prompt %}{{ '<|assistant|>' }}{% endif %}"
    ),
    eos="<|endoftext|>",
    special=("[gMASK]", "<sop>", "<|user|>", "<|assistant|>", "<|system|>"),
    asks="[gMASK]<sop><|user|>\nWhy?<|assistant|>",
    asks_system="[gMASK]<sop><|system|>\nBe brief.<|user|>\nWhy?<|assistant|>",
    learns="\nSo.<|endoftext|>",
    turns=(
        "\nDos.<|endoftext|>",
        "\nUno.<|endoftext|>",
    ),  # it ends no turn: each answer gets the end of texts
    end=None,
)

CASES = (
    *(
        LLAMA_2,
        LLAMA_3,
        QWEN_25,
        QWEN_3,
        QWEN_3_THINKING,
        MISTRAL_1,
        MISTRAL_NEMO,
        GEMMA_2,
        GEMMA_3,
        PHI_3,
        PHI_4,
    ),
    *(SMOLLM_2, SMOLLM_3, CHATML, DEEPSEEK_V3, DEEPSEEK_V31, DEEPSEEK_R1, GPT_OSS, GLM_4),
)

"""How a model is asked, and how what it says is read.

In go a tokenizer with its chat template and an example; out come token ids (for training with the spans that are
learnt), and from a model's tokens its answer apart from its thoughts. Read `chat_template.py` first, then
`chat_tokenization.py`, `tokens.py` (prompts and training rows), `shortening.py`, `answer_spans.py`; `thoughts.py`,
`thought_markers.py`, `thinking.py` and `answer_reading.py` for models that think; `preview.py` shows all of it.
"""

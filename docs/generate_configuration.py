"""Writes docs/configuration.md from the settings' models: `python docs/generate_configuration.py`."""

from __future__ import annotations

import inspect
from pathlib import Path

from pydantic.fields import FieldInfo

from tasks.core.config.changes import Changes, changes_of
from tasks.core.config.describing import allowed, shown
from tasks.core.config.sections import SECTIONS, Section

PAGE_PATH = Path(__file__).with_name("configuration.md")

INTRODUCTION = """\
<!-- Written by docs/generate_configuration.py from tasks/core/config/sections.py; do not edit by hand. -->
# Configuration

All settings have a default. Three places can change them; a later one beats an earlier one:

1. A TOML file: the path given to the command, else `./config.toml` if it exists.
2. Environment variables, `TUNEPROOF_SECTION__KEY`: `TUNEPROOF_INFERENCER__MAX_NEW_TOKENS=64`.
3. The command line, `--section.key VALUE`: `tuneproof infer --inferencer.max-new-tokens 64`.

```toml
[fine_tuner]
training_data_id = "data/train.jsonl"
epochs = 2

[inferencer]
testing_data_id = "data/test.jsonl"
temperature = 0
```

`tuneproof pipeline --dry-run` checks all of it, with model, data and disk, and runs nothing.

## Rules

- `"null"` means none, in all three places and in lists.
- `${VAR}` inside a text is replaced by that environment variable; several in one text are fine. A variable
  that is not set is an error. Write `$${VAR}` for a literal `${VAR}`.
- Lists on the command line and in variables: `f1,chrf`, or as in TOML: `'["f1", "chrf"]'`.
- A setting that is true or false may stand alone on the command line: `--inferencer.load-in-4bit`.
- An unknown key, a wrong type, a value out of bounds or two keys that contradict each other end the command
  with exit code 2. The message lists all of them with file, line, section, key, value and what is allowed.
- Tokens are never settings. Set `HF_TOKEN` (or give `--hf-key`), `OPENAI_API_KEY`, `WANDB_API_KEY`.
- The column *changes* says what another value makes other: the **answers** of a run, which then is another run; the
  **weights** of a training, which then is another training; the **figures** of an evaluation (scores, comparison,
  verdict), which then is done again; or **nothing** of these.
- A file of the original fine-tune pipeline loads as it is; see [migrate.md](migrate.md).
"""


def render() -> str:
    """Give the whole page."""
    sections = [_section(name, model) for name, model in SECTIONS.items()]
    return "\n".join([INTRODUCTION, *sections])


def _section(name: str, model: type[Section]) -> str:
    purpose = (inspect.getdoc(model) or "").split(": ", 1)[-1]
    # Keys of the section itself come first, those it shares with other sections after them.
    own = [key for key in model.model_fields if key in model.__annotations__]
    shared = [key for key in model.model_fields if key not in model.__annotations__]
    changes = changes_of(model)
    rows = [_row(key, model.model_fields[key], changes[key]) for key in (*own, *shared)]
    return "\n".join(
        [
            f"## [{name}]\n",
            f"{purpose[0].upper()}{purpose[1:]}\n",
            "| key | meaning | allowed | default | changes |",
            "|---|---|---|---|---|",
            *rows,
            "",
        ]
    )


def _row(key: str, field: FieldInfo, changes: Changes) -> str:
    default = field.get_default(call_default_factory=True)
    cells = (f"`{key}`", field.description or "", allowed(field), f"`{_toml(default)}`", changes.effect)
    return "| " + " | ".join(cell.replace("|", "\\|") for cell in cells) + " |"


def _toml(default: object) -> str:
    return shown(list(default) if isinstance(default, tuple) else default)


if __name__ == "__main__":
    PAGE_PATH.write_text(render(), encoding="utf-8")

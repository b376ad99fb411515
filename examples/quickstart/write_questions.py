"""Write the quickstart's questions: small family trees, each with one right answer of one word.

    python examples/quickstart/write_questions.py [FOLDER]

reasoning-gym makes them up from a seed, so the same version writes the same files. A question occurs once, in
either file. Without a folder the files beside this script are written.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator
from pathlib import Path

import reasoning_gym

TRAINING_ROWS = 300
TEST_ROWS = 100
SEED = 20_000
MIN_PERSONS, MAX_PERSONS = 4, 5


def questions() -> Iterator[dict[str, str]]:
    """Yield questions, each once."""
    generated = reasoning_gym.create_dataset(
        "family_relationships",
        size=10 * (TRAINING_ROWS + TEST_ROWS),
        seed=SEED,
        min_family_size=MIN_PERSONS,
        max_family_size=MAX_PERSONS,
    )
    seen: set[str] = set()
    for row in generated:
        question, answer = row["question"].strip(), row["answer"].strip()
        # reasoning-gym 0.1.25 mixes up the two sides of in-law questions; they are left out.
        if question not in seen and not answer.endswith("in-law"):
            seen.add(question)
            yield {"question": question, "answer": answer}


def write_questions(folder: Path) -> None:
    """Write `train.jsonl` and `test.jsonl` into the folder."""
    rows = questions()
    for name, count in (("train.jsonl", TRAINING_ROWS), ("test.jsonl", TEST_ROWS)):
        lines = [json.dumps(next(rows), ensure_ascii=False) + "\n" for _ in range(count)]
        (folder / name).write_text("".join(lines), encoding="utf-8")


if __name__ == "__main__":
    write_questions(Path(sys.argv[1]) if len(sys.argv) > 1 else Path(__file__).parent)

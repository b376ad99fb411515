"""Several right answers: the best of them counts, from the dataset's cell to the figures; the first is learnt."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from tasks.core.data.columns import ColumnMapping, examples
from tasks.core.metrics.catalogue import resolve
from tasks.core.metrics.judge.prompts import accuracy_prompt, factual_prompt, preference_prompt
from tasks.core.metrics.metric import NO_REFERENCE
from tasks.core.records import Completion, Example, ModelIdentity, Prediction
from tasks.core.report.row_view import _shown
from tasks.core.runs.published import _prediction, read_predictions


@pytest.mark.parametrize(
    ("cell", "references"),
    [
        (["Vienna", "Wien", "Vienna, Austria"], ("Vienna", "Wien", "Vienna, Austria")),
        (["Vienna", None, " ", "Vienna", "Wien"], ("Vienna", "Wien")),
        ({"text": ["Ann", "Anne"], "answer_start": [0, 5]}, ("Ann", "Anne")),
        ([{"text": "Ann", "answer_start": 0}, {"text": "Anne", "answer_start": 5}], ("Ann", "Anne")),
        ({"value": "Ann", "aliases": ["Anne", "Ann"]}, ("Ann", "Anne")),
        (np.array(["Ann", "Anne"]), ("Ann", "Anne")),
        ({"text": np.array(["Ann", "Anne"]), "answer_start": np.array([0, 5])}, ("Ann", "Anne")),
        ([4, 4.5], ("4", "4.5")),
        ({"text": [], "answer_start": []}, ()),
        ([], ()),
        (float("nan"), ()),
        # one answer each: an object, or a list of objects or lists
        ({"city": "Röm", "n": [1, True]}, ('{"city":"Röm","n":[1,true]}',)),
        ({"text": "Rome", "lang": "it"}, ('{"text":"Rome","lang":"it"}',)),
        ([{"city": "Rome"}, {"city": "Oslo"}], ('[{"city":"Rome"},{"city":"Oslo"}]',)),
        ({"role": "engineer", "name": "Bob"}, ('{"role":"engineer","name":"Bob"}',)),
        ('["a", "b"]', ('["a", "b"]',)),
        (True, ("true",)),
    ],
)
def test_a_cell_gives_its_right_answers(cell: Any, references: tuple[str, ...]) -> None:
    (example,) = examples([{"question": "q", "answer": cell}], ColumnMapping("question", "answer"))
    assert example.reference == (references[0] if references else None)
    assert example.other_references == references[1:]
    assert example.problem is None


def test_other_right_answers_make_another_row() -> None:
    def row_id(cell: Any) -> str:
        (example,) = examples([{"question": "q", "answer": cell}], ColumnMapping("question", "answer"))
        return example.id

    assert row_id(["a"]) == row_id("a")
    assert len({row_id("a"), row_id(["a", "b"]), row_id(["a", "c"])}) == 3


def _row(answer: str, *references: str) -> Prediction:
    first, *others = references or (None,)
    return Prediction(
        id="1", question="q", predicted_answer=answer, ground_truth=first, other_ground_truths=tuple(others)
    )


@pytest.mark.parametrize(
    ("metric", "answer", "references"),
    [
        ("exact_match", "Wien", ("Vienna", "Wien")),
        ("f1", "Wien", ("Vienna", "Wien")),
        ("bleu_score", "in the old town of Wien", ("Vienna", "in the old town of Wien")),
        ("chrf", "Wien", ("Vienna", "Wien")),
        ("rouge_score", "old Wien", ("Vienna", "old Wien")),
        ("contains", "it is Wien", ("Vienna", "Wien")),
        ("numeric_match", "it is 2", ("none", "1", "2")),
        ("regex_match", "Wien", ("[", "W.en")),
        ("json_match", '{"a": 1}', ("no json", '{"a":1}')),
    ],
)
def test_the_best_reference_counts(metric: str, answer: str, references: tuple[str, ...]) -> None:
    (family,) = resolve([metric])
    rows = [
        _row(answer, *references),
        _row(answer),
        _row("something else", *references),
        _row(answer, references[-1]),
    ]
    for order in (rows, [_row(row.predicted_answer, *row.references[::-1]) for row in rows]):
        scores = family.score(order)
        for name, values in scores.values.items():
            assert values[0] == values[3] == 1.0, name
            assert np.isnan(values[1])
            assert values[2] < 1.0
            if name in scores.statistics:
                assert np.array_equal(scores.statistics[name][0], scores.statistics[name][3])
                assert not scores.statistics[name][1].any()
        assert scores.reasons[:2] == [None, NO_REFERENCE]


def test_rows_without_any_reference_are_scored_by_no_overlap() -> None:
    for name in ("bleu_score", "chrf", "rouge_score"):
        (family,) = resolve([name])
        assert family.score([_row("a"), _row("b")]).reasons == [NO_REFERENCE, NO_REFERENCE]


def test_the_embedding_nearest_to_the_answer_counts() -> None:
    from tasks.core.metrics.similarity_metrics import SimilarityScore, TokenMatchScore

    class Embedder:
        def embed(self, texts: list[str]) -> tuple[Any, list[str | None]]:
            vectors = {"x": [1.0, 0.0], "y": [0.0, 1.0]}
            return np.array([vectors.get(text, [0.6, 0.8]) for text in texts]), [
                "failed" if text == "broken" else None for text in texts
            ]

    class Matcher:
        def f1(self, answers: list[str], references: list[str]) -> Any:
            return np.array([float(a == r) for a, r in zip(answers, references, strict=True)])

    class Sources:
        embedder, token_matcher = Embedder(), Matcher()

    rows = [_row("x", "y", "x"), _row("x"), _row("x", "y", "z"), _row("x", "x", "broken")]
    similar = SimilarityScore(Sources())(rows)  # type: ignore[arg-type]
    assert similar.values["semantic_similarity"][[0, 2]] == pytest.approx([1.0, 0.6])
    assert similar.reasons == [None, NO_REFERENCE, None, "failed"]
    assert np.isnan(similar.values["semantic_similarity"][[1, 3]]).all()
    matched = TokenMatchScore(Sources())(rows)  # type: ignore[arg-type]
    assert matched.values["bert_score"][[0, 2, 3]].tolist() == [1.0, 0.0, 1.0]
    assert np.isnan(matched.values["bert_score"][1])


def test_a_judge_sees_all_right_answers_and_is_asked_as_before_where_there_is_one() -> None:
    for prompt in (
        factual_prompt("q", "a", ("Vienna", "Wien")),
        accuracy_prompt("q", "a", ("Vienna", "Wien")),
        accuracy_prompt("q", ("Vienna", "Wien"), "a"),
        preference_prompt("q", "a", "b", ("Vienna", "Wien")),
    ):
        system, user = prompt.messages
        assert ["Vienna", "Wien"] in json.loads(user.content.split("\n")[1]).values()
        assert "right by itself" in system.content
    assert factual_prompt("q", "", ("Vienna",)).digest("j") == factual_prompt("q", "", "Vienna").digest("j")
    assert json.loads(factual_prompt("q", "", ("Vienna",)).messages[1].content.split("\n")[1])["answer"] == ""
    assert "reference" not in json.loads(
        preference_prompt("q", "a", "b", ()).messages[1].content.split("\n")[1]
    )


def test_published_predictions_carry_all_right_answers_and_are_read_back(tmp_path: Path) -> None:
    model = ModelIdentity(
        model_id="m", weights_sha256="0", dtype="float32", chat_template_sha256="0", vocab_size=1
    )
    completion = Completion("1", "Wien", "stop", 1, 1, 0.0, 1)
    one, several = (
        _prediction(Example("1", "q", reference="Vienna", other_references=others), completion, model, {})
        for others in ((), ("Wien",))
    )
    assert "other_ground_truths" not in one
    path = tmp_path / "out.jsonl"
    path.write_text(json.dumps(several) + "\n")
    (row,) = read_predictions(path)
    assert row.references == ("Vienna", "Wien")
    assert _shown(row.references) == "Vienna\n(also right: Wien)"
    assert (_shown(("Vienna",)), _shown(())) == ("Vienna", None)


@pytest.mark.parametrize(
    ("truth", "references"),
    [
        ('["Vienna", "Wien"]', ("Vienna", "Wien")),
        ('{"text": ["Ann", "Anne"], "answer_start": [0, 5]}', ("Ann", "Anne")),
        ('{"city": "Rome"}', ('{"city":"Rome"}',)),
        ("1208925819614629174706176", ("1208925819614629174706176",)),
        ("4", ("4",)),
        ("null", ()),
        ('" "', ()),
        ("[]", ()),
    ],
)
def test_a_file_of_answers_may_have_several_references(
    tmp_path: Path, truth: str, references: tuple[str, ...]
) -> None:
    path = tmp_path / "answers.jsonl"
    path.write_text(f'{{"question": "q", "predicted_answer": "a", "ground_truth": {truth}}}\n')
    (row,) = read_predictions(path)
    assert row.references == references

"""An engine is one class: what must be known of it besides is asked of its attributes."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from tasks.core.config import load_config
from tasks.core.config.catalogues import engine_names
from tasks.core.errors import ConfigError
from tasks.core.evaluation.noise import why_no_noise
from tasks.core.generation.engines import choosing
from tasks.core.generation.engines.base import exact_in_float32, shares_steps
from tasks.core.generation.engines.choosing import choose_engine, engine_classes
from tasks.core.records import GenerationSettings
from tasks.core.runs.run_dir import RunDir
from tests.generation.engines.test_engines import build, loaded
from tests.making.evaluation_runs import write_run

ENGINE = """
from tasks.core.generation.engines.base import GeneratedRow


class Instant:
    name = "{name}"
    {attributes}

    def __init__(self, model, settings):
        self.settings = settings

    def unsupported(self):
        return "beam search" if self.settings.num_beams > 1 else None

    def generate(self, queue, budget):
        while queue:
            request = queue.take()
            budget.admit(1, request.room_tokens, request.id)
            queue.finish(request.position)
            yield GeneratedRow(request.position, (), "now", "stop", 0.0, 1)
"""


@pytest.fixture
def write_engine(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Any]:
    monkeypatch.syspath_prepend(str(tmp_path))
    written: list[str] = []

    def write(attributes: str = "", name: str = "instant") -> str:
        module = f"temporary_engine_{len(written)}_{tmp_path.name.replace('-', '_')}"
        (tmp_path / f"{module}.py").write_text(ENGINE.format(name=name, attributes=attributes))
        written.append(module)
        return f"{module}:Instant"

    yield write
    for module in written:
        monkeypatch.delitem(__import__("sys").modules, module, raising=False)


def rope_by_length(tiny_tokenizer: Any) -> Any:
    """A model whose rotary positions depend on the longest row of a step."""
    model = build("llama", len(tiny_tokenizer))
    model.config.rope_parameters = {"rope_type": "dynamic", "rope_theta": 10000.0, "factor": 2.0}
    return loaded(model, tiny_tokenizer)


def test_an_engine_without_further_attributes_is_chosen_as_before(
    write_engine: Any, tiny_model: Any, tiny_tokenizer: Any
) -> None:
    name, model = write_engine(), loaded(tiny_model, tiny_tokenizer)
    choice = choose_engine(name, model, GenerationSettings())
    assert (choice.engine.name, choice.reason) == ("instant", None)
    assert not shares_steps(choice.engine) and not exact_in_float32(choice.engine)
    other = choose_engine(name, model, GenerationSettings(num_beams=2))
    assert (other.engine.name, other.reason) == ("generate", f"{name}: beam search; inflight: beam search")


def test_rows_share_steps_only_where_an_engine_says_so(write_engine: Any, tiny_tokenizer: Any) -> None:
    model = rope_by_length(tiny_tokenizer)
    apart = choose_engine(write_engine("shares_steps = False"), model, GenerationSettings())
    assert apart.engine.name == "instant"
    together = choose_engine(write_engine("shares_steps = True"), model, GenerationSettings())
    assert together.engine.name == "generate"
    assert together.reason is not None and "rotary positions" in together.reason
    short = choose_engine(write_engine("shares_steps = True"), model, GenerationSettings(), longest_tokens=64)
    assert short.engine.name == "instant"


def test_an_engine_of_ours_needs_no_other_place_that_knows_its_name(
    write_engine: Any, monkeypatch: pytest.MonkeyPatch, tiny_model: Any, tiny_tokenizer: Any, tmp_path: Path
) -> None:
    attributes = "exact_in_float32 = True; shares_steps = True"
    new = choosing._own(write_engine(attributes, name="newest"))
    ours = {"newest": new, **engine_classes()}
    monkeypatch.setattr("tasks.core.generation.engines.choosing.engine_classes", lambda: ours)
    monkeypatch.setattr("tasks.core.evaluation.noise.engine_classes", lambda: ours)
    choice = choose_engine("auto", loaded(tiny_model, tiny_tokenizer), GenerationSettings())
    assert type(choice.engine) is new
    directory = write_run(tmp_path / "run", [])
    manifest = RunDir(directory).read_manifest()
    answered = manifest.model_copy(update={"engine": "newest", "device": "cpu"})
    assert why_no_noise(answered) is not None
    for engine, device in (("newest", "cuda:0"), ("generate", "cpu"), ("somebody's", "cpu")):
        assert why_no_noise(manifest.model_copy(update={"engine": engine, "device": device})) is None


def test_an_engine_of_ones_own_may_not_go_by_the_name_of_one_of_ours(
    write_engine: Any, tiny_model: Any, tiny_tokenizer: Any
) -> None:
    """A run keeps the engine's name, and from it follows whether its answers depend on the batches."""
    with pytest.raises(ConfigError, match="is called 'inflight'"):
        choose_engine(write_engine(name="inflight"), loaded(tiny_model, tiny_tokenizer), GenerationSettings())


def test_the_settings_offer_the_engines_that_there_are_and_read_their_names_off_one_table() -> None:
    assert engine_names() == ["auto", *(engine.name for engine in engine_classes().values())]
    with pytest.raises(
        ConfigError, match=r'engine = "inflght" must be "auto", "inflight".*you may mean "inflight"'
    ):
        load_config(None, {"inferencer.engine": "inflght"})
    for name in (*engine_names(), "my.module:Own"):
        assert load_config(None, {"inferencer.engine": name}).inferencer.engine == name

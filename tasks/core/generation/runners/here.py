"""In this process: a run, a shard of it, or its shards one after the other, with one model."""

from __future__ import annotations

from dataclasses import dataclass

from tasks.core.generation.answering import answer_missing, index_run, missing_mask, remember_budget
from tasks.core.generation.engines.choosing import choose_engine
from tasks.core.generation.plan import Answerer, Report, RunPlan
from tasks.core.generation.runners.shards import supervised
from tasks.core.prompts.answer_reading import AnswerReader
from tasks.core.runs.ledger import LedgerIndex


@dataclass(frozen=True, slots=True)
class Here:
    """Answers with the model that `answerer` has; of a run in shards, one shard after the other."""

    answerer: Answerer

    def answer(self, plan: RunPlan, report: Report | None = None) -> LedgerIndex:
        """Answer what is missing; loads no model for a shard of which nothing is. Raises RunLockedError."""
        if plan.is_split:
            with supervised(plan, report) as pending:
                for shard in pending:
                    self.answerer.answer_shard(plan, shard)
            plan.sync.pull()
        elif plan.part is None:
            with plan.locked():
                return self._answer(plan, report)
        else:
            with plan.place.locked():
                if missing_mask(plan.run, plan.rows, plan.part).any():
                    self._answer(plan, report)
                self.answerer.score_references(plan, plan.part)
                plan.sync.push_part(plan.place)
        return index_run(plan.run, plan.rows)

    def _answer(self, plan: RunPlan, report: Report | None) -> LedgerIndex:
        answerer, settings = self.answerer, plan.config.inferencer
        model, asked, budget = (
            answerer.load_model_and_tokenizer(),
            plan.identity.generation,
            answerer.token_budget(),
        )
        with plan.sync.sending(plan.place):
            longest = settings.max_sequence_length
            choice = choose_engine(settings.engine, model, asked, longest_tokens=longest)
            answerer.engine_name = choice.engine.name
            index = answer_missing(
                plan.run,
                plan.rows,
                prompts=answerer.prompt_builder(),
                choice=choice,
                budget=budget,
                settings=asked,
                device=model.device,
                report=report,
                shard=plan.part,
                reader=AnswerReader(model.tokenizer, asked.thought_markers, asked.stop_strings),
            )
        remember_budget(model, budget, plan.budget_store)
        return index

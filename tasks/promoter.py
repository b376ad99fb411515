"""Promoter: from a verdict to the promoted model and back, as a plain class that the Prefect task uses too."""

from __future__ import annotations

import logging
from pathlib import Path

from tasks.core.config import Config, as_config
from tasks.core.errors import PromotionError, TuneproofError
from tasks.core.evaluation.opponents.remote_runs import bring_overview
from tasks.core.evaluation.outputs import EvaluationFiles
from tasks.core.evaluation.summary import EvaluationSummary
from tasks.core.models.trained.folders import folder_of
from tasks.core.promotion.promotable import Evaluated, evidence_of, find_evaluated, model_run_name, this_user
from tasks.core.promotion.promotion import (
    Actor,
    Promotion,
    Tell,
    current_promotion,
    promote,
    promotion_history,
    roll_back,
)
from tasks.core.storage.store import Store

logger = logging.getLogger(__name__)


class Promoter:
    """Moves the alias of the promoted model; loads no model and needs no Prefect.

    `config_manager` is a Config, the path of a TOML file, or None for ./config.toml and defaults. `by` tells who
    acts (default: user@host) and is kept in the history.
    """

    def __init__(self, config_manager: Config | Path | str | None = None, *, by: str | None = None) -> None:
        self.config = as_config(config_manager)
        self._by = by or this_user()

    @property
    def models(self) -> Store:
        """The folder or URL of the models, which holds the alias too."""
        return Store(self.config.pipeline.models_dir)

    @property
    def models_dir(self) -> Path:
        """Where the files of models are here: the folder, or the URL's mirror, which has no alias."""
        return self.models.local

    def present(self) -> Promotion | None:
        """Give the promotion in force; None when nothing is promoted.

        Raises ModelLoadError when its pointer or history is damaged, or when they disagree.
        """
        return current_promotion(self.models)

    def promote(
        self,
        run: str | None = None,
        *,
        reason: str | None = None,
        force: bool = False,
        promotion_id: str | None = None,
    ) -> Promotion:
        """Promote a model by its name or that of its evaluated run; None = the newest evaluated one.

        A model that is promoted already stays so, and its promotion is given; a new one has the `promotion_id`, if
        one is given. Raises PromotionError when its
        verdict is not promote, unless `force` with a reason.
        """
        runs = Store(self.config.pipeline.runs_dir)
        bring_overview(runs)
        found = find_evaluated(run, self.models, runs.local)
        return self._promote(found, reason, force=force, promotion_id=promotion_id)

    def promote_evaluated(self, summary: EvaluationSummary, *, reason: str | None = None) -> Promotion:
        """Promote the model of an evaluation; with a person's `reason`, whatever the verdict."""
        name = model_run_name(summary.candidate, self.models)
        if name is None:
            raise PromotionError(
                f"the model of the run {summary.candidate.run_name} is not in {self.models.place}, so it cannot be "
                "promoted",
                'set pipeline.models_dir to its folder, or pipeline.promote = "never"',
            )
        run_dir = Store(self.config.pipeline.runs_dir).local / summary.candidate.run_name
        evidence = evidence_of(summary, EvaluationFiles(run_dir).summary_path, self.models)
        return self._promote(Evaluated(name, evidence), reason, force=reason is not None)

    def _promote(
        self, model: Evaluated, reason: str | None, *, force: bool, promotion_id: str | None = None
    ) -> Promotion:
        actor, evidence = Actor(self._by, reason), model.evidence
        runs = Store(self.config.pipeline.runs_dir)
        if evidence is not None and runs.is_remote:  # other machines read it too
            address = runs.url_of(Path(evidence.summary_path))
            evidence = evidence.model_copy(update={"summary_path": address})
        promotion = promote(
            self.models, model.model_run_name, actor, evidence, force=force, promotion_id=promotion_id
        )
        if self.config.pipeline.push_promoted:
            self.push(promotion)
        return promotion

    def roll_back(
        self, *, reason: str | None = None, tell: Tell | None = None
    ) -> tuple[Promotion, Promotion]:
        """Go back to the model before; gives its promotion and the one it replaces. Raises PromotionError.

        One that died before `tell` had told of it is told now, without a further step.
        """
        return roll_back(self.models, Actor(self._by, reason), tell)

    def is_promoted(self, summary: EvaluationSummary) -> bool:
        """Tell whether the evaluated model is the promoted one already."""
        present = current_promotion(self.models)
        return present is not None and present.run_name == model_run_name(summary.candidate, self.models)

    def has_promoted(self, summary: EvaluationSummary, decision: str) -> bool:
        """Tell whether a decision, named in who acted, has promoted the evaluated model at some time.

        A flow run that is tried again must not promote once more what a person has taken back meanwhile.
        """
        name = model_run_name(summary.candidate, self.models)
        return any(
            entry.action == "promote" and entry.promotion.run_name == name and decision in (entry.by or "")
            for entry in promotion_history(self.models)
        )

    def push(self, promotion: Promotion) -> None:
        """Push the promoted model with its scores in the card; a Hub that does not answer takes nothing back."""
        from tasks.core.promotion.card import write_scored_card
        from tasks.core.training.hub import push

        private = self.config.pipeline.push_private
        try:
            model_dir = folder_of(self.models, promotion.run_name)
            self.models.push([write_scored_card(model_dir, promotion)])
            push(model_dir, hf_user_id=self.config.fine_tuner.hf_user_id, private=private)
        except TuneproofError as error:
            logger.error("%s is promoted, but not on the Hub: %s", promotion.run_name, error)


__all__ = ["Promoter"]

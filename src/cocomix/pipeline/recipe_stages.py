"""Declare the stages of a recipe: their settings, what each needs, and their folders."""

from __future__ import annotations

import dataclasses
from typing import Any

from cocomix.common import files, portable
from cocomix.common.errors import InputError
from cocomix.concepts.labeling import LabelsConfig
from cocomix.pipeline.methods import DistillationConfig
from cocomix.pipeline.recipe import Recipe
from cocomix.pipeline.stage import Stage


class Stages:
    """The stages of one recipe.

    Args:
        recipe: the recipe.
        replicate: another replicate of it, whose corpora this one shares, because they do not depend on the seed.
    """

    def __init__(self, recipe: Recipe, replicate: Stages | None = None) -> None:
        self.recipe, self.replicate = recipe, replicate
        self.folder = files.located(recipe.output)
        self._everything = recipe.to_dict()
        self.corpus_stage = self._stage("corpus", ("corpus", "tokenizer", "block_size"))
        # A teacher with another tokenizer reads the same documents, in blocks of its own tokens.
        self.teacher_corpus_stage = self.corpus_stage
        is_given = recipe.teacher.source is not None
        if recipe.labels.alignment == "characters" and is_given:
            self.teacher_corpus_stage = Stage(
                "teacher corpus",
                "teacher-corpus",
                self.folder / "teacher-corpus",
                self._settings("teacher", "block_size"),
                (self.corpus_stage,),
            )
        read = self.teacher_corpus_stage
        self.teacher_stage = Stage(
            "given teacher" if is_given else "teacher",
            "teacher",
            self.folder / "teacher",
            {**self._settings("teacher", "seed"), **self._stream_settings()},
            (read,),
        )
        self._backbone_stages: dict[str, Stage] = {}
        self.sae_stage = self._stage("sae", ("sae", "seed"), (read, self.teacher_stage))
        self._labels_stages: dict[str, Stage] = {}
        self._predictions_stages: dict[tuple[int, float], Stage] = {}
        self.losses_stage = Stage(
            "teacher losses",
            "teacher-losses",
            self.folder / "teacher-losses",
            {},
            (self.corpus_stage, self.teacher_stage),
        )
        self.labels_stage = self.labels_stage_of(recipe.labels)
        self.catalog_stage = self._stage(
            "catalog", ("catalog",), (read, self.teacher_stage, self.sae_stage, self.labels_stage)
        )
        self.student_stages: dict[tuple[str, int], Stage] = {}
        for name in sorted(recipe.students, key=lambda name: recipe.students[name].branch_from is not None):
            for seed in recipe.student_seeds():  # branches last, because they continue other students
                self.student_stages[name, seed] = self._student_stage(name, seed)

    def shared(self, stage: Stage) -> Stage | None:
        """Return the stage of the other replicate whose result `stage` links; None if it computes its own."""
        if self.replicate is None:
            return None
        pairs = {
            self.corpus_stage: self.replicate.corpus_stage,
            self.teacher_corpus_stage: self.replicate.teacher_corpus_stage,
        }
        return pairs.get(stage)

    def stages(self) -> list[Stage]:
        """Return the stages in order; of teacher, SAE, labels and predictions only those that a student needs."""
        students = self.student_stages.values()
        preparation = [before for student in students for needed in student.needs for before in needed.with_needs()]
        return list(dict.fromkeys([self.corpus_stage, *preparation, *students]))

    def students(self, only: tuple[str, ...] = ()) -> list[Stage]:
        """Return the stages of all students; or of some by name, or of one of their seeds by the folder's name.

        Raises:
            InputError: there is no such student.
        """
        names = {stage: {name, stage.folder.name} for (name, _), stage in self.student_stages.items()}
        for unknown in set(only).difference(*names.values()):
            self.recipe.require_student(unknown)
        return [stage for stage in names if not only or not names[stage].isdisjoint(only)]

    def stages_until(self, name: str) -> list[Stage]:
        """Return the stages up to a goal: corpus, teacher, sae, labels, catalog, students, or catalog and students.

        The goal `labels` includes the labels of every student and the teacher's stored predictions and losses. The goal
        `catalog and students` has the catalog before the students, if it is missing and the recipe has teacher and SAE.

        Raises:
            InputError: none of the recipe's students needs the goal.
        """
        everything = self.stages()
        if name == "students":
            return everything
        if name == "catalog and students":
            inputs = {self.teacher_stage, self.sae_stage, self.labels_stage}
            wanted = [self.catalog_stage] if inputs <= {*everything} and not self.catalog_stage.is_done() else []
            trained = [*self.student_stages.values()]
            return [*(stage for stage in everything if stage not in trained), *wanted, *trained]
        from_teacher = [*self._labels_stages.values(), *self._predictions_stages.values(), self.losses_stage]
        goals = {
            "corpus": [self.corpus_stage],
            "teacher": [self.teacher_stage],
            "sae": [self.sae_stage],
            "labels": [stage for stage in everything if stage in from_teacher],
            "catalog": [self.catalog_stage] if self.labels_stage in everything else [],
        }[name]
        if not goals or not {*goals} <= {*everything, self.catalog_stage}:
            replaced = self.recipe.needs_labels() and self.recipe.labels.source is not None
            reason = "labels.source takes its place" if replaced else "none of its students needs one"
            raise InputError(f"this recipe has no stage {name!r}: {reason}")
        return list(dict.fromkeys(needed for goal in goals for needed in goal.with_needs()))

    def backbone_stage_of(self, source: str) -> Stage:
        """Return the stage that examines a pretrained model that students start from."""
        if source not in self._backbone_stages:
            number = len(self._backbone_stages)
            name = f"backbone-{number + 1}" if number else "backbone"
            self._backbone_stages[source] = Stage(
                "backbone",
                name,
                self.folder / name,
                portable.recipe_record({"source": source, "block_size": self.recipe.block_size}),
                (self.corpus_stage,),
                (source,),
            )
        return self._backbone_stages[source]

    def labels_stage_of(self, config: LabelsConfig) -> Stage:
        """Return the stage that labels the corpus with these settings, the recipe's or a student's."""
        key = config.suffix()
        if key not in self._labels_stages:
            own = config != self.recipe.labels
            name = f"labels-{key}" if own else "labels"
            if config.base() != config:
                self._labels_stages[key] = self._control_stage(name, config)
                return self._labels_stages[key]
            # The two corpora are the same if the teacher reads the students' tokens.
            concepts = dict.fromkeys((self.corpus_stage, self.teacher_corpus_stage, self.teacher_stage, self.sae_stage))
            self._labels_stages[key] = Stage(
                "labels" if config.source is None else "external labels",
                name,
                self.folder / name,
                # The layer is part of the settings: a given SAE has the same fingerprint at every layer.
                {
                    "labels": portable.recipe_record(dataclasses.asdict(config.resolved())),
                    "teacher_layer": self.recipe.sae.teacher_layer,
                },
                tuple(concepts) if config.source is None else (self.corpus_stage,),
                (config,),
            )
        return self._labels_stages[key]

    def predictions_stage_of(self, config: DistillationConfig) -> Stage:
        """Return the stage that stores the teacher's predictions with these settings."""
        assert config.top_k is not None
        key = (config.top_k, config.temperature)
        if key not in self._predictions_stages:
            name = f"predictions-top-{config.top_k}-temperature-{config.temperature}"
            self._predictions_stages[key] = Stage(
                "predictions",
                name,
                self.folder / name,
                {"top_k": config.top_k, "temperature": config.temperature},
                (self.corpus_stage, self.teacher_stage),
                (config,),
            )
        return self._predictions_stages[key]

    def _control_stage(self, name: str, config: LabelsConfig) -> Stage:
        """Return the stage that computes labels from other stored labels."""
        seed = {"seed": self.recipe.seed} if config.control != "none" else {}
        return Stage(
            "control labels",
            name,
            self.folder / name,
            {
                "labels": portable.recipe_record(dataclasses.asdict(config)),
                "teacher_layer": self.recipe.sae.teacher_layer,
                **seed,
            },
            (self.corpus_stage, self.labels_stage_of(config.base())),
            (config,),
        )

    def _stage(self, kind: str, keys: tuple[str, ...], needs: tuple[Stage, ...] = ()) -> Stage:
        """Return a stage named after its kind, whose settings are keys of the recipe."""
        return Stage(kind, kind, self.folder / kind, self._settings(*keys), needs)

    def _settings(self, *keys: str) -> dict[str, Any]:
        return {key: self._everything[key] for key in keys}

    def _stream_settings(self) -> dict[str, Any]:
        """Return the corpus settings if trainings read the corpus from its source instead of the stored blocks."""
        corpus = self.recipe.corpus
        return {} if corpus.streaming is None else {"corpus": portable.recipe_record(dataclasses.asdict(corpus))}

    def _student_stage(self, name: str, seed: int) -> Stage:
        student, everything = self.recipe.students[name], self._everything
        matched = everything["students"].get(student.match or "")
        settings = {
            # Its training settings are those of `training`, together with the recipe's.
            "student": {**everything["students"][name], "training": None},
            # Only the sizes of the matched student matter, not how it is trained.
            "match": matched and {**matched, **dict.fromkeys(("learning_rate", "training", "branch_from", "gate"))},
            "training": dataclasses.asdict(self.recipe.training_of(student)),
            "seed": seed,
            **self._stream_settings(),
        }
        needs = [self.corpus_stage]
        source = self.recipe.backbone_of(student).source
        if source is not None:
            needs.append(self.backbone_stage_of(source))
        distillation = student.distillation_config()
        if student.learns_concepts():
            needs.append(self.labels_stage_of(self.recipe.labels_of(student)))
        if distillation is not None and distillation.top_k is not None:
            needs.append(self.predictions_stage_of(distillation))
        elif distillation is not None or student.mixes_hidden_states():
            needs.append(self.teacher_stage)
            settings["teacher_layer"] = self.recipe.sae.teacher_layer
        if self.recipe.reads_losses(student):
            needs.append(self.losses_stage)
        if student.branch_from in self.recipe.students:
            needs.append(self.student_stages[student.branch_from, seed])
        label = name if self.recipe.seeds is None else f"{name}-seed-{seed}"
        folder = self.folder / "students" / label
        return Stage("student", f"student {label}", folder, settings, tuple(needs), (name, seed))

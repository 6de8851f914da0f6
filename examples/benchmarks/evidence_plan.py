"""What the evidence consists of: data sets with their protocol, variants of training, and studies that group them.

A *variant* is a set of options of ``examples/coco/train.py`` and, where it learns from one, the variant that is its
teacher. Every variant of a data set has the same network, augmentation, optimiser and, times its ``length``, epochs.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field

__all__ = ["SETS", "STUDIES", "VARIANTS", "Protocol", "Run", "Variant", "planned"]

Option = str | float | bool


@dataclass(frozen=True)
class Protocol:
    """How all variants of one data set are trained.

    Attributes:
        epochs: Of a variant of length 1.
        options: Of ``train.py``, the same for all.
        folder: Of the data set, if it is not called like this protocol.
        shared: Variants of which seed 0 teaches the students of all seeds, because they cost more than all the rest.
        larger: What makes a teacher larger than its students.
    """

    epochs: int
    options: Mapping[str, Option]
    folder: str = ""
    shared: tuple[str, ...] = ()
    larger: Mapping[str, Option] = field(default_factory=lambda: _MOBILENET)


@dataclass(frozen=True)
class Variant:
    """One way to train.

    Attributes:
        title: In tables.
        options: Of ``train.py``, besides the protocol's.
        teacher: The variant it learns from or inherits from; trained with the same seed.
        origin: The variant it inherits from, if that is not its teacher; likewise.
        length: Epochs in units of the protocol's.
        larger: Whether it is the larger network.
    """

    title: str
    options: Mapping[str, Option] = field(default_factory=dict)
    teacher: str = ""
    origin: str = ""
    length: float = 1.0
    larger: bool = False


@dataclass(frozen=True)
class Run:
    """One training run: of a variant, on a data set, with a seed; "tune" holds out a part of the training images."""

    data: str
    split: str
    variant: str
    seed: int

    @property
    def key(self) -> str:
        """Its name, also of its folder."""
        return f"{self.data}/{self.split}/{self.variant}/{self.seed}"

    @property
    def teacher(self) -> Run | None:
        """The run it learns from."""
        return self._sibling(VARIANTS[self.variant].teacher)

    @property
    def origin(self) -> Run | None:
        """The run it inherits from, if that is not its teacher."""
        return self._sibling(VARIANTS[self.variant].origin)

    @property
    def needs(self) -> tuple[Run, ...]:
        """The runs that must be finished before."""
        return tuple(run for run in (self.teacher, self.origin) if run is not None)

    def _sibling(self, variant: str) -> Run | None:
        seed = 0 if variant in SETS[self.data].shared else self.seed
        return Run(self.data, self.split, variant, seed) if variant else None

    @property
    def epochs(self) -> int:
        """Passes over the training images."""
        return round(SETS[self.data].epochs * VARIANTS[self.variant].length)

    @property
    def options(self) -> dict[str, Option]:
        """Of ``train.py``, without folders."""
        protocol, variant = SETS[self.data], VARIANTS[self.variant]
        larger = protocol.larger if variant.larger else {}
        return {**protocol.options, **larger, **variant.options, "epochs": self.epochs, "seed": self.seed}


_SMALL: dict[str, Option] = {
    "batch_size": 4,
    "lr": 1e-3,
    "ema": 0.998,
    "precision": "bfloat16",
    "cache": True,
    "augmentation": "crop",
}
_MOBILENET: dict[str, Option] = {
    "backbone": "mobilenet_v2",
    "backbone_weights": "weights/mobilenet_v2_in1k_tf2.pth",
    "channels": 64,
    "head_convs": 2,
}
_PERSON: dict[str, Option] = {
    "train_annotations": "instances_train_person.json",
    "val_annotations": "instances_val_person.json",
}
# Than a MobileNetV2 student, on the same backbone.
_WIDER: dict[str, Option] = {"channels": 256, "head_convs": 4}
_SCENES: dict[str, Option] = {**_SMALL, "size": 128, "augmentation": "flip"}
_LARGE_TEACHERS = ("one-to-many-large", "one-to-many-large-2x")
SETS = {
    "demo": Protocol(8, _SCENES, shared=_LARGE_TEACHERS),
    # For processors that are slow in bfloat16, those without AVX-512.
    "demo_float32": Protocol(8, {**_SCENES, "precision": "float32"}, folder="demo", shared=_LARGE_TEACHERS),
    "bccd": Protocol(30, {**_SMALL, "size": 192}),
    "pcb": Protocol(10, {**_SMALL, "size": 224, "augmentation": "flip"}, shared=_LARGE_TEACHERS),
    "highway": Protocol(25, {**_SMALL, "size": 192}, shared=_LARGE_TEACHERS),
    "coco_person": Protocol(
        8,
        {**_SMALL, **_MOBILENET, **_PERSON, "size": 256, "channels": 96},
        folder="coco_open",
        larger=_WIDER,
    ),
    # All of COCO's classes, of which a few hundred photographs teach no backbone: it stays as ImageNet made it.
    "coco_open": Protocol(
        20,
        {**_SMALL, **_MOBILENET, "size": 128, "channels": 96, "precision": "float32", "trainable_stages": 0},
        shared=_LARGE_TEACHERS,
        larger=_WIDER,
    ),
    # For a GPU: long, at a usual size; small networks launch fewer kernels without autocast.
    "coco_person_320": Protocol(
        24,
        {**_SMALL, **_MOBILENET, **_PERSON, "size": 320, "channels": 96, "batch_size": 8, "precision": "float32"},
        folder="coco_open",
        shared=_LARGE_TEACHERS,
        larger=_WIDER,
    ),
}

_CROSS: dict[str, Option] = {"arm": "cross-head"}
_DECAY: dict[str, Option] = {"distill_decay": "cosine"}
_DEEP: dict[str, Option] = {"head_convs": 4}
_TEACHER = "one-to-many"
_NANODET, _YOLOX = (f"python:examples/third_party/nanodet_yolox.py:{name}" for name in ("nanodet_m", "yolox_nano"))


def _recipe(title: str, *, length: float = 1.0, **options: Option) -> Variant:
    """Inheriting from a one-to-many run of the same network, distilled by a larger teacher with a weight that fades."""
    return Variant(title, {**_CROSS, **_DECAY, **options}, "one-to-many-large", _TEACHER, length)


def _nanodet(title: str, *, origin: str = "", length: float = 1.0, **options: Option) -> Variant:
    """Both distillations from NanoDet-m."""
    distillation: dict[str, Option] = {**_CROSS, "teacher": _NANODET, "distill_features": 1.0}
    return Variant(title, {**distillation, **options}, origin=origin, length=length)


VARIANTS = {
    # --- without a teacher
    "one-to-many": Variant("one-to-many", {"arm": "one-to-many"}),
    "one-to-many-2x": Variant("one-to-many, twice as long", {"arm": "one-to-many"}, length=2),
    "one-to-many-3x": Variant("one-to-many, three times as long", {"arm": "one-to-many"}, length=3),
    "one-to-one": Variant("one-to-one (POTO)", {"arm": "one-to-one"}),
    "one-to-one-2x": Variant("one-to-one (POTO), twice as long", {"arm": "one-to-one"}, length=2),
    "one-to-one-task-aligned": Variant("one-to-one (task-aligned)", {"arm": "one-to-one", "metric": "task-aligned"}),
    "one-to-one-yolo": Variant("one-to-one (YOLO)", {"arm": "one-to-one", "metric": "yolo"}),
    "one-to-one-ranking": Variant("one-to-one, ranking", {"arm": "one-to-one", "ranking": 0.25}),
    "auxiliary-head": Variant("one-to-one, auxiliary head", {"arm": "one-to-one", "auxiliary_head": True}),
    "auxiliary-head-detached": Variant(
        "one-to-one, auxiliary head, detached", {"arm": "one-to-one", "auxiliary_head": True, "detach": True}
    ),
    # --- the larger network of the protocol, and students that have it as the teacher
    "one-to-many-large": Variant("one-to-many, larger network", {"arm": "one-to-many"}, larger=True),
    "one-to-many-large-2x": Variant(
        "one-to-many, larger network, twice as long", {"arm": "one-to-many"}, length=2, larger=True
    ),
    "cross-head-large": Variant("cross-head, larger teacher", _CROSS, "one-to-many-large"),
    "cross-head-large-inherit-decay-ranking": _recipe("cross-head recipe, ranking 0.25", ranking=0.25),
    "cross-head-large-inherit-decay": _recipe("cross-head recipe"),
    "cross-head-large-inherit-decay-2x": _recipe("cross-head recipe, twice as long", length=2),
    "cross-head-large-inherit-decay-features": _recipe(
        "cross-head recipe with feature imitation", distill_features=1.0
    ),
    "cross-head-large-inherit-decay-features-2x": _recipe(
        "cross-head recipe with feature imitation, twice as long", distill_features=1.0, length=2
    ),
    "cross-head-large-inherit-decay-features-balanced": _recipe(
        "cross-head recipe with feature imitation, balanced metric", distill_features=1.0, metric="balanced"
    ),
    "cross-head-large-inherit-decay-features-balanced-2x": _recipe(
        "cross-head recipe with feature imitation, balanced metric, twice as long",
        distill_features=1.0,
        metric="balanced",
        length=2,
    ),
    "cross-head-large-inherit-decay-features-balanced-ranking-0.1-2x": _recipe(
        "cross-head recipe with feature imitation, balanced metric, ranking 0.1, twice as long",
        distill_features=1.0,
        metric="balanced",
        ranking=0.1,
        length=2,
    ),
    "cross-head-large-inherit-decay-features-ranking-0.1-2x": _recipe(
        "cross-head recipe with feature imitation, ranking 0.1, twice as long",
        distill_features=1.0,
        ranking=0.1,
        length=2,
    ),
    "cross-head-large-inherit-decay-ranking-2x": _recipe(
        "cross-head recipe, ranking 0.25, twice as long", ranking=0.25, length=2
    ),
    "cross-head-large-inherit-decay-ranking-0.1-2x": _recipe(
        "cross-head recipe, ranking 0.1, twice as long", ranking=0.1, length=2
    ),
    "cross-head-large-inherit-decay-double": _recipe(
        "cross-head recipe, weights 2", distill_classification=2.0, distill_box=2.0
    ),
    "cross-head-large-inherit-decay-auxiliary": _recipe(
        "cross-head recipe, with an auxiliary head", auxiliary_head=True
    ),
    "cross-head-large-2x-inherit-decay-ranking": Variant(
        "cross-head recipe, ranking 0.25, the larger teacher trained twice as long",
        {**_CROSS, **_DECAY, "ranking": 0.25},
        "one-to-many-large-2x",
        _TEACHER,
    ),
    "cross-head-large-2x-inherit-decay-features-2x": Variant(
        "cross-head recipe with feature imitation, twice as long, as is the larger teacher",
        {**_CROSS, **_DECAY, "distill_features": 1.0},
        "one-to-many-large-2x",
        _TEACHER,
        length=2,
    ),
    "cross-head-large-decay": Variant(
        "cross-head, larger teacher, decaying", {**_CROSS, **_DECAY}, "one-to-many-large"
    ),
    "feature-imitation-large": Variant(
        "feature imitation (PKD), larger teacher", {"arm": "feature-imitation"}, "one-to-many-large"
    ),
    # --- the recipe's teacher, inheritance and decay, other distillation
    "feature-imitation-large-inherit-decay": Variant(
        "feature imitation (PKD), larger teacher, decaying, inheriting",
        {"arm": "feature-imitation", **_DECAY},
        "one-to-many-large",
        _TEACHER,
    ),
    "feature-imitation-large-inherit-decay-2x": Variant(
        "feature imitation (PKD), larger teacher, decaying, inheriting, twice as long",
        {"arm": "feature-imitation", **_DECAY},
        "one-to-many-large",
        _TEACHER,
        length=2,
    ),
    "weighted-imitation-large-inherit-decay": Variant(
        "feature imitation (weighted L2, weight 6), larger teacher, decaying, inheriting",
        {"arm": "weighted-imitation", "imitation": 6.0, **_DECAY},
        "one-to-many-large",
        _TEACHER,
    ),
    # --- a COCO-trained teacher of another family, for the sets whose classes are COCO's
    "cross-head-nanodet": Variant("cross-head, teacher NanoDet-m", {**_CROSS, "teacher": _NANODET}),
    "cross-head-nanodet-features": _nanodet("cross-head with feature imitation, teacher NanoDet-m"),
    "cross-head-nanodet-features-3x": _nanodet(
        "cross-head with feature imitation, teacher NanoDet-m, three times as long", length=3
    ),
    "cross-head-nanodet-features-auxiliary": _nanodet(
        "cross-head with feature imitation, an auxiliary head, teacher NanoDet-m", auxiliary_head=True
    ),
    "cross-head-nanodet-features-auxiliary-balanced": _nanodet(
        "cross-head with feature imitation, an auxiliary head, balanced metric, teacher NanoDet-m",
        auxiliary_head=True,
        metric="balanced",
    ),
    "cross-head-nanodet-features-auxiliary-double": _nanodet(
        "cross-head with feature imitation, an auxiliary head, weights 2, teacher NanoDet-m",
        auxiliary_head=True,
        distill_classification=2.0,
        distill_box=2.0,
    ),
    "cross-head-nanodet-features-3-auxiliary": _nanodet(
        "cross-head with feature imitation of weight 3, an auxiliary head, teacher NanoDet-m",
        auxiliary_head=True,
        distill_features=3.0,
    ),
    "cross-head-nanodet-features-auxiliary-inherit": _nanodet(
        "cross-head with feature imitation, an auxiliary head, teacher NanoDet-m, inheriting",
        origin=_TEACHER,
        auxiliary_head=True,
    ),
    "cross-head-nanodet-features-auxiliary-3x": _nanodet(
        "cross-head with feature imitation, an auxiliary head, teacher NanoDet-m, three times as long",
        length=3,
        auxiliary_head=True,
    ),
    "cross-head-nanodet-inherit-decay": Variant(
        "cross-head, teacher NanoDet-m, decaying, inheriting",
        {**_CROSS, **_DECAY, "teacher": _NANODET},
        origin=_TEACHER,
    ),
    "cross-head-yolox": Variant("cross-head, teacher YOLOX-nano", {**_CROSS, "teacher": _YOLOX}),
    "cross-head-yolox-features-3x": Variant(
        "cross-head with feature imitation, teacher YOLOX-nano, three times as long",
        {**_CROSS, "teacher": _YOLOX, "distill_features": 1.0},
        length=3,
    ),
    "feature-imitation-nanodet": Variant(
        "feature imitation (PKD), teacher NanoDet-m", {"arm": "feature-imitation", "teacher": _NANODET}
    ),
    "feature-imitation-nanodet-auxiliary": Variant(
        "feature imitation (PKD), an auxiliary head, teacher NanoDet-m",
        {"arm": "feature-imitation", "teacher": _NANODET, "auxiliary_head": True},
    ),
    # --- peers that have a teacher
    "one-to-one-inherit": Variant("one-to-one, inheriting", {"arm": "one-to-one", "inherit": True}, _TEACHER),
    "one-to-one-inherit-2x": Variant(
        "one-to-one, inheriting, twice as long", {"arm": "one-to-one", "inherit": True}, _TEACHER, length=2
    ),
    "one-to-one-inherit-3x": Variant(
        "one-to-one, inheriting, three times as long", {"arm": "one-to-one", "inherit": True}, _TEACHER, length=3
    ),
    "own-head-imitation": Variant("own-head imitation", {"arm": "own-head-imitation"}, _TEACHER),
    # --- cross-head distillation, as in the paper, and what may improve it
    "cross-head": Variant("cross-head", _CROSS, _TEACHER),
    "cross-head-2x-teacher": Variant("cross-head, teacher trained twice as long", _CROSS, "one-to-many-2x"),
    "cross-head-unaligned": Variant("cross-head, no alignment", {**_CROSS, "alignment": "none"}, _TEACHER),
    "cross-head-quality": Variant("cross-head, quality distilled", {**_CROSS, "distill_quality": 1.0}, _TEACHER),
    "cross-head-entry-1": Variant("cross-head, entry 1", {**_CROSS, "entry": 1}, _TEACHER),
    # The small network's head has two convolutions, so later entries need a deeper one.
    "one-to-many-deep": Variant("one-to-many, head of four convolutions", {"arm": "one-to-many", **_DEEP}),
    **{
        f"cross-head-deep-entry-{entry}": Variant(
            f"cross-head, heads of four convolutions, entry {entry}",
            {**_CROSS, **_DEEP, "entry": entry},
            "one-to-many-deep",
        )
        for entry in range(4)
    },
    "cross-head-half": Variant(
        "cross-head, weights ½", {**_CROSS, "distill_classification": 0.5, "distill_box": 0.5}, _TEACHER
    ),
    "cross-head-warmup": Variant("cross-head, warmed up", {**_CROSS, "distill_warmup": 0.2}, _TEACHER),
    "cross-head-ranking": Variant("cross-head, ranking", {**_CROSS, "ranking": 0.25}, _TEACHER),
    "cross-head-auxiliary": Variant("cross-head, auxiliary head", {**_CROSS, "auxiliary_head": True}, _TEACHER),
    "cross-head-inherit": Variant("cross-head, inheriting", {**_CROSS, "inherit": True}, _TEACHER),
    "cross-head-inherit-decay": Variant(
        "cross-head, inheriting, decaying", {**_CROSS, "inherit": True, **_DECAY}, _TEACHER
    ),
}
STUDIES = {
    "foreign": (
        "one-to-many",
        "one-to-one",
        "cross-head-nanodet",
        "feature-imitation-nanodet",
        "cross-head-yolox",
    ),
    "screen": (
        "one-to-many",
        "one-to-one",
        "one-to-one-inherit",
        "cross-head",
        "cross-head-inherit",
        "cross-head-inherit-decay",
        "cross-head-ranking",
        "cross-head-auxiliary",
        "auxiliary-head",
        "one-to-many-2x",
        "one-to-one-2x",
        "cross-head-2x-teacher",
        "cross-head-half",
        "cross-head-unaligned",
    ),
    "main": (
        "one-to-many",
        "one-to-one",
        "one-to-one-inherit",
        "one-to-one-inherit-2x",
        "auxiliary-head",
        "own-head-imitation",
        "feature-imitation-large-inherit-decay",
        "cross-head",
        "cross-head-large-inherit-decay",
        "cross-head-large-inherit-decay-features",
        "cross-head-large-inherit-decay-ranking",
    ),
    "longer": (
        "one-to-many-2x",
        "one-to-one-inherit-2x",
        "one-to-one-inherit-3x",
        "feature-imitation-large-inherit-decay-2x",
        "cross-head-large-inherit-decay-2x",
        "cross-head-large-inherit-decay-features-2x",
        "cross-head-large-inherit-decay-features-balanced-2x",
        "cross-head-large-inherit-decay-ranking-0.1-2x",
        "cross-head-large-inherit-decay-features-ranking-0.1-2x",
    ),
}


def planned(study: str, data: Iterable[str], split: str, seeds: Iterable[int]) -> Iterator[Run]:
    """The runs of a study, each after those it needs, without repetition; set by set and seed by seed."""
    names = [study] if study in VARIANTS else STUDIES[study]
    for one in data:
        seen: set[Run] = set()
        for seed in seeds:
            for name in names:
                run = Run(one, split, name, seed)
                for wanted in (*run.needs, run):
                    if wanted not in seen:
                        seen.add(wanted)
                        yield wanted

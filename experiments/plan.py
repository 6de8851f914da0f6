"""The plan of the experiments: data sets with their protocol, variants of training, and studies that group them.

A *variant* is one way to train. Its name is a base and any number of modifiers, joined by hyphens::

    cross-head-large-inherit-decay-features-ranking-0.1-2x

`variant` reads title, options, teacher, origin and length off the words; `BASES` and `MODIFIERS` are all there is to
know. A new modifier is one more line there. Every variant of a data set has the same network, augmentation, optimiser
and, times its length, epochs.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import KW_ONLY, dataclass, field, replace
from functools import cache
from typing import NamedTuple

from crosskd_assign.errors import CrossKDError

__all__ = [
    "BASES",
    "GIVEN_UP",
    "MODIFIERS",
    "SETS",
    "STUDIES",
    "Base",
    "Modifier",
    "PlanError",
    "Protocol",
    "Run",
    "Variant",
    "given_up",
    "planned",
    "variant",
]

Option = str | float | bool
Options = dict[str, Option]


class PlanError(CrossKDError):
    """A variant's name that the plan cannot read."""

    page = "docs/results.md"


@dataclass(frozen=True)
class Protocol:
    """How all variants of one data set are trained.

    Attributes:
        epochs: Epochs of a variant of length 1.
        options: Options of ``train.py``, the same for all variants.
        folder: Folder of the data set, if its name is not the protocol's.
        shared: Variants of which seed 0 teaches the students of all seeds, because they cost more than all the rest.
        larger: Options that make a network larger than the students.
        labelled: Share of the training images that keep their labels.
    """

    epochs: int
    options: Mapping[str, Option]
    folder: str = ""
    shared: tuple[str, ...] = ()
    larger: Mapping[str, Option] = field(default_factory=lambda: _MOBILENET)
    labelled: float = 1.0


@dataclass(frozen=True)
class Base:
    """The first word of a variant's name: what is trained.

    Attributes:
        title: Title in tables.
        options: Options of ``train.py``.
        taught: Whether it learns from a teacher, by default from a one-to-many run of the same network.
        defaults: Options that a modifier may change.
        converts: Whether it starts as its teacher, whole.
        pseudo: Whether its teacher's detections are the labels of images that have none.
    """

    title: str
    options: Mapping[str, Option]
    taught: bool = False
    defaults: Mapping[str, Option] = field(default_factory=dict)
    converts: bool = False
    pseudo: bool = False


@dataclass(frozen=True)
class Modifier:
    """A further word of a variant's name: what it changes.

    Attributes:
        title: Title in tables.
        options: Options of ``train.py`` that it sets.
        numbered: Title, as a format, where a number follows the word; the number is the value of its option. Empty: no
            number may follow.
        length: Epochs in units of the protocol's; 0: no change.
        teacher: End that it adds to the teacher's name.
        network: Whether it changes the network, so that one-to-many runs of the same network have the word, too.
        larger: Whether the network is the protocol's larger one.
        inherits: Whether backbone and neck come from a one-to-many run of the same network.
    """

    title: str
    options: Mapping[str, Option] = field(default_factory=dict)
    _: KW_ONLY
    numbered: str = ""
    length: float = 0.0
    teacher: str = ""
    network: bool = False
    larger: bool = False
    inherits: bool = False


@dataclass(frozen=True)
class Variant:
    """One way to train, read off its name.

    Attributes:
        name: Its words, joined by hyphens.
        title: Title in tables.
        options: Options of ``train.py``, besides the protocol's.
        teacher: The variant it learns from or inherits from; trained with the same seed.
        origin: The variant it inherits from, if that is not its teacher; likewise.
        length: Epochs in units of the protocol's.
        larger: Whether it is the larger network.
        converts: Whether it starts as its teacher, whole.
        pseudo: Whether its teacher's detections are the labels of images that have none.
        order: Sorts variants as tables list them: by base, modifiers and length.
    """

    name: str
    title: str
    options: Mapping[str, Option]
    teacher: str
    origin: str
    length: float
    larger: bool
    converts: bool
    pseudo: bool
    order: tuple[int, tuple[int, ...], float]

    def epochs(self, protocol: Protocol) -> int:
        """Passes over the training images, unless nothing is trained at all.

        With pseudo-labels an epoch has all images, not a share: there are fewer epochs, of as many steps in all.
        """
        share = protocol.labelled if self.pseudo else 1.0
        return int(self.options.get("epochs", max(1, round(protocol.epochs * self.length * share))))


@dataclass(frozen=True)
class Run:
    """One training run: a variant, on a data set, with a seed; "tune" holds out a part of the training images."""

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
        return self._sibling(variant(self.variant).teacher)

    @property
    def origin(self) -> Run | None:
        """The run it inherits from, if that is not its teacher."""
        return self._sibling(variant(self.variant).origin)

    @property
    def needs(self) -> tuple[Run, ...]:
        """The runs that must be finished before."""
        return tuple(run for run in (self.teacher, self.origin) if run is not None)

    def _sibling(self, name: str) -> Run | None:
        seed = 0 if name in SETS[self.data].shared else self.seed
        return Run(self.data, self.split, name, seed) if name else None

    @property
    def epochs(self) -> int:
        """Passes over the training images."""
        return variant(self.variant).epochs(SETS[self.data])

    @property
    def options(self) -> Options:
        """Options of ``train.py``, without folders."""
        protocol, own = SETS[self.data], variant(self.variant)
        larger = protocol.larger if own.larger else {}
        return {**protocol.options, **larger, "epochs": self.epochs, **own.options, "seed": self.seed}


# --- data sets

_SMALL: Options = {
    "batch_size": 4,
    "lr": 1e-3,
    "ema": 0.998,
    "precision": "bfloat16",
    "cache": True,
    "augmentation": "crop",
}
_MOBILENET: Options = {
    "backbone": "mobilenet_v2",
    "backbone_weights": "weights/mobilenet_v2_in1k_tf2.pth",
    "channels": 64,
    "head_convs": 2,
}
_PERSON: Options = {
    "train_annotations": "instances_train_person.json",
    "val_annotations": "instances_val_person.json",
}
_WIDER: Options = {"channels": 256, "head_convs": 4}  # than a MobileNetV2 student, on its backbone
_SCENES: Options = {**_SMALL, "size": 128, "augmentation": "flip"}
_LARGE_TEACHERS = ("one-to-many-large", "one-to-many-large-2x")
SETS = {
    "demo": Protocol(8, _SCENES, shared=_LARGE_TEACHERS),
    # For processors that are slow in bfloat16, those without AVX-512.
    "demo_float32": Protocol(8, {**_SCENES, "precision": "float32"}, folder="demo", shared=_LARGE_TEACHERS),
    "bccd": Protocol(30, {**_SMALL, "size": 192}),
    "pcb": Protocol(10, {**_SMALL, "size": 224, "augmentation": "flip"}, shared=_LARGE_TEACHERS),
    "highway": Protocol(25, {**_SMALL, "size": 192}, shared=_LARGE_TEACHERS),
    "hit_uav": Protocol(12, {**_SMALL, "size": 256}, shared=_LARGE_TEACHERS),
    # Crowds with a chosen overlap, of which `made.py` makes pictures: all overlaps mixed. `overlap.py` scores them.
    "overlap_scenes": Protocol(8, _SCENES, shared=_LARGE_TEACHERS),
    "overlap_cells": Protocol(12, _SCENES, shared=_LARGE_TEACHERS),
    # Labels on a tenth or three tenths of the images, and so many epochs that there are about 1,050 steps.
    "hit_uav_10": Protocol(20, {**_SMALL, "size": 256}, "hit_uav", _LARGE_TEACHERS, labelled=0.1),
    "hit_uav_30": Protocol(7, {**_SMALL, "size": 256}, "hit_uav", _LARGE_TEACHERS, labelled=0.3),
    "bccd_10": Protocol(150, {**_SMALL, "size": 192}, "bccd", labelled=0.1),
    "bccd_30": Protocol(50, {**_SMALL, "size": 192}, "bccd", labelled=0.3),
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

# --- words

_FOREIGN = "python:examples/third_party/nanodet_yolox.py"
BASES = {
    "one-to-many": Base("one-to-many", {"arm": "one-to-many"}),
    "one-to-one": Base("one-to-one", {"arm": "one-to-one"}),
    "auxiliary-head": Base("one-to-one, auxiliary head", {"arm": "one-to-one", "auxiliary_head": True}),
    "own-head-imitation": Base("own-head imitation", {"arm": "own-head-imitation"}, taught=True),
    "feature-imitation": Base("feature imitation (PKD)", {"arm": "feature-imitation"}, taught=True),
    "weighted-imitation": Base(
        "feature imitation (weighted L2, weight 6)", {"arm": "weighted-imitation", "imitation": 6.0}, taught=True
    ),
    "cross-head": Base("cross-head", {"arm": "cross-head"}, taught=True),
    # As `train.py --convert` does it, unless a word says otherwise.
    "convert": Base(
        "converted",
        {},
        taught=True,
        defaults={"arm": "cross-head", "metric": "balanced", "selection": True, "lr": 3e-4, "warmup_steps": 10},
        converts=True,
    ),
    # On sets with labels on a part of the images.
    "unlabelled-pseudo": Base("one-to-one, pseudo-labels", {"arm": "one-to-one"}, taught=True, pseudo=True),
}
MODIFIERS = {
    # The network. The small network's head has two convolutions, so later entries need a deeper one.
    "deep": Modifier("heads of four convolutions", {"head_convs": 4}, network=True),
    # The teacher.
    "large": Modifier("larger teacher", teacher="-large"),
    "large-2x": Modifier("larger teacher trained twice as long", teacher="-large-2x"),
    "2x-teacher": Modifier("teacher trained twice as long", teacher="-2x"),
    "nanodet": Modifier("teacher NanoDet-m", {"teacher": f"{_FOREIGN}:nanodet_m"}),
    "yolox": Modifier("teacher YOLOX-nano", {"teacher": f"{_FOREIGN}:yolox_nano"}),
    # The start: backbone and neck of a one-to-many run of the same network.
    "inherit": Modifier("inheriting", inherits=True),
    "further": Modifier("trained further", {"inherit_head": True}, inherits=True),
    # What of a conversion learns, and from what.
    "untrained": Modifier("nothing trained", {"epochs": 0}),
    "frozen": Modifier("only the selection branch", {"freeze": "all", "arm": "one-to-one", "lr": 1e-3}),
    "head": Modifier("only the head", {"freeze": "backbone-neck"}),
    "undistilled": Modifier("no distillation", {"arm": "one-to-one"}),
    "unselected": Modifier("no selection branch", {"selection": False}),
    "selection": Modifier("selection branch", {"selection": True}),
    "class": Modifier("score of the class alone", {"class_score": True}),
    # Distillation.
    "decay": Modifier("fading", {"distill_decay": "cosine"}),
    "warmup": Modifier("warmed up", {"distill_warmup": 0.2}),
    "half": Modifier("weights ½", {"distill_classification": 0.5, "distill_box": 0.5}),
    "double": Modifier("weights 2", {"distill_classification": 2.0, "distill_box": 2.0}),
    "quality": Modifier("quality distilled", {"distill_quality": 1.0}),
    "unaligned": Modifier("no alignment", {"alignment": "none"}),
    "entry": Modifier("entry 0", {"entry": 0}, numbered="entry {:g}"),
    "features": Modifier("feature imitation", {"distill_features": 1.0}, numbered="feature imitation of weight {:g}"),
    # On sets with labels on a part of the images: the others are half of every batch, so an epoch has twice the steps.
    "unlabelled": Modifier("images without labels", {"unlabelled": "unlabelled"}),
    # The student's own training.
    "auxiliary": Modifier("auxiliary head", {"auxiliary_head": True}),
    "detached": Modifier("detached", {"detach": True}),
    "poto": Modifier("POTO's metric", {"metric": "poto"}),
    "task-aligned": Modifier("task-aligned metric", {"metric": "task-aligned"}),
    "yolo": Modifier("YOLO's metric", {"metric": "yolo"}),
    "balanced": Modifier("balanced metric", {"metric": "balanced"}),
    "ranking": Modifier("ranking 0.25", {"ranking": 0.25}, numbered="ranking {:g}"),
    # The optimiser.
    "warm": Modifier("10 steps of warm-up", {"warmup_steps": 10}, numbered="{:g} steps of warm-up"),
    "rate": Modifier("learning rate 0.002", {"lr": 2e-3}, numbered="learning rate {:g}"),
    # The length.
    "5pc": Modifier("5 % of the epochs", length=0.05),
    "10pc": Modifier("10 % of the epochs", length=0.1),
    "25pc": Modifier("25 % of the epochs", length=0.25),
    "50pc": Modifier("50 % of the epochs", length=0.5),
    "2x": Modifier("twice as long", length=2),
    "3x": Modifier("three times as long", length=3),
}
# Words that are others where nobody teaches.
UNTAUGHT = {"large": Modifier("larger network", network=True, larger=True)}
GIVEN_UP = frozenset({"coupled", "rising"})  # words of recorded variants whose code is gone

_RECIPE = ("cross-head, larger teacher, inheriting, fading", "cross-head recipe")  # its short title
_NUMBER = re.compile(r"\d+(\.\d+)?")


def given_up(name: str) -> bool:
    """Return whether a recorded variant was given up with its code."""
    return not GIVEN_UP.isdisjoint(name.split("-"))


@cache
def variant(name: str) -> Variant:
    """Read a variant off its name.

    Raises:
        PlanError: If a word is unknown, or contradicts another one.

    Example:
        >>> variant("cross-head-large-inherit-decay-ranking-0.1-2x").title
        'cross-head recipe, ranking 0.1, twice as long'
        >>> variant("cross-head-large-inherit-decay-ranking-0.1-2x").teacher
        'one-to-many-large'
    """
    # 1. Read the words, and put them into the order of the table.
    first = max((word for word in BASES if f"{name}-".startswith(f"{word}-")), key=len, default="")
    if not first:
        raise _unknown(name, name, BASES)
    base, words = BASES[first], _words(name, BASES[first], name[len(first) :].split("-")[1:])
    modifiers = [word.modifier for word in words]

    # 2. Collect the options.
    options: Options = {**base.defaults, **base.options}
    for modifier in modifiers:
        options |= modifier.options
    foreign = "teacher" in options
    lengths = [modifier.length for modifier in modifiers if modifier.length]
    teachers = [modifier.teacher for modifier in modifiers if modifier.teacher]
    written = [*base.options, *(option for modifier in modifiers for option in modifier.options)]
    twice = len(set(written)) < len(written)
    if twice or len(lengths) > 1 or len(teachers) + foreign > 1:
        raise PlanError(
            expected="words that do not contradict each other",
            got="an option, a length or a teacher that is set twice",
            where=f"variant {name!r}",
            fix="leave one of the words out",
        )

    # 3. Name the one-to-many run of the same network, the twin, and the teacher, unless it is a foreign one.
    twin = "-".join(["one-to-many", *(word.written for word in words if word.modifier.network)])
    teacher = twin + "".join(teachers) if base.taught and not foreign else ""

    # 4. Inherit from the twin: as from the teacher, where it is the teacher or nobody else teaches.
    origin = ""
    inherits = any(modifier.inherits for modifier in modifiers)
    if inherits and (foreign or teacher not in ("", twin)):
        origin = twin
    elif inherits:
        teacher, options["inherit"] = twin, True

    # 5. Compose the title.
    title = ", ".join([base.title, *(modifier.title for modifier in modifiers)]).replace(*_RECIPE)
    larger = any(modifier.larger for modifier in modifiers)
    length = lengths[0] if lengths else 1.0
    order = list(BASES).index(first), tuple(word.place for word in words if not word.modifier.length), length
    return Variant(name, title, options, teacher, origin, length, larger, base.converts, base.pseudo, order)


class _Word(NamedTuple):
    place: int  # in the table of modifiers
    written: str  # with its number
    modifier: Modifier


def _words(name: str, base: Base, parts: list[str]) -> list[_Word]:
    """Read the modifiers of a name, split at its hyphens, with the numbers behind them; in the order of the table."""
    table = MODIFIERS
    if not base.taught:
        table = {w: m for w, m in table.items() if not m.teacher and "teacher" not in m.options} | UNTAUGHT
    words: dict[str, _Word] = {}
    while parts:
        # 1. Take the longest word, but leave a length at the end to the student: "cross-head-large-2x".
        word = "-".join(parts[:2])
        if word not in table or (len(parts) == 2 and parts[1] in table):
            word = parts[0]
        if word not in table or word in words:
            raise _unknown(name, "-".join(parts), [word for word in table if word not in words])
        written, modifier, parts = word, table[word], parts[1 + word.count("-") :]
        # 2. Take the number behind it, if it is a word that can have one.
        if modifier.numbered and parts and _NUMBER.fullmatch(parts[0]):
            written, number = f"{word}-{parts[0]}", float(parts.pop(0))
            options = {option: type(default)(number) for option, default in modifier.options.items()}
            modifier = replace(modifier, title=modifier.numbered.format(number), options=options)
        words[word] = _Word(list(MODIFIERS).index(word), written, modifier)
    return sorted(words.values())


def _unknown(name: str, rest: str, words: Iterable[str]) -> PlanError:
    return PlanError(
        expected=f"one of the words {', '.join(words)}",
        got=repr(rest),
        where=f"variant {name!r}",
        fix="correct the name, or add the word to the plan",
    )


# --- studies

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
    # Converting a trained detector: what of it learns, how fast, and from what.
    "convert-screen": (
        "convert-untrained",
        *(
            f"{words}-{length}"
            for length in ("10pc", "25pc")
            for words in (
                "one-to-many-further",
                "one-to-one-inherit",
                "convert",
                "convert-frozen",
                "convert-undistilled",
                "convert-unselected",
                "convert-poto",
                "convert-features",
                "convert-head-undistilled",
                "convert-head-entry-2",
                "convert-rate-0.001",
            )
        ),
    ),
    # What it costs: the curve.
    "convert-curve": (
        "convert-untrained",
        *(f"convert-{share}pc" for share in (5, 10, 25, 50)),
        "convert",
        "convert-frozen-10pc",
        *(f"one-to-many-further{length}" for length in ("-10pc", "-25pc", "")),
    ),
    # Where NMS must fail; `overlap.py` scores the runs on crowds of one overlap each.
    "overlap": (
        "one-to-many",
        "one-to-many-2x",
        "one-to-one-inherit",
        "convert-undistilled-unselected",
        "convert-undistilled",
        "convert",
        "cross-head-large-inherit-decay-features",
        "cross-head-large-inherit-decay-features-selection",
    ),
    # Labels on a part of the images, as on hit_uav_10: what the others give, by pseudo-labels.
    "unlabelled": (
        "one-to-many",
        "one-to-many-large",
        "one-to-one-inherit",
        "cross-head-large-inherit-decay-features",
        "cross-head-large-inherit-decay-features-unlabelled-50pc",
        "unlabelled-pseudo-inherit",
        "unlabelled-pseudo-large-inherit",
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
    """List the runs of a study, or of one variant, each after those it needs and once; set by set and seed by seed.

    Example:
        >>> [run.key for run in planned("cross-head", ["bccd"], "tune", [0])]
        ['bccd/tune/one-to-many/0', 'bccd/tune/cross-head/0']
    """
    names = STUDIES.get(study, (study,))
    for one in data:
        seen: set[Run] = set()
        for seed in seeds:
            for name in names:
                run = Run(one, split, name, seed)
                for wanted in (*run.needs, run):
                    if wanted not in seen:
                        seen.add(wanted)
                        yield wanted

"""Which options of `train.py` go together: the rules behind the table in docs/training.md."""

from __future__ import annotations

from coco_example.options import Options, is_reference

__all__ = ["incompatible"]

_BUILT = ("architecture", "backbone", "backbone_weights", "trainable_stages", "channels", "head_convs")
_UNDISTILLED = ("one-to-many", "one-to-one")


def incompatible(options: Options) -> str | None:
    """Describe the first option that lacks another, or does not go with one."""
    rules = [*_about_teachers(options), *_about_methods(options)]
    return next((sentence for wrong, sentence in rules if wrong), None)


def _about_teachers(options: Options) -> list[tuple[bool, str]]:
    given, arm = options.teachers, options.method.arm
    own = type(options.model)()
    built = [name for name in _BUILT if getattr(options.model, name) != getattr(own, name)]
    return [
        (
            bool(given.convert) and bool(given.teacher or given.inherit or given.inherit_from),
            "expected --convert without --teacher, --inherit and --inherit-from: it is all of them",
        ),
        (
            bool(given.convert) and arm == "one-to-many",
            "expected an arm without NMS for --convert, but got --arm one-to-many",
        ),
        (
            is_reference(given.convert) and bool(built),
            f"expected --convert {given.convert} without {', '.join(map(_flag, built))}: its form is its own",
        ),
        (
            given.inherit and not given.teacher,
            "expected a --teacher for --inherit, but got none",
        ),
        (
            given.inherit and bool(given.inherit_from),
            "expected --inherit or --inherit-from, but got both",
        ),
        (
            given.inherit_head and not (given.inherit or given.inherit_from),
            "expected --inherit or --inherit-from for --inherit-head, but got neither",
        ),
        (
            bool(options.dataset.unlabelled) and arm in _UNDISTILLED,
            f"expected an arm that distils for --unlabelled, but got --arm {arm}: nothing else learns from them",
        ),
        (
            bool(options.dataset.unlabelled) and not 0 < options.unlabelled_per_batch < options.training.batch_size,
            f"expected images of both kinds in a batch, but got --unlabelled-share {options.dataset.unlabelled_share}",
        ),
    ]


def _about_methods(options: Options) -> list[tuple[bool, str]]:
    method, selection = options.method, options.model.selection
    fixed = method.freeze in ("backbone-neck", "all")
    return [
        (
            method.detach and not method.auxiliary_head,
            "expected --auxiliary-head for --detach, but got none",
        ),
        (
            method.detach and method.entry > 0,
            f"expected --entry 0 with --detach, but got {method.entry}",
        ),
        (
            selection and method.arm == "one-to-many",
            "expected an arm of one positive an object for --selection, but got --arm one-to-many",
        ),
        (
            options.model.class_score and not selection,
            "expected --selection or --convert with --class-score, but got neither",
        ),
        (
            method.freeze == "all" and not (selection and method.arm == "one-to-one"),
            "expected --selection and --arm one-to-one with --freeze all: nothing else would learn",
        ),
        (
            fixed and method.auxiliary_head,
            f"expected --freeze none or backbone with --auxiliary-head, but got {method.freeze}: it is for features",
        ),
        (
            fixed and method.arm in ("feature-imitation", "weighted-imitation"),
            f"expected --freeze none or backbone with --arm {method.arm}, but got {method.freeze}: no features learn",
        ),
        (
            fixed and method.arm == "cross-head" and method.entry == 0,
            f"expected --arm one-to-one or an --entry with --freeze {method.freeze}: distillation reaches nothing else",
        ),
    ]


def _flag(name: str) -> str:
    return "--" + name.replace("_", "-")

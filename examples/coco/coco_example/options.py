"""Every option of `train.py`, once: name, type, default and help, in groups that are handed over whole."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, fields
from typing import Annotated, Any, Literal, get_args

from typing_extensions import Self

from coco_example.data.augmentation import Level
from crosskd_assign.distillation import Alignment, Decay

__all__ = [
    "FREE_ON_RESUME",
    "GROUPS",
    "TIMM",
    "Architecture",
    "Arm",
    "Backbone",
    "DataOptions",
    "Freeze",
    "MethodOptions",
    "Metric",
    "ModelOptions",
    "Options",
    "TeacherOptions",
    "TrainingOptions",
    "is_reference",
]

Architecture = Literal["fcos", "retinanet"]
Backbone = Literal[  # beside these, timm:NAME for one of timm's
    "small", "resnet18", "resnet34", "resnet50", "resnet101", "mobilenet_v2", "mobilenet_v3_large", "mobilenet_v3_small"
]
TIMM = "timm:"  # how the names of timm's backbones begin
Arm = Literal[
    "one-to-many", "one-to-one", "cross-head", "feature-imitation", "weighted-imitation", "own-head-imitation"
]
Freeze = Literal["none", "backbone", "backbone-neck", "all"]
Metric = Literal["poto", "balanced", "task-aligned", "yolo"]

# A resumed run may differ in these without becoming another run.
FREE_ON_RESUME = frozenset(
    {"output", "resume", "workers", "log_every", "save_every", "data_path", "unlabelled", "teacher", "convert"}
    | {"log_to", "device", "compile", "val_losses"}
)


@dataclass(frozen=True)
class DataOptions:
    """The images of a run."""

    data: Annotated[Literal["coco", "demo"], "kind of data set; demo draws scenes into --data-path first"] = "coco"
    data_path: Annotated[
        str, "data set as COCO, Roboflow, CVAT, Label Studio or FiftyOne lay it out: train[2017]/, val[2017]/, …"
    ] = "data/demo"
    train_annotations: Annotated[str, "annotation file to train on, in annotations/, in --data-path or anywhere"] = ""
    val_annotations: Annotated[str, "annotation file to evaluate on, found likewise"] = ""
    train_images: Annotated[str, "folder of the pictures to train on, in --data-path or anywhere"] = ""
    val_images: Annotated[str, "folder of the pictures to evaluate on, found likewise"] = ""
    augmentation: Annotated[Level, "augmentation of training images"] = "flip"
    mosaic: Annotated[float, "probability of joining four training images into one"] = 0.0
    unlabelled: Annotated[
        str, "folder of pictures without labels, in any tree below it, which distillation alone learns from"
    ] = ""
    unlabelled_share: Annotated[float, "their share of every batch; an epoch is one of the images with labels"] = 0.5
    cache: Annotated[bool, "keep decoded images in memory"] = False
    workers: Annotated[int, "processes that load images; -1: as many as the machine has cores to spare"] = -1
    multi_scale: Annotated[
        bool, "train every batch at a size of its own: of a --short-side of 800, one of 480, 512, …, 800"
    ] = False


@dataclass(frozen=True)
class ModelOptions:
    """The detector that is trained."""

    architecture: Annotated[Architecture, "detector"] = "fcos"
    backbone: Annotated[str, f"backbone of the detector: {', '.join(get_args(Backbone))}, or timm:NAME"] = "small"
    backbone_weights: Annotated[str, "imagenet for the hub's weights, or a state dict file; empty: none"] = ""
    trainable_stages: Annotated[
        int, "backbone stages to train, of 5, from the last; -1: 3 with weights, all without"
    ] = -1
    channels: Annotated[int, "channels of pyramid and head, a multiple of 32; 0: 256, or 64 on the small backbone"] = 0
    head_convs: Annotated[int, "convolutions of each branch of FCOS's head; 0: 4, or 2 on the small backbone"] = 0
    size: Annotated[
        int,
        "longer side of the images in pixels, to which the detector resizes them; 0 with --convert python: its own",
    ] = 128
    short_side: Annotated[int, "bound of the shorter side: 800 with --size 1333 is usual on COCO; 0: none"] = 0
    top_k: Annotated[int, "detections of an image, which is the limit of its AP, too"] = 100
    one_class_per_point: Annotated[bool, "let each point report its best class only: one detection at most"] = False
    selection: Annotated[bool, "a branch that sees each score beside its neighbours' and multiplies it"] = False
    class_score: Annotated[bool, "with --selection: the score is the class alone, and quality only chooses points"] = (
        False
    )


@dataclass(frozen=True)
class TeacherOptions:
    """The trained detectors that a run uses."""

    teacher: Annotated[
        str, "a run's folder, torchvision:NAME for its COCO weights, or your own python:FILE:FUNCTION"
    ] = ""
    convert: Annotated[
        str,
        "take NMS out of this detector, named as a --teacher is: it is the student's start and its teacher. The "
        "options of a run and a quarter of its epochs are the defaults, else 12 epochs at --lr 0.0001 and its size; "
        "--selection and --metric balanced, too",
    ] = ""
    inherit: Annotated[bool, "start with the tensors of the teacher's backbone and neck that fit"] = False
    inherit_from: Annotated[str, "start with those of this detector instead, named as a --teacher is"] = ""
    inherit_head: Annotated[bool, "inherit the tensors of its head, too"] = False
    teacher_floor: Annotated[float, "refuse a teacher whose AP on validation images is below this"] = 0.01


@dataclass(frozen=True)
class MethodOptions:
    """How the detector is trained: its labels, its losses, its distillation."""

    arm: Annotated[Arm, "training method; cross-head is the one of this project"] = "cross-head"
    auxiliary_head: Annotated[bool, "train a second, one-to-many head beside the student's (DATE, YOLOv10)"] = False
    detach: Annotated[bool, "with --auxiliary-head: stop the one-to-one losses at the features (YOLOv10)"] = False
    ranking: Annotated[float, "weight of the one-to-one ranking loss"] = 0.0
    metric: Annotated[Metric, "preset of the task-aware metric that assigns points to objects"] = "poto"
    distill_classification: Annotated[float, "weight of the classification term of distillation"] = 1.0
    distill_box: Annotated[float, "weight of the box term of distillation"] = 1.0
    distill_quality: Annotated[float, "weight of the quality term of distillation"] = 0.0
    distill_features: Annotated[float, "weight of feature imitation beside cross-head distillation"] = 0.0
    distill_warmup: Annotated[float, "share of the run over which the weight of distillation rises from 0"] = 0.0
    distill_decay: Annotated[Decay, "how the weight of distillation falls to 1 percent over the run"] = "none"
    imitation: Annotated[float, "weight of feature imitation where it is the arm"] = 1.0
    alignment: Annotated[Alignment, "how the student's features are aligned to the teacher's"] = "statistics"
    freeze: Annotated[Freeze, "parts of the detector that stay as they start; of all, --selection alone learns"] = (
        "none"
    )
    entry: Annotated[int, "convolutions of the student's head that run before it enters the teacher's (cross-head)"] = 0


@dataclass(frozen=True)
class TrainingOptions:
    """The training loop."""

    epochs: Annotated[int, "passes over the training images; 0 with --convert: train nothing"] = 12
    batch_size: Annotated[int, "images of one forward pass on one process"] = 16
    accumulate: Annotated[int, "batches a step, whose gradients are averaged; steps and schedule count these"] = 1
    optimizer: Annotated[Literal["adamw", "sgd"], "optimizer; sgd has a momentum of 0.9"] = "adamw"
    lr: Annotated[float, "peak learning rate"] = 1e-3
    weight_decay: Annotated[float, "weight decay of weights; norms and biases have none"] = 1e-4
    schedule: Annotated[
        Literal["cosine", "step"], "learning rate over the run; step divides it by 10 after 2/3 and 8/9"
    ] = "cosine"
    warmup_steps: Annotated[int, "steps of linear learning-rate warm-up"] = 100
    max_grad_norm: Annotated[float, "gradient norm to clip at; 0: do not clip"] = 10.0
    ema: Annotated[float, "decay of an average of the weights, which is then evaluated and saved; 0: none"] = 0.0
    precision: Annotated[Literal["float32", "bfloat16", "float16"], "autocast precision"] = "float32"
    channels_last: Annotated[bool, "keep images and weights in channels-last memory format"] = False
    eval_precision: Annotated[Literal["float32", "bfloat16", "float16"], "autocast precision of evaluations"] = (
        "float32"
    )
    sync_batch_norm: Annotated[bool, "let trained batch norm see the images of all processes"] = False
    eval_every: Annotated[
        int, "epochs between evaluations, of which the best detector is kept in best/; 0: only at the end"
    ] = 0
    val_losses: Annotated[int, "validation images whose losses are logged at every evaluation; 0: none"] = 256
    save_every: Annotated[int, "steps between checkpoints besides those at the end of each epoch; 0: none"] = 0
    log_every: Annotated[int, "steps between lines of the log"] = 20


@dataclass(frozen=True)
class Options:
    """One training run. ``max_grad_norm`` is ``--max-grad-norm`` on the command line, and so on in every group."""

    output: Annotated[str, "folder of the run; must be new, empty, or resumed"] = ""
    resume: Annotated[bool, "continue the run in --output exactly where it stopped"] = False
    seed: Annotated[int, "random seed"] = 0
    deterministic: Annotated[bool, "use deterministic algorithms only"] = False
    device: Annotated[str, "device to train on: cpu, cuda, cuda:1, mps; empty: cuda if there is one, else cpu"] = ""
    compile: Annotated[bool, "compile the student's and the teacher's backbones with torch.compile"] = False
    log_to: Annotated[
        tuple[str, ...], "send each record of the log to tensorboard or python:FILE:FUNCTION, too; may be repeated"
    ] = ()
    dataset: DataOptions = field(default_factory=DataOptions)
    model: ModelOptions = field(default_factory=ModelOptions)
    teachers: TeacherOptions = field(default_factory=TeacherOptions)
    method: MethodOptions = field(default_factory=MethodOptions)
    training: TrainingOptions = field(default_factory=TrainingOptions)

    @property
    def unlabelled_per_batch(self) -> int:
        """Count the images without labels in the batch of one process."""
        share = self.dataset.unlabelled_share
        return round(share * self.training.batch_size) if self.dataset.unlabelled and 0 < share < 1 else 0

    @classmethod
    def from_flat(cls, values: Mapping[str, Any]) -> Self:
        """Build options from values by name, without groups; what is not named has its default."""
        left = dict(values)
        if "log_to" in left:  # a list in JSON and on the command line
            left["log_to"] = tuple(left["log_to"])
        groups = {
            name: kind(**{option.name: left.pop(option.name) for option in fields(kind) if option.name in left})
            for name, kind in GROUPS.items()
        }
        return cls(**left, **groups)

    def as_flat(self) -> dict[str, Any]:
        """List all options by name, without groups, as ``config.json`` has them."""
        flat: dict[str, Any] = {}
        for name, value in asdict(self).items():
            flat |= value if name in GROUPS else {name: value}
        return flat

    def step_images(self, processes: int) -> int:
        """Count the images of one step over all processes."""
        return self.training.batch_size * self.training.accumulate * processes

    def differences(self, other: Mapping[str, Any]) -> list[str]:
        """List options that differ from the flat ones of an earlier start and must not when resuming."""
        then = type(self)().as_flat() | dict(other)  # an option that did not exist then had its default
        return [
            f"{name}: {then[name]!r} then, {value!r} now"
            for name, value in self.as_flat().items()
            if name not in FREE_ON_RESUME and then[name] != value
        ]


GROUPS: dict[str, Any] = {
    "dataset": DataOptions,
    "model": ModelOptions,
    "teachers": TeacherOptions,
    "method": MethodOptions,
    "training": TrainingOptions,
}


def is_reference(name: str) -> bool:
    """Whether a detector is named as "torchvision:NAME" or "python:FILE:FUNCTION"; else it is a run's folder."""
    kind, _, rest = name.partition(":")
    return kind in ("torchvision", "python") and bool(rest)

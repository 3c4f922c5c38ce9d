"""The job file as frozen types. Every field says its unit; `toolkit schema` prints this as JSON Schema."""

from typing import Annotated, Any, Literal

from pydantic import (
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Discriminator,
    Field,
    PrivateAttr,
    Tag,
    model_validator,
)

from toolkit.config.text import quoted
from toolkit.errors import JobError


class Section(BaseModel):
    """A part of the job file: unknown keys are errors, types are not guessed, nothing changes afterwards."""

    model_config = ConfigDict(frozen=True, extra="forbid", strict=True, allow_inf_nan=False)


class Component(Section):
    """A named part: a registry key, or `package.module:attribute` of your own code, and its arguments."""

    name: str = Field(min_length=1, description="registry key, or package.module:attribute of your own code")
    args: dict[str, Any] = Field({}, description="arguments of its constructor, checked against the signature")


class Optimizer(Component):
    """An optimizer, and which of the model's parameters have another learning rate than its own."""

    lr_scale: dict[str, Annotated[float, Field(gt=0)]] = Field(
        {}, description="pattern of parameter names, such as head.*, and the factor of their learning rate"
    )


def _component(value: Any) -> Any:
    return {"name": value} if isinstance(value, str) else value


# `model: mlp` is short for `model: {name: mlp}`.
ComponentField = Annotated[Component, BeforeValidator(_component, json_schema_input_type=str | Component)]
OptimizerField = Annotated[Optimizer, BeforeValidator(_component, json_schema_input_type=str | Optimizer)]


class Fraction(Section):
    """A share of the training set, held out by (seed, index)."""

    fraction: float = Field(gt=0, lt=1, description="share of the training samples, between 0 and 1")


def _val_kind(value: Any) -> str:
    fraction = "fraction" in value if isinstance(value, dict) else isinstance(value, Fraction)
    return "fraction" if fraction else "component"


ValField = Annotated[
    Annotated[Fraction, Tag("fraction")] | Annotated[ComponentField, Tag("component")], Discriminator(_val_kind)
]
Auto = Literal["auto"]
Count = Annotated[int, Field(ge=1)]


class Run(Section):
    name: str = Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]*$", description="name of the run; default: the file's name")
    dir: str = Field(min_length=1, description="fsspec URL that holds everything of this run")
    seed: int = Field(0, ge=0, lt=2**63, description="the one seed: weights, order, dropout and augmentation follow")
    init_from: str | None = Field(
        None, min_length=1, description="URL of a run or checkpoint whose weights a new run starts from"
    )
    init_except: tuple[str, ...] = Field(
        (),
        strict=False,
        description="patterns of names of weights, such as head.*, that init_from leaves out: they start anew",
    )

    @model_validator(mode="after")
    def _except_from_something(self) -> "Run":
        if self.init_except and not self.init_from:
            raise ValueError("init_except leaves something out of init_from, and there is no init_from; give both")
        return self


class Data(Section):
    train: ComponentField = Field(description="the training set")
    val: ValField | None = Field(
        None, description="a dataset, or {fraction: 0.1} held out of train; looked at in training"
    )
    test: ComponentField | None = Field(None, description="a dataset, evaluated once, at the end")
    transforms: tuple[ComponentField, ...] = Field(
        (), strict=False, description="applied to inputs in this order; random ones in training only"
    )
    global_batch_size: Count = Field(description="samples a step, over all ranks and micro-batches")
    workers: int = Field(0, ge=0, description="loader processes a rank; 0 loads in the rank itself")


class Train(Section):
    epochs: Count | None = Field(None, description="passes over the training set")
    max_steps: Count | None = Field(None, description="optimizer steps; with epochs, the smaller of the two")
    micro_batch_size: Count | Auto = Field(
        "auto", description="samples a rank takes at once; auto: its whole share of the batch"
    )
    precision: Literal["auto", "fp32", "bf16", "fp16"] = Field(
        "auto", description="auto: bf16 where the GPU has it, else fp32"
    )
    device: Literal["auto", "cpu", "cuda", "mps"] = Field("auto", description="auto: cuda, else mps, else cpu")
    clip_grad_norm: float | None = Field(None, gt=0, description="largest L2 norm of the whole gradient")
    compile: bool = Field(False, description="compile the model with torch.compile")
    ema_decay: float | None = Field(
        None, gt=0, lt=1, description="share of the averaged weights that a step leaves as it is; they are evaluated"
    )
    freeze: tuple[str, ...] = Field(
        (), strict=False, description="patterns of parameter names, such as layers.0.*, that are not trained"
    )
    on_nan: Literal["stop", "skip", "rollback"] = Field(
        "stop",
        description="what to do about a step whose loss or gradient is no number: end the run, leave the step out, or "
        "go back to the newest checkpoint and on without the step's batch",
    )
    max_rollbacks: int = Field(3, ge=0, description="how many batches rollback may leave out before the run ends")
    spike_grad_norm: float | None = Field(
        None, gt=0, description="an L2 norm of the gradient, before clipping, from above which on_nan applies, too"
    )
    strategy: Literal["auto", "ddp", "fsdp"] = Field(
        "auto",
        description="how several ranks hold the model; auto: ddp; ddp: each the whole of it; fsdp: each a share of the "
        "weights, gradients and optimizer state (FSDP2), for models too large for one; one rank alone holds all",
    )
    activation_checkpointing: bool = Field(
        False, description="keep only the inputs of the model's blocks, and compute the rest again in backward"
    )
    channels_last: bool = Field(
        False, description="keep images and the weights of convolutions as (N, H, W, C) in memory; cuda and cpu"
    )
    grad_compression: Literal["bf16"] | None = Field(
        None, description="type in which ddp sends gradients from rank to rank: half the bytes, rounded to 8 bits"
    )
    sync_batch_norm: bool = Field(
        False, description="batch norm over the samples of all ranks, not of each; on GPUs only"
    )

    @property
    def in_step(self) -> bool:
        """Whether every forward pass of a rank is one of all ranks."""
        return self.strategy == "fsdp" or self.sync_batch_norm

    @model_validator(mode="after")
    def _ends(self) -> "Train":
        if self.epochs is None and self.max_steps is None:
            raise ValueError("give epochs or max_steps, so that the run has an end")
        return self

    @model_validator(mode="after")
    def _one_who_skips(self) -> "Train":
        if self.precision == "fp16" and (self.on_nan != "stop" or self.spike_grad_norm):
            raise ValueError(
                "in fp16 the loss scaler leaves out steps whose gradient overflows, as its normal work: "
                "use bf16 or fp32, or leave on_nan at stop and spike_grad_norm at null"
            )
        return self

    @model_validator(mode="after")
    def _goes_with_fsdp(self) -> "Train":
        if self.strategy == "fsdp" and self.precision == "fp16":
            raise ValueError(
                "precision fp16 does not go with strategy fsdp: a gradient that overflows is seen by one rank only, "
                "and the others would not skip the step; use precision bf16, or strategy ddp"
            )
        if self.strategy == "fsdp" and self.channels_last:
            raise ValueError(
                "channels_last does not go with strategy fsdp, which keeps and sends its shares of a weight in the "
                "order of its dimensions; leave one of them out"
            )
        if self.strategy == "fsdp" and self.grad_compression:
            raise ValueError(
                "grad_compression is ddp's, and strategy is fsdp, which sums gradients in fp32; leave one of them out"
            )
        return self


class Eval(Section):
    every_epochs: Count | None = Field(None, description="epochs between evaluations of val; default 1")
    every_steps: Count | None = Field(None, description="steps between evaluations of val, instead of epochs")
    batch_size: Count | Auto = Field("auto", description="samples a rank evaluates at once; auto: as in training")
    precision: Literal["auto", "fp32", "bf16", "fp16"] | None = Field(
        None, description="precision of evaluations; if left out, as in training"
    )

    @model_validator(mode="after")
    def _one_period(self) -> "Eval":
        if self.every_epochs and self.every_steps:
            raise ValueError("give every_epochs or every_steps, not both; on the command line eval={every_steps: 100}")
        return self


class Best(Section):
    metric: str = Field(pattern=r"^val/.+", description="the metric that ranks checkpoints, such as val/accuracy")
    mode: Literal["min", "max"] = Field(description="whether less or more of it is better")


class Checkpoint(Section):
    every_steps: Count | None = Field(None, description="steps between checkpoints")
    every_min: float | None = Field(10, gt=0, description="minutes between checkpoints")
    keep: Count = Field(3, description="how many of the newest checkpoints stay")
    keep_every: Count | None = Field(None, description="steps; checkpoints at its multiples stay for ever")
    best: Best | None = Field(None, description="also keep the best checkpoint by this metric")
    on_error: Literal["continue", "stop"] = Field("continue", description="what a run does when a save has failed")


class Log(Section):
    every_steps: Count = Field(20, description="steps between two lines of metrics")
    samples: bool = Field(
        False,
        description="also record which samples each step took, in logs/samples-*.jsonl, one file a rank and attempt",
    )


class Limits(Section):
    """How long a rank of several may go without a sign of life before it counts as hung, by what it is doing."""

    start_s: float = Field(1200, gt=0, description="seconds until the first step: data, compiling, the checkpoint")
    step_s: float = Field(600, gt=0, description="seconds a step, with its batch")
    evaluation_s: float = Field(600, gt=0, description="seconds a batch of an evaluation")
    save_s: float = Field(1200, gt=0, description="seconds that the loop waits for a save")

    @property
    def longest_s(self) -> float:
        """After which one of them has named the rank that holds up the others, if there is a supervisor."""
        return max(self.start_s, self.step_s, self.evaluation_s, self.save_s)


class Launch(Section):
    processes: Count | Auto = Field("auto", description="ranks on this machine; auto: one a GPU, else 1")
    max_restarts: int = Field(
        3, ge=0, description="starts after failures of several ranks; counted anew after each new checkpoint"
    )
    limits: Limits = Field(Limits(), description="when a rank counts as hung")


class Job(Section):
    """One job file, whole. `${…}` is already replaced; `written` remembers what must be stored as it was written."""

    run: Run = Field(description="what the run is called, where it lives, its seed")
    task: ComponentField = Field(description="classification, regression, language_modeling or your own")
    data: Data = Field(description="what is learnt from, and how much of it a step takes")
    model: ComponentField = Field(description="cnn, gpt, mlp, resnet, vit or your own nn.Module")
    optimizer: OptimizerField = Field(description="adam, adamw, sgd or your own")
    schedule: ComponentField = Field(Component(name="constant"), description="factor of the learning rate at a step")
    train: Train = Field(description="how long to train, and how")
    eval: Eval = Field(Eval(), description="when val is looked at")
    checkpoint: Checkpoint = Field(Checkpoint(), description="when to save, and what to keep")
    log: Log = Field(Log(), description="when metrics are written")
    launch: Launch = Field(Launch(), description="how many processes train")

    _written: dict[tuple[str | int, ...], str] = PrivateAttr(default_factory=dict)

    def check_ranks(self, count: int) -> None:
        """Raises JobError if a global batch cannot be shared among `count` ranks."""
        size = self.data.global_batch_size
        if size < count:
            raise JobError(
                f"data.global_batch_size {size} is less than the {count} ranks; "
                f"use at least {count}, or launch.processes={size}"
            )
        if self.train.in_step and self.train.micro_batch_size == 1 and size % count:
            raise JobError(
                f"train.micro_batch_size 1 cuts data.global_batch_size {size} into more steps on some of {count} ranks "
                "than on others, and with train.strategy fsdp or train.sync_batch_norm all must step together; use at "
                "least 2, or strategy ddp without it"
            )

    def moved_to(self, url: str) -> str:
        """The override that puts the run at a URL that begins with run.dir; what comes from `${env:…}` stays so."""
        written = self._written.get(("run", "dir"), self.run.dir)
        if written.endswith("}") and self.run.dir.endswith("/"):
            raise JobError(
                f"run.dir {written!r} stands for what ends in /, and a name is to follow; leave the / out of it"
            )
        return f"run.dir={quoted(written.rstrip('/') + url.removeprefix(self.run.dir.rstrip('/')))}"

    def as_written(self) -> dict[str, Any]:
        """The job in full with every default, `${env:…}` as the file has it, so that no secret is stored."""
        tree = self.model_dump(mode="json")
        for path, text in self._written.items():
            node: Any = tree
            for key in path[:-1]:
                node = node[key]
            node[path[-1]] = text
        return tree

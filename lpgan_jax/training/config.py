"""The configuration of a training run: what the fields are, and how they are read and written.

In files they are YAML, without aliases; between processes they are JSON.

Everything here is public: the architecture, the hyper-parameters, the shapes.
"""

import json
import os
import re
import reprlib
from collections.abc import Hashable, Sequence
from importlib import resources
from importlib.resources.abc import Traversable
from pathlib import Path
from typing import Any, Literal, TypeVar, get_args

import yaml
from pydantic import (
    BaseModel,
    ConfigDict,
    Field,
    ValidationError,
    ValidationInfo,
    field_validator,
    model_validator,
)
from pydantic_core import ErrorDetails, PydanticCustomError


class ConfigError(ValueError):
    """A configuration that cannot be used; the message names the file and the field."""


# --- The fields -----------------------------------------------------------------------------------


class Fields(BaseModel):
    """Immutable and strict: no unknown fields; "3" and True are no integers; 1 stands for 1.0."""

    model_config = ConfigDict(frozen=True, extra="forbid", strict=True, allow_inf_nan=False)


class DataConfig(Fields):
    """Which images to train on."""

    dataset: Literal["digits", "idx", "npz", "cifar10", "folder", "private"]
    """`digits`: scikit-learn's 8x8 digits; `idx`: files as those of MNIST and Fashion-MNIST; `npz`:
    as MedMNIST's; `cifar10`: CIFAR-10's Python batches; `folder`: PNG and JPEG files, as CelebA's;
    `private`: somebody else's, of which the shape alone is known.
    """
    path: str | None = Field(default=None, validate_default=True)
    """The file (or, for `idx`, `cifar10` and `folder`, the directory of files), relative to the
    working directory."""
    split: str = Field(default="train", min_length=1)
    image_size: int = Field(ge=2)
    """Height and width to train at: smaller images get a black border, `digits` are enlarged, and
    those of a `folder` are cropped to their central square and resized."""
    channels: int
    limit: int | None = Field(default=None, ge=1)
    """Use only the first so many images."""
    labels: bool = False
    """Whether images are shared with their classes, which both networks take: a class can be asked
    for then."""
    classes: int = Field(default=10, ge=2)
    """How many classes there are, counted from 0."""

    @field_validator("path")
    @classmethod
    def _path_fits_dataset(cls, path: str | None, info: ValidationInfo) -> str | None:
        dataset = info.data.get("dataset")
        if dataset == "digits" and path is not None:
            raise expected("no path, because the digits come with scikit-learn")
        if dataset == "private" and path is not None:
            raise expected("no path, because they are somebody else's")
        if dataset not in (None, "digits", "private") and not path:
            raise expected(f"the path of the {dataset} data")
        return path

    @field_validator("channels")
    @classmethod
    def _grey_or_colour(cls, channels: int) -> int:
        if channels not in (1, 3):
            raise expected("1 (grey) or 3 (colour)")
        return channels


class ModelConfig(Fields):
    """The DCGAN: two networks that mirror each other, each layer doubling or halving the size."""

    noise_size: int = Field(ge=1)
    features: int = Field(ge=1)
    """Feature maps of the layer nearest the image; they double with every layer away from it."""
    kernel_size: int = Field(default=4, ge=2)
    """At least 2, because a narrower kernel would skip pixels at stride 2."""
    base_size: int = Field(default=4, ge=1)
    """The smallest height and width, at the fully connected layers."""
    leaky_slope: float = Field(default=0.2, ge=0, lt=1)
    background: float = Field(default=0.0, ge=-1, le=1)
    """The value of images that counts as 0 in the discriminator: what most pixels are (-1 where
    they are black), so that they add nothing to the gradients that privacy clips and noises."""
    init_std: float | None = Field(default=0.02, gt=0)
    """Standard deviation of initial kernels; null: by their number of inputs (LeCun)."""
    norm_eps: float = Field(default=1e-5, gt=0)
    norm_momentum: float = Field(default=0.9, ge=0, lt=1)
    """The share of the old running statistics that a step keeps."""
    norm: Literal["batch", "group", "none"] = "batch"
    """How the discriminator's layers are normalised."""
    loss: Literal["logistic", "hinge", "least_squares", "wasserstein"] = "logistic"
    """What the networks minimise; `wasserstein` with a gradient penalty, of each example alone, so
    that the discriminator's normalisation must not be one over the batch."""
    penalty: float = Field(default=10.0, gt=0)
    """Weight of the gradient penalty; other losses ignore it."""

    module: str | None = Field(default=None, pattern=r"^[A-Za-z_][\w.]*:[A-Za-z_]\w*$")
    """Networks of your own, as `my_nets:Networks`: what has Flax modules as its `generator` and
    `discriminator`. The fields of the DCGAN are ignored then."""

    @model_validator(mode="after")
    def _loss_fits_norm(self) -> "ModelConfig":
        own = self.module is not None
        if self.loss == "wasserstein" and self.norm == "batch" and not own:
            raise expected("norm: group or none, because the gradient penalty is of one example")
        return self


class OptimizerConfig(Fields):
    """How one network's parameters follow its gradients."""

    name: Literal["sgd", "adam"]
    learning_rate: float = Field(gt=0)
    final_rate: float = Field(default=1.0, gt=0, le=1)
    """The share of it that is left at the end of training: it falls with each update, linearly."""
    momentum: float = Field(default=0.0, ge=0, lt=1)
    """SGD's; Adam ignores it, and SGD ignores what follows."""
    b1: float = Field(default=0.5, ge=0, lt=1)
    b2: float = Field(default=0.999, ge=0, lt=1)
    eps_root: float = Field(default=1e-8, gt=0)
    """Added to Adam's second moment under the root."""


class PrivacyConfig(Fields):
    """Differential privacy: how much the networks may tell of any one image."""

    epsilon: float | None = Field(default=None, gt=0)
    """What all steps may spend; the noise follows from it."""
    noise_multiplier: float | None = Field(default=None, gt=0)
    """Or the noise: its standard deviation in clips, of one server's."""
    delta: float = Field(gt=0, lt=1)
    """The probability with which epsilon may not hold; less than one in all images."""
    clip: float = Field(ge=2**-6, le=2**6)
    """The norm of the gradient of one image, at most."""
    noise: Literal["dealer", "servers"] = "servers"
    """Whether DS deals the noise, or each server adds its own."""
    discriminator_steps: int = Field(default=1, ge=1)
    """Updates of the discriminator in a step: it learns slowly with noise."""
    sampling_rate: float | None = Field(default=None, gt=0, le=1)
    """The probability of each image to be in a batch; by default so that hardly ever more are drawn
    than a batch has room for."""
    examples: int | None = Field(default=None, ge=1)
    """How many images there are; by default they are counted."""
    generated: int | None = Field(default=None, ge=2, multiple_of=2)
    """Generated images that each update is with; by default about as many as a batch has others.
    Fewer cost less, and no privacy."""
    diversity: float = Field(default=0.0, ge=0)
    """Weight of a loss of the generator that keeps images of a class apart; it costs no privacy."""
    distance: float = Field(default=0.2, gt=0)
    """The mean squared difference that two of them should have."""
    mismatched: float = Field(default=0.0, ge=0)
    """Weight of the discriminator's loss of images with a class that is not theirs, in the same
    gradients: it learns what classes are. Needs `data.labels`."""

    @model_validator(mode="after")
    def _one_of_both(self) -> "PrivacyConfig":
        if (self.epsilon is None) == (self.noise_multiplier is None):
            raise expected("epsilon or noise_multiplier, and one of them alone")
        return self


class TrainConfig(Fields):
    """A whole training run."""

    data: DataConfig
    model: ModelConfig
    generator_optimizer: OptimizerConfig
    discriminator_optimizer: OptimizerConfig
    updates: Literal["alternating", "simultaneous"] = "alternating"
    """`alternating`, as the patent has it: the generator is trained through the discriminator that
    was updated before, on images of its own. `simultaneous`: through the one before its update, on
    the same generated images, which takes fewer rounds and less of everything."""
    generator_average: float = Field(default=0.0, ge=0, lt=1)
    """The share that a step keeps of a running average of the generator's parameters, which images
    are generated with; 0: with the parameters themselves."""
    frac_bits: int = Field(default=18, ge=1, le=28)
    """Fraction bits of the fixed-point numbers."""
    batch_size: int = Field(ge=1)
    steps: int = Field(ge=1)
    seed: int = Field(default=0, ge=0)
    """Decides the order of the images. What protects the shares never comes from it."""
    log_every: int = Field(ge=1)
    sample_every: int = Field(ge=1)
    num_samples: int = Field(ge=1)
    """Images in a sample grid."""
    checkpoint_every: int = Field(ge=1)
    keep_checkpoints: int = Field(default=3, ge=1)
    guard_every: int = Field(default=25, ge=0)
    """Steps from one look at whether values are in range to the next; 0: none."""
    # A tuple, so that a configuration can be hashed; files hold lists, which strictness refuses.
    results: tuple[Literal["generator", "discriminator"], ...] = Field(
        default=("generator",), strict=False
    )
    """The networks whose parameters the service provider gets from real servers."""
    open_losses: bool = True
    """Whether the service provider reconstructs the losses while training."""
    open_samples: bool = True
    """Whether the service provider reconstructs generated images while training."""
    privacy: PrivacyConfig | None = None
    """None: no differential privacy. With it losses are not opened: they are of images."""

    @model_validator(mode="before")
    @classmethod
    def _losses_stay_closed(cls, fields: Any) -> Any:
        if isinstance(fields, dict) and fields.get("privacy") is not None:
            return {"open_losses": False, **fields}
        return fields

    @model_validator(mode="after")
    def _privacy_fits(self) -> "TrainConfig":
        if self.privacy is None:
            return self
        model, own = self.model, self.model.module is not None
        refused = {
            "open_losses: true": self.open_losses and "no noise hides the losses of images",
            "model.norm: batch": not own
            and model.norm == "batch"
            and "it mixes the images of a batch (group and none do not)",
            "model.loss: wasserstein": model.loss == "wasserstein"
            and "its penalty mixes images with generated ones",
            "updates: simultaneous": self.updates == "simultaneous"
            and "the discriminator is updated several times in a step",
            "privacy.mismatched": self.privacy.mismatched
            and not self.data.labels
            and "there are no classes without data.labels",
        }
        for field, reason in refused.items():
            if reason:
                raise PydanticCustomError(
                    "sizes",
                    "{field} given, expected otherwise with privacy: {reason}",
                    {"field": field, "reason": reason},
                )
        return self

    @field_validator("results")
    @classmethod
    def _results_differ(cls, results: tuple[str, ...]) -> tuple[str, ...]:
        if not results:
            raise expected("a list that is not empty")
        if len(set(results)) < len(results):
            raise expected("each network once")
        return results

    @property
    def discriminator_updates(self) -> int:
        """Of all steps."""
        return self.steps * (1 if self.privacy is None else self.privacy.discriminator_steps)

    @property
    def depth(self) -> int:
        """How many layers double or halve the size: `image_size = base_size * 2**depth`."""
        return (self.data.image_size // self.model.base_size).bit_length() - 1

    @model_validator(mode="after")
    def _sizes_fit(self) -> "TrainConfig":
        size, base = self.data.image_size, self.model.base_size
        if self.depth < 1 or size != base * 2**self.depth:
            # Pydantic gives no field to an error that two fields share.
            raise PydanticCustomError(
                "sizes",
                "data.image_size: {size} given, expected {base} * 2**k with k >= 1, because "
                "each layer of the generator doubles model.base_size ({base})",
                {"size": size, "base": base},
            )
        return self

    def public(self) -> "TrainConfig":
        """What servers and SP may know: not where the images are, nor the seed.

        The seed decides initial parameters and noise.
        """
        data = self.data
        images = DataConfig(
            dataset="private",
            image_size=data.image_size,
            channels=data.channels,
            labels=data.labels,
            classes=data.classes,
        )
        return self.model_copy(update={"data": images, "seed": 0})


class ProgramConfig(Fields):
    """A training that a Python file describes: its `training`."""

    program: str = Field(pattern=r"\.py$")
    """The file. Between roles, its name alone: each has its own copy, and code is never sent."""
    options: dict[str, bool | int | float | str] = {}
    """What `training` is called with."""
    steps: int | None = Field(default=None, ge=1)
    """Instead of as many as the file says."""
    guard_every: int | None = Field(default=None, ge=0)
    """As of `TrainConfig`, instead of what the file says."""
    seed: int = Field(default=0, ge=0)
    """As of `TrainConfig`."""
    data: str | None = None
    """Where its data is, for owners."""

    def public(self) -> "ProgramConfig":
        """What servers and SP may know."""
        name = Path(self.program).name
        return self.model_copy(update={"program": name, "data": None, "seed": 0})


Settings = TrainConfig | ProgramConfig


class RunsConfig(Fields):
    """Runs of a sweep: one for each combination of the lists."""

    mode: Literal["secure", "shadow", "plaintext"]
    """`secure`: on shares; `shadow`: on integers, rounded alike; `plaintext`: the float32 twin."""
    frac_bits: list[int] = []
    """None of them: as the base says."""
    rounding: list[Literal["stochastic", "nearest", "local"]] = ["stochastic"]
    """How shadow runs truncate: as the protocols do, or as they do not."""
    perturbation: float = Field(default=0.0, ge=0)
    """Plaintext runs: after each step all parameters move at random, by up to so many LSB."""
    epsilon: list[float] = []
    """Of differential privacy, instead of the base's; none: as the base says."""

    @model_validator(mode="after")
    def _fields_fit_mode(self) -> "RunsConfig":
        if self.mode != "shadow" and self.rounding != ["stochastic"]:
            raise expected("a rounding for shadow runs only: the protocols round stochastically")
        if self.mode != "plaintext" and self.perturbation:
            raise expected("a perturbation for plaintext runs only")
        return self


class SweepConfig(Fields):
    """A study: training runs of several kinds from the same seeds, measured alike."""

    base: str = Field(min_length=1)
    """The configuration of every run: a shipped one's name, or a YAML file."""
    set: list[str] = []
    """What to change in it, as `steps=400`."""
    runs: list[RunsConfig] = Field(min_length=1)
    seeds: list[int] = Field(min_length=1)
    """Each seed decides initial parameters, batches, noise and rounding of one run of each kind."""
    measure_every: int = Field(ge=1)
    """Steps between measurements of quality."""
    num_images: int = Field(ge=10)
    """How many images are generated for each, and how many real ones they are compared with."""

    @field_validator("seeds")
    @classmethod
    def _seeds_differ(cls, seeds: list[int]) -> list[int]:
        if len(set(seeds)) < len(seeds) or min(seeds) < 0:
            raise expected("different numbers of at least 0")
        return seeds


LONGEST_JSON = 2**15
"""Characters of a configuration as JSON, at most."""
LONGEST_YAML = 2**16  # bytes; much more could take ages to read

_Model = TypeVar("_Model", bound=BaseModel)


def expected(wanted: str) -> PydanticCustomError:
    """The error of a validator: what a field should have been."""
    return PydanticCustomError("expected", "expected {wanted}", {"wanted": wanted})


# --- Reading and writing --------------------------------------------------------------------------


def load(name_or_path: str, overrides: Sequence[str] = ()) -> TrainConfig:
    """Read the configuration of a GAN's training run.

    Args:
        name_or_path: the name of a shipped configuration (`digits`) or the path of a YAML file.
        overrides: strings such as `model.features=32`, the value in YAML; later ones win.

    Returns:
        The validated configuration.

    Raises:
        FileNotFoundError: there is no such file and no such shipped configuration.
        ConfigError: the file is not YAML, or a field is unknown, missing, of the wrong type or
            out of range.
    """
    return _load(TrainConfig, name_or_path, overrides, _shipped_files())


def program_config(path: str, options: Sequence[str] = (), **fields: Any) -> ProgramConfig:
    """The configuration of a program's run.

    Args:
        path: the Python file.
        options: strings such as `width=32`, the value in YAML; later ones win.
        fields: other fields of `ProgramConfig`.

    Raises:
        FileNotFoundError: there is no such file.
        ConfigError: as `load`.
    """
    if not Path(path).is_file():
        raise FileNotFoundError(f"{path}: no such file, expected a program in Python")
    given: dict[str, Any] = {}
    for option in options:
        _apply(option, given, path)
    program = str(Path(path).resolve())  # a run is looked at from elsewhere too
    return validated(ProgramConfig, {"program": program, "options": given, **fields}, path)


def load_run(path: str | os.PathLike[str]) -> Settings:
    """Read the configuration that a run keeps, of a GAN or of a program.

    Raises:
        FileNotFoundError, ConfigError: as `load`.
    """
    path = Path(path)
    fields = _fields(path)
    return validated(_model_of(fields), fields, path.name)


def _model_of(fields: dict[str, Any]) -> type[TrainConfig] | type[ProgramConfig]:
    return ProgramConfig if "program" in fields else TrainConfig


def load_sweep(name_or_path: str) -> SweepConfig:
    """Read a sweep; as `load`, without overrides: the names are those of `configs/sweeps`."""
    return _load(SweepConfig, name_or_path, (), _shipped_files("sweeps"))


def _load(
    model: type[_Model], name_or_path: str, overrides: Sequence[str], known: dict[str, Traversable]
) -> _Model:
    file = _find(name_or_path, known)
    fields = _fields(file)
    for override in overrides:
        _apply(override, fields, file.name)
    return validated(model, fields, file.name)


def _fields(file: Traversable) -> dict[str, Any]:
    with file.open("rb") as stream:
        return load_yaml(stream.read(LONGEST_YAML + 1), file.name)


def from_json(text: str, source: str) -> Settings:
    """The configuration of a training run that `to_json` wrote, or whoever sent it.

    Raises:
        ConfigError: it is longer than `LONGEST_JSON`, no JSON, has a field twice, or a field is
            wrong; the message names the `source`.
    """
    if len(text) > LONGEST_JSON:
        raise ConfigError(f"{source}: {len(text)} characters, expected at most {LONGEST_JSON}")
    try:
        fields = json.loads(text, object_pairs_hook=_unique, parse_constant=_no_number)
        if not isinstance(fields, dict):
            raise ValueError("no fields")
    except (ValueError, RecursionError) as error:
        raise ConfigError(f"{source}: expected a configuration in JSON: {error}") from None
    return validated(_model_of(fields), fields, source)


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    fields = dict(pairs)
    for name in fields:
        if not name.isidentifier():
            raise ValueError(f"{reprlib.repr(name)} is not the name of a field")
    if len(fields) < len(pairs):
        raise ValueError("a field is given twice")
    return fields


def _no_number(name: str) -> None:
    raise ValueError(f"{name} is no number")


def to_json(config: Settings) -> str:
    """Return `config` as JSON that `from_json` reads as an equal configuration."""
    return json.dumps(config.model_dump(), allow_nan=False)


def validated(model: type[_Model], fields: object, source: str) -> _Model:
    """The model of these fields.

    Raises:
        ConfigError: a field is wrong; the message names it and the `source`.
    """
    try:
        return model.model_validate(fields)
    except ValidationError as error:
        lines = [f"{source}: {_explain(model, detail)}" for detail in error.errors()]
        raise ConfigError("\n".join(lines)) from None


def dump(config: Fields) -> str:
    """Return `config` as YAML that reads back as an equal configuration."""
    return yaml.dump(config.model_dump(), Dumper=_Dumper, sort_keys=False)


def shipped() -> list[str]:
    """Return the names of the configurations that come with the package, sorted."""
    return sorted(_shipped_files())


def _shipped_files(folder: str = "") -> dict[str, Traversable]:
    directory = resources.files("lpgan_jax") / "configs"  # a link to the repository's own
    directory = directory / folder if folder else directory
    files = directory.iterdir() if directory.is_dir() else ()
    return {Path(file.name).stem: file for file in files if file.name.endswith(".yaml")}


def _find(name_or_path: str, known: dict[str, Traversable]) -> Traversable:
    path = Path(name_or_path)
    if name_or_path in known:
        return known[name_or_path]
    if path.is_file():
        return path
    raise FileNotFoundError(
        f"{name_or_path}: no such configuration, expected a YAML file or one of "
        f"{', '.join(sorted(known))}"
    )


def load_yaml(text: bytes, source: str) -> dict[str, Any]:
    """The fields of a YAML file.

    Raises:
        ConfigError: it is no YAML, or no mapping; the message names the `source`.
    """
    fields = _parse_yaml(text, source)
    if not isinstance(fields, dict):
        raise ConfigError(f"{source}: expected a mapping of fields to values, such as `steps: 400`")
    return fields


def _parse_yaml(text: bytes | str, source: str) -> Any:
    if len(text) > LONGEST_YAML:
        raise ConfigError(f"{source}: more than {LONGEST_YAML} bytes, expected a configuration")
    try:
        return yaml.load(text, _Loader)
    except (yaml.YAMLError, ValueError, RecursionError) as error:  # ValueError: 2024-13-45
        reason = " ".join(str(error).split())
        raise ConfigError(f"{source}: expected valid YAML: {reason}") from None


def _apply(override: str, fields: dict[str, Any], source: str) -> None:
    """Set the field that `override` names, in place."""
    dotted, equals, text = override.partition("=")
    *parents, name = dotted.strip().split(".")
    if not equals or not all([*parents, name]):
        raise ConfigError(f"override {override!r}: expected field=value, as in model.features=32")
    value = _parse_yaml(text, f"override {override!r}")
    for parent in parents:
        fields = fields.setdefault(parent, {})
        if not isinstance(fields, dict):
            raise ConfigError(f"{source}: {dotted}: no such field, {parent} has no fields")
    fields[name] = value


def _explain(model: type[BaseModel], error: ErrorDetails) -> str:
    """Return pydantic's error as `field: what was given, what was expected`."""
    location, kind, context = error["loc"], error["type"], error.get("ctx", {})
    field = ".".join(str(part) for part in location)
    if kind == "sizes":
        return error["msg"]
    if kind == "extra_forbidden":
        return f"{field}: unknown field, expected one of {', '.join(_siblings(model, location))}"
    if kind == "missing":
        return f"{field}: missing, expected a value"
    wanted = {
        "expected": context.get("wanted"),
        "literal_error": context.get("expected"),
        "greater_than": f"more than {context.get('gt')}",
        "greater_than_equal": f"at least {context.get('ge')}",
        "less_than": f"less than {context.get('lt')}",
        "less_than_equal": f"at most {context.get('le')}",
        "int_type": "an integer",
        "float_type": "a number",
        "finite_number": "a finite number",
        "bool_type": "true or false",
        "string_type": "a text",
        "string_pattern_mismatch": "a text such as my_nets:Networks",
        "string_too_short": "a text that is not empty",
        "list_type": "a list",
        "tuple_type": "a list",
        "too_short": "a list that is not empty",
        "model_type": "fields with values",
        "invalid_key": "the name of a field",
    }.get(kind, f"otherwise ({error['msg']})")
    return f"{field}: {reprlib.repr(error['input'])} given, expected {wanted}"


def _siblings(model: type[BaseModel], location: Sequence[int | str]) -> list[str]:
    """Return the fields of the model that has the last part of `location` in it."""
    for part in location[:-1]:
        if isinstance(part, str):  # and not a place in a list
            inner = model.model_fields[part].annotation
            (model,) = get_args(inner) or (inner,)
    return list(model.model_fields)


# --- YAML as its users expect it ------------------------------------------------------------------


_MERGE = "tag:yaml.org,2002:merge"


class _Loader(yaml.SafeLoader):
    """PyYAML's safe loader, with `2e-4` a number, and without what a configuration needs not.

    A field given twice is an error, and so are aliases and merge keys, by which half a kilobyte
    takes minutes to read.
    """

    def compose_node(self, parent: yaml.Node | None, index: Any) -> yaml.Node | None:
        event = self.peek_event()
        if getattr(event, "anchor", None) is not None:  # also an alias has one
            problem = f"expected no anchor or alias, found {event.anchor}"
            raise yaml.composer.ComposerError(None, None, problem, event.start_mark)
        return super().compose_node(parent, index)

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Hashable, Any]:
        names = set()
        for key, _ in node.value:
            problem = "expected no merge key" if key.tag == _MERGE else None
            if isinstance(key, yaml.ScalarNode):  # others are refused as keys
                if key.value in names:
                    problem = f"{key.value} is given twice"
                names.add(key.value)
            if problem is not None:
                raise yaml.constructor.ConstructorError(None, None, problem, key.start_mark)
        return super().construct_mapping(node, deep)


class _Dumper(yaml.SafeDumper):
    """The counterpart of `_Loader`: it quotes the texts that `_Loader` would read as numbers."""

    def ignore_aliases(self, data: Any) -> bool:
        return True


# PyYAML, after YAML 1.1, wants a dot and a signed exponent in a number: it reads `2e-4` as a text.
_FLOAT = re.compile(r"[-+]?(\d+\.?\d*|\.\d+)[eE][-+]?\d+\Z")
for _yaml in (_Loader, _Dumper):
    _yaml.add_implicit_resolver("tag:yaml.org,2002:float", _FLOAT, list("-+.0123456789"))

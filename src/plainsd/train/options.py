"""What can be chosen about a training run, by the part that it belongs to. `Train` in cli.py puts the parts together.

Numbers that suit one method and not another are None here, and come from METHOD_DEFAULTS.
"""

from dataclasses import dataclass, field, fields, replace
from pathlib import Path
from typing import Annotated, Any, Literal, TypeVar

from tyro.conf import OmitArgPrefixes
from tyro.constructors import PrimitiveConstructorSpec

from plainsd.errors import UserError
from plainsd.pictures.settings import Settings, read_seed

FROM_NOTHING = {"steps": 10_000, "batch": 64, "accumulate": 1, "lr": 1e-3, "warmup": 200, "decline": "cosine"}
RECIPE = {"batch": 1, "accumulate": 4, "warmup": 0, "decline": "constant"}
METHOD_DEFAULTS: dict[str, dict[str, Any]] = {
    "vae": FROM_NOTHING,
    "scratch": FROM_NOTHING,
    "full": RECIPE | {"epochs": 400, "lr": 1e-5},
    "lora": RECIPE | {"epochs": 100, "lr": 1e-4},
    "controlnet": RECIPE | {"epochs": 10, "lr": 1e-5},
    "inversion": RECIPE | {"epochs": 100, "lr": 5e-3, "weight_decay": 0.0},
}


def read_seeds(texts: list[str]) -> int:
    return read_seed(texts[0])


def seed_text(seed: int) -> list[str]:
    return [str(seed)]


@dataclass
class Data:
    """How pictures are read, cut and captioned."""

    heldout: Path | None = None
    """folder of captioned pictures that are only used to measure; it may lie inside --data"""
    hold_out: float = 0.0
    """share of the data that is held out instead; the same pictures for as long as the run goes on"""
    size: int | None = None
    """pixels, width and height of the training pictures; the model's own if not given"""
    buckets: bool = False
    """each picture keeps about its own shape, at about size x size pixels"""
    crop: Literal["centre", "random"] = "centre"
    """which part is cut out of a picture of another shape"""
    places: int = 4
    """with --crop random: how many places each picture is cut at; they are drawn once"""
    flip: bool = False
    """each picture also mirrored"""
    caption: str | None = None
    """for pictures that have none, such as "a photo of <cat>" """
    shuffle_tags: int | None = None
    """captions are lists with commas: all but the first N entries are shuffled each time"""
    chunks: int = 1
    """how much of a long caption is read, in chunks of as many tokens as the text encoder sees at once (CLIP: 75)"""
    picture_column: str | None = None
    """of parquet files and datasets; found by itself where it has a usual name"""
    text_column: str | None = None
    """likewise"""
    split: str = "train"
    """of a dataset on the hub"""
    stream: bool = False
    """fetch only the first --limit pictures of a dataset, one after the other"""
    limit: int | None = None
    """only the first N pictures of each source"""
    bad_share: float = 0.01
    """largest share of broken pictures and empty captions that is left out silently but for a line; more is an error"""
    workers: int = 2
    """threads that read pictures ahead while they are encoded"""


@dataclass
class Steps:
    """How long, how fast, with what precision."""

    steps: int | None = None
    """optimizer steps; from nothing 10,000"""
    epochs: int | None = None
    """instead of steps: how often each picture is seen; full 400, lora and inversion 100"""
    batch: int | None = None
    """pictures a micro-batch; from nothing 64, else 1"""
    accumulate: int | None = None
    """micro-batches a step, over all processes; from nothing 1, else 4"""
    lr: float | None = None
    """learning rate; from nothing 1e-3, full 1e-5, lora 1e-4, inversion 5e-3"""
    warmup: int | None = None
    """steps in which the learning rate rises to its value; from nothing 200, else 0"""
    decline: Literal["cosine", "constant"] | None = None
    """after that: down to 1 percent along a cosine (from nothing), or constant (else)"""
    weight_decay: float | None = None
    """0.01; for inversion 0"""
    beta2: float = 0.999
    """memory of AdamW's second moment; 0.99 suits short runs"""
    clip: float = 1.0
    """largest norm of the whole gradient"""
    ema: float = 0.999
    """decay of the averaged weights, which are those that are saved; 0: no average"""
    seed: Annotated[
        int, PrimitiveConstructorSpec(1, "N", read_seeds, lambda seed: isinstance(seed, int), seed_text)
    ] = 0
    """random or -1 draws one, with which the run then goes on"""
    device: str = "auto"
    dtype: str = "auto"
    """arithmetic: bfloat16 (autocast, weights stay float32) or float32; auto asks the processor"""
    checkpointing: bool = False
    """less memory, a third more time: what the backward pass needs is computed again"""
    adam8bit: bool = False
    """AdamW's moments in 8 bits; needs torchao, and on a CPU a C++ compiler"""
    shard: bool = False
    """with torchrun: weights, gradients and moments spread over the processes (FSDP2)"""


@dataclass
class Telling:
    """What is saved and shown on the way."""

    prompts: Path | None = None
    """file with one prompt a line, for the sample pictures; lines that begin with # are comments"""
    save_every: int = 500
    keep: int = 2
    """states kept"""
    save_results_every: int | None = None
    """steps after which what has been learned so far is written into OUT/results, as the result is at the end"""
    save_epochs: int | None = None
    """likewise after so many epochs"""
    log_every: int = 20
    validate_every: int = 500
    sample_every: int = 1000
    tensorboard: bool = False
    """the log for TensorBoard too"""
    save_dtype: Literal["float16", "bfloat16", "float32"] = "float16"
    """what the finished weights are saved in"""


@dataclass
class LossOptions:
    """What counts as an error."""

    dropout: float = 0.1
    """share of captions left empty"""
    timestep_power: float = 1.0
    """below 1, noisy timesteps come more often; there the caption decides, elsewhere it hardly matters"""
    min_snr: float | None = None
    """timesteps with little noise count no more than those at this signal-to-noise ratio; 5 is usual"""
    offset_noise: float = 0.0
    """noise that shifts whole channels, for very dark and very light pictures; 0.05 to 0.1"""
    perturbation: float = 0.0
    """surplus noise in the input; 0.1"""
    huber: float | None = None
    """errors beyond this size count linearly"""


@dataclass
class Prior:
    """DreamBooth: pictures of the kind in general, beside those of the one thing."""

    prior: Path | None = None
    """folder with them; where it is missing or not given, --prior-count pictures of --prior-prompt are made first"""
    prior_prompt: str | None = None
    """such as "a photo of a dog", where the captions say "a photo of sks dog" """
    prior_weight: float = 1.0
    prior_count: int = 200


@dataclass
class LoraOptions:
    """Methods full and lora."""

    text_encoder: bool = False
    """train the text encoders too"""
    kind: Literal["lora", "loha", "lokr"] = "lora"
    """a product of narrow matrices; LoHa: two of these, multiplied number by number; LoKr: a Kronecker product"""
    rank: int = 16
    alpha: float | None = None
    """the LoRA's change is scaled by alpha / rank; the rank if not given"""
    factor: int | None = None
    """lokr: largest side of the smaller matrix; as near to a square as can be if not given"""
    targets: str = "attention"
    """attention, transformers, all-linear, all, or a pattern such as '*.cross_attn.*'"""
    conv: bool = False
    """convolutions too"""
    dora: bool = False
    """weight-decomposed (DoRA)"""
    half_base: bool = False
    """the frozen weights in bfloat16: half the memory"""


@dataclass
class Inversion:
    """Method inversion."""

    token: str | None = None
    """the new word, such as '<cat>', which the captions use"""
    vectors: int = 1
    """how many vectors it stands for"""
    initial: str | None = None
    """a known word to begin from, such as 'cat'"""


@dataclass
class Controlling:
    """Method controlnet."""

    control: str | None = None
    """a control net to go on from, a folder or a file; a new one, made of the model's own weights, if not given"""


@dataclass
class FromNothing:
    """Methods vae and scratch, and --vae for all that need one."""

    model: Path | None = None
    """JSON file that describes the networks: the fields of plainsd.models.variants.Variant"""
    vae: Path | None = None
    """scratch: folder of the trained autoencoder. full, lora, inversion: a folder or a file with another autoencoder
    than that of --base"""
    tokenizer: Path | None = None
    """scratch: folder with vocab.json and merges.txt"""
    carry: tuple[Path, ...] = ()
    """scratch: files to put beside the finished model's weights"""
    kl_weight: float = 1e-4
    """vae: pull of the latents towards the unit normal"""
    edge_weight: float = 1.0
    """vae: weight of the error in pixel differences"""
    patch_weight: float = 0.0
    """vae: weight of the patch discriminator"""
    patch_after: int = 0
    """vae: pictures seen before the discriminator counts"""
    decoder_only: bool = False
    """vae: the encoder of --base stays as it is, so that UNets go on to suit the autoencoder"""


@dataclass
class TrainOptions:
    """All of them: one run."""

    method: Literal["vae", "scratch", "full", "lora", "inversion", "controlnet"]
    """vae: an autoencoder from nothing. scratch: text encoder and UNet from nothing, on a trained autoencoder. full:
    all weights of a model's UNet. lora: low-rank changes to a model. inversion: a new word for prompts.
    controlnet: a net that reads a map beside each picture (name.cond.png)"""
    data: tuple[str, ...]
    """folders of captioned pictures (metadata.jsonl, or pairs name.png and name.txt), parquet files, tar shards, or
    datasets on the hub (owner/name); cats:10 is shown ten times an epoch"""
    out: Path
    """folder of the run: log, curve, samples, states, and at the end the result, which has the folder's name"""
    config: Path | None = None
    """TOML file with any of these options, such as the run.toml of a run's folder; flags go before it"""
    base: str | None = None
    """the model to fine-tune: a folder, a file or a name on the hub; the embedded one if not given. Methods vae and
    scratch begin with its weights, where it is given, and not from nothing"""
    prediction: str | None = None
    """what the network of --base predicts, epsilon or v_prediction, where its files say it wrong or not at all"""
    zero_snr: str | None = None
    """whether the noise of --base ends at zero SNR, on or off, likewise"""
    reading: OmitArgPrefixes[Data] = field(default_factory=Data)
    pace: OmitArgPrefixes[Steps] = field(default_factory=Steps)
    loss: OmitArgPrefixes[LossOptions] = field(default_factory=LossOptions)
    lora: OmitArgPrefixes[LoraOptions] = field(default_factory=LoraOptions)
    inversion: OmitArgPrefixes[Inversion] = field(default_factory=Inversion)
    control: OmitArgPrefixes[Controlling] = field(default_factory=Controlling)
    prior: OmitArgPrefixes[Prior] = field(default_factory=Prior)
    telling: OmitArgPrefixes[Telling] = field(default_factory=Telling)
    nothing: OmitArgPrefixes[FromNothing] = field(default_factory=FromNothing)


def with_defaults(method: str, steps: Steps) -> Steps:
    """The method's own numbers where none are given."""
    if steps.steps is not None and steps.epochs is not None:
        raise UserError(f"--steps {steps.steps} and --epochs {steps.epochs} both say how long to train; give one")
    own = {"weight_decay": 0.01} | METHOD_DEFAULTS[method]
    own = {name: value for name, value in own.items() if getattr(steps, name) is None}
    if steps.steps is not None or steps.epochs is not None:
        own = {name: value for name, value in own.items() if name not in ("steps", "epochs")}
    filled = replace(steps, **own)
    for name in (entry.name for entry in fields(filled)):
        value = getattr(filled, name)
        if name in ("steps", "epochs", "batch", "accumulate") and value is not None and value < 1:
            raise UserError(f"--{name} {value} is out of range; give 1 or more")
    Settings(seed=filled.seed).check()
    if not 0 < given(filled.lr) < float("inf"):
        usual = METHOD_DEFAULTS[method]["lr"]
        raise UserError(f"--lr {filled.lr:g} is out of range; give a number above 0, such as {usual:g}")
    return filled


T = TypeVar("T")


def given(value: T | None) -> T:
    """A number that `with_defaults` has filled in."""
    assert value is not None
    return value


def check_telling(telling: Telling) -> None:
    for name in (entry.name for entry in fields(telling)):
        value = getattr(telling, name)
        if isinstance(value, int) and not isinstance(value, bool) and value < 1:
            raise UserError(f"--{name.replace('_', '-')} {value} is out of range; give 1 or more")


@dataclass(frozen=True)
class FitOptions:
    steps: int
    batch: int = 64  # pictures a micro-batch
    accumulate: int = 1  # micro-batches a step, over all processes
    lr: float = 1e-4
    warmup: int = 200  # steps of linear warm-up
    cosine: bool = True  # then down to 1 % of lr along a cosine; else constant
    betas: tuple[float, float] = (0.9, 0.999)
    eps: float = 1e-8
    weight_decay: float = 0.01
    clip: float = 1.0  # largest norm of the whole gradient
    ema: float = 0.999  # 0: no average
    bf16: bool = False  # autocast; the weights and their update stay float32
    adam8bit: bool = False  # AdamW's moments in 8 bits, by torchao
    long_attention: bool = False  # on a CPU: attention maps that are never whole in memory, for large pictures
    seed: int = 0
    save_every: int = 1000
    keep: int = 2  # checkpoints kept
    max_skipped: int = 20  # non-finite steps in a row before giving up

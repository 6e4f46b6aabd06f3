"""The options of a training run, in groups; `Train` in commands/train.py combines them.

Options with a default that depends on the method are None here; METHOD_DEFAULTS has the values.
"""

from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Annotated, Any, Literal, TypeVar

from tyro.conf import OmitArgPrefixes
from tyro.constructors import PrimitiveConstructorSpec

from plainsd.arguments import Switch
from plainsd.errors import UserError
from plainsd.pictures.settings import Settings, read_seed
from plainsd.train.checks import METHODS_OF, check_ranges

FROM_SCRATCH = {"steps": 10_000, "batch": 64, "accumulate": 1, "lr": 1e-3, "warmup": 200, "decline": "cosine"}
RECIPE = {"batch": 1, "accumulate": 4, "warmup": 0, "decline": "constant"}
METHOD_DEFAULTS: dict[str, dict[str, Any]] = {
    "vae": FROM_SCRATCH,
    "scratch": FROM_SCRATCH,
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
    """folder of captioned pictures for validation only; it may be inside --data. emoji:SET.json: the held-out scenes"""
    hold_out: float = 0.0
    """share of the data to hold out for validation instead; the same pictures throughout a run"""
    size: int | None = None
    """width and height of the training pictures, in pixels; the model's if not given"""
    buckets: Switch = False
    """aspect-ratio buckets: each picture keeps about its shape, at about size x size pixels in all"""
    crop: Literal["centre", "random"] = "centre"
    """how a picture of another shape is cropped"""
    places: int = 4
    """with --crop random: crops per picture, drawn once"""
    flip: Switch = False
    """also use each picture mirrored"""
    caption: str | None = None
    """caption of pictures without one, such as "a photo of <cat>" """
    shuffle_tags: int | None = None
    """shuffle comma-separated tags, keeping the first N in place"""
    chunks: int = 1
    """longest caption, in chunks of as many tokens as the text encoder reads at once (CLIP: 75); the rest is cut off"""
    picture_column: str | None = None
    """column of the pictures in parquet files and datasets, if its name is unusual"""
    text_column: str | None = None
    """likewise, of captions; in metadata.jsonl too"""
    split: str = "train"
    """split of a dataset on the hub"""
    stream: Switch = False
    """stream only the first --limit pictures of a dataset"""
    limit: int | None = None
    """only the first N pictures of each source"""
    bad_share: float = 0.01
    """tolerated share of broken pictures and empty captions, which are skipped and counted; more is an error"""
    workers: int = 2
    """threads that load pictures while others are encoded, and processes that draw scenes (emoji:SET.json) ahead"""
    live_latents: Switch = False
    """scratch: encode pictures at every step instead of once; no disk, for scenes and fast GPUs"""


@dataclass
class Steps:
    """Steps, learning rate, optimizer, precision."""

    steps: int | None = None
    """optimizer steps (vae and scratch: 10,000)"""
    epochs: int | None = None
    """epochs, instead of steps (full: 400; lora and inversion: 100; controlnet: 10)"""
    batch: int | None = None
    """pictures per micro-batch (vae and scratch: 64; else 1)"""
    accumulate: int | None = None
    """gradient accumulation: micro-batches per step, over all processes (vae and scratch: 1; else 4)"""
    lr: float | None = None
    """learning rate (vae and scratch: 1e-3; full and controlnet: 1e-5; lora: 1e-4; inversion: 5e-3)"""
    warmup: int | None = None
    """steps of linear learning-rate warm-up (vae and scratch: 200; else 0)"""
    decline: Literal["cosine", "constant"] | None = None
    """learning rate after that: cosine decay to 1 percent (vae and scratch), or constant (else)"""
    weight_decay: float | None = None
    """weight decay of AdamW (inversion: 0; else 0.01)"""
    beta2: float = 0.999
    """beta2 of AdamW; 0.99 suits short runs"""
    clip: float = 1.0
    """gradient clipping: largest norm; inf: no clipping"""
    ema: float = 0.999
    """EMA decay; the averaged weights are saved. 0: no EMA"""
    seed: Annotated[
        int, PrimitiveConstructorSpec(1, "N", read_seeds, lambda seed: isinstance(seed, int), seed_text)
    ] = 0
    """random seed; random or -1 draws one, which a resumed run keeps"""
    device: str = "auto"
    dtype: str = "auto"
    """precision: bfloat16 (autocast, float32 weights) or float32; auto: whichever suits the device"""
    checkpointing: Switch = False
    """gradient checkpointing: less memory, 30 to 55 % more time"""
    optimizer: Literal["adamw", "muon"] = "adamw"
    """vae, scratch, full: adamw, or muon: momentum, orthogonalized, for the matrices of hidden layers, and AdamW for
    the rest, at AdamW's rates"""
    adam8bit: Switch = False
    """8-bit AdamW; needs torchao, and on a CPU a C++ compiler"""
    shard: Switch = False
    """with torchrun: shard weights, gradients and optimizer states over the processes (FSDP2)"""


@dataclass
class Telling:
    """Logging, samples, checkpoints."""

    prompts: Path | None = None
    """file of prompts for sample pictures, one a line; lines that start with # are comments"""
    save_every: int = 500
    keep: int = 2
    """checkpoints to keep"""
    save_results_every: int | None = None
    """every so many steps, write an intermediate result into OUT/results, in the form of the final one"""
    save_epochs: int | None = None
    """likewise, every so many epochs"""
    log_every: int = 20
    validate_every: int = 500
    sample_every: int = 1000
    tensorboard: Switch = False
    """also log for TensorBoard"""
    save_dtype: Literal["float16", "bfloat16", "float32"] = "float16"
    """dtype of the saved result (vae and inversion: always float32)"""


@dataclass
class LossOptions:
    """Options of the loss."""

    dropout: float | None = None
    """caption dropout: share of empty captions, for classifier-free guidance (0.1; with --distill 0)"""
    timestep_power: float = 1.0
    """below 1, noisy timesteps are sampled more often; there the caption matters most"""
    min_snr: float | None = None
    """min-SNR weighting with this gamma; 5 is usual"""
    offset_noise: float = 0.0
    """offset noise, for very dark and very light pictures; 0.05 to 0.1"""
    perturbation: float = 0.0
    """input perturbation: extra noise in the input; 0.1 is usual"""
    huber: float | None = None
    """Huber loss: errors beyond this size count linearly (with --distill 0.001)"""


@dataclass
class Prior:
    """DreamBooth: prior preservation with class pictures."""

    prior: Path | None = None
    """folder of class pictures; if missing or not given, --prior-count pictures of --prior-prompt are generated
    first"""
    prior_prompt: str | None = None
    """class prompt, such as "a photo of a dog" for captions like "a photo of sks dog" """
    prior_weight: float = 1.0
    prior_count: int = 200


@dataclass
class LoraOptions:
    """Method lora, and some for others too."""

    text_encoder: Switch = False
    """full, lora: train the text encoders too"""
    kind: Literal["lora", "loha", "lokr"] = "lora"
    """low-rank product (LoRA), elementwise product of two (LoHa), or Kronecker product (LoKr)"""
    rank: int = 16
    alpha: float | None = None
    """the change is scaled by alpha / rank; the rank if not given"""
    factor: int | None = None
    """lokr: largest side of the smaller matrix; as square as possible if not given"""
    targets: str = "attention"
    """target modules: attention, transformers, all-linear, all, or a pattern such as '*.cross_attn.*'"""
    conv: Switch = False
    """train convolutions too"""
    dora: Switch = False
    """weight-decomposed (DoRA)"""
    half_base: Switch = False
    """lora, inversion, controlnet: keep frozen weights in bfloat16, half the memory"""
    distill: float | None = None
    """latent consistency distillation, for 4 steps of the lcm sampler without guidance (an LCM-LoRA, or with method
    full a whole model): the guidance scale to imitate, such as 7.5"""
    distill_steps: int = 50
    """with --distill: steps of the teacher from noise to picture; lcm visits some of 50"""


@dataclass
class Inversion:
    """Method inversion."""

    token: str | None = None
    """the new word, such as '<cat>', which the captions use"""
    vectors: int = 1
    """number of vectors of the new word"""
    initial: str | None = None
    """initialise from a known word, such as 'cat'"""


@dataclass
class Controlling:
    """Method controlnet."""

    control: str | None = None
    """a ControlNet to go on from, a folder or a file; a new one, made of the model's own weights, if not given"""


@dataclass
class FromScratch:
    """Methods vae and scratch, and --vae for all that need one."""

    model: Path | None = None
    """JSON file that describes the networks: the fields of plainsd.models.variants.Variant"""
    vae: Path | None = None
    """scratch: folder of the trained autoencoder. full, lora, inversion, controlnet: a folder or a file with another
    autoencoder than that of --base"""
    tokenizer: Path | None = None
    """scratch: folder with vocab.json and merges.txt"""
    carry: tuple[Path, ...] = ()
    """scratch: files to put beside the finished model's weights"""
    kl_weight: float = 1e-4
    """vae: weight of the KL divergence from the unit normal"""
    edge_weight: float = 1.0
    """vae: weight of the edge loss (error of pixel differences)"""
    patch_weight: float = 0.0
    """vae: weight of the patch discriminator"""
    patch_after: int = 0
    """vae: pictures seen before the discriminator starts"""
    latent_noise: float = 0.0
    """vae: noise in the latents that the decoder reads, about this share of their standard deviation: it then forgives
    a UNet's errors; 0.15 suits a small UNet"""
    decoder_only: Switch = False
    """vae: freeze the encoder of --base, so that its UNets still fit"""


@dataclass
class TrainOptions:
    """All options of a run."""

    method: Literal["vae", "scratch", "full", "lora", "inversion", "controlnet"]
    """vae: an autoencoder from nothing. scratch: text encoder and UNet from nothing, on a trained autoencoder. full:
    all weights of a model's UNet. lora: low-rank changes to a model. inversion: a new word for prompts.
    controlnet: a net that reads a map beside each picture (name.cond.png)"""
    data: tuple[str, ...]
    """folders of captioned pictures (metadata.jsonl, or pairs name.png and name.txt), parquet files, tar shards, or
    datasets on the hub (owner/name); cats:10 repeats cats ten times an epoch; kohya:dogs reads folders such as "10_sks
    dog" in dogs; emoji:SET.json draws scenes of emoji"""
    out: Path
    """folder of the run: log, curve, samples, checkpoints, and the result, which has the folder's name"""
    config: Path | None = None
    """TOML file with any of these options, such as a run's run.toml; flags take precedence, and --no-NAME leaves out
    what it says of NAME"""
    base: str | None = None
    """model to fine-tune: a folder, a file or a Hub repository id; the embedded one if not given. With methods vae and
    scratch, training starts from its weights if it is given"""
    prediction: str | None = None
    """override what --base predicts: epsilon, v_prediction or sample (x0)"""
    zero_snr: str | None = None
    """override whether --base has zero terminal SNR: on or off"""
    reading: OmitArgPrefixes[Data] = field(default_factory=Data)
    pace: OmitArgPrefixes[Steps] = field(default_factory=Steps)
    loss: OmitArgPrefixes[LossOptions] = field(default_factory=LossOptions)
    lora: OmitArgPrefixes[LoraOptions] = field(default_factory=LoraOptions)
    inversion: OmitArgPrefixes[Inversion] = field(default_factory=Inversion)
    control: OmitArgPrefixes[Controlling] = field(default_factory=Controlling)
    prior: OmitArgPrefixes[Prior] = field(default_factory=Prior)
    telling: OmitArgPrefixes[Telling] = field(default_factory=Telling)
    from_scratch: OmitArgPrefixes[FromScratch] = field(default_factory=FromScratch)


def with_defaults(method: str, steps: Steps) -> Steps:
    """Fills in the method's defaults."""
    if steps.steps is not None and steps.epochs is not None:
        raise UserError(f"--steps {steps.steps} and --epochs {steps.epochs} both say how long to train; give one")
    own = {"weight_decay": 0.01} | METHOD_DEFAULTS[method]
    own = {name: value for name, value in own.items() if getattr(steps, name) is None}
    if steps.steps is not None or steps.epochs is not None:
        own = {name: value for name, value in own.items() if name not in ("steps", "epochs")}
    filled = replace(steps, **own)
    if filled.optimizer == "muon" and (other := "--adam8bit" if filled.adam8bit else "--shard" if filled.shard else ""):
        raise UserError(f"--optimizer muon does not go with {other}; leave one of them out", field="optimizer")
    check_ranges(filled)
    Settings(seed=filled.seed).check()
    if not 0 < given(filled.lr) < float("inf"):
        usual = METHOD_DEFAULTS[method]["lr"]
        raise UserError(f"--lr {filled.lr:g} is out of range; give a number above 0, such as {usual:g}")
    return filled


def with_loss_defaults(options: TrainOptions) -> LossOptions:
    """Fills in what depends on --distill, and checks what goes with it."""
    loss, distilling = options.loss, options.lora.distill is not None
    if distilling and options.method not in ("full", "lora"):
        raise UserError(f"--distill is for methods full and lora; method {options.method} learns from pictures alone")
    unfit = {
        "--min-snr": loss.min_snr is not None,
        "--offset-noise": loss.offset_noise != 0,
        "--perturbation": loss.perturbation != 0,
        "--text-encoder": options.lora.text_encoder,
        "--prior": options.prior.prior is not None or options.prior.prior_prompt is not None,
        "--shard": options.pace.shard,
    }
    if distilling and (given_too := [flag for flag, there in unfit.items() if there]):
        raise UserError(f"--distill imitates the model as it is, and has no {given_too[0]}; leave one of them out")
    defaults = {"dropout": 0.0, "huber": 0.001} if distilling else {"dropout": 0.1}
    own = {name: value for name, value in defaults.items() if options.method in METHODS_OF[name]}
    return replace(loss, **{name: value for name, value in own.items() if getattr(loss, name) is None})


T = TypeVar("T")


def given(value: T | None) -> T:
    """An option that `with_defaults` has filled in."""
    assert value is not None
    return value


@dataclass(frozen=True)
class FitOptions:
    steps: int
    batch: int = 64  # pictures per micro-batch
    accumulate: int = 1  # gradient accumulation: micro-batches per step, over all processes
    lr: float = 1e-4
    warmup: int = 200  # steps of linear warm-up
    cosine: bool = True  # then cosine decay to 1 % of lr; else constant
    betas: tuple[float, float] = (0.9, 0.999)
    eps: float = 1e-8
    weight_decay: float = 0.01
    clip: float = 1.0  # largest gradient norm
    ema: float = 0.999  # decay; 0: no EMA
    bf16: bool = False  # autocast; weights and updates stay float32
    adam8bit: bool = False  # 8-bit AdamW, by torchao
    muon: bool = False  # for the matrices of hidden layers; AdamW for the rest
    long_attention: bool = False  # on a CPU: memory-efficient attention, for large pictures
    seed: int = 0
    save_every: int = 1000
    keep: int = 2  # checkpoints kept
    max_skipped: int = 20  # non-finite steps in a row before giving up

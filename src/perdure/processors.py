"""Tokenizers and image processors of our own, and what all are asked for. Imports no torch, no transformers."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from .errors import BadInput

if TYPE_CHECKING:
    import numpy as np

TOKENIZER_FILE = "byte_tokenizer.json"
IMAGE_FILE = "preprocessor_config.json"


class ByteTokenizer:
    """One token per UTF-8 byte: ids 0-255, then pad 256, beginning 257, end 258. For models trained from scratch.

    It answers the part of the Hugging Face tokenizer interface that perdure uses. Special tokens: a beginning token
    before the text, none after it.
    """

    pad_token_id, bos_token_id, eos_token_id = 256, 257, 258
    vocab_size = 259
    chat_template = None
    padding_side = "right"

    def __init__(self, model_max_length: int | None = None):
        self.model_max_length = model_max_length

    def __len__(self) -> int:
        return self.vocab_size

    def encode(self, text: str, add_special_tokens: bool = True) -> list[int]:
        return [self.bos_token_id] * add_special_tokens + list(text.encode())

    def __call__(
        self,
        text: str | Sequence[str],
        add_special_tokens: bool = True,
        truncation: bool = False,
        max_length: int | None = None,
        padding: bool = False,
        return_attention_mask: bool = True,
    ) -> dict[str, list[Any]]:
        """`input_ids` and `attention_mask`, lists for one text and lists of lists for several."""
        many = [text] if isinstance(text, str) else list(text)
        limit = max_length if truncation and max_length is not None else self.model_max_length if truncation else None
        ids = [self.encode(t, add_special_tokens)[:limit] for t in many]
        mask = [[1] * len(i) for i in ids]
        if padding:
            longest = max(map(len, ids), default=0)
            mask = [m + [0] * (longest - len(m)) for m in mask]
            ids = [i + [self.pad_token_id] * (longest - len(i)) for i in ids]
        out: dict[str, list[Any]] = {"input_ids": ids}
        if return_attention_mask:
            out["attention_mask"] = mask
        return {k: v[0] for k, v in out.items()} if isinstance(text, str) else out

    def decode(self, ids: Any, skip_special_tokens: bool = False) -> str:
        """Text of the bytes; an unfinished character becomes U+FFFD. Ids beyond the bytes: named, or left out."""
        names = {self.pad_token_id: "<pad>", self.bos_token_id: "<bos>", self.eos_token_id: "<eos>"}
        out = bytearray()
        for i in ids.tolist() if hasattr(ids, "tolist") else ids:
            if 0 <= i < 256:
                out.append(i)
            elif not skip_special_tokens:
                out += names.get(i, f"<{i}>").encode()
        return out.decode(errors="replace")

    def batch_decode(self, sequences: Any, skip_special_tokens: bool = False) -> list[str]:
        return [self.decode(ids, skip_special_tokens) for ids in sequences]

    def save_pretrained(self, folder: str | Path) -> None:
        Path(folder).mkdir(parents=True, exist_ok=True)
        settings = {"schema": 1, "type": "bytes", "model_max_length": self.model_max_length}
        (Path(folder) / TOKENIZER_FILE).write_text(json.dumps(settings, indent=2) + "\n", encoding="utf-8")

    @classmethod
    def from_pretrained(cls, folder: str | Path) -> ByteTokenizer:
        settings = _read_json(Path(folder) / TOKENIZER_FILE)
        if settings.get("type") != "bytes" or settings.get("schema") != 1:
            raise BadInput(f"{Path(folder) / TOKENIZER_FILE}: type and schema are not those of a byte tokenizer")
        return cls(settings.get("model_max_length"))


class ImageProcessor:
    """Images as a vision model takes them: resized, scaled to [0, 1], normalised, channels first.

    Args:
        size: height and width that the model takes.
        mean, std: per channel, after scaling to [0, 1].
        resample: Pillow's filter number (2 bilinear, 3 bicubic).
        shortest_edge: resize the shorter side to this, keep the proportions and cut `size` from the centre (CLIP);
            when absent both sides are stretched to `size` (ViT).
    """

    def __init__(
        self,
        size: tuple[int, int],
        mean: Sequence[float] = (0.5, 0.5, 0.5),
        std: Sequence[float] = (0.5, 0.5, 0.5),
        resample: int = 2,
        shortest_edge: int | None = None,
    ):
        if min(size) < 1 or len(mean) != 3 or len(std) != 3 or min(std) <= 0:
            raise BadInput(f"image processor: size {size}, mean {mean}, std {std}; give positive sizes and 3 channels")
        self.size, self.mean, self.std = (int(size[0]), int(size[1])), tuple(mean), tuple(std)
        self.resample, self.shortest_edge = resample, shortest_edge

    def __call__(self, image: Any) -> np.ndarray:
        """float32 [3, H, W] from uint8 [H, W, 3], [H, W, 1], [H, W, 4] (alpha left out), [H, W] or a Pillow image.

        Raises:
            BadInput: another shape or type.
        """
        import numpy as np

        pixels = self._resize(to_rgb(image))
        scaled = pixels.astype(np.float32) * np.float32(1 / 255)
        scaled = (scaled - np.asarray(self.mean, np.float32)) / np.asarray(self.std, np.float32)
        return np.ascontiguousarray(scaled.transpose(2, 0, 1), dtype=np.float32)

    def _resize(self, pixels: np.ndarray) -> np.ndarray:
        height, width = pixels.shape[:2]
        if (height, width) == self.size and self.shortest_edge in (None, min(height, width)):
            return pixels
        target = self.size
        if self.shortest_edge is not None:
            scale = self.shortest_edge / min(height, width)
            target = tuple(self.shortest_edge if n == min(height, width) else int(n * scale) for n in (height, width))
        if target != (height, width):
            pixels = _pillow_resize(pixels, target, self.resample)
        return _center(pixels, self.size) if self.shortest_edge is not None else pixels

    def to_dict(self) -> dict[str, Any]:
        """Settings under the names of Hugging Face's preprocessor_config.json."""
        size = {"height": self.size[0], "width": self.size[1]}
        cut = self.shortest_edge is not None
        return {
            "do_resize": True,
            "size": {"shortest_edge": self.shortest_edge} if cut else size,
            "do_center_crop": cut,
            **({"crop_size": size} if cut else {}),
            "resample": self.resample,
            "do_rescale": True,
            "rescale_factor": 1 / 255,
            "do_normalize": True,
            "image_mean": list(self.mean),
            "image_std": list(self.std),
        }

    def save_pretrained(self, folder: str | Path) -> None:
        Path(folder).mkdir(parents=True, exist_ok=True)
        (Path(folder) / IMAGE_FILE).write_text(json.dumps(self.to_dict(), indent=2) + "\n", encoding="utf-8")

    @classmethod
    def from_pretrained(cls, folder: str | Path) -> ImageProcessor:
        """Reads `preprocessor_config.json`, ours or that of a Hugging Face model folder."""
        path = Path(folder)
        return cls.from_preprocessor_config(_read_json(path / IMAGE_FILE if path.is_dir() else path))

    @classmethod
    def from_preprocessor_config(cls, settings: dict[str, Any]) -> ImageProcessor:
        """From the settings of a Hugging Face image processor.

        Raises:
            BadInput: it scales pixels otherwise, or names no size.
        """
        if not settings.get("do_rescale", True) or abs(settings.get("rescale_factor", 1 / 255) * 255 - 1) > 1e-3:
            raise BadInput("preprocessor_config.rescale_factor: only 1/255 is known; build an ImageProcessor by hand")
        size, crop = settings.get("size"), settings.get("crop_size")
        size = {"height": size, "width": size} if isinstance(size, int) else size or {}
        crop = {"height": crop, "width": crop} if isinstance(crop, int) else crop
        shortest = size.get("shortest_edge")
        if shortest is not None:
            cut = crop if settings.get("do_center_crop", False) and crop else {"height": shortest, "width": shortest}
            height, width = cut["height"], cut["width"]
        elif "height" in size and "width" in size:
            height, width = size["height"], size["width"]
        else:
            raise BadInput(f"preprocessor_config.size: found {settings.get('size')!r}; give height and width")
        plain = not settings.get("do_normalize", True)
        return cls(
            (height, width),
            (0.0, 0.0, 0.0) if plain else settings.get("image_mean") or (0.5, 0.5, 0.5),
            (1.0, 1.0, 1.0) if plain else settings.get("image_std") or (0.5, 0.5, 0.5),
            int(settings.get("resample") or 2),
            shortest,
        )

    @classmethod
    def from_model_config(cls, config: Any) -> ImageProcessor:
        """From a vision model's configuration (`image_size`), where no preprocessor_config.json is at hand.

        Mean and deviation are those the family was trained with: CLIP's, ImageNet's (DINOv2, DeiT), else 0.5.
        """
        family = str(getattr(config, "model_type", ""))
        vision = getattr(config, "vision_config", config)
        size = getattr(vision, "image_size", None)
        if size is None:
            raise BadInput(f"model of type {family!r} has no image_size; give an ImageProcessor of the right size")
        height, width = (size, size) if isinstance(size, int) else size
        if "clip" in family:
            mean, std = (0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711)
            return cls((height, width), mean, std, 3, min(height, width))
        if family.startswith(("dino", "deit", "resnet", "swin", "convnext")):
            return cls((height, width), (0.485, 0.456, 0.406), (0.229, 0.224, 0.225), 3)
        return cls((height, width))


def to_rgb(image: Any) -> np.ndarray:
    """uint8 [H, W, 3] of a grey, RGB or RGBA image."""
    import numpy as np

    if hasattr(image, "convert"):
        image = image.convert("RGB")
    pixels = np.asarray(image)
    if pixels.dtype != np.uint8 or pixels.ndim not in (2, 3) or pixels.size == 0:
        raise BadInput(f"image: expected uint8 [H, W, 3], found {pixels.dtype} of shape {pixels.shape}")
    if pixels.ndim == 2:
        pixels = pixels[:, :, None]
    if pixels.shape[2] == 1:
        return np.repeat(pixels, 3, axis=2)
    if pixels.shape[2] not in (3, 4):
        raise BadInput(f"image: expected 1, 3 or 4 channels in the last place, found shape {pixels.shape}")
    return pixels[:, :, :3]


def _pillow_resize(pixels: np.ndarray, target: tuple[int, ...], resample: int) -> np.ndarray:
    import numpy as np

    try:
        from PIL import Image
    except ImportError:
        raise BadInput(
            f"image: found {pixels.shape[0]}x{pixels.shape[1]}, the model takes {target[0]}x{target[1]}; resizing "
            "needs Pillow: pip install 'perdure[vision]'"
        ) from None
    image = Image.fromarray(np.ascontiguousarray(pixels))
    return np.asarray(image.resize((target[1], target[0]), Image.Resampling(resample)))


def _center(pixels: np.ndarray, size: tuple[int, int]) -> np.ndarray:
    import numpy as np

    pad = [(max(0, want - have)) for want, have in zip(size, pixels.shape[:2], strict=True)]
    if any(pad):
        pixels = np.pad(pixels, [(p // 2, p - p // 2) for p in pad] + [(0, 0)])
    top, left = ((have - want) // 2 for want, have in zip(size, pixels.shape[:2], strict=True))
    return pixels[top : top + size[0], left : left + size[1]]


def _read_json(path: Path) -> dict[str, Any]:
    try:
        data = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise BadInput(f"{path}: no such file; give the folder that save_pretrained wrote") from None
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise BadInput(f"{path}: is not JSON ({error}); write it anew") from None
    if not isinstance(data, dict):
        raise BadInput(f"{path}: expected a JSON object, found {type(data).__name__}")
    return data


def tokenizer_of(processor: Any) -> Any:
    """The tokenizer itself, or the one inside a processor of text and images.

    Raises:
        BadInput: there is none.
    """
    tokenizer = getattr(processor, "tokenizer", processor)
    if tokenizer is None or not hasattr(tokenizer, "decode") or not callable(tokenizer):
        raise BadInput(
            f"processor: rows of text need a tokenizer, found {type(processor).__name__}; pass the model's own"
        )
    return tokenizer


def image_processor_of(processor: Any) -> Any:
    """The image processor itself, or the one inside a processor of text and images.

    Raises:
        BadInput: there is none.
    """
    images = getattr(processor, "image_processor", processor)
    if images is None or not callable(images) or hasattr(images, "decode"):
        raise BadInput(
            f"processor: rows of images need an image processor, found {type(processor).__name__}; "
            "pass perdure.processors.ImageProcessor.from_model_config(model.config)"
        )
    return images


def encode_image(processor: Any, image: Any) -> np.ndarray:
    """float32 [3, H, W] through our image processor or a Hugging Face one."""
    import numpy as np

    images = image_processor_of(processor)
    if isinstance(images, ImageProcessor):
        return images(image)
    return np.asarray(images(images=to_rgb(image), return_tensors="np")["pixel_values"][0], dtype=np.float32)


def encode_texts(
    tokenizer: Any, texts: Sequence[str], max_length: int | None = None, special: bool = True
) -> list[list[int]]:
    """Token ids of each text, cut at `max_length`, not padded."""
    if not texts:
        return []
    options: dict[str, Any] = {"add_special_tokens": special, "padding": False, "return_attention_mask": False}
    if max_length is not None:
        options.update(truncation=True, max_length=max_length)
    return [list(ids) for ids in tokenizer(list(texts), **options)["input_ids"]]


def pad_id(tokenizer: Any) -> int:
    """The padding token; the end token where a tokenizer has none (its positions are masked), else 0."""
    for name in ("pad_token_id", "eos_token_id"):
        if getattr(tokenizer, name, None) is not None:
            return int(getattr(tokenizer, name))
    return 0


def check_tokenizer(tokenizer: Any, model: Any) -> None:
    """Refuses a tokenizer that can give ids for which the model has no embedding.

    Raises:
        BadInput: names both numbers.
    """
    try:
        embeddings = model.get_input_embeddings()
    except (AttributeError, NotImplementedError):
        embeddings = None
    weight = getattr(embeddings, "weight", None)
    if weight is None:
        raise BadInput(f"model: {type(model).__name__} has no token embeddings; rows of text need a text model")
    if len(tokenizer) > weight.shape[0]:
        raise BadInput(
            f"processor: the tokenizer knows {len(tokenizer)} tokens, the model has {weight.shape[0]} embedding rows; "
            "use the model's own tokenizer or call model.resize_token_embeddings"
        )


def position_limit(model: Any) -> int | None:
    """Longest sequence that the model's table of learned positions takes; None where there is no such limit."""
    config = getattr(model, "config", None)
    config = getattr(config, "text_config", None) or config
    family = str(getattr(config, "model_type", ""))
    limit = getattr(config, "max_position_embeddings", None)
    if limit is None or getattr(config, "rope_parameters", None) or getattr(config, "rope_scaling", None):
        return None
    # RoBERTa and its kin count positions from padding_idx + 1.
    return limit - 2 if family in ("roberta", "xlm-roberta", "camembert", "mpnet") else limit

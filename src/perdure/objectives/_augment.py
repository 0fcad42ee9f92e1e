"""Random views of training images: pure functions of image [H, W, 3] uint8 and a seed. Imports no torch."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import TYPE_CHECKING, Literal

if TYPE_CHECKING:
    import numpy as np

Augmentation = Literal["none", "flip_crop", "resized_crop"]


def flip_crop(image: np.ndarray, seed: int) -> np.ndarray:
    """Mirrors with probability 1/2, pads each side by an eighth (4 of 32 on CIFAR), cuts the old size out at random."""
    import numpy as np

    random = np.random.default_rng(seed)
    if random.random() < 0.5:
        image = image[:, ::-1]
    height, width = image.shape[:2]
    pad_y, pad_x = height // 8, width // 8
    top, left = int(random.integers(2 * pad_y + 1)), int(random.integers(2 * pad_x + 1))
    padded = np.pad(image, ((pad_y, pad_y), (pad_x, pad_x), (0, 0)))
    return np.ascontiguousarray(padded[top : top + height, left : left + width])


def resized_crop(image: np.ndarray, seed: int) -> np.ndarray:
    """Mirrors with probability 1/2 and cuts a part of 5 to 100 % of the area with sides in a ratio of 3/4 to 4/3.

    The image processor then scales the part to the model's size. Ratios are drawn evenly on the logarithm; after ten
    draws that do not fit, the largest part of an allowed ratio is cut from the centre. As torchvision's
    RandomResizedCrop with the scale (0.05, 1) of the online prompt methods.
    """
    import numpy as np

    random = np.random.default_rng(seed)
    if random.random() < 0.5:
        image = image[:, ::-1]
    height, width = image.shape[:2]
    for _ in range(10):
        area = random.uniform(0.05, 1.0) * height * width
        ratio = math.exp(random.uniform(math.log(3 / 4), math.log(4 / 3)))
        h, w = max(1, round(math.sqrt(area / ratio))), max(1, round(math.sqrt(area * ratio)))
        if h <= height and w <= width:
            top, left = int(random.integers(height - h + 1)), int(random.integers(width - w + 1))
            break
    else:
        h, w = min(height, max(1, round(width * 4 / 3))), min(width, max(1, round(height * 4 / 3)))
        top, left = (height - h) // 2, (width - w) // 2
    return np.ascontiguousarray(image[top : top + h, left : left + w])


AUGMENTATIONS: dict[str, Callable[[np.ndarray, int], np.ndarray]] = {
    "flip_crop": flip_crop,
    "resized_crop": resized_crop,
}

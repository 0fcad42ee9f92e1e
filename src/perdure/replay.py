"""The only replay buffer: a reservoir of raw rows within a budget of samples and bytes. Imports no torch."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from .data import Row, Rows
from .errors import BadInput, DamagedState

if TYPE_CHECKING:
    import torch
    from torch import Tensor


class ReplayBuffer:
    """Keeps a uniform sample of all rows seen, or one balanced over classes.

    Plain: algorithm R (Vitter 1985): the t-th row enters with probability k/t and takes the place of a random one.
    Balanced: class-balancing reservoir (Chrysakis & Moens 2020, algorithm 1): a row of a class that never was the
    largest takes the place of a random row of the largest class; a row of another enters its own class as in
    algorithm R.

    A row too large for what is left of the byte budget evicts random rows (of the largest class, when balanced) until
    all fit; the number of places k then shrinks to what fits, for good, so that later rows have no better chance than
    earlier ones. A row larger than the whole budget is left out and counted in `refused`.

    Args:
        samples: rows stored at the most.
        bytes: bytes stored at the most; no limit when absent. See `row_bytes`.
        balanced: balance over classes.
        generator: decides what stays. Its state is not part of the buffer's: whoever gives it saves it.
    """

    def __init__(
        self, samples: int, bytes: int | None = None, balanced: bool = False, generator: torch.Generator | None = None
    ):
        if samples < 0 or (bytes is not None and bytes < 0):
            raise BadInput(f"replay buffer: a budget of {samples} samples and {bytes} bytes; give numbers of 0 or more")
        self.samples, self.bytes, self.balanced, self.generator = samples, bytes, balanced, generator
        self.places = samples
        self.seen = 0
        self.refused = 0
        self.nbytes = 0
        self.given: list[Row] = []
        """Rows sampled in the step at work, which the buffer may have let go since."""
        self._rows: list[Row] = []
        self._labels: list[str] = []
        self._sizes: list[int] = []
        self._seen_of: Counter[str] = Counter()
        self._full: set[str] = set()

    def __len__(self) -> int:
        return len(self._rows)

    @property
    def rows(self) -> Rows:
        """The stored rows; not to be changed."""
        return tuple(self._rows)

    # ---- filling
    def add(self, rows: Rows, index: Sequence[int] | Tensor | None = None, labels: Sequence[Any] | None = None) -> None:
        """Offers rows to the reservoir.

        Args:
            index: position of each row in its experience; rows with -1 come from elsewhere (the buffer itself) and are
                not offered again.
            labels: class of each row for the balanced mode; the row's `label` when absent.

        Raises:
            BadInput: a field is neither JSON nor a uint8 array, or the balanced mode finds no label.
        """
        positions = list(range(len(rows))) if index is None else [int(i) for i in index]
        if len(positions) != len(rows) or (labels is not None and len(labels) != len(rows)):
            raise ValueError(f"{len(rows)} rows with {len(positions)} positions and {len(labels or rows)} labels")
        for i, row in enumerate(rows):
            if positions[i] < 0:
                continue
            label = row.get("label") if labels is None else labels[i]
            if self.balanced and label is None:
                raise BadInput(f"row {i}: field 'label' is missing; a class-balanced buffer needs it")
            self._offer(_copy(row, i), str(label))

    def _offer(self, row: Row, label: str) -> None:
        self.seen += 1
        self._seen_of[label] += 1
        size = row_bytes(row)
        if self.bytes is not None and size > self.bytes:
            self.refused += 1
            return
        if len(self._rows) < self.places:
            self._rows.append(row)
            self._labels.append(label)
            self._sizes.append(size)
            self.nbytes += size
        else:
            place = self._place_for(label)
            if place is None:
                return
            self.nbytes += size - self._sizes[place]
            self._rows[place], self._labels[place], self._sizes[place] = row, label, size
        self._shrink()
        if self.balanced and len(self._rows) >= self.places:
            self._full.update(self._largest())

    def _place_for(self, label: str) -> int | None:
        """Whose place the row takes, or None if it does not enter."""
        if not self._rows:
            return None
        if not self.balanced:
            place = self._draw(self.seen)
            return place if place < self.places else None
        if label not in self._full:
            largest = self._largest()
            return self._one_of([i for i, other in enumerate(self._labels) if other in largest])
        own = [i for i, other in enumerate(self._labels) if other == label]
        place = self._draw(self._seen_of[label])
        return own[place] if place < len(own) else None

    def _shrink(self) -> None:
        if self.bytes is None or self.nbytes <= self.bytes:
            return
        while self.nbytes > self.bytes:
            among = range(len(self._rows))
            if self.balanced:
                largest = self._largest()
                among = [i for i in among if self._labels[i] in largest]
            place = self._one_of(among)
            self.nbytes -= self._sizes[place]
            for column in (self._rows, self._labels, self._sizes):
                column[place] = column[-1]  # type: ignore[index]
                column.pop()
        self.places = len(self._rows)

    def _largest(self) -> set[str]:
        counts = Counter(self._labels)
        most = max(counts.values(), default=0)
        return {label for label, n in counts.items() if n == most}

    def _one_of(self, places: Sequence[int]) -> int:
        return places[self._draw(len(places))]

    def _draw(self, high: int) -> int:
        import torch

        if self.generator is None:
            raise ValueError("replay buffer: it has no generator; give one, so that runs can be repeated")
        return int(torch.randint(high, (), generator=self.generator, device=self.generator.device))

    # ---- reading
    def sample(self, n: int, generator: torch.Generator | None = None) -> list[Row]:
        """`n` different stored rows at random, all of them in random order if there are fewer."""
        import torch

        generator = generator or self.generator
        if generator is None:
            raise ValueError("replay buffer: sampling needs a generator")
        order = torch.randperm(len(self._rows), generator=generator, device=generator.device)
        chosen = [self._rows[i] for i in order[:n].tolist()]
        self.given += chosen
        return chosen

    # ---- state
    def state_dict(self) -> tuple[dict[str, Tensor], dict[str, Any]]:
        """All arrays as one uint8 tensor, one after the other, and JSON values: rows, shapes, counters."""
        import numpy as np
        import torch

        rows, arrays = [], []
        for row in self._rows:
            fields, shapes = {}, {}
            for key, value in row.items():
                if isinstance(value, np.ndarray):
                    shapes[key] = list(value.shape)
                    arrays.append(value.reshape(-1))
                fields[key] = None if isinstance(value, np.ndarray) else value
            rows.append({"fields": fields, "shapes": shapes})
        flat = np.concatenate(arrays) if arrays else np.empty(0, np.uint8)
        values = {
            "rows": rows,
            "labels": list(self._labels),
            "places": self.places,
            "seen": self.seen,
            "refused": self.refused,
            "seen_of": dict(self._seen_of),
            "full": sorted(self._full),
            "balanced": self.balanced,
        }
        return {"arrays": torch.from_numpy(flat)}, values

    def load_state_dict(self, tensors: dict[str, Tensor], values: dict[str, Any]) -> None:
        """Restores what `state_dict` gave.

        Raises:
            BadInput: the state holds more than this buffer's budgets, or was balanced otherwise.
            DamagedState: arrays and shapes do not fit each other.
        """
        if values["balanced"] != self.balanced or len(values["rows"]) > self.samples:
            raise BadInput(
                f"replay buffer: the state has {len(values['rows'])} rows, balanced={values['balanced']}; this buffer "
                f"takes {self.samples}, balanced={self.balanced}; go on with the settings the run began with"
            )
        flat, start, rows = tensors["arrays"].cpu().numpy(), 0, []
        for stored in values["rows"]:
            row = dict(stored["fields"])
            for key, shape in stored["shapes"].items():
                length = 1
                for n in shape:
                    length *= n
                if start + length > len(flat):
                    raise DamagedState(f"replay buffer: {len(flat)} bytes of arrays are fewer than the rows need")
                row[key] = flat[start : start + length].reshape(shape).copy()
                start += length
            rows.append(row)
        if start != len(flat):
            raise DamagedState(f"replay buffer: {len(flat)} bytes of arrays, the rows need {start}")
        sizes = [row_bytes(row) for row in rows]
        if self.bytes is not None and sum(sizes) > self.bytes:
            raise BadInput(f"replay buffer: the state has {sum(sizes)} bytes of rows; the budget is {self.bytes}")
        self._rows, self._sizes, self._labels = rows, sizes, list(values["labels"])
        self.nbytes = sum(sizes)
        self.places, self.seen, self.refused = values["places"], values["seen"], values["refused"]
        self._seen_of, self._full = Counter(values["seen_of"]), set(values["full"])


def pack(values: Tensor) -> Any:
    """A float32 or float64 vector [n] as bytes [n, 4 or 8], so that it may be a field of a row; exact."""
    import numpy as np

    array = np.ascontiguousarray(values.detach().cpu().numpy())
    return array.view(np.uint8).reshape(len(array), array.itemsize)


def unpack(arrays: Sequence[Any]) -> tuple[Tensor, Tensor]:
    """What `pack` made of several vectors: [rows, n] padded with zeros to the longest, and the length of each."""
    import numpy as np
    import torch

    kinds = {4: np.float32, 8: np.float64}
    vectors = [torch.from_numpy(each.reshape(-1).view(kinds[each.shape[1]]).copy()) for each in arrays]
    lengths = torch.tensor([len(vector) for vector in vectors], dtype=torch.int64)
    if not vectors:
        return torch.zeros(0, 0), lengths
    return torch.nn.utils.rnn.pad_sequence(vectors, batch_first=True), lengths


def row_bytes(row: Row) -> int:
    """Bytes of one row: its uint8 arrays, and its other fields as compact UTF-8 JSON."""
    import numpy as np

    arrays = sum(value.nbytes for value in row.values() if isinstance(value, np.ndarray))
    rest = {key: value for key, value in row.items() if not isinstance(value, np.ndarray)}
    return arrays + len(json.dumps(rest, ensure_ascii=False, separators=(",", ":")).encode())


def _copy(row: Mapping[str, Any], position: int) -> Row:
    """A copy that later changes of the caller's row or array do not reach."""
    import numpy as np

    out: dict[str, Any] = {}
    for key, value in row.items():
        if hasattr(value, "convert"):
            value = np.asarray(value.convert("RGB"))
        if isinstance(value, np.ndarray) and value.dtype == np.uint8:
            out[key] = np.array(value, order="C")
            continue
        try:
            out[key] = json.loads(json.dumps(value, ensure_ascii=False, allow_nan=False))
        except (TypeError, ValueError):
            kind = f"array of {value.dtype}" if isinstance(value, np.ndarray) else type(value).__name__
            raise BadInput(
                f"row {position}: field {key!r} is of type {kind}; store text, numbers, lists or uint8 arrays"
            ) from None
    return out

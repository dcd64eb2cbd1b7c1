"""What both ends of a stream must have in common: integer weights and integer distributions, made once and then loaded.

Legend: E experts, C channels, Z latents, H hidden, V values of a latent, L scales, N features, I in, O out.

The range decoder goes wrong for good at the first distribution that differs from the encoder's in one count. So
whatever leads to one is arithmetic of integers, the same on every machine, for every batch, in any order of summation.
They are carried in floats whose sums are exact, because NumPy hands those to a fast matrix product.
"""

import dataclasses
import functools
import hashlib
import json
from pathlib import Path

import numpy as np
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save

from stepjax.errors import CheckpointError
from stepjax.tofc.range_coder import TOTAL, FrequencyTables

FORMAT = "1"  # of the file and of the arithmetic below

# Fixed point. One stands for 1 / UNIT in activations, 1 / WEIGHT_UNIT in weights.
UNIT = 16
WEIGHT_UNIT = 32
LATENT_UNIT = 4
LIMIT = 127  # of weights, of the networks' inputs, and of hidden activations, which are not negative
MAX_LATENT = 15
MAX_MEAN = 1 << 14

NUM_SCALES = 64
SCALES = 0.05 * 640.0 ** (np.arange(NUM_SCALES) / (NUM_SCALES - 1))  # of a Laplace distribution, in steps
REACH = 7.6  # a table goes this many scales to both sides; beyond, one in 2000, a value is coded as an escape

NETWORKS = ("router", "analysis", "synthesis")


def shift_of(fan_in: int, unit_in: int, unit_out: int) -> int:
    """The binary digits that a layer drops from its sums, so that weights of variance 1 keep the variance."""
    return round(np.log2(WEIGHT_UNIT * unit_in / unit_out * fan_in**0.5))


def shifts_of(network: str, fan_in: int, hidden: int) -> tuple[int, int]:
    """Those of a network's two layers."""
    unit_in = 1 if network == "synthesis" else UNIT
    unit_out = LATENT_UNIT if network == "analysis" else UNIT
    # At least one, because half of what is dropped is added to round.
    return max(shift_of(fan_in, unit_in, UNIT), 1), max(shift_of(hidden, UNIT, unit_out), 1)


def frequencies(probabilities_V: np.ndarray) -> np.ndarray:
    """Positive counts [..., V] that add up to 65,536, in proportion to probabilities [..., V]."""
    probabilities_V = probabilities_V.astype(np.float64)
    probabilities_V = probabilities_V / probabilities_V.sum(axis=-1, keepdims=True)
    num_values = probabilities_V.shape[-1]
    counts_V = 1 + np.floor(probabilities_V * (TOTAL - num_values)).astype(np.int64)
    largest = np.argmax(counts_V, axis=-1)[..., None]
    missing = TOTAL - counts_V.sum(axis=-1, keepdims=True)
    np.put_along_axis(counts_V, largest, np.take_along_axis(counts_V, largest, axis=-1) + missing, axis=-1)
    return counts_V.astype(np.uint16)


def laplace_frequencies() -> tuple[np.ndarray, np.ndarray]:
    """Counts of the integers from -radius to radius and of the escape, scale after scale, and each scale's radius."""
    tables, radii = [], []
    for scale in SCALES:
        radius = int(np.ceil(REACH * scale))
        value = np.arange(1, radius + 1)
        side = 0.5 * np.exp(-(value - 0.5) / scale) * -np.expm1(-1 / scale)
        escape = np.exp(-(radius + 0.5) / scale)
        tables.append(frequencies(np.concatenate([side[::-1], [-np.expm1(-0.5 / scale)], side, [escape]])))
        radii.append(radius)
    return np.concatenate(tables), np.array(radii, np.int32)


class Layer:
    """floor((x w + b) / 2^shift + 1/2) of integers, exact: in float32 where no sum can reach 2^24, else in float64."""

    def __init__(self, weights_EIO: np.ndarray, bias_EO: np.ndarray, shift: int, largest_input: int):
        bias_EO = bias_EO.astype(np.int64) + (1 << (shift - 1))
        sums_EO = np.abs(weights_EIO).sum(axis=1, dtype=np.int64) * largest_input + np.abs(bias_EO)
        self.dtype = np.float32 if sums_EO.max() < 1 << 24 else np.float64
        self.weights_EIO, self.bias_EO = weights_EIO.astype(self.dtype), bias_EO.astype(self.dtype)
        self.factor = self.dtype(2.0**-shift)

    def __call__(self, x_NI: np.ndarray, expert: int) -> np.ndarray:
        y_NO = x_NI.astype(self.dtype, copy=False) @ self.weights_EIO[expert]
        y_NO += self.bias_EO[expert]
        y_NO *= self.factor
        return np.floor(y_NO, out=y_NO)


@dataclasses.dataclass(frozen=True, eq=False)
class Tables:
    """A frozen entropy model. `stepjax.tofc.hyperprior.freeze` makes it.

    Raises:
        CheckpointError: the arrays do not belong together.
    """

    arrays: dict[str, np.ndarray]
    origin: str = ""  # what else both ends must agree on, such as the encoder's weights and the size of views

    def __post_init__(self):
        try:
            self._check()
        except (KeyError, ValueError, IndexError, TypeError) as error:
            raise CheckpointError(f"entropy model: {error}; freeze it anew") from None

    @functools.cached_property
    def sha256(self) -> str:
        """Of all arrays and the origin, not of the file: the identity of the model, in hexadecimal."""
        digest = hashlib.sha256(json.dumps([FORMAT, self.origin]).encode())
        for name, array in sorted(self.arrays.items()):
            digest.update(json.dumps([name, array.dtype.str, array.shape]).encode())
            digest.update(np.ascontiguousarray(array).tobytes())
        return digest.hexdigest()

    @property
    def id(self) -> str:
        """The first four bytes of `sha256`, in hexadecimal: what a frame carries."""
        return self.sha256[:8]

    @property
    def features_id(self) -> str:
        """The first four bytes of the origin's SHA-256, in hexadecimal: what a frame of raw features carries."""
        return hashlib.sha256(self.origin.encode()).hexdigest()[:8]

    @property
    def channels(self) -> int:
        return len(self.arrays["offset"])

    @property
    def num_experts(self) -> int:
        return len(self.arrays["step"])

    @property
    def num_latents(self) -> int:
        return self.arrays["latent_frequencies"].shape[1]

    @functools.cached_property
    def latent_coder(self) -> FrequencyTables:
        """Table e Z + z is that of latent z of expert e."""
        return FrequencyTables([*self.arrays["latent_frequencies"].reshape(-1, 2 * MAX_LATENT + 1)])

    @functools.cached_property
    def value_coder(self) -> FrequencyTables:
        """Table l is that of scale l."""
        ends = np.cumsum(2 * self.arrays["radius"] + 2)
        return FrequencyTables(np.split(self.arrays["value_frequencies"], ends[:-1]))

    @functools.cached_property
    def layers(self) -> dict[str, tuple[Layer, Layer]]:
        """Both layers of every network."""
        found = {}
        for network in NETWORKS:
            largest = MAX_LATENT if network == "synthesis" else LIMIT
            parts = [self.arrays[f"{network}_{part}"] for part in ("weights1", "bias1", "weights2", "bias2", "shifts")]
            weights1, bias1, weights2, bias2, (shift1, shift2) = parts
            first = Layer(weights1, bias1, int(shift1), largest)
            found[network] = first, Layer(weights2, bias2, int(shift2), LIMIT)
        return found

    def network(self, name: str, x_NI: np.ndarray, expert: int = 0) -> np.ndarray:
        """The integers [N, O] that a network of an expert makes of integers [N, I], as floats."""
        first, second = self.layers[name]
        return second(np.clip(first(x_NI, expert), 0, LIMIT), expert)

    def save(self, path: str | Path) -> None:
        """Writes a safetensors file."""
        metadata = {"format": FORMAT, "origin": self.origin, "sha256": self.sha256}
        file = Path(path) if isinstance(path, str) else path
        file.write_bytes(save({name: np.ascontiguousarray(a) for name, a in self.arrays.items()}, metadata))

    @classmethod
    def load(cls, path: str | Path) -> "Tables":
        """Reads what `save` wrote.

        Raises:
            CheckpointError: the file is missing, damaged, or of another version.
        """
        try:
            with safe_open(path, "numpy") as file:
                metadata = file.metadata() or {}
                arrays = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118  (no mapping)
        except (OSError, SafetensorError) as error:
            raise CheckpointError(f"{path}: cannot be read: {error}") from None
        if metadata.get("format") != FORMAT:
            raise CheckpointError(f"{path}: format {metadata.get('format')}, not {FORMAT}; freeze the model anew")
        tables = cls(arrays, metadata.get("origin", ""))
        if tables.sha256 != metadata.get("sha256"):
            raise CheckpointError(f"{path}: its SHA-256 is not that of its contents; copy it again")
        return tables

    def _check(self) -> None:
        step_EC, latents_EZV = self.arrays["step"], self.arrays["latent_frequencies"]
        (E, C), (_, Z, _) = step_EC.shape, latents_EZV.shape
        R, H = self.arrays["router_bias1"].shape[1], self.arrays["analysis_bias1"].shape[1]
        shapes = {
            "offset": ("f4", (C,)),
            "spread": ("f4", (C,)),
            "step": ("f4", (E, C)),
            "latent_frequencies": ("u2", (E, Z, 2 * MAX_LATENT + 1)),
            "radius": ("i4", (NUM_SCALES,)),
            "value_frequencies": ("u2", (int(np.sum(2 * self.arrays["radius"] + 2)),)),
        }
        for name, experts, sizes in (
            ("router", 1, (C, R, E)),
            ("analysis", E, (C, H, Z)),
            ("synthesis", E, (Z, H, 2 * C)),
        ):
            for i in (1, 2):
                shapes[f"{name}_weights{i}"] = ("i1", (experts, sizes[i - 1], sizes[i]))
                shapes[f"{name}_bias{i}"] = ("i4", (experts, sizes[i]))
            shapes[f"{name}_shifts"] = ("i4", (2,))
        if self.arrays.keys() != shapes.keys():
            raise ValueError(f"arrays {sorted(self.arrays.keys() ^ shapes.keys())} are missing or unknown")
        for name, (kind, shape) in shapes.items():
            array = self.arrays[name]
            if array.dtype != np.dtype("<" + kind) or array.shape != shape:
                raise ValueError(f"{name} is {array.dtype}{list(array.shape)}, not {kind}{list(shape)}")
            if kind == "f4" and not (np.isfinite(array).all() and (name == "offset" or (array > 0).all())):
                raise ValueError(f"{name} is not finite, or not positive")
            if name.endswith("shifts") and not ((array >= 1) & (array <= 24)).all():
                raise ValueError(f"{name}={array.tolist()}: must be 1 to 24")
        if (self.arrays["radius"] < 1).any():
            raise ValueError("radius: must be positive")
        _ = self.latent_coder, self.value_coder

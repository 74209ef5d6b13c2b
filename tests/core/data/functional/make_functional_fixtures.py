"""What HistoEncoder 0.1.1 computes, for `test_functional.py` to compare with.

To make the files anew, run this script in an environment of its own, Python 3.11 with

    pip install "histoencoder==0.1.1" "numpy<2" openslide-bin

The tests take the encoders' weights and the images from here too, so that both sides compute with
the same numbers. These are made of a bit generator's raw output, which NumPy promises never to
change, and of single float32 operations, which are exact everywhere.
"""

from __future__ import annotations

import json
import tempfile
import zlib
from pathlib import Path

import numpy as np
import torch

FOLDER = Path(__file__).parent
OUTPUTS = "outputs.npz"
PARAMETERS = "parameters.json"
FILES = "files.json"

ARCHITECTURES = {
    "prostate_small": "xcit_small_12_p16_224",
    "prostate_medium": "xcit_medium_24_p16_224",
}
IMAGE_SHAPES = {"square": (2, 3, 224, 224), "oblong": (2, 3, 96, 160)}
EXTRACTIONS = [
    *(
        (model, "square", num_blocks, avg_pool)
        for model in ARCHITECTURES
        for num_blocks in (1, 2, 3)
        for avg_pool in (False, True)
    ),
    ("prostate_small", "oblong", 2, True),
    ("prostate_small", "oblong", 14, False),
]
FREEZES: list[dict[str, object]] = [
    {},
    {"num_liquid": 1},
    {"num_liquid": 2, "freeze_layer_norm": False},
    {"num_liquid": 5, "freeze_last_mlp_layer": True},
    {"freeze_last_mlp_layer": True},
    {
        "num_liquid": 1,
        "freeze_cls_token": False,
        "freeze_patch_embed": False,
        "freeze_pos_embed": False,
        "freeze_last_mlp_layer": True,
    },
    {"num_liquid": 14},
    {"num_liquid": 26},
    {"num_liquid": 100},
]
GROUPINGS: list[tuple[dict[str, object] | None, dict[str, object]]] = [
    (None, {}),
    (None, {"lr": 0.02, "weight_decay": 0.3, "lr_decay": 0.9, "filter_1d": False}),
    (None, {"lr_decay": 1.0}),
    ({"num_liquid": 3, "freeze_layer_norm": False}, {"lr": 0.0005}),
]
TILE_NAMES = [
    "x0_y0_w256_h256.jpeg",
    "x256_y0_w256_h256.jpeg",
    "x0_y512_w256_h128.jpeg",
    "x7_y13_w256_h256.jpeg",
    "x1024_y2048_w256_h256.jpeg",
]


def key(model: str, images: str, num_blocks: int, avg_pool: bool) -> str:
    """Name of an extraction's array in the file of outputs."""
    return f"{model}/{images}/{num_blocks}{'+avg' if avg_pool else ''}"


def seeded_images(name: str) -> torch.Tensor:
    """Coloured squares with noise: float32 in [-2, 2), about the range of normalised images."""
    batch, channels, height, width = IMAGE_SHAPES[name]
    squares = _uniform(f"squares/{name}", (batch, channels, height // 32, width // 32))
    noise = _uniform(f"noise/{name}", (batch, channels, height, width))
    return torch.from_numpy(squares.repeat(32, axis=2).repeat(32, axis=3) + noise)


def seeded_state(model: torch.nn.Module) -> dict[str, torch.Tensor]:
    """Weights for a model, each drawn by its name, of sizes that keep all blocks at work."""
    return {
        name: torch.from_numpy(_weight(name, tuple(tensor.shape)))
        for name, tensor in model.state_dict().items()
    }


def checksum(state: dict[str, torch.Tensor]) -> int:
    """CRC-32 of weights in their order."""
    crc = 0
    for tensor in state.values():
        crc = zlib.crc32(tensor.numpy().tobytes(), crc)
    return crc


def _weight(name: str, shape: tuple[int, ...]) -> np.ndarray:
    if name.endswith("num_batches_tracked"):
        return np.zeros(shape, np.int64)
    uniform = _uniform(name, shape)
    if name.endswith("running_var"):
        return 1 + uniform / 2
    if "gamma" in name:
        return (2 + uniform) / 8
    if name.endswith("temperature") or (name.endswith("weight") and len(shape) == 1):
        return 1 + uniform / 4
    if len(shape) == 1:
        return uniform / 8
    if name == "cls_token":
        return uniform
    fan_in = int(np.prod(shape[1:]))
    # A uniform number in [-1, 1) has the variance 1/3.
    return uniform * np.float32(np.sqrt(3 / fan_in))


def _uniform(name: str, shape: tuple[int, ...]) -> np.ndarray:
    raw = np.random.PCG64(zlib.crc32(name.encode())).random_raw(int(np.prod(shape)))
    # The highest 24 bits, as many as a float32 holds.
    whole = (raw >> np.uint64(40)).astype(np.float32)
    return (whole * np.float32(2.0**-23) - np.float32(1)).reshape(shape)


def _create(model: str) -> torch.nn.Module:
    from timm.models import xcit

    encoder = getattr(xcit, ARCHITECTURES[model])(num_classes=0)
    encoder.load_state_dict(seeded_state(encoder))
    return encoder.eval()


def _make_outputs() -> dict[str, int]:
    from histoencoder import functional

    encoders = {model: _create(model) for model in ARCHITECTURES}
    arrays = {}
    with torch.no_grad():
        for model, images, num_blocks, avg_pool in EXTRACTIONS:
            features = functional.extract_features(
                encoders[model], seeded_images(images), num_blocks=num_blocks, avg_pool=avg_pool
            )
            arrays[key(model, images, num_blocks, avg_pool)] = features.numpy()
    np.savez(FOLDER / OUTPUTS, **arrays)
    return {model: checksum(encoder.state_dict()) for model, encoder in encoders.items()}


def _make_parameters() -> dict[str, object]:
    from histoencoder import functional

    content: dict[str, object] = {}
    for model in ARCHITECTURES:
        encoder = _create(model)
        numbers = {id(parameter): i for i, parameter in enumerate(encoder.parameters())}
        groups, frozen = [], []
        for freeze, options in GROUPINGS:
            encoder.requires_grad_(True)
            if freeze is not None:
                functional.freeze_encoder(encoder, **freeze)
            found = functional.get_parameter_groups(encoder, **options)
            for group in found:
                group["params"] = [numbers[id(parameter)] for parameter in group["params"]]
            groups.append(found)
        for freeze in FREEZES:
            encoder.requires_grad_(True)
            functional.freeze_encoder(encoder, **freeze)
            frozen.append(
                [
                    i
                    for i, parameter in enumerate(encoder.parameters())
                    if not parameter.requires_grad
                ]
            )
        content[model] = {
            "names": [name for name, _ in encoder.named_parameters()],
            "groups": groups,
            "frozen": frozen,
        }
    return content


def _make_files() -> list[dict[str, object]]:
    """What `save_features` of 0.1.1 writes for HistoPrep's tiles, apart from the features."""
    import polars as pl
    from histoencoder import functional
    from histoprep.utils import TileImageDataset
    from PIL import Image
    from torch.utils.data import DataLoader

    encoder = _create("prostate_small")
    cases = []
    for max_samples in (None, 2, 4, 100):
        with tempfile.TemporaryDirectory() as name:
            folder = Path(name)
            for tile in TILE_NAMES:
                Image.new("RGB", (32, 32)).save(folder / tile)
            dataset = TileImageDataset(
                [folder / tile for tile in TILE_NAMES],
                transform=lambda image: torch.zeros(3, 32, 32) + float(image.max()),
            )
            output = folder / "output"
            functional.save_features(
                encoder, output, DataLoader(dataset, 2), max_samples=max_samples
            )
            files = {}
            for path in sorted(output.iterdir()):
                table = pl.read_parquet(path)
                origin = table.select([c for c in table.columns if not c.startswith("feat")])
                relative = [Path(text).name for text in origin["path"]]
                files[path.name] = {
                    "columns": table.columns[:8],
                    "types": [str(kind) for kind in table.dtypes[:8]],
                    "rows": origin.with_columns(pl.Series("path", relative)).rows(),
                }
            cases.append({"max_samples": max_samples, "files": files})
    return cases


def main() -> None:
    """Write the files beside this script."""
    parameters = _make_parameters()
    parameters["checksums"] = _make_outputs()
    for name, content in ((PARAMETERS, parameters), (FILES, _make_files())):
        text = json.dumps(content, separators=(",", ":"))
        # One group or case a line, for differences that people can read.
        (FOLDER / name).write_text(text.replace("},{", "},\n{").replace("],[", "],\n[") + "\n")


if __name__ == "__main__":
    main()

from __future__ import annotations

import importlib.util
import json
import types
import warnings
from pathlib import Path
from typing import TYPE_CHECKING, Any

import duckdb
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from threadpoolctl import threadpool_limits  # type: ignore[import-untyped]
from timm.models import xcit
from torch.utils.data import DataLoader, Dataset, TensorDataset

from histoencoder_core import functional
from histoencoder_core.errors import WeightsError
from histoencoder_core.functional import models

if TYPE_CHECKING:
    from collections.abc import Iterator

FIXTURES = Path(__file__).parent / "data" / "functional"


def load_script() -> types.ModuleType:
    spec = importlib.util.spec_from_file_location(
        "make_functional_fixtures", FIXTURES / "make_functional_fixtures.py"
    )
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


script = load_script()


@pytest.fixture(scope="module", autouse=True)
def one_thread() -> Iterator[None]:
    """Threads that wait for each other on a busy machine take many times as long."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    with threadpool_limits(1):
        yield
    torch.set_num_threads(before)


def read_json(name: str) -> Any:
    return json.loads((FIXTURES / name).read_text("utf-8"))


@pytest.fixture(scope="module")
def parameters() -> dict[str, Any]:
    content: dict[str, Any] = read_json(script.PARAMETERS)
    return content


@pytest.fixture(scope="module", params=script.ARCHITECTURES)
def published(request: pytest.FixtureRequest) -> tuple[str, xcit.Xcit]:
    """Name of a published encoder, and that architecture with the fixtures' weights."""
    with torch.device("meta"):  # drawing weights that are replaced at once takes seconds
        encoder = getattr(xcit, script.ARCHITECTURES[request.param])(num_classes=0)
    encoder.load_state_dict(script.seeded_state(encoder), assign=True)
    return request.param, encoder.eval()


@pytest.fixture
def tiny() -> xcit.Xcit:
    """An encoder of 3 plain and 2 class-attention blocks, 32 channels, in training mode."""
    encoder = xcit.Xcit(img_size=32, embed_dim=32, depth=3, num_heads=4, num_classes=0)
    encoder.load_state_dict(script.seeded_state(encoder))
    return encoder.train()


def images(number: int = 5) -> torch.Tensor:
    values = np.random.default_rng(0).standard_normal((number, 3, 32, 48))
    return torch.from_numpy(values.astype(np.float32))


# --- The same numbers as 0.1.1


def test_weights_are_those_of_the_fixtures(
    published: tuple[str, xcit.Xcit], parameters: dict[str, Any]
) -> None:
    name, encoder = published
    assert script.checksum(encoder.state_dict()) == parameters["checksums"][name]


def test_features_equal_0_1_1(published: tuple[str, xcit.Xcit]) -> None:
    name, encoder = published
    with np.load(FIXTURES / script.OUTPUTS) as expected, torch.no_grad():
        for model, batch, num_blocks, avg_pool in script.EXTRACTIONS:
            if model != name:
                continue
            features = functional.extract_features(
                encoder,
                script.seeded_images(batch),
                num_blocks=num_blocks,
                avg_pool=avg_pool,
                legacy=num_blocks > 2,
            )
            wanted = expected[script.key(model, batch, num_blocks, avg_pool)]
            np.testing.assert_allclose(features.numpy(), wanted, rtol=0, atol=1e-5)


def test_parameter_groups_equal_0_1_1(
    published: tuple[str, xcit.Xcit], parameters: dict[str, Any]
) -> None:
    name, encoder = published
    names = {id(parameter): text for text, parameter in encoder.named_parameters()}
    for (freeze, options), wanted in zip(script.GROUPINGS, parameters[name]["groups"], strict=True):
        encoder.requires_grad_(True)
        if freeze is not None:
            functional.freeze_encoder(encoder, **freeze)
        groups = functional.get_parameter_groups(encoder, **options)
        assert [group.keys() for group in groups] == [group.keys() for group in wanted]
        for group, expected in zip(groups, wanted, strict=True):
            assert group["name"] == expected["name"]
            for key in ("lr", "lr_scale", "weight_decay"):
                assert group[key] == pytest.approx(expected[key], rel=1e-12)
            numbers = expected["params"]
            assert [names[id(p)] for p in group["params"]] == [
                parameters[name]["names"][i] for i in numbers
            ]


def test_frozen_parameters_equal_0_1_1(
    published: tuple[str, xcit.Xcit], parameters: dict[str, Any]
) -> None:
    name, encoder = published
    for options, numbers in zip(script.FREEZES, parameters[name]["frozen"], strict=True):
        encoder.requires_grad_(True)
        functional.freeze_encoder(encoder, **options)
        frozen = [text for text, p in encoder.named_parameters() if not p.requires_grad]
        assert frozen == [parameters[name]["names"][i] for i in numbers], options


@pytest.mark.parametrize("case", read_json(script.FILES), ids=lambda case: case["max_samples"])
def test_files_equal_0_1_1(case: dict[str, Any], tiny: xcit.Xcit, tmp_path: Path) -> None:
    loader = DataLoader(Tiles([tmp_path / name for name in script.TILE_NAMES]), batch_size=2)
    output = tmp_path / "output"
    functional.save_features(tiny, output, loader, max_samples=case["max_samples"])
    assert {path.name for path in output.iterdir()} == set(case["files"])
    polars_names = {"string": "Utf8", "int64": "Int64", "float": "Float32"}
    for name, wanted in case["files"].items():
        table = pq.read_table(output / name)
        assert table.column_names[:8] == wanted["columns"]
        assert [polars_names[str(kind)] for kind in table.schema.types[:8]] == wanted["types"]
        rows = [list(row.values()) for row in table.select(wanted["columns"][:5]).to_pylist()]
        assert rows == [[str(tmp_path / path), *place] for path, *place in wanted["rows"]]


# --- extract_features


def test_plain_blocks_are_averaged_unless_legacy(tiny: xcit.Xcit) -> None:
    tiny.eval()
    with torch.no_grad():
        new = functional.extract_features(tiny, images(), num_blocks=4)
        old = functional.extract_features(tiny, images(), num_blocks=4, legacy=True)
        _, outputs = tiny.forward_intermediates(images(), norm=True)
    assert new.shape == old.shape == (5, 4 * 32)
    for i, output in enumerate(outputs[1:]):
        torch.testing.assert_close(new[:, 32 * i : 32 * (i + 1)], output.mean(dim=(2, 3)))
        torch.testing.assert_close(old[:, 32 * i : 32 * (i + 1)], output[:, :, 0, 0])
    assert not torch.allclose(new[:, :64], old[:, :64], atol=0.1)
    assert torch.equal(new[:, 64:], old[:, 64:])


def test_class_tokens_are_those_of_timm(tiny: Any) -> None:
    tiny.eval()
    with torch.no_grad():
        features = functional.extract_features(tiny, images(), num_blocks=5, avg_pool=True)
        wanted = tiny.forward_features(images())
    assert features.shape == (5, 6 * 32)
    torch.testing.assert_close(features[:, -64:-32], wanted[:, 0])
    torch.testing.assert_close(features[:, -32:], wanted[:, 1:].mean(dim=1))


def test_gradients_flow(tiny: xcit.Xcit) -> None:
    loss: Any = functional.extract_features(tiny, images()).sum()
    loss.backward()
    assert tiny.cls_token.grad is not None


@pytest.mark.parametrize("num_blocks", [-1, 0, 6])
def test_number_of_blocks_is_checked(tiny: xcit.Xcit, num_blocks: int) -> None:
    with pytest.raises(ValueError, match=f"from 1 to the encoder's 5, not {num_blocks}"):
        functional.extract_features(tiny, images(), num_blocks=num_blocks)
    with pytest.raises(ValueError, match="num_blocks"):
        functional.yield_features(tiny, [images()], num_blocks=num_blocks)


def test_images_are_checked(tiny: xcit.Xcit) -> None:
    with pytest.raises(ValueError, match=r"shape \(B, 3, H, W\), not \(3, 32, 48\)"):
        functional.extract_features(tiny, images()[0])
    with pytest.raises(TypeError, match=r"torch\.uint8"):
        functional.extract_features(tiny, images().to(torch.uint8))


# --- create_encoder


def test_create_encoder_asks_the_features_stage(
    monkeypatch: pytest.MonkeyPatch, tiny: xcit.Xcit
) -> None:
    asked = []

    def create(name: str) -> torch.nn.Module:
        asked.append(name)
        if name == "prostate_medium":
            raise WeightsError("no weights")
        return tiny

    monkeypatch.setattr(models, "create_prostate_encoder", create)
    assert functional.create_encoder("Prostate_Small") is tiny
    with pytest.raises(WeightsError):
        functional.create_encoder("prostate_medium")
    assert asked == functional.list_encoders() == ["prostate_small", "prostate_medium"]


def test_unknown_encoder() -> None:
    with pytest.raises(ValueError, match="prostate_small"):
        functional.create_encoder("breast_small")


# --- yield_features


def modes(model: torch.nn.Module) -> list[bool]:
    return [module.training for module in model.modules()]


def test_batches_keep_their_form(tiny: xcit.Xcit) -> None:
    wanted = functional.extract_features(tiny.eval(), images())
    (alone,) = functional.yield_features(tiny, [images()])
    ((features, label, name),) = functional.yield_features(tiny, [[images(), 7, "a"]])
    (single,) = functional.yield_features(tiny, [(images(),)])
    assert isinstance(alone, torch.Tensor)
    assert isinstance(single, tuple)
    assert (label, name) == (7, "a")
    for found in (alone, features, single[0]):
        assert isinstance(found, torch.Tensor)
        assert torch.equal(found, wanted)
        assert not found.requires_grad


def test_options_reach_the_extraction(tiny: xcit.Xcit) -> None:
    options: dict[str, Any] = {"num_blocks": 4, "avg_pool": True, "legacy": True}
    (features,) = functional.yield_features(tiny.eval(), [images()], **options)
    assert isinstance(features, torch.Tensor)
    assert torch.equal(features, functional.extract_features(tiny, images(), **options))


def broken_loader() -> Iterator[torch.Tensor]:
    yield images()
    raise OSError("broken tile")


@pytest.mark.parametrize("how", ["exhausted", "stopped", "closed", "failed", "wrong batch"])
def test_former_modes_come_back(tiny: xcit.Xcit, how: str) -> None:
    tiny.blocks[0].eval()
    former = modes(tiny)
    assert len(set(former)) == 2
    if how == "exhausted":
        assert len(list(functional.yield_features(tiny, [images()] * 2))) == 2
    elif how == "stopped":
        for _ in functional.yield_features(tiny, [images()] * 2):
            assert not any(modes(tiny))
            break
    elif how == "closed":
        batches = functional.yield_features(tiny, [images()] * 2)
        next(batches)
        batches.close()
    elif how == "failed":
        with pytest.raises(OSError, match="broken tile"):
            list(functional.yield_features(tiny, broken_loader()))
    else:
        with pytest.raises(TypeError, match="first element"):
            list(functional.yield_features(tiny, [("a", images())]))
    assert modes(tiny) == former


def test_consumer_keeps_gradients(tiny: xcit.Xcit) -> None:
    for _ in functional.yield_features(tiny, [images()] * 2):
        assert torch.is_grad_enabled()


class Recorder(torch.nn.Module):
    def __init__(self, inner: torch.nn.Module) -> None:
        super().__init__()
        self.inner = inner
        self.seen: torch.Tensor | None = None

    def forward(self, tensor: torch.Tensor) -> Any:
        self.seen = tensor
        return self.inner(tensor)


def test_images_move_to_the_encoders_device(tiny: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    # The one other device that every machine has holds no data to bring back.
    monkeypatch.setattr(torch.Tensor, "cpu", lambda tensor: tensor)
    recorder = Recorder(tiny.patch_embed)
    tiny.patch_embed = recorder
    tiny.pos_embed = None  # timm makes the positions on the weights' device
    (features,) = functional.yield_features(tiny.to("meta"), [images()])
    assert recorder.seen is not None
    assert recorder.seen.device.type == "meta"
    assert isinstance(features, torch.Tensor)
    assert features.shape == (5, 32)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_features_of_a_gpu_come_back(tiny: xcit.Xcit) -> None:
    (wanted,) = functional.yield_features(tiny, [images()])
    (features,) = functional.yield_features(tiny.cuda(), [images()])
    assert isinstance(features, torch.Tensor)
    assert features.device.type == "cpu"
    torch.testing.assert_close(features, wanted, rtol=0, atol=1e-3)


def test_single_samples_are_refused(tiny: xcit.Xcit) -> None:
    dataset = TensorDataset(images())
    with pytest.raises(ValueError, match="batch_size"):
        functional.yield_features(tiny, DataLoader(dataset, batch_size=None))
    by_sampler = DataLoader(dataset, batch_sampler=[[0, 1], [2]])
    assert [len(features) for (features,) in functional.yield_features(tiny, by_sampler)] == [2, 1]


def test_other_models_and_batches_are_refused(tiny: xcit.Xcit) -> None:
    other: Any = torch.nn.Linear(2, 2)
    for function in (
        lambda: functional.yield_features(other, [images()]),
        lambda: functional.freeze_encoder(other),
        lambda: functional.get_parameter_groups(other),
    ):
        with pytest.raises(TypeError, match="Xcit, not Linear"):
            function()
    wrong: Any = [{"image": images()}]
    with pytest.raises(TypeError, match="tensor, list or tuple"):
        next(functional.yield_features(tiny, wrong))
    with pytest.raises(TypeError, match="first element"):
        next(functional.yield_features(tiny, [()]))


# --- save_features


class Tiles(Dataset[Any]):
    def __init__(self, paths: list[Path], extra: Any = None) -> None:
        self.paths = paths
        self.extra = extra

    def __len__(self) -> int:
        return len(self.paths)

    def __getitem__(self, index: int) -> tuple[Any, ...]:
        origin = str(self.paths[index]) if self.extra is None else self.extra(index)
        return images(len(self))[index], origin, index


def features_of(table: pa.Table) -> np.ndarray:
    names = [name for name in table.column_names if name.startswith("feat")]
    return np.stack([table[name].to_numpy() for name in names], axis=1)


@pytest.mark.parametrize("max_samples", [None, 1, 3, 5, 6])
def test_saved_features_come_back(tiny: xcit.Xcit, tmp_path: Path, max_samples: int | None) -> None:
    loader = DataLoader(TensorDataset(images()), batch_size=2)
    functional.save_features(
        tiny, tmp_path, loader, num_blocks=2, avg_pool=True, max_samples=max_samples
    )
    files = sorted(path.name for path in tmp_path.iterdir())
    rows = [pq.read_metadata(tmp_path / name).num_rows for name in files]
    assert (files, rows) == {
        None: (["features.parquet"], [5]),
        1: ([f"features_{i}.parquet" for i in range(1, 6)], [1] * 5),
        3: (["features_1.parquet", "features_2.parquet"], [3, 2]),
        5: (["features_1.parquet"], [5]),
        6: (["features.parquet"], [5]),
    }[max_samples]
    table = pa.concat_tables([pq.read_table(tmp_path / name) for name in files])
    assert table.column_names == [f"feat{i}" for i in range(1, 3 * 32 + 1)]
    with torch.no_grad():
        wanted = functional.extract_features(tiny.eval(), images(), num_blocks=2, avg_pool=True)
    np.testing.assert_allclose(features_of(table), wanted.numpy(), atol=1e-5)


def test_row_groups_are_written_as_they_fill(
    tiny: xcit.Xcit, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("histoencoder_core.functional.saving.ROW_GROUP_ROWS", 3)
    functional.save_features(tiny, tmp_path, DataLoader(TensorDataset(images(7)), batch_size=2))
    metadata = pq.read_metadata(tmp_path / "features.parquet")
    assert [metadata.row_group(i).num_rows for i in range(metadata.num_row_groups)] == [4, 3]


def test_names_without_a_place_give_nulls(tiny: xcit.Xcit, tmp_path: Path) -> None:
    names = ["x1_y2_w3_h4.png", "10A0_CRC.png", "xa_y2_w3_h4.png", "x1_y2_w3.png"]
    loader = DataLoader(Tiles([tmp_path / name for name in names]), batch_size=3)
    functional.save_features(tiny, tmp_path, loader)
    table = pq.read_table(tmp_path / "features.parquet")
    assert table["path"].to_pylist() == [str(tmp_path / name) for name in names]
    assert [table[name].to_pylist() for name in "xywh"] == [
        [number, None, None, None] for number in (1, 2, 3, 4)
    ]


@pytest.mark.parametrize(
    "origin",
    [
        lambda i: np.array([i, 1, 2, 3]),
        lambda i: torch.tensor([i, 1, 2, 3], dtype=torch.int32),
        lambda i: (i, 1, 2, 3),
    ],
)
def test_coordinates_become_columns(tiny: xcit.Xcit, tmp_path: Path, origin: Any) -> None:
    loader = DataLoader(Tiles([Path("a")] * 4, origin), batch_size=4)
    functional.save_features(tiny, tmp_path, loader)
    table = pq.read_table(tmp_path / "features.parquet")
    assert table.column_names[:5] == ["x", "y", "w", "h", "feat1"]
    assert table.schema.field("x").type == pa.int64()
    assert table["x"].to_pylist() == [0, 1, 2, 3]
    assert table["h"].to_pylist() == [3, 3, 3, 3]


@pytest.mark.parametrize(
    "origin",
    [
        lambda i: i,
        lambda i: torch.zeros(4),
        lambda i: torch.zeros(4, dtype=torch.bfloat16),
        lambda i: (1, 2, 3),
        lambda i: torch.zeros(2, 2, dtype=torch.int64),
        lambda i: {"label": i},
    ],
)
def test_other_extras_are_left_out(tiny: xcit.Xcit, tmp_path: Path, origin: Any) -> None:
    functional.save_features(
        tiny, tmp_path, DataLoader(Tiles([Path("a")] * 4, origin), batch_size=4)
    )
    names = pq.read_schema(tmp_path / "features.parquet").names
    assert names == [f"feat{i}" for i in range(1, 33)]


def test_paths_are_one_for_each_image_and_absolute(
    tiny: xcit.Xcit, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    loaders: dict[str, Any] = {
        "paths": [(images(2), [Path("tiles/a.png"), "b.png"])],
        "others": [(images(2), ["a.png", "b.png", "c.png"])],
    }
    for name, loader in loaders.items():
        functional.save_features(tiny, name, loader)
    table = pq.read_table("paths/features.parquet")
    assert table["path"].to_pylist() == [str(tmp_path / "tiles/a.png"), str(tmp_path / "b.png")]
    assert "path" not in pq.read_schema("others/features.parquet").names


def test_features_of_bfloat16_are_saved_as_float32(tiny: xcit.Xcit, tmp_path: Path) -> None:
    loader: Any = [images().bfloat16()]
    functional.save_features(tiny.bfloat16(), tmp_path, loader)
    assert pq.read_schema(tmp_path / "features.parquet").field("feat1").type == pa.float32()


def test_features_are_overwritten_only_if_asked(tiny: xcit.Xcit, tmp_path: Path) -> None:
    kept = ["metadata.parquet", "features.csv", "my_features.parquet", "features.parquet.bak"]
    for name in [*kept, "features_1.parquet", "features_99.parquet"]:
        (tmp_path / name).write_text("old")
    loader = DataLoader(TensorDataset(images()), batch_size=2)
    with pytest.raises(FileExistsError, match="overwrite=True"):
        functional.save_features(tiny, tmp_path, loader)
    assert (tmp_path / "features_1.parquet").read_text() == "old"
    functional.save_features(tiny, tmp_path, loader, max_samples=4, overwrite=True)
    found = {path.name for path in tmp_path.iterdir()}
    assert found == {*kept, "features_1.parquet", "features_2.parquet"}
    assert all((tmp_path / name).read_text() == "old" for name in kept)
    assert pq.read_metadata(tmp_path / "features_1.parquet").num_rows == 4


def test_failure_leaves_former_features(tiny: xcit.Xcit, tmp_path: Path) -> None:
    (tmp_path / "features.parquet").write_text("old")
    loader: Any = broken_loader()
    with pytest.raises(OSError, match="broken tile"):
        functional.save_features(tiny, tmp_path, loader, max_samples=2, overwrite=True)
    assert [path.name for path in tmp_path.iterdir()] == ["features.parquet"]
    assert (tmp_path / "features.parquet").read_text() == "old"
    assert tiny.training


def test_batches_that_differ_are_refused(tiny: xcit.Xcit, tmp_path: Path) -> None:
    loader: Any = [(images(1), ["x1_y2_w3_h4.png"]), (images(1), 7)]
    with pytest.raises(ValueError, match="differ in what they hold"):
        functional.save_features(tiny, tmp_path, loader)
    assert list(tmp_path.iterdir()) == []


def test_empty_loader_writes_nothing(tiny: xcit.Xcit, tmp_path: Path) -> None:
    loader: Any = []
    functional.save_features(tiny, tmp_path / "a" / "b", loader)
    assert list((tmp_path / "a" / "b").iterdir()) == []


def test_max_samples_is_checked(tiny: xcit.Xcit, tmp_path: Path) -> None:
    loader = DataLoader(TensorDataset(images()), batch_size=2)
    with pytest.raises(ValueError, match="max_samples"):
        functional.save_features(tiny, tmp_path, loader, max_samples=0)


def test_progress_bar(tiny: xcit.Xcit, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    loader = DataLoader(TensorDataset(images()), batch_size=2)
    functional.save_features(tiny, tmp_path / "quiet", loader)
    assert capsys.readouterr().err == ""
    functional.save_features(tiny, tmp_path / "verbose", loader, verbose=True, desc="features")
    err = capsys.readouterr().err
    assert "features" in err
    assert "3/3" in err


# --- cluster_features


class Stream:
    """What speaks Arrow and is nothing else."""

    def __init__(self, table: pa.Table) -> None:
        self.table = table

    def __arrow_c_stream__(self, requested_schema: object | None = None) -> object:
        return self.table.__arrow_c_stream__(requested_schema)


class Batch:
    def __init__(self, table: pa.Table) -> None:
        (self.batch,) = table.combine_chunks().to_batches()

    def __arrow_c_array__(self, requested_schema: object | None = None) -> Any:
        return self.batch.__arrow_c_array__(requested_schema)


@pytest.fixture(scope="module")
def matrix() -> np.ndarray:
    """200 rows around 4 centres in 6 dimensions."""
    rng = np.random.default_rng(0)
    centres = rng.standard_normal((4, 6)) * 10
    return (centres[np.arange(200) % 4] + rng.standard_normal((200, 6))).astype(np.float32)


def wide(matrix: np.ndarray) -> pa.Table:
    names = [f"feat{i + 1}" for i in range(matrix.shape[1])]
    table = pa.table([pa.array(column) for column in matrix.T], names=names)
    return table.add_column(0, "path", pa.array([f"{i}.png" for i in range(len(matrix))]))


def long(matrix: np.ndarray) -> pa.Table:
    lists = pa.FixedSizeListArray.from_arrays(pa.array(matrix.reshape(-1)), matrix.shape[1])
    chunked = pa.chunked_array([lists[:70], lists[70:]])
    return pa.table({"tile": pa.array(range(len(matrix))), "features": chunked})


def test_clusters_are_the_same_from_every_source(matrix: np.ndarray) -> None:
    wanted = functional.cluster_features(matrix, (2, 4))
    assert wanted.schema == pa.schema({"n_clusters=2": pa.int32(), "n_clusters=4": pa.int32()})
    labels = wanted["n_clusters=4"].to_numpy()
    assert sorted({tuple(labels[i::4]) for i in range(4)}) == [(i,) * 50 for i in range(4)]
    table = wide(matrix)
    sources: list[Any] = [
        torch.from_numpy(matrix).requires_grad_(),
        table,
        table.to_batches()[0],
        table.to_reader(),
        Stream(table),
        Batch(table),
        duckdb.from_arrow(table),
        long(matrix),
        Stream(long(matrix)),
        long(np.vstack([matrix[:10], matrix])).slice(10),
    ]
    for source in sources:
        assert functional.cluster_features(source, (2, 4)).equals(wanted), type(source)


def test_clusters_are_seeded(matrix: np.ndarray) -> None:
    noise = np.random.default_rng(1).standard_normal((300, 8))
    first = functional.cluster_features(noise, 16)
    np.random.seed(5)  # noqa: NPY002
    assert functional.cluster_features(noise, 16).equals(first)
    assert functional.cluster_features(noise, 16, random_state=0).equals(first)
    assert not functional.cluster_features(noise, 16, random_state=1).equals(first)
    k: Any = np.int64(16)
    assert functional.cluster_features(noise, k, n_init=1, batch_size=64).num_rows == 300


def test_numbers_of_clusters_that_are_too_large_are_left_out(matrix: np.ndarray) -> None:
    with pytest.warns(UserWarning, match="only 200 rows") as warned:
        clusters = functional.cluster_features(matrix, (200, 4, 1000, 8))
    assert [str(warning.message).split(":")[0] for warning in warned] == [
        "Left out 200 clusters",
        "Left out 1000 clusters",
    ]
    assert all(warning.filename == __file__ for warning in warned)
    assert clusters.column_names == ["n_clusters=4", "n_clusters=8"]
    with pytest.warns(UserWarning, match="Left out"):
        assert functional.cluster_features(matrix[:4]).num_columns == 0


def test_rows_without_features_have_no_cluster(matrix: np.ndarray) -> None:
    missing = np.arange(200) % 50 == 7
    wanted = functional.cluster_features(matrix[~missing], 4)["n_clusters=4"].to_pylist()
    lists = pa.array([None if m else row for m, row in zip(missing, matrix, strict=True)])
    for table in (
        pa.table({"features": lists.cast(pa.list_(pa.float32(), 6))}),
        wide(matrix).set_column(3, "feat3", pa.array(matrix[:, 2], mask=missing)),
    ):
        clusters = functional.cluster_features(table, 4)["n_clusters=4"].to_pylist()
        assert [cluster is None for cluster in clusters] == list(missing)
        assert [cluster for cluster in clusters if cluster is not None] == wanted


def test_saved_features_can_be_clustered(tiny: xcit.Xcit, tmp_path: Path) -> None:
    functional.save_features(tiny, tmp_path, DataLoader(TensorDataset(images(9)), batch_size=4))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        clusters = functional.cluster_features(pq.read_table(tmp_path / "features.parquet"), 3)
    assert clusters.num_rows == 9


@pytest.mark.parametrize(
    ("features", "error", "match"),
    [
        (np.zeros(3), ValueError, r"shape \(N, D\), not \(3,\)"),
        (torch.zeros(3, 2, 2), ValueError, "shape"),
        (np.full((9, 2), np.nan), ValueError, "NaN"),
        ([[1.0]], TypeError, "not list"),
        (pa.table({"x": [1.0]}), ValueError, "'feat'"),
        (pa.table({"feat1": ["a"]}), TypeError, "'feat1' to hold numbers, not string"),
    ],
)
def test_features_are_checked(features: Any, error: type[Exception], match: str) -> None:
    with pytest.raises(error, match=match):
        functional.cluster_features(features, 2)


# --- Training


def test_freezing_a_negative_number_is_refused(tiny: xcit.Xcit) -> None:
    with pytest.raises(ValueError, match="num_liquid"):
        functional.freeze_encoder(tiny, -1)


def test_head_stays_liquid() -> None:
    encoder = xcit.Xcit(img_size=32, embed_dim=32, depth=1, num_heads=4, num_classes=2)
    functional.freeze_encoder(encoder, freeze_last_mlp_layer=True)
    liquid = [name for name, p in encoder.named_parameters() if p.requires_grad]
    assert liquid == ["head.weight", "head.bias"]
    groups = functional.get_parameter_groups(encoder)
    assert [group["name"] for group in groups] == ["params_4_decay", "params_4_no_decay"]
    assert [group["lr"] for group in groups] == [0.001, 0.001]


@pytest.mark.parametrize("lr_decay", [0, -0.5, 1.01])
def test_lr_decay_is_checked(tiny: xcit.Xcit, lr_decay: float) -> None:
    with pytest.raises(ValueError, match="lr_decay"):
        functional.get_parameter_groups(tiny, lr_decay=lr_decay)


def test_updates_respect_scales_and_names(tiny: xcit.Xcit) -> None:
    head = torch.nn.Linear(32, 2)
    groups = functional.get_parameter_groups(tiny, lr=0.1, weight_decay=0.2)
    optimizer = torch.optim.AdamW([*groups, {"params": head.parameters()}], lr=0.1)
    functional.update_lr(optimizer, 0.5)
    functional.update_weight_decay(optimizer, 0.3)
    *encoder_groups, head_group = optimizer.param_groups
    assert (head_group["lr"], head_group["weight_decay"]) == (0.5, 0.3)
    for group in encoder_groups:
        assert group["lr"] == pytest.approx(0.5 * group["lr_scale"])
        assert group["weight_decay"] == (0.0 if "no_decay" in group["name"] else 0.3)
    assert {group["weight_decay"] for group in encoder_groups} == {0.0, 0.3}

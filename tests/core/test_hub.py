"""Models that are fetched or put by hand: what they need, and what is told of those that misfit."""

from __future__ import annotations

import json
import logging
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import huggingface_hub.constants
import numpy as np
import pytest
import timm
import torch
from safetensors.torch import save_file

from histoencoder_core.errors import SettingsError, WeightsError
from histoencoder_core.features import Encoder, Runner, encoders, hub, load_encoder
from histoencoder_core.settings import EncoderSettings

TOKENS = {"embed_dim": 24, "depth": 1, "num_heads": 3, "reg_tokens": 4, "global_pool": ""}
"""Of a transformer that gives a class token, four registers and four patches of 24 channels."""

PUBLISHED: dict[str, tuple[str, dict[str, Any], int, int]] = {
    "MahmoodLab/UNI": ("vit_large_patch16_224", {}, 1024, 224),
    "MahmoodLab/UNI2-h": ("vit_giant_patch14_224", {}, 1536, 224),
    "paige-ai/Virchow": (
        "vit_huge_patch14_224",
        {"mlp_ratio": 5.3375, "init_values": 1e-5, "global_pool": ""},
        2560,
        224,
    ),
    "paige-ai/Virchow2": (
        "vit_huge_patch14_224",
        {"mlp_ratio": 5.3375, "init_values": 1e-5, "global_pool": "", "reg_tokens": 4},
        2560,
        224,
    ),
    "bioptimus/H0-mini": ("vit_base_patch14_reg4_dinov2", {"global_pool": ""}, 1536, 518),
    "Wangyh/mSTAR": ("vit_large_patch16_224", {}, 1024, 224),
    "xtxx/Digepath": ("vit_large_patch16_224", {}, 1024, 224),
    "1aurent/vit_small_patch16_224.transpath_mocov3": ("vit_small_patch16_224", {}, 384, 224),
    "1aurent/vit_small_patch16_224.lunit_dino": ("vit_small_patch16_224", {}, 384, 224),
    "1aurent/vit_small_patch8_224.lunit_dino": ("vit_small_patch8_224", {}, 384, 224),
}
"""Networks, what their configurations state, and the length and input size that come out."""


class Hub:
    """The hub's cache, with made-up models; nothing else can be reached."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def publish(
        self,
        name: str,
        weights: Mapping[str, torch.Tensor],
        *,
        architecture: str = "vit_tiny_patch16_224",
        size: int = 32,
        **model_args: Any,
    ) -> str:
        repository = self.folder / f"models--{name.replace('/', '--')}"
        snapshot = repository / "snapshots" / ("0" * 40)
        snapshot.mkdir(parents=True)
        (repository / "refs").mkdir()
        (repository / "refs" / "main").write_text("0" * 40)
        pretrained_cfg = {
            "input_size": [3, size, size],
            "fixed_input_size": True,
            "mean": [0.1, 0.2, 0.3],
            "std": [0.4, 0.5, 0.6],
            "num_classes": 0,
            "first_conv": "patch_embed.proj",
            "classifier": "head",
        }
        config = {
            "architecture": architecture,
            "num_classes": 0,
            "model_args": model_args,
            "pretrained_cfg": pretrained_cfg,
        }
        (snapshot / "config.json").write_text(json.dumps(config))
        save_file(dict(weights), snapshot / "model.safetensors")
        return f"hf-hub:{name}"


@pytest.fixture
def fake_hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Hub:
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path / "hub"))
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    return Hub(tmp_path / "hub")


def known(monkeypatch: pytest.MonkeyPatch, name: str, *args: Any, **needs: Any) -> None:
    monkeypatch.setattr(hub, "KNOWN", {name: hub.HubModel(*args, **needs)})


def network(size: int = 32, **arguments: Any) -> torch.nn.Module:
    """A small transformer whose every weight is drawn, also those that start as ones or zeros."""
    torch.manual_seed(3)
    module = timm.create_model(
        "vit_tiny_patch16_224", num_classes=0, img_size=size, **{**TOKENS, **arguments}
    )
    for parameter in module.parameters():
        torch.nn.init.normal_(parameter, std=0.2)
    return module.eval()


def load(name: str, folder: Path, **settings: Any) -> Encoder:
    return load_encoder(EncoderSettings(name=name, **settings), weights_folder=folder)


def features(module: torch.nn.Module, images: torch.Tensor) -> torch.Tensor:
    with torch.inference_mode():
        return module(images)


def test_tokens_become_the_class_token_and_the_mean_of_the_patches(
    fake_hub: Hub, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    module = network()
    name = fake_hub.publish("org/tokens", module.state_dict(), **TOKENS)
    with pytest.raises(SettingsError, match=r"an array of shape \(1, 9, 24\), not a vector"):
        load(name, tmp_path)
    known(monkeypatch, "org/tokens", pooling="class_and_patches")
    encoder = load(name, tmp_path)
    images = torch.randn(2, 3, 32, 32)
    tokens = features(module, images)
    got = features(encoder.module, images)
    assert (encoder.length, got.shape) == (48, (2, 48))
    assert torch.equal(got[:, :24], tokens[:, 0])
    torch.testing.assert_close(got[:, 24:], tokens[:, 5:].mean(dim=1))  # without the registers


def test_the_pooling_can_be_traced(
    fake_hub: Hub, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    known(monkeypatch, "org/tokens", pooling="class_and_patches")
    encoder = load(fake_hub.publish("org/tokens", network().state_dict(), **TOKENS), tmp_path)
    tiles = [np.random.default_rng(1).integers(256, size=(32, 32, 3), dtype=np.uint8)]
    eager, traced = (
        Runner(encoder, device="cpu", backend=backend, batch_size=1).encode(tiles)  # type: ignore[arg-type]
        for backend in ("eager", "openvino")
    )
    np.testing.assert_allclose(traced, eager, rtol=1e-4, atol=1e-5)


def test_arguments_reach_the_network(
    fake_hub: Hub, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    module = network(global_pool="token", init_values=0.1, act_layer=torch.nn.SiLU)
    plain = {**TOKENS, "global_pool": "token"}
    name = fake_hub.publish("org/scaled", module.state_dict(), **plain)
    with pytest.raises(WeightsError, match=r"do not fit the network.*blocks\.0\.ls1\.gamma"):
        load(name, tmp_path)
    known(monkeypatch, "org/scaled", {"init_values": 1e-5, "act_layer": "SiLU"})
    encoder = load(name, tmp_path)
    images = torch.randn(1, 3, 32, 32)
    assert torch.equal(features(encoder.module, images), features(module, images))
    assert (encoder.mean, encoder.std) == ((0.1, 0.2, 0.3), (0.4, 0.5, 0.6))


def test_heads_that_leave_the_shapes_alone_are_another_encoder(
    fake_hub: Hub, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    plain = {**TOKENS, "global_pool": "token"}
    name = fake_hub.publish("org/heads", network().state_dict(), **plain)
    without = load(name, tmp_path)
    assert "recipe" not in without.made_from("float32")
    known(monkeypatch, "org/heads", {"num_heads": 12})
    encoder = load(name, tmp_path)
    assert encoder.made_from("float32")["recipe"] == {"arguments": {"num_heads": 12}}
    assert encoder.weights_sha256 == without.weights_sha256
    images = torch.randn(1, 3, 32, 32)
    assert not torch.allclose(features(encoder.module, images), features(without.module, images))
    module = network(num_heads=12, global_pool="token")
    assert torch.equal(features(encoder.module, images), features(module, images))


def test_a_configuration_that_states_another_input(
    fake_hub: Hub, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    plain = {**TOKENS, "global_pool": "token"}
    name = fake_hub.publish("org/large", network(64).state_dict(), size=64, **plain)
    assert load(name, tmp_path).native_size == 64
    scale = ((0.5, 0.5, 0.5), (0.25, 0.25, 0.25))
    known(monkeypatch, "org/large", normalisation=scale, input_size=32)
    encoder = load(name, tmp_path)
    assert (encoder.input_size, encoder.native_size) == (32, 32)
    assert (encoder.mean, encoder.std) == scale
    made_from = encoder.made_from("float32")
    assert made_from["normalisation"] == {"mean": [0.5] * 3, "std": [0.25] * 3}
    assert "recipe" not in made_from
    assert load(name, tmp_path, input_size=48).input_size == 48


def test_other_names_for_what_is_known() -> None:
    for name in ("MahmoodLab/UNI", "MahmoodLab/uni", "mahmoodlab/UNI@main"):
        assert hub.known(f"hf-hub:{name}") is hub.KNOWN["MahmoodLab/UNI"]
    for name in ("hf-hub:MahmoodLab/UNI3", "timm:MahmoodLab/UNI", "MahmoodLab/UNI"):
        assert hub.known(name) == hub.HubModel()


@pytest.mark.parametrize("name", PUBLISHED)
def test_the_needs_that_are_known_make_a_network_of_the_published_shape(name: str) -> None:
    architecture, stated, length, size = PUBLISHED[name]
    needs = hub.KNOWN[name]
    with torch.device("meta"):
        module = timm.create_model(
            architecture, num_classes=0, **{**stated, **needs.keywords, "depth": 1}
        ).eval()
        if needs.pooling:
            module = hub.ClassAndPatches(module)
        assert module(torch.empty(1, 3, size, size)).shape == (1, length)
    json.dumps(needs.recipe)


def test_every_known_model_is_accounted_for() -> None:
    rest = [name for name in hub.KNOWN if name not in PUBLISHED]
    assert all(name.endswith(".kaiko_ai_towards_large_pathology_fms") for name in rest)
    assert all(hub.KNOWN[name].recipe == {} for name in rest)


def test_a_model_that_is_not_there(fake_hub: Hub, tmp_path: Path) -> None:
    with pytest.raises(WeightsError, match=r"org/none could not be had .*fill the hub's cache"):
        load("hf-hub:org/none", tmp_path)


def test_a_repository_of_another_library(fake_hub: Hub, tmp_path: Path) -> None:
    name = fake_hub.publish("org/other", {}, architecture="Dinov2Model")
    with pytest.raises(WeightsError, match=r"org/other do not fit .*docs/encoders\.md"):
        load(name, tmp_path)


@pytest.mark.parametrize(
    "name",
    ["untrained:xcit_nano_12_p16_224", "timm:xcit_nano_12_p16_224", "prostate_small"],
)
def test_a_size_and_blocks_that_a_network_does_not_have(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    small = {"depth": 1, "cls_attn_layers": 1}
    create = timm.create_model
    monkeypatch.setattr(encoders.timm, "create_model", lambda n, **kw: create(n, **kw, **small))
    architecture = encoders.ARCHITECTURES.get(name, "xcit_nano_12_p16_224")
    state = create(architecture, num_classes=0, **small).state_dict()
    stem = name if name in encoders.ARCHITECTURES else "timm_xcit_nano_12_p16_224"
    save_file(state, tmp_path / f"{stem}.safetensors")
    with pytest.raises(SettingsError, match=r"can't take tiles of 225 px: .*patch_size"):
        load(name, tmp_path, input_size=225)
    with pytest.raises(SettingsError, match=f"{name}: num_blocks must be .* encoder's 2, not 3"):
        load(name, tmp_path, num_blocks=3)
    assert load(name, tmp_path, num_blocks=2, input_size=48).input_size == 48


@pytest.mark.parametrize("prefix", ["timm:", "untrained:"])
def test_a_hub_model_has_one_name(fake_hub: Hub, tmp_path: Path, prefix: str) -> None:
    name = fake_hub.publish("org/tokens", network().state_dict(), **TOKENS)
    with pytest.raises(SettingsError, match="timm has no model 'hf-hub:org/tokens'"):
        load(f"{prefix}{name}", tmp_path)
    with pytest.raises(SettingsError, match=r"There is no encoder .* Write hf-hub:, not hf_hub:"):
        load("hf_hub:org/tokens", tmp_path)


# --- Files for networks of timm


def put(folder: Path, name: str, weights: Mapping[str, torch.Tensor]) -> None:
    save_file(dict(weights), folder / f"timm_{name}.safetensors")


@pytest.mark.parametrize(
    ("name", "kept"),
    [
        ("test_convnext", "head.norm.weight"),  # of what the network needs, though named head
        ("test_resnet", None),
        ("test_vit", None),
    ],
)
def test_a_file_with_its_classifier(tmp_path: Path, name: str, kept: str | None) -> None:
    torch.manual_seed(3)
    module = timm.create_model(name)
    put(tmp_path, name, module.state_dict())
    loaded = load(f"timm:{name}", tmp_path).module.state_dict()
    content = module.state_dict()
    assert all(torch.equal(value, content[key]) for key, value in loaded.items())
    left = content.keys() - loaded.keys()
    assert left
    assert all(key.startswith(("head.", "fc.")) for key in left)
    if kept is not None:
        assert kept in loaded
        put(tmp_path, name, {key: value for key, value in content.items() if key != kept})
        with pytest.raises(WeightsError, match=rf'does not fit.*Missing key.*"{kept}"'):
            load(f"timm:{name}", tmp_path)


def test_classifiers_of_other_names(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    create = timm.create_model

    def small(name: str, **arguments: Any) -> torch.nn.Module:
        return create(name, depth=1, embed_dim=24, **arguments)

    monkeypatch.setattr(encoders.timm, "create_model", small)
    name = "deit_tiny_distilled_patch16_224"
    torch.manual_seed(3)
    content = small(name).state_dict()
    assert "head_dist.weight" in content
    put(tmp_path, name, content)
    loaded = load(f"timm:{name}", tmp_path).module.state_dict()
    assert all(torch.equal(value, content[key]) for key, value in loaded.items())
    put(tmp_path, name, {**content, "neck.weight": torch.zeros(1)})
    with pytest.raises(WeightsError, match=r'Unexpected key.*"neck\.weight"'):
        load(f"timm:{name}", tmp_path)


def test_a_file_at_another_input_size_is_interpolated_as_timm_does(tmp_path: Path) -> None:
    torch.manual_seed(3)
    module = timm.create_model("test_vit", num_classes=0).eval()
    torch.nn.init.normal_(module.pos_embed)
    put(tmp_path, "test_vit", module.state_dict())
    wanted = timm.create_model(
        "test_vit",
        num_classes=0,
        img_size=96,
        pretrained=True,
        pretrained_cfg_overlay={"state_dict": module.state_dict(), "num_classes": 0},
    ).eval()
    encoder = load("timm:test_vit", tmp_path, input_size=96)
    images = torch.randn(1, 3, 96, 96)
    assert encoder.module.pos_embed.shape[1] < module.pos_embed.shape[1]
    assert torch.equal(features(encoder.module, images), features(wanted, images))
    assert (encoder.input_size, encoder.native_size) == (96, 160)
    put(tmp_path, "test_vit", wanted.state_dict())  # of the size that is asked for
    assert load("timm:test_vit", tmp_path, input_size=96).weights_sha256 == encoder.weights_sha256
    put(tmp_path, "test_vit", {**module.state_dict(), "pos_embed": torch.zeros(1, 5, 64)})
    with pytest.raises(WeightsError, match="size mismatch for pos_embed"):  # never made to fit
        load("timm:test_vit", tmp_path, input_size=96)


def test_a_file_that_can_not_be_resized(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.ERROR)
    module = timm.create_model("test_vit_relpos", num_classes=0)
    put(tmp_path, "test_vit_relpos", {**module.state_dict(), "more": torch.zeros(1)})
    with pytest.raises(WeightsError, match=r"than 96 px: .* leave the input size out"):
        load("timm:test_vit_relpos", tmp_path, input_size=96)


def test_code_in_a_file_from_the_hub_is_not_run(fake_hub: Hub, tmp_path: Path) -> None:
    module, ran = network(), tmp_path / "ran"
    name = fake_hub.publish("org/evil", module.state_dict(), img_size=32)
    (safe,) = fake_hub.folder.rglob("model.safetensors")
    safe.unlink()

    class Payload:
        def __reduce__(self) -> tuple[Any, ...]:
            return Path.touch, (ran,)

    torch.save({**module.state_dict(), "extra": Payload()}, safe.with_name("pytorch_model.bin"))
    with pytest.raises(WeightsError):
        load(name, tmp_path)
    assert not ran.exists()


def test_a_token_is_not_told_when_the_hub_fails(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    token = "hf_" + "t0ken" * 6
    monkeypatch.setenv("HF_TOKEN", token)

    def refuse(*args: Any, **kwargs: Any) -> None:
        raise OSError(f"401 for https://me:pw@hub/api?x=1 with {token}")

    monkeypatch.setattr(encoders.timm, "create_model", refuse)
    with pytest.raises(WeightsError) as told:
        load("hf-hub:org/gated", tmp_path)
    assert "401 for https://hub/api" in str(told.value)
    assert token not in str(told.value)
    assert "pw" not in str(told.value)

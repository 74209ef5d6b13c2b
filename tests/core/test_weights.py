"""Weights: where they come from, and what is never taken for weights."""

from __future__ import annotations

import base64
import functools
import hashlib
import http.client
import http.server
import logging
import pickle
import socket
import threading
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import timm
import torch

from histoencoder_core.errors import WeightsError
from histoencoder_core.features import Runner, encoders, load_encoder, weights
from histoencoder_core.settings import EncoderSettings, PlatformSettings

SMALL = "xcit_nano_12_p16_224"
"""As `prostate_small`, but a tenth of its size."""


class Mirror:
    """A web server of weights; what is asked of it is written down."""

    def __init__(self) -> None:
        self.files: dict[str, bytes] = {}
        self.short_by = 0
        self.asked: list[str] = []
        self.authorised: list[str | None] = []
        self.redirect: str | None = None
        self.server = http.server.ThreadingHTTPServer(
            ("127.0.0.1", 0), functools.partial(_Handler, mirror=self)
        )
        self.url = f"http://127.0.0.1:{self.server.server_address[1]}/weights/"
        self.thread = threading.Thread(target=self.server.serve_forever, args=(0.01,), daemon=True)
        self.thread.start()

    def close(self) -> None:
        self.server.shutdown()
        self.server.server_close()
        self.thread.join()


class _Handler(http.server.BaseHTTPRequestHandler):
    def __init__(self, *args, mirror: Mirror) -> None:
        self.mirror = mirror
        super().__init__(*args)

    def do_GET(self) -> None:
        self.mirror.asked.append(self.path)
        self.mirror.authorised.append(self.headers.get("Authorization"))
        if self.mirror.redirect is not None:
            self.send_response(302)
            self.send_header("Location", self.mirror.redirect)
            self.end_headers()
            return
        content = self.mirror.files.get(self.path)
        if content is None:
            self.send_error(404)
            return
        self.send_response(200)
        self.send_header("Content-Length", str(len(content)))
        self.end_headers()
        self.wfile.write(content[: len(content) - self.mirror.short_by])

    def log_message(self, *args) -> None:
        pass


@pytest.fixture
def mirror() -> Iterator[Mirror]:
    server = Mirror()
    yield server
    server.close()


@pytest.fixture(autouse=True)
def nothing_published(monkeypatch: pytest.MonkeyPatch) -> None:
    """The published addresses lead to a port of this machine that nobody listens at."""
    with socket.socket() as unused:
        unused.bind(("127.0.0.1", 0))
        port = unused.getsockname()[1]
    for name in weights.PUBLISHED:
        monkeypatch.setitem(weights.PUBLISHED, name, f"http://127.0.0.1:{port}/{name}.pth")
    for proxy in ("http_proxy", "HTTP_PROXY", "all_proxy", "ALL_PROXY"):
        monkeypatch.delenv(proxy, raising=False)


@pytest.fixture(scope="module")
def published(tmp_path_factory: pytest.TempPathFactory) -> tuple[bytes, torch.nn.Module]:
    """A model and its weights as HistoEncoder publishes them."""
    torch.manual_seed(5)
    module = timm.create_model(SMALL, num_classes=0).eval()
    path = tmp_path_factory.mktemp("published") / "prostate_small.pth"
    torch.save(module.state_dict(), path)
    return path.read_bytes(), module


def test_a_mirror_comes_before_the_published_address(
    tmp_path: Path, mirror: Mirror, monkeypatch: pytest.MonkeyPatch
) -> None:
    other = Mirror()
    try:
        monkeypatch.setitem(weights.PUBLISHED, "prostate_small", f"{other.url}p.pth")
        mirror.files["/weights/prostate_small.pth"] = b"from the mirror"
        other.files["/weights/p.pth"] = b"as published"
        fetch = functools.partial(
            weights.prostate_weights, "prostate_small", folder=tmp_path / "w", mirror=mirror.url
        )
        assert fetch() == tmp_path / "w" / "prostate_small.pth"
        assert fetch().read_bytes() == b"from the mirror"
        assert mirror.asked == ["/weights/prostate_small.pth"]  # once, then it is at hand
        assert other.asked == []
        fetch().unlink()
        mirror.files.clear()
        assert fetch().read_bytes() == b"as published"
    finally:
        other.close()


@pytest.mark.parametrize("suffix", [".pth", ".safetensors"])
def test_a_file_at_hand_is_taken_without_asking(
    tmp_path: Path, mirror: Mirror, suffix: str
) -> None:
    local = tmp_path / f"prostate_medium{suffix}"
    local.write_bytes(b"mine")
    found = weights.prostate_weights("prostate_medium", folder=tmp_path, mirror=mirror.url)
    assert (found, mirror.asked) == (local, [])


def test_a_download_cut_short_is_not_kept(tmp_path: Path, mirror: Mirror) -> None:
    mirror.files["/weights/prostate_small.pth"] = bytes(300_000)
    mirror.short_by = 1
    with pytest.raises(WeightsError, match="got 299999 of 300000 bytes"):
        weights.prostate_weights("prostate_small", folder=tmp_path, mirror=mirror.url)
    assert [path.name for path in tmp_path.iterdir()] == [".prostate_small.lock"]


@pytest.mark.parametrize(
    "reply",
    [b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n400\r\nhalf", b"SSH-2.0\r\n"],
    ids=["cut-short", "another-protocol"],
)
def test_an_address_that_does_not_answer_as_the_web_does(tmp_path: Path, reply: bytes) -> None:
    with socket.create_server(("127.0.0.1", 0)) as server:

        def answer() -> None:
            connection, _ = server.accept()
            with connection:
                connection.recv(4096)
                connection.sendall(reply)

        thread = threading.Thread(target=answer)
        thread.start()
        url = f"http://127.0.0.1:{server.getsockname()[1]}"
        try:
            with pytest.raises(WeightsError, match=url):
                weights.prostate_weights("prostate_small", folder=tmp_path, mirror=url)
        finally:
            thread.join()
    assert [path.name for path in tmp_path.iterdir()] == [".prostate_small.lock"]


def test_weights_that_are_nowhere_to_be_had(tmp_path: Path, mirror: Mirror) -> None:
    with pytest.raises(WeightsError) as caught:
        weights.prostate_weights("prostate_small", folder=tmp_path / "w", mirror=mirror.url)
    told = str(caught.value)
    for part in (
        f"{mirror.url}prostate_small.pth: HTTP Error 404",
        weights.PUBLISHED["prostate_small"],
        str(tmp_path / "w" / "prostate_small.pth"),
        "HISTOENCODER_WEIGHTS_URL",
    ):
        assert part in told


def test_an_encoder_has_exactly_the_weights_of_the_file(
    tmp_path: Path,
    mirror: Mirror,
    published: tuple[bytes, torch.nn.Module],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    content, module = published
    monkeypatch.setitem(encoders.ARCHITECTURES, "prostate_small", SMALL)
    mirror.files["/weights/prostate_small.pth"] = content
    encoder = load_encoder(EncoderSettings(), weights_folder=tmp_path, weights_url=mirror.url)
    for name, value in module.state_dict().items():
        assert torch.equal(encoder.module.state_dict()[f"xcit.{name}"], value)
    assert not encoder.untrained
    assert encoder.weights_sha256 == weights.state_dict_sha256(module)
    runner = Runner(encoder, device="cpu", backend="eager")
    assert np.isfinite(runner.encode([np.full((64, 64, 3), 200, np.uint8)])).all()


class Payload:
    """What a pickle may do when it is loaded."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self):
        return Path.touch, (self.path,)


@pytest.mark.parametrize("legacy", [True, False])
def test_a_file_with_code_is_refused_and_the_code_not_run(tmp_path: Path, legacy: bool) -> None:
    path, ran = tmp_path / "evil.pth", tmp_path / "ran"
    if legacy:
        path.write_bytes(pickle.dumps({"weight": Payload(ran)}, protocol=2))
    else:
        torch.save({"weight": torch.zeros(1), "extra": Payload(ran)}, path)
    with pytest.raises(WeightsError, match=r"evil\.pth: can't be loaded as weights"):
        weights.read_state_dict(path)
    assert not ran.exists()


def test_weights_that_do_not_fit_are_refused(tmp_path: Path) -> None:
    module = torch.nn.Linear(3, 2)
    path = tmp_path / "w.pth"
    for content, told in [
        ({"weight": torch.zeros(2, 4), "bias": torch.zeros(2)}, "size mismatch for weight"),
        ({"weight": torch.zeros(2, 3)}, 'Missing key.*"bias"'),
        ({**module.state_dict(), "more": torch.zeros(1)}, 'Unexpected key.*"more"'),
    ]:
        torch.save(content, path)
        with pytest.raises(WeightsError, match=rf"w\.pth: does not fit the encoder\..*{told}"):
            weights.load_into(module, path)
    torch.save([1, 2], path)
    with pytest.raises(WeightsError, match="something else than a state dict"):
        weights.load_into(module, path)
    path.write_text("<html>Not found</html>")
    with pytest.raises(WeightsError, match=r"w\.pth: can't be loaded as weights"):
        weights.load_into(module, path)


@pytest.mark.parametrize("key", [None, "state_dict", "model"])
def test_the_forms_weights_come_in(tmp_path: Path, key: str | None) -> None:
    wanted, module = torch.nn.Linear(3, 2), torch.nn.Linear(3, 2)
    content = {**wanted.state_dict(), "head.weight": torch.zeros(9)}
    torch.save({key: content, "epoch": 3} if key else content, tmp_path / "w.pth")
    weights.load_into(module, tmp_path / "w.pth", ignore=("head.",))
    assert torch.equal(module.weight, wanted.weight)


def test_the_hash_is_that_of_the_weights_not_of_the_file(tmp_path: Path) -> None:
    module = torch.nn.Linear(3, 2)
    before = weights.state_dict_sha256(module)
    torch.save({"model": module.state_dict()}, tmp_path / "w.pth")
    other = torch.nn.Linear(3, 2)
    assert weights.state_dict_sha256(other) != before
    weights.load_into(other, tmp_path / "w.pth")
    assert weights.state_dict_sha256(other) == before


PASSWORD = "s3cret-Pa55"


def with_password(url: str) -> str:
    return url.replace("//", f"//reader:{PASSWORD}@")


def test_a_mirror_with_a_password_is_asked_with_it_and_it_is_never_told(
    tmp_path: Path, mirror: Mirror, caplog: pytest.LogCaptureFixture
) -> None:
    mirror.files["/weights/prostate_small.pth"] = b"from the mirror"
    url = with_password(mirror.url)
    with caplog.at_level(logging.DEBUG):
        path = weights.prostate_weights("prostate_small", folder=tmp_path, mirror=url)
        assert path.read_bytes() == b"from the mirror"
        expected = base64.b64encode(f"reader:{PASSWORD}".encode()).decode()
        assert mirror.authorised == [f"Basic {expected}"]
        path.unlink()
        mirror.files.clear()
        addresses = [
            url,
            f"{url}w?sig={PASSWORD}",
            f"http://reader:{PASSWORD}@[bad/",
            f"ftp://{PASSWORD}@a/",
        ]
        for address in addresses:
            with pytest.raises(WeightsError) as told:
                weights.prostate_weights("prostate_small", folder=tmp_path, mirror=address)
            assert PASSWORD not in str(told.value)
            assert "prostate_small.pth" in str(told.value)
    assert caplog.records
    assert PASSWORD not in caplog.text
    assert expected not in caplog.text


def test_a_password_does_not_follow_a_redirect(tmp_path: Path, mirror: Mirror) -> None:
    other = Mirror()
    try:
        other.files["/weights/elsewhere.pth"] = b"elsewhere"
        mirror.redirect = f"{other.url}elsewhere.pth"
        weights.prostate_weights(
            "prostate_small", folder=tmp_path, mirror=with_password(mirror.url)
        )
        assert [bool(given) for given in mirror.authorised] == [True]
        assert other.authorised == [None]
    finally:
        other.close()


def test_settings_do_not_show_a_password(
    monkeypatch: pytest.MonkeyPatch, bare_environment: None
) -> None:
    monkeypatch.setenv("HISTOENCODER_WEIGHTS_URL", f"https://reader:{PASSWORD}@mirror/")
    settings = PlatformSettings()
    assert settings.weights_mirror == f"https://reader:{PASSWORD}@mirror/"
    for shown in (
        repr(settings),
        str(settings),
        settings.model_dump_json(),
        f"{settings.model_dump()}",
    ):
        assert PASSWORD not in shown


def test_another_file_than_the_expected_is_refused(tmp_path: Path, mirror: Mirror) -> None:
    mirror.files["/weights/prostate_small.pth"] = b"tampered with"
    good = hashlib.sha256(b"as agreed").hexdigest()
    fetch = functools.partial(
        weights.prostate_weights, "prostate_small", folder=tmp_path / "w", mirror=mirror.url
    )
    with pytest.raises(WeightsError, match="is not the file of weights that is expected"):
        fetch(expected_sha256=good)
    assert [path.name for path in (tmp_path / "w").iterdir()] == [".prostate_small.lock"]
    mirror.files["/weights/prostate_small.pth"] = b"as agreed"
    path = fetch(expected_sha256=good)
    path.write_bytes(b"exchanged later")
    with pytest.raises(WeightsError, match=r"prostate_small\.pth: is not the file"):
        fetch(expected_sha256=good)

"""Passwords and tokens of a deployment reach neither logs, nor events, nor the store."""

import http.server
import io
import shutil
import threading

import dagster as dg
import pytest
import timm
import torch
from moto.server import ThreadedMotoServer
from pyarrow.fs import FileSystem
from pydantic import SecretStr
from searching import found_in

from histoencoder_core.features import encoders, weights
from histoencoder_core.settings import EncoderSettings
from histoencoder_dagster.partitions import RANGE_END, RANGE_START

PASSWORD, TOKEN, KEY = "s3cret-Pa55", "hf_" + "t0ken" * 6, "AK1A-somebody"
SMALL = "xcit_nano_12_p16_224"


@pytest.fixture
def mirror(monkeypatch):
    """A server that gives the weights only to those who know the password, and the asked paths."""
    buffer = io.BytesIO()
    torch.save(timm.create_model(SMALL, num_classes=0).state_dict(), buffer)
    content, server_state = buffer.getvalue(), {"open": False}

    class Handler(http.server.BaseHTTPRequestHandler):
        def do_GET(self):
            known = (self.headers.get("Authorization") or "").startswith("Basic ")
            if not (known and server_state["open"]):
                self.send_error(404)
                return
            self.send_response(200)
            self.send_header("Content-Length", str(len(content)))
            self.end_headers()
            self.wfile.write(content)

        def log_message(self, *args):
            pass

    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    thread = threading.Thread(target=server.serve_forever, args=(0.01,), daemon=True)
    thread.start()
    server_state["url"] = f"http://reader:{PASSWORD}@127.0.0.1:{server.server_address[1]}/w"
    for name in weights.PUBLISHED:
        monkeypatch.setitem(weights.PUBLISHED, name, f"http://127.0.0.1:9/{name}.pth")
    for proxy in ("http_proxy", "HTTP_PROXY", "all_proxy", "ALL_PROXY"):
        monkeypatch.delenv(proxy, raising=False)
    yield server_state
    server.shutdown()
    server.server_close()
    thread.join()


def test_no_secret_reaches_the_records_whether_a_download_fails_or_not(
    kept_deployment, home, mirror, tmp_path, monkeypatch
):
    monkeypatch.setenv("HF_TOKEN", TOKEN)
    monkeypatch.setitem(encoders.ARCHITECTURES, "prostate_small", SMALL)
    deployment = kept_deployment
    deployment.change(
        weights_url=SecretStr(mirror["url"]),
        encoder=EncoderSettings(name="prostate_small", input_size=32),
    )
    order = deployment.add("a", "b")
    job = deployment.defs.resolve_implicit_global_asset_job_def()

    def run(asset):  # with all that Dagster logs
        return job.execute_in_process(
            instance=deployment.instance,
            tags={RANGE_START: order[0], RANGE_END: order[-1]},
            asset_selection=[dg.AssetKey(asset)],
            raise_on_error=False,
        )

    assert run("slides").success
    assert run("tiles").success
    failed = run("features")
    assert not failed.success
    (event,) = [e for e in failed.all_events if e.is_step_failure]
    assert "127.0.0.1" in event.step_failure_data.error.to_string()
    mirror["open"] = True
    # Of another process, as a run is: the one that failed keeps nothing.
    deployment.change()
    job = deployment.defs.resolve_implicit_global_asset_job_def()
    assert run("features").success
    assert found_in(tmp_path, [PASSWORD, TOKEN]) == {}
    assert found_in(home, ["127.0.0.1"]), "the search finds what the events hold"
    assert PASSWORD not in repr(deployment.platform)


def test_keys_of_a_bucket_reach_no_records_whether_it_can_be_read_or_not(
    kept_deployment, home, tmp_path, monkeypatch
):
    monkeypatch.setenv("AWS_ACCESS_KEY_ID", KEY)
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", PASSWORD)
    deployment = kept_deployment
    slide = deployment.drop("a")
    server = ThreadedMotoServer(ip_address="127.0.0.1", port=0, verbose=False)
    server.start()
    try:
        query = "endpoint_override={}:{}&scheme=http&region=us-east-1".format(
            *server.get_host_and_port()
        )
        system, _ = FileSystem.from_uri(f"s3://scans/?{query}&allow_bucket_creation=true")
        system.create_dir("scans")
        for name, content in (("a.tiff", slide.read_bytes()), ("bad.svs", b"II*\0 no slide")):
            with system.open_output_stream(f"scans/{name}") as out:
                out.write(content)
        deployment.change(
            slides=(f"s3://scans?{query}",), bucket_copies=tmp_path / "copies", bucket_copies_gb=1
        )
        for _ in range(2):
            deployment.run_requests(deployment.tick("new_slides"), "describe_slides")
        assert deployment.recorded("slides") == {"a"}
        assert deployment.folder("bad").failures()
    finally:
        server.stop()
    shutil.rmtree(tmp_path / "copies")
    deployment.change()
    assert "scans" in deployment.tick("new_slides").skip_message
    deployment.run("tiles", slides=["a"])
    assert deployment.folder("a").failures()["tiles"]
    assert found_in(tmp_path, [PASSWORD, KEY]) == {}
    assert found_in(home, ["bad.svs"]), "the search finds what the events hold"

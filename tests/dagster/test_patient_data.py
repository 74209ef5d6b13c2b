"""What a slide's file says of a patient goes nowhere: not to the store, logs, events or pages.

Names of files are shown, as docs/operations.md tells, so these are pseudonyms here.
"""

import base64
import contextlib
import io
import json
import os
import re
import signal
import socket
import sqlite3
import subprocess
import sys
import time
import urllib.request
from pathlib import Path

import cv2
import dagster as dg
import numpy as np
import openslide
import pytest
import tifffile
from core.making import tissue_pixels, write_dicom
from PIL import Image
from searching import found_in

from histoencoder_core.report.draw import write_report
from histoencoder_dagster.partitions import RANGE_END, RANGE_START

SURNAME, GIVEN, NUMBER = "Zebrowska", "Wilhelmina", "MRN47110815"
BORN = ("19580314", "1958/03/14", "14.03.1958", "1958-03-14")
TEXTS = (SURNAME, GIVEN, NUMBER, *BORN, "Dr. Quincy")

LABEL, MACRO = (0, 255, 255), (255, 255, 0)
"""Colours that no stained tissue has."""

RUNS = """{ runsOrError { ... on Runs { results { runId status tags { key value } runConfigYaml
  eventConnection { events { __typename
    ... on MessageEvent { message }
    ... on MaterializationEvent { label description partition
      metadataEntries { label description
        ... on TextMetadataEntry { text } ... on MarkdownMetadataEntry { mdStr }
        ... on JsonMetadataEntry { jsonString } ... on PathMetadataEntry { path } } }
    ... on ErrorEvent { error { message stack causes { message stack } } } } } } } } }"""


def write_aperio(path):
    """An SVS with a patient in its description, and with a label and a macro image."""
    said = (
        "Aperio Image Library v11.2.1\r\n1024x1024 [0,0 1024x1024] (256x256) JPEG/RGB Q=70"
        "|AppMag = 20|"
        f"Patient = {SURNAME}^{GIVEN}|MRN = {NUMBER}|DOB = {BORN[2]}|User = Dr. Quincy|"
        f"Filename = {SURNAME}_{GIVEN}|Title = {NUMBER}|MPP = 0.5"
    )
    pixels = tissue_pixels(1024, 1024, seed=1)
    tiled = {"tile": (256, 256), "photometric": "rgb", "compression": "zlib", "metadata": None}
    plain = {"photometric": "rgb", "compression": "lzw", "metadata": None}
    with tifffile.TiffWriter(path) as file:
        file.write(pixels, description=said, software=NUMBER, **tiled)
        file.write(pixels[::4, ::4], description=f"Aperio\r\n{SURNAME}", **plain)
        for name, colour, kind in (("label", LABEL, 1), ("macro", MACRO, 9)):
            picture = np.full((200, 300, 3), colour, np.uint8)
            file.write(
                picture,
                description=f"Aperio {SURNAME}\r\n{name} 300x200",
                subfiletype=kind,
                **plain,
            )
    with openslide.OpenSlide(path) as slide:  # the fixture says what it is meant to say
        assert slide.properties["aperio.Patient"] == f"{SURNAME}^{GIVEN}"
        assert {"label", "macro"} <= set(slide.associated_images)


def write_vms(path):
    """A Hamamatsu VMS with a patient in its text and a macro image; it opens, but can't be read."""
    pixels = cv2.cvtColor(tissue_pixels(1024, 1024, seed=2), cv2.COLOR_RGB2BGR)
    restarts = [cv2.IMWRITE_JPEG_RST_INTERVAL, 2]  # by which OpenSlide finds its way
    cv2.imwrite(str(path.with_name("v_image.jpg")), pixels, restarts)
    cv2.imwrite(str(path.with_name("v_map.jpg")), pixels[::16, ::16], restarts)
    Image.new("RGB", (300, 200), MACRO).save(path.with_name("v_macro.jpg"))
    path.write_text(
        "[Virtual Microscope Specimen]\nNoLayers=1\nNoJpegColumns=1\nNoJpegRows=1\n"
        "ImageFile=v_image.jpg\nMapFile=v_map.jpg\nMacroImage=v_macro.jpg\n"
        f"PhysicalWidth=512000\nPhysicalHeight=512000\nSourceLens=20\nReference={NUMBER}\n"
        f"UserName=Dr. Quincy\nPatientName={SURNAME}, {GIVEN}\nPatientBirth={BORN[1]}\n"
    )
    with openslide.OpenSlide(path) as slide:
        assert slide.properties["hamamatsu.PatientName"] == f"{SURNAME}, {GIVEN}"


def write_ndpi(path, real):
    """The real NDPI with a patient in place of what it says of its scan."""
    content = real.read_bytes()
    for before, after in (
        (b"Name=DAPI 2 (387) ", f"Name={SURNAME}, W.".encode()),
        (b"Created=2011/05/23", f"Created={BORN[1]}".encode()),
        (b"NDP.scan 2.5.89", NUMBER.ljust(15).encode()),
    ):
        assert len(before) == len(after)
        assert before in content
        content = content.replace(before, after)
    path.write_bytes(content)
    with openslide.OpenSlide(path) as slide:
        assert NUMBER in slide.properties["tiff.Software"]


@pytest.fixture
def platform(kept_deployment, test_data):
    """Slides of patients through all stages, with all that Dagster logs."""
    deployment = kept_deployment
    [slides] = deployment.settings.slides
    write_aperio(slides / "a.svs")
    write_vms(slides / "v.vms")
    write_ndpi(slides / "n.ndpi", next(test_data.glob("slides/*.ndpi")))
    uids = ["1.2.826.0.1.3680043.8.498.1", "1.2.826.0.1.3680043.8.498.2"]
    pixels = tissue_pixels(1024, 1024, seed=3)
    patient = f"{SURNAME}^{GIVEN}"
    write_dicom(slides / "d.dcm", pixels, uids=uids, mpp=0.5, patient=patient)
    assert found_in(slides, TEXTS).keys() == {"a.svs", "v.vms", "n.ndpi", "d.dcm"}
    (slides / "cut.svs").write_bytes((slides / "a.svs").read_bytes()[:150_000])
    order = deployment.register()

    def run(*assets, slides=order):
        for asset in assets:
            of_slides = {RANGE_START: slides[0], RANGE_END: slides[-1]}
            deployment.defs.resolve_implicit_global_asset_job_def().execute_in_process(
                instance=deployment.instance,
                tags={} if asset in {"cluster_model", "catalog"} else of_slides,
                asset_selection=[dg.AssetKey(asset)],
                raise_on_error=False,
            )

    run("slides", "tiles", "features", "cluster_model", "clusters", "catalog")
    assert deployment.recorded("clusters") == {"a", "d"}
    for slide_id in ("cut", "n", "v"):  # what their failures tell is looked at, too
        assert deployment.folder(slide_id).failures()
    write_report(deployment.store)
    # The NDPI is of fluorescence: its background is dark.
    dark = deployment.settings.tiling.model_copy(update={"background": "dark"})
    deployment.change(tiling=dark)
    run("tiles", "features", "clusters", slides=["n"])
    run("catalog")
    assert deployment.recorded("clusters") == {"a", "d", "n"}
    return deployment


def pictures_in(folder):
    """All pictures: files, and those inside of pages, and of events in databases."""
    for path in folder.rglob("*"):
        if path.suffix in {".jpeg", ".png"}:
            yield path.name, Image.open(path).convert("RGB")
        texts = []
        if path.suffix in {".html", ".svg"}:
            texts = [path.read_text("utf-8")]
        elif path.suffix == ".db":
            with (
                contextlib.closing(sqlite3.connect(path)) as connection,
                contextlib.suppress(sqlite3.OperationalError),
            ):
                texts = [row[0] for row in connection.execute("SELECT event FROM event_logs")]
        for text in texts:
            for data in re.findall(r"data:image/\w+;base64,([A-Za-z0-9+/=]+)", text):
                yield path.name, Image.open(io.BytesIO(base64.b64decode(data))).convert("RGB")


def share_of(picture, colour):
    off = np.abs(np.asarray(picture, np.int64) - colour).max(axis=2)
    return float((off < 60).mean())


@contextlib.contextmanager
def web_server(deployment, home, log):
    """The web server as it starts by itself: ``(port, process)``."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    command = [Path(sys.executable).parent / "dagster-webserver", "-p", str(port)]
    command += ["-m", "histoencoder_dagster.definitions"]
    env = {k: v for k, v in os.environ.items() if not k.startswith("HISTOENCODER_")} | {
        "DAGSTER_HOME": str(home),
        "HISTOENCODER_SLIDES": str(deployment.settings.slides[0]),
        "HISTOENCODER_STORE": str(deployment.settings.store),
    }
    with log.open("wb") as output:
        server = subprocess.Popen(
            command, env=env, stdout=output, stderr=output, start_new_session=True
        )
        try:
            yield port, server
        finally:
            server.send_signal(signal.SIGTERM)
            with contextlib.suppress(subprocess.TimeoutExpired):
                server.wait(20)
            with contextlib.suppress(ProcessLookupError):
                os.killpg(server.pid, signal.SIGKILL)


def ask(port, query):
    """A GraphQL answer, as text, once the server gives one."""
    body = json.dumps({"query": query}).encode()
    request = urllib.request.Request(
        f"http://127.0.0.1:{port}/graphql", body, {"Content-Type": "application/json"}
    )
    for _ in range(240):
        try:
            with urllib.request.urlopen(request, timeout=60) as answer:
                return answer.read().decode()
        except OSError:
            time.sleep(0.5)
    raise AssertionError("the web server does not answer")


def listening_at(port):
    """Addresses at which this machine listens on a port, as the kernel tells."""
    found = set()
    for table in ("/proc/net/tcp", "/proc/net/tcp6"):
        with contextlib.suppress(FileNotFoundError):
            for line in Path(table).read_text().splitlines()[1:]:
                _, local, _, state, *_ = line.split()
                address, _, number = local.partition(":")
                if state == "0A" and int(number, 16) == port:
                    found.add(address)
    return found


@pytest.mark.slow
def test_nothing_of_a_patient_leaves_the_slide_file(platform, home, tmp_path):
    store = platform.settings.store
    assert found_in(store, TEXTS) == {}
    assert found_in(home, TEXTS) == {}
    assert found_in(home, ["n.ndpi"]), "the search finds what the events hold"
    seen = 0
    for name, picture in pictures_in(tmp_path):
        if name.startswith("v_"):  # parts of the slide itself
            continue
        seen += 1
        for colour in (LABEL, MACRO):
            assert share_of(picture, colour) < 0.005, name
    assert seen > 30
    label = Image.new("RGB", (30, 20), LABEL)
    assert share_of(label, LABEL) == 1
    log = tmp_path / "server.log"
    with web_server(platform, home, log) as (port, _):
        answer = ask(port, RUNS)
        assert listening_at(port) == {"0100007F"}, "127.0.0.1 and nothing else"
    assert '"errors"' not in answer[:200], answer[:2000]
    assert "n.ndpi" in answer
    (tmp_path / "pages").mkdir()
    (tmp_path / "pages" / "answer.json").write_text(answer)
    assert found_in(tmp_path / "pages", TEXTS) == {}
    assert found_in(log.parent, TEXTS).keys() <= {
        f"slides/{n}" for n in ("a.svs", "v.vms", "n.ndpi", "d.dcm", "cut.svs")
    }

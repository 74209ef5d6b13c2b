"""Make the README's pictures from the demo: `make demo`, then run this.

Needs `pip install playwright` and a Chromium at /usr/bin/chromium.
"""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import sys
import time
import urllib.request
from pathlib import Path

import cv2
import numpy as np
from playwright.sync_api import sync_playwright

DOCS = Path(__file__).parent
PICTURES = DOCS / "pictures"
DEMO = DOCS.parent / "demo"
SLIDE = "synthetic-02"
PORT = 3177
HEIGHT = 380
_CHROMIUM = [
    "--no-sandbox", "--disable-gpu", "--no-first-run", "--disable-background-networking",
    "--disable-component-update", "--disable-sync", "--disable-quic",
]  # fmt: skip


def overlay() -> None:
    """A slide, its clusters, and what they mean, side by side."""
    folder = DEMO / "store" / SLIDE
    parts = []
    for name in ("thumbnail.jpeg", "thumbnail_clusters.jpeg", "thumbnail_annotations.jpeg"):
        picture = cv2.imread(str(folder / name))
        width = round(picture.shape[1] * HEIGHT / picture.shape[0])
        parts.append(cv2.resize(picture, (width, HEIGHT), interpolation=cv2.INTER_AREA))
    quality = [cv2.IMWRITE_JPEG_QUALITY, 85]
    cv2.imwrite(str(PICTURES / "overlay.jpeg"), np.hstack(parts), quality)


def figures() -> None:
    """The cohort's figures that the README shows."""
    drawn = DEMO / "store" / "_cohort" / "figures"
    for name, shown in (("purity_curve_k32", "purity-curve"), ("umap_by_label", "umap")):
        shutil.copyfile(drawn / f"{name}.png", PICTURES / f"{shown}.png")


def asset_graph() -> None:
    """The asset graph in the web UI."""
    command = [sys.executable, "-m", "histoencoder_dagster.demo", "--folder", DEMO, "--ui"]
    server = subprocess.Popen([*command, "--port", str(PORT)], start_new_session=True)
    try:
        address = f"http://127.0.0.1:{PORT}"
        _wait(f"{address}/server_info")
        with sync_playwright() as play:
            browser = play.chromium.launch(executable_path="/usr/bin/chromium", args=_CHROMIUM)
            page = browser.new_page(viewport={"width": 2000, "height": 900})
            # What the report is made from is every asset but the figures and annotations.
            page.goto(
                f"{address}/assets/cohort_report?view=lineage&lineageScope=upstream&lineageDepth=9"
            )
            page.wait_for_timeout(15_000)
            page.screenshot(path=PICTURES / "asset-graph.png")
            browser.close()
    finally:
        os.killpg(server.pid, signal.SIGTERM)
        server.wait(timeout=30)


def _wait(address: str) -> None:
    for _ in range(60):
        try:
            with urllib.request.urlopen(address, timeout=2):
                return
        except OSError:
            time.sleep(1)
    raise TimeoutError(f"{address} does not answer")


if __name__ == "__main__":
    PICTURES.mkdir(exist_ok=True)
    overlay()
    figures()
    asset_graph()

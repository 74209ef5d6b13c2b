"""HistoPrep's and HistoEncoder 0.1.1's command lines, with weights from a file.

Runs in an environment of its own, without this project: Python 3.11 with

    pip install "histoencoder==0.1.1" "numpy<2" openslide-bin

Both programs start as their own scripts start them. Only the download of the published weights is
replaced, by a state dict that `extraction.py` writes, so that both sides compute the same network.

Usage: python peer.py about
       python peer.py tile <options of HistoPrep>
       python peer.py extract WEIGHTS <options of HistoEncoder extract>
"""

from __future__ import annotations

import importlib.metadata
import json
import platform
import sys

PACKAGES = ("histoencoder", "histoprep", "torch", "timm", "numpy", "polars")


def about() -> None:
    """Print the versions here as JSON."""
    versions = {name: importlib.metadata.version(name) for name in PACKAGES}
    print(json.dumps({"python": platform.python_version(), **versions}))


def tile(options: list[str]) -> None:
    """Run HistoPrep."""
    from histoprep._cli import cut_slides

    cut_slides(options)


def extract(weights: str, options: list[str]) -> None:
    """Run HistoEncoder's ``extract``.

    Args:
        weights: File of the state dict that takes the published weights' place.
        options: Those of the command.
    """
    import torch
    from histoencoder._cli import run

    torch.hub.load_state_dict_from_url = lambda _url: torch.load(weights, map_location="cpu")
    run(["extract", *options])


if __name__ == "__main__":
    match sys.argv[1:]:
        case ["about"]:
            about()
        case ["tile", *options]:
            tile(options)
        case ["extract", weights, *options]:
            extract(weights, options)
        case _:
            sys.exit(__doc__)

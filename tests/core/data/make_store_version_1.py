"""Make ``store_version_1/``, a store as it was before it carried a schema version.

Run it with the program as it was then: ``git worktree add /tmp/then d905dd5`` and
``PYTHONPATH=/tmp/then python tests/core/data/make_store_version_1.py``.
"""

from __future__ import annotations

import shutil
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1]))

import numpy as np
from making import keys_of, stamp_of

from histoencoder_core.errors import LabelError, SlideError
from histoencoder_core.slides import FoundSlide, Register
from histoencoder_core.store import Store


def main() -> None:
    store = Store(Path(__file__).parent / "store_version_1")
    shutil.rmtree(store.root, ignore_errors=True)
    root = Path("/scans")
    Register(store).assign([FoundSlide(root / f"{name}.svs", f"{name}.svs") for name in "AB"])
    with store.slide("A").writing("tiles") as writer:
        writer.table(keys_of((0, 0, 512, 512), (512, 0, 512, 512)), stamp_of("version 1"))
        writer.image("thumbnail_tiles.jpeg", np.zeros((8, 8, 3), np.uint8), stamp_of("version 1"))
    store.slide("A").record_failure("labels", LabelError("A.geojson: is no GeoJSON."))
    store.slide("A").record_failure("features", MemoryError("too many tiles"), inputs=["f"])
    unreadable = SlideError("/scans/B.svs: can't be opened.", kind="unreadable")
    store.slide("B").record_failure("slides", unreadable, inputs={"path": "/scans/B.svs"})
    for lock in store.root.rglob("*.lock"):
        lock.unlink()


if __name__ == "__main__":
    main()

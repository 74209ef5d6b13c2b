"""Decoding slides and images in processes that can be lost.

Native decoders crash, hang and take all memory on some damaged files, so none of them is fed an
unknown file in the process that does the work::

    readers ──▶ pool ──wire──▶ process ──▶ decoders, images, truncation
    (the program's side)       (a child process)

`readers` is what the rest of the program uses: an open slide, or images, with a process of their
own that is replaced when it is lost. `pool` starts processes, limits them and uses them again.
`process` is the child; with all that it imports it must start fast, so nothing here but `pool` and
`readers` may import torch, HistoPrep, pyarrow or pydantic. Nothing is imported by this file for
the same reason.
"""

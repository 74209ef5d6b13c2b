"""Messages between the program and its reader processes, over a stream socket.

A message is a JSON object and, in replies, pixels: a head of fixed size with the length of the
JSON text and the pixels' shape (height, width, channels; zeros for none), the text, and the bytes
of the pixels. Nothing is unpickled: a decoder that a file took over can say nothing but this.
"""

from __future__ import annotations

import json
import socket
import struct
from typing import Any

import numpy as np

Message = dict[str, Any]

_HEAD = struct.Struct("<4I")
_MAX_TEXT = 2**24


class BrokenWireError(Exception):
    """The other side is gone, or does not speak as agreed."""


def send(connection: socket.socket, message: Message, pixels: np.ndarray | None = None) -> None:
    """Send a message.

    Args:
        connection: A blocking stream socket.
        message: Anything that JSON holds.
        pixels: uint8 array of shape (height, width, channels).

    Raises:
        BrokenWireError: The other side is gone.
    """
    text = json.dumps(message).encode() if message else b""
    shape = (0, 0, 0) if pixels is None else pixels.shape
    head = _HEAD.pack(len(text), *shape) + text
    content = memoryview(b"") if pixels is None else np.ascontiguousarray(pixels).data.cast("B")
    try:
        # Head and pixels at once: the other side would be woken up for the head alone.
        sent = connection.sendmsg([head, content])
        connection.sendall(head[sent:])
        connection.sendall(content[max(0, sent - len(head)) :])
    except OSError as error:
        raise BrokenWireError(str(error)) from error


def receive(
    connection: socket.socket, *, shape: tuple[int, int] | None = None, max_pixels: int = 0
) -> tuple[Message, np.ndarray | None]:
    """Receive a message.

    Args:
        connection: A blocking stream socket, with or without a time limit of its own.
        shape: (height, width) that the pixels must have, if there are any.
        max_pixels: Most pixels that are accepted where their shape isn't known before.

    Returns:
        The message, and its pixels, uint8 (height, width, 3), if it has any.

    Raises:
        BrokenWireError: The other side is gone, or sent something else.
        TimeoutError: The time limit passed.
    """
    head = bytearray(_HEAD.size)
    _fill(connection, memoryview(head))
    length, *told = _HEAD.unpack(head)
    text = bytearray(length if length <= _MAX_TEXT else 0)
    _fill(connection, memoryview(text))
    try:
        message = json.loads(text) if text else {}
    except ValueError as error:
        raise BrokenWireError("a message that is no JSON") from error
    if told == [0, 0, 0]:
        return message, None
    height, width, channels = told
    expected = height * width <= max_pixels if shape is None else (height, width) == shape
    if channels != 3 or not expected:
        raise BrokenWireError(f"pixels of shape {told}")
    pixels = np.empty((height, width, 3), np.uint8)
    _fill(connection, pixels.data.cast("B"))
    return message, pixels


def _fill(connection: socket.socket, room: memoryview) -> None:
    while room:
        try:
            got = connection.recv_into(room, 0, socket.MSG_WAITALL)
        except BlockingIOError as error:  # what `SO_RCVTIMEO` ends in
            raise TimeoutError from error
        except OSError as error:
            raise BrokenWireError(str(error)) from error
        if not got:
            raise BrokenWireError("the connection is closed")
        room = room[got:]

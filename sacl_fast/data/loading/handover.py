"""Batches from a worker process to the main one, and tasks (what to read) the other way.

A batch lies in a file without a name in memory (``memfd_create``), and a socket carries the
descriptor of that file. The usual way, files in /dev/shm, ends in a crash or waits for ever where
that is too small (containers have 64 MB; one batch of 256 pairs of views of 224 px is 77 MB). The
memory of these files has no limit but the machine's or the container's, and it is free as soon as
nobody holds it, whoever is killed.

Messages from worker to main process are a few bytes each, so sending one never waits for the
reader.
"""

from __future__ import annotations

import errno
import io
import mmap
import os
import pickle
import select
import socket
import struct
import time
from typing import Any

import torch
from torch import Tensor

from sacl_fast.data.loading.waiting import Patience

_HEAD = struct.Struct("<QQ")  # bytes in all, and where the pickle begins
_LENGTH = struct.Struct("<Q")
_ALIGNMENT = 64


def send_batch(channel: socket.socket, batch: Any) -> None:
    """Hand over anything that can be pickled; the tensors in it (on the CPU) are copied once."""
    pickled = io.BytesIO()
    pickler = _Pickler(pickled, protocol=5)
    pickler.dump(batch)
    descriptor = os.memfd_create("batch", os.MFD_CLOEXEC)
    with open(descriptor, "wb") as file:
        for offset, tensor in pickler.tensors:
            file.seek(offset)
            file.write(tensor.numpy().data)
        file.seek(pickler.end)
        file.write(pickled.getbuffer())
        file.flush()
        _send_file(channel, _HEAD.pack(file.tell(), pickler.end), descriptor)


def _send_file(channel: socket.socket, head: bytes, descriptor: int) -> None:
    while True:
        try:
            socket.send_fds(channel, [head], [descriptor])
            return
        except OSError as error:
            # More files of this user are on their way than may be: others are taken by and by.
            if error.errno != errno.ETOOMANYREFS:
                raise
            time.sleep(0.02)


def receive_batch(channel: socket.socket) -> Any:
    """What ``send_batch`` handed over, its tensors in memory of their own. The message is there
    already, or the other end is closed (EOFError)."""
    head, descriptors, _, _ = socket.recv_fds(channel, _HEAD.size, 1)
    if not head:
        raise EOFError
    if not descriptors:
        raise OSError("no more files can be open (ulimit -n)")
    size, end = _HEAD.unpack(head)
    try:
        memory = torch.frombuffer(mmap.mmap(descriptors[0], size), dtype=torch.uint8)
    finally:
        os.close(descriptors[0])
    return _Unpickler(io.BytesIO(memory[end:].numpy().data), memory).load()


class _Pickler(pickle.Pickler):
    """Leaves out the tensors, and says where they are to lie."""

    def __init__(self, file: io.BytesIO, protocol: int) -> None:
        super().__init__(file, protocol)
        self.tensors: list[tuple[int, Tensor]] = []
        self.end = 0

    def persistent_id(self, obj: Any) -> Any:
        if not isinstance(obj, Tensor):
            return None
        offset = self.end
        self.tensors.append((offset, obj.contiguous()))
        self.end += -(-obj.nbytes // _ALIGNMENT) * _ALIGNMENT
        return offset, obj.nbytes, obj.dtype, tuple(obj.shape)


class _Unpickler(pickle.Unpickler):
    def __init__(self, file: io.BytesIO, memory: Tensor) -> None:
        super().__init__(file)
        self._memory = memory

    def persistent_load(self, pid: Any) -> Tensor:
        offset, size, dtype, shape = pid
        return self._memory[offset : offset + size].view(dtype).view(shape)


def send_task(channel: socket.socket, task: Any, patience: Patience) -> None:
    """Say what to read next. It is small; where tasks ahead fill the socket all the same, this
    waits for the worker to take one."""
    data = pickle.dumps(task, protocol=5)
    unsent = memoryview(_LENGTH.pack(len(data)) + data)
    for seconds in patience.slices():
        try:
            unsent = unsent[channel.send(unsent, socket.MSG_DONTWAIT) :]
        except BlockingIOError:
            select.select([], [channel], [], seconds)
        if not unsent:
            return


def receive_task(channel: socket.socket) -> Any:
    """The next task, waited for; EOFError where the other end is closed."""
    (length,) = _LENGTH.unpack(_exactly(channel, _LENGTH.size))
    return pickle.loads(_exactly(channel, length))


def _exactly(channel: socket.socket, count: int) -> bytes:
    data = b""
    while len(data) < count:
        more = channel.recv(count - len(data), socket.MSG_WAITALL)
        if not more:
            raise EOFError
        data += more
    return data

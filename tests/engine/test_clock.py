"""The share of the time that a run waits for data, where the device lags behind the host."""

from __future__ import annotations

import time

import pytest
import torch

from sacl_fast.engine.clock import Clock

CPU = torch.device("cpu")


class Device:
    """A device that works through what is launched; time is what a test says it is."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.host = self.done = 0.0
        monkeypatch.setattr(time, "perf_counter", lambda: self.host)

    def launch(self, seconds: float) -> None:
        self.done = max(self.done, self.host) + seconds

    def synchronize(self) -> None:
        self.host = max(self.done, self.host)

    def batches(self, seconds: float, count: int):
        for i in range(count):
            self.host += seconds
            yield i


class Event:
    def __init__(self, device: Device) -> None:
        self.device = device

    def record(self) -> None:
        self.at = max(self.device.done, self.device.host)

    def elapsed_time(self, end_event: Event) -> float:
        assert end_event.at <= self.device.host, "read before the device has come there"
        return 1e3 * (end_event.at - self.at)


@pytest.mark.parametrize(
    ("batch", "launching", "step", "waits"),
    [
        (0.1, 0.1, 1.0, 0.0),  # the host waits, the device has its hands full
        (1.0, 0.1, 1.0, 0.0),  # it is idle while the host launches the next step, not for data
        (1.0, 0.0, 0.5, 0.5),
        (0.0, 0.5, 0.1, 0.0),
    ],
)
def test_a_device_that_lags_behind(monkeypatch, batch, launching, step, waits):
    device = Device(monkeypatch)
    clock = Clock(64, CPU, event=lambda: Event(device))
    steps = 100
    for _ in clock.waiting(device.batches(batch, steps)):
        device.host += launching
        device.launch(step)
    device.synchronize()
    took = device.host
    reading = clock.read()
    assert reading["data_wait"] == pytest.approx(waits, abs=0.015)
    assert reading["images_per_second"] == pytest.approx(64 * steps / took)


def test_readings_start_anew(monkeypatch):
    device = Device(monkeypatch)
    clock = Clock(2, CPU)
    batches = clock.waiting(device.batches(1.0, 3))
    next(batches)
    device.host += 1.0
    assert clock.read() == {"images_per_second": 1.0, "data_wait": 0.5}
    next(batches)
    assert clock.read() == {"images_per_second": 2.0, "data_wait": 1.0}
    assert clock.read() == {"images_per_second": 0.0, "data_wait": 0.0}
    assert list(batches) == [2]
    assert clock.read() == {"images_per_second": 2.0, "data_wait": 1.0}


@pytest.mark.gpu
def test_events_of_a_gpu():
    device = torch.device("cuda")
    x = torch.randn(4096, 4096, device=device)

    def batches(seconds: float):
        for _ in range(5):
            time.sleep(seconds)
            yield

    waits = []
    for seconds in (0.0, 0.05):
        torch.cuda.synchronize()
        clock = Clock(1, device)
        for _ in clock.waiting(batches(seconds)):
            torch.mm(x, x)
        torch.cuda.synchronize()
        waits.append(clock.read()["data_wait"])
    assert waits[0] < 0.5 < waits[1]

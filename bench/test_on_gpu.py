"""What only a GPU has, with stand-ins for it: the order of things, and what is taken of them."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch

from bench import on_gpu

pytestmark = pytest.mark.smoke


class Device:
    """What is asked of it, in order; a clock that each launch takes forward by a second more than the one before."""

    def __init__(self):
        self.asked, self.clock, self.launches = [], 0.0, 0

    def launch(self):
        self.asked.append("launch")
        self.launches += 1
        self.clock += self.launches

    def event(self, **_):
        def record():
            event.at = self.clock
            self.asked.append("event")

        event = SimpleNamespace(record=record)
        event.elapsed_time = lambda stop: 1e3 * (stop.at - event.at)
        return event

    def do(self, what, result=None):
        def asked(*_, **__):
            self.asked.append(what)
            return result

        return asked


@pytest.fixture
def device(monkeypatch):
    found = Device()
    buffer = SimpleNamespace(zero_=found.do("flush"))
    cuda = SimpleNamespace(
        Event=found.event,
        _sleep=found.do("pause"),
        synchronize=found.do("wait"),
        empty_cache=found.do("empty"),
        memory_reserved=found.do("memory", 512),
        current_device=lambda: 0,
        get_device_name=lambda _: "a GPU",
        get_device_properties=lambda _: SimpleNamespace(L2_cache_size=4),
    )
    stand_in = SimpleNamespace(**{**vars(torch), "cuda": cuda, "empty": lambda *_, **__: buffer})
    monkeypatch.setattr(on_gpu, "torch", stand_in)
    return found


def test_launches_wait_behind_a_pause_each_with_a_cold_cache(device):
    fast, middle, slow = on_gpu.kernel_seconds(device.launch, rounds=5)
    assert device.asked[:3] == ["launch", "wait", "pause"]
    assert device.asked[3:] == [*["flush", "event", "launch", "event"] * 5, "wait"]
    assert (fast, middle, slow) == pytest.approx((2.8, 4, 5.2))  # of 2 to 6: the first is not timed


def test_a_step_is_timed_until_the_device_has_done_it(device):
    gpu = on_gpu.Gpu()
    assert gpu.name == "a GPU"
    assert gpu.seconds(device.launch) > 0
    assert device.asked == ["flush", "wait", "launch", "wait"]


def test_the_host_is_timed_while_the_device_is_busy(device):
    gpu = on_gpu.Gpu()
    assert gpu.host_seconds(device.launch) > 0
    assert device.asked == ["wait", "pause", "launch", "wait"]


def test_memory_is_what_is_left_without_what_could_be_freed(device):
    assert on_gpu.Gpu().reserved_bytes() == 512
    assert device.asked == ["empty", "memory"]


def test_what_the_profiler_saw_on_the_device(device, monkeypatch):
    on_device, on_host = torch.autograd.DeviceType.CUDA, torch.autograd.DeviceType.CPU
    events = [SimpleNamespace(name=name, device_type=on_device) for name in ("a", "b", "a")]
    seen = SimpleNamespace(events=lambda: [*events, SimpleNamespace(name="c", device_type=on_host)])

    class Profile:
        def __init__(self, activities):
            assert activities == [torch.profiler.ProfilerActivity.CUDA]

        def __enter__(self):
            return seen

        def __exit__(self, *_):
            device.asked.append("seen")

    profiler = SimpleNamespace(profile=Profile, ProfilerActivity=torch.profiler.ProfilerActivity)
    monkeypatch.setattr(on_gpu.torch, "profiler", profiler)
    assert on_gpu.Gpu().operations(device.launch) == {"a": 2, "b": 1}
    assert device.asked == ["wait", "launch", "wait", "seen"]
    seen.events = list
    with pytest.raises(RuntimeError, match="seen nothing"):
        on_gpu.Gpu().operations(device.launch)


def test_a_spread_is_of_the_middle():
    assert on_gpu.spread(range(11)) == (2, 5, 8)

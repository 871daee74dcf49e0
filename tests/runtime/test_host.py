"""A rank's free memory is an equal share of the machine's, or of its control group's if that is less."""

from __future__ import annotations

from nemo_disco.runtime import host

GB = 1 << 30


def test_free_memory_is_shared_by_the_ranks_of_the_host(monkeypatch):
    monkeypatch.setattr(host, "_meminfo", {"MemTotal": 64 * GB, "MemAvailable": 32 * GB}.__getitem__)
    monkeypatch.setattr(host, "CGROUP", host.CGROUP / "nowhere")
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "4")
    assert host.total_memory() == 64 * GB
    assert host.free_memory() == 8 * GB


def test_a_control_group_limits_memory(monkeypatch, tmp_path):
    monkeypatch.setattr(host, "_meminfo", {"MemTotal": 64 * GB, "MemAvailable": 32 * GB}.__getitem__)
    monkeypatch.setattr(host, "CGROUP", tmp_path)
    monkeypatch.delenv("LOCAL_WORLD_SIZE", raising=False)
    for name, text in (
        ("memory.max", f"{16 * GB}\n"),
        ("memory.current", f"{14 * GB}\n"),
        ("memory.stat", f"anon {9 * GB}\ninactive_file {5 * GB}\n"),  # page cache, which can be freed
    ):
        (tmp_path / name).write_text(text)
    assert host.total_memory() == 16 * GB
    assert host.free_memory() == 7 * GB


def test_this_machine_has_free_memory():
    assert 0 < host.free_memory() <= host.total_memory()

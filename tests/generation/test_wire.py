"""The wire between a run and a worker: authentication, limits on messages and memory, and checksums."""

from __future__ import annotations

import socket
import threading
import time
import tracemalloc
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from nemo_disco.generation.worker.rollout_worker import wire
from nemo_disco.generation.worker.rollout_worker.__main__ import connect
from nemo_disco.generation.worker.rollout_worker.tensors import ROW, Assembly, Checksum, as_bytes, checksum
from nemo_disco.generation.worker.rollout_worker.weights import check_slots
from nemo_disco.generation.worker.rollout_worker.wire import Channel, RefusedError, WireError, map_staging

SECRET = b"s" * 32
WORDS = ROW // 8


@pytest.fixture
def channels() -> Iterator[tuple[Channel, Channel]]:
    """The run's and the worker's end of a TCP connection on this machine, in this order."""
    with socket.create_server(("127.0.0.1", 0)) as server:
        worker_socket = connect(list(server.getsockname()))
        run_socket, _ = server.accept()
    for connection in (run_socket, worker_socket):
        connection.settimeout(10)
    yield Channel(run_socket), Channel(worker_socket)
    run_socket.close()
    worker_socket.close()


def authenticate(run: Channel, worker: Channel, secrets: tuple[bytes, bytes] = (SECRET, SECRET)) -> list[str | None]:
    """Authenticate both ends; return the run's error and the worker's, None for an end that accepted the other."""
    errors: list[str | None] = [None, None]

    def authenticate_end(index: int, channel: Channel, role: bytes) -> None:
        try:
            channel.authenticate(secrets[index], role)
        except WireError as error:
            errors[index] = str(error)

    other = threading.Thread(target=authenticate_end, args=(1, worker, b"worker"))
    other.start()
    authenticate_end(0, run, b"run")
    other.join()
    return errors


def test_messages_arrive_between_peers_that_know_the_secret(channels: tuple[Channel, Channel]) -> None:
    run, worker = channels
    assert authenticate(run, worker) == [None, None]
    run.send({"op": "bucket", "slot": 1}, memoryview(b"\x00\xff" * 1000))
    assert worker.receive() == ({"op": "bucket", "slot": 1}, bytearray(b"\x00\xff" * 1000))
    worker.send({"ok": True})
    assert run.receive() == ({"ok": True}, bytearray())


@pytest.mark.parametrize("secrets", [(SECRET, b"t" * 32), (b"", SECRET)])
def test_a_peer_with_another_secret_is_refused_by_both_sides(
    secrets: tuple[bytes, bytes], channels: tuple[Channel, Channel]
) -> None:
    assert authenticate(*channels, secrets) == ["the peer does not know this run's secret"] * 2


def test_a_peer_that_echoes_the_proof_is_refused(channels: tuple[Channel, Channel]) -> None:
    run, thief = channels

    def echo() -> None:
        for size in (wire._HELLO.size, 32):
            thief.socket.sendall(thief._read(size))

    other = threading.Thread(target=echo)
    other.start()
    with pytest.raises(WireError, match="does not know this run's secret"):
        run.authenticate(SECRET, b"run")
    other.join()


def test_peers_with_another_protocol_version_or_none_are_refused(channels: tuple[Channel, Channel]) -> None:
    run, stranger = channels
    stranger.socket.sendall(wire._HELLO.pack(wire._MAGIC, wire.PROTOCOL + 1, bytes(32)))
    with pytest.raises(WireError, match=rf"speaks rollout protocol {wire.PROTOCOL + 1}, this side {wire.PROTOCOL}"):
        run.authenticate(SECRET, b"run")
    stranger.socket.sendall(b"GET / HTTP/1.1\r\nHost: here\r\nAccept: everything\r\n\r\n")
    with pytest.raises(WireError, match="does not speak the rollout protocol"):
        run.authenticate(SECRET, b"run")


def test_authentication_has_one_deadline_however_slowly_the_peer_sends(channels: tuple[Channel, Channel]) -> None:
    run, stranger = channels
    stop = threading.Event()

    def drip() -> None:
        for byte in wire._HELLO.pack(wire._MAGIC, wire.PROTOCOL, bytes(32)):
            if stop.wait(0.2):
                return
            stranger.socket.sendall(bytes([byte]))

    other = threading.Thread(target=drip)
    other.start()
    began = time.monotonic()
    with pytest.raises(TimeoutError):
        run.authenticate(SECRET, b"run", seconds=0.3)
    assert time.monotonic() - began < 5  # at this rate the greeting takes over 7 s, and the proof as long again
    stop.set()
    other.join()


def test_memory_grows_with_the_received_bytes_not_with_the_announced_size(channels: tuple[Channel, Channel]) -> None:
    run, worker = channels
    worker.socket.sendall(wire._HEAD.pack(2, 1 << 31) + b"{}" + b"x" * 1000)
    worker.socket.shutdown(socket.SHUT_WR)
    tracemalloc.start()
    with pytest.raises(WireError, match="closed"):
        run.receive()
    assert tracemalloc.get_traced_memory()[1] < 2 * wire._PIECE
    tracemalloc.stop()


@pytest.mark.parametrize(
    ("data", "message"),
    [
        (wire._HEAD.pack(1 << 31, 0), "announced a message of 2,147,483,648"),
        (wire._HEAD.pack(2, 1 << 40) + b"{}", "announced a message of 2 and 1,099,511,627,776 bytes"),
        (wire._HEAD.pack(2, 0) + b"[]", "no JSON object"),
        (wire._HEAD.pack(2, 0) + b"{\xff", "no JSON object"),
        (wire._HEAD.pack(50_000, 0) + b"[" * 50_000, "no JSON object"),
    ],
)
def test_malformed_or_too_large_messages_are_refused_at_once(
    channels: tuple[Channel, Channel], data: bytes, message: str
) -> None:
    run, worker = channels
    worker.socket.sendall(data)
    with pytest.raises(WireError, match=message):
        run.receive()


def test_announced_staging_memory_is_checked_against_the_model_and_the_file(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text("{}")
    save_file({"a": torch.zeros(100, 10)}, tmp_path / "model.safetensors")
    check_slots([4, ROW], str(tmp_path), torch.float32)
    for shape in ([4, 1 << 40], [1 << 20, ROW], [0, ROW], [2, -1]):
        with pytest.raises(RefusedError, match="announced; all weights have"):
            check_slots(shape, str(tmp_path), torch.float32)
    (tmp_path / "slots").write_bytes(bytes(ROW))
    with pytest.raises(RefusedError, match="smaller than 16,384 bytes"):
        map_staging(str(tmp_path / "slots"), [4, ROW])


def test_a_message_of_several_pieces_arrives_whole(
    channels: tuple[Channel, Channel], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(wire, "_PIECE", 1000)
    run, worker = channels
    payload = bytes(range(256)) * 37
    run.send({"op": "bucket"}, payload)
    assert worker.receive() == ({"op": "bucket"}, bytearray(payload))


@pytest.mark.parametrize("count", [1, 3, WORDS * 2, WORDS * 6 + 3])
def test_a_checksum_finds_every_changed_element(count: int) -> None:
    tensor = torch.randn(count, generator=torch.Generator().manual_seed(0))
    before = checksum(tensor)
    assert checksum(tensor.clone()) == before
    for place in {0, count // 2, count - 1}:
        copy = tensor.clone()
        copy[place] = torch.nextafter(copy[place], torch.tensor(9.0))  # one bit
        assert checksum(copy) != before


def test_a_checksum_finds_rows_out_of_order_and_a_shift() -> None:
    tensor = torch.randn(8, ROW // 4, generator=torch.Generator().manual_seed(0))
    swapped = tensor[[0, 1, 3, 2, 4, 5, 6, 7]]
    assert len({checksum(t.contiguous()) for t in (tensor, swapped, tensor.roll(1), -tensor)}) == 4


def test_a_tensor_in_pieces_has_the_checksum_of_the_whole() -> None:
    tensor = torch.randn(5, WORDS + 7, generator=torch.Generator().manual_seed(0))
    raw, whole = as_bytes(tensor), Checksum()
    pieces, assembly = [], Assembly()
    for first in range(0, len(raw), 2 * ROW):
        whole.add(raw[first : first + 2 * ROW])
        pieces.append(("a", "float32", tensor.shape, 0, first, len(raw[first : first + 2 * ROW])))
    assert str(whole) == checksum(tensor)
    complete = [entry for p in pieces for entry in assembly.take(raw[p[4] : p[4] + p[5]], [p])]
    assert [(name, total) for name, _, total in complete] == [("a", checksum(tensor))]
    assert torch.equal(complete[0][1], tensor)

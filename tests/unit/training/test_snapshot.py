"""Snapshots: copies that hold what was there, however late they are made, in memory that is used again."""

import io
import threading
import time
from typing import Any

import pytest
import torch
from torch.testing._internal.two_tensor import TwoTensor

from dreambooth.training.checkpoint_files import CheckpointFile
from dreambooth.training.snapshot import HostMemory, Snapshots

LATE_SECONDS = 0.1


def files_of(state: Any) -> list[CheckpointFile]:
    return [CheckpointFile(name="engine.pt", content=state)]


def nothing() -> None:
    pass


def test_what_settles_waits_for_a_snapshot_that_is_made_late() -> None:
    weight, snapshots, made = torch.ones(1000), Snapshots("cpu"), []
    snapshot = snapshots.take(files_of({"w": weight}), nothing)

    def late() -> None:
        time.sleep(LATE_SECONDS)
        made.extend(snapshot.make())

    thread = threading.Thread(target=late)
    thread.start()
    snapshots.settle()
    weight.zero_()
    thread.join()
    assert made[0].content["w"].sum() == 1000
    assert LATE_SECONDS / 2 < snapshots.seconds_waited < 100 * LATE_SECONDS
    snapshots.settle()  # nothing to wait for


def test_plain_values_are_those_of_the_beginning() -> None:
    state: dict[str, Any] = {"state": {0: {"step": 1}}, "groups": [{"lr": 0.1, "betas": (0.9, 0.99)}]}
    snapshot = Snapshots("cpu").take(files_of(state), nothing)
    state["state"][0]["step"], state["groups"][0]["lr"] = 2, 0.2
    [copied] = snapshot.make()
    assert copied.content == {"state": {0: {"step": 1}}, "groups": [{"lr": 0.1, "betas": (0.9, 0.99)}]}


def test_a_state_dict_keeps_the_versions_of_its_modules() -> None:
    state = torch.nn.BatchNorm1d(3).state_dict()
    [copied] = Snapshots("cpu").take(files_of(state), nothing).make()
    assert copied.content._metadata == state._metadata  # type: ignore[attr-defined]
    assert copied.content._metadata[""]["version"] == 2


def test_the_same_memory_is_copied_once_and_used_again() -> None:
    weight, snapshots = torch.arange(12.0).reshape(3, 4), Snapshots("cpu")
    state = {"one": weight, "tied": weight, "turned": weight.T, "row": weight[1], "none": weight[:0]}
    first = snapshots.take(files_of(state), nothing).make()[0].content
    assert first["one"] is first["tied"]
    for name, tensor in state.items():
        assert torch.equal(first[name], tensor), name
    pointers = {name: tensor.data_ptr() for name, tensor in first.items()}
    weight.neg_()
    second = snapshots.take(files_of(state), nothing).make()[0].content
    assert {name: tensor.data_ptr() for name, tensor in second.items()} == pointers
    assert torch.equal(second["row"], weight[1])


def test_a_snapshot_of_other_shapes_takes_other_memory() -> None:
    snapshots = Snapshots("cpu")
    for shape in ((3,), (5,), (2, 2)):
        state = {"a": torch.rand(2), "b": torch.rand(shape), "c": torch.rand(4).to(torch.bfloat16)}
        [copied] = snapshots.take(files_of(state), nothing).make()
        assert all(torch.equal(copied.content[name], state[name]) for name in state)


def test_reserved_memory_is_what_a_snapshot_takes() -> None:
    state, memory = {"w": torch.rand(1000)}, HostMemory("cpu")
    memory.reserve(files_of(state))
    reserved = memory.nbytes
    [copied] = memory.copies(files_of(state), nothing)
    assert torch.equal(copied.content["w"], state["w"])
    assert memory.nbytes == reserved > 0


def test_memory_is_little_more_than_a_snapshots_in_pieces_of_powers_of_two(monkeypatch: pytest.MonkeyPatch) -> None:
    """Of such tensors PyTorch would pin almost twice the bytes, of each by itself or of all in one buffer."""
    monkeypatch.setattr("dreambooth.training.host_pieces.PIECE", 2**16)
    state = {"large": torch.ones(2**15 + 1)} | {f"w{i}": torch.full((2**12 + 1,), float(i)) for i in range(26)}
    memory = HostMemory("cpu")
    for _ in range(2):
        [copied] = memory.copies(files_of(state), nothing)
        assert all(torch.equal(copied.content[name], tensor) for name, tensor in state.items())
    needed = sum(tensor.numel() * tensor.element_size() for tensor in state.values())
    assert needed <= memory.nbytes < 1.4 * needed
    assert all(piece.numel().bit_count() == 1 for piece in memory._pieces.pieces)


def test_a_copy_is_written_without_the_memory_around_it() -> None:
    state, written = {"a": torch.rand(1000), "b": torch.rand(3, 5), "none": torch.rand(0)}, io.BytesIO()
    [copied] = Snapshots("cpu").take(files_of(state), nothing).make()
    copied.write(copied.content, written)
    assert len(written.getvalue()) < 10_000
    written.seek(0)
    loaded = torch.load(written, weights_only=True)
    assert all(torch.equal(loaded[name], tensor) for name, tensor in state.items())


def test_a_check_that_fails_lets_the_engine_go_on() -> None:
    snapshots = Snapshots("cpu")

    def fail() -> None:
        raise ZeroDivisionError

    snapshot = snapshots.take(files_of({"w": torch.ones(1)}), fail)
    with pytest.raises(ZeroDivisionError):
        snapshot.make()
    snapshots.settle()


def test_a_tensor_of_several_parts_is_copied_part_by_part() -> None:
    """As quantized moments are."""
    parts = torch.rand(3), torch.rand(3)
    kept = [part.clone() for part in parts]
    [copied] = Snapshots("cpu").take(files_of({"m": TwoTensor(*parts)}), nothing).make()
    for part in parts:
        part.zero_()
    moment = copied.content["m"]
    assert isinstance(moment, TwoTensor)
    assert [torch.equal(copy, part) for copy, part in zip((moment.a, moment.b), kept, strict=True)] == [True, True]

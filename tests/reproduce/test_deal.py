"""Jobs over places: each is done once, on a device of its own, and one that fails does not stop the others."""

import functools
import os

import pytest
import torch

from flexmemory.reproduce.deal import deal


def where(number: int, device: str) -> tuple[int, str, int]:
    if number == 3:
        raise ValueError("no three")
    return number, device, os.getpid()


def dies(device: str) -> None:
    os._exit(1)


def jobs(*numbers: int):
    return {f"job {number}": functools.partial(where, number) for number in numbers}


def test_one_place_is_this_process():
    assert dict(deal(jobs(1, 2), devices=["a"], at_once=1)) == {
        "job 1": (1, "a", os.getpid()),
        "job 2": (2, "a", os.getpid()),
    }
    with pytest.raises(ValueError, match="no three"):
        list(deal(jobs(3), devices=["a"], at_once=1))


def test_each_place_stays_on_its_device():
    done = []
    with pytest.raises(RuntimeError, match=r"the same command goes on:\njob 3: no three$"):
        done.extend(deal(jobs(1, 2, 3, 4, 5, 6), devices=["a", "b"], at_once=1))
    assert sorted(name for name, _ in done) == [f"job {number}" for number in (1, 2, 4, 5, 6)]
    device_of = {process: device for _, (_, device, process) in done}
    assert {(process, device) for _, (_, device, process) in done} == set(device_of.items())
    assert set(device_of.values()) == {"a", "b"}
    assert os.getpid() not in device_of


def test_what_a_dead_process_leaves_is_said():
    with pytest.raises(RuntimeError, match=r"job 1: no process is left\njob 2: no process is left"):
        list(deal({"dies": dies, "dies too": dies} | jobs(1, 2), devices=["a"], at_once=2))


def current(device: str) -> int:
    return torch.cuda.current_device()


@pytest.mark.gpu
@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two GPUs")
def test_kernels_of_a_place_go_to_its_device():
    jobs = {"one": current, "two": current}
    assert sorted(device for _, device in deal(jobs, devices=["cuda:0", "cuda:1"], at_once=1)) == [0, 1]

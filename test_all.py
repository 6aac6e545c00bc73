"""All tests: `python -m pytest -q -n 2 test_all.py`, in two processes of one thread each. They need no data, no GPU and
no network; some draw (EGL or OSMesa)."""
import contextlib
import copy
import dataclasses
import errno
import functools
import io
import json
import math
import os
import re
import shutil
import signal
import subprocess
import sys
import time
import types
import warnings
import zipfile
from collections import OrderedDict
from pathlib import Path

import gymnasium
import h5py
import imageio.v2 as imageio
import numpy as np
import pytest
import torch
import torch.nn as nn
import torch.nn.functional as F
import tyro
from gymnasium.utils.env_checker import check_env

import data
import ed2
import envs
import mow
import pwm
import savi
from data import Episodes, Run, bootstrap_ci, convert_tdmpc2, iqm, safe_load
from envs import choose_gl

HERE = str(Path(__file__).resolve().parent)
if "PYTEST_XDIST_WORKER" in os.environ:  # side by side: more threads than cores are slower than one each
    torch.set_num_threads(1)
    os.environ["OMP_NUM_THREADS"] = "1"  # of the scripts that tests start
with contextlib.suppress(SystemExit):  # without OpenGL only the tests that draw fail
    choose_gl()  # now, because mujoco looks at the choice once, when it is imported

# ------------------------------------------------------------------------------------------------------------ data.py
FACTS = {"a-b": (3, 2, 12), "x/y:z": (5, 1, 9)}


def says(*words):
    """A SystemExit of one line that contains all words."""
    class Check:
        def __enter__(self):
            return self

        def __exit__(self, kind, e, tb):
            assert kind is SystemExit, f"expected SystemExit, got {kind}: {e}"
            text = str(e)
            assert "\n" not in text and len(text) > 30, text
            assert all(w in text for w in words), text
            return True
    return Check()


def episode(task, n, t, facts):
    """Values that encode (episode, time, column): obs = 1000 n + row + column/8, act = obs + 0.5, rew = 1000 n + t."""
    O, A, _ = facts[task]
    base = 1000 * n + np.arange(t + 1)[:, None]
    return (base + np.arange(O) / 8, base[:-1] + .5 + np.arange(A) / 8, 1000. * n + np.arange(t), np.zeros(t, bool))


def fill(path, lengths, facts=None):
    facts = facts or FACTS
    eps = Episodes.create(path, facts)
    for task, ts in lengths.items():
        eps.append(task, *zip(*[episode(task, n, t, facts) for n, t in enumerate(ts)]))
    return eps


LENGTHS = {"a-b": [12, 5, 12, 3, 7, 9, 12, 12, 4, 8], "x/y:z": [9, 9, 2, 6, 5]}


def gen(seed=0):
    return torch.Generator().manual_seed(seed)


# ------------------------------------------------------------------------------------------------------ storage
def test_round_trip_layout_and_numpy_can_read_it(tmp_path):
    eps = fill(tmp_path, LENGTHS)
    assert eps.counts() == {"a-b": 10, "x/y:z": 5} and eps.tasks == ("a-b", "x/y:z")
    again = Episodes.open(tmp_path)
    assert again.tasks == eps.tasks and again.facts == FACTS
    folder = next(p for p in tmp_path.iterdir() if p.name.startswith("x"))
    assert "/" not in folder.name and ":" not in folder.name
    shapes = {"obs": ((5, 10, 5), "f4"), "act": ((5, 9, 1), "f4"), "rew": ((5, 9), "f4"), "term": ((5, 9), "?"),
                  "length": ((5,), "i4")}
    for name, (shape, dtype) in shapes.items():
        x = np.load(folder / f"{name}.npy")
        assert x.shape == shape and x.dtype == np.dtype(dtype)
        assert (x == again.arrays("x/y:z")[name]).all()
    a = again.arrays("a-b")
    assert a["length"].tolist() == LENGTHS["a-b"] and (a["obs"][1, 6:] == 0).all() and (a["act"][1, 5:] == 0).all()
    assert a["obs"][9, 8, 2] == 9008.25
    assert Episodes.open(tmp_path, ["x/y:z"]).tasks == ("x/y:z",)
    assert len({len(data._header(n, (3, 4), np.dtype("<f4"))) for n in (0, 1, 10**6, 10**12)}) == 1


def test_append_one_torch_and_bulk(tmp_path):
    eps = Episodes.create(tmp_path, FACTS)
    assert eps.counts()["a-b"] == 0 and eps.arrays("a-b")["obs"].shape == (0, 13, 3)
    eps.append("a-b", *episode("a-b", 0, 4, FACTS))
    eps.append("a-b", *[torch.as_tensor(x) for x in episode("a-b", 1, 12, FACTS)])
    eps.append("a-b", [], [], [], [])
    term = np.array([False, False, True])
    o, a, r, _ = episode("a-b", 2, 3, FACTS)
    eps.append("a-b", [o], [a], [r], [term])
    x = eps.arrays("a-b")
    assert x["length"].tolist() == [4, 12, 3] and x["term"][2].tolist() == [False, False, True] + [False] * 9
    assert x["obs"][1, 12, 0] == 1012


def test_create_twice_and_disagreement(tmp_path):
    eps = fill(tmp_path, LENGTHS)
    assert Episodes.create(tmp_path, FACTS).counts() == eps.counts()
    with says("a-b", "(3, 2, 12)", "(3, 2, 13)"):
        Episodes.create(tmp_path, {"a-b": (3, 2, 13)})
    more = Episodes.create(tmp_path, {"new": (1, 1, 2)})
    assert more.tasks == ("new",) and Episodes.open(tmp_path).tasks == ("a-b", "x/y:z", "new")
    with says("'..'"):
        Episodes.create(tmp_path, {"..": (1, 1, 1)})


def snapshot(path):
    return {p.relative_to(path): p.read_bytes() for p in sorted(Path(path).rglob("*")) if p.is_file()}


def test_bad_episodes_write_nothing(tmp_path):
    eps = fill(tmp_path, LENGTHS)
    before = snapshot(tmp_path)
    o, a, r, t = episode("a-b", 0, 6, FACTS)
    for i, bad in [(0, np.nan), (0, np.inf), (0, 1e300), (1, np.nan), (2, -np.inf)]:
        x = [o.copy(), a.copy(), r.copy(), t]
        x[i].flat[-1] = bad
        with says("NaN or inf", "nothing was written"):
            eps.append("a-b", *[[y, z] for y, z in zip((o, a, r, t), x)])        # first good, second bad
    for x in [(o[:-1], a, r, t), (o, a[:-1], r, t), (o, a, r, t[:-1]), (o[:, :2], a, r, t), (o, a[:, :1], r, t),
              episode("a-b", 0, 13, FACTS)]:
        with says("expected", "nothing was written"):
            eps.append("a-b", *x)
    with says("same number"):
        eps.append("a-b", [o], [a, a], [r], [t])
    with says("no task", "nope"):
        eps.append("nope", o, a, r, t)
    with says("expected"):
        eps.append("a-b", [o[:1]], [a[:0]], [r[:0]], [t[:0]])
    assert snapshot(tmp_path) == before


def test_crash_between_files_is_overwritten(tmp_path):
    ref = fill(tmp_path / "ref", LENGTHS)
    eps = fill(tmp_path / "x", {k: v[:-2] for k, v in LENGTHS.items()})
    for task in eps.tasks:                                   # the process died after data and some headers
        n = eps.counts()[task]
        for name, (row, dtype) in data._layout(FACTS[task]).items():
            with open(eps._file(task, name), "r+b") as f:
                f.seek(0, 2)
                f.write(b"\xff" * 5 * int(np.prod(row)) * dtype.itemsize)
                if name in ("obs", "act"):
                    f.seek(0)
                    f.write(data._header(n + 5, row, dtype))
    eps = Episodes.open(tmp_path / "x")
    assert eps.counts() == {k: len(v) - 2 for k, v in LENGTHS.items()}
    for task, ts in LENGTHS.items():
        for n in range(len(ts) - 2, len(ts)):
            eps.append(task, *episode(task, n, ts[n], FACTS))
        for name, x in ref.arrays(task).items():
            assert (eps.arrays(task)[name] == x).all()
            assert np.load(eps._file(task, name)).shape == x.shape


def test_kill_while_appending(tmp_path):
    eps = Episodes.create(tmp_path, {"t": (4, 2, 50)})
    code = f"""
import sys; sys.path.insert(0, {HERE!r})
import numpy as np, data
e = data.Episodes.open({str(tmp_path)!r})
print('go', flush=True)
while True:
    n = e.counts()['t']
    e.append('t', np.full((51, 4), n), np.full((50, 2), n), np.full(50, n), np.zeros(50, bool))
"""
    for _ in range(2):
        p = subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE)
        p.stdout.readline()
        time.sleep(.3)
        p.kill()
        p.wait()
        n = Episodes.open(tmp_path).counts()["t"]
        x = eps.arrays("t")
        assert n > 0 and all((x[f][:, 0].reshape(n, -1) == np.arange(n)[:, None]).all() for f in ("obs", "act", "rew"))


def test_truncate(tmp_path):
    eps = fill(tmp_path, LENGTHS)
    eps.truncate({"a-b": 4})
    assert eps.counts() == {"a-b": 4, "x/y:z": 5}
    eps.append("a-b", *episode("a-b", 77, 2, FACTS))
    x = eps.arrays("a-b")
    assert x["length"].tolist() == [12, 5, 12, 3, 2] and x["obs"][4, 0, 0] == 77000 and (x["obs"][4, 3:] == 0).all()
    with says("cannot cut", "it has 5"):
        eps.truncate({"x/y:z": 2, "a-b": 9})
    assert eps.counts()["x/y:z"] == 5


def test_full_disk(tmp_path, monkeypatch):
    eps = fill(tmp_path, LENGTHS)
    before = snapshot(tmp_path)
    usage = type("U", (), {"free": 10})
    with monkeypatch.context() as m:
        m.setattr(data.shutil, "disk_usage", lambda p: usage)
        with says("free", "nothing was written"):
            eps.append("a-b", *episode("a-b", 0, 6, FACTS))
    calls, real = [], os.pwrite

    def full(fd, view, at):                                  # the disk fills in the middle of the second file
        calls.append(at)
        if len(calls) == 3:
            raise OSError(errno.ENOSPC, "No space left on device")
        return real(fd, view[:max(1, len(view) // 2)] if len(calls) == 2 else view, at)
    with monkeypatch.context() as m:
        m.setattr(data.os, "pwrite", full)
        with says("disk is full", "nothing written earlier is lost"):
            eps.append("a-b", *episode("a-b", 0, 6, FACTS))
    assert snapshot(tmp_path) == before


def test_open_refuses(tmp_path):
    with says("no episodes", "convert_tdmpc2"):
        Episodes.open(tmp_path / "nothing")
    eps = fill(tmp_path, LENGTHS)
    with says("no task 'q'", "a-b"):
        Episodes.open(tmp_path, ["q"])
    with says("no task 'q'"):
        eps.arrays("q")
    file = eps._file("a-b", "act")
    good = file.read_bytes()
    file.write_bytes(good[:-100])
    with says("cut short", "act.npy"):
        Episodes.open(tmp_path)
    file.write_bytes(b"hello")
    with says("cannot be read", "act.npy"):
        Episodes.open(tmp_path)
    np.save(file, np.zeros((10, 12, 3), np.float32))
    with says("act.npy", "meta.json"):
        Episodes.open(tmp_path)
    file.write_bytes(good)
    meta = file.with_name("meta.json")
    text = meta.read_text()
    meta.write_text(text.replace('"format": 1', '"format": 9'))
    with says("format 9"):
        Episodes.open(tmp_path)
    meta.write_text("{")
    with says("meta.json"):
        Episodes.open(tmp_path)
    meta.write_text(text)
    assert Episodes.open(tmp_path).counts() == eps.counts()


def test_forty_gigabytes_open_without_reading(tmp_path):
    facts = {f"t{i}": (24, 6, 500) for i in range(4)}
    eps = Episodes.create(tmp_path, facts)
    n = 160_000                                              # 4 x 10 GB of holes: reading them would take minutes
    for task in facts:
        for name, (row, dtype) in data._layout(facts[task]).items():
            with open(eps._file(task, name), "r+b") as f:
                f.write(data._header(n, row, dtype))
                f.truncate(f.tell() + n * int(np.prod(row)) * dtype.itemsize)
        with open(eps._file(task, "length"), "r+b") as f:
            f.seek(len(data._header(n, (), np.dtype("<i4"))))
            f.write(np.full(n, 500, "<i4").tobytes())
    eps = Episodes.open(tmp_path)
    s = eps.sampler(list(facts), 16, resident=False)
    obs, _act, _rew, task = s.sequences(64, gen())
    assert s.nbytes > 39e9 and obs.shape == (17, 64, 24) and (obs == 0).all() and not s.resident
    assert s.starts(8, gen()).shape == (4, 8, 24)
    with says("resident", "GB"):
        eps.sampler(list(facts), 16, resident=True)


# ----------------------------------------------------------------------------------------------------- sampling
@pytest.mark.parametrize("held", [False, True])
def test_resident_equals_mapped(tmp_path, held):
    eps = fill(tmp_path, LENGTHS)
    kw = {"tasks": ["x/y:z", "a-b"], "horizon": 4, "held_out": .25}
    a, b = eps.sampler(resident=True, **kw), eps.sampler(resident=False, **kw)
    assert a.resident and not b.resident and a.nbytes == b.nbytes == (10 * 13 + 5 * 10) * (5 + 2 + 1) * 4
    assert a.too_short == b.too_short == 2
    ga, gb = gen(3), gen(3)
    for _ in range(5):
        x, y = a.sequences(64, ga, held_out=held), b.sequences(64, gb, held_out=held)
        assert all(torch.equal(p, q) and p.dtype == q.dtype for p, q in zip(x, y))
        assert torch.equal(a.starts(7, ga), b.starts(7, gb))
    assert x[0].shape == (5, 64, 5) and x[1].shape == (4, 64, 2) and x[2].shape == (4, 64) and x[3].dtype == torch.int64
    assert eps.sampler(["a-b"], 4).resident and not torch.equal(a.sequences(64, ga)[0], x[0])


def decode(s, batch, names, facts=FACTS):
    """Check every slice against the encoding; returns (task, episode, start) of each."""
    obs, act, rew, task = (x.numpy().astype(float) for x in batch)
    out = []
    for b in range(obs.shape[1]):
        k = int(task[b])
        O, A, _ = facts[names[k]]
        n, t = divmod(int(obs[0, b, 0]), 1000)
        want = episode(names[k], n, t + s.horizon, facts)
        assert (obs[:, b, :O] == want[0][t:].astype(np.float32)).all() and (obs[:, b, O:] == 0).all()
        assert (act[:, b, :A] == want[1][t:]).all() and (act[:, b, A:] == 0).all() and (rew[:, b] == want[2][t:]).all()
        out.append((k, n, t))
    return out


@pytest.mark.parametrize("resident", [False, True])
def test_slices_stay_inside_episodes_and_are_uniform(tmp_path, resident):
    eps = fill(tmp_path, LENGTHS)
    names = ["a-b", "x/y:z"]
    s = eps.sampler(names, 5, resident=resident, obs_dim=7, act_dim=4)
    assert s.too_short == 2 + 1
    g, seen = gen(), {}
    for _ in range(20):
        for k, n, t in decode(s, s.sequences(1000, g), names):
            seen[k, n, t] = seen.get((k, n, t), 0) + 1
    legal = {(k, n, t) for k, name in enumerate(names) for n, length in enumerate(LENGTHS[name])
             for t in range(length - 5 + 1)}
    assert set(seen) == legal                                # every start up to length-H inclusive, and no other
    for k, name in enumerate(names):
        fits = [n for n, length in enumerate(LENGTHS[name]) if length >= 5]
        for n in fits:
            rooms = LENGTHS[name][n] - 5 + 1
            for t in range(rooms):
                p = 20_000 / 2 / len(fits) / rooms
                assert abs(seen[k, n, t] - p) < 6 * p ** .5, (k, n, t, seen[k, n, t], p)
    st = s.starts(20_000, g).numpy()
    assert st.shape == (2, 20_000, 7)
    for k in range(len(names)):
        rows, count = np.unique(st[k, :, 0], return_counts=True)
        assert {(k, int(r) // 1000, int(r) % 1000) for r in rows} == {x for x in legal if x[0] == k}
        for r, c in zip(rows, count):
            p = 2 * 20_000 / 40_000 * seen[k, int(r) // 1000, int(r) % 1000] * 2
            assert abs(c - p) < 9 * p ** .5


def test_held_out(tmp_path):
    for k, frac in ((20, .05), (4, .25), (2, .5), (3, 1 / 3)):
        before = None
        for n in (3, 4, 5, 45):
            eps = fill(tmp_path / f"{k}-{n}", {"a-b": [12] * n})
            s = eps.sampler(["a-b"], 12, held_out=frac)
            g = gen(1)
            train = {x[1] for _ in range(3) for x in decode(s, s.sequences(1500, g), ["a-b"])}
            starts = set((s.starts(3000, g)[0, :, 0].numpy() // 1000).astype(int).tolist())
            held = {x[1] for x in decode(s, s.sequences(1500, g, held_out=True), ["a-b"])}
            assert train == starts
            if n < 4:
                assert held == train == set(range(n))
            else:
                assert held and not held & train and held | train == set(range(n)) and abs(len(held) - n * frac) <= 1.5
                assert before is None or (before[0] <= held and before[1] <= train)
                before = held, train
    assert eps.sampler(["a-b"], 12)._pools[0]["count"].tolist() == [45]          # 0.0: nothing is held out


def test_sampler_refuses_and_skips_empty_tasks(tmp_path):
    eps = fill(tmp_path, {"a-b": [12, 3]})
    with says("none of x/y:z"):
        eps.sampler(["x/y:z"], 3)
    s = eps.sampler(["x/y:z", "a-b"], 3)
    assert (s.sequences(50, gen())[3] == 1).all() and s.sequences(5, gen(), held_out=True)[0].shape == (4, 5, 5)
    with says("'x/y:z' has no episodes"):
        s.starts(3, gen())
    with says("13 steps", "12"):
        eps.sampler(["a-b"], 13)
    with says("obs_dim=2"):
        eps.sampler(["a-b"], 3, obs_dim=2)
    for kw in ({"horizon": 0}, {"horizon": 3, "held_out": .9}, {"horizon": 3, "held_out": -1}):
        with says("expected"):
            eps.sampler(["a-b"], **kw)
    with says("expected"):
        eps.sampler([], 3)
    with says("no task 'q'"):
        eps.sampler(["q"], 3)


def test_no_python_loop_or_sync_over_the_batch(tmp_path, monkeypatch):
    eps = fill(tmp_path, LENGTHS)
    s = eps.sampler(["a-b", "x/y:z"], 3, resident=True)
    for name in ("item", "tolist", "__int__", "__bool__", "numpy", "cpu"):
        monkeypatch.setattr(torch.Tensor, name, lambda *a: pytest.fail("sync in a resident batch"))
    assert s.sequences(8, gen())[0].shape == (4, 8, 5) and s.starts(8, gen()).shape == (2, 8, 5)


# ------------------------------------------------------------------------------------------------ published format
def fake_modules(monkeypatch, new):
    """Classes that pickle under tensordict's names, in the layout of 2023 or of today."""
    for name in ("tensordict", "tensordict.tensordict", "tensordict.utils", "tensordict._td", "tensordict._reductions"):
        monkeypatch.setitem(sys.modules, name, types.ModuleType(name))

    class TensorDict:
        def __init__(self, content, batch_size):
            self._tensordict, self._batch_size = content, torch.Size(batch_size)
            self._device, self._td_dim_names, self._is_locked = torch.device("cpu"), None, False

        def __reduce_ex__(self, protocol):
            return (_make_td, (TensorDict, self.__dict__)) if new else super().__reduce_ex__(protocol)

    class _StringOnlyDict(dict):
        pass

    def _make_td(cls, state):
        return state
    homes = {TensorDict: "tensordict._td" if new else "tensordict.tensordict", _StringOnlyDict: "tensordict.utils",
             _make_td: "tensordict._reductions"}
    for x, home in homes.items():
        x.__module__, x.__qualname__ = home, x.__name__
        setattr(sys.modules[home], x.__name__, x)
    return lambda content, batch: TensorDict(content if new else _StringOnlyDict(content), batch)


DIMS = {"p": (4, 2), "q": (3, 1), "r": (4, 2)}


def chunk(n, seed, T=6, O=4, A=2, tasks=("p", "q", "r"), start=0):
    """n episodes of mixed tasks; filler row 0: NaN reward, NaN / garbage action."""
    rng = np.random.default_rng(seed)
    task = rng.integers(len(tasks), size=n)
    obs, act = rng.normal(size=(n, T + 1, O)), rng.uniform(-1, 1, (n, T + 1, A))
    rew = np.broadcast_to((start + np.arange(n))[:, None] + np.arange(T + 1) / 64, (n, T + 1)).copy()
    for i, k in enumerate(task):
        o, a = DIMS[tasks[k]]
        obs[i, :, o:], act[i, :, a:] = 0, 0
    rew[:, 0] = np.nan
    act[::2, 0], act[1::2, 0] = np.nan, 1e30
    return {"obs": torch.tensor(obs, dtype=torch.float32), "action": torch.tensor(act, dtype=torch.float32),
            "reward": torch.tensor(rew, dtype=torch.float32),
            "task": torch.tensor(task)[:, None].expand(-1, T + 1).to(torch.int32).contiguous()}


def write_chunks(src, monkeypatch, sizes=(40, 40, 17), new=False, T=6):
    make = fake_modules(monkeypatch, new)
    src.mkdir()
    out = []
    for i, n in enumerate(sizes):
        out.append(chunk(n, i, T=T, start=sum(sizes[:i])))
        torch.save(make(out[-1], (n, T + 1)), src / f"chunk_{i}.pt")
    monkeypatch.undo()
    assert "tensordict" not in sys.modules
    return {k: torch.cat([c[k] for c in out]).numpy() for k in out[0]}


def check_converted(eps, ref):
    for k, name in enumerate(eps.tasks):
        x, sel = eps.arrays(name), np.flatnonzero(ref["task"][:, 1] == k)
        o, a = DIMS[name]
        assert (x["obs"] == ref["obs"][sel, :, :o]).all() and (x["act"] == ref["action"][sel, 1:, :a]).all()
        assert (x["rew"] == ref["reward"][sel, 1:]).all() and not x["term"].any()
        assert (x["length"] == ref["obs"].shape[1] - 1).all() and len(sel) == len(x["length"])


@pytest.mark.parametrize("new", [False, True])
def test_convert(tmp_path, monkeypatch, new):
    ref = write_chunks(tmp_path / "src", monkeypatch, new=new)
    monkeypatch.setattr(data, "SLAB_BYTES", 3000)
    eps = convert_tdmpc2(tmp_path / "src", tmp_path / "dst", ["p", "q", "r"], DIMS, progress=False)
    assert eps.facts == {"p": (4, 2, 6), "q": (3, 1, 6), "r": (4, 2, 6)} and sum(eps.counts().values()) == 97
    check_converted(eps, ref)
    for resident in (False, True):                           # row 0's NaN filler never reaches a batch
        s = eps.sampler(eps.tasks, 6, resident=resident)
        assert all(torch.isfinite(x).all() for x in s.sequences(500, gen()))
    before = snapshot(tmp_path / "dst")
    convert_tdmpc2(tmp_path / "src", tmp_path / "dst", ["p", "q", "r"], DIMS, progress=False)
    assert snapshot(tmp_path / "dst") == before
    assert convert_tdmpc2(tmp_path / "gone", tmp_path / "dst", ["p", "q", "r"], DIMS).counts() == eps.counts()
    with says("other tasks"):
        convert_tdmpc2(tmp_path / "src", tmp_path / "dst", ["q", "p", "r"], DIMS)
    with says("another origin"):
        fill(tmp_path / "other", LENGTHS)
        convert_tdmpc2(tmp_path / "src", tmp_path / "other", ["p", "q", "r"], DIMS)
    plain = convert_tdmpc2(tmp_path / "src", tmp_path / "plain")               # no names, padding kept
    assert plain.tasks == ("task-0", "task-1", "task-2") and plain.facts["task-1"] == (4, 2, 6)


def test_kill_during_conversion_then_rerun_is_identical(tmp_path, monkeypatch):
    write_chunks(tmp_path / "src", monkeypatch, sizes=(150, 150, 60))
    code = f"""
import sys; sys.path.insert(0, {HERE!r})
import data
import ed2
data.SLAB_BYTES = 6000
data.convert_tdmpc2({str(tmp_path / 'src')!r}, sys.argv[1], ["p", "q", "r"], {DIMS!r}, progress=False)
"""
    (tmp_path / "go.py").write_text(code)
    run = [sys.executable, str(tmp_path / "go.py")]
    subprocess.run([*run, str(tmp_path / "ref")], check=True)
    ref, kills = snapshot(tmp_path / "ref"), 0
    for _ in range(2):
        p = subprocess.Popen([*run, str(tmp_path / "dst")])
        book, begin = tmp_path / "dst" / "convert.json", None
        while p.poll() is None:                              # kill at a random moment after some new slabs
            at = json.loads(book.read_text())["at"] if book.exists() else None
            begin = begin or at
            if at and at != begin and begin:
                time.sleep(np.random.rand() * .02)
                os.kill(p.pid, signal.SIGKILL)
                break
        kills += p.wait() == -signal.SIGKILL
        if p.returncode:
            with says("unfinished conversion"):
                Episodes.open(tmp_path / "dst")
    assert kills >= 1
    subprocess.run([*run, str(tmp_path / "dst")], check=True)
    got = snapshot(tmp_path / "dst")
    got = {k: v for k, v in got.items() if not k.name.startswith(".")}         # a killed rename leaves its temporary
    assert got == ref


def test_append_killed_at_every_write_of_a_slab(tmp_path, monkeypatch):
    """The same as kill -9, but at each single system call in turn."""
    write_chunks(tmp_path / "src", monkeypatch, sizes=(12,))
    monkeypatch.setattr(data, "SLAB_BYTES", 2400)
    args = (["p", "q", "r"], DIMS, False)
    convert_tdmpc2(tmp_path / "src", tmp_path / "ref", *args)
    ref, real = snapshot(tmp_path / "ref"), os.pwrite

    class Killed(BaseException):
        pass
    for stop in range(0, 60, 7):
        calls = []

        def write(fd, view, at, calls=calls, stop=stop):
            calls.append(at)
            if len(calls) > stop:
                raise Killed
            return real(fd, view, at)
        with monkeypatch.context() as m:
            m.setattr(data.os, "pwrite", write)
            m.setattr(data.os, "ftruncate", lambda *a: None)                   # a killed process tidies nothing
            with pytest.raises(Killed):
                convert_tdmpc2(tmp_path / "src", tmp_path / f"{stop}", *args)
        convert_tdmpc2(tmp_path / "src", tmp_path / f"{stop}", *args)
        assert snapshot(tmp_path / f"{stop}") == ref


def test_more_chunks_later(tmp_path, monkeypatch):
    ref = write_chunks(tmp_path / "src", monkeypatch)
    (tmp_path / "src" / "chunk_2.pt").rename(tmp_path / "later")
    assert sum(convert_tdmpc2(tmp_path / "src", tmp_path / "dst", list("pqr"), DIMS).counts().values()) == 80
    (tmp_path / "later").rename(tmp_path / "src" / "chunk_2.pt")
    check_converted(convert_tdmpc2(tmp_path / "src", tmp_path / "dst", list("pqr"), DIMS), ref)


def test_convert_bad_input(tmp_path, monkeypatch):
    src, dst = tmp_path / "src", tmp_path / "dst"
    with says("no chunk_0.pt"):
        convert_tdmpc2(src, dst)
    write_chunks(src, monkeypatch)
    args = (["p", "q", "r"], DIMS, False)
    one = src / "chunk_1.pt"
    good = one.read_bytes()
    one.rename(tmp_path / "aside")
    with says("no chunk_1.pt", "download"):
        convert_tdmpc2(src, dst, *args)
    one.write_bytes(good[:-1000])
    with says("chunk_1.pt", "cut short"):
        convert_tdmpc2(src, dst, *args)
    with says("2 names"):
        one.write_bytes(good)
        convert_tdmpc2(src, dst, ["p", "q"], DIMS)
    with says("no (obs_dim, act_dim)", "'q'"):
        convert_tdmpc2(src, dst, ["p", "q", "r"], {"p": (4, 2), "r": (4, 2)})
    with monkeypatch.context() as m:
        m.setattr(data.shutil, "disk_usage", lambda p: type("U", (), {"free": 1000}))
        with says("GB free", "nothing was written"):
            convert_tdmpc2(src, dst, *args)
    monkeypatch.setattr(data, "SLAB_BYTES", 1000)
    for what, words in {"obs": ["NaN or inf", "chunk_1.pt", "episode 7 "], "reward": ["NaN or inf", "episode 7 "],
                        "action": ["NaN or inf", "episode 7 "], "task": ["more than one task id"],
                        "pad": ["beyond", "act_dim 1"]}.items():
        d = safe_load(one, mmap=False)
        if what == "pad":
            i = int(np.flatnonzero(d["task"][:, 1].numpy() == 1)[0])
            d["action"][i, 3, 1] = .5
        elif what == "task":
            d["task"][7, 4] += 1
        else:
            d[what][7, 2] = float("nan")
        torch.save(d, one)
        with says(*words):
            convert_tdmpc2(src, tmp_path / what, *args)
        one.write_bytes(good)                                # a corrected file (same size) continues
        if json.loads((tmp_path / what / "convert.json").read_text())["chunks"]["chunk_1.pt"] == len(good):
            convert_tdmpc2(src, tmp_path / what, *args)
    torch.save({"obs": torch.zeros(3, 7, 4)}, one)
    with says("chunk_1.pt", "expected obs (N,R,O)"):
        convert_tdmpc2(src, tmp_path / "y", *args)
    torch.save(chunk(5, 0, T=4), one)
    with says("chunk_1.pt", "mt80"):
        convert_tdmpc2(src, tmp_path / "y", *args)
    assert not dst.exists() or not any(dst.glob("*/meta.json"))


# ---------------------------------------------------------------------------------------------------- safe_load
def equal(a, b):
    if isinstance(b, torch.Tensor):
        return torch.equal(a, b.detach()) and a.dtype == b.dtype
    if isinstance(b, dict):
        return type(a) is dict and list(a) == list(b) and all(equal(a[k], b[k]) for k in b)
    if isinstance(b, (list, tuple)):
        return len(a) == len(b) and all(equal(x, y) for x, y in zip(a, b))
    return a == b


@pytest.mark.parametrize("mmap", [True, False])
def test_safe_load_reads_what_torch_writes(tmp_path, mmap):
    net = torch.nn.Sequential(torch.nn.Linear(3, 4), torch.nn.LayerNorm(4))
    opt = torch.optim.Adam(net.parameters())
    net(torch.ones(2, 3)).sum().backward()
    opt.step()
    base = torch.arange(24.).reshape(2, 3, 4)
    state = {"model": net.state_dict(), "opt": opt.state_dict(), "views": [base, base[:, 1], base.permute(2, 0, 1)],
             "dtypes": [torch.ones(3, dtype=d) for d in (torch.bfloat16, torch.half, torch.int64, torch.bool,
                                                        torch.uint8, torch.double, torch.uint16)],
             "p": torch.nn.Parameter(torch.ones(2)), "empty": torch.zeros(0, 3), "scalar": torch.tensor(3.),
             "misc": (1, 2.5, "x", None, True, 10**30), "size": torch.Size([1, 2]), "bytes": b"\x00\xff"}
    torch.save(state, tmp_path / "a.pt")
    got = safe_load(tmp_path / "a.pt", mmap=mmap)
    assert equal(got, state)
    raw = (tmp_path / "a.pt").read_bytes()
    got["views"][0].mul_(2)                                  # writable, shared between views, never reaches the file
    assert got["views"][1][0, 0] == 8 and (tmp_path / "a.pt").read_bytes() == raw
    torch.save({"d": torch.float32, "v": torch.device("cuda", 1), "np": np.float64(2.5), "i": np.int32(7),
                    "a": np.arange(6.).reshape(2, 3), "f": np.asfortranarray(np.arange(6, dtype=">i2").reshape(2, 3))},
               tmp_path / "b.pt")
    got = safe_load(tmp_path / "b.pt", mmap=mmap)
    assert got["d"] is torch.float32 and got["v"] == "cuda:1" and got["np"] == 2.5 and got["i"] == 7
    assert got["a"].tolist() == [[0, 1, 2], [3, 4, 5]] == got["f"].tolist()
    with zipfile.ZipFile(tmp_path / "a.pt") as z, zipfile.ZipFile(tmp_path / "c.pt", "w", zipfile.ZIP_DEFLATED) as c:
        for name in z.namelist():
            c.writestr(name, z.read(name))                   # compressed and unaligned members are read
    assert equal(safe_load(tmp_path / "c.pt", mmap=mmap), state)


def test_safe_load_maps_unknown_instances(tmp_path, monkeypatch):
    module = types.ModuleType("pwm_utils")
    monkeypatch.setitem(sys.modules, "pwm_utils", module)

    class RunningMeanStd:
        pass
    RunningMeanStd.__module__, RunningMeanStd.__qualname__, module.RunningMeanStd = "pwm_utils", "RunningMeanStd", \
        RunningMeanStd
    rms = RunningMeanStd()
    rms.mean, rms.count = torch.zeros(3), 1e-4
    torch.save({"obs_rms": rms, "w": OrderedDict(a=torch.ones(2))}, tmp_path / "a.pt")
    del sys.modules["pwm_utils"]
    assert equal(safe_load(tmp_path / "a.pt"), {"obs_rms": {"mean": torch.zeros(3), "count": 1e-4},
                                                "w": {"a": torch.ones(2)}})


class Evil:
    def __init__(self, *call):
        self.call = call

    def __reduce__(self):
        return self.call[0], self.call[1:]


@pytest.mark.parametrize("make", [
    lambda f: Evil(os.system, f"touch {f}"), lambda f: Evil(eval, f"open({str(f)!r}, 'w')"),
    lambda f: Evil(exec, f"open({str(f)!r}, 'w')"), lambda f: Evil(subprocess.check_call, ["touch", str(f)]),
    lambda f: Evil(getattr, "x", "upper"), lambda f: Evil(__import__, "antigravity"),
    lambda f: np.array([Evil(os.system, f"touch {f}")], dtype=object), lambda f: Evil(np.load, str(f))],
    ids=["system", "eval", "exec", "subprocess", "getattr", "import", "objectarray", "npload"])
def test_malicious_pickles_are_refused(tmp_path, make):
    flag = tmp_path / "flag"
    torch.save({"obs": torch.zeros(2), "x": make(flag)}, tmp_path / "chunk_0.pt")
    with says("refused"):
        safe_load(tmp_path / "chunk_0.pt")
    with says("refused"):
        convert_tdmpc2(tmp_path, tmp_path / "dst")
    assert not flag.exists() and not (tmp_path / "dst").exists()


@pytest.mark.parametrize("body", [
    b"ctorch\n_C._jit_init\n.", b"cos\nsystem\n(S'touch flag'\ntR.", b"ctorch._utils\n_rebuild_qtensor\n.",
    b"\x80\x04\x8c\x08builtins\x8c\x04eval\x93.", b"\x80\x02\x82\x01.", b"ctorch\nload\n.", b"ctorch.hub\nload\n.",
    b"cnumpy\nloadtxt\n.", b"ctensordict\nos\n.", b"ctorch\nos.system\n.", b"", b"garbage", b"(lp0\ng0\na."])
def test_handmade_pickles_end_in_one_sentence(tmp_path, body):
    with zipfile.ZipFile(tmp_path / "a.pt", "w") as z:
        z.writestr("a/data.pkl", body)
    with says("a.pt"):
        safe_load(tmp_path / "a.pt")


def test_safe_load_files_that_are_none(tmp_path):
    with says("no file"):
        safe_load(tmp_path / "nope.pt")
    for content in (b"", b"PK", b"hello world", b"\x80\x02}."):
        (tmp_path / "a.pt").write_bytes(content)
        with says("a.pt"):
            safe_load(tmp_path / "a.pt")
    with zipfile.ZipFile(tmp_path / "a.pt", "w") as z:
        z.writestr("readme", "x")
    with says("a.pt"):
        safe_load(tmp_path / "a.pt")
    torch.save({"x": torch.zeros(1000), "y": [1]}, tmp_path / "a.pt")
    raw = (tmp_path / "a.pt").read_bytes()
    for n in (30, 500, 2000, len(raw) - 1):
        (tmp_path / "a.pt").write_bytes(raw[:n])
        with says("cut short"):
            safe_load(tmp_path / "a.pt")


# ------------------------------------------------------------------------------------------------------------ Run
def test_run_folder_and_metrics(tmp_path):
    run = Run("pendulum-spin", "pwm", 3, {"horizon": 16, "p": Path("x")}, root=tmp_path)
    assert run.dir.name.startswith("pendulum-spin__pwm__3__") and (run.dir / "data.py").exists()
    assert json.loads((run.dir / "args.json").read_text())["args"] == {"horizon": 16, "p": "x"}
    run.log(1, loss=torch.tensor(2.), x=3)
    run.log(2, {"eval/a-b/return": np.float32(1.5)}, loss=.5)
    run.close()
    rows = [json.loads(x) for x in (run.dir / "metrics.jsonl").read_text().splitlines()]
    assert rows[1]["eval/a-b/return"] == 1.5 and rows[0]["loss"] == 2 and rows[0]["step"] == 1 and "time" in rows[0]
    assert list(run.dir.glob("events.*"))
    again = Run("pendulum-spin", "pwm", 3, {}, root=tmp_path)
    assert again.dir != run.dir
    many = Run(",".join(f"walker-{i}" for i in range(30)), "pwm", 0, {}, root=tmp_path)
    assert len(many.dir.name) < 120 and "+29" in many.dir.name
    assert Run("ALE/Pong-v5", "mow", 0, {}, root=tmp_path).dir.parent == tmp_path
    assert [p for p in tmp_path.rglob("*.tmp")] == []


def test_run_copies_the_script(tmp_path):
    (tmp_path / "my.py").write_text(f"import sys; sys.path.insert(0, {HERE!r})\nimport data\n"
                                    "print(data.Run('t', 'my', 0, {}).dir)")
    out = subprocess.run([sys.executable, "my.py"], cwd=tmp_path, capture_output=True, text=True, check=True).stdout
    assert (tmp_path / out.strip() / "my.py").exists()


def test_run_resume_cuts_metrics(tmp_path):
    run = Run("t", "pwm", 0, {"a": 1}, root=tmp_path)
    state = {"step": 2, "w": torch.arange(3.), "nested": {"l": [1, (2., None)], 0: "s"}, "rng": torch.get_rng_state()}
    for i in range(5):
        run.log(i, loss=i)
        if i == 2:
            run.save(state)
        if i == 1:
            run.save({"early": True}, "model.pt")
    run.close()
    with open(run.dir / "metrics.jsonl", "ab") as f:
        f.write(b'{"step": 5, "lo')                          # killed in the middle of a line
    again = Run("t", "pwm", 0, {"a": 9}, resume=run.dir)
    assert again.resumed and again.args == {"a": 1} and again.dir == run.dir
    assert again.load("model.pt") == {"early": True}         # another file cuts nothing
    got = again.load()
    assert equal(got, state)
    again.log(3, loss=3)
    again.load()                                             # after the first log nothing is cut any more
    again.log(4, loss=4)
    again.close()
    rows = [json.loads(x) for x in (run.dir / "metrics.jsonl").read_text().splitlines()]
    assert [r["step"] for r in rows] == [0, 1, 2, 3, 4] and [r["loss"] for r in rows] == [0, 1, 2, 3, 4]
    for args in (("t", "ed2"), ("u", "pwm")):
        with says("is a run of pwm on 't'"):
            Run(*args, 0, {}, resume=run.dir)
    with says("no readable args.json"):
        Run("t", "pwm", 0, {}, resume=tmp_path)


def test_checkpoint_refuses_and_survives(tmp_path, monkeypatch):
    run = Run("t", "pwm", 0, {}, root=tmp_path)
    with says("no", "checkpoint.pt"):
        run.load()
    run.save({"x": 1})
    for bad, words in (({"a": {"b": [np.float64(1)]}}, "state['a']['b'][0]"), ({"a": {1, 2}}, "set"),
                       ({"a": np.zeros(2)}, "ndarray"), ({np.int64(1): 2}, "key"), ({"a": Evil(print)}, "Evil"),
                       ({"a": torch.float32}, "dtype")):
        with says(words, "checkpoints hold"):
            run.save(bad)
    assert run.load() == {"x": 1}
    run.save({"sd": torch.nn.Linear(2, 2).state_dict(), "p": torch.nn.Parameter(torch.ones(2))})
    assert set(run.load()["sd"]) == {"weight", "bias"}
    run.save({"x": 2})

    def full(state, f, **kw):
        f.write(b"half")
        raise OSError(errno.ENOSPC, "No space left on device")

    def broken(state, f, **kw):
        raise RuntimeError("PytorchStreamWriter failed writing file")
    for failing in (full, broken):
        with monkeypatch.context() as m:
            m.setattr(torch, "save", failing)
            with says("checkpoint.pt"):
                run.save({"x": 3})
    with monkeypatch.context() as m:
        m.setattr(data.shutil, "disk_usage", lambda p: type("U", (), {"free": 1000}))
        with says("free"):
            run.save({"x": torch.zeros(1000)})
    assert run.load() == {"x": 2} and not list(run.dir.glob("*.tmp")) and not list(run.dir.glob(".*"))
    raw = (run.dir / "checkpoint.pt").read_bytes()
    for content in (raw[:-40], b"", b"junk", raw[:300]):
        (run.dir / "checkpoint.pt").write_bytes(content)
        with says("damaged"):
            run.load()
    torch.save({"x": Evil(os.system, f"touch {tmp_path / 'flag'}")}, run.dir / "checkpoint.pt")
    with says("damaged"):
        run.load()
    assert not (tmp_path / "flag").exists()


# ----------------------------------------------------------------------------------------------------- statistics
def test_iqm_equals_scipy():
    stats = pytest.importorskip("scipy.stats")
    rng = np.random.default_rng(0)
    for shape in [(1, 1), (1, 3), (3, 5), (10, 30), (7, 11), (4, 1)]:
        x = rng.normal(size=shape)
        assert np.isclose(iqm(x), stats.trim_mean(x.ravel(), .25)), shape
    assert iqm(torch.arange(8.)) == 3.5 and iqm([1, 2, 3, 400]) == 2.5
    for bad in ([], [1., np.nan], [np.inf]):
        with says("statistics"):
            iqm(bad)


def test_bootstrap_is_stratified_and_covers():
    x = np.tile(np.arange(5.) * 100, (4, 1))                 # tasks differ, runs do not
    assert bootstrap_ci(x) == (iqm(x),) * 2
    assert bootstrap_ci(np.ones((1, 4)) * np.arange(4)) == (1.5, 1.5)
    rng, hits = np.random.default_rng(0), 0
    for i in range(60):
        y = rng.normal(size=(10, 6)) + np.arange(6) * 10
        low, high = bootstrap_ci(y, stat=np.mean, reps=200, seed=i)
        hits += low <= 25 <= high
        assert low < y.mean() < high
    assert 48 <= hits <= 60
    assert bootstrap_ci(y, seed=1) == bootstrap_ci(y, seed=1) != bootstrap_ci(y, seed=2)
    narrow, wide = bootstrap_ci(y, level=.5), bootstrap_ci(y, level=.99)
    assert wide[0] < narrow[0] < narrow[1] < wide[1]
    with says("(runs, tasks)"):
        bootstrap_ci([1., 2.])


def test_module_is_alone():
    code = f"import sys; sys.path.insert(0, {HERE!r}); import data; " \
           "bad = {'envs', 'pwm', 'h5py', 'tensorboard', 'matplotlib', 'gymnasium'} & set(sys.modules); " \
           "assert not bad, bad"
    subprocess.run([sys.executable, "-c", code], check=True)


# ------------------------------------------------------------------------------------------------------------ envs.py
class Walk(gymnasium.Env):
    """A seeded random walk that ends by itself after 3 to 12 steps."""

    action_space = gymnasium.spaces.Box(-2.0, 4.0, (1,), np.float32)
    observation_space = gymnasium.spaces.Dict(
        x=gymnasium.spaces.Box(-99.0, 99.0, (2,), np.float64),
        n=gymnasium.spaces.Box(0.0, 99.0, (), np.float64),
    )

    def __init__(self, fault=""):
        self.fault = fault

    def _obs(self):
        return {"x": self.x.copy(), "n": np.array(float(self.n))}

    def reset(self, *, seed=None, options=None):
        super().reset(seed=seed)
        self.x, self.n, self.end = self.np_random.normal(size=2), 0, int(self.np_random.integers(3, 13))
        return self._obs(), {}

    def step(self, action):
        assert self.action_space.contains(action), action
        self.n += 1
        self.x = np.clip(self.x + 0.1 * action + 0.1 * self.np_random.normal(size=2), -99, 99)
        if self.n == 3 and self.fault == "nan":
            self.x[0] = np.nan
        if self.n == 3 and self.fault == "raise":
            raise ValueError("the gripper fell off")
        done = self.n == self.end
        return self._obs(), float(self.x[0]), done, False, {"is_success": done and self.x[0] > 0}


for name, fault in (("Walk", ""), ("WalkNaN", "nan"), ("WalkRaise", "raise")):
    if f"{name}-v0" not in gymnasium.registry:
        gymnasium.register(f"{name}-v0", entry_point=Walk, kwargs={"fault": fault})
WALK = "test_all:Walk-v0"


def policy(width):
    """A row-wise deterministic policy: no row sees another, so a redone episode comes out the same."""

    def act(obs, job, t):
        assert len(obs) == len(job) == len(t) and obs.dtype == np.float32
        phase = obs[:, :1] + 0.7 * t[:, None] + job[:, None] + np.arange(width)
        return np.sin(phase).astype(np.float32)

    return act


def plain_loop(jobs, act, width):
    """What Workers.rollout must equal: one environment after the other."""
    out = []
    for j, (task, seed) in enumerate(jobs):
        env = envs.make_env(task)
        o, _ = env.reset(seed=seed)
        obs, acts, rew, term, done = [o], [], [], [], False
        while not done:
            row = np.zeros((1, width), np.float32)
            row[0, : len(o)] = o
            a = act(row, np.array([j]), np.array([len(acts)]))[0][: env.facts.act_dim]
            o, r, terminated, truncated, info = env.step(a)
            done = terminated or truncated
            obs.append(o), acts.append(a), rew.append(r), term.append(terminated)
        out.append(
            {
                "task": task,
                "seed": seed,
                "obs": np.stack(obs),
                "act": np.stack(acts),
                "rew": np.array(rew, np.float32),
                "term": np.array(term),
                "success": info["success"],
                "ret": float(sum(rew)),
            }
        )
        env.close()
    return out


def same(a, b):
    assert len(a) == len(b)
    for x, y in zip(a, b, strict=True):
        assert list(x) == list(y)
        for key in x:
            np.testing.assert_array_equal(x[key], y[key], err_msg=f"{x['task']} {x['seed']} {key}")
            assert getattr(x[key], "dtype", None) == getattr(y[key], "dtype", None)


JOBS = [
    ("walker-walk", 3),
    (WALK, 1),
    ("mw-reach", 5),
    ("cup-spin", 2),
    (WALK, 7),
    ("Pendulum-v1", 0),
    (WALK, 8),
    ("walker-walk", 4),
    ("mw-reach", 6),
]


# ------------------------------------------------------------------------------------------------- tasks
@pytest.mark.parametrize(
    "task, w, seed, ret",
    [
        ("walker-walk-backwards", 0.1, 1, 30.19),
        ("walker-run-backwards", 0.1, 1, 16.45),
        ("cheetah-run-backwards", 0.1, 1, 17.93),
        ("cheetah-run-front", 0.1, 1, 8.98),
        ("cheetah-run-back", 0.1, 1, 28.70),
        ("cheetah-jump", 0.1, 1, 190.49),
        ("pendulum-spin", 0.1, 1, 254.85),
        ("cup-spin", 0.5, 1, 290.79),
        ("reacher-three-easy", 0.02, 1, 41.0),
        ("reacher-three-hard", 0.02, 0, 18.0),
        ("hopper-hop-backwards", 0.5, 3, 2.30),
    ],
)
def test_custom_task_parity(task, w, seed, ret):
    env = envs._CUSTOM[task](envs._import_suite(), seed)
    env.reset()
    phase = np.arange(env.action_spec().shape[0])
    assert sum(env.step(np.sin(w * i + phase)).reward for i in range(1000)) == pytest.approx(ret, rel=0.02)


@pytest.mark.parametrize(
    "task",
    [
        "walker-run",
        "cup-catch",
        "finger-turn-hard",
        "fish-swim",
        "acrobot-swingup",
        "point_mass-easy",
        "cheetah-jump",
        "humanoid_CMU-stand",
        "quadruped-walk",
    ],
)
def test_direct_stepping_equals_dm_control(task):
    suite, env = envs._import_suite(), envs.make_env(task, seed=11)
    domain, _, name = task.partition("-")
    other = (
        envs._CUSTOM[task](suite, 11)
        if task in envs._CUSTOM
        else suite.load(domain.replace("cup", "ball_in_cup"), name.replace("-", "_"), {"random": 11})
    )
    obs, _ = env.reset(seed=11)
    step = other.reset()
    rng, spec = np.random.default_rng(0), other.action_spec()
    middle, half = (
        (spec.maximum + spec.minimum) / 2,
        (spec.maximum - spec.minimum) / 2,
    )  # quadruped: not [-1, 1]
    n = 500 if task == "walker-run" else 60
    for t in range(n + 1):
        want = np.concatenate([np.ravel(x) for x in step.observation.values()]).astype(np.float32)
        np.testing.assert_array_equal(obs, want)
        if t == n:
            break
        act = rng.uniform(-1, 1, env.action_space.shape).astype(np.float32)
        obs, rew, terminated, truncated, _ = env.step(act)
        first, step = other.step(middle + half * act), other.step(middle + half * act)
        assert rew == first.reward + step.reward and not terminated and truncated == (t == 499)
    assert n < 500 or step.last()


@pytest.mark.parametrize("task", envs.MT30)
def test_mt30_dims_match_the_table(task):
    env, facts = envs.make_env(task), envs.task_facts(task)
    obs, info = env.reset(seed=0)
    assert (
        facts == env.facts
        and facts[2:] == (500, 2)
        and obs.shape == (facts.obs_dim,)
        and info == {"success": 0.0}
    )
    obs, rew, *_ = env.step(np.zeros(facts.act_dim, np.float32))
    assert obs.dtype == np.float32 and 0 <= rew <= 2


def test_names():
    assert (
        len(envs.MT30) == 30
        and len(set(envs.METAWORLD50)) == 50
        and envs.MT80 == envs.MT30 + envs.METAWORLD50
    )
    assert (
        envs.MT30[19] == "walker-walk-backwards"
        and envs.MT80[30] == "mw-assembly"
        and envs.MT80[79] == "mw-hand-insert"
    )
    facts = [envs.task_facts(task) for task in envs.MT80]
    assert [max(f[k] for f in facts[:30]) for k in (0, 1)] == [24, 6]
    assert [max(f[k] for f in facts) for k in (0, 1)] == [39, 6]
    from metaworld.env_dict import ALL_V3_ENVIRONMENTS

    assert {f"{n[3:]}-v3" for n in envs.METAWORLD50} == set(ALL_V3_ENVIRONMENTS)
    assert envs.task_facts("Pendulum-v1") == (3, 1, 200, 1) and envs.task_facts(WALK) == (3, 1, 1000, 1)
    assert envs.score("walker-walk", 500.0, 0.0) == 0.5 and envs.score("mw-reach", 900.0, 1.0) == 1.0
    assert envs.score("Pendulum-v1", -300.0, 0.0) == -300.0


@pytest.mark.parametrize(
    "task",
    [
        "cartpole-swingup",
        "cup-spin",
        "reacher-three-hard",
        "point_mass-easy",
        "lqr-lqr-2-1",
        "mw-assembly",
        "Pendulum-v1",
        WALK,
    ],
)
def test_gymnasium_check_env(task):
    from gymnasium.utils.env_checker import check_env

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # it warns that observations are unbounded, which is intended
        check_env(envs.make_env(task), skip_render_check=True)


@pytest.mark.parametrize(
    "task",
    [
        "walker-walk",
        "reacher-three-easy",
        "cup-spin",
        "hopper-hop-backwards",
        "swimmer-swimmer6",
        "mw-assembly",
        "mw-reach",
        "mw-peg-insert-side",
        "mw-lever-pull",
        "mw-drawer-open",
        "Pendulum-v1",
        WALK,
    ],
)
def test_reset_seed_fixes_the_episode(task):
    used, fresh = envs.make_env(task, seed=1), envs.make_env(task, seed=2)
    acts = np.random.default_rng(0).uniform(-1, 1, (12, *used.action_space.shape)).astype(np.float32)

    def play(env, seed):
        out = [env.reset(seed=seed)[0]]
        for a in acts:
            obs, rew, term, trunc, _ = env.step(a)
            out += [obs, np.float32(rew)]
            if term or trunc:
                break
        return np.hstack(out)

    before = play(used, 5)  # leaves traces of an earlier episode behind
    np.testing.assert_array_equal(play(used, 9), play(fresh, 9))
    np.testing.assert_array_equal(play(used, 5), before)
    assert not np.array_equal(used.reset()[0], used.reset()[0])  # unseeded resets go on drawing
    again = envs.make_env(task, seed=2)
    np.testing.assert_array_equal(again.reset()[0], envs.make_env(task, seed=2).reset()[0])


def test_metaworld_episode():
    env = envs.make_env("mw-reach")
    goals = {tuple(env.reset()[0][-3:]) for _ in range(3)}
    assert len(goals) == 3
    for t in range(100):
        obs, rew, terminated, truncated, info = env.step(np.ones(4))
        assert (
            not terminated
            and truncated == (t == 99)
            and 0 <= rew <= 20
            and isinstance(info["success"], float)
        )
    assert np.abs(obs[-3:]).sum() > 0  # the goal stays visible after steps


# ------------------------------------------------------------------------------------------------- roll-outs
@pytest.fixture(scope="module")
def want():
    return plain_loop(JOBS, policy(6), 39)


@pytest.mark.parametrize("n, max_envs", [(2, 64), (2, 3)])
def test_rollout_equals_plain_loop(want, n, max_envs):
    calls, seen = [], []
    act = policy(6)
    with envs.Workers(n, max_envs) as workers:
        got = workers.rollout(
            JOBS, lambda o, j, t: (calls.append(len(o)), act(o, j, t))[1], lambda *x: seen.append(x)
        )
        same(got, want)
        if n == 1:
            same(workers.rollout(JOBS[1:2] * 2, lambda o, j, t: act(o, j * 0 + 1, t)[:, :1]), [want[1]] * 2)
            assert workers.rollout([], act) == []
        pids = [p.pid for p in workers.procs]
    assert max(calls) == min(max_envs, len(JOBS)) and seen[-1][0] == seen[-1][1] and seen == sorted(seen)
    assert {len(e["rew"]) for e in got if e["task"] == WALK} != {1000} and all(
        e["term"][-1] for e in got if e["task"] == WALK
    )
    assert not any(e["term"].any() for e in got if e["task"] != WALK)
    for pid in pids:
        with pytest.raises(ProcessLookupError):
            os.kill(pid, 0)


def test_same_policy_calls_for_any_number_of_workers():
    def trace(n):
        calls, act = [], policy(6)

        def record(obs, job, t):
            calls.append((obs.copy(), job.copy(), t.copy()))
            return act(obs, job, t)

        with envs.Workers(n, 4) as workers:
            workers.rollout(
                [(WALK, s) for s in range(12)] + [("Pendulum-v1", 1)], lambda *x: record(*x)[:, :1]
            )
        return calls

    for one, three in zip(trace(1), trace(3), strict=True):
        for a, b in zip(one, three, strict=True):
            np.testing.assert_array_equal(a, b)


def test_killed_worker_is_replaced_and_its_episodes_redone(want, capsys):
    act, kills = policy(6), []
    with envs.Workers(2) as workers:

        def killer(obs, job, t):
            if t.max() in (30, 60) and len(kills) < 2:
                kills.append(workers.procs[len(kills)].pid)
                os.kill(kills[-1], signal.SIGKILL)
            return act(obs, job, t)

        same(workers.rollout(JOBS, killer), want)
        err = capsys.readouterr().err
        assert len(kills) == 2 and all(f"pid {pid}" in err for pid in kills) and "walker-walk" in err
        os.kill(workers.procs[1].pid, signal.SIGKILL)  # dead between two roll-outs
        same(
            workers.rollout(JOBS[1:3], lambda o, j, t: act(o, j + 1, t)[:, :4]),
            [{**e, "act": e["act"][:, :4]} for e in want[1:3]],
        )


def test_third_death_stops():
    with envs.Workers(1) as workers:

        def killer(obs, job, t):
            os.kill(workers.procs[0].pid, signal.SIGKILL)
            return np.zeros((len(obs), 1))

        with pytest.raises(SystemExit, match="while playing Pendulum-v1.*third death.*max_envs"):
            workers.rollout([("Pendulum-v1", 0)], killer)
        assert (
            len(workers.rollout([("Pendulum-v1", 0)], lambda o, j, t: np.zeros((1, 1)))) == 1
        )  # still usable


def test_workers_exit_when_the_parent_is_killed(tmp_path):
    code = f"""
import sys, time; sys.path.insert(0, {HERE!r})
import envs, numpy as np
workers = envs.Workers(2)
workers.rollout([("Pendulum-v1", 0), ("Pendulum-v1", 1)], lambda o, j, t: np.zeros((len(o), 1)))
print(*[p.pid for p in workers.procs], flush=True); time.sleep(60)"""
    parent = subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, text=True)
    pids = [int(p) for p in parent.stdout.readline().split()]
    parent.kill()
    parent.wait()

    def alive(pid):  # a zombie waiting for a lazy init is dead enough
        try:
            with open(f"/proc/{pid}/stat") as f:
                return f.read().rsplit(")", 1)[1].split()[0] != "Z"
        except FileNotFoundError:
            return False

    for _ in range(100):
        if not any(map(alive, pids)):
            break
        time.sleep(0.05)
    assert len(pids) == 2 and not any(map(alive, pids))


def test_workers_do_not_import_the_parent_script(tmp_path):
    script = tmp_path / "script.py"
    script.write_text(f"""
import sys; sys.path.insert(0, {HERE!r})
print("imported")
import envs, numpy as np
workers = envs.Workers(2)
print(len(workers.rollout([("Pendulum-v1", 0)] * 2, lambda o, j, t: np.zeros((len(o), 1)))))
workers.close()""")  # no __main__ guard on purpose
    out = subprocess.run(
        [sys.executable, str(script)], capture_output=True, text=True, check=True, cwd=tmp_path
    )
    assert out.stdout.split() == ["imported", "2"] and out.stderr == ""


def test_import_is_light():
    code = (
        "import sys; sys.path.insert(0, sys.argv[1]); import envs; "
        "print([m for m in ('torch', 'dm_control', 'metaworld', 'mujoco') if m in sys.modules])"
    )
    out = subprocess.run(
        [sys.executable, "-c", code, HERE],
        capture_output=True,
        text=True,
        check=True,
    )
    assert out.stdout.strip() == "[]"


# ------------------------------------------------------------------------------------------------- bad input
@pytest.mark.parametrize(
    "call, sentence",
    [
        (lambda: envs.make_env("walker-wlak"), "unknown task 'walker-wlak'.*walker-walk"),
        (lambda: envs.make_env("mw-asembly"), "mw-assembly"),
        (lambda: envs.make_env("Pendulum"), "Pendulum-v1"),
        (lambda: envs.task_facts("cup_spin"), "cup-spin"),
        (lambda: envs.make_env("zzzzzz"), "nearest: none"),
        (lambda: envs.make_env("test_all:Walkk-v0"), "test_all:Walkk-v0.*Walk-v0"),
        (lambda: envs.make_env("no_such_module:Walk-v0"), "no_such_module.*module"),
        (lambda: envs.make_env("CartPole-v1"), "CartPole-v1.*Discrete.*continuous Box"),
        (lambda: envs.make_env("walker-walk", obs="rgb"), "obs='rgb'.*'state' or 'pixels'"),
        (lambda: envs.Workers(0), "n=0.*1 or more of each"),
    ],
)
def test_bad_input_gives_one_sentence(call, sentence):
    with pytest.raises(SystemExit, match=sentence) as error:
        call()
    assert "\n" not in str(error.value)


def test_missing_metaworld(monkeypatch):
    monkeypatch.setitem(sys.modules, "metaworld", None)
    monkeypatch.setitem(sys.modules, "metaworld.env_dict", None)
    with pytest.raises(SystemExit, match="pip install metaworld==3.1.1"):
        envs.make_env("mw-reach")


def test_no_opengl(monkeypatch):
    monkeypatch.delenv("MUJOCO_GL", raising=False)
    failed = subprocess.CompletedProcess([], 1)
    monkeypatch.setattr(envs.subprocess, "run", lambda *a, **k: failed)
    with pytest.raises(SystemExit, match="libegl1.*libosmesa6.*MUJOCO_GL"):
        envs.make_env("walker-walk", obs="pixels")
    assert "MUJOCO_GL" not in os.environ
    monkeypatch.setenv("MUJOCO_GL", "glfw")
    assert envs.choose_gl() == "glfw"


@pytest.mark.parametrize(
    "task, sentence",
    [
        ("test_all:WalkNaN-v0", "WalkNaN.*non-finite.*step"),
        ("test_all:WalkRaise-v0", "WalkRaise.*gripper fell off"),
    ],
)
def test_bad_environment_is_named(task, sentence):
    with envs.Workers(1) as workers, pytest.raises(SystemExit, match=sentence):
        workers.rollout([("Pendulum-v1", 0), (task, 0)], lambda o, j, t: np.zeros((len(o), 1)))


def test_bad_policy_is_named():
    env = envs.make_env("walker-walk")
    env.reset()
    with pytest.raises(SystemExit, match="walker-walk.*non-finite action.*step 0"):
        env.step(np.full(6, np.nan))
    with envs.Workers(1) as workers, pytest.raises(SystemExit, match=r"shape \(1, 3\).*expected \(1, 1\)"):
        workers.rollout([("Pendulum-v1", 0)], lambda o, j, t: np.zeros((1, 3)))


def test_diverged_simulation_is_named():
    env = envs.make_env("cheetah-run")
    env.reset(seed=0)
    env._physics.data.qvel[:] = 1e12
    with pytest.raises(SystemExit, match="cheetah-run.*non-finite.*step"):
        for _ in range(20):
            env.step(np.ones(6))


# ------------------------------------------------------------------------------------------------------------- pwm.py
def tiny_world(n=3, size=None, seed=0):
    """A small world model with n tasks of 1..n actions, stacked networks and their optimisers."""
    torch.manual_seed(seed)
    wm = pwm.WorldModel(7, range(1, n + 1), 2, enc_hidden=16, hidden=24, latent=16, task_dim=4 if n > 1 else 0)
    nn.init.normal_(wm.reward_head[-1].weight, std=0.3)  # a reward that differs between states
    nets = nn.ModuleDict({"wm": wm, "actors": pwm.Actors(wm.act_mask, 16), "critics": pwm.Critics(n, 16),
                          "stats": pwm.RunningStats(n)})
    return nets, pwm.make_optimizers(nets)


@pytest.mark.parametrize("size, mt80, total, world", [
    (1, False, 1_426_427, 632_101), (5, False, 5_241_066, 1_599_717), (19, False, 16_031_210, 5_603_301),
    (48, False, 48_242_410, 18_983_909), (317, False, 317_316_889, 108_280_805), (48, True, 48_791_146, 19_188_581)])
def test_parameter_counts_are_the_published_ones(size, mt80, total, world):
    tasks = envs.MT80 if mt80 else envs.MT30
    with torch.device("meta"):
        wm = pwm.WorldModel(39 if mt80 else 24, [6] * len(tasks), **pwm.model_dims(size, len(tasks), mt80))
        heads = pwm.TDMPC2(wm, pwm.SIZES[size][2], pwm.SIZES[size][4])
    count = lambda *parts: sum(p.numel() for part in parts for p in part.parameters())  # noqa: E731
    assert count(wm) == world
    assert count(wm, heads.pi, heads.q) == total


def test_two_hot_against_its_definition():
    x = torch.tensor([0.0, 0.5, 2.0, -3.0, 1e9, -1e9, 20_000.0])
    t = pwm.two_hot(x)
    assert torch.allclose(t.sum(-1), torch.ones(7)) and ((t > 0).sum(-1) <= 2).all()
    bins = torch.linspace(-10, 10, 101)
    assert torch.allclose((t * bins).sum(-1), pwm.symlog(x).clamp(-10, 10), atol=1e-5)
    inside = x[x.abs() < 1e4]
    assert torch.allclose(pwm.two_hot_inv((pwm.two_hot(inside) + 1e-12).log()), inside, rtol=1e-4, atol=1e-4)
    assert torch.allclose(pwm.two_hot_inv((t[2:3] + 1e-12).log(), pseudo=True), torch.tensor([3.0]).log(), atol=1e-4)
    logits = torch.randn(7, 101)
    assert torch.allclose(pwm.two_hot_loss(logits, x), -(t * logits.log_softmax(-1)).sum(-1), atol=1e-5)


def test_lambda_return_against_equations_7_and_8():
    H, gamma, lam = 6, 0.9, 0.7
    r, v = torch.randn(H, 5, dtype=torch.float64), torch.randn(H + 1, 5, dtype=torch.float64)

    def n_step(t, h):  # Eq. (7)
        return sum(gamma**k * r[t + k] for k in range(h)) + gamma**h * v[t + h]

    for t in range(H):
        n = H - t  # Eq. (8): weights (1 - lam) lam^(h-1), the longest return takes the rest
        slow = (1 - lam) * sum(lam**(h - 1) * n_step(t, h) for h in range(1, n)) + lam**(n - 1) * n_step(t, n)
        assert torch.allclose(pwm.lambda_return(r, v, gamma, lam)[t], slow)
    assert torch.allclose(pwm.lambda_return(r, v, gamma, 0.0), r + gamma * v[1:])
    assert torch.allclose(pwm.lambda_return(r, v, gamma, 1.0)[0], n_step(0, H))


def test_fast_activations_equal_torchs_and_their_gradients():
    x = torch.cat([torch.randn(64, 16).double() * 4, torch.tensor([[-90.0, 90.0] * 8]).double()])
    assert torch.allclose(pwm.mish(x), F.mish(x), atol=1e-12)
    assert torch.allclose(pwm.simnorm(x), x.view(-1, 2, 8).softmax(-1).view(-1, 16), atol=1e-12)
    x = x[:4].requires_grad_()
    assert torch.autograd.gradcheck(pwm.mish, x) and torch.autograd.gradcheck(pwm.simnorm, x)


def test_initialisation():
    wm = pwm.WorldModel(24, [6] * 30, **pwm.model_dims(5, 30))
    w = wm.dynamics[1].weight
    assert abs(w.std() - 0.02) < 5e-4 and (wm.dynamics[1].bias == 0).all()
    assert (wm.task_emb.weight.abs() <= 0.02).all()
    logits = wm.reward(torch.rand(4, 512), torch.rand(4, 6), torch.arange(4))
    assert (logits == 0).all()
    heads = pwm.TDMPC2(wm, 512, 5)
    assert abs(heads.q.weight[1].std() - 0.02) < 5e-4  # tdmpc2#72: the ensemble must not be skipped
    z = wm.encode(torch.randn(9, 24), torch.arange(9))
    assert torch.allclose(z.view(9, -1, 8).sum(-1), torch.ones(9, 64), atol=1e-5)
    q = heads.q_value(heads.q, z, torch.rand(9, 6), torch.arange(9), torch.tensor([0, 3]), torch.amin)
    assert torch.allclose(q, torch.zeros(9), atol=1e-4)


def test_padded_actions_are_masked_and_get_no_gradient():
    nets, _ = tiny_world()
    a = nets["actors"](torch.rand(3, 5, 16), torch.randn(3, 5, 3))
    assert (a[0, :, 1:] == 0).all() and (a[1, :, 2:] == 0).all() and (a[2] != 0).all()
    a.square().sum().backward()
    assert (nets["actors"].log_std.grad[0, 0, 1:] == 0).all() and nets["actors"].log_std.grad[0, 0, 0] != 0


def test_world_model_update_learns_and_keeps_its_rules():
    nets, opts = tiny_world()
    wm = nets["wm"]
    g = torch.Generator().manual_seed(0)
    obs = torch.randn(5, 32, 7, generator=g).cumsum(0) * 0.3
    batch = obs, torch.rand(4, 32, 3, generator=g), obs[1:, :, 0].abs(), torch.randint(3, (32,), generator=g)
    with torch.no_grad():
        wm.task_emb.weight.mul_(1000)
    before = {k: v.clone() for k, v in wm.state_dict().items()}
    losses = [float(pwm.update_world_model(wm, wm, opts["model"], batch, 0.99)["loss"])
              for _ in range(150)]
    assert losses[-1] < 0.7 * losses[0]
    assert all((v != before[k]).any() for k, v in wm.state_dict().items())  # every tensor is trained
    assert (wm.task_emb.weight.norm(dim=1) <= 1 + 1e-6).all()
    assert [round(g["lr"] / 3e-4, 6) for g in opts["model"].param_groups] == [0.3, 1.0]


def test_world_model_loss_against_a_slow_reference():
    nets, _ = tiny_world()
    wm = nets["wm"]
    obs, act, rew, task = torch.randn(4, 6, 7), torch.rand(3, 6, 3), torch.rand(3, 6), torch.tensor([0, 1, 2, 0, 1, 2])
    loss, metrics, _, _ = pwm.world_model_loss(wm, obs, act, rew, task, 0.9)
    consistency = reward = 0
    for b in range(6):  # one sequence at a time, Eq. (10) with TD-MPC2's weights
        k = task[b:b + 1]
        z = wm.encode(obs[0, b:b + 1], k)
        for t in range(3):
            ce = -(pwm.two_hot(rew[t, b:b + 1]) * wm.reward(z, act[t, b:b + 1], k).log_softmax(-1)).sum()
            z = wm.next(z, act[t, b:b + 1], k)
            reward += 0.9**t * ce / 18
            consistency += 0.9**t * (z - wm.encode(obs[t + 1, b:b + 1], k)).square().mean() / 18
    assert torch.allclose(loss, 20 * consistency + 0.1 * reward, atol=1e-5)
    assert torch.allclose(metrics["consistency"], consistency.detach(), atol=1e-6)


def policy_inputs(n, B=6, H=5, passes=2, seed=0):
    g = torch.Generator().manual_seed(seed)
    return (torch.randn(n, B, 7, generator=g), torch.randn(H, n, B, 3, generator=g),
            torch.rand(passes, H * B, generator=g).argsort(1))


def test_all_policies_at_once_equal_one_at_a_time():
    nets, opts = tiny_world()
    nets["wm"].requires_grad_(False)
    hp = dataclasses.replace(pwm.Args(), critic_batches=3)
    singles = []
    for k in range(3):  # the same initial networks, one task each
        one = nn.ModuleDict({"wm": nets["wm"], "actors": pwm.Actors(nets["wm"].act_mask[k:k + 1], 16),
                             "critics": pwm.Critics(1, 16), "stats": pwm.RunningStats(1)})
        for name, width in (("actors", 1), ("critics", 3)):
            one[name].load_state_dict({x: v[k * width:(k + 1) * width] for x, v in nets[name].state_dict().items()})
        singles.append((one, pwm.make_optimizers(one)))
    start = copy.deepcopy(nets["actors"].state_dict())
    fns = pwm.actor_loss, pwm.critic_loss
    for i in range(3):
        obs, noise, perm = policy_inputs(3, seed=i)
        pwm.update_policies(fns, nets, opts, obs, noise, perm, torch.arange(3).repeat_interleave(6), hp)
        for k, (one, opt) in enumerate(singles):
            pwm.update_policies(fns, one, opt, obs[k:k + 1], noise[:, k:k + 1], perm, torch.full((6,), k), hp)
    assert all((v != start[k]).any() for k, v in nets["actors"].state_dict().items())
    for name in ("actors", "critics", "stats"):
        for x, v in nets[name].state_dict().items():
            loop = torch.cat([one[name].state_dict()[x] for one, _ in singles])
            error = (v - loop).abs()  # Adam divides by tiny second moments, so one entry in 10^5 may differ more
            assert error.max() < 1e-3 and (error > 2e-5).float().mean() < 1e-4, (name, x)


def test_actor_gradient_against_finite_differences():
    nets, _ = tiny_world(1)
    nets["wm"].requires_grad_(False)
    task, bias = torch.zeros(6, dtype=torch.long), nets["actors"].mu.bias[-1]

    def loss(H):  # Eq. (6) with fresh statistics; returns (loss, imagined return)
        obs, noise, _ = policy_inputs(1, H=H)
        nets["stats"] = pwm.RunningStats(1)
        return pwm.actor_loss(*nets.values(), obs, noise[..., :1], task, 0.99, 0.95)[:2]

    # One step: sg(z) cuts nothing, so the gradient is that of J, here by central differences of J / deviation
    value, _ = loss(1)
    value.backward()
    scale = (nets["stats"].var + 1e-5).sqrt()
    J = []
    for sign in (1, -1):
        with torch.no_grad():
            bias.add_(sign * 0.01)
            J.append(loss(1)[1])
            bias.sub_(sign * 0.01)
    assert torch.allclose(bias.grad[0, 0], -(J[0] - J[1]) / 0.02 / scale, rtol=0.03)
    bias.grad = None
    loss(5)[0].backward()
    with torch.no_grad():
        before = loss(5)[1]
        bias.sub_(0.01 * bias.grad.sign())
        assert loss(5)[1] > before  # descending the loss raises the imagined return


def test_the_td_objective_is_the_mean_lambda_return():
    nets, _ = tiny_world()
    wm, actors, critics = (nets[k] for k in ("wm", "actors", "critics"))
    obs, noise, _ = policy_inputs(3)
    task = torch.arange(3).repeat_interleave(6)
    z, rew, _ = pwm.imagine(wm, actors, obs, noise, task)
    G, want = critics(z[-1]).amin(1), 0
    for h in reversed(range(5)):
        G = rew[h] + 0.99 * (0.05 * critics(z[h + 1]).amin(1) + 0.95 * G)
        want = want + G / 5
    loss, J, _, target, weight = pwm.actor_loss(*nets.values(), obs, noise, task, 0.99, 0.95, td=True)
    assert weight is None  # no episode ends: every step counts
    assert torch.allclose(J, want.mean(1), atol=1e-5)
    assert torch.allclose(target.view(3, 5, 6)[:, 0], G, atol=1e-5)
    nets["stats"] = pwm.RunningStats(3)
    plain = pwm.actor_loss(*nets.values(), obs, noise, task, 0.99, 0.95)[1]
    assert not torch.allclose(plain, J, atol=1e-3)


def test_one_policy_for_all_tasks_sees_which_task_it_is():
    nets, _ = tiny_world()
    wm, rows = nets["wm"], torch.tensor([2, 0, 1])
    nn.init.normal_(wm.task_emb.weight)
    actor, critics = pwm.SharedActor(wm, rows), pwm.SharedCritics(wm, rows)
    z, eps = torch.rand(3, 6, 16), torch.randn(3, 6, 3)
    a, v = actor(z, eps), critics(z)
    assert a.shape == (3, 6, 3) and v.shape == (3, 3, 6)
    for k, row in enumerate(rows):  # one network on [z; e], one task at a time
        x = torch.cat([z[k], wm.task_emb.weight[row].expand(6, -1)], -1)[None]
        u = actor.mu(x)[0] + actor.log_std[0].exp() * eps[k]
        assert torch.allclose(a[k], u.tanh() * wm.act_mask[row], atol=1e-6)
        assert torch.allclose(v[k], critics.v(x.expand(3, -1, -1))[..., 0], atol=1e-5)
    assert torch.allclose(actor.first()(z[:1]), actor(z)[:1], atol=1e-6)
    assert len(actor.log_std) == 1 and not [k for k in actor.state_dict() if "emb" in k]
    nets["actors"], nets["critics"] = actor, critics
    before, opts = copy.deepcopy(actor.state_dict()), pwm.make_optimizers(nets)
    obs, noise, perm = policy_inputs(3)
    wm.requires_grad_(False)
    pwm.update_policies((pwm.actor_loss, pwm.critic_loss), nets, opts, obs, noise, perm, rows.repeat_interleave(6),
                        pwm.Args())
    assert all((v != before[k]).any() for k, v in actor.state_dict().items())


@pytest.mark.parametrize("activation", ["simnorm", "mish", "relu", "residual"])
def test_activations_are_those_of_the_flag_and_of_the_file(activation, tmp_path):
    wm = pwm.WorldModel(7, [3, 2], 2, 16, 16, 16, 4, activation=activation)
    z = wm.encode(torch.randn(5, 7), torch.zeros(5, dtype=torch.long))
    simplex = torch.allclose(z.unflatten(-1, (2, 8)).sum(-1), torch.ones(5, 2), atol=1e-5)
    assert simplex == (activation == "simnorm") and ((z >= 0).all() == (activation in ("simnorm", "relu")))
    hidden = wm.reward_head[0](torch.randn(64, 23))
    assert (hidden.min() < 0) == (activation != "relu")
    torch.save(dict(wm=wm.state_dict(), act_dims=[3, 2], args=dict(activation=activation)), tmp_path / "wm.pt")
    again = pwm.load_world_model(tmp_path / "wm.pt")
    assert again.activation == activation
    with torch.no_grad():
        for p in wm.dynamics[-1].parameters():
            p.zero_()
    still = torch.equal(wm.next(z, torch.ones(5, 3), torch.ones(5, dtype=torch.long)), z)
    assert still == (activation == "residual")  # whose dynamics tell the change
    wm.load_state_dict(again.state_dict())
    assert torch.equal(again.next(z, torch.ones(5, 3), torch.ones(5, dtype=torch.long)),
                       wm.next(z, torch.ones(5, 3), torch.ones(5, dtype=torch.long)))


def test_imagined_rewards_are_in_log_space_unless_asked():
    nets, _ = tiny_world()
    obs, noise, _ = policy_inputs(3)
    pseudo, true = (pwm.imagine(nets["wm"], nets["actors"], obs, noise, torch.arange(3).repeat_interleave(6), p)[1]
                    for p in (True, False))
    assert pseudo.shape == (5, 3, 6) and torch.allclose(pwm.symexp(pseudo), true, atol=1e-5)


def test_open_loop_error_is_zero_for_a_perfect_model_and_one_for_the_mean():
    nets, _ = tiny_world(2)
    wm, task = nets["wm"], torch.arange(2).repeat(200)
    obs, act = torch.randn(3, 400, 7), torch.rand(2, 400, 2)
    z = [wm.encode(obs[0], task)]
    rew = []
    for a in act:
        rew.append(pwm.two_hot_inv(wm.reward(z[-1], a, task)))
        z.append(wm.next(z[-1], a, task))
    encode = wm.encode
    wm.encode = lambda o, t: torch.stack(z) if o.ndim == 3 else z[0]  # observations that the model predicts exactly
    exact = pwm.open_loop_error(wm, (obs, act, torch.stack(rew), task), torch.arange(2), (1, 2))
    assert all(v < 1e-6 for v in exact.values()), exact
    wm.encode = encode
    means = torch.stack([torch.stack([r[task == k].mean() for k in range(2)])[task] for r in rew])
    wm.reward = lambda z, a, t: (pwm.two_hot(means[0]) + 1e-12).log()
    mean = pwm.open_loop_error(wm, (obs, act, torch.stack(rew), task), torch.arange(2), (1,))
    assert abs(mean["reward_nmse_1"] - 1) < 0.02


def test_act_serves_a_mixed_batch_like_single_rows():
    nets, _ = tiny_world()
    task, obs, eps = torch.tensor([2, 0, 2, 2, 1, 0]), torch.randn(6, 7), torch.randn(6, 3)
    rows = torch.arange(3)
    a = pwm.act(nets["wm"], nets["actors"], rows, obs, task, eps)
    for i in range(6):
        z = nets["wm"].encode(obs[i:i + 1], task[i:i + 1]).expand(3, 1, -1)
        assert torch.allclose(a[i], nets["actors"](z, eps[i].expand(3, 1, -1))[task[i], 0], atol=1e-6)
    one = nets["actors"].first()
    z = nets["wm"].encode(obs[1:2], task[1:2])
    mean = pwm.act(nets["wm"], nets["actors"], rows, obs[1:2], task[1:2])
    assert torch.allclose(one(z[None])[0], mean, atol=1e-6)


def test_compiled_losses_were_compiled_and_agree_with_eager():
    nets, opts = tiny_world()
    nets["wm"].requires_grad_(False)
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    amp = functools.partial(torch.autocast, "cpu", torch.bfloat16, enabled=False)
    compiled = [pwm.prepare(f, amp, True) for f in (pwm.actor_loss, pwm.critic_loss)]
    other = copy.deepcopy(nets)
    other_opts = pwm.make_optimizers(other)
    obs, noise, perm = policy_inputs(3, H=3)
    task = torch.arange(3).repeat_interleave(6)
    a = pwm.update_policies((pwm.actor_loss, pwm.critic_loss), nets, opts, obs, noise, perm, task, pwm.Args())
    b = pwm.update_policies(compiled, other, other_opts, obs, noise, perm, task, pwm.Args())
    assert torch._dynamo.utils.counters["frames"]["ok"] >= 2
    assert not torch._dynamo.utils.counters["graph_break"]
    for k in a:
        assert torch.allclose(a[k], b[k], rtol=1e-3, atol=1e-4), k


def test_planner_finds_the_best_action_and_respects_masks():
    nets, _ = tiny_world(2)
    wm = nets["wm"]
    heads = pwm.TDMPC2(wm, 24, 5).eval()
    wm.reward = lambda z, a, task: 50 * pwm.two_hot(400 - 400 * (a[..., 0] - 0.6).square())  # best first action: 0.6
    z, task = wm.encode(torch.randn(2, 7), torch.arange(2)), torch.arange(2)
    draw = lambda: pwm.plan(wm, heads, z, task, torch.zeros(2, 3, 2), torch.full((2,), 0.99),  # noqa: E731
                            torch.Generator().manual_seed(0))
    a, mean = draw()
    assert ((a[:, 0] - 0.6).abs() < 0.2).all() and a.abs().max() <= 1 and a[0, 1] == 0 and mean.shape == (2, 3, 2)
    assert torch.equal(a, draw()[0])


def test_tdmpc2_value_and_prior_learn():
    nets, _ = tiny_world()
    nets["tdmpc2"] = pwm.TDMPC2(nets["wm"], 24, 5)
    opts = pwm.make_optimizers(nets)
    g = torch.Generator().manual_seed(0)
    batch = (torch.randn(5, 32, 7, generator=g), torch.rand(4, 32, 3, generator=g), torch.ones(4, 32),
             torch.randint(3, (32,), generator=g))
    before = copy.deepcopy(nets["tdmpc2"].state_dict())
    for _ in range(400):
        m = pwm.update_world_model(nets["wm"], nets["wm"], opts["model"], batch, 0.99,
                                   nets["tdmpc2"], opts["prior"], torch.full((32,), 0.99), g)
    assert all((v != before[k]).any() for k, v in nets["tdmpc2"].state_dict().items() if k != "scale")
    heads, wm = nets["tdmpc2"].eval(), nets["wm"]
    z = wm.encode(batch[0][0], batch[3])
    q = heads.q_value(heads.q, z, batch[1][0], batch[3], torch.tensor([0, 1]), torch.mean)
    assert m["value"] < 3 and q.mean() > 0.5  # a reward of 1 everywhere: values rise from 0


# --------------------------------------------------------------------------------------- published checkpoint layouts
def published_files(wm):
    """The same weights in the layouts of TD-MPC2 now, TD-MPC2 of October 2023, and PWM's agent."""
    now, sequential, agent = {"_task_emb.weight": wm.task_emb.weight.detach()}, {}, {}
    sequential |= now
    agent |= now
    for ours, theirs in (("encoder", "_encoder.state"), ("dynamics", "_dynamics"), ("reward_head", "_reward")):
        for key, v in wm.state_dict().items():
            if key.startswith(ours + "."):
                i, field = key[len(ours) + 1:].split(".", 1)
                now[f"{theirs}.{i}.{field}"] = v
                agent[f"{theirs.removesuffix('.state')}.{i}.{field}"] = v
                first = 1 if ours == "encoder" else 0
                index = first + 3 * int(i) + field.startswith("ln.")
                sequential[f"{theirs}.{index}.{field.removeprefix('ln.')}"] = v
    now |= {"_pi.0.weight": torch.zeros(3, 3), "_Qs.params.0": torch.zeros(2, 3, 3), "log_std_min": torch.zeros(1)}
    return {"now": {"model": now}, "bare": now, "sequential": {"model": sequential},
            "agent": {"actor": {}, "critic": {}, "world_model": agent}}


def test_world_models_load_in_every_published_layout(tmp_path):
    torch.manual_seed(0)
    dims = [envs.task_facts(t).act_dim for t in envs.MT30]
    wm = pwm.WorldModel(24, dims, enc_layers=3, enc_hidden=20, hidden=28, latent=32, task_dim=8)
    nn.init.normal_(wm.task_emb.weight)  # rows longer than 1: the loader must project them
    obs, act, task = torch.randn(30, 24), torch.rand(30, 6), torch.arange(30)
    for name, file in published_files(wm).items():
        torch.save(file, tmp_path / f"{name}.pt")
        got = pwm.load_world_model(tmp_path / f"{name}.pt")
        assert got.tasks == envs.MT30 and got.task_emb.weight.norm(dim=1).max() <= 1 + 1e-6
        ref = copy.deepcopy(wm)
        ref.project_embeddings()
        z = ref.encode(obs, task)
        assert torch.equal(got.encode(obs, task), z), name
        assert torch.equal(got.next(z, act, task), ref.next(z, act, task))
        assert torch.equal(got.reward(z, act, task), ref.reward(z, act, task))


def test_wrong_checkpoints_say_what_was_expected(tmp_path):
    torch.save({"model": {"layer.weight": torch.zeros(2, 2)}}, tmp_path / "other.pt")
    with pytest.raises(SystemExit, match="no world model.*expected _encoder"):
        pwm.load_world_model(tmp_path / "other.pt")
    wm = pwm.WorldModel(24, [6] * 30, **pwm.model_dims(1, 30))
    file = published_files(wm)["now"]
    torch.save(file, tmp_path / "mt30.pt")
    with pytest.raises(SystemExit, match="not trained on mw-reach"):
        pwm.main(pwm.Args(task="mw-reach", checkpoint=str(tmp_path / "mt30.pt")))
    file["model"]["_dynamics.1.weight"] = torch.zeros(3, 3)
    torch.save(file, tmp_path / "bad.pt")
    with pytest.raises(SystemExit, match="does not fit together"):
        pwm.load_world_model(tmp_path / "bad.pt")


# ------------------------------------------------------------------------------------------------- whole runs of pwm.py
class Push(gymnasium.Env):
    """A point on a line is to be pushed to the origin: 40 steps, reward 1 at the goal, falling with the distance."""

    observation_space = gymnasium.spaces.Box(-9, 9, (2,), np.float32)
    action_space = gymnasium.spaces.Box(-1, 1, (1,), np.float32)

    def reset(self, *, seed=None, options=None):
        super().reset(seed=seed)
        self.x = np.array([self.np_random.uniform(-1, 1), 0.0], np.float32)
        return self.x.copy(), {}

    def step(self, action):
        v = np.clip(0.9 * self.x[1] + 0.1 * action[0], -1, 1)
        self.x = np.array([np.clip(self.x[0] + v, -9, 9), v], np.float32)
        return self.x.copy(), float(np.exp(-4 * self.x[0] ** 2)), False, False, {}


gymnasium.register("Push-v0", entry_point=Push, max_episode_steps=40)
TINY = dict(task="test_all:Push-v0", device="cpu", workers=1, rounds=2, seed_episodes=6, round_episodes=2, wm_steps=60,
            wm_batch=16, policy_steps=30, policy_batch=8, horizon=4, wm_horizon=3, eval_episodes=1, first_policy=0.5,
            first_model=0.5, last_model=0.5, last_policy=0.5)


def flags(**settings):
    """Keyword settings as command-line words."""
    return [x for k, v in settings.items() for x in ([f"--{k.replace('_', '-')}"] if v is True
                                                     else [f"--{k.replace('_', '-')}", str(v)])]


def start(cwd, *words, launcher=("python",), **settings):
    env = dict(os.environ, OMP_NUM_THREADS="1", PYTHONPATH=f"{HERE}:{cwd}", PYTHONUNBUFFERED="1", MPLCONFIGDIR=str(cwd))
    command = [sys.executable, *launcher[1:], f"{HERE}/pwm.py", *words, *flags(**settings)]
    return subprocess.Popen(command, cwd=cwd, env=env, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)


def finish(process):
    out = process.communicate(timeout=240)[0]
    assert process.returncode == 0, out[-3000:]
    return out


def last_run(cwd):
    return max(Path(cwd, "runs").iterdir(), key=lambda p: p.stat().st_mtime)


def test_it_learns_a_tiny_task(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    result = pwm.main(pwm.Args(**{**TINY, "rounds": 3, "seed_episodes": 20, "wm_steps": 900, "wm_batch": 32,
                                  "policy_steps": 250, "policy_batch": 16, "horizon": 10, "wm_horizon": 4,
                                  "wm_lr": 1e-3, "eval_episodes": 5, "first_model": 0.6, "last_model": 0.2,
                                  "first_policy": 0.2}))
    lines = [json.loads(x) for x in (last_run(tmp_path) / "metrics.jsonl").read_text().splitlines()]
    loss = [x["losses/model/loss"] for x in lines if "losses/model/loss" in x]
    assert loss[-1] < 0.5 * loss[0]
    table = result["table"][0]
    assert table["ours"] > 30 > 15 > table["random"], table  # of 40
    assert [x for x in result["history"] if "latent_nmse_4" in x][-1]["latent_nmse_4"] < 0.3
    assert {"results.json", "results.csv", "results.png", "checkpoint.pt", "args.json", "envs.py"} <= {
        p.name for p in last_run(tmp_path).iterdir()}


def test_killed_in_every_stage_and_resumed_it_ends_at_the_same_numbers(tmp_path):
    whole, killed = tmp_path / "whole", tmp_path / "killed"
    whole.mkdir()
    killed.mkdir()
    process = start(whole, **TINY)
    p = start(killed, **TINY, save_every=0)
    stages, deadline = [], time.time() + 200
    for wanted in (0, 1, 2, 4):  # kill as soon as the checkpoint says that this stage is under way
        while p.poll() is None and time.time() < deadline:
            try:
                state = torch.load(last_run(killed) / "checkpoint.pt", weights_only=True)["where"]
            except (OSError, ValueError, RuntimeError, FileNotFoundError):
                time.sleep(0.02)
                continue
            if state["stage"] > wanted or (state["stage"] == wanted and state["step"] > 2):
                break
            time.sleep(0.005)
        if p.poll() is None:
            p.send_signal(signal.SIGKILL)
            stages.append(state["stage"])
        p.communicate()
        p = start(killed, "--resume", str(last_run(killed)))
    finish(p)
    finish(process)
    assert len(set(stages)) >= 3, stages
    a, b = (torch.load(last_run(x) / "checkpoint.pt", weights_only=True) for x in (whole, killed))
    for part in ("wm", "actors", "critics", "stats"):
        for k in a[part]:
            assert torch.equal(a[part][k], b[part][k]), (part, k)
    a, b = (json.loads((last_run(x) / "results.json").read_text()) for x in (whole, killed))
    assert a["episodes"] == b["episodes"] and a["table"] == b["table"]
    steps = [json.loads(x)["step"] for x in (last_run(killed) / "metrics.jsonl").read_text().splitlines()]
    assert steps == sorted(steps)


def test_two_ranks_reproduce_one_rank(tmp_path):
    rng = np.random.default_rng(0)
    episodes = Episodes.create(tmp_path / "data", {TINY["task"]: (2, 1, 40)})
    obs, act = rng.normal(size=(8, 41, 2)).cumsum(1) / 9, rng.uniform(-1, 1, (8, 40, 1))
    episodes.append(TINY["task"], list(obs), list(act), list(np.abs(obs[:, 1:, 0])), list(np.zeros((8, 40), bool)))
    torchrun = ("python", "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2")
    launchers = dict(one=("python",), two=torchrun)
    runs = []
    for name, launcher in launchers.items():
        (tmp_path / name).mkdir()
        settings = {**TINY, "policy_steps": 2, "data_dir": tmp_path / "data"}
        runs.append(start(tmp_path / name, launcher=launcher, **settings))
    losses = []
    for name, p in zip(launchers, runs):
        finish(p)
        lines = [json.loads(x) for x in (last_run(tmp_path / name) / "metrics.jsonl").read_text().splitlines()]
        lines = [x for x in lines if "losses/model/loss" in x]
        losses.append([[x[f"losses/model/{k}"] for k in ("loss", "grad_norm")] for x in lines])
    # after 50 and 60 updates: Adam makes something of the rounding of sums in another order
    assert len(losses[0]) == 2 and np.allclose(losses[0], losses[1], rtol=1e-3), losses


def test_copied_with_its_two_helpers_it_runs_and_evaluates(tmp_path):
    for name in ("pwm.py", "envs.py", "data.py"):
        (tmp_path / name).write_text(Path(HERE, name).read_text())
    env = {k: v for k, v in os.environ.items() if k != "PYTHONPATH"} | {"OMP_NUM_THREADS": "1"}

    def run(*words):
        p = subprocess.run([sys.executable, "pwm.py", *words], cwd=tmp_path, env=env, capture_output=True, text=True)
        assert p.returncode == 0, p.stderr[-2000:]
        return p.stdout

    out = run("--task", "cartpole-swingup,cup-catch", "--fast", "--device", "cpu", "--wm-steps", "40")
    assert "latent_nmse_16" in out and "left" in out and "ms per action" in out
    folder = last_run(tmp_path)
    first = json.loads((folder / "results.json").read_text())
    assert {p.name for p in folder.iterdir()} >= {"pwm.py", "envs.py", "data.py"}
    run("--task", "cup-catch,cartpole-swingup", "--eval-only", "--checkpoint", str(folder / "checkpoint.pt"), "--fast")
    again = json.loads((last_run(tmp_path) / "results.json").read_text())  # other order of tasks, same policies
    for t, returns in first["episodes"]["ours"].items():
        assert np.allclose(returns, again["episodes"]["ours"][t], rtol=1e-3)
    wm = pwm.load_world_model(folder / "checkpoint.pt")
    assert wm.tasks == ("cartpole-swingup", "cup-catch")
    assert wm.encode(torch.zeros(1, 8), torch.tensor([1])).shape == (1, 128)
    out = run("--task", "cup-catch", "--checkpoint", str(folder / "checkpoint.pt"), "--fast", "--capture-video")
    assert "from " + str(folder) in out and "0 model updates" in out and "round 0: model" not in out  # a given model
    frames = imageio.mimread(last_run(tmp_path) / "video_cup-catch.mp4", memtest=False)
    assert len(frames) == 501 and np.std(frames[0]) > 5 and np.abs(frames[0].astype(int) - frames[400]).max() > 50


def test_the_baseline_plans_on_the_same_model(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    result = pwm.main(pwm.Args(**{**TINY, "task": WALK, "planner_episodes": 1, "prior": True, "seed_episodes": 10}))
    assert set(result["ms_per_action"]) == {"ours", "planner"} and len(result["episodes"]["planner"][WALK]) == 1
    assert np.isfinite(result["episodes"]["prior"][WALK]).all()
    file = last_run(tmp_path) / "checkpoint.pt"
    again = pwm.load_tdmpc2(pwm.load_world_model(file), file)
    assert len(again.q.weight[0]) == 2


def test_published_q_layouts_load(tmp_path):
    wm = pwm.WorldModel(24, [6] * 30, **pwm.model_dims(1, 30))
    heads = pwm.TDMPC2(wm, 384, 2)
    nn.init.normal_(heads.q.weight[-1])
    tensors = []
    for k in range(3):
        tensors += [heads.q.weight[k].transpose(1, 2), heads.q.bias[k][:, 0]]
        tensors += [heads.q.gain[k][:, 0], heads.q.shift[k][:, 0]] if k < 2 else []
    names = [f"{k}.{f}" for k in range(3) for f in ("weight", "bias", "ln.weight", "ln.bias")][:10]
    pi = {f"_pi.{k}": v for k, v in heads.pi.state_dict().items()}
    for i, keys in enumerate((range(10), names)):
        q = {f"_Qs.params.{k}": x.detach().clone() for k, x in zip(keys, tensors)}
        torch.save({"model": pi | q}, tmp_path / f"{i}.pt")
        got = pwm.load_tdmpc2(wm, tmp_path / f"{i}.pt")
        z, a, task = torch.rand(4, 128), torch.rand(4, 6), torch.arange(4)
        assert torch.equal(got.eval().q_logits(got.q, z, a, task), heads.eval().q_logits(heads.q, z, a, task))
        assert torch.equal(got.policy(z, task, a)[0], heads.policy(z, task, a)[0])
    torch.save({"model": {}}, tmp_path / "none.pt")
    with pytest.raises(SystemExit, match="no policy prior and Q functions"):
        pwm.load_tdmpc2(wm, tmp_path / "none.pt")


@pytest.mark.parametrize("settings, words", [
    (dict(task="walker-wolk"), "walker-walk"), (dict(task="cup-catch,cup-catch"), "twice"), (dict(task=","), "no task"),
    (dict(task="CartPole-v1"), "CartPole-v1.*[Dd]iscrete"), (dict(task="cup-catch", workers=0), "--workers 0"),
    (dict(eval_only=True), "--checkpoint"), (dict(resume="nowhere"), "no args.json"),
    (dict(task="cup-catch", checkpoint="nowhere.pt"), "nowhere.pt"),
    (dict(task="cup-catch", data_dir="nowhere"), "no episodes in nowhere")])
def test_bad_flags_get_one_sentence(settings, words, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(SystemExit, match=words) as error:
        pwm.main(pwm.Args(device="cpu", **settings))
    assert "\n" not in str(error.value)


def test_resume_of_another_task_is_refused(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    run = Run("cup-catch", "pwm", 1, dataclasses.asdict(pwm.Args(task="cup-catch")))
    run.close()
    with pytest.raises(SystemExit, match="is a run of cup-catch, not walker-walk"):
        pwm.main(pwm.Args(task="walker-walk", resume=str(run.dir)))
    with pytest.raises(SystemExit, match="before its first checkpoint"):
        pwm.main(pwm.Args(resume=str(run.dir), device="cpu"))


def test_interrupted_it_saves_and_says_how_to_go_on(tmp_path):
    p = start(tmp_path, **{**TINY, "wm_steps": 100_000})
    for line in p.stdout:
        if "rolling out" in line or "round 0: 6 episodes" in line:
            break
    time.sleep(1)
    p.send_signal(signal.SIGINT)
    out = p.communicate(timeout=60)[0]
    assert "stopped; go on with: python pwm.py --resume runs/" in out and p.returncode == 1
    assert torch.load(last_run(tmp_path) / "checkpoint.pt", weights_only=True)["where"]["step"] > 0


def test_published_chunks_train_a_model_and_one_policy(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    g = torch.Generator().manual_seed(0)
    N, T = 60, 501  # two episodes of each MT30 task, values within the padded layout of the published files
    task = torch.arange(30).repeat(2)
    dims = [envs.task_facts(t) for t in envs.MT30]
    obs_mask = torch.stack([(torch.arange(24) < d.obs_dim).float() for d in dims])[task][:, None]
    act_mask = torch.stack([(torch.arange(6) < d.act_dim).float() for d in dims])[task][:, None]
    chunk = dict(obs=torch.randn(N, T, 24, generator=g) * obs_mask, action=torch.rand(N, T, 6, generator=g) * act_mask,
                 reward=torch.rand(N, T, generator=g), task=task.int()[:, None].expand(N, T).contiguous())
    chunk["reward"][:, 0] = chunk["action"][:, 0] = float("nan")
    (tmp_path / "mt30").mkdir()
    torch.save(chunk, tmp_path / "mt30" / "chunk_0.pt")
    result = pwm.main(pwm.Args(**{**TINY, "task": "cup-catch", "data_dir": "mt30", "policy_steps": 4}))
    assert result["table"][0]["PWM paper"] == 471.6 and np.isfinite(result["table"][0]["ours"])


def test_readme_commands_parse_and_its_files_exist():
    text = Path(HERE, "README.md").read_text()
    scripts = {"pwm.py": pwm, "ed2.py": ed2, "mow.py": mow, "savi.py": savi}
    parsed = []
    for line in [line for block in text.split("```")[1::2] for line in block.splitlines()]:
        words = line.split("#")[0].split("&&")[-1].split()
        for name in scripts.keys() & set(words):
            parsed.append(name)
            args = tyro.cli(scripts[name].Args, args=words[words.index(name) + 1:])
            assert isinstance(args, scripts[name].Args)
    assert all(parsed.count(name) >= 5 for name in scripts)
    files = set(re.findall(r"results/\w+\.\w+", text))
    assert len(files) > 20
    for name in files:
        assert Path(HERE, name).exists(), name


def test_readmes_own_task_and_own_data_run(tmp_path, monkeypatch):
    blocks = [b for b in Path(HERE, "README.md").read_text().split("```python\n")[1:]]
    blocks = [b.split("```")[0] for b in blocks]
    own_task = next(b for b in blocks if "gymnasium.register" in b)
    own_data = next(b for b in blocks if "Episodes.create" in b)
    (tmp_path / "my_task.py").write_text(own_task)
    p = start(tmp_path, task="my_task:Slide-v0", fast=True, device="cpu")
    out = finish(p)
    assert "my_task:Slide-v0" in out
    monkeypatch.chdir(tmp_path)
    exec(compile(own_data, "README", "exec"), {})
    assert Episodes.open("my_data").counts() == {"cup-catch": 3}


def test_every_flag_has_a_doc_and_help_reads_it():
    out = subprocess.run([sys.executable, f"{HERE}/pwm.py", "--help"], capture_output=True, text=True).stdout
    for f in dataclasses.fields(pwm.Args):
        assert f"--{f.name.replace('_', '-')}" in out
    assert "Deviations from the paper" in out and "--no-compile" in out


# ------------------------------------------------------------------------------------------------------------- ed2.py
# Two carts: actions 0 and 1 pull at the first, action 2 at the second. A file, because roll-outs import it elsewhere.
TUG = """
import gymnasium
import numpy as np


class Tug(gymnasium.Env):
    observation_space = gymnasium.spaces.Box(-99, 99, (4,), np.float32)
    action_space = gymnasium.spaces.Box(-1, 1, (3,), np.float32)

    def reset(self, *, seed=None, options=None):
        super().reset(seed=seed)
        self.s = self.np_random.normal(size=4).astype(np.float32)
        return self.s.copy(), {}

    def step(self, a):
        v = 0.8 * self.s[2:] + 0.2 * np.array([a[0] + a[1], 2 * a[2]], np.float32)
        self.s = np.concatenate([0.95 * self.s[:2] + 0.1 * v, v]).astype(np.float32)
        return self.s.copy(), float(np.exp(-np.abs(self.s[:2]).sum())), False, False, {}


gymnasium.register("Tug-v0", entry_point=Tug, max_episode_steps=64)
"""
TUG_TASK, TUG_GROUPS = "tug:Tug-v0", [[0, 1], [2]]
WALKER, CHEETAH, HOPPER, HUMANOID = (ed2.PUBLISHED[x] for x in ("walker", "cheetah", "hopper", "humanoid"))


def ed2_args(**settings):
    """Flags of a run on the two carts that takes seconds."""
    wm = settings.get("wm", "tdmpc2")
    tiny = dict(length=3, size="1M") if wm == "tdmpc2" else dict(length=10, size="1m")
    return ed2.Args(**dict(task=TUG_TASK, device="cpu", compile=False, workers=1, seeds=1, updates=12, batch=4, lr=1e-3,
                           data_steps=1) | tiny | settings)


def ed2_run(args, data, inside=True):
    """The folder of a run that has not begun, with `data` in place of data that it would make."""
    run = Run(args.task, "ed2", args.seed, dataclasses.asdict(args))
    run.close()
    (run.dir / "data").mkdir() if inside else (run.dir / "data").symlink_to(data)
    if inside:
        (run.dir / "data" / args.task).symlink_to(data)
    return run.dir


@pytest.fixture(scope="module")
def tug(tmp_path_factory):
    """The two carts can be imported, and this folder has their data; fails if the data depend on being interrupted."""
    folder = tmp_path_factory.mktemp("tug")
    (folder / "tug.py").write_text(TUG)
    with pytest.MonkeyPatch.context() as m:
        m.syspath_prepend(str(folder))
        with pytest.MonkeyPatch.context() as inner:  # killed between random data and search
            inner.setattr(ed2, "search", lambda *a, **k: (_ for _ in ()).throw(KeyboardInterrupt))
            with pytest.raises(KeyboardInterrupt):
                ed2.make_data(TUG_TASK, folder / "data", 3000, 1)
        ed2.make_data(TUG_TASK, folder / "data", 3000, 1)
        yield folder / "data"


def suite_episodes(task, n, folder):
    """n episodes of uniform random actions, in the layout of ed2.make_data, random and replay alike."""
    env, rng = envs.make_env(task), np.random.default_rng(0)
    O, A, T, _ = env.facts
    eps = Episodes.create(folder / "random", {task: (O, A, T)})
    for seed in range(n):
        obs, act, rew = [env.reset(seed=seed)[0]], rng.uniform(-1, 1, (T, A)).astype(np.float32), []
        for a in act:
            o, r, _, _, _ = env.step(a)
            obs.append(o), rew.append(r)
        eps.append(task, np.stack(obs), act, np.array(rew, np.float32), np.zeros(T, bool))
    env.close()
    (folder / "replay").symlink_to(folder / "random")
    (folder / "data.json").write_text(json.dumps({"random_return": 0.0, "returns": [[0.0, 0.0]]}))
    return folder


@pytest.fixture(scope="module")
def cheetah(tmp_path_factory):
    return suite_episodes("cheetah-run", 10, tmp_path_factory.mktemp("cheetah"))


# ------------------------------------------------------------------------------------------ sub-dynamics discovery
def slow_agglomerate(sim, eta):
    """Pairs of groups compared word for word: mean similarity inside the pair minus mean similarity to all else."""
    m = len(sim)
    groups = [(i,) for i in range(m)]
    while len(groups) > 1:
        best = None
        for P in groups:
            for Q in groups:
                if P >= Q:
                    continue
                inside, n_in, outside, n_out = 0.0, 0, 0.0, 0
                for i in P:
                    for j in Q:
                        inside, n_in = inside + sim[i][j], n_in + 1
                for X, Y in ((P, Q), (Q, P)):
                    for i in X:
                        for j in range(m):
                            if j not in Y:
                                outside, n_out = outside + sim[i][j], n_out + 1
                score = inside / n_in - outside / n_out
                if best is None or score > best[0] + 1e-10:
                    best = score, P, Q
        if best[0] <= eta:
            break
        groups = sorted([g for g in groups if g not in best[1:]] + [tuple(sorted(best[1] + best[2]))])
    return [list(g) for g in groups]


def test_ed2_merging_against_a_slow_reference():
    rng, sizes = np.random.default_rng(0), set()
    for trial in range(60):
        m, n = int(rng.integers(1, 10)), int(rng.integers(1, 6))
        features = rng.random((m, n)) ** 4
        sim, eta = ed2.cosine(features), (0.0, -0.12, 0.1)[trial % 3]
        slow = [[float(a @ b / np.linalg.norm(a) / np.linalg.norm(b)) for b in features] for a in features]
        assert np.allclose(sim, slow)
        groups, log = ed2.agglomerate(sim, eta)
        assert groups == slow_agglomerate(sim, eta) == ed2.check_partition(groups, m)
        assert all(x["done"] == (x["score"] > eta) for x in log) and all(x["done"] for x in log[:-1])
        assert len(groups) == m - sum(x["done"] for x in log)
        assert ed2.agglomerate(sim, 2.0)[0] == [[i] for i in range(m)] and len(ed2.agglomerate(sim, -2.0)[0]) == 1
        sizes.add(len(groups))
    assert len(sizes) > 3


def test_ed2_features_are_absolute_correlations():
    rng = np.random.default_rng(0)
    act, delta = rng.uniform(-1, 1, (500, 4)), rng.normal(size=(500, 6)) + 1e4
    delta[:, 1] -= act[:, 0]
    delta[:, 2], act[:, 3] = 7.0, 0.5  # a state that never changes, an actuator that never moves
    F_ = ed2.pearson_features(act, delta)
    assert F_.shape == (4, 5) and (F_[3] == 0).all()
    for i in range(3):
        for d, column in enumerate((0, 1, 3, 4, 5)):
            assert F_[i, d] == pytest.approx(abs(np.corrcoef(act[:, i], delta[:, column])[0, 1]), abs=1e-9)
    assert F_[0, 1] > 0.3


def test_ed2_edges_of_discovery():
    rng = np.random.default_rng(1)
    act = rng.uniform(-1, 1, (400, 3))
    delta = np.c_[act[:, 0] + act[:, 1], rng.normal(size=400) + 0.5 * act[:, 2], np.full(400, 3.0)]
    assert ed2.discover(act, delta) == [[0, 1], [2]]
    act[:, 2] = 0.1
    assert ed2.discover(act, delta) == [[0, 1], [2]]  # an inert one is a group of its own
    assert ed2.discover(act, np.ones((400, 2))) == [[0], [1], [2]]  # nothing moves
    assert ed2.discover(act[:, :1], delta) == [[0]]
    assert ed2.discover(act[:, :2], delta) == [[0], [1]]  # two actions never merge, however alike
    assert ed2.agglomerate(np.ones((2, 2)))[1][0]["score"] == 0
    same = np.eye(4)
    same[0, 1] = same[1, 0] = same[2, 3] = same[3, 2] = 0.5
    groups, log = ed2.agglomerate(same)
    assert groups == [[0, 1], [2, 3]] and log[0]["merge"] == [[0], [1]]  # of equal pairs the lowest comes first
    assert all(ed2.agglomerate(np.eye(5))[0] == [[i] for i in range(5)] for _ in range(2))
    bad = delta.copy()
    bad[3, 0] = np.nan
    for x, y in ((act, bad), (act[:-1], delta), (act[:1], delta[:1]), (act * np.inf, delta)):
        with says("discover got actions", "all finite"):
            ed2.discover(x, y)


@pytest.mark.parametrize("task", ["cheetah-run", "hopper-hop"])
def test_ed2_published_groups_from_5000_random_steps(task, tmp_path, request):
    folder = request.getfixturevalue("cheetah") if task == "cheetah-run" else suite_episodes(task, 10, tmp_path)
    random = Episodes.open(folder / "random", [task])
    assert len(ed2.transitions(random, task)[0]) == 5000
    known = ed2.PUBLISHED[task.split("-")[0]]
    groups, log = ed2.find_partition("sd2", task, random)
    assert groups == known and log[-1]["done"] is False and len(log) == 1 + sum(len(g) - 1 for g in known)
    _, act, delta = ed2.transitions(random, task, n=2500, seed=3)
    assert ed2.discover(act, delta) == known
    assert ed2.find_partition("published", task, random)[0] == known
    assert ed2.find_partition("full", task, random)[0] == [[j] for j in range(act.shape[1])]
    assert ed2.find_partition("none", task, random)[0] == [list(range(act.shape[1]))]
    other = ed2.find_partition("random", task, random, seed=1)[0]
    assert sorted(map(len, other)) == sorted(map(len, known)) and ed2.check_partition(other, act.shape[1])
    assert ed2.find_partition("human", task, random)[0] == ed2.LIMBS[task.split("-")[0]]


def test_ed2_walker_has_some_partition(tmp_path):
    """Its deciding score is near 0, so that draws differ: the ankles, 2 and 5, stay alone in all of them."""
    random = Episodes.open(suite_episodes("walker-walk", 3, tmp_path) / "random")
    groups, log = ed2.find_partition("sd2", "walker-walk", random)
    assert ed2.check_partition(groups, 6) == groups and 3 <= len(groups) <= 5 and [2] in groups and [5] in groups
    assert 0 < ed2.adjusted_rand(groups, WALKER) <= 1 and all(np.isfinite(x["score"]) for x in log)


def test_ed2_transitions_stay_inside_episodes(tmp_path):
    eps = fill(tmp_path, LENGTHS)
    obs, act, delta = ed2.transitions(eps, "a-b")
    assert len(obs) == len(act) == sum(LENGTHS["a-b"]) and (delta == 1).all() and (act[:, 0] - obs[:, 0] == 0.5).all()
    few = ed2.transitions(eps, "a-b", n=7, seed=1)
    assert few[0].shape == (7, 3) and np.array_equal(few[0], ed2.transitions(eps, "a-b", n=7, seed=1)[0])


def test_ed2_partitions_and_their_agreement():
    for table in (ed2.PUBLISHED, ed2.LIMBS):
        for groups in table.values():
            assert ed2.check_partition(groups, sum(map(len, groups))) == groups
    assert {k: sum(map(len, v)) for k, v in ed2.PUBLISHED.items()} == dict(walker=6, cheetah=6, hopper=4, reacher=2,
                                                                           finger=2, humanoid=21)
    for groups in ([[0, 1]], [[0, 1], [1, 2]], [[0, 1, 2], []], [[0, 1], [3]]):
        with says("exactly once", "0..2"):
            ed2.check_partition(groups, 3)
    for seed in range(5):
        got = ed2.random_partition(HUMANOID, seed)
        assert [len(g) for g in got] == [len(g) for g in HUMANOID] and ed2.check_partition(got, 21) == got
        assert got == ed2.random_partition(HUMANOID, seed) != ed2.random_partition(HUMANOID, seed + 1)
    mask = ed2.assignment(HOPPER, 4)
    assert mask.tolist() == [[1, 0, 0], [1, 0, 0], [0, 1, 0], [0, 0, 1]]

    def slow(p, q):  # over all pairs of actions: together or apart
        label = [{j: i for i, g in enumerate(x) for j in g} for x in (p, q)]
        pairs = [(i, j) for i in label[0] for j in label[0] if i < j]
        both = [[x[i] == x[j] for x in label] for i, j in pairs]
        a, b, ab, n = sum(x for x, _ in both), sum(x for _, x in both), sum(x and y for x, y in both), len(pairs)
        return (ab - a * b / n) / ((a + b) / 2 - a * b / n)

    for p, q in ((WALKER, ed2.LIMBS["walker"]), (CHEETAH, WALKER), (HUMANOID, ed2.LIMBS["humanoid"])):
        assert ed2.adjusted_rand(p, q) == pytest.approx(slow(p, q)) == ed2.adjusted_rand(q, p)
    assert ed2.adjusted_rand([[0, 1], [2, 3]], [[0, 1], [2], [3]]) == pytest.approx(4 / 7)
    assert ed2.adjusted_rand([[0, 1], [2, 3]], [[2, 3], [0, 1]]) == 1  # the names of groups do not matter
    one, apart = [[0, 1, 2, 3]], [[0], [1], [2], [3]]
    assert ed2.adjusted_rand(one, one) == ed2.adjusted_rand(apart, apart) == 1 and ed2.adjusted_rand(one, apart) == 0
    assert ed2.adjusted_rand([[0]], [[0]]) == 1


@pytest.mark.parametrize("learned", [False, True])
def test_ed2_groups_are_found_in_a_trained_model(learned):
    """A linear system whose state says more about the actions than correlation can untangle."""
    rng = np.random.default_rng(0)
    s = rng.normal(size=(3000, 4))
    act = np.clip(0.6 * s @ rng.normal(size=(4, 4)) + rng.normal(size=(3000, 4)), -3, 3)  # they look at the state
    push = np.array([[1.0, 0.5, 0, 0], [0.8, 0.6, 0, 0], [0, 0, 0.7, 1.0], [0, 0, 0.6, 0.9]])
    data_ = [torch.tensor(x, dtype=torch.float32) for x in (s, act, act @ push - 0.3 * s)]
    for seed in range(2):
        groups, log = ed2.fit_influence(*data_, seed, steps=400 if learned else 150, batch=64, learned=learned)
        assert groups == [[0, 1], [2, 3]] and bool(log) != learned
    assert ed2.fit_influence(*data_, 0, steps=2, eta=2.0)[0] == [[0], [1], [2], [3]]


def test_ed2_influence_is_the_effect_of_a_permuted_action():
    s, act = torch.randn(4000, 2), torch.randn(4000, 3)
    w = torch.tensor([[1.0, 0.0], [0.0, -2.0], [0.0, 0.0]])
    got = ed2.influence(lambda s, a: s + a @ w, s, act, gen())
    assert torch.allclose(got, w.abs() * 2 / np.pi**0.5, atol=0.07)  # the mean distance of two normal numbers
    assert (got[w == 0] < 1e-6).all() and not got.requires_grad
# ------------------------------------------------------------------------------------------ decomposed TD-MPC2 dynamics
AGGS = ("hidden", "pre", "post")


def any_dynamics(groups, agg, n=16, width=8, simnorm=True, seed=0):
    """Dynamics whose biases and gains matter."""
    torch.manual_seed(seed)
    A = sum(map(len, groups))
    d = ed2.Dynamics(n, A, n, width, ed2.assignment(groups, A), agg, simnorm)
    for p in d.parameters():
        p.data += 0.4 * torch.randn_like(p)
    return d


def slow_norm(x):
    return (x - x.mean(-1, keepdim=True)) / (x.var(-1, keepdim=True, unbiased=False) + 1e-5).sqrt()


def slow_dynamics(d, s, act, groups):
    """One trunk after the other, each with its own actions only."""
    hidden, out, w = [], [], d.width
    for i, g in enumerate(groups):
        own = slice(i * w, (i + 1) * w)
        x = torch.cat([s, act[:, g]], 1) @ torch.cat([d.w_s[:, own], d.w_a[g][:, own]]) + d.bias[own]
        x = slow_norm(x) * d.gain[i] + d.shift[i]
        x = x * torch.tanh(x.exp().log1p()) @ d.second.weight[i] + d.second.bias[i, 0]
        x = slow_norm(x) * d.second.gain[i, 0] + d.second.shift[i, 0]
        hidden.append(x * torch.tanh(x.exp().log1p()))

    def end(x, i):
        x = slow_norm(x) * d.out_gain[i, 0] + d.out_shift[i, 0]
        return torch.cat([part.softmax(1) for part in x.split(8, 1)], 1)

    if d.agg == "hidden":
        return end(sum(hidden) / len(groups) @ d.head.weight[0] + d.head.bias[0, 0], 0)
    logits = [x @ d.head.weight[i] + d.head.bias[i, 0] for i, x in enumerate(hidden)]
    if d.agg == "pre":
        return end(sum(logits) / len(groups), 0)
    out = [end(x, i) for i, x in enumerate(logits)]
    return sum(out) / len(groups)


@pytest.mark.parametrize("agg", AGGS)
@pytest.mark.parametrize("groups", [WALKER, [[0, 1, 2]], [[2], [0], [1, 3]]])
def test_ed2_batched_trunks_are_the_looped_ones(groups, agg):
    d, A = any_dynamics(groups, agg), sum(map(len, groups))
    s, act = torch.randn(7, 16), torch.randn(7, A)
    got = d(s, act)
    assert torch.allclose(got, slow_dynamics(d, s, act, groups), atol=1e-5)
    assert torch.allclose(got.unflatten(1, (2, 8)).sum(2), torch.ones(7, 2), atol=1e-5) and got.std() > 0.02
    flat = any_dynamics(groups, agg, simnorm=False)
    assert flat.out_gain is None and (flat(s, act) < 0).any()


@pytest.mark.parametrize("agg", AGGS)
def test_ed2_one_group_is_the_plain_network(agg):
    d = any_dynamics([[0, 1, 2]], agg)
    mlp = nn.Sequential(ed2.NormedLinear(19, 8), ed2.NormedLinear(8, 8), ed2.NormedLinear(8, 16, ed2.simnorm))
    weights = [torch.cat([d.w_s, d.w_a]), d.second.weight[0], d.head.weight[0]]
    rest = [(d.bias, d.gain[0], d.shift[0]), (d.second.bias[0, 0], d.second.gain[0, 0], d.second.shift[0, 0]),
            (d.head.bias[0, 0], d.out_gain[0, 0], d.out_shift[0, 0])]
    for layer, w, (bias, gain, shift) in zip(mlp, weights, rest):
        layer.load_state_dict({"weight": w.T, "bias": bias, "ln.weight": gain, "ln.bias": shift})
    s, act = torch.randn(9, 16), torch.randn(9, 3)
    assert torch.allclose(d(s, act), mlp(torch.cat([s, act], 1)), atol=1e-5)
    assert sum(p.numel() for p in d.parameters()) == sum(p.numel() for p in mlp.parameters()) == ed2.dynamics_params(
        16, 3, 8, [3], agg)


@pytest.mark.parametrize("agg", AGGS)
def test_ed2_a_trunk_sees_its_own_actions_only(agg):
    d = any_dynamics(WALKER, agg)
    masked = (1 - d.assign).bool().repeat_interleave(d.width, 1)
    s, act = torch.randn(5, 16), torch.randn(5, 6)
    before = d.trunks(s, act)
    for j in range(6):
        other = act.clone()
        other[:, j] = -3.0
        after = d.trunks(s, other)
        assert [torch.equal(x, y) for x, y in zip(before, after)] == [j not in g for g in WALKER]
    start = copy.deepcopy(d.state_dict())
    opt = torch.optim.Adam(d.parameters(), 1e-2)
    for _ in range(5):
        opt.zero_grad()
        d(s, act).square().sum().backward()
        assert (d.w_a.grad[masked] == 0).all() and (d.w_a.grad[~masked] != 0).all()
        opt.step()
    assert torch.equal(d.w_a[masked], start["w_a"][masked]) and (d.w_a[~masked] != start["w_a"][~masked]).all()
    used = sum(p.numel() for p in d.parameters()) - int(masked.sum())
    assert used == ed2.dynamics_params(16, 6, d.width, [4, 1, 1], agg)
    soft = torch.rand(6, 3)  # an assignment that is being learned
    assert torch.allclose(d.trunks(s, act, soft)[1], d.trunks(s, act * soft[:, 1], torch.ones(6, 3))[1], atol=1e-5)


@pytest.mark.parametrize("size, agg, widths", [
    ("5M", "hidden", (272, 224, 272, 136)), ("5M", "pre", (216, 168, 208, 88)), ("5M", "post", (208, 168, 208, 88)),
    ("1M", "hidden", (216, 184, 216, 120)), ("1M", "pre", (184, 152, 184, 88)), ("1M", "post", (184, 152, 184, 88))])
def test_ed2_matched_widths_of_dynamics(size, agg, widths):
    latent, hidden = ed2.TDMPC2_SIZES[size]
    for groups, width in zip((WALKER, CHEETAH, HOPPER, HUMANOID), widths):
        A = sum(map(len, groups))

        def count(groups, width, A=A):
            return ed2.dynamics_params(latent, A, width, [len(g) for g in groups], agg)

        single = count([list(range(A))], hidden)
        assert ed2.variant("ed2", groups, hidden, count, 0) == (groups, width)
        assert abs(count(groups, width) / single - 1) < 0.04
        assert ed2.variant("single", groups, hidden, count, 0) == ([list(range(A))], hidden)
        assert ed2.variant("ed2_wide", groups, hidden, count, 0) == (groups, hidden)
        other, w = ed2.variant("random", groups, hidden, count, 5)
        assert w == width and sorted(map(len, other)) == sorted(map(len, groups))
        every, w = ed2.variant("nosplit", groups, hidden, count, 0)
        assert every == [list(range(A))] * len(groups) and abs(count(every, w) / single - 1) < 0.05
        whole, w = ed2.variant("single_wide", groups, hidden, count, 0)
        assert len(whole) == 1 and abs(count(whole, w) / count(groups, hidden) - 1) < 0.05
    assert size == "1M" or 790_000 < single < 803_000


def test_ed2_no_width_fits():
    assert ed2.match_width(lambda w: 10 * w, 803) == 80
    with says("within 5 %", "--match none", "width 8"):
        ed2.match_width(lambda w: 1000 * w, 4000)


# -------------------------------------------------------------------------------------------------- TD-MPC2's losses
class Push3:
    """A sampler of slices of a linear system that keeps what it gave."""

    def __init__(self, steps=3):
        self.steps, self.seen = steps, []

    def sequences(self, n, generator, held_out=False):
        obs = [torch.randn(n, 4, generator=generator)]
        act = 2 * torch.rand(self.steps, n, 3, generator=generator) - 1
        for a in act:
            obs.append(0.9 * obs[-1] + 0.3 * torch.cat([a, a[:, :1]], 1))
        self.seen.append(torch.stack(obs))
        return torch.stack(obs), act, obs[0][:, 0] * torch.ones(self.steps, 1), torch.zeros(n, dtype=torch.long)


def tiny_tdmpc2(groups=None, seed=0, E=3):
    torch.manual_seed(seed)
    groups = groups or [[0, 1, 2]]
    dynamics = ed2.Dynamics(16, 3, 16, 24, ed2.assignment(groups, 3))
    torch.manual_seed(seed)
    return ed2.TDMPC2(4, 3, 16, 24, dynamics, E)


def test_ed2_consistency_against_its_definition():
    d = any_dynamics(TUG_GROUPS, "pre")
    z, act, target = torch.rand(5, 16), torch.randn(4, 5, 3), torch.rand(4, 5, 16)
    want, now = 0.0, z
    for t in range(4):
        now = slow_dynamics(d, now, act[t], TUG_GROUPS)
        assert torch.allclose(ed2.unroll(d, z, act)[t], now, atol=1e-5)
        error = sum(((now[b, i] - target[t, b, i]) ** 2).item() for b in range(5) for i in range(16)) / 80
        want += 0.7**t * error / 4
    assert ed2.consistency_loss(d, z, act, target, rho=0.7).item() == pytest.approx(want, rel=1e-4)


def test_ed2_two_hot_and_policy_of_tdmpc2():
    x = torch.tensor([0.0, 0.3, -7.0, 500.0, 1e9])
    logits = torch.randn(5, 101)
    got = ed2.two_hot_loss(logits, x)
    for i in range(5):
        y = np.clip(np.sign(x[i].item()) * np.log1p(abs(x[i].item())), -10, 10)
        weight = np.maximum(0, 1 - abs(np.linspace(-10, 10, 101) - y) / 0.2)
        assert got[i].item() == pytest.approx(-(torch.tensor(weight) * logits[i].log_softmax(0)).sum().item(), rel=1e-3)
    sharp = torch.full((1, 101), -1e3)
    sharp[0, 60] = 0
    assert ed2.two_hot_mean(sharp).item() == pytest.approx(np.expm1(2.0), rel=1e-4)
    model, z, noise = tiny_tdmpc2(), torch.rand(6, 16), torch.randn(6, 3)
    mean, s = model.prior(z).chunk(2, -1)
    std = (-10 + 6 * (torch.tanh(s) + 1)).exp()
    normal = torch.distributions.Normal(mean, std)
    want = torch.distributions.TransformedDistribution(normal, torch.distributions.TanhTransform())
    act, logp = model.policy(z, noise)
    assert torch.allclose(act, torch.tanh(mean + std * noise)) and act.abs().max() <= 1
    assert torch.allclose(logp, want.log_prob(act).sum(-1), atol=1e-2)


def test_ed2_world_model_loss_against_a_slow_reference():
    model = tiny_tdmpc2(TUG_GROUPS)
    for p in model.parameters():
        p.data += 0.2 * torch.randn_like(p)
    obs, act, _, _ = Push3().sequences(4, gen())
    rew, noise, pair = torch.randn(3, 4), torch.randn(3, 4, 3), torch.tensor([2, 0])
    loss, metrics, z = ed2.world_model_loss(model, obs, act, rew, noise, pair)
    want = dict(consistency=0.0, reward=0.0, value=0.0)
    with torch.no_grad():
        for b in range(4):
            now = model.encoder(obs[0, b])
            for t in range(3):
                assert torch.allclose(z[t, b], now, atol=1e-5)
                x = torch.cat([now, act[t, b]])
                want["reward"] += 0.5**t / 12 * ed2.two_hot_loss(model.reward(x), rew[t, b]).item()
                true = model.encoder(obs[t + 1, b])
                y = torch.cat([true, model.policy(true, noise[t, b])[0]]).expand(3, 1, -1)
                q = ed2.two_hot_mean(model.q_slow(y))[:, 0]
                value = rew[t, b] + 0.99 * min(q[2], q[0])
                for e in range(3):
                    want["value"] += 0.5**t / 36 * ed2.two_hot_loss(model.q(x.expand(3, 1, -1))[e, 0], value).item()
                now = model.dynamics(now[None], act[t, b, None])[0]
                want["consistency"] += 0.5**t / 12 * (now - true).square().mean().item()
    for k, v in want.items():
        assert metrics[k].item() == pytest.approx(v, rel=1e-4), k
    total = 20 * want["consistency"] + 0.1 * (want["reward"] + want["value"])
    assert loss.item() == pytest.approx(total, rel=1e-4) and not z.requires_grad
    loss.backward()
    assert all(p.grad is None for p in [*model.prior.parameters(), *model.q_slow.parameters()])
    trained = nn.ModuleList([model.encoder, model.dynamics, model.reward, model.q])
    assert all(p.grad is not None for p in trained.parameters())


def test_ed2_prior_climbs_the_value():
    model, scale = tiny_tdmpc2(), torch.ones(())
    nn.init.normal_(model.q[-1].weight, std=0.3)
    model.q.requires_grad_(False)
    opt, losses = torch.optim.Adam(model.prior.parameters(), 3e-3), []
    z, noise = torch.rand(4, 32, 16), torch.randn(4, 32, 3)
    for _ in range(40):
        losses.append(ed2.prior_loss(model, z, noise, scale))
        opt.zero_grad()
        losses[-1].backward()
        opt.step()
    assert losses[-1] < losses[0] - 0.02 and scale >= 1 and not scale.requires_grad


def test_ed2_joint_training_learns_and_variants_see_the_same(monkeypatch):
    monkeypatch.setattr(ed2, "rate", lambda step, total, lr: lr)
    args = ed2_args(updates=80, batch=16, lr=3e-3)
    seen, tails = [], []
    for groups in (None, TUG_GROUPS):
        model, sampler = tiny_tdmpc2(groups), Push3()
        before = copy.deepcopy(model)
        assert all(torch.equal(a, b) for a, b in zip(tiny_tdmpc2().reward.parameters(), model.reward.parameters()))
        tails.append([ed2.train_tdmpc2(model, sampler, dataclasses.replace(args, updates=u), 5, ed2.compiler(False))
                      for u in (10, 80)])
        seen.append(torch.stack(sampler.seen))
        for name, m in model.named_children():
            assert all((a != b).any() for a, b in zip(m.parameters(), getattr(before, name).parameters())), name
        drift = [(a - b).norm() for a, b in zip(model.q_slow.parameters(), before.q_slow.parameters())]
        full = [(a - b).norm() for a, b in zip(model.q.parameters(), before.q.parameters())]
        assert all(0 < a < 0.9 * b for a, b in zip(drift, full))
        assert all(p.requires_grad for p in model.q.parameters())
        assert not any(p.requires_grad for p in model.q_slow.parameters())
    assert torch.equal(*seen) and len(seen[0]) == 90
    assert all(late < 0.6 * early for early, late in tails), tails


def test_ed2_dynamics_alone_learn_on_a_fixed_encoder():
    encoder = nn.Sequential(ed2.NormedLinear(4, 32), ed2.NormedLinear(32, 16, ed2.simnorm))
    before, seen, args = copy.deepcopy(encoder.state_dict()), [], ed2_args(updates=60, batch=32, lr=3e-3)
    for groups in ([[0, 1, 2]], TUG_GROUPS):
        torch.manual_seed(0)
        d, sampler = ed2.Dynamics(16, 3, 16, 24, ed2.assignment(groups, 3)), Push3()
        start = copy.deepcopy(d)
        ed2.train_dynamics(d, encoder, sampler, args, 3, ed2.compiler(False))
        assert all(torch.equal(encoder.state_dict()[k], v) for k, v in before.items())
        assert all(p.grad is None for p in encoder.parameters())
        assert all((a != b).any() for a, b in zip(d.parameters(), start.parameters()))
        obs, act, _, _ = Push3().sequences(200, gen(9))
        z = encoder(obs).detach()
        new, old = (ed2.consistency_loss(x, z[0], act, z[1:]).item() for x in (d, start))
        assert new < 0.5 * old
        seen.append(torch.stack(sampler.seen))
    assert torch.equal(*seen)
    other = Push3()
    ed2.train_dynamics(d, encoder, other, args, 4, ed2.compiler(False))
    assert not torch.equal(torch.stack(other.seen), seen[0])


def test_ed2_rate_and_checks():
    rates = [ed2.rate(t, 200, 2.0) for t in range(201)]
    assert rates[0] == rates[100] == 2.0 and rates[200] == pytest.approx(0.06) and rates[150] == pytest.approx(1.03)
    assert all(a >= b for a, b in zip(rates, rates[1:]))
    assert ed2.check_finite(3, {"loss": torch.tensor(1.0)}, 2.0) == {"loss": 1.0, "grad_norm": 2.0}
    for metrics, norm in (({"loss": torch.tensor(float("nan"))}, 0.0), ({"loss": 0.0}, float("inf"))):
        with says("update 7 is not finite", "smaller --lr"):
            ed2.check_finite(7, metrics, norm)


def test_ed2_latent_errors_of_models_that_are_known():
    class Oracle(nn.Module):  # the latents are the states
        def forward(self, s, a):
            return 0.9 * s + 0.3 * torch.cat([a, a[:, :1]], 1)

    encoder = nn.Linear(4, 4)
    with torch.no_grad():
        encoder.weight.copy_(torch.eye(4))
        encoder.bias.zero_()
    right = ed2.measure_latents(encoder, Oracle(), Push3(10))
    assert max(v for k, v in right.items() if not k.startswith("persistence")) < 1e-6 < right["persistence_mse_1"]
    still = ed2.measure_latents(encoder, lambda s, a: s, Push3(10))
    for h in (1, 3, 5, 10):
        assert still[f"mse_{h}"] == pytest.approx(still[f"persistence_mse_{h}"], rel=1e-5)
    errors = [(still[f"mse_{h}"]) for h in (1, 3)]
    assert errors[0] < still["per_step_mse"] < errors[1] and still["fast_mse_1"] > errors[0]
    sampler = Push3(10)
    mean = ed2.measure_latents(encoder, lambda s, a: 0 * s, sampler)
    obs = sampler.seen[-1]
    want = (obs[5].square().mean(0) / obs.flatten(0, 1).var(0)).mean().item()
    assert mean["state_nmse_5"] == pytest.approx(want, rel=0.02)
    want = (obs[5].square().mean(0).sum() / obs[0].var(0).sum()).item()
    assert mean["latent_nmse_5"] == pytest.approx(want, rel=1e-3)
    assert right["logged"] < 1e-9


def test_ed2_ridge_and_nmse():
    rng = np.random.default_rng(0)
    x, w = rng.normal(size=(500, 3)), rng.normal(size=(4, 2))
    assert np.allclose(ed2.ridge(x, np.c_[x, np.ones(500)] @ w, 1e-9), w, atol=1e-6)
    true = rng.normal(size=(1000, 3)) * [1, 5, 0]
    assert ed2.nmse(true.mean(0), true, true.var(0)) == pytest.approx(1) and ed2.nmse(true, true, true.var(0)) == 0


def test_ed2_tdmpc2_dynamics_learn_cheetah(cheetah):
    replay = Episodes.open(cheetah / "replay")
    sampler = ed2.sampler_of(replay, "cheetah-run", 3, "cpu")
    torch.manual_seed(0)
    encoder = nn.Sequential(ed2.NormedLinear(17, 64), ed2.NormedLinear(64, 64, ed2.simnorm))
    d = ed2.Dynamics(64, 6, 64, 96, ed2.assignment(CHEETAH, 6))
    obs, act, _, _ = sampler.sequences(256, gen(), held_out=True)
    z = encoder(obs).detach()
    before = ed2.consistency_loss(d, z[0], act, z[1:]).item()
    ed2.train_dynamics(d, encoder, sampler, ed2_args(updates=150, batch=64, lr=3e-3), 0, ed2.compiler(False))
    assert ed2.consistency_loss(d, z[0], act, z[1:]).item() < before / 3


# --------------------------------------------------------------------------------- DreamerV3 with a decomposed core
FULL9 = [[j] for j in range(9)]  # more groups than blocks
TINY_DREAMER = dict(deter=32, hidden=8, classes=4, units=16, stoch=4)


def tiny_dreamer(obs_dim=3, act_dim=6, seed=0, **kw):
    torch.manual_seed(seed)
    return ed2.DreamerV3(obs_dim, act_dim, **TINY_DREAMER | kw)


def any_core(act_dim=6, seed=0, **kw):
    torch.manual_seed(seed)
    rssm = ed2.RSSM(act_dim, 16, 32, 8, 4, stoch=4, **kw)
    for p in rssm.parameters():  # biases and gains that matter
        if p.ndim < 3 and not (p.ndim == 2 and p.shape[1] > 8):
            p.data.add_(0.3 * torch.randn(p.shape))
    return rssm


def recording(T=6, B=4, O=3, A=6, seed=1):
    g = gen(seed)
    return (torch.randn(T + 1, B, O, generator=g), 2 * torch.rand(T, B, A, generator=g) - 1,
            torch.randn(T, B, generator=g))


def noise_for(model, T, B, H=5, A=6, seed=2):
    return ed2.draw_noise(model.rssm, A, T, B, H, gen(seed))


def test_ed2_dreamer_symexp_two_hot():
    assert (ed2.symexp_two_hot_mean(torch.zeros(5, 255)) == 0).all()  # exactly
    x = torch.tensor([0.0, 1e-3, -0.3, 1.0, 7.7, -250.0, 1e4])
    k, high = ed2.symexp_two_hot(x)
    bins = ed2.symexp_bins("cpu")
    assert bins.shape == (255,) and bins[127] == 0 and torch.equal(bins, -bins.flip(0))
    assert torch.allclose(bins[k] * (1 - high) + bins[k + 1] * high, x, rtol=1e-4, atol=1e-5)
    assert ((bins[k] <= x + 1e-5 * x.abs()) & (x <= bins[k + 1] + 1e-5 * x.abs())).all()
    p = torch.zeros(len(x), 255).scatter(1, k[:, None], 1 - high[:, None]).scatter(1, k[:, None] + 1, high[:, None])
    logits = torch.randn(len(x), 255, requires_grad=True)
    loss = ed2.symexp_two_hot_loss(logits, x)
    assert torch.allclose(loss, -(p * logits.log_softmax(-1)).sum(-1), atol=1e-5)
    assert torch.allclose(ed2.symexp_two_hot_loss(logits, x, x), 2 * loss, atol=1e-5)
    loss.sum().backward()
    assert torch.allclose(logits.grad, logits.softmax(-1) - p, atol=1e-5)
    assert torch.allclose(ed2.symexp_two_hot_mean((p + 1e-30).log()), x, rtol=1e-4, atol=1e-5)
    assert torch.allclose(ed2.symexp(ed2.symlog(x)), x, rtol=1e-5)


@pytest.mark.parametrize("lam", [0.0, 0.6, 1.0])
def test_ed2_dreamer_lambda_return(lam):
    H = 5
    rew, cont, value = torch.randn(H, 2), torch.rand(H, 2), torch.randn(H + 1, 2)
    out = ed2.dreamer_lambda_return(rew, value, cont, lam)
    for t in range(H):
        def n_step(n, t=t):  # n rewards, then the value
            return sum(cont[t:t + i].prod(0) * rew[t + i] for i in range(n)) + cont[t:t + n].prod(0) * value[t + n]
        last = H - t
        want = sum((1 - lam) * lam ** (n - 1) * n_step(n) for n in range(1, last)) + lam ** (last - 1) * n_step(last)
        assert torch.allclose(out[t], want, atol=1e-5)


def test_ed2_dreamer_latents():
    logits = torch.randn(3, 4, requires_grad=True)
    p = ed2.unimix(logits)
    assert torch.allclose(p, 0.99 * logits.softmax(-1) + 0.0025, atol=1e-6)
    assert ed2.unimix(torch.tensor([[0.0, 1e4]])).min() == pytest.approx(0.005)
    g = gen()
    z = ed2.sample_latent(p.expand(20_000, 3, 4), ed2.draw_gumbel((20_000, 3, 4), g)).unflatten(-1, (3, 4))
    assert torch.equal(z.sum(-1).round(), torch.ones(20_000, 3))
    assert torch.allclose(z.mean(0), p, atol=0.02)
    w = torch.randn(3, 4)  # straight-through: the gradient of p
    a = torch.autograd.grad((ed2.sample_latent(p, torch.zeros(3, 4)).unflatten(-1, (3, 4)) * w).sum(), logits,
                            retain_graph=True)[0]
    assert torch.allclose(a, torch.autograd.grad((p * w).sum(), logits)[0])
    q = ed2.unimix(torch.randn(3, 4))
    want = torch.distributions.kl_divergence(torch.distributions.Categorical(p), torch.distributions.Categorical(q))
    assert torch.allclose(ed2.kl(p, q), want.sum(), atol=1e-5)


def test_ed2_dreamer_parameter_counts():
    model = ed2.DreamerV3(24, 6, **ed2.DREAMER_SIZES["1m"])
    sizes = {name: sum(p.numel() for p in m.parameters()) for name, m in model.named_children()}
    assert sizes == dict(encoder=10_112, rssm=364_416, decoder=51_096, reward=57_663, cont=41_153, actor=50_316,
                         critic=66_111)
    assert ed2.count_parameters(model) == 640_867
    assert ed2.core_params(6, [list(range(6))], "mean", 512, 512, 64, 128) == 273_664
    with torch.device("meta"):
        assert sum(p.numel() for p in ed2.DreamerV3(24, 6, **ed2.DREAMER_SIZES["12m"]).parameters()) == 9_738_019
        assert sum(p.numel() for p in ed2.DreamerV3(67, 21, **ed2.DREAMER_SIZES["1m"]).parameters()) == 649_324
        assert sum(p.numel() for p in ed2.DreamerV3(67, 21, **ed2.DREAMER_SIZES["12m"]).parameters()) == 9_771_628


@pytest.mark.parametrize("kw", [
    dict(), dict(groups=WALKER, width=16), dict(groups=WALKER, agg="blocks"),
    dict(groups=[[0, 1, 2, 3, 4, 5]] * 3, width=16)])
def test_ed2_dreamer_core_params_counts_what_is_used(kw):
    rssm = any_core(**kw)
    used = sum(p.numel() for name, p in rssm.named_parameters() if not name.startswith(("prior", "post")))
    used -= int((1 - rssm.act_mask).sum()) * 8
    groups = kw.get("groups", [list(range(6))])
    assert used == ed2.core_params(6, groups, kw.get("agg", "mean"), kw.get("width", 32), 32, 8, 16)


def slow_core(rssm, h, z, act, groups, agg):
    """Sec. 'Block GRU' of DreamerV3, word by word, one sub-core and one block at a time: h_i (k, B, D)"""
    def norm(x, gain):
        return x / (x.square().mean(-1, keepdim=True) + 1e-4).sqrt() * gain
    silu, sigmoid, g, d = F.silu, torch.sigmoid, rssm.blocks, rssm.deter
    x0, x1 = (silu(norm(m[0](x), m[1].gain)) for m, x in ((rssm.h_in, h), (rssm.z_in, z)))
    a = act / act.abs().clamp(min=1)
    parts = groups if agg == "mean" else [sum(groups[e::g], []) for e in range(min(g, len(groups)))]
    x2 = [silu(norm(a[:, part] @ rssm.act_weight[part, e] + rssm.act_bias[e], rssm.act_gain[e]))
          for e, part in enumerate(parts)]
    out = []
    for i in range(len(groups) if agg == "mean" else 1):
        hidden = []
        for b in range(g):
            mine = x2[i] if agg == "mean" else x2[b % len(parts)]
            x = torch.cat([h[:, b * d // g:(b + 1) * d // g], x0, x1, mine], -1)
            hidden.append(x @ rssm.hid.weight[i, b] + rssm.hid.bias[i, b])
        if agg == "mean":
            teams = [list(range(g))]
        else:
            teams = [list(range(e, g, len(parts))) for e in range(len(parts))]
        for team in teams:
            whole = torch.cat([hidden[b] for b in team], -1)
            whole = silu(norm(whole, torch.cat([rssm.hid_gain[i, b] for b in team])))
            for b, x in zip(team, whole.chunk(len(team), -1)):
                hidden[b] = x
        new = []
        for b in range(g):
            r, c, u = (hidden[b] @ rssm.gru.weight[i, b] + rssm.gru.bias[i, b]).chunk(3, -1)
            u, old = sigmoid(u - 1), h[:, b * d // g:(b + 1) * d // g]
            new.append(u * torch.tanh(sigmoid(r) * c) + (1 - u) * old)
        out.append(torch.cat(new, -1))
    return torch.stack(out)


CORES = [(6, [list(range(6))], "mean", None), (6, WALKER, "mean", 16), (6, WALKER, "mean", None), (9, FULL9, "mean", 8),
         (6, [list(range(6))] * 3, "mean", 16), (6, [list(range(6))], "blocks", None), (6, WALKER, "blocks", None),
         (9, FULL9, "blocks", None), (6, [list(range(6))] * 3, "blocks", None)]


def core_inputs(act_dim, B=5):
    g = gen(3)
    return [torch.randn(B, n, generator=g) for n in (32, 16, act_dim)]


@pytest.mark.parametrize("act_dim, groups, agg, width", CORES)
def test_ed2_dreamer_batched_core_is_the_looped_one(act_dim, groups, agg, width):
    rssm = any_core(act_dim, groups=groups, agg=agg, width=width)
    h, z, act = core_inputs(act_dim)
    weights = rssm.core_weights()
    got = rssm.subcores(weights, h, z, rssm.act_input(weights, act)).permute(0, 2, 1, 3).flatten(2)
    want = slow_core(rssm, h, z, act, groups, agg)
    assert torch.allclose(got, want, atol=1e-5)
    assert torch.allclose(rssm.step(weights, h, z, rssm.act_input(weights, act)), want.mean(0), atol=1e-5)


@pytest.mark.parametrize("agg", ["mean", "blocks"])
def test_ed2_dreamer_one_group_is_the_single_model(agg):
    single, one = tiny_dreamer(), tiny_dreamer(seed=1, groups=[list(range(6))], agg=agg)
    assert ed2.count_parameters(single) == ed2.count_parameters(one)
    one.load_state_dict(single.state_dict())
    obs, act, rew = recording()
    noise = noise_for(single, 6, 4)
    a, b = (ed2.rssm_loss(m, obs, act, rew, noise[0]) for m in (single, one))
    assert torch.allclose(a[0], b[0], atol=1e-5) and torch.allclose(a[2][0], b[2][0], atol=1e-5)


@pytest.mark.parametrize("act_dim, groups, agg, width", [c for c in CORES if len(c[1]) > 1 and len(c[1][0]) < c[0]])
def test_ed2_dreamer_foreign_actions_do_not_matter(act_dim, groups, agg, width):
    rssm = any_core(act_dim, groups=groups, agg=agg, width=width)
    h, z, act = core_inputs(act_dim)
    weights = rssm.core_weights()
    parts = groups if agg == "mean" else ed2.merged_groups(groups, 8)
    before = rssm.subcores(weights, h, z, rssm.act_input(weights, act))
    for j in range(act_dim):
        other = act.clone()
        other[:, j] = -0.37
        after = rssm.subcores(weights, h, z, rssm.act_input(weights, other))
        for n in range(len(groups) if agg == "mean" else 8):  # sub-core, or block
            x, y = (t[n] if agg == "mean" else t[0, n] for t in (before, after))
            assert torch.equal(x, y) == (j not in parts[n % len(parts)])
    after.square().sum().backward()
    masked = (1 - rssm.act_mask).bool().expand_as(rssm.act_weight)
    assert (rssm.act_weight.grad[masked] == 0).all() and (rssm.act_weight[masked] == 0).all()
    assert (rssm.act_weight.grad[~masked] != 0).all()


def test_ed2_dreamer_initial_scale_follows_the_true_fan_in():
    torch.manual_seed(0)
    rssm = ed2.RSSM(6, 16, 32, 512, 4, stoch=4, groups=WALKER, width=16)
    for e, part in enumerate(WALKER):
        assert rssm.act_weight[part, e].std().item() == pytest.approx(len(part) ** -0.5, rel=0.1)
        assert rssm.act_weight[part, e].abs().max() <= 2 * 1.1368 * len(part) ** -0.5
    assert rssm.hid.weight.std().item() == pytest.approx((8 * (4 + 3 * 512)) ** -0.5, rel=0.1)
    model = tiny_dreamer()
    assert (model.reward[-1].weight == 0).all() and (model.critic[-1].weight == 0).all()
    assert model.actor[-1].weight.abs().max() < 0.01


def test_ed2_dreamer_kl_floor():
    model = tiny_dreamer()
    for net in (model.rssm.prior_net, model.rssm.post_net):
        nn.init.zeros_(net[-1].weight)
    obs, act, rew = recording()
    loss, metrics, _ = ed2.rssm_loss(model, obs, act, rew, noise_for(model, 6, 4)[0])
    assert metrics["dyn"] == 1 and metrics["rep"] == 1 and metrics["dyn_raw"] == 0
    assert metrics["prior_entropy"].item() == pytest.approx(4 * np.log(4), rel=1e-5)
    loss.backward()
    assert all((p.grad == 0).all() for p in model.rssm.prior_net.parameters())


def test_ed2_dreamer_time_alignment():
    model = tiny_dreamer()
    obs, act, rew = recording()
    gumbel = noise_for(model, 6, 4)[0]
    h = ed2.rssm_loss(model, obs, act, rew, gumbel)[2][0]
    other = act.clone()
    other[2] = 0.9
    h2 = ed2.rssm_loss(model, obs, other, rew, gumbel)[2][0]
    assert torch.equal(h[:3], h2[:3]) and not torch.equal(h[3], h2[3])
    # the reward of the first state does not exist: a reward head that is right about rew has the entropy as loss
    nn.init.zeros_(model.reward[-1].weight)
    model.reward[-1].bias.data[127] = 50.0
    _, metrics, _ = ed2.rssm_loss(model, obs, act, torch.zeros_like(rew), gumbel)
    assert metrics["rew"] < 1e-6
    # metrics of late steps only
    _, late, _ = ed2.rssm_loss(model, obs, act, rew, gumbel, skip=3)
    _, all_steps, _ = ed2.rssm_loss(model, obs, act, rew, gumbel)
    assert set(late) == {"rec", "rew", "con", "dyn", "rep", "dyn_raw", "post_entropy", "prior_entropy"}
    assert late["rec"] != all_steps["rec"] and all(not x.requires_grad and x.ndim == 0 for x in late.values())


def test_ed2_dreamer_world_model_alone_and_gradient_paths():
    model = tiny_dreamer(groups=WALKER, width=16)
    slow = copy.deepcopy(model.critic).requires_grad_(False)
    obs, act, rew = recording()
    noise = noise_for(model, 6, 4)
    loss, _, (h, z) = ed2.rssm_loss(model, obs, act, rew, noise[0])
    loss.backward(retain_graph=True)
    assert all(p.grad is not None and p.grad.isfinite().all() for m in model.world() for p in m.parameters())
    assert all(p.grad is None for p in [*model.actor.parameters(), *model.critic.parameters()])
    model.zero_grad()
    nn.init.normal_(model.critic[-1].weight, std=0.1)  # a zero critic would pass no gradient on
    loss, metrics, new = ed2.behaviour_loss(model, slow, h.detach(), z.detach(), rew, *noise[1:], torch.zeros(2))
    loss.backward()
    assert all(p.grad is None for m in model.world() for p in m.parameters())  # imagination is detached
    assert all(p.grad is not None for p in [*model.actor.parameters(), *model.critic.parameters()])
    assert new.shape == (2,) and metrics["scale"] >= 1
    ed2.behaviour_loss(model, slow, h, z, rew, *noise[1:], torch.zeros(2))[0].backward()
    assert model.encoder[0].weight.grad.abs().sum() > 0  # the replay loss reaches the world model


def test_ed2_dreamer_reinforce_prefers_rewarded_actions():
    """A world whose reward is the sign of the action: the policy loss must raise the mean action."""
    model = tiny_dreamer(act_dim=1)
    with torch.no_grad():
        feat, act = ed2.imagine(model, *model.rssm.initial(64, "cpu"), *noise_for(model, 1, 64, H=3, A=1)[1:])
    mean, std = model.policy(feat[:-1])
    logp = torch.distributions.Normal(mean, std).log_prob(act).sum(-1)
    (-(logp * act[..., 0].sign()).mean()).backward()
    assert model.actor[-1].bias.grad[0] < 0
    assert feat.shape == (4, 64, 48) and act.shape == (3, 64, 1)


def test_ed2_dreamer_return_range():
    x = torch.randn(1000)
    got = ed2.return_range(torch.zeros(2), x)
    assert torch.allclose(got, 0.01 * torch.tensor(np.quantile(x, [0.05, 0.95]), dtype=torch.float), atol=1e-5)


def test_ed2_dreamer_open_loop():
    model = tiny_dreamer(groups=WALKER, agg="blocks")
    obs, act, _ = recording()
    gumbel = noise_for(model, 6, 4)[0]
    a = ed2.open_loop(model, obs, act, gumbel, 3)
    assert a.shape == (4, 4, 3)
    changed, later = obs.clone(), act.clone()
    changed[3:] += 1
    later[4] = 0.5
    assert torch.equal(a, ed2.open_loop(model, changed, act, gumbel, 3))  # only the context is read
    b = ed2.open_loop(model, obs, later, gumbel, 3)  # act[4] first matters to obs[5] = prediction 2
    assert torch.equal(a[:2], b[:2]) and not torch.equal(a[2], b[2])
    h, _, _ = model.rssm.observe(model.encoder(ed2.symlog(obs)), act, gumbel)
    z = ed2.sample_latent(model.rssm.prior(h[3]), gumbel[3])
    assert torch.allclose(a[0], ed2.symexp(model.decoder(torch.cat([h[3], z], -1))), atol=1e-5)


def test_ed2_dreamer_laprop_against_a_slow_reference():
    torch.manual_seed(0)
    p, stacked = nn.Parameter(torch.randn(4, 3)), nn.Parameter(torch.randn(3, 2, 5))
    tiny_p = nn.Parameter(torch.zeros(3))
    keep = [(), (1,), ()]
    opt = ed2.LaProp([p, stacked, tiny_p], keep, lr=0.01, warmup=3)
    mine = [p.detach().clone(), *stacked.detach().clone().unbind(1), tiny_p.detach().clone()]
    mu, nu = ([torch.zeros_like(x) for x in mine] for _ in range(2))
    for t in range(1, 6):
        scale = 10.0 if t % 2 else 0.01
        p.grad, stacked.grad = scale * torch.randn(4, 3), scale * torch.randn(3, 2, 5)
        tiny_p.grad = torch.zeros(3) if t == 1 else torch.randn(3)
        grads = [p.grad.clone(), *stacked.grad.clone().unbind(1), tiny_p.grad.clone()]
        opt.step()
        for i, g in enumerate(grads):
            limit = 0.3 * max(1e-3, mine[i].norm().item())
            g = g * min(1.0, limit / max(g.norm().item(), 1e-30))
            nu[i] = 0.999 * nu[i] + 0.001 * g * g
            g = g / ((nu[i] / (1 - 0.999**t)).sqrt() + 1e-20)
            mu[i] = 0.9 * mu[i] + 0.1 * g
            mine[i] = mine[i] - 0.01 * min(1, t / 3) * mu[i] / (1 - 0.9**t)
        for a, b in zip([p, *stacked.unbind(1), tiny_p], mine):
            assert torch.allclose(a, b, atol=1e-5) and a.isfinite().all()
    other = ed2.LaProp([p, stacked, tiny_p], keep, lr=0.01, warmup=3)
    other.load_state_dict(copy.deepcopy(opt.state_dict()))
    assert other.steps == 5 and torch.equal(other.mu[1], opt.mu[1]) and torch.equal(other.nu[0], opt.nu[0])


def test_ed2_dreamer_sub_cores_are_clipped_apart():
    model = copy.deepcopy(tiny_dreamer(groups=WALKER, width=16))
    params, keep = ed2.clip_units(model)
    assert [id(p) for p in params] == [id(p) for p in model.parameters()]
    kept = {name: dims for (name, _), dims in zip(model.named_parameters(), keep) if dims}
    rssm = dict(act_weight=(1,), act_bias=(0,), act_gain=(0,), hid_gain=(0,))
    rssm |= {f"{m}.{x}": (0,) for m in ("hid", "gru") for x in ("weight", "bias")}
    assert kept == {f"rssm.{name}": dims for name, dims in rssm.items()}
    for name, p in model.named_parameters():
        if name in kept:
            assert p.shape[kept[name][0]] == len(WALKER)
    assert sum(map(len, ed2.clip_units(*model.world()))) < 2 * len(params)


def test_ed2_dreamer_masked_weights_stay_zero():
    agent = ed2.Agent(tiny_dreamer(groups=WALKER, width=16), 0, lr=1e-2, warmup=1, horizon=2)
    before = [p.detach().clone() for p in agent.model.parameters()]
    for _ in range(3):
        agent.update(*recording())
    masked = (1 - agent.model.rssm.act_mask).bool().expand_as(agent.model.rssm.act_weight)
    assert (agent.model.rssm.act_weight[masked] == 0).all()
    assert all(not torch.equal(a, b) for a, b in zip(before, agent.model.parameters()))


class FakeWorkers:
    """A point on a line, 40 steps; the policy sees it with noise from the seed."""

    def rollout(self, jobs, policy):
        obs = np.stack([np.random.default_rng(seed).normal(size=(41, 5)) for _, seed in jobs], 1).astype(np.float32)
        act = []
        for t in range(40):
            act.append(policy(obs[t], np.arange(len(jobs)), np.full(len(jobs), t)))
            obs[t + 1, :, 0] = obs[t, :, 0] + act[-1][:, 0]
        rew, act = -np.abs(obs[1:, :, 0]), np.stack(act)
        return [dict(obs=obs[:, i], act=act[:, i], rew=rew[:, i], term=np.zeros(40, bool), ret=float(rew[:, i].sum()))
                for i in range(len(jobs))]


def test_ed2_dreamer_resume_is_exact(tmp_path):
    def start(folder):
        torch.manual_seed(0)
        agent = ed2.Agent(ed2.DreamerV3(5, 1, **TINY_DREAMER), 3, lr=1e-3, warmup=5, horizon=3)
        return agent, Episodes.create(folder, {"cartpole-swingup": (5, 1, 500)})

    def learn(agent, episodes, steps):
        return ed2.learn_online(agent, episodes, FakeWorkers(), "cartpole-swingup", steps, 2, batch=4, length=8,
                              train_ratio=1, log=lambda row, metrics: None, save=saved.append)

    saved = []
    agent, episodes = start(tmp_path / "a")
    want = learn(agent, episodes, 240)
    assert agent.updates == 240 // 32 and len(want) == len(saved) == 3
    agent, episodes = start(tmp_path / "b")
    learn(agent, episodes, 160)
    file = io.BytesIO()
    torch.save(agent.state(), file)
    learn(agent, episodes, 240)  # goes on; then we pretend that it was killed
    file.seek(0)
    again, _ = start(tmp_path / "b")
    again.load_state(torch.load(file, weights_only=True))
    curve = learn(again, episodes, 240)
    assert [r[:2] + r[3:] for r in curve] == [r[:2] + r[3:] for r in want]
    first = start(tmp_path / "c")[0]
    first.load_state(saved[-1])
    for a, b in zip(again.state()["model"].values(), first.state()["model"].values()):
        assert torch.equal(a, b)
    assert episodes.counts() == {"cartpole-swingup": 6}


def test_ed2_dreamer_policy_memory():
    agent = ed2.Agent(tiny_dreamer(5, 2), 0)
    obs = np.random.default_rng(0).normal(size=(4, 3, 5)).astype(np.float32)

    def play(order, reset):
        agent.generator.manual_seed(0)
        step, out = agent.policy(3, mean=True), []
        for t in range(4):
            out.append(step(obs[t][order], np.array(order), np.full(3, t - reset * (t > 1) * 2)))
        return np.stack(out)

    a = play([0, 1, 2], 0)
    assert a.shape == (4, 3, 2) and np.abs(a).max() <= 1
    agent.generator.manual_seed(0)
    step = agent.policy(3, mean=True)
    for t in range(2):  # after a reset the past does not matter
        step(obs[t] + 1, np.arange(3), np.full(3, t))
    agent.generator.manual_seed(0)
    b = np.stack([step(obs[t], np.arange(3), np.full(3, t)) for t in range(4)])
    assert np.array_equal(a, b)
    c = play([0, 1, 2], 1)  # a job that starts again at step 2
    assert np.array_equal(a[:2], c[:2]) and not np.array_equal(a[2], c[2])


@pytest.mark.parametrize("size, groups, width, unmatched", [
    ("1m", WALKER, 168, 2.7), ("1m", CHEETAH, 128, 3.5), ("1m", HOPPER, 168, 2.7), ("1m", HUMANOID, 64, 6.9),
    ("12m", WALKER, 680, 2.7), ("12m", CHEETAH, 512, 3.5), ("12m", HOPPER, 680, 2.7), ("12m", HUMANOID, 256, 6.9)])
def test_ed2_dreamer_matched_widths(size, groups, width, unmatched):
    d, U, latent = (ed2.DREAMER_SIZES[size][k] for k in ("deter", "hidden", "classes"))
    latent, A = 32 * latent, sum(map(len, groups))

    def count(groups, width):
        return ed2.core_params(A, groups, "mean", width, d, U, latent)

    single = count([list(range(A))], d)
    assert ed2.match_width(lambda w: count(groups, w), single) == width
    assert ed2.variant("ed2", groups, d, count, 0) == (groups, width) and abs(count(groups, width) / single - 1) < 0.05
    assert count(groups, d) / single == pytest.approx(unmatched, abs=0.06)
    assert ed2.variant("single_wide", groups, d, count, 0)[1] > d  # a single core of the unmatched size exists, too


def test_ed2_dreamer_loop_with_copied_weights_is_the_batched_core():
    shape = dict(deter=32, hidden=8, classes=4, units=16)
    torch.manual_seed(0)
    model = ed2.DreamerV3(3, 6, **shape, groups=WALKER, width=16)
    for p in model.rssm.parameters():
        p.data += 0.2 * torch.randn_like(p)
    loop = copy.deepcopy(model)
    loop.rssm = ed2.LoopedRSSM(ed2.assignment(WALKER, 6).T, 16, shape)
    for name in ("prior_net", "post_net"):
        setattr(loop.rssm, name, getattr(model.rssm, name))
    own = dict(act_weight=1, act_bias=0, act_gain=0, hid_gain=0) | {
        f"{m}.{x}": 0 for m in ("hid", "gru") for x in ("weight", "bias")}
    state = {k: v for k, v in model.rssm.state_dict().items() if not k.startswith(("prior", "post"))}
    for i, core in enumerate(loop.rssm.loop):
        mine = {k: v.narrow(own[k], i, 1) if k in own else v for k, v in state.items()}
        assert not core.load_state_dict(mine, strict=False).unexpected_keys
    obs, act, rew = recording()
    gumbel = ed2.draw_gumbel((7, 4, 32, 4), gen())
    a, b = (ed2.rssm_loss(m, obs, 2 * act, rew, gumbel) for m in (model, loop))
    assert torch.allclose(a[2][0], b[2][0], atol=1e-5) and torch.allclose(a[0], b[0], rtol=1e-5)


def test_ed2_dreamer_learns_cheetah(cheetah):
    torch.manual_seed(0)
    model = ed2.DreamerV3(17, 6, 64, 16, 8, 32, groups=CHEETAH, width=32, stoch=8)
    sampler = ed2.sampler_of(Episodes.open(cheetah / "replay"), "cheetah-run", 12, "cpu")
    opt, g, rec = ed2.LaProp(*ed2.clip_units(*model.world()), 1e-2, 5), gen(), []
    for _ in range(60):
        obs, act, rew, _ = sampler.sequences(16, g)
        loss, metrics, _ = ed2.rssm_loss(model, obs, act, rew, ed2.draw_gumbel((13, 16, 8, 8), g))
        opt.zero_grad()
        loss.backward()
        opt.step()
        rec.append(metrics["rec"].item())
    assert np.mean(rec[-5:]) < rec[0] / 3, rec[::10]


# ------------------------------------------------------------------------------------------------------- statistics
def test_ed2_relative_change_holm_and_verdict():
    old, new = [1.0, 2.0, 4.0], [0.9, 1.6, 2.8]
    mean, low, high, p = ed2.relative_change(new, old)
    half = 4.302653 * 0.1 / 3**0.5  # t of 0.975 with 2 degrees of freedom; changes -10, -20, -30 %
    assert (mean, low, high) == pytest.approx((-0.2, -0.2 - half, -0.2 + half)) and p == pytest.approx(0.0742, abs=1e-3)
    assert ed2.relative_change([2.0], [1.0])[0] == 1 and np.isnan(ed2.relative_change([2.0], [1.0])[1:]).all()
    assert ed2.relative_change([1.0, 1.0], [1.0, 1.0]) == (0, 0, 0, 1)
    assert ed2.relative_change([2.0, 2.0], [1.0, 1.0]) == (1, 1, 1, 0)
    assert ed2.holm([0.01, 0.04, 0.03, 0.005]) == pytest.approx([0.03, 0.06, 0.06, 0.02])
    assert ed2.holm([0.5, 0.9]) == pytest.approx([1, 1]) and ed2.holm([0.2]) == [0.2]
    assert ed2.verdict(-0.2, -0.3, -0.1) == "win" and ed2.verdict(-0.2, -0.3, -0.1, False) == "tie"
    assert ed2.verdict(0.2, 0.1, 0.3) == ed2.verdict(0.2, 0.1, 0.3, False) == "loss"
    for row in ((-0.2, -0.5, 0.1), (-0.04, -0.045, -0.035), (0.04, 0.03, 0.045), (-0.9, float("nan"), float("nan"))):
        assert ed2.verdict(*row) == "tie"


def test_ed2_a_win_needs_every_control(capsys):
    tasks, errors = ("cheetah-run", "hopper-hop"), dict(single=1.0, ed2=0.7, random=0.9, nosplit=0.8, ed2_wide=0.5,
                                                        single_wide=0.6)

    def cells(**changed):
        out = []
        for task in tasks:
            for v, x in (errors | changed).items():
                out += [dict(wm="tdmpc2", task=task, regime="frozen", variant=v, seed=s, logged=9.0,
                             per_step_mse=x * (1 + 0.02 * s * (v == "ed2"))) for s in (3, 1, 2)]
            for v, x in (("single", 2.0), ("ed2_wide", 1.0 if task == "cheetah-run" else 3.0)):
                out.append(dict(wm="tdmpc2", task=task, regime="joint", variant=v, seed=1, logged=x, per_step_mse=99.0))
        return out

    other = [dict(c, wm="dreamerv3", per_step_mse=0.0) for c in cells()]
    got = ed2.summarise("tdmpc2", cells() + other, tasks)
    row = got["rows"][0]
    assert row["verdict"] == "win" and row["beats controls"] and got["wins"] == 2
    assert row["change"] == pytest.approx(0.7 * 1.04 - 1) and row["wide change"] == pytest.approx(0.5 / 0.6 - 1)
    assert (row["logged single"], row["logged ED2"], row["paper"]) == (2, 1, 5e-5)
    assert got["lower"] == 1 and not got["reproduces"]  # one of two rows is not most
    assert row["p Holm"] == pytest.approx(2 * row["p"]) and json.loads(json.dumps(got)) == got
    for control in ("random", "nosplit"):
        again = ed2.summarise("tdmpc2", cells(**{control: 0.71}), tasks)
        assert again["wins"] == 0 and again["rows"][0]["verdict"] == "tie"
    worse = ed2.summarise("tdmpc2", cells(ed2=1.3), tasks)
    assert [r["verdict"] for r in worse["rows"]] == ["loss"] * 2
    out = capsys.readouterr().out
    assert "beats the matched baseline: 2 of 2 tasks" in out and "reproduces the paper" in out


# ---------------------------------------------------------------------------------------------- data and bad input
def test_ed2_data_of_the_carts(tug):
    random, replay, notes = ed2.make_data(TUG_TASK, tug, 3000, 1)
    x, y = random.arrays(TUG_TASK), replay.arrays(TUG_TASK)
    assert x["length"].sum() >= 20_000 and np.abs(x["act"]).max() <= 1 and abs(x["act"].mean()) < 0.02
    assert len(y["length"]) == 48 and len(notes["returns"]) == 3  # 3 rounds of 8 directions and their opposites
    ret = y["rew"].sum(1).reshape(3, 16)
    assert np.allclose([(r.mean(), r.max()) for r in ret], notes["returns"], rtol=1e-4)
    assert notes["random_return"] == pytest.approx(x["rew"].sum(1).mean(), rel=1e-4)
    assert ret[-1].max() > notes["random_return"]
    assert np.allclose(y["obs"][:8, 0], y["obs"][8:16, 0])  # opposite directions start alike
    assert ed2.find_partition("sd2", TUG_TASK, random)[0] == TUG_GROUPS
    sampler = ed2.sampler_of(replay, TUG_TASK, 64, "cpu")
    held = {o.numpy().tobytes() for o in sampler.sequences(200, gen(), held_out=True)[0][-1]}
    train = {o.numpy().tobytes() for o in sampler.sequences(200, gen())[0][-1]}
    assert 4 <= len(held) <= 5 and not held & train


def test_ed2_search_climbs(tmp_path, tug):
    class Pool:  # the return is how well action 0 follows state 0
        def rollout(self, jobs, policy):
            out, s = [], np.random.default_rng(0).normal(size=(64, len(jobs), 4)).astype(np.float32)
            act = np.stack([policy(s[t], np.arange(len(jobs)), np.full(len(jobs), t)) for t in range(64)])
            rew = -np.abs(act[:, :, 0] - s[:, :, 0].clip(-1, 1))
            for i in range(len(jobs)):
                out.append(dict(obs=np.r_[s[:, i], s[:1, i]], act=act[:, i], rew=rew[:, i], term=np.zeros(64, bool),
                                ret=rew[:, i].sum()))
            return out

    eps = Episodes.create(tmp_path, {TUG_TASK: (4, 3, 64)})
    random = Pool().rollout([None] * 4, lambda obs, job, t: np.zeros((4, 3)))
    curve = ed2.search(TUG_TASK, Pool(), random, eps, 20 * 16 * 64)
    assert len(curve) == 20 and eps.counts()[TUG_TASK] == 320
    assert np.mean(curve[-3:]) > 0.75 * np.mean(curve[0])  # returns are negative


def test_ed2_bad_data(tmp_path, tug):
    def folder(name, facts, n=5, end=False):
        O, A, T = facts
        eps = Episodes.create(tmp_path / name, {TUG_TASK: facts})
        for _ in range(n):
            term = np.zeros(T, bool)
            term[-1] = end
            eps.append(TUG_TASK, np.random.randn(T + 1, O), np.zeros((T, A)), np.zeros(T), term)
        return str(tmp_path / name)

    with says("action repeat", "(4, 3, 32)", "(4, 3, 64)"):
        ed2.make_data(TUG_TASK, tmp_path / "x", 1, 1, folder("half", (4, 3, 32)))
    with says("no episodes", "nowhere"):
        ed2.make_data(TUG_TASK, tmp_path / "x", 1, 1, str(tmp_path / "nowhere"))
    assert not (tmp_path / "x").exists()  # said before anything is rolled out
    with says("end early", "termination"):
        ed2.make_data(TUG_TASK, tug, 1, 1, folder("falls", (4, 3, 64), end=True))
    good = folder("good", (4, 3, 64), n=3)
    replay = ed2.make_data(TUG_TASK, tug, 1, 1, good)[1]
    with says("3 episodes of 64 steps", "at least 4", "--length"):
        ed2.sampler_of(replay, TUG_TASK, 10, "cpu")
    with says("3 episodes of 64 steps", "65 steps", "--length"):
        ed2.sampler_of(replay, TUG_TASK, 65, "cpu")
    random = Episodes.open(tug / "random")
    for name, words in (("published", "walker, cheetah"), ("human", "walker, cheetah, hopper")):
        with says(f"no {name} partition of 'fish'", words, "sd2"):
            ed2.find_partition(name, "fish-swim", random)


@pytest.mark.parametrize("settings, words", [
    (dict(agg="mean"), ("--agg mean", "hidden, pre or post")), (dict(tables=True, cost=True), ("choose one",)),
    (dict(agg="post", wm="dreamerv3"), ("--agg post", "mean or blocks")), (dict(workers=0), ("at least 1",)),
    (dict(agg="blocks", wm="dreamerv3", match="none"), ("--match none",)),
    (dict(resume="nowhere"), ("no args.json", "ed2")),
    (dict(tables=True, mode="online"), ("tables", "online")), (dict(task="walker-wolk"), ("walker-walk",)),
    (dict(tables=True, size="1M"), ("--size 1M",)), (dict(seeds=0), ("--seeds 0",)),
    (dict(device="cuda"), ("no GPU",))])
def test_ed2_bad_flags_get_one_sentence(settings, words, tmp_path, monkeypatch):
    if settings.get("device") == "cuda" and torch.cuda.is_available():
        pytest.skip("there is a GPU")
    monkeypatch.chdir(tmp_path)
    with says(*words):
        ed2.main(ed2.Args(**{"device": "cpu"} | settings))
    assert not (tmp_path / "runs").exists()


def test_ed2_flags_of_the_command_line():
    args = tyro.cli(ed2.Args, args=["--wm", "dreamerv3", "--agg", "blocks", "--seeds", "2", "--no-compile"])
    assert (args.wm, args.agg, args.seeds, args.compile) == ("dreamerv3", "blocks", 2, False)


# ------------------------------------------------------------------------------------------------- whole runs of ed2.py
@pytest.fixture
def small(tmp_path, monkeypatch):
    """Smaller models and test sets; runs/ goes to tmp_path."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setitem(ed2.TDMPC2_SIZES, "1M", (64, 160))
    monkeypatch.setitem(ed2.DREAMER_SIZES, "1m", dict(deter=256, hidden=32, classes=4, units=32))
    monkeypatch.setattr(ed2, "measure_rssm", functools.partial(ed2.measure_rssm, batch=16, draws=2))
    real = ed2.sampler_of

    def sampler_of(*args):
        sampler = real(*args)
        full = sampler.sequences
        sampler.sequences = lambda n, *a, **k: full(min(n, 64), *a, **k)
        return sampler

    monkeypatch.setattr(ed2, "sampler_of", sampler_of)


def numbers(x):
    """All numbers in a result, at any depth."""
    if isinstance(x, dict):
        return [n for v in x.values() for n in numbers(v)]
    if isinstance(x, (list, tuple)):
        return [n for v in x for n in numbers(v)]
    return [float(x)] if isinstance(x, (int, float)) else []


def test_ed2_compare_tdmpc2_killed_and_resumed_ends_at_the_same_numbers(tug, small, monkeypatch, capsys):
    args = ed2_args(seeds=2)
    real, calls = ed2.measure_latents, []

    def killed(*a, **k):  # at the end of the fifth training
        calls.append(1)
        if len(calls) == 5:
            raise KeyboardInterrupt
        return real(*a, **k)

    runs = [ed2_run(args, tug) for _ in range(2)]
    whole = ed2.main(ed2.Args(resume=str(runs[0])))
    out = capsys.readouterr().out
    assert "6/6" in out and "min left" in out
    assert f"partition sd2: {TUG_GROUPS}" in out and "  merge [0] + [1]: +" in out
    assert "verdict on per_step_mse" in out and "95 % interval" in out
    assert all(np.isfinite(numbers(whole[part])).all() for part in ("table", "cells", "data"))
    assert {p.name for p in runs[0].iterdir()} >= {"results.json", "results.csv", "horizon.png", "partition.png"}
    assert json.loads((runs[0] / "results.json").read_text())["table"] == whole["table"]
    csv_ = (runs[0] / "results.csv").read_text().splitlines()
    assert csv_[0] == "metric,single,ed2,change,low,high" and len(csv_) == 1 + len(whole["table"])
    kinds = {(c["regime"], c["variant"], c["seed"]) for c in whole["cells"]}
    wanted = ("joint", "single"), ("frozen", "single"), ("frozen", "ed2")
    assert kinds == {(*w, s) for s in (1, 2) for w in wanted} and len(whole["cells"]) == 6
    for c in whole["cells"]:
        sizes = [len(g) for g in c["trained_on"]]
        assert c["dynamics_params"] == ed2.dynamics_params(64, 3, c["width"], sizes, "hidden")
    row = next(r for r in whole["table"] if r["metric"] == "per_step_mse")
    a, b = ([c["per_step_mse"] for c in sorted(whole["cells"], key=lambda c: c["seed"])
             if (c["regime"], c["variant"]) == ("frozen", v)] for v in ("single", "ed2"))
    assert (row["single"], row["ed2"]) == (np.mean(a), np.mean(b))
    assert row["change"] == pytest.approx(np.mean([(y - x) / x for x, y in zip(a, b)]))
    assert whole["verdict"] == ed2.verdict(row["change"], row["low"], row["high"])
    with monkeypatch.context() as m:
        m.setattr(ed2, "measure_latents", killed)
        with says("stopped; go on with: python", f"--resume {runs[1]}"):
            ed2.main(ed2.Args(resume=str(runs[1])))
    files = sorted((runs[1] / "cells").iterdir())
    stamps = [p.stat().st_mtime_ns for p in files]
    assert len(files) == 4
    again = ed2.main(ed2.Args(resume=str(runs[1])))
    assert again["table"] == whole["table"] and again["partition"] == whole["partition"]
    assert [p.stat().st_mtime_ns for p in files] == stamps and len(list((runs[1] / "cells").iterdir())) == 6


@pytest.mark.parametrize("settings", [dict(agg="mean"), dict(agg="blocks", partition="full", match="params")])
def test_ed2_compare_dreamerv3(settings, tug, small, capsys):
    run = ed2_run(ed2_args(wm="dreamerv3", updates=10, **settings), tug)
    result = ed2.main(ed2.Args(resume=str(run)))
    metrics = {r["metric"]: r for r in result["table"]}
    assert {"dyn", "dyn_raw", "rec", "nmse_1", "nmse_15", "nmse_45", "post_entropy"} <= set(metrics)
    assert np.isfinite(numbers(result["cells"])).all() and metrics["dyn"]["single"] >= 1
    assert all(r["change"] == pytest.approx(r["ed2"] / r["single"] - 1, rel=1e-6) for r in result["table"])
    assert result["verdict"] == "none, 1 seed"
    assert {p.name for p in run.iterdir()} >= {"results.json", "results.csv", "horizon.png", "partition.png"}
    stamps = {p: p.stat().st_mtime_ns for p in (run / "cells").iterdir()}
    ed2.main(ed2.Args(resume=str(run)))
    assert stamps == {p: p.stat().st_mtime_ns for p in (run / "cells").iterdir()} and len(stamps) == 2
    assert "verdict on nmse_15" in capsys.readouterr().out


def test_ed2_variants_of_a_run(tmp_path, tug, small, capsys):
    """A joint encoder; full width; given data; one action, for which the baseline runs alone and says so."""
    args = ed2_args(encoder="joint", match="none", data_dir=str(tug / "replay"))
    result = ed2.main(ed2.Args(resume=str(ed2_run(args, tug))))
    assert {(c["regime"], c["variant"]) for c in result["cells"]} == {("joint", "single"), ("joint", "ed2_wide")}
    single, wide = sorted(result["cells"], key=lambda c: c["dynamics_params"])
    assert single["width"] == wide["width"] == 160 and wide["dynamics_params"] > 1.5 * single["dynamics_params"]
    assert all(np.isfinite(c["train_loss"]) for c in result["cells"])
    eps = Episodes.create(tmp_path / "pole" / "random", {"cartpole-swingup": (5, 1, 500)})
    for _ in range(5):
        act = np.random.uniform(-1, 1, (500, 1))
        eps.append("cartpole-swingup", np.random.randn(501, 5), act, np.zeros(500), np.zeros(500, bool))
    (tmp_path / "pole" / "replay").symlink_to(tmp_path / "pole" / "random")
    (tmp_path / "pole" / "data.json").write_text('{"random_return": 0.0, "returns": [[0.0, 0.0]]}')
    run = ed2_run(ed2_args(task="cartpole-swingup"), tmp_path / "pole")
    result = ed2.main(ed2.Args(resume=str(run)))
    assert "has 1 action in one group: ED2 is the baseline" in capsys.readouterr().out
    assert "verdict" not in result and {c["variant"] for c in result["cells"]} == {"single"}
    assert (run / "horizon.png").exists()


def test_ed2_tables(cheetah, small, monkeypatch, capsys):
    for wm in ("tdmpc2", "dreamerv3"):
        tiny = {k: v for k, v in dataclasses.asdict(ed2_args(wm=wm)).items()
                if k in ("updates", "batch", "length", "lr", "size")}
        monkeypatch.setitem(ed2.BUDGETS, ("tables", wm), (tiny, tiny))
    args = ed2.Args(task="cheetah-run", tables=True, device="cpu", compile=False, workers=1, seeds=1, data_steps=1)
    run = Run("tables", "ed2", 1, dataclasses.asdict(args))
    (run.dir / "data").mkdir()
    (run.dir / "data" / "cheetah-run").symlink_to(cheetah)
    result = ed2.tables(args, run, tasks=("cheetah-run",))
    out = capsys.readouterr().out
    for wm, old, metric in (("tdmpc2", "logged", "per_step_mse"), ("dreamerv3", "dyn", "nmse_15")):
        (row,) = result[wm]["rows"]
        filled = [row[f"{metric} {v}"] for v in ed2.VARIANTS] + [row[f"{old} single"], row[f"{old} ED2"]]
        assert np.isfinite(filled).all() and row["verdict"] == "tie"
        cells = [c for c in result["cells"] if c["wm"] == wm]
        assert len(cells) == (8 if wm == "tdmpc2" else 6) and (run.dir / f"table_{wm}.csv").exists()
        sizes = {c["variant"]: c["dynamics_params"] for c in cells}
        for v in ("ed2", "random", "nosplit"):
            assert abs(sizes[v] / sizes["single"] - 1) < 0.05
        assert abs(sizes["single_wide"] / sizes["ed2_wide"] - 1) < 0.05 < sizes["ed2_wide"] / sizes["single"] - 1.5
        groups = {c["variant"]: c["trained_on"] for c in cells}
        assert groups["ed2"] == CHEETAH and sorted(map(len, groups["random"])) == [1, 1, 2, 2]
    assert result["tdmpc2"]["rows"][0]["paper"] == 5e-5 and result["dreamerv3"]["rows"][0]["paper"] == ""
    assert out.count("beats the matched baseline: 0 of 1 tasks") == 2 and out.count("reproduces the paper") == 2
    assert "undecided" in out and (run.dir / "tables.png").exists()
    json.dumps(result)
    run.close()


def test_ed2_discovery_and_cost(cheetah, small, monkeypatch):
    monkeypatch.setitem(ed2.DREAMER_SIZES, "1m", dict(deter=512, hidden=64, classes=4, units=32))
    for wm, size in (("tdmpc2", "1M"), ("dreamerv3", "1m")):
        tiny = dict(updates=10, batch=4, length=3, lr=1e-3, size=size)
        monkeypatch.setitem(ed2.BUDGETS, ("full", wm), (tiny, tiny))
    args = ed2_args(task="cheetah-run", seeds=2, updates=10)
    run = Run("discovery", "ed2", 1, {})
    (run.dir / "data").mkdir()
    (run.dir / "data" / "cheetah-run").symlink_to(cheetah)
    monkeypatch.setattr(ed2, "fit_influence", functools.partial(ed2.fit_influence, steps=20, batch=16))
    rows = ed2.discovery(args, run, tasks=("cheetah-run",))["rows"]
    assert len(rows) == 12 and {(r["data"], r["space"], r["method"]) for r in rows} == {
        (d, s, m) for d in ("random", "replay") for s in ("state", "latent") for m in ("sd2", "sd2j", "learned")}
    assert all(ed2.check_partition(g, 6) for r in rows for g in r["groups"])
    assert rows[0]["ari_published"] == rows[0]["ari_between_seeds"] == 1 and rows[0]["groups"] == [CHEETAH] * 2
    assert (run.dir / "discovery.csv").exists()
    args = dataclasses.replace(args, updates=None, batch=None, length=None, lr=None, size=None)
    rows = ed2.cost(args, run, repeats=1)["rows"]
    assert [(r["task"], r["wm"], r["k"]) for r in rows] == [
        (t, wm, k) for t, k in (("walker-walk", 3), ("humanoid-walk", 8)) for wm in ("tdmpc2", "dreamerv3")]
    assert all(r[f"{name}_ms"] > 0 for r in rows for name in ("single", "batched", "looped"))
    run.close()


def test_ed2_compiled_losses_were_compiled_and_agree_with_eager(monkeypatch):
    real = torch.compile
    monkeypatch.setattr(torch, "compile", lambda f, **kw: real(f, backend="eager", fullgraph=True, **kw))
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    args, encoder = ed2_args(updates=10), nn.Sequential(ed2.NormedLinear(4, 16, ed2.simnorm))
    results = []
    for enabled in (False, True):
        compiled = ed2.compiler(enabled)
        model = tiny_tdmpc2(TUG_GROUPS)
        joint = ed2.train_tdmpc2(model, Push3(), args, 0, compiled)
        ed2.train_dynamics(model.dynamics, encoder, Push3(), args, 0, compiled)
        assert compiled(ed2.prior_loss) is compiled(ed2.prior_loss)  # made once
        results.append([joint, *(p.detach() for p in model.parameters())])
    counters = torch._dynamo.utils.counters
    assert counters["stats"]["unique_graphs"] == 3 and not counters["graph_break"]  # and none was compiled twice
    assert results[0][0] == pytest.approx(results[1][0], rel=1e-3)
    assert all(torch.allclose(a, b, atol=1e-3) for a, b in zip(results[0][1:], results[1][1:]))
    model = tiny_dreamer(groups=WALKER, width=16)
    slow = copy.deepcopy(model.critic).requires_grad_(False)
    batch, noise = recording(T=2, B=2), noise_for(model, 2, 2, H=2)
    a, b = (f(model, slow, torch.zeros(2), *batch, noise) for f in (ed2.dreamer_loss, compiled(ed2.dreamer_loss)))
    assert torch.allclose(a[0], b[0], atol=1e-4) and torch.allclose(a[2], b[2], atol=1e-6)
    assert counters["stats"]["unique_graphs"] == 4 and ed2.compiler(False)(ed2.rssm_loss) is ed2.rssm_loss


def test_ed2_copied_with_its_two_helpers_it_runs(tmp_path, tug):
    for name in ("ed2.py", "envs.py", "data.py"):
        (tmp_path / name).write_text(Path(HERE, name).read_text())
    (tmp_path / "tug.py").write_text(TUG)
    env = {k: v for k, v in os.environ.items() if k != "PYTHONPATH"} | {"OMP_NUM_THREADS": "1"}

    def run(*words):
        p = subprocess.run([sys.executable, "ed2.py", *words], cwd=tmp_path, env=env, capture_output=True, text=True)
        assert p.returncode == 0, p.stderr[-2000:]
        return p.stdout

    out = run("--help")
    for f in dataclasses.fields(ed2.Args):
        assert f"--{f.name.replace('_', '-')}" in out
    assert "Deviations" in out and "--no-compile" in out
    names = "task", "device", "workers", "seeds", "updates", "batch", "length", "lr", "size"
    settings = {k: v for k, v in dataclasses.asdict(ed2_args(updates=10)).items() if k in names}
    out = run(*flags(**settings, encoder="joint", data_dir=tug / "replay"))
    folder = last_run(tmp_path)
    assert "budget: size 1M, 10 updates of 4 x 3 steps" in out and f"files: {folder.relative_to(tmp_path)}/" in out
    assert {f.name for f in folder.iterdir()} >= {"ed2.py", "envs.py", "data.py", "args.json", "results.csv"}
    result = json.loads((folder / "results.json").read_text())
    assert result["partition"] == TUG_GROUPS and "--task tug:Tug-v0" in result["command"] and len(result["cells"]) == 2


def test_ed2_online_stopped_and_resumed_ends_at_the_same_numbers(tug, small, monkeypatch, capsys):
    monkeypatch.setitem(ed2.DREAMER_SIZES, "1m", dict(deter=128, hidden=16, classes=4, units=16))
    args = ed2_args(wm="dreamerv3", mode="online", updates=8, length=8, train_ratio=1, seed=3)  # 256 steps in 2 rounds
    real = Run.save

    def killed(self, state, name="checkpoint.pt"):
        real(self, state, name)
        raise KeyboardInterrupt

    runs = [ed2_run(args, tug, inside=False) for _ in range(2)]
    whole = ed2.main(ed2.Args(resume=str(runs[0])))
    with monkeypatch.context() as m:
        m.setattr(Run, "save", killed)
        with says("stopped; go on with", str(runs[1])):
            ed2.main(ed2.Args(resume=str(runs[1])))
    assert torch.load(runs[1] / "checkpoint.pt", weights_only=True)["steps"] == 128
    again = ed2.main(ed2.Args(resume=str(runs[1])))
    assert again["returns"] == whole["returns"] and len(whole["returns"]) == 10 and len(whole["curve"]) == 2
    assert [r[:2] + r[3:] for r in again["curve"]] == [r[:2] + r[3:] for r in whole["curve"]]
    a, b = (torch.load(r / "checkpoint.pt", weights_only=True) for r in runs)
    assert all(torch.equal(a["model"][k], v) for k, v in b["model"].items()) and a["updates"] == b["updates"] == 8
    assert a["model"]["rssm.act_weight"].shape == (3, 2, 16) and whole["groups"] == TUG_GROUPS
    lines = [json.loads(x) for x in (runs[1] / "metrics.jsonl").read_text().splitlines()]
    assert [x["step"] for x in lines] == [128, 256] and {"losses/rec", "charts/episodic_return"} <= set(lines[1])
    assert (runs[0] / "curve.png").exists() and "random policy" in capsys.readouterr().out
    args = dataclasses.replace(args, eval_only=True, checkpoint=str(runs[0] / "checkpoint.pt"))
    play = ed2_run(args, tug, inside=False)
    assert ed2.main(ed2.Args(resume=str(play)))["returns"] == whole["returns"]


@pytest.mark.parametrize("settings", [dict(), dict(wm="dreamerv3")])
def test_ed2_few_updates_are_enough_for_a_number(settings, tug, small):
    args = ed2_args(updates=2, partition="none", encoder="joint", **settings)
    result = ed2.main(ed2.Args(resume=str(ed2_run(args, tug))))
    assert np.isfinite(result["cells"][0]["train_loss"])


@pytest.mark.parametrize("settings, words", [
    (dict(size="99m", wm="dreamerv3"), ("--size 99m", "1m", "12m")), (dict(size="1m"), ("--size 1m", "1M", "5M")),
    (dict(length=4, wm="dreamerv3"), ("--length 4",)), (dict(updates=0), ("--updates 0",)),
    (dict(mode="online", agg="hidden"), ("--agg hidden",)), (dict(eval_only=True, mode="online"), ("--checkpoint",)),
    (dict(mode="online", checkpoint="nowhere.pt", task="cup-catch"), ("nowhere.pt",))])
def test_ed2_more_bad_flags(settings, words, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for name in ("make_data", "Workers"):
        monkeypatch.setattr(ed2, name, lambda *a, **k: pytest.fail("began to work"))
    with says(*words):
        ed2.main(ed2.Args(**{"device": "cpu"} | settings))


def test_ed2_online_takes_the_recurrent_aggregations(tug, small):
    args = ed2_args(mode="online", wm="dreamerv3", agg="blocks", updates=1, length=8, train_ratio=1)
    result = ed2.main(ed2.Args(resume=str(ed2_run(dataclasses.replace(args, wm="tdmpc2"), tug, inside=False))))
    assert len(result["returns"]) == 10


def rows_of(O, A, n=64):
    g = torch.Generator().manual_seed(0)
    return torch.randn(n, O, generator=g), torch.rand(n, A, generator=g) * 2 - 1, torch.randn(n, O, generator=g)


def test_ed2_bank_of_trunks_equals_a_loop_and_serves_every_robot():
    torch.manual_seed(0)
    bank = ed2.Bank(K=3, latent=8, width=16)
    for A in (2, 5):
        z, act, keys = torch.randn(7, 8), torch.randn(7, A), torch.randn(A, 16)
        p = bank.assign(keys)
        assert p.shape == (A, 3) and (p > 0).all() and torch.allclose(p.sum(1), torch.ones(A))
        slow = []
        for i in range(3):
            own = slice(16 * i, 16 * i + 16)
            x = z @ bank.w_z[:, own] + bank.bias[own]
            for j in range(A):  # action j, as much of it as belongs to trunk i
                x = x + p[j, i] * act[:, j:j + 1] * (keys[j] @ bank.w_a[:, own])
            x = torch.nn.functional.mish(torch.nn.functional.layer_norm(x, (16,)) * bank.gain[i] + bank.shift[i])
            x = x @ bank.second.weight[i] + bank.second.bias[i]
            slow.append(torch.nn.functional.mish(
                torch.nn.functional.layer_norm(x, (16,)) * bank.second.gain[i] + bank.second.shift[i]))
        assert torch.allclose(bank(z, act, keys), torch.stack(slow).mean(0), atol=1e-6)


def test_ed2_frozen_bank_stays_while_the_body_learns():
    torch.manual_seed(0)
    rows, bank = rows_of(5, 2), ed2.Bank(K=2, latent=8, width=8)
    body = ed2.Body(bank, *rows)
    before = [{k: v.clone() for k, v in m.state_dict().items()} for m in (bank, body)]
    bank.requires_grad_(False)
    ed2.fit_bank(bank, [(body, rows)], 20, 16, 0)
    assert all(torch.equal(v, before[0][k]) for k, v in bank.state_dict().items())
    learned = {"encoder.weight", "encoder.bias", "head.weight", "head.bias", "keys"}
    assert {k for k, v in body.state_dict().items() if not torch.equal(v, before[1][k])} == learned
    bank.requires_grad_(True)
    ed2.fit_bank(bank, [(body, rows)], 20, 16, 0)
    assert all(not torch.equal(v, before[0][k]) for k, v in bank.state_dict().items())


def test_ed2_bodies_runs_end_to_end_and_goes_on_where_it_stopped(tmp_path, capsys):
    rng = np.random.default_rng(0)
    for task, (O, A) in {"cheetah-run": (6, 3), "hopper-hop": (5, 2), "cheetah-run-backwards": (6, 3)}.items():
        folder = tmp_path / "data" / task
        for part in ("random", "replay"):
            episodes = Episodes.create(folder / part, {task: (O, A, 40)})
            M = rng.normal(size=(O + A, O)) * 0.05
            for _ in range(9):
                act = rng.uniform(-1, 1, (40, A))
                obs = [rng.normal(size=O)]
                for a in act:
                    obs.append(0.95 * obs[-1] + np.r_[obs[-1], a] @ M)
                episodes.append(task, np.array(obs, "f4"), act.astype("f4"), np.zeros(40, "f4"), np.zeros(40, bool))
        (folder / "data.json").write_text("{}")
    args, run = ed2.Args(bodies=True, seeds=2, workers=1, device="cpu"), types.SimpleNamespace(dir=tmp_path)
    sizes = dict(cases={"cheetah-run-backwards": ("cheetah-run", "hopper-hop"), "hopper-hop": ("cheetah-run",)},
                 shots=(1, 3), pretrain=20, updates=40, batch=16, K=2, latent=8, width=8)
    first = ed2.bodies(args, run, **sizes)
    assert len(first["rows"]) == 4 and len(first["cells"]) == 8
    arms = ("frozen", "tuned", "scratch", "random", "linear", "persistence")
    assert all(np.isfinite([r[arm] for arm in arms]).all() for r in first["rows"])
    assert ["zero_shot" in r for r in first["rows"]] == [True, True, False, False]  # there, a known body
    assert (tmp_path / "bodies.csv").read_text().count("\n") == 5 and (tmp_path / "bodies.png").stat().st_size > 5000
    assert "the frozen bank is" in capsys.readouterr().out
    file = tmp_path / "cells" / "hopper-hop_3_2.json"
    file.unlink()  # killed before this cell: computed again, to the same numbers; the others are read
    other = file.with_name("hopper-hop_3_1.json")
    other.write_text(json.dumps(json.loads(other.read_text()) | {"frozen": 7.0}))
    again = ed2.bodies(args, run, **sizes)["cells"]
    assert again[-1] == first["cells"][-1] and again[-2]["frozen"] == 7.0


# --------------------------------------------------------------------------------------------------------------- mow.py
GAMES = "Boxing,Krull,RoadRunner"
MOW_TINY = dict(steps=44, random_steps=12, warmup=4, train_every=1, batch=2, length=8, rollouts=4, context=3, horizon=3,
            stem=4, latents=4, classes=4, width=16, heads=2, hidden=16, emb=8, eval_episodes=1, frame_cap=80,
            device="cpu", compile=False, bf16=False)


def mow_args(**more):
    args = mow.Args(**MOW_TINY | more)
    return mow.fill(args, mow.task_list(args.task))


def mow_agent(K=3, legal=None, **more):
    """A tiny agent for K games, its clusters given in turn."""
    args = mow_args(task=",".join(envs.ATARI26[:K]), **more)
    agent = mow.make_agent(args, mow.task_list(args.task), legal or [list(range(18))] * K, torch.device("cpu"))
    agent.wm.assign([k % args.clusters for k in range(K)])
    return agent


def mow_batch(agent, B=2, L=6, seed=0, K=None):
    K, g = K or agent.K, torch.Generator().manual_seed(seed)
    obs = torch.randint(0, 256, (K, B, L, 64, 64, 3), generator=g, dtype=torch.uint8)
    act = F.one_hot(torch.randint(0, 18, (K, B, L), generator=g), agent.A).float()
    flags = torch.zeros(K, B, L, dtype=torch.bool)
    return obs, act, torch.randn(K, B, L, generator=g), flags, flags.clone()


def mow_frames(agent, path, n=40):
    frames = data.Frames(path, agent.K, n, agent.A)
    rng = np.random.default_rng(0)
    for t in range(n):
        frames.append(rng.integers(0, 256, (agent.K, 64, 64, 3)), np.eye(agent.A)[rng.integers(0, 18, agent.K)],
                      rng.normal(size=agent.K), [t % 9 == 8] * agent.K, [t % 9 == 0] * agent.K)
    return frames


def everything(agent):
    """All numbers of an agent, in one tensor per name."""
    flat = {}

    def walk(x, name):
        if isinstance(x, dict):
            for k, v in x.items():
                walk(v, f"{name}/{k}")
        elif isinstance(x, (list, tuple)):
            walk(dict(enumerate(x)), name)
        elif torch.is_tensor(x):
            flat[name] = x
    walk(agent if isinstance(agent, dict) else agent.state(), "")
    return flat


# ------------------------------------------------------------------------------------------------------------- envs.py
def test_atari_games_follow_the_protocol():
    counts = dict(zip(envs.ATARI26, (18, 10, 7, 9, 18, 18, 18, 4, 18, 9, 6, 3, 18, 8, 18, 18, 18, 18, 14, 9, 6, 18, 6,
                                     18,
                                     18, 6)))
    assert len(envs.ATARI26) == 26 and set(mow.STORM_RETURN) == set(envs.ATARI26)
    for game in ("Alien", "Breakout", "Freeway", "UpNDown", "KungFuMaster"):
        assert len(envs.make_env(game, obs="pixels").legal) == counts[game]
    check_env(envs.make_env("Boxing", obs="pixels"), skip_render_check=True)

    def play(seed, n=40, **options):
        env = envs.make_env("Breakout", obs="pixels", **options)
        obs = [env.reset(seed=seed)[0]]
        infos = []
        for t in range(n):
            o, r, term, trunc, info = env.step([1, 3, 4, 1][t % 4])
            obs.append(o)
            infos.append((r, term, trunc, info["life_lost"]))
        return np.stack(obs), infos

    a, b, c = play(3), play(3), play(4)
    assert np.array_equal(a[0], b[0]) and a[1] == b[1] and not np.array_equal(a[0], c[0])
    assert np.array_equal(play(3, sticky=0.0)[0], play(4, sticky=0.0)[0])  # then nothing is left to chance
    assert not np.array_equal(play(3, sticky=0.0, noop=30)[0], play(4, sticky=0.0, noop=30)[0])
    lost = play(3, n=60)[1]
    assert any(x[3] for x in lost) and not any(x[1] for x in lost[:20])  # a life is lost, the game goes on
    assert not any(x[3] for x in play(3, n=60, life_loss=False)[1])
    assert [x[2] for x in play(3, n=5, frame_cap=20)[1]] == [False] * 4 + [True]
    assert envs.score("Boxing", 12.1, 0) == pytest.approx(1) and envs.score("Boxing", 0.1, 0) == pytest.approx(0)


def test_atari_frames_are_averages_over_areas_and_maxima_of_two_frames():
    rows = envs._areas(210, 64)
    assert rows.shape == (64, 210) and np.allclose(rows.sum(1), 1) and np.allclose(rows.sum(0), 64 / 210, atol=1e-6)
    screen = np.random.default_rng(0).integers(0, 256, (210, 160, 3), np.uint8)
    env = envs.make_env("Boxing", obs="pixels")
    want = F.interpolate(torch.from_numpy(screen).double().permute(2, 0, 1)[None].repeat_interleave(32, 2)
                         .repeat_interleave(2, 3), size=None, scale_factor=1)[0]
    want = torch.stack([F.avg_pool2d(x[None, None], (105, 5))[0, 0] for x in want], -1)  # 210*32/64, 160*2/64
    assert np.abs(env._shrink(screen).astype(float) - want.numpy()).max() <= 0.51
    env.reset(seed=0)
    frames, real = [], env._env

    class Spy:
        def __getattr__(self, name):
            return getattr(real, name)

        def act(self, a):
            out = real.act(a)
            frames.append(real.getScreenRGB())
            return out
    env._env = Spy()
    obs = env.step(2)[0]
    assert len(frames) == 4 and np.array_equal(obs, env._shrink(np.maximum(frames[2], frames[3])))


def test_a_fleet_steps_restarts_and_comes_back_by_replay():
    with envs.Fleet(["Breakout", "Pong"], {"Breakout": dict(frame_cap=40)}) as fleet:
        assert [len(x) for x in fleet.legal] == [4, 6]
        first = fleet.reset([5, 6])
        for t in range(12):
            fleet.send([t % 4, t % 6], [7, 8])
            steps = fleet.receive()
            if t == 9:
                assert steps[0][3]  # the cap of 10 steps
                env = envs.make_env("Breakout", obs="pixels")
                assert np.array_equal(steps[0][0], env.reset(seed=7)[0])
        again = fleet.reset([7, 6], [[10 % 4, 11 % 4], [t % 6 for t in range(12)]])
        assert all(np.array_equal(a, s[0]) for a, s in zip(again, steps)) and not np.array_equal(first[0], again[0])
        fleet._links[1][0].kill()
        fleet.send([0, 0], [1, 1])
        with says("Pong died", "--resume"):
            fleet.receive()
    with says("nearest", "Boxing"):
        envs.Fleet(["Boxin"])


def test_frames_sample_windows_and_go_back(tmp_path):
    frames = data.Frames(tmp_path / "f", 2, 12, 3, size=4)
    for t in range(10):
        frames.append(np.full((2, 4, 4, 3), t), np.full((2, 3), t), [t, -t], [False, t == 3], [t == 0, t == 4])
    obs, act, rew, term, first = frames.sample(5, 4, np.random.default_rng(0))
    assert obs.shape == (2, 5, 4, 4, 4, 3) and obs.dtype == torch.uint8 and first.dtype == torch.bool
    assert (rew[0].diff(dim=-1) == 1).all() and (rew[1].diff(dim=-1) == -1).all()
    assert (obs[..., 0, 0, 0] == act[..., 0]).all() and rew[0].min() >= 0 and rew[0].max() <= 9
    assert frames.sample(50, 3, np.random.default_rng(0), tasks=[1], since=6)[2].max() == -6
    frames.flush()
    again = data.Frames(tmp_path / "f", 2, 12, 3, size=4)
    assert again.count == 0 and np.array_equal(again.rew, frames.rew)
    with says("10 steps", "of a window"):
        frames.sample(1, 11, np.random.default_rng(0))
    with says("expected", "choose another folder"):
        data.Frames(tmp_path / "f", 2, 13, 3, size=4)


def test_a_replay_that_does_not_fit_on_the_disk_says_so(tmp_path, monkeypatch):
    monkeypatch.setattr(data.shutil, "disk_usage", lambda p: types.SimpleNamespace(free=10**6))
    with says("replay of 26 x 100,000 frames", "GB free"):
        data.Frames(tmp_path / "f", 26, 100_000, 18)
    assert not list((tmp_path / "f").iterdir())


def test_metaworld_pixels_from_the_moved_camera():
    env = envs.make_env("mw-reach", obs="pixels", camera="corner4", repeat=1, length=500)
    obs, _ = env.reset(seed=0)
    assert obs.shape == (64, 64, 3) and env.facts[2:] == (500, 1) and env.action_space.shape == (4,)
    table = obs[40:].astype(float).mean((0, 1))
    assert table[0] > table[2] + 20  # the wooden table is at the bottom: not upside down
    again = envs.make_env("mw-reach", obs="pixels", camera="corner4", repeat=1, length=500)
    assert np.array_equal(again.reset(seed=0)[0], obs)
    again._frame = lambda: obs  # drawing 500 of them takes long
    assert [again.step(np.zeros(4))[3] for _ in range(500)] == [False] * 499 + [True]
    assert len(envs.MT10) == 10 and set(envs.MT10) <= set(envs.METAWORLD50)


# ---------------------------------------------------------------------------------------------------------------- maths
def test_mow_two_hot_and_returns_by_hand():
    x = torch.tensor([-3e9, -7.3, 0.0, 0.4, 12.0, 5e8, 1e12])
    logits = torch.randn(7, 255, generator=torch.Generator().manual_seed(0))
    logp, bins = logits.log_softmax(-1), torch.linspace(-20, 20, 255)
    y = mow.symlog(x).clamp(-20, 20)
    i = torch.searchsorted(bins, y).clamp(1, 254)
    w = (y - bins[i - 1]) / (bins[i] - bins[i - 1])
    want = -(logp.gather(1, i[:, None] - 1)[:, 0] * (1 - w) + logp.gather(1, i[:, None])[:, 0] * w)
    assert torch.allclose(mow.two_hot_loss(logits, x), want, atol=1e-3)
    sharp = torch.full((1, 255), -1e4)
    sharp[0, 127 + 20] = 0
    assert mow.two_hot_mean(sharp).item() == pytest.approx(math.expm1(20 * 40 / 254), rel=1e-4)
    rew, done, v = torch.tensor([1., 2., 4.]), torch.tensor([0., 1., 0.]), torch.tensor([7., 11., 13., 17.])
    g, lam = 0.9, 0.6
    R2 = 4 + g * 17
    R1 = 2.0
    R0 = 1 + g * (0.4 * 11 + 0.6 * R1)
    assert torch.allclose(mow.lambda_return(rew, done, v, g, lam), torch.tensor([R0, R1, R2]))
    R0 = 1 + g * (0.4 * 7 + 0.6 * R1)
    assert torch.allclose(mow.lambda_return(rew, done, v, g, lam, compat=True),
                          torch.tensor([R0, R1, 4 + g * (0.4 * 13 + 0.6 * 17)]))


def test_sigma_in_closed_form_minimises_the_harmonious_loss():
    loss = torch.tensor([0.01, 1.0, 10.0, 300.0], dtype=torch.double)
    s = mow.best_sigma(loss)
    f = lambda s: loss / s + s.log1p()  # noqa: E731
    assert (f(s) < f(s * 1.01)).all() and (f(s) < f(s * 0.99)).all()
    assert (1 / s)[2:].tolist() == pytest.approx([0.092, 0.0033], rel=0.02)


def test_balance_loss_is_zero_at_uniform_use_and_lifts_an_unused_expert():
    assert mow.balance_loss(torch.full((6, 4), 0.25), 2) == 0
    logits = torch.tensor([[4., 4., 0.]] * 3, requires_grad=True)
    mow.balance_loss(logits.softmax(-1), 2).backward()
    assert (logits.grad[:, 2] < 0).all() and (logits.grad[:, :2] > 0).all()
    big, small = (mow.balance_loss(torch.tensor([[1., 0., 0.]]).expand(K, 3), 1) for K in (26, 3))
    assert big == pytest.approx(float(small))


def test_route_is_per_task_ordered_and_random_only_with_noise():
    router = torch.nn.Linear(8, 5)
    e = F.normalize(torch.randn(40, 8, generator=torch.Generator().manual_seed(1)), dim=-1)
    S, J, w = mow.route(e, router, 2)
    assert torch.allclose(S.sum(-1), torch.ones(40)) and (J[:, 0] < J[:, 1]).all() and torch.allclose(w.sum(-1),
                                                                                                      torch.ones(40))
    assert torch.equal(J, S.topk(2).indices.sort().values)
    assert torch.equal(mow.route(e, router, 2, tau=5.0)[1], J)  # temperature alone changes no choice
    assert not torch.equal(mow.route(e, router, 2, tau=5.0, noise=1.0)[1], J)
    assert mow.route(e, router, 2, tau=5.0)[0].max() < S.max()


def test_planted_clusters_are_found_and_sizes_are_capped():
    rng = np.random.default_rng(0)
    truth = rng.permutation(np.arange(12) % 3)
    centre = rng.normal(size=(3, 7, 64))
    grads = centre[truth] + 0.7 * rng.normal(size=(12, 7, 64))
    grads *= rng.uniform(0.01, 100, size=(12, 7, 1))  # scale means nothing
    labels = mow.cluster_tasks(grads, 3)
    assert mow.adjusted_rand(labels, truth) == 1 and labels[0] == 0 and labels == mow.cluster_tasks(grads, 3)
    sim = mow.task_similarity(grads)
    assert mow.silhouette(sim, labels) > 0.3 > mow.silhouette(sim, rng.permutation(labels))
    same = np.ones((12, 1, 8)) + 1e-3 * rng.normal(size=(12, 1, 8))
    for n in (1, 2, 3, 5, 12):
        sizes = np.bincount(mow.cluster_tasks(same, n))
        assert len(sizes) == n and sizes.max() <= max(math.ceil(18 / n), 2)
    assert mow.adjusted_rand([0, 0, 1, 1], [1, 1, 0, 0]) == 1
    chance = [mow.adjusted_rand(rng.permutation(truth), truth) for _ in range(300)]
    assert abs(np.mean(chance)) < 0.05
    with says("fewer --clusters"):
        mow.cluster_tasks(grads, 13)


def test_sketches_keep_cosines():
    g = torch.Generator().manual_seed(0)
    a = torch.randn(200_000, generator=g)
    b = 0.6 * a + 0.8 * torch.randn(200_000, generator=g)
    assert F.cosine_similarity(mow.sketch(a), mow.sketch(b), dim=0).item() == pytest.approx(0.6, abs=0.05)
    assert torch.equal(mow.sketch(a), mow.sketch(a))


# ------------------------------------------------------------------------------------------------------------- networks
def test_storm_has_exactly_its_published_size():
    wm = mow.WorldModel(1, 18, 1, 1, 1, 0, 32, 32, 32, 512, 8, 2, 0, 512, "bn")
    assert sum(p.numel() for p in wm.parameters()) == 16_513_155
    assert wm.router is wm.join is wm.shared is wm.task_head is None
    args = mow.fill(mow.Args(task="Boxing", storm=True, preset="full", device="cpu"), ["Boxing"])
    assert mow.parameters(args, 1, 18) == 16_513_155 and (args.norm, args.harmony, args.rollouts) == ("bn", "off", 1024)
    p = mow.products(args, 18)
    assert p["encoder"] == pytest.approx(30.9e6, rel=0.01) and p["decoder"] == p["encoder"]
    full = mow.fill(mow.Args(task="atari26", preset="full", device="cpu"), list(envs.ATARI26))
    assert (full.clusters, full.experts, full.topk, full.norm) == (12, 12, 2, "gn")
    assert mow.products(full, 18)["dynamics"] == pytest.approx(16.6e6, rel=0.1)


@pytest.mark.parametrize("K,N_m,N_e,n", [(1, 1, 1, 1), (3, 2, 3, 2), (6, 3, 6, 2)])
def test_mow_shapes(K, N_m, N_e, n):
    agent = mow_agent(K, clusters=N_m, experts=N_e, topk=n)
    batch, wm = mow_batch(agent), agent.wm
    losses, more = mow.world_model_loss(wm, *batch, torch.tensor(2.0), 0.5)
    assert set(losses) == {"rec", "rew", "end", "dyn", "rep"} | ({"task"} if K > 1 else set())
    assert all(x.shape == (K,) and torch.isfinite(x).all() for x in losses.values())
    assert more["z"].shape == (K, 2, 6, 16) and more["J"].shape == (K, n) and more["scores"].shape == (K, N_e)
    assert torch.allclose(wm.embedding().norm(dim=-1), torch.ones(K))
    x, a, rew, done = mow.imagine(wm.eval(), agent.actor, more["z"], batch[1], batch[4], 5, torch.tensor(1.0))
    assert x.shape == (K, 2, 6, 16 + 16 + 8) and a.shape == (K, 2, 5, 18) and rew.shape == done.shape == (K, 2, 5)
    assert ((x[..., :16].unflatten(-1, (4, 4)).sum(-1) == 1).all()) and (a.sum(-1) == 1).all()
    loss, low, high, _ = mow.agent_loss(agent.actor, agent.critic, agent.slow, wm.cluster_of, x, a, rew, done,
                                        agent.low,
                                        agent.high, 0.985, 0.95, 3e-4, False)
    assert loss.ndim == 0 and low.shape == (K,) and (high >= low).all()


def test_a_tasks_loss_leaves_other_clusters_and_unchosen_experts_alone():
    agent = mow_agent(3, clusters=3, experts=3, topk=1)
    wm = agent.wm.eval()
    losses, more = mow.world_model_loss(wm, *mow_batch(agent), torch.tensor(1.0), 0.0)
    chosen = more["J"].flatten().tolist()
    for k in range(3):
        wm.zero_grad()
        mow.total_loss(losses)[k].backward(retain_graph=True)
        for c in range(3):
            touched = any(p.grad is not None and p.grad.abs().sum() > 0 for p in wm.vaes[c].parameters())
            heads = [p.grad[c].abs().sum() > 0 for h in (wm.prior_head, wm.reward_head,
                                                         wm.end_head) for p in h.parameters()]
            assert touched == (c == k) and any(heads) == (c == k)
        for j in range(3):
            used = [p.grad[j].abs().sum() > 0 for p in (*wm.mix.parameters(), *wm.experts.parameters())]
            assert all(used) == any(used) == (j == chosen[k])
        assert wm.shared.blocks[0].qkv.weight.grad.abs().sum() > 0


def test_gate_trains_the_router_without_changing_values():
    agent = mow_agent(3, experts=3, topk=2)
    wm, batch, grads = agent.wm.eval(), mow_batch(agent), {}
    for gate in ("st", "none"):
        torch.manual_seed(0)
        losses, _ = mow.world_model_loss(wm, *batch, torch.tensor(1.0), 0.0, gate)
        wm.zero_grad()
        mow.total_loss(losses).sum().backward()
        g = wm.router[0].weight.grad
        grads[gate] = (0.0 if g is None else g.abs().sum().item(), mow.total_loss(losses).detach())
    assert grads["st"][0] > 0 == grads["none"][0] and torch.allclose(grads["st"][1], grads["none"][1], rtol=1e-5)


def test_gathered_products_equal_a_loop_over_tasks():
    agent = mow_agent(6, clusters=3, experts=6, topk=2)
    wm, batch = agent.wm.eval(), mow_batch(agent)
    e, pos = wm.embedding(), torch.arange(6)
    _, J, w = wm.routing(e)
    z = mow.sample_latent(wm.posterior(mow.to_images(batch[0]), e))
    mask = mow.episode_mask(batch[4], pos)
    h = wm.sequence(z, batch[1], e, J, w, mask, pos)
    rew = wm.head(wm.reward_head, h, e)
    for k in range(6):
        one = [x[k:k + 1] for x in (z, batch[1], e, J, w, mask)]
        alone = wm.sequence(*one, pos)
        assert torch.allclose(alone[0], h[k], atol=1e-5)
        assert torch.allclose(wm.head(wm.reward_head, alone, e[k:k + 1], [k])[0], rew[k], atol=1e-5)
        assert torch.allclose(wm.decode(z[k:k + 1], e[k:k + 1], [k])[0], wm.decode(z, e)[k], atol=1e-5)


@pytest.mark.parametrize("routing", (dict(topk=2), dict(routing="token"), dict(routing="token", segment=3)))
def test_cached_steps_equal_the_full_pass_and_it_is_causal(routing):
    agent = mow_agent(3, experts=3, expert_layers=2, shared_layers=2, **routing)
    wm, (_, act, _, _, first) = agent.wm.eval(), mow_batch(agent, L=8)
    first[0, 0, 3] = first[2, 1, 1] = True
    e, pos, z = wm.embedding(), torch.arange(8), torch.randn(3, 2, 8, 16)
    _, J, w = wm.routing(e)
    mask = mow.episode_mask(first, pos)
    full = wm.sequence(z, act, e, J, w, mask, pos)
    cache = wm.new_cache(3, 2, 8, z)
    with torch.no_grad():
        parts = [wm.sequence(z[:, :, :3], act[:, :, :3], e, J, w, mask[:, :, :3], pos[:3], cache)]
        parts += [wm.sequence(z[:, :, t:t + 1], act[:, :, t:t + 1], e, J, w, mask[:, :, t:t + 1], pos[t:t + 1], cache)
                  for t in range(3, 8)]
    assert torch.allclose(torch.cat(parts, 2), full, atol=1e-4)
    later = z.clone()
    later[:, :, 5:] += 1
    assert torch.allclose(wm.sequence(later, act, e, J, w, mask, pos)[:, :, :5], full[:, :, :5], atol=1e-6)
    before = z.clone()
    before[0, 0, :3] += 1  # another episode
    other = wm.sequence(before, act, e, J, w, mask, pos)
    assert torch.allclose(other[0, 0, 3:], full[0, 0, 3:], atol=1e-6)
    assert not torch.allclose(other[0, 0, :3], full[0, 0, :3])
    free = mow.episode_mask(first, pos, False)
    assert not torch.allclose(wm.sequence(before, act, e, J, w, free, pos)[0, 0, 3:],
                              wm.sequence(z, act, e, J, w, free, pos)[0, 0, 3:])


def test_experts_per_token():
    agent = mow_agent(2, experts=3, routing="token", segment=8)
    wm, (obs, act, _, _, first) = agent.wm.eval(), mow_batch(agent, B=1, L=8)
    e, pos = wm.embedding(), torch.arange(8)
    _, J, w = wm.routing(e)
    assert J.tolist() == [[0, 1, 2]] * 2 and w.eq(1).all()
    z, mask = mow.sample_latent(wm.posterior(mow.to_images(obs), e)).detach(), mow.episode_mask(first, pos)
    h = wm.sequence(z, act, e, J, w, mask, pos)
    h.square().sum().backward()
    assert wm.token_router.weight.grad.abs().sum(1).min() > 0
    chosen = wm.token_scores(z, act, e)[:, 0, 0].argmax(-1, keepdim=True)                  # of the first token
    moved = {j for j in range(3) if wm.experts.blocks[0].up.weight.grad[j].any()}
    assert moved == set(chosen.flatten().tolist())
    wm.segment = 0
    assert torch.allclose(h, wm.sequence(z, act, e, chosen, torch.ones(2, 1), mask, pos), atol=1e-5)

    for segment in (1, 4, 8):
        agent = mow_agent(2, experts=3, routing="token", segment=segment)
        torch.manual_seed(0)
        nn.init.normal_(agent.wm.token_router.weight, std=3)
        more = mow.world_model_loss(agent.wm, *mow_batch(agent, L=8), torch.tensor(1.0), 0.0)[1]
        assert (more["switch"] > 0).all() == (segment < 8) and more["prior"].min() > 0
        assert more["switch_rate"].max() <= {1: 1, 4: 1 / 7, 8: 0}[segment]
    with torch.no_grad():
        agent.wm.token_router.weight.zero_()
        agent.wm.token_router.bias.zero_()
    more = mow.world_model_loss(agent.wm, *mow_batch(agent, L=8), torch.tensor(1.0), 0.0)[1]
    assert more["prior"].abs().max() < 1e-6 and torch.allclose(more["scores"], wm_scores(agent), atol=1e-6)


def wm_scores(agent):
    return agent.wm.routing(agent.wm.embedding())[0]


def test_penalties_on_switching_and_on_leaving_the_prior():
    grads = {}
    for name, more in (("free", {}), ("switch", dict(switch_coef=2.0)), ("prior", dict(prior_coef=2.0))):
        agent = mow_agent(2, experts=3, routing="token", tau=1.0, **more)
        torch.manual_seed(0)
        nn.init.normal_(agent.wm.token_router.weight)
        batch, weight = mow_batch(agent, B=1, L=4), agent.wm.token_router.weight
        torch.manual_seed(0)
        agent.update_world(batch)
        grads[name] = weight.grad - grads.get("free", 0)
        if more:
            agent = mow_agent(2, experts=3, routing="token")
            torch.manual_seed(0)
            nn.init.normal_(agent.wm.token_router.weight)
            torch.manual_seed(0)
            penalty = mow.world_model_loss(agent.wm, *batch, torch.tensor(1.0), 0.0)[1][name].sum()
            want, = torch.autograd.grad(2 * penalty, agent.wm.token_router.weight)
            assert want.any() and torch.allclose(grads[name], want, atol=1e-5)


def test_noise_of_the_actor_gradient(tmp_path, monkeypatch):
    agent = mow_agent(2, clusters=1, rollouts=16)
    frames = mow_frames(agent, tmp_path / "f")
    agent.update(frames)
    assert all(0 < x < 1e6 for x in mow.gradient_noise(agent, frames, 0))
    real = mow.imagine
    monkeypatch.setattr(mow, "imagine", lambda *a, **k: [x[:, :1].expand(-1, 16, *x.shape[2:]) for x in real(*a, **k)])
    assert max(mow.gradient_noise(agent, frames, 0)) < 1e-8  # all roll-outs alike
    assert mow.rank_correlation([[1, 2], [3, 9]], [[5, 6], [7, 8]]) == pytest.approx(1)
    assert mow.rank_correlation([[1, 2]], [[5, 5]]) is None


def test_free_bits_are_per_task_and_kl_stops_at_episodes():
    agent = mow_agent(2, clusters=1)
    batch = mow_batch(agent, L=5)
    batch[4][1, :, 2] = True
    seen = []
    real = mow.kl
    try:
        mow.kl = lambda p, q: seen.append(torch.full(p.shape[:3], 3.0)) or torch.tensor(
            [0.2, 3.0])[:, None, None].expand(p.shape[:3]).clone().index_fill_(2, torch.tensor([1]), 9.0)
        losses, more = mow.world_model_loss(agent.wm, *batch, torch.tensor(1.0), 0.0)
    finally:
        mow.kl = real
    # pairs (t, t+1): index 1 leads into step 2, which opens an episode of task 1
    assert more["dyn_raw"].tolist() == pytest.approx([(0.2 * 3 + 9) / 4, 3.0]) and losses["dyn"][0] > 1
    assert seen[0].shape == (2, 2, 4)


def test_actor_masks_games_and_mixes_kinds_of_actions():
    legal = torch.zeros(3, 18, dtype=torch.bool)
    legal[0, [0, 3]] = True
    legal[1] = True
    actor = mow.Actor(5, 16, legal, torch.tensor([False, False, True]), 4)
    x = torch.randn(3, 200, 5, generator=torch.Generator().manual_seed(0))
    a = actor.sample(x)
    assert a.shape == (3, 200, 22) and (a[:2, :, :18].sum(-1) == 1).all() and (a[:2, :, 18:] == 0).all()
    assert set(a[0].argmax(-1).tolist()) == {0, 3} and (a[2, :, :18] == 0).all() and a[2, :, 18:].std() > 0.05
    logp, ent = actor.evaluate(x, a)
    p, mean, std = actor(x)
    want = torch.distributions.Independent(torch.distributions.Normal(mean[2], std[2]), 1)
    assert torch.allclose(logp[2], want.log_prob(a[2, :, 18:]), atol=1e-5) and torch.allclose(ent[2], want.entropy(),
                                                                                              atol=1e-5)
    assert torch.allclose(logp[:2], (p * a[..., :18]).sum(-1)[:2]) and (ent[0] <= math.log(2) + 1e-6).all()
    assert (std >= 0.1).all() and (std <= 1).all()
    for n_disc, n_cont in ((18, 0), (0, 4)):
        one = mow.Actor(5, 16, torch.ones(2, n_disc, dtype=torch.bool), torch.tensor([n_disc == 0] * 2), n_cont)
        a = one.sample(x[:2])
        assert a.shape == (2, 200, n_disc + n_cont) and all(y.shape == (2, 200) for y in one.evaluate(x[:2], a))


def test_agent_loss_raises_good_actions_and_scales_tasks_apart():
    agent = mow_agent(2, clusters=2)
    x = torch.randn(2, 64, 4, 16 + 16 + 8, generator=torch.Generator().manual_seed(0))
    act = F.one_hot(torch.randint(0, 18, (2, 64, 3), generator=torch.Generator().manual_seed(1)), 18).float()
    rew = act[..., :5].sum(-1) * torch.tensor([1.0, 1000.0])[:, None, None]  # in task 1 a thousand times as much
    done = torch.zeros_like(rew)
    args = (agent.wm.cluster_of, x, act, rew, done)
    low, high = agent.low, agent.high
    before = agent.actor(x[:, :, 0])[0][..., :5].exp().sum(-1).mean(1)
    for _ in range(30):
        loss, low, high, _ = mow.agent_loss(agent.actor, agent.critic, agent.slow, *args, low, high, 0.9, 0.95, 3e-4,
                                            False)
        agent.agent_opt.zero_grad()
        loss.backward()
        agent.agent_opt.step()
    after = agent.actor(x[:, :, 0])[0][..., :5].exp().sum(-1).mean(1)
    assert (after > before).all() and high[1] > 300 * high[0]
    assert all(p.grad is None for p in agent.slow.parameters())


def test_playing_uses_the_posterior_and_the_episode_so_far(monkeypatch):
    agent = mow_agent(2, clusters=1)
    wm, seen = agent.wm.eval(), []
    monkeypatch.setattr(agent.actor, "sample", lambda x: seen.append(x) or F.one_hot(
        torch.full(x.shape[:2], len(seen) % 18), 18).float())
    memory, zs, acts = agent.memory(1), [], []
    obs = np.random.default_rng(0).integers(0, 256, (20, 2, 1, 64, 64, 3), np.uint8)
    for t in range(20):
        if t == 2:
            memory[2][1] = 0  # task 1 starts anew
        a, memory = agent.play(obs[t], memory, [t])
        zs.append(seen[-1][..., :16])
        acts.append(torch.from_numpy(a))
        if t:
            begin = max(t - agent.window, 0)
            for k, start in ((0, begin), (1, max(begin, 2 * (t > 1)))):
                h = seen[-1][k, 0, 16:32]
                if start == t:
                    assert (h == 0).all()
                    continue
                z, past = (torch.stack(x[start:t], 2)[k:k + 1] for x in (zs, acts))
                e, pos = wm.embedding([k]), torch.arange(t - start)
                _, J, w = wm.routing(wm.embedding())
                mask = (pos[:, None] >= pos).expand(1, 1, -1, -1)
                want = wm.sequence(z, past, e, J[k:k + 1], torch.ones_like(w[:1]), mask, pos)[0, 0, -1]
                assert torch.allclose(h, want, atol=1e-5), (t, k)
    assert memory[2].flatten().tolist() == [agent.window] * 2


@pytest.mark.parametrize("preset,window", [("smoke", 8), ("mid", 15), ("full", 16)])
def test_the_agent_acts_on_positions_that_its_imagination_visits(preset, window):
    args = mow.fill(mow.Args(task="Boxing", storm=True, preset=preset, device="cpu", stem=4, width=16), ["Boxing"])
    agent = mow.make_agent(args, ["Boxing"], [list(range(18))], torch.device("cpu"))
    assert agent.memory(2)[0].shape[2] == window and args.context <= window < args.context + args.horizon
    assert args.context + args.horizon <= args.length
    with pytest.raises(SystemExit, match="--length 12 or more"):
        mow_args(context=4, horizon=8, length=11)


def test_clusters_are_cloned_with_their_adam_moments(tmp_path):
    agent = mow_agent(3, clusters=3, task_coef=1.0)
    agent.wm.assign([0, 0, 0])
    frames = mow_frames(agent, tmp_path / "f")
    for _ in range(3):
        agent.update(frames, learn_to_act=False)
    grads = mow.task_gradients(agent, frames, batches=2)
    assert grads.shape[0] == 3 and grads.shape[2] == mow.SKETCH and np.abs(grads).sum((1, 2)).min() > 0
    again = mow.task_gradients(agent, frames, batches=2)
    assert np.array_equal(grads, again)
    agent.args.grad_reduce = "mean"
    assert mow.task_gradients(agent, frames, batches=1).shape[:2] == (3, 1)
    agent.spread([2, 0, 1])
    assert agent.wm.labels == (2, 0, 1) == tuple(agent.wm.cluster_of.tolist())
    for a, b in zip(agent.wm.vaes[0].parameters(), agent.wm.vaes[2].parameters()):
        assert torch.equal(a, b)
        s, t = agent.opt.state[a], agent.opt.state[b]
        assert torch.equal(s["exp_avg_sq"],
                           t["exp_avg_sq"]) and s["step"] == t["step"] and s["exp_avg"] is not t["exp_avg"]
    w = agent.wm.reward_head.out.weight
    assert torch.equal(w[0], w[2]) and torch.equal(*(agent.opt.state[w]["exp_avg"][i] for i in (0, 1)))
    old = w.detach().clone()
    agent.update(frames)
    assert (w.detach() - old).abs().max() < 5 * agent.args.lr


MOW_RANK = """
import os, sys
sys.path.insert(0, sys.argv.pop())
import mow, torch, torch.nn.functional as F, tyro
made, agents = mow.make_agent, []
def make_agent(*args):                                    # no dropout and the likeliest latents: shares draw no noise
    agents.append(made(*args))
    for m in agents[0].wm.modules():
        m.dropout = 0.0
    return agents[0]
mow.make_agent = make_agent
mow.sample_onehot = lambda logp: F.one_hot(logp.argmax(-1), logp.shape[-1]).to(logp.dtype)
mow.main(tyro.cli(mow.Args))
torch.save(agents[0].state(), f"rank{os.environ.get('RANK', '')}.pt")
"""


def test_two_processes_train_the_model_of_one(tmp_path):
    (tmp_path / "rank.py").write_text(MOW_RANK)
    words = MOW_TINY | dict(task="Boxing,Krull", warmup=10, steps=16, tau=1.0)
    words = [f"--{k.replace('_', '-')}={v}" for k, v in words.items() if k not in ("compile", "bf16")]
    env, logs = os.environ | {"OMP_NUM_THREADS": "1"}, []
    torchrun = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    for name, launcher in (("one", []), ("two", torchrun)):
        (tmp_path / name).mkdir()
        p = subprocess.run([sys.executable, *launcher, "../rank.py", *words, HERE], cwd=tmp_path / name, env=env,
                           capture_output=True, text=True)
        assert p.returncode == 0, p.stderr[-3000:]
        folder, = (tmp_path / name / "runs").iterdir()
        lines = [json.loads(x) for x in (folder / "metrics.jsonl").read_text().splitlines()]
        logs.append([[x[f"losses/{k}"] for k in ("rec", "rew", "end", "dyn", "dyn_raw", "rep", "task", "grad_norm")]
                     for x in lines if x["step"] <= 10])      # the warm-up; roll-outs then begin in other windows
        assert json.loads((folder / "results.json").read_text())["rows"][0]["episodes"] == 1
    assert len(logs[0]) == 2 and np.allclose(*logs, rtol=1e-4), logs
    a, b = (everything(torch.load(tmp_path / f"two/rank{i}.pt", weights_only=True)) for i in (0, 1))
    assert a.keys() == b.keys() and all(torch.equal(a[k], b[k]) for k in a)
    assert "2 processes" in p.stdout and p.stdout.count("playing 1 episodes") == 1
    with says("start them with python"):
        with pytest.MonkeyPatch.context() as patch:
            patch.setenv("WORLD_SIZE", "2")
            mow.main(mow.Args(task="Pong", experiment="cost", **MOW_TINY))
    with says("multiples of 3"):
        with pytest.MonkeyPatch.context() as patch:
            patch.setenv("WORLD_SIZE", "3")
            mow.main(mow.Args(task="Pong", **MOW_TINY))


def test_ssim_equals_sums_over_every_window():
    rng = np.random.default_rng(0)
    x = rng.uniform(size=(2, 14, 13)).astype(np.float32)
    y = np.clip(0.8 * x + 0.2 * rng.uniform(size=x.shape), 0, 1).astype(np.float32)
    g = np.exp(-np.arange(-5, 6) ** 2 / 4.5)
    g = np.outer(g, g) / g.sum() ** 2
    want = []
    for a, b in zip(x, y):
        values = []
        for i in range(4):
            for j in range(3):
                p, q = a[i:i + 11, j:j + 11], b[i:i + 11, j:j + 11]
                mp, mq = (g * p).sum(), (g * q).sum()
                vp, vq, c = (g * (p - mp) ** 2).sum(), (g * (q - mq) ** 2).sum(), (g * (p - mp) * (q - mq)).sum()
                values.append((2 * mp * mq + 1e-4) * (2 * c + 9e-4) / ((mp**2 + mq**2 + 1e-4) * (vp + vq + 9e-4)))
        want.append(np.mean(values))
    x, y = torch.from_numpy(x), torch.from_numpy(y)
    assert np.allclose(mow.ssim(x, y), want, atol=1e-4) and mow.ssim(x, x).allclose(torch.ones(2))
    assert mow.ssim(x[None], y[None]).shape == (1, 2) and mow.ssim(x, 1 - x).max() < 0


def test_atari_modes_and_difficulties():
    def play(task):
        env = envs.make_env(task, obs="pixels", sticky=0.0)
        return np.stack([env.reset(seed=3)[0], *(env.step(t % 4)[0] for t in range(20))])

    frames = play("Breakout")
    assert np.array_equal(frames, play("Breakout@m0d0"))
    assert not np.array_equal(frames, play("Breakout@m16d0")) and not np.array_equal(frames, play("Breakout@m0d1"))
    assert envs.score("Boxing@m0d1", 12.1, 0.0) == 1.0
    for task in ("Boxing@m1d0", "Boxing@m0d4", "Boxing@hard", "Boxing@m0"):
        with says(task, "Boxing@m<mode>d<difficulty>", "a mode of 0", "difficulty of 0, 1, 2, 3"):
            envs.make_env(task, obs="pixels")


# ----------------------------------------------------------------------------------------------------------- whole runs
@pytest.fixture(scope="module")
def mow_run(tmp_path_factory):
    """One tiny run on three games, from start to end."""
    old = os.getcwd()
    os.chdir(tmp_path_factory.mktemp("mow"))
    try:
        result = mow.main(mow.Args(task=GAMES, capture_video=True, **MOW_TINY))
        yield result, next(Path("runs").resolve().iterdir())
    finally:
        os.chdir(old)


def test_a_tiny_run_makes_its_table_and_files(mow_run):
    result, folder = mow_run
    assert [r["task"] for r in result["rows"]] == GAMES.split(",") and result["rows"][0]["storm"] == 79.7
    for name in ("results.json", "results.csv", "frames.png", "routing.png", "curve.png", "checkpoint.pt", "Krull.mp4",
                 "metrics.jsonl", "envs.py", "data.py"):
        assert (folder / name).stat().st_size > 0
    saved = json.loads((folder / "results.json").read_text())
    assert saved["rows"] == result["rows"] and saved["args"]["sticky"] == 0.25
    assert all(r["blind"] == np.mean([x for x, _ in b]) for r, b in zip(saved["rows"], saved["played_blind"]))
    assert len(saved["clusters"]["labels"]) == 3 and -1 <= saved["clusters"]["silhouette"] <= 1
    assert len(saved["fidelity"]["open_loop_psnr"]) == 3 and np.isfinite(saved["fidelity"]["dyn_kl"]).all()
    state = torch.load(folder / "checkpoint.pt", weights_only=True)
    assert state["updates"] == 36 and state["sweep"] == 44 and state["player"]["count"] == 44


def test_the_blind_control_acts_as_often_and_never_looks(monkeypatch):
    args = mow_args(task="Boxing", frame_cap=40)
    options = mow.task_options(args, ["Boxing"])
    agent = mow.make_agent(args, ["Boxing"], [list(range(18))], torch.device("cpu"))
    played, taken = mow.evaluate(agent, ["Boxing"], options, 2, seed=1)
    assert taken.shape == (1, 20, 18) and (taken.sum(-1) == 1).all() and len(played[0]) == 2  # 2 environments, 10 steps
    monkeypatch.setattr(agent, "play", None)
    pool = np.eye(18, dtype=np.float32)[None, [2, 2, 5]]
    blind, drawn = mow.evaluate(agent, ["Boxing"], options, 2, seed=1, pool=pool)
    assert set(drawn.argmax(-1).ravel()) == {2, 5} and len(blind[0]) == 2


def test_killed_at_any_moment_it_ends_at_the_same_numbers(mow_run, tmp_path, monkeypatch):
    whole, folder = mow_run
    want = everything(torch.load(folder / "checkpoint.pt", weights_only=True))
    monkeypatch.chdir(tmp_path)
    real_update, calls = mow.Agent.update, []
    real_send = mow.Player.send

    class Killed(BaseException):
        pass

    def update(self, *a, **k):
        calls.append(self.updates)
        if len(calls) in (3, 15):  # in the warm-up, in play
            raise Killed
        return real_update(self, *a, **k)

    def send(self, sweep, random):
        if sweep == 5 and not calls and len(sends) < 6:
            sends.extend([0] * 9)
            raise Killed
        sends.append(sweep)
        return real_send(self, sweep, random)

    sends, args = [], mow.Args(task=GAMES, save_every=0.0, capture_video=True, **MOW_TINY)
    monkeypatch.setattr(mow.Agent, "update", update)
    monkeypatch.setattr(mow.Player, "send", send)
    result, kills = None, 0
    while result is None:
        try:
            runs = list(Path("runs").glob("*"))
            result = mow.main(dataclasses.replace(args, resume=str(runs[0])) if runs else args)
        except Killed:
            kills += 1
    assert kills == 3
    got = everything(torch.load(next(Path("runs").iterdir()) / "checkpoint.pt", weights_only=True))
    assert want.keys() == got.keys() and all(torch.equal(want[k], got[k]) for k in want if want[k].dtype != torch.bool)
    assert result["rows"] == whole["rows"] and result["finished"] == whole["finished"]
    assert result["clusters"] == whole["clusters"] and result["routing"] == whole["routing"]


def test_ctrl_c_saves_and_says_how_to_go_on(tmp_path):
    env = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": HERE}
    words = [f"--{k.replace('_', '-')}={v}" for k, v in (MOW_TINY | dict(steps=5000)).items() if k not in ("compile",
                                                                                                           "bf16")]
    p = subprocess.Popen([sys.executable, f"{HERE}/mow.py", "--task", "Boxing", *words], cwd=tmp_path, env=env,
                         stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    for line in p.stdout:
        if "steps," in line and "updates:" in line:
            break
    p.send_signal(signal.SIGINT)
    _, err = p.communicate(timeout=60)
    assert "stopped; go on with: python mow.py --resume runs/Boxing__mow__1__" in err, err[-500:]
    assert list(tmp_path.glob("runs/*/checkpoint.pt"))


def test_forty_sweeps_on_a_cpu_learn_to_see(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    small = dict(MOW_TINY, stem=8, lr=2e-3, width=32, hidden=32, batch=2, steps=80, random_steps=40, warmup=40,
                 clusters=2,
                 frame_cap=400)
    agents, real, gradients = [], mow.make_agent, mow.task_gradients
    monkeypatch.setattr(mow, "task_gradients", lambda agent, frames: gradients(agent, frames, 2))
    monkeypatch.setattr(mow, "make_agent", lambda *a: agents.append((x := real(*a), copy.deepcopy(everything(x)))) or x)
    result = mow.main(mow.Args(task=GAMES, **small))
    history, (agent, before) = result["history"], agents[0]
    assert np.isfinite([row["rec"] for row in history]).all()
    assert all(last < 0.35 * first for first, last in zip(history[0]["rec"], history[-1]["rec"]))
    after = everything(agent)
    still = [k for k in before if k.startswith(("/wm", "/actor", "/critic", "/slow")) and torch.equal(before[k],
                                                                                                      after[k])
             and before[k].is_floating_point()]
    assert not [k for k in still if "position" not in k], still


def test_storm_runs_alone(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    result = mow.main(mow.Args(task="Pong", storm=True, fresh_contexts=True, act_on_prior=True, lambda_compat=True,
                               **{k: v for k, v in MOW_TINY.items() if k not in ("emb", "warmup")}))
    assert result["args"]["emb"] == 0 and result["args"]["norm"] == "bn" and result["rows"][0]["episodes"] == 1


def test_a_run_with_experts_per_token(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    result = mow.main(mow.Args(task="Pong", routing="token", segment=4, switch_coef=0.1, prior_coef=0.1, **MOW_TINY))
    assert result["args"]["topk"] == 1 and 8 / 2 <= result["fidelity"]["run_length"][0] <= 8


def test_checkpoint_of_another_run_plays_and_goes_on(mow_run, tmp_path, monkeypatch):
    whole, folder = mow_run
    monkeypatch.chdir(tmp_path)
    result = mow.main(mow.Args(task=GAMES, eval_only=True, checkpoint=str(folder / "checkpoint.pt"), **MOW_TINY))
    assert result["rows"] == whole["rows"] and "history" not in result
    more = mow.main(mow.Args(task=GAMES, checkpoint=str(folder / "checkpoint.pt"), **MOW_TINY | dict(steps=20)))
    assert more["clusters"] == {"labels": whole["clusters"]["labels"]} and more["history"][0]["updates"] == 37
    with says("does not fit", "tasks and sizes"):
        mow.main(mow.Args(task="Pong", checkpoint=str(folder / "checkpoint.pt"), eval_only=True, **MOW_TINY))
    with says("cannot be read"):
        mow.main(mow.Args(task="Pong", checkpoint="nowhere.pt", eval_only=True, **MOW_TINY))


def test_bfloat16_stays_close_to_float32(tmp_path):
    results, frames = [], None
    for bf16 in (False, True):
        agent = mow_agent(2, clusters=2, experts=3, topk=2, bf16=bf16)
        frames = frames or mow_frames(agent, tmp_path / "f")
        metrics = agent.update(frames)
        assert all(p.dtype == torch.float32 for p in agent.wm.parameters()) and agent.low.dtype == torch.float32
        results.append(torch.stack([metrics[k].mean() for k in ("rec", "rew", "dyn_raw", "critic")]))
    assert torch.allclose(*results, rtol=0.05)


def test_mow_compiled_functions_were_compiled_and_agree_with_eager(tmp_path, monkeypatch):
    real = torch.compile
    monkeypatch.setattr(torch, "compile", lambda f, **kw: real(f, backend="eager", fullgraph=True, **kw))
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    results = []
    for enabled in (False, True):
        agent = mow_agent(2, clusters=2, experts=3, compile=enabled)
        agent.wm.assign([0, 0])
        frames = mow_frames(agent, tmp_path / "f")
        frames.count = 40
        for i in range(4):
            if i == 2:
                agent.spread([0, 1])
            agent.update(frames)
        a, _ = agent.play(frames.obs[:, :1].copy(), agent.memory(1), [0])
        results.append(everything(agent) | {"act": torch.from_numpy(a)})
    counters = torch._dynamo.utils.counters
    assert not counters["graph_break"]
    # world model twice (before and after clustering), imagined step, agent, acting: nothing is compiled at every update
    assert 4 <= counters["stats"]["unique_graphs"] <= 8, counters["stats"]
    assert all(torch.allclose(results[0][k].float(), results[1][k].float(), atol=2e-3,
                              equal_nan=True) for k in results[0])


def test_mow_studies_make_their_tables_and_resume(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    small = MOW_TINY | dict(steps=46, random_steps=45, warmup=2)
    fidelity, gradients = mow.fidelity, mow.task_gradients
    monkeypatch.setattr(mow, "fidelity", lambda agent, frames, since=0, batches=8: fidelity(agent, frames, since, 1))
    monkeypatch.setattr(mow, "task_gradients", lambda agent, frames: gradients(agent, frames, 2))
    r = mow.main(mow.Args(task=GAMES, cluster_only=True, seeds=2, **small))
    assert [row["clusters"] for row in r["rows"]] == [2] and -1 <= r["rows"][0]["ari_seeds"] <= 1
    r = mow.main(mow.Args(task="Pong", experiment="fidelity", seeds=1, **small | dict(rollouts=8)))
    assert [row["variant"] for row in r["rows"]] == ["stem2", "stem4", "stem8", "latents2", "latents8", "all together"]
    assert -1 <= r["rows"][-1]["rho_ssim"] <= 1 and len(r["cells"]["stem2_s1"]["points"]) == 5
    for name, task, variants in (("tokens", "Pong", 6), ("clusters", "Pong,Qbert", 2), ("monolith", GAMES, 4)):
        r = mow.main(mow.Args(task=task, experiment=name, seeds=1, **small))
        assert len(r["rows"]) == variants and all(np.isfinite(row["open_loop_psnr"]) for row in r["rows"])
        if name == "tokens":
            runs = {row["variant"]: row["run_length"] for row in r["rows"]}
            assert runs["task"] == runs["segment8"] == 8 and 1 <= runs["token"] <= 8
        if name == "monolith":
            size = {row["variant"]: row["parameters"] for row in r["rows"]}
            work = {row["variant"]: row["products"] for row in r["rows"]}
            assert size["monolith_params"] == pytest.approx(size["mow"], rel=0.1)
            assert work["monolith_flops"] == pytest.approx(work["mow"], rel=0.05)
    monkeypatch.setattr(mow, "random_frames", None)  # all cells are there: nothing is done again
    folder = max(Path("runs").iterdir(), key=lambda p: p.stat().st_mtime)
    assert mow.main(mow.Args(resume=str(folder)))["rows"] == r["rows"]


def test_transfer_freezes_what_it_says(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    agents, make, gradients = [], mow.make_agent, mow.task_gradients
    monkeypatch.setattr(mow, "make_agent", lambda *a: agents.append(make(*a)) or agents[-1])
    monkeypatch.setattr(mow, "task_gradients", lambda agent, frames: gradients(agent, frames, 1))
    fidelity, loss = mow.fidelity, mow.held_out_loss
    monkeypatch.setattr(mow, "fidelity", lambda agent, frames, since: fidelity(agent, frames, since, 1))
    monkeypatch.setattr(mow, "held_out_loss", lambda agent, frames, task, since=0: loss(agent, frames, task, since, 1))
    small = MOW_TINY | dict(steps=48, random_steps=45, warmup=3, lr=1e-2)
    r = mow.main(mow.Args(task="Boxing,Krull,Boxing@m0d1", experiment="transfer", seeds=1, **small))
    _, model, *variants = agents
    was, labels, old = dict(model.wm.named_parameters()), r["cells"]["all_s1"]["cluster"], model.wm.labels[:2]
    assert set(old) == {0, 1} and labels in old and r["cells"]["new_cluster_s1"]["cluster"] == 2
    for (variant, frozen), agent in zip(mow.FROZEN.items(), variants, strict=True):
        assert agent.wm.labels[:2] == old and agent.wm.labels[2] == r["cells"][f"{variant}_s1"]["cluster"]
        moved = {name for name, p in agent.wm.named_parameters() if not torch.equal(p, was[name])}
        assert not [name for name in moved if name.startswith(frozen)], variant
        for part in ("e", "vaes", "experts", "mix", "shared", "reward_head"):  # the rest learns
            if variant != "scratch" and part not in frozen:
                assert any(name.startswith(part) for name in moved) == (part != "shared" or "shared" not in frozen)
        if variant != "scratch":
            assert torch.equal(agent.wm.e[:2], was["e"][:2]) and not torch.equal(agent.wm.e[2], was["e"][2])
    rows = {row["variant"]: row for row in r["rows"]}
    assert rows["scratch"]["auc_ratio"] == 1 and rows["scratch"]["forgetting"] is None
    assert rows["new_cluster"]["forgetting"] == 0 != rows["all"]["forgetting"]
    assert rows["all"]["zero_shot"] == rows["freeze_vae"]["zero_shot"] < rows["scratch"]["zero_shot"]
    assert (next(Path("runs").iterdir()) / "transfer.png").stat().st_size > 0


def test_warm_up_without_rewards_leaves_their_heads_alone(tmp_path):
    agent = mow_agent(2, clusters=1, warmup=2, reward_free=True)
    frames = mow_frames(agent, tmp_path / "f")

    def moved():
        before = {name: p.clone() for name, p in agent.wm.named_parameters()}
        agent.update(frames, learn_to_act=False)
        return {name.split(".")[0] for name, p in agent.wm.named_parameters() if not torch.equal(p, before[name])}

    heads = {"reward_head", "end_head"}
    assert not moved() & heads and "vaes" in moved() and moved() >= heads  # two updates of warm-up, then one after it


def test_pretraining_without_rewards(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    fidelity, loss = mow.fidelity, mow.held_out_loss
    monkeypatch.setattr(mow, "fidelity", lambda agent, frames, since: fidelity(agent, frames, since, 1))
    monkeypatch.setattr(mow, "held_out_loss", lambda *a, only=None: loss(*a, 1, only))
    small = MOW_TINY | dict(steps=60, random_steps=45, warmup=5, lr=1e-2)
    r = mow.main(mow.Args(task="Boxing,Krull", experiment="pretrain", seeds=1, **small))
    cells, rows = (r["cells"][f"{v}_s1"] for v in ("scratch", "rewards", "reward_free")), r["rows"]
    scratch, rewards, free = cells
    assert scratch["updates"][-1] == 10 and [row["variant"] for row in rows] == ["scratch", "rewards", "reward_free"]
    assert free["loss"][0] < 0.5 * scratch["loss"][0]  # it knows the images ..
    assert rewards["scores_first"] < 0.5 * free["scores_first"]  # .. and not the rewards,
    assert free["scores_last"] < 0.5 * free["scores_first"]  # which it learns
    assert rows[0]["auc_ratio"] == 1 and rows[2]["auc_ratio"] < 1
    assert (next(Path("runs").iterdir()) / "pretrain.png").stat().st_size > 0


def test_perceptual_distance():
    x = torch.rand(2, 3, 3, 64, 64, generator=gen(0))
    blurred = F.avg_pool2d(x.flatten(0, 1), 5, 1, 2).view_as(x)
    assert mow.perceptual(x, x).abs().max() == 0 and mow.perceptual(x, blurred).shape == (2, 3)
    near = mow.perceptual(x, x + 0.01 * torch.randn(x.shape, generator=gen(1)))
    assert (0 < near).all() and (near < 0.1 * mow.perceptual(x, blurred)).all()
    one = mow.perceptual(x[1, 2], blurred[1, 2])  # an image alone, without leading axes
    assert torch.allclose(one, mow.perceptual(x, blurred)[1, 2], atol=1e-5)


def test_mow_cost_measures_tasks_experts_and_loops(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(mow, "milliseconds", lambda f, device, repeats=5: (f(), 1.0)[1])
    r = mow.main(mow.Args(task=GAMES, experiment="cost", **MOW_TINY))
    assert [row["cell"] for row in r["rows"]] == [f"{k}_{n}" for k in ("tasks", "experts") for n in (1, 3, 6, 12)]
    assert "critics_looped_ms" in r["rows"][2] and [p["preset"] for p in r["estimates"]] == ["full", "mid", "smoke"]


def test_metaworld_and_mixed_runs(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    real = mow.task_options
    monkeypatch.setattr(mow, "task_options", lambda a, t: {k: v | ({"length": 20} if k.startswith("mw-") else {})
                                                            for k, v in real(a, t).items()})
    r = mow.main(mow.Args(task="mw-reach,Pong", mix_actions=True, **MOW_TINY | dict(steps=24)))
    assert [row["task"] for row in r["rows"]] == ["mw-reach", "Pong"] and r["rows"][0]["storm"] is None
    assert 0 <= r["rows"][0]["score"] <= 1


# ------------------------------------------------------------------------------------------------------------ bad input
def test_mow_bad_input_is_one_sentence(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for words, more in ((("'Boxin'", "nearest: Boxing"), dict(task="Boxin")), (("twice",), dict(task="Pong,Pong")),
                        (("--mix-actions",), dict(task="Pong,mw-reach")), (("--clusters 3 or less",), dict(task=GAMES,
                                                                                                           clusters=4)),
                        (("--topk 3 or less",), dict(task=GAMES, experts=3, topk=4)), (("--storm",), dict(task=GAMES,
                                                                                                          storm=True)),
                        (("--heads",), dict(task=GAMES, width=15)), (("--random-steps",), dict(task=GAMES,
                                                                                               random_steps=4)),
                        (("last fifth",), dict(task=GAMES, experiment="experts", random_steps=20)),
                        (("add --routing token",), dict(task="Pong", segment=4)),
                        (("not --topk 2",), dict(task="Pong", routing="token", topk=2)),
                        (("--warmup 1000",), dict(task="Pong", warmup=0, reward_free=True)),
                        (("two or more",), dict(task="Pong", experiment="transfer", random_steps=45, steps=45)),
                        (("--batch 0", "positive"), dict(task=GAMES, batch=0)), (("--checkpoint",),
                                                                                 dict(eval_only=True)),
                        (("args.json",), dict(resume="nowhere")), (("no GPU",), dict(device="cuda"))):
        monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
        with says(*words):
            mow.main(mow.Args(**MOW_TINY | more))
    assert not Path("runs").exists()
    monkeypatch.setattr(data.shutil, "disk_usage", lambda p: types.SimpleNamespace(free=10**6))
    with says("replay of 1 x 100,000", "GB free"):
        mow.main(mow.Args(**MOW_TINY | dict(task="Pong", steps=100_000)))


def test_missing_games_and_packages_are_named(monkeypatch):
    from ale_py import roms
    monkeypatch.setattr(roms, "get_rom_path", lambda name: None)
    with says("Boxing", "ROM", "pip install"):
        envs.make_env("Boxing", obs="pixels")
    monkeypatch.setitem(sys.modules, "ale_py", None)
    with says("Boxing", "pip install ale-py"):
        envs.make_env("Boxing", obs="pixels")
    monkeypatch.setitem(sys.modules, "metaworld.env_dict", None)
    with says("mw-reach", "pip install metaworld"):
        envs.make_env("mw-reach", obs="pixels")
    with says("obs='pixels'"):
        envs.make_env("Pong")
    with says("sticky", "no options"):
        envs.make_env("walker-walk", sticky=0.1)


def test_a_loss_that_is_not_finite_stops_with_its_terms(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(mow, "two_hot_loss", lambda logits, x: logits.sum(-1) * math.nan)
    with says("not finite", "losses/rew", "--lr"):
        mow.main(mow.Args(task="Pong", **MOW_TINY | dict(clusters=1)))


def test_mow_copied_with_its_two_helpers_it_runs(tmp_path):
    for name in ("mow.py", "envs.py", "data.py"):
        (tmp_path / name).write_text(Path(HERE, name).read_text())
    env = {k: v for k, v in os.environ.items() if k != "PYTHONPATH"} | {"OMP_NUM_THREADS": "1"}
    words = [f"--{k.replace('_', '-')}={v}" for k, v in MOW_TINY.items() if k not in ("compile", "bf16")]
    p = subprocess.run([sys.executable, "mow.py", "--task", "Pong", "--no-compile", *words], cwd=tmp_path, env=env,
                       capture_output=True, text=True)
    assert p.returncode == 0 and "mean score" in p.stdout, p.stderr[-2000:]
    folder = next((tmp_path / "runs").iterdir())
    assert (folder / "mow.py").read_text() == (tmp_path / "mow.py").read_text()
    parsed = tyro.cli(mow.Args, args=["--task", "atari26", "--experiment", "experts", "--no-reset-mask"])
    assert (parsed.experiment, parsed.reset_mask) == ("experts", False)


# -------------------------------------------------------------------------------------------------------------- savi.py
@pytest.fixture(scope="session")
def cache(tmp_path_factory):
    """A folder of small caches that all tests share; made by the first test that asks."""
    torch.set_num_threads(1)
    return tmp_path_factory.mktemp("video")


@pytest.fixture(autouse=True)
def few_clips(monkeypatch):
    monkeypatch.setattr(savi, "EVAL_CLIPS", 4)


def savi_args(cache, **flags):
    small = dict(data="objects", device="cpu", compile=False, workers=1, clips=30, clip_frames=12, updates=6, batch=4,
                 dim=16, cache=str(cache), capture_video=False)
    return savi.Args(**{**small, **flags})


def small_savi(m=4, K=4, **flags):
    masks = np.eye(K, m, dtype=np.float32)
    torch.manual_seed(0)
    kw = dict(size=32, slots=K, dim=16, channels=8, masks=masks, init="learned", predictor="mlp", decoder="mlp")
    return savi.SAVi(**{**kw, **flags})


# ------------------------------------------------------------------------------------------------------------- metrics
def pair_ari(a, b):
    """The adjusted Rand index from all pairs of pixels, one by one."""
    n = len(a)
    pairs = [(a[i] == a[j], b[i] == b[j]) for i in range(n) for j in range(i)]
    both, in_a, in_b = (sum(f(p) for p in pairs) for f in (lambda p: p[0] and p[1], lambda p: p[0], lambda p: p[1]))
    expected, most = in_a * in_b / len(pairs), (in_a + in_b) / 2
    return 1.0 if most == expected else (both - expected) / (most - expected)


def test_savi_fg_ari_against_counting_pairs():
    rng = np.random.default_rng(0)
    for _ in range(20):
        true, pred = rng.integers(0, 4, (2, 5, 4)), rng.integers(0, 5, (2, 5, 4))
        fg = true > 0
        assert np.isclose(savi.fg_ari(true, pred), pair_ari(true[fg], pred[fg]))
        assert np.isclose(savi.ari(true, pred), pair_ari(true.ravel(), pred.ravel()))
        names = rng.permutation(5)
        assert np.isclose(savi.fg_ari(true, names[pred]), savi.fg_ari(true, pred))
    assert savi.fg_ari(true, true) == 1 and savi.fg_ari(true, np.zeros_like(true)) == 0
    one = np.zeros((2, 5, 4), int)
    one[:, :2] = 1
    assert savi.fg_ari(one, np.zeros_like(one)) == 1.0  # a single object cannot be split wrongly by one slot
    assert savi.fg_ari(np.zeros_like(one), one) == 1.0  # nor an empty foreground
    big = np.arange(4_000_000) % 3 + 1  # squares of such counts need more than float32
    assert savi.fg_ari(big, big * 2) == 1.0 and abs(savi.fg_ari(big, np.zeros_like(big))) < 1e-12
    with says("masks of", "one shape"):
        savi.fg_ari(true, pred[:1])


def test_savi_segment_scores_and_usage():
    true = np.zeros((1, 4, 4), int)
    true[0, :2, :2], true[0, 2:, 2:] = 1, 2
    perfect = savi.segment_scores(true, true)
    assert perfect == {"miou": 1.0, "mbo": 1.0}
    s = savi.segment_scores(true, np.zeros_like(true))
    assert np.isclose(s["miou"], (8 / 16) / 3) and np.isclose(s["mbo"], 4 / 16)
    assert savi.designated_iou(true, true, {1: 1, 2: 2}) == 1 and savi.designated_iou(true, true, {1: 2, 2: 1}) == 0
    monopoly = np.zeros((1, 3, 4, 4))
    monopoly[:, 1] = true > 0
    monopoly[:, 0] = true == 0
    u = savi.usage(true, monopoly)
    assert np.allclose((u["top1"], u["eff"], u["conf"], u["whole"], u["top1_hard"]), 1)
    assert savi.fg_ari(true, monopoly.argmax(1)) == 0
    u = savi.usage(true, np.full((1, 3, 4, 4), 1 / 3))
    assert np.allclose((u["top1"], u["eff"], u["conf"]), (1 / 3, 3, 1 / 3))
    movie, swap = np.repeat(true, 4, 0), np.repeat(true, 4, 0)
    swap[3] = np.array([0, 2, 1])[swap[3]]
    assert savi.consistency(movie, movie) == 1 and savi.consistency(movie, swap) == 0.75


def test_savi_baselines_score_as_expected():
    true = np.zeros((2, 12, 12), np.int64)
    true[:, :6, :6], true[:, 6:, 6:] = 1, 2
    video = np.zeros((2, 12, 12, 3), np.uint8)
    video[true == 1], video[true == 2] = (255, 0, 0), (0, 0, 255)
    masks = savi.baseline_masks(true, video, k=2)
    assert savi.fg_ari(true, masks["one slot"]) == 0 and savi.fg_ari(true, masks["k-means rgb"]) == 1
    assert savi.fg_ari(true, masks["k-means xy"]) > 0.9 and savi.fg_ari(true, masks["grid 7x1"]) < 1
    assert len(np.unique(masks["grid 2x3"])) == 6 and abs(savi.fg_ari(true, masks["random"])) < 0.1


# ------------------------------------------------------------------------------------------------------------ networks
def test_slot_attention_competes_and_is_equivariant():
    torch.manual_seed(0)
    f = savi.SlotAttention(12, 16)
    slots, tokens = torch.randn(2, 5, 16), torch.randn(2, 30, 12)
    out, attention = f(slots, tokens, iters=3)
    assert out.shape == (2, 5, 16) and attention.shape == (2, 30, 5)
    assert torch.allclose(attention.sum(-1), torch.ones(2, 30), atol=1e-6)
    order, other = torch.randperm(5), torch.randperm(30)
    assert torch.allclose(f(slots[:, order], tokens[:, other], 3)[0], out[:, order], atol=1e-5)
    same, _ = f(slots[:, :1].expand(2, 5, 16), tokens)
    assert torch.allclose(same, same[:, :1].expand_as(same), atol=1e-6)  # equal slots can never part


@pytest.mark.parametrize("size,decoder", [(32, "mlp"), (32, "conv"), (64, "conv"), (128, "conv")])
def test_savi_shapes(size, decoder):
    model = small_savi(size=size, decoder=decoder, out=2)
    tokens = {32: 256, 64: 4096, 128: 4096}[size]
    video = torch.rand(2, 1, 3, size, size)
    assert model.encoder(video[0]).shape == (1, tokens, 8)
    before, after, kl = model(video, torch.zeros(2, 1, 4))
    assert before.shape == after.shape == (2, 1, 4, 16) and float(kl) == 0
    picture, alpha, each = model.decode(after)
    assert picture.shape == (2, 1, 2, size, size) and each.shape == (2, 1, 4, 2, size, size)
    assert torch.allclose(alpha.sum(2), torch.ones(2, 1, size, size), atol=1e-5)


def test_savi_decodes_slots_in_one_batch_as_in_a_loop():
    for decoder in ("mlp", "conv"):
        model, slots = small_savi(decoder=decoder), torch.randn(2, 3, 4, 16)
        x = torch.stack([torch.stack([model.decoder(s[:, j]) for j in range(4)], 1) for s in slots])
        alpha = x[:, :, :, -1].softmax(2)
        assert torch.allclose(model.decode(slots)[1], alpha, atol=1e-5)
        assert torch.allclose(model.decode(slots)[0], (alpha[:, :, :, None] * x[:, :, :, :-1]).sum(2), atol=1e-5)


def test_savi_actions_reach_their_slot_only():
    model = small_savi(init="action", predictor="action")
    slots, act = torch.randn(3, 4, 16), torch.rand(3, 4)
    other = act.clone()
    other[:, 2] += 1
    moved = (model.predict(slots, act) != model.predict(slots, other)).any(-1)
    assert moved.tolist() == [[False, False, True, False]] * 3  # exactly
    first = (model.initial(act, None, None) != model.initial(other, None, None)).any(-1)
    assert first.tolist() == [[False, False, True, False]] * 3
    model = small_savi(init="action", predictor="action", interact=True)
    assert (model.predict(slots, act) != model.predict(slots, other)).any(-1).all()


def test_savi_initialisers_and_noise():
    torch.manual_seed(0)
    video, act = torch.rand(3, 2, 3, 32, 32), torch.zeros(3, 2, 4)
    noise = torch.randn(4, 2, 4, 16)
    gauss = small_savi(init="gauss")
    assert not torch.equal(gauss(video, act, None, noise)[1], gauss(video, act, None, -noise)[1])
    cue = torch.rand(2, 4, 3)
    assert torch.equal(small_savi(init="com").initial(act[0], cue, None)[0, 1], small_savi(init="com").initial(
        act[0], cue.flip(1), None)[0, 2])
    sto = small_savi(stochastic=True)
    a, b = sto(video, act, None, noise), sto(video, act, None, 0 * noise)
    assert a[2].item() > 0 and not torch.equal(a[1], b[1])
    mean, log_var = sto.spread(a[1]).chunk(2, -1)
    prior = torch.distributions.Normal(mean.detach(), 0.1)
    kl = torch.distributions.kl_divergence(torch.distributions.Normal(mean, (0.5 * log_var).exp()), prior)
    assert torch.allclose(sto.sample(a[1], 0.0)[1], kl.sum(-1).mean(), rtol=1e-4)
    long = sto(torch.rand(24, 2, 3, 32, 32), torch.zeros(24, 2, 4), None, torch.randn(25, 2, 4, 16))
    assert long[1].abs().max() < 20 and long[2] < 20  # the noise does not feed itself
    masks = np.zeros((1, 1, 4, 6), int)
    masks[0, 0, 1:3, 2] = 2
    assert np.allclose(savi.centres(masks, 3)[0, 0], [[0, 0, 0], [0.5, 2.5 / 6, 1], [0, 0, 0]])


def test_savi_loss_terms_and_schedule():
    model = small_savi(init="learned", predictor="action")
    video, act = torch.rand(3, 2, 3, 32, 32), torch.rand(3, 2, 4)
    for weight in (1.0, 0.0):
        loss, terms = savi.savi_loss(model, video, video, act, None, None, weight, 0.0)
        assert (float(terms["pred"]) > 0) == (weight > 0)
        assert torch.allclose(loss, terms["recon"] + weight * terms["pred"])
    assert np.isclose(savi.rate(0, 100, 1.0, 10), 0.1) and savi.rate(10, 100, 1.0, 10) == 1
    assert savi.rate(99, 100, 1.0, 10) < 1e-3


# ---------------------------------------------------------------------------------------------------------- partitions
def test_savi_discovers_groups_and_keeps_every_action():
    rng = np.random.default_rng(0)
    act = rng.normal(size=(3000, 6))
    act[:, 5] = 0.25  # never varies
    mix = rng.normal(size=(5, 9)) * np.repeat(np.eye(3), 3, 1)[[0, 0, 1, 1, 2]]
    change = act[:, :5] @ mix + 0.1 * rng.normal(size=(3000, 9))
    assert savi.discover([(act, change.reshape(-1, 3, 3))], 3) == [[0, 1], [2, 3], [4, 5]]
    assert len(savi.discover([(act, change.reshape(-1, 3, 3))], 2)) == 2
    assert savi.slots_of_parts([[2, 3], [0, 1]], [[0, 1], [2, 3]]) == {1: 1, 2: 0}
    assert savi.slots_of_parts([], [[0], [1]]) == {1: 0, 2: 1}


def test_savi_partition_from_file_and_bad_ones(cache, tmp_path):
    clips = {"actions": np.zeros((2, 3, 6), np.float32), "split": np.zeros(2, int), "state": np.zeros((2, 3, 4))}
    meta = {"groups": [[0, 1], [2, 3], [4, 5]], "recipe": {"kind": "pushed"}}
    file = tmp_path / "partition.json"
    file.write_text(json.dumps([[5, 0], [1, 2], [3, 4]]))
    groups, masks = savi.choose_partition(str(file), clips, meta, 4, 0)
    assert groups == [[0, 5], [1, 2], [3, 4]] and masks.shape == (4, 6)
    assert masks.sum(0).tolist() == [1] * 6 and masks[3].sum() == 0 and masks[0, [0, 5]].all()
    file.write_text(json.dumps({"groups": [[0, 1, 2, 3, 4, 5]]}))
    assert len(savi.choose_partition(str(file), clips, meta, 4, 0)[0]) == 1
    assert savi.choose_partition("global", clips, meta, 4, 0)[1].all()
    assert not savi.choose_partition("none", clips, meta, 4, 0)[1].any()
    random = savi.choose_partition("random", clips, meta, 4, 3)[0]
    assert sorted(map(len, random)) == [2, 2, 2] and random == savi.choose_partition("random", clips, meta, 4, 3)[0]
    file.write_text("[[0, 1], [2, 3], [4]]")
    with says("misses action 5", "[[0, 1], [2]]"):
        savi.choose_partition(str(file), clips, meta, 4, 0)
    file.write_text("[[0, 1], [2, 3], [4, 5, 0]]")
    with says("exactly once"):
        savi.choose_partition(str(file), clips, meta, 4, 0)
    with says("3 groups for 3 slots", "--slots 4"):
        savi.choose_partition("body", clips, meta, 3, 0)
    with says("cannot be read", "discovered"):
        savi.choose_partition(str(tmp_path / "nothing.json"), clips, meta, 4, 0)
    with says("has no actions", "--data pushed"):
        savi.choose_partition("body", {"actions": np.zeros((2, 3, 0))}, meta, 4, 0)


# --------------------------------------------------------------------------------------------------------------- video
def test_savi_pushed_actions_move_their_own_object(cache):
    data.make_video(cache / "p", "pushed", 20, 12, 32)
    x, meta = data.open_video(cache / "p")
    assert x["video"].shape == (20, 12, 32, 32, 3) and x["actions"].shape == (20, 12, 6)
    assert meta["groups"] == [[0, 1], [2, 3], [4, 5]] and meta["part_names"] == ["sphere", "box", "cylinder"]
    speed = np.diff(x["state"], axis=1)[:, 1:].reshape(-1, 3, 3)  # (samples, object, xyz)
    act = x["actions"][:, 2:].reshape(-1, 3, 2)
    c = np.array([[abs(np.corrcoef(act[:, i, 0], speed[:, j, 0])[0, 1]) for j in range(3)] for i in range(3)])
    assert (np.diag(c) > 0.25).all() and c.argmax(1).tolist() == [0, 1, 2]
    assert savi.choose_partition("discovered", x, meta, 4, 0)[0] == [[0, 1], [2, 3], [4, 5]]
    # the branch differs where the object of its group is or would have been, from the frame after the fork on
    now = np.abs(x["video"][:, 6 + data.FORK_STEPS].astype(int) - x["fork_frame"]).max(-1) > 12
    seg = x["seg"][:, 6 + data.FORK_STEPS]
    moved = [s[n & (s > 0)] for s, n in zip(seg, now)]
    own = np.mean([(m == g + 1).mean() for m, g in zip(moved, x["fork_group"]) if len(m)])
    assert own > 0.6 and np.median(now.mean((1, 2))) > 0.01


def test_savi_humanoid_masks_flow_and_actions(cache):
    data.make_video(cache / "h", "humanoid", 10, 12, 64, "parts")
    x, meta = data.open_video(cache / "h")
    assert [len(g) for g in meta["groups"]] == [18, 12, 12, 7, 7] and x["actions"].shape == (10, 12, 56)
    assert sorted(a for g in meta["groups"] for a in g) == list(range(56)) and np.abs(x["actions"]).max() <= 1
    assert meta["action_names"][meta["groups"][1][0]].startswith("l") and x["seg"].max() == 5
    seen = np.stack([(x["seg"] == p).any((2, 3)) for p in range(1, 6)])
    assert seen.mean() > 0.9 and 0.05 < (x["seg"] > 0).mean() < 0.25
    flow, fg = x["flow"].astype(float), x["seg"] > 0
    assert np.abs(flow[~fg]).max() < 1e-4  # neither camera nor floor moves
    family = {meta["task_names"][t]: i for i, t in enumerate(x["task"])}
    size = np.linalg.norm(flow, axis=-1)
    wave, part = family["wave"], x["seg"][family["wave"]]
    assert size[wave][part == 3].mean() > 3 * size[wave][part == 5].mean()  # the right arm waves
    # warping the masks of frame t-1 along the flow explains frame t better than leaving them where they are
    y, xx = np.mgrid[:64, :64]
    a, b = [], []
    for c in range(10):
        for t in range(1, 12):
            far = fg[c, t] & (size[c, t] > 1)
            to_y = np.clip((y + flow[c, t, ..., 1]).round().astype(int), 0, 63)
            to_x = np.clip((xx + flow[c, t, ..., 0]).round().astype(int), 0, 63)
            before = x["seg"][c, t - 1]
            a += (before[to_y, to_x] == x["seg"][c, t])[far].tolist()
            b += (before == x["seg"][c, t])[far].tolist()
    assert len(a) > 300 and np.mean(a) > np.mean(b) + 0.1
    splits = {meta["task_names"][t]: int(s) for t, s in zip(x["task"], x["split"])}
    assert splits["kick"] == splits["jumping-jack"] == 1 and splits["torso"] == 2 and splits["walk"] == 0


def test_savi_crowd_has_bodies_and_parts(cache):
    choose_gl()
    scene = data._scene("crowd", "random", "plain")
    scene.open(32)
    clips = [scene.film(np.random.default_rng([0, c]), c, 2) for c in range(4)]
    scene.renderer.close()
    counts = [len(np.unique(c["inst"])) - 1 for c in clips]
    assert set(counts) == {2, 3} and all(((c["inst"] > 0) == (c["seg"] > 0)).all() for c in clips)
    assert [len(g) for g in scene.groups] == [56] * 3


def test_savi_cache_is_the_same_wherever_it_stopped_and_goes_on(cache, tmp_path):
    """Killed while it renders: what is there opens, the same call finishes, nothing differs."""
    code = (f"import sys; sys.path.insert(0, {HERE!r}); import data\n"
            f"data.make_video({str(tmp_path / 'a')!r}, 'objects', 60, 4, 32)")
    process = subprocess.Popen([sys.executable, "-c", code], stderr=subprocess.DEVNULL)
    began = time.time()
    while not list((tmp_path / "a").glob("part_*.h5")) and time.time() - began < 60:
        time.sleep(0.01)
    process.send_signal(signal.SIGKILL)
    process.wait()
    files = sorted((tmp_path / "a").glob("part_*.h5"))
    assert 1 <= len(files) < 3
    part, _ = data.open_video(tmp_path / "a")
    assert len(part["video"]) == 20 * len(files)
    stamp = files[0].stat().st_mtime_ns
    data.make_video(tmp_path / "a", "objects", 60, 4, 32)
    whole, meta = data.open_video(tmp_path / "a")
    assert len(whole["video"]) == 60 and files[0].stat().st_mtime_ns == stamp
    assert all((whole[k][:len(part["video"])] == part[k]).all() for k in part)
    scene = data._scene("objects", "parts", "plain")
    scene.open(32)
    scene.film(np.random.default_rng(9), 9, 3)  # another history of the simulator
    again = scene.film(np.random.default_rng([0, 47]), 47, 4)
    scene.renderer.close()
    assert all((again[k] == whole[k][47]).all() for k in ("video", "seg", "flow", "state"))
    assert np.bincount(whole["split"]).tolist() == [42, 12, 6] and meta["mujoco"] and meta["gl"]


def test_savi_bad_caches_are_one_sentence(cache, tmp_path):
    with says("no part_*.h5", "make_video"):
        data.open_video(tmp_path)
    with says("no scene 'x'"):
        data.make_video(tmp_path, "x", 20, 12)
    data._save_part(tmp_path / "part_000000_000020.h5", [{"split": np.uint8(0)}],
                    {"version": data.VIDEO_VERSION - 1, "recipe": {}})
    with says("version 0", f"version {data.VIDEO_VERSION}", "delete"):
        data.make_video(tmp_path, "objects", 20, 12)
    data._save_part(tmp_path / "part_000000_000020.h5", [{"split": np.uint8(0)}],
                    {"version": data.VIDEO_VERSION, "recipe": {"kind": "pushed"}})
    with says("holds {'kind': 'pushed'}", "--cache"):
        data.make_video(tmp_path, "objects", 20, 12)
    (tmp_path / "part_000000_000020.h5").write_bytes(b"half a file")
    with says("damaged", "delete that file"):
        data.make_video(tmp_path, "objects", 20, 12)


def test_savi_without_gl(monkeypatch, tmp_path):
    import envs
    monkeypatch.delenv("MUJOCO_GL")
    monkeypatch.setattr(envs.subprocess, "run", lambda *a, **k: subprocess.CompletedProcess(a, 1))
    with says("OpenGL", "libegl1"):
        data.make_video(tmp_path, "objects", 20, 12)


# ------------------------------------------------------------------------------------------------------------ MoCapAct
def stored_clip(path, snippets=1, L=30, layout=True, seed=0):
    """A file in the published layout with poses that are known: returns them."""
    import mujoco
    scene = data._Humanoid("default", "plain", free=True)
    m, rng = scene.model, np.random.default_rng(seed)
    names = sorted(m.joint(i).name.removeprefix("walker0/") for i in range(m.njnt) if m.jnt_type[i] == 3)
    qpos = np.zeros((L + 1, m.nq))
    qpos[:, :3] = rng.normal(size=(L + 1, 3)) * 0.1 + (0, 0, 1)
    qpos[:, 3:7] = rng.normal(size=4)
    qpos[:, 3:7] /= np.linalg.norm(qpos[0, 3:7])
    low, high = m.jnt_range[m.jnt_type == 3].T
    qpos[:, 7:] = rng.uniform(low, high, (L + 1, 56))
    proprio, matrix = np.zeros((L + 1, 2868), np.float32), np.zeros(9)
    proprio[:, 268:271] = qpos[:, :3]
    for row, q in zip(proprio, qpos):
        mujoco.mju_quat2Mat(matrix, q[3:7])
        row[259:268] = matrix
    for i, name in enumerate(names):
        proprio[:, 91 + i] = qpos[:, m.joint(f"walker0/{name}").qposadr[0]]
    with h5py.File(path, "w") as f:
        for name, columns in (("joints_pos", range(91, 147)), ("orientation", range(259, 268)),
                              ("position", range(268, 271))):
            f[f"observable_indices/walker/{name}"] = np.array(columns)
        for s in range(snippets):
            group = f"{Path(path).stem}-{s * L}-{s * L + L}/0"
            f[f"{group}/observations/proprioceptive"] = proprio
            if layout:
                f[f"{group}/actions"] = np.arange(L)[:, None] * np.ones((L, 56), np.float32)
    return m, names, qpos, proprio


def test_savi_mocapact_poses_come_back_and_are_rendered(cache, tmp_path):
    m, names, qpos, proprio = stored_clip(tmp_path / "CMU_007_01.hdf5")
    with h5py.File(tmp_path / "CMU_007_01.hdf5") as f:
        indices = {k: v[:] for k, v in f["observable_indices/walker"].items()}
    back = data.mocapact_qpos(proprio, indices, names, m)
    sign = np.sign((back[:, 3:7] * qpos[:, 3:7]).sum(1, keepdims=True))
    assert np.abs(back[:, 7:] - qpos[:, 7:]).max() < 1e-6 and np.abs(back[:, 3:7] * sign - qpos[:, 3:7]).max() < 1e-6
    splits = data.render_mocapact(tmp_path, tmp_path / "out", frames=4, size=32, stride=2)
    x, meta = data.open_video(tmp_path / "out")
    assert set(splits) == {"CMU_007_01"} and "MoCapAct" in meta["source"] and x["video"].shape == (3, 4, 32, 32, 3)
    # frames 1, 3, 5, .. of the roll-out; the action of a frame is the one that led to it
    assert x["actions"][:, :, 0].ravel().tolist() == [i - 1 for i in range(1, 24, 2)]
    assert (x["seg"] > 0).mean() > 0.02 and len(np.unique(x["seg"])) >= 4
    data.render_mocapact(tmp_path, tmp_path / "out", frames=4, size=32, stride=2)  # nothing left to do


def test_savi_mocapact_splits_by_subject():
    names = [f"CMU_{s:03d}_{t:02d}" for s in range(60) for t in range(1, 2 + s % 7)]
    splits = data.mocapact_splits(names)
    assert set(splits) == set(names) and splits == data.mocapact_splits(names[::-1])
    for s in range(60):
        assert len({splits[n] for n in names if n.split("_")[1] == f"{s:03d}"}) == 1
    share = np.bincount(list(splits.values())) / len(names)
    assert np.abs(share - (0.7, 0.2, 0.1)).max() < 0.05


def test_savi_mocapact_bad_files(cache, tmp_path):
    with says("no CMU_*.hdf5", "huggingface.co"):
        data.render_mocapact(tmp_path, tmp_path / "out")
    file = tmp_path / "CMU_001_01.hdf5"
    stored_clip(file, layout=False)
    with says("layout of MoCapAct", "observations/proprioceptive"):
        data.render_mocapact(tmp_path, tmp_path / "out", frames=4)
    file.write_bytes(b"not HDF5")
    with says("layout of MoCapAct"):
        data.render_mocapact(tmp_path, tmp_path / "out", frames=4)
    stored_clip(file)
    with says("no rollout of 40 frames", "--frames"):
        data.render_mocapact(tmp_path, tmp_path / "out", frames=40)


# -------------------------------------------------------------------------------------------------------- whole script
def test_savi_smoke_loss_falls_and_files_are_written(cache, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    moved = []
    real = savi.train

    def spy(model, *rest):
        before = {k: v.clone() for k, v in model.state_dict().items()}
        curve = real(model, *rest)
        moved.extend(k for k, v in model.state_dict().items() if not torch.equal(v, before[k]))
        assert set(moved) == {k for k, _ in model.named_parameters()}
        return curve

    monkeypatch.setattr(savi, "train", spy)
    result = savi.main(savi_args(cache, updates=60, capture_video=True, seed=3, frames=2))
    curve = result["cells"][0]["curve"]
    assert curve[-1][1] < 0.5 * curve[0][1] and moved
    run = next((tmp_path / "runs").glob("objects__savi__3__*"))
    for name in ("slots.png", "time.png", "usage.png", "slots.gif", "slots.mp4", "results.json", "checkpoint.pt",
                 "args.json", "metrics.jsonl"):
        assert (run / name).stat().st_size > 0, name
    out = capsys.readouterr().out
    assert "k-means xy" in out and "grid 2x3" in out and "best trivial baseline" in out and "min left" in out
    assert json.loads((run / "results.json").read_text())["baselines"]["one slot"]["fg_ari"] == 0
    # the same numbers from the checkpoint alone, with the network's flags read from it
    again = savi.main(savi_args(cache, eval_only=True, checkpoint=str(run / "checkpoint.pt"), dim=None))
    assert again["cells"][0]["scores"] == result["cells"][0]["scores"]


def test_savi_killed_and_resumed_ends_at_the_same_numbers(cache, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    flags = dict(data="pushed", clips=20, updates=40, init="action", predictor="action", partition="body", slots=4,
                 pred_weight=1.0, noise=1e-4)
    whole = savi.main(savi_args(cache, **flags))["cells"][0]
    (tmp_path / "b").mkdir()
    monkeypatch.chdir(tmp_path / "b")
    real, count = savi.savi_loss, []

    def dies(*a):
        count.append(0)
        if len(count) == 25:
            raise KeyboardInterrupt
        return real(*a)

    monkeypatch.setattr(savi, "savi_loss", dies)
    with says("stopped", "--resume runs/pushed__savi__1__"):
        savi.main(savi_args(cache, **flags))
    monkeypatch.setattr(savi, "savi_loss", real)
    run = next((tmp_path / "b" / "runs").glob("pushed*"))
    done = savi.main(savi_args(cache, resume=str(run)))["cells"][0]
    assert done["scores"] == whole["scores"] and done["curve"] == whole["curve"]
    steps = [json.loads(x)["step"] for x in (run / "metrics.jsonl").read_text().splitlines()]
    assert steps == sorted(set(steps)) and steps[-1] == 40
    assert {"locality", "slot_share", "designated"} <= set(done["scores"])
    again = savi.main(savi_args(cache, resume=str(run)))["cells"][0]  # finished: read, not trained
    assert again == done


def test_savi_trains_in_pieces(cache, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    whole = savi.main(savi_args(cache, updates=12))["cells"][0]
    savi.main(savi_args(cache, updates=12, until=5))
    runs = sorted((tmp_path / "runs").glob("objects*"), key=lambda p: p.stat().st_mtime)
    assert not list((runs[-1] / "cells").glob("*.json"))
    done = savi.main(savi_args(cache, resume=str(runs[-1])))["cells"][0]
    assert done["scores"] == whole["scores"]


def test_savi_action_study_is_resumable_and_keeps_its_rule(cache, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    args = savi_args(cache, data="pushed", clips=20, updates=2, ablation="action", seeds=2, slots=4)
    result = savi.main(args)
    names = {c["name"] for c in result["cells"]}
    assert names == {f"A{i}-seed{s}" for i in range(7) for s in (1, 2)} and result["verdict"] in (
        "no benefit", "none: fewer than 5 seeds")
    size = {c["name"][:2]: c["parameters"] for c in result["cells"]}
    assert size["A1"] == size["A2"] == size["A3"] == size["A4"]  # zeros instead of fewer parameters
    run = next((tmp_path / "runs").glob("pushed*"))
    gone = run / "cells" / "A4-seed2.json"
    text = json.loads(gone.read_text())
    gone.unlink()
    (run / "cells" / "A4-seed2.pt").unlink()
    again = savi.main(savi_args(cache, resume=str(run)))
    assert json.loads(gone.read_text())["scores"] == text["scores"] and again["verdict"] == result["verdict"]
    assert "A6 A1, flow target" in capsys.readouterr().out

    def cells(values):
        return [{"scores": {"fg_ari": v, "designated": v}} for v in values]

    good, poor = [0.8, 0.81, 0.82, 0.83, 0.84], [0.5, 0.52, 0.51, 0.53, 0.5]
    by_arm = {a: cells(good if a == "A4" else poor) for a in savi.ARMS}
    grids = {"grid 2x3": {"fg_ari": 0.6, "designated": 0.3}}
    assert savi.action_verdict(by_arm, grids) == "benefit"
    assert savi.action_verdict({a: c[:3] for a, c in by_arm.items()}, grids).startswith("none")
    assert savi.action_verdict(by_arm, {"grid 2x3": {"fg_ari": 0.9, "designated": 0.3}}) == "no benefit"
    assert savi.action_verdict(by_arm | {"A2": cells(good)}, grids) == "no benefit"


def test_savi_slots_study(cache, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(savi, "EVAL_CLIPS", 2)
    result = savi.main(savi_args(cache, data="humanoid", clips=10, updates=1, study="slots", frames=2, batch=1))
    assert [c["flags"]["slots"] for c in result["cells"]] == [3, 5, 7, 9, 11] * 2
    out = capsys.readouterr().out
    assert "whole-body IoU" in out and "default, 11 slots" in out and "parts, best grid" in out


def test_savi_bad_flags_are_one_sentence(cache, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    bad = [(dict(clip_frames=4, frames=5), "clips of 4 frames", "--frames 4"),
           (dict(ablation="action"), "no action moves", "--data pushed"),
           (dict(study="slots"), "--data humanoid"), (dict(data="mocapact"), "--mocapact-dir"),
           (dict(eval_only=True), "--checkpoint"), (dict(checkpoint="nothing.pt"), "nothing.pt", "savi.py"),
           (dict(updates=0), "--updates 0", "at least 1"), (dict(resume="nothing"), "no args.json"),
           (dict(data="pushed", ablation="action", study="slots"), "choose one")]
    if not torch.cuda.is_available():
        bad.append((dict(device="cuda"), "no GPU", "--device cpu"))
    for flags, *words in bad:
        with says(*words):
            savi.main(savi_args(cache, **flags))
    assert not list(tmp_path.glob("runs/*__*"))
    with says("not finite", "--lr"):
        savi.check_finite(3, {"loss": torch.tensor(float("nan"))})


def test_savi_compiled_loss_was_compiled_and_agrees_with_eager(monkeypatch):
    real = torch.compile
    monkeypatch.setattr(torch, "compile", lambda f, **kw: real(f, backend="eager", fullgraph=True, **kw))
    torch._dynamo.reset()
    counters = torch._dynamo.utils.counters
    counters.clear()
    model = small_savi(init="action", predictor="action")
    batch = torch.rand(2, 2, 3, 32, 32), torch.rand(2, 2, 3, 32, 32), torch.rand(2, 2, 4), None, None, 1.0, 0.0
    f = savi.compiler(True)(savi.savi_loss)
    a, b = f(model, *batch)[0], savi.savi_loss(model, *batch)[0]
    f(model, *batch)
    assert torch.allclose(a, b) and counters["stats"]["unique_graphs"] == 1 and not counters["graph_break"]
    assert savi.compiler(False)(savi.savi_loss) is savi.savi_loss


def test_savi_runs_from_an_empty_folder(cache, tmp_path):
    for name in ("savi.py", "data.py", "envs.py"):
        shutil.copy(Path(HERE) / name, tmp_path)
    command = [sys.executable, "savi.py", "--clips", "10", "--updates", "2", "--dim", "16", "--batch", "2", "--device",
               "cpu", "--workers", "1", "--no-capture-video", "--cache", str(cache)]
    out = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, timeout=100)
    assert out.returncode == 0, out.stderr[-2000:]
    assert "best trivial baseline" in out.stdout
    copy = next((tmp_path / "runs").glob("objects__*"))
    assert {"savi.py", "data.py", "envs.py", "results.json"} <= {p.name for p in copy.iterdir()}


def test_savi_help_shows_every_flag():
    out = subprocess.run([sys.executable, str(Path(HERE) / "savi.py"), "--help"], capture_output=True, text=True).stdout
    for f in dataclasses.fields(savi.Args):
        assert f"--{f.name.replace('_', '-')}" in out or f"--no-{f.name.replace('_', '-')}" in out, f.name
    assert "Deviations" in out


# ---------------------------------------------------------------------------------------------- bodies and toys of PWM
BODY_FACTS = {"hopper": (11, 3, 6, 6, 15.8, 1.25), "ant": (37, 8, 15, 14, 18.2, 0.75),
              "anymal": (49, 12, 19, 18, 53.1, 0.55), "humanoid": (76, 21, 28, 27, 40.8, 1.35),
              "muscle-humanoid": (53, 152, 29, 24, 37.0, 1.0)}


@pytest.mark.parametrize("task", BODY_FACTS)
def test_bodies_have_the_papers_sizes_and_start_as_it_says(task):
    body, (O, A, nq, nv, mass, height) = envs._Body(task), BODY_FACTS[task]
    m = body.model
    joints = m.dof_damping[3 if task == "hopper" else 6:]  # behind the root's
    lowest = {"hopper": 1, "ant": 1 + 10, "anymal": 2 + 10, "humanoid": 0.2 + 10, "muscle-humanoid": 2 + 10}[task]
    assert lowest <= joints.min() < lowest + 1 and len(joints) == nv - (3 if task == "hopper" else 6)
    assert tuple(envs.task_facts(task)) == (O, A, 1000, 1) and (m.nq, m.nv, m.nu) == (nq, nv, A)
    assert sum(m.body_mass) == pytest.approx(mass, abs=0.06) and body._rest[1 if task == "hopper" else 2] == height
    assert m.opt.timestep == 1 / 240 and ((m.geom_contype > 0) == (m.geom_type == 0)).all()  # only the floor is touched
    rows = np.stack([body.start(np.random.default_rng(i)) for i in range(500)])
    assert (rows[:, 0] == 0).all() and body.observe(rows, np.zeros((500, A))).shape == (500, O)
    off, scale = rows[:, 1:1 + nq] - body._rest, 0.1 if task == "hopper" else 0.2
    assert scale * 0.48 < np.abs(off[:, :2]).max() <= scale / 2
    fast = 0.1 if task == "hopper" else 0.5
    assert fast * 0.48 < np.abs(rows[:, 1 + nq:]).max() <= fast / 2
    for a in [3, *body._balls] if task != "hopper" else []:
        assert np.allclose(np.linalg.norm(rows[:, 1 + a:5 + a], axis=1), 1) and (rows[:, 1 + a] > 0.98).all()
    joints = off[:, 7:] if task in ("ant", "anymal", "humanoid") else np.zeros((1, 1))
    assert np.abs(joints).max() <= 0.2
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        check_env(envs.make_env(task), skip_render_check=True)


def test_bodies_stand_on_their_springs_or_fall():
    lasts = {}
    for task in ("hopper", "anymal", "humanoid"):
        body = envs._Body(task)
        state = np.concatenate([[0.0], body._rest, np.zeros(body.model.nv)])[None]
        if task == "anymal":  # at 0 its springs hold the legs straight
            state[0, 8:1 + body.nq], state[0, 3] = 0, 0.65
        for _ in range(200):
            state, ended = body.advance(state, np.zeros((1, body.facts.act_dim)))
            if ended[0]:
                break
        lasts[task] = state[0, 0], state[0, 3]
    assert lasts["anymal"][0] == pytest.approx(200 / 60) and lasts["anymal"][1] == pytest.approx(0.6, abs=0.02)
    assert lasts["hopper"][0] < 2.5 and lasts["humanoid"][0] < 2.5


def test_body_rewards_and_observations_by_hand():
    for task in BODY_FACTS:
        body = envs._Body(task)
        rng = np.random.default_rng(1)
        state, act = body.start(rng)[None], rng.uniform(-1, 1, (1, body.facts.act_dim))
        q, v, last = state[0, 1:1 + body.nq], state[0, 1 + body.nq:], rng.uniform(-1, 1, (1, body.facts.act_dim))
        obs = body.observe(state, last)
        cost = (act**2).sum()
        if task == "hopper":
            want_obs = [q[1] - 1.25, *q[2:], *v]
            x = min(q[1] - 0.95, 0.3)
            want = v[0] + (x if x >= 0 else -200 * x * x) + 1 - (q[2] / 0.5235988) ** 2 - 0.1 * cost
        else:
            w, x, y, z = q[3:7]
            R = np.array([[1 - 2 * (y * y + z * z), 2 * (x * y - w * z), 2 * (x * z + w * y)],
                          [2 * (x * y + w * z), 1 - 2 * (x * x + z * z), 2 * (y * z - w * x)],
                          [2 * (x * z - w * y), 2 * (y * z + w * x), 1 - 2 * (x * x + y * y)]])
            want_obs = [*q[2:7], *v[:3], *(R @ v[3:6]), *q[7:], *0.1 * v[6:], R[2, 2], R[0, 0],
                        *([] if task == "muscle-humanoid" else last[0])]
            want = v[0] + 0.1 * R[2, 2] + R[0, 0]
            if task == "humanoid":
                x = min(q[2] - 0.84, 0.1)
                want += (10 * x if x >= 0 else -200 * x * x) - 0.002 * cost
            elif task == "muscle-humanoid":
                want -= 0.001 * ((act + 1) / 2).sum()
            else:
                want += q[2] - body.floor - (0.005 * cost if task == "anymal" else 0)
        assert np.allclose(obs[0], want_obs) and body.reward(obs, act)[0] == pytest.approx(want), task
    assert envs._height_term(np.array([-2.0, -0.1, 0.05, 1]), 0.1, 10) == pytest.approx([-200, -2, 0.5, 1])


def test_the_reward_is_that_of_the_state_before_the_step():
    env = envs.make_env("ant")
    obs, _ = env.reset(seed=3)
    act = np.full(8, 0.3, np.float32)
    _, rew, *_ = env.step(act)
    assert rew == pytest.approx(env._env.reward(obs[None].astype(float), act[None])[0], abs=1e-6)


def test_an_ants_action_drives_the_joint_of_its_place():
    body = envs._Body("ant")
    for i in range(8):
        state = np.concatenate([[0.0], body._rest, np.zeros(14)])[None]
        state[0, 3] = 5  # in the air
        act = np.zeros((1, 8))
        act[0, i] = 1
        for _ in range(2):
            state, _ = body.advance(state, act)
        assert np.argmax(np.abs(state[0, 1 + 15 + 6:])) == i


def test_the_muscles_are_152_and_only_pull():
    import mujoco
    m = envs._Body("muscle-humanoid").model
    names = [m.actuator(i).name for i in range(m.nu)]
    assert m.ntendon == m.nu == 152 == len(set(names)) and sum(n.startswith("left") for n in names) == 76
    assert (m.actuator_gainprm[:, 0] < 0).all() and (m.actuator_ctrlrange == [0, 1]).all() and m.na == 0
    assert -m.actuator_gainprm[:, 0].sum() == pytest.approx(2 * 0.36 * 26680, rel=1e-6)  # of spec A.4's F0
    d = mujoco.MjData(m)
    d.qpos[:] = envs._Body("muscle-humanoid")._rest

    def torque(*groups):  # of the left leg at rest: hip x y z, knee, ankle x y z
        d.ctrl[:] = [n.startswith("left") and n[5:-2] in groups for n in names]
        mujoco.mj_forward(m, d)
        return d.qfrc_actuator[-9:-2]

    knee, ankle = ("vastus_lat", "vastus_med_int", "rectus_femoris"), ("gastrocnemius", "soleus")
    assert torque(*knee)[3] == pytest.approx(-107, abs=3) and torque(*ankle)[5] == pytest.approx(96, abs=3)
    assert torque("tibialis_ant_extensors")[5] == pytest.approx(-29, abs=1) and torque("gluteus_max")[1] > 50
    d.ctrl[:] = [n.startswith("right") for n in names]
    mujoco.mj_forward(m, d)
    right = d.qfrc_actuator[6:13].copy()
    d.ctrl[:] = [n.startswith("left") for n in names]
    mujoco.mj_forward(m, d)
    assert np.allclose(right * [-1, 1, -1, 1, -1, 1, -1], d.qfrc_actuator[-9:-2])  # mirrored
    body = envs._Body("muscle-humanoid")  # action -1 is no activation: falling freely, muscles change nothing
    state = np.concatenate([[0.0], body._rest, np.zeros(24)])[None]
    slack, _ = body.advance(state, -np.ones((1, 152)))
    tense, _ = body.advance(state, np.ones((1, 152)))
    assert np.abs(slack[0, -18:]).max() < 0.2 < np.abs(tense[0, -18:]).max()


def sine_herd(task, threads, n=6, steps=60):
    with envs.Herd(task, n, seed=4, threads=threads) as herd:
        out = [(herd.reset(),)]
        for t in range(steps):
            out.append(herd.step(np.sin(0.7 * t + np.arange(n)[:, None] + np.arange(herd.facts.act_dim))))
    return out


@pytest.mark.parametrize("task", ["hopper", "muscle-humanoid"])
def test_a_herd_equals_single_environments_for_any_number_of_threads(task):
    one, two = sine_herd(task, 1), sine_herd(task, 2)
    for a, b in zip(one, two):
        for x, y in zip(a, b):
            np.testing.assert_array_equal(x, y)
    i, ends = 2, 0
    env = envs.make_env(task)
    env.reset(seed=0)
    env._state = env._env.start(np.random.default_rng([4, i, 0]))[None]
    for t in range(60):
        obs, rew, term, trunc, _ = env.step(np.sin(0.7 * t + i + np.arange(env.facts.act_dim)))
        herd_obs, herd_rew, herd_term, _, last = (x[i] for x in one[t + 1])
        np.testing.assert_allclose(last, obs, rtol=1e-3, atol=1e-4)  # its actions are float32
        assert rew == pytest.approx(float(herd_rew), abs=1e-2) and term == herd_term and not trunc
        if term:
            ends += 1
            env.reset(seed=0)
            env._state = env._env.start(np.random.default_rng([4, i, ends]))[None]
            start = env._env.observe(env._state, np.zeros((1, env.facts.act_dim)))[0]
            np.testing.assert_allclose(herd_obs, start, rtol=1e-5)
            break
        np.testing.assert_array_equal(herd_obs, last)
    assert ends == 1


@pytest.mark.parametrize("task", ["InvertedPendulum-v5", "hopper-hop"])
def test_a_flock_equals_single_environments_and_goes_on_from_its_actions(task):
    acts = np.random.default_rng(0).uniform(-1, 1, (40, 3, envs.task_facts(task).act_dim))
    with envs.Flock(task, 3, seed=4) as flock, envs.Flock(task, 3, seed=5) as other:
        out = [flock.reset()]
        for act in acts[:20]:
            out.append(flock.step(act))
        state = flock.state()
        for act in acts[20:]:
            out.append(flock.step(act))
        assert any(a.any() for _, _, a, _, _ in out[1:]) == (task == "InvertedPendulum-v5")
        other.seed = 4
        np.testing.assert_array_equal(other.load(state), out[20][0])
        for act, want in zip(acts[20:], out[21:]):
            for x, y in zip(other.step(act), want):
                np.testing.assert_array_equal(x, y)
        with pytest.raises(SystemExit, match=r"\(2, .*expected finite \(3, "):
            flock.step(acts[0, :2])
    env, i, k = envs.make_env(task), 1, 0
    for t, act in enumerate(acts):
        if t == 0 or want[2]:
            (seed,) = np.random.SeedSequence([4, i, k]).generate_state(1)
            start, k = env.reset(seed=int(seed))[0], k + 1
            np.testing.assert_array_equal(out[t][0][i] if t else out[0][i], start)
        want = env.step(act[i])
        obs, rew, term, trunc, last = (x[i] for x in out[t + 1])
        np.testing.assert_array_equal(last, want[0])
        assert rew == np.float32(want[1]) and (term, trunc) == want[2:4] and (term or (obs == last).all())
    assert (k > 2) == (task == "InvertedPendulum-v5")


def test_rollouts_of_a_body_equal_the_plain_loop():
    jobs = [("hopper", s) for s in (5, 6, 7, 5)]
    want = plain_loop(jobs, policy(3), 11)
    for n, max_envs in ((1, 64), (2, 2)):
        with envs.Workers(n, max_envs) as workers:
            same(workers.rollout(jobs, policy(3)), want)
    assert all(e["term"][-1] and not e["term"][:-1].any() for e in want) and len({len(e["rew"]) for e in want}) > 1


def test_rows_that_explode_end_and_stay_finite_and_time_is_no_end():
    with envs.Herd("ant", 3, threads=1) as herd:
        herd.reset()
        herd._state[1, 1 + 15 + 3] = 1e30
        herd.t[2] = 999
        before = herd._body.observe(herd._state, herd._last)
        obs, rew, term, trunc, last = herd.step(np.zeros((3, 8)))
        assert term.tolist() == [False, True, False] and trunc.tolist() == [False, False, True]
        assert np.isfinite(obs).all() and np.isfinite(rew).all() and np.isfinite(last).all()
        np.testing.assert_array_equal(last[1], before[1].astype(np.float32))
        assert herd.t.tolist() == [1, 0, 0] and (last[2] != obs[2]).any() and (last[0] == obs[0]).all()
    env = envs.make_env("hopper")
    for limit in (False, True):  # falling at the last step is an end, not a lack of time
        env.reset(seed=0)
        env.t = 999
        if limit:
            env._state[0, 2] = 0.5
        _, _, term, trunc, _ = env.step(np.zeros(3))
        assert (term, trunc) == ((True, False) if limit else (False, True))


def test_ball_wall_has_its_landscape():
    ball = envs.plant("ball-wall")
    theta = torch.linspace(-math.pi, math.pi, 200_001, dtype=torch.float64)
    for k, at, best in ((1, 0.1223, -21.8505), (2, 0.2492, -21.382)):
        J = ball.cost(theta, k)
        assert float(theta[J.argmin()]) == pytest.approx(at, abs=1e-3)
        assert float(J.min()) == pytest.approx(best, abs=1e-3)
        assert float(J[0]) == float(J[-1]) == pytest.approx(18)
    left, plateau, right = ball.cost(torch.tensor([-1.55, -1.0, 0.13], dtype=torch.float64)).tolist()
    assert left == pytest.approx(-2.5, abs=0.2) and plateau == -5 and right < -21
    x = torch.tensor(-math.pi, dtype=torch.float64, requires_grad=True)
    assert abs(float(torch.autograd.grad(ball.cost(x), x)[0])) < 1e-12
    assert float(ball.path(-0.5)[-1, 0]) < 5 < float(ball.path(0.3)[-1, 0])


def test_the_double_pendulum_keeps_energy_and_is_chaotic():
    p = envs.plant("double-pendulum")
    none, drift = torch.zeros(1, 1, dtype=torch.float64), []
    for dt, steps in ((1 / 60, 240), (1 / 120, 480)):
        p.DT = dt
        x = torch.tensor([[0.3, 0.2, 0.0, 0.0]], dtype=torch.float64)
        before = p.energy(x)
        for _ in range(steps):
            x = p.step(x, none, friction=0.0)
        drift.append(float((p.energy(x) - before).abs()))
    assert drift[0] < 0.2 and drift[1] < drift[0] / 16  # an order of 4
    p = envs.plant("double-pendulum")
    for T, want in ((10, 10.5), (30, 111), (50, 1082)):
        def roll(x, T=T):
            for _ in range(T):
                x = p.step(x, none[0])
            return x
        J = torch.autograd.functional.jacobian(roll, torch.zeros(4, dtype=torch.float64))
        assert float(torch.linalg.matrix_norm(J, 2)) == pytest.approx(want, rel=0.03)
    x = p.reset(1000, gen(), torch.float64)
    assert x[:, :2].abs().max() < math.pi / 2 and x[:, 2:].abs().max() < 0.25
    assert torch.allclose(p.state(p.observe(x)), x)
    assert p.reward(p.observe(x))[0] == pytest.approx(-float(x[0, 0]**2 + x[0, 1]**2 + 0.1 * (x[0, 2:]**2).sum()))


def test_the_planar_hopper_has_mujocos_masses_and_its_own_contacts():
    import mujoco
    p, model = envs.PlanarHopper(), envs._body_model("hopper")
    data, rng = mujoco.MjData(model), np.random.default_rng(0)
    for _ in range(3):
        data.qpos[:], data.qvel[:] = rng.normal(size=6), 3 * rng.normal(size=6)
        mujoco.mj_forward(model, data)
        inertia = np.zeros((6, 6))
        for i in range(6):
            mujoco.mj_mulM(model, data, inertia[i], np.eye(6)[i])
        q, v = torch.tensor(data.qpos), torch.tensor(data.qvel)
        root = np.diag([1.0, 1, 1, 0, 0, 0])  # armature 1 on the root too, as in the reference
        assert np.allclose(p.mass_matrix(q), inertia + root, atol=1e-12)
        assert np.allclose(p.forces(q, v)[0], data.qfrc_bias, atol=1e-11)
    body, obs, act = envs._Body("hopper"), torch.randn(50, 11), 2 * torch.rand(50, 3) - 1
    assert np.allclose(body.reward(obs.numpy(), act.numpy()), p.step_reward(obs, act), atol=1e-5)
    state = p.state(obs)
    assert torch.allclose(p.observe(state), obs) and torch.equal(p.ended(obs), state[:, 1] < 0.8)
    deep = torch.tensor([[0.0, 1.2, 0, 0, 0, 0]], dtype=torch.float64)  # foot 1 cm in the floor, falling and sliding
    soft, stiff = (x.forces(deep, torch.tensor([[1.0, -1, 0, 0, 0, 0]], dtype=torch.float64))[1][0, :2]
                   for x in (p, envs.PlanarHopper(5.0)))
    assert soft[1] == pytest.approx(2 * 0.01 * (2e4 + 2e3)) and stiff[1] == pytest.approx(5 * float(soft[1]))
    assert soft[0] == pytest.approx(-2 * 0.9 * 2e4 * 0.01) and (p.forces(deep + 0.2, deep)[1] == 0).all()


def test_gradients_through_the_planar_hopper_are_those_of_differences():
    p = envs.PlanarHopper()
    start = torch.zeros(1, 12, dtype=torch.float64)
    start[0, 1], start[0, 3:6] = 1.22, torch.tensor([-0.1, -0.2, 0.1])  # its foot is on the floor
    act = torch.tensor([[0.1, -0.2, 0.3]], dtype=torch.float64)

    def final(a):
        x = start
        for _ in range(4):
            x = p.step(x, a)
        return x[0]
    J = torch.autograd.functional.jacobian(final, act)[:, 0]
    for i in range(3):
        d = 1e-6 * torch.eye(3, dtype=torch.float64)[i]
        assert torch.allclose(J[:, i], (final(act + d) - final(act - d)) / 2e-6, rtol=1e-4, atol=1e-6)
    with envs.Herd("planar-hopper", 4, threads=1) as herd:  # rows of a herd are steps of the plant
        obs = herd.reset()
        a = np.random.default_rng(0).uniform(-1, 1, (4, 3))
        after = herd.step(a)[4]
    want = p.observe(p.step(p.state(torch.tensor(obs, dtype=torch.float64)), torch.tensor(a)))
    assert np.allclose(after, want, atol=1e-4)


@pytest.mark.parametrize("task", envs.TOY)
def test_toys_are_environments_too(task):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        check_env(envs.make_env(task), skip_render_check=True)
    env = envs.make_env(task)
    env.reset(seed=0)
    _, rew, term, trunc, _ = env.step(np.array([0.13 / math.pi]))
    assert (term, trunc) == (task == "ball-wall", False) and (rew > 21 or task != "ball-wall")
    assert envs.plant("ant") is None and envs.score(task, -7.5, 0) == -7.5 and envs.score("ant", 900, 0) == 900


@pytest.mark.parametrize("call, sentence", [
    (lambda: envs.Herd("walker-walk", 2), "hopper, ant.*'walker-walk'.*Flock"),
    (lambda: envs.Herd("ant", 0), "n=0.*1 or more of each"),
    (lambda: envs.make_env("hoper"), "unknown task 'hoper'.*hopper"),
    (lambda: envs.make_env("ball-wall", obs="pixels"), "draws no frames.*obs='state'"),
    (lambda: walk_into_nan(), "WalkNaN.*non-finite reward.*step 2"),
    (lambda: sine_herd_with(np.zeros((2, 8))), r"\(2, 8\), all finite; expected finite \(3, 8\)"),
    (lambda: sine_herd_with(np.full((3, 8), np.nan)), "not all finite"),
    (lambda: envs.Workers(1).rollout([("ant", 0)], lambda o, j, t: np.zeros((1, 3))), r"\(1, 3\).*\(1, 8\)")])
def test_bad_input_of_bodies_and_toys_is_one_sentence(call, sentence):
    with pytest.raises(SystemExit, match=sentence) as error:
        call()
    assert "\n" not in str(error.value)


def walk_into_nan():
    with envs.Flock("test_all:WalkNaN-v0", 2) as flock:
        flock.reset()
        for _ in range(3):
            flock.step(np.zeros((2, 1)))


def sine_herd_with(act):
    with envs.Herd("ant", 3, threads=1) as herd:
        herd.reset()
        herd.step(act)


# --------------------------------------------------------------------------------------------- PWM's studies of Sec. 3
def test_toy_networks_start_alike_and_learn_apart():
    nets = [pwm.fit_landscape(act, lambda x: x.sin(), 3, 1, seed=5)[0] for act in (torch.relu, pwm.simnorm)]
    torch.manual_seed(5)
    start = pwm.ToyNet(3, torch.relu)
    assert not torch.equal(nets[0].weight[0], start.weight[0])
    assert not torch.equal(start.weight[1][0], start.weight[1][1])
    x = torch.linspace(-3, 3, 7)
    for k, act in ((0, torch.relu), (1, lambda h: h.unflatten(-1, (4, 8)).softmax(-1).flatten(-2))):
        h = x[:, None]
        for i in range(3):
            h = h @ nets[k].weight[i][1] + nets[k].bias[i][1]
            h = act(h) if i < 2 else h
        assert torch.allclose(nets[k](x.expand(3, -1))[1], h[:, 0], atol=1e-5)
    alone = pwm.fit_landscape(torch.relu, lambda x: x.sin(), 2, 6, seed=5)[1]
    assert alone.shape == (6, 2) and (alone[-1] < 0.8 * alone[0]).all()


def test_descent_ends_in_the_minimum_and_stays_in_range():
    assert torch.allclose(pwm.descend(lambda t: (t - 0.5) ** 2, 2), torch.tensor([0.5, 0.5]), atol=1e-3)
    assert torch.allclose(pwm.descend(lambda t: -t, 1), torch.tensor([math.pi]))


def test_ball_wall_study_runs_and_judges(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    result = pwm.main(pwm.Args(task="ball-wall", fast=True, seeds=3, device="cpu"))
    out = capsys.readouterr().out
    assert "not reproduced" in out and result["verdict"] == "not reproduced" and len(result["table"]) == 9
    folder = last_run(tmp_path)
    assert {"figure2.png", "results.json", "args.json"} <= {p.name for p in folder.iterdir()}
    saved = json.loads((folder / "results.json").read_text())
    assert saved["deviations"] and len(saved["table"]["ReLU"]["gap"]) == 3
    gap, ball = saved["table"]["SimNorm"]["gap"], envs.plant("ball-wall")
    angle = torch.tensor(saved["table"]["SimNorm"]["theta"])
    assert np.allclose(gap, ball.cost(angle) + 21.8505, atol=0.01)


def test_the_true_plant_is_a_world_model():
    p = envs.plant("double-pendulum")
    wm, state = pwm.TruePlant(p, "double-pendulum", rew_std=2.0), p.reset(5, gen())
    task, a = torch.zeros(5, dtype=torch.long), torch.rand(5, 1)
    z = wm.encode(p.observe(state), task)
    after = p.step(state, a)
    assert torch.allclose(wm.next(z, a, task), p.observe(after), atol=1e-5)
    assert torch.allclose(pwm.reward_value(wm.reward(z, a, task)), p.reward(p.observe(after)) / 2, atol=1e-4)
    actors, noise = pwm.Actors(torch.ones(1, 1), 6, (8,)), torch.randn(3, 1, 5, 1)
    zs, rew, alive = pwm.imagine(wm, actors, z[None], noise, task)
    assert zs.shape == (4, 1, 5, 6) and rew.shape == (3, 1, 5) and alive is None
    obs, acts, real = pwm.play_pendulum(p, lambda o, t: actors(o[None], noise[t])[0], state, 3)
    assert torch.allclose(zs[:, 0], obs, atol=1e-4) and torch.allclose(rew[:, 0], real / 2, atol=1e-4)


def test_gradient_statistics_against_plain_autograd():
    p = envs.plant("double-pendulum")
    wm, actors, N, H = pwm.TruePlant(p, "double-pendulum"), pwm.Actors(torch.ones(1, 1), 6, (8,)), 4, 5
    start, eps = p.reset(N, gen(3)), torch.randn(H, 1, N, 1, generator=gen(4))
    with torch.no_grad():
        seen, acts, _ = pwm.play_pendulum(p, lambda o, t: actors(o[None], eps[t])[0], start, H)
    jac = pwm.policy_jacobian(actors, seen[:-1].flatten(0, 1), eps[:, 0].flatten(0, 1)).view(H, N, -1)
    stats, means = pwm.gradient_statistics(pwm.action_gradients(wm, seen[0], acts), jac)
    for h in (1, 3, 5):
        grads = []
        for n in range(N):
            state, total = start[n:n + 1], 0
            for t in range(h):  # the policy sees the recorded observation, cut from the graph
                state = p.step(state, actors(seen[t, n][None, None], eps[t, :, n:n + 1])[0])
                total = total + p.reward(p.observe(state))
            parts = torch.autograd.grad(-total.sum(), list(actors.parameters()))
            grads.append(torch.cat([g.flatten() for g in parts]))
        g = torch.stack(grads)
        assert torch.allclose(means[h - 1], g.mean(0), rtol=1e-3, atol=1e-5)
        assert stats["variance"][h - 1] == pytest.approx(float(g.var(0).mean()), rel=1e-3)
        assert stats["esnr"][h - 1] == pytest.approx(float(g.mean(0).square().sum() / g.var(0).sum()), rel=1e-3)
        assert stats["esnr_code"][h - 1] == pytest.approx(float((g.mean(0)**2 / (g.var(0) + 1e-9)).mean()), rel=1e-3)


def shac(**flags):
    args = pwm.Args(task="planar-hopper", true_plant=True, episodic=True, policy_batch=3, horizon=4, device="cpu",
                    compile=False, workers=1, **flags)
    return pwm.Trainer(pwm.fill_budget(args, torch.device("cpu"), 1, 1), ["planar-hopper"], torch.device("cpu"))


def test_windows_of_shac_go_on_where_the_last_ones_ended():
    one, seen, herd = shac(), [], envs.Herd("planar-hopper", 3, seed=1)
    obs, noise = herd.reset(), torch.randn(4, 1, 3, 3, generator=gen(5))
    for _ in range(2):
        for eps in noise:
            obs = herd.step(one.nets["actors"](one.wm.encode(torch.from_numpy(obs), None)[None], eps)[0].detach())[0]
            seen.append(obs)
        start, alive = one.windows.roll(noise)
        assert np.allclose(start[0], obs, atol=1e-5) and start.shape == (1, 3, 11) and alive is None
        scale = one.wm.scale  # of all that was seen, and used from now on
        assert np.allclose(scale.mean, np.concatenate(seen).mean(0), atol=1e-4)
        assert np.allclose(scale.var.sqrt(), np.concatenate(seen).std(0), atol=1e-3)
    assert one.windows.herd.t.tolist() == [8, 8, 8]
    z = one.wm.encode(start[0], None)
    assert torch.allclose(one.wm.decode(z), start[0], atol=1e-5) and not torch.allclose(z, start[0], atol=0.5)
    other, state = shac(seed=2), io.BytesIO()
    torch.save(one.state(), state)
    state.seek(0)
    other.load_state(torch.load(state, weights_only=True))
    assert torch.equal(one.windows.roll(noise)[0], other.windows.roll(noise)[0])
    with says("no 'windows'", "older version", "copy of the code"):
        other.load_state({k: v for k, v in one.state().items() if k != "windows"})
    old = one.state()
    del old["critics"]["offset"]
    with says("no 'critics.offset'", "older version"):
        other.load_state(old)


def test_bodies_do_what_imagination_does_and_tell_which_windows_ended():
    args = pwm.Args(task="hopper", policy_batch=16, horizon=6, device="cpu", compile=False, workers=1, episodic=True)
    trainer = pwm.Trainer(pwm.fill_budget(args, torch.device("cpu"), 1, 1), ["hopper"], torch.device("cpu"))
    wm, actors, herd, ended = trainer.wm, trainer.nets["actors"], envs.Herd("hopper", 16, seed=1), 0
    lasts = [x.nets["actors"].mu.weight[-1].abs().max() for x in (trainer, shac())]
    assert lasts[0] < 0.002 < 0.05 < lasts[1]  # begins by doing next to nothing; SHAC as its authors
    assert trainer.args.critic_lr == 1e-3 and trainer.args.policy_lr == 3e-4
    trainer.update_policies(None, 0.0)
    assert [trainer.opts[x].param_groups[0]["lr"] for x in ("actors", "critics")] == [3e-4, 1e-3]
    trainer.windows = pwm.Windows(trainer)
    obs, task = herd.reset(), torch.zeros(16, dtype=torch.long)
    lived = [[[obs[b]], [], [], []] for b in range(16)]  # obs, act, rew, term of the episode that every body is in
    played = [[] for _ in range(16)]
    for k in range(12):
        noise = torch.randn(6, 1, 16, 3, generator=gen(k))
        start, alive = trainer.windows.roll(noise)
        assert torch.equal(start[0], torch.from_numpy(obs))
        z, _, _ = pwm.imagine(wm, actors, start, noise, task)
        done = np.zeros(16, bool)
        for h in range(6):  # the actions of the imagined states, not of the observed ones
            act = actors(z[h], noise[h])[0].detach().numpy()
            obs, rew, terminated, _, last = herd.step(act)
            done |= terminated
            assert (alive[h, 0].numpy() == ~done).all()
            for b in range(16):
                for book, x in zip(lived[b], (last[b], act[b], rew[b], terminated[b])):
                    book.append(x)
                if terminated[b]:
                    played[b].append(lived[b])
                    lived[b] = [[obs[b]], [], [], []]
        ended += int(done.sum())
    assert ended > 8  # a policy that has learnt nothing falls
    stored, torn = sum(played, []), trainer.windows.pieces
    assert len(torn) == len(stored) and max(len(p[2]) for p in torn) < pwm.PIECE
    key = lambda p: np.asarray(p[0])[0].tolist()  # noqa: E731
    for mine, theirs in zip(sorted(torn, key=key), sorted(stored, key=key)):
        for x, y in zip(mine, theirs):
            assert np.allclose(x, np.asarray(y), atol=1e-5)


def test_long_episodes_are_stored_in_pieces(monkeypatch):
    monkeypatch.setattr(pwm, "PIECE", 4)
    args = pwm.Args(task="ant", policy_batch=3, horizon=5, device="cpu", compile=False, workers=1, episodic=True)
    trainer = pwm.Trainer(pwm.fill_budget(args, torch.device("cpu"), 1, 1), ["ant"], torch.device("cpu"))
    trainer.windows.roll(torch.randn(5, 1, 3, 8))
    assert [len(p[2]) for p in trainer.windows.pieces] == [4, 4, 4] and trainer.windows.book["t"].tolist() == [1, 1, 1]
    for b, (obs, *_, term) in enumerate(trainer.windows.pieces):  # the next piece begins where this one stopped
        assert np.array_equal(obs[-1], trainer.windows.book["obs"][b, 0]) and not term.any()
    rng = np.random.default_rng(0)
    whole = dict(obs=rng.normal(size=(11, 2)), act=rng.normal(size=(10, 1)), rew=np.arange(10), term=np.arange(10) == 9)
    parts = pwm.pieces(whole)
    assert [len(p[2]) for p in parts] == [4, 4, 2] and [p[3].any() for p in parts] == [False, False, True]
    assert np.array_equal(np.concatenate([p[0][:-1] for p in parts]), whole["obs"][:-1])
    assert np.array_equal(parts[2][0][-1], whole["obs"][-1]) and np.array_equal(parts[1][0][0], parts[0][0][-1])


@pytest.mark.parametrize("task", ["hopper", "InvertedPendulum-v5"])
def test_a_body_stopped_among_its_windows_and_resumed_ends_at_the_same_numbers(task, tmp_path, monkeypatch):
    tiny = {**TINY, "task": task, "wm_steps": 6, "policy_steps": 12, "seed_episodes": 1, "round_episodes": 1,
            "critic_passes": 1, "save_every": 0.0}
    ends = []
    for name in ("whole", "stopped"):
        (tmp_path / name).mkdir()
        monkeypatch.chdir(tmp_path / name)
        update, calls = pwm.update_policies, []

        def dies(*a, update=update, calls=calls):
            calls.append(1)
            if len(calls) == 10:  # in the middle of the second round
                raise KeyboardInterrupt
            return update(*a)
        if name == "stopped":
            with monkeypatch.context() as m, pytest.raises(KeyboardInterrupt):
                m.setattr(pwm, "update_policies", dies)
                pwm.main(pwm.Args(**tiny))
            stored = Episodes.open(last_run(".") / "episodes")
            arrays = stored.arrays(task)
            stored.append(task, *([arrays[k][0, :n]] for k, n in (("obs", arrays["length"][0] + 1), *(
                (k, arrays["length"][0]) for k in ("act", "rew", "term")))))  # written, and no checkpoint after it
            pwm.main(pwm.Args(resume=str(last_run("."))))
        else:
            pwm.main(pwm.Args(**tiny))
        state = torch.load(last_run(".") / "checkpoint.pt", weights_only=True)
        rows = Episodes.open(last_run(".") / "episodes").arrays(task)
        ends.append((state, rows))
    (a, one), (b, two) = ends
    assert a["windows"]["steps"] == 12 * 4 * 8 and a["counts"] == b["counts"]
    rates = [g["lr"] for g in a["opts"]["model"]["param_groups"]]  # of step 3 of 3 in round 2 of 2
    assert rates == pytest.approx([0.3 * rates[1], 1e-3 / 2 * (0.03 + 2 * 0.97 / 3)])
    collected = sum(h["steps"] for h in a["history"] if "steps" in h)
    assert collected < one["length"].sum() <= collected + 12 * 4 * 8  # what the windows did is data
    for part in ("wm", "actors", "critics", "windows"):
        assert all(torch.equal(a[part][k], b[part][k]) for k in a[part]), part
    assert all(np.array_equal(one[k], two[k]) for k in one)


def test_the_scales_of_a_body_are_those_of_its_data(tmp_path):
    episodes = Episodes.create(tmp_path, {"hopper": (11, 3, 9)})
    rng = np.random.default_rng(0)
    for n in (9, 4):
        episodes.append("hopper", rng.normal(3, 2, (n + 1, 11)), rng.uniform(-1, 1, (n, 3)), rng.normal(5, 7, n),
                        np.arange(n) < 0)
    wm = pwm.WorldModel(11, [3], 2, 16, 16, 16, 0, episodic=True, activation="residual")
    arrays = episodes.arrays("hopper")
    pwm.set_scales(wm, episodes, "hopper")
    seen = np.concatenate([arrays["obs"][0, :9], arrays["obs"][1, :4]])
    assert np.allclose(wm.obs_mean, seen.mean(0), atol=1e-5) and np.allclose(wm.obs_std, seen.std(0), atol=1e-5)
    assert wm.rew_std == pytest.approx(np.concatenate([arrays["rew"][0], arrays["rew"][1, :4]]).std(), rel=1e-5)
    task, plain = torch.zeros(13, dtype=torch.long), copy.deepcopy(wm)
    plain.obs_mean.zero_(), plain.obs_std.fill_(1)
    x = torch.from_numpy(seen)
    assert torch.allclose(wm.encode(x, task), plain.encode((x - wm.obs_mean) / wm.obs_std, task), atol=1e-5)
    state = {k: v for k, v in wm.state_dict().items() if not k.startswith("obs_")}  # as in files of older versions
    torch.save(dict(wm=state, act_dims=[3], args=dict(activation="residual")), tmp_path / "wm.pt")
    assert torch.equal(pwm.load_world_model(tmp_path / "wm.pt").encode(x, task), plain.encode(x, task))


def test_policies_are_evaluated_on_the_way(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    result = pwm.main(pwm.Args(**{**TINY, "eval_every": 6, "policy_steps": 30}))  # rounds of 15 and 15 updates
    tests = [h for h in result["history"] if "evaluation" in h]
    assert [h["policy_updates"] for h in tests] == [6, 12, 15, 21, 27, 30]
    assert tests[-1]["evaluation"][TINY["task"]] == pytest.approx(result["table"][0]["ours"], abs=1e-3)


def test_a_window_that_ended_has_no_value_beyond():
    nets = episodic_world()
    obs, eps, task = torch.randn(1, 6, 3), torch.randn(5, 1, 6, 2), torch.zeros(6, dtype=torch.long)
    alive = torch.ones(5, 1, 6)
    alive[2:, 0, 4] = 0
    z, rew, _ = pwm.imagine(nets["wm"], nets["actors"], obs, eps, task)
    _, J, _, target, weight = pwm.actor_loss(*(nets[k] for k in ("wm", "actors", "critics", "stats")), obs, eps, task,
                                             0.9, 0.8, alive=alive)
    value = nets["critics"](z[-1]).amin(1)[0]
    returns = sum(0.9**h * rew[h, 0] for h in range(5)) + 0.9**5 * value
    returns[4] = sum(0.9**h * rew[h, 0, 4] for h in range(3))
    assert torch.allclose(J, returns.mean(), atol=1e-5)
    target, weight = target.view(5, 6), weight.view(5, 6)
    assert torch.allclose(target[2, 4], rew[2, 0, 4]) and weight[:, 4].tolist() == [1, 1, 1, 0, 0]
    assert (weight[:, :4] == 1).all()


def test_first_order_gradients_through_the_true_plant_improve_a_policy():
    p, args, g = envs.plant("double-pendulum"), pwm.Args(task="double-pendulum"), gen(1)
    torch.manual_seed(0)
    near = 0.2 * torch.randn(64, 4, generator=g)  # near upright it needs to learn to balance only
    policy = pwm.extract(pwm.TruePlant(p, "double-pendulum", 3.0), p.observe(near), 30, 8, g, args)
    with torch.no_grad():
        ours, none = (pwm.play_pendulum(p, act, near, 20)[2].sum(0).mean()
                      for act in (lambda o, t: policy(o[None])[0], lambda o, t: torch.zeros(64, 1)))
    assert ours > none + 1, (ours, none)


def test_verdict_on_gradients_follows_the_rule():
    def curve(at_16, at_50):
        return np.geomspace(at_16 ** (1 + 15 / 34) / at_50 ** (15 / 34), at_50, 50).tolist()
    flat = [1.0] * 50
    true = [dict(variance=curve(0.1, 50), esnr=[0.05] * 50)]
    good = {"true": true, "WM, H = 3": [dict(variance=curve(0.1, 90), esnr=[0.1] * 50)] * 3,
            "WM, H = 16": [dict(variance=curve(0.1, 5), esnr=flat)] * 3}
    assert all(pwm.pendulum_checks(good, 3).values()) and not all(pwm.pendulum_checks(good, 2).values())
    noisy = {**good, "WM, H = 16": [dict(variance=curve(0.1, 20), esnr=flat)] * 3}
    weak = {**good, "WM, H = 16": [dict(variance=curve(0.1, 5), esnr=[0.08] * 50)] * 3}
    tame = {**good, "true": [dict(variance=curve(1, 50), esnr=[0.05] * 50)]}
    assert [list(pwm.pendulum_checks(x, 3).values()).count(False) for x in (noisy, weak, tame)] == [1, 2, 1]


def test_double_pendulum_study_runs_end_to_end(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    result = pwm.main(pwm.Args(task="double-pendulum", fast=True, seeds=1, device="cpu"))
    assert result["verdict"] == "not reproduced" and "cosine to the true mean gradient" in capsys.readouterr().out
    models = result["gradients"]["random"]
    assert set(models) == {"true", "WM, H = 3", "WM, H = 16"} and len(models["true"][0]["esnr"]) == 50
    assert models["true"][0]["cosine"][30] == pytest.approx(1) and (last_run(tmp_path) / "figure3.png").exists()
    assert set(result["returns"]) == {"random", "SHAC, true plant", "PWM, WM, H = 3", "PWM, WM, H = 16"}


# -------------------------------------------------------------------------------- PWM's single tasks: episodes that end
def test_sequences_with_ends_use_every_step_of_short_episodes(tmp_path):
    eps = Episodes.create(tmp_path, {"a-b": (3, 2, 12)})
    lengths, ended = [12, 2, 1, 5], [False, True, True, False]
    for n, (t, term) in enumerate(zip(lengths, ended)):
        o, a, r, flags = episode("a-b", n, t, {"a-b": (3, 2, 12)})
        flags[-1] = term
        eps.append("a-b", o, a, r, flags)
    samplers = [eps.sampler(["a-b"], 4, ends=True, resident=x) for x in (True, False)]
    batch, again = (s.sequences(4000, gen(1)) for s in samplers)
    for x, y in zip(batch, again):
        assert torch.equal(x, y)
    obs, act, rew, task, term, live = batch
    n, t = (rew[0] // 1000).long(), (rew[0] % 1000).long()
    for i in range(4):
        starts = t[n == i]
        # as many as the episode is long: a hundred failures of 20 steps shall not hide a success of 1000
        assert set(starts.tolist()) == set(range(lengths[i])) and abs(len(starts) - 200 * lengths[i]) < 40 * lengths[i]
    step = t + torch.arange(4)[:, None]
    length = torch.tensor(lengths)[n]
    assert torch.equal(live, (step < length).float())
    assert torch.equal(term, ((step == length - 1) & torch.tensor(ended)[n]).float())
    where = torch.minimum(t + torch.arange(5)[:, None], length)
    assert torch.equal(obs[..., 0], 1000.0 * n + where)
    assert torch.equal(act[..., 0][live > 0], obs[:-1, :, 0][live > 0] + .5)
    firsts = samplers[0].starts(4000, gen(2))[0, :, 0]
    assert {int(x) for x in firsts} == {1000 * i + t for i in range(4) for t in range(lengths[i])}


def test_steps_of_several_tasks_with_ends_are_equally_likely(tmp_path):
    dims = {"a-b": (3, 2, 12), "c-d": (3, 2, 12)}
    eps = Episodes.create(tmp_path, dims)
    lengths = {"a-b": [12, 3, 1, 2], "c-d": [2, 8]}  # number 3 of a task is held out
    for task, all_of_it in lengths.items():
        for n, t in enumerate(all_of_it):
            eps.append(task, *episode(task, n, t, dims))
    sampler = eps.sampler(["a-b", "c-d"], 4, ends=True, held_out=0.25)
    _, _, rew, task, _, _ = sampler.sequences(8000, gen(1))
    for k, count in enumerate(([12, 3, 1], [2, 8])):
        n = (rew[0][task == k].long() // 1000).bincount(minlength=len(count)) / (task == k).sum()
        assert torch.allclose(n, torch.tensor(count) / sum(count), atol=0.03)


def test_offset_of_the_critics_follows_the_targets():
    torch.manual_seed(0)
    critics, z = pwm.Critics(2, 16, widths=(8,)), torch.rand(2, 5, 16)
    plain = critics(z)
    assert not critics.offset.any()  # of no effect where it is not used
    target = torch.tensor([[250.0, 252.0], [-10.0, -12.0]])
    critics.follow(target)
    assert torch.allclose(critics(z), plain + torch.tensor([25.1, -1.1])[:, None, None], atol=1e-5)
    for _ in range(100):
        critics.follow(target)
    assert torch.allclose(critics(z) - plain, torch.tensor([251.0, -11.0])[:, None, None].expand(2, 3, 5), atol=0.01)
    for episodic in (True, False):  # tasks with episodes that end use it, the others do not
        nets = episodic_world()
        nets["wm"].requires_grad_(False).episodic = episodic
        opts = pwm.make_optimizers(nets)
        pwm.update_policies((pwm.actor_loss, pwm.critic_loss), nets, opts, torch.rand(1, 4, 3), torch.randn(2, 1, 4, 2),
                            torch.arange(8)[None], torch.zeros(4, dtype=torch.long), pwm.Args())
        assert bool(nets["critics"].offset.any()) == episodic


def episodic_world(seed=0):
    torch.manual_seed(seed)
    wm = pwm.WorldModel(3, [2], 2, 16, 16, 16, 0, episodic=True)
    for p in wm.parameters():
        p.data += 0.1 * torch.randn(p.shape)
    wm.rew_std.fill_(2.0)
    nets = nn.ModuleDict(dict(wm=wm, actors=pwm.Actors(torch.ones(1, 2), 16, (8,)), critics=pwm.Critics(1, 16),
                              stats=pwm.RunningStats(1)))
    return nets


def test_episodic_world_model_loss_against_a_slow_reference():
    wm, H, B = episodic_world()["wm"], 4, 5
    obs, act, rew = torch.randn(H + 1, B, 3), torch.rand(H, B, 2), 4 * torch.randn(H, B)
    term, live = torch.zeros(H, B), torch.ones(H, B)
    term[1, 2], live[2:, 2], rew[0, 0] = 1, 0, 100.0
    task = torch.zeros(B, dtype=torch.long)
    loss, metrics, *_ = pwm.world_model_loss(wm, obs, act, rew, task, 0.9, term, live)
    want = dict(consistency=0, reward=0, end=0)
    for b in range(B):
        z = wm.encode(obs[0, b], task[b])
        for h in range(H):
            r = wm.reward(z, act[h, b], task[b])[0]
            z = wm.next(z, act[h, b], task[b])
            w = 0.9**h / (H * B) * float(live[h, b])
            p = wm.end(z, task[b]).sigmoid()
            want["consistency"] += w * (z - wm.encode(obs[h + 1, b], task[b])).square().mean()
            want["reward"] += w * (r - min(max(float(rew[h, b]) / 2, -5), 5)) ** 2
            want["end"] -= w * (p.log() if term[h, b] else (1 - p).log())
    for k, v in want.items():
        assert float(metrics[k]) == pytest.approx(v.item(), rel=1e-4), k
    total = 20 * want["consistency"] + 0.1 * want["reward"] + want["end"]
    assert loss.item() == pytest.approx(total.item(), rel=1e-4)


def test_imagined_returns_are_weighted_by_the_chance_to_go_on():
    nets, N, B, H, g, lam = episodic_world(), 1, 6, 5, 0.9, 0.8
    wm, actors, critics, stats = (nets[k] for k in ("wm", "actors", "critics", "stats"))
    obs, eps, task = torch.randn(N, B, 3), torch.randn(H, N, B, 2), torch.zeros(B, dtype=torch.long)
    z, rew, alive = pwm.imagine(wm, actors, obs, eps, task)
    assert alive.shape == (H, N, B) and 0 < alive.min() < alive.max() < 1
    v = torch.stack([critics(x).amin(1) for x in z])
    J, so_far = 0, 1
    for h in range(H):
        J, so_far = J + g**h * so_far * rew[h], so_far * alive[h]
    J = J + g**H * so_far * v[H]
    _, got, flat, target, weight = pwm.actor_loss(wm, actors, critics, stats, obs, eps, task, g, lam)
    assert torch.allclose(got, J.mean(1), atol=1e-5)
    reached = torch.cat([torch.ones(1, N, B), alive.cumprod(0)[:-1]])
    assert torch.allclose(weight.view(N, H, B).transpose(0, 1), reached)
    error = [(critics(flat[:, i:i + 1])[0, :, 0] - target[0, i]).square().mean() * weight[0, i] for i in range(H * B)]
    assert torch.allclose(pwm.critic_loss(critics, flat, target, weight), sum(error) / (H * B), rtol=1e-4)
    G = v[H]
    for h in reversed(range(H)):
        G = rew[h] + g * alive[h] * ((1 - lam) * v[h + 1] + lam * G)
        assert torch.allclose(target.view(N, H, B)[:, h], G, atol=1e-5)
    x = torch.rand(4, 7)
    assert torch.equal(pwm.lambda_return(x[:3], x, g, lam), pwm.lambda_return(x[:3], x, g, lam, torch.ones(3, 7)))


class Cliff(gymnasium.Env):
    """A point drifts to the right, is paid for going there, and ends beyond 0.5; at most 60 steps. Best is to stay."""

    observation_space = gymnasium.spaces.Box(-9, 9, (1,), np.float32)
    action_space = gymnasium.spaces.Box(-1, 1, (1,), np.float32)

    def reset(self, *, seed=None, options=None):
        super().reset(seed=seed)
        self.x = self.np_random.uniform(-0.4, 0.4, 1).astype(np.float32)
        return self.x.copy(), {}

    def step(self, action):
        self.x = np.clip(self.x + 0.15 * action + 0.05, -1, 1).astype(np.float32)
        return self.x.copy(), 1.0 + 0.5 * float(action[0]), bool(self.x[0] > 0.5), False, {}


gymnasium.register("Cliff-v0", entry_point=Cliff, max_episode_steps=60)


def test_a_policy_learns_not_to_end_the_episode(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    settings = {**TINY, "task": "test_all:Cliff-v0", "rounds": 3, "seed_episodes": 6, "round_episodes": 4,
                "wm_steps": 400, "wm_batch": 32, "policy_steps": 120, "policy_batch": 16, "horizon": 6,
                "wm_horizon": 4, "wm_lr": 1e-3, "eval_episodes": 4, "first_model": 0.6, "last_model": 0.2,
                "first_policy": 0.3}
    result = pwm.main(pwm.Args(**settings))
    table = result["table"][0]
    assert table["ours"] > 40 > 25 > table["random"], table  # 50 for staying; running right earns 1.5 for a few steps
    rounds = [h for h in result["history"] if "steps" in h]
    assert rounds[0]["length"] < 40 and 6 * 60 <= rounds[0]["steps"] < 12 * 60
    folder = last_run(tmp_path)
    wm = pwm.load_world_model(folder / "checkpoint.pt")
    assert wm.episodic and wm.rew_std < 1
    x = torch.tensor([[0.45], [-0.5]])
    task = torch.zeros(2, dtype=torch.long)
    ends = wm.end(wm.next(wm.encode(x, task), torch.ones(2, 1), task), task).sigmoid()
    assert ends[0] > 0.8 > 0.2 > ends[1]
    films = []  # of the better of the last and the kept policy
    monkeypatch.setattr(pwm, "choose_gl", lambda: None)
    monkeypatch.setattr(pwm, "record", lambda run, tasks, greedy, seed: films.append(greedy.keywords["best"]))
    again = pwm.main(pwm.Args(task=settings["task"], device="cpu", workers=1, eval_only=True, eval_episodes=4,
                              capture_video=True, checkpoint=str(folder / "checkpoint.pt")))
    assert films == [again["table"][0]["best round"] > again["table"][0]["ours"]]
    assert again["table"][0]["ours"] == pytest.approx(table["ours"], abs=8)
    state = torch.load(folder / "checkpoint.pt", weights_only=True)
    assert state["where"]["best"] == max(h["return"][settings["task"]] for h in rounds if h["round"])
    assert not torch.equal(state["best"]["actors.log_std"], state["actors"]["log_std"])  # kept before the last updates
    assert again["table"][0]["best round"] == pytest.approx(table["best round"], abs=8) and table["best round"] > 25
    given = pwm.main(pwm.Args(**{**settings, "data_dir": str(folder / "episodes"), "horizon": 12,
                             "policy_steps": 60}))
    assert given["table"][0]["ours"] > 40  # on given data no environments tell the ends: the head does


def test_episodes_shorter_than_the_horizon_and_a_body_run(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    tiny = {**TINY, "wm_steps": 8, "policy_steps": 4, "seed_episodes": 2, "horizon": 16, "wm_horizon": 16}
    walk = pwm.main(pwm.Args(**{**tiny, "task": WALK, "round_episodes": 1, "workers": 1}))
    assert np.isfinite(walk["table"][0]["ours"]) and walk["args"]["episodic"]
    assert "windows of 16 steps end" in (out := capsys.readouterr().out) and re.search(r"try --horizon [1-6]\n", out)
    stored = Episodes.open(last_run(tmp_path) / "episodes").arrays(WALK)
    assert stored["length"].max() <= 12 and len(stored["length"]) >= 2 * 64
    body = pwm.main(pwm.Args(**{**tiny, "task": "hopper", "seed_episodes": 1, "round_episodes": 1}))
    assert "not comparable: PPO 4742, SAC 4126" in capsys.readouterr().out
    rounds = [h for h in body["history"] if "length" in h]
    assert body["table"][0]["ours"] > -1000 and rounds[0]["length"] < 120 and rounds[0]["window_steps"] == 0
    assert rounds[-1]["window_steps"] % (16 * body["args"]["policy_batch"]) == 0 < rounds[-1]["window_steps"]
    plain = pwm.main(pwm.Args(**{**tiny, "wm_horizon": 3, "horizon": 4, "episodic": False}))
    assert not plain["args"]["episodic"] and "end_head.1.weight" not in torch.load(
        last_run(tmp_path) / "checkpoint.pt", weights_only=True)["wm"]


@pytest.mark.parametrize("settings, words", [
    (dict(task="ball-wall", seeds=1), "--seeds 1.*at least 2"), (dict(task="double-pendulum", seeds=0), "--seeds 0"),
    (dict(task="ball-wall", checkpoint="x.pt"), "study of minutes"),
    (dict(task="cup-catch", seeds=3), "--seeds 3 .*not of --task cup-catch"),
    (dict(task="cup-catch,hopper", episodic=True), "one task.*--no-episodic"),
    (dict(task="cup-catch", ablation="activatoin"), "activatoin: expected all, stiffness, latency or some of activat"),
    (dict(ablation="shared", seeds=1), "--seeds 1: expected 2"), (dict(ablation="all", checkpoint="x.pt"), "its own"),
    (dict(task="cup-catch", shared_policy=True), "two or more"),
    (dict(task="cup-catch", activation="relu", checkpoint="x.pt"), "--activation relu.*whose file says it"),
    (dict(task="hopper", eval_every=-1), "--eval-every -1: expected"),
    (dict(task="hopper", true_plant=True), "hopper has none: type --task planar-hopper or stiff-hopper"),
    (dict(task="hopper", episodic=True, planner_episodes=1), "--planner-episodes.*--no-episodic"),
    (dict(task="hoper"), "nearest: .*hopper")])
def test_bad_flags_of_studies_and_bodies_get_one_sentence(settings, words, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(SystemExit, match=words) as error:
        pwm.main(pwm.Args(device="cpu", **settings))
    assert "\n" not in str(error.value)


# ------------------------------------------------------------------------------------------------- PWM's ablations
def test_ablations_train_variants_on_the_same_data(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    settings = dict(task=f"{TINY['task']},{WALK}", fast=True, seeds=2, device="cpu", workers=1, horizon=4,
                    activation="relu")
    first = pwm.main(pwm.Args(ablation="shared,prior", eval_every=2, **settings))
    names = list(first["cells"])
    assert names == ["base", "one policy for all tasks", "TD-MPC2 without planning"]
    assert [r["variant"] for r in first["rows"]] == [*names[:2], "PWM on TD-MPC2's model", names[2]]
    base, shared, tdmpc2 = (first["cells"][k] for k in names)
    mean = {c: np.array([np.mean(list(x["returns"][c].values())) for x in tdmpc2]) for c in ("ours", "prior")}
    assert first["rows"][2]["returns"] == pytest.approx(mean["ours"])
    assert first["rows"][3]["difference"] == pytest.approx((mean["prior"] - mean["ours"]).mean())
    assert [c["args"]["seed"] for c in base] == [1, 2] and base[0]["args"]["data_dir"] == shared[1]["args"]["data_dir"]
    assert base[0]["errors"] and shared[0]["args"]["shared_policy"] and base[0]["args"]["checkpoint"] is None
    assert shared[1]["args"]["checkpoint"] == base[1]["folder"] + "/checkpoint.pt" and not shared[1]["errors"]
    assert shared[1]["args"]["activation"] == "relu"  # the file says so: a checkpoint made from it must say it again
    curves = [c["curve"] for k in names for c in first["cells"][k]]
    assert [[x for x, _ in curve] for curve in curves] == [[2, 3]] * 6  # of three policy updates
    assert curves[0][-1][1] == pytest.approx(np.mean(list(base[0]["returns"]["ours"].values())), abs=1e-3)
    assert next((tmp_path / "runs").glob("shared*/efficiency.png")).stat().st_size > 5000
    assert first["rows"][0]["ci95"] == [0, 0] and all(r["verdict"] in ("", "undecided") for r in first["rows"])
    out, folder = capsys.readouterr().out, str(tmp_path / "runs" / Path(first["cells"]["base"][0]["folder"]).parts[1])
    assert "minus base, paired" in out and (tmp_path / "runs").is_dir()
    (Path(folder) / "cells" / "base-2.json").unlink()  # as if it had been killed there
    again = pwm.main(pwm.Args(resume=folder))
    assert "base-1" not in capsys.readouterr().out
    assert again["cells"]["base"][1]["returns"]["ours"] == base[1]["returns"]["ours"]


def test_claims_are_judged_by_paired_differences():
    def cells(*returns):
        return [dict(returns=dict(ours={"a": x, "b": x}, prior={"a": 0, "b": 0}), errors={}) for x in returns]
    base = cells(100, 500, 900)
    row = functools.partial(pwm.ablation_row, base=base, tasks=["a", "b"])
    assert row("batch", "v", cells(90, 480, 890), expected=-1)["verdict"] == "holds"
    assert row("batch", "v", cells(110, 520, 910), expected=-1)["verdict"] == "fails"
    assert row("batch", "v", cells(110, 480, 910), expected=-1)["verdict"] == "undecided"
    assert row("batch", "v", cells(90, 480), expected=-1)["verdict"] == "undecided"  # two seeds decide nothing
    assert row("prior", "v", cells(999, 999, 999), expected=-1)["difference"] == -500


def test_shac_and_the_verdict_on_stiffness(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    run, cells = pwm.run_cell, []

    def some(args, folder, name):  # one real training, the others made up
        cells.append(name)
        real = run(args, folder, name) if name == "SHAC-stiff-hopper-1" else None
        return real or dict(returns=dict(ours={args.task: 500.0 + 9 * args.seed}), args=dataclasses.asdict(args))
    monkeypatch.setattr(pwm, "run_cell", some)
    result = pwm.main(pwm.Args(ablation="stiffness", fast=True, seeds=3, device="cpu", workers=1))
    assert len(cells) == 12 and "three seeds or more: 3" in capsys.readouterr().out
    cell = result["rows"]["SHAC, stiff-hopper"]["cells"][0]
    state = torch.load(Path(cell["folder"]) / "checkpoint.pt", weights_only=True)
    assert cell["args"]["true_plant"] and "model" not in state["opts"] and state["where"]["policy_updates"] == 2
    logs = next((tmp_path / "runs").glob("stiffness*/cells/SHAC-stiff-hopper-1.log")).read_text()
    assert "SHAC: gradients through the true plant" in logs and "0 model updates" in logs
    drop = 1 - (cell["returns"]["ours"]["stiff-hopper"] + 518 + 527) / (509 + 518 + 527)
    assert result["verdict"] == ("reproduced" if drop > 0.2 else "not reproduced")
    assert not result["rows"]["PWM, planar-hopper"]["cells"][0]["args"]["true_plant"]


def test_latency_of_policy_and_planner(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    result = pwm.main(pwm.Args(ablation="latency", fast=True, device="cpu"))
    ms = result["ms_per_action"][1]
    assert 0 < ms["ours"] < ms["planner"] and "1M: policy" in capsys.readouterr().out

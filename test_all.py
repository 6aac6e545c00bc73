"""All tests of the top-level files: `python -m pytest -q -n 2 test_all.py studies`, with those of
the studies, in two processes of one thread each. They need no data, no GPU and no network; some
draw (EGL or OSMesa)."""
import ast
import contextlib
import copy
import dataclasses
import errno
import functools
import importlib
import importlib.metadata
import io
import itertools
import json
import math
import os
import re
import shlex
import shutil
import signal
import subprocess
import sys
import tempfile
import time
import types
import zipfile
from collections import OrderedDict
from multiprocessing import get_context
from pathlib import Path

import gymnasium
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
if "PYTEST_XDIST_WORKER" in os.environ:  # side by side: one thread each is faster
    torch.set_num_threads(1)
    os.environ["OMP_NUM_THREADS"] = "1"  # of the scripts that tests start
with contextlib.suppress(SystemExit):  # without OpenGL only the tests that draw fail
    choose_gl()  # now, because mujoco looks at the choice once, when it is imported

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


def gen(seed=0):
    return torch.Generator().manual_seed(seed)


# ----------------------------------------------------------------------------------------- storage
FACTS = {"a-b": (3, 2, 12), "x/y:z": (5, 1, 9)}
LENGTHS = {"a-b": [12, 5, 12, 3, 7, 9, 12, 12, 4, 8], "x/y:z": [9, 9, 2, 6, 5]}


def episode(task, n, t, facts):
    """Values that encode episode n, time, column: obs = 1000 n + t + column/8, act = obs + 0.5."""
    O, A, _ = facts[task]
    base = 1000 * n + np.arange(t + 1)[:, None]
    obs, act = base + np.arange(O) / 8, base[:-1] + 0.5 + np.arange(A) / 8
    return obs, act, 1000.0 * n + np.arange(t), np.zeros(t, bool)


def fill(path, lengths, facts=None):
    facts = facts or FACTS
    eps = Episodes.create(path, facts)
    for task, ts in lengths.items():
        eps.append(task, *zip(*[episode(task, n, t, facts) for n, t in enumerate(ts)]))
    return eps


def snapshot(path):
    files = [p for p in sorted(Path(path).rglob("*")) if p.is_file() and p.name[0] != "."]
    return {p.relative_to(path): p.read_bytes() for p in files}  # a killed rename leaves .x.tmp


def test_round_trip_layout_and_numpy_can_read_it(tmp_path):
    eps = fill(tmp_path, LENGTHS)
    assert eps.counts() == {"a-b": 10, "x/y:z": 5} and eps.tasks == ("a-b", "x/y:z")
    again = Episodes.open(tmp_path)
    assert again.tasks == eps.tasks and again.facts == FACTS
    folder = next(p for p in tmp_path.iterdir() if p.name.startswith("x"))
    assert "/" not in folder.name and ":" not in folder.name
    shapes = {"obs": ((5, 10, 5), "f4"), "act": ((5, 9, 1), "f4"), "rew": ((5, 9), "f4"),
              "term": ((5, 9), "?"), "length": ((5,), "i4")}
    for name, (shape, dtype) in shapes.items():
        x = np.load(folder / f"{name}.npy")
        assert x.shape == shape and x.dtype == np.dtype(dtype)
        assert (x == again.arrays("x/y:z")[name]).all()
    a = again.arrays("a-b")
    assert a["length"].tolist() == LENGTHS["a-b"] and a["obs"][9, 8, 2] == 9008.25
    assert (a["obs"][1, 6:] == 0).all() and (a["act"][1, 5:] == 0).all()
    assert Episodes.open(tmp_path, ["x/y:z"]).tasks == ("x/y:z",)
    sizes = {len(data._header(n, (3, 4), np.dtype("<f4"))) for n in (0, 1, 10**6, 10**12)}
    assert len(sizes) == 1
    assert Episodes.create(tmp_path, FACTS).counts() == eps.counts()
    more = Episodes.create(tmp_path, {"new": (1, 1, 2)})
    assert more.tasks == ("new",) and Episodes.open(tmp_path).tasks == ("a-b", "x/y:z", "new")


def test_append_one_torch_and_bulk_and_go_back(tmp_path):
    eps = Episodes.create(tmp_path, FACTS)
    assert eps.counts()["a-b"] == 0 and eps.arrays("a-b")["obs"].shape == (0, 13, 3)
    eps.append("a-b", *episode("a-b", 0, 4, FACTS))
    eps.append("a-b", *[torch.as_tensor(x) for x in episode("a-b", 1, 12, FACTS)])
    eps.append("a-b", [], [], [], [])
    o, a, r, _ = episode("a-b", 2, 3, FACTS)
    eps.append("a-b", [o], [a], [r], [np.array([False, False, True])])
    x = eps.arrays("a-b")
    assert x["length"].tolist() == [4, 12, 3] and x["obs"][1, 12, 0] == 1012
    assert x["term"][2].tolist() == [False, False, True] + [False] * 9
    state = eps.state_dict()
    eps.append("a-b", *episode("a-b", 7, 12, FACTS))
    eps.load_state_dict(state)
    assert eps.counts() == {"a-b": 3, "x/y:z": 0}
    eps.append("a-b", *episode("a-b", 77, 2, FACTS))
    x = eps.arrays("a-b")
    assert x["length"].tolist() == [4, 12, 3, 2] and x["obs"][3, 0, 0] == 77000
    assert (x["obs"][3, 3:] == 0).all()
    with says("cannot cut", "it has 0"):
        eps.truncate({"a-b": 2, "x/y:z": 9})
    assert eps.counts()["a-b"] == 4


def test_bad_episodes_and_a_full_disk_write_nothing(tmp_path, monkeypatch):
    eps = fill(tmp_path, LENGTHS)
    before = snapshot(tmp_path)
    o, a, r, t = good = episode("a-b", 0, 6, FACTS)
    for i, bad in [(0, np.nan), (0, np.inf), (0, 1e300), (1, np.nan), (2, -np.inf)]:
        x = [o.copy(), a.copy(), r.copy(), t]
        x[i].flat[-1] = bad
        with says("NaN or inf", "nothing was written"):
            eps.append("a-b", *zip(good, x))  # first good, second bad
    for x in [(o[:-1], a, r, t), (o, a[:-1], r, t), (o, a, r, t[:-1]), (o[:, :2], a, r, t),
              (o, a[:, :1], r, t), episode("a-b", 0, 13, FACTS),
              ([o[:1]], [a[:0]], [r[:0]], [t[:0]])]:
        with says("expected", "nothing was written"):
            eps.append("a-b", *x)
    with says("same number"):
        eps.append("a-b", [o], [a, a], [r], [t])
    with says("no task", "nope"):
        eps.append("nope", *good)
    calls, real = [], os.pwrite

    def full(fd, view, at):  # the disk fills in the middle of the second file
        calls.append(at)
        if len(calls) == 3:
            raise OSError(errno.ENOSPC, "No space left on device")
        return real(fd, view[:max(1, len(view) // 2)] if len(calls) == 2 else view, at)
    with monkeypatch.context() as m:
        m.setattr(data.os, "pwrite", full)
        with says("disk is full", "nothing written earlier is lost"):
            eps.append("a-b", *good)
    monkeypatch.setattr(data.shutil, "disk_usage", lambda p: types.SimpleNamespace(free=10))
    with says("free", "nothing was written"):
        eps.append("a-b", *good)
    assert snapshot(tmp_path) == before


def test_crash_between_files_is_overwritten(tmp_path):
    ref = fill(tmp_path / "ref", LENGTHS)
    eps = fill(tmp_path / "x", {k: v[:-2] for k, v in LENGTHS.items()})
    for task in eps.tasks:  # the process died after data and some headers
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
        time.sleep(0.3)
        p.kill()
        p.wait()
        n, x = Episodes.open(tmp_path).counts()["t"], eps.arrays("t")
        rows = [x[name][:, 0].reshape(n, -1) for name in ("obs", "act", "rew")]
        assert n > 0 and all((r == np.arange(n)[:, None]).all() for r in rows)


def test_open_and_create_refuse(tmp_path):
    with says("no episodes", "convert_tdmpc2"):
        Episodes.open(tmp_path / "nothing")
    eps = fill(tmp_path, LENGTHS)
    with says("a-b", "(3, 2, 12)", "(3, 2, 13)"):
        Episodes.create(tmp_path, {"a-b": (3, 2, 13)})
    with says("'..'"):
        Episodes.create(tmp_path, {"..": (1, 1, 1)})
    for call in (lambda: Episodes.open(tmp_path, ["q"]), lambda: eps.arrays("q")):
        with says("no task 'q'", "a-b"):
            call()
    file = eps._file("a-b", "act")
    good, other = file.read_bytes(), io.BytesIO()
    np.save(other, np.zeros((10, 12, 3), np.float32))
    for content, *words in ((good[:-100], "cut short"), (b"hello", "cannot be read"),
                            (other.getvalue(), "meta.json")):
        file.write_bytes(content)
        with says("act.npy", *words):
            Episodes.open(tmp_path)
    file.write_bytes(good)
    meta = file.with_name("meta.json")
    text = meta.read_text()
    newer = text.replace('"format": 1', '"format": 9')
    for content, words in ((newer, "format 9"), ("{", "meta.json")):
        meta.write_text(content)
        with says(words):
            Episodes.open(tmp_path)
    meta.write_text(text)
    assert Episodes.open(tmp_path).counts() == eps.counts()


def test_forty_gigabytes_open_without_reading(tmp_path):
    facts = {f"t{i}": (24, 6, 500) for i in range(4)}
    eps, n = Episodes.create(tmp_path, facts), 160_000  # 4 x 10 GB of holes
    for task in facts:
        for name, (row, dtype) in data._layout(facts[task]).items():
            with open(eps._file(task, name), "r+b") as f:
                f.write(data._header(n, row, dtype))
                f.truncate(f.tell() + n * int(np.prod(row)) * dtype.itemsize)
                if name == "length":
                    f.write(np.full(n, 500, "<i4").tobytes())
    eps = Episodes.open(tmp_path)
    s = eps.sampler(list(facts), 16, resident=False)
    obs = s.sequences(64, gen()).obs
    assert s.nbytes > 39e9 and obs.shape == (17, 64, 24) and (obs == 0).all() and not s.resident
    assert s.starts(8, gen()).shape == (4, 8, 24)
    with says("resident", "GB"):
        eps.sampler(list(facts), 16, resident=True)


def test_frames_sample_windows_and_go_back(tmp_path, monkeypatch):
    frames = data.Frames(tmp_path / "f", 2, 12, 3, size=4)
    for t in range(10):
        obs, act = np.full((2, 4, 4, 3), t), np.full((2, 3), t)
        frames.append(obs, act, [t, -t], [False, t == 3], [t == 0, t == 4])
    obs, act, rew, term, first = frames.sample(5, 4, np.random.default_rng(0))
    assert obs.shape == (2, 5, 4, 4, 4, 3) and obs.dtype == torch.uint8
    assert first.dtype == torch.bool
    assert (rew[0].diff(dim=-1) == 1).all() and (rew[1].diff(dim=-1) == -1).all()
    assert (obs[..., 0, 0, 0] == act[..., 0]).all() and rew[0].min() >= 0 and rew[0].max() <= 9
    assert frames.sample(50, 3, np.random.default_rng(0), tasks=[1], since=6)[2].max() == -6
    state, again = frames.state_dict(), data.Frames(tmp_path / "f", 2, 12, 3, size=4)
    assert again.count == 0 and np.array_equal(again.rew, frames.rew)
    again.load_state_dict(state)
    ten = again.sample(2, 10, np.random.default_rng(0))[2]
    assert all(torch.equal(x[0], sign * torch.arange(10.0)) for x, sign in zip(ten, (1, -1)))
    with says("room for 12 rows", "has 13"):
        again.load_state_dict({"count": 13})
    with says("10 steps", "of a window"):
        frames.sample(1, 11, np.random.default_rng(0))
    with says("expected", "choose another folder"):
        data.Frames(tmp_path / "f", 2, 13, 3, size=4)
    monkeypatch.setattr(data.shutil, "disk_usage", lambda p: types.SimpleNamespace(free=10**6))
    with says("replay of 26 x 100,000 frames", "GB free"):
        data.Frames(tmp_path / "g", 26, 100_000, 18)
    assert not list((tmp_path / "g").iterdir())


# ---------------------------------------------------------------------------------------- sampling
@pytest.mark.parametrize("held", [False, True])
def test_resident_equals_mapped(tmp_path, held, monkeypatch):
    eps = fill(tmp_path, LENGTHS)
    kw = {"tasks": ["x/y:z", "a-b"], "horizon": 4, "held_out": 0.25}
    a, b = eps.sampler(resident=True, **kw), eps.sampler(resident=False, **kw)
    assert a.nbytes == b.nbytes == (10 * 13 + 5 * 10) * ((5 + 2 + 1) * 4 + 1)
    assert a.resident and not b.resident and a.too_short == b.too_short == 2
    ga, gb = gen(3), gen(3)
    for _ in range(5):
        x, y = a.sequences(64, ga, held_out=held), b.sequences(64, gb, held_out=held)
        assert all(torch.equal(p, q) and p.dtype == q.dtype for p, q in zip(x, y))
        assert torch.equal(a.starts(7, ga), b.starts(7, gb))
    assert x.obs.shape == (5, 64, 5) and x.act.shape == (4, 64, 2) and x.task.dtype == torch.int64
    assert x.rew.shape == x.term.shape == x.live.shape == (4, 64) and x.live.min() == 1
    assert eps.sampler(["a-b"], 4).resident and not torch.equal(a.sequences(64, ga).obs, x.obs)
    for name in ("item", "tolist", "__int__", "__bool__", "numpy", "cpu"):
        monkeypatch.setattr(torch.Tensor, name, lambda *a: pytest.fail("sync in a resident batch"))
    assert a.sequences(8, ga).obs.shape == (5, 8, 5) and a.starts(8, ga).shape == (2, 8, 5)


def decode(s, batch, names, facts=FACTS):
    """Check every slice against the encoding; returns (task, episode, start) of each."""
    obs, act, rew, _, _, task = (x.numpy().astype(float) for x in batch)
    out = []
    for b, k in enumerate(task.astype(int)):
        O, A, _ = facts[names[k]]
        n, t = divmod(int(obs[0, b, 0]), 1000)
        want = episode(names[k], n, t + s.horizon, facts)
        assert (obs[:, b, :O] == want[0][t:].astype(np.float32)).all()
        assert (obs[:, b, O:] == 0).all()
        assert (act[:, b, :A] == want[1][t:]).all() and (act[:, b, A:] == 0).all()
        assert (rew[:, b] == want[2][t:]).all()
        out.append((k, n, t))
    return out


@pytest.mark.parametrize("resident", [False, True])
def test_slices_stay_inside_episodes_and_are_uniform(tmp_path, resident):
    names, g, seen = ["a-b", "x/y:z"], gen(), {}
    s = fill(tmp_path, LENGTHS).sampler(names, 5, resident=resident, obs_dim=7, act_dim=4)
    assert s.too_short == 2 + 1
    for _ in range(20):
        for x in decode(s, s.sequences(1000, g), names):
            seen[x] = seen.get(x, 0) + 1
    expected = {}
    for k, name in enumerate(names):  # every start up to length - H inclusive, and no other
        fits = [(n, length - 4) for n, length in enumerate(LENGTHS[name]) if length >= 5]
        for n, room in fits:
            expected |= {(k, n, t): 20_000 / 2 / len(fits) / room for t in range(room)}
    assert set(seen) == set(expected)
    assert all(abs(seen[x] - p) < 6 * p ** 0.5 for x, p in expected.items())
    first = s.starts(20_000, g).numpy()
    assert first.shape == (2, 20_000, 7)
    for k in range(len(names)):
        rows, count = np.unique(first[k, :, 0], return_counts=True)
        found = {(k, *divmod(int(r), 1000)): c for r, c in zip(rows, count)}
        assert set(found) == {x for x in expected if x[0] == k}
        assert all(abs(c - 2 * seen[x]) < 9 * (2 * seen[x]) ** 0.5 for x, c in found.items())


def test_slices_with_ends_use_every_step_of_short_episodes(tmp_path):
    facts = {"a-b": (3, 2, 12), "c-d": (3, 2, 12)}
    lengths, ended = [12, 2, 1, 5], [False, True, True, False]
    eps = Episodes.create(tmp_path, facts)
    for n, (t, term) in enumerate(zip(lengths, ended)):
        o, a, r, flags = episode("a-b", n, t, facts)
        flags[-1] = term
        eps.append("a-b", o, a, r, flags)
    for n, t in enumerate((2, 8)):
        eps.append("c-d", *episode("c-d", n, t, facts))
    one = [eps.sampler(["a-b"], 4, ends=True, resident=x) for x in (True, False)]
    batch, again = (s.sequences(4000, gen(1)) for s in one)
    assert all(torch.equal(x, y) for x, y in zip(batch, again))
    obs, act, rew, term, live, _ = batch
    n, t = (rew[0] // 1000).long(), (rew[0] % 1000).long()
    for i, length in enumerate(lengths):
        starts = t[n == i]
        # as many as it is long: a hundred failures of 20 steps shall not hide a success of 1000
        assert set(starts.tolist()) == set(range(length))
        assert abs(len(starts) - 200 * length) < 40 * length
    step, length = t + torch.arange(4)[:, None], torch.tensor(lengths)[n]
    assert torch.equal(live, (step < length).float())
    assert torch.equal(term, ((step == length - 1) & torch.tensor(ended)[n]).float())
    at = torch.minimum(t + torch.arange(5)[:, None], length)
    assert torch.equal(obs[..., 0], 1000.0 * n + at)
    assert torch.equal(act[..., 0][live > 0], obs[:-1, :, 0][live > 0] + 0.5)
    firsts = one[0].starts(4000, gen(2))[0, :, 0]
    rows = [1000 * i + np.arange(length) for i, length in enumerate(lengths)]
    assert {int(x) for x in firsts} == set(np.concatenate(rows).tolist())
    plain = eps.sampler(["a-b"], 5).sequences(500, gen())  # without ends: flags as stored
    assert plain.live.all() and not plain.term[:, plain.rew[0] >= 3000].any()
    batch = eps.sampler(["a-b", "c-d"], 4, ends=True, held_out=0.25).sequences(8000, gen(1))
    for k, count in enumerate(([12, 2, 1], [2, 8])):  # number 3 is held out
        of_task = batch.rew[0][batch.task == k].long() // 1000
        share = of_task.bincount(minlength=len(count)) / len(of_task)
        assert torch.allclose(share, torch.tensor(count) / sum(count), atol=0.03)


def test_held_out(tmp_path):
    for k, frac in ((20, 0.05), (4, 0.25), (2, 0.5), (3, 1 / 3)):
        before = None
        for n in (3, 4, 5, 45):
            eps = fill(tmp_path / f"{k}-{n}", {"a-b": [12] * n})
            s, g = eps.sampler(["a-b"], 12, held_out=frac), gen(1)
            train = {x[1] for x in decode(s, s.sequences(4500, g), ["a-b"])}
            starts = set((s.starts(3000, g)[0, :, 0].numpy() // 1000).astype(int).tolist())
            held = {x[1] for x in decode(s, s.sequences(1500, g, held_out=True), ["a-b"])}
            assert train == starts
            if n < 4:
                assert held == train == set(range(n))
                continue
            assert held and not held & train and held | train == set(range(n))
            assert abs(len(held) - n * frac) <= 1.5
            assert before is None or (before[0] <= held and before[1] <= train)
            before = held, train
    s = eps.sampler(["a-b"], 12)  # 0.0: nothing is held out
    assert len({x[1] for x in decode(s, s.sequences(4000, gen()), ["a-b"])}) == 45


def test_sampler_refuses_and_skips_empty_tasks(tmp_path):
    eps = fill(tmp_path, {"a-b": [12, 3]})
    s = eps.sampler(["x/y:z", "a-b"], 3)
    assert (s.sequences(50, gen()).task == 1).all()
    assert s.sequences(5, gen(), held_out=True).obs.shape == (4, 5, 5)
    with says("'x/y:z' has no episodes"):
        s.starts(3, gen())
    for tasks, horizon, kw, *words in (
            (["x/y:z"], 3, {}, "none of x/y:z"), (["a-b"], 13, {}, "13 steps", "12"),
            (["a-b"], 3, {"obs_dim": 2}, "obs_dim=2"), (["q"], 3, {}, "no task 'q'"),
            (["a-b"], 0, {}, "expected"), (["a-b"], 3, {"held_out": 0.9}, "expected"),
            (["a-b"], 3, {"held_out": -1}, "expected"), ([], 3, {}, "expected")):
        with says(*words):
            eps.sampler(tasks, horizon, **kw)


# -------------------------------------------------------------------------------- published format
DIMS = {"p": (4, 2), "q": (3, 1), "r": (4, 2)}
PQR = (["p", "q", "r"], DIMS, False)


def tensordicts(monkeypatch, new):
    """A class that pickles under tensordict's names, in the layout of 2023 or of 2025."""
    homes = {"TensorDict": "tensordict._td" if new else "tensordict.tensordict",
             "_StringOnlyDict": "tensordict.utils", "_make_td": "tensordict._reductions"}
    for name in ("tensordict", *homes.values()):
        monkeypatch.setitem(sys.modules, name, types.ModuleType(name))

    class TensorDict:
        def __init__(self, content, batch_size):
            self._tensordict, self._batch_size = content, torch.Size(batch_size)
            self._device, self._td_dim_names, self._is_locked = torch.device("cpu"), None, False

        def __reduce_ex__(self, protocol):
            old = super().__reduce_ex__(protocol)
            return (_make_td, (TensorDict, self.__dict__)) if new else old

    class _StringOnlyDict(dict):
        pass

    def _make_td(cls, state):
        return state
    for x in (TensorDict, _StringOnlyDict, _make_td):
        x.__module__, x.__qualname__ = homes[x.__name__], x.__name__
        setattr(sys.modules[x.__module__], x.__name__, x)
    return lambda content, batch: TensorDict(content if new else _StringOnlyDict(content), batch)


def chunk(n, seed, T=6, start=0):
    """n episodes of mixed tasks; filler row 0: NaN reward, NaN / garbage action."""
    rng = np.random.default_rng(seed)
    task = rng.integers(3, size=n)
    obs, act = rng.normal(size=(n, T + 1, 4)), rng.uniform(-1, 1, (n, T + 1, 2))
    rew = (start + np.arange(n))[:, None] + np.arange(T + 1) / 64
    obs[task == 1, :, 3:], act[task == 1, :, 1:] = 0, 0
    rew[:, 0], act[::2, 0], act[1::2, 0] = np.nan, np.nan, 1e30
    ids = torch.tensor(task)[:, None].expand(-1, T + 1).to(torch.int32).contiguous()
    return {"obs": torch.tensor(obs).float(), "action": torch.tensor(act).float(),
            "reward": torch.tensor(rew).float(), "task": ids}


def write_chunks(src, monkeypatch, sizes=(40, 40, 17), new=False):
    make, out = tensordicts(monkeypatch, new), []
    src.mkdir()
    for i, n in enumerate(sizes):
        out.append(chunk(n, i, start=sum(sizes[:i])))
        torch.save(make(out[-1], (n, 7)), src / f"chunk_{i}.pt")
    monkeypatch.undo()
    assert "tensordict" not in sys.modules
    return {k: torch.cat([c[k] for c in out]).numpy() for k in out[0]}


def check_converted(eps, ref):
    for k, name in enumerate(eps.tasks):
        x, (o, a), sel = eps.arrays(name), DIMS[name], np.flatnonzero(ref["task"][:, 1] == k)
        assert (x["obs"] == ref["obs"][sel, :, :o]).all() and not x["term"].any()
        assert (x["act"] == ref["action"][sel, 1:, :a]).all()
        assert (x["rew"] == ref["reward"][sel, 1:]).all()
        assert (x["length"] == 6).all() and len(sel) == len(x["length"])


@pytest.mark.parametrize("new", [False, True])
def test_convert(tmp_path, monkeypatch, new):
    src, dst = tmp_path / "src", tmp_path / "dst"
    ref = write_chunks(src, monkeypatch, new=new)
    (src / "chunk_2.pt").rename(tmp_path / "later")
    assert sum(convert_tdmpc2(src, tmp_path / "two", *PQR).counts().values()) == 80
    (tmp_path / "later").rename(src / "chunk_2.pt")
    check_converted(convert_tdmpc2(src, tmp_path / "two", *PQR), ref)
    monkeypatch.setattr(data, "SLAB_BYTES", 3000)
    eps = convert_tdmpc2(src, dst, *PQR)
    assert eps.facts == {"p": (4, 2, 6), "q": (3, 1, 6), "r": (4, 2, 6)}
    check_converted(eps, ref)
    for resident in (False, True):  # row 0's NaN filler never reaches a batch
        batch = eps.sampler(eps.tasks, 6, resident=resident).sequences(500, gen())
        assert all(torch.isfinite(x).all() for x in batch)
    before = snapshot(dst)
    convert_tdmpc2(src, dst, *PQR)
    assert snapshot(dst) == before
    assert convert_tdmpc2(tmp_path / "gone", dst, *PQR).counts() == eps.counts()
    with says("other tasks"):
        convert_tdmpc2(src, dst, ["q", "p", "r"], DIMS)
    fill(tmp_path / "other", LENGTHS)
    with says("another origin"):
        convert_tdmpc2(src, tmp_path / "other", *PQR)
    plain = convert_tdmpc2(src, tmp_path / "plain")  # no names, padding kept
    assert plain.tasks == ("task-0", "task-1", "task-2") and plain.facts["task-1"] == (4, 2, 6)


def test_kill_during_conversion_then_rerun_is_identical(tmp_path, monkeypatch):
    write_chunks(tmp_path / "src", monkeypatch, sizes=(150, 150, 60))
    monkeypatch.setattr(data, "SLAB_BYTES", 6000)
    convert_tdmpc2(tmp_path / "src", tmp_path / "ref", *PQR)
    ref, kills, dst = snapshot(tmp_path / "ref"), 0, tmp_path / "dst"
    for _ in range(2):
        args = tmp_path / "src", dst, *PQR
        process = get_context("fork").Process(target=convert_tdmpc2, args=args)
        process.start()
        book, begin = dst / "convert.json", None
        while process.is_alive():  # kill at a random moment after some new slabs
            at = json.loads(book.read_text())["at"] if book.exists() else None
            begin = begin or at
            if at != begin:
                time.sleep(np.random.rand() * 0.02)
                os.kill(process.pid, signal.SIGKILL)
                break
        process.join()
        kills += process.exitcode == -signal.SIGKILL
        if process.exitcode:
            with says("unfinished conversion"):
                Episodes.open(dst)
    assert kills >= 1
    convert_tdmpc2(tmp_path / "src", dst, *PQR)
    assert snapshot(dst) == ref


def test_append_killed_at_every_write_of_a_slab(tmp_path, monkeypatch):
    """The same as kill -9, but at each single system call in turn."""
    write_chunks(tmp_path / "src", monkeypatch, sizes=(12,))
    monkeypatch.setattr(data, "SLAB_BYTES", 2400)
    convert_tdmpc2(tmp_path / "src", tmp_path / "ref", *PQR)
    ref, real = snapshot(tmp_path / "ref"), os.pwrite
    for stop in range(0, 60, 7):
        calls = []

        def write(fd, view, at, calls=calls, stop=stop):
            calls.append(at)
            if len(calls) > stop:
                raise KeyboardInterrupt
            return real(fd, view, at)
        with monkeypatch.context() as m:
            m.setattr(data.os, "pwrite", write)
            m.setattr(data.os, "ftruncate", lambda *a: None)  # a killed process tidies nothing
            with pytest.raises(KeyboardInterrupt):
                convert_tdmpc2(tmp_path / "src", tmp_path / f"{stop}", *PQR)
        convert_tdmpc2(tmp_path / "src", tmp_path / f"{stop}", *PQR)
        assert snapshot(tmp_path / f"{stop}") == ref


def test_convert_bad_input(tmp_path, monkeypatch):
    src, dst, one = tmp_path / "src", tmp_path / "dst", tmp_path / "src" / "chunk_1.pt"
    with says("no chunk_0.pt"):
        convert_tdmpc2(src, dst)
    write_chunks(src, monkeypatch)
    good = one.read_bytes()
    one.unlink()
    with says("no chunk_1.pt", "download"):
        convert_tdmpc2(src, dst, *PQR)
    for content, args, *words in (
            (good[:-1000], PQR, "chunk_1.pt", "cut short"), (good, (["p", "q"], DIMS), "2 names"),
            (good, (["p", "q"], {"p": (4, 2)}), "no (obs_dim, act_dim)", "'q'")):
        one.write_bytes(content)
        with says(*words):
            convert_tdmpc2(src, dst, *args)
    with monkeypatch.context() as m:
        m.setattr(data.shutil, "disk_usage", lambda p: types.SimpleNamespace(free=1000))
        with says("GB free", "nothing was written"):
            convert_tdmpc2(src, dst, *PQR)
    monkeypatch.setattr(data, "SLAB_BYTES", 1000)
    seventh = "NaN or inf", "chunk_1.pt", "episode 7 "
    for what, words in (("obs", seventh), ("reward", seventh), ("action", seventh),
                        ("task", ["more than one task id"]), ("pad", ["beyond", "act_dim 1"])):
        d = safe_load(one, mmap=False)
        if what == "pad":
            d["action"][int((d["task"][:, 1] == 1).nonzero()[0]), 3, 1] = 0.5
        elif what == "task":
            d["task"][7, 4] += 1
        else:
            d[what][7, 2] = float("nan")
        torch.save(d, one)
        with says(*words):
            convert_tdmpc2(src, tmp_path / what, *PQR)
        one.write_bytes(good)  # a corrected file (same size) continues
        book = json.loads((tmp_path / what / "convert.json").read_text())
        if book["chunks"]["chunk_1.pt"] == len(good):
            convert_tdmpc2(src, tmp_path / what, *PQR)
    for content, *words in (({"obs": torch.zeros(3, 7, 4)}, "chunk_1.pt", "expected obs (N,R,O)"),
                            ([1], "holds list"), (chunk(5, 0, T=4), "chunk_1.pt", "mt80")):
        torch.save(content, one)
        with says(*words):
            convert_tdmpc2(src, tmp_path / "y", *PQR)
    assert not dst.exists() or not any(dst.glob("*/meta.json"))


# ------------------------------------------------------------------------------------ hostile files
def equal(a, b):
    if isinstance(b, torch.Tensor):
        return torch.equal(a, b.detach()) and a.dtype == b.dtype
    if isinstance(b, dict):
        return type(a) is dict and list(a) == list(b) and all(equal(a[k], b[k]) for k in b)
    if isinstance(b, (list, tuple)):
        return len(a) == len(b) and all(equal(x, y) for x, y in zip(a, b))
    return a == b


@pytest.mark.parametrize("mmap", [True, False])
def test_safe_load_reads_what_torch_writes(tmp_path, mmap, monkeypatch):
    net = torch.nn.Sequential(torch.nn.Linear(3, 4), torch.nn.LayerNorm(4))
    opt = torch.optim.Adam(net.parameters())
    net(torch.ones(2, 3)).sum().backward()
    opt.step()
    base = torch.arange(24.0).reshape(2, 3, 4)
    dtypes = "bfloat16 half int64 bool uint8 double uint16".split()
    state = {"model": net.state_dict(), "opt": opt.state_dict(), "empty": torch.zeros(0, 3),
             "views": [base, base[:, 1], base.permute(2, 0, 1)], "scalar": torch.tensor(3.0),
             "dtypes": [torch.ones(3, dtype=getattr(torch, d)) for d in dtypes],
             "p": nn.Parameter(torch.ones(2)), "size": torch.Size([1, 2]), "bytes": b"\x00\xff",
             "misc": (1, 2.5, "x", None, True, 10**30)}
    file = tmp_path / "a.pt"
    torch.save(state, file)
    got, raw = safe_load(file, mmap=mmap), file.read_bytes()
    assert equal(got, state)
    got["views"][0].mul_(2)  # writable, shared between views, never reaches the file
    assert got["views"][1][0, 0] == 8 and file.read_bytes() == raw
    for kind in (zipfile.ZIP_DEFLATED, zipfile.ZIP_STORED):  # compressed and unaligned members
        with zipfile.ZipFile(file) as z, zipfile.ZipFile(tmp_path / "c.pt", "w", kind) as c:
            for name in z.namelist():
                c.writestr(name, z.read(name))
        assert equal(safe_load(tmp_path / "c.pt", mmap=mmap), state)
    fortran = np.asfortranarray(np.arange(6, dtype=">i2").reshape(2, 3))
    torch.save({"d": torch.float32, "v": torch.device("cuda", 1), "np": np.float64(2.5),
                "i": np.int32(7), "a": np.arange(6.0).reshape(2, 3), "f": fortran}, file)
    got = safe_load(file, mmap=mmap)
    assert (got["d"], got["v"], got["np"], got["i"]) == (torch.float32, "cuda:1", 2.5, 7)
    assert got["a"].tolist() == [[0, 1, 2], [3, 4, 5]] == got["f"].tolist()
    module = types.ModuleType("pwm_utils")  # an instance of a class that is not there
    monkeypatch.setitem(sys.modules, "pwm_utils", module)
    module.RunningMeanStd = type("RunningMeanStd", (), {"__module__": "pwm_utils"})
    rms = module.RunningMeanStd()
    rms.mean, rms.count = torch.zeros(3), 1e-4
    torch.save({"obs_rms": rms, "w": OrderedDict(a=torch.ones(2))}, file)
    monkeypatch.undo()
    assert equal(safe_load(file, mmap), {"obs_rms": {"mean": torch.zeros(3), "count": 1e-4},
                                         "w": {"a": torch.ones(2)}})


class Evil:
    def __init__(self, *call):
        self.call = call

    def __reduce__(self):
        return self.call[0], self.call[1:]


@pytest.mark.parametrize("make", [
    lambda f: Evil(os.system, f"touch {f}"), lambda f: Evil(eval, f"open({str(f)!r}, 'w')"),
    lambda f: Evil(exec, f"open({str(f)!r}, 'w')"),
    lambda f: Evil(subprocess.check_call, ["touch", str(f)]), lambda f: Evil(getattr, "x", "upper"),
    lambda f: Evil(__import__, "antigravity"), lambda f: Evil(np.load, str(f)),
    lambda f: np.array([Evil(os.system, f"touch {f}")], object), lambda f: np.array([f, None])],
    ids="system eval exec subprocess getattr import npload objectarray objects".split())
def test_malicious_pickles_are_refused(tmp_path, make):
    flag = tmp_path / "flag"
    torch.save({"obs": torch.zeros(2), "x": make(flag)}, tmp_path / "chunk_0.pt")
    for call in (lambda: safe_load(tmp_path / "chunk_0.pt"),
                 lambda: convert_tdmpc2(tmp_path, tmp_path / "dst")):
        with says("refused"):
            call()
    assert not flag.exists() and not (tmp_path / "dst").exists()


def test_files_that_are_none_end_in_one_sentence(tmp_path):
    file = tmp_path / "a.pt"
    with says("no file"):
        safe_load(file)
    for body in (
            b"ctorch\n_C._jit_init\n.", b"cos\nsystem\n(S'touch flag'\ntR.", b"ctorch\nload\n.",
            b"ctorch._utils\n_rebuild_qtensor\n.", b"\x80\x04\x8c\x08builtins\x8c\x04eval\x93.",
            b"\x80\x02\x82\x01.", b"ctorch.hub\nload\n.", b"cnumpy\nloadtxt\n.",
            b"ctensordict\nos\n.", b"ctorch\nos.system\n.", b"", b"garbage", b"(lp0\ng0\na.",
            b"\x80\x02]q\x00h\x00a."):
        with zipfile.ZipFile(file, "w") as z:
            z.writestr("a/data.pkl", body)
            z.writestr("a/version", "3\n")  # so that it comes to reading the pickle
        with says("a.pt"):
            safe_load(file)
    with zipfile.ZipFile(file, "w") as z:
        z.writestr("readme", "x")
    for content in (file.read_bytes(), b"", b"PK", b"hello world", b"\x80\x02}."):
        file.write_bytes(content)
        with says("a.pt"):
            safe_load(file)
    torch.save({"x": torch.zeros(1000), "y": [1]}, file)
    raw = file.read_bytes()
    for n in (30, 500, 2000, len(raw) - 1):
        file.write_bytes(raw[:n])
        with says("cut short"):
            safe_load(file)


# ------------------------------------------------------------------------------------------- Run
@dataclasses.dataclass
class ToyFlags:
    root: str
    task: str = "t"
    seed: int = 0
    resume: str | None = None
    save_every: float = 0.0
    workers: int = 1
    pair: tuple = (1, 2)
    poison: int = -1


def toy(args, event=lambda i: None):
    """Two rounds of four stages on data.Run; event(its number) is called within each piece."""
    args = data.resumed(args)
    run, seen = Run("toy", args, root=args.root, log_every=2), {"play": 0.0, "pieces": 0}
    torch.manual_seed(0)
    net, rng = nn.Linear(2, 1), gen()
    opt = torch.optim.Adam(net.parameters(), 0.1)
    run.keeps(facts=dict(size=2), net=net, opt=opt, rng=rng, seen=seen, nothing=None)
    run.expects(play=6, model=10, policy=4)

    def piece():
        event(seen["pieces"])
        seen["pieces"] += 1
        loss = (net(torch.rand(8, 2, generator=rng)) - seen["play"]).square().mean()
        opt.zero_grad()
        loss.backward()
        opt.step()
        return loss.detach()
    for r in run.rounds(2):
        for _ in run.once("play", 3):
            seen["play"] += float(piece())
        for step in run.steps("model", 5):
            loss = piece() * (math.nan if seen["pieces"] == args.poison else 1)
            run.note({"loss": loss}, step=step)
        for _ in run.steps("policy", 2, log_every=1):
            run.note(loss=piece())
        for _ in run.once("check"):
            run.history.append({"round": r, "x": float(piece())})
            run.log({"eval/x": run.history[-1]["x"]})
    weight = net.weight.tolist()
    return run.finish(dict(weight=weight, seen=seen, history=run.history, steps=run.step))


def lines_of(folder):
    rows = [json.loads(x) for x in (Path(folder) / "metrics.jsonl").read_text().splitlines()]
    return [{k: v for k, v in r.items() if k not in ("time", "charts/UPS")} for r in rows]


def numbers_of(result):
    kept = {k: result[k] for k in ("weight", "seen", "history", "steps")}
    return kept, lines_of(result["folder"])


def only(root):
    (folder,) = Path(root).glob("t__toy__0__*")
    return str(folder)


@pytest.mark.parametrize("how", ["crash", "SIGINT", "SIGTERM"])
def test_run_stopped_at_every_piece_and_resumed_ends_at_the_same_numbers(tmp_path, how):
    want = numbers_of(toy(ToyFlags(str(tmp_path / "whole"))))
    assert [r["step"] for r in want[1]] == [2, 4, 5, 6, 7, 7, 9, 11, 12, 13, 14, 14]
    before = signal.getsignal(signal.SIGINT), signal.getsignal(signal.SIGTERM)
    for stop in range(18):
        root = tmp_path / str(stop)

        def event(i, stop=stop):
            if i == stop and how == "crash":
                raise ZeroDivisionError
            if i == stop:
                os.kill(os.getpid(), getattr(signal, how))
        if how == "crash":
            with pytest.raises(ZeroDivisionError):
                toy(ToyFlags(str(root)), event)
        else:
            with says("stopped", f"--resume {only(root) if root.exists() else root}"):
                toy(ToyFlags(str(root)), event)
        assert (signal.getsignal(signal.SIGINT), signal.getsignal(signal.SIGTERM)) == before
        again = ToyFlags(str(root), resume=only(root), save_every=0.0)
        if how == "crash" and not stop:
            with says("no", "checkpoint.pt", "without --resume"):
                toy(again)
        else:
            assert numbers_of(toy(again)) == want, stop
    assert numbers_of(toy(again)) == want  # finished: nothing is done again


def test_run_killed_goes_on_and_a_second_signal_does_not_wait(tmp_path, monkeypatch):
    want = numbers_of(toy(ToyFlags(str(tmp_path / "whole"))))
    for stop in (3, 8, 13):
        root = tmp_path / str(stop)

        def event(i, stop=stop):
            if i == stop:
                os.kill(os.getpid(), signal.SIGKILL)
        process = get_context("fork").Process(target=toy, args=(ToyFlags(str(root)), event))
        process.start()
        process.join()
        assert process.exitcode == -signal.SIGKILL
        with open(Path(only(root)) / "metrics.jsonl", "ab") as f:
            f.write(b'{"step": 5, "lo')  # killed in the middle of a line
        assert numbers_of(toy(ToyFlags(str(root), resume=only(root)))) == want

    def read(run, shared=False):  # a signal that comes while a step is told waits for the next
        if run.step == 4:
            os.kill(os.getpid(), signal.SIGINT)
        return real(run, shared)
    real = Run._read
    with monkeypatch.context() as m, says("stopped"):
        m.setattr(Run, "_read", read)
        toy(ToyFlags(str(tmp_path / "told"), save_every=1e9))
    folder = only(tmp_path / "told")
    assert torch.load(Path(folder) / "checkpoint.pt")["_run"]["at"] == [0, 2, 0]
    assert numbers_of(toy(ToyFlags(str(tmp_path / "told"), resume=folder))) == want

    def twice(i):
        if i == 2:
            os.kill(os.getpid(), signal.SIGINT)
            time.sleep(0.1)  # two signals at once would count as one
            os.kill(os.getpid(), signal.SIGINT)
            time.sleep(0.1)
    before = signal.signal(signal.SIGINT, signal.default_int_handler)  # xdist ignores Ctrl-C
    try:
        with pytest.raises(KeyboardInterrupt):
            toy(ToyFlags(str(tmp_path / "twice")), twice)
    finally:
        signal.signal(signal.SIGINT, before)


def test_run_never_keeps_what_is_not_finite(tmp_path):
    with says("step 3", "round 0", "nan", "smaller learning rate"):
        toy(ToyFlags(str(tmp_path), poison=4))
    state = torch.load(Path(only(tmp_path)) / "checkpoint.pt", weights_only=True)
    assert state["seen"]["pieces"] == 3 and state["_run"]["at"] == [0, 1, 2] and state["size"] == 2
    with says("not finite"):  # noticed late: only when something is printed
        toy(ToyFlags(str(tmp_path / "late"), poison=6, save_every=1e9))


def test_run_tells_the_time_left(tmp_path, capsys, monkeypatch):
    now = [1000.0]
    monkeypatch.setattr(data.time, "time", lambda: now[0])

    def event(i):
        now[0] += 60 if i in (0, 8) else 1
    result = toy(ToyFlags(str(tmp_path), save_every=1e9), event)
    lines = [x for x in capsys.readouterr().out.splitlines() if x.startswith("round")]
    left = [x.partition(" | ")[2] for x in lines]  # nothing while policy has not been seen at work
    assert left == ["", "", "0:01:07 left", "0:00:05 left", "0:00:02 left", ""]
    assert lines[1].startswith("round 0: model 5/5, 1.0/s, loss ") and result["seconds"] == 136


def test_run_folder_and_results(tmp_path, capsys):
    args = ToyFlags(str(tmp_path), task="a/b:c,d")
    result = toy(args)
    folder = Path(result["folder"])
    assert folder.name.startswith("a%2Fb%3Ac,d__toy__0__") and list(folder.glob("events.*"))
    assert {"data.py", "envs.py", "args.json"} <= {p.name for p in folder.iterdir()}
    saved = json.loads((folder / "results.json").read_text())
    assert saved["args"]["pair"] == [1, 2] and saved["hardware"] and saved["seconds"] >= 0
    assert saved["command"].startswith("python ") and saved["weight"] == result["weight"]
    assert "commit" in saved
    assert f"files: {folder}/" in capsys.readouterr().out
    assert toy(args)["folder"] != result["folder"]  # two starts within one second
    thirty = ",".join(f"walker-{i}" for i in range(30))
    many = Run("pwm", ToyFlags(str(tmp_path), task=thirty), tmp_path)
    assert len(many.dir.name) < 120 and "+29" in many.dir.name and not list(tmp_path.rglob("*.tmp"))


def test_run_copies_the_script(tmp_path):
    (tmp_path / "my.py").write_text(
        f"import sys; sys.path.insert(0, {HERE!r})\nimport data, dataclasses\n"
        "fields = [('task', str, 't'), ('seed', int, 0), ('resume', str, None)]\n"
        "print(data.Run('my', dataclasses.make_dataclass('Args', fields)()).dir)")
    out = subprocess.check_output([sys.executable, "my.py"], cwd=tmp_path, text=True)
    assert (tmp_path / out.strip() / "my.py").exists()


def test_run_inside_a_folder_is_silent_and_goes_on(tmp_path, capsys):
    args, made = ToyFlags(str(tmp_path), save_every=0), []

    def cell(stop):
        run, net = Run("toy", args, inside=tmp_path / "cell"), nn.Linear(1, 1)
        run.keeps(net=net)
        for i in run.steps("model", 4):
            made.append(i)
            if i == stop:
                os.kill(os.getpid(), signal.SIGINT)
        run.close()
    with pytest.raises(KeyboardInterrupt):
        cell(2)
    cell(-1)
    assert made == [0, 1, 2, 3] and not capsys.readouterr().out
    assert {p.name for p in (tmp_path / "cell").iterdir()} == {"checkpoint.pt", "metrics.jsonl"}


def test_run_of_two_ranks_iterates_alike_and_one_writes(tmp_path):
    code = f"""
import sys; sys.path.insert(0, {HERE!r})
import dataclasses, torch, data
fields = [("task", str, "t"), ("seed", int, 0), ("resume", str, None)]
args = dataclasses.make_dataclass("Args", fields)()
rank, world = data.join_ranks(torch.device("cpu"))
run, seen = data.Run("toy", args, {str(tmp_path)!r}), []
run.keeps(w=dict(x=torch.ones(1)))
for r in run.rounds(2):
    for _ in run.once("play"):
        seen.append("play")
    for step in run.steps("model", 3, log_every=3, shared=True):
        seen.append(step)
        run.note(x=float(rank))
result = run.finish(dict(x=1))
assert seen == ["play", 0, 1, 2] * 2 and (result is None) == (rank == 1) and world == 2
"""
    env = {**os.environ, "WORLD_SIZE": "2", "MASTER_ADDR": "localhost", "MASTER_PORT": "29631"}
    both = [subprocess.Popen([sys.executable, "-c", code], env=env | {"RANK": r}) for r in "01"]
    assert [p.wait(100) for p in both] == [0, 0]
    assert [r["losses/model/x"] for r in lines_of(only(tmp_path))] == [0.5, 0.5]  # means


def test_checkpoint_refuses_and_survives(tmp_path, monkeypatch):
    args, held = ToyFlags(str(tmp_path)), {"x": 1}
    run = Run("toy", args, tmp_path)
    run.keeps(held=held)
    with says("no", "checkpoint.pt"):
        run.load()
    run.save()
    for bad, words in (({"b": [np.float64(1)]}, "state['held']['b'][0]"), ({"b": {1, 2}}, "set"),
                       ({"b": np.zeros(2)}, "ndarray"), ({np.int64(1): 2}, "key"),
                       ({"b": Evil(print)}, "Evil"), ({"b": torch.float32}, "dtype")):
        run.keeps(held=bad)
        with says(words, "checkpoints hold"):
            run.save()
    run.keeps(held=held, net=nn.Linear(2, 2), p={"p": nn.Parameter(torch.ones(2))})
    run.save("model.pt")
    assert run.load()["held"] == {"x": 1} and set(run.load("model.pt")["net"]) == {"weight", "bias"}
    held["x"] = 2
    run.save()

    def full(state, f, **kw):
        f.write(b"half")
        raise OSError(errno.ENOSPC, "No space left on device")

    def broken(state, f, **kw):
        raise RuntimeError("PytorchStreamWriter failed writing file")
    held["x"] = 3
    for failing in (full, broken):
        with monkeypatch.context() as m:
            m.setattr(torch, "save", failing)
            with says("checkpoint.pt"):
                run.save()
    with monkeypatch.context() as m:
        m.setattr(data.shutil, "disk_usage", lambda p: types.SimpleNamespace(free=10))
        with says("free"):
            run.save()
    assert run.load()["held"] == {"x": 2} and not list(run.dir.glob(".*"))
    args.resume = str(run.dir)
    with says("'other' of the checkpoint is missing", "copy of the code"):
        Run("toy", args).keeps(other={})
    with says("'net' of the checkpoint is missing or does not fit", "copy of the code"):
        Run("toy", args).keeps(net=nn.Linear(3, 2))
    raw = (run.dir / "checkpoint.pt").read_bytes()
    evil = io.BytesIO()
    torch.save({"x": Evil(os.system, f"touch {tmp_path / 'flag'}")}, evil)
    for content in (raw[:-40], b"", b"junk", raw[:300], evil.getvalue()):
        (run.dir / "checkpoint.pt").write_bytes(content)
        with says("damaged"):
            run.load()
    assert not (tmp_path / "flag").exists()


def test_flags_are_refused_in_one_sentence(tmp_path, monkeypatch):
    folder = toy(ToyFlags(str(tmp_path)))["folder"]
    saved = data.resumed(ToyFlags(str(tmp_path), resume=folder, workers=7))
    assert saved.pair == (1, 2) and saved.workers == 7 and saved.resume == folder
    assert data.resumed(ToyFlags("x")) == ToyFlags("x")
    with says("--seed", "is 0, not 3", "leave --seed out"):
        data.resumed(ToyFlags(str(tmp_path), resume=folder, seed=3))
    for place in (tmp_path, tmp_path / "nothing"):
        with says("no readable args.json", "runs/<name>"):
            data.resumed(ToyFlags("x", resume=str(place)))
        with says("no readable args.json"):
            Run("toy", ToyFlags("x", resume=str(place)))
    with says("--pair is unknown here", "another version"):
        data.resumed(dataclasses.make_dataclass("A", [("resume", str, folder)])())
    for script, task in (("other", "t"), ("toy", "u")):
        with says("is a run of toy on 't'"):
            Run(script, ToyFlags("x", task=task, resume=folder))
    with says("--save-every 3", "nobody reads it; leave it out"):
        data.refuse(ToyFlags("x", save_every=3), "seed save_every", "nobody reads it")
    data.refuse(ToyFlags("x", save_every=3), "seed pair", "nobody reads it")
    for ranges, words in ((dict(seed=(1, None)), "--seed 0 is out of range: expected at least 1"),
                          (dict(seed=(1, 2)), "expected 1 to 2"),
                          (dict(save_every=(None, 5)), "--save-every nan is out of range")):
        with says(words):
            data.check_ranges(ToyFlags("x", save_every=math.nan), ranges)
    data.check_ranges(ToyFlags("x"), dict(seed=(0, 0), resume=(1, 2), workers=(None, None)))
    moved = {"--task ant": "--task studies.bodies:ant", "--old": "python -m studies.old"}
    for words, new in (("--root x --task ant", "type --task studies"),
                       ("--old=3", "type python -m"), ("--task=ant", "--task ant has moved")):
        monkeypatch.setattr(sys, "argv", ["x.py", *words.split()])
        with says(new):
            data.parse(ToyFlags, "doc", moved)
    monkeypatch.setattr(sys, "argv", ["studies/x.py", "--root", "a b", "--task", "old"])
    assert data.parse(ToyFlags, "doc", moved) == ToyFlags("a b", task="old")
    assert data.command_line() == "python -m studies.x --root 'a b' --task old"
    if not torch.cuda.is_available():
        with says("no GPU", "--device cpu"):
            data.choose_device("cuda")
        assert data.choose_device("auto")[0].type == "cpu"


def work(name, cell, folder):
    if cell["x"] < 0:
        raise ValueError(name)
    return {"y": cell["x"] ** 2, "pid": os.getpid()}


def test_cells_are_kept_and_run_side_by_side(tmp_path, capsys):
    cells = {"a": {"x": 1}, "b/c": {"x": -1}}
    with pytest.raises(ValueError):
        data.run_cells(work, cells, tmp_path)
    kept = (tmp_path / "cells" / "a.json").read_text()
    cells = {"a": {"x": 5}, "b/c": {"x": 2}, "d": {"x": 3}}
    result = data.run_cells(work, cells, tmp_path, workers=2, tell=lambda r: f"y {r['y']}")
    assert [r["y"] for r in result.values()] == [1, 4, 9] and result["d"]["cell"] == "d"
    assert (tmp_path / "cells" / "a.json").read_text() == kept
    assert result["d"]["pid"] != os.getpid() == result["a"]["pid"]
    out = capsys.readouterr().out
    assert "2/2" in out and ("y 9 | 0:00:00 left" in out or "y 4 | 0:00:00 left" in out)


# -------------------------------------------------------------------------------------- statistics
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
    code = (f"import sys; sys.path.insert(0, {HERE!r}); import data; assert not set(sys.modules) & "
            "{'envs', 'pwm', 'h5py', 'tensorboard', 'matplotlib', 'gymnasium', 'tyro'}")
    subprocess.run([sys.executable, "-c", code], check=True)


def test_a_quick_cpu_still_computes_in_float32():
    before = torch.get_float32_matmul_precision()
    try:
        data.quick_cpu()
        a, b = torch.randn(2, 64, 512, generator=gen())
        error = ((a @ b.T).double() - a.double() @ b.double().T).abs().max()
        assert error < 1e-3  # bfloat16: about 0.3
    finally:
        torch.set_float32_matmul_precision(before)


# ------------------------------------------------------------------------------------------ envs.py
OWN_TASKS = '''
import gymnasium, numpy as np, envs

class Walk(gymnasium.Env):  # a seeded random walk that ends by itself after 3 to 12 steps
    action_space = gymnasium.spaces.Box(-2.0, 4.0, (1,), np.float32)
    observation_space = gymnasium.spaces.Dict(
        x=gymnasium.spaces.Box(-99.0, 99.0, (2,), np.float64),
        n=gymnasium.spaces.Box(0.0, 99.0, (), np.float64))

    def __init__(self, fault=""):
        self.fault = fault

    def _obs(self):
        return {"x": self.x.copy(), "n": np.array(float(self.n))}

    def reset(self, *, seed=None, options=None):
        super().reset(seed=seed)
        self.x, self.n = self.np_random.normal(size=2), 0
        self.end = int(self.np_random.integers(3, 13))
        return self._obs(), {}

    def step(self, action):
        assert self.action_space.contains(action), action
        self.n += 1
        self.x = self.x + 0.1 * action + 0.1 * self.np_random.normal(size=2)
        if self.n == 3 and self.fault == "nan":
            self.x[0] = np.nan
        if self.n == 3 and self.fault == "raise":
            raise ValueError("the gripper fell off")
        done = self.n == self.end
        return self._obs(), float(self.x[0]), done, False, {"is_success": done and self.x[0] > 0}

class Dot(Walk):  # with a picture and flat observations
    metadata = {"render_modes": ["rgb_array"]}
    observation_space = gymnasium.spaces.Box(-99.0, 99.0, (3,), np.float64)

    def _obs(self):
        return np.array([*self.x, self.n])

    def render(self):
        return np.full((20, 20, 3), self.n, np.uint8)

def rows(n, seed, workers, mode="DISABLED", make=Dot):
    return gymnasium.vector.SyncVectorEnv(
        [make] * n, autoreset_mode=getattr(gymnasium.vector.AutoresetMode, mode))

for name, fault in (("Walk", ""), ("WalkNaN", "nan"), ("WalkRaise", "raise")):
    gymnasium.register(f"{name}-v0", entry_point=Walk, kwargs={"fault": fault})
facts = envs.Facts(obs_dim=3, act_dim=1, episode_length=9, action_repeat=1, scale=4.0, ends=True)
make = lambda seed, obs: Dot()
envs.register("own_tasks:dot", facts, make)
envs.register("own_tasks:dots", facts, make, batch=rows)
envs.register("own_tasks:again", facts, make, batch=lambda *a: rows(*a, "SAME_STEP"))
envs.register("own_tasks:bad-dots", facts, make,
              batch=lambda *a: rows(*a, make=lambda: Dot("nan")))
envs.register("own_tasks:twice", facts._replace(action_repeat=2), make)
envs.register("own_tasks:more", facts, make, batch=lambda n, *a: rows(n + 1, *a))
envs.register("own_tasks:wide", facts._replace(obs_dim=4), make)
'''
OWN_FOLDER = tempfile.mkdtemp()  # a light module: worker processes import it too
(Path(OWN_FOLDER) / "own_tasks.py").write_text(OWN_TASKS)
sys.path.insert(0, OWN_FOLDER)
WALK, DOT = "own_tasks:Walk-v0", "own_tasks:dot"


def wave(width):
    """A row-wise deterministic policy: no row sees another; a redone episode comes out the same."""
    def act(obs, job, t):
        assert len(obs) == len(job) == len(t) and obs.dtype == np.float32
        phase = obs[:, :1] + 0.7 * t[:, None] + job[:, None] + np.arange(width)
        return np.sin(phase).astype(np.float32)
    return act


def idle(obs, job, t):
    return np.zeros((len(obs), 1))


def plain_loop(jobs, act, width):
    """What Workers.rollout must equal: one environment after the other."""
    out = []
    for j, (task, seed) in enumerate(jobs):
        env = envs.make_env(task)
        obs, acts, steps = [env.reset(seed=seed)[0]], [], []
        while not (steps and (steps[-1][1] or steps[-1][2])):
            row = np.zeros((1, width), np.float32)
            row[0, :len(obs[-1])] = obs[-1]
            acts.append(act(row, np.array([j]), np.array([len(acts)]))[0][:env.facts.act_dim])
            after, *step = env.step(acts[-1])
            obs.append(after)
            steps.append(step)
        rew, term, _, info = zip(*steps)
        out.append(dict(task=task, seed=seed, obs=np.stack(obs), act=np.stack(acts),
                        rew=np.array(rew, np.float32), term=np.array(term),
                        success=info[-1]["success"], ret=float(sum(rew))))
        env.close()
    return out


def same_episodes(a, b):
    assert len(a) == len(b)
    for x, y in zip(a, b, strict=True):
        assert list(x) == list(y)
        for key in x:
            np.testing.assert_array_equal(x[key], y[key], err_msg=f"{x['task']} {x['seed']} {key}")
            assert getattr(x[key], "dtype", None) == getattr(y[key], "dtype", None)


JOBS = [("walker-walk", 3), (WALK, 1), ("mw-reach", 5), ("cup-spin", 2), (WALK, 7),
        ("Pendulum-v1", 0), (DOT, 8), ("walker-walk", 4), ("mw-reach", 6)]


# -------------------------------------------------------------------------------------------- tasks
@pytest.mark.parametrize("task, w, seed, ret", [
    ("walker-walk-backwards", 0.1, 1, 30.19), ("walker-run-backwards", 0.1, 1, 16.45),
    ("cheetah-run-backwards", 0.1, 1, 17.93), ("cheetah-run-front", 0.1, 1, 8.98),
    ("cheetah-run-back", 0.1, 1, 28.70), ("cheetah-jump", 0.1, 1, 190.49),
    ("pendulum-spin", 0.1, 1, 254.85), ("reacher-three-easy", 0.02, 1, 41.0),
    ("reacher-three-hard", 0.02, 0, 18.0), ("cup-spin", 0.5, 1, 290.79),
    ("hopper-hop-backwards", 0.5, 3, 2.30)])
def test_custom_task_parity(task, w, seed, ret):
    env = envs._load_suite(task, seed)
    env.reset()
    phase = np.arange(env.action_spec().shape[0])
    played = sum(env.step(np.sin(w * i + phase)).reward for i in range(1000))
    assert played == pytest.approx(ret, rel=0.02)


@pytest.mark.parametrize("task", ["walker-run", "cup-catch", "finger-turn-hard", "fish-swim",
                                  "acrobot-swingup", "point_mass-easy", "cheetah-jump",
                                  "humanoid_CMU-stand", "quadruped-walk"])
def test_direct_stepping_equals_dm_control(task):
    env, other = envs.make_env(task, seed=11), envs._load_suite(task, 11)
    obs, _ = env.reset(seed=11)
    step = other.reset()
    rng, spec = np.random.default_rng(0), other.action_spec()
    middle, half = (spec.maximum + spec.minimum) / 2, (spec.maximum - spec.minimum) / 2
    n = 500 if task == "walker-run" else 60
    for t in range(n + 1):
        want = np.concatenate([np.ravel(x) for x in step.observation.values()])
        np.testing.assert_array_equal(obs, want.astype(np.float32))
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
    assert facts == env.facts and facts[2:] == (500, 2, 1000.0, False)
    assert env.metadata["render_fps"] in (12, 20, 25, 50)
    assert obs.shape == (facts.obs_dim,) and info == {"success": 0.0}
    obs, rew, *_ = env.step(np.zeros(facts.act_dim, np.float32))
    assert obs.dtype == np.float32 and 0 <= rew <= 2


def test_names_facts_and_scores():
    from metaworld.env_dict import ALL_V3_ENVIRONMENTS
    assert len(envs.MT30) == 30 and len(set(envs.METAWORLD50)) == 50
    assert envs.MT80 == envs.MT30 + envs.METAWORLD50 and envs.MT80[79] == "mw-hand-insert"
    assert envs.MT30[19] == "walker-walk-backwards" and envs.MT80[30] == "mw-assembly"
    assert len(envs.MT10) == 10 and set(envs.MT10) <= set(envs.METAWORLD50)
    assert {f"{n[3:]}-v3" for n in envs.METAWORLD50} == set(ALL_V3_ENVIRONMENTS)
    sizes = np.array([envs.task_facts(task)[:2] for task in envs.MT80])
    assert [*sizes[:30].max(0)] == [24, 6] and [*sizes.max(0)] == [39, 6]
    assert envs.task_facts("mw-reach") == envs.Facts(39, 4, 100, 2, 0.0, False)
    assert envs.task_facts("Pendulum-v1") == envs.Facts(3, 1, 200, 1, None, True)
    assert envs.task_facts(WALK) == envs.Facts(3, 1, 1000, 1, None, True)
    assert envs.task_facts(DOT) == envs.Facts(3, 1, 9, 1, 4.0, True)
    scores = [envs.score(*x) for x in (
        ("walker-walk", 500, 0), ("mw-reach", 900, 1), ("Pendulum-v1", -300, 0), (DOT, 6, 0),
        ("Boxing", 12.1, 0), ("Boxing", 0.1, 0), ("Boxing@m0d1", 12.1, 0))]
    assert scores == pytest.approx([0.5, 1.0, -300.0, 1.5, 1, 0, 1])


@pytest.mark.filterwarnings("ignore")  # that observations are unbounded is intended
@pytest.mark.parametrize("task", ["cartpole-swingup", "cup-spin", "reacher-three-hard",
                                  "point_mass-easy", "lqr-lqr-2-1", "mw-assembly", "Pendulum-v1",
                                  WALK, DOT])
def test_gymnasium_check_env(task):
    check_env(envs.make_env(task), skip_render_check=True)


@pytest.mark.parametrize("task", [
    "walker-walk", "reacher-three-easy", "cup-spin", "hopper-hop-backwards", "swimmer-swimmer6",
    "mw-assembly", "mw-reach", "mw-peg-insert-side", "mw-lever-pull", "mw-drawer-open",
    "Pendulum-v1", WALK, DOT])
def test_reset_seed_fixes_the_episode(task):
    used, fresh = envs.make_env(task, seed=1), envs.make_env(task, seed=2)
    acts = np.random.default_rng(0).uniform(-1, 1, (12, *used.action_space.shape))

    def play(env, seed):
        out = [env.reset(seed=seed)[0]]
        for a in acts:
            obs, rew, term, trunc, _ = env.step(a.astype(np.float32))
            out += [obs, np.float32(rew)]
            if term or trunc:
                break
        return np.hstack(out)

    before = play(used, 5)  # leaves traces of an earlier episode behind
    np.testing.assert_array_equal(play(used, 9), play(fresh, 9))
    np.testing.assert_array_equal(play(used, 5), before)
    assert not np.array_equal(used.reset()[0], used.reset()[0])  # unseeded resets go on drawing
    first, again = (envs.make_env(task, seed=2).reset()[0] for _ in range(2))
    np.testing.assert_array_equal(first, again)


def test_metaworld_episodes_and_pixels_from_the_moved_camera():
    env = envs.make_env("mw-reach")
    assert len({tuple(env.reset()[0][-3:]) for _ in range(3)}) == 3  # goals
    for t in range(100):
        obs, rew, terminated, truncated, info = env.step(np.ones(4))
        assert not terminated and truncated == (t == 99) and 0 <= rew <= 20
        assert isinstance(info["success"], float)
    assert np.abs(obs[-3:]).sum() > 0  # the goal stays visible after steps
    options = dict(obs="pixels", camera="corner4", repeat=1, length=500)
    env, again = envs.make_env("mw-reach", **options), envs.make_env("mw-reach", **options)
    obs, _ = env.reset(seed=0)
    assert obs.shape == (64, 64, 3) and env.action_space.shape == (4,)
    assert env.facts[2:] == (500, 1, 0.0, False) and env.metadata["render_fps"] == 80
    table = obs[40:].astype(float).mean((0, 1))
    assert table[0] > table[2] + 20  # the wooden table is at the bottom: not upside down
    assert np.array_equal(again.reset(seed=0)[0], obs)
    again._frame = lambda: obs  # drawing 500 of them takes long
    assert [again.step(np.zeros(4))[3] for _ in range(500)] == [False] * 499 + [True]


def breakout(seed, n=40, **options):
    env = envs.make_env("Breakout", obs="pixels", **options)
    first, _ = env.reset(seed=seed)
    obs, *rest, infos = zip(*[env.step([1, 3, 4, 1][t % 4]) for t in range(n)])
    return np.stack([first, *obs]), [*zip(*rest, [info["life_lost"] for info in infos])]


def test_atari_games_follow_the_protocol():
    assert len(envs.ATARI26) == 26 and set(mow.STORM_RETURN) == set(envs.ATARI26)
    for game, n in dict(Alien=18, Breakout=4, Freeway=3, UpNDown=6, KungFuMaster=14).items():
        assert len(envs.make_env(game, obs="pixels").legal) == n
    env = envs.make_env("Boxing", obs="pixels")
    check_env(env, skip_render_check=True)
    facts = envs.task_facts("Boxing@m0d1")
    assert facts == env.facts == envs.Facts(12288, 18, 27_000, 4, 12.0, True)
    (a, ra), (b, rb), (c, _) = breakout(3), breakout(3), breakout(4)
    assert np.array_equal(a, b) and ra == rb and not np.array_equal(a, c)
    still = dict(sticky=0.0)  # then nothing is left to chance
    assert np.array_equal(breakout(3, **still)[0], breakout(4, **still)[0])
    assert not np.array_equal(*(breakout(seed, noop=30, **still)[0] for seed in (3, 4)))
    lost = breakout(3, n=60)[1]
    assert any(x[3] for x in lost) and not any(x[1] for x in lost[:20])  # the game goes on
    assert not any(x[3] for x in breakout(3, n=60, life_loss=False)[1])
    assert [x[2] for x in breakout(3, n=5, frame_cap=20)[1]] == [False] * 4 + [True]


def test_atari_frames_are_averages_over_areas_and_maxima_of_two_frames():
    rows = envs._areas(210, 64)
    assert rows.shape == (64, 210) and np.allclose(rows.sum(1), 1)
    assert np.allclose(rows.sum(0), 64 / 210, atol=1e-6)
    screen = np.random.default_rng(0).integers(0, 256, (210, 160, 3), np.uint8)
    env = envs.make_env("Boxing", obs="pixels")
    large = torch.from_numpy(screen).double().repeat_interleave(32, 0).repeat_interleave(2, 1)
    want = F.avg_pool2d(large.permute(2, 0, 1)[None], (105, 5))[0].permute(1, 2, 0)
    assert np.abs(env._shrink(screen).astype(float) - want.numpy()).max() <= 0.51
    env.reset(seed=0)
    frames, real, names = [], env._env, ("getScreenRGB", "game_over", "lives")

    def act(a):
        rew = real.act(a)
        frames.append(real.getScreenRGB())
        return rew
    env._env = types.SimpleNamespace(act=act, **{name: getattr(real, name) for name in names})
    obs = env.step(2)[0]
    assert len(frames) == 4
    assert np.array_equal(obs, env._shrink(np.maximum(frames[2], frames[3])))


def small_game(task, seed, choose):
    """The frames, rewards and actions of an episode, in which choose(env) plays."""
    env = envs.make_env(task, obs="pixels")
    frames, rews, acts, over = [env.reset(seed=seed)[0]], [], [], False
    while not over:
        acts.append(choose(env))
        obs, rew, terminated, over, _ = env.step(acts[-1])
        frames.append(obs), rews.append(rew)
        assert not terminated
    return np.stack(frames), rews, acts


def knows_the_rules(env):
    """Straight to the nearest thing, or to the nearest place that has not been painted."""
    goals, (row, col) = env._things, env._me
    if env.task == "paint":
        goals = [x for x in np.ndindex(6, 6) if x not in goals] or [env._me]
    elif env.task in envs._FALLING:
        goals = [(row, goals[0][1])]
    y, x = min(goals, key=lambda goal: abs(goal[0] - row) + abs(goal[1] - col))
    turn = -1 if env.task == "mirror-catch" else 1
    move = (0, turn * np.sign(x - col)) if x != col else (np.sign(y - row), 0)
    return envs._MOVES.index(move)


@pytest.mark.parametrize("task", envs.GAMES)
def test_small_games_can_be_won_and_random_play_gets_what_the_table_says(task):
    check_env(envs.make_env(task, obs="pixels"), skip_render_check=True)
    (random, best), facts = envs.GAMES[task], envs.task_facts(task)
    assert facts[2:] == (60, 1, best - random, False)
    assert [envs.score(task, x, 0) for x in (random, best)] == pytest.approx([0, 1])
    rng = np.random.default_rng(0)
    got = [[sum(small_game(task, seed, choose)[1]) for seed in range(60)]
           for choose in (lambda env: int(rng.integers(facts.act_dim)), knows_the_rules)]
    assert abs(np.mean(got[0]) - random) < 4 * np.std(got[0]) / 60 ** 0.5 + 0.1  # rounded
    assert abs(np.mean(got[1]) - best) < 4 * np.std(got[1]) / 60 ** 0.5 + 0.1
    assert task not in envs._FALLING or set(got[1]) == {10.0}
    frames, rews, acts = small_game(task, 3, knows_the_rules)
    again = small_game(task, 3, lambda env: acts[env.t])
    assert np.array_equal(frames, again[0]) and rews == again[1]
    assert not np.array_equal(frames, small_game(task, 4, knows_the_rules)[0])
    assert frames.shape == (61, 64, 64, 3) and not frames[:, :2].any() and not frames[:, 62:].any()
    assert (frames[:, 2:62, 2:62] == frames[:, 2:62:10, 2:62:10].repeat(10, 1).repeat(10, 2)).all()
    with envs.Fleet([task]) as fleet:  # and in a process it is the same game
        assert fleet.legal == [list(range(facts.act_dim))]
        assert np.array_equal(fleet.reset([3])[0], frames[0])
        for t in range(60):
            fleet.send([acts[t]], [4])
            (obs, rew, terminated, truncated, _), = fleet.receive()
            assert rew == rews[t] and truncated == (t == 59) and not terminated
            assert truncated or np.array_equal(obs, frames[t + 1])


def test_mirror_catch_looks_like_catch_and_moves_the_other_way():
    catch, mirror, same = (small_game(task, 7, lambda env, a=a: a)[0] for task, a in (
        ("catch", 1), ("mirror-catch", 2), ("mirror-catch", 1)))  # 1: left, 2: right
    assert np.array_equal(catch, mirror) and not np.array_equal(catch, same)


# ------------------------------------------------------------------------------------- side by side
@pytest.mark.parametrize("task", ["InvertedPendulum-v5", "hopper-hop", DOT, "own_tasks:dots"])
def test_rows_equal_single_environments_and_go_on_from_their_actions(task):
    facts = envs.task_facts(task)
    acts = np.random.default_rng(0).uniform(-1, 1, (40, 3, facts.act_dim))
    with envs.beside(task, 3, 4, 1) as rows, envs.beside(task, 3, 5, 1) as other:
        out = [rows.reset()]
        for act in acts[:20]:
            out.append(rows.step(act))
        state = {k: torch.as_tensor(v) for k, v in rows.state_dict().items()}
        for act in acts[20:]:
            out.append(rows.step(act))
        assert any(x[2].any() for x in out[1:]) == facts.ends
        other.seed = 4
        np.testing.assert_array_equal(other.load_state_dict(state), out[20][0])
        for act, want in zip(acts[20:], out[21:]):
            for x, y in zip(other.step(act), want, strict=True):
                np.testing.assert_array_equal(x, y)
        with says("(2, ", "expected finite (3, "):
            rows.step(acts[0, :2])
    for i in range(3):  # every row alone
        env, want, k = envs.make_env(task), None, 0
        for t, act in enumerate(acts):
            if t == 0 or want[2] or want[3]:
                (seed,) = np.random.SeedSequence([4, i, k]).generate_state(1)
                start, k = env.reset(seed=int(seed))[0], k + 1
                np.testing.assert_array_equal(out[t][0][i] if t else out[0][i], start)
            want = env.step(act[i].astype(np.float32))
            obs, rew, term, trunc, last = (x[i] for x in out[t + 1])
            np.testing.assert_array_equal(last, want[0])
            assert rew == np.float32(want[1]) and (term, trunc) == want[2:4]
            assert term or trunc or (obs == last).all()
    assert (k > 2) == facts.ends


def test_a_registered_family_draws_is_truncated_and_has_its_own_scale():
    env = envs.make_env(DOT, obs="pixels", size=10)
    frames = [env.reset(seed=0)[0]] + [env.step(np.zeros(1))[0] for _ in range(2)]
    assert [f.shape for f in frames] == [(10, 10, 3)] * 3 and [f.max() for f in frames] == [0, 1, 2]
    with envs.Fleet([DOT, DOT]) as fleet:
        assert fleet.legal == [None, None] and fleet.reset([0, 1])[1].shape == (64, 64, 3)
    with envs.Workers(1) as workers:
        episodes = workers.rollout([(DOT, seed) for seed in range(20)], idle)
    ends = {(len(e["rew"]), bool(e["term"][-1])) for e in episodes}
    assert (9, False) in ends and len(ends) > 3
    assert all(t < 9 for t, terminated in ends if terminated) and max(ends)[0] == 9
    env, once = envs.make_env("own_tasks:twice"), envs.make_env(DOT)
    env.reset(seed=1), once.reset(seed=1)
    (obs, rew, *_), first, second = (x.step(np.ones(1)) for x in (env, once, once))
    assert np.array_equal(obs, second[0]) and rew == first[1] + second[1]


# ---------------------------------------------------------------------------------------- roll-outs
@pytest.fixture(scope="module")
def want():
    return plain_loop(JOBS, wave(6), 39)


@pytest.mark.parametrize("n, max_envs", [(2, 64), (2, 3)])
def test_rollout_equals_plain_loop(want, n, max_envs):
    calls, seen, act = [], [], wave(6)

    with envs.Workers(n, max_envs) as workers:
        got = workers.rollout(JOBS, lambda o, j, t: (calls.append(len(o)), act(o, j, t))[1],
                              lambda *x: seen.append(x))
        same_episodes(got, want)
        if max_envs == 64:
            one = workers.rollout(JOBS[1:2] * 2, lambda o, j, t: act(o, j * 0 + 1, t)[:, :1])
            same_episodes(one, [want[1]] * 2)
            assert workers.rollout([], act) == []
        pids = [p.pid for p, _ in workers.procs]
    assert max(calls) == min(max_envs, len(JOBS)) and seen == sorted(seen)
    assert seen[-1][0] == seen[-1][1]
    own = [e for e in got if e["task"] in (WALK, DOT)]
    assert all(len(e["rew"]) <= 12 for e in own) and any(e["term"][-1] for e in own)
    assert not any(e["term"].any() for e in got if e not in own)
    for pid in pids:
        with pytest.raises(ProcessLookupError):
            os.kill(pid, 0)


def test_same_policy_calls_for_any_number_of_workers():
    traces, act = {1: [], 3: []}, wave(1)
    for n, calls in traces.items():
        with envs.Workers(n, 4) as workers:
            workers.rollout([(WALK, s) for s in range(12)] + [("Pendulum-v1", 1)],
                            lambda *x, to=calls: (to.append([y.copy() for y in x]), act(*x))[1])
    assert len(traces[1]) == len(traces[3])
    for one, three in zip(sum(traces[1], []), sum(traces[3], []), strict=True):
        np.testing.assert_array_equal(one, three)


def test_killed_worker_is_replaced_and_its_episodes_redone(want, capsys):
    act, kills = wave(6), []
    with envs.Workers(2) as workers:
        def killer(obs, job, t):
            if t.max() in (30, 60) and len(kills) < 2:
                kills.append(workers.procs[len(kills)][0].pid)
                os.kill(kills[-1], signal.SIGKILL)
            return act(obs, job, t)

        same_episodes(workers.rollout(JOBS, killer), want)
        err = capsys.readouterr().err
        assert len(kills) == 2 and all(f"pid {pid}" in err for pid in kills)
        assert "walker-walk" in err
        os.kill(workers.procs[1][0].pid, signal.SIGKILL)  # dead between two roll-outs
        got = workers.rollout(JOBS[1:3], lambda o, j, t: act(o, j + 1, t)[:, :4])
        same_episodes(got, [{**e, "act": e["act"][:, :4]} for e in want[1:3]])


def test_third_death_stops():
    with envs.Workers(1) as workers:
        with says("while playing Pendulum-v1", "third death", "max_envs"):
            workers.rollout([("Pendulum-v1", 0)], lambda *x: (
                os.kill(workers.procs[0][0].pid, signal.SIGKILL), idle(*x))[1])
        assert len(workers.rollout([("Pendulum-v1", 0)], idle)) == 1  # still usable


def alive(pid):  # a zombie that waits for a lazy init is dead enough
    try:
        return Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()[0] != "Z"
    except FileNotFoundError:
        return False


def test_an_import_is_light_and_workers_need_no_guard_and_exit_with_their_parent(tmp_path):
    script = tmp_path / "script.py"
    script.write_text(f"""
import sys, time; sys.path.insert(0, {HERE!r})
import envs, numpy as np
print({{'torch', 'dm_control', 'metaworld', 'mujoco'}} & set(sys.modules))
workers = envs.Workers(2)
jobs = [("Pendulum-v1", 0), ("Pendulum-v1", 1)]
print(len(workers.rollout(jobs, lambda o, j, t: np.zeros((len(o), 1)))))
print(*[p.pid for p, _ in workers.procs], flush=True); time.sleep(60)""")
    parent = subprocess.Popen([sys.executable, script], stdout=subprocess.PIPE, text=True)
    assert [parent.stdout.readline().strip() for _ in range(2)] == ["set()", "2"]
    pids = [int(p) for p in parent.stdout.readline().split()]
    parent.kill()
    assert parent.communicate()[0] == ""  # the processes did not run the script again
    until = time.time() + 5
    while any(map(alive, pids)) and time.time() < until:
        time.sleep(0.05)
    assert len(pids) == 2 and not any(map(alive, pids))


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
        assert all(np.array_equal(a, s[0]) for a, s in zip(again, steps))
        assert not np.array_equal(first[0], again[0])
        os.kill(fleet.procs[1][0].pid, signal.SIGKILL)
        fleet.send([0, 0], [1, 1])
        with says("Pong died", "--resume"):
            fleet.receive()


# ---------------------------------------------------------------------------------------- bad input
def stepped(env, act, speed=None):
    with contextlib.closing(env):
        env.reset()
        if speed:
            env._physics.data.qvel[:] = speed
        for _ in range(20):
            env.step(act)


def played(*tasks, act=idle):
    with envs.Workers(1) as workers:
        workers.rollout([(task, 0) for task in tasks], act)


@pytest.mark.parametrize("call, words", [
    (lambda: envs.make_env("walker-wlak"), "unknown task 'walker-wlak' | walker-walk"),
    (lambda: envs.make_env("mw-asembly"), "mw-assembly"),
    (lambda: envs.make_env("Pendulum"), "Pendulum-v1"),
    (lambda: envs.task_facts("cup_spin"), "cup-spin"),
    (lambda: envs.make_env("zzzzzz"), "nearest: none"),
    (lambda: envs.make_env("own_tasks:Walkk-v0"), "own_tasks:Walkk-v0 | Walk-v0"),
    (lambda: envs.make_env("own_tasks:dott"), "own_tasks:dott | own_tasks:dot,"),
    (lambda: envs.make_env("no_such_module:Walk-v0"), "no_such_module | module that Python"),
    (lambda: envs.make_env("CartPole-v1"), "CartPole-v1 | Discrete | continuous Box"),
    (lambda: envs.make_env("walker-walk", obs="rgb"), "obs='rgb' | 'state' or 'pixels'"),
    (lambda: envs.make_env("walker-walk", sticky=0.1), "sticky | no options"),
    (lambda: envs.make_env("ant"), "ant has moved | type --task studies.bodies:ant"),
    (lambda: envs.task_facts("ball-wall"), "type --task studies.plants:ball-wall"),
    (lambda: envs.make_env("Pong"), "Pong has no state | obs='pixels'"),
    (lambda: envs.make_env("catch"), "catch has no state | obs='pixels'"),
    (lambda: envs.make_env("chase", obs="pixels", size=5), "size of 6 or more | size=5"),
    (lambda: envs.make_env("Pong@m9d9", obs="pixels"), "Pong@m<mode>d<difficulty>"),
    (lambda: envs.make_env(WALK, obs="pixels").reset(), "draws no frames | obs='state'"),
    (lambda: envs.make_env("own_tasks:wide"), "own_tasks:wide | (4, 1) | (3, 1)"),
    (lambda: envs.register("dot", envs.Facts(3, 1, 9, 1), None), "'dot' | 'module:name'"),
    (lambda: envs.register("a:dot", (3, 1, 9, 1), None), "(3, 1, 9, 1) | Facts(obs_dim"),
    (lambda: envs.beside(DOT, 0), "n=0 | 1 or more"),
    (lambda: envs.beside("own_tasks:again", 2), "AutoresetMode.DISABLED | SAME_STEP"),
    (lambda: envs.beside("own_tasks:more", 2), "has 3 rows | expected 2"),
    (lambda: stepped(envs.beside("own_tasks:bad-dots", 2), np.zeros((2, 1))),
     "bad-dots | non-finite observation"),
    (lambda: stepped(envs.beside("own_tasks:WalkNaN-v0", 2), np.zeros((2, 1))),
     "WalkNaN | non-finite reward | step 2"),
    (lambda: envs.Workers(0), "n=0 | 1 or more of each"),
    (lambda: envs.Fleet(["Boxin"]), "nearest | Boxing"),
    (lambda: played("Pendulum-v1", "own_tasks:WalkNaN-v0"), "WalkNaN | non-finite | step"),
    (lambda: played("Pendulum-v1", "own_tasks:WalkRaise-v0"), "WalkRaise | gripper fell off"),
    (lambda: played("Pendulum-v1", act=lambda o, j, t: np.zeros((1, 3))),
     "shape (1, 3) | expected (1, 1)"),
    (lambda: stepped(envs.make_env("walker-walk"), np.full(6, np.nan)),
     "walker-walk | non-finite action | step 0"),
    (lambda: stepped(envs.make_env("cheetah-run"), np.ones(6), speed=1e12),
     "cheetah-run | non-finite | step")])
def test_bad_input_of_envs_is_one_sentence(call, words, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)  # MuJoCo writes a log
    with says(*words.split(" | ")):
        call()


def test_a_missing_package_or_opengl_is_one_sentence(monkeypatch):
    for module in ("metaworld", "metaworld.env_dict", "ale_py"):
        monkeypatch.setitem(sys.modules, module, None)
    with says("pip install metaworld==3.1.1"):
        envs.make_env("mw-reach")
    with says("pip install ale-py==0.12.1"):
        envs.make_env("Pong", obs="pixels")
    monkeypatch.delenv("MUJOCO_GL", raising=False)
    failed = subprocess.CompletedProcess([], 1)
    monkeypatch.setattr(envs.subprocess, "run", lambda *a, **k: failed)
    with says("libegl1", "libosmesa6", "MUJOCO_GL"):
        envs.make_env("walker-walk", obs="pixels")
    assert "MUJOCO_GL" not in os.environ
    monkeypatch.setenv("MUJOCO_GL", "glfw")
    assert envs.choose_gl() == "glfw"


PWM_TESTS = __name__  # the module that registers the tasks below


# ------------------------------------------------------------------------------------------- maths
def tiny_world(n=3, seed=0):
    """A small world model with n tasks of 1..n actions, stacked networks and their optimisers."""
    torch.manual_seed(seed)
    wm = pwm.WorldModel(7, range(1, n + 1), 2, enc_hidden=16, hidden=24, latent=16,
                        task_dim=4 if n > 1 else 0)
    nn.init.normal_(wm.reward_head[-1].weight, std=0.3)  # a reward that differs between states
    return with_policies(wm, n)


def ending_world(seed=0):
    """A small world model of a task that ends, with its policy."""
    torch.manual_seed(seed)
    wm = pwm.WorldModel(3, [2], 2, 16, 16, 16, 0, ends=True)
    for p in wm.parameters():
        p.data += 0.1 * torch.randn(p.shape)
    wm.rew_std.fill_(2.0)
    return with_policies(wm, 1)


def with_policies(wm, n):
    nets = dict(wm=wm, actors=pwm.Actors(wm.act_mask, 16), critics=pwm.Critics(n, 16),
                stats=pwm.RunningStats(n))
    return nn.ModuleDict(nets)


def opts_of(nets):
    names = "actors", "critics"
    return {k: torch.optim.Adam(nets[k].parameters(), 5e-4, pwm.BETAS) for k in names}


def batch_of(obs, act, rew, task, term=None, live=None):
    term = torch.zeros_like(rew) if term is None else term
    live = torch.ones_like(rew) if live is None else live
    return pwm.Batch(obs, act, rew, term, live, task)


def improve(nets, opts, obs, noise, orders, task, alive=None, imagine=pwm.imagine,
            returns=pwm.imagined_returns, error=pwm.critic_loss, batches=4):
    """The body of pwm.train's policy loop."""
    wm, actors, critics, stats = (nets[k] for k in ("wm", "actors", "critics", "stats"))
    z, rew, alive = imagine(wm, actors, obs, noise, task, alive)
    J, target, weight = returns(critics, z, rew, alive, 0.99, 0.95)
    stats.update(J.detach())
    loss = pwm.actor_loss(J, stats.var)
    pwm.descend(loss, opts["actors"], 1.0, len(actors.log_std))
    actors.clamp_std()
    z, target, weight = (pwm.by_task(x) for x in (z[:-1].detach(), target, weight))
    for order in orders:
        for m in order.chunk(batches):
            critic = error(critics, z[:, m], target[:, m], weight[:, m])
            pwm.descend(critic, opts["critics"], 100.0, critics.n)
    return dict(loss=loss.detach(), critic=critic.detach(), J=J.detach())


def policy_inputs(n, B=6, H=5, passes=2, seed=0):
    g = gen(seed)
    return (torch.randn(n, B, 7, generator=g), torch.randn(H, n, B, 3, generator=g),
            torch.rand(passes, H * B, generator=g).argsort(1))


@pytest.mark.parametrize("size, mt80, world", [
    (1, False, 632_101), (5, False, 1_599_717), (19, False, 5_603_301), (48, False, 18_983_909),
    (317, False, 108_280_805), (48, True, 19_188_581)])
def test_parameter_counts_are_the_published_ones(size, mt80, world):
    tasks = envs.MT80 if mt80 else envs.MT30
    with torch.device("meta"):
        dims = pwm.model_dims(size, len(tasks), mt80)
        wm = pwm.WorldModel(39 if mt80 else 24, [6] * len(tasks), **dims)
    assert sum(p.numel() for p in wm.parameters()) == world


def test_two_hot_against_its_definition():
    x = torch.tensor([0.0, 0.5, 2.0, -3.0, 1e9, -1e9, 20_000.0])
    t = pwm.two_hot(x)
    assert torch.allclose(t.sum(-1), torch.ones(7)) and ((t > 0).sum(-1) <= 2).all()
    bins = torch.linspace(-10, 10, 101)
    assert torch.allclose((t * bins).sum(-1), pwm.symlog(x).clamp(-10, 10), atol=1e-5)
    inside = x[x.abs() < 1e4]
    back = pwm.two_hot_inv((pwm.two_hot(inside) + 1e-12).log())
    assert torch.allclose(back, inside, rtol=1e-4, atol=1e-4)
    pseudo = pwm.two_hot_inv((t[2:3] + 1e-12).log(), pseudo=True)
    assert torch.allclose(pseudo, torch.tensor([3.0]).log(), atol=1e-4)
    logits = torch.randn(7, 101)
    slow = -(t * logits.log_softmax(-1)).sum(-1)
    assert torch.allclose(pwm.two_hot_loss(logits, x), slow, atol=1e-5)
    for width in (1, 100):  # a scalar head is not silently read as classes
        with pytest.raises(RuntimeError, match="expanded size"):
            pwm.two_hot_inv(torch.randn(7, width))


def test_a_world_model_decodes_its_own_reward_head():
    for nets, width in ((tiny_world(), 101), (ending_world(), 1)):
        wm = nets["wm"]
        z, act = torch.rand(2, 16), torch.rand(2, wm.act_mask.shape[1])
        logits = wm.reward(z, act, torch.zeros(2, dtype=torch.long))
        assert logits.shape == (2, width)
        want = logits[:, 0] if width == 1 else pwm.two_hot_inv(logits)
        assert torch.equal(wm.reward_value(logits), want)


def test_lambda_return_against_equations_7_and_8():
    H, gamma, lam = 6, 0.9, 0.7
    r, v = torch.randn(H, 5, dtype=torch.float64), torch.randn(H + 1, 5, dtype=torch.float64)

    def n_step(t, h):  # Eq. (7)
        return sum(gamma**k * r[t + k] for k in range(h)) + gamma**h * v[t + h]

    for t in range(H):
        n = H - t  # Eq. (8): weights (1 - lam) lam^(h-1), the longest return takes the rest
        slow = (1 - lam) * sum(lam**(h - 1) * n_step(t, h) for h in range(1, n))
        slow = slow + lam**(n - 1) * n_step(t, n)
        assert torch.allclose(pwm.lambda_return(r, v, gamma, lam)[t], slow)
    assert torch.allclose(pwm.lambda_return(r, v, gamma, 0.0), r + gamma * v[1:])
    assert torch.allclose(pwm.lambda_return(r, v, gamma, 1.0)[0], n_step(0, H))
    plain, alive = pwm.lambda_return(r, v, gamma, lam), torch.ones(H, 5, dtype=torch.float64)
    assert torch.equal(plain, pwm.lambda_return(r, v, gamma, lam, alive))


def test_updates_are_shared_out_over_rounds():
    assert pwm.shares(1000, 4, 0.1, 0.3) == [100, 300, 300, 300]
    assert pwm.shares(7, 1, 0.1, 0.3) == [7]
    assert pwm.shares(100, 2, 0.25, 0.2) == [25, 75] and sum(pwm.shares(997, 12, 0.25, 0.2)) == 997
    falls = [pwm.late_fall(x) for x in (0.0, 0.5, 0.75, 1.0)]
    assert falls == pytest.approx([1, 1, 0.515, 0.03]) and pwm.between(4, 1, 1 / 3) == 3


def test_seeds_beyond_32_bits_are_mapped_and_others_stay():
    assert pwm.small_seed(10**9) == 10**9 and 0 <= pwm.small_seed(10**6 * 5000) < 2**32
    assert len({pwm.small_seed(10**6 * 5000 + i) for i in range(99)}) == 99


def test_fast_activations_equal_torchs_and_their_gradients():
    x = torch.cat([torch.randn(64, 16).double() * 4, torch.tensor([[-90.0, 90.0] * 8]).double()])
    assert torch.allclose(pwm.mish(x), F.mish(x), atol=1e-12)
    assert torch.allclose(pwm.simnorm(x), x.view(-1, 2, 8).softmax(-1).view(-1, 16), atol=1e-12)
    x = x[:4].requires_grad_()
    assert torch.autograd.gradcheck(pwm.mish, x) and torch.autograd.gradcheck(pwm.simnorm, x)


# ----------------------------------------------------------------------------- networks and losses
def test_initialisation():
    wm = pwm.WorldModel(24, [6] * 30, **pwm.model_dims(5, 30))
    w = wm.dynamics[1].weight
    assert abs(w.std() - 0.02) < 5e-4 and (wm.dynamics[1].bias == 0).all()
    assert (wm.task_emb.weight.abs() <= 0.02).all()
    logits = wm.reward(torch.rand(4, 512), torch.rand(4, 6), torch.arange(4))
    assert (logits == 0).all()
    z = wm.encode(torch.randn(9, 24), torch.arange(9))
    assert torch.allclose(z.view(9, -1, 8).sum(-1), torch.ones(9, 64), atol=1e-5)


def test_padded_actions_are_masked_and_get_no_gradient():
    actors = tiny_world()["actors"]
    a = actors(torch.rand(3, 5, 16), torch.randn(3, 5, 3))
    assert (a[0, :, 1:] == 0).all() and (a[1, :, 2:] == 0).all() and (a[2] != 0).all()
    a.square().sum().backward()
    assert (actors.log_std.grad[0, 0, 1:] == 0).all() and actors.log_std.grad[0, 0, 0] != 0


def agent_of(task, **flags):
    """An Agent on the CPU."""
    flags = dict(device="cpu", compile=False, workers=1) | flags
    tasks = pwm.tasks_of(task)
    args = pwm.fill_args(pwm.Args(task=task, **flags), torch.device("cpu"), tasks)
    return pwm.Agent(args, tasks, torch.device("cpu"))


def test_world_model_learns_and_keeps_its_rules():
    agent = agent_of("cup-catch,walker-walk,finger-spin", model_size=1)
    wm, opt, g = agent.wm, agent.opt["model"], gen()
    obs = torch.randn(5, 32, 24, generator=g).cumsum(0) * 0.3
    batch = batch_of(obs, torch.rand(4, 32, 6, generator=g), obs[1:, :, 0].abs(),
                     torch.randint(3, (32,), generator=g))
    with torch.no_grad():
        wm.task_emb.weight.mul_(1000)
    before, losses = {k: v.detach().clone() for k, v in wm.named_parameters()}, []
    for _ in range(60):
        pwm.set_rates(opt, 1e-3, 0.9)
        loss, metrics, z = agent.functions.world_model_loss(batch, 0.99)
        pwm.descend(loss, opt, 20.0)
        agent.after_model_step(z, batch, metrics)
        losses.append(loss.item())
    assert losses[-1] < 0.7 * losses[0]
    assert all((v != before[k]).any() for k, v in wm.named_parameters())  # all are trained
    assert (wm.task_emb.weight.norm(dim=1) <= 1 + 1e-6).all()
    assert [round(g["lr"] / 9e-4, 6) for g in opt.param_groups] == [0.3, 1.0]


@pytest.mark.parametrize("ends", [False, True])
def test_world_model_loss_against_a_slow_reference(ends):
    wm, H, B = (ending_world() if ends else tiny_world())["wm"], 4, 5
    O, A = wm.obs_dim, wm.act_mask.shape[1]
    obs, act, rew = torch.randn(H + 1, B, O), torch.rand(H, B, A), 4 * torch.randn(H, B)
    term, live = torch.zeros(H, B), torch.ones(H, B)
    task = torch.arange(B) % len(wm.act_dims)
    if ends:
        term[1, 2], live[2:, 2], rew[0, 0] = 1, 0, 100.0
    loss, metrics, z = pwm.world_model_loss(wm, batch_of(obs, act, rew, task, term, live), 0.9)
    want = dict(consistency=0, reward=0, end=0)
    for b in range(B):  # one sequence at a time, Eq. (10) with TD-MPC2's weights
        k = task[b:b + 1]
        x = wm.encode(obs[0, b:b + 1], k)
        for h in range(H):
            logits, w = wm.reward(x, act[h, b:b + 1], k)[0], 0.9**h / (H * B) * float(live[h, b])
            x = wm.next(x, act[h, b:b + 1], k)
            goal = wm.encode(obs[h + 1, b:b + 1], k)
            want["consistency"] += w * (x - goal).square().mean()
            if ends:
                want["reward"] += w * (logits[0] - min(max(float(rew[h, b]) / 2, -5), 5)) ** 2
                p = wm.end(x, k).sigmoid()
                want["end"] -= (w * (p.log() if term[h, b] else (1 - p).log())).sum()
            else:
                want["reward"] -= w * (pwm.two_hot(rew[h, b]) * logits.log_softmax(-1)).sum()
    assert set(metrics) == {"consistency", "reward"} | ({"end"} if ends else set())
    for k, v in metrics.items():
        assert float(v) == pytest.approx(float(want[k]), rel=1e-4), k
    total = 20 * want["consistency"] + 0.1 * want["reward"] + want["end"]
    assert float(loss) == pytest.approx(float(total), rel=1e-4) and z.shape == (H + 1, B, 16)


def test_all_policies_at_once_equal_one_at_a_time():
    nets = tiny_world()
    nets["wm"].requires_grad_(False)
    opts, singles = opts_of(nets), []
    for k in range(3):  # the same initial networks, one task each
        one = with_policies(nets["wm"], 1)
        one["actors"] = pwm.Actors(nets["wm"].act_mask[k:k + 1], 16)
        for name, width in (("actors", 1), ("critics", 3)):
            state = nets[name].state_dict()
            one[name].load_state_dict({x: v[k * width:(k + 1) * width] for x, v in state.items()})
        singles.append((one, opts_of(one)))
    start = copy.deepcopy(nets["actors"].state_dict())
    for i in range(3):
        obs, noise, orders = policy_inputs(3, seed=i)
        improve(nets, opts, obs, noise, orders, torch.arange(3).repeat_interleave(6), batches=3)
        for k, (one, opt) in enumerate(singles):
            mine = obs[k:k + 1], noise[:, k:k + 1]
            improve(one, opt, *mine, orders, torch.full((6,), k), batches=3)
    assert all((v != start[k]).any() for k, v in nets["actors"].state_dict().items())
    for name in ("actors", "critics", "stats"):
        for x, v in nets[name].state_dict().items():
            error = (v - torch.cat([one[name].state_dict()[x] for one, _ in singles])).abs()
            # Adam divides by tiny second moments, so one entry in 10^5 may differ more
            assert error.max() < 1e-3 and (error > 2e-5).float().mean() < 1e-4, (name, x)


def test_actor_gradient_against_finite_differences():
    nets = tiny_world(1)
    wm, actors, critics = (nets[k] for k in ("wm", "actors", "critics"))
    wm.requires_grad_(False)
    task, bias = torch.zeros(6, dtype=torch.long), actors.mu.bias[-1]

    def value(H):  # J of Eq. (6), per trajectory
        obs, noise, _ = policy_inputs(1, H=H)
        z, rew, alive = pwm.imagine(wm, actors, obs, noise[..., :1], task)
        return pwm.imagined_returns(critics, z, rew, alive, 0.99, 0.95)[0]

    # One step: sg(z) cuts nothing, so the gradient is that of J, here by central differences
    var = torch.tensor([0.25])
    pwm.actor_loss(value(1), var).backward()
    J = []
    for sign in (1, -1):
        with torch.no_grad():
            bias.add_(sign * 0.01)
            J.append(value(1).mean())
            bias.sub_(sign * 0.01)
    assert torch.allclose(bias.grad[0, 0], -(J[0] - J[1]) / 0.02 / 0.5, rtol=0.03)
    bias.grad = None
    pwm.actor_loss(value(5), var).backward()
    with torch.no_grad():
        before = value(5).mean()
        bias.sub_(0.01 * bias.grad.sign())
        assert value(5).mean() > before  # descending the loss raises the imagined return


def test_running_statistics_are_those_of_all_samples():
    stats, x = pwm.RunningStats(2), torch.randn(2, 900) * 3 + 5
    for part in x.split((100, 500, 300), 1):
        stats.update(part)
    assert torch.allclose(stats.mean, x.mean(1), atol=1e-4)
    assert torch.allclose(stats.var, x.var(1, unbiased=False), rtol=1e-3)


@pytest.mark.parametrize("activation", ["simnorm", "mish", "relu", "residual"])
def test_activations_are_those_asked_for_and_of_the_file(activation, tmp_path):
    wm = pwm.WorldModel(7, [3, 2], 2, 16, 16, 16, 4, activation=activation)
    z, ones = wm.encode(torch.randn(5, 7), torch.zeros(5, dtype=torch.long)), torch.ones(5, 3)
    task = torch.ones(5, dtype=torch.long)
    simplex = torch.allclose(z.unflatten(-1, (2, 8)).sum(-1), torch.ones(5, 2), atol=1e-5)
    assert simplex == (activation == "simnorm")
    assert ((z >= 0).all() == (activation in ("simnorm", "relu")))
    hidden = wm.reward_head[0](torch.randn(64, 23))
    assert (hidden.min() < 0) == (activation != "relu")
    new = dict(activation=activation)
    for i, how in enumerate((new, dict(args=new))):  # now, and in older checkpoints
        torch.save(dict(wm=wm.state_dict(), act_dims=[3, 2], **how), tmp_path / f"{i}.pt")
        again = pwm.load_world_model(tmp_path / f"{i}.pt")
        assert again.activation == activation and torch.equal(again.next(z, ones, task),
                                                              wm.next(z, ones, task))
    with torch.no_grad():
        for p in wm.dynamics[-1].parameters():
            p.zero_()
    assert torch.equal(wm.next(z, ones, task), z) == (activation == "residual")  # tells the change


def test_imagined_rewards_are_in_log_space_unless_asked():
    nets, task = tiny_world(), torch.arange(3).repeat_interleave(6)
    obs, noise, _ = policy_inputs(3)
    log, true = (pwm.imagine(nets["wm"], nets["actors"], obs, noise, task, pseudo=p)[1]
                 for p in (True, False))
    assert log.shape == (5, 3, 6) and torch.allclose(pwm.symexp(log), true, atol=1e-5)


def test_open_loop_error_is_zero_for_a_perfect_model_and_one_for_the_mean():
    wm, task = tiny_world(2)["wm"], torch.arange(2).repeat(200)
    obs, act = torch.randn(3, 400, 7), torch.rand(2, 400, 2)
    z, rew = [wm.encode(obs[0], task)], []
    for a in act:
        rew.append(pwm.two_hot_inv(wm.reward(z[-1], a, task)))
        z.append(wm.next(z[-1], a, task))
    encode, batch = wm.encode, batch_of(obs, act, torch.stack(rew), task)
    wm.encode = lambda o, t: torch.stack(z) if o.ndim == 3 else z[0]  # which it predicts exactly
    exact = pwm.open_loop_error(wm, batch, (1, 2))
    assert all(v < 1e-6 for v in exact.values()), exact
    wm.encode = encode
    means = torch.stack([rew[0][task == k].mean() for k in range(2)])[task]
    wm.reward = lambda z, a, t: (pwm.two_hot(means) + 1e-12).log()
    mean = pwm.open_loop_error(wm, batch, (1,))
    assert abs(mean["reward_nmse_1"] - 1) < 0.02
    assert pwm.open_loop_error(wm, batch._replace(live=torch.zeros(2, 400)), (1, 2)) == {}


def test_act_serves_a_mixed_batch_like_single_rows():
    nets, rows = tiny_world(), torch.arange(3)
    task, obs, eps = torch.tensor([2, 0, 2, 2, 1, 0]), torch.randn(6, 7), torch.randn(6, 3)
    a = pwm.act(nets["wm"], nets["actors"], rows, obs, task, eps)
    for i in range(6):
        z = nets["wm"].encode(obs[i:i + 1], task[i:i + 1]).expand(3, 1, -1)
        one = nets["actors"](z, eps[i].expand(3, 1, -1))[task[i], 0]
        assert torch.allclose(a[i], one, atol=1e-6)


def test_compiled_losses_were_compiled_and_agree_with_eager():
    nets = tiny_world()
    nets["wm"].requires_grad_(False)
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    amp = functools.partial(torch.autocast, "cpu", torch.bfloat16, enabled=False)
    names = dict(imagine=pwm.imagine, returns=pwm.imagined_returns, error=pwm.critic_loss)
    compiled = {k: pwm.prepare(f, amp, True) for k, f in names.items()}
    other = copy.deepcopy(nets)
    obs, noise, orders = policy_inputs(3, H=3)
    task = torch.arange(3).repeat_interleave(6)
    a = improve(nets, opts_of(nets), obs, noise, orders, task)
    b = improve(other, opts_of(other), obs, noise, orders, task, **compiled)
    counters = torch._dynamo.utils.counters
    assert counters["frames"]["ok"] >= 3 and not counters["graph_break"]
    for k in a:
        assert torch.allclose(a[k], b[k], rtol=1e-3, atol=1e-4), k


# ------------------------------------------------------------------------------- tasks that may end
def test_imagined_returns_are_weighted_by_the_chance_to_go_on():
    nets, N, B, H, g, lam = ending_world(), 1, 6, 5, 0.9, 0.8
    wm, actors, critics = (nets[k] for k in ("wm", "actors", "critics"))
    obs, eps, task = torch.randn(N, B, 3), torch.randn(H, N, B, 2), torch.zeros(B, dtype=torch.long)
    z, rew, alive = pwm.imagine(wm, actors, obs, eps, task)
    assert alive.shape == (H, N, B) and 0 < alive.min() < alive.max() < 1
    v = torch.stack([critics(x).amin(1) for x in z])
    J, so_far = 0, 1
    for h in range(H):
        J, so_far = J + g**h * so_far * rew[h], so_far * alive[h]
    J = J + g**H * so_far * v[H]
    got, target, weight = pwm.imagined_returns(critics, z, rew, alive, g, lam)
    assert torch.allclose(got, J, atol=1e-5) and not target.requires_grad and got.requires_grad
    assert torch.allclose(weight, torch.cat([torch.ones(1, N, B), alive.cumprod(0)[:-1]]))
    flat, goal, chance = pwm.by_task(z[:-1]), pwm.by_task(target), pwm.by_task(weight)
    error = [(critics(flat[:, i:i + 1])[0, :, 0] - goal[0, i]).square().mean() * chance[0, i]
             for i in range(H * B)]
    want = sum(error) / (H * B)
    assert torch.allclose(pwm.critic_loss(critics, flat, goal, chance), want, rtol=1e-4)
    G = v[H]
    for h in reversed(range(H)):
        G = rew[h] + g * alive[h] * ((1 - lam) * v[h + 1] + lam * G)
        assert torch.allclose(target[h], G, atol=1e-5)


def test_a_window_that_ended_has_no_value_beyond():
    nets = ending_world()
    obs, eps, task = torch.randn(1, 6, 3), torch.randn(5, 1, 6, 2), torch.zeros(6, dtype=torch.long)
    told = torch.ones(5, 1, 6)
    told[2:, 0, 4] = 0
    z, rew, alive = pwm.imagine(nets["wm"], nets["actors"], obs, eps, task, told)
    assert alive is told
    J, target, weight = pwm.imagined_returns(nets["critics"], z, rew, alive, 0.9, 0.8)
    value = nets["critics"](z[-1]).amin(1)[0]
    returns = sum(0.9**h * rew[h, 0] for h in range(5)) + 0.9**5 * value
    returns[4] = sum(0.9**h * rew[h, 0, 4] for h in range(3))
    assert torch.allclose(J[0], returns, atol=1e-5)
    assert torch.allclose(target[2, 0, 4], rew[2, 0, 4])
    assert weight[:, 0, 4].tolist() == [1, 1, 1, 0, 0] and (weight[:, 0, :4] == 1).all()


def test_offset_of_the_critics_follows_the_targets():
    torch.manual_seed(0)
    critics, z = pwm.Critics(2, 16, widths=(8,)), torch.rand(2, 5, 16)
    plain = critics(z)
    assert not critics.offset.any()  # of no effect where it is not used
    target = torch.tensor([[250.0, 252.0], [-10.0, -12.0]])
    critics.follow(target)
    step = torch.tensor([25.1, -1.1])[:, None, None]
    assert torch.allclose(critics(z), plain + step, atol=1e-5)
    for _ in range(100):
        critics.follow(target)
    whole = torch.tensor([251.0, -11.0])[:, None, None].expand(2, 3, 5)
    assert torch.allclose(critics(z) - plain, whole, atol=0.01)


def test_the_scales_of_a_task_that_ends_are_those_of_its_data(tmp_path):
    episodes, rng = Episodes.create(tmp_path, {"x-y": (11, 3, 9)}), np.random.default_rng(0)
    for n in (9, 4):
        episodes.append("x-y", rng.normal(3, 2, (n + 1, 11)), rng.uniform(-1, 1, (n, 3)),
                        rng.normal(5, 7, n), np.arange(n) < 0)
    wm = pwm.WorldModel(11, [3], 2, 16, 16, 16, 0, ends=True, activation="residual")
    arrays = episodes.arrays("x-y")
    wm.set_scales(episodes, 0, "x-y")
    seen = np.concatenate([arrays["obs"][0, :9], arrays["obs"][1, :4]])
    assert np.allclose(wm.obs_mean, seen.mean(0), atol=1e-5)
    assert np.allclose(wm.obs_std, seen.std(0), atol=1e-5)
    rewards = np.concatenate([arrays["rew"][0], arrays["rew"][1, :4]])
    assert wm.rew_std == pytest.approx(rewards.std(), rel=1e-5)
    task, plain, x = torch.zeros(13, dtype=torch.long), copy.deepcopy(wm), torch.from_numpy(seen)
    plain.obs_mean.zero_(), plain.obs_std.fill_(1)
    scaled = plain.encode((x - wm.obs_mean) / wm.obs_std, task)
    assert torch.allclose(wm.encode(x, task), scaled, atol=1e-5)
    state = {k: v for k, v in wm.state_dict().items() if not k.startswith("obs_")}  # older files
    torch.save(dict(wm=state, act_dims=[3], activation="residual"), tmp_path / "wm.pt")
    again = pwm.load_world_model(tmp_path / "wm.pt").encode(x, task)
    assert torch.equal(again, plain.encode(x, task))


def test_the_scales_of_several_tasks_are_the_roots_of_their_deviations(tmp_path):
    episodes, rng = Episodes.create(tmp_path, {"a": (3, 2, 9), "b": (2, 1, 9)}), gen()
    for name, O, A in (("a", 3, 2), ("b", 2, 1)):
        obs = 5 + 0.04 * torch.randn(10, O, generator=rng)
        obs[:, 0] = 7.0  # an observation that never changes keeps its size
        episodes.append(name, obs, torch.zeros(9, A), torch.zeros(9), torch.zeros(9).bool())
    wm = pwm.WorldModel(3, [2, 1], 2, 16, 16, 16, 4)
    for row, name in enumerate("ab"):
        wm.set_scales(episodes, row, name)
        seen = torch.from_numpy(np.array(episodes.arrays(name)["obs"][0, :9]))
        assert torch.allclose(wm.obs_mean[row, :seen.shape[1]], seen.mean(0))
        std = seen.std(0, unbiased=False).sqrt()
        assert torch.allclose(wm.obs_std[row, 1:seen.shape[1]], std[1:], atol=1e-5)
    assert wm.obs_std[:, 0].tolist() == [1, 1] and wm.obs_std[1, 2] == 1  # constant, padding
    obs = torch.randn(4, 3)
    task = torch.tensor([0, 1, 0, 1])
    scaled = (obs - wm.obs_mean[task]) / wm.obs_std[task]
    together = wm.encode(obs, task)
    wm.obs_mean.zero_(), wm.obs_std.fill_(1)
    assert torch.allclose(together, wm.encode(scaled, task), atol=1e-6)


def test_long_episodes_are_stored_in_pieces():
    rng = np.random.default_rng(0)
    whole = dict(obs=rng.normal(size=(11, 2)), act=rng.normal(size=(10, 1)), rew=np.arange(10),
                 term=np.arange(10) == 9)
    parts = pwm.pieces(whole, 4)
    assert [len(p[2]) for p in parts] == [4, 4, 2]
    assert [p[3].any() for p in parts] == [False, False, True]
    assert np.array_equal(np.concatenate([p[0][:-1] for p in parts]), whole["obs"][:-1])
    assert np.array_equal(parts[2][0][-1], whole["obs"][-1])
    assert np.array_equal(parts[1][0][0], parts[0][0][-1])


# --------------------------------------------------------------------------------------- whole runs
class Push(gymnasium.Env):
    """A point on a line is to be pushed to the origin: 40 steps, reward 1 at the goal."""

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


class Cliff(gymnasium.Env):
    """A point drifts to the right, is paid for it, and ends beyond 0.5. Best is to stay."""

    observation_space = gymnasium.spaces.Box(-9, 9, (1,), np.float32)
    action_space = gymnasium.spaces.Box(-1, 1, (1,), np.float32)

    def reset(self, *, seed=None, options=None):
        super().reset(seed=seed)
        self.x = self.np_random.uniform(-0.4, 0.4, 1).astype(np.float32)
        return self.x.copy(), {}

    def step(self, action):
        self.x = np.clip(self.x + 0.15 * action + 0.05, -1, 1).astype(np.float32)
        return self.x.copy(), 1.0 + 0.5 * float(action[0]), bool(self.x[0] > 0.5), False, {}


gymnasium.register("Push-v0", entry_point=Push, max_episode_steps=40)
gymnasium.register("Cliff-v0", entry_point=Cliff, max_episode_steps=60)
PUSH, CLIFF = f"{PWM_TESTS}:Push-v0", f"{PWM_TESTS}:Cliff-v0"
TINY = dict(task=PUSH, device="cpu", workers=1, rounds=3, seed_episodes=6, round_episodes=2,
            wm_steps=60, wm_batch=16, policy_steps=30, policy_batch=8, horizon=4, wm_horizon=3,
            eval_episodes=1)
GIVEN = {k: v for k, v in TINY.items() if k not in ("rounds", "seed_episodes", "round_episodes")}


def pwm_start(cwd, *words, launcher=("python",), **settings):
    words = [*words, *(w for k, v in settings.items() for w in pwm_flag(k, v))]
    env = dict(os.environ, OMP_NUM_THREADS="1", PYTHONPATH=f"{HERE}:{cwd}", PYTHONUNBUFFERED="1",
               MPLCONFIGDIR=str(cwd))
    command = [sys.executable, *launcher[1:], f"{HERE}/pwm.py", *words]
    return subprocess.Popen(command, cwd=cwd, env=env, stdout=subprocess.PIPE,
                            stderr=subprocess.STDOUT, text=True)


def pwm_flag(name, value):
    """A setting as it is typed: --seed 2, --fast, --ends False."""
    return [data.flag(name)] if value is True and name != "ends" else [data.flag(name), str(value)]


def pwm_finish(process):
    out = process.communicate(timeout=240)[0]
    assert process.returncode == 0, out[-3000:]
    return out


def pwm_run(cwd):
    return max(Path(cwd, "runs").iterdir(), key=lambda p: p.stat().st_mtime)


def metrics_of(cwd, name):
    lines = (pwm_run(cwd) / "metrics.jsonl").read_text().splitlines()
    return [x[name] for x in map(json.loads, lines) if name in x]


def test_pwm_learns_a_tiny_task(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    result = pwm.main(pwm.Args(**{
        **TINY, "seed_episodes": 20, "wm_steps": 900, "wm_batch": 32, "policy_steps": 250,
        "policy_batch": 16, "horizon": 10, "wm_horizon": 4, "wm_lr": 1e-3, "eval_episodes": 5,
        "ends": False, "policy_lr": 5e-4}))
    loss = metrics_of(tmp_path, "losses/model/loss")
    assert loss[-1] < 0.5 * loss[0]
    table = result["table"][0]
    assert table["ours"] > 30 > 15 > table["random"], table  # of 40
    errors = [x["latent_nmse_4"] for x in result["history"] if "latent_nmse_4" in x]
    assert errors[-1] < 0.3 and "ends" in result["args"] and not result["args"]["ends"]
    assert {p.name for p in pwm_run(tmp_path).iterdir()} >= {
        "results.json", "results.csv", "checkpoint.pt", "args.json", "envs.py", "data.py"}


@pytest.mark.parametrize("ends", [False, True])
def test_pwm_killed_in_every_stage_and_resumed_ends_at_the_same_numbers(ends, tmp_path):
    whole, killed = tmp_path / "whole", tmp_path / "killed"
    whole.mkdir()
    killed.mkdir()
    settings = {**TINY, "ends": ends, "policy_steps": 60, "eval_every": 25}
    process = pwm_start(whole, **settings)
    p = pwm_start(killed, **settings, save_every=0)
    stages, deadline = [], time.time() + 200
    for wanted in ((0, 1, 3), (1, 1, 3), (1, 3, 2), (2, 1, 2)):  # round, stage, step: as they come
        at = None
        while p.poll() is None and time.time() < deadline:
            try:
                file = torch.load(pwm_run(killed) / "checkpoint.pt", weights_only=True)
                at = tuple(file["_run"]["at"])
            except (OSError, ValueError, RuntimeError, FileNotFoundError):
                time.sleep(0.02)
            if at and at >= wanted:
                break
            time.sleep(0.005)
        if p.poll() is None:
            p.send_signal(signal.SIGKILL)
            stages.append(at)
        p.communicate()
        p = pwm_start(killed, "--resume", str(pwm_run(killed)))
    pwm_finish(p)
    pwm_finish(process)
    assert len(set(stages)) >= 3, stages
    a, b = (torch.load(pwm_run(x) / "checkpoint.pt", weights_only=True) for x in (whole, killed))
    parts = ["wm", "actors", "critics", "stats"] + ["beside", "best"] * ends
    for part in parts:
        for k in a[part]:
            assert k == "steps" or torch.equal(a[part][k], b[part][k]), (part, k)
    assert a["episodes"] == b["episodes"]
    stored = [Episodes.open(pwm_run(x) / "episodes").arrays(PUSH) for x in (whole, killed)]
    assert all(np.array_equal(stored[0][k], stored[1][k]) for k in stored[0])
    a, b = (json.loads((pwm_run(x) / "results.json").read_text()) for x in (whole, killed))
    assert a["episodes"] == b["episodes"] and a["table"] == b["table"]
    tests = [[h["policy_updates"] for h in x["history"] if "evaluation" in h] for x in (a, b)]
    assert tests[0] == tests[1] and tests[0][-1] == 60  # also after every round
    steps = [json.loads(x)["step"] for x in
             (pwm_run(killed) / "metrics.jsonl").read_text().splitlines()]
    assert steps == sorted(steps)


def test_pwm_two_ranks_reproduce_one_rank(tmp_path):
    episodes = Episodes.create(tmp_path / "data", {PUSH: (2, 1, 40)})
    rng = np.random.default_rng(0)
    obs, act = rng.normal(size=(8, 41, 2)).cumsum(1) / 9, rng.uniform(-1, 1, (8, 40, 1))
    episodes.append(PUSH, list(obs), list(act), list(np.abs(obs[:, 1:, 0])),
                    list(np.zeros((8, 40), bool)))
    torchrun = "python -m torch.distributed.run --standalone --nproc-per-node 2".split()
    launchers, runs, losses = dict(one=("python",), two=torchrun), [], []
    for name, launcher in launchers.items():
        (tmp_path / name).mkdir()
        settings = {**GIVEN, "policy_steps": 2, "ends": False, "data_dir": tmp_path / "data"}
        runs.append(pwm_start(tmp_path / name, launcher=launcher, **settings))
    for name, p in zip(launchers, runs):
        pwm_finish(p)
        columns = [metrics_of(tmp_path / name, f"losses/model/{k}") for k in ("loss", "grad_norm")]
        losses.append(columns)
    # after 50 and 60 updates: Adam makes something of the rounding of sums in another order
    assert len(losses[0][0]) == 2 and np.allclose(losses[0], losses[1], rtol=1e-3), losses


def test_pwm_copied_with_its_two_helpers_runs_and_evaluates(tmp_path):
    for name in ("pwm.py", "envs.py", "data.py"):
        shutil.copy(Path(HERE, name), tmp_path)
    env = {k: v for k, v in os.environ.items() if k != "PYTHONPATH"} | {"OMP_NUM_THREADS": "1"}

    def run(*words):
        p = subprocess.run([sys.executable, "pwm.py", *words], cwd=tmp_path, env=env,
                           capture_output=True, text=True)
        assert p.returncode == 0, p.stderr[-2000:]
        return p.stdout

    two = "cartpole-swingup,cup-catch"
    out = run("--task", two, "--fast", "--device", "cpu", "--wm-steps", "40")
    assert "latent_nmse_16" in out and "left" in out and "IQM" not in out and "iqm" in out
    folder = pwm_run(tmp_path)
    first = json.loads((folder / "results.json").read_text())
    assert {p.name for p in folder.iterdir()} >= {"pwm.py", "envs.py", "data.py"}
    file = str(folder / "checkpoint.pt")
    run("--task", "cup-catch,cartpole-swingup", "--eval-only", "--checkpoint", file, "--fast")
    again = json.loads((pwm_run(tmp_path) / "results.json").read_text())  # other order of tasks
    for t, returns in first["episodes"]["ours"].items():
        assert np.allclose(returns, again["episodes"]["ours"][t], rtol=1e-3)
    wm = pwm.load_world_model(file)
    assert wm.tasks == tuple(two.split(","))
    assert wm.encode(torch.zeros(1, 8), torch.tensor([1])).shape == (1, 128)
    out = run("--task", "cup-catch", "--checkpoint", file, "--fast", "--capture-video")
    assert f"from {file}" in out and "0 model updates" in out and "round 0: model" not in out
    frames = imageio.mimread(pwm_run(tmp_path) / "video_cup-catch.mp4", memtest=False)
    assert len(frames) == 501 and np.std(frames[0]) > 5
    assert np.abs(frames[0].astype(int) - frames[400]).max() > 50


def test_pwm_policy_learns_not_to_end_the_episode(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setitem(pwm.SHARES, ("model", True), (0.6, 0.2))
    monkeypatch.setitem(pwm.SHARES, ("policy", True), (0.3, 0.3))
    settings = dict(TINY, task=CLIFF, round_episodes=4, wm_steps=400, wm_batch=32, policy_steps=120,
                    policy_batch=16, horizon=6, wm_horizon=4, eval_episodes=4)
    result = pwm.main(pwm.Args(**settings))
    table = result["table"][0]  # 50 for staying; running right earns 1.5 for a few steps
    assert table["ours"] > 40 > 25 > table["random"], table
    rounds = [h for h in result["history"] if "steps" in h]
    assert rounds[0]["length"] < 40 and 6 * 60 <= rounds[0]["steps"] < 12 * 60
    folder = pwm_run(tmp_path)
    wm, task = pwm.load_world_model(folder / "checkpoint.pt"), torch.zeros(2, dtype=torch.long)
    assert wm.ends and wm.rew_std < 1 and wm.activation == "residual"
    z = wm.next(wm.encode(torch.tensor([[0.45], [-0.5]]), task), torch.ones(2, 1), task)
    ends = wm.end(z, task).sigmoid()
    assert ends[0] > 0.8 > 0.2 > ends[1]
    films = []  # of the better of the last and the kept policy
    monkeypatch.setattr(pwm, "choose_gl", lambda: None)
    monkeypatch.setattr(pwm, "record", lambda run, agent, best: films.append(best))
    again = pwm.main(pwm.Args(task=CLIFF, device="cpu", workers=1, eval_only=True, eval_episodes=4,
                              capture_video=True, checkpoint=str(folder / "checkpoint.pt")))
    row = again["table"][0]
    assert films == [row["best round"] > row["ours"]]
    assert row["ours"] == pytest.approx(table["ours"], abs=8)
    state = torch.load(folder / "checkpoint.pt", weights_only=True)
    assert state["where"]["best"] == max(h["return"][CLIFF] for h in rounds if h["round"])
    kept = state["best"]["actors.log_std"]
    assert not torch.equal(kept, state["actors"]["log_std"])  # kept before the last updates
    assert row["best round"] == pytest.approx(table["best round"], abs=8)
    assert table["best round"] > 25
    own = ("rounds", "seed_episodes", "round_episodes")
    given = {k: v for k, v in settings.items() if k not in own}
    given |= dict(data_dir=str(folder / "episodes"), horizon=12, policy_steps=60)
    row = pwm.main(pwm.Args(**given))["table"][0]
    assert row["ours"] > 40  # on given data no environments tell the ends: the head does


def test_pwm_says_when_nearly_all_windows_end(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    short = dict(TINY, task=CLIFF, wm_steps=8, policy_steps=4, seed_episodes=1, horizon=40,
                 wm_horizon=40, rounds=2, round_episodes=1)
    result = pwm.main(pwm.Args(**short))
    out = capsys.readouterr().out
    assert "windows of 40 steps end" in out and re.search(r"try --horizon \d+\n", out)
    rounds = [h for h in result["history"] if "length" in h]
    assert rounds[0]["window_steps"] == 0 and np.isfinite(result["table"][0]["ours"])
    assert pwm_run(tmp_path).name.startswith(f"{PWM_TESTS}%3ACliff-v0__pwm__1__")


def test_pwm_reads_published_chunks(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    g, N, T = gen(), 60, 501  # two episodes of each MT30 task, in the padded layout of the files
    task, facts = torch.arange(30).repeat(2), [envs.task_facts(t) for t in envs.MT30]
    obs_mask = torch.stack([(torch.arange(24) < f.obs_dim).float() for f in facts])[task][:, None]
    act_mask = torch.stack([(torch.arange(6) < f.act_dim).float() for f in facts])[task][:, None]
    chunk = dict(obs=torch.randn(N, T, 24, generator=g) * obs_mask,
                 action=torch.rand(N, T, 6, generator=g) * act_mask,
                 reward=torch.rand(N, T, generator=g),
                 task=task.int()[:, None].expand(N, T).contiguous())
    chunk["reward"][:, 0] = chunk["action"][:, 0] = float("nan")
    (tmp_path / "mt30").mkdir()
    torch.save(chunk, tmp_path / "mt30" / "chunk_0.pt")
    result = pwm.main(pwm.Args(**{**GIVEN, "task": "cup-catch", "data_dir": "mt30"}))
    row = result["table"][0]
    assert row["PWM paper"] == 471.6 and row["TD-MPC2 paper"] == 964.3 and np.isfinite(row["ours"])


# --------------------------------------------------------------------- published checkpoint layouts
def published_files(wm):
    """The same weights in the layouts of TD-MPC2 now, TD-MPC2 of October 2023, and PWM's agent."""
    now = {"_task_emb.weight": wm.task_emb.weight.detach()}
    sequential, agent = dict(now), dict(now)
    names = dict(encoder="_encoder.state", dynamics="_dynamics", reward_head="_reward")
    for key, v in wm.state_dict().items():
        ours, _, rest = key.partition(".")
        if ours in names:
            i, field = rest.split(".", 1)
            now[f"{names[ours]}.{rest}"] = v
            agent[f"{names[ours].removesuffix('.state')}.{rest}"] = v
            index = (ours == "encoder") + 3 * int(i) + field.startswith("ln.")
            sequential[f"{names[ours]}.{index}.{field.removeprefix('ln.')}"] = v
    now |= {"_pi.0.weight": torch.zeros(3, 3), "_Qs.params.0": torch.zeros(2, 3, 3),
            "log_std_min": torch.zeros(1)}
    return {"now": {"model": now}, "bare": now, "sequential": {"model": sequential},
            "agent": {"actor": {}, "critic": {}, "world_model": agent}}


def test_world_models_load_in_every_published_layout(tmp_path):
    torch.manual_seed(0)
    dims = [envs.task_facts(t).act_dim for t in envs.MT30]
    wm = pwm.WorldModel(24, dims, enc_layers=3, enc_hidden=20, hidden=28, latent=32, task_dim=8)
    nn.init.normal_(wm.task_emb.weight)  # rows longer than 1: the loader must project them
    obs, act, task = torch.randn(30, 24), torch.rand(30, 6), torch.arange(30)
    ref = copy.deepcopy(wm)
    ref.project_embeddings()
    z = ref.encode(obs, task)
    for name, file in published_files(wm).items():
        torch.save(file, tmp_path / f"{name}.pt")
        got = pwm.load_world_model(tmp_path / f"{name}.pt")
        assert got.tasks == envs.MT30 and got.task_emb.weight.norm(dim=1).max() <= 1 + 1e-6
        assert torch.equal(got.encode(obs, task), z), name
        assert torch.equal(got.next(z, act, task), ref.next(z, act, task))
        assert torch.equal(got.reward(z, act, task), ref.reward(z, act, task))


def test_wrong_checkpoints_say_what_was_expected(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    torch.save({"model": {"layer.weight": torch.zeros(2, 2)}}, "other.pt")
    with says("no world model", "expected _encoder"):
        pwm.load_world_model("other.pt")
    wm = pwm.WorldModel(24, [6] * 30, **pwm.model_dims(1, 30))
    file = published_files(wm)["now"]
    torch.save(file, "mt30.pt")
    with says("not trained on mw-reach"):
        pwm.main(pwm.Args(task="mw-reach", checkpoint="mt30.pt"))
    file["model"]["_dynamics.1.weight"] = torch.zeros(3, 3)
    torch.save(file, "bad.pt")
    with says("does not fit together"):
        pwm.load_world_model("bad.pt")


# -------------------------------------------------------------------------------------- bad input
PWM_BAD = [
    (dict(task="walker-wolk"), "walker-walk"), (dict(task="cup-catch,cup-catch"), "twice"),
    (dict(task=","), "no task"), (dict(task="CartPole-v1"), "CartPole-v1.*[Dd]iscrete"),
    (dict(task="hoper"), "nearest: .*hopper"), (dict(workers=0), "--workers 0 .*at least 1"),
    (dict(eval_only=True), "--checkpoint"), (dict(resume="nowhere"), "no readable args.json"),
    (dict(checkpoint="nowhere.pt"), "nowhere.pt"), (dict(data_dir="nowhere"), "no episodes in"),
    (dict(task="cup-catch,walker-walk", ends=True), "one task.*--ends False"),
    (dict(seed=-1), "--seed -1 .*expected 0"), (dict(eval_every=-1), "--eval-every -1 .*at least"),
    (dict(gamma=1.5), "--gamma 1.5 .*expected 0 to 1"), (dict(horizon=0), "--horizon 0 .*at least"),
    (dict(checkpoint="x.pt", wm_steps=9), "--wm-steps 9: with --checkpoint.*leave it out"),
    (dict(checkpoint="x.pt", model_size=5), "--model-size 5: .*says its sizes"),
    (dict(data_dir="x", rounds=3), "--rounds 3: with --data-dir no data is made"),
    (dict(checkpoint="x.pt", eval_only=True, policy_steps=1), "--policy-steps 1: .*does not train")]


@pytest.mark.parametrize("settings, words", PWM_BAD)
def test_pwm_bad_flags_get_one_sentence(settings, words, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(SystemExit, match=words) as error:
        pwm.main(pwm.Args(device="cpu", **{"task": "cup-catch", **settings}))
    assert "\n" not in str(error.value)


def test_pwm_resume_without_a_checkpoint_and_with_other_flags_is_refused(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    run = Run("pwm", pwm.Args(task="cup-catch", model_size=1, compile=False))
    run.close()
    with says("--task is cup-catch, not walker-walk"):
        pwm.main(pwm.Args(task="walker-walk", resume=str(run.dir)))
    with says("before its first checkpoint"):
        pwm.main(pwm.Args(resume=str(run.dir), device="cpu"))


def test_pwm_interrupted_saves_and_says_how_to_go_on(tmp_path):
    p = pwm_start(tmp_path, **{**TINY, "wm_steps": 100_000})
    for line in p.stdout:
        if "round 0:" in line:
            break
    time.sleep(1)
    p.send_signal(signal.SIGINT)
    out = p.communicate(timeout=60)[0]
    assert "stopped; go on with: python pwm.py --resume runs/" in out and p.returncode == 1
    state = torch.load(pwm_run(tmp_path) / "checkpoint.pt", weights_only=True)
    assert state["_run"]["step"] > 0


# ------------------------------------------------------------------------------------------ ed2.py
# Two carts: actions 0 and 1 pull the first, 2 the second. A file: roll-outs import it elsewhere.
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
WALKER, CHEETAH, HOPPER, HUMANOID = (
    ed2.PUBLISHED[x] for x in ("walker", "cheetah", "hopper", "humanoid"))


def ed2_args(**settings):
    """Flags of a run on the two carts that takes seconds."""
    wm = settings.get("wm", "tdmpc2")
    tiny = dict(length=3, model_size="1M") if wm == "tdmpc2" else dict(length=10, model_size="1m")
    tiny |= dict(task=TUG_TASK, device="cpu", compile=False, workers=1, seeds=1, updates=12)
    made = {} if "data_dir" in settings else dict(data_steps=1)
    return ed2.Args(**tiny | dict(batch=4, lr=1e-3) | made | settings)


def ed2_run(args, made):
    """The folder of a run that has not begun, with `made` in place of data that it would make."""
    run = Run("ed2", args)
    run.close()
    (run.dir / "data").mkdir()
    (run.dir / "data" / args.task).symlink_to(made)
    return run.dir


def ed2_train(model, sampler, args, seed=0, encoder=None, folder=None):
    """ed2.train in a folder that is forgotten, or kept for a resume."""
    with tempfile.TemporaryDirectory() as other:
        run = Run("ed2", args, inside=folder or other)
        loss = ed2.train(run, model, sampler, args, seed, encoder)
        run.close()
    return loss


@pytest.fixture(scope="module")
def tug(tmp_path_factory):
    """The two carts can be imported, and this folder has their data, made in spite of a kill."""
    folder = tmp_path_factory.mktemp("tug")
    (folder / "tug.py").write_text(TUG)
    with pytest.MonkeyPatch.context() as m:
        m.syspath_prepend(str(folder))
        with pytest.MonkeyPatch.context() as inner:  # killed between random data and search
            def stop(*a, **k):
                raise KeyboardInterrupt
            inner.setattr(ed2, "search", stop)
            with pytest.raises(KeyboardInterrupt):
                ed2.make_data(TUG_TASK, folder / "data", 3000, 1)
        ed2.make_data(TUG_TASK, folder / "data", 3000, 1)
        yield folder / "data"


def suite_episodes(task, n, folder):
    """n episodes of random actions, in the layout of ed2.make_data, random and replay alike."""
    env, rng = envs.make_env(task), np.random.default_rng(0)
    O, A, T = envs.task_facts(task)[:3]
    eps = Episodes.create(folder / "random", {task: (O, A, T)})
    for seed in range(n):
        obs, rew = [env.reset(seed=seed)[0]], []
        act = rng.uniform(-1, 1, (T, A)).astype(np.float32)
        for a in act:
            o, r, _, _, _ = env.step(a)
            obs.append(o)
            rew.append(r)
        eps.append(task, np.stack(obs), act, np.array(rew, np.float32), np.zeros(T, bool))
    env.close()
    (folder / "replay").symlink_to(folder / "random")
    notes = {"random_return": 0.0, "returns": [[0.0, 0.0]]}
    (folder / "data.json").write_text(json.dumps(notes))
    return folder


@pytest.fixture(scope="module")
def cheetah(tmp_path_factory):
    return suite_episodes("cheetah-run", 10, tmp_path_factory.mktemp("cheetah"))


# ------------------------------------------------------------------------------------------ SD2
def slow_agglomerate(sim, eta):
    """Pairs word for word: mean similarity inside the pair minus mean similarity to all else."""
    m = len(sim)
    groups = [(i,) for i in range(m)]
    while len(groups) > 1:
        best = None
        for P, Q in itertools.combinations(groups, 2):
            inside = [sim[i][j] for i in P for j in Q]
            outside = [sim[i][j] for X, Y in ((P, Q), (Q, P)) for i in X for j in range(m)
                       if j not in Y]
            score = sum(inside) / len(inside) - sum(outside) / len(outside)
            if best is None or score > best[0] + 1e-10:
                best = score, P, Q
        if best[0] <= eta:
            break
        merged = tuple(sorted(best[1] + best[2]))
        groups = sorted([g for g in groups if g not in best[1:]] + [merged])
    return [list(g) for g in groups]


def test_ed2_merging_against_a_slow_reference():
    rng, sizes = np.random.default_rng(0), set()
    for trial in range(60):
        m, n = int(rng.integers(1, 10)), int(rng.integers(1, 6))
        features = rng.random((m, n)) ** 4
        sim, eta = ed2.cosine(features), (0.0, -0.12, 0.1)[trial % 3]
        norm = np.linalg.norm(features, axis=1)
        assert np.allclose(sim, features @ features.T / norm[:, None] / norm)
        groups, log = ed2.agglomerate(sim, eta)
        assert groups == slow_agglomerate(sim, eta)
        assert sorted(sum(groups, [])) == list(range(m))
        assert all(x["done"] == (x["score"] > eta) for x in log)
        assert all(x["done"] for x in log[:-1])
        assert len(groups) == m - sum(x["done"] for x in log)
        assert ed2.agglomerate(sim, 2.0)[0] == [[i] for i in range(m)]
        assert len(ed2.agglomerate(sim, -2.0)[0]) == 1
        sizes.add(len(groups))
    assert len(sizes) > 3


def test_ed2_features_are_absolute_correlations():
    rng = np.random.default_rng(0)
    act, delta = rng.uniform(-1, 1, (500, 4)), rng.normal(size=(500, 6)) + 1e4
    delta[:, 1] -= act[:, 0]
    delta[:, 2], act[:, 3] = 7.0, 0.5  # a state that never changes, an actuator that never moves
    F_ = ed2.pearson_features(act, delta)
    assert F_.shape == (4, 5) and (F_[3] == 0).all()
    for i, (d, column) in itertools.product(range(3), enumerate((0, 1, 3, 4, 5))):
        want = abs(np.corrcoef(act[:, i], delta[:, column])[0, 1])
        assert F_[i, d] == pytest.approx(want, abs=1e-9)
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
    assert ed2.discover(act[:, :2], delta) == [[0], [1]]  # two actions never merge
    assert ed2.agglomerate(np.ones((2, 2)))[1][0]["score"] == 0
    same = np.eye(4)
    same[0, 1] = same[1, 0] = same[2, 3] = same[3, 2] = 0.5
    groups, log = ed2.agglomerate(same)
    assert groups == [[0, 1], [2, 3]] and log[0]["merge"] == [[0], [1]]  # ties: the lowest first
    bad = delta.copy()
    bad[3, 0] = np.nan
    for x, y in ((act, bad), (act[:-1], delta), (act[:1], delta[:1]), (act * np.inf, delta)):
        with says("discover got actions", "all finite"):
            ed2.discover(x, y)


@pytest.mark.parametrize("task", ["cheetah-run", "hopper-hop"])
def test_ed2_published_groups_from_5000_random_steps(task, tmp_path, request):
    here = task == "cheetah-run"
    folder = request.getfixturevalue("cheetah") if here else suite_episodes(task, 10, tmp_path)
    random = Episodes.open(folder / "random", [task])
    assert len(ed2.transitions(random, task)[0]) == 5000
    known = ed2.PUBLISHED[task.split("-")[0]]
    groups, log = ed2.find_partition("sd2", task, random)
    assert groups == known and log[-1]["done"] is False
    assert len(log) == 1 + sum(len(g) - 1 for g in known)
    _, act, delta = ed2.transitions(random, task, n=2500, seed=3)
    assert ed2.discover(act, delta) == known
    every = list(range(act.shape[1]))
    for name, want in (("published", known), ("full", [[j] for j in every]), ("none", [every])):
        assert ed2.find_partition(name, task, random) == (want, [])


def test_ed2_walker_has_some_partition(tmp_path):
    """Its deciding score is near 0, so draws differ: the ankles, 2 and 5, stay alone in all."""
    random = Episodes.open(suite_episodes("walker-walk", 3, tmp_path) / "random")
    groups, log = ed2.find_partition("sd2", "walker-walk", random)
    assert sorted(sum(groups, [])) == list(range(6)) and 3 <= len(groups) <= 5
    assert [2] in groups and [5] in groups and all(np.isfinite(x["score"]) for x in log)


def test_ed2_transitions_stay_inside_episodes(tmp_path):
    eps = Episodes.create(tmp_path, {"a": (3, 2, 12)})
    for e, t in enumerate((12, 5, 7)):
        obs = 100 * e + np.arange(t + 1)[:, None] + np.zeros(3)
        eps.append("a", obs, obs[:-1, :2] + 0.5, np.zeros(t), np.zeros(t, bool))
    obs, act, delta = ed2.transitions(eps, "a")
    assert len(obs) == len(act) == 24
    assert (delta == 1).all() and (act[:, 0] - obs[:, 0] == 0.5).all()
    few = ed2.transitions(eps, "a", n=7, seed=1)
    assert few[0].shape == (7, 3)
    assert np.array_equal(few[0], ed2.transitions(eps, "a", n=7, seed=1)[0])


def test_ed2_published_tables():
    sizes = {k: sorted(sum(v, [])) for k, v in ed2.PUBLISHED.items()}
    assert sizes == {k: list(range(n)) for k, n in dict(
        walker=6, cheetah=6, hopper=4, reacher=2, finger=2, humanoid=21).items()}
    assert ed2.assignment(HOPPER, 4).tolist() == [[1, 0, 0], [1, 0, 0], [0, 1, 0], [0, 0, 1]]


# ------------------------------------------------------------------ decomposed TD-MPC2 dynamics
def any_dynamics(groups, kind=ed2.Dynamics):
    """Dynamics whose biases and gains matter."""
    torch.manual_seed(0)
    d = kind(16, sum(map(len, groups)), 8, groups)
    for p in d.parameters():
        p.data += 0.4 * torch.randn_like(p)
    return d


def slow_norm(x, gain, shift):
    x = (x - x.mean(-1, keepdim=True)) / (x.var(-1, keepdim=True, unbiased=False) + 1e-5).sqrt()
    return x * gain + shift


def slow_dynamics(d, z, act, groups):
    """One trunk after the other, each with its own actions only; with one head, or a head each."""
    def mish(x):
        return x * torch.tanh(x.exp().log1p())

    def head(x, i):
        x = x @ d.head.weight[i] + d.head.bias[i, 0]
        x = slow_norm(x, d.head.gain[i, 0], d.head.shift[i, 0])
        return torch.cat([part.softmax(1) for part in x.split(8, 1)], 1)

    hidden, w = [], d.width
    for i, g in enumerate(groups):
        own = slice(i * w, (i + 1) * w)
        w_in = torch.cat([d.w_z[:, own], d.w_a[g][:, own]])
        x = torch.cat([z, act[:, g]], 1) @ w_in + d.bias[own]
        x = mish(slow_norm(x, d.gain[i], d.shift[i])) @ d.second.weight[i] + d.second.bias[i, 0]
        hidden.append(mish(slow_norm(x, d.second.gain[i, 0], d.second.shift[i, 0])))
    if len(d.head.weight) == 1:
        return head(sum(hidden) / len(groups), 0)
    return sum(head(x, i) for i, x in enumerate(hidden)) / len(groups)


@pytest.mark.parametrize("groups", [WALKER, [[0, 1, 2]], [[2], [0], [1, 3]]])
def test_ed2_batched_trunks_are_the_looped_ones(groups):
    d, A = any_dynamics(groups), sum(map(len, groups))
    z, act = torch.randn(7, 16), torch.randn(7, A)
    got = d(z, act)
    assert torch.allclose(got, slow_dynamics(d, z, act, groups), atol=1e-5)
    assert torch.allclose(got.unflatten(1, (2, 8)).sum(2), torch.ones(7, 2), atol=1e-5)
    assert got.std() > 0.02


def test_ed2_one_group_is_the_plain_network():
    d = any_dynamics([[0, 1, 2]])
    mlp = nn.Sequential(ed2.NormedLinear(19, 8), ed2.NormedLinear(8, 8),
                        ed2.NormedLinear(8, 16, ed2.simnorm))
    weights = [torch.cat([d.w_z, d.w_a]), d.second.weight[0], d.head.weight[0]]
    rest = [(d.bias, d.gain[0], d.shift[0])]
    rest += [(m.bias[0, 0], m.gain[0, 0], m.shift[0, 0]) for m in (d.second, d.head)]
    for layer, w, (bias, gain, shift) in zip(mlp, weights, rest):
        layer.load_state_dict(
            {"weight": w.T, "bias": bias, "ln.weight": gain, "ln.bias": shift})
    z, act = torch.randn(9, 16), torch.randn(9, 3)
    assert torch.allclose(d(z, act), mlp(torch.cat([z, act], 1)), atol=1e-5)
    assert sum(p.numel() for p in d.parameters()) == sum(p.numel() for p in mlp.parameters())


def test_ed2_a_trunk_sees_its_own_actions_only(monkeypatch):
    d = any_dynamics(WALKER)
    masked = (1 - d.assign).bool().repeat_interleave(d.width, 1)
    z, act = torch.randn(5, 16), torch.randn(5, 6)
    before = d.trunks(z, act)
    for j in range(6):
        other = act.clone()
        other[:, j] = -3.0
        same = [torch.equal(x, y) for x, y in zip(before, d.trunks(z, other))]
        assert same == [j not in g for g in WALKER]
    start = copy.deepcopy(d.state_dict())
    opt = torch.optim.Adam(d.parameters(), 1e-2)
    for _ in range(5):
        opt.zero_grad()
        d(z, act).square().sum().backward()
        assert (d.w_a.grad[masked] == 0).all() and (d.w_a.grad[~masked] != 0).all()
        opt.step()
    assert torch.equal(d.w_a[masked], start["w_a"][masked])
    assert (d.w_a[~masked] != start["w_a"][~masked]).all()
    used = sum(p.numel() for p in d.parameters()) - int(masked.sum())
    monkeypatch.setitem(ed2.TDMPC2_SIZES, "tiny", (16, 8))
    assert used == ed2.counter("tdmpc2", "tiny")[0](WALKER, d.width)


@pytest.mark.parametrize("wm, size, widths, tolerance, unmatched", [
    ("tdmpc2", "5M", (272, 224, 272, 136), 0.04, None),
    ("tdmpc2", "1M", (216, 184, 216, 120), 0.04, None),
    ("dreamerv3", "1m", (168, 128, 168, 64), 0.05, (2.7, 3.5, 2.7, 6.9)),
    ("dreamerv3", "12m", (680, 512, 680, 256), 0.05, (2.7, 3.5, 2.7, 6.9))])
def test_ed2_matched_widths(wm, size, widths, tolerance, unmatched):
    args, (count, full) = ed2.Args(wm=wm, model_size=size), ed2.counter(wm, size)
    for i, groups in enumerate((WALKER, CHEETAH, HOPPER, HUMANOID)):
        every = [list(range(sum(map(len, groups))))]
        assert ed2.plan(args, groups) == {"single": (every, full), "ed2": (groups, widths[i])}
        assert ed2.plan(args, every) == {"single": (every, full)}
        single = count(every, full)
        assert abs(count(groups, widths[i]) / single - 1) < tolerance
        assert not unmatched or count(groups, full) / single == pytest.approx(unmatched[i], abs=.06)
    assert size != "5M" or 790_000 < single < 803_000
    assert ed2.match_width(lambda w: 10 * w, 803) == 80
    with says("within 5 %", "--model-size", "width 8"):
        ed2.match_width(lambda w: 1000 * w, 4000)


# -------------------------------------------------------------------------------- TD-MPC2's losses
class Push3:
    """A sampler of slices of a linear system that keeps what it gave."""

    device = "cpu"

    def __init__(self, steps=3):
        self.steps, self.seen = steps, []

    def sequences(self, n, generator, held_out=False):
        obs = [torch.randn(n, 4, generator=generator)]
        act = 2 * torch.rand(self.steps, n, 3, generator=generator) - 1
        for a in act:
            obs.append(0.9 * obs[-1] + 0.3 * torch.cat([a, a[:, :1]], 1))
        self.seen.append(torch.stack(obs))
        rew = obs[0][:, 0] * torch.ones(self.steps, 1)
        return data.Batch(torch.stack(obs), act, rew, 0 * rew, 0 * rew + 1, torch.zeros(n).long())


def tiny_tdmpc2(groups=None, seed=0, E=3):
    torch.manual_seed(seed)
    dynamics = ed2.Dynamics(16, 3, 24, groups or [[0, 1, 2]])
    torch.manual_seed(seed)
    return ed2.TDMPC2(4, 3, 16, 24, dynamics, E)


def test_ed2_consistency_against_its_definition():
    d = any_dynamics(TUG_GROUPS)
    z, act, target = torch.rand(5, 16), torch.randn(4, 5, 3), torch.rand(4, 5, 16)
    want, now = 0.0, z
    for t in range(4):
        now = slow_dynamics(d, now, act[t], TUG_GROUPS)
        assert torch.allclose(ed2.unroll(d, z, act)[t], now, atol=1e-5)
        want += 0.7**t / 4 * ((now - target[t]) ** 2).sum().item() / 80
    got = ed2.consistency_loss(d, z, act, target, rho=0.7).item()
    assert got == pytest.approx(want, rel=1e-4)


def test_ed2_policy_of_tdmpc2_is_a_squashed_normal():
    model, z, noise = tiny_tdmpc2(), torch.rand(6, 16), torch.randn(6, 3)
    mean, s = model.prior(z).chunk(2, -1)
    std = (-10 + 6 * (torch.tanh(s) + 1)).exp()
    squash = torch.distributions.TanhTransform()
    normal = torch.distributions.Normal(mean, std)
    want = torch.distributions.TransformedDistribution(normal, squash)
    act, logp = model.policy(z, noise)
    assert torch.allclose(act, torch.tanh(mean + std * noise)) and act.abs().max() <= 1
    assert torch.allclose(logp, want.log_prob(act).sum(-1), atol=1e-2)


def test_ed2_tdmpc2_loss_against_a_slow_reference():
    model = tiny_tdmpc2(TUG_GROUPS)
    for p in model.parameters():
        p.data += 0.2 * torch.randn_like(p)
    obs, act, *_ = Push3().sequences(4, gen())
    rew, noise, pair = torch.randn(3, 4), torch.randn(3, 4, 3), torch.tensor([2, 0])
    loss, metrics, z = ed2.tdmpc2_loss(model, obs, act, rew, noise, pair)
    want = dict(dyn=0.0, reward=0.0, value=0.0)
    with torch.no_grad():
        for b in range(4):
            now = model.encoder(obs[0, b])
            for t in range(3):
                assert torch.allclose(z[t, b], now, atol=1e-5)
                x = torch.cat([now, act[t, b]])
                reward = ed2.two_hot_loss(model.reward(x), rew[t, b]).item()
                want["reward"] += 0.5**t / 12 * reward
                true = model.encoder(obs[t + 1, b])
                y = torch.cat([true, model.policy(true, noise[t, b])[0]]).expand(3, 1, -1)
                q = ed2.two_hot_inv(model.q_slow(y))[:, 0]
                value = (rew[t, b] + 0.99 * min(q[2], q[0])).expand(3, 1)
                losses = ed2.two_hot_loss(model.q(x.expand(3, 1, -1)), value)
                want["value"] += 0.5**t / 36 * losses.sum().item()
                now = model.dynamics(now[None], act[t, b, None])[0]
                want["dyn"] += 0.5**t / 12 * (now - true).square().mean().item()
    for k, v in want.items():
        assert metrics[k].item() == pytest.approx(v, rel=1e-4), k
    total = 20 * want["dyn"] + 0.1 * (want["reward"] + want["value"])
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
        loss, scale = ed2.policy_loss(model, z, noise, scale)
        opt.zero_grad()
        loss.backward()
        opt.step()
        losses.append(loss.item())
    assert losses[-1] < losses[0] - 0.02 and scale >= 1 and not scale.requires_grad


def test_ed2_joint_training_learns_and_variants_see_the_same(monkeypatch):
    monkeypatch.setattr(ed2, "linear_fall", lambda step, total, lr: lr)
    args = ed2_args(updates=80, batch=16, lr=3e-3)
    seen, tails = [], []
    for groups in (None, TUG_GROUPS):
        model, sampler = tiny_tdmpc2(groups), Push3()
        before = copy.deepcopy(model)
        rewards = tiny_tdmpc2().reward.parameters(), model.reward.parameters()
        assert all(torch.equal(a, b) for a, b in zip(*rewards))
        tails.append([ed2_train(model, sampler, dataclasses.replace(args, updates=u), 5)
                      for u in (10, 80)])
        seen.append(torch.stack(sampler.seen))
        for name, m in model.named_children():
            pairs = zip(m.parameters(), getattr(before, name).parameters())
            assert all((a != b).any() for a, b in pairs), name
        drift, full = ([(a - b).norm() for a, b in zip(x.parameters(), y.parameters())]
                       for x, y in ((model.q_slow, before.q_slow), (model.q, before.q)))
        assert all(0 < a < 0.9 * b for a, b in zip(drift, full))
        assert all(p.requires_grad for p in model.q.parameters())
        assert not any(p.requires_grad for p in model.q_slow.parameters())
    assert torch.equal(*seen) and len(seen[0]) == 90
    assert all(late < 0.6 * early for early, late in tails), tails


def test_ed2_dynamics_alone_learn_on_a_fixed_encoder():
    encoder = nn.Sequential(ed2.NormedLinear(4, 32), ed2.NormedLinear(32, 16, ed2.simnorm))
    encoder.requires_grad_(False)
    before, seen = copy.deepcopy(encoder.state_dict()), []
    args = ed2_args(updates=60, batch=32, lr=3e-3)
    for groups in ([[0, 1, 2]], TUG_GROUPS):
        torch.manual_seed(0)
        d, sampler = ed2.Dynamics(16, 3, 24, groups), Push3()
        start = copy.deepcopy(d)
        ed2_train(d, sampler, args, 3, encoder)
        assert all(torch.equal(encoder.state_dict()[k], v) for k, v in before.items())
        assert all((a != b).any() for a, b in zip(d.parameters(), start.parameters()))
        obs, act, *_ = Push3().sequences(200, gen(9))
        z = encoder(obs)
        new, old = (ed2.consistency_loss(x, z[0], act, z[1:]).item() for x in (d, start))
        assert new < 0.5 * old
        seen.append(torch.stack(sampler.seen))
    assert torch.equal(*seen)
    other = Push3()
    ed2_train(d, other, args, 4, encoder)
    assert not torch.equal(torch.stack(other.seen), seen[0])


def test_ed2_rate_falls_and_a_loss_that_is_not_finite_stops():
    rates = [ed2.linear_fall(t, 200, 2.0) for t in range(201)]
    assert rates[0] == rates[100] == 2.0 and rates[200] == pytest.approx(0.06)
    assert rates[150] == pytest.approx(1.03) and all(a >= b for a, b in zip(rates, rates[1:]))
    encoder = nn.Sequential(ed2.NormedLinear(4, 16, ed2.simnorm)).requires_grad_(False)
    model = ed2.Dynamics(16, 3, 24, TUG_GROUPS)
    model.w_z.data[0] = float("nan")
    with says("not finite", "learning rate"):
        ed2_train(model, Push3(), ed2_args(), 0, encoder)
    bad = Push3(9)
    bad.sequences = lambda *a: Push3.sequences(bad, *a)._replace(rew=torch.full((9, 4), math.nan))
    for wm, model in (("tdmpc2", tiny_tdmpc2()), ("dreamerv3", tiny_dreamer(4, 3))):
        with says("not finite", "learning rate"):
            ed2_train(model, bad, ed2_args(wm=wm))


def test_ed2_two_hot_losses_carry_nan_to_the_finite_check():
    x, logits = torch.tensor([0.3, math.nan, -math.inf, 2e9]), torch.randn(4, 255)
    for script in (pwm, ed2, mow):
        loss = script.two_hot_loss(logits[:, :script.BINS], x)
        assert loss.isnan().tolist() == [False, True, False, False]
    loss = ed2.symexp_two_hot_loss(logits, x)
    assert loss[1].isnan() and loss[[0, 3]].isfinite().all()


# ------------------------------------------------------------------------------------- measuring
def test_ed2_latent_errors_of_models_that_are_known():
    class Oracle(nn.Module):  # the latents are the states
        def forward(self, z, a):
            return 0.9 * z + 0.3 * torch.cat([a, a[:, :1]], 1)

    encoder = nn.Linear(4, 4).requires_grad_(False)
    encoder.weight.copy_(torch.eye(4))
    encoder.bias.zero_()
    right = ed2.measure_latents(encoder, Oracle(), Push3(10))
    errors = [v for k, v in right.items() if not k.startswith("persistence")]
    assert max(errors) < 1e-6 < right["persistence_mse_1"] and right["logged"] < 1e-9
    still = ed2.measure_latents(encoder, lambda z, a: z, Push3(10))
    for h in (1, 3, 5, 10):
        assert still[f"mse_{h}"] == pytest.approx(still[f"persistence_mse_{h}"], rel=1e-5)
    assert still["mse_1"] < still["per_step_mse"] < still["mse_3"]


def test_ed2_nmse():
    rng = np.random.default_rng(0)
    true = rng.normal(size=(1000, 3)) * [1, 5, 0]
    assert ed2.nmse(true.mean(0), true, true.var(0)) == pytest.approx(1)
    assert ed2.nmse(true, true, true.var(0)) == 0


@pytest.mark.parametrize("wm", ["tdmpc2", "dreamerv3"])
def test_ed2_learns_cheetah(wm, cheetah):
    """Held-out error of dynamics in latents, or of reconstruction, falls to a third."""
    replay = Episodes.open(cheetah / "replay")
    torch.manual_seed(0)
    if wm == "tdmpc2":
        sampler = replay.sampler(["cheetah-run"], 3, held_out=0.1)
        encoder = nn.Sequential(ed2.NormedLinear(17, 64), ed2.NormedLinear(64, 64, ed2.simnorm))
        model = ed2.Dynamics(64, 6, 96, CHEETAH)
        obs, act, *_ = sampler.sequences(256, gen(), held_out=True)
        z = encoder.requires_grad_(False)(obs)
        before = ed2.consistency_loss(model, z[0], act, z[1:]).item()
        ed2_train(model, sampler, ed2_args(updates=150, batch=64, lr=3e-3), 0, encoder)
        after = ed2.consistency_loss(model, z[0], act, z[1:]).item()
    else:
        sampler = replay.sampler(["cheetah-run"], 12, held_out=0.1)
        model = ed2.DreamerV3(17, 6, 64, 16, 8, 32, groups=CHEETAH, width=32, stoch=8)
        obs, act, rew, *_ = sampler.sequences(16, gen(), held_out=True)
        batch = obs, act, rew, ed2.draw_gumbel((13, 16, 8, 8), gen())
        before = ed2.rssm_loss(model, *batch)[1]["rec"].item()
        ed2_train(model, sampler, ed2_args(wm=wm, updates=60, batch=16, lr=1e-2, length=12))
        after = ed2.rssm_loss(model, *batch)[1]["rec"].item()
    assert after < before / 3, (before, after)


# -------------------------------------------------------------- DreamerV3 with a decomposed core
FULL9 = [[j] for j in range(9)]  # more groups than blocks
TINY_DREAMER = dict(deter=32, hidden=8, classes=4, units=16, stoch=4)


def tiny_dreamer(obs_dim=3, act_dim=6, seed=0, **kw):
    torch.manual_seed(seed)
    return ed2.DreamerV3(obs_dim, act_dim, **TINY_DREAMER | kw)


def any_core(act_dim=6, seed=0, **kw):
    torch.manual_seed(seed)
    rssm = ed2.RSSM(act_dim, 16, 32, 8, 4, stoch=4, **kw)
    for name, p in rssm.named_parameters():  # biases and gains that matter
        if "bias" in name or "gain" in name or p.ndim == 1:
            p.data.add_(0.3 * torch.randn(p.shape))
    return rssm


def recording(T=6, B=4, O=3, A=6, seed=1):
    g = gen(seed)
    return (torch.randn(T + 1, B, O, generator=g), 2 * torch.rand(T, B, A, generator=g) - 1,
            torch.randn(T, B, generator=g))


GUMBEL = ed2.draw_gumbel((7, 4, 4, 4), gen(2))


def test_ed2_dreamer_symexp_two_hot():
    x = torch.tensor([0.0, 1e-3, -0.3, 1.0, 7.7, -250.0, 1e4])
    bins = ed2.symexp_bins("cpu")
    assert bins.shape == (255,) and bins[127] == 0 and torch.equal(bins, -bins.flip(0))
    k = torch.searchsorted(bins, x, right=True) - 1
    high = (x - bins[k]) / (bins[k + 1] - bins[k])
    p = torch.zeros(len(x), 255).scatter(1, k[:, None], 1 - high[:, None])
    p = p.scatter(1, k[:, None] + 1, high[:, None])
    assert torch.allclose((p * bins).sum(-1), x, rtol=1e-4, atol=1e-5)
    logits = torch.randn(len(x), 255, requires_grad=True)
    loss = ed2.symexp_two_hot_loss(logits, x)
    assert torch.allclose(loss, -(p * logits.log_softmax(-1)).sum(-1), atol=1e-3)
    loss.sum().backward()
    assert torch.allclose(logits.grad, logits.softmax(-1) - p, atol=1e-4)
    assert torch.allclose(ed2.symexp(ed2.symlog(x)), x, rtol=1e-5)


def test_ed2_dreamer_latents():
    logits = torch.randn(3, 4, requires_grad=True)
    logp = ed2.unimix(logits)
    p = logp.exp()
    assert torch.allclose(p, 0.99 * logits.softmax(-1) + 0.0025, atol=1e-6)
    assert ed2.unimix(torch.tensor([[0.0, 1e4]])).exp().min() == pytest.approx(0.005)
    gumbel = ed2.draw_gumbel((20_000, 3, 4), gen())
    z = ed2.sample_latent(logp.expand(20_000, 3, 4), gumbel).unflatten(-1, (3, 4))
    assert torch.equal(z.sum(-1).round(), torch.ones(20_000, 3))
    assert torch.allclose(z.mean(0), p, atol=0.02)
    w = torch.randn(3, 4)  # straight-through: the gradient of p
    sample = ed2.sample_latent(logp, torch.zeros(3, 4)).unflatten(-1, (3, 4))
    a, b = (torch.autograd.grad((x * w).sum(), logits, retain_graph=True)[0] for x in (sample, p))
    assert torch.allclose(a, b)
    q = ed2.unimix(torch.randn(3, 4))
    both = (torch.distributions.Categorical(x.exp()) for x in (logp, q))
    want = torch.distributions.kl_divergence(*both)
    assert torch.allclose(ed2.kl(logp, q), want.sum(), atol=1e-5)


def test_ed2_dreamer_parameter_counts():
    model = ed2.DreamerV3(24, 6, **ed2.DREAMER_SIZES["1m"])
    sizes = {name: sum(p.numel() for p in m.parameters()) for name, m in model.named_children()}
    assert sizes == dict(encoder=10_112, rssm=364_416, decoder=51_096, reward=57_663, cont=41_153)
    assert ed2.counter("dreamerv3", "1m")[0]([list(range(6))], 512) == 273_664


@pytest.mark.parametrize("kw", [
    dict(), dict(groups=WALKER, width=16), dict(groups=[list(range(6))] * 3, width=16)])
def test_ed2_dreamer_counter_counts_what_is_used(kw, monkeypatch):
    rssm = any_core(**kw)
    used = sum(p.numel() for name, p in rssm.named_parameters()
               if not name.startswith(("prior", "post")))
    used -= int((1 - rssm.act_mask).sum()) * 8
    monkeypatch.setitem(ed2.DREAMER_SIZES, "tiny", dict(deter=32, hidden=8, classes=0.5, units=16))
    count, full = ed2.counter("dreamerv3", "tiny")  # half a class: 32 of them as 4 of 4 classes
    assert used == count(kw.get("groups", [list(range(6))]), kw.get("width", 32)) and full == 32


def slow_core(rssm, h, z, act, groups):
    """'Block GRU' of DreamerV3, word by word, a sub-core and a block at a time: h_i (k, B, D)."""
    def norm(x, gain):
        return x / (x.square().mean(-1, keepdim=True) + 1e-4).sqrt() * gain
    silu, sigmoid, g, d = F.silu, torch.sigmoid, rssm.blocks, rssm.deter
    x0, x1 = (silu(norm(m[0](x), m[1].weight)) for m, x in ((rssm.h_in, h), (rssm.z_in, z)))
    a, out = act / act.abs().clamp(min=1), []
    for i, part in enumerate(groups):
        x2 = a[:, part] @ rssm.act_weight[i, part] + rssm.act_bias[i]
        x2 = silu(norm(x2, rssm.act_gain[i]))
        hidden, new = [], []
        for b in range(g):
            x = torch.cat([h[:, b * d // g:(b + 1) * d // g], x0, x1, x2], -1)
            hidden.append(x @ rssm.hid.weight[i, b] + rssm.hid.bias[i, b, 0])
        whole = silu(norm(torch.cat(hidden, -1), rssm.hid_gain[i].flatten()))
        for b, x in enumerate(whole.chunk(g, -1)):
            r, c, u = (x @ rssm.gru.weight[i, b] + rssm.gru.bias[i, b, 0]).chunk(3, -1)
            u, old = sigmoid(u - 1), h[:, b * d // g:(b + 1) * d // g]
            new.append(u * torch.tanh(sigmoid(r) * c) + (1 - u) * old)
        out.append(torch.cat(new, -1))
    return torch.stack(out)


CORES = [(6, [list(range(6))], None), (6, WALKER, 16), (6, WALKER, None), (9, FULL9, 8),
         (6, [list(range(6))] * 3, 16)]


def core_inputs(act_dim, B=5):
    g = gen(3)
    return [torch.randn(B, n, generator=g) for n in (32, 16, act_dim)]


@pytest.mark.parametrize("act_dim, groups, width", CORES)
def test_ed2_dreamer_batched_core_is_the_looped_one(act_dim, groups, width):
    rssm = any_core(act_dim, groups=groups, width=width)
    h, z, act = core_inputs(act_dim)
    weights = rssm.core_weights()
    act_in = rssm.act_input(weights, act)
    got = rssm.subcores(weights, h, z, act_in).permute(0, 2, 1, 3).flatten(2)
    want = slow_core(rssm, h, z, act, groups)
    assert torch.allclose(got, want, atol=1e-5)
    assert torch.allclose(rssm.step(weights, h, z, act_in), want.mean(0), atol=1e-5)


def test_ed2_dreamer_one_group_is_the_single_model():
    single, one = tiny_dreamer(), tiny_dreamer(seed=1, groups=[list(range(6))])
    one.load_state_dict(single.state_dict())
    a, b = (ed2.rssm_loss(m, *recording(), GUMBEL) for m in (single, one))
    assert torch.allclose(a[0], b[0], atol=1e-5) and torch.allclose(a[2][0], b[2][0], atol=1e-5)


@pytest.mark.parametrize("act_dim, groups, width", CORES[1:4])
def test_ed2_dreamer_foreign_actions_do_not_matter(act_dim, groups, width):
    rssm = any_core(act_dim, groups=groups, width=width)
    h, z, act = core_inputs(act_dim)
    weights = rssm.core_weights()
    before = rssm.subcores(weights, h, z, rssm.act_input(weights, act))
    for j in range(act_dim):
        other = act.clone()
        other[:, j] = -0.37
        after = rssm.subcores(weights, h, z, rssm.act_input(weights, other))
        assert [torch.equal(x, y) for x, y in zip(before, after)] == [j not in g for g in groups]
    after.square().sum().backward()
    masked = (1 - rssm.act_mask).bool().expand_as(rssm.act_weight)
    assert (rssm.act_weight.grad[masked] == 0).all() and (rssm.act_weight[masked] == 0).all()
    assert (rssm.act_weight.grad[~masked] != 0).all()


def test_ed2_dreamer_initial_scale_follows_the_true_fan_in():
    torch.manual_seed(0)
    rssm = ed2.RSSM(6, 16, 32, 512, 4, stoch=4, groups=WALKER, width=16)
    for i, part in enumerate(WALKER):
        assert rssm.act_weight[i, part].std().item() == pytest.approx(len(part) ** -0.5, rel=0.1)
        assert rssm.act_weight[i, part].abs().max() <= 2 * 1.1368 * len(part) ** -0.5
    assert rssm.hid.weight.std().item() == pytest.approx((8 * (4 + 3 * 512)) ** -0.5, rel=0.1)
    assert (tiny_dreamer().reward[-1].weight == 0).all()


def test_ed2_dreamer_kl_floor():
    model = tiny_dreamer()
    for net in (model.rssm.prior_net, model.rssm.post_net):
        nn.init.zeros_(net[-1].weight)
    loss, metrics, _ = ed2.rssm_loss(model, *recording(), GUMBEL)
    assert metrics["dyn"] == 1 and metrics["rep"] == 1 and metrics["dyn_raw"].abs() < 1e-6
    assert metrics["prior_entropy"].item() == pytest.approx(4 * np.log(4), rel=1e-5)
    loss.backward()
    assert all((p.grad == 0).all() for p in model.rssm.prior_net.parameters())
    trained = [p for n, p in model.named_parameters() if "prior_net" not in n]
    assert all(p.grad is not None and p.grad.isfinite().all() for p in trained)


def test_ed2_dreamer_time_alignment():
    model = tiny_dreamer()
    obs, act, rew = recording()
    h = ed2.rssm_loss(model, obs, act, rew, GUMBEL)[2][0]
    other = act.clone()
    other[2] = 0.9
    h2 = ed2.rssm_loss(model, obs, other, rew, GUMBEL)[2][0]
    assert torch.equal(h[:3], h2[:3]) and not torch.equal(h[3], h2[3])
    # no reward of the first state: a head that is right about rew has the entropy as loss
    nn.init.zeros_(model.reward[-1].weight)
    model.reward[-1].bias.data[127] = 50.0
    _, metrics, _ = ed2.rssm_loss(model, obs, act, torch.zeros_like(rew), GUMBEL)
    assert metrics["rew"] < 1e-6
    late, whole = (ed2.rssm_loss(model, obs, act, rew, GUMBEL, skip)[1] for skip in (3, 0))
    assert set(late) == {"rec", "rew", "con", "dyn", "rep", "dyn_raw", "post_entropy",
                         "prior_entropy"}
    assert late["rec"] != whole["rec"]
    assert all(not x.requires_grad and x.ndim == 0 for x in late.values())


def test_ed2_dreamer_open_loop():
    model = tiny_dreamer(groups=WALKER, width=16)
    obs, act, _ = recording()
    a = ed2.open_loop(model, obs, act, GUMBEL, 3)
    assert a.shape == (4, 4, 3)
    changed, later = obs.clone(), act.clone()
    changed[3:] += 1
    later[4] = 0.5
    assert torch.equal(a, ed2.open_loop(model, changed, act, GUMBEL, 3))  # reads the context only
    b = ed2.open_loop(model, obs, later, GUMBEL, 3)  # act[4] matters to obs[5] = prediction 2
    assert torch.equal(a[:2], b[:2]) and not torch.equal(a[2], b[2])
    h, _, _ = model.rssm.observe(model.encoder(ed2.symlog(obs)), act, GUMBEL)
    z = ed2.sample_latent(model.rssm.prior(h[3]), GUMBEL[3])
    want = ed2.symexp(model.decoder(torch.cat([h[3], z], -1)))
    assert torch.allclose(a[0], want, atol=1e-5)


def test_ed2_dreamer_laprop_against_a_slow_reference():
    class Parts(nn.Module):
        apart = ("stacked",)

        def __init__(self):
            super().__init__()
            self.p = nn.Parameter(torch.randn(4, 3))
            self.stacked = nn.Parameter(torch.randn(2, 3, 5))
            self.last = nn.Parameter(torch.zeros(3))

    torch.manual_seed(0)
    parts = Parts()
    opt = ed2.LaProp(parts, lr=0.01, warmup=3)

    def pieces(grad=False):
        p, stacked, last = (x.grad if grad else x.detach() for x in parts.parameters())
        return [x.clone() for x in (p, *stacked, last)]

    mine = pieces()
    mu, nu = ([torch.zeros_like(x) for x in mine] for _ in range(2))
    for t in range(1, 6):
        scale = 10.0 if t % 2 else 0.01
        for p in parts.parameters():
            p.grad = scale * torch.randn(p.shape)
        if t == 1:
            parts.last.grad = torch.zeros(3)
        grads = pieces(grad=True)
        opt.step()
        for i, g in enumerate(grads):
            limit = 0.3 * max(1e-3, mine[i].norm().item())
            g = g * min(1.0, limit / max(g.norm().item(), 1e-30))
            nu[i] = 0.999 * nu[i] + 0.001 * g * g
            g = g / ((nu[i] / (1 - 0.999**t)).sqrt() + 1e-20)
            mu[i] = 0.9 * mu[i] + 0.1 * g
            mine[i] = mine[i] - 0.01 * min(1, t / 3) * mu[i] / (1 - 0.9**t)
        for a, b in zip(pieces(), mine):
            assert torch.allclose(a, b, atol=1e-5) and a.isfinite().all()


def test_ed2_dreamer_sub_cores_are_clipped_apart_and_masked_weights_stay_zero():
    model = copy.deepcopy(tiny_dreamer(groups=WALKER, width=16))
    opt = ed2.LaProp(model, 1e-2, 1)
    params = opt.param_groups[0]["params"]
    assert list(map(id, params)) == list(map(id, model.parameters()))
    apart = {name for (name, p), dims in zip(model.named_parameters(), opt.dims)
             if dims == list(range(1, p.ndim))}
    rssm = {"act_weight", "act_bias", "act_gain", "hid_gain"}
    rssm |= {f"{m}.{x}" for m in ("hid", "gru") for x in ("weight", "bias")}
    assert apart == {f"rssm.{name}" for name in rssm}
    assert all(model.get_parameter(name).shape[0] == len(WALKER) for name in apart)
    before = [p.detach().clone() for p in model.parameters()]
    for _ in range(3):
        opt.zero_grad()
        ed2.rssm_loss(model, *recording(), GUMBEL)[0].backward()
        opt.step()
    masked = (1 - model.rssm.act_mask).bool().expand_as(model.rssm.act_weight)
    assert (model.rssm.act_weight[masked] == 0).all()
    assert all(not torch.equal(a, b) for a, b in zip(before, model.parameters()))


# ------------------------------------------------------------------------------------- statistics
def test_ed2_relative_change_and_verdict():
    old, new = [1.0, 2.0, 4.0], [0.9, 1.6, 2.8]
    mean, low, high, p = ed2.relative_change(new, old)
    half = 4.302653 * 0.1 / 3**0.5  # t of 0.975 with 2 degrees of freedom; changes -10, -20, -30 %
    assert (mean, low, high) == pytest.approx((-0.2, -0.2 - half, -0.2 + half))
    assert p == pytest.approx(0.0742, abs=1e-3)
    one = ed2.relative_change([2.0], [1.0])
    assert one[0] == 1 and np.isnan(one[1:]).all()
    assert ed2.relative_change([1.0, 1.0], [1.0, 1.0]) == (0, 0, 0, 1)
    assert ed2.relative_change([2.0, 2.0], [1.0, 1.0]) == (1, 1, 1, 0)
    assert ed2.verdict(-0.2, -0.3, -0.1) == "win" and ed2.verdict(-0.2, -0.3, -0.1, False) == "tie"
    assert ed2.verdict(0.2, 0.1, 0.3) == ed2.verdict(0.2, 0.1, 0.3, False) == "loss"
    nan = float("nan")
    for row in ((-0.2, -0.5, 0.1), (-0.04, -0.045, -0.035), (0.04, 0.03, 0.045), (-0.9, nan, nan)):
        assert ed2.verdict(*row) == "tie"


# ------------------------------------------------------------------------------ data and bad input
def test_ed2_data_of_the_carts(tug):
    random, replay, notes = ed2.make_data(TUG_TASK, tug, 3000, 1)
    x, y = random.arrays(TUG_TASK), replay.arrays(TUG_TASK)
    assert x["length"].sum() >= 20_000
    assert np.abs(x["act"]).max() <= 1 and abs(x["act"].mean()) < 0.02
    assert len(y["length"]) == 48 and len(notes["returns"]) == 3  # 3 rounds of 8 and opposites
    ret = y["rew"].sum(1).reshape(3, 16)
    assert np.allclose([(r.mean(), r.max()) for r in ret], notes["returns"], rtol=1e-4)
    assert notes["random_return"] == pytest.approx(x["rew"].sum(1).mean(), rel=1e-4)
    assert ret[-1].max() > notes["random_return"]
    assert np.allclose(y["obs"][:8, 0], y["obs"][8:16, 0])  # opposite directions start alike
    assert ed2.find_partition("sd2", TUG_TASK, random)[0] == TUG_GROUPS
    sampler = replay.sampler([TUG_TASK], 64, held_out=0.1)
    held, train = ({o.numpy().tobytes() for o in sampler.sequences(200, gen(), held_out=out)[0][-1]}
                   for out in (True, False))
    assert 4 <= len(held) <= 5 and not held & train


def test_ed2_search_climbs(tmp_path, tug):
    class Pool:  # the return is how well action 0 follows state 0
        def rollout(self, jobs, policy):
            n, rng = len(jobs), np.random.default_rng(0)
            s = rng.normal(size=(64, n, 4)).astype(np.float32)
            act = np.stack([policy(s[t], np.arange(n), np.full(n, t)) for t in range(64)])
            rew = -np.abs(act[:, :, 0] - s[:, :, 0].clip(-1, 1))
            return [dict(obs=np.r_[s[:, i], s[:1, i]], act=act[:, i], rew=rew[:, i],
                         term=np.zeros(64, bool), ret=rew[:, i].sum()) for i in range(n)]

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
    with says("3 episodes", "at least 4"):
        ed2.make_data(TUG_TASK, tug, 1, 1, folder("few", (4, 3, 64), n=3))


@pytest.mark.parametrize("settings, words", [
    (dict(resume="nowhere"), ("nowhere", "args.json")), (dict(workers=0), ("--workers 0",)),
    (dict(seeds=0), ("--seeds 0",)), (dict(seed=-1), ("--seed -1",)),
    (dict(device="cuda"), ("no GPU",)), (dict(task="walker-wolk"), ("walker-walk",)),
    (dict(data_dir="x", data_steps=9), ("--data-steps 9", "--data-dir")),
    (dict(model_size="99m", wm="dreamerv3"), ("--model-size 99m", "1m", "12m")),
    (dict(model_size="1m"), ("--model-size 1m", "1M", "5M")), (dict(updates=0), ("--updates 0",)),
    (dict(length=4, wm="dreamerv3"), ("--length 4",)), (dict(lr=-1e-3), ("--lr -0.001",)),
    (dict(partition="published", task="cup-catch"), ("no published partition", "walker, cheetah")),
    (dict(partition="full", eta=0.1), ("--eta 0.1",)), (dict(data_steps=-5), ("--data-steps -5",))])
def test_ed2_bad_flags_get_one_sentence(settings, words, tmp_path, monkeypatch):
    if settings.get("device") == "cuda" and torch.cuda.is_available():
        pytest.skip("there is a GPU")
    monkeypatch.chdir(tmp_path)
    for name in ("make_data", "Workers"):
        monkeypatch.setattr(ed2, name, lambda *a, **k: pytest.fail("began to work"))
    with says(*words):
        ed2.main(ed2.Args(**{"device": "cpu"} | settings))
    assert not (tmp_path / "runs").exists()


# ---------------------------------------------------------------------------- whole runs of ed2.py
@pytest.fixture
def small(tmp_path, monkeypatch):
    """Smaller models and test sets; runs/ goes to tmp_path."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setitem(ed2.TDMPC2_SIZES, "1M", (64, 160))
    size = dict(deter=256, hidden=32, classes=4, units=32)
    monkeypatch.setitem(ed2.DREAMER_SIZES, "1m", size)
    rssm = functools.partial(ed2.measure_rssm, batch=16, draws=2)
    monkeypatch.setattr(ed2, "measure_rssm", rssm)
    monkeypatch.setattr(ed2, "measure_latents", functools.partial(ed2.measure_latents, batch=64))


@pytest.mark.parametrize("wm", ["tdmpc2", "dreamerv3"])
def test_ed2_compare_killed_inside_a_training_ends_at_the_same_numbers(wm, tug, small, monkeypatch,
                                                                       capsys):
    args = ed2_args(wm=wm, seeds=2, save_every=0)
    runs = [ed2_run(args, tug) for _ in range(2)]
    whole = ed2.main(ed2.Args(resume=str(runs[0])))
    out = capsys.readouterr().out
    assert f"groups {TUG_GROUPS}" in out and "  merge [0] + [1]: +" in out
    assert f"verdict on {ed2.PRIMARY[wm]}" in out and "95 % interval" in out
    names = {p.name for p in runs[0].iterdir()}
    assert names >= {"results.json", "results.csv", "cells", "trainings"}
    saved = json.loads((runs[0] / "results.json").read_text())
    assert saved["table"] == whole["table"]
    lines = (runs[0] / "results.csv").read_text().splitlines()
    assert lines[0] == "metric,single,ed2,change,low,high" and len(lines) == 1 + len(whole["table"])
    regime = "frozen" if wm == "tdmpc2" else "replay"
    wanted = [("joint", "single")] * (wm == "tdmpc2") + [(regime, "single"), (regime, "ed2")]
    kinds = [(c["seed"], c["regime"], c["variant"]) for c in whole["cells"]]
    assert kinds == [(s, *w) for s in (1, 2) for w in wanted]
    for c in whole["cells"]:
        assert c["dynamics_params"] == ed2.counter(wm, args.model_size)[0](c["groups"], c["width"])
        numbers = [x for x in c.values() if isinstance(x, float)]
        assert len(numbers) > 10 and np.isfinite(numbers).all()
    row = next(r for r in whole["table"] if r["metric"] == ed2.PRIMARY[wm])
    a, b = (np.array([c[ed2.PRIMARY[wm]] for c in whole["cells"] if c["regime"] == regime
                      and c["variant"] == v]) for v in ("single", "ed2"))
    assert (row["single"], row["ed2"]) == (a.mean(), b.mean())
    assert row["change"] == pytest.approx((b / a - 1).mean())
    assert whole["verdict"] == ed2.verdict(row["change"], row["low"], row["high"])

    real, calls = ed2.linear_fall, []

    def killed(*a, **k):  # amid the third training, whose last step was saved
        calls.append(1)
        if len(calls) == 2 * args.updates + 6:
            raise KeyboardInterrupt
        return real(*a, **k)

    with monkeypatch.context() as m:
        m.setattr(ed2, "linear_fall", killed)
        with says("stopped; go on with: python", f"--resume {runs[1]}"):
            ed2.main(ed2.Args(resume=str(runs[1])))
    stamps = {p: p.stat().st_mtime_ns for p in (runs[1] / "cells").iterdir()}
    assert len(stamps) == 2 and len(list((runs[1] / "trainings").glob("*/checkpoint.pt"))) == 1
    monkeypatch.setattr(ed2, "linear_fall", lambda *a, **k: calls.append(1) or real(*a, **k))
    again = ed2.main(ed2.Args(resume=str(runs[1])))
    assert again["table"] == whole["table"] and again["partition"] == whole["partition"]
    assert stamps == {p: p.stat().st_mtime_ns for p in stamps}
    assert len(calls) == len(whole["cells"]) * args.updates + 1  # no update was done twice


@pytest.mark.parametrize("settings", [
    dict(partition="full"), dict(wm="dreamerv3", partition="full"),
    dict(partition="none", updates=2), dict(wm="dreamerv3", partition="none", updates=2)])
def test_ed2_variants_of_a_run(settings, tug, small, capsys):
    """Other groups, on given data; one group, for which the baseline runs alone and says so."""
    args = ed2_args(data_dir=str(tug / "replay"), **settings)
    result = ed2.main(ed2.Args(resume=str(ed2_run(args, tug))))
    cells = {c["variant"]: c for c in result["cells"]}
    assert all(np.isfinite(c["train_loss"]) for c in result["cells"])
    if args.partition == "none":
        assert "verdict" not in result and set(cells) == {"single"}
        assert "ED2 is the single model, which runs alone" in capsys.readouterr().out
    else:
        assert set(cells) == {"single", "ed2"} and result["verdict"] == "none, 1 seed"
        sizes = [cells[v]["dynamics_params"] for v in ("ed2", "single")]
        assert sizes[0] / sizes[1] == pytest.approx(1, abs=0.05)
        assert cells["ed2"]["groups"] == [[0], [1], [2]]


def test_ed2_compiled_losses_were_compiled_and_agree_with_eager(monkeypatch):
    real = torch.compile
    checked = functools.partial(real, backend="eager", fullgraph=True)
    monkeypatch.setattr(torch, "compile", checked)
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    encoder = nn.Sequential(ed2.NormedLinear(4, 16, ed2.simnorm)).requires_grad_(False)
    counters, results = torch._dynamo.utils.counters, []
    for compiled in (False, True):
        args = ed2_args(updates=10, compile=compiled)
        model = tiny_tdmpc2(TUG_GROUPS)
        joint = ed2_train(model, Push3(), args)
        ed2_train(model.dynamics, Push3(), args, 0, encoder)
        rssm = tiny_dreamer(4, 3, groups=TUG_GROUPS, width=16)
        args = dataclasses.replace(args, wm="dreamerv3", updates=3)
        ed2_train(rssm, Push3(9), args)
        results.append([joint, *(p.detach() for p in [*model.parameters(), *rssm.parameters()])])
    assert counters["stats"]["unique_graphs"] == 4 and not counters["graph_break"]  # compiled once
    assert results[0][0] == pytest.approx(results[1][0], rel=1e-3)
    assert all(torch.allclose(a, b, atol=1e-3) for a, b in zip(results[0][1:], results[1][1:]))


def test_ed2_copied_with_its_two_helpers_it_runs(tmp_path, tug):
    for name in ("ed2.py", "envs.py", "data.py"):
        (tmp_path / name).write_text(Path(HERE, name).read_text())
    (tmp_path / "tug.py").write_text(TUG)
    env = {k: v for k, v in os.environ.items() if k != "PYTHONPATH"} | {"OMP_NUM_THREADS": "1"}

    def run(*words):
        p = subprocess.run([sys.executable, "ed2.py", *words], cwd=tmp_path, env=env,
                           capture_output=True, text=True)
        assert p.returncode == 0, p.stderr[-2000:]
        return p.stdout

    out = run("--help")
    assert all(data.flag(f.name) in out for f in dataclasses.fields(ed2.Args))
    assert "Deviations" in out and "--no-compile" in out
    out = run("--task", TUG_TASK, "--fast", "--seeds", "1", "--workers", "2", "--updates", "10",
              "--data-dir", str(tug / "replay"))
    (folder,) = (tmp_path / "runs").iterdir()
    assert "updates 10," in out and f"files: {folder.relative_to(tmp_path)}/" in out
    assert {f.name for f in folder.iterdir()} >= {"ed2.py", "envs.py", "data.py", "args.json"}
    result = json.loads((folder / "results.json").read_text())
    assert result["partition"] == TUG_GROUPS and "--task tug:Tug-v0" in result["command"]
    assert len(result["cells"]) == 3


# ------------------------------------------------------------------------------------------ mow.py
GAMES = "Boxing,Krull,RoadRunner"
MOW_SIZES = dict(stem=4, latents=4, classes=4, width=16, heads=2, hidden=16, emb=8)
MOW_TINY = dict(steps=44, random_steps=12, warmup=4, train_every=1, batch=2, length=8, rollouts=4,
                context=3, horizon=3, eval_episodes=1, sizes=MOW_SIZES, atari={"frame_cap": 80},
                device="cpu", compile=False, bf16=False)
CPU = torch.device("cpu")


def mow_settled(**more):
    args = mow.Args(**MOW_TINY | more)
    return mow.settle(args, mow.task_list(args.task), CPU)


def mow_agent(K=3, make=mow.Agent, **more):
    """A tiny agent for K games, its clusters given in turn."""
    args = mow_settled(task=",".join(envs.ATARI26[:K]), **more)
    agent = make(args, [list(range(18))] * K, CPU)
    agent.wm.assign([k % args.clusters for k in range(K)])
    return agent


def mow_batch(agent, B=2, L=6, seed=0):
    K, g = agent.K, gen(seed)
    obs = torch.randint(0, 256, (K, B, L, 64, 64, 3), generator=g, dtype=torch.uint8)
    act = F.one_hot(torch.randint(0, 18, (K, B, L), generator=g), agent.A).float()
    flags = torch.zeros(K, B, L, dtype=torch.bool)
    return obs, act, torch.randn(K, B, L, generator=g), flags, flags.clone()


def mow_frames(agent, path, n=40):
    frames = data.Frames(path, agent.K, n, agent.A)
    rng = np.random.default_rng(0)
    for t in range(n):
        frames.append(rng.integers(0, 256, (agent.K, 64, 64, 3)),
                      np.eye(agent.A)[rng.integers(0, 18, agent.K)], rng.normal(size=agent.K),
                      [t % 9 == 8] * agent.K, [t % 9 == 0] * agent.K)
    return frames


def mow_update(agent, frames, act=True):
    """One update of the world model, and of the agent."""
    batch = agent.sample(frames)
    loss, z, metrics = agent.model_loss(batch)
    mow.descend(loss, agent.opt, 1000.0)
    agent.updates += 1
    if act:
        loss, more = agent.policy_loss(agent.imagine(z, batch))
        mow.descend(loss, agent.agent_opt, 100.0)
        agent.follow()
        metrics |= more
    return metrics


def mow_numbers(*parts):
    """All tensors of agents or checkpoints, by name."""
    parts = [p if isinstance(p, dict) else p.state_dict() for p in parts]
    leaves, _ = torch.utils._pytree.tree_flatten_with_path(parts)
    return {str(path): x.detach().clone() for path, x in leaves if torch.is_tensor(x)}


def mow_words(**more):
    """MOW_TINY as words of a command line."""
    out = ["--no-compile", "--no-bf16"]
    for k, v in (MOW_TINY | more).items():
        if isinstance(v, dict):
            out += [data.flag(k), *[str(x) for pair in v.items() for x in pair]]
        elif not isinstance(v, bool):
            out += [data.flag(k), str(v)]
    return out


# ------------------------------------------------------------------------------------------- maths
def test_mow_means_in_log_space_and_returns_by_hand():
    mixed = torch.full((255,), -1e4)  # STORM's choice: 100 with probability 0.1 is read as 0.6
    at = 127 + int(math.log(101) * 254 / 40)
    mixed[127], mixed[at] = math.log(0.9), math.log(0.1)
    assert mow.two_hot_inv(mixed).item() == pytest.approx(0.59, abs=0.02)
    rew, done = torch.tensor([1., 2., 4.]), torch.tensor([0., 1., 0.])
    v, g, lam = torch.tensor([7., 11., 13., 17.]), 0.9, 0.6
    want = torch.tensor([1 + g * (0.4 * 11 + 0.6 * 2), 2, 4 + g * 17])
    assert torch.allclose(mow.lambda_return(rew, done, v, g, lam), want)


def test_sigma_in_closed_form_minimises_the_harmonious_loss():
    loss = torch.tensor([0.01, 1.0, 10.0, 300.0], dtype=torch.double)
    s = mow.best_sigma(loss)

    def f(s):
        return loss / s + s.log1p()

    assert (f(s) < f(s * 1.01)).all() and (f(s) < f(s * 0.99)).all()
    assert (1 / s)[2:].tolist() == pytest.approx([0.092, 0.0033], rel=0.02)
    agent = mow_agent(2)
    losses, means = torch.tensor([3.0, 5.0]), torch.tensor([10.0, 300.0])
    assert torch.allclose(agent.weigh(losses, means), losses / mow.best_sigma(means))
    agent.harmonise = False
    assert agent.weigh(losses, means) is losses


def test_balance_lifts_an_unused_expert_and_routes_are_per_task_ordered_and_random_with_noise():
    assert mow.balance_loss(torch.full((6, 4), 0.25), 2) == 0
    logits = torch.tensor([[4., 4., 0.]] * 3, requires_grad=True)
    mow.balance_loss(logits.softmax(-1), 2).backward()
    assert (logits.grad[:, 2] < 0).all() and (logits.grad[:, :2] > 0).all()
    one = torch.tensor([[1., 0., 0.]])
    big, small = (mow.balance_loss(one.expand(K, 3), 1) for K in (26, 3))
    assert big == pytest.approx(float(small))
    router = torch.nn.Linear(8, 5)
    e = F.normalize(torch.randn(40, 8, generator=gen(1)), dim=-1)
    S, J, w = mow.route(e, router, 2)
    ones = torch.ones(40)
    assert torch.allclose(S.sum(-1), ones) and torch.allclose(w.sum(-1), ones)
    assert (J[:, 0] < J[:, 1]).all() and torch.equal(J, S.topk(2).indices.sort().values)
    assert torch.equal(mow.route(e, router, 2, tau=5.0)[1], J)  # temperature changes no choice
    assert not torch.equal(mow.route(e, router, 2, tau=5.0, noise=1.0)[1], J)
    assert mow.route(e, router, 2, tau=5.0)[0].max() < S.max()


def test_planted_clusters_are_found_sizes_are_capped_and_sketches_keep_cosines():
    rng = np.random.default_rng(0)
    truth = rng.permutation(np.arange(12) % 3)
    grads = rng.normal(size=(3, 7, 64))[truth] + 0.7 * rng.normal(size=(12, 7, 64))
    grads *= rng.uniform(0.01, 100, size=(12, 7, 1))  # scale means nothing
    labels = mow.cluster_tasks(grads, 3)
    assert labels[0] == 0 and labels == mow.cluster_tasks(grads, 3)
    assert len(set(zip(labels, truth))) == len(set(labels)) == 3
    same = np.ones((12, 1, 8)) + 1e-3 * rng.normal(size=(12, 1, 8))
    for n in (1, 2, 3, 5, 12):
        sizes = np.bincount(mow.cluster_tasks(same, n))
        assert len(sizes) == n and sizes.max() <= max(math.ceil(18 / n), 2)
    with says("fewer --clusters"):
        mow.cluster_tasks(grads, 13)
    a, b = torch.randn(2, 200_000, generator=gen())
    cosine = F.cosine_similarity(mow.sketch(a), mow.sketch(0.6 * a + 0.8 * b), dim=0).item()
    assert cosine == pytest.approx(0.6, abs=0.05) and torch.equal(mow.sketch(a), mow.sketch(a))


# ---------------------------------------------------------------------------------------- networks
def test_storm_has_exactly_its_published_size():
    args = mow.settle(mow.Args(task="Boxing", storm=True, preset="paper"), ["Boxing"], CPU)
    agent = mow.Agent(args, [list(range(18))], CPU)
    wm = agent.wm
    assert sum(p.numel() for p in wm.parameters()) == 16_513_155
    assert wm.router is wm.join is wm.shared is wm.task_head is None
    assert isinstance(wm.vaes[0].conv[1], nn.BatchNorm2d) and args.rollouts == 1024
    assert not agent.harmonise and not agent.reset_mask
    full = mow.settle(mow.Args(task="atari26", preset="paper"), list(envs.ATARI26), CPU)
    assert (full.clusters, full.experts, full.topk, full.rollouts) == (12, 12, 2, 256)
    assert mow.settle(mow.Args(task="mt10", preset="paper"), list(envs.MT10), CPU).steps == 300_000


@pytest.mark.parametrize("K,N_m,N_e,n", [(1, 1, 1, 1), (3, 2, 3, 2), (6, 3, 6, 2)])
def test_mow_shapes(K, N_m, N_e, n):
    agent = mow_agent(K, clusters=N_m, experts=N_e, topk=n)
    batch, wm = mow_batch(agent), agent.wm
    losses, more = mow.world_model_loss(wm, *batch, torch.tensor(2.0), 0.5)
    assert set(losses) == {"rec", "rew", "end", "dyn", "rep"} | ({"task"} if K > 1 else set())
    assert all(x.shape == (K,) and torch.isfinite(x).all() for x in losses.values())
    assert more["z"].shape == (K, 2, 6, 16)
    assert more["J"].shape == (K, n) and more["scores"].shape == (K, N_e)
    assert torch.allclose(wm.embedding().norm(dim=-1), torch.ones(K))
    dream = mow.imagine(wm.eval(), agent.actor, more["z"], batch[1], batch[4], 5, torch.tensor(1.0))
    x, a, rew, done = dream
    assert x.shape == (K, 2, 6, 16 + 16 + 8) and a.shape == (K, 2, 5, 18)
    assert rew.shape == done.shape == (K, 2, 5) and (a.sum(-1) == 1).all()
    assert (x[..., :16].unflatten(-1, (4, 4)).sum(-1) == 1).all()
    loss, low, high, _ = mow.agent_loss(agent.actor, agent.critic, agent.slow, wm.cluster_of,
                                        *dream, agent.low, agent.high)
    assert loss.ndim == 0 and low.shape == (K,) and (high >= low).all()


def test_a_tasks_loss_leaves_other_clusters_and_unchosen_experts_alone():
    agent = mow_agent(3, clusters=3, experts=3, topk=1)
    wm = agent.wm.eval()
    losses, more = mow.world_model_loss(wm, *mow_batch(agent), torch.tensor(1.0), 0.0)
    chosen = more["J"].flatten().tolist()

    def touched(p):
        return p.grad is not None and bool(p.grad.abs().sum() > 0)

    for k in range(3):
        wm.zero_grad()
        mow.total_loss(losses)[k].backward(retain_graph=True)
        heads = [p for h in (wm.prior_head, wm.reward_head, wm.end_head) for p in h.parameters()]
        for c in range(3):
            assert any(map(touched, wm.vaes[c].parameters())) == (c == k)
            assert any(p.grad[c].abs().sum() > 0 for p in heads) == (c == k)
        for j in range(3):
            experts = (*wm.mix.parameters(), *wm.experts.parameters())
            used = [bool(p.grad[j].abs().sum() > 0) for p in experts]
            assert all(used) == any(used) == (j == chosen[k])
        assert touched(wm.shared.blocks[0].qkv.weight)


def test_gate_trains_the_router_without_changing_values():
    agent = mow_agent(3, experts=3, topk=2)
    wm, batch, grads = agent.wm.eval(), mow_batch(agent), {}
    for gate in (True, False):
        torch.manual_seed(0)
        losses, _ = mow.world_model_loss(wm, *batch, torch.tensor(1.0), 0.0, gate=gate)
        wm.zero_grad()
        mow.total_loss(losses).sum().backward()
        g = wm.router[0].weight.grad
        grads[gate] = 0.0 if g is None else g.abs().sum().item(), mow.total_loss(losses).detach()
    assert grads[True][0] > 0 == grads[False][0]
    assert torch.allclose(grads[True][1], grads[False][1], rtol=1e-5)


def test_gathered_products_equal_a_loop_over_tasks():
    agent = mow_agent(6, clusters=3, experts=6, topk=2)
    wm, batch = agent.wm.eval(), mow_batch(agent)
    e, pos = wm.embedding(), torch.arange(6)
    _, J, w = wm.routing(e)
    z = mow.draw_latent(wm.posterior(mow.to_images(batch[0]), e))
    mask = mow.episode_mask(batch[4], pos)
    h = wm.sequence(z, batch[1], e, J, w, mask, pos)
    rew, images = wm.head(wm.reward_head, h, e), wm.decode(z, e)
    for k in range(6):
        one = slice(k, k + 1)
        alone = wm.sequence(*(x[one] for x in (z, batch[1], e, J, w, mask)), pos)
        assert torch.allclose(alone[0], h[k], atol=1e-5)
        assert torch.allclose(wm.head(wm.reward_head, alone, e[one], [k])[0], rew[k], atol=1e-5)
        assert torch.allclose(wm.decode(z[one], e[one], [k])[0], images[k], atol=1e-5)


def check_cached_steps(agent):
    """Steps with a cache equal the full pass, which is causal and stays within an episode."""
    wm, (_, act, _, _, first) = agent.wm.eval(), mow_batch(agent, L=8)
    first[0, 0, 3] = first[2, 1, 1] = True
    e, pos, z = wm.embedding(), torch.arange(8), torch.randn(3, 2, 8, 16)
    _, J, w = wm.routing(e)
    mask = mow.episode_mask(first, pos)
    full = wm.sequence(z, act, e, J, w, mask, pos)
    cache, parts = wm.new_cache(3, 2, 8, z), []
    with torch.no_grad():
        for t in (slice(0, 3), *(slice(t, t + 1) for t in range(3, 8))):
            some = z[:, :, t], act[:, :, t], e, J, w, mask[:, :, t], pos[t]
            parts.append(wm.sequence(*some, cache))
    assert torch.allclose(torch.cat(parts, 2), full, atol=1e-4)

    def changed(z, mask):
        return wm.sequence(z, act, e, J, w, mask, pos)

    later, before = z.clone(), z.clone()
    later[:, :, 5:] += 1
    before[0, 0, :3] += 1  # another episode
    assert torch.allclose(changed(later, mask)[:, :, :5], full[:, :, :5], atol=1e-6)
    other, free = changed(before, mask), mow.episode_mask(first, pos, False)
    assert torch.allclose(other[0, 0, 3:], full[0, 0, 3:], atol=1e-6)
    assert not torch.allclose(other[0, 0, :3], full[0, 0, :3])
    assert not torch.allclose(changed(before, free)[0, 0, 3:], changed(z, free)[0, 0, 3:])


def test_cached_steps_equal_the_full_pass_and_it_is_causal():
    deep = dict(sizes=MOW_SIZES | dict(expert_layers=2, shared_layers=2))
    check_cached_steps(mow_agent(3, experts=3, topk=2, **deep))


def test_open_loop_imagines_what_comes_of_the_real_actions(monkeypatch):
    agent, asked, real = mow_agent(2), [], mow.imagine_step
    batch = mow_batch(agent, L=8)

    def step(*args):
        out = real(*args)
        asked.append(out[1])
        return out

    monkeypatch.setattr(mow, "imagine", functools.partial(mow.imagine, step=step))
    images = mow.open_loop_images(agent, batch, 3)
    assert all(x.shape == (2, 2, 8, 3, 64, 64) for x in images)
    assert torch.equal(torch.stack(asked, 2), batch[1][:, :, 3:-1])
    assert torch.equal(images[1][:, :, :3], images[2][:, :, :3])
    assert not torch.equal(images[1][:, :, 3:], images[2][:, :, 3:])


def test_free_bits_are_per_task_and_kl_stops_at_episodes(monkeypatch):
    agent = mow_agent(2, clusters=1)
    batch = mow_batch(agent, L=5)
    batch[4][1, :, 2] = True
    shapes = []

    def kl(p, q):  # 0.2 and 3 nats; index 1 leads into step 2, which opens an episode of task 1
        shapes.append(p.shape[:3])
        values = torch.tensor([0.2, 3.0])[:, None, None].expand(p.shape[:3]).clone()
        return values.index_fill_(2, torch.tensor([1]), 9.0)

    monkeypatch.setattr(mow, "kl", kl)
    losses, more = mow.world_model_loss(agent.wm, *batch, torch.tensor(1.0), 0.0)
    assert more["dyn_raw"].tolist() == pytest.approx([(0.2 * 3 + 9) / 4, 3.0])
    assert losses["dyn"][0] > 1 and shapes[0] == (2, 2, 4)


def test_actor_masks_games_and_mixes_kinds_of_actions():
    legal = torch.zeros(3, 18, dtype=torch.bool)
    legal[0, [0, 3]] = legal[1] = True
    actor = mow.Actor(5, 16, legal, torch.tensor([False, False, True]), 4)
    x = torch.randn(3, 200, 5, generator=gen())
    a = actor.sample(x)
    assert a.shape == (3, 200, 22) and set(a[0].argmax(-1).tolist()) == {0, 3}
    assert (a[:2, :, :18].sum(-1) == 1).all() and (a[:2, :, 18:] == 0).all()
    assert (a[2, :, :18] == 0).all() and a[2, :, 18:].std() > 0.05
    logp, ent = actor.evaluate(x, a)
    p, mean, std = actor(x)
    want = torch.distributions.Independent(torch.distributions.Normal(mean[2], std[2]), 1)
    assert torch.allclose(logp[2], want.log_prob(a[2, :, 18:]), atol=1e-5)
    assert torch.allclose(ent[2], want.entropy(), atol=1e-5)
    assert torch.allclose(logp[:2], (p * a[..., :18]).sum(-1)[:2])
    assert (ent[0] <= math.log(2) + 1e-6).all() and (std >= 0.1).all() and (std <= 1).all()
    for n_disc, n_cont in ((18, 0), (0, 4)):
        kinds = torch.ones(2, n_disc, dtype=torch.bool), torch.tensor([n_disc == 0] * 2)
        one = mow.Actor(5, 16, *kinds, n_cont)
        a = one.sample(x[:2])
        logp, ent = one.evaluate(x[:2], a)
        assert a.shape == (2, 200, n_disc + n_cont) and logp.shape == ent.shape == (2, 200)
        (logp + ent).sum().backward()
        assert all(torch.isfinite(p.grad).all() for p in one.parameters())


def test_agent_loss_raises_good_actions_and_scales_tasks_apart():
    agent = mow_agent(2, clusters=2)
    x = torch.randn(2, 64, 4, 16 + 16 + 8, generator=gen())
    act = F.one_hot(torch.randint(0, 18, (2, 64, 3), generator=gen(1)), 18).float()
    # in task 1 a thousand times as much
    rew = act[..., :5].sum(-1) * torch.tensor([1.0, 1000.0])[:, None, None]

    def good():
        return agent.actor(x[:, :, 0])[0][..., :5].exp().sum(-1).mean(1)

    low, high, before = agent.low, agent.high, good()
    for _ in range(30):
        loss, low, high, _ = mow.agent_loss(
            agent.actor, agent.critic, agent.slow, agent.wm.cluster_of, x, act, rew,
            torch.zeros_like(rew), low, high, gamma=0.9)
        agent.agent_opt.zero_grad()
        loss.backward()
        agent.agent_opt.step()
    assert (good() > before).all() and high[1] > 300 * high[0]
    assert all(p.grad is None for p in agent.slow.parameters())


def test_imagined_steps_after_an_imagined_end_do_not_count():
    agent = mow_agent(1, clusters=1)
    x = torch.randn(1, 8, 4, 16 + 16 + 8, generator=gen())
    act = F.one_hot(torch.randint(0, 18, (1, 8, 3), generator=gen(1)), 18).float()
    rew, done = torch.randn(1, 8, 3, generator=gen(2)), torch.tensor([0.0, 1.0, 0.0])

    def gradient(act, rew):
        parts = agent.actor, agent.critic, agent.slow, agent.wm.cluster_of, x, act, rew
        scale = torch.zeros(1), torch.ones(1)
        loss, *_ = mow.agent_loss(*parts, done.expand(1, 8, 3), *scale)
        params = [*agent.actor.parameters(), *agent.critic.parameters()]
        return torch.cat([g.flatten() for g in torch.autograd.grad(loss, params)])

    usual = gradient(act, rew)
    for t, same in ((0, False), (1, False), (2, True)):
        other = act.clone()
        other[:, :, t] = act[:, :, t].roll(1, -1)
        assert torch.allclose(gradient(other, rew), usual, atol=1e-7) == same, t


def test_imagination_starts_from_the_frame_that_opens_an_episode():
    agent = mow_agent(2, clusters=1)
    wm, (obs, act, _, _, first) = agent.wm.eval(), mow_batch(agent, L=5)
    first[0, 1, 4] = True
    e, z = wm.embedding(), mow.draw_latent(wm.posterior(mow.to_images(obs), wm.embedding()))
    x, a, *_ = mow.imagine(wm, agent.actor, z, act, first, 3, torch.tensor(1.0))
    assert torch.equal(x[0, 1, 0], torch.cat([z[0, 1, 4], torch.zeros(16), e[0]]))
    assert (x[..., 0, 16:32].abs().sum(-1) > 0).tolist() == [[True, False], [True, True]]
    _, J, w = wm.routing(e)
    alone = x[:1, 1:, :3, :16], a[:1, 1:], e[:1], J[:1], torch.ones_like(w[:1])
    mask = torch.ones(3, 3).tril().bool()[None, None]
    h = wm.sequence(*alone, mask, torch.arange(4, 7))  # nothing of what was before the episode
    assert torch.allclose(h[0, 0], x[0, 1, 1:, 16:32], atol=1e-5)


def test_playing_uses_the_posterior_and_the_episode_so_far(monkeypatch):
    agent = mow_agent(2, clusters=1)
    wm, seen = agent.wm.eval(), []

    def sample(x):
        seen.append(x)
        return F.one_hot(torch.full(x.shape[:2], len(seen) % 18), 18).float()

    monkeypatch.setattr(agent.actor, "sample", sample)
    memory, zs, acts = agent.memory(1), [], []
    _, J, w = wm.routing(wm.embedding())
    obs = np.random.default_rng(0).integers(0, 256, (20, 2, 1, 64, 64, 3), np.uint8)
    for t in range(20):
        if t == 2:
            memory[2][1] = 0  # task 1 starts anew
        a, memory = agent.play(obs[t], memory, [t])
        zs.append(seen[-1][..., :16])
        acts.append(torch.from_numpy(a))
        begin = max(t - agent.window, 0)
        for k, start in ((0, begin), (1, max(begin, 2 * (t > 1)))):
            h = seen[-1][k, 0, 16:32]
            if start == t:
                assert (h == 0).all()
                continue
            z, past = (torch.stack(x[start:t], 2)[k:k + 1] for x in (zs, acts))
            pos, one = torch.arange(t - start), slice(k, k + 1)
            mask = (pos[:, None] >= pos).expand(1, 1, -1, -1)
            chosen = wm.embedding([k]), J[one], torch.ones_like(w[one])
            want = wm.sequence(z, past, *chosen, mask, pos)
            assert torch.allclose(h, want[0, 0, -1], atol=1e-5), (t, k)
    assert memory[2].flatten().tolist() == [agent.window] * 2


@pytest.mark.parametrize("preset,window", [("cpu", 8), ("gpu", 15), ("paper", 16)])
def test_the_agent_acts_on_positions_that_its_imagination_visits(preset, window):
    args = mow.Args(task="Boxing", storm=True, preset=preset, device="cpu", compile=False,
                    sizes=dict(stem=4, width=16))
    args = mow.settle(args, ["Boxing"], CPU)
    agent = mow.Agent(args, [list(range(18))], CPU)
    assert agent.memory(2)[0].shape[2] == window
    assert args.context <= window < args.context + args.horizon <= args.length


def test_clusters_are_cloned_with_their_adam_moments(tmp_path):
    agent = mow_agent(3, clusters=3)
    agent.wm.assign([0, 0, 0])
    frames = mow_frames(agent, tmp_path / "f")
    for _ in range(3):
        mow_update(agent, frames, act=False)
    grads = mow.task_gradients(agent, frames, batches=2)
    assert grads.shape[0] == 3 and grads.shape[2] == mow.SKETCH
    assert np.abs(grads).sum((1, 2)).min() > 0
    assert np.array_equal(grads, mow.task_gradients(agent, frames, batches=2))
    agent.clone_modules([2, 0, 1])
    assert agent.wm.labels == (2, 0, 1) == tuple(agent.wm.cluster_of.tolist())
    for a, b in zip(agent.wm.vaes[0].parameters(), agent.wm.vaes[2].parameters()):
        s, t = agent.opt.state[a], agent.opt.state[b]
        assert torch.equal(a, b) and torch.equal(s["exp_avg_sq"], t["exp_avg_sq"])
        assert s["step"] == t["step"] and s["exp_avg"] is not t["exp_avg"]
    w = agent.wm.reward_head.out.weight
    moments = agent.opt.state[w]["exp_avg"]
    assert torch.equal(w[0], w[2]) and torch.equal(moments[0], moments[1])
    old = w.detach().clone()
    mow_update(agent, frames)
    assert (w.detach() - old).abs().max() < 5 * agent.args.lr


# ------------------------------------------------------------------------------- several processes
MOW_RANK = """
import os, sys
sys.path.insert(0, sys.argv.pop())
import mow, torch, torch.nn.functional as F, tyro
agents = []
class Quiet(mow.Agent):              # no dropout and the likeliest latents: shares draw no noise
    start_tau = 1.0
    def __init__(self, *args):
        super().__init__(*args)
        agents.append(self)
        for m in self.wm.modules():
            m.dropout = 0.0
mow.sample_onehot = lambda logp: F.one_hot(logp.argmax(-1), logp.shape[-1]).to(logp.dtype)
mow.main(tyro.cli(mow.Args), Quiet)
agent, = agents
state = dict(agent=agent.state_dict(), opt=agent.opt.state_dict(), act=agent.agent_opt.state_dict())
torch.save(state, f"rank{os.environ.get('RANK', '')}.pt")
"""


def test_two_processes_train_the_model_of_one(tmp_path):
    (tmp_path / "rank.py").write_text(MOW_RANK)
    words = mow_words(task="Boxing,Krull", warmup=10, steps=16)
    env, logs = os.environ | {"OMP_NUM_THREADS": "1"}, []
    torchrun = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    for name, launcher in (("one", []), ("two", torchrun)):
        (tmp_path / name).mkdir()
        p = subprocess.run([sys.executable, *launcher, "../rank.py", *words, HERE], env=env,
                           cwd=tmp_path / name, capture_output=True, text=True)
        assert p.returncode == 0, p.stderr[-3000:]
        folder, = (tmp_path / name / "runs").iterdir()
        lines = [json.loads(x) for x in (folder / "metrics.jsonl").read_text().splitlines()]
        result = json.loads((folder / "results.json").read_text())
        terms = "rec", "rew", "end", "dyn", "dyn_raw", "rep", "task", "grad_norm"
        warmup, = [x for x in lines if "losses/warmup/rec" in x]  # its end; roll-outs then differ
        rows = [row[k] for row in result["history"][:2] for k in ("rec", "rew", "dyn_raw")]
        logs.append([warmup[f"losses/warmup/{k}"] for k in terms] + np.ravel(rows).tolist())
        assert result["rows"][0]["episodes"] == 1 and result["history"][1]["updates"] == 10
    assert np.allclose(*logs, rtol=1e-4), logs
    a, b = (mow_numbers(torch.load(tmp_path / f"two/rank{i}.pt", weights_only=True))
            for i in (0, 1))
    assert a.keys() == b.keys() and all(torch.equal(a[k], b[k]) for k in a)
    assert "threads x 2" in p.stdout and p.stdout.count("playing 1 episodes") == 1


# -------------------------------------------------------------------------------------- whole runs
@pytest.fixture(scope="module")
def mow_run(tmp_path_factory):
    """One tiny run on three games, from start to end."""
    with contextlib.chdir(tmp_path_factory.mktemp("mow")):
        result = mow.main(mow.Args(task=GAMES, capture_video=True, **MOW_TINY))
        yield result, next(Path("runs").resolve().iterdir())


def test_a_tiny_run_makes_its_table_and_files(mow_run):
    result, folder = mow_run
    assert [r["task"] for r in result["rows"]] == GAMES.split(",")
    assert result["rows"][0]["storm"] == 79.7
    for name in ("results.json", "results.csv", "frames.png", "checkpoint.pt", "Krull.mp4",
                 "metrics.jsonl", "envs.py", "data.py"):
        assert (folder / name).stat().st_size > 0
    saved = json.loads((folder / "results.json").read_text())
    assert saved["rows"] == result["rows"] and saved["args"]["atari"]["sticky"] == 0.25
    for who, name in (("agent", "return"), ("blind", "blind"), ("random", "random")):
        means = [np.mean([x for x, _ in episodes]) for episodes in saved["played"][who]]
        assert means == [r[name] for r in saved["rows"]]
    assert len(saved["clusters"]["labels"]) == len(saved["clusters"]["similarity"]) == 3
    assert np.shape(saved["routing"]["scores"]) == (3, 3)
    state = torch.load(folder / "checkpoint.pt", weights_only=True)
    assert state["agent"]["_extra_state"]["updates"] == 36 and state["frames"]["count"] == 44


def test_the_blind_control_acts_as_often_and_never_looks(monkeypatch):
    args = mow_settled(task="Boxing", atari={"frame_cap": 40})
    options = mow.task_options(args, ["Boxing"])
    agent = mow.Agent(args, [list(range(18))], CPU)
    played, taken = mow.evaluate(agent, ["Boxing"], options, 2, 1, agent.play)
    assert taken.shape == (1, 20, 18) and (taken.sum(-1) == 1).all()  # 2 environments, 10 steps
    assert len(played[0]) == 2
    looks, play = [], agent.play
    monkeypatch.setattr(agent, "play", lambda *a: looks.append(1) or play(*a))
    out = mow.evaluate_all(agent, ["Boxing"], options, 2, seed=1)
    assert len(looks) == 10 and out["agent"] == played
    assert all(len(episodes[0]) == 2 for episodes in out.values())


def test_killed_at_any_moment_it_ends_at_the_same_numbers(mow_run, tmp_path, monkeypatch):
    whole, folder = mow_run
    monkeypatch.chdir(tmp_path)

    class Killed(BaseException):
        pass

    def die(kind, name, *when):
        real, calls = getattr(kind, name), []

        def mortal(self, *a):
            calls.append(1)
            if len(calls) in when:
                raise Killed
            return real(self, *a)
        monkeypatch.setattr(kind, name, mortal)

    die(mow.Agent, "model_loss", 3, 15)  # in the warm-up, in play
    die(mow.Stage, "send", 6)            # in random play
    args, kills, result = dict(save_every=0.0, capture_video=True, **MOW_TINY), 0, None
    while result is None:
        try:
            runs = list(Path("runs").glob("*"))
            again = mow.Args(resume=str(runs[0])) if runs else mow.Args(task=GAMES, **args)
            result = mow.main(again)
        except Killed:
            kills += 1
    assert kills == 3
    want, got = (mow_numbers(torch.load(x / "checkpoint.pt", weights_only=True))
                 for x in (folder, next(Path("runs").iterdir())))
    assert want.keys() == got.keys()
    assert all(torch.equal(want[k], got[k]) for k in want if want[k].dtype != torch.bool)
    for name in ("rows", "finished", "clusters", "routing", "history", "played"):
        assert result[name] == whole[name], name


def test_forty_sweeps_on_a_cpu_learn_to_see(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    small = MOW_TINY | dict(sizes=MOW_SIZES | dict(stem=8, width=32, hidden=32), lr=2e-3, steps=80,
                            random_steps=40, warmup=40, clusters=2, atari={"frame_cap": 400})
    agents = []

    class Watched(mow.Agent):
        def __init__(self, *args):
            super().__init__(*args)
            agents.append((self, mow_numbers(self)))

    gradients = mow.task_gradients
    monkeypatch.setattr(mow, "task_gradients", lambda agent, frames: gradients(agent, frames, 2))
    history = mow.main(mow.Args(task=GAMES, **small), Watched)["history"]
    assert np.isfinite([row["rec"] for row in history]).all()
    assert all(b < 0.35 * a for a, b in zip(history[0]["rec"], history[-1]["rec"]))
    agent, before = agents[0]
    after = mow_numbers(agent)
    still = [k for k in before if torch.equal(before[k], after[k])
             and before[k].is_floating_point() and "position" not in k]
    assert not still, still


def test_checkpoint_of_another_run_plays_and_goes_on(mow_run, tmp_path, monkeypatch):
    whole, folder = mow_run
    monkeypatch.chdir(tmp_path)
    given = dict(task=GAMES, checkpoint=str(folder / "checkpoint.pt"))
    play = {k: v for k, v in MOW_TINY.items() if k in (
        "length", "context", "horizon", "sizes", "atari", "eval_episodes", "compile", "bf16")}
    result = mow.main(mow.Args(eval_only=True, **given, **play))
    assert result["rows"] == whole["rows"] and "history" not in result
    more = mow.main(mow.Args(**given, **MOW_TINY | dict(steps=26, warmup=None)))
    assert more["clusters"] == {"labels": whole["clusters"]["labels"]}
    assert more["history"][0]["updates"] == 50
    for words, task, file in ((("does not fit",), "Pong", given["checkpoint"]),
                              (("add --checkpoint",), "Pong", None),
                              (("cannot be read",), "Pong", "nowhere.pt")):
        with says(*words):
            mow.main(mow.Args(task=task, checkpoint=file, eval_only=True, **play))


def test_bfloat16_stays_close_to_float32(tmp_path):
    results = []
    for bf16 in (False, True):
        agent = mow_agent(2, clusters=2, experts=3, topk=2, bf16=bf16)
        metrics = mow_update(agent, mow_frames(agent, tmp_path / f"{bf16}"))
        assert all(p.dtype == torch.float32 for p in agent.wm.parameters())
        assert agent.low.dtype == torch.float32
        values = [metrics[k].mean() for k in ("rec", "rew", "dyn_raw", "critic")]
        results.append(torch.stack(values))
    assert torch.allclose(*results, rtol=0.05)


def test_mow_compiled_functions_were_compiled_and_agree_with_eager(tmp_path, monkeypatch):
    real = torch.compile
    monkeypatch.setattr(torch, "compile",
                        lambda f, **kw: real(f, backend="eager", fullgraph=True, **kw))
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    results = []
    for enabled in (False, True):
        agent = mow_agent(2, clusters=2, experts=3, compile=enabled)
        agent.wm.assign([0, 0])
        frames = mow_frames(agent, tmp_path / f"{enabled}")
        for i in range(4):
            if i == 2:
                agent.clone_modules([0, 1])
            mow_update(agent, frames)
        a, _ = agent.play(frames.obs[:, :1].copy(), agent.memory(1), [0])
        results.append(mow_numbers(agent) | {"act": torch.from_numpy(a)})
    counters = torch._dynamo.utils.counters
    # world model twice (before and after clustering), imagined step, agent, acting
    assert not counters["graph_break"]
    assert 4 <= counters["stats"]["unique_graphs"] <= 8, counters["stats"]
    eager, compiled = results
    assert all(torch.allclose(eager[k].float(), compiled[k].float(), atol=2e-3, equal_nan=True)
               for k in eager)


def test_storm_and_runs_of_robots_and_games(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    real, sizes = mow.task_options, {k: v for k, v in MOW_SIZES.items() if k != "emb"}
    monkeypatch.setattr(mow, "task_options", lambda args, tasks: {
        t: o | ({"length": 20} if t in envs.METAWORLD50 else {})
        for t, o in real(args, tasks).items()})
    r = mow.main(mow.Args(task="mw-reach,Pong", **MOW_TINY | dict(steps=24)))
    assert [row["task"] for row in r["rows"]] == ["mw-reach", "Pong"]
    assert r["rows"][0]["storm"] is None and 0 <= r["rows"][0]["score"] <= 1
    storm = MOW_TINY | dict(warmup=None, sizes=sizes)
    r = mow.main(mow.Args(task="Pong", storm=True, **storm))
    assert r["args"]["sizes"]["emb"] == 0 and r["rows"][0]["episodes"] == 1


# --------------------------------------------------------------------------------------- bad input
@pytest.mark.parametrize("words,more", [
    (("'Boxin'", "nearest: Boxing"), dict(task="Boxin")), (("nearest: catch",), dict(task="catsh")),
    (("twice",), dict(task="Pong,Pong")),
    (("--clusters 4", "1 to 3"), dict(task=GAMES, clusters=4)),
    (("--topk 4", "1 to 3"), dict(task=GAMES, experts=3, topk=4)),
    (("--storm", "3 tasks"), dict(task=GAMES, storm=True)),
    (("heads that divide",), dict(task=GAMES, sizes=dict(width=15, heads=2))),
    (("positive numbers",), dict(task=GAMES, sizes=dict(stem=0))),
    (("--sizes depth", "expected some of stem"), dict(task=GAMES, sizes=dict(depth=3))),
    (("--atari lives", "expected some of sticky"), dict(task=GAMES, atari=dict(lives=3))),
    (("--random-steps 4", "--length 8"), dict(task=GAMES, random_steps=4)),
    (("--length 12 or more",), dict(task=GAMES, context=4, horizon=8, length=11)),
    (("--batch 0", "at least 1"), dict(task=GAMES, batch=0)),
    (("--steps 44", "does not train"), dict(task=GAMES, eval_only=True)),
    (("--warmup 4", "clusters"), dict(task=GAMES, checkpoint="other.pt")),
    (("args.json",), dict(resume="nowhere")), (("no GPU",), dict(device="cuda")),
    (("multiples of 3",), dict(task="Pong", WORLD_SIZE="3")),
    (("replay of 1 x 100,000", "GB free"), dict(task="Pong", steps=100_000, free=10**6))])
def test_mow_bad_input_is_one_sentence(words, more, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    if world := more.pop("WORLD_SIZE", None):
        monkeypatch.setenv("WORLD_SIZE", world)
    if free := more.pop("free", None):
        monkeypatch.setattr(data.shutil, "disk_usage", lambda p: types.SimpleNamespace(free=free))
    with says(*words):
        mow.main(mow.Args(**MOW_TINY | more))
    assert free or not Path("runs").exists()


def test_missing_games_are_named(monkeypatch):
    from ale_py import roms
    monkeypatch.setattr(roms, "get_rom_path", lambda name: None)
    with says("Boxing", "ROM", "pip install"):
        envs.make_env("Boxing", obs="pixels")
    with says("obs='pixels'"):
        envs.make_env("Pong")


def test_atari_modes_and_difficulties():
    def play(task):
        env = envs.make_env(task, obs="pixels", sticky=0.0)
        return np.stack([env.reset(seed=3)[0], *(env.step(t % 4)[0] for t in range(20))])

    frames = play("Breakout")
    for end, same in (("m0d0", True), ("m16d0", False), ("m0d1", False)):
        assert np.array_equal(frames, play(f"Breakout@{end}")) == same
    for task in ("Boxing@m1d0", "Boxing@m0d4", "Boxing@hard", "Boxing@m0"):
        with says(task, "Boxing@m<mode>d<difficulty>", "a mode of", "0, 1, 2, 3"):
            envs.make_env(task, obs="pixels")


def test_mow_a_loss_that_is_not_finite_stops_with_its_terms(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(mow, "two_hot_loss", lambda logits, x: logits.sum(-1) * math.nan)
    with says("not finite", "'rew': nan", "smaller learning rate"):
        mow.main(mow.Args(task="Pong", **MOW_TINY | dict(clusters=1)))


def test_mow_copied_with_its_two_helpers_it_runs(tmp_path):
    for name in ("mow.py", "envs.py", "data.py"):
        (tmp_path / name).write_text(Path(HERE, name).read_text())
    env = {k: v for k, v in os.environ.items() if k != "PYTHONPATH"} | {"OMP_NUM_THREADS": "1"}
    p = subprocess.run([sys.executable, "mow.py", *mow_words(task="Pong")], cwd=tmp_path, env=env,
                       capture_output=True, text=True)
    assert p.returncode == 0 and "mean score" in p.stdout, p.stderr[-2000:]
    folder = next((tmp_path / "runs").iterdir())
    assert (folder / "mow.py").read_text() == (tmp_path / "mow.py").read_text()


# ------------------------------------------------------------------------------------------ savi.py
@pytest.fixture(scope="session")
def cache(tmp_path_factory):
    """A folder of small caches that all tests share; made by the first test that asks."""
    torch.set_num_threads(1)
    return tmp_path_factory.mktemp("video")


@pytest.fixture(autouse=True)
def few_clips(monkeypatch):
    monkeypatch.setattr(savi, "EVAL_CLIPS", 4)


def savi_args(cache, **flags):
    small = dict(device="cpu", compile=False, workers=1, clips=30, clip_frames=12, updates=6,
                 batch=4, dim=16, data_dir=str(cache))
    return savi.Args(**{**small, **flags})


def small_savi(**flags):
    kw = dict(size=32, slots=4, dim=16, frames=2)
    return savi.make_model(savi.filled(savi.Args(**{**kw, **flags}), torch.device("cpu")))


# ------------------------------------------------------------------------------------- metrics
def pair_ari(a, b):
    """The adjusted Rand index from all pairs of pixels, one by one."""
    n = len(a)
    pairs = [(a[i] == a[j], b[i] == b[j]) for i in range(n) for j in range(i)]
    both = sum(p and q for p, q in pairs)
    in_a, in_b = (sum(x) for x in zip(*pairs))
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
    assert savi.fg_ari(torch.tensor(true), torch.tensor(pred)) == savi.fg_ari(true, pred)
    one = np.zeros((2, 5, 4), int)
    one[:, :2] = 1
    assert savi.fg_ari(one, np.zeros_like(one)) == 1.0  # one object, one slot
    assert savi.fg_ari(np.zeros_like(one), one) == 1.0  # nor an empty foreground
    big = np.arange(4_000_000) % 3 + 1  # squares of such counts need more than float32
    assert savi.fg_ari(big, big * 2) == 1.0
    assert abs(savi.fg_ari(big, np.zeros_like(big))) < 1e-12
    with says("masks of", "one shape"):
        savi.fg_ari(true, pred[:1])
    with says("from -1", "labels from 0"):
        savi.fg_ari(np.array([1, 1, 2, 2]), np.array([-1, -1, 0, 0]))
    with says("from -1", "labels from 0"):
        savi.fg_ari(np.array([-1, 1, 2, 2]), np.array([1, 1, 0, 0]))
    with says("float64", "argmax"):
        savi.fg_ari(true, pred / 5)


def test_savi_segment_scores_and_usage():
    true = np.zeros((1, 4, 4), int)
    true[0, :2, :2], true[0, 2:, 2:] = 1, 2
    assert savi.segment_scores(true, true) == {"miou": 1.0, "mbo": 1.0}
    s = savi.segment_scores(true, np.zeros_like(true))
    assert np.isclose(s["miou"], (8 / 16) / 3) and np.isclose(s["mbo"], 4 / 16)
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
    score = {name: savi.fg_ari(true, m) for name, m in masks.items()}
    assert score["one slot"] == 0 and score["k-means rgb"] == 1 and abs(score["random"]) < 0.1
    assert score["k-means xy"] > 0.9 and score["grid 7x1"] < 1
    whole = {name: savi.ari(true, m) for name, m in masks.items()}  # with the background
    assert whole["k-means rgb, all"] == 1 and (masks["k-means rgb, all"] > 0).any()
    assert len(np.unique(masks["grid 2x3"])) == 6


# ------------------------------------------------------------------------------------ networks
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
    assert torch.allclose(same, same[:, :1].expand_as(same), atol=1e-6)  # equal slots never part


@pytest.mark.parametrize("size,decoder", [(32, "mlp"), (32, "conv"), (64, "conv"), (128, "conv")])
def test_savi_shapes(size, decoder):
    model = small_savi(size=size, decoder=decoder, target="flow", predictor="transformer")
    tokens = {32: 256, 64: 4096, 128: 4096}[size]
    video = torch.rand(2, 1, 3, size, size)
    assert model.encoder(video[0]).shape == (1, tokens, 64 if size == 128 else 32)
    before, after, kl = model(video, torch.zeros(2, 1, 4))
    assert before.shape == after.shape == (2, 1, 4, 16) and float(kl) == 0
    picture, alpha, each = model.decode(after)
    assert picture.shape == (2, 1, 2, size, size) and each.shape == (2, 1, 4, 2, size, size)
    assert torch.allclose(alpha.sum(2), torch.ones(2, 1, size, size), atol=1e-5)


def test_savi_decodes_slots_in_one_batch_as_in_a_loop():
    for decoder in ("mlp", "conv"):
        model, slots = small_savi(decoder=decoder), torch.randn(2, 3, 4, 16)
        frames = []
        for s in slots:
            frames.append(torch.stack([model.decoder(s[:, j]) for j in range(4)], 1))
        x = torch.stack(frames)
        alpha = x[:, :, :, -1].softmax(2)
        picture = (alpha[:, :, :, None] * x[:, :, :, :-1]).sum(2)
        assert torch.allclose(model.decode(slots)[1], alpha, atol=1e-5)
        assert torch.allclose(model.decode(slots)[0], picture, atol=1e-5)


def test_savi_first_slots_and_noise():
    video, act = torch.rand(3, 2, 3, 32, 32), torch.zeros(3, 2, 0)

    def seen(model, seed):
        torch.manual_seed(seed)
        return model(video, act)

    gauss = small_savi(init="gauss")
    assert torch.equal(seen(gauss, 0)[1], seen(gauss, 0)[1])
    assert not torch.equal(seen(gauss, 0)[1], seen(gauss, 1)[1])
    cue, com = torch.rand(2, 4, 3), small_savi(init="com").initial
    assert torch.equal(com(act[0], cue)[0, 1], com(act[0], cue.flip(1))[0, 2])
    sto = small_savi(noise=1e-4)
    assert seen(sto, 0)[2] > 0 and not torch.equal(seen(sto, 0)[1], seen(sto, 1)[1])
    slots = seen(sto, 0)[1]
    mean, change = sto.sampler.spread(slots).chunk(2, -1)
    prior = torch.distributions.Normal(mean.detach(), 0.1)
    ours = torch.distributions.Normal(mean, 0.1 * (0.5 * change).exp())
    kl = torch.distributions.kl_divergence(ours, prior)
    assert torch.allclose(sto.sampler(slots)[1], kl.sum(-1).mean(), rtol=1e-4)
    long = sto(torch.rand(24, 2, 3, 32, 32), torch.zeros(24, 2, 0))
    assert long[1].abs().max() < 20 and long[2] < 20  # the noise does not feed itself
    masks = np.zeros((1, 1, 4, 6), int)
    masks[0, 0, 1:3, 2] = 2
    assert np.allclose(savi.centres(masks, 3)[0, 0], [[0, 0, 0], [0.5, 2.5 / 6, 1], [0, 0, 0]])


def test_savi_loss_terms_and_schedule():
    model, video, act = small_savi(), torch.rand(3, 2, 3, 32, 32), torch.rand(3, 2, 4)
    for weight in (1.0, 0.0):
        loss, terms = savi.savi_loss(model, video, video, act, None, weight, 0.0)
        assert (float(terms["pred"]) > 0) == (weight > 0)
        assert torch.allclose(loss, terms["recon"] + weight * terms["pred"])
    assert np.isclose(savi.warm_cosine(0, 100, 1.0), 1 / 7) and savi.warm_cosine(7, 100, 1.0) == 1
    assert savi.warm_cosine(99, 100, 1.0) < 1e-3


def test_savi_compiled_loss_was_compiled_and_agrees_with_eager(monkeypatch):
    real = torch.compile
    monkeypatch.setattr(torch, "compile",
                        lambda f, **kw: real(f, backend="eager", fullgraph=True, **kw))
    torch._dynamo.reset()
    counters = torch._dynamo.utils.counters
    counters.clear()
    model = small_savi(pred_weight=1.0)
    video = torch.rand(2, 2, 3, 32, 32)
    batch = video, video, torch.rand(2, 2, 4), None, 1.0, 0.0
    f = torch.compile(savi.savi_loss, dynamic=False)
    a, b = f(model, *batch)[0], savi.savi_loss(model, *batch)[0]
    f(model, *batch)
    assert torch.allclose(a, b) and counters["stats"]["unique_graphs"] == 1
    assert not counters["graph_break"]


# --------------------------------------------------------------------------------- whole script
def test_savi_smoke_loss_falls_and_files_are_written(cache, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    moved, real = [], savi.train

    def spy(model, *rest):
        before = {k: v.clone() for k, v in model.state_dict().items()}
        real(model, *rest)
        moved.extend(k for k, v in model.state_dict().items() if not torch.equal(v, before[k]))
        assert set(moved) == {k for k, _ in model.named_parameters()}

    monkeypatch.setattr(savi, "train", spy)
    result = savi.main(savi_args(cache, updates=60, capture_video=True, seed=3, frames=2))
    curve = result["curve"]
    assert curve[-1]["recon"] < 0.5 * curve[0]["recon"] and moved and curve[-1]["update"] == 60
    run = next((tmp_path / "runs").glob("objects__savi__3__*"))
    for name in ("slots.png", "time.png", "slots.gif", "slots.mp4", "results.json",
                 "checkpoint.pt", "args.json", "metrics.jsonl"):
        assert (run / name).stat().st_size > 0, name
    out = capsys.readouterr().out
    assert "k-means xy" in out and "grid 2x3" in out and "best trivial baseline" in out
    assert "update 60/60" in out and "/s, loss" in out
    kept = json.loads((run / "results.json").read_text())
    assert kept["baselines"]["one slot"]["fg_ari"] == 0 and kept["scores"] == result["scores"]
    # the same numbers from the checkpoint alone, with the network's flags read from it
    again = savi.main(savi.Args(checkpoint=str(run / "checkpoint.pt"), eval_only=True, workers=1,
                                data_dir=str(cache)))
    assert again["scores"] == result["scores"]
    with says("--dim 32", "leave it out"):
        savi.main(savi.Args(checkpoint=str(run / "checkpoint.pt"), dim=32))
    # a folder of video is a task too
    folder = next(p for p in cache.iterdir() if p.name.endswith("32px-30x12"))
    again = savi.main(savi.Args(task=str(folder), size=32, frames=2, dim=16, updates=2, workers=1))
    assert again["baselines"] == result["baselines"]
    with says("12 frames of 32 pixels", "--size 64"):
        savi.main(savi.Args(task=str(folder), size=64, updates=2, workers=1))


@pytest.mark.parametrize("flags", [dict(), dict(noise=1e-4, init="gauss", pred_weight=1.0)])
def test_savi_killed_and_resumed_ends_at_the_same_numbers(cache, tmp_path, monkeypatch, flags):
    monkeypatch.chdir(tmp_path)
    flags = dict(updates=30, frames=2, **flags)
    whole = savi.main(savi_args(cache, **flags))
    (tmp_path / "b").mkdir()
    monkeypatch.chdir(tmp_path / "b")
    real, count = savi.savi_loss, []

    def dies(*a):
        count.append(0)
        if len(count) == 17:
            os.kill(os.getpid(), signal.SIGINT)
        return real(*a)

    monkeypatch.setattr(savi, "savi_loss", dies)
    with says("stopped", "--resume runs/objects__savi__1__"):
        savi.main(savi_args(cache, **flags))
    assert len(count) == 17
    run = next((tmp_path / "b" / "runs").glob("objects*"))
    done = savi.main(savi.Args(resume=str(run)))
    assert len(count) == 30 and done["scores"] == whole["scores"]
    assert done["curve"] == whole["curve"]
    steps = [json.loads(x)["step"] for x in (run / "metrics.jsonl").read_text().splitlines()]
    assert steps == sorted(steps) and set(steps) == {10, 20, 30}
    again = savi.main(savi.Args(resume=str(run)))  # finished: measured, not trained
    assert len(count) == 30 and again["scores"] == whole["scores"]


@pytest.mark.parametrize("flags,words", [
    (dict(clip_frames=4, frames=5), ("clips of 4 frames", "--frames 4")),
    (dict(clip_frames=1, frames=1), ("--clip-frames 1", "at least 2")),
    (dict(frames=1, pred_weight=1.0), ("--pred-weight", "--frames 2")),
    (dict(pred_weight=-1.0), ("--pred-weight -1", "at least 0")),
    (dict(noise=-1e-4), ("--noise -0.0001", "at least 0")),
    (dict(lr=-1.0), ("--lr -1", "expected")), (dict(lr=float("nan")), ("--lr nan", "expected")),
    (dict(clip=0.0), ("--clip 0", "at least")), (dict(updates=0), ("--updates 0", "at least 1")),
    (dict(iters=(0, 1)), ("--iters (0, 1)", "at least 1")),
    (dict(dim=30, predictor="transformer"), ("--dim 30", "multiple of 4")),
    (dict(clips=5), ("--clips 5", "at least 10")),
    (dict(task="humanoid"), ("studies.scenes:Humanoid",)),
    (dict(task="nothing:Here"), ("nothing:Here", "expected objects")),
    (dict(eval_only=True, updates=None, batch=None), ("--checkpoint",)),
    (dict(checkpoint="nothing.pt", eval_only=True), ("--updates 6", "trains nothing")),
    (dict(checkpoint="nothing.pt"), ("--clips 30", "read from there")),
    (dict(resume="nothing"), ("no readable args.json",)),
    (dict(fast=True, preset="gpu"), ("--preset gpu", "--fast")),
    (dict(device="cuda"), ("no GPU", "--device cpu"))])
def test_savi_bad_flags_are_one_sentence(cache, tmp_path, monkeypatch, flags, words):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with says(*words):
        savi.main(savi_args(cache, **flags))
    assert not list(tmp_path.glob("runs/*"))


def test_savi_foreign_checkpoint_and_numbers_that_are_not_finite(cache, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with says("nothing.pt", "savi.py"):
        savi.main(savi.Args(checkpoint="nothing.pt"))
    real = savi.savi_loss

    def broken(*a):
        loss, terms = real(*a)
        return loss * float("nan"), terms | dict(loss=torch.tensor(float("nan")))

    monkeypatch.setattr(savi, "savi_loss", broken)
    with says("not finite", "learning rate"):
        savi.main(savi_args(cache, frames=2))


def test_savi_runs_from_an_empty_folder(cache, tmp_path):
    for name in ("savi.py", "data.py", "envs.py"):
        shutil.copy(Path(HERE) / name, tmp_path)
    command = [sys.executable, "savi.py", "--fast", "--updates", "2", "--clips", "10",
               "--device", "cpu", "--workers", "1"]
    out = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, timeout=100)
    assert out.returncode == 0, out.stderr[-2000:]
    assert "best trivial baseline" in out.stdout
    copy = next((tmp_path / "runs").glob("objects__*"))
    assert {"savi.py", "data.py", "envs.py", "results.json"} <= {p.name for p in copy.iterdir()}


# ------------------------------------- an emulated GPU (studies/gpu_emulated.py) and its rules


def gpu_run(*words):
    """What a program of one thread prints, with CUDA's rules in force."""
    env = dict(os.environ, OMP_NUM_THREADS="1")
    return subprocess.run([sys.executable, *words], cwd=HERE, env=env, capture_output=True,
                          text=True, timeout=120)


@pytest.mark.parametrize("script", ["pwm", "ed2", "savi"])
def test_gpu_updates_are_the_cpus_never_wait_and_resume_across_devices(script):
    done = gpu_run("-m", "studies.gpu_emulated", script)
    assert done.returncode == 0, done.stderr[-2000:]
    for name, kinds in json.loads(done.stdout.splitlines()[-1]).items():
        for kind, counts in kinds.items():  # the last step of savi also measures
            assert len(counts) == 3 and not any(counts[:-1]), (name, kind, counts)


def test_gpu_rules_catch_planted_mistakes():
    code = """
import torch
from studies.gpu_emulated import GPU, WAITS
x = torch.ones(3, device=GPU)
def refused(f):
    try:
        f()
    except AssertionError:
        return True
assert refused(lambda: x + torch.ones(3))
assert refused(lambda: torch.rand(3, device=GPU, generator=torch.Generator()))
assert refused(lambda: torch.rand(3, generator=torch.Generator(GPU)))
assert WAITS.total() == 0
for wait in (lambda: x.sum().item(), x.cpu, x.nonzero, lambda: bool(x.sum() > 1), lambda: x[x > 0]):
    before = WAITS.total()
    wait()
    assert WAITS.total() > before
y = x.double().float() + 1
x.copy_(y)
before = WAITS.total()
torch.ones(3).to(GPU)
assert WAITS.total() == before
"""
    done = gpu_run("-c", code)
    assert done.returncode == 0, done.stderr[-2000:]


def test_gpu_generator_states_of_another_device_go_on_from_a_seed_of_theirs():
    a, b = gen(1), gen(2)
    for g in (a, b):
        data._bring_back(g, torch.arange(16, dtype=torch.uint8))  # CUDA's: seed and offset
    assert torch.equal(torch.rand(3, generator=a), torch.rand(3, generator=b))
    state = gen(3).get_state()
    data._bring_back(a, state)
    assert torch.equal(torch.rand(3, generator=a), torch.rand(3, generator=gen(3)))


# ------------------------------------------------------------------- the repository as a whole
SCRIPTS = {"pwm": pwm, "ed2": ed2, "mow": mow, "savi": savi}
SHARED = (
    "symlog",
    "symexp",
    "two_hot_loss",
    "two_hot_inv",
    "unimix",
    "kl",
)  # functions that scripts repeat
OWN = {
    "Args",
    "main",
    "train",
    "evaluate",
    "report",
    "announce",
    "check_args",
    "fill_args",
    "plot",
    "check",
    "WorldModel",
    "world_model_loss",
    "imagine",
    "lambda_return",
    "Actor",
    "act",
    "Agent",
    "Stacked",
    "descend",
    "StackedMLP",
    "simnorm",
    "task_list",
}  # same word, each paper's own


def source_of(path):
    return Path(HERE, path).read_text()


def definitions(path):
    """{name: source} of the functions and classes at the top level of a file."""
    text = source_of(path)
    return {
        n.name: ast.get_source_segment(text, n)
        for n in ast.parse(text).body
        if isinstance(n, ast.FunctionDef | ast.ClassDef)
    }


def imports(path):
    found = set()
    for n in ast.walk(ast.parse(source_of(path))):
        if isinstance(n, ast.Import):
            found |= {a.name.split(".")[0] for a in n.names}
        elif isinstance(n, ast.ImportFrom):
            found.add((n.module or "").split(".")[0])
    return found


def test_repeated_functions_are_the_same_word_for_word():
    files = {name: definitions(f"{name}.py") for name in SCRIPTS}
    names = [n for defs in files.values() for n in defs]
    for name in {n for n in names if names.count(n) > 1}:
        texts = {defs[name] for defs in files.values() if name in defs}
        assert len(texts) == 1 or name in OWN, f"{name} means different things in different scripts"
    assert all(names.count(n) >= 2 for n in SHARED)


@pytest.mark.parametrize("name", [*SCRIPTS, "envs", "data"])
def test_a_top_level_file_reads_no_script_and_no_study(name):
    assert not imports(f"{name}.py") & {*SCRIPTS, "studies"}
    assert not (name == "envs" and "data" in imports("envs.py"))
    wide = [i for i, x in enumerate(source_of(f"{name}.py").splitlines(), 1) if len(x) > 100]
    assert not wide, wide


def shell_lines(text):
    """Commands of a Markdown text: lines of bash blocks, and `python ..` in tables."""
    blocks = re.findall(r"```bash\n(.*?)```", text, re.S)
    lines = [x.split("#")[0].strip() for b in blocks for x in b.splitlines()]
    lines += re.findall(r"\| `((?:python|torchrun)[^`]*)` \|", text)
    return [part.strip() for x in lines for part in x.split("&&") if part.strip()]


def args_of(command):
    """The Args that a documented command means; SystemExit or ImportError if it does not parse."""
    words = shlex.split(command)
    if words[:2] == ["python", "-m"]:
        module, rest = words[2], words[3:]
    else:
        at = next(i for i, w in enumerate(words) if w.endswith(".py"))
        module, rest = words[at][:-3], words[at + 1 :]
    args = importlib.import_module(module).Args
    return tyro.cli(args, args=rest)


def documented():
    return [
        c
        for file in ("README.md", "results/README.md")
        for c in shell_lines(source_of(file))
        if re.match(r"(python|torchrun).*(\b(pwm|ed2|mow|savi)\.py|-m studies\.)", c)
    ]


def test_documented_commands_parse_and_files_exist():
    commands = documented()
    assert len(commands) > 30
    for command in commands:
        args_of(command)
    for file, folder in (("README.md", HERE), ("results/README.md", f"{HERE}/results")):
        for link in re.findall(r"\]\(([^)#]+)\)", source_of(file)):
            assert link.startswith("http") or Path(folder, link).exists(), (file, link)
        for raw in set(re.findall(r"results/[\w./-]+\w", source_of(file))):
            assert Path(HERE, raw).exists(), (file, raw)


def test_every_raw_file_is_named_in_the_gallery():
    text = source_of("results/README.md")
    files = [
        p.name
        for p in Path(HERE, "results").iterdir()
        if p.name not in ("README.md", "golden.json")
    ]
    assert not [f for f in files if f not in text]


@pytest.mark.parametrize("name", SCRIPTS)
def test_old_commands_name_the_new_one(name, monkeypatch):
    script = SCRIPTS[name]
    assert script.MOVED
    for old, new in script.MOVED.items():
        monkeypatch.setattr(sys, "argv", [f"{name}.py", *old.split()])
        with says(new):
            data.parse(script.Args, script.__doc__, script.MOVED)
        for command in re.findall(r"(?:python \w+\.py|python -m studies\.\w+)[^`;,]*", new):
            args_of(command.strip())


@pytest.mark.parametrize("name", SCRIPTS)
def test_every_flag_has_a_doc_and_is_read(name):
    script = SCRIPTS[name]
    flags = [f.name for f in dataclasses.fields(script.Args)]
    assert len(flags) <= 35
    text = tyro.extras.get_parser(script.Args).format_help()
    assert all(data.flag(f) in text for f in flags)
    body = source_of(f"{name}.py") + source_of("data.py")
    assert not [
        f for f in flags if not re.search(rf"\.{f}\b|[\"' ]{f}[\"' ]", body.split("\nclass ", 1)[1])
    ]


def test_requirements_are_what_is_installed():
    for line in source_of("requirements.txt").splitlines():
        if match := re.match(r"([\w-]+)==([\w.]+)$", line):
            assert importlib.metadata.version(match[1]).split("+")[0] == match[2], line


def test_the_studies_are_whole():
    """A study has its command in its docstring, a main, and at most 450 lines."""
    for file in sorted(Path(HERE, "studies").glob("*.py")):
        if file.stem in ("common", "golden") or file.stem.startswith(("test_", "t_")):
            continue
        text = file.read_text()
        assert len(text.splitlines()) <= 450 and max(map(len, text.splitlines())) <= 100, file.name
        if "__main__" in text:
            assert f"python -m studies.{file.stem}" in text and "def main(" in text, file.name

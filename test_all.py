"""All tests: `python -m pytest -q test_all.py`. They need no data, no GPU and no network; one draws (EGL or OSMesa)."""
import copy
import dataclasses
import errno
import functools
import json
import os
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
import imageio.v2 as imageio
import numpy as np
import pytest
import torch
import torch.nn as nn
import torch.nn.functional as F
import tyro

import data
import envs
import pwm
from data import Episodes, Run, bootstrap_ci, convert_tdmpc2, iqm, safe_load

HERE = str(Path(__file__).resolve().parent)

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


@pytest.mark.parametrize("n, max_envs", [(1, 64), (2, 64), (2, 3)])
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
                          "stats": pwm.ReturnStats(n)})
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
                             "critics": pwm.Critics(1, 16), "stats": pwm.ReturnStats(1)})
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
        nets["stats"] = pwm.ReturnStats(1)
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
    one = pwm.single_actor(nets["actors"], nets["wm"])
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
    for wanted in (0, 1, 2, 3, 4, 5):  # kill as soon as the checkpoint says that this stage is under way
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
    assert len(losses[0]) == 2 and np.allclose(losses[0], losses[1], rtol=1e-4), losses


def test_copied_with_its_two_helpers_it_runs_and_evaluates(tmp_path):
    for name in ("pwm.py", "envs.py", "data.py"):
        (tmp_path / name).write_text(Path(HERE, name).read_text())
    env = {k: v for k, v in os.environ.items() if k != "PYTHONPATH"} | {"OMP_NUM_THREADS": "1"}

    def run(*words):
        p = subprocess.run([sys.executable, "pwm.py", *words], cwd=tmp_path, env=env, capture_output=True, text=True)
        assert p.returncode == 0, p.stderr[-2000:]
        return p.stdout

    out = run("--task", "cartpole-swingup,cup-catch", "--fast", "--device", "cpu")
    assert "latent_nmse_16" in out and "left" in out and "ms per action" in out
    folder = last_run(tmp_path)
    first = json.loads((folder / "results.json").read_text())
    assert {p.name for p in folder.iterdir()} >= {"pwm.py", "envs.py", "data.py"}
    run("--task", "cup-catch,cartpole-swingup", "--eval-only", "--checkpoint", str(folder / "checkpoint.pt"), "--fast",
        "--capture-video")
    for t in ("cup-catch", "cartpole-swingup"):
        frames = imageio.mimread(last_run(tmp_path) / f"video_{t}.mp4", memtest=False)
        assert len(frames) == 501 and np.std(frames[0]) > 5 and np.abs(frames[0].astype(int) - frames[400]).max() > 50
    again = json.loads((last_run(tmp_path) / "results.json").read_text())  # other order of tasks, same policies
    for t, returns in first["episodes"]["ours"].items():
        assert np.allclose(returns, again["episodes"]["ours"][t], rtol=1e-3)
    wm = pwm.load_world_model(folder / "checkpoint.pt")
    assert wm.tasks == ("cartpole-swingup", "cup-catch")
    assert wm.encode(torch.zeros(1, 8), torch.tensor([1])).shape == (1, 128)
    out = run("--task", "cup-catch", "--checkpoint", str(folder / "checkpoint.pt"), "--fast")  # from a given model
    assert "from " + str(folder) in out and "0 model updates" in out and "round 0: model" not in out


def test_the_baseline_plans_on_the_same_model(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    result = pwm.main(pwm.Args(**{**TINY, "planner_episodes": 1}))
    assert set(result["ms_per_action"]) == {"ours", "planner"} and len(result["episodes"]["planner"][TINY["task"]]) == 1
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
    commands = [line.split("#")[0].split() for block in text.split("```")[1::2] for line in block.splitlines()
                if line.strip().startswith(("python pwm.py", "torchrun"))]
    assert len(commands) >= 5
    for words in commands:
        args = tyro.cli(pwm.Args, args=words[words.index("pwm.py") + 1:])
        assert isinstance(args, pwm.Args)


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

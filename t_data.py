from multiprocessing import get_context

from t_head import *  # noqa: F401,F403

# ------------------------------------------------------------------------------------------------------------ data.py
FACTS = {"a-b": (3, 2, 12), "x/y:z": (5, 1, 9)}


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
    obs = s.sequences(64, gen()).obs
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
    assert a.resident and not b.resident and a.nbytes == b.nbytes == (10 * 13 + 5 * 10) * ((5 + 2 + 1) * 4 + 1)
    assert a.too_short == b.too_short == 2
    ga, gb = gen(3), gen(3)
    for _ in range(5):
        x, y = a.sequences(64, ga, held_out=held), b.sequences(64, gb, held_out=held)
        assert all(torch.equal(p, q) and p.dtype == q.dtype for p, q in zip(x, y))
        assert torch.equal(a.starts(7, ga), b.starts(7, gb))
    assert x[0].shape == (5, 64, 5) and x[1].shape == (4, 64, 2) and x[2].shape == (4, 64) and x.task.dtype == torch.int64
    assert x.live.min() == 1
    assert eps.sampler(["a-b"], 4).resident and not torch.equal(a.sequences(64, ga)[0], x[0])


def decode(s, batch, names, facts=FACTS):
    """Check every slice against the encoding; returns (task, episode, start) of each."""
    obs, act, rew, _, _, task = (x.numpy().astype(float) for x in batch)
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
    assert (s.sequences(50, gen()).task == 1).all() and s.sequences(5, gen(), held_out=True)[0].shape == (4, 5, 5)
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
        z.writestr("a/version", "3\n")
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


# ------------------------------------------------------------------------------------------- Run
@dataclasses.dataclass
class ToyArgs:
    root: str
    task: str = "t"
    seed: int = 0
    resume: str | None = None
    save_every: float = 0.0
    workers: int = 1
    pair: tuple = (1, 2)
    poison: int = -1


def toy(args, event=lambda i: None):
    """Two rounds of four stages on data.Run; event(number of the piece) is called within each piece."""
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
    return run.finish(dict(weight=net.weight.tolist(), seen=seen, history=run.history, steps=run.step))


def lines_of(folder):
    rows = [json.loads(x) for x in (Path(folder) / "metrics.jsonl").read_text().splitlines()]
    return [{k: v for k, v in r.items() if k not in ("time", "charts/UPS")} for r in rows]


def numbers_of(result):
    return {k: result[k] for k in ("weight", "seen", "history", "steps")}, lines_of(result["folder"])


def only(root):
    (folder,) = Path(root).glob("t__toy__0__*")
    return str(folder)


@pytest.mark.parametrize("how", ["crash", "SIGINT", "SIGTERM"])
def test_run_stopped_at_every_piece_and_resumed_ends_at_the_same_numbers(tmp_path, how):
    want = numbers_of(toy(ToyArgs(str(tmp_path / "whole"))))
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
                toy(ToyArgs(str(root)), event)
        else:
            with says("stopped", f"--resume {only(root) if root.exists() else root}"):
                toy(ToyArgs(str(root)), event)
        assert (signal.getsignal(signal.SIGINT), signal.getsignal(signal.SIGTERM)) == before
        again = ToyArgs(str(root), resume=only(root), save_every=0.0)
        if how == "crash" and not stop:
            with says("no", "checkpoint.pt", "without --resume"):
                toy(again)
        else:
            assert numbers_of(toy(again)) == want, stop
    assert numbers_of(toy(again)) == want  # finished: nothing is done again


def test_run_killed_goes_on_and_a_second_signal_does_not_wait(tmp_path):
    want = numbers_of(toy(ToyArgs(str(tmp_path / "whole"))))
    for stop in (3, 8, 13):
        root = tmp_path / str(stop)

        def event(i, stop=stop):
            if i == stop:
                os.kill(os.getpid(), signal.SIGKILL)
        process = get_context("fork").Process(target=toy, args=(ToyArgs(str(root)), event))
        process.start()
        process.join()
        assert process.exitcode == -signal.SIGKILL
        with open(Path(only(root)) / "metrics.jsonl", "ab") as f:
            f.write(b'{"step": 5, "lo')  # killed in the middle of a line
        assert numbers_of(toy(ToyArgs(str(root), resume=only(root)))) == want

    def twice(i):
        if i == 2:
            os.kill(os.getpid(), signal.SIGINT)
            os.kill(os.getpid(), signal.SIGINT)
    with pytest.raises(KeyboardInterrupt):
        toy(ToyArgs(str(tmp_path / "twice")), twice)


def test_run_never_keeps_what_is_not_finite(tmp_path):
    with says("step 3", "round 0", "nan", "smaller learning rate"):
        toy(ToyArgs(str(tmp_path), poison=4))
    state = torch.load(Path(only(tmp_path)) / "checkpoint.pt", weights_only=True)
    assert state["seen"]["pieces"] == 3 and state["_run"]["at"] == [0, 1, 2] and state["size"] == 2
    with says("not finite"):  # noticed late: only when something is printed
        toy(ToyArgs(str(tmp_path / "late"), poison=6, save_every=1e9))


def test_run_tells_the_time_left(tmp_path, capsys, monkeypatch):
    now = [1000.0]
    monkeypatch.setattr(data.time, "time", lambda: now[0])

    def event(i):
        now[0] += 60 if i in (0, 8) else 1
    result = toy(ToyArgs(str(tmp_path), save_every=1e9), event)
    lines = [x for x in capsys.readouterr().out.splitlines() if x.startswith("round")]
    left = [x.partition(" | ")[2] for x in lines]  # nothing while policy has not been seen at work
    assert left == ["", "", "0:01:07 left", "0:00:05 left", "0:00:02 left", ""]
    assert lines[1].startswith("round 0: model 5/5, 1.0/s, loss ") and result["seconds"] == 136


def test_run_folder_and_results(tmp_path, capsys):
    args = ToyArgs(str(tmp_path), task="a/b:c,d")
    result = toy(args)
    folder = Path(result["folder"])
    assert folder.name.startswith("a%2Fb%3Ac,d__toy__0__") and list(folder.glob("events.*"))
    assert {"data.py", "envs.py", "args.json"} <= {p.name for p in folder.iterdir()}
    saved = json.loads((folder / "results.json").read_text())
    assert saved["args"]["pair"] == [1, 2] and saved["hardware"] and saved["seconds"] >= 0
    assert saved["command"].startswith("python ") and "commit" in saved and saved["weight"] == result["weight"]
    assert f"files: {folder}/" in capsys.readouterr().out
    assert toy(args)["folder"] != result["folder"]  # two starts within one second
    many = Run("pwm", ToyArgs(str(tmp_path), task=",".join(f"walker-{i}" for i in range(30))), tmp_path)
    assert len(many.dir.name) < 120 and "+29" in many.dir.name and not list(tmp_path.rglob("*.tmp"))


def test_run_copies_the_script(tmp_path):
    (tmp_path / "my.py").write_text(
        f"import sys; sys.path.insert(0, {HERE!r})\nimport data, dataclasses\n"
        "fields = [('task', str, 't'), ('seed', int, 0), ('resume', str, None)]\n"
        "print(data.Run('my', dataclasses.make_dataclass('Args', fields)()).dir)")
    out = subprocess.run([sys.executable, "my.py"], cwd=tmp_path, capture_output=True, text=True, check=True)
    assert (tmp_path / out.stdout.strip() / "my.py").exists()


def test_run_inside_a_folder_is_silent_and_goes_on(tmp_path, capsys):
    args, made = ToyArgs(str(tmp_path), save_every=0), []

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
args = dataclasses.make_dataclass("Args", [("task", str, "t"), ("seed", int, 0), ("resume", str, None)])()
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
    both = [subprocess.Popen([sys.executable, "-c", code], env={**env, "RANK": str(r)}) for r in (0, 1)]
    assert [p.wait(100) for p in both] == [0, 0]
    assert [r["losses/model/x"] for r in lines_of(only(tmp_path))] == [0.5, 0.5]  # means


def test_checkpoint_refuses_and_survives(tmp_path, monkeypatch):
    args, held = ToyArgs(str(tmp_path)), {"x": 1}
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
    with says("no 'other'", "copy of the code"):
        Run("toy", args).keeps(other={})
    with says("'net' of the checkpoint does not fit", "copy of the code"):
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
    folder = toy(ToyArgs(str(tmp_path)))["folder"]
    saved = data.resumed(ToyArgs(str(tmp_path), resume=folder, workers=7))
    assert saved.pair == (1, 2) and saved.workers == 7 and saved.resume == folder
    assert data.resumed(ToyArgs("x")) == ToyArgs("x")
    with says("--seed", "is 0, not 3", "leave --seed out"):
        data.resumed(ToyArgs(str(tmp_path), resume=folder, seed=3))
    for place in (tmp_path, tmp_path / "nothing"):
        with says("no readable args.json", "runs/<name>"):
            data.resumed(ToyArgs("x", resume=str(place)))
        with says("no readable args.json"):
            Run("toy", ToyArgs("x", resume=str(place)))
    with says("--pair is unknown here", "another version"):
        data.resumed(dataclasses.make_dataclass("A", [("resume", str, folder)])())
    for script, task in (("other", "t"), ("toy", "u")):
        with says("is a run of toy on 't'"):
            Run(script, ToyArgs("x", task=task, resume=folder))
    with says("--save-every 3", "nobody reads it; leave it out"):
        data.refuse(ToyArgs("x", save_every=3), "seed save_every", "nobody reads it")
    data.refuse(ToyArgs("x", save_every=3), "seed pair", "nobody reads it")
    for ranges, words in ((dict(seed=(1, None)), "--seed 0 is out of range: expected at least 1"),
                          (dict(seed=(1, 2)), "expected 1 to 2"),
                          (dict(save_every=(None, 5)), "--save-every nan is out of range: expected at most 5")):
        with says(words):
            data.check_ranges(ToyArgs("x", save_every=math.nan), ranges)
    data.check_ranges(ToyArgs("x"), dict(seed=(0, 0), resume=(1, 2), workers=(None, None)))
    moved = {"--task ant": "--task studies.bodies:ant", "--old": "python -m studies.old"}
    for words, new in (("--root x --task ant", "type --task studies"), ("--old=3", "type python -m"),
                       ("--task=ant", "--task ant has moved")):
        monkeypatch.setattr(sys, "argv", ["x.py", *words.split()])
        with says(new):
            data.parse(ToyArgs, "doc", moved)
    monkeypatch.setattr(sys, "argv", ["studies/x.py", "--root", "a b", "--task", "old"])
    assert data.parse(ToyArgs, "doc", moved) == ToyArgs("a b", task="old")
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
    assert "2/2" in (out := capsys.readouterr().out) and "y 9 | 0:00:00 left" in out or "y 4 |" in out


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

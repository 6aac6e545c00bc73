from multiprocessing import get_context

from t_head import *  # noqa: F401,F403

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


def test_run_killed_goes_on_and_a_second_signal_does_not_wait(tmp_path, monkeypatch):
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

    def read(run, shared=False):  # a signal that comes while a step is told waits for the next
        if run.step == 4:
            os.kill(os.getpid(), signal.SIGINT)
        return real(run, shared)
    real = Run._read
    with monkeypatch.context() as m, says("stopped"):
        m.setattr(Run, "_read", read)
        toy(ToyArgs(str(tmp_path / "told"), save_every=1e9))
    folder = only(tmp_path / "told")
    assert torch.load(Path(folder) / "checkpoint.pt")["_run"]["at"] == [0, 2, 0]
    assert numbers_of(toy(ToyArgs(str(tmp_path / "told"), resume=folder))) == want

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
    assert saved["command"].startswith("python ") and saved["weight"] == result["weight"]
    assert "commit" in saved
    assert f"files: {folder}/" in capsys.readouterr().out
    assert toy(args)["folder"] != result["folder"]  # two starts within one second
    thirty = ",".join(f"walker-{i}" for i in range(30))
    many = Run("pwm", ToyArgs(str(tmp_path), task=thirty), tmp_path)
    assert len(many.dir.name) < 120 and "+29" in many.dir.name and not list(tmp_path.rglob("*.tmp"))


def test_run_copies_the_script(tmp_path):
    (tmp_path / "my.py").write_text(
        f"import sys; sys.path.insert(0, {HERE!r})\nimport data, dataclasses\n"
        "fields = [('task', str, 't'), ('seed', int, 0), ('resume', str, None)]\n"
        "print(data.Run('my', dataclasses.make_dataclass('Args', fields)()).dir)")
    out = subprocess.check_output([sys.executable, "my.py"], cwd=tmp_path, text=True)
    assert (tmp_path / out.strip() / "my.py").exists()


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
                          (dict(save_every=(None, 5)), "--save-every nan is out of range")):
        with says(words):
            data.check_ranges(ToyArgs("x", save_every=math.nan), ranges)
    data.check_ranges(ToyArgs("x"), dict(seed=(0, 0), resume=(1, 2), workers=(None, None)))
    moved = {"--task ant": "--task studies.bodies:ant", "--old": "python -m studies.old"}
    for words, new in (("--root x --task ant", "type --task studies"),
                       ("--old=3", "type python -m"), ("--task=ant", "--task ant has moved")):
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

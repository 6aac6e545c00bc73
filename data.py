"""Episodes on disk, batches, published formats, video, flags, run folders.  Copy beside any script.

    episodes = Episodes.create("data/mine", {"spin": (3, 1, 500)})  # {task: (obs_dim, act_dim, T)}
    episodes.append("spin", obs, act, rew, term)                  # (t+1,O) (t,A) (t,) (t,), t <= T
    sampler = episodes.sampler(["spin"], horizon=16, device="cuda")
    batch = sampler.sequences(512, torch.Generator())             # obs act rew term live task

Shapes: N episodes, T steps at most per episode, O obs, A act, B batch, H horizon, K tasks; time
first in batches.  Action act[t] leads from obs[t] to obs[t+1] and earns rew[t]; term[t] says that
obs[t+1] is a terminal state (a time limit is not).  Bad input ends the program with one sentence:
what was seen, what is expected, what to type.
"""
import csv
import ctypes
import errno
import hashlib
import importlib
import io
import json
import math
import os
import shlex
import shutil
import signal
import subprocess
import sys
import threading
import time
import zipfile
from collections import OrderedDict, namedtuple
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import MISSING, asdict, fields
from datetime import timedelta
from pathlib import Path
from urllib.parse import quote

import numpy as np
import torch

FORMAT = 1                # of the episode folders; raise it when the layout changes
SLAB_BYTES = 256 << 20    # how much of a published chunk is in RAM at once while it is converted


# ------------------------------------------------------------------------------------------ files
@contextmanager
def _full_disk(what):
    """Turn 'no space left' (or 'over quota') into one sentence; writers here keep the old state."""
    try:
        yield
    except OSError as e:
        if e.errno not in (errno.ENOSPC, errno.EDQUOT):
            raise
        raise SystemExit(f"the disk is full while writing {what}: nothing written earlier is lost; "
                         "free some space and type the same command again") from e


def _check_room(folder, need, what):
    free = shutil.disk_usage(folder).free
    if need > free:
        raise SystemExit(f"{what} needs {need / 1e9:.3f} GB but {folder} has {free / 1e9:.3f} GB "
                         "free: nothing was written; free some space or choose another folder")


def _write_atomic(path, write):
    """Call write(file) on a temporary file, then rename it: readers see old or new, never half."""
    path = Path(path)
    tmp = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    with _full_disk(path):
        try:
            with open(tmp, "wb") as f:
                write(f)
                f.flush()
                os.fsync(f.fileno())
            os.replace(tmp, path)
        finally:
            tmp.unlink(missing_ok=True)  # after an error or Ctrl-C; else it has been renamed


def write_text(path, text):
    """Replace a file at once."""
    _write_atomic(path, lambda f: f.write(text.encode()))


def write_json(path, x):
    """Replace a file by x as JSON; nan, which JSON lacks, becomes null."""
    def strict(x):
        if isinstance(x, dict):
            return {k: strict(v) for k, v in x.items()}
        if isinstance(x, (list, tuple)):
            return [strict(v) for v in x]
        return None if isinstance(x, float) and math.isnan(x) else x

    def plain(x):
        return x.tolist() if hasattr(x, "tolist") else str(x)
    write_text(path, json.dumps(strict(x), indent=1, default=plain))


def write_csv(path, rows):
    """Replace a file by a table of dicts with the keys of the first."""
    text = io.StringIO()
    table = csv.DictWriter(text, rows[0], extrasaction="ignore")
    table.writeheader()
    table.writerows(rows)
    write_text(path, text.getvalue())


def save_torch(path, x):
    """torch.save that replaces a file at once."""
    _write_atomic(path, lambda f: torch.save(x, f))


# --------------------------------------------------------------------------------------- episodes
def _layout(facts):
    """{file: (shape of one episode, dtype)} for facts = (obs_dim, act_dim, T)."""
    O, A, T = facts
    f4 = np.dtype("<f4")
    return {"obs": ((T + 1, O), f4), "act": ((T, A), f4), "rew": ((T,), f4),
            "term": ((T,), np.dtype("?")), "length": ((), np.dtype("<i4"))}


def _header(n, row, dtype):
    """The .npy header of an (n, *row) array; padded by numpy, so that any n has room."""
    f = io.BytesIO()
    about = {"descr": dtype.str, "fortran_order": False, "shape": (n, *row)}
    np.lib.format.write_array_header_1_0(f, about)
    return f.getvalue()


def _pwrite(fd, data, at):
    """Write all of it there, and have it on the disk."""
    data = memoryview(data).cast("B")
    while len(data):                               # one call writes 2 GiB at most
        n = os.pwrite(fd, data, at)
        data, at = data[n:], at + n
    os.fsync(fd)


class Episodes:
    """Per-task folders of plain .npy files: obs (N,T+1,O) f32, act (N,T,A) f32, rew (N,T) f32, term
    (N,T) bool, length (N,) i32, and meta.json.  An episode of `length` t uses t steps and t+1
    observations; the rest is zero and never read.  Attributes: path; tasks (tuple, in the order of
    creation); facts {task: (obs_dim, act_dim, T)}."""

    def __init__(self, path, facts):
        self.path, self.facts, self.tasks = Path(path), facts, tuple(facts)

    @classmethod
    def open(cls, path, tasks=None):
        """Open what exists, in the order of `tasks` (default: of creation).  SystemExit: nothing
        there, an unknown task, an unfinished conversion, damaged files."""
        book = Path(path) / "convert.json"
        if book.exists() and not json.loads(book.read_text())["complete"]:
            raise SystemExit(f"{path} holds an unfinished conversion: run the same convert_tdmpc2 "
                             "again")
        known = cls._metas(path)
        if not known:
            raise SystemExit(f"no episodes in {path}: expected folders with a meta.json of "
                             "data.convert_tdmpc2 or data.Episodes.create")
        missing = [t for t in tasks or () if t not in known]
        if missing:
            raise SystemExit(f"{path} has no task {missing[0]!r}; it has {', '.join(known)}")
        self = cls(path, {t: known[t] for t in tasks or known})
        self.counts()  # touches every header: damage is reported now, not in hour three
        return self

    @classmethod
    def create(cls, path, facts):
        """Make folders for {task: (obs_dim, act_dim, T)}; where there are such, open them."""
        known = cls._metas(path)
        for task, fact in facts.items():
            about = f"{task!r} with (obs_dim, act_dim, T) = {tuple(fact)}"
            if not task or task.startswith(".") or min(fact) < 1:
                raise SystemExit(f"cannot store task {about}: expected a name that does not start "
                                 "with a dot and three positive numbers")
            if known.get(task, tuple(fact)) != tuple(fact):
                raise SystemExit(f"{path} holds {task!r} with {known[task]}, not {about}: take "
                                 "another folder")
            if task not in known:
                cls._make(Path(path) / quote(task, safe=""), task, fact, len(known))
                known[task] = tuple(fact)
        return cls(path, {t: known[t] for t in facts})

    @staticmethod
    def _make(folder, task, fact, order):
        tmp = folder.with_name(f".{folder.name}.{os.getpid()}.tmp")
        with _full_disk(folder):
            tmp.mkdir(parents=True)
            for name, (row, dtype) in _layout(fact).items():
                (tmp / f"{name}.npy").write_bytes(_header(0, row, dtype))
            meta = dict(zip(("obs_dim", "act_dim", "T"), fact))
            meta |= dict(format=FORMAT, task=task, order=order)
            (tmp / "meta.json").write_text(json.dumps(meta))
            os.replace(tmp, folder)                # a folder that exists is complete

    @staticmethod
    def _metas(path):
        metas = []
        for file in Path(path).glob("[!.]*/meta.json"):
            try:
                meta = json.loads(file.read_text())
            except ValueError as e:
                raise SystemExit(f"{file} is damaged ({e}): restore it, or delete its "
                                 "folder") from None
            if meta.get("format") != FORMAT:
                raise SystemExit(f"{file} has format {meta.get('format')}, this data.py reads "
                                 f"format {FORMAT}: use the data.py that wrote it")
            metas.append(meta)
        metas.sort(key=lambda m: (m["order"], m["task"]))
        return {m["task"]: (m["obs_dim"], m["act_dim"], m["T"]) for m in metas}

    def _file(self, task, name):
        if task not in self.facts:
            raise SystemExit(f"{self.path} has no task {task!r}; it has {', '.join(self.tasks)}")
        return self.path / quote(task, safe="") / f"{name}.npy"

    def arrays(self, task):
        """{"obs", "act", "rew", "term", "length"}: read-only memory maps."""
        maps = {}
        for name, (row, dtype) in _layout(self.facts.get(task, (1, 1, 1))).items():
            file = self._file(task, name)
            try:
                maps[name] = x = np.load(file, mmap_mode="r")
            except (OSError, ValueError) as e:
                raise SystemExit(f"{file} cannot be read or is cut short ({e}): copy it "
                                 "again") from None
            if x.shape[1:] != row or x.dtype != dtype:
                raise SystemExit(f"{file} holds {x.dtype} {x.shape}, meta.json says {dtype} (N, "
                                 f"{row})")
        n = min(map(len, maps.values()))           # unequal after an append was cut short
        return {name: x[:n] for name, x in maps.items()}

    def counts(self):
        """{task: N}, read from the files now (other processes may append)."""
        return {task: len(self.arrays(task)["rew"]) for task in self.tasks}

    def append(self, task, obs, act, rew, term):
        """Add one episode: obs (t+1,O), act (t,A), rew (t,), term (t,), 1 <= t <= T; or several:
        lists of such arrays.  All or nothing, also when the process is killed or the disk is full.
        SystemExit: wrong shapes, NaN or inf."""
        self._file(task, "obs")
        many = [obs, act, rew, term]
        if len(rew) and np.ndim(rew[0]) == 0:
            many = [[x] for x in many]             # a single episode
        if len({len(x) for x in many}) > 1:
            raise SystemExit(f"append({task!r}): {[len(x) for x in many]} episodes in obs, act, "
                             "rew, term; expected the same number")
        n, layout = len(many[0]), _layout(self.facts[task])
        block = {name: np.zeros((n, *row), dtype) for name, (row, dtype) in layout.items()}
        for i, episode in enumerate(zip(*many)):
            block["length"][i] = self._fill(task, block, i, episode)
        for name, x in block.items() if n else ():
            finite = np.isfinite(x).reshape(n, -1).all(1)
            if not finite.all():
                raise SystemExit(f"append({task!r}): episode {finite.argmin()} has NaN or inf in "
                                 f"{name}; expected finite float32 numbers: nothing was written")
        if n:
            self._write(task, block)

    def _fill(self, task, block, i, episode):
        """Put an episode into row i of block; returns its length."""
        episode = [np.asarray(x.detach().cpu() if torch.is_tensor(x) else x) for x in episode]
        (O, A, T), t, shapes = self.facts[task], len(episode[2]), [x.shape for x in episode]
        if not 1 <= t <= T or shapes != [(t + 1, O), (t, A), (t,), (t,)]:
            raise SystemExit(f"append({task!r}): episode {i} has obs, act, rew, term of shapes "
                             f"{shapes}; expected (t+1,{O}) (t,{A}) (t,) (t,) with t <= {T}: "
                             "nothing was written")
        with np.errstate(over="ignore"):           # beyond float32 is inf, refused by append
            for name, x in zip(block, episode):
                block[name][i, :len(x)] = x
        return t

    @contextmanager
    def _open_files(self, task):
        """{name: file descriptor} for writing; a second writer waits for its turn."""
        import fcntl
        with ExitStack() as stack:
            files = {name: stack.enter_context(open(self._file(task, name), "r+b"))
                     for name in _layout(self.facts[task])}
            fcntl.flock(files["obs"], fcntl.LOCK_EX)
            yield {name: f.fileno() for name, f in files.items()}

    def _write(self, task, block):
        """Append checked arrays (n, *row): all data first, only then the headers that count."""
        with self._open_files(task) as fds:
            have, layout = len(self.arrays(task)["rew"]), _layout(self.facts[task])
            size = {name: os.fstat(fd).st_size for name, fd in fds.items()}
            at = {name: len(_header(0, *layout[name])) + have * x[0].nbytes
                  for name, x in block.items()}
            need = sum(max(0, at[name] + x.nbytes - size[name]) for name, x in block.items())
            _check_room(self.path, need, f"adding {len(block['rew'])} episodes of {task!r}")
            try:
                with _full_disk(self.path):
                    for name, (_, dtype) in layout.items():
                        _pwrite(fds[name], np.ascontiguousarray(block[name], dtype), at[name])
            except BaseException:
                for name, fd in fds.items():
                    os.ftruncate(fd, size[name])                             # give the space back
                raise
            self._set_count(task, fds, have + len(block["rew"]))

    def _set_count(self, task, fds, n):
        for name, (row, dtype) in _layout(self.facts[task]).items():
            _pwrite(fds[name], _header(n, row, dtype), 0)

    def truncate(self, counts):
        """Keep the first counts[task] episodes of each task (for an exact resume); the rest is
        overwritten later.  SystemExit: there are fewer."""
        have = {task: len(self.arrays(task)["rew"]) for task in counts}
        for task, n in counts.items():
            if not 0 <= n <= have[task]:
                raise SystemExit(f"cannot cut {task!r} in {self.path} to {n} episodes: it has "
                                 f"{have[task]}; the checkpoint is younger")
        for task, n in counts.items():
            with self._open_files(task) as fds:
                self._set_count(task, fds, n)

    state_dict, load_state_dict = counts, truncate       # what a checkpoint must remember

    def sampler(self, tasks, horizon, device="cpu", obs_dim=None, act_dim=None, held_out=0.0,
                resident=None, ends=False):
        """A Sampler over the episodes there are now; make a new one after appending."""
        return Sampler(self, tasks, horizon, device, obs_dim, act_dim, held_out, resident, ends)


# --------------------------------------------------------------------------------------- sampling
def _free_bytes(device):
    """What a resident data set may take: 60 % of free GPU memory, or half of the available RAM."""
    if device.type == "cuda":
        return int(0.6 * torch.cuda.mem_get_info(device)[0])
    try:
        lines = dict(line.split(":") for line in Path("/proc/meminfo").read_text().splitlines())
        return int(lines["MemAvailable"].split()[0]) * 1024 // 2
    except (OSError, KeyError):                    # not Linux
        return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") // 2


Batch = namedtuple("Batch", "obs act rew term live task")
Batch.__doc__ = """H steps: obs (H+1,B,O), act (H,B,A), rew, term, live (H,B) f32, task (B,) int64.

term is 1 where a step ended the episode by itself; live is 0 beyond the end of an episode."""


class Sampler:
    """Uniform slices of H steps: task uniform over those with data, then episode, then start.

    tasks: names (their position is the id returned).  obs_dim, act_dim: pad with zeros to this
    width (default: the widest task).  held_out: about this fraction of each task's episodes is kept
    out of training: numbers 3, 3+k, 3+2k, .. with k = round(1/held_out), so that membership never
    changes as data grows and four episodes have one. ends: for tasks that end by themselves. Slices
    then start at any step of all episodes, each equally likely: with episodes equally likely, the
    many short ones of bad policies would crowd out the few long ones of good policies. Beyond the
    end the last observation and action repeat, live is 0. resident: hold all rows on the device
    (True), read memory maps (False), or decide by free memory (None); the batches are the same.
    Attributes: resident, nbytes (size when resident), too_short (episodes shorter than H).
    SystemExit: unknown task, no data, only short episodes, widths too small, no room."""

    def __init__(self, episodes, tasks, horizon, device="cpu", obs_dim=None, act_dim=None,
                 held_out=0.0, resident=None, ends=False):
        if not 0 <= held_out <= 0.5 or horizon < 1 or not len(tasks):
            raise SystemExit(f"sampler: held_out={held_out}, horizon={horizon}, {len(tasks)} "
                             "tasks; expected 0 <= held_out <= 0.5 and at least 1 of each")
        self.tasks, self.horizon, self.ends = tuple(tasks), int(horizon), ends
        self.device = torch.device(device)
        self._maps = [episodes.arrays(task) for task in self.tasks]
        need = [max(m[name].shape[2] for m in self._maps) for name in ("obs", "act")]
        self.obs_dim, self.act_dim = obs_dim or need[0], act_dim or need[1]
        if self.obs_dim < need[0] or self.act_dim < need[1]:
            raise SystemExit(f"sampler: obs_dim={self.obs_dim}, act_dim={self.act_dim} are too "
                             f"small; the tasks need {need[0]} and {need[1]}")
        self._columns = {"obs": ((self.obs_dim,), torch.float32), "rew": ((), torch.float32),
                         "act": ((self.act_dim,), torch.float32), "term": ((), torch.bool)}
        self._pools = self._split(held_out)
        self._tables = {}  # copies of the pools on the devices of generators
        self._place(resident)

    def _split(self, held_out):
        """[training, held-out] pools, see _pool."""
        self.too_short, picks = 0, ([], [])
        for task, m in zip(self.tasks, self._maps):
            length = np.array(m["length"])
            number = np.arange(len(length))
            held = (number - 3) % round(1 / held_out) == 0 if held_out else number < 0
            held, fits = held & (number >= 3), length >= (1 if self.ends else self.horizon)
            self.too_short += int((~fits).sum())
            train, held = np.flatnonzero(fits & ~held), np.flatnonzero(fits & held)
            if len(number) and not len(train):
                raise SystemExit(f"task {task!r} has no training episode of {self.horizon} steps "
                                 f"or more (its {len(number)} episodes have {length.max()} at "
                                 "most): use a smaller horizon or collect longer episodes")
            for pick, numbers in zip(picks, (train, held if len(held) else train)):
                pick.append((numbers, length[numbers] - (0 if self.ends else self.horizon - 1)))
        if not any(len(numbers) for numbers, _ in picks[0]):
            raise SystemExit(f"none of {', '.join(self.tasks)} has episodes: collect or convert "
                             "some")
        return [self._pool(pick) for pick in picks]

    @staticmethod
    def _pool(pick):
        """Of [(episodes, starts in each)] per task: ep, room (number of starts), until (their
        running sum) of all episodes; where those of a task begin, and how many they are."""
        ep, room = (np.concatenate(x) for x in zip(*pick))
        count = np.array([len(numbers) for numbers, _ in pick], np.int64)
        first, until = np.cumsum(count) - count, np.cumsum(room)
        before, after = (np.append(0, until)[i] for i in (first, first + count))
        return {"ep": ep, "room": room, "until": until, "first": first, "count": count,
                "before": before, "starts": after - before, "active": np.flatnonzero(count)}

    def _place(self, resident):
        """Decide where the rows are; flat (rows, .) tensors when they are resident."""
        rows = np.array([m["obs"].shape[0] * m["obs"].shape[1] for m in self._maps], np.int64)
        self._row0 = torch.from_numpy(np.cumsum(rows) - rows).to(self.device)  # (K,) first row
        self._rows = torch.tensor([m["obs"].shape[1] for m in self._maps], device=self.device)
        self.nbytes = int(rows.sum()) * ((self.obs_dim + self.act_dim + 1) * 4 + 1)
        free = _free_bytes(self.device)
        self.resident = self.nbytes <= free if resident is None else resident
        if resident and self.nbytes > free:
            raise SystemExit(f"resident data needs {self.nbytes / 1e9:.1f} GB and {free / 1e9:.1f} "
                             f"GB may be used on {self.device}: use resident=False or fewer tasks")
        # act, rew and term get one unused row per episode, so that one index serves all
        self._flat = {name: torch.zeros(int(rows.sum()), *width, dtype=dtype, device=self.device)
                      for name, (width, dtype) in self._columns.items() if self.resident}
        for m, row in zip(self._maps, self._row0.tolist()):
            (n, T1), step = m["obs"].shape[:2], max(1, (64 << 20) // (4 * m["obs"][:1].size + 1))
            for a in range(0, n if self.resident else 0, step):  # about 64 MB at a time
                b = min(a + step, n)
                for name, flat in self._flat.items():
                    x = torch.from_numpy(np.array(m[name][a:b]))              # (n,T,O) or (n,T)
                    to = flat[row + a * T1:row + b * T1].view(b - a, T1, *flat.shape[1:])
                    (to[:, :x.shape[1], :x.shape[2]] if x.ndim > 2 else to[:, :x.shape[1]]).copy_(x)

    def _draw(self, task, held_out, generator):
        """Episode, start, length of the episode (B,) for task ids (B,), where the generator is."""
        pool = self._table(held_out, generator)
        # double precision: u < 1 gives floor(u * n) < n for every n, and no episode is favoured
        u = torch.rand(2, *task.shape, dtype=torch.float64, generator=generator,
                       device=generator.device)
        if self.ends:                              # all starts in a row, by number
            at = pool["before"][task] + (u[0] * pool["starts"][task]).long()
            pick = torch.searchsorted(pool["until"], at, right=True)
            room = pool["room"][pick]
            return pool["ep"][pick], at - pool["until"][pick] + room, room
        pick = pool["first"][task] + (u[0] * pool["count"][task]).long()
        room = pool["room"][pick]
        return pool["ep"][pick], (u[1] * room).long(), room + self.horizon - 1

    def _table(self, held_out, generator):
        """A pool as tensors where the generator is."""
        key = bool(held_out), generator.device
        if key not in self._tables:
            self._tables[key] = {name: torch.tensor(x, dtype=torch.int64, device=key[1])
                                 for name, x in self._pools[key[0]].items()}
        return self._tables[key]

    def _send(self, x):
        return x.to(self.device, non_blocking=True)

    def _gather(self, task, ep, steps):
        """steps {name: (n,B)}, task, ep (B,) -> [(n,B,width) or (n,B) f32], task, on the device."""
        if self.resident:
            task = self._send(task)
            first = self._row0[task] + self._send(ep) * self._rows[task]     # (B,)
            rows = {name: first + self._send(t) for name, t in steps.items()}
            return [self._flat[name][i].float() for name, i in rows.items()], task
        ids, ep, out = task.cpu().numpy(), ep.cpu().numpy(), []
        groups = [(k, np.flatnonzero(ids == k)) for k in np.unique(ids)]  # one gather per task
        for name, t in steps.items():
            pinned = self.device.type == "cuda"                              # copies overlap work
            x = torch.zeros(*t.shape, *self._columns[name][0], pin_memory=pinned)
            for k, b in groups:
                part = np.asarray(self._maps[k][name])[ep[b], t.cpu().numpy()[:, b]]
                (x.numpy()[..., :part.shape[2]] if part.ndim > 2 else x.numpy())[:, b] = part
            out.append(self._send(x))
        return out, self._send(task)

    def sequences(self, batch, generator, held_out=False):
        """A Batch on the device.  generator: a torch.Generator on the CPU or on the device.  A task
        without held-out episodes gives training ones."""
        active, H = self._table(held_out, generator)["active"], self.horizon
        task = torch.randint(len(active), (batch,), generator=generator, device=generator.device)
        task = active[task]
        ep, start, length = self._draw(task, held_out, generator)            # (B,) each
        step = start + torch.arange(H + 1, device=start.device)[:, None]     # (H+1,B)
        live = self._send((step[:-1] < length).float())
        at = torch.minimum(step[:-1], length - 1)
        steps = {"obs": torch.minimum(step, length), "act": at, "rew": at, "term": at}
        (obs, act, rew, term), task = self._gather(task, ep, steps)
        return Batch(obs, act, rew, term * live, live, task)

    def starts(self, per_task, generator):
        """obs (K, per_task, O) f32: first rows of training slices, as sequences() draws them.
        SystemExit: a task without episodes."""
        if len(self._pools[0]["active"]) < len(self.tasks):
            empty = [t for t, n in zip(self.tasks, self._pools[0]["count"]) if n == 0]
            raise SystemExit(f"task {empty[0]!r} has no episodes: collect some, or leave it out")
        tasks = torch.arange(len(self.tasks), device=generator.device)
        task = tasks.repeat_interleave(per_task)
        ep, start, _ = self._draw(task, False, generator)                    # (K * per_task,) each
        (obs,), _ = self._gather(task, ep, {"obs": start[None]})
        return obs.view(len(self.tasks), per_task, self.obs_dim)


# ------------------------------------------------------ reading torch files without running them
class _Object:
    """Stands for an instance of a class that is never imported: keeps arguments and attributes."""
    args, state = (), {}                           # unpickling may skip __init__

    def __init__(self, *args):
        self.args = args

    def __setstate__(self, state):
        self.state = state


_NUMPY = {x: type(x, (_Object,), {}) for x in ("dtype", "ndarray", "_reconstruct", "scalar")}


def _stand_in(name):
    """(harmless class, name) for a name in a pickle; None if it is not known to be harmless."""
    top, last = name.partition(".")[0], name.rpartition(".")[2]
    if top == "tensordict" and last == "_StringOnlyDict":
        return OrderedDict, name
    if top == "tensordict" and last in ("TensorDict", "_make_td") or last == "RunningMeanStd":
        return _Object, name
    return (_NUMPY[last], name) if top == "numpy" and last in _NUMPY else None


def _numbers(x):
    """A tensor or a number out of numpy's own pickle layout."""
    array = isinstance(x, _NUMPY["_reconstruct"])  # state: version, shape, dtype, fortran, bytes
    shape, dtype, fortran, raw = x.state[1:] if array else ((), x.args[0], False, x.args[1])
    name = dtype.args[0]
    if not isinstance(raw, bytes) or name[:1] not in "biufc":
        raise SystemExit(f"refused numpy dtype {name!r} in the file: only numbers are read")
    order = dtype.state[1] if dtype.state and dtype.state[1] in "<>" else "="
    x = np.frombuffer(raw, np.dtype(name).newbyteorder(order)).astype(np.dtype(name))
    x = x.reshape(shape, order="F" if fortran else "C")
    return torch.from_numpy(np.ascontiguousarray(x)) if array else x.item()


def _plain(x):
    """Nested dict/list/tuple of tensors and numbers out of what torch.load gave."""
    if isinstance(x, dict):
        return {_plain(k): _plain(v) for k, v in dict.items(x)}
    if isinstance(x, (list, tuple, set)):
        return tuple(map(_plain, x)) if isinstance(x, tuple) else list(map(_plain, x))
    if isinstance(x, (_NUMPY["_reconstruct"], _NUMPY["scalar"])):
        return _numbers(x)
    if isinstance(x, _Object):
        state = x.args[1] if len(x.args) == 2 else x.state  # tensordict of 2025: f(cls, state)
        return _plain(state.get("_tensordict", state))
    if isinstance(x, torch.device):
        return str(x)
    if isinstance(x, torch.Tensor):
        return x.detach()
    if x is None or isinstance(x, (bool, int, float, complex, str, bytes, torch.dtype)):
        return x
    raise TypeError(f"it holds a {type(x).__name__}")


def safe_load(path, mmap=True):
    """Nested dict/list/tuple of tensors from a file of torch.save; nothing in it is executed.

    Reads plain containers, state dicts, TensorDicts (both pickle layouts; tensordict is not
    needed), numpy numbers.  mmap: tensors are private copy-on-write views of the file, so that
    opening 13 GB is instant; False: read all.  SystemExit: no such file, no torch zip file, cut
    short, damaged, or a name that is not known to be harmless."""
    path = Path(path)
    if not path.exists():
        raise SystemExit(f"no file {path}: expected a file written by torch.save")
    try:
        if not zipfile.is_zipfile(path):
            with open(path, "rb") as f:
                cut = f.read(2) == b"PK"
            kind = "is cut short: get it again" if cut else "is no file of torch.save (>= 1.6)"
            raise SystemExit(f"{path} ({path.stat().st_size} bytes) {kind}")
        with zipfile.ZipFile(path) as archive:
            stored = all(i.compress_type == zipfile.ZIP_STORED for i in archive.infolist())
        names = torch.serialization.get_unsafe_globals_in_checkpoint(path)
        if strange := [x for x in names if not _stand_in(x)]:
            raise SystemExit(f"{path} asks for {strange[0]}, which is not known to be harmless: "
                             "refused, nothing was executed; re-save it as a dict of tensors")
        with torch.serialization.safe_globals(list(map(_stand_in, names))):
            mmap = mmap and stored
            return _plain(torch.load(path, map_location="cpu", weights_only=True, mmap=mmap))
    except Exception as e:           # whatever a damaged pickle can cause; nothing has been changed
        why = f"{type(e).__name__}: {' '.join(str(e).split())[:200]}"
        if "unable to mmap" in why:  # a file of more than all memory
            raise SystemExit(f"{path} does not fit in memory ({why}): use a larger machine") from e
        raise SystemExit(f"{path} is damaged or no torch file ({why}): get it again") from e


# ----------------------------------------------------------------------------------------- frames
class Frames:
    """Pixels of K environments that step together, on memory maps that may be larger than RAM.

    Arrays (K, N, ..): obs uint8 (.., size, size, 3), act f32 (.., A), rew f32, term bool, first
    bool.  Row t holds o_t, the action taken there, its reward, whether it ended (a life or the
    episode), and whether o_t opens an episode.  N is fixed and nothing is overwritten: whoever
    remembers `count` can go back to it after a crash. SystemExit: no room on the disk, or files
    that belong to other sizes."""

    def __init__(self, path, K, N, act_dim, size=64):
        self.path, self.count, self.N, self.arrays = Path(path), 0, N, {}
        kinds = {"obs": ("u1", (size, size, 3)), "act": ("f4", (act_dim,)), "rew": ("f4", ()),
                 "term": ("?", ()), "first": ("?", ())}
        new = {name for name in kinds if not (self.path / f"{name}.npy").exists()}
        need = K * N * sum(np.dtype(kinds[name]).itemsize for name in new)
        with _full_disk(self.path):
            self.path.mkdir(parents=True, exist_ok=True)
            _check_room(self.path, need, f"a replay of {K} x {N:,} frames")
            for name, (dtype, row) in kinds.items():
                file, shape = self.path / f"{name}.npy", (K, N, *row)
                x = np.lib.format.open_memmap(file, "w+" if name in new else "r+", dtype, shape)
                # reserve the space: a map that finds the disk full kills the process
                if name in new and hasattr(os, "posix_fallocate"):  # macOS has no such call
                    with open(file, "r+b") as f:
                        os.posix_fallocate(f.fileno(), 0, os.fstat(f.fileno()).st_size)
                if x.shape != shape or x.dtype != dtype:
                    raise SystemExit(f"{file} holds {x.dtype} {x.shape}; expected {dtype} {shape}: "
                                     "choose another folder")
                self.arrays[name] = x
                setattr(self, name, x)

    def append(self, obs, act, rew, term, first):
        """One step of all environments: (K, ..) each."""
        for to, x in zip(self.arrays.values(), (obs, act, rew, term, first)):
            to[:, self.count] = x
        self.count += 1

    def flush(self):
        """Bring everything to the disk: call it before a checkpoint that remembers `count`."""
        with _full_disk(self.path):
            for x in self.arrays.values():
                x.flush()

    def state_dict(self):
        """What a checkpoint must remember, after bringing the rows to the disk: {count}."""
        self.flush()
        return {"count": self.count}

    def load_state_dict(self, state):
        """Go back to the rows of a checkpoint.  SystemExit: it has more rows than fit here."""
        if state["count"] > self.N:
            raise SystemExit(f"{self.path} has room for {self.N} rows, the checkpoint has "
                             f"{state['count']}: it belongs to another folder")
        self.count = state["count"]

    def sample(self, B, L, rng, device="cpu", tasks=None, since=0):
        """Uniform windows of L steps, none from before row `since`, for each of `tasks`: obs
        (k,B,L,size,size,3) uint8, act (k,B,L,A), rew, term and first (k,B,L).  They may cross the
        ends of episodes.  SystemExit: fewer rows than L."""
        if L > self.count - since:
            raise SystemExit(f"{self.path} has {self.count - since} steps per task, fewer than the "
                             f"{L} of a window: collect more random steps first")
        rows = np.arange(len(self.rew)) if tasks is None else np.asarray(tasks)
        start = rng.integers(since, self.count - L + 1, size=(len(rows), B, 1))
        at = rows[:, None, None], start + np.arange(L)
        return [torch.from_numpy(np.asarray(x[at])).to(device, non_blocking=True)
                for x in self.arrays.values()]


# -------------------------------------------------------------------------- published TD-MPC2 data
CHUNK = ("obs", "action", "reward", "task")


def _open_chunk(path):
    """{name in CHUNK: array (N,R,..)} of one file.  SystemExit: another layout."""
    data, shapes = safe_load(path), {}
    if isinstance(data, dict):
        shapes = {x: tuple(getattr(data.get(x), "shape", ())) for x in CHUNK}
    rows = shapes.get("reward", ())
    fits = [len(x) for x in shapes.values()] == [3, 3, 2, 2] and rows[1] > 1
    if not fits or {x[:2] for x in shapes.values()} != {rows}:
        raise SystemExit(f"{path} holds {shapes or type(data).__name__}; expected obs (N,R,O), "
                         "action (N,R,A), reward (N,R), task (N,R)")
    return {x: data[x].numpy() for x in CHUNK}


def _chunks(src):
    """The chunk files in order, opened: [(path, _open_chunk(path))]."""
    found = {int(p.stem[6:]): p for p in Path(src).glob("chunk_*.pt") if p.stem[6:].isdigit()}
    if not found:
        raise SystemExit(f"no chunk_0.pt, chunk_1.pt, .. in {src}: download mt30 or mt80 of "
                         "huggingface.co/datasets/nicklashansen/tdmpc2 into it")
    if missing := sorted(set(range(max(found))) - set(found)):
        raise SystemExit(f"{src} has chunk_{max(found)}.pt but no chunk_{missing[0]}.pt: download "
                         "it")
    chunks = [(path, _open_chunk(path)) for _, path in sorted(found.items())]
    for path, data in chunks:
        if any(data[x].shape[1:] != chunks[0][1][x].shape[1:] for x in CHUNK):
            raise SystemExit(f"{path} has obs {data['obs'].shape}, action {data['action'].shape}; "
                             "chunk_0.pt has other sizes: keep mt30 and mt80 in two folders")
    return chunks


def _slab(path, data, a, b, tasks, facts):
    """Episodes a..b of one chunk as checked blocks {task: arrays for Episodes._write}."""
    # row t >= 1 holds action and reward that led to observation t; those of row 0 are filler
    obs, ids = data["obs"][a:b], data["task"][a:b]
    act, rew, blocks = data["action"][a:b, 1:], data["reward"][a:b, 1:], {}
    for i in np.unique(ids[:, 1]):
        n, task = np.flatnonzero(ids[:, 1] == i), tasks[i]
        O, A, T = facts[task]
        o, u, r = obs[n], act[n], rew[n]
        mixed = (ids[n, 1:] != i).any(1)
        fine = np.isfinite(o).all((1, 2)) & np.isfinite(u).all((1, 2)) & np.isfinite(r).all(1)
        wide = (o[..., O:] != 0).any((1, 2)) | (u[..., A:] != 0).any((1, 2))
        for wrong, what in ((mixed, "more than one task id"), (~fine, "NaN or inf after row 0"),
                            (wide, f"numbers beyond obs_dim {O} or act_dim {A}")):
            if wrong.any():
                raise SystemExit(f"{path}: episode {a + n[wrong.argmax()]} of task {task!r} has "
                                 f"{what}: download the file again, or correct `tasks` and `dims`")
        blocks[task] = {"obs": o[..., :O], "act": u[..., :A], "rew": r,
                        "term": np.zeros((len(n), T), bool), "length": np.full(len(n), T, np.int32)}
    return blocks


def _name_tasks(src, chunks, tasks, dims):
    """([task ids (N,) of each chunk], {task: (obs_dim, act_dim, T)})."""
    ids = [np.array(data["task"][:, 1]) for _, data in chunks]
    top = max(int(i.max(initial=-1)) for i in ids) + 1
    tasks = tuple(tasks or map("task-{}".format, range(top)))
    lacking = [task for task in tasks if dims and task not in dims]
    if lacking:
        raise SystemExit(f"dims has no (obs_dim, act_dim) for {lacking[0]!r}: give one for every "
                         "task, or none")
    if top > len(tasks) or min(int(i.min(initial=0)) for i in ids) < 0:
        raise SystemExit(f"{src} has task ids up to {top - 1} but {len(tasks)} names were given: "
                         "mt30 has 30, mt80 80")
    (_, R, O), A = chunks[0][1]["obs"].shape, chunks[0][1]["action"].shape[2]
    return ids, {task: (*(dims[task] if dims else (O, A)), R - 1) for task in tasks}


def _open_journal(book, facts, sizes):
    """What was converted: {facts, chunks, at: [chunk, episode], counts, complete}; {} at the start.
    SystemExit: of something else, or episodes of another origin."""
    if not book.exists():
        if Episodes._metas(book.parent):
            raise SystemExit(f"{book.parent} already holds episodes of another origin: take "
                             "another folder")
        return {"at": [0, 0], "counts": {}, "complete": False}
    journal = json.loads(book.read_text())
    began = {task: tuple(fact) for task, fact in journal["facts"].items()}
    if list(began.items()) != list(facts.items()) or not journal["chunks"].items() <= sizes.items():
        raise SystemExit(f"{book} was begun with other tasks, dims or chunks: choose another "
                         f"folder, or delete {book.parent}")
    return journal


def convert_tdmpc2(src, dst, tasks=None, dims=None, progress=True):
    """Published chunk_*.pt in `src` -> Episodes in `dst`.  Killed, the same call goes on.

    tasks: names in the order of the ids in the files (default: task-0, task-1, ..; pwm.py passes
    MT30 or MT80).  dims: {task: (obs_dim, act_dim)} drops the padding columns after checking that
    they are zero (default: keeps them).  RAM: about three times SLAB_BYTES. SystemExit: missing,
    cut or inconsistent chunks, NaN/inf, full disk, a `dst` that holds something else; what was
    converted before stays valid."""
    from tqdm import tqdm
    book = Path(dst) / "convert.json"
    if not Path(src).exists() and book.exists() and json.loads(book.read_text())["complete"]:
        return Episodes.open(dst, tasks)           # the chunks may be deleted afterwards
    chunks = _chunks(src)
    ids, facts = _name_tasks(src, chunks, tasks, dims)
    sizes = {path.name: path.stat().st_size for path, _ in chunks}
    journal = _open_journal(book, facts, sizes) | dict(facts=facts, chunks=sizes)
    with _full_disk(dst):
        Path(dst).mkdir(parents=True, exist_ok=True)
    total, need = np.bincount(np.concatenate(ids), minlength=len(facts)), 0
    for n, (task, fact) in zip(total.tolist(), facts.items()):
        one = sum(math.prod(row) * dtype.itemsize for row, dtype in _layout(fact).values())
        need += (n - journal["counts"].get(task, 0)) * one
    _check_room(dst, need, f"converting {src}")
    write_json(book, journal)  # before the first folder, so that a restart knows they are ours
    episodes = Episodes.create(dst, facts)
    episodes.truncate({t: journal["counts"].get(t, 0) for t in facts})  # forget an unfinished slab
    slab = max(1, SLAB_BYTES // (4 * sum(x[0].size for x in chunks[0][1].values())))
    first, begin = journal["at"]
    with tqdm(total=int(total.sum()), initial=sum(journal["counts"].values()), unit="episode",
              desc="convert", disable=None if progress else True) as bar:
        for c, (path, data) in enumerate(chunks[first:], first):
            for a in range(begin if c == first else 0, len(ids[c]), slab):
                b = min(a + slab, len(ids[c]))
                for task, block in _slab(path, data, a, b, tuple(facts), facts).items():
                    episodes._write(task, block)   # all are checked by now
                journal |= dict(at=[c, b], counts=episodes.counts(), complete=False)
                write_json(book, journal)
                bar.update(b - a)
    write_json(book, journal | dict(complete=True))
    return episodes


# ------------------------------------------------------------------------- video made on the spot
VIDEO_VERSION = 1  # of what is rendered; raise it when the same recipe would give other pixels
PART_CLIPS = 20  # clips in one file of a cache: what a killed rendering loses at most
FORK_STEPS = 4  # frames of the counterfactual branch of a clip
TAN = (0.7, 0.5, 0.3)
PALETTE = np.array([(230, 25, 75), (60, 180, 75), (255, 225, 25), (0, 100, 220), (245, 130, 48),
                    (145, 30, 180), (70, 240, 240), (240, 50, 230)]) / 255
MOVED_SCENES = {"pushed": "studies.scenes:Pushed", "humanoid": "studies.scenes:Humanoid",
                "crowd": "studies.scenes:Crowd", "mocapact": "python -m studies.mocapact"}
_ROOM = """<mujoco><option timestep="0.01"/><visual><headlight ambient="0.45 0.45 0.45"
diffuse="0.5 0.5 0.5" specular="0 0 0"/></visual><asset><texture name="c" type="2d"
builtin="checker" rgb1=".35 .35 .35" rgb2=".6 .6 .6" width="64" height="64"/>
<material name="checker" texture="c" texrepeat="6 6"/></asset><worldbody>
<geom name="floor" type="plane" size="30 30 .1" friction=".4" {floor}/>{bodies}</worldbody>
<actuator>{motors}</actuator></mujoco>"""


class Scene:
    """A simulation that can be filmed.  A subclass sets model and data (MuJoCo's), parts and inst
    (label of each geom, 0 = background; inst None: as parts), the names below and groups (actions
    of each part), and defines start(rng, clip, n) -> (task id, actions (n, m)), which also chooses
    colours and camera.  color: parts or default; floor: plain or checker."""
    kind, fps, substeps, inst = None, 12, 8, None    # kind: what recipes say, else module:Class
    part_names, action_names, groups, task_names = (), (), [], None

    def __init__(self, color, floor):
        import mujoco
        self.mj, self.color, self.floor, self.camera = mujoco, color, floor, mujoco.MjvCamera()

    def build(self, bodies, motors=""):
        """Make a room with these MuJoCo bodies and motors."""
        floor = 'material="checker" rgba="1 1 1 1"'
        floor = floor if self.floor == "checker" else 'rgba=".5 .5 .5 1"'
        xml = _ROOM.format(floor=floor, bodies=bodies, motors=motors)
        self.model = self.mj.MjModel.from_xml_string(xml)
        self.data = self.mj.MjData(self.model)

    def split_of(self, clip):
        """0 train, 1 test, 2 validation."""
        return (0, 0, 0, 0, 0, 0, 0, 1, 1, 2)[clip % 10]

    def step_hook(self, rng, t):
        """Called before every frame."""

    def branch(self, rng, group, actions):
        """fork_frame, fork_actions, fork_group of make_video, where a scene has them."""
        return {}

    def open(self, size):
        """Prepare for pictures of size x size.  What is switched off took 98 % of the time."""
        quality = self.model.vis.quality
        quality.offsamples = 0                       # rendered at 2x and averaged instead
        quality.numslices, quality.numstacks = 8, 6
        self.model.vis.global_.offwidth = self.model.vis.global_.offheight = 2 * size
        self.size, self.renderer = size, self.mj.Renderer(self.model, 2 * size, 2 * size)
        for flag in ("SHADOW", "REFLECTION", "SKYBOX"):
            self.renderer.scene.flags[getattr(self.mj.mjtRndFlag, f"mjRND_{flag}")] = 0

    def look(self, at, distance, elevation, azimuth):
        """Place the camera."""
        self.camera.lookat[:] = at
        self.camera.distance, self.camera.elevation = distance, elevation
        self.camera.azimuth = azimuth

    def paint(self, geoms, color):
        """Give geoms a colour."""
        self.model.geom_matid[geoms] = -1
        self.model.geom_rgba[geoms] = (*color, 1)

    def advance(self, action):
        """Simulate one frame."""
        if len(action):
            self.data.ctrl[:] = action
        self.mj.mj_step(self.model, self.data, self.substeps)

    def rgb(self):
        """(H,W,3) u8, the picture now."""
        self.renderer.update_scene(self.data, self.camera)
        x = self.renderer.render().reshape(self.size, 2, self.size, 2, 3)
        return (x.astype(np.uint16).sum((1, 3)) // 4).astype(np.uint8)

    def shoot(self, before):
        """{video, seg (and inst), flow, state} now; before = geom (xpos, xmat) a frame ago."""
        picture, renderer = self.rgb(), self.renderer
        renderer.enable_segmentation_rendering()
        x = renderer.render()[1::2, 1::2]
        renderer.disable_segmentation_rendering()
        geoms = np.where(x[..., 1] == int(self.mj.mjtObj.mjOBJ_GEOM), x[..., 0], -1)    # -1: none
        labels = {"seg": self.parts} | ({"inst": self.inst} if self.inst is not None else {})
        masks = {k: np.where(geoms >= 0, x[geoms], 0).astype(np.uint8) for k, x in labels.items()}
        state = self.data.xpos[1:].ravel().astype(np.float32)
        return {"video": picture, **masks, "flow": self._flow(geoms, before), "state": state}

    def _flow(self, geoms, before):
        """Backward optical flow, exact for rigid geoms: a pixel is unprojected with its depth,
        carried back by its geom, and projected."""
        self.renderer.enable_depth_rendering()
        depth = self.renderer.render()[1::2, 1::2]
        self.renderer.disable_depth_rendering()
        eyes = self.renderer.scene.camera
        eye, forward, up = (np.mean([getattr(c, k) for c in eyes], 0)
                            for k in ("pos", "forward", "up"))
        frame = np.stack([np.cross(forward, up), -up, forward])      # rows: right, down, forward
        focal = self.size / 2 / math.tan(math.radians(self.model.vis.global_.fovy) / 2)
        at = (np.arange(self.size) + 0.75 - self.size / 2) / focal   # the pixel of 2x that was kept
        ray = np.stack([*np.meshgrid(at, at), np.ones((self.size, self.size))], -1)
        world = (ray * depth[..., None]) @ frame + eye
        square, data = (*geoms.shape, 3, 3), self.data
        pos, mat = data.geom_xpos[geoms], data.geom_xmat[geoms].reshape(square)
        old_pos, old_mat = before[0][geoms], before[1][geoms].reshape(square)
        local = np.einsum("hwji,hwj->hwi", mat, world - pos)
        seen = (np.einsum("hwij,hwj->hwi", old_mat, local) + old_pos - eye) @ frame.T
        flow = focal * (seen[..., :2] / seen[..., 2:] - ray[..., :2])
        return np.where((geoms >= 0)[..., None], flow, 0).astype(np.float16)

    def film(self, rng, clip, frames):
        """One clip as arrays, see make_video.  Two more frames are simulated before it begins."""
        task, actions = self.start(rng, clip, frames + 2)
        fork, group, shots = frames // 2, int(rng.integers(max(1, len(self.groups)))), []
        out = {"fork_frame": np.zeros((self.size, self.size, 3), np.uint8),
               "fork_group": np.int16(-1),
               "fork_actions": np.zeros((FORK_STEPS, actions.shape[1]), np.float32)}
        for t, action in enumerate(actions):
            before = self.data.geom_xpos.copy(), self.data.geom_xmat.copy()
            self.step_hook(rng, t)
            self.advance(action)
            if t < 2:
                continue
            self.mj.mj_forward(self.model, self.data)  # mj_step leaves positions one substep behind
            shots.append(self.shoot(before))
            if self.groups and len(shots) == fork + 1 and fork + FORK_STEPS < frames:
                out |= self.branch(rng, group, actions[t + 1:t + 1 + FORK_STEPS])
        out |= {k: np.stack([shot[k] for shot in shots]) for k in shots[0]}
        return out | {"task": np.int16(task), "actions": actions[2:].astype(np.float32)}


class Objects(Scene):
    """2 to 5 free bodies of four shapes and eight colours that collide in a box of unseen walls."""
    kind, part_names = "objects", tuple(f"object {i}" for i in range(1, 6))

    def __init__(self, color, floor):
        super().__init__(color, floor)
        # 5 of each shape; a clip leaves those it does not use behind the camera: one model for all
        body = '<body pos="0 -20 .5"><freejoint/><geom type="{}" size=".3 .3 .3" mass="1"/></body>'
        bodies = "".join(5 * body.format(x) for x in ("sphere", "box", "cylinder", "capsule"))
        walls = "".join(f'<geom type="plane" size="9 9 .1" pos="{x} {y} 0" zaxis="{-x} {-y} 0" '
                        'rgba="0 0 0 0"/>' for x, y in ((1.9, 0), (-1.9, 0), (0, 1.6), (0, -1.6)))
        self.build(walls + bodies)
        self.first = int(self.model.body_geomadr[1])

    def start(self, rng, clip, n):
        """Choose bodies, sizes, colours and places; nothing is commanded."""
        m, d = self.model, self.data
        self.mj.mj_resetData(m, d)
        self.chosen = rng.permutation(20)[:rng.integers(2, 6)]
        colors = PALETTE[rng.permutation(8)] if self.color == "parts" else [TAN] * 5
        self.parts = np.zeros(m.ngeom, np.uint8)
        m.geom_contype[self.first:] = m.geom_conaffinity[self.first:] = 0
        m.body_gravcomp[1:] = 1
        cells = np.stack([np.repeat((-1.2, 0, 1.2), 2), np.tile((-0.9, 0.3), 3)], 1)   # start apart
        for i, (b, c) in enumerate(zip(self.chosen, rng.permutation(len(cells)))):
            geom, joint, size = self.first + b, 7 * b, rng.uniform(0.28, 0.45)
            width = size * (0.9 if b < 15 else 0.6)
            m.geom_size[geom] = (size, size, size) if b < 10 else (size * 0.9, width, 0)
            m.geom_rbound[geom] = 2 * size
            m.geom_contype[geom] = m.geom_conaffinity[geom] = 1
            m.body_gravcomp[1 + b] = 0
            self.paint(geom, colors[i])
            self.parts[geom] = i + 1
            place = cells[c] + rng.uniform(-0.15, 0.15, 2)
            d.qpos[joint:joint + 3] = (*place, rng.uniform(0.5, 1.6))
            quat = rng.normal(size=4)
            d.qpos[joint + 3:joint + 7] = quat / np.linalg.norm(quat)
        self.look((0, 0, 0.1), 5.1, -40, 90)
        return 0, np.zeros((n, 0))

    def step_hook(self, rng, t):
        """A kick now and then: friction would stop everything."""
        if t % 8 == 0:
            for b in self.chosen:
                self.data.qvel[6 * b:6 * b + 2] = rng.uniform(-3, 3, 2)


def scene_class(kind):
    """"objects" or module:Class -> a subclass of Scene.  SystemExit: there is none."""
    if kind in MOVED_SCENES:
        raise SystemExit(f"the scene {kind} has moved to studies: type {MOVED_SCENES[kind]}")
    module, _, name = kind.partition(":")
    try:
        return Objects if kind == "objects" else getattr(importlib.import_module(module), name)
    except (ImportError, AttributeError, ValueError) as e:
        raise SystemExit(f"no scene {kind!r} ({e}): expected objects, or module:Class with a "
                         "subclass of data.Scene, as studies.scenes:Pushed") from None


def save_part(path, scene, recipe, clips, **more):
    """Clips (dicts of equal arrays) of a scene as one HDF5 file, written whole or not at all."""
    import h5py
    meta = {"version": VIDEO_VERSION, "recipe": recipe, "part_names": scene.part_names,
            "groups": scene.groups, "action_names": scene.action_names,
            "task_names": scene.task_names or (recipe["kind"],), "mujoco": scene.mj.__version__,
            "gl": os.environ.get("MUJOCO_GL"), "fps": scene.fps, "source": "procedural", **more}
    memory = io.BytesIO()
    with h5py.File(memory, "w") as f:
        for name in clips[0]:
            x = np.stack([c[name] for c in clips])
            big = dict(chunks=(1, *x.shape[1:]), compression="gzip", compression_opts=4)
            f.create_dataset(name, data=x, **(big if x.ndim > 2 and x.size else {}))
        f.attrs["meta"] = json.dumps(meta)
    _write_atomic(path, lambda f: f.write(memory.getvalue()))


def _part_meta(path, recipe=None):
    """The description in one file of a cache, checked against what is wanted."""
    import h5py
    try:
        with h5py.File(path, "r") as f:
            meta = json.loads(f.attrs["meta"])
    except (OSError, KeyError, ValueError) as e:
        raise SystemExit(f"{path} is damaged or no part of a video cache ({e}): delete that "
                         "file") from None
    if meta["version"] != VIDEO_VERSION:
        raise SystemExit(f"{path} was written by version {meta['version']} of the generator, this "
                         f"data.py has version {VIDEO_VERSION}: delete {Path(path).parent} to "
                         "render it again, or choose another --cache")
    if recipe and meta["recipe"] != recipe:
        raise SystemExit(f"{path} holds {meta['recipe']}, not {recipe}: choose another --cache")
    return meta


def fill_cache(folder, recipe, job, parts, workers):
    """job(path, recipe, *args) for every file that is missing of parts = {name: (clips, args)}.
    SystemExit: no OpenGL, foreign files, full disk."""
    from tqdm import tqdm

    from envs import choose_gl
    folder = Path(folder)
    todo = {name: (folder / name, recipe, *args) for name, (_, args) in parts.items()
            if not (folder / name).exists()}
    for name in parts.keys() - todo:
        _part_meta(folder / name, recipe)
    if not todo:
        return
    choose_gl()
    with _full_disk(folder):
        folder.mkdir(parents=True, exist_ok=True)
    total, left = (sum(parts[name][0] for name in names) for names in (parts, todo))
    with tqdm(total=total, initial=total - left, unit="clip", desc="render") as bar:
        for name in side_by_side(job, todo, workers):
            bar.update(parts[name][0])


def _render_part(path, recipe, kind, a, b):
    scene = scene_class(kind)(recipe["color"], recipe["floor"])
    scene.open(recipe["size"])
    clips = []
    for clip in range(a, b):              # depends on its number alone, not on where a job began
        rng = np.random.default_rng([recipe["seed"], clip])
        film = scene.film(rng, clip, recipe["frames"])
        clips.append({**film, "split": np.uint8(scene.split_of(clip))})
    scene.renderer.close()
    save_part(path, scene, recipe, clips)


def make_video(folder, kind, clips, frames, size=64, color="parts", floor="plain", seed=0,
               workers=1):
    """Film `clips` clips of a scene into folder/part_*.h5; killed at any moment, the same call goes
    on.

    What open_video then returns, N clips: video u8 (N,T,H,W,3); seg u8 (N,T,H,W), 0 = background;
    inst, the same per body (crowd); flow f16 (N,T,H,W,2), (dx,dy) pixels back to frame t-1; actions
    f32 (N,T,m), actions[t] was active until frame t; state f32 (N,T,n), positions of bodies; task,
    split (N,); fork_frame u8 (N,H,W,3), fork_actions (N,FORK_STEPS,m), fork_group (N,): frame T//2
    + FORK_STEPS, had the actions of one group been others since T//2 (-1: not filmed). SystemExit:
    no such scene, no OpenGL, a cache of another version or recipe, full disk."""
    recipe = dict(kind=scene_class(kind).kind or kind, frames=frames, size=size, color=color,
                  floor=floor, seed=seed)
    ends = [min(a + PART_CLIPS, clips) for a in range(0, clips, PART_CLIPS)]
    parts = {f"part_{a:06d}_{b:06d}.h5": (b - a, (kind, a, b)) for a, b in zip([0, *ends], ends)}
    fill_cache(folder, recipe, _render_part, parts, workers)


def open_video(folder, splits=(0, 1, 2)):
    """({name: array}, meta) of a cache, see make_video; all clips of the given splits. SystemExit:
    no cache, damaged files, files of several recipes."""
    import h5py
    files = sorted(Path(folder).glob("part_*.h5"))
    if not files:
        raise SystemExit(f"no part_*.h5 in {folder}: make them with "
                         'data.make_video(folder, "objects", 500, 12)')
    meta, parts = _part_meta(files[0]), []
    for file in files:
        _part_meta(file, meta["recipe"])
        with h5py.File(file, "r") as f:
            keep = np.flatnonzero(np.isin(f["split"][:], splits))
            parts.append({k: f[k][:][keep] for k in f})
    return {k: np.concatenate([p[k] for p in parts]) for k in parts[0]}, meta


# -------------------------------------------------------------------- flags, devices, processes
def parse(Args, doc, moved=()):
    """Command line -> Args, by tyro.  moved: {old words: new command}; old words are one flag or a
    flag with its value ("--task ball-wall").  SystemExit: wrong flags, or the new command."""
    import tyro
    words = [w for word in sys.argv[1:] for w in word.split("=", 1)]
    for old in [f"{a} {b}" for a, b in zip(words, words[1:])] + words:
        if old in moved:
            raise SystemExit(f"{old} has moved: type {moved[old]}")
    return tyro.cli(Args, description=doc)


def flag(name):
    """The name of a field as it is typed: batch_size -> --batch-size."""
    return "--" + name.replace("_", "-")


def _changed(args):
    """{name: value} of the flags that are not at their default."""
    default = {f.name: f.default if f.default_factory is MISSING else f.default_factory()
               for f in fields(args)}
    return {k: getattr(args, k) for k, x in default.items() if getattr(args, k) != x}


def refuse(args, names, because):
    """SystemExit: one of the flags `names` (with blanks between) is not at its default."""
    for name, x in _changed(args).items():
        if name in names.split():
            raise SystemExit(f"{flag(name)} {x}: {because}; leave it out")


def check_ranges(args, ranges):
    """SystemExit: a flag, if not None, is outside of {name: (lowest or None, highest or None)}."""
    for name, (low, high) in ranges.items():
        x = getattr(args, name)
        fits = (low is None or x is None or x >= low) and (high is None or x is None or x <= high)
        if not fits:
            wanted = f"at least {low}" if high is None else f"at most {high}"
            wanted = wanted if None in (low, high) else f"{low} to {high}"
            raise SystemExit(f"{flag(name)} {x} is out of range: expected {wanted}")


RESUME_MAY_CHANGE = ("resume", "workers", "save_every", "capture_video", "track", "device")


def _began(folder):
    """args.json of a run: {task, script, seed, args, command}.  SystemExit: there is none."""
    try:
        meta = json.loads((Path(folder) / "args.json").read_text())
        meta["script"], meta["task"], meta["args"].items()
        return meta
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        raise SystemExit(f"--resume {folder}: no readable args.json; expected runs/<name>, the "
                         "folder of a run") from None


def resumed(args):
    """args, or with --resume those of the run in that folder; RESUME_MAY_CHANGE typed beside it
    count.  SystemExit: no run there, one of another version, or another flag typed beside it."""
    if not args.resume:
        return args
    saved, here = _began(args.resume)["args"], f"--resume {args.resume}"
    saved = {k: tuple(v) if isinstance(v, list) else v for k, v in saved.items()}
    if strange := sorted(set(saved) - {f.name for f in fields(args)}):
        raise SystemExit(f"{here}: its flag {flag(strange[0])} is unknown here, so another version "
                         "of this script began it: go on with the copy of the code in its folder")
    change = {k: v for k, v in _changed(args).items() if v != saved.get(k)}
    for name in set(change) - set(RESUME_MAY_CHANGE):
        raise SystemExit(f"{here} goes on with its own flags, and there {flag(name)} is "
                         f"{saved.get(name)}, not {change[name]}: leave {flag(name)} out")
    return type(args)(**{**saved, **change, "resume": args.resume})


def choose_device(name):
    """"auto", "cpu" or "cuda" -> (torch.device, what it is).  SystemExit: no GPU."""
    if name == "cuda" and not torch.cuda.is_available():
        raise SystemExit("--device cuda, but PyTorch sees no GPU: install its CUDA build or "
                         "--device cpu")
    if name == "cpu" or not torch.cuda.is_available():
        quick_cpu()
        return torch.device("cpu"), f"cpu: {torch.get_num_threads()} threads"
    local = int(os.environ.get("LOCAL_RANK", "0"))
    device = torch.device("cuda", local % torch.cuda.device_count())
    torch.cuda.set_device(device)
    torch.set_float32_matmul_precision("high")                               # TF32
    return device, f"cuda: {torch.cuda.get_device_name(device)}, TF32"


def quick_cpu():
    """Let glibc keep freed memory, and take the faster of the CPU's float32 matrix products.

    That is "medium" on many CPUs; where it would round to bfloat16, a product shows it."""
    with suppress(AttributeError, OSError):                                  # no glibc
        for option, value in ((-4, 0), (-1, 2**31 - 1), (-2, 2**28)):  # mmap_max, trim, top_pad
            ctypes.CDLL(None).mallopt(option, value)
    a, b = torch.linspace(0, 9, 2 * 64 * 512).sin().view(2, 64, 512)
    torch.set_float32_matmul_precision("medium")
    if ((a @ b.T).double() - a.double() @ b.double().T).abs().max() > 0.05:
        torch.set_float32_matmul_precision("highest")


def join_ranks(device):
    """(rank, number of ranks) as torchrun says; with more than one they can talk afterwards."""
    rank, world = int(os.environ.get("RANK", "0")), int(os.environ.get("WORLD_SIZE", "1"))
    if world > 1 and not torch.distributed.is_initialized():
        kind = "nccl" if device.type == "cuda" else "gloo"
        torch.distributed.init_process_group(kind, timeout=timedelta(days=2))
    return rank, world


def hardware(device):
    """What computed, for a table of results."""
    if torch.device(device).type == "cuda":
        return torch.cuda.get_device_name(device)
    return f"{torch.get_num_threads()} CPU threads"


def command_line(words=None):
    """How this program was called, to be typed again, or how it is with other words."""
    file = Path(sys.argv[0])
    name = f"-m studies.{file.stem}" if file.parent.name == "studies" else file.name
    words = sys.argv[1:] if words is None else words
    return " ".join(["python", name, *(shlex.quote(str(x)) for x in words)])


# --------------------------------------------------------------------------------- run folder
def _check_plain(x, where="state"):
    """Bytes of the tensors in x; refuses what torch.load(weights_only=True) would."""
    if type(x) in (dict, OrderedDict):
        return sum(_check_plain(k, f"a key of {where}") + _check_plain(v, f"{where}[{k!r}]")
                   for k, v in x.items())
    if type(x) in (list, tuple):
        return sum(_check_plain(v, f"{where}[{i}]") for i, v in enumerate(x))
    if type(x) in (torch.Tensor, torch.nn.Parameter):
        return x.nbytes
    if type(x) in (int, float, bool, str, type(None)):
        return 0
    raise SystemExit(f"{where} is a {type(x).__module__}.{type(x).__name__}; checkpoints hold "
                     "tensors, numbers, strings, None, dict, list and tuple: convert it first")


def _state_of(part):
    if isinstance(part, dict):
        return dict(part)
    return part.get_state() if isinstance(part, torch.Generator) else part.state_dict()


def _bring_back(part, state):
    if isinstance(part, dict):
        here = {k: x.device for k, x in part.items() if torch.is_tensor(x)}
        part.update({k: x.to(here[k]) if k in here else x for k, x in state.items()})
    elif isinstance(part, torch.Generator):
        try:
            part.set_state(state)
        except RuntimeError:                       # of a CPU and of CUDA: go on from a seed
            part.manual_seed(int.from_bytes(hashlib.sha256(bytes(state.tolist())).digest()[:7]))
            print("the checkpoint is of another kind of device: random numbers go on from a seed "
                  "of its own, so that results will differ from those of one device")
    else:
        part.load_state_dict(state)


def _new_folder(root, script, args):
    """runs/{task}__{script}__{seed}__{time}/ with args.json and a copy of the code."""
    names, stamp = str(args.task).split(","), int(time.time())
    short = ",".join(names) if len(",".join(names)) <= 60 else f"{names[0][:50]}+{len(names) - 1}"
    short = quote(short, safe=", +")
    with _full_disk(root):
        while (folder := Path(root) / f"{short}__{script}__{args.seed}__{stamp}").exists():
            stamp += 1                             # two starts within one second
        folder.mkdir(parents=True)
    write_json(folder / "args.json", dict(task=str(args.task), script=script, seed=args.seed,
                                          args=asdict(args), command=sys.argv))
    here, main = Path(__file__).parent, getattr(sys.modules["__main__"], "__file__", None)
    for file in (main, here / "envs.py", here / "data.py"):
        if file and Path(file).is_file():          # main is None in a notebook
            shutil.copy(file, folder)
    return folder


def _origin(args):
    """What a table of results says about where it comes from."""
    git = ["git", "-C", Path(__file__).parent, "rev-parse", "--short", "HEAD"]
    git = subprocess.run(git, capture_output=True, text=True)  # may be a copy outside of one
    cpu = getattr(args, "device", "cpu") == "cpu" or not torch.cuda.is_available()
    return dict(command=command_line(), commit=git.stdout.strip() or None, seed=args.seed,
                hardware=hardware("cpu" if cpu else "cuda"), args=asdict(args))


@contextmanager
def _interrupts(run):
    """Ctrl-C and SIGTERM wait for the end of a step on rank 0; a second one does not."""
    def stop(*_):
        run._stop = True
        restore()
        os.write(2, b"stopping after this step; once more: at once\n")  # print may be at work

    def restore():
        for s, handler in old.items():
            signal.signal(s, handler)

    if threading.current_thread() is not threading.main_thread():
        yield
        return
    mine = signal.SIG_IGN if run.rank else stop    # torchrun ends the others
    old = {s: signal.signal(s, mine) for s in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield
    finally:
        restore()


class Run:
    """A folder runs/{task}__{script}__{seed}__{time}/ and what a training loop must not forget:
    where a resumed run goes on, checkpoints by the clock and at Ctrl-C, rates and time left,
    numbers that are not finite, logs.

        run = Run("pwm", args)                        # or the folder in args.resume
        run.keeps(wm=wm, opt=opt, rng=generator)      # in a checkpoint; brought back when resumed
        run.expects(play=4, model=4000)               # all pieces to come, to tell the time left
        for r in run.rounds(4):
            for _ in run.once("play"): ..             # a stage of one piece
            for step in run.steps("model", 1000):     # a stage of many
                ..
                run.note(loss=loss.detach())          # read, checked, told every log_every steps
        run.finish(dict(table=..))                    # results.json

    A resumed program makes the same calls; rounds, stages and steps that were done are skipped,
    what stands between the stages of an unfinished round runs again.  Other ranks of torchrun
    iterate alike and write nothing.  inside: the folder of one training of a comparison: silent,
    goes on when there is a checkpoint, answers Ctrl-C by KeyboardInterrupt once it has saved.
    Attributes: dir (Path), step (of all `steps` so far), seconds (over all resumes), history (list
    of dicts that survive). SystemExit: no such run, another script's or task's; numbers that are
    not finite; Ctrl-C."""

    def __init__(self, script, args, root="runs", log_every=50, inside=None):
        self.rank, self.world = (int(os.environ.get(*x)) for x in (("RANK", 0), ("WORLD_SIZE", 1)))
        self.args, self.log_every, self._inside = args, log_every, inside is not None
        self.save_every, self._saved = getattr(args, "save_every", 60.0), time.time()
        self.step, self.seconds, self.history = 0, 0.0, []
        self.parts, self.facts, self.total, self.done, self.spent = {}, {}, {}, {}, {}
        self._round, self._stage, self._start = 0, -1, (0, 0, 0)  # round, stage, step to do next
        self._metrics, self._stop, self._printed = {}, False, time.time()
        self._writer, self._purge, self._lines = None, None, None
        if args.resume and not inside:
            meta = _began(args.resume)
            if (meta["script"], meta["task"]) != (script, str(args.task)):
                raise SystemExit(f"{args.resume} is a run of {meta['script']} on {meta['task']!r}, "
                                 f"not of {script} on {args.task!r}: resume it with these")
        folder = inside or args.resume
        if self.rank == 0 and not folder:
            folder = _new_folder(root, script, args)
        box = [str(folder)]
        if self.world > 1:
            torch.distributed.broadcast_object_list(box)
        self.dir = Path(box[0])
        self.dir.mkdir(parents=True, exist_ok=True)
        self._resumes = (self.dir / "checkpoint.pt").exists() if inside else bool(args.resume)
        if self.rank == 0:
            how = os.O_RDWR | os.O_CREAT | os.O_APPEND
            self._lines = os.open(self.dir / "metrics.jsonl", how, 0o644)
        if self.rank == 0 and getattr(args, "track", False) and not inside:
            import wandb
            wandb.init(project=script, name=self.dir.name, config=asdict(args),
                       sync_tensorboard=True)

    # ---- what a checkpoint holds
    def keeps(self, facts=None, **parts):
        """Name the parts of a checkpoint: modules, optimisers, generators, dicts of tensors and
        plain values, anything with state_dict and load_state_dict; None is left out.  facts: plain
        values beside them.  A resumed run loads them now and cuts metrics.jsonl back. SystemExit:
        no checkpoint, a damaged one, or one that does not fit."""
        self.parts, self.facts = {k: v for k, v in parts.items() if v is not None}, facts or {}
        if not self._resumes:
            return
        state = self.load()
        for name, part in self.parts.items():
            try:
                _bring_back(part, state[name])
            except (RuntimeError, KeyError, ValueError, TypeError) as e:
                raise SystemExit(f"{name!r} of the checkpoint is missing or does not fit "
                                 f"({' '.join(str(e).split())[:200]}): go on with the copy of the "
                                 "code in its folder") from None
        where = state["_run"]
        self.step, self.seconds, self.done = where["step"], where["seconds"], where["done"]
        self.history, self._start, self._saved = where["history"], tuple(where["at"]), time.time()
        if self.rank == 0:
            os.ftruncate(self._lines, min(where["bytes"], os.fstat(self._lines).st_size))
            lines = (self.dir / "metrics.jsonl").read_bytes().splitlines()
            self._purge = json.loads(lines[-1])["step"] + 1 if lines else 0  # hides later curves

    def load(self, name="checkpoint.pt"):
        """What save() wrote, on the CPU.  SystemExit: missing or damaged file."""
        path = self.dir / name
        if not path.exists():
            raise SystemExit(f"no {path}: it ended before its first checkpoint; start it again "
                             "without --resume")
        try:
            state = torch.load(path, map_location="cpu", weights_only=True)
            state["_run"]["bytes"]
            return state
        except Exception as e:                     # a damaged file can raise almost anything
            raise SystemExit(f"{path} is damaged ({type(e).__name__}): restore it, or start "
                             "without --resume") from e

    def save(self, name="checkpoint.pt"):
        """Write all parts; atomic: a crash or a full disk leaves the old file as it was.
        SystemExit: the last metrics are not finite; no room."""
        self._read()
        self.seconds, self._saved = self.seconds + time.time() - self._saved, time.time()
        if self.rank:
            return
        state = {**self.facts, **{k: _state_of(part) for k, part in self.parts.items()}}
        state["_run"] = dict(at=list(self._start), step=self.step, seconds=self.seconds,
                             history=self.history, done=self.done,
                             bytes=os.fstat(self._lines).st_size)
        _check_room(self.dir, _check_plain(state), f"the checkpoint {name}")
        try:
            save_torch(self.dir / name, state)
        except RuntimeError as e:                  # how torch reports a failed write
            raise SystemExit(f"cannot write {self.dir / name} ({e}); the older file, if any, is as "
                             f"it was: free some space and type --resume {self.dir}") from e

    # ---- where the work is
    def expects(self, **total):
        """How many pieces of every kind of stage there will be in all."""
        self.total = total

    def rounds(self, n):
        """0 .. n-1, from the round that is not done."""
        for r in range(self._start[0], n):
            self._round, self._stage = r, -1
            yield r
            self._start = max(self._start, (r + 1, 0, 0))

    def once(self, kind, pieces=1):
        """One iteration, or none if it was done; `pieces` is what it counts for in expects()."""
        yield from self._work(kind, 1, pieces, 0, False)

    def steps(self, kind, n, log_every=None, shared=False):
        """Steps 0 .. n-1 of a stage, from the one that is not done.  shared: all ranks take part,
        and metrics are their means."""
        yield from self._work(kind, n, 1, log_every or self.log_every, shared)

    def _work(self, kind, n, pieces, log_every, shared):
        self._stage += 1
        here = self._round, self._stage
        if here < self._start[:2]:
            return
        first = self._start[2] if here == self._start[:2] else 0
        self._metrics, self._began, self._counted = {}, time.time(), 0
        with _interrupts(self):
            for step in range(first, n):
                yield step
                self._counted += pieces
                self.step += bool(log_every)
                self.done[kind] = self.done.get(kind, 0) + pieces
                self._start = (*here, step + 1) if step + 1 < n else (here[0], here[1] + 1, 0)
                late = self._stop or time.time() - self._saved > self.save_every
                told = log_every and ((step + 1) % log_every == 0 or step + 1 == n)
                if late or told or step + 1 == n:
                    self._pause(kind, step + 1, n, late, told, shared)

    def _pause(self, kind, step, n, late, told, shared):
        """Between two steps: the only place in training that waits for a GPU."""
        stop, numbers = self._stop, self._read(shared and told)
        have = self.spent.get(kind, (0, 0.0))
        self.spent[kind] = have[0] + self._counted, have[1] + time.time() - self._began
        if told:
            self.log({f"losses/{kind}/{k}": x for k, x in numbers.items()}
                     | {"charts/UPS": self.rate(kind)})
            shown = "".join(f", {k} {x:.3g}" for k, x in numbers.items())
            self.say(f"round {self._round}: {kind} {step}/{n}, {self.rate(kind):.1f}/s{shown}",
                     step == n)
        if stop or late or step == n:
            self.save()
        self._began, self._counted = time.time(), 0
        if stop:                                   # a signal since then waits for the next step
            self.close()
            if self._inside:
                raise KeyboardInterrupt
            raise SystemExit(f"stopped; go on with: {command_line(['--resume', self.dir])}")

    # ---- numbers
    def note(self, metrics=None, **more):
        """The metrics of this step: numbers or 0-d tensors, which stay where they are until
        read."""
        self._metrics = {**(metrics or {}), **more}

    def _read(self, shared=False):
        """The noted metrics as floats.  SystemExit: they are not finite."""
        if not self._metrics:
            return {}
        values = [torch.as_tensor(x).detach().float() for x in self._metrics.values()]
        device = next((x.device for x in values if x.is_cuda), "cpu")
        values = torch.stack([x.to(device) for x in values])
        if shared and self.world > 1:
            torch.distributed.all_reduce(values)
            values /= self.world
        if not values.isfinite().all():
            raise SystemExit(f"step {self.step}, round {self._round}, is not finite: "
                             f"{dict(zip(self._metrics, values.tolist()))}; the last good "
                             f"checkpoint is in {self.dir}: take a smaller learning rate")
        return dict(zip(self._metrics, values.tolist()))

    def rate(self, kind):
        """Pieces of a kind of stage per second, in this process."""
        pieces, seconds = self.spent.get(kind, (0, 0.0))
        return pieces / max(seconds, 1e-9)

    def time_left(self):
        """Seconds, or None while a kind of stage that is to come has not been seen at work."""
        todo = {k: n - self.done.get(k, 0) for k, n in self.total.items()}
        todo = {k: n for k, n in todo.items() if n > 0}
        return sum(n / self.rate(k) for k, n in todo.items()) if all(map(self.rate, todo)) else None

    def say(self, text, force=True, every=15.0):
        """Print a line and the time left; without `force` if the last is `every` seconds old."""
        if self.rank == 0 and not self._inside and (force or time.time() - self._printed > every):
            self._printed, left = time.time(), self.time_left()
            left = f" | {timedelta(seconds=round(left))} left" if left else ""
            print(text + left, flush=True)

    def log(self, numbers, step=None):
        """{tag: float or 0-d tensor} as one line of metrics.jsonl and points of TensorBoard."""
        if self.rank:
            return
        if self._writer is None and not self._inside:  # late: slow, and keeps() may cut curves
            from torch.utils.tensorboard import SummaryWriter
            self._writer = SummaryWriter(self.dir, purge_step=self._purge)
        numbers = {tag: float(x) for tag, x in numbers.items()}
        step = self.step if step is None else int(step)
        line = json.dumps({"step": step, "time": time.time(), **numbers}) + "\n"
        with _full_disk(self.dir):
            os.write(self._lines, line.encode())
            for tag, x in numbers.items() if self._writer else ():
                self._writer.add_scalar(tag, x, step)

    def finish(self, result):
        """Write results.json: command, commit, hardware, seconds, flags and `result`; say where the
        files are.  Returns what it holds (None on other ranks)."""
        self.close()
        if self.world > 1:
            torch.distributed.destroy_process_group()  # its threads would abort an ending process
        if self.rank:
            return None
        seconds = round(self.seconds + time.time() - self._saved, 1)
        result = {**_origin(self.args), "seconds": seconds, "folder": str(self.dir), **result}
        write_json(self.dir / "results.json", result)
        kinds = (".json", ".jsonl", ".csv", ".png", ".gif", ".mp4", ".pt")
        names = sorted(p.name for p in self.dir.iterdir() if p.suffix in kinds)
        print(f"files: {self.dir}/", *names)
        return result

    def close(self):
        """Flush and close the logs."""
        if self._lines is not None:
            os.close(self._lines)
        if self._writer is not None:
            self._writer.close()
        self._lines = self._writer = None


def side_by_side(job, todo, workers):
    """Call job(*args) for all of todo = {key: args} and give each key when its call has ended.

    workers > 1: in so many processes of one thread; `job` must be a function of a module."""
    from concurrent.futures import ProcessPoolExecutor, as_completed
    from multiprocessing import get_context
    workers = min(workers, len(todo))
    if workers < 2:
        for key, args in todo.items():
            job(*args)
            yield key
        return
    with ProcessPoolExecutor(workers, get_context("spawn"), torch.set_num_threads, (1,)) as pool:
        jobs = {pool.submit(job, *args): key for key, args in todo.items()}
        try:
            for one in as_completed(jobs):
                one.result()
                yield jobs[one]
        finally:
            pool.shutdown(cancel_futures=True)     # an error does not wait for hours of other cells


def _cell(work, name, cell, folder, file):
    began = time.time()
    result = {**work(name, cell, folder), "cell": name}
    result.setdefault("seconds", round(time.time() - began, 1))
    write_json(file, result)


def run_cells(work, cells, folder, workers=1, tell=None):
    """{name: result} of work(name, cell, folder) for cells {name: cell}, trainings to compare.

    Results, plain dicts, are kept in folder/cells/<name>.json, and a cell that is there is not run
    again, so that a study that was killed goes on.  workers: see side_by_side.
    tell(result) -> words for the line that is printed when a cell has ended."""
    files = {name: Path(folder) / "cells" / f"{quote(name, safe=' ,+')}.json" for name in cells}
    (Path(folder) / "cells").mkdir(parents=True, exist_ok=True)
    todo = [name for name, file in files.items() if not file.exists()]
    jobs = {name: (work, name, cells[name], folder, files[name]) for name in todo}
    began = time.time()
    for i, name in enumerate(side_by_side(_cell, jobs, workers), 1):
        left = (time.time() - began) / i * (len(todo) - i)
        result = json.loads(files[name].read_text())
        words = f", {tell(result)}" if tell else ""
        print(f"{i}/{len(todo)} {name}: {result['seconds']:.0f} s{words}"
              f" | {timedelta(seconds=round(left))} left", flush=True)
    return {name: json.loads(file.read_text()) for name, file in files.items()}


# ------------------------------------------------------------------------------------- statistics
def _scores(x):
    x = np.asarray(x, float)
    if x.size == 0 or not np.isfinite(x).all():
        raise SystemExit(f"statistics of {x.shape} scores with {int((~np.isfinite(x)).sum())} NaN "
                         "or inf: expected finite numbers; leave failed runs out")
    return x


def iqm(x):
    """Interquartile mean of all entries, float: int(n/4) are dropped at either end."""
    x = np.sort(_scores(x), axis=None)
    cut = x.size // 4
    return float(x[cut:x.size - cut].mean())


def bootstrap_ci(x, stat=iqm, reps=2000, level=0.95, seed=0):
    """(low, high) percentile interval of stat(x), x (runs, tasks): runs are redrawn within each
    task. One run gives low == high == stat(x), which is no interval; report "1 seed"."""
    x = _scores(x)
    if x.ndim != 2:
        raise SystemExit(f"bootstrap_ci got scores of shape {x.shape}; expected (runs, tasks)")
    rng = np.random.default_rng(seed)
    draws = [stat(np.take_along_axis(x, rng.integers(len(x), size=x.shape), 0))
             for _ in range(reps)]
    low, high = np.quantile(draws, [(1 - level) / 2, (1 + level) / 2])
    return float(low), float(high)

from studies import mocapact, scenes
from t_head import *  # noqa: F401,F403

PUSHED, HUMANOID = "studies.scenes:Pushed", "studies.scenes:Humanoid"


# ------------------------------------------------------------------------------------------ scenes
def test_scenes_pushed_actions_move_their_own_object(tmp_path):
    data.make_video(tmp_path, PUSHED, 20, 12, 32)
    x, meta = data.open_video(tmp_path)
    assert x["video"].shape == (20, 12, 32, 32, 3) and x["actions"].shape == (20, 12, 6)
    assert meta["groups"] == [[0, 1], [2, 3], [4, 5]] and meta["recipe"]["kind"] == "pushed"
    assert meta["part_names"] == ["sphere", "box", "cylinder"] and meta["fps"] == 12
    speed = np.diff(x["state"], axis=1)[:, 1:].reshape(-1, 3, 3)  # (samples, object, xyz)
    act = x["actions"][:, 2:].reshape(-1, 3, 2)
    c = np.abs(np.corrcoef(act[:, :, 0].T, speed[:, :, 0].T)[:3, 3:])
    assert (np.diag(c) > 0.25).all() and c.argmax(1).tolist() == [0, 1, 2]
    # the branch differs where the object of its group is or would have been
    frame = x["video"][:, 6 + data.FORK_STEPS].astype(int)
    now, seg = np.abs(frame - x["fork_frame"]).max(-1) > 12, x["seg"][:, 6 + data.FORK_STEPS]
    moved = [s[n & (s > 0)] for s, n in zip(seg, now)]
    own = np.mean([(m == g + 1).mean() for m, g in zip(moved, x["fork_group"]) if len(m)])
    assert own > 0.6 and np.median(now.mean((1, 2))) > 0.01


def test_scenes_humanoid_masks_flow_and_actions(tmp_path):
    data.make_video(tmp_path, HUMANOID, 10, 12, 64, "parts")
    x, meta = data.open_video(tmp_path)
    assert [len(g) for g in meta["groups"]] == [18, 12, 12, 7, 7]
    assert x["actions"].shape == (10, 12, 56)
    assert sorted(sum(meta["groups"], [])) == list(range(56)) and np.abs(x["actions"]).max() <= 1
    assert meta["action_names"][meta["groups"][1][0]].startswith("l") and x["seg"].max() == 5
    seen = np.stack([(x["seg"] == p).any((2, 3)) for p in range(1, 6)])
    assert seen.mean() > 0.9 and 0.05 < (x["seg"] > 0).mean() < 0.25
    flow, fg = x["flow"].astype(float), x["seg"] > 0
    assert np.abs(flow[~fg]).max() < 1e-4  # neither camera nor floor moves
    family = {meta["task_names"][t]: i for i, t in enumerate(x["task"])}
    size = np.linalg.norm(flow, axis=-1)
    wave, part = size[family["wave"]], x["seg"][family["wave"]]
    assert wave[part == 3].mean() > 3 * wave[part == 5].mean()  # the right arm waves
    # warping the masks of frame t-1 along the flow explains frame t better than leaving them
    c, t, i, j = np.nonzero(fg[:, 1:] & (size[:, 1:] > 1))
    step = flow[c, t + 1, i, j].round().astype(int)
    there = np.clip(i + step[:, 1], 0, 63), np.clip(j + step[:, 0], 0, 63)
    warped, still = x["seg"][c, t, there[0], there[1]], x["seg"][c, t, i, j]
    true = x["seg"][c, t + 1, i, j]
    assert len(c) > 300 and (warped == true).mean() > (still == true).mean() + 0.1
    splits = {meta["task_names"][t]: int(s) for t, s in zip(x["task"], x["split"])}
    assert splits["kick"] == splits["jumping-jack"] == 1
    assert splits["torso"] == 2 and splits["walk"] == 0


def test_scenes_crowd_has_bodies_and_parts():
    choose_gl()
    scene = scenes.Crowd("random", "plain")
    scene.open(32)
    clips = [scene.film(np.random.default_rng([0, c]), c, 2) for c in range(4)]
    scene.renderer.close()
    assert {len(np.unique(c["inst"])) - 1 for c in clips} == {2, 3}
    assert all(((c["inst"] > 0) == (c["seg"] > 0)).all() for c in clips)
    assert [len(g) for g in scene.groups] == [56] * 3


def test_scenes_fast(tmp_path):
    result = scenes.main(scenes.Args(file=str(tmp_path / "x.png"), fast=True))
    assert result == {"objects": 0, "pushed": 6, "humanoid": 56, "crowd": 168}
    assert imageio.imread(tmp_path / "x.png").shape == (8 * 32, 2 * 32, 3)


# ----------------------------------------------------------------------------- caches of any scene
def test_scenes_cache_is_the_same_wherever_it_stopped_and_goes_on(tmp_path):
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
    data.make_video(tmp_path / "a", "objects", 60, 4, 32, workers=2)
    whole, meta = data.open_video(tmp_path / "a")
    assert len(whole["video"]) == 60 and files[0].stat().st_mtime_ns == stamp
    assert all((whole[k][:len(part["video"])] == part[k]).all() for k in part)
    scene = data.Objects("parts", "plain")
    scene.open(32)
    scene.film(np.random.default_rng(9), 9, 3)  # another history of the simulator
    again = scene.film(np.random.default_rng([0, 47]), 47, 4)
    scene.renderer.close()
    assert all((again[k] == whole[k][47]).all() for k in ("video", "seg", "flow", "state"))
    assert np.bincount(whole["split"]).tolist() == [42, 12, 6] and meta["mujoco"] and meta["gl"]


def test_scenes_bad_kinds_and_caches_are_one_sentence(tmp_path, monkeypatch):
    with says("no part_*.h5", "make_video"):
        data.open_video(tmp_path)
    for kind, words in (("x", "no scene 'x'"), ("studies.scenes:Nothing", "no scene"),
                        ("pushed", PUSHED), ("humanoid", HUMANOID),
                        ("crowd", "studies.scenes:Crowd"), ("mocapact", "studies.mocapact")):
        with says(words):
            data.make_video(tmp_path, kind, 20, 12)
    file = tmp_path / "part_000000_000020.h5"
    scene, clips = data.Objects("parts", "plain"), [{"split": np.uint8(0)}]
    data.save_part(file, scene, {"kind": "pushed"}, clips, version=data.VIDEO_VERSION - 1)
    with says("version 0", f"version {data.VIDEO_VERSION}", "delete"):
        data.make_video(tmp_path, "objects", 20, 12)
    data.save_part(file, scene, {"kind": "pushed"}, clips)
    with says("holds {'kind': 'pushed'}", "--cache"):
        data.make_video(tmp_path, "objects", 20, 12)
    file.write_bytes(b"half a file")
    with says("damaged", "delete that file"):
        data.make_video(tmp_path, "objects", 20, 12)
    file.unlink()
    monkeypatch.delenv("MUJOCO_GL")
    monkeypatch.setattr(envs.subprocess, "run", lambda *a, **k: subprocess.CompletedProcess(a, 1))
    with says("OpenGL", "libegl1"):
        data.make_video(tmp_path, "objects", 20, 12)


# ---------------------------------------------------------------------------------------- MoCapAct
def test_mocapact_poses_come_back_and_are_rendered(tmp_path, capsys):
    m = mocapact.Posed("default", "plain").model
    qpos = mocapact.made_up(tmp_path / "CMU_007_01.hdf5", m)
    indices, [(proprio, _)] = mocapact.read_rollouts(tmp_path / "CMU_007_01.hdf5", 1)
    back = mocapact.mocapact_qpos(proprio, indices, mocapact.joints_of(m), m)
    sign = np.sign((back[:, 3:7] * qpos[:, 3:7]).sum(1, keepdims=True))
    assert np.abs(back[:, 7:] - qpos[:, 7:]).max() < 1e-6
    assert np.abs(back[:, 3:7] * sign - qpos[:, 3:7]).max() < 1e-6
    args = mocapact.Args(str(tmp_path), str(tmp_path / "out"), frames=4, size=32)
    for _ in range(2):  # the second time nothing is left to do
        assert mocapact.main(args)["splits"]["train"] == 1
    x, meta = data.open_video(tmp_path / "out")
    assert "MoCapAct" in meta["source"] and meta["fps"] == 16
    assert x["video"].shape == (3, 4, 32, 32, 3)
    # frames 1, 3, 5, .. of the roll-out; the action of a frame is the one that led to it
    assert x["actions"][:, :, 0].ravel().tolist() == [i - 1 for i in range(1, 24, 2)]
    assert (x["seg"] > 0).mean() > 0.02 and len(np.unique(x["seg"])) >= 4
    assert "3 clips of 4 frames" in capsys.readouterr().out
    fast = mocapact.main(mocapact.Args(fast=True))
    assert fast["clips"] == 2 and not Path(fast["folder"]).exists()


def test_mocapact_splits_by_subject():
    names = [f"CMU_{s:03d}_{t:02d}" for s in range(60) for t in range(1, 2 + s % 7)]
    splits = mocapact.mocapact_splits(names)
    assert set(splits) == set(names) and splits == mocapact.mocapact_splits(names[::-1])
    for s in range(60):
        assert len({splits[n] for n in names if n.split("_")[1] == f"{s:03d}"}) == 1
    share = np.bincount(list(splits.values())) / len(names)
    assert np.abs(share - (0.7, 0.2, 0.1)).max() < 0.05


def test_mocapact_bad_files(tmp_path):
    file, out = tmp_path / "CMU_001_01.hdf5", tmp_path / "out"
    with says("no CMU_*.hdf5", "huggingface.co"):
        mocapact.render_mocapact(tmp_path, out)
    model = mocapact.Posed("default", "plain").model
    mocapact.made_up(file, model)
    with h5py.File(file, "r+") as f:
        del f["CMU_001_01-0-30/0/actions"]
    with says("layout of MoCapAct", "observations/proprioceptive"):
        mocapact.render_mocapact(tmp_path, out, frames=4)
    file.write_bytes(b"not HDF5")
    with says("layout of MoCapAct"):
        mocapact.render_mocapact(tmp_path, out, frames=4)
    mocapact.made_up(file, model)
    with says("no rollout of 40 frames", "--frames"):
        mocapact.render_mocapact(tmp_path, out, frames=40)

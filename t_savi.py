from t_head import *  # noqa: F401,F403

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

from t_head import *  # noqa: F401,F403

from studies import savi_arms, savi_partitions, savi_place, savi_seeds, savi_slots


@pytest.fixture(scope="session")
def films(tmp_path_factory):
    """A folder in which the studies' tests run, so that they share rendered video."""
    torch.set_num_threads(1)
    return tmp_path_factory.mktemp("savi")


@pytest.fixture
def there(films, monkeypatch):
    monkeypatch.chdir(films)
    monkeypatch.setattr(savi, "EVAL_CLIPS", 4)
    return films


def masked(m=4, K=4, interact=False, **flags):
    """A small network whose slot j sees action j."""
    kw = dict(size=32, slots=K, dim=16, frames=2)
    args = savi.filled(savi.Args(**{**kw, **flags}), torch.device("cpu"))
    return savi_arms.action_model(args, np.eye(K, m, dtype=np.float32), interact)


# ------------------------------------------------------------------------------------ networks
def test_savi_actions_reach_their_slot_only():
    model = masked()
    slots, act = torch.randn(3, 4, 16), torch.rand(3, 4)
    other = act.clone()
    other[:, 2] += 1
    moved = (model.predictor(slots, act) != model.predictor(slots, other)).any(-1)
    assert moved.tolist() == [[False, False, True, False]] * 3  # exactly
    first = (model.initial(act) != model.initial(other)).any(-1)
    assert first.tolist() == [[False, False, True, False]] * 3
    all_see = masked(interact=True).predictor
    assert (all_see(slots, act) != all_see(slots, other)).any(-1).all()
    cue, cued = torch.rand(3, 4, 3), masked(init="com").initial
    assert torch.equal(cued(act, cue), cued(other, cue))


def test_savi_action_model_trains_and_compiles_as_eager():
    torch._dynamo.reset()
    model, video = masked(), torch.rand(2, 2, 3, 32, 32)
    batch = video, video, torch.rand(2, 2, 4), None, 1.0, 0.0
    f = torch.compile(savi.savi_loss, backend="eager", fullgraph=True, dynamic=False)
    loss = savi.savi_loss(model, *batch)[0]
    assert torch.allclose(f(model, *batch)[0], loss)
    loss.backward()
    assert all(p.grad is not None for p in model.parameters())


def placed():
    args = savi.filled(savi.Args(size=32, slots=4, dim=16, frames=2), torch.device("cpu"))
    torch.manual_seed(0)
    return savi_place.PlacedSAVi(args, radius=0.3, sharpness=3.0)


def test_savi_places_follow_attention_and_move_what_is_drawn():
    model, video = placed(), torch.rand(3, 2, 3, 32, 32)
    before, after, _ = model(video, torch.zeros(3, 2, 0))
    assert before.shape == after.shape == (3, 2, 4, 18)
    assert torch.equal(before[1, ..., -2:], after[0, ..., -2:])  # a place waits for attention
    tokens = model.encoder(video[0])
    slots, attention = model.attention(before[0], tokens, 1)
    weight = attention / attention.sum(1, keepdim=True)
    slow = torch.einsum("bnk,nc->bkc", weight, savi_place.cells(16))
    assert torch.allclose(slots[..., -2:], slow, atol=1e-5)
    _, alpha, each = model.decode(after)
    assert torch.allclose(alpha.sum(2), torch.ones(3, 2, 32, 32), atol=1e-5)
    shifted = after.clone()
    shifted[..., -2] += 8 / 32  # eight pixels down
    moved = model.decode(shifted)[2]
    things = (slice(None), slice(None), slice(0, 3))
    assert torch.allclose(moved[things][..., 12:28, 4:28], each[things][..., 4:20, 4:28], atol=1e-4)
    assert torch.equal(moved[:, :, 3], each[:, :, 3])  # the background stays


def test_savi_place_loss_and_ramp():
    model, video = placed(), torch.rand(2, 2, 3, 32, 32)
    loss, terms = savi_place.place_loss(model, video, torch.zeros(2, 2, 0), 0.5)
    assert torch.allclose(loss, terms["recon"] + 0.5 * terms["area"]) and 0 < terms["area"] < 1
    assert [savi_place.ramp(p, 0.4, 0.6) for p in (0, 0.5, 1)] == pytest.approx([0, 0.5, 1])


# ---------------------------------------------------------------------------------- partitions
def test_savi_discovers_groups_and_keeps_every_action():
    rng = np.random.default_rng(0)
    act = rng.normal(size=(3000, 6))
    act[:, 5] = 0.25  # never varies
    mix = rng.normal(size=(5, 9)) * np.repeat(np.eye(3), 3, 1)[[0, 0, 1, 1, 2]]
    change = act[:, :5] @ mix + 0.1 * rng.normal(size=(3000, 9))
    pairs = [(act, change.reshape(-1, 3, 3))]
    discover = savi_partitions.discover_slots_groups
    assert discover(pairs, 3) == [[0, 1], [2, 3], [4, 5]] and len(discover(pairs, 2)) == 2
    assert savi_partitions.slots_of_parts([[2, 3], [0, 1]], [[0, 1], [2, 3]]) == {1: 1, 2: 0}
    assert savi_partitions.slots_of_parts([], [[0], [1]]) == {1: 0, 2: 1}
    assert savi_partitions.agreement([[0, 1], [2]], [[2], [0, 1]], 3) == 1


def test_savi_partition_from_file_and_bad_ones(tmp_path):
    arrays = {"actions": np.zeros((2, 3, 6), np.float32), "split": np.zeros(2, int)}
    meta = {"groups": [[0, 1], [2, 3], [4, 5]], "recipe": {"kind": "pushed"}}
    file = tmp_path / "partition.json"

    def chosen(name, slots=4, seed=0):
        return savi_partitions.choose_partition(str(name), arrays, meta, slots, seed)

    file.write_text(json.dumps([[5, 0], [1, 2], [3, 4]]))
    groups, masks = chosen(file)
    assert groups == [[0, 5], [1, 2], [3, 4]] and masks[0, [0, 5]].all()
    assert masks.sum(0).tolist() == [1] * 6 and masks[3].sum() == 0
    file.write_text(json.dumps({"groups": [[0, 1, 2, 3, 4, 5]]}))
    assert len(chosen(file)[0]) == 1 and chosen("global")[1].all()
    assert not chosen("none")[1].any() and chosen("body")[0] == meta["groups"]
    random = chosen("random", seed=3)[0]
    assert sorted(map(len, random)) == [2, 2, 2] and random == chosen("random", seed=3)[0]
    for text, word in (("[[0, 1], [2, 3], [4]]", "misses action 5"), ("[]", "misses action 0"),
                       ("[[0, 1], [2, 3], [4, 5, 0]]", "exactly once"), ("half a [", "read"),
                       ("[[0, 1], [2, 3], [4, 5], []]", "exactly once")):
        file.write_text(text)
        with says(word, "[[0, 1], [2]]"):
            chosen(file)
    with says("3 groups for 3 slots", "--slots 4"):
        chosen("body", slots=3)
    with says("cannot be read", "discovered"):
        chosen(tmp_path / "nothing.json")
    arrays["actions"] = np.zeros((2, 3, 0))
    with says("has no actions", "studies.scenes:Pushed"):
        chosen("body")


def test_savi_partitions_study(there):
    result = savi_partitions.main(savi_partitions.Args(fast=True, workers=1))
    assert result["groups"] == [[0, 1], [2, 3], [4, 5]] and result["verdict"] == "holds"


# ------------------------------------------------------------------------------------ measures
def test_savi_designated_iou_and_its_grids():
    true = np.zeros((2, 8, 8), int)
    true[:, :4, :4], true[:, 4:, 4:] = 1, 2
    assert savi_arms.designated_iou(true, true, {1: 1, 2: 2}) == 1
    assert savi_arms.designated_iou(true, true, {1: 2, 2: 1}) == 0
    assert savi_arms.designated_iou(true, true, {1: 9}) == 0
    got = savi_arms.grid_designated(true[None])
    slow = [savi.iou_table(true, savi.grid_mask(1, 7, true.shape))[1][g].max() for g in (1, 2)]
    assert np.isclose(got["grid 1x7"], np.mean(slow))


def test_savi_counterfactual_of_a_network_that_is_right(there):
    """One that moves what the action moves scores 1, one that changes all scores the area."""
    args = savi_seeds.savi_args(savi_arms.Args(fast=True, device="cpu", workers=1), clip_frames=12)
    clips, meta = savi_seeds.test_clips(args)
    model, made = masked(m=6), []
    fork = clips.video.shape[1] // 2 + clips.arrays["fork_actions"].shape[1]
    real = clips.video[0, fork].permute(2, 0, 1).float() / 255
    other = torch.as_tensor(clips.arrays["fork_frame"][0]).permute(2, 0, 1).float() / 255

    def drawn(slots):  # the second future is that of the other command
        made.append(0)
        alpha = torch.zeros(1, 4, 32, 32)
        alpha[:, 1] = 1
        picture = (real, other)[len(made) - 1][None]
        return picture, alpha, picture[:, None].expand(1, 4, -1, -1, -1)

    model.decode = drawn
    group = int(clips.arrays["fork_group"][0])
    row = savi_arms.counterfactual_row(model, clips, 0, {group + 1: 1})
    assert row["locality"] > 0.7 and row["slot_share"] == 1 and 0 < row["area"] < 0.5
    model = masked(m=6)
    model.predictor.forward = lambda slots, act: slots
    assert savi_arms.counterfactual(model, clips, {1: 0})["locality"] == 0
    assert meta["groups"] == [[0, 1], [2, 3], [4, 5]]


def test_savi_verdicts():
    def results(values):
        return [{"scores": {"fg_ari": v, "designated": v}} for v in values]

    good, poor = [0.8, 0.81, 0.82, 0.83, 0.84], [0.5, 0.52, 0.51, 0.53, 0.5]
    by_arm = {a: results(good if a == "A4" else poor) for a in savi_arms.ARMS}
    grids = {"grid 2x3": {"fg_ari": 0.6, "designated": 0.3}}
    high = {"grid 2x3": {"fg_ari": 0.9, "designated": 0.3}}
    assert savi_arms.action_verdict(by_arm, grids) == "benefit"
    three = {a: c[:3] for a, c in by_arm.items()}
    assert savi_arms.action_verdict(three, grids).startswith("none")
    assert savi_arms.action_verdict(by_arm, high) == "no benefit"
    assert savi_arms.action_verdict(by_arm | {"A2": results(good)}, grids) == "no benefit"
    for values, said in (([0.7, 0.8, 0.75], "holds"), ([0.7, 0.6, 0.75], "undecided"),
                         ([0.5, 0.6, 0.55], "fails"), ([0.7, 0.8], "undecided: fewer")):
        assert savi_seeds.verdict_of(values, 0.68).startswith(said)
    assert savi_slots.verdict_of([[0.8], [0.9], [0.8], [0.1], [0.2]], False) == "holds"
    assert savi_slots.verdict_of([[0.1], [0.9], [0.8], [0.1], [0.2]], True) == "fails"
    assert savi_slots.verdict_of([[0.1]], False).startswith("undecided")
    low, high = (dict(fg_ari=x, ari=x, miou=x) for x in (0.1, 0.9))
    for ours, theirs, said in ((3 * [high], 3 * [low], "holds"), (3 * [low], 3 * [high], "fails"),
                               ([high, low, high], [low, high, low], "undecided"),
                               (2 * [high], 2 * [low], "undecided: fewer")):
        assert savi_place.verdict_of(ours, theirs).startswith(said)


# ------------------------------------------------------------------------------- whole studies
def test_savi_arms_study_is_resumable(there, capsys):
    args = savi_arms.Args(fast=True, device="cpu", workers=1, updates=2)
    result = savi_arms.main(args)
    cells = result["cells"]
    assert set(cells) == {f"A{i}-seed1" for i in range(7)} and result["verdict"] == "no benefit"
    size = {name[:2]: c["parameters"] for name, c in cells.items()}
    assert size["A1"] == size["A2"] == size["A3"] == size["A4"]  # zeros, not fewer parameters
    assert {"locality", "slot_share", "designated"} <= set(cells["A4-seed1"]["scores"])
    assert "locality" not in cells["A0-seed1"]["scores"]
    out = capsys.readouterr().out
    assert "A6 A1, flow target" in out and "grid 2x3" in out
    gone = Path(result["folder"]) / "cells" / "A4-seed1.json"
    gone.unlink()
    shutil.rmtree(Path(result["folder"]) / "trainings" / "A4-seed1")
    again = savi_arms.main(savi_arms.Args(resume=result["folder"]))
    assert again["cells"]["A4-seed1"]["scores"] == cells["A4-seed1"]["scores"]
    with says("no action moves"):
        savi_arms.main(savi_arms.Args(task="objects", fast=True, workers=1))


def test_savi_slots_study(there, monkeypatch, capsys):
    monkeypatch.setattr(savi, "EVAL_CLIPS", 2)
    args = savi_slots.Args(fast=True, device="cpu", workers=1, updates=1, batch=1)
    result = savi_slots.main(args)
    assert list(result["cells"]) == ["default-K3-seed1", "default-K5-seed1", "parts-K3-seed1",
                                     "parts-K5-seed1"]
    out = capsys.readouterr().out
    assert "default, 5 slots" in out and "parts, best grid" in out
    assert (Path(result["folder"]) / "usage.png").stat().st_size > 0


def test_savi_place_study(there, capsys):
    args = savi_place.Args(fast=True, device="cpu", workers=1, seeds=1)
    result = savi_place.main(args)
    assert set(result["cells"]) == {"place-seed1", "default-seed1"}
    assert "slots with a place" in capsys.readouterr().out
    assert (Path(result["folder"]) / "slots.png").stat().st_size > 0


def test_savi_seeds_study_goes_on_within_a_cell(there, monkeypatch, capsys):
    args = savi_seeds.Args(fast=True, device="cpu", workers=1, seeds=3, updates=12)
    whole = savi_seeds.main(args)
    out = capsys.readouterr().out
    assert "SAVi, 6 slots" in out and whole["verdict"] == "fails" and "PSNR" in out
    real, count = savi.savi_loss, []

    def dies(*a):
        count.append(0)
        if len(count) == 17:
            os.kill(os.getpid(), signal.SIGINT)
        return real(*a)

    monkeypatch.setattr(savi, "savi_loss", dies)
    with pytest.raises(KeyboardInterrupt):
        savi_seeds.main(args)
    run = max(there.glob("runs/*savi_seeds*"), key=lambda p: p.stat().st_mtime)
    done = savi_seeds.main(savi_seeds.Args(resume=str(run)))
    assert len(count) == 36  # nothing was trained twice
    for name, cell in whole["cells"].items():
        assert done["cells"][name]["scores"] == cell["scores"]
        assert done["cells"][name]["curve"] == cell["curve"]


def test_savi_crowd_runs(there):
    crowd = savi.main(savi.Args(task="studies.scenes:Crowd", color="random", slots=7, fast=True,
                                device="cpu", workers=1, updates=2, frames=2))
    assert "fg_ari_parts" in crowd["scores"] and len(crowd["scores"]["share"]) == 7

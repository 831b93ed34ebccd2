"""The drawn world: what each switch promises."""

import pytest
import torch

from kernels.toys import CLASSES, DRAWN, toys

CALM = dict(noise=0, light=0)


def test_ten_classes():
    assert CLASSES == ("house", "tree", "mushroom", "car", "boat", "fish", "flower", "robot",
                       "ice-cream cone", "umbrella")
    for *_, frame, details in DRAWN.values():
        assert 3 <= len((frame + ";" + details).split(";")) <= 8


def test_seed_decides_everything():
    a, b, c = toys(40, 3), toys(40, 3), toys(40, 4)
    torch.manual_seed(1)                                                  # the global generator is not used
    assert all(torch.equal(a[key], b[key]) for key in a)
    assert (a["images"] == c["images"]).float().mean() < .1 and not torch.equal(a["labels"], c["labels"])
    state = torch.get_rng_state()
    toys(3)
    assert torch.equal(state, torch.get_rng_state())


@pytest.mark.parametrize("size", [32, 64, 128])
@pytest.mark.parametrize("objects, frames", [(1, 1), (4, 1), (1, 3), (4, 3)])
def test_shapes(size, objects, frames):
    d = toys(7, 0, size, objects, frames)
    t, k = ([] if frames == 1 else [frames]), ([] if objects == 1 else [objects])
    want = dict(images=[7, *t, 3, size, size], masks=[7, *t, size, size], labels=[7, *k],
                centres=[7, *t, objects, 2], motion=[7, *t, 2])
    assert {key: list(value.shape) for key, value in d.items()} == want
    assert d["images"].dtype == d["masks"].dtype == torch.uint8 and d["labels"].dtype == torch.int64
    assert d["masks"].max() == objects and torch.isfinite(d["centres"]).all()


def test_labels_are_balanced_and_shuffled():
    count = toys(2007)["labels"].bincount(minlength=10)
    assert len(count) == 10 and count.min() == 200 and count.max() == 201
    assert (toys(1000)["labels"].diff() == 1).float().mean() < .2


def test_every_single_toy_is_seen():
    area = (toys(2000)["masks"] == 1).flatten(1).sum(1)
    assert area.min() > 20 and area.max() < 32 * 32 * .8


def test_mask_is_what_is_drawn():
    """On a plain grey ground paint is toy (but for softened edges and hairlines), and toy is paint."""
    d = toys(300, 1, 64, objects=5, grey=True, parts=False, **CALM)
    painted = ((d["images"].int() - 128).abs() > 1).any(1)
    near = torch.nn.functional.max_pool2d((d["masks"] > 0).float(), 3, 1, 1) > 0
    assert (painted & ~near).sum() < .005 * painted.sum()
    assert (painted[d["masks"] > 0]).float().mean() > .99


def test_masks_after_occlusion():
    """Ids are those of the toys present, and a scene has 2..objects; the later one hides the earlier."""
    d = toys(400, 2, 64, objects=5)
    present = d["labels"] >= 0
    assert set(present.sum(1).tolist()) == {2, 3, 4, 5}
    for k in range(5):
        seen = (d["masks"] == k + 1).flatten(1).any(1)
        assert not (seen & ~present[:, k]).any() and seen[present[:, k]].float().mean() > .97
    clip = toys(100, 3, 32, objects=2, frames=10, small=.9, large=.9, jitter=0)  # big ones, crossing
    area = (clip["masks"][..., None] == torch.tensor([1, 2])).flatten(2, 3).sum(2).float()          # [n,T,2]
    drop = 1 - area.amin(1) / area.amax(1)                                # [n,2]
    assert drop[:, 0].max() > .5 and drop[:, 1].max() < .2          # the first is hidden, the last never


def test_up_is_up():
    """Of each class, the mean picture differs from itself turned: RotNet has something to learn."""
    d = toys(400, 0, 32, jitter=0, small=.4, large=.4, rho=1, grey=True, **CALM)
    for c in range(10):
        toy = (d["masks"][d["labels"] == c] > 0).float()
        x = toy.mean(0)
        for quarter in (1, 2, 3):
            apart = (x - x.rot90(quarter, (0, 1))).abs().sum() / x.sum()
            if CLASSES[c] != "fish" or quarter != 2:                      # the fish: by its fin and belly
                assert apart > .15, (CLASSES[c], quarter)
    fish = d["images"][d["labels"] == 5].float().mean(0)
    assert (fish - fish.rot90(2, (1, 2))).abs().mean() > 3


def test_which_way_is_up():
    d = toys(400, 0, jitter=0)
    top = (d["masks"][:, :16] > 0).sum((1, 2)) / (d["masks"] > 0).sum((1, 2))
    names = ("mushroom", "umbrella", "tree", "boat")
    share = [top[d["labels"] == CLASSES.index(name)].mean() for name in names]
    assert min(share[:2]) > .55 and max(share[2:]) < .45


def test_tilt_turns_without_stretching():
    flat, tilted = (toys(200, 1, 64, jitter=0, small=.3, large=.3, tilt=t)["masks"] > 0 for t in (0, .7))
    area = tilted.sum((1, 2)) / flat.sum((1, 2))
    assert (area - 1).abs().mean() < .03 and (area - 1).abs().max() < .1  # thin shafts fall between pixels
    assert (flat != tilted).float().mean() > .02


def test_toys_of_a_scene_stay_inside():
    d = toys(200, 5, objects=3, jitter=1.5)
    assert d["centres"].min() >= .45 * .24 - 1e-6 and d["centres"].max() <= 1 - .45 * .24 + 1e-6
    assert d["centres"].std() > .2                               # anywhere, not on a grid


def test_toys_that_are_apart():
    """No two centres nearer than apart sums of half sizes, though anywhere else; where there is no such
    place, as far as 99 tries get."""
    def nearest(d):                                              # of the toys that are there, in sums
        gap = (d["centres"][:, :, None] - d["centres"][:, None]).norm(dim=3) / (2 * .45 * .4)       # [n,K,K]
        none = (d["labels"] < 0)[:, :, None] | (d["labels"] < 0)[:, None] | torch.eye(3).bool()
        return gap.masked_fill(none, 9).amin((1, 2))

    same = dict(objects=3, small=.4, large=.4, jitter=1)
    free, apart, far = (nearest(d := toys(300, 5, **same, apart=a)) for a in (0, 1, 9))
    assert free.min() < .5 and 1 <= apart.min() < 1.1
    assert apart.mean() < 1.4 and 1.6 < far.mean()               # the first such places, not the farthest
    assert d["centres"].min() >= .45 * .4 - 1e-6 and d["centres"].max() <= 1 - .45 * .4 + 1e-6
    anywhere = toys(2000, 5, **same, apart=1)
    there = anywhere["centres"][anywhere["labels"] >= 0]         # [.,2]
    assert torch.allclose(there.mean(0), torch.tensor(.5), atol=.02) and there.std() > .19
    assert torch.equal(toys(5, 3, apart=1)["images"], toys(5, 3)["images"])              # alone: as ever


def test_clip_paths_and_bounces():
    d = toys(200, 5, objects=3, frames=16)
    step = d["centres"].diff(dim=1)                                       # [n,T-1,K,2]
    assert step.abs().max() <= .06 + 1e-6 and step.abs().mean() > .02
    same = (step[:, 1:].abs() - step[:, :-1].abs()).abs() < 1e-5          # constant speed except at a bounce
    assert same.float().mean() > .8 and (step[:, 1:] * step[:, :-1] < 0).any()
    assert d["centres"].min() >= .45 * .24 - 1e-6 and d["centres"].max() <= 1 - .45 * .24 + 1e-6
    assert d["labels"].shape == (200, 3)  # one label a toy, whatever the frame


def test_mask_follows_its_centre():
    """The id belongs to the same toy through the clip: its mask's middle moves as its centre does."""
    d = toys(60, 6, 64, frames=6, tilt=0)
    grid = (torch.arange(64) + .5) / 64
    m = (d["masks"] == 1).float()
    m = m / m.sum((2, 3), keepdim=True)
    middle = torch.stack([(m * grid).sum((2, 3)), (m * grid[:, None]).sum((2, 3))], 2)
    shift = (middle - middle[:, :1]) - (d["centres"][:, :, 0] - d["centres"][:, :1, 0])
    assert shift.abs().max() < .03


def test_camera_motion_moves_the_ground():
    d = toys(100, 7, 64, frames=5, contrast=1, distractors=0, **CALM)
    assert (d["motion"][:, 0] == 0).all() and .045 < d["motion"][:, 1].abs().max() <= .05
    x, motion = d["images"].float() / 255, d["motion"]
    turned = torch.nn.functional.affine_grid(torch.eye(2, 3).expand(100, 2, 3) + torch.nn.functional.pad(
        2 * motion[:, 3, :, None], (2, 0)), (100, 3, 64, 64), align_corners=False)
    ground = ((d["masks"][:, 3] == 0) & (d["masks"][:, 0] == 0)).float()[:, None]
    ground = -torch.nn.functional.max_pool2d(-ground, 17, 1, 8)           # well away from the toy
    ground[..., :12, :] = ground[..., -12:, :] = ground[..., :12] = ground[..., -12:] = 0
    moved = torch.nn.functional.grid_sample(x[:, 0], turned, align_corners=False)
    def error(a):
        return ((a - x[:, 3]).abs() * ground).sum() / ground.sum() / 3
    assert error(moved) < .25 * error(x[:, 0])


def test_noise_light_contrast_and_grey():
    plain = dict(n=60, seed=8, contrast=0)
    calm = toys(**plain, **CALM)
    ground = calm["masks"][0] == 0
    far = -torch.nn.functional.max_pool2d(-ground[None].float(), 5, 1, 2)[0] > 0     # not a softened edge
    assert (calm["images"][0][:, far].float().std(1) < 1e-3).all()        # contrast 0: one colour
    assert not torch.equal(calm["images"], toys(**plain, noise=0)["images"])         # light changes it
    noisy = toys(**plain, light=0, noise=.05)
    assert torch.equal(noisy["masks"], calm["masks"])                     # and the toys stay
    inside = (calm["images"] > 60) & (calm["images"] < 195)
    assert abs((noisy["images"].float() - calm["images"].float())[inside].std() / 255 - .05) < .003
    grey = toys(**plain, grey=True, **CALM)
    assert (grey["images"][0][:, far] == 128).all() and torch.equal(grey["masks"], calm["masks"])


def test_sky_is_bright_above_and_only_there():
    sky, none = (toys(300, 9, sky=on, **CALM) for on in (True, False))
    assert torch.equal(sky["masks"], none["masks"])
    for d, found in ((sky, True), (none, False)):
        ground = (d["masks"] == 0)[:, None].float()
        x = d["images"].float() * ground
        top, bottom = (x[:, :, a].sum((2, 3)) / ground[:, :, a].sum((2, 3))
                       for a in (slice(0, 9), slice(24, 32)))
        bright = (top.mean(1) > bottom.mean(1) + 25).float().mean()
        assert bright > .95 if found else bright < .5
        assert (top[:, 2] > top[:, 0]).float().mean() > .95 or not found  # bluish


def test_distractors_are_no_toys():
    one, none = (toys(60, 10, 64, distractors=k, **CALM) for k in (3, 0))
    assert torch.equal(one["masks"], none["masks"]) and torch.equal(one["labels"], none["labels"])
    changed = (one["images"] != none["images"]).any(1)
    assert changed[one["masks"] == 0].float().mean() > .02                # but for seams between parts:
    assert changed[_inside(one["masks"])].float().mean() < .002


def _inside(masks):
    return -torch.nn.functional.max_pool2d(-(masks > 0).float()[:, None], 5, 1, 2)[:, 0] > 0


def test_rho_ties_hue_to_class():
    def spread(rho):                                                      # of a tree's mean colour
        d = toys(400, 11, rho=rho, **CALM)
        trees = d["labels"] == 1
        x, m = d["images"][trees].float(), (d["masks"][trees] == 1)[:, None]
        x = (x * m).sum((2, 3)) / m.sum((2, 3))
        return (x.argmax(1) == 1).float().mean()                          # green
    assert spread(1) > .85 and spread(0) < .6


def test_each_class_has_hues_of_its_own():
    """With rho = 1 the parts' hues lie about those of the class, less than .05 away."""
    d = toys(300, 14, 64, rho=1, grey=True, noise=0, light=0, contrast=0)
    for c, (name, (*hues, _, _)) in enumerate(DRAWN.items()):
        x, m = d["images"][d["labels"] == c].double() / 255, d["masks"][d["labels"] == c] > 0
        x = x.movedim(1, 3)[_inside(m)]                          # [n,3] pixels within toys
        x = x[x.amax(1) - x.amin(1) > .2]
        top, low = x.amax(1), x.amin(1)
        r, g, b = ((top[:, None] - x) / (top - low)[:, None]).T
        hue = torch.where(x[:, 0] == top, b - g, torch.where(x[:, 1] == top, 2 + r - b, 4 + g - r)) / 6 % 1
        far = torch.stack([(hue - h + .5) % 1 - .5 for h in hues]).abs().amin(0)
        assert (far < .06).double().mean() > .9, name


def test_parts_false_is_one_hue():
    def hues(parts):
        d = toys(60, 12, 64, parts=parts, rho=0, grey=True, **CALM)
        r, g, b = d["images"].float().unbind(1)
        angle = torch.atan2(3 ** .5 * (g - b), 2 * r - g - b)             # hue angle of each pixel
        z = torch.polar(torch.ones_like(angle), angle)
        m = _inside(d["masks"]).float()
        return ((z * m).sum((1, 2)).abs() / m.sum((1, 2))).mean()         # 1: all pixels of a toy agree
    assert hues(False) > .97 and hues(True) < .9


def test_pose_switches():
    still = dict(n=200, seed=13, rho=1, grey=True, **CALM)
    a = toys(**still, jitter=0)
    assert (a["centres"] == .5).all() and .2 < (toys(**still)["centres"] - .5).abs().max() <= .22
    area = [(toys(**still, small=s, large=s)["masks"] > 0).float().mean() for s in (.2, .4)]
    assert 3 < area[1] / area[0] < 4.2                                    # twice the size
    assert not torch.equal(toys(**still, tilt=0)["images"], toys(**still)["images"])
    assert torch.equal(toys(**still, tilt=0)["centres"], toys(**still)["centres"])


def test_flip_mirrors_half():
    still = dict(n=200, seed=14, tilt=0, jitter=0, grey=True, **CALM)
    on, off = (toys(**still, flip=flip)["images"].int() for flip in (True, False))
    apart, mirrored = ((on - x).abs().amax((1, 2, 3)) for x in (off, off.flip(3)))
    assert (torch.minimum(apart, mirrored) <= 1).all() and 60 < (apart <= 1).sum() < 150

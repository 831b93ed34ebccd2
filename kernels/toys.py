"""The drawn world: ten toys with an up side, on textured grounds, alone, in scenes or in clips."""

import math

import torch

# A toy: hues of body, detail and light parts; primitives, back to front; primitives resized from toy to toy.
# A primitive: kind (plural: and its mirror image), part, centre x y (y up), half width and height, degrees.
DRAWN = {
    "house": (.01, .60, .12, "box 1 .5 .6 .13 .32; box 2 0 -.45 .72 .53; triangle 0 0 .45 1 .43",
              "box 1 -.3 -.62 .18 .32; box 1 .32 -.36 .19 .19"),
    "tree": (.36, .07, .30, "box 1 0 -.75 .14 .25; triangle 0 0 -.25 .8 .38; triangle 0 0 .15 .65 .36;"
             "triangle 0 0 .57 .48 .35", "ovals 2 .28 -.4 .1 .1; oval 2 -.05 .02 .1 .1"),
    "mushroom": (.99, .08, .11, "box 2 0 -.45 .27 .45; oval 2 0 -.84 .36 .16; dome 0 0 -.1 .98 1.05;"
                 "oval 1 0 -.1 .8 .1", "ovals 2 .5 .22 .16 .15; oval 2 .02 .55 .2 .18"),
    "car": (.60, .68, .52, "dome 0 -.08 -.08 .66 .68; dome 2 -.08 -.02 .5 .48; box 0 -.08 .2 .06 .3;"
            "box 0 0 -.26 1 .25", "ovals 1 .54 -.5 .27 .27; ovals 2 .54 -.5 .1 .1"),
    "boat": (.06, .58, .13, "box 1 -.04 .2 .06 .76; dome 0 0 -.42 1 .55 180; triangle 2 .42 .25 .4 .58;"
             "triangle 2 -.4 .08 .26 .4", "triangle 0 .14 .86 .12 .2 -90; box 1 0 -.5 .7 .06"),
    "fish": (.08, .03, .14, "triangle 1 -.72 0 .5 .34 -90; triangle 1 .1 .6 .4 .25; oval 0 .2 0 .8 .52;"
             "dome 2 .2 -.1 .78 .4 180", "oval 2 .6 .14 .17 .17; oval 1 .64 .14 .08 .08"),
    "flower": (.90, .35, .14, "box 1 0 -.5 .07 .5; oval 0 0 .73 .27 .27; ovals 0 .36 .47 .27 .27;"
               "ovals 0 .22 .07 .27 .27", "oval 2 0 .37 .24 .24; oval 1 .3 -.6 .3 .12 35"),
    "robot": (.50, .66, .15, "box 1 0 .9 .06 .12; box 1 0 -.12 .92 .12; box 0 0 .5 .5 .34;"
              "box 0 0 -.25 .62 .38; boxes 1 .32 -.82 .18 .2", "ovals 2 .22 .53 .15 .15"),
    "ice-cream cone": (.09, .03, .95, "triangle 0 0 -.46 .5 .56 180; oval 1 .26 .2 .36 .33;"
                       "oval 2 -.24 .2 .36 .33; oval 2 .05 .58 .36 .33", "oval 0 .05 .9 .14 .14"),
    "umbrella": (.76, .10, .16, "box 1 0 -.32 .06 .62; box 1 .14 -.9 .2 .07; box 1 .28 -.82 .06 .13;"
                 "box 1 0 .86 .05 .13; dome 0 0 0 1 .84", "dome 2 0 0 .5 .84; dome 0 0 0 .17 .84")}
CLASSES = tuple(DRAWN)
# Hue, saturation, value from .. to: of the three parts; of the sky and the ground under it; of other grounds.
HSV = torch.tensor([[[0, .2, .3], [0, .2, .2], [0, .1, .5], [.52, .2, .85], [.05, .25, .2], [0, .1, .2]],
                    [[1, .95, 1], [1, .95, .9], [1, .7, 1], [.62, .45, 1], [.4, .55, .45], [1, .7, 1]]])


def rgb(hsv):
    h, s, v = hsv[..., None].unbind(-2)
    return v * (1 - s + s * (((6 * h + torch.tensor([0, 4, 2])) % 6 - 3).abs() - 1).clamp(0, 1))


def textures(side, g):
    """64 grey textures [64,side,side] in 0..1 that wrap round: fractal noise, blobs, waves, checks."""
    f = torch.fft.fftfreq(side) * side                                    # cycles across the texture
    f = (f[:, None] ** 2 + f ** 2).sqrt().clamp(min=1)                    # [side,side]
    white = torch.fft.fft2(torch.randn(2, 16, side, side, generator=g))
    grain = torch.fft.ifft2(white * torch.stack([f ** -1.5, (-(f / 5) ** 2).exp()])[:, None]).real
    noise, blobs = grain / grain.std((1, 2, 3), keepdim=True)             # [16,side,side] each
    x, (a, b) = torch.arange(side) / side * 2 * math.pi, torch.randint(2, 9, (2, 16, 1, 1), generator=g)
    waves, checks = (a * x + (b - 5) * x[:, None] + noise).sin(), (a * x).sin() * (b * x[:, None]).sin()
    return torch.cat([noise, 3 * blobs, 2 * waves, 5 * checks]).tanh() / 2 + .5


def distance(kind, u, v, w, h):
    """Signed distance, negative inside, to a box, triangle (point up), oval or dome (its upper half)."""
    if kind.startswith("box"):
        return torch.maximum(u.abs() - w, v.abs() - h)
    if kind.startswith("triangle"):
        return torch.maximum((2 * h * u.abs() + w * (v - h)) / (4 * h * h + w * w) ** .5, -h - v)
    r = ((u / w) ** 2 + (v / h) ** 2).sqrt()
    d = (r * r - r) / ((u / w ** 2) ** 2 + (v / h ** 2) ** 2 + 1e-8).sqrt()     # first order
    return d.maximum(-v) if kind == "dome" else d


def paint(x, drawn, ink, u, v, swell, pixels):
    """Draw a toy of own coordinates u v [q,T,S,S], in half sizes, over x [q,T,3,S,S] -> x, cover [q,T,S,S]"""
    cover = torch.zeros_like(u)
    for resized, rows in enumerate(drawn):
        for kind, part, *place in (row.split() for row in rows.split(";")):
            px, py, w, h, turn = (*map(float, place), 0)[:5]
            c, s, k = math.cos(math.radians(turn)), math.sin(math.radians(turn)), swell ** resized
            du, dv = (u.abs() if kind[-1] == "s" else u) - px, v - py
            alpha = (.5 - pixels * distance(kind, c * du + s * dv, c * dv - s * du, w * k, h * k)).clamp(0, 1)
            x, cover = x.lerp(ink[:, None, int(part), :, None, None], alpha[:, :, None]), cover.maximum(alpha)
    return x, cover


def toys(n=20_000, seed=0, size=32, objects=1, frames=1, jitter=.22, small=.24, large=.42, tilt=.15, rho=.6,
         contrast=.3, distractors=0, sky=False, noise=.03, light=.2, flip=True, parts=True, grey=False,
         apart=0.):
    """n images, scenes (objects > 1: 2..objects toys) or clips (frames > 1) as images uint8 [n,T,3,S,S],
    masks uint8 [n,T,S,S] (0 = ground, k+1 = what is visible of toy k), labels [n,K] (-1 = no toy), centres
    [n,T,K,2] and camera motion since frame 0 [n,T,2], (x, y) in sides, y down: the ground moves by -motion.
    Stills have no T, single toys' labels no K. jitter: how far from the middle of its cell, in cells
    (in scenes 1 is anywhere); apart: scenes without cells, where centres are so many sums of their half sizes
    apart, if 99 tries find such places; half sizes small..large are in sides (x .45 in scenes, < .5 in
    clips); rho: how often hues are the class's; parts=False: one vivid hue a toy; grey: plain grey ground.
    The same call gives the same bits; another n gives other images."""
    g, grid, out = torch.Generator().manual_seed(seed), math.ceil(objects ** .5), []

    def rand(low, high, *shape):
        return low + (high - low) * torch.rand(shape, generator=g)

    bank = textures(2 * size, torch.Generator().manual_seed(64))          # [64,2S,2S], whatever the seed
    palette = torch.tensor([row[:3] for row in DRAWN.values()])           # [10,3] hues
    x, time = (torch.arange(size) + .5) / size, torch.arange(frames)[:, None]                     # [S] [T,1]
    y, labels = x[:, None], torch.randperm(n * objects, generator=g).view(n, objects) % len(CLASSES)
    for label in labels.split(max(1, 2 ** 20 // (objects * frames * size ** 2))):   # [m,K]
        m, k = label.shape
        label = label.masked_fill(torch.arange(k) >= rand(2, k + 1, m, 1).floor(), -1)
        # Toys: size, place on a jittered grid, path that bounces off the borders, pose, shape, colours.
        half = rand(small, large, m, k, 1, 1) * (1 if k == 1 else .45)    # [m,K,1,1]
        cell = rand(0, 1, m, grid ** 2, 1, 1).argsort(1)[:, :k]
        centre = (torch.cat([cell % grid, cell // grid], 3) + .5 + rand(-jitter, jitter, m, k, 1, 2)) / grid
        if apart and k > 1:
            at, none = half + (1 - 2 * half) * rand(0, 1, m, k, 99, 2), label < 0         # [m,K,99,2] [m,K]
            near = (at[:, :, None] - at[:, None]).norm(dim=4) / (half[:, :, None] + half[:, None])[..., 0]
            alone = none[:, :, None] | none[:, None] | torch.eye(k, dtype=torch.bool)     # [m,K,K]
            near = near.masked_fill(alone[..., None], math.inf).amin((1, 2))              # [m,99]
            centre = at[torch.arange(m), :, near.clamp(max=apart).argmax(1), None]        # the first that is
        centre = centre + rand(-.06, .06, m, k, 1, 2) * time              # [m,K,T,2]
        if frames > 1 or k > 1:
            centre = 1 - half - ((centre - half) % (2 - 4 * half) - 1 + 2 * half).abs()
        dx, dy = x - centre[..., :1, None], y - centre[..., 1:, None]
        turn, mirror = tilt * torch.randn(m, k, 1, 1, 1, generator=g), rand(0, 1, m, k, 1, 1, 1) < flip / 2
        w, h, swell = (1 + torch.tensor([.2, .2, .3]) * rand(-1, 1, m, k, 1, 1, 1, 3)).unbind(-1)
        scale = half[..., None]                                           # [m,K,1,1,1]
        u = (turn.cos() * dx + turn.sin() * dy) / (scale * w) * (1 - 2. * mirror)         # [m,K,T,S,S]
        v = (turn.sin() * dx - turn.cos() * dy) / (scale * h)             # y up
        hsv, own = rand(*HSV[:, :3], m, k, 3, 3), rand(0, 1, m, k, 1) < rho
        hsv[..., 0] = torch.where(own, palette[label] + .1 * hsv[..., 0] - .05, hsv[..., 0])
        if not parts:
            shades = torch.tensor([[1, 1, 1], [1, 1, .6], [1, 1, .8]])
            hsv = hsv[:, :, :1].clamp(torch.tensor([-1, .7, .7])) * shades
        # Ground: a window panning over a texture between two colours, two others below the horizon.
        motion = rand(-.05, .05, m, 1, 2) * time                          # [m,T,2]
        gap = size * ((motion + rand(0, 2, m, 1, 2))[..., None, None] + y) - torch.arange(2 * size)
        wx, wy = (1 - ((gap + size) % (2 * size) - size).abs()).clamp(min=0).unbind(2)            # [m,T,S,2S]
        tex = (wy @ bank[torch.randint(64, (m, 1), generator=g)] @ wx.mT)[:, :, None]        # bilinear
        inks = rgb(rand(*(HSV[:, 3:5] if sky else HSV[:, 5:])[:, :, None, None, None], 2, 2, m, 1, 3))
        images, under = (a.lerp(b, contrast * tex) for a, b in inks[..., None, None])    # [m,T,3,S,S]
        depth = size * (y + motion[..., 1:, None] - rand(.4, .7, m, 1, 1, 1)) + .5
        images = images.lerp(under, sky * depth.clamp(0, 1)[:, :, None]) * (not grey) + .5 * grey
        for _ in range(distractors):
            a, b = ((p - rand(0, 1, m, 1, 1, 1)) / rand(.04, .12, m, 1, 1, 1) for p in (x, y))
            images = paint(images, ["oval 0 0 0 1 1"], rgb(rand(*HSV[:, 0], m, 1, 3)), a, b, 1, size / 12)[0]
        masks, toy = images.new_zeros(m, frames, size, size).byte(), (rgb(hsv), u, v, swell, size * scale)
        for i in range(k):                                                # the later toy is in front
            for c, row in enumerate(DRAWN.values()):
                q = (label[:, i] == c).nonzero()[:, 0]
                images[q], cover = paint(images[q], row[3:], *(p[q, i] for p in toy))
                masks[q] = masks[q].masked_fill(cover > .5, i + 1)
        a, b, c = rand(-light, light, 3, m, 1, 1, 1, 1)
        images = images * (1 + a + b * (x - .5) + c * (y - .5))           # gain and gradient of the light
        images += noise * torch.randn(images.shape, generator=g)
        out.append({"images": (255 * images.clamp(0, 1) + .5).byte(), "masks": masks, "labels": label,
                    "centres": centre.transpose(1, 2), "motion": motion})
    return {key: torch.cat([chunk[key] for chunk in out]).squeeze(1) for key in out[0]}

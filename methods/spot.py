"""SPOT (2024): slots learn from where their decoder looked.

Kakogeorgiou, Gidaris, Karantzalos, Komodakis. SPOT: Self-Training with Patch-Order Permutation for
Object-Centric Learning with Autoregressive Transformers. CVPR 2024, arXiv 2312.00648.

    x --ViT (frozen)--> // h [B,N,C] --teacher: slots--> decoder, patches in a random order --loss--> h
                                                            |  A_DEC [B,K,N], where it looks: argmax,
                                                            //  matched to the student's slots
                                                            v  loss, x .005
    x --ViT, last blocks learn--> [B,N,C] --student: slots, learned queries--> A_SLOT [B,K,N]
        (kept)                                         '--> decoder, patches in a random order --loss--> h

Good at: masks of the slots as good as those of the decoder. Not at: anything its encoder does not tell apart;
it trains two networks, one after the other.

Run      python methods/spot.py
Differs  the encoder is a small ViT that mae.py trains first, on the same scenes, unless --weights gives one;
         its decoder has no LayerNorm on the residual stream before the first block; AdamW for Adam; the quick
         run is small.
"""
import copy
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.nn.functional as F
from scipy.optimize import linear_sum_assignment
from torch import nn

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))     # run from any folder, without an install
import common
from common import Run, cosine, load_data, make_encoder, make_optimizer, parse, set_lr
from kernels.decoders import MLP, Autoregressive
from kernels.segmentation import blocks, clusters, compare
from kernels.slots import Slots, coloured, complaints, enlarge, monitors
from kernels.views import normalise


@dataclass
class Config(common.Config):
    data: str = "toys:objects=3,jitter=1,small=.4,n=10000"  # toys of two objects and more, folder:PATH
    encoder: str = "vit_micro"     # a ViT: vit_micro, vit_small/8, vit_base ...; see --weights
    pretrain: int = 400            # steps of mae.py that train it first, unless --weights is given
    steps: int = 800               # optimisation steps
    batch_size: int = 32           # images a step, all processes together
    weight_decay: float = 0.       # on weights and tokens, not on biases and norms
    clip: float = .3               # largest entry of the gradient: all of it is scaled down to that
    teacher: float = .5            # part of the run that trains the teacher; 0: reconstruction alone
    tune: int = 2                  # last blocks of the encoder that learn with the student
    attention: float = .005        # weight of the student's loss against the teacher's masks
    k: int = 4                     # number K of slots
    dim: int = 64                  # width D of a slot
    rounds: int = 3                # rounds T of the competition
    decoder: str = "autoregressive"  # autoregressive, parallel (PA: every patch from the slots alone) or mlp
    permutations: bool = True      # one of nine orders a step; else row by row
    hidden: int = 128              # width of mlp
    depth: int = 2                 # blocks of autoregressive
    heads: int = 4                 # heads of autoregressive


# Official code, COCO: rate 4e-4, 50 epochs for the teacher, 50 for the student; DINO's ViT-B/16 by --weights.
PAPER = dict(image_size=224, encoder="vit_base/16", epochs=100, batch_size=64, lr=4e-4, k=7, dim=256, tune=4,
             hidden=2048, depth=4, heads=6)


class AutoEncoder(nn.Module):
    """Features [B,N,C] -> what its slots tell of the target h [B,N,C], A_DEC and A_SLOT [B,K,N]."""

    def __init__(self, c, decoder, k, d, rounds, init):
        super().__init__()
        self.mlp = nn.Sequential(nn.LayerNorm(c), nn.Linear(c, c), nn.ReLU(), nn.Linear(c, c))
        self.slots, self.decoder = Slots(k, c, d, rounds, 4 * d, init), decoder

    def forward(self, x, h, order=0):
        self.s, a = self.slots(self.mlp(x))                      # [B,K,D], [T,B,K,N]
        told, masks = self.decoder(self.s, h, order)
        return told.float(), masks, a[-1]


def match(teacher, student, k):                                  # segments [B,N] each -> [B,K]
    """Which of the student's slots overlaps best with each of the teacher's, one to one."""
    t, s = F.one_hot(teacher, k).float(), F.one_hot(student, k).float()  # [B,N,K]
    both = t.mT @ s                                              # [B,K,K]
    iou = both / (t.sum(1)[:, :, None] + s.sum(1)[:, None] - both).clamp(min=1)
    return torch.stack([torch.as_tensor(linear_sum_assignment(one, maximize=True)[1]) for one in iou.cpu()])


class SPOT(nn.Module):
    """encoder: a ViT; its copy, whose last blocks learn, is kept. decoder: makes a decoder of slots, for each
    of the two. Call graduate() between the stages."""

    def __init__(self, encoder, decoder, k=4, d=64, rounds=3, tune=2, weight=.005):
        super().__init__()
        self.frozen, self.encoder, self.weight, self.k = encoder, copy.deepcopy(encoder), weight, k
        self.teacher = AutoEncoder(encoder.dim, decoder(), k, d, rounds, "gaussian")
        self.student = AutoEncoder(encoder.dim, decoder(), k, d, rounds, "queries")
        self.frozen.requires_grad_(False)
        self.encoder.requires_grad_(False)
        self.encoder.blocks[len(encoder.blocks) - tune:].requires_grad_(True)
        self.graduated = False

    def graduate(self):
        """The teacher is done and stays as it is; from now on the student learns."""
        self.graduated = True
        self.teacher.requires_grad_(False)

    @staticmethod
    def features(encoder, x):                                    # [B,3,S,S] -> [B,N,C], last block, no norm
        return encoder.eval().blocks(encoder.prepend(encoder.embed(x)))[:, encoder.prefix:].float()

    def forward(self, v, order=0, order_t=0):                    # [B,3,S,S] -> loss
        with torch.no_grad():
            h = self.features(self.frozen, v)                    # [B,N,C]
        if not self.graduated:
            told, masks, a = self.teacher(h, h, order)
        else:
            told, masks, a = self.student(self.features(self.encoder, v), h, order)
        self.rec, self.masks, self.att = F.mse_loss(told, h), masks.detach(), h.new_zeros(())
        self.s = (self.student if self.graduated else self.teacher).s.flatten(0, 1)      # [BK,D]
        if self.graduated and self.weight:
            with torch.no_grad():
                y = self.teacher(h, h, order_t)[1].argmax(1)     # [B,N]
                slot = match(y, a.argmax(1), self.k).to(y.device).gather(1, y)   # [B,N]
            self.att = -a.clamp_min(1e-8).log().gather(1, slot[:, None]).mean()
        return self.rec + self.weight * self.att

    @torch.no_grad()
    def segment(self, x, orders=9):              # [B,3,S,S] -> {who: masks [B,K,N]}, mean over orders
        h, x = self.features(self.frozen, x), self.features(self.encoder, x)
        found = {}
        for who, net, inputs in (("teacher", self.teacher, h), ("student", self.student, x)):
            noise = torch.random.get_rng_state()
            out = []
            for order in range(orders):                          # the same slots for all orders
                torch.random.set_rng_state(noise)
                out.append(net(inputs, h, order))
            found |= {f"A_DEC, {who}": torch.stack([masks for _, masks, _ in out]).mean(0),
                      f"A_SLOT, {who}": out[0][2]}
        return found


def gradient_norms(net, h, order):                               # [B,N,C] -> [N]
    """How much patch n needs the slots: the norm of d |told_n - h_n|^2 / d slots, mean over images."""
    with torch.no_grad():
        s, _ = net.slots(net.mlp(h))
    s.requires_grad_(True)
    error = (net.decoder(s, h, order)[0] - h).square().mean(2).sum(0)    # [N]
    grads = [torch.autograd.grad(e, s, retain_graph=True)[0].flatten(1).norm(dim=1).mean() for e in error]
    return torch.stack(grads)


def build(cfg):
    encoder = make_encoder(cfg, pool="mean")
    n, c = encoder.pos_embed.shape[1] - 1, encoder.dim
    if cfg.decoder not in ("autoregressive", "parallel", "mlp"):
        common.fail(f"--decoder {cfg.decoder} is unknown: give autoregressive, parallel or mlp")

    def decoder():
        if cfg.decoder == "mlp":
            return MLP(cfg.dim, c, n, cfg.hidden)
        return Autoregressive(cfg.dim, c, n, cfg.depth, cfg.heads, cfg.decoder == "parallel")

    return SPOT(encoder, decoder, cfg.k, cfg.dim, cfg.rounds, cfg.tune, cfg.attention)


def pretrained(cfg, folder):                                     # -> the file with the encoder's weights
    """By mae.py on the same images, in a run folder inside of `folder`; what is finished is not run again."""
    out = folder / f"mae-{cfg.pretrain}"
    same = dict(data=cfg.data, data_dir=cfg.data_dir, image_size=cfg.image_size, encoder=cfg.encoder,
                seed=cfg.seed, device=cfg.device, steps=cfg.pretrain, out=out)
    if not list(out.glob("*/encoder.pt")):
        flags = [part for name, value in same.items() for part in (f"--{name}", str(value))]
        subprocess.run([sys.executable, Path(__file__).with_name("mae.py"), *flags], check=True)
    return str(next(out.glob("*/encoder.pt")))


def picture(run, method, test, found):
    """The four masks; and what each patch needs of the slots, row by row and over the nine orders."""
    rows = {"x": test[:10]} | {name: coloured(masks[:10].argmax(1)) for name, masks in found.items()}
    h = method.features(method.frozen, normalise(test[:50])).detach()
    each = torch.stack([gradient_norms(method.student, h, order) for order in range(9)])         # [9,N]
    maps = torch.cat([each, each.mean(0, keepdim=True)])
    maps = enlarge(maps[None] / maps.amax(), test.shape[3])[0, :, None]  # [10,1,S,S]
    rows["gradient: nine orders, mean"] = maps.expand(-1, 3, -1, -1)
    common.save_grid(run.folder / "slots.png", rows)
    return {"gradient, last / first patch": (each[0, -8:].mean() / each[0, :8].mean()).item(),
            "the same, nine orders": (each.mean(0)[-8:].mean() / each.mean(0)[:8].mean()).item()}


def main(cfg):
    run = Run(cfg, __file__)
    data = load_data(cfg, run.device)
    if common.world() > 1:
        common.fail("two networks learn in turn, which takes one process: run it without torchrun")
    if not cfg.weights and cfg.pretrain:
        cfg.weights = pretrained(cfg, run.folder)
    method = build(cfg).to(run.device)
    optimizer = make_optimizer(cfg, method)
    test = data.test_images[:500]
    h = torch.cat([method.features(method.frozen, normalise(x)) for x in test.split(100)]).detach()
    model = run.start(method.train(), data, {"mean feature": h.var(0).mean().item()}, optimizer)
    stage = int(cfg.teacher * run.total)                         # the first step of the student

    for step, index in run.steps(len(data.images)):
        x = data.images[index]                                   # [B,3,S,S] uint8
        set_lr(optimizer, cosine(step, run.total, cfg.lr, warmup=cfg.warmup))
        if step >= stage and not method.graduated:               # at the stage, or resumed behind it
            method.graduate()
        if method.graduated:                                     # warms up anew
            set_lr(optimizer, cosine(step - stage, run.total - stage, cfg.lr, warmup=cfg.warmup))
        orders = torch.randint(9, (2,)).tolist() if cfg.permutations else (0, 0)
        with run.autocast():
            loss = model(normalise(x), *orders)
        optimizer.zero_grad()
        run.finite(loss).backward()
        nn.utils.clip_grad_norm_(method.parameters(), cfg.clip, norm_type=float("inf"))
        optimizer.step()
        run.log(loss, rec=method.rec, att=method.att, slots=method.s, **monitors(method.masks))

    found = [method.eval().segment(normalise(x)) for x in test.split(100)]
    found = {name: enlarge(torch.cat([f[name] for f in found]), test.shape[3]) for name in found[0]}
    if not stage:                                                # there was no teacher
        found = {name: masks for name, masks in found.items() if "student" in name}
    gradient = picture(run, method, test, found)
    for text in complaints(found["A_SLOT, student"]):
        run.print(f"WARNING: {text}")
    if data.test_masks is None:
        return run.finish(**gradient)
    found |= {"blocks": blocks(cfg.k, test.shape[3]), "k-means": enlarge(clusters(h, cfg.k), test.shape[3])}
    return run.finish(**compare(found, data.test_masks[:500]), **gradient)


if __name__ == "__main__":
    main(parse(Config, PAPER))

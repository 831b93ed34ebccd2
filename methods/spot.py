"""SPOT (2024): slots learn from where their decoder looked.

Kakogeorgiou, Gidaris, Karantzalos, Komodakis. SPOT: Self-Training with Patch-Order Permutation for
Object-Centric Learning with Autoregressive Transformers. CVPR 2024, arXiv 2312.00648.

    x --ViT (frozen)--> // h [B,N,C] --teacher: slots--> decoder, patches in a random order --loss--> h
                                                            |  A_DEC [B,K,N], where it looks: argmax,
                                                            //  matched to the student's slots
                                                            v  loss, x .005
    x --ViT, last blocks learn--> [B,N,C] --student: slots, learned queries--> A_SLOT [B,K,N]
        (kept)                                         '--> decoder, patches in a random order --loss--> h

Good at: masks better than its teacher's. Not at: anything its encoder does not tell apart; it trains two
networks, one after the other.

Run      python methods/spot.py
         A_DEC: mBO .42 ± .02 (its teacher .43 ± .01, untrained .13, blocks .22, k-means of h .43), FG-ARI
         .51 ± .02 (.44 ± .01, .09, .39, .40), ARI .50 ± .05 (.54 ± .02, -.02, .04, .54); 51 s on 2 cores,
         after dino.py's own run
Differs  the encoder is a small ViT that dino.py trains on single toys, first, unless --weights gives one;
         the quick run's decoder is the MLP, positions as in dinosaur.py, for the paper's takes twice the
         steps; nor is the encoder tuned; each patch's features are told less their mean, in units of their
         deviation, unless --no-norm; images are not flipped; the rate falls to 0; the MLP sees the slots
         themselves (theirs: a projection). The autoregressive decoder has no LayerNorm on the residual stream
         before the first block, and Xavier's start everywhere; the queries start two to three times smaller.
"""
import copy
import subprocess
import sys
from dataclasses import dataclass, replace
from pathlib import Path

import torch
import torch.nn.functional as F
from scipy.optimize import linear_sum_assignment
from torch import nn

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))     # run from any folder, without an install
import common
from common import Run, cosine, load_data, make_encoder, make_optimizer, parse, set_lr
from kernels.decoders import MLP, Autoregressive, frames
from kernels.segmentation import blocks, clusters, compare
from kernels.slots import Slots, coloured, complaints, enlarge, monitors
from kernels.views import normalise


@dataclass
class Config(common.Config):
    data: str = "toys:objects=3,jitter=1,small=.5,large=.6,grey,parts=0,n=6000"  # or folder:PATH
    encoder: str = "vit_micro/8"   # a ViT: vit_micro/8, vit_small/8, vit_base ...; see --weights
    pretrain: bool = True          # without --weights: take the one that dino.py has trained, or let it
    times: int = 2                 # the encoder sees the images enlarged so
    steps: int = 2200              # optimisation steps of teacher and student together
    batch_size: int = 8            # images a step, all processes together
    weight_decay: float = 0.       # on weights and tokens, not on biases and norms
    clip: float = .3               # largest entry of the gradient, to which all is scaled down; 0 is any
    teacher: float = .5            # part of the run that trains the teacher; 0: there is none
    tune: int = 0                  # last blocks of the encoder that learn with the student
    attention: float = .005        # weight of the student's loss against the teacher's masks
    k: int = 4                     # number K of slots
    dim: int = 64                  # width D of a slot
    rounds: int = 3                # rounds T of the competition
    decoder: str = "mlp"           # autoregressive, parallel (PA: every patch from the slots alone) or mlp
    permutations: bool = True      # autoregressive: one of nine orders a step; else row by row
    norm: bool = True              # tell each patch's features less their mean, over their deviation
    hidden: int = 128              # width of mlp
    relative: bool = True          # mlp's positions count in the slot's frame, too
    depth: int = 1                 # blocks of autoregressive
    heads: int = 4                 # heads of autoregressive


# Official code, COCO: rate 4e-4, 50 epochs for the teacher, 50 for the student; DINO's ViT-B/16 by --weights.
PAPER = dict(data="folder:coco", image_size=224, encoder="vit_base/16", times=1, epochs=100, batch_size=64,
             lr=4e-4, warmup=.1, tune=4, k=7, dim=256, decoder="autoregressive", norm=False, hidden=2048,
             relative=False, depth=4, heads=6)


class AutoEncoder(nn.Module):
    """Features [B,N,C] -> what its slots tell of the target h [B,N,C], A_DEC and A_SLOT [B,K,N]."""

    def __init__(self, c, decoder, k, d, rounds, init):
        super().__init__()
        self.mlp = nn.Sequential(nn.LayerNorm(c), nn.Linear(c, c), nn.ReLU(), nn.Linear(c, c))
        self.slots, self.decoder = Slots(k, c, d, rounds, 4 * d, init), decoder

    def forward(self, x, h, order=0):
        self.s, a = self.slots(self.mlp(x))                      # [B,K,D], [T,B,K,N]
        told, masks = self.decoder(self.s, h, order, frames(a[-1]))
        return told.float(), masks, a[-1]


def match(teacher, student, k):                                  # segments [B,N] each -> [B,K]
    """Which of the student's slots overlaps best with each of the teacher's, one to one."""
    t, s = F.one_hot(teacher, k).float(), F.one_hot(student, k).float()  # [B,N,K]
    both = t.mT @ s                                              # [B,K,K]
    iou = both / (t.sum(1)[:, :, None] + s.sum(1)[:, None] - both).clamp(min=1)
    return torch.stack([torch.as_tensor(linear_sum_assignment(one, maximize=True)[1]) for one in iou.cpu()])


class SPOT(nn.Module):
    """encoder: a ViT; its copy `frozen` stays as it is. decoder(): a new decoder of slots, one for each of
    teacher and student. Call graduate() between the stages."""

    def __init__(self, encoder, decoder, k=4, d=64, rounds=3, times=1, norm=False, tune=4, weight=.005):
        super().__init__()
        self.encoder, self.times, self.weight, self.k, c = encoder, times, weight, k, encoder.dim
        self.frozen = copy.deepcopy(encoder).requires_grad_(False)
        self.norm = nn.LayerNorm(c, elementwise_affine=False) if norm else nn.Identity()
        self.teacher = AutoEncoder(c, decoder(), k, d, rounds, "gaussian")
        self.student = AutoEncoder(c, decoder(), k, d, rounds, "queries")
        self.first = len(encoder.blocks) - tune                  # the first block that learns
        self.encoder.requires_grad_(False).blocks[self.first:].requires_grad_(True)
        self.graduated = False

    def graduate(self):
        """The teacher is done and stays as it is; from now on the student learns."""
        self.graduated = True
        self.teacher.requires_grad_(False)

    def features(self, x):     # [B,3,S,S] -> target, the student's input [B,N,C]: last block, no final norm
        frozen, tuned = self.frozen.eval(), self.encoder.eval().blocks[self.first:]
        x = F.interpolate(x, scale_factor=self.times, mode="bilinear")
        with torch.no_grad():
            x = frozen.blocks[:self.first](frozen.prepend(frozen.embed(x)))
            h = self.norm(frozen.blocks[self.first:](x)[:, frozen.prefix:].float())
        return h, tuned(x)[:, frozen.prefix:].float() if self.graduated else h

    def forward(self, v, order=0, order_t=0):                    # [B,3,S,S] -> loss
        net = self.student if self.graduated else self.teacher
        h, x = self.features(v)                                  # [B,N,C] each
        told, self.masks, a = net(x, h, order)
        self.rec, self.att, self.s = F.mse_loss(told, h), h.new_zeros(()), net.s.flatten(0, 1)   # s [BK,D]
        if self.graduated and self.weight:                       # else it learns by reconstruction alone
            with torch.no_grad():
                y = self.teacher(h, h, order_t)[1].argmax(1)     # [B,N]
                slot = match(y, a.argmax(1), self.k).to(y.device).gather(1, y)   # [B,N]
            self.att = -a.clamp_min(1e-8).log().gather(1, slot[:, None]).mean()
        return self.rec + self.weight * self.att

    @torch.no_grad()
    def segment(self, v, orders=9):              # [B,3,S,S] -> {who: masks [B,K,N]}, mean over orders
        (h, x), found = self.features(v), {}
        for who, net, inputs in (("teacher", self.teacher, h), ("student", self.student, x)):
            s, a = net.slots(net.mlp(inputs))                    # the same slots for all orders
            masks = [net.decoder(s, h, order, frames(a[-1]))[1] for order in range(orders)]
            found |= {f"A_DEC, {who}": torch.stack(masks).mean(0), f"A_SLOT, {who}": a[-1]}
        return found


def gradient_norms(net, x, h, order):                            # [B,N,C] each -> [N]
    """How much patch n needs the slots: the norm of d |told_n - h_n|^2 / d slots, mean over images."""
    with torch.no_grad():
        s, a = net.slots(net.mlp(x))
    s.requires_grad_(True)
    error = (net.decoder(s, h, order, frames(a[-1]))[0] - h).square().mean(2).sum(0)    # [N]
    grads = [torch.autograd.grad(e, s, retain_graph=True)[0].flatten(1).norm(dim=1).mean() for e in error]
    return torch.stack(grads)


def build(cfg):
    encoder = make_encoder(cfg, pool="cls")                      # an option of ViTs alone
    if cfg.tune > len(encoder.blocks):
        common.fail(f"--tune {cfg.tune}: the encoder has {len(encoder.blocks)} blocks")
    n, c = (cfg.image_size * cfg.times // encoder.patch) ** 2, encoder.dim
    if cfg.decoder not in ("autoregressive", "parallel", "mlp"):
        common.fail(f"--decoder {cfg.decoder} is unknown: give autoregressive, parallel or mlp")
    if c % cfg.heads:
        common.fail(f"--heads {cfg.heads}: the decoder is as wide as the encoder, {c}, which is no multiple")

    def decoder():
        if cfg.decoder == "mlp":
            return MLP(cfg.dim, c, n, cfg.hidden, cfg.relative)
        return Autoregressive(cfg.dim, c, n, cfg.depth, cfg.heads, cfg.decoder == "parallel")

    if cfg.teacher >= 1:
        common.fail(f"--teacher {cfg.teacher} leaves no step for the student: give a part below 1")
    return SPOT(encoder, decoder, cfg.k, cfg.dim, cfg.rounds, cfg.times, cfg.norm, cfg.tune, cfg.attention)


def pretrained(cfg):                                             # -> the file with the encoder's weights
    file = Path(cfg.out).expanduser() / f"dino-toys-grey-seed{cfg.seed}/encoder.pt"
    if not (own := cfg.encoder == Config.encoder) or not file.exists():
        cmd = [sys.executable, Path(__file__).with_name("dino.py")]
        cmd += [f"--{key}={getattr(cfg, key)}" for key in ("seed", "out", "device")]
        if not own or common.world() > 1 or subprocess.run(cmd, check=False).returncode:
            common.fail(f"dino.py has trained no {cfg.encoder}: give it by --weights" + ", or run it" * own)
    return str(file)


def picture(run, method, test, found, orders):
    """The masks; and what each patch needs of the slots, in each order and on average."""
    rows = {"x": test[:10]} | {name: coloured(masks[:10].argmax(1)) for name, masks in found.items()}
    h, x = (y.detach() for y in method.features(normalise(test[:50])))
    each = torch.stack([gradient_norms(method.student, x, h, order) for order in range(orders)])
    each = torch.cat([each, each.mean(0, keepdim=True)])         # [orders+1,N]
    maps = enlarge(each[None] / each.amax(), test.shape[3])[0, :, None].expand(-1, 3, -1, -1)
    common.save_grid(run.folder / "slots.png", rows | {"gradients, mean": maps})
    side = int(each.shape[1] ** .5)
    return {"gradients, last row over first": (each[-1, -side:].mean() / each[-1, :side].mean()).item()}


def main(cfg):
    run = Run(cfg, __file__)
    if common.world() > 1:
        common.fail("two networks learn in turn, which takes one process: run it without torchrun")
    data, weights = load_data(cfg, run.device), cfg.weights or (pretrained(cfg) if cfg.pretrain else "")
    method = build(replace(cfg, weights=weights)).to(run.device)
    optimizer = make_optimizer(cfg, method)
    test = data.test_images[:500]
    v = normalise(test)
    h, before = method.features(v)[0], method.eval().segment(v, 1)["A_DEC, teacher"]     # [n,N,C], [n,K,N]
    model = run.start(method.train(), data, {"mean feature": h.var(0).mean().item()}, optimizer)
    stage = int(cfg.teacher * run.total)                         # the first step of the student
    method.weight *= stage > 0                                   # where no step is a teacher's

    for step, index in run.steps(len(data.images)):
        x = data.images[index]                                   # [B,3,S,S] uint8
        first, last = (0, stage) if step < stage else (stage, run.total)
        set_lr(optimizer, cosine(step - first, last - first, cfg.lr, warmup=cfg.warmup))
        if step >= stage:
            method.graduate()
        order = torch.randint(9, (2,)).tolist() if cfg.permutations else (0, 0)  # student's, teacher's
        with run.autocast():
            loss = model(normalise(x), *order)
        optimizer.zero_grad()
        run.finite(loss).backward()
        nn.utils.clip_grad_norm_(method.parameters(), cfg.clip or float("inf"), norm_type=float("inf"))
        optimizer.step()
        run.log(loss, rec=method.rec.item(), att=method.att.item(), slots=method.s, **monitors(method.masks))

    method.graduate()                                            # a run resumed at its end has had no step
    orders = 9 if cfg.decoder == "autoregressive" and cfg.permutations else 1
    found = [method.eval().segment(normalise(x), orders) for x in test.split(100)]
    found = {name: enlarge(torch.cat([f[name] for f in found]), test.shape[3]) for name in found[0]}
    if not stage:                                                # there was no teacher
        found = {name: masks for name, masks in found.items() if "student" in name}
    gradients = picture(run, method, test, found, orders)
    for text in complaints(found["A_SLOT, student"]):
        run.print(f"WARNING: {text}")
    found |= {"untrained": enlarge(before, test.shape[3]), "blocks": blocks(cfg.k, test.shape[3]),
              "k-means": enlarge(clusters(h, cfg.k), test.shape[3])}
    return run.finish(**compare(found, data.test_masks, int(h.shape[1] ** .5)), **gradients)


if __name__ == "__main__":
    main(parse(Config, PAPER))

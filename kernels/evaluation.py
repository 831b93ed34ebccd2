"""How good features are: weighted k-NN, linear probes of images and of places, two numbers that name
collapse; visual words, and the likelihood of a histogram."""
import math

import torch
import torch.nn.functional as F
from torch import Tensor


def knn(bank: Tensor, labels: Tensor, queries: Tensor, k: int = 20, tau: float = .07) -> Tensor:
    """Weighted k-NN (Wu et al. 2018, arXiv 1805.01978): the k nearest by cosine s vote with exp(s / tau).
    Features bank [N,D] of the classes labels [N], queries [M,D] -> their classes [M]."""
    bank, predictions = F.normalize(bank, dim=1), []
    for q in F.normalize(queries, dim=1).split(500):
        s, i = (q @ bank.T).topk(min(k, len(bank)))              # [m,k]
        s = s.to(torch.promote_types(s.dtype, torch.float32))    # fp64 stays what it is
        w = ((s - s[:, :1]) / tau).exp()                         # [m,k]  the nearest has 1: no overflow
        votes = F.one_hot(labels[i]) * w[..., None]              # [m,k,classes]
        predictions.append(votes.sum(1).argmax(1))
    return torch.cat(predictions)


def percent(predicted: Tensor, y: Tensor) -> float:
    """How many of the classes [N] are right, in %; shapes broadcast."""
    return round(100 * (predicted == y).cpu().double().mean().item(), 2)


def some_of_each_class(labels: Tensor, share: float) -> Tensor:
    """Indices [n] of a random share of each class, at least one of it, ascending."""
    parts = [(labels == y).nonzero()[:, 0] for y in labels.unique().tolist()]
    parts = [p[torch.randperm(len(p), device=p.device)[:math.ceil(round(share * len(p), 6))]]
             for p in parts]
    return torch.cat(parts).sort().values


@torch.enable_grad()
def logits_of(x: Tensor, y: Tensor, x_test: Tensor, l2: float = 1e-3) -> Tensor:
    """Logistic regression on standardised features: mean cross-entropy + l2/2 |W|^2, convex, by full-batch
    L-BFGS, so no learning rate is to tune, in fp32. y: classes [N], or the share of each [N,K]. -> [M,K]"""
    x, x_test = x.detach().float(), x_test.detach().float()
    mean, std = x.mean(0), x.std(0) + 1e-6
    x, x_test = (x - mean) / std, (x_test - mean) / std
    k = y.shape[1] if y.ndim > 1 else int(y.max()) + 1
    w = torch.zeros(x.shape[1] + 1, k, device=x.device, requires_grad=True)      # last row: bias
    solver = torch.optim.LBFGS([w], max_iter=100, line_search_fn="strong_wolfe")

    def loss():
        w.grad = None
        value = F.cross_entropy(torch.addmm(w[-1], x, w[:-1]), y) + l2 / 2 * w[:-1].square().sum()
        value.backward()
        return value
    solver.step(loss)
    return torch.addmm(w[-1], x_test, w[:-1]).detach()


def linear_probe(x: Tensor, y: Tensor, x_test: Tensor, l2: float = 1e-3) -> Tensor:
    """Classes [M] of features x_test [M,D], told by logistic regression on x [N,D], y [N]: see logits_of."""
    return logits_of(x, y, x_test, l2).argmax(1)


def dense_probe(a: Tensor, y: Tensor, a_test: Tensor, size: tuple, l2: float = 1e-3) -> Tensor:
    """Semantic segmentation by one linear layer on maps a [N,D,h,w], y [N,H,W] the class of each pixel: it
    learns the share of each class in each cell; its logits are enlarged bilinearly. -> classes of a_test
    [M,*size]"""
    k = int(y.max()) + 1
    shares = torch.stack([F.adaptive_avg_pool2d((y == c).float(), a.shape[2:]) for c in range(k)], 1)
    rows = [m.movedim(1, 3).flatten(0, 2) for m in (a, shares, a_test)]  # [N*h*w,D], [N*h*w,K], [M*h*w,D]
    z = logits_of(*rows, l2).view(len(a_test), *a_test.shape[2:], k).movedim(3, 1)       # [M,K,h,w]
    return F.interpolate(z, size, mode="bilinear").argmax(1)


@torch.no_grad()
def segment(encode, data, n: int = 2000) -> tuple[Tensor, Tensor]:
    """Classes [M,H,W] of the test images' pixels, told by a linear layer on maps, learned from n images at
    most, and the true ones: 0 is the ground, 1 + y a toy of class y. encode: uint8 [n,3,H,W] -> [n,D,h,w]"""
    def places(images, masks, labels):                           # -> [n,D,h,w], [n,H,W]
        a = torch.cat([encode(x).float() for x in images.split(100)])
        return a, (masks > 0) * (1 + labels[:, None, None])
    a, truth = places(data.test_images, data.test_masks, data.test_labels)
    few = places(data.images[:n], data.masks[:n], data.labels[:n])
    return dense_probe(*few, a, truth.shape[1:]), truth


def class_iou(predicted: Tensor, truth: Tensor) -> float:
    """mIoU of class maps [M,H,W], values from 0: the mean over the classes that are in either, each over the
    pixels of all images together, as PASCAL VOC counts, but none is ignored: 255 is a class as others are."""
    if predicted.shape != truth.shape:
        raise ValueError(f"maps must have one shape, got {list(predicted.shape)} and {list(truth.shape)}")
    k = 1 + int(max(predicted.max(), truth.max()))
    n = (k * truth.long() + predicted).flatten().bincount(minlength=k * k).view(k, k)    # pixels: truth, told
    union = n.sum(0) + n.sum(1) - n.diag()                       # [K]
    return (n.diag() / union)[union > 0].mean().item()


@torch.no_grad()
def spread(h: Tensor) -> tuple[float, float]:
    """Collapse monitors of features [B,D]. Std of the l2-normalised features times sqrt(D): 1 on a uniform
    sphere, 0 for a constant. Effective rank, exp of the entropy of the centred features' normalised singular
    values: the dimensions in use. Noise about a constant fools the rank, a line fools the std: take both."""
    h = F.normalize(h.float(), dim=1)
    s = torch.linalg.svdvals(h - h.mean(0))
    entropy = torch.special.entr(s / s.sum().clamp_min(1e-12)).sum()
    return h.std(0).mean().item() * h.shape[1] ** .5, entropy.exp().item()


def patches_by_word(d: Tensor, images: Tensor, n: int = 10) -> dict[str, Tensor]:
    """Distances d [N,h*w,K] of places to words, images uint8 [N,3,H,W] -> {word and its use: [n,3,P,P]}, the
    patches nearest to n words, from the most used to the least, each of another image."""
    rows, side = {}, math.isqrt(d.shape[1])
    cell = images.shape[2] // side                               # of images that it divides
    x = F.interpolate(images.float(), side * cell)
    patches = F.unfold(x, 3 * cell, padding=cell, stride=cell).byte()    # [N,3*P*P,h*w]
    share = d.argmin(2).flatten().bincount(minlength=d.shape[2]) / d[:, :, 0].numel()    # [K]
    for k in share.argsort(descending=True)[::math.ceil(len(share) / n)].tolist():
        nearest, place = d[:, :, k].min(1)                       # [N] each
        best = nearest.argsort()[:n]
        rows[f"word {k}, {share[k]:.1%}"] = patches[best, :, place[best]].view(-1, 3, 3 * cell, 3 * cell)
    return rows


def histogram_nats(x: Tensor, x_test: Tensor, k: int) -> float:
    """Nats a value of x_test [M,P], from 0..k-1, by histograms of x [N,P], one for each of P places, in which
    every value counts once more than it was seen."""
    place = torch.arange(x.shape[1], device=x.device)            # [P]
    counts = 1 + (k * place + x).flatten().bincount(minlength=k * len(place)).view(-1, k)        # [P,k]
    return -(counts / counts.sum(1, keepdim=True)).log()[place, x_test.long()].mean().item()

"""How well predicted masks find objects: ARI, FG-ARI, mBO and mIoU of single images.

As DINOSAUR (Seitzer et al., ICLR 2023, arXiv 2209.14860) and SPOT (Kakogeorgiou et al., CVPR 2024, arXiv
2312.00648) evaluate: masks at the resolution of the truth (enlarge the soft ones bilinearly, then argmax),
background is no object, pixels to ignore count nowhere, images count the same (others average over objects).

    predicted [B,H,W], values 0..K-1, truth [B,H,W], 0 = background, 1..T = objects, 255 = ignore
        --pixels that two masks share--> n [B,T+1,K] --> ARI, and of rows 1..T alone: FG-ARI
                                          '--IoU of every pair [B,T,K]--> best of each object: mBO
                                                                          '--best one-to-one: mIoU

mBO^i has a mask for each object, mBO^c one for each class: give truth as labels of either. Objects that
overlap are no matter for a truth of labels: what is visible counts.
"""
import torch
import torch.nn.functional as F
from scipy.cluster.vq import kmeans2
from scipy.optimize import linear_sum_assignment
from torch import Tensor

IGNORE = 255


def shared_pixels(predicted: Tensor, truth: Tensor) -> Tensor:
    """n [B,T+1,K], float64: how many pixels are in mask i of the truth and mask j of the prediction."""
    if predicted.shape != truth.shape or predicted.ndim != 3:
        raise ValueError(f"masks must be [B,H,W] alike, got {list(predicted.shape)} and {list(truth.shape)}")
    p, t = (x.cpu() if x.is_mps else x for x in (predicted, truth))      # MPS has no float64
    p, t = p.flatten(1).long(), t.flatten(1).long()              # [B,HW]
    seen = t != IGNORE
    t = t.where(seen, 0)
    rows = F.one_hot(t, int(t.max()) + 1).double() * seen[..., None]     # [B,HW,T+1]
    return rows.mT @ F.one_hot(p, int(p.max()) + 1).double()


def ari(n: Tensor) -> Tensor:
    """Adjusted Rand index [B] of tables n [B,I,J] (Hubert and Arabie 1985): 1 for equal partitions, 0 on
    average for independent ones. 1 too where both are one mask, or nothing is left to compare."""
    def pairs(x):
        return x * (x - 1) / 2
    both, rows, columns = pairs(n).sum((1, 2)), pairs(n.sum(2)).sum(1), pairs(n.sum(1)).sum(1)   # [B] each
    expected = rows * columns / pairs(n.sum((1, 2))).clamp(min=1)
    most = (rows + columns) / 2
    return torch.where(most == expected, 1., (both - expected) / (most - expected))


def fg_ari(n: Tensor) -> Tensor:
    """ARI [B] of the objects' pixels; what becomes of the background does not matter. NaN without objects."""
    n = n[:, 1:]
    return ari(n).where(n.sum((1, 2)) > 0, torch.nan)


def iou(n: Tensor) -> tuple[Tensor, Tensor]:
    """IoU [B,T,K] of each object with each predicted mask, and which objects there are, bool [B,T]."""
    union = n.sum(2, keepdim=True) + n.sum(1, keepdim=True) - n  # [B,T+1,K]
    return (n / union.clamp(min=1))[:, 1:], n[:, 1:].sum(2) > 0


def mbo(n: Tensor) -> Tensor:
    """Mean best overlap [B]: each object's best IoU, a mask may serve several. NaN without objects."""
    overlap, there = iou(n)
    return (overlap.amax(2) * there).sum(1) / there.sum(1)


def miou(n: Tensor) -> Tensor:
    """Mean IoU [B] of the objects in the best one-to-one assignment, 0 for those that get no mask."""
    overlap, there = iou(n)
    best = [o[linear_sum_assignment(o, maximize=True)].sum().item() for o in overlap.cpu()]  # absent rows: 0
    return n.new_tensor(best) / there.sum(1)


def scores(predicted: Tensor, truth: Tensor) -> dict[str, float]:
    """All of them, the mean over the images that have objects: ari, fg_ari, mbo, miou."""
    n = shared_pixels(predicted, truth)
    n = n[n[:, 1:].sum((1, 2)) > 0]
    return {f.__name__: f(n).mean().item() for f in (ari, fg_ari, mbo, miou)}


def blocks(k: int, size: int) -> Tensor:
    """What needs no eyes: [1,size,size] cut into a x b equal blocks, the most square with a b <= k."""
    a, at = int(k ** .5), torch.arange(size)
    return (at * a // size * (k // a))[:, None][None] + at * (k // a) // size


def averaged(truth: Tensor, side: int) -> Tensor:
    """The truth [B,H,W] as soft masks [B,T+1,H,W] that know side x side places alone: its mean in each,
    enlarged as predicted ones are. No bound: what is thin gets lost, and FG-ARI likes masks too wide."""
    seen = truth != IGNORE
    rows = F.one_hot(truth.long() * seen).movedim(3, 1) * seen[:, None].float()
    return F.interpolate(F.adaptive_avg_pool2d(rows, side), truth.shape[1:], mode="bilinear")


def compare(found: dict[str, Tensor], truth: Tensor | None, side: int) -> dict[str, float]:
    """All scores side by side of soft masks [B,K,H,W], or of one partition [1,H,W] of all images, and of the
    truth itself where it is known at side x side places alone; truth: the masks [B or more,H,W]. Without it,
    nothing."""
    if truth is None:
        return {}
    rows, truth = {}, truth[:max((len(m) for m in found.values() if m.ndim == 4), default=None)]
    for who, masks in (found | {"truth averaged": averaged(truth, side)}).items():
        p = (masks.argmax(1) if masks.ndim == 4 else masks).to(truth.device).expand_as(truth)
        rows |= {f"{metric}, {who}": value for metric, value in scores(p, truth).items()}
    return rows


def clusters(h: Tensor, k: int) -> Tensor:
    """Masks [B,K,N] by k-means of the features [B,N,C] of each image alone: what needs no learning."""
    y = [torch.from_numpy(kmeans2(one.numpy(), k, minit="++", seed=0)[1]) for one in h.cpu().double()]
    return F.one_hot(torch.stack(y).long(), k).mT.to(h.device)

"""sRGB to CIE Lab and back, white point D65: L is what a grey picture shows, a and b are the colour.

The bins of a and b: Zhang, Isola, Efros. Colorful Image Colorization. ECCV 2016, arXiv 1603.08511.
"""

import torch

# IEC 61966-2-1: linear sRGB -> XYZ, each row divided by the white point, so that white is (1, 1, 1).
XYZ = torch.tensor([[.4124564, .3575761, .1804375], [.2126729, .7151522, .0721750],
                    [.0193339, .1191920, .9503041]], dtype=torch.float64)
XYZ = XYZ / XYZ.sum(1, keepdim=True)


def mix(matrix, x):                                              # [3,3], [B,3,H,W] -> [B,3,H,W]
    """Sums of products: autocast and TF32 would round those of a convolution or a matmul."""
    return sum(column[:, None, None] * x[:, i:i + 1] for i, column in enumerate(matrix.to(x).T))


def rgb_to_lab(x):
    """Colours [B,3,H,W], floats in 0..1 -> L in 0..100, a and b in about -110..110."""
    linear = torch.where(x > .04045, ((x.clamp(min=0) + .055) / 1.055) ** 2.4, x / 12.92)
    t = mix(XYZ, linear)                                         # [B,3,H,W]  X, Y, Z of white are 1
    f = torch.where(t > (6 / 29) ** 3, t.clamp(min=1e-8) ** (1 / 3), t * (29 / 6) ** 2 / 3 + 4 / 29)
    x, y, z = f.split(1, 1)
    return torch.cat([116 * y - 16, 500 * (x - y), 200 * (y - z)], 1)


def lab_to_rgb(lab):
    """Its inverse; colours that no screen has are clipped to 0..1."""
    light, a, b = lab.split(1, 1)
    y = (light + 16) / 116
    f = torch.cat([y + a / 500, y, y - b / 200], 1)
    t = torch.where(f > 6 / 29, f ** 3, (f - 4 / 29) * 3 * (6 / 29) ** 2)
    x = mix(XYZ.inverse(), t).clamp(0, 1)
    return torch.where(x > .0031308, 1.055 * x.clamp(min=1e-8) ** (1 / 2.4) - .055, 12.92 * x)


# For a = -90, -80, ..., 100: the first and last b, in steps of 10. The paper's list, which no rule gives.
B_RANGE = [(50, 90), (20, 90), (0, 90), (-20, 90), (-30, 100), (-40, 100), (-50, 100), (-50, 100), (-60, 100),
           (-70, 100), (-80, 90), (-80, 90), (-90, 90), (-100, 90), (-100, 80), (-110, 80), (-110, 80),
           (-110, 70), (-110, 70), (-90, 0)]


def ab_bins():
    """The 313 centres (a, b) of the squares of 10 x 10 into which colours are sorted, [313,2]."""
    return torch.tensor([(10. * i - 90, float(b)) for i, (first, last) in enumerate(B_RANGE)
                         for b in range(first, last + 1, 10)])

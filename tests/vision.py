"""How far apart two colours look, to full and to colour-blind eyes: Machado et al. (2009) and CIEDE2000."""

import numpy as np

# Machado, Oliveira & Fernandes (2009), severity 1.0: linear RGB as seen without the cones for long, middle and short
# wavelengths
VISIONS = {
    "full": np.eye(3),
    "protan": np.array(
        [[0.152286, 1.052583, -0.204868], [0.114503, 0.786281, 0.099216], [-0.003882, -0.048116, 1.051998]]
    ),
    "deutan": np.array(
        [[0.367322, 0.860646, -0.227968], [0.280085, 0.672501, 0.047413], [-0.011820, 0.042940, 0.968881]]
    ),
    "tritan": np.array(
        [[1.255528, -0.076749, -0.178779], [-0.078411, 0.930809, 0.147602], [0.004733, 0.691367, 0.303900]]
    ),
}
# linear sRGB to XYZ (IEC 61966-2-1), and its white
TO_XYZ = np.array(
    [[0.4124564, 0.3575761, 0.1804375], [0.2126729, 0.7151522, 0.0721750], [0.0193339, 0.1191920, 0.9503041]]
)
WHITE = TO_XYZ.sum(1)


def lab_seen(rgb: np.ndarray, vision: str) -> np.ndarray:
    """CIELAB [..., 3] of sRGB colours [..., 3] in [0, 1] as a kind of vision sees them."""
    linear = np.where(rgb <= 0.04045, rgb / 12.92, ((rgb + 0.055) / 1.055) ** 2.4)
    seen = np.clip(linear @ VISIONS[vision].T, 0, 1)
    ratio = seen @ TO_XYZ.T / WHITE
    f = np.where(ratio > (6 / 29) ** 3, np.cbrt(ratio), ratio * (29 / 6) ** 2 / 3 + 4 / 29)
    return np.stack([116 * f[..., 1] - 16, 500 * (f[..., 0] - f[..., 1]), 200 * (f[..., 1] - f[..., 2])], -1)


def ciede2000(one: np.ndarray, other: np.ndarray) -> np.ndarray:
    """CIEDE2000 difference of CIELAB colours [..., 3] (Sharma, Wu & Dalal 2005)."""
    lightness, a, b = np.moveaxis(np.stack(np.broadcast_arrays(one, other)), -1, 0)
    chroma = np.hypot(a, b).mean(0)
    stretched = (1.5 - 0.5 * np.sqrt(chroma**7 / (chroma**7 + 25.0**7))) * a
    chroma = np.hypot(stretched, b)
    hue = np.degrees(np.arctan2(b, stretched)) % 360
    grey = chroma.prod(0) == 0
    turn = np.where(grey, 0, (hue[1] - hue[0] + 180) % 360 - 180)
    middle = np.where(grey, hue.sum(0), (hue[0] + turn / 2) % 360)
    mean_lightness, mean_chroma = lightness.mean(0), chroma.mean(0)

    def cosine(times: int, shift: float) -> np.ndarray:
        return np.cos(np.radians(times * middle + shift))

    t = 1 - 0.17 * cosine(1, -30) + 0.24 * cosine(2, 0) + 0.32 * cosine(3, 6) - 0.20 * cosine(4, -63)
    squared = (mean_lightness - 50) ** 2
    by_lightness = (lightness[1] - lightness[0]) / (1 + 0.015 * squared / np.sqrt(20 + squared))
    by_chroma = (chroma[1] - chroma[0]) / (1 + 0.045 * mean_chroma)
    by_hue = 2 * np.sqrt(chroma.prod(0)) * np.sin(np.radians(turn / 2)) / (1 + 0.015 * mean_chroma * t)
    rotation = -2 * np.sqrt(mean_chroma**7 / (mean_chroma**7 + 25.0**7))
    rotation = rotation * np.sin(np.radians(60 * np.exp(-(((middle - 275) / 25) ** 2))))
    return np.sqrt(by_lightness**2 + by_chroma**2 + by_hue**2 + rotation * by_chroma * by_hue)

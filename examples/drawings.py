"""Draws 3,600 small pictures of six classes into the folder `drawings`, with a subfolder for each class.

python examples/drawings.py

Colors, positions, sizes and angles are random, so that no two pictures are equal.
"""

import math
import pathlib
import random
from colorsys import hsv_to_rgb

import numpy as np
from PIL import Image, ImageDraw

PICTURES_PER_CLASS, SIZE = 600, 16
LARGE = 12 * SIZE  # Pictures are drawn in this size and then reduced, which makes edges smooth.
DARK, WHITE, YELLOW, GREEN = (45, 35, 55), (255, 250, 240), (255, 205, 60), (70, 140, 60)


def color(hue, saturation, brightness):
    """Converts a color to (red, green, blue) from 0 to 255."""
    return tuple(round(255 * x) for x in hsv_to_rgb(hue % 1, saturation, brightness))


class Canvas:
    """A background that fades from `top` to `bottom`. Shapes have coordinates around a random center near (0.5, y)."""

    def __init__(self, top, bottom, size, y=0.5, turn=0.15):
        height = np.linspace(0, 1, LARGE)[:, None, None]
        pixels = np.broadcast_to(top + height * np.subtract(bottom, top), (LARGE, LARGE, 3))
        self.image = Image.fromarray(pixels.astype(np.uint8))
        self.size, self.turn, self.mirror = size * LARGE, random.uniform(-turn, turn), random.choice([-1, 1])
        self.center = [LARGE * (z + random.uniform(-0.06, 0.06)) for z in (0.5, y)]

    def polygon(self, points, fill):
        c, s = self.size * math.cos(self.turn), self.size * math.sin(self.turn)
        x, y = np.transpose(points) * [[self.mirror], [1]]
        points = np.stack([c * x - s * y, s * x + c * y], axis=1) + self.center
        ImageDraw.Draw(self.image).polygon(points.ravel().tolist(), fill)

    def ellipse(self, x, y, width, height, fill, turn=0.0, start=0.0):
        angle = np.linspace(start, 2 * math.pi, 40)
        a, b = width * np.cos(angle), height * np.sin(angle)
        c, s = math.cos(turn), math.sin(turn)
        self.polygon(np.stack([x + c * a - s * b, y + s * a + c * b], axis=1), fill)

    def box(self, left, top, right, bottom, fill):
        self.polygon([(left, top), (right, top), (right, bottom), (left, bottom)], fill)


def sky(low, high, **options):
    """Returns a canvas with a blue, violet or pink sky."""
    hue = random.choice([0.55, 0.72, 0.92])
    return Canvas(color(hue, 0.5, 0.85), color(hue + 0.08, 0.15, 1.0), random.uniform(low, high), **options)


def butterfly():
    """Draws four wings of two colors."""
    canvas, hue = sky(0.34, 0.42, turn=0.3), random.choice([0.02, 0.12, 0.35, 0.7, 0.85])
    for side in (-1, 1):
        canvas.ellipse(side * 0.55, -0.35, 0.6, 0.42, color(hue, 0.8, 0.9), side * -0.6)
        canvas.ellipse(side * 0.42, 0.45, 0.45, 0.32, color(hue + 0.1, 0.8, 0.8), side * 0.7)
        canvas.ellipse(side * 0.62, -0.4, 0.22, 0.18, WHITE)
    canvas.ellipse(0, 0.05, 0.13, 0.75, DARK)
    return canvas


def cat():
    """Draws a face with ears."""
    hue, fur = random.choice([0.0, 0.45, 0.75]), random.choice([(230, 140, 60), (110, 110, 125), (70, 55, 60)])
    canvas = Canvas(color(hue, 0.2, 1.0), color(hue, 0.4, 0.8), random.uniform(0.32, 0.4), y=0.55)
    canvas.polygon([(-0.9, -1.05), (-0.15, -0.6), (0.15, -0.6), (0.9, -1.05), (0.85, 0), (-0.85, 0)], fur)
    canvas.ellipse(0, 0, 0.95, 0.8, fur)
    for side in (-1, 1):
        canvas.ellipse(side * 0.4, -0.1, 0.24, 0.26, (150, 215, 90))
        canvas.ellipse(side * 0.4, -0.1, 0.11, 0.24, DARK)
        canvas.ellipse(side * 0.2, 0.4, 0.28, 0.2, WHITE)
    canvas.ellipse(0, 0.25, 0.13, 0.1, (225, 110, 120))
    return canvas


def fish():
    """Draws a striped fish that looks to the left or right."""
    canvas = Canvas(color(0.52, 0.6, 0.9), color(0.62, 0.85, 0.45), random.uniform(0.28, 0.36))
    hue = random.uniform(-0.1, 0.15)
    canvas.polygon([(0.6, 0), (1.4, -0.6), (1.2, 0), (1.4, 0.6)], color(hue - 0.05, 0.9, 0.8))
    canvas.polygon([(-0.3, -0.4), (0.3, -0.95), (0.5, -0.3)], color(hue - 0.05, 0.9, 0.8))
    canvas.ellipse(0, 0, 1, 0.6, color(hue, 0.8, 1.0))
    for x in (-0.1, 0.4):
        canvas.ellipse(x, 0, 0.1, 0.5, WHITE)
    canvas.ellipse(-0.58, -0.1, 0.2, 0.2, WHITE)
    canvas.ellipse(-0.62, -0.1, 0.12, 0.12, DARK)
    return canvas


def flower():
    """Draws five, six or eight petals."""
    canvas, hue, petals = sky(0.26, 0.34, y=0.4), random.choice([0.0, 0.06, 0.8, 0.9]), random.choice([5, 6, 8])
    canvas.polygon([(-0.1, 0), (0.1, 0), (0.2, 3), (0, 3)], GREEN)
    canvas.ellipse(0.6, 1.4, 0.5, 0.2, GREEN, -0.6)
    for angle in np.arange(petals) * 2 * math.pi / petals:
        x, y = 0.65 * math.cos(angle), 0.65 * math.sin(angle)
        canvas.ellipse(x, y, 0.45, 1.8 / petals, color(hue, 0.75, 0.95), angle)
    canvas.ellipse(0, 0, 0.38, 0.38, YELLOW)
    return canvas


def house():
    """Draws a house on a hill."""
    canvas = sky(0.28, 0.36, y=0.55, turn=0.0)
    canvas.ellipse(0, 2.2, 4, 1.5, GREEN)
    canvas.box(-0.75, -0.2, 0.75, 0.9, color(random.choice([0.1, 0.6, 0.95]), 0.25, 0.95))
    canvas.box(0.35, -1.0, 0.6, -0.3, DARK)
    roof = color(random.choice([0.0, 0.04, 0.7]), 0.7, 0.7)
    canvas.polygon([(-1.05, -0.15), (0, -1.1), (1.05, -0.15)], roof)
    canvas.box(-0.5, 0.25, -0.1, 0.9, DARK)
    canvas.box(0.15, 0.1, 0.55, 0.5, YELLOW)
    return canvas


def mushroom():
    """Draws a cap with white dots."""
    canvas = Canvas(color(0.3, 0.35, 0.75), color(0.36, 0.7, 0.35), random.uniform(0.3, 0.38))
    canvas.polygon([(-0.3, -0.2), (0.3, -0.2), (0.42, 0.95), (-0.42, 0.95)], WHITE)
    canvas.ellipse(0, 0, 1, 0.95, color(random.uniform(-0.03, 0.1), 0.85, 0.85), start=math.pi)
    for x, y in [(-0.5, -0.3), (0, -0.6), (0.45, -0.25)]:
        canvas.ellipse(x, y, 0.17, 0.15, WHITE)
    return canvas


CLASSES = (butterfly, cat, fish, flower, house, mushroom)


def draw(kind):
    """Returns a new picture of a class, a function in CLASSES."""
    return kind().image.reduce(LARGE // SIZE)


def pixels(images):
    """Returns the pixels [N, D] of images [N, H, W, C]: features for `--mode=evaluate`."""
    return images.reshape(len(images), -1) / 255


if __name__ == "__main__":
    random.seed(0)
    for kind in CLASSES:
        folder = pathlib.Path("drawings", kind.__name__)
        folder.mkdir(parents=True, exist_ok=True)
        for number in range(PICTURES_PER_CLASS):
            draw(kind).save(folder / f"{number:03d}.png")
    print(f"{PICTURES_PER_CLASS * len(CLASSES):,} pictures: {folder.parent}")

"""Thumbnails of 150 × 150 pixels."""

import numpy as np
from PIL import Image

import tally


class Thumbnail(tally.Scorer):
    output = "image"
    size = (150, 150)

    def prepare(self, item):
        return np.asarray(Image.fromarray(item.value).resize(self.size))

    def score(self, batch):
        return batch

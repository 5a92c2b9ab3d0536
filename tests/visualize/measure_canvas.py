"""Seconds of the functions of canvases, and torchmil's, best of three: ``python tests/visualize/measure_canvas.py``."""

from __future__ import annotations

import time

import numpy as np
import torchmil.visualize

import bigbag.visualize


def main() -> None:
    rng = np.random.default_rng(0)
    for num, size in ((200_000, 16), (20_000, 64)):
        side = int(np.sqrt(num / 0.7))
        rows, columns = np.divmod(rng.permutation(side * side)[:num], side)
        patches, values = list(rng.integers(0, 256, (num, size, size, 3), dtype=np.uint8)), rng.random(num)
        canvas = bigbag.visualize.patches_to_canvas(patches, rows, columns, size)
        for name, arguments in {
            "patches_to_canvas": (patches, rows, columns, size),
            "draw_patches_contour": (canvas, rows, columns, size, 0.1),
            "draw_heatmap_wsi": (canvas, values, size, rows, columns),
        }.items():
            best = {}
            for _ in range(3):
                for module in (torchmil.visualize, bigbag.visualize):
                    start = time.perf_counter()
                    getattr(module, name)(*arguments)
                    taken = time.perf_counter() - start
                    best[module.__name__] = min(taken, best.get(module.__name__, taken))
            print(
                f"{num:>7} x {size} px  {name:<21}", *(f"{key} {value:.2f} s" for key, value in best.items()), sep="  "
            )


if __name__ == "__main__":
    main()

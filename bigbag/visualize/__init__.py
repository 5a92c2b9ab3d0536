"""Pictures of bags and what models see in them, and the HTML report of a run."""

from bigbag.visualize.report import write_report
from bigbag.visualize.vis_ctscan import draw_heatmap_ctscan, draw_slices_contour, slices_to_canvas
from bigbag.visualize.vis_wsi import draw_heatmap_wsi, draw_patches_contour, patches_to_canvas

__all__ = [
    "draw_heatmap_ctscan",
    "draw_heatmap_wsi",
    "draw_patches_contour",
    "draw_slices_contour",
    "patches_to_canvas",
    "slices_to_canvas",
    "write_report",
]

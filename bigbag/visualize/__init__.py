"""Pictures of bags and what models see in them, and the HTML report of a run."""

from bigbag.visualize.geojson import instance_features, region_features, write_geojson
from bigbag.visualize.heatmap import Heatmap, blend, gallery, scaled, with_colour_bar
from bigbag.visualize.placement import Placement, place
from bigbag.visualize.pyramid import write_deepzoom
from bigbag.visualize.regions import Region, find_regions
from bigbag.visualize.report import write_report
from bigbag.visualize.slide_image import SlideImage, find_slides
from bigbag.visualize.vis_ctscan import draw_heatmap_ctscan, draw_slices_contour, slices_to_canvas
from bigbag.visualize.vis_wsi import draw_heatmap_wsi, draw_patches_contour, patches_to_canvas

__all__ = [
    "Heatmap",
    "Placement",
    "Region",
    "SlideImage",
    "blend",
    "draw_heatmap_ctscan",
    "draw_heatmap_wsi",
    "draw_patches_contour",
    "draw_slices_contour",
    "find_regions",
    "find_slides",
    "gallery",
    "instance_features",
    "patches_to_canvas",
    "place",
    "region_features",
    "scaled",
    "slices_to_canvas",
    "with_colour_bar",
    "write_deepzoom",
    "write_geojson",
    "write_report",
]
